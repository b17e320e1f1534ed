"""Banks of separable convolutions: all that leave one state, with the batch norms around them, in a few calls (CPU).

A unit computes z = P D a from a = relu(s x + b), D depthwise and P pointwise, and the sums of z and z² that its batch norm
needs; s and b are those of the norm in front of it. csrc/separable.cpp computes a bank of units and its gradients, an image at
a time, keeping nothing but z: what a batch norm or a ReLU would put out never is in memory. A node of a cell then is one sum

    Σ_m p_m (z_m - μ_m) / σ_m

and its gradient G goes back to every term as it is: the terms (`Terms`) stand for p_m (z_m - μ_m) / σ_m, and the function that
made them multiplies G by p_m / σ_m where it reads it. The operations of `operations.py`, called one after the other, are the
plain form that tests hold all this to, gradients of gradients included.
"""
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Unit = tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]  # depthwise, pointwise, the norm behind them


class Terms(NamedTuple):
    """Terms p_k (z_k - μ_k) / σ_k of a node; their z and numbers are to be read by `node` alone."""

    z: Sequence[Tensor]  # K of [N, C, H, W]
    scale: Tensor  # [K, C], p / σ, without a gradient
    shift: Tensor  # [K, C], -p μ / σ, without a gradient


def bank(x: Sequence[Tensor], before: Tensor | None, units: Sequence[Unit], p: Tensor) -> tuple[list[Tensor], Tensor, Terms]:
    """-> z of each unit, channels-last; the table [U, 2, C] of 1/σ and μ of their norms; the terms of the last units.

    x: one input [N, C, H, W] for all units, or one each. before: None, or the table of the norms in front, [U, 2, C]. p: the
    weights of the units that are terms, [L], the last L of them. Moves the running statistics of the norms that track them,
    as BatchNorm2d does in training.
    """
    weights = [unit[k].weight for k in (0, 1) for unit in units]
    geometry = units[0][0].stride[0], [depthwise.dilation[0] for depthwise, _, _ in units]
    table, statistics, terms, *zs = _Bank.apply(geometry, units[0][2].eps, before, p, *x, *weights)
    move_statistics([norm for _, _, norm in units], statistics, zs[0].numel() // zs[0].shape[1])
    return zs[: len(units)], table, Terms(zs[len(units) :], *terms)


def fan(z: Sequence[Tensor], p: Tensor) -> list[Terms]:
    """p[e, k] z_k for each of the E edges on which K operations put out the same z_k. p: [E, K]"""
    copies = _Fan.apply(p, *z)
    scale = p.detach()[:, :, None].expand(-1, -1, z[0].shape[1])  # [E, K, C]
    nothing = torch.zeros_like(scale[0])
    return [Terms(copies[e * len(z) : (e + 1) * len(z)], one, nothing) for e, one in enumerate(scale.unbind())]


def node(terms: Sequence[Terms]) -> Tensor:
    """The sum of all terms, in one pass over them."""
    return _Node.apply(torch.cat([t.scale for t in terms]), torch.cat([t.shift for t in terms]).sum(0),
                       *[z for t in terms for z in t.z])


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
    def forward(ctx, scale, shift, *z):
        ctx.count = len(z)
        return torch.ops.ldarts.mixed_sum(scale, z).add_(shift[:, None, None])

    @staticmethod
    def backward(ctx, grad):
        return None, None, *[grad.contiguous(memory_format=torch.channels_last)] * ctx.count


class _Fan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, *z):
        ctx.save_for_backward(p, *z)
        ctx.set_materialize_grads(False)
        return tuple(one.view_as(one) for _ in p for one in z)

    @staticmethod
    def backward(ctx, *grads):
        p, *z = ctx.saved_tensors
        ops, K = torch.ops.ldarts, len(z)
        grads = _zeros_for_none(grads, z * len(p))
        by_p = torch.stack([ops.mixed_dot(one, grads[k::K]) for k, one in enumerate(z)], 1) if ctx.needs_input_grad[0] else None
        by_z = (ops.mixed_sum(row, grads[k::K]) if ctx.needs_input_grad[1 + k] else None for k, row in enumerate(p.unbind(1)))
        return None if by_p is None else by_p.to(p.dtype), *by_z


class _Bank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, eps, before, p, *tensors):
        U = len(geometry[1])
        x, (dw, pw) = tensors[: -2 * U], _parts(tensors[-2 * U :], U)
        zs, table, statistics, terms = torch.ops.ldarts.bank(x, before, dw, pw, *geometry, eps, p)
        ctx.geometry, ctx.count = geometry, len(tensors)
        ctx.save_for_backward(before, p, table, *tensors, *zs)
        ctx.mark_non_differentiable(statistics, terms)
        ctx.set_materialize_grads(False)
        return table, statistics, terms, *zs, *(z.view_as(z) for z in zs[U - len(p) :])

    @staticmethod
    def backward(ctx, d_table, _statistics, _terms, *grads):
        before, p, table, *saved = ctx.saved_tensors
        tensors, zs = saved[: ctx.count], saved[ctx.count :]
        U, L, n = len(zs), len(p), zs[0].numel() // zs[0].shape[1]
        x, (dw, pw) = tensors[: -2 * U], _parts(tensors[-2 * U :], U)
        raw, lazy = list(grads[:U]), list(grads[U:])
        by_x, by_weight = any(ctx.needs_input_grad[i] for i in (2, *range(4, 4 + len(x)))), any(ctx.needs_input_grad[-2 * U :])
        if not torch.is_grad_enabled():  # nobody will differentiate this: all of it in one call
            d_before, d_p, d_x, d_dw, d_pw = torch.ops.ldarts.bank_grad(
                x, before, dw, pw, *ctx.geometry, zs, table, p, raw, lazy, d_table, by_x, by_weight)
            nothing = [None] * U
            return None, None, d_before, d_p, *(d_x or [None] * len(x)), *(d_dw or nothing), *(d_pw or nothing)

        inverse, mean = table.double().unbind(1)  # [U, C]
        d_inverse, d_mean = (torch.zeros_like(table) if d_table is None else d_table).double().unbind(1)
        d_p, scale = None, torch.ones_like(inverse)
        if any(g is not None for g in lazy):
            lazy = _zeros_for_none(lazy, zs[U - L :])
            total, product = _Sums.apply(*lazy, *zs[U - L :]).unbind(1)  # of G and G z, [L, C]
            behind, weight = slice(U - L, U), p.double()[:, None]
            centred = product - mean[behind] * total
            d_p = (inverse[behind] * centred).sum(1).to(p.dtype)
            d_inverse = d_inverse + F.pad(weight * centred, (0, 0, U - L, 0))
            d_mean = d_mean - F.pad(weight * inverse[behind] * total, (0, 0, U - L, 0))
            scale = torch.cat([scale[: U - L], weight * inverse[behind]])
        d_variance = -0.5 * inverse**3 * d_inverse
        d_moments = torch.stack([d_mean - 2 * mean * d_variance, d_variance], 1) / n
        affine = None if before is None else torch.stack([before[:, 0], -before[:, 0] * before[:, 1]])  # s and b, [2, U, C]
        by_affine, *others = _BankBackward.apply(ctx.geometry, (by_x, by_weight), affine, scale, d_moments, *tensors, *zs, *raw,
                                                 *[None] * (U - L), *lazy)
        d_before = None
        if by_affine is not None:
            d_scale, d_shift = by_affine
            d_before = torch.stack([d_scale - before[:, 1] * d_shift, -before[:, 0] * d_shift], 1)
        return None, None, d_before, d_p, *others


class _BankBackward(torch.autograd.Function):
    """-> gradients by affine, by each x, and by the depthwise and the pointwise weight of each unit."""

    @staticmethod
    def forward(ctx, geometry, asked, affine, scale, d_moments, *tensors):
        U = len(geometry[1])
        inputs, (zs, raw, lazy) = _Inputs(geometry, affine, *tensors[: -3 * U]), _parts(tensors[-3 * U :], U)
        ctx.geometry = geometry
        ctx.save_for_backward(affine, scale, d_moments, *tensors)
        ctx.set_materialize_grads(False)
        d_x, sums, d_dw, d_pw = inputs.backward(zs, raw, lazy, scale, d_moments, *asked)
        by_affine = torch.stack([sums[:, 1], sums[:, 0]]).to(affine.dtype) if affine is not None and asked[0] else None
        nothing = [None] * U
        return by_affine, *(d_x or [None] * len(inputs.x)), *(d_dw or nothing), *(d_pw or nothing)

    @staticmethod
    @once_differentiable
    def backward(ctx, v_affine, *v):
        """z, and with it the gradient, is linear in each of a, D and P: its derivatives are banks with one of them replaced."""
        affine, scale, d_moments, *saved = ctx.saved_tensors
        U = len(ctx.geometry[1])
        inputs, (zs, raw, lazy) = _Inputs(ctx.geometry, affine, *saved[: -3 * U]), _parts(saved[-3 * U :], U)
        v_x, (v_dw, v_pw) = v[: -2 * U], _parts(v[-2 * U :], U)
        replaced = []
        if v_affine is not None or any(t is not None for t in v_x):
            with_beta = None if affine is None else torch.cat(
                [affine, torch.zeros_like(affine) if v_affine is None else v_affine])
            replaced.append(inputs.replace(affine=with_beta, value=_zeros_for_none(v_x, inputs.x)))
        if any(t is not None for t in v_dw):
            replaced.append(inputs.replace(dw=_zeros_for_none(v_dw, inputs.dw)))
        if any(t is not None for t in v_pw):
            replaced.append(inputs.replace(pw=_zeros_for_none(v_pw, inputs.pw)))

        by_affine, by_moments, by_x, by_dw, by_pw, w = None, 0, None, None, None, None
        for other in replaced:
            one, moments = other.forward(zs)
            w = _add(w, one)  # the gradient by dz
            by_moments = by_moments + torch.stack([moments[:, 0], 2 * moments[:, 1]], 1)
            in_a = bool(other.value)
            d_x, sums, d_dw, d_pw = other.backward(zs, raw, lazy, scale, d_moments, not in_a or affine is not None, True)
            if d_x:
                by_x = _add(by_x, d_x)
            if affine is not None:
                none = torch.zeros_like(sums[:, 0])
                term = torch.stack([sums[:, 2], none] if in_a else [sums[:, 1], sums[:, 0]]).to(affine.dtype)
                by_affine = term if by_affine is None else by_affine + term
            if other.dw is inputs.dw:
                by_dw = _add(by_dw, d_dw)
            if other.pw is inputs.pw:
                by_pw = _add(by_pw, d_pw)
        nothing = [None] * U
        if w is None:
            return (None,) * (5 + len(saved))
        # dz = raw + scale * lazy + d_moments[0] + 2 d_moments[1] z
        factor, square = (t.to(w[0].dtype)[:, :, None, None] for t in (scale, 2 * d_moments[:, 1]))
        by_scale = torch.stack([torch.zeros_like(scale[0]) if g is None else torch.ops.ldarts.bank_sums([g], [one])[0, 1]
                                for g, one in zip(lazy, w)])
        return (None, None, by_affine, by_scale, by_moments, *(by_x or [None] * len(inputs.x)), *(by_dw or nothing),
                *(by_pw or nothing), *(a * one for a, one in zip(square, w)),
                *(None if g is None else one for g, one in zip(raw, w)),
                *(None if g is None else a * one for g, a, one in zip(lazy, factor, w)))


class _Sums(torch.autograd.Function):
    """grad of U tensors, then U tensors z -> the sums per channel of grad and of grad z, [U, 2, C] in float64."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.ops.ldarts.bank_sums(*_parts(tensors, len(tensors) // 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        grads, zs = _parts(ctx.saved_tensors, len(d))
        total, product = d.to(zs[0].dtype)[..., None, None].unbind(1)  # [U, C, 1, 1]
        return (*(torch.addcmul(t, q, z) for t, q, z in zip(total, product, zs)), *(q * g for q, g in zip(product, grads)))


class _Inputs:
    """The arguments of the two operators."""

    def __init__(self, geometry, affine, *tensors):
        self.stride, self.dilations = geometry
        U = len(self.dilations)
        self.affine, self.value = affine, []
        self.x, (self.dw, self.pw) = tensors[: -2 * U], _parts(tensors[-2 * U :], U)

    def replace(self, **changed) -> "_Inputs":
        other = _Inputs((self.stride, self.dilations), self.affine, *self.x, *self.dw, *self.pw)
        other.dw, other.pw = self.dw, self.pw
        vars(other).update(changed)
        return other

    def forward(self, against=()):
        return torch.ops.ldarts.bank_forward(self.x, self.value, self.affine, self.dw, self.pw, self.stride, self.dilations, against)

    def backward(self, *arguments):
        return torch.ops.ldarts.bank_backward(self.x, self.value, self.affine, self.dw, self.pw, self.stride, self.dilations,
                                              *arguments)


def _parts(tensors, size):
    return [tensors[i : i + size] for i in range(0, len(tensors), size)]


def _zeros_for_none(tensors, like):
    return [torch.zeros_like(t) if v is None else v for v, t in zip(tensors, like)]


def _add(old, new):
    return list(new) if old is None else [a + b for a, b in zip(old, new)]
