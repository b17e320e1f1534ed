"""Folders of images: their classes and kinds, what else lies there, batches, and runs on them."""
import multiprocessing
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from test_evidence import refused, run_main

import train_eval
from ldarts import InputError, runs
from ldarts.data import FolderBatches, folder_batches
from ldarts.data.folders import ImageFolder, augmented, random_box

image = pytest.importorskip("PIL.Image")


@pytest.fixture
def imagenet(tmp_path):
    """Two classes of generated JPEGs, of sizes that are wide, high and small."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 3)):
        for c, name in enumerate(("n01", "n02")):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(count):
                size = ((300, 260), (120, 400), (500, 90), (64, 64))[k]
                pixels = torch.rand(size[1], size[0], 3, generator=generator) * 100 + 100 * c
                image.fromarray(pixels.byte().numpy()).save(tmp_path / part / name / f"{k}.jpeg")
    return tmp_path


def folders(root):
    return folder_batches(root, ["train", "val"], 4, 0, device=torch.device("cpu"), workers=0)


@pytest.mark.filterwarnings("error")
def test_classes_are_folders_of_images_in_both_parts(imagenet):
    train, val = folders(imagenet)
    assert train.images.classes == val.images.classes == ["n01", "n02"]
    for name in ("train/n01/images", "train/n00", "val/n00"):  # as in Tiny ImageNet; a class before others
        (imagenet / name).mkdir()
    (imagenet / "train/n01/0.jpeg").rename(imagenet / "train/n01/images/0.JPEG")
    for part in ("train", "val"):
        shutil.copy(imagenet / part / "n02/1.jpeg", imagenet / part / "n00/1.jpeg")
    train, val = folders(imagenet)
    assert train.images.classes == val.images.classes == ["n00", "n01", "n02"]
    assert train.images.labels == [0] + [1] * 4 + [2] * 4 and val.images.labels == [0] + [1] * 3 + [2] * 3


def test_what_is_no_image_is_no_class_and_is_counted(imagenet):
    (imagenet / "train/.ipynb_checkpoints").mkdir()
    (imagenet / "val/empty").mkdir()
    shutil.copytree(imagenet / "val/n01", imagenet / "val/.ipynb_checkpoints")
    for name in ("train/.DS_Store", "train/n01/readme.txt", "val/n02/._1.jpeg", "val/list.txt"):
        (imagenet / name).write_text("")
    with pytest.warns(UserWarning, match=rf"{imagenet}: skipped 7 files and folders .*4 more") as warned:
        train, val = folders(imagenet)
    assert len(warned) == 1 and len(train.images.files) == 8 and len(val.images.files) == 6
    assert train.images.classes == val.images.classes == ["n01", "n02"]


@pytest.mark.parametrize("path, others, said", [
    ("val/n01", None, r"only in train/: n01; only in val/: none"),
    ("val/n01", "val/n03", r"only in train/: n01; only in val/: n03"),
    ("train/n02", None, r"only in train/: none; only in val/: n02"),
    ("val", None, "val: cannot be read .*must hold val/"), ("val", "val/n01/n02", "only in train/: n02"),
    ("train", "train/.hidden", "train: no folders of images")])
def test_other_classes_are_refused_before_the_first_epoch(imagenet, path, others, said, monkeypatch, capsys):
    (imagenet / path).rename(imagenet / "away")
    if others:
        (imagenet / others).parent.mkdir(parents=True, exist_ok=True)
        (imagenet / "away").rename(imagenet / others)
    monkeypatch.chdir(imagenet)
    with pytest.raises(InputError, match=said):
        folders(imagenet)
    before = sorted(imagenet.iterdir())
    refused(monkeypatch, capsys, train_eval, "--dataset", "imagenet", "--data", imagenet)
    assert sorted(imagenet.iterdir()) == before


@pytest.mark.parametrize("name, dtype, factor", [
    ("8.png", "uint8", 1), ("16.png", "uint16", 257), ("16.tif", "uint16", 257), ("16.pgm", "uint16", 257),
    ("16.tif", ">u2", 257), ("32.tif", "int32", 257)])
def test_gray_images_are_taken_by_their_range(tmp_path, name, dtype, factor):
    pixels = torch.arange(0, 256).repeat_interleave(256).reshape(256, 256).numpy()
    (tmp_path / "gray").mkdir()
    image.fromarray((pixels * factor).astype(dtype)).save(tmp_path / "gray" / name)
    x, label = ImageFolder(tmp_path, train=False)[0, 0]
    folder = ImageFolder(tmp_path, train=False)
    shown = x * folder.normalize.std + folder.normalize.mean
    expected = torch.as_tensor(pixels[16:240, 16:240]) / 255
    torch.testing.assert_close(shown, expected.expand(3, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("save", [
    lambda path: image.new("F", (9, 9)).save(path), lambda path: image.new("I", (9, 9), 65536).save(path),
    lambda path: path.write_bytes(b"no image"), lambda path: path.symlink_to("nowhere")],
    ids=["floats", "32 bits", "text", "a broken link"])
def test_an_image_that_cannot_be_shown_is_named(tmp_path, save):
    (tmp_path / "gray").mkdir()
    save(tmp_path / "gray/1.tif")
    with pytest.raises(InputError, match="gray/1.tif: cannot be read as an image"):
        ImageFolder(tmp_path, train=True)[0, 0]


def test_the_identity_of_a_folder_tells_it_from_others(imagenet, tmp_path_factory):
    def identity():
        return ImageFolder(imagenet / "train", train=True).identity()

    before, path = identity(), imagenet / "train/n01/3.jpeg"
    whole = path.read_bytes()
    path.write_bytes(whole[:-99])  # and got again: the run goes on
    assert identity() == before == ImageFolder(
        shutil.copytree(imagenet / "train", tmp_path_factory.mktemp("copy") / "x"), train=True).identity()
    path.rename(path.with_name("5.jpeg"))
    assert identity() != before
    image.new("RGB", (64, 63)).save(path)
    path.with_name("5.jpeg").unlink()
    assert identity() != before
    assert (before["images"], before["classes"]) == (8, 2)


def test_imagenet_batches_depend_on_seed_and_epoch_alone(imagenet):
    def batches(seed, workers, epoch, train=True, start=0, **share):
        kind = "train" if train else "val"
        return list(FolderBatches(imagenet / kind, 4, seed, train=train, device=torch.device("cpu"),
                                  workers=workers, **share).epoch(epoch, start))

    first = batches(0, 0, 1)
    assert len(first) == 2 and first[0][0].shape == (4, 3, 224, 224)
    assert sum(int(y.sum()) for _, y in first) == 4
    for other in (batches(0, 2, 1), [tuple(map(torch.cat, zip(*parts))) for parts in zip(
            batches(0, 0, 1, rank=0, world=2), batches(0, 0, 1, rank=1, world=2))]):
        assert all(torch.equal(a, b) for pair in zip(first, other) for a, b in zip(*pair))
    assert all(map(torch.equal, first[1], *batches(0, 0, 1, start=1)))
    images = ImageFolder(imagenet / "train", train=True)
    assert not torch.equal(images[1, 0][0], images[2, 0][0])  # new crops in each epoch
    assert batches(0, 0, 1)[0][1].tolist() != batches(0, 0, 2)[0][1].tolist()
    assert not torch.equal(first[0][0], batches(1, 0, 1)[0][0])
    tested = batches(0, 0, 0, train=False)
    assert [len(y) for _, y in tested] == [4, 2]
    assert [len(y) for _, y in batches(0, 0, 0, train=False, rank=1, world=2)] == [2]  # no part of the last
    assert torch.cat([y for _, y in tested]).tolist() == [0, 0, 0, 1, 1, 1]
    bright = torch.stack([x.mean() for x in torch.cat([x for x, _ in tested])])
    assert bright[:3].max() < bright[3:].min()  # images and labels stay together
    assert random_box(9000, 9, random.Random(0)) == (4494, 0, 4506, 9)  # of a long image always the middle


def test_images_are_augmented_and_normalised_as_published(imagenet):
    class Noted(random.Random):
        def uniform(self, low, high):
            ranges.add((round(float(low), 4), round(float(high), 4)))
            return super().uniform(low, high)

    ranges, folder = set(), ImageFolder(imagenet / "train", train=True)
    augmented(image.new("RGB", (300, 200)), Noted(0))
    # Of the area, the logarithm of the ratio of its sides, brightness and the like, the hue.
    assert ranges == {(0.08, 1), (-0.2877, 0.2877), (0.6, 1.4), (-0.2, 0.2)}
    for values, published in ((folder.normalize.mean, [0.485, 0.456, 0.406]),
                              (folder.normalize.std, [0.229, 0.224, 0.225])):
        assert values.flatten().tolist() == pytest.approx(published)


def test_signals_to_the_group_of_a_run_spare_its_workers_which_end_with_it(imagenet):
    batches = FolderBatches(imagenet / "train", 1, 0, train=True, device=torch.device("cpu"), workers=1)
    before, epoch = multiprocessing.active_children(), batches.epoch()
    next(epoch)
    worker, = set(multiprocessing.active_children()) - set(before)
    assert os.getpgid(worker.pid) != os.getpgrp()
    worker.terminate()  # as the end of a program does
    worker.join(5)
    assert worker.exitcode == 0
    epoch.close()


@pytest.mark.parametrize("size, reason", [("4m", "unable to allocate shared memory"), ("4k", "No space")])
def test_workers_without_shared_memory_are_told_to_be_none(size, reason, imagenet):
    """/dev/shm as small as in a container: for the images of a worker, and for a worker's semaphore."""
    argv = [sys.executable, train_eval.__file__, "--dataset", "imagenet", "--data", ".", "--epochs", "1",
            "--init_channels", "4", "--layers", "2", "--no-auxiliary", "--batch_size", "8", "--workers", "2"]
    inside = f'mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 77; exec "$@"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside, "sh", *argv], cwd=imagenet, text=True,
                          capture_output=True)
    if "unshare" in done.stderr or done.returncode == 77:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.strip()}")
    message, *others = done.stderr.splitlines()
    assert done.returncode == 2 and message.startswith("error: --workers 2: ")
    assert reason in message and "use --workers 0" in message
    assert not others or "Exception ignored in: <function _MultiProcessingDataLoaderIter" in others[0]


def test_imagenet_trains_and_names_a_damaged_image(imagenet, monkeypatch, capsys):
    monkeypatch.chdir(imagenet)
    flags = ["--dataset", "ImageNet", "--data", imagenet, "--init_channels", 16, "--layers", 3,
             "--batch_size", 4, "--epochs", 2, "--workers", 2]
    run_main(monkeypatch, train_eval, *flags, "--save", "one")
    config, metrics = runs.read_run("runs/one")
    assert (config["learning_rate"], config["weight_decay"]) == (0.5, 3e-5)
    assert (config["label_smoothing"], config["drop_path_prob"]) == (0.1, 0.0)
    assert len(metrics) == 2 and 0 <= metrics[1]["test_accuracy"] <= 100
    (imagenet / "train").rename("away")  # a test reads val/ alone, in batches of any size
    run_main(monkeypatch, train_eval, "--evaluate", "runs/one", "--batch_size", 100)
    assert f"accuracy {metrics[1]['test_accuracy']:.2f} %" in capsys.readouterr().out
    (imagenet / "away").rename("train")
    whole = (imagenet / "train/n02/1.jpeg").read_bytes()
    for content in (b"no image", whole[:-999]):  # found by the start, and by a worker
        (imagenet / "train/n02/1.jpeg").write_bytes(content)
        assert "train/n02/1.jpeg" in refused(monkeypatch, capsys, train_eval, *flags,
                                             "--save", f"of {len(content)} bytes")
    (imagenet / "train/n02/1.jpeg").rename(imagenet / "train/n01/9.jpeg")
    assert "8 images of 2 classes" in refused(monkeypatch, capsys, train_eval, "--resume", "runs/one")
