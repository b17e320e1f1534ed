"""Runs that are killed, interrupted, damaged and attacked: real processes, real signals, real files.

The last line of `python -m pytest tests/test_faults.py` counts what was done. With LDARTS_DATA, a folder with
cifar-10-batches-py, the runs see real images.
"""
import argparse
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_eval
import train_search
from ldarts import InputError, genotypes, runs
from ldarts.data.archives import SOURCES, locate, read_file
from ldarts.distributed import Processes
from ldarts.errors import NotFinite
from ldarts.locks import locked
from ldarts.runs.files import CHECKPOINT, PREVIOUS, SEAL, load_checkpoint
from test_archives import Exploit, python2_pickle, write_cifar10

ROOT = Path(__file__).parent.parent
CONVS = ROOT / "tests" / "genotypes" / "convs.json"
COMMON = ["--dataset", "cifar10", "--data", "..", "--init_channels", "2", "--report_freq", "1",
          "--save", "one"]
SEARCH = [*COMMON, "--search_space", "nasbench201", "--layers", "1", "--batch_size", "4"]
UNROLLED = [*COMMON, "--search_space", "s4", "--layers", "4", "--batch_size", "4", "--unrolled"]  # with noise
EVAL = [*COMMON, "--arch", CONVS, "--layers", "2", "--batch_size", "8", "--no-auxiliary"]
EACH_STEP = ["--checkpoint_minutes", "0"]
BOTH = ["search", "evaluation"]


def write_images(folder):
    """40 images, of LDARTS_DATA if it is set, to train and 8 to test: five steps an epoch of some 0.1 s."""
    written = write_cifar10(folder / "cifar-10-batches-py", 8)
    if "LDARTS_DATA" in os.environ:
        for file in locate(SOURCES["cifar10"], Path(os.environ["LDARTS_DATA"])).glob("*_batch*"):
            part, _ = read_file(file, SOURCES["cifar10"]).split(8)
            content = python2_pickle(part.labels.tolist(), part.images.flatten(1).numpy())
            (written / file.name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def folder(images, request):
    path = images / re.sub(r"\W+", "-", request.node.name)
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def whole(images, forks):
    """(script, arguments) -> the folder of a run that nobody disturbed; each is made once."""
    made = {}

    def get(script, *argv):
        key = script, *argv
        if key not in made:
            made[key] = images / f"whole-{len(made)}"
            made[key].mkdir()
            assert forks.finish(forks.start(made[key], script, *argv)) == 0, printed(made[key])
        return made[key]

    return get


def flatten(state):
    """Every leaf of nested dictionaries, lists and tuples, with its place."""
    if isinstance(state, (dict, list, tuple)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from (((key, *place), leaf) for place, leaf in flatten(value))
    else:
        yield (), state


def lines(folder):
    """metrics.jsonl, line by line, without the times."""
    written = (folder / "runs/one/metrics.jsonl").read_text().splitlines()
    return [re.sub(r', "seconds": [\d.]+', "", line) for line in written]


def assert_same_bits(folder, other):
    """Every number of the two runs' checkpoints, their metrics and their genotypes."""
    ours, theirs = (dict(flatten(load_checkpoint(str(f / "runs/one" / CHECKPOINT)))) for f in (folder, other))
    assert list(ours) == list(theirs)
    for place, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[place].dtype and torch.equal(value, theirs[place]), place
        elif "seconds" not in place:
            assert value == theirs[place], place
    assert lines(folder) == lines(other) and len(lines(folder)) > 0
    assert (folder / "runs/one/genotype.json").read_bytes() == (other / "runs/one/genotype.json").read_bytes()


def reached(folder):
    """(epoch, step) of the checkpoint, (0, 0) before the first."""
    for name in (CHECKPOINT, PREVIOUS):
        if (folder / "runs/one" / name).exists():
            state = load_checkpoint(str(folder / "runs/one" / name), sealed=True)
            return state["epoch"], state["step"]
    return 0, 0


def printed(folder):
    path = folder.with_suffix(".printed")
    return path.read_text() if path.exists() else ""


def resume(forks, folder, script, expected=0, **options):
    folder.with_suffix(".printed").unlink(missing_ok=True)
    status = forks.finish(forks.start(folder, script, "--resume", "runs/one", **options))
    assert status == expected, printed(folder)
    return printed(folder)


# ---- killed

@pytest.mark.parametrize("script, argv, kills", [
    ("train_search.py", [*SEARCH, "--epochs", "6"], 8),
    ("train_search.py", [*UNROLLED, "--epochs", "2"], 4),
    ("train_eval.py", [*EVAL, "--epochs", "7"], 6)], ids=["first order", "second order", "evaluation"])
def test_killed_at_random_moments(script, argv, kills, whole, folder, forks, figures):
    """Each process dies at a random moment after a random number of steps, and the next one goes on."""
    reference, moments, before = whole(script, *argv), random.Random(0), (0, 0)
    for _ in range(kills):
        there, said = (folder / "runs/one/config.json").exists(), len(printed(folder))
        process = forks.start(folder, script, *(["--resume", "runs/one"] if there else argv), *EACH_STEP)
        steps = moments.randrange(2)
        forks.wait_for(lambda: printed(folder)[said:].count(" step ") > steps or not process.is_alive())
        time.sleep(0.05 * moments.random())
        assert process.is_alive(), printed(folder)
        process.kill()
        process.join()
        last = re.findall(r"epoch (\d+) step (\d+)/", printed(folder))
        # Step k is printed once all before it are saved.
        assert reached(folder) >= max(before, tuple(map(int, last[-1])))
        before = reached(folder)
    resume(forks, folder, script)
    assert_same_bits(folder, reference)
    figures["kills at random moments"] += kills


@pytest.mark.parametrize("n, halved", [*((n, False) for n in (1, 2, 3, 6, 9, 10, 12, 13, 16)),
                                       *((n, True) for n in (1, 2, 3, 5))])
def test_killed_inside_a_save(n, halved, whole, folder, forks, figures):
    """After each call that renames a file, and with half of one written: what else a killed process leaves are
    these files, since the kernel keeps what was not synced. Before config.json is there, the first command
    starts the run again."""
    argv = [*SEARCH, "--epochs", "1", "--lambda_reg", "0", "--batch_size", "10"]
    reference = whole("train_search.py", *argv)
    process = forks.start(folder, "train_search.py", *argv, *EACH_STEP, sabotage=forks.KillAtCall(n, halved))
    assert forks.finish(process) == -signal.SIGKILL
    if (folder / "runs/one/config.json").exists():
        epoch, step = reached(folder)
        said = resume(forks, folder, "train_search.py")
        assert (f"continued at step {step} of epoch {epoch}" if step else "from the beginning") in said
    else:
        assert forks.finish(forks.start(folder, "train_search.py", *argv)) == 0, printed(folder)
    assert_same_bits(folder, reference)
    assert not list((folder / "runs/one").glob(".*.partial"))
    figures["kills inside a save"] += 1


# ---- interrupted

@pytest.mark.parametrize("script, argv, number, status", [
    ("train_search.py", [*SEARCH, "--epochs", "2"], signal.SIGTERM, 143),
    ("train_search.py", [*SEARCH, "--epochs", "2"], signal.SIGINT, 130),
    ("train_eval.py", [*EVAL, "--epochs", "5"], signal.SIGUSR1, 0)], ids=["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_after_the_step(script, argv, number, status, whole, folder, forks, figures):
    reference = whole(script, *argv)
    process = forks.start(folder, script, *argv)
    forks.wait_for(lambda: "epoch 0 step 1/" in printed(folder))
    os.kill(process.pid, number)
    assert forks.finish(process) == status
    *_, taken, said = printed(folder).splitlines()
    step = int(re.search(r"epoch 0 step (\d+)/", taken)[1]) + 1
    assert f"stopped by {number.name} before step {step} of epoch 0" in said
    command = re.search("continue by: python (.+) --resume runs/one$", said)[1]
    assert (folder / command).resolve() == ROOT / script  # as a notebook in this folder would have started it
    assert reached(folder) == (0, step)
    resume(forks, folder, script)
    assert_same_bits(folder, reference)
    figures["signals"] += 1


def test_a_second_sigint_stops_at_once(folder, forks, figures):
    process = forks.start(folder, "train_search.py", *SEARCH, "--epochs", "1", *EACH_STEP,
                          sabotage=forks.SlowSteps(3, first=1))
    forks.wait_for(lambda: "step 0/" in printed(folder))
    time.sleep(0.5)  # the save is through, the next step is long
    before = (folder / "runs/one" / CHECKPOINT).read_bytes()
    started = time.monotonic()
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    assert forks.finish(process) == 130 and time.monotonic() - started < 2
    assert "stopped by" not in printed(folder) and (folder / "runs/one" / CHECKPOINT).read_bytes() == before
    assert reached(folder) == (0, 1)
    figures["signals"] += 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="continues a run on a GPU; there is none")
@pytest.mark.parametrize("script, argv", [("train_search.py", UNROLLED), ("train_eval.py", EVAL)], ids=BOTH)
def test_a_deterministic_run_on_a_gpu_continues_to_the_same_bits(script, argv, folder, forks):
    def command(cwd, *argv):
        cwd.mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, ROOT / script, *map(str, argv)], cwd=cwd,
                                stderr=subprocess.STDOUT, stdout=open(cwd.with_suffix(".printed"), "a"))

    argv = [*argv, "--data", "../..", "--epochs", "3", "--device", "cuda", "--deterministic"]
    assert command(folder / "whole", *argv).wait(600) == 0, printed(folder / "whole")
    process = command(folder / "stopped", *argv)
    forks.wait_for(lambda: "epoch 1 step 1/" in printed(folder / "stopped"), 600)
    process.terminate()
    assert process.wait(600) == 143
    assert command(folder / "stopped", "--resume", "runs/one").wait(600) == 0
    assert_same_bits(folder / "stopped", folder / "whole")


# ---- faults of the disk

@pytest.fixture(scope="module")
def stopped(images, forks):
    """A run that was stopped in its second epoch, with a checkpoint and the previous one."""
    folder = images / "stopped"
    folder.mkdir()
    process = forks.start(folder, "train_search.py", *SEARCH, "--epochs", "2", *EACH_STEP)
    forks.wait_for(lambda: "epoch 1 step 1/" in printed(folder))
    os.kill(process.pid, signal.SIGTERM)
    assert forks.finish(process) == 143
    return folder


def flip(content, random_numbers=random.Random(0)):
    changed = bytearray(content)
    changed[random_numbers.randrange(len(content))] ^= 1 << random_numbers.randrange(8)
    return bytes(changed)


DAMAGE = {"empty": lambda content: b"", "truncated": lambda content: content[:-200], "one bit": flip}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint(damage, stopped, whole, folder, forks, figures):
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    newest, previous = (folder / "runs/one" / name for name in (CHECKPOINT, PREVIOUS))
    newest.write_bytes(damage(newest.read_bytes()))
    for i in range(2):  # killed before it saved anew, it still finds the previous one
        process = forks.start(folder, "train_search.py", "--resume", "runs/one", sabotage=forks.SlowSteps(60))
        forks.wait_for(lambda i=i: printed(folder).count("continued at") > i)
        process.kill()
        process.join()
        figures["kills after a resume"] += 1
    warning, = [line for line in printed(folder).splitlines() if line.startswith("warning")]
    assert f"runs/one/{CHECKPOINT}: damaged" in warning and f"using runs/one/{PREVIOUS}" in warning
    resume(forks, folder, "train_search.py")
    assert_same_bits(folder, whole("train_search.py", *SEARCH, "--epochs", "2"))
    figures["damaged checkpoints"] += 1


def test_two_damaged_checkpoints_are_one_line(stopped, folder, forks, figures):
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    for name in (CHECKPOINT, PREVIOUS):
        (folder / "runs/one" / name).write_bytes(flip((folder / "runs/one" / name).read_bytes()))
    message, = resume(forks, folder, "train_search.py", 2).splitlines()
    assert f"runs/one/{CHECKPOINT}: damaged" in message and f"runs/one/{PREVIOUS}: damaged" in message
    figures["damaged checkpoints"] += 2


@pytest.fixture
def small_disk(folder):
    """A file system of 4 MB."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], text=True,
                          capture_output=True)
    if made.returncode:
        pytest.skip(f"a small file system can't be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk, whole, forks, figures):
    process = forks.start(small_disk, "train_search.py", *SEARCH, "--epochs", "2", *EACH_STEP)
    forks.wait_for(lambda: "step 2/" in printed(small_disk))
    with open(small_disk / "filler", "wb", 0) as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(4096))
    assert forks.finish(process) == 2
    assert "cannot be written (No space left on device)" in printed(small_disk).splitlines()[-1]
    assert printed(small_disk).count("error") == 1 and "Traceback" not in printed(small_disk)
    (small_disk / "filler").unlink()
    assert reached(small_disk) >= (0, 2) and not list((small_disk / "runs/one").glob(".*.partial"))
    resume(forks, small_disk, "train_search.py")
    assert_same_bits(small_disk, whole("train_search.py", *SEARCH, "--epochs", "2"))
    figures["disk faults"] += 1


def test_a_read_only_folder(stopped, small_disk, whole, forks, figures):
    shutil.copytree(stopped, small_disk, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message, = resume(forks, small_disk, "train_search.py", 2).splitlines()
    assert "runs/one/lock: cannot be written (Read-only file system)" in message
    another = forks.start(small_disk, "train_search.py", *SEARCH, "--epochs", "2", "--save", "two")
    assert forks.finish(another) == 2
    assert "runs/two/lock: cannot be written (Read-only file system)" in printed(small_disk).splitlines()[-1]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    resume(forks, small_disk, "train_search.py")
    assert_same_bits(small_disk, whole("train_search.py", *SEARCH, "--epochs", "2"))
    figures["disk faults"] += 2


def test_a_mount_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    sync = os.fsync

    def sync_files(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(number)

    monkeypatch.setattr(os, "fsync", sync_files)
    runs.write_atomically(tmp_path / "log.txt", b"log")
    assert (tmp_path / "log.txt").read_text() == "log"


def test_a_run_that_could_not_begin_is_not_advised_to_resume(tmp_path):
    (tmp_path / "log.txt").mkdir()
    for remedy in (", or choose another folder", f"; --resume {tmp_path} continues the run"):
        with pytest.raises(InputError, match=f"correct that{remedy}$"):
            runs.write_atomically(tmp_path / "log.txt", b"log")
        (tmp_path / "config.json").write_text("{}")


# ---- two processes, values that are not finite, other arguments

def test_a_second_process_on_a_run_is_refused_until_the_first_is_dead(stopped, whole, folder, forks, figures):
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    first = forks.start(folder, "train_search.py", "--resume", "runs/one", sabotage=forks.SlowSteps(60))
    forks.wait_for(lambda: "weights, on cpu" in printed(folder))
    time.sleep(0.5)  # the other lines are through, the first step is long
    before = (folder / "runs/one/log.txt").read_bytes()
    message, = resume(forks, folder, "train_search.py", 2).splitlines()
    assert f"runs/one is in use by process {first.pid} on " in message
    assert (folder / "runs/one/log.txt").read_bytes() == before
    first.kill()
    first.join()
    resume(forks, folder, "train_search.py")
    assert_same_bits(folder, whole("train_search.py", *SEARCH, "--epochs", "2"))
    figures["second processes"] += 1


def test_a_file_system_without_locks_is_one_warning(whole, folder, forks, figures, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # put back at the end
    for number in (errno.ENOLCK, errno.EOPNOTSUPP):
        forks.NoLocks(number)()
        with pytest.warns(UserWarning, match="a file system here has no locks"), locked(tmp_path / "lock"):
            pass
    argv = [*SEARCH, "--epochs", "1"]
    process = forks.start(folder, "train_search.py", *argv, sabotage=forks.NoLocks(errno.ENOSYS))
    assert forks.finish(process) == 0, printed(folder)
    assert printed(folder).count("Warning: ldarts: a file system here has no locks") == 1
    assert_same_bits(folder, whole("train_search.py", *argv))
    figures["disk faults"] += 1


def assert_finite(folder):
    state = load_checkpoint(str(folder / "runs/one" / CHECKPOINT), sealed=True)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("options, last", [(EACH_STEP, (1, 2)), ([], (1, 0))], ids=["each step", "each epoch"])
def test_a_loss_that_is_not_finite(options, last, folder, forks, figures):
    process = forks.start(folder, "train_search.py", *SEARCH, "--epochs", "2", *options,
                          sabotage=forks.Poison(7, math.nan))
    assert forks.finish(process) == 3
    message, = [line for line in printed(folder).splitlines() if line.startswith("error")]
    assert "the loss is not finite at step 2 of epoch 1" in message and "Traceback" not in printed(folder)
    assert "checkpoint.pt is kept from before it, but --resume repeats the same steps: start again" in message
    assert reached(folder) == last
    assert_finite(folder)
    resume(forks, folder, "train_search.py")  # the fault was not the run's
    figures["values not finite"] += 1


@pytest.mark.parametrize("script, argv", [("train_search.py", SEARCH), ("train_eval.py", EVAL)], ids=BOTH)
def test_a_run_that_diverges(script, argv, folder, forks, figures):
    process = forks.start(folder, script, *argv, *EACH_STEP, "--epochs", "2", "--learning_rate", "1e38",
                          "--grad_clip", "1e38")
    assert forks.finish(process) == 3
    message, = [line for line in printed(folder).splitlines() if line.startswith("error")]
    assert re.search(r"(the loss|[\w.]+) is not finite (at|before) step 1 of epoch 0", message)
    if (folder / "runs/one" / CHECKPOINT).exists():
        assert_finite(folder)
    figures["values not finite"] += 1


def refused(script, argv, monkeypatch, capsys):
    """The one line with which a script refuses its arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        runs.script(script.main)
    message, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    return message


def test_other_arguments_are_refused_with_both_values(stopped, folder, monkeypatch, capsys):
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in (folder / "runs/one").iterdir()}
    for option, new, old in (("--epochs", "9", "2"), ("--lambda_reg", "0.5", "0.25"), ("--seed", "4", "0"),
                             ("--batch_size", "5", "4"), ("--dataset", "synthetic", "cifar10"),
                             ("--save", "two", "one"), ("--search_space", "s2", "nasbench201"),
                             ("--epsilon", "0.5", "0.0001")):
        message = refused(train_search, ["--resume", "runs/one", option, new], monkeypatch, capsys)
        assert f"{option} {new}: runs/one was started with {old}" in message
        assert ("only data, device, graph, report_freq, checkpoint_minutes, plot, tensorboard "
                "may change") in message
    assert "--cutout True: runs/one was started with False" in refused(
        train_search, ["--resume", "runs/one", "--cutout"], monkeypatch, capsys)
    for value in ("-1", "nan", "soon"):
        assert f"--checkpoint_minutes: '{value}': expected a number from 0" in refused(
            train_search, ["--resume", "runs/one", "--checkpoint_minutes", value], monkeypatch, capsys)
    assert "not a run of this script" in refused(train_eval, ["--resume", "runs/one"], monkeypatch, capsys)
    assert "runs/two/config.json: no configuration of a run" in refused(
        train_search, ["--resume", "runs/two"], monkeypatch, capsys)
    assert before == {path: path.read_bytes() for path in (folder / "runs/one").iterdir()}


def test_some_arguments_may_change(stopped, whole, images, folder, forks):
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    path = folder / "runs/one/config.json"
    config = json.loads(path.read_text())
    assert torch.backends.cpu.get_cpu_capability() in config["machine"]["device"]  # AVX2 has other bits
    config["machine"] |= {"PyTorch": "1.0", "device": "some GPU", "graph": True}
    path.write_text(json.dumps(config | {"commit": "0123"}))
    assert "was on some GPU, and no GPU is visible here" in resume(forks, folder, "train_search.py", 2)
    status = forks.finish(forks.start(
        folder, "train_search.py", *SEARCH, "--resume", "runs/one", "--data", images, "--device", "cpu",
        "--report_freq", "3", "--checkpoint_minutes", "1", "--epochs", "2", "--seed", "0"))
    assert f"bit-identical: PyTorch 1.0, now {torch.__version__}; device some GPU, " in printed(folder)
    assert "; commit 0123, now " in printed(folder)
    assert status == 0 and "step 2/" not in printed(folder) and "epoch 1 step 3/" in printed(folder)
    assert_same_bits(folder, whole("train_search.py", *SEARCH, "--epochs", "2"))


# ---- files of other versions, and hostile ones

def sealed(state) -> bytes:
    """The bytes of a checkpoint with the right SHA-256, as an attacker would write it."""
    content = io.BytesIO()
    torch.save(state, content)
    return seal(content.getvalue())


def seal(content: bytes) -> bytes:
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


ignores_odd_protocols = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


@pytest.fixture
def resumable(tmp_path):
    """(bytes of checkpoint.pt) -> InputError of the attempt to continue it, in this process; nothing else."""
    folder = tmp_path / "one"
    folder.mkdir()
    net = torch.nn.Linear(2, 2)
    args = argparse.Namespace(resume=str(folder), save=None, epochs=1, report_freq=1, checkpoint_minutes=1,
                              seed=0)

    def attempt(content):
        (folder / CHECKPOINT).write_bytes(content)
        with runs.Run("search", args, Processes(torch.device("cpu")), {"model": net}, 5, []) as run:
            return run

    state = {"model": net.state_dict(), "processes": 1, "epoch": 0, "step": 1,
             "seconds": 0.5, "meters": torch.ones(1, 4, dtype=torch.float64), "history": [{"epoch": 0}],
             "data": []}
    attempt.state = state
    assert attempt(sealed(state)).step == 1
    return attempt


def test_a_checkpoint_is_written_when_its_minutes_are_over(resumable, tmp_path, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    args = argparse.Namespace(resume=str(tmp_path / "one"), save=None, epochs=1, report_freq=9, seed=0,
                              checkpoint_minutes=1)
    parts = {"model": torch.nn.Linear(2, 2)}
    with runs.Run("search", args, Processes(torch.device("cpu")), parts, 9, []) as run:
        saved = []
        monkeypatch.setattr("ldarts.runs.folder.save_checkpoint", lambda folder, state: saved.append(state))
        for seconds[0] in (59.0, 61.0):
            run.after_step(torch.ones(()), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
        assert [state["step"] for state in saved] == [run.step]
        for seconds[0] in (62.0, 72.0):
            run.end_epoch({})
        # The epoch took half a second before the run was stopped.
        assert [line["seconds"] for line in run.history[1:]] == [62.5, 10.0]
        assert [state["seconds"] for state in saved] == [61.5, 0, 0]


def test_each_rank_and_step_draws_its_own_random_numbers(resumable, tmp_path):
    args = argparse.Namespace(resume=str(tmp_path / "one"), save=None, epochs=1, seed=0)
    processes, parts, drawn = Processes(torch.device("cpu")), {"model": torch.nn.Linear(2, 2)}, []
    with runs.Run("search", args, processes, parts, 9, []) as run:
        for of, name in ((args, "seed"), (processes, "rank"), (run, "epoch"), (run, "step")):
            setattr(of, name, getattr(of, name) + 1)
            run.seed()
            drawn.append(float(torch.rand(1)))
    assert len({*drawn}) == 4


def test_tensorboards_files_on_a_full_disk(resumable, tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a name, as tensorboard's own

    for name in ("add_scalar", "close"):
        monkeypatch.setattr(tensorboard.SummaryWriter, name, fail)
    args = argparse.Namespace(resume=str(tmp_path / "one"), seed=0, save=None, tensorboard=True)
    parts = {"model": torch.nn.Linear(2, 2)}
    with pytest.raises(InputError, match="one/events.* cannot be written .No space left .* continues"):
        with runs.Run("search", args, Processes(torch.device("cpu")), parts, 1, []) as run:
            (tmp_path / "one" / "config.json").write_text("{}")
            run.end_epoch({"epoch": 0, "train_loss": 1.0})


def test_a_metric_that_is_not_finite_is_named_wherever_it_stands(resumable, tmp_path):
    resumable(sealed(resumable.state))
    args = argparse.Namespace(resume=str(tmp_path / "one"), save=None, epochs=1, report_freq=9, seed=0,
                              checkpoint_minutes=1)
    parts = {"model": torch.nn.Linear(2, 2)}
    with runs.Run("search", args, Processes(torch.device("cpu")), parts, 9, []) as run:
        for value in (math.nan, [0.5, math.inf], {"skip_connect": math.nan}):
            with pytest.raises(NotFinite, match="^cell_shares is not finite after step 1 of epoch 0"):
                run.end_epoch({"epoch": 0, "cell_shares": value})
        with pytest.raises(NotFinite, match="^the loss is not finite at step 1 of epoch 0"):
            run.after_step(torch.tensor(math.inf), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))


def test_another_number_of_processes_is_named(resumable):
    with pytest.raises(InputError, match="by 3 processes, not 1"):
        resumable(sealed(resumable.state | {"processes": 3}))


def test_processes_with_checkpoints_of_different_steps_do_not_go_on(resumable, monkeypatch):
    epoch, step = resumable.state["epoch"], resumable.state["step"]
    for other in ((epoch, step + 1), (epoch + 1, step), (epoch, step - 1), (epoch - 1, step)):
        peer = [*other, *(-value for value in other)]
        monkeypatch.setattr(Processes, "largest", lambda self, *values: [
            max(pair) for pair in zip(values, peer)] if len(values) == 4 else list(values))
        with pytest.raises(InputError, match="of different steps; it must be one folder on a file system"):
            resumable(sealed(resumable.state))


def test_checkpoints_of_other_content(resumable):
    for changed in ({"model": {}}, {"model": 1}, {"model": {"weight": "x", "bias": torch.zeros(3)}},
                    {"epoch": "x"}, {"step": []}, {"seconds": None}, {"history": 3},
                    {"history": [torch.ones(1)]}, {"meters": torch.ones(0)}, {"meters": "x"},
                    {"processes": []}, {"data": 3}, {"data": [{"images": "x"}]}):
        with pytest.raises(InputError, match="not a checkpoint of this run|by \\[\\] processes"):
            resumable(sealed(resumable.state | changed))
    for missing in resumable.state:
        with pytest.raises(InputError, match="not a checkpoint"):
            resumable(sealed({name: value for name, value in resumable.state.items() if name != missing}))


@ignores_odd_protocols
def test_a_checkpoint_runs_no_code(resumable, tmp_path, figures):
    target = tmp_path / "made by the checkpoint"
    for call in ((os.mkdir, str(target)), (eval, f"open({str(target)!r}, 'w')"),
                 (subprocess.call, ["touch", str(target)])):
        exploit = Exploit(*call)
        for state in ({"model": exploit}, resumable.state | {"history": [exploit]}, exploit):
            for content in (sealed(state), seal(pickle.dumps(state))):
                with pytest.raises(InputError, match="damaged or not a checkpoint"):
                    resumable(content)
                (tmp_path / "plain.pt").write_bytes(content[: -len(SEAL) - 64])
                with pytest.raises(InputError, match="damaged or not a checkpoint"):
                    load_checkpoint(str(tmp_path / "plain.pt"))
                figures["exploit files"] += 2
    assert not target.exists()


def test_a_config_or_genotype_is_never_code(tmp_path, monkeypatch, capsys, figures):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    code = "__import__('os').mkdir('made')"
    for content in (code, json.dumps(code), json.dumps({"kind": "search", "epochs": code}),
                    json.dumps({"kind": "search", "search_space": code}),
                    json.dumps({"kind": "search", "seed": {"a": code}}),
                    json.dumps({"kind": "search", "memory_format": code, "cutout": code})):
        (tmp_path / "run/config.json").write_text(content)
        refused(train_search, ["--resume", "run"], monkeypatch, capsys)
        (tmp_path / "run/genotype.json").write_text(content)
        with pytest.raises(InputError):
            genotypes.load("run")
        figures["exploit files"] += 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def mutated(good: bytes, numbers: random.Random) -> bytes:
    """Some bytes changed, inserted, removed or cut off."""
    bad = bytearray(good)
    for _ in range(numbers.randint(1, 3)):
        at = numbers.randrange(len(bad) or 1)
        kind = numbers.random()
        if kind < 0.6:
            bad[at : at + 1] = bytes([numbers.randrange(256)])
        elif kind < 0.8:
            bad[at:at] = bad[numbers.randrange(len(bad)) :][: numbers.randint(1, 20)]
        elif kind < 0.97:
            del bad[at : at + numbers.randint(1, 20)]
        else:
            del bad[at:]
    return bytes(bad)


@ignores_odd_protocols
def test_mutated_checkpoints_raise_nothing_but_input_error(resumable, tmp_path, figures):
    content = io.BytesIO()
    torch.save(resumable.state, content)
    numbers, refusals, path = random.Random(0), 0, tmp_path / "plain.pt"
    for i in range(400):
        bad = mutated(content.getvalue(), numbers)
        try:
            if i % 2:
                resumable(seal(bad))
            else:
                path.write_bytes(bad)
                load_checkpoint(str(path))
        except InputError:
            refusals += 1
    assert refusals > 100
    good = sealed(resumable.state)
    for _ in range(200):
        with pytest.raises(InputError):
            resumable(flip(good, numbers))
    figures["mutated files"] += 600


def test_mutated_genotypes_and_configs_raise_nothing_but_input_error(tmp_path, monkeypatch, figures):
    numbers = random.Random(0)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(sys, "argv", ["train_search.py", "--resume", str(tmp_path / "run")])
    for name, good, read in (
            ("genotype.json", CONVS.read_bytes(), lambda: genotypes.load(str(tmp_path / "run"))),
            ("config.json", json.dumps({"kind": "search", "epochs": 3, "cutout": False, "device": "cpu",
                                        "resume": None, "memory_format": "contiguous",
                                        "checkpoint_minutes": 2.5}).encode(),
             runs.parse_search_args)):
        refusals = 0
        for _ in range(250):
            (tmp_path / "run" / name).write_bytes(mutated(good, numbers))
            try:
                read()
            except InputError:
                refusals += 1
        assert refusals > 25
        figures["mutated files"] += 250


def test_a_forked_process_does_not_keep_a_lock(tmp_path):
    """As a worker that outlives a killed run for some seconds."""
    ready, says_ready = os.pipe()
    with locked(tmp_path / "lock", wait=False):
        child = os.fork()
        if not child:
            os.write(says_ready, b".")
            time.sleep(60)
            os._exit(0)
    os.read(ready, 1)
    try:
        with locked(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
