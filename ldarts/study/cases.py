"""The cases of a study: arguments, what is there, what is computed, side by side."""
import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .. import spaces
from ..alignment import KINDS
from ..errors import InputError
from ..runs import Parser, device_name, pick_device, versions, write_atomically
from . import collapse, collapse_report, gradient

Case = tuple[str, ...]  # a space, a variant (of `collapse`) and a seed
STUDIES = {"gradient": (gradient.case, gradient.report), "collapse": (collapse.case, collapse_report.report)}
NOT_SETTINGS = ("spaces", "seeds", "variants", "data", "out", "show", "device", "jobs")  # change no result


def parse_args() -> argparse.Namespace:
    parser = Parser(description="The evidence, repeatable.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser
    of_gradient = add("gradient", help="how far each way to ∇Λ raises Λ, at moments of a search")
    of_collapse = add("collapse", help="searches with and without Λ, and what their cells are worth")
    # S4 draws noise, and another one in each precision: its gradients can't be compared.
    comparable = [space for space in spaces.SPACES if space not in ("s4", "nasbench201")]
    for command, chosen, choices in ((of_gradient, ["darts", "s2"], comparable),
                                     (of_collapse, ["nasbench201"], list(spaces.SPACES))):
        add = command.add_argument
        add("--data", default="data")
        add("--dataset", default="cifar10")
        add("--image_size", type=int, help="pixels a side, a divisor of the set's (default: as they are)")
        add("--spaces", nargs="+", default=chosen, choices=choices)
        add("--seeds", nargs="+", type=int, default=[0, 1, 2])
        add("--epochs", type=int, default=50, help="of a search")
        add("--batch_size", type=int, default=64)
        add("--init_channels", type=int, default=16)
        add("--layers", type=int, default=8, help="cells, in nasbench201 cells a stage")
        add("--lambda_reg", type=float, default=0.125)
        add("--arch_learning_rate", type=float, default=3e-4)
        add("--out", required=True, help="folder of the results")
        add("--show", action="store_true", help="compute nothing")
        add("--device", default="auto")
        add("--jobs", type=int, default=1, help="cases side by side, each on one thread if more than one")
    add = of_gradient.add_argument
    add("--steps", nargs="+", type=int, default=[0, 100, 500], help="when to look, beside the end")
    add("--batches", type=int, default=2, help="training batches of a snapshot")
    add("--held_out", type=int, default=2, help="batches of the α half, on which ΔΛ is measured too")
    add("--length", type=float, default=0.2,
        help="of the weight step of which ΔΛ is the effect; shorter for a small net")
    add("--epsilons", nargs="+", type=float, default=[1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add("--dtypes", nargs="+", choices=("float32", "float64", "bfloat16"),
        default=["float32", "float64", "bfloat16"],
        help="of the gradients; bfloat16: float32 weights under autocast")
    add = of_collapse.add_argument
    add("--variants", nargs="+", choices=collapse.VARIANTS,
        default=["DARTS", "central", "exact", "sign", "random"])
    add("--every", type=int, default=1, help="epochs between two measurements of Λ, eigenvalue and accuracy")
    add("--fresh_batches", type=int, default=4, help="of each half, over which Λ is averaged")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on beside its case."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


def file_of(args: argparse.Namespace, case: Case) -> Path:
    return Path(args.out, "-".join(case) + ".json")


def finished(args: argparse.Namespace, case: Case) -> dict[str, Any] | None:
    path = file_of(args, case)
    return json.loads(path.read_text()) if path.is_file() else None


def complete(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """The result of a case, computed where it isn't there. Raises InputError for one of other settings."""
    if result := finished(args, case):
        there = result["settings"]
        if differing := [name for name, value in settings(args).items() if there.get(name) != value]:
            raise InputError(f"{args.out}: {'-'.join(case)} was computed with another --{differing[0]}, "
                             f"{there.get(differing[0])}; give another --out, or --show what is there")
        return result
    if args.jobs > 1:
        torch.set_num_threads(1)
    device, started = pick_device(args.device), time.perf_counter()
    compute = STUDIES[args.command][0]
    values = compute(args, *case[:-1], int(case[-1]), device)
    result = {"settings": settings(args), "device": device_name(device), "versions": versions(),
              "minutes": round((time.perf_counter() - started) / 60, 2), "values": values}
    write_atomically(file_of(args, case), lambda path: path.write_text(json.dumps(result) + "\n"))
    print(f"{' '.join(case)}: {result['minutes']:.1f} minutes", file=sys.stderr, flush=True)
    return result


def results_of(args: argparse.Namespace, wanted: list[Case]) -> dict[Case, dict[str, Any]]:
    """The results of the cases; with --show of those that are there."""
    if args.show:
        found = [finished(args, case) for case in wanted]
    elif args.jobs == 1:
        found = [complete(args, case) for case in wanted]
    else:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(complete, [args] * len(wanted), wanted))
    return {case: result for case, result in zip(wanted, found) if result is not None}


def provenance(results: dict[Case, dict[str, Any]]) -> str:
    """Machine, minutes and settings of the cases."""
    groups: dict[str, list[Case]] = {}
    for case, result in results.items():
        flags = ", ".join(f"{name} {value}" for name, value in result["settings"].items()
                          if name != "command")
        groups.setdefault(f"on {result['device']}; {flags}", []).append(case)
    text = ""
    for how, cases in groups.items():
        minutes = sum(results[case]["minutes"] for case in cases)
        spaces_of = ", ".join(dict.fromkeys(case[0] for case in cases))
        text += f"\n{spaces_of}: {len(cases)} cases, {minutes:.1f} minutes, {how}\n"
    return text


def main() -> None:
    args = parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    variants = [(variant,) for variant in args.variants] if args.command == "collapse" else [()]
    wanted: list[Case] = [(space, *variant, str(seed))
                          for seed in args.seeds for space in args.spaces for variant in variants]
    results = results_of(args, wanted)
    if not results:
        raise InputError(f"{args.out}: no finished case of this study; run it without --show")
    report = STUDIES[args.command][1]
    text = report(args, {case: result["values"] for case, result in results.items()})
    text += provenance(results) + f"\n{len(results)} of {len(wanted)} cases are there\n"
    write_atomically(Path(args.out, "tables.md"), lambda path: path.write_text(text))
    print(text, end="")
