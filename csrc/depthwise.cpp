// The gradients of a depthwise convolution in channels-last on the CPU, where PyTorch's are slow: by the input when it is
// dilated, by the weight always.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace ldarts {
namespace {

// Along one axis: for each target pixel the (tap, source pixel) pairs that reach it.
using Taps = std::vector<std::vector<std::pair<int64_t, int64_t>>>;

struct Axis {
  int64_t in, out, taps, stride, padding, dilation;

  Axis(int64_t in, int64_t taps, int64_t stride, int64_t padding, int64_t dilation)
      : in(in), out((in + 2 * padding - dilation * (taps - 1) - 1) / stride + 1), taps(taps), stride(stride),
        padding(padding), dilation(dilation) {}

  template <typename Visit>
  void each(const Visit& visit) const {  // visit(output pixel, tap, input pixel)
    for (int64_t o = 0; o < out; ++o)
      for (int64_t k = 0; k < taps; ++k)
        if (const int64_t i = o * stride - padding + k * dilation; i >= 0 && i < in) visit(o, k, i);
  }
  Taps into_inputs() const {
    Taps result(in);
    each([&](int64_t o, int64_t k, int64_t i) { result[i].emplace_back(k, o); });
    return result;
  }
};

template <typename T>
struct Vector {
  using Type = at::vec::Vectorized<T>;
  static constexpr int64_t kSize = Type::size();
  static Type load(const T* from, int64_t count) {
    return count < kSize ? Type::loadu(from, count) : Type::loadu(from);
  }
  static void store(T* to, const Type& value, int64_t count) {
    if (count < kSize) value.store(to, static_cast<int>(count));
    else value.store(to);
  }
};

// target[n, r, q, c] = sum over the taps that reach (r, q) of weight[kh, kw, c] * source[n, row, column, c]
template <typename T>
void gather(const T* source, const T* weight, T* target, int64_t N, int64_t C, int64_t source_h, int64_t source_w,
            int64_t taps, const Taps& rows, const Taps& columns) {
  using V = Vector<T>;
  using Type = typename V::Type;
  const int64_t height = rows.size(), width = columns.size();
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / (width * C * taps * taps));
  at::parallel_for(0, N * height, grain, [&](int64_t from, int64_t to) {
    for (int64_t line = from; line < to; ++line) {
      const T* image = source + line / height * source_h * source_w * C;
      for (int64_t q = 0; q < width; ++q) {
        T* pixel = target + (line * width + q) * C;
        for (int64_t c = 0; c < C; c += V::kSize) {
          const int64_t count = std::min(V::kSize, C - c);
          Type sum(0);
          for (const auto& [kh, row] : rows[line % height])
            for (const auto& [kw, column] : columns[q])
              sum = at::vec::fmadd(V::load(weight + (kh * taps + kw) * C + c, count),
                                   V::load(image + (row * source_w + column) * C + c, count), sum);
          V::store(pixel + c, sum, count);
        }
      }
    }
  });
}

// partial[n, kh, kw, c] = sum over the outputs of grad[n, o, p, c] * x[n, row, column, c]: one image a partial sum, so that
// the order of the additions does not depend on the number of threads.
template <typename T>
void products(const T* x, const T* grad, T* partial, int64_t N, int64_t C, const Axis& h, const Axis& w) {
  using V = Vector<T>;
  using Type = typename V::Type;
  constexpr int kChains = 4;  // independent sums, to hide the latency of the additions
  at::parallel_for(0, N, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n)
      for (int64_t kh = 0; kh < h.taps; ++kh)
        for (int64_t kw = 0; kw < w.taps; ++kw) {
          const int64_t shift = kw * w.dilation - w.padding;  // input column = output column * stride + shift
          const int64_t first = shift >= 0 ? 0 : (-shift + w.stride - 1) / w.stride;
          const int64_t end = w.in <= shift ? 0 : std::min(w.out, (w.in - 1 - shift) / w.stride + 1);
          for (int64_t c = 0; c < C; c += V::kSize) {
            const int64_t count = std::min(V::kSize, C - c);
            Type sum[kChains] = {Type(0), Type(0), Type(0), Type(0)};
            for (int64_t o = 0; o < h.out; ++o) {
              const int64_t row = o * h.stride - h.padding + kh * h.dilation;
              if (row < 0 || row >= h.in) continue;
              const T* g = grad + ((n * h.out + o) * w.out) * C + c;
              const T* s = x + ((n * h.in + row) * w.in + shift) * C + c;
              int64_t p = first;
              for (; p + kChains <= end; p += kChains)
                for (int k = 0; k < kChains; ++k)
                  sum[k] = at::vec::fmadd(V::load(g + (p + k) * C, count), V::load(s + (p + k) * w.stride * C, count), sum[k]);
              for (; p < end; ++p)
                sum[0] = at::vec::fmadd(V::load(g + p * C, count), V::load(s + p * w.stride * C, count), sum[0]);
            }
            V::store(partial + ((n * h.taps + kh) * w.taps + kw) * C + c, (sum[0] + sum[1]) + (sum[2] + sum[3]), count);
          }
        }
  });
}

void check(const char* name, const at::Tensor& images, const at::Tensor& other) {
  TORCH_CHECK_VALUE(images.dim() == 4 && other.dim() == 4, "depthwise: ", name, " must have 4 dimensions");
  TORCH_CHECK_VALUE(images.scalar_type() == other.scalar_type(), "depthwise: ", name, " have dtypes ",
                    images.scalar_type(), " and ", other.scalar_type());
}

at::Tensor channels_last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

at::Tensor depthwise_input(const at::Tensor& grad, const at::Tensor& weight, at::IntArrayRef size, int64_t stride,
                           int64_t padding, int64_t dilation) {
  check("grad and weight", grad, weight);
  const int64_t K = weight.size(2), C = grad.size(1);
  const Axis h(size[0], K, stride, padding, dilation), w(size[1], K, stride, padding, dilation);
  TORCH_CHECK_VALUE(grad.size(2) == h.out && grad.size(3) == w.out && weight.size(0) == C, "depthwise: grad has shape ",
                    grad.sizes(), ", expected [N, ", weight.size(0), ", ", h.out, ", ", w.out, "]");
  const auto source = channels_last(grad), taps = weight.permute({2, 3, 1, 0}).contiguous();  // [K, K, 1, C]
  auto out = at::empty({grad.size(0), C, h.in, w.in}, grad.options().memory_format(at::MemoryFormat::ChannelsLast));
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "depthwise_input", [&] {
    gather(source.const_data_ptr<scalar_t>(), taps.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>(),
           grad.size(0), C, h.out, w.out, K, h.into_inputs(), w.into_inputs());
  });
  return out;
}

at::Tensor depthwise_weight(const at::Tensor& x, const at::Tensor& grad, int64_t taps, int64_t stride, int64_t padding,
                            int64_t dilation) {
  check("x and grad", x, grad);
  const int64_t N = x.size(0), C = x.size(1);
  const Axis h(x.size(2), taps, stride, padding, dilation), w(x.size(3), taps, stride, padding, dilation);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({N, C, h.out, w.out}), "depthwise: grad has shape ", grad.sizes(),
                    ", expected [", N, ", ", C, ", ", h.out, ", ", w.out, "]");
  const auto source = channels_last(x), g = channels_last(grad);
  auto partial = at::empty({N, taps, taps, C}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_weight", [&] {
    products(source.const_data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(), partial.mutable_data_ptr<scalar_t>(), N, C, h, w);
  });
  return partial.sum(0).permute({2, 0, 1}).unsqueeze(1).contiguous();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
  m.def("depthwise_input(Tensor grad, Tensor weight, int[2] size, int stride, int padding, int dilation) -> Tensor");
  m.def("depthwise_weight(Tensor x, Tensor grad, int taps, int stride, int padding, int dilation) -> Tensor");
}

TORCH_LIBRARY_IMPL(ldarts, CPU, m) {
  m.impl("depthwise_input", depthwise_input);
  m.impl("depthwise_weight", depthwise_weight);
}

}  // namespace ldarts
