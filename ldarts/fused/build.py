"""Compiles csrc/ into two libraries and loads them: `cpu`, the operators, and `cuda`, their kernels for GPUs.

Each is compiled once, by `pip install` or on its first use, in a folder of its own that holds it with the
compiler's output and, written last, its size and SHA-256:

    PACKAGE/built or ~/.cache/ldarts   cpu-DIGEST   cuda-DIGEST-8.0_9.0+PTX   DIGEST: sources, flags, PyTorch

Where one cannot be compiled, or with LDARTS_FUSED=off in the environment, the plain form runs on its device.
"""
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from .toolkit import (ARCHITECTURES, BuildError, architecture_flags, covers, cuda_toolkit, cxx_compiler,
                      ninja, vector_flags, wanted_architectures)

PACKAGE = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
LIBRARY = "operators.so"
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]


def switched_off() -> bool:
    """Whether the environment chooses the plain form. LDARTS_MIXED_SUM=reference is its older name."""
    return os.environ.get("LDARTS_FUSED") == "off" or os.environ.get("LDARTS_MIXED_SUM") == "reference"


@functools.cache
def load(part: str) -> bool:
    """Load the library "cpu" or "cuda", compiled now where it is not; False, with a warning, if it fails."""
    if switched_off():
        return False
    try:
        torch.ops.load_library(library(part))
    except Exception as error:  # a build fails in more ways than can be listed
        remedy = getattr(error, "remedy", "Deleted from ~/.cache/ldarts it is compiled again")
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        device = " for CUDA" if part == "cuda" else ""  # the CPU's library has the operators of both
        warnings.warn(f"ldarts: no fused operators{device} ({reason}); the slower plain form runs. {remedy}; "
                      "LDARTS_FUSED=off chooses it silently", stacklevel=3)
        return False
    return True


def library(part: str) -> Path:
    """The library of a part, found or compiled. BuildError where it cannot be."""
    wanted = wanted_architectures() if part == "cuda" else []
    for root in (PACKAGE / "built", cache()):
        for folder in sorted(root.glob(f"{part}-{digest(part)}*")):
            built_for = folder.name.split("-")[-1].split("_")
            if sound(folder) and all(covers(built_for, architecture) for architecture in wanted):
                return folder / LIBRARY
    return compile_into(cache(), part)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldarts"


def files(part: str) -> list[Path]:
    """What a part is made of: headers and checks are in both."""
    csrc = PACKAGE.parent / "csrc" if (PACKAGE.parent / "csrc").is_dir() else PACKAGE / "csrc"

    def belongs(path: Path) -> bool:
        if path.suffix == ".h" or path.name == "checks.cpp":
            return True
        return (path.suffix != ".cpp" or path.stem.endswith("_cuda")) == (part == "cuda")
    return [path for path in sorted(csrc.glob("*.*")) if belongs(path)]


def cxx_flags() -> list[str]:
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return ["-O3", "-std=c++20", "-fPIC", *vector_flags(), *openmp,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def digest(part: str) -> str:
    """Of all that a library is made of; a GPU's architectures are in the folder's name beside it."""
    machine = torch.__version__, sys.platform, platform.machine()
    key = hashlib.sha256(repr((machine, cxx_flags(), NVCC_FLAGS if part == "cuda" else [])).encode())
    for path in files(part):
        key.update(path.name.encode() + path.read_bytes())
    return key.hexdigest()[:16]


def identity(path: Path) -> dict:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sound(folder: Path) -> bool:
    """Whether the library is the one that was compiled: to load half of one kills the process."""
    try:
        return json.loads((folder / "manifest.json").read_text()) == identity(folder / LIBRARY)
    except (OSError, ValueError):
        return False


def compile_into(root: Path, part: str) -> Path:
    """Compile a part in a folder under `root` -> the library. Concurrent processes wait for the first."""
    architectures = (wanted_architectures() or ARCHITECTURES) if part == "cuda" else []
    folder = root / "-".join([part, digest(part), "_".join(architectures)]).rstrip("-")
    plan = ninja_file(part, architectures)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".flock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel even when its holder is killed
            if not sound(folder):
                for left in set(folder.iterdir()) - {folder / ".flock"}:  # by a build that did not end
                    left.unlink()
                (folder / "build.ninja").write_text(plan)
                run_ninja(folder, part)
                manifest = folder / "manifest.new"
                manifest.write_text(json.dumps(identity(folder / LIBRARY)))
                manifest.replace(folder / "manifest.json")
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror or error}",
                         "Set XDG_CACHE_HOME to a folder that can be written") from error
    return folder / LIBRARY


def ninja_file(part: str, architectures: list[str]) -> str:
    """A build.ninja of one command an object file and one that links them."""
    command, compiler = cxx_compiler()
    cxx = [*command, *cxx_flags(), f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    libraries, nvcc = [f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", "-ltorch"], []
    if part == "cuda":
        toolkit = cuda_toolkit()
        cxx += [f"-I{path}" for path in toolkit.includes]
        libraries += ["-lc10_cuda", "-ltorch_cuda", toolkit.cudart,
                      f"-Wl,-rpath,{Path(toolkit.cudart).parent}"]
        host = ["-ccbin", compiler] if os.environ.get("CXX") else []
        nvcc = [toolkit.nvcc, *host, *NVCC_FLAGS, *architecture_flags(architectures)]
    if sys.platform == "darwin":
        libraries += ["-undefined", "dynamic_lookup"]
    lines = {f"{path.name}.o": [*(nvcc if path.suffix == ".cu" else cxx), "-c", str(path)]
             for path in files(part) if path.suffix in (".cpp", ".cu")}
    edges = [(name, "", line) for name, line in lines.items()]
    edges += [(LIBRARY, " ".join(lines), [*cxx, "-shared", *lines, *libraries])]
    return "rule run\n  command = $line\n" + "".join(
        f"build {name}: run {needs}\n  line = {shlex.join([*line, '-o', name]).replace('$', '$$')}\n"
        for name, needs, line in edges)


def run_ninja(folder: Path, part: str) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    print(f"ldarts: compiling the fused operators for {part.upper()}, once, for up to a minute ({folder})",
          file=sys.stderr, flush=True)
    started = time.perf_counter()
    done = subprocess.run([ninja(), *jobs], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", env=os.environ | {"LC_ALL": "C"})
    (folder / "log.txt").write_text(done.stdout)
    if done.returncode:
        raise BuildError(*diagnosis(done.stdout, folder / "log.txt"))
    for path in folder.glob("*.o"):
        path.unlink()
    print(f"ldarts: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def diagnosis(output: str, log: Path) -> tuple[str, str]:
    """(the first error of a compiler or a linker, what to do) from what ninja printed."""
    failed = output[max(output.find("FAILED:"), 0) :].splitlines()
    lines = [line.strip() for line in failed[2:] if not re.match(r"collect2:|ninja:|\s*$", line)]
    lines = lines or failed[-1:]
    telling = r"\b(error|fatal)\b[^/]*:|undefined reference|cannot find|not found|No space left"
    reason = next((line for line in lines if re.search(telling, line)), lines[-1])
    remedies = {"No space left": "Make room, or set XDG_CACHE_HOME to a folder on another disk",
                "Unsupported gpu arch": "Set TORCH_CUDA_ARCH_LIST to what GPU and nvcc know, as 8.0;9.0+PTX",
                "-std=c++20": "Name a newer compiler by CXX: g++ 11 or clang 14 or later"}
    return reason, next((remedy for text, remedy in remedies.items() if text in reason),
                        f"Its whole output is in {log}")
