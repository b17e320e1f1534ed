"""Real processes, started in milliseconds: forked from a server that has imported PyTorch and both scripts.

The server imports this module, so the first lines warm it up; tests call `start`.
"""
import fcntl
import hashlib
import importlib
import io
import multiprocessing
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

import torch

import train_eval  # noqa: so that the processes find it imported
import train_search
from ldarts import runs
from ldarts.data.archives import SOURCES
from ldarts.fused import compiled_for

compiled_for("cpu")


def start(folder: Path, script: str, *argv, sabotage=None, env=None):
    """A process that calls main() of a script or module in `folder`, output in <folder>.printed; sabotage:
    what it calls first."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_child, args=(folder, script, [str(a) for a in argv], sabotage, env or {}), daemon=True)
    process.start()
    return process


def _child(folder, script, argv, sabotage, env):
    os.environ.update(env)
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(folder.with_suffix(".printed"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    sys.argv = [script, *argv]
    if sabotage:
        sabotage()
    runs.script(importlib.import_module(script.removesuffix(".py")).main)


def finish(process, timeout: float = 300) -> int:
    """Its exit status, negative for a signal."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {timeout} s")
    return process.exitcode


def wait_for(condition, timeout: float = 120):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.005)


class KillAtCall:
    """SIGKILL before the nth call of os.fsync and os.replace or, `halved`, inside the nth writing."""

    def __init__(self, n: int, halved: bool = False):
        self.left, self.halved = n, halved

    def __call__(self):
        write = Path.write_bytes

        def count(call):
            def counted(*args):
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            return counted

        def halve(path, content):
            self.left -= 1
            if self.left:
                return write(path, content)
            write(path, bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        if self.halved:
            Path.write_bytes = halve
        else:
            os.fsync, os.replace = count(os.fsync), count(os.replace)


class SlowSteps:
    """Makes every search step from number `first` of the process on last `seconds` longer."""

    def __init__(self, seconds: float, first: int = 0):
        self.seconds, self.left = seconds, first

    def __call__(self):
        step = train_search.search_step

        def slow(*args, **kwargs):
            time.sleep(0 if self.left > 0 else self.seconds)
            self.left -= 1
            return step(*args, **kwargs)

        train_search.search_step = slow


class OneSecond:
    """All processes start in one second, but ranks have other clocks; each prints the folder of its run."""

    def __call__(self):
        clock = 1e9 - 5 * int(os.environ.get("RANK", 0))
        time.time = lambda: clock
        make = runs.Run.__init__

        def made(run, *args, **options):
            make(run, *args, **options)
            print(f"folder {run.path}", flush=True)

        runs.Run.__init__ = made


class SlowArchive:
    """The network has CIFAR-10 as these bytes; who asks for them is printed, and waits a second."""

    def __init__(self, content: bytes):
        self.content = content

    def __call__(self):
        def urlopen(url, timeout):
            print("asked for", url, flush=True)
            time.sleep(1)
            return io.BytesIO(self.content)

        urllib.request.urlopen = urlopen
        md5 = hashlib.md5(self.content).hexdigest()
        SOURCES["cifar10"] = SOURCES["cifar10"]._replace(md5=(md5,))


class NoLocks:
    """A file system without locks: flock fails with the error `number`."""

    def __init__(self, number: int):
        self.number = number

    def __call__(self):
        def flock(*_):
            raise OSError(self.number, os.strerror(self.number))

        fcntl.flock = flock


class Poison:
    """Puts `value` into a weight of the network before search step number `step` of the process."""

    def __init__(self, step: int, value: float):
        self.left, self.value = step, value

    def __call__(self):
        search_step = train_search.search_step

        def poisoned(arch, *args, **kwargs):
            if self.left == 0:
                with torch.no_grad():
                    arch.net.classifier.weight[0, 0] = self.value
            self.left -= 1
            return search_step(arch, *args, **kwargs)

        train_search.search_step = poisoned
