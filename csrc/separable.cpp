// A bank of separable units on the CPU: all the depthwise + pointwise convolutions that leave one state, in one call.
//
// Unit u, with every tensor channels-last and P, D its pointwise and depthwise weights:
//
//     z = P D a,  a = [s x + b > 0] (s x + b),  moments = (sum z, sum z z) per channel
//
// s and b are those of the batch norm in front (absent: 1 and 0), so that neither the normalised tensor nor its ReLU is ever
// in memory; D a is not kept either, but computed again in the backward pass. An image at a time goes through all units, in
// buffers that stay in the cache. Images are dealt to kChunks sums, whatever the number of threads: the same bits always.
#include "vectors.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace ldarts {
namespace {

constexpr int64_t kChunks = 8;
constexpr int kRows = 8;      // pixels whose products with a matrix are computed side by side
constexpr int64_t kTaps = 9;  // taps whose weight gradients are

template <typename T>
struct Tap {
  int64_t offset;   // of its source, from where the row's begins
  const T* weight;  // [period * kV]
};
template <typename T> using Taps = std::vector<Tap<T>>;

// The inner loops below are functions of their own, always inlined, with sums of their own: where the sums are captured by a
// lambda, the compiler keeps them in memory.
template <int rows, typename T>
[[gnu::always_inline]] inline void convolve_block(T* out, const T* source, int64_t apart, const Tap<T>* taps, int64_t count,
                                                  int64_t place) {
  Vec<T> sum[rows];
  for (int r = 0; r < rows; ++r) sum[r] = Vec<T>(0);
  for (int64_t t = 0; t < count; ++t) {
    const auto weight = Vec<T>::loadu(taps[t].weight + place);
    const T* from = source + taps[t].offset;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] = at::vec::fmadd(weight, Vec<T>::loadu(from + r * apart), sum[r]);
  }
  for (int r = 0; r < rows; ++r) sum[r].store(out + r * apart);
}

// out[i] = sum over the taps of weight[i mod (period * kV)] * source[offset + i], for whole vectors.
template <typename T>
void convolve_row(T* out, int64_t vectors, int64_t period, const T* source, const Taps<T>& taps) {
  constexpr int64_t V = kV<T>;
  const int64_t count = taps.size();
  for (int64_t j = 0; j < period; ++j) {
    int64_t i = j;
    for (; i + (kRows - 1) * period < vectors; i += kRows * period)
      convolve_block<kRows>(out + i * V, source + i * V, period * V, taps.data(), count, j * V);
    for (; i < vectors; i += period) convolve_block<1>(out + i * V, source + i * V, period * V, taps.data(), count, j * V);
  }
}

template <int group, typename T>
[[gnu::always_inline]] inline void correlate_block(const T* grad, const T* source, int64_t apart, int64_t count,
                                                   const Tap<T>* taps, T* sums) {
  Vec<T> sum[group];
  const T* from[group];
  for (int g = 0; g < group; ++g) sum[g] = Vec<T>::loadu(sums + g * apart), from[g] = source + taps[g].offset;
  for (int64_t i = 0; i < count; i += apart) {
    const auto value = Vec<T>::loadu(grad + i);
#pragma GCC unroll 9
    for (int g = 0; g < group; ++g) sum[g] = at::vec::fmadd(value, Vec<T>::loadu(from[g] + i), sum[g]);
  }
  for (int g = 0; g < group; ++g) sum[g].store(sums + g * apart);
}

// sums[tap, :] += grad * source[offset of the tap], lane by lane over the vectors of a row; sums [taps, period * kV].
template <typename T>
void correlate_row(const T* grad, int64_t vectors, int64_t period, const T* source, const Taps<T>& taps, T* sums) {
  const int64_t apart = period * kV<T>;
  each_group<kTaps>(taps.size(), [&](int64_t k, auto number) {
    for (int64_t at = 0; at < apart; at += kV<T>)
      correlate_block<decltype(number)::value>(grad + at, source + at, apart, vectors * kV<T> - at, taps.data() + k,
                                               sums + k * apart + at);
  });
}

// visit(first, constant number) over `count` things, kRows at a time and then one by one.
template <typename Visit>
void each_rows(int64_t count, const Visit& visit) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) visit(i, Constant<kRows>{});
  for (; i < count; ++i) visit(i, Constant<1>{});
}

// sum[v][r] = the products over c, of `count`, of left[r * rows_apart + c * step] and the vectors at right + c * width: the inner
// loop of both matrix products.
template <int vectors, int rows, typename T>
[[gnu::always_inline]] inline void multiply_add(const T* left, int64_t rows_apart, int64_t step, const T* right, int64_t width,
                                                int64_t count, Vec<T> (&result)[vectors][rows]) {
  Vec<T> sum[vectors][rows];
  for (int v = 0; v < vectors; ++v)
    for (int r = 0; r < rows; ++r) sum[v][r] = result[v][r];
  for (int64_t c = 0; c < count; ++c, left += step, right += width) {
    Vec<T> m[vectors];
    for (int v = 0; v < vectors; ++v) m[v] = Vec<T>::loadu(right + v * kV<T>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<T> value(left[r * rows_apart]);
      for (int v = 0; v < vectors; ++v) sum[v][r] = at::vec::fmadd(value, m[v], sum[v][r]);
    }
  }
  for (int v = 0; v < vectors; ++v)
    for (int r = 0; r < rows; ++r) result[v][r] = sum[v][r];
}

// run(C, first column, constant number of vectors) for the columns of a matrix, two vectors at a time; C, which addresses are
// computed from, is a constant where it is a common one.
template <typename T, typename Run>
void each_block_of_columns(int64_t channels, int64_t width, const Run& run) {
  auto columns = [&](auto C) {
    int64_t first = 0;
    for (; first + 2 * kV<T> <= width; first += 2 * kV<T>) run(C, first, Constant<2>{});
    if (first < width) run(C, first, Constant<1>{});
  };
  switch (channels) {
    case 16: return columns(Constant<16>{});
    case 32: return columns(Constant<32>{});
    case 64: return columns(Constant<64>{});
    default: columns(channels);
  }
}

// put(pixel, constant number of pixels, channel, products) with products[r] = sum over c of in[pixel + r, c] * matrix[c, channel
// and on], a vector. in: [pixels, channels]; matrix: [channels, width].
template <typename T, typename Put>
void multiply(const T* in, int64_t pixels, int64_t channels, const T* matrix, int64_t width, const Put& put) {
  each_block_of_columns<T>(channels, width, [&](auto C, int64_t first, auto wide) {
    each_rows(pixels, [&](int64_t q, auto number) {
      Vec<T> sum[decltype(wide)::value][decltype(number)::value];
      for (auto& row : sum)
        for (auto& value : row) value = Vec<T>(0);
      multiply_add(in + q * C, C, 1, matrix + first, width, C, sum);
      for (int v = 0; v < decltype(wide)::value; ++v) put(q, number, first + v * kV<T>, sum[v]);
    });
  });
}

// sums[r, c] += sum over the pixels of left[pixel, r] * right[pixel, c]; left, right: [pixels, channels], sums: [channels, width].
template <typename T>
void outer(const T* left, const T* right, int64_t pixels, int64_t channels, T* sums, int64_t width) {
  each_block_of_columns<T>(channels, width, [&](auto C, int64_t first, auto wide) {
    each_rows(C, [&](int64_t row, auto number) {
      constexpr int vectors = decltype(wide)::value, rows = number;
      T* to = sums + row * width + first;
      Vec<T> sum[vectors][rows];
      for (int v = 0; v < vectors; ++v)
        for (int r = 0; r < rows; ++r) sum[v][r] = Vec<T>::loadu(to + r * width + v * kV<T>);
      multiply_add(left + row, 1, C, right + first, C, pixels, sum);
      for (int v = 0; v < vectors; ++v)
        for (int r = 0; r < rows; ++r) sum[v][r].store(to + r * width + v * kV<T>);
    });
  });
}

// The prologue of a unit. Without `value`: a = [s x + b > 0] (s x + b). With it, as the derivatives of the derivatives
// need: a = [s x + b > 0] (s value + beta x + gamma). The coefficients are patterns, [period * kV].
template <typename T>
struct Input {
  const T *x, *value;
  Buffer<T> s, b, beta, gamma;

  Vec<T> before_relu(const Vec<T>& x, int64_t at) const {
    return at::vec::fmadd(Vec<T>::loadu(s.data() + at), x, Vec<T>::loadu(b.data() + at));
  }
  // a of the elements at x + i, value + i; `at`: their place in the pattern.
  Vec<T> operator()(int64_t i, int64_t at, int64_t count) const {
    const auto xs = load(x + i, count), before = before_relu(xs, at);
    if (!value) return at::vec::maximum(before, Vec<T>(0));
    const auto rest = at::vec::fmadd(Vec<T>::loadu(beta.data() + at), xs, Vec<T>::loadu(gamma.data() + at));
    const auto a = at::vec::fmadd(Vec<T>::loadu(s.data() + at), load(value + i, count), rest);
    return Vec<T>::blendv(Vec<T>(0), a, before > Vec<T>(0));
  }
};

// visit(element, place in the pattern, count) for the vectors of `size` elements, those of one place after the other.
template <typename T, typename Visit>
void each_vector(int64_t size, int64_t period, const Visit& visit) {
  constexpr int64_t V = kV<T>;
  for (int64_t at = 0; at < period * V; at += V)
    for (int64_t i = at; i < size; i += period * V) visit(i, at, std::min(V, size - i));
}

template <typename T>
struct Bank {
  int64_t N, C, in_h, in_w, out_h, out_w, stride, units, halo = 0, period, width;
  std::vector<int64_t> taps, dilation, padding;  // of each unit; padding keeps the size
  std::vector<Buffer<T>> depthwise;         // [taps * taps, period * kV], the pattern of the channels along a row
  std::vector<Buffer<T>> pointwise, transposed;  // [in, width], [out, width]; only what a pass needs
  std::vector<Input<T>> input;
  std::vector<Taps<T>> output_taps, input_taps;  // [units], [units, stride, stride]: by row and column mod stride
  int64_t pitch, row, grad_pitch;

  Bank(at::TensorList x, at::TensorList value, const std::optional<at::Tensor>& affine, at::TensorList dw, at::TensorList pw,
       int64_t stride, at::IntArrayRef dilations, bool forward, bool back)
      : N(x[0].size(0)), C(x[0].size(1)), in_h(x[0].size(2)), in_w(x[0].size(3)), out_h((in_h - 1) / stride + 1),
        out_w((in_w - 1) / stride + 1), stride(stride), units(dw.size()), period(pattern_period<T>(C)),
        width(round_up(C, kV<T>)), dilation(dilations.vec()) {
    constexpr int64_t V = kV<T>;
    at::Tensor coefficients;
    if (affine) coefficients = affine->to(x[0].scalar_type()).contiguous();  // [2 or 4, units, C]: s, b, beta, gamma
    for (int64_t u = 0; u < units; ++u) {
      const int64_t k = dw[u].size(2);
      taps.push_back(k);
      padding.push_back(k / 2 * dilation[u]);
      halo = std::max(halo, round_up(padding[u], 2));  // even, so that the columns of one parity stay together
      const auto d = dw[u].contiguous(), p = pw[u].contiguous();
      const T *from = d.template const_data_ptr<T>(), *matrix = p.template const_data_ptr<T>();
      depthwise.emplace_back(k * k * period * V);
      for (int64_t t = 0; t < k * k; ++t)
        for (int64_t i = 0, c = 0; i < period * V; ++i, c = c + 1 < C ? c + 1 : 0)
          depthwise[u][t * period * V + i] = from[c * k * k + t];
      pointwise.emplace_back(forward ? C * width : 0);
      transposed.emplace_back(back ? C * width : 0);
      for (int64_t out = 0; out < C && forward; ++out)
        for (int64_t in = 0; in < C; ++in) pointwise[u][in * width + out] = matrix[out * C + in];
      for (int64_t out = 0; out < C && back; ++out)
        for (int64_t in = 0; in < C; ++in) transposed[u][out * width + in] = matrix[out * C + in];
      auto pattern = [&](int64_t which, T absent) {
        Buffer<T> result(period * V, absent);
        if (!affine || which >= coefficients.size(0)) return result;
        const T* from = coefficients.template const_data_ptr<T>() + (which * units + u) * C;
        for (int64_t i = 0; i < period * V; ++i) result[i] = from[i % C];
        return result;
      };
      const at::Tensor& xu = x[x.size() == 1 ? 0 : u];
      input.push_back({xu.template const_data_ptr<T>(),
                       value.empty() ? nullptr : value[value.size() == 1 ? 0 : u].template const_data_ptr<T>(), pattern(0, 1),
                       pattern(1, 0), pattern(2, 0), pattern(3, 0)});
    }
    pitch = (in_w + 2 * halo + stride - 1) / stride * C;
    grad_pitch = (out_w + 2 * halo) * C + kV<T>;  // zeros for the vector that reaches past a row
    row = out_w * C;
    for (int64_t u = 0; u < units; ++u) list_taps(u);
  }

  int64_t in_size() const { return in_h * in_w * C; }
  int64_t out_size() const { return out_h * out_w * C; }
  Buffer<T> padded_input() const { return Buffer<T>((in_h + 2 * halo) * stride * pitch + kV<T>); }

  // visit(column, first input element, elements) for the spans of a row of an image that stay together in the buffers: all of
  // it, or, with a stride of 2, where columns of one parity do, a pixel.
  template <typename Visit>
  void each_span(int64_t h, const Visit& visit) const {
    for (int64_t w = 0; w < in_w; w += stride == 1 ? in_w : 1) visit(w, (h * in_w + w) * C, stride == 1 ? in_w * C : C);
  }

  // a of image n into the zero-padded buffer, [row, column mod stride, column / stride, C].
  void fill(int64_t u, int64_t n, T* padded) const {
    for (int64_t h = 0; h < in_h; ++h)
      each_span(h, [&](int64_t w, int64_t first, int64_t size) {
        T* to = padded + ((h + halo) * stride + w % stride) * pitch + (w + halo) / stride * C;
        each_vector<T>(size, period, [&](int64_t i, int64_t at, int64_t count) {
          store(to + i, input[u](n * in_size() + first + i, at, count), count);
        });
      });
  }

  // Where the taps of row o of the output begin to read.
  const T* source_row(int64_t o, const T* padded) const { return padded + o * stride * stride * pitch; }

  // Row o of the depthwise convolution from the padded input.
  void convolve(int64_t u, int64_t o, const T* padded, T* out) const {
    convolve_row(out, round_up(row, kV<T>) / kV<T>, period, source_row(o, padded), output_taps[u]);
  }

  // The columns w with w mod stride == phase of row h of its gradient by the input, from the padded gradient.
  void convolve_back(int64_t u, int64_t h, int64_t phase, int64_t columns, const T* padded, T* out) const {
    convolve_row(out, round_up(columns * C, kV<T>) / kV<T>, period, padded + h / stride * grad_pitch,
                 input_taps[(u * stride + h % stride) * stride + phase]);
  }

 private:
  void list_taps(int64_t u) {
    const int64_t k = taps[u], first = halo - padding[u];
    auto weight = [&](int64_t kh, int64_t kw) { return depthwise[u].data() + (kh * k + kw) * period * kV<T>; };
    output_taps.emplace_back();
    for (int64_t kh = 0; kh < k; ++kh)
      for (int64_t kw = 0; kw < k; ++kw) {
        const int64_t r = first + kh * dilation[u], column = first + kw * dilation[u];
        output_taps[u].push_back({(r * stride + column % stride) * pitch + column / stride * C, weight(kh, kw)});
      }
    for (int64_t h = 0; h < stride; ++h)
      for (int64_t w = 0; w < stride; ++w) {
        input_taps.emplace_back();
        for (int64_t kh = 0; kh < k; ++kh)
          for (int64_t kw = 0; kw < k; ++kw) {
            const int64_t r = h + padding[u] - kh * dilation[u], column = w + padding[u] - kw * dilation[u];
            if (r % stride == 0 && column % stride == 0)
              input_taps.back().push_back({(r / stride + halo) * grad_pitch + (column / stride + halo) * C, weight(kh, kw)});
          }
      }
  }
};

// z = P y for some pixels; sums per channel of z, of z times `other` (absent: of z z) and, where there is one, of z times grad are
// added to part, [2 or 3, width].
template <typename T>
void project(const Bank<T>& bank, int64_t u, const T* y, int64_t pixels, T* z, const T* other, const T* grad, T* part) {
  const int64_t C = bank.C;
  multiply(y, pixels, C, bank.pointwise[u].data(), bank.width, [&](int64_t q, auto rows, int64_t c, const Vec<T>* values) {
    const int64_t count = std::min(kV<T>, C - c);
    auto sum = Vec<T>::loadu(part + c), product = Vec<T>::loadu(part + bank.width + c);
    for (int r = 0; r < rows; ++r) {
      store(z + (q + r) * C + c, values[r], count);
      sum = sum + values[r];
      product = at::vec::fmadd(values[r], other ? load(other + (q + r) * C + c, count) : values[r], product);
    }
    sum.store(part + c);
    product.store(part + bank.width + c);
    if (!grad) return;
    product = Vec<T>::loadu(part + 2 * bank.width + c);
    for (int r = 0; r < rows; ++r) product = at::vec::fmadd(values[r], load(grad + (q + r) * C + c, count), product);
    product.store(part + 2 * bank.width + c);
  });
}

template <typename T>
void forward_kernel(const Bank<T>& bank, at::TensorList zs, const at::Tensor& moments) {
  const int64_t C = bank.C, U = bank.units, chunks = moments.size(0);
  double* sums = moments.mutable_data_ptr<double>();  // [chunks, units, 2, C]
  at::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    auto padded = bank.padded_input();
    Buffer<T> y(round_up(bank.row, kV<T>) + kV<T>), part(2 * bank.width);
    for (int64_t chunk = from; chunk < to; ++chunk)
      for (int64_t n = chunk; n < bank.N; n += chunks)
        for (int64_t u = 0; u < U; ++u) {
          if (u == 0 || bank.input[u].x != bank.input[u - 1].x)
            bank.fill(u, n, padded.data());
          T* z = zs[u].template mutable_data_ptr<T>() + n * bank.out_size();
          double* total = sums + (chunk * U + u) * 2 * C;
          for (int64_t o = 0; o < bank.out_h; ++o, z += bank.row) {
            bank.convolve(u, o, padded.data(), y.data());
            std::fill(part.begin(), part.end(), T(0));
            project<T>(bank, u, y.data(), bank.out_w, z, nullptr, nullptr, part.data());
            for (int64_t c = 0; c < C; ++c) {
              total[c] += part[c];
              total[C + c] += part[bank.width + c];
            }
          }
        }
  });
}

template <typename T>
struct Grads {  // undefined: not asked for. The first dimension of the last four: chunks
  std::vector<at::Tensor> x, w;  // w: what the forward pass computes
  at::Tensor sums, pointwise, depthwise;  // [., units, 3, C]: sum of h, h x, h value; [., units, C, width]; [., all taps, period * kV]
  at::Tensor w_sums;                      // [., units, 3, C]: sum of w, w z, w times the gradient by a term
};

// h = [s x + b > 0] D' P' dz with dz = raw + scale * grad + d_sum + 2 d_square z; the gradient by x is s h (beta h with values).
template <typename T>
struct Backward {
  const Bank<T>& bank;
  at::TensorList zs, raws, grads;  // raws: undefined where there is none; grads: of the last units
  at::Tensor scales, d_moments;    // [grads, C], [units, 2, C]
  Grads<T>& out;
  int64_t chunk = 0, n = 0, u = 0, tap = 0;  // where a thread is; tap: the first of unit u among those of all units

  int64_t V = kV<T>, C = bank.C, pattern = bank.period * kV<T>;
  int64_t rows = std::max<int64_t>(1, 32 / bank.out_w);  // that are computed at a time: few, to stay in the L1 cache
  int64_t da_pitch = round_up((bank.in_w + bank.stride - 1) / bank.stride * C, kV<T>);
  Buffer<T> padded = bank.padded_input(), y = Buffer<T>(rows * bank.row + 2 * V), dz = Buffer<T>(rows * bank.row);
  Buffer<T> dy = Buffer<T>((bank.out_h + 2 * bank.halo) * bank.grad_pitch + 2 * V);  // padded
  Buffer<T> da = Buffer<T>(bank.stride * da_pitch), part = Buffer<T>(3 * pattern), w_part = Buffer<T>(3 * bank.width);
  Buffer<T> d_sum = Buffer<T>(pattern), d_square = d_sum, factor = d_sum;

  int64_t term() const { return u - (bank.units - static_cast<int64_t>(grads.size())); }
  T* dy_row(int64_t o) { return dy.data() + (o + bank.halo) * bank.grad_pitch + bank.halo * C; }

  void unit() {
    for (int64_t i = 0; i < pattern; ++i) {
      d_sum[i] = d_moments.const_data_ptr<T>()[2 * u * C + i % C];
      d_square[i] = 2 * d_moments.const_data_ptr<T>()[(2 * u + 1) * C + i % C];
      if (term() >= 0) factor[i] = scales.const_data_ptr<T>()[term() * C + i % C];
    }
    const Input<T>& in = bank.input[u];
    const bool same = u > 0 && in.x == bank.input[u - 1].x && in.value == bank.input[u - 1].value;
    if (out.pointwise.defined() && !same) bank.fill(u, n, padded.data());
    for (int64_t o = 0; o < bank.out_h; o += rows) output_rows(o, std::min(rows, bank.out_h - o));
    if (out.x.empty()) return;
    std::fill(part.begin(), part.end(), T(0));
    for (int64_t h = 0; h < bank.in_h; ++h) input_row(h);
    if (!out.sums.defined()) return;
    double* total = out.sums.template mutable_data_ptr<double>() + (chunk * bank.units + u) * 3 * C;
    for (int64_t k = 0; k < 3; ++k)
      for (int64_t i = 0; i < pattern; ++i) total[k * C + i % C] += part[k * pattern + i];
  }

  // dz and dy of some rows of the output, and their share of the gradients by the weights.
  void output_rows(int64_t first, int64_t count) {
    auto rows_of = [&](const at::Tensor& t) {
      return t.defined() ? t.const_data_ptr<T>() + n * bank.out_size() + first * bank.row : nullptr;
    };
    const T *z = rows_of(zs[u]), *raw = rows_of(raws[u]), *grad = term() < 0 ? nullptr : rows_of(grads[term()]);
    each_vector<T>(count * bank.row, bank.period, [&](int64_t i, int64_t at, int64_t size) {
      auto sum = at::vec::fmadd(Vec<T>::loadu(d_square.data() + at), load(z + i, size), Vec<T>::loadu(d_sum.data() + at));
      if (grad) sum = at::vec::fmadd(Vec<T>::loadu(factor.data() + at), load(grad + i, size), sum);
      if (raw) sum = sum + load(raw + i, size);
      store(dz.data() + i, sum, size);
    });
    for (int64_t o = 0; o < count; ++o) {
      T* to = dy_row(first + o);
      multiply(dz.data() + o * bank.row, bank.out_w, C, bank.transposed[u].data(), bank.width,
               [&](int64_t q, auto pixels, int64_t c, const Vec<T>* values) {
                 for (int r = 0; r < pixels; ++r) store(to + (q + r) * C + c, values[r], std::min(V, C - c));
               });
      if (!out.pointwise.defined()) continue;
      bank.convolve(u, first + o, padded.data(), y.data() + o * bank.row);
      correlate_row(to, round_up(bank.row, V) / V, bank.period, bank.source_row(first + o, padded.data()), bank.output_taps[u],
                    out.depthwise.template mutable_data_ptr<T>() + (chunk * out.depthwise.size(1) + tap) * pattern);
    }
    if (out.pointwise.defined())
      outer(dz.data(), y.data(), count * bank.out_w, C,
            out.pointwise.template mutable_data_ptr<T>() + (chunk * bank.units + u) * C * bank.width, bank.width);
    if (out.w.empty()) return;
    std::fill(w_part.begin(), w_part.end(), T(0));
    T* w = out.w[u].template mutable_data_ptr<T>() + n * bank.out_size() + first * bank.row;
    project(bank, u, y.data(), count * bank.out_w, w, z, grad, w_part.data());
    double* total = out.w_sums.template mutable_data_ptr<double>() + (chunk * bank.units + u) * 3 * C;
    for (int64_t k = 0; k < 3; ++k)
      for (int64_t c = 0; c < C; ++c) total[k * C + c] += w_part[k * bank.width + c];
  }

  // The gradient by a row of the input, and its share of the sums of h.
  void input_row(int64_t h) {
    for (int64_t phase = 0; phase < bank.stride; ++phase)
      bank.convolve_back(u, h, phase, (bank.in_w - phase + bank.stride - 1) / bank.stride, dy.data(), da.data() + phase * da_pitch);
    const Input<T>& in = bank.input[u];
    const T* scale = (in.value ? in.beta : in.s).data();
    T* dx = out.x[out.x.size() == 1 ? 0 : u].template mutable_data_ptr<T>() + n * bank.in_size();
    const bool add = out.x.size() == 1 && u > 0;
    bank.each_span(h, [&](int64_t w, int64_t first, int64_t size) {
      const T *from = da.data() + w % bank.stride * da_pitch + w / bank.stride * C, *x = in.x + n * bank.in_size() + first;
      for (int64_t at = 0; at < pattern; at += V) {
        Vec<T> sum(0), by_x(0), by_value(0);
        for (int64_t i = at; i < size; i += pattern) {
          const int64_t count = std::min(V, size - i);
          const auto xs = load(x + i, count);
          const auto h = Vec<T>::blendv(Vec<T>(0), load(from + i, count), in.before_relu(xs, at) > Vec<T>(0));
          const auto before = add ? load(dx + first + i, count) : Vec<T>(0);
          store(dx + first + i, at::vec::fmadd(Vec<T>::loadu(scale + at), h, before), count);
          if (!out.sums.defined()) continue;
          sum = sum + h;
          by_x = at::vec::fmadd(h, xs, by_x);
          if (in.value) by_value = at::vec::fmadd(h, load(in.value + n * bank.in_size() + first + i, count), by_value);
        }
        const Vec<T> sums[] = {sum, by_x, by_value};
        for (int64_t k = 0; k < 3; ++k) (sums[k] + Vec<T>::loadu(&part[k * pattern + at])).store(&part[k * pattern + at]);
      }
    });
  }
};

template <typename T>
void backward_kernel(const Bank<T>& bank, at::TensorList zs, at::TensorList raws, at::TensorList grads, const at::Tensor& scales,
                     const at::Tensor& d_moments, Grads<T>& out) {
  const int64_t chunks = std::min(kChunks, bank.N);
  at::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    Backward<T> at{bank, zs, raws, grads, scales, d_moments, out};
    for (at.chunk = from; at.chunk < to; ++at.chunk)
      for (at.n = at.chunk; at.n < bank.N; at.n += chunks)
        for (at.u = at.tap = 0; at.u < bank.units; at.tap += bank.taps[at.u] * bank.taps[at.u], ++at.u) at.unit();
  });
}

// The sums over the chunks, in their order, as [C, 1, k, k] and [C, C, 1, 1] for each unit.
template <typename T>
void weight_gradients(const Bank<T>& bank, const Grads<T>& partial, std::vector<at::Tensor>& dw, std::vector<at::Tensor>& pw) {
  const int64_t C = bank.C, U = bank.units, size = bank.period * kV<T>, chunks = partial.pointwise.size(0);
  const int64_t all_taps = partial.depthwise.size(1);
  const auto options = partial.pointwise.options();
  std::vector<int64_t> first_tap(U + 1);
  for (int64_t u = 0; u < U; ++u) {
    first_tap[u + 1] = first_tap[u] + bank.taps[u] * bank.taps[u];
    dw.push_back(at::empty({C, 1, bank.taps[u], bank.taps[u]}, options));
    pw.push_back(at::empty({C, C, 1, 1}, options));
  }
  at::parallel_for(0, U, 1, [&](int64_t from, int64_t to) {
    for (int64_t u = from; u < to; ++u) {
      const T* matrix = partial.pointwise.template const_data_ptr<T>() + u * C * bank.width;
      T* out = pw[u].template mutable_data_ptr<T>();
      for (int64_t row = 0; row < C; ++row)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          for (int64_t c = 0; c < C; ++c)
            out[row * C + c] = (chunk ? out[row * C + c] : T(0)) + matrix[(chunk * U * C + row) * bank.width + c];
      const int64_t taps = first_tap[u + 1] - first_tap[u];
      const T* lanes = partial.depthwise.template const_data_ptr<T>() + first_tap[u] * size;
      out = dw[u].template mutable_data_ptr<T>();
      Buffer<T> sum(size);
      for (int64_t t = 0; t < taps; ++t) {
        std::fill(sum.begin(), sum.end(), T(0));
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          for (int64_t i = 0; i < size; ++i) sum[i] += lanes[(chunk * all_taps + t) * size + i];
        for (int64_t c = 0; c < C; ++c) {
          T total = 0;  // lanes C apart belong to one channel
          for (int64_t i = c; i < size; i += C) total += sum[i];
          out[c * taps + t] = total;
        }
      }
    }
  });
}

std::vector<at::Tensor> dense(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const auto& t : tensors) result.push_back(t.defined() ? t.contiguous(at::MemoryFormat::ChannelsLast) : t);
  return result;
}

void check(at::TensorList x, at::TensorList dw, at::TensorList pw, at::IntArrayRef dilations) {
  TORCH_CHECK_VALUE(!dw.empty() && dw.size() == pw.size() && dw.size() == dilations.size() &&
                        (x.size() == 1 || x.size() == dw.size()),
                    "bank: ", x.size(), " inputs, ", dw.size(), " depthwise and ", pw.size(), " pointwise weights, ",
                    dilations.size(), " dilations; expected as many of each, or one input");
  const int64_t C = x[0].size(1);
  for (const auto& t : x)
    TORCH_CHECK_VALUE(t.dim() == 4 && t.sizes() == x[0].sizes() && t.scalar_type() == x[0].scalar_type(),
                      "bank: an input has shape ", t.sizes(), " and dtype ", t.scalar_type(), ", expected those of the first, ",
                      x[0].sizes(), " and ", x[0].scalar_type());
  for (size_t u = 0; u < dw.size(); ++u) {
    const int64_t k = dw[u].size(-1);
    TORCH_CHECK_VALUE(dw[u].sizes() == at::IntArrayRef({C, 1, k, k}) && k % 2 == 1, "bank: depthwise weight ", u, " has shape ",
                      dw[u].sizes(), ", expected [", C, ", 1, k, k] with an odd k");
    TORCH_CHECK_VALUE(pw[u].sizes() == at::IntArrayRef({C, C, 1, 1}), "bank: pointwise weight ", u, " has shape ",
                      pw[u].sizes(), ", expected [", C, ", ", C, ", 1, 1]");
    TORCH_CHECK_VALUE(dw[u].scalar_type() == x[0].scalar_type() && pw[u].scalar_type() == x[0].scalar_type(),
                      "bank: the weights ", u, " have another dtype than the inputs, ", x[0].scalar_type());
  }
}

// The sum over the first dimension, in order.
at::Tensor sum_of(const at::Tensor& parts) {
  const auto out = parts[0].clone();
  double* sum = out.mutable_data_ptr<double>();
  const int64_t size = out.numel();
  for (int64_t i = size; i < parts.numel(); ++i) sum[i % size] += parts.const_data_ptr<double>()[i];
  return out;
}

// [units, 2, C]: per channel the sums of grad and of grad * z, in float64.
at::Tensor bank_sums(at::TensorList grad, at::TensorList z) {
  TORCH_CHECK_VALUE(!grad.empty() && grad.size() == z.size(), "bank: ", grad.size(), " gradients of ", z.size(), " tensors");
  const auto gs = dense(grad), zs = dense(z);
  const int64_t U = z.size(), N = z[0].size(0), C = z[0].size(1), image = z[0].numel() / std::max<int64_t>(1, N);
  const int64_t chunks = std::min(kChunks, N);
  const auto out = at::zeros({chunks, U, 2, C}, z[0].options().memory_format(at::MemoryFormat::Contiguous).dtype(at::kDouble));
  double* sums = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(z[0].scalar_type(), "bank_sums", [&] {
    using T = scalar_t;
    const int64_t size = pattern_period<T>(C) * kV<T>;
    at::parallel_for(0, chunks * U, 1, [&](int64_t from, int64_t to) {
      Buffer<T> part(2 * size);
      for (int64_t item = from; item < to; ++item)
        for (int64_t n = item / U; n < N; n += chunks) {
          const T* g = gs[item % U].const_data_ptr<T>() + n * image;
          const T* value = zs[item % U].const_data_ptr<T>() + n * image;
          for (int64_t at = 0; at < size; at += kV<T>) {
            Vec<T> sum(0), product(0);
            for (int64_t i = at; i < image; i += size) {
              const int64_t count = std::min(kV<T>, image - i);
              const auto grads = load(g + i, count);
              sum = sum + grads;
              product = at::vec::fmadd(grads, load(value + i, count), product);
            }
            sum.store(part.data() + at);
            product.store(part.data() + size + at);
          }
          for (int64_t k = 0; k < 2; ++k)
            for (int64_t i = 0; i < size; ++i) sums[(item * 2 + k) * C + i % C] += part[k * size + i];
        }
    });
  });
  return sum_of(out);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> bank_forward(
    at::TensorList x, const std::optional<at::Tensor>& affine, at::TensorList dw, at::TensorList pw, int64_t stride,
    at::IntArrayRef dilations) {
  check(x, dw, pw, dilations);
  const auto xs = dense(x);
  std::vector<at::Tensor> zs;
  at::Tensor moments;
  AT_DISPATCH_FLOATING_TYPES(x[0].scalar_type(), "bank_forward", [&] {
    const Bank<scalar_t> bank(xs, {}, affine, dw, pw, stride, dilations, true, false);
    const auto options = x[0].options().memory_format(at::MemoryFormat::ChannelsLast);
    for (int64_t u = 0; u < bank.units; ++u) zs.push_back(at::empty({bank.N, bank.C, bank.out_h, bank.out_w}, options));
    moments = at::zeros({std::min(kChunks, bank.N), bank.units, 2, bank.C}, x[0].options().dtype(at::kDouble));
    forward_kernel(bank, zs, moments);
  });
  return {zs, sum_of(moments)};
}

// -> gradients by x, sums [units, 3, C] of h, h x and h value (empty without affine), gradients by dw, gradients by pw; with
// `forward` (which needs by_weight) w = P D a and sums [units, 3, C] of w, w z and w grad
std::tuple<std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor>
bank_backward(
    at::TensorList x, at::TensorList value, const std::optional<at::Tensor>& affine, at::TensorList dw, at::TensorList pw,
    int64_t stride, at::IntArrayRef dilations, at::TensorList z, const c10::List<std::optional<at::Tensor>>& raw,
    at::TensorList grad, const at::Tensor& scale, const at::Tensor& d_moments, bool by_x, bool by_weight, bool forward) {
  check(x, dw, pw, dilations);
  std::vector<at::Tensor> given;
  for (const std::optional<at::Tensor>& t : raw) given.push_back(t.value_or(at::Tensor()));
  const auto xs = dense(x), values = dense(value), zs = dense(z), raws = dense(given), grads = dense(grad);
  std::vector<at::Tensor> d_depthwise, d_pointwise, d_x, w;
  at::Tensor sums, w_sums;
  AT_DISPATCH_FLOATING_TYPES(x[0].scalar_type(), "bank_backward", [&] {
    const Bank<scalar_t> bank(xs, values, affine, dw, pw, stride, dilations, forward, true);
    const int64_t chunks = std::min(kChunks, bank.N), V = kV<scalar_t>;
    Grads<scalar_t> out;
    int64_t taps = 0;
    for (int64_t k : bank.taps) taps += k * k;
    if (by_x) {
      for (const auto& t : xs) out.x.push_back(at::empty_like(t));
      if (affine) out.sums = at::zeros({chunks, bank.units, 3, bank.C}, x[0].options().dtype(at::kDouble));
    }
    if (by_weight) {
      out.pointwise = at::zeros({chunks, bank.units, bank.C, bank.width}, x[0].options());
      out.depthwise = at::zeros({chunks, taps, bank.period * V}, x[0].options());
    }
    if (forward) {
      for (const auto& t : zs) out.w.push_back(at::empty_like(t));
      out.w_sums = at::zeros({chunks, bank.units, 3, bank.C}, x[0].options().dtype(at::kDouble));
    }
    backward_kernel(bank, zs, raws, grads, scale.to(x[0].scalar_type()).contiguous(),
                    d_moments.to(x[0].scalar_type()).contiguous(), out);
    d_x = out.x;
    w = out.w;
    if (out.sums.defined()) sums = sum_of(out.sums);
    if (forward) w_sums = sum_of(out.w_sums);
    if (by_weight) weight_gradients(bank, out, d_depthwise, d_pointwise);
  });
  const auto none = at::empty({0});
  return {d_x, sums.defined() ? sums : none, d_depthwise, d_pointwise, w, w_sums.defined() ? w_sums : none.clone()};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
  m.def("bank_forward(Tensor[] x, Tensor? affine, Tensor[] dw, Tensor[] pw, int stride, int[] dilations) -> (Tensor[], Tensor)");
  m.def("bank_backward(Tensor[] x, Tensor[] value, Tensor? affine, Tensor[] dw, Tensor[] pw, int stride, int[] dilations, "
        "Tensor[] z, Tensor?[] raw, Tensor[] grad, Tensor scale, Tensor d_moments, bool by_x, bool by_weight, bool forward) "
        "-> (Tensor[], Tensor, Tensor[], Tensor[], Tensor[], Tensor)");
  m.def("bank_sums(Tensor[] grad, Tensor[] z) -> Tensor");
}

TORCH_LIBRARY_IMPL(ldarts, CPU, m) {
  m.impl("bank_forward", bank_forward);
  m.impl("bank_backward", bank_backward);
  m.impl("bank_sums", bank_sums);
}

}  // namespace ldarts
