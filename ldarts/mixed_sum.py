"""The weighted sum of a mixed operation, Σ_m weights[m] · terms[m], on which every supernet here is built."""
from typing import Sequence

import torch
from torch import Tensor


def mixed_sum(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Σ_m weights[m] * terms[m] -> a tensor like the terms.

    weights: [M], of the terms' dtype or a wider one; terms: M tensors of one shape, dtype and device. Accumulates in
    float32 or wider. Raises ValueError that names the term and the property where they differ.
    """
    if len(terms) == 0 or weights.shape != (len(terms),):
        raise ValueError(f"mixed_sum: weights of shape {list(weights.shape)} for {len(terms)} terms; "
                         "it takes one weight a term and at least one term")
    first = terms[0]
    for m, term in enumerate(terms):
        for name in ("shape", "dtype", "device"):
            if getattr(term, name) != getattr(first, name):
                raise ValueError(f"mixed_sum: term {m} has {name} {getattr(term, name)}, term 0 has {getattr(first, name)}")
    return mixed_sum_ref(weights, terms)


def mixed_sum_ref(weights: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """The same as a Python sum: what the fused one is tested against."""
    wide = torch.promote_types(terms[0].dtype, torch.float32)
    return sum(w * term.to(wide) for w, term in zip(weights.to(wide).unbind(), terms)).to(terms[0].dtype)
