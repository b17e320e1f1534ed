"""Λ and Λ±: how far the cells agree on which operations matter; and each cell's share in that decision."""
from typing import Sequence

import torch
from torch import Tensor

from .errors import InputError

KINDS = ("cosine", "sign")


def layer_alignment(grads: Sequence[Tensor], kind: str = "cosine") -> Tensor:
    """The mean agreement of two cells' gradients, over all pairs -> scalar in [-1, 1], differentiable.

    grads: g_l = ∂L/∂p_l of each cell, n ≥ 2 tensors of one size and any shape. kind: `cosine`, the cosine
    (Λ, eq. 7 of Movahedi et al., 2023), or `sign`, ⟨g_i, g_j⟩ / ⟨|g_i|, |g_j|⟩ with |·| per element (Λ±).
    A pair in which a gradient is 0 counts as 0.
    """
    if (n := len(grads)) < 2:
        raise InputError(f"Λ compares the gradients of at least two cells, got {n}: use more layers or λ = 0")
    g = torch.stack([grad.flatten() for grad in grads])  # [n, edges * ops]
    if kind == "cosine":
        lengths = g.norm(dim=1, keepdim=True)
        g = g / lengths.where(lengths > 0, 1)
        pairs = g @ g.T  # [n, n]
    elif kind == "sign":
        of_sizes = g.abs() @ g.abs().T
        pairs = (g @ g.T) / of_sizes.where(of_sizes > 0, 1)
    else:
        raise InputError(f"unknown alignment {kind!r}: use one of {', '.join(KINDS)}")
    return (pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))


def cell_shares(grads: Tensor, p: Tensor) -> Tensor:
    """Each cell's share in ∂L/∂α -> a [n], whose sum is 1; negative for a cell that pulls against it.

    grads: g_l = ∂L/∂p_l of n cells of one type [n, edges, ops]; p: their softmax(α) [edges, ops].
    a_l = ⟨h_l, Σ_k h_k⟩ / ‖Σ_k h_k‖², with h_l = p ⊙ (g_l − ⟨p, g_l⟩ on each edge), its part of ∂L/∂α.
    """
    h = (p * (grads - (p * grads).sum(-1, keepdim=True))).flatten(1)  # [n, edges * ops]
    total = h.sum(0)
    return h @ total / total.dot(total).clamp_min(torch.finfo(total.dtype).tiny)  # 0 where ∂L/∂α is 0
