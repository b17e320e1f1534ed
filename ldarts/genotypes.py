"""Genotypes: the published cells by name, and cells read from text and files without running any of it.

A text is JSON, DARTS's `Genotype(normal=[('sep_conv_3x3', 1), …], normal_concat=range(2, 6), …)`, or an arch
string of NAS-Bench-201. A file is a genotype.json, a log (its last genotype counts), or a Python module.
"""
import ast
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError, brief
from .operations import OPS
from .spaces import SHORT


class Genotype(NamedTuple):
    """A cell of each type: two (operation, input state) a node; states 0 and 1 are the two previous cells."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


# Published cells: Λ-DARTS (Movahedi et al., 2023; corr: Λ, sign: Λ±; a number is the seed, other names have
# data set and space), NASNet-A (Zoph et al., 2018), AmoebaNet-A (Real et al., 2019), DARTS (Liu et al.,
# 2019). A row has the edges of the normal and of the reduction cell, two a node, each an operation and the
# state that it reads; then the states that each cell concatenates, if they are not 2 to 5.
_TABLE = {
    "c100_s1_lambdadarts_corr": ("dil3.0 dil5.1 dil5.0 sep3.1 dil3.3 skip.0 sep3.0 dil3.3",
                                 "max.1 max.0 dil5.2 max.1 dil5.3 sep3.1 dil5.4 dil5.3"),
    "c100_s2_lambdadarts_corr": ("sep3.0 skip.1 sep3.2 sep3.0 sep3.0 sep3.3 sep3.4 sep3.3",
                                 "sep3.0 sep3.1 sep3.2 sep3.1 sep3.3 sep3.2 sep3.3 sep3.4"),
    "c100_s3_lambdadarts_corr": ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.2 sep3.1",
                                 "sep3.1 sep3.0 sep3.2 sep3.1 sep3.0 sep3.3 sep3.3 sep3.4"),
    "c100_s4_lambdadarts_corr": ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.2 sep3.0 sep3.1",
                                 "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.2"),
    "c10_s1_lambdadarts_corr":  ("skip.1 dil3.0 dil5.0 sep3.1 sep3.1 sep3.2 max.1 dil5.4",
                                 "max.0 max.1 max.0 dil5.2 max.0 max.1 max.0 dil5.2"),
    "c10_s2_lambdadarts_corr":  ("skip.1 skip.0 sep3.2 skip.1 sep3.2 sep3.1 sep3.4 sep3.1",
                                 "sep3.0 skip.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.4 sep3.1"),
    "c10_s3_lambdadarts_corr":  ("skip.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.3 sep3.0 sep3.4",
                                 "sep3.1 sep3.0 skip.1 skip.0 sep3.0 sep3.1 sep3.1 skip.2"),
    "c10_s4_lambdadarts_corr":  ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1",
                                 "sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1"),
    "lambdadarts_corr_0":       ("sep5.0 skip.1 sep3.2 sep5.1 sep3.1 max.0 dil3.2 max.0",
                                 "skip.1 skip.0 max.0 dil3.2 dil5.3 dil5.1 skip.1 sep5.2"),
    "lambdadarts_corr_1":       ("sep3.0 sep5.1 sep3.1 sep3.0 sep3.1 skip.0 skip.0 sep3.1",
                                 "max.0 max.1 max.0 max.1 max.0 dil5.3 dil5.4 dil5.3"),
    "lambdadarts_corr_2":       ("sep3.0 sep3.1 sep3.1 skip.0 sep3.1 skip.0 sep3.4 dil3.3",
                                 "skip.0 max.1 max.0 sep5.1 dil5.3 max.0 dil5.3 dil5.4"),
    "lambdadarts_corr_3":       ("sep3.0 sep3.1 sep3.0 skip.1 sep3.1 sep3.0 dil5.4 max.1",
                                 "skip.0 skip.1 dil5.2 sep3.1 dil5.3 avg.0 skip.1 dil5.4"),
    "lambdadarts_sign_0":       ("sep5.1 sep3.0 dil5.2 dil3.0 dil3.3 sep3.0 dil3.4 skip.0",
                                 "sep3.0 max.1 skip.0 skip.2 sep5.3 dil3.2 dil5.4 sep5.3"),
    "lambdadarts_sign_1":       ("sep3.1 sep5.0 sep3.1 skip.0 sep3.2 sep3.1 max.0 dil5.4",
                                 "max.0 sep3.1 max.0 skip.2 dil5.3 max.0 dil5.2 sep5.0"),
    "lambdadarts_sign_2":       ("sep3.1 skip.0 sep3.2 sep3.1 dil5.3 sep3.1 dil3.3 sep5.2",
                                 "max.0 skip.1 max.0 dil5.2 max.0 dil5.3 dil5.4 dil5.3"),
    "lambdadarts_sign_3":       ("sep3.1 skip.0 sep3.1 sep3.2 sep3.1 dil5.3 dil3.3 dil3.2",
                                 "avg.1 max.0 skip.2 max.0 dil5.3 skip.2 skip.2 skip.3"),
    "svhn_s1_lambdadarts_corr": ("dil3.0 dil5.1 dil5.0 dil3.2 dil3.3 sep3.2 sep3.0 max.1",
                                 "max.1 max.0 dil5.2 max.1 dil5.3 dil3.2 dil5.3 dil5.4"),
    "svhn_s2_lambdadarts_corr": ("skip.1 sep3.0 sep3.2 sep3.1 sep3.1 sep3.0 sep3.3 sep3.1",
                                 "skip.0 skip.1 sep3.2 skip.1 skip.0 skip.1 sep3.2 sep3.4"),
    "svhn_s3_lambdadarts_corr": ("sep3.1 sep3.0 sep3.1 sep3.2 sep3.2 sep3.1 sep3.3 sep3.4",
                                 "sep3.0 sep3.1 sep3.2 sep3.0 sep3.3 sep3.2 sep3.3 sep3.4"),
    "svhn_s4_lambdadarts_corr": ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1 sep3.0 sep3.1",
                                 "sep3.0 sep3.1 sep3.0 sep3.2 sep3.0 sep3.1 sep3.0 sep3.3"),
    "NASNet":                   ("sep5.1 sep3.0 sep5.0 sep3.0 avg.1 skip.0 avg.0 avg.0 sep3.1 skip.1",
                                 "sep5.1 sep7.0 max.1 sep7.0 avg.1 sep5.0 skip.3 avg.2 sep3.2 max.1",
                                 (2, 3, 4, 5, 6), (4, 5, 6)),
    "AmoebaNet":                ("avg.0 max.1 sep3.0 sep5.2 sep3.0 avg.3 sep3.1 skip.1 skip.0 avg.1",
                                 "avg.0 sep3.1 max.0 sep7.2 sep7.0 avg.1 max.0 max.1 c71.0 sep3.5",
                                 (4, 5, 6), (3, 4, 6)),
    "DARTS_V1":                 ("sep3.1 sep3.0 skip.0 sep3.1 skip.0 sep3.1 sep3.0 skip.2",
                                 "max.0 max.1 skip.2 max.0 max.0 skip.2 skip.2 avg.0"),
    "DARTS_V2":                 ("sep3.0 sep3.1 sep3.0 sep3.1 sep3.1 skip.0 skip.0 dil3.2",
                                 "max.0 max.1 skip.2 max.1 max.0 skip.2 skip.2 max.1"),
}


def _published(normal: str, reduce: str, normal_concat=(2, 3, 4, 5), reduce_concat=(2, 3, 4, 5)) -> Genotype:
    def edges(text: str) -> tuple[tuple[str, int], ...]:
        return tuple((SHORT[name], int(state)) for name, state in re.findall(r"(\w+)\.(\d)", text))
    return Genotype(edges(normal), normal_concat, edges(reduce), reduce_concat)


PUBLISHED = {name: _published(*row) for name, row in _TABLE.items()}
PUBLISHED |= {"LAMBDA_DARTS": PUBLISHED["lambdadarts_corr_3"], "DARTS": PUBLISHED["DARTS_V2"]}

ARCH = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|"  # of NAS-Bench-201, for the operations of the six edges
ARCH_PATTERN = re.compile(re.escape(ARCH).replace(r"\{\}", r"(\w+)"))


def parse_arch(arch: str) -> tuple[str, ...]:
    """The six operations of an arch string, in its order. Raises InputError for another text."""
    match = ARCH_PATTERN.fullmatch(arch)
    if not match or not set(match.groups()) <= set(OPS):
        example = ARCH.format(*["op"] * 6)
        raise InputError(f"{arch!r} is not an arch string of NAS-Bench-201: expected {example}")
    return match.groups()


def to_json(genotype: Genotype | str) -> str:
    """A Genotype, or the arch string of NAS-Bench-201, as the content of a genotype.json."""
    content = {"arch": genotype} if isinstance(genotype, str) else genotype._asdict()
    return json.dumps(content, indent=1) + "\n"


def load(name: str) -> Genotype | str:
    """A published cell by its name, or the genotype in a text, a run folder, a file, or `module.py:CELL`.

    Returns a Genotype, or an arch string for NAS-Bench-201. Raises InputError that lists the known names.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if is_text(name):
        return parse(name, "--arch")
    path, cell = re.fullmatch(r"(.*?)(?:(?<=\.py):(\w+))?", name, re.DOTALL).groups()
    path = Path(path)
    try:
        if path.is_dir() and not (path := path / "genotype.json").is_file():
            raise InputError(f"{path}: no such file; a search writes it at the end of its first epoch")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"unknown architecture {name[:100]!r}: neither a genotype ({error.strerror}) "
                         f"nor one of {', '.join(PUBLISHED)}") from error
    return parse(content.decode(json.detect_encoding(content), errors="replace"), str(path), cell)


def is_text(name: str) -> bool:
    """Whether this is the text of a genotype and not a path."""
    return bool(re.match(r"\s*[\ufeff{|]", name) or re.search(r"Genotype\s*\(|~0\|\+", name))


# `Genotype(…)`, with calls and tuples in it, three deep; a call of range.
CALL = re.compile(r"\bGenotype\s*\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)")
RANGE = re.compile(r"range\(\s*(?:(\d+)\s*,\s*)?(\d+)\s*\)")


def parse(text: str, where: str, cell: str | None = None) -> Genotype | str:
    """The genotype in a text, the last if there are several; in a module (where: *.py) the one called `cell`.

    Raises InputError, beginning with `where`, if there is none.
    """
    try:
        text = named_in_module(text, cell, where) if where.endswith(".py") else text.strip("\ufeff \t\r\n")
        if text.startswith("{"):
            parts = json.loads(text)
        elif calls := CALL.findall(text):
            parts = arguments(calls[-1])
        else:
            archs = [text] if text.startswith("|") else [match[0] for match in ARCH_PATTERN.finditer(text)]
            parts = {"arch": archs[-1]} if archs else {}
    except InputError:
        raise
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: not a genotype ({brief(error)})") from error
    if set(parts) == {"arch"} and isinstance(parts["arch"], str):
        parse_arch(parts["arch"])
        return parts["arch"]
    if not {"normal", "reduce"} <= set(parts) <= set(Genotype._fields):
        raise InputError(f"{where}: no genotype; expected {', '.join(Genotype._fields)}, or arch")
    return Genotype(*checked_cell(parts, "normal", where), *checked_cell(parts, "reduce", where))


def arguments(call: str) -> dict[str, Any]:
    """The arguments of `Genotype(…)` by name; tuples and ranges become lists, as in JSON."""
    call = RANGE.sub(lambda match: str([*range(int(match[1] or 0), int(match[2]))[:100]]), call)
    call = re.sub(r"\b(list|tuple)\(", "(", call)
    node = ast.parse(call, mode="eval").body
    by_name = dict(zip(Genotype._fields, node.args)) | {each.arg: each.value for each in node.keywords}
    return json.loads(json.dumps({name: ast.literal_eval(value) for name, value in by_name.items()}))


def named_in_module(text: str, cell: str | None, where: str) -> str:
    """The text of the genotype called `cell` in a module's text; of the only one if cell is None."""
    assigned = [statement for statement in ast.parse(text).body if isinstance(statement, ast.Assign)]
    values = {ast.unparse(target): ast.unparse(each.value) for each in assigned for target in each.targets}
    values = {name: values.get(value, value) for name, value in values.items()}  # DARTS = DARTS_V2
    cells = {name: value for name, value in values.items() if re.match(r"(\w+\.)?Genotype\(", value)}
    if cell is None and len(cells) == 1:
        return next(iter(cells.values()))
    if cell not in cells:
        raise InputError(f"{where}: name one of its genotypes, as in genotypes.py:NAME: "
                         f"{', '.join(cells) or 'it has none'}")
    return cells[cell]


def checked_cell(parts: dict[str, Any], part: str, where: str) -> tuple[tuple, tuple]:
    """The edges and the concatenated states (default: all nodes) of one type of cell."""
    edges = parts[part]
    if not isinstance(edges, list) or not edges or len(edges) % 2:
        raise InputError(f"{where}: {part!r} must list two [operation, state] pairs a node")
    for position, edge in enumerate(edges):
        states = range(2 + position // 2)  # those before this node
        if not (isinstance(edge, list) and len(edge) == 2 and isinstance(edge[0], str) and edge[0] in OPS
                and type(edge[1]) is int and edge[1] in states):
            raise InputError(f"{where}: {part}[{position}] is {json.dumps(edge)[:80]}; expected [operation, "
                             f"state] with a state below {len(states)} and one of {', '.join(OPS)}")
    nodes = range(2, 2 + len(edges) // 2)
    concat = parts.get(part + "_concat", list(nodes))
    if not isinstance(concat, list) or not concat or not all(type(s) is int and s in nodes for s in concat):
        raise InputError(f"{where}: {part}_concat must list states from 2 to {nodes[-1]}")
    return tuple(map(tuple, edges)), tuple(concat)
