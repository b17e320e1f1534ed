"""Λ-DARTS: differentiable architecture search whose cells agree on which operations matter."""
from importlib.util import find_spec

if find_spec("fcntl") is None:
    raise ImportError("ldarts runs on Linux and macOS: Windows lacks fcntl, by which a run is locked; "
                      "use the Windows Subsystem for Linux (WSL) there")
from . import genotypes, spaces
from .alignment import layer_alignment
from .architect import Architect
from .errors import InputError
from .genotypes import Genotype
from .fused import mixed_sum
from .model import Network, NetworkImageNet, NetworkNAS201
from .model_search import SearchNetwork

__version__ = "0.1.0"
__all__ = ["Architect", "Genotype", "InputError", "Network", "NetworkImageNet", "NetworkNAS201",
           "SearchNetwork", "genotypes", "layer_alignment", "mixed_sum", "spaces"]
