#pragma once
// Argument checks shared by the CPU and the CUDA kernels of ldarts::mixed_sum, mixed_scale and mixed_dot, and
// sums of tensors on the CPU.
#include <ATen/ATen.h>

#include <vector>

namespace ldarts {

// Terms: at least one, all of one shape, dtype, device and memory format (dense: contiguous or
// channels-last), else an error names the term's index, the property, what was expected and what was found.
// Returns the common memory format (Contiguous or ChannelsLast; a tensor that is both, as with C == 1 or
// H == W == 1, goes with the rest). Empty tensors pass. Every term is then one dense array of
// terms[0].numel() elements, in the same order.
at::MemoryFormat check_terms(at::TensorList terms);

// `weights` is floating-point, [count], on the device of `like` and not narrower than it; returned contiguous
// in the accumulation type (float64 for float64 terms, else float32).
at::Tensor check_weights(const at::Tensor& weights, int64_t count, const at::Tensor& like);

// `grad` has the terms' shape, dtype and device; returned dense in `format` (a copy only where it is not).
at::Tensor check_grad(const at::Tensor& grad, const at::Tensor& like, at::MemoryFormat format);

// The dense format that mixed_scale and its gradients keep: channels-last where `grad` is, else contiguous.
at::MemoryFormat dense_format(const at::Tensor& grad);

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
