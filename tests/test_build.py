"""How the libraries of csrc/ are built, checked and loaded; most compilers here are small scripts."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldarts.fused import build, compiled_for, toolkit

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
MAKES = 'for last; do :; done; echo "$0 $@" >> "$LOG"; echo library > "$last"\n'  # as a compiler does
needs_build = pytest.mark.skipif(not compiled_for("cpu"), reason="no compiler here")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def nvcc(path: Path, version: str = "13.0", text: str = MAKES) -> Path:
    """An nvcc of the toolkit that it lies in."""
    home, (major, minor) = path.parent.parent, version.split(".")
    (home / "lib").mkdir(parents=True)
    (home / "lib" / "libcudart.so.13").touch()
    said = f'#$ TOP={home}/bin/..\n#$ LIBRARIES= "-L{home}/lib64"\n'
    said += f'#$ gcc -D__CUDACC_VER_MAJOR__={major} -D__CUDACC_VER_MINOR__={minor}'
    return program(path, f"if [ $1 = --dryrun ]; then echo '{said}' >&2; exit; fi\n{text}")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a compiler and PyTorch for CUDA 13.0, without nvcc or a GPU; its folder."""
    program(tmp_path / "bin" / "c++", MAKES)
    (tmp_path / "bin" / "ninja").symlink_to(toolkit.ninja())
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "LDARTS_FUSED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(toolkit, "USUAL_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(toolkit.sysconfig, "get_path", lambda *names: str(tmp_path / "none"))
    return tmp_path


def told(machine: Path) -> list[str]:
    return (machine / "log").read_text().splitlines() if (machine / "log").exists() else []


def fails(text: str) -> str:
    return f"while read -r line; do echo \"$line\"; done <<'E'\n{text}\nE\nexit 1\n"


LINK = fails("ld: cannot find -lc10: No such file\ncollect2: error: ld returned 1 exit status")
FAILURES = {  # name: (part, what is wrong, in the reason, in the remedy)
    "no compiler": ("cpu", lambda m, env: (m / "bin/c++").unlink(), "no compiler 'c++'", "Install g++ 11"),
    "no compiler behind a launcher":
        ("cpu", lambda m, env: (program(m / "bin/ccache", MAKES), env("CXX", "ccache g++-99")),
         "no compiler 'g++-99'", "Install g++ 11"),
    "no ninja": ("cpu", lambda m, env: ((m / "bin/ninja").unlink(), env(sys, "executable", "/none/python")),
                 "no ninja", "/none/python -m pip install ninja"),
    "a cache that cannot be written":
        ("cpu", lambda m, env: ((m / "file").touch(), env("XDG_CACHE_HOME", str(m / "file"))),
         "Not a directory", "Set XDG_CACHE_HOME"),
    "an error":
        ("cpu", lambda m, env: program(m / "bin/c++", fails("a.h:1: warning: so\na.h:2:1: error: no x;")),
         "a.h:2:1: error: no x;", "whole output is in"),
    "an old compiler":
        ("cpu", lambda m, env: program(m / "bin/c++", fails("c++: error: unrecognized option '-std=c++20'")),
         "unrecognized option", "g++ 11 or clang 14"),
    "a linker's error":
        ("cpu", lambda m, env: program(m / "bin/c++", f'case "$@" in *-shared*) {LINK} ;; esac\n{MAKES}'),
         "ld: cannot find -lc10", "whole output is in"),
    "a full disk": ("cpu", lambda m, env: program(m / "bin/c++", fails("as: a.o: No space left on device")),
                    "No space left", "Make room"),
    "no nvcc": ("cuda", lambda m, env: None, "no nvcc of CUDA 13", "pip install nvidia-cuda-nvcc~=13.0.0"),
    "nvcc of another version": ("cuda", lambda m, env: nvcc(m / "bin/nvcc", "12.4"), "bin/nvcc is of 12.4",
                                "pip install nvidia-cuda-nvcc~=13.0.0"),
    "an architecture that nvcc does not know":
        ("cuda", lambda m, env: nvcc(m / "bin/nvcc", text=fails("nvcc fatal : Unsupported gpu architecture")),
         "Unsupported gpu architecture", "TORCH_CUDA_ARCH_LIST"),
    "an architecture by its name": ("cuda", lambda m, env: env("TORCH_CUDA_ARCH_LIST", "Hopper"), "'Hopper'",
                                    "such as 8.0;9.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_warning_with_the_error_and_the_remedy(machine, monkeypatch, name):
    part, breaks, reason, remedy = FAILURES[name]
    breaks(machine, lambda *what: (monkeypatch.setenv if len(what) == 2 else monkeypatch.setattr)(*what))
    with pytest.warns(UserWarning) as found:
        assert not build.load.__wrapped__(part)
    (message,) = [str(warning.message) for warning in found]
    assert reason in message and remedy in message and "\n" not in message
    assert ("operators for CUDA" in message) == (part == "cuda") and "collect2" not in message
    assert ("Install" in message) == ("Install" in remedy)
    if part == "cuda":  # and the CPU's is built all the same
        assert build.library("cpu").read_text() == "library\n"


@pytest.mark.parametrize("damage", ["truncated", "empty", "deleted", "no manifest", "none"])
def test_a_damaged_library_is_compiled_again_once(machine, damage):
    library = build.library("cpu")
    commands = len(told(machine))
    if damage in ("truncated", "empty"):
        library.write_text("libr" if damage == "truncated" else "")
    elif damage != "none":
        (library if damage == "deleted" else library.with_name("manifest.json")).unlink()
    assert build.library("cpu") == build.library("cpu") == library and library.read_text() == "library\n"
    assert len(told(machine)) == commands * (1 if damage == "none" else 2)


def test_ninja_is_found_beside_the_python_that_runs(machine, monkeypatch):
    (machine / "bin" / "ninja").rename(machine / "ninja")
    monkeypatch.setattr(sys, "executable", str(machine / "python"))
    assert build.library("cpu").exists()


def test_a_library_that_cannot_be_written_is_loaded_all_the_same(machine, monkeypatch):
    library = build.library("cpu")
    monkeypatch.setattr(build, "compile_into", None)
    assert build.library("cpu") == library


def test_the_compiler_may_have_a_launcher(machine, monkeypatch):
    program(machine / "bin" / "ccache", MAKES)
    program(machine / "bin" / "g++", MAKES)
    nvcc(machine / "bin" / "nvcc")
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    build.library("cuda")
    for line in told(machine):
        assert ("/nvcc -ccbin g++ " if ".cu " in line else "ccache g++ -m64 ") in line


@pytest.mark.parametrize("place", ["CUDA_HOME", "a link", "a wrapper", "pip"])
def test_the_toolkit_is_that_of_nvcc(machine, monkeypatch, place):
    home = machine / ("nvidia/cu13" if place == "pip" else "a toolkit")
    found = nvcc(home / "bin" / "nvcc")
    if place == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(home))
    elif place == "a link":
        (machine / "bin" / "nvcc").symlink_to(found)
    elif place == "a wrapper":
        program(machine / "bin" / "nvcc", f'exec "{found}" "$@"\n')
    else:
        nvcc(machine / "other" / "bin" / "nvcc", "12.4").rename(machine / "bin" / "nvcc")  # the system's
        monkeypatch.syspath_prepend(machine)
    build.library("cuda")
    compiled, link = (next(line for line in told(machine) if text in line)
                      for text in ("checks.cpp", "-shared"))
    assert f"-I{home}/bin/../include" in compiled and f"{home}/bin/../lib/libcudart.so.13" in link
    assert [path.name for path in (home / "lib").iterdir()] == ["libcudart.so.13"]


@pytest.mark.parametrize("named, gpus, expected", [
    ("", [], "sm_75 sm_80 sm_90 compute_90"), ("", [(9, 0), (8, 6), (8, 6)], "sm_86 sm_90"),
    ("8.0;9.0a+PTX", [(7, 5)], "sm_80 sm_90a compute_90a"), ("8.0 8.6", [], "sm_80 sm_86")])
def test_architectures(machine, monkeypatch, named, gpus, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    nvcc(machine / "bin" / "nvcc")
    library = build.library("cuda")
    kernels = [line for line in told(machine) if ".cu " in line]
    assert kernels and {" ".join(re.findall(r",code=(\w+)", line)) for line in kernels} == {expected}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0" if "sm_90 " in expected + " " else "8.0")
    assert build.library("cuda") == library  # which covers that


@pytest.mark.parametrize("built, wanted, runs", [
    (["8.0"], "8.0", True), (["8.0"], "8.9", True), (["8.6"], "8.0", False), (["8.0"], "9.0", False),
    (["8.0+PTX"], "9.0", True), (["9.0+PTX"], "8.0", False), (["9.0a+PTX"], "10.0", False),
    (["9.0a"], "9.0", True), (["7.5", "10.0"], "10.3", True)])
def test_what_a_library_covers(built, wanted, runs):
    assert toolkit.covers(built, wanted) == runs


def test_the_processor_is_that_of_the_key(monkeypatch):
    """Flags name the level, never -march=native: nodes of a kind share a library, others have theirs."""
    found = {}
    for level in ("DEFAULT", "AVX2", "AVX512", "SVE256", "NO AVX"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
        assert not any("native" in flag or " " in flag for flag in build.cxx_flags())
        found[level] = build.digest("cpu")
    assert len({found["DEFAULT"], found["AVX2"], found["AVX512"]}) == 3
    assert found["SVE256"] == found["NO AVX"] == found["DEFAULT"]  # whose vectors every processor has


@pytest.mark.parametrize("changed, parts", [
    ("norms.cpp", {"cpu"}), ("mixed_sum_kernels.cuh", {"cuda"}), ("mixed_sum_cuda.cpp", {"cuda"}),
    ("checks.cpp", {"cpu", "cuda"})])
def test_a_changed_source_is_another_build(tmp_path, monkeypatch, changed, parts):
    shutil.copytree(CSRC, tmp_path / "csrc")
    before = {part: build.digest(part) for part in ("cpu", "cuda")}
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "ldarts")
    assert before == {part: build.digest(part) for part in ("cpu", "cuda")}
    with open(tmp_path / "csrc" / changed, "a") as file:
        file.write("\n")
    assert {part for part in before if build.digest(part) != before[part]} == parts


def test_operators_are_defined_for_the_cpu_and_nvcc_reads_no_header_of_pytorch():
    assert set(build.files("cpu")) | set(build.files("cuda")) == set(CSRC.glob("*.*"))
    for path in build.files("cuda"):
        text = path.read_text()
        assert not re.search(r"TORCH_LIBRARY(_FRAGMENT)?\(", text), path
        assert path.suffix not in (".cu", ".cuh") or not re.search("#include <(ATen|c10|torch)/", text), path


# ---- by processes of their own

CALL = ("import torch, ldarts; "
        "print(float(ldarts.mixed_sum(torch.ones(2), [torch.ones(3), torch.ones(3)]).sum()))")


def call(cache, **environment):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    return subprocess.Popen([sys.executable, "-c", CALL], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment, start_new_session=True)


@pytest.mark.parametrize("name, value", [("LDARTS_FUSED", "off"), ("LDARTS_MIXED_SUM", "reference")])
def test_the_plain_form_can_be_chosen(tmp_path, name, value):
    out, err = (process := call(tmp_path, **{name: value})).communicate(timeout=60)
    assert process.returncode == 0 and out == "6.0\n" and err == "" and list(tmp_path.iterdir()) == []


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path):
    out, err = (process := call(tmp_path, CXX=str(tmp_path / "no-compiler"))).communicate(timeout=60)
    assert process.returncode == 0 and out == "6.0\n"
    assert err.count("UserWarning") == 1 and "no-compiler" in err and "Install g++ 11" in err


@needs_build
def test_two_processes_build_once_even_after_one_was_killed(tmp_path):
    slow = program(tmp_path / "c++", 'for last; do :; done; sleep 0.3; cp "$LIBRARY" "$last"\n')
    environment = {"CXX": str(slow), "LIBRARY": str(build.library("cpu"))}
    killed = call(tmp_path, **environment)
    plan = tmp_path / "ldarts" / f"cpu-{build.digest('cpu')}" / "build.ninja"
    deadline = time.monotonic() + 60
    while not plan.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    results = [(p, *p.communicate(timeout=200)) for p in [call(tmp_path, **environment) for _ in "ab"]]
    assert all(p.returncode == 0 and out == "6.0\n" for p, out, _ in results), results
    assert sum(err.count("compiling the fused operators") for _, _, err in results) == 1


def test_setup_puts_the_libraries_into_the_package(tmp_path):
    pytest.importorskip("setuptools")
    environment = {"CXX": str(program(tmp_path / "c++", MAKES)), "LOG": os.devnull}
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "base",
                    "--build-lib", tmp_path / "lib"], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | environment)
    (folder,) = (tmp_path / "lib" / "ldarts" / "built").glob("cpu-*")
    assert build.sound(folder) and len(list(folder.iterdir())) == 2
    counted = subprocess.run(
        [sys.executable, "-m", "ldarts.bench", "work", "--search_space", "nasbench201", "--layers", "1",
         "--init_channels", "4", "--no-unrolled", "--json"], cwd=tmp_path, check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "lib"), "LDARTS_FUSED": "off"})
    assert json.loads(counted.stdout)["launches"] > 1000  # the package stands without the scripts beside it
