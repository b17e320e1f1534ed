"""The flags of train_search.py and train_eval.py as tables: DARTS's names, the published defaults."""
import argparse
import contextlib
import math
import os
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any, Callable, Iterable

from .. import genotypes
from ..alignment import KINDS
from ..architect import METHODS
from ..data import DATASETS
from ..errors import InputError, require
from ..spaces import SPACES
from .derived import checkpoint_file, read_trained, usual_size
from .files import read_config, resume_flag, script_path, search_of, unfinished
from .machine import AMP, MEMORY_FORMATS, pick_device


def checked(convert: Callable, expected: str, holds: Callable[[Any], bool]) -> Callable:
    """A type for argparse: text -> converted value, or a message that says what is expected."""
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if holds(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return parse


def one_of(names: Iterable[str]) -> Callable:
    """A type for argparse: one of these names, in upper or lower case."""
    by_lower_case = {name.lower(): name for name in names}
    return checked(lambda text: by_lower_case.get(text.lower()), f"one of {', '.join(names)}", bool)


def cell_name(name: str) -> str:
    """--arch: a path that exists, as an absolute one."""
    name = os.path.expanduser(name)  # in --arch=~/x the shell does not
    return os.path.abspath(name) if os.path.exists(name) and name not in genotypes.PUBLISHED else name


COUNT = checked(int, "a whole number from 1", lambda value: value >= 1)
COUNT_OR_0 = checked(int, "a whole number from 0", lambda value: value >= 0)
EVEN = checked(int, "an even number from 2", lambda value: value >= 2 and value % 2 == 0)
SEED = checked(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
POSITIVE = checked(float, "a number above 0", lambda value: 0 < value < math.inf)
NUMBER = checked(float, "a number from 0", lambda value: 0 <= value < math.inf)
SHARE = checked(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_1 = checked(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
INSIDE_1 = checked(float, "a number above 0 and below 1", lambda value: 0 < value < 1)
SWITCH = BooleanOptionalAction

# Each row: a flag, its default, its type or action, its meaning. A dictionary has the defaults by the search
# space or else the data set.
BOTH = [
    ("--data", "data", str, "folder of the data set, or its archive; CIFAR and SVHN: downloaded if missing"),
    ("--save", None, str, "name of the run (default: search- or eval-, the time, random digits)"),
    ("--resume", None, str, "continue the run in this folder with its arguments; may change: "),
    ("--seed", 0, SEED, "of all random numbers"),
    ("--momentum", 0.9, NUMBER, "of SGD"),
    ("--grad_clip", 5.0, POSITIVE, "largest norm of the weights' gradient"),
    ("--cutout_length", 16, EVEN, "pixels a side of the square that cutout removes"),
    ("--report_freq", 50, COUNT, "steps between two lines of the log"),
    ("--checkpoint_minutes", 10.0, NUMBER, "between two checkpoints within an epoch; 0: after every step"),
    ("--device", "auto", str.lower, "auto, cpu, cuda or cuda:N; auto is a GPU if there is one"),
    ("--memory_format", "channels_last", one_of(MEMORY_FORMATS), ", ".join(MEMORY_FORMATS)),
    ("--amp", "none", one_of(AMP), "none, bf16: autocast on a GPU, in a search not for a difference"),
    ("--deterministic", False, SWITCH, "bit-identical runs on a GPU too; slower"),
]
SEARCH = [
    ("--demo", False, SWITCH, "a search of minutes on generated images; prints the flags that it stands for"),
    ("--dataset", "cifar10", one_of(DATASETS), f"{', '.join(DATASETS)}; synthetic is generated"),
    ("--image_size", None, COUNT, "pixels a side, a divisor of the data set's (default: the data set's)"),
    ("--search_space", "darts", one_of(SPACES), f"{', '.join(SPACES)}; s5 is darts"),
    ("--batch_size", dict(usual=64, nasbench201=64, svhn=96), COUNT, "images of a step, of all processes"),
    ("--epochs", dict(usual=50, nasbench201=100), COUNT, "over which the schedules run"),
    ("--init_channels", 16, COUNT, "channels of the first cell"),
    ("--layers", dict(usual=8, nasbench201=5), COUNT, "cells; in nasbench201 cells per stage"),
    ("--train_portion", 0.5, INSIDE_1, "share of the training set for w; the rest is for α"),
    ("--learning_rate", 0.025, POSITIVE, "of SGD on w at the start; falls along a cosine"),
    ("--learning_rate_min", 0.001, NUMBER, "of SGD on w at the end"),
    ("--weight_decay", 3e-4, NUMBER, "of SGD on w"),
    ("--cutout", False, SWITCH, "cutout, with a probability that grows to --cutout_prob"),
    ("--cutout_prob", 1.0, SHARE, "probability of cutout in the last epoch"),
    ("--unrolled", False, SWITCH, "second-order gradients of α"),
    ("--hessian", "central", one_of(("central", "exact")), "Hessian product: central (published), exact"),
    ("--arch_learning_rate", dict(usual=3e-4, nasbench201=1e-4), POSITIVE, "of Adam on α"),
    ("--arch_weight_decay", 1e-3, NUMBER, "of Adam on α"),
    ("--arch_epsilon", 1e-8, POSITIVE, "of Adam on α; with 0.1 a step depends on the gradient's length too"),
    ("--lambda_reg", dict(usual=0.125, nasbench201=0.25, svhn=0.25), NUMBER, "λ of the last epoch; 0: DARTS"),
    ("--lambda_kind", "cosine", one_of(KINDS), f"{', '.join(KINDS)}; cosine is Λ, sign is Λ±"),
    ("--lambda_grad", "central", one_of(METHODS), "∇Λ: central (published, two more passes), exact (double "
     "backward; in small searches its cells were the worst, see tests/evidence), random (a control: a random "
     "direction as long as that of central)"),
    ("--epsilon", dict(usual=1e-4, nasbench201=1e-4, svhn=1e-3), POSITIVE, "ε₀ of central"),
    ("--probe_batches", None, COUNT, "fresh batches of each half for the logged Λ (default: the last one)"),
    ("--eigenvalue", False, SWITCH, "log the dominant eigenvalue of ∂²L_valid/∂α² every epoch"),
    ("--plot", False, SWITCH, "draw the cells, α and the curves every epoch (needs matplotlib)"),
    ("--tensorboard", False, SWITCH, "write TensorBoard's event files (needs tensorboard)"),
    ("--graph", None, SWITCH, "a step as one CUDA graph (default: on a GPU; s4, random, torchrun: off)"),
    *BOTH,
]
EVAL_SETS = (*DATASETS, "imagenet")
EVAL = [
    ("--arch", None, cell_name, "a published cell (default LAMBDA_DARTS), a search's run, a file, a text"),
    ("--evaluate", None, checkpoint_file, "only test: a run, or the weights in a file"),
    ("--dataset", "cifar10", one_of(EVAL_SETS), ", ".join(EVAL_SETS)),
    ("--batch_size", dict(usual=96, imagenet=1024), COUNT, "images of a step, of all processes"),
    ("--epochs", dict(usual=600, imagenet=250), COUNT, "over which the schedules run"),
    ("--init_channels", None, COUNT, "channels of the first cell (default as published: 36, imagenet 48)"),
    ("--layers", None, COUNT, "cells (default as published: 20, imagenet 14), in nasbench201 per stage"),
    ("--learning_rate", dict(usual=0.025, imagenet=0.5), POSITIVE, "at the start; falls to 0 at the end"),
    ("--weight_decay", dict(usual=3e-4, imagenet=3e-5), NUMBER, "of SGD"),
    ("--warmup_epochs", 5, COUNT_OR_0, "epochs in which imagenet's rate grows, for batches above 256"),
    ("--auxiliary", None, SWITCH, "auxiliary tower (default: on, in nasbench201 off)"),
    ("--auxiliary_weight", 0.4, NUMBER, "of the auxiliary tower's loss"),
    ("--cutout", dict(usual=True, imagenet=False), SWITCH, "cutout"),
    ("--drop_path_prob", dict(usual=0.2, imagenet=0.0), BELOW_1, "probability to drop a path at the end"),
    ("--label_smoothing", dict(usual=0.0, imagenet=0.1), BELOW_1, "of the training loss"),
    ("--workers", 4, COUNT_OR_0, "processes that read imagenet"),
    ("--compile", False, SWITCH, "torch.compile the network"),
    *BOTH,
]
DEMO = ("--dataset synthetic --search_space nasbench201 --init_channels 4 --layers 1 --batch_size 32 "
        "--epochs 3 --lambda_grad exact --lambda_reg 0.02 --arch_learning_rate 0.01 --arch_epsilon 0.1")
MAY_CHANGE = ("data", "device", "graph", "report_freq", "checkpoint_minutes", "workers", "plot",
              "tensorboard")  # with --resume
FROM_RUN = ("dataset", "data", "seed", "batch_size", "init_channels", "layers")  # with --evaluate


class Parser(argparse.ArgumentParser):
    """argparse that raises InputError."""

    def error(self, message: str):
        raise InputError(message.removeprefix("argument "))


def recorded(folder: str | Path, kind: str, names: Iterable[str], parser: Parser) -> dict[str, Any]:
    """Those of the named arguments that a run of a kind was started with, from its config.json."""
    config = read_config(folder)
    if config["kind"] != kind:
        raise InputError(f"{folder}: not a run of this script; --resume takes one of kind {kind!r}")
    flags = [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
             for name in names if (value := config.get(name)) is not None]
    try:
        return vars(parser.parse_args(flags))
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from error


def parse_flags(kind: str, table: list[tuple], description: str) -> Namespace:
    """The arguments of the script of a kind, `search` or `eval`: those typed and, with --resume and
    --evaluate, those of the run."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    defaults = {flag[2:]: default for flag, default, *_ in table}
    changeable = ", ".join(name for name in MAY_CHANGE if name in defaults)
    for flag, default, of_type, meaning in table:
        meaning += changeable if flag == "--resume" else ""
        shown = default
        if isinstance(default, dict):
            shown = ", ".join(f"{name} {value}" for name, value in default.items()).removeprefix("usual ")
        if default is not None and default is not False and "(default" not in meaning:
            meaning += f" (default {shown})"
        parser.add_argument(flag, help=meaning, **{"action" if of_type is SWITCH else "type": of_type})
    typed, of_run = vars(parser.parse_args()), {}
    if typed.get("demo") and "resume" not in typed:
        if os.environ.get("RANK", "0") == "0":
            print(f"--demo stands for: {DEMO}", flush=True)
        typed = vars(parser.parse_args(DEMO.split())) | typed
    if "evaluate" in typed:
        with contextlib.suppress(InputError):  # weights that lie in no run's folder
            of_run = recorded(Path(typed["evaluate"]).parent, kind, FROM_RUN, parser)
    if "resume" in typed:
        of_run = recorded(typed["resume"], kind, defaults, parser)
        for name, value in typed.items():
            was = (defaults | of_run)[name]
            if name not in (*MAY_CHANGE, "resume", "demo") and value != was:
                raise InputError(f"--{name} {value}: {typed['resume']} was started with {was}; leave it out, "
                                 f"only {changeable} may change (the schedules run over --epochs)")
    args = Namespace(**defaults | of_run | typed)
    args.data = os.path.abspath(os.path.expanduser(args.data))  # the same from every folder
    keys = getattr(args, "search_space", None), args.dataset, "usual"
    for name, value in vars(args).items():
        if isinstance(value, dict):
            setattr(args, name, next(value[key] for key in keys if key in value))
    return args


def parse_search_args() -> Namespace:
    args = parse_flags("search", SEARCH, "Search for a cell with Λ-DARTS.")
    del args.demo
    for name, module in (("plot", "matplotlib"), ("tensorboard", "tensorboard")):
        if getattr(args, name):
            require(module, f"--{name}")
    if args.search_space == "nasbench201" and args.unrolled:
        raise InputError("--unrolled: nasbench201 is searched by first order, as published; leave it out")
    if args.hessian == "exact" and not args.unrolled:
        raise InputError("--hessian exact: the first order has no Hessian product; add --unrolled")
    return args


def uses_graph(args: Namespace) -> bool:
    """Whether a step is a CUDA graph: as --graph says, or else if nothing prevents it. Raises InputError for
    a --graph that is impossible."""
    hindrance = ""
    if pick_device(args.device).type != "cuda":
        hindrance = "needs a GPU"
    elif args.search_space == "s4":
        hindrance = "in s4 all passes of a difference draw the same noise, which a graph cannot do"
    elif args.lambda_grad == "random" and args.lambda_reg:
        hindrance = "--lambda_grad random draws a direction in every step, and a resumed run draws the same"
    if args.graph and hindrance:
        raise InputError(f"--graph: {hindrance}; use --no-graph")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return not (hindrance or several) if args.graph is None else args.graph


def parse_eval_args() -> tuple[Namespace, genotypes.Genotype | str, list[str]]:
    """(arguments, genotype, remarks for the log)"""
    args = parse_flags("eval", EVAL, "Train a derived network from scratch and test it.")
    remarks = []
    if args.evaluate:
        _, genotype = read_trained(args.evaluate, args.arch)
    else:
        args.arch = args.arch or "LAMBDA_DARTS"
        # A run's folder holds its genotype, unless the run was stopped before it was written.
        of_run = Path(args.resume or "", "genotype.json")
        genotype = genotypes.load(str(of_run) if args.resume and of_run.exists() else args.arch)
    search = search_of(args.arch) if args.arch else None
    if search and not (args.resume or args.evaluate) and (so_far := unfinished(search)):
        remarks.append(f"warning: {search} is an unfinished search, {so_far}: this is its cell so far; to "
                       f"continue it: python {script_path('train_search.py')} {resume_flag(search)}")
    space = read_config(search).get("search_space") if search else None
    *sizes, why = usual_size(space, genotype, args.dataset)
    if missing := {name: size for name, size in zip(("init_channels", "layers"), sizes)
                   if getattr(args, name) is None}:
        vars(args).update(missing)
        remarks.append(" ".join(f"--{name} {size}" for name, size in missing.items()) + f": {why}")
    in_201 = isinstance(genotype, str)
    if in_201 and args.dataset == "imagenet":
        raise InputError("--dataset imagenet: a network of nasbench201 takes 32x32 images; use a DARTS cell")
    if in_201 and args.auxiliary:
        raise InputError("--auxiliary: the networks of nasbench201 have no auxiliary tower; leave it out")
    # A test does not use the tower.
    args.auxiliary = not args.evaluate and (not in_201 if args.auxiliary is None else args.auxiliary)
    return args, genotype, remarks
