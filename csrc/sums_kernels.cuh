// Device code of the sums, and the plans that launch it. Tensors are channels-last, [pixels, C]; arithmetic
// per channel is that of norms.h. Not yet run on a GPU.
//
// Nothing is added atomically: sums over pixels are those of blocks, written side by side, and sums of these
// in a fixed order, so that the bits depend on sizes and alignment alone.
#pragma once
#include "packs.cuh"

namespace ldarts {

constexpr int kRun = 16;  // pixels whose sum is float32

// A block's threads over the channels of some pixels: `width` of them, each with a pack of L channels, go
// along a pixel, `rows` pixels are side by side; threads that are left over do nothing. Where a pixel is
// longer than a block, it has several tiles.
struct Layout {
  int64_t pixels;
  int C, packs, width, rows, tiles;

  Layout(int64_t pixels, int C, int lanes)
      : pixels(pixels), C(C), packs(C / lanes), width(std::min(packs, kThreads)), rows(kThreads / width),
        tiles((packs + width - 1) / width) {}

  __device__ int row() const { return static_cast<int>(threadIdx.x) / width; }
  __device__ int pack(int tile) const { return tile * width + static_cast<int>(threadIdx.x) % width; }
  __device__ bool active(int tile) const { return row() < rows && pack(tile) < packs; }
};

// partial[slab, pair] [2, C] = the slab's share of Σ x and Σ x y; slabs: groups of pixels, a block each.
template <typename T>
struct ChannelSumsArgs {
  Layout layout;
  const T* x[kMaxPairs];
  const T* y[kMaxPairs];
  double* partial;
  int slabs, pairs;
};

// What is summed is x (y - s) and x, and where x is y (x - s)² and x - s, with s the first pixel of y:
// products stay as small as the deviations from a mean far from 0, which norms.h subtracts. Sums of kRun
// pixels are of type Acc<T>, those of the sums float64. With float32 they are off by at most kRun 2^-24
// Σ |x (y - s)|: the variance of z by a part of 3e-6 (1 + (s - μ)²/σ²) at most, however far μ is from 0.
template <typename T, int L>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(const __grid_constant__ ChannelSumsArgs<T> a) {
  constexpr int kAtOnce = kFlight / 2;
  const Layout& layout = a.layout;
  const int pair = blockIdx.x % a.pairs, tile = blockIdx.x / a.pairs % layout.tiles;
  const int slab = blockIdx.x / a.pairs / layout.tiles;
  const int channels = layout.width * L;  // of a tile
  double* shared = shared_memory;         // [2, rows, channels]
  if (layout.active(tile)) {
    const int64_t c = layout.pack(tile) * L;
    const T *x = a.x[pair] + c, *y = a.y[pair] + c;
    const bool same = x == y;
    const Pack<T, L> first = load<L>(y);
    double sum[L] = {}, product[L] = {};
    int64_t count = 0;
    const int64_t step = layout.rows, slab_step = static_cast<int64_t>(a.slabs) * kRun * step;
    for (int64_t from = slab * kRun * step + layout.row(); from < layout.pixels; from += slab_step) {
      Acc<T> run_sum[L] = {}, run_product[L] = {};
      for (int i = 0; i < kRun; i += kAtOnce) {
        Pack<T, L> xs[kAtOnce], ys[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int64_t pixel = from + (i + k) * step;
          if (pixel >= layout.pixels) continue;
          xs[k] = load<L>(x + pixel * layout.C);
          if (!same) ys[k] = load<L>(y + pixel * layout.C);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (from + (i + k) * step >= layout.pixels) continue;
          ++count;
#pragma unroll
          for (int l = 0; l < L; ++l) {
            const Acc<T> one = same ? xs[k][l] - first[l] : xs[k][l];
            run_sum[l] += one;
            run_product[l] += one * (same ? one : ys[k][l] - first[l]);
          }
        }
      }
#pragma unroll
      for (int l = 0; l < L; ++l) {
        sum[l] += run_sum[l];
        product[l] += run_product[l];
      }
    }
    const int place = layout.row() * channels + static_cast<int>(threadIdx.x) % layout.width * L;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const double s = first[l], all = same ? sum[l] + count * s : sum[l];
      shared[place + l] = all;
      shared[layout.rows * channels + place + l] = product[l] + s * (same ? sum[l] + all : all);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * channels; i += kThreads) {
    const int which = i / channels, c = tile * channels + i % channels;
    if (c >= layout.C) continue;
    double total = 0;
    for (int row = 0; row < layout.rows; ++row)
      total += shared[(which * layout.rows + row) * channels + i % channels];
    a.partial[((static_cast<int64_t>(slab) * a.pairs + pair) * 2 + which) * layout.C + c] = total;
  }
}

// out[i] = sum of partial[slab, i], i < size
struct SumSlabsArgs {
  const double* partial;
  double* out;
  int64_t size;
  int slabs;
};

constexpr int kColumns = 16;  // results of a block

__global__ void __launch_bounds__(kThreads) sum_slabs_kernel(const __grid_constant__ SumSlabsArgs a) {
  double* shared = shared_memory;  // [kThreads]
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  double sum = 0;
  if (i < a.size) {
#pragma unroll 8
    for (int slab = threadIdx.x / kColumns; slab < a.slabs; slab += kThreads / kColumns)
      sum += a.partial[slab * a.size + i];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kColumns || i >= a.size) return;
  for (int k = kColumns; k < kThreads; k += kColumns) sum += shared[threadIdx.x + k];
  a.out[i] = sum;
}

// The blocks in front of the others: one a term for the gradient by p, where that is one number.
template <typename Norms>
LDARTS_BOTH int blocks_for_p(const Norms& a) {
  return Norms::kHasGradientByP && a.p.width == 1 ? a.map.M : 0;
}

// Results of norms.h, a channel of a z or of a term a thread. Norms: NormStatistics, NormGradients or
// NormDerivatives.
template <typename Norms>
__global__ void __launch_bounds__(kThreads) norms_kernel(const __grid_constant__ Norms a) {
  const int64_t K = a.map.K, M = a.map.M, C = a.C, in_front = blocks_for_p(a);
  if constexpr (Norms::kHasGradientByP) {
    double* shared = shared_memory;  // [kWarps]
    if (blockIdx.x < in_front) {
      const int m = blockIdx.x;
      double sum = 0;
      for (int64_t c = threadIdx.x; c < C; c += kThreads) sum += a.share_of_p(m, c);
      sum = warp_sum(sum);
      if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
      __syncthreads();
      if (threadIdx.x > 0) return;
      for (int warp = 1; warp < kWarps; ++warp) sum += shared[warp];
      a.by_p[m] = sum;
      return;
    }
  }
  const int64_t i = thread_number() - in_front * kThreads, row = i / C, c = i % C;
  if (row < K) {
    a.write_of_z(row, c);
  } else if (row < K + M) {
    a.write_of_term(row - K, c);
    if constexpr (Norms::kHasGradientByP)
      if (a.p.width > 1) a.by_p[i - K * C] = a.share_of_p(row - K, c);
  }
}

// out[s] = Σ scale term + shift over its entries, of which `end` is behind the last. The first sum goes on
// from out, which half types have rounded, where another launch has begun it.
template <typename T>
struct AffineSumsArgs {
  Layout layout;
  const T* term[kMaxEntries];
  const Acc<T>* scale[kMaxEntries];  // [C]; null: 1
  const Acc<T>* shift[kMaxEntries];  // [C]; null: 0
  T* out[kMaxSums];
  uint8_t end[kMaxSums];
  int sums, slabs;
  bool goes_on;
};

template <typename T, int L>
__device__ inline void coefficients(const Acc<T>* from, int64_t c, Acc<T> absent, Acc<T> (&to)[L]) {
  if (from) {
    const auto pack = load<L>(from + c);
#pragma unroll
    for (int l = 0; l < L; ++l) to[l] = pack[l];
  } else {
#pragma unroll
    for (int l = 0; l < L; ++l) to[l] = absent;
  }
}

// The sums of a slab are neighbours in the order of blocks: what several read comes from memory once.
template <typename T, int L>
__global__ void __launch_bounds__(kThreads) affine_sums_kernel(const __grid_constant__ AffineSumsArgs<T> a) {
  constexpr int kPixels = 2, kAtOnce = kFlight / kPixels;
  const Layout& layout = a.layout;
  const int s = blockIdx.x % a.sums, tile = blockIdx.x / a.sums % layout.tiles;
  const int64_t slab = blockIdx.x / a.sums / layout.tiles;
  if (!layout.active(tile)) return;
  const int64_t c = layout.pack(tile) * L;
  const int begin = s ? a.end[s - 1] : 0, end = a.end[s];
  const bool goes_on = a.goes_on && s == 0;
  for (int64_t from = slab * kPixels * layout.rows + layout.row(); from < layout.pixels;
       from += static_cast<int64_t>(a.slabs) * kPixels * layout.rows) {
    int64_t place[kPixels];
    bool inside[kPixels];
    Acc<T> sum[kPixels][L] = {};
#pragma unroll
    for (int v = 0; v < kPixels; ++v) {
      const int64_t pixel = from + v * layout.rows;
      inside[v] = pixel < layout.pixels;
      place[v] = pixel * layout.C + c;
      if (!goes_on || !inside[v]) continue;
      const auto before = load<L>(a.out[s] + place[v]);
#pragma unroll
      for (int l = 0; l < L; ++l) sum[v][l] = before[l];
    }
    for (int m = begin; m < end; m += kAtOnce) {
      Pack<T, L> term[kAtOnce][kPixels];
      Acc<T> scale[kAtOnce][L], shift[kAtOnce][L];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (m + k >= end) continue;
#pragma unroll
        for (int v = 0; v < kPixels; ++v)
          if (inside[v]) term[k][v] = load<L>(a.term[m + k] + place[v]);
        coefficients<T, L>(a.scale[m + k], c, 1, scale[k]);
        coefficients<T, L>(a.shift[m + k], c, 0, shift[k]);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (m + k >= end) continue;
#pragma unroll
        for (int v = 0; v < kPixels; ++v)
#pragma unroll
          for (int l = 0; l < L; ++l)
            if (inside[v]) sum[v][l] += scale[k][l] * term[k][v][l] + shift[k][l];
      }
    }
#pragma unroll
    for (int v = 0; v < kPixels; ++v)
      if (inside[v]) store<T, L>(a.out[s] + place[v], sum[v]);
  }
}

// The plans, as sums_cuda.h declares them.

template <typename T, typename Launch>
void SumKernels<T, Launch>::channel_sums(const T* const* x, const T* const* y, int64_t pairs, double* partial,
                                         double* out, int64_t pixels, int C, int64_t max_slabs) const {
  const bool wide = C % kLanes<T> == 0 && aligned(x, pairs) && aligned(y, pairs);
  const Layout layout(pixels, C, wide ? kLanes<T> : 1);
  const int slabs = static_cast<int>(blocks_for(pixels, int64_t{kRun} * layout.rows, max_slabs));
  const size_t bytes = sizeof(double) * 2 * layout.rows * layout.width * (wide ? kLanes<T> : 1);
  for (int64_t first = 0; first < pairs; first += kMaxPairs) {
    const int number = static_cast<int>(std::min<int64_t>(pairs - first, kMaxPairs));
    const int64_t size = int64_t{2} * number * C;
    ChannelSumsArgs<T> a{layout, {}, {}, partial, slabs, number};
    std::copy_n(x + first, number, a.x);
    std::copy_n(y + first, number, a.y);
    launch(wide ? channel_sums_kernel<T, kLanes<T>> : channel_sums_kernel<T, 1>,
           int64_t{slabs} * layout.tiles * number, bytes, a);
    launch(sum_slabs_kernel, (size + kColumns - 1) / kColumns, sizeof(double) * kThreads,
           SumSlabsArgs{partial, out + first * 2 * C, size, slabs});
  }
}

template <typename Norms, typename Launch>
void launch_norms(const Norms& a, const Launch& launch) {
  const int64_t blocks = blocks_for_p(a) + blocks_for((a.map.K + a.map.M) * a.C, kThreads, INT32_MAX);
  launch(norms_kernel<Norms>, blocks, Norms::kHasGradientByP ? sizeof(double) * kWarps : 0, a);
}

template <typename T, typename Launch>
void SumKernels<T, Launch>::affine_sums(const std::vector<AffineSum<T>>& sums, int64_t pixels, int C,
                                        int64_t max_blocks) const {
  bool wide = C % kLanes<T> == 0;
  for (const auto& sum : sums) {
    wide = wide && aligned(&sum.out, 1);
    for (const auto& entry : sum.entries)
      wide = wide && aligned(&entry.term, 1) && aligned(&entry.scale, 1) && aligned(&entry.shift, 1);
  }
  const Layout layout(pixels, C, wide ? kLanes<T> : 1);
  AffineSumsArgs<T> a{layout, {}, {}, {}, {}, {}, 0, 0, false};
  int used = 0;
  const auto flush = [&] {
    if (a.sums == 0) return;
    const int64_t per_slab = int64_t{a.sums} * layout.tiles;
    const int64_t most = std::max<int64_t>(1, max_blocks / per_slab);
    a.slabs = static_cast<int>(blocks_for(pixels, int64_t{2} * layout.rows, most));
    const auto kernel = wide ? affine_sums_kernel<T, kLanes<T>> : affine_sums_kernel<T, 1>;
    launch(kernel, per_slab * a.slabs, size_t{0}, a);
    used = a.sums = 0;
  };
  for (const auto& sum : sums)
    for (size_t m = 0; m < sum.entries.size(); ++m) {
      if (used == kMaxEntries || (m == 0 && a.sums == kMaxSums)) flush();
      if (a.sums == 0) a.goes_on = m > 0;
      if (a.sums == 0 || m == 0) a.out[a.sums++] = sum.out;
      a.term[used] = sum.entries[m].term;
      a.scale[used] = sum.entries[m].scale;
      a.shift[used] = sum.entries[m].shift;
      a.end[a.sums - 1] = static_cast<uint8_t>(++used);
    }
  flush();
}

}  // namespace ldarts
