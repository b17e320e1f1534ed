"""Data sets and their batches. Every data set but ImageNet becomes an ImageSet."""
from pathlib import Path

import torch

from ..errors import InputError
from .archives import SOURCES, read_archive
from .batches import Batches, ImageSet, eval_batches, halves
from .folders import FolderBatches, folder_batches
from .synthetic import synthetic

DATASETS = (*SOURCES, "synthetic")


def load(name: str, root: str | Path, device: torch.device | str, seed: int = 0,
         size: int | None = None) -> tuple[ImageSet, ImageSet]:
    """The training and the test set called `name`, on `device`.

    root: the folder that has (or will have) the unpacked archive in it, that folder itself, or the archive.
    seed: of `synthetic` alone. size: pixels a side of images that are made smaller. Raises InputError for an
    unknown name, for missing or damaged files, for labels beyond the classes, and for a size that does not
    divide that of the images.
    """
    if name in SOURCES:
        parts = read_archive(name, Path(root).expanduser())
    elif name == "synthetic":
        parts = synthetic(seed)
    else:
        raise InputError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    parts = (part.checked(name).to(device) for part in parts)
    return tuple(part if size is None else part.smaller(size) for part in parts)
