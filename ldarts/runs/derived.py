"""The derived network that train_eval.py trains or tests: its cell, its sizes, its weights from a file."""
import copy
import re
from argparse import Namespace
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import genotypes
from ..errors import InputError, brief
from .checkpoints import CHECKPOINT, load_checkpoint
from .results import read_config, run_folder, unfinished

SMALL = {"s1", "s2", "s3", "s4"}  # the spaces whose cells are trained small on CIFAR-100 and SVHN
Cell = genotypes.Genotype | str


def usual_size(arch: str | None, cell: Cell, dataset: str) -> tuple[int, int, str]:
    """(channels, cells, why) of the network in which a cell is trained.

    On CIFAR-100 and SVHN it depends on the space that the cell was searched in: that of the run which --arch
    names, by its folder or its genotype.json, or of the published cell that it equals.
    """
    if isinstance(cell, str):
        return 16, 5, "as in NAS-Bench-201"
    if dataset == "imagenet":
        return 48, 14, "as published on ImageNet"
    if dataset not in ("cifar100", "svhn"):
        return 36, 20, f"as published on {dataset}"
    if config := arch and search_config(arch):
        spaces = {str(config.get("search_space"))}
    else:
        names = [name for name, published in genotypes.PUBLISHED.items() if published == cell]
        spaces = set(re.findall(r"_(s\d)_", " ".join(names)))
    if small := sorted(spaces & SMALL):
        return 16, 8, f"as published on {dataset} for a cell of {small[0]}"
    return 36, 20, f"as published on {dataset} for a cell not known to be of {', '.join(sorted(SMALL))}"


def search_config(arch: str) -> dict:
    """The configuration of the search that --arch names, empty where it names none."""
    try:
        config = read_config(run_folder(arch))
    except InputError:
        return {}
    return config if config.get("kind") == "search" else {}


def unfinished_search(arch: str) -> list[str]:
    """A line where --arch names a search that is not at its end."""
    folder = run_folder(arch)
    if search_config(arch) and (so_far := unfinished(folder)):
        return [f"warning: {folder} is an unfinished search, {so_far}: this is its cell so far; "
                f"to go on with it: python train_search.py --resume {folder}"]
    return []


def checkpoint_file(path: str) -> str:
    """A run's folder stands for its checkpoint."""
    return str(Path(path, CHECKPOINT)) if Path(path).is_dir() else path


def read_trained(path: str, arch: str | None) -> tuple[dict[str, Tensor], Cell]:
    """(weights under the network's names, the cell they were trained in) of a checkpoint, ours or another's.

    Without the auxiliary tower, which no test uses, and without what DataParallel and torch.compile put
    before the names. The checkpoint names the cell, or the file beside it; `arch`, from --arch, has to agree,
    and alone tells the cell of others' weights.
    """
    state, beside = load_checkpoint(path), Path(path).parent / "genotype.json"
    named = state["model"]
    if not isinstance(named, dict) or not all(isinstance(t, Tensor) for t in named.values()):
        raise InputError(f"{path}: holds no weights: expected tensors by their names")
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): t for key, t in named.items()}
    if weights.keys() & {"alphas_normal", "arch_parameters"}:
        raise InputError(f"{path}: weights of a search; train its cell first: --arch {Path(path).parent}")
    given = None if arch is None else genotypes.load(arch)
    if "genotype" in state:
        trained = genotypes.parse(str(state["genotype"]), path)
    else:
        trained = genotypes.load(str(beside)) if beside.is_file() else given
    if trained is None:
        raise InputError(f"{path}: does not say which cell its weights were trained in; give it by --arch")
    if given not in (None, trained):
        raise InputError(f"--arch {arch}: {path} was trained with another cell; leave --arch out")
    return {key: t for key, t in weights.items() if not key.startswith("auxiliary_head.")}, trained


def size_of(weights: dict[str, Tensor], in_201: bool) -> tuple[int | None, int | None]:
    """(channels, cells; in NAS-Bench-201 a stage) of the network of weights, None if not known."""
    stem, per_row = (weights.get("stem0.0.weight"), 2) if "stem0.0.weight" in weights else (
        weights.get("stem.0.weight"), 1 if in_201 else 1 / 3)
    C = None if stem is None or not stem.dim() else round(len(stem) * per_row)
    cells = {int(found[1]) for key in weights if (found := re.match(r"cells\.(\d{1,4})\.", key))}
    if in_201:  # the blocks between the stages have weights, whatever the cells
        cells = range(min((i for i in cells if f"cells.{i}.conv_a.op.1.weight" in weights), default=0))
    return C, len(cells) or None


def load_weights(net: nn.Module, args: Namespace) -> None:
    """Those of --evaluate, into the network. Raises InputError that names the first one that does not fit."""
    weights, _ = read_trained(args.evaluate, args.arch)
    wanted = net.state_dict()
    for key in [*wanted, *weights]:
        here, there = (list(tensors[key].shape) if key in tensors else "missing"
                       for tensors in (wanted, weights))
        if here != there and not (key.endswith("num_batches_tracked") and there == "missing"):
            raise InputError(f"{args.evaluate}: {key} is {there}, and {here} in the network of {args.layers} "
                             f"cells of {args.init_channels} channels on {args.dataset}; give the --arch, "
                             "--dataset, --layers and --init_channels that it was trained with")
    try:
        net.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{args.evaluate}: weights that cannot be copied ({brief(error)})") from error


def count_parameters(net: nn.Module) -> int:
    """Parameters without those of the auxiliary head, as the papers count them."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("auxiliary"))


def count_multiply_adds(net: nn.Module, image: Sequence[int] = (3, 32, 32)) -> int:
    """Multiply-adds of convolutions and classifier for an image of a shape, as the papers count."""
    counter = FlopCounterMode(display=False)
    with counter:
        copy.deepcopy(net).to("meta").eval()(torch.empty(1, *image, device="meta"))
    return counter.get_total_flops() // 2
