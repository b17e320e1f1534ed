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
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import torch

from ..errors import InputError
from ..locks import locked

PACKAGE = Path(__file__).parent.parent
TORCH = Path(torch.__file__).parent
OFF = ("off", "0", "false", "no")
# PyTorch compiles its own kernels with these flags, so a processor that runs its level of at::vec runs ours.
LEVELS = {"DEFAULT": [], "AVX2": ["-mavx2", "-mfma", "-mf16c"],
          "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]}
# The files of csrc/ that a part depends on.
SOURCES = {"cpu": r".*\.h|.*(?<!_cuda)\.cpp", "cuda": r".*\.(h|cuh|cu)|(.*_cuda|checks)\.cpp"}
PACKAGES = ("cuda-nvcc", "cuda-cccl", "cuda-crt", "nvvm")  # pip's compiler for CUDA
USUAL_HOME = "/usr/local/cuda"


class BuildError(Exception):
    """Why there is no library, in one line, and its remedy."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def switched_off() -> bool:
    """Whether LDARTS_FUSED in the environment chooses the plain form. Raises InputError for other values."""
    value = os.environ.get("LDARTS_FUSED", "")
    if value.lower() not in ("", "on", "1", "true", "yes", *OFF):
        raise InputError(f"LDARTS_FUSED={value}: use off for the plain form, on for the engine")
    return value.lower() in OFF


@functools.cache
def hindrance(part: str) -> str:
    """Load the library "cpu" or "cuda", compiled first if needed -> "", or why not, after a warning."""
    if switched_off():
        return "LDARTS_FUSED=off"
    try:
        torch.ops.load_library(library(part))
        if part == "cuda":  # fails without code for this GPU, or with PTX that its driver cannot read
            torch.ops.ldarts.mixed_sum(one := torch.ones(1, device="cuda"), [one])
    except Exception as error:  # a build fails in more ways than can be listed
        damaged = part == "cpu" or isinstance(error, OSError)  # of load_library
        remedy = getattr(error, "remedy", f"Delete {cache()} to compile again" if damaged else
                         "Set TORCH_CUDA_ARCH_LIST to what GPU and nvcc know, as 8.0;9.0+PTX")
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        device = " for CUDA" if part == "cuda" else ""  # the library for CPUs has the operators of both
        warnings.warn(f"ldarts: no fused operators{device} ({reason}); the slower plain form runs. {remedy}; "
                      "LDARTS_FUSED=off chooses it without this warning", stacklevel=4)
        return reason
    return ""


def library(part: str) -> Path:
    """The path of a part's library, compiled now if there is none. Raises BuildError if that fails."""
    installed = [Path(folder, "ldarts", "built") for folder in (PACKAGE.parent, *sys.path)]
    for folder in (*installed, cache()):
        if os.path.exists(path := folder / file_name(part)):  # no error for a folder that cannot be searched
            return path
    return compile_into(cache(), part)


def cache() -> Path:
    home = re.sub("^~", os.devnull, os.path.expanduser("~"))  # in devnull, without a home: BuildError says so
    return Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", "ldarts")


def sources(part: str) -> list[Path]:
    csrc = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"
    return [path for path in sorted(csrc.glob("*.*")) if re.fullmatch(SOURCES[part], path.name)]


def compile_flags(part: str) -> list[str]:
    """The flags of the compiler, which is nvcc for all files of the part "cuda"."""
    level = torch.backends.cpu.get_cpu_capability()
    level = level if level in LEVELS else "DEFAULT"
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags = ["-fPIC", *LEVELS[level], f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}", *openmp,
             f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if part == "cuda":
        flags = ["--expt-relaxed-constexpr", *architecture_flags(), "-Xcompiler", ",".join(flags)]
    return ["-O3", "-std=c++20", *flags]


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


# ---- what compiles: C++, ninja, nvcc, the GPUs' architectures

def cxx() -> list[str]:
    """The command of the C++ compiler: CXX from the environment, else the first of c++, g++ and clang++."""
    usual = next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    command = shlex.split(os.environ.get("CXX", "")) or [usual]
    if not shutil.which(command[0]):
        raise BuildError(f"no compiler {command[0]!r}", "Install g++ 11 or later, or name a compiler in CXX")
    return command


def ninja() -> str:
    """The path of ninja: beside the running Python, activated or not, else on PATH."""
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    folders = [str(Path(sys.executable).parent), user, os.environ.get("PATH", "")]
    path = shutil.which("ninja", path=os.pathsep.join(folders))
    if not path:
        raise BuildError("no ninja", f"{sys.executable} -m pip install ninja")
    return path


def nvcc() -> list[str]:
    """The first nvcc of PyTorch's major CUDA version: in CUDA_HOME, on PATH, in USUAL_HOME, from pip; with
    the compiler of CXX, if that is set: in "ccache g++ -m64" the last word before its flags."""
    if torch.version.cuda is None:
        raise BuildError(f"PyTorch {torch.__version__} is not one for CUDA", "Install PyTorch for CUDA")
    major = torch.version.cuda.split(".")[0]
    own_homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    pip_homes = [f"{folder}/nvidia/cu{major}" for folder in sys.path]
    names = [f"{home}/bin/nvcc" for home in (*own_homes, USUAL_HOME, *pip_homes)]
    names.insert(len(own_homes), "nvcc")
    others = ""
    for path in dict.fromkeys(filter(None, map(shutil.which, names))):
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace").stdout
        release = re.search(r"release (\d+)\.\d+", answer)
        if release and release[1] == major:
            own = shlex.split(re.split(r"\s-", os.environ.get("CXX", ""))[0])[-1:]
            return [path, *(["-ccbin", *own] if own else [])]
        others += f"; {path} is {release[0] if release else 'of unknown release'}"
    packages = " ".join(f"nvidia-{name}~={torch.version.cuda}.0" for name in PACKAGES)
    raise BuildError(f"no nvcc of CUDA {major}{others}", f"pip install {packages}" if int(major) > 12 else
                     f"Install the CUDA toolkit {torch.version.cuda}, with its nvcc on PATH")


def architecture_flags() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else for Turing to Hopper.

    Before CUDA 13 Volta is included. Newer GPUs run the PTX. The GPUs of this machine do not count, because a
    login node may compile.
    """
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    volta = ["7.0"] if (torch.version.cuda or "").startswith("12.") else []
    flags = []
    for name in names or [*volta, "7.5", "8.0", "9.0+PTX"]:
        number = name.removesuffix("+PTX").replace(".", "")
        kinds = ["sm", "compute"] if name.endswith("+PTX") else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags
