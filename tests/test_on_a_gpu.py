"""Every command on a GPU, from its first line to the resumed end: a pretended one, see pretended_gpu.py.

Without a graph and the engine it has to give the bits of the CPU: both compute by the same kernels.
"""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldarts.errors import brief
from pretended_gpu import Machine, library
from test_faults import COMMON, CONVS, assert_same_bits, lines, printed, write_images

IMAGES = [*COMMON, "--batch_size", "10", "--report_freq", "100"]  # two steps an epoch, both reported
SEARCH = [*IMAGES, "--image_size", "8", "--layers", "4"]
IN_201 = [*SEARCH, "--search_space", "nasbench201", "--layers", "1", "--epochs", "3", "--lambda_grad",
          "exact"]
TRAIN = [*IMAGES, "--layers", "3", "--init_channels", "4", "--epochs", "2", "--arch", "LAMBDA_DARTS",
         "--no-auxiliary"]


@pytest.fixture(scope="session")
def gpu():
    if torch.backends.cuda.is_built():
        pytest.skip("the pretended GPU wants a PyTorch that is built without CUDA")
    try:
        library()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode(errors="replace").strip().splitlines()
        reason = next((line for line in said if "error" in line), brief(error))
        pytest.skip(f"the pretended GPU was not compiled: {reason}")
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def folder(images, request):
    """(name) -> a new folder beside the images"""
    def make(name):
        path = images / re.sub(r"\W+", "-", f"{request.node.name}-{name}")
        path.mkdir()
        return path

    return make


def succeed(gpu, folder, *args, **options):
    assert gpu.run(folder, *args, **options) == 0, printed(folder)
    return folder


def succeed_together(gpu, *runs, **options):
    """Each of the runs (folder, target, arguments …), at the same time."""
    started = [gpu.start(*run, **options) for run in runs]
    for status, run in zip([gpu.wait(process) for process in started], runs):
        assert status == 0, printed(run[0])


# ---- what the machine pretends

def prohibitions():
    """Within a process with a GPU: what it forbids."""
    x = torch.randn(2, 3, device="cuda:0")
    assert x.is_cuda and (x @ x.T).device == torch.device("cuda:0")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="same device"):
        F.conv2d(torch.randn(1, 1, 3, 3, device="cuda"), torch.randn(1, 1, 3, 3))
    with pytest.raises(ValueError, match="index"):
        torch.cuda.set_device(torch.device("cuda"))
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    graph, total = torch.cuda.CUDAGraph(), torch.zeros((), device="cuda")
    rate = torch.tensor(2.0)
    with torch.cuda.graph(graph):
        total += rate * x.square().sum()
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            float(total)
    assert float(total) == 0  # nothing is computed under capture
    x.fill_(1.0)
    rate.fill_(5.0)  # too late
    graph.replay(), graph.replay()
    assert float(total) == 24


def test_the_pretended_gpu_forbids_what_a_gpu_does(gpu, folder):
    succeed(gpu, folder("process"), "test_on_a_gpu:prohibitions")


# ---- a captured step

def captured_steps():
    """Within a process with a GPU: whatever is replaced between steps, a graph's are those without one."""
    from ldarts import Architect, SearchNetwork
    from ldarts.architect import search_step
    from ldarts.capture import Captured

    class Search:
        def __init__(self, captured):
            torch.manual_seed(0)
            self.net = SearchNetwork(4, 10, 1, "nasbench201").double()
            self.net.to("cuda", memory_format=torch.channels_last)
            self.net.longest = np.float32(5.0)  # no float of Python's
            self.w = torch.optim.SGD(self.net.weight_parameters(), 0.25, 0.9, weight_decay=3e-4, fused=True)
            self.arch = Architect(self.net, F.cross_entropy, lr=2**-7)
            optimizers = [self.w, self.arch.optimizer]
            self.take = Captured(self.step, self.net, optimizers, pytest.fail) if captured else self.step

        def step(self, x, y, valid_x, valid_y, lambda_t, method="central"):
            return search_step(self.arch, self.w, (x, y), (valid_x, valid_y), unrolled=True, alpha_first=True,
                               lambda_t=lambda_t, kind="cosine", epsilon=1e-4, method=method,
                               grad_clip=float(self.net.longest))

        def continue_from(self, other):  # so that differences of rounding do not add up
            self.net.load_state_dict(other.net.state_dict())
            for own, others in ((self.w, other.w), (self.arch.optimizer, other.arch.optimizer)):
                for a, b in zip(own.state.values(), others.state.values()):
                    for name in a:
                        a[name].copy_(b[name])

    def replace_weights(search):
        for p in search.net.weight_parameters():
            p.data = 2 * p.data

    def replace_statistics(search):
        for norm in search.net.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.data = norm.running_mean + 1

    def load(search):
        for optimizer in (search.w, search.arch.optimizer):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            state = torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True)
            state["param_groups"][0]["lr"] /= 2
            optimizer.load_state_dict(state)

    def set_w(**values):
        return lambda search: search.w.param_groups[0].update(values)

    def set_alpha(**values):
        return lambda search: search.arch.optimizer.param_groups[0].update(values)

    events = {"nothing": lambda search: None, "the learning rate": set_w(lr=0.0625),
              "α's learning rate": set_alpha(lr=2**-9), "the optimizers' states": load,
              "the learning rate after that": set_w(lr=0.03125),
              "the weights": replace_weights, "running statistics": replace_statistics,
              "the momentum": set_w(momentum=0.5), "Adam's betas": set_alpha(betas=(0.25, 0.9)),
              "a number of the net": lambda search: setattr(search.net, "longest", np.float32(0.01)),
              "a frozen stem": lambda search: search.net.stem.requires_grad_(False),
              "without Λ": lambda search: None, "a smaller batch": lambda search: None}
    plain, captured = Search(False), Search(True)
    for i, (event, change) in enumerate(events.items()):
        n = 3 if event == "a smaller batch" else 4
        images = [torch.randn(n, 3, 8, 8, dtype=torch.float64).cuda().contiguous(
            memory_format=torch.channels_last) for _ in range(2)]
        labels = [torch.randint(10, (n,)).cuda() for _ in range(2)]
        lambda_t = torch.tensor(0.1 * i, dtype=torch.float64, device="cuda")
        losses = []
        for search in (plain, captured):
            change(search)
            options = {"method": None} if event == "without Λ" else {}
            grads = search.take(images[0], labels[0], images[1], labels[1], lambda_t, **options)
            losses.append(float(grads.loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), event
        for (name, a), b in zip(plain.net.state_dict().items(), captured.net.state_dict().values()):
            # A graph's Adam corrects its bias in float32.
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6, msg=f"{event}: {name}")
        plain.continue_from(captured)
    assert captured.arch.optimizer.param_groups[0]["capturable"] is False  # nor does a checkpoint know


def test_a_graph_reads_every_number_and_tensor_that_was_replaced(request, folder):
    if torch.cuda.is_available():  # a real one
        captured_steps()
    else:
        succeed(request.getfixturevalue("gpu"), folder("process"), "test_on_a_gpu:captured_steps")


def search_that_reads_back(*argv):
    """A search whose step reads a value back, in its backward pass: what no graph can hold."""
    import train_search
    from ldarts import runs
    search_step = train_search.search_step

    def reading(arch, optimizer, train, *args, **kwargs):
        x = train[0].clone().requires_grad_()
        x.register_hook(lambda grad: grad * (0.0 if float(grad.sum()) else 1.0))
        x.sum().backward()
        return search_step(arch, optimizer, train, *args, **kwargs)

    train_search.search_step = reading
    sys.argv = ["train_search.py", *argv]
    runs.script(train_search.main)


def test_a_capture_that_fails_is_one_warning_and_the_search_goes_on(gpu, folder):
    failed, whole = folder("failed"), folder("whole")
    succeed_together(gpu, (failed, "test_on_a_gpu:search_that_reads_back", *IN_201),
                     (whole, "train_search.py", *IN_201))
    warning, = re.findall("warning: .*graph.*", printed(failed))
    assert "float(grad.sum())" in warning and "it runs without one" in warning  # the line that reads back
    assert_close(failed, whole)


# ---- whole runs

def metrics(folder):
    return [json.loads(line) for line in (folder / "runs/one/metrics.jsonl").read_text().splitlines()]


def assert_close(folder, other):
    """The metrics of two runs that round differently."""
    for ours, theirs in zip(metrics(folder), metrics(other), strict=True):
        for name in ("train_loss", "valid_loss", "loss_grad_norm", "lambda_train", "alphas"):
            assert torch.tensor(ours[name]).allclose(torch.tensor(theirs[name]), 1e-4, 1e-5), name


SEARCHES = {
    "s1, second order": ["--search_space", "s1", "--unrolled", "--deterministic"],
    "s2, exact": ["--search_space", "s2", "--unrolled", "--hessian", "exact", "--lambda_grad", "exact"],
    "s3, sign": ["--search_space", "s3", "--lambda_kind", "sign", "--memory_format", "contiguous"],
    "s4, second order": ["--search_space", "s4", "--unrolled", "--cutout", "--cutout_length", "8",
                         "--deterministic"],
    "nasbench201, random": ["--search_space", "nasbench201", "--layers", "1", "--lambda_grad", "random",
                            "--eigenvalue", "--deterministic"],
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_on_a_gpu_is_the_one_on_the_cpu(name, gpu, folder):
    on_gpu, on_cpu = folder("gpu"), folder("cpu")
    argv = ["train_search.py", *SEARCH, "--epochs", "2", "--batch_size", "20", *SEARCHES[name]]
    succeed_together(gpu, (on_gpu, *argv, "--no-graph"), (on_cpu, *argv, "--device", "cpu"))
    assert lines(on_gpu) == lines(on_cpu)
    assert "on cuda:0" in printed(on_gpu) and "on cpu" in printed(on_cpu)


def test_training_on_a_gpu_is_that_on_the_cpu(gpu, folder):
    on_gpu, on_cpu = folder("gpu"), folder("cpu")
    argv = ["train_eval.py", *TRAIN, "--auxiliary", "--deterministic"]
    succeed_together(gpu, (on_gpu, *argv), (on_cpu, *argv, "--device", "cpu"))
    assert lines(on_gpu) == lines(on_cpu)
    succeed(gpu, on_gpu, "train_eval.py", "--data", "..", "--evaluate", "runs/one")
    assert "checkpoint.pt on cifar10: test loss" in printed(on_gpu)


@pytest.mark.parametrize("script", ["train_search.py", "train_eval.py"])
def test_default_flags_in_bf16_with_all_that_is_drawn(script, gpu, folder):
    drawn = [f"--{flag}" for flag, module in (("plot", "matplotlib"), ("tensorboard", "tensorboard"))
             if find_spec(module)]
    argv = [*SEARCH, "--epochs", "2", "--search_space", "s2", *drawn]
    argv = argv if script == "train_search.py" else [*TRAIN, "--arch", CONVS]
    path = succeed(gpu, folder("run"), script, *argv, "--amp", "bf16")
    assert len(metrics(path)) == 2
    if script == "train_search.py":
        files = {"--plot": "*.png", "--tensorboard": "events*"}
        assert all(list((path / "runs/one").rglob(files[flag])) for flag in drawn)


# ---- runs that are continued

def stopped_after(steps, script, *argv):
    """A script that is stopped after a number of its steps."""
    import train_eval
    import train_search
    from ldarts import runs
    after_step, left = runs.Run.after_step, [int(steps)]

    def stop(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        after_step(*args, **kwargs)

    runs.Run.after_step = stop
    sys.argv = [script, *argv]
    runs.script({"train_search.py": train_search, "train_eval.py": train_eval}[script].main)


CONTINUED = {
    "the default space, graph": ([], True),
    "s3, second order, graph": (["--search_space", "s3", "--unrolled", "--lambda_reg", "0"], True),
    "nasbench201, graph": (["--search_space", "nasbench201", "--layers", "1"], False),
    "s4, second order": (["--search_space", "s4", "--unrolled"], True),
    "s2, no graph": (["--search_space", "s2", "--no-graph"], True),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_a_continued_search_is_the_whole_one(name, gpu, folder):
    flags, engine = CONTINUED[name]
    argv = [*SEARCH, "--epochs", "2", *flags]
    whole, stopped = folder("whole"), folder("stopped")
    succeed_together(gpu, (whole, "train_search.py", *argv),
                     (stopped, "test_on_a_gpu:stopped_after", 1, "train_search.py", *argv), engine=engine)
    succeed(gpu, stopped, "train_search.py", "--resume", "runs/one", engine=engine)
    assert_same_bits(stopped, whole)


def test_a_search_may_be_continued_with_a_graph_without_one_and_on_a_cpu(gpu, folder):
    """Rounding differs, numbers do not: the plain form, and ∇Λ by double backward."""
    whole, *stopped = folder("whole"), folder("graph"), folder("no graph")
    succeed_together(gpu, (whole, "train_search.py", *IN_201),
                     *((path, "test_on_a_gpu:stopped_after", 3, "train_search.py", *IN_201, first)
                       for path, first in zip(stopped, ("--graph", "--no-graph"))))
    for path, first in zip(stopped, ("--graph", "--no-graph")):
        for then in ("--graph", "--no-graph", "--no-graph --device cpu"):
            continued = folder(f"{first} {then}")
            shutil.copytree(path / "runs", continued / "runs")
            succeed(gpu, continued, "train_search.py", "--resume", "runs/one", *then.split())
            assert_close(continued, whole)
            differ = re.findall("warning: the results may not be bit-identical: (.*)", printed(continued))
            changed = {"device": "cpu" in then, "graph": then != first}
            assert [name for name in changed if f"{name} " in "".join(differ)] == [
                name for name in changed if changed[name]]


def test_a_continued_training_is_the_whole_one(gpu, folder):
    whole, stopped = folder("whole"), folder("stopped")
    argv = ["train_eval.py", *TRAIN, "--drop_path_prob", "0.2"]
    succeed_together(gpu, (whole, *argv), (stopped, "test_on_a_gpu:stopped_after", 3, *argv))
    succeed(gpu, stopped, "train_eval.py", "--resume", "runs/one")
    assert_same_bits(stopped, whole)


# ---- where the host waits

def waits(folder):
    """(read back or sent, FILE:LINE FUNCTION) -> how often the host waited for the device there"""
    return {(what, place): int(count) for what, count, place in
            re.findall(r"^(read back|sent) (\d+) times: (.*)$", printed(folder), re.M)}


READ_BACK = {
    "start": {"identity"},  # the digest of the images
    "report": {"read", "_require_finite"},
    "save": {"save", "save_checkpoint"},
    "epoch": {"main", "measure_cells", "measure_alphas", "genotype"},
}


@pytest.mark.parametrize("script, flags", [
    ("train_search.py", [*SEARCH, "--search_space", "s2", "--unrolled"]),
    ("train_search.py", [*SEARCH, "--search_space", "s4", "--unrolled"]),
    ("train_search.py", [*IN_201, "--no-graph"]),
    ("train_eval.py", [*TRAIN, "--drop_path_prob", "0.2"])])
def test_no_step_between_two_reports_waits_for_the_device(script, flags, gpu, folder):
    """More steps in an epoch are no more waits."""
    runs = [(folder(f"batches of {size}"), script, *flags, "--epochs", "1", "--batch_size", size)
            for size in (10, 5)]
    succeed_together(gpu, *runs, engine=True)
    counts = [waits(path) for path, *_ in runs]
    assert counts[0] == counts[1]
    assert ("read back", "save_checkpoint") in {(what, place.split()[1]) for what, place in counts[0]}
    functions = {place.split()[1] for what, place in counts[0] if what == "read back"}
    assert functions <= set.union(*READ_BACK.values())
    print("\n".join(f"{what} {count} times: {place}" for (what, place), count in counts[0].items()))


# ---- devices, processes, timings

@pytest.mark.parametrize("argv, environment, says", [
    (["--device", "cuda:2"], {}, "--device cuda:2: CUDA error: invalid device ordinal (2 GPUs are visible"),
    (["--device", "mps"], {}, "--device mps: this code runs on no such device; use cpu, cuda"),
    (["--device", "cuda"], {"LOCAL_RANK": "2"}, "(2 GPUs are visible"),
    (["--device", "cuda:0"], {"LOCAL_WORLD_SIZE": "2"}, "each needs a GPU of its own; use cuda"),
    (["--search_space", "s4", "--graph"], {}, "--graph: ")])
def test_a_device_that_is_not_there_is_one_line(argv, environment, says, gpu, folder):
    path = folder("run")
    assert gpu.run(path, "train_search.py", *COMMON, *argv, **environment) == 2
    assert says in printed(path) and len(printed(path).splitlines()) == 1


def test_the_second_gpu_by_its_number(gpu, folder):
    path = succeed(gpu, folder("run"), "train_search.py", *IN_201, "--device", "cuda:1", "--epochs", "1",
                   engine=True)
    assert "on cuda:1" in printed(path)
    assert ", device pretended GPU, threads 1, engine on, graph True" in printed(path)


def pair(gpu, folder, *argv, **options):
    """Two processes as torchrun starts them, each with a GPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = [gpu.start(folder, *argv, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                         LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port, **options)
               for rank in range(2)]
    assert [gpu.wait(process) for process in started] == [0, 0], printed(folder)


def test_two_processes_with_a_gpu_each(gpu, folder):
    on_gpu, on_cpu, graph = folder("gpu"), folder("cpu"), folder("graph")
    argv = ["train_search.py", *IN_201, "--epochs", "2"]
    pair(gpu, on_gpu, *argv)
    pair(gpu, on_cpu, *argv, "--device", "cpu")
    pair(gpu, graph, *argv, "--graph")
    assert lines(on_gpu) == lines(on_cpu)
    assert_close(graph, on_cpu)
    pair(gpu, folder("eval"), "train_eval.py", *TRAIN)


@pytest.mark.parametrize("command", [
    "step --search_space nasbench201 --layers 1 --init_channels 2 --batch_size 2 --steps 1 --profile 0",
    "step --compare --search_space nasbench201 --layers 1 --init_channels 2 --batch_size 2 --steps 1",
    "eval --layers 3 --init_channels 4 --batch_size 2 --steps 1 --amp bf16",
    "mixed_sum --stages 3 --terms 2 --no-compile"])
def test_the_bench(command, gpu, folder):
    path = succeed(gpu, folder("run"), "test_on_a_gpu:bench", *command.split(), engine=True)
    assert "device pretended GPU" in printed(path).splitlines()[0]


def bench(*argv):
    from ldarts import bench
    sys.argv = ["bench", *argv]
    bench.main()
