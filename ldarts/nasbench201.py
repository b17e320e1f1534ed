"""The true accuracy of every NAS-Bench-201 cell: its test accuracy after full training, from a table.

nasbench201.npz beside this file has the array `accuracy`, uint16 [15625, 3]: hundredths of a percent after
200 epochs, the mean over the benchmark's seeds. A cell's row number in base 5 has one digit for each edge, in
the order 1<-0, 2<-0, 2<-1, 3<-0, 3<-1, 3<-2: the index of the edge's operation in OPERATIONS.

Source: the topology space of NATS-Bench (Dong et al., 2021, the successor of Dong and Yang, "NAS-Bench-201",
ICLR 2020), from the table in the public repository v-tao/nats-bench-landscape.
"""
from collections import namedtuple
from fractions import Fraction
from functools import cache
from math import comb, factorial, floor
from pathlib import Path

import numpy as np

from .errors import InputError
from .genotypes import parse_arch

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet16_120": "ImageNet16-120"}  # the columns
# Of a cell: its test accuracies in percent, and its rank on one set, 1 + the number of better cells.
Truth = namedtuple("Truth", [*SETS, "rank"])


@cache
def accuracies() -> np.ndarray:
    """Test accuracies in percent, float64 [15625, 3], read-only: CIFAR-10, CIFAR-100, ImageNet16-120."""
    table = np.load(Path(__file__).with_suffix(".npz"))["accuracy"] / 100
    table.flags.writeable = False
    return table


def searched_set(dataset: str | None) -> str:
    """The set of the table by which a search on `dataset` is ranked: CIFAR-10 if the table lacks it."""
    return dataset if dataset in SETS else "cifar10"


def rank_of(accuracy: float, name: str) -> int:
    """1 + the number of cells with a higher true accuracy, in percent, on one of SETS."""
    return 1 + int((accuracies()[:, list(SETS).index(name)] > accuracy).sum())


def has(arch: str) -> bool:
    """Whether the benchmark has this cell: not one with an operation that a fork has added to the space."""
    return set(parse_arch(arch)) <= set(OPERATIONS)


def look_up(arch: str, dataset: str | None = None) -> Truth:
    """The true accuracy of an arch string. Raises InputError if NAS-Bench-201 has no such cell.

    dataset: that of the search, which says on which set the cell is ranked.
    """
    operations = parse_arch(arch)
    if others := sorted(set(operations) - set(OPERATIONS)):
        raise InputError(f"{arch!r}: NAS-Bench-201 has no {others[0]}; it has {', '.join(OPERATIONS)}")
    row = int("".join(str(OPERATIONS.index(operation)) for operation in operations), base=5)
    accuracy, judge = dict(zip(SETS, accuracies()[row].tolist())), searched_set(dataset)
    return Truth(**accuracy, rank=rank_of(accuracy[judge], judge))


def describe(arch: str, dataset: str | None = None) -> str:
    """The true accuracy in one line. dataset: see look_up"""
    truth, judge, table = look_up(arch, dataset), searched_set(dataset), accuracies()
    on_judge = table[:, list(SETS).index(judge)]
    shown = ", ".join(f"{accuracy:.2f} % on {name}" for accuracy, name in zip(truth, SETS.values()))
    return (f"this cell, fully trained (NAS-Bench-201): {shown}; rank {truth.rank:,} of {len(table):,} on "
            f"{SETS[judge]} (best {on_judge.max():.2f}, median {np.median(on_judge):.2f})")


def better_than_random(ranks: list[int]) -> float:
    """p-value: the probability that as many random cells have a mean rank as good, or better.

    Ranks divided by 15,625 are taken as uniform numbers; their sum follows the Irwin-Hall distribution.
    In fractions, because its terms cancel: in floats, 35 poor cells had a p-value of 0.
    """
    n, total = len(ranks), sum(Fraction(2 * rank - 1, 2 * len(accuracies())) for rank in ranks)
    terms = ((-1) ** k * comb(n, k) * (total - k) ** n for k in range(floor(total) + 1))
    return float(sum(terms) / factorial(n))
