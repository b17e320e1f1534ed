// The operators of sums.cpp and norms.cpp on CUDA: tensors to pointers (launch.cuh). Numbers per channel stay
// on the device; nothing here waits for it.
#include "sums_cuda.h"
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

using Tensors = std::vector<at::Tensor>;
using MaybeTensor = std::optional<at::Tensor>;

template <typename T> struct OnDevice { using type = T; };
template <> struct OnDevice<at::BFloat16> { using type = __nv_bfloat16; };
template <> struct OnDevice<at::Half> { using type = __half; };

#define DISPATCH(dtype, name, ...)                                                    \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, name, [&] {        \
    using T = OnDevice<scalar_t>::type;                                               \
    __VA_ARGS__;                                                                      \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                                                   \
  })

// 64 blocks a processor, of which it holds 6 to 16 at once: enough rounds for the last ones to end together.
int64_t most_blocks() {
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                        c10::cuda::current_device()));
  return int64_t{64} * processors;
}

template <typename T>
SumKernels<T> kernels() { return {c10::cuda::getCurrentCUDAStream(), most_blocks()}; }
template <typename P>
NormKernels<P> norm_kernels() { return {c10::cuda::getCurrentCUDAStream()}; }

template <typename T>
const T* read(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T>
T* write(const at::Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

template <typename T>
std::vector<const T*> pointers(const Tensors& tensors) {
  std::vector<const T*> result;
  for (const auto& t : tensors) result.push_back(read<T>(t));
  return result;
}

at::Tensor channel_sums(at::TensorList x, at::TensorList y) {
  const Tensors all = checked_pairs(x, y);
  const c10::cuda::CUDAGuard guard(all[0].device());
  const int64_t pairs = x.size(), C = all[0].size(1);
  const auto options = all[0].options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous);
  if (all[0].numel() == 0) return at::zeros({pairs, 2, C}, options);
  const auto result = at::empty({pairs, 2, C}, options);
  const auto partial = at::empty({kMaxSlabs, std::min<int64_t>(pairs, kMaxPairs), 2, C}, options);
  DISPATCH(all[0].scalar_type(), "channel_sums", {
    const auto of_all = pointers<T>(all);
    kernels<T>().channel_sums(of_all.data(), of_all.data() + pairs, pairs, write<double>(partial),
                              write<double>(result), all[0].numel() / C, C);
  });
  return result;
}

// The largest power of two, up to 64, that divides the number of elements: of as many channels tensors are
// made whose layout is any, because a thread works on neighbouring channels.
int64_t channels_of(int64_t numel) { return std::min<int64_t>(64, numel & -numel); }

Tensors affine_sums(at::TensorList z, at::TensorList scales, at::TensorList shifts,
                    at::IntArrayRef z_of_entry, at::IntArrayRef scale_of_entry,
                    at::IntArrayRef shift_of_entry, at::IntArrayRef entries) {
  const Entries checked(z, scales, shifts, z_of_entry, scale_of_entry, shift_of_entry, entries);
  TORCH_CHECK_VALUE(checked.images == 1,
                    "affine_sums: rows have numbers for each image, expected on a GPU [rows] or "
                    "[rows, C]");
  const at::Tensor& first = checked.z[0];
  const c10::cuda::CUDAGuard guard(first.device());
  Tensors outs;
  for (size_t j = 0; j < entries.size(); ++j)
    outs.push_back(at::empty_like(first, first.options().memory_format(checked.format)));
  const int64_t numel = first.numel();
  if (numel == 0) return outs;
  const int64_t C = checked.numbers > 1 ? checked.numbers : channels_of(numel);
  Tensors dense;
  const auto rows_of = [&](at::TensorList tensors) {  // each dense, in the accumulator's type, [C]
    Tensors rows;
    for (const auto& t : tensors) {
      const auto wide = t.reshape({t.size(0), -1}).to(at::toOpMathType(first.scalar_type()));
      for (const auto& row : dense.emplace_back(wide.expand({wide.size(0), C}).contiguous()).unbind())
        rows.push_back(row);
    }
    return rows;
  };
  const auto scale = rows_of(scales), shift = rows_of(shifts);
  DISPATCH(first.scalar_type(), "affine_sums", {
    const auto row = [](const Tensors& rows, int64_t number) {
      return number < 0 ? nullptr : read<Acc<T>>(rows[number]);
    };
    std::vector<AffineSum<T>> sums;
    int64_t e = 0;
    for (size_t j = 0; j < outs.size(); ++j) {
      auto& sum = sums.emplace_back(AffineSum<T>{write<T>(outs[j]), {}});
      for (const int64_t end = e + entries[j]; e < end; ++e)
        sum.entries.push_back({read<T>(checked.z[z_of_entry[e]]), row(scale, scale_of_entry[e]),
                               row(shift, shift_of_entry[e])});
    }
    kernels<T>().affine_sums(sums, numel / C, C);
  });
  return outs;
}

// p is [M] or [M, C].
template <typename P>
TermWeights<P> weights_of(const at::Tensor& p) { return {read<P>(p), p.dim() == 1 ? 1 : p.size(1)}; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_statistics(
    const at::Tensor& z_sums, at::IntArrayRef has_norm, const at::Tensor& p, const MaybeTensor& beta,
    at::IntArrayRef z_of_term, int64_t count, double eps) {
  const c10::cuda::CUDAGuard guard(p.device());
  const int64_t C = z_sums.size(2);
  const auto map = term_map(z_of_term, has_norm);
  const auto weights = p.to(at::toOpMathType(p.scalar_type())).contiguous(), sums = z_sums.contiguous();
  const auto shifts = beta ? beta->to(weights.scalar_type()).contiguous() : at::Tensor();
  const auto rstd_mean = at::empty({map.K, 2, C}, weights.options()), moments = at::empty_like(rstd_mean);
  const auto coefficients = at::empty({map.M, 2, C}, weights.options());
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "norm_statistics", [&] {
    using P = scalar_t;
    norm_kernels<P>().statistics({map, C, count, eps, read<double>(sums), weights_of<P>(weights),
                                  read<P>(shifts), write<P>(rstd_mean), write<P>(moments),
                                  write<P>(coefficients)});
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {rstd_mean, moments, coefficients};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const c10::cuda::CUDAGuard guard(p.device());
  const int64_t C = rstd_mean.size(2);
  const auto map = term_map(z_of_term, has_norm);
  const auto numbers = rstd_mean.contiguous(), sums = grad_sums.contiguous();
  const auto dtype = numbers.scalar_type();
  const auto weights = p.to(dtype).contiguous();
  const auto by_rstd_mean = grad_rstd_mean ? grad_rstd_mean->to(dtype).contiguous() : at::Tensor();
  const auto scale = at::empty({map.M, C}, numbers.options()), of_z = at::empty_like(numbers);
  const auto by_p = at::empty(p.sizes(), numbers.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "norm_gradients", [&] {
    using P = scalar_t;
    norm_kernels<P>().gradients({map, C, count, read<P>(numbers), weights_of<P>(weights),
                                 read<P>(by_rstd_mean), read<double>(sums), write<P>(scale), write<P>(of_z),
                                 write<P>(by_p)});
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {scale, of_z, by_p.to(p.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_derivatives(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, const MaybeTensor& grad_scale, const MaybeTensor& grad_of_z,
    const MaybeTensor& grad_p, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const c10::cuda::CUDAGuard guard(p.device());
  const auto map = term_map(z_of_term, has_norm);
  const auto dense = [](const MaybeTensor& t, at::ScalarType dtype) {
    return t ? t->to(dtype).contiguous() : at::Tensor();
  };
  const auto dtype = rstd_mean.scalar_type();
  const auto numbers = rstd_mean.contiguous(), sums = grad_sums.contiguous();
  const auto weights = p.to(dtype).contiguous();
  const auto by_rstd_mean = dense(grad_rstd_mean, dtype), by_weights = dense(grad_p, dtype);
  const auto by_scale = dense(grad_scale, at::kDouble), by_of_z = dense(grad_of_z, at::kDouble);
  const auto found = at::empty_like(numbers), found_grad = at::empty_like(numbers);
  const auto found_sums = at::empty_like(sums), found_p = at::empty(p.sizes(), numbers.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "norm_derivatives", [&] {
    using P = scalar_t;
    const auto of_terms = weights_of<P>(weights);
    norm_kernels<P>().derivatives(
        {{map, numbers.size(2), count, read<P>(numbers), of_terms, read<P>(by_rstd_mean), read<double>(sums),
          nullptr, nullptr, write<P>(found_p)},
         read<double>(by_scale), read<double>(by_of_z), {read<P>(by_weights), of_terms.width},
         write<P>(found), write<P>(found_grad), write<double>(found_sums)});
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {found, found_p.to(p.scalar_type()), found_grad, found_sums};
}

}  // namespace

TORCH_LIBRARY_IMPL(ldarts, CUDA, m) {
  m.impl("affine_sums", affine_sums);
  m.impl("channel_sums", channel_sums);
  m.impl("norm_statistics", norm_statistics);
  m.impl("norm_gradients", norm_gradients);
  m.impl("norm_derivatives", norm_derivatives);
}

}  // namespace ldarts
