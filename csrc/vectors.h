#pragma once
// What the CPU kernels share: vectors, groups of a constant size, and the pattern that the channels make along a row.
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

// Along a channels-last row the channels repeat every C elements, and vectors of them every `period`.
template <typename T>
int64_t pattern_period(int64_t C) { return std::lcm(C, kV<T>) / kV<T>; }

template <typename T>
Vec<T> load(const T* from, int64_t count) { return count < kV<T> ? Vec<T>::loadu(from, count) : Vec<T>::loadu(from); }

template <typename T>
void store(T* to, const Vec<T>& value, int64_t count) {
  if (count < kV<T>) value.store(to, static_cast<int>(count));
  else value.store(to);
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

// run(first, constant number) for groups of G of `count` things; the first group takes what does not divide.
template <int64_t G, typename Run>
void each_group(int64_t count, const Run& run) {
  const int64_t head = (count - 1) % G + 1;
  auto run_head = [&]<int64_t... I>(std::integer_sequence<int64_t, I...>) {
    ((head == I + 1 ? run(int64_t{0}, Constant<I + 1>{}) : void()), ...);
  };
  run_head(std::make_integer_sequence<int64_t, G>{});
  for (int64_t m = head; m < count; m += G) run(m, Constant<G>{});
}

}  // namespace ldarts
