"""--evaluate and --predict: a trained model on other data and on one's own images, through the command line."""

import argparse
import csv
import importlib
import json
import os
from pathlib import Path

from support import figures, inference, toyfaces
from support.datasets import load_data
from support.inference import load_model
from support.metrics import audit_scores

import numpy as np
import pytest
import torch
from conftest import Tiny, build_ferplus, build_folder, build_folder_splits, build_raf, lines, picture, save
from PIL import Image

import cocuring
import common
import scn

CPU = torch.device("cpu")
ROOT = Path(common.__file__).parent
METHODS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef restore(" in path.read_text())
SMALL = {"jointgan": ["--width", "0.02"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs("scn") -> the folder of a finished run on 48 toy faces, trained once."""
    out = tmp_path_factory.mktemp("runs")
    flags = "--noise 0.4 --size 32 --batch-size 12 --epochs 2 --precision fp32".split()

    def train(method):
        if not (out / method).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(toyfaces, "SPLITS", {"train": 48, "valid": 16, "test": 16})
                patch.setitem(common.BACKBONES, "resnet18", Tiny)
                argv = [*flags, *SMALL.get(method, []), "--out", str(out), "--name", method]
                assert importlib.import_module(method).main(argv) == 0
        return out / method

    return train


@pytest.fixture
def trained(runs, tiny):
    """trained("scn") -> the script and the model.pt of its run."""
    return lambda method: (importlib.import_module(method), runs(method) / "model.pt")


@pytest.fixture
def scn_model(trained):
    return trained("scn")[1]


def place(tmp_path):
    return ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--device", "cpu"]


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_on_the_runs_own_data_repeats_its_last_epoch(method, trained, tmp_path, capsys):
    script, model = trained(method)
    last = lines(model.parent)[-1]
    capsys.readouterr()
    assert script.main(["--evaluate", str(model), *place(tmp_path)]) == 0
    folder = tmp_path / "out" / f"{method}-on-toy"
    record = json.loads((folder / "evaluation.json").read_text())
    own = [tag for tag in last if tag.startswith("accuracy/class/")]
    for tag in ("accuracy/test", "accuracy/test_mean_class", *own):
        assert record[tag] == pytest.approx(last[tag])
    assert sum(map(sum, record["confusion"])) == 16 and (folder / "confusion.png").exists()
    assert f"{record['accuracy/test']:.2%}" in capsys.readouterr().out


def test_classes_in_another_order_are_matched_by_name(scn_model, tmp_path, capsys):
    data = ["--data", "ferplus", "--root", str(build_ferplus(tmp_path / "ferplus"))]
    assert scn.main(["--evaluate", str(scn_model), *data, *place(tmp_path)]) == 2
    assert "--classes 7" in capsys.readouterr().err
    strange = ["--data", "folder", "--root", str(build_folder(tmp_path / "strange", ("happy", "bored")))]
    assert scn.main(["--evaluate", str(scn_model), *strange, *place(tmp_path)]) == 2
    assert "has bored, happiness\n" in capsys.readouterr().err
    data += ["--classes", "7"]
    assert scn.main(["--evaluate", str(scn_model), *data, *place(tmp_path)]) == 0
    record = json.loads((tmp_path / "out" / "scn-on-ferplus" / "evaluation.json").read_text())
    _, test = load_data(scn.parse_args([*data, "--size", "32", *place(tmp_path)]))
    state, predictor = load_model(scn_model, CPU)
    names, (probs, _) = state["classes"], predictor(test.images)
    table = np.zeros((7, 7), int)
    for p, label in zip(probs, test.labels):
        table[label, test.classes.index(names[p.argmax()])] += 1
    assert record["confusion"] == table.tolist() and tuple(record["classes"]) == test.classes != tuple(names)
    assert record["accuracy/test"] == pytest.approx(table.trace() / table.sum())


def test_data_with_fewer_classes_than_the_model(scn_model, tmp_path, capsys):
    data = ["--data", "folder", "--root", str(build_folder(tmp_path / "data"))]
    assert scn.main(["--evaluate", str(scn_model), *data, *place(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "these data have no surprise, fear, disgust, neutral: the model chooses among the other classes" in said
    record = json.loads((tmp_path / "out" / "scn-on-folder" / "evaluation.json").read_text())
    _, test = load_data(scn.parse_args([*data, "--size", "32", *place(tmp_path)]))
    state, predictor = load_model(scn_model, CPU)
    own = [state["classes"].index(name) for name in ("anger", "happiness", "sadness")]
    right = predictor(test.images)[0][:, own].argmax(1) == test.labels
    assert record["accuracy/test"] == pytest.approx(right.float().mean().item())
    assert record["classes"] == ["anger", "happiness", "sadness"] and sum(map(sum, record["confusion"])) == len(right)


def test_size_and_precision_on_the_command_line(scn_model, tmp_path, monkeypatch, capsys):
    save(picture(5, 32, 32), tmp_path / "face.png")
    for job in (["--evaluate", str(scn_model)], ["--predict", str(scn_model), str(tmp_path / "face.png")]):
        error = error_line(scn.main, [*job, "--size", "64", *place(tmp_path)], capsys)
        assert "a checkpoint of --size 32, not of 64" in error
    precisions, autocast = [], common.autocast
    monkeypatch.setattr(common, "autocast", lambda device, kind: precisions.append(kind) or autocast(device, kind))
    for flags, wanted in (["--size", "32"], "fp32"), (["--precision", "bf16"], "bf16"):
        assert scn.main([*job, *flags, "--overwrite", *place(tmp_path)]) == 0
        assert set(precisions) == {wanted}
        precisions.clear()


@pytest.mark.parametrize("method", METHODS)
def test_another_method_starts_from_the_backbone(method, trained, tmp_path, capsys):
    _, model = trained(method)
    weights = common.load_checkpoint(model)["networks"][0]
    capsys.readouterr()
    flags = ["--pretrained", str(model), "--size", "32", "--batch-size", "12", "--epochs", "1", "--lr", "1e-12"]
    status = scn.main([*flags, "--out", str(tmp_path), "--name", "next"])
    said = capsys.readouterr()
    if method == "jointgan":  # a VGG of its own
        assert status == 2 and "another backbone" in said.err and not (tmp_path / "next").exists()
        return
    assert status == 0 and f"{sum(key.startswith('backbone.') for key in weights)} tensors" in said.out
    after = common.load_checkpoint(tmp_path / "next" / "model.pt")["networks"][0]
    assert all(torch.equal(after[key], value) for key, value in weights.items() if key.startswith("backbone.conv"))


def test_the_validation_split_has_a_folder_of_its_own(scn_model, tmp_path):
    data = ["--data", "raf", "--root", str(build_raf(tmp_path / "raf")), "--split", "valid"]
    assert scn.main(["--evaluate", str(scn_model), *data, *place(tmp_path)]) == 0
    assert json.loads((tmp_path / "out" / "scn-on-raf-valid" / "evaluation.json").read_text())["images"] == 2


def test_a_model_is_tested_on_validation_images_that_it_was_trained_on_with_a_warning(tmp_path, capsys, monkeypatch):
    folder, models = build_folder_splits(tmp_path / "faces", count=20), {}
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    data = ["--data", "folder", "--root", str(folder), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    small = ["--epochs", "1", "--size", "32", "--batch-size", "8", "--device", "cpu"]
    for split in ("test", "valid"):
        assert scn.main([*data, *small, "--split", split, "--name", split]) == 0
        models[split] = str(tmp_path / split / "model.pt")
    copy = build_folder_splits(tmp_path / "others", count=20)
    of_others = [*data[:3], str(copy), *data[4:]]
    for model, evaluated, where, warned in (
        ("test", "valid", data, True),
        ("valid", "valid", data, False),
        ("test", "test", data, False),
        ("test", "valid", of_others, False),
    ):
        capsys.readouterr()
        flags = ["--evaluate", models[model], "--split", evaluated, "--overwrite"]
        assert scn.main([*flags, *where, "--name", "evaluation"]) == 0
        assert ("trained on it" in capsys.readouterr().err) == warned


def test_toy_has_validation_images_of_its_own(scn_model, tmp_path, tiny, capsys):
    assert scn.main(["--evaluate", str(scn_model), "--split", "valid", *place(tmp_path)]) == 0
    assert "trained on it" not in capsys.readouterr().err


def read_predictions(folder):
    with open(folder / "predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_the_models_own(method, trained, tmp_path):
    script, model = trained(method)
    folder, single = build_folder(tmp_path / "photos", size=(40, 30)), tmp_path / "one.JPG"
    save(picture(5, 32, 32), single)
    (folder / "notes.txt").write_text("no image")
    (folder / "faces.csv").write_text("what align_faces.py leaves")
    (folder / "._0.png").write_text("what a Mac leaves")
    save(picture(6, 32, 32), folder / ".thumbnails" / "0.png")
    save(picture(6, 32, 32), folder / "faces.png")  # its sheet: no face
    assert script.main(["--predict", str(model), str(folder), str(single), *place(tmp_path)]) == 0
    out = tmp_path / "out" / f"{method}-predictions"
    rows, names = read_predictions(out), common.load_checkpoint(model)["classes"]
    faces = [f"{folder.as_posix()}/{c}/{i}.png" for c in ("angry", "happy", "sad") for i in range(4)]
    assert [row["name"] for row in rows] == [*faces, single.as_posix()]
    image = torch.from_numpy(np.asarray(Image.open(single).convert("RGB")).copy()).permute(2, 0, 1)[None]
    probs, _ = load_model(model, CPU)[1](image)
    assert [float(rows[-1][name]) for name in names] == pytest.approx(probs[0].tolist(), abs=1e-3)
    for row in rows:
        assert row["class"] == max(names, key=lambda name: float(row[name]))
        assert sum(float(row[name]) for name in names) == pytest.approx(1, abs=1e-4)
    assert (out / "predictions.png").read_bytes()[:4] == b"\x89PNG"


def test_links_are_followed_once_and_formats_that_are_not_read_are_counted(scn_model, tmp_path, capsys):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    save(picture(1, 32, 32), folder / "b" / "1.png")
    save(picture(2, 32, 32), elsewhere / "2.png")
    save(picture(3, 32, 32), folder / "3.tif")
    (folder / "a").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert scn.main(["--predict", str(scn_model), str(folder), *place(tmp_path)]) == 0
    names = [row["name"] for row in read_predictions(tmp_path / "out" / "scn-predictions")]
    assert names == [f"{folder.as_posix()}/{name}" for name in ("a/2.png", "b/1.png")]
    assert f"{folder}: images that are not read, for their formats: 1 .tif" in capsys.readouterr().out


def test_names_that_are_not_utf_8_are_predicted_and_written_as_they_are(scn_model, tmp_path):
    name = b'caf\xe9 "x",\n.png'.decode(errors="surrogateescape")
    save(picture(5, 32, 32), tmp_path / "photos" / name)
    assert scn.main(["--predict", str(scn_model), str(tmp_path / "photos"), *place(tmp_path)]) == 0
    (row,) = read_predictions(tmp_path / "out" / "scn-predictions")
    assert row["name"] == f"{tmp_path.as_posix()}/photos/{name}"


def test_what_is_there_is_not_replaced_unasked(scn_model, tmp_path, capsys):
    arguments = ["--evaluate", str(scn_model), *place(tmp_path)]
    assert scn.main(arguments) == 0
    assert scn.main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    folder = tmp_path / "out" / "scn-on-toy"
    (folder / "evaluation.json.tmp123").write_text("{")  # as a kill leaves it
    assert scn.main([*arguments, "--overwrite"]) == 0 and scn.main([*arguments, "--name", "other"]) == 0


@pytest.mark.parametrize("stranger", ["notes.txt", "model.pt", "confusion.png.tmpl", "labels.csv.tmp12"])
def test_overwrite_replaces_nothing_but_an_evaluation(stranger, scn_model, tmp_path, capsys):
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    for name in ("confusion.png", "predictions.csv", stranger):
        (folder / name).write_text("precious")
    save(picture(5, 32, 32), tmp_path / "face.png")
    for job in (["--evaluate", str(scn_model)], ["--predict", str(scn_model), str(tmp_path / "face.png")]):
        assert scn.main([*job, *place(tmp_path), "--name", "mine", "--overwrite"]) == 2
        assert "other files" in capsys.readouterr().err
    assert {path.read_text() for path in folder.iterdir()} == {"precious"} and len(list(folder.iterdir())) == 3


def test_overwrite_leaves_nothing_of_the_job_before(scn_model, tmp_path, monkeypatch):
    folder, to = tmp_path / "out" / "mine", [*place(tmp_path), "--name", "mine", "--overwrite"]
    save(picture(5, 32, 32), tmp_path / "face.png")
    assert scn.main(["--evaluate", str(scn_model), *to]) == 0
    for name in ("evaluation.json.tmp7", ".DS_Store"):  # what macOS writes into a folder that it shows
        (folder / name).write_text("half")
    assert scn.main(["--predict", str(scn_model), str(tmp_path / "face.png"), *to]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [".DS_Store", "predictions.csv", "predictions.png"]


@pytest.mark.parametrize(
    ("flags", "name", "words"), [([], "predictions.csv", "--overwrite"), (["--overwrite"], "args.json", "other files")]
)
def test_what_others_write_there_meanwhile_stays(flags, name, words, scn_model, tmp_path, monkeypatch, capsys):
    def slow(*args, honest=inference.decode, **options):
        folder = tmp_path / "out" / "mine"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
        return honest(*args, **options)

    monkeypatch.setattr(inference, "decode", slow)
    save(picture(5, 32, 32), tmp_path / "face.png")
    job = ["--predict", str(scn_model), str(tmp_path / "face.png"), *place(tmp_path), "--name", "mine", *flags]
    assert words in error_line(scn.main, job, capsys)
    (left,) = (tmp_path / "out" / "mine").iterdir()
    assert left.name == name and left.read_text() == "precious"


def test_a_folder_that_cannot_be_listed_is_not_passed_over(scn_model, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        save(picture(5, 32, 32), tmp_path / "photos" / name / "face.png")

    def refuse(path, honest=os.scandir):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(os, "scandir", refuse)
    said = error_line(scn.main, ["--predict", str(scn_model), str(tmp_path / "photos"), *place(tmp_path)], capsys)
    assert "photos/b: the folder cannot be listed (Permission denied)" in said and not (tmp_path / "out").exists()


def test_a_full_device_is_not_taken_for_a_bad_checkpoint(scn_model, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(scn, "restore", fail)
    assert "out of memory, a smaller" in error_line(scn.main, ["--evaluate", str(scn_model), *place(tmp_path)], capsys)


def test_a_run_is_not_overwritten_by_its_own_evaluation(scn_model, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in scn_model.parent.iterdir()}
    flags = ["--out", str(scn_model.parent.parent), "--name", "scn", "--overwrite"]
    assert scn.main(["--evaluate", str(scn_model), *place(tmp_path), *flags]) == 2
    assert "other files" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in scn_model.parent.iterdir()} == before


def test_an_evaluation_survives_a_figure_that_cannot_be_drawn(scn_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "render", lambda figure: 1 / 0)
    save(picture(5, 32, 32), tmp_path / "face.png")
    assert scn.main(["--evaluate", str(scn_model), *place(tmp_path)]) == 0
    assert scn.main(["--predict", str(scn_model), str(tmp_path / "face.png"), *place(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "confusion.png could not be drawn (division by zero)" in said.err and ".png" not in said.out
    assert [p.name for p in (tmp_path / "out" / "scn-on-toy").iterdir()] == ["evaluation.json"]
    assert [p.name for p in (tmp_path / "out" / "scn-predictions").iterdir()] == ["predictions.csv"]


def error_line(main, argv, capsys):
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "weights_only" not in error
    return error


def test_bad_input_is_one_line(scn_model, tmp_path, capsys):
    broken, empty, model = tmp_path / "broken.png", tmp_path / "empty", str(scn_model)
    broken.write_bytes(b"\x89PNG but not really")
    empty.mkdir()
    for flags, words in (
        (["--predict", model], "then images"),
        (["--predict", model, str(broken)], "broken.png"),
        (["--predict", model, str(tmp_path / "none.png")], "none.png"),
        (["--predict", model, str(empty)], "no images"),
        (["--evaluate", model, "--predict", model, str(broken)], "two jobs"),
        (["--evaluate", str(tmp_path / "none.pt")], "no such checkpoint"),
        (["--evaluate", str(scn_model.parent / "last.pt")], "not a model.pt"),
        (["--evaluate", model, "--device", "meta"], "--device meta"),
        (["--evaluate", model, "--backbone", "resnet50"], "of --backbone resnet18, not of resnet50"),
        (["--predict", model, str(broken), "--backbone", "resnet50"], "of --backbone resnet18, not of resnet50"),
    ):
        assert words in error_line(scn.main, [*place(tmp_path), *flags], capsys)
        assert not (tmp_path / "out").exists()
    assert "of scn, not of cocuring" in error_line(cocuring.main, ["--evaluate", model, *place(tmp_path)], capsys)


@pytest.mark.parametrize("method", METHODS)
def test_the_label_audit_is_that_of_the_methods_prediction(method, trained):
    _, model = trained(method)
    state, predictor = load_model(model, CPU)
    train, _ = load_data(argparse.Namespace(**state["args"] | {"noise": 0.0}))
    with open(model.with_name("labels.csv")) as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    given = torch.tensor([train.classes.index(rows[name]["given"]) for name in train.names])
    written = torch.tensor([float(rows[name]["score"]) for name in train.names])
    torch.testing.assert_close(audit_scores(predictor(train.images)[0], given), written, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_another_number_of_networks_and_other_shapes(method, trained, tmp_path, capsys):
    script, model = trained(method)
    fewer, other = common.load_checkpoint(model), common.load_checkpoint(model)
    fewer["networks"].pop()
    key = next(key for key, value in other["networks"][-1].items() if value.ndim == 4)
    other["networks"][-1][key] = other["networks"][-1][key][:, :1]
    for state in (fewer, other):
        common.save_checkpoint(tmp_path / "changed.pt", **state)
        error = error_line(script.main, ["--evaluate", str(tmp_path / "changed.pt"), *place(tmp_path)], capsys)
        assert "changed.pt: the weights do not fit" in error


def test_more_images_than_one_batch_keep_their_own_predictions(scn_model, tmp_path):
    for i in range(520):
        save(picture(i, 8, 8), tmp_path / "photos" / f"{i:03}.png")
    assert scn.main(["--predict", str(scn_model), str(tmp_path / "photos"), *place(tmp_path)]) == 0
    rows, names = read_predictions(tmp_path / "out" / "scn-predictions"), common.load_checkpoint(scn_model)["classes"]
    assert [row["name"] for row in rows] == [(tmp_path / "photos" / f"{i:03}.png").as_posix() for i in range(520)]
    alone = [tmp_path / "photos" / f"{i:03}.png" for i in (505, 512, 519)]
    more = ["--name", "alone", *place(tmp_path)]
    assert scn.main(["--predict", str(scn_model), *map(str, alone), *more]) == 0
    for i, row in zip((505, 512, 519), read_predictions(tmp_path / "out" / "alone"), strict=True):
        assert [float(row[name]) for name in names] == pytest.approx([float(rows[i][n]) for n in names], abs=1e-4)
