// The operators of norms_operators.h, and their kernels on the CPU.
#include "norms_operators.h"

#include <torch/library.h>

#include <algorithm>

namespace ldarts {
namespace {

// visit(row, channel) for `rows` rows of C channels.
template <typename Visit>
void each(int64_t rows, int64_t C, const Visit& visit) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < C; ++c) visit(row, c);
}

struct Cpu {
  static at::ScalarType type_for(const at::Tensor&) { return at::kDouble; }

  template <typename Norms>
  static void run(const Norms& norms) {
    each(norms.map.K, norms.C, [&](int64_t k, int64_t c) { norms.write_of_z(k, c); });
    each(norms.map.M, norms.C, [&](int64_t m, int64_t c) { norms.write_of_term(m, c); });
    if constexpr (Norms::kHasGradientByP) {
      const int64_t width = norms.p.width;
      std::fill_n(norms.by_p, norms.map.M * width, 0);
      each(norms.map.M, norms.C, [&](int64_t m, int64_t c) {
        norms.by_p[m * width + (width > 1 ? c : 0)] += norms.share_of_p(m, c);
      });
    }
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(ldarts, m) {
  m.def("norm_statistics(Tensor z_sums, int[] has_norm, Tensor p, Tensor? beta, int[] z_of_term, int count, "
        "float eps) -> (Tensor rstd_mean, Tensor moments, Tensor coefficients)",
        torch::dispatch(at::kCPU, norm_statistics<Cpu>));
  m.def("norm_gradients(Tensor rstd_mean, Tensor p, Tensor? grad_rstd_mean, Tensor grad_sums, "
        "int[] z_of_term, int[] has_norm, int count) -> (Tensor scale, Tensor of_z, Tensor by_p)",
        torch::dispatch(at::kCPU, norm_gradients<Cpu>));
  m.def("norm_derivatives(Tensor rstd_mean, Tensor p, Tensor? grad_rstd_mean, Tensor grad_sums, "
        "Tensor? grad_scale, Tensor? grad_of_z, Tensor? grad_p, int[] z_of_term, int[] has_norm, int count) "
        "-> (Tensor by_rstd_mean, Tensor by_p, Tensor by_grad_rstd_mean, Tensor by_grad_sums)",
        torch::dispatch(at::kCPU, norm_derivatives<Cpu>));
}

}  // namespace ldarts
