#pragma once
// How a .cu file launches a kernel. The CUDA operators lie in three files, so that nvcc never sees PyTorch's
// headers, on which it spends ten times what the kernels take (27 s against 3 s a file):
//
//     X_kernels.cuh   device code and the plan of its launches; no PyTorch; emulated by the tests
//     X_kernels.cu    that code compiled for every type, behind functions of plain pointers (X_cuda.h); nvcc
//     X_cuda.cpp      tensors to pointers, TORCH_LIBRARY_IMPL(ldarts, CUDA, m); the host's compiler
#include <cstddef>
#include <cstdint>

namespace ldarts {

template <int threads>
struct Launch {
  cudaStream_t stream;

  template <typename Args>
  void operator()(void (*kernel)(Args), int64_t blocks, size_t bytes, const Args& args) const {
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(args);
  }
};

}  // namespace ldarts
