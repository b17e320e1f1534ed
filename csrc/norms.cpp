// What follows from sums per channel, for the batch norms behind the z of ldarts/separable.py: their statistics, the gradients
// through them, and the derivatives of these gradients. All in float64, in which the differences below are safe.
//
// A term m is p_m (z - mu) / sigma of one z, k = of[m]. [K, 2, C]: a table holds 1/sigma and mu of each z, moments its sums of
// z and z z over `count` pixels; [M, 2, C]: sums are those of G and G z for each term, G the gradient by it.
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

// -> table [K, 2, C]; mean and (biased) variance [K, 2, C] in float64; scale p / sigma and shift -p mu / sigma [2, M, C].
// moments: of the z that are `normed`; the others stand as they are, with a table of 1 and 0.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_tables(const at::Tensor& moments, at::IntArrayRef normed,
                                                           const at::Tensor& p, at::IntArrayRef of, int64_t count, double eps) {
  const int64_t K = normed.size(), M = of.size(), C = moments.size(2);
  const auto table = at::empty({K, 2, C}, moments.options()), statistics = at::zeros_like(table);
  const auto numbers = at::empty({2, M, C}, moments.options()), weights = wide(p);
  const double *sums = read(moments), *given = read(weights);
  double *to_table = write(table), *to_statistics = write(statistics), *to_numbers = write(numbers);
  for (int64_t k = 0; k < K; ++k) {
    double *t = to_table + 2 * k * C, *s = to_statistics + 2 * k * C;
    for (int64_t c = 0; c < C; ++c) {
      if (normed[k]) {
        s[c] = sums[c] / count;
        s[C + c] = std::max(0.0, sums[C + c] / count - s[c] * s[c]);
      }
      t[c] = normed[k] ? 1 / std::sqrt(s[C + c] + eps) : 1;
      t[C + c] = s[c];
    }
    if (normed[k]) sums += 2 * C;
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t c = 0; c < C; ++c) {
      const double *t = to_table + 2 * of[m] * C, scale = given[m] * t[c];
      to_numbers[m * C + c] = scale;
      to_numbers[(M + m) * C + c] = -scale * t[C + c];
    }
  return {table.to(p.scalar_type()), statistics, numbers.to(p.scalar_type())};
}

// What the two functions below begin with, the gradients by 1/sigma and mu of each z, and the loops of both.
struct Gradients {
  int64_t K, M, C;
  double count;
  at::IntArrayRef of, normed;
  at::Tensor table, p, sums;
  const double *norms, *weights, *totals;  // where these three are
  std::vector<double> by_inverse, by_mean;  // [K, C]

  Gradients(const at::Tensor& table_, const at::Tensor& p_, const std::optional<at::Tensor>& d_table_, const at::Tensor& sums,
            at::IntArrayRef of, at::IntArrayRef normed, int64_t count)
      : K(table_.size(0)), M(of.size()), C(table_.size(2)), count(count), of(of), normed(normed), table(wide(table_)), p(wide(p_)),
        sums(sums), norms(read(table)), weights(read(p)), totals(read(sums)) {
    const auto given = d_table_ ? wide(*d_table_) : at::zeros_like(table);
    for (int64_t k = 0; k < K; ++k) {
      const double* d = read(given) + 2 * k * C;
      by_inverse.insert(by_inverse.end(), d, d + C);
      by_mean.insert(by_mean.end(), d + C, d + 2 * C);
    }
    each_term([&](int64_t m, int64_t k, int64_t c, double inverse, double mean) {
      by_inverse[k] += weights[m] * centred(m, c, mean);
      by_mean[k] -= weights[m] * inverse * total(m, c);
    });
  }

  double total(int64_t m, int64_t c) const { return totals[2 * m * C + c]; }
  double centred(int64_t m, int64_t c, double mean) const { return totals[(2 * m + 1) * C + c] - mean * total(m, c); }

  // visit(term, place of its z and channel in [K, C], channel, 1/sigma, mu)
  template <typename Visit>
  void each_term(const Visit& visit) const {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t c = 0; c < C; ++c)
        visit(m, of[m] * C + c, c, norms[2 * of[m] * C + c], norms[(2 * of[m] + 1) * C + c]);
  }

  // visit(place in [K, 2, C] of a z that is normed and a channel, place in [K, C], 1/sigma, mu)
  template <typename Visit>
  void each_normed(const Visit& visit) const {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C && normed[k]; ++c)
        visit(2 * k * C + c, k * C + c, norms[2 * k * C + c], norms[(2 * k + 1) * C + c]);
  }
};

// -> scale [M, C], d_moments [K, 2, C], d_p [M]: the gradient by a z is the sum of scale G over its terms, + d_moments[0]
// + 2 d_moments[1] z.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_gradients(
    const at::Tensor& table, const at::Tensor& p, const std::optional<at::Tensor>& d_table, const at::Tensor& sums,
    at::IntArrayRef of, at::IntArrayRef normed, int64_t count) {
  const Gradients g(table, p, d_table, sums, of, normed, count);
  const auto scale = at::empty({g.M, g.C}, g.table.options()), d_moments = at::zeros_like(g.table), d_p = at::zeros_like(g.p);
  double *to_scale = write(scale), *to_moments = write(d_moments), *to_p = write(d_p);
  g.each_term([&](int64_t m, int64_t, int64_t c, double inverse, double mean) {
    to_scale[m * g.C + c] = g.weights[m] * inverse;
    to_p[m] += inverse * g.centred(m, c, mean);
  });
  g.each_normed([&](int64_t at, int64_t k, double inverse, double mean) {
    const double by_variance = -0.5 * inverse * inverse * inverse * g.by_inverse[k];
    to_moments[at] = (g.by_mean[k] - 2 * mean * by_variance) / count;
    to_moments[at + g.C] = by_variance / count;
  });
  return {scale, d_moments, d_p};
}

// The gradients by table, p, d_table and sums, from those by scale, d_moments and d_p, which may be missing.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_gradients_backward(
    const at::Tensor& table, const at::Tensor& p, const std::optional<at::Tensor>& d_table, const at::Tensor& sums,
    at::IntArrayRef of, at::IntArrayRef normed, int64_t count, const std::optional<at::Tensor>& v_scale,
    const std::optional<at::Tensor>& v_moments, const std::optional<at::Tensor>& v_p) {
  const Gradients g(table, p, d_table, sums, of, normed, count);
  const int64_t C = g.C;
  const auto by_table = at::zeros_like(g.table), by_d_table = at::zeros_like(g.table), by_sums = at::zeros_like(sums);
  const auto by_p = at::zeros_like(g.p), vs = v_scale ? wide(*v_scale) : at::zeros({g.M, C}, g.table.options());
  const auto vm = v_moments ? wide(*v_moments) : at::zeros_like(g.table), vp = v_p ? wide(*v_p) : at::zeros_like(g.p);
  const double *by_scale = read(vs), *by_moments = read(vm), *by_d_p = read(vp);
  double *to_table = write(by_table), *to_d_table = write(by_d_table), *to_sums = write(by_sums), *to_p = write(by_p);
  g.each_normed([&](int64_t at, int64_t k, double inverse, double mean) {
    const double cube = -0.5 * inverse * inverse * inverse, by_inverse = g.by_inverse[k];
    const double v_mean = by_moments[at] / count, v_variance = by_moments[at + C] / count - 2 * mean * v_mean;
    to_d_table[at] = cube * v_variance;
    to_d_table[at + C] = v_mean;
    to_table[at] = -1.5 * inverse * inverse * by_inverse * v_variance;
    to_table[at + C] = -2 * cube * by_inverse * v_mean;
  });
  g.each_term([&](int64_t m, int64_t, int64_t c, double inverse, double mean) {
    const int64_t at = 2 * of[m] * C + c;
    const double v_inverse = to_d_table[at], v_mean = to_d_table[at + C], total = g.total(m, c), weight = g.weights[m];
    const double v_scale = by_scale[m * C + c] - total * v_mean, centred = g.centred(m, c, mean);
    const double v_centred = weight * v_inverse + by_d_p[m] * inverse;
    to_p[m] += centred * v_inverse + inverse * v_scale;
    to_table[at] += by_d_p[m] * centred + weight * v_scale;
    to_table[at + C] -= total * v_centred;
    to_sums[2 * m * C + c] = -weight * inverse * v_mean - mean * v_centred;
    to_sums[(2 * m + 1) * C + c] = v_centred;
  });
  const auto dtype = p.scalar_type();
  return {by_table.to(dtype), by_p.to(dtype), by_d_table.to(dtype), by_sums};
}

int64_t pixels(const at::Tensor& z) { return z.numel() / z.size(1); }

// The gradients by p and by each z. g: the gradient by the terms of each edge; term m is on edge[m].
std::tuple<at::Tensor, std::vector<at::Tensor>> term_gradients(
    const at::Tensor& table, const at::Tensor& p, const std::optional<at::Tensor>& d_table, const at::Tensor& sums,
    at::IntArrayRef of, at::IntArrayRef edge, at::IntArrayRef normed, at::TensorList z, at::TensorList g) {
  const auto [scale, d_moments, d_p] = norm_gradients(table, p, d_table, sums, of, normed, pixels(z[0]));
  const int64_t C = table.size(2);
  std::vector<Sum> by_z(z.size());
  for (size_t k = 0; k < z.size(); ++k) {
    const double* d = read(d_moments) + 2 * k * C;
    by_z[k].shift.assign(d, d + C);
    for (int64_t c = 0; c < C && normed[k]; ++c) by_z[k].weights.push_back(2 * d[C + c]);
    if (normed[k]) by_z[k].terms.push_back(z[k]);
  }
  for (size_t m = 0; m < of.size(); ++m) by_z[of[m]].add(read(scale) + m * C, C, g[edge[m]]);
  return {d_p.to(p.scalar_type()), node_sums(std::move(by_z))};
}

// Of term_gradients, or of what a bank computes from norm_gradients: -> gradients by table, p, d_table, each z and each g, from
// those by the gradients of each z, w (none: 0), and of p. w_sums [K, 2, C]: sums of w and w z; g_w [M, C]: of G w for each term.
// Those w that are `spare` are overwritten: by the gradient by their z.
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> term_gradients_backward(
    const at::Tensor& table, const at::Tensor& p, const std::optional<at::Tensor>& d_table, const at::Tensor& sums,
    at::IntArrayRef of, at::IntArrayRef edge, at::IntArrayRef normed, at::TensorList z, at::TensorList g, at::TensorList w,
    at::IntArrayRef spare, const std::optional<at::Tensor>& w_sums, const std::optional<at::Tensor>& g_w, const std::optional<at::Tensor>& v_p) {
  const int64_t C = table.size(2), count = pixels(z[0]);
  const auto [scale, d_moments, d_p] = norm_gradients(table, p, d_table, sums, of, normed, count);
  auto v_moments = w_sums;
  if (w_sums) v_moments = *w_sums * at::tensor({1.0, 2.0}).unsqueeze(1);
  const auto [by_table, by_p, by_d_table, by_sums] =
      norm_gradients_backward(table, p, d_table, sums, of, normed, count, g_w, v_moments, v_p);
  const size_t E = g.size();
  std::vector<Sum> by(E + z.size());  // those by each g first, which read what the others overwrite
  for (size_t k = 0; k < w.size(); ++k) {
    for (int64_t c = 0; c < C; ++c) by[E + k].weights.push_back(2 * read(d_moments)[(2 * k + 1) * C + c]);
    by[E + k].terms.push_back(w[k]);
    if (spare[k]) by[E + k].out = w[k];
  }
  for (size_t m = 0; m < of.size(); ++m) {
    const double *total = read(by_sums) + 2 * m * C, *product = total + C;
    Sum& by_g = by[edge[m]];
    by[E + of[m]].add(product, C, g[edge[m]]);
    by_g.add(product, C, z[of[m]]);
    if (!w.empty()) by_g.add(read(scale) + m * C, C, w[of[m]]);
    by_g.shift.resize(C);
    for (int64_t c = 0; c < C; ++c) by_g.shift[c] += total[c];
  }
  auto found = node_sums(std::move(by));
  std::vector<at::Tensor> by_z(found.begin() + E, found.end());
  found.resize(E);
  return {by_table, by_p, by_d_table, by_z, found};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
  m.def("norm_tables(Tensor moments, int[] normed, Tensor p, int[] of, int count, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("norm_gradients(Tensor table, Tensor p, Tensor? d_table, Tensor sums, int[] of, int[] normed, int count) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("term_gradients(Tensor table, Tensor p, Tensor? d_table, Tensor sums, int[] of, int[] edge, int[] normed, Tensor[] z, "
        "Tensor[] g) -> (Tensor, Tensor[])");
  m.def("term_gradients_backward(Tensor table, Tensor p, Tensor? d_table, Tensor sums, int[] of, int[] edge, int[] normed, "
        "Tensor[] z, Tensor[] g, Tensor(a!)[] w, int[] spare, Tensor? w_sums, Tensor? g_w, Tensor? v_p) -> "
        "(Tensor, Tensor, Tensor, Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(ldarts, CPU, m) {
  m.impl("norm_tables", norm_tables);
  m.impl("norm_gradients", norm_gradients);
  m.impl("term_gradients", term_gradients);
  m.impl("term_gradients_backward", term_gradients_backward);
}

}  // namespace ldarts
