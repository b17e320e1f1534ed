"""A cell in training, channels-last: each node is one sum of normalised terms.

What the operations that leave one state have in common is computed once: its ReLU, its pools, on a CPU all
its separable convolutions in one call. What is not recognised runs as its module says, in its place in the
cell's order, and is added to its node.
"""
from functools import cached_property
from itertools import repeat
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .normalised_sum import Copies, Terms, gamma_beta_of, node_sum, normalise, normalised_terms
from .norms import constant, ones
from .recognise import (SETTINGS, Halves, Link, Reader, Unrecognised, drop_path_of, is_1x1, known_forwards,
                        meaning)
from .separable import Pair, affine_of, pairs_of, separable_convolutions

ON_A_GPU = torch.float32, torch.float64, torch.bfloat16
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": ON_A_GPU, "meta": ON_A_GPU}
MOST_TERMS = 384  # that leave one state: kMaxNormed of csrc/norms.h


class Operation(NamedTuple):
    """A recognised operation of an edge: norm(chain(state)), or chain(state) where norm is None."""

    column: int  # of its weight in the flattened p [edges, ops]
    chain: list[Link]
    norm: nn.BatchNorm2d | None


class Whole(NamedTuple):
    """A link that runs as its module says."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x).contiguous(memory_format=torch.channels_last)


class ModuleTerm(NamedTuple):
    """What runs as its module says: an operation, or an edge, which weighs its operations itself."""

    module: nn.Module
    edge: int
    operation: int | None  # None: the whole edge


class Edge(NamedTuple):
    """How an edge is computed: its recognised operations by what leaves the source, beside these."""

    source: int  # a state
    module_terms: list[ModuleTerm]
    identity: bool  # whose path is never dropped


class Plan:
    """How a module in training is computed, made of its registered modules."""

    def fits(self, *inputs: Tensor) -> bool:
        """Whether the operators take these inputs of the module."""
        return all(isinstance(x, Tensor) and x.dim() == 4 and x.dtype in DTYPES.get(x.device.type, ())
                   and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


class ChainPlan(Plan):
    """A chain of PyTorch's own modules."""

    def __init__(self, chain: list[Link]):
        self.chain = chain

    def run(self, state_of: Callable[[Tensor], "State"], x: Tensor) -> Tensor:
        return run_chains([state_of(x)], [self.chain])[0]


class CellPlan(Plan):
    """A cell of the supernet.

    recognised: how many operations the engine computes; refusals: why it does not compute the others. Raises
    Unrecognised where the whole cell runs as it is.
    """

    derived = drops_images = False

    def __init__(self, reader: Reader, blocks: Sequence[nn.Module], edges: Sequence[nn.Module],
                 sources: Sequence[Sequence[int]], outputs: Sequence[int]):
        """blocks: one for each input, before the nodes, or none; edges: node by node; sources: of each node
        the states that its edges read; outputs: the states that are put out, side by side"""
        self.reader, self.recognised, self.refusals = reader, 0, []
        self.edges, self.width = len(edges), None  # the shape of p
        self.eps: float | None = None  # of all norms behind operations
        self.preprocess = [self._chain_of(block) for block in blocks]
        self.inputs, self.outputs = max(1, len(blocks)), outputs
        # Of each state, for each edge that leaves it, the recognised operations.
        leaving: list[list[list[Operation]]] = [[] for _ in range(self.inputs + len(sources))]
        self.nodes: list[list[Edge]] = []
        remaining = iter(enumerate(edges))
        for of_node in sources:
            self.nodes.append([])
            empty = True
            for source in of_node:
                if source not in range(self.inputs + len(self.nodes) - 1):
                    raise Unrecognised("an edge from no state before its node")
                number, module = next(remaining)
                operations, module_terms = self._operations_of(number, module)
                leaving[source].append(operations)
                self.nodes[-1].append(Edge(source, module_terms, isinstance(module, nn.Identity)))
                empty = empty and not operations and not module_terms
            if empty:
                raise Unrecognised("a node of `none` alone")
        if shares_norms(leaving, self.preprocess):
            raise Unrecognised("a norm in several places, whose statistics depend on their order")
        if any(len(sum(of_state, [])) > MOST_TERMS for of_state in leaving):
            raise Unrecognised(f"more than {MOST_TERMS} operations that leave one state")
        self.leaving = {grouped: [Leaving(of_state, grouped) for of_state in leaving]
                        for grouped in (True, False)}

    def _chain_of(self, block: nn.Module) -> list[Link]:
        """The chain of a block in front of the nodes, or the block as a whole."""
        try:
            return self.reader.chain(block)
        except Unrecognised as reason:
            self._leave(block, reason)
            return [Whole(block)]

    def _operations_of(self, edge: int, module: nn.Module) -> tuple[list[Operation], list[ModuleTerm]]:
        """The recognised operations of an edge, and the others as terms of their modules."""
        try:
            modules = self._candidates(module)
        except Unrecognised as reason:
            self._leave(module, reason)
            return [], [ModuleTerm(module, edge, None)]
        self.width = len(modules) if self.width is None else self.width
        if len(modules) != self.width:
            raise Unrecognised("edges of different numbers of operations")
        found, module_terms = [], []
        for k, op in enumerate(modules):
            try:
                chain = self.reader.operation(op)
                if chain is None:  # `none`
                    module_terms += [ModuleTerm(op, edge, k)] if self.derived else []
                    continue
                norm = None
                if chain and type(chain[-1]) is nn.BatchNorm2d and (self.derived or not chain[-1].affine):
                    *chain, norm = chain
                    self.eps = norm.eps if self.eps is None else self.eps
                    if norm.eps != self.eps:
                        raise Unrecognised("another eps than its neighbours'")
                found.append(Operation(edge * self.width + k, chain, norm))
            except Unrecognised as reason:
                self._leave(op, reason)
                module_terms.append(ModuleTerm(op, edge, k))
        self.recognised += len(found)
        return found, module_terms

    def _candidates(self, edge: nn.Module) -> Sequence[nn.Module]:
        """The operations of an edge."""
        kind = self.reader.kind(edge)
        if kind not in ("mixed_op", "nas201_edge"):
            raise Unrecognised(type(edge).__name__)
        return [*self.reader.members(edge if kind == "nas201_edge" else edge._ops).values()]

    def _leave(self, module: nn.Module, reason: Unrecognised) -> None:
        """Note that a module runs as it is."""
        name, why = type(module).__name__, str(reason)
        if any(getattr(part, "inplace", False) for part in module.modules()):
            raise Unrecognised(f"{name}, which may change a state in place")
        self.refusals.append(name if why == name else f"{name} with {why}")

    def fits(self, *inputs: Tensor) -> bool:
        *states, weights = inputs
        return (self.fits_states(states) and isinstance(weights, Tensor)
                and weights.shape == (self.edges, self.width or weights.shape[-1])
                and weights.dtype == torch.promote_types(states[0].dtype, torch.float32))

    def fits_states(self, states: Sequence[Tensor]) -> bool:
        return super().fits(*states) and len({x.dtype for x in states}) == 1

    def run(self, state_of: Callable[[Tensor], "State"], *inputs: Tensor) -> Tensor:
        """The cell's output, of its input states and p [edges, ops]."""
        *states, weights = inputs
        return self.output(state_of, states, weights, None)

    def output(self, state_of: Callable[[Tensor], "State"], states: Sequence[Tensor], weights: Tensor,
               drop: Callable[[Tensor], Tensor] | None) -> Tensor:
        """drop: called on the result of each edge that is no identity, in the order of the edges; or, if it
        `drops_images`, on a 1 for each image of it"""
        states = [*states]
        if self.preprocess:
            states = run_chains([state_of(x) for x in states], self.preprocess)
        plans = self.leaving[groups_separable(states[0])]
        columns = constant(tuple(k for plan in plans for k in plan.columns), torch.int64, weights)
        p = weights.flatten().index_select(0, columns).split([len(plan.columns) for plan in plans])
        leaving: list[Iterator[list[Terms]]] = []  # of each state the terms of its edges, node by node
        for node in self.nodes:
            for j in range(len(leaving), len(states)):
                leaving.append(iter(outgoing_terms(states[j], plans[j], p[j])))
            terms, factors, others = [], [], []
            for edge in node:
                of_edge, x = next(leaving[edge.source]), states[edge.source]
                of_modules = [module_term(term, x, weights[term.edge]) for term in edge.module_terms]
                dropped = drop is not None and not edge.identity
                if dropped and (of_modules or not self.drops_images):
                    others.append(drop(add_up(of_edge, of_modules)))
                    continue
                terms += of_edge
                others += of_modules
                if drop is not None and of_edge:
                    factor = x.new_ones(len(x), 1, 1, 1)
                    factors.append((drop(factor) if dropped else factor).flatten())
            node_output = add_up(terms, others, torch.stack(factors) if factors else None)
            states.append(node_output.contiguous(memory_format=torch.channels_last))
        states = [states[j] for j in self.outputs]
        return states[0] if len(states) == 1 else concat(*states)


class DerivedPlan(CellPlan):
    """A cell of a derived network: an operation an edge, whose p is 1, and paths that are dropped."""

    derived = True

    def __init__(self, reader: Reader, blocks: Sequence[nn.Module], edges: Sequence[nn.Module],
                 sources: Sequence[Sequence[int]], outputs: Sequence[int], drop_path: Callable | None):
        """drop_path: that which the cell's edges call"""
        super().__init__(reader, blocks, edges, sources, outputs)
        self.drop_path, self.drops_images = drop_path, meaning(drop_path) == known_forwards()["drop_path"]

    def _candidates(self, edge: nn.Module) -> Sequence[nn.Module]:
        return [edge]

    def fits(self, *inputs: Any) -> bool:
        """drop_prob has to be one number for all images, without a gradient."""
        one_number = all(not isinstance(p, Tensor) or p.dim() == 0 and not p.requires_grad
                         for p in inputs[self.inputs :])
        return one_number and self.fits_states(inputs[: self.inputs])

    def run(self, state_of: Callable[[Tensor], "State"], *inputs: Any) -> Tensor:
        """The cell's output, of its input states and, if it drops paths, the probability to drop one."""
        states, drop_prob = inputs[: self.inputs], (*inputs[self.inputs :], 0.0)[0]
        drop = None
        if isinstance(drop_prob, Tensor) or drop_prob > 0:
            def drop(x: Tensor) -> Tensor:
                return self.drop_path(x, drop_prob)
        return self.output(state_of, states, ones(self.edges, states[0])[:, None], drop)


def module_term(term: ModuleTerm, x: Tensor, p: Tensor) -> Tensor:
    """p: of the edge"""
    return term.module(x, p) if term.operation is None else p[term.operation] * term.module(x)


def add_up(terms: Sequence[Terms], others: Sequence[Tensor], factors: Tensor | None = None) -> Tensor:
    """factors: of the terms, see node_sum"""
    parts = [*([node_sum(terms, factors)] if terms else []), *others]
    return sum(parts[1:], parts[0])


def shares_norms(leaving: Sequence[Sequence[Sequence[Operation]]], chains: Sequence[Sequence[Link]]) -> bool:
    operations = [op for of_state in leaving for edge in of_state for op in edge]
    all_chains = [*chains, *([*op.chain, op.norm] for op in operations)]
    norms = [id(link) for chain in all_chains for link in chain if type(link) is nn.BatchNorm2d]
    return len(norms) > len(set(norms))


def make_plan(module: nn.Module, reader: Reader) -> Plan:
    """Raises Unrecognised where the module has to run as it is."""
    kind, children = reader.kind(module), module.__dict__["_modules"]
    if kind in ("cell", "derived_cell"):
        blocks, edges = [children["preprocess0"], children["preprocess1"]], reader.members(children["_ops"])
        if kind == "cell":
            last = 2 + module._steps
            return CellPlan(reader, blocks, [*edges.values()], [range(2 + i) for i in range(module._steps)],
                            range(last - module._multiplier, last))
        sources = [module.sources[k : k + 2] for k in range(0, len(edges), 2)]
        return DerivedPlan(reader, blocks, [*edges.values()], sources, module.concat,
                           drop_path_of(type(module)))
    if kind == "nas201_cell":
        edges = reader.members(children["edges"])
        names = [f"{i}<-{j}" for i in range(1, module.max_nodes) for j in range(i)]
        return CellPlan(reader, [], [edges[name] for name in names],
                        [range(i) for i in range(1, module.max_nodes)], [module.max_nodes - 1])
    if kind == "derived_nas201_cell":
        return DerivedPlan(reader, [], [*reader.members(module).values()], [range(i) for i in (1, 2, 3)], [3],
                           None)
    return ChainPlan(reader.chain_of(module, kind))


class Leaving:
    """The operations on the edges that leave a state, sorted by the way in which they are computed.

    separable (twice a depthwise and a pointwise convolution), dilated (once), others: of each edge a list;
    columns: those of all separable ones, then of all dilated ones, then of the others.
    """

    def __init__(self, edges: Sequence[Sequence[Operation]], grouped: bool):
        """grouped: whether separable convolutions are one call, else they are among the others"""
        self.separable: list[list[list[Pair]]] = []
        self.dilated: list[list[list[Pair]]] = []
        self.others: list[list[Operation]] = []
        columns: tuple[list[int], ...] = [], [], []
        stride = None
        for edge in edges:
            for kind in (self.separable, self.dilated, self.others):
                kind.append([])
            for op in edge:
                pairs = pairs_of(op.chain, op.norm) if grouped else []
                if pairs and stride is None:
                    stride = pairs[0].depthwise.stride
                if pairs and pairs[0].depthwise.stride == stride:
                    kind = 0 if len(pairs) == 2 else 1
                    (self.separable, self.dilated)[kind][-1].append(pairs)
                else:
                    kind = 2
                    self.others[-1].append(op)
                columns[kind].append(op.column)
        self.columns = sum(columns, [])


def groups_separable(x: Tensor) -> bool:
    """Whether the operators of csrc/separable.cpp are there; on a GPU the convolutions are cuDNN's."""
    return x.device.type == "cpu"


def outgoing_terms(state: Tensor, plan: Leaving, p: Tensor) -> list[list[Terms]]:
    """The terms p_k op_k(state) of each edge that leaves a state. p: in the order of plan.columns"""
    separable, dilated = (sum(kind, []) for kind in (plan.separable, plan.dilated))
    p_separable, p_dilated, p_others = p.split(
        [len(separable), len(dilated), len(p) - len(separable) - len(dilated)])
    terms: list[list[Terms]] = [[] for _ in plan.others]

    def share_out(of_edges: list[Terms], kind: Sequence[Sequence]) -> None:
        with_terms = [of_edge for of_edge, ops in zip(terms, kind) if ops]
        for of_edge, its_terms in zip(with_terms, of_edges, strict=True):
            of_edge.append(its_terms)

    if separable or dilated:
        pairs = [of_op[0] for of_op in separable + dilated]
        gamma_beta = gamma_beta_of([pair.norm for pair in pairs[len(separable) :]])
        first = separable_convolutions([state], None, pairs, p_dilated, widths_of(plan.dilated), gamma_beta)
        share_out(first.terms, plan.dilated)
    if separable:
        count = len(separable)
        affine = affine_of(first.rstd_mean[:count], gamma_beta_of([pair.norm for pair in pairs[:count]]))
        second_pairs = [of_op[1] for of_op in separable]
        gamma_beta = gamma_beta_of([pair.norm for pair in second_pairs])
        second = separable_convolutions(first.z[:count], affine, second_pairs, p_separable,
                                        widths_of(plan.separable), gamma_beta)
        share_out(second.terms, plan.separable)
    operations = sum(plan.others, [])
    if operations:
        readers = sum(type(op.chain[0]) is nn.ReLU for op in operations if op.chain) + 2  # two for the pixels
        results = run_chains([State(state, readers)] * len(operations), [op.chain for op in operations])
        places: dict[tuple[int, bool], int] = {}  # of each z, with and without a norm, in their order
        of_operation = [places.setdefault((id(z), op.norm is None), len(places))
                        for z, op in zip(results, operations)]
        zs = dict(zip(of_operation, results))
        norms: list[list[nn.BatchNorm2d]] = [[] for _ in places]
        for place, op in zip(of_operation, operations):
            norms[place] += [] if op.norm is None else [op.norm]
        remaining = iter(of_operation)
        edges = [[next(remaining) for _ in edge] for edge in plan.others if edge]
        share_out(normalised_terms([zs[k] for k in range(len(zs))], norms, edges, p_others,
                                   gamma_beta_of([op.norm for op in operations])), plan.others)
    return terms


def widths_of(edges: Sequence[Sequence]) -> list[int]:
    return [len(ops) for ops in edges if ops]


class State:
    """A tensor [N, C, H, W], and what chains that begin with it have in common."""

    def __init__(self, x: Tensor, readers: int = 0):
        """readers: unless 0, how often relu(x) is read at most; its gradients are then added up at once"""
        self.x, self.readers = x, readers
        self.pools: dict[tuple, Tensor] = {}

    @cached_property
    def relus(self) -> Iterator[Tensor]:
        y = relu(self.x)
        return iter(Copies.apply(y, self.readers)) if self.readers > 1 else repeat(y)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """What the two convolutions of a FactorizedReduce read."""
        return next(self.relus)[:, :, ::2, ::2].clone(), next(self.relus)[:, :, 1::2, 1::2].clone()

    def first(self, link: Link) -> Tensor:
        """link(x)"""
        if type(link) is nn.ReLU:
            return next(self.relus)
        if type(link) is Halves:
            return torch.cat([conv_1x1(x, conv.weight) for x, conv in zip(self.pixels, link)], dim=1)
        if type(link) in (nn.AvgPool2d, nn.MaxPool2d):
            key = type(link), str([getattr(link, name) for name in SETTINGS[type(link)]])
            if key not in self.pools:
                self.pools[key] = link(self.x)
            return self.pools[key]
        return apply(link, self.x)


def run_chains(states: Sequence[State], chains: Sequence[Sequence[Link]]) -> list[Tensor]:
    """Each chain's result from its state. Norms that several chains have come to are computed together."""
    values = [state.first(chain[0]) if chain else state.x for state, chain in zip(states, chains)]
    places = [1] * len(chains)
    while True:
        waiting: dict[tuple, list[int]] = {}  # for a norm, by what norms computed together have in common
        for i, chain in enumerate(chains):
            while places[i] < len(chain) and type(chain[places[i]]) is not nn.BatchNorm2d:
                values[i] = apply(chain[places[i]], values[i], chain[places[i] - 1])
                places[i] += 1
            if places[i] < len(chain):
                key = values[i].shape, values[i].dtype, chain[places[i]].eps
                waiting.setdefault(key, []).append(i)
        if not waiting:
            return values
        for together in waiting.values():
            results = normalise([values[i] for i in together], [chains[i][places[i]] for i in together])
            for i, result in zip(together, results):
                values[i] = result
                places[i] += 1


def apply(link: Link, x: Tensor, before: Link | None = None) -> Tensor:
    """link(x), x the result of the link before."""
    if type(link) is nn.ReLU:
        return relu(x)
    if type(link) is nn.BatchNorm2d:
        return normalise([x], [link])[0]
    if type(link) is Halves:
        return State(x).first(link)
    if is_1x1(link, 1) and type(before) is not nn.Conv2d:  # a separable convolution is cuDNN's
        return conv_1x1(x, link.weight)
    return link(x)


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
