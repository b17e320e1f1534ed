"""Timings of ldarts on this machine. LDARTS_FUSED=off in the environment times the plain form.

    python -m ldarts.bench mixed_sum    # the weighted sum: fused, reference, compiled reference
    python -m ldarts.bench step [--search_space darts --batch_size 16 --unrolled --lambda_grad exact]
    python -m ldarts.bench step --compare    # in turn with plain PyTorch in both memory layouts
    python -m ldarts.bench eval [--arch LAMBDA_DARTS --amp bf16 --compile]    # and the plain form
"""
import argparse
import json
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

from . import Architect, Network, SearchNetwork, genotypes
from .architect import search_step, weight_step
from .capture import Captured
from .errors import progress
from .fused import run_plainly
from .fused.sums import compiled_for, mixed_sum, mixed_sum_ref
from .runs import AMP, MEMORY_FORMATS, Parser, amp_dtype, device_name, one_of, pick_device, script

STAGES = {"1": (64, 16, 32, 32), "2": (64, 32, 16, 16), "3": (64, 64, 8, 8)}  # shapes of terms


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sums = commands.add_parser("mixed_sum", help="the weighted sum: fused, reference, compiled reference")
    sums.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    sums.add_argument("--terms", nargs="+", type=int, default=[7, 14, 35])
    sums.add_argument("--layouts", nargs="+", choices=MEMORY_FORMATS, default=list(MEMORY_FORMATS))
    sums.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    sums.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    step = commands.add_parser("step", help="a search step: seconds, peak memory, the costliest operations")
    step.add_argument("--search_space", default="darts")
    step.add_argument("--layers", type=int, help="default 8, in nasbench201 5 a stage")
    step.add_argument("--unrolled", action="store_true")
    step.add_argument("--lambda_grad", type=one_of(("none", "central", "exact")), default="central")
    step.add_argument("--memory_format", type=one_of(MEMORY_FORMATS), default="channels_last")
    step.add_argument("--compare", action="store_true", help="with plain PyTorch in both layouts, without a graph")
    step.add_argument("--graph", action=argparse.BooleanOptionalAction, help="default: on a GPU, but for s4")
    step.add_argument("--profile", type=int, default=10, metavar="N", help="list the N costliest; 0: none")
    train = commands.add_parser("eval", help="training of a derived network, and of its plain form")
    train.add_argument("--arch", default="LAMBDA_DARTS")
    train.add_argument("--layers", type=int, default=20)
    train.add_argument("--compile", action="store_true")
    for command, batch_size, channels in ((step, 16, 16), (train, 96, 36)):
        command.add_argument("--batch_size", type=int, default=batch_size)
        command.add_argument("--init_channels", type=int, default=channels)
        command.add_argument("--steps", type=int, default=3, help="timed steps, after a first one")
        command.add_argument("--amp", type=one_of(AMP), default="none")
    for command in (sums, step, train):
        command.add_argument("--device", default="auto")
        command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    {"mixed_sum": bench_mixed_sum, "step": bench_step, "eval": bench_eval}[args.command](args)


def seconds(function: Callable[[], object], repeats: int, name: str) -> float:
    """The median of a function's calls, after a first one."""
    return statistics.median(interleaved([function], repeats, name)[0])


def interleaved(functions: Sequence[Callable[[], object]], repeats: int, name: str) -> list[list[float]]:
    """Seconds of each function's calls. The functions take turns; the first round is not counted."""
    times = [[] for _ in functions]
    for _ in progress(range(repeats + 1), f"{name}: round"):
        for function, own_times in zip(functions, times):
            started = timer()  # waits for the device
            function()
            own_times.append(timer() - started)
    return [own_times[1:] for own_times in times]


def peak_mib(device: torch.device) -> float:
    """The highest memory so far: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def random_batch(count: int, device: torch.device, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, 32, 32, device=device).contiguous(memory_format=layout)
    return x, torch.randint(10, (count,), device=device)


def bench_mixed_sum(args: argparse.Namespace) -> None:
    if not compiled_for(args.device.type):
        sys.exit("the fused sum is not compiled here")
    rows = []
    for case in product(args.stages, args.terms, args.layouts, args.dtypes):
        for row in time_sums(*case, args.device, not args.no_compile):
            if not rows and not args.json:
                print(" | ".join(row))
            rows.append(row)
            if not args.json:
                cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
                print(" | ".join(cells), flush=True)
    if args.json:
        print(json.dumps({"device": device_name(args.device), "torch": torch.__version__, "rows": rows}))


def time_sums(stage: str, count: int, layout: str, dtype: str, device: torch.device,
              compiles: bool) -> Iterator[dict[str, Any]]:
    """A row for the forward pass, and one for forward and backward.

    MB: the bytes that must move: M reads and 1 write forward, M + 1 reads and M writes backward. of_copy:
    their rate as a share of that of a plain copy. speedup, to_compiled: the time of the reference, and of
    the compiled reference, divided by the time of the fused sum; medians over rounds in which they alternate.
    """
    like = torch.empty(STAGES[stage], device=device, dtype=getattr(torch, dtype),
                       memory_format=MEMORY_FORMATS[layout])
    terms = [torch.randn_like(like, requires_grad=True) for _ in range(count)]
    weights = torch.rand(count, device=device, requires_grad=True)
    grad, size = torch.randn_like(like), like.numel() * like.element_size()
    flat = torch.cat([t.detach().flatten() for t in terms])
    target = torch.empty_like(flat)
    copy_rate = 2 * count * size / seconds(lambda: target.copy_(flat), 15, "copy")
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
        calls, name = [partial(run, f) for f in variants.values()], f"{count} terms of stage {stage}, {phase}"
        times = dict(zip(variants, interleaved(calls, 15, name)))
        rate = sizes * size / statistics.median(times["fused"])
        row = {"stage": stage, "terms": count, "layout": layout, "dtype": dtype, "phase": phase,
               "MB": sizes * size / 1e6, "copy_GBps": copy_rate / 1e9,
               **{f"{name}_ms": 1e3 * statistics.median(own_times) for name, own_times in times.items()},
               "fused_GBps": rate / 1e9, "of_copy": rate / copy_rate}
        for ratio, name in (("speedup", "reference"), ("to_compiled", "compiled")):
            if name in times:
                row[ratio] = statistics.median(t / fused for t, fused in zip(times[name], times["fused"]))
        yield row


def search_of(args: argparse.Namespace, layout: torch.memory_format):
    """A search on random images: net, Architect, SGD, its step, its step of w alone, what they read."""
    device, space = args.device, args.search_space
    in_201 = space == "nasbench201"
    torch.manual_seed(0)
    net = SearchNetwork(args.init_channels, 10, args.layers or (5 if in_201 else 8), space)
    net.to(device, memory_format=layout)
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4, fused=True)
    arch = Architect(net, F.cross_entropy, amp=amp_dtype(args.amp, device))
    method = None if args.lambda_grad == "none" else args.lambda_grad
    options = dict(lambda_t=0.125, kind="cosine", epsilon=1e-4, grad_clip=5.0, method=method)
    batches = [*random_batch(args.batch_size, device, layout), *random_batch(args.batch_size, device, layout)]

    def whole_step(x, y, *valid):
        return search_step(arch, optimizer, (x, y), valid, unrolled=args.unrolled, alpha_first=not in_201,
                           **options)

    def only_weights(x, y, *valid):
        return weight_step(arch, optimizer, (x, y), **options)

    return net, arch, optimizer, whole_step, only_weights, batches


def compare_steps(args: argparse.Namespace) -> None:
    """Seconds of a step in the default layout and in channels-last, both without the engine, and of ours."""
    variants = {"default layout": (torch.contiguous_format, False),
                "channels-last": (torch.channels_last, False), "ours": (torch.channels_last, True)}
    calls = []
    for layout, with_engine in variants.values():
        net, _, _, step, _, batches = search_of(args, layout)
        if not with_engine:
            net.engine.runner = lambda x: run_plainly
        calls.append(partial(step, *batches))
    medians = [*map(statistics.median, interleaved(calls, args.steps, "search steps"))]
    result = {"device": device_name(args.device), "threads": torch.get_num_threads(),
              "seconds": dict(zip(variants, medians))}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.search_space}, batch {args.batch_size}, Λ {args.lambda_grad}, {result['threads']} threads, "
          f"{result['device']}")
    for name, median in result["seconds"].items():
        print(f"{name:15} {median:8.3f} s/step   {median / medians[-1]:5.2f} times ours")


def bench_step(args: argparse.Namespace) -> None:
    """A search step on random images, and its step of w alone. The profile is of a step without a graph."""
    if args.compare:
        return compare_steps(args)
    device, space, on_gpu = args.device, args.search_space, args.device.type == "cuda"
    graph = on_gpu and space != "s4" if args.graph is None else args.graph
    search = search_of(args, MEMORY_FORMATS[args.memory_format])
    net, arch, optimizer, whole_step, only_weights, batches = search

    def timed(function, name):
        step = Captured(function, net, [optimizer, arch.optimizer]) if graph else function
        return seconds(lambda: step(*batches), args.steps, name)

    result = {"seconds_per_step": timed(whole_step, "search step"), "peak_mib": peak_mib(device),
              "seconds_per_weight_step": timed(only_weights, "step of w"), "device": device_name(device),
              "torch": torch.__version__, "fused": compiled_for(device.type), "graph": graph}
    if args.profile:
        result["operations"] = costliest(lambda: whole_step(*batches), on_gpu)[: args.profile]
    if args.json:
        print(json.dumps(result))
        return
    print(f"{space}, batch {args.batch_size}, Λ {args.lambda_grad}, {'second' if args.unrolled else 'first'} "
          f"order on {result['device']}: {result['seconds_per_step']:.3f} s/step, "
          f"{result['seconds_per_weight_step']:.3f} of them for w, peak {result['peak_mib']:.0f} MiB")
    for operation in result.get("operations", ()):
        print("{ms:10.1f} ms {calls:6d} calls  {name}".format(**operation))


def costliest(run: Callable[[], object], on_gpu: bool) -> list[dict[str, Any]]:
    """Name, milliseconds and calls of each operation, the costliest first."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        for call in progress([run], "profile: step"):
            call()
    cost = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
    operations = [{"name": event.key, "ms": getattr(event, cost) / 1e3, "calls": event.count}
                  for event in profiler.key_averages()]
    return sorted(operations, key=lambda operation: -operation["ms"])


def bench_eval(args: argparse.Namespace) -> None:
    """A training step with auxiliary tower and drop path; plain: default layout, float32, not compiled."""
    ours = images_per_second(args, torch.channels_last, amp_dtype(args.amp, args.device), args.compile)
    plain = images_per_second(args, torch.contiguous_format, None, False)
    result = {"ours_images_per_second": ours, "plain_images_per_second": plain, "ratio": ours / plain}
    device = device_name(args.device)
    if args.json:
        print(json.dumps(result | {"device": device}))
    else:
        print(", ".join([*(f"{name} {value:.4g}" for name, value in result.items()), device]))


def images_per_second(args: argparse.Namespace, layout: torch.memory_format, amp: torch.dtype | None,
                      compiles: bool) -> float:
    torch.manual_seed(0)
    net = Network(args.init_channels, 10, args.layers, True, genotypes.load(args.arch))
    net.to(args.device, memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
    x, y = random_batch(args.batch_size, args.device, layout)
    drop_path_prob = torch.tensor(0.2, device=args.device)
    run = torch.compile(net) if compiles else net

    def step():
        with torch.autocast(args.device.type, amp, enabled=amp is not None):
            logits, auxiliary = run(x, drop_path_prob)
        optimizer.zero_grad()
        (F.cross_entropy(logits.float(), y) + 0.4 * F.cross_entropy(auxiliary.float(), y)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()

    return args.batch_size / seconds(step, args.steps, f"training step{', compiled' * compiles}, {layout}")


if __name__ == "__main__":
    script(main)
