"""Derived networks as users bring them: genotypes from logs and modules, others' weights, runs cut short."""
import json
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from test_archives import write_cifar10
from test_evidence import refused, run_main, write_run

import train_eval
import train_search
from ldarts import (InputError, Network, NetworkImageNet, NetworkNAS201, genotypes, nasbench201, runs,
                    visualize)
from ldarts.data import ImageSet
from ldarts.genotypes import PUBLISHED, to_json
from ldarts.runs import count_multiply_adds, load_checkpoint

CELL = PUBLISHED["DARTS_V2"]
ARCH = "|nor_conv_3x3~0|+|nor_conv_3x3~0|skip_connect~1|+|none~0|avg_pool_3x3~1|nor_conv_1x1~2|"


def original(cell, concat="range(2, 6)"):
    """The text that DARTS prints of a cell; concat: "" for none"""
    fields = {name: f"{list(value)}" for name, value in cell._asdict().items()}
    fields |= {name: concat for name in ("normal_concat", "reduce_concat")}
    return f"Genotype({', '.join(f'{name}={value}' for name, value in fields.items() if value)})"


TEXT = original(CELL)
OTHER = original(PUBLISHED["DARTS_V1"])
NO_CONCAT = json.dumps({"normal": CELL.normal, "reduce": CELL.reduce})
MODULE = f"Genotype = namedtuple('Genotype', '')\nOPS = ['none']\nV1 = {OTHER}\nV2 = {TEXT}\nBEST = V2\n"
FILES = {
    "log.txt": f"12:00 genotype = {OTHER}\n12:01 genotype = {TEXT} epoch (1\n12:02 genotype = {OTHER[:99]}",
    "genotypes.py": MODULE, "one.py": f"import os\nX = {TEXT}\n",
    "201.log": f"Structure(4 nodes with {ARCH})", "marked.json": "\ufeff" + to_json(CELL),
    "bare.json": NO_CONCAT,
}


@pytest.mark.parametrize("name, cell", [
    (TEXT, CELL), (original(CELL, ""), CELL), (original(CELL, "list(range(2, 6))"), CELL),
    (f"\n {TEXT}\n", CELL), (original(CELL, "tuple(list(range( 2,\n 6 )))"), CELL), (f"genotypes.{TEXT}", CELL), (to_json(CELL), CELL), ("\ufeff" + NO_CONCAT, CELL),
    (f"Genotype({list(CELL.normal)}, [2, 3, 4, 5], {CELL.reduce}, range(2, 6))", CELL), (ARCH, ARCH),
    (json.dumps({"arch": ARCH}), ARCH), ("log.txt", CELL), ("log.txt/utf-16", CELL), ("201.log", ARCH),
    ("genotypes.py:V2", CELL), ("genotypes.py:BEST", CELL), ("genotypes.py:V1", PUBLISHED["DARTS_V1"]),
    ("one.py", CELL), ("marked.json", CELL), ("bare.json", CELL)], ids=lambda value: str(value)[:30])
def test_a_genotype_is_read_as_it_stands(name, cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _, encoding = name.partition("/")
    file = path.split(":")[0]
    if file in FILES:
        (tmp_path / file).write_text(FILES[file], encoding=encoding or "utf-8")
    assert genotypes.load(path) == cell


@pytest.mark.parametrize("name, said", [
    ("genotypes.py", "V1, V2, BEST"), ("genotypes.py:V3", "V1, V2, BEST"), ("genotypes.py:OPS", "V1"),
    (TEXT.replace("range(2, 6)", "__import__('os').mkdir('made')"), "not a genotype"),
    (TEXT.replace("range(2, 6)", "range(10**12)"), "not a genotype"),
    (TEXT.replace("range(2, 6)", "range(0, 1000000000000)"), "normal_concat"),
    (TEXT.replace("sep_conv_3x3", "sep_conv_9x9"), "normal[0]"), (TEXT[:99], "no genotype"),
    ("Genotype(normal=[])", "normal_concat"), ("Genotype(**{})", "no genotype"),
    ("Genotype({1})", "not a genotype"),
    ("{" * 99999, "not a genotype"), (f"Genotype({'(' * 9999}{')' * 9999})", "no genotype"),
    ("|none~0|", "arch string"), (".", "end of its first epoch"), ("x" * 300, "File name too long")],
    ids=lambda value: value[:30])
def test_what_is_no_genotype_is_one_line(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "genotypes.py").write_text(MODULE)
    with pytest.raises(InputError) as refused:
        genotypes.load(name)
    message = str(refused.value)
    assert said in message and "\n" not in message and len(message) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["genotypes.py"]


# ---- which network

@pytest.mark.parametrize("arch", ["runs/s", "runs/s/genotype.json", "cell.json", "svhn_s2_lambdadarts_corr"])
@pytest.mark.parametrize("dataset, size", [("svhn", (16, 8)), ("cifar100", (16, 8)), ("cifar10", (36, 20)),
                                           ("imagenet", (48, 14))])
def test_a_cell_means_one_network_however_it_is_given(arch, dataset, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/s", 0, 20.0, search_space="s2")
    (tmp_path / "cell.json").write_text(to_json(PUBLISHED["c10_s2_lambdadarts_corr"]))
    monkeypatch.setattr(sys, "argv", ["train_eval.py", "--arch", arch, "--dataset", dataset])
    args, _, remarks = runs.parse_eval_args()
    assert (args.init_channels, args.layers) == size
    assert remarks[0].startswith(f"--init_channels {size[0]} --layers {size[1]}: as published on ")


def test_a_cell_of_another_space_is_trained_large_on_svhn_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/s", 0, 20.0, search_space="darts")
    monkeypatch.setattr(sys, "argv", ["x", "--arch", "runs/s", "--dataset", "svhn", "--layers", "3"])
    args, _, remarks = runs.parse_eval_args()
    assert (args.init_channels, args.layers) == (36, 3) and remarks[0].startswith("--init_channels 36: ")


def test_the_cell_of_an_unfinished_search_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/s", 0, 20.0, epochs=50)
    monkeypatch.setenv("HOME", str(tmp_path))
    for arch in ("runs/s", "runs/s/genotype.json", "~/runs/s"):
        monkeypatch.setattr(sys, "argv", ["x", "--arch", arch])
        args, _, remarks = runs.parse_eval_args()
        assert "runs/s is an unfinished search, 1 of 50 epochs" in remarks[0]
        # Where a table of runs finds the search from every folder.
        assert args.arch == str(tmp_path / arch.removeprefix("~/"))


def test_an_evaluation_that_was_stopped_before_it_wrote_its_cell_is_resumed(tmp_path, monkeypatch):
    write_run(tmp_path / "e", 0, 20.0, kind="eval", arch="DARTS_V1")
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(tmp_path / "e")])
    assert runs.parse_eval_args()[1] == PUBLISHED["c10_s2_lambdadarts_corr"]  # that of the run
    (tmp_path / "e/genotype.json").unlink()
    assert runs.parse_eval_args()[1] == PUBLISHED["DARTS_V1"]


def test_the_table_of_runs_pools_seeds_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in ((0, 20.0), (1, 23.0)):
        write_run(tmp_path / f"runs/s{seed}", seed, accuracy)
    write_run(tmp_path / "runs/other", 0, 30.0, search_space="s3")
    write_run(tmp_path / "runs/e", 0, 50.0, kind="eval", arch="runs/s0", parameters=2.5e6, multiply_adds=4e8)
    run_main(monkeypatch, runs, "runs/s0", "runs/s1", "runs/other")
    printed = capsys.readouterr().out
    assert "| search, search_space s2 | 2 | 21.50 ± 2.12 | – | – | 1.50 ± 0.00 | 0.25 ± 0.00 |" in printed
    assert "| search, search_space s3 | 1 | 30.00 | – | – | 1.50 | 0.25 |" in printed
    others = {"lambda_reg": 0.5, "lambda_kind": "sign", "lambda_grad": "exact", "epsilon": 1e-3,
              "unrolled": True, "dataset": "svhn", "epochs": 9, "batch_size": 9, "layers": 9, "cutout": True}
    for name, value in others.items():
        write_run(tmp_path / f"runs/{name}", 0, 20.0, **{name: value})
    assert len(runs.grouped(["runs/s0", *(f"runs/{name}" for name in others)])) == 1 + len(others)
    write_run(tmp_path / "runs/copy", 0, 20.0)
    run_main(monkeypatch, runs, "runs/s0", "runs/copy")
    assert "| search | 2, 1 different | 20.00 ± 0.00 |" in capsys.readouterr().out
    assert runs.table(["a"], [["|x~0|\n +"]]).splitlines()[2] == r"| \|x~0\| + |"  # an arch string, a text
    run_main(monkeypatch, runs, "--best", "runs/s0", "runs/s1", "runs/e")
    assert capsys.readouterr().out == "runs/s1\n"
    message = refused(monkeypatch, capsys, runs, "--best", "runs/e")
    assert "--best: none of runs/e is a finished search" in message
    run_main(monkeypatch, runs, "runs/e", "runs/s0")
    assert "| eval | 1 | 50.00 | 2.50 | 400.00 | 1.50 | 0.25 |" in capsys.readouterr().out
    (tmp_path / "runs/s0/genotype.json").write_text(to_json(PUBLISHED["DARTS"]))  # the search went on
    run_main(monkeypatch, runs, "runs/e")
    printed = capsys.readouterr().out
    assert "| eval | 1 | 50.00 | 2.50 | 400.00 | – | – |\nleft out: runs/s0, its cell is no" in printed
    assert "runs/none" in refused(monkeypatch, capsys, runs, "runs/none")


def test_what_is_no_run_among_runs_is_left_out_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "damaged"):
        write_run(tmp_path / "runs" / name, 0, 20.0)
    (tmp_path / "runs/damaged/metrics.jsonl").write_text("{")
    (tmp_path / "runs/notes.txt").write_text("which seeds to trust")
    (tmp_path / "runs/.ipynb_checkpoints").mkdir()
    paths = sorted(map(str, Path("runs").iterdir()))
    for flags, said in (([], "| search | 1 | 20.00 |"), (["--best"], "runs/a\n")):
        run_main(monkeypatch, runs, *flags, *paths)
        printed = capsys.readouterr()
        assert said in printed.out
        assert len(printed.err.splitlines()) == 3
        assert all(f"left out: runs/{name}" in printed.err for name in ("notes", "damaged", ".ipynb"))
    assert "runs/none" in refused(monkeypatch, capsys, runs, "runs/a", "runs/none")
    assert "notes.txt" in refused(monkeypatch, capsys, runs, "runs/notes.txt")
    with pytest.raises(InputError, match="none of these is a run"):
        run_main(monkeypatch, runs, "runs/notes.txt", "runs/.ipynb_checkpoints")


@pytest.mark.parametrize("dataset, column, shown", [
    ("cifar10", 0, "CIFAR-10"), ("cifar100", 1, "CIFAR-100"), ("synthetic", 0, "CIFAR-10")])
def test_the_truth_is_that_of_the_searched_set(dataset, column, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    table = nasbench201.accuracies()
    best = table[table[:, column].argsort()[::-1]]
    truths = best[781], best[2343]  # uniform numbers 0.05, 0.15: p-value 0.2² / 2
    for seed, truth in enumerate(truths):
        write_run(tmp_path / f"runs/n{seed}", seed, 40.0, search_space="nasbench201", dataset=dataset)
        file = tmp_path / f"runs/n{seed}/metrics.jsonl"
        true = {f"true_{name}": value for name, value in zip(nasbench201.SETS, truth)}
        file.write_text(json.dumps(json.loads(file.read_text()) | true) + "\n")
    write_run(tmp_path / "runs/e", 0, 50.0, kind="eval", arch="runs/n0", dataset="cifar10")
    write_run(tmp_path / "runs/s", 0, 30.0, search_space="s3")
    write_run(tmp_path / "runs/e1", 1, 52.0, kind="eval", arch="runs/n0", dataset="cifar10")
    run_main(monkeypatch, runs, "runs/n0", "runs/n0/", "runs/n1", "runs/e", "runs/e1", "runs/s")
    printed, (first, second) = capsys.readouterr().out, [truth[column] for truth in truths]
    ranks = [1 + int((table[:, column] > accuracy).sum()) for accuracy in (first, second)]
    chance, chances = (f"{nasbench201.better_than_random(some):.2g}" for some in (ranks[:1], ranks))
    assert f"| 0.25 ± 0.00 | {runs.spread([first, second])} on {shown} | {chances} |" in printed
    assert f"| 0.25 | {first:.2f} on {shown} | {chance} |" in printed and "| 0.25 | – | – |" in printed
    assert "| 2 | 51.00 ± 1.41 | – | – | 1.50 | 0.25 |" in printed  # two evaluations of one search
    assert float(chances) == pytest.approx(0.02, rel=0.1)
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(visualize, "save", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(visualize, "draw_alphas", lambda *args: None)  # they are not of this space
    run_main(monkeypatch, visualize, "runs/n0", "runs/n1")
    titles = [ax.get_title() for figure in figures for ax in figure.axes]
    assert [title for title in titles if "trained" in title] == [f"the cell fully trained on {shown}, %"] * 3


def test_unfinished_runs_are_named_and_stay_out_of_means(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in enumerate((20.0, 23.0, 80.0)):
        write_run(tmp_path / f"runs/s{seed}", seed, accuracy, epochs=2)
        line = (tmp_path / f"runs/s{seed}/metrics.jsonl").read_text()
        first = line.replace(f"{accuracy}", "50.0").replace("0.25", "0.5")  # what counts is the end
        (tmp_path / f"runs/s{seed}/metrics.jsonl").write_text(first * (1 - seed // 2) + line)
    write_run(tmp_path / "runs/begun", 3, 0.0, epochs=2)
    (tmp_path / "runs/begun/metrics.jsonl").unlink()
    write_run(tmp_path / "runs/e", 0, 50.0, kind="eval", arch="runs/s2/genotype.json")
    names = ["runs/s0", "runs/s1", "runs/s2", "runs/begun"]
    run_main(monkeypatch, runs, *names)
    printed = capsys.readouterr().out
    assert ("| search | 2 (2 unfinished left out) | 21.50 ± 2.12 | – | – | 3.00 ± 0.00 | 0.25 ± 0.00 |"
            in printed)
    assert printed.endswith("unfinished: runs/s2, 1 of 2 epochs\nunfinished: runs/begun, 0 of 2 epochs\n")
    run_main(monkeypatch, runs, "--best", *names)
    assert capsys.readouterr().out == "runs/s1\n"  # s2 is better, but not finished
    run_main(monkeypatch, runs, *names, "--unfinished")
    assert "| search | 3 (2 unfinished in) | 41.00 ± 33.81 |" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{}")
    assert "no configuration of a run" in refused(monkeypatch, capsys, runs, ".")
    run_main(monkeypatch, runs, "runs/e")  # its search's time and Λ are not those of a whole search
    assert "| eval | 1 | 50.00 | – | – | – | – |\nunfinished: runs/s2" in capsys.readouterr().out


# ---- weights

SIZE = "--init_channels", 2, "--layers", 3, "--batch_size", 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images, a run on them, and the line that its test is to print."""
    folder = tmp_path_factory.mktemp("trained")
    write_cifar10(folder / "cifar-10-batches-py", 8)
    (folder / "cell.json").write_text(to_json(CELL))
    crossed = CELL._replace(normal=(*CELL.normal[:1], *CELL.normal[:1], *CELL.normal[2:]))  # the same shapes
    (folder / "crossed.json").write_text(to_json(crossed))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_main(patch, train_eval, "--arch", "DARTS", "--data", folder, *SIZE, "--epochs", 1, "--seed", 5,
                 "--save", "one")
    metrics = runs.read_metrics(folder / "runs/one")[-1]
    return folder, f"test loss {metrics['test_loss']:.4f}, accuracy {metrics['test_accuracy']:.2f} %"


def wrapped(state, prefix="", tower=True):
    return {prefix + key: t for key, t in state.items() if tower or not key.startswith("auxiliary")}


WRAPPED = {
    "plain": lambda state: state,
    "without the tower": lambda state: wrapped(state, tower=False),
    "DataParallel": lambda state: {"state_dict": wrapped(state, "module."), "epoch": 3},
    "compiled": lambda state: {"net": wrapped(state, "_orig_mod.")},
    "both": lambda state: {"model_state_dict": wrapped(state, "module._orig_mod.", tower=False)},
    "of 2018": lambda state: {key: t for key, t in state.items() if "num_batches" not in key},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_tested_however_they_are_wrapped(wrap, trained, tmp_path, monkeypatch, capsys):
    folder, line = trained
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(load_checkpoint(str(folder / "runs/one/checkpoint.pt"))["model"]), "weights.pt")
    run_main(monkeypatch, train_eval, "--evaluate", "weights.pt", "--arch", "DARTS", "--data", folder, *SIZE)
    assert line in capsys.readouterr().out
    assert "give it by --arch" in refused(monkeypatch, capsys, train_eval, "--evaluate", "weights.pt")


def test_a_checkpoint_knows_its_network_and_its_data(trained, tmp_path, monkeypatch, capsys):
    folder, line = trained
    monkeypatch.chdir(tmp_path)
    one, moved, old = folder / "runs/one/checkpoint.pt", tmp_path / "moved.pt", tmp_path / "old/checkpoint.pt"
    moved.write_bytes(one.read_bytes())
    old.parent.mkdir()
    state = load_checkpoint(str(one))
    assert genotypes.parse(state.pop("genotype"), "") == CELL
    torch.save(state, old)
    (old.parent / "genotype.json").write_text(to_json(CELL))
    given = "--data", folder, *SIZE
    for path, *flags in ((one,), (one.parent,), (moved, *given), (old, *given), (one, "--no-auxiliary"),
                         (one, "--batch_size", 10**4), (one, "--arch", folder / "cell.json")):
        run_main(monkeypatch, train_eval, "--evaluate", path, *flags)
        assert line in capsys.readouterr().out
    for path in (one, moved, old):
        assert "was trained with another cell" in refused(
            monkeypatch, capsys, train_eval, "--evaluate", path, "--arch", folder / "crossed.json")


@pytest.mark.parametrize("change, said", [
    ({"classifier.weight": torch.zeros(7, 32)}, "size mismatch for classifier.weight"),
    ({"classifier.bias": None}, 'Missing key(s) in state_dict: "classifier.bias"'),
    ({"head.bias": torch.zeros(3)}, 'Unexpected key(s) in state_dict: "head.bias"'),
    ({"classifier.bias": 3}, "no weights"),
    ({"classifier.bias": numpy.float64(3)}, "save a state_dict"),
    ({"alphas_normal": torch.zeros(14, 7)}, "weights of a search")], ids=lambda value: str(value)[:20])
def test_other_weights_name_the_first_that_differs(change, said, trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    monkeypatch.chdir(tmp_path)
    state = load_checkpoint(str(folder / "runs/one/checkpoint.pt"))["model"] | change
    torch.save({key: value for key, value in state.items() if value is not None}, "weights.pt")
    assert said in refused(monkeypatch, capsys, train_eval, "--evaluate", "weights.pt", "--arch", "DARTS",
                           "--data", folder, *SIZE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("build, cell, side", [
    (Network, CELL, 32), (NetworkImageNet, CELL, 64), (NetworkNAS201, ARCH, 32)], ids=["32", "224", "201"])
def test_a_network_is_exported_as_the_readme_says(build, cell, side):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    prepare, export, trace = re.findall(r"`(net\.eval[^`]+|torch\.export\.[^`]+|torch\.jit[^`]+)`", readme)
    net = build(4, 10, 1, cell) if build == NetworkNAS201 else build(4, 10, 3, True, cell)
    names = {"torch": torch, "net": net, "x": torch.randn(2, 3, side, side), "__name__": "user"}
    eval(prepare, names)
    program, traced = (eval(line, names) for line in (export, trace))
    x = torch.randn(2, 3, side, side)
    for logits in (program.module()(x)[0], traced(x)):
        torch.testing.assert_close(logits, net(x)[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="Only tensors"):
        torch.jit.trace(net, x)


# ---- what images, batches and memory do not allow

@pytest.fixture
def images(monkeypatch):
    """(pixels a side) -> both scripts see eight such images of three classes."""
    def of(height, width):
        part = ImageSet(torch.zeros(8, 3, height, width, dtype=torch.uint8), torch.arange(8) % 3, 3,
                        (0.5,) * 3, (0.25,) * 3)
        for script in (train_eval, train_search):
            monkeypatch.setattr(script, "load", lambda *args, **options: (part, part))
    return of


@pytest.mark.parametrize("script, size, flags, said", [
    (train_eval, (28, 28), ["--batch_size", 4], "use --no-auxiliary"),
    (train_eval, (30, 30), ["--batch_size", 4], "multiples of 4"),
    (train_eval, (32, 30), ["--batch_size", 4, "--arch", ARCH], "multiples of 4"),
    (train_eval, (32, 32), ["--batch_size", 1], "1 images of 32x32 pixels a process do not pass"),
    (train_search, (30, 30), ["--batch_size", 4, "--search_space", "s2"], "multiples of 4"),
    (train_search, (4, 4), ["--batch_size", 1, "--search_space", "s2"], "two images a process")],
    ids=["tower", "odd", "odd in nasbench201", "one image", "odd in a search", "one image in a search"])
def test_images_that_cannot_pass_are_named(script, size, flags, said, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(*size)
    assert said in refused(monkeypatch, capsys, script, "--init_channels", 2, "--layers", 4, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size, flags", [((28, 28), ["--no-auxiliary"]), ((64, 32), [])], ids=["28", "64"])
def test_multiply_adds_are_those_of_the_images(size, flags, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(*size)
    run_main(monkeypatch, train_eval, "--init_channels", 2, "--layers", 3, "--batch_size", 4, "--epochs", 1,
             "--save", "one", *flags)
    # Channels-last can corrupt the heap here, so that it is not used.
    assert "--memory_format contiguous: oneDNN's" in (tmp_path / "runs/one/log.txt").read_text()
    counted = runs.read_config("runs/one")["multiply_adds"]
    net = train_eval.Network(2, 3, 3, False, genotypes.load("LAMBDA_DARTS"))
    classifier = net.classifier.weight.numel()
    assert counted - classifier == (count_multiply_adds(net) - classifier) * size[0] * size[1] / 32**2


def test_a_search_avoids_the_fault_of_onednn(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images(64, 64)
    run_main(monkeypatch, train_search, "--search_space", "s2", "--init_channels", 2, "--layers", 4,
             "--batch_size", 4, "--epochs", 1, "--lambda_reg", 0, "--save", "one")
    assert "--memory_format contiguous: oneDNN's" in (tmp_path / "runs/one/log.txt").read_text()


@pytest.mark.parametrize("fail", [
    lambda: torch.empty(2**50, dtype=torch.uint8), lambda: bytearray(2**60),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))])
@pytest.mark.parametrize("hidden", [False, True])
def test_no_memory_and_no_file_are_one_line_but_a_bug_is_not(fail, hidden, monkeypatch, capsys):
    def main():
        try:
            fail()
        finally:
            if hidden:
                raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(SystemExit) as stopped:
        runs.script(main, "a smaller --batch_size")
    message, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message.startswith("error: out of memory (")
    assert message.endswith("); use a smaller --batch_size")
    with pytest.raises(SystemExit) as stopped:
        runs.script(lambda: Path("nowhere/x").mkdir())
    message, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message == "error: [Errno 2] No such file or directory: 'nowhere/x'"
    with pytest.raises(RuntimeError, match="a bug"):
        runs.script(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
