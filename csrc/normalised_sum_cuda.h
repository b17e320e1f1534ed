#pragma once
// What normalised_sum_kernels.cu, compiled by nvcc, and normalised_sum_cuda.cpp, by the host's compiler, both
// know.
#include "mixed_sum_cuda.h"
#include "norms.h"

#include <vector>

namespace ldarts {

constexpr int kMaxPairs = 128;    // of pointers, and of what is below, that travel by value with one launch
constexpr int kMaxEntries = 128;
constexpr int kMaxSums = 64;
constexpr int kMaxSlabs = 512;  // a constant: sums have the same bits whatever the number of processors

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

// The gradients of norms.h, or in the derivative (again) the gradients of these; [rows, C] where nothing else
// is said. Those of the sums of tensors are scales and shifts.
template <typename P>
struct GradientsArgs {
  NormGradients<P> norms;
  bool again;
  P *scale, *by_z_sum, *twice_by_square;   // of M terms; of K z, by S1 and 2 by S2
  P* by_p;                                 // [M]; again: its derivative
  P *by_grad_sum, *by_grad_product;        // of M terms, by A and by B; only where again, as what follows
  P *by_rstd_mean, *by_grad_rstd_mean;     // [K, 2, C]
};

// The plans of normalised_sum_kernels.cuh: for float, double and __nv_bfloat16, and for float and double.
template <typename T>
struct NormalisedSumKernels {
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
  void gradients(const GradientsArgs<P>& gradients) const;
};

}  // namespace ldarts
