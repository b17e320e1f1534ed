"""Batch norms behind the terms of a sum: arithmetic on numbers per channel, in float64.

The two operators of csrc/norms.cpp. What a gradient of a gradient needs is left to autograd.
"""
import functools
from functools import partial
from typing import Callable, Sequence

import torch
from torch import Tensor, nn


def constant(numbers: tuple[float, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor of numbers on the device of another. Made once: a CUDA graph has no copies to the device."""
    make = _constant if is_plain(like) else _constant.__wrapped__
    return make(numbers, dtype, like.device)


def ones(count: int, like: Tensor) -> Tensor:
    """p of terms without one, in float32 or wider."""
    return constant((1.0,) * count, torch.promote_types(like.dtype, torch.float32), like)


def membership(rows: tuple[int, ...], count: int, like: Tensor) -> Tensor:
    """[count, len(rows)] in float64: 1 in row r and column i where rows[i] is r. A product with it adds up
    what belongs to each r, always in one order. Made once."""
    make = _membership if is_plain(like) else _membership.__wrapped__
    return make(rows, count, like.device)


def is_plain(t: Tensor) -> bool:
    """Not a tensor of a trace, whose constants are of that trace alone."""
    return type(t) in (Tensor, nn.Parameter)


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

    edges: for each the numbers of the z of its terms; has_norm: which z have one; count: pixels of a channel
    """

    def __init__(self, edges: Sequence[Sequence[int]], has_norm: Sequence[bool], count: int):
        self.edges, self.has_norm, self.count = edges, [int(has) for has in has_norm], count
        self.z_of_term = [k for edge in edges for k in edge]
        self.edge_of_term = [e for e, edge in enumerate(edges) for _ in edge]
        self.numbers = self.z_of_term, self.has_norm, count

    def statistics(self, sums: Tensor, p: Tensor, gamma_beta: Tensor | None,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """sums: Σz, Σz² of each z with a norm, [norms, 2, C]; gamma_beta: γ and β of each term's norm, [2,
        terms, C], where p is 1, or None -> of each z 1/σ and μ, mean and variance [z, 2, C]; scale and shift
        of each term [2, terms, C]. Not differentiable."""
        rstd_mean, mean_var, scale_shift = torch.ops.ldarts.norm_statistics(
            sums, self.has_norm, p, self.z_of_term, self.count, eps)
        if gamma_beta is not None:
            (scale, shift), (gamma, beta) = scale_shift, gamma_beta
            scale_shift = torch.stack([gamma * scale, gamma * shift + beta])
        return rstd_mean, mean_var, scale_shift

    def gradients(self, rstd_mean: Tensor, p: Tensor, grad_rstd_mean: Tensor | None,
                  gamma_beta: Tensor | None, sums: Tensor,
                  compute: Callable | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """sums: ΣG, ΣG z of each term -> scale [terms, C], of_z [z, 2, C], by p [terms], by γ and β.

        The gradient by a z is Σ scale G over its terms + of_z[0] + of_z[1] z. grad_rstd_mean: that by 1/σ and
        μ of what else reads them, or None. With γ and β, ẑ = (z − μ) / σ has the gradient γ G.
        """
        compute = compute or NormGradients.apply
        if gamma_beta is None:
            return *compute(rstd_mean, p, grad_rstd_mean, sums, *self.numbers), None
        gamma = gamma_beta[0].double()
        scale, of_z, by_p = compute(rstd_mean, p, grad_rstd_mean, gamma[:, None] * sums, *self.numbers)
        z_of_term = constant(tuple(self.z_of_term), torch.int64, rstd_mean)
        rstd, mean = rstd_mean.double().index_select(0, z_of_term).unbind(1)
        of_grad, of_product = sums.unbind(1)
        by_gamma_beta = torch.stack([rstd * (of_product - mean * of_grad), of_grad])  # Σ G ẑ, Σ G
        return gamma * scale, of_z, by_p, by_gamma_beta.to(gamma_beta.dtype)

    def derivatives(self, inputs: Sequence[Tensor | None],
                    grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients by the inputs of `gradients`, of those by its results."""
        return differentiate(partial(self.gradients, compute=norm_gradients_ref), inputs, grads)

    def terms_of(self, grads: Sequence[Tensor], zs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """G and z of each term."""
        return [grads[e] for e in self.edge_of_term], [zs[k] for k in self.z_of_term]


def norm_gradients_ref(rstd_mean, p, grad_rstd_mean, sums, z_of_term, has_norm, count):
    """csrc's norm_gradients in PyTorch, in few operations; the formulas are those of csrc/norms.h."""
    of_term = membership(tuple(z_of_term), len(has_norm), sums)  # [z, terms]
    per_pixel = constant(tuple(float(has) / count for has in has_norm), torch.float64, sums)[:, None]
    rstd_mean, p, (of_grad, of_product) = rstd_mean.double(), p.double()[:, None], sums.unbind(1)
    C, (rstd, mean) = rstd_mean.shape[2], rstd_mean.unbind(1)
    rstd_of_term, mean_of_term = (of_term.T @ rstd_mean.flatten(1)).split(C, 1)
    scale = p * rstd_of_term
    centred = torch.addcmul(of_product, mean_of_term, of_grad, value=-1)  # Σ G (z − μ)
    by_rstd, minus_by_mean = (of_term @ torch.cat([p * centred, scale * of_grad], 1)).split(C, 1)
    if grad_rstd_mean is not None:
        by_rstd, minus_by_mean = by_rstd + grad_rstd_mean[:, 0], minus_by_mean - grad_rstd_mean[:, 1]
    twice_by_var = -per_pixel * rstd**3 * by_rstd
    shift = -torch.addcmul(per_pixel * minus_by_mean, mean, twice_by_var)
    return scale, torch.stack([shift, twice_by_var], 1), (rstd_of_term * centred).sum(1)


class NormGradients(torch.autograd.Function):
    """norm_gradients_ref, fused; backward differentiates that form."""

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
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because what one input owes to another is no part of these derivatives.
        leaves = [None if t is None else t.view_as(t) if again and t.requires_grad
                  else t.detach().requires_grad_() for t in inputs]
        given = [(result, grad.to(result.dtype)) for result, grad in zip(compute(*leaves), grads)
                 if grad is not None]
        tensors = [t for t in leaves if t is not None]
        found = [None] * len(tensors)
        if given:
            results, grads = zip(*given)
            found = torch.autograd.grad(results, tensors, grads, create_graph=again, materialize_grads=True)
    found = iter(found)
    return [None if t is None else next(found) for t in leaves]


def register() -> None:
    """Shapes of what the operators of norms.cpp return, for tensors without values."""
    @torch.library.register_fake("ldarts::norm_statistics")
    def _(z_sums, has_norm, p, z_of_term, count, eps):
        of_z = [p.new_empty(len(has_norm), 2, z_sums.shape[2]) for _ in range(2)]
        return *of_z, p.new_empty(2, len(z_of_term), z_sums.shape[2])

    @torch.library.register_fake("ldarts::norm_gradients")
    def _(rstd_mean, p, grad_rstd_mean, sums, z_of_term, has_norm, count):
        C = rstd_mean.shape[2]
        return p.new_empty(len(p), C), p.new_empty(len(has_norm), 2, C), torch.empty_like(p)
