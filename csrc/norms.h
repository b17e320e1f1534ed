#pragma once
// What follows from sums per channel, for the batch norms behind some z: their statistics, the gradients
// through them and the derivatives of these gradients. Plain pointers, for the CPU (norms.cpp) and for CUDA
// (normalised_sum_kernels.cuh). All in float64: a difference below loses (μ/σ)² units of 1e-16.
//
// A term m of a node is p_m (z - μ) r of one of K tensors z [N, C, H, W], k = z_of_term[m], with r = 1/σ and
// μ those of its batch norm, or 1 and 0 where it has none. All formulas are per channel; n counts the pixels.
//
//     z_sums [norms, 2, C]       S1 = Σ z,  S2 = Σ z²;  mean_var [K, 2, C]: μ = S1/n,  v = S2/n - μ²
//     rstd_mean [K, 2, C]        r = 1 / sqrt(v + eps),  μ
//     scale_shift [2, M, C]      the term is scale z + shift:  scale = p r,  shift = -p r μ
//     grad_sums [M, 2, C]        A = Σ G,  B = Σ G z, with G [N, C, H, W] the gradient by the term
//
// grad_rstd_mean [K, 2, C] is the gradient by rstd_mean of whatever else reads it (the pair behind a norm).
#include <cmath>
#include <cstdint>
#include <stdexcept>

#ifdef __CUDACC__
#define LDARTS_BOTH __host__ __device__ inline
#else
#define LDARTS_BOTH inline
#endif

namespace ldarts {

constexpr int kMaxNormed = 384;  // terms, and z, of one call: they travel by value with a CUDA launch

// Which z a term reads, and the place of the norm of a z among those that have one (-1: none).
struct TermMap {
  int16_t z_of_term[kMaxNormed], norm_of_z[kMaxNormed];
  int K, M;
};

template <typename Numbers>
TermMap term_map(const Numbers& z_of_term, const Numbers& has_norm) {
  if (z_of_term.size() > kMaxNormed || has_norm.size() > kMaxNormed)
    throw std::invalid_argument("normalised sums: more than 384 operations leave one state; LDARTS_FUSED=off "
                                "computes without them");
  TermMap map{{}, {}, static_cast<int>(has_norm.size()), static_cast<int>(z_of_term.size())};
  int16_t norms = 0;
  for (int m = 0; m < map.M; ++m) map.z_of_term[m] = static_cast<int16_t>(z_of_term[m]);
  for (int k = 0; k < map.K; ++k) map.norm_of_z[k] = has_norm[k] ? norms++ : -1;
  return map;
}

struct Moments { double mean, var, rstd; };

// P: the type of p and of what follows from it.
template <typename P>
struct NormStatistics {
  TermMap map;
  int64_t C, count;  // of pixels
  double eps;
  const double* z_sums;
  const P* p;
  P *rstd_mean, *mean_var, *scale_shift;

  LDARTS_BOTH Moments moments(int64_t k, int64_t c) const {
    if (map.norm_of_z[k] < 0) return {0, 0, 1};
    const double* sums = z_sums + 2 * map.norm_of_z[k] * C + c;
    const double mean = sums[0] / count, found = sums[C] / count - mean * mean, var = found < 0 ? 0 : found;
    return {mean, var, 1 / sqrt(var + eps)};
  }
  LDARTS_BOTH void of_z(int64_t k, int64_t c) const {
    const Moments found = moments(k, c);
    rstd_mean[2 * k * C + c] = found.rstd;
    rstd_mean[(2 * k + 1) * C + c] = mean_var[2 * k * C + c] = found.mean;
    mean_var[(2 * k + 1) * C + c] = found.var;
  }
  LDARTS_BOTH void of_term(int64_t m, int64_t c) const {
    const Moments found = moments(map.z_of_term[m], c);
    const double scale = p[m] * found.rstd;
    scale_shift[m * C + c] = scale;
    scale_shift[(map.M + m) * C + c] = -scale * found.mean;
  }
};

struct TwoNumbers { double first, second; };

// The gradients through the norms, and their derivatives; what a pointer below may be null for is 0.
template <typename P>
struct NormGradients {
  TermMap map;
  int64_t C, count;
  const P *rstd_mean, *p, *grad_rstd_mean;  // the last may be null
  const double* grad_sums;

  // In the derivative the gradients by scale, S1, S2 and p are tangents of these: s', S1', S2' and p'. With
  // z' the gradient by the gradient by z, S1' = Σ z', S2' = 2 Σ z' z, s' = Σ G z'.
  const double* tangent_sums;       // [K, 2, C], Σ z' and Σ z' z; may be null
  const double* tangent_scale;      // of term m and channel c at m * tangent_scale_step + c; may be null
  int64_t tangent_scale_step;
  const P* tangent_p;               // [M]; may be null

  LDARTS_BOTH double rstd(int64_t k, int64_t c) const { return rstd_mean[2 * k * C + c]; }
  LDARTS_BOTH double mean(int64_t k, int64_t c) const { return rstd_mean[(2 * k + 1) * C + c]; }
  LDARTS_BOTH double sum(int64_t m, int64_t c) const { return grad_sums[2 * m * C + c]; }  // A
  LDARTS_BOTH double centred(int64_t m, int64_t c) const {  // B - μ A = Σ G (z - μ)
    return grad_sums[(2 * m + 1) * C + c] - mean(map.z_of_term[m], c) * sum(m, c);
  }
  LDARTS_BOTH double scale(int64_t m, int64_t c) const { return p[m] * rstd(map.z_of_term[m], c); }

  // by r: grad_r + Σ_m p (B - μ A),  by μ: grad_μ - Σ_m p r A    over the terms m of the z
  LDARTS_BOTH TwoNumbers by_rstd_mean(int64_t k, int64_t c) const {
    double by_rstd = 0, by_mean = 0;
    if (grad_rstd_mean) {
      by_rstd = grad_rstd_mean[2 * k * C + c];
      by_mean = grad_rstd_mean[(2 * k + 1) * C + c];
    }
    for (int m = 0; m < map.M; ++m) {
      if (map.z_of_term[m] != k) continue;
      by_rstd += p[m] * centred(m, c);
      by_mean -= scale(m, c) * sum(m, c);
    }
    return {by_rstd, by_mean};
  }

  // With by_v = -r³/2 by_r, the gradient by the variance:
  //
  //     by S1: (by_μ - 2 μ by_v) / n,   by S2: by_v / n    (0 without a norm)
  //     by z:  Σ_m p r G + by_S1 + 2 by_S2 z               [N, C, H, W], over the terms m of the z
  LDARTS_BOTH TwoNumbers by_z_sums(int64_t k, int64_t c) const {
    if (map.norm_of_z[k] < 0) return {0, 0};
    const TwoNumbers by = by_rstd_mean(k, c);
    const double r = rstd(k, c), by_var = -0.5 * r * r * r * by.first;
    return {(by.second - 2 * mean(k, c) * by_var) / count, by_var / count};
  }

  // by p: Σ_c r (B - μ A)
  LDARTS_BOTH double by_p(int64_t m, int64_t c) const { return rstd(map.z_of_term[m], c) * centred(m, c); }

  // μ' = S1' / n,  v' = S2' / n - 2 μ μ',  r' = -r³/2 v'    of each z; 0 without a norm
  LDARTS_BOTH double mean_tangent(int64_t k, int64_t c) const {
    return tangent_sums && map.norm_of_z[k] >= 0 ? tangent_sums[2 * k * C + c] / count : 0;
  }
  LDARTS_BOTH double var_tangent(int64_t k, int64_t c) const {
    if (!tangent_sums || map.norm_of_z[k] < 0) return 0;
    return 2 * (tangent_sums[(2 * k + 1) * C + c] - mean(k, c) * tangent_sums[2 * k * C + c]) / count;
  }
  LDARTS_BOTH double rstd_tangent(int64_t k, int64_t c) const {  // and the derivative by grad_r
    const double r = rstd(k, c);
    return -0.5 * r * r * r * var_tangent(k, c);
  }
  LDARTS_BOTH double p_tangent(int64_t m) const { return tangent_p ? static_cast<double>(tangent_p[m]) : 0; }

  // s' - A μ'
  LDARTS_BOTH double by_scale(int64_t m, int64_t c) const {
    const double given = tangent_scale ? tangent_scale[m * tangent_scale_step + c] : 0;
    return given - sum(m, c) * mean_tangent(map.z_of_term[m], c);
  }

  // by B: p r' + p' r =: B',  by A: -p r μ' - μ B'          of each term
  LDARTS_BOTH TwoNumbers derivative_by_grad_sums(int64_t m, int64_t c) const {
    const int64_t k = map.z_of_term[m];
    const double by_product = p[m] * rstd_tangent(k, c) + p_tangent(m) * rstd(k, c);
    return {-scale(m, c) * mean_tangent(k, c) - mean(k, c) * by_product, by_product};
  }

  // by p: Σ_c (B - μ A) r' + r (s' - A μ')
  LDARTS_BOTH double derivative_by_p(int64_t m, int64_t c) const {
    const int64_t k = map.z_of_term[m];
    return centred(m, c) * rstd_tangent(k, c) + rstd(k, c) * by_scale(m, c);
  }

  // by r: -3/2 r² by_r v' + Σ_m p' (B - μ A) + p (s' - A μ')
  // by μ: r³ by_r μ' - Σ_m A B'
  LDARTS_BOTH TwoNumbers derivative_by_rstd_mean(int64_t k, int64_t c) const {
    TwoNumbers by = {0, 0};
    if (map.norm_of_z[k] >= 0) {
      const double r = rstd(k, c), by_rstd = by_rstd_mean(k, c).first;
      by = {-1.5 * r * r * by_rstd * var_tangent(k, c), r * r * r * by_rstd * mean_tangent(k, c)};
    }
    for (int m = 0; m < map.M; ++m) {
      if (map.z_of_term[m] != k) continue;
      by.first += p_tangent(m) * centred(m, c) + p[m] * by_scale(m, c);
      by.second -= sum(m, c) * derivative_by_grad_sums(m, c).second;
    }
    return by;
  }
};

}  // namespace ldarts
