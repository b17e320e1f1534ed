"""Two processes: against one process, and against the same arithmetic done for one rank after another."""
import collections
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ranks
from ldarts import InputError, layer_alignment
from ldarts.distributed import Processes
from test_archives import packed_cifar10
from test_faults import COMMON, EVAL, assert_same_bits, printed, reached, write_images

ROOT = Path(__file__).parent.parent
SEARCH = [*COMMON, "--search_space", "s4", "--layers", "4", "--batch_size", "4", "--lambda_grad", "central",
          "--epochs", "2"]


def test_means_keep_their_layouts_and_are_not_copied(monkeypatch):
    tensors = [torch.randn(()), *torch.randn(3, 4, 2, 3, 3), torch.randn(4, 2, 1, 1)]
    tensors[1:] = [tensors[1], *(t.contiguous(memory_format=torch.channels_last) for t in tensors[2:])]
    processes = Processes(torch.device("cpu"))
    processes.world = 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.mul_(4))
    means = processes.average(tensors)
    for mean, t in zip(means, tensors, strict=True):
        assert torch.equal(mean, 2 * t) and mean.stride() == t.stride()
    parts = {mean.untyped_storage().data_ptr() for mean in means if mean.is_contiguous()}
    assert len(parts) == 1  # one tensor, of which nothing was copied


def torchrun(forks, folder, *argv):
    """torchrun with two processes of one thread, its output in <folder>.printed"""
    return forks.start(folder, "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are slower on two, many times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative(found, expected):
    found, expected = (torch.cat([t.flatten() for t in tensors]) for tensors in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def computed(tmp_path_factory, forks):
    """What each of two ranks computed."""
    folder = tmp_path_factory.mktemp("ranks")
    assert [forks.finish(rank) for rank in pair(forks, folder, "ranks.py")] == [0, 0], printed(folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_steps_of_the_same_images_on_every_rank_are_those_of_one_process(computed):
    expected = ranks.three_steps(list, 0)
    for found in computed:
        assert relative(found["steps, same"], expected) < 1e-10


def test_ranks_never_drift_apart(computed):
    for name in ranks.GRADIENTS:
        assert all(map(torch.equal, *(found["gradients"][name] for found in computed))), name
    assert all(map(torch.equal, computed[0]["steps, different"], computed[1]["steps, different"]))
    assert all(map(torch.equal, computed[0]["random"], computed[1]["random"]))


def mean(rows):
    """Lists of tensors, one a rank -> the list of their means."""
    return [sum(tensors) / len(tensors) for tensors in zip(*rows)]


@pytest.fixture(scope="module")
def serial():
    """The gradients of the two ranks computed one after another, from the definitions in the paper."""
    train, valid = zip(*((ranks.batch(10 * rank), ranks.batch(10 * rank + 1)) for rank in range(2)))
    net, arch = ranks.make()
    w, alphas, p = net.weight_parameters(), net.arch_parameters(), arch.cell_leaves()
    found = {}
    with arch.kept(grad=True):
        def loss(images, **replaced):
            return F.cross_entropy(torch.func.functional_call(net, replaced, (images[0],)), images[1])

        def loss_at(images, p):
            return F.cross_entropy(net(images[0], p), images[1])

        found["first order"] = mean(torch.autograd.grad(loss(images), alphas) for images in valid)
        dw = mean(torch.autograd.grad(loss(images), w) for images in train)
        found["no Λ"] = [*mean([loss(images).detach()] for images in train), *dw]

        # second order: w' and the vector are those of the global batch
        names = [name for name, q in net.named_parameters() if not any(q is alpha for alpha in alphas)]
        stepped = [(q - 0.025 * (g + 3e-4 * q)).detach().requires_grad_() for q, g in zip(w, dw)]
        both = mean(torch.autograd.grad(loss(images, **dict(zip(names, stepped))), [*alphas, *stepped])
                    for images in valid)
        d_alpha, vector = both[: len(alphas)], both[len(alphas) :]
        r = 1e-2 / torch.cat([v.flatten() for v in vector]).norm()
        beside = [{n: q.detach() + s * r * v for n, q, v in zip(names, w, vector)} for s in (1, -1)]
        sides = [mean(torch.autograd.grad(loss(images, **at), alphas) for images in train) for at in beside]
        found["second order"] = [d - 0.025 * (a - b) / (2 * r) for d, a, b in zip(d_alpha, *sides)]
        product = mean(torch.autograd.grad(torch.autograd.grad(loss(images), w, create_graph=True), alphas,
                                           vector) for images in train)
        found["second order, exact"] = [d - 0.025 * h for d, h in zip(d_alpha, product)]

        # Λ of the averaged g_l
        g = mean(torch.autograd.grad(loss_at(images, p), p) for images in train)
        normal = [i for i, cell in enumerate(net.searched_cells()) if not cell.reduction]
        for kind in ("cosine", "sign"):
            leaves = [g[i].clone().requires_grad_() for i in normal]
            value = layer_alignment(leaves, kind)
            u = torch.autograd.grad(value, leaves)
            eps = 1e-3 / torch.cat([d.flatten() for d in u]).norm()
            moved = {s: list(p) for s in (1, -1)}
            for s, at in moved.items():
                for i, d in zip(normal, u):
                    at[i] = p[i].detach() + s * eps * d
            up, down = (mean(torch.autograd.grad(loss_at(images, moved[s]), w) for images in train)
                        for s in (1, -1))
            graphs = [torch.autograd.grad(loss_at(images, p), p, create_graph=True) for images in train]
            exact = mean(torch.autograd.grad([own[i] for i in normal], w, u, materialize_grads=True)
                         for own in graphs)
            for method, d_lambda in (("central", [(a - b) / (2 * eps) for a, b in zip(up, down)]),
                                     ("exact", exact)):
                found[f"Λ {kind}, {method}"] = [*found["no Λ"], *d_lambda, value.detach()]
            if kind == "cosine":
                found["Λ of a batch"] = [value.detach()]
                found["Λ in a step"] = [a - 0.1 * b for a, b in zip(dw, exact)]
    return found


@pytest.mark.parametrize("name", ranks.GRADIENTS)
def test_a_gradient_is_the_mean_of_those_of_the_ranks(name, computed, serial):
    assert relative(computed[0]["gradients"][name], serial[name]) < 1e-9
    if name == "first order":
        alone = ranks.gradients(list, 0, [name])[name]
        assert relative(alone, serial[name]) > 1e-2  # the other rank's images matter


def test_nothing_is_exchanged_of_no_tensors():
    processes = Processes(torch.device("cpu"))
    processes.world = 2
    assert processes.average([]) == []
    processes.take_from_first([torch.zeros(1, dtype=torch.int64)])


def test_a_part_of_the_environment_of_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # left over: alone, it has to take all images and to write the files
    assert Processes(torch.device("cpu")).rank == 0
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="variable RANK expected, but not set: start with torchrun"):
        Processes(torch.device("cpu"))


# ---- the scripts

def test_torchrun_is_stopped_and_continues_to_the_same_bits(images, forks):
    whole, folder = images / "whole", images / "stopped"
    for path in (whole, folder):
        path.mkdir()
    undisturbed = pair(forks, whole, "train_search.py", *SEARCH)  # meanwhile
    launcher = torchrun(forks, folder, ROOT / "train_search.py", *SEARCH)
    forks.wait_for(lambda: "epoch 0 step 1/" in printed(folder))
    os.kill(launcher.pid, signal.SIGTERM)
    forks.finish(launcher, 60)
    said, = re.findall("stopped by SIGTERM before step ([0-9]) of epoch 0", printed(folder))
    assert reached(folder) == (0, int(said))
    alone = images / "alone"
    shutil.copytree(folder, alone)
    for removed in ([], alone.glob("runs/one/checkpoint*")):  # the second as if killed before the first one
        for path in removed:
            path.unlink()
        assert forks.finish(forks.start(alone, "train_search.py", "--resume", "runs/one")) == 2
    assert printed(alone).count("one: written by 2 processes, not 1; start 2 of them with torchrun") == 2
    processes = pair(forks, folder, "train_search.py", *SEARCH, own=[["--resume", "runs/one"], []])
    assert [forks.finish(process) for process in processes] == [2, 2], printed(folder)
    assert printed(folder).count("the processes differ in --resume:") == 2
    resumed = pair(forks, folder, "train_search.py", "--resume", "runs/one")
    assert [forks.finish(process) for process in undisturbed + resumed] == [0] * 4, printed(folder)
    assert_same_bits(folder, whole)


def pair(forks, folder, script, *argv, own=([], []), **options):
    """Two ranks as torchrun would start them, without its seconds of start. own: more arguments of each"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [forks.start(folder, script, *argv, *own[rank], **options,
                        env={"RANK": str(rank), "LOCAL_RANK": str(rank), **shared}) for rank in range(2)]


def test_two_processes_evaluate_and_continue_to_the_same_bits(images, forks):
    whole, folder = images / "whole eval", images / "stopped eval"
    argv = [*EVAL, "--epochs", "4"]
    for path in (whole, folder):
        path.mkdir()
    processes = pair(forks, whole, "train_eval.py", *argv)
    assert [forks.finish(process) for process in processes] == [0, 0], printed(whole)
    processes = pair(forks, folder, "train_eval.py", *argv)
    forks.wait_for(lambda: "epoch 1 step 1/" in printed(folder))
    os.kill(processes[1].pid, signal.SIGUSR1)  # one is enough: they agree on the step
    assert [forks.finish(process) for process in processes] == [0, 0]
    assert "stopped by SIGUSR1" in printed(folder)
    assert reached(folder) < (4, 0)
    processes = pair(forks, folder, "train_eval.py", "--resume", "runs/one")
    assert [forks.finish(process) for process in processes] == [0, 0]
    assert_same_bits(folder, whole)
    processes = pair(forks, whole, "train_eval.py", *EVAL, "--evaluate", "runs/one/checkpoint.pt")
    assert [forks.finish(process) for process in processes] == [0, 0], printed(whole)
    said, = re.findall("checkpoint.pt on cifar10: test loss .*", printed(whole))  # by one of them
    alone = forks.start(whole, "train_eval.py", *EVAL, "--evaluate", "runs/one/checkpoint.pt")
    assert forks.finish(alone) == 0, printed(whole)
    assert printed(whole).count(said) == 2  # of all images, by two or by one


def test_ranks_with_other_arguments_or_images_do_not_start(images, forks, tmp_path_factory):
    folder, other = images / "differing", write_images(tmp_path_factory.mktemp("other"))
    folder.mkdir()
    batch = other / "cifar-10-batches-py/data_batch_1"
    shutil.copy(batch.with_name("data_batch_2"), batch)
    processes = pair(forks, folder, "train_search.py", *SEARCH, own=[
        ["--seed", "1", "--data", images], ["--seed", "2", "--report_freq", "2", "--data", other]])
    assert [forks.finish(process, 60) for process in processes] == [2, 2], printed(folder)
    assert printed(folder).count("differ in seed, report_freq, images:") == 2 and not list(folder.iterdir())


def test_one_rank_downloads_the_archive(images, forks, tmp_path):
    folder, content = images / "download", packed_cifar10(tmp_path)
    folder.mkdir()
    argv = [*EVAL, "--data", "data", "--epochs", "1", "--batch_size", "6"]
    processes = pair(forks, folder, "train_eval.py", *argv, sabotage=forks.SlowArchive(content))
    assert [forks.finish(process) for process in processes] == [0, 0], printed(folder)
    assert printed(folder).count("asked for") == 1
    assert printed(folder).count("ldarts: waiting") <= 2  # for the download, for the unpacking
    assert sorted(os.listdir(folder / "data")) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_jobs_of_one_second_have_a_folder_each_and_their_ranks_the_same(images, forks):
    folder = images / "one second"
    folder.mkdir()
    argv = [word for word in EVAL if word not in ("--save", "one")] + ["--epochs", "1"]
    started = [process for _ in range(2)
               for process in pair(forks, folder, "train_eval.py", *argv, sabotage=forks.OneSecond())]
    started.append(forks.start(folder, "train_eval.py", *argv, sabotage=forks.OneSecond()))
    assert [forks.finish(process) for process in started] == [0] * 5, printed(folder)
    ranks_of = collections.Counter(re.findall(r"folder runs/(eval-[\d-]+-[0-9a-f]{6})", printed(folder)))
    assert len({name[:20] for name in ranks_of}) == 1 and sorted(ranks_of.values()) == [1, 2, 2]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(ranks_of)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_other(rank, images, forks, figures):
    folder = images / f"dead-{rank}"
    folder.mkdir()
    processes = pair(forks, folder, "train_search.py", *SEARCH, "--checkpoint_minutes", "0")
    forks.wait_for(lambda: "epoch 0 step 1/" in printed(folder))
    processes[rank].kill()
    started = time.monotonic()
    assert forks.finish(processes[1 - rank], 60) != 0 and time.monotonic() - started < 60
    print(printed(folder))
    assert reached(folder) >= (0, 1)
    figures["ranks killed"] += 1


def test_torchrun_ends_when_a_rank_dies(images, forks, figures):
    folder = images / "dead"
    folder.mkdir()
    launcher = torchrun(forks, folder, ROOT / "train_search.py", *SEARCH)
    forks.wait_for(lambda: "epoch 0 step 0/" in printed(folder))
    first = int((folder / "runs/one/lock").read_text().split()[1])
    os.kill(first, signal.SIGKILL)
    assert forks.finish(launcher, 60) != 0
    figures["ranks killed"] += 1
