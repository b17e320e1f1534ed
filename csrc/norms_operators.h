#pragma once
// The operators of norms.h for a device: from tensors to pointers. Device has
//
//     type_for(p)           the dtype of the numbers per channel, float32 or float64
//     run(norms)            a struct of norms.h, computed on all its channels
#include "checks.h"
#include "norms.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <tuple>

namespace ldarts {

using MaybeTensor = std::optional<at::Tensor>;

inline at::Tensor dense(const MaybeTensor& t, at::ScalarType dtype) {
  return t ? t->to(dtype).contiguous() : at::Tensor();
}

// p is [M] or [M, C].
template <typename P>
TermWeights<P> weights_of(const at::Tensor& p) { return {read<P>(p), p.dim() == 1 ? 1 : p.size(1)}; }

// -> rstd_mean [K, 2, C], moments [K, 2, C], coefficients [M, 2, C]. z_sums: of the z that have a norm alone.
template <typename Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_statistics(
    const at::Tensor& z_sums, at::IntArrayRef has_norm, const at::Tensor& p, const MaybeTensor& beta,
    at::IntArrayRef z_of_term, int64_t count, double eps) {
  const c10::DeviceGuard guard(p.device());
  const int64_t C = z_sums.size(2);
  TORCH_CHECK(p.dim() == 1 || p.size(1) == C, "ldarts: a batch norm of ", p.size(-1), " channels behind ", C);
  TORCH_CHECK(p.size(0) == static_cast<int64_t>(z_of_term.size()), "ldarts: ", p.size(0), " rows of p for ",
              z_of_term.size(), " terms");
  const auto map = term_map(z_of_term, has_norm);
  const auto weights = dense(p, Device::type_for(p)), sums = dense(z_sums, at::kDouble);
  const auto shifts = dense(beta, weights.scalar_type());
  const auto rstd_mean = at::empty({map.K, 2, C}, weights.options()), moments = at::empty_like(rstd_mean);
  const auto coefficients = at::empty({map.M, 2, C}, weights.options());
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "norm_statistics", [&] {
    using P = scalar_t;
    Device::run(NormStatistics<P>{map, C, count, eps, read<double>(sums), weights_of<P>(weights),
                                  read<P>(shifts), write<P>(rstd_mean), write<P>(moments),
                                  write<P>(coefficients)});
  });
  return {rstd_mean, moments.to(p.scalar_type()), coefficients};
}

// -> scale [M, C], of_z [K, 2, C], by_p like p
template <typename Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const c10::DeviceGuard guard(p.device());
  const int64_t C = rstd_mean.size(2);
  const auto map = term_map(z_of_term, has_norm);
  const auto numbers = rstd_mean.contiguous(), sums = dense(grad_sums, at::kDouble);
  const auto dtype = numbers.scalar_type();
  const auto weights = dense(p, dtype), by_rstd_mean = dense(grad_rstd_mean, dtype);
  const auto scale = at::empty({map.M, C}, numbers.options()), of_z = at::empty_like(numbers);
  const auto by_p = at::empty(p.sizes(), numbers.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "norm_gradients", [&] {
    using P = scalar_t;
    Device::run(NormGradients<P>{map, C, count, read<P>(numbers), weights_of<P>(weights),
                                 read<P>(by_rstd_mean), read<double>(sums), write<P>(scale), write<P>(of_z),
                                 write<P>(by_p)});
  });
  return {scale, of_z, by_p.to(p.scalar_type())};
}

// -> by rstd_mean, p, grad_rstd_mean and grad_sums
template <typename Device>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_derivatives(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, const MaybeTensor& grad_scale, const MaybeTensor& grad_of_z,
    const MaybeTensor& grad_p, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const c10::DeviceGuard guard(p.device());
  const auto map = term_map(z_of_term, has_norm);
  const auto numbers = rstd_mean.contiguous(), sums = dense(grad_sums, at::kDouble);
  const auto dtype = numbers.scalar_type();
  const auto weights = dense(p, dtype), of_p = dense(grad_p, dtype);
  const auto of_numbers = dense(grad_rstd_mean, dtype);
  const auto of_scale = dense(grad_scale, at::kDouble), of_z = dense(grad_of_z, at::kDouble);
  const auto by_numbers = at::empty_like(numbers), by_grad = at::empty_like(numbers);
  const auto by_sums = at::empty_like(sums), by_p = at::empty(p.sizes(), numbers.options());
  AT_DISPATCH_FLOATING_TYPES(dtype, "norm_derivatives", [&] {
    using P = scalar_t;
    const auto of_terms = weights_of<P>(weights);
    Device::run(NormDerivatives<P>{
        {map, numbers.size(2), count, read<P>(numbers), of_terms, read<P>(of_numbers), read<double>(sums),
         nullptr, nullptr, write<P>(by_p)},
        read<double>(of_scale), read<double>(of_z), {read<P>(of_p), of_terms.width},
        write<P>(by_numbers), write<P>(by_grad), write<double>(by_sums)});
  });
  return {by_numbers, by_p.to(p.scalar_type()), by_grad, by_sums};
}

}  // namespace ldarts
