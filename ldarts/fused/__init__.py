"""The engine: what `model_search` defines, computed faster. Its door is `takes` and `run_cells`.

    build, toolkit   compile and load csrc/
    mixed_sum        the weighted sum, on which the plain form is built too
    normalised_sum   a node as one sum of terms behind batch norms
    separable        the separable convolutions that leave a state
    cell             a cell by all of these

LDARTS_FUSED=off in the environment shuts the door: the plain form runs.
"""
from torch import Tensor

from .cell import run_cells
from .mixed_sum import compiled_for, mixed_sum

__all__ = ["compiled_for", "mixed_sum", "run_cells", "takes"]


def takes(x: Tensor) -> bool:
    """Whether the cells that read this tensor are computed by the engine."""
    return compiled_for(x.device.type)
