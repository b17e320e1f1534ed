"""The experiment on collapse: how it is started, read and tested."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_search
from evidence import collapse
from test_archives import write_cifar10

FOLDER = Path(__file__).parent / "evidence/collapse"


def test_sign_flips_by_hand():
    assert collapse.sign_flip([1, 2, 3]) == 2 / 8  # no other choice of signs is as far from 0
    assert collapse.sign_flip([1, 2, -3]) == 1
    assert collapse.sign_flip([1, 2, -1]) == 6 / 8  # but for 1 - 2 + 1 and its opposite


def test_holm_by_hand():
    corrected = collapse.holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_missing_searches_are_run_seed_by_seed_and_stopped_ones_resumed(tmp_path):
    program, out = tmp_path / "program", tmp_path / "out"
    program.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    for name, epochs in (("DARTS-0", 60), ("exact-0", 59)):
        (out / "A/runs" / name).mkdir(parents=True)
        (out / "A/runs" / name / "metrics.jsonl").write_text("{}\n" * epochs)

    def started(*args):
        subprocess.run([FOLDER / "run.sh", *args, tmp_path, out, "1"], check=True, timeout=60,
                       env={"PYTHON": str(program), "PATH": os.environ["PATH"]})
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return calls

    calls = started("compare", "A")
    assert len(calls) == 45 - 1
    saved = [call.split("--save ")[-1] for call in calls]
    assert saved[0] == "central-0" and saved[2:5] == ["random-0", "sign-0", "DARTS-1"]
    assert saved[-1] == "random-9"
    assert "--resume runs/exact-0" in calls[1] and "--epochs" not in calls[1]
    assert "--epochs 60" in calls[0] and "--lambda_reg 0.25 --seed 0" in calls[0]
    assert (out / "A/runs/central-0.cpu").read_text().count(" ") == 1
    calls = started("explore", "C")
    assert [call.split("--save ")[-1] for call in calls] == [f"DARTS-{seed}" for seed in range(100, 105)]
    assert all("--init_channels 8" in call and "--lambda_reg 0 " in call for call in calls)


def test_a_finished_search_is_kept_and_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collapse, "FOLDER", tmp_path / "collapse")
    collapse.FOLDER.mkdir()
    write_cifar10(tmp_path / "cifar", 8)
    argv = ["--dataset", "cifar10", "--data", "cifar", "--search_space", "nasbench201", "--image_size", "8",
            "--layers", "1", "--init_channels", "2", "--batch_size", "10", "--epochs", "4", "--eigenvalue",
            "--lambda_grad", "random", "--seed", "3", "--save", "random-3"]
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    train_search.main()
    Path("runs/random-3.cpu").write_text("90.5 29.5\n")
    shutil.copytree("runs/random-3", "runs/stopped")
    lines = Path("runs/stopped/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("runs/stopped/metrics.jsonl").write_text("".join(lines[:3]))
    collapse.keep(["runs/random-3", "runs/stopped"])
    assert "runs/stopped: 3 of 4 epochs, left out" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x"])
    collapse.main()
    search = collapse.read_results()["random"][3]
    assert search["processor_minutes"] == 2.0 and tmp_path.name not in json.dumps(search)
    measures, last = collapse.measures(search), json.loads(lines[-1])
    assert sum([*measures["share"].values()][3:]) == pytest.approx(1, abs=1e-3)
    assert measures["end"]["true accuracy, %"] == last["true_cifar10"]
    cells = json.loads((collapse.FOLDER / "cells.json").read_text())
    assert cells == {"random": {"3": search["cell"]}} and search["cell"].startswith("|")
    text = (collapse.FOLDER / "findings.md").read_text()
    assert f"| random | {last['true_cifar10']:.2f} ({last['skip_connections']}) |" in text
    assert {path.name for path in collapse.FOLDER.glob("*.png")} == {"along.png", "shares.png"}
    with open("runs/random-3/log.txt", "a") as log:  # killed and resumed: a line for each start, or no minutes
        log.write("runs/random-3: continued at step 1 of epoch 2\n")
    collapse.keep(["runs/random-3"])
    assert collapse.read_results()["random"][3]["processor_minutes"] is None
    Path("runs/random-3.cpu").write_text("90.5 29.5\n60 0\n")
    collapse.keep(["runs/random-3"])
    assert collapse.read_results()["random"][3]["processor_minutes"] == 3.0


def test_the_findings_are_those_of_the_results_beside_them():
    searches = collapse.read_results()
    assert (FOLDER / "findings.md").read_text() == collapse.findings(searches)
    cells = json.loads((FOLDER / "cells.json").read_text())
    assert cells == {variant: {str(seed): search["cell"] for seed, search in group.items()}
                     for variant, group in searches.items()}
