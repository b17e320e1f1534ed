"""A node of a cell as one sum of normalised terms.

    y = Σ_m p_m ẑ_m,   ẑ_m = (z_m − μ_m) / σ_m        z_m, y [N, C, H, W]; p_m a number; μ_m, σ_m per channel

over all terms m of all edges into the node, in one pass over the z: y = Σ_m scale_m z_m + shift, where
scale_m = p_m / σ_m and shift = −Σ_m scale_m μ_m. A z without a norm behind it has scale_m = p_m and no
shift. With G = ∂L/∂y and means over the pixels of a channel,

    ∂L/∂p_m = Σ G ẑ_m          ∂L/∂z_m = scale_m (G − mean(G) − ẑ_m mean(G ẑ_m))

whose sums ΣG and ΣG z_m, per channel, are all that is needed beside G and z. Autograd sees two functions:
NormalisedTerms makes the terms of the edges that leave a state, NodeSum adds up those of the edges into a
node. Between them goes one `link` an edge: a tensor like a z that nobody reads and whose gradient is G.

The operators are those of csrc/norms.cpp and separable.cpp, on CUDA those of csrc/normalised_sum_cuda.cpp
(not yet run on a GPU): there nothing is read back, so that a CUDA graph can hold them.
"""
from functools import cache
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Terms(NamedTuple):
    """The terms scale_k z_k + shift_k of one edge, for node_sum to read."""

    link: Tensor  # its gradient is that of the node
    z: Sequence[Tensor]  # K of [N, C, H, W], read without a gradient
    scale: Tensor  # [K, C], p / σ
    shift: Tensor  # [K, C], −p μ / σ


def normalised_terms(z: Sequence[Tensor], norms: Sequence[Sequence[nn.BatchNorm2d]],
                     edges: Sequence[Sequence[int]], p: Tensor) -> list[Terms]:
    """-> for each edge the terms p ẑ_k, k from `edges`; p [sum of their lengths].

    norms: the batch norms that z_k stands before, all with the same result; none: the term is p z_k. Moves
    their running statistics, as BatchNorm2d does in training.
    """
    has_norm = [bool(of_z) for of_z in norms]
    eps = next((of_z[0].eps for of_z in norms if of_z), 0.0)
    _, mean_var, scale_shift, *links = NormalisedTerms.apply(edges, has_norm, eps, p, *z)
    if any(has_norm):
        moments = [of_z for of_z, behind in zip(mean_var.unbind(), norms) for _ in behind]
        move_statistics([norm for behind in norms for norm in behind], moments, pixels(z[0]))
    return terms_of_edges(links, [[z[k] for k in edge] for edge in edges], scale_shift)


def terms_of_edges(links: Sequence[Tensor], z: Sequence[Sequence[Tensor]],
                   scale_shift: Tensor) -> list[Terms]:
    """z: of each edge; scale_shift [2, terms of all edges, C]"""
    scales, shifts = (of_terms.split([len(edge) for edge in z]) for of_terms in scale_shift)
    return [Terms(*edge) for edge in zip(links, z, scales, shifts)]


def node_sum(terms: Sequence[Terms]) -> Tensor:
    """The sum of the terms of all edges, in one pass over them."""
    return NodeSum.apply([t.scale for t in terms], [t.shift for t in terms], [z for t in terms for z in t.z],
                         *[t.link for t in terms])


def normalise(z: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d]) -> list[Tensor]:
    """norm(z) of each z [N, C, H, W] in training, as a node of one term."""
    p = ones(len(z), torch.promote_types(z[0].dtype, torch.float32), z[0].device)
    terms = normalised_terms(z, [[norm] for norm in norms], [[k] for k in range(len(z))], p)
    found = [node_sum([term]) for term in terms]
    return [(y * norm.weight[:, None, None] + norm.bias[:, None, None]).to(y.dtype) if norm.affine else y
            for y, norm in zip(found, norms)]


@cache  # made once, before a CUDA graph is captured; in inference mode too for training
@torch.inference_mode(False)
def ones(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(count, dtype=dtype, device=device)


@torch.no_grad()
def move_statistics(norms: Sequence[nn.BatchNorm2d], mean_var: Sequence[Tensor], count: int) -> None:
    """Running statistics after a batch: `count` pixels, mean and (biased) variance for each norm, [2, C]."""
    by_momentum: dict[float, list[tuple[nn.BatchNorm2d, Tensor]]] = {}
    for norm, of_norm in zip(norms, mean_var):
        if norm.track_running_stats:
            by_momentum.setdefault(norm.momentum, []).append((norm, of_norm.to(norm.running_mean.dtype)))
    for momentum, tracked in by_momentum.items():
        tracking, mean_var = zip(*tracked)
        mean, variance = zip(*mean_var)
        unbiased = torch._foreach_mul(variance, count / max(1, count - 1))
        torch._foreach_lerp_([norm.running_mean for norm in tracking], mean, momentum)
        torch._foreach_lerp_([norm.running_var for norm in tracking], unbiased, momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in tracking], 1)


def pixels(z: Tensor) -> int:
    """How many there are of each channel."""
    return z.numel() // z.shape[1]


def register_shapes() -> None:
    """What the operators of csrc/ return, for tensors without values."""
    fake = torch.library.register_fake

    @fake("ldarts::channel_sums")
    def _(x, y):
        return x[0].new_empty(len(x), 2, x[0].shape[1], dtype=torch.float64)

    @fake("ldarts::node_sum")
    def _(scales, shifts, z):
        return torch.empty_like(z[0], memory_format=torch.channels_last)

    @fake("ldarts::norm_statistics")
    def _(z_sums, has_norm, p, z_of_term, count, eps):
        C = z_sums.shape[2]
        of_z = [p.new_empty(len(has_norm), 2, C) for _ in range(2)]
        return *of_z, p.new_empty(2, len(z_of_term), C)

    @fake("ldarts::term_gradients")
    def _(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, edge_of_term, has_norm, z, grad_edges):
        return torch.empty_like(p), [torch.empty_like(t, memory_format=torch.channels_last) for t in z]

    @fake("ldarts::term_gradients_backward")
    def _(rstd_mean, p, grad_rstd_mean, grad_sums, z_of_term, edge_of_term, has_norm, z, grad_edges, *rest):
        by_z, by_grads = ([torch.empty_like(t, memory_format=torch.channels_last) for t in tensors]
                          for tensors in (z, grad_edges))
        return torch.empty_like(rstd_mean), torch.empty_like(p), torch.empty_like(rstd_mean), by_z, by_grads


class NodeSum(torch.autograd.Function):
    """forward: y = Σ_m scale_m z_m + shift_m. backward: G = ∂L/∂y to every link, differentiable again."""

    @staticmethod
    def forward(ctx, scales, shifts, zs, *links):
        ctx.count = len(links)
        return torch.ops.ldarts.node_sum(scales, shifts, zs)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous(memory_format=torch.channels_last)
        return None, None, None, *Copies.apply(grad, ctx.count)


class Copies(torch.autograd.Function):
    """forward: `count` times x. backward: the sum of their gradients, in one pass, differentiable again."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads):
        found = [grad for grad in grads if grad is not None]
        return Total.apply(*found) if len(found) > 1 else found[0], None


class Total(torch.autograd.Function):
    """forward: the sum of tensors, in one pass. backward: its gradient to each."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.count = len(tensors)
        return torch.ops.ldarts.node_sum([], [], tensors)

    @staticmethod
    def backward(ctx, grad):
        return Copies.apply(grad.contiguous(memory_format=torch.channels_last), ctx.count)


class TermNorms:
    """Arithmetic of the norms behind some z, for any terms of these, per channel in float64 (csrc/norms.h).

    z_of_edge: for each edge the z of its terms; has_norm: which z have one; grads, below: each edge's G.
    """

    def __init__(self, z_of_edge: Sequence[Sequence[int]], has_norm: Sequence[bool]):
        self.z_of_term = [k for edge in z_of_edge for k in edge]
        self.edge_of_term = [e for e, edge in enumerate(z_of_edge) for _ in edge]
        self.has_norm, self.edges = [int(one) for one in has_norm], len(z_of_edge)

    def statistics(self, moments, p, count, eps):
        """moments Σz, Σz² [z, 2, C] -> 1/σ and μ, mean and variance [z, 2, C]; scale, shift [2, terms, C]."""
        return torch.ops.ldarts.norm_statistics(moments, self.has_norm, p, self.z_of_term, count, eps)

    def grad_sums(self, grads, zs):
        """ΣG and ΣG z of each term, [terms, 2, C]."""
        return channel_sums(self.of_terms(grads), [zs[k] for k in self.z_of_term], zs[0])

    def of_terms(self, grads):
        """The gradient of each term's node."""
        return [grads[e] for e in self.edge_of_term]

    def gradients(self, rstd_mean, p, grad_rstd_mean, grad_sums, zs):
        """-> scale [terms, C], grad_moments [z, 2, C], by p.

        The gradient by a z is Σ scale G over its terms + grad_moments[0] + 2 grad_moments[1] z.
        """
        return torch.ops.ldarts.norm_gradients(rstd_mean, p, grad_rstd_mean, grad_sums, self.z_of_term,
                                               self.has_norm, pixels(zs[0]))

    def gradients_by_z(self, rstd_mean, p, grad_rstd_mean, grad_sums, zs, grads):
        """-> the gradients by p and by each z, where nothing but the norms stands behind a z."""
        return torch.ops.ldarts.term_gradients(rstd_mean, p, grad_rstd_mean, grad_sums, self.z_of_term,
                                               self.edge_of_term, self.has_norm, zs, grads)

    def derivatives(self, numbers, zs, grads, w, may_overwrite, w_sums, grad_w_sums, v_p):
        """Backward of `gradients`, whose first four arguments are `numbers`, and of the gradients by each z.

        w: the gradients by those by each z (none: 0), with w_sums [z, 2, C], Σw and Σw z, and grad_w_sums
        [terms, C], ΣG w; v_p: that by the gradient by p; may_overwrite: which w nobody reads again. ->
        gradients by rstd_mean, p and grad_rstd_mean, each z and each G.
        """
        by_rstd_mean, by_p, by_grad, by_z, by_grads = torch.ops.ldarts.term_gradients_backward(
            *numbers, self.z_of_term, self.edge_of_term, self.has_norm, zs, grads, w, may_overwrite, w_sums,
            grad_w_sums, v_p)
        by_grad = None if numbers[2] is None else by_grad
        return by_rstd_mean, by_p, by_grad, [d if d.numel() else None for d in by_z], by_grads


class NormalisedTerms(torch.autograd.Function):
    """forward: z -> 1/σ and μ of their norms, their mean and variance, scale and shift of the terms, a link
    for each edge. backward: G of each edge (and the gradient by 1/σ and μ) -> gradients by p and each z.
    Differentiable again through NormalisedTermsGrad."""

    @staticmethod
    def forward(ctx, edges, has_norm, eps, p, *zs):
        norms, behind = TermNorms(edges, has_norm), [z for z, one in zip(zs, has_norm) if one]
        moments = channel_sums(behind, behind, zs[0])
        rstd_mean, mean_var, scale_shift = norms.statistics(moments, p, pixels(zs[0]), eps)
        ctx.norms = norms
        ctx.save_for_backward(p, rstd_mean, *zs)
        ctx.mark_non_differentiable(mean_var, scale_shift)
        ctx.set_materialize_grads(False)
        return rstd_mean, mean_var, scale_shift, *(zs[0].view_as(zs[0]) for _ in edges)

    @staticmethod
    def backward(ctx, grad_rstd_mean, _mean_var, _scale_shift, *grads):
        p, rstd_mean, *zs = ctx.saved_tensors
        arguments = ctx.norms, p, rstd_mean, grad_rstd_mean, *zs, *zeros_for_none(grads, [zs[0]] * len(grads))
        again = torch.is_grad_enabled()  # without a derivative to come, the plain call, which saves nothing
        found = NormalisedTermsGrad.apply(*arguments) if again else NormalisedTermsGrad.compute(*arguments)[0]
        return None, None, None, *found


class NormalisedTermsGrad(torch.autograd.Function):
    """forward: backward of NormalisedTerms. backward: derivatives by p, 1/σ, μ, each z and each G, once."""

    @staticmethod
    def compute(norms, p, rstd_mean, grad_rstd_mean, *tensors):
        """-> the results; sums that their derivatives need again"""
        zs, grads = tensors[: len(norms.has_norm)], tensors[len(norms.has_norm) :]
        grad_sums = norms.grad_sums(grads, zs)
        by_p, by_z = norms.gradients_by_z(rstd_mean, p, grad_rstd_mean, grad_sums, zs, grads)
        return (by_p, *by_z), grad_sums

    @staticmethod
    def forward(ctx, norms, p, rstd_mean, grad_rstd_mean, *tensors):
        results, grad_sums = NormalisedTermsGrad.compute(norms, p, rstd_mean, grad_rstd_mean, *tensors)
        ctx.norms = norms
        ctx.save_for_backward(p, rstd_mean, grad_rstd_mean, grad_sums, *tensors)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, v_p, *w):
        norms, (p, rstd_mean, grad_rstd_mean, grad_sums, *tensors) = ctx.norms, ctx.saved_tensors
        count = len(w)
        zs, grads = tensors[:count], tensors[count:]
        w = [one.contiguous(memory_format=torch.channels_last) for one in w]
        sums = torch.ops.ldarts.channel_sums([*w, *norms.of_terms(grads)],
                                             [*zs, *(w[k] for k in norms.z_of_term)])
        w_sums, grad_w_sums = sums.split([count, len(p)])
        by_rstd_mean, by_p, by_grad_rstd_mean, by_z, by_grads = norms.derivatives(
            (rstd_mean, p, grad_rstd_mean, grad_sums), zs, grads, w, [False] * count, w_sums,
            grad_w_sums[:, 1], v_p)
        return None, by_p, by_rstd_mean, by_grad_rstd_mean, *by_z, *by_grads


def channel_sums(x, y, like):
    """Σx and Σx y per channel of each pair, [pairs, 2, C] in float64. like: any tensor of these channels"""
    if not x:
        return like.new_zeros(0, 2, like.shape[1], dtype=torch.float64)
    return torch.ops.ldarts.channel_sums(x, y)


def zeros_for_none(tensors, like):
    return [torch.zeros_like(t) if v is None else v for v, t in zip(tensors, like)]
