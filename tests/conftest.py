"""Golden files: small cases computed in float64 by the published code (names as in its state_dict)."""
import collections
import json
import multiprocessing.forkserver
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")
GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One golden file: arrays by name as float64 (or int64) tensors, groups of them as dictionaries."""

    def __init__(self, name: str):
        self.arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, name: str) -> torch.Tensor:
        value = torch.as_tensor(self.arrays[name])
        return value.double() if value.is_floating_point() else value

    def group(self, name: str) -> dict[str, torch.Tensor]:
        names = json.loads(str(self.arrays[name + "/names"]))
        flat = self[name + "/values"]
        parts = flat.split([int(np.prod(shape)) for _, shape in names])
        return {key: part.view(shape) for (key, shape), part in zip(names, parts)}


@pytest.fixture(scope="session")
def golden():
    return Golden


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forks():
    """tests/processes.py and its server of one thread: a process that computed with more can't be forked."""
    multiprocessing.set_forkserver_preload(["pytest", "processes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (GOLDEN.parents[1], GOLDEN.parent))))
        multiprocessing.forkserver.ensure_running()
    import processes
    return processes


FIGURES = pytest.StashKey[collections.Counter]()


@pytest.fixture(scope="session")
def figures(request):
    """A Counter of what was done to the runs, printed at the end."""
    return request.config.stash.setdefault(FIGURES, collections.Counter())


def pytest_terminal_summary(terminalreporter, config):
    if path := os.environ.get("LDARTS_SKIPPED"):  # a file for their names, one a line, as pytest @FILE takes them
        skipped = dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", []))
        Path(path).write_text("".join(f"{name}\n" for name in skipped))
    if counts := config.stash.get(FIGURES, None):
        terminalreporter.write_line(", ".join(f"{count} {what}" for what, count in counts.items()))
