"""The derived networks: `Network` for 32x32 images, `NetworkImageNet`, `NetworkNAS201` for an arch string."""
from typing import Callable

import torch
from torch import Tensor, nn

from . import fused
from .errors import InputError
from .genotypes import Genotype, parse_arch
from .operations import OPS, FactorizedReduce, ReLUConvBN, ResNetBasicblock, drop_path


class Cell(nn.Module):
    """A cell with only the chosen operations. forward: two inputs -> [N, multiplier * C, H, W]"""

    def __init__(self, genotype: Genotype, C_prev_prev: int, C_prev: int, C: int,
                 reduction: bool, reduction_prev: bool):
        super().__init__()
        self.preprocess0 = (FactorizedReduce(C_prev_prev, C) if reduction_prev
                            else ReLUConvBN(C_prev_prev, C, 1, 1, 0))
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        edges = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self.multiplier = len(self.concat)
        self.sources = [j for _, j in edges]
        self._ops = nn.ModuleList(OPS[name](C, 2 if reduction and j < 2 else 1, True) for name, j in edges)

    def forward(self, s0: Tensor, s1: Tensor, drop_prob: float | Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for first in range(0, len(self._ops), 2):
            states.append(self._edge(first, states, drop_prob) + self._edge(first + 1, states, drop_prob))
        return torch.cat([states[i] for i in self.concat], dim=1)

    def _edge(self, k: int, states: list[Tensor], drop_prob: float | Tensor) -> Tensor:
        op = self._ops[k]
        h = op(states[self.sources[k]])
        drops = isinstance(drop_prob, Tensor) or drop_prob > 0  # to read a tensor would wait for the device
        if self.training and drops and not isinstance(op, nn.Identity):
            h = drop_path(h, drop_prob)
        return h


class AuxiliaryHead(nn.Module):
    """A second classifier two thirds up the network. x: 8x8 (stride 3) or 7x7 (ImageNet, stride 2)."""

    def __init__(self, C: int, num_classes: int, stride: int):
        super().__init__()
        # The ImageNet head of DARTS has no second norm; nor has this one, to reproduce its results.
        norm = nn.BatchNorm2d(768) if stride == 3 else nn.Identity()
        self.features = nn.Sequential(
            nn.ReLU(), nn.AvgPool2d(5, stride, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False), norm, nn.ReLU())
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Network(nn.Module):
    """The derived network for 32x32 images, with the original's parameter names.

    Cells, with reductions at 1/3 and 2/3, and with `auxiliary` a second classifier behind the latter.
    forward: x [N, 3, H, W] -> (logits [N, num_classes], logits_aux or None), logits_aux only in training.
    drop_path_prob: probability to drop a path of a sample, in training; left out it is self.drop_path_prob,
    which the original's scripts set.
    """

    drop_path_prob: float | Tensor = 0.0

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype):
        super().__init__()
        if not isinstance(genotype, Genotype):
            raise InputError(f"{genotype!r} is no genotype of a DARTS space: "
                             "NetworkNAS201 takes arch strings")
        if C < 2 or C % 2 or layers < 1:
            raise InputError(f"{layers} cells of {C} channels: "
                             "cells must be positive, channels positive and even")
        self.engine = fused.Engine(["cpu"])
        C_prev, reduction_prev, auxiliary_stride = self._make_stem(C)
        C_prev_prev = C_prev
        self.cells = nn.ModuleList()
        self.auxiliary, self.auxiliary_layer = auxiliary, 2 * layers // 3
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            cell = Cell(genotype, C_prev_prev, C_prev, C, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev, C_prev_prev, C_prev = reduction, C_prev, cell.multiplier * C
            if auxiliary and i == self.auxiliary_layer:
                self.auxiliary_head = AuxiliaryHead(C_prev, num_classes, auxiliary_stride)
        self.classifier = nn.Linear(C_prev, num_classes)

    def _make_stem(self, C: int) -> tuple[int, bool, int]:
        """-> (its channels, whether it halves between its two states, the auxiliary head's stride)"""
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        return 3 * C, False, 3

    def _stem_states(self, x: Tensor, run: Callable) -> tuple[Tensor, Tensor]:
        s = run(self.stem, x)
        return s, s

    def forward(self, x: Tensor,
                drop_path_prob: float | Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        drop_path_prob = self.drop_path_prob if drop_path_prob is None else drop_path_prob
        run = self.engine.runner(x)  # the door to the engine: run(module, *inputs) is module(*inputs)
        s0, s1 = self._stem_states(x, run)
        logits_aux = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, run(cell, s0, s1, drop_path_prob)
            if self.auxiliary and self.training and i == self.auxiliary_layer:
                logits_aux = self.auxiliary_head(s1)
        return self.classifier(s1.mean((2, 3))), logits_aux


class NetworkImageNet(Network):
    """The derived network for 224x224 images: a stem of three stride-2 convolutions down to 28x28."""

    def _make_stem(self, C: int) -> tuple[int, bool, int]:
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, C // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(C // 2), nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C))
        self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C))
        return C, True, 2

    def _stem_states(self, x: Tensor, run: Callable) -> tuple[Tensor, Tensor]:
        s0 = run(self.stem0, x)
        return s0, run(self.stem1, s0)


class NAS201Cell(nn.ModuleList):
    """The operations of the edges, by nodes; a node reads all before it."""

    def forward(self, x: Tensor) -> Tensor:
        ops, states = iter(self), [x]
        for _ in range(3):
            states.append(sum(next(ops)(state) for state in states))
        return states[-1]


class NetworkNAS201(nn.Module):
    """The network of a NAS-Bench-201 arch string: 3 stages of `layers` cells, in the benchmark 5."""

    def __init__(self, C: int, num_classes: int, layers: int, arch: str):
        super().__init__()
        names = parse_arch(arch)
        self.engine = fused.Engine(["cpu"])
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.cells = nn.ModuleList()
        for stage in range(3):
            if stage > 0:
                self.cells.append(ResNetBasicblock(C, 2 * C))
                C *= 2
            self.cells.extend(NAS201Cell(OPS[name](C, 1, True) for name in names) for _ in range(layers))
        self.lastact = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
        self.classifier = nn.Linear(C, num_classes)

    def forward(self, x: Tensor, drop_path_prob: float | Tensor = 0.0) -> tuple[Tensor, None]:
        run = self.engine.runner(x)
        x = run(self.stem, x)
        for cell in self.cells:
            x = run(cell, x)
        return self.classifier(self.lastact(x).mean((2, 3))), None
