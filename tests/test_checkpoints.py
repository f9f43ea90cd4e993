"""--evaluate and --predict: a trained model on other data and on one's own images, through the command line."""

import csv
import importlib
import json

import numpy as np
import pytest
import torch
from conftest import build_ferplus, build_folder, build_raf, lines, picture, save
from PIL import Image

import common
import scn

SMALL = {"jointgan": ["--width", "0.02", "--hidden", "8", "--noise-dim", "4"]}


@pytest.fixture
def trained(tiny, tmp_path):
    """trained("scn") -> the script and the model.pt of a finished run on toy."""

    def train(method):
        script = importlib.import_module(method)
        assert script.main([*tiny, *SMALL.get(method, []), "--out", str(tmp_path / "runs"), "--name", method]) == 0
        return script, tmp_path / "runs" / method / "model.pt"

    return train


def place(tmp_path):
    return ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]


@pytest.mark.parametrize("method", common.METHODS)
def test_evaluation_on_the_runs_own_data_repeats_its_last_epoch(method, trained, tmp_path, capsys):
    script, model = trained(method)
    last = lines(model.parent)[-1]
    capsys.readouterr()
    assert script.main(["--evaluate", str(model), *place(tmp_path)]) == 0
    folder = tmp_path / "out" / f"{method}-on-toy"
    record = json.loads((folder / "evaluation.json").read_text())
    for tag in ("accuracy/test", "accuracy/test_mean_class", *(tag for tag in last if tag.startswith("accuracy/class/"))):
        assert record[tag] == pytest.approx(last[tag])
    assert sum(map(sum, record["confusion"])) == 16 and (folder / "confusion.png").exists()
    assert f"{record['accuracy/test']:.2%}" in capsys.readouterr().out


def test_classes_in_another_order_are_matched_by_name(trained, tmp_path, capsys):
    script, model = trained("scn")
    root = build_ferplus(tmp_path / "ferplus")
    assert scn.main(["--evaluate", str(model), "--data", "ferplus", "--root", str(root), *place(tmp_path)]) == 2
    assert "--classes 7" in capsys.readouterr().err
    assert scn.main(["--evaluate", str(model), "--data", "ferplus", "--root", str(root), "--classes", "7", *place(tmp_path)]) == 0
    record = json.loads((tmp_path / "out" / "scn-on-ferplus" / "evaluation.json").read_text())
    args = scn.parse_args(["--data", "ferplus", "--root", str(root), "--classes", "7", "--size", "32", *place(tmp_path)])
    _, test = common.load_data(args)
    probs, _ = common.restore(common.load_checkpoint(model), torch.device("cpu"))(test.images)
    names = common.load_checkpoint(model)["classes"]
    right = np.mean([names[p.argmax()] == test.classes[label] for p, label in zip(probs, test.labels)])
    assert record["accuracy/test"] == pytest.approx(right) and tuple(record["classes"]) == test.classes != tuple(names)


@pytest.mark.parametrize("method", common.METHODS)
def test_another_method_starts_from_the_backbone(method, trained, tmp_path, capsys):
    _, model = trained(method)
    weights = common.load_checkpoint(model)["networks"][0]
    capsys.readouterr()
    flags = ["--data", "toy", "--pretrained", str(model), "--size", "32", "--batch-size", "12", "--epochs", "1", "--lr", "1e-12", "--out", str(tmp_path), "--name", "next"]
    status = importlib.import_module("scn").main(flags)
    said = capsys.readouterr()
    if method == "jointgan":  # a VGG of its own
        assert status == 2 and "another backbone" in said.err and not (tmp_path / "next").exists()
        return
    assert status == 0 and f"{sum(key.startswith('backbone.') for key in weights)} tensors" in said.out
    after = common.load_checkpoint(tmp_path / "next" / "model.pt")["networks"][0]
    assert all(torch.equal(after[key], value) for key, value in weights.items() if key.startswith("backbone.conv"))


def test_the_validation_split_has_a_folder_of_its_own(trained, tmp_path):
    script, model = trained("scn")
    root = build_raf(tmp_path / "raf")
    assert script.main(["--evaluate", str(model), "--data", "raf", "--root", str(root), "--split", "valid", *place(tmp_path)]) == 0
    assert json.loads((tmp_path / "out" / "scn-on-raf-valid" / "evaluation.json").read_text())["images"] == 2


@pytest.mark.parametrize("method", common.METHODS)
def test_predictions_are_the_models_own(method, trained, tmp_path):
    script, model = trained(method)
    folder, single = build_folder(tmp_path / "photos", size=(40, 30)), tmp_path / "one.JPG"
    save(picture(5, 32, 32), single)
    (folder / "notes.txt").write_text("no image")
    (folder / "faces.csv").write_text("what align_faces.py leaves")
    save(picture(6, 32, 32), folder / "faces.png")  # its sheet: no face
    assert script.main(["--predict", str(model), str(folder), str(single), *place(tmp_path)]) == 0
    out = tmp_path / "out" / f"{method}-predictions"
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = common.load_checkpoint(model)["classes"]
    assert [row["name"] for row in rows] == [p.as_posix() for p in sorted(folder.rglob("*.png")) if p.name != "faces.png"] + [single.as_posix()]
    image = torch.from_numpy(np.asarray(Image.open(single).convert("RGB")).copy()).permute(2, 0, 1)[None]
    probs, _ = common.restore(common.load_checkpoint(model), torch.device("cpu"))(image)
    assert [float(rows[-1][name]) for name in names] == pytest.approx(probs[0].tolist(), abs=1e-3)  # batches of 1 and 13
    for row in rows:
        assert row["class"] == max(names, key=lambda name: float(row[name])) and sum(float(row[name]) for name in names) == pytest.approx(1, abs=1e-4)
    assert (out / "predictions.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_there_is_not_replaced_unasked(trained, tmp_path, capsys):
    script, model = trained("scn")
    arguments = ["--evaluate", str(model), *place(tmp_path)]
    assert script.main(arguments) == 0
    assert script.main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert script.main([*arguments, "--overwrite"]) == 0 and script.main([*arguments, "--name", "other"]) == 0


def test_bad_input_is_one_line(trained, tmp_path, capsys):
    script, model = trained("scn")
    broken, empty = tmp_path / "broken.png", tmp_path / "empty"
    broken.write_bytes(b"\x89PNG but not really")
    empty.mkdir()
    cases = [
        (["--predict", str(model)], "then images"), (["--predict", str(model), str(broken)], "broken.png"), (["--predict", str(model), str(tmp_path / "none.png")], "none.png"),
        (["--predict", str(model), str(empty)], "no images"), (["--evaluate", str(model), "--predict", str(model), str(broken)], "two jobs"),
        (["--evaluate", str(tmp_path / "none.pt")], "no such checkpoint"), (["--evaluate", str(model.parent / "last.pt")], "not a model.pt"),
    ]
    for flags, words in cases:
        capsys.readouterr()
        assert script.main([*flags, *place(tmp_path)]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "out").exists()
    state = common.load_checkpoint(model)
    state["networks"][0].pop("head.weight")
    common.save_checkpoint(tmp_path / "changed.pt", **state)
    assert script.main(["--evaluate", str(tmp_path / "changed.pt"), *place(tmp_path)]) == 2
    assert "changed.pt: the weights do not fit" in capsys.readouterr().err
    assert importlib.import_module("cocuring").main(["--evaluate", str(model), *place(tmp_path)]) == 2
    assert "of scn, not of cocuring" in capsys.readouterr().err
