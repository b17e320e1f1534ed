"""The experiment of collapse/PLAN.md, read: its tables, tests and pictures.

    python tests/evidence/collapse.py keep OUT/A/runs/*/  # a small file in collapse/results for each search
    python tests/evidence/collapse.py  # from these: findings.md, cells.json and the pictures
"""
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from ldarts import nasbench201  # noqa: E402
from ldarts.runs import read_run, script, spread, table, unfinished, write_atomically  # noqa: E402
from ldarts.visualize import draw_shares, pyplot, save  # noqa: E402

FOLDER = Path(__file__).with_suffix("")
VARIANTS = ["DARTS", "central", "exact", "random", "sign"]
TESTED = [("central", "DARTS"), ("exact", "DARTS"), ("random", "DARTS"), ("exact", "random")]
KEPT = ("true_cifar10", "skip_connections", "valid_accuracy", "train_accuracy", "lambda_train",
        "lambda_valid", "alpha_eigenvalue", "gini", "lambda_grad_norm", "loss_grad_norm", "cell_shares",
        "operation_grads", "alphas")

Search = dict[str, Any]  # a file of results: what was run, and `epochs`, the list of each number by its name
Seeds = dict[int, Search]  # the searches of a variant
Searches = dict[str, Seeds]


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
        if how_far := unfinished(run):
            print(f"{run}: {how_far}, left out")
            continue
        config, metrics = read_run(run)
        # A start that was killed from outside has left no line: then the minutes are not known.
        seconds = [sum(map(float, line.split())) for line in run.with_suffix(".cpu").read_text().splitlines()]
        starts = 1 + (run / "log.txt").read_text().count("continued at step")
        result = {"variant": variant_of(config), "seed": config["seed"], "commit": config["commit"],
                  "device": config["device_name"], "torch": config["versions"]["torch"],
                  "processor_minutes": round(sum(seconds) / 60, 1) if len(seconds) == starts else None,
                  "cell": json.loads((run / "genotype.json").read_text())["arch"],
                  "epochs": {name: rounded([line[name] for line in metrics]) for name in KEPT}}
        path = FOLDER / "results" / f"{result['variant']}-{result['seed']}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(result) + "\n").encode())
        print(path)


def read_results() -> Searches:
    searches = [json.loads(path.read_text()) for path in (FOLDER / "results").glob("*.json")]
    searches.sort(key=lambda search: (VARIANTS.index(search["variant"]), search["seed"]))
    return {variant: {search["seed"]: search for search in group}
            for variant, group in itertools.groupby(searches, lambda search: search["variant"])}


# ---- measures of one search

def quarter(values: list, last: bool) -> list:
    """The last or the first quarter of the epochs."""
    size = len(values) // 4
    return values[-size:] if last else values[:size]


def late(name: str) -> Callable[[Search], float]:
    """The median of a number over the last quarter of the epochs."""
    return lambda search: float(np.median(quarter(search["epochs"][name], last=True)))


def accuracy(search: Search) -> float:
    """Test accuracy of the last cell after full training, CIFAR-10, %."""
    return search["epochs"]["true_cifar10"][-1]


def skips(search: Search) -> int:
    """Skip connections in the last cell, of 6 operations."""
    return search["epochs"]["skip_connections"][-1]


def skips_late(search: Search) -> float:
    """Skip connections, the mean over the last quarter of the epochs: the last cell may hang on a p that is
    larger by 0.001."""
    return statistics.fmean(quarter(search["epochs"]["skip_connections"], last=True))


def p_skip(search: Search) -> float:
    """p of skip_connect at the end, mean over the edges."""
    p = np.exp(np.array(search["epochs"]["alphas"][-1][0]))  # [edges, ops]
    p /= p.sum(1, keepdims=True)
    return float(p[:, nasbench201.OPERATIONS.index("skip_connect")].mean())


def stage_shares(search: Search, last: bool) -> np.ndarray:
    """The share of each stage's cells in ∂L/∂α, its median over a quarter of the epochs -> [3]"""
    shares = np.array(quarter(search["epochs"]["cell_shares"], last))  # [epochs, cells]
    return np.median(shares.reshape(len(shares), 3, -1).sum(2), 0)


def last_stage(search: Search) -> float:
    return stage_shares(search, last=True)[2]


def pull(search: Search, operation: str) -> float:
    """How far the gradient is for an operation: the mean of ∂L/∂p over all operations less that of this one,
    the mean over edges, cells and epochs, times 1000. Positive: a step along the gradient at equal p would
    raise α of the operation; Adam divides by the gradient's size, so its steps need not."""
    by_epoch = search["epochs"]["operation_grads"]
    return 1000 * statistics.fmean(statistics.fmean(grads.values()) - grads[operation] for grads in by_epoch)


def alpha_at_end(search: Search, operation: str) -> float:
    """α of an operation less the mean over all operations, the mean over the edges. It starts at 0 and adds
    up all steps of the search, where `pull` sees four batches an epoch."""
    alpha = np.array(search["epochs"]["alphas"][-1][0]).mean(0)  # [ops]
    return float((alpha - alpha.mean())[nasbench201.OPERATIONS.index(operation)])


def noise_ratio(search: Search) -> float:
    """‖λ ∇Λ‖ / ‖∇L‖, the median over the last quarter of the epochs."""
    norms = zip(*(quarter(search["epochs"][name], True) for name in ("lambda_grad_norm", "loss_grad_norm")))
    return float(np.median([of_lambda / of_loss for of_lambda, of_loss in norms]))


# ---- tests

def sign_flip(differences: Sequence[float]) -> float:
    """The exact two-sided p-value of paired differences: the share of the 2^n choices of their signs that
    bring their mean at least as far from 0."""
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


def differences(searches: Searches, first: str, second: str, of: Callable[[Search], float]) -> list[float]:
    """Of a measure, between two variants, for each seed that both have."""
    pairs = searches.get(first, {}).keys() & searches.get(second, {}).keys()
    return [of(searches[first][seed]) - of(searches[second][seed]) for seed in sorted(pairs)]


def tests_table(rows: dict[str, list[float]], corrected: bool) -> str:
    """The tests of differences, by their names."""
    p_values = [sign_flip(values) for values in rows.values()]
    columns = [p_values, holm(p_values)] if corrected else [p_values]
    return table(["difference", "pairs", "mean ± deviation", "p", "p, Holm"][: 3 + len(columns)], [
        [name, len(values), spread(values), *(f"{p:.4f}" for p in of_row)]
        for (name, values), *of_row in zip(rows.items(), *columns)])


# ---- tables and pictures

COLUMNS: dict[str, tuple[Callable[[Search], float | None], int]] = {  # name -> (measure, digits)
    "true accuracy, %": (accuracy, 2), "skips": (skips, 1),
    "skips, last quarter (not in the plan)": (skips_late, 1), "p of skip": (p_skip, 3),
    "1 − Σ p²": (late("gini"), 3), "Λ (sign: Λ±), training": (late("lambda_train"), 2),
    "Λ (sign: Λ±), validation": (late("lambda_valid"), 2),
    "magnitude of the largest eigenvalue": (lambda search: abs(late("alpha_eigenvalue")(search)), 1),
    "supernet, validation, %": (late("valid_accuracy"), 1), "‖λ∇Λ‖ / ‖∇L‖": (noise_ratio, 1),
    "processor minutes": (lambda search: search["processor_minutes"], 0),
}


def findings(searches: Searches) -> str:
    """All tables."""
    def by_variant(header: list[str], row: Callable[[str, Seeds], list]) -> str:
        return table(["variant", *header], [[name, *row(name, seeds)] for name, seeds in searches.items()])

    def ends(_, of_variant: Seeds) -> list:
        collapsed = sum(skips(search) >= 5 for search in of_variant.values())
        columns = [([value for search in of_variant.values() if (value := of(search)) is not None], digits)
                   for of, digits in COLUMNS.values()]
        return [len(of_variant), f"{collapsed} of {len(of_variant)}",
                *(spread(values, digits) + f" (of {len(values)})" * (0 < len(values) < len(of_variant))
                  for values, digits in columns)]

    def cells(_, of_variant: Seeds) -> list:
        return [f"{accuracy(of_variant[seed]):.2f} ({skips(of_variant[seed])})" if seed in of_variant else ""
                for seed in seeds]

    def stages(_, of_variant: Seeds) -> list:
        return [spread(list(shares)) for last in (False, True)
                for shares in zip(*(stage_shares(search, last) for search in of_variant.values()))]

    def by_operation(of: Callable[[Search, str], float]) -> str:
        return by_variant(list(nasbench201.OPERATIONS), lambda _, of_variant: [
            spread([of(search, operation) for search in of_variant.values()])
            for operation in nasbench201.OPERATIONS])

    seeds = sorted({seed for of_variant in searches.values() for seed in of_variant})
    text = "The end of a search, mean ± deviation over the seeds:\n\n"
    text += by_variant(["seeds", "five skips or six", *COLUMNS], ends)
    of_all = spread(list(nasbench201.accuracies()[:, 0]))
    text += f"\nTrue accuracy of each last cell, % (a random cell: {of_all}), and its skips:\n\n"
    text += by_variant([f"seed {seed}" for seed in seeds], cells)
    for name, of in (("true accuracy, %", accuracy), ("skips", skips)):
        text += f"\nExact tests of the difference in {name}, paired by seed:\n\n"
        text += tests_table({f"{first} − {second}": differences(searches, first, second, of)
                             for first, second in TESTED}, True)
    text += ("\nTests of what the paper explains collapse by "
             "(the first is exact for a symmetric distribution):\n\n")
    text += tests_table({
        "DARTS: share of stage 3 − 1/3 (H4: above 0)":
            [last_stage(search) - 1 / 3 for search in searches.get("DARTS", {}).values()],
        "exact − DARTS: share of stage 3 (H4: above 0)": differences(searches, "exact", "DARTS", last_stage),
        "exact − DARTS: gradient for skips, times 1000 (H5: above 0)":
            differences(searches, "exact", "DARTS", lambda search: pull(search, "skip_connect"))}, False)
    text += "\nWho decides: the share of each stage's cells in the gradient w.r.t. α:\n\n"
    text += by_variant([f"stage {stage}, {part} quarter" for part in ("first", "last")
                        for stage in (1, 2, 3)], stages)
    text += "\nOn what: the mean of ∂L/∂p over the operations less that of one, times 1000:\n\n"
    text += by_operation(pull)
    text += ("\nWhere α went (not in the plan): "
             "α of an operation at the end less the mean over the operations:\n\n")
    text += by_operation(alpha_at_end)
    return text


def cells_of(searches: Searches) -> dict[str, dict[int, str]]:
    """The last cells, as arch strings."""
    return {variant: {seed: search["cell"] for seed, search in of_variant.items()}
            for variant, of_variant in searches.items()}


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
    text = findings(searches)
    (FOLDER / "cells.json").write_text(json.dumps(cells_of(searches), indent=1) + "\n")
    (FOLDER / "findings.md").write_text(text)
    print(text, end="")
    draw_along({name: of for name, of in searches.items() if name != "sign"}, FOLDER / "along.png")
    draw_shares({variant: [search["epochs"]["cell_shares"] for search in of_variant.values()]
                 for variant, of_variant in searches.items()}, FOLDER / "shares.png")


if __name__ == "__main__":
    script(main)
