"""`SearchNetwork`, the supernet: every candidate operation on every edge, weighted by softmax(α)."""
from contextlib import contextmanager
from typing import Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .genotypes import Genotype, format_arch
from .mixed_sum import compiled_for, mixed_sum
from .operations import OPS, DilConv, FactorizedReduce, ReLUConvBN, ReLUFirst, ResNetBasicblock, SepConv, Zero, concat, relu
from .separable import Terms, Unit, bank, fan, node, normalise
from .spaces import get


def kept_columns(primitives: Sequence[Sequence[str]]) -> list[list[int]]:
    """Positions in the flattened [edges, ops] of every operation but `none`, which adds nothing to a sum, by edge."""
    width = len(primitives[0])
    return [[e * width + k for k, name in enumerate(names) if name != "none"] for e, names in enumerate(primitives)]


Product = tuple[Tensor, nn.BatchNorm2d | None]  # what an operation computes, and the norm that it ends in


def products(state: Tensor, edges: Sequence[Sequence[nn.Module]]) -> Iterator[list[Product]]:
    """(z, norm) of each operation but Zero on each edge that leaves a state, where op(state) is norm(z), or z.

    What depends on the state alone is computed once: the ReLU that most operations begin with, the pixels that reductions read,
    and the pools, of which one z serves every edge.
    """
    positive, pixels, pools = None, None, {}
    for edge in edges:
        found: list[Product] = []
        for op in edge:
            if isinstance(op, Zero):
                continue
            first, *rest = op if isinstance(op, nn.Sequential) else [op]
            if isinstance(first, (nn.AvgPool2d, nn.MaxPool2d)):
                if type(first) not in pools:
                    pools[type(first)] = first(state)
                found.append((pools[type(first)], rest[0] if rest else None))
                continue
            if isinstance(op, ReLUFirst) and positive is None:
                positive = relu(state)
            if isinstance(op, FactorizedReduce):
                pixels = op.pixels(positive) if pixels is None else pixels
                found.append((op.before_norm(pixels), op.bn))
            elif isinstance(op, ReLUFirst):
                found.append(op.product(positive))
            else:
                found.append((op(state), None))
        yield found


def leave(state: Tensor, edges: Sequence[Sequence[nn.Module]]) -> Iterator[list[Tensor]]:
    """The terms [op(state) for op in edge, but Zero] of each edge that leaves a state, one after the other; one z is normalised
    once, and its running statistics are those of every norm that it stands before."""
    normed: dict[int, tuple[Tensor, Tensor, nn.BatchNorm2d]] = {}
    for edge in products(state, edges):
        terms = []
        for z, norm in edge:
            if norm is None:
                terms.append(z)
            elif id(z) in normed:
                _, term, first = normed[id(z)]
                terms.append(term)
                if norm.training:
                    copy_buffers(norm, first)
            else:
                normed[id(z)] = z, norm(z), norm
                terms.append(normed[id(z)][1])
        yield terms


class Banks(NamedTuple):
    """What leaves a state, sorted for the operators of separable.py."""

    first: list[Unit]  # of the separable convolutions, then of the dilated ones
    second: list[Unit]  # of the separable convolutions
    seps: list[int]  # how many there are on each edge
    dils: list[int]
    others: list[list[nn.Module]]  # of each edge
    order: list[int]  # of the weights: positions of seps, dils and others among the operations of all edges but Zero


def banks_of(edges: Sequence[Sequence[nn.Module]]) -> Banks:
    edges = [[op for op in edge if not isinstance(op, Zero)] for edge in edges]
    ops = [op for edge in edges for op in edge]
    kinds = [SepConv if isinstance(op, SepConv) else DilConv if isinstance(op, DilConv) else None for op in ops]
    order = [k for kind in (SepConv, DilConv, None) for k, found in enumerate(kinds) if found is kind]
    seps, dils = ([op for op in ops if isinstance(op, kind)] for kind in (SepConv, DilConv))
    of_edge = [[sum(isinstance(op, kind) for op in edge) for edge in edges] for kind in (SepConv, DilConv)]
    others = [[op for op in edge if not isinstance(op, (SepConv, DilConv))] for edge in edges]
    return Banks([tuple(op.op[1:4]) for op in seps + dils], [tuple(op.op[5:8]) for op in seps], *of_edge, others, order)


def leave_by_banks(state: Tensor, banks: Banks, p: Tensor, p_first: bool) -> Iterator[list[Terms]]:
    """As `leave`, weighted: the terms p_k op_k(state) of each edge. p: in the order of the banks; p_first: see bank."""
    count = len(banks.second)
    p_seps, p_dils, p_others = p.split([count, len(banks.first) - count, len(p) - len(banks.first)])
    terms: list[list[Terms]] = [[] for _ in banks.others]

    def share_out(found: list[Terms], widths: Sequence[int]) -> None:
        for edge, one in zip([edge for edge, width in zip(terms, widths) if width], found, strict=True):
            edge.append(one)

    if banks.first:
        zs, table, found = bank([state], None, banks.first, p_dils, list(filter(None, banks.dils)), p_first)
        share_out(found, banks.dils)
    if count:
        found = bank(zs[:count], table[:count], banks.second, p_seps, list(filter(None, banks.seps)), p_first)[2]
        share_out(found, banks.seps)
    others = list(products(state, banks.others))
    places: dict[int, int] = {}
    edges = [[places.setdefault(id(z), len(places)) for z, _ in edge] for edge in others]
    norms: list[list[nn.BatchNorm2d]] = [[] for _ in places]
    for k, (_, norm) in zip(sum(edges, []), sum(others, [])):
        norms[k] += [norm] if norm is not None else []
    if places:
        z = list({id(z): z for edge in others for z, _ in edge}.values())
        share_out(fan(z, norms, list(filter(None, edges)), p_others), list(map(len, edges)))
    return iter(terms)


@torch.no_grad()
def copy_buffers(to: nn.Module, source: nn.Module) -> None:
    for old, new in zip(to.buffers(), source.buffers()):
        old.copy_(new)


class MixedOp(nn.Module):
    """The candidate operations of one edge, side by side; `mixed_sum` weighs them, a whole node at a time."""

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


class MixedOp201(nn.ModuleList):
    """The same in NAS-Bench-201, where the pool has no batch norm and the operations are the list itself."""

    def __init__(self, C: int, primitives: Sequence[str]):
        super().__init__(OPS[name](C, 1, False) for name in primitives)


class Cell(nn.Module):
    """A DARTS cell: two inputs, `steps` nodes with an edge from every earlier state, output [N, steps * C, H, W]."""

    def __init__(self, primitives: Sequence[Sequence[str]], C_prev_prev: int, C_prev: int, C: int, reduction: bool,
                 reduction_prev: bool, steps: int = 4):
        super().__init__()
        self.reduction, self.steps = reduction, steps
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C, affine=False)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        sources = [j for i in range(steps) for j in range(2 + i)]
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and j < 2 else 1, names) for j, names in zip(sources, primitives, strict=True))
        # Edges from state j go to the nodes from j - 1 on; those into node i begin at i (i + 3) / 2.
        leaving = [[i * (i + 3) // 2 + j for i in range(max(0, j - 1), steps)] for j in range(1 + steps)]
        self._edges = [[self._ops[e] for e in edges] for edges in leaving]
        self._banks = [banks_of(edges) for edges in self._edges]
        columns = [[column for e in edges for column in kept_columns(primitives)[e]] for edges in leaving]
        self.register_buffer("_kept", torch.tensor(sum(kept_columns(primitives), [])), persistent=False)
        self.register_buffer("_by_bank", torch.tensor([columns[j][k] for j, banks in enumerate(self._banks) for k in banks.order]),
                             persistent=False)

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, banks: bool = False, p_first: bool = False) -> Tensor:
        """s0, s1: ReLU of what the two cells before put out; banks: compute the same by the operators of separable.py."""
        before = (self.preprocess0, s0), (self.preprocess1, s1)
        states = [normalise(*op.product(s)) if banks else op.after_relu(s) for op, s in before]
        leaving, used = [], 0
        weights = weights.flatten()[self._by_bank if banks else self._kept]
        of_state = weights.split([len(b.order) for b in self._banks])
        for i in range(self.steps):
            for j in range(len(leaving), 2 + i):
                leaving.append(leave_by_banks(states[j], self._banks[j], of_state[j], p_first) if banks
                               else leave(states[j], self._edges[j]))
            terms = [term for edges in leaving for term in next(edges)]
            states.append(node(terms) if banks else mixed_sum(weights[used : used + len(terms)], terms))
            used += len(terms)
        return concat(*states[-self.steps :])


class NAS201Cell(nn.Module):
    """A searched cell of NAS-Bench-201: node i sums an edge from every earlier node; the last node is the output."""

    reduction = False

    def __init__(self, primitives: Sequence[Sequence[str]], C: int):
        super().__init__()
        names = iter(primitives)
        self.edges = nn.ModuleDict(
            {f"{i}<-{j}": MixedOp201(C, next(names)) for i in range(1, 4) for j in range(i)})
        leaving = [[f"{i}<-{j}" for i in range(j + 1, 4)] for j in range(3)]
        self._edges = [[self.edges[name] for name in names] for names in leaving]
        self._banks = [banks_of(edges) for edges in self._edges]
        positions, columns = {name: e for e, name in enumerate(self.edges)}, kept_columns(primitives)
        self.register_buffer("_kept", torch.tensor(sum(columns, [])), persistent=False)
        self.register_buffer("_by_bank", torch.tensor([column for names in leaving for name in names
                                                       for column in columns[positions[name]]]), persistent=False)

    def forward(self, x: Tensor, weights: Tensor, banks: bool = False, p_first: bool = False) -> Tensor:
        nodes, leaving, used = [x], [], 0
        weights = weights.flatten()[self._by_bank if banks else self._kept]
        of_state = weights.split([len(b.order) for b in self._banks])
        for i in range(1, 4):
            j = i - 1
            leaving.append(leave_by_banks(nodes[j], self._banks[j], of_state[j], p_first) if banks
                           else leave(nodes[j], self._edges[j]))
            terms = [term for edges in leaving for term in next(edges)]
            nodes.append(node(terms) if banks else mixed_sum(weights[used : used + len(terms)], terms))
            used += len(terms)
        return nodes[-1]


class SearchNetwork(nn.Module):
    """The supernet of a search space, with α initialised to 1e-3 · N(0, 1).

    C: channels of the first cell (a DARTS cell puts out four times as many); layers: cells, or in `nasbench201` cells a
    stage. Searched cells of one type share α: alphas_normal and alphas_reduce [14, ops], or arch_parameters [6, 5].
    state_dict keys are the original's, plus α. Raises InputError for an unknown space.
    """

    def __init__(self, C: int, num_classes: int, layers: int, space: str = "darts"):
        super().__init__()
        self.space = space
        self.primitives = get(space)
        if layers < 1 or C < 1:
            raise InputError(f"{layers} cells of {C} channels: both must be positive")
        if space != "nasbench201" and C % 2:
            raise InputError(f"{C} channels: must be even, the reduction cells split them in two")
        build = self._build_nasbench201 if space == "nasbench201" else self._build_darts
        build(C, num_classes, layers)

    def _build_darts(self, C: int, num_classes: int, layers: int) -> None:
        C_curr = 3 * C
        self.stem = nn.Sequential(nn.Conv2d(3, C_curr, 3, padding=1, bias=False), nn.BatchNorm2d(C_curr))
        self.cells = nn.ModuleList()
        C_prev_prev, C_prev, C_curr, reduction_prev = C_curr, C_curr, C, False
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            primitives = self.primitives.reduce if reduction else self.primitives.normal
            self.cells.append(Cell(primitives, C_prev_prev, C_prev, C_curr, reduction, reduction_prev))
            reduction_prev, C_prev_prev, C_prev = reduction, C_prev, 4 * C_curr
        self.classifier = nn.Linear(C_prev, num_classes)
        self.alphas_normal, self.alphas_reduce = (
            nn.Parameter(1e-3 * torch.randn(len(edges), len(edges[0])))
            for edges in (self.primitives.normal, self.primitives.reduce))

    def _build_nasbench201(self, C: int, num_classes: int, layers: int) -> None:
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        stages = [[NAS201Cell(self.primitives.normal, c) for _ in range(layers)] for c in (C, 2 * C, 4 * C)]
        self.cells = nn.ModuleList(
            [*stages[0], ResNetBasicblock(C, 2 * C), *stages[1], ResNetBasicblock(2 * C, 4 * C), *stages[2]])
        self.lastact = nn.Sequential(nn.BatchNorm2d(4 * C), nn.ReLU())
        self.classifier = nn.Linear(4 * C, num_classes)
        # Under the original's key, which is also the name of a method here: so not as an attribute.
        self._parameters["arch_parameters"] = nn.Parameter(1e-3 * torch.randn(6, len(self.primitives.normal[0])))

    def _alpha_names(self) -> tuple[str, ...]:
        return ("arch_parameters",) if self.space == "nasbench201" else ("alphas_normal", "alphas_reduce")

    def arch_parameters(self) -> list[nn.Parameter]:
        """α of each type of cell."""
        return [self._parameters[name] for name in self._alpha_names()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """w: every parameter but α."""
        return [p for name, p in self.named_parameters() if name not in self._alpha_names()]

    def searched_cells(self) -> list[nn.Module]:
        """The cells that α weighs, in order."""
        return [cell for cell in self.cells if not isinstance(cell, ResNetBasicblock)]

    def cell_weights(self) -> list[Tensor]:
        """p = softmax(α), [edges, ops] for each searched cell; cells of one type share one tensor."""
        p = [F.softmax(alpha, dim=-1) for alpha in self.arch_parameters()]
        return [p[cell.reduction] for cell in self.searched_cells()]

    def forward(self, x: Tensor, cell_weights: Sequence[Tensor] | None = None, p_first: bool = False) -> Tensor:
        """x [N, 3, H, W] -> logits [N, num_classes], with `cell_weights` in the place of cell_weights().

        p_first: a backward pass with create_graph will be asked for gradients by p alone, and need not compute those by w.
        """
        weights = iter(self.cell_weights() if cell_weights is None else cell_weights)
        x, states = self.stem(x), []
        banks = (self.training and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
                 and x.is_contiguous(memory_format=torch.channels_last) and compiled_for("cpu"))
        if self.space == "nasbench201":
            for cell in self.cells:
                x = cell(x) if isinstance(cell, ResNetBasicblock) else cell(x, next(weights), banks, p_first)
            x = self.lastact(x)
        else:
            for cell in self.cells:
                states = [*states[-1:], relu(x)]  # the first cell has the stem twice
                x = cell(states[0], states[-1], next(weights), banks, p_first)
        return self.classifier(x.mean((2, 3)))

    @torch.no_grad()
    def genotype(self) -> "Genotype | str":
        """The strongest operation of the two strongest incoming edges of each node, never `none`; in `nasbench201`
        the strongest operation of every edge, as the benchmark's arch string."""
        p = [F.softmax(alpha, dim=-1).tolist() for alpha in self.arch_parameters()]
        if self.space == "nasbench201":
            rows = iter(zip(p[0], self.primitives.normal))
            best = [[(max(zip(row, names), key=lambda o: o[0])[1], j) for j, (row, names) in zip(range(i), rows)] for i in range(1, 4)]
            return format_arch(best)
        concat = tuple(range(2, 6))
        return Genotype(derive(p[0], self.primitives.normal), concat, derive(p[1], self.primitives.reduce), concat)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, alpha in zip(self._alpha_names(), self.arch_parameters()):
            state_dict.setdefault(prefix + name, alpha.detach())  # the original keeps α outside its state_dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def derive(p: Sequence[Sequence[float]], primitives: Sequence[Sequence[str]]) -> tuple[tuple[str, int], ...]:
    """Two (operation, input state) for each node of a cell, the stronger edge first. p: [edges, ops]"""
    chosen, first, states = [], 0, 2
    while first < len(p):
        best = []  # (p of the strongest operation but `none`, its name) of each edge into this node
        for row, names in zip(p[first : first + states], primitives[first : first + states]):
            best.append(max(((value, name) for value, name in zip(row, names) if name != "none"), key=lambda o: o[0]))
        strongest = sorted(range(states), key=lambda j: -best[j][0])[:2]
        chosen += [(best[j][1], j) for j in strongest]
        first, states = first + states, states + 1
    return tuple(chosen)


def tracking_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]


@contextmanager
def frozen_statistics(norms: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    """Within, these batch norms in training mode normalise by their batch and leave their running statistics alone."""
    before = [norm.track_running_stats for norm in norms]
    for norm in norms:
        object.__setattr__(norm, "track_running_stats", False)  # Module's own looks for parameters first
    try:
        yield
    finally:
        for norm, tracked in zip(norms, before):
            object.__setattr__(norm, "track_running_stats", tracked)
