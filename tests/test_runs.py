"""Command line, presets and the run folder, through a script of a few lines whose runs take no time."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib
import inspect
import io
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

from support import figures, runs
from support.datasets import Split
from support.distributed import reports_errors
from support.metrics import audit_order, audit_scores
from support.runs import Parser, Run, add_data_args, add_training_args, number, parse_with_presets

import numpy as np
import pytest
import torch
from conftest import lines, same_end
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import common
from common import UserError

ROOT = Path(common.__file__).parent
METHODS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef restore(" in path.read_text())
PRESETS = {
    "scratch": dict(size=100, epochs=30, lr=0.1),
    "scratch toy": dict(size=16, epochs=3),
    "scratch ferplus": dict(size=48),
    "pretrained": dict(size=224, epochs=40, lr=0.01),
    "pretrained ferplus": dict(size=96, epochs=9),
    "pretrained own": dict(lr=0.5),
    "pretrained own ferplus": dict(epochs=5),
}


def parse_args(argv=None):
    parser = Parser("mini.py", "Mini: a method.\n\nAnd more.")
    add_data_args(parser)
    add_training_args(parser)
    parser.set_defaults(batch_size=4, head_lr=0.1)
    parser.add_argument("--crop", type=number(int, 0), default=0, help="pixels")
    return parse_with_presets(parser, PRESETS, argv)


def make_data(count=12, **changes):
    """A training and a test split of three classes; changes: of the training split."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    clean = torch.arange(count) % 3
    labels = torch.where(torch.arange(count) < 2, (clean + 1) % 3, clean)
    train = Split(images, labels, clean, None, [f"{i}.png" for i in range(count)], ("a", "b", "c"))
    test = Split(images[:6] // 2, clean[:6], None, None, [f"t{i}.png" for i in range(6)], ("a", "b", "c"))
    train = dataclasses.replace(train, **changes)
    return train, dataclasses.replace(test, classes=train.classes)


class Script:
    """A method: what `load` gives is trained on, `at(epoch)` is called in each epoch, `at("end")` before the end."""

    def __init__(self):
        self.load, self.at = make_data, lambda epoch: None

    @property
    def main(self):
        @reports_errors
        def main(argv=None) -> int:
            with Run(parse_args(argv)) as run:
                train, test = self.load()
                torch.manual_seed(0)
                network = nn.Linear(16, 3)
                optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
                current = train.labels.clone()
                x = train.images.flatten(1) / 255
                for epoch in run.epochs(train, test, network=network, optimizer=optimizer, labels=current):
                    self.at(epoch)
                    loss = nn.functional.cross_entropy(network(x), current)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    current[epoch % 3] = train.clean[epoch % 3]
                    scalars = {"loss/total": loss.item(), "accuracy/train": 0.5, "threshold": [0.0, None, 0.75]}
                    given = dict(scalars)
                    run.end_epoch(epoch, scalars, network(test.images.flatten(1) / 255).softmax(1), current)
                    assert scalars == given
                self.at("end")
                run.finish(network(x).softmax(1), [network], current)
            return 0

        return main

    def __call__(self, out, *flags, name="run"):
        return self.main(["--out", str(out), "--name", name, *flags])


@pytest.fixture
def script(monkeypatch):
    """A Script; figures are two grey pixels, the commit is known, and the data are not on the command line."""
    monkeypatch.setattr(figures, "render", lambda figure: np.full((1, 2, 3), 99, np.uint8))
    for name in ("curves", "confusion", "audit"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(runs, "commit", lambda: "abc")
    return Script()


def stop(epoch, error=KeyboardInterrupt):
    """What stops a Script in that epoch."""

    def at(now):
        if now == epoch:
            raise error

    return at


@pytest.fixture
def unfinished(script, tmp_path):
    """The folder of a run that was stopped in its third epoch; the script itself is not stopped any more."""
    script.at = stop(3)
    assert script(tmp_path) == 130
    script.at = lambda epoch: None
    return tmp_path / "run"


def content(folder):
    """What is in a folder, below it too: {path: (bytes, time)}."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def error_line(capsys):
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "Traceback" not in error, error
    return error


# ----------------------------------------------------------------------------------------------------------------------
# Command line and presets
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch):
    """A backbone "own" of 112 pixels, with weights "own" and files .own."""
    backbone = type("Own", (), {"size": 112})
    monkeypatch.setitem(common.BACKBONES, "own", backbone)
    monkeypatch.setitem(common.PRETRAINED, "own", "own")
    monkeypatch.setitem(common.PRETRAINED, ".own", "own")


@pytest.mark.parametrize(
    "flags, values",
    [
        ([], dict(size=16, epochs=3, lr=0.1, backbone="resnet18", root="data/toy")),
        (["--data", "raf"], dict(size=100, epochs=30, lr=0.1, root="data/raf")),
        (["--data", "ferplus", "--epochs", "7"], dict(size=48, epochs=7, lr=0.1)),
        (["--pretrained", "w.pth"], dict(size=224, epochs=40, lr=0.01, backbone="resnet18")),
        (["--pretrained", "w.pth", "--data", "ferplus"], dict(size=96, epochs=9, lr=0.01)),
        (["--pretrained", "own"], dict(size=112, epochs=40, lr=0.5, backbone="own")),
        (["--pretrained", "x/y.own", "--data", "ferplus"], dict(size=112, epochs=5, lr=0.5, backbone="own")),
        (["--pretrained", "own", "--size", "120", "--lr", "2"], dict(size=120, epochs=40, lr=2.0)),
        (["--seed", "5"], dict(noise_seed=5)),
        (["--seed", "5", "--noise-seed", "6"], dict(noise_seed=6)),
        (["--data", "affectnet"], dict(oversample=True)),
        (["--data", "affectnet-auto", "--no-oversample"], dict(oversample=False)),
        (["--data", "raf", "--oversample"], dict(oversample=True)),
    ],
)
def test_presets_refine_one_another_and_flags_win(flags, values, own):
    args = parse_args(flags)
    assert {key: getattr(args, key) for key in values} == values
    assert args.method == "mini" and args.argv == flags
    shown = re.split("[:;,] ", args.preset)  # the line at start
    assert {f"{key} {values[key]}" for key in ("size", "epochs", "lr") if key in values} <= set(shown)


def help_of(main, *flags):
    """{flag: its help} of what --help shows."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*flags, "--help"]) == 0
    text = out.getvalue().split("\n\n", 2)[2]
    entries = re.split(r"\n  (?=-)", re.sub(r"\n {3,}", " ", "\n" + text))
    return {re.match(r"--[\w-]+", entry)[0]: " ".join(entry.split()) for entry in entries if entry.startswith("--")}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags", [[], ["--data", "ferplus"], ["--data", "affectnet"], ["--pretrained", "x"]])
def test_help_and_the_line_at_start_show_the_values_in_force(method, flags):
    module = importlib.import_module(method)
    if "--pretrained" in flags and "pretrained" not in module.PRESETS:
        return
    data = flags[1] if "--data" in flags else "toy"
    args, shown = module.parse_args(flags), help_of(module.main, *flags)
    _, preset = runs.preset_of(module.PRESETS, data, getattr(args, "pretrained", "none"))
    for key in preset:
        value, flag = getattr(args, key), {"lam": "--lambda"}.get(key, f"--{key.replace('_', '-')}")
        assert f"(default: {value})" in shown[flag]
        assert f"{key} {value}" in args.preset
    assert ("changed" in args.preset) == ("--pretrained" in flags)
    assert f"(default: data/{data})" in shown["--root"]
    assert ("(default: on)" in shown["--oversample"]) == (data == "affectnet")


def test_the_line_at_start_shows_other_flags_too():
    flags = "--noise 0.3 --alpha 0.5 --lr 0.02 --seed 3 --no-semi".split()
    args = importlib.import_module("twostage").parse_args(flags)
    assert "lr 0.02" in args.preset.split(";")[0]
    assert args.preset.split("; ")[1] == "changed: noise 0.3, alpha 0.5, semi False"


def test_flags_are_not_abbreviated(capsys):
    scn = importlib.import_module("scn")
    assert scn.main(["--hel"]) == 2 and "unrecognized arguments: --hel" in error_line(capsys)


def test_help_shows_what_a_flag_beside_it_changes():
    ncctfer = importlib.import_module("ncctfer")
    assert "(default: least)" in help_of(ncctfer.main, "--single-head")["--mask"]
    assert "(default: most)" in help_of(ncctfer.main)["--mask"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_warm_up(method):
    module = importlib.import_module(method)
    assert module.parse_args(["--warm-up", "3"]).warm_up == 3 and module.parse_args(["--warm-up", "0"]).warm_up == 0
    assert "first epochs" in help_of(module.main)["--warm-up"]
    assert module.main(["--warm-up", "-1"]) == 2


@pytest.mark.parametrize(
    "kind, ends, good, bad",
    [
        (float, (0, 1), ["0", "1", "0.5"], ["-0.1", "1.1", "nan", "inf", "x", ""]),
        (float, (0,), ["0", "1e9"], ["-1", "inf", "nan"]),
        (int, (1, 5), ["1", "5"], ["0", "6", "1.5", "9" * 5000]),
    ],
)
def test_numbers_have_their_range(kind, ends, good, bad):
    parse = number(kind, *ends)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises((ValueError, runs.argparse.ArgumentTypeError)):
            parse(text)


def test_an_open_end_of_a_range_is_outside():
    parse = number(float, 0, 1, open_low=True, open_high=True)
    assert parse("0.5") == 0.5
    for text, shown in (("0", r"\(0, 1\)"), ("1", "1 is outside")):
        with pytest.raises(runs.argparse.ArgumentTypeError, match=shown):
            parse(text)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seed", str(2**64 + 1)], "--seed"),
        (["--noise-seed", str(2**63)], "--noise-seed"),
        (["--seed", "-1"], "--seed"),
        (["--size", str(10**8)], "--size"),
        (["--size", "15"], "--size"),
        (["--epochs", str(10**10)], "--epochs"),
        (["--crop", "16"], "--crop 16"),
        (["--limit", str(10**30)], "--limit"),
        (["--lr", "inf"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--batch-size", "1"], "--batch-size"),
        (["--precision", "x"], "--precision"),
        (["--name", "a/b"], "--name"),
        (["--name", ".."], "--name"),
        (["--name", "."], "--name"),
        (["--name", ""], "--name"),
        (["--name", "../x"], "--name"),
        (["--name", "a\\b"], "--name"),
        (["--name", "/x"], "--name"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--predict", "m.pt"], "then images"),
        (["--evaluate", "m.pt", "--predict", "m.pt", "x"], "two jobs"),
        (["--no\nsuch"], "unrecognized"),
        (["--pretrained", "own", "--size", "111"], "needs 112"),
        (["--noise", "0.2", "--labels", "x"], "exclude"),
        (["--root", "x"], "--root"),
        (["--data", "raf", "--difficulty", "1"], "--difficulty"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, words, own, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert script.main(flags) == 2
    assert words in error_line(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["caf\udce9", "a\nb", "a\x1b[1m"])
def test_folders_that_tensorboard_cannot_name_are_refused(name, script, tmp_path, capsys):
    for out, run in ((tmp_path, name), (tmp_path / name, "run")):
        assert script(out, name=run) == 2
        assert "a control character, or not UTF-8" in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_names_that_are_one_folder_are_taken():
    for name in ("run", ".hidden", "a b", "...x", "中", "$x$"):
        assert parse_args(["--name", name]).name == name


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--noise", "0.4", "--seed", "3"], "mini-toy-n0.4-s3"),
        (["--lr", "0.5", "--oversample", "--device", "cpu", "--out", "x"], "mini-toy-n0-lr0.5-oversample-s1"),
        (["--data", "folder", "--root", "my/fa ces"], "mini-folder-n0-rootfa_ces-s1"),
        (["--data", "raf", "--root", "elsewhere", "--labels", "a/list of.csv"], "mini-raf-n0-labelslist_of-s1"),
        (["--evaluate", "runs/good/model.pt"], "good-on-toy"),
        (["--evaluate", "runs/good/model.pt", "--data", "raf", "--split", "valid"], "good-on-raf-valid"),
        (["--predict", "runs/good/model.pt", "x.png", "y"], "good-predictions"),
        (["--evaluate", "runs/good/model.pt", "--name", "mine"], "mine"),
    ],
)
def test_default_names(flags, name):
    assert parse_args(flags).name == name


def test_without_training_size_and_precision_are_those_of_the_checkpoint(own):
    args = parse_args(["--backbone", "own", "--evaluate", "m.pt"])
    assert args.size is None and args.precision is None


# ----------------------------------------------------------------------------------------------------------------------
# The folder: whose it is
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_and_what_it_leaves(script, tmp_path, capsys):
    assert script(tmp_path / "new" / "out") == 0
    folder, said = tmp_path / "new" / "out" / "run", capsys.readouterr()
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    drawn = ("curves.png", "confusion.png", "audit.png")
    assert names == {".lock", "args.json", "metrics.jsonl", "last.pt", "model.pt", "labels.csv", *drawn}
    assert [line.split()[0] for line in said.out.splitlines()[-3:]] == ["best", "last5", "final"] and not said.err
    assert "preset scratch toy: size 16, epochs 3, lr 0.1" in said.out
    assert "of the first 12 rows of labels.csv 2 have a label that the noise made wrong" in said.out
    history = lines(folder)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert history[0]["threshold/a"] == 0.0 and history[0]["threshold/c"] == 0.75
    assert "threshold/b" not in history[0] and "threshold" not in history[0]
    assert [line["relabel/changed"] for line in history] == [1, 1, 2]
    record = json.loads((folder / "args.json").read_text())
    assert record["commit"] == "abc" and record["size"] == 16 and record["argv"][0] == "--out"
    model = common.load_checkpoint(folder / "model.pt")
    assert set(model) == {"method", "classes", "args", "networks"} and model["classes"] == ["a", "b", "c"]
    (train, _), network = make_data(), nn.Linear(16, 3)
    network.load_state_dict(model["networks"][0])
    probs = network(train.images.flatten(1) / 255).softmax(1)
    order, scores = audit_order(probs, train.labels).tolist(), audit_scores(probs, train.labels)
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == [train.names[i] for i in order]
    assert [float(row[3]) for row in rows] == pytest.approx([scores[i].item() for i in order], abs=1e-5)
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Scalars("threshold/a")] == [1, 2, 3]
    assert events.Scalars("hparam/final")[0].value == pytest.approx(history[-1]["accuracy/test"])


def test_each_accuracy_is_shown_and_logged_under_its_own_name(script, tmp_path, monkeypatch, capsys):
    results = dict(best=0.9, last5=0.7, final=0.5, best_epoch=2)
    monkeypatch.setattr(runs, "summary", lambda history: results)
    assert script(tmp_path) == 0
    shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert shown == [["best", "90.00%"], ["last5", "70.00%"], ["final", "50.00%"]]
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for key in ("best", "last5", "final"):
        assert events.Scalars(f"hparam/{key}")[0].value == pytest.approx(results[key])


def test_the_audit_begins_with_the_most_suspicious_labels(script, tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(figures, "audit", lambda *given: shown.extend(given[3]))
    script.load = lambda: make_data(150)
    assert script(tmp_path) == 0
    rows = [line.split(",") for line in (tmp_path / "run" / "labels.csv").read_text().splitlines()[1:]]
    wrong = [row[1] != row[4] for row in rows]
    assert [f"{i}.png" for i in shown] == [row[0] for row in rows[:32]] and sum(wrong[:100]) != sum(wrong[-100:])
    assert f"of the first 100 rows of labels.csv {sum(wrong[:100])} have a label" in capsys.readouterr().out


FOREIGN = {
    "pictures": {"me.png": "x", "curves.png": "mine", "labels.csv": "mine", "notes.tmp.txt": "x", "a.tmp12": "x"},
    "one temporary file": {"notes.tmp.txt": "x"},
    "what looks like a run's": {"labels.csv.tmp12": "x"},
    "a folder in it": {"sub/x.txt": "x"},
    "args.json that is damaged": {"args.json": '{"method": "mini"', "metrics.jsonl": ""},
    "args.json that is no object": {"args.json": "[1, 2]", "last.pt": "x"},
    "args.json that is very deep": {"args.json": "[" * 10**5},
    "args.json in another encoding": {"args.json": "\xff"},
    "args.json of another program": {"args.json": json.dumps({"method": "adam", "lr": 1}), "model.pt": "weights"},
    "args.json of odd types": {"args.json": json.dumps({"method": {}, "argv": [], "versions": {}})},
}


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_is_not_a_runs_is_refused_and_nothing_in_it_touched(case, flags, script, tmp_path, capsys):
    for name, text in FOREIGN[case].items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_bytes(text.encode("latin1"))
    before = content(tmp_path / "mine")
    assert script(tmp_path, *flags, name="mine") == 2
    assert "no args.json says that it is a run's" in error_line(capsys)
    assert content(tmp_path / "mine") == before and not (tmp_path / "mine" / ".lock").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(script, tmp_path, capsys):
    (tmp_path / "run").write_text("precious")
    for out in (tmp_path, tmp_path / "run"):
        assert script(out) == 2
        error_line(capsys)
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "args.json.tmp123"], [".DS_Store"]])
def test_an_empty_folder_and_what_a_kill_at_the_start_left_are_taken(left, script, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    assert script(tmp_path, "--resume") == 0
    assert "run: no checkpoint to --resume, the run begins\n" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("*.tmp*"))


def test_overwrite_removes_what_a_run_writes_and_nothing_else(script, tmp_path):
    assert script(tmp_path) == 0
    folder = tmp_path / "run"
    for name in ("weights.png", "events.out.tfevents.1", "model.pt.tmp77"):  # of a run
        (folder / name).write_text("old")
    mine = ["mine.png", "labels.csv.bak", "events.txt", "sub/model.pt", "model.pt.tmp", "x.tmp12", "model_pt.tmp5"]
    mine += ["last.pt.tmp5.bak"]
    (folder / "sub").mkdir()
    for name in mine:
        (folder / name).write_text("precious")
    assert script(tmp_path, "--overwrite", "--seed", "2") == 0
    assert all((folder / name).read_text() == "precious" for name in mine)
    assert not any((folder / name).exists() for name in ("weights.png", "events.out.tfevents.1", "model.pt.tmp77"))
    assert json.loads((folder / "args.json").read_text())["seed"] == 2 and len(lines(folder)) == 3
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_picture_that_a_method_adds_is_known_by_name(method):
    source = (ROOT / f"{method}.py").read_text()
    start = source.index("run.finish(")
    found = re.findall(r"[(,]\s*(\w+)=", inspect.cleandoc(source[start : source.index("return 0", start)]))
    assert set(found) <= {*figures.NAMES, "labels"}


def test_a_folder_in_use_is_refused(unfinished, script, tmp_path, capsys):
    before = content(unfinished)
    with open(unfinished / ".lock") as lock:
        for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):  # a lock of ours is no shared one
            fcntl.flock(lock, how)
            for flags in ([], ["--resume"], ["--overwrite"]):
                capsys.readouterr()
                assert script(tmp_path, *flags) == 2
                assert "in use" in error_line(capsys)
    assert content(unfinished) == before
    assert script(tmp_path, "--resume") == 0


def test_a_lock_that_was_removed_meanwhile_does_not_count(unfinished, script, tmp_path, monkeypatch, capsys):
    def slow(*_):  # a run that never began has removed its lock, and another has begun
        (unfinished / ".lock").unlink()
        if again:
            (unfinished / ".lock").touch()

    monkeypatch.setattr(runs.fcntl, "flock", slow)
    for again in (True, False):
        (unfinished / ".lock").touch()
        capsys.readouterr()
        assert script(tmp_path, "--resume") == 2
        assert "in use" in error_line(capsys)


def test_a_file_system_without_locks_is_no_hindrance(script, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    assert script(tmp_path) == 0
    monkeypatch.setattr(runs, "fcntl", None)  # Windows
    assert script(tmp_path, name="other") == 0


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_slow_start_that_a_whole_run_overtakes_touches_nothing(flags, script, tmp_path, monkeypatch, capsys):
    take_lock, overtaken = Run.take_lock, []

    def slow(self):
        if not overtaken:
            overtaken.append(True)
            self.lock.close()
            assert script(tmp_path) == 0
            overtaken.append(content(tmp_path / "run"))
            self.lock = open(self.folder / ".lock", "a")
        take_lock(self)

    monkeypatch.setattr(Run, "take_lock", slow)
    assert script(tmp_path, *flags) == 2
    assert "finished run" in capsys.readouterr().err
    assert content(tmp_path / "run") == overtaken[1] and "model.pt" in overtaken[1]


def test_strangers_that_come_meanwhile_are_refused_too(script, tmp_path, monkeypatch, capsys):
    take_lock = Run.take_lock

    def slow(self):
        (self.folder / "mine.txt").write_text("precious")
        take_lock(self)

    monkeypatch.setattr(Run, "take_lock", slow)
    assert script(tmp_path, "--overwrite") == 2
    assert "no args.json" in error_line(capsys) and (tmp_path / "run" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("error, status", [(UserError("no data"), 2), (KeyboardInterrupt, 130), (OSError("x"), 2)])
def test_nothing_is_left_behind_if_training_never_began(error, status, script, unfinished, tmp_path, capsys):
    def load():
        raise error

    script.load = load
    before = content(unfinished)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert script(tmp_path / "a" / "b") == status and not (tmp_path / "a").exists()
    assert "--resume" not in error_line(capsys)
    assert script(tmp_path, name="empty") == status and not list((tmp_path / "empty").iterdir())
    for flags in (["--resume"], ["--overwrite"]):
        assert script(tmp_path, *flags) == status and content(unfinished) == before


def test_what_others_put_there_meanwhile_is_left_alone(script, tmp_path):
    def load():
        (tmp_path / "a" / "mine.txt").write_text("precious")
        raise UserError("no data")

    script.load = load
    assert script(tmp_path / "a") == 2
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]


def test_a_run_whose_checkpoints_were_removed_is_not_replaced_unasked(script, tmp_path, capsys):
    assert script(tmp_path) == 0
    for name in ("model.pt", "last.pt"):
        (tmp_path / "run" / name).unlink()
    before = content(tmp_path / "run")
    for flags in ([], ["--resume"]):
        capsys.readouterr()
        assert script(tmp_path, *flags) == 2
        assert "--overwrite" in error_line(capsys) and content(tmp_path / "run") == before
    assert script(tmp_path, "--overwrite") == 0


def test_an_unfinished_and_a_finished_run_are_not_replaced_unasked(script, unfinished, tmp_path, capsys):
    for flags, words in (
        ([], "--resume goes on with it"),
        (["--resume"], None),
        ([], "holds a finished run"),
        (["--resume"], "nothing left to --resume"),
    ):
        before = content(unfinished)
        capsys.readouterr()
        assert script(tmp_path, *flags) == (2 if words else 0)
        if words:
            error = error_line(capsys)
            assert words in error and "--overwrite" in error and "--name" in error
            assert content(unfinished) == before


def test_a_run_stopped_in_its_first_epoch_begins_again(script, tmp_path):
    script.at = stop(1)
    assert script(tmp_path) == 130
    script.at = lambda epoch: None
    assert script(tmp_path) == 0 and len(lines(tmp_path / "run")) == 3


# ----------------------------------------------------------------------------------------------------------------------
# Resuming
# ----------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_as_one_that_was_never_stopped(script, unfinished, tmp_path, capsys):
    assert script(tmp_path, "--resume") == 0
    said = capsys.readouterr()
    assert "going on after epoch 2" in said.out and not said.err
    assert script(tmp_path, name="whole") == 0
    same_end(tmp_path / "whole", unfinished)
    for name in ("curves.png", "model.pt"):
        assert (unfinished / name).exists()


CHANGES = {
    "image names": lambda train: dict(names=["other.png", *train.names[1:]]),
    "classes": lambda train: dict(classes=("a", "b", "z")),
    "given labels": lambda train: dict(labels=train.labels.flip(0)),
    "images": lambda train: dict(images=torch.where(torch.arange(12)[:, None, None, None] == 7, 0, train.images)),
    "valence and arousal": lambda train: dict(va=torch.zeros(12, 2)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_data_are_not_trained_on(what, script, unfinished, tmp_path, capsys):
    changes, before = CHANGES[what](make_data()[0]), content(unfinished)
    script.load = lambda: make_data(**changes)
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    error = error_line(capsys)
    assert f"these differ: {what};" in error and content(unfinished) == before
    script.load = make_data
    assert script(tmp_path, "--resume") == 0


def test_all_that_differs_is_named_and_the_test_split_counts(script, unfinished, tmp_path, capsys):
    def load():
        train, test = make_data(classes=("x", "y", "z"))
        return train, dataclasses.replace(test, labels=test.labels.flip(0), names=test.names[::-1])

    script.load = load
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    assert "these differ: image names, classes, given labels;" in error_line(capsys)


@pytest.mark.parametrize("what", ("images", "valence and arousal"))
def test_another_test_split_is_not_resumed_on(what, script, unfinished, tmp_path, capsys):
    train, test = make_data()
    changes = {"images": dict(images=255 - test.images), "valence and arousal": dict(va=torch.zeros(6, 2))}
    script.load = lambda: (train, dataclasses.replace(test, **changes[what]))
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    assert f"these differ: {what};" in error_line(capsys)


def test_further_label_sets_count():
    data = make_data()
    sets = [data[0].clean, data[0].clean.flip(0)]
    prints = [runs.fingerprint(*data, more) for more in ([], sets[:1], sets, sets[::-1])]
    assert len({one.pop("given labels") for one in prints}) == 4 and prints == [prints[0]] * 4


@pytest.mark.parametrize("fingerprint", [None, 3, {}, {"images": 1}])
def test_a_run_without_a_fingerprint_is_not_resumed(fingerprint, script, unfinished, tmp_path, capsys):
    record = json.loads((unfinished / "args.json").read_text()) | {"fingerprint": fingerprint}
    (unfinished / "args.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2 and "differ: image names" in error_line(capsys)


def test_another_version_of_the_code_is_a_warning(script, unfinished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "commit", lambda: "def+")
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 0
    assert "warning" in (error := error_line(capsys)) and "abc" in error


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("method", "other", "a run of other"),
        ("lr", 7.0, "lr was 7.0"),
        ("crop", None, "crop was None"),
    ],
)
def test_other_arguments_are_refused(key, value, words, script, unfinished, tmp_path, capsys):
    record = json.loads((unfinished / "args.json").read_text()) | {key: value}
    (unfinished / "args.json").write_text(json.dumps(record))
    before = content(unfinished)
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    assert words in error_line(capsys) and content(unfinished) == before


def test_where_a_run_lies_may_change(script, unfinished, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    unfinished.rename(tmp_path / "elsewhere" / "moved")
    assert script(tmp_path / "elsewhere", "--resume", "--cache", "other", name="moved") == 0


def spoil(**changes):
    def change(path):
        state = common.load_checkpoint(path) | changes
        common.save_checkpoint(path, **{key: value for key, value in state.items() if value is not None})

    return change


LAST = {
    "text": lambda path: path.write_text("no checkpoint"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "of another method": spoil(method="other"),
    "of no method": spoil(method=None),
    "without an optimiser": spoil(optimizer=None),
    "an optimiser of something else": spoil(optimizer={"state": {}, "param_groups": [{"params": [0, 1, 2]}]}),
    "an optimiser that is none": spoil(optimizer=7),
    "weights of another shape": spoil(network=nn.Linear(16, 4).state_dict()),
    "weights that are none": spoil(network=[1]),
    "labels that would be broadcast": spoil(labels=torch.zeros(1, dtype=torch.int64)),
    "labels of another type": spoil(labels=torch.zeros(12)),
    "labels that are none": spoil(labels=3),
    "an epoch too far": spoil(epoch=4),
    "an epoch below one": spoil(epoch=0),
    "an epoch that is none": spoil(epoch=2.0),
    "an epoch without its line": spoil(epoch=3),
    "no epoch": spoil(epoch=None),
    "no table": spoil(table=None),
}


@pytest.mark.parametrize("case", LAST)
def test_a_last_checkpoint_that_does_not_fit_is_one_line(case, script, unfinished, tmp_path, capsys):
    LAST[case](unfinished / "last.pt")
    before = content(unfinished)
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    assert "last.pt" in error_line(capsys) and content(unfinished) == before
    assert script(tmp_path, "--overwrite") == 0


def line(epoch):
    return json.dumps({"epoch": epoch, "seconds": 0.1, "accuracy/test": 0.5, "accuracy/train": 0.5}) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        line(1) + '{"epoch": 2,\n',
        line(1) + "\n" + line(2),
        "\0\0\n" + line(2),
        line(1) + "[2]\n",
        line(1) + "2\n",
        line(1) + '{"epoch": 2}\n',
        line(1) + line("2"),
        line(1) + line(2).replace("0.5", '"0.5"'),
        "\x80\n" + line(2),
        line(1),
        line(1) + line(2).rstrip("\n"),
        line(2) + line(1),
        line(1) + line(1),
        line(1) + line(3),
        "",
        None,
        "[" * 10**5 + "\n",
    ],
)
def test_no_good_line_of_the_metrics_is_dropped(text, script, unfinished, tmp_path, capsys):
    file = unfinished / "metrics.jsonl"
    file.unlink() if text is None else file.write_bytes(text.encode("latin1"))
    before = content(unfinished)
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    assert "metrics.jsonl" in error_line(capsys) and content(unfinished) == before


@pytest.mark.parametrize("more", ["", line(3), '{"epoch": 3, "acc', line(3) + '{"epoch": 4'])
def test_lines_ahead_of_the_checkpoint_are_cut_off(more, script, unfinished, tmp_path):
    with open(unfinished / "metrics.jsonl", "a") as file:
        file.write(more)
    assert script(tmp_path, "--resume") == 0
    assert script(tmp_path, name="whole") == 0
    same_end(tmp_path / "whole", unfinished)


# ----------------------------------------------------------------------------------------------------------------------
# Stopped, and the end of a run
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_with_how_to_go_on(name, script, tmp_path, monkeypatch, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)

    def kill(epoch):
        if epoch == 2:
            os.kill(os.getpid(), number)
            signal.pause()

    try:
        script.at = kill
        assert script(tmp_path) == 130
    finally:
        signal.signal(number, before)
    assert re.fullmatch(r"\s*\S+run: the same command with --resume goes on .*\ninterrupted\n", capsys.readouterr().err)
    script.at = lambda epoch: None
    assert script(tmp_path, "--resume") == 0 and script(tmp_path, name="whole") == 0
    same_end(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_is_stopped_when_all_is_written_is_finished(script, tmp_path, monkeypatch, capsys):
    def interrupted_print(text, **how):
        if "best" in text:
            raise KeyboardInterrupt
        print(text, **how)

    monkeypatch.setattr(runs, "print", interrupted_print, raising=False)
    assert script(tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n" and (tmp_path / "run" / "model.pt").exists()


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(script, tmp_path, capsys):
    for epoch, last in ((1, "none"), (3, "last.pt (epoch 2)")):
        script.at = stop(epoch, FloatingPointError("step 7 of 9"))
        assert script(tmp_path, name=f"run{epoch}") == 2
        error = error_line(capsys)
        assert f"epoch {epoch}, step 7 of 9" in error and error.endswith(last)


def test_a_network_that_the_last_step_has_spoilt_is_not_saved(script, unfinished, tmp_path, monkeypatch, capsys):
    before = {name: (unfinished / name).read_bytes() for name in ("last.pt", "metrics.jsonl")}
    softmax = torch.Tensor.softmax  # the loss of the step does not pass through it
    monkeypatch.setattr(torch.Tensor, "softmax", lambda z, dim: torch.where(z == z.min(), torch.nan, softmax(z, dim)))
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    error = error_line(capsys)
    assert "not finite in epoch 3, after the last step" in error and error.endswith("last.pt (epoch 2)")
    assert {name: (unfinished / name).read_bytes() for name in before} == before


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("error", NO_MEMORY)
@pytest.mark.parametrize("place", ("torch.optim.SGD.load_state_dict", "torch.save"))
def test_a_full_device_is_not_taken_for_a_bad_checkpoint_or_a_full_disk(
    place, error, script, unfinished, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise error

    monkeypatch.setattr(place, fail)
    capsys.readouterr()
    assert script(tmp_path, "--resume") == 2
    assert "out of memory, a smaller --batch-size" in error_line(capsys)


def full(*_, **how):
    raise OSError(errno.ENOSPC, "No space left on device")


def half(path, content):
    with open(path, "wb") as file:
        file.write(b"half")
    full()


FULL = {  # what cannot be written any more, and by which function
    "metrics.jsonl": ("support.runs.open", full),
    "last.pt or model.pt": ("pathlib.Path.write_bytes", half),
    "labels.csv": ("support.runs.Run.write_audit", full),
    "the figures": ("support.figures.write_atomically", full),
    "the events": ("torch.utils.tensorboard.SummaryWriter.flush", full),
    "the hparams": ("torch.utils.tensorboard.writer.FileWriter.add_summary", full),
    "a figure's event": ("torch.utils.tensorboard.SummaryWriter.add_image", full),
}


@pytest.mark.parametrize("when", [2, "end"])
@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_is_full_is_one_line_and_the_run_can_be_finished(what, when, script, tmp_path, monkeypatch, capsys):
    function, fails = FULL[what]
    with monkeypatch.context() as patch:
        script.at = lambda epoch: epoch == when and patch.setattr(function, fails, raising=False)
        status = script(tmp_path)
    if what == "metrics.jsonl" and when == "end":  # nothing is written there any more, and model.pt is
        return
    assert status == 2
    error = error_line(capsys)
    assert "run: could not be written" in error and "--resume goes on after the last whole epoch" in error
    assert not list((tmp_path / "run").glob("*.tmp*"))
    script.at = lambda epoch: None
    assert script(tmp_path, "--resume") == 0 and script(tmp_path, name="whole") == 0
    same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("limit", [100, 600, 1500, 2500, 4000])
def test_files_that_cannot_grow_are_one_line_and_the_run_can_be_finished(limit, script, tmp_path, capsys):
    """The system itself refuses to write more than so many bytes into one file, as on a full disk: in threads too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status = script(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and "error: " in error_line(capsys)
    assert script(tmp_path, "--resume") == 0 and script(tmp_path, name="whole") == 0
    same_end(tmp_path / "whole", tmp_path / "run")


def test_a_figure_that_cannot_be_drawn_does_not_end_a_run(script, tmp_path, monkeypatch, capsys):
    def confusion(*_):
        raise ValueError("$\n more")

    monkeypatch.setattr(figures, "confusion", confusion)
    assert script(tmp_path) == 0
    said = capsys.readouterr()
    assert said.err == "warning: confusion.png could not be drawn ($)\n"
    assert "curves.png, audit.png" in said.out and not (tmp_path / "run" / "confusion.png").exists()
    assert (tmp_path / "run" / "model.pt").exists()


def test_the_audit_picture_has_given_and_predicted_class_and_says_where_the_label_is_wrong(tmp_path, monkeypatch):
    drawn = {}
    audit = figures.audit
    monkeypatch.setattr(figures, "audit", lambda *args: drawn.setdefault("figure", audit(*args)))
    script = Script()
    assert script(tmp_path) == 0
    (train, _), network = make_data(), nn.Linear(16, 3)
    network.load_state_dict(common.load_checkpoint(tmp_path / "run" / "model.pt")["networks"][0])
    probs = network(train.images.flatten(1) / 255).softmax(1)
    order, scores = audit_order(probs, train.labels).tolist(), audit_scores(probs, train.labels)
    predicted = probs.argmax(1)
    (axes,) = drawn["figure"].axes
    want = [f"{'abc'[train.labels[i]]}\n\N{RIGHTWARDS ARROW} {'abc'[predicted[i]]} {scores[i]:.2f}" for i in order]
    assert [text.get_text() for text in axes.texts] == want
    colours = ["tab:green" if i < 2 else "tab:red" for i in order]  # the noise made labels 0 and 1 wrong
    assert [text.get_color() for text in axes.texts] == colours
    places = [(image.get_extent(), text.get_position()) for image, text in zip(axes.images, axes.texts, strict=True)]
    assert all(left < x < right and lower < y < lower + 0.1 for (left, right, lower, _), (x, y) in places)
    for image, i in zip(axes.images, order):  # the face of that caption
        assert torch.equal(torch.from_numpy(image.get_array().data[..., 0]), train.images[i, 0])


ODD_CLASSES = ("$\\frac$", "中文 with $x$", "_x^{")


@pytest.mark.filterwarnings("error:Glyph")
def test_odd_class_names_are_drawn_and_written(tmp_path, monkeypatch, capsys):
    script = Script()  # with real figures
    script.load = lambda: make_data(classes=ODD_CLASSES)
    stream = open(tmp_path / "screen.txt", "w", encoding="ascii")  # PYTHONIOENCODING=ascii
    monkeypatch.setattr(sys, "stdout", stream)
    assert script(tmp_path) == 0
    stream.close()
    folder = tmp_path / "run"
    assert not capsys.readouterr().err
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("curves", "confusion", "audit"))
    rows = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert {row.split(",")[1] for row in rows} == {*ODD_CLASSES}
    assert {f"accuracy/class/{name}" for name in ODD_CLASSES} <= set(lines(folder)[0])
    assert tuple(common.load_checkpoint(folder / "model.pt")["classes"]) == ODD_CLASSES


def test_names_and_paths_that_are_not_utf_8_do_not_end_a_run(script, tmp_path, monkeypatch):
    name = b'caf\xe9, "x".png'.decode(errors="surrogateescape")
    script.load = lambda: make_data(names=[name, *(f"{i}.png" for i in range(11))])
    data = ["--data", "folder", "--root", str(tmp_path / b"caf\xe9".decode(errors="surrogateescape")), "--epochs", "2"]
    script.at = stop("end")
    assert script(tmp_path, *data) == 130
    script.at = lambda epoch: None
    assert script(tmp_path, *data, "--resume") == 0
    assert b'\n"caf\xe9, ""x"".png",' in (tmp_path / "run" / "labels.csv").read_bytes()
    assert common.load_checkpoint(tmp_path / "run" / "model.pt")["args"]["root"] == data[3]


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_run_without_its_standard_streams(closed, script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for name in closed:
            patch.setattr(sys, name, None)
        assert script(tmp_path) == 0
    assert len(lines(tmp_path / "run")) == 3


def test_event_files_are_written_without_tensorflow(tmp_path):
    code = (
        "import sys; from support import runs; writer = runs.summary_writer(sys.argv[1]);"
        "writer.add_scalar('a', 1, 1); writer.close(); sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert list(tmp_path.glob("events.out.tfevents.*"))


# ----------------------------------------------------------------------------------------------------------------------
# Where the code comes from
# ----------------------------------------------------------------------------------------------------------------------


def test_the_commit_is_that_of_the_scripts_with_a_mark_if_they_changed(tmp_path, monkeypatch):
    file = tmp_path / "support" / "runs.py"
    file.parent.mkdir()
    file.write_text("first\n")
    (tmp_path / "page.md").write_text("first\n")
    monkeypatch.setattr(runs, "__file__", str(file))
    assert runs.commit() is None
    who = ["-c", "user.name=x", "-c", "user.email=x@y"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    head = runs.commit()
    assert re.fullmatch("[0-9a-f]{40}", head)
    (tmp_path / "new.txt").write_text("no code")
    (tmp_path / "page.md").write_text("no code either")
    assert runs.commit() == head
    file.write_text("second\n")
    assert runs.commit() == f"{head}+"
    monkeypatch.setenv("PATH", "")  # no git
    assert runs.commit() is None


MEMORY = """
import resource, sys
import torch
from support import runs
if sys.argv[1] == "keep":
    runs.keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_used_again():
    faults = {}
    for what in ("keep", "leave"):
        command, single = [sys.executable, "-c", MEMORY, what], os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=single, capture_output=True, text=True, check=True)
        faults[what] = int(run.stdout)
    assert faults["keep"] < 100 < faults["leave"]  # of 256 MiB, 65,536 pages
