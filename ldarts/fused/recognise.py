"""What a module is, by its contents; the engine replaces only what is recognised here.

A block is recognised where it is a chain of PyTorch's own modules, of their exact types, that nobody has
hooked, patched or parametrised, whatever class holds them. A forward that does more than passing its input
through a chain is recognised by its source, the functions below: an edited one runs as it is written.
"""
import ast
import functools
import inspect
import textwrap
import weakref
from operator import itemgetter
from typing import Any, Callable, NamedTuple

import torch
from torch import nn

# Settings on which a result depends, beside parameters. `training` is read of every module.
SETTINGS = {
    nn.Identity: (),
    nn.ReLU: ("inplace",),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "momentum", "affine", "num_features"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
}
SETTINGS_OF = {of_type: itemgetter(*names) for of_type, names in SETTINGS.items() if names}
FORWARD_OF = {of_type: of_type.forward for of_type in SETTINGS}


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


FORWARDS = block, factorized_reduce, zero, mixed_op, nas201_edge, cell, nas201_cell


@functools.cache
def source(function: Callable) -> str:
    """A function without its name, annotations and docstring; "" where it cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    tree.name, tree.returns = "", None
    for argument in tree.args.args:
        argument.annotation = None
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)


@functools.cache
def known_forward(function: Callable) -> str:
    """The name of the one of FORWARDS that this function is, or ""."""
    text = source(function)
    return next((known.__name__ for known in FORWARDS if source(known) == text), "")


class Unrecognised(Exception):
    """Why a module runs as it is."""


class Halves(NamedTuple):
    """The ReLU and both convolutions of a FactorizedReduce, of [C_out / 2, C, 1, 1] and stride 2."""

    conv_1: nn.Conv2d
    conv_2: nn.Conv2d


Link = nn.Module | Halves  # of a chain


class Reader:
    """Reads modules, and remembers what it has read, so that `unchanged` notices every change of it."""

    def __init__(self):
        self.read: list[tuple[weakref.ref, tuple]] = []

    def unchanged(self) -> bool:
        """About 1 µs a module."""
        return all((module := ref()) is not None and contents(module) == before
                   for ref, before in self.read)

    def kind(self, module: nn.Module) -> str:
        """The name of a forward above, "leaf" for the types in SETTINGS, "sequential"; else Unrecognised."""
        self.read.append((weakref.ref(module), contents(module)))
        of_type = type(module)
        if is_hooked(module.__dict__):
            raise Unrecognised(f"a hook on {of_type.__name__}")
        if "forward" in module.__dict__:
            raise Unrecognised(f"a patched forward of {of_type.__name__}")
        if of_type in SETTINGS and of_type.forward is FORWARD_OF[of_type]:
            return "leaf"
        if of_type is nn.Sequential:
            return "sequential"
        if name := known_forward(of_type.forward):
            return name
        raise Unrecognised(of_type.__name__)

    def members(self, container: nn.Module) -> list[nn.Module]:
        """Those of a ModuleList or ModuleDict."""
        self.read.append((weakref.ref(container), contents(container)))
        return list(container.__dict__["_modules"].values())

    def operation(self, module: nn.Module) -> list[Link] | None:
        """The chain of a candidate operation; None for `none`, which contributes nothing."""
        kind = self.kind(module)
        return None if kind == "zero" else self.chain_of(module, kind)

    def chain(self, module: nn.Module) -> list[Link]:
        """Modules of which each reads the result of the one before; [] for the identity."""
        return self.chain_of(module, self.kind(module))

    def chain_of(self, module: nn.Module, kind: str) -> list[Link]:
        """The same of a module whose kind has been read."""
        children = module.__dict__["_modules"]
        if kind == "leaf":
            check_leaf(module)
            return [] if type(module) is nn.Identity else [module]
        if kind == "sequential":
            return [link for child in children.values() for link in self.chain(child)]
        if kind == "block" and "op" in children:
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
    return (of_type, of_type.forward, len(own), own["training"], is_hooked(own),
            tuple(own["_modules"].values()),
            parameters and [None if p is None else p.shape for p in parameters.values()],
            SETTINGS_OF[of_type](own) if of_type in SETTINGS_OF else None)


def is_hooked(attributes: dict[str, Any]) -> bool:
    return bool(attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
                or attributes["_backward_hooks"] or attributes["_backward_pre_hooks"])


def check_leaf(module: nn.Module) -> None:
    """Raises Unrecognised for settings of which the engine does not know what they do."""
    of_type = type(module)
    if of_type is nn.ReLU and module.inplace:
        raise Unrecognised("an in-place ReLU")
    if of_type is nn.BatchNorm2d and (module.momentum is None or not module.training):
        raise Unrecognised("a BatchNorm2d of momentum None" if module.training else "a BatchNorm2d in eval()")
    if of_type in (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d) and not keeps_size(module):
        raise Unrecognised(f"a {of_type.__name__} of another size, ceil_mode or return_indices")


def keeps_size(module: nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d) -> bool:
    """Whether the result is one image of ceil(H / stride) x ceil(W / stride)."""
    kernel, padding, dilation = (two_numbers(getattr(module, name, 1))
                                 for name in ("kernel_size", "padding", "dilation"))
    return (not getattr(module, "ceil_mode", False) and not getattr(module, "return_indices", False)
            and all(k % 2 == 1 and p == d * (k - 1) // 2 for k, p, d in zip(kernel, padding, dilation)))


def is_1x1(conv: nn.Module, stride: int) -> bool:
    """Whether it is a product of each pixel with one matrix."""
    return (type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.stride == (stride, stride)
            and conv.groups == 1 and conv.bias is None)


def two_numbers(setting: int | str | tuple[int, int]) -> tuple[int, int] | str:
    """One number stands for both sides."""
    return (setting, setting) if isinstance(setting, int) else setting
