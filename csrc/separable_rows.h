#pragma once
// The inner loops of a separable convolution, over rows of channels-last images: a depthwise convolution and
// its weight gradient, and the two matrix products of a pointwise convolution.
//
// The blocks are functions of their own, always inlined, with sums of their own: where the sums are captured
// by a lambda, the compiler keeps them in memory.
#include "vectors.h"

namespace ldarts {

constexpr int kRows = 8;      // pixels whose products with a matrix are computed side by side
constexpr int64_t kTaps = 9;  // taps whose weight gradients are

// One tap of a depthwise convolution, for all channels.
template <typename T>
struct Tap {
  int64_t offset;   // of what it reads, from where the row's source begins
  const T* weight;  // a pattern
};
template <typename T> using Taps = std::vector<Tap<T>>;

template <int rows, typename T>
[[gnu::always_inline]] inline void convolve_block(T* out, const T* source, int64_t step, const Tap<T>* taps,
                                                  int64_t count, int64_t place) {
  Vec<T> sum[rows];
  for (int r = 0; r < rows; ++r) sum[r] = Vec<T>(0);
  for (int64_t t = 0; t < count; ++t) {
    const auto weight = Vec<T>::loadu(taps[t].weight + place);
    const T* from = source + taps[t].offset;
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[r] = at::vec::fmadd(weight, Vec<T>::loadu(from + r * step), sum[r]);
  }
  for (int r = 0; r < rows; ++r) sum[r].store(out + r * step);
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
    for (; i < vectors; i += period)
      convolve_block<1>(out + i * V, source + i * V, period * V, taps.data(), count, j * V);
  }
}

template <int taps_at_once, typename T>
[[gnu::always_inline]] inline void correlate_block(const T* grad, const T* source, int64_t step,
                                                   int64_t count, const Tap<T>* taps, T* sums) {
  Vec<T> sum[taps_at_once];
  const T* from[taps_at_once];
  for (int t = 0; t < taps_at_once; ++t) {
    sum[t] = Vec<T>::loadu(sums + t * step);
    from[t] = source + taps[t].offset;
  }
  for (int64_t i = 0; i < count; i += step) {
    const auto grads = Vec<T>::loadu(grad + i);
#pragma GCC unroll 9
    for (int t = 0; t < taps_at_once; ++t) sum[t] = at::vec::fmadd(grads, Vec<T>::loadu(from[t] + i), sum[t]);
  }
  for (int t = 0; t < taps_at_once; ++t) sum[t].store(sums + t * step);
}

// The gradient of convolve_row by the weights, from `grad` by its result, element by element of the pattern:
// sums[tap, i mod (period * kV)] += grad[i] * source[offset of the tap + i]. sums: [taps, period * kV]
template <typename T>
void correlate_row(const T* grad, int64_t vectors, int64_t period, const T* source, const Taps<T>& taps,
                   T* sums) {
  const int64_t step = period * kV<T>;
  unrolled<kTaps>(taps.size(), [&](int64_t first, auto number) {
    for (int64_t place = 0; place < step; place += kV<T>)
      correlate_block<decltype(number)::value>(grad + place, source + place, step, vectors * kV<T> - place,
                                               taps.data() + first, sums + first * step + place);
  });
}

// visit(first, constant number) over `count` things, kRows at a time, then half as many, then one by one.
template <typename Visit>
void each_rows(int64_t count, const Visit& visit) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) visit(i, Constant<kRows>{});
  if (i + kRows / 2 <= count) {
    visit(i, Constant<kRows / 2>{});
    i += kRows / 2;
  }
  for (; i < count; ++i) visit(i, Constant<1>{});
}

// result[v][r] += sum over i < count of left[r * row_step + i * step] * the vector at right + i * width + v *
// kV: the inner loop of both matrix products.
template <int vectors, int rows, typename T>
[[gnu::always_inline]] inline void multiply_add(const T* left, int64_t row_step, int64_t step,
                                                const T* right, int64_t width, int64_t count,
                                                Vec<T> (&result)[vectors][rows]) {
  Vec<T> sum[vectors][rows];
  for (int v = 0; v < vectors; ++v)
    for (int r = 0; r < rows; ++r) sum[v][r] = result[v][r];
  for (int64_t i = 0; i < count; ++i, left += step, right += width) {
    Vec<T> m[vectors];
    for (int v = 0; v < vectors; ++v) m[v] = Vec<T>::loadu(right + v * kV<T>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<T> factor(left[r * row_step]);
      for (int v = 0; v < vectors; ++v) sum[v][r] = at::vec::fmadd(factor, m[v], sum[v][r]);
    }
  }
  for (int v = 0; v < vectors; ++v)
    for (int r = 0; r < rows; ++r) result[v][r] = sum[v][r];
}

// run(C, first column, constant number of vectors) for the columns of a matrix, two vectors at a time; C,
// which addresses are computed from, is a constant where it is a common one.
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

// put(pixel, constant number of pixels, channel, products) where products[r], a vector, is the sum over c of
// in[pixel + r, c] * matrix[c, channel and on]. in: [pixels, channels]; matrix: [channels, width].
template <typename T, typename Put>
void multiply(const T* in, int64_t pixels, int64_t channels, const T* matrix, int64_t width, const Put& put) {
  each_block_of_columns<T>(channels, width, [&](auto C, int64_t first, auto vectors) {
    each_rows(pixels, [&](int64_t pixel, auto rows) {
      Vec<T> sum[decltype(vectors)::value][decltype(rows)::value];
      for (auto& row : sum)
        for (auto& value : row) value = Vec<T>(0);
      multiply_add(in + pixel * C, C, 1, matrix + first, width, C, sum);
      for (int v = 0; v < decltype(vectors)::value; ++v) put(pixel, rows, first + v * kV<T>, sum[v]);
    });
  });
}

// The gradient of a product by its matrix: sums[r, c] += sum over the pixels of left[pixel, r] * right[pixel,
// c]. left, right: [pixels, channels]; sums: [channels, width].
template <typename T>
void outer(const T* left, const T* right, int64_t pixels, int64_t channels, T* sums, int64_t width) {
  each_block_of_columns<T>(channels, width, [&](auto C, int64_t first, auto vectors) {
    each_rows(C, [&](int64_t row, auto rows) {
      constexpr int V = decltype(vectors)::value, R = decltype(rows)::value;
      T* to = sums + row * width + first;
      Vec<T> sum[V][R];
      for (int v = 0; v < V; ++v)
        for (int r = 0; r < R; ++r) sum[v][r] = Vec<T>::loadu(to + r * width + v * kV<T>);
      multiply_add(left + row, 1, C, right + first, C, pixels, sum);
      for (int v = 0; v < V; ++v)
        for (int r = 0; r < R; ++r) sum[v][r].store(to + r * width + v * kV<T>);
    });
  });
}

}  // namespace ldarts
