#pragma once
// Sums of tensors on the CPU.
#include "checks.h"

#include <ATen/ATen.h>

#include <vector>

namespace ldarts {

// Σ_m scale[m, c] terms[m] + shift[c] of each channel c; terms [N, C, H, W], scale [terms, C], shift [C]
// (empty: 0).
struct ScaledSum {
  std::vector<double> scale, shift;
  std::vector<at::Tensor> terms;
  at::Tensor out = {};  // undefined: a new tensor. A term may be overwritten that no later sum reads

  void add(const double* scale_of_term, int64_t C, const at::Tensor& term) {
    scale.insert(scale.end(), scale_of_term, scale_of_term + C);
    terms.push_back(term);
  }
};

// Sums over tensors of one shape and dtype, on the CPU, channels-last, without derivatives; for one of no
// terms a tensor of size 0.
std::vector<at::Tensor> scaled_sums(std::vector<ScaledSum> sums);

}  // namespace ldarts
