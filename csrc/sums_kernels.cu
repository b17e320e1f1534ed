// The CUDA kernels of the sums, compiled for each type.
#include "sums_kernels.cuh"

namespace ldarts {

template <typename Args>
void CudaLaunch::operator()(void (*kernel)(Args), int64_t blocks, size_t bytes, const Args& args) const {
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(args);
}

template struct SumKernels<float, CudaLaunch>;
template struct SumKernels<double, CudaLaunch>;
template struct SumKernels<__nv_bfloat16, CudaLaunch>;
template struct SumKernels<__half, CudaLaunch>;
template void launch_norms(const NormStatistics<float>&, const CudaLaunch&);
template void launch_norms(const NormStatistics<double>&, const CudaLaunch&);
template void launch_norms(const NormGradients<float>&, const CudaLaunch&);
template void launch_norms(const NormGradients<double>&, const CudaLaunch&);
template void launch_norms(const NormDerivatives<float>&, const CudaLaunch&);
template void launch_norms(const NormDerivatives<double>&, const CudaLaunch&);

}  // namespace ldarts
