// The CUDA kernels of the sums, compiled for each type (launch.cuh).
#include "launch.cuh"
#include "sums_kernels.cuh"

namespace ldarts {

template <typename T>
void SumKernels<T>::channel_sums(const T* const* x, const T* const* y, int64_t pairs, double* partial,
                                 double* out, int64_t pixels, int C) const {
  launch_channel_sums<T>(x, y, pairs, partial, out, pixels, C, kMaxSlabs, Launch<kThreads>{stream});
}

template <typename T>
void SumKernels<T>::affine_sums(const std::vector<AffineSum<T>>& sums, int64_t pixels, int C) const {
  launch_affine_sums<T>(sums, pixels, C, max_blocks, Launch<kThreads>{stream});
}

template <typename P>
void NormKernels<P>::statistics(const NormStatistics<P>& norms) const {
  launch_statistics<P>(norms, Launch<kThreads>{stream});
}

template <typename P>
void NormKernels<P>::gradients(const NormGradients<P>& norms) const {
  launch_gradients(norms, Launch<kThreads>{stream});
}

template <typename P>
void NormKernels<P>::derivatives(const NormDerivatives<P>& norms) const {
  launch_gradients(norms, Launch<kThreads>{stream});
}

template struct SumKernels<float>;
template struct SumKernels<double>;
template struct SumKernels<__nv_bfloat16>;
template struct SumKernels<__half>;
template struct NormKernels<float>;
template struct NormKernels<double>;

}  // namespace ldarts
