"""What runs have found, and the table of it."""
import json
import statistics
from pathlib import Path
from typing import Any

from ..errors import InputError, brief
from ..nasbench201 import better_than_random
from .arguments import MAY_CHANGE, Parser, read_config

# What two runs of one row of a table, or of one band of a plot, may differ in.
INCIDENTAL = (*MAY_CHANGE, "seed", "save", "device_name", "versions", "commit", "deterministic", "eigenvalue",
              "parameters", "multiply_adds")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The metrics of each epoch of a run, of none before the end of its first."""
    file = Path(path, "metrics.jsonl")
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read ({brief(error)})") from error


def read_run(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(configuration, metrics of each epoch) of a run folder. Raises InputError where there is no epoch."""
    config, metrics = read_config(path), read_metrics(path)
    if not metrics:
        raise InputError(f"{path}: has not come to the end of an epoch yet")
    return config, metrics


def run_folder(arch: str) -> Path:
    """The folder of the run that --arch may name, by itself or by its genotype.json."""
    return Path(arch).parent if Path(arch).name == "genotype.json" else Path(arch)


def unfinished(path: str | Path) -> str:
    """How far a run has come, empty for one that is at its end."""
    done, epochs = len(read_metrics(path)), read_config(path).get("epochs")
    return f"{done} of {epochs} epochs" if isinstance(epochs, int) and done < epochs else ""


def grouped(paths: list[str]) -> dict[str, list[str]]:
    """Run folders that differ in their seed alone, together, by what they are and what sets them apart."""
    settings = {path: {k: v for k, v in read_config(path).items() if k not in INCIDENTAL} for path in paths}
    groups = {}
    for path, s in settings.items():
        others = [other for other in settings.values() if other["kind"] == s["kind"]]
        apart = [f"{k} {v}" for k, v in s.items() if any(other.get(k) != v for other in others)]
        groups.setdefault(", ".join([s["kind"], *apart]), []).append(path)
    return groups


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; one value stands alone."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def summary(paths: list[str], with_unfinished: bool = False) -> str:
    """The protocol's table: mean ± deviation over the seeds, all at the last epoch.

    Validation accuracy of a search, test accuracy of an evaluation. An evaluation of a run folder shows that
    search's time, Λ and, in nasbench201, the true accuracy of its cells, with the probability that as many
    random cells have a mean rank as good. Unfinished runs, named below the table, enter it only by
    `with_unfinished`.
    """
    rows, short = [], {}  # short: how far the unfinished ones have come, by their paths

    def counts(path: str) -> bool:
        if so_far := unfinished(path):
            short[path] = so_far
        return not so_far or with_unfinished and len(read_metrics(path)) > 0

    for name, group in grouped(paths).items():
        members = [path for path in group if counts(path)]
        columns = {column: [] for column in ("accuracy", "parameters", "multiply_adds", "minutes", "lambda",
                                             "true")}
        ranks = []
        for config, metrics in map(read_run, members):
            columns["accuracy"].append(metrics[-1].get("test_accuracy", metrics[-1].get("valid_accuracy")))
            for size in ("parameters", "multiply_adds"):
                columns[size] += [config[size] / 1e6] if size in config else []
            if config["kind"] == "eval":
                search = str(run_folder(config["arch"]))
                try:
                    metrics = read_run(search)[1] if counts(search) else []
                except InputError:  # a published cell
                    metrics = []
            if not metrics:
                continue
            columns["minutes"].append(sum(line["seconds"] for line in metrics) / 60)
            columns["lambda"] += [metrics[-1]["lambda_train"]] if "lambda_train" in metrics[-1] else []
            if "true_rank" in metrics[-1]:
                columns["true"].append(metrics[-1]["true_cifar10"])
                ranks.append(metrics[-1]["true_rank"])
        apart = sum(path in short for path in group)
        seeds = f"{len(members)} ({apart} unfinished {'in' if with_unfinished else 'left out'})"
        rows.append([name, seeds if apart else len(members), *map(spread, columns.values()),
                     f"{better_than_random(ranks):.2g}" if ranks else "–"])
    header = ["runs", "seeds", "accuracy, %", "parameters, M", "multiply-adds, M", "search, min", "Λ",
              "true accuracy, %", "random cells as good, probability"]
    if all(row[-1] == "–" for row in rows):  # none in nasbench201
        header, *rows = (line[:-2] for line in (header, *rows))
    return table(header, rows) + "".join(f"unfinished: {path}, {so_far}\n" for path, so_far in short.items())


def main() -> None:
    parser = Parser(prog="python -m ldarts.runs",
                    description="Tabulate finished runs: mean ± standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of searches or evaluations")
    parser.add_argument("--unfinished", action="store_true", help="take in runs that are not at their end")
    args = parser.parse_args()
    print(summary(args.runs, args.unfinished), end="")
