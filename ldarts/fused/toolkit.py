"""What compiles the kernels: the C++ compiler, ninja, nvcc for PyTorch's CUDA version, the architectures."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

# PyTorch compiles its own kernels with these flags, so a processor that runs PyTorch's level runs ours.
LEVELS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"],
          "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"]}
PACKAGES = ("cuda-nvcc", "cuda-cccl", "cuda-crt", "nvvm")  # pip's compiler for CUDA
USUAL_HOME = "/usr/local/cuda"


class BuildError(Exception):
    """Why there is no library, in one line, and its remedy."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


def vector_flags() -> list[str]:
    """The flags for at::vec: those of PyTorch's own level on this machine."""
    level = torch.backends.cpu.get_cpu_capability()
    level = level if level in LEVELS else "DEFAULT"
    return [*LEVELS.get(level, []), f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}"]


def cxx() -> list[str]:
    """The command of the C++ compiler: CXX from the environment, else the first of c++, g++ and clang++."""
    usual = [name for name in ("c++", "g++", "clang++") if shutil.which(name)] or ["c++"]
    command = shlex.split(os.environ.get("CXX", "")) or usual[:1]
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
    """The first nvcc of PyTorch's major CUDA version: in CUDA_HOME, on PATH, in USUAL_HOME, from pip."""
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
            return [path]
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
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST names {name!r}", "Name numbers, such as 8.0;9.0+PTX")
    volta = ["7.0"] if (torch.version.cuda or "").startswith("12.") else []
    flags = []
    for name in names or [*volta, "7.5", "8.0", "9.0+PTX"]:
        number = name.removesuffix("+PTX").replace(".", "")
        kinds = ["sm", "compute"] if name.endswith("+PTX") else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags
