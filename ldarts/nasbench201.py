"""The true worth of every NAS-Bench-201 cell: its test accuracy after full training, without training it.

nasbench201.npz beside this file holds `accuracy`, uint16 [15625, 3]: hundredths of a percent after 200
epochs, the mean over the benchmark's seeds, on CIFAR-10, CIFAR-100 and ImageNet16-120. A cell's row is its
six operations as digits of base 5, the most significant first, in the order of the edges 1<-0, 2<-0, 2<-1,
3<-0, 3<-1, 3<-2, the digits in the order of OPERATIONS.

Source: the topology space of NATS-Bench (Dong et al., 2021, the successor of Dong and Yang, "NAS-Bench-201",
ICLR 2020), by way of the table in the public repository v-tao/nats-bench-landscape.
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


class Truth(NamedTuple):
    """Test accuracies of a cell in percent, and where it stands on CIFAR-10."""

    cifar10: float
    cifar100: float
    imagenet16_120: float
    rank: int  # 1 + the number of cells that are better on CIFAR-10
    better: float  # the share of random cells that are better on CIFAR-10, 0 to 1


@cache
def accuracies() -> np.ndarray:
    """Test accuracies in percent, float64 [15625, 3], read-only: CIFAR-10, CIFAR-100, ImageNet16-120."""
    with np.load(Path(__file__).with_suffix(".npz"), allow_pickle=False) as file:
        table = file["accuracy"] / 100
    table.setflags(write=False)
    return table


def row(arch: str) -> int:
    """The row of a cell, given by its arch string. Raises InputError for anything else."""
    number = 0
    for operation in (operation for node in parse_arch(arch) for operation, _ in node):
        if operation not in OPERATIONS:
            raise InputError(f"{arch!r}: {operation} is no operation of NAS-Bench-201; "
                             f"it has {', '.join(OPERATIONS)}")
        number = number * len(OPERATIONS) + OPERATIONS.index(operation)
    return number


def look_up(arch: str) -> Truth:
    """The truth about the cell of an arch string. Raises InputError where that is none of NAS-Bench-201."""
    table = accuracies()
    found = table[row(arch)]
    better = int((table[:, 0] > found[0]).sum())
    return Truth(*map(float, found), rank=1 + better, better=better / CELLS)


def describe(arch: str) -> str:
    """One line for a reader."""
    truth, cifar10 = look_up(arch), accuracies()[:, 0]
    return (f"this cell, fully trained (NAS-Bench-201): {truth.cifar10:.2f} % on CIFAR-10, "
            f"rank {truth.rank:,} of {CELLS:,} (best {cifar10.max():.2f}, median {np.median(cifar10):.2f}), "
            f"{truth.cifar100:.2f} % on CIFAR-100, {truth.imagenet16_120:.2f} % on ImageNet16-120")


def better_than_random(ranks: list[int]) -> float:
    """The probability that as many random cells have a mean rank as small or smaller.

    It is that of a sum of uniform numbers, the Irwin-Hall distribution at Σ (rank − 1/2) / 15,625.
    """
    n, total = len(ranks), sum((rank - 0.5) / CELLS for rank in ranks)
    value = sum((-1) ** k * comb(n, k) * (total - k) ** n for k in range(floor(total) + 1)) / factorial(n)
    return min(1.0, max(0.0, value))
