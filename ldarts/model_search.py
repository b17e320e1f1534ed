"""`SearchNetwork`, the supernet: every candidate operation on every edge, weighted by p = softmax(α).

The equations in plain PyTorch (Liu et al., 2019, section 2). `SearchNetwork.forward` has the door to the
engine, `fused`, which computes the same faster.
"""
import warnings
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .errors import InputError
from .genotypes import ARCH, Genotype
from .operations import OPS, FactorizedReduce, ReLUConvBN, ResNetBasicblock
from .spaces import get


class MixedOp(nn.Module):
    """The candidate operations of one edge, weighted by p = softmax(α): Σ_k p_k op_k(x)."""

    def __init__(self, C: int, stride: int, primitives: Sequence[str]):
        super().__init__()
        self._ops = nn.ModuleList()
        for name in primitives:
            op = OPS[name](C, stride, False)
            if "pool" in name:  # so that every operation but the identity ends in a batch norm
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """weights: p of this edge [ops]"""
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class Cell(nn.Module):
    """A DARTS cell: two inputs, four nodes, output [N, 4 * C, H, W]; a reduction cell halves H and W."""

    def __init__(self, primitives: Sequence[Sequence[str]], C_prev_prev: int, C_prev: int, C: int,
                 reduction: bool, reduction_prev: bool, steps: int = 4, multiplier: int = 4):
        super().__init__()
        self.reduction, self._steps, self._multiplier = reduction, steps, multiplier
        self.preprocess0 = (FactorizedReduce(C_prev_prev, C, affine=False) if reduction_prev
                            else ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False))
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self._ops = nn.ModuleList()
        for i in range(steps):
            for j in range(2 + i):
                stride = 2 if reduction and j < 2 else 1
                self._ops.append(MixedOp(C, stride, primitives[len(self._ops)]))

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """s0, s1: the outputs of the two cells before; weights: p [edges, ops]"""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self._multiplier :], dim=1)


class NAS201Edge(nn.ModuleList):
    """The candidate operations of one edge in NAS-Bench-201: Σ_k p_k op_k(x). Its pool has no batch norm."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """weights: p of this edge [ops]"""
        return sum(w * op(x) for w, op in zip(weights, self, strict=True))


class NAS201Cell(nn.Module):
    """A searched cell of NAS-Bench-201: one input, three nodes, the last of them the output, [N, C, H, W]."""

    reduction = False

    def __init__(self, primitives: Sequence[Sequence[str]], C: int, max_nodes: int = 4):
        super().__init__()
        self.max_nodes = max_nodes
        self.edges = nn.ModuleDict()
        for i in range(1, max_nodes):
            for j in range(i):
                names = primitives[len(self.edges)]
                self.edges[f"{i}<-{j}"] = NAS201Edge(OPS[name](C, 1, False) for name in names)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """weights: p [6, ops]"""
        nodes, p = [x], iter(weights)
        for i in range(1, self.max_nodes):
            nodes.append(sum(self.edges[f"{i}<-{j}"](nodes[j], next(p)) for j in range(i)))
        return nodes[-1]


class SearchNetwork(nn.Module):
    """The supernet of a search space, with α initialised to 1e-3 · N(0, 1).

    C: channels of the first cell (a DARTS cell puts out four times as many); layers: cells, in nasbench201
    cells a stage. Cells of one type share α: alphas_normal, alphas_reduce [14, ops]; arch_parameters [6, 5].
    state_dict keys are the original's, plus α. Raises InputError for an unknown space.

    parameters() has w and α: give SGD weight_parameters(), or it steps α as well.
    """

    def __init__(self, C: int, num_classes: int, layers: int, space: str = "darts"):
        super().__init__()
        self.space, self.primitives = space, get(space)
        in_201 = space == "nasbench201"
        if layers < 1 or C < 1 or (C % 2 and not in_201):
            raise InputError(f"{layers} cells of {C} channels: use one or more, in DARTS's cells an even C")
        self.engine = fused.Engine()
        self._alpha_names = ["arch_parameters"] if in_201 else ["alphas_normal", "alphas_reduce"]
        (self._build_nasbench201 if in_201 else self._build_darts)(C, num_classes, layers)
        for name, edges in zip(self._alpha_names, self.primitives):
            # Not as attributes: one of the original's keys, arch_parameters, is also a method.
            self._parameters[name] = nn.Parameter(1e-3 * torch.randn(len(edges), len(edges[0])))

    def _build_darts(self, C: int, num_classes: int, layers: int) -> None:
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, reduction_prev = 3 * C, 3 * C, False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            primitives = self.primitives.reduce if reduction else self.primitives.normal
            self.cells.append(Cell(primitives, C_prev_prev, C_prev, C, reduction, reduction_prev))
            reduction_prev, C_prev_prev, C_prev = reduction, C_prev, 4 * C
        self.lastact, self.classifier = nn.Identity(), nn.Linear(C_prev, num_classes)

    def _build_nasbench201(self, C: int, num_classes: int, layers: int) -> None:
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        stages = [[NAS201Cell(self.primitives.normal, c) for _ in range(layers)] for c in (C, 2 * C, 4 * C)]
        self.cells = nn.ModuleList(
            [*stages[0], ResNetBasicblock(C, 2 * C), *stages[1], ResNetBasicblock(2 * C, 4 * C), *stages[2]])
        self.lastact = nn.Sequential(nn.BatchNorm2d(4 * C), nn.ReLU())
        self.classifier = nn.Linear(4 * C, num_classes)

    def arch_parameters(self) -> list[nn.Parameter]:
        """α of each type of cell."""
        parameters = self.__dict__.get("_former_parameters", self._parameters)  # the former: in DataParallel
        return [parameters[name] for name in self._alpha_names]

    def weight_parameters(self) -> list[nn.Parameter]:
        """w: every parameter but α."""
        return [p for name, p in self.named_parameters() if name not in self._alpha_names]

    def searched_cells(self) -> list[Cell | NAS201Cell]:
        """The cells whose operations α weighs, in order."""
        return [cell for cell in self.cells if isinstance(cell, (Cell, NAS201Cell))]

    def edge_weights(self) -> list[Tensor]:
        """p = softmax(α), [edges, ops] of each type of cell, for the cells, the genotype and the metrics, of
        which cell_shares (alignment.py) assumes a softmax."""
        return [F.softmax(alpha, dim=-1) for alpha in self.arch_parameters()]

    def cell_weights(self) -> list[Tensor]:
        """p, [edges, ops] for each searched cell; cells of one type share one tensor."""
        p = self.edge_weights()
        return [p[cell.reduction] for cell in self.searched_cells()]

    def forward(self, x: Tensor, cell_weights: Sequence[Tensor] | None = None) -> Tensor:
        """x [N, 3, H, W] -> logits [N, num_classes]. cell_weights: p of each searched cell; None: of α"""
        cell_weights = self.cell_weights() if cell_weights is None else cell_weights
        if len(cell_weights) != (count := len(self.searched_cells())):
            raise ValueError(f"{len(cell_weights)} cell_weights for {count} searched cells: one for each")
        weights = iter(cell_weights)
        run = self.engine.runner(x)  # the door to the engine: run(module, *inputs) is module(*inputs)
        before = x = run(self.stem, x)
        for cell in self.cells:
            if isinstance(cell, Cell):
                before, x = x, run(cell, before, x, next(weights))
            elif isinstance(cell, NAS201Cell):
                x = run(cell, x, next(weights))
            else:
                x = cell(x)
        return self.classifier(self.lastact(x).mean((2, 3)))

    def genotype(self) -> Genotype | str:
        """The strongest operation but `none` of the two strongest edges into each node; in nasbench201 the
        strongest of every edge, as the benchmark's arch string."""
        p = [of_type.tolist() for of_type in self.edge_weights()]
        if self.space == "nasbench201":
            return ARCH.format(*(strongest(*edge)[1]
                                 for edge in zip(p[0], self.primitives.normal, strict=True)))
        normal, reduce = (derive(*of_type) for of_type in zip(p, self.primitives, strict=True))
        return Genotype(normal, (2, 3, 4, 5), reduce, (2, 3, 4, 5))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        alphas = zip(self._alpha_names, self.arch_parameters())
        kept = {prefix + name: alpha.detach() for name, alpha in alphas if prefix + name not in state_dict}
        if kept:  # the original keeps α elsewhere
            warnings.warn(f"ldarts: these weights come without {' and '.join(kept)}: α stays as it was, and "
                          "genotype() reads α", stacklevel=5)
            state_dict.update(kept)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _set_drop_path_prob(self, value: float) -> None:
        if value:
            raise InputError(f"drop_path_prob = {value}: the supernet drops no paths; edit MixedOp.forward "
                             "for that")

    drop_path_prob = property(lambda self: 0.0, _set_drop_path_prob)


def strongest(p: Sequence[float], names: Sequence[str], excluded: str = "") -> tuple[float, str]:
    """The largest p of an edge, and its operation."""
    return max((pair for pair in zip(p, names, strict=True) if pair[1] != excluded), key=lambda pair: pair[0])


def derive(p: Sequence[Sequence[float]], primitives: Sequence[Sequence[str]]) -> tuple[tuple[str, int], ...]:
    """Two (operation, input state) for each node of a cell, the stronger edge first. p: [edges, ops]"""
    edges, chosen = list(zip(p, primitives, strict=True)), []
    while edges:
        states = 2 + len(chosen) // 2  # those before this node, each with an edge into it
        best = [strongest(*edge, excluded="none") for edge in edges[:states]]
        order = sorted(range(states), key=lambda j: -best[j][0])[:2]
        chosen += [(best[j][1], j) for j in order]
        edges = edges[states:]
    return tuple(chosen)
