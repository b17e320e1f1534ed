"""A cell in training, channels-last: each node is one sum of normalised terms.

What is not recognised runs as its module says, in its place in the cell's order, and is added to its node.
"""
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from .leaving import Leaving, Operation, State, concat, groups_separable, run_chains
from .normalised_sum import Terms, constant, node_sum, ones
from .recognise import KNOWN, Link, Reader, Unrecognised, drop_path_of, meaning
from .separable import pairs_of

ON_A_CPU, ON_A_GPU = (torch.float32, torch.float64), (torch.float32, torch.float64, torch.bfloat16)
MOST_TERMS = 384  # that leave one state: kMaxNormed of csrc/norms.h


class Edge(NamedTuple):
    """An edge of a node."""

    number: int
    source: int  # a state
    operations: list[Operation]  # that the engine computes
    modules: list[tuple[int | None, nn.Module]]  # the others, by number; None: the edge, which weighs its own
    zeros: list[nn.Module]  # `none`, which is left out of the sum
    identity: bool  # whose path is never dropped


def are_states(*inputs: Any) -> bool:
    """Whether the engine can compute with these: by dtype, layout, dimensions."""
    return all(isinstance(x, Tensor) and x.dim() == 4 and x.numel() > 0 and x.dtype == inputs[0].dtype
               and x.dtype in (ON_A_CPU if x.device.type == "cpu" else ON_A_GPU)
               and x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


class Plan:
    """How a module in training is computed. By itself: as the module says, for these reasons."""

    recognised = 0  # how many operations of a cell the engine computes

    def __init__(self, *refusals: str):
        """refusals: why it does not compute others"""
        self.refusals = [*refusals]

    def fits(self, *inputs: Any) -> bool:
        """Whether the engine can compute the module on these inputs."""
        return False


class ChainPlan(Plan):
    """A chain of PyTorch's own modules."""

    fits = staticmethod(are_states)

    def __init__(self, chain: list[Link]):
        super().__init__()
        self.chain = chain

    def run(self, state_of: Callable[[Tensor], State], x: Tensor) -> Tensor:
        return run_chains([state_of(x)], [self.chain])[0]


class CellPlan(Plan):
    """A cell of the supernet, or of a derived network: an operation an edge, whose p is 1, and paths that are
    dropped. Raises Unrecognised where the whole cell runs as it is."""

    def __init__(self, reader: Reader, blocks: Sequence[nn.Module], edges: Sequence[nn.Module],
                 sources: Sequence[Sequence[int]], outputs: Sequence[int], derived: bool = False,
                 drop_path: Callable | None = None):
        """blocks: one for each input, before the nodes, or none; edges: node by node; sources: of each node
        the states that its edges read; outputs: the states whose concatenation is the cell's output;
        drop_path: what the cell's edges call"""
        super().__init__()
        self.reader, self.derived, self.drop_path = reader, derived, drop_path
        self.drops_images = KNOWN.get(meaning(drop_path)) == "drop_path"
        self.left: list[nn.Module] = []  # those that run as they are
        self.edges, self.width = len(edges), None  # the shape of p
        self.eps: float | None = None  # of all norms behind operations
        self.preprocess = [self._chain_of(block) for block in blocks]
        self.inputs, self.outputs = max(1, len(blocks)), outputs
        self.nodes: list[list[Edge]] = []
        leaving: list[list[Operation]] = [[] for _ in range(self.inputs + len(sources))]
        remaining = iter(enumerate(edges))
        for of_node in sources:
            if any(source not in range(self.inputs + len(self.nodes)) for source in of_node):
                raise Unrecognised("an edge from no state before its node")
            node = [self._edge(source, *next(remaining)) for source in of_node]
            if not any(edge.operations or edge.modules for edge in node):
                raise Unrecognised("a node of `none` alone")
            self.nodes.append(node)
            for edge in node:
                leaving[edge.source] += edge.operations
        operations = sum(leaving, [])
        chains = [*self.preprocess, *([*op.chain, op.norm] for op in operations)]
        norms = [link for chain in chains for link in chain if type(link) is nn.BatchNorm2d]
        elsewhere = {part for module in self.left for part in module.modules()}
        if len(norms) > len(set(norms) - elsewhere):
            raise Unrecognised("a norm used twice, whose running statistics depend on the order")
        if max(map(len, leaving)) > MOST_TERMS:
            raise Unrecognised(f"more than {MOST_TERMS} operations that leave one state")
        self.recognised = len(operations)
        self.leaving = {grouped: [Leaving(of_state, grouped) for of_state in leaving]
                        for grouped in (True, False)}

    def _chain_of(self, block: nn.Module) -> list[Link]:
        """The chain of a block in front of the nodes, or the block as a whole."""
        try:
            return self.reader.chain(block)
        except Unrecognised as reason:
            self._leave(block, reason)
            return [lambda x: block(x)]

    def _edge(self, source: int, number: int, module: nn.Module) -> Edge:
        edge = Edge(number, source, [], [], [], isinstance(module, nn.Identity))
        try:
            modules = [module] if self.derived else self._candidates(module)
        except Unrecognised as reason:
            self._leave(module, reason)
            edge.modules.append((None, module))
            return edge
        if self.width not in (None, len(modules)):
            raise Unrecognised("edges of different numbers of operations")
        self.width = len(modules)
        for k, op in enumerate(modules):
            try:
                kind = self.reader.kind(op)
                if kind == "zero":
                    if self.derived:
                        edge.modules.append((k, op))
                    else:
                        edge.zeros.append(op)
                    continue
                chain, norm = self.reader.chain(op, kind), None
                is_normed = chain and type(chain[-1]) is nn.BatchNorm2d
                if is_normed and (self.derived or not chain[-1].affine) and self.eps in (None, chain[-1].eps):
                    *chain, norm = chain
                    self.eps = norm.eps
                column = number * self.width + k
                edge.operations.append(Operation(number, column, chain, norm, pairs_of(chain, norm)))
            except Unrecognised as reason:
                self._leave(op, reason)
                edge.modules.append((k, op))
        return edge

    def _candidates(self, edge: nn.Module) -> Sequence[nn.Module]:
        """The operations of an edge of the supernet."""
        kind = self.reader.kind(edge)
        if kind not in ("mixed_op", "nas201_edge"):
            raise Unrecognised(type(edge).__name__)
        return [*self.reader.members(edge if kind == "nas201_edge" else edge._ops).values()]

    def _leave(self, module: nn.Module, reason: Unrecognised) -> None:
        """Note that a module runs as it is."""
        if any(getattr(part, "inplace", False) for part in module.modules()):
            raise Unrecognised(f"{type(module).__name__}, which may change a state in place")
        self.left.append(module)
        self.refusals.append(reason.of(module))

    def fits(self, *inputs: Any) -> bool:
        states, others = inputs[: self.inputs], inputs[self.inputs :]
        if not are_states(*states):
            return False
        if self.derived:  # drop_prob has to be one number for all images, without a gradient
            return all(not isinstance(p, Tensor) or p.dim() == 0 and not p.requires_grad for p in others)
        return all(isinstance(p, Tensor) and p.shape == (self.edges, self.width or p.shape[-1])
                   and p.dtype == torch.promote_types(states[0].dtype, torch.float32) for p in others)

    def run(self, state_of: Callable[[Tensor], State], *inputs: Any) -> Tensor:
        """The cell's output, of its input states and p [edges, ops]; of a derived network, of the states and,
        if it drops paths, the probability to drop one.

        drop_path is called on the result of each edge that is no identity, in the order of the edges. Where
        it `drops_images` as the published one does, it is called on ones [N, 1, 1, 1] instead, which gives
        the factor of each image.
        """
        states, more = [*inputs[: self.inputs]], inputs[self.inputs :]
        weights = ones(self.edges, states[0])[:, None] if self.derived else more[0]
        drops = self.derived and more and (isinstance(more[0], Tensor) or more[0] > 0)
        if self.preprocess:
            states = run_chains([state_of(x) for x in states], self.preprocess)
        leaving = self.leaving[groups_separable(states[0])]
        columns = constant(tuple(k for of_state in leaving for k in of_state.columns), torch.int64,
                           weights.device)
        p = weights.flatten().index_select(0, columns).split([len(of_state.columns) for of_state in leaving])
        terms_of: list[dict[int, list[Terms]]] = []  # of each state those of its edges
        for node in self.nodes:
            for j in range(len(terms_of), len(states)):
                terms_of.append(leaving[j].terms(states[j], p[j]))
            terms, factors, others = [], [], []
            for edge in node:
                of_edge, x = terms_of[edge.source].pop(edge.number, []), states[edge.source]
                of_modules = [module(x, weights[edge.number]) if k is None
                              else weights[edge.number, k] * module(x) for k, module in edge.modules]
                dropped = drops and not edge.identity
                if dropped and (of_modules or not self.drops_images):
                    others.append(self.drop_path(add_up(of_edge, of_modules), *more))
                    continue
                terms += of_edge
                others += of_modules
                if drops and of_edge:
                    factor = x.new_ones(len(x), 1, 1, 1)
                    factors.append((self.drop_path(factor, *more) if dropped else factor).flatten())
            node_output = add_up(terms, others, factors)
            shapes = [shape_of_zero(zero, states[edge.source]) for edge in node for zero in edge.zeros]
            if any(shape != node_output.shape for shape in shapes):  # `none` broadcasts the others
                node_output = node_output.expand(torch.broadcast_shapes(node_output.shape, *shapes))
            states.append(node_output.contiguous(memory_format=torch.channels_last))
        states = [states[j] for j in self.outputs]
        return states[0] if len(states) == 1 else concat(*states)


def shape_of_zero(zero: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Of zero(x), which is not computed."""
    N, C, *sides = x.shape
    return N, C, *(len(range(0, side, zero.stride)) for side in sides)


def add_up(terms: Sequence[Terms], others: Sequence[Tensor], factors: Sequence[Tensor] = ()) -> Tensor:
    """factors: of the terms of each edge, see node_sum; or none"""
    alike: dict[tuple, list[int]] = {}  # edges of one shape and dtype; PyTorch broadcasts the rest
    for k, of_edge in enumerate(terms):
        alike.setdefault((of_edge.placeholder.shape, of_edge.placeholder.dtype), []).append(k)
    parts = [node_sum([terms[k] for k in edges], [factors[k] for k in edges if factors])
             for edges in alike.values()]
    parts += others
    return sum(parts[1:], parts[0])


def make_plan(module: nn.Module, reader: Reader) -> Plan:
    """Raises Unrecognised where the module has to run as it is."""
    kind, own, children = reader.kind(module), module.__dict__, module.__dict__["_modules"]
    if kind in ("cell", "derived_cell"):
        blocks = [children["preprocess0"], children["preprocess1"]]
        by_name = reader.members(children["_ops"])
        edges = [by_name[str(k)] for k in range(len(by_name))]  # in whatever order they were registered
    if kind == "cell":
        sources = [range(2 + i) for i in range(own["_steps"])]
        return CellPlan(reader, blocks, edges, sources, range(2 + own["_steps"])[-own["_multiplier"] :])
    if kind == "derived_cell":
        sources = [own["sources"][k : k + 2] for k in range(0, len(edges), 2)]
        return CellPlan(reader, blocks, edges, sources, own["concat"], True, drop_path_of(type(module)))
    if kind == "nas201_cell":
        by_name, sources = reader.members(children["edges"]), [range(i) for i in range(1, own["max_nodes"])]
        edges = [by_name[f"{i}<-{j}"] for i, of_node in enumerate(sources, 1) for j in of_node]
        return CellPlan(reader, [], edges, sources, [own["max_nodes"] - 1])
    if kind == "derived_nas201_cell":
        edges = [*reader.members(module).values()]
        return CellPlan(reader, [], edges, [range(i) for i in (1, 2, 3)], [3], derived=True)
    return ChainPlan(reader.chain(module, kind))
