// The operators of normalised sums on CUDA, as norms.cpp describes them: tensors to pointers (launch.cuh).
// Numbers per channel stay on the device; nothing here waits for it.
#include "normalised_sum_cuda.h"
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

#define DISPATCH(dtype, name, ...)                                                    \
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dtype, name, [&] {                    \
    using T = OnDevice<scalar_t>::type;                                               \
    __VA_ARGS__;                                                                      \
    C10_CUDA_KERNEL_LAUNCH_CHECK();                                                   \
  })

// Channels-last tensors of one shape, dtype and device; an error names the tensor and the property.
Tensors checked(at::TensorList tensors) {
  Tensors result;
  for (const auto& t : tensors) {
    TORCH_CHECK_VALUE(t.dim() == 4 && t.scalar_type() != at::kHalf, "normalised sums: a tensor has shape ",
                      t.sizes(), " and dtype ", t.scalar_type(),
                      ", expected [N, C, H, W] and float32, float64 or bfloat16; --amp bf16 computes in it");
    result.push_back(t.contiguous(at::MemoryFormat::ChannelsLast));
  }
  check_terms(result);
  return result;
}

int64_t pixels(const at::Tensor& z) { return z.numel() / std::max<int64_t>(1, z.size(1)); }
int64_t most_blocks() {
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                        c10::cuda::current_device()));
  return int64_t{64} * processors;
}

template <typename T>
NormalisedSumKernels<T> kernels() { return {c10::cuda::getCurrentCUDAStream(), most_blocks()}; }
template <typename P>
NormKernels<P> norm_kernels() { return {c10::cuda::getCurrentCUDAStream()}; }

template <typename T>
const T* read(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T>
T* write(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <typename T>
std::vector<const T*> pointers(const Tensors& tensors) {
  std::vector<const T*> result;
  for (const auto& t : tensors) result.push_back(read<T>(t));
  return result;
}

// Dense, of the type in which the numbers per channel of such a z are.
at::Tensor numbers(const at::Tensor& t, const at::Tensor& z) {
  return t.to(at::toOpMathType(z.scalar_type())).contiguous();
}
at::Tensor numbers(const MaybeTensor& t, const at::Tensor& z) { return t ? numbers(*t, z) : at::Tensor(); }

at::Tensor channel_sums(at::TensorList x, at::TensorList y) {
  TORCH_CHECK_VALUE(!x.empty() && x.size() == y.size(), "channel_sums: ", x.size(), " tensors and ", y.size(),
                    " to multiply them by");
  const c10::cuda::CUDAGuard guard(x[0].device());
  Tensors all = checked(x);
  for (size_t k = 0; k < y.size(); ++k)  // one tensor, where it is one, even after it was copied
    all.push_back(y[k].is_same(x[k]) ? all[k] : y[k].contiguous(at::MemoryFormat::ChannelsLast));
  all = checked(all);
  const int64_t pairs = x.size(), C = all[0].size(1);
  const auto options = all[0].options().dtype(at::kDouble).memory_format(at::MemoryFormat::Contiguous);
  if (all[0].numel() == 0) return at::zeros({pairs, 2, C}, options);
  const auto result = at::empty({pairs, 2, C}, options);
  const auto partial = at::empty({kMaxSlabs, std::min<int64_t>(pairs, kMaxPairs), 2, C}, options);
  DISPATCH(all[0].scalar_type(), "channel_sums", {
    const auto of_all = pointers<T>(all);
    kernels<T>().channel_sums(of_all.data(), of_all.data() + pairs, pairs, write<double>(partial),
                              write<double>(result), pixels(all[0]), C);
  });
  return result;
}

// The sums, in new tensors like z; one without entries is a tensor of size 0.
template <typename T>
Tensors computed(std::vector<AffineSum<T>>& sums, const at::Tensor& z) {
  Tensors result;
  for (auto& sum : sums) {
    result.push_back(sum.entries.empty() ? at::empty({0}, z.options()) : at::empty_like(z));
    sum.out = write<T>(result.back());
  }
  if (z.numel()) kernels<T>().affine_sums(sums, pixels(z), z.size(1));
  return result;
}

at::Tensor node_sum(at::TensorList scales, at::TensorList shifts, at::TensorList z) {
  const c10::cuda::CUDAGuard guard(z[0].device());
  const auto zs = checked(z);
  const int64_t C = zs[0].size(1);
  Tensors kept;  // rows of scales and shifts, one for each z
  const auto rows_of = [&](at::TensorList tensors) {
    Tensors rows;
    for (const auto& t : tensors)
      for (const auto& row : kept.emplace_back(numbers(t, zs[0])).unbind()) rows.push_back(row);
    rows.resize(tensors.empty() ? zs.size() : rows.size());
    return rows;
  };
  const auto scale = rows_of(scales), shift = rows_of(shifts);
  TORCH_CHECK_VALUE(scale.size() == zs.size() && shift.size() == zs.size(), "node_sum: ", scale.size(),
                    " scales and ", shift.size(), " shifts, expected those of ", zs.size(), " terms");
  for (const auto& row : scale)
    TORCH_CHECK_VALUE(!row.defined() || row.numel() == C, "node_sum: scales of ", row.numel(),
                      " channels, expected ", C);
  at::Tensor out;
  DISPATCH(zs[0].scalar_type(), "node_sum", {
    std::vector<AffineSum<T>> sums(1);
    for (size_t m = 0; m < zs.size(); ++m)
      sums[0].entries.push_back({read<T>(zs[m]), read<Acc<T>>(scale[m]), read<Acc<T>>(shift[m])});
    out = computed(sums, zs[0])[0];
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_statistics(
    const at::Tensor& z_sums, at::IntArrayRef has_norm, const at::Tensor& p, at::IntArrayRef z_of_term,
    int64_t count, double eps) {
  const c10::cuda::CUDAGuard guard(p.device());
  const int64_t C = z_sums.size(2);
  const auto map = term_map(z_of_term, has_norm);
  const auto weights = numbers(p, p), sums = z_sums.contiguous();
  const auto rstd_mean = at::empty({map.K, 2, C}, weights.options()), mean_var = at::empty_like(rstd_mean);
  const auto scale_shift = at::empty({2, map.M, C}, weights.options());
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "norm_statistics", [&] {
    using P = scalar_t;
    norm_kernels<P>().statistics({map, C, count, eps, read<double>(sums), read<P>(weights),
                                  write<P>(rstd_mean), write<P>(mean_var), write<P>(scale_shift)});
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {rstd_mean, mean_var, scale_shift};
}

// The numbers per channel of both functions below, on the device; `again`: with those of the derivative.
struct Gradients {
  at::Tensor rstd_mean, p, grad_rstd_mean, grad_sums, tangent_sums, tangent_scale, tangent_p;
  TermMap map;
  at::Tensor scale, by_z_sum, twice_by_square, by_p;
  at::Tensor by_grad_sum, by_grad_product, by_rstd_mean, by_grad_rstd_mean;

  Gradients(const at::Tensor& given_rstd_mean, const at::Tensor& given_p, const MaybeTensor& given_grad,
            const at::Tensor& given_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm,
            const at::Tensor& z, bool again, const MaybeTensor& given_tangent_sums = {},
            const MaybeTensor& given_tangent_scale = {}, const MaybeTensor& given_tangent_p = {})
      : rstd_mean(numbers(given_rstd_mean, z)), p(numbers(given_p, z)),
        grad_rstd_mean(numbers(given_grad, z)), grad_sums(given_sums.contiguous()),
        tangent_sums(dense(given_tangent_sums)),
        tangent_scale(given_tangent_scale.value_or(at::Tensor())), tangent_p(numbers(given_tangent_p, z)),
        map(term_map(z_of_term, has_norm)) {
    const int64_t K = map.K, M = map.M, C = rstd_mean.size(2);
    const auto options = p.options();
    const auto rows = at::empty({2 * K + (again ? 3 : 1) * M, C}, options).split_with_sizes(
        again ? std::vector<int64_t>{M, K, K, M, M} : std::vector<int64_t>{M, K, K});
    scale = rows[0];
    by_z_sum = rows[1];
    twice_by_square = rows[2];
    by_p = at::empty({M}, options);
    if (again) {
      by_grad_sum = rows[3];
      by_grad_product = rows[4];
      by_rstd_mean = at::empty({K, 2, C}, options);
      by_grad_rstd_mean = at::empty({K, 2, C}, options);
    }
    if (tangent_scale.defined() && tangent_scale.stride(1) != 1) tangent_scale = tangent_scale.contiguous();
    AT_DISPATCH_FLOATING_TYPES(p.scalar_type(), "norm_gradients", [&] {
      using P = scalar_t;
      const int64_t step = tangent_scale.defined() ? tangent_scale.stride(0) : 0;
      const NormGradients<P> norms{map, C, pixels(z), read<P>(rstd_mean), read<P>(p), read<P>(grad_rstd_mean),
                                   read<double>(grad_sums), read<double>(tangent_sums),
                                   read<double>(tangent_scale), step, read<P>(tangent_p)};
      norm_kernels<P>().gradients({norms, again, write<P>(scale), write<P>(by_z_sum),
                                   write<P>(twice_by_square), write<P>(by_p), write<P>(by_grad_sum),
                                   write<P>(by_grad_product), write<P>(by_rstd_mean),
                                   write<P>(by_grad_rstd_mean)});
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }

  static at::Tensor dense(const MaybeTensor& t) { return t ? t->contiguous() : at::Tensor(); }

  template <typename P>
  static const P* row(const at::Tensor& t, int64_t number) { return read<P>(t) + number * t.size(1); }
};

std::tuple<at::Tensor, Tensors> term_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef edge_of_term,
    at::IntArrayRef has_norm, at::TensorList z, at::TensorList grad_edges) {
  const c10::cuda::CUDAGuard guard(p.device());
  const auto zs = checked(z), grads = checked(grad_edges);
  const Gradients g(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm, zs[0], false);
  Tensors by_z;
  DISPATCH(zs[0].scalar_type(), "term_gradients", {
    using P = Acc<T>;
    std::vector<AffineSum<T>> sums(zs.size());
    for (size_t k = 0; k < zs.size(); ++k)
      if (has_norm[k])
        sums[k].entries.push_back({read<T>(zs[k]), g.row<P>(g.twice_by_square, k), g.row<P>(g.by_z_sum, k)});
    for (size_t m = 0; m < z_of_term.size(); ++m)
      sums[z_of_term[m]].entries.push_back({read<T>(grads[edge_of_term[m]]), g.row<P>(g.scale, m), nullptr});
    by_z = computed(sums, zs[0]);
  });
  return {g.by_p.to(p.scalar_type()), by_z};
}

// may_overwrite is of the CPU: here sums that read a tensor and the one that would overwrite it run at once.
std::tuple<at::Tensor, at::Tensor, at::Tensor, Tensors, Tensors> term_gradients_backward(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef edge_of_term,
    at::IntArrayRef has_norm, at::TensorList z, at::TensorList grad_edges, at::TensorList tangent_z,
    at::IntArrayRef /*may_overwrite*/, const MaybeTensor& tangent_sums, const MaybeTensor& grad_tangent_sums,
    const MaybeTensor& tangent_p) {
  const c10::cuda::CUDAGuard guard(p.device());
  const auto zs = checked(z), grads = checked(grad_edges);
  const auto tangents = tangent_z.empty() ? Tensors() : checked(tangent_z);
  const Gradients g(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm, zs[0], true, tangent_sums,
                    grad_tangent_sums, tangent_p);
  const size_t E = grads.size();
  Tensors found;
  DISPATCH(zs[0].scalar_type(), "term_gradients_backward", {
    using P = Acc<T>;
    std::vector<AffineSum<T>> sums(E + zs.size());  // by each G, then by each z
    for (size_t k = 0; k < tangents.size(); ++k)
      if (has_norm[k])
        sums[E + k].entries.push_back({read<T>(tangents[k]), g.row<P>(g.twice_by_square, k), nullptr});
    for (size_t m = 0; m < z_of_term.size(); ++m) {
      const int64_t k = z_of_term[m], e = edge_of_term[m];
      const P* by_product = g.row<P>(g.by_grad_product, m);
      sums[E + k].entries.push_back({read<T>(grads[e]), by_product, nullptr});
      sums[e].entries.push_back({read<T>(zs[k]), by_product, g.row<P>(g.by_grad_sum, m)});
      if (!tangents.empty())
        sums[e].entries.push_back({read<T>(tangents[k]), g.row<P>(g.scale, m), nullptr});
    }
    found = computed(sums, zs[0]);
  });
  Tensors by_z(found.begin() + E, found.end());
  found.resize(E);
  const auto dtype = p.scalar_type();
  return {g.by_rstd_mean.to(dtype), g.by_p.to(dtype), g.by_grad_rstd_mean.to(dtype), by_z, found};
}

}  // namespace

TORCH_LIBRARY_IMPL(ldarts, CUDA, m) {
  m.impl("channel_sums", channel_sums);
  m.impl("node_sum", node_sum);
  m.impl("norm_statistics", norm_statistics);
  m.impl("term_gradients", term_gradients);
  m.impl("term_gradients_backward", term_gradients_backward);
}

}  // namespace ldarts
