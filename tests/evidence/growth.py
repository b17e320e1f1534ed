"""How the cost of a search step grows with batch, channels and cells: ours and plain channels-last.

    python tests/evidence/growth.py measure [FLAGS of ldarts.bench step]    # growth.json beside this file
    python tests/evidence/growth.py draw                                    # growth.png from it
"""
import datetime
import itertools
import json
import sys
from pathlib import Path
from typing import Any, Sequence

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from ldarts import bench, visualize  # noqa: E402
from ldarts.runs import device_name, script, write_atomically  # noqa: E402

SWEEPS = {"batch_size": (8, 16, 32, 64), "init_channels": (8, 16, 32), "layers": (4, 8, 14)}
MIDDLE = {"batch_size": 16, "init_channels": 16, "layers": 8}  # one of them is varied at a time
TITLES = {"batch_size": "batch", "init_channels": "channels", "layers": "cells"}
THREADS = (1, 2)
COLOURS = {"channels-last": "C1", "ours": "C0"}  # of the variants that are compared


def measure(flags: Sequence[str], path: Path) -> None:
    """Time both variants in turn, for each setting and number of threads; the file grows row by row."""
    result = {"command": " ".join(["growth.py", "measure", *flags]), "date": str(datetime.date.today()),
              "torch": torch.__version__, "rows": []}
    settings = {tuple((MIDDLE | {name: value}).items()) for name, sweep in SWEEPS.items() for value in sweep}
    for threads, setting in itertools.product(THREADS, sorted(settings)):
        torch.set_num_threads(threads)
        varied = [text for name, value in setting for text in (f"--{name}", str(value))]
        args = bench.parse_args(["step", *flags, *varied])
        row = {"threads": threads, **dict(setting), **bench.compare(args, COLOURS)}
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        result["rows"].append(row)
        result["device"] = device_name(args.device)
        write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each number that is varied: seconds of both variants, and by how much ours is faster."""
    from matplotlib.ticker import LogLocator
    figure, axes = visualize.pyplot().subplots(1, len(SWEEPS), sharey=True, layout="constrained",
                                               figsize=(11, 4.2))
    for ax, (name, sweep) in zip(axes, SWEEPS.items()):
        fixed = MIDDLE.items() - {(name, MIDDLE[name])}
        for threads in THREADS:
            rows = sorted((row for row in result["rows"] if {*fixed, ("threads", threads)} <= row.items()),
                          key=lambda row: row[name])
            for variant, colour in COLOURS.items():
                ax.plot([row[name] for row in rows], [row[variant] for row in rows], color=colour, marker="o",
                        ls="--" if threads == 1 else "-", label=f"{variant}, threads: {threads}")
            for row in rows:
                ax.annotate(f"{row['channels-last'] / row['ours']:.1f}×", (row[name], row["ours"]), (4, -10),
                            textcoords="offset points", fontsize=8, color=COLOURS["ours"])
        others = ", ".join(f"{TITLES[other]} {value}" for other, value in MIDDLE.items() if other != name)
        ax.set(xscale="log", yscale="log", xlabel=f"{TITLES[name]}  ({others})")
        ax.set_xticks(sweep, sweep)
        ax.minorticks_off()
        ax.margins(0.12)
        ax.grid(alpha=0.3)
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("seconds a search step")
    figure.suptitle(f"{result['device']}, PyTorch {result['torch']}, {result['date']}; "
                    "×: channels-last divided by ours", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    visualize.save(figure, path)


def main() -> None:
    path = Path(__file__).with_suffix(".json")
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2:], path)
    elif sys.argv[1:] == ["draw"]:
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    script(main)
