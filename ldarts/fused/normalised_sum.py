"""A node of a cell as one sum of normalised terms.

    y = Σ_m p_m ẑ_m,   ẑ_m = (z_m − μ_m) / σ_m        z_m, y [N, C, H, W]; p_m a number; μ_m, σ_m per channel

over all terms m of all edges into the node is one affine sum, y = Σ_m scale_m z_m + shift_m with scale_m =
p_m / σ_m and shift_m = −scale_m μ_m. A z without a norm behind it has scale_m = p_m and no shift. With
G = ∂L/∂y and means over the pixels of a channel,

    ∂L/∂p_m = Σ G ẑ_m          ∂L/∂z_m = scale_m (G − mean(G) − ẑ_m mean(G ẑ_m))

which is an affine sum of G and z, and what it needs of them are the channel sums ΣG and ΣG z. In between is
arithmetic per channel, in float64 (csrc/norms.h). Written in these operators, a gradient is differentiable
again; its own derivative is written out: made by autograd it would be some fifty operations a call, and a
search step on a GPU would have half as many launches again. There is no third derivative: nothing in the
method needs one.

A z may be a term of several nodes. So that its gradient is one affine sum, autograd sees the terms of all
edges that leave a state as one function; what it gives to a node is a placeholder for each edge, whose
gradient is G.
"""
import functools
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn

from .sums import affine_sums, channel_sums, split


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

    edges: for each the numbers of the z of its terms; has_norm: which z have one; eps: of all norms; z: any
    of them [N, C, H, W]; inner: the first `inner` z are terms of no edge, convolutions read their
    shift + scale z
    """

    def __init__(self, edges: Sequence[Sequence[int]], has_norm: Sequence[bool], eps: float, z: Tensor,
                 inner: int = 0):
        self.edges, self.has_norm, self.eps, self.inner = edges, has_norm, eps, inner
        self.z_of_term = [k for edge in edges for k in edge]
        self.edge_of_term = [e for e, edge in enumerate(edges) for _ in edge]
        pixels = z.numel() // z.shape[1]
        self.numbers = [*range(inner), *self.z_of_term], has_norm, pixels

    def statistics(self, sums: Tensor, p: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """sums: Σz, Σz² of each z with a norm, [norms, 2, C]; p: of each term one number or, as γ, one for
        each channel; beta: [terms, C] or None, 0 -> of each z 1/σ and μ, mean and unbiased variance
        [z, 2, C]; of each term its coefficients. Not differentiable."""
        z_of_term, has_norm, count = self.numbers
        return torch.ops.ldarts.norm_statistics(sums, has_norm, p, beta, z_of_term, count, self.eps)

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


class Terms(NamedTuple):
    """The terms scale_k z_k + shift_k of one edge, for node_sum to read."""

    placeholder: Tensor  # like a z; its gradient is that of the node
    z: Sequence[Tensor]  # K of [N, C, H, W], read without a gradient
    coefficients: Tensor  # [K, 2, C], shift and scale


def normalised_terms(edges: Sequence[Sequence[tuple[Tensor, nn.BatchNorm2d | None]]],
                     p: Tensor) -> list[Terms]:
    """-> for each edge the terms p norm(z), of its pairs of z [N, C, H, W] and norm; None: p z. p: [terms]

    The norms have one eps. Moves their running statistics, as BatchNorm2d does in training.
    """
    terms = [term for edge in edges for term in edge]
    norms = [norm for _, norm in terms]
    places: dict[tuple[int, bool], int] = {}  # of each z, with and without a norm
    place_of_term = [places.setdefault((id(z), norm is None), len(places)) for z, norm in terms]
    zs = [*dict(zip(place_of_term, (z for z, _ in terms))).values()]
    widths = [len(edge) for edge in edges]
    eps = next((norm.eps for norm in norms if norm is not None), 0.0)
    behind = Norms(split(place_of_term, widths), [not plain for _, plain in places], eps, zs[0])
    _, moments, coefficients, *placeholders = NormalisedTerms.apply(behind, *scale_shift_of(norms, p), *zs)
    move_statistics(norms, place_of_term, moments, zs[0])
    return [*map(Terms, placeholders, [[z for z, _ in edge] for edge in edges], coefficients.split(widths))]


def node_sum(terms: Sequence[Terms], factors: Sequence[Tensor] | None = None) -> Tensor:
    """The sum of the terms of all edges, in one pass over them. factors: by which each image of an edge is
    multiplied, for each edge [N], or None"""
    return NodeSum.apply(terms, torch.stack(factors) if factors else None, *[t.placeholder for t in terms])


def normalise(z: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]) -> list[Tensor]:
    """norm(z) of each z [N, C, H, W] in training, as a node of one term."""
    terms = normalised_terms([[term] for term in zip(z, norms)], ones(len(z), z[0]))
    return [node_sum([term]) for term in terms]


def scale_shift_of(norms: Sequence[nn.BatchNorm2d | None], p: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scale and shift of terms behind their norms: p [terms] and None; with an affine norm among them
    [terms, C] both, γ and β of those that are affine, p and 0 of the others."""
    affine = [norm for norm in norms if norm is not None and norm.affine]
    if not affine:
        return p, None
    zero = torch.zeros_like(affine[0].bias)
    pairs = [(norm.weight, norm.bias) if norm in affine else (p[m].expand_as(zero), zero)
             for m, norm in enumerate(norms)]
    return tuple(map(torch.stack, zip(*pairs)))


@torch.no_grad()
def move_statistics(norms: Sequence[nn.BatchNorm2d | None], places: Sequence[int], moments: Tensor,
                    z: Tensor) -> None:
    """Running statistics after a batch. places: of the z in front of each norm; moments: mean and unbiased
    variance of each z, [z, 2, C]; z: one of them; ValueError if it has one pixel, as PyTorch's"""
    if z.numel() == z.shape[1] and any(norm is not None for norm in norms):
        raise ValueError("Expected more than 1 value per channel when training: one image of one pixel")
    of_all = moments.flatten(0, 1).unbind()
    tracked = [(norm, k) for norm, k in zip(norms, places)
               if norm is not None and norm.track_running_stats and norm.running_mean is not None]
    for row, name in enumerate(("running_mean", "running_var") if tracked else ()):
        running = [getattr(norm, name) for norm, _ in tracked]
        new = [of_all[2 * k + row].to(own.dtype).view_as(own) for own, (_, k) in zip(running, tracked)]
        torch._foreach_lerp_(running, new, [float(norm.momentum) for norm, _ in tracked])
    if counts := [norm.num_batches_tracked for norm, _ in tracked if norm.num_batches_tracked is not None]:
        torch._foreach_add_(counts, 1)


class NodeSum(torch.autograd.Function):
    """forward: y = Σ_m scale_m z_m + shift_m. backward: G = ∂L/∂y to every placeholder, times its factors."""

    @staticmethod
    def forward(ctx, terms, factors, *placeholders):
        zs, rows = [z for t in terms for z in t.z], [t.coefficients.flatten(0, 1) for t in terms]
        ctx.count, ctx.factors = len(placeholders), None
        if factors is not None:  # each image has numbers of its own, [rows, N * C]
            ctx.factors = factors.repeat_interleave(zs[0].shape[1], 1)
            images = factors.shape[1]
            rows = [of_edge.repeat(1, images) * factor for of_edge, factor in zip(rows, ctx.factors)]
        return affine_sums(zs, rows, rows, [[(m, 2 * m + 1, 2 * m) for m in range(len(zs))]])[0]

    @staticmethod
    def backward(ctx, grad):
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            raise RuntimeError("ldarts: the engine has no batched gradients (is_grads_batched); "
                               "LDARTS_FUSED=off in the environment computes them")
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.factors is None:
            return None, None, *Copies.apply(grad, ctx.count)
        entries = [[(0, edge, -1)] for edge in range(ctx.count)]
        return None, None, *affine_sums([grad], [ctx.factors], [], entries)


class Copies(torch.autograd.Function):
    """forward: `count` times x. backward: the sum of their gradients, in one pass."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads):
        grads = [grad.contiguous(memory_format=torch.channels_last) for grad in grads if grad is not None]
        return affine_sums(grads, [], [], [[(k, -1, -1) for k in range(len(grads))]])[0], None


class NormalisedTerms(torch.autograd.Function):
    """forward: z -> 1/σ and μ of their norms; mean and unbiased variance; coefficients of the terms; a
    placeholder for each edge. backward: the gradient by 1/σ and μ (None: 0) and G of each edge -> by p, beta
    and each z."""

    @staticmethod
    def forward(ctx, norms, p, beta, *zs):
        normed = [z for z, has in zip(zs, norms.has_norm) if has]
        sums = (channel_sums(normed, normed) if normed else
                zs[0].new_zeros(0, 2, zs[0].shape[1], dtype=torch.float64))
        rstd_mean, moments, coefficients = norms.statistics(sums, p, beta)
        ctx.norms = norms
        ctx.save_for_backward(p, beta, rstd_mean, *zs)
        ctx.mark_non_differentiable(moments, coefficients)
        ctx.set_materialize_grads(False)
        return rstd_mean, moments, coefficients, *(zs[0].view_as(zs[0]) for _ in norms.edges)

    @staticmethod
    def backward(ctx, grad_rstd_mean, _moments, _coefficients, *grads):
        p, beta, rstd_mean, *zs = ctx.saved_tensors
        return None, *TermGradients.apply(ctx.norms, rstd_mean, p, beta, grad_rstd_mean, *zs,
                                          *channels_last(grads, zs[0]))


class TermGradients(torch.autograd.Function):
    """forward: backward of NormalisedTerms: channel sums of G and z, arithmetic, an affine sum. backward:
    autograd's, but in one pass over the tensors."""

    @staticmethod
    def forward(ctx, norms, rstd_mean, p, beta, grad_rstd_mean, *tensors):
        K, M = len(norms.has_norm), len(norms.z_of_term)
        sums = channel_sums(*norms.terms_of(tensors[K:], tensors[:K]))
        inputs = rstd_mean, p, beta, grad_rstd_mean, sums
        scale, of_z, by_p, by_beta = norms.gradients(*inputs)
        ctx.norms = norms
        ctx.save_for_backward(scale, of_z, *inputs, *tensors)
        # By a z: Σ scale G over its terms + of_z[0] + of_z[1] z
        entries = [[(k, M + 2 * k + 1, 2 * k)] if has else [] for k, has in enumerate(norms.has_norm)]
        for m, (k, edge) in enumerate(zip(norms.z_of_term, norms.edge_of_term)):
            entries[k].append((K + edge, m, -1))
        rows = of_z.flatten(0, 1)
        return by_p, by_beta, *affine_sums(tensors, [scale, rows], [rows], entries)

    @staticmethod
    def backward(ctx, grad_p, grad_beta, *w):
        norms, K, (scale, of_z, *saved) = ctx.norms, len(w), ctx.saved_tensors
        inputs, zs, grads = saved[:5], saved[5 : 5 + K], saved[5 + K :]
        w = channels_last(w, zs[0])
        grads_of_terms, w_of_terms = norms.terms_of(grads, w)
        of_w = channel_sums([*w, *grads_of_terms], [*zs, *w_of_terms])
        *by_inputs, by_sums = norms.derivatives(inputs, (of_w[K:, 1], of_w[:K], grad_p, grad_beta))
        by_z, by_grads = derivatives(norms, zs, grads, w, scale, of_z, by_sums)
        return None, *by_inputs, *by_z, *by_grads


def derivatives(norms, zs, grads, w, scale, of_z, by_grad_sums):
    """-> by each z and each G. Of the gradients by each z, whose own gradients are w (None: 0), and of the
    sums ΣG and ΣG z of each term, whose gradients are by_grad_sums:

        by z: of_z[1] w + Σ B G     by G: Σ scale w + A + B z     over the terms; A, B: by_grad_sums
    """
    E, K, M = len(grads), len(zs), len(scale)
    by_z: list[list] = [[(E + K + k, M + 2 * k + 1, -1)] if w else [] for k in range(K)]
    by_grads: list[list] = [[] for _ in grads]
    for m, (k, e) in enumerate(zip(norms.z_of_term, norms.edge_of_term), norms.inner):
        row = M + 2 * K + 2 * m + 1
        by_z[k].append((e, row, -1))
        by_grads[e] += [(E + k, row, 2 * m), *([(E + K + k, m, -1)] if w else [])]
    rows = by_grad_sums.flatten(0, 1)
    tensors = [*grads, *zs, *(w or [])]
    sums = affine_sums(tensors, [scale, of_z.flatten(0, 1), rows], [rows], [*by_grads, *by_z])
    return sums[E:], sums[:E]


def channels_last(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """None: 0."""
    return [(torch.zeros_like(like) if grad is None else grad).contiguous(memory_format=torch.channels_last)
            for grad in grads]
