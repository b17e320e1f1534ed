"""The run folder: configuration, log, metrics and checkpoints; each file appears whole or not at all.

    python -m ldarts.runs runs/a runs/b …     # the results' table: runs that differ in their seed alone make one row
"""
import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

from .errors import InputError

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


class Run:
    """The folder runs/<name>/ of one run; made on construction, which refuses an existing one.

    config: what config.json records beside the versions, the device and the commit.
    """

    def __init__(self, kind: str, name: str | None, config: dict[str, Any], device: torch.device, root: str = "runs"):
        name = name or f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(root) / name
        try:
            self.path.mkdir(parents=True)
        except FileExistsError as error:
            raise InputError(f"{self.path} exists already: give another name by --save") from error
        except OSError as error:
            raise InputError(f"{self.path}: cannot be made ({error.strerror}): give another name by --save") from error
        config = config | {"kind": kind, "versions": versions(), "device_name": device_name(device), "commit": commit()}
        self.write("config.json", json.dumps(config, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, lambda path: path.write_text(text))

    def log(self, line: str) -> None:
        """Print a line and append it, with the time, to log.txt."""
        print(line, flush=True)
        with open(self.path / "log.txt", "a") as file:
            file.write(f"{datetime.now():%m-%d %H:%M:%S} {line}\n")

    def metrics(self, values: dict[str, Any]) -> None:
        """Append one line of JSON to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        old = path.read_text() if path.exists() else ""
        self.write("metrics.jsonl", old + json.dumps(values) + "\n")

    def save(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        write_atomically(self.path / name, lambda path: torch.save(state, path))


def load_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint written by Run.save, or a plain state_dict under "model". Raises InputError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch.load raises whatever damaged bytes lead to
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise InputError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: not a checkpoint: expected a dictionary")
    return state if "model" in state else {"model": state}


def versions() -> dict[str, str]:
    from . import __version__
    return {"ldarts": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The checkout's commit, with a + where it has uncommitted changes; None outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    result = subprocess.run(["git", "describe", "--always", "--abbrev=12", "--dirty=+"], cwd=root, text=True,
                            capture_output=True)
    return result.stdout.strip() or None


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:120]}; use cpu, cuda or auto") from error


def seed_everything(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


class Meter:
    """Running mean of the loss and the accuracy, kept on the device until read."""

    def __init__(self):
        self.loss = self.correct = 0.0
        self.count = 0

    def update(self, loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> None:
        self.loss = self.loss + loss.detach() * len(y)
        self.correct = self.correct + (logits.detach().argmax(1) == y).sum()
        self.count += len(y)

    def read(self) -> tuple[float, float]:
        """(mean loss, accuracy in percent)"""
        return float(self.loss) / self.count, 100 * float(self.correct) / self.count


class Clock:
    """Seconds a step and the time left, over `total` steps."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def tick(self) -> None:
        self.done += 1

    def __str__(self) -> str:
        seconds = (time.perf_counter() - self.start) / max(1, self.done)
        left = round(seconds * (self.total - self.done))
        return f"{seconds:.3g} s/step, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


@torch.no_grad()
def evaluate(net: Callable, criterion: nn.Module, batches) -> tuple[float, float]:
    """(loss, accuracy in percent) in evaluation mode. net: x -> logits"""
    meter = Meter()
    for x, y in batches:
        logits = net(x)
        meter.update(criterion(logits, y), logits, y)
    return meter.read()


def script(main: Callable[[], None]) -> None:
    """Run a script's main: bad input is one line on standard error and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


# What two runs of one row of a table, or of one band of a plot, may differ in.
_INCIDENTAL = ("seed", "save", "data", "device", "device_name", "versions", "commit", "report_freq", "plot", "tensorboard",
               "eigenvalue", "nasbench", "workers", "parameters", "multiply_adds")


def read_run(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(configuration, metrics of each epoch) of a run folder. Raises InputError where there is none."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
        metrics = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a run folder with at least one epoch ({error})") from error
    return config, metrics


def grouped(paths: list[str]) -> dict[str, list[str]]:
    """The run folders that differ in nothing but their seed, together, by what they are and what sets them apart."""
    settings = {path: {k: v for k, v in read_run(path)[0].items() if k not in _INCIDENTAL} for path in paths}
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

    Validation accuracy of a search, test accuracy of an evaluation. An evaluation of a run folder shows that search's time
    and Λ.
    """
    rows = []
    for name, members in grouped(paths).items():
        columns = {column: [] for column in ("accuracy", "parameters", "multiply_adds", "minutes", "lambda")}
        for config, metrics in map(read_run, members):
            columns["accuracy"].append(metrics[-1].get("test_accuracy", metrics[-1].get("valid_accuracy")))
            columns["parameters"] += [config["parameters"] / 1e6] if "parameters" in config else []
            columns["multiply_adds"] += [config["multiply_adds"] / 1e6] if "multiply_adds" in config else []
            if config["kind"] == "eval":
                try:
                    metrics = read_run(config["arch"])[1]
                except InputError:  # a published cell
                    continue
            columns["minutes"].append(sum(line["seconds"] for line in metrics) / 60)
            columns["lambda"] += [metrics[-1]["lambda_train"]] if "lambda_train" in metrics[-1] else []
        rows.append([name, len(members), *map(spread, columns.values())])
    return table(["runs", "seeds", "accuracy, %", "parameters, M", "multiply-adds, M", "search, min", "Λ"], rows)


def main() -> None:
    parser = Parser(description="Tabulate finished runs: mean ± standard deviation over seeds.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of searches or evaluations")
    print(summary(parser.parse_args().runs), end="")


if __name__ == "__main__":
    script(main)
