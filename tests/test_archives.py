"""CIFAR and SVHN from real byte layouts, and from files that are damaged or hostile."""
import errno
import hashlib
import importlib.util
import io
import os
import pickle
import random
import struct
import sys
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from ldarts import data
from ldarts.data import archives
from ldarts.data.archives import SOURCES, read_file
from ldarts.errors import InputError

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="SVHN needs scipy")


def text(value: bytes) -> bytes:
    """One Python-2 str in pickle protocol 2."""
    return b"U" + bytes([len(value)]) + value


def python2_pickle(labels, rows: np.ndarray, key=b"labels") -> bytes:
    """A CIFAR batch with the opcodes of the published files."""
    array = (b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01"
             b"M%bM%b\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xff"
             b"J\xff\xff\xff\xffK\x00tb\x89T%b%btb" % (
                 struct.pack("<H", rows.shape[0]), struct.pack("<H", rows.shape[1]),
                 struct.pack("<I", rows.nbytes), rows.tobytes()))
    return b"".join([b"\x80\x02}q\x01(", text(b"batch_label"), b"q\x02", text(b"a batch"), b"q\x03",
                     text(key), b"q\x04]q\x05(", *(b"K" + bytes([label]) for label in labels), b"e",
                     text(b"data"), b"q\x06", array, b"u."])


def rows(n=3, width=3072, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, width), dtype=np.uint8)


def write_cifar10(folder: Path, n=3) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(python2_pickle([(i + j) % 10 for j in range(n)], rows(n, seed=i)))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(archives.urllib.request, "urlopen", urlopen)


def load_error(root, name="cifar10") -> str:
    with pytest.raises(InputError) as caught:
        data.load(name, root, "cpu")
    assert "\n" not in str(caught.value) and "--dataset synthetic" in str(caught.value)
    return str(caught.value)


# ---- files

@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_from_root_or_the_folder_itself(tmp_path, below):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    train, test = data.load("cifar10", tmp_path / below, "cpu")
    want = np.concatenate([rows(3, seed=i) for i in range(5)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(train.images.numpy(), want)
    assert train.labels.tolist() == [(i + j) % 10 for i in range(5) for j in range(3)]
    assert train.labels.dtype == torch.int64 and train.images.dtype == torch.uint8 and train.num_classes == 10
    np.testing.assert_array_equal(test.images.numpy(), rows(3, seed=5).reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("protocol", [None, 0, 2, 4, 5])  # None: as published, else as Python 3 writes it
@pytest.mark.parametrize("key", [bytes.decode, bytes], ids=["text", "bytes"])
def test_cifar100_fine_labels(tmp_path, protocol, key):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, labels in (("train", [0, 99, 42]), ("test", [7])):
        pixels = rows(len(labels))
        (folder / name).write_bytes(
            python2_pickle(labels, pixels, b"fine_labels") if protocol is None else
            pickle.dumps({key(b"coarse_labels"): [3] * len(labels), key(b"fine_labels"): labels,
                          b"batch_label": b"x", key(b"data"): pixels}, protocol))
    train, test = data.load("cifar100", tmp_path, "cpu")
    assert train.num_classes == 100 and train.labels.tolist() == [0, 99, 42] and test.labels.tolist() == [7]
    np.testing.assert_array_equal(train.images.numpy(), rows(3).reshape(-1, 3, 32, 32))


DAMAGED = {
    "empty": b"",
    "foreign": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "truncated": python2_pickle([1, 2, 3], rows())[:-500],
    "narrow": python2_pickle([1, 2, 3], rows(width=3071)),
    "no rows": python2_pickle([], rows(0)),
    "label out of range": python2_pickle([1, 2, 10], rows()),
    "too few labels": python2_pickle([1, 2], rows()),
    "no labels": python2_pickle([1, 2, 3], rows(), b"other"),
    "labels of text": pickle.dumps({b"labels": ["a", "b", "c"], b"data": rows()}, 2),
    "true for a label": pickle.dumps({b"labels": [True, 1, 1], b"data": rows()}, 2),
    "floats": pickle.dumps({b"labels": [1, 2, 3], b"data": rows().astype(np.float32)}, 2),
    "a list": pickle.dumps([1, 2, 3], 2),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_cifar_names_the_file(tmp_path, content):
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").write_bytes(content)
    assert str(folder / "data_batch_3") in load_error(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_mutated_cifar_raises_nothing_but_input_error(tmp_path):
    source, path, rng = SOURCES["cifar10"], tmp_path / "test_batch", random.Random(0)
    good = python2_pickle([1], rows(1))
    header, refused = good.index(rows(1).tobytes()), 0
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(header) if rng.random() < 0.9 else -rng.randint(1, 3)] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            part = read_file(path, source)
            assert part.images.shape == (1, 3, 32, 32) and 0 <= part.labels.item() < 10
        except InputError:
            refused += 1
    assert refused > 100


class Exploit:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_runs_no_code(tmp_path, protocol):
    folder, target = write_cifar10(tmp_path / "cifar-10-batches-py"), tmp_path / "made by the pickle"
    for call in ((os.mkdir, str(target)), (eval, f"open({str(target)!r}, 'w')"), (np.save, str(target), 0)):
        (folder / "test_batch").write_bytes(pickle.dumps({b"data": Exploit(*call), b"labels": []}, protocol))
        assert "asks for" in load_error(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]


def hostile(labels: str, dtype: str) -> bytes:
    """A batch whose arrays NumPy would make of 8 bytes of the file and of memory that is not theirs: an array of
    objects, at an address that the file gives, or of a dtype of 3,072 bytes."""
    def pushed(value):
        return pickle.dumps(value, 4)[2:-1]  # without protocol and stop

    u1 = b"cnumpy\ndtype\n" + pushed(("u1", 0, 1)) + b"R"
    wide = u1 + b"(" + pushed(3) + pushed("|") + b"(" + u1 + pushed((3072,)) + b"tNN" + pushed(3072) + pushed(1) + (
        pushed(0) + b"tb")
    objects = b"cnumpy\ndtype\n" + pushed(("O",)) + b"R"
    types = {"u1": u1, "wide": wide, "objects": objects}

    def array(shape, name, content):
        return b"cnumpy\nndarray\n(" + pushed(shape) + types[name] + pushed(content) + b"tR"

    if dtype == "number":  # instead of bytes: bytes(10**13) would be ten terabytes
        images = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + pushed((0,)) + pushed(b"b") + b"tR("
                  + pushed(1) + pushed((1, 3072)) + u1 + pushed(False) + pushed(10**13) + b"tb")
    else:
        images = array((1,) if dtype == "wide" else (1, 3072), dtype, bytes(8 if dtype == "wide" else 3072))
    of_labels = array((1,), labels, b"A" * 8) if labels else pushed([1])
    return b"\x80\x04}(" + pushed(b"labels") + of_labels + pushed(b"data") + images + b"u."


@pytest.mark.parametrize("labels, dtype", [("objects", "u1"), ("", "wide"), ("u1", "u1"), ("", "number")])
def test_a_pickle_reads_no_memory_of_others(labels, dtype, tmp_path):
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(hostile(labels, dtype))
    assert "test_batch: cannot be read (" in (message := load_error(tmp_path))
    assert dtype != "number" or "bytes-like object is required, not 'int'" in message


def test_images_in_another_order_are_read_or_refused(tmp_path):
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    expected = data.load("cifar10", tmp_path, "cpu")[1].images
    batch = pickle.loads((folder / "test_batch").read_bytes(), encoding="bytes")
    images = np.asarray(batch[b"data"], dtype=np.uint8)
    for protocol in (2, 4, 5):
        (folder / "test_batch").write_bytes(pickle.dumps(batch | {b"data": np.asfortranarray(images)}, protocol))
        assert torch.equal(data.load("cifar10", tmp_path, "cpu")[1].images, expected)
        by_pixel = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        (folder / "test_batch").write_bytes(pickle.dumps(batch | {b"data": by_pixel}, protocol))
        assert "test_batch: cannot be read" in load_error(tmp_path)


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(InputError, match="cifar10, cifar100, svhn, synthetic"):
        data.load("cifar", tmp_path, "cpu")
    assert str(tmp_path / "cifar-100-python.tar.gz") in load_error(tmp_path, "cifar100")
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_5").unlink()
    assert str(folder / "data_batch_5") in load_error(tmp_path)  # never mixed with a download
    (folder / "data_batch_5").mkdir()
    assert str(folder / "data_batch_5") in load_error(tmp_path)


# ---- downloads

def serve(monkeypatch, content: bytes, name="cifar10", md5=None):
    class Response(io.BytesIO):
        headers = {}

    def urlopen(url, timeout):
        return Response(content)

    md5 = hashlib.md5(content).hexdigest() if md5 is None else md5
    monkeypatch.setattr(archives.urllib.request, "urlopen", urlopen)
    monkeypatch.setitem(SOURCES, name, SOURCES[name]._replace(md5=(md5, md5)))


def tar_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_no_network_says_where_to_put_what(tmp_path, name):
    root = tmp_path / "new" / "housenumbers"  # a folder yet to be made, whatever the URL ends in
    message = load_error(root, name)
    assert "no route to host" in message and SOURCES[name].url in message and str(root) in message
    assert "--data" in message and not list(tmp_path.iterdir())


def packed_cifar10(folder: Path, below="cifar-10-batches-py", **options) -> bytes:
    source = write_cifar10(folder / "source")
    return tar_of({f"{below}/{path.name}": path.read_bytes() for path in source.iterdir()}, **options)


@pytest.mark.parametrize("given", ["", "cifar-10-python.tar.gz"], ids=["the folder", "the archive"])
def test_download_unpacks_the_archive(tmp_path, monkeypatch, capfd, given):
    serve(monkeypatch, packed_cifar10(tmp_path))
    monkeypatch.setattr("ldarts.errors.progress.__defaults__", (0.0,))
    train, _ = data.load("cifar10", tmp_path / "root" / given, "cpu")
    assert len(train.labels) == 15 and "cifar-10-python.tar.gz: MB 1\n" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["cifar-10-batches-py",
                                                                          "cifar-10-python.tar.gz"]


@pytest.mark.parametrize("below", ["cifar-10-batches-py", "./cifar-10-batches-py"])
def test_an_archive_that_is_there_is_unpacked_by_any_python(tmp_path, monkeypatch, below):
    archive = tmp_path / "root" / "mine.tgz"
    archive.parent.mkdir()
    archive.write_bytes(packed_cifar10(tmp_path, below))
    for name in ("extract", "extractall"):  # whose filters some Pythons lack
        monkeypatch.delattr(tarfile.TarFile, name)
    for given in (archive, archive.parent / "cifar-10-batches-py" / "test_batch", archive.parent):
        assert len(data.load("cifar10", given, "cpu")[0].labels) == 15


def test_links_in_an_archive_lead_nowhere(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    links = {"cifar-10-batches-py": str(outside), "cifar-10-batches-py/data_batch_1": str(outside / "x")}
    serve(monkeypatch, packed_cifar10(tmp_path, links=links))
    assert len(data.load("cifar10", tmp_path / "root", "cpu")[0].labels) == 15
    assert not list(outside.iterdir()) and not (tmp_path / "root/cifar-10-batches-py").is_symlink()


def test_an_archive_on_a_full_disk_is_no_damaged_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    serve(monkeypatch, packed_cifar10(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    message = load_error(tmp_path / "root")
    assert "No space left" in message and "--data" in message and "again" not in message
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["cifar-10-python.tar.gz"]


def test_checksum_mismatch_leaves_nothing(tmp_path, monkeypatch):
    serve(monkeypatch, b"something else", md5="0" * 32)
    assert "MD5" in load_error(tmp_path / "new" / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../escaped", "cifar-10-batches-py/../../escaped",
                                  "cifar-10-batches-py/../../../escaped"])
def test_an_archive_cannot_write_outside(tmp_path, monkeypatch, path):
    serve(monkeypatch, tar_of({path: b"x"}))
    root = tmp_path / "a" / "b"
    assert "cannot be unpacked" in load_error(root)
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("content", [b"", b"not a tar", tar_of({"other/x": b"x"}),
                                     tar_of({"a/b": bytes(9999)})[:-40]])
def test_a_damaged_archive(tmp_path, content):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    for given in (tmp_path, tmp_path / "cifar-10-python.tar.gz"):
        message = load_error(given)
        assert str(tmp_path / "cifar-10-python.tar.gz") in message and "get it again from http" in message
    assert len(list(tmp_path.iterdir())) == 1


# ---- SVHN

def write_svhn(folder: Path, labels=(10, 1, 9, 5), **changed) -> np.ndarray:
    from scipy.io import savemat
    images = rows(4).reshape(4, 3, 32, 32)
    content = {"X": images.transpose(2, 3, 1, 0), "y": np.array(labels, np.uint8)[:, None], **changed}
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(folder / name, content, do_compression=True)
    return images


def test_pixels_are_normalised_as_published():
    assert {name: (source.mean, source.std) for name, source in SOURCES.items()} == {
        "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))}


@needs_scipy
def test_svhn(tmp_path):
    images = write_svhn(tmp_path)
    train, test = data.load("svhn", tmp_path / "train_32x32.mat", "cpu")  # or the folder
    assert train.labels.tolist() == [0, 1, 9, 5] and train.labels.dtype == torch.int64
    np.testing.assert_array_equal(test.images.numpy(), images)


@needs_scipy
def test_damaged_svhn(tmp_path):
    for changed in ({"labels": (0, 1, 2, 3)}, {"labels": (11, 1, 2, 3)}, {"labels": (1, 2, 3)},
                    {"X": rows(4)}, {"X": np.zeros((32, 32, 3, 4))}, {"y": np.array([1., 2, 3, 4])},
                    {"y": "text"}, {"X": "text"}):
        write_svhn(tmp_path, **changed)
        assert str(tmp_path / "train_32x32.mat") in load_error(tmp_path, "svhn")
    write_svhn(tmp_path)
    path, rng = tmp_path / "train_32x32.mat", random.Random(0)
    good = path.read_bytes()
    for bad in (b"", good[:100], good[:-100], b"foreign" * 50):
        path.write_bytes(bad)
        assert str(path) in load_error(tmp_path, "svhn")
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(300)] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            read_file(path, SOURCES["svhn"])
        except InputError:
            pass


def test_svhn_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match="--dataset svhn needs scipy.* pip install scipy"):
        data.load("svhn", tmp_path, "cpu")
