"""The run folder: configuration, log, metrics and checkpoints."""
import argparse
import itertools
import json
import os
import secrets
import signal
import sys
import time
import warnings
import zlib
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Sequence

import torch
from torch import Tensor

from ..distributed import Meter, Processes
from ..errors import InputError, NotFinite, brief
from ..locks import locked
from .files import (CHECKPOINT, PREVIOUS, load_newest, read_config, resume_flag, save_checkpoint, script_path,
                    write_atomically, writing)
from .machine import seed_everything

OWN = ("arch", "data", "device", "resume", "workers")  # arguments that may differ from process to process
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}


class Run:
    """The folder runs/<name>/ of one run, locked within `with Run(…) as run:`.

    `with` makes the folder or, with args.resume, continues the run from its last whole checkpoint. Within it
    SIGTERM, SIGINT and SIGUSR1 stop the run after the step; a second SIGINT stops it at once. A checkpoint,
    the arguments and the images determine the rest of the run, because batches and random numbers depend on
    (seed, rank, epoch, step) alone. All processes call each method; only rank 0 writes.

    args: those of the script; parts: objects with a state_dict, by their names in the checkpoint; steps: per
    epoch; sets: the images, each an ImageSet or ImageFolder; facts: for config.json, those of machine_facts
    and more; carried: more for readers of the checkpoint.

    epoch, step: the next ones; meter: of this epoch; history: the lines of metrics.jsonl. With and without
    interruptions only its `seconds` differ.
    """

    def __init__(self, kind: str, args: argparse.Namespace, processes: Processes, parts: dict[str, Any],
                 steps: int, sets: Sequence[Any], facts: dict[str, Any] | None = None,
                 carried: dict[str, Any] | None = None):
        self.kind, self.args, self.processes, self.parts, self.steps = kind, args, processes, parts, steps
        self.facts, self.carried = facts or {}, carried or {}
        self.data = [images.identity() for images in sets]
        self.writes = processes.rank == 0
        self.epoch, self.step, self.history = 0, 0, []
        self.meter = Meter(processes)
        self.unread: list[tuple[str, int, Tensor]] = []  # (quantity, step, whether it was finite)
        self.steps_taken = 0  # by this process
        self.signal_number = 0  # of the last signal to stop, 0 for none
        self.board = None
        # With several nodes a command is typed on each, and each may have its own copy of the images.
        same = {name: value for name, value in vars(args).items() if name not in OWN}
        same |= {"--resume": bool(args.resume), "images": self.data, "kind of device": processes.device.type,
                 **self.carried}
        digests = torch.tensor([zlib.crc32(repr(value).encode()) for value in same.values()])
        differ = (processes.gather(digests) != digests).any(0).tolist()
        if names := [*itertools.compress(same, differ)]:
            raise InputError(f"the processes differ in {', '.join(names)}: give all of them the same")
        started, mark = processes.largest(int(time.time()), secrets.randbelow(16**6))
        name = args.save or f"{kind}-{datetime.fromtimestamp(started):%Y%m%d-%H%M%S}-{mark:06x}"
        self.path = Path(args.resume or Path("runs", name))

    def __enter__(self) -> "Run":
        self.started = self.saved = self.epoch_started = time.perf_counter()
        with ExitStack() as at_end:
            if self.writes:
                self._lock_folder(at_end)
            if self.args.resume:
                self._resume()
                position = [self.epoch, self.step, -self.epoch, -self.step]
                if self.processes.largest(*position) != position:
                    raise InputError(f"{self.path}: the processes found checkpoints of different steps; "
                                     "it must be one folder on a file system that all of them share")
            else:
                config = vars(self.args) | {"kind": self.kind, "processes": self.processes.world} | self.facts
                self.write("config.json", json.dumps(config, indent=1) + "\n")
            if self.facts and self.writes:
                self._log_machine()
            if self.writes and getattr(self.args, "tensorboard", False):
                from torch.utils.tensorboard import SummaryWriter
                # Each of its calls, close() too, may raise an error of its thread.
                at_end.enter_context(writing(self.path / "events.out.tfevents", self.path))
                self.board = at_end.enter_context(SummaryWriter(self.path))
            with suppress(ValueError):  # Python allows handlers in the main thread alone
                for number in EXIT_STATUS:
                    former = signal.signal(number, self._note_signal)
                    at_end.callback(signal.signal, number, former or signal.SIG_DFL)  # None: C code's
            self.at_end = at_end.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.at_end.close()

    def write(self, name: str, text: str) -> None:
        if self.writes:
            write_atomically(self.path / name, text.encode())

    def log(self, *lines: str) -> None:
        """Print the lines and append them, with the time, to log.txt."""
        for line in lines if self.writes else ():
            with writing("standard output", self.path):
                print(line, flush=True)
            path = self.path / "log.txt"
            with (writing(path, self.path),
                  open(path, "a", encoding="utf-8", errors="backslashreplace") as file):
                file.write(f"{datetime.now():%m-%d %H:%M:%S} {line}\n")

    def seed(self) -> None:
        """Seed the generators for the next step, or for what follows the last one of an epoch."""
        seed_everything(self.args.seed, self.processes.rank, self.epoch, self.step)

    def after_step(self, loss: Tensor, logits: Tensor, y: Tensor, clipped: Tensor | None = None,
                   **watched: Tensor | None) -> None:
        """Record a finished step; report, save and stop if it is time.

        loss: of the global batch; logits, y: of this process; clipped: [1], 1 if the gradient was clipped;
        watched: further scalars that have to be finite.
        """
        self.meter.update(loss, logits, y, clipped)
        # They stay on the device, so that the step does not wait for it.
        self.unread += [(f"{name} is not finite at", self.step, value.detach().isfinite())
                        for name, value in {"the loss": loss, **watched}.items() if value is not None]
        reports = self.step % self.args.report_freq == 0 or self.step == self.steps - 1
        if reports or not loss.is_cuda:
            self._require_finite()
        self.step += 1
        self.steps_taken += 1
        if reports:
            mean, accuracy, *_ = self.meter.read()
            seconds = (time.perf_counter() - self.started) / self.steps_taken
            steps_left = (self.args.epochs - self.epoch) * self.steps - self.step
            self.log(f"epoch {self.epoch} step {self.step - 1}/{self.steps}: loss {mean:.4f}, "
                     f"accuracy {accuracy:.2f} %, {seconds:.3g} s/step, "
                     f"{timedelta(seconds=round(seconds * steps_left))} left")
        overdue = self.writes and time.perf_counter() - self.saved >= 60 * self.args.checkpoint_minutes
        signal_number, overdue = self.processes.largest(self.signal_number, int(overdue))
        if overdue or signal_number:
            self.save()
        self._stop(signal_number)

    def end_epoch(self, values: dict[str, Any]) -> None:
        """Write the values as a line of metrics.jsonl, and a checkpoint; go on to the next epoch."""
        for name, value in values.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError as error:
                raise self._not_finite(f"{name} is not finite after", self.step) from error
        self.history.append(values | {"seconds": round(time.perf_counter() - self.epoch_started, 3)})
        self._write_metrics()
        if self.board:
            for name, value in values.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, self.epoch)
            self.board.flush()
        self.epoch, self.step, self.meter = self.epoch + 1, 0, Meter(self.processes)
        self.epoch_started = time.perf_counter()
        self.save()
        self._stop(*self.processes.largest(self.signal_number))

    def save(self) -> None:
        """Write a checkpoint. Raises NotFinite if a weight is not finite."""
        started = time.perf_counter()
        meters = self.processes.gather(self.meter.totals)  # [world, 4]
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.unread += [(f"{name} is not finite before", self.step, value.isfinite().all())
                        for name, value in state["model"].items()]
        self._require_finite()
        if self.writes:
            save_checkpoint(self.path, state | self.carried | {
                "processes": self.processes.world, "epoch": self.epoch, "step": self.step,
                "seconds": started - self.epoch_started, "meters": meters, "history": self.history,
                "data": self.data})
        self.saved = time.perf_counter()

    def _lock_folder(self, at_end: ExitStack) -> None:
        """Lock the folder until the end; make it first unless the run is continued."""
        with writing(self.path / "lock", self.path):
            if not self.args.resume:
                left = {"lock", ".config.json.partial"}  # by a start that was killed, or by a full disk
                if self.path.is_file() or self.path.is_dir() and {*os.listdir(self.path)} - left:
                    is_run = (self.path / "config.json").exists()
                    or_resume = f", or continue it with {resume_flag(self.path)}" if is_run else ""
                    raise InputError(f"{self.path} exists already: give another name with --save{or_resume}")
                self.path.mkdir(parents=True, exist_ok=True)
            at_end.enter_context(locked(self.path / "lock", wait=False))

    def _note_signal(self, number: int, frame) -> None:
        if number == self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def _write_metrics(self) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(values) + "\n" for values in self.history))

    def _require_finite(self) -> None:
        unread, self.unread = self.unread, []
        for (what, step, _), finite in zip(unread, torch.stack([flag for *_, flag in unread]).tolist()):
            if not finite:
                raise self._not_finite(what, step)

    def _not_finite(self, what: str, step: int) -> NotFinite:
        before = "there is no checkpoint before it"
        if (self.path / CHECKPOINT).exists():
            before = f"{self.path / CHECKPOINT} is kept from before it, but --resume repeats the same steps"
        return NotFinite(f"{what} step {step} of epoch {self.epoch}; {before}: start again with another "
                         "--save and a smaller --learning_rate")

    def _stop(self, signal_number: int) -> None:
        if signal_number:
            launcher = "python" if self.processes.world == 1 else "torchrun …"
            command = f"{launcher} {script_path(f'train_{self.kind}.py')} {resume_flag(self.path)}"
            self.log(f"stopped by {signal.Signals(signal_number).name} before step {self.step} of epoch "
                     f"{self.epoch}; continue by: {command}")
            self.processes.largest(0)  # wait: torchrun ends the others when the first one leaves
            sys.exit(EXIT_STATUS[signal_number])

    def _log_machine(self) -> None:
        config = self.facts | read_config(self.path)
        before, now = (of["machine"] | {"commit": of["commit"]} for of in (config, self.facts))
        self.log("machine: " + ", ".join(f"{name} {value}" for name, value in now.items()))
        if self.args.device == "auto" and "graph" in before and "graph" not in now:  # a GPU has it
            raise InputError(f"{self.path}: the run was on {before['device']}, and no GPU is visible here; "
                             "--device cpu continues it on the CPU")
        if changes := [f"{name} {value}, now {now.get(name)}" for name, value in before.items()
                       if value != now.get(name)]:
            self.log(f"warning: the results may not be bit-identical: {'; '.join(changes)}")

    def _resume(self) -> None:
        state, damage = load_newest(self.path)
        if damage and self.writes:  # move the file away, or the next save would make it the previous one
            os.replace(self.path / CHECKPOINT, self.path / "checkpoint.damaged.pt")
            self.log(f"warning: {damage}; using {self.path / PREVIOUS}")
        where = self.path / CHECKPOINT
        try:
            if (world := (state or read_config(self.path))["processes"]) != self.processes.world:
                raise InputError(f"{self.path}: written by {world} processes, not {self.processes.world}; "
                                 f"start {world} of them with torchrun")
            if state is None:
                self.log(f"{self.path}: no checkpoint yet; from the beginning")
                return
            if (data := state["data"]) != self.data:
                raise InputError(f"{where}: the run was started on {described(data)}, --data "
                                 f"{self.args.data} holds {described(self.data)}; give the same images")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            self.history = list(state["history"])
            self.epoch_started -= float(state["seconds"])  # spent in this epoch before the stop
            self.meter.totals.copy_(state["meters"][self.processes.rank])
            self._write_metrics()  # without lines of epochs after the checkpoint
            # This warning is false where the run was stopped between the last step of an epoch and its end.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        except InputError:
            raise
        except Exception as error:  # other names, types or shapes raise many kinds
            raise InputError(f"{where}: not a checkpoint of this run ({brief(error)}); "
                             "start again with another --save") from error
        self.log(f"{self.path}: continued at step {self.step} of epoch {self.epoch}")


def described(data: list[dict[str, int | str]]) -> str:
    """The identities of data sets in words."""
    return " and ".join(f"{part['images']:,} images of {part['classes']} classes "
                        f"(digest {part['digest'][:8]})" for part in data)
