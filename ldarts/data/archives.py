"""CIFAR-10/100 from the original Python archives, SVHN from its cropped-digits .mat files (needs scipy).

Files from elsewhere run no code: the unpickler allows only arrays. Nothing is unpacked outside the folder.
"""
import hashlib
import http.client
import os
import pickle
import tarfile
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from ..errors import InputError, brief, progress, require
from ..locks import locked
from .batches import ImageSet


class Source(NamedTuple):
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: str  # in the archive; "" if there is no archive: url + file is downloaded for each file
    files: tuple[str, ...]  # the last is the test set
    url: str
    md5: tuple[str, ...]  # of each download


SOURCES = {
    "cifar10": Source(
        10, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768), "cifar-10-batches-py",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", ("c58f30108f718f92721af3b95e74349a",)),
    "cifar100": Source(
        100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar-100-python", ("train", "test"),
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", ("eb9058c3a382ffc7106e4002c42a8d85",)),
    "svhn": Source(
        10, (0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197), "",
        ("train_32x32.mat", "test_32x32.mat"), "http://ufldl.stanford.edu/housenumbers/",
        ("e26dedcc434d2e4c54c9b2d4a06d8373", "eb5a983be6a315427106f1b164d9cef3")),
}


def read_archive(name: str, root: Path) -> tuple[ImageSet, ImageSet]:
    """The training and the test set of SOURCES[name]. root: see locate."""
    source = SOURCES[name]
    folder = locate(source, root)
    if name == "svhn":
        require("scipy", "--dataset svhn")
    parts = [read_file(folder / file, source) for file in source.files]
    whole = parts[0]._replace(images=torch.cat([part.images for part in parts]),
                              labels=torch.cat([part.labels for part in parts]))
    return whole.split(len(whole.labels) - len(parts[-1].labels))


def locate(source: Source, root: Path) -> Path:
    """The folder with the source's files, downloaded into root if the folder (SVHN: the file) is missing.

    root: that folder, one that holds it or the archive, or the archive itself, which is unpacked beside it.
    One process downloads and unpacks, the others wait.
    """
    archive = root / Path(source.url).name
    if root.is_file() or source.folder and root.name == archive.name and not root.exists():
        archive, root = root, root.parent
    folder = root / source.folder
    if not folder.is_dir() and any((root / file).is_file() for file in source.files):
        folder = root
    if not source.folder:
        for file, md5 in zip(source.files, source.md5):
            fetch(source.url + file, md5, folder / file)
    elif not folder.is_dir():
        fetch(source.url, source.md5[0], archive)
        unpack(archive, folder, source)
    return folder


def fetch(url: str, md5: str, path: Path) -> None:
    """Download url to path if path is missing. The file appears whole, with the right MD5, or not at all."""
    by_hand = f"put {url} at {path}, name its folder by --data, or use --dataset synthetic"
    if path.is_file():
        return
    existing = next(folder for folder in path.parents if folder.is_dir())  # where a failure leaves nothing
    try:
        with locked(existing / f"{path.name}.lock"), tempfile.TemporaryDirectory(dir=existing) as scratch:
            if path.is_file():
                return
            partial = Path(scratch, path.name)
            with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as file:
                file.writelines(progress(iter(lambda: response.read(10**6), b""), f"{url}: MB"))
            received = hashlib.md5(partial.read_bytes(), usedforsecurity=False).hexdigest()
            if received != md5:
                raise InputError(f"{path}: {url} sent MD5 {received}, not {md5}; try again, or {by_hand}")
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{path}: cannot be downloaded ({brief(error)}); {by_hand}") from error


def unpack(archive: Path, folder: Path, source: Source) -> None:
    """Unpack the regular files of a folder of the archive, which appears whole or not at all."""
    try:
        with (locked(Path(f"{archive}.lock")), tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
              tarfile.open(archive) as tar):
            if folder.is_dir():
                return
            unpacked = Path(scratch, folder.name)
            unpacked.mkdir()
            for member in tar:  # one by one: some releases of Python 3.10 and 3.11 lack tarfile's filters
                path = PurePosixPath(member.name)
                if member.isreg() and path.parts == (folder.name, path.name):
                    (unpacked / path.name).write_bytes(tar.extractfile(member).read())
            if not any(unpacked.iterdir()):
                raise tarfile.TarError(f"it has no files {folder.name}/…")
            try:
                os.rename(unpacked, folder)
            except OSError:
                if not folder.is_dir():  # made by another process, where there are no locks
                    raise
    except Exception as error:  # damaged bytes raise many kinds
        remedy = f"get it again from {source.url}"
        if isinstance(error, OSError) and error.errno:  # of the disk: gzip's errors have no number
            remedy = "unpack it elsewhere and give that folder by --data"
        raise InputError(f"{archive}: cannot be unpacked ({brief(error)}); {remedy}, "
                         "or use --dataset synthetic") from error


class Recorded:
    """Stands for an array or a dtype of a pickle: NumPy's own, built as a hostile file asks, could read other
    memory. The state of an array: version, shape, dtype, Fortran order, bytes."""

    def __init__(self, *arguments):
        self.arguments = self.state = arguments

    def __setstate__(self, state):
        self.state = state


ALLOWED = {  # the names in a pickled array and what they stand for; NumPy 2 has numpy._core
    "numpy.ndarray": Recorded, "numpy.dtype": Recorded, "numpy.core.multiarray._reconstruct": Recorded,
    "numpy.core.numeric._frombuffer": lambda content, dtype, shape, order: Recorded(
        1, shape, dtype, order == "F", content),
    "_codecs.encode": str.encode,
}


class CifarUnpickler(pickle._Unpickler):
    """Allows the names in ALLOWED and no others, so that a file cannot run code.

    It is the unpickler in Python; the one in C allocates as much memory as a damaged file asks for.
    """

    def find_class(self, module: str, name: str):
        full_name = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if full_name not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {full_name}, which no CIFAR file does")
        return ALLOWED[full_name]


def read_file(path: Path, source: Source) -> ImageSet:
    """One file of CIFAR or SVHN. Raises InputError if it is missing or damaged."""
    try:
        read = read_svhn if path.suffix == ".mat" else read_cifar
        images, labels = map(torch.tensor, read(path))
        return ImageSet(images, labels, source.num_classes, source.mean, source.std).checked(path.name)
    except Exception as error:  # damaged bytes raise many kinds
        raise InputError(f"{path}: cannot be read ({brief(error)}); get it again from {source.url}, "
                         "or use --dataset synthetic") from error


def read_cifar(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images [N, 3, 32, 32] and labels of a batch file."""
    with open(path, "rb") as file:
        batch = CifarUnpickler(file, encoding="bytes").load()
    # Published files have keys of bytes.
    by_name = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    labels = by_name.get("fine_labels") or by_name["labels"]  # CIFAR-100 has coarse ones, too
    if {*map(type, labels)} != {int}:
        raise ValueError("the labels are not a list of integers")
    _, shape, dtype, in_fortran_order, content = by_name["data"].state
    if dtype.arguments[0] not in ("u1", b"u1") or shape != (len(labels), 3072):
        raise ValueError(f"images of {dtype.arguments[0]} {shape} for {len(labels)} labels, not u1 (…, 3072)")
    images = np.frombuffer(content, np.uint8).reshape(shape, order="F" if in_fortran_order else "C")
    return images.reshape(-1, 3, 32, 32), labels


def read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3, 32, 32] and labels of a file of cropped digits, in which the label 10 stands for 0."""
    from scipy.io import loadmat
    content = loadmat(path, variable_names=("X", "y"))
    labels = content["y"].ravel().astype(np.int64, casting="safe")
    if labels.min() < 1 or labels.max() > 10:
        raise ValueError("y has other values than integers from 1 to 10")
    return np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)), labels % 10
