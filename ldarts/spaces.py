"""The search spaces, as data."""
from typing import NamedTuple

from .errors import InputError


class Space(NamedTuple):
    """Candidate operations of each edge, by nodes: 14 edges in a DARTS cell, 6 in NAS-Bench-201."""

    normal: tuple[tuple[str, ...], ...]
    reduce: tuple[tuple[str, ...], ...]  # empty where the reduction cells are fixed


SHORT = {  # names of operations in tables
    "skip": "skip_connect", "max": "max_pool_3x3", "avg": "avg_pool_3x3",
    "sep3": "sep_conv_3x3", "sep5": "sep_conv_5x5", "sep7": "sep_conv_7x7",
    "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5", "c71": "conv_7x1_1x7",
}


def _edges(table: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(SHORT[name] for name in edge.split("|")) for edge in table.split())


def _uniform(*names: str) -> Space:
    return Space((names,) * 14, (names,) * 14)


# No `none`, as in the published Λ-DARTS code.
_DARTS = _uniform("max_pool_3x3", "avg_pool_3x3", "skip_connect",
                  "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")

SPACES = {
    "darts": _DARTS,
    "s5": _DARTS,  # the name it has in the published code
    "s1": Space(  # Zela et al., 2020: of each edge the two operations with the largest α after a DARTS search
        _edges("skip|dil3 skip|dil5 skip|dil5 skip|sep3 skip|dil3 max|skip skip|sep3 "
               "skip|sep3 skip|dil3 skip|sep3 max|skip skip|dil3 dil3|dil5 dil3|dil5"),
        _edges("max|avg max|dil3 max|avg max|avg skip|dil5 max|avg max|sep3 "
               "skip|dil3 skip|dil5 max|avg max|avg skip|dil5 skip|dil5 skip|dil5"),
    ),
    "s2": _uniform("skip_connect", "sep_conv_3x3"),
    "s3": _uniform("none", "skip_connect", "sep_conv_3x3"),
    "s4": _uniform("noise", "sep_conv_3x3"),
    "nasbench201": Space((("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),) * 6, ()),
}


def get(name: str) -> Space:
    """The space called `name`. Raises InputError for an unknown name, not 14 edges (nasbench201: 6),
    and for edges with different numbers of operations."""
    if name not in SPACES:
        raise InputError(f"unknown search space {name!r}: use one of {', '.join(SPACES)}")
    count, expected = tuple(map(len, SPACES[name])), (6, 0) if name == "nasbench201" else (14, 14)
    if count != expected:
        raise InputError(f"search space {name!r}: {count} edges in the normal and the reduction cell; "
                         f"{expected} are needed")
    for edges in SPACES[name]:
        if len(counts := sorted({len(edge) for edge in edges})) > 1:
            raise InputError(f"search space {name!r}: its edges have {counts[0]} to {counts[-1]} operations, "
                             "α has one column for each; fill the shorter ones up with \"none\"")
    return SPACES[name]
