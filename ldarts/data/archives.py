"""CIFAR-10/100 from the original Python archives, SVHN from its cropped-digits .mat files (needs scipy).

Files from outside run no code: the unpickler admits arrays alone, and an archive stays in its folder.
"""
import hashlib
import http.client
import io
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, brief
from .batches import ImageSet


class Source(NamedTuple):
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: str  # of the archive; "": the downloads are the files themselves
    train: tuple[str, ...]
    test: tuple[str, ...]
    url: str
    md5: tuple[str, ...]  # one a download


SOURCES = {
    "cifar10": Source(
        10, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768), "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", ("c58f30108f718f92721af3b95e74349a",)),
    "cifar100": Source(
        100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), "cifar-100-python", ("train",), ("test",),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", ("eb9058c3a382ffc7106e4002c42a8d85",)),
    "svhn": Source(
        10, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), "", ("train_32x32.mat",), ("test_32x32.mat",),
        "http://ufldl.stanford.edu/housenumbers/",
        ("e26dedcc434d2e4c54c9b2d4a06d8373", "eb5a983be6a315427106f1b164d9cef3")),
}


def read_archive(name: str, root: Path, download: bool) -> tuple[ImageSet, ImageSet]:
    """The training and the test set of SOURCES[name]. root: see locate."""
    source, read = SOURCES[name], read_svhn if name == "svhn" else read_cifar
    folder = locate(source, root, download)

    def image_set(files: tuple[str, ...]) -> ImageSet:
        images, labels = zip(*(read(folder / file, source) for file in files))
        return ImageSet(torch.cat(images), torch.cat(labels), source.num_classes, source.mean, source.std)

    return image_set(source.train), image_set(source.test)


def locate(source: Source, root: Path, download: bool) -> Path:
    """The folder of the source's files, fetched into root when the folder (SVHN: the file) is not there.

    root: that folder, one that holds it or the archive, or the archive itself, which is unpacked beside it.
    """
    files, archive = source.train + source.test, root / Path(source.url).name
    if root.is_file() or source.folder and root.name == archive.name and not root.exists():
        archive, root = root, root.parent
    folder = root if any((root / file).is_file() for file in files) else root / source.folder
    if not source.folder:
        for file, md5 in zip(files, source.md5):
            fetch(source.url + file, md5, folder / file, download)
    elif not folder.is_dir():
        fetch(source.url, source.md5[0], archive, download)
        unpack(archive, root, source)
    for file in files:
        if not (folder / file).is_file():
            raise useless(folder / file, "no such file", source)
    return folder


def useless(path: Path, what: str, source: Source) -> InputError:
    return InputError(f"{path}: {what}; get it again from {source.url}, or use --dataset synthetic")


def fetch(url: str, md5: str, path: Path, download: bool) -> None:
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
            if (found := digest.hexdigest()) != md5:
                raise InputError(f"{path}: {url} sent MD5 {found}, not {md5}; try again, or {by_hand}")
            os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{path}: cannot be fetched ({brief(error)}); {by_hand}") from error


def unpack(archive: Path, root: Path, source: Source) -> None:
    """Unpack the regular files right in the source's folder, which appears whole or not at all."""
    folder = source.folder
    try:
        with tempfile.TemporaryDirectory(dir=root) as scratch, tarfile.open(archive) as tar:
            for member in tar:  # by hand: not every Python 3.10 and 3.11 has tarfile's filters
                path = PurePosixPath(member.name)
                if member.isreg() and path.parts == (folder, path.name):
                    Path(scratch, folder).mkdir(exist_ok=True)
                    with open(Path(scratch, path), "wb") as file:
                        shutil.copyfileobj(tar.extractfile(member), file)
            if not Path(scratch, folder).exists():
                raise tarfile.TarError(f"it has no files {folder}/…")
            try:
                os.rename(Path(scratch, folder), root / folder)
            except OSError:  # another process of this run may have been faster
                if not (root / folder).is_dir():
                    raise
    except Exception as error:  # whatever damaged bytes lead to
        if isinstance(error, OSError) and error.errno:  # of the disk: gzip's errors have no number
            raise InputError(f"{archive}: cannot be unpacked ({brief(error)}); unpack it elsewhere and give "
                             "that folder by --data, or use --dataset synthetic") from error
        raise useless(archive, f"cannot be unpacked ({brief(error)})", source) from error


class Standin:
    """Keeps what a pickle would hand to numpy.dtype or to an array, and calls neither."""
    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


def from_buffer(raw, dtype, shape, order, *axes) -> Standin:
    """Protocol 5's array, kept as earlier ones are: (version, shape, dtype, column-major, bytes)."""
    array = Standin()
    array.state = 1, shape, dtype, order != "C" or bool(axes), raw
    return array


class CifarUnpickler(pickle._Unpickler):
    """Admits the names in a pickled array and nothing else: no code that a file asks for is run.

    It is the unpickler in Python because the one in C allocates whatever memo index a damaged file has.
    """
    # Its own bytearray allocates as much as it is told to; bytes are written alike, and read as they come.
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8}
    admitted = {("numpy", "ndarray"): Standin, ("numpy", "dtype"): Standin, ("_codecs", "encode"): str.encode,
                ("numpy.core.multiarray", "_reconstruct"): Standin,
                ("numpy._core.multiarray", "_reconstruct"): Standin,
                ("numpy.core.numeric", "_frombuffer"): from_buffer,
                ("numpy._core.numeric", "_frombuffer"): from_buffer}

    def find_class(self, module, name):
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does")
        return self.admitted[module, name]


def read_cifar(path: Path, source: Source) -> tuple[Tensor, Tensor]:
    """One batch file -> uint8 [N, 3, 32, 32], int64 [N]."""
    def demand(fine: bool, otherwise: str) -> None:
        if not fine:
            raise useless(path, otherwise, source)

    try:
        batch = CifarUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # whatever damaged bytes lead to; no code of ours is run
        raise useless(path, f"truncated or not a CIFAR batch ({brief(error)})", source) from error
    demand(type(batch) is dict, "not a dictionary")
    key = "labels" if source.num_classes == 10 else "fine_labels"
    data, labels = (batch.get(name.encode(), batch.get(name)) for name in ("data", key))  # published: bytes
    demand(type(data) is Standin and type(data.state) is tuple and len(data.state) == 5,
           "no array under 'data'")
    _, shape, dtype, fortran, raw = data.state
    demand(type(dtype) is Standin and dtype.args[:1] in ((b"u1",), ("u1",)) and fortran in (False, 0)
           and type(raw) is bytes, "'data' is not a row-major array of uint8")
    demand(type(shape) is tuple and len(shape) == 2 and type(shape[0]) is int and shape[0] > 0
           and shape[1] == 3072 and len(raw) == shape[0] * 3072,
           "'data' is not [rows, 3072] with at least one row")
    demand(type(labels) is list and len(labels) == shape[0], f"'{key}' is not a list of {shape[0]} labels")
    demand(all(type(label) is int and 0 <= label < source.num_classes for label in labels),
           f"'{key}' has something other than integers from 0 to {source.num_classes - 1}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3, 32, 32), torch.tensor(labels)


def read_svhn(path: Path, source: Source) -> tuple[Tensor, Tensor]:
    """One file of cropped digits -> uint8 [N, 3, 32, 32], int64 [N]; the label 10 stands for the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"{path}: reading SVHN needs scipy; pip install scipy, "
                         "or use --dataset synthetic") from error
    try:
        content = loadmat(path, variable_names=("X", "y"))
        images, labels = content["X"], content["y"]
    except Exception as error:
        raise useless(path, f"truncated or not SVHN ({brief(error)})", source) from error
    if images.dtype != "uint8" or images.shape[:3] != (32, 32, 3) or images.ndim != 4 or not images.size:
        raise useless(path, f"X is {images.dtype} {images.shape}, not uint8 (32, 32, 3, N)", source)
    count = images.shape[3]
    if labels.dtype.kind not in "iu" or labels.size != count or labels.min() < 1 or labels.max() > 10:
        raise useless(path, f"y is not {count} integers from 1 to 10", source)
    images = torch.from_numpy(images).permute(3, 2, 0, 1).contiguous()
    return images, torch.from_numpy(labels.astype("int64").ravel()) % 10
