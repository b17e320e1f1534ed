"""A cell as `model_search` defines it, with what its operations have in common computed once.

In training and channels-last a node is one sum of normalised terms, and on the CPU the separable convolutions
that leave a state are one call; elsewhere the operations are those of the cell, and the ReLU, the pools and
the pixels of reductions of a state are computed once for all edges that leave it.
"""
from functools import cache, cached_property
from itertools import repeat
from typing import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operations import DilConv, FactorizedReduce, ReLUConvBN, ResNetBasicblock, SepConv, Zero
from .mixed_sum import mixed_sum
from .normalised_sum import Copies, Terms, node_sum, normalise, normalised_terms
from .separable import separable_convolutions, takes

Product = tuple[Tensor, nn.BatchNorm2d | None]  # what an operation computes, and the norm that it ends in


ON_A_GPU = torch.float32, torch.float64, torch.bfloat16
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": ON_A_GPU, "meta": ON_A_GPU}


def run_cells(stem: nn.Module, cells: Iterable[nn.Module], x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    """The same as model_search.run_cells."""
    conv, norm = stem
    before = state = State(batch_norm(conv(x), norm))
    for cell in cells:
        if isinstance(cell, ResNetBasicblock):
            inner = State(batch_norm(*state.product(cell.conv_a)))
            state = State(cell.downsample(state.x) + batch_norm(*inner.product(cell.conv_b)))
        else:
            inputs = [before, state][-cell.inputs :]
            before, state = state, State(run_cell(cell, inputs, next(weights)))
    return state.x


def run_cell(cell: nn.Module, inputs: Sequence["State"], weights: Tensor) -> Tensor:
    """cell(*inputs, weights); cell: a SearchedCell of model_search."""
    states = (normalised_states if normalises(cell, inputs[0].x) else shared_states)(cell, inputs, weights)
    return states[-1] if cell.outputs == 1 else concat(*states[-cell.outputs :])


def normalises(module: nn.Module, x: Tensor) -> bool:
    """Whether the norms of this cell (or this norm) that read such an x are computed by normalised_sum."""
    return (module.training and x.dtype in DTYPES.get(x.device.type, ())
            and x.is_contiguous(memory_format=torch.channels_last))


def batch_norm(z: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """norm(z). PyTorch's own, channels-last on a CPU, sums all pixels in float32 one after the other."""
    return normalise([z], [norm])[0] if normalises(norm, z) else norm(z)


def normalised_states(cell: nn.Module, inputs: Sequence["State"], weights: Tensor) -> list[Tensor]:
    """All states of a cell, each node as one sum of normalised terms."""
    states = [state.x for state in inputs]
    if cell.preprocess:
        states = normalise(*zip(*(state.product(block) for block, state in zip(cell.preprocess, inputs))))
    plans = [Outgoing(cell.nodes, j, weights.shape[1], takes(states[0]))
             for j in range(len(states) + len(cell.nodes) - 1)]
    index = indices(tuple(k for plan in plans for k in plan.columns), weights.device)
    p = weights.flatten().index_select(0, index).split([len(plan.columns) for plan in plans])
    leaving: list[Iterator[list[Terms]]] = []  # of each state: its edges' terms, in the order of the nodes
    for _ in cell.nodes:
        for j in range(len(leaving), len(states)):
            leaving.append(iter(outgoing_terms(states[j], plans[j], p[j])))
        states.append(node_sum([terms for edges in leaving for terms in next(edges)]))
    return states


@cache  # a copy to the device is no part of a CUDA graph: made before its capture; also for training, as ones
@torch.inference_mode(False)
def indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


def shared_states(cell: nn.Module, inputs: Sequence["State"], weights: Tensor) -> list[Tensor]:
    """All states of a cell, by its own operations."""
    states = [State(state.term(block)) for block, state in zip(cell.preprocess, inputs)] or list(inputs)
    p, used = weights.flatten()[cell._kept], 0
    for edges in cell.nodes:
        terms = [state.term(op) for state, edge in zip(states, edges)
                 for op in edge if not isinstance(op, Zero)]
        states.append(State(mixed_sum(p[used : used + len(terms)], terms)))
        used += len(terms)
    return [state.x for state in states]


class State:
    """A state of a cell, and what depends on it alone."""

    def __init__(self, x: Tensor, readers: int = 0):
        """readers: unless 0, how often relu(x) is read at most; its gradients are then added up at once"""
        self.x, self.readers = x, readers
        self.pools: dict[type, Tensor] = {}
        self.normed: dict[type, tuple[Tensor, nn.BatchNorm2d]] = {}  # of the pools
        self.products: dict[nn.Module, Product] = {}

    @cached_property
    def _positives(self) -> Iterator[Tensor]:
        x = relu(self.x)
        return iter(Copies.apply(x, self.readers)) if self.readers else repeat(x)

    def positive(self) -> Tensor:
        """relu(x), for one more reader."""
        return next(self._positives)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """What the two convolutions of a FactorizedReduce read."""
        return self.positive()[:, :, ::2, ::2].clone(), self.positive()[:, :, 1::2, 1::2].clone()

    def add_products(self, ops: Sequence[SepConv]) -> None:
        """Those of some separable convolutions, the norms inside of which are normalised together."""
        if ops:
            inner = normalise([op.op[1:3](self.positive()) for op in ops], [op.op[3] for op in ops])
            self.products = {op: (op.op[5:7](relu(x)), op.op[7]) for op, x in zip(ops, inner)}

    def product(self, op: nn.Module) -> Product:
        """(z, norm), where op(x) is norm(z), or z without a norm."""
        if op in self.products:
            return self.products[op]
        pool, *norm = op if isinstance(op, nn.Sequential) else [op]
        if isinstance(pool, (nn.AvgPool2d, nn.MaxPool2d)):
            if type(pool) not in self.pools:
                self.pools[type(pool)] = pool(self.x)
            return self.pools[type(pool)], norm[0] if norm else None
        if isinstance(op, FactorizedReduce):
            halves = [conv_1x1(x, conv.weight) for x, conv in zip(self.pixels, (op.conv_1, op.conv_2))]
            return torch.cat(halves, dim=1), op.bn
        if isinstance(op, ReLUConvBN):
            conv = op.op[1]
            is_1x1 = conv.kernel_size == conv.stride == (1, 1)
            return conv_1x1(self.positive(), conv.weight) if is_1x1 else conv(self.positive()), op.op[2]
        if isinstance(op, (SepConv, DilConv)):
            return op.op[1:-1](self.positive()), op.op[-1]
        return op(self.x), None

    def term(self, op: nn.Module) -> Tensor:
        """op(x). A pool is normalised once; its running statistics are those of every norm behind it."""
        z, norm = self.product(op)
        if norm is None:
            return z
        if not isinstance(op, nn.Sequential):
            return norm(z)
        kind = type(op[0])
        if kind not in self.normed:
            self.normed[kind] = norm(z), norm
        elif norm.training:
            copy_buffers(norm, self.normed[kind][1])
        return self.normed[kind][0]


class Outgoing:
    """The operations on the edges that leave a state, sorted by the way in which they are computed.

    separable, dilated, others: lists of operations, one an edge; columns: the position of their weights in
    the flattened [edges, ops], of all separable ones, then of all dilated ones, then of the others.
    """

    def __init__(self, nodes: Sequence[Sequence[nn.Module]], state: int, width: int, as_one: bool):
        """nodes: for each the edges into it, one from every state before it; width: operations on an edge;
        as_one: whether separable convolutions are one call, else they are among the others"""
        self.separable, self.dilated, self.others = [], [], []
        columns: dict[int, list[int]] = {id(kind): [] for kind in (self.separable, self.dilated, self.others)}
        row = state  # of the edge from this state, among all edges
        for edges in nodes:
            if state < len(edges):
                for kind in (self.separable, self.dilated, self.others):
                    kind.append([])
                for k, op in enumerate(edges[state]):
                    if not isinstance(op, Zero):
                        kind = (self.separable if as_one and isinstance(op, SepConv) else
                                self.dilated if as_one and isinstance(op, DilConv) else self.others)
                        kind[-1].append(op)
                        columns[id(kind)].append(row * width + k)
            row += len(edges)
        self.columns = sum(columns.values(), [])


def outgoing_terms(state: Tensor, plan: Outgoing, p: Tensor) -> list[list[Terms]]:
    """The terms p_k op_k(state) of each edge that leaves a state. p: in the order of plan.columns"""
    separable, dilated = (sum(kind, []) for kind in (plan.separable, plan.dilated))
    p_separable, p_dilated, p_others = p.split(
        [len(separable), len(dilated), len(p) - len(separable) - len(dilated)])
    terms: list[list[Terms]] = [[] for _ in plan.others]

    def share_out(found: list[Terms], kind: Sequence[Sequence[nn.Module]]) -> None:
        with_terms = [of_edge for of_edge, ops in zip(terms, kind) if ops]
        for of_edge, one in zip(with_terms, found, strict=True):
            of_edge.append(one)

    if separable or dilated:
        first = separable_convolutions([state], None, [tuple(list(op.op)[1:4]) for op in separable + dilated],
                                       p_dilated, widths_of(plan.dilated))
        share_out(first.terms, plan.dilated)
    if separable:
        count, pairs = len(separable), [tuple(list(op.op)[5:8]) for op in separable]
        second = separable_convolutions(first.z[:count], first.rstd_mean[:count], pairs, p_separable,
                                        widths_of(plan.separable))
        share_out(second.terms, plan.separable)
    readers = [op for edge in plan.others for op in edge if isinstance(op, (SepConv, DilConv, ReLUConvBN))]
    shared = State(state, len(readers) + 2)  # two for the pixels of reductions
    shared.add_products([op for edge in plan.others for op in edge if isinstance(op, SepConv)])
    products = [[shared.product(op) for op in edge] for edge in plan.others]
    places: dict[int, int] = {}  # of each z in the order in which it is met
    edges = [[places.setdefault(id(z), len(places)) for z, _ in edge] for edge in products]
    if places:
        zs = list({id(z): z for edge in products for z, _ in edge}.values())
        norms: list[list[nn.BatchNorm2d]] = [[] for _ in zs]
        for (_, norm), place in zip(sum(products, []), sum(edges, [])):
            if norm is not None:
                norms[place].append(norm)
        share_out(normalised_terms(zs, norms, [edge for edge in edges if edge], p_others), plan.others)
    return terms


def widths_of(edges: Sequence[Sequence[nn.Module]]) -> list[int]:
    return [len(ops) for ops in edges if ops]


@torch.no_grad()
def copy_buffers(to: nn.Module, source: nn.Module) -> None:
    for old, new in zip(to.buffers(), source.buffers()):
        old.copy_(new)


class ReLU(torch.autograd.Function):
    """forward: relu(x). backward: 1[x > 0] G; its derivative by x is 0, and never a tensor of zeros."""

    @staticmethod
    def forward(ctx, x):
        result = F.relu(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0].detach(), 0)


class Concat(torch.autograd.Function):
    """forward: torch.cat of channels. backward: slices; their backward: a Concat, no sum of padded slices."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.sizes = [t.shape[1] for t in tensors]
        return torch.cat(tensors, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes, 1)


relu, concat = ReLU.apply, Concat.apply


def conv_1x1(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d(x, weight) for weights [out, in, 1, 1]; channels-last as a product of matrices, whose
    gradients of gradients copy nothing."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
