"""Pictures of cells, α and curves (needs matplotlib).

    python -m ldarts.visualize LAMBDA_DARTS DARTS --format svg   # LAMBDA_DARTS.svg, DARTS.svg: the two cells
    python -m ldarts.visualize runs/one                          # cells, α, shares and curves, in runs/one
    python -m ldarts.visualize runs/a runs/b --out seeds         # and in seeds/curves.png mean and deviation
"""
import math
from itertools import chain
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor

from . import genotypes, spaces
from .errors import require
from .genotypes import Genotype, is_text
from .nasbench201 import SETS, searched_set
from .operations import OPS
from .runs import Parser, grouped, read_run, script

PITCH, HEIGHT = 1.8, 0.36  # inches: from state to state; height of an edge's arc per state that it advances
CURVES = {  # metric -> title of its panel, in the order of the panels
    "valid_accuracy": "validation accuracy, %", "test_accuracy": "test accuracy, %",
    **{f"true_{name}": f"the cell fully trained on {shown}, %" for name, shown in SETS.items()},
    "train_loss": "training loss", "lambda_train": "Λ, training batch",
    "entropy": "entropy of p, nats", "skip_connections": "skip connections, normal cell",
    "alpha_eigenvalue": "dominant eigenvalue of ∂²L_valid/∂α²",
    "lambda_grad_norm": "‖λ ∇Λ‖", "loss_grad_norm": "‖∇L‖", "clipped": "share of clipped steps",
}


class Edge(NamedTuple):
    source: int
    target: int
    operation: str


Graph = tuple[list[str], list[Edge], tuple[int, ...]]  # names of states, edges, concatenated states


def pyplot():
    """matplotlib.pyplot without a display. Raises InputError if matplotlib is not installed."""
    require("matplotlib", "drawing")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")
    pyplot().close(figure)


def cell_graphs(genotype: Genotype | str) -> dict[str, Graph]:
    """The graph of each type of cell."""
    if isinstance(genotype, str):
        nodes = genotypes.parse_arch(genotype)
        edges = [Edge(source, target, op) for target, node in enumerate(nodes, 1) for op, source in node]
        return {"cell": (["input", "1", "2", "output"], edges, ())}
    graphs = {}
    for part in ("normal", "reduce"):
        pairs = getattr(genotype, part)
        edges = [Edge(source, 2 + k // 2, op) for k, (op, source) in enumerate(pairs)]
        names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(len(pairs) // 2)), "$c_k$"]
        graphs[part] = names, edges, getattr(genotype, part + "_concat")
    return graphs


def sides(edges: list[Edge]) -> list[int]:
    """1 for an edge above the states, -1 for one below: the edges into a state alternate."""
    targets = [edge.target for edge in edges]
    return [(-1) ** targets[:k].count(target) for k, target in enumerate(targets)]


def top_of_arc(edge: Edge, side: int) -> tuple[float, float]:
    """Where the label of an edge is, in inches."""
    return PITCH * (edge.source + edge.target) / 2, side * (0.15 + HEIGHT * (edge.target - edge.source))


def draw_cell(ax, names: list[str], edges: list[Edge], concat: tuple[int, ...]) -> None:
    """One cell: states from left to right, edges as arcs, below them grey ones for the concatenation."""
    from matplotlib.patches import FancyArrowPatch
    output, colours = len(names) - 1, pyplot().get_cmap("tab20")
    above_or_below = sides(edges) + [-1] * len(concat)
    for edge, side in zip(edges + [Edge(state, output, "") for state in concat], above_or_below):
        op = edge.operation
        start, end = ((PITCH * state, 0.15 * side) for state in (edge.source, edge.target))
        colour = colours(list(OPS).index(op)) if op else "0.8"
        weightless = op in ("skip_connect", "none", "noise") or "pool" in op
        ax.add_patch(FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={-2 * side * HEIGHT / PITCH}", shrinkA=0, shrinkB=0,
            color=colour, ls=(0, (3, 1.5)) if weightless else "-", lw=1.8, arrowstyle="-|>", mutation_scale=9,
            zorder=2 if op else 1))
        ax.text(*top_of_arc(edge, side), op, ha="center", va="center", fontsize=9.5, zorder=3,
                bbox=dict(fc="white", ec="none", pad=1 if op else 0))
    for state, name in enumerate(names):
        ax.text(PITCH * state, 0, name, ha="center", va="center", fontsize=11, zorder=4,
                bbox=dict(boxstyle="round", fc="0.93", ec="0.4"))
    reach = reach_of(edges)
    ax.set(xlim=(-0.6, PITCH * output + 0.6), ylim=(-reach, reach), aspect="equal")
    ax.axis("off")


def reach_of(edges: list[Edge]) -> float:
    """How far a cell reaches above and below its states, in inches."""
    return HEIGHT * max(edge.target - edge.source for edge in edges) + 0.5


def draw_cells(genotype: Genotype | str, path: Path) -> None:
    """The cells as graphs. Operations without weights are dashed, the concatenation is grey."""
    graphs = cell_graphs(genotype)
    width = PITCH * max(len(names) for names, _, _ in graphs.values())
    heights = [2 * reach_of(edges) + 0.3 for _, edges, _ in graphs.values()]
    figure, axes = pyplot().subplots(len(graphs), squeeze=False, layout="constrained", height_ratios=heights,
                                     figsize=(width, sum(heights)))
    for ax, (part, graph) in zip(axes[:, 0], graphs.items()):
        draw_cell(ax, *graph)
        ax.set_title(part, loc="left", fontsize=12)
    save(figure, path)


def draw_alphas(space: str, alphas: list[list], genotype: Genotype | str, path: Path) -> None:
    """p = softmax(α) over the epochs, a panel for each edge. Edges of the genotype have a frame and a mark at
    their operation. Colours show p minus its value for equal operations, on one scale for all panels.

    alphas: for each epoch, for each type of cell, α [edges, ops]
    """
    graphs = cell_graphs(genotype)
    types = [torch.tensor(epochs).softmax(-1) for epochs in zip(*alphas)]  # each: [epochs, edges, ops]
    distances = [p - 1 / p.shape[-1] for p in types]
    reach = max(1e-6, *(float(distance.abs().max()) for distance in distances))
    figure = pyplot().figure(figsize=(9.5, 5.2 * len(graphs)), layout="constrained")
    blocks = figure.subfigures(len(graphs), squeeze=False)[:, 0]
    for block, part, operations, distance in zip(blocks, graphs, spaces.get(space), distances):
        block.suptitle(f"{part}: softmax(α) by epoch", fontsize=11)
        draw_type(block, graphs[part], operations, distance, reach)
    save(figure, path)


def draw_type(block, graph: Graph, operations: tuple[tuple[str, ...], ...], distance: Tensor, reach: float):
    """The edges of one type of cell: a row for each target, a column for each source.

    distance: [epochs, edges, ops]
    """
    names, derived, _ = graph
    targets = sorted({edge.target for edge in derived})
    grid = block.add_gridspec(len(targets), targets[-1])
    pairs = [(source, target) for target in targets for source in range(target)]
    for e, (source, target) in enumerate(pairs):
        ax = block.add_subplot(grid[target - targets[0], source])
        chosen = [edge.operation for edge in derived if edge[:2] == (source, target)]
        image = draw_panel(ax, distance[:, e], operations[e], chosen, reach)
        ax.set_title(f"{names[source]} → {names[target]}", fontsize=8, pad=3)
        if source > 0 and len(set(operations)) == 1:
            ax.set_yticklabels([])
        if target < targets[-1]:
            ax.set_xticks([])
    bar = block.colorbar(image, ax=block.axes, shrink=0.6)
    bar.set_label(f"p − 1/{distance.shape[-1]}, up to ±{reach:.2g}", fontsize=9)
    bar.set_ticks([-reach, 0, reach], labels=[f"−{reach:.2g}", "0", f"+{reach:.2g}"], fontsize=8)


def draw_panel(ax, distance: Tensor, operations: tuple[str, ...], chosen: list[str], reach: float):
    """The panel of one edge. distance: [epochs, ops]; chosen: its operations in the genotype"""
    last = len(distance) - 1
    image = ax.imshow(distance.T.numpy(), vmin=-reach, vmax=reach, cmap="RdBu_r", aspect="auto",
                      interpolation="nearest")
    ax.set_yticks(range(len(operations)), operations)
    ax.set_xticks([0, last] if last else [])
    ax.tick_params(labelsize=7, length=2)
    for op in chosen:
        ax.annotate("◀", (1, operations.index(op)), (3, 0), xycoords=ax.get_yaxis_transform(),
                    textcoords="offset points", va="center", fontsize=7)
        ax.spines[:].set(color="black", linewidth=2)
    return image


def band(ax, x, rows: list[list[float]], label: str, shade: bool = True, **style) -> None:
    """The mean of several curves over x; with `shade` also a band of one standard deviation around it."""
    values = torch.tensor(rows, dtype=torch.float64)
    mean = values.mean(0)
    line, = ax.plot(x, mean, label=label, **style)
    if shade and len(rows) > 1:
        deviation = values.std(0)
        ax.fill_between(x, mean - deviation, mean + deviation, lw=0, color=line.get_color(), alpha=0.2)


def draw_curves(groups: dict[str, list[list[dict]]], path: Path) -> None:
    """Metrics of groups of runs over the epochs: mean and deviation. groups: name -> metrics of each run"""
    runs = chain.from_iterable(groups.values())
    logged = set().union(*chain.from_iterable(runs))
    shown = [name for name in CURVES if name in logged]
    columns = min(3, len(shown))
    height = math.ceil(len(shown) / columns)
    figure, axes = pyplot().subplots(height, columns, squeeze=False, layout="constrained",
                                     figsize=(3.6 * columns, 2.5 * height))
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, shown):
        for label, runs in groups.items():
            rows = [[line[name] for line in run if name in line] for run in runs]
            length = min(map(len, rows))
            if length:
                band(ax, range(length), [row[:length] for row in rows], f"{label} (n = {len(rows)})",
                     marker="." if length < 3 else None)
        ax.set_title(CURVES[name], fontsize=9)
        ax.tick_params(labelsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    for ax in axes.flat[max(0, len(shown) - columns) : len(shown)]:
        ax.set_xlabel("epoch", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    across = min(len(labels), 60 * columns // (8 + max(map(len, labels))))  # as many as fit in the width
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, across), fontsize=8)
    save(figure, path)


def draw_shares(groups: dict[str, list[list[list[float]]]], path: Path) -> None:
    """Each cell's share in the gradient by α over the epochs: a panel for each group, its runs averaged.

    groups: name -> for each run, for each epoch, the cells' shares. Cells go from input (below) to output;
    white is a share of 1/n.
    """
    means = {}  # of each group [epochs, cells]
    for label, runs in groups.items():
        length = min(map(len, runs))
        means[label] = torch.tensor([run[:length] for run in runs]).mean(0)
    equal = 1 / next(iter(means.values())).shape[1]
    # If cells cancel each other, one share may be far from all others; it should not fade the rest.
    reach = float(torch.cat([share.flatten() for share in means.values()]).sub(equal).abs().quantile(0.95))
    figure, axes = pyplot().subplots(1, len(means), squeeze=False, sharey=True, layout="constrained",
                                     figsize=(1.4 + 3.2 * len(means), 3.2))
    for ax, (label, share) in zip(axes[0], means.items()):
        image = ax.imshow(share.T.numpy(), vmin=equal - reach, vmax=equal + reach, cmap="RdBu_r",
                          aspect="auto", interpolation="nearest", origin="lower")
        ax.set_title(f"{label} (n = {len(groups[label])})", fontsize=9)
        ax.set_xlabel("epoch", fontsize=8)
        ax.tick_params(labelsize=8)
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("normal cell, from input to output", fontsize=8)
    figure.colorbar(image, ax=axes, extend="both").set_label("share in the gradient by α", fontsize=8)
    save(figure, path)


def metrics_of(path: str | Path) -> list[dict]:
    """A run's metrics; of the true accuracies of its cell only that on the set that was searched."""
    config, metrics = read_run(path)
    others = {f"true_{name}" for name in SETS if name != searched_set(config.get("dataset"))}
    return [{name: value for name, value in line.items() if name not in others} for line in metrics]


def draw_run(path: str | Path, suffix: str = "png") -> list[Path]:
    """Draw cells, curves and, for a search, alphas and shares into the run's folder; return the new paths."""
    config, metrics = read_run(path)
    genotype, folder, written = genotypes.load(str(path)), Path(path), []

    def draw(function: Callable, name: str, *what: Any) -> None:
        written.append(folder / f"{name}.{suffix}")
        function(*what, written[-1])

    draw(draw_cells, "cells", genotype)
    draw(draw_curves, "curves", {folder.name: [metrics_of(path)]})
    if "alphas" in metrics[-1]:
        draw(draw_alphas, "alphas", config["search_space"], [line["alphas"] for line in metrics], genotype)
    if "cell_shares" in metrics[-1]:
        draw(draw_shares, "shares", {folder.name: [[line["cell_shares"] for line in metrics]]})
    return written


def file_names(cells: list[str]) -> dict[str, str]:
    """The name of each cell's picture, without suffix: that of its file, or a number after it."""
    stems = ["cell" if is_text(cell) else Path(cell.replace(".py:", "/")).stem for cell in cells]
    repeated = [stems[:k].count(stem) for k, stem in enumerate(stems)]
    return {cell: f"{stem}-{k + 1}" if k else stem for cell, stem, k in zip(cells, stems, repeated)}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="+", metavar="RUN|NAME",
                        help="a run folder, or a cell as train_eval.py takes it")
    parser.add_argument("--out", default=".", help="folder for pictures of cells and of several runs")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    args = parser.parse_args()
    pyplot()
    what = list(dict.fromkeys(args.what))
    runs = [name for name in what if not is_text(name) and Path(name, "config.json").is_file()]
    names = file_names([name for name in what if name not in runs])
    written = []
    for name in what:
        if name in runs:
            written += draw_run(name, args.format)
        else:
            written.append(Path(args.out, f"{names[name]}.{args.format}"))
            draw_cells(genotypes.load(name), written[-1])
    if len(runs) > 1:
        written.append(Path(args.out, f"curves.{args.format}"))
        groups = {name: [*map(metrics_of, paths)] for name, paths in grouped(runs).items()}
        draw_curves(groups, written[-1])
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    script(main)
