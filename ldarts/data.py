"""Data sets as uint8 tensors on the device, with batched crop, flip and cutout.

CIFAR-10/100 come from the original Python archives, SVHN from its cropped-digits .mat files (needs scipy), and
`synthetic` from a seed. A batch is a function of (seed, tag, epoch, step) alone, whatever the device and the number of
processes: one CPU generator draws all random numbers of an epoch, as tables over its images.
"""
import hashlib
import http.client
import io
import os
import pickle
import random
import struct
import sys
import tarfile
import tempfile
import textwrap
import urllib.request
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, require


class ImageSet(NamedTuple):
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N]
    num_classes: int
    mean: tuple[float, float, float]  # of the pixels divided by 255, as published with DARTS
    std: tuple[float, float, float]


class _Source(NamedTuple):
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: str  # of the archive; "": the downloads are the files themselves
    train: tuple[str, ...]
    test: tuple[str, ...]
    url: str
    md5: tuple[str, ...]  # one a download


_SOURCES = {
    "cifar10": _Source(
        10, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768), "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", ("c58f30108f718f92721af3b95e74349a",)),
    "cifar100": _Source(
        100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "cifar-100-python", ("train",), ("test",),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", ("eb9058c3a382ffc7106e4002c42a8d85",)),
    "svhn": _Source(
        10, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), "", ("train_32x32.mat",), ("test_32x32.mat",),
        "http://ufldl.stanford.edu/housenumbers/",
        ("e26dedcc434d2e4c54c9b2d4a06d8373", "eb5a983be6a315427106f1b164d9cef3")),
}
DATASETS = (*_SOURCES, "synthetic")


def load(name: str, root: str | Path, device: torch.device | str, seed: int = 0,
         download: bool = True, size: int | None = None) -> tuple[ImageSet, ImageSet]:
    """The training and the test set called `name`, on `device`.

    root: the folder that holds (or receives) the unpacked archive, or the unpacked folder itself. seed: of
    `synthetic` alone. size: of smaller images, pixels a side: means over squares. Raises InputError for an unknown name, for
    missing or damaged files, and for a size that does not divide that of the images.
    """
    if size is not None:
        return tuple(smaller(part, size) for part in load(name, root, device, seed, download))
    if name == "synthetic":
        return tuple(part._replace(images=part.images.to(device), labels=part.labels.to(device))
                     for part in synthetic(seed))
    if name not in _SOURCES:
        raise InputError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    source, read = _SOURCES[name], _read_svhn if name == "svhn" else _read_cifar
    folder = _locate(source, Path(root).expanduser(), download)

    def image_set(files: tuple[str, ...]) -> ImageSet:
        images, labels = zip(*(read(folder / file, source) for file in files))
        return ImageSet(torch.cat(images).to(device), torch.cat(labels).to(device), *source[:3])

    return image_set(source.train), image_set(source.test)


def smaller(data: ImageSet, size: int) -> ImageSet:
    """The images with `size` pixels a side, each the mean of a square of pixels."""
    before = data.images.shape[-1]
    if not 1 <= size <= before or before % size:
        raise InputError(f"images of {size} pixels: those of this set have {before}; use a size that divides it")
    parts = [F.avg_pool2d(part.float(), before // size).round().byte() for part in data.images.split(5000)]
    return data._replace(images=torch.cat(parts))


def _locate(source: _Source, root: Path, download: bool) -> Path:
    """The folder of the source's files; they are fetched into root when the folder (SVHN: the file) is not there."""
    files = source.train + source.test
    folder = root if any((root / file).is_file() for file in files) else root / source.folder
    if not source.folder:
        for file, md5 in zip(files, source.md5):
            _fetch(source.url + file, md5, folder / file, download)
    elif not folder.is_dir():
        archive = root / Path(source.url).name
        _fetch(source.url, source.md5[0], archive, download)
        _unpack(archive, root, source.folder)
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: no such file; {_remedy(source)}")
    return folder


def _remedy(source: _Source) -> str:
    return f"get it again from {source.url}, or use --dataset synthetic"


def _brief(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 120)


def _fetch(url: str, md5: str, path: Path, download: bool) -> None:
    """Download url to path unless path is there; it appears whole and with the right MD5, or not at all."""
    by_hand = f"put {url} at {path}, or use --dataset synthetic"
    if path.is_file():
        return
    if not download:
        raise InputError(f"{path}: no such file, and downloading is off; {by_hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            partial, digest, done = Path(scratch, path.name), hashlib.md5(usedforsecurity=False), 0
            with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
                while block := response.read(1 << 20):
                    digest.update(block)
                    done += file.write(block)
                    print(f"\r{url}: {done / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
            print(file=sys.stderr)
            if digest.hexdigest() != md5:
                raise InputError(f"{path}: {url} sent MD5 {digest.hexdigest()}, not {md5}; try again, or {by_hand}")
            os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{path}: cannot be fetched ({_brief(error)}); {by_hand}") from error


def _unpack(archive: Path, root: Path, folder: str) -> None:
    """Unpack the regular files of `folder`, which appears whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=root) as scratch, tarfile.open(archive) as tar:
            members = [member for member in tar if member.isreg() and member.name.startswith(folder + "/")]
            tar.extractall(scratch, members, filter="data")
            try:
                os.rename(Path(scratch, folder), root / folder)
            except OSError:  # another process of this run may have been faster
                if not (root / folder).is_dir():
                    raise
    except (tarfile.TarError, *_DAMAGE) as error:
        raise InputError(f"{archive}: cannot be unpacked ({_brief(error)}); delete it to have it fetched again, "
                         "or use --dataset synthetic") from error


# What damaged bytes make tarfile, an unpickler or scipy's reader raise; these calls run no code of ours.
_DAMAGE = (pickle.UnpicklingError, zlib.error, struct.error, ArithmeticError, AssertionError, AttributeError, EOFError,
           ImportError, LookupError, MemoryError, NotImplementedError, OSError, RecursionError, TypeError, ValueError)


class _Standin:
    """Keeps what a pickle would hand to numpy.dtype or to an array, and calls neither."""
    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class _CifarUnpickler(pickle._Unpickler):
    """Admits the names in a pickled array and nothing else: no code that a file asks for is run.

    It is the unpickler in Python because the one in C allocates whatever memo index a damaged file has.
    """
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}
    admitted = {("numpy", "ndarray"): _Standin, ("numpy", "dtype"): _Standin, ("_codecs", "encode"): str.encode,
                ("numpy.core.multiarray", "_reconstruct"): _Standin,
                ("numpy._core.multiarray", "_reconstruct"): _Standin}

    def find_class(self, module, name):
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return self.admitted[module, name]


def _read_cifar(path: Path, source: _Source) -> tuple[Tensor, Tensor]:
    """One batch file -> uint8 [N, 3, 32, 32], int64 [N]."""
    def require(fine: bool, what: str) -> None:
        if not fine:
            raise InputError(f"{path}: {what}; {_remedy(source)}")

    try:
        batch = _CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _DAMAGE as error:
        raise InputError(f"{path}: truncated or not a CIFAR batch ({_brief(error)}); {_remedy(source)}") from error
    require(type(batch) is dict, "not a dictionary")
    key = "labels" if source.num_classes == 10 else "fine_labels"
    data, labels = batch.get(b"data"), batch.get(key.encode())
    require(type(data) is _Standin and type(data.state) is tuple and len(data.state) == 5, "no array under 'data'")
    _, shape, dtype, fortran, raw = data.state
    require(type(dtype) is _Standin and dtype.args[:1] in ((b"u1",), ("u1",)) and fortran in (False, 0)
            and type(raw) is bytes, "'data' is not a row-major array of uint8")
    require(type(shape) is tuple and len(shape) == 2 and type(shape[0]) is int and shape[0] > 0 and shape[1] == 3072
            and len(raw) == shape[0] * 3072, "'data' is not [rows, 3072] with at least one row")
    require(type(labels) is list and len(labels) == shape[0], f"'{key}' is not a list of {shape[0]} labels")
    require(all(type(label) is int and 0 <= label < source.num_classes for label in labels),
            f"'{key}' has something other than integers from 0 to {source.num_classes - 1}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3, 32, 32), torch.tensor(labels)


def _read_svhn(path: Path, source: _Source) -> tuple[Tensor, Tensor]:
    """One file of cropped digits -> uint8 [N, 3, 32, 32], int64 [N]; the label 10 stands for the digit 0."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise InputError(f"{path}: reading SVHN needs scipy; pip install scipy, or use --dataset synthetic") from error
    try:
        content = loadmat(path, variable_names=("X", "y"))
        images, labels = content["X"], content["y"]
    except (MatReadError, *_DAMAGE) as error:
        raise InputError(f"{path}: truncated or not SVHN ({_brief(error)}); {_remedy(source)}") from error
    if images.dtype != "uint8" or images.shape[:3] != (32, 32, 3) or images.ndim != 4 or not images.size:
        raise InputError(f"{path}: X is {images.dtype} {images.shape}, not uint8 (32, 32, 3, N); {_remedy(source)}")
    if labels.dtype.kind not in "iu" or labels.size != images.shape[3] or labels.min() < 1 or labels.max() > 10:
        raise InputError(f"{path}: y is not {images.shape[3]} integers from 1 to 10; {_remedy(source)}")
    return (torch.from_numpy(images).permute(3, 2, 0, 1).contiguous(),
            torch.from_numpy(labels.astype("int64").ravel()) % 10)


def _generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own for every key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# Where a pixel's partner lies, x to either side. All are four pixels away along the longer axis: outside the 3x3 of a stem,
# and at one distance to a square pool, which then can't tell one from another. Within 3x3 the pixels are independent.
_PARTNERS = torch.tensor([[4, 0], [4, 2], [4, 4], [2, 4], [0, 4]])


def synthetic(seed: int, n_train: int = 5000, n_test: int = 1000) -> tuple[ImageSet, ImageSet]:
    """Ten classes of grain, 32x32, in random colours, balanced: two of contrast, times five of which way a pixel's
    partner lies. Pools see the contrast (2 of 10 classes right); the rest takes convolutions."""
    generator = _generator(seed, "synthetic")
    labels = torch.arange(n_train + n_test) % 10
    images = torch.cat([_draw(part, generator) for part in labels.split(500)])
    return tuple(ImageSet(images[part], labels[part], 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
                 for part in (slice(n_train), slice(n_train, None)))


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """[B] -> uint8 [B, 3, 32, 32]"""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    dx, dy = _PARTNERS[labels % 5].unbind(1)
    dx = torch.where(uniform(0, 1) < 0.5, dx, -dx)  # training flips are no other class
    at = torch.arange(32) + 4
    rows, columns = (at + dy[:, None])[:, :, None], (at + dx[:, None])[:, None]  # [B, 32, 1], [B, 1, 32]
    noise = torch.randn(n, 40, 40, generator=generator)
    grain = (noise[:, 4:36, 4:36] + noise[torch.arange(n)[:, None, None], rows, columns]) / 2**0.5  # [B, 32, 32]
    contrast = uniform(0.08, 0.12, 1, 1, 1) * (1 + labels // 5)[:, None, None, None]
    image = uniform(0.4, 0.6, 3, 1, 1) + contrast * uniform(0.4, 1, 3, 1, 1) * grain[:, None]
    return image.clamp_(0, 1).mul_(255).round_().byte()


def crop_flip(images: Tensor, shift: Tensor, flip: Tensor, padding: int = 4) -> Tensor:
    """Crop each image at `shift` out of its zero-padded self, then mirror it where `flip`.

    images: uint8 [n, 3, H, W]; shift: int64 [n, 2], rows and columns, 0 to 2 * padding; flip: bool [n].
    """
    n, channels, height, width = images.shape
    rows = shift[:, :1] + torch.arange(height, device=images.device)  # [n, H]
    columns = torch.arange(width, device=images.device)
    columns = shift[:, 1:] + torch.where(flip[:, None], columns.flip(0), columns)  # [n, W]
    image, channel = (torch.arange(size, device=images.device) for size in (n, channels))
    return F.pad(images, [padding] * 4)[image[:, None, None, None], channel[:, None, None],
                                        rows[:, None, :, None], columns[:, None, None, :]]


def normalize(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(images / 255 - mean) / std, then `dtype`. images: uint8 [n, 3, H, W]; mean, std: [3, 1, 1], float32 or wider"""
    return images.to(mean.dtype).div_(255).sub_(mean).div_(std).to(dtype)


def cutout(x: Tensor, centre: Tensor, length: int, keep: Tensor) -> Tensor:
    """Zero a square of `length` pixels, clipped at the border, in each x[i] with keep[i]: DARTS's Cutout.

    x: [n, 3, H, W]; centre: int64 [n, 2], row and column; keep: bool [n]. The square spans centre - length // 2
    (included) to centre + length // 2 (excluded).
    """
    def within(size: int, middle: Tensor) -> Tensor:  # [n, size]
        at = torch.arange(size, device=x.device) - middle[:, None]
        return (at >= -(length // 2)) & (at < length // 2)

    rows, columns = within(x.shape[2], centre[:, 0]), within(x.shape[3], centre[:, 1])
    return x.masked_fill((rows[:, :, None] & columns[:, None, :] & keep[:, None, None])[:, None], 0)


class Batches:
    """Shuffled batches of one data set, or of its `indices`; the last, incomplete one of an epoch is left out.

    batch_size: images of a global batch, over all `world` processes; the process `rank` gets its contiguous
    1 / world of each. tag: keeps the random numbers of two streams of one seed apart. augment: random crop (zero
    padding 4) and flip before normalisation, cutout of `cutout_length` pixels (0: none) after it, as in DARTS.
    Raises InputError when the images do not fill one batch or the batch does not divide by `world`.
    """

    def __init__(self, data: ImageSet, indices: Tensor | None, batch_size: int, seed: int, *, tag: str = "train",
                 augment: bool, cutout_length: int = 0, dtype: torch.dtype = torch.float32,
                 memory_format: torch.memory_format = torch.contiguous_format, rank: int = 0, world: int = 1):
        self.indices = torch.arange(len(data.labels)) if indices is None else indices.cpu()
        if not 1 <= batch_size <= len(self.indices):
            raise InputError(f"batch size {batch_size} with {len(self.indices)} {tag} images: "
                             f"use a batch size from 1 to {len(self.indices)}")
        if batch_size % world:
            raise InputError(f"batch size {batch_size} does not divide by {world} processes: use a multiple of {world}")
        self.data, self.batch_size, self.seed, self.tag = data, batch_size, seed, tag
        self.augment, self.cutout_length, self.dtype, self.memory_format = augment, cutout_length, dtype, memory_format
        self.share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.mean, self.std = _statistics(data, dtype)

    def __len__(self) -> int:
        return len(self.indices) // self.batch_size

    def epoch(self, epoch: int, cutout_prob: float = 1.0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches number `start` and later of an epoch: x [batch_size / world, 3, H, W] normalised, y likewise [...].

        cutout_prob: the fraction of images that cutout is applied to.
        """
        generator, count = _generator(self.seed, self.tag, epoch), len(self) * self.batch_size
        height, width = self.data.images.shape[2:]

        def table(numbers: Tensor) -> Tensor:  # [count, ...] -> [steps, batch_size / world, ...], on the device
            numbers = numbers.view(len(self), self.batch_size, *numbers.shape[1:])
            return numbers[:, self.share].to(self.data.images.device)

        index = table(self.indices[torch.randperm(len(self.indices), generator=generator)[:count]])
        shift = table(torch.randint(9, (count, 2), generator=generator))
        flip = table(torch.rand(count, generator=generator) < 0.5)
        centre = table((torch.rand(count, 2, generator=generator) * torch.tensor([height, width])).long())
        keep = table(torch.rand(count, generator=generator) < cutout_prob)
        for step in range(start, len(self)):
            images = self.data.images[index[step]]
            if self.augment:
                images = crop_flip(images, shift[step], flip[step])
            x = normalize(images, self.mean, self.std, self.dtype)
            if self.augment and self.cutout_length:
                x = cutout(x, centre[step], self.cutout_length, keep[step])
            yield x.contiguous(memory_format=self.memory_format), self.data.labels[index[step]]


def eval_batches(data: ImageSet, indices: Tensor | None, batch_size: int, *, dtype: torch.dtype = torch.float32,
                 memory_format: torch.memory_format = torch.contiguous_format) -> Iterator[tuple[Tensor, Tensor]]:
    """All images (or those at `indices`) once, in order and as they are; the last batch may be short."""
    mean, std = _statistics(data, dtype)
    indices = torch.arange(len(data.labels)) if indices is None else indices
    for index in indices.to(data.images.device).split(batch_size):
        x = normalize(data.images[index], mean, std, dtype)
        yield x.contiguous(memory_format=memory_format), data.labels[index]


def _statistics(data: ImageSet, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """mean and std as [3, 1, 1] in the precision to normalise in."""
    return tuple(torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32),
                              device=data.images.device)[:, None, None] for value in (data.mean, data.std))


class ImageFolder(torch.utils.data.Dataset):
    """ImageNet as folders of classes: (epoch, index) -> (x [3, 224, 224], class), read with Pillow (extra `imagenet`).

    train: DARTS's augmentation, from random numbers of (seed, epoch, index) alone: a crop of 8 to 100 % of the area, flip,
    jitter of brightness, contrast and saturation by 0.4 and of the hue by 0.2. Otherwise the shorter side becomes 256 and
    the centre is cropped. Raises InputError for a folder without classes and for an image that can't be read.
    """

    def __init__(self, root: Path, train: bool, seed: int = 0):
        require("PIL", "reading ImageNet", "pillow")
        self.train, self.seed = train, seed
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        self.files = [(path, label) for label, name in enumerate(self.classes) for path in sorted((root / name).iterdir())]
        if not self.files:
            raise InputError(f"{root}: no folders of images, one a class; --data must hold train/ and val/ of ImageNet")

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        from PIL import Image
        path, label = self.files[key[1]]
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise InputError(f"{path}: cannot be read as an image ({_brief(error)}); get it again or remove it") from error
        image = _augmented(image, random.Random(f"{self.seed} {key}")) if self.train else _centre(image)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return normalize(x, mean, std, torch.float32)[0], label


def _centre(image):
    width, height = image.size
    scale = 256 / min(width, height)
    image = image.resize((max(256, round(width * scale)), max(256, round(height * scale))), 2)  # 2: bilinear
    left, top = ((side - 224) // 2 for side in image.size)
    return image.crop((left, top, left + 224, top + 224))


def _augmented(image, draw: random.Random):
    from PIL import Image, ImageEnhance
    width, height = image.size
    for _ in range(10):
        area, ratio = width * height * draw.uniform(0.08, 1), np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # an image too long for any of them: its middle
        w, h = min(width, height * 4 // 3), min(height, width * 4 // 3)
    left, top = draw.randint(0, width - w), draw.randint(0, height - h)
    image = image.resize((224, 224), Image.BILINEAR, (left, top, left + w, top + h))
    if draw.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)

    def hue(image, shift: float):
        h, s, v = image.convert("HSV").split()
        h = h.point(lambda value: (value + int(shift * 255)) % 256)
        return Image.merge("HSV", (h, s, v)).convert("RGB")

    jitter = [(lambda image, enhance=enhance: enhance(image).enhance(draw.uniform(0.6, 1.4)))
              for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)]
    jitter.append(lambda image: hue(image, draw.uniform(-0.2, 0.2)))
    for change in draw.sample(jitter, 4):
        image = change(image)
    return image


class FolderBatches:
    """Batches of an ImageFolder under `root`, read by `workers` processes; see Batches for batch_size, rank and world.

    In training shuffled and without a last, incomplete batch; otherwise every image once, in order.
    """

    def __init__(self, root: Path, batch_size: int, seed: int, *, train: bool, device: torch.device, workers: int,
                 memory_format: torch.memory_format = torch.contiguous_format, rank: int = 0, world: int = 1):
        self.images = ImageFolder(root, train, seed)
        if train and not 1 <= batch_size <= len(self.images.files) or batch_size % world:
            raise InputError(f"batch size {batch_size} with {len(self.images.files)} images and {world} processes: use a "
                             "multiple of the processes, and no more than there are images")
        self.batch_size, self.seed, self.device, self.workers = batch_size, seed, device, workers
        self.memory_format, self.share = memory_format, slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def __len__(self) -> int:
        return len(self.images.files) // self.batch_size

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches number `start` and later of an epoch: x [batch_size / world, 3, 224, 224] normalised, y likewise [...]."""
        order = torch.arange(len(self.images.files))
        if self.images.train:
            order = order[torch.randperm(len(order), generator=_generator(self.seed, "imagenet", epoch))]
            order = order[: len(self) * self.batch_size]
        batches = [[(epoch, i) for i in part.tolist()[self.share]] for part in order.split(self.batch_size)[start:]]
        loader = torch.utils.data.DataLoader(self.images, batch_sampler=batches, num_workers=self.workers,
                                             pin_memory=self.device.type == "cuda")
        try:
            for x, y in loader:
                yield x.to(self.device, memory_format=self.memory_format, non_blocking=True), y.to(self.device)
        except InputError as error:  # a worker's message is its traceback, the reason last
            raise InputError(str(error).strip().splitlines()[-1].removeprefix("ldarts.errors.InputError: ")) from error
