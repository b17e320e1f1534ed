#include "checks.h"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <sstream>
#include <string>

namespace ldarts {

template <typename Value>
static void check_equal(bool equal, const char* who, int64_t m, const char* what, const Value& want,
                        const Value& got) {
  TORCH_CHECK_VALUE(equal, who, ": term ", m, " has ", what, " ", got, ", expected ", want);
}

static std::string name(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

static std::string layout(const at::Tensor& t) {
  if (t.is_contiguous()) return "contiguous";
  if (t.is_contiguous(at::MemoryFormat::ChannelsLast)) return "channels-last";
  std::ostringstream strides;
  strides << "strides " << t.strides();
  return strides.str();
}

static bool supported(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat || dtype == at::kDouble;
}

at::MemoryFormat check_terms(const char* who, at::TensorList terms) {
  TORCH_CHECK_VALUE(!terms.empty(), who, ": expected at least one term");
  const at::Tensor& first = terms[0];
  TORCH_CHECK_VALUE(supported(first), who, ": term 0 has dtype ", name(first.scalar_type()),
                    ", expected float32, float64, bfloat16 or float16");
  bool contiguous = true, channels_last = true;
  for (size_t m = 0; m < terms.size(); ++m) {
    const at::Tensor& t = terms[m];
    check_equal(t.sizes() == first.sizes(), who, m, "shape", first.sizes(), t.sizes());
    check_equal(t.scalar_type() == first.scalar_type(), who, m, "dtype", name(first.scalar_type()),
                name(t.scalar_type()));
    check_equal(t.device() == first.device(), who, m, "device", first.device(), t.device());
    contiguous = contiguous && t.is_contiguous();
    channels_last = channels_last && t.is_contiguous(at::MemoryFormat::ChannelsLast);
    TORCH_CHECK_VALUE(contiguous || channels_last, who, ": term ", m, " has memory format ", layout(t),
                      ", expected ", m == 0 ? "contiguous or channels-last" : layout(first));
  }
  return contiguous ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

void check_weights(const at::Tensor& weights, int64_t count, const at::Tensor& like) {
  TORCH_CHECK_VALUE(supported(weights), "mixed_sum: weights have dtype ", name(weights.scalar_type()),
                    ", expected float32, float64, bfloat16 or float16");
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == count, "mixed_sum: weights have shape ",
                    weights.sizes(), ", expected [", count, "], one for each term");
  TORCH_CHECK_VALUE(weights.device() == like.device(), "mixed_sum: weights have device ", weights.device(),
                    ", expected ", like.device());
  TORCH_CHECK_VALUE(weights.element_size() >= like.element_size(), "mixed_sum: weights have dtype ",
                    name(weights.scalar_type()), ", expected ", name(like.scalar_type()), " or wider");
}

// How many rows of `numbers` there are; the first tensor with a row says how many numbers a row has.
static int64_t count_rows(const char* what, at::TensorList tensors, at::TensorList terms, int64_t& numbers) {
  int64_t rows = 0;
  for (const auto& t : tensors) {
    const int64_t width = t.dim() == 2 ? t.size(1) : 1;
    TORCH_CHECK_VALUE(t.dim() == 1 || (t.dim() == 2 && width > 0), "affine_sums: ", what, " have shape ",
                      t.sizes(), ", expected [rows] or [rows, C]");
    if (numbers == 0) numbers = width;
    TORCH_CHECK_VALUE(width == numbers, "affine_sums: ", what, " have ", width, " numbers a row, expected ",
                      numbers);
    TORCH_CHECK_VALUE(terms.empty() || t.device() == terms[0].device(), "affine_sums: ", what,
                      " have device ", t.device(), ", expected ", terms[0].device());
    rows += t.size(0);
  }
  return rows;
}

Entries::Entries(at::TensorList terms, at::TensorList scales, at::TensorList shifts,
                 at::IntArrayRef z_of_entry, at::IntArrayRef scale_of_entry, at::IntArrayRef shift_of_entry,
                 at::IntArrayRef entries) {
  int64_t width = 0, count = 0;
  const int64_t rows = count_rows("scales", scales, terms, width);
  const int64_t shift_rows = count_rows("shifts", shifts, terms, width);
  for (const int64_t of_sum : entries) {
    TORCH_CHECK_VALUE(of_sum > 0, "affine_sums: a sum has no entry");
    count += of_sum;
  }
  const int64_t E = z_of_entry.size();
  TORCH_CHECK_VALUE(!entries.empty() && count == E && E == static_cast<int64_t>(scale_of_entry.size()) &&
                        E == static_cast<int64_t>(shift_of_entry.size()),
                    "affine_sums: ", entries.size(), " sums of ", count, " entries; ", E, " z, ",
                    scale_of_entry.size(), " scales and ", shift_of_entry.size(), " shifts are given");
  for (int64_t e = 0; e < E; ++e)
    TORCH_CHECK_VALUE(0 <= z_of_entry[e] && z_of_entry[e] < static_cast<int64_t>(terms.size()) &&
                          scale_of_entry[e] < rows && shift_of_entry[e] < shift_rows,
                      "affine_sums: entry ", e, " is of z ", z_of_entry[e], ", scale ", scale_of_entry[e],
                      " and shift ", shift_of_entry[e], "; there are ", terms.size(), ", ", rows, " and ",
                      shift_rows);
  numbers = std::max<int64_t>(1, width);
  const at::Tensor& first = terms[0];
  if (numbers > 1 && first.dim() == 4 && numbers == first.size(0) * first.size(1)) images = first.size(0);
  for (const auto& t : terms) {
    TORCH_CHECK_VALUE(numbers == 1 || (t.dim() == 4 && t.size(1) * images == numbers),
                      "affine_sums: a term has shape ", t.sizes(), ", expected [N, ", numbers / images,
                      ", H, W]");
    z.push_back(numbers > 1 ? t.contiguous(at::MemoryFormat::ChannelsLast) : t);
  }
  format = check_terms("affine_sums", z);
  if (numbers > 1) format = at::MemoryFormat::ChannelsLast;
}

Tensors checked_pairs(at::TensorList x, at::TensorList y) {
  TORCH_CHECK_VALUE(!x.empty() && x.size() == y.size(), "channel_sums: ", x.size(), " tensors and ", y.size(),
                    " to multiply them by");
  TORCH_CHECK_VALUE(x[0].dim() == 4, "channel_sums: a tensor has shape ", x[0].sizes(),
                    ", expected [N, C, H, W]");
  Tensors all;
  for (const auto& t : x) all.push_back(t.contiguous(at::MemoryFormat::ChannelsLast));
  for (size_t k = 0; k < y.size(); ++k)
    all.push_back(y[k].is_same(x[k]) ? all[k] : y[k].contiguous(at::MemoryFormat::ChannelsLast));
  check_terms("channel_sums", all);
  return all;
}

}  // namespace ldarts
