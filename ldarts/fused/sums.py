"""Sums of tensors, on which the engine is built: two operators of csrc/, each the other's derivative.

    affine_sums    y_j = Σ_e s_e z_e + t_e     over the entries e of the sum j; s, t per channel or one number
    channel_sums   Σ x and Σ x y               per channel, of each pair, in float64

With G_j = ∂L/∂y_j, an affine sum has ∂L/∂z = Σ s G, ∂L/∂s = Σ G z and ∂L/∂t = Σ G; with A, B the gradients by
the two sums, a channel sum has ∂L/∂x = A + B y and ∂L/∂y = B x. So gradients of any order follow by autograd.
"""
import functools
import itertools
from typing import Sequence

import torch
from torch import Tensor

from .build import load
from .norms import membership, register as register_norms

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


@torch.compiler.assume_constant_result
def compiled_for(device: str) -> bool:
    """Whether the operators are compiled for devices of this type; the first call loads or compiles them.

    On `meta` they give the shapes of their results alone.
    """
    return device in ("cpu", "cuda", "meta") and _loaded() and (device == "meta" or load(device))


@functools.cache
def _loaded() -> bool:
    if not load("cpu"):  # it has the operators of every device
        return False
    _register()
    register_norms()
    return True


def mixed_sum(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Σ_m weights[m] * terms[m] -> a tensor like the terms.

    weights: [M], of the terms' dtype or a wider one; terms: M tensors of one shape, dtype (float32, float64,
    bfloat16, float16), device and memory format (contiguous or channels-last). Sums in float32 or wider;
    the same bits on every call. Differentiable any number of times. A ValueError names term and property.
    """
    if terms and compiled_for(terms[0].device.type) and not transformed():
        return torch.ops.ldarts.mixed_sum(weights, terms)
    check_terms(weights, terms)
    return mixed_sum_ref(weights, terms)


def transformed() -> bool:
    """Whether torch.func or forward mode computes: the operators have neither batching rules nor tangents."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0)


def mixed_sum_ref(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """The same as a Python sum: what the fused one is tested against."""
    wide = torch.promote_types(terms[0].dtype, torch.float32)
    return sum(w * term.to(wide) for w, term in zip(weights.to(wide).unbind(), terms)).to(terms[0].dtype)


def check_terms(weights: Tensor, terms: Sequence[Tensor]) -> None:
    """The checks of csrc/checks.cpp, for the reference."""
    if len(terms) == 0 or weights.shape != (len(terms),):
        raise ValueError(f"mixed_sum: weights have shape {list(weights.shape)}, expected [{len(terms)}], one "
                         "for each term, and at least one term")
    for name, t in (("weights have", weights), ("term 0 has", terms[0])):
        if t.dtype not in DTYPES:
            raise ValueError(f"mixed_sum: {name} dtype {t.dtype}, "
                             "expected float32, float64, bfloat16 or float16")
        if t.device != terms[0].device:
            raise ValueError(f"mixed_sum: {name} device {t.device}, expected {terms[0].device}")
    if weights.dtype.itemsize < terms[0].dtype.itemsize:
        raise ValueError(f"mixed_sum: weights have dtype {weights.dtype}, expected {terms[0].dtype} or wider")
    formats = [torch.contiguous_format, torch.channels_last]
    for m, term in enumerate(terms):
        for name in ("shape", "dtype", "device"):
            if getattr(term, name) != getattr(terms[0], name):
                raise ValueError(f"mixed_sum: term {m} has {name} {getattr(term, name)}, "
                                 f"expected {getattr(terms[0], name)}")
        formats = [f for f in formats if (f is torch.contiguous_format or term.dim() == 4)
                   and term.is_contiguous(memory_format=f)]
        if not formats:
            expected = "contiguous or channels-last" if m == 0 else f"that of term 0, {terms[0].stride()}"
            raise ValueError(f"mixed_sum: term {m} has memory format of strides {term.stride()}, "
                             f"expected {expected}")


def affine_sums(z: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor],
                sums: Sequence[Sequence[tuple[int, int, int]]]) -> tuple[Tensor, ...]:
    """Σ scale z + shift over the entries of each sum -> a tensor like the z for each, channels-last.

    z: [N, C, H, W] of one shape and dtype; scales, shifts: [rows, C], whose rows are numbered through all
    tensors of a list (or [rows], one number a row; on a CPU also [rows, N * C], without gradients by them);
    sums: for each its entries (z, row of scales, row of shifts); the row -1 is a scale of 1, a shift of 0.
    """
    entries = [entry for of_sum in sums for entry in of_sum]
    numbers = *map(list, zip(*entries)), [len(of_sum) for of_sum in sums]
    return AffineSums.apply((len(z), len(scales), len(shifts)), numbers, *z, *scales, *shifts)


def channel_sums(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Σ x and Σ x y of each pair, over images and pixels -> [pairs, 2, C] in float64. x, y: [N, C, H, W]"""
    return ChannelSums.apply(len(x), *x, *y)


def flat(t: Tensor, dense: torch.memory_format) -> Tensor:
    """The elements of a dense tensor as [images, channels, pixels, 1] in channels-last, whatever its shape:
    for sums over all of them."""
    t = t.contiguous(memory_format=dense)
    t = t.permute(0, 2, 3, 1) if dense is torch.channels_last else t
    channels = power_of_two(t.numel(), 64)
    images = power_of_two(t.numel() // channels, 8)
    return t.reshape(images, -1, 1, channels).permute(0, 3, 1, 2)


def power_of_two(number: int, most: int) -> int:
    """The largest that divides a number, up to `most`."""
    return min(number & -number, most) if number else 1


def dense_format(tensors: Sequence[Tensor]) -> torch.memory_format:
    """The memory format that all tensors have."""
    return torch.contiguous_format if all(t.is_contiguous() for t in tensors) else torch.channels_last


class AffineSums(torch.autograd.Function):
    """affine_sums with a derivative. The operator has the same one, for torch.compile, which costs more."""

    @staticmethod
    def forward(ctx, lengths, numbers, *tensors):
        z, scales, shifts = split(tensors, lengths)
        keep_affine(ctx, (z, scales, shifts, *numbers))
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.ldarts.affine_sums(z, scales, shifts, *numbers))

    @staticmethod
    def backward(ctx, *grads):
        _, _, *needs = ctx.needs_input_grad
        by_z, by_scales, by_shifts = affine_gradients(ctx, grads, *split(needs, ctx.lengths))
        return None, None, *by_z, *by_scales, *by_shifts


class ChannelSums(torch.autograd.Function):
    """channel_sums with a derivative."""

    @staticmethod
    def forward(ctx, pairs, *tensors):
        x, y = tensors[:pairs], tensors[pairs:]
        keep_pairs(ctx, (x, y))
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ldarts.channel_sums(x, y)

    @staticmethod
    def backward(ctx, grad):
        return None, *pair_gradients(ctx, grad, ctx.needs_input_grad[1:])


def keep_affine(ctx, inputs) -> None:
    z, scales, shifts, *ctx.numbers = inputs
    ctx.lengths, ctx.dense = (len(z), len(scales), len(shifts)), dense_format(z)
    ctx.rows = [[(t.shape, t.dtype) for t in tensors] for tensors in (scales, shifts)]
    ctx.save_for_backward(*z, *scales)
    ctx.set_materialize_grads(False)


def affine_gradients(ctx, grads, needs_z, needs_scales, needs_shifts) -> tuple[list, list, list]:
    """By each z, scale and shift, of G of each sum."""
    z, scales = split(ctx.saved_tensors, ctx.lengths[:2])
    z_of_entry, scale_of_entry, shift_of_entry, counts = ctx.numbers
    sum_of_entry = [j for j, count in enumerate(counts) for _ in range(count)]
    one_number = all(shape[1:].numel() == 1 for tensors in ctx.rows for shape, _ in tensors)
    layout = ctx.dense if one_number else torch.channels_last
    grads = [(torch.zeros_like(z[0]) if g is None else g).contiguous(memory_format=layout) for g in grads]

    by_z, wanted = [None] * len(z), {}  # Σ s G
    for e, k in enumerate(z_of_entry):
        if needs_z[k]:
            wanted.setdefault(k, []).append((sum_of_entry[e], scale_of_entry[e], -1))
    for k, ((j, row, _), *others) in list(wanted.items()):
        if row == -1 and not others:
            by_z[k] = grads[j]
            del wanted[k]
    if wanted:
        for k, by_one in zip(wanted, affine_sums(grads, scales, [], list(wanted.values()))):
            by_z[k] = by_one

    by_rows = []  # Σ G z by a scale, Σ G by a shift
    rows = [(scale_of_entry, ctx.rows[0], any(needs_scales), 1),
            (shift_of_entry, ctx.rows[1], any(needs_shifts), 0)]
    used = [e for e in range(len(z_of_entry))
            if any(of_entry[e] >= 0 and needed for of_entry, _, needed, _ in rows)]
    if used:
        x, y = [grads[sum_of_entry[e]] for e in used], [z[z_of_entry[e]] for e in used]
        if one_number:
            x, y = [flat(t, layout) for t in x], [flat(t, layout) for t in y]
        sums = channel_sums(x, y).sum(-1, keepdim=True) if one_number else channel_sums(x, y)
    for of_entry, tensors, needed, which in rows:
        if not needed:
            by_rows.append([None] * len(tensors))
            continue
        lengths, rows_of_used = [shape[0] for shape, _ in tensors], tuple(of_entry[e] for e in used)
        by_row = sums[:, which]
        if rows_of_used != tuple(range(sum(lengths))):  # rows in no entry, in several, in another order
            by_row = membership(rows_of_used, sum(lengths), by_row) @ by_row
        parts = by_row.split(lengths)
        by_rows.append([part.to(dtype).view(shape) for part, (shape, dtype) in zip(parts, tensors)])
    return by_z, *by_rows


def keep_pairs(ctx, inputs) -> None:
    x, y = inputs
    first = {}  # of each tensor its first place among all x and all y
    ctx.place = [first.setdefault(id(t), i) for i, t in enumerate((*x, *y))]
    ctx.save_for_backward(*x, *y)
    ctx.set_materialize_grads(False)


def pair_gradients(ctx, grad, needs) -> list:
    """By each x, then by each y, of A and B, the gradients by Σ x and Σ x y: A + B y and B x."""
    tensors, pairs = ctx.saved_tensors, len(ctx.saved_tensors) // 2
    wanted = {}  # place of a tensor -> its entries
    for p in range(pairs):
        a, b = 2 * p, 2 * p + 1  # rows of A and B
        for place, entry in ((ctx.place[p], (pairs + p, b, a)), (ctx.place[pairs + p], (p, b, -1))):
            if needs[place]:
                wanted.setdefault(place, []).append(entry)
    by_place = [None] * len(tensors)
    if wanted and grad is not None:
        rows = [grad.flatten(0, 1)]
        for place, by_tensor in zip(wanted, affine_sums(tensors, rows, rows, list(wanted.values()))):
            by_place[place] = by_tensor
    return by_place


def split(items: Sequence, lengths: Sequence[int]) -> list[Sequence]:
    ends = list(itertools.accumulate(lengths))
    return [items[end - length : end] for end, length in zip(ends, lengths)]


def _register() -> None:
    """Shapes for tracing, and derivatives."""
    @torch.library.register_fake("ldarts::affine_sums")
    def _(z, scales, shifts, z_of_entry, scale_of_entry, shift_of_entry, entries):
        per_channel = any(t.dim() == 2 and t.shape[1] > 1 for t in (*scales, *shifts))
        layout = torch.channels_last if per_channel else dense_format(z)
        return [torch.empty_like(z[0], memory_format=layout) for _ in entries]

    @torch.library.register_fake("ldarts::channel_sums")
    def _(x, y):
        return x[0].new_empty(len(x), 2, x[0].shape[1], dtype=torch.float64)

    def affine_backward(ctx, grads):
        return *affine_gradients(ctx, grads, *ctx.needs_input_grad[:3]), None, None, None, None

    def channel_backward(ctx, grad):
        by_x, by_y = ctx.needs_input_grad
        return tuple(split(pair_gradients(ctx, grad, [*by_x, *by_y]), [len(by_x), len(by_y)]))

    torch.library.register_autograd("ldarts::affine_sums", affine_backward,
                                    setup_context=lambda ctx, inputs, output: keep_affine(ctx, inputs))
    torch.library.register_autograd("ldarts::channel_sums", channel_backward,
                                    setup_context=lambda ctx, inputs, output: keep_pairs(ctx, inputs))
