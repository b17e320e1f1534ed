"""Golden files: small cases computed in float64 by the published code (names as in its state_dict)."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "2")
GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One golden file: arrays by name as float64 (or int64) tensors, groups of named arrays as dictionaries."""

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
