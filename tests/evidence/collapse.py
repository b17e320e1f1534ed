"""The experiment of collapse/PLAN.md, read: its tables, tests and pictures.

    python tests/evidence/collapse.py keep OUT/A/runs/*/  # a small file in collapse/results for each search
    python tests/evidence/collapse.py  # from these: findings.md, cells.json and the pictures
"""
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from ldarts.nasbench201 import OPERATIONS, accuracies  # noqa: E402
from ldarts.runs import read_run, script, spread, table, unfinished, write_atomically  # noqa: E402
from ldarts.visualize import draw_shares, pyplot, save  # noqa: E402

FOLDER = Path(__file__).with_suffix("")
VARIANTS = ["DARTS", "central", "exact", "random", "sign"]
TESTED = [("central", "DARTS"), ("exact", "DARTS"), ("random", "DARTS"), ("exact", "random")]
KEPT = ("true_cifar10", "skip_connections", "valid_accuracy", "train_accuracy", "lambda_train",
        "lambda_valid", "alpha_eigenvalue", "gini", "lambda_grad_norm", "loss_grad_norm", "cell_shares",
        "operation_grads", "alphas")
LAST_STAGE = "stage 3, last quarter"
DIGITS = {"skips": 1, "skips, last quarter (not in the plan)": 1, "p of skip": 3, "1 − Σ p²": 3,
          "magnitude of the largest eigenvalue": 1, "supernet, validation, %": 1, "‖λ∇Λ‖ / ‖∇L‖": 1,
          "processor minutes": 0}  # of other columns 2

Search = dict[str, Any]  # a file of results: what was run, and `epochs`, the list of each number by its name
Searches = dict[str, dict[int, Search]]  # by variant and seed
Measures = dict[str, dict[str, float | None]]  # by table and column


def variant_of(config: dict[str, Any]) -> str:
    if not config["lambda_reg"]:
        return "DARTS"
    return "sign" if config["lambda_kind"] == "sign" else config["lambda_grad"]


def rounded(text: str) -> float:
    """Four significant digits of a number below 1000: more than any of them has from seed to seed."""
    return float(f"{float(text):.4g}" if abs(float(text)) < 1000 else text)


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
                  "epochs": {name: [line[name] for line in metrics] for name in KEPT}}
        result = json.loads(json.dumps(result), parse_float=rounded)
        path = FOLDER / "results" / f"{result['variant']}-{result['seed']}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(result) + "\n").encode())
        print(path)


def read_results() -> Searches:
    searches = [json.loads(path.read_text()) for path in (FOLDER / "results").glob("*.json")]
    searches.sort(key=lambda search: (VARIANTS.index(search["variant"]), search["seed"]))
    return {variant: {search["seed"]: search for search in group}
            for variant, group in itertools.groupby(searches, lambda search: search["variant"])}


def measures(search: Search) -> Measures:
    """The numbers of a search that the tables show. late: the median over the last quarter of the epochs"""
    epochs = {name: np.array(values, float) for name, values in search["epochs"].items()
              if name != "operation_grads"}
    quarter = len(epochs["alphas"]) // 4

    def late(name: str) -> float:
        return np.median(epochs[name][-quarter:])

    alpha = epochs["alphas"][-1, 0]  # [edges, ops]
    p = np.exp(alpha) / np.exp(alpha).sum(1, keepdims=True)
    grads = np.array([[of[name] for name in OPERATIONS] for of in search["epochs"]["operation_grads"]])
    shares = epochs["cell_shares"].reshape(len(grads), 3, -1).sum(2)  # [epochs, stages]
    quarters = {"first": shares[:quarter], "last": shares[-quarter:]}
    noise = epochs["lambda_grad_norm"][-quarter:] / epochs["loss_grad_norm"][-quarter:]
    return {
        "end": {
            "true accuracy, %": epochs["true_cifar10"][-1],
            "skips": epochs["skip_connections"][-1],  # of 6 operations
            # The last cell may hang on a p that is larger by 0.001.
            "skips, last quarter (not in the plan)": epochs["skip_connections"][-quarter:].mean(),
            "p of skip": p.mean(0)[OPERATIONS.index("skip_connect")],
            "1 − Σ p²": late("gini"),
            "Λ (sign: Λ±), training": late("lambda_train"),
            "Λ (sign: Λ±), validation": late("lambda_valid"),
            "magnitude of the largest eigenvalue": abs(late("alpha_eigenvalue")),
            "supernet, validation, %": late("valid_accuracy"),
            "‖λ∇Λ‖ / ‖∇L‖": np.median(noise),
            "processor minutes": search["processor_minutes"]},
        # The share of each stage's cells in ∂L/∂α, its median over a quarter of the epochs.
        "share": {f"stage {k + 1}, {name} quarter": share for name, of_epochs in quarters.items()
                  for k, share in enumerate(np.median(of_epochs, 0))},
        # How far the gradient is for an operation, the mean over edges, cells and epochs. Positive: a step
        # along it at equal p would raise α of the operation; Adam divides by its size, so its steps need not.
        "pull": dict(zip(OPERATIONS, 1000 * (grads.mean() - grads.mean(0)))),
        # The mean over the edges: the sum of all steps, where the gradient is of four batches an epoch.
        "alpha": dict(zip(OPERATIONS, alpha.mean(0) - alpha.mean()))}


def sign_flip(differences: Sequence[float]) -> float:
    """The exact two-sided p-value of paired differences: the share of the 2^n choices of their signs that
    bring their mean at least as far from 0."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = np.abs(signs @ np.array(differences))
    return float((sums >= abs(sum(differences)) - 1e-9).mean())


def holm(p_values: Sequence[float]) -> np.ndarray:
    """The p-values corrected for their number (Holm, 1979)."""
    order, corrected = np.argsort(p_values), np.empty(len(p_values))
    counts = np.arange(len(p_values), 0, -1)
    corrected[order] = np.maximum.accumulate(np.minimum(1, counts * np.array(p_values)[order]))
    return corrected


def tests_table(rows: dict[str, list[float]], corrected: bool = False) -> str:
    """The tests of differences, by their names."""
    p_values = {"p": [sign_flip(values) for values in rows.values()]}
    if corrected:
        p_values["p, Holm"] = holm(p_values["p"])
    return table(["difference", "pairs", "mean ± deviation", *p_values], [
        [name, len(values), spread(values), *(f"{p:.4f}" for p in of_row)]
        for (name, values), *of_row in zip(rows.items(), *p_values.values())])


def findings(searches: Searches) -> str:
    """All tables."""
    measured = {variant: {seed: measures(search) for seed, search in group.items()}
                for variant, group in searches.items()}
    seeds = sorted(set().union(*measured.values()))

    def by_variant(row: Callable[[dict[int, Measures]], dict[str, Any]]) -> str:
        rows = {variant: row(group) for variant, group in measured.items()}
        return table(["variant", *next(iter(rows.values()))],
                     [[variant, *cells.values()] for variant, cells in rows.items()])

    def means(group: dict[int, Measures], of: str) -> dict[str, str]:
        rows = [numbers[of] for numbers in group.values()]
        return {column: mean([row[column] for row in rows], column) for column in rows[0]}

    def mean(numbers: list[float | None], column: str) -> str:
        known = [number for number in numbers if number is not None]
        of = f" (of {len(known)})" if 0 < len(known) < len(numbers) else ""
        return spread(known, DIGITS.get(column, 2)) + of

    def ends(group: dict[int, Measures]) -> dict[str, Any]:
        collapsed = sum(numbers["end"]["skips"] >= 5 for numbers in group.values())
        return {"seeds": len(group), "five skips or six": f"{collapsed} of {len(group)}",
                **means(group, "end")}

    def cells(group: dict[int, Measures]) -> dict[str, str]:
        shown = {seed: f"{numbers['end']['true accuracy, %']:.2f} ({numbers['end']['skips']:.0f})"
                 for seed, numbers in group.items()}
        return {f"seed {seed}": shown.get(seed, "") for seed in seeds}

    def differences(first: str, second: str, of: str, column: str) -> list[float]:
        """Between two variants, for each seed that both have."""
        a, b = measured.get(first, {}), measured.get(second, {})
        return [a[seed][of][column] - b[seed][of][column] for seed in seeds if seed in a and seed in b]

    def tests(column: str) -> str:
        return tests_table({f"{first} − {second}": differences(first, second, "end", column)
                            for first, second in TESTED}, corrected=True)

    of_darts = [numbers["share"][LAST_STAGE] - 1 / 3 for numbers in measured.get("DARTS", {}).values()]
    random_cell = spread(list(accuracies()[:, 0]))
    tables = {
        "The end of a search, mean ± deviation over the seeds": by_variant(ends),
        f"True accuracy of each last cell, % (a random cell: {random_cell}), and its skips":
            by_variant(cells),
        "Exact tests of the difference in true accuracy, %, paired by seed": tests("true accuracy, %"),
        "Exact tests of the difference in skips, paired by seed": tests("skips"),
        "Tests of what the paper explains collapse by (the first is exact for a symmetric distribution)":
            tests_table({
                "DARTS: share of stage 3 − 1/3 (H4: above 0)": of_darts,
                "exact − DARTS: share of stage 3 (H4: above 0)":
                    differences("exact", "DARTS", "share", LAST_STAGE),
                "exact − DARTS: gradient for skips, times 1000 (H5: above 0)":
                    differences("exact", "DARTS", "pull", "skip_connect")}),
        "Who decides: the share of each stage's cells in the gradient w.r.t. α":
            by_variant(lambda group: means(group, "share")),
        "On what: the mean of ∂L/∂p over the operations less that of one, times 1000":
            by_variant(lambda group: means(group, "pull")),
        "Where α went (not in the plan): α of an operation at the end less the mean over the operations":
            by_variant(lambda group: means(group, "alpha")),
    }
    return "\n".join(f"{title}:\n\n{rows}" for title, rows in tables.items())


def draw_along(searches: Searches, path: Path) -> None:
    """True accuracy and skips along the search: median and quartiles over the seeds."""
    figure, axes = pyplot().subplots(2, 1, sharex=True, layout="constrained", figsize=(7.5, 6.4))
    names = {"true_cifar10": "test accuracy of the cell after\nfull training, CIFAR-10, %",
             "skip_connections": "skip connections, of 6"}
    for ax, (name, label) in zip(axes, names.items()):
        for k, (variant, group) in enumerate(searches.items()):
            values = [search["epochs"][name] for search in group.values()]
            low, middle, high = np.percentile(values, (25, 50, 75), axis=0)
            ax.plot(middle, color=f"C{k}", label=f"{variant} (n = {len(group)})")
            ax.fill_between(range(len(low)), low, high, color=f"C{k}", alpha=0.15, lw=0)
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].axhline(np.median(accuracies()[:, 0]), color="0.4", ls="--", lw=1, label="a random cell: median")
    axes[1].set_xlabel("epoch of the search")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def main() -> None:
    if sys.argv[1:2] == ["keep"]:
        return keep(sys.argv[2:])
    searches = read_results()
    text = findings(searches)
    cells = {variant: {seed: search["cell"] for seed, search in group.items()}
             for variant, group in searches.items()}
    (FOLDER / "cells.json").write_text(json.dumps(cells, indent=1) + "\n")
    (FOLDER / "findings.md").write_text(text)
    print(text, end="")
    draw_along({name: group for name, group in searches.items() if name != "sign"}, FOLDER / "along.png")
    shares = {variant: [search["epochs"]["cell_shares"] for search in group.values()]
              for variant, group in searches.items()}
    draw_shares(shares, FOLDER / "shares.png")


if __name__ == "__main__":
    script(main)
