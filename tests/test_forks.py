"""What a fork changes in a network's blocks: the engine computes what the modules say, or steps aside.

A row is a change of a network that the engine has computed before, so that the change has to be noticed. The
network is then computed by the engine and as it is written, in training and evaluation.
"""
import contextlib
import functools
import gc
import math
import runpy
import types
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import ldarts
import train_search
from ldarts import fused, genotypes, model, model_search
from ldarts.architect import search_step
from ldarts.fused import compiled_for, recognise
from ldarts.fused.normalised_sum import normalise
from ldarts.operations import DilConv, FactorizedReduce, ReLUConvBN, SepConv
from ldarts.spaces import SPACES

needs_build = pytest.mark.skipif(not compiled_for("cpu"),
                                 reason="the extension is not compiled: no compiler here")


def every(net, of_type):
    return [m for cell in net.cells for m in cell.modules() if type(m) is of_type]


def some(modules):
    return modules[::3]


def set_all(modules, **settings):
    for module in modules:
        for name, value in settings.items():
            setattr(module, name, value)


def replace(net, of_type, make):
    """make(old) in the place of every module of a type in the cells."""
    for cell in net.cells:
        for parent in list(cell.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is of_type:
                    setattr(parent, name, make(child).double())


def append(net, of_type, make):
    replace(net, of_type, lambda old: nn.Sequential(old, make()))


def replace_norms(net, make):
    """By norms of random affine parameters, where they have any."""
    replace(net, nn.BatchNorm2d, lambda old: make(old.num_features))
    for cell in net.cells:
        for module in cell.modules():
            if getattr(module, "affine", False):
                nn.init.normal_(module.weight)


def affine_norms_between(net):
    for op in some(every(net, SepConv)):
        op.op[3] = nn.BatchNorm2d(op.op[3].num_features).double()
        nn.init.normal_(op.op[3].weight)
        nn.init.normal_(op.op[3].bias)


def as_class(net, old, new):
    for module in every(net, old):
        module.__class__ = new


def conv_like(old, kernel_size=None, **changed):
    kernel_size = kernel_size or old.kernel_size
    settings = dict(padding=old.padding, dilation=old.dilation, groups=old.groups, bias=False) | changed
    return nn.Conv2d(old.in_channels, old.out_channels, kernel_size, old.stride, **settings)


class SqueezeExcitation(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class GatedSepConv(SepConv):
    def forward(self, x):
        return self.op(x) * x.mean((1, 2, 3), keepdim=True).sigmoid()


class CalledSepConv(SepConv):
    def __call__(self, x):
        return super().__call__(x).tanh()


class OwnBlock(nn.Module):
    """A fork's own block of the usual pieces."""

    def __init__(self, C, stride):
        super().__init__()
        self.op = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, stride, 1, groups=C, bias=False),
                                nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C, affine=False))

    def forward(self, x):
        return self.op(x)


class DropPathEdge(model_search.MixedOp):
    def forward(self, x, weights):
        return F.dropout2d(super().forward(x, weights), 0.3, self.training)


class EdgeOfAnotherSum(model_search.MixedOp):
    """The same text, in a file where `sum` is another function."""

    forward = types.FunctionType(model_search.MixedOp.forward.__code__,
                                 {**vars(model_search), "sum": lambda terms: sum(terms).tanh()})


class ActivatedCell(model_search.Cell):
    def forward(self, s0, s1, weights):
        return torch.tanh(super().forward(s0, s1, weights))


class DoublingWeight(nn.Parameter):
    """Twice its values in convolutions, as a quantised weight stands for others."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            x, weight, *others = args
            return function(x, 2 * weight.as_subclass(torch.Tensor), *others, **kwargs or {})
        return super().__torch_function__(function, types, args, kwargs or {})


def another_kernel(conv):
    return conv_like(conv, 7, padding=3) if conv.kernel_size == (3, 3) and conv.groups > 1 else conv


def patch_forwards(net):
    for module in some(every(net, SepConv)):
        module.forward = types.MethodType(lambda self, x: self.op(x).tanh(), module)


def patch_convolutions(net):
    """As weight standardisation does."""
    def forward(self, x, weight, bias):
        return nn.Conv2d._conv_forward(self, x, weight - weight.mean(), bias)

    for module in some(every(net, nn.Conv2d)):
        module._conv_forward = types.MethodType(forward, module)


def share_norms(net):
    for edge in every(net, model_search.MixedOp):
        if isinstance(edge._ops[0], FactorizedReduce):
            edge._ops[0].bn = edge._ops[1].op[7]


def share_a_norm_with_an_own_operation(net):
    """Which the cell runs before the node of the recognised one."""
    norm = net.cells[0]._ops[5]._ops[2].op[7]
    net.cells[0]._ops[0]._ops[2] = nn.Sequential(nn.Tanh(), nn.Conv2d(4, 4, 1, bias=False), norm).double()


def three_as_stride(net):
    for module in net.cells[-1].modules():
        if getattr(module, "stride", None) in (2, (2, 2)):
            module.stride = 3 if module.stride == 2 else (3, 3)


def move_padding(net):
    """A pixel of it from one convolution of an operation to the other."""
    for first, second in ((op.op[1], op.op[5]) for op in every(net, SepConv) if op.op[1].stride == (1, 1)):
        first.padding, second.padding = ((first.padding[0] + d,) * 2 for d in (1, -1))


def oblong_dilation(net):
    for conv in (op.op[1] for op in every(net, DilConv)):
        conv.padding, conv.dilation = (conv.padding[0], conv.padding[0] // 2), (2, 1)


def hook_outputs(net):
    for module in some(every(net, nn.BatchNorm2d)):
        module.register_forward_hook(lambda module, inputs, output: output.tanh())


def hook_inputs(net):
    for module in some(every(net, nn.ReLU)):
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5,))


def hook_gradients(net):
    for module in some(every(net, nn.Conv2d)):
        module.register_full_backward_hook(lambda module, by_inputs, by_outputs: tuple(
            None if g is None else 2 * g for g in by_inputs))


def hook_gradients_of_outputs(net):
    for module in some(every(net, nn.Conv2d)):
        module.register_full_backward_pre_hook(lambda module, by_outputs: tuple(2 * g for g in by_outputs))


def share_weights(net):
    first, *others = (m for m in every(net, nn.Conv2d) if m.groups == m.in_channels == 4)
    for module in others:
        module.weight = first.weight


def freeze(modules):
    for module in modules:
        for p in module.parameters():
            p.requires_grad_(False)


def track_nothing(net):
    for module in some(every(net, nn.BatchNorm2d)):
        module.track_running_stats, module.running_mean, module.running_var = False, None, None


def larger_pools(net):
    """Two max pools of different kernels leave a state."""
    set_all(some(every(net, nn.MaxPool2d)), kernel_size=5, padding=2)


def add_dropout(net, place):
    for edge in every(net, model_search.MixedOp):
        edge._ops[place] = nn.Sequential(edge._ops[place], nn.Dropout(0.4))


def replace_an_edge(net):
    net.cells[0]._ops[3] = DropPathEdge(4, 1, ["skip_connect", "sep_conv_3x3"]).double()


def of_one_channel(net):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(4, 1, 3, 1, 1, bias=False),
                         nn.BatchNorm2d(1, affine=isinstance(net, ldarts.Network))).double()


def replace_an_operation(net):
    net.cells[0]._ops[1]._ops[1] = OwnBlock(4, 1).double()


class ScaledCell(model.Cell):
    def _edge(self, k, states, drop_prob):
        return 2 * super()._edge(k, states, drop_prob)


class ActivatedDerivedCell(model.Cell):
    def forward(self, s0, s1, drop_prob):
        return torch.tanh(super().forward(s0, s1, drop_prob))


def drop_channels(x, p):
    return x * torch.rand(len(x), x.shape[1], 1, 1, dtype=x.dtype).ge(p) / (1.0 - p)


class EdgeOfAnotherFile(model.Cell):
    """The same text, whose `drop_path` is another function."""

    _edge = types.FunctionType(model.Cell._edge.__code__, {**vars(model), "drop_path": drop_channels})


def resize_a_node(net, channels, stride, concat):
    """The first node of the first cell, which no other node reads."""
    cell = net.cells[0]
    for k in (0, 1):
        cell._ops[k] = SepConv(4, channels, 3, stride, 1, True).double()
    cell.sources[7], cell.concat = 0, concat


def other_paddings(net):
    """Even kernels, and 1x1 ones with a border: of 9x9 and 10x10 pixels between."""
    net.cells[0]._ops[0] = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 2, padding=1, groups=4, bias=False),
                                         nn.Conv2d(4, 4, 2, bias=False), nn.BatchNorm2d(4)).double()
    net.cells[0]._ops[1] = nn.Sequential(nn.MaxPool2d(2, 1, 1), nn.AvgPool2d(2, 1), nn.BatchNorm2d(4)).double()
    net.cells[0]._ops[2] = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1, padding=1, bias=False),
                                         nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)).double()


def register_again(net):
    for cell in net.cells:
        cell._ops.add_module("3", cell._ops._modules.pop("3"))  # now the last of the dict


def outputs_as_tensors(net):
    for outputs in ((2, 3, 4, 5), (5, 4, 3, 2)):
        set_all(net.cells, concat=torch.tensor(outputs))
        net(images(1))


class CellOfAProperty(model.Cell):
    outputs = 2, 3, 4, 5
    concat = property(lambda self: self.outputs, lambda self, value: None)


def outputs_by_a_property(net):
    for cell in net.cells:
        del cell.concat
    as_class(net, model.Cell, CellOfAProperty)
    net(images(1))
    set_all(net.cells, outputs=(5, 4, 3, 2))
    net(images(1))
    set_all(net.cells, outputs=(4, 3, 5, 2))


def global_pools(net):
    """On the edges into the second node, beside `none`, which gives it its size."""
    for cell, size in zip(net.searched_cells(), (8, 4, 2)):
        for edge in (cell.edges["2<-0"], cell.edges["2<-1"]):
            for k in range(1, len(edge)):
                edge[k] = nn.AvgPool2d(size)


def random_norms(net):
    """γ and β as after some training."""
    for norm in every(net, nn.BatchNorm2d):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)


CHANGES = {  # what a fork does -> the space, the change
    "nothing": ("darts", lambda net: None),
    "nothing, nasbench201": ("nasbench201", lambda net: None),
    "nothing, s1": ("s1", lambda net: None),
    "nothing, s4": ("s4", lambda net: None),
    "SiLU": ("s3", lambda net: replace(net, nn.ReLU, lambda old: nn.SiLU())),
    "GELU": ("s3", lambda net: replace(net, nn.ReLU, lambda old: nn.GELU())),
    "LeakyReLU": ("nasbench201", lambda net: replace(net, nn.ReLU, lambda old: nn.LeakyReLU())),
    "ReLU6 in some": ("s3", lambda net: [setattr(op.op, "4", nn.ReLU6())
                                         for op in some(every(net, SepConv))]),
    "ReLU in place": ("s3", lambda net: set_all([op.op[4] for op in every(net, SepConv)], inplace=True)),
    "bias": ("s3", lambda net: replace(net, nn.Conv2d, lambda old: conv_like(old, bias=True))),
    "bias, nasbench201": ("nasbench201",
                          lambda net: replace(net, nn.Conv2d, lambda old: conv_like(old, bias=True))),
    "circular padding": ("s3", lambda net: set_all(some(every(net, nn.Conv2d)), padding_mode="circular")),
    "another kernel": ("s3", lambda net: replace(net, nn.Conv2d, another_kernel)),
    "affine norms": ("s3", lambda net: replace_norms(net, nn.BatchNorm2d)),
    "affine norms between convolutions": ("darts", affine_norms_between),
    "instance norms": ("s3", lambda net: replace_norms(net, nn.InstanceNorm2d)),
    "tracking instance norms": ("nasbench201", lambda net: replace_norms(
        net, partial(nn.InstanceNorm2d, track_running_stats=True))),
    "group norms": ("s3", lambda net: replace_norms(net, partial(nn.GroupNorm, 2))),
    "SyncBatchNorm": ("s3", lambda net: replace_norms(net, partial(nn.SyncBatchNorm, affine=False))),
    "another eps in some": ("s3", lambda net: set_all(some(every(net, nn.BatchNorm2d)), eps=0.1)),
    "another momentum in some": ("s1", lambda net: set_all(
        some(every(net, nn.BatchNorm2d)), momentum=0.5)),
    "momentum None": ("s3", lambda net: set_all(some(every(net, nn.BatchNorm2d)), momentum=None)),
    "momenta as tensors": ("s3", lambda net: set_all(
        some(every(net, nn.BatchNorm2d)), momentum=torch.tensor(0.5))),
    "untracked norms": ("s3", track_nothing),
    "norms in eval()": ("s3", lambda net: [m.eval() for m in some(every(net, nn.BatchNorm2d))]),
    "a subclass of SepConv": ("s3", lambda net: as_class(net, SepConv, GatedSepConv)),
    "an own block": ("s3", lambda net: replace(net, SepConv, lambda op: OwnBlock(
        op.op[1].in_channels, op.op[1].stride))),
    "a patched forward": ("s3", patch_forwards),
    "a hook on outputs": ("s3", hook_outputs),
    "a hook on inputs": ("s1", hook_inputs),
    "a hook on gradients": ("s3", hook_gradients),
    "a module behind convolutions": ("s3", lambda net: append(net, SepConv, SqueezeExcitation)),
    "a module behind pools": ("s1", lambda net: append(net, nn.MaxPool2d, SqueezeExcitation)),
    "a module behind reductions": ("s3", lambda net: append(net, FactorizedReduce, nn.Tanh)),
    "a module behind dilated convolutions": ("s1", lambda net: append(net, DilConv, nn.Tanh)),
    "pools of two sizes": ("s1", larger_pools),
    "pools that count their padding": ("s1", lambda net: set_all(
        some(every(net, nn.AvgPool2d)), count_include_pad=True)),
    "shared weights": ("s3", share_weights),
    "frozen weights": ("s3", lambda net: freeze(some(every(net, nn.Conv2d)))),
    "a frozen stem": ("s3", lambda net: freeze([net.stem])),
    "weight norm": ("s3", lambda net: [parametrizations.weight_norm(m) for m in some(every(net, nn.Conv2d))]),
    "pruned weights": ("s3", lambda net: [prune.random_unstructured(m, "weight", 0.5)
                                          for m in some(every(net, nn.Conv2d))]),
    "a patched convolution": ("s3", patch_convolutions),
    "norms of a scale of their own": ("s3", lambda net: set_all(
        some([m for m in every(net, nn.BatchNorm2d) if m.num_features == 4]),
        weight=nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]).double()))),
    "one norm for several operations": ("s2", share_norms),
    "one norm for an own operation, too": ("s3", share_a_norm_with_an_own_operation),
    "weights of an own type": ("s3", lambda net: [setattr(m, "weight", DoublingWeight(m.weight.data))
                                                  for m in some(every(net, nn.Conv2d))]),
    "a stride of three": ("s4", three_as_stride),
    "paddings that make up for each other": ("s3", move_padding),
    "an oblong dilation": ("s1", oblong_dilation),
    "an operation of one channel": ("s3", lambda net: net.cells[0]._ops[1]._ops.__setitem__(
        2, of_one_channel(net))),
    "fewer nodes": ("s3", lambda net: set_all(net.cells[:1], _steps=3)),
    "integers as settings": ("s3", lambda net: set_all([op.op[5] for op in every(net, SepConv)], stride=1)),
    "an edge registered again": ("s3", register_again),
    "`none` beside global pools": ("nasbench201", global_pools),
    "another edge": ("s2", replace_an_edge),
    "another operation": ("s2", replace_an_operation),
    "edges of another sum": ("s3", lambda net: as_class(net, model_search.MixedOp, EdgeOfAnotherSum)),
    "drop path on edges": ("s3", lambda net: as_class(net, model_search.MixedOp, DropPathEdge)),
    "dropout behind skips": ("s2", lambda net: add_dropout(net, 0)),
    "a subclass of Cell": ("s3", lambda net: as_class(net, model_search.Cell, ActivatedCell)),
    "another preprocess": ("s3", lambda net: append(net, ReLUConvBN, nn.Tanh)),
    "no norm at the end": ("s3", lambda net: [op.op.__delitem__(7) for op in every(net, SepConv)]),
    "another stem": ("s3", lambda net: net.stem.append(nn.Hardtanh())),
}
DERIVED_CHANGES = {  # of a derived network -> the cell, the change
    **{f"nothing, {name}": (name, random_norms)
       for name in ("LAMBDA_DARTS", "NASNet", "AmoebaNet", "ImageNet", "201")},
    "SiLU": ("DARTS", lambda net: replace(net, nn.ReLU, lambda old: nn.SiLU())),
    "group norms": ("DARTS", lambda net: replace_norms(net, partial(nn.GroupNorm, 2))),
    "norms without γ and β": ("DARTS", lambda net: replace_norms(net, partial(nn.BatchNorm2d, affine=False))),
    "norms without γ and β in some": ("DARTS", lambda net: [op.op.__setitem__(
        3, nn.BatchNorm2d(op.op[3].num_features, affine=False).double()) for op in some(every(net, SepConv))]),
    "norms without β in some": ("DARTS", lambda net: set_all(some(every(net, nn.BatchNorm2d)), bias=None)),
    "frozen γ": ("DARTS", lambda net: freeze(some(every(net, nn.BatchNorm2d)))),
    "another eps in some": ("DARTS", lambda net: set_all(some(every(net, nn.BatchNorm2d)), eps=0.1)),
    "a subclass of SepConv": ("DARTS", lambda net: as_class(net, SepConv, CalledSepConv)),
    "an own block": ("201", lambda net: replace(net, ReLUConvBN, lambda op: OwnBlock(
        op.op[1].in_channels, op.op[1].stride[0]) if op.op[1].stride == (1, 1) else op)),
    "a module behind pools": ("AmoebaNet", lambda net: append(net, nn.MaxPool2d, SqueezeExcitation)),
    "a hook on outputs": ("DARTS", hook_outputs),
    "a hook on inputs": ("LAMBDA_DARTS", hook_inputs),
    "a hook on gradients": ("DARTS", hook_gradients_of_outputs),
    "another drop path": ("LAMBDA_DARTS", lambda net: None),
    "an edge of another file": ("DARTS", lambda net: as_class(net, model.Cell, EdgeOfAnotherFile)),
    "another sum of an edge": ("DARTS", lambda net: as_class(net, model.Cell, ScaledCell)),
    "a subclass of Cell": ("DARTS", lambda net: as_class(net, model.Cell, ActivatedDerivedCell)),
    "other sources": ("DARTS", lambda net: [cell.sources.__setitem__(3, 0) for cell in net.cells[:1]]),
    "a source from the end": ("DARTS", lambda net: net.cells[0].sources.__setitem__(3, -1)),
    "other outputs": ("DARTS", lambda net: set_all(net.cells, concat=(5, 4, 3, 2))),
    "outputs as tensors": ("DARTS", outputs_as_tensors),
    "outputs by a property": ("DARTS", outputs_by_a_property),
    "a node of more channels": ("DARTS", lambda net: resize_a_node(net, 8, 1, (2, 3, 4))),
    "a node of half the size": ("DARTS", lambda net: resize_a_node(net, 4, 2, (3, 4, 5, 3))),
    "other paddings": ("DARTS", other_paddings),
    "an operation of one channel": ("DARTS", lambda net: net.cells[0]._ops.__setitem__(
        0, of_one_channel(net))),
    "another stem": ("DARTS", lambda net: net.stem.append(nn.Hardtanh())),
}


def images(seed, size=8):
    torch.manual_seed(seed)
    return torch.randn(3, 3, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def changed_network(space, change, layers=3):
    torch.manual_seed(0)
    if space in SPACES:
        net = ldarts.SearchNetwork(4, 10, 1 if space == "nasbench201" else layers, space)
    elif space == "201":
        net = ldarts.NetworkNAS201(4, 10, 1, "|nor_conv_3x3~0|+|none~0|skip_connect~1|+"
                                             "|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|")
    elif space == "ImageNet":
        net = ldarts.NetworkImageNet(4, 10, layers, False, genotypes.load("DARTS"))
    else:
        net = ldarts.Network(4, 10, layers, False, genotypes.load(space))
    net.double().to(memory_format=torch.channels_last)
    net(images(1, 64 if space == "ImageNet" else 8))  # the engine has planned it before
    torch.manual_seed(2)
    change(net)
    return net


def computed(net, layout):
    """Outputs, gradients, their gradients and statistics of a training pass; the output in evaluation."""
    net = net.to(memory_format=layout)
    x = images(3, 64 if isinstance(net, ldarts.NetworkImageNet) else 8).contiguous(memory_format=layout)
    y = torch.tensor([1, 2, 3])
    if isinstance(net, ldarts.SearchNetwork):
        w = [p for p in net.weight_parameters() if p.requires_grad]
        p = [q.detach().clone().requires_grad_() for q in net.cell_weights()]
        pass_through = partial(net, x, p)
    else:
        first, *w = [p for p in net.parameters() if p.requires_grad]  # of the stem: behind all the others
        p, pass_through = [first, *(q for q in w if q.dim() == 1)], lambda: net(x, 0.4)[0]  # and γ, β
    torch.manual_seed(4)
    logits = pass_through()
    loss = F.cross_entropy(logits, y)
    first = torch.autograd.grad(loss, [*w, *p], create_graph=True, materialize_grads=True)
    result = {"logits": [logits], "gradients": first}
    if layout is torch.channels_last:  # else the engine has no part in it
        along = [torch.randn_like(g) for g in first[len(w) :]]
        result["second"] = torch.autograd.grad(first[len(w) :], [*w, *p], along, materialize_grads=True)
    result["statistics"] = [b.double().clone() for b in net.buffers()]
    net.eval()
    with torch.no_grad():
        result["evaluation"] = [pass_through()]
    net.train()
    return result


@needs_build
@pytest.mark.parametrize("space, change", [*CHANGES.values(), *DERIVED_CHANGES.values()],
                         ids=[*CHANGES, *(f"derived: {name}" for name in DERIVED_CHANGES)])
def test_a_fork_computes_what_its_modules_say(space, change, request, monkeypatch):
    layouts = [torch.channels_last]
    if "nothing" in request.node.name:  # the engine leaves the other layout to the modules
        layouts.append(torch.contiguous_format)
    for layout in layouts:
        monkeypatch.undo()
        if "another drop path" in request.node.name:
            monkeypatch.setattr(model, "drop_path", drop_channels)
        found = computed(changed_network(space, change), layout)
        net = changed_network(space, change)
        monkeypatch.setattr(fused, "engine_supports", lambda x: False)
        expected = computed(net, layout)
        for name, values in expected.items():
            for a, b in zip(found[name], values, strict=True):
                atol = 1e-10 * max(1.0, float(b.detach().abs().max()))
                torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


@needs_build
@pytest.mark.parametrize("owner, name", [(model_search.MixedOp, "forward"), (model_search.Cell, "forward"),
                                         (SepConv, "forward"), (nn.ReLU, "forward"),
                                         (nn.Conv2d, "__call__"), (nn.Conv2d, "_call_impl"),
                                         (nn.Sequential, "__call__"), (SepConv, "__call__"),
                                         (torch, "relu"), (torch, "batch_norm")], ids=str)
def test_an_edited_class_runs_as_it_is_written(owner, name, monkeypatch):
    net = changed_network("s3", lambda net: None)
    x, original = images(3), getattr(owner, name)
    before = net(x)
    monkeypatch.setattr(owner, name, lambda self, *inputs: 2 * original(self, *inputs))
    found = net(x)
    assert not torch.allclose(before, found)
    monkeypatch.setattr(fused, "engine_supports", lambda x: False)
    torch.testing.assert_close(found, net(x), rtol=1e-9, atol=1e-9)


class Watched(torch.Tensor):
    """A tensor that changes what is computed of it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is F.relu else result


class WatchedCalls(torch.overrides.TorchFunctionMode):
    """The same of all tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        return 2 * result if function is F.relu else result


@needs_build
@pytest.mark.parametrize("of_type, watch", [(Watched, contextlib.nullcontext), (torch.Tensor, WatchedCalls)])
def test_watched_images_are_computed_as_the_watcher_says(of_type, watch, monkeypatch):
    net = changed_network("s3", lambda net: None)
    x = images(3).as_subclass(of_type)
    with watch():
        found = net(x)
        monkeypatch.setattr(fused, "engine_supports", lambda x: False)
        torch.testing.assert_close(found, net(x), rtol=1e-10, atol=1e-10)


def first_cell_twice(net, x, how):
    """The gradient w.r.t. a weight of the stem, which a cell in another mode of autograd reads, too."""
    run, p = net.engine.runner(x), net.cell_weights()[0].detach()
    if how == "gradients asked for later":
        freeze([net.stem])
    s, cell = run(net.stem, x), net.cells[0]
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)():
        y = checkpoint(run, cell, s, s, p, use_reentrant=False) if how == "checkpoint" else run(cell, s, s, p)
    if how == "gradients asked for later":
        s.requires_grad_()
    if how == "a change in place":
        s.neg_()
    y = run(cell, s, s, p) + (y if how == "checkpoint" else 0)
    source = s if how == "gradients asked for later" else net.stem[0].weight
    return torch.autograd.grad(y.square().sum(), source)


@needs_build
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "checkpoint", "gradients asked for later",
                                 "a change in place"])
def test_a_state_that_is_read_in_several_modes_has_the_gradient_of_each(how, monkeypatch):
    found = first_cell_twice(changed_network("s3", lambda net: None), images(3), how)
    monkeypatch.setattr(fused, "engine_supports", lambda x: False)
    torch.testing.assert_close(found, first_cell_twice(changed_network("s3", lambda net: None), images(3), how),
                               rtol=1e-8, atol=1e-9)


@needs_build
@pytest.mark.parametrize("has", [{"track_running_stats": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("channels, behind", [(1, 12), (5, 12), (24, 12), (12, 1)])
def test_a_norm_of_other_channels_is_refused(channels, behind, has):
    norm, x = nn.BatchNorm2d(channels, **has).double(), state(behind)
    for run in (lambda: norm(x), lambda: normalise([x], [norm])):
        with pytest.raises(RuntimeError, match="channels|12"):
            run()


def test_what_was_replaced_in_pytorch_before_the_import_shuts_the_engine(monkeypatch):
    def read():
        names = runpy.run_path(recognise.__file__)
        return names["pytorch"]() == names["AS_IMPORTED"]

    assert read()
    for patch in (lambda self, x: F.leaky_relu(x, 0.3), functools.wraps(nn.ReLU.forward)(lambda self, x: x)):
        monkeypatch.setattr(nn.ReLU, "forward", patch)
        assert not read()
    cells = changed_network("s3", lambda net: None).searched_cells()
    assert fused.Engine().coverage(cells).startswith("0 of 84 operations run in the engine; PyTorch is patched")


def state(channels, images=3, pixels=8):
    x = torch.randn(images, channels, pixels, pixels, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def by_engine_and_cell(net, drop_prob):
    """The first cell's output with the same random numbers: the engine's, its own."""
    x = state(12)

    def seeded(run):
        torch.manual_seed(4)
        return run(net.cells[0], x, x, drop_prob)

    return seeded(net.engine.runner(x)), seeded(fused.run_plainly)


@needs_build
def test_a_drop_path_replaced_twice_is_the_last(monkeypatch):
    net = changed_network("DARTS", lambda net: None, 4)
    for factor in (2.0, 3.0):  # functions of one code
        monkeypatch.setattr(model, "drop_path", (lambda factor: lambda x, drop_prob: factor * x)(factor))
        torch.testing.assert_close(*by_engine_and_cell(net, 0.4), rtol=1e-9, atol=1e-9)


@needs_build
@pytest.mark.parametrize("drop_prob", [torch.tensor(0.4).double().requires_grad_(),
                                       torch.linspace(0.1, 0.6, 4).double().view(4, 1, 1)],
                         ids=["with a gradient", "of each channel"])
def test_a_drop_probability_is_any_tensor_that_the_cell_takes(drop_prob):
    found = by_engine_and_cell(changed_network("DARTS", lambda net: None, 4), drop_prob)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    if drop_prob.requires_grad:
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), drop_prob)[0] for y in found))


@needs_build
def test_one_image_of_one_pixel_has_no_statistics():
    net = changed_network("DARTS", lambda net: None, 4)
    in_a_cell = net.cells[2], state(16, 1, 2), state(32, 1, 2), 0.0  # halves its first state
    for module, *inputs in ((net.stem, state(3, 1, 1)), in_a_cell):
        for run in (net.engine.runner(inputs[0]), fused.run_plainly):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
                run(module, *inputs)


@needs_build
def test_the_engine_says_what_it_leaves_to_the_modules():
    net = changed_network("s3", lambda net: None)
    cells = net.searched_cells()  # three, of 14 edges with two operations and `none`
    cells[0].edges = 14  # a fork's own attribute
    assert net.engine.coverage(cells) == "84 of 84 operations run in the engine"
    handle = every(net, SepConv)[0].register_forward_hook(lambda *_: None)
    assert net.engine.coverage(cells) == ("83 of 84 operations run in the engine; "
                                          "SepConv with a hook on SepConv runs as it is, slower")
    handle.remove()
    every(net, SepConv)[5].op[4] = nn.SiLU()
    assert net.engine.coverage(cells).endswith("; SepConv with SiLU runs as it is, slower")
    net.cells[0].__class__ = ActivatedCell
    assert net.engine.coverage(cells).startswith("56 of 84 operations run in the engine; ActivatedCell runs")


@needs_build
@pytest.mark.parametrize("transform", ["torch.func", "forward mode", "jit.trace", "a global hook", "autocast",
                                       "meta"])
def test_transforms_of_a_supernet_see_its_modules(transform):
    net, x = changed_network("s3", lambda net: None), images(3)
    if transform == "torch.func":
        with ldarts.Architect(net, F.cross_entropy).kept(grad=True):
            grads = torch.func.grad(lambda w: torch.func.functional_call(net, w, (x,)).sum())(
                {name: p.detach() for name, p in net.named_parameters()})
        assert grads["stem.0.weight"].shape == net.stem[0].weight.shape
    elif transform == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(net(dual)).tangent is not None
    elif transform == "jit.trace":
        with torch.no_grad():
            traced = torch.jit.trace(net, x, check_trace=False)
        assert "batch_norm" in str(traced.inlined_graph)
    elif transform == "a global hook":
        seen = []
        with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
            net(x)
        assert set(m for m in net.cells.modules() if isinstance(m, nn.Conv2d)) <= set(seen)
    elif transform == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert net.engine.runner(x) is fused.run_plainly
    else:
        with torch.device("meta"):
            assert ldarts.SearchNetwork(4, 10, 3, "darts")(torch.empty(2, 3, 8, 8)).shape == (2, 10)


@needs_build
@pytest.mark.parametrize("blocks", ["separable convolutions", "a norm alone"])
def test_third_derivatives_are_refused_with_the_remedy(blocks):
    norm, x = nn.BatchNorm2d(3, affine=False).double(), images(1).requires_grad_()
    function = changed_network("s3", lambda net: None) if blocks != "a norm alone" else (
        lambda x: normalise([x], [norm])[0])
    gradient, = torch.autograd.grad((function(x) ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivatives; LDARTS_FUSED=off"):
        torch.autograd.grad(gradient.square().sum(), x, create_graph=True)


@needs_build
def test_batched_gradients_are_refused_with_the_remedy():
    net, w = changed_network("DARTS", lambda net: None), torch.eye(10).double()
    with pytest.raises(RuntimeError, match="LDARTS_FUSED=off"):
        torch.autograd.grad(net(images(1))[0].sum(0), [*net.parameters()], w, is_grads_batched=True)


@needs_build
def test_a_planned_network_is_freed():
    net = changed_network("s3", lambda net: None)
    net.cells[0].register_forward_hook(lambda module, *_, net=net: None)  # which makes a circle
    net(images(1))
    cell = weakref.ref(net.cells[0])
    del net
    gc.collect()
    assert cell() is None


def two_batches():
    return (images(5), torch.tensor([1, 2, 3])), (images(6), torch.tensor([3, 2, 1]))


@pytest.mark.parametrize("change", ["dropout", "SyncBatchNorm", "BatchNorm1d", "spectral norm", "frozen stem",
                                    "unreached weights"])
def test_an_architect_of_a_changed_network(change):
    """Passes of a difference draw the same numbers; statistics, frozen and unreached weights stay."""
    net = changed_network("s3", lambda net: add_dropout(net, -1) if change == "dropout" else None, layers=4)
    if change == "SyncBatchNorm":
        replace_norms(net, partial(nn.SyncBatchNorm, affine=False))
    if change == "BatchNorm1d":
        net.classifier = nn.Sequential(nn.BatchNorm1d(net.classifier.in_features), net.classifier).double()
    if change == "spectral norm":  # of the kind whose buffers enter the pass that moves them
        nn.utils.spectral_norm(net.classifier)
    if change == "frozen stem":
        freeze([net.stem])
    if change == "unreached weights":
        net.spare = nn.Linear(3, 3).double()
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4)
    arch = ldarts.Architect(net, F.cross_entropy)
    train, valid = two_batches()
    buffers, stem = [b.clone() for b in net.buffers()], net.stem[0].weight.detach().clone()
    central, exact = [], []
    for method, result in (("central", central), ("exact", exact)):
        torch.manual_seed(7)
        result += arch.alpha_grads(train, valid, 0.025, None, True, method)
    assert all(torch.equal(b, before) for b, before in zip(net.buffers(), buffers))
    for method, result in (("central", central), ("exact", exact)):
        torch.manual_seed(7)
        for b, before in zip(net.buffers(), buffers):
            b.data.copy_(before)
        result += arch.lambda_grads(train, "cosine", 1e-7, method)[2]
    # The published radius of the second order crosses kinks. Its length is compared, which other random
    # numbers in the two passes would make far too large.
    of_lambda = slice(len(net.arch_parameters()), None)
    norm = torch.nn.utils.get_total_norm
    assert norm([a - b for a, b in zip(central[of_lambda], exact[of_lambda])]) < 1e-4 * norm(exact[of_lambda])
    assert 0.5 < norm(central[: of_lambda.start]) / norm(exact[: of_lambda.start]) < 30
    step = partial(search_step, arch, optimizer, train, valid, unrolled=True, alpha_first=True, lambda_t=0.1,
                   kind="cosine", epsilon=1e-4, method="exact", grad_clip=5.0)
    step()
    assert torch.equal(net.stem[0].weight, stem) == (change == "frozen stem")
    assert [p.requires_grad for p in net.stem.parameters()] == 3 * [change != "frozen stem"]
    frozen = [net.arch_parameters()[0], *net.cells.parameters()]
    before = [p.requires_grad_(False).clone() for p in frozen]  # in the middle of a search
    step()
    assert all(map(torch.equal, frozen, before))


def test_alignment_of_gradients_that_are_zero():
    some_grads = [torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 2)]
    for kind in ("cosine", "sign"):
        leaves = [g.clone().requires_grad_() for g in some_grads]
        value = ldarts.layer_alignment(leaves, kind)
        assert value.item() == 0
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, leaves))


def test_weights_without_alpha_say_that_alpha_is_kept():
    net = changed_network("s2", lambda net: None)
    state = {name: t for name, t in net.state_dict().items() if "alpha" not in name}
    with pytest.warns(UserWarning, match="without alphas_normal and alphas_reduce: α stays"):
        net.load_state_dict(state)


def test_types_of_cells_may_have_different_operations(monkeypatch):
    pairs, triples = (("skip_connect", "sep_conv_3x3"),) * 14, (("none", "noise", "skip_connect"),) * 14
    monkeypatch.setitem(ldarts.spaces.SPACES, "own", ldarts.spaces.Space(pairs, triples))
    values = train_search.measure_alphas(ldarts.SearchNetwork(2, 10, 4, "own"), "cifar10")
    assert values["entropy"] == pytest.approx((math.log(2) + math.log(3)) / 2, rel=1e-3)
    assert values["gini"] == pytest.approx((1 / 2 + 2 / 3) / 2, rel=1e-3)


def test_edges_of_unequal_length_and_dropped_paths_are_refused(monkeypatch):
    monkeypatch.setitem(ldarts.spaces.SPACES, "ragged", ldarts.spaces.Space(
        (("skip_connect",), *(("skip_connect", "sep_conv_3x3"),) * 13), (("skip_connect",),) * 14))
    with pytest.raises(ldarts.InputError, match="1 to 2 operations.*none"):
        ldarts.SearchNetwork(4, 10, 3, "ragged")
    net = ldarts.SearchNetwork(4, 10, 1, "s2")
    net.drop_path_prob = 0.0
    with pytest.raises(ldarts.InputError, match="drops no paths"):
        net.drop_path_prob = 0.2
    del net.cells[0]._ops[0]._ops[1]  # as pruning does: refused, not weighed wrongly
    with pytest.raises(ValueError, match="shorter"):
        net(torch.randn(2, 3, 8, 8))


def test_the_original_s_drop_path_prob_works():
    torch.manual_seed(0)
    net, x = ldarts.Network(4, 10, 3, False, ldarts.genotypes.load("DARTS_V2")), torch.randn(2, 3, 8, 8)
    results = []
    for by_argument in (True, False):
        torch.manual_seed(1)
        net.drop_path_prob = 0.0 if by_argument else 0.5
        results.append(net(x, 0.5)[0] if by_argument else net(x)[0])
    assert torch.equal(*results) and not torch.equal(results[0], net(x, 0.0)[0])
