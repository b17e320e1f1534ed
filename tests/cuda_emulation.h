// Runs CUDA device code on a CPU, and strictly: include this before the device code, then call emulation::launch.
//
// Blocks run one after another. A block's threads are coroutines that switch only at barriers and shuffles; a warp runs
// on until it waits for another, in an order the caller picks, so that a missing barrier reads what nobody has written.
// Shared memory (dynamic: `extern __shared__ double shared_memory[]`) and arrays start as NaN and lie between NaNs that
// are checked afterwards; behind an array comes a page that traps. Divergent barriers and shuffles end the program.
// Compile with -fsanitize=alignment,bounds,signed-integer-overflow -fsanitize-undefined-trap-on-error.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define __syncthreads() emulation::wait(emulation::State::barrier, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulation::shuffle(mask, value, threadIdx.x % 32 ^ (lanes), __LINE__)
#define __shfl_down_sync(mask, value, lanes) emulation::shuffle(mask, value, threadIdx.x % 32 + (lanes), __LINE__)

struct alignas(16) uint4 { uint32_t x, y, z, w; };

constexpr size_t kSharedBytes = 48 << 10;
alignas(16) double shared_memory[kSharedBytes / sizeof(double)];

namespace emulation {

struct Dim { unsigned x = 0, y = 0, z = 0; };
inline Dim thread_index, block_index, grid_size;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", block_index.x, thread_index.x, what);
  std::exit(3);
}

inline bool poisoned(const void* from, const void* to) {
  const auto *first = static_cast<const uint8_t*>(from), *end = static_cast<const uint8_t*>(to);
  return first == end || (*first == 0xff && std::memcmp(first, first + 1, end - first - 1) == 0);
}

enum class State { ready, barrier, shuffle, done };
struct Thread {
  jmp_buf context;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  int line = 0;
  unsigned mask = 0, source = 0;
  uint8_t sent[8], received[8];
};
inline std::vector<std::unique_ptr<Thread>> threads;
inline Thread* current;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline __attribute__((noinline)) void leave() { if (!_setjmp(current->context)) _longjmp(scheduler, 1); }
inline __attribute__((noinline)) void resume(Thread* t) {
  current = t;
  if (!_setjmp(scheduler)) _longjmp(t->context, 1);
}
inline void wait(State state, int line) {
  current->state = state;
  current->line = line;
  leave();
}
inline void run_thread() {
  for (;; current->state = State::done) {
    leave();
    body();
  }
}
inline void add_thread() {
  threads.push_back(std::make_unique<Thread>());
  Thread* t = current = threads.back().get();
  constexpr size_t kStack = 64 << 10;
  t->stack.reset(new char[kStack]);
  getcontext(&t->start);
  t->start.uc_stack.ss_sp = t->stack.get();
  t->start.uc_stack.ss_size = kStack;
  makecontext(&t->start, run_thread, 0);
  if (!_setjmp(scheduler)) setcontext(&t->start);
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= 8);
  Thread* self = current;
  self->mask = mask;
  self->source = source < 32 ? source : threadIdx.x % 32;
  std::memcpy(self->sent, &value, sizeof(T));
  wait(State::shuffle, line);
  std::memcpy(&value, self->received, sizeof(T));
  return value;
}

// Order 0: by number; 1: backwards; else at random, a new one at each barrier.
inline std::vector<unsigned> arrange(unsigned count, unsigned order, std::mt19937& random) {
  std::vector<unsigned> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (order == 1) std::reverse(numbers.begin(), numbers.end());
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random);
  return numbers;
}

// Lets the lanes that wait for `t`'s shuffle go on, if all have come.
inline void release_shuffle(unsigned warp, Thread* t) {
  Thread* lanes[32];
  for (unsigned l = 0; l < 32; ++l) {
    lanes[l] = warp * 32 + l < threads.size() ? threads[warp * 32 + l].get() : nullptr;
    if (!(t->mask >> l & 1)) continue;
    Thread* other = lanes[l];
    if (!other || other->state != State::shuffle || other->line != t->line || other->mask != t->mask) return;
  }
  for (unsigned l = 0; l < 32; ++l)
    if (t->mask >> l & 1) {
      Thread* source = t->mask >> lanes[l]->source & 1 ? lanes[lanes[l]->source] : nullptr;
      source ? (void)std::memcpy(lanes[l]->received, source->sent, 8) : (void)std::memset(lanes[l]->received, 0xff, 8);
      lanes[l]->state = State::ready;
    }
}

inline void run_warp(unsigned warp, const std::vector<unsigned>& lanes) {
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned l : lanes) {
      const unsigned number = warp * 32 + l;
      if (number >= threads.size()) continue;
      Thread* t = threads[number].get();
      if (t->state == State::shuffle) release_shuffle(warp, t);
      if (t->state != State::ready) continue;
      thread_index.x = number;
      resume(t);
      moved = true;
    }
  }
}

inline void run_block(unsigned order, size_t shared_bytes, std::mt19937& random) {
  std::memset(shared_memory, 0xff, kSharedBytes);
  for (auto& t : threads) t->state = State::ready;
  while (threads[0]->state == State::ready) {
    for (unsigned warp : arrange((threads.size() + 31) / 32, order, random)) run_warp(warp, arrange(32, order, random));
    for (auto& t : threads) {
      if (t->state == State::shuffle) fail("a shuffle that not all lanes of its mask reach");
      if (t->state != threads[0]->state || (t->state == State::barrier && t->line != threads[0]->line))
        fail("a barrier that not all threads reach");
    }
    if (threads[0]->state == State::barrier) for (auto& t : threads) t->state = State::ready;
  }
  const auto* shared = reinterpret_cast<uint8_t*>(shared_memory);
  if (!poisoned(shared + shared_bytes, shared + kSharedBytes)) fail("a write behind the shared memory asked for");
}

// Runs kernel(args) on `blocks` blocks, or on those of them listed in `only`.
template <typename Args>
void launch(void (*kernel)(Args), int64_t blocks, unsigned block_threads, size_t shared_bytes, const Args& args,
            unsigned order, const std::vector<unsigned>& only = {}) {
  if (blocks < 1 || blocks > INT32_MAX || shared_bytes > kSharedBytes || sizeof(Args) > 4096) fail("a launch CUDA refuses");
  if (threads.size() != block_threads) {
    threads.clear();
    while (threads.size() < block_threads) add_thread();
  }
  body = [&] { kernel(args); };
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
  std::mt19937 random(order);
  for (unsigned b : only.empty() ? arrange(blocks, order, random) : only) {
    block_index.x = b;
    run_block(order, shared_bytes, random);
  }
}

// n elements of NaN between NaNs, `offset` elements short of 16-byte alignment, a page that traps on either side.
// Of an array that would not fit into memory only `open` elements at each end exist; they start as 0, the rest traps.
template <typename T>
class Array {
 public:
  explicit Array(int64_t n, int64_t offset = 0, int64_t open = 0) : size(n) {
    const size_t kPage = sysconf(_SC_PAGESIZE);
    const size_t bytes = (n * sizeof(T) + 15) / 16 * 16 + 64, inner = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = inner + 2 * kPage;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail("no address space");
    begin_ = base_ + kPage;
    end_ = begin_ + inner;
    data = reinterpret_cast<T*>(end_ - bytes + 64) - offset;
    if (!open) {
      mprotect(begin_, inner, PROT_READ | PROT_WRITE);
      std::memset(begin_, 0xff, inner);
    } else {
      const size_t ends = (open * sizeof(T) + kPage - 1) / kPage * kPage + kPage;
      mprotect(begin_, ends, PROT_READ | PROT_WRITE);
      mprotect(end_ - ends, ends, PROT_READ | PROT_WRITE);
      begin_ = end_ = nullptr;
    }
  }
  Array(Array&& other) : data(other.data), size(other.size), base_(other.base_), begin_(other.begin_), end_(other.end_),
                         mapped_(other.mapped_) { other.base_ = nullptr; }
  ~Array() { if (base_) munmap(base_, mapped_); }
  bool intact() const { return !begin_ || (poisoned(begin_, data) && poisoned(data + size, end_)); }

  T* data;
  int64_t size;

 private:
  uint8_t *base_, *begin_, *end_;
  size_t mapped_;
};

}  // namespace emulation

// Stand-ins for cuda_bf16.h and cuda_fp16.h: the bits, and the conversions that round to nearest even.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
template <typename To, typename From>
To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __bfloat162float(__nv_bfloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto u = bits_as<uint32_t>(x);
  return {static_cast<uint16_t>(x != x ? 0xffff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {  // the exponent is 112 short: multiplied in, which also mends subnormals
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  const float value = rest < 0x7c00 ? bits_as<float>(rest << 13) * 0x1p112f : bits_as<float>(rest << 13 | 0x7f800000u);
  return bits_as<float>(bits_as<uint32_t>(value) | sign);
}
inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(bits_as<uint32_t>(x) >> 16 & 0x8000);
  const float size = x < 0 ? -x : x;
  if (x != x) return {0xffff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | (bits_as<uint32_t>(size + 0.5f) & 0xffff))};
  const auto u = bits_as<uint32_t>(size);
  return {static_cast<uint16_t>(sign | ((u - 0x38000000u + 0xfff + (u >> 13 & 1)) >> 13))};
}
