"""Every kind of bad input through the command line of every method: one line, exit status 2, nothing half-written."""

import fcntl
import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Tiny, build_cifar10, build_folder, build_raf, picture

import common

ROOT = Path(__file__).resolve().parent.parent
METHODS = sorted(
    path.stem for path in ROOT.glob("*.py") if "\ndef train_one_epoch(" in path.read_text(encoding="utf-8")
)
SMALL = {"jointgan": ["--width", "0.02"]}  # the others get conftest's backbone


def damaged_image(raf):
    path = raf / "Image" / "aligned" / "train_00003_aligned.jpg"
    path.write_bytes(path.read_bytes()[:400])


def missing_image(raf):
    (raf / "Image" / "aligned" / "train_00003_aligned.jpg").unlink()


def rewrite_line(number, line):
    def damage(raf):
        path = raf / "EmoLabel" / "list_patition_label.txt"
        rows = path.read_text().splitlines()
        rows[number - 1] = line
        path.write_text("\n".join(rows) + "\n")

    return damage


def one_class(raf):
    path = raf / "EmoLabel" / "list_patition_label.txt"
    path.write_text("".join(f"{row.split()[0]} 4\n" for row in path.read_text().splitlines()))


def short_label_file(raf):
    (raf / "short.csv").write_text("name,label\ntrain_00001.jpg,fear\n")


def odd_label_file(raf):
    (raf / "odd.csv").write_text("name,label\ntrain_00001.jpg,fear\ntrain_00002.jpg,joyful boredom\n")


def text_checkpoint(raf):
    (raf / "model.pt").write_text("not a checkpoint")


def eps_image(raf):
    picture(1, 20, 20).save(raf / "Image" / "aligned" / "train_00003_aligned.jpg", "EPS")


def pipe(raf):
    path = raf / "Image" / "aligned" / "train_00003_aligned.jpg"
    path.unlink()
    os.mkfifo(path)


def doubled_line(raf):
    with open(raf / "EmoLabel" / "list_patition_label.txt", "a") as file:
        file.write("train_00001.jpg 7\n")


def hostile_pickle(raf):
    build_cifar10(raf)
    (raf / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch raf/mark'\ntR.")


def other_splits(raf):
    build_folder(raf / "photos" / "training")
    build_folder(raf / "photos" / "validation")


def odd_name(raf):
    build_folder(raf / "photos")
    shutil.copy(raf / "photos" / "sad" / "0.png", os.fsencode(raf) + b"/photos/sad/\xff\n.png")


def not_a_cache(raf):
    (raf / "cache").write_text("a file")


def nothing(raf):
    pass


CASES = {
    "no data": (nothing, ["--root", "nowhere"], ["nowhere", "--data toy"]),
    "empty folder": (nothing, ["--root", "raf/empty"], ["raf/empty", "list_patition_label.txt"]),
    "missing image": (missing_image, [], ["train_00003_aligned.jpg"]),
    "truncated image": (damaged_image, [], ["train_00003_aligned.jpg"]),
    "label outside": (rewrite_line(5, "train_00005.jpg 9"), [], ["list_patition_label.txt", "line 5"]),
    "number in an odd spelling": (
        rewrite_line(5, "train_00005.jpg 0_6"),
        [],
        ["list_patition_label.txt, line 5", "0_6"],
    ),
    "name of neither split": (
        rewrite_line(5, "valid_00005.jpg 6"),
        [],
        ["list_patition_label.txt, line 5", "valid_00005"],
    ),
    "image with two labels": (doubled_line, [], ["list_patition_label.txt, line 43", "line 1"]),
    "image of another format": (eps_image, [], ["train_00003_aligned.jpg"]),
    "pipe for an image": (pipe, [], ["train_00003_aligned.jpg", "not a regular file"]),
    "pickle with code": (hostile_pickle, ["--data", "cifar10"], ["data_batch_1", "os.system"]),
    "other splits": (other_splits, ["--data", "folder", "--root", "raf/photos"], ["photos/training", "train and test"]),
    "odd name": (odd_name, ["--data", "folder", "--root", "raf/photos"], ["rename"]),
    "cache that is a file": (not_a_cache, ["--cache", "raf/cache"], ["--cache raf/cache"]),
    "malformed line": (rewrite_line(6, "train_00006.jpg"), [], ["list_patition_label.txt", "line 6"]),
    "one class": (one_class, [], ["class"]),
    "noise of 1": (nothing, ["--noise", "1"], ["--noise"]),
    "negative noise": (nothing, ["--noise", "-0.1"], ["--noise"]),
    "label file that does not cover": (short_label_file, ["--labels", "raf/short.csv"], ["short.csv", "27"]),
    "label file with another class": (odd_label_file, ["--labels", "raf/odd.csv"], ["odd.csv", "joyful boredom"]),
    "label file that is not there": (nothing, ["--labels", "raf/none.csv"], ["none.csv"]),
    "checkpoint of something else": (text_checkpoint, ["--evaluate", "raf/model.pt"], ["model.pt"]),
    "device that is not there": (nothing, ["--device", "cuda:99"], ["cuda:99"]),
    "device whose package is not there": (nothing, ["--device", "hpu"], ["--device hpu"]),
    "batch larger than the data": (nothing, ["--batch-size", "29"], ["--batch-size 29", "28"]),
    "unknown data": (nothing, ["--data", "nothing"], ["nothing"]),
    "unknown flag": (nothing, ["--no-such-flag"], ["--no-such-flag"]),
}


@pytest.fixture(params=METHODS)
def method(request, tmp_path, monkeypatch):
    """A method's main with arguments for a run of a second on RAF-DB's layout in the current folder."""
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    monkeypatch.chdir(tmp_path)
    build_raf(tmp_path / "raf")
    (tmp_path / "raf" / "empty").mkdir()
    base = "--data raf --root raf --size 32 --batch-size 14 --epochs 1 --precision fp32".split()
    base += SMALL.get(request.param, [])
    script = importlib.import_module(request.param)
    return script, lambda *more: script.main([*base, *more])


def error_line(capsys):
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(case, method, tmp_path, capsys):
    damage, flags, words = CASES[case]
    damage(tmp_path / "raf")
    assert method[1](*flags) == 2
    error = error_line(capsys)
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists() and not (tmp_path / "raf" / "mark").exists()


def test_pretrained_weights_of_another_backbone(method, tmp_path, capsys):
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    assert method[1]("--pretrained", "other.pth") == 2
    error = error_line(capsys)
    assert ("--pretrained" if method[0].__name__ == "jointgan" else "conv1.weight") in error
    assert not (tmp_path / "runs").exists()


def test_a_finished_folder_and_one_in_use(method, tmp_path, capsys):
    script, run = method
    assert run("--name", "run") == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "run").iterdir()}
    capsys.readouterr()
    assert run("--name", "run") == 2
    error = error_line(capsys)
    assert all(flag in error for flag in ("--overwrite", "--name", "--resume"))
    with open(tmp_path / "runs" / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("--name", "run", "--overwrite") == 2
        assert "in use" in error_line(capsys)
    assert {path.name: path.read_bytes() for path in (tmp_path / "runs" / "run").iterdir()} == files


def test_a_loss_that_is_not_finite(method, tmp_path, monkeypatch, capsys):
    """The total loss of the second epoch is not a number from its second step on."""
    script, run = method
    train, add, state = script.train_one_epoch, common.Means.add, {"epoch": 0, "step": 0}

    def counted(*arguments):
        state["epoch"], state["step"] = state["epoch"] + 1, 0
        return train(*arguments)

    def poisoned(self, group, *rest, **values):
        if group == "loss" and "total" in values:
            state["step"] += 1
            if state["epoch"] == 2 and state["step"] > 1:
                values["total"] = values["total"] * float("nan")
        add(self, group, *rest, **values)

    monkeypatch.setattr(script, "train_one_epoch", counted)
    monkeypatch.setattr(common.Means, "add", poisoned)
    assert run("--name", "run", "--epochs", "3") == 2
    error = error_line(capsys)
    assert "epoch 2, step 2 of 2" in error and "last.pt (epoch 1)" in error
    assert len((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()) == 1
