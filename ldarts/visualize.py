"""Pictures of cells, α and curves (needs matplotlib).

    python -m ldarts.visualize LAMBDA_DARTS DARTS --format svg   # LAMBDA_DARTS.svg, DARTS.svg: the two cells
    python -m ldarts.visualize runs/one                          # cells, α, shares and curves, in runs/one
    python -m ldarts.visualize runs/a runs/b --out seeds         # and in seeds/curves.png mean and deviation
"""
import io
import math
import os
from itertools import zip_longest
from pathlib import Path

import torch

from . import genotypes, spaces
from .errors import require
from .genotypes import Genotype, is_text
from .nasbench201 import SETS, searched_set
from .operations import OPS
from .runs import Parser, grouped, read_config, read_run, script
from .runs.files import write_atomically

PITCH, HEIGHT = 1.8, 0.36  # inches: from state to state; height of an edge's arc per state that it advances
HEAT_MAP = dict(cmap="RdBu_r", aspect="auto", interpolation="nearest")  # blue, white in the middle, red
CURVES = {  # metric -> title of its panel, in the order of the panels
    "valid_accuracy": "validation accuracy, %", "test_accuracy": "test accuracy, %",
    **{f"true_{name}": f"the cell fully trained on {shown}, %" for name, shown in SETS.items()},
    "train_loss": "training loss", "lambda_train": "Λ, training batch",
    "entropy": "entropy of p, nats", "skip_connections": "skip connections, normal cell",
    "alpha_eigenvalue": "dominant eigenvalue of ∂²L_valid/∂α²",
    "lambda_grad_norm": "‖λ ∇Λ‖", "loss_grad_norm": "‖∇L‖", "clipped": "share of clipped steps",
}


def pyplot():
    """matplotlib.pyplot without a display. Raises InputError if matplotlib is not installed."""
    require("matplotlib", "drawing")
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save(figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=120, bbox_inches="tight", facecolor="white")
    pyplot().close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.getvalue())
    return path


def cell_graphs(genotype: Genotype | str) -> dict[str, tuple[list[str], list[tuple]]]:
    """The names of the states, and the edges, of each type of cell.

    An edge is (source, target, operation, side); side: 1 if it is drawn above the states, -1 if below. The
    operation of an edge into the concatenation is "".
    """
    if isinstance(genotype, str):
        pairs = [(source, target) for target in (1, 2, 3) for source in range(target)]
        edges = [(*pair, op, (-1) ** pair[0]) for pair, op in zip(pairs, genotypes.parse_arch(genotype))]
        return {"cell": (["input", "1", "2", "output"], edges)}
    graphs = {}
    for part in ("normal", "reduce"):
        pairs, concat = getattr(genotype, part), getattr(genotype, part + "_concat")
        last = 2 + len(pairs) // 2  # the concatenation
        names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(last - 2)), "$c_k$"]
        edges = [(source, 2 + k // 2, op, (-1) ** k) for k, (op, source) in enumerate(pairs)]
        graphs[part] = names, edges + [(state, last, "", -1) for state in concat]
    return graphs


def draw_cells(genotype: Genotype | str, path: Path) -> Path:
    """The cells as graphs: states from left to right, edges as arcs. Operations without weights are dashed,
    the concatenation is grey."""
    from matplotlib.patches import FancyArrowPatch
    graphs, colours = cell_graphs(genotype), pyplot().get_cmap("tab20")
    width = PITCH * max(len(names) for names, _ in graphs.values())
    reaches = [0.5 + HEIGHT * max(target - source for source, target, op, _ in edges if op)
               for _, edges in graphs.values()]  # inches above and below the states
    heights = [2 * reach + 0.3 for reach in reaches]
    figure, axes = pyplot().subplots(len(graphs), squeeze=False, layout="constrained", height_ratios=heights,
                                     figsize=(width, sum(heights)))
    for ax, reach, (part, (names, edges)) in zip(axes[:, 0], reaches, graphs.items()):
        for source, target, op, side in edges:
            weightless = op in ("skip_connect", "none", "noise") or "pool" in op
            ax.add_patch(FancyArrowPatch(
                (PITCH * source, 0.15 * side), (PITCH * target, 0.15 * side), shrinkA=0, shrinkB=0, lw=1.8,
                connectionstyle=f"arc3,rad={-2 * side * HEIGHT / PITCH}", arrowstyle="-|>", mutation_scale=9,
                color=colours(list(OPS).index(op)) if op else "0.8", ls=(0, (3, 1.5)) if weightless else "-",
                zorder=2 if op else 1))
            top = side * (0.15 + HEIGHT * (target - source))
            ax.text(PITCH * (source + target) / 2, top, op, ha="center", va="center", fontsize=9.5, zorder=3,
                    bbox=dict(fc="white", ec="none", pad=1 if op else 0))
        for state, name in enumerate(names):
            ax.text(PITCH * state, 0, name, ha="center", va="center", fontsize=11, zorder=4,
                    bbox=dict(boxstyle="round", fc="0.93", ec="0.4"))
        ax.set(xlim=(-0.6, PITCH * (len(names) - 1) + 0.6), ylim=(-reach, reach), aspect="equal")
        ax.set_title(part, loc="left", fontsize=12)
        ax.axis("off")
    return save(figure, path)


def draw_alphas(space: str, alphas: list[list], genotype: Genotype | str, path: Path) -> Path:
    """p = softmax(α) over the epochs: a panel for each edge, rows by target, columns by source. Edges of the
    genotype have a frame and a mark at their operation. Colours show p minus its value for equal operations,
    on one scale for all panels.

    alphas: for each epoch, for each type of cell, α [edges, ops]
    """
    graphs, last_epoch = cell_graphs(genotype), len(alphas) - 1
    distances = [p - 1 / p.shape[-1] for p in (torch.tensor(epochs).softmax(-1) for epochs in zip(*alphas))]
    reach = max(1e-6, *(float(distance.abs().max()) for distance in distances))
    figure = pyplot().figure(figsize=(9.5, 5.2 * len(graphs)), layout="constrained")
    blocks = figure.subfigures(len(graphs), squeeze=False)[:, 0]
    for block, part, operations, distance in zip(blocks, graphs, spaces.get(space), distances):
        block.suptitle(f"{part}: softmax(α) by epoch", fontsize=11)
        names, edges = graphs[part]
        targets = sorted({target for _, target, op, _ in edges if op})
        grid = block.add_gridspec(len(targets), targets[-1])
        pairs = [(source, target) for target in targets for source in range(target)]
        for (source, target), ops, values in zip(pairs, operations, distance.unbind(1)):
            ax = block.add_subplot(grid[target - targets[0], source])
            image = ax.imshow(values.T.numpy(), vmin=-reach, vmax=reach, **HEAT_MAP)
            ax.set_title(f"{names[source]} → {names[target]}", fontsize=8, pad=3)
            ax.set_yticks(range(len(ops)), ops)
            ax.set_xticks([0, last_epoch] if last_epoch and target == targets[-1] else [])
            ax.tick_params(labelsize=7, length=2, labelleft=source == 0 or len(set(operations)) > 1)
            for op in [op for start, end, op, _ in edges if (start, end) == (source, target)]:
                ax.annotate("◀", (1, ops.index(op)), (3, 0), xycoords=ax.get_yaxis_transform(),
                            textcoords="offset points", va="center", fontsize=7)
                ax.spines[:].set(color="black", linewidth=2)
        bar = block.colorbar(image, ax=block.axes, shrink=0.6)
        bar.set_label(f"p − 1/{distance.shape[-1]}, up to ±{reach:.2g}", fontsize=9)
        bar.set_ticks([-reach, 0, reach], labels=[f"−{reach:.2g}", "0", f"+{reach:.2g}"], fontsize=8)
    return save(figure, path)


def panels(titles: list[str], columns: int, size: tuple[float, float], **options):
    """A figure, and a panel for each title, with epochs along x. size: of a panel, in inches"""
    rows = math.ceil(len(titles) / columns)
    figure, axes = pyplot().subplots(rows, columns, squeeze=False, layout="constrained",
                                     figsize=(size[0] * columns, size[1] * rows), **options)
    for ax in axes.flat[len(titles) :]:
        ax.set_axis_off()
    for k, (ax, title) in enumerate(zip(axes.flat, titles)):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("epoch" if k >= len(titles) - columns else "", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes.flat[: len(titles)]


def titled(label: str, runs: list) -> str:
    return f"{label} (n = {len(runs)})".replace("$", r"\$")  # or matplotlib reads it as a formula


def draw_curves(groups: dict[str, list[list[dict]]], path: Path) -> Path:
    """Metrics of groups of runs over the epochs: the mean, and a band of one standard deviation around it.

    groups: name -> metrics of each run
    """
    logged = {name for runs in groups.values() for run in runs for line in run for name in line}
    shown = [name for name in CURVES if name in logged]
    columns = min(3, len(shown))
    figure, axes = panels([CURVES[name] for name in shown], columns, (3.6, 2.5))
    for ax, name in zip(axes, shown):
        for k, (label, runs) in enumerate(groups.items()):
            rows = zip_longest(*([line.get(name, math.nan) for line in run] for run in runs),
                               fillvalue=math.nan)  # of runs that have not come so far
            values = torch.tensor([*rows], dtype=torch.float64).view(-1, len(runs))  # [epochs, runs]
            mean = values.nanmean(1)
            marker, style = "." if mean.isfinite().sum() < 3 else None, ("-", "--", ":", "-.")[k // 10 % 4]
            ax.plot(mean, label=titled(label, runs), color=f"C{k}", marker=marker, ls=style)
            if len(runs) > 1:
                squares, counts = (values - mean[:, None]).square(), values.isfinite().sum(1)
                deviation = (squares.nansum(1) / (counts - 1)).sqrt()  # of one run: not a number, no band
                ax.fill_between(range(len(mean)), mean - deviation, mean + deviation, lw=0, color=f"C{k}",
                                alpha=0.2)
        ax.grid(alpha=0.3)
    lines = {line.get_label(): line for ax in axes for line in ax.lines}
    across = max(1, 60 * columns // (8 + max(map(len, lines))))  # as many as fit in the width
    figure.legend(lines.values(), list(lines), loc="outside lower center", ncols=across, fontsize=8)
    return save(figure, path)


def draw_shares(groups: dict[str, list[list[list[float]]]], path: Path) -> Path:
    """Each cell's share in the gradient w.r.t. α over the epochs: a panel for each group, its runs averaged.

    groups: name -> for each run, for each epoch, the cells' shares. Cells go from input (below) to output;
    white is a share of 1/n.
    """
    means = [torch.tensor([*zip(*runs)]).mean(1) for runs in groups.values()]  # each: [epochs, cells]
    equal = 1 / means[0].shape[1]
    # If cells cancel each other, one share may be far from all others; it should not fade the rest.
    reach = float(torch.cat([mean.flatten() for mean in means]).sub(equal).abs().quantile(0.95))
    titles = [titled(label, runs) for label, runs in groups.items()]
    figure, axes = panels(titles, len(titles), (3.2, 3.2), sharey=True)
    figure.set_figwidth(1.4 + 3.2 * len(titles))  # with room for the scale
    for ax, mean in zip(axes, means):
        image = ax.imshow(mean.T.numpy(), vmin=equal - reach, vmax=equal + reach, origin="lower", **HEAT_MAP)
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("normal cell, from input to output", fontsize=8)
    figure.colorbar(image, ax=axes, extend="both").set_label("share in the gradient w.r.t. α", fontsize=8)
    return save(figure, path)


def metrics_of(path: str | Path) -> list[dict]:
    """A run's metrics; of the true accuracies of its cell only that on the set that was searched."""
    config, metrics = read_run(path)
    others = {f"true_{name}" for name in SETS if name != searched_set(config.get("dataset"))}
    return [{name: value for name, value in line.items() if name not in others} for line in metrics]


def draw_run(path: str | Path, suffix: str = "png") -> list[Path]:
    """Draw cells, curves and, for a search, alphas and shares into the run's folder; return the new paths."""
    metrics, folder = metrics_of(path), Path(path)
    genotype = genotypes.load(str(folder / "genotype.json"))
    pictures = {"cells": (draw_cells, genotype), "curves": (draw_curves, {folder.name: [metrics]})}
    if all("alphas" in line for line in metrics):  # not of epochs that another version ran
        space, alphas = read_config(path)["search_space"], [line["alphas"] for line in metrics]
        pictures["alphas"] = draw_alphas, space, alphas, genotype
    if all("cell_shares" in line for line in metrics):
        pictures["shares"] = draw_shares, {folder.name: [[line["cell_shares"] for line in metrics]]}
    return [draw(*what, folder / f"{name}.{suffix}") for name, (draw, *what) in pictures.items()]


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
    what, out = list(dict.fromkeys(args.what)), Path(args.out)
    runs = [name for name in what if not is_text(name) and Path(name, "config.json").is_file()]
    names = file_names([name for name in what if name not in runs])
    runs = [*{os.path.realpath(run): run for run in runs}.values()]  # runs/a and runs/a/ are one
    written = [picture for run in runs for picture in draw_run(run, args.format)]
    for cell, name in names.items():
        written.append(draw_cells(genotypes.load(cell), out / f"{name}.{args.format}"))
    if len(runs) > 1:
        groups = {name: [*map(metrics_of, paths)] for name, paths in grouped(runs).items()}
        written.append(draw_curves(groups, out / f"curves.{args.format}"))
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    script(main)
