"""Genotypes: the derived cells, the published ones by name, and JSON files in and out."""
import json
import re
from pathlib import Path
from typing import NamedTuple

from .errors import InputError
from .operations import OPS


class Genotype(NamedTuple):
    """A cell of each type: two (operation, input state) a node, in order; states 0 and 1 are the two previous cells."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


def parse_arch(arch: str) -> list[list[tuple[str, int]]]:
    """NAS-Bench-201's `|op~0|+|op~0|op~1|+…` -> [(operation, input node), …] for each node after the first."""
    nodes = [re.findall(r"\|(\w+)~(\d+)(?=\|)", node) for node in arch.split("+")]
    parsed = [[(op, int(source)) for op, source in node] for node in nodes]
    if format_arch(parsed) != arch or [len(node) for node in parsed] != [1, 2, 3]:
        raise InputError(f"{arch!r} is not an arch string of NAS-Bench-201: expected |op~0|+|op~0|op~1|+|op~0|op~1|op~2|")
    for node in parsed:
        for position, (op, source) in enumerate(node):
            if op not in OPS or source != position:
                raise InputError(f"arch string {arch!r}: {op}~{source} names no operation or not the node in its place")
    return parsed


def format_arch(nodes: list[list[tuple[str, int]]]) -> str:
    """The inverse of parse_arch."""
    return "+".join("|" + "".join(f"{op}~{source}|" for op, source in node) for node in nodes)


def to_json(genotype: "Genotype | str") -> str:
    """A Genotype, or the arch string of NAS-Bench-201, as the content of a genotype.json."""
    return json.dumps({"arch": genotype} if isinstance(genotype, str) else genotype._asdict(), indent=1) + "\n"


def from_json(text: str, where: str) -> "Genotype | str":
    """The inverse of to_json. Raises InputError, beginning with `where`, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); expected the genotype.json of a search") from error
    if isinstance(content, dict) and set(content) == {"arch"} and isinstance(content["arch"], str):
        parse_arch(content["arch"])
        return content["arch"]
    if not isinstance(content, dict) or set(content) != set(Genotype._fields):
        raise InputError(f"{where}: not a genotype; expected an object with {', '.join(Genotype._fields)}, or arch")
    for part in ("normal", "reduce"):
        edges, concat = content[part], content[part + "_concat"]
        if not isinstance(edges, list) or not edges or len(edges) % 2:
            raise InputError(f"{where}: {part!r} must list two [operation, state] pairs a node")
        for position, edge in enumerate(edges):
            states = 2 + position // 2  # those that exist before this node
            if not (isinstance(edge, list) and len(edge) == 2 and isinstance(edge[0], str) and edge[0] in OPS
                    and type(edge[1]) is int and 0 <= edge[1] < states):
                raise InputError(f"{where}: {part}[{position}] is {json.dumps(edge)[:80]}; expected [operation, state] with "
                                 f"a state below {states} and one of {', '.join(OPS)}")
        if not (isinstance(concat, list) and concat
                and all(type(s) is int and 2 <= s < 2 + len(edges) // 2 for s in concat)):
            raise InputError(f"{where}: {part}_concat must list states from 2 to {1 + len(edges) // 2}")
    return Genotype(tuple(map(tuple, content["normal"])), tuple(content["normal_concat"]),
                    tuple(map(tuple, content["reduce"])), tuple(content["reduce_concat"]))


def load(name: str) -> "Genotype | str":
    """A published cell by its name, or the genotype of a run folder, a genotype.json or an arch string.

    Returns a Genotype, or an arch string for NAS-Bench-201. Raises InputError that lists the known names.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name.startswith("|"):
        parse_arch(name)
        return name
    path = Path(name)
    path = path / "genotype.json" if path.is_dir() else path
    try:
        return from_json(path.read_bytes().decode(), str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        known = ", ".join(PUBLISHED)
        raise InputError(f"unknown architecture {name!r}: neither a readable genotype file nor one of {known}") from error


_SHORT = {
    "skip": "skip_connect", "max": "max_pool_3x3", "avg": "avg_pool_3x3", "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5", "sep7": "sep_conv_7x7", "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5", "c71": "conv_7x1_1x7",
}


def _cell(text: str) -> tuple[tuple[str, int], ...]:
    """`sep3.0 skip.1 …`: an operation and the state it reads, two a node."""
    return tuple((_SHORT[name], int(state)) for name, state in (edge.split(".") for edge in text.split()))


def _genotype(normal: str, reduce: str, normal_concat=(2, 3, 4, 5), reduce_concat=(2, 3, 4, 5)) -> Genotype:
    return Genotype(_cell(normal), normal_concat, _cell(reduce), reduce_concat)


# Published cells: Λ-DARTS (cosine: corr, sign: sign; by seed, and by data set and space), NASNet-A (Zoph et al., 2018),
# AmoebaNet-A (Real et al., 2019), DARTS (Liu et al., 2019).
PUBLISHED = {
    "c100_s1_lambdadarts_corr": _genotype(
        "dil3.0 dil5.1 dil5.0 sep3.1 dil3.3 skip.0 sep3.0 dil3.3",
        "max.1 max.0 dil5.2 max.1 dil5.3 sep3.1 dil5.4 dil5.3"),
    "c100_s2_lambdadarts_corr": _genotype(
        "sep3.0 skip.1 sep3.2 sep3.0 sep3.0 sep3.3 sep3.4 sep3.3",
        "sep3.0 sep3.1 sep3.2 sep3.1 sep3.3 sep3.2 sep3.3 sep3.4"),
    "c100_s3_lambdadarts_corr": _genotype(
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.2 sep3.1",
        "sep3.1 sep3.0 sep3.2 sep3.1 sep3.0 sep3.3 sep3.3 sep3.4"),
    "c100_s4_lambdadarts_corr": _genotype(
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.2 sep3.0 sep3.1",
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.2"),
    "c10_s1_lambdadarts_corr": _genotype(
        "skip.1 dil3.0 dil5.0 sep3.1 sep3.1 sep3.2 max.1 dil5.4",
        "max.0 max.1 max.0 dil5.2 max.0 max.1 max.0 dil5.2"),
    "c10_s2_lambdadarts_corr": _genotype(
        "skip.1 skip.0 sep3.2 skip.1 sep3.2 sep3.1 sep3.4 sep3.1",
        "sep3.0 skip.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.4 sep3.1"),
    "c10_s3_lambdadarts_corr": _genotype(
        "skip.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.3 sep3.0 sep3.4",
        "sep3.1 sep3.0 skip.1 skip.0 sep3.0 sep3.1 sep3.1 skip.2"),
    "c10_s4_lambdadarts_corr": _genotype(
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1",
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1"),
    "lambdadarts_corr_0": _genotype(
        "sep5.0 skip.1 sep3.2 sep5.1 sep3.1 max.0 dil3.2 max.0",
        "skip.1 skip.0 max.0 dil3.2 dil5.3 dil5.1 skip.1 sep5.2"),
    "lambdadarts_corr_1": _genotype(
        "sep3.0 sep5.1 sep3.1 sep3.0 sep3.1 skip.0 skip.0 sep3.1",
        "max.0 max.1 max.0 max.1 max.0 dil5.3 dil5.4 dil5.3"),
    "lambdadarts_corr_2": _genotype(
        "sep3.0 sep3.1 sep3.1 skip.0 sep3.1 skip.0 sep3.4 dil3.3",
        "skip.0 max.1 max.0 sep5.1 dil5.3 max.0 dil5.3 dil5.4"),
    "lambdadarts_corr_3": _genotype(
        "sep3.0 sep3.1 sep3.0 skip.1 sep3.1 sep3.0 dil5.4 max.1",
        "skip.0 skip.1 dil5.2 sep3.1 dil5.3 avg.0 skip.1 dil5.4"),
    "lambdadarts_sign_0": _genotype(
        "sep5.1 sep3.0 dil5.2 dil3.0 dil3.3 sep3.0 dil3.4 skip.0",
        "sep3.0 max.1 skip.0 skip.2 sep5.3 dil3.2 dil5.4 sep5.3"),
    "lambdadarts_sign_1": _genotype(
        "sep3.1 sep5.0 sep3.1 skip.0 sep3.2 sep3.1 max.0 dil5.4",
        "max.0 sep3.1 max.0 skip.2 dil5.3 max.0 dil5.2 sep5.0"),
    "lambdadarts_sign_2": _genotype(
        "sep3.1 skip.0 sep3.2 sep3.1 dil5.3 sep3.1 dil3.3 sep5.2",
        "max.0 skip.1 max.0 dil5.2 max.0 dil5.3 dil5.4 dil5.3"),
    "lambdadarts_sign_3": _genotype(
        "sep3.1 skip.0 sep3.1 sep3.2 sep3.1 dil5.3 dil3.3 dil3.2",
        "avg.1 max.0 skip.2 max.0 dil5.3 skip.2 skip.2 skip.3"),
    "svhn_s1_lambdadarts_corr": _genotype(
        "dil3.0 dil5.1 dil5.0 dil3.2 dil3.3 sep3.2 sep3.0 max.1",
        "max.1 max.0 dil5.2 max.1 dil5.3 dil3.2 dil5.3 dil5.4"),
    "svhn_s2_lambdadarts_corr": _genotype(
        "skip.1 sep3.0 sep3.2 sep3.1 sep3.1 sep3.0 sep3.3 sep3.1",
        "skip.0 skip.1 sep3.2 skip.1 skip.0 skip.1 sep3.2 sep3.4"),
    "svhn_s3_lambdadarts_corr": _genotype(
        "sep3.1 sep3.0 sep3.1 sep3.2 sep3.2 sep3.1 sep3.3 sep3.4",
        "sep3.0 sep3.1 sep3.2 sep3.0 sep3.3 sep3.2 sep3.3 sep3.4"),
    "svhn_s4_lambdadarts_corr": _genotype(
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1",
        "sep3.0 sep3.1 sep3.0 sep3.2 sep3.0 sep3.1 sep3.0 sep3.3"),
    "NASNet": _genotype(
        "sep5.1 sep3.0 sep5.0 sep3.0 avg.1 skip.0 avg.0 avg.0 sep3.1 skip.1",
        "sep5.1 sep7.0 max.1 sep7.0 avg.1 sep5.0 skip.3 avg.2 sep3.2 max.1",
        normal_concat=(2, 3, 4, 5, 6),
        reduce_concat=(4, 5, 6)),
    "AmoebaNet": _genotype(
        "avg.0 max.1 sep3.0 sep5.2 sep3.0 avg.3 sep3.1 skip.1 skip.0 avg.1",
        "avg.0 sep3.1 max.0 sep7.2 sep7.0 avg.1 max.0 max.1 c71.0 sep3.5",
        normal_concat=(4, 5, 6),
        reduce_concat=(3, 4, 6)),
    "DARTS_V1": _genotype(
        "sep3.1 sep3.0 skip.0 sep3.1 skip.0 sep3.1 sep3.0 skip.2",
        "max.0 max.1 skip.2 max.0 max.0 skip.2 skip.2 avg.0"),
    "DARTS_V2": _genotype(
        "sep3.0 sep3.1 sep3.0 sep3.1 sep3.1 skip.0 skip.0 dil3.2",
        "max.0 max.1 skip.2 max.1 max.0 skip.2 skip.2 max.1"),
}
PUBLISHED["LAMBDA_DARTS"] = PUBLISHED["lambdadarts_corr_3"]
PUBLISHED["DARTS"] = PUBLISHED["DARTS_V2"]
