"""The run folder: configuration, log, metrics and checkpoints; each file appears whole or not at all.

    python -m ldarts.runs runs/a runs/b …     # the results' table: runs that differ in their seed alone make one row
"""
import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from torch import nn

from .distributed import Processes
from .errors import InputError, NotFinite

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
AMP = ("none", "bf16")
FORMAT = 1  # of checkpoints
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
SEAL = b"\nldarts-sha256:"  # then 64 digits, behind the zip archive, where torch.load does not look
NEVER = 2**62  # no step


def write_atomically(path: Path, write: Callable[[Path], None], previous: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`; what is there becomes `previous`.

    Raises InputError when the disk is full or the folder can't be written to; what is there then stays as it is.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # or a power cut may take the renaming back
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); put that right, then --resume {path.parent}")


class Run:
    """The folder runs/<name>/ of one run, and the point that the run has reached.

    Made on construction, which refuses an existing folder; with args.resume, continued from its last whole checkpoint.
    args: of the script; parts: objects with a state_dict, by their names in the checkpoint; steps: in an epoch; facts: more for
    config.json; means: numbers that after_step is given to average beside loss and accuracy. With the
    arguments, `parts`, and the attributes below, a checkpoint holds all that the rest of the run depends on: batches and
    random numbers are functions of (seed, rank, epoch, step). All processes call every method; rank 0 alone writes.

    epoch, step: what comes next; meter: of this epoch; seconds: that this epoch took before the last resume; history:
    the lines of metrics.jsonl, where all but `seconds` is the same bits with and without interruptions.
    """

    def __init__(self, kind: str, args: argparse.Namespace, processes: Processes, parts: dict[str, Any], steps: int,
                 facts: dict[str, Any] | None = None, means: int = 0):
        self.args, self.processes, self.parts, self.steps = args, processes, parts, steps
        self.writes = processes.rank == 0
        self.epoch, self.step, self.seconds, self.history, self.means = 0, 0, 0.0, [], means
        self.meter = Meter(processes, means)
        self.first_bad: dict[str, torch.Tensor] = {}
        self.path = Path(args.resume or Path("runs", args.save or f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"))
        if self.writes and not args.resume:
            try:
                self.path.mkdir(parents=True)
            except FileExistsError as error:
                raise InputError(f"{self.path} exists already: give another name by --save, or continue it by "
                                 f"--resume {self.path}") from error
            except OSError as error:
                raise InputError(f"{self.path}: cannot be made ({error.strerror}): give another name by --save") from error
        if self.writes:
            self._lock_file = self._lock()
        if args.resume:
            self._resume()
        elif self.writes:
            config = vars(args) | {"kind": kind, "processes": processes.world, "versions": versions(),
                                   "device_name": device_name(processes.device), "commit": commit()} | (facts or {})
            self.write("config.json", json.dumps(config, indent=1) + "\n")
        self.signals = Signals()
        self.clock = Clock((args.epochs - self.epoch) * steps - self.step)
        self.started = self.epoch_started = self.saved = time.perf_counter()
        self.saves, self.saving = 0, 0.0

    def _lock(self):
        """The open file whose lock, which dies with this process, keeps a second process out of the folder."""
        path = self.path / "lock"
        try:
            file = open(path, "a+")
        except OSError as error:
            raise not_written(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise InputError(f"{self.path} is in use by {file.read(100).strip() or 'another process'}: wait for its end, "
                             "or stop it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        return file

    def write(self, name: str, text: str) -> None:
        if self.writes:
            write_atomically(self.path / name, lambda path: path.write_text(text))

    def log(self, line: str) -> None:
        """Print a line and append it, with the time, to log.txt."""
        if self.writes:
            print(line, flush=True)
            try:
                with open(self.path / "log.txt", "a") as file:
                    file.write(f"{datetime.now():%m-%d %H:%M:%S} {line}\n")
            except OSError as error:
                raise not_written(self.path / "log.txt", error) from error

    def seed(self) -> None:
        """Seed the generators for the next step, or for what follows the last one of an epoch."""
        seed_everything(self.args.seed, self.processes.rank, self.epoch, self.step)

    def after_step(self, loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, means: torch.Tensor | None = None,
                   **watched: torch.Tensor | None) -> None:
        """Account for a step that is taken; report, save and stop when it is time to.

        loss: of the global batch; logits, y: of this process; means: [self.means], to be averaged over the epoch; watched:
        further scalars that have to stay finite.
        """
        self.meter.update(loss, logits, y, means)
        for name, value in {"the loss": loss, **watched}.items():
            if value is not None:  # on a GPU nobody waits for the answer here
                at = torch.where(value.detach().isfinite(), NEVER, self.step)
                self.first_bad[name] = torch.minimum(at, self.first_bad.get(name, at))
        reports = self.step % self.args.report_freq == 0 or self.step == self.steps - 1
        if reports or not loss.is_cuda:
            self._require_finite()
        self.step += 1
        self.clock.tick()
        if reports:
            mean, accuracy, *_ = self.meter.read()
            self.log(f"epoch {self.epoch} step {self.step - 1}/{self.steps}: loss {mean:.4f}, accuracy {accuracy:.2f} %, "
                     f"{self.clock}")
        overdue = self.writes and time.perf_counter() - self.saved >= 60 * self.args.checkpoint_minutes
        signal_number, overdue = self.processes.largest(self.signals.received, int(overdue))
        if overdue or signal_number:
            self.save()
        self._stop(signal_number)

    def end_epoch(self, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl and a checkpoint, after which the next epoch begins. values: of the line"""
        self._require_finite()
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise NotFinite(f"{name} is {value} after step {self.step} of epoch {self.epoch}; {self._kept()}")
        self.history.append(values | {"seconds": round(self._epoch_seconds(), 3)})
        self._write_metrics()
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter(self.processes, self.means)
        self.seconds, self.epoch_started = 0.0, time.perf_counter()
        self.save()
        self._stop(*self.processes.largest(self.signals.received))

    def save(self) -> None:
        """Write checkpoint.pt, which ends in its SHA-256; the one before becomes checkpoint.previous.pt."""
        started = time.perf_counter()
        self._require_finite()
        meters = self.processes.gather(self.meter.totals)  # [world, 3]
        state = {name: part.state_dict() for name, part in self.parts.items()}
        finite = torch.stack([value.isfinite().all() for value in state["model"].values()]).tolist()
        for name, fine in zip(state["model"], finite):
            if not fine:
                raise NotFinite(f"{name} is not finite before step {self.step} of epoch {self.epoch}; {self._kept()}")
        if self.writes:
            state |= {"format": FORMAT, "processes": self.processes.world, "epoch": self.epoch, "step": self.step,
                      "seconds": self._epoch_seconds(), "meters": meters, "history": self.history}
            content = io.BytesIO()
            torch.save(state, content)
            content.write(SEAL + hashlib.sha256(content.getbuffer()).hexdigest().encode())
            write_atomically(self.path / CHECKPOINT, lambda path: path.write_bytes(content.getbuffer()),
                             self.path / PREVIOUS)
        self.saved = time.perf_counter()
        self.saves, self.saving = self.saves + 1, self.saving + self.saved - started

    def cost(self) -> str:
        """What the checkpoints of this process cost."""
        share = 100 * self.saving / (time.perf_counter() - self.started)
        return f"{self.saves} checkpoints took {self.saving:.2f} s, {share:.2f} % of the time"

    def close(self) -> None:
        """Leave the folder to others, and the other processes."""
        if self.writes:
            self._lock_file.close()
        self.processes.close()

    def _epoch_seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.epoch_started

    def _write_metrics(self) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(values) + "\n" for values in self.history))

    def _require_finite(self) -> None:
        for name, first in self.first_bad.items():
            if (step := int(first)) != NEVER:
                raise NotFinite(f"{name} is not finite at step {step} of epoch {self.epoch}; {self._kept()}")

    def _kept(self) -> str:
        return f"the checkpoint before it is kept: --resume {self.path}"

    def _stop(self, signal_number: int) -> None:
        if signal_number:
            launcher = "python" if self.processes.world == 1 else "torchrun …"
            self.log(f"stopped by {signal.Signals(signal_number).name} before step {self.step} of epoch {self.epoch}; "
                     f"continue by: {launcher} {Path(sys.argv[0]).name} --resume {self.path}")
            self.processes.largest(0)  # torchrun would end the others once the first has left
            sys.exit(Signals.STATUS[signal_number])

    def _resume(self) -> None:
        state = self._newest() if self.writes else None
        self.processes.largest(0)  # the others read once a damaged file is out of the way
        state = state if self.writes else self._newest()
        if state is None:
            self.log(f"{self.path}: no checkpoint yet; from the beginning")
            return
        where = self.path / CHECKPOINT
        try:
            if state["format"] != FORMAT:
                raise InputError(f"{where}: format {state['format']}, this version reads {FORMAT}; continue it with the "
                                 "version that config.json names")
            if state["processes"] != self.processes.world:
                raise InputError(f"{where}: written by {state['processes']} processes, not {self.processes.world}; continue "
                                 f"it with --nproc_per_node={state['processes']}")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.epoch, self.step, self.seconds = int(state["epoch"]), int(state["step"]), float(state["seconds"])
            self.history = list(state["history"])
            self.meter.totals.copy_(state["meters"][self.processes.rank])
            self._write_metrics()  # without the lines of epochs that were not saved
        except InputError:
            raise
        except Exception as error:  # whatever content of other names, types or shapes leads to
            raise InputError(f"{where}: not a checkpoint of this run ({_brief(error)}); start anew by --save") from error
        self.log(f"{self.path}: continued at step {self.step} of epoch {self.epoch}")

    def _newest(self) -> dict[str, Any] | None:
        """The last whole checkpoint, None where there is none yet. A damaged one is moved away, or the next save would
        put it in the place of the whole one."""
        damage = []
        for path in (self.path / CHECKPOINT, self.path / PREVIOUS):
            try:
                state = load_checkpoint(str(path), sealed=True)
            except InputError as error:
                damage += [str(error)] if path.exists() else []
                continue
            if damage and self.writes:
                os.replace(self.path / CHECKPOINT, self.path / "checkpoint.damaged.pt")
                self.log(f"warning: {damage[0]}; using {path}")
            return state
        if damage:
            raise InputError("; ".join(damage) + "; no whole checkpoint is left, start anew")
        return None


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 as the wish to stop after the step; a second SIGINT ends the process at once."""

    STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}

    def __init__(self):
        self.received = 0
        for number in self.STATUS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        if number == self.received == signal.SIGINT:
            os._exit(130)
        self.received = number


def load_checkpoint(path: str, sealed: bool = False) -> dict[str, Any]:
    """A checkpoint written by Run.save, or unless `sealed` a plain state_dict under "model".

    Raises InputError for anything else, and where a single bit of ours has changed.
    """
    try:
        content = Path(path).read_bytes()
        seal = len(SEAL) + 64
        if content[-seal:-64] == SEAL:
            content, digest = content[:-seal], content[-64:]
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise ValueError("its SHA-256 differs")
        elif sealed:
            raise ValueError("its end is missing")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch.load raises whatever damaged bytes lead to
        raise InputError(f"{path}: damaged or not a checkpoint ({_brief(error)})") from error
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: not a checkpoint: expected a dictionary")
    return state if "model" in state else {"model": state}


def _brief(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__


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
    """`auto` is a GPU where there is one, `cuda` that of the process. Raises InputError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:120]}; use cpu, cuda or auto") from error


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """What autocast lowers to. Raises InputError on a CPU, where PyTorch 2.13's gradient by the weights of a dilated depthwise
    convolution in bfloat16 reads memory that nobody has written (channels-last, 16 channels of 32x32)."""
    if name == "bf16" and device.type == "cpu":
        raise InputError("--amp bf16: PyTorch's bfloat16 gradients of dilated convolutions are wrong on a CPU; leave it out there")
    return torch.bfloat16 if name == "bf16" else None


def seed_everything(seed: int, *position: int) -> None:
    """Seed the generators of every device by `seed`, or by it and a position such as (rank, epoch, step)."""
    if position:
        digest = hashlib.sha256(repr((seed, *position)).encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
    random.seed(seed)
    torch.manual_seed(seed)


def set_deterministic() -> None:
    """Only algorithms that give the same bits on every run; an operation without one raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class Meter:
    """Running mean of the loss, the accuracy and further numbers over all processes, kept on the device until read."""

    def __init__(self, processes: Processes, means: int = 0):
        self.processes = processes
        self.totals = torch.zeros(3 + means, dtype=torch.float64, device=processes.device)  # images, loss, correct, the others

    def update(self, loss: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, means: torch.Tensor | None = None) -> None:
        """loss: mean over y; logits [N, num_classes]; y [N]; means: the further numbers of this batch"""
        correct = (logits.detach().argmax(1) == y).double().mean()
        values = torch.stack([torch.ones_like(correct), loss.detach().double(), correct])
        self.totals += len(y) * (values if means is None else torch.cat([values, means.detach().double()]))

    def read(self) -> tuple[float, ...]:
        """(mean loss, accuracy in percent, mean of each further number)"""
        count, *sums = self.processes.gather(self.totals).sum(0).tolist()
        loss, correct, *means = (total / count for total in sums)
        return loss, 100 * correct, *means


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
def evaluate(net: Callable, criterion: nn.Module, batches, processes: Processes) -> tuple[float, float]:
    """(loss, accuracy in percent) in evaluation mode, over the batches of all processes. net: x -> logits"""
    meter = Meter(processes)
    for x, y in batches:
        logits = net(x)
        meter.update(criterion(logits, y), logits, y)
    return meter.read()


def script(main: Callable[[], None]) -> None:
    """Run a script's main: bad input is one line on standard error and exit status 2, a value not finite is status 3."""
    try:
        main()
    except (InputError, NotFinite) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, InputError) else 3)
    except KeyboardInterrupt:
        sys.exit(130)


MAY_CHANGE = ("data", "device", "graph", "report_freq", "checkpoint_minutes", "workers", "plot", "tensorboard", "resume")  # when a run is continued


class Parser(argparse.ArgumentParser):
    """argparse that complains by InputError. With --resume, arguments that are not given are those of the run.

    kind: `search` or `eval`, what config.json says the run is.
    """

    def __init__(self, kind: str = "", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def error(self, message: str):
        raise InputError(message)

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        args = super().parse_args(argv)
        if not getattr(args, "resume", None):
            return args
        path = Path(args.resume) / "config.json"
        recorded = self._recorded(path)
        try:
            before = super().parse_args(recorded)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        args = super().parse_args([*recorded, *argv])
        for name, value in vars(args).items():
            if value != getattr(before, name) and name not in MAY_CHANGE:
                raise InputError(f"--{name} {value}: {args.resume} was started with {getattr(before, name)}; leave it out, "
                                 f"only {', '.join(MAY_CHANGE[:-1])} may change (the schedules run over --epochs)")
        return args

    def _recorded(self, path: Path) -> list[str]:
        """The arguments in a config.json as they are typed, so that they pass the same checks."""
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: no run to continue ({_brief(error)}); --resume takes a folder runs/<name>") from error
        if not isinstance(config, dict) or config.get("kind") != self.kind:
            raise InputError(f"{path}: not a run of this script; --resume takes one of kind {self.kind!r}")
        argv = []
        for action in self._actions:
            value = config.get(action.dest)
            if not isinstance(value, (bool, int, float, str, type(None))):
                raise InputError(f"{path}: {action.dest} is neither a number nor text")
            if isinstance(value, bool):
                argv += action.option_strings[not value :][:1]  # --x, or --no-x where there is one
            elif value is not None and action.dest != "resume":
                argv.append(f"{action.option_strings[0]}={value}")
        return argv


def minutes(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise ValueError
    return value


def add_run_arguments(add: Callable) -> None:
    """What both scripts take; add: a parser's add_argument."""
    add("--device", default="auto")
    add("--memory_format", choices=MEMORY_FORMATS, default="channels_last", help="of images and weights")
    add("--amp", choices=AMP, default="none", help="bf16: passes under autocast, but for those of a difference")
    add("--deterministic", action="store_true", help="the same bits on every run also on a GPU, at a price in time")
    add("--checkpoint_minutes", type=minutes, default=10.0, help="between two checkpoints inside an epoch; 0: every step")
    add("--resume", metavar="RUN", help="continue the run in this folder; may come with "
                                        + ", ".join(f"--{name}" for name in MAY_CHANGE[:-1]))


# What two runs of one row of a table, or of one band of a plot, may differ in.
_INCIDENTAL = (*MAY_CHANGE, "seed", "save", "device_name", "versions", "commit", "deterministic", "eigenvalue",
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
