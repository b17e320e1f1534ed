// Sums of tensors: schemas and CPU kernels. Two operators, each the other's derivative (fused/sums.py):
//
//     affine_sums    y_j = Σ_e s_e z_e + t_e   over entries e of the sum j; s, t per channel or one number
//     channel_sums   Σ x and Σ x y             per channel, of each pair, in float64
//
// and mixed_sum(w, t) = Σ_m w_m t_m, a call of the first with one number a term.
#include "checks.h"
#include "vectors.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace ldarts {
namespace {

using Tensors = std::vector<at::Tensor>;

// A block of the accumulator stays in the L1 cache while the terms stream past it.
constexpr int64_t kBlock = 2048;
// Terms read side by side: enough to hide the accumulator's traffic, few enough for the hardware prefetchers.
constexpr int64_t kGroup = 8;
// Parts of a channel's sum, whatever the number of threads: the same bits always.
constexpr int64_t kChunks = 8;

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

// Σ scale term + shift over the entries of one sum, with C numbers each, which repeat along a term or, if
// there are `images`, along each image of it: C = 1, or the channels of channels-last terms.
struct Sum {
  std::vector<at::Tensor> terms;
  std::vector<double> scale, shift;  // [terms, images, C] and, added up, [images, C]
};

template <typename T>
void sum_kernel(const std::vector<Sum>& sums, int64_t images, int64_t C, const Tensors& outs) {
  using L = Lanes<T>;
  using Acc = typename L::Acc;
  struct Job {
    std::vector<const T*> term;
    Buffer<Acc> scale, shift;  // along `repeat` elements, [images, terms, repeat] and [images, repeat]
    T* out;
  };
  const int64_t repeat = std::lcm(C, L::kSize), block = std::max<int64_t>(1, kBlock / repeat) * repeat;
  std::vector<Job> jobs;
  int64_t work = 0;  // reads of one element
  for (size_t s = 0; s < sums.size(); ++s) {
    const Sum& sum = sums[s];
    const int64_t M = sum.terms.size();
    Job& job = jobs.emplace_back();
    for (const auto& t : sum.terms) job.term.push_back(t.const_data_ptr<T>());
    job.scale.resize(images * M * repeat);
    job.shift.resize(images * repeat);
    job.out = outs[s].mutable_data_ptr<T>();
    for (int64_t n = 0; n < images; ++n) {
      fill_pattern(job.shift.data() + n * repeat, repeat, sum.shift.data() + n * C, 1, C);
      for (int64_t m = 0; m < M; ++m)
        fill_pattern(job.scale.data() + (n * M + m) * repeat, repeat, sum.scale.data() + (m * images + n) * C,
                     1, C);
    }
    work += M;
  }
  // A block goes through all sums, which may read the same terms.
  const int64_t size = outs[0].numel() / std::max<int64_t>(1, images), blocks = (size + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / (block * work));
  at::parallel_for(0, images * blocks, grain, [&](int64_t from, int64_t to) {
    Buffer<Acc> acc(block);
    for (int64_t b = from; b < to; ++b) {
      const int64_t n = b / blocks, first = b % blocks * block, begin = n * size + first;
      for (const Job& job : jobs) {
        const int64_t M = job.term.size();
        unrolled<kGroup>(M, [&](int64_t m, auto group) {
          const bool last = m + group == M;
          int64_t place = 0;
          L::each(std::min(block, size - first), [&](int64_t i, auto count) {
            auto sum = L::Vec::loadu(m == 0 ? job.shift.data() + n * repeat + place : acc.data() + i);
            const Acc* scale = job.scale.data() + (n * M + m) * repeat + place;
            for (int64_t k = 0; k < group; ++k) {
              const auto term = L::load(job.term[m + k] + begin + i, count);
              sum = at::vec::fmadd(L::Vec::loadu(scale + k * repeat), term, sum);
            }
            if (last) L::store(job.out + begin + i, sum, count);
            else sum.store(acc.data() + i);
            place = place + L::kSize == repeat ? 0 : place + L::kSize;
          });
        });
      }
    }
  });
}

// Rows of C numbers, one tensor after the other, in float64.
std::vector<double> rows_of(at::TensorList tensors) {
  std::vector<double> rows;
  for (const auto& t : tensors)
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, t.scalar_type(), "rows_of", [&] {
      const auto dense = t.contiguous();
      const auto* numbers = dense.const_data_ptr<scalar_t>();
      rows.insert(rows.end(), numbers, numbers + dense.numel());
    });
  return rows;
}

Tensors affine_sums(at::TensorList z, at::TensorList scales, at::TensorList shifts,
                    at::IntArrayRef z_of_entry, at::IntArrayRef scale_of_entry,
                    at::IntArrayRef shift_of_entry, at::IntArrayRef entries) {
  const Entries checked(z, scales, shifts, z_of_entry, scale_of_entry, shift_of_entry, entries);
  const int64_t numbers = checked.numbers;
  const auto scale = rows_of(scales), shift = rows_of(shifts);
  std::vector<Sum> sums;
  Tensors outs;
  int64_t e = 0;
  for (const int64_t count : entries) {
    Sum& sum = sums.emplace_back(Sum{{}, {}, std::vector<double>(numbers)});
    for (int64_t end = e + count; e < end; ++e) {
      sum.terms.push_back(checked.z[z_of_entry[e]]);
      for (int64_t c = 0; c < numbers; ++c) {
        sum.scale.push_back(scale_of_entry[e] < 0 ? 1 : scale[scale_of_entry[e] * numbers + c]);
        if (shift_of_entry[e] >= 0) sum.shift[c] += shift[shift_of_entry[e] * numbers + c];
      }
    }
    outs.push_back(at::empty_like(checked.z[0], checked.z[0].options().memory_format(checked.format)));
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, outs[0].scalar_type(), "affine_sums", [&] {
    sum_kernel<scalar_t>(sums, checked.images, numbers / checked.images, outs);
  });
  return outs;
}

// Per channel the sums of x and of x y are added to sums [2, C]; an image of `size` elements, in sums of kRun
// vectors of the accumulator's type. Less one pixel of y, `shift`, products stay as small as the deviations
// from a mean far from 0: Σ x y = Σ x (y - shift) + shift Σ x, and where x is y both factors are shifted.
template <typename T>
void add_channel_sums(const T* x, const T* y, int64_t size, int64_t C, double* sums) {
  using L = Lanes<T>;
  constexpr int64_t kRun = 32, V = L::kSize;
  const int64_t pattern = std::lcm(C, V);
  for (int64_t place = 0; place < std::min(pattern, size); place += V) {
    const auto less = L::load(y + place, std::min(V, size - place));
    typename L::Acc shift[V];
    less.store(shift);
    for (int64_t run = place; run < size; run += kRun * pattern) {
      typename L::Vec sum(0), product(0);
      int64_t whole = 0, i = run;
      for (; whole < kRun && i + V <= size; ++whole, i += pattern) {
        const auto xs = L::load(x + i, typename L::Full{});
        const auto one = x == y ? xs - less : xs;
        sum = sum + one;
        product = at::vec::fmadd(one, x == y ? one : L::load(y + i, typename L::Full{}) - less, product);
      }
      typename L::Acc part[2][V];
      sum.store(part[0]);
      product.store(part[1]);
      const int64_t count = x == y ? whole : 0, first = place % C;
      auto add = [&](int64_t v, int64_t c) {
        add_shifted_sums(part[0][v], part[1][v], shift[v], count, sums[c], sums[C + c]);
      };
      if (first + V <= C)  // a loop that the compiler makes vectors of
        for (int64_t v = 0; v < V; ++v) add(v, first + v);
      else
        for (int64_t v = 0; v < V; ++v) add(v, (first + v) % C);
      for (; whole < kRun && i < size; ++whole, i += pattern)  // less than a vector, at the end
        for (int64_t v = 0; i + v < size; ++v) {
          const int64_t c = (place + v) % C;
          const double one = static_cast<double>(x[i + v]);
          sums[c] += one;
          sums[C + c] += one * static_cast<double>(y[i + v]);
        }
    }
  }
}

at::Tensor channel_sums(at::TensorList x, at::TensorList y) {
  const Tensors all = checked_pairs(x, y);
  const int64_t pairs = x.size(), N = all[0].size(0), C = all[0].size(1), chunks = std::min(kChunks, N);
  const int64_t image = all[0].numel() / std::max<int64_t>(1, N);
  const auto parts = at::zeros({std::max<int64_t>(1, chunks), pairs, 2, C}, at::dtype(at::kDouble));
  double* sums = parts.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, all[0].scalar_type(), "channel_sums", [&] {
    using T = scalar_t;
    at::parallel_for(0, chunks * pairs, 1, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const T* one = all[item % pairs].const_data_ptr<T>();
        const T* other = all[pairs + item % pairs].const_data_ptr<T>();
        for (int64_t n = item / pairs; n < N; n += chunks)
          add_channel_sums(one + n * image, other + n * image, image, C, sums + item * 2 * C);
      }
    });
  });
  return parts.sum(0);
}

at::Tensor mixed_sum(const at::Tensor& weights, at::TensorList terms) {
  check_terms("mixed_sum", terms);
  check_weights(weights, terms.size(), terms[0]);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ldarts::affine_sums", "")
                             .typed<decltype(affine_sums)>();
  std::vector<int64_t> all(terms.size());
  std::iota(all.begin(), all.end(), 0);
  const std::vector<int64_t> none(terms.size(), -1);
  return op.call(terms, weights, {}, all, all, none, static_cast<int64_t>(terms.size()))[0];
}

}  // namespace

TORCH_LIBRARY(ldarts, m) {
  m.def("affine_sums(Tensor[] z, Tensor[] scales, Tensor[] shifts, int[] z_of_entry, int[] scale_of_entry, "
        "int[] shift_of_entry, int[] entries) -> Tensor[]");
  m.def("channel_sums(Tensor[] x, Tensor[] y) -> Tensor");
  m.def("mixed_sum(Tensor weights, Tensor[] terms) -> Tensor");
}

TORCH_LIBRARY_IMPL(ldarts, CPU, m) {
  m.impl("affine_sums", affine_sums);
  m.impl("channel_sums", channel_sums);
}

TORCH_LIBRARY_IMPL(ldarts, CompositeImplicitAutograd, m) { m.impl("mixed_sum", mixed_sum); }

}  // namespace ldarts
