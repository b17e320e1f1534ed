"""Does the gradient of Λ raise Λ? Every way to it, at moments of a search."""
import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architect import Architect, Batch, search_step
from ..data import Batches, load
from ..model_search import SearchNetwork
from ..runs import seed_everything, spread, table
from ..visualize import band, pyplot, save


def case(args, space: str, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """The rows of measure() at each moment of one search."""
    train_set, _ = load(args.dataset, args.data, device, seed, size=args.image_size)
    halves = torch.arange(len(train_set.labels)).tensor_split(2)
    streams = [Batches(train_set, half, args.batch_size, seed, tag=tag, augment=True,
                       memory_format=torch.channels_last) for half, tag in zip(halves, ("train", "valid"))]
    # Of an epoch that the search never reaches: new crops of the images of w, and of those that w never saw.
    same, held_out = ([batch for batch, _ in zip(stream.epoch(args.epochs), range(count))]
                      for stream, count in zip(streams, (args.batches, args.held_out)))
    return [{"step": step, **row}
            for step, net in search(args, space, seed, train_set.num_classes, streams, device)
            for row in measure(args, net, same, held_out)]


def search(args, space: str, seed: int, num_classes: int, streams: list[Batches],
           device: torch.device) -> Iterator[tuple[int, SearchNetwork]]:
    """(steps taken, supernet) at each of args.steps and at the end of a first-order search as published."""
    seed_everything(seed)
    net = SearchNetwork(args.init_channels, num_classes, args.layers, space).to(
        device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, 0.001)
    arch, step = Architect(net, F.cross_entropy, args.arch_learning_rate), 0
    for epoch in range(args.epochs):
        for train, valid in zip(*(stream.epoch(epoch) for stream in streams)):
            if step in args.steps:
                yield step, net
            search_step(arch, optimizer, train, valid, unrolled=False, alpha_first=True, kind="cosine",
                        epsilon=1e-4, lambda_t=args.lambda_reg * epoch / max(1, args.epochs - 1),
                        method="central", grad_clip=5.0)
            step += 1
        scheduler.step()
    yield step, net


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def measure(args, net: SearchNetwork, batches: list[Batch],
            held_out: list[Batch]) -> Iterator[dict[str, Any]]:
    """One row for each batch, kind of Λ, precision and direction in which the weights could go.

    norm, loss_norm: of the direction before it is scaled, and of ∇L; cosine: with the double backward in
    float64; same, held_out: ΔΛ in float32 after a step of args.length along the direction, on the batch and
    on each held-out one.
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
        """Λ on the batch and on each held-out one, at the origin or a step along the direction from it."""
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
                generator = torch.Generator().manual_seed(b)
                drawn = torch.randn(len(dw), dtype=torch.float64, generator=generator).to(device)
                directions = [("exact", None, exact)]
                if dtype == args.dtypes[0]:
                    directions += [("−∇L", None, -dw), ("random", None, drawn)]
                directions += [(method, epsilon, grads(dtype, batch, kind, epsilon, method)[1])
                               for method in ("central",) for epsilon in args.epsilons]
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
Directions = dict[tuple[str, float | None], list[dict[str, Any]]]  # (estimator, ε₀) -> rows of seeds, batches


def report(args, results: dict[tuple[str, ...], list[dict[str, Any]]]) -> str:
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
            draw(moments, Path(args.out, f"{space}-{kind}.png"))
    return text


def draw(moments: dict[tuple[str, int], Directions], path: Path) -> None:
    """A column a moment, a row a number; colour: direction, line style: precision, the first with bands."""
    numbers, steps = list(NUMBERS.items())[1:], sorted({step for _, step in moments})
    figure, axes = pyplot().subplots(len(numbers), len(steps), squeeze=False, sharex=True, sharey="row",
                                     figsize=(1.2 + 2.9 * len(steps), 2.4 * len(numbers)),
                                     layout="constrained")
    colours = {"central": "C0", "forward": "C1", "exact": "C2", "−∇L": "C4", "random": "0.5"}
    styles, first = {"float32": "-", "float64": "--", "bfloat16": ":"}, next(iter(moments))[0]
    for (dtype, step), directions in moments.items():
        epsilons = sorted({epsilon for _, epsilon in directions if epsilon is not None})
        for row, (number, of) in zip(axes, numbers):
            ax = row[steps.index(step)]
            for name, colour in colours.items():
                by_epsilon = ([v for r in directions.get((name, e), directions.get((name, None), ()))
                               for v in of(r)] for e in epsilons)
                if rows := list(zip(*by_epsilon)):
                    band(ax, epsilons, rows, f"{name}, {dtype}", dtype == first,
                         color=colour, ls=styles[dtype])
            ax.set(xscale="log", ylabel=number if step == steps[0] else None)
            ax.grid(alpha=0.3)
    for column, step in zip(axes.T, steps):
        column[0].set_title(f"after {step} steps")
        column[-1].set_xlabel("ε₀")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(figure, path)
