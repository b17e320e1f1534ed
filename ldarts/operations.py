"""The candidate operations and the blocks they are made of; module and parameter names are those of DARTS.

Every operation maps [N, C, H, W] to [N, C, H / stride, W / stride]. `affine` says whether its batch norms have a scale
and a shift: not in the search, where they would undo the architecture weights.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReLUFirst(nn.Module):
    """An operation that begins with a ReLU: one ReLU serves all those that leave the same state."""

    op: nn.Sequential  # but for FactorizedReduce, whose two convolutions have names

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)

    def after_relu(self, x: Tensor) -> Tensor:
        """forward(x) from relu(x)."""
        z, norm = self.product(x)
        return norm(z)

    def product(self, x: Tensor) -> tuple[Tensor, nn.BatchNorm2d]:
        """(z, norm) with after_relu(x) = norm(z)."""
        return self.before_norm(x), self.op[-1]

    def before_norm(self, x: Tensor) -> Tensor:
        """What the last batch norm normalises, from relu(x)."""
        for layer in self.op[1:-1]:
            x = layer(x)
        return x


class _ReLU(torch.autograd.Function):
    """F.relu; the gradient of its gradient by x, which is 0, is never a tensor of zeros to be added."""

    @staticmethod
    def forward(ctx, x):
        result = F.relu(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0].detach(), 0)


class _Concat(torch.autograd.Function):
    """torch.cat along the channels; the gradient of its gradient is one, too, where torch.cat's is a sum of padded slices."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.sizes = [t.shape[1] for t in tensors]
        return torch.cat(tensors, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes, 1)


relu, concat = _ReLU.apply, _Concat.apply


def conv_1x1(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv2d(x, weight) for weights [out, in, 1, 1]; channels-last as a product of matrices, whose gradients of gradients copy
    nothing."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight)
    return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0]).permute(0, 3, 1, 2)


class ReLUConvBN(ReLUFirst):
    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def before_norm(self, x: Tensor) -> Tensor:
        conv = self.op[1]
        return conv_1x1(x, conv.weight) if conv.kernel_size == conv.stride == (1, 1) else conv(x)


class DilConv(ReLUFirst):
    """Dilated separable convolution."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, dilation: int, affine: bool):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class SepConv(ReLUFirst):
    """Depthwise-separable convolution, applied twice; the stride is in the first."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, 1, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(),
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, 1, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )


class FactorizedReduce(ReLUFirst):
    """Halves the resolution by two 1x1 convolutions of stride 2, one of them shifted by a pixel."""

    def __init__(self, C_in: int, C_out: int, affine: bool = True):
        super().__init__()
        if C_out % 2:
            raise ValueError(f"FactorizedReduce to {C_out} channels: they must be even, half to either convolution")
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.after_relu(self.relu(x))

    def product(self, x: Tensor) -> tuple[Tensor, nn.BatchNorm2d]:
        return self.before_norm(self.pixels(x)), self.bn

    @staticmethod
    def pixels(x: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels of x that conv_1 and conv_2 read, for all reductions that leave one state."""
        return x[:, :, ::2, ::2].clone(), x[:, :, 1::2, 1::2].clone()

    def before_norm(self, pixels: tuple[Tensor, Tensor]) -> Tensor:
        """What the batch norm normalises, from pixels(relu(x))."""
        return torch.cat([conv_1x1(x, conv.weight) for x, conv in zip(pixels, (self.conv_1, self.conv_2))], dim=1)


class Zero(nn.Module):
    """`none`: no connection. Mixed sums leave it out rather than call it."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class NoiseOp(nn.Module):
    """Standard normal noise of the output's shape, whatever the input: the trap of space S4 (Zela et al., 2020)."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])


def _conv_7x1_1x7(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


OPS = {  # name -> (C, stride, affine) -> module
    "none": lambda C, stride, affine: Zero(stride),
    "noise": lambda C, stride, affine: NoiseOp(stride),
    "avg_pool_3x3": lambda C, stride, affine: nn.AvgPool2d(3, stride, 1, count_include_pad=False),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride, 1),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, C, 3, stride, 1, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, C, 5, stride, 2, affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, C, 7, stride, 3, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, C, 3, stride, 2, 2, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, C, 5, stride, 4, 2, affine),
    "conv_7x1_1x7": _conv_7x1_1x7,
    "nor_conv_1x1": lambda C, stride, affine: ReLUConvBN(C, C, 1, stride, 0, affine),
    "nor_conv_3x3": lambda C, stride, affine: ReLUConvBN(C, C, 3, stride, 1, affine),
}


class ResNetBasicblock(nn.Module):
    """Halves the resolution between the stages of NAS-Bench-201: [N, C_in, H, W] -> [N, C_out, H / 2, W / 2]."""

    def __init__(self, C_in: int, C_out: int):
        super().__init__()
        self.conv_a = ReLUConvBN(C_in, C_out, 3, 2, 1)
        self.conv_b = ReLUConvBN(C_out, C_out, 3, 1, 1)
        self.downsample = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(C_in, C_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


def drop_path(x: Tensor, drop_prob: float) -> Tensor:
    """Zero whole samples of x [N, C, H, W] with probability drop_prob and scale the others by 1 / (1 - drop_prob)."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device, dtype=torch.float32).ge(drop_prob).to(x.dtype)
    return x * keep / (1.0 - drop_prob)
