"""What shows results: studies, pictures, NAS-Bench-201's file."""
import io
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_search import batch, double, make
from torch import nn

import train_eval
import train_search
from evidence import growth
from ldarts import NetworkImageNet, genotypes, nasbench201, runs, visualize
from ldarts.operations import OPS
from ldarts.runs import count_multiply_adds, count_parameters
from ldarts.runs.arguments import DEMO

ARCH = "|nor_conv_3x3~0|+|nor_conv_3x3~0|skip_connect~1|+|none~0|avg_pool_3x3~1|nor_conv_1x1~2|"
TABLES = sorted(Path(__file__).parent.glob("evidence/*/[tf]*s.md"))  # tables.md, findings.md


def run_main(monkeypatch, module, *args):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
    module.main()


def refused(monkeypatch, capsys, module, *args) -> str:
    with pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
        runs.script(module.main)
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("grad_clip, clipped", [(1e-3, 1.0), (1e3, 0.0)])
def test_a_step_says_whether_it_was_clipped(grad_clip, clipped):
    net, arch, optimizer = make("s2")
    grads = train_search.search_step(
        arch, optimizer, double(batch()), double(batch(2)), lambda_t=0.1, unrolled=False, alpha_first=False,
        kind="cosine", epsilon=1e-4, method="exact", grad_clip=grad_clip)
    assert grads.clipped.tolist() == [clipped]


def test_norms_of_both_gradients_leave_the_net_alone():
    net, arch, _ = make("s2")
    before = [t.clone() for t in net.state_dict().values()]
    found = arch.gradient_norms(double(batch()), "cosine", 1e-4, "central")
    without = arch.gradient_norms(double(batch()), "cosine", 1e-4, None)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values()))
    _, dw, d_lambda, _ = arch.lambda_grads(double(batch()), "cosine", 1e-4, "central")
    norms = [torch.cat([d.flatten() for d in grads]).norm() for grads in (dw, d_lambda)]
    torch.testing.assert_close(found, tuple(norms))
    torch.testing.assert_close(without, (norms[0], torch.zeros_like(norms[0])))
    for p in net.weight_parameters():
        p.requires_grad_(False)
    assert [float(norm) for norm in arch.gradient_norms(double(batch()), "cosine", 1e-4, "central")] == [0, 0]


def test_the_eigenvalue_is_that_of_the_whole_hessian():
    net, arch, _ = make("nasbench201")
    alpha, = net.arch_parameters()
    gradient, = torch.autograd.grad(arch._loss(double(batch())), alpha, create_graph=True)
    rows = [torch.autograd.grad(g, alpha, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    eigenvalues = torch.linalg.eigvalsh(torch.stack(rows))
    before = torch.get_rng_state()
    found = arch.alpha_eigenvalue(double(batch()), iterations=30, tolerance=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == pytest.approx(float(eigenvalues[eigenvalues.abs().argmax()]), rel=0.05)
    default = arch.alpha_eigenvalue(double(batch()))
    arch.criterion = lambda logits, y: 1e-3 * nn.functional.cross_entropy(logits, y)
    assert arch.alpha_eigenvalue(double(batch())) == pytest.approx(1e-3 * default)  # the tolerance is relative
    arch.criterion = nn.functional.cross_entropy
    arch.average = lambda tensors: [2 * t for t in tensors]
    assert arch.alpha_eigenvalue(double(batch()), 30, 0.0) == pytest.approx(2 * found)
    for alpha in arch.net.arch_parameters():
        alpha.requires_grad_(False)
    assert arch.alpha_eigenvalue(double(batch())) == 0


def drawn(monkeypatch, draw, *what) -> list:
    """The panels of the picture that a function of visualize draws."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(visualize, "save", lambda figure, path: figures.append(figure))
    draw(*what, Path("picture.png"))
    visualize.pyplot().close(figures[0])
    return figures[0].axes


@pytest.mark.parametrize("name", [*genotypes.PUBLISHED, ARCH])
def test_no_label_of_a_cell_covers_another(name, monkeypatch):
    for ax in drawn(monkeypatch, visualize.draw_cells, genotypes.load(name)):
        labels = [text.get_position() for text in ax.texts if text.get_text() in OPS]
        assert len(labels) in (6, 8, 10)  # NAS-Bench-201, DARTS, NASNet and AmoebaNet
        for (x, y), (other_x, other_y) in itertools.combinations(labels, 2):  # at most 1.1 by 0.2 inches each
            assert abs(x - other_x) > 1.1 or abs(y - other_y) > 0.2


def test_a_group_of_runs_has_one_colour_in_all_panels_and_in_the_legend(monkeypatch):
    search = [{"train_loss": 3.0, "valid_accuracy": 30.0}] * 3
    groups = {"search": [search, search[:2]],
              "evaluation": [[{"train_loss": 2.0}, {"train_loss": 1.0, "test_accuracy": 60.0 + k}]
                             for k in range(2)]}
    axes = drawn(monkeypatch, visualize.draw_curves, groups)
    legend = {line.get_label(): line.get_color() for line in axes[0].figure.legends[0].get_lines()}
    assert list(legend) == ["search (n = 2)", "evaluation (n = 2)"] and len(set(legend.values())) == 2
    assert all(line.get_color() == legend[line.get_label()] for ax in axes for line in ax.lines)
    curves = {ax.get_title(): [torch.tensor(line.get_ydata()).nan_to_num(-1).tolist() for line in ax.lines]
              for ax in axes}
    assert curves == {"validation accuracy, %": [[30.0] * 3, [-1, -1]],
                      "test accuracy, %": [[-1] * 3, [-1, 60.5]],  # in the epoch that logged it
                      "training loss": [[3.0] * 3, [2.0, 1.0]]}


def test_twelve_groups_differ_and_a_dollar_is_a_dollar(monkeypatch):
    groups = {f"$_${k}": [[{"train_loss": 1.0}] * 2] for k in range(12)}
    (ax,) = drawn(monkeypatch, visualize.draw_curves, groups)
    colours = [visualize.pyplot().matplotlib.colors.to_rgb(line.get_color()) for line in ax.lines]
    assert len({*zip(colours, (line.get_linestyle() for line in ax.lines))}) == 12
    ax.figure.savefig(io.BytesIO())  # matplotlib reads the labels


def test_growth_is_measured_by_settings_and_drawn_with_its_ratios(tmp_path, monkeypatch):
    sizes = []

    def compare(args, variants):
        assert list(variants) == ["channels-last", "ours"] and (args.command, args.steps) == ("step", 2)
        sizes.append((torch.get_num_threads(), args.batch_size, args.init_channels, args.layers))
        return {"channels-last": 3.0 * len(sizes), "ours": 1.0 + len(sizes)}

    monkeypatch.setattr(growth.bench, "compare", compare)
    threads = torch.get_num_threads()
    try:
        growth.measure(["--steps", "2"], tmp_path / "growth.json")
    finally:
        torch.set_num_threads(threads)
    settings = [(8, 16, 8), (16, 8, 8), (16, 16, 4), (16, 16, 8), (16, 16, 14), (16, 32, 8), (32, 16, 8),
                (64, 16, 8)]
    assert sizes == [(n, *setting) for n in (1, 2) for setting in settings]
    found = json.loads((tmp_path / "growth.json").read_text())
    assert {"command", "device", "date", "torch"} < set(found) and len(found["rows"]) == 16
    panels = drawn(monkeypatch, growth.draw, found)
    for ax, rows in zip(panels, ((0, 3, 6, 7), (1, 3, 5), (2, 3, 4)), strict=True):
        channels_last, ours, _, ours_by_2_threads = (list(line.get_ydata()) for line in ax.lines)
        assert channels_last == [3.0 * (1 + row) for row in rows] and ours == [2.0 + row for row in rows]
        assert ours_by_2_threads == [10.0 + row for row in rows]
        ratios = [3 * (1 + row) / (2 + row) for row in (*rows, *(8 + row for row in rows))]
        assert [text.get_text() for text in ax.texts] == [f"{ratio:.1f}×" for ratio in ratios]


def write_run(path, seed, accuracy, **config):
    path.mkdir(parents=True)
    config = {"kind": "search", "search_space": "s2", "seed": seed, "save": path.name, "epochs": 1, **config}
    (path / "config.json").write_text(json.dumps(config))
    (path / "genotype.json").write_text(genotypes.to_json(genotypes.PUBLISHED["c10_s2_lambdadarts_corr"]))
    line = {"epoch": 0, "valid_accuracy": accuracy, "lambda_train": 0.25, "seconds": 90, "entropy": 0.6,
            "alphas": [[[0.1, 0.2]] * 14] * 2, "cell_shares": [0.3, -0.1, 0.8]}
    if config.get("kind") == "eval":
        line = {"epoch": 0, "test_accuracy": accuracy, "seconds": 10}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def test_pictures_of_runs_and_names(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        write_run(tmp_path / f"runs/s{seed}", seed, 20.0 + seed)
    write_run(tmp_path / "runs/old", 0, 20.0)
    metrics = tmp_path / "runs/old/metrics.jsonl"
    metrics.write_text('{"epoch": 0, "train_loss": 2.0}\n' + metrics.read_text())
    assert [path.stem for path in visualize.draw_run("runs/old")] == ["cells", "curves"]
    cell = genotypes.PUBLISHED["DARTS"]
    text = f"Genotype(normal={cell.normal}, reduce={cell.reduce})"
    run_main(monkeypatch, visualize, "runs/s0", "runs/s1", "DARTS", ARCH, text, "--out", "pictures",
             "--format", "svg")
    written = capsys.readouterr().out.split()
    assert {"runs/s0/cells.svg", "runs/s1/alphas.svg", "runs/s1/shares.svg", "runs/s0/curves.svg",
            "pictures/curves.svg", "pictures/DARTS.svg", "pictures/cell.svg",
            "pictures/cell-2.svg"} <= set(written)
    assert all(Path(path).read_text().rstrip().endswith("</svg>") for path in written)


def test_pictures_of_cells_of_one_name_have_names_of_their_own(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for folder, name in (("a", "DARTS"), ("b", "NASNet")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "genotype.json").write_text(genotypes.to_json(genotypes.PUBLISHED[name]))
    other = ARCH.replace("none", "skip_connect")
    cells = ["a/genotype.json", "b/genotype.json", ARCH, other, "a/genotype.json"]
    run_main(monkeypatch, visualize, *cells, "--format", "svg")
    written = capsys.readouterr().out.split()
    assert written == ["genotype.svg", "genotype-2.svg", "cell.svg", "cell-2.svg"]
    assert len({Path(path).read_text() for path in written}) == 4
    names = {"DARTS": "DARTS", "x/DARTS.json": "DARTS-2", "x/y/DARTS.json": "DARTS-3",
             "x/genotypes.py:V2": "V2", "Genotype(normal=[])": "cell"}
    assert visualize.file_names(list(names)) == names


def drawn_alphas(monkeypatch, alphas):
    """What draw_alphas makes of α of space s2 by epochs: colours [pixels, 3], and the labels of its axes."""
    genotype = genotypes.PUBLISHED["c10_s2_lambdadarts_corr"]
    axes = drawn(monkeypatch, visualize.draw_alphas, "s2", alphas, genotype)
    images = [image for ax in axes for image in ax.images]
    assert len(images) == 28
    colours = [torch.tensor(image.to_rgba(image.get_array())[..., :3]).flatten(0, 1) for image in images]
    return torch.cat(colours), {ax.get_ylabel() for ax in axes}


@pytest.mark.parametrize("spread, reach", [(1e-3, "0.0005"), (0.1, "0.05"), (20.0, "0.5")])
def test_colours_of_alphas_tell_operations_apart_whatever_their_spread(spread, reach, monkeypatch):
    rising = torch.linspace(-1, 1, 3 * 2 * 14).reshape(3, 2, 14, 1)  # the difference of the two α
    alphas = (spread * rising * torch.tensor([1.0, -1.0])).tolist()
    colours, labels = drawn_alphas(monkeypatch, alphas)
    assert f"p − 1/2, up to ±{reach}" in labels
    assert (colours.amax(0) - colours.amin(0)).min() > 0.7
    assert len(colours.mul(255).round().unique(dim=0)) > (40 if spread < 1 else 10)


def test_equal_operations_have_the_colour_in_the_middle(monkeypatch):
    colours, _ = drawn_alphas(monkeypatch, torch.zeros(2, 2, 14, 2).tolist())
    assert colours.min() > 0.95


@pytest.mark.parametrize("module, flags, package", [
    (visualize, ["DARTS"], "matplotlib"), (train_search, ["--dataset", "synthetic", "--plot"], "matplotlib"),
    (train_search, ["--dataset", "synthetic", "--tensorboard"], "tensorboard"),
    (train_eval, ["--dataset", "imagenet"], "pillow")])
def test_a_missing_extra_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, module, flags, package):
    monkeypatch.chdir(tmp_path)
    for name in ("matplotlib", "tensorboard", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    assert f"pip install {package}" in refused(monkeypatch, capsys, module, *flags)
    assert not list(tmp_path.iterdir())


def test_multiply_adds_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8),
                        nn.Flatten(), nn.Linear(8 * 16, 10))
    assert count_multiply_adds(net, (3, 8, 8)) == 16 * 8 * 27 + 16 * 8 * 9 + 8 * 16 * 10
    assert next(net.parameters()).device.type == "cpu"


@pytest.mark.parametrize("name, sizes", [
    ("LAMBDA_DARTS", (5140288, 565652544)), ("DARTS_V2", (4718752, 529911552))])  # 4.719 M in its README
def test_the_published_cells_on_imagenet(name, sizes):
    with torch.device("meta"):
        net = NetworkImageNet(48, 1000, 14, True, genotypes.load(name))
    assert (count_parameters(net), count_multiply_adds(net, (3, 224, 224))) == sizes
    assert [type(layer) for layer in net.stem1] == [nn.ReLU, nn.Conv2d, nn.BatchNorm2d]


def test_the_first_command_is_what_the_evidence_says():
    """Ranks and p-values of `train_search.py --demo` and of other settings are those stated."""
    evidence = Path(__file__).parent / "evidence"
    found = json.loads((evidence / "first_command.json").read_text())
    rows = (evidence / "README.md").read_text().splitlines()
    assert len(found["runs"]) == 10
    others = [(f"`{other['flags']}`", other["runs"]) for other in found["others"]]
    for flags, listed in [("none", found["runs"]), *others]:
        ranks = [nasbench201.look_up(run["cell"]).rank for run in listed]
        seeds, p_value = [run["seed"] for run in listed], nasbench201.better_than_random(ranks)
        assert ranks == [run["rank"] for run in listed]
        assert (f"| {flags} | {seeds[0]} to {seeds[-1]} | {', '.join(f'{rank:,}' for rank in ranks)} "
                f"| {p_value:.2g} |") in rows
        assert flags != "none" or p_value < 0.01
    assert found["command"] == f"python train_search.py {DEMO}"


def test_rows_and_means_of_the_findings_stand_in_their_tables():
    """What the README of the evidence quotes from the studies: rows, and every mean ± deviation."""
    text = (Path(__file__).parent / "evidence/README.md").read_text()
    sections = {section.split("\n")[0]: section for section in text.split("\n## ")}
    findings = sections["Does Λ prevent collapse?"] + sections["Does the gradient of Λ raise Λ?"]
    tables = "\n".join(path.read_text() for path in TABLES)
    names = {line.split("|")[1] for line in tables.splitlines() if line.startswith("| ")} - {" variant ", " --- "}
    rows = [line for line in findings.splitlines() if line.startswith("| ") and line.split("|")[1] in names]
    assert len(rows) > 15 and not set(rows) - set(tables.splitlines())
    means = set(re.findall(r"[\d.]+ ± [\d.]*\d", findings))
    assert len(means) > 60 and not means - set(re.findall(r"[\d.]+ ± [\d.]*\d", tables))
