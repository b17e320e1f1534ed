"""Timings of ldarts on this machine. LDARTS_FUSED=off in the environment times the plain form.

    python -m ldarts.bench mixed_sum    # the weighted sum: fused, reference, compiled reference
    python -m ldarts.bench step [--search_space darts --batch_size 16 --unrolled --lambda_grad exact]
    python -m ldarts.bench step --compare    # in turn with plain PyTorch in both memory layouts
    python -m ldarts.bench eval [--arch LAMBDA_DARTS --compile]    # likewise a step of a derived network
    python -m ldarts.bench eval --variant channels-last    # one of the three alone, with its peak memory
"""
import argparse
import resource
import statistics
import sys
from functools import partial
from itertools import product
from typing import Any, Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.benchmark import timer

from . import Architect, Network, SearchNetwork, genotypes
from .architect import search_step, weight_step
from .capture import Captured
from .errors import progress
from .fused import run_plainly
from .fused.sums import compiled_for, mixed_sum, mixed_sum_ref
from .runs import (AMP, MEMORY_FORMATS, Parser, amp_dtype, check_images, device_name, one_of, pick_device,
                   script, uses_graph)
from .runs.arguments import COUNT, COUNT_OR_0

STAGES = {"1": (64, 16, 32, 32), "2": (64, 32, 16, 16), "3": (64, 64, 8, 8)}  # shapes of terms
# Ways to compute a step, and their memory format: two of plain PyTorch, and ours, in that of --memory_format.
VARIANTS = {"default layout": "contiguous", "channels-last": "channels_last", "ours": ""}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sums = commands.add_parser("mixed_sum", help="the weighted sum: fused, reference, compiled reference")
    sums.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    sums.add_argument("--terms", nargs="+", type=COUNT, default=[7, 14, 35])
    sums.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    sums.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    step = commands.add_parser("step", help="a search step: seconds, peak memory, the costliest operations")
    step.add_argument("--search_space", default="darts")
    step.add_argument("--layers", type=COUNT, help="default 8, in nasbench201 5 a stage")
    step.add_argument("--unrolled", action="store_true")
    step.add_argument("--lambda_grad", type=one_of(("none", "central", "exact")), default="central")
    step.add_argument("--compare", dest="variant", action="store_const", const=None, default="ours",
                      help="in turn with plain PyTorch in both layouts, without a graph")
    step.add_argument("--graph", action=argparse.BooleanOptionalAction, help="default: on a GPU, in s4 off")
    train = commands.add_parser("eval", help="a training step of a derived network")
    train.add_argument("--arch", default="LAMBDA_DARTS")
    train.add_argument("--layers", type=COUNT, default=20)
    train.add_argument("--compile", action="store_true", help="in comparisons for ours only")
    for command, batch_size, channels, variant in ((step, 16, 16, "ours"), (train, 96, 36, None)):
        command.add_argument("--batch_size", type=COUNT, default=batch_size)
        command.add_argument("--init_channels", type=COUNT, default=channels)
        command.add_argument("--memory_format", type=one_of(MEMORY_FORMATS), default="channels_last")
        command.add_argument("--amp", type=one_of(AMP), default="none", help="in comparisons for ours only")
        command.add_argument("--variant", type=one_of(VARIANTS), default=variant, help=", ".join(VARIANTS))
        command.add_argument("--steps", type=COUNT, default=3, help="timed steps, after a first one")
        command.add_argument("--profile", type=COUNT_OR_0, default=10, help="operations to list, 0: none")
    for command in (sums, step, train):
        command.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.command != "mixed_sum":
        args.graph = args.command == "step" and args.variant is not None and uses_graph(args)
    args.device = pick_device(args.device)
    return args


def report(args: argparse.Namespace, rows: Iterable[dict[str, Any]], **facts: Any) -> None:
    """Print the arguments, the machine and `facts` in a line, then the table, row by row."""
    facts = {**vars(args), "device": device_name(args.device), "torch": torch.__version__,
             "threads": torch.get_num_threads(), "fused": compiled_for(args.device.type), **facts}

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print(", ".join(f"{fact} {shown(value)}" for fact, value in facts.items() if value is not None))
    for number, row in enumerate(rows):
        if number == 0:
            print(" | ".join(row))
        print(" | ".join(map(shown, row.values())), flush=True)


def in_turn(functions: dict[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, float]:
    """The median seconds of each function's calls. They take turns; the first round is not counted.

    calls: in a turn, without waiting for the device in between: one short call is mostly its launch.
    """
    times = {name: [] for name in functions}
    for _ in progress(range(rounds + 1), f"{', '.join(functions)}: round"):
        for name, function in functions.items():
            started = timer()  # waits for the device
            for _ in range(calls):
                function()
            times[name].append((timer() - started) / calls)
    return {name: statistics.median(own_times[1:]) for name, own_times in times.items()}


def peak_mib(device: torch.device) -> float:
    """The highest memory so far: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def time_sums(args: argparse.Namespace, stage: str, count: int, layout: str, dtype: str,
              phase: str) -> dict[str, Any]:
    """GBps: the rate of the fused sum by the bytes that must move, M reads and 1 write forward, M + 1 reads
    and M writes backward. of_copy: as a share of the rate of a plain copy. speedup, to_compiled: the time of
    the reference, and of the compiled reference, divided by that of the fused sum."""
    grad = torch.randn(STAGES[stage], device=args.device, dtype=getattr(torch, dtype))
    grad = grad.contiguous(memory_format=MEMORY_FORMATS[layout])
    terms = [torch.randn_like(grad, requires_grad=True) for _ in range(count)]
    weights = torch.rand(count, device=args.device, requires_grad=True)
    flat = torch.cat([t.detach().flatten() for t in terms])
    backward = phase != "forward"

    def run(function):
        with torch.set_grad_enabled(backward):
            y = function(weights, terms)
        if backward:
            torch.autograd.grad(y, [weights, *terms], grad)

    functions = {"copy": partial(torch.empty_like(flat).copy_, flat), "fused": partial(run, mixed_sum),
                 "reference": partial(run, mixed_sum_ref)}
    if not args.no_compile:
        torch.compiler.reset()
        functions["compiled"] = partial(run, torch.compile(mixed_sum_ref))
    seconds = in_turn(functions, 15, calls=20 if args.device.type == "cuda" else 1)
    size = grad.numel() * grad.element_size()
    rate = (3 * count + 2 if backward else count + 1) * size / seconds["fused"]
    row = {"stage": stage, "terms": count, "layout": layout, "dtype": dtype, "phase": phase,
           **{f"{name}_ms": 1e3 * own for name, own in seconds.items()}, "GBps": rate / 1e9,
           "of_copy": rate / (2 * count * size / seconds["copy"])}
    slower = {"speedup": "reference", "to_compiled": "compiled"}
    return row | {key: seconds[name] / seconds["fused"] for key, name in slower.items() if name in seconds}


def search_steps(net: nn.Module, args: argparse.Namespace) -> tuple[list[Optimizer], dict[str, Callable]]:
    """The step of a search, and its step of w alone."""
    sgd = SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4, fused=True)
    arch = Architect(net, F.cross_entropy, amp=amp_dtype(args.amp, args.device))
    options = dict(lambda_t=0.125, kind="cosine", epsilon=1e-4, grad_clip=5.0,
                   method=None if args.lambda_grad == "none" else args.lambda_grad)

    def step(*batch):
        return search_step(arch, sgd, batch, batch, unrolled=args.unrolled,
                           alpha_first=args.search_space != "nasbench201", **options)

    return [sgd, arch.optimizer], {"step": step,
                                   "weight_step": lambda *batch: weight_step(arch, sgd, batch, **options)}


def training_steps(net: nn.Module, args: argparse.Namespace) -> tuple[list[Optimizer], dict[str, Callable]]:
    """The step of train_eval.py, with auxiliary tower and drop path."""
    sgd = SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
    amp = amp_dtype(args.amp, args.device)
    run, drop_path_prob = net, 0.2
    if args.compile:
        run, drop_path_prob = torch.compile(net), torch.tensor(0.2, device=args.device)

    def step(x, y):
        with torch.autocast(args.device.type, amp, enabled=amp is not None):
            logits, auxiliary = run(x, drop_path_prob)
        sgd.zero_grad()
        (F.cross_entropy(logits.float(), y) + 0.4 * F.cross_entropy(auxiliary.float(), y)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        sgd.step()

    return [sgd], {"step": step}


def steps_of(args: argparse.Namespace, variant: str) -> tuple[nn.Module, list[Optimizer], dict[str, partial]]:
    """A network, its optimizers, and its steps on random images."""
    in_search = args.command == "step"
    check_images(32, 32, args.batch_size, auxiliary=not in_search)
    torch.manual_seed(0)
    if in_search:
        layers = args.layers or (5 if args.search_space == "nasbench201" else 8)
        net = SearchNetwork(args.init_channels, 10, layers, args.search_space)
    else:
        net = Network(args.init_channels, 10, args.layers, True, genotypes.load(args.arch))
    if variant != "ours":
        net.engine.runner = lambda x: run_plainly
    layout = MEMORY_FORMATS[VARIANTS[variant] or args.memory_format]
    net.to(args.device, memory_format=layout)
    x = torch.randn(args.batch_size, 3, 32, 32, device=args.device).contiguous(memory_format=layout)
    y = torch.randint(10, (args.batch_size,), device=args.device)
    optimizers, functions = (search_steps if in_search else training_steps)(net, args)
    return net, optimizers, {name: partial(function, x, y) for name, function in functions.items()}


def compare(args: argparse.Namespace, variants: Iterable[str]) -> dict[str, float]:
    """The seconds of a step of each variant, in turn. --amp and --compile are for ours alone."""
    plain = argparse.Namespace(**vars(args) | {"amp": "none", "compile": False})
    steps = {variant: steps_of(args if variant == "ours" else plain, variant)[2] for variant in variants}
    return in_turn({variant: of_variant["step"] for variant, of_variant in steps.items()}, args.steps)


def bench_step(args: argparse.Namespace) -> None:
    """The variants in turn, or one alone with its memory and the profile of a step without a graph."""
    if args.variant is None:
        seconds = compare(args, VARIANTS)
        return report(args, ({"variant": variant, "seconds": own, "times_ours": own / seconds["ours"]}
                             for variant, own in seconds.items()))
    net, optimizers, steps = steps_of(args, args.variant)
    facts = {} if args.variant == "ours" else {"memory_format": VARIANTS[args.variant], "fused": False}
    for name, step in steps.items():
        timed = partial(Captured(step.func, net, optimizers), *step.args) if args.graph else step
        facts[f"seconds_per_{name}"] = in_turn({name: timed}, args.steps)[name]
        facts.setdefault("peak_mib", peak_mib(args.device))  # of the whole step
    costliest = []
    if args.profile:
        with torch.profiler.profile() as profiler:
            steps["step"]()
        cost = f"self_{'device' if args.device.type == 'cuda' else 'cpu'}_time_total"  # microseconds
        costliest = sorted(profiler.key_averages(), key=lambda event: -getattr(event, cost))[: args.profile]
    report(args, ({"ms": getattr(event, cost) / 1e3, "calls": event.count, "name": event.key}
                  for event in costliest), **facts)


def main() -> None:
    args = parse_args()
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.command != "mixed_sum":
        return bench_step(args)
    if not compiled_for(args.device.type):
        sys.exit("the fused sum is not compiled here")
    cases = product(args.stages, args.terms, MEMORY_FORMATS, args.dtypes, ("forward", "forward+backward"))
    report(args, (time_sums(args, *case) for case in cases))


if __name__ == "__main__":
    script(main)
