#pragma once
// What follows from sums per channel, for the batch norms behind some z: their statistics, and the gradients
// through them. Plain pointers, for the CPU (norms.cpp) and for CUDA (sums_kernels.cuh). Computed in float64,
// because S2/n - μ² has a relative error of (μ/σ)² 1e-16; CUDA keeps r, μ and the coefficients in p's type.
// "The gradient by x" is that with respect to x.
//
// A term m is p_m (z - μ) r + β_m of one of K tensors z [N, C, H, W], k = z_of_term[m], with r = 1/σ and μ of
// its batch norm, or 1 and 0 where it has none. p_m is one number, or, as the γ of a norm, one for each
// channel. All formulas are per channel; n counts the pixels.
//
//     z_sums [norms, 2, C]       S1 = Σ z,  S2 = Σ z²:  μ = S1/n,  v = S2/n - μ²
//     rstd_mean [K, 2, C]        r = 1 / sqrt(v + eps),  μ
//     moments [K, 2, C]          of the running statistics: μ, v n / (n - 1)
//     coefficients [M, 2, C]     the term is shift + scale z:  shift = β - p r μ,  scale = p r
//     grad_sums [M, 2, C]        A = Σ G,  B = Σ G z, with G [N, C, H, W] the gradient by the term: the
//                                gradients by its shift and its scale
//
// grad_rstd_mean [K, 2, C] is the gradient by rstd_mean of whatever else reads it: gradients alone do,
// so there is one only where gradients are differentiated.
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
  for (int m = 0; m < map.M; ++m) {
    if (z_of_term[m] < 0 || z_of_term[m] >= map.K)
      throw std::invalid_argument("normalised sums: a term of a z that is not given");
    map.z_of_term[m] = static_cast<int16_t>(z_of_term[m]);
  }
  for (int k = 0; k < map.K; ++k) map.norm_of_z[k] = has_norm[k] ? norms++ : -1;
  return map;
}

struct Moments { double mean, var, rstd; };

// Row m of p is p + m * width: one number, or C.
template <typename P>
struct TermWeights {
  const P* p;
  int64_t width;

  LDARTS_BOTH double operator()(int64_t m, int64_t c) const { return p[m * width + (width > 1 ? c : 0)]; }
};

// P: the type of p and of what follows from it.
template <typename P>
struct NormStatistics {
  static constexpr bool kHasGradientByP = false;
  TermMap map;
  int64_t C, count;  // of pixels
  double eps;
  const double* z_sums;
  TermWeights<P> p;
  const P* beta;  // [M, C], or null: 0
  P *rstd_mean, *moments, *coefficients;

  LDARTS_BOTH Moments moments_of(int64_t k, int64_t c) const {
    if (map.norm_of_z[k] < 0) return {0, 0, 1};
    const double* sums = z_sums + 2 * map.norm_of_z[k] * C + c;
    const double mean = sums[0] / count, rounded = sums[C] / count - mean * mean;
    const double var = rounded < 0 ? 0 : rounded;  // NaN stays NaN
    return {mean, var, 1 / sqrt(var + eps)};
  }
  LDARTS_BOTH void write_of_z(int64_t k, int64_t c) const {
    const Moments of_k = moments_of(k, c);
    rstd_mean[2 * k * C + c] = of_k.rstd;
    rstd_mean[(2 * k + 1) * C + c] = moments[2 * k * C + c] = of_k.mean;
    moments[(2 * k + 1) * C + c] = of_k.var * count / (count > 1 ? count - 1 : 1);
  }
  LDARTS_BOTH void write_of_term(int64_t m, int64_t c) const {
    const Moments of_k = moments_of(map.z_of_term[m], c);
    const double scale = p(m, c) * of_k.rstd;
    coefficients[2 * m * C + c] = (beta ? beta[m * C + c] : 0) - scale * of_k.mean;
    coefficients[(2 * m + 1) * C + c] = scale;
  }
};

struct TwoNumbers { double first, second; };

// The gradients through the norms.
template <typename P>
struct NormGradients {
  static constexpr bool kHasGradientByP = true;
  TermMap map;
  int64_t C, count;
  const P* rstd_mean;
  TermWeights<P> p;
  const P* grad_rstd_mean;  // may be null: 0
  const double* grad_sums;
  P *scale, *of_z, *by_p;  // results: [M, C], [K, 2, C], as p

  LDARTS_BOTH double rstd(int64_t k, int64_t c) const { return rstd_mean[2 * k * C + c]; }
  LDARTS_BOTH double mean(int64_t k, int64_t c) const { return rstd_mean[(2 * k + 1) * C + c]; }
  LDARTS_BOTH double sum(int64_t m, int64_t c) const { return grad_sums[2 * m * C + c]; }  // A
  LDARTS_BOTH double centred(int64_t m, int64_t c) const {  // B - μ A = Σ G (z - μ)
    return grad_sums[(2 * m + 1) * C + c] - mean(map.z_of_term[m], c) * sum(m, c);
  }
  LDARTS_BOTH double scale_of(int64_t m, int64_t c) const { return p(m, c) * rstd(map.z_of_term[m], c); }

  // by r: grad_r + Σ_m p (B - μ A),  by μ: grad_μ - Σ_m p r A    over the terms m of the z
  LDARTS_BOTH TwoNumbers by_rstd_mean_of(int64_t k, int64_t c) const {
    TwoNumbers by = {0, 0};
    if (grad_rstd_mean) by = {grad_rstd_mean[2 * k * C + c], grad_rstd_mean[(2 * k + 1) * C + c]};
    for (int m = 0; m < map.M; ++m) {
      if (map.z_of_term[m] != k) continue;
      by.first += p(m, c) * centred(m, c);
      by.second -= scale_of(m, c) * sum(m, c);
    }
    return by;
  }

  // With by_v = -r³/2 by_r, the gradient by the variance:
  //
  //     by z: Σ_m p r G + of_z[0] + of_z[1] z     [N, C, H, W], over the terms m of the z
  //     of_z = (by_μ - 2 μ by_v) / n, 2 by_v / n  the gradients by S1 and, twice, by S2; 0 without a norm
  LDARTS_BOTH void write_of_z(int64_t k, int64_t c) const {
    TwoNumbers by_sums = {0, 0};
    if (map.norm_of_z[k] >= 0) {
      const TwoNumbers by = by_rstd_mean_of(k, c);
      const double r = rstd(k, c), by_var = -0.5 * r * r * r * by.first;
      by_sums = {(by.second - 2 * mean(k, c) * by_var) / count, 2 * by_var / count};
    }
    of_z[2 * k * C + c] = by_sums.first;
    of_z[(2 * k + 1) * C + c] = by_sums.second;
  }
  LDARTS_BOTH void write_of_term(int64_t m, int64_t c) const { scale[m * C + c] = scale_of(m, c); }

  // by p: r (B - μ A); by one number for all channels, their sum
  LDARTS_BOTH double share_of_p(int64_t m, int64_t c) const {
    return rstd(map.z_of_term[m], c) * centred(m, c);
  }
};

// The derivative of NormGradients: the gradients by its inputs, from those by its results, scale' [M, C],
// of_z' [K, 2, C] and p' (as p), of which any may be null: 0. With the names from above, R and U are
// by_rstd_mean_of, V = -r³/2 R is by_v, D = B - μ A is centred. Where z has a norm (else U' = V' = R' = 0),
//
//     U' = of_z'[0] / n,   V' = 2 (of_z'[1] - μ of_z'[0]) / n,   R' = -r³/2 V'
//
// and for each term, with D' = r p' + p R' and S' = scale' - A U',
//
//     by r: Σ_m (D p' + p S') - 3/2 r² R V'     by μ: -Σ_m A D' - 2 V of_z'[0] / n
//     by p: D R' + r S'     by A: -p r U' - μ D'     by B: D'     by grad_rstd_mean: R', U'
template <typename P>
struct NormDerivatives : NormGradients<P> {
  const double *grad_scale, *grad_of_z;
  TermWeights<P> grad_p;      // its p may be null
  P *by_rstd_mean, *by_grad;  // [K, 2, C]; the latter by grad_rstd_mean
  double* by_sums;            // [M, 2, C]

  LDARTS_BOTH double grad_of_z_of(int64_t k, int which, int64_t c) const {
    return grad_of_z && this->map.norm_of_z[k] >= 0 ? grad_of_z[(2 * k + which) * this->C + c] : 0;
  }
  LDARTS_BOTH double grad_v(int64_t k, int64_t c) const {
    return 2 * (grad_of_z_of(k, 1, c) - this->mean(k, c) * grad_of_z_of(k, 0, c)) / this->count;
  }
  LDARTS_BOTH TwoNumbers grad_r_u(int64_t k, int64_t c) const {
    const double r = this->rstd(k, c);
    return {-0.5 * r * r * r * grad_v(k, c), grad_of_z_of(k, 0, c) / this->count};
  }
  LDARTS_BOTH double grad_p_of(int64_t m, int64_t c) const { return grad_p.p ? grad_p(m, c) : 0; }
  LDARTS_BOTH double grad_centred(int64_t m, int64_t c) const {
    const int64_t k = this->map.z_of_term[m];
    return this->rstd(k, c) * grad_p_of(m, c) + this->p(m, c) * grad_r_u(k, c).first;
  }
  LDARTS_BOTH double grad_scale_of(int64_t m, int64_t c) const {
    const double by_scale = grad_scale ? grad_scale[m * this->C + c] : 0;
    return by_scale - this->sum(m, c) * grad_r_u(this->map.z_of_term[m], c).second;
  }
  LDARTS_BOTH void write_of_z(int64_t k, int64_t c) const {
    const double r = this->rstd(k, c), by_r = this->by_rstd_mean_of(k, c).first;
    const double by_v = -0.5 * r * r * r * by_r;
    TwoNumbers by = {-1.5 * r * r * by_r * grad_v(k, c), -2 * by_v * grad_of_z_of(k, 0, c) / this->count};
    for (int m = 0; m < this->map.M; ++m) {
      if (this->map.z_of_term[m] != k) continue;
      by.first += this->centred(m, c) * grad_p_of(m, c) + this->p(m, c) * grad_scale_of(m, c);
      by.second -= this->sum(m, c) * grad_centred(m, c);
    }
    const TwoNumbers of_grad = grad_r_u(k, c);
    const int64_t first = 2 * k * this->C + c, second = first + this->C;
    by_rstd_mean[first] = by.first, by_rstd_mean[second] = by.second;
    by_grad[first] = of_grad.first, by_grad[second] = of_grad.second;
  }
  LDARTS_BOTH void write_of_term(int64_t m, int64_t c) const {
    const int64_t k = this->map.z_of_term[m];
    const double centred = grad_centred(m, c), grad_u = grad_r_u(k, c).second;
    by_sums[2 * m * this->C + c] = -this->scale_of(m, c) * grad_u - this->mean(k, c) * centred;
    by_sums[(2 * m + 1) * this->C + c] = centred;
  }
  LDARTS_BOTH double share_of_p(int64_t m, int64_t c) const {
    const int64_t k = this->map.z_of_term[m];
    return this->centred(m, c) * grad_r_u(k, c).first + this->rstd(k, c) * grad_scale_of(m, c);
  }
};

}  // namespace ldarts
