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

// A block of the accumulator stays in the L1 cache while the terms stream past it.
constexpr int64_t kBlock = 2048;
// Terms read side by side: enough to hide the accumulator's traffic, few enough for the hardware prefetchers.
constexpr int64_t kGroup = 8;
// Parts of a channel's sum, whatever the number of threads: the same bits always.
constexpr int64_t kChunks = 8;

// Elements as vectors of the type in which they are summed, float32 or wider, and back.
template <typename T> using Acc = at::opmath_type<T>;
template <typename T> constexpr int kRegisters = sizeof(Acc<T>) / sizeof(T);
template <typename T> using Wide = at::vec::VectorizedN<Acc<T>, kRegisters<T>>;

// Count: Constant<kV<T>>, or of fewer elements.
template <typename T, typename Count>
Wide<T> load_wide(const T* from, Count count) {
  constexpr bool whole = std::is_same_v<Count, Constant<kV<T>>>;
  const auto narrow = whole ? Vec<T>::loadu(from) : Vec<T>::loadu(from, count);
  return at::vec::convert<Acc<T>, kRegisters<T>, T, 1>(narrow);
}
template <typename T, typename Count>
void store_narrow(T* to, const Wide<T>& values, Count count) {
  const Vec<T> narrow = at::vec::convert<T, 1, Acc<T>, kRegisters<T>>(values);
  if constexpr (std::is_same_v<Count, Constant<kV<T>>>) narrow.store(to);
  else narrow.store(to, static_cast<int>(count));
}

// One sum, Σ scale term + shift over its entries; its numbers repeat along a term or, if there are `images`,
// along each image of it.
template <typename T>
struct Sum {
  std::vector<const T*> terms;
  Buffer<Acc<T>> scale, shift;  // patterns of `repeat` elements, [images, terms, repeat] and [images, repeat]
  T* out;
};

// images: that have numbers of their own; size: elements of an image
template <typename T>
void compute_sums(const std::vector<Sum<T>>& sums, int64_t images, int64_t size, int64_t repeat) {
  const int64_t block = std::max<int64_t>(1, kBlock / repeat) * repeat, blocks = (size + block - 1) / block;
  int64_t work = 0;  // reads of one element
  for (const auto& sum : sums) work += sum.terms.size();
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / (block * work));
  // A block goes through all sums, which may read the same terms.
  at::parallel_for(0, images * blocks, grain, [&](int64_t from, int64_t to) {
    Buffer<Acc<T>> acc(block);
    for (int64_t b = from; b < to; ++b) {
      const int64_t n = b / blocks, first = b % blocks * block, begin = n * size + first;
      for (const auto& sum : sums) {
        const int64_t M = sum.terms.size();
        unrolled<kGroup>(M, [&](int64_t m, auto group) {
          const bool last = m + group == M;
          const Acc<T>* scales = sum.scale.data() + (n * M + m) * repeat;
          each_vector<T>(std::min(block, size - first), repeat, [&](int64_t i, int64_t place, auto count) {
            auto acc_of_i = Wide<T>::loadu(m == 0 ? sum.shift.data() + n * repeat + place : acc.data() + i);
            for (int64_t k = 0; k < group; ++k) {
              const auto term = load_wide(sum.terms[m + k] + begin + i, count);
              acc_of_i = at::vec::fmadd(Wide<T>::loadu(scales + k * repeat + place), term, acc_of_i);
            }
            if (last) store_narrow(sum.out + begin + i, acc_of_i, count);
            else acc_of_i.store(acc.data() + i);
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
  const int64_t images = checked.images, numbers = checked.numbers, C = numbers / images;
  const auto scale = rows_of(scales), shift = rows_of(shifts);
  const std::vector<double> ones(numbers, 1);
  const at::Tensor& like = checked.z[0];
  Tensors outs;
  for (size_t j = 0; j < entries.size(); ++j)
    outs.push_back(at::empty_like(like, like.options().memory_format(checked.format)));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, like.scalar_type(), "affine_sums", [&] {
    using T = scalar_t;
    const int64_t repeat = std::lcm(C, kV<T>);
    std::vector<Sum<T>> sums;
    int64_t first = 0;
    for (size_t j = 0; j < outs.size(); first += entries[j++]) {
      const int64_t M = entries[j];
      Sum<T>& sum = sums.emplace_back();
      sum.out = outs[j].mutable_data_ptr<T>();
      sum.scale.resize(images * M * repeat);
      sum.shift.resize(images * repeat);
      std::vector<double> total(numbers);
      for (int64_t m = 0; m < M; ++m) {
        const int64_t e = first + m, of_scale = scale_of_entry[e], of_shift = shift_of_entry[e];
        sum.terms.push_back(checked.z[z_of_entry[e]].const_data_ptr<T>());
        const double* row = of_scale < 0 ? ones.data() : scale.data() + of_scale * numbers;
        for (int64_t n = 0; n < images; ++n)
          fill_pattern(sum.scale.data() + (n * M + m) * repeat, repeat, row + n * C, 1, C);
        for (int64_t c = 0; c < numbers && of_shift >= 0; ++c) total[c] += shift[of_shift * numbers + c];
      }
      for (int64_t n = 0; n < images; ++n)
        fill_pattern(sum.shift.data() + n * repeat, repeat, total.data() + n * C, 1, C);
    }
    compute_sums(sums, images, like.numel() / std::max<int64_t>(1, images), repeat);
  });
  return outs;
}

// Per channel the sums of x and of x y are added to sums [2, C]; an image of `size` elements, in sums of kRun
// vectors of the accumulator's type. Less one pixel of y, `shift`, products stay as small as the deviations
// from a mean far from 0: Σ x y = Σ x (y - shift) + shift Σ x, and where x is y both factors are shifted.
template <typename T>
void add_channel_sums(const T* x, const T* y, int64_t size, int64_t C, double* sums) {
  constexpr int64_t kRun = 32, V = kV<T>;
  constexpr Constant<V> whole_vector{};
  const int64_t pattern = std::lcm(C, V);
  for (int64_t place = 0; place < std::min(pattern, size); place += V) {
    const auto less = load_wide(y + place, std::min(V, size - place));
    Acc<T> shift[V];
    less.store(shift);
    for (int64_t run = place; run < size; run += kRun * pattern) {
      Wide<T> sum(0), product(0);
      int64_t whole = 0, i = run;
      for (; whole < kRun && i + V <= size; ++whole, i += pattern) {
        const auto xs = load_wide(x + i, whole_vector);
        const auto one = x == y ? xs - less : xs;
        sum = sum + one;
        product = at::vec::fmadd(one, x == y ? one : load_wide(y + i, whole_vector) - less, product);
      }
      Acc<T> part[2][V];
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
        "int[] shift_of_entry, int[] entries) -> Tensor[]",
        torch::dispatch(at::kCPU, affine_sums));
  m.def("channel_sums(Tensor[] x, Tensor[] y) -> Tensor",
        torch::dispatch(at::kCPU, channel_sums));
  m.def("mixed_sum(Tensor weights, Tensor[] terms) -> Tensor", mixed_sum);  // for every device
}

}  // namespace ldarts
