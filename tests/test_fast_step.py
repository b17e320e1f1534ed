"""The fast parts of a step against plain ones: depthwise gradients, and what is computed once for a state."""
import pytest
import torch
import torch.nn.functional as F

import ldarts
from ldarts.depthwise import DepthwiseConv2d
from ldarts.mixed_sum import compiled_for
from ldarts.model_search import leave
from ldarts.operations import Zero

needs_build = pytest.mark.skipif(not compiled_for("cpu"), reason="the extension is not compiled: no compiler here")


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@needs_build
@pytest.mark.parametrize("C", [1, 3, 8, 17])
@pytest.mark.parametrize("size", [(5, 7), (8, 8), (2, 1)], ids=str)
@pytest.mark.parametrize("kernel, stride, padding, dilation", [
    (3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 2, 1), (5, 2, 2, 1), (3, 1, 2, 2), (3, 2, 2, 2), (5, 1, 4, 2), (5, 2, 4, 2)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_depthwise_gradients_are_those_of_pytorch(dtype, tolerance, kernel, stride, padding, dilation, size, C):
    conv = DepthwiseConv2d(C, kernel, stride, padding, dilation).to(dtype)
    x = images(3, C, *size, dtype=dtype).requires_grad_()
    out = conv(x)
    plain = F.conv2d(x, conv.weight, None, stride, padding, dilation, C)
    torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(plain)
    for found, expected in zip(torch.autograd.grad(out, [x, conv.weight], grad),
                               torch.autograd.grad(plain, [x, conv.weight], grad)):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@needs_build
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_depthwise_gradients_of_gradients(stride, dilation):
    conv = DepthwiseConv2d(2, 3, stride, dilation, dilation).double()
    x = images(2, 2, 4, 5).requires_grad_()

    def function(x, weight):
        return torch.func.functional_call(conv, {"weight": weight}, x)

    arguments = (x, conv.weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, arguments) and torch.autograd.gradgradcheck(function, arguments)


@needs_build
def test_depthwise_mismatches_are_named():
    ops = torch.ops.ldarts
    with pytest.raises(ValueError, match="grad has shape"):
        ops.depthwise_weight(images(2, 3, 4, 4), images(2, 3, 5, 5), 3, 1, 1, 1)
    with pytest.raises(ValueError, match="grad has shape"):
        ops.depthwise_input(images(2, 3, 5, 5), torch.randn(3, 1, 3, 3).double(), (4, 4), 1, 1, 1)
    with pytest.raises(ValueError, match="dtypes"):
        ops.depthwise_weight(images(2, 3, 4, 4), images(2, 3, 4, 4).float(), 3, 1, 1, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("space", ["darts", "s1", "s3", "nasbench201"])
def test_sharing_by_state_equals_every_operation_by_itself(space, training):
    net = ldarts.SearchNetwork(4, 10, 1 if space == "nasbench201" else 3, space).double().train(training)
    twin = ldarts.SearchNetwork(4, 10, 1 if space == "nasbench201" else 3, space).double().train(training)
    twin.load_state_dict(net.state_dict())
    cell, plain = net.searched_cells()[0], twin.searched_cells()[0]
    if space == "nasbench201":
        edges, plain_edges = ([c.edges[f"{i}<-0"] for i in (1, 2, 3)] for c in (cell, plain))
    else:
        edges, plain_edges = ([c._ops[i * (i + 3) // 2] for i in range(4)] for c in (cell, plain))
    state = images(2, 4, 6, 6)
    for terms, edge in zip(leave(state, edges), plain_edges, strict=True):
        expected = [op(state) for op in edge if not isinstance(op, Zero)]
        assert len(terms) == len(expected) and all(torch.equal(a, b) for a, b in zip(terms, expected))
    for (name, buffer), other in zip(cell.named_buffers(), plain.buffers()):
        assert torch.equal(buffer, other), name


def test_channels_last_computes_what_the_default_layout_does():
    net = ldarts.SearchNetwork(4, 10, 4, "darts").double()
    arch = ldarts.Architect(net, F.cross_entropy)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=layout)
        loss, dw, d_lambda, value = arch.lambda_grads((x.contiguous(memory_format=layout), y), "cosine", 1e-4, "exact")
        results.append([loss, value, *dw, *d_lambda])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
