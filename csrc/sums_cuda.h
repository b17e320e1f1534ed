#pragma once
// What sums_kernels.cu, compiled by nvcc, and sums_cuda.cpp, by the host's compiler, both know.
#include "norms.h"

#include <cstdint>
#include <vector>

struct CUstream_st;

namespace ldarts {

constexpr int kThreads = 128;  // small: the 8x8 maps at the end of a network still spread over all processors
constexpr int kMaxPairs = 128;    // of pointers, and of what is below, that travel by value with one launch
constexpr int kMaxEntries = 128;
constexpr int kMaxSums = 64;
constexpr int kMaxSlabs = 512;  // a constant: sums have the same bits whatever the number of processors

template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };
template <typename T> using Acc = typename Accumulator<T>::type;

// scale term + shift, with a scale and a shift [C] for each channel; null: 1 and 0.
template <typename T>
struct Affine {
  const T* term;
  const Acc<T> *scale, *shift;
};

template <typename T>
struct AffineSum {
  T* out;
  std::vector<Affine<T>> entries;
};

// The plans of sums_kernels.cuh: for float, double, __nv_bfloat16 and __half, and for float and double.
template <typename T>
struct SumKernels {
  CUstream_st* stream;
  int64_t max_blocks;

  // partial: [kMaxSlabs, min(pairs, kMaxPairs), 2, C]
  void channel_sums(const T* const* x, const T* const* y, int64_t pairs, double* partial, double* out,
                    int64_t pixels, int C) const;
  void affine_sums(const std::vector<AffineSum<T>>& sums, int64_t pixels, int C) const;
};

template <typename P>
struct NormKernels {
  CUstream_st* stream;

  void statistics(const NormStatistics<P>& norms) const;
  void gradients(const NormGradients<P>& norms) const;
  void derivatives(const NormDerivatives<P>& norms) const;
};

}  // namespace ldarts
