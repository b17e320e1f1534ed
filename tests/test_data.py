"""ldarts.data against per-image references, real byte layouts, and files that are damaged or hostile."""
import hashlib
import importlib.util
import io
import itertools
import os
import pickle
import random
import struct
import sys
import tarfile
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from ldarts import data
from ldarts.data import archives
from ldarts.data.archives import SOURCES, read_cifar, read_svhn
from ldarts.data.batches import generator_of
from ldarts.errors import InputError

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="SVHN needs scipy")


def image_set(n=40, height=32, width=32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(n), n, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


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


def load_error(root, name="cifar10", download=False) -> str:
    with pytest.raises(InputError) as caught:
        data.load(name, root, "cpu", download=download)
    assert "\n" not in str(caught.value) and "--dataset synthetic" in str(caught.value)
    return str(caught.value)


# ---- batches

def test_augmentation_equals_a_loop_over_images_and_pixels():
    source, length, half, seen = image_set(height=12, width=10), 6, 3, 0
    batches = data.Batches(source, None, 8, 5, augment=True, cutout_length=length, dtype=torch.float64)
    generator = generator_of(5, "train", 2)
    order = torch.randperm(40, generator=generator).tolist()
    shift, flip = torch.randint(9, (40, 2), generator=generator), torch.rand(40, generator=generator) < 0.5
    centre = (torch.rand(40, 2, generator=generator) * torch.tensor([12, 10])).long()
    keep = torch.rand(40, generator=generator) < 0.5
    assert flip.any() and not flip.all() and keep.any() and not keep.all()
    for x, y in batches.epoch(2, cutout_prob=0.5):
        for got, label in zip(x, y):
            assert label == order[seen]
            padded = np.zeros((3, 20, 18))
            padded[:, 4:-4, 4:-4] = source.images[label].numpy()
            (dy, dx), (cy, cx) = shift[seen].tolist(), centre[seen].tolist()
            want = padded[:, dy:dy + 12, dx:dx + 10]
            if flip[seen]:
                want = want[:, :, ::-1]
            want = (want / 255 - np.reshape(source.mean, (3, 1, 1))) / np.reshape(source.std, (3, 1, 1))
            if keep[seen]:
                for r in range(max(cy - half, 0), min(cy + half, 12)):
                    for c in range(max(cx - half, 0), min(cx + half, 10)):
                        want[:, r, c] = 0
            np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12)
            seen += 1
    assert seen == 40


@pytest.mark.parametrize("prob, share", [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_cutout_probability(prob, share):
    source = image_set(2000, 8, 8)._replace(images=torch.full((2000, 3, 8, 8), 255, dtype=torch.uint8))
    batches = data.Batches(source, None, 2000, 0, augment=True, cutout_length=8)
    plain = data.Batches(source, None, 2000, 0, augment=True)
    (x, _), (reference, _) = next(batches.epoch(0, cutout_prob=prob)), next(plain.epoch(0))
    assert (x != reference).flatten(1).any(1).float().mean().item() == pytest.approx(share, abs=0.04)
    assert torch.equal(x[x != 0], reference[x != 0])


def test_shifts_and_centres_reach_every_value():
    ones = image_set(4000, 8, 8)._replace(images=torch.full((4000, 3, 8, 8), 255, dtype=torch.uint8))
    (x, _), = data.Batches(ones, None, 4000, 0, augment=True).epoch(0)
    black = x[:, 0] < 0  # padding before normalisation: -mean / std, not 0
    assert sorted(set(black.all(2).sum(1).tolist())) == [0, 1, 2, 3, 4]
    (x, _), = data.Batches(ones, None, 4000, 0, augment=True, cutout_length=2).epoch(0)
    assert ((x[:, 0] == 0).sum(0) > 0).all()


def test_start_skips_and_epochs_seeds_and_tags_differ():
    def take(epoch=3, start=0, seed=7, tag="train"):
        batches = data.Batches(image_set(), None, 8, seed, tag=tag, augment=True, cutout_length=4)
        assert len(batches) == 5
        return list(batches.epoch(epoch, start=start))

    whole, rest = take(), take(start=3)
    assert len(rest) == 2
    for (x, y), (x_again, y_again) in zip(whole[3:], rest):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    for other in (take(epoch=4), take(seed=8), take(tag="valid")):
        assert not torch.equal(whole[0][1], other[0][1])


def test_ranks_partition_the_global_batch():
    def take(**share):
        indices = torch.arange(1, 40, 2)
        return list(data.Batches(image_set(), indices, 6, 0, augment=True, cutout_length=8, **share).epoch(1))

    whole, parts = take(), [take(rank=rank, world=3) for rank in range(3)]
    assert len(whole) == 3 and all(y.remainder(2).eq(1).all() for _, y in whole)
    assert len(torch.cat([y for _, y in whole]).unique()) == 18
    for step, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(y, torch.cat([part[step][1] for part in parts]))


def test_dtype_layout_and_no_augmentation():
    source = image_set()
    batches = data.Batches(source, None, 8, 0, augment=False, cutout_length=8, dtype=torch.bfloat16,
                           memory_format=torch.channels_last)
    x, y = next(batches.epoch(0))
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(value)[:, None, None] for value in (source.mean, source.std))
    want = (source.images[y] / 255 - mean) / std
    torch.testing.assert_close(x.float(), want, rtol=1e-2, atol=1e-2)


def test_eval_batches_are_in_order_and_complete():
    source = image_set()
    got = list(data.eval_batches(source, None, 16))
    assert [len(y) for _, y in got] == [16, 16, 8]
    assert torch.equal(torch.cat([y for _, y in got]), source.labels)
    back = torch.cat([x for x, _ in got]) * torch.tensor(source.std)[:, None, None]
    back = (back + torch.tensor(source.mean)[:, None, None]) * 255
    torch.testing.assert_close(back, source.images.float(), rtol=0, atol=1e-3)
    (_, y), = data.eval_batches(source, torch.tensor([5, 3]), 16)
    assert y.tolist() == [5, 3]


def test_batches_refuse_what_cannot_be_filled_or_divided():
    for size, world in ((41, 1), (0, 1), (8, 3)):
        with pytest.raises(InputError, match=f"batch size {size}"):
            data.Batches(image_set(), None, size, 0, augment=True, world=world)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CPU with a GPU; there is none")
def test_gpu_sees_the_batches_of_the_cpu_without_synchronising():
    def take(device):
        source = image_set()
        source = source._replace(images=source.images.to(device), labels=source.labels.to(device))
        batches = data.Batches(source, None, 8, 0, augment=True, cutout_length=8).epoch(0)
        first = next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return [first, *batches]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for (x, y), (x_gpu, y_gpu) in zip(take("cpu"), take("cuda"), strict=True):
        torch.testing.assert_close(x_gpu.cpu(), x, rtol=1e-6, atol=1e-6)
        assert torch.equal(y_gpu.cpu(), y)


# ---- files

@pytest.mark.parametrize("below", ["", "cifar-10-batches-py"])
def test_cifar10_from_root_or_the_folder_itself(tmp_path, below):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    train, test = data.load("cifar10", tmp_path / below, "cpu", download=False)
    want = np.concatenate([rows(3, seed=i) for i in range(5)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(train.images.numpy(), want)
    assert train.labels.tolist() == [(i + j) % 10 for i in range(5) for j in range(3)]
    assert train.labels.dtype == torch.int64 and train.images.dtype == torch.uint8 and train.num_classes == 10
    np.testing.assert_array_equal(test.images.numpy(), rows(3, seed=5).reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("protocol", [None, 2, 4])  # None: as published, else as Python 3 writes them again
def test_cifar100_fine_labels(tmp_path, protocol):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, labels in (("train", [0, 99, 42]), ("test", [7])):
        pixels = rows(len(labels))
        (folder / name).write_bytes(
            python2_pickle(labels, pixels, b"fine_labels") if protocol is None else
            pickle.dumps({b"fine_labels": labels, b"coarse_labels": [0], b"data": pixels}, protocol))
    train, test = data.load("cifar100", tmp_path, "cpu", download=False)
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
    "column-major": pickle.dumps({b"labels": [1, 2, 3], b"data": np.asfortranarray(rows())}, 2),
    "floats": pickle.dumps({b"labels": [1, 2, 3], b"data": rows().astype(np.float32)}, 2),
    "a list": pickle.dumps([1, 2, 3], 2),
    "memo of 32 GiB": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytearray of 2^60": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_cifar_names_the_file(tmp_path, content):
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").write_bytes(content)
    assert str(folder / "data_batch_3") in load_error(tmp_path)


def test_mutated_cifar_raises_nothing_but_input_error(tmp_path):
    source, path, rng = SOURCES["cifar10"], tmp_path / "test_batch", random.Random(0)
    good = python2_pickle([1], rows(1))
    header, refused = good.index(rows(1).tobytes()), 0
    for _ in range(800):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(header) if rng.random() < 0.9 else -rng.randint(1, 3)] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            images, labels = read_cifar(path, source)
            assert images.shape == (1, 3, 32, 32) and 0 <= labels.item() < 10
        except InputError:
            refused += 1
    assert refused > 200


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


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(InputError, match="cifar10, cifar100, svhn, synthetic"):
        data.load("cifar", tmp_path, "cpu")
    assert str(tmp_path / "cifar-100-python.tar.gz") in load_error(tmp_path, "cifar100")
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_5").unlink()
    assert str(folder / "data_batch_5") in load_error(tmp_path, download=True)  # never mixed with a download
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


def tar_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_no_network_says_where_to_put_what(tmp_path, monkeypatch, name):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(archives.urllib.request, "urlopen", urlopen)
    message, root = load_error(tmp_path / "new", name, download=True), tmp_path / "new"
    assert "no route to host" in message and SOURCES[name].url in message and str(root) in message
    assert list(root.iterdir()) == []


def test_download_unpacks_the_archive(tmp_path, monkeypatch, capfd):
    source = write_cifar10(tmp_path / "source" / "cifar-10-batches-py")
    files = {f"cifar-10-batches-py/{path.name}": path.read_bytes() for path in source.iterdir()}
    serve(monkeypatch, tar_of(files))
    train, _ = data.load("cifar10", tmp_path / "root", "cpu")
    assert len(train.labels) == 15 and "MB" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["cifar-10-batches-py",
                                                                          "cifar-10-python.tar.gz"]


def test_checksum_mismatch_leaves_nothing(tmp_path, monkeypatch):
    serve(monkeypatch, b"something else", md5="0" * 32)
    assert "MD5" in load_error(tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["../escaped", "cifar-10-batches-py/../../escaped",
                                  "cifar-10-batches-py/../../../escaped"])
def test_an_archive_cannot_write_outside(tmp_path, monkeypatch, path):
    serve(monkeypatch, tar_of({path: b"x"}))
    root = tmp_path / "a" / "b"
    assert "cannot be unpacked" in load_error(root, download=True)
    assert [found.name for found in tmp_path.rglob("*") if found.is_file()] == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("content", [b"", b"not a tar", tar_of({"other/x": b"x"}),
                                     tar_of({"a/b": bytes(9999)})[:-40]])
def test_a_damaged_archive(tmp_path, content):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    assert str(tmp_path / "cifar-10-python.tar.gz") in load_error(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


# ---- SVHN

def write_svhn(folder: Path, labels=(10, 1, 9, 5), **changed) -> np.ndarray:
    from scipy.io import savemat
    images = rows(4).reshape(4, 3, 32, 32)
    content = {"X": images.transpose(2, 3, 1, 0), "y": np.array(labels, np.uint8)[:, None], **changed}
    for name in ("train_32x32.mat", "test_32x32.mat"):
        savemat(folder / name, content, do_compression=True)
    return images


@needs_scipy
def test_svhn(tmp_path):
    images = write_svhn(tmp_path)
    train, test = data.load("svhn", tmp_path, "cpu", download=False)
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
            read_svhn(path, SOURCES["svhn"])
        except InputError:
            pass


def test_svhn_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "pip install scipy" in load_error(tmp_path, "svhn")


# ---- synthetic and real images

@pytest.fixture(scope="module")
def drawn():
    start = time.process_time()
    return *data.load("synthetic", "", "cpu"), time.process_time() - start


def test_synthetic_is_quick_and_balanced(drawn):
    train, test, cpu_seconds = drawn
    assert cpu_seconds < 10  # 1 s of wall clock on two idle cores
    assert train.images.shape == (5000, 3, 32, 32) and test.images.shape == (1000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [500] * 10 and test.labels.bincount().tolist() == [100] * 10


def test_synthetic_is_a_function_of_its_seed():
    (train, test), again, other = (data.synthetic(seed, 100, 50) for seed in (3, 3, 4))
    assert torch.equal(train.images, again[0].images) and torch.equal(test.images, again[1].images)
    assert not torch.equal(train.images, other[0].images)


def test_synthetic_pixels_agree_with_their_partners_alone(drawn):
    """A pixel correlates with those at its class's distance, to either side, and no other within five."""
    train, _, _ = drawn
    for label, (dx, dy) in enumerate(((4, 0), (4, 2), (4, 4), (2, 4), (0, 4))):
        grain = train.images[train.labels % 5 == label].float().mean(1)
        grain = (grain - grain.mean((1, 2), keepdim=True)) / grain.std((1, 2), keepdim=True)
        for y, x in itertools.product(range(6), range(-5, 6)):
            if (y, x) == (0, 0):
                continue
            near = grain[:, y:, max(0, x): 32 + min(0, x)]
            far = grain[:, : 32 - y, max(0, -x): 32 - max(0, x)]
            expected = 0.0 if (abs(x), y) != (dx, dy) else 0.5 if 0 in (dx, dy) else 0.25
            assert abs(float((near * far).mean()) - expected) < 0.04, (label, y, x)


def test_synthetic_colour_says_little(drawn):
    train, test, _ = drawn

    def features(part):  # [N, 4]: mean of each channel
        return torch.cat([part.images.float().mean((2, 3)) / 255, torch.ones(len(part.labels), 1)], 1)

    weights = torch.linalg.lstsq(features(train), torch.eye(10)[train.labels]).solution
    assert ((features(test) @ weights).argmax(1) == test.labels).float().mean() < 0.2


@pytest.mark.skipif("LDARTS_DATA" not in os.environ,
                    reason="set LDARTS_DATA to a folder with cifar-10-batches-py")
def test_real_images():
    train, test = data.load("cifar10", os.environ["LDARTS_DATA"], "cpu", download=False)
    assert len(train.labels) % 5 == 0 and train.labels.unique().tolist() == list(range(10))
    pixels = train.images.float().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(pixels.mean(1), torch.tensor(train.mean), rtol=0, atol=0.02)
    torch.testing.assert_close(pixels.std(1), torch.tensor(train.std), rtol=0, atol=0.02)
    smooth = (pixels.view(3, -1, 32, 32).diff(dim=3)).abs().mean()
    assert smooth < 0.1  # neighbours are alike: rows and channels are where they belong
    assert len(list(data.eval_batches(test, None, 256))) == -(-len(test.labels) // 256)
