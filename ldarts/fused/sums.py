"""Sums of tensors, on which the engine is built: two operators of csrc/, each the other's derivative.

    affine_sums    y_j = Σ_e s_e z_e + t_e     over the entries e of the sum j; s, t per channel or one number
    channel_sums   Σ x and Σ x y               per channel, of each pair, in float64

With G_j = ∂L/∂y_j, an affine sum has ∂L/∂z = Σ s G, ∂L/∂s = Σ G z and ∂L/∂t = Σ G; with A, B the gradients by
the two sums, a channel sum has ∂L/∂x = A + B y and ∂L/∂y = B x. So gradients of any order follow by autograd.
"""
import functools
import itertools
import math
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from .build import hindrance

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


@torch.compiler.assume_constant_result
def compiled_for(device: str) -> bool:
    """Whether the operators are compiled for devices of this type; the first call loads or compiles them.

    On `meta` the sums give the shapes of their results alone.
    """
    return device in ("cpu", "cuda", "meta") and _loaded() and (device == "meta" or not hindrance(device))


@functools.cache
def _loaded() -> bool:
    """Whether the library for the CPU is loaded, which has the operators of every device; the sums then have
    their derivatives, and shapes for tracing."""
    if hindrance("cpu"):
        return False

    @torch.library.register_fake("ldarts::affine_sums")
    def _(z, scales, shifts, z_of_entry, scale_of_entry, shift_of_entry, entries):
        per_channel = any(t.dim() == 2 and t.shape[1] > 1 for t in (*scales, *shifts))
        layout = torch.channels_last if per_channel else dense_format(z)
        return [torch.empty_like(z[0], memory_format=layout) for _ in entries]

    @torch.library.register_fake("ldarts::channel_sums")
    def _(x, y):
        return x[0].new_empty(len(x), 2, x[0].shape[1], dtype=torch.float64)

    torch.library.register_autograd("ldarts::affine_sums", affine_backward, setup_context=keep_affine)
    torch.library.register_autograd("ldarts::channel_sums", channel_backward, setup_context=(
        lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0], *inputs[1])))
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
    def expect(holds: bool, what: str, found: Any, expected: Any) -> None:
        if not holds:
            raise ValueError(f"mixed_sum: {what} {found}, expected {expected}")

    count = f"[{len(terms)}], one for each term, and at least one term"
    expect(terms and weights.shape == (len(terms),), "weights have shape", list(weights.shape), count)
    first = terms[0]
    for what, t in (("weights have", weights), ("term 0 has", first)):
        expect(t.dtype in DTYPES, f"{what} dtype", t.dtype, "float32, float64, bfloat16 or float16")
        expect(t.device == first.device, f"{what} device", t.device, first.device)
    expect(weights.dtype.itemsize >= first.dtype.itemsize, "weights have dtype", weights.dtype,
           f"{first.dtype} or wider")
    formats = [torch.contiguous_format, torch.channels_last]
    for m, term in enumerate(terms):
        for name in ("shape", "dtype", "device"):
            expect(getattr(term, name) == getattr(first, name), f"term {m} has {name}", getattr(term, name),
                   getattr(first, name))
        # Under torch.func a tensor may have no memory format to ask for.
        formats = [f for f in formats if transformed() or term.is_contiguous(memory_format=f)]
        expect(formats, f"term {m} has memory format of strides", term.stride(),
               "contiguous or channels-last" if m == 0 else f"that of term 0, {first.stride()}")


def affine_sums(z: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor],
                sums: Sequence[Sequence[tuple[int, int, int]]]) -> list[Tensor | None]:
    """Σ scale z + shift over the entries of each sum -> a tensor like the z for each, channels-last.

    z: [N, C, H, W] of one shape and dtype; scales, shifts: [rows, C], whose rows are numbered through all
    tensors of a list (or [rows], one number a row; on a CPU also [rows, N * C], without gradients by them);
    sums: for each its entries (z, row of scales, row of shifts); the row -1 is a scale of 1, a shift of 0. A
    sum without entries is None; a z that is a sum alone is not copied.
    """
    results = [z[of_sum[0][0]] if of_sum else None for of_sum in sums]
    computed = [j for j, of_sum in enumerate(sums) if [entry[1:] for entry in of_sum] not in ([], [(-1, -1)])]
    if computed:
        entries = [entry for j in computed for entry in sums[j]]
        numbers = *map(list, zip(*entries)), [len(sums[j]) for j in computed]
        for j, result in zip(computed, call(torch.ops.ldarts.affine_sums, z, scales, shifts, *numbers)):
            results[j] = result
    return results


def channel_sums(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Σ x and Σ x y of each pair, over images and pixels -> [pairs, 2, C] in float64. x, y: [N, C, H, W]"""
    return call(torch.ops.ldarts.channel_sums, x, y)


def call(operator: Callable, *arguments: Any) -> Any:
    """operator(*arguments), at once where nobody asks for gradients."""
    if torch.is_grad_enabled():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def flat(t: Tensor, layout: torch.memory_format) -> Tensor:
    """The elements of a tensor of this layout as [images, channels, pixels, 1] in channels-last, whatever its
    shape: for sums over all of them."""
    t = t.permute(0, 2, 3, 1) if layout is torch.channels_last else t
    channels = math.gcd(t.numel(), 16)
    images = math.gcd(t.numel() // channels, 8)
    return t.reshape(images, -1, 1, channels).permute(0, 3, 1, 2)


def dense_format(tensors: Sequence[Tensor]) -> torch.memory_format:
    """The memory format that all tensors have."""
    return torch.contiguous_format if all(t.is_contiguous() for t in tensors) else torch.channels_last


def keep_affine(ctx, inputs, output) -> None:
    z, scales, shifts, *ctx.numbers = inputs
    ctx.lengths, ctx.layout = [len(z), len(scales), len(shifts)], dense_format(output)
    ctx.save_for_backward(*z, *scales, *shifts)


def affine_backward(ctx, grads: list[Tensor]) -> tuple[list[Tensor | None] | None, ...]:
    """By each z, scale and shift, of G of each sum."""
    z, scales, shifts = split(ctx.saved_tensors, ctx.lengths)
    needs_z, needs_scales, needs_shifts = ctx.needs_input_grad[:3]
    z_of_entry, scale_of_entry, shift_of_entry, counts = ctx.numbers
    sum_of_entry = [j for j, count in enumerate(counts) for _ in range(count)]
    grads = [grad.contiguous(memory_format=ctx.layout) for grad in grads]

    of_z = [[] for _ in z]  # Σ s G
    for j, k, row in zip(sum_of_entry, z_of_entry, scale_of_entry):
        if needs_z[k]:
            of_z[k].append((j, row, -1))
    by_z = affine_sums(grads, scales, [], of_z)

    by_scales, by_shifts = [None] * len(scales), [None] * len(shifts)
    if any(needs_scales) or any(needs_shifts):
        x, y = [grads[j] for j in sum_of_entry], [z[k] for k in z_of_entry]
        one_number = all(t.shape[1:].numel() == 1 for t in (*scales, *shifts))
        if one_number:
            x, y = [flat(t, ctx.layout) for t in x], [flat(t, ctx.layout) for t in y]
        sums = channel_sums(x, y).sum(-1, keepdim=True) if one_number else channel_sums(x, y)
        if any(needs_scales):
            by_scales = by_rows(sums[:, 1], scale_of_entry, scales)
        if any(needs_shifts):
            by_shifts = by_rows(sums[:, 0], shift_of_entry, shifts)
    return by_z, by_scales, by_shifts, None, None, None, None


def by_rows(by_entry: Tensor, row_of_entry: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients by tensors of rows. by_entry: those by the row of each entry"""
    lengths = [len(t) for t in tensors]
    rows = range(sum(lengths))
    if list(row_of_entry) != list(rows):  # rows in no entry, in several, in another order
        zero = torch.zeros_like(by_entry[0])
        by_entry = torch.stack([sum((by_entry[e] for e, its_row in enumerate(row_of_entry) if its_row == row),
                                    zero) for row in rows])
    return [by.to(t.dtype).view(t.shape) for by, t in zip(by_entry.split(lengths), tensors)]


def channel_backward(ctx, grad: Tensor) -> tuple[list[Tensor | None], ...]:
    """By each x and each y, of A and B, the gradients by Σ x and Σ x y: A + B y and B x."""
    pairs = len(grad)
    needs_x, needs_y = ctx.needs_input_grad
    # Of pair p the rows 2 p and 2 p + 1 are A and B.
    of_x = [[(pairs + p, 2 * p + 1, 2 * p)] if needed else [] for p, needed in enumerate(needs_x)]
    of_y = [[(p, 2 * p + 1, -1)] if needed else [] for p, needed in enumerate(needs_y)]
    rows = [grad.flatten(0, 1)]
    return tuple(split(affine_sums(ctx.saved_tensors, rows, rows, of_x + of_y), [pairs, pairs]))


def split(items: Sequence, lengths: Sequence[int]) -> list[Sequence]:
    remaining = iter(items)
    return [[*itertools.islice(remaining, length)] for length in lengths]
