"""The true accuracy of NAS-Bench-201's cells: published figures, and what a search makes of them."""
import json
import random
import statistics
import sys

import numpy as np
import pytest
import torch
from test_archives import python2_pickle, rows

import train_search
from ldarts import InputError, nasbench201
from ldarts.genotypes import ARCH

SIX_SKIPS = "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|skip_connect~2|"


def arch_of(row: int) -> str:
    """The arch string of a row, its operations from the digits."""
    return ARCH.format(*(nasbench201.OPERATIONS[int(digit)] for digit in np.base_repr(row, 5).zfill(6)))


def test_the_published_extremes():
    assert nasbench201.accuracies().max(0).tolist() == [94.37, 73.51, 47.31]
    assert np.median(nasbench201.accuracies()[:, 0]) == pytest.approx(90.74, abs=0.01)
    truth = nasbench201.look_up(SIX_SKIPS)
    assert truth == (54.30, 15.61, 16.32, 15231)
    nothing = nasbench201.look_up(SIX_SKIPS.replace("skip_connect", "none"))
    assert nothing.cifar10 == pytest.approx(10, abs=0.5)  # chance
    assert nothing.cifar100 == pytest.approx(1, abs=0.5)
    # The published best cell of CIFAR-10 (Dong and Yang, 2020, with its edges' operations in this order).
    best = nasbench201.look_up(
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|")
    assert best.rank == 1


def test_every_row_has_its_arch_string():
    rows = [0, 1, 5, 15624, 7812, *random.Random(0).sample(range(15625), 200)]
    for row in rows:
        assert nasbench201.look_up(arch_of(row))[:3] == tuple(nasbench201.accuracies()[row])
    ranks = [nasbench201.look_up(arch_of(row)).rank for row in random.Random(1).sample(range(15625), 1000)]
    assert statistics.median(ranks) == pytest.approx(7813, rel=0.1)
    assert min(ranks) < 200 and 15000 < max(ranks) <= 15625


@pytest.mark.parametrize("arch", [
    "|nor_conv_3x3~0|", SIX_SKIPS.replace("skip_connect~2", "sep_conv_3x3~2"), "nothing"])
def test_what_is_no_cell_of_the_benchmark_is_named(arch):
    with pytest.raises(InputError, match="NAS-Bench-201"):
        nasbench201.look_up(arch)


def test_the_rank_test_is_that_of_uniform_ranks():
    for n in (10, 100, 200):  # in floats the terms cancel
        assert nasbench201.better_than_random([7813] * n) == pytest.approx(0.5, abs=1e-3)
    drawn = np.random.default_rng(0).integers(1, 15626, (20000, 3)).sum(1)
    for ranks in ([100, 5000, 9000], [3000, 4000, 5000], [15000, 14000, 15625]):
        assert nasbench201.better_than_random(ranks) == pytest.approx((drawn <= sum(ranks)).mean(), abs=0.01)


def test_a_search_logs_the_truth_and_ends_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        content = python2_pickle(range(90, 100), rows(10), b"fine_labels")
        (tmp_path / "cifar-100-python" / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", [
        "x", "--dataset", "cifar100", "--data", ".", "--search_space", "nasbench201", "--init_channels", "2",
        "--image_size", "8", "--layers", "1", "--batch_size", "5", "--epochs", "2", "--lambda_reg", "0",
        "--save", "one", "--arch_epsilon", "0.1"])
    train_search.main()
    output = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in (tmp_path / "runs/one/metrics.jsonl").read_text().splitlines()]
    arch = json.loads((tmp_path / "runs/one/genotype.json").read_text())["arch"]
    truth, of_all = nasbench201.look_up(arch), nasbench201.accuracies()[:, 1]
    assert len(lines) == 2 and lines[-1]["true_cifar10"] == truth.cifar10
    rank = 1 + (of_all > truth.cifar100).sum()
    assert lines[-1]["true_rank"] == rank != truth.rank
    assert f"{truth.cifar10:.2f} % on CIFAR-10, {truth.cifar100:.2f} % on CIFAR-100" in output[-2]
    assert f"rank {rank:,} of 15,625 on CIFAR-100 (best 73.51, median {np.median(of_all):.2f})" in output[-2]
    saved = torch.load(tmp_path / "runs/one/checkpoint.pt")
    assert saved["arch"]["param_groups"][0]["eps"] == 0.1
