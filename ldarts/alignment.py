"""Λ and Λ±: how far the cells agree on which operations matter, as functions of their gradients."""
from typing import Sequence

import torch
from torch import Tensor

from .errors import InputError

KINDS = ("cosine", "sign")


def layer_alignment(grads: Sequence[Tensor], kind: str = "cosine") -> Tensor:
    """Mean over the pairs of cells of the agreement of their gradients -> scalar in [-1, 1], differentiable.

    grads: g_l = ∂L/∂p_l of each cell, n ≥ 2 tensors of one size and any shape. kind: `cosine`, the cosine
    (Λ, eq. 7 of Movahedi et al., 2023), or `sign`, ⟨g_i, g_j⟩ / ⟨|g_i|, |g_j|⟩ with |·| per element (Λ±).
    """
    if len(grads) < 2:
        raise InputError(f"Λ compares the gradients of at least two cells, got {len(grads)}: "
                         "use more layers or λ = 0")
    g = torch.stack([grad.flatten() for grad in grads])  # [n, edges * ops]
    if kind == "cosine":
        g = g / g.norm(dim=1, keepdim=True)
        pairs = g @ g.T  # [n, n]
    elif kind == "sign":
        pairs = (g @ g.T) / (g.abs() @ g.abs().T)
    else:
        raise InputError(f"unknown alignment {kind!r}: use one of {', '.join(KINDS)}")
    n = len(grads)
    return (pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))
