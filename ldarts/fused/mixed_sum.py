"""The weighted sum of a mixed operation, Σ_m weights[m] · terms[m], on which every supernet here is built.

Four operators of csrc/ are each other's derivatives, to any order:

    mixed_sum(w, t)   = Σ_m w_m t_m         by w: mixed_dot(g, t)      by t: mixed_scale(g, w)
    mixed_scale(g, w) = (w_m g)_m           by g: mixed_sum(w, G)      by w: mixed_dot(g, G)
    mixed_dot(g, t)   = (⟨g, t_m⟩)_m        by g: mixed_sum(G, t)      by t: mixed_scale(g, G)
    mixed_grads(g, w, t) = mixed_dot(g, t), mixed_scale(g, w)          in one pass over g

where G is the gradient of the result. Without the compiled operators mixed_sum_ref runs.
"""
import functools
from typing import Sequence

import torch
from torch import Tensor

from .build import load
from .normalised_sum import register_shapes


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
    register_shapes()
    return True


def mixed_sum(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Σ_m weights[m] * terms[m] -> a tensor like the terms.

    weights: [M], of the terms' dtype or a wider one; terms: M tensors of one shape, dtype (float32, float64,
    bfloat16, float16), device and memory format (contiguous or channels-last). Sums in float32 or wider;
    the same bits on every call. Differentiable any number of times. A ValueError names term and property.
    """
    if terms and compiled_for(terms[0].device.type):
        return torch.ops.ldarts.mixed_sum(weights, terms)
    check_terms(weights, terms)
    return mixed_sum_ref(weights, terms)


def mixed_sum_ref(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """The same as a Python sum: what the fused one is tested against."""
    wide = torch.promote_types(terms[0].dtype, torch.float32)
    return sum(w * term.to(wide) for w, term in zip(weights.to(wide).unbind(), terms)).to(terms[0].dtype)


def check_terms(weights: Tensor, terms: Sequence[Tensor]) -> None:
    """The checks of csrc/mixed_sum.cpp, for the reference and for tracing."""
    if len(terms) == 0 or weights.shape != (len(terms),):
        raise ValueError(f"mixed_sum: weights have shape {list(weights.shape)}, expected [{len(terms)}], one "
                         "for each term, and at least one term")
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


def _register() -> None:
    """Shapes for tracing, and derivatives."""
    ops = torch.ops.ldarts

    @torch.library.register_fake("ldarts::mixed_sum")
    def _(weights, terms):
        check_terms(weights, terms)
        return torch.empty_like(terms[0])

    @torch.library.register_fake("ldarts::mixed_scale")
    def _(grad, weights):
        return [torch.empty_like(grad.contiguous(memory_format=_dense(grad)))
                for _ in range(weights.shape[0])]

    @torch.library.register_fake("ldarts::mixed_dot")
    def dots(grad, terms):
        return grad.new_empty(len(terms), dtype=torch.promote_types(grad.dtype, torch.float32))

    @torch.library.register_fake("ldarts::mixed_grads")
    def _(grad, weights, terms):
        check_terms(weights, terms)
        return dots(grad, terms), [torch.empty_like(term) for term in terms]

    def in_layout_of(like, grads):
        layout = _dense(like)
        return [(torch.zeros_like(like) if g is None else g).contiguous(memory_format=layout) for g in grads]

    def keep(ctx, inputs, output):
        *tensors, last = inputs
        ctx.save_for_backward(*tensors, *(last if isinstance(last, (list, tuple)) else [last]))

    def sum_backward(ctx, grad):
        weights, *terms = ctx.saved_tensors
        by_weights, by_terms = ctx.needs_input_grad
        if by_weights and any(by_terms):
            found, scaled = ops.mixed_grads(grad, weights, terms)
            return found.to(weights.dtype), scaled
        return (ops.mixed_dot(grad, terms).to(weights.dtype) if by_weights else None,
                ops.mixed_scale(grad, weights) if any(by_terms) else [None] * len(terms))

    def scale_backward(ctx, grads):
        grad, weights = ctx.saved_tensors
        grads = in_layout_of(grad, grads)
        by_grad, by_weights = ctx.needs_input_grad
        return (ops.mixed_sum(weights, grads) if by_grad else None,
                ops.mixed_dot(grad, grads).to(weights.dtype) if by_weights else None)

    def dot_backward(ctx, grad_dots):
        grad, *terms = ctx.saved_tensors
        by_grad, by_terms = ctx.needs_input_grad
        return (ops.mixed_sum(grad_dots, terms) if by_grad else None,
                ops.mixed_scale(grad, grad_dots) if any(by_terms) else [None] * len(terms))

    def grads_backward(ctx, grad_dots, grads):
        grad, weights, *terms = ctx.saved_tensors
        by_grad, by_weights, by_terms = ctx.needs_input_grad
        grads = in_layout_of(terms[0], grads)
        weights_of_both = torch.cat([weights.to(grad_dots.dtype), grad_dots])
        return (ops.mixed_sum(weights_of_both, [*grads, *terms]) if by_grad else None,
                ops.mixed_dot(grad, grads).to(weights.dtype) if by_weights else None,
                ops.mixed_scale(grad, grad_dots) if any(by_terms) else [None] * len(terms))

    for name, backward in (("sum", sum_backward), ("scale", scale_backward), ("dot", dot_backward),
                           ("grads", grads_backward)):
        torch.library.register_autograd(f"ldarts::mixed_{name}", backward, setup_context=keep)


def _dense(grad: Tensor) -> torch.memory_format:
    last = (grad.dim() == 4 and not grad.is_contiguous()
            and grad.is_contiguous(memory_format=torch.channels_last))
    return torch.channels_last if last else torch.contiguous_format
