"""Runs that are killed, interrupted, damaged and attacked: real processes, real signals, real files.

The last line of `python -m pytest tests/test_faults.py` counts what was done.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_eval
import train_search
from ldarts import InputError, genotypes, runs
from ldarts.runs import CHECKPOINT, PREVIOUS, load_checkpoint
from test_data import Exploit, python2_pickle, rows, write_cifar10

CONVS = Path(__file__).parent / "genotypes" / "convs.json"
SEARCH = ["--dataset", "cifar10", "--data", "..", "--init_channels", "2", "--layers", "4", "--search_space", "s4",
          "--batch_size", "4", "--report_freq", "1", "--save", "one"]
EVAL = ["--arch", CONVS, "--dataset", "cifar10", "--data", "..", "--init_channels", "2", "--layers", "2", "--batch_size", "8",
        "--report_freq", "1", "--no-auxiliary", "--save", "one"]
EACH_STEP = ["--checkpoint_minutes", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with 40 images to train and 8 to test: five steps an epoch, of a fifth of a second."""
    folder = tmp_path_factory.mktemp("faults")
    write_cifar10(folder / "cifar-10-batches-py", 8)
    return folder


@pytest.fixture
def folder(images, request):
    path = images / re.sub(r"\W+", "-", request.node.name)
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def whole(images, forks):
    """(script, arguments) -> the folder of a run that nobody disturbed; each is made once."""
    made = {}

    def get(script, *argv):
        key = script, *argv
        if key not in made:
            made[key] = images / f"whole-{len(made)}"
            made[key].mkdir()
            assert forks.finish(forks.start(made[key], script, *argv)) == 0, (made[key] / "printed").read_text()
        return made[key]

    return get


def flatten(state):
    """Every leaf of nested dictionaries, lists and tuples, with its place."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from (((key, *place), leaf) for place, leaf in flatten(value))
    else:
        yield (), state


def lines(folder):
    """metrics.jsonl, line by line, without the times."""
    return [re.sub(r', "seconds": [\d.]+', "", line) for line in (folder / "runs/one/metrics.jsonl").read_text().splitlines()]


def assert_same_bits(folder, other):
    """Every number of the two runs' checkpoints, their metrics and their genotypes."""
    ours, theirs = (dict(flatten(load_checkpoint(str(f / "runs/one" / CHECKPOINT)))) for f in (folder, other))
    assert list(ours) == list(theirs)
    for place, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[place].dtype and torch.equal(value, theirs[place]), place
        elif "seconds" not in place:
            assert value == theirs[place], place
    assert lines(folder) == lines(other) and len(lines(folder)) > 0
    assert (folder / "runs/one/genotype.json").read_bytes() == (other / "runs/one/genotype.json").read_bytes()


def reached(folder):
    """(epoch, step) of the checkpoint, (0, 0) before the first."""
    for name in (CHECKPOINT, PREVIOUS):
        if (folder / "runs/one" / name).exists():
            state = load_checkpoint(str(folder / "runs/one" / name), sealed=True)
            return state["epoch"], state["step"]
    return 0, 0


def printed(folder):
    return (folder / "printed").read_text()


def resume(forks, folder, script, expected=0, **options):
    (folder / "printed").unlink(missing_ok=True)
    status = forks.finish(forks.start(folder, script, "--resume", "runs/one", **options))
    assert status == expected, printed(folder)
    return printed(folder)


# ---- killed

@pytest.mark.parametrize("script, argv, kills", [
    ("train_search.py", [*SEARCH, "--epochs", "5"], 20),
    ("train_search.py", [*SEARCH, "--epochs", "3", "--unrolled"], 15),
    ("train_eval.py", [*EVAL, "--epochs", "6"], 10)], ids=["first order", "second order", "evaluation"])
def test_killed_at_random_moments(script, argv, kills, whole, folder, forks, figures):
    """Each process gets a random time of life, until the run is through; every save is the start of the next."""
    reference, moments, count, before = whole(script, *argv), random.Random(0), 0, (0, 0)
    while True:
        there = (folder / "runs/one/config.json").exists()
        process = forks.start(folder, script, *(["--resume", "runs/one"] if there else argv), *EACH_STEP)
        process.join(0.15 + 0.5 * moments.random() if count < kills else 60)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        count += 1
        if not (folder / "runs/one/config.json").exists():
            shutil.rmtree(folder / "runs", ignore_errors=True)
            continue
        last = re.findall(r"epoch (\d+) step (\d+)/", printed(folder)[-300:])
        assert reached(folder) >= before and (not last or reached(folder) >= tuple(map(int, last[-1])))
        before = reached(folder)
    assert process.exitcode == 0 and count >= kills, printed(folder)
    assert_same_bits(folder, reference)
    figures["kills at random moments"] += count


@pytest.mark.parametrize("n, halved", [*((n, False) for n in range(3, 15)), (1, True), (2, True)])
def test_killed_inside_a_save(n, halved, whole, folder, forks, figures):
    """Before each call that makes a file durable, from the first checkpoint on, and with half a checkpoint written."""
    argv = [*SEARCH, "--epochs", "1", "--lambda_reg", "0", "--batch_size", "10"]
    reference = whole("train_search.py", *argv)
    process = forks.start(folder, "train_search.py", *argv, *EACH_STEP, sabotage=forks.KillAtCall(n, halved))
    assert forks.finish(process) == -signal.SIGKILL
    resume(forks, folder, "train_search.py")
    assert_same_bits(folder, reference)
    assert not list((folder / "runs/one").glob(".*.partial"))
    figures["kills inside a save"] += 1
