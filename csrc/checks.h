#pragma once
// Checks of the arguments of ldarts::mixed_sum, mixed_scale and mixed_dot, part of both libraries, CPU and
// CUDA.
#include <ATen/core/Tensor.h>

namespace ldarts {

// float32, float64, bfloat16 or float16, else an error begins with `who`.
void check_dtype(const char* who, const at::Tensor& t);

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

}  // namespace ldarts
