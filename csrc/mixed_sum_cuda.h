#pragma once
// What mixed_sum_kernels.cu, compiled by nvcc, and mixed_sum_cuda.cpp, by the host's compiler, both know.
#include <cstdint>

struct CUstream_st;

namespace ldarts {

constexpr int kMaxTerms = 64;  // pointers that travel by value with one launch
constexpr int kThreads = 128;  // small: the 8x8 maps at the end of a network still spread over all processors
constexpr int kDotBlocks = 1024;  // a constant: mixed_dot has the same bits whatever the number of processors

template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename T> using Acc = typename Accumulator<T>::type;

// The plans of mixed_sum_kernels.cuh for float, double, __nv_bfloat16 and __half.
template <typename T>
struct MixedSumKernels {
  CUstream_st* stream;
  int64_t max_blocks;

  void sum(const Acc<T>* weight, const T* const* terms, int64_t count, Acc<T>* carry, T* out,
           int64_t n) const;
  void scale(const T* grad, const Acc<T>* weight, T* const* outs, int64_t count, int64_t n) const;
  // weight: null where outs is not asked for; partial: [count, kDotBlocks]
  void grads(const T* grad, const Acc<T>* weight, const T* const* terms, int64_t count, Acc<T>* partial,
             Acc<T>* dots, T* const* outs, int64_t n) const;
};

}  // namespace ldarts
