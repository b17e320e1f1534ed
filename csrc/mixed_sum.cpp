// The fused mixed-operation sum: schema and CPU kernels. M terms t, weights w [M]:
//
//     mixed_sum(w, t)   = Σ_m w_m t_m         [N, C, H, W], or whatever shape the terms have
//     mixed_scale(g, w) = (w_m g)_m           its gradient by the terms, where g is that by the sum
//     mixed_dot(g, t)   = (<g, t_m>)_m  [M]   its gradient by the weights
//     mixed_grads(g, w, t) = mixed_dot(g, t), mixed_scale(g, w)   both, which read g once
//
// Each is the others' derivative, to any order (ldarts/mixed_sum.py).
#include "mixed_sum.h"
#include "vectors.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace ldarts {
namespace {

// Fixed, so that the partial sums of mixed_dot do not depend on the number of threads; a block of the
// accumulator stays in the L1 cache while the terms stream past it.
constexpr int64_t kBlock = 2048;
// Terms read side by side: enough to hide the accumulator's traffic, few enough for the hardware prefetchers.
constexpr int64_t kGroup = 8;

template <typename T>
struct Lanes {
  using Acc = at::opmath_type<T>;
  static constexpr int kRegisters = sizeof(Acc) / sizeof(T);
  using Vec = at::vec::VectorizedN<Acc, kRegisters>;
  static constexpr int64_t kSize = Vec::size();
  using Full = std::integral_constant<int64_t, kSize>;

  template <typename Count>
  static Vec load(const T* from, Count count) {
    using Raw = at::vec::VectorizedN<T, 1>;
    if constexpr (std::is_same_v<Count, Full>)
      return at::vec::convert<Acc, kRegisters, T, 1>(Raw::loadu(from));
    else
      return at::vec::convert<Acc, kRegisters, T, 1>(Raw::loadu(from, count));
  }
  template <typename Count>
  static void store(T* to, const Vec& vec, Count count) {
    const auto raw = at::vec::convert<T, 1, Acc, kRegisters>(vec);
    if constexpr (std::is_same_v<Count, Full>) raw.store(to);
    else raw.store(to, static_cast<int>(count));
  }
  // visit(offset, count) for each vector of `size` elements; the count is a constant but for the last one.
  template <typename Visit>
  static void each(int64_t size, const Visit& visit) {
    int64_t i = 0;
    for (; i + kSize <= size; i += kSize) visit(i, Full{});
    if (i < size) visit(i, size - i);
  }
};

// visit(begin, size, number) for each block of B of `numel` elements, each of which costs `work` reads or
// writes.
template <typename Visit>
void each_block(int64_t B, int64_t numel, int64_t work, const Visit& visit) {
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / (B * work));
  at::parallel_for(0, (numel + B - 1) / B, grain, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) visit(b * B, std::min(B, numel - b * B), b);
  });
}

template <typename T>
std::vector<const T*> pointers(at::TensorList tensors) {
  std::vector<const T*> result;
  for (const auto& t : tensors) result.push_back(t.const_data_ptr<T>());
  return result;
}

// The scale and shift of the channels repeat along the terms, which are channels-last; C = 1: whose layout is
// any. A block goes through all sums, which may read the same terms.
template <typename T>
void sum_kernel(const std::vector<ScaledSum>& sums, int64_t C, at::TensorList outs) {
  using L = Lanes<T>;
  using Acc = typename L::Acc;
  struct Job {
    std::vector<const T*> term;
    Buffer<Acc> scale, shift;  // along `repeat` elements, [terms, repeat] and [repeat]
    T* out;
  };
  const int64_t repeat = std::lcm(C, L::kSize), block = std::max<int64_t>(1, kBlock / repeat) * repeat;
  std::vector<Job> jobs;
  int64_t work = 0;
  for (size_t s = 0; s < sums.size(); ++s) {
    const ScaledSum& sum = sums[s];
    const int64_t M = sum.terms.size();
    Job& job = jobs.emplace_back();
    job.term = pointers<T>(sum.terms);
    job.scale.resize(M * repeat);
    job.shift.resize(repeat, Acc(0));
    job.out = outs[s].mutable_data_ptr<T>();
    for (int64_t i = 0; i < M * repeat; ++i) job.scale[i] = sum.scale[i / repeat * C + i % repeat % C];
    for (int64_t i = 0; i < repeat && !sum.shift.empty(); ++i) job.shift[i] = sum.shift[i % C];
    work += M;
  }
  each_block(block, outs[0].numel(), work, [&](int64_t begin, int64_t size, int64_t) {
    Buffer<Acc> acc(block);
    for (const Job& job : jobs)
      unrolled<kGroup>(job.term.size(), [&](int64_t m, auto group) {
        const bool last = m + group == static_cast<int64_t>(job.term.size());
        int64_t place = 0;
        L::each(size, [&](int64_t i, auto count) {
          auto sum = L::Vec::loadu(m == 0 ? job.shift.data() + place : acc.data() + i);
          const Acc* scale = job.scale.data() + m * repeat + place;
          for (int64_t k = 0; k < group; ++k) {
            const auto term = L::load(job.term[m + k] + begin + i, count);
            sum = at::vec::fmadd(L::Vec::loadu(scale + k * repeat), term, sum);
          }
          if (last) L::store(job.out + begin + i, sum, count);
          else sum.store(acc.data() + i);
          place = place + L::kSize == repeat ? 0 : place + L::kSize;
        });
      });
  });
}

template <typename T>
std::vector<T*> mutable_pointers(at::TensorList tensors) {
  std::vector<T*> result;
  for (const auto& t : tensors) result.push_back(t.mutable_data_ptr<T>());
  return result;
}

// outs[m] = weights[m] grad: the gradient of mixed_sum by its terms.
template <typename T>
void scale_kernel(const at::Tensor& grad, const at::Tensor& weights, at::TensorList outs) {
  using L = Lanes<T>;
  const auto* w = weights.const_data_ptr<typename L::Acc>();
  const T* g = grad.const_data_ptr<T>();
  const auto out = mutable_pointers<T>(outs);
  const int64_t M = outs.size();
  each_block(16384, grad.numel(), M, [&](int64_t begin, int64_t size, int64_t) {
    for (int64_t m = 0; m < M; ++m) {
      const typename L::Vec scale(w[m]);
      L::each(size, [&](int64_t i, auto count) {
        L::store(out[m] + begin + i, scale * L::load(g + begin + i, count), count);
      });
    }
  });
}

// out[m] = <grad, terms[m]>: the gradient of mixed_sum by its weights. With `outs` also that by its terms,
// outs[m] = weights[m] grad, in the same loop: half as long again in two on a CPU.
template <typename T>
void dot_kernel(const at::Tensor& grad, at::TensorList terms, const at::Tensor& out,
                const at::Tensor& weights = {}, at::TensorList outs = {}) {
  using L = Lanes<T>;
  using Acc = typename L::Acc;
  const int64_t M = terms.size(), numel = grad.numel();
  const auto term = pointers<T>(terms);
  const auto scaled = mutable_pointers<T>(outs);
  const Acc* w = outs.empty() ? nullptr : weights.const_data_ptr<Acc>();
  const T* g = grad.const_data_ptr<T>();
  std::vector<double> partial((numel + kBlock - 1) / kBlock * M);
  each_block(kBlock, numel, outs.empty() ? M : 2 * M, [&](int64_t begin, int64_t size, int64_t b) {
    unrolled<kGroup>(M, [&](int64_t m, auto group) {
      typename L::Vec sums[group];
      for (auto& sum : sums) sum = typename L::Vec(0);
      L::each(size, [&](int64_t i, auto count) {
        const auto grads = L::load(g + begin + i, count);
        for (int64_t k = 0; k < group; ++k)
          sums[k] = at::vec::fmadd(grads, L::load(term[m + k] + begin + i, count), sums[k]);
        for (int64_t k = 0; k < group && w; ++k)
          L::store(scaled[m + k] + begin + i, typename L::Vec(w[m + k]) * grads, count);
      });
      for (int64_t k = 0; k < group; ++k) {
        Acc lanes[L::kSize];
        sums[k].store(lanes);
        for (Acc lane : lanes) partial[b * M + m + k] += lane;
      }
    });
  });
  std::vector<double> total(M);
  for (size_t i = 0; i < partial.size(); ++i) total[i % M] += partial[i];
  std::copy(total.begin(), total.end(), out.mutable_data_ptr<Acc>());
}

#define DISPATCH(dtype, kernel, ...)                                              \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, dtype, #kernel, [&] { \
    kernel<scalar_t>(__VA_ARGS__);                                                \
  })

std::vector<double> doubles(const at::Tensor& t) {
  const auto wide = t.to(at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

at::Tensor mixed_sum(const at::Tensor& weights, at::TensorList terms) {
  const auto format = check_terms(terms);
  const auto w = check_weights(weights, terms.size(), terms[0]);
  auto out = at::empty_like(terms[0], terms[0].options().memory_format(format));
  DISPATCH(out.scalar_type(), sum_kernel, {{doubles(w), {}, terms.vec()}}, 1, out);
  return out;
}

std::vector<at::Tensor> mixed_scale(const at::Tensor& grad, const at::Tensor& weights) {
  check_dtype("mixed_scale: grad", grad);
  const auto w = check_weights(weights, weights.numel(), grad);
  const auto g = grad.contiguous(dense_format(grad));
  std::vector<at::Tensor> outs;
  for (int64_t m = 0; m < w.numel(); ++m) outs.push_back(at::empty_like(g));
  DISPATCH(g.scalar_type(), scale_kernel, g, w, outs);
  return outs;
}

at::Tensor empty_dots(const at::Tensor& grad, int64_t count) {
  return at::empty({count}, grad.options().dtype(at::toOpMathType(grad.scalar_type())));
}

at::Tensor mixed_dot(const at::Tensor& grad, at::TensorList terms) {
  const auto g = check_grad(grad, terms[0], check_terms(terms));
  const auto out = empty_dots(g, terms.size());
  DISPATCH(g.scalar_type(), dot_kernel, g, terms, out);
  return out;
}

std::tuple<at::Tensor, std::vector<at::Tensor>> mixed_grads(const at::Tensor& grad, const at::Tensor& weights,
                                                            at::TensorList terms) {
  const auto g = check_grad(grad, terms[0], check_terms(terms));
  const auto w = check_weights(weights, terms.size(), g);
  const auto out = empty_dots(g, terms.size());
  std::vector<at::Tensor> scaled;
  for (size_t m = 0; m < terms.size(); ++m) scaled.push_back(at::empty_like(g));
  DISPATCH(g.scalar_type(), dot_kernel, g, terms, out, w, scaled);
  return {out, scaled};
}

}  // namespace

std::vector<at::Tensor> scaled_sums(std::vector<ScaledSum> sums) {
  constexpr auto format = at::MemoryFormat::ChannelsLast;
  std::vector<at::Tensor> result, outs;
  std::vector<ScaledSum> with_terms;
  for (ScaledSum& sum : sums) {
    result.push_back(at::empty({0}));
    if (sum.terms.empty()) continue;
    for (at::Tensor& t : sum.terms) t = t.contiguous(format);
    check_terms(sum.terms);
    const auto options = sum.terms[0].options().memory_format(format);
    result.back() = sum.out.defined() ? sum.out : at::empty_like(sum.terms[0], options);
    outs.push_back(result.back());
    with_terms.push_back(std::move(sum));
  }
  if (!with_terms.empty()) DISPATCH(outs[0].scalar_type(), sum_kernel, with_terms, outs[0].size(1), outs);
  return result;
}

TORCH_LIBRARY(ldarts, m) {
  m.def("mixed_sum(Tensor weights, Tensor[] terms) -> Tensor");
  m.def("mixed_scale(Tensor grad, Tensor weights) -> Tensor[]");
  m.def("mixed_dot(Tensor grad, Tensor[] terms) -> Tensor");
  m.def("mixed_grads(Tensor grad, Tensor weights, Tensor[] terms) -> (Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(ldarts, CPU, m) {
  m.impl("mixed_sum", mixed_sum);
  m.impl("mixed_scale", mixed_scale);
  m.impl("mixed_dot", mixed_dot);
  m.impl("mixed_grads", mixed_grads);
}

}  // namespace ldarts
