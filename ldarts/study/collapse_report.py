"""Tables and pictures of `study collapse`."""
import argparse
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable

import numpy as np

from .. import nasbench201
from ..runs import spread, table
from ..visualize import band, pyplot, save
from .collapse import VARIANTS, skips, true_accuracy

Line = dict[str, Any]
Runs = dict[str, dict[int, list[Line]]]  # variant -> seed -> the lines of a search
TRUE = "true accuracy, %"
NUMBERS: dict[str, Callable[[Line], float]] = {  # of the lines that were measured
    TRUE: true_accuracy,
    "skips": skips,
    "Λ, training": lambda line: line["lambda_train"],
    "Λ, validation": lambda line: line["lambda_valid"],
    "eigenvalue": lambda line: line["eigenvalue"],
    "supernet, validation, %": lambda line: line["valid_accuracy"],
    "supernet, training, %": lambda line: line["train_accuracy"],
    "p of skip": lambda line: line["p_skip"],
    "p of none": lambda line: line["p_none"],
    "entropy of p": lambda line: line["entropy"],
    "‖λ∇Λ‖ / ‖∇L‖": lambda line: line["ratio"],
}
DIGITS = {TRUE: 2, "skips": 1, "supernet, validation, %": 1, "supernet, training, %": 1, "‖λ∇Λ‖ / ‖∇L‖": 1}
NOISY = ("Λ, training", "Λ, validation", "eigenvalue", "‖λ∇Λ‖ / ‖∇L‖")  # at the end: mean of the last quarter


def numbers_of(space: str) -> dict[str, Callable[[Line], float]]:
    """What can be said of a space: only the cells of nasbench201 have a known worth."""
    return NUMBERS if space == "nasbench201" else {
        name: of for name, of in NUMBERS.items() if name not in (TRUE, "p of none")}


def measured(lines: list[Line]) -> list[Line]:
    return [line for line in lines if "eigenvalue" in line]


def at_end(lines: list[Line], name: str, of: Callable[[Line], float]) -> float:
    """A number of the last line, or its mean over the measured lines of the last quarter of the search."""
    if name not in NOISY:
        return of(lines[-1])
    last = [line for line in measured(lines) if line["epoch"] >= 0.75 * len(lines)]
    return statistics.fmean(map(of, last or measured(lines)[-1:]))


def report(args: argparse.Namespace, results: dict[tuple[str, ...], list[Line]]) -> str:
    """For each space: numbers at the end, each seed's cell, what tells a good cell; a picture of them all."""
    text = ""
    for space in dict.fromkeys(case[0] for case in results):
        runs: Runs = {}
        for (of_space, variant, seed), lines in results.items():
            if of_space == space:
                runs.setdefault(variant, {})[int(seed)] = lines
        runs = {variant: runs[variant] for variant in VARIANTS if variant in runs}
        text += f"\n{space}, at the end, mean ± deviation over the seeds:\n\n" + end_table(space, runs)
        if space == "nasbench201":
            text += "\nThe cell of every seed (accuracy after full training on CIFAR-10, rank of 15,625):\n\n"
            text += cells_table(runs)
            text += "\nHow true accuracy goes with what a search can see (Spearman's rank correlation):\n\n"
            text += correlation_table(runs)
            text += "\nTrue accuracy of the cell where a search would have stopped:\n\n"
            text += stopping_table(runs)
        text += f"\n{space}, over the epochs:\n\n" + epochs_table(space, runs)
        if find_spec("matplotlib"):
            draw_numbers(space, runs, Path(args.out, f"{space}.png"))
            if space == "nasbench201":
                draw_truth(runs, Path(args.out, "truth.png"))
    return text


def end_table(space: str, runs: Runs) -> str:
    numbers = numbers_of(space)
    rows = [[variant, len(seeds),
             *(spread([at_end(lines, name, of) for lines in seeds.values()], DIGITS.get(name, 3))
               for name, of in numbers.items())] for variant, seeds in runs.items()]
    if space == "nasbench201":
        every = nasbench201.accuracies()[:, 0]
        rows.append(["a random cell", "all", f"{every.mean():.2f} ± {every.std():.2f}", "1.2",
                     *[""] * (len(numbers) - 2)])
    return table(["variant", "seeds", *numbers], rows)


def cells_table(runs: Runs) -> str:
    seeds = sorted({seed for of_variant in runs.values() for seed in of_variant})
    rows = []
    for variant, of_variant in runs.items():
        truths = {seed: nasbench201.look_up(lines[-1]["cell"]) for seed, lines in of_variant.items()}
        shown = [f"{truths[seed].cifar10:.2f} ({truths[seed].rank:,}; {skips(of_variant[seed][-1])} skips)"
                 if seed in truths else "" for seed in seeds]
        chance = nasbench201.better_than_random([truth.rank for truth in truths.values()])
        rows.append([variant, *shown, f"{chance:.3f}"])
    return table(["variant", *(f"seed {seed}" for seed in seeds), "random cells as good, probability"], rows)


INDICATORS = {name: NUMBERS[name] for name in ("Λ, training", "Λ, validation", "eigenvalue",
                                               "supernet, validation, %", "p of skip", "entropy of p")}


def spearman(x: list[float], y: list[float]) -> float:
    """The rank correlation of two lists; nan where one is constant."""
    def ranks(values: list[float]) -> np.ndarray:  # equal values share their mean rank
        _, place, count = np.unique(np.round(values, 6), return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    a, b = ranks(x), ranks(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def correlation_table(runs: Runs) -> str:
    """Over all measured epochs and runs, over the ends of runs, over a run's epochs (mean of the runs)."""
    every = [lines for seeds in runs.values() for lines in seeds.values()]
    all_lines = [line for lines in every for line in measured(lines)]
    ends = [measured(lines)[-1] for lines in every]
    rows = []
    for name, of in INDICATORS.items():
        def correlation(lines: list[Line]) -> float:
            return spearman([of(line) for line in lines], [true_accuracy(line) for line in lines])

        within = [correlation(measured(lines)) for lines in every]
        of_darts = [correlation(measured(lines)) for lines in runs.get("DARTS", {}).values()]
        rows.append([name, f"{correlation(all_lines):+.2f}", f"{correlation(ends):+.2f}",
                     *(spread([value for value in values if value == value])
                       for values in (within, of_darts))])
    return table(["indicator", f"all {len(all_lines)} measured epochs", f"the ends of {len(ends)} runs",
                  "within a run", "within a run of DARTS"], rows)


def stopping_table(runs: Runs) -> str:
    """The end; the best supernet or Λ; before the eigenvalue grew (Zela et al., 2020); the best there was."""
    def best_by(name: str) -> Callable[[list[Line]], Line]:
        return lambda lines: max(lines, key=NUMBERS[name])

    def before_the_eigenvalue_grew(lines: list[Line]) -> Line:
        """The last measurement before an eigenvalue over 1/0.75 times the mean of the three before it."""
        for k in range(3, len(lines)):
            mean = statistics.fmean(line["eigenvalue"] for line in lines[k - 3 : k])
            if lines[k]["eigenvalue"] * 0.75 > mean:
                return lines[k - 1]
        return lines[-1]

    rules = {"at the end": lambda lines: lines[-1],
             "largest validation accuracy": best_by("supernet, validation, %"),
             "largest Λ, training": best_by("Λ, training"),
             "before the eigenvalue grows": before_the_eigenvalue_grew,
             "the best of the run (nobody can know it)": best_by(TRUE)}
    rows = [[rule, *(spread([true_accuracy(stop(measured(lines))) for lines in seeds.values()])
                     for seeds in runs.values())] for rule, stop in rules.items()]
    return table(["a search that stops", *runs], rows)


def epochs_table(space: str, runs: Runs) -> str:
    first = measured(next(iter(next(iter(runs.values())).values())))
    shown = sorted({round(k * (len(first) - 1) / 4) for k in range(5)})
    rows = [[name, variant, *(spread([of(measured(lines)[k]) for lines in seeds.values()],
                                     DIGITS.get(name, 3)) for k in shown)]
            for name, of in numbers_of(space).items() for variant, seeds in runs.items()]
    return table(["", "variant", *(f"epoch {first[k]['epoch']}" for k in shown)], rows)


def colour(variant: str) -> str:
    return f"C{list(VARIANTS).index(variant)}"


def draw_numbers(space: str, runs: Runs, path: Path) -> None:
    """A panel a number, a line a variant: mean over the seeds and a band of one deviation."""
    numbers = numbers_of(space)
    columns = 4
    height = -(-len(numbers) // columns)
    figure, axes = pyplot().subplots(height, columns, squeeze=False, layout="constrained",
                                     figsize=(3.4 * columns, 2.5 * height + 0.4))
    for ax in axes.flat[len(numbers) :]:
        ax.set_axis_off()
    for ax, (name, of) in zip(axes.flat, numbers.items()):
        for variant, seeds in runs.items():
            rows = [[of(line) for line in measured(lines)] for lines in seeds.values()]
            epochs = [line["epoch"] for line in measured(next(iter(seeds.values())))]
            band(ax, epochs, rows, variant, color=colour(variant))
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
        if name.startswith("‖"):
            ax.set_yscale("symlog", linthresh=0.1)
    for ax in axes.flat[max(0, len(numbers) - columns) : len(numbers)]:
        ax.set_xlabel("epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    save(figure, path)


def draw_truth(runs: Runs, path: Path,
               shown: tuple[str, ...] = ("DARTS", "central", "exact", "random")) -> None:
    """Along a search the true accuracy of its cell (mean, worst and best seed), and Λ (mean, deviation)."""
    every = nasbench201.accuracies()[:, 0]
    figure, (truth, alignment) = pyplot().subplots(2, 1, sharex=True, layout="constrained",
                                                   figsize=(7.5, 6.4))
    for variant in [variant for variant in shown if variant in runs]:
        seeds = list(runs[variant].values())
        label = f"{variant} (n = {len(seeds)})"
        of_seeds = [[true_accuracy(line) for line in lines] for lines in seeds]
        by_epoch = list(zip(*of_seeds))
        # From the worst seed to the best: one collapse makes a deviation that reaches above 100 %.
        truth.fill_between(range(len(by_epoch)), [min(values) for values in by_epoch],
                           [max(values) for values in by_epoch], color=colour(variant), alpha=0.12, lw=0)
        truth.plot([statistics.fmean(values) for values in by_epoch], color=colour(variant), label=label)
        rows = [[(line["lambda_train"] + line["lambda_valid"]) / 2 for line in measured(lines)]
                for lines in seeds]
        band(alignment, [line["epoch"] for line in measured(seeds[0])], rows, label, color=colour(variant))
    truth.axhline(np.median(every), color="0.4", ls="--", lw=1, label="a random cell: median")
    truth.axhline(every.mean(), color="0.4", ls=":", lw=1, label="a random cell: mean")
    truth.set_ylabel("test accuracy of the cell after\nfull training, CIFAR-10, %")
    alignment.set(xlabel="epoch of the search", ylabel="Λ on fresh batches")
    for ax in (truth, alignment):
        ax.grid(alpha=0.3)
    figure.legend(*truth.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)
