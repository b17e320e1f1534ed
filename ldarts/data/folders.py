"""ImageNet as folders of images, one a class, read with Pillow (extra `imagenet`) by worker processes."""
import random
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, brief, require
from .batches import Batch, Normalize, generator_of


class ImageFolder(torch.utils.data.Dataset):
    """(epoch, index) -> (x [3, 224, 224], class).

    train: augmented, by random numbers of (seed, epoch, index) alone. Raises InputError for a folder without
    classes and for an image that can't be read.
    """

    def __init__(self, root: Path, train: bool, seed: int = 0):
        require("PIL", "reading ImageNet", "pillow")
        self.train, self.seed = train, seed
        self.normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        self.files = [(path, label) for label, name in enumerate(self.classes)
                      for path in sorted((root / name).iterdir())]
        if not self.files:
            raise InputError(f"{root}: no folders of images, one a class; "
                             "--data must hold train/ and val/ of ImageNet")

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image
        path, label = self.files[key[1]]
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise InputError(f"{path}: cannot be read as an image ({brief(error)}); "
                             "get it again or remove it") from error
        image = augmented(image, random.Random(f"{self.seed} {key}")) if self.train else centre(image)
        return self.normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0], label


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
