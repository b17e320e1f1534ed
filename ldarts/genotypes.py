"""Genotypes: the derived cells, by their published names, and as files in and out."""
import json
import re
from typing import Any, NamedTuple

from . import genotype_text, published
from .errors import InputError
from .operations import OPS


class Genotype(NamedTuple):
    """A cell of each type: two (operation, input state) a node; states 0 and 1 are the two previous cells."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


PUBLISHED = {name: Genotype(*fields) for name, fields in published.CELLS.items()}


def parse_arch(arch: str) -> list[list[tuple[str, int]]]:
    """NAS-Bench-201's `|op~0|+|op~0|op~1|+…` -> [(operation, input node), …] of each node after the first."""
    nodes = [re.findall(r"\|(\w+)~(\d)(?=\|)", node) for node in arch.split("+")]
    parsed = [[(op, int(source)) for op, source in node] for node in nodes]
    if format_arch(parsed) != arch or [len(node) for node in parsed] != [1, 2, 3]:
        raise InputError(f"{arch!r} is not an arch string of NAS-Bench-201: "
                         "expected |op~0|+|op~0|op~1|+|op~0|op~1|op~2|")
    for node in parsed:
        for position, (op, source) in enumerate(node):
            if op not in OPS or source != position:
                raise InputError(f"arch string {arch!r}: {op}~{source} names no operation "
                                 "or not the node in its place")
    return parsed


def format_arch(nodes: list[list[tuple[str, int]]]) -> str:
    """The inverse of parse_arch."""
    return "+".join("|" + "".join(f"{op}~{source}|" for op, source in node) for node in nodes)


def to_json(genotype: "Genotype | str") -> str:
    """A Genotype, or the arch string of NAS-Bench-201, as the content of a genotype.json."""
    content = {"arch": genotype} if isinstance(genotype, str) else genotype._asdict()
    return json.dumps(content, indent=1) + "\n"


def from_fields(content: dict[str, Any], where: str) -> "Genotype | str":
    """The inverse of to_json, of its fields. Raises InputError, beginning with `where`, for anything else."""
    if set(content) == {"arch"} and isinstance(content["arch"], str):
        parse_arch(content["arch"])
        return content["arch"]
    if not {"normal", "reduce"} <= set(content) <= set(Genotype._fields):
        raise InputError(f"{where}: not a genotype; expected {', '.join(Genotype._fields)}, or arch")
    return Genotype(*_cell(content, "normal", where), *_cell(content, "reduce", where))


def _cell(content: dict[str, Any], part: str, where: str) -> tuple[tuple, tuple]:
    """The edges and the concatenated states, by default all of its nodes, of one type of cell."""
    edges = content[part]
    if not isinstance(edges, list) or not edges or len(edges) % 2:
        raise InputError(f"{where}: {part!r} must list two [operation, state] pairs a node")
    for position, edge in enumerate(edges):
        states = 2 + position // 2  # those that exist before this node
        if not _is_edge(edge, states):
            raise InputError(f"{where}: {part}[{position}] is {json.dumps(edge)[:80]}; expected "
                             f"[operation, state] with a state below {states} and one of {', '.join(OPS)}")
    nodes = range(2, 2 + len(edges) // 2)
    concat = content.get(part + "_concat", list(nodes))
    if not isinstance(concat, list) or not concat or not all(type(s) is int and s in nodes for s in concat):
        raise InputError(f"{where}: {part}_concat must list states from 2 to {nodes[-1]}")
    return tuple(map(tuple, edges)), tuple(concat)


def _is_edge(edge: Any, states: int) -> bool:
    if not isinstance(edge, list) or len(edge) != 2:
        return False
    op, source = edge
    return isinstance(op, str) and op in OPS and type(source) is int and 0 <= source < states


def load(name: str) -> "Genotype | str":
    """A published cell by its name, or the genotype that a text, a run folder or a file holds.

    Returns a Genotype, or an arch string for NAS-Bench-201. Raises InputError that lists the known names.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    try:
        return from_fields(*genotype_text.read(name))
    except OSError as error:
        raise InputError(f"unknown architecture {name[:100]!r}: neither a genotype ({error.strerror}) "
                         f"nor one of {', '.join(PUBLISHED)}") from error
