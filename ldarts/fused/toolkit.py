"""What compiles the kernels: the C++ compiler, ninja, nvcc of PyTorch's CUDA version, the architectures."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple, Sequence

import torch

# PyTorch compiles its own kernels of each level by these, so that a processor that runs those runs ours.
LEVELS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"],
          "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]}
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")
PACKAGES = ("cuda-nvcc", "cuda-cccl", "cuda-crt", "nvvm")  # of pip, beside those that PyTorch brings
USUAL_HOME = "/usr/local/cuda"
ARCHITECTURES = ["7.5", "8.0", "9.0+PTX"]  # where no GPU is seen: from Turing to Hopper; later ones by PTX


class BuildError(Exception):
    """Why there is no library, in one line, and what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def vector_flags() -> list[str]:
    """What at::vec is compiled for: PyTorch's own level on this machine."""
    level = torch.backends.cpu.get_cpu_capability()
    level = level if level in LEVELS else "DEFAULT"
    return [*LEVELS.get(level, []), f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}"]


def cxx_compiler() -> tuple[list[str], str]:
    """The command that compiles C++, and the compiler in it: CXX may be "ccache g++"."""
    names = [name for name in ("c++", "g++", "clang++") if shutil.which(name)] or ["c++"]
    command = shlex.split(os.environ.get("CXX", "")) or names[:1]
    compiler = next((word for word in command if Path(word).name not in LAUNCHERS), command[0])
    for word in (command[0], compiler):
        if not shutil.which(word):
            raise BuildError(f"no compiler {word!r}", "Install g++ 11 or later, or name a compiler by CXX")
    return command, compiler


def ninja() -> str:
    """ninja beside the Python that runs, whether its environment is activated or not, else on PATH."""
    user = sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))
    places = [str(Path(sys.executable).parent), user, os.environ.get("PATH", "")]
    found = shutil.which("ninja", path=os.pathsep.join(places))
    if not found:
        raise BuildError("no ninja", f"{sys.executable} -m pip install ninja")
    return found


class Toolkit(NamedTuple):
    nvcc: str
    version: str  # "13.0"
    includes: list[str]  # folders
    cudart: str  # the library, by its path, because pip's has no unversioned name


def cuda_toolkit() -> Toolkit:
    """The first of PyTorch's major version: that of CUDA_HOME, of PATH, /usr/local/cuda, pip's."""
    if torch.version.cuda is None:
        raise BuildError(f"PyTorch {torch.__version__} is not one for CUDA", "Install PyTorch for CUDA")
    major = torch.version.cuda.split(".")[0]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    pips = [f"{folder}/nvidia/cu{major}" for folder in sys.path]
    others = []
    for path in [*(f"{home}/bin/nvcc" for home in homes), "nvcc",
                 *(f"{home}/bin/nvcc" for home in [USUAL_HOME, *pips])]:
        nvcc = shutil.which(path)
        toolkit = _inspect(nvcc) if nvcc else None
        if toolkit and toolkit.version.split(".")[0] == major:
            return toolkit
        if toolkit:
            others.append(f"; {nvcc} is of {toolkit.version}")
    others = "".join(dict.fromkeys(others))
    packages = " ".join(f"nvidia-{name}~={torch.version.cuda}.0" for name in PACKAGES)
    raise BuildError(f"no nvcc of CUDA {major}{others}", f"pip install {packages}" if int(major) > 12 else
                     f"Install the CUDA toolkit {torch.version.cuda}, its nvcc on PATH")


def _inspect(nvcc: str) -> Toolkit | None:
    """What nvcc, which may be a link or a wrapper, says of the toolkit that it belongs to."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
                          capture_output=True, text=True, errors="replace").stderr
    top = re.search(r"^#\$ TOP=(.*)", said, re.M)
    version = re.search(r"__CUDACC_VER_MAJOR__=(\d+).*__CUDACC_VER_MINOR__=(\d+)", said)
    if not top or not version:
        return None
    home = top[1].strip()
    includes = [f"{home}/include", *re.findall(r'"-I([^"]+)"', said)]  # "-isystem" ".../cccl" is nvcc's own
    libraries = [*re.findall(r'"-L([^"]+)"', said), f"{home}/lib64", f"{home}/lib"]
    found = [path for folder in libraries for path in sorted(Path(folder).glob("libcudart.so*"))]
    return Toolkit(nvcc, ".".join(version.groups()), includes, str(found[0]) if found else "-lcudart")


def wanted_architectures() -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else those of the GPUs that are seen; none: any will do."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    for name in named:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST names {name!r}", "Name numbers, such as 8.0;9.0+PTX")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)]
    return sorted(set(named or seen))


def architecture_flags(architectures: Sequence[str]) -> list[str]:
    """For nvcc."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        kinds = ["sm", "compute"] if name.endswith("+PTX") else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags


def covers(built: Sequence[str], wanted: str) -> bool:
    """Whether a library for these architectures runs on one: binaries within a major version, PTX later."""
    def number(name: str) -> tuple[int, int]:
        major, minor = re.match(r"(\d+)\.(\d)", name).groups()
        return int(major), int(minor)

    def runs(name: str) -> bool:
        have, want = number(name), number(wanted)
        if re.search("[af]", name):
            return have == want
        return have <= want and (have[0] == want[0] or name.endswith("+PTX"))
    return any(map(runs, built))
