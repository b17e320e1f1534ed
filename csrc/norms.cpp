// The arithmetic of norms.h on the CPU, for the batch norms behind the z of ldarts/fused/separable.py and of
// ldarts/fused/normalised_sum.py, and sums of tensors by its results.
#include "norms.h"
#include "mixed_sum.h"

#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ldarts {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

at::Tensor wide(const at::Tensor& t) { return t.to(at::kDouble).contiguous(); }
at::Tensor wide(const MaybeTensor& t) { return t ? wide(*t) : at::Tensor(); }
const double* read(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<double>() : nullptr; }
double* write(const at::Tensor& t) { return t.mutable_data_ptr<double>(); }

// visit(row, channel) for `rows` rows of C channels.
template <typename Visit>
void each(int64_t rows, int64_t C, const Visit& visit) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < C; ++c) visit(row, c);
}

// -> rstd_mean, mean_var, scale_shift. z_sums: of those z that have a norm alone.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_statistics(
    const at::Tensor& z_sums, at::IntArrayRef has_norm, const at::Tensor& p, at::IntArrayRef z_of_term,
    int64_t count, double eps) {
  const int64_t C = z_sums.size(2);
  const auto map = term_map(z_of_term, has_norm);
  const auto rstd_mean = at::empty({map.K, 2, C}, z_sums.options()), mean_var = at::empty_like(rstd_mean);
  const auto scale_shift = at::empty({2, map.M, C}, z_sums.options()), weights = wide(p);
  const NormStatistics<double> norms{map, C, count, eps, read(z_sums), read(weights), write(rstd_mean),
                                     write(mean_var), write(scale_shift)};
  each(map.K, C, [&](int64_t k, int64_t c) { norms.of_z(k, c); });
  each(map.M, C, [&](int64_t m, int64_t c) { norms.of_term(m, c); });
  const auto dtype = p.scalar_type();
  return {rstd_mean.to(dtype), mean_var.to(dtype), scale_shift.to(dtype)};
}

// NormGradients, with the tensors that it points to.
struct Gradients {
  at::Tensor rstd_mean, p, grad_rstd_mean, grad_sums, tangent_sums, tangent_scale, tangent_p;
  NormGradients<double> norms;

  Gradients(const at::Tensor& given_rstd_mean, const at::Tensor& given_p, const MaybeTensor& given_grad,
            const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count,
            const MaybeTensor& given_sums = {}, const MaybeTensor& given_scale = {},
            const MaybeTensor& given_tangent = {})
      : rstd_mean(wide(given_rstd_mean)), p(wide(given_p)), grad_rstd_mean(wide(given_grad)),
        grad_sums(grad_sums), tangent_sums(wide(given_sums)), tangent_scale(wide(given_scale)),
        tangent_p(wide(given_tangent)),
        norms{term_map(z_of_term, has_norm), rstd_mean.size(2), count, read(rstd_mean), read(p),
              read(grad_rstd_mean), read(grad_sums), read(tangent_sums), read(tangent_scale),
              rstd_mean.size(2), read(tangent_p)} {}
};

// value(row, channel) of every row and channel, [rows, C]; of two values [rows, 2, C].
template <typename Value>
at::Tensor table(int64_t rows, int64_t C, const Value& value) {
  const auto result = at::empty({rows, C}, at::dtype(at::kDouble));
  double* to = write(result);
  each(rows, C, [&](int64_t row, int64_t c) { to[row * C + c] = value(row, c); });
  return result;
}

template <typename Value>
at::Tensor table_of_two(int64_t rows, int64_t C, const Value& value) {
  const auto result = at::empty({rows, 2, C}, at::dtype(at::kDouble));
  double* to = write(result);
  each(rows, C, [&](int64_t row, int64_t c) {
    const TwoNumbers found = value(row, c);
    to[2 * row * C + c] = found.first;
    to[(2 * row + 1) * C + c] = found.second;
  });
  return result;
}

at::Tensor scale_of_terms(const NormGradients<double>& norms) {
  return table(norms.map.M, norms.C, [&](int64_t m, int64_t c) { return norms.scale(m, c); });
}

at::Tensor by_z_sums(const NormGradients<double>& norms) {
  return table_of_two(norms.map.K, norms.C, [&](int64_t k, int64_t c) { return norms.by_z_sums(k, c); });
}

at::Tensor by_p(const NormGradients<double>& norms) {
  return table(norms.map.M, norms.C, [&](int64_t m, int64_t c) { return norms.by_p(m, c); }).sum(1);
}

// -> scale [M, C], grad_z_sums [K, 2, C], grad_p [M]
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const Gradients g(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm, count);
  return {scale_of_terms(g.norms), by_z_sums(g.norms), by_p(g.norms)};
}

int64_t pixels(const at::Tensor& z) { return z.numel() / z.size(1); }

// The gradients by p [M] and by each z [N, C, H, W], where nothing but the norms stands behind a z.
//
// grad_edges: G, one for all terms of an edge; term m is on edge_of_term[m].
std::tuple<at::Tensor, std::vector<at::Tensor>> term_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef edge_of_term,
    at::IntArrayRef has_norm, at::TensorList z, at::TensorList grad_edges) {
  const auto [scale, grad_z_sums, grad_p] =
      norm_gradients(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm, pixels(z[0]));
  const int64_t C = rstd_mean.size(2);
  std::vector<ScaledSum> by_z(z.size());
  for (size_t k = 0; k < z.size(); ++k) {
    const double *by_sum = read(grad_z_sums) + 2 * k * C, *by_square = by_sum + C;
    by_z[k].shift.assign(by_sum, by_sum + C);
    for (int64_t c = 0; c < C && has_norm[k]; ++c) by_z[k].scale.push_back(2 * by_square[c]);
    if (has_norm[k]) by_z[k].terms.push_back(z[k]);
  }
  for (size_t m = 0; m < z_of_term.size(); ++m)
    by_z[z_of_term[m]].add(read(scale) + m * C, C, grad_edges[edge_of_term[m]]);
  return {grad_p.to(p.scalar_type()), scaled_sums(std::move(by_z))};
}

// The derivative of term_gradients, or of what separable_backward computes from norm_gradients. The gradients
// by the gradients by z and by p are tangents of these, z' [N, C, H, W] and p' [M] (all z' or none, which is
// 0). tangent_sums [K, 2, C] are Σ z' and Σ z' z, grad_tangent_sums [M, C] are Σ G z' of each term.
//
// -> by rstd_mean, by p, by grad_rstd_mean, and with by_A, by_B and by_S2 of norms.h
//
//     by z: 2 by_S2 z' + Σ_m by_B G       [N, C, H, W], over the terms m of the z; of size 0 where none is
//     by G: Σ_m by_B z + by_A + p r z'    [N, C, H, W], over the terms m of the edge
//
// A tangent_z that may_overwrite names is overwritten by the gradient by its z.
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>
term_gradients_backward(
    const at::Tensor& rstd_mean, const at::Tensor& p, const MaybeTensor& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef edge_of_term,
    at::IntArrayRef has_norm, at::TensorList z, at::TensorList grad_edges, at::TensorList tangent_z,
    at::IntArrayRef may_overwrite, const MaybeTensor& tangent_sums,
    const MaybeTensor& grad_tangent_sums, const MaybeTensor& tangent_p) {
  const int64_t C = rstd_mean.size(2);
  const Gradients g(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm, pixels(z[0]), tangent_sums,
                    grad_tangent_sums, tangent_p);
  const NormGradients<double>& norms = g.norms;
  const int64_t K = norms.map.K, M = norms.map.M;
  const auto scale = scale_of_terms(norms), grad_z_sums = by_z_sums(norms);
  const auto by_sums =
      table_of_two(M, C, [&](int64_t m, int64_t c) { return norms.derivative_by_grad_sums(m, c); });
  const auto by_rstd_mean =
      table_of_two(K, C, [&](int64_t k, int64_t c) { return norms.derivative_by_rstd_mean(k, c); });
  const auto by_grad_rstd_mean = table_of_two(K, C, [&](int64_t k, int64_t c) {
    return TwoNumbers{norms.rstd_tangent(k, c), norms.mean_tangent(k, c)};
  });
  const auto by_p = table(M, C, [&](int64_t m, int64_t c) { return norms.derivative_by_p(m, c); }).sum(1);
  const size_t E = grad_edges.size();
  std::vector<ScaledSum> by(E + z.size());  // those by each G first, which read what the others overwrite
  for (size_t k = 0; k < tangent_z.size(); ++k) {
    ScaledSum& by_z = by[E + k];
    const double* by_square = read(grad_z_sums) + (2 * k + 1) * C;
    for (int64_t c = 0; c < C; ++c) by_z.scale.push_back(2 * by_square[c]);
    by_z.terms.push_back(tangent_z[k]);
    if (may_overwrite[k]) by_z.out = tangent_z[k];
  }
  for (size_t m = 0; m < z_of_term.size(); ++m) {
    const int64_t k = z_of_term[m], e = edge_of_term[m];
    const double *by_sum = read(by_sums) + 2 * m * C, *by_product = by_sum + C;
    by[E + k].add(by_product, C, grad_edges[e]);
    ScaledSum& by_grad = by[e];
    by_grad.add(by_product, C, z[k]);
    if (!tangent_z.empty()) by_grad.add(read(scale) + m * C, C, tangent_z[k]);
    by_grad.shift.resize(C);
    for (int64_t c = 0; c < C; ++c) by_grad.shift[c] += by_sum[c];
  }
  auto found = scaled_sums(std::move(by));
  std::vector<at::Tensor> by_z(found.begin() + E, found.end());
  found.resize(E);
  const auto dtype = p.scalar_type();
  return {by_rstd_mean.to(dtype), by_p.to(dtype), by_grad_rstd_mean.to(dtype), by_z, found};
}

// y = Σ_m scale_m z_m + shift_m of each channel; scales, shifts: one [terms, C] an edge; none: 1 and 0.
at::Tensor node_sum(at::TensorList scales, at::TensorList shifts, at::TensorList z) {
  const int64_t M = z.size(), C = z[0].size(1);
  ScaledSum sum{std::vector<double>(scales.empty() ? M * C : 0, 1), std::vector<double>(C), z.vec()};
  for (const at::Tensor& of_edge : scales) {
    const auto scale = wide(of_edge);
    sum.scale.insert(sum.scale.end(), read(scale), read(scale) + scale.numel());
  }
  for (const at::Tensor& of_edge : shifts) {
    const auto shift = wide(of_edge);
    for (int64_t i = 0; i < shift.numel(); ++i) sum.shift[i % C] += read(shift)[i];
  }
  const int64_t given = sum.scale.size();
  TORCH_CHECK_VALUE(given == M * C, "node_sum: ", given, " scales, expected those of ", M, " terms of ", C,
                    " channels");
  return scaled_sums({std::move(sum)})[0];
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
  m.def("node_sum(Tensor[] scales, Tensor[] shifts, Tensor[] z) -> Tensor");
  m.def("norm_statistics(Tensor z_sums, int[] has_norm, Tensor p, int[] z_of_term, int count, float eps) -> "
        "(Tensor rstd_mean, Tensor mean_var, Tensor scale_shift)");
  m.def("norm_gradients(Tensor rstd_mean, Tensor p, Tensor? grad_rstd_mean, Tensor grad_sums, "
        "int[] z_of_term, int[] has_norm, int count) -> (Tensor scale, Tensor grad_z_sums, Tensor grad_p)");
  m.def("term_gradients(Tensor rstd_mean, Tensor p, Tensor? grad_rstd_mean, Tensor grad_sums, "
        "int[] z_of_term, int[] edge_of_term, int[] has_norm, Tensor[] z, Tensor[] grad_edges) -> "
        "(Tensor grad_p, Tensor[] grad_z)");
  m.def("term_gradients_backward(Tensor rstd_mean, Tensor p, Tensor? grad_rstd_mean, Tensor grad_sums, "
        "int[] z_of_term, int[] edge_of_term, int[] has_norm, Tensor[] z, Tensor[] grad_edges, "
        "Tensor(a!)[] tangent_z, int[] may_overwrite, Tensor? tangent_sums, Tensor? grad_tangent_sums, "
        "Tensor? tangent_p) -> (Tensor by_rstd_mean, Tensor by_p, Tensor by_grad_rstd_mean, Tensor[] by_z, "
        "Tensor[] by_grad_edges)");
}

TORCH_LIBRARY_IMPL(ldarts, CPU, m) {
  m.impl("node_sum", node_sum);
  m.impl("norm_statistics", norm_statistics);
  m.impl("norm_gradients", norm_gradients);
  m.impl("term_gradients", term_gradients);
  m.impl("term_gradients_backward", term_gradients_backward);
}

}  // namespace ldarts
