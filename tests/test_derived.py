"""Derived networks as users bring them: genotypes from logs and modules, others' weights, runs cut short."""
import json
import sys

import pytest

from ldarts import InputError, genotypes
from ldarts.genotypes import PUBLISHED, to_json

CELL = PUBLISHED["DARTS_V2"]
ARCH = "|nor_conv_3x3~0|+|nor_conv_3x3~0|skip_connect~1|+|none~0|avg_pool_3x3~1|nor_conv_1x1~2|"


def original(cell, concat="range(2, 6)"):
    """The text that DARTS prints of a cell; concat: "" for none"""
    fields = {name: f"{list(value)}" for name, value in cell._asdict().items()}
    fields |= {name: concat for name in ("normal_concat", "reduce_concat")}
    return f"Genotype({', '.join(f'{name}={value}' for name, value in fields.items() if value)})"


TEXT = original(CELL)
OTHER = original(PUBLISHED["DARTS_V1"])
NO_CONCAT = json.dumps({"normal": CELL.normal, "reduce": CELL.reduce})
MODULE = f"Genotype = namedtuple('Genotype', '')\nPRIMITIVES = ['none']\nV1 = {OTHER}\nV2 = {TEXT}\nBEST = V2\n"
FILES = {
    "log.txt": f"12:00 genotype = {OTHER}\n12:01 genotype = {TEXT} epoch (1\n12:02 genotype = {OTHER[:99]}",
    "genotypes.py": MODULE, "one.py": f"import os\nX = {TEXT}\n", "201.log": f"Structure(4 nodes with {ARCH})",
    "marked.json": "\ufeff" + to_json(CELL), "bare.json": NO_CONCAT,
}


@pytest.mark.parametrize("name, cell", [
    (TEXT, CELL), (original(CELL, ""), CELL), (original(CELL, "list(range(2, 6))"), CELL),
    (f"\n {TEXT}\n", CELL), (f"genotypes.{TEXT}", CELL), (to_json(CELL), CELL), ("\ufeff" + NO_CONCAT, CELL),
    (f"Genotype({list(CELL.normal)}, [2, 3, 4, 5], {CELL.reduce}, range(2, 6))", CELL), (ARCH, ARCH),
    (json.dumps({"arch": ARCH}), ARCH), ("log.txt", CELL), ("log.txt/utf-16", CELL), ("201.log", ARCH),
    ("genotypes.py:V2", CELL), ("genotypes.py:BEST", CELL), ("genotypes.py:V1", PUBLISHED["DARTS_V1"]),
    ("one.py", CELL), ("marked.json", CELL), ("bare.json", CELL)], ids=lambda value: str(value)[:30])
def test_a_genotype_is_read_as_it_stands(name, cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _, encoding = name.partition("/")
    file = path.split(":")[0]
    if file in FILES:
        (tmp_path / file).write_text(FILES[file], encoding=encoding or "utf-8")
    assert genotypes.load(path) == cell


@pytest.mark.parametrize("name, said", [
    ("genotypes.py", "V1, V2, BEST"), ("genotypes.py:V3", "V1, V2, BEST"), ("genotypes.py:PRIMITIVES", "V1"),
    (TEXT.replace("range(2, 6)", "__import__('os').mkdir('made')"), "neither a literal nor a range"),
    (TEXT.replace("range(2, 6)", "range(10**12)"), "not a genotype"),
    (TEXT.replace("range(2, 6)", "range(0, 1000000000000)"), "normal_concat"),
    (TEXT.replace("sep_conv_3x3", "sep_conv_9x9"), "normal[0]"), (TEXT[:99], "no genotype"),
    ("Genotype(normal=[])", "normal_concat"), *((f"Genotype({bad})", "not a genotype") for bad in ("**{}", "{1}")),
    ("{" * 99999, "not a genotype"), (f"Genotype({'(' * 9999}{')' * 9999})", "not a genotype"),
    ("|none~0|", "arch string"), (".", "end of its first epoch"), ("x" * 300, "File name too long")],
    ids=lambda value: value[:30])
def test_what_is_no_genotype_is_one_line(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "genotypes.py").write_text(MODULE)
    with pytest.raises(InputError) as refused:
        genotypes.load(name)
    message = str(refused.value)
    assert said in message and "\n" not in message and len(message) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["genotypes.py"]
