"""What each epoch of the published protocols trains with: the scripts run, their steps are recorded."""
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_eval
import train_search
from ldarts import Architect, SearchNetwork, data, runs
from ldarts.data import ImageSet
from ldarts.distributed import Processes
from ldarts.runs import Run

# name: epochs, batch, and for some epochs the learning rates of w and α, λ, ε₀, the probability of cutout.
# w's rate falls along a cosine from 0.025 to 0.001; λ and cutout grow by epoch / (epochs - 1).
SEARCH = {
    "cifar10": (50, 64, {
        0: (0.025, 3e-4, 0, 1e-4, 0), 1: (0.0249763, 3e-4, 0.125 / 49, 1e-4, 1 / 49),
        25: (0.013, 3e-4, 0.125 * 25 / 49, 1e-4, 25 / 49), 49: (0.0010237, 3e-4, 0.125, 1e-4, 1)}),
    "svhn": (50, 96, {
        0: (0.025, 3e-4, 0, 1e-3, 0), 25: (0.013, 3e-4, 0.25 * 25 / 49, 1e-3, 25 / 49),
        49: (0.0010237, 3e-4, 0.25, 1e-3, 1)}),
    "nasbench201": (100, 64, {
        0: (0.025, 1e-4, 0, 1e-4, 0), 50: (0.013, 1e-4, 0.25 * 50 / 99, 1e-4, 50 / 99),
        99: (0.0010059, 1e-4, 0.25, 1e-4, 1)}),
}
# flags: epochs, batch, and for some epochs the learning rate, drop path, label smoothing, weight of the
# auxiliary loss, probability of cutout. CIFAR-10: cosine from 0.025 to 0. ImageNet: up to 0.5 in five epochs
# if the batch is above 256, then 0.5 (245 - epoch) / 245, in the last five 0.5 (250 - epoch) / (5 * 245).
EVAL = {
    "cifar10": (600, 96, {
        0: (0.025, 0, 0, 0.4, 1), 300: (0.0125, 0.1, 0, 0.4, 1),
        599: (1.71347e-7, 0.2 * 599 / 600, 0, 0.4, 1)}),
    "imagenet": (250, 1024, {
        0: (0.1, 0, 0.1, 0.4, 0), 1: (0.2, 0, 0.1, 0.4, 0), 4: (0.5, 0, 0.1, 0.4, 0),
        5: (0.5 * 240 / 245, 0, 0.1, 0.4, 0), 125: (0.5 * 120 / 245, 0, 0.1, 0.4, 0),
        244: (0.5 / 245, 0, 0.1, 0.4, 0), 245: (0.5 / 245, 0, 0.1, 0.4, 0),
        249: (0.1 / 245, 0, 0.1, 0.4, 0)}),
    "imagenet --batch_size 256": (250, 256, {
        0: (0.5, 0, 0.1, 0.4, 0), 4: (0.5 * 241 / 245, 0, 0.1, 0.4, 0), 249: (0.1 / 245, 0, 0.1, 0.4, 0)}),
    # A gradient of norm 0.91959 is clipped, which reads as more smoothing: 1 - 0.9 * 0.5 / 0.91959.
    "imagenet --epochs 2 --grad_clip 0.5": (2, 1024, {
        0: (0.1, 0, 0.51065, 0.4, 0), 1: (0.2, 0, 0.51065, 0.4, 0)}),
}


class Folder:
    """One batch of ImageNet an epoch."""

    images = SimpleNamespace(labels=[0], num_classes=10, identity=dict)

    def __len__(self):
        return 1

    def epoch(self, *args, **options):
        return iter([(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))])


class TwoBiases(nn.Module):
    """Logits that are 0 before the first step. The gradient w.r.t. those of the true class, one of ten, is
    -0.9 (1 - label smoothing), for the auxiliary ones times their weight."""

    cells, engine = (), SimpleNamespace(coverage=str)

    def __init__(self, *args):
        super().__init__()
        self.main, self.auxiliary = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))
        self.frozen = nn.Parameter(torch.zeros(10))  # after the first step

    def forward(self, x, drop_path_prob=0.0):
        self.drop_path_prob = drop_path_prob
        return self.main.expand(len(x), 10), self.auxiliary.expand(len(x), 10)


class Second(Processes):
    """The second of two, whose exchanges are with itself."""

    def __init__(self, device):
        self.rank, self.world, self.device = 1, 2, device

    def average(self, tensors):
        return list(tensors)

    def largest(self, *values):
        return list(values)

    def gather(self, tensor):
        return tensor[None]

    def close(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(script, flags) -> probabilities of cutout and metrics by epoch; without checkpoints and tests."""
    monkeypatch.chdir(tmp_path)
    cutouts, lines, epoch_of = [], [], data.Batches.epoch

    def epoch(batches, epoch, cutout_prob=1.0, *args, **options):
        assert batches.cutout_length in (0, 16)
        if batches.tag == "train":
            cutouts[epoch:] = [cutout_prob if batches.cutout_length else 0]
        else:
            assert cutout_prob == cutouts[epoch] or not batches.cutout_length
        return epoch_of(batches, epoch, cutout_prob, *args, **options)

    def load(*args, **options):
        images = torch.zeros(200, 3, 12, 12, dtype=torch.uint8)
        labels = (torch.arange(200) >= 192).long()  # those of the test set are 1
        return ImageSet(images, labels, 10, (0.5,) * 3, (0.5,) * 3).split(192)

    monkeypatch.setattr(data.Batches, "epoch", epoch)
    monkeypatch.setattr(Run, "save", lambda run: None)
    monkeypatch.setattr(Run, "_write_metrics", lambda run: lines.append(run.history[-1]))
    for script in (train_search, train_eval):
        monkeypatch.setattr(script, "evaluate", lambda *args: (1.0, 10.0))
        monkeypatch.setattr(script, "load", load)
        monkeypatch.setattr(script, "check_images", lambda *args: None)

    def main(script, flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags.split(), "--report_freq", "1000"])
        script.main()
        return cutouts, lines
    return main


def assert_rows(rows, cutouts, epochs, wanted):
    assert len(rows) == len(cutouts) == epochs
    for epoch, row in wanted.items():
        assert (*rows[epoch], cutouts[epoch]) == pytest.approx(row, rel=1e-4, abs=1e-6), epoch
        assert rows[epoch][0] == pytest.approx(row[0], rel=1e-4), epoch


def settings(optimizer):
    names = {"momentum", "betas", "weight_decay"} & {*optimizer.defaults}
    return {name: optimizer.param_groups[0][name] for name in names} | (
        {"eps": optimizer.defaults["eps"]} if "eps" in optimizer.defaults else {})


@pytest.mark.parametrize("parse, flags, published", [
    ("search", "", {"init_channels": 16, "layers": 8, "train_portion": 0.5, "cutout": False}),
    ("search", "--search_space nasbench201", {"init_channels": 16, "layers": 5, "train_portion": 0.5}),
    ("eval", "", {"init_channels": 36, "layers": 20, "auxiliary": True, "cutout": True}),
    ("eval", "--dataset imagenet", {"init_channels": 48, "layers": 14, "auxiliary": True})])
def test_the_published_size_is_the_default(parse, flags, published, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    args = runs.parse_search_args() if parse == "search" else runs.parse_eval_args()[0]
    assert published == {name: getattr(args, name) for name in published}


@pytest.mark.parametrize("space", ["darts", "nasbench201"])
def test_alpha_starts_as_published(space):
    values = torch.cat([SearchNetwork(2, 10, 1, space).arch_parameters()[0].detach().flatten()
                        for _ in range(30)])
    assert float(values.std()) == pytest.approx(1e-3, rel=0.1) and abs(float(values.mean())) < 1e-4


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name, epochs, batch_size, wanted", [(k, *v) for k, v in SEARCH.items()], ids=SEARCH)
def test_a_search_trains_as_published(name, epochs, batch_size, wanted, run, monkeypatch):
    rows = []

    def search_step(arch, optimizer, train, valid, *, lambda_t, epsilon, **options):
        assert len(train[1]) == len(valid[1]) == batch_size and arch.net.training
        assert options == {"unrolled": name == "svhn", "alpha_first": name != "nasbench201",
                           "hessian": "exact" if name == "svhn" else "central",
                           "kind": "sign" if name == "svhn" else "cosine",
                           "method": ("exact" if name == "svhn" else "central") if lambda_t else None,
                           "grad_clip": 5.0}
        assert settings(optimizer) == {"momentum": 0.9, "weight_decay": 3e-4}
        assert (arch.w_momentum, arch.w_weight_decay, arch.amp) == (0.9, 3e-4, torch.bfloat16)
        assert len(optimizer.param_groups[0]["params"]) == len(arch.net.weight_parameters())
        assert settings(arch.optimizer) == {"betas": (0.5, 0.999), "weight_decay": 1e-3, "eps": 1e-8}
        rates = (part.param_groups[0]["lr"] for part in (optimizer, arch.optimizer))
        rows.append((*rates, float(lambda_t), epsilon))
        return SimpleNamespace(loss=torch.tensor(float(len(rows))), logits=torch.eye(10)[[0] * batch_size],
                               clipped=torch.ones(1), alignment=None)

    monkeypatch.setattr(train_search, "search_step", search_step)
    monkeypatch.setattr(train_search, "amp_dtype", lambda *args: torch.bfloat16)
    monkeypatch.setattr(train_search, "measure_cells", lambda *args: {})
    monkeypatch.setattr(Architect, "gradient_norms", lambda *args: (3.0, 2.0))
    cell = "--search_space nasbench201" if name == "nasbench201" else f"--dataset {name} --search_space s2"
    changed = "--unrolled --hessian exact --lambda_grad exact --lambda_kind sign" if name == "svhn" else ""
    cutouts, lines = run(train_search, f"{cell} --init_channels 2 --layers 4 --cutout {changed}")
    assert_rows(rows, cutouts, epochs, wanted)
    for epoch, line in enumerate(lines):  # the means are those of one epoch
        assert (line["train_loss"], line["clipped"], line["loss_grad_norm"]) == (epoch + 1, 1, 3)
        assert (line["train_accuracy"], line["valid_accuracy"]) == (100, 10)
        assert line["lambda_grad_norm"] == 2 * line["lambda_reg"] == pytest.approx(2 * rows[epoch][2])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_alpha_sees_new_orders_and_crops_whenever_its_images_start_over(run, monkeypatch):
    """And what an epoch is measured on: its last batches or fresh ones, and the half for α."""
    images, taken, trained, nets = torch.randint(256, (192, 3, 8, 8), dtype=torch.uint8), [], [], []
    images = ImageSet(images, torch.arange(192), 192, (0.5,) * 3, (0.5,) * 3)
    probes, normed, read = [], [], []

    def search_step(arch, optimizer, train, valid, **options):
        trained.append(train)
        taken.append(valid)
        nets.append([p.detach().clone() for p in arch.net.parameters()])
        return SimpleNamespace(loss=torch.ones(()), logits=torch.zeros(len(train[1]), 192),
                               clipped=torch.zeros(1), alignment=None)

    class Resumed(Run):
        def __init__(self, *args):
            super().__init__(*args)
            self.step = 4

    def measure_cells(arch, of_halves, kind):
        probes.append([list(of_halves[half]) for half in ("train", "valid")])
        return {}

    for name, part in (("search_step", search_step), ("load", lambda *args, **options: images.split(192)),
                       ("measure_cells", measure_cells),
                       ("evaluate", lambda *args: read.append([*args[2]]) or (1.0, 10.0))):
        monkeypatch.setattr(train_search, name, part)
    monkeypatch.setattr(Architect, "gradient_norms", lambda *args: normed.append(args[1]) or (1.0, 0.0))
    monkeypatch.setattr(Architect, "alpha_eigenvalue", lambda arch, batch: read.append([batch]) or 0.0)
    flags = ("--search_space s2 --init_channels 2 --layers 4 --train_portion 0.75 --batch_size 16 --epochs 1 "
             "--eigenvalue")
    run(train_search, flags + " --save whole")
    x, y = (torch.cat(values).unflatten(0, (3, 48)) for values in zip(*taken))  # three turns of three steps
    order = y.argsort(1)
    assert all(torch.equal(y[turn].sort().values, y[0].sort().values) for turn in range(3))
    sorted_x = [x[turn][order[turn]] for turn in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(y[one], y[other])
        assert (sorted_x[one] != sorted_x[other]).flatten(1).any(1).sum() > 40  # of 48 images
    monkeypatch.setattr(train_search, "Run", Resumed)
    run(train_search, flags + " --save resumed --probe_batches 3")
    run(train_search, flags + " --save again")
    assert all(map(torch.equal, nets[0], nets[-1]))  # drawn from the seed
    assert_equal([*zip(trained, taken)][4:9], [*zip(trained, taken)][9:14])
    last = trained[8], taken[8]
    assert_equal([(train, valid) for (train,), (valid,) in (probes[0], probes[2])], [last, last])
    assert_equal([normed], [[last[0]] * 3])
    for half in probes[1]:
        assert len(torch.cat([labels for _, labels in half]).unique()) == 48
    fresh, labels = map(torch.cat, zip(*probes[1][1]))
    assert torch.equal(labels.sort().values, y[0].sort().values)
    for turn in sorted_x:
        assert (fresh[labels.argsort()] != turn).flatten(1).any(1).sum() > 40
    for eigenvalue, accuracy in (read[:2], read[2:4]):
        assert torch.isin(eigenvalue[0][1], y[0]).all() and len(eigenvalue[0][1]) == 16
        assert torch.equal(torch.cat([labels for _, labels in accuracy]).sort().values, y[0].sort().values)
    whole = torch.cat([labels for _, labels in read[1]])
    monkeypatch.setattr(train_search, "Processes", Second)
    run(train_search, flags + " --save second")
    assert torch.equal(torch.cat([labels for _, labels in read[-1]]), whole[1::2])
    for batches in (trained, taken):
        assert torch.equal(batches[-1][1], batches[8][1][8:])
    monkeypatch.setattr(train_search, "Processes", Processes)
    run(train_search, flags + " --save other --seed 1")
    assert not torch.equal(nets[-1][0], nets[0][0])
    assert not torch.equal(torch.cat([labels for _, labels in taken[-3:]]).sort().values, y[0].sort().values)


def assert_equal(found, expected):
    """Lists of lists of batches"""
    for ours, theirs in zip(found, expected, strict=True):
        for batch, other in zip(ours, theirs, strict=True):
            assert all(map(torch.equal, batch, other))


@pytest.mark.parametrize("flags, epochs, batch_size, wanted", [(k, *v) for k, v in EVAL.items()], ids=EVAL)
def test_a_cell_is_trained_as_published(flags, epochs, batch_size, wanted, run, monkeypatch):
    rows, nets, sizes, tested = [], [], [], []

    class SGD(torch.optim.SGD):
        """Notes what a step is taken with, and takes none."""

        def step(self):
            net = nets[0]
            main, auxiliary = net.main.grad[0].item(), net.auxiliary.grad[0].item()
            assert (net.frozen.grad is None) == bool(rows) and net.training
            decay = 3e-5 if flags.startswith("imagenet") else 3e-4
            assert settings(self) == {"momentum": 0.9, "weight_decay": decay}
            net.frozen.requires_grad_(False)
            rows.append((self.param_groups[0]["lr"], net.drop_path_prob, 1 + main / 0.9, auxiliary / main))

    def build(*args):
        nets.append(TwoBiases())
        return nets[0]

    def folder_batches(root, parts, batch_size, seed, *, rank, world, **options):
        sizes.append((batch_size, seed, rank, world))
        return [Folder() for _ in parts]

    def batches(images, indices, batch_size, seed, *, rank, world, **options):
        sizes.append((batch_size, seed, rank, world))
        return data.Batches(images, indices, 192, seed, **options)

    def evaluate(net, criterion, batches, *args):
        assert criterion.label_smoothing == 0
        tested.append(tuple(torch.cat([y for _, y in batches]).tolist()))
        return 1.0, 50 / len(tested)

    monkeypatch.setattr(torch.optim, "SGD", SGD)
    for name, part in (("Network", build), ("NetworkImageNet", build), ("folder_batches", folder_batches),
                       ("Batches", batches), ("evaluate", evaluate), ("Processes", Second)):
        monkeypatch.setattr(train_eval, name, part)
    cutouts, lines = run(train_eval, f"--dataset {flags} --seed 3")
    assert [line["test_accuracy"] for line in lines] == [50 / (epoch + 1) for epoch in range(epochs)]
    assert all(line["train_loss"] == pytest.approx(math.log(10)) for line in lines)  # without the tower's
    assert sizes == [(batch_size, 3, 1, 2)]
    assert {*tested} == {(0, 0) if flags.startswith("imagenet") else (1,) * 4}  # half of the eight
    assert_rows(rows, cutouts or [0] * epochs, epochs, wanted)
