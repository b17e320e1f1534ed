"""The evidence, repeatable: does the gradient of Λ raise Λ, and does Λ prevent collapse?

    python -m ldarts.study gradient --data DATA --out studies/gradient      # the published size: for a GPU
    python -m ldarts.study collapse --data DATA --out studies/collapse
    python -m ldarts.study gradient --out studies/gradient --show           # tables and pictures of what is there

Each finished case (a space, a variant, a seed) is one JSON file in --out and is not computed again, so a study can be
stopped, continued, and run in parts by several processes. Tables go to --out/tables.md, pictures beside it where
matplotlib (extra `plot`) is installed.
"""
import copy
import json
import shutil
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import spaces
from .alignment import KINDS
from .architect import Architect, Batch
from .data import Batches, load
from .errors import InputError
from .model_search import SearchNetwork, derive
from .runs import (Parser, device_name, pick_device, read_run, script, seed_everything, spread, table, versions,
                   write_atomically)
from .visualize import band, pyplot, save

ROOT = Path(__file__).parent.parent
VARIANTS = {  # of `collapse`: the flags of train_search.py
    "DARTS": ["--lambda_reg", "0"],
    "central": ["--lambda_grad", "central"],  # Λ as published
    "exact": ["--lambda_grad", "exact"],
    "sign": ["--lambda_grad", "exact", "--lambda_kind", "sign"],
}
Case = tuple[str, ...]  # a space, a variant (of `collapse`) and a seed


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    gradient = commands.add_parser("gradient", help="how far each way to ∇Λ raises Λ, at moments of a search")
    collapse = commands.add_parser("collapse", help="searches with and without Λ, and what their cells are worth")
    cells = [space for space in spaces.SPACES if space != "nasbench201"]
    # S4 draws noise, and another one in each precision: its gradients can't be compared.
    for command, chosen, choices in ((gradient, ["darts", "s2"], [space for space in cells if space != "s4"]),
                                     (collapse, ["s2", "s4", "darts"], cells)):
        add = command.add_argument
        add("--data", default="data")
        add("--dataset", default="cifar10")
        add("--spaces", nargs="+", default=chosen, choices=choices)
        add("--seeds", nargs="+", type=int, default=[0, 1, 2])
        add("--epochs", type=int, default=50, help="of a search")
        add("--batch_size", type=int, default=64)
        add("--init_channels", type=int, default=16)
        add("--layers", type=int, default=8)
        add("--lambda_reg", type=float, default=0.125)
        add("--arch_learning_rate", type=float, default=3e-4)
        add("--out", required=True, help="folder of the results")
        add("--show", action="store_true", help="compute nothing")
        add("--device", default="auto")
    add = gradient.add_argument
    add("--steps", nargs="+", type=int, default=[0, 100, 500], help="when to look, beside the end")
    add("--batches", type=int, default=2, help="training batches of a snapshot")
    add("--held_out", type=int, default=2, help="batches of the α half, on which ΔΛ is measured too")
    add("--length", type=float, default=0.2, help="of the weight step of which ΔΛ is the effect; shorter for a small net")
    add("--epsilons", nargs="+", type=float, default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--dtypes", nargs="+", choices=("float32", "float64", "bfloat16"), default=["float32", "float64", "bfloat16"],
        help="of the gradients; bfloat16: float32 weights under autocast")
    add = collapse.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--unrolled", action="store_true")
    add("--eval_epochs", type=int, default=20, help="of the derived cells' training")
    add("--eval_channels", type=int, default=16)
    add("--eval_layers", type=int, default=8)
    args = parser.parse_args()
    run, report = {"gradient": (gradient_case, report_gradient), "collapse": (collapse_case, report_collapse)}[args.command]
    wanted: list[Case] = [(space, *variant, str(seed)) for seed in args.seeds for space in args.spaces
                          for variant in ([(v,) for v in args.variants] if args.command == "collapse" else [()])]
    results = {case: found for case in wanted if (found := finished(args, case) if args.show else complete(args, case, run))}
    if not results:
        raise InputError(f"{args.out}: no finished case of this study; run it without --show")
    text = report(args, {case: result["values"] for case, result in results.items()})
    together: dict[str, list[Case]] = {}
    for case, result in results.items():
        flags = ", ".join(f"{k} {v}" for k, v in result["settings"].items() if k != "command")
        together.setdefault(f"on {result['device']}; {flags}", []).append(case)
    for how, cases in together.items():
        minutes = sum(results[case]["minutes"] for case in cases)
        text += f"\n{', '.join(dict.fromkeys(case[0] for case in cases))}: {len(cases)} cases, {minutes:.1f} minutes, {how}\n"
    text += f"\n{len(results)} of {len(wanted)} cases are there\n"
    write_atomically(Path(args.out, "tables.md"), lambda path: path.write_text(text))
    print(text, end="")


def settings(args) -> dict[str, Any]:
    """What a result depends on beside its case."""
    return {k: v for k, v in vars(args).items() if k not in ("spaces", "seeds", "variants", "data", "out", "show", "device")}


def finished(args, case: Case) -> dict[str, Any] | None:
    path = Path(args.out, "-".join(case) + ".json")
    return json.loads(path.read_text()) if path.is_file() else None


def complete(args, case: Case, run) -> dict[str, Any]:
    """The result of a case, computed where it isn't there. Raises InputError for one computed with other settings."""
    if result := finished(args, case):
        if differing := [k for k, v in settings(args).items() if result["settings"].get(k) != v]:
            raise InputError(f"{args.out}: {'-'.join(case)} was computed with another --{differing[0]}, "
                             f"{result['settings'].get(differing[0])}; give another --out, or --show what is there")
        return result
    device, started = pick_device(args.device), time.perf_counter()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    values = run(args, *case, device)
    result = {"settings": settings(args), "device": device_name(device), "versions": versions(),
              "minutes": (time.perf_counter() - started) / 60, "values": values}
    write_atomically(Path(args.out, "-".join(case) + ".json"), lambda path: path.write_text(json.dumps(result) + "\n"))
    print(f"{' '.join(case)}: {result['minutes']:.1f} minutes", file=sys.stderr, flush=True)
    return result


def gradient_case(args, space: str, seed: str, device: torch.device) -> list[dict[str, Any]]:
    """The rows of measure() at each moment of one search."""
    train_set, _ = load(args.dataset, args.data, device, int(seed))
    halves = torch.arange(len(train_set.labels)).tensor_split(2)
    streams = [Batches(train_set, half, args.batch_size, int(seed), tag=tag, augment=True, memory_format=torch.channels_last)
               for half, tag in zip(halves, ("train", "valid"))]
    # Batches of an epoch that the search never reaches: new crops of the images of w, and of those that w never saw.
    same, held_out = ([batch for batch, _ in zip(stream.epoch(args.epochs), range(count))]
                      for stream, count in zip(streams, (args.batches, args.held_out)))
    return [{"step": step, **row} for step, net in search(args, space, int(seed), train_set.num_classes, streams, device)
            for row in measure(args, net, same, held_out)]


def search(args, space: str, seed: int, num_classes: int, streams: list[Batches],
           device: torch.device) -> Iterator[tuple[int, SearchNetwork]]:
    """(steps taken, supernet) at each of args.steps and at the end of a search of first order as published."""
    from train_search import search_step
    seed_everything(seed)
    net = SearchNetwork(args.init_channels, num_classes, args.layers, space).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, 0.001)
    arch, step = Architect(net, F.cross_entropy, args.arch_learning_rate), 0
    for epoch in range(args.epochs):
        for train, valid in zip(*(stream.epoch(epoch) for stream in streams)):
            if step in args.steps:
                yield step, net
            search_step(arch, optimizer, train, valid, unrolled=False, alpha_first=True, kind="cosine", epsilon=1e-4,
                        lambda_t=args.lambda_reg * epoch / max(1, args.epochs - 1), method="central", grad_clip=5.0)
            step += 1
        scheduler.step()
    yield step, net


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def measure(args, net: SearchNetwork, batches: list[Batch], held_out: list[Batch]) -> Iterator[dict[str, Any]]:
    """One row for each batch, kind of Λ, precision and direction in which the weights could go.

    norm, loss_norm: of the direction before it is scaled, and of ∇L; cosine: with the double backward in float64; same,
    held_out: ΔΛ in float32 after a step of args.length along the direction, on the batch and on each held-out one.
    """
    def at(dtype: str) -> Architect:
        precision = torch.float64 if dtype == "float64" else torch.float32
        return Architect(copy.deepcopy(net).to(precision), F.cross_entropy)

    nets, there = {dtype: at(dtype) for dtype in {"float64", *args.dtypes}}, at("float32")
    origin, sizes = flat(net.weight_parameters()), [p.numel() for p in net.weight_parameters()]
    device = origin.device

    def grads(dtype: str, batch: Batch, kind: str, epsilon: float, method: str) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            images = batch[0].double() if dtype == "float64" else batch[0]
            _, dw, d_lambda, _ = nets[dtype].lambda_grads((images, batch[1]), kind, epsilon, method)
        return flat(dw), flat(d_lambda)

    def alignments(kind: str, batch: Batch, direction: Tensor | None = None) -> list[float]:
        """Λ on the batch and on each held-out one, at the origin or a step along the direction away from it."""
        step = 0 if direction is None else args.length / direction.norm().clamp_min(1e-30) * direction
        for p, part in zip(there.net.weight_parameters(), (origin + step).split(sizes)):
            p.data.copy_(part.view_as(p))
        return [float(there.batch_alignment(x, kind)) for x in [batch, *held_out]]

    for b, batch in enumerate(batches):
        for kind in args.kinds:
            before = alignments(kind, batch)
            _, reference = grads("float64", batch, kind, 1.0, "exact")
            for dtype in args.dtypes:
                dw, exact = grads(dtype, batch, kind, 1.0, "exact")
                drawn = torch.randn(len(dw), dtype=torch.float64, generator=torch.Generator().manual_seed(b)).to(device)
                directions = [("exact", None, exact)]
                if dtype == args.dtypes[0]:
                    directions += [("−∇L", None, -dw), ("random", None, drawn)]
                directions += [(method, epsilon, grads(dtype, batch, kind, epsilon, method)[1])
                               for method in ("central", "forward") for epsilon in args.epsilons]
                for name, epsilon, direction in directions:
                    change = [a - b for a, b in zip(alignments(kind, batch, direction), before)]
                    yield {"batch": b, "kind": kind, "dtype": dtype, "estimator": name, "epsilon": epsilon,
                           "norm": float(direction.norm()), "loss_norm": float(dw.norm()),
                           "cosine": float(F.cosine_similarity(direction, reference, 0)),
                           "same": change[0], "held_out": change[1:], "before": before}


NUMBERS = {  # of a direction, from a row of measure()
    "‖·‖ / ‖∇L‖": lambda row: [] if row["estimator"] == "random" else [row["norm"] / row["loss_norm"]],
    "cosine with exact": lambda row: [row["cosine"]],
    "ΔΛ, same batch": lambda row: [row["same"]],
    "ΔΛ, held-out batches": lambda row: row["held_out"],
}
Directions = dict[tuple[str, float | None], list[dict[str, Any]]]  # (estimator, ε₀) -> rows of all seeds and batches


def report_gradient(args, results: dict[Case, list[dict[str, Any]]]) -> str:
    """A table for each space, kind, precision and moment, and a picture for each space and kind."""
    groups: dict[tuple[str, str], dict[tuple[str, int], Directions]] = {}
    for case, found in results.items():
        for row in found:
            group = groups.setdefault((case[0], row["kind"]), {}).setdefault((row["dtype"], row["step"]), {})
            group.setdefault((row["estimator"], row["epsilon"]), []).append(row)
    text = ""
    for (space, kind), moments in groups.items():
        for (dtype, step), directions in moments.items():
            before = [value for row in directions["exact", None] for value in row["before"]]
            text += f"\n{space}, Λ {kind}, {dtype}, after {step} steps, where Λ is {spread(before, 3)}:\n\n"
            text += table(["direction", "ε₀", *NUMBERS],
                          [[name, "" if epsilon is None else f"{epsilon:.0e}",
                            *(spread([v for row in rows for v in of(row)], 3) for of in NUMBERS.values())]
                           for (name, epsilon), rows in directions.items()])
        if find_spec("matplotlib"):
            draw_gradient(moments, Path(args.out, f"{space}-{kind}.png"))
    return text


def draw_gradient(moments: dict[tuple[str, int], Directions], path: Path) -> None:
    """A column a moment, a row a number; colours: the directions, line styles: the precisions, of which the first has bands."""
    numbers, steps = list(NUMBERS.items())[1:], sorted({step for _, step in moments})
    figure, axes = pyplot().subplots(len(numbers), len(steps), squeeze=False, sharex=True, sharey="row",
                                     figsize=(1.2 + 2.9 * len(steps), 2.4 * len(numbers)), layout="constrained")
    colours = {"central": "C0", "forward": "C1", "exact": "C2", "−∇L": "C4", "random": "0.5"}
    styles, first = {"float32": "-", "float64": "--", "bfloat16": ":"}, next(iter(moments))[0]
    for (dtype, step), directions in moments.items():
        epsilons = sorted({epsilon for _, epsilon in directions if epsilon is not None})
        for row, (number, of) in zip(axes, numbers):
            ax = row[steps.index(step)]
            for name, colour in colours.items():
                by_epsilon = ([v for r in directions.get((name, e), directions.get((name, None), ())) for v in of(r)]
                              for e in epsilons)
                if rows := list(zip(*by_epsilon)):
                    band(ax, epsilons, rows, f"{name}, {dtype}", dtype == first, color=colour, ls=styles[dtype])
            ax.set(xscale="log", ylabel=number if step == steps[0] else None)
            ax.grid(alpha=0.3)
    for column, step in zip(axes.T, steps):
        column[0].set_title(f"after {step} steps")
        column[-1].set_xlabel("ε₀")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(figure, path)


def collapse_case(args, space: str, variant: str, seed: str, device: torch.device) -> dict[str, Any]:
    """What the two commands leave in their run folders under --out, for one search and the training of its cells."""
    name, data = f"{space}-{variant}-{seed}", str(Path(args.data).resolve())
    common = ["--data", data, "--dataset", args.dataset, "--seed", seed, "--device", str(device),
              "--batch_size", args.batch_size]
    command(args.out, "train_search.py", name, *common, "--search_space", space, "--lambda_reg", args.lambda_reg,
            *VARIANTS[variant], "--epochs", args.epochs, "--init_channels", args.init_channels, "--layers", args.layers,
            "--arch_learning_rate", args.arch_learning_rate, "--eigenvalue", *["--unrolled"] * args.unrolled)
    command(args.out, "train_eval.py", f"{name}-eval", *common, "--arch", f"runs/{name}", "--no-auxiliary",
            "--epochs", args.eval_epochs, "--init_channels", args.eval_channels, "--layers", args.eval_layers)
    runs = Path(args.out, "runs")
    config, evaluation = read_run(runs / f"{name}-eval")
    return {"search": read_run(runs / name)[1], "eval": evaluation, "parameters": config["parameters"],
            "genotype": json.loads((runs / name / "genotype.json").read_text())}


def command(folder: str, name: str, save: str, *flags) -> None:
    """Run one of the two commands in `folder`, anew where it was stopped before. Raises InputError with its complaint."""
    shutil.rmtree(Path(folder, "runs", save), ignore_errors=True)
    result = subprocess.run([sys.executable, ROOT / name, "--save", save, *map(str, flags)], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if result.returncode:
        raise InputError(f"{name} --save {save} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")


def report_collapse(args, results: dict[Case, dict[str, Any]]) -> str:
    """For each space the numbers at the end and over the epochs, mean ± deviation over the seeds, and one picture."""
    def parameter_free(space: str, line: dict) -> int:
        p = torch.tensor(line["alphas"][0]).softmax(-1).tolist()
        return sum(op in ("skip_connect", "noise") for op, _ in derive(p, spaces.get(space).normal))

    numbers = {"Λ": lambda space, line: line["lambda_train"], "entropy of p": lambda space, line: line["entropy"],
               "skip or noise operations": parameter_free, "eigenvalue": lambda space, line: line["alpha_eigenvalue"],
               "‖λ∇Λ‖ / ‖∇L‖": lambda space, line: line["lambda_grad_norm"] / line["loss_grad_norm"],
               "clipped steps, %": lambda space, line: 100 * line["clipped"],
               "search accuracy, %": lambda space, line: line["valid_accuracy"]}
    found = list(dict.fromkeys(case[0] for case in results))
    text, curves, tests = "", {}, {}
    for space in found:
        variants = list(dict.fromkeys(case[1] for case in results if case[0] == space))
        runs = {v: [result for case, result in results.items() if case[:2] == (space, v)] for v in variants}
        curves[space] = {number: {v: [[of(space, line) for line in run["search"]] for run in runs[v]] for v in variants}
                         for number, of in numbers.items()}
        tests[space] = {v: [run["eval"][-1]["test_accuracy"] for run in runs[v]] for v in variants}
        text += f"\n{space}, at the end:\n\n" + table(
            ["variant", "seeds", *numbers, "test accuracy, %", "parameters, k"],
            [[v, len(runs[v]), *(spread([row[-1] for row in curves[space][number][v]], 3) for number in numbers),
              spread(tests[space][v]), spread([run["parameters"] / 1e3 for run in runs[v]], 1)] for v in variants])
        epochs = sorted({round(k * (len(runs[variants[0]][0]["search"]) - 1) / 4) for k in range(5)})
        text += f"\n{space}, over the epochs:\n\n" + table(
            ["", "variant", *(f"epoch {epoch}" for epoch in epochs)],
            [[number, v, *(spread([row[epoch] for row in curves[space][number][v]], 3) for epoch in epochs)]
             for number in numbers for v in variants])
    if find_spec("matplotlib"):
        draw_collapse(Path(args.out, "collapse.png"), curves, tests)
    return text


def draw_collapse(path: Path, curves: dict, tests: dict[str, dict[str, list[float]]]) -> None:
    """A row a space, a column a number; the last column is the test accuracy of each seed's cells, and their mean."""
    left_out = "entropy of p", "clipped steps, %"
    curves = {space: {k: v for k, v in numbers.items() if k not in left_out} for space, numbers in curves.items()}
    columns = len(next(iter(curves.values()))) + 1
    figure, axes = pyplot().subplots(len(curves), columns, squeeze=False, layout="constrained",
                                     figsize=(2.7 * columns, 2.4 * len(curves) + 0.4))
    for row, (space, numbers) in zip(axes, curves.items()):
        row[0].set_ylabel(space, fontsize=12)
        for ax, (number, variants) in zip(row, numbers.items()):
            for variant, rows in variants.items():
                band(ax, range(len(rows[0])), rows, variant, color=f"C{list(VARIANTS).index(variant)}")
            ax.set_title(number, fontsize=10)
            ax.xaxis.get_major_locator().set_params(integer=True)
        for at, (variant, values) in enumerate(tests[space].items()):
            row[-1].plot([at] * len(values), values, "o", ms=4, alpha=0.6, color=f"C{list(VARIANTS).index(variant)}")
            row[-1].plot([at - 0.25, at + 0.25], [statistics.fmean(values)] * 2, color=f"C{list(VARIANTS).index(variant)}")
        row[-1].set_xticks(range(len(tests[space])), list(tests[space]), fontsize=8)
        row[-1].set_title("test accuracy, %", fontsize=10)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=8)
    for ax in axes[-1, :-1]:
        ax.set_xlabel("epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path)


if __name__ == "__main__":
    script(main)
