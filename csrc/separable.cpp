// The operators of a group of separable convolutions on the CPU: all pairs of a depthwise and a pointwise
// convolution that leave one state, in one call. Formulas and kernels: separable_kernels.h; gradients:
// ldarts/fused/separable.py.
//
// Images are dealt to chunks with a sum each, whatever the number of threads: the same bits always.
#include "separable_kernels.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace ldarts {
namespace {

// 8, and for large batches one for 4 images: as many threads as there are chunks can work.
int64_t chunks_of(int64_t images) { return std::min(images, std::max<int64_t>(8, images / 4)); }

// run(chunk, image, state of the thread) for all images, those of a chunk in order; make() -> the state.
template <typename Make, typename Run>
void each_image(int64_t images, const Make& make, const Run& run) {
  const int64_t chunks = chunks_of(images);
  at::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    auto state = make();
    for (int64_t chunk = from; chunk < to; ++chunk)
      for (int64_t n = chunk; n < images; n += chunks) run(chunk, n, state);
  });
}

// The sum over the first dimension, in order.
template <typename T>
at::Tensor sum_of_chunks(const at::Tensor& parts) {
  const auto result = parts[0].clone();
  const int64_t size = result.numel();
  T* sum = write<T>(result);
  at::parallel_for(0, size, at::internal::GRAIN_SIZE, [&](int64_t from, int64_t to) {
    for (int64_t chunk = 1; chunk < parts.size(0); ++chunk) {
      const T* part = read<T>(parts) + chunk * size;
      for (int64_t i = from; i < to; ++i) sum[i] += part[i];
    }
  });
  return result;
}

at::Tensor zero_sums(at::IntArrayRef shape) { return at::zeros(shape, at::dtype(at::kDouble)); }

Tensors channels_last(at::TensorList tensors) {
  Tensors result;
  for (const auto& t : tensors)
    result.push_back(t.defined() ? t.contiguous(at::MemoryFormat::ChannelsLast) : t);
  return result;
}

// x: in channels-last
void check(at::TensorList x, at::TensorList depthwise, at::TensorList pointwise, at::IntArrayRef dilations) {
  const size_t U = depthwise.size();
  const bool as_many = U == pointwise.size() && U == dilations.size() && (x.size() == 1 || x.size() == U);
  TORCH_CHECK_VALUE(U > 0 && as_many, "separable convolutions: ", x.size(), " inputs, ", U, " depthwise and ",
                    pointwise.size(), " pointwise weights, ", dilations.size(),
                    " dilations; expected as many of each, or one input");
  check_terms("separable convolutions", x);
  const int64_t C = x[0].size(1);
  const auto dtype = x[0].scalar_type();
  for (size_t u = 0; u < U; ++u) {
    const at::Tensor &d = depthwise[u], &p = pointwise[u];
    const int64_t k = d.size(-1);
    TORCH_CHECK_VALUE(d.sizes() == at::IntArrayRef({C, 1, k, k}) && k % 2 == 1 && d.scalar_type() == dtype,
                      "separable convolutions: depthwise weight ", u, " has shape ", d.sizes(), " and dtype ",
                      d.scalar_type(), ", expected [", C, ", 1, k, k] with an odd k and ", dtype);
    TORCH_CHECK_VALUE(p.sizes() == at::IntArrayRef({C, C, 1, 1}) && p.scalar_type() == dtype,
                      "separable convolutions: pointwise weight ", u, " has shape ", p.sizes(), " and dtype ",
                      p.scalar_type(), ", expected [", C, ", ", C, ", 1, 1] and ", dtype);
  }
}

// For each pair z = P D relu(s x + b), [N, C, out_h, out_w], channels-last; the sums of z and z z, [U, 2, C].
std::tuple<Tensors, at::Tensor> separable_forward(
    at::TensorList x, const std::optional<at::Tensor>& affine, at::TensorList depthwise,
    at::TensorList pointwise, int64_t stride, at::IntArrayRef dilations) {
  const auto xs = channels_last(x);
  check(xs, depthwise, pointwise, dilations);
  Tensors zs;
  at::Tensor z_sums;
  AT_DISPATCH_FLOATING_TYPES(x[0].scalar_type(), "separable_forward", [&] {
    using T = scalar_t;
    const Group<T> group(xs, {}, affine, depthwise, pointwise, stride, dilations, true, false);
    const int64_t U = group.pairs.size();
    const auto options = x[0].options().memory_format(at::MemoryFormat::ChannelsLast);
    std::vector<T*> z;
    for (int64_t u = 0; u < U; ++u) {
      zs.push_back(at::empty({group.N, group.C, group.out_h, group.out_w}, options));
      z.push_back(write<T>(zs.back()));
    }
    z_sums = zero_sums({chunks_of(group.N), U, 2, group.C});
    double* sums = write<double>(z_sums);
    each_image(
        group.N, [&] { return Forward<T>{group, z}; },
        [&](int64_t chunk, int64_t n, Forward<T>& pass) { pass.image(n, sums + chunk * U * 2 * group.C); });
  });
  return {zs, sum_of_chunks<double>(z_sums)};
}

// For the gradient by a weight [C, 1, k, k] or [C, C, 1, 1], whose numbers lie in one order in both layouts.
// With the strides of the weight it need not be copied before an optimizer's step.
at::Tensor empty_gradient(const at::Tensor& weight) {
  return at::empty(weight.sizes(), weight.options().memory_format(weight.suggest_memory_format()));
}

// The gradients by x, affine and the weights, from those by z itself (grad_z), by the terms of a node that
// are made of the last pairs (grad_terms; scale [U, C]), and by z_sums. With a tangent, or with a weight
// replaced by its tangent: the derivatives of these gradients.
//
// -> lists, empty where not asked for: if need_grad_x, grad_x, as many as x, and, if there is an affine,
// grad_affine, one [U, 2, C]; if need_grad_weights, grad_depthwise and grad_pointwise; if need_tangent_z,
// which needs them, tangent_z = P D a and tangent_sums, one [U, 3, C] of z', z' z and z' G.
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> separable_backward(
    at::TensorList x, at::TensorList tangent, const std::optional<at::Tensor>& affine,
    at::TensorList depthwise, at::TensorList pointwise, int64_t stride, at::IntArrayRef dilations,
    at::TensorList z, const c10::List<std::optional<at::Tensor>>& grad_z, at::TensorList grad_terms,
    const at::Tensor& scale, const at::Tensor& of_z, bool need_grad_x, bool need_grad_weights,
    bool need_tangent_z) {
  Tensors given;
  for (const std::optional<at::Tensor>& t : grad_z) given.push_back(t.value_or(at::Tensor()));
  const auto xs = channels_last(x), tangents = channels_last(tangent), zs = channels_last(z);
  check(xs, depthwise, pointwise, dilations);
  const auto grad_zs = channels_last(given), grads = channels_last(grad_terms);
  const auto dtype = x[0].scalar_type();
  const auto scales = scale.to(dtype).contiguous(), by_sums = of_z.to(dtype).contiguous();
  const int64_t U = depthwise.size(), C = x[0].size(1), chunks = chunks_of(x[0].size(0));
  const int64_t first_term = U - static_cast<int64_t>(grads.size());

  Tensors grad_x, grad_depthwise, grad_pointwise, tangent_z;
  at::Tensor input_sums, tangent_sums;  // of each chunk
  AT_DISPATCH_FLOATING_TYPES(dtype, "separable_backward", [&] {
    using T = scalar_t;
    const Group<T> group(xs, tangents, affine, depthwise, pointwise, stride, dilations, need_tangent_z, true);
    at::Tensor depthwise_sums, pointwise_sums;  // of each chunk
    if (need_grad_x) {
      for (const auto& t : xs) grad_x.push_back(at::empty_like(t));
      if (affine) input_sums = zero_sums({chunks, U, 2, C});
    }
    if (need_grad_weights) {
      pointwise_sums = at::zeros({chunks, U, C, group.width}, x[0].options());
      depthwise_sums = at::zeros({chunks, group.taps, group.pattern}, x[0].options());
    }
    if (need_tangent_z) {
      for (const auto& t : zs) tangent_z.push_back(at::empty_like(t));
      tangent_sums = zero_sums({chunks, U, 3, C});
    }
    std::vector<PairGrads<T>> of_pair(U);
    for (int64_t u = 0; u < U; ++u) {
      const bool shared = grad_x.size() == 1;
      of_pair[u].z = read<T>(zs[u]);
      of_pair[u].grad_z = read<T>(grad_zs[u]);
      of_pair[u].grad_term = u >= first_term ? read<T>(grads[u - first_term]) : nullptr;
      of_pair[u].scale = read<T>(scales) + u * C;
      of_pair[u].of_z = read<T>(by_sums) + 2 * u * C;
      of_pair[u].grad_x = need_grad_x ? write<T>(grad_x[shared ? 0 : u]) : nullptr;
      of_pair[u].add = shared && u > 0;
      of_pair[u].tangent_z = need_tangent_z ? write<T>(tangent_z[u]) : nullptr;
    }
    auto of_chunk = [&](auto* sums, const at::Tensor& all, int64_t chunk) {
      return sums ? sums + chunk * all.stride(0) : nullptr;
    };
    each_image(
        group.N, [&] { return Backward<T>{group, of_pair}; },
        [&](int64_t chunk, int64_t n, Backward<T>& pass) {
          pass.image(n, {of_chunk(write<double>(input_sums), input_sums, chunk),
                         of_chunk(write<T>(depthwise_sums), depthwise_sums, chunk),
                         of_chunk(write<T>(pointwise_sums), pointwise_sums, chunk),
                         of_chunk(write<double>(tangent_sums), tangent_sums, chunk)});
        });
    if (need_grad_weights) {
      depthwise_sums = sum_of_chunks<T>(depthwise_sums);
      pointwise_sums = sum_of_chunks<T>(pointwise_sums);
      for (int64_t u = 0; u < U; ++u) {
        grad_depthwise.push_back(empty_gradient(depthwise[u]));
        grad_pointwise.push_back(empty_gradient(pointwise[u]));
        const Pair<T>& pair = group.pairs[u];
        write_weights(group, pair, read<T>(depthwise_sums) + pair.first_tap * group.pattern,
                      read<T>(pointwise_sums) + u * C * group.width, write<T>(grad_depthwise[u]),
                      write<T>(grad_pointwise[u]));
      }
    }
  });
  auto finish = [](const at::Tensor& sums) -> Tensors {
    if (!sums.defined()) return {};
    return {sum_of_chunks<double>(sums)};
  };
  return {grad_x, finish(input_sums), grad_depthwise, grad_pointwise, tangent_z, finish(tangent_sums)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
  m.def("separable_forward(Tensor[] x, Tensor? affine, Tensor[] depthwise, Tensor[] pointwise, "
        "int stride, int[] dilations) -> (Tensor[] z, Tensor z_sums)",
        torch::dispatch(at::kCPU, separable_forward));
  m.def("separable_backward(Tensor[] x, Tensor[] tangent, Tensor? affine, Tensor[] depthwise, "
        "Tensor[] pointwise, int stride, int[] dilations, Tensor[] z, Tensor?[] grad_z, Tensor[] grad_terms, "
        "Tensor scale, Tensor of_z, bool need_grad_x, bool need_grad_weights, bool need_tangent_z) -> "
        "(Tensor[] grad_x, Tensor[] grad_affine, Tensor[] grad_depthwise, Tensor[] grad_pointwise, "
        "Tensor[] tangent_z, Tensor[] tangent_sums)",
        torch::dispatch(at::kCPU, separable_backward));
}

}  // namespace ldarts
