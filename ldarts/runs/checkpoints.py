"""Files that appear whole or not at all, and checkpoints, which end in their SHA-256."""
import contextlib
import hashlib
import io
import os
from pathlib import Path
from shlex import quote
from typing import Any, Callable

import torch

from ..errors import InputError, brief

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
NAMES = ("model", "state_dict", "net", "model_state_dict")  # under which weights lie in a file
SEAL = b"\nldarts-sha256:"  # then 64 digits, behind the zip archive, where torch.load does not look


def write_atomically(path: Path, write: Callable[[Path], None], previous: Path | None = None) -> None:
    """Let `write` fill a temporary file, then rename it to `path`; what is there becomes `previous`.

    Raises InputError when the disk is full or the folder can't be written to; what is there then stays.
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
        os.fsync(folder)  # or a power cut may take the renaming back
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror}); "
                      f"put that right, then {resume_flag(path.parent)}")


def resume_flag(folder: Path) -> str:
    """What continues the run in a folder, as a shell takes it."""
    return f"--resume {quote(str(folder))}"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a folder's checkpoint; the one before becomes its previous one."""
    content = io.BytesIO()
    torch.save(state, content)
    content.write(SEAL + hashlib.sha256(content.getbuffer()).hexdigest().encode())
    write_atomically(folder / CHECKPOINT, lambda path: path.write_bytes(content.getbuffer()),
                     folder / PREVIOUS)


def load_checkpoint(path: str, sealed: bool = False) -> dict[str, Any]:
    """A checkpoint of save_checkpoint, or unless `sealed` one from elsewhere; its weights are under "model".

    Raises InputError for anything else, and where a single bit of ours has changed.
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
    except Exception as error:  # torch.load raises whatever damaged bytes lead to
        reason = brief(error)
        if "Weights only" in reason:
            reason = "more than tensors in it? save a state_dict"
        raise InputError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path}: not a checkpoint: expected a dictionary")
    name = next((name for name in NAMES if isinstance(state.get(name), dict)), None)
    return state | {"model": state[name]} if name else state if "model" in state else {"model": state}
