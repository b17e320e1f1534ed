"""The experiment of collapse/PLAN.md, read: its tables, tests and pictures.

    python tests/evidence/collapse.py keep OUT/runs/*   # each finished search, as a small file in collapse/results
    python tests/evidence/collapse.py                   # from these: findings.md, cells.json and the pictures
"""
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

from ldarts import nasbench201
from ldarts.runs import read_run, script, spread, table, write_atomically
from ldarts.visualize import draw_shares, pyplot, save

FOLDER = Path(__file__).with_suffix("")
PLANNED = {"DARTS": 10, "central": 10, "exact": 10, "random": 10, "sign": 5}  # seeds of each variant
TESTED = [("central", "DARTS"), ("exact", "DARTS"), ("random", "DARTS"), ("exact", "random")]
KEPT = ("true_cifar10", "skip_connections", "valid_accuracy", "train_accuracy", "lambda_train", "lambda_valid",
        "alpha_eigenvalue", "gini", "lambda_grad_norm", "loss_grad_norm", "cell_shares", "operation_grads", "alphas")

Search = dict[str, Any]  # a file of results: what was run, and `epochs`, lists over the epochs by their names
Searches = dict[str, dict[int, Search]]  # variant -> seed -> search


def variant_of(config: dict[str, Any]) -> str:
    if not config["lambda_reg"]:
        return "DARTS"
    return "sign" if config["lambda_kind"] == "sign" else config["lambda_grad"]


def rounded(value: Any) -> Any:
    """Four significant digits of every number, which is more than any of them has from seed to seed."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) and abs(value) < 1000 else value


def keep(runs: Sequence[str]) -> None:
    """Write what is needed of each finished run to FOLDER/results."""
    for run in map(Path, runs):
        config, metrics = read_run(run)
        if len(metrics) < config["epochs"]:
            print(f"{run}: {len(metrics)} of {config['epochs']} epochs, left out")
            continue
        seconds = [float(number) for number in run.with_suffix(".cpu").read_text().split()]
        result = {"variant": variant_of(config), "seed": config["seed"], "commit": config["commit"],
                  "device": config["device_name"], "torch": config["versions"]["torch"],
                  "processor_minutes": round(sum(seconds) / 60, 1),
                  "cell": json.loads((run / "genotype.json").read_text()),
                  "epochs": {name: rounded([line[name] for line in metrics]) for name in KEPT}}
        path = FOLDER / "results" / f"{result['variant']}-{result['seed']}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda path: path.write_text(json.dumps(result) + "\n"))
        print(path)


def read_results() -> Searches:
    searches: Searches = {variant: {} for variant in PLANNED}
    for path in (FOLDER / "results").glob("*.json"):
        search = json.loads(path.read_text())
        searches[search["variant"]][search["seed"]] = search
    return {variant: dict(sorted(seeds.items())) for variant, seeds in searches.items() if seeds}


# ---- measures of one search

def accuracy(search: Search) -> float:
    """Test accuracy of the last cell after full training, CIFAR-10, %."""
    return search["epochs"]["true_cifar10"][-1]


def skips(search: Search) -> int:
    """Skip connections in the last cell, of 6 operations."""
    return search["epochs"]["skip_connections"][-1]


def late(name: str) -> Callable[[Search], float]:
    """The median of a number over the last quarter of the epochs."""
    return lambda search: float(np.median(quarter(search["epochs"][name], last=True)))


def quarter(values: list, last: bool) -> list:
    size = len(values) // 4
    return values[-size:] if last else values[:size]


def p_skip(search: Search) -> float:
    """p of skip_connect at the end, mean over the edges."""
    alpha = np.exp(np.array(search["epochs"]["alphas"][-1][0]))  # [edges, ops]
    return float((alpha / alpha.sum(1, keepdims=True))[:, nasbench201.OPERATIONS.index("skip_connect")].mean())


def stage_shares(search: Search, last: bool) -> np.ndarray:
    """Of each third of the cells its share in the gradient by α: the median over a quarter of the epochs -> [3]"""
    shares = np.array(quarter(search["epochs"]["cell_shares"], last))  # [epochs, cells]
    return np.median(shares.reshape(len(shares), 3, -1).sum(2), 0)


def pull(search: Search, operation: str) -> float:
    """How strongly the cells agree on an operation: the mean over the operations of ∂L/∂p less that of this
    one, over all edges, cells and epochs. Positive: α of the operation grows."""
    grads = [epoch[operation] - statistics.fmean(epoch.values()) for epoch in search["epochs"]["operation_grads"]]
    return -statistics.fmean(grads)


def noise_ratio(search: Search) -> float:
    """‖λ ∇Λ‖ / ‖∇L‖, the median over the last quarter of the epochs."""
    norms = zip(*(quarter(search["epochs"][name], True) for name in ("lambda_grad_norm", "loss_grad_norm")))
    return float(np.median([of_lambda / of_loss for of_lambda, of_loss in norms]))


# ---- tests

def sign_flip(differences: Sequence[float]) -> float:
    """The exact two-sided p-value of paired differences: the share of the 2^n choices of their signs that bring
    their mean at least as far from 0."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = np.abs(signs @ np.array(differences))
    return float((sums >= abs(sum(differences)) - 1e-9).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm, 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def tests_table(searches: Searches, of: Callable[[Search], float]) -> str:
    rows, p_values = [], []
    for one, other in TESTED:
        pairs = sorted(searches.get(one, {}).keys() & searches.get(other, {}).keys())
        differences = [of(searches[one][seed]) - of(searches[other][seed]) for seed in pairs]
        complete = len(pairs) >= PLANNED[one]
        p_values += [sign_flip(differences)] if complete else []
        rows.append([f"{one} − {other}", f"{len(pairs)} of {PLANNED[one]}", spread(differences),
                     f"{p_values[-1]:.4f}" if complete else "not yet"])
    done = len(p_values) == len(TESTED)
    for row, p in zip(rows, holm(p_values) if done else ["not yet"] * len(rows)):
        row.append(f"{p:.4f}" if done else p)
    return table(["difference", "pairs", "mean ± deviation", "p", "p, Holm"], rows)


# ---- tables and pictures

COLUMNS: dict[str, tuple[Callable[[Search], float], int]] = {  # name -> (measure, digits)
    "true accuracy, %": (accuracy, 2), "skips": (skips, 1), "p of skip": (p_skip, 3),
    "1 − Σ p²": (late("gini"), 3), "Λ, training": (late("lambda_train"), 2), "Λ, validation": (late("lambda_valid"), 2),
    "eigenvalue": (late("alpha_eigenvalue"), 1), "supernet, validation, %": (late("valid_accuracy"), 1),
    "‖λ∇Λ‖ / ‖∇L‖": (noise_ratio, 1), "processor minutes": (lambda search: search["processor_minutes"], 0),
}


def findings(searches: Searches) -> str:
    """All tables."""
    seeds = sorted({seed for of_variant in searches.values() for seed in of_variant})
    done, planned = sum(map(len, searches.values())), sum(PLANNED.values())
    text = f"{done} of {planned} searches are finished.\n\nThe end of a search, mean ± deviation over the seeds:\n\n"
    text += table(["variant", "seeds", "five skips or six", *COLUMNS], [
        [variant, f"{len(of_variant)} of {PLANNED[variant]}",
         f"{sum(skips(search) >= 5 for search in of_variant.values())} of {len(of_variant)}",
         *(spread([of(search) for search in of_variant.values()], digits) for of, digits in COLUMNS.values())]
        for variant, of_variant in searches.items()])
    text += "\nTrue accuracy and skips of each last cell:\n\n"
    text += table(["variant", *(f"seed {seed}" for seed in seeds)], [
        [variant, *(f"{accuracy(of_variant[seed]):.2f} ({skips(of_variant[seed])})" if seed in of_variant else ""
                    for seed in seeds)] for variant, of_variant in searches.items()])
    for name, of in (("true accuracy, %", accuracy), ("skips", skips)):
        text += f"\nTests on {name}, exact, paired by seed:\n\n" + tests_table(searches, of)
    text += "\nWho decides: share in the gradient by α of the cells of each stage, first and last quarter:\n\n"
    text += table(["variant", *(f"stage {stage}, {which}" for which in ("first", "last") for stage in (1, 2, 3))], [
        [variant, *(spread(list(values)) for last in (False, True)
                    for values in zip(*(stage_shares(search, last) for search in of_variant.values())))]
        for variant, of_variant in searches.items()])
    text += "\nOn what: −∂L/∂p of an operation less its mean over the operations, times 1000:\n\n"
    text += table(["variant", *nasbench201.OPERATIONS], [
        [variant, *(spread([1000 * pull(search, op) for search in of_variant.values()])
                    for op in nasbench201.OPERATIONS)] for variant, of_variant in searches.items()])
    return text


def draw_along(searches: Searches, path: Path) -> None:
    """True accuracy and skips along the search: median and quartiles over the seeds."""
    figure, axes = pyplot().subplots(2, 1, sharex=True, layout="constrained", figsize=(7.5, 6.4))
    names = {"true_cifar10": "test accuracy of the cell after\nfull training, CIFAR-10, %",
             "skip_connections": "skip connections, of 6"}
    for k, (variant, of_variant) in enumerate(searches.items()):
        for ax, name in zip(axes, names):
            low, middle, high = np.percentile([search["epochs"][name] for search in of_variant.values()],
                                              (25, 50, 75), axis=0)
            ax.plot(middle, color=f"C{k}", label=f"{variant} (n = {len(of_variant)})")
            ax.fill_between(range(len(low)), low, high, color=f"C{k}", alpha=0.15, lw=0)
    axes[0].axhline(np.median(nasbench201.accuracies()[:, 0]), color="0.4", ls="--", lw=1,
                    label="a random cell: median")
    for ax, label in zip(axes, names.values()):
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[1].set_xlabel("epoch of the search")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def main() -> None:
    if sys.argv[1:2] == ["keep"]:
        return keep(sys.argv[2:])
    searches = read_results()
    cells = {variant: {seed: search["cell"] for seed, search in of_variant.items()}
             for variant, of_variant in searches.items()}
    text = findings(searches)
    (FOLDER / "cells.json").write_text(json.dumps(cells, indent=1) + "\n")
    (FOLDER / "findings.md").write_text(text)
    draw_along({name: of for name, of in searches.items() if name != "sign"}, FOLDER / "along.png")
    lines = {variant: [[{"cell_shares": shares} for shares in search["epochs"]["cell_shares"]]
                       for search in of_variant.values()] for variant, of_variant in searches.items()}
    draw_shares(lines, FOLDER / "shares.png")
    print(text, end="")


if __name__ == "__main__":
    script(main)
