// What the CUDA kernels share: packs of elements that travel in one access, sums over a warp. Plain pointers
// and sizes: nothing here knows PyTorch, so that tests/cuda_emulation.h can run all of it on a CPU. A thread
// works on packs of L elements, 16 bytes where every array is aligned to 16, else one element.
#pragma once
#include "sums_cuda.h"

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

template <typename A>
__device__ inline A warp_sum(A value) {  // the same in every lane
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

template <typename Pointer>
bool aligned(const Pointer* pointers, int64_t count) {
  auto is_aligned = [](Pointer p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return std::all_of(pointers, pointers + count, is_aligned);
}

inline int64_t blocks_for(int64_t n, int64_t elements_per_block, int64_t max_blocks) {
  return std::min((n + elements_per_block - 1) / elements_per_block, max_blocks);
}

}  // namespace ldarts
