"""ImageNet as folders of images, one a class, read with Pillow (extra `imagenet`) by worker processes."""
import contextlib
import hashlib
import os
import random
import warnings
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, brief, require
from .batches import Batch, Normalize, generator_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision


class ImageFolder(torch.utils.data.Dataset):
    """(epoch, index) -> (x [3, 224, 224], class).

    The classes are the folders in root with images, be it in folders of theirs; skipped: paths of what is
    hidden, of other files, and of folders without images. train: augmented, by random numbers of (seed,
    epoch, index) alone. Raises InputError for a root without classes and for an image that can't be read.
    """

    def __init__(self, root: Path, train: bool, seed: int = 0):
        require("PIL", "reading ImageNet", "pillow")
        self.train, self.seed = train, seed
        self.normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.root, self.classes, self.files, self.labels, self.skipped = root, [], [], [], []
        try:
            for entry in visible(root, self.skipped):
                images = images_below(entry, self.skipped) if entry.is_dir() else []
                if images:
                    self.labels += [len(self.classes)] * len(images)
                    self.classes.append(entry.name)
                    self.files += images
                else:
                    self.skipped.append(entry.path)
        except OSError as error:
            raise InputError(f"{root}: cannot be read ({brief(error)}); "
                             "--data must hold train/ and val/ of ImageNet") from error
        if not self.files:
            raise InputError(f"{root}: no folders of images ({', '.join(SUFFIXES)}), one a class; "
                             "--data must hold train/ and val/ of ImageNet")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def identity(self) -> dict[str, int | str]:
        """What tells this set from another; digest: of all files' names, and of width and height of at most
        1,000 images, so that a damaged file may be replaced. Raises InputError if one can't be opened."""
        digest, start = hashlib.sha256(), len(os.path.join(self.root, ""))
        for path in self.files:
            digest.update(os.fsencode(path[start:]) + b"\0")
        for path in self.files[:: len(self.files) // 1000 + 1]:
            with opened(path) as image:
                digest.update(b"%d %d\0" % image.size)
        return {"images": len(self.files), "classes": self.num_classes, "digest": digest.hexdigest()}

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        with opened(self.files[key[1]]) as image:
            image = rgb(image)
        image = augmented(image, random.Random(f"{self.seed} {key}")) if self.train else centre(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return self.normalize(pixels[None])[0], self.labels[key[1]]


def visible(folder: str | Path, skipped: list[str]) -> list[os.DirEntry]:
    """What lies in a folder, by name; what is hidden goes to `skipped`."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    skipped += [entry.path for entry in entries if entry.name.startswith(".")]
    return [entry for entry in entries if not entry.name.startswith(".")]


def images_below(folder: os.DirEntry, skipped: list[str]) -> list[str]:
    """The images in a folder and in those within, by name; other files go to `skipped`."""
    images = []
    for entry in visible(folder, skipped):
        if entry.is_dir():
            images += images_below(entry, skipped)
        elif entry.name.lower().endswith(SUFFIXES):
            images.append(entry.path)
        else:
            skipped.append(entry.path)
    return images


@contextlib.contextmanager
def opened(path: str) -> Iterator:
    """Pillow's image of a file. Raises InputError where it, or what is done with it, fails."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # whatever damaged bytes lead to
        raise InputError(f"{path}: cannot be read as an image ({brief(error)}); "
                         "get it again or remove it") from error


def rgb(image):
    """An image of any kind with three channels of 8 bits. Gray ones of 16 bits (in Pillow's modes I;16, and I
    for PGM) are taken by their range, 0 to 65535, where Pillow would clip them at 255."""
    from PIL import Image
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    return image.convert("RGB")


def centre(image):
    """The centre, 224x224, of an image made as small as its shorter side being 256 takes."""
    width, height = image.size
    scale = 256 / min(width, height)
    image = image.resize((max(256, round(width * scale)), max(256, round(height * scale))), 2)  # 2: bilinear
    left, top = ((side - 224) // 2 for side in image.size)
    return image.crop((left, top, left + 224, top + 224))


def augmented(image, draw: random.Random):
    """DARTS's: a crop of 8 to 100 % of the area, made 224x224; a flip; in random order jitter of brightness,
    contrast and saturation by 0.4 and of the hue by 0.2."""
    from PIL import Image, ImageEnhance
    image = image.resize((224, 224), Image.BILINEAR, random_box(*image.size, draw))
    if draw.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)

    def shift_hue(image):
        shift = int(draw.uniform(-0.2, 0.2) * 255)
        h, s, v = image.convert("HSV").split()
        return Image.merge("HSV", (h.point(lambda value: (value + shift) % 256), s, v)).convert("RGB")

    jitter = [lambda image, kind=kind: kind(image).enhance(draw.uniform(0.6, 1.4))
              for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)]
    for change in draw.sample([*jitter, shift_hue], 4):
        image = change(image)
    return image


def random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of 8 to 100 % of the area, 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # an image too long for any of them: its middle
        w, h = min(width, height * 4 // 3), min(height, width * 4 // 3)
    left, top = draw.randint(0, width - w), draw.randint(0, height - h)
    return left, top, left + w, top + h


class FolderBatches:
    """Batches of the ImageFolder `root`, read by `workers` processes; batch_size, rank, world: see Batches.

    In training shuffled and without a last, incomplete batch; otherwise every image once, in order.
    """

    def __init__(self, root: Path, batch_size: int, seed: int, *, train: bool, device: torch.device,
                 workers: int, memory_format=torch.contiguous_format, rank: int = 0, world: int = 1):
        self.images = ImageFolder(root, train, seed)
        if train and not 1 <= batch_size <= len(self.images.files) or batch_size % world:
            raise InputError(f"batch size {batch_size} with {len(self.images.files)} images and {world} "
                             "processes: use a multiple of the processes, and no more than there are images")
        self.batch_size, self.seed, self.device, self.workers = batch_size, seed, device, workers
        self.memory_format = memory_format
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self) -> int:
        return len(self.images.files) // self.batch_size

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches number `start` and later of an epoch, of batch_size / world images each."""
        order = torch.arange(len(self.images.files))
        if self.images.train:
            order = order[torch.randperm(len(order), generator=generator_of(self.seed, "imagenet", epoch))]
            order = order[: len(self) * self.batch_size]
        batches = [[(epoch, i) for i in part.tolist()[self.share]]
                   for part in order.split(self.batch_size)[start:]]
        loader = torch.utils.data.DataLoader(self.images, batch_sampler=batches, num_workers=self.workers,
                                             pin_memory=self.device.type == "cuda")
        try:
            for x, y in loader:
                x = x.to(self.device, memory_format=self.memory_format, non_blocking=True)
                yield x, y.to(self.device)
        except InputError as error:  # a worker's message is its traceback, the reason last
            reason = str(error).strip().splitlines()[-1]
            raise InputError(reason.removeprefix("ldarts.errors.InputError: ")) from error


def folder_batches(root: str, batch_size: int, seed: int, *, rank: int = 0,
                   **options) -> tuple[FolderBatches, FolderBatches]:
    """The batches of root/train and of root/val; options: of FolderBatches. Warns once of what is skipped.

    Raises InputError where the two don't have the same classes.
    """
    options |= {"rank": rank}
    train, val = (FolderBatches(Path(root, part), batch_size, seed, train=part == "train", **options)
                  for part in ("train", "val"))
    of_train, of_val = set(train.images.classes), set(val.images.classes)
    if of_train != of_val:
        raise InputError(f"{root}: train/ and val/ need the same folders of images, one a class; in train/ "
                         f"alone: {some(of_train - of_val)}; in val/ alone: {some(of_val - of_train)}")
    skipped = train.images.skipped + val.images.skipped
    if skipped and rank == 0:
        warnings.warn(f"{root}: skipped {len(skipped)} files and folders that are hidden or hold no image by "
                      f"their names: {some(skipped)}", stacklevel=2)
    return train, val


def some(names: Iterable[str]) -> str:
    """The first three of them, and how many more there are."""
    names = sorted(names)
    more = [f"{len(names) - 3:,} more"] * (len(names) > 3)
    return ", ".join(names[:3] + more) or "none"
