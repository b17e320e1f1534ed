// kernel_driver OPERATOR: runs csrc/mixed_sum_kernels.cuh over a grid of sizes against a float64 loop, on the emulation.
// Exit status 0: all agree; 1: a wrong result; others: see cuda_emulation.h. Compiled once for each type, -DSCALAR=float.
#include "cuda_emulation.h"
#include "mixed_sum_kernels.cuh"

#include <string>

using T = SCALAR;
using A = ldarts::Acc<T>;
using emulation::Array;

// One unit in the last place of a T below 1, and its smallest step.
constexpr double kUnit = sizeof(T) == 8 ? 0x1p-53 : sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
constexpr double kStep = std::is_same_v<T, __half> ? 0x1p-24 : 0;
constexpr double kUnitA = sizeof(A) == 8 ? 0x1p-53 : 0x1p-24;

struct Case {
  const char* what;
  int64_t n, M, offset, max_blocks;
};

void expect(bool right, const Case& c, int64_t index, double got, double want) {
  if (right) return;
  std::printf("%s n=%lld M=%lld offset=%lld max_blocks=%lld: [%lld] is %.9g, expected %.9g\n", c.what, (long long)c.n,
              (long long)c.M, (long long)c.offset, (long long)c.max_blocks, (long long)index, got, want);
  std::exit(1);
}

double value(int64_t m, int64_t i) {  // in -1 .. 1, another for each (m, i)
  const uint64_t bits = (static_cast<uint64_t>(m + 2) << 40 ^ static_cast<uint64_t>(i + 1)) * 0x9e3779b97f4a7c15u;
  return static_cast<double>(static_cast<int64_t>(bits ^ bits >> 29)) * 0x1p-63;
}

template <typename V>
void fill(const Array<V>& to, int64_t m, int64_t from, int64_t end) {
  for (int64_t i = from; i < end; ++i) ldarts::narrow(static_cast<ldarts::Acc<V>>(value(m, i)), to.data[i]);
}

double at(const Array<T>& from, int64_t i) { return ldarts::widen(from.data[i]); }

// All arrays of a case; `open` as in emulation::Array. Terms and outputs of scale are one list; those of grads are two,
// of which, where one array alone is misaligned, it is now a term, now an output.
struct Data {
  std::vector<Array<T>> terms, outs;
  Array<T> single;  // grad, or sum's out
  Array<A> weight;
  std::vector<T*> pointers, out_pointers;

  Data(const Case& c, int64_t open) : single(c.n, c.M == 7 ? c.offset : 0, open), weight(c.M) {
    const bool two_lists = c.what == std::string("grads");
    for (int64_t m = 0; m < c.M; ++m) {
      // One array alone is misaligned, so that an alignment check which forgets it is caught.
      const int64_t offset = c.M != 7 && m == c.M - 1 ? c.offset : 0;
      terms.emplace_back(c.n, two_lists && c.M % 2 ? 0 : offset, open);
      pointers.push_back(terms.back().data);
      if (!two_lists) continue;
      outs.emplace_back(c.n, c.M % 2 ? offset : 0, open);
      out_pointers.push_back(outs.back().data);
    }
    fill(weight, -1, 0, c.M);
  }
  void check(const Case& c) const {
    bool intact = single.intact() && weight.intact();
    for (const auto& t : terms) intact = intact && t.intact();
    for (const auto& t : outs) intact = intact && t.intact();
    expect(intact, c, -1, 0, 0);
  }
};

// Result of one run, as bytes, after it has been compared on the elements [0, head) and [tail, n).
std::vector<char> run(const Case& c, unsigned order, int64_t open = 0) {
  const std::string what = c.what;
  const int64_t head = open ? 8 : c.n, tail = open ? c.n - 5 : c.n;  // the elements that are compared
  Data d(c, open);
  Array<A> out(c.M), partial(c.M * std::min(c.max_blocks, c.n / ldarts::kThreads + 1)), carry(open ? 0 : c.n);
  if (open) std::memset(partial.data, 0, partial.size * sizeof(A));
  const bool reads_terms = what != "scale", reads_single = what != "sum";
  for (auto [from, end] : {std::pair{int64_t{0}, head}, {tail, c.n}}) {
    for (int64_t m = 0; m < c.M && reads_terms; ++m) fill(d.terms[m], m, from, end);
    if (reads_single) fill(d.single, c.M, from, end);
  }
  const auto launch = [&](auto kernel, int64_t blocks, size_t bytes, const auto& args) {
    std::vector<unsigned> only;
    if (open && blocks > c.M) only = {0u, static_cast<unsigned>(blocks - 1)};
    emulation::launch(kernel, blocks, ldarts::kThreads, bytes, args, order, only);
  };
  if (what == "sum") ldarts::launch_sum<T>(d.weight.data, d.pointers.data(), c.M, carry.data, d.single.data, c.n, c.max_blocks, launch);
  if (what == "scale") ldarts::launch_scale<T>(d.single.data, d.weight.data, d.pointers.data(), c.M, c.n, c.max_blocks, launch);
  if (what == "dot") ldarts::launch_dot<T>(d.single.data, d.pointers.data(), c.M, partial.data, out.data, c.n, c.max_blocks, launch);
  if (what == "grads") ldarts::launch_grads<T>(d.single.data, d.weight.data, d.pointers.data(), c.M, partial.data, out.data, d.out_pointers.data(), c.n, c.max_blocks, launch);
  const auto& scaled = what == "grads" ? d.outs : d.terms;
  d.check(c);
  expect(out.intact() && partial.intact() && carry.intact(), c, -1, 0, 0);

  std::vector<double> dot(c.M), dot_size(c.M);
  std::vector<char> bytes;
  const auto keep = [&](const auto& x) { bytes.insert(bytes.end(), (const char*)&x, (const char*)(&x + 1)); };
  for (auto [from, end] : {std::pair{int64_t{0}, head}, {tail, c.n}})
    for (int64_t i = from; i < end; ++i) {
      double sum = 0, size = 0;
      for (int64_t m = 0; m < c.M; ++m) {
        const double term = at(d.terms[m], i), single = at(d.single, i), w = d.weight.data[m];
        sum += w * term;
        size += std::abs(w * term);
        dot[m] += single * term;
        dot_size[m] += std::abs(single * term);
        if (what != "scale" && what != "grads") continue;
        const double product = at(scaled[m], i), error = std::abs(product - w * single);
        expect(error <= 1.001 * kUnit * std::abs(w * single) + kStep, c, i, product, w * single);
        keep(scaled[m].data[i]);
      }
      const bool right = std::abs(at(d.single, i) - sum) <= 1.001 * kUnit * std::abs(sum) + kStep + kUnitA * c.M * size;
      if (what == "sum") expect(right, c, i, at(d.single, i), sum), keep(d.single.data[i]);
    }
  if ((what == "dot" || what == "grads") && c.n)
    for (int64_t m = 0; m < c.M; ++m)
      expect(std::abs(out.data[m] - dot[m]) <= 50 * kUnitA * dot_size[m], c, m, out.data[m], dot[m]), keep(out.data[m]);
  return bytes;
}

int main(int, char** arguments) {
  const std::string what = arguments[1];
  const char* name = arguments[1];
  if (what == "index") {  // the first and the last block of a grid that ends 5 elements beyond 2^31 (packs: 2^32)
    for (const char* operation : {"sum", "scale", "dot", "grads"})
      for (int64_t offset : {0, 1}) run({operation, (int64_t{1} << (offset ? 31 : 32)) + 5, 2, offset, INT32_MAX}, 1, 1 << 16);
    return 0;
  }
  for (int64_t n : {0, 1, 3, 7, 8, 31, 1000, 4097})
    for (int64_t M : {1, 2, 7, 8, 35, 64, 65})
      for (int64_t offset : {0, 1})
        for (int64_t max_blocks : {1, 3, 1000}) {
          if (n < 1000 && max_blocks != 3) continue;  // one block whatever the limit
          if (n > 1000 && (M == 35 || M == 64)) continue;  // slow, and 65 has it all
          const Case c{name, n, M, offset, max_blocks};
          const auto bytes = run(c, 0);
          for (unsigned order : {1u, 2u}) expect(run(c, order) == bytes, c, -2, 0, 0);
        }
}
