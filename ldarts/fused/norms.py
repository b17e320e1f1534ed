"""Batch norms behind the terms of a sum: arithmetic on numbers per channel, in float64.

The operators of csrc/norms.cpp compute statistics, gradients and derivatives of these gradients; autograd
computes higher derivatives, from norm_gradients_ref.
"""
import functools
from functools import partial
from typing import Callable, Sequence

import torch
from torch import Tensor, nn


def constant(numbers: tuple[float, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor of numbers on the device of another. Made once: a CUDA graph has no copies to the device."""
    return cached_unless_traced(_constant, like)(numbers, dtype, like.device)


def ones(count: int, like: Tensor) -> Tensor:
    """p of terms without one, in float32 or wider."""
    return constant((1.0,) * count, torch.promote_types(like.dtype, torch.float32), like)


def membership(rows: tuple[int, ...], count: int, like: Tensor) -> Tensor:
    """[count, len(rows)] in float64: 1 in row r and column i where rows[i] is r. A product with it adds up
    what belongs to each r, always in one order. Made once."""
    return cached_unless_traced(_membership, like)(rows, count, like.device)


def cached_unless_traced(cached: Callable, like: Tensor) -> Callable:
    """The function; without its cache for a tensor of a trace, whose constants belong to that trace."""
    return cached if type(like) in (Tensor, nn.Parameter) else cached.__wrapped__


@functools.cache
@torch.inference_mode(False)  # also for training
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


@functools.cache
@torch.inference_mode(False)
def _membership(rows: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    matrix = [[float(row == number) for row in rows] for number in range(count)]
    return torch.tensor(matrix, dtype=torch.float64, device=device).view(count, len(rows))


class Norms:
    """The batch norms behind some z: arithmetic per channel, in float64 (csrc/norms.h).

    Term m is shift_m + scale_m z, with its coefficients (shift, scale) as [terms, 2, C]; the gradient by them
    is ΣG and ΣG z.

    edges: for each the numbers of the z of its terms; has_norm: which z have one; count: pixels of a channel;
    inner: how many z, the first ones, are terms of no edge: convolutions read shift + scale z of them
    """

    def __init__(self, edges: Sequence[Sequence[int]], has_norm: Sequence[bool], count: int, inner: int = 0):
        self.edges, self.has_norm = edges, [int(has) for has in has_norm]
        self.count, self.inner = count, inner
        self.z_of_term = [k for edge in edges for k in edge]
        self.edge_of_term = [e for e, edge in enumerate(edges) for _ in edge]
        self.numbers = [*range(inner), *self.z_of_term], self.has_norm, count

    def statistics(self, sums: Tensor, p: Tensor, beta: Tensor | None,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """sums: Σz, Σz² of each z with a norm, [norms, 2, C]; p: of each term one number or, as γ, one for
        each channel; beta: [terms, C] or None, 0 -> of each z 1/σ and μ, mean and unbiased variance
        [z, 2, C]; of each term its coefficients. Not differentiable."""
        z_of_term, has_norm, count = self.numbers
        return torch.ops.ldarts.norm_statistics(sums, has_norm, p, beta, z_of_term, count, eps)

    def gradients(self, rstd_mean: Tensor, p: Tensor, beta: Tensor | None, grad_rstd_mean: Tensor | None,
                  sums: Tensor,
                  compute: Callable | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """sums: ΣG, ΣG z of each term -> scale [terms, C], of_z [z, 2, C], by p, by beta.

        The gradient by a z is Σ scale G over its terms + of_z[0] + of_z[1] z. grad_rstd_mean: that by 1/σ and
        μ of what else reads them, or None.
        """
        gradients = (compute or NormGradients.apply)(rstd_mean, p, grad_rstd_mean, sums, *self.numbers)
        return *gradients, None if beta is None else sums[:, 0].to(beta.dtype)

    def derivatives(self, inputs: Sequence[Tensor | None],
                    grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients by the inputs of `gradients`, of those by its results (None: 0)."""
        if torch.is_grad_enabled():  # for a third derivative
            return differentiate(partial(self.gradients, compute=norm_gradients_ref), inputs, grads)
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


def norm_gradients_ref(rstd_mean, p, grad_rstd_mean, sums, z_of_term, has_norm, count):
    """csrc's norm_gradients in PyTorch, in few operations; the formulas are those of csrc/norms.h."""
    of_term = membership(tuple(z_of_term), len(has_norm), sums)  # [z, terms]
    per_pixel = constant(tuple(float(has) / count for has in has_norm), torch.float64, sums)[:, None]
    rstd_mean, weights, (of_grad, of_product) = rstd_mean.double(), p.double(), sums.unbind(1)
    if p.dim() == 1:
        weights = weights[:, None]
    C, (rstd, mean) = rstd_mean.shape[2], rstd_mean.unbind(1)
    rstd_of_term, mean_of_term = (of_term.T @ rstd_mean.flatten(1)).split(C, 1)
    scale = weights * rstd_of_term
    centred = torch.addcmul(of_product, mean_of_term, of_grad, value=-1)  # Σ G (z − μ)
    by_rstd, minus_by_mean = (of_term @ torch.cat([weights * centred, scale * of_grad], 1)).split(C, 1)
    if grad_rstd_mean is not None:
        by_rstd, minus_by_mean = by_rstd + grad_rstd_mean[:, 0], minus_by_mean - grad_rstd_mean[:, 1]
    twice_by_var = -per_pixel * rstd**3 * by_rstd
    shift = -torch.addcmul(per_pixel * minus_by_mean, mean, twice_by_var)
    by_p = rstd_of_term * centred
    return scale, torch.stack([shift, twice_by_var], 1), by_p.sum(1) if p.dim() == 1 else by_p


class NormGradients(torch.autograd.Function):
    """norm_gradients_ref, fused; backward differentiates that form, for derivatives beyond the second."""

    @staticmethod
    def forward(ctx, rstd_mean, p, grad_rstd_mean, sums, z_of_term, has_norm, count):
        ctx.numbers = z_of_term, has_norm, count
        ctx.save_for_backward(rstd_mean, p, grad_rstd_mean, sums)
        ctx.set_materialize_grads(False)
        return torch.ops.ldarts.norm_gradients(rstd_mean, p, grad_rstd_mean, sums, z_of_term, has_norm, count)

    @staticmethod
    def backward(ctx, *grads):
        compute = lambda *inputs: norm_gradients_ref(*inputs, *ctx.numbers)
        return *differentiate(compute, ctx.saved_tensors, grads), None, None, None


def differentiate(compute: Callable, inputs: Sequence[Tensor | None],
                  grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients by the inputs of a function, of those by its results. None: no input, no gradient."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because what one input owes to another is no part of these derivatives.
        leaves = [None if t is None else t.view_as(t) if differentiable and t.requires_grad
                  else t.detach().requires_grad_() for t in inputs]
        reached = [(result, grad.to(result.dtype)) for result, grad in zip(compute(*leaves), grads)
                 if grad is not None]
        tensors = [t for t in leaves if t is not None]
        by_tensor = [None] * len(tensors)
        if reached:
            results, grads = zip(*reached)
            by_tensor = torch.autograd.grad(results, tensors, grads, create_graph=differentiable,
                                            materialize_grads=True)
    by_tensor = iter(by_tensor)
    return [None if t is None else next(by_tensor) for t in leaves]


def register() -> None:
    """Shapes of what the operators of norms.cpp return, for tensors without values."""
    @torch.library.register_fake("ldarts::norm_statistics")
    def _(z_sums, has_norm, p, beta, z_of_term, count, eps):
        C, wide = z_sums.shape[2], torch.promote_types(p.dtype, torch.float32)
        of_z, of_terms = (p.new_empty(count, 2, C, dtype=torch.float64 if p.device.type == "cpu" else wide)
                          for count in (len(has_norm), len(z_of_term)))
        return of_z, torch.empty_like(of_z, dtype=p.dtype), of_terms

    @torch.library.register_fake("ldarts::norm_gradients")
    def _(rstd_mean, p, grad_rstd_mean, sums, z_of_term, has_norm, count):
        scale = rstd_mean.new_empty(len(p), rstd_mean.shape[2])
        return scale, torch.empty_like(rstd_mean), torch.empty_like(p)

    @torch.library.register_fake("ldarts::norm_derivatives")
    def _(rstd_mean, p, grad_rstd_mean, sums, grad_scale, grad_of_z, grad_p, z_of_term, has_norm, count):
        return tuple(map(torch.empty_like, (rstd_mean, p, rstd_mean, sums)))
