"""The true accuracy of every NAS-Bench-201 cell: its test accuracy after full training, from a table.

nasbench201.npz beside this file has the array `accuracy`, uint16 [15625, 3]: hundredths of a percent after
200 epochs, the mean over the benchmark's seeds. The number of a cell's row, written in base 5, has the cell's
operations as digits, by their places in OPERATIONS, in the order of edges 1<-0, 2<-0, 2<-1, 3<-0, 3<-1, 3<-2.

Source: the topology space of NATS-Bench (Dong et al., 2021, the successor of Dong and Yang, "NAS-Bench-201",
ICLR 2020), from the table in the public repository v-tao/nats-bench-landscape.
"""
from functools import cache
from math import comb, factorial, floor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import InputError
from .genotypes import parse_arch

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
CELLS = len(OPERATIONS) ** 6
SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet16_120": "ImageNet16-120"}  # the columns


class Truth(NamedTuple):
    """Test accuracies of a cell in percent, and its rank on one set: 1 + the number of better cells."""

    cifar10: float
    cifar100: float
    imagenet16_120: float
    rank: int


@cache
def accuracies() -> np.ndarray:
    """Test accuracies in percent, float64 [15625, 3], read-only: CIFAR-10, CIFAR-100, ImageNet16-120."""
    with np.load(Path(__file__).with_suffix(".npz"), allow_pickle=False) as file:
        table = file["accuracy"] / 100
    table.setflags(write=False)
    return table


def look_up(arch: str, dataset: str | None = None) -> Truth:
    """The true accuracy of an arch string. Raises InputError if NAS-Bench-201 has no such cell.

    dataset: that of the search, which says on which set the cell is ranked.
    """
    row, table = 0, accuracies()
    for operation in (operation for node in parse_arch(arch) for operation, _ in node):
        if operation not in OPERATIONS:
            raise InputError(f"{arch!r}: NAS-Bench-201 has no {operation}; it has {', '.join(OPERATIONS)}")
        row = row * len(OPERATIONS) + OPERATIONS.index(operation)
    truth, judge = Truth(*map(float, table[row]), rank=0), searched_set(dataset)
    return truth._replace(rank=rank_of(getattr(truth, judge), judge))


def searched_set(dataset: str | None) -> str:
    """The set of the table that judges a search on a data set: CIFAR-10 where the table lacks it."""
    return dataset if dataset in SETS else "cifar10"


def rank_of(accuracy: float, name: str) -> int:
    """1 + the number of cells with a higher true accuracy, in percent, on one of SETS."""
    return 1 + int((accuracies()[:, list(SETS).index(name)] > accuracy).sum())


def describe(arch: str, dataset: str | None = None) -> str:
    """The true accuracy in one line. dataset: see look_up"""
    truth, judge = look_up(arch, dataset), searched_set(dataset)
    table = accuracies()[:, list(SETS).index(judge)]
    shown = ", ".join(f"{getattr(truth, name):.2f} % on {SETS[name]}" for name in SETS)
    return (f"this cell, fully trained (NAS-Bench-201): {shown}; rank {truth.rank:,} of {CELLS:,} on "
            f"{SETS[judge]} (best {table.max():.2f}, median {np.median(table):.2f})")


def better_than_random(ranks: list[int]) -> float:
    """p-value: the probability that as many random cells have a mean rank as good, or better.

    Ranks divided by 15,625 are taken as uniform numbers; their sum follows the Irwin-Hall distribution.
    """
    n, total = len(ranks), sum((rank - 0.5) / CELLS for rank in ranks)
    value = sum((-1) ** k * comb(n, k) * (total - k) ** n for k in range(floor(total) + 1)) / factorial(n)
    return min(1.0, max(0.0, value))
