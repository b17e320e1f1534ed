"""Reads run folders: the configuration, the metrics, how far a run has come."""
import json
from pathlib import Path
from typing import Any

from ..errors import InputError, brief


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a run. Raises InputError if there is none."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no configuration of a run ({brief(error)}); "
                         "a run is a folder runs/<name>") from error
    if not isinstance(config, dict) or "kind" not in config:
        raise InputError(f"{path}: no configuration of a run: expected an object with a kind")
    return config


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


def run_folder(arch: str) -> Path:
    """The folder of the run that --arch may name, by itself or by its genotype.json."""
    return Path(arch).parent if Path(arch).name == "genotype.json" else Path(arch)


def unfinished(path: str | Path) -> str:
    """How far a run has come, as "1 of 50 epochs"; empty for a finished run."""
    done, epochs = len(read_metrics(path)), read_config(path).get("epochs")
    return f"{done} of {epochs} epochs" if isinstance(epochs, int) and done < epochs else ""
