"""The mathematics, in float64, against arrays computed by the published code (tests/golden/README.md).

In the default layout the plain form computes, in channels-last the engine.
"""
import json

import pytest
import torch
import torch.nn.functional as F

import ldarts
from conftest import GOLDEN
from ldarts.fused import compiled_for, engine_supports
from ldarts.runs import count_parameters

CASES = ["s5_cosine", "s2_sign_unrolled"]
LAYOUTS = {"plain": torch.contiguous_format, "engine": torch.channels_last}
DOUBLE, SINGLE = 1e-10, 1e-7  # bounds for what is stored in float64 and for what is stored in float32
KINDS = {"corr": "cosine", "signcorr": "sign"}


def relative(found, expected):
    """Largest error relative to the largest magnitude, over a tensor or a list of them."""
    found, expected = (torch.cat([t.detach().flatten() for t in ts]) if isinstance(ts, (list, tuple))
                       else ts.detach() for ts in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max())


def supernet(case):
    c = case.config
    net = ldarts.SearchNetwork(c["C"], c["num_classes"], c["layers"], c["space"])
    net.to(torch.float64, memory_format=case.layout)
    state = case.group("state")
    alphas = {"alphas_normal": case["alphas_normal"], "alphas_reduce": case["alphas_reduce"]}
    missing, unexpected = net.load_state_dict(state | alphas, strict=False)
    assert not unexpected
    assert all(k.endswith(("running_mean", "running_var", "num_batches_tracked")) for k in missing)
    arch = ldarts.Architect(net, F.cross_entropy, c["arch_learning_rate"], c["arch_betas"],
                            c["arch_weight_decay"], c["momentum"], c["weight_decay"])
    return net, arch


def batch(case, stream, step=0):
    return case[f"x_{stream}"][step].contiguous(memory_format=case.layout), case[f"y_{stream}"][step]


def named(net, tensors):
    """Gradients in the order of weight_parameters() -> in the order of the golden names."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)]: t for p, t in zip(net.weight_parameters(), tensors)}


def compare(net, tensors, expected, tolerance):
    """Each tensor by itself: the gradients of biases and pointwise convolutions are far below the largest."""
    by_name = named(net, tensors)
    assert set(by_name) == set(expected)
    errors = {name: relative(by_name[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < tolerance, max(errors, key=errors.get)


@pytest.fixture(params=[(name, layout) for name in CASES for layout in LAYOUTS], ids="-".join)
def case(request, golden):
    name, layout = request.param
    return with_layout(golden(name), LAYOUTS[layout])


@pytest.fixture(params=CASES)
def in_engine(request, golden):
    return with_layout(golden(request.param), LAYOUTS["engine"])


def with_layout(case, layout):
    case.layout = layout
    return case


def test_logits_and_loss(case):
    net, _ = supernet(case)
    x, y = batch(case, "train")
    assert engine_supports(x) == compiled_for("cpu")  # unless LDARTS_FUSED=off
    logits = net(x)
    assert relative(logits, case["logits"]) < DOUBLE
    assert relative(F.cross_entropy(logits, y), case["loss"]) < DOUBLE


@pytest.mark.parametrize("unrolled", [False, True])
def test_alpha_gradients(case, unrolled):
    net, arch = supernet(case)
    found = arch.alpha_grads(batch(case, "train"), batch(case, "valid"), case.config["learning_rate"], None,
                             unrolled)
    order = "second" if unrolled else "first"
    for g, which in zip(found, ("normal", "reduce")):
        assert relative(g, case[f"dalpha_{order}_{which}"]) < DOUBLE


def test_layer_gradients_alignment_and_direction(case):
    net, arch = supernet(case)
    p = arch.cell_leaves()
    x, y = batch(case, "train")
    grads = torch.autograd.grad(F.cross_entropy(net(x, p), y), p)
    for which, reduction in (("normal", False), ("reduce", True)):
        found = torch.stack([g.flatten() for g, cell in zip(grads, net.cells) if cell.reduction == reduction])
        assert relative(found, case[f"layer_grads_{which}"]) < DOUBLE
    value, _ = arch.alignment(grads, "cosine")
    assert relative(value, case["alignment_normal"]) < DOUBLE
    for prefix, kind in KINDS.items():
        _, u = arch.alignment(grads, kind)
        assert [d is None for d in u] == [cell.reduction for cell in net.cells]
        u = torch.stack([d for d in u if d is not None])
        assert relative(u, case[f"{prefix}/direction_normal"]) < DOUBLE
        assert relative(case.config["epsilon_0"] / u.norm(), case[f"{prefix}/epsilon"]) < DOUBLE


@pytest.mark.parametrize("prefix", KINDS)
def test_lambda_gradient(case, prefix):
    net, arch = supernet(case)
    loss, dw, d_lambda, _ = arch.lambda_grads(
        batch(case, "train"), KINDS[prefix], case.config["epsilon_0"], "central")
    assert relative(loss, case["loss"]) < DOUBLE
    compare(net, dw, case.group("dweight"), SINGLE)
    compare(net, d_lambda, case.group(f"{prefix}/alignment_grad"), SINGLE)


@pytest.mark.parametrize("kind", ["cosine", "sign"])
def test_exact_equals_central_at_a_small_radius(in_engine, kind):
    case = in_engine
    net, arch = supernet(case)
    exact, central = (arch.lambda_grads(batch(case, "train"), kind, epsilon, method)[2]
                      for method, epsilon in (("exact", 0.0), ("central", 1e-7)))
    assert relative(central, exact) < 1e-5


def test_exact_second_order_equals_a_difference_at_a_small_radius(in_engine):
    """The published radius crosses kinks of the ReLUs; 1e-7, in float64, does not."""
    case = in_engine
    net, arch = supernet(case)
    arguments = batch(case, "train"), batch(case, "valid"), case.config["learning_rate"], None, True
    first = arch.alpha_grads(*arguments[:-1], False)
    exact = arch.alpha_grads(*arguments, hessian="exact")
    # The product alone, as d/dr of ∂L_train/∂α along ∇_w' L_valid, by a difference of our own.
    w = net.weight_parameters()
    loss = lambda b: F.cross_entropy(net(b[0]), b[1])
    saved = [p.detach().clone() for p in w]
    with arch.kept(grad=True):
        dw = torch.autograd.grad(loss(arguments[0]), w)
        with torch.no_grad():
            for p, g in zip(w, dw):
                p -= arguments[2] * (g + 3e-4 * p)
        grads = torch.autograd.grad(loss(arguments[1]), [*net.arch_parameters(), *w])
        r, sides = 1e-7, []
        for s in (1, -1):
            with torch.no_grad():
                for p, q, v in zip(w, saved, grads[2:]):
                    p.copy_(q + s * r * v)
            sides.append(torch.autograd.grad(loss(arguments[0]), net.arch_parameters()))
    expected = [d - arguments[2] * (a - b) / (2 * r) for d, a, b in zip(grads, *sides)]
    assert relative(exact, expected) < 1e-5
    assert relative(first, expected) > 1e-2  # the ξ term is not a detail


def run_steps(case, lambda_sign=1, alpha_first=True, unrolled=None):
    """Three search steps as the training script takes them."""
    from ldarts.architect import search_step
    c = case.config
    net, arch = supernet(case)
    optimizer = torch.optim.SGD(net.weight_parameters(), 1.0, c["momentum"], weight_decay=c["weight_decay"])
    optimizer.param_groups[0]["lr"] = c["learning_rate"]  # as a scheduler does; the step reads it, too
    losses, alphas = [], []
    for i in range(3):
        grads = search_step(arch, optimizer, batch(case, "train", i), batch(case, "valid", i),
                            unrolled=c["unrolled_steps"] if unrolled is None else unrolled,
                            alpha_first=alpha_first, lambda_t=lambda_sign * c["lambda_reg"],
                            kind=KINDS[c["kind"]], epsilon=c["epsilon_0"], method="central",
                            grad_clip=c["grad_clip"])
        losses.append(grads.loss)
        alphas.append([a.detach().clone() for a in net.arch_parameters()])
    final = case.group("steps/final")
    weights = dict(net.named_parameters())
    return (relative(torch.stack(losses), case["steps/loss"]),
            max(relative(torch.stack([a[k] for a in alphas]), case[f"steps/alphas_{which}"])
                for k, which in enumerate(("normal", "reduce"))),
            max(relative(weights[k], tensor) for k, tensor in final.items()))


def test_three_steps(case):
    loss, alphas, weights = run_steps(case)
    assert loss < DOUBLE and alphas < DOUBLE and weights < SINGLE


@pytest.mark.parametrize("changed, what, least", [
    ({"lambda_sign": -1}, 2, 1e-4), ({"alpha_first": False}, 1, 1e-5), ({"unrolled": False}, 1, 1e-5)],
    ids=str)
def test_three_steps_notice_what_is_changed(changed, what, least, golden):
    """Another sign of Λ in the weights; w before α, and the first order, in α."""
    case = with_layout(golden("s2_sign_unrolled"), LAYOUTS["engine"])
    assert run_steps(case, **changed)[what] > least


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nasbench201(layout, golden):
    case = golden("nb201_cosine")
    c = case.config
    net = ldarts.SearchNetwork(c["C"], 10, c["N"], "nasbench201")
    net.to(torch.float64, memory_format=LAYOUTS[layout])
    net.load_state_dict(case.group("state"), strict=False)
    assert relative(net.arch_parameters()[0], case.group("state")["arch_parameters"]) == 0
    assert list(net.cells[0].edges) == list(c["edge_order"])
    arch = ldarts.Architect(net, F.cross_entropy)
    train = case["x_train"].contiguous(memory_format=LAYOUTS[layout]), case["y_train"]
    assert relative(net(train[0]), case["logits"]) < DOUBLE
    assert relative(arch.alpha_grads(train, train, 0.0, None, False), [case["dalpha_first"]]) < DOUBLE
    p = arch.cell_leaves()
    grads = torch.autograd.grad(F.cross_entropy(net(train[0], p), train[1]), p)
    assert relative([g.flatten() for g in grads], [g for g in case["layer_grads"]]) < DOUBLE
    value, u = arch.alignment(grads, "cosine")
    assert relative(value, case["alignment"]) < DOUBLE and relative(list(u), list(case["direction"])) < DOUBLE
    assert relative(c["epsilon_0"] / torch.stack(u).norm(), case["epsilon"]) < DOUBLE
    loss, _, d_lambda, _ = arch.lambda_grads(train, "cosine", c["epsilon_0"], "central")
    assert relative(loss, case["loss"]) < DOUBLE
    compare(net, d_lambda, case.group("alignment_grad"), SINGLE)
    assert net.genotype() == str(case.arrays["genotype"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derived_network(layout, golden):
    case = golden("eval_corr3")
    c = case.config
    net = ldarts.Network(c["C"], c["num_classes"], c["layers"], c["auxiliary"],
                         ldarts.genotypes.load(c["genotype"]))
    state = case.group("state")
    net.to(torch.float64, memory_format=LAYOUTS[layout])
    net.load_state_dict(state)  # strict: the original's keys, all of them and no other
    assert list(net.state_dict()) == list(state)
    x = case["x"].contiguous(memory_format=LAYOUTS[layout])
    assert relative(net.eval()(x)[0], case["logits_eval"]) < DOUBLE
    logits, aux = net.train()(x)
    assert relative(logits, case["logits_train"]) < DOUBLE and relative(aux, case["logits_aux"]) < DOUBLE


def test_published_cells_and_their_parameter_counts(golden):
    stored = json.loads((GOLDEN / "genotypes.json").read_text())
    counts = json.loads(str(golden("eval_corr3").arrays["param_counts_C36_L20"]))
    for name, expected in stored.items():
        genotype = ldarts.genotypes.load(name)
        assert json.loads(ldarts.genotypes.to_json(genotype)) == expected
        if name in counts:
            with torch.device("meta"):
                net = ldarts.Network(36, 10, 20, True, genotype)
                assert count_parameters(net) == counts[name]
    nasnet = ldarts.Network(4, 10, 3, False, ldarts.genotypes.load("NASNet"))
    assert nasnet.classifier.in_features == 3 * 16  # its reduction cells put out three states
    assert ldarts.genotypes.load("LAMBDA_DARTS") == ldarts.genotypes.load("lambdadarts_corr_3")
    assert counts["lambdadarts_corr_3"] == 3_604_438
