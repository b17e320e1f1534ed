"""The files of a run folder. They appear whole or not at all; a checkpoint ends in its SHA-256."""
import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any, Iterator

import torch

from ..errors import InputError, brief

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
NAMES = ("model", "state_dict", "net", "model_state_dict")  # usual names of the weights in a file
SEAL = b"\nldarts-sha256:"  # then 64 digits; after the zip archive, so that torch.load ignores it


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a temporary file, then rename it to `path`; an old file becomes `previous`. If the disk is full
    or the folder is read-only, the old file stays and InputError is raised."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path, path.parent):
        try:
            partial.write_bytes(content)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some mounts of CIFS and FUSE can't
            os.fsync(folder)  # so that the new name survives a power cut
        os.close(folder)


@contextlib.contextmanager
def writing(what: str | Path, folder: Path) -> Iterator[None]:
    """Within, an OSError is raised as the InputError that `what` cannot be written. folder: of the run"""
    try:
        yield
    except OSError as error:
        begun = os.path.exists(folder / "config.json")
        remedy = f"; {resume_flag(folder)} continues the run" if begun else ", or choose another folder"
        raise InputError(f"{what}: cannot be written ({error.strerror}); correct that{remedy}") from error


def resume_flag(folder: str | Path) -> str:
    """The flag that continues the run in a folder, quoted for a shell."""
    return f"--resume {quote(str(folder))}"


def script_path(name: str) -> str:
    """A script's path for a command line, quoted for a shell: it lies beside the script that was started or,
    if another program was, beside this package."""
    beside = Path(sys.argv[0]).parent / name
    return quote(str(beside if beside.is_file() else os.path.relpath(Path(__file__).parents[2] / name)))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a folder's checkpoint; the last one becomes the previous one."""
    content = io.BytesIO()
    torch.save(state, content)
    content.write(SEAL + hashlib.sha256(content.getbuffer()).hexdigest().encode())
    write_atomically(folder / CHECKPOINT, content.getbuffer(), folder / PREVIOUS)


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """(the last whole checkpoint in a folder, None before the first one; what is wrong with a later one)"""
    damage = []
    for path in filter(Path.exists, (folder / CHECKPOINT, folder / PREVIOUS)):
        try:
            return load_checkpoint(path, sealed=True), "; ".join(damage)
        except InputError as error:
            damage.append(str(error))
    if damage:
        raise InputError("; ".join(damage) + "; no whole checkpoint is left, start again")
    return None, ""


def load_checkpoint(path: str | Path, sealed: bool = False) -> dict[str, Any]:
    """A checkpoint of save_checkpoint or, unless `sealed`, from elsewhere; its weights are under "model".
    Raises InputError for other files, and for a checkpoint of save_checkpoint in which a bit has changed."""
    try:
        content = Path(path).read_bytes()
        archive, seal, digest = content.rpartition(SEAL)
        if (seal or sealed) and hashlib.sha256(archive).hexdigest().encode() != digest:
            raise ValueError("its SHA-256 differs or is missing")
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
    weights = next((state[name] for name in NAMES if isinstance(state.get(name), dict)), state)
    return state | {"model": weights}


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a run. Raises InputError if there is none."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict) or "kind" not in config:
            raise ValueError("expected an object with a kind")
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no configuration of a run ({brief(error)}); "
                         "a run is a folder runs/<name>") from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The metrics of each finished epoch of a run."""
    file = Path(path, "metrics.jsonl")
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read ({brief(error)})") from error


def read_run(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(configuration, metrics of each epoch) of a run folder. Raises InputError if no epoch is finished."""
    config, metrics = read_config(path), read_metrics(path)
    if not metrics:
        raise InputError(f"{path}: no epoch of this run is finished yet")
    return config, metrics


def search_of(arch: str) -> str | None:
    """The folder of the search that --arch names, by itself or by its genotype.json."""
    path = Path(arch)
    folder = path.parent if path.name == "genotype.json" else path
    with contextlib.suppress(InputError):
        return str(folder) if read_config(folder)["kind"] == "search" else None


def unfinished(path: str | Path) -> str:
    """How far a run has come, as "1 of 50 epochs"; empty for a finished run."""
    done, epochs = len(read_metrics(path)), read_config(path).get("epochs")
    return f"{done} of {epochs} epochs" if isinstance(epochs, int) and done < epochs else ""
