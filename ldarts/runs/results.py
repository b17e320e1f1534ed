"""The table of results over seeds, and the best of several searches."""
import os
import statistics
import sys
from pathlib import Path
from typing import Any, Collection, Iterator

from ..errors import InputError
from ..nasbench201 import SETS, better_than_random, rank_of, searched_set
from .arguments import MAY_CHANGE, Parser
from .files import read_config, read_metrics, read_run, search_of, unfinished

# Arguments and facts that may differ between runs of one row of a table, or of one band of a plot.
INCIDENTAL = (*MAY_CHANGE, "resume", "seed", "save", "device_name", "machine", "versions", "commit",
              "deterministic", "eigenvalue", "parameters", "multiply_adds")


def grouped(paths: list[str]) -> dict[str, list[str]]:
    """Run folders that differ in INCIDENTAL alone, as groups; their names say what sets them apart."""
    settings = {path: {k: v for k, v in read_config(path).items() if k not in INCIDENTAL} for path in paths}
    groups = {}
    for path, own in settings.items():
        others = [other for other in settings.values() if other["kind"] == own["kind"]]
        apart = [f"{k} {v}" for k, v in own.items() if any(other.get(k) != v for other in others)]
        groups.setdefault(", ".join([own["kind"], *apart]), []).append(path)
    return groups


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; a single value without a deviation."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(str(cell).replace("|", r"\|").split()) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def cell_of(folder: str) -> bytes | None:
    file = Path(folder, "genotype.json")
    return file.read_bytes() if file.is_file() else None


def summary(paths: list[str], with_unfinished: bool = False) -> str:
    """The protocol's table: mean ± standard deviation over the seeds, at the last epoch.

    Accuracy is validation accuracy of a search, test accuracy of an evaluation. An evaluation whose --arch is
    the folder of a search also shows that search's time and Λ and, in nasbench201, true accuracy on the set
    that was searched and p-value (see better_than_random); several evaluations of a search count it once.
    Unfinished runs are named below the table and left out, unless `with_unfinished`.
    """
    rows, progress, changed = [], {}, {}  # how far unfinished runs have come; evaluations of a former cell

    def counted(paths: Collection[str]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """(configuration, metrics) of those runs that are not left out"""
        progress.update((path, so_far) for path in paths if (so_far := unfinished(path)))
        return [read_run(path) for path in paths
                if path not in progress or with_unfinished and read_metrics(path)]

    def values(lines: list[dict[str, Any]], name: str) -> list[float]:
        return [line[name] for line in lines if name in line]

    for name, group in grouped(paths).items():
        runs, folders = counted(group), {}
        for path in group if runs else ():
            if folder := search_of(read_config(path).get("arch", path)):
                (folders if cell_of(path) == cell_of(folder) else changed)[path] = folder
        searches = counted(dict.fromkeys(folders.values()))
        configs, ends = [config for config, _ in runs], [metrics[-1] for _, metrics in runs]
        ends_of_searches = [metrics[-1] for _, metrics in searches]
        judge = searched_set(next((config.get("dataset") for config, _ in searches), None))
        columns = {
            "accuracy, %": values(ends, "test_accuracy") or values(ends, "valid_accuracy"),
            "parameters, M": [count / 1e6 for count in values(configs, "parameters")],
            "multiply-adds, M": [count / 1e6 for count in values(configs, "multiply_adds")],
            "search, min": [sum(values(metrics, "seconds")) / 60 for _, metrics in searches],
            "Λ": values(ends_of_searches, "lambda_train"),
            "true accuracy, %": values(ends_of_searches, f"true_{judge}"),
        }
        left = sum(path in progress for path in group)
        seeds = f"{len(runs)}"
        if left:
            seeds += f" ({left} unfinished {'in' if with_unfinished else 'left out'})"
        if (different := len({config.get("seed") for config in configs})) < len(runs):  # a copy, a repetition
            seeds += f", {different} different"
        rows.append([name, seeds, *map(spread, columns.values()), "–"])
        if truths := columns["true accuracy, %"]:  # on one set: runs of different sets are in different rows
            rows[-1][-2] += f" on {SETS[judge]}"
            rows[-1][-1] = f"{better_than_random([rank_of(truth, judge) for truth in truths]):.2g}"
    header = ["runs", "seeds", *columns, "p-value against random cells"]
    if all(row[-1] == "–" for row in rows):  # no run in nasbench201
        header, *rows = (line[:-2] for line in (header, *rows))
    return table(header, rows) + "".join(f"unfinished: {path}, {so_far}\n"
                                         for path, so_far in progress.items()) + "".join(
        f"left out: {folder}, its cell is no longer that of {path}\n" for path, folder in changed.items())


def best_search(paths: list[str]) -> str:
    """The finished search with the highest validation accuracy at its end."""
    searches = [path for path in paths if read_config(path)["kind"] == "search" and not unfinished(path)]
    if not searches:
        raise InputError(f"--best: none of {', '.join(paths)} is a finished search")
    return max(searches, key=lambda path: read_run(path)[1][-1]["valid_accuracy"])


def readable(paths: list[str]) -> Iterator[str]:
    """Those of several paths that are runs; the others are named on standard error."""
    for path in paths:
        try:
            read_config(path), read_metrics(path)
            yield path
        except InputError as error:
            if len(paths) == 1 or not os.path.exists(path):
                raise
            print(f"left out: {error}", file=sys.stderr)


def main() -> None:
    parser = Parser(prog="python -m ldarts.runs",
                    description="A table of finished runs: mean ± standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of searches or evaluations")
    parser.add_argument("--best", action="store_true",
                        help="print the search with the highest validation accuracy at its end instead")
    parser.add_argument("--unfinished", action="store_true", help="include unfinished runs in the table")
    args = parser.parse_args()
    by_folder = {os.path.realpath(path): str(Path(path)) for path in args.runs}  # runs/a and runs/a/ are one
    if not (paths := [*readable([*by_folder.values()])]):
        raise InputError("none of these is a run: a run is a folder runs/<name>")
    print(best_search(paths) if args.best else summary(paths, args.unfinished).rstrip("\n"))
