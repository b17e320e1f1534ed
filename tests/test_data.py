"""Batches against per-image references; the synthetic set; what every data set has to be."""
import itertools
import os
import time

import numpy as np
import pytest
import torch

from ldarts import data
from ldarts.data.batches import generator_of
from ldarts.errors import InputError

def image_set(n=40, height=32, width=32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    return data.ImageSet(images, torch.arange(n), n, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


# ---- batches

def test_augmentation_equals_a_loop_over_images_and_pixels():
    source, length, half, seen = image_set(height=12, width=10), 6, 3, 0
    batches = data.Batches(source, None, 8, 5, cutout_length=length)
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
            np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=2e-6)
            seen += 1
    assert seen == 40


@pytest.mark.parametrize("prob, share", [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_cutout_probability(prob, share):
    source = image_set(2000, 8, 8)._replace(images=torch.full((2000, 3, 8, 8), 255, dtype=torch.uint8))
    batches = data.Batches(source, None, 2000, 0, cutout_length=8)
    plain = data.Batches(source, None, 2000, 0)
    (x, _), (reference, _) = next(batches.epoch(0, cutout_prob=prob)), next(plain.epoch(0))
    assert (x != reference).flatten(1).any(1).float().mean().item() == pytest.approx(share, abs=0.04)
    assert torch.equal(x[x != 0], reference[x != 0])


def test_shifts_and_centres_reach_every_value():
    ones = image_set(4000, 8, 8)._replace(images=torch.full((4000, 3, 8, 8), 255, dtype=torch.uint8))
    (x, _), = data.Batches(ones, None, 4000, 0).epoch(0)
    black = x[:, 0] < 0  # padding before normalisation: -mean / std, not 0
    assert sorted(set(black.all(2).sum(1).tolist())) == [0, 1, 2, 3, 4]
    (x, _), = data.Batches(ones, None, 4000, 0, cutout_length=2).epoch(0)
    assert ((x[:, 0] == 0).sum(0) > 0).all()


def test_start_skips_and_epochs_turns_seeds_and_tags_differ():
    def take(epoch=3, turn=0, start=0, seed=7, tag="train"):
        batches = data.Batches(image_set(), None, 8, seed, tag=tag, cutout_length=4)
        assert len(batches) == 5
        return list(batches.epoch(epoch, turn=turn, start=start))

    whole, rest = take(), take(start=3)
    assert len(rest) == 2
    for (x, y), (x_again, y_again) in zip(whole[3:], rest):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    for other in (take(epoch=4), take(turn=1), take(seed=8), take(tag="valid")):
        assert not torch.equal(whole[0][1], other[0][1])


def test_ranks_partition_the_global_batch():
    def take(**share):
        indices = torch.arange(1, 40, 2)
        return list(data.Batches(image_set(), indices, 6, 0, cutout_length=8, **share).epoch(1))

    whole, parts = take(), [take(rank=rank, world=3) for rank in range(3)]
    assert len(whole) == 3 and all(y.remainder(2).eq(1).all() for _, y in whole)
    assert len(torch.cat([y for _, y in whole]).unique()) == 18
    for step, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(y, torch.cat([part[step][1] for part in parts]))


def test_a_layout_changes_no_number():
    default, channels_last = (
        next(data.Batches(image_set(), None, 8, 0, cutout_length=8, memory_format=layout).epoch(0))
        for layout in (torch.contiguous_format, torch.channels_last))
    assert default[0].is_contiguous() and channels_last[0].is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, default, channels_last))


def test_eval_batches_are_in_order_and_complete():
    source = image_set()
    got = list(data.eval_batches(source, torch.arange(40), 16))
    assert [len(y) for _, y in got] == [16, 16, 8]
    assert torch.equal(torch.cat([y for _, y in got]), source.labels)
    back = torch.cat([x for x, _ in got]) * torch.tensor(source.std)[:, None, None]
    back = (back + torch.tensor(source.mean)[:, None, None]) * 255
    torch.testing.assert_close(back, source.images.float(), rtol=0, atol=1e-3)
    (_, y), = data.eval_batches(source, torch.tensor([5, 3]), 16)
    assert y.tolist() == [5, 3]
    assert list(data.eval_batches(source, torch.arange(40)[40:], 16)) == []  # more processes than images


def test_batches_refuse_what_cannot_be_filled_or_divided():
    for size, world in ((41, 1), (0, 1), (8, 3)):
        with pytest.raises(InputError, match=f"batch size {size}"):
            data.Batches(image_set(), None, size, 0, world=world)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CPU with a GPU; there is none")
def test_gpu_sees_the_batches_of_the_cpu_without_synchronising():
    def take(device):
        source = image_set()
        source = source._replace(images=source.images.to(device), labels=source.labels.to(device))
        batches = data.Batches(source, None, 8, 0, cutout_length=8).epoch(0)
        first = next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return [first, *batches]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for (x, y), (x_gpu, y_gpu) in zip(take("cpu"), take("cuda"), strict=True):
        torch.testing.assert_close(x_gpu.cpu(), x, rtol=1e-6, atol=1e-6)
        assert torch.equal(y_gpu.cpu(), y)


def test_what_leaves_nothing_to_train_on_is_refused():
    data.Batches(image_set(height=8, width=8), None, 8, 0, cutout_length=14)
    with pytest.raises(InputError, match="--cutout_length 16: it covers images of 8 pixels"):
        data.Batches(image_set(height=8, width=8), None, 8, 0, cutout_length=16)
    data.halves(100, 0.01, 0)
    with pytest.raises(InputError, match="--train_portion 0.01: of 50 images"):
        data.halves(50, 0.01, 0)


# ---- data sets

def test_gray_images_get_three_equal_channels():
    source = image_set(height=28, width=28)
    for gray in (source.images[:, 0], source.images[:, :1]):
        checked = source._replace(images=gray).checked("mine")
        assert torch.equal(checked.images, source.images[:, :1].repeat(1, 3, 1, 1))
        batches = data.Batches(checked, None, 8, 0, cutout_length=8)
        assert next(batches.epoch(0))[0].shape == (8, 3, 28, 28)
    assert source.checked("mine") == source


def test_pixels_of_smaller_images_are_rounded_means_of_squares():
    source = image_set(height=8, width=8)
    squares = source.images.double().unflatten(3, (4, 2)).unflatten(2, (4, 2))
    assert torch.equal(source.smaller(4).images, squares.mean((3, 5)).round().byte())


@pytest.mark.parametrize("changed, said", [
    ({"num_classes": 39}, "label 39 with 39 classes; use labels from 0 to 38"),
    ({"labels": torch.arange(40) - 1}, "label -1 with 40 classes"),
    ({"labels": torch.arange(39)}, r"labels of torch.int64 \[39\]; expected torch.int64 \[40\]"),
    ({"labels": torch.arange(40).float()}, "labels of torch.float32"),
    ({"images": torch.zeros(40, 32, 32, 3, dtype=torch.uint8)}, r"\[40, 32, 32, 3\]; expected"),
    ({"images": torch.zeros(40, 3, 32, 32)}, "images of torch.float32"),
    ({"images": torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "labels": torch.arange(0)}, "it has no images")])
def test_a_set_that_is_not_what_it_says_is_refused(changed, said, monkeypatch):
    monkeypatch.setattr(data, "synthetic", lambda seed: [image_set()._replace(**changed)] * (seed == 7))
    with pytest.raises(InputError, match="data set synthetic: .*" + said):
        data.load("synthetic", "", "cpu", seed=7)


def test_the_identity_of_a_set_tells_it_from_others():
    source = image_set(1500)._replace(num_classes=2000)  # every second image counts
    other_pixel, other_label = source.images.clone(), source.labels.clone()
    other_pixel[2, 1, 5, 5] += 1
    other_label[3] = 0
    others = [source, source._replace(images=other_pixel), source._replace(labels=other_label),
              source._replace(num_classes=1500), *source.split(1499), *source.split(1500)[1:]]
    identities = [str(images.identity()) for images in others]
    assert len(set(identities)) == len(others)
    assert source.identity() == source.to("cpu").identity()
    assert (source.identity()["images"], source.identity()["classes"]) == (1500, 2000)


def test_halves_are_random_by_the_seed_and_have_the_classes_of_the_whole():
    labels = torch.arange(10).repeat_interleave(100)  # sorted by class
    for_w, for_alpha = data.halves(1000, 0.6, 3)
    assert (len(for_w), len(for_alpha)) == (600, 400)
    assert torch.cat([for_w, for_alpha]).sort().values.equal(torch.arange(1000))
    assert labels[for_w].bincount().min() > 40 and labels[for_alpha].bincount().min() > 20
    assert torch.equal(data.halves(1000, 0.6, 3)[0], for_w)
    assert not torch.equal(data.halves(1000, 0.6, 4)[0], for_w)


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
    for label, (dx, dy) in enumerate(((3, 0), (3, 2), (3, 3), (2, 3), (0, 3))):
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
    train, test = data.load("cifar10", os.environ["LDARTS_DATA"], "cpu")
    assert len(train.labels) % 5 == 0 and train.labels.unique().tolist() == list(range(10))
    pixels = train.images.float().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(pixels.mean(1), torch.tensor(train.mean), rtol=0, atol=0.02)
    torch.testing.assert_close(pixels.std(1), torch.tensor(train.std), rtol=0, atol=0.02)
    smooth = (pixels.view(3, -1, 32, 32).diff(dim=3)).abs().mean()
    assert smooth < 0.1  # neighbours are alike: rows and channels are where they belong
    batches = data.eval_batches(test, torch.arange(len(test.labels)), 256)
    assert len(list(batches)) == -(-len(test.labels) // 256)
