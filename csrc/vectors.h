#pragma once
// What the CPU kernels share: vectors, loops of a constant number of steps, and the pattern that the channels
// make along a row. Of PyTorch nothing but its vector type.
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

namespace ldarts {

template <typename T> using Vec = at::vec::Vectorized<T>;
template <typename T> constexpr int64_t kV = Vec<T>::size();
template <int64_t N> using Constant = std::integral_constant<int64_t, N>;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <typename T>
Vec<T> load(const T* from, int64_t count) {
  return count < kV<T> ? Vec<T>::loadu(from, count) : Vec<T>::loadu(from);
}

template <typename T>
void store(T* to, const Vec<T>& values, int64_t count) {
  if (count < kV<T>) values.store(to, static_cast<int>(count));
  else values.store(to);
}

// Vectors of a cache line's size must not straddle two.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const Aligned&) const = default;
};
template <typename T> using Buffer = std::vector<T, Aligned<T>>;

// run(first, constant number) over `count` things, G at a time; the first call takes the remainder.
template <int64_t G, typename Run>
void unrolled(int64_t count, const Run& run) {
  const int64_t head = (count - 1) % G + 1;
  auto run_head = [&]<int64_t... I>(std::integer_sequence<int64_t, I...>) {
    ((head == I + 1 ? run(int64_t{0}, Constant<I + 1>{}) : void()), ...);
  };
  run_head(std::make_integer_sequence<int64_t, G>{});
  for (int64_t m = head; m < count; m += G) run(m, Constant<G>{});
}

// Along a channels-last row the channels repeat every C elements, and vectors of them every lcm(C, kV). A
// pattern holds a value of each channel for each element of these vectors.
//
// pattern[i] = from[channel of i * step]
template <typename T, typename From>
void fill_pattern(T* pattern, int64_t size, const From* from, int64_t step, int64_t C) {
  for (int64_t i = 0, c = 0; i < size; ++i, c = c + 1 < C ? c + 1 : 0) pattern[i] = from[c * step];
}

// sums[c * step] += the elements of channel c in the pattern
template <typename Sum, typename T>
void add_pattern(Sum* sums, int64_t step, const T* pattern, int64_t size, int64_t C) {
  for (int64_t i = 0; i < size; ++i) sums[i % C * step] += pattern[i];
}

// To the sums of x and of x y are added those of x (y - shift) and x, or, where x is y, those of `count` x -
// shift and their squares.
template <typename T>
void add_shifted_sums(T sum, T product, T shift, int64_t count, double& to_sum, double& to_product) {
  const double s = shift, all = count ? sum + count * s : sum;  // 0 s may be NaN
  to_sum += all;
  to_product += product + s * (count ? sum + all : all);
}

// visit(element, place in the pattern, count) for the vectors of `size` elements; the count is a constant but
// for the last one.
template <typename T, typename Visit>
void each_vector(int64_t size, int64_t pattern, const Visit& visit) {
  constexpr int64_t V = kV<T>;
  int64_t i = 0, place = 0;
  for (; i + V <= size; i += V) {
    visit(i, place, Constant<V>{});
    place = place + V == pattern ? 0 : place + V;
  }
  if (i < size) visit(i, place, size - i);
}

}  // namespace ldarts
