"""The derived networks: `Network` for 32x32 images, `NetworkImageNet`, and `NetworkNAS201` for an arch string."""
import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import InputError
from .genotypes import Genotype, parse_arch
from .operations import OPS, FactorizedReduce, ReLUConvBN, ResNetBasicblock, drop_path


class Cell(nn.Module):
    """A cell with only the chosen operations. forward: two inputs -> [N, multiplier * C, H, W]"""

    def __init__(self, genotype: Genotype, C_prev_prev: int, C_prev: int, C: int, reduction: bool, reduction_prev: bool):
        super().__init__()
        if reduction_prev:
            self.preprocess0 = FactorizedReduce(C_prev_prev, C)
        else:
            self.preprocess0 = ReLUConvBN(C_prev_prev, C, 1, 1, 0)
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0)
        edges = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self.multiplier = len(self.concat)
        self.sources = [j for _, j in edges]
        self._ops = nn.ModuleList(OPS[name](C, 2 if reduction and j < 2 else 1, True) for name, j in edges)

    def forward(self, s0: Tensor, s1: Tensor, drop_prob: float | Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        drops = isinstance(drop_prob, Tensor) or drop_prob > 0  # a tensor's value is on the device: it is not looked at
        for node in range(len(self._ops) // 2):
            terms = []
            for edge in (2 * node, 2 * node + 1):
                op = self._ops[edge]
                h = op(states[self.sources[edge]])
                if self.training and drops and not isinstance(op, nn.Identity):
                    h = drop_path(h, drop_prob)
                terms.append(h)
            states.append(terms[0] + terms[1])
        return torch.cat([states[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier two thirds up the network. x: 8x8 (CIFAR, stride 3) or 14x14 (ImageNet, stride 2)."""

    def __init__(self, C: int, num_classes: int, stride: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride, count_include_pad=False),
            nn.Conv2d(C, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            # The ImageNet head of DARTS has no norm here, kept for the sake of its results.
            nn.BatchNorm2d(768) if stride == 3 else nn.Identity(),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.flatten(1) if x.shape[2:] == (1, 1) else x.mean((2, 3)))


class _Stacked(nn.Module):
    """What both networks share: cells with reductions at 1/3 and 2/3, the auxiliary head behind the second."""

    def _stack(self, C_prev_prev: int, C_prev: int, C: int, num_classes: int, layers: int, auxiliary: bool,
               genotype: Genotype, reduction_prev: bool, auxiliary_stride: int) -> None:
        self.cells, C_curr = nn.ModuleList(), C
        self.auxiliary_layer = 2 * layers // 3
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C_curr *= 2 if reduction else 1
            self.cells.append(Cell(genotype, C_prev_prev, C_prev, C_curr, reduction, reduction_prev))
            reduction_prev, C_prev_prev, C_prev = reduction, C_prev, self.cells[-1].multiplier * C_curr
            if i == self.auxiliary_layer and auxiliary:
                self.auxiliary_head = AuxiliaryHead(C_prev, num_classes, auxiliary_stride)
        self.auxiliary = auxiliary
        self.classifier = nn.Linear(C_prev, num_classes)

    def _run(self, s0: Tensor, s1: Tensor, drop_path_prob: float | Tensor) -> tuple[Tensor, Tensor | None]:
        logits_aux = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, drop_path_prob)
            if i == self.auxiliary_layer and self.auxiliary and self.training:
                logits_aux = self.auxiliary_head(s1)
        return self.classifier(s1.mean((2, 3))), logits_aux


def _check(C: int, layers: int, genotype: Genotype) -> None:
    if not isinstance(genotype, Genotype):
        raise InputError(f"{genotype!r} is no genotype of a DARTS space: NetworkNAS201 takes arch strings")
    if C < 2 or C % 2 or layers < 1:
        raise InputError(f"{layers} cells of {C} channels: cells must be positive, channels positive and even")


class Network(_Stacked):
    """The derived network for 32x32 images, with the original's parameter names.

    forward: x [N, 3, 32, 32] -> (logits [N, num_classes], logits_aux or None). logits_aux only in training, with
    `auxiliary`; drop_path_prob: probability to drop a path of a sample, in training.
    """

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype):
        super().__init__()
        _check(C, layers, genotype)
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self._stack(3 * C, 3 * C, C, num_classes, layers, auxiliary, genotype, False, auxiliary_stride=3)

    def forward(self, x: Tensor, drop_path_prob: float | Tensor = 0.0) -> tuple[Tensor, Tensor | None]:
        s = self.stem(x)
        return self._run(s, s, drop_path_prob)


class NetworkImageNet(_Stacked):
    """The derived network for 224x224 images: a stem of three stride-2 convolutions down to 28x28. See Network."""

    def __init__(self, C: int, num_classes: int, layers: int, auxiliary: bool, genotype: Genotype):
        super().__init__()
        _check(C, layers, genotype)
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, C // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(C // 2), nn.ReLU(),
            nn.Conv2d(C // 2, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C))
        self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(C, C, 3, 2, 1, bias=False), nn.BatchNorm2d(C))
        self._stack(C, C, C, num_classes, layers, auxiliary, genotype, True, auxiliary_stride=2)

    def forward(self, x: Tensor, drop_path_prob: float | Tensor = 0.0) -> tuple[Tensor, Tensor | None]:
        s0 = self.stem0(x)
        return self._run(s0, self.stem1(s0), drop_path_prob)


class NetworkNAS201(nn.Module):
    """The network of a NAS-Bench-201 arch string: 3 stages of `layers` cells (5 in the benchmark). See Network."""

    def __init__(self, C: int, num_classes: int, layers: int, arch: str):
        super().__init__()
        self.nodes = parse_arch(arch)

        def stage(C: int) -> list[nn.Module]:
            return [nn.ModuleList(OPS[op](C, 1, True) for node in self.nodes for op, _ in node) for _ in range(layers)]

        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        self.cells = nn.ModuleList([*stage(C), ResNetBasicblock(C, 2 * C), *stage(2 * C),
                                    ResNetBasicblock(2 * C, 4 * C), *stage(4 * C)])
        self.lastact = nn.Sequential(nn.BatchNorm2d(4 * C), nn.ReLU())
        self.classifier = nn.Linear(4 * C, num_classes)

    def forward(self, x: Tensor, drop_path_prob: float | Tensor = 0.0) -> tuple[Tensor, None]:
        x = self.stem(x)
        for cell in self.cells:
            if isinstance(cell, nn.ModuleList):
                ops, states = iter(cell), [x]
                for node in self.nodes:
                    states.append(sum(next(ops)(states[j]) for _, j in node))
                x = states[-1]
            else:
                x = cell(x)
        return self.classifier(self.lastact(x).mean((2, 3))), None


def count_parameters(net: nn.Module) -> int:
    """Parameters without those of the auxiliary head, as the papers count them."""
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith("auxiliary"))


def count_multiply_adds(net: nn.Module, size: int = 32) -> int:
    """Multiply-adds of the convolutions and the classifier for one image [3, size, size], as the papers count them."""
    counter = FlopCounterMode(display=False)
    with counter:
        copy.deepcopy(net).to("meta").eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2
