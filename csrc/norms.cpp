// The arithmetic of norms.h on the CPU.
#include "norms.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace ldarts {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

at::Tensor wide(const at::Tensor& t) { return t.to(at::kDouble).contiguous(); }
at::Tensor maybe_wide(const MaybeTensor& t) { return t ? wide(*t) : at::Tensor(); }
const double* read(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; }
double* write(const at::Tensor& t) { return t.mutable_data_ptr<double>(); }

// visit(row, channel) for `rows` rows of C channels.
template <typename Visit>
void each(int64_t rows, int64_t C, const Visit& visit) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < C; ++c) visit(row, c);
}

// p is [M] or [M, C].
TermWeights<double> weights_of(const at::Tensor& p) { return {read(p), p.dim() == 1 ? 1 : p.size(1)}; }

// All results of NormGradients or NormDerivatives; by_p is 0 before.
template <typename Norms>
void write_all(const Norms& norms) {
  each(norms.map.K, norms.C, [&](int64_t k, int64_t c) { norms.write_of_z(k, c); });
  each(norms.map.M, norms.C, [&](int64_t m, int64_t c) {
    norms.write_of_term(m, c);
    norms.by_p[m * norms.p.width + (norms.p.width > 1 ? c : 0)] += norms.share_of_p(m, c);
  });
}

// -> rstd_mean [K, 2, C] and coefficients [M, 2, C] in float64; moments [K, 2, C]. z_sums: of those z that
// have a norm alone.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_statistics(
    const at::Tensor& z_sums, at::IntArrayRef has_norm, const at::Tensor& p, const MaybeTensor& beta,
    at::IntArrayRef z_of_term, int64_t count, double eps) {
  const int64_t C = z_sums.size(2);
  const auto map = term_map(z_of_term, has_norm);
  const auto rstd_mean = at::empty({map.K, 2, C}, z_sums.options()), moments = at::empty_like(rstd_mean);
  const auto coefficients = at::empty({map.M, 2, C}, z_sums.options()), weights = wide(p);
  const auto shifts = maybe_wide(beta);
  const NormStatistics<double> norms{map, C, count, eps, read(z_sums), weights_of(weights), read(shifts),
                                     write(rstd_mean), write(moments), write(coefficients)};
  each(map.K, C, [&](int64_t k, int64_t c) { norms.of_z(k, c); });
  each(map.M, C, [&](int64_t m, int64_t c) { norms.of_term(m, c); });
  return {rstd_mean, moments.to(p.scalar_type()), coefficients};
}

// -> scale [M, C], of_z [K, 2, C], by_p like p
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const int64_t C = rstd_mean.size(2);
  const auto map = term_map(z_of_term, has_norm);
  const auto of_rstd_mean = wide(rstd_mean), weights = wide(p), sums = grad_sums.contiguous();
  const auto by_rstd_mean = maybe_wide(grad_rstd_mean);
  const auto scale = at::empty({map.M, C}, sums.options()), of_z = at::empty({map.K, 2, C}, sums.options());
  const auto by_p = at::zeros(p.sizes(), sums.options());
  write_all(NormGradients<double>{map, C, count, read(of_rstd_mean), weights_of(weights), read(by_rstd_mean),
                                  read(sums), write(scale), write(of_z), write(by_p)});
  return {scale, of_z, by_p.to(p.scalar_type())};
}

// -> by rstd_mean, p, grad_rstd_mean and grad_sums, in float64 but for p
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_derivatives(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, const MaybeTensor& grad_scale, const MaybeTensor& grad_of_z,
    const MaybeTensor& grad_p, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const auto map = term_map(z_of_term, has_norm);
  const auto of_rstd_mean = wide(rstd_mean), weights = wide(p), sums = grad_sums.contiguous();
  const auto by_rstd_mean = maybe_wide(grad_rstd_mean), by_scale = maybe_wide(grad_scale);
  const auto by_of_z = maybe_wide(grad_of_z), by_weights = maybe_wide(grad_p);
  const auto found = at::empty_like(of_rstd_mean), found_grad = at::empty_like(of_rstd_mean);
  const auto found_sums = at::empty_like(sums), found_p = at::zeros(p.sizes(), sums.options());
  NormDerivatives<double> norms{{map, rstd_mean.size(2), count, read(of_rstd_mean), weights_of(weights),
                                 read(by_rstd_mean), read(sums), nullptr, nullptr, write(found_p)},
                                read(by_scale), read(by_of_z), {read(by_weights), weights_of(weights).width},
                                write(found), write(found_grad), write(found_sums)};
  write_all(norms);
  return {found, found_p.to(p.scalar_type()), found_grad, found_sums};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
  m.def("norm_statistics(Tensor z_sums, int[] has_norm, Tensor p, Tensor? beta, int[] z_of_term, int count, "
        "float eps) -> (Tensor rstd_mean, Tensor moments, Tensor coefficients)");
  m.def("norm_gradients(Tensor rstd_mean, Tensor p, Tensor? grad_rstd_mean, Tensor grad_sums, "
        "int[] z_of_term, int[] has_norm, int count) -> (Tensor scale, Tensor of_z, Tensor by_p)");
  m.def("norm_derivatives(Tensor rstd_mean, Tensor p, Tensor? grad_rstd_mean, Tensor grad_sums, "
        "Tensor? grad_scale, Tensor? grad_of_z, Tensor? grad_p, int[] z_of_term, int[] has_norm, int count) "
        "-> (Tensor by_rstd_mean, Tensor by_p, Tensor by_grad_rstd_mean, Tensor by_grad_sums)");
}

TORCH_LIBRARY_IMPL(ldarts, CPU, m) {
  m.impl("norm_statistics", norm_statistics);
  m.impl("norm_gradients", norm_gradients);
  m.impl("norm_derivatives", norm_derivatives);
}

}  // namespace ldarts
