"""What must change nothing in a search, or in the training of a derived network: relations of several steps, in
float64 and in every space.

Gradients can be right while the training is not: one in another memory layout than its weight, stepped by a
fused optimizer, moves the wrong weights.
"""
import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ldarts
from ldarts import genotypes, spaces
from ldarts.architect import METHODS, full_float32, search_step
from ldarts.fused import compiled_for, run_plainly

SPACES = [space for space in spaces.SPACES if space != "s5"]  # the same as darts
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


@functools.cache  # a search is compared with several others
def search(space, method="exact", lambda_t=0.1, layout="channels-last", fused=True, engine=True,
           permuted=False):
    """All weights and α after some steps on random images, from the same beginning."""
    torch.manual_seed(3)
    net = ldarts.SearchNetwork(2, 10, 1 if space == "nasbench201" else 4, space).double().to(
        memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4, fused=fused)
    arch = ldarts.Architect(net, F.cross_entropy, 3e-3)
    images, labels = torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 10
    with pytest.MonkeyPatch.context() as patch:
        if not engine:
            patch.setattr("ldarts.fused.engine_supports", lambda x: False)
        for step in range(12 if space == "nasbench201" else 4):
            order = torch.randperm(12, generator=torch.Generator().manual_seed(step))
            pick = [order[:4], order[4:8]]
            if permuted:
                pick = [part.flip(0) for part in pick]
            train, valid = ((images[part].contiguous(memory_format=LAYOUTS[layout]), labels[part])
                            for part in pick)
            torch.manual_seed(step)  # of the noise of s4
            search_step(arch, optimizer, train, valid, unrolled=False, alpha_first=space != "nasbench201",
                        lambda_t=lambda_t, kind="cosine", epsilon=1e-4, method=method, grad_clip=5.0)
    return [p.detach().contiguous() for p in net.parameters()]


def assert_same(found, expected, tolerance=1e-6):
    """Equal to rounding, which the steps have multiplied."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", ["s2", "s4", "nasbench201"])
def test_without_lambda_every_estimator_is_plain_darts(space, method):
    assert_same(search(space, method, 1e-12), search(space, None, 0.0))
    assert any(float((a - b).abs().max()) > 1e-3 for a, b in zip(search(space), search(space, None, 0.0)))


CHANGES = [{"layout": "contiguous"}, {"fused": False}, {"engine": False}, {"permuted": True}]
OF_NOISE = [{"fused": False}, {"engine": False}]  # the noise of s4 is drawn in the order of memory


@pytest.mark.parametrize("space, changed", [(space, changed) for space in SPACES
                                            for changed in (OF_NOISE if space == "s4" else CHANGES)], ids=str)
def test_what_changes_nothing(space, changed):
    if "engine" in changed and not compiled_for("cpu"):
        pytest.skip("the extension is not compiled: no compiler here")
    assert_same(search(space, **changed), search(space))


@functools.cache
def training(cell, layout="channels-last", engine=True):
    """Losses of twenty steps of a derived network with dropped paths, then all its weights and statistics."""
    torch.manual_seed(3)
    if cell in genotypes.PUBLISHED:
        net = ldarts.Network(4, 10, 4, False, genotypes.load(cell))
    else:
        net = ldarts.NetworkNAS201(4, 10, 1, cell)
    net.double().to(memory_format=LAYOUTS[layout])
    if not engine:
        net.engine.runner = lambda x: run_plainly
    optimizer = torch.optim.SGD(net.parameters(), 0.025, 0.9, weight_decay=3e-4)
    x, y = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8)
    x, losses = x.contiguous(memory_format=LAYOUTS[layout]), []
    for step in range(20):
        losses.append(F.cross_entropy(net(x, 0.02 * step)[0], y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return [torch.stack(losses).detach(), *(t.detach().contiguous() for t in net.state_dict().values())]


@pytest.mark.parametrize("changed", [{"layout": "contiguous"}, {"engine": False}], ids=str)
@pytest.mark.parametrize("cell", ["LAMBDA_DARTS", "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+"
                                                  "|avg_pool_3x3~0|none~1|nor_conv_3x3~2|"])
def test_what_changes_nothing_in_a_training(cell, changed):
    if not compiled_for("cpu"):
        pytest.skip("the extension is not compiled: no compiler here")
    losses = training(cell)[0]
    assert_same(training(cell, **changed), training(cell), 1e-7)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("space", ["s2", "s4", "nasbench201"])  # the others by the fused optimizer above
def test_gradients_have_the_layout_of_their_parameters(space, layout):
    net = ldarts.SearchNetwork(2, 10, 1 if space == "nasbench201" else 4, space).to(
        memory_format=LAYOUTS[layout])
    arch = ldarts.Architect(net, F.cross_entropy)
    batch = torch.randn(2, 3, 8, 8).contiguous(memory_format=LAYOUTS[layout]), torch.arange(2)
    found = {f"α, unrolled {unrolled}": (arch.alpha_grads(batch, batch, 0.1, None, unrolled),
                                         net.arch_parameters()) for unrolled in (False, True)}
    for method in (None, *METHODS):
        found[f"w, {method}"] = arch.weight_grads(batch, "cosine", 1e-4, method, 0.1).dw, arch.weights
        if method:
            found[f"Λ, {method}"] = arch.lambda_grads(batch, "cosine", 1e-4, method)[2], arch.weights
    for name, (grads, parameters) in found.items():
        assert [grad.stride() for grad in grads] == [p.stride() for p in parameters], name


class Tf32(TorchDispatchMode):
    """Products and convolutions as a GPU computes them in TF32: of operands that are rounded to 10 bits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, switch = torch.ops.aten, None
        if function.overloadpacket in (aten.convolution, aten.convolution_backward):
            switch = torch.backends.cudnn.conv
        elif function.overloadpacket in (aten.mm, aten.addmm, aten.bmm):
            switch = torch.backends.cuda.matmul
        if switch and switch.fp32_precision == "tf32":
            args = [((arg.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
                    if isinstance(arg, torch.Tensor) else arg for arg in args]
        return function(*args, **kwargs or {})


@pytest.fixture
def tf32_switches():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("products", [False, pytest.param(True, marks=pytest.mark.skipif(
    not compiled_for("cpu"), reason="only the engine has products"))])
def test_tf32_does_not_reach_the_passes_of_a_difference(products, tf32_switches, monkeypatch):
    """Else they differ by their rounding errors. As on a GPU: separable convolutions are convolutions, those of
    one pixel are products, which some containers allow to be in TF32."""
    monkeypatch.setattr("ldarts.fused.cell.groups_separable", lambda x: False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, not products
    torch.manual_seed(0)
    net = ldarts.SearchNetwork(4, 10, 4, "s2")
    arch = ldarts.Architect(net, F.cross_entropy)
    x = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)

    def by_w():
        by_lambda = arch.lambda_grads((x, torch.arange(8)), "cosine", 1e-4, "central")[2]
        return torch.cat([t.flatten() for t in by_lambda])

    expected = by_w()
    with Tf32():
        found = by_w()
        monkeypatch.setattr("ldarts.architect.full_float32", contextlib.nullcontext)
        unguarded = by_w()
    cosines = [float(F.cosine_similarity(expected, other, 0)) for other in (found, unguarded)]
    print(f"\ncosine with float32: {cosines[0]:.3f}, in TF32 {cosines[1]:.3f}, "
          f"length {float(unguarded.norm() / expected.norm()):.1f}")
    assert cosines[0] > 0.99 and cosines[1] < 0.2


def switches() -> list:
    """Their values. The old ones cannot be read where the new ones say otherwise."""
    parts = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv,
             torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    readers = [torch.get_float32_matmul_precision, lambda: torch.backends.cudnn.allow_tf32]
    values = [part.fp32_precision for part in parts]
    for read in readers:
        with contextlib.suppress(RuntimeError):
            values.append(read())
    return values


def medium():
    torch.set_float32_matmul_precision("medium")


def old_products():
    torch.backends.cuda.matmul.allow_tf32 = True


def new_products():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def new_convolutions():
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # which makes the old switch unreadable


@pytest.mark.parametrize("change", [None, medium, old_products, new_products, new_convolutions])
def test_the_switches_of_tf32_can_be_read_and_are_put_back(change, tf32_switches):
    if change:
        change()
    before = switches()
    with full_float32():
        assert switches() == [*["ieee"] * 5, "highest", False]
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # reads them
            pass
    assert switches() == before
