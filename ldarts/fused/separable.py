"""Separable convolutions: all that leave one state, with the batch norms around them, in a few calls (CPU).

A pair is a depthwise and a pointwise convolution and the norm behind them. Of each pair u

    z_u = P_u D_u a_u,   a_u = relu(s_u x_u + b_u)          x_u [N, C, H, W]; s_u, b_u per channel

and the sums of z_u and z_u² that its norm needs are computed; s and b are the coefficients of the norm in
front of it (none: s = 1, b = 0). csrc/separable.cpp goes through them an image at a time and keeps only z:
the outputs of norm and ReLU are never stored; the backward pass computes them again.
With Z = ∂L/∂z, which is made of the G of the nodes that z is a term of (see normalised_sum) and of what reads
z otherwise,

    ∂L/∂P = Z (D a)ᵀ     ∂L/∂D = (Pᵀ Z) ⋆ a     ∂L/∂x = s · 1[s x + b > 0] · Dᵀ Pᵀ Z

z is linear in each of a, D and P, so a derivative of these is the same computation with one of them replaced
by its tangent. Tests compare all this, second derivatives included, with the plain form in operations.py.
"""
from collections import Counter
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn

from .normalised_sum import Norms, Terms, channels_last, derivatives, move_statistics, scale_shift_of
from .recognise import is_1x1
from .sums import channel_sums, split


class Pair(NamedTuple):
    """A depthwise and a pointwise convolution, and the norm behind them."""

    depthwise: nn.Conv2d
    pointwise: nn.Conv2d
    norm: nn.BatchNorm2d


def pairs_of(chain: Sequence, norm: nn.BatchNorm2d | None) -> list[Pair]:
    """The one or two pairs that norm(chain(x)) consists of, each behind a ReLU; [] for anything else."""
    links, types = [*chain, norm], [nn.ReLU, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]
    if [type(link) for link in links] not in (types, 2 * types):
        return []
    pairs = [Pair(*links[i + 1 : i + 4]) for i in range(0, len(links), 4)]
    return pairs if all(is_pair(*pair, norm, first=pair is pairs[0]) for pair in pairs) else []


def is_pair(depthwise, pointwise, inner, norm, first: bool) -> bool:
    """Whether the operators of csrc/separable.cpp compute these three. norm: that at the end of the chain."""
    C, k, dilation = depthwise.groups, depthwise.kernel_size[0], depthwise.dilation[0]
    return (depthwise.stride in ([(1, 1), (2, 2)] if first else [(1, 1)])
            and depthwise.kernel_size == (k, k) and k % 2 == 1 and depthwise.dilation == (dilation, dilation)
            and depthwise.padding == (dilation * (k // 2),) * 2 and depthwise.padding_mode == "zeros"
            and depthwise.bias is None and is_1x1(pointwise, 1)
            and depthwise.weight.shape == (C, 1, k, k) and pointwise.weight.shape == (C, C, 1, 1)
            and inner.eps == norm.eps)


def separable_convolutions(x: Sequence[Tensor], affine: Tensor | None, pairs: Sequence[Pair], p: Tensor,
                           edges: Sequence[int]) -> tuple[list[Tensor], Tensor, dict[int, Terms]]:
    """-> z of each pair [N, C, H, W], channels-last; shift and scale of the norms behind those of no edge,
    [these, 2, C] in float64; the terms of each edge.

    x: one input [N, C, H, W] for all pairs, or one each; affine: [pairs, 2, C], b and s; None: 0 and 1; p:
    [pairs]; edges: of which edge each of the last pairs is a term, those of an edge side by side. Moves the
    running statistics of the norms that track them, as BatchNorm2d does in training.
    """
    counts = Counter(edges)
    widths = [*counts.values()]
    stride, dilations = pairs[0][0].stride[0], [depthwise.dilation[0] for depthwise, _, _ in pairs]
    norms = [norm for _, _, norm in pairs]
    weights = [pair[k].weight for k in (0, 1) for pair in pairs]  # depthwise ones, pointwise ones
    inner, _, moments, coefficients, *tensors = SeparableConvolutions.apply(
        (stride, dilations), norms[0].eps, widths, *scale_shift_of(norms, p), affine, *x, *weights)
    z, placeholders = tensors[: len(pairs)], tensors[len(pairs) :]
    move_statistics(norms, range(len(norms)), moments, z[0])
    terms = map(Terms, placeholders, split(z[len(inner) :], widths), coefficients.split(widths))
    return z, inner, dict(zip(counts, terms))


class SeparableConvolutions(torch.autograd.Function):
    """forward: x, depthwise and pointwise weights -> coefficients of the inner norms; 1/σ and μ, mean and
    variance of all; coefficients of the terms; z of each pair; a placeholder for each edge. backward: the
    gradients by those -> by p, beta, affine, x and the weights that are asked for. Differentiable again
    through SeparableConvolutionsGrad."""

    @staticmethod
    def forward(ctx, geometry, eps, widths, p, beta, affine, *tensors):
        count = len(geometry[1])
        x, depthwise, pointwise = split(tensors, [len(tensors) - 2 * count, count, count])
        zs, sums = torch.ops.ldarts.separable_forward(x, affine, depthwise, pointwise, *geometry)
        inner = count - sum(widths)
        norms = Norms(split(range(inner, count), widths), [True] * count, eps, zs[0], inner)
        rstd_mean, moments, coefficients = norms.statistics(sums, p, beta)
        of_inner, of_terms = coefficients.split([inner, count - inner])
        ctx.geometry, ctx.norms = geometry, norms
        ctx.save_for_backward(p, beta, affine, rstd_mean, *tensors, *zs)
        ctx.mark_non_differentiable(moments, of_terms)
        ctx.set_materialize_grads(False)
        return of_inner, rstd_mean, moments, of_terms, *zs, *(zs[-1].view_as(zs[-1]) for _ in widths)

    @staticmethod
    def backward(ctx, grad_inner, grad_rstd_mean, _moments, _of_terms, *grads):
        p, beta, affine, rstd_mean, *saved = ctx.saved_tensors
        count = len(ctx.geometry[1])
        nodes = [node for node, _ in ctx.next_functions][1 + (beta is not None) :]  # of affine, x, weights
        asked = [any(map(asked_for, part)) for part in (nodes[: -2 * count], nodes[-2 * count :])]
        grad_z, grad_edges = grads[:count], channels_last(grads[count:], saved[-1])
        if grad_inner is None:
            grad_inner = rstd_mean.new_zeros(ctx.norms.inner, *rstd_mean.shape[1:])
        return None, None, None, *SeparableConvolutionsGrad.apply(
            ctx.geometry, ctx.norms, asked, rstd_mean, p, beta, grad_rstd_mean, affine, grad_inner,
            *saved, *grad_z, *grad_edges)


def asked_for(node: torch.autograd.graph.Node | None) -> bool:
    """Whether the running backward pass computes the gradient that goes to this node of the graph."""
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # how it says that autograd.grad asks for a leaf
        return True


class SeparableConvolutionsGrad(torch.autograd.Function):
    """forward: backward of SeparableConvolutions: gradients by p, beta, affine, each x and each weight of
    both kinds, from those by 1/σ and μ, the inner norms' coefficients, each z (or None) and each edge's G.
    backward: its derivatives, once."""

    @staticmethod
    def forward(ctx, geometry, norms, asked, rstd_mean, p, beta, grad_rstd_mean, affine, grad_inner,
                *tensors):
        """asked: by affine and x, by the weights"""
        x, depthwise, pointwise, zs, grad_z, grads = parts(geometry, norms, tensors)
        grad_terms, z_of_terms = norms.terms_of(grads, zs)
        grad_sums = torch.cat([grad_inner, channel_sums(grad_terms, z_of_terms)]) if grads else grad_inner
        inputs = rstd_mean, p, beta, grad_rstd_mean, grad_sums
        scale, of_z, by_p, by_beta = norms.gradients(*inputs)
        by_x, by_affine, by_depthwise, by_pointwise, _, _ = torch.ops.ldarts.separable_backward(
            x, [], affine, depthwise, pointwise, *geometry, zs, grad_z, grad_terms, scale, of_z,
            *asked, False)
        ctx.geometry, ctx.norms = geometry, norms
        ctx.save_for_backward(affine, *inputs, *tensors)
        ctx.set_materialize_grads(False)
        nothing = [None] * len(zs)
        return (by_p, by_beta, *(by_affine or [None]), *(by_x or [None] * len(x)),
                *(by_depthwise or nothing), *(by_pointwise or nothing))

    @staticmethod
    def backward(ctx, v_p, v_beta, v_affine, *v):
        affine, *inputs = ctx.saved_tensors[:6]
        geometry, norms, tensors = ctx.geometry, ctx.norms, ctx.saved_tensors[6:]
        x, depthwise, pointwise, zs, grad_z, grads = parts(geometry, norms, tensors)
        grad_terms, _ = norms.terms_of(grads, zs)
        scale, of_z, *_ = norms.gradients(*inputs)
        v_x, v_depthwise, v_pointwise = split(v, [len(x), len(zs), len(zs)])

        def derive(tangent, affine, depthwise, pointwise, with_input=True):
            """By x, affine, D and P, w and sums of w, of one summand of z'."""
            return torch.ops.ldarts.separable_backward(
                x, tangent, affine, depthwise, pointwise, *geometry, zs, grad_z, grad_terms, scale, of_z,
                with_input, True, True)

        # Added up over the summands, a, D or P replaced by its tangent, by which itself there is no gradient.
        total = [[]] * 6
        if v_affine is not None or any_given(v_x):
            tangents = affine if v_affine is None else torch.cat([affine, v_affine], 1)
            total = derive(zeros_for_none(v_x, x), tangents, depthwise, pointwise, affine is not None)
        if any_given(v_depthwise):
            new = [*derive([], affine, zeros_for_none(v_depthwise, depthwise), pointwise)]
            total = add_up(total, [*new[:2], [], *new[3:]])
        if any_given(v_pointwise):
            new = [*derive([], affine, depthwise, zeros_for_none(v_pointwise, pointwise))]
            total = add_up(total, [*new[:3], [], *new[4:]])
        by_x, by_affine, by_depthwise, by_pointwise, w, w_sums = total
        # By what csrc/norms.h computes: scale by Σ w G, of_z by Σ w and Σ w z, by_p by v_p.
        by_scale, by_of_z = (w_sums[0][:, 2], w_sums[0][:, :2]) if w else (None, None)
        *by_inputs, by_sums = norms.derivatives(inputs, (by_scale, by_of_z, v_p, v_beta))
        by_z, by_grads = derivatives(norms, zs, grads, w, scale, of_z, by_sums)
        nothing = [None] * len(zs)
        by_grad_z = [None if g is None else by for g, by in zip(grad_z, w or nothing)]
        return (None, None, None, *by_inputs, *(by_affine or [None]), by_sums[: norms.inner],
                *(by_x or [None] * len(x)), *(by_depthwise or nothing), *(by_pointwise or nothing),
                *by_z, *by_grad_z, *by_grads)


def parts(geometry, norms, tensors):
    """-> x, depthwise and pointwise weights, z, the gradients by z, G of each edge"""
    count, edges = len(geometry[1]), len(norms.edges)
    return split(tensors, [len(tensors) - 4 * count - edges, *[count] * 4, edges])


def any_given(tensors):
    return any(t is not None for t in tensors)


def zeros_for_none(tensors, like):
    return [torch.zeros_like(t) if v is None else v for v, t in zip(tensors, like)]


def add_up(old, new):
    """The sums of lists of tensors, of which any may be []."""
    return [[*map(torch.add, a, b)] if a and b else a or b for a, b in zip(old, new)]
