"""`SearchNetwork`, the supernet: every candidate operation on every edge, weighted by softmax(α).

What is computed, in plain terms (Liu et al., 2019, section 2). In `SearchNetwork.forward` is the door to
`fused`, which computes the same faster.
"""
from contextlib import contextmanager
from typing import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .errors import InputError
from .genotypes import Genotype, format_arch
from .operations import OPS, FactorizedReduce, ReLUConvBN, ResNetBasicblock, Zero
from .spaces import get


class MixedOp(nn.Module):
    """The candidate operations of one edge; the node it leads to sums them, weighted by p = softmax(α)."""

    def __init__(self, C: int, stride: int, primitives: Sequence[str]):
        super().__init__()
        self._ops = nn.ModuleList()
        for name in primitives:
            op = OPS[name](C, stride, False)
            if "pool" in name:  # so that every operation but the identity ends in a batch norm
                op = nn.Sequential(op, nn.BatchNorm2d(C, affine=False))
            self._ops.append(op)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._ops)


class SearchedCell(nn.Module):
    """What the two kinds of cell share: nodes, each with an edge from every state before it."""

    reduction = False
    preprocess: Sequence[nn.Module] = ()  # what turns the inputs into states
    outputs = 1  # the last nodes, which are put out side by side

    def connect(self, primitives: Sequence[Sequence[str]], inputs: int, edge: Callable) -> None:
        """edge: (number of the state it leaves, its operations) -> module; inputs: states before the nodes"""
        self.inputs = inputs
        self.nodes: list[list[nn.Module]] = []  # of each the edges into it, in the order of their states
        names = iter(primitives)
        while sum(map(len, self.nodes)) < len(primitives):
            self.nodes.append([edge(j, next(names)) for j in range(inputs + len(self.nodes))])
        connects = torch.tensor([name != "none" for edge in primitives for name in edge])
        self.register_buffer("_kept", connects.nonzero().flatten(), persistent=False)

    def add_nodes(self, states: list[Tensor], weights: Tensor) -> list[Tensor]:
        """Node = Σ_j Σ_k p_jk op_k(state j) over its edges j, their operations k. weights: p [edges, ops]"""
        p, used = weights.flatten()[self._kept], 0
        for edges in self.nodes:
            terms = [op(x) for x, edge in zip(states, edges) for op in edge if not isinstance(op, Zero)]
            states.append(fused.mixed_sum(p[used : used + len(terms)], terms))
            used += len(terms)
        return states


class Cell(SearchedCell):
    """A DARTS cell: two inputs, four nodes, output [N, 4 * C, H, W]."""

    def __init__(self, primitives: Sequence[Sequence[str]], C_prev_prev: int, C_prev: int, C: int,
                 reduction: bool, reduction_prev: bool):
        super().__init__()
        self.reduction = reduction
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.preprocess = self.preprocess0, self.preprocess1
        self.connect(primitives, 2, lambda j, names: MixedOp(C, 2 if reduction and j < 2 else 1, names))
        self.outputs = len(self.nodes)
        self._ops = nn.ModuleList(edge for edges in self.nodes for edge in edges)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        """s0, s1: what the two cells before put out; weights: p [edges, ops]"""
        states = self.add_nodes([self.preprocess0(s0), self.preprocess1(s1)], weights)
        return torch.cat(states[-self.outputs :], dim=1)


class NAS201Cell(SearchedCell):
    """A searched cell of NAS-Bench-201: one input, three nodes, the last of them the output, [N, C, H, W]."""

    def __init__(self, primitives: Sequence[Sequence[str]], C: int):
        super().__init__()
        # An edge is a plain list of operations, and its pool has no batch norm.
        self.connect(primitives, 1, lambda j, names: nn.ModuleList(OPS[name](C, 1, False) for name in names))
        self.edges = nn.ModuleDict({f"{i}<-{j}": edge for i, edges in enumerate(self.nodes, 1)
                                    for j, edge in enumerate(edges)})

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """weights: p [6, ops]"""
        return self.add_nodes([x], weights)[-1]


class SearchNetwork(nn.Module):
    """The supernet of a search space, with α initialised to 1e-3 · N(0, 1).

    C: channels of the first cell (a DARTS cell puts out four times as many); layers: cells, in nasbench201
    cells a stage. Cells of one type share α: alphas_normal, alphas_reduce [14, ops]; arch_parameters [6, 5].
    state_dict keys are the original's, plus α. Raises InputError for an unknown space.
    """

    def __init__(self, C: int, num_classes: int, layers: int, space: str = "darts"):
        super().__init__()
        self.space, self.primitives = space, get(space)
        in_201 = space == "nasbench201"
        if layers < 1 or C < 1 or (C % 2 and not in_201):
            raise InputError(f"{layers} cells of {C} channels: use one or more, in DARTS's cells an even C")
        self._alpha_names = ["arch_parameters"] if in_201 else ["alphas_normal", "alphas_reduce"]
        (self._build_nasbench201 if in_201 else self._build_darts)(C, num_classes, layers)
        for name, edges in zip(self._alpha_names, self.primitives):
            # Under the original's keys, of which one is also the name of a method: so not as an attribute.
            self._parameters[name] = nn.Parameter(1e-3 * torch.randn(len(edges), len(edges[0])))

    def _build_darts(self, C: int, num_classes: int, layers: int) -> None:
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, C_curr, reduction_prev = 3 * C, 3 * C, C, False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            primitives = self.primitives.reduce if reduction else self.primitives.normal
            self.cells.append(Cell(primitives, C_prev_prev, C_prev, C_curr, reduction, reduction_prev))
            reduction_prev, C_prev_prev, C_prev = reduction, C_prev, 4 * C_curr
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
        return [self._parameters[name] for name in self._alpha_names]

    def weight_parameters(self) -> list[nn.Parameter]:
        """w: every parameter but α."""
        return [p for name, p in self.named_parameters() if name not in self._alpha_names]

    def searched_cells(self) -> list[SearchedCell]:
        """The cells that α weighs, in order."""
        return [cell for cell in self.cells if isinstance(cell, SearchedCell)]

    def cell_weights(self) -> list[Tensor]:
        """p = softmax(α), [edges, ops] for each searched cell; cells of one type share one tensor."""
        p = [F.softmax(alpha, dim=-1) for alpha in self.arch_parameters()]
        return [p[cell.reduction] for cell in self.searched_cells()]

    def forward(self, x: Tensor, cell_weights: Sequence[Tensor] | None = None) -> Tensor:
        """x [N, 3, H, W] -> logits [N, num_classes], with `cell_weights` in the place of cell_weights()."""
        weights = iter(self.cell_weights() if cell_weights is None else cell_weights)
        run = fused.run_cells if fused.takes(x) else run_cells  # the door to the engine
        x = run(self.stem, self.cells, x, weights)
        return self.classifier(self.lastact(x).mean((2, 3)))

    def genotype(self) -> "Genotype | str":
        """The strongest operation but `none` of the two strongest edges into each node; in nasbench201 the
        strongest of every edge, as the benchmark's arch string."""
        p = [F.softmax(alpha.detach(), dim=-1).tolist() for alpha in self.arch_parameters()]
        if self.space == "nasbench201":
            rows = iter(zip(p[0], self.primitives.normal))
            return format_arch([[(strongest(*next(rows))[1], j) for j in range(i)] for i in range(1, 4)])
        normal, reduce = (derive(*of_type) for of_type in zip(p, self.primitives))
        return Genotype(normal, (2, 3, 4, 5), reduce, (2, 3, 4, 5))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, alpha in zip(self._alpha_names, self.arch_parameters()):
            state_dict.setdefault(prefix + name, alpha.detach())  # the original keeps α elsewhere
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def run_cells(stem: nn.Module, cells: Iterable[nn.Module], x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    """x through the stem and all cells, with the next of the weights for each that is searched."""
    before = x = stem(x)
    for cell in cells:
        if isinstance(cell, ResNetBasicblock):
            x = cell(x)
        else:
            before, x = x, cell(*[before, x][-cell.inputs :], next(weights))
    return x


def strongest(p: Sequence[float], names: Sequence[str], excluded: str = "") -> tuple[float, str]:
    """The largest p of an edge, and its operation."""
    return max((pair for pair in zip(p, names) if pair[1] != excluded), key=lambda pair: pair[0])


def derive(p: Sequence[Sequence[float]], primitives: Sequence[Sequence[str]]) -> tuple[tuple[str, int], ...]:
    """Two (operation, input state) for each node of a cell, the stronger edge first. p: [edges, ops]"""
    edges, chosen = list(zip(p, primitives)), []
    while edges:
        states = 2 + len(chosen) // 2  # those before this node, each with an edge into it
        best = [strongest(*edge, excluded="none") for edge in edges[:states]]
        order = sorted(range(states), key=lambda j: -best[j][0])[:2]
        chosen += [(best[j][1], j) for j in order]
        edges = edges[states:]
    return tuple(chosen)


@contextmanager
def frozen_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, the batch norms among these modules leave their running statistics alone in training mode."""
    norms = [module for module in modules if getattr(module, "track_running_stats", False)]
    for norm in norms:
        object.__setattr__(norm, "track_running_stats", False)  # Module's own looks for parameters first
    try:
        yield
    finally:
        for norm in norms:
            object.__setattr__(norm, "track_running_stats", True)
