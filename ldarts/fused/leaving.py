"""The operations that leave one state, as terms of the nodes that they lead to.

What they have in common is computed once: the state's ReLU, its pools, on a CPU all its separable
convolutions in one call.
"""
from collections import deque
from functools import cached_property
from itertools import repeat
from typing import Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .normalised_sum import Copies, Terms, normalise, normalised_terms, ones
from .recognise import SETTINGS, Halves, Link, is_1x1
from .separable import Pair, separable_convolutions


class Operation(NamedTuple):
    """A recognised operation of an edge: norm(chain(state)), or chain(state) where norm is None."""

    edge: int
    column: int  # of its weight in the flattened p [edges, ops]
    chain: list[Link]
    norm: nn.BatchNorm2d | None
    pairs: list[Pair]  # that it consists of: two (separable), one (dilated) or none (others)


class Leaving:
    """The operations that leave a state, those of an edge side by side, sorted by the way in which they are
    computed. columns: theirs, in this order"""

    def __init__(self, operations: Sequence[Operation], grouped: bool):
        """grouped: whether separable and dilated convolutions are two calls, or among the others"""
        stride = next((op.pairs[0].depthwise.stride for op in operations if op.pairs), None)
        self.by_pairs: list[list[Operation]] = [[], [], []]
        for op in operations:
            in_group = grouped and op.pairs and op.pairs[0].depthwise.stride == stride
            self.by_pairs[len(op.pairs) if in_group else 0].append(op)
        self.columns = [op.column for of_kind in self.by_pairs for op in of_kind]
        self.edges = {op.edge for op in operations}

    def terms(self, state: Tensor, p: Tensor) -> dict[int, list[Terms]]:
        """The terms p_k op_k(state) of each edge. p: in the order of `columns`"""
        others, dilated, separable = self.by_pairs
        p_others, p_dilated, p_separable = p.split([len(of_kind) for of_kind in self.by_pairs])
        parts, count = [], len(separable)
        if separable or dilated:
            pairs = [op.pairs[0] for op in separable + dilated]
            p_pairs = torch.cat([ones(count, p), p_dilated]) if separable else p_dilated
            edges = [op.edge for op in dilated]
            z, inner, terms = separable_convolutions([state], None, pairs, p_pairs, edges)
            parts.append(terms)
        if separable:
            pairs, edges = [op.pairs[1] for op in separable], [op.edge for op in separable]
            parts.append(separable_convolutions(z[:count], inner, pairs, p_separable, edges)[2])
        parts += terms_of_others(state, others, p_others)
        return {edge: [part[edge] for part in parts if edge in part] for edge in self.edges}


def groups_separable(x: Tensor) -> bool:
    """Whether the operators of csrc/separable.cpp are there; on a GPU the convolutions are cuDNN's."""
    return x.device.type == "cpu"


def terms_of_others(state: Tensor, operations: Sequence[Operation], p: Tensor) -> Iterator[dict[int, Terms]]:
    """The terms of each edge, for each shape and dtype of results: several in some forks.

    operations, p: those of an edge side by side
    """
    chains = [op.chain for op in operations]
    readers = sum(type(chain[0]) is nn.ReLU for chain in chains if chain) + 2  # two for the pixels
    results = run_chains([State(state, readers)] * len(chains), chains)
    kinds = [(z.shape, z.dtype) for z in results]
    for kind in dict.fromkeys(kinds):
        chosen = [k for k, its_kind in enumerate(kinds) if its_kind == kind]
        its_p = p if len(chosen) == len(results) else torch.stack([p[k] for k in chosen])
        of_edges: dict[int, list[tuple[Tensor, nn.BatchNorm2d | None]]] = {}
        for k in chosen:
            of_edges.setdefault(operations[k].edge, []).append((results[k], operations[k].norm))
        yield dict(zip(of_edges, normalised_terms([*of_edges.values()], its_p)))


class State:
    """A tensor [N, C, H, W], and what links that read it have in common."""

    def __init__(self, x: Tensor, readers: int = 0, before: Link | None = None):
        """readers: unless 0, how often relu(x) is read at most; its gradients are then added up at once;
        before: the link whose result x is"""
        self.x, self.readers, self.before = x, readers, before
        self.pools: dict[tuple, Tensor] = {}

    @cached_property
    def relus(self) -> Iterator[Tensor]:
        y = relu(self.x)
        return iter(Copies.apply(y, self.readers)) if self.readers > 1 else repeat(y)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """What the two convolutions of a FactorizedReduce read."""
        return next(self.relus)[:, :, ::2, ::2].clone(), next(self.relus)[:, :, 1::2, 1::2].clone()

    def apply(self, link: Link) -> Tensor:
        """link(x) of a link that is no norm."""
        if type(link) is nn.ReLU:
            return next(self.relus)
        if type(link) is Halves:
            return torch.cat([conv_1x1(x, conv.weight) for x, conv in zip(self.pixels, link)], dim=1)
        if type(link) in (nn.AvgPool2d, nn.MaxPool2d):
            key = type(link), str(SETTINGS[type(link)](vars(link)))
            if key not in self.pools:
                self.pools[key] = link(self.x)
            return self.pools[key]
        if is_1x1(link, 1) and type(self.before) is not nn.Conv2d:  # a separable convolution is cuDNN's
            return conv_1x1(self.x, link.weight)
        return link(self.x).contiguous(memory_format=torch.channels_last)


def run_chains(states: Sequence[State], chains: Sequence[Sequence[Link]]) -> list[Tensor]:
    """Each chain's result from its state. Norms that several chains have come to are computed together."""
    states, left = [*states], [deque(chain) for chain in chains]
    while True:
        waiting: dict[tuple, list[int]] = {}  # for a norm, by what norms computed together have in common
        for i, links in enumerate(left):
            while links and type(links[0]) is not nn.BatchNorm2d:
                link = links.popleft()
                states[i] = State(states[i].apply(link), before=link)
            if links:
                x = states[i].x
                waiting.setdefault((x.shape, x.dtype, links[0].eps), []).append(i)
        if not waiting:
            return [state.x for state in states]
        for together in waiting.values():
            results = normalise([states[i].x for i in together], [left[i].popleft() for i in together])
            for i, result in zip(together, results):
                states[i] = State(result)


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
    """F.conv2d(x, weight) for weights [out, in, 1, 1] and channels-last x."""
    # On AMD oneDNN's convolution takes half as long as MKL's product, with MKL's Intel kernels as long.
    # Few channels: see safe_layout in runs/derived.py.
    if (x.device.type, x.dtype) == ("cpu", torch.float32) and min(weight.shape[:2]) >= 16:
        return F.conv2d(x, weight).contiguous(memory_format=torch.channels_last)
    # A product of matrices: its gradients of gradients copy nothing, and the gradient by a weight in
    # channels-last has the strides of the weight.
    return F.linear(x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)
