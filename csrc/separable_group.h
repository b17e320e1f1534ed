#pragma once
// A group of separable convolutions, ready for a pass, and where everything lies in the buffers of an image.
//
// A pair is one depthwise convolution D [C, 1, k, k] (k odd, padded to keep the size) and the pointwise
// convolution P [C, C, 1, 1] behind it. A group is U pairs of one stride; their inputs have one shape and
// often are one tensor. x and tangent are channels-last. The letters are those of separable_kernels.h.
#include "checks.h"
#include "separable_rows.h"

namespace ldarts {

// What the depthwise convolution of a pair reads: a = relu(s x + b), or with a tangent
// a' = [s x + b > 0] (s x' + s' x + b').
template <typename T>
struct Input {
  const T *x, *tangent;  // [N, H, W, C]; tangent: x', null where a is not replaced
  Buffer<T> scale, shift, scale_tangent, shift_tangent;  // patterns

  // affine: b, s, b' and s', [2 or 4, C]; null or too few: 0, 1, 0 and 0
  Input(const T* x, const T* tangent, const T* affine, int64_t rows, int64_t C, int64_t pattern)
      : x(x), tangent(tangent) {
    Buffer<T>* const coefficients[] = {&shift, &scale, &shift_tangent, &scale_tangent};
    for (int64_t row = 0; row < 4; ++row) {
      coefficients[row]->assign(pattern, T(row == 1));
      if (affine && row < rows) fill_pattern(coefficients[row]->data(), pattern, affine + row * C, 1, C);
    }
  }

  Vec<T> before_relu(const Vec<T>& xs, int64_t place) const {
    return at::vec::fmadd(Vec<T>::loadu(scale.data() + place), xs, Vec<T>::loadu(shift.data() + place));
  }

  // The `count` elements from i on, which begin at this place of the pattern.
  Vec<T> operator()(int64_t i, int64_t place, int64_t count) const {
    const auto xs = load(x + i, count), before = before_relu(xs, place);
    if (!tangent) return at::vec::maximum(before, Vec<T>(0));
    const auto rest = at::vec::fmadd(Vec<T>::loadu(scale_tangent.data() + place), xs,
                                     Vec<T>::loadu(shift_tangent.data() + place));
    const auto a = at::vec::fmadd(Vec<T>::loadu(scale.data() + place), load(tangent + i, count), rest);
    return Vec<T>::blendv(a, Vec<T>(0), before <= Vec<T>(0));
  }
};

template <typename T>
struct Pair {
  Input<T> input;
  int64_t kernel_size, dilation, padding;
  int64_t first_tap;                          // its place among the taps of all pairs
  Buffer<T> depthwise = {};                   // D [k * k, pattern]
  Buffer<T> pointwise = {}, transposed = {};  // P [C of y, width], [C of z, width]; only what a pass needs
  Taps<T> output_taps = {};                   // what a row of y reads of the padded input
  std::vector<Taps<T>> input_taps = {};       // [stride, stride], what Dᵀ reads of dy, by place mod stride
};

// An image is padded with `halo` pixels on each side, as [row, column mod stride, column / stride, C], so
// that the columns that a tap reads follow each other.
template <typename T>
struct Group {
  int64_t N, C, in_h, in_w, stride, out_h, out_w;
  int64_t row;                // elements of a row of z
  int64_t pattern, period;    // of the channels along a row, in elements and in vectors
  int64_t width;              // of a matrix of C columns: whole vectors
  int64_t halo = 0;           // zeros around an image, in pixels
  int64_t taps = 0;           // of all pairs
  int64_t pitch, grad_pitch;  // from row to row of a padded input, by its parity, and of a padded dy
  std::vector<Pair<T>> pairs;

  // x, tangent: one for each pair or one for all; tangent may be empty. affine: [U, 2 or 4, C] of b and s,
  // then b' and s'. forward, backward: which of z = P D a and its gradients a pass computes.
  Group(at::TensorList x, at::TensorList tangent, const std::optional<at::Tensor>& affine,
        at::TensorList depthwise, at::TensorList pointwise, int64_t stride, at::IntArrayRef dilations,
        bool forward, bool backward)
      : N(x[0].size(0)), C(x[0].size(1)), in_h(x[0].size(2)), in_w(x[0].size(3)), stride(stride),
        out_h((in_h - 1) / stride + 1), out_w((in_w - 1) / stride + 1), row(out_w * C),
        pattern(std::lcm(C, kV<T>)), period(pattern / kV<T>), width(round_up(C, kV<T>)) {
    at::Tensor coefficients;
    if (affine) coefficients = affine->to(x[0].scalar_type()).contiguous();
    const int64_t rows = affine ? coefficients.size(1) : 0;
    auto of_pair = [](at::TensorList tensors, int64_t u) {
      return tensors.empty() ? nullptr : read<T>(tensors[tensors.size() == 1 ? 0 : u]);
    };
    const int64_t U = depthwise.size();
    for (int64_t u = 0; u < U; ++u) {
      const int64_t k = depthwise[u].size(2), padding = k / 2 * dilations[u];
      halo = std::max(halo, round_up(padding, 2));  // even, so that the columns of one parity stay together
      const T* affine_of_pair = affine ? read<T>(coefficients) + u * rows * C : nullptr;
      const Input<T> input(of_pair(x, u), of_pair(tangent, u), affine_of_pair, rows, C, pattern);
      pairs.push_back({input, k, dilations[u], padding, taps});
      taps += k * k;
    }
    pitch = (in_w + 2 * halo + stride - 1) / stride * C;
    grad_pitch = (out_w + 2 * halo) * C + kV<T>;  // zeros for the vector that reaches past a row
    for (int64_t u = 0; u < U; ++u) {
      copy_weights(pairs[u], depthwise[u].contiguous(), pointwise[u].contiguous(), forward, backward);
      list_taps(pairs[u]);
    }
  }
  Group(const Group&) = delete;  // taps point into the weights

  int64_t in_size() const { return in_h * in_w * C; }
  int64_t out_size() const { return out_h * out_w * C; }
  Buffer<T> padded_input() const { return Buffer<T>((in_h + 2 * halo) * stride * pitch + kV<T>); }

  // Whether pair u reads what the one before it does: pairs of one x and tangent have one scale and shift.
  bool shares_input(size_t u) const {
    if (u == 0) return false;
    const Input<T> &input = pairs[u].input, &before = pairs[u - 1].input;
    return input.x == before.x && input.tangent == before.tangent;
  }

  // visit(column, first input element, elements) for the spans of a row of an image that stay together in the
  // buffers: all of it, or, with a stride of 2, where columns of one parity do, a pixel.
  template <typename Visit>
  void each_span(int64_t h, const Visit& visit) const {
    const int64_t columns = stride == 1 ? in_w : 1;
    for (int64_t w = 0; w < in_w; w += columns) visit(w, (h * in_w + w) * C, columns * C);
  }

  // a of image n into the zero-padded buffer.
  void fill(const Input<T>& input, int64_t n, T* padded) const {
    for (int64_t h = 0; h < in_h; ++h)
      each_span(h, [&](int64_t w, int64_t first, int64_t size) {
        T* to = padded + ((h + halo) * stride + w % stride) * pitch + (w + halo) / stride * C;
        each_vector<T>(size, pattern, [&](int64_t i, int64_t place, auto count) {
          store(to + i, input(n * in_size() + first + i, place, count), count);
        });
      });
  }

  // Where the taps of row o of the output begin to read.
  const T* source_row(int64_t o, const T* padded) const { return padded + o * stride * stride * pitch; }

  // Row o of y = D a, from the padded a.
  void convolve(const Pair<T>& pair, int64_t o, const T* padded, T* y) const {
    convolve_row(y, round_up(row, kV<T>) / kV<T>, period, source_row(o, padded), pair.output_taps);
  }

  // The columns w with w mod stride == phase of row h of Dᵀ dy, from the padded dy.
  void convolve_back(const Pair<T>& pair, int64_t h, int64_t phase, const T* dy, T* da) const {
    const int64_t columns = (in_w - phase + stride - 1) / stride;
    convolve_row(da, round_up(columns * C, kV<T>) / kV<T>, period, dy + h / stride * grad_pitch,
                 pair.input_taps[h % stride * stride + phase]);
  }

 private:
  void copy_weights(Pair<T>& pair, const at::Tensor& depthwise, const at::Tensor& pointwise, bool forward,
                    bool backward) const {
    const int64_t taps_of_pair = pair.kernel_size * pair.kernel_size;
    pair.depthwise.resize(taps_of_pair * pattern);
    for (int64_t t = 0; t < taps_of_pair; ++t)
      fill_pattern(pair.depthwise.data() + t * pattern, pattern, read<T>(depthwise) + t, taps_of_pair, C);
    pair.pointwise.resize(forward ? C * width : 0);
    pair.transposed.resize(backward ? C * width : 0);
    for (int64_t out = 0; out < C; ++out)
      for (int64_t in = 0; in < C; ++in) {
        const T weight = read<T>(pointwise)[out * C + in];
        if (forward) pair.pointwise[in * width + out] = weight;
        if (backward) pair.transposed[out * width + in] = weight;
      }
  }

  void list_taps(Pair<T>& pair) const {
    const int64_t k = pair.kernel_size, dilation = pair.dilation, first = halo - pair.padding;
    auto weight = [&](int64_t kh, int64_t kw) { return pair.depthwise.data() + (kh * k + kw) * pattern; };
    for (int64_t kh = 0; kh < k; ++kh)
      for (int64_t kw = 0; kw < k; ++kw) {
        const int64_t r = first + kh * dilation, column = first + kw * dilation;
        const int64_t offset = (r * stride + column % stride) * pitch + column / stride * C;
        pair.output_taps.push_back({offset, weight(kh, kw)});
      }
    for (int64_t h = 0; h < stride; ++h)
      for (int64_t w = 0; w < stride; ++w) {
        Taps<T>& taps_here = pair.input_taps.emplace_back();
        for (int64_t kh = 0; kh < k; ++kh)
          for (int64_t kw = 0; kw < k; ++kw) {
            const int64_t r = h + pair.padding - kh * dilation, column = w + pair.padding - kw * dilation;
            if (r % stride != 0 || column % stride != 0) continue;
            const int64_t offset = (r / stride + halo) * grad_pitch + (column / stride + halo) * C;
            taps_here.push_back({offset, weight(kh, kw)});
          }
      }
  }
};

}  // namespace ldarts
