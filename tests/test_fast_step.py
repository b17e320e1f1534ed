"""The engine against the plain form: separable convolutions, normalised sums, what a state computes once."""
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import ldarts
from ldarts import bench, fused, genotypes
from ldarts.fused import compiled_for
from ldarts.fused.normalised_sum import constant, node_sum, normalised_terms
from ldarts.fused.separable import separable_convolutions
from ldarts.fused.sums import affine_sums
from ldarts.operations import DilConv, SepConv

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
needs_build = pytest.mark.skipif(not compiled_for("cpu"),
                                 reason="the extension is not compiled: no compiler here")


def images(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def compare(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        atol = tolerance * max(1.0, float(b.detach().abs().max()))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=atol)


BANKS = {torch.float64: 1e-11, torch.float32: 2e-4}  # tolerances; in float32 a ReLU may be on its other side


@needs_build
@pytest.mark.parametrize("dtype, C", [*itertools.product(BANKS, [1, 3, 8, 16, 20, 32]), (torch.float64, 64)],
                         ids=str)
@pytest.mark.parametrize("size", [(5, 7), (8, 8), (3, 1), (34, 33)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_bank_is_its_operations(stride, size, dtype, C):
    """Two stages of every kind of unit, weighted and summed as a node, against the operations one by one; in
    float64 twice differentiated, of 41 images in more than 8 chunks, and of zeros, where no gradient passes."""
    ops = [SepConv(C, C, 3, stride, 1, False), SepConv(C, C, 5, stride, 2, False),
           DilConv(C, C, 3, stride, 2, 2, False), DilConv(C, C, 5, stride, 4, 2, False)]
    for op in ops:
        op.to(dtype)
    seps = ops[:2]
    tolerance, N = BANKS[dtype], 41 if (dtype, C) == (torch.float64, 3) else 3 if C == 64 else 9
    x, p = images(N, C, *size, dtype=dtype), torch.rand(4, dtype=dtype).requires_grad_()
    if wide := dtype == torch.float64:
        x[0, :, 0] = 0.0
    x.requires_grad_()
    weights = [w for op in ops for w in op.parameters()]

    of_all = torch.cat([torch.ones(2, dtype=dtype), p[2:]])
    zs, inner, dils = separable_convolutions([x], None, [tuple(op.op[1:4]) for op in ops], of_all, [0, 0])
    second = [tuple(op.op[5:8]) for op in seps]
    _, _, twice = separable_convolutions(zs[:2], inner, second, p[:2], [0, 1])
    found = node_sum([*twice.values(), *dils.values()])
    statistics = [b.clone() for op in ops for b in op.buffers()]
    for op in ops:
        for module in op.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
    expected = sum(w * op(x) for w, op in zip(p, ops))
    compare([found, *statistics], [expected, *[b for op in ops for b in op.buffers()]], tolerance)
    grad = images(*expected.shape, dtype=dtype)
    inputs = [x, p, *weights]
    grads = [torch.autograd.grad(y, inputs, grad, create_graph=wide) for y in (found, expected)]
    compare(*grads, tolerance * 20)
    if wide:
        along = [torch.randn_like(g) for g in grads[0]]
        compare(*(torch.autograd.grad(of_all, inputs, along) for of_all in grads), 1e-9)


@needs_build
@pytest.mark.parametrize("asked", ["x", "weights"])
def test_only_asked_gradients_of_a_separable_convolutions(asked):
    op = SepConv(4, 4, 3, 1, 1, False).double()
    x = images(2, 4, 6, 6).requires_grad_(asked == "x")
    if asked == "x":
        op.requires_grad_(False)
    inputs = [x] if asked == "x" else list(op.parameters())
    p = torch.ones(1, dtype=torch.float64)
    zs, inner, _ = separable_convolutions([x], None, [tuple(op.op[1:4])], p, [])
    found = node_sum([separable_convolutions(zs, inner, [tuple(op.op[5:8])], p, [0])[2][0]])
    grad = images(*found.shape)
    compare(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(op(x), inputs, grad), 1e-10)


SUPERNETS = [("darts", 2), ("s1", 6), ("s2", 16), ("s3", 4), ("nasbench201", 3)]
GPU_ENGINES = ["as on a GPU"] + (["cuda"] if torch.cuda.is_available() else [])


@needs_build
@pytest.mark.parametrize("space, C, engine", [(*net, "cpu") for net in SUPERNETS] + [
    (*net, engine) for engine in GPU_ENGINES for net in (SUPERNETS[0], SUPERNETS[-1])])
def test_a_supernet_of_banks_has_the_derivatives_of_the_plain_one(space, C, engine, monkeypatch):
    """Loss, gradients w.r.t. w and p, their gradients along random directions, batch-norm statistics."""
    device = "cuda" if engine == "cuda" else "cpu"
    if engine != "cpu":  # the separable convolutions are those of the cell, the norms and sums are not
        monkeypatch.setattr("ldarts.fused.cell.groups_separable", lambda x: False)
    nets = [ldarts.SearchNetwork(C, 10, 1 if space == "nasbench201" else 3, space).double().to(
        device, memory_format=torch.channels_last) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = images(3, 3, 12, 12).to(device), torch.tensor([1, 2, 3], device=device)
    results = []
    for net, engine in zip(nets, (True, False)):
        monkeypatch.setattr(fused, "engine_supports", lambda x, engine=engine: engine)
        torch.manual_seed(1)
        w, p = net.weight_parameters(), [q.detach().clone().requires_grad_() for q in net.cell_weights()]
        loss = F.cross_entropy(net(x, p), y)
        first = torch.autograd.grad(loss, [*w, *p], create_graph=True)
        directions = [torch.randn(g.shape, dtype=g.dtype).to(device) for g in first]
        of_all = torch.autograd.grad(first, [*w, *p], directions, retain_graph=True, materialize_grads=True)
        # As the exact gradient of Λ takes it: of the g_l alone.
        of_p = torch.autograd.grad(first[len(w) :], w, directions[len(w) :], materialize_grads=True)
        results.append([loss, *first, *of_all, *of_p, *[b.double() for b in net.buffers()]])
    compare(*results, 1e-9)


@needs_build
def test_a_fan_is_its_products():
    """Three z on two edges, two of them behind batch norms, which one is on both edges."""
    z = [images(2, 3, 4, 4).requires_grad_() for _ in range(3)]
    p = torch.rand(4, dtype=torch.float64).requires_grad_()
    norms = [[torch.nn.BatchNorm2d(3, affine=False).double() for _ in range(count)] for count in (2, 0, 1)]

    def fused(p, *z):
        edges = [(z[0], norms[0][0]), (z[1], None)], [(z[2], norms[2][0]), (z[0], norms[0][1])]
        return tuple(node_sum([terms]) for terms in normalised_terms(edges, p))

    def plain(p, *z):
        normed = [F.batch_norm(one, None, None, training=True) if of_z else one
                  for one, of_z in zip(z, norms)]
        return p[0] * normed[0] + p[1] * normed[1], p[2] * normed[2] + p[3] * normed[0]

    assert torch.autograd.gradcheck(fused, (p, *z)) and torch.autograd.gradgradcheck(fused, (p, *z))
    compare(fused(p, *z), plain(p, *z), 1e-12)
    compare(torch.autograd.grad(fused(p, *z), [p, *z], plain(p, *z)),
            torch.autograd.grad(plain(p, *z), [p, *z], plain(p, *z)), 1e-11)
    for one, of_z in zip(z, norms):
        for norm in of_z:
            expected = torch.nn.BatchNorm2d(3, affine=False).double()
            for _ in range(int(norm.num_batches_tracked)):
                expected(one)
            compare(norm.buffers(), expected.buffers(), 1e-12)


@needs_build
def test_the_same_bits_whatever_the_number_of_threads_of_a_separable_convolutions():
    op = SepConv(8, 8, 3, 1, 1, False)
    x = images(20, 8, 9, 9, dtype=torch.float32).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            zs, inner, _ = separable_convolutions([x], None, [tuple(op.op[1:4])], torch.ones(1), [])
            grads = torch.autograd.grad((zs[0] ** 2).sum(), [x, op.op[1].weight, op.op[2].weight])
            results.append([*zs, inner, *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_build
def test_sums_of_weights_per_channel():
    """Of tensors in another layout too, which are brought into that of the sum."""
    z, (scale, shift) = [images(2, 5, 3, 3) for _ in range(9)], torch.rand(2, 9, 5, dtype=torch.float64)
    z[3] = z[3].contiguous()
    expected = sum(w[:, None, None] * term + b[:, None, None] for w, b, term in zip(scale, shift, z))
    found = affine_sums(z, scale.split([2, 7]), shift.split([4, 5]), [[(m, m, m) for m in range(9)]])
    compare(found, [expected], 1e-12)


@needs_build
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("C", [3, 16])
def test_float32_sums_do_not_cancel(C, device):
    """Variances, and sums of products with deviations, of channels whose mean is 1000 deviations from 0."""
    z, grad = (images(4, C, 19, 21, dtype=torch.float32).to(device) for _ in range(2))
    z += 1000
    sums, (grads, products) = torch.ops.ldarts.channel_sums([z, grad], [z, z])
    found = [(z, sums)]
    if device == "cpu":  # and of what a separable convolution makes
        weights = [torch.ones(C, 1, 3, 3)], [torch.eye(C)[:, :, None, None] + torch.rand(C, C, 1, 1)]
        (other,), (sums,) = torch.ops.ldarts.separable_forward([z], None, *weights, 1, [1])
        found.append((other, sums))
    for one, (sums, squares) in found:
        n, variance = one.numel() // C, one.double().var((0, 2, 3), unbiased=False)
        compare([(squares / n - (sums / n) ** 2) / variance], [torch.ones_like(variance)], 1e-6)
    mean = z.double().mean((0, 2, 3))
    compare([found[0][1][0] / n], [mean], 1e-9)
    compare([products - mean * grads], [(grad * (z.double() - mean[:, None, None])).sum((0, 2, 3))], 1e-5)


@needs_build
def test_logits_in_float32_are_as_exact_as_contiguous_ones():
    """PyTorch's batch norm sums channels-last pixels in float32 one by one on a CPU: 5 to 10 times more."""
    wide = ldarts.SearchNetwork(8, 10, 3, "s2").double()
    x, threads = torch.randn(32, 3, 32, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, errors = wide(x.double()), []
        for layout, engine in ((torch.contiguous_format, False), (torch.channels_last, True)):
            net = copy.deepcopy(wide).float().to(memory_format=layout)
            with pytest.MonkeyPatch.context() as patch:
                if not engine:
                    patch.setattr(fused, "engine_supports", lambda x: False)
                errors.append((net(x.contiguous(memory_format=layout)) - expected).norm().item())
    finally:
        torch.set_num_threads(threads)
    assert errors[1] < 2.5 * errors[0]


@needs_build
def test_mismatches_of_a_bank_are_named():
    ops, x = torch.ops.ldarts, images(2, 4, 5, 5)
    dw, pw = torch.randn(4, 1, 3, 3).double(), torch.randn(4, 4, 1, 1).double()
    for arguments, named in ((([x], [dw, dw], [pw]), "expected as many"),
                             (([x], [dw[:3]], [pw]), "depthwise weight 0"),
                             (([x], [dw], [pw[:, :3]]), "pointwise weight 0"),
                             (([x], [dw.float()], [pw]), "dtype"),
                             (([x, x[:1]], [dw] * 2, [pw] * 2), "shape")):
        x_, dw_, pw_ = arguments
        with pytest.raises(ValueError, match=named):
            ops.separable_forward(x_, None, dw_, pw_, 1, [1] * len(dw_))


def test_channels_last_computes_what_the_default_layout_does():
    net = ldarts.SearchNetwork(4, 10, 4, "darts").double()
    arch = ldarts.Architect(net, F.cross_entropy)
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net.to(memory_format=layout)
        batch = x.contiguous(memory_format=layout), y
        loss, dw, d_lambda, value = arch.lambda_grads(batch, "cosine", 1e-4, "exact")
        results.append([loss, value, *dw, *d_lambda])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def timed(monkeypatch, capsys, *flags):
    """(what bench reports of a small network, its rows under "rows"; its progress on standard error)"""
    monkeypatch.setattr("sys.argv", ["bench", *flags, "--init_channels", "4", "--layers", "4",
                                     "--batch_size", "2", "--steps", "1", "--device", "cpu"])
    found, report = {}, bench.report

    def note(args, rows, **facts):
        found.update(vars(args) | facts | {"rows": [*rows]})
        report(args, found["rows"], **facts)

    monkeypatch.setattr(bench, "report", note)
    monkeypatch.setattr("ldarts.errors.progress.__defaults__", (0.001,))
    bench.main()
    return found, capsys.readouterr().err


@pytest.fixture
def passes(monkeypatch):
    """(form, whether in channels-last) of each pass of a network in the test, by its call of the stem."""
    found = []

    def watch(owner, name, form):
        original = getattr(owner, name)

        def run(*args):
            if isinstance(args[-2], torch.nn.Sequential):
                found.append((form, args[-1].is_contiguous(memory_format=torch.channels_last)))
            return original(*args)

        monkeypatch.setattr(owner, name, run)

    watch(fused.Pass, "__call__", "engine")
    watch(bench, "run_plainly", "plain")
    return found


@pytest.mark.parametrize("method", ["none", "central", "exact"])
def test_a_timed_step_is_one_object_with_its_parts(method, monkeypatch, capsys):
    calls = []
    for name in ("search_step", "weight_step"):
        def call(*args, function=getattr(bench, name), name=name, **options):
            calls.append((name, options["method"] or "none"))
            return function(*args, **options)

        monkeypatch.setattr(bench, name, call)
    profile = 10 if method == "none" else 0
    found, progress = timed(monkeypatch, capsys, "step", "--search_space", "s2", "--lambda_grad", method,
                            "--profile", str(profile))
    assert "step: round 1 of 2\n" in progress and "weight_step: round 1 of 2\n" in progress
    assert calls == [("search_step", method)] * 2 + [("weight_step", method)] * 2 + [
        ("search_step", method)] * bool(profile)
    assert min(found["seconds_per_step"], found["seconds_per_weight_step"]) > 0 and found["peak_mib"] > 50
    operations = found["rows"]
    assert len(operations) == profile and all(a["ms"] >= b["ms"] > 0 for a, b in itertools.pairwise(operations))


FORMS = {"default layout": ("plain", False), "channels-last": ("plain", True), "ours": ("engine", True)}


@needs_build
@pytest.mark.parametrize("flags, passes_a_step", [
    ("step --compare --graph --search_space s2 --lambda_grad none", 2), ("eval", 1)])
def test_compared_steps_take_turns(flags, passes_a_step, passes, monkeypatch, capsys):
    found, _ = timed(monkeypatch, capsys, *flags.split())
    assert passes == [form for form in FORMS.values() for _ in range(passes_a_step)] * 2
    assert not found["graph"]
    seconds = {row["variant"]: row["seconds"] for row in found["rows"]}
    assert list(seconds) == list(FORMS) and min(seconds.values()) > 0
    for row in found["rows"]:
        assert row["times_ours"] == pytest.approx(row["seconds"] / seconds["ours"])


def test_one_image_does_not_pass_the_tower():
    with pytest.raises(ldarts.InputError, match="1 images of 32x32 pixels"):
        bench.steps_of(bench.parse_args(["eval", "--batch_size", "1", "--device", "cpu"]), "ours")


@needs_build
@pytest.mark.parametrize("variant", FORMS)
def test_one_variant_of_training_has_its_memory_and_a_profile(variant, passes, monkeypatch, capsys):
    found, _ = timed(monkeypatch, capsys, "eval", "--variant", variant, "--profile", "3")
    assert passes == [FORMS[variant]] * 3 and len(found["rows"]) == 3
    assert found.get("fused", True) == (variant == "ours")
    assert (found["memory_format"] == "channels_last") == passes[0][1]
    assert found["seconds_per_step"] > 0 and found["peak_mib"] > 50


@needs_build
def test_rows_of_the_sum_are_printed_with_their_ratios(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", *"mixed_sum --stages 3 --terms 2 --dtypes float32 "
                                     " --no-compile --device cpu".split()])
    bench.main()
    facts, *table = capsys.readouterr().out.splitlines()
    header, *rows = (line.split(" | ") for line in table)
    assert "command mixed_sum" in facts and [row[4] for row in rows] == ["forward", "forward+backward"] * 2
    for row, moved in zip(rows, (3, 8, 3, 8)):  # tensors of the size of a term; a copy of both terms moves 4
        row = {name: float(cell) for name, cell in zip(header[5:], row[5:])}
        assert row["speedup"] == pytest.approx(row["reference_ms"] / row["fused_ms"], rel=0.01)
        assert row["of_copy"] == pytest.approx(moved / 4 * row["copy_ms"] / row["fused_ms"], rel=0.01)
        assert row["GBps"] == pytest.approx(moved * 64 * 64 * 8 * 8 * 4 / row["fused_ms"] / 1e6, rel=0.01)


@pytest.mark.parametrize("space, layers", [("s2", 4), ("nasbench201", 1)])
def test_a_pass_in_inference_mode_leaves_nothing_that_training_cannot_read(space, layers):
    net = ldarts.SearchNetwork(4, 10, layers, space).to(memory_format=torch.channels_last)
    x = images(4, 3, 16, 16, dtype=torch.float32)
    constant.cache_clear()
    with torch.inference_mode():
        net(x)
    F.cross_entropy(net(x), torch.arange(4)).backward()


@needs_build
@pytest.mark.parametrize("kind", ["supernet", "derived network"])
def test_gradients_have_the_strides_of_their_weights(kind):
    """Or DistributedDataParallel warns, and every optimizer's step copies them first."""
    net = (ldarts.SearchNetwork(4, 10, 4, "darts") if kind == "supernet"
           else ldarts.Network(4, 10, 4, False, genotypes.load("LAMBDA_DARTS")))
    net.to(memory_format=torch.channels_last)
    weights = list(net.parameters())
    out = net(images(2, 3, 16, 16, dtype=torch.float32))
    logits = out if kind == "supernet" else out[0]
    grads = torch.autograd.grad(logits.sum(), weights, materialize_grads=True)
    assert [g.stride() for g in grads] == [w.stride() for w in weights]


@needs_build
def test_a_nan_reaches_the_gradients_that_it_reaches_without_the_engine(monkeypatch):
    found = []
    for engine in (True, False):
        monkeypatch.setattr(fused, "engine_supports", lambda x, engine=engine: engine)
        torch.manual_seed(0)
        net = ldarts.Network(4, 10, 4, False, genotypes.load("LAMBDA_DARTS")).double()
        net.to(memory_format=torch.channels_last)
        x = images(4, 3, 16, 16)
        x[0, 0, 3, 3] = torch.nan
        grads = torch.autograd.grad(net(x, 0.0)[0].sum(), list(net.parameters()))
        found.append({name: int(g.isnan().sum()) for (name, _), g in zip(net.named_parameters(), grads)})
    assert found[0] == found[1] and 0 < sum(found[0].values())
