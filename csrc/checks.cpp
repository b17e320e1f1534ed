#include "checks.h"

#include <ATen/OpMathType.h>
#include <c10/core/ScalarType.h>

#include <sstream>
#include <string>

namespace ldarts {

template <typename Value>
static void check_equal(bool equal, const char* who, int64_t m, const char* what, const Value& want,
                        const Value& got) {
  TORCH_CHECK_VALUE(equal, who, m, " has ", what, " ", got, ", expected ", want);
}

static std::string name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

static std::string layout(const at::Tensor& t) {
  if (t.is_contiguous()) return "contiguous";
  if (t.is_contiguous(at::MemoryFormat::ChannelsLast)) return "channels-last";
  std::ostringstream strides;
  strides << "strides " << t.strides();
  return strides.str();
}

void check_dtype(const char* who, const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  const bool half = dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_VALUE(half || dtype == at::kFloat || dtype == at::kDouble, who, " has dtype ", name(dtype),
                    ", expected float32, float64, bfloat16 or float16");
}

at::MemoryFormat check_terms(at::TensorList terms) {
  TORCH_CHECK_VALUE(!terms.empty(), "mixed_sum: expected at least one term");
  const at::Tensor& first = terms[0];
  check_dtype("mixed_sum: term 0", first);
  bool contiguous = true, channels_last = true;
  for (size_t m = 0; m < terms.size(); ++m) {
    const at::Tensor& t = terms[m];
    const char* who = "mixed_sum: term ";
    check_equal(t.sizes() == first.sizes(), who, m, "shape", first.sizes(), t.sizes());
    check_equal(t.scalar_type() == first.scalar_type(), who, m, "dtype", name(first.scalar_type()),
                name(t.scalar_type()));
    check_equal(t.device() == first.device(), who, m, "device", first.device(), t.device());
    const bool is_contiguous = contiguous && t.is_contiguous();
    const bool is_channels_last = channels_last && t.is_contiguous(at::MemoryFormat::ChannelsLast);
    TORCH_CHECK_VALUE(is_contiguous || is_channels_last, who, m, " has memory format ", layout(t),
                      ", expected ", m == 0 ? "contiguous or channels-last" : layout(first));
    contiguous = is_contiguous;
    channels_last = is_channels_last;
  }
  return contiguous ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

at::Tensor check_weights(const at::Tensor& weights, int64_t count, const at::Tensor& like) {
  check_dtype("mixed_sum: weights", weights);
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == count, "mixed_sum: weights have shape ",
                    weights.sizes(), ", expected [", count, "], one for each term");
  TORCH_CHECK_VALUE(weights.device() == like.device(), "mixed_sum: weights have device ", weights.device(),
                    ", expected ", like.device());
  TORCH_CHECK_VALUE(weights.element_size() >= like.element_size(), "mixed_sum: weights have dtype ",
                    name(weights.scalar_type()), ", expected ", name(like.scalar_type()), " or wider");
  return weights.to(at::toOpMathType(like.scalar_type())).contiguous();
}

at::Tensor check_grad(const at::Tensor& grad, const at::Tensor& like, at::MemoryFormat format) {
  TORCH_CHECK_VALUE(grad.sizes() == like.sizes(), "mixed_sum: grad has shape ", grad.sizes(), ", expected ",
                    like.sizes());
  TORCH_CHECK_VALUE(grad.scalar_type() == like.scalar_type(), "mixed_sum: grad has dtype ",
                    name(grad.scalar_type()), ", expected ", name(like.scalar_type()));
  TORCH_CHECK_VALUE(grad.device() == like.device(), "mixed_sum: grad has device ", grad.device(),
                    ", expected ", like.device());
  return grad.contiguous(format);
}

at::MemoryFormat dense_format(const at::Tensor& grad) {
  const bool channels_last = !grad.is_contiguous() && grad.is_contiguous(at::MemoryFormat::ChannelsLast);
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

}  // namespace ldarts
