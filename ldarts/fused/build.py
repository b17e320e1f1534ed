"""Loads the operators of `csrc/`, compiled by `pip install .` or, once, on first use, in the user's cache.

Without a compiler, or with LDARTS_FUSED=off in the environment, the plain form runs, nothing compiled.
"""
import fcntl
import functools
import hashlib
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent.parent


def switched_off() -> bool:
    """Whether the environment chooses the plain form. LDARTS_MIXED_SUM=reference is its older name."""
    return os.environ.get("LDARTS_FUSED") == "off" or os.environ.get("LDARTS_MIXED_SUM") == "reference"


@functools.cache
def has_kernel(device: str) -> bool:
    """Whether the loaded operators run on devices of this type; warns once where a GPU has none."""
    found = device in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
        "ldarts::mixed_sum", device.upper())
    if not found and device in ("cpu", "cuda"):
        warnings.warn(f"ldarts: the fused operators are not compiled for {device}; the slower plain form "
                      "runs there. For CUDA, install nvcc of PyTorch's CUDA version", stacklevel=3)
    return found


def load() -> bool:
    """Load the operators, compiled now where they are not; False, with one warning, where that fails."""
    if switched_off():
        return False
    try:
        torch.ops.load_library(_built_ahead() or _build())
    except Exception as error:  # a compiler fails in more ways than can be listed
        lines = str(error).splitlines()
        errors = (line for line in lines if " error: " in line or line.startswith("error"))
        reason = next(errors, lines[0][:200])
        warnings.warn(f"ldarts: the fused operators could not be compiled ({reason.strip()}); the slower "
                      "plain form runs. Install a C++20 compiler, such as g++ 11 or later, and ninja; "
                      "LDARTS_FUSED=off chooses it silently", stacklevel=3)
        return False
    return True


def build_options() -> dict:
    """Sources and flags of the extension on this machine, for setup.py and for the build on first use."""
    from torch.utils import cpp_extension
    csrc = PACKAGE.parent / "csrc" if (PACKAGE.parent / "csrc").is_dir() else PACKAGE / "csrc"
    cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    sources = [path for path in sorted(csrc.glob("*.c*"))
               if path.suffix in ((".cpp", ".cu") if cuda else (".cpp",))
               and (cuda or not path.stem.endswith("_cuda"))]
    level = torch.backends.cpu.get_cpu_capability()  # what at::vec is to be compiled for
    cflags = ["-O3", "-std=c++20", "-march=native", f"-DCPU_CAPABILITY={level}",
              f"-DCPU_CAPABILITY_{level}", "-fopenmp"]
    nvcc = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    if sys.platform == "darwin":
        cflags.remove("-fopenmp")
    arch = str(torch.cuda.get_device_capability()) if cuda and torch.cuda.is_available() else ""
    digest = hashlib.sha256(repr((torch.__version__, sys.platform, cflags, nvcc, arch)).encode())
    for path in sorted(csrc.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    build = digest.hexdigest()[:16]
    cflags.append(f"-DLDARTS_BUILD={build}")
    return {"sources": [str(path) for path in sources], "cuda": cuda, "cflags": cflags, "nvcc": nvcc,
            "build": build}


def _built_ahead() -> str | None:
    """The library that `pip install` compiled, if it was compiled from these sources for this PyTorch."""
    marker = f"ldarts-build:{build_options()['build']};".encode()
    return next((str(path) for path in PACKAGE.glob("_C*.so") if marker in path.read_bytes()), None)


def _build() -> str:
    """Compile once into the user's cache -> the library. Concurrent processes wait for the first."""
    from torch.utils import cpp_extension
    options = build_options()
    name = f"ldarts_{options['build']}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldarts" / options["build"]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}.so"
    with open(folder / ".flock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel even when its holder is killed
        if not (folder / "done").exists():
            if not shutil.which(cpp_extension.get_cxx_compiler()):
                raise RuntimeError(f"error: no compiler {cpp_extension.get_cxx_compiler()!r}")
            minutes = "three minutes" if options["cuda"] else "a minute"
            print(f"ldarts: compiling the fused operators, once, for about {minutes} ({folder})",
                  file=sys.stderr, flush=True)
            started = time.perf_counter()
            (folder / "lock").unlink(missing_ok=True)  # PyTorch's own lock, left by a build that was killed
            cpp_extension.load(name, options["sources"], extra_cflags=options["cflags"],
                               extra_cuda_cflags=options["nvcc"],
                               extra_ldflags=["-fopenmp"] if "-fopenmp" in options["cflags"] else [],
                               build_directory=str(folder), with_cuda=options["cuda"], is_python_module=False)
            (folder / "done").touch()
            print(f"ldarts: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return str(library)
