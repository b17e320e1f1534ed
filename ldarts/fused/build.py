"""Compiles csrc/ into two libraries and loads them: `cpu`, the operators, and `cuda`, their kernels for GPUs.

Each is compiled once, by `pip install` or on first use, in a temporary folder. The finished library is moved
to ldarts/built in site-packages or to ~/.cache/ldarts as PART-DIGEST.so; the digest covers sources, flags,
PyTorch, processor. So a checkout of the same sources uses what `pip install` compiled.
Where a library cannot be compiled, or with LDARTS_FUSED=off in the environment, the plain form runs.

torch.utils.cpp_extension is not used: its lock file outlives a killed process, and then all others wait; and
it links libcudart, which pip's nvcc does not bring.
"""
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from ..errors import InputError
from ..locks import locked
from .toolkit import BuildError, architecture_flags, cxx, ninja, nvcc, vector_flags

PACKAGE = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
OFF = ("off", "0", "false", "no")


def switched_off() -> bool:
    """Whether LDARTS_FUSED in the environment chooses the plain form. Raises InputError for other values."""
    value = os.environ.get("LDARTS_FUSED", "")
    if value.lower() not in ("", "on", "1", "true", "yes", *OFF):
        raise InputError(f"LDARTS_FUSED={value}: use off for the plain form, on for the engine")
    return value.lower() in OFF


def load(part: str) -> bool:
    """Load the library "cpu" or "cuda"; compile it first if needed. False, with a warning, if that fails."""
    return not hindrance(part)


@functools.cache
def hindrance(part: str) -> str:
    """Why a library cannot be loaded; "" once it is."""
    if switched_off():
        return "LDARTS_FUSED=off"
    try:
        torch.ops.load_library(library(part))
    except Exception as error:  # a build fails in more ways than can be listed
        remedy = getattr(error, "remedy", f"Delete {cache()} to compile again")
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        device = " for CUDA" if part == "cuda" else ""  # the CPU's library has the operators of both
        warnings.warn(f"ldarts: no fused operators{device} ({reason}); the slower plain form runs. {remedy}; "
                      "LDARTS_FUSED=off chooses it without this warning", stacklevel=4)
        return reason
    return ""


def library(part: str) -> Path:
    """The path of a part's library, compiled now if there is none. Raises BuildError if that fails."""
    installed = [Path(folder, "ldarts", "built") for folder in (PACKAGE.parent, *sys.path)]
    for folder in (*installed, cache()):
        if (path := folder / file_name(part)).exists():
            return path
    return compile_into(cache(), part)


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldarts"


def sources(part: str) -> list[Path]:
    """The files of csrc/ that a part depends on. Headers and checks.cpp belong to both."""
    csrc = PACKAGE.parent / "csrc" if (PACKAGE.parent / "csrc").is_dir() else PACKAGE / "csrc"

    def belongs(path: Path) -> bool:
        if path.suffix == ".h" or path.name == "checks.cpp":
            return True
        return (path.suffix != ".cpp" or path.stem.endswith("_cuda")) == (part == "cuda")
    return [path for path in sorted(csrc.glob("*.*")) if belongs(path)]


def compile_flags(part: str) -> list[str]:
    """The flags of the compiler, which is nvcc for all files of the part "cuda"."""
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    host = ["-fPIC", *vector_flags(), *openmp,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if part == "cpu":
        return ["-O3", "-std=c++20", *host]
    return ["-O3", "-std=c++20", "--expt-relaxed-constexpr", *architecture_flags(),
            "-Xcompiler", ",".join(host)]


def file_name(part: str) -> str:
    """The library's name, with a digest of all that the library is made from."""
    environment = torch.__version__, sys.platform, platform.machine(), compile_flags(part)
    digest = hashlib.sha256(repr(environment).encode())
    for path in sources(part):
        digest.update(path.name.encode() + path.read_bytes())
    return f"{part}-{digest.hexdigest()[:16]}.so"


def compile_into(folder: Path, part: str) -> Path:
    """Compile a part into a folder and return the library's path. Other processes wait for the first one."""
    path = folder / file_name(part)
    plan = ninja_file(part, path.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    Path(work, "build.ninja").write_text(plan)
                    run_ninja(Path(work), part, path.with_suffix(".log"))
                    os.replace(Path(work, path.name), path)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror or error}",
                         "Set XDG_CACHE_HOME to a folder that can be written") from error
    return path


def ninja_file(part: str, name: str) -> str:
    """The text of a build.ninja: one command for each object file, and one that links them to `name`."""
    compiler = [*(nvcc() if part == "cuda" else cxx()), *compile_flags(part)]
    includes = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    libraries = [f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu", "-ltorch"]
    if part == "cuda":  # PyTorch's libraries bring the CUDA runtime
        libraries += ["-lc10_cuda", "-ltorch_cuda", "-cudart=none"]
    if sys.platform == "darwin":
        libraries += ["-undefined", "dynamic_lookup"]
    objects = {f"{path.name}.o": [*compiler, *includes, "-c", str(path)]
               for path in sources(part) if path.suffix in (".cpp", ".cu")}
    builds = [(target, "", command) for target, command in objects.items()]
    builds.append((name, " ".join(objects), [*compiler, "-shared", *objects, *libraries]))
    return "rule run\n  command = $line\n" + "".join(
        f"build {target}: run {needs}\n  line = {shlex.join([*command, '-o', target]).replace('$', '$$')}\n"
        for target, needs, command in builds)


def run_ninja(work: Path, part: str, log: Path) -> None:
    """Run work/build.ninja. Raises BuildError if it fails, and leaves the compiler's output in `log`."""
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    print(f"ldarts: compiling the fused operators for {part.upper()}, once, in about a minute ({log.parent})",
          file=sys.stderr, flush=True)
    started = time.perf_counter()
    done = subprocess.run([ninja(), *jobs], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        log.write_text(done.stdout)
        raise BuildError(*diagnosis(done.stdout, log))
    print(f"ldarts: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def diagnosis(output: str, log: Path) -> tuple[str, str]:
    """(the first error of a compiler or a linker, its remedy) from what ninja printed."""
    failed = output[max(output.find("FAILED:"), 0) :].splitlines()
    lines = [line.strip() for line in failed[2:] if not re.match(r"collect2:|ninja:|\s*$", line)]
    lines = lines or failed[-1:]
    says_error = r"\b(error|fatal)\b[^/]*:|undefined reference|cannot find|not found|No space left"
    reason = next((line for line in lines if re.search(says_error, line)), lines[-1])
    remedies = {"No space left": "Make room, or set XDG_CACHE_HOME to a folder on another disk",
                "Unsupported gpu arch": "Set TORCH_CUDA_ARCH_LIST to what GPU and nvcc know, as 8.0;9.0+PTX",
                "-std=c++20": "Name a newer compiler in CXX: g++ 11 or clang 14 or later"}
    return reason, next((remedy for text, remedy in remedies.items() if text in reason),
                        f"The compiler's whole output is in {log}")
