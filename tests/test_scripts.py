"""The two commands as a user types them: real processes, real folders."""
import collections
import functools
import gc
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train_eval
import train_search
from ldarts import Genotype, Network, data, genotypes, runs
from ldarts.distributed import Processes
from ldarts.runs import load_checkpoint, parse_search_args
from test_archives import python2_pickle, rows, write_cifar10

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "synthetic", "--image_size", "8", "--init_channels", "2", "--layers", "4",
        "--search_space", "s2", "--report_freq", "3", "--batch_size", "500"]


def run(folder, script, *args, **environment):
    script = os.path.relpath(ROOT / script, folder)
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=folder, text=True,
                          capture_output=True, timeout=300, env=os.environ | environment)


def printed_by(forks, folder, script, *args) -> str:
    """What a run that succeeds prints; forked, which saves its imports."""
    status, file = forks.finish(forks.start(folder, script, *args)), folder.with_suffix(".printed")
    printed = file.read_text()
    file.unlink()
    assert status == 0, printed
    return printed


@pytest.fixture(scope="module", autouse=True)
def synthetic_once():
    """The generated images of a seed, which take a second, are made once in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synthetic", functools.cache(data.synthetic))
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory, forks):
    """The folder and the output of one small search."""
    folder = tmp_path_factory.mktemp("search")
    return folder, printed_by(forks, folder, "train_search.py", *TINY, "--train_portion", 0.1, "--batch_size",
                              100, "--epochs", 2, "--probe_batches", 2, "--save", "one")


def test_a_search_leaves_a_whole_run_folder(searched):
    folder, printed = searched
    path = folder / "runs" / "one"
    wanted = {"checkpoint.pt", "config.json", "genotype.json", "log.txt", "metrics.jsonl"}
    assert wanted <= set(os.listdir(path))
    config = json.loads((path / "config.json").read_text())
    assert config["search_space"] == "s2" and config["lambda_reg"] == 0.125
    assert config["versions"]["torch"] == torch.__version__
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [0, 1]
    assert [line["lambda_reg"] for line in metrics] == [0, 0.125]
    for name in ("lambda_train", "lambda_valid", "entropy", "skip_connections", "valid_accuracy", "seconds",
                 "lambda_grad_norm", "loss_grad_norm", "clipped", "gini"):
        assert name in metrics[1]
    assert len(metrics[1]["cell_shares"]) == 2 and sum(metrics[1]["cell_shares"]) == pytest.approx(1)
    assert set(metrics[1]["operation_grads"]) == {"skip_connect", "sep_conv_3x3"}
    assert metrics[0]["lambda_grad_norm"] == 0 < metrics[1]["lambda_grad_norm"]
    alphas = [torch.tensor(line["alphas"]) for line in metrics]  # of each type of cell [14, 2]
    assert alphas[0].shape == (2, 14, 2) and not torch.equal(*alphas)
    genotype = genotypes.load(str(path))
    assert isinstance(genotype, Genotype) and genotypes.load(str(genotype)) == genotype
    for shown in ("s/step", " left", "loss", "accuracy", f"genotype: {genotype}\n", "skip connections",
                  "Λ train ", "train_eval.py --arch runs/one --dataset synthetic"):
        assert shown in printed, shown


def test_the_genotype_of_a_search_is_trained_then_tested(searched, forks):
    folder, _ = searched
    small = ["--arch", "runs/one", "--data", write_cifar10(folder / "cifar", 20), "--init_channels", 2,
             "--layers", 3, "--batch_size", 20]
    printed_by(forks, folder, "train_eval.py", *small, "--epochs", 1, "--save", "eval")
    metrics = json.loads((folder / "runs/eval/metrics.jsonl").read_text())
    assert 0 <= metrics["test_accuracy"] <= 100
    again = printed_by(forks, folder, "train_eval.py", *small, "--evaluate", "runs/eval/checkpoint.pt")
    assert f"accuracy {metrics['test_accuracy']:.2f} %" in again
    assert sorted(os.listdir(folder / "runs")) == ["eval", "one"]  # testing alone writes nothing


def test_the_command_that_a_search_prints_is_accepted(searched, monkeypatch, capsys):
    folder, printed = searched
    monkeypatch.chdir(folder)
    script, *flags = shlex.split(printed.split("train it: python ")[1].splitlines()[0])
    assert (folder / script).resolve() == ROOT / "train_eval.py"
    # It stops before the first step.
    assert "batch size 1000000" in refusal(capsys, train_eval, *flags, "--batch_size", 10**6)


BAD_SEARCH = {
    "unknown space": (["--search_space", "s9"], "darts, s5, s1, s2, s3, s4"),
    "unknown data set": (["--dataset", "mnist"], "cifar10, cifar100, svhn, synthetic"),
    "second order in nasbench201": (["--search_space", "nasbench201", "--unrolled"], "--unrolled"),
    "exact Hessian without second order": (["--hessian", "exact"], "--unrolled"),
    "nothing left for α": (["--train_portion", "1"], "--train_portion"),
    "batch larger than the split": (["--batch_size", "3000"], "batch size 3000"),
    "one normal cell": (["--layers", "3"], "--layers 4"),
    "odd channels": (["--init_channels", "3"], "3 channels"),
    "no such device": (["--device", "gpu"], "--device gpu"),
    "not a number": (["--lambda_reg", "nan"], "--lambda_reg"),
    "bf16 on a CPU": (["--amp", "bf16", "--device", "cpu"], "--amp bf16"),
    "zero steps": (["--report_freq", "0"], "--report_freq: '0': expected a whole number from 1"),
    "no share": (["--cutout_prob", "2"], "--cutout_prob: '2': expected a number from 0 to 1"),
    "a seed too large": (["--seed", str(2**64)], "--seed: '18446744073709551616': expected"),
    "a negative seed": (["--seed", "-1"], "--seed: '-1': expected a whole number from 0 to 2^63 - 1"),
    "a size that is no divisor": (["--image_size", "5"], "images of 5 pixels: those of this set have 32"),
    "no probe": (["--probe_batches", "0"], "--probe_batches: '0'"),
    "more probes than batches": (["--probe_batches", "99"], "--probe_batches 99: an epoch has "),
    "a graph without a GPU": (["--graph", "--device", "cpu"], "--graph: needs a GPU"),
    "unknown flag": (["--lambda", "1"], "--lambda"),
    "no data": (["--dataset", "svhn", "--data", "/nonexistent/x"], "/nonexistent/x"),
}


@pytest.mark.parametrize("args, named", BAD_SEARCH.values(), ids=BAD_SEARCH)
def test_a_bad_search_is_one_line_and_leaves_nothing(tmp_path, args, named, monkeypatch, capsys):
    assert_refused(train_search, [*TINY, *args], named, tmp_path, monkeypatch, capsys)


def bad_genotypes(folder):
    (folder / "not.json").write_text("{")
    (folder / "other.json").write_text('{"normal": [["sep_conv_9x9", 0]]}')
    (folder / "code.json").write_text("__import__('os').mkdir('made')")
    torch.save({"model": {"stem.0.weight": torch.zeros(1)}}, folder / "other.pt")
    (folder / "cut.pt").write_bytes((folder / "other.pt").read_bytes()[:300])


BAD_EVAL = {
    "unknown architecture": (["--arch", "DARTS_V3"], "LAMBDA_DARTS"),
    "not JSON": (["--arch", "not.json"], "not.json"),
    "not a genotype": (["--arch", "other.json"], "other.json"),
    "code": (["--arch", "code.json"], "code.json"),
    "weights of another network": (["--evaluate", "other.pt"], "other.pt"),
    "truncated checkpoint": (["--evaluate", "cut.pt"], "cut.pt"),
    "no checkpoint": (["--evaluate", "none.pt"], "none.pt"),
    "a negative seed": (["--seed", "-1"], "--seed: '-1': expected a whole number from 0 to 2^63 - 1"),
    "auxiliary tower in nasbench201": (
        ["--arch", "|nor_conv_3x3~0|+|nor_conv_3x3~0|skip_connect~1|+|none~0|none~1|none~2|", "--auxiliary"],
        "--auxiliary"),
}


@pytest.mark.parametrize("args, named", BAD_EVAL.values(), ids=BAD_EVAL)
def test_a_bad_evaluation_is_one_line_and_leaves_nothing(tmp_path, args, named, monkeypatch, capsys):
    bad_genotypes(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert_refused(train_eval, ["--dataset", "synthetic", "--init_channels", "4", "--layers", "3", *args],
                   named, tmp_path, monkeypatch, capsys, before)


@pytest.mark.parametrize("arch", ["noise.json", "|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"],
                         ids=["s4", "nasbench201"])
def test_cells_that_leave_weights_without_a_gradient_are_trained(tmp_path, arch, monkeypatch):
    edges = [["noise", 0], ["noise", 1]] * 3 + [["noise", 0], ["sep_conv_3x3", 0]]
    cell = {name: value for kind in ("normal", "reduce")
            for name, value in ((kind, edges), (f"{kind}_concat", [2, 3, 4, 5]))}
    (tmp_path / "noise.json").write_text(json.dumps(cell))
    monkeypatch.chdir(tmp_path)
    images = write_cifar10(tmp_path / "cifar", 8)
    in_process(train_eval, "--data", images, "--arch", arch, "--init_channels", 4, "--layers", 1,
               "--epochs", 1, "--batch_size", 8, "--no-auxiliary", "--save", "one")
    assert json.loads((tmp_path / "runs/one/metrics.jsonl").read_text())["epoch"] == 0


def test_the_demo_is_the_search_that_it_prints(tmp_path, monkeypatch, capsys):
    found = []
    for flags in (["--demo", "--epochs", "7"], None):
        flags = flags or capsys.readouterr().out.partition(": ")[2].split() + ["--epochs", "7"]
        monkeypatch.setattr(sys, "argv", ["train_search.py", *flags])
        found.append(parse_search_args())
    assert found[0] == found[1] and (found[0].dataset, found[0].epochs) == ("synthetic", 7)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "search", "seed": 0} | vars(found[0])))
    monkeypatch.setattr(sys, "argv", ["train_search.py", "--resume", str(tmp_path), "--demo"])
    assert parse_search_args().epochs == 7  # those of the run


def assert_refused(script, args, named, folder, monkeypatch, capsys, before=()):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script.__name__, *args])
    with pytest.raises(SystemExit) as stopped:
        train_search.script(script.main)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and len(message.strip().splitlines()) == 1 and named in message
    assert sorted(os.listdir(folder)) == list(before)


def test_an_existing_run_is_not_written_over(searched, monkeypatch, capsys):
    monkeypatch.chdir(searched[0])
    for name in ("one", "one/log.txt"):  # a folder, a file
        assert f"runs/{name} exists" in refusal(capsys, train_search, *TINY, "--epochs", 2, "--save", name)


def test_a_checkpoint_is_a_plain_dictionary_of_the_network(searched):
    folder, _ = searched
    state = load_checkpoint(str(folder / "runs/one/checkpoint.pt"))
    net = train_search.SearchNetwork(2, 10, 4, "s2")
    net.load_state_dict(state["model"])


# ---- terminals, shells, systems

@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("script", [train_search, train_eval], ids=["search", "evaluation"])
def test_help_is_printed_on_every_terminal(script, encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(SystemExit) as stopped:
        in_process(script, "--help")
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue().decode(encoding)
    assert stopped.value.code == 0 and "--dataset" in shown
    assert "\\u039b-DARTS" in shown or script == train_eval
    assert ("checkpoint_minutes, workers " in " ".join(shown.split())) == (script == train_eval)


def test_a_search_on_an_ascii_terminal_in_a_folder_with_a_space(tmp_path):
    """Its log is UTF-8 whatever the terminal; choices may be given in capitals."""
    write_cifar10(tmp_path / "my data", 8)
    capitals = ["--dataset", "CIFAR10", "--search_space", "NASBench201", "--lambda_kind", "SIGN", "--device",
                "CPU", "--lambda_grad", "Exact"]
    locale = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = run(tmp_path, "train_search.py", *capitals, *SMALL, "--data", "my data", **locale)
    assert result.returncode == 0, result.stderr
    assert f"--arch 'runs/one run' --dataset cifar10 --data '{tmp_path}/my data'" in result.stdout
    assert r"\u039b" in result.stdout and "Λ" in (tmp_path / "runs/one run/log.txt").read_text("utf-8")
    config = json.loads((tmp_path / "runs/one run/config.json").read_text())
    assert (config["search_space"], config["lambda_kind"]) == ("nasbench201", "sign")


@pytest.mark.parametrize("name", ["ldarts", "ldarts.runs"])
def test_a_system_without_fcntl_is_told_in_one_line(name):
    result = subprocess.run([sys.executable, "-c", f"import sys; sys.modules['fcntl'] = None; import {name}"],
                            cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: ldarts runs on Linux and macOS")


def test_what_takes_long_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr("ldarts.errors.progress.__defaults__", (0.1,))

    def evaluate(pause):
        class Net(torch.nn.Module):
            def forward(self, x):
                time.sleep(pause)
                return x

        batches = [(torch.zeros(1, 10), torch.zeros(1, dtype=torch.int64))] * 4
        runs.evaluate(Net(), torch.nn.CrossEntropyLoss(), batches, Processes(torch.device("cpu")))
        return capsys.readouterr().err.splitlines()

    first, second, *_ = evaluate(0.2)  # after 0.1 s and 0.3 s
    assert first == "evaluation: batch 1 of 4" and second == "evaluation: batch 2 of 4"
    assert evaluate(0) == []


# ---- the images of a run

def test_both_halves_of_a_search_have_all_classes_of_a_sorted_set(monkeypatch):
    halves = []

    def note(images, indices, *args, **options):
        halves.append(images.labels[indices])
        return data.Batches(images, indices, *args, **options)

    def stop(seed):
        raise KeyboardInterrupt

    train, test = data.synthetic(0, 100, 10)
    train = train._replace(labels=train.labels.sort().values)
    for name, other in (("load", lambda *_, **options: (train, test)), ("Batches", note),
                        ("seed_everything", stop)):
        monkeypatch.setattr(train_search, name, other)
    with pytest.raises(SystemExit):
        in_process(train_search, "--batch_size", 10)
    assert [len(half.unique()) for half in halves] == [10, 10]


SEARCH = [train_search, "--search_space", "nasbench201"]
EVAL = [train_eval, "--arch", ROOT / "tests/genotypes/convs.json", "--no-auxiliary"]
SMALL = ["--init_channels", 2, "--layers", 1, "--batch_size", 8, "--epochs", 1, "--save", "one run"]


def in_process(script, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, args)])
        train_search.script(script.main)


def refusal(capsys, script, *args, status=2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        in_process(script, *args)
    message, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == status
    return message


@pytest.mark.parametrize("command", [SEARCH, EVAL], ids=["search", "evaluation"])
def test_a_run_goes_on_with_its_own_images_alone(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = {name: write_cifar10(tmp_path / name, 12 if name == "more" else 8)
               for name in ("own", "more", "other pixels", "other labels")}
    for name, labels, seed in (("other pixels", range(8), 9), ("other labels", range(1, 9), 0)):
        (folders[name] / "data_batch_1").write_bytes(python2_pickle(labels, rows(8, seed=seed)))
    in_process(*command, *SMALL, "--data", "own")
    for name in ("more", "other pixels", "other labels"):
        message = refusal(capsys, command[0], "--resume", "runs/one run", "--data", name)
        assert "runs/one run/checkpoint.pt: the run was started on 40 images of 10 classes" in message
        images = 60 if name == "more" else 40
        assert f"--data {tmp_path}/{name} holds {images} images of 10 classes" in message
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir("empty")  # the images are found from every folder
    in_process(command[0], "--resume", "../runs/one run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").rename("elsewhere")
    in_process(command[0], "--resume", "runs/one run", "--data", "elsewhere")
    assert "--resume 'runs/one run'" in refusal(capsys, *command, *SMALL, "--data", "elsewhere")


@pytest.mark.parametrize("command", [SEARCH, EVAL], ids=["search", "evaluation"])
def test_a_program_around_a_run_has_its_signal_handlers_back(command, tmp_path, monkeypatch):
    """And the folder is unlocked, however the run ends; a second SIGINT stops the run, not the program."""
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "own", 8)
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    evaluate, sent = runs.evaluate, []

    def interrupted(*args, **options):
        for number in sent:
            assert signal.getsignal(number) not in before
            signal.raise_signal(number)
        return evaluate(*args, **options)

    monkeypatch.setattr(command[0], "evaluate", interrupted)
    start, resume = [*command[1:], *SMALL, "--data", "own", "--epochs", 3], ["--resume", "runs/one run"]
    for argv, sent, status in ((start, [signal.SIGTERM], 143), (resume, [signal.SIGINT] * 2, 130),
                               (resume, [signal.SIGUSR1], 0)):
        with pytest.raises(SystemExit) as stopped:
            in_process(command[0], *argv)
        assert stopped.value.code == status and [signal.getsignal(number) for number in numbers] == before
    sent = []
    in_process(command[0], *resume)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("command", [[*SEARCH, "--tensorboard"], EVAL], ids=["search", "evaluation"])
def test_runs_of_one_process_leave_nothing_behind(command, tmp_path, monkeypatch, capsys):
    """After the first ones no object, tensor, thread or open file is added; no warning is printed again; the
    weights are drawn from the seed."""
    if "--tensorboard" in command:
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "own", 8)
    left = []
    for name in range(4):
        in_process(*command, *SMALL, "--data", "own", "--save", name)
        gc.collect()
        objects = gc.get_objects()
        left.append([len(objects), sum(type(thing) is torch.Tensor for thing in objects),
                     threading.active_count(), len(os.listdir("/dev/fd"))])
        del objects
    assert left[3][1:] == left[1][1:] and left[3][0] < left[1][0] + 200
    losses = {runs.read_metrics(f"runs/{name}")[-1]["train_loss"] for name in range(4)}
    assert len(losses) == 1, losses
    assert max(collections.Counter(capsys.readouterr().err.splitlines()).values(), default=0) <= 1


@pytest.mark.parametrize("command", [SEARCH, EVAL], ids=["search", "evaluation"])
def test_a_run_in_a_thread_goes_on_without_signal_handlers(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "own", 8)
    thread = threading.Thread(target=in_process, args=[*command, *SMALL, "--data", "own"])
    thread.start()
    thread.join()
    assert len(Path("runs/one run/metrics.jsonl").read_text().splitlines()) == 1


def test_a_first_checkpoint_that_never_was_is_not_advised(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path / "own", 8)
    message = refusal(capsys, *EVAL, *SMALL, "--data", "own", "--learning_rate", 1e38, "--grad_clip", 1e38,
                      status=3)
    assert "of epoch 0; there is no checkpoint before it: start again with another --save" in message
    assert "--resume" not in message
