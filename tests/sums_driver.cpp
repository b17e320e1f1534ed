// sums_driver OPERATOR: runs an operator of csrc/sums_kernels.cuh in many cases, in several orders of blocks
// and threads, against float64 loops; ends with status 1 and the case where they differ.
#include "cuda_emulation.h"
#include "sums_kernels.cuh"

#include <string>

using T = SCALAR;
using A = ldarts::Acc<T>;
using emulation::Array;

constexpr bool kHalf = std::is_same_v<T, __half>;
constexpr double kUnit = sizeof(T) == 8 ? 0x1p-53 : sizeof(T) == 4 ? 0x1p-24 : kHalf ? 0x1p-11 : 0x1p-8;
constexpr double kSmallest = kHalf ? 0x1p-24 : 0;  // denormal numbers are further apart
constexpr double kUnitA = sizeof(A) == 8 ? 0x1p-53 : 0x1p-24;
constexpr double kOffset = 100;  // of the mean from 0: what sums without a shift would lose

struct Case {
  const char* what;
  int64_t pixels, C, count, offset, most;  // count: of pairs, entries or terms; most: of slabs or blocks
};

void expect(bool right, const Case& c, const char* name, int64_t index, double got, double want) {
  if (right) return;
  std::printf("%s pixels=%lld C=%lld count=%lld offset=%lld most=%lld: %s[%lld] is %.9g, expected %.9g\n",
              c.what, (long long)c.pixels, (long long)c.C, (long long)c.count, (long long)c.offset,
              (long long)c.most, name, (long long)index, got, want);
  std::exit(1);
}

double value(int64_t m, int64_t i) {  // in -1 .. 1, another for each (m, i)
  const uint64_t bits =
      (static_cast<uint64_t>(m + 2) << 40 ^ static_cast<uint64_t>(i + 1)) * 0x9e3779b97f4a7c15u;
  return static_cast<double>(static_cast<int64_t>(bits ^ bits >> 29)) * 0x1p-63;
}

template <typename V>
Array<V> filled(int64_t m, int64_t n, int64_t offset = 0, double mean = 0, int64_t open = 0) {
  Array<V> to(n, offset, open);
  const int64_t head = open ? open / 2 : n, tail = open ? n - open / 2 : n;
  for (auto [from, end] : {std::pair{int64_t{0}, head}, {tail, n}})
    for (int64_t i = from; i < end; ++i)
      ldarts::narrow(static_cast<ldarts::Acc<V>>(value(m, i) + mean), to.data[i]);
  return to;
}

struct Launch {
  unsigned order;
  bool ends = false;  // the first and the last block alone

  template <typename Args>
  void operator()(void (*kernel)(Args), int64_t blocks, size_t bytes, const Args& args) const {
    std::vector<unsigned> only;
    if (ends && blocks > 64) only = {0u, static_cast<unsigned>(blocks - 1)};
    emulation::launch(kernel, blocks, ldarts::kThreads, bytes, args, order, only);
  }
};

using Kernels = ldarts::SumKernels<T, Launch>;

template <typename V>
void keep(std::vector<char>& bytes, const Array<V>& results) {
  bytes.insert(bytes.end(), (const char*)results.data, (const char*)(results.data + results.size));
}

// The results of one run, as bytes. Every third pair is of one tensor, whose mean is far from 0.
std::vector<char> channel_sums(const Case& c, unsigned order) {
  std::vector<Array<T>> arrays;
  std::vector<const T*> x, y;
  for (int64_t m = 0; m < c.count; ++m) {
    arrays.push_back(filled<T>(2 * m, c.pixels * c.C, m == c.count - 1 ? c.offset : 0, m % 3 ? 0 : kOffset));
    x.push_back(arrays.back().data);
    if (m % 3) arrays.push_back(filled<T>(2 * m + 1, c.pixels * c.C, 0, kOffset));
    y.push_back(arrays.back().data);
  }
  const int64_t size = 2 * std::min<int64_t>(c.count, ldarts::kMaxPairs) * c.C;
  Array<double> partial(std::min(c.most, c.pixels / ldarts::kRun + 1) * size), out(2 * c.count * c.C);
  const Kernels kernels{Launch{order}};
  kernels.channel_sums(x.data(), y.data(), c.count, partial.data, out.data, c.pixels, c.C, c.most);
  for (const auto& a : arrays) expect(a.intact(), c, "an input", 0, 0, 0);
  expect(partial.intact() && out.intact(), c, "a border", 0, 0, 0);
  for (int64_t m = 0; m < c.count; ++m)
    for (int64_t channel = 0; channel < c.C; ++channel) {
      double sum = 0, product = 0, size_of_sum = 0, size_of_product = 0;
      const double s = ldarts::widen(y[m][channel]);
      for (int64_t i = channel; i < c.pixels * c.C; i += c.C) {
        const double a = ldarts::widen(x[m][i]), b = ldarts::widen(y[m][i]),
                     shifted = x[m] == y[m] ? a - s : a;
        sum += a;
        product += a * b;
        size_of_sum += std::abs(shifted);
        size_of_product += std::abs(shifted * (b - s));
      }
      const int64_t at = 2 * m * c.C + channel;
      const double of_float64 = 0x1p-53 * c.pixels * kOffset * kOffset * 64;
      expect(std::abs(out.data[at] - sum) <= ldarts::kRun * kUnitA * size_of_sum + of_float64, c, "sum", at,
             out.data[at], sum);
      const double bound = (ldarts::kRun + 2) * kUnitA *
                           (size_of_product + std::abs(s) * size_of_sum * (x[m] == y[m] ? 2 : 1));
      // Centred, as norms.h uses it, without what an error of the sum would do.
      const double centred = out.data[at + c.C] - out.data[at] * s, expected = product - sum * s;
      const double most = (ldarts::kRun + 2) * kUnitA * size_of_product + of_float64;
      const double slope = x[m] == y[m] ? s * (out.data[at] - sum) : 0;  // Σ x² is shifted twice
      expect(std::abs(centred - slope - expected) <= most, c, "centred product", at, centred - slope,
             expected);
      expect(std::abs(out.data[at + c.C] - product) <= bound + of_float64, c, "product", at,
             out.data[at + c.C], product);
    }
  std::vector<char> bytes;
  keep(bytes, out);
  return bytes;
}

// `count` entries in sums of 1, 2, 3 ... of them; every fifth entry has no scale, every third no shift.
std::vector<char> affine_sums(const Case& c, unsigned order) {
  std::vector<Array<T>> terms, outs;
  std::vector<Array<A>> scales, shifts;
  std::vector<ldarts::AffineSum<T>> sums;
  const int64_t n = c.pixels * c.C;
  for (int64_t m = 0; m < c.count;) {
    // In 130 sums; of 420 terms one sum takes more than two launches, the last of which begins other sums.
    const int64_t longest = c.count == 130 ? 1 : sums.size() == 20 ? 280 : sums.size() % 9 + 1;
    const int64_t number = std::min(longest, c.count - m);
    // Of other content, which a sum that begins must not read.
    outs.push_back(filled<T>(5000 + m, n, m == 0 && c.count == 7 ? c.offset : 0));
    sums.push_back({outs.back().data, {}});
    for (int64_t k = 0; k < number; ++k, ++m) {
      const int64_t offset = m == c.count - 1 ? c.offset : 0;  // in one array alone
      terms.push_back(filled<T>(m, n, c.count > 7 ? offset : 0));
      scales.push_back(filled<A>(1000 + m, c.C, c.count == 2 ? offset : 0));
      shifts.push_back(filled<A>(2000 + m, c.C, c.count == 1 ? offset : 0));
      sums.back().entries.push_back({terms.back().data, m % 5 == 4 ? nullptr : scales.back().data,
                                     m % 3 == 2 ? nullptr : shifts.back().data});
    }
  }
  Kernels{Launch{order}}.affine_sums(sums, c.pixels, c.C, c.most);
  std::vector<char> bytes;
  for (const auto& a : terms) expect(a.intact(), c, "an input", 0, 0, 0);
  for (size_t s = 0; s < sums.size(); ++s) {
    expect(outs[s].intact(), c, "a border", s, 0, 0);
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0, size = 0;
      for (const auto& entry : sums[s].entries) {
        const double scale = entry.scale ? entry.scale[i % c.C] : 1,
                     shift = entry.shift ? entry.shift[i % c.C] : 0;
        sum += scale * ldarts::widen(entry.term[i]) + shift;
        size += std::abs(scale * ldarts::widen(entry.term[i])) + std::abs(shift);
      }
      // A sum that several launches share is rounded by each.
      const double launches = kUnit > kUnitA ? sums[s].entries.size() / ldarts::kMaxEntries + 1.0 : 0;
      const double got = ldarts::widen(outs[s].data[i]);
      const double most = 1.01 * kUnit * (std::abs(sum) + launches * size) +
                          2 * kUnitA * sums[s].entries.size() * size + kSmallest;
      expect(std::abs(got - sum) <= most, c, "sum", i, got, sum);
    }
    keep(bytes, outs[s]);
  }
  return bytes;
}

// The kernels of norms.h against its functions, one by one; count: of terms, of twice as many as z.
std::vector<char> numbers(const Case& c, unsigned order) {
  const int64_t M = c.count, K = (M + 1) / 2, C = c.C;
  std::vector<int64_t> z_of_term, has_norm;
  for (int64_t m = 0; m < M; ++m) z_of_term.push_back(m * 7 % K);
  for (int64_t k = 0; k < K; ++k) has_norm.push_back(k % 4 != 2);
  const auto map = ldarts::term_map(z_of_term, has_norm);
  const auto sums = filled<double>(1, 2 * K * C, 0, kOffset), grad_sums = filled<double>(2, 2 * M * C);
  const int64_t width = M % 3 ? 1 : C;  // of p: numbers a term
  const auto p = filled<A>(5, M * width), given = filled<A>(7, 2 * K * C), beta = filled<A>(8, M * C);
  Array<A> rstd_mean(2 * K * C), moments(2 * K * C), coefficients(2 * M * C);
  const ldarts::TermWeights<A> weights{p.data, width};
  const ldarts::NormStatistics<A> statistics{
      map, C, 50, 1e-5, sums.data, weights, M % 2 ? beta.data : nullptr, rstd_mean.data, moments.data,
      coefficients.data};
  ldarts::launch_norms(statistics, Launch{order});
  std::vector<char> bytes;
  const auto check = [&](const char* name, const Array<A>& found, int64_t i, double want) {
    expect(std::abs(found.data[i] - want) <= 1e-5 * std::abs(want) + 1e-9, c, name, i, found.data[i], want);
  };
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < C; ++i) {
      const auto found = statistics.moments_of(k, i);
      check("rstd", rstd_mean, 2 * k * C + i, found.rstd),
          check("mean", rstd_mean, (2 * k + 1) * C + i, found.mean);
      check("mean", moments, 2 * k * C + i, found.mean),
          check("var", moments, (2 * k + 1) * C + i, found.var * 50 / 49);
      for (int64_t m = 0; m < M; ++m)
        if (z_of_term[m] == k)
          check("shift", coefficients, 2 * m * C + i,
                (M % 2 ? beta.data[m * C + i] : 0) - weights(m, i) * found.rstd * found.mean),
              check("scale", coefficients, (2 * m + 1) * C + i, weights(m, i) * found.rstd);
    }
  Array<A> scale(M * C), of_z(2 * K * C), by_p(M * width);
  const ldarts::NormGradients<A> norms{map, C, 50, rstd_mean.data, weights, M % 2 ? given.data : nullptr,
                                       grad_sums.data, scale.data, of_z.data, by_p.data};
  ldarts::launch_norms(norms, Launch{order});
  const auto check_p = [&](const char* name, const auto& of_terms, const Array<A>& found) {
    for (int64_t m = 0; m < M; ++m) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < C; ++i) {
        const double share = of_terms.share_of_p(m, i);
        sum += share, size += std::abs(share);
        if (width > 1) check(name, found, m * C + i, share);
      }
      expect(width > 1 || std::abs(found.data[m] - sum) <= 1e-6 * size, c, name, m, found.data[m], sum);
    }
  };
  check_p("by p", norms, by_p);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < C; ++i) check("scale", scale, m * C + i, norms.scale_of(m, i));
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < C; ++i) {
      const auto by = norms.by_rstd_mean_of(k, i);
      const double r = norms.rstd(k, i), by_var = has_norm[k] ? -0.5 * r * r * r * by.first : 0;
      const double shift = has_norm[k] ? by.second - 2 * norms.mean(k, i) * by_var : 0;
      check("by sum", of_z, 2 * k * C + i, shift / 50),
          check("by z", of_z, (2 * k + 1) * C + i, 2 * by_var / 50);
    }
  // The derivatives, against the same functions in a plain loop.
  const auto of_scale = filled<double>(9, M * C), of_of_z = filled<double>(10, 2 * K * C);
  const auto of_p = filled<A>(11, M * width);
  Array<A> by_numbers(2 * K * C), by_given(2 * K * C), of_weights(M * width);
  Array<double> by_sums(2 * M * C);
  ldarts::NormDerivatives<A> derivatives{norms, of_scale.data, of_of_z.data, {of_p.data, width},
                                         by_numbers.data, by_given.data, by_sums.data};
  derivatives.by_p = of_weights.data;
  ldarts::launch_norms(derivatives, Launch{order});
  check_p("derivative by p", derivatives, of_weights);
  Array<A> numbers_again(2 * K * C), given_again(2 * K * C);
  Array<double> sums_again(2 * M * C);
  auto again = derivatives;
  again.by_rstd_mean = numbers_again.data, again.by_grad = given_again.data, again.by_sums = sums_again.data;
  for (int64_t i = 0; i < C; ++i) {
    for (int64_t k = 0; k < K; ++k) again.write_of_z(k, i);
    for (int64_t m = 0; m < M; ++m) again.write_of_term(m, i);
  }
  for (int64_t i = 0; i < 2 * K * C; ++i)
    check("by rstd, mean", by_numbers, i, numbers_again.data[i]),
        check("by their gradient", by_given, i, given_again.data[i]);
  for (int64_t i = 0; i < 2 * M * C; ++i)
    expect(by_sums.data[i] == sums_again.data[i], c, "by sums", i, by_sums.data[i], sums_again.data[i]);
  for (const auto* a : {&rstd_mean, &moments, &coefficients, &scale, &of_z, &by_p, &by_numbers, &by_given,
                        &of_weights})
    expect(a->intact(), c, "a border", 0, 0, 0), keep(bytes, *a);
  return bytes;
}

// The first and the last block, where the last element is beyond 2^32 (or 2^31 without packs).
void index(int64_t offset) {
  const int64_t C = 16, pixels = (int64_t{1} << (offset ? 27 : 28)) + 5, n = pixels * C, open = 1 << 17;
  const Case c{"index", pixels, C, 1, offset, INT32_MAX};
  const auto x = filled<T>(0, n, offset, 0, open);
  const T* pointer = x.data;
  Array<double> partial((pixels / ldarts::kRun + 1) / (ldarts::kThreads / C) * 2 * C + 2 * C), out(2 * C);
  std::memset(partial.data, 0, partial.size * sizeof(double));
  const int rows = ldarts::Layout(pixels, C, offset ? 1 : ldarts::kLanes<T>).rows, run = ldarts::kRun * rows;
  const Kernels kernels{Launch{1, true}};
  kernels.channel_sums(&pointer, &pointer, 1, partial.data, out.data, pixels, C, c.most);
  for (int64_t channel = 0; channel < C; ++channel) {
    double sum = 0;
    for (int64_t pixel = 0; pixel < run; ++pixel) sum += ldarts::widen(x.data[pixel * C + channel]);
    for (int64_t pixel = (pixels - 1) / run * run; pixel < pixels; ++pixel)
      sum += ldarts::widen(x.data[pixel * C + channel]);
    expect(std::abs(out.data[channel] - sum) < 1e-3, c, "sum", channel, out.data[channel], sum);
  }
  Array<T> to(n, 0, open);
  kernels.affine_sums({{to.data, {{pointer, nullptr, nullptr}}}}, pixels, C, INT32_MAX);
  for (int64_t i : {int64_t{0}, int64_t{C}, n - 1, n - C})
    expect(ldarts::widen(to.data[i]) == ldarts::widen(x.data[i]), c, "copy", i, ldarts::widen(to.data[i]),
           ldarts::widen(x.data[i]));
}

template <typename Run>
void in_all_orders(const Case& c, const Run& run) {
  const auto bytes = run(0);
  for (unsigned order : {1u, 2u}) expect(run(order) == bytes, c, "another order of blocks", 0, 0, 0);
}

int main(int, char** arguments) {
  const char* name = arguments[1];
  const std::string what = name;
  if (what == "index") index(0), index(1);
  if (what == "numbers")
    for (int64_t C : {1, 43, 200})
      for (int64_t M : {1, 2, 9, 28}) {
        const Case c{name, 0, C, M, 0, 0};
        in_all_orders(c, [&](unsigned order) { return numbers(c, order); });
      }
  if (what != "channel_sums" && what != "affine_sums") return 0;
  const bool sums = what == "channel_sums";
  for (auto [pixels, C] : {std::pair<int64_t, int64_t>{1, 1},
                           {7, 3},
                           {1, 16},
                           {300, 16},
                           {70, 24},
                           {2100, 8},
                           {5, 520},
                           {40, 130}})
    for (int64_t count : {1, 2, 7, 130, 420})
      for (int64_t offset : {0, 1})
        for (int64_t most : {1, 3, 1000}) {
          if (pixels * C < 1000 && most != 3) continue;
          if (count > 7 && (C > 16 || pixels > 300 || most == 1 || (sums && count == 420))) continue;
          const Case c{name, pixels, C, count, offset, most};
          in_all_orders(
              c, [&](unsigned order) { return sums ? channel_sums(c, order) : affine_sums(c, order); });
        }
}
