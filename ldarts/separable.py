"""Banks of separable convolutions: all that leave one state, with the batch norms around them, in a few calls (CPU).

A unit computes z = P D a from a = relu(s x + b), D depthwise and P pointwise, and the sums of z and z² that its batch norm
needs; s and b are those of the norm in front of it. csrc/separable.cpp computes a bank of units and its gradients, an image at
a time, keeping nothing but z: what a batch norm or a ReLU would put out never is in memory. A node of a cell then is one sum

    Σ_m p_m (z_m - μ_m) / σ_m

over all terms of all edges, the pools and reductions included (`fan`), and its gradient G goes back as it is to one token for
each edge; whoever made the terms multiplies it by p_m / σ_m where it is read. The operations of `operations.py`, called one
after the other, are the plain form that tests hold all this to, gradients of gradients included.
"""
import copy
import itertools
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Unit = tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]  # depthwise, pointwise, the norm behind them


class Terms(NamedTuple):
    """Terms p_k (z_k - μ_k) / σ_k of one edge, for `node` to read."""

    token: Tensor  # of the shape of a z; its gradient is that of the node
    z: Sequence[Tensor]  # K of [N, C, H, W], read without a gradient
    scale: Tensor  # [K, C], p / σ
    shift: Tensor  # [K, C], -p μ / σ


def bank(x: Sequence[Tensor], before: Tensor | None, units: Sequence[Unit], p: Tensor, widths: Sequence[int],
         p_first: bool = False) -> tuple[list[Tensor], Tensor, list[Terms]]:
    """-> z of each unit, channels-last; the table [U, 2, C] of 1/σ and μ of their norms; the terms of each edge.

    x: one input [N, C, H, W] for all units, or one each. before: None, or the table of the norms in front, [U, 2, C]. p: the
    weights of the units that are terms, [L], the last L of them; widths: how many of these each edge has, at least 1. p_first: a
    backward pass with create_graph computes no gradient by the weights. Moves the running statistics of the norms that track
    them, as BatchNorm2d does in training.
    """
    geometry = units[0][0].stride[0], [depthwise.dilation[0] for depthwise, _, _ in units]
    weights = [unit[k].weight for k in (0, 1) for unit in units]
    table, statistics, numbers, *zs = _Bank.apply(geometry, units[0][2].eps, widths, p_first, before, p, *x, *weights)
    zs, tokens = zs[: len(units)], zs[len(units) :]
    move_statistics([norm for _, _, norm in units], statistics, pixels(zs[0]))
    of_edge = _split(zs[len(zs) - len(p) :], widths)
    return zs, table, [Terms(*edge) for edge in zip(tokens, of_edge, *(n.split(widths) for n in numbers))]


def fan(z: Sequence[Tensor], norms: Sequence[Sequence[nn.BatchNorm2d]], edges: Sequence[Sequence[int]],
        p: Tensor) -> list[Terms]:
    """-> the terms p (z_k - μ_k) / σ_k of each edge, k from `edges`, p [sum of their lengths].

    norms: the batch norms that z_k stands before, all with the same result; none: the term is p z_k.
    """
    normed = [bool(of_z) for of_z in norms]
    eps = next((of_z[0].eps for of_z in norms if of_z), 0.0)
    table, statistics, numbers, *tokens = _Fan.apply(edges, normed, eps, p, *z)
    if any(normed):
        repeated = [k for k, of_z in enumerate(norms) for _ in of_z]
        move_statistics([norm for of_z in norms for norm in of_z], statistics[repeated], pixels(z[0]))
    widths = [len(edge) for edge in edges]
    return [Terms(token, [z[k] for k in edge], *of_edge)
            for token, edge, *of_edge in zip(tokens, edges, *(n.split(widths) for n in numbers))]


def node(terms: Sequence[Terms]) -> Tensor:
    """The sum of all terms, in one pass over them."""
    return _Node.apply(torch.cat([t.scale for t in terms]), torch.cat([t.shift for t in terms]).sum(0),
                       [z for t in terms for z in t.z], *[t.token for t in terms])


def normalise(z: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """norm(z) in training, as a node of one term."""
    return node(fan([z], [[norm]], [[0]], z.new_ones(1)))


@torch.no_grad()
def move_statistics(norms: Sequence[nn.BatchNorm2d], statistics: Tensor, count: int) -> None:
    """Running statistics after a batch of `count` pixels with these means and (biased) variances, [norms, 2, C]."""
    if not norms[0].track_running_stats:
        return
    mean, variance = statistics.to(norms[0].running_mean.dtype).unbind(1)
    torch._foreach_lerp_([n.running_mean for n in norms], list(mean.unbind()), norms[0].momentum)
    torch._foreach_lerp_([n.running_var for n in norms], list((variance * (count / max(1, count - 1))).unbind()), norms[0].momentum)
    torch._foreach_add_([n.num_batches_tracked for n in norms], 1)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, shift, zs, *tokens):
        ctx.count = len(tokens)
        return torch.ops.ldarts.node_sum(scale, shift, zs)

    @staticmethod
    def backward(ctx, grad):
        return None, None, None, *_Share.apply(grad.contiguous(memory_format=torch.channels_last), ctx.count)


class _Share(torch.autograd.Function):
    """One tensor to many readers, whose gradients are summed in one pass."""

    @staticmethod
    def forward(ctx, x, count):
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        found = [grad for grad in grads if grad is not None]
        return torch.ops.ldarts.node_sum(torch.ones(len(found), found[0].shape[1]), None, found), None


class _Norms:
    """Terms and the arithmetic of the norms behind their z (csrc/norms.cpp); gs: the gradient of each edge's terms."""

    def __init__(self, of: Sequence[Sequence[int]], normed: Sequence[bool]):
        """of: the z of the terms of each edge; normed: which z have norms behind them."""
        self.of, self.edge = [k for edge in of for k in edge], [e for e, edge in enumerate(of) for _ in edge]
        self.normed, self.edges = [int(one) for one in normed], len(of)

    def tables(self, moments, p, count, eps):
        return torch.ops.ldarts.norm_tables(moments, self.normed, p, self.of, count, eps)

    def sums(self, gs, zs):
        """Sums per channel of G and of G z of each term, [terms, 2, C]."""
        if not self.of:
            return torch.zeros(0, 2, zs[0].shape[1], dtype=torch.float64)
        return torch.ops.ldarts.bank_sums(self.of_edge(gs), [zs[k] for k in self.of])

    def of_edge(self, gs):
        return [gs[e] for e in self.edge]

    def gradients(self, table, p, d_table, sums, zs):
        """-> scale [terms, C], d_moments [z, 2, C], by p: the gradient by a z is Σ scale G + d_moments[0] + 2 d_moments[1] z."""
        return torch.ops.ldarts.norm_gradients(table, p, d_table, sums, self.of, self.normed, pixels(zs[0]))

    def by_z(self, table, p, d_table, sums, zs, gs):
        """-> the gradients by p and by each z, where nothing but the norms stands behind a z."""
        return torch.ops.ldarts.term_gradients(table, p, d_table, sums, self.of, self.edge, self.normed, zs, gs)

    def derivatives(self, numbers, zs, gs, w, spare, w_sums, g_w, v_p):
        """Of `gradients`, whose arguments are `numbers`, and of what the gradients by each z are made of.

        -> gradients by table, p and d_table, each z and each G; from those by the gradients of each z, w (none: 0), with
        w_sums [z, 2, C], the sums of w and w z, and g_w [terms, C], those of G w, and from v_p, those by the gradient of p. Those
        w that are spare may be overwritten.
        """
        by_table, by_p, by_d_table, by_z, by_g = torch.ops.ldarts.term_gradients_backward(
            *numbers, self.of, self.edge, self.normed, zs, gs, w, spare, w_sums, g_w, v_p)
        return by_table, by_p, None if numbers[2] is None else by_d_table, [d if d.numel() else None for d in by_z], by_g


def pixels(z: Tensor) -> int:
    """How many there are of each channel."""
    return z.numel() // z.shape[1]


class _Bank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, eps, widths, p_first, before, p, *tensors):
        U = len(geometry[1])
        zs, moments = _Inputs(geometry, before, *_split(tensors, [len(tensors) - 2 * U, U, U])).forward()
        norms = _Norms(_split(range(U - len(p), U), widths), [True] * U)
        table, statistics, numbers = norms.tables(moments, p, pixels(zs[0]), eps)
        ctx.geometry, ctx.norms, ctx.p_first = geometry, norms, p_first
        ctx.save_for_backward(before, p, table, *tensors, *zs)
        ctx.mark_non_differentiable(statistics, numbers)
        ctx.set_materialize_grads(False)
        return table, statistics, numbers, *zs, *(zs[-1].view_as(zs[-1]) for _ in widths)

    @staticmethod
    def backward(ctx, d_table, _statistics, _numbers, *grads):
        before, p, table, *saved = ctx.saved_tensors
        U = len(ctx.geometry[1])
        needs, again = ctx.needs_input_grad, torch.is_grad_enabled()
        asked = needs[4] or any(needs[6 : -2 * U]), any(needs[-2 * U :]) and not (again and ctx.p_first)
        gs = _zeros_for_none(grads[U:], [saved[-1]] * len(grads[U:]))
        arguments = ctx.geometry, ctx.norms, asked, before, p, table, d_table, *saved, *grads[:U], *gs
        # Without a derivative to come, the plain call, which saves nothing.
        found = _BankGrad.apply(*arguments) if again else _BankGrad.compute(*arguments)[0]
        return None, None, None, None, *found


class _BankGrad(torch.autograd.Function):
    """-> gradients by before, by p, by each x, and by the depthwise and the pointwise weight of each unit, from those by the
    table, by each z (or None) and by the token of each edge."""

    @staticmethod
    def compute(geometry, norms, asked, before, p, table, d_table, *tensors):
        """-> the results; sums that their derivatives need again"""
        x, dw, pw, zs, raw, gs = _BankGrad.parts(geometry, norms, tensors)
        sums = norms.sums(gs, zs)
        scale, d_moments, d_p = norms.gradients(table, p, d_table, sums, zs)
        d_x, by_affine, d_dw, d_pw, _, _ = _Inputs(geometry, before, x, dw, pw).backward(
            zs, raw, norms.of_edge(gs), scale, d_moments, *asked, False)
        d_before = _by_table(before, by_affine).to(table.dtype) if before is not None and asked[0] else None
        nothing = [None] * len(zs)
        return (d_before, d_p.to(p.dtype), *(d_x or [None] * len(x)), *(d_dw or nothing), *(d_pw or nothing)), (sums, by_affine)

    @staticmethod
    def parts(geometry, norms, tensors):
        U, E = len(geometry[1]), norms.edges
        return _split(tensors, [len(tensors) - 4 * U - E, U, U, U, U, E])

    @staticmethod
    def forward(ctx, geometry, norms, asked, before, p, table, d_table, *tensors):
        results, sums = _BankGrad.compute(geometry, norms, asked, before, p, table, d_table, *tensors)
        ctx.geometry, ctx.norms = geometry, norms
        ctx.save_for_backward(before, p, table, d_table, *sums, *tensors)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, v_before, v_p, *v):
        """z, and with it the gradient, is linear in each of a, D and P: its derivatives are banks with one of them replaced."""
        before, p, table, d_table, sums, by_affine, *tensors = ctx.saved_tensors
        x, dw, pw, zs, raw, gs = _BankGrad.parts(ctx.geometry, ctx.norms, tensors)
        inputs, norms, numbers = _Inputs(ctx.geometry, before, x, dw, pw), ctx.norms, (table, p, d_table, sums)
        scale, d_moments, _ = norms.gradients(*numbers, zs)
        v_x, v_dw, v_pw = _split(v, [len(x), len(zs), len(zs)])
        by_before, with_beta = None, inputs.affine
        if v_before is not None:  # through _by_table, to before and to by_affine, whose gradients are beta and gamma
            (inverse, mean), (v_inverse, v_mean), by_shift = before.unbind(1), v_before.unbind(1), by_affine[:, 0]
            with_beta = torch.cat([inputs.affine, torch.stack([v_inverse, -mean * v_inverse - inverse * v_mean])])
            by_before = torch.stack([-by_shift * v_mean, -by_shift * v_inverse], 1)
        replaced = []
        if v_before is not None or any(t is not None for t in v_x):
            replaced.append(inputs.replace(affine=with_beta, value=_zeros_for_none(v_x, x)))
        if any(t is not None for t in v_dw):
            replaced.append(inputs.replace(dw=_zeros_for_none(v_dw, dw)))
        if any(t is not None for t in v_pw):
            replaced.append(inputs.replace(pw=_zeros_for_none(v_pw, pw)))

        w = w_sums = by_x = by_dw = by_pw = None
        for other in replaced:
            in_a = bool(other.value)
            d_x, found, d_dw, d_pw, one, one_sums = other.backward(
                zs, raw, norms.of_edge(gs), scale, d_moments, not in_a or before is not None, True, True)
            w, w_sums, by_x = _add(w, one), _plus(w_sums, one_sums), _add(by_x, d_x or None)
            if before is not None:
                by_b_s = torch.stack([torch.zeros_like(found[:, 2]), found[:, 2]], 1) if in_a else found
                by_before = _plus(by_before, _by_table(before, by_b_s))
            by_dw = _add(by_dw, d_dw if other.dw is dw else None)
            by_pw = _add(by_pw, d_pw if other.pw is pw else None)
        sums_of_w = (None, None) if w is None else (w_sums[:, :2], w_sums[len(zs) - len(p) :, 2])
        by_table, by_p, by_d_table, by_z, by_g = norms.derivatives(numbers, zs, gs, w or [], [g is None for g in raw], *sums_of_w, v_p)
        nothing = [None] * len(zs)
        by_raw = [None if g is None or w is None else w[k] for k, g in enumerate(raw)]
        return (None, None, None, None if by_before is None else by_before.to(before.dtype), by_p, by_table, by_d_table,
                *(by_x or [None] * len(x)), *(by_dw or nothing), *(by_pw or nothing), *by_z, *by_raw, *by_g)


class _Fan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, edges, normed, eps, p, *zs):
        norms, behind = _Norms(edges, normed), [z for z, is_normed in zip(zs, normed) if is_normed]
        moments = torch.ops.ldarts.bank_sums(behind, behind) if behind else torch.zeros(0, 2, zs[0].shape[1], dtype=torch.float64)
        table, statistics, numbers = norms.tables(moments, p, pixels(zs[0]), eps)
        ctx.norms = norms
        ctx.save_for_backward(p, table, *zs)
        ctx.mark_non_differentiable(statistics, numbers)
        ctx.set_materialize_grads(False)
        return table, statistics, numbers, *(zs[0].view_as(zs[0]) for _ in edges)

    @staticmethod
    def backward(ctx, d_table, _statistics, _numbers, *gs):
        p, table, *zs = ctx.saved_tensors
        arguments = ctx.norms, p, table, d_table, *zs, *_zeros_for_none(gs, [zs[0]] * len(gs))
        found = _FanGrad.apply(*arguments) if torch.is_grad_enabled() else _FanGrad.compute(*arguments)[0]
        return None, None, None, *found


class _FanGrad(torch.autograd.Function):
    """-> gradients by p and by each z, from those by the table and by the token of each edge."""

    @staticmethod
    def compute(norms, p, table, d_table, *tensors):
        """-> the results; sums that their derivatives need again"""
        zs, gs = tensors[: len(norms.normed)], tensors[len(norms.normed) :]
        sums = norms.sums(gs, zs)
        d_p, by_z = norms.by_z(table, p, d_table, sums, zs, gs)
        return (d_p, *by_z), sums

    @staticmethod
    def forward(ctx, norms, p, table, d_table, *tensors):
        results, sums = _FanGrad.compute(norms, p, table, d_table, *tensors)
        ctx.norms = norms
        ctx.save_for_backward(p, table, d_table, sums, *tensors)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, v_p, *w):
        norms, (p, table, d_table, sums, *tensors) = ctx.norms, ctx.saved_tensors
        K, zs, gs = len(w), tensors[: len(w)], tensors[len(w) :]
        w = [one.contiguous(memory_format=torch.channels_last) for one in w]
        w_sums, of_g = torch.ops.ldarts.bank_sums([*w, *norms.of_edge(gs)], [*zs, *(w[k] for k in norms.of)]).split([K, len(p)])
        by_table, by_p, by_d_table, by_z, by_g = norms.derivatives((table, p, d_table, sums), zs, gs, w, [False] * K, w_sums, of_g[:, 1], v_p)
        return None, by_p, by_table, by_d_table, *by_z, *by_g


class _Inputs:
    """The arguments of the two operators."""

    def __init__(self, geometry, before, x, dw, pw):
        self.geometry, self.x, self.dw, self.pw, self.value = geometry, x, dw, pw, []
        self.affine = None if before is None else _affine(before)

    def replace(self, **changed) -> "_Inputs":
        other = copy.copy(self)
        vars(other).update(changed)
        return other

    def forward(self):
        return torch.ops.ldarts.bank_forward(self.x, self.affine, self.dw, self.pw, *self.geometry)

    def backward(self, *arguments):
        return torch.ops.ldarts.bank_backward(self.x, self.value, self.affine, self.dw, self.pw, *self.geometry, *arguments)


def _affine(table: Tensor) -> Tensor:
    """s and b of norms, [2, U, C], from their table."""
    inverse, mean = table.unbind(1)
    return torch.stack([inverse, -inverse * mean])


def _by_table(table: Tensor, by_affine: Tensor) -> Tensor:
    """The gradient by the table, from those by b and s, [U, 2 or more, C]."""
    by_shift, by_scale = by_affine[:, 0], by_affine[:, 1]
    inverse, mean = table.unbind(1)
    return torch.stack([by_scale - mean * by_shift, -inverse * by_shift], 1)


def _split(items: Sequence, widths: Sequence[int]) -> list[Sequence]:
    ends = list(itertools.accumulate(widths))
    return [items[end - width : end] for end, width in zip(ends, widths)]


def _zeros_for_none(tensors, like):
    return [torch.zeros_like(t) if v is None else v for v, t in zip(tensors, like)]


def _plus(old, new):
    return new if old is None else old if new is None else old + new


def _add(old, new):
    return new if old is None else old if new is None else [_plus(a, b) for a, b in zip(old, new)]
