"""The fused sum against its reference: a grid of dtype, layout, shape, number of terms, on each device."""
import sys

import pytest
import torch

from ldarts.fused import compiled_for
from ldarts.fused.sums import affine_sums, channel_sums, mixed_sum, mixed_sum_ref

MODULE = sys.modules["ldarts.fused.sums"]  # fused.mixed_sum is the function
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}
needs_build = pytest.mark.skipif(not compiled_for("cpu"),
                                 reason="the extension is not compiled: no compiler here")


def sample(shape, count, dtype, device="cpu", layout=torch.contiguous_format, weights_dtype=None, grad=False):
    generator = torch.Generator().manual_seed(count)

    def one(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = one(count).to(device, weights_dtype or dtype).requires_grad_(grad)
    terms = [one(*shape).to(device, dtype).contiguous(memory_format=layout).requires_grad_(grad)
             for _ in range(count)]
    return weights, terms


@needs_build
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 35, 65])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 16, 8, 8), (1, 1, 1, 1), (0, 4, 3, 3), (3, 8, 37, 41)],
                         ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_reference(dtype, layout, shape, count, device):
    weights, terms = sample(shape, count, dtype, device, layout, grad=True)
    out = mixed_sum(weights, terms)
    assert out.shape == shape and out.dtype == dtype
    assert not out.numel() or out.is_contiguous(memory_format=layout)
    grad = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    found = torch.autograd.grad(out, [weights, *terms], grad)
    again = torch.autograd.grad(mixed_sum(weights, terms), [weights, *terms], grad)
    wide = [t.detach().double().requires_grad_() for t in (weights, *terms)]
    expected_out = mixed_sum_ref(wide[0], wide[1:])
    expected = torch.autograd.grad(expected_out, wide, grad.double())
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=tolerance, atol=tolerance * count ** 0.5)
    scale = max(1.0, out.numel() ** 0.5)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=tolerance, atol=tolerance * scale)
    for f, e in zip(found[1:], expected[1:]):
        torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(found, again))  # the same bits twice


@needs_build
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_any_order(layout, device):
    weights, terms = sample((2, 3, 2, 3), 3, torch.float64, device, layout, grad=True)

    def function(weights, *terms):
        return mixed_sum(weights, terms)

    assert torch.autograd.gradcheck(function, (weights, *terms))
    assert torch.autograd.gradgradcheck(function, (weights, *terms))


@needs_build
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    weights, terms = sample((2, 3, 4, 5), 3, torch.float32, device, grad=True)
    rows = torch.rand(4, 3, device=device, requires_grad=True)
    images = [t.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for t in terms]
    ops = torch.ops.ldarts
    torch.library.opcheck(ops.mixed_sum.default, (weights, terms))
    entries = [0, 1, 2, 0], [0, 3, -1, 2], [1, -1, -1, 0], [3, 1]  # z, scales, shifts; of sums of 3 and of 1
    torch.library.opcheck(ops.affine_sums.default, (images, [rows[:2], rows[2:]], [rows[:2]], *entries))
    torch.library.opcheck(ops.channel_sums.default, (images, [images[0], images[2], images[1]]))


@needs_build
@pytest.mark.parametrize("device", DEVICES)
def test_the_two_sums_are_each_other_s_derivative(device):
    """A scale and a tensor in several entries, shifts, a row in none, pairs of one tensor."""
    def image():
        t = torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device)
        return t.contiguous(memory_format=torch.channels_last).requires_grad_()

    torch.manual_seed(0)
    z, scales, shifts = [image(), image()], *(torch.rand(2, n, 3, dtype=torch.float64, device=device)
                                              .requires_grad_() for n in (2, 1))
    sums = [[(0, 0, 0), (1, 2, -1), (1, -1, 1)], [(0, 2, -1)], [(1, -1, -1)]]

    def affine(scales, shifts, *z):
        return tuple(affine_sums(z, scales.unbind(), shifts.unbind(), sums))

    def expected(scales, shifts, *z):
        s, t = (rows.flatten(0, 1)[:, :, None, None] for rows in (scales, shifts))
        return s[0] * z[0] + t[0] + s[2] * z[1] + z[1] + t[1], s[2] * z[0], z[1]

    def channel(x, y):
        return channel_sums([x, x, y, y], [y, x, y, x])

    inputs = scales, shifts, *z
    for found, wanted in zip(affine(*inputs), expected(*inputs)):
        torch.testing.assert_close(found, wanted)
    by_hand = torch.stack([z[0].sum((0, 2, 3)), (z[0] * z[1]).sum((0, 2, 3))])
    torch.testing.assert_close(channel(*z)[0], by_hand)
    for function, inputs in ((affine, inputs), (channel, z)):
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@needs_build
@pytest.mark.parametrize("change, message", [
    ({"entries": [2]}, "1 sums of 2 entries; 1 z"), ({"z_of_entry": [3]}, "entry 0 is of z 3"),
    ({"scales": [torch.ones(2, 4)]}, r"expected \[N, 4, H, W\]"), ({"entries": [0, 1]}, "has no entry"),
    ({"shifts": [torch.ones(1, 2)]}, "2 numbers a row, expected 3"),
    ({"scales": [torch.ones(1, 0)]}, r"expected \[rows\] or \[rows, C\]")], ids=str)
def test_wrong_entries_are_named(change, message):
    arguments = {"z": [torch.ones(2, 3, 2, 2)], "scales": [torch.ones(1, 3)], "shifts": [], "z_of_entry": [0],
                 "scale_of_entry": [0], "shift_of_entry": [-1], "entries": [1]} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.ldarts.affine_sums(**arguments)


@needs_build
def test_a_transformed_sum_is_that_of_the_reference():
    """torch.func and forward mode, for which the operators have no rules."""
    weights, terms = sample((2, 3, 2, 2), 3, torch.float64)
    for transform in (lambda f: torch.func.jvp(f, (weights,), (weights,))[1],
                      lambda f: torch.func.jacrev(f)(weights),
                      lambda f: torch.func.grad(lambda w: f(w).square().sum())(weights),
                      lambda f: torch.func.vmap(f)(torch.stack([weights, 2 * weights])),
                      lambda f: torch.func.vmap(lambda t: f(weights, [t, t, t]))(torch.stack(terms))):
        found, expected = (transform(lambda w, ts=terms, f=f: f(w, ts)) for f in (mixed_sum, mixed_sum_ref))
        torch.testing.assert_close(found, expected)
        assert float(found.abs().max()) > 0


@needs_build
def test_compiles_without_a_graph_break():
    weights, terms = sample((2, 3, 4, 4), 4, torch.float32, grad=True)

    def function(weights, terms):
        return mixed_sum(weights.softmax(0), [term.relu() for term in terms]).sum()

    expected = torch.autograd.grad(function(weights, terms), [weights, *terms])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, e in zip(torch.autograd.grad(compiled(weights, terms), [weights, *terms]), expected):
        torch.testing.assert_close(found, e)


@needs_build
def test_the_same_bits_whatever_the_number_of_threads():
    weights, terms = sample((16, 16, 32, 32), 9, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((mixed_sum(weights, terms), channel_sums([terms[0]] * 9, terms)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_build
def test_wider_weights_and_gradients_of_other_layouts():
    weights, terms = sample((4, 8, 5, 5), 6, torch.bfloat16, layout=torch.channels_last,
                            weights_dtype=torch.float32, grad=True)
    out = mixed_sum(weights, terms)
    assert out.dtype == torch.bfloat16
    grad = torch.randn(1, dtype=torch.bfloat16).expand(4, 8, 5, 5)  # strides of 0
    d_weights, *d_terms = torch.autograd.grad(out, [weights, *terms], grad)
    assert d_weights.dtype == torch.float32 and all(d.dtype == torch.bfloat16 for d in d_terms)
    expected = torch.stack([(grad.double() * t.double()).sum() for t in terms])
    torch.testing.assert_close(d_weights.double(), expected, rtol=1e-4, atol=1e-4)


@needs_build
def test_only_asked_gradients_are_computed():
    weights, terms = sample((2, 4, 4, 4), 3, torch.float32)
    terms[1].requires_grad_()
    (found,) = torch.autograd.grad(mixed_sum(weights, terms).sum(), terms[1])
    torch.testing.assert_close(found, weights[1].expand_as(found))


def mismatches():
    """(name, weights, terms, message)"""
    weights, terms = sample((2, 4, 3, 3), 3, torch.float32)
    other = {"shape": terms[2][:, :, :2].contiguous(), "dtype": terms[2].double(),
             "device": terms[2].to("meta"), "memory format": terms[2].contiguous(memory_format=torch.channels_last)}
    for name, term in other.items():
        yield name, weights, [*terms[:2], term], f"term 2 has {name}"
    yield "a slice", weights, [t[:, :, :, ::2] for t in terms], "term 0 has memory format"
    yield "too few weights", weights[:2], terms, r"weights have shape \[2\], expected \[3\]"
    yield "narrow weights", weights.half(), terms, "weights have dtype"
    yield "whole numbers", weights, [t.long() for t in terms], "term 0 has dtype"
    yield "complex weights", weights.cfloat(), terms, "weights have dtype"
    yield "weights elsewhere", weights.to("meta"), terms, "weights have device meta"
    yield "no terms", weights[:0], [], "at least one term"


@pytest.mark.parametrize("force", [False, True], ids=["default", "reference"])
@pytest.mark.parametrize("name, weights, terms, message", list(mismatches()),
                         ids=[m[0] for m in mismatches()])
def test_a_mismatch_names_the_term_and_the_property(name, weights, terms, message, force, monkeypatch):
    if force:
        monkeypatch.setattr(MODULE, "compiled_for", lambda device: False)
    with pytest.raises(ValueError, match=message):
        mixed_sum(weights, terms)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU; there is none")
def test_cuda_graph_capture():
    weights, terms = sample((64, 16, 32, 32), 7, torch.float32, "cuda", grad=True)
    grad = torch.randn(64, 16, 32, 32, device="cuda")
    expected = torch.autograd.grad(mixed_sum(weights, terms), [weights, *terms], grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(mixed_sum(weights, terms), [weights, *terms], grad)
    graph.replay()
    assert all(torch.equal(f, e) for f, e in zip(found, expected))
