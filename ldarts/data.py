"""Data sets as uint8 tensors on the device, with batched crop, flip and cutout.

CIFAR-10/100 are read from the original Python archives, SVHN from its cropped-digits .mat files (needs scipy), and
`synthetic` is generated from a seed. Every batch is a function of (seed, tag, epoch, step) alone, whatever the device
and the number of processes: all random numbers of an epoch come from one CPU generator, as tables over its images.
"""
import hashlib
import http.client
import io
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import textwrap
import urllib.request
import zlib
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


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
    folder: str  # below root; "" is root itself
    train: tuple[str, ...]
    test: tuple[str, ...]
    downloads: tuple[tuple[str, str], ...]  # (URL, MD5)


_TORONTO, _STANFORD = "https://www.cs.toronto.edu/~kriz/", "http://ufldl.stanford.edu/housenumbers/"
_SOURCES = {
    "cifar10": _Source(
        10, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768), "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",),
        ((_TORONTO + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),)),
    "cifar100": _Source(
        100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "cifar-100-python", ("train",), ("test",),
        ((_TORONTO + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),)),
    "svhn": _Source(
        10, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), "", ("train_32x32.mat",), ("test_32x32.mat",),
        ((_STANFORD + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
         (_STANFORD + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"))),
}
DATASETS = (*_SOURCES, "synthetic")


def load(name: str, root: str | Path, device: torch.device | str, seed: int = 0,
         download: bool = True) -> tuple[ImageSet, ImageSet]:
    """The training and the test set called `name`, on `device`.

    root: the folder that holds (or receives) the unpacked archive, or the unpacked folder itself. seed: of
    `synthetic`, unused otherwise. Raises InputError for an unknown name and for missing or damaged files.
    """
    if name == "synthetic":
        return tuple(part._replace(images=part.images.to(device), labels=part.labels.to(device))
                     for part in synthetic(seed))
    if name not in _SOURCES:
        raise InputError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    source = _SOURCES[name]
    read = _read_svhn if name == "svhn" else _read_cifar
    folder = _locate(source, Path(root).expanduser(), download)

    def image_set(files: tuple[str, ...]) -> ImageSet:
        images, labels = zip(*(read(folder / file, source) for file in files))
        return ImageSet(torch.cat(images).to(device), torch.cat(labels).to(device), *source[:3])

    return image_set(source.train), image_set(source.test)


# ---------------------------------------------------------------------------------------------- files and downloads

def _locate(source: _Source, root: Path, download: bool) -> Path:
    """The folder with all of the source's files; fetched and unpacked into root when there is none."""
    files = source.train + source.test
    folder = root if any((root / file).is_file() for file in files) else root / source.folder
    if source.folder and not folder.is_dir():
        url, md5 = source.downloads[0]
        _unpack(_fetch(url, md5, root, download), root, source)
    elif not source.folder:
        for url, md5 in source.downloads:
            if not (folder / Path(url).name).is_file():
                _fetch(url, md5, folder, download)
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: no such file; {_remedy(source)}")
    return folder


def _remedy(source: _Source) -> str:
    urls = " and ".join(url for url, _ in source.downloads)
    where = f"unpack {urls} again" if source.folder else f"delete it to have it fetched again from {_STANFORD}"
    return f"{where}, or use --dataset synthetic"


def _fetch(url: str, md5: str, root: Path, download: bool) -> Path:
    """root / the URL's file name, downloaded unless it is there already; a download appears whole or not at all."""
    path = root / Path(url).name
    by_hand = f"put {url} at {path}, or use --dataset synthetic"
    try:
        if path.exists():
            if (found := _md5(path)) != md5:
                raise InputError(f"{path}: MD5 {found} instead of {md5}; delete it, or {by_hand}")
            return path
        if not download:
            raise InputError(f"{path}: no such file, and downloading is off; {by_hand}")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            partial = Path(scratch, path.name)
            _download(url, partial)
            if (found := _md5(partial)) != md5:
                raise InputError(f"{path}: {url} sent MD5 {found} instead of {md5}; try again, or {by_hand}")
            os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{path}: cannot be fetched ({_brief(error)}); {by_hand}") from error
    return path


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
        total, done = int(response.headers.get("Content-Length") or 0), 0
        while block := response.read(1 << 20):
            done += file.write(block)
            print(f"\r{url}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _unpack(archive: Path, root: Path, source: _Source) -> None:
    """Unpack the regular files of the source's folder; the folder appears whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=root) as scratch, tarfile.open(archive) as tar:
            members = [m for m in tar if m.isreg() and m.name.startswith(source.folder + "/")]
            tar.extractall(scratch, members, filter="data")
            unpacked = Path(scratch, source.folder)
            if not unpacked.is_dir():
                raise InputError(f"{archive}: has no folder {source.folder}; delete it to have it fetched again")
            try:
                os.rename(unpacked, root / source.folder)
            except OSError:  # another process of this run was faster
                if not (root / source.folder).is_dir():
                    raise
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: cannot be unpacked ({_brief(error)}); delete it to have it fetched again, "
                         "or use --dataset synthetic") from error


# ---------------------------------------------------------------------------------------------------------- readers

# What damaged bytes make an unpickler or scipy's reader raise; nothing of ours is called inside those two calls.
_DAMAGE = (pickle.UnpicklingError, zlib.error, struct.error, ArithmeticError, AssertionError, AttributeError, EOFError,
           ImportError, LookupError, MemoryError, NotImplementedError, OSError, RecursionError, TypeError, ValueError)


def _brief(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 120)


class _Dtype:
    """Takes what a pickle hands to numpy.dtype."""
    name = None

    def __init__(self, name, *flags):
        self.name = name

    def __setstate__(self, state):
        pass


class _Array:
    """Takes what a pickle hands to a NumPy array, and builds none."""
    state = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


class _CifarUnpickler(pickle._Unpickler):
    """Admits the four names of a pickled array, each as a stand-in: neither NumPy nor anything else is called.

    The unpickler in Python, because the one in C allocates whatever a damaged memo index asks for.
    """
    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}
    admitted = {
        ("numpy.core.multiarray", "_reconstruct"): _Array, ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): str.encode,
    }

    def find_class(self, module, name):
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return self.admitted[module, name]


def _read_cifar(path: Path, source: _Source) -> tuple[Tensor, Tensor]:
    """One batch file -> uint8 [N, 3, 32, 32], int64 [N]."""
    try:
        batch = _CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except _DAMAGE as error:
        raise InputError(f"{path}: truncated or not a CIFAR batch ({_brief(error)}); {_remedy(source)}") from error

    def require(fine: bool, what: str) -> None:
        if not fine:
            raise InputError(f"{path}: {what}; {_remedy(source)}")

    require(type(batch) is dict, "not a dictionary")
    key = "labels" if source.num_classes == 10 else "fine_labels"
    data, labels = batch.get(b"data"), batch.get(key.encode())
    require(type(data) is _Array and type(data.state) is tuple and len(data.state) == 5, "no array under 'data'")
    _, shape, dtype, fortran, raw = data.state
    require(type(dtype) is _Dtype and dtype.name in (b"u1", "u1") and fortran in (False, 0) and type(raw) is bytes,
            "'data' is not a row-major array of uint8")
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


# -------------------------------------------------------------------------------------------------------- synthetic

def _generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own for every key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


# The three horizontal (top, middle, bottom) and four vertical strokes of a seven-segment display.
_STROKES = torch.tensor([  # centre x, centre y, half width, half height
    [0, -1, .6, 0], [0, 0, .6, 0], [0, 1, .6, 0], [-.6, -.5, 0, .5], [.6, -.5, 0, .5], [-.6, .5, 0, .5], [.6, .5, 0, .5]])
# Two horizontal and two vertical strokes each, so that neither ink nor directions tell the class: only the arrangement
# does. No two are mirror images (the training set is flipped) or shifts of one another.
_FIGURES = torch.tensor([[a, b, c, d] for a, b in ((0, 1), (1, 2), (0, 2)) for c, d in ((3, 4), (5, 6), (3, 5), (3, 6))
                         if (a, b, c, d) not in ((1, 2, 5, 6), (0, 2, 3, 5))])


def synthetic(seed: int, n_train: int = 5000, n_test: int = 1000) -> tuple[ImageSet, ImageSet]:
    """Ten figures of four strokes, distorted and in random colours among stray strokes, 32x32, classes balanced."""
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

    ys, xs = torch.meshgrid(torch.arange(32.), torch.arange(32.), indexing="ij")
    pixels = torch.stack([xs, ys]).flatten(1) - 15.5  # [2, P]

    # The figure: pixel coordinates through a random affine map into the frame of the strokes.
    scale, angle, shear = uniform(7, 9.5, 1), uniform(-.2, .2), uniform(-.2, .2)
    cos, sin = angle.cos(), angle.sin()
    x, y = (pixels - uniform(-3, 3, 2, 1)).unbind(1)  # [B, P] each
    y, x = y * cos[:, None] - x * sin[:, None], x * cos[:, None] + y * sin[:, None]
    point = torch.stack([x + shear[:, None] * y, y], 1) / scale[:, None]  # [B, 2, P]
    stroke = _STROKES[_FIGURES[labels]]  # [B, 4, 4]
    outside = ((point[:, None] - stroke[:, :, :2, None]).abs() - stroke[:, :, 2:, None]).clamp_(min=0)  # [B, 4, 2, P]
    distance = outside.square().sum(2).sqrt().amin(1) * scale  # [B, P], pixels
    figure = (uniform(.8, 1.6, 1) + .5 - distance).clamp(0, 1)[:, None]  # [B, 1, P]

    # Stray strokes: two short ones anywhere, in a colour of their own.
    start, along = uniform(-16, 16, 2, 2, 1), uniform(-6, 6, 2, 2, 1)
    offset = pixels - start  # [B, 2, 2, P]
    t = ((offset * along).sum(2, keepdim=True) / along.square().sum(2, keepdim=True)).clamp_(0, 1)
    distance = (offset - t * along).square().sum(2).sqrt().amin(1)
    stray = (1.2 - distance).clamp(0, 1)[:, None]  # [B, 1, P]

    # The background varies slowly; figure and strays differ from its mean by a contrast in a random direction.
    background = uniform(.25, .75, 3, 1)
    ground = background + F.interpolate(uniform(-.12, .12, 3, 4, 4), size=(32, 32), mode="bilinear").flatten(2)
    towards = torch.where(background > .5, -1., 1.)
    image = torch.lerp(ground, background + towards * uniform(.1, .4, 3, 1), stray)
    image = torch.lerp(image, background + towards * uniform(.3, .6, 3, 1), figure)
    image += uniform(-.08, .08, 3, 1024)
    return image.clamp_(0, 1).mul_(255).round_().byte().view(n, 3, 32, 32)


# ---------------------------------------------------------------------------------------------------------- batches

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
    """(images / 255 - mean) / std in float32 or wider, then `dtype`. images: uint8 [n, 3, H, W]; mean, std: [3, 1, 1]"""
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
