"""The text of a genotype, read into the fields of a `Genotype` without evaluating any of it.

It is JSON, or DARTS's `Genotype(normal=[('sep_conv_3x3', 1), …], normal_concat=range(2, 6), …)`, or an arch
string of NAS-Bench-201; typed, or in a file: a genotype.json, a text or log (its last one), a Python module.
"""
import ast
import json
import re
from pathlib import Path
from typing import Any, Iterator

from .errors import InputError, brief

FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")
ARCH = re.compile(r"\|\w+~0\|(?:\+\|[\w~|]+\|){2}")
READERS = {"range": lambda *of: list(range(*of)[:100]), "list": list, "tuple": list}  # calls that are read


def is_typed(name: str) -> bool:
    """Whether this is a genotype's text itself, and no path."""
    return bool(re.match(r"\s*[\ufeff{|]", name) or re.search(r"Genotype\s*\(|~0\|\+", name))


def read(name: str) -> tuple[dict[str, Any], str]:
    """(fields, where they stand) of a text, or of what a path names: a run folder, a file, `module.py:CELL`.

    Raises OSError where there is no such file, InputError for a file without a genotype.
    """
    if is_typed(name):
        return fields(name, "--arch"), "--arch"
    path, cell = re.fullmatch(r"(.*?)(?:(?<=\.py):(\w+))?", name, re.DOTALL).groups()
    path = Path(path)
    if path.is_dir() and not (path := path / "genotype.json").is_file():
        raise InputError(f"{path}: not there; a search writes it at the end of its first epoch")
    content = path.read_bytes()
    text = content.decode(json.detect_encoding(content), errors="replace")  # by the byte-order mark
    where = str(path)
    return (of_module(text, cell, where) if path.suffix == ".py" else fields(text, where)), where


def fields(text: str, where: str) -> dict[str, Any]:
    """The fields of the genotype in a text, of the last where there are several."""
    text = text.strip("\ufeff \t\r\n")
    try:
        if text.startswith("{"):
            return json.loads(text)
        if text.startswith("|"):
            return {"arch": text}
        calls = [match.start() for match in re.finditer(r"\bGenotype\s*\(", text)]
        for call in filter(None, (balanced(text, start) for start in reversed(calls))):
            return of_call(ast.parse(call, mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: not a genotype ({brief(error)})") from error
    if archs := ARCH.findall(text):
        return {"arch": archs[-1]}
    raise InputError(f"{where}: no genotype; expected JSON with {', '.join(FIELDS)}, or arch, or the text "
                     "Genotype(normal=[…], …)")


def balanced(text: str, start: int) -> str:
    """The text from `start` to where its parentheses are closed, empty where they never are."""
    depth = 0
    for match in re.compile("[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return text[start : match.end()]
    return ""


def of_module(text: str, cell: str | None, where: str) -> dict[str, Any]:
    """The fields of the genotype that a module's text gives the name `cell`, without it of the only one."""
    try:
        values = dict(assignments(ast.parse(text)))
        for name in values:  # DARTS = DARTS_V2
            value = values[name]
            values[name] = values.get(value.id) if isinstance(value, ast.Name) else value
        cells = {name: value for name, value in values.items()
                 if isinstance(value, ast.Call) and called(value) == "Genotype"}
        cell = cell or (next(iter(cells)) if len(cells) == 1 else None)
        if cell in cells:
            return of_call(cells[cell])
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: cannot be read ({brief(error)})") from error
    raise InputError(f"{where}: name one of its genotypes behind the file, as in genotypes.py:NAME: "
                     f"{', '.join(cells) or 'it has none'}")


def assignments(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            yield from ((target.id, statement.value) for target in statement.targets
                        if isinstance(target, ast.Name))


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def of_call(call: ast.Call) -> dict[str, Any]:
    """The arguments of `Genotype(…)` by their names, lists for tuples, as in JSON."""
    arguments = dict(zip(FIELDS, call.args)) | {keyword.arg: keyword.value for keyword in call.keywords}
    return json.loads(json.dumps({name: value_of(value) for name, value in arguments.items()}))


def value_of(node: ast.expr) -> Any:
    """A literal, or a range, list or tuple of literals."""
    if isinstance(node, ast.Call):
        if called(node) not in READERS:
            raise ValueError(f"{ast.unparse(node)} is neither a literal nor a range")
        return READERS[called(node)](*map(value_of, node.args))
    return ast.literal_eval(node)
