"""A cell in training, channels-last: each node is one sum of normalised terms.

What is not recognised runs as its module says, in its place in the cell's order, and is added to its node.
"""
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from .leaving import Leaving, Operation, State, concat, groups_separable, outgoing_terms, run_chains
from .normalised_sum import Terms, node_sum
from .norms import constant, ones
from .recognise import KNOWN, Link, Reader, Unrecognised, drop_path_of, meaning

ON_A_CPU, ON_A_GPU = (torch.float32, torch.float64), (torch.float32, torch.float64, torch.bfloat16)
MOST_TERMS = 384  # that leave one state: kMaxNormed of csrc/norms.h


class ModuleTerm(NamedTuple):
    """What runs as its module says: an operation, or an edge, which weighs its operations itself."""

    module: nn.Module
    edge: int
    operation: int | None  # None: the whole edge

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        p = weights[self.edge]
        return self.module(x, p) if self.operation is None else p[self.operation] * self.module(x)


class Edge(NamedTuple):
    """An edge of a node, and what of it runs as its modules say; the rest is in the Leaving of its source."""

    source: int  # a state
    module_terms: list[ModuleTerm]
    identity: bool  # whose path is never dropped


class Plan:
    """How a module in training is computed, made of its registered modules."""

    def fits(self, *inputs: Tensor) -> bool:
        """Whether the engine can compute the module on these inputs: dtype, layout, dimensions."""
        return all(isinstance(x, Tensor) and x.dim() == 4 and x.numel() > 0 and x.dtype == inputs[0].dtype
                   and x.dtype in (ON_A_CPU if x.device.type == "cpu" else ON_A_GPU)
                   and x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


class ChainPlan(Plan):
    """A chain of PyTorch's own modules."""

    def __init__(self, chain: list[Link]):
        self.chain = chain

    def run(self, state_of: Callable[[Tensor], State], x: Tensor) -> Tensor:
        return run_chains([state_of(x)], [self.chain])[0]


class CellPlan(Plan):
    """A cell of the supernet.

    recognised: how many operations the engine computes; refusals: why it does not compute the others. Raises
    Unrecognised where the whole cell runs as it is.
    """

    derived = False

    def __init__(self, reader: Reader, blocks: Sequence[nn.Module], edges: Sequence[nn.Module],
                 sources: Sequence[Sequence[int]], outputs: Sequence[int], drop_path: Callable | None = None):
        """blocks: one for each input, before the nodes, or none; edges: node by node; sources: of each node
        the states that its edges read; outputs: the states whose concatenation is the cell's output;
        drop_path: that which the cell's edges call"""
        self.drop_path, self.drops_images = drop_path, KNOWN.get(meaning(drop_path)) == "drop_path"
        self.reader, self.recognised, self.refusals = reader, 0, []
        self.left: list[nn.Module] = []  # those that run as they are
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
        chains = [[*op.chain, op.norm] for of_state in leaving for edge in of_state for op in edge]
        elsewhere = {part for module in self.left for part in module.modules()}
        links = [link for chain in (*self.preprocess, *chains, elsewhere) for link in chain]
        norms = [link for link in links if type(link) is nn.BatchNorm2d]
        if len(norms) > len(set(norms)):
            raise Unrecognised("a norm used twice, whose running statistics depend on the order")
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
            return [lambda x: block(x)]

    def _operations_of(self, edge: int, module: nn.Module) -> tuple[list[Operation], list[ModuleTerm]]:
        """The recognised operations of an edge, and the others as terms of their modules."""
        try:
            modules = [module] if self.derived else self._candidates(module)
        except Unrecognised as reason:
            self._leave(module, reason)
            return [], [ModuleTerm(module, edge, None)]
        self.width = len(modules) if self.width is None else self.width
        if len(modules) != self.width:
            raise Unrecognised("edges of different numbers of operations")
        operations, module_terms = [], []
        for k, op in enumerate(modules):
            try:
                kind = self.reader.kind(op)
                if kind == "zero":
                    module_terms += [ModuleTerm(op, edge, k)] if self.derived else []
                    continue
                chain, norm = self.reader.chain(op, kind), None
                if chain and type(chain[-1]) is nn.BatchNorm2d and (self.derived or not chain[-1].affine):
                    *chain, norm = chain
                    self.eps = norm.eps if self.eps is None else self.eps
                    if norm.eps != self.eps:
                        raise Unrecognised("another eps than its neighbours'")
                operations.append(Operation(edge * self.width + k, chain, norm))
            except Unrecognised as reason:
                self._leave(op, reason)
                module_terms.append(ModuleTerm(op, edge, k))
        self.recognised += len(operations)
        return operations, module_terms

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

    def fits(self, *inputs: Tensor) -> bool:
        *states, weights = inputs
        return (Plan.fits(self, *states) and isinstance(weights, Tensor)
                and weights.shape == (self.edges, self.width or weights.shape[-1])
                and weights.dtype == torch.promote_types(states[0].dtype, torch.float32))

    def run(self, state_of: Callable[[Tensor], State], *inputs: Tensor) -> Tensor:
        """The cell's output, of its input states and p [edges, ops]."""
        *states, weights = inputs
        return self.output(state_of, states, weights)

    def output(self, state_of: Callable[[Tensor], State], states: Sequence[Tensor], weights: Tensor,
               drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """drop: called on the result of each edge that is no identity, in the order of the edges. Where it
        `drops_images` as the published one does, it is called on ones [N, 1, 1, 1] instead, which gives the
        factor of each image."""
        states = [*states]
        if self.preprocess:
            states = run_chains([state_of(x) for x in states], self.preprocess)
        plans = self.leaving[groups_separable(states[0])]
        columns = constant(tuple(k for plan in plans for k in plan.columns), torch.int64, weights.device)
        p = weights.flatten().index_select(0, columns).split([len(plan.columns) for plan in plans])
        leaving: list[Iterator[list[Terms]]] = []  # of each state the terms of its edges, node by node
        for node in self.nodes:
            for j in range(len(leaving), len(states)):
                leaving.append(iter(outgoing_terms(states[j], plans[j], p[j])))
            terms, factors, others = [], [], []
            for edge in node:
                of_edge, x = next(leaving[edge.source]), states[edge.source]
                of_modules = [term(x, weights) for term in edge.module_terms]
                dropped = drop is not None and not edge.identity
                if dropped and (of_modules or not self.drops_images):
                    others.append(drop(add_up(of_edge, of_modules)))
                    continue
                terms += of_edge
                others += of_modules
                if drop is not None and of_edge:
                    factor = x.new_ones(len(x), 1, 1, 1)
                    factors.append((drop(factor) if dropped else factor).flatten())
            node_output = add_up(terms, others, factors)
            states.append(node_output.contiguous(memory_format=torch.channels_last))
        states = [states[j] for j in self.outputs]
        return states[0] if len(states) == 1 else concat(*states)


class DerivedPlan(CellPlan):
    """A cell of a derived network: an operation an edge, whose p is 1, and paths that are dropped."""

    derived = True

    def fits(self, *inputs: Any) -> bool:
        """drop_prob has to be one number for all images, without a gradient."""
        one_number = all(not isinstance(p, Tensor) or p.dim() == 0 and not p.requires_grad
                         for p in inputs[self.inputs :])
        return one_number and Plan.fits(self, *inputs[: self.inputs])

    def run(self, state_of: Callable[[Tensor], State], *inputs: Any) -> Tensor:
        """The cell's output, of its input states and, if it drops paths, the probability to drop one."""
        states, drop_prob = inputs[: self.inputs], inputs[self.inputs :]
        drop = None
        if drop_prob and (isinstance(drop_prob[0], Tensor) or drop_prob[0] > 0):
            drop = lambda x: self.drop_path(x, *drop_prob)  # noqa: E731
        return self.output(state_of, states, ones(self.edges, states[0])[:, None], drop)


def add_up(terms: Sequence[Terms], others: Sequence[Tensor], factors: Sequence[Tensor] = ()) -> Tensor:
    """factors: of the terms of each edge, see node_sum; or none"""
    alike: dict[tuple, list[int]] = {}  # edges of one shape and dtype; PyTorch broadcasts the rest
    for k, of_edge in enumerate(terms):
        alike.setdefault((of_edge.placeholder.shape, of_edge.placeholder.dtype), []).append(k)
    parts = [node_sum([terms[k] for k in edges], [factors[k] for k in edges] if factors else None)
             for edges in alike.values()]
    parts += others
    return sum(parts[1:], parts[0])


def make_plan(module: nn.Module, reader: Reader) -> Plan:
    """Raises Unrecognised where the module has to run as it is."""
    kind, children = reader.kind(module), module.__dict__["_modules"]
    if kind in ("cell", "derived_cell"):
        blocks = [children["preprocess0"], children["preprocess1"]]
        edges = [*reader.members(children["_ops"]).values()]
    if kind == "cell":
        sources = [range(2 + i) for i in range(module._steps)]
        return CellPlan(reader, blocks, edges, sources, range(2 + module._steps)[-module._multiplier :])
    if kind == "derived_cell":
        sources = [module.sources[k : k + 2] for k in range(0, len(edges), 2)]
        return DerivedPlan(reader, blocks, edges, sources, module.concat, drop_path_of(type(module)))
    if kind == "nas201_cell":
        edges = reader.members(children["edges"])
        names = [f"{i}<-{j}" for i in range(1, module.max_nodes) for j in range(i)]
        return CellPlan(reader, [], [edges[name] for name in names],
                        [range(i) for i in range(1, module.max_nodes)], [module.max_nodes - 1])
    if kind == "derived_nas201_cell":
        return DerivedPlan(reader, [], [*reader.members(module).values()], [range(i) for i in (1, 2, 3)], [3])
    return ChainPlan(reader.chain(module, kind))
