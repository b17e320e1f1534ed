"""Banks of separable convolutions: all that leave one state, with the batch norms behind them, in a few calls (CPU).

A unit computes z = P D a from a = relu(s x + b), D depthwise and P pointwise, and the sums of z and z² that its batch norm
needs; s and b are those of the norm in front of it. csrc/separable.cpp computes a bank of units and its gradients, an image at
a time, keeping nothing but z: what a batch norm or a ReLU would put out never is in memory. The operations of
`operations.py`, called one after the other, are the plain form that tests hold this to.
"""
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Unit = tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]  # depthwise, pointwise, the norm behind them


def bank(x: Sequence[Tensor], before: Tensor | None, units: Sequence[Unit]) -> tuple[list[Tensor], Tensor]:
    """z of each unit, channels-last, and the table [U, 2, C] of 1/σ and μ by which its norm makes (z - μ) / σ of it.

    x: one input [N, C, H, W] for all units, or one each. before: None, or the table of the norms in front, [U, 2, C]. Moves
    the running statistics of the norms that track them, as BatchNorm2d does in training.
    """
    affine = None if before is None else torch.stack([before[:, 0], -before[:, 0] * before[:, 1]])  # [2, U, C]
    geometry = units[0][0].stride[0], [depthwise.dilation[0] for depthwise, _, _ in units]
    weights = [unit[k].weight for k in (0, 1) for unit in units]
    *zs, moments = _Bank.apply(geometry, affine, *x, *weights)
    count = zs[0].numel() // zs[0].shape[1]
    mean, square = (moments / count).unbind(1)  # in float64, in which the difference is safe
    variance = (square - mean * mean).clamp_min(0)
    move_statistics([norm for _, _, norm in units], mean, variance, count)
    return zs, torch.stack([(variance + units[0][2].eps).rsqrt(), mean], 1).to(zs[0].dtype)


@torch.no_grad()
def move_statistics(norms: Sequence[nn.BatchNorm2d], mean: Tensor, variance: Tensor, count: int) -> None:
    """Running statistics after a batch of `count` pixels with this mean and (biased) variance, [norms, C]."""
    if not norms[0].track_running_stats:
        return
    dtype = norms[0].running_mean.dtype
    torch._foreach_lerp_([n.running_mean for n in norms], list(mean.to(dtype).unbind()), norms[0].momentum)
    torch._foreach_lerp_([n.running_var for n in norms], list((variance * (count / max(1, count - 1))).to(dtype).unbind()),
                         norms[0].momentum)
    torch._foreach_add_([n.num_batches_tracked for n in norms], 1)


class _Bank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, affine, *tensors):
        inputs = _Inputs(geometry, affine, *tensors)
        zs, moments = inputs.forward()
        ctx.geometry, ctx.count = geometry, len(tensors)
        ctx.save_for_backward(affine, *tensors, *zs)
        ctx.set_materialize_grads(False)
        return *zs, moments

    @staticmethod
    def backward(ctx, *grads):
        affine, *saved = ctx.saved_tensors
        tensors, zs = saved[: ctx.count], saved[ctx.count :]
        *d_z, d_moments = grads
        if d_moments is None:
            d_moments = zs[0].new_zeros(len(zs), 2, zs[0].shape[1])
        asked = any(ctx.needs_input_grad[1 : 2 + ctx.count - 2 * len(zs)]), any(ctx.needs_input_grad[-2 * len(zs) :])
        return None, *_BankBackward.apply(ctx.geometry, asked, affine, d_moments, *tensors, *zs, *d_z)


class _BankBackward(torch.autograd.Function):
    """-> gradients by affine, by each x, and by the depthwise and the pointwise weight of each unit."""

    @staticmethod
    def forward(ctx, geometry, asked, affine, d_moments, *tensors):
        units = len(geometry[1])
        tensors, zs, d_z = tensors[: -2 * units], tensors[-2 * units : -units], tensors[-units:]
        inputs = _Inputs(geometry, affine, *tensors)
        ctx.geometry, ctx.units = geometry, units
        ctx.save_for_backward(affine, d_moments, *tensors, *zs, *d_z)
        ctx.set_materialize_grads(False)
        d_x, sums, d_dw, d_pw = inputs.backward(zs, d_z, d_moments, *asked)
        by_affine = torch.stack([sums[:, 1], sums[:, 0]]).to(affine.dtype) if affine is not None and asked[0] else None
        nothing = [None] * units
        return by_affine, *(d_x or [None] * len(inputs.x)), *(d_dw or nothing), *(d_pw or nothing)

    @staticmethod
    @once_differentiable
    def backward(ctx, v_affine, *v):
        """z, and with it the gradient, is linear in each of a, D and P: its derivatives are banks with one of them replaced."""
        affine, d_moments, *saved = ctx.saved_tensors
        U = ctx.units
        tensors, zs, d_z = saved[: -2 * U], saved[-2 * U : -U], saved[-U:]
        inputs = _Inputs(ctx.geometry, affine, *tensors)
        v_x, v_dw, v_pw = v[: -2 * U], v[-2 * U : -U], v[-U:]
        replaced = []
        if v_affine is not None or any(t is not None for t in v_x):
            with_beta = None if affine is None else torch.cat(
                [affine, torch.zeros_like(affine) if v_affine is None else v_affine])
            replaced.append(inputs.replace(affine=with_beta, value=_zeros_for_none(v_x, inputs.x)))
        if any(t is not None for t in v_dw):
            replaced.append(inputs.replace(dw=_zeros_for_none(v_dw, inputs.dw)))
        if any(t is not None for t in v_pw):
            replaced.append(inputs.replace(pw=_zeros_for_none(v_pw, inputs.pw)))

        by_affine, by_moments, by_z, by_dz, by_x, by_dw, by_pw = None, 0, None, None, None, None, None
        for other in replaced:
            w, moments = other.forward(zs)
            by_dz = _add(by_dz, w)
            by_z = _add(by_z, [2 * square[None, :, None, None] * one
                               for square, one in zip(d_moments[:, 1].to(w[0].dtype), w)])
            by_moments = by_moments + torch.stack([moments[:, 0], 2 * moments[:, 1]], 1)
            in_a = bool(other.value)
            d_x, sums, d_dw, d_pw = other.backward(zs, d_z, d_moments, not in_a or affine is not None, True)
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
        return (None, None, by_affine, by_moments if replaced else None, *(by_x or [None] * len(inputs.x)),
                *(by_dw or nothing), *(by_pw or nothing), *(by_z or nothing), *(by_dz or nothing))


class _Inputs:
    """The arguments of the two operators."""

    def __init__(self, geometry, affine, *tensors):
        self.stride, self.dilations = geometry
        units = len(self.dilations)
        self.affine, self.value = affine, []
        self.x, self.dw, self.pw = tensors[: -2 * units], tensors[-2 * units : -units], tensors[-units:]

    def replace(self, **changed) -> "_Inputs":
        other = _Inputs((self.stride, self.dilations), self.affine, *self.x, *self.dw, *self.pw)
        other.dw, other.pw = self.dw, self.pw
        vars(other).update(changed)
        return other

    def forward(self, against=()):
        return torch.ops.ldarts.bank_forward(self.x, self.value, self.affine, self.dw, self.pw, self.stride, self.dilations, against)

    def backward(self, zs, d_z, d_moments, by_x, by_weight):
        return torch.ops.ldarts.bank_backward(self.x, self.value, self.affine, self.dw, self.pw, self.stride, self.dilations,
                                              zs, d_z, d_moments, by_x, by_weight)


def _zeros_for_none(tensors, like):
    return [torch.zeros_like(t) if v is None else v for v, t in zip(tensors, like)]


def _add(old, new):
    return list(new) if old is None else [a + b for a, b in zip(old, new)]
