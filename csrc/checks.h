#pragma once
// Checks of the arguments of the operators, part of both libraries, CPU and CUDA, and pointers to what they
// hold. An error names the argument, the property, what was expected and what was found.
#include <ATen/core/Tensor.h>

#include <vector>

namespace ldarts {

using Tensors = std::vector<at::Tensor>;

// Null where the tensor is undefined.
template <typename T>
const T* read(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <typename T>
T* write(const at::Tensor& t) { return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; }

// Terms: at least one, float32, float64, bfloat16 or float16, all of one shape, dtype, device and memory
// format (dense: contiguous or channels-last). Returns that format, Contiguous or ChannelsLast; a tensor that
// is both, as with C == 1 or H == W == 1, goes with the rest. Every term is then one dense array of
// terms[0].numel() elements, in the same order. Errors begin with `who`.
at::MemoryFormat check_terms(const char* who, at::TensorList terms);

// `weights` is floating-point, [count], on the device of `like` and not narrower than it.
void check_weights(const at::Tensor& weights, int64_t count, const at::Tensor& like);

// The arguments of affine_sums. With one number a row, z of any dense format; with C numbers, one for each
// channel, or N C, one for each image and channel, z [N, C, H, W], brought into channels-last.
struct Entries {
  Tensors z;
  int64_t numbers = 1;  // of a row of scales and shifts: 1, C or N C
  int64_t images = 1;   // that have numbers of their own: N or 1
  at::MemoryFormat format;

  Entries(at::TensorList z, at::TensorList scales, at::TensorList shifts, at::IntArrayRef z_of_entry,
          at::IntArrayRef scale_of_entry, at::IntArrayRef shift_of_entry, at::IntArrayRef entries);
};

// The arguments of channel_sums, [N, C, H, W] of one shape and dtype, in channels-last: all x, then all y.
// Where x is y, both are one tensor.
Tensors checked_pairs(at::TensorList x, at::TensorList y);

}  // namespace ldarts
