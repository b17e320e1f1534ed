"""ImageNet as folders of images, one a class, read with Pillow (extra `imagenet`) by worker processes."""
import contextlib
import hashlib
import os
import random
import warnings
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, brief, progress, require
from .batches import Batch, Normalize, generator_of, share_of

# In PyTorch's messages of workers that cannot pass their images on, or were killed.
NO_WORKERS = ("shared memory", "DataLoader worker (", "ancdata")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision


class ImageFolder(torch.utils.data.Dataset):
    """(epoch, index) -> (x [3, 224, 224], class).

    root: has a folder for each class; an image may lie in a folder within. skipped: paths of hidden files and
    folders, of files that are no images, of folders without images. train: with augmentation; its random
    numbers depend on (seed, epoch, index) alone. Raises InputError for a root without classes, and for a
    damaged image.
    """

    def __init__(self, root: Path, train: bool, seed: int = 0):
        require("PIL", "reading ImageNet", "pillow")
        self.root, self.train, self.seed = root, train, seed
        self.normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        by_class, self.skipped = find_images(root)
        if not by_class:
            raise InputError(f"{root}: no folders of images ({', '.join(SUFFIXES)}), one for each class; "
                             "--data must hold val/, for training also train/, of ImageNet")
        self.classes, self.num_classes = list(by_class), len(by_class)
        self.files = [path for paths in by_class.values() for path in paths]
        self.labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]

    def identity(self) -> dict[str, int | str]:
        """What distinguishes this set from others. The digest covers all file names, and the sizes of at most
        1,000 images, so that a damaged file may be replaced. Raises InputError for a damaged image."""
        start = len(os.path.join(self.root, ""))
        digest = hashlib.sha256(os.fsencode("".join(f"{path[start:]}\0" for path in self.files)))
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


def find_images(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """(the images of each class, skipped paths), by name. Raises InputError if root cannot be read."""
    def fail(error: OSError):
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); "
                         "--data must hold val/, for training also train/, of ImageNet") from error

    by_class, skipped = {}, []
    walk = os.walk(root, onerror=fail, followlinks=True)
    for folder, subfolders, files in progress(walk, f"reading {root}: folder"):
        names = Path(folder).relative_to(root).parts
        images = [file for file in sorted(files)
                  if names and not file.startswith(".") and file.lower().endswith(SUFFIXES)]
        hidden = [name for name in subfolders if name.startswith(".")]
        skipped += [os.path.join(folder, name) for name in [*hidden, *sorted(set(files) - set(images))]]
        subfolders[:] = sorted(set(subfolders) - set(hidden))
        if names:
            by_class.setdefault(names[0], []).extend(os.path.join(folder, image) for image in images)
    skipped += [os.path.join(root, name) for name, images in by_class.items() if not images]
    return {name: images for name, images in by_class.items() if images}, skipped


@contextlib.contextmanager
def opened(path: str) -> Iterator:
    """Pillow's image of a file. Raises InputError if it, or what is done with it, fails."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # damaged bytes raise many kinds
        raise InputError(f"{path}: cannot be read as an image ({brief(error)}); "
                         "get it again or remove it") from error


def rgb(image):
    """An image of any mode, with three channels of 8 bits. Gray images of 16 bits (modes I;16, and I for PGM)
    are scaled from 0 to 65535; Pillow would clip them at 255."""
    from PIL import Image
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    return image.convert("RGB")


def centre(image):
    """The centre, 224x224, of an image whose shorter side is resized to 256; rounded as torchvision does."""
    shorter = min(image.size)
    image = image.resize([256 * side // shorter for side in image.size], 2)  # 2: bilinear
    left, top = (round((side - 224) / 2) for side in image.size)
    return image.crop((left, top, left + 224, top + 224))


def augmented(image, draw: random.Random):
    """DARTS's augmentation: a crop of 8 to 100 % of the area, resized to 224x224; a flip; in random order
    brightness, contrast and saturation change by up to 0.4, the hue by up to 0.2."""
    from PIL import Image, ImageEnhance
    image = image.resize((224, 224), Image.BILINEAR, random_box(*image.size, draw))
    if draw.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    for change in draw.sample(["Brightness", "Contrast", "Color", "hue"], 4):
        if change == "hue":
            shift = int(draw.uniform(-0.2, 0.2) * 255)
            h, s, v = image.convert("HSV").split()
            image = Image.merge("HSV", (h.point(lambda value: (value + shift) % 256), s, v)).convert("RGB")
        else:
            image = getattr(ImageEnhance, change)(image).enhance(draw.uniform(0.6, 1.4))
    return image


def random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of 8 to 100 % of the area, with sides of 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            break
    else:  # a very long image: its middle
        w, h = min(width, height * 4 // 3), min(height, width * 4 // 3)
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def leave_group(worker: int) -> None:
    """Leave the process group, to which torchrun and terminals send signals: the run needs its workers until
    the step is finished, then ends them by SIGTERM, which they must not ignore."""
    os.setpgid(0, 0)


class FolderBatches:
    """Batches of the ImageFolder `root`, read by `workers` processes; batch_size, rank, world: see Batches.

    For training shuffled and without an incomplete last batch; otherwise every image once, in order.
    """

    def __init__(self, root: Path, batch_size: int, seed: int, *, train: bool, device: torch.device,
                 workers: int, memory_format=torch.contiguous_format, rank: int = 0, world: int = 1):
        self.images = ImageFolder(root, train, seed)
        # A test may have fewer images than a batch.
        self.share = share_of(batch_size, len(self.images.files) if train else batch_size, rank, world)
        self.batch_size, self.seed, self.device, self.workers = batch_size, seed, device, workers
        self.memory_format = memory_format

    def __len__(self) -> int:
        return len(self.images.files) // self.batch_size

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches number `start` and later of an epoch, of batch_size / world images each."""
        order = torch.arange(len(self.images.files))
        if self.images.train:
            order = torch.randperm(len(order), generator=generator_of(self.seed, "imagenet", epoch))
            order = order[: len(self) * self.batch_size]
        shares = [part[self.share].tolist() for part in order.split(self.batch_size)[start:]]
        batches = [[(epoch, i) for i in share] for share in shares if share]  # a test's last may be empty
        loader = torch.utils.data.DataLoader(self.images, batch_sampler=batches, num_workers=self.workers,
                                             worker_init_fn=leave_group,
                                             pin_memory=self.device.type == "cuda")
        try:
            for x, y in loader:
                x = x.to(self.device, memory_format=self.memory_format, non_blocking=True)
                yield x, y.to(self.device, non_blocking=True)
        except (InputError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]  # a worker's message is its traceback
            if isinstance(error, InputError):
                raise InputError(reason.removeprefix("ldarts.errors.InputError: ")) from error
            if not self.workers or not (isinstance(error, OSError) or any(map(str(error).count, NO_WORKERS))):
                raise
            remedy = "use --workers 0, or enlarge /dev/shm, through which workers pass images"
            if "Terminated" in reason:  # by a signal that was sent to each process of a job
                remedy = "continue the run with --resume"
            raise InputError(f"--workers {self.workers}: {reason}; {remedy}") from error


def folder_batches(root: str, parts: Sequence[str], batch_size: int, seed: int, *, rank: int = 0,
                   **options) -> list[FolderBatches]:
    """The batches of each of the parts of root, `train` and `val` or one of them; options: of FolderBatches.
    Warns once about skipped files.

    Raises InputError if the parts have different classes.
    """
    batches = [FolderBatches(Path(root, part), batch_size, seed, train=part == "train", rank=rank, **options)
               for part in parts]
    train_classes, val_classes = (set(batches[k].images.classes) for k in (0, -1))
    if train_classes != val_classes:
        raise InputError(f"{root}: train/ and val/ need the same classes; only in train/: "
                         f"{listing(train_classes - val_classes)}; only in val/: "
                         f"{listing(val_classes - train_classes)}")
    skipped = [path for part in batches for path in part.images.skipped]
    if skipped and rank == 0:
        warnings.warn(f"{root}: skipped {len(skipped)} files and folders that are hidden or contain no "
                      f"image: {listing(skipped)}", stacklevel=2)
    return batches


def listing(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = sorted(names)
    more = [f"{len(names) - 3:,} more"] * (len(names) > 3)
    return ", ".join(names[:3] + more) or "none"
