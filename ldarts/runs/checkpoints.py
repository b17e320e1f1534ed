"""Files that appear whole or not at all; checkpoints, with their SHA-256 at the end."""
import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any, Callable

import torch

from ..errors import InputError, brief

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
NAMES = ("model", "state_dict", "net", "model_state_dict")  # usual names of the weights in a file
SEAL = b"\nldarts-sha256:"  # then 64 digits; after the zip archive, so that torch.load ignores it


def write_atomically(path: Path, write: Callable[[Path], None], previous: Path | None = None) -> None:
    """Let `write` fill a temporary file, then rename it to `path`; an old file becomes `previous`.

    Raises InputError if the disk is full or the folder is read-only; the old file stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # so that the new name survives a power cut
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); "
                      f"correct that, then {resume_flag(path.parent)}")


def resume_flag(folder: Path) -> str:
    """The flag that continues the run in a folder, quoted for a shell."""
    return f"--resume {quote(str(folder))}"


def script_path(name: str) -> str:
    """A script as it is called where this process was started, quoted for a shell: it lies beside the script
    that was started or, where another program runs, beside this package."""
    beside = Path(sys.argv[0]).parent / name
    return quote(str(beside if beside.is_file() else os.path.relpath(Path(__file__).parents[2] / name)))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a folder's checkpoint; the last one becomes the previous one."""
    content = io.BytesIO()
    torch.save(state, content)
    content.write(SEAL + hashlib.sha256(content.getbuffer()).hexdigest().encode())
    write_atomically(folder / CHECKPOINT, lambda path: path.write_bytes(content.getbuffer()),
                     folder / PREVIOUS)


def load_checkpoint(path: str, sealed: bool = False) -> dict[str, Any]:
    """A checkpoint of save_checkpoint or, unless `sealed`, from elsewhere; its weights are under "model".

    Raises InputError for other files, and for a checkpoint of save_checkpoint in which a bit has changed.
    """
    try:
        content = Path(path).read_bytes()
        seal = len(SEAL) + 64
        if content[-seal:-64] == SEAL:
            content, digest = content[:-seal], content[-64:]
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise ValueError("its SHA-256 differs")
        elif sealed:
            raise ValueError("its end is missing")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint") from error
    except Exception as error:  # damaged bytes raise many kinds
        reason = brief(error)
        if "Weights only" in reason:
            reason = "more than tensors in it? save a state_dict"
        raise InputError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: not a checkpoint: expected a dictionary")
    name = next((name for name in NAMES if isinstance(state.get(name), dict)), None)
    return state | {"model": state[name]} if name else state if "model" in state else {"model": state}
