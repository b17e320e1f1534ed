"""What runs have found, and the table of it."""
import json
import statistics
from pathlib import Path
from typing import Any

from ..errors import InputError
from .arguments import MAY_CHANGE, Parser

# What two runs of one row of a table, or of one band of a plot, may differ in.
INCIDENTAL = (*MAY_CHANGE, "seed", "save", "device_name", "versions", "commit", "deterministic", "eigenvalue",
              "parameters", "multiply_adds")


def read_run(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(configuration, metrics of each epoch) of a run folder. Raises InputError where there is none."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
        metrics = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a run folder with at least one epoch ({error})") from error
    return config, metrics


def grouped(paths: list[str]) -> dict[str, list[str]]:
    """Run folders that differ in their seed alone, together, by what they are and what sets them apart."""
    settings = {path: {k: v for k, v in read_run(path)[0].items() if k not in INCIDENTAL} for path in paths}
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


def summary(paths: list[str]) -> str:
    """The protocol's table: mean ± deviation over the seeds, all at the last epoch.

    Validation accuracy of a search, test accuracy of an evaluation. An evaluation of a run folder shows that
    search's time and Λ.
    """
    rows = []
    for name, members in grouped(paths).items():
        columns = {column: [] for column in ("accuracy", "parameters", "multiply_adds", "minutes", "lambda")}
        for config, metrics in map(read_run, members):
            columns["accuracy"].append(metrics[-1].get("test_accuracy", metrics[-1].get("valid_accuracy")))
            for size in ("parameters", "multiply_adds"):
                columns[size] += [config[size] / 1e6] if size in config else []
            if config["kind"] == "eval":
                try:
                    metrics = read_run(config["arch"])[1]
                except InputError:  # a published cell
                    continue
            columns["minutes"].append(sum(line["seconds"] for line in metrics) / 60)
            columns["lambda"] += [metrics[-1]["lambda_train"]] if "lambda_train" in metrics[-1] else []
        rows.append([name, len(members), *map(spread, columns.values())])
    header = ["runs", "seeds", "accuracy, %", "parameters, M", "multiply-adds, M", "search, min", "Λ"]
    return table(header, rows)


def main() -> None:
    parser = Parser(prog="python -m ldarts.runs",
                    description="Tabulate finished runs: mean ± standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of searches or evaluations")
    print(summary(parser.parse_args().runs), end="")
