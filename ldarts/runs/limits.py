"""What images, batches and memory do not allow, as one line."""
import copy

import torch
from torch import nn

from ..errors import InputError, brief

OUT_OF_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")  # CUDA, CPU, C++, cuDNN


def require_passage(net: nn.Module, images: int, image: tuple[int, ...]) -> None:
    """Raises InputError where a batch of `images` of shape [3, H, W] cannot pass; computes nothing."""
    def failure(images: int, **attributes) -> Exception | None:
        on_meta = copy.deepcopy(net).to("meta")
        on_meta.__dict__.update(attributes)
        try:
            on_meta(torch.empty(images, *image, device="meta"))
        except (RuntimeError, ValueError) as error:
            return error

    if error := failure(images):
        remedy = ("two images a process or more" if failure(2) is None else
                  "--no-auxiliary: the tower wants 32x32 or more" if failure(2, auxiliary=False) is None else
                  "images whose sides are multiples of 4")
        size = "x".join(map(str, image[1:]))
        raise InputError(f"{images} images of {size} pixels a process do not pass the network "
                         f"({brief(error)}); use {remedy}") from error


def out_of_memory(error: BaseException | None) -> str:
    """Why memory was wanting, "" where it was not; a CUDA graph's capture hides the reason behind another."""
    while error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY):
            return brief(error)
        error = error.__cause__ or error.__context__
    return ""
