"""The supernet's spaces and derivation, and what an Architect leaves alone."""
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import ldarts
import train_search
from ldarts import genotypes, nasbench201, runs, spaces
from ldarts.alignment import cell_shares
from ldarts.architect import METHODS, search_step, weight_step
from ldarts.distributed import Processes
from ldarts.model import Cell
from ldarts.model_search import derive
from ldarts.operations import OPS, drop_path


def batch(seed=1, n=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(10, (n,), generator=generator)


def make(space, layers=4, dtype=torch.float64):
    net = ldarts.SearchNetwork(2, 10, 1 if space == "nasbench201" else layers, space).to(dtype)
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.025, 0.9, weight_decay=3e-4)
    return net, ldarts.Architect(net, F.cross_entropy), optimizer


def double(images):
    return images[0].double(), images[1]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_s1_has_the_table_of_the_paper():
    normal, reduce = spaces.get("s1")
    assert normal[0] == ("skip_connect", "dil_conv_3x3") and normal[5] == ("max_pool_3x3", "skip_connect")
    assert normal[12:] == (("dil_conv_3x3", "dil_conv_5x5"),) * 2
    assert reduce[0] == ("max_pool_3x3", "avg_pool_3x3") and reduce[6] == ("max_pool_3x3", "sep_conv_3x3")
    assert reduce[-3:] == (("skip_connect", "dil_conv_5x5"),) * 3
    count = {name: sum(edge.count(name) for edge in normal) for name in OPS}
    named = "skip_connect", "max_pool_3x3", "sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5"
    assert [count[n] for n in named] == [12, 2, 4, 6, 4]


@pytest.mark.parametrize("space", spaces.SPACES)
def test_every_space_searches_and_derives(space):
    net, arch, optimizer = make(space)
    before = [alpha.clone() for alpha in net.arch_parameters()]
    search_step(arch, optimizer, double(batch()), double(batch(2)), unrolled=False, alpha_first=True,
                lambda_t=0.1, kind="cosine", epsilon=1e-4, method="central", grad_clip=5.0)
    assert all(p.isfinite().all() for p in net.parameters())
    assert not any(torch.equal(alpha, old) for alpha, old in zip(net.arch_parameters(), before))
    genotype = net.genotype()
    assert "none" not in str(genotype) or space == "nasbench201"
    if space == "nasbench201":
        assert genotypes.load(genotype) == genotype
        ldarts.NetworkNAS201(4, 10, 1, genotype)
    else:
        ldarts.Network(4, 10, 3, False, genotype)


@pytest.mark.parametrize("eps, same_length", [(1e-8, True), (0.1, False)])
def test_epsilon_of_adam_decides_whether_the_length_of_a_gradient_counts(eps, same_length):
    net, _, _ = make("nasbench201")
    arch = ldarts.Architect(net, F.cross_entropy, lr=1e-3, weight_decay=0.0, eps=eps)
    before = [alpha.clone() for alpha in net.arch_parameters()]
    grads = arch.alpha_grads(double(batch()), double(batch(2)), 0.025, None, False)
    arch.step(grads)
    for alpha, old, grad in zip(net.arch_parameters(), before, grads):
        expected = -1e-3 * (grad / (grad.abs() + eps))  # Adam's first step
        torch.testing.assert_close(alpha - old, expected)
        lengths = (alpha - old).abs()
        assert (lengths.max() < 1.1 * lengths.median()) == same_length


def test_derivation_takes_the_two_strongest_edges_and_never_none():
    names = (("none", "skip_connect", "sep_conv_3x3"),) * 5
    p = [[0.1, 0.2, 0.7], [0.8, 0.15, 0.05],  # node 0 has two edges: both, the stronger first
         [0.9, 0.06, 0.04], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]]
    assert derive(p, names) == (("sep_conv_3x3", 0), ("skip_connect", 1),
                                ("sep_conv_3x3", 2), ("skip_connect", 1))


def test_nasbench201_derives_the_strongest_operation_of_each_edge():
    net = make("nasbench201")[0]
    with torch.no_grad():
        net.arch_parameters()[0].copy_(torch.eye(5).repeat(2, 1)[:6])
    assert net.genotype() == (
        "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|")


def test_the_network_of_a_nasbench201_cell_is_the_supernet_at_that_cell():
    net, (x, _) = make("nasbench201")[0], double(batch())
    cell = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|avg_pool_3x3~0|skip_connect~1|nor_conv_3x3~2|"
    chosen = [net.primitives.normal[0].index(name) for name in genotypes.parse_arch(cell)]
    derived = ldarts.NetworkNAS201(2, 10, 1, cell).double()
    derived.stem, derived.lastact, derived.classifier = net.stem, net.lastact, net.classifier
    for k, of_search in enumerate(net.cells):
        if of_search in net.searched_cells():
            for j, edge in enumerate(of_search.edges.values()):
                derived.cells[k][j] = edge[chosen[j]]
        else:
            derived.cells[k] = of_search
    p = [torch.eye(5, dtype=x.dtype)[chosen]] * 3
    torch.testing.assert_close(derived(x)[0], net(x, p))


CALLS = {
    "first order": lambda arch, o: arch.alpha_grads(double(batch()), double(batch(2)), 0.025, o, False),
    "second order": lambda arch, o: arch.alpha_grads(double(batch()), double(batch(2)), 0.025, o, True),
    "second order, exact":
        lambda arch, o: arch.alpha_grads(double(batch()), double(batch(2)), 0.025, o, True, "exact"),
    **{f"Λ, {method}":
       lambda arch, o, method=method: arch.lambda_grads(double(batch()), "cosine", 1e-4, method)
       for method in METHODS},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last],
                         ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("space, kind", [("s1", "cosine"), ("s2", "sign"), ("nasbench201", "cosine")])
def test_the_gradient_of_a_step_is_that_of_the_loss_less_that_of_alignment(space, kind, layout, method):
    x, y = double(batch())
    x = x.contiguous(memory_format=layout)
    net, arch, _ = make(space)
    net.to(memory_format=layout)
    torch.manual_seed(3)  # of the random direction
    apart = arch.weight_grads((x, y), kind, 1e-4, method)
    torch.manual_seed(3)
    together = arch.weight_grads((x, y), kind, 1e-4, method, 0.3)
    assert together.d_lambda is None
    assert float(apart.alignment) == pytest.approx(float(together.alignment), rel=1e-9)
    for both, dw, d_lambda in zip(together.dw, apart.dw, apart.d_lambda, strict=True):
        atol = 1e-10 * (1 + float(dw.abs().max()))
        torch.testing.assert_close(both, dw - 0.3 * d_lambda, rtol=1e-7, atol=atol)


def test_the_control_is_as_long_as_the_published_estimate_and_points_nowhere():
    _, arch, _ = make("s2")
    central, first, second = (flat(arch.lambda_grads(double(batch()), "cosine", 1e-4, method)[2])
                              for method in ("central", "random", "random"))
    for direction, other in ((first, central), (second, first)):
        assert float(direction.norm()) == pytest.approx(float(central.norm()), rel=1e-9)
        assert abs(float(torch.cosine_similarity(direction, other, 0))) < 0.1


def test_the_share_of_a_cell_is_that_of_its_own_alpha():
    net, arch, _ = make("nasbench201", layers=2)
    x, y = double(batch())
    of_all, = torch.autograd.grad(F.cross_entropy(net(x), y), net.arch_parameters())
    alphas = [net.arch_parameters()[0].detach().clone().requires_grad_() for _ in net.searched_cells()]
    h = torch.autograd.grad(F.cross_entropy(net(x, [alpha.softmax(-1) for alpha in alphas]), y), alphas)
    torch.testing.assert_close(sum(h), of_all)
    before = [t.clone() for t in net.state_dict().values()]
    shares = cell_shares(torch.stack(arch.cell_gradients((x, y))), net.cell_weights()[0].detach())
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values()))
    expected = torch.stack([(own * of_all).sum() for own in h]) / of_all.square().sum()
    torch.testing.assert_close(shares, expected)
    assert float(shares.sum()) == pytest.approx(1) and float(shares.max() - shares.min()) > 0.01


def test_what_an_epoch_says_of_cells_and_of_alpha():
    net, arch, _ = make("s1", layers=6)
    net.alphas_normal.data.normal_()
    halves = {"train": [double(batch(1)), double(batch(2))], "valid": [double(batch(3)), double(batch(4))]}
    values = train_search.measure_cells(arch, halves, "sign")
    normal = [k for k, cell in enumerate(net.cells) if not cell.reduction]
    for half, batches in halves.items():
        g = [[arch.cell_gradients(images)[k] for k in normal] for images in batches]
        by_hand = sum(float(ldarts.layer_alignment(cells, "sign")) for cells in g) / 2
        assert values[f"lambda_{half}"] == pytest.approx(by_hand) != 0
    g = (torch.stack(g[0]) + torch.stack(g[1])) / 2  # of the half for α: [cells, edges, ops]
    shares = cell_shares(g, net.alphas_normal.detach().softmax(1))
    assert values["cell_shares"] == pytest.approx(shares.tolist())
    of_skip = [g[:, edge, ops.index("skip_connect")].mean()
               for edge, ops in enumerate(net.primitives.normal) if "skip_connect" in ops]
    assert values["operation_grads"]["skip_connect"] == pytest.approx(float(sum(of_skip)) / len(of_skip))

    net = make("nasbench201")[0]
    with torch.no_grad():
        net.arch_parameters()[0].zero_()[:4, 1] = 100.0  # skip_connect on four edges, else `none`
        net.arch_parameters()[0][4:, 0] = 100.0
    values = train_search.measure_alphas(net, "cifar10")
    assert values["skip_connections"] == 4 and values["entropy"] == pytest.approx(0) == values["gini"]
    cell = "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|none~1|none~2|"
    assert values["true_cifar10"] == nasbench201.look_up(cell, "cifar10").cifar10


class MaskedNetwork(ldarts.SearchNetwork):
    """A fork's weights of the operations: a sigmoid, without the first skip connection."""

    def edge_weights(self):
        p = [alpha.sigmoid() for alpha in self.arch_parameters()]
        return [torch.cat([torch.cat([of_type[:1, :1] * 0, of_type[:1, 1:]], 1), of_type[1:]]) for of_type in p]


def test_the_cells_the_genotype_and_the_metrics_read_one_p():
    torch.manual_seed(0)
    net = MaskedNetwork(4, 10, 4, "s2").double()
    with torch.no_grad():
        net.alphas_normal[:, 0] = net.alphas_reduce[:, 0] = 5.0  # skip_connect
    expected = net.edge_weights()[0]
    assert torch.equal(net.cell_weights()[0], expected) and float(expected.detach()[0, 0]) == 0
    assert net.genotype().normal == (("skip_connect", 1), ("sep_conv_3x3", 0),
                                     *(("skip_connect", j) for _ in range(3) for j in (0, 1)))
    of_reduce = net.edge_weights()[1]
    gini = torch.cat([1 - p.square().sum(-1) for p in (expected, of_reduce)]).mean()
    values = train_search.measure_alphas(net, "cifar10")
    assert values["gini"] == pytest.approx(gini.item())
    assert values["skip_connections"] == 7  # of the normal cell


def test_alphas_that_do_not_fit_the_operations_give_no_genotype():
    net = make("s2")[0]
    net._parameters["alphas_normal"] = torch.nn.Parameter(torch.zeros(14, 1))  # of an operation that is gone
    with pytest.raises(ValueError, match="longer"):
        net.genotype()
    net._alpha_names = 2 * net._alpha_names  # α for each cell
    with pytest.raises(ValueError):
        net.genotype()


def test_an_operation_that_the_benchmark_lacks_is_searched_without_a_true_accuracy(monkeypatch):
    edges = (("none", "sep_conv_3x3"),) * 6
    monkeypatch.setitem(spaces.SPACES, "nasbench201", spaces.Space(edges, ()))
    net = make("nasbench201")[0]
    with torch.no_grad():
        net.arch_parameters()[0][:, 1] = 1.0
    values = train_search.measure_alphas(net, "cifar10")
    assert "sep_conv_3x3" in net.genotype() and values["skip_connections"] == 0
    assert not any(name.startswith("true_") for name in values)


@pytest.mark.parametrize("name, edges, said", [("own", (12, 14), "12, 14"), ("own", (14, 0), "14, 0"),
                                               ("nasbench201", (10, 0), "10, 0")])
def test_a_space_has_the_edges_of_its_cells(name, edges, said, monkeypatch):
    space = spaces.Space(*((("skip_connect",),) * count for count in edges))
    monkeypatch.setitem(spaces.SPACES, name, space)
    with pytest.raises(ldarts.InputError, match=f"{said}.* edges"):
        ldarts.SearchNetwork(2, 10, 4, name)


def test_each_searched_cell_wants_its_weights():
    net, (x, _) = make("s2")[0], double(batch())
    for cell_weights in (net.cell_weights()[:2], [*net.cell_weights(), net.cell_weights()[0]]):
        with pytest.raises(ValueError, match="cell_weights for 4 searched cells"):
            net(x, cell_weights)


@pytest.mark.parametrize("method", [None, "central", "exact"])
def test_weights_that_are_added_up_are_clipped_once(method):
    """Their gradient is one tensor, which a clip in place would scale twice."""
    class Sum(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.other = torch.nn.Parameter(torch.zeros_like(weight))

        def forward(self, weight):
            return weight + self.other

    net = make("s2")[0]
    parametrize.register_parametrization(net.classifier, "weight", Sum(net.classifier.weight))
    arch = ldarts.Architect(net, F.cross_entropy)
    options = {"lambda_t": 0.1, "kind": "cosine", "epsilon": 1e-4, "method": method}
    optimizer = torch.optim.SGD(net.weight_parameters(), 1.0)
    before = [p.clone() for p in arch.weights]
    grads = weight_step(arch, optimizer, double(batch()), grad_clip=0.01, **options)
    norm = float(torch.nn.utils.get_total_norm(grads.dw))
    assert norm > 0.1 and grads.clipped.item() == 1
    for p, old, grad in zip(arch.weights, before, grads.dw):  # of ∇_w (L − λΛ), which stays as it was
        torch.testing.assert_close(old - p, 0.01 / norm * grad, rtol=1e-3, atol=1e-9)


def test_passes_of_a_difference_draw_the_same_numbers_of_every_library():
    class Noisy(OwnSupernet):
        def forward(self, x, cell_weights=None):
            factor = 1 + torch.rand(1, dtype=x.dtype) + random.random() + numpy.random.rand()
            return super().forward(x * factor, cell_weights)

    net, (x, y) = Noisy().double(), double(batch())
    arch, states = ldarts.Architect(net, F.cross_entropy), []
    for method in ("exact", "central"):
        runs.seed_everything(3)
        states.append((arch.lambda_grads((x, y % 3), "cosine", 1e-4, method)[2], random.random(),
                       numpy.random.rand(), float(torch.rand(1))))
    torch.testing.assert_close(*(flat(gradient) for gradient, *_ in states), rtol=1e-4, atol=1e-8)
    assert states[0][1:] == states[1][1:]
    following = []  # what is drawn after a gradient does not repeat what its last passes have drawn
    for hessian in ("exact", "central"):
        runs.seed_everything(3)
        arch.alpha_grads((x, y % 3), (x.flip(0), y % 3), 0.1, None, True, hessian)
        following.append((random.random(), numpy.random.rand(), float(torch.rand(1))))
    assert following[0] == following[1]


def test_an_evaluation_reads_running_statistics_and_leaves_them():
    net, criterion = make("s2")[0], torch.nn.CrossEntropyLoss()
    for _ in range(3):
        net(double(batch())[0])
    before, (x, y) = [b.clone() for b in net.buffers()], double(batch(2, 6))
    loss, accuracy = runs.evaluate(net, criterion, [(x[:4], y[:4]), (x[4:], y[4:])], Processes(x.device))
    with torch.no_grad():
        logits = net.eval()(x)
    assert loss == pytest.approx(float(criterion(logits, y)))
    assert accuracy == pytest.approx(100 * float((logits.argmax(1) == y).double().mean()))
    assert all(map(torch.equal, before, net.buffers()))


def test_drop_path_keeps_the_mean():
    dropped = drop_path(torch.ones(20_000, 2, 1, 2), 0.25)
    assert torch.equal(dropped.amin((1, 2, 3)), dropped.amax((1, 2, 3)))  # whole images
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)
    skips, nodes = tuple(("skip_connect", j) for _ in range(4) for j in (0, 1)), (2, 3, 4, 5)
    cell = Cell(ldarts.Genotype(skips, nodes, skips, nodes), 4, 4, 4, False, False)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(cell(x, x, 0.9), cell(x, x, 0.0))  # which is no path to drop


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("space", ["s1", "s4"])
def test_a_gradient_leaves_weights_momenta_and_statistics_alone(space, call):
    net, arch, optimizer = make(space)
    # So that there are momenta.
    search_step(arch, optimizer, double(batch()), double(batch(2)), unrolled=False, alpha_first=True,
                lambda_t=0.0, kind="cosine", epsilon=1e-4, method="central", grad_clip=5.0)
    weights = [p.clone() for p in net.parameters()]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in net.weight_parameters()]
    statistics = {name: b.clone() for name, b in net.named_buffers()}
    call(arch, optimizer)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), weights))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], old)
               for p, old in zip(net.weight_parameters(), momenta))
    moved = [int(b - statistics[name]) for name, b in net.named_buffers()
             if name.endswith("num_batches_tracked")]
    weight_pass = call not in list(CALLS.values())[:3]
    assert moved and set(moved) == {int(weight_pass)}
    if not weight_pass:
        assert all(torch.equal(b, statistics[name]) for name, b in net.named_buffers())


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("lambda_t", [0.0, 0.1])
def test_statistics_move_once_a_step_by_the_training_pass(unrolled, lambda_t):
    net, arch, optimizer = make("s2")
    stem = net.stem[0](double(batch())[0])
    expected = 0.1 * stem.mean((0, 2, 3))
    search_step(arch, optimizer, double(batch()), double(batch(2)), unrolled=unrolled, alpha_first=True,
                lambda_t=lambda_t, kind="cosine", epsilon=1e-4, method="central", grad_clip=5.0)
    torch.testing.assert_close(net.stem[1].running_mean, expected)
    assert {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1}


def test_frozen_statistics_stay_frozen_behind_a_block_within():
    net, arch, _ = make("s2")
    before = [b.clone() for b in net.buffers()]
    with arch.kept():
        with ldarts.Architect(net, F.cross_entropy).kept():
            pass
        net(double(batch())[0])
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers()))
    net(double(batch())[0])
    assert not all(torch.equal(a, b) for a, b in zip(before, net.buffers()))


class OwnSupernet(torch.nn.Module):
    """All that an Architect asks of a net: two cells, each a sum of two convolutions."""

    def __init__(self):
        super().__init__()
        self.cells = torch.nn.ModuleList(torch.nn.ModuleList(
            torch.nn.Conv2d(3, 3, size, padding="same") for size in (1, 3)) for _ in range(2))
        self.alpha = torch.nn.Parameter(torch.zeros(1, 2))

    def arch_parameters(self):
        return [self.alpha]

    def weight_parameters(self):
        return [*self.cells.parameters()]

    def cell_weights(self):
        return [self.alpha.softmax(-1)] * 2

    def searched_cells(self):
        return [*self.cells]

    def forward(self, x, cell_weights=None):
        for cell, p in zip(self.cells, cell_weights or self.cell_weights()):
            x = x + torch.tanh(sum(p_k * conv(x) for p_k, conv in zip(p[0], cell)))
        return x.mean((2, 3))


def test_an_architect_takes_a_net_of_others():
    """Smooth, so that central differences at a small radius are the exact gradients."""
    net, (x, y) = OwnSupernet().double(), double(batch())
    arch, train, valid = ldarts.Architect(net, F.cross_entropy), (x, y % 3), (x.flip(3), y % 3)
    exact, central = (arch.lambda_grads(train, "cosine", 1e-4, method)[2] for method in ("exact", "central"))
    torch.testing.assert_close(flat(central), flat(exact), rtol=1e-5, atol=1e-9)
    orders = (False, "exact"), (True, "central"), (True, "exact")
    first, *second = (arch.alpha_grads(train, valid, 0.5, None, *order)[0] for order in orders)
    torch.testing.assert_close(second[0], second[1], rtol=1e-3, atol=1e-6)
    assert not torch.allclose(first, second[1], rtol=1e-2)


@pytest.mark.parametrize("space", ["darts", "nasbench201"])
def test_a_checkpoint_without_alpha_loads_and_comes_back_out(space):
    net = make(space)[0]
    original = {k: v for k, v in net.state_dict().items() if "alphas" not in k and k != "arch_parameters"}
    other = make(space)[0]
    other.load_state_dict(original)
    back = {k: v for k, v in other.state_dict().items() if "alphas" not in k and k != "arch_parameters"}
    assert list(back) == list(original) and all(torch.equal(back[k], original[k]) for k in back)
    some = {"darts": "cells.0._ops.3._ops.3.op.1.weight",
            "nasbench201": "cells.0.edges.1<-0.2.op.1.weight"}[space]
    assert {"stem.0.weight", some, "classifier.bias"} <= set(back)


def test_unknown_ways_name_the_known_ones():
    net, arch, _ = make("s2")
    for call, named in (
            (lambda: arch.lambda_grads(batch(), "cosine", 1e-4, "magic"), "central, exact, random"),
            (lambda: arch.weight_grads(batch(), "cosine", 1e-4, "Exact"), "central, exact, random"),
            (lambda: arch.alpha_grads(batch(), batch(), 0.1, None, True, "magic"), "central or exact"),
            (lambda: ldarts.layer_alignment([torch.ones(2)] * 2, "magic"), "cosine")):
        with pytest.raises(ValueError, match=named):
            call()
