"""ImageSet, which every data set but ImageNet becomes, and its batches: crop, flip and cutout on tensors.

A batch depends on (seed, tag, epoch, step) alone, not on the number of processes nor, up to rounding, on the
device: one generator on the CPU draws all random numbers of an epoch, in tables over its images.
"""
import hashlib
from typing import Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

Batch = tuple[Tensor, Tensor]  # x [n, 3, H, W], normalised; y [n]


class ImageSet(NamedTuple):
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]
    num_classes: int
    mean: tuple[float, float, float]  # of pixels / 255, as published with DARTS
    std: tuple[float, float, float]

    def to(self, device: torch.device | str) -> "ImageSet":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def checked(self, name: str) -> "ImageSet":
        """This set; gray images, [N, H, W] or [N, 1, H, W], get three equal channels. Raises InputError, with
        the `name`, if types, shapes or labels are wrong."""
        images = self.images[:, None] if self.images.ndim == 3 else self.images
        if images.ndim == 4 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise InputError(f"data set {name}: images of {self.images.dtype} {list(self.images.shape)}; "
                             "expected torch.uint8 [N, 3, H, W], or [N, H, W] where they are gray")
        if self.labels.shape != images.shape[:1] or self.labels.dtype != torch.int64:
            raise InputError(f"data set {name}: labels of {self.labels.dtype} {list(self.labels.shape)}; "
                             f"expected torch.int64 [{len(images)}], one an image")
        if not len(images):
            raise InputError(f"data set {name}: it has no images")
        outside = self.labels[(self.labels < 0) | (self.labels >= self.num_classes)]
        if len(outside):
            raise InputError(f"data set {name}: label {int(outside[0])} with {self.num_classes} classes; "
                             f"use labels from 0 to {self.num_classes - 1}, or name more classes")
        return self._replace(images=images)

    def identity(self) -> dict[str, int | str]:
        """What distinguishes this set from others; the digest covers all labels and at most 1,000 images."""
        digest = hashlib.sha256()
        for values in (self.labels, self.images[:: len(self.images) // 1000 + 1]):
            digest.update(values.cpu().contiguous().numpy())
        return {"images": len(self.labels), "classes": self.num_classes, "digest": digest.hexdigest()}

    def split(self, count: int) -> "tuple[ImageSet, ImageSet]":
        """The first `count` images, and the rest."""
        return tuple(self._replace(images=self.images[part], labels=self.labels[part])
                     for part in (slice(count), slice(count, None)))

    def smaller(self, size: int) -> "ImageSet":
        """The images with `size` pixels a side; each new pixel is the mean of a square of pixels."""
        before = self.images.shape[-1]
        if not 1 <= size <= before or before % size:
            raise InputError(f"images of {size} pixels: those of this set have {before}; "
                             "use a size that divides it")
        means = [F.avg_pool2d(part.float(), before // size) for part in self.images.split(5000)]
        return self._replace(images=torch.cat(means).round().byte())


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator that is seeded by the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def halves(images: int, portion: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images for w, a share `portion` of them, and for α: a random split by the seed."""
    if not 0 < int(portion * images) < images:
        raise InputError(f"--train_portion {portion}: of {images} images one half gets none")
    order = torch.randperm(images, generator=generator_of(seed, "halves"))
    return tuple(order.tensor_split([int(portion * images)]))


class Normalize:
    """uint8 images [n, 3, H, W] -> (images / 255 - mean) / std, float32."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"):
        self.mean, self.std = (torch.tensor(value, device=device)[:, None, None] for value in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def crop_flip(images: Tensor, shift: Tensor, flip: Tensor, padding: int = 4) -> Tensor:
    """Crop each image at `shift` from its zero-padded form, then mirror it if `flip`.

    images: uint8 [n, 3, H, W]; shift: int64 [n, 2], rows and columns, 0 to 2 * padding; flip: bool [n].
    """
    n, channels, height, width = images.shape
    rows = shift[:, :1] + torch.arange(height, device=images.device)  # [n, H]
    columns = torch.arange(width, device=images.device)
    columns = shift[:, 1:] + torch.where(flip[:, None], columns.flip(0), columns)  # [n, W]
    image, channel = (torch.arange(size, device=images.device) for size in (n, channels))
    return F.pad(images, [padding] * 4)[image[:, None, None, None], channel[:, None, None],
                                        rows[:, None, :, None], columns[:, None, None, :]]


def cutout(x: Tensor, centre: Tensor, length: int, keep: Tensor) -> Tensor:
    """DARTS's Cutout: zero a square of `length` pixels, clipped at the border, in each x[i] with keep[i].

    x: [n, 3, H, W]; centre: int64 [n, 2], row and column; keep: bool [n]. The square spans
    centre - length // 2, included, to centre + length // 2, excluded.
    """
    def within(size: int, middle: Tensor) -> Tensor:  # [n, size]
        at = torch.arange(size, device=x.device) - middle[:, None]
        return (at >= -(length // 2)) & (at < length // 2)

    rows, columns = within(x.shape[2], centre[:, 0]), within(x.shape[3], centre[:, 1])
    return x.masked_fill((rows[:, :, None] & columns[:, None, :] & keep[:, None, None])[:, None], 0)


def share_of(batch_size: int, images: int, rank: int, world: int) -> slice:
    """The part of each global batch that the process `rank` gets. Raises InputError for other sizes than
    multiples of `world` up to the number of images."""
    if not 1 <= batch_size <= images or batch_size % world:
        raise InputError(f"batch size {batch_size} with {images} images: use a number from 1 to {images}"
                         + (f" that {world} processes divide" if world > 1 else ""))
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


class Batches:
    """Shuffled batches of one data set, or of its `indices`, without an incomplete last batch.

    batch_size: images of a global batch, over all `world` processes; the process `rank` gets a contiguous
    1 / world of each. tag: batches of other tags have other random numbers. As in DARTS, a random crop
    (zero padding 4) and flip before normalisation, cutout of `cutout_length` pixels (0: none) after it.
    Raises InputError as share_of does.
    """

    def __init__(self, data: ImageSet, indices: Tensor | None, batch_size: int, seed: int, *,
                 tag: str = "train", cutout_length: int = 0, rank: int = 0, world: int = 1,
                 memory_format=torch.contiguous_format):
        if cutout_length >= 2 * min(data.images.shape[2:]):
            raise InputError(f"--cutout_length {cutout_length}: it covers images of {data.images.shape[-1]} "
                             "pixels wherever it lies; use less")
        self.indices = torch.arange(len(data.labels)) if indices is None else indices.cpu()
        self.share = share_of(batch_size, len(self.indices), rank, world)
        self.data, self.batch_size, self.seed, self.tag = data, batch_size, seed, tag
        self.cutout_length, self.memory_format = cutout_length, memory_format
        self.normalize = Normalize(data.mean, data.std, data.images.device)

    def __len__(self) -> int:
        return len(self.indices) // self.batch_size

    def epoch(self, epoch: int, cutout_prob: float = 1.0, turn: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches number `start` and later of an epoch, of batch_size / world images each.

        cutout_prob: the share of images with cutout. turn: how often the epoch has already been through all
        images; each turn has its own order and crops.
        """
        key = (epoch, turn) if turn else (epoch,)
        generator, count = generator_of(self.seed, self.tag, *key), len(self) * self.batch_size
        height, width = self.data.images.shape[2:]

        def table(numbers: Tensor) -> Tensor:  # [count, …] -> [steps, batch_size / world, …], on the device
            return numbers.unflatten(0, (-1, self.batch_size))[:, self.share].to(self.data.images.device)

        index = table(self.indices[torch.randperm(len(self.indices), generator=generator)[:count]])
        shift = table(torch.randint(9, (count, 2), generator=generator))
        flip = table(torch.rand(count, generator=generator) < 0.5)
        centre = table((torch.rand(count, 2, generator=generator) * torch.tensor([height, width])).long())
        keep = table(torch.rand(count, generator=generator) < cutout_prob)
        for step in range(start, len(self)):
            x = self.normalize(crop_flip(self.data.images[index[step]], shift[step], flip[step]))
            if self.cutout_length:
                x = cutout(x, centre[step], self.cutout_length, keep[step])
            yield x.contiguous(memory_format=self.memory_format), self.data.labels[index[step]]


def eval_batches(data: ImageSet, indices: Tensor, batch_size: int, *,
                 memory_format=torch.contiguous_format) -> Iterator[Batch]:
    """The images at `indices` once, in order, not augmented; the last batch may be short."""
    normalize = Normalize(data.mean, data.std, data.images.device)
    for index in indices.to(data.images.device).split(batch_size):
        if len(index):  # of no images, split makes one empty part
            yield normalize(data.images[index]).contiguous(memory_format=memory_format), data.labels[index]
