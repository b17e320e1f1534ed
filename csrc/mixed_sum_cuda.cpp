// ldarts::mixed_sum and its gradients on CUDA: tensors to pointers (launch.cuh).
#include "mixed_sum_cuda.h"
#include "checks.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ldarts {
namespace {

template <typename T> struct OnDevice { using type = T; };
template <> struct OnDevice<at::BFloat16> { using type = __nv_bfloat16; };
template <> struct OnDevice<at::Half> { using type = __half; };

template <typename T>
std::vector<const T*> read_pointers(at::TensorList tensors) {
  std::vector<const T*> pointers;
  for (const auto& t : tensors) pointers.push_back(static_cast<const T*>(t.const_data_ptr()));
  return pointers;
}

template <typename T>
std::vector<T*> write_pointers(at::TensorList tensors) {
  std::vector<T*> pointers;
  for (const auto& t : tensors) pointers.push_back(static_cast<T*>(t.mutable_data_ptr()));
  return pointers;
}

// Four times as many blocks as the threads of the processors make. The sum takes 66 to 78 registers a thread:
// of the 16 blocks for which a processor has threads it holds 6 or 7 at once, so these are about ten rounds,
// enough for the last ones to finish together.
int64_t max_blocks() {
  int processors = 0, threads = 0;
  const int device = c10::cuda::current_device();
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device));
  return int64_t{4} * processors * (threads / kThreads);
}

template <typename T>
MixedSumKernels<T> kernels() { return {c10::cuda::getCurrentCUDAStream(), max_blocks()}; }

#define DISPATCH(dtype, name, ...)                                                    \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, name, [&] {        \
    using T = OnDevice<scalar_t>::type;                                               \
    __VA_ARGS__;                                                                      \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                                                   \
  })

at::Tensor mixed_sum(const at::Tensor& weights, at::TensorList terms) {
  const auto format = check_terms(terms);
  const c10::cuda::CUDAGuard guard(terms[0].device());
  const int64_t count = terms.size();
  const auto w = check_weights(weights, count, terms[0]);
  const auto out = at::empty_like(terms[0], terms[0].options().memory_format(format));
  // Half types keep float32 between the launches.
  const bool carries = count > kMaxTerms && w.scalar_type() != out.scalar_type();
  const auto carry = carries ? at::empty_like(out, w.options()) : out;
  DISPATCH(out.scalar_type(), "mixed_sum", {
    kernels<T>().sum(static_cast<const Acc<T>*>(w.const_data_ptr()), read_pointers<T>(terms).data(), count,
                     static_cast<Acc<T>*>(carry.mutable_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
                     out.numel());
  });
  return out;
}

std::vector<at::Tensor> mixed_scale(const at::Tensor& grad, const at::Tensor& weights) {
  check_dtype("mixed_scale: grad", grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  const int64_t count = weights.numel();
  const auto w = check_weights(weights, count, grad);
  const auto g = grad.contiguous(dense_format(grad));
  std::vector<at::Tensor> outs;
  for (int64_t m = 0; m < count; ++m) outs.push_back(at::empty_like(g));
  DISPATCH(g.scalar_type(), "mixed_scale", {
    kernels<T>().scale(static_cast<const T*>(g.const_data_ptr()),
                       static_cast<const Acc<T>*>(w.const_data_ptr()), write_pointers<T>(outs).data(), count,
                       g.numel());
  });
  return outs;
}

using Grads = std::tuple<at::Tensor, std::vector<at::Tensor>>;

// weights: none where the gradient by the terms is not asked for.
Grads grads(const at::Tensor& grad, const std::optional<at::Tensor>& weights, at::TensorList terms) {
  const auto format = check_terms(terms);
  const c10::cuda::CUDAGuard guard(terms[0].device());
  const auto g = check_grad(grad, terms[0], format);
  const int64_t count = terms.size();
  const auto w = weights ? check_weights(*weights, count, g) : at::Tensor();
  const auto options = g.options().dtype(at::toOpMathType(g.scalar_type()));
  std::vector<at::Tensor> outs;
  for (int64_t m = 0; m < count && weights; ++m) outs.push_back(at::empty_like(g));
  if (g.numel() == 0) return {at::zeros({count}, options), outs};
  const auto partial = at::empty({count, kDotBlocks}, options);
  const auto dots = at::empty({count}, options);
  DISPATCH(g.scalar_type(), "mixed_grads", {
    kernels<T>().grads(static_cast<const T*>(g.const_data_ptr()),
                       weights ? static_cast<const Acc<T>*>(w.const_data_ptr()) : nullptr,
                       read_pointers<T>(terms).data(), count,
                       static_cast<Acc<T>*>(partial.mutable_data_ptr()),
                       static_cast<Acc<T>*>(dots.mutable_data_ptr()), write_pointers<T>(outs).data(),
                       g.numel());
  });
  return {dots, outs};
}

at::Tensor mixed_dot(const at::Tensor& grad, at::TensorList terms) {
  return std::get<0>(grads(grad, std::nullopt, terms));
}

Grads mixed_grads(const at::Tensor& grad, const at::Tensor& weights, at::TensorList terms) {
  return grads(grad, weights, terms);
}

}  // namespace

TORCH_LIBRARY_IMPL(ldarts, CUDA, m) {
  m.impl("mixed_sum", mixed_sum);
  m.impl("mixed_scale", mixed_scale);
  m.impl("mixed_dot", mixed_dot);
  m.impl("mixed_grads", mixed_grads);
}

}  // namespace ldarts
