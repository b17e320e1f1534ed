"""Timings of ldarts on this machine.

    python -m ldarts.bench mixed_sum [--json]       # fused, reference and compiled reference, against a plain copy
    python -m ldarts.bench step [--search_space darts --batch_size 16 --unrolled --lambda_grad exact --json]
    python -m ldarts.bench eval [--arch LAMBDA_DARTS --amp bf16 --compile --json]     # against the plain form
"""
import argparse
import json
import resource
import statistics
import sys
import time
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused.mixed_sum import compiled_for, mixed_sum, mixed_sum_ref
from .runs import AMP, MEMORY_FORMATS, Parser, amp_dtype, device_name, pick_device, script

STAGES = {"1": (64, 16, 32, 32), "2": (64, 32, 16, 16), "3": (64, 64, 8, 8)}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sums = commands.add_parser("mixed_sum", help="the fused sum, its reference and the compiled reference")
    sums.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    sums.add_argument("--terms", nargs="+", type=int, default=[7, 14, 35])
    sums.add_argument("--layouts", nargs="+", choices=MEMORY_FORMATS, default=list(MEMORY_FORMATS))
    sums.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    sums.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes on a CPU")
    for command in (sums, add_step(commands), add_eval(commands)):
        command.add_argument("--device", default="auto")
        command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    {"mixed_sum": bench_mixed_sum, "step": bench_step, "eval": bench_eval}[args.command](args)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_mixed_sum(args: argparse.Namespace) -> None:
    """Bytes are those that must move: forward M reads, 1 write; backward M + 2 reads (the gradient twice), M writes."""
    if not compiled_for(args.device.type):
        sys.exit("the fused sum is not compiled here")
    variants = {"fused": mixed_sum, "reference": mixed_sum_ref}
    rows = []
    for stage, count, layout, dtype in ((s, m, x, d) for s in args.stages for m in args.terms for x in args.layouts
                                        for d in args.dtypes):
        like = dict(device=args.device, dtype=getattr(torch, dtype))
        terms = [torch.randn(STAGES[stage], **like).contiguous(memory_format=MEMORY_FORMATS[layout]).requires_grad_()
                 for _ in range(count)]
        weights = torch.rand(count, device=args.device).requires_grad_()
        grad = torch.randn_like(terms[0])
        size = grad.numel() * grad.element_size()
        moved = {"forward": (count + 1) * size, "forward+backward": (3 * count + 3) * size}
        flat = torch.cat([t.detach().flatten() for t in terms])  # a copy of M terms moves 2 M sizes
        into = torch.empty_like(flat)
        copy = 2 * count * size / seconds(lambda: into.copy_(flat), args.device, 15)
        if not args.no_compile:
            torch.compiler.reset()
            variants["compiled"] = torch.compile(mixed_sum_ref)
        for phase, bytes_moved in moved.items():
            row = {"stage": stage, "terms": count, "layout": layout, "dtype": dtype, "phase": phase, "MB": bytes_moved / 1e6,
                   "copy_GBps": copy / 1e9}
            for name, function in variants.items():
                def run():
                    if phase == "forward":
                        with torch.no_grad():
                            return function(weights, terms)
                    return torch.autograd.grad(function(weights, terms), [weights, *terms], grad)
                row[f"{name}_ms"] = 1e3 * seconds(run, args.device, 15)
            row["fused_GBps"] = bytes_moved / row["fused_ms"] / 1e6
            row["of_copy"] = row["fused_GBps"] / row["copy_GBps"]
            row["speedup"] = row["reference_ms"] / row["fused_ms"]
            rows.append(row)
            if not args.json:
                print_row(row, len(rows) == 1)
    if args.json:
        print(json.dumps({"device": device_name(args.device), "torch": torch.__version__, "rows": rows}))


def print_row(row: dict, header: bool) -> None:
    if header:
        print(" | ".join(row))
    print(" | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)


def add_step(commands) -> argparse.ArgumentParser:
    step = commands.add_parser("step", help="a search step: seconds, peak memory and the costliest operations")
    step.add_argument("--search_space", default="darts")
    step.add_argument("--batch_size", type=int, default=16)
    step.add_argument("--init_channels", type=int, default=16)
    step.add_argument("--layers", type=int, help="default 8, in nasbench201 5 a stage")
    step.add_argument("--steps", type=int, default=3, help="timed after one that warms up")
    step.add_argument("--unrolled", action="store_true")
    step.add_argument("--lambda_grad", choices=("none", "central", "forward", "exact"), default="central")
    step.add_argument("--amp", choices=AMP, default="none")
    step.add_argument("--graph", action=argparse.BooleanOptionalAction, help="default: on a GPU, but for s4")
    step.add_argument("--profile", type=int, default=10, metavar="N", help="list the N costliest operations; 0: do not")
    return step


def bench_step(args: argparse.Namespace) -> None:
    """A search step on random images, and its step of w alone; a profile is of the step outside its graph."""
    from train_search import search_step, weight_step

    from . import Architect, SearchNetwork
    from .capture import Captured, optimizer_tensors
    device, in_201, on_gpu = args.device, args.search_space == "nasbench201", args.device.type == "cuda"
    graph = on_gpu and args.search_space != "s4" if args.graph is None else args.graph
    torch.manual_seed(0)
    net = SearchNetwork(args.init_channels, 10, args.layers or (5 if in_201 else 8), args.search_space).to(
        device, memory_format=torch.channels_last)
    rate = torch.tensor(0.025, device=device) if graph else 0.025
    optimizer = torch.optim.SGD(net.weight_parameters(), rate, 0.9, weight_decay=3e-4, fused=True)
    arch = Architect(net, F.cross_entropy, amp=amp_dtype(args.amp, device), capturable=graph)

    options = dict(lambda_t=0.125, kind="cosine", epsilon=1e-4, grad_clip=5.0,
                   method=None if args.lambda_grad == "none" else args.lambda_grad)

    def step(x, y, valid_x, valid_y):
        return search_step(arch, optimizer, (x, y), (valid_x, valid_y), unrolled=args.unrolled, alpha_first=not in_201,
                           **options)

    def of_weights(x, y, valid_x, valid_y):
        return weight_step(arch, optimizer, (x, y), **options)

    def state():
        return [*net.parameters(), *net.buffers(), *optimizer_tensors(optimizer), *optimizer_tensors(arch.optimizer)]

    def timed(function):
        take = Captured(function, state) if graph else function
        return seconds(lambda: take(*batch), device, args.steps)

    batch = [*random_batch(args.batch_size, device), *random_batch(args.batch_size, device)]
    result = {"seconds_per_step": timed(step), "peak_mib": peak_mib(device), "seconds_per_weight_step": timed(of_weights),
              "device": device_name(device), "torch": torch.__version__, "fused": compiled_for(device.type), "graph": graph}
    if args.profile:
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=activities) as profile:
            step(*batch)

        def cost(event):
            return event.self_device_time_total if on_gpu else event.self_cpu_time_total

        events, kinds = sorted(profile.key_averages(), key=cost, reverse=True), {}
        for e in events:
            kind = next((kind for kind, words in KINDS.items() if any(word in e.key for word in words)), "other")
            kinds[kind] = kinds.get(kind, 0.0) + cost(e) / 1e3
        result |= {"kinds": kinds, "operations": [{"name": e.key, "ms": cost(e) / 1e3, "calls": e.count}
                                                  for e in events[: args.profile]]}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.search_space}, batch {args.batch_size}, Λ {args.lambda_grad}, {'second' if args.unrolled else 'first'} order "
          f"on {result['device']}: {result['seconds_per_step']:.3f} s/step, {result['seconds_per_weight_step']:.3f} of them for w, "
          f"peak {result['peak_mib']:.0f} MiB")
    for kind, ms in result.get("kinds", {}).items():
        print(f"{ms:10.1f} ms {kind}")
    for e in result.get("operations", ()):
        print(f"{e['ms']:10.1f} ms {e['calls']:6d} calls  {e['name']}")


KINDS = {  # of operations, by what their names contain
    "separable convolutions": ("bank_", "_Bank", "depthwise"), "other convolutions": ("conv", "gemm", "addmm", "::mm"),
    "batch norm": ("batch_norm", "norm_tables", "norm_gradients", "lerp"),
    "sums of nodes": ("mixed_", "node_sum", "term_gradients", "_Fan", "_Node", "sum_kernel"), "pools": ("pool",),
    "ReLU": ("relu", "clamp_min", "threshold"), "optimizers": ("foreach", "SGD", "Adam"),
    "copies and zeros": ("copy", "cat", "fill", "zero", "empty", "clone", "Memcpy", "Memset"),
}


def random_batch(count: int, device: torch.device, size: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(10, (count,), device=device)


def seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median, after one call that warms up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def add_eval(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("eval", help="training a derived network: images a second, against its plain form")
    command.add_argument("--arch", default="LAMBDA_DARTS")
    command.add_argument("--batch_size", type=int, default=96)
    command.add_argument("--init_channels", type=int, default=36)
    command.add_argument("--layers", type=int, default=20)
    command.add_argument("--steps", type=int, default=3, help="timed after one that warms up")
    command.add_argument("--amp", choices=AMP, default="none")
    command.add_argument("--compile", action="store_true")
    return command


def bench_eval(args: argparse.Namespace) -> None:
    """A training step with auxiliary tower and drop path; the plain form: default layout, float32, not compiled."""
    from . import Network, genotypes
    found = {}
    for name, layout in (("ours", torch.channels_last), ("plain", torch.contiguous_format)):
        torch.manual_seed(0)
        net = Network(args.init_channels, 10, args.layers, True, genotypes.load(args.arch)).to(args.device, memory_format=layout)
        optimizer = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
        x, y = random_batch(args.batch_size, args.device)
        x, drop = x.contiguous(memory_format=layout), torch.tensor(0.2, device=args.device)
        amp, run_net = (amp_dtype(args.amp, args.device), torch.compile(net) if args.compile else net) if name == "ours" else (None, net)

        def step():
            with torch.autocast(args.device.type, amp, enabled=amp is not None):
                logits, auxiliary = run_net(x, drop)
            optimizer.zero_grad()
            (F.cross_entropy(logits.float(), y) + 0.4 * F.cross_entropy(auxiliary.float(), y)).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            optimizer.step()

        found[f"{name}_images_per_second"] = args.batch_size / seconds(step, args.device, args.steps)
    found |= {"ratio": found["ours_images_per_second"] / found["plain_images_per_second"], "device": device_name(args.device)}
    print(json.dumps(found) if args.json else ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else v for k, v in found.items()))


def peak_mib(device: torch.device) -> float:
    """Highest memory so far: the allocator's on a GPU, resident of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    script(main)
