"""Batch norms behind the terms of a sum: arithmetic on numbers per channel, in float64.

The operators of csrc/norms.cpp compute statistics, gradients and derivatives of these gradients. There is no
third derivative: nothing in the method needs one.
"""
import functools
from typing import Sequence

import torch
from torch import Tensor


@functools.cache
@torch.inference_mode(False)  # also for training
def constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers. Made once: a CUDA graph has no copies to the device."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def ones(count: int, like: Tensor) -> Tensor:
    """p of terms without one, in float32 or wider."""
    return constant((1.0,) * count, torch.promote_types(like.dtype, torch.float32), like.device)


class Norms:
    """The batch norms behind some z: arithmetic per channel, in float64 (csrc/norms.h).

    Term m is shift_m + scale_m z, with its coefficients (shift, scale) as [terms, 2, C]; the gradient by them
    is ΣG and ΣG z.

    edges: for each the numbers of the z of its terms; has_norm: which z have one; z: any of them [N, C, H, W];
    inner: the first `inner` z are terms of no edge; convolutions read their shift + scale z
    """

    def __init__(self, edges: Sequence[Sequence[int]], has_norm: Sequence[bool], z: Tensor, inner: int = 0):
        self.edges, self.has_norm, self.inner = edges, has_norm, inner
        self.z_of_term = [k for edge in edges for k in edge]
        self.edge_of_term = [e for e, edge in enumerate(edges) for _ in edge]
        pixels = z.numel() // z.shape[1]
        self.numbers = [*range(inner), *self.z_of_term], has_norm, pixels

    def statistics(self, sums: Tensor, p: Tensor, beta: Tensor | None,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """sums: Σz, Σz² of each z with a norm, [norms, 2, C]; p: of each term one number or, as γ, one for
        each channel; beta: [terms, C] or None, 0 -> of each z 1/σ and μ, mean and unbiased variance
        [z, 2, C]; of each term its coefficients. Not differentiable."""
        z_of_term, has_norm, count = self.numbers
        return torch.ops.ldarts.norm_statistics(sums, has_norm, p, beta, z_of_term, count, eps)

    def gradients(self, rstd_mean: Tensor, p: Tensor, beta: Tensor | None, grad_rstd_mean: Tensor | None,
                  sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """sums: ΣG, ΣG z of each term -> scale [terms, C], of_z [z, 2, C], by p, by beta.

        The gradient by a z is Σ scale G over its terms + of_z[0] + of_z[1] z. grad_rstd_mean: that by 1/σ and
        μ of what else reads them, or None.
        """
        gradients = torch.ops.ldarts.norm_gradients(rstd_mean, p, grad_rstd_mean, sums, *self.numbers)
        return *gradients, None if beta is None else sums[:, 0].to(beta.dtype)

    def derivatives(self, inputs: Sequence[Tensor | None],
                    grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients by the inputs of `gradients`, of those by its results (None: 0), once."""
        if torch.is_grad_enabled():
            raise RuntimeError("ldarts: the engine has no third derivatives; LDARTS_FUSED=off in the "
                               "environment has them")
        rstd_mean, p, beta, grad_rstd_mean, sums = inputs
        by_scale, by_of_z, by_p, by_beta = grads
        by_rstd_mean, by_weights, by_grad, by_sums = torch.ops.ldarts.norm_derivatives(
            rstd_mean, p, grad_rstd_mean, sums, by_scale, by_of_z, by_p, *self.numbers)
        if by_beta is not None:
            by_sums[:, 0] += by_beta
        return [by_rstd_mean, by_weights, None, None if grad_rstd_mean is None else by_grad, by_sums]

    def terms_of(self, grads: Sequence[Tensor], zs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """G and z of each term."""
        return [grads[e] for e in self.edge_of_term], [zs[k] for k in self.z_of_term]
