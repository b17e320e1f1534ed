// The operators of sums.cpp and norms.cpp on CUDA: tensors to pointers. Numbers per channel stay on the
// device; nothing here waits for it.
#include "sums_cuda.h"
#include "checks.h"
#include "norms_operators.h"

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

#include <vector>

namespace ldarts {
namespace {

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

CudaLaunch launch() { return {c10::cuda::getCurrentCUDAStream()}; }

template <typename T>
SumKernels<T, CudaLaunch> kernels() { return {launch()}; }

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
    kernels<T>().affine_sums(sums, numel / C, C, most_blocks());
  });
  return outs;
}

struct Cuda {
  static at::ScalarType type_for(const at::Tensor& p) { return at::toOpMathType(p.scalar_type()); }

  template <typename Norms>
  static void run(const Norms& norms) {
    launch_norms(norms, launch());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(ldarts, CUDA, m) {
  m.impl("affine_sums", affine_sums);
  m.impl("channel_sums", channel_sums);
  m.impl("norm_statistics", norm_statistics<Cuda>);
  m.impl("norm_gradients", norm_gradients<Cuda>);
  m.impl("norm_derivatives", norm_derivatives<Cuda>);
}

}  // namespace ldarts
