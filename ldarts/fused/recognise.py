"""What a module is, by its contents; the engine replaces only what is recognised here.

A block is recognised where it is a chain of PyTorch's own modules, of their exact types, that nobody has
hooked, patched or parametrised, whatever class holds them. A forward that does more than passing its input
through a chain is recognised by its code, that of the functions below: an edited one runs as it is written.
"""
import builtins
import dis
import os
import types
import weakref
from operator import itemgetter
from typing import Any, Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The types that the engine knows, and settings on which a result depends, beside parameters.
SETTINGS = {
    nn.Identity: itemgetter("training"),
    nn.ReLU: itemgetter("inplace"),
    nn.Conv2d: itemgetter("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: itemgetter("training", "eps", "momentum", "affine", "num_features"),
    nn.AvgPool2d: itemgetter("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
                             "divisor_override"),
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
}
WIRING = "_steps", "_multiplier", "max_nodes", "sources", "concat"  # what cells' forwards read beside modules
CALLING = "__call__", "_call_impl", "__getattr__", "__getattribute__"  # how modules call, find children


def pytorch() -> list[Callable]:
    """What PyTorch calls in a pass, as it is now: somebody may have replaced a part of it."""
    return [nn.Module.__call__, nn.Module._call_impl, nn.Conv2d._conv_forward,
            *(function for of_type in (*SETTINGS, nn.Sequential)
              for function in (of_type.__call__, of_type._call_impl, of_type.forward)),
            F.relu, F.conv2d, F.batch_norm, F.avg_pool2d, F.max_pool2d, torch.cat, torch.relu,
            torch.batch_norm]


def is_pytorchs(function: Callable) -> bool:
    """Whether a function is PyTorch's own: by its file, or where it is compiled by its module."""
    if code := getattr(function, "__code__", None):
        return code.co_filename.startswith(torch.__path__[0] + os.sep)
    return str(function.__module__).split(".")[0] == "torch"


AS_IMPORTED = [*filter(is_pytorchs, pytorch())]  # never what `pytorch` returns if a part was replaced before


# The forwards that the engine computes in another way.

def block(self, x):
    return self.op(x)


def factorized_reduce(self, x):
    x = self.relu(x)
    return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def zero(self, x):
    return x[:, :, :: self.stride, :: self.stride].mul(0.0)


def mixed_op(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


def nas201_edge(self, x, weights):
    return sum(w * op(x) for w, op in zip(weights, self, strict=True))


def cell(self, s0, s1, weights):
    states = [self.preprocess0(s0), self.preprocess1(s1)]
    offset = 0
    for _ in range(self._steps):
        s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
        offset += len(states)
        states.append(s)
    return torch.cat(states[-self._multiplier :], dim=1)


def nas201_cell(self, x, weights):
    nodes, p = [x], iter(weights)
    for i in range(1, self.max_nodes):
        nodes.append(sum(self.edges[f"{i}<-{j}"](nodes[j], next(p)) for j in range(i)))
    return nodes[-1]


def derived_cell(self, s0, s1, drop_prob):
    states = [self.preprocess0(s0), self.preprocess1(s1)]
    for first in range(0, len(self._ops), 2):
        states.append(self._edge(first, states, drop_prob) + self._edge(first + 1, states, drop_prob))
    return torch.cat([states[i] for i in self.concat], dim=1)


def derived_edge(self, k, states, drop_prob):
    op = self._ops[k]
    h = op(states[self.sources[k]])
    drops = isinstance(drop_prob, Tensor) or drop_prob > 0
    if self.training and drops and not isinstance(op, nn.Identity):
        h = drop_path(h, drop_prob)
    return h


def drop_path(x, drop_prob):
    keep = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=torch.float32).ge(drop_prob).to(x.dtype)
    return x * keep / (1.0 - drop_prob)


def derived_nas201_cell(self, x):
    ops, states = iter(self), [x]
    for _ in range(3):
        states.append(sum(next(ops)(state) for state in states))
    return states[-1]


def meaning(function: Callable) -> tuple | None:
    """A function's instructions, and what global names stand for in it, but for drop_path (see drop_path_of);
    None for a closure, or what is no plain function."""
    if not isinstance(function, types.FunctionType) or function.__closure__ or function.__defaults__:
        return None
    scope = vars(builtins) | function.__globals__

    def instructions(code: types.CodeType) -> Iterator[tuple]:
        for i in dis.get_instructions(code):
            if isinstance(i.argval, types.CodeType):
                yield i.opname, *instructions(i.argval)
            elif i.opname == "LOAD_GLOBAL" and i.argval != "drop_path":
                yield i.argval, id(scope.get(i.argval))
            else:
                yield i.opname, i.argval

    return function.__code__.co_varnames, *instructions(function.__code__)


def drop_path_of(of_type: type) -> Callable | None:
    """What `_edge` of a class calls by this name."""
    return getattr(getattr(of_type, "_edge", None), "__globals__", {}).get("drop_path")


KNOWN = {meaning(known): known.__name__
         for known in (block, factorized_reduce, zero, mixed_op, nas201_edge, cell, nas201_cell, derived_cell,
                       derived_edge, derived_nas201_cell, drop_path)}


class Unrecognised(Exception):
    """Why a module runs as it is: the name of its type, or that of a part, or more words."""

    def of(self, module: nn.Module) -> str:
        name, reason = type(module).__name__, str(self)
        return name if reason == name else f"{name} with {reason}"


class Halves(NamedTuple):
    """The ReLU and both convolutions of a FactorizedReduce, of [C_out / 2, C, 1, 1] and stride 2."""

    conv_1: nn.Conv2d
    conv_2: nn.Conv2d


Link = Halves | Callable[[Tensor], Tensor]  # of a chain: a module, or what calls one


class Reader:
    """Reads modules, and remembers what it has read, so that `unchanged` notices every change of it."""

    def __init__(self):
        self.read: list[tuple[weakref.ref, tuple]] = []

    def unchanged(self) -> bool:
        """About 1 µs a module."""
        return all((module := ref()) is not None and contents(module) == before for ref, before in self.read)

    def kind(self, module: nn.Module) -> str:
        """The name of a forward above, "leaf" for the types in SETTINGS, "sequential"; else Unrecognised."""
        of_type, own = type(module), module.__dict__
        name, children = of_type.__name__, own["_modules"]
        self.read.append((weakref.ref(module), contents(module)))
        if is_hooked(own):
            raise Unrecognised(f"a hook on {name}")
        patched = [attribute for attribute in own if callable(getattr(of_type, attribute, None))]
        patched += [child for child in children if child in own or hasattr(of_type, child)]
        if patched:
            raise Unrecognised(f"{patched[0]} of {name} patched")
        if of_type in SETTINGS:
            return "leaf"
        if of_type is nn.Sequential:
            return "sequential"
        kind = KNOWN.get(meaning(of_type.forward))
        if kind == "derived_cell" and KNOWN.get(meaning(of_type._edge)) != "derived_edge":
            kind = None
        if kind is None or any(getattr(of_type, how) is not getattr(nn.Module, how) for how in CALLING):
            raise Unrecognised(name)
        return kind

    def members(self, container: nn.Module) -> dict[str, nn.Module]:
        """Those of a ModuleList or ModuleDict."""
        of_type = type(container)
        if not any(of_type.__iter__ is known.__iter__ and of_type.__getitem__ is known.__getitem__
                   for known in (nn.ModuleList, nn.ModuleDict)):
            raise Unrecognised(of_type.__name__)
        self.read.append((weakref.ref(container), contents(container)))
        return container.__dict__["_modules"]

    def chain(self, module: nn.Module, kind: str | None = None) -> list[Link]:
        """Modules of which each reads the result of the one before; [] for the identity. kind: what `kind`
        has said of this one, if it was asked"""
        kind = kind or self.kind(module)
        children = module.__dict__["_modules"]
        if kind == "leaf":
            check_leaf(module)
            return [] if type(module) is nn.Identity else [module]
        if kind == "sequential":
            return [link for child in children.values() for link in self.chain(child)]
        if kind == "block":
            return self.chain(children["op"])
        if kind == "factorized_reduce":
            relu, conv_1, conv_2, norm = (self.chain(children[name])
                                          for name in ("relu", "conv_1", "conv_2", "bn"))
            if [type(link) for link in relu] != [nn.ReLU] or not is_1x1(*conv_1, 2) or not is_1x1(*conv_2, 2):
                raise Unrecognised("another ReLU or convolution")
            return [Halves(*conv_1, *conv_2), *norm]
        raise Unrecognised(f"the forward of {type(module).__name__}")


def contents(module: nn.Module) -> tuple[Any, ...]:
    """What the engine's result depends on, but for the values of parameters and buffers."""
    own, of_type = module.__dict__, type(module)
    parameters = own["_parameters"]
    shapes = parameters and [None if p is None else (type(p), p.shape) for p in parameters.values()]
    if of_type in SETTINGS:
        return of_type, len(own), "forward" in own, is_hooked(own), shapes, SETTINGS[of_type](own)
    functions = of_type.forward, getattr(of_type, "_edge", None), drop_path_of(of_type)
    code = [getattr(function, "__code__", None) for function in functions]
    wiring = [str(own.get(name)) for name in WIRING]
    return (of_type, of_type.__call__, functions, code, len(own), "forward" in own, own["training"],
            is_hooked(own), tuple(own["_modules"].items()), shapes, wiring)


def is_hooked(attributes: dict[str, Any]) -> bool:
    return bool(attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"] or attributes["_backward_pre_hooks"])


def check_leaf(module: nn.Module) -> None:
    """Raises Unrecognised for settings of which the engine does not know what they do."""
    of_type = type(module)
    if not {type(p) for p in module.parameters(recurse=False)} <= {nn.Parameter, Tensor}:
        raise Unrecognised("a weight of another type")
    if of_type is nn.ReLU and module.inplace:
        raise Unrecognised("an in-place ReLU")
    if of_type is nn.BatchNorm2d:
        if module.momentum is None or not module.training:
            raise Unrecognised("a BatchNorm2d in eval() or of momentum None")
        if not (module.weight is None) == (module.bias is None) == (not module.affine):
            raise Unrecognised("a BatchNorm2d of another scale or shift")


def is_1x1(conv: nn.Module, stride: int) -> bool:
    """Whether it is a product of each pixel with one matrix."""
    return (type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.stride == (stride, stride)
            and conv.padding == (0, 0) and conv.groups == 1 and conv.bias is None)
