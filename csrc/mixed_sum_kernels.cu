// The CUDA kernels of the fused mixed-operation sum, compiled for each type (launch.cuh).
#include "launch.cuh"
#include "mixed_sum_kernels.cuh"

namespace ldarts {

template <typename T>
void MixedSumKernels<T>::sum(const Acc<T>* weight, const T* const* terms, int64_t count, Acc<T>* carry,
                             T* out, int64_t n) const {
  launch_sum<T>(weight, terms, count, carry, out, n, max_blocks, Launch<kThreads>{stream});
}

template <typename T>
void MixedSumKernels<T>::scale(const T* grad, const Acc<T>* weight, T* const* outs, int64_t count,
                               int64_t n) const {
  launch_scale<T>(grad, weight, outs, count, n, max_blocks, Launch<kThreads>{stream});
}

template <typename T>
void MixedSumKernels<T>::grads(const T* grad, const Acc<T>* weight, const T* const* terms, int64_t count,
                               Acc<T>* partial, Acc<T>* dots, T* const* outs, int64_t n) const {
  launch_grads<T>(grad, weight, terms, count, partial, dots, outs, n, kDotBlocks, Launch<kThreads>{stream});
}

template struct MixedSumKernels<float>;
template struct MixedSumKernels<double>;
template struct MixedSumKernels<__nv_bfloat16>;
template struct MixedSumKernels<__half>;

}  // namespace ldarts
