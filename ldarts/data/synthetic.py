"""Images drawn from a seed, without a download, whose classes convolutions learn first."""
import torch
from torch import Tensor

from .batches import ImageSet, generator_of

# Offsets (x, y) from a pixel to its partner; x goes to either side. All measure three pixels on the longer
# axis, so that pixels within the 3x3 kernel of a stem are independent.
PARTNERS = torch.tensor([[3, 0], [3, 2], [3, 3], [2, 3], [0, 3]])
DISTANCE = int(PARTNERS.max())


def synthetic(seed: int, n_train: int = 5000, n_test: int = 1000) -> tuple[ImageSet, ImageSet]:
    """Ten balanced classes of nearly gray grain, 32x32: two contrasts times the five offsets of PARTNERS.

    Colour says nothing about the class. Convolutions learn the classes in an epoch or two, pools behind a
    stem later. Longer offsets and stronger colours take longer to learn; before w has learnt the classes, a
    search says little.
    """
    generator = generator_of(seed, "synthetic")
    labels = torch.arange(n_train + n_test) % 10
    images = torch.cat([_draw(part, generator) for part in labels.split(500)])
    return ImageSet(images, labels, 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).split(n_train)


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """[B] -> uint8 [B, 3, 32, 32]"""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    dx, dy = PARTNERS[labels % 5].unbind(1)
    dx = torch.where(uniform(0, 1) < 0.5, dx, -dx)  # so that a flipped image keeps its class
    at = torch.arange(32) + DISTANCE
    rows, columns = (at + dy[:, None])[:, :, None], (at + dx[:, None])[:, None]  # [B, 32, 1], [B, 1, 32]
    size = 32 + 2 * DISTANCE
    noise = torch.randn(n, size, size, generator=generator)
    partners = noise[torch.arange(n)[:, None, None], rows, columns]
    grain = (noise[:, DISTANCE:-DISTANCE, DISTANCE:-DISTANCE] + partners) / 2**0.5  # [B, 32, 32]
    contrast = uniform(0.08, 0.12, 1, 1, 1) * (1 + labels // 5)[:, None, None, None]
    image = uniform(0.49, 0.51, 3, 1, 1) + contrast * uniform(0.8, 1, 3, 1, 1) * grain[:, None]
    return image.clamp_(0, 1).mul_(255).round_().byte()
