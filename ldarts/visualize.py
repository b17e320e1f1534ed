"""Cells, α and curves as pictures (extra `plot`: matplotlib).

    python -m ldarts.visualize LAMBDA_DARTS DARTS --format svg     # LAMBDA_DARTS.svg, DARTS.svg: the two cells
    python -m ldarts.visualize runs/one                            # cells, alphas and curves, into runs/one
    python -m ldarts.visualize runs/a runs/b runs/c --out seeds    # … of each, and seeds/curves.png: mean and band
"""
import math
import statistics
from pathlib import Path

import torch

from . import genotypes, spaces
from .errors import require
from .genotypes import Genotype
from .operations import OPS
from .runs import Parser, grouped, read_run, script

NODE, GAP, LANE = 0.62, 1.18, 0.3  # inches: width of a state, between two states, between two edges
CURVES = {  # metric -> title of its panel, in the order of the panels
    "valid_accuracy": "validation accuracy, %", "test_accuracy": "test accuracy, %",
    "true_cifar10": "the cell fully trained (NAS-Bench-201), %", "train_loss": "training loss",
    "lambda_train": "Λ, training batch", "entropy": "entropy of p, nats", "skip_connections": "skip connections, normal cell",
    "alpha_eigenvalue": "dominant eigenvalue of ∂²L_valid/∂α²", "lambda_grad_norm": "‖λ ∇Λ‖", "loss_grad_norm": "‖∇L‖",
    "clipped": "share of clipped steps",
}


def pyplot():
    """matplotlib.pyplot without a display. Raises InputError where matplotlib is not installed."""
    require("matplotlib", "drawing")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", facecolor="white")
    pyplot().close(figure)


def cell_graphs(genotype: "Genotype | str") -> dict[str, tuple[list[str], list[tuple[int, int, str]], tuple[int, ...]]]:
    """(names of the states, edges (from, to, operation), states that make the output) of each cell."""
    if isinstance(genotype, str):
        edges = [(j, i, op) for i, node in enumerate(genotypes.parse_arch(genotype), 1) for op, j in node]
        return {"cell": (["input", "1", "2", "output"], edges, ())}
    graphs = {}
    for part in ("normal", "reduce"):
        edges = [(j, 2 + k // 2, op) for k, (op, j) in enumerate(getattr(genotype, part))]
        names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(len(edges) // 2)), "$c_k$"]
        graphs[part] = names, edges, getattr(genotype, part + "_concat")
    return graphs


def lanes(edges: list[tuple[int, int, str]]) -> list[int]:
    """A lane for each edge, above (1, 2, …) or below (-1, -2, …) the states: no two edges overlap in one lane."""
    found: dict[int, int] = {}
    for k in sorted(range(len(edges)), key=lambda k: edges[k][1] - edges[k][0]):  # the short ones lie inside
        j, i, _ = edges[k]
        side = (-1) ** [e for e, edge in enumerate(edges) if edge[1] == i].index(k)  # a state's edges take turns
        lane = side
        while any(lane == taken and j < edges[e][1] and edges[e][0] < i for e, taken in found.items()):
            lane += side
        found[k] = lane
    return [found[k] for k in range(len(edges))]


def draw_cell(ax, names: list[str], edges: list[tuple[int, int, str]], concat: tuple[int, ...]) -> None:
    """One cell, its states from left to right. Labels stand between two states, where no line runs up or down."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Outline
    at, out = lanes(edges), len(names) - 1
    bus = min(at) - 1  # the lane of what is concatenated
    edges, at = edges + [(j, out, "") for j in concat], at + [bus] * len(concat)

    def port(state: int, lane: int, incoming: bool) -> float:
        """Where on its state an edge ends; in this order no two edges of a state cross."""
        side = [(l, i == state) for (j, i, _), l in zip(edges, at) if state in (j, i) and l * lane > 0]
        order = sorted(set(side), key=lambda e: (not e[1], abs(e[0]) if e[1] else -abs(e[0])))
        step = min(0.12, (NODE - 0.12) / len(order))
        return state * (NODE + GAP) + step * (order.index((lane, incoming)) - (len(order) - 1) / 2)

    for (j, i, op), lane in zip(edges, at):
        x0, x1, up = port(j, lane, False), port(i, lane, True), math.copysign(1, lane)
        foot, y, r = 0.17 * up, (0.17 + LANE * abs(lane)) * up, 0.12
        points = [(x0, foot), (x0, y - r * up), (x0, y), (x0 + r, y), (x1 - r, y), (x1, y), (x1, y - r * up), (x1, foot)]
        codes = [Outline.MOVETO, Outline.LINETO, Outline.CURVE3, Outline.CURVE3, Outline.LINETO, Outline.CURVE3,
                 Outline.CURVE3, Outline.LINETO]
        colour = pyplot().get_cmap("tab20")(list(OPS).index(op)) if op else "0.7"
        free = not op or op in ("skip_connect", "none", "noise") or "pool" in op
        ax.add_patch(FancyArrowPatch(path=Outline(points, codes), arrowstyle="-|>", mutation_scale=9, lw=1.8,
                                     color=colour, ls=(0, (3, 1.5)) if free and op else "-", zorder=1))
        if op:
            ax.text(i * (NODE + GAP) - (NODE + GAP) / 2, y, op, ha="center", va="center", fontsize=9.5, zorder=3,
                    bbox=dict(fc="white", ec="none", pad=1))
    for state, name in enumerate(names):
        ax.add_patch(FancyBboxPatch((state * (NODE + GAP) - NODE / 2, -0.13), NODE, 0.26, zorder=2, fc="0.93", ec="0.4",
                                    boxstyle="round,pad=0.04"))
        ax.text(state * (NODE + GAP), 0, name, ha="center", va="center", fontsize=11, zorder=3)
    ax.set(xlim=(-NODE, out * (NODE + GAP) + NODE), aspect="equal",
           ylim=((0.45 + LANE * abs(min(at))) * -1, 0.45 + LANE * max(at)))
    ax.axis("off")


def draw_cells(genotype: "Genotype | str", path: Path) -> None:
    """The cells as graphs; an operation without weights is dashed, the concatenated output grey."""
    graphs = cell_graphs(genotype)
    heights = [0.9 + LANE * (max(at) - min(at) + 1) for at in (lanes(edges) for _, edges, _ in graphs.values())]
    width = max(len(names) for names, _, _ in graphs.values()) * (NODE + GAP)
    figure, axes = pyplot().subplots(len(graphs), squeeze=False, figsize=(width, sum(heights) + 0.3 * len(graphs)),
                                     height_ratios=heights)
    for ax, (part, graph) in zip(axes[:, 0], graphs.items()):
        draw_cell(ax, *graph)
        ax.set_title(part, loc="left", fontsize=12)
    save(figure, path)


def draw_alphas(space: str, alphas: list[list[list[list[float]]]], genotype: "Genotype | str", path: Path) -> None:
    """p = softmax(α) over the epochs, a panel an edge, those of the genotype framed and their operation marked.

    alphas: α of each epoch, of each type of cell [edges, ops]
    """
    primitives, graphs = spaces.get(space), cell_graphs(genotype)
    figure = pyplot().figure(figsize=(9.5, 5.2 * len(graphs)), layout="constrained")
    for block, (part, (names, chosen, _)), rows, k in zip(
            figure.subfigures(len(graphs), squeeze=False)[:, 0], graphs.items(), primitives, range(2)):
        p = torch.stack([torch.tensor(epoch[k]).softmax(-1) for epoch in alphas])  # [epochs, edges, ops]
        first = 1 if isinstance(genotype, str) else 2
        pairs = [(j, i) for i in range(first, 20) for j in range(i)][: len(rows)]
        last = pairs[-1][1]
        axes = block.subplots(last - first + 1, last, squeeze=False)
        block.suptitle(f"{part}: softmax(α) by epoch", fontsize=11)
        for ax in axes.flat:
            ax.set_axis_off()
        for e, (j, i) in enumerate(pairs):
            ax = axes[i - first, j]
            ax.set_axis_on()
            image = ax.imshow(p[:, e].T.numpy(), aspect="auto", vmin=0, vmax=float(p.max()), cmap="viridis", interpolation="nearest")
            ax.set_title(f"{names[j]} → {names[i]}", fontsize=8, pad=3)
            labelled = j == 0 or len(set(rows)) > 1
            ax.set_yticks(range(len(rows[e])), rows[e] if labelled else [""] * len(rows[e]), fontsize=7)
            ax.set_xticks([0, len(p) - 1] if i == last and len(p) > 1 else [])
            ax.tick_params(labelsize=7, length=2)
            for op in (op for a, b, op in chosen if (a, b) == (j, i)):
                ax.plot(len(p) - 0.75, rows[e].index(op), "<", color="tab:red", ms=6, clip_on=False)
                for spine in ax.spines.values():
                    spine.set(color="tab:red", linewidth=2)
        block.colorbar(image, ax=axes, shrink=0.6)
    save(figure, path)


def band(ax, x, rows: list[list[float]], label: str, shade: bool = True, **style) -> None:
    """The mean of several curves over x, and, with `shade`, a band of one standard deviation to either side."""
    mean = [statistics.fmean(values) for values in zip(*rows)]
    line, = ax.plot(x, mean, label=label, **style)
    if shade and len(rows) > 1:
        deviation = [statistics.stdev(values) for values in zip(*rows)]
        ax.fill_between(x, [m - d for m, d in zip(mean, deviation)], [m + d for m, d in zip(mean, deviation)], lw=0,
                        color=line.get_color(), alpha=0.2)


def draw_curves(groups: dict[str, list[list[dict]]], path: Path) -> None:
    """The metrics of groups of runs over the epochs, mean and band. groups: name -> metrics of each run"""
    shown = [name for name in CURVES if any(name in line for runs in groups.values() for run in runs for line in run)]
    columns = min(3, len(shown))
    figure, axes = pyplot().subplots(-(-len(shown) // columns), columns, squeeze=False, layout="constrained",
                                     figsize=(3.6 * columns, 2.5 * -(-len(shown) // columns)))
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
    across = max(1, min(len(labels), 60 * columns // (8 + max(map(len, labels)))))  # as many as fit the width
    figure.legend(handles, labels, loc="outside lower center", ncols=across, fontsize=8)
    save(figure, path)


def draw_run(path: str | Path, suffix: str = "png") -> list[Path]:
    """cells, alphas (of a search) and curves of one run, into its folder -> what was written."""
    config, metrics = read_run(path)
    genotype, folder = genotypes.load(str(path)), Path(path)
    written = [folder / f"{name}.{suffix}" for name in ("cells", "curves", "alphas")]
    draw_cells(genotype, written[0])
    draw_curves({folder.name: [metrics]}, written[1])
    if "alphas" not in metrics[-1]:
        return written[:2]
    draw_alphas(config["search_space"], [line["alphas"] for line in metrics], genotype, written[2])
    return written


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="+", metavar="RUN|NAME", help="a run folder, or a cell as train_eval.py takes it")
    parser.add_argument("--out", default=".", help="folder for what belongs to no single run")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    args = parser.parse_args()
    pyplot()
    runs = [name for name in args.what if (Path(name) / "config.json").is_file()]
    written = []
    for name in args.what:
        if name in runs:
            written += draw_run(name, args.format)
        else:
            stem = "cell" if name.startswith("|") else Path(name).stem
            written.append(Path(args.out, f"{stem}.{args.format}"))
            draw_cells(genotypes.load(name), written[-1])
    if len(runs) > 1:
        written.append(Path(args.out, f"curves.{args.format}"))
        draw_curves({name: [read_run(path)[1] for path in paths] for name, paths in grouped(runs).items()}, written[-1])
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    script(main)
