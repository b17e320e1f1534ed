"""Λ-DARTS: differentiable architecture search whose cells agree on which operations matter."""
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
