#pragma once
// What the files of the CUDA operators share. They are three, so that nvcc never sees PyTorch's headers, on
// which it spends ten times what the kernels take (27 s against 3 s):
//
//     sums_kernels.cuh   device code and the plan of its launches; no PyTorch; emulated by the tests
//     sums_kernels.cu    that code compiled for every type; nvcc
//     sums_cuda.cpp      tensors to pointers, TORCH_LIBRARY_IMPL(ldarts, CUDA, m); the host's compiler
#include "norms.h"

#include <cstddef>
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

// kernel(args), on blocks of kThreads threads with `bytes` of shared memory.
struct CudaLaunch {
  CUstream_st* stream;

  template <typename Args>
  void operator()(void (*kernel)(Args), int64_t blocks, size_t bytes, const Args& args) const;
};

// The plans of sums_kernels.cuh. Launch: CudaLaunch, for which sums_kernels.cu compiles them, or the tests'
// emulation. Pointers are device pointers, arrays of pointers lie on the host. T: float, double,
// __nv_bfloat16, __half.
template <typename T, typename Launch>
struct SumKernels {
  Launch launch;

  // partial [max_slabs, min(pairs, kMaxPairs), 2, C] is scratch, out [pairs, 2, C]; pixels > 0.
  void channel_sums(const T* const* x, const T* const* y, int64_t pairs, double* partial, double* out,
                    int64_t pixels, int C, int64_t max_slabs = kMaxSlabs) const;
  // Each sum has at least one entry.
  void affine_sums(const std::vector<AffineSum<T>>& sums, int64_t pixels, int C, int64_t max_blocks) const;
};

// Norms: NormStatistics, NormGradients or NormDerivatives of float or double.
template <typename Norms, typename Launch>
void launch_norms(const Norms& norms, const Launch& launch);

}  // namespace ldarts
