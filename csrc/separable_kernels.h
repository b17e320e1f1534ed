#pragma once
// A group of separable convolutions, an image at a time, on plain pointers and sizes: an image goes through
// all pairs of a depthwise and a pointwise convolution, D and P, in buffers that stay in the cache.
//
// Forward, for each pair:
//
//     a = relu(s x + b)       x, a [N, C, H, W]; s, b [C]
//     y = D a,  z = P y       y, z [N, C, out_h, out_w] with out_h = (H - 1) / stride + 1
//     z_sums = (Σ z, Σ z²)    [2, C], over images and pixels
//
// s and b are those of the batch norm in front (none: 1 and 0), z_sums is what the one behind needs. Only z
// is kept: s x + b and a are never stored as a whole, and y is computed again in the backward pass.
//
// Backward, from the gradients grad_z by z itself, G by a term scale z + shift (scale, shift [C]) and
// of_z (norms.h), of which any may be 0:
//
//     dz = grad_z + scale G + of_z[0] + of_z[1] z    [N, C, out_h, out_w]
//     dy = Pᵀ dz                                                     [N, C, out_h, out_w]
//     h  = [s x + b > 0] Dᵀ dy                                       [N, C, H, W], by s x + b
//     by x: s h,  by s: Σ h x,  by b: Σ h
//     by P: Σ dz yᵀ                                                  [C, C], over images and pixels
//     by D: Σ dy a, with a where the tap reads it                    [C, k, k]
//
// Derivative of the backward pass. A gradient by the gradient by x is a tangent of x, x', and so are those of
// s, b, D and P. As z is linear in each of a, D and P,
//
//     <x', by x> + <s', by s> + <b', by b> + <D', by D> + <P', by P> = <dz, z'>
//     with z' = P D a' + P D' a + P' D a,  a' = [s x + b > 0] (s x' + s' x + b')
//
// so that the derivative by dz is z', and those by x, s, b, D and P are backward passes of the three
// summands, all from the same dz: the same code with one of a, D and P replaced by its tangent, whose own
// gradient is left out. Where a is replaced,
//
//     by x: s' h,  by s: Σ h x',  by b: 0,  by P and by D: as above, with a' in the place of a
//
// Each pass computes its summand of z' too, tangent_z, and tangent_sums = (Σ z', Σ z' z, Σ z' G) [3, C],
// through which of_z, z and scale are reached.
#include "separable_group.h"

namespace ldarts {

// z = P y for some pixels. Per channel, the sums of z, of z other (other null: of z z) and, unless grad is
// null, of z grad are added to sums, [2 or 3, width], by way of `part` [4, width].
//
// They are float32 sums of the few pixels of one call and float64 sums of these. Less one pixel of the other
// factor, `shift`, the products stay as small as the deviations from a mean far from 0, which norms.h
// subtracts: Σ z other = Σ z (other - shift) + shift Σ z. Of z z both factors are shifted.
template <typename T>
void project(const Group<T>& group, const Pair<T>& pair, const T* y, int64_t pixels, T* z, const T* other,
             const T* grad, Buffer<T>& part, double* sums) {
  const int64_t C = group.C, width = group.width;
  T* shift = part.data() + 3 * width;
  std::fill(part.begin(), part.end(), T(0));
  auto put = [&](int64_t pixel, auto rows, int64_t c, const Vec<T>* zs) {
    const int64_t count = std::min(kV<T>, C - c), first = pixel * C + c;
    if (pixel == 0) (other ? load(other + c, count) : zs[0]).store(shift + c);
    const auto less = Vec<T>::loadu(shift + c);
    auto sum = Vec<T>::loadu(part.data() + c), product = Vec<T>::loadu(part.data() + width + c);
    for (int r = 0; r < rows; ++r) {
      store(z + first + r * C, zs[r], count);
      const auto one = other ? zs[r] : zs[r] - less;
      sum = sum + one;
      product = at::vec::fmadd(one, other ? load(other + first + r * C, count) - less : one, product);
    }
    sum.store(part.data() + c);
    product.store(part.data() + width + c);
    if (!grad) return;
    product = Vec<T>::loadu(part.data() + 2 * width + c);
    for (int r = 0; r < rows; ++r)
      product = at::vec::fmadd(zs[r], load(grad + first + r * C, count), product);
    product.store(part.data() + 2 * width + c);
  };
  multiply(y, pixels, C, pair.pointwise.data(), width, put);
  for (int64_t c = 0; c < C; ++c) {
    add_shifted_sums(part[c], part[width + c], shift[c], other ? 0 : pixels, sums[c], sums[C + c]);
    if (grad) sums[2 * C + c] += part[2 * width + c];
  }
}

// How many rows of the output a pass goes through at a time: about `pixels`, to stay in the L1 cache.
template <typename T>
int64_t rows_at_once(const Group<T>& group, int64_t pixels) {
  return std::min(group.out_h, std::max<int64_t>(1, pixels / group.out_w));
}

// z = P D relu(s x + b) and z_sums of a group, with the buffers of one thread.
template <typename T>
struct Forward {
  const Group<T>& group;
  const std::vector<T*>& z;  // of each pair, [N, out_h, out_w, C]

  int64_t rows = rows_at_once(group, 128);
  Buffer<T> padded = group.padded_input(), y = Buffer<T>(rows * group.row + 2 * kV<T>);
  Buffer<T> part = Buffer<T>(4 * group.width);

  // The sums of image n are added to z_sums, [U, 2, C].
  void image(int64_t n, double* z_sums) {
    const int64_t C = group.C;
    for (size_t u = 0; u < group.pairs.size(); ++u, z_sums += 2 * C) {
      const Pair<T>& pair = group.pairs[u];
      if (!group.shares_input(u)) group.fill(pair.input, n, padded.data());
      T* to = z[u] + n * group.out_size();
      for (int64_t first = 0; first < group.out_h; first += rows) {
        const int64_t count = std::min(rows, group.out_h - first);
        for (int64_t o = 0; o < count; ++o)
          group.convolve(pair, first + o, padded.data(), y.data() + o * group.row);
        project<T>(group, pair, y.data(), count * group.out_w, to + first * group.row, nullptr, nullptr, part,
                   z_sums);
      }
    }
  }
};

// What the backward pass of a pair reads and writes for each image; null: absent, or not asked for.
template <typename T>
struct PairGrads {
  const T *z, *grad_z, *grad_term;  // [N, out_h, out_w, C]; grad_term: G
  const T *scale, *of_z;     // [C] of grad_term; [2, C]
  T* grad_x;                        // [N, H, W, C]
  bool add;                         // to grad_x, which a pair before this one has written
  T* tangent_z;                     // [N, out_h, out_w, C]; only beside the gradients by the weights
};

// What the images add to; null: not asked for.
template <typename T>
struct GradSums {
  double* input_sums;                  // [U, 2, C]: Σ h, Σ h x; with a tangent 0, Σ h x'
  T *grad_depthwise, *grad_pointwise;  // [taps of all pairs, pattern], [U, C of z, width]; both or none
  double* tangent_sums;                // [U, 3, C]: Σ z', Σ z' z, Σ z' G
};

// The gradients of a group, or the derivatives of its gradients, with the buffers of one thread:
//
//     dz = grad_z + scale G + of_z[0] + of_z[1] z,  dy = Pᵀ dz,  h = [s x + b > 0] Dᵀ dy
//
// by x: s h (s' h with a tangent), by P: Σ dz yᵀ, by D: Σ dy a.
template <typename T>
struct Backward {
  const Group<T>& group;
  const std::vector<PairGrads<T>>& all_grads;

  int64_t C = group.C, pattern = group.pattern;
  int64_t rows = rows_at_once(group, 32);
  int64_t da_pitch = round_up((group.in_w + group.stride - 1) / group.stride * C, kV<T>);
  Buffer<T> padded = group.padded_input();
  Buffer<T> y = Buffer<T>(rows * group.row + 2 * kV<T>), dz = Buffer<T>(rows * group.row);
  Buffer<T> dy = Buffer<T>((group.out_h + 2 * group.halo) * group.grad_pitch + 2 * kV<T>);  // padded
  Buffer<T> da = Buffer<T>(group.stride * da_pitch);
  Buffer<T> by_sum = Buffer<T>(pattern), by_square = by_sum, scale = by_sum;
  Buffer<T> input_sums = Buffer<T>(2 * pattern), part = Buffer<T>(4 * group.width);

  void image(int64_t n, const GradSums<T>& sums) {
    for (size_t u = 0; u < group.pairs.size(); ++u) {
      const GradSums<T> of_pair = {
          sums.input_sums ? sums.input_sums + u * 2 * C : nullptr,
          sums.grad_depthwise ? sums.grad_depthwise + group.pairs[u].first_tap * pattern : nullptr,
          sums.grad_pointwise ? sums.grad_pointwise + u * C * group.width : nullptr,
          sums.tangent_sums ? sums.tangent_sums + u * 3 * C : nullptr};
      if (sums.grad_pointwise && !group.shares_input(u))
        group.fill(group.pairs[u].input, n, padded.data());
      image_of_pair(group.pairs[u], all_grads[u], n, of_pair);
    }
  }

 private:
  T* dy_row(int64_t o) { return dy.data() + (o + group.halo) * group.grad_pitch + group.halo * C; }

  void image_of_pair(const Pair<T>& pair, const PairGrads<T>& grads, int64_t n, const GradSums<T>& sums) {
    fill_pattern(by_sum.data(), pattern, grads.of_z, 1, C);
    fill_pattern(by_square.data(), pattern, grads.of_z + C, 1, C);
    if (grads.grad_term) fill_pattern(scale.data(), pattern, grads.scale, 1, C);
    for (int64_t o = 0; o < group.out_h; o += rows)
      output_rows(pair, grads, n, o, std::min(rows, group.out_h - o), sums);
    if (!grads.grad_x) return;
    std::fill(input_sums.begin(), input_sums.end(), T(0));
    const bool with_sums = sums.input_sums != nullptr;
    for (int64_t h = 0; h < group.in_h; ++h) input_row(pair, grads, n, h, with_sums);
    for (int64_t k = 0; k < 2 && with_sums; ++k)
      add_pattern(sums.input_sums + k * C, 1, input_sums.data() + k * pattern, pattern, C);
  }

  // dz and dy of some rows of the output, and their share of the gradients by the weights and of z'.
  void output_rows(const Pair<T>& pair, const PairGrads<T>& grads, int64_t n, int64_t first, int64_t count,
                   const GradSums<T>& sums) {
    const int64_t place_of_rows = n * group.out_size() + first * group.row;
    auto rows_of = [&](auto* image) { return image ? image + place_of_rows : nullptr; };
    const T *z = rows_of(grads.z), *grad_z = rows_of(grads.grad_z), *grad_term = rows_of(grads.grad_term);
    each_vector<T>(count * group.row, pattern, [&](int64_t i, int64_t place, auto size) {
      auto sum = at::vec::fmadd(Vec<T>::loadu(by_square.data() + place), load(z + i, size),
                                Vec<T>::loadu(by_sum.data() + place));
      if (grad_term)
        sum = at::vec::fmadd(Vec<T>::loadu(scale.data() + place), load(grad_term + i, size), sum);
      if (grad_z) sum = sum + load(grad_z + i, size);
      store(dz.data() + i, sum, size);
    });
    for (int64_t o = 0; o < count; ++o) {
      T* to = dy_row(first + o);
      multiply(dz.data() + o * group.row, group.out_w, C, pair.transposed.data(), group.width,
               [&](int64_t pixel, auto number, int64_t c, const Vec<T>* products) {
                 for (int r = 0; r < number; ++r)
                   store(to + (pixel + r) * C + c, products[r], std::min(kV<T>, C - c));
               });
      if (!sums.grad_pointwise) continue;
      group.convolve(pair, first + o, padded.data(), y.data() + o * group.row);
      correlate_row(to, round_up(group.row, kV<T>) / kV<T>, group.period,
                    group.source_row(first + o, padded.data()), pair.output_taps, sums.grad_depthwise);
    }
    if (sums.grad_pointwise)
      outer(dz.data(), y.data(), count * group.out_w, C, sums.grad_pointwise, group.width);
    if (!grads.tangent_z) return;
    project(group, pair, y.data(), count * group.out_w, rows_of(grads.tangent_z), z, grad_term, part,
            sums.tangent_sums);
  }

  // The gradient by a row of x, and its share of the sums of h.
  void input_row(const Pair<T>& pair, const PairGrads<T>& grads, int64_t n, int64_t row, bool with_sums) {
    for (int64_t phase = 0; phase < group.stride; ++phase)
      group.convolve_back(pair, row, phase, dy.data(), da.data() + phase * da_pitch);
    const Input<T>& input = pair.input;
    const T* scale_of_h = (input.tangent ? input.scale_tangent : input.scale).data();
    group.each_span(row, [&](int64_t w, int64_t first, int64_t size) {
      const int64_t begin = n * group.in_size() + first;
      const T *from = da.data() + w % group.stride * da_pitch + w / group.stride * C, *x = input.x + begin;
      T* dx = grads.grad_x + begin;
      for (int64_t place = 0; place < pattern; place += kV<T>) {
        Vec<T> sum(0), product(0);
        for (int64_t i = place; i < size; i += pattern) {
          const int64_t count = std::min(kV<T>, size - i);
          const auto xs = load(x + i, count);
          const auto cut = input.before_relu(xs, place) <= Vec<T>(0);  // false for NaN, as in PyTorch
          const auto h = Vec<T>::blendv(load(from + i, count), Vec<T>(0), cut);
          const auto before = grads.add ? load(dx + i, count) : Vec<T>(0);
          store(dx + i, at::vec::fmadd(Vec<T>::loadu(scale_of_h + place), h, before), count);
          if (!with_sums) continue;
          if (!input.tangent) sum = sum + h;
          product = at::vec::fmadd(h, input.tangent ? load(input.tangent + begin + i, count) : xs, product);
        }
        const Vec<T> found[] = {sum, product};
        for (int64_t k = 0; k < 2; ++k) {
          T* to = input_sums.data() + k * pattern + place;
          (found[k] + Vec<T>::loadu(to)).store(to);
        }
      }
    });
  }
};

// The gradients by the weights of a pair, [C, taps] and [C, C], from the sums of all images, [taps, pattern]
// and [C, width].
template <typename T>
void write_weights(const Group<T>& group, const Pair<T>& pair, const T* depthwise_sums,
                   const T* pointwise_sums, T* grad_depthwise, T* grad_pointwise) {
  const int64_t C = group.C, taps = pair.kernel_size * pair.kernel_size;
  std::fill_n(grad_depthwise, C * taps, T(0));
  for (int64_t t = 0; t < taps; ++t)
    add_pattern(grad_depthwise + t, taps, depthwise_sums + t * group.pattern, group.pattern, C);
  for (int64_t row = 0; row < C; ++row)
    std::copy_n(pointwise_sums + row * group.width, C, grad_pointwise + row * C);
}

}  // namespace ldarts
