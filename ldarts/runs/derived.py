"""The derived network that train_eval.py trains or tests: its cell, its size, its weights from a file."""
import copy
import re
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import genotypes
from ..errors import InputError
from .files import CHECKPOINT, load_checkpoint
from .machine import MEMORY_FORMATS

SMALL = ("s1", "s2", "s3", "s4")  # the spaces whose cells are trained small on CIFAR-100 and SVHN
Cell = genotypes.Genotype | str


def usual_size(space: str | None, cell: Cell, dataset: str) -> tuple[int, int, str]:
    """(channels, cells, reason) of the network in which a cell is trained. On CIFAR-100 and SVHN they depend
    on the space in which it was searched; if `space` is None, on that of a published cell equal to it."""
    if isinstance(cell, str):
        return 16, 5, "as in NAS-Bench-201"
    if dataset == "imagenet":
        return 48, 14, "as published on ImageNet"
    if dataset not in ("cifar100", "svhn"):
        return 36, 20, f"as published on {dataset}"
    names = [space] if space else [name for name, other in genotypes.PUBLISHED.items() if other == cell]
    if spaces := {part for name in names for part in str(name).split("_")} & set(SMALL):
        return 16, 8, f"as published on {dataset} for a cell of {min(spaces)}"
    return 36, 20, f"as published on {dataset} for a cell not known to be of {', '.join(SMALL)}"


def checkpoint_file(path: str) -> str:
    """`path`, or the checkpoint in it if it is a run's folder."""
    return str(Path(path, CHECKPOINT)) if Path(path).is_dir() else path


def read_trained(path: str, arch: str | None) -> tuple[dict[str, Tensor], Cell]:
    """(weights by name, the cell they were trained in) of a checkpoint, from here or elsewhere.

    Leaves out the auxiliary tower, which a test does not use, and the prefixes that DataParallel and
    torch.compile add to names. The cell is that in the checkpoint, in the genotype.json beside it, or else
    `arch`, from --arch, which must not contradict it.
    """
    state, beside = load_checkpoint(path), Path(path).parent / "genotype.json"
    if not all(isinstance(t, Tensor) for t in state["model"].values()):
        raise InputError(f"{path}: holds no weights: expected tensors by name")
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): t for key, t in state["model"].items()}
    if weights.keys() & {"alphas_normal", "arch_parameters"}:
        raise InputError(f"{path}: weights of a search; train its cell first: --arch {Path(path).parent}")
    cell = expected = None if arch is None else genotypes.load(arch)
    if "genotype" in state:
        cell = genotypes.parse(str(state["genotype"]), path)
    elif beside.is_file():
        cell = genotypes.load(str(beside))
    if cell is None:
        raise InputError(f"{path}: does not say which cell its weights were trained in; give it by --arch")
    if expected not in (None, cell):
        raise InputError(f"--arch {arch}: {path} was trained with another cell; leave --arch out")
    return {key: t for key, t in weights.items() if not key.startswith("auxiliary_head.")}, cell


def load_weights(net: nn.Module, args: Namespace) -> None:
    """Load the weights of --evaluate. Raises InputError that names one that does not fit."""
    weights, _ = read_trained(args.evaluate, args.arch)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:  # a title, then a line for each kind of mismatch
        mismatch = textwrap.shorten(str(error).splitlines()[1], 250)
        raise InputError(f"{args.evaluate}: {mismatch} The network has {args.layers} cells of "
                         f"{args.init_channels} channels on {args.dataset}; give the --arch, --dataset, "
                         "--layers and --init_channels that it was trained with") from error


def check_images(height: int, width: int, images: int, auxiliary: bool = False) -> None:
    """Raises InputError for images that cannot pass a network. images: of a batch, in one process"""
    remedy = ""
    if height % 4 or width % 4:
        remedy = "images whose sides are multiples of 4, because the network halves them twice"
    elif auxiliary and min(height, width) < 32:
        remedy = "--no-auxiliary, because the auxiliary tower needs 32x32 pixels or more"
    elif images * (1 if auxiliary else height * width // 16) < 2:
        remedy = "two images a process or more, because batch norms need two values"
    if remedy:
        raise InputError(f"{images} images of {height}x{width} pixels a process do not pass the network; use "
                         f"{remedy}")


def safe_layout(name: str, device: torch.device, C: int, height: int,
                width: int) -> tuple[torch.memory_format, list[str]]:
    """(memory format for a network, remarks): the one called `name`, if it is safe in plain PyTorch.

    In channels-last, on a CPU, with few channels and images whose sides do not divide 32, the backward pass
    of oneDNN in PyTorch 2.13 can corrupt the heap (seen with 2 to 8 channels; 16 are safe).
    """
    if name == "channels_last" and device.type == "cpu" and C < 16 and (32 % height or 32 % width):
        remark = (f"--memory_format contiguous: oneDNN's backward pass of {C} channels can crash in "
                  f"channels_last on images of {height}x{width}")
        return torch.contiguous_format, [remark]
    return MEMORY_FORMATS[name], []


def count_parameters(net: nn.Module) -> int:
    """Parameters without those of the auxiliary head, as the papers count them."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("auxiliary"))


def count_multiply_adds(net: nn.Module, image: Sequence[int] = (3, 32, 32)) -> int:
    """Multiply-adds of convolutions and classifier for an image of a shape (papers report more)."""
    counter = FlopCounterMode(display=False)
    with counter:
        copy.deepcopy(net).to("meta").eval()(torch.empty(1, *image, device="meta"))
    return counter.get_total_flops() // 2
