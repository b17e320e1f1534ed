"""Timings of ldarts on this machine.

    python -m ldarts.bench mixed_sum [--json]   # fused, reference, compiled reference, against a plain copy
    python -m ldarts.bench step [--search_space darts --batch_size 16 --unrolled --lambda_grad exact --json]
    python -m ldarts.bench work [--lambda_grad exact --json]   # a step's launches and bytes on a GPU, counted
    python -m ldarts.bench eval [--arch LAMBDA_DARTS --amp bf16 --compile --json]   # against the plain form
"""
import argparse
import json
import operator
import resource
import statistics
import sys
from functools import partial
from itertools import product
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import timer

from .architect import METHODS, search_step, weight_step
from .fused.mixed_sum import compiled_for, mixed_sum, mixed_sum_ref
from .runs import AMP, MEMORY_FORMATS, Parser, amp_dtype, device_name, pick_device, script

STAGES = {"1": (64, 16, 32, 32), "2": (64, 32, 16, 16), "3": (64, 64, 8, 8)}
KINDS = {  # of operations, by what their names contain
    "separable convolutions": ("separable_", "SeparableConvolutions", "depthwise"),
    "other convolutions": ("conv", "gemm", "addmm", "::mm"),
    "batch norm": ("batch_norm", "statistics_kernel", "norm_statistics", "norm_gradients", "lerp"),
    "sums of nodes": ("mixed_", "node_sum", "channel_sums", "affine_sums", "sum_slabs", "term_gradients",
                      "gradients_kernel", "NormalisedTerms", "NodeSum", "sum_kernel"),
    "pools": ("pool",), "ReLU": ("relu", "clamp_min", "threshold"), "optimizers": ("foreach", "SGD", "Adam"),
    "copies and zeros": ("copy", "cat", "fill", "zero", "empty", "clone", "Memcpy", "Memset"),
    "other additions": ("add",),
}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sums = commands.add_parser("mixed_sum", help="the fused sum, its reference and the compiled reference")
    sums.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    sums.add_argument("--terms", nargs="+", type=int, default=[7, 14, 35])
    sums.add_argument("--layouts", nargs="+", choices=MEMORY_FORMATS, default=list(MEMORY_FORMATS))
    sums.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    sums.add_argument("--no-compile", action="store_true", help="no torch.compile: minutes on a CPU")
    step = commands.add_parser("step", help="a search step: seconds, peak memory, the costliest operations")
    step.add_argument("--graph", action=argparse.BooleanOptionalAction, help="default: on a GPU, but for s4")
    step.add_argument("--profile", type=int, default=10, metavar="N", help="list the N costliest; 0: none")
    train = commands.add_parser("eval", help="a derived network: images a second, against its plain form")
    train.add_argument("--arch", default="LAMBDA_DARTS")
    train.add_argument("--layers", type=int, default=20)
    train.add_argument("--compile", action="store_true")
    work = commands.add_parser("work", help="kernel launches and bytes of a search step on a GPU, counted on "
                               "shapes; LDARTS_FUSED=off in the environment: those of the plain form")
    work.add_argument("--hessian", choices=("central", "exact"), default="central")
    for command in (step, work):
        command.add_argument("--search_space", default="darts")
        command.add_argument("--layers", type=int, help="default 8, in nasbench201 5 a stage")
        command.add_argument("--unrolled", action=argparse.BooleanOptionalAction, default=command is work)
        command.add_argument("--lambda_grad", choices=("none", *METHODS), default="central")
    for command, batch_size, channels in ((step, 16, 16), (work, 64, 16), (train, 96, 36)):
        command.add_argument("--batch_size", type=int, default=batch_size)
        command.add_argument("--init_channels", type=int, default=channels)
    for command in (step, train):
        command.add_argument("--steps", type=int, default=3, help="timed after one that warms up")
        command.add_argument("--amp", choices=AMP, default="none")
    for command in (sums, step, train):
        command.add_argument("--device", default="auto")
    for command in (sums, step, work, train):
        command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    if args.command == "work":
        return bench_work(args)
    args.device = pick_device(args.device)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    {"mixed_sum": bench_mixed_sum, "step": bench_step, "eval": bench_eval}[args.command](args)


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median, after one call that warms up."""
    return statistics.median(interleaved([function], repeats)[0])


def interleaved(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each function's calls, one call of each in turn, after one round that warms up."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, of_function in zip(functions, times):
            started = timer()  # when the device has done what was asked of it before
            function()
            of_function.append(timer() - started)
    return [of_function[1:] for of_function in times]


def peak_mib(device: torch.device) -> float:
    """Highest memory so far: the allocator's on a GPU, resident of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def random_batch(count: int, device: torch.device, layout=torch.channels_last) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, 32, 32, device=device).contiguous(memory_format=layout)
    return x, torch.randint(10, (count,), device=device)


def bench_mixed_sum(args: argparse.Namespace) -> None:
    if not compiled_for(args.device.type):
        sys.exit("the fused sum is not compiled here")
    rows = []
    for case in product(args.stages, args.terms, args.layouts, args.dtypes):
        for row in time_sums(*case, args.device, not args.no_compile):
            rows.append(row)
            if args.json:
                continue
            if len(rows) == 1:
                print(" | ".join(row))
            cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()]
            print(" | ".join(cells), flush=True)
    if args.json:
        print(json.dumps({"device": device_name(args.device), "torch": torch.__version__, "rows": rows}))


def time_sums(stage: str, count: int, layout: str, dtype: str, device: torch.device,
              compiles: bool) -> Iterator[dict[str, Any]]:
    """A row for the forward pass, one with the backward. MB: those that must move, forward M reads, 1 write,
    backward M + 1 reads, M writes. speedup, to_compiled: time of the reference, and of the compiled one, in
    times of the fused one, the medians over rounds in which they take turns."""
    like = torch.empty(STAGES[stage], device=device, dtype=getattr(torch, dtype),
                       memory_format=MEMORY_FORMATS[layout])
    terms = [torch.randn_like(like, requires_grad=True) for _ in range(count)]
    weights = torch.rand(count, device=device, requires_grad=True)
    grad = torch.randn_like(like)
    size = like.numel() * like.element_size()
    flat = torch.cat([t.detach().flatten() for t in terms])  # a copy of M terms moves 2 M sizes
    into = torch.empty_like(flat)
    copied = 2 * count * size / seconds(lambda: into.copy_(flat), 15)
    variants = {"fused": mixed_sum, "reference": mixed_sum_ref}
    if compiles:
        torch.compiler.reset()
        variants["compiled"] = torch.compile(mixed_sum_ref)

    def forward(function):
        with torch.no_grad():
            function(weights, terms)

    def both(function):
        torch.autograd.grad(function(weights, terms), [weights, *terms], grad)

    for phase, run, sizes in (("forward", forward, count + 1), ("forward+backward", both, 3 * count + 2)):
        row = {"stage": stage, "terms": count, "layout": layout, "dtype": dtype, "phase": phase,
               "MB": sizes * size / 1e6, "copy_GBps": copied / 1e9}
        times = dict(zip(variants, interleaved([partial(run, f) for f in variants.values()], 15)))
        row |= {f"{name}_ms": 1e3 * statistics.median(of_one) for name, of_one in times.items()}
        row["fused_GBps"] = row["MB"] / row["fused_ms"]
        row["of_copy"] = row["fused_GBps"] / row["copy_GBps"]
        for ratio, name in (("speedup", "reference"), ("to_compiled", "compiled")):
            if name in times:
                row[ratio] = statistics.median(map(operator.truediv, times[name], times["fused"]))
        yield row


def bench_step(args: argparse.Namespace) -> None:
    """A search step on random images, and its step of w alone; a profile is of the step outside its graph."""
    from . import Architect, SearchNetwork
    from .capture import Captured
    device, space, on_gpu = args.device, args.search_space, args.device.type == "cuda"
    in_201 = space == "nasbench201"
    graph = on_gpu and space != "s4" if args.graph is None else args.graph
    torch.manual_seed(0)
    net = SearchNetwork(args.init_channels, 10, args.layers or (5 if in_201 else 8), space)
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4, fused=True)
    arch = Architect(net, F.cross_entropy, amp=amp_dtype(args.amp, device))
    method = None if args.lambda_grad == "none" else args.lambda_grad
    options = dict(lambda_t=0.125, kind="cosine", epsilon=1e-4, grad_clip=5.0, method=method)
    batch = [*random_batch(args.batch_size, device), *random_batch(args.batch_size, device)]

    def step(x, y, *valid):
        return search_step(arch, optimizer, (x, y), valid, unrolled=args.unrolled, alpha_first=not in_201,
                           **options)

    def of_weights(x, y, *valid):
        return weight_step(arch, optimizer, (x, y), **options)

    def timed(function):
        take = Captured(function, net, [optimizer, arch.optimizer]) if graph else function
        return seconds(lambda: take(*batch), args.steps)

    result = {"seconds_per_step": timed(step), "peak_mib": peak_mib(device),
              "seconds_per_weight_step": timed(of_weights), "device": device_name(device),
              "torch": torch.__version__, "fused": compiled_for(device.type), "graph": graph}
    if args.profile:
        kinds, operations = profile(lambda: step(*batch), on_gpu)
        result |= {"kinds": kinds, "operations": operations[: args.profile]}
    if args.json:
        print(json.dumps(result))
        return
    order = "second" if args.unrolled else "first"
    print(f"{space}, batch {args.batch_size}, Λ {args.lambda_grad}, {order} order "
          f"on {result['device']}: {result['seconds_per_step']:.3f} s/step, "
          f"{result['seconds_per_weight_step']:.3f} of them for w, peak {result['peak_mib']:.0f} MiB")
    for kind, ms in result.get("kinds", {}).items():
        print(f"{ms:10.1f} ms {kind}")
    for operation in result.get("operations", ()):
        print("{ms:10.1f} ms {calls:6d} calls  {name}".format(**operation))


def profile(run: Callable[[], object], on_gpu: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(milliseconds of each kind of operation; name, milliseconds and calls of each, the costliest first)"""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    cost = operator.attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")  # microseconds
    kinds, operations = {}, []
    for event in sorted(profiler.key_averages(), key=cost, reverse=True):
        operations.append({"name": event.key, "ms": cost(event) / 1e3, "calls": event.count})
        kind = kind_of(event.key)
        kinds[kind] = kinds.get(kind, 0.0) + cost(event) / 1e3
    return kinds, operations


def bench_work(args: argparse.Namespace) -> None:
    """A search step after a first one, which made the optimizers' state."""
    from .work import Work, step_on_meta
    step = step_on_meta(args.search_space, args.init_channels,
                        args.layers or (5 if args.search_space == "nasbench201" else 8), args.batch_size)
    method = None if args.lambda_grad == "none" else args.lambda_grad
    for unrolled, of_lambda in ((False, None), (args.unrolled, method)):
        with Work() as work:
            step(unrolled=unrolled, hessian=args.hessian, kind="cosine", method=of_lambda)
    launches, size, least = work.total()
    kinds: dict[str, list[float]] = {}
    for name, counts in sorted(work.calls.items(), key=lambda call: -call[1][3]):
        of_kind = kinds.setdefault(kind_of(name), [0, 0, 0])
        of_kind[:] = (a + b for a, b in zip(of_kind, counts[1:]))
    if args.json:
        print(json.dumps({"launches": launches, "bytes": size, "least_seconds": least, "kinds": kinds,
                          "fused": compiled_for("meta"), "torch": torch.__version__}))
        return
    form = "fused" if compiled_for("meta") else "plain"
    print(f"{form}, counted on shapes, not run: {launches} launches, {size / 1e9:.1f} GB, at least "
          f"{1e3 * least:.0f} ms at 2 µs a launch and 3 TB/s")
    for kind, (launches, size, least) in sorted(kinds.items(), key=lambda kind: -kind[1][2]):
        print(f"{launches:8d} {size / 1e9:8.1f} GB {1e3 * least:7.1f} ms  {kind}")


def kind_of(operation: str) -> str:
    """Of an operation's name, in KINDS."""
    return next((kind for kind, words in KINDS.items() if any(word in operation for word in words)), "other")


def bench_eval(args: argparse.Namespace) -> None:
    """A training step with auxiliary tower and drop path; plain: default layout, float32, not compiled."""
    ours = images_per_second(args, torch.channels_last, amp_dtype(args.amp, args.device), args.compile)
    plain = images_per_second(args, torch.contiguous_format, None, False)
    found = {"ours_images_per_second": ours, "plain_images_per_second": plain, "ratio": ours / plain}
    device = device_name(args.device)
    if args.json:
        print(json.dumps(found | {"device": device}))
    else:
        print(", ".join([*(f"{name} {value:.4g}" for name, value in found.items()), device]))


def images_per_second(args: argparse.Namespace, layout, amp: torch.dtype | None, compiles: bool) -> float:
    from . import Network, genotypes
    torch.manual_seed(0)
    net = Network(args.init_channels, 10, args.layers, True, genotypes.load(args.arch))
    net.to(args.device, memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
    x, y = random_batch(args.batch_size, args.device, layout)
    drop = torch.tensor(0.2, device=args.device)
    run = torch.compile(net) if compiles else net

    def step():
        with torch.autocast(args.device.type, amp, enabled=amp is not None):
            logits, auxiliary = run(x, drop)
        optimizer.zero_grad()
        (F.cross_entropy(logits.float(), y) + 0.4 * F.cross_entropy(auxiliary.float(), y)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()

    return args.batch_size / seconds(step, args.steps)


if __name__ == "__main__":
    script(main)
