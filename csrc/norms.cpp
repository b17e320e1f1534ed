// What follows from sums per channel, for the batch norms behind the z of ldarts/separable.py: their
// statistics, the gradients through them, and the derivatives of these gradients. All in float64, in which
// the differences below are safe.
//
// A term m of a node is p_m (z - μ) r of one of K tensors z [N, C, H, W], k = z_of_term[m], with r = 1/σ and
// μ those of its batch norm, or 1 and 0 where it has none (has_norm[k] = 0). All formulas are per channel; n
// counts the pixels.
//
//     z_sums [K, 2, C]           S1 = Σ z,  S2 = Σ z²;  mean_var [K, 2, C]: μ = S1/n,  v = S2/n - μ²
//     rstd_mean [K, 2, C]        r = 1 / sqrt(v + eps),  μ
//     scale_shift [2, M, C]      the term is scale z + shift:  scale = p r,  shift = -p r μ
//     grad_sums [M, 2, C]        A = Σ G,  B = Σ G z, with G [N, C, H, W] the gradient by the term
//
// grad_rstd_mean [K, 2, C] is the gradient by rstd_mean of whatever else reads it (the pair behind a norm).
#include "mixed_sum.h"

#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace ldarts {
namespace {

at::Tensor wide(const at::Tensor& t) { return t.to(at::kDouble).contiguous(); }
const double* read(const at::Tensor& t) { return t.const_data_ptr<double>(); }
double* write(const at::Tensor& t) { return t.mutable_data_ptr<double>(); }

// -> rstd_mean; mean_var in float64; scale_shift. z_sums: of those z that have a norm alone.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_statistics(
    const at::Tensor& z_sums, at::IntArrayRef has_norm, const at::Tensor& p, at::IntArrayRef z_of_term,
    int64_t count, double eps) {
  const int64_t K = has_norm.size(), M = z_of_term.size(), C = z_sums.size(2);
  const auto rstd_mean = at::empty({K, 2, C}, z_sums.options()), mean_var = at::empty_like(rstd_mean);
  const auto scale_shift = at::empty({2, M, C}, z_sums.options()), weights = wide(p);
  const double *sums = read(z_sums), *weight = read(weights);
  double *to_rstd_mean = write(rstd_mean), *to_mean_var = write(mean_var);
  double *to_scale_shift = write(scale_shift);
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < C; ++c) {
      double mean = 0, var = 0, rstd = 1;
      if (has_norm[k]) {
        mean = sums[c] / count;
        var = std::max(0.0, sums[C + c] / count - mean * mean);
        rstd = 1 / std::sqrt(var + eps);
      }
      to_rstd_mean[2 * k * C + c] = rstd;
      to_rstd_mean[(2 * k + 1) * C + c] = mean;
      to_mean_var[2 * k * C + c] = mean;
      to_mean_var[(2 * k + 1) * C + c] = var;
    }
    if (has_norm[k]) sums += 2 * C;
  }
  for (int64_t m = 0; m < M; ++m) {
    const double *rstd = to_rstd_mean + 2 * z_of_term[m] * C, *mean = rstd + C;
    for (int64_t c = 0; c < C; ++c) {
      const double scale = weight[m] * rstd[c];
      to_scale_shift[m * C + c] = scale;
      to_scale_shift[(M + m) * C + c] = -scale * mean[c];
    }
  }
  return {rstd_mean.to(p.scalar_type()), mean_var, scale_shift.to(p.scalar_type())};
}

// What the two functions below begin with, the gradients by r and μ of each z, and the loops of both:
//
//     by r: grad_r + Σ_m p (B - μ A),   by μ: grad_μ - Σ_m p r A    over the terms m of the z
struct NormGradients {
  int64_t K, M, C;
  at::IntArrayRef z_of_term, has_norm;
  at::Tensor rstd_mean, p;
  const double *norms, *weights, *sums;  // where rstd_mean, p and grad_sums are
  std::vector<double> by_rstd, by_mean;  // [K, C]

  NormGradients(const at::Tensor& given_rstd_mean, const at::Tensor& given_p,
                const std::optional<at::Tensor>& grad_rstd_mean, const at::Tensor& grad_sums,
                at::IntArrayRef z_of_term, at::IntArrayRef has_norm)
      : K(given_rstd_mean.size(0)), M(z_of_term.size()), C(given_rstd_mean.size(2)), z_of_term(z_of_term),
        has_norm(has_norm), rstd_mean(wide(given_rstd_mean)), p(wide(given_p)), norms(read(rstd_mean)),
        weights(read(p)), sums(read(grad_sums)) {
    const auto given = grad_rstd_mean ? wide(*grad_rstd_mean) : at::zeros_like(rstd_mean);
    for (int64_t k = 0; k < K; ++k) {
      const double* grad = read(given) + 2 * k * C;
      by_rstd.insert(by_rstd.end(), grad, grad + C);
      by_mean.insert(by_mean.end(), grad + C, grad + 2 * C);
    }
    each_term([&](int64_t m, int64_t k, int64_t c, double rstd, double mean) {
      by_rstd[k] += weights[m] * centred(m, c, mean);
      by_mean[k] -= weights[m] * rstd * sum(m, c);
    });
  }

  double sum(int64_t m, int64_t c) const { return sums[2 * m * C + c]; }  // A
  double centred(int64_t m, int64_t c, double mean) const {               // B - μ A = Σ G (z - μ)
    return sums[(2 * m + 1) * C + c] - mean * sum(m, c);
  }

  // visit(term, place of its z and channel in [K, C], channel, r, μ)
  template <typename Visit>
  void each_term(const Visit& visit) const {
    for (int64_t m = 0; m < M; ++m) {
      const int64_t k = z_of_term[m];
      for (int64_t c = 0; c < C; ++c)
        visit(m, k * C + c, c, norms[2 * k * C + c], norms[(2 * k + 1) * C + c]);
    }
  }

  // visit(place in [K, 2, C] of a z that has a norm and a channel, place in [K, C], r, μ)
  template <typename Visit>
  void each_norm(const Visit& visit) const {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C && has_norm[k]; ++c)
        visit(2 * k * C + c, k * C + c, norms[2 * k * C + c], norms[(2 * k + 1) * C + c]);
  }
};

// -> scale [M, C], grad_z_sums [K, 2, C], grad_p [M]. With by_v = -r³/2 by_r, the gradient by the variance:
//
//     by S1: (by_μ - 2 μ by_v) / n,   by S2: by_v / n    (0 without a norm)
//     by p:  Σ_c r (B - μ A)
//     by z:  Σ_m p r G + by_S1 + 2 by_S2 z               [N, C, H, W], which the caller computes
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const std::optional<at::Tensor>& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count) {
  const NormGradients g(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm);
  const auto scale = at::empty({g.M, g.C}, g.rstd_mean.options()), grad_z_sums = at::zeros_like(g.rstd_mean);
  const auto grad_p = at::zeros_like(g.p);
  const double n = count;
  double *to_scale = write(scale), *to_z_sums = write(grad_z_sums), *to_p = write(grad_p);
  g.each_term([&](int64_t m, int64_t, int64_t c, double rstd, double mean) {
    to_scale[m * g.C + c] = g.weights[m] * rstd;
    to_p[m] += rstd * g.centred(m, c, mean);
  });
  g.each_norm([&](int64_t place, int64_t k, double rstd, double mean) {
    const double by_var = -0.5 * rstd * rstd * rstd * g.by_rstd[k];
    to_z_sums[place] = (g.by_mean[k] - 2 * mean * by_var) / n;
    to_z_sums[place + g.C] = by_var / n;
  });
  return {scale, grad_z_sums, grad_p};
}

// The derivative of norm_gradients: from the gradients by its results (each may be missing) those by
// rstd_mean, p, grad_rstd_mean and grad_sums. The gradient by scale is s'; those by the gradients by S1, S2
// and p are tangents of these, S1', S2' and p':
//
//     μ' = S1' / n,  v' = S2' / n - 2 μ μ',  r' = -r³/2 v'    of each z; 0 without a norm
//     by grad_r: r',  by grad_μ: μ'
//     by B: p r' + p' r =: B',  by A: -p r μ' - μ B'          of each term
//     by p: Σ_c (B - μ A) r' + r (s' - A μ')
//     by r: -3/2 r² by_r v' + Σ_m p' (B - μ A) + p (s' - A μ')
//     by μ: r³ by_r μ' - Σ_m A B'
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_gradients_backward(
    const at::Tensor& rstd_mean, const at::Tensor& p, const std::optional<at::Tensor>& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef has_norm, int64_t count,
    const std::optional<at::Tensor>& tangent_scale, const std::optional<at::Tensor>& tangent_z_sums,
    const std::optional<at::Tensor>& tangent_p) {
  const NormGradients g(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm);
  const int64_t C = g.C;
  const double n = count;
  const auto by_rstd_mean = at::zeros_like(g.rstd_mean), by_grad_rstd_mean = at::zeros_like(g.rstd_mean);
  const auto by_sums = at::zeros_like(grad_sums), by_p = at::zeros_like(g.p);
  const auto scale_given = tangent_scale ? wide(*tangent_scale) : at::zeros({g.M, C}, g.rstd_mean.options());
  const auto sums_given = tangent_z_sums ? wide(*tangent_z_sums) : at::zeros_like(g.rstd_mean);
  const auto p_given = tangent_p ? wide(*tangent_p) : at::zeros_like(g.p);
  const double *of_scale = read(scale_given), *of_sums = read(sums_given), *of_p = read(p_given);
  double *to_rstd_mean = write(by_rstd_mean), *to_grad = write(by_grad_rstd_mean);
  double *to_sums = write(by_sums), *to_p = write(by_p);
  g.each_norm([&](int64_t place, int64_t k, double rstd, double mean) {
    const double cube = -0.5 * rstd * rstd * rstd, by_rstd = g.by_rstd[k];
    const double tangent_mean = of_sums[place] / n;
    const double tangent_var = of_sums[place + C] / n - 2 * mean * tangent_mean;
    to_grad[place] = cube * tangent_var;
    to_grad[place + C] = tangent_mean;
    to_rstd_mean[place] = -1.5 * rstd * rstd * by_rstd * tangent_var;
    to_rstd_mean[place + C] = -2 * cube * by_rstd * tangent_mean;
  });
  g.each_term([&](int64_t m, int64_t, int64_t c, double rstd, double mean) {
    const int64_t place = 2 * z_of_term[m] * C + c;
    const double tangent_rstd = to_grad[place], tangent_mean = to_grad[place + C];
    const double sum = g.sum(m, c), centred = g.centred(m, c, mean), weight = g.weights[m];
    const double by_scale = of_scale[m * C + c] - sum * tangent_mean;
    const double by_centred = weight * tangent_rstd + of_p[m] * rstd;
    to_p[m] += centred * tangent_rstd + rstd * by_scale;
    to_rstd_mean[place] += of_p[m] * centred + weight * by_scale;
    to_rstd_mean[place + C] -= sum * by_centred;
    to_sums[2 * m * C + c] = -weight * rstd * tangent_mean - mean * by_centred;
    to_sums[(2 * m + 1) * C + c] = by_centred;
  });
  const auto dtype = p.scalar_type();
  return {by_rstd_mean.to(dtype), by_p.to(dtype), by_grad_rstd_mean.to(dtype), by_sums};
}

int64_t pixels(const at::Tensor& z) { return z.numel() / z.size(1); }

// The gradients by p [M] and by each z [N, C, H, W], where nothing but the norms stands behind a z:
//
//     by z: Σ_m p r G + by_S1 + 2 by_S2 z,  by_S1 and by_S2 those of norm_gradients
//
// grad_edges: G, one for all terms of an edge; term m is on edge_of_term[m].
std::tuple<at::Tensor, std::vector<at::Tensor>> term_gradients(
    const at::Tensor& rstd_mean, const at::Tensor& p, const std::optional<at::Tensor>& grad_rstd_mean,
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
// 0). tangent_sums [K, 2, C] are Σ z' and Σ z' z, grad_tangent_sums [M, C] are Σ G z' of each term, so that
//
//     S1' = Σ z',  S2' = 2 Σ z' z,  s' = Σ G z'
//
// -> by rstd_mean, by p, by grad_rstd_mean as in norm_gradients_backward; with its by_A and by_B, and by_S2
// of norm_gradients,
//
//     by z: 2 by_S2 z' + Σ_m by_B G       [N, C, H, W], over the terms m of the z; of size 0 where none is
//     by G: Σ_m by_B z + by_A + p r z'    [N, C, H, W], over the terms m of the edge
//
// A tangent_z that may_overwrite names is overwritten by the gradient by its z.
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>
term_gradients_backward(
    const at::Tensor& rstd_mean, const at::Tensor& p, const std::optional<at::Tensor>& grad_rstd_mean,
    const at::Tensor& grad_sums, at::IntArrayRef z_of_term, at::IntArrayRef edge_of_term,
    at::IntArrayRef has_norm, at::TensorList z, at::TensorList grad_edges, at::TensorList tangent_z,
    at::IntArrayRef may_overwrite, const std::optional<at::Tensor>& tangent_sums,
    const std::optional<at::Tensor>& grad_tangent_sums, const std::optional<at::Tensor>& tangent_p) {
  const int64_t C = rstd_mean.size(2), count = pixels(z[0]);
  const auto [scale, grad_z_sums, grad_p] =
      norm_gradients(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm, count);
  auto tangent_z_sums = tangent_sums;
  if (tangent_sums) tangent_z_sums = *tangent_sums * at::tensor({1.0, 2.0}).unsqueeze(1);
  const auto [by_rstd_mean, by_p, by_grad_rstd_mean, by_sums] =
      norm_gradients_backward(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, has_norm, count,
                              grad_tangent_sums, tangent_z_sums, tangent_p);
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
  return {by_rstd_mean, by_p, by_grad_rstd_mean, by_z, found};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
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
  m.impl("norm_statistics", norm_statistics);
  m.impl("norm_gradients", norm_gradients);
  m.impl("term_gradients", term_gradients);
  m.impl("term_gradients_backward", term_gradients_backward);
}

}  // namespace ldarts
