"""Depthwise convolution: PyTorch's, with the gradients of csrc/depthwise.cpp where those are compiled (CPU).

The three functions are each other's derivatives: ⟨g, conv(x, w)⟩ is linear in g, in x and in w.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mixed_sum import compiled_for


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d(C, C, kernel_size, groups=C, bias=False)."""

    def __init__(self, C: int, kernel_size: int, stride: int, padding: int, dilation: int = 1):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ours = (x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and torch.is_grad_enabled()
                and x.is_contiguous(memory_format=torch.channels_last) and compiled_for("cpu"))
        if not ours:
            return super().forward(x)
        return _Convolve.apply(x, self.weight, self.stride[0], self.padding[0], self.dilation[0])


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, *geometry):
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, None, *geometry, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (_ByInput.apply(grad, weight, x.shape, *ctx.geometry) if ctx.needs_input_grad[0] else None,
                _ByWeight.apply(x, grad, weight.shape[-1], *ctx.geometry) if ctx.needs_input_grad[1] else None,
                None, None, None)


class _ByInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, weight, shape, *geometry):
        ctx.save_for_backward(grad, weight)
        ctx.geometry = geometry
        stride, padding, dilation = geometry
        if dilation > 1:
            return torch.ops.ldarts.depthwise_input(grad, weight, shape[2:], *geometry)
        x = grad.new_empty(1).expand(shape)  # its shape alone is read
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], len(weight),
            [True, False, False])[0]

    @staticmethod
    def backward(ctx, grad_x):
        grad, weight = ctx.saved_tensors
        return (_Convolve.apply(grad_x, weight, *ctx.geometry) if ctx.needs_input_grad[0] else None,
                _ByWeight.apply(grad_x, grad, weight.shape[-1], *ctx.geometry) if ctx.needs_input_grad[1] else None,
                None, None, None, None)


class _ByWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad, taps, *geometry):
        ctx.save_for_backward(x, grad)
        ctx.geometry = geometry
        return torch.ops.ldarts.depthwise_weight(x, grad, taps, *geometry)

    @staticmethod
    def backward(ctx, grad_weight):
        x, grad = ctx.saved_tensors
        return (_ByInput.apply(grad, grad_weight, x.shape, *ctx.geometry) if ctx.needs_input_grad[0] else None,
                _Convolve.apply(x, grad_weight, *ctx.geometry) if ctx.needs_input_grad[1] else None,
                None, None, None, None)
