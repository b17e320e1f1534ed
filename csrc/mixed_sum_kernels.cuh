// Device code of the fused mixed-operation sum, and the plans that launch it. Plain pointers and sizes:
// nothing here knows PyTorch, so that tests/cuda_emulation.h can run all of it on a CPU. Every tensor is a
// dense array of n elements, all in one order; a thread works on packs of L elements, 16 bytes where every
// array is aligned to 16, else one element.
#pragma once
#include "mixed_sum_cuda.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// At file scope, because kernels for different types can't each declare it with their own.
extern __shared__ double shared_memory[];

namespace ldarts {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFlight = 8;  // packs a thread loads before it uses the first: 16 KiB a block hide latency

// By name, because PyTorch's own build flags switch the half types' conversions off.
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

template <typename T> constexpr int kLanes = 16 / sizeof(T);
template <typename T> constexpr int kDotPacks = sizeof(T) == 2 ? 1 : 2;  // of grad, in registers of a thread

// L elements that travel in one access. Half types lie in 32-bit words, because the compiler keeps a 16-bit
// member in a register of its own.
template <typename T, int L>
struct alignas(L * sizeof(T) < 16 ? L * sizeof(T) : 16) Pack {
  using Word = std::conditional_t<sizeof(T) != 2, T, std::conditional_t<L == 1, uint16_t, uint32_t>>;
  Word word[L * sizeof(T) / sizeof(Word)];

  __device__ Acc<T> operator[](int l) const {
    T value;
    memcpy(&value, reinterpret_cast<const char*>(word) + l * sizeof(T), sizeof(T));
    return widen(value);
  }
};

template <int L, typename T>
__device__ inline Pack<T, L> load(const T* from) {
  return *reinterpret_cast<const Pack<T, L>*>(from);
}

// 16 bytes of global memory in one plain store: an assignment in a loop comes out as stores of one word each,
// __stwb as a strong store.
__device__ inline void store_quad(void* to, uint4 quad) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(__cvta_generic_to_global(to)), "r"(quad.x), "r"(quad.y), "r"(quad.z), "r"(quad.w)
               : "memory");
#else  // emulated
  *static_cast<uint4*>(to) = quad;
#endif
}

template <typename T, int L>
__device__ inline void store(T* to, const Acc<T> (&values)[L]) {
  T narrowed[L];
#pragma unroll
  for (int l = 0; l < L; ++l) narrow(values[l], narrowed[l]);
  if constexpr (L == 1) {
    *to = narrowed[0];
  } else {
#pragma unroll
    for (size_t q = 0; q < sizeof(narrowed) / 16; ++q) {
      uint4 quad;
      memcpy(&quad, narrowed + q * kLanes<T>, 16);
      store_quad(to + q * kLanes<T>, quad);
    }
  }
}

__device__ inline int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ inline int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * kThreads; }

template <typename A>
__device__ inline A warp_sum(A value) {  // the same in every lane
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// out = before + sum of weight[m] * term[m]; to carry instead of out where another launch follows.
template <typename T>
struct SumArgs {
  const T* term[kMaxTerms];
  const Acc<T>* weight;
  const Acc<T>* before;  // null: 0
  Acc<T>* carry;         // null: out
  T* out;
  int64_t n;
  int count;
};

template <typename T, int L>
__device__ inline void sum_pack(const SumArgs<T>& a, int64_t i) {
  Acc<T> sum[L] = {};
  if (a.before) {
    const auto pack = load<L>(a.before + i);
#pragma unroll
    for (int l = 0; l < L; ++l) sum[l] = pack[l];
  }
  for (int m = 0; m < a.count; m += kFlight) {
    Pack<T, L> term[kFlight];
    Acc<T> weight[kFlight];
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      if (m + k >= a.count) continue;
      term[k] = load<L>(a.term[m + k] + i);
      weight[k] = a.weight[m + k];
    }
#pragma unroll
    for (int k = 0; k < kFlight; ++k) {
      if (m + k >= a.count) continue;
#pragma unroll
      for (int l = 0; l < L; ++l) sum[l] += weight[k] * term[k][l];
    }
  }
  if (a.carry) store<Acc<T>, L>(a.carry + i, sum);
  else store<T, L>(a.out + i, sum);
}

template <typename T, int L>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumArgs<T> a) {
  const int64_t packs = a.n / L;
  for (int64_t p = thread_number(); p < packs; p += thread_count()) sum_pack<T, L>(a, p * L);
  if (const int64_t i = packs * L + thread_number(); i < a.n) sum_pack<T, 1>(a, i);
}

// out[m] = weight[m] * grad
template <typename T>
struct ScaleArgs {
  const T* grad;
  const Acc<T>* weight;
  T* out[kMaxTerms];
  int64_t n;
  int count;
};

template <typename T, int L>
__device__ inline void store_scaled(T* to, Acc<T> weight, const Pack<T, L>& grad) {
  Acc<T> product[L];
#pragma unroll
  for (int l = 0; l < L; ++l) product[l] = weight * grad[l];
  store<T, L>(to, product);
}

template <typename T, int L>
__device__ inline void scale_pack(const ScaleArgs<T>& a, int64_t i) {
  const auto grad = load<L>(a.grad + i);
#pragma unroll 4
  for (int m = 0; m < a.count; ++m) store_scaled(a.out[m] + i, a.weight[m], grad);
}

template <typename T, int L>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleArgs<T> a) {
  const int64_t packs = a.n / L;
  for (int64_t p = thread_number(); p < packs; p += thread_count()) scale_pack<T, L>(a, p * L);
  if (const int64_t i = packs * L + thread_number(); i < a.n) scale_pack<T, 1>(a, i);
}

// partial[m, block] = the block's share of <grad, term[m]>, [count, gridDim.x]; with `weight` also
// out[m] = weight[m] * grad.
template <typename T>
struct DotArgs {
  const T* grad;
  const T* term[kMaxTerms];
  const Acc<T>* weight;  // null: no out
  T* out[kMaxTerms];
  Acc<T>* partial;
  int64_t n;
  int count;
};

// Adds the products of the elements from `first` on, V packs a thread, to the warp's sums [count], and writes
// out. Lane m % kWarp alone touches sums[m], so that no barrier is needed here.
template <typename T, int L, int V>
__device__ inline void dot_tile(const DotArgs<T>& a, int64_t first, int64_t end, Acc<T>* sums) {
  constexpr int kGroup = kFlight / V;
  const int lane = threadIdx.x % kWarp;
  Pack<T, L> grad[V];
  int64_t i[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    i[v] = first + (v * kThreads + static_cast<int>(threadIdx.x)) * L;
    if (i[v] < end) grad[v] = load<L>(a.grad + i[v]);
  }
  for (int m = 0; m < a.count; m += kGroup) {
    Pack<T, L> term[kGroup][V];
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (m + k < a.count && i[v] < end) term[k][v] = load<L>(a.term[m + k] + i[v]);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (m + k >= a.count) continue;
      Acc<T> dot = 0;
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int l = 0; l < L; ++l)
          if (i[v] < end) dot += grad[v][l] * term[k][v][l];
      dot = warp_sum(dot);
      if (lane == (m + k) % kWarp) sums[m + k] += dot;
      if (!a.weight) continue;
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (i[v] < end) store_scaled(a.out[m + k] + i[v], a.weight[m + k], grad[v]);
    }
  }
}

template <typename T, int L>
__global__ void __launch_bounds__(kThreads, 8) dot_kernel(const __grid_constant__ DotArgs<T> a) {
  constexpr int64_t kTile = kThreads * kDotPacks<T> * L;
  auto* shared = reinterpret_cast<Acc<T>*>(shared_memory);  // [kWarps, count]
  Acc<T>* sums = shared + threadIdx.x / kWarp * a.count;
  for (int m = threadIdx.x % kWarp; m < a.count; m += kWarp) sums[m] = 0;
  const int64_t packed = a.n / L * L;
  for (int64_t first = blockIdx.x * kTile; first < packed; first += gridDim.x * kTile)
    dot_tile<T, L, kDotPacks<T>>(a, first, packed, sums);
  if (packed < a.n && blockIdx.x == gridDim.x - 1) dot_tile<T, 1, 1>(a, packed, a.n, sums);
  __syncthreads();
  for (int m = threadIdx.x; m < a.count; m += kThreads) {
    Acc<T> total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[warp * a.count + m];
    a.partial[static_cast<int64_t>(m) * gridDim.x + blockIdx.x] = total;
  }
}

// out[m] = sum of partial[m, :], m = blockIdx.x
template <typename A>
struct FinishArgs {
  const A* partial;
  A* out;
  int64_t blocks;
};

template <typename A>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ FinishArgs<A> a) {
  auto* shared = reinterpret_cast<A*>(shared_memory);  // [kWarps]
  A sum = 0;
  for (int64_t b = threadIdx.x; b < a.blocks; b += kThreads) sum += a.partial[blockIdx.x * a.blocks + b];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += shared[warp];
  a.out[blockIdx.x] = sum;
}

// The plans. `launch(kernel, blocks, bytes of shared memory, arguments)` starts blocks of kThreads threads;
// nothing is launched for n == 0. Pointers are device pointers, arrays of pointers [count] lie on the host.

template <typename Pointer>
bool aligned(const Pointer* pointers, int64_t count) {
  auto is_aligned = [](Pointer p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return std::all_of(pointers, pointers + count, is_aligned);
}

inline int64_t blocks_for(int64_t n, int64_t elements_per_block, int64_t max_blocks) {
  return std::min((n + elements_per_block - 1) / elements_per_block, max_blocks);
}

// visit(first, number) for each group of terms that one launch takes.
template <typename Visit>
void each_chunk(int64_t count, const Visit& visit) {
  for (int64_t first = 0; first < count; first += kMaxTerms)
    visit(first, static_cast<int>(std::min<int64_t>(count - first, kMaxTerms)));
}

// carry [n], aligned to 16: read only where count > kMaxTerms; may be `out` where the types agree.
template <typename T, typename Launch>
void launch_sum(const Acc<T>* weight, const T* const* terms, int64_t count, Acc<T>* carry, T* out, int64_t n,
                int64_t max_blocks, const Launch& launch) {
  if (n == 0) return;
  const bool wide = aligned(terms, count) && aligned(&out, 1);
  const int64_t blocks = blocks_for(n, kThreads * (wide ? kLanes<T> : 1), max_blocks);
  each_chunk(count, [&](int64_t first, int number) {
    const bool more = first + number < count;
    SumArgs<T> a{{}, weight + first, first ? carry : nullptr, more ? carry : nullptr, out, n, number};
    std::copy_n(terms + first, number, a.term);
    launch(wide ? sum_kernel<T, kLanes<T>> : sum_kernel<T, 1>, blocks, size_t{0}, a);
  });
}

template <typename T, typename Launch>
void launch_scale(const T* grad, const Acc<T>* weight, T* const* outs, int64_t count, int64_t n,
                  int64_t max_blocks, const Launch& launch) {
  if (n == 0) return;
  const bool wide = aligned(outs, count) && aligned(&grad, 1);
  const int64_t blocks = blocks_for(n, kThreads * (wide ? kLanes<T> : 1), max_blocks);
  each_chunk(count, [&](int64_t first, int number) {
    ScaleArgs<T> a{grad, weight + first, {}, n, number};
    std::copy_n(outs + first, number, a.out);
    launch(wide ? scale_kernel<T, kLanes<T>> : scale_kernel<T, 1>, blocks, size_t{0}, a);
  });
}

// The gradients by the weights and, with `weight`, by the terms: outs. partial [count, max_blocks]: scratch.
// The order of additions follows from n, alignment and max_blocks.
template <typename T, typename Launch>
void launch_grads(const T* grad, const Acc<T>* weight, const T* const* terms, int64_t count, Acc<T>* partial,
                  Acc<T>* dots, T* const* outs, int64_t n, int64_t max_blocks, const Launch& launch) {
  if (n == 0) return;
  const bool wide = aligned(terms, count) && aligned(&grad, 1) && (!weight || aligned(outs, count));
  const int64_t blocks = blocks_for(n, kThreads * kDotPacks<T> * (wide ? kLanes<T> : 1), max_blocks);
  each_chunk(count, [&](int64_t first, int number) {
    DotArgs<T> a{grad, {}, weight ? weight + first : nullptr, {}, partial + first * blocks, n, number};
    std::copy_n(terms + first, number, a.term);
    if (weight) std::copy_n(outs + first, number, a.out);
    launch(wide ? dot_kernel<T, kLanes<T>> : dot_kernel<T, 1>, blocks, sizeof(Acc<T>) * kWarps * number, a);
  });
  launch(finish_kernel<Acc<T>>, count, sizeof(Acc<T>) * kWarps, FinishArgs<Acc<T>>{partial, dots, blocks});
}

template <typename T, typename Launch>
void launch_dot(const T* grad, const T* const* terms, int64_t count, Acc<T>* partial, Acc<T>* out, int64_t n,
                int64_t max_blocks, const Launch& launch) {
  launch_grads<T>(grad, nullptr, terms, count, partial, out, nullptr, n, max_blocks, launch);
}

}  // namespace ldarts
