"""How the libraries of csrc/ are built, checked and loaded; most compilers here are small scripts."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from ldarts import InputError
from ldarts.fused import build, compiled_for

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
    return program(path, f"if [ $1 = --version ]; then echo 'release {version}, V'; exit; fi\n{text}")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a compiler and PyTorch for CUDA 13.0, without nvcc or a GPU; its folder."""
    program(tmp_path / "bin" / "c++", MAKES)
    (tmp_path / "bin" / "ninja").symlink_to(build.ninja())
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "LDARTS_FUSED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "USUAL_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda *names: str(tmp_path / "none"))
    return tmp_path


def told(machine: Path) -> list[str]:
    return (machine / "log").read_text().splitlines() if (machine / "log").exists() else []


def fails(text: str) -> str:
    return f"while read -r line; do echo \"$line\"; done <<'E'\n{text}\nE\nexit 1\n"


LINK = fails("ld: cannot find -lc10: No such file\ncollect2: error: ld returned 1 exit status")
FAILURES = {  # name: (part, what is wrong, in the reason, in the remedy)
    "no compiler": ("cpu", lambda m, env: (m / "bin/c++").unlink(), "no compiler 'c++'", "Install g++ 11"),
    "no ninja": ("cpu", lambda m, env: ((m / "bin/ninja").unlink(), env(sys, "executable", "/none/python")),
                 "no ninja", "/none/python -m pip install ninja"),
    "a cache that cannot be written":
        ("cpu", lambda m, env: ((m / "file").touch(), env("XDG_CACHE_HOME", str(m / "file"))),
         "Not a directory", "Set XDG_CACHE_HOME"),
    "no home":
        ("cpu", lambda m, env: (env("HOME", "~"), env("XDG_CACHE_HOME", "")), "Not a directory",
         "Set XDG_CACHE_HOME"),
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
    "nvcc of another version":
        ("cuda", lambda m, env: nvcc(m / "bin/nvcc", "12.4"), "bin/nvcc is release 12.4",
         "pip install nvidia-cuda-nvcc~=13.0.0"),
    "an architecture that nvcc does not know":
        ("cuda", lambda m, env: nvcc(m / "bin/nvcc", text=fails("nvcc fatal : Unsupported gpu architecture")),
         "Unsupported gpu architecture", "TORCH_CUDA_ARCH_LIST"),
    "a GPU for which the library has no code":
        ("cuda", lambda m, env: (nvcc(m / "bin/nvcc"), env(torch.ops, "load_library", str),
                                 env(torch, "ones", lambda *_, **__: 1 / 0)),
         "division by zero", "TORCH_CUDA_ARCH_LIST"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_warning_with_the_error_and_the_remedy(machine, monkeypatch, name):
    part, breaks, reason, remedy = FAILURES[name]
    breaks(machine, lambda *what: (monkeypatch.setenv if len(what) == 2 else monkeypatch.setattr)(*what))
    with pytest.warns(UserWarning) as found:
        assert build.hindrance.__wrapped__(part)
    (message,) = [str(warning.message) for warning in found]
    assert reason in message and remedy in message and "\n" not in message
    assert ("operators for CUDA" in message) == (part == "cuda") and "collect2" not in message
    assert ("Install" in message) == ("Install" in remedy)
    if part == "cuda":  # and the CPU's is built all the same
        assert build.library("cpu").read_text() == "library\n"


def test_a_library_is_compiled_once_and_again_when_it_is_deleted(machine):
    library = build.library("cpu")
    commands = len(told(machine))
    assert build.library("cpu") == library and len(told(machine)) == commands
    library.unlink()
    assert build.library("cpu").read_text() == "library\n" and len(told(machine)) == 2 * commands
    assert [*library.parent.iterdir()] == [library]


def test_a_cache_without_locks_is_one_warning(machine, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.warns(UserWarning, match="a file system here has no locks") as warned:
        assert build.library("cpu").read_text() == "library\n"
    assert len(warned) == 1


def test_ninja_is_found_beside_the_python_that_runs(machine, monkeypatch):
    (machine / "bin" / "ninja").rename(machine / "ninja")
    monkeypatch.setattr(sys, "executable", str(machine / "python"))
    assert build.library("cpu").exists()


def test_a_library_that_cannot_be_written_is_loaded_all_the_same(machine, monkeypatch):
    library = build.library("cpu")
    monkeypatch.syspath_prepend("x" * 300)  # where nothing can be looked for
    monkeypatch.setattr(build, "compile_into", None)
    assert build.library("cpu") == library


@pytest.mark.parametrize("place", ["CUDA_HOME", "a link", "a wrapper", "pip"])
def test_nvcc_is_found_where_toolkits_lie(machine, monkeypatch, place):
    home = machine / ("nvidia/cu13" if place == "pip" else "a toolkit")
    path = nvcc(home / "bin" / "nvcc")
    if place == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(home))
    elif place == "a link":
        (machine / "bin" / "nvcc").symlink_to(path)
    elif place == "a wrapper":
        program(machine / "bin" / "nvcc", f'exec "{path}" "$@"\n')
    else:
        nvcc(machine / "other" / "bin" / "nvcc", "12.4").rename(machine / "bin" / "nvcc")  # the system's
        monkeypatch.syspath_prepend(machine)
    build.library("cuda")
    assert len(told(machine)) > 3 and all("/nvcc " in line for line in told(machine))


def test_nvcc_uses_the_compiler_of_cxx(machine, monkeypatch):
    nvcc(machine / "bin" / "nvcc")
    monkeypatch.setenv("CXX", "ccache g++-13 -pthread -m64")
    build.library("cuda")
    assert len(told(machine)) > 3 and all("-ccbin g++-13 " in line for line in told(machine))


@pytest.mark.parametrize("named, version, expected", [
    ("", "13.0", "sm_75 sm_80 sm_90 compute_90"), ("", "12.8", "sm_70 sm_75 sm_80 sm_90 compute_90"),
    ("8.0;9.0a+PTX", "13.0", "sm_80 sm_90a compute_90a"), ("8.0 8.6", "13.0", "sm_80 sm_86")])
def test_architectures(machine, monkeypatch, named, version, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    monkeypatch.setattr(torch.version, "cuda", version)
    nvcc(machine / "bin" / "nvcc", version)
    library = build.library("cuda")
    kernels = [line for line in told(machine) if ".cu " in line]
    assert kernels and {" ".join(re.findall(r",code=(\w+)", line)) for line in kernels} == {expected}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert build.library("cuda") != library


def test_the_processor_and_pytorch_are_those_of_the_key(monkeypatch):
    """Flags name the level, never -march=native: nodes of a kind share a library, others have theirs."""
    found = {}
    for level in ("DEFAULT", "AVX2", "AVX512", "SVE256", "NO AVX"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
        assert not any("native" in flag or " " in flag for flag in build.compile_flags("cpu"))
        found[level] = build.file_name("cpu")
    assert len({found["DEFAULT"], found["AVX2"], found["AVX512"]}) == 3
    assert found["SVE256"] == found["NO AVX"] == found["DEFAULT"]  # whose vectors every processor has
    monkeypatch.setattr(torch, "__version__", "0.1")
    found["another PyTorch"] = build.file_name("cpu")
    monkeypatch.setattr(build.platform, "machine", lambda: "another")
    found["another machine"] = build.file_name("cpu")
    assert len(set(found.values())) == 5


@pytest.mark.parametrize("changed, parts", [
    ("norms.cpp", {"cpu"}), ("sums_kernels.cuh", {"cuda"}), ("sums_cuda.cpp", {"cuda"}),
    ("norms_operators.h", {"cpu", "cuda"}), ("checks.cpp", {"cpu", "cuda"})])
def test_a_changed_source_is_another_build(tmp_path, monkeypatch, changed, parts):
    shutil.copytree(CSRC, tmp_path / "csrc")
    before = {part: build.file_name(part) for part in ("cpu", "cuda")}
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "ldarts")
    assert before == {part: build.file_name(part) for part in ("cpu", "cuda")}
    with open(tmp_path / "csrc" / changed, "a") as file:
        file.write("\n")
    assert {part for part in before if build.file_name(part) != before[part]} == parts


def test_operators_are_defined_for_the_cpu_and_nvcc_reads_no_header_of_pytorch():
    assert set(build.sources("cpu")) | set(build.sources("cuda")) == set(CSRC.glob("*.*"))
    for path in build.sources("cuda"):
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


@pytest.mark.parametrize("value, off", [("off", True), ("FALSE", True), ("no", True), ("0", True),
                                        ("", False), ("on", False), ("1", False)])
def test_values_of_the_switch(machine, monkeypatch, value, off):
    monkeypatch.setenv("LDARTS_FUSED", value)
    assert build.switched_off() == off
    if off:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert build.hindrance.__wrapped__("cpu")
        assert not told(machine)  # nothing was compiled
    monkeypatch.setenv("LDARTS_FUSED", value + "?")
    with pytest.raises(InputError, match=f"LDARTS_FUSED={value}.: use off"):
        build.hindrance.__wrapped__("cpu")


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path):
    out, err = (process := call(tmp_path, CXX=str(tmp_path / "no-compiler"))).communicate(timeout=60)
    assert process.returncode == 0 and out == "6.0\n"
    assert err.count("UserWarning") == 1 and "no-compiler" in err and "Install g++ 11" in err


@needs_build
def test_two_processes_build_once_even_after_one_was_killed(tmp_path):
    slow = program(tmp_path / "c++", 'for last; do :; done; sleep 0.3; cp "$LIBRARY" "$last"\n')
    environment = {"CXX": str(slow), "LIBRARY": str(build.library("cpu"))}
    killed = call(tmp_path, **environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("ldarts/*/build.ninja")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    results = [(p, *p.communicate(timeout=200)) for p in [call(tmp_path, **environment) for _ in "ab"]]
    assert all(p.returncode == 0 and out == "6.0\n" for p, out, _ in results), results
    assert sum(err.count("compiling the fused operators") for _, _, err in results) == 1


def test_setup_puts_the_libraries_into_the_package(tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    environment = {"CXX": str(program(tmp_path / "c++", MAKES)), "LOG": os.devnull}
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "base",
                    "--build-lib", tmp_path / "lib"], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | environment)
    (library,) = (tmp_path / "lib" / "ldarts" / "built").iterdir()
    assert library.name.startswith("cpu-") and library.read_text() == "library\n"
    # The checkout uses the library that lies in the installed package.
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library("cpu") == library
    # The package works without the scripts beside it.
    subprocess.run([sys.executable, "-c", CALL], cwd=tmp_path, check=True, capture_output=True,
                   env=os.environ | {"PYTHONPATH": str(tmp_path / "lib"), "LDARTS_FUSED": "off"})
