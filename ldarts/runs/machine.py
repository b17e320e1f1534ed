"""The device, its precision and its random numbers, and what a run says of where it ran."""
import os
import platform
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data.batches import generator_of
from ..errors import InputError
from ..fused.build import hindrance

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
AMP = ("none", "bf16")


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU where there is one; `cuda`: that of the process, with its number. Raises InputError for a
    device that is missing, and for one that several processes of this machine would share."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name.startswith("cuda") and (local := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        raise InputError(f"--device {name}, {local} processes: each needs a GPU of its own; use cuda")
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise InputError(f"--device {name}: this code runs on no such device; use cpu, cuda, cuda:N or auto")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason, gpus = str(error).splitlines()[0][:120], torch.cuda.device_count()
        raise InputError(f"--device {name}: {reason} ({gpus} GPUs are visible here); "
                         "use cpu, cuda, cuda:N or auto") from error


def amp_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast. Raises InputError for bf16 on a CPU, where PyTorch 2.13's gradient w.r.t. the
    weight of a dilated depthwise convolution reads unwritten memory (channels-last, 16 channels of 32x32),
    and on GPUs before Ampere, for which cuDNN has no bfloat16 convolutions: PyTorch's go image by image."""
    if name == "none":
        return None
    if device.type == "cpu":
        raise InputError("--amp bf16: on a CPU its gradients of dilated convolutions are wrong; leave it out")
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        raise InputError("--amp bf16: a GPU of compute capability {}.{} computes convolutions "
                         "of bfloat16 image by image; leave it out there".format(*capability))
    return torch.bfloat16


def seed_everything(seed: int, *position: int) -> None:
    """Seed the generators of every device by `seed`, or by it and a position such as (rank, epoch, step)."""
    if position:
        seed = generator_of(seed, *position).initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic() -> None:
    """Only algorithms that give the same bits on every run; an operation without one raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel more for every new tensor
    torch.backends.cudnn.benchmark = False


def device_name(device: torch.device) -> str:
    """The GPU's name; of a CPU its model, where Linux tells it, vector instructions and cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text(errors="replace")) if info.exists() else None
    return (f"{model[1] if model else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
            f"{os.cpu_count()} cores")


def machine_facts(device: torch.device, engine: bool, graph: bool) -> dict[str, Any]:
    """Where a run takes place, for its config.json. engine, graph: whether it uses them

    machine: what its bits depend on beside its arguments and the commit, that of the checkout, with a + where
    it has uncommitted changes; None outside a checkout.
    """
    name = device_name(device)
    machine = {"PyTorch": torch.__version__, "device": name, "threads": torch.get_num_threads()}
    if engine:
        reason = hindrance("cpu") or hindrance(device.type)
        machine["engine"] = f"off, the plain form runs ({reason})" if reason else "on"
    if device.type == "cuda":
        machine["graph"] = graph
    commit, root = None, Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
        commit = subprocess.run(command, cwd=root, text=True, capture_output=True).stdout.strip() or None
    versions = {"ldarts": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"versions": versions, "device_name": name, "commit": commit, "machine": machine}
