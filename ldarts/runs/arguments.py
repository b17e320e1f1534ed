"""What the command lines have in common: bad input is one line, a resumed run keeps its arguments."""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from ..errors import InputError, NotFinite, brief
from .limits import out_of_memory
from .machine import AMP, MEMORY_FORMATS

MAY_CHANGE = ("data", "device", "graph", "report_freq", "checkpoint_minutes", "workers", "plot",
              "tensorboard", "resume")  # when a run is continued
OF_IMAGES = ("dataset", "data", "seed", "batch_size")


def script(main: Callable[[], None], less_memory: str = "smaller batches") -> None:
    """Run a script's main: bad input is one line on standard error and status 2, a value not finite is 3.

    less_memory: what to use where memory is wanting, which is status 2 as well. What the terminal's encoding
    lacks, as ASCII lacks Λ, is printed by its number.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        except (RuntimeError, MemoryError) as error:
            if reason := out_of_memory(error):
                raise InputError(f"out of memory ({reason}); use {less_memory}") from error
            raise
    except (InputError, NotFinite) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"error{rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, InputError) else 3)
    except KeyboardInterrupt:
        sys.exit(130)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a run. Raises InputError where there is none."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no configuration of a run ({brief(error)}); "
                         "a run is a folder runs/<name>") from error
    if not isinstance(config, dict) or "kind" not in config:
        raise InputError(f"{path}: no configuration of a run: expected an object with a kind")
    return config


class Parser(argparse.ArgumentParser):
    """argparse that complains by InputError. With --resume, what is not given is as in the run; with
    --evaluate, OF_IMAGES are.

    kind: `search` or `eval`, what config.json says the run is.
    """

    def __init__(self, kind: str = "", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def add_argument(self, *names, **options):
        if "choices" in options:
            options.setdefault("type", any_case(options["choices"]))
        return super().add_argument(*names, **options)

    def error(self, message: str):
        raise InputError(message)

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        args = super().parse_args(argv)
        if getattr(args, "evaluate", None):
            try:
                recorded = self._recorded(Path(args.evaluate).parent, OF_IMAGES)
            except InputError:  # weights that do not lie in a run's folder
                return args
            return super().parse_args([*recorded, *argv])
        if not getattr(args, "resume", None):
            return args
        path = Path(args.resume) / "config.json"
        recorded = self._recorded(args.resume)
        try:
            before = super().parse_args(recorded)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        args = super().parse_args([*recorded, *argv])
        for name, value in vars(args).items():
            if name not in MAY_CHANGE and value != (was := getattr(before, name)):
                raise InputError(f"--{name} {value}: {args.resume} was started with {was}; leave it out, "
                                 f"only {', '.join(MAY_CHANGE[:-1])} may change "
                                 "(the schedules run over --epochs)")
        return args

    def _recorded(self, folder: str | Path, names: Sequence[str] | None = None) -> list[str]:
        """The arguments of a run, or those of `names`, as they are typed: they pass the same checks."""
        config, argv = read_config(folder), []
        if config.get("kind") != self.kind:
            raise InputError(f"{folder}: not a run of this script; --resume takes one of kind {self.kind!r}")
        for action in self._actions:
            value = config.get(action.dest) if names is None or action.dest in names else None
            if not isinstance(value, (bool, int, float, str, type(None))):
                raise InputError(f"{folder}/config.json: {action.dest} is neither a number nor text")
            if isinstance(value, bool):
                argv += action.option_strings[not value :][:1]  # --x, or --no-x where there is one
            elif value is not None and action.dest != "resume":
                argv.append(f"{action.option_strings[0]}={value}")
        return argv


def any_case(names: Iterable[str]) -> Callable[[str], str]:
    """text -> the one of the names that it is but for capitals; other text is left to those who list them."""
    return lambda text: next((name for name in names if name.lower() == text.lower()), text)


def minutes(text: str) -> float:
    if not (value := float(text)) >= 0:
        raise ValueError
    return value


def add_run_arguments(add: Callable) -> None:
    """What both scripts take; add: a parser's add_argument."""
    add("--device", type=str.lower, default="auto")
    add("--memory_format", choices=MEMORY_FORMATS, default="channels_last", help="of images and weights")
    add("--amp", choices=AMP, default="none",
        help="bf16: passes under autocast, but for those of a difference")
    add("--deterministic", action="store_true", help="the same bits on every run also on a GPU, "
                                                     "at a price in time")
    add("--checkpoint_minutes", type=minutes, default=10.0,
        help="between two checkpoints inside an epoch; 0: every step")
    add("--resume", metavar="RUN", help="continue the run in this folder; may come with "
                                        + ", ".join(f"--{name}" for name in MAY_CHANGE[:-1]))
