"""Noisy label files and machine labels: what is written is what the scripts train on."""

import argparse
import importlib
import json
from pathlib import Path

from support import toyfaces
from support.datasets import (
    RAF_CLASSES,
    RAF_CONFUSIONS,
    Index,
    decode_all,
    load_data,
    load_train_index,
    read_labels,
    read_va,
)
from support.inference import load_model
from support.label_sets import load_label_sets, majority_vote

import numpy as np
import pytest
import torch
from conftest import RAF_TRAIN, build_ferplus, build_folder_splits, build_raf

import cocuring
import inject_noise
import jointgan
import scn

ROOT = Path(inject_noise.__file__).parent
METHODS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef restore(" in path.read_text())


@pytest.fixture
def write(raf, tmp_path):
    """write("--noise", "0.5", ...) -> the file that inject_noise.py writes for the small RAF-DB, and its json."""

    def run(*flags, data="raf", root=raf, output=tmp_path / "noisy.csv"):
        assert inject_noise.main(["--data", data, "--root", str(root), "--output", str(output), *flags]) == 0
        return output, json.loads(output.with_suffix(".json").read_text())

    return run


def read(file):
    """{name: class} of a csv label file."""
    header, *lines = file.read_text().splitlines()
    assert header == "name,label"
    return dict(line.rsplit(",", 1) for line in lines)


KINDS = [[], ["--noise-type", "asymmetric"], ["--noise-seed", "9"], ["--seed", "4"], ["--limit", "14"]]


@pytest.mark.parametrize("flags", KINDS)
def test_the_file_has_the_labels_of_the_same_noise(flags, write, raf, arguments):
    file, _ = write("--noise", "0.5", *flags)
    train, _ = load_data(arguments("raf", raf, "--noise", "0.5", *flags))
    assert read(file) == {name: train.classes[label] for name, label in zip(train.names, train.labels)}


@pytest.mark.parametrize("style", ["csv", "list"])
@pytest.mark.parametrize("flags", KINDS)
def test_a_script_given_the_file_trains_on_the_same_labels(flags, style, write, raf, arguments):
    file, _ = write("--noise", "0.5", "--format", style, *flags)
    limit = flags if "--limit" in flags else []
    injected, _ = load_data(arguments("raf", raf, "--noise", "0.5", *flags))
    given, _ = load_data(arguments("raf", raf, "--labels", str(file), *limit))
    assert torch.equal(given.labels, injected.labels) and torch.equal(given.clean, injected.clean)
    assert given.names == injected.names and (given.labels != given.clean).any()


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_several_rates_write_a_file_each_with_the_labels_of_that_rate(kind, raf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rates, flags = ("0.25", "0.5", "0.75"), ["--data", "raf", "--root", str(raf), "--noise-type", kind, "--seed", "3"]
    assert inject_noise.main([*flags, "--noise", *rates]) == 0
    out = capsys.readouterr().out
    for rate, changed in zip(rates, (7, 14, 21)):
        together = Path(f"noise-raf-{kind}-{rate}-s3.csv")
        assert inject_noise.main([*flags, "--noise", rate, "--output", "alone.csv", "--overwrite"]) == 0
        assert together.read_text() == Path("alone.csv").read_text()
        assert together.with_suffix(".json").read_text() == Path("alone.json").read_text()
        assert f"{together}: {changed} of 28 labels changed ({float(rate):.2%})" in out


def test_several_rates_add_the_rate_to_the_output(raf, tmp_path):
    argv = ["--data", "raf", "--root", str(raf), "--noise", "0.25", "0.5", "--output", str(tmp_path / "x.y.csv")]
    assert inject_noise.main(argv) == 0
    assert json.loads((tmp_path / "x.y-0.5.json").read_text())["rate"] == 0.5
    made = {f"x.y-{rate}{suffix}" for rate in ("0.25", "0.5") for suffix in (".csv", ".json")}
    assert made == {path.name for path in tmp_path.iterdir() if path.is_file()}


def test_nothing_is_written_where_one_of_several_files_is_there(raf, tmp_path, capsys):
    argv = ["--data", "raf", "--root", str(raf), "--noise", "0.25", "0.5", "--output", str(tmp_path / "x.csv")]
    (tmp_path / "x-0.5.json").write_text("precious")
    assert inject_noise.main(argv) == 2
    assert "x-0.5.json" in capsys.readouterr().err and not (tmp_path / "x-0.25.csv").exists()
    assert (tmp_path / "x-0.5.json").read_text() == "precious"


@pytest.mark.parametrize(
    "votes, winner", [([5, 2, 2, 5], 5), ([5, 2, 2, 3, 5], 5), ([6, 2, 2, 5, 5], 2), ([1, 1, 0, 0, 0], 0), ([4], 4)]
)
def test_ties_go_to_the_first_set(votes, winner):
    assert majority_vote([torch.tensor([vote]) for vote in votes], 7).tolist() == [winner]


@pytest.mark.parametrize("rates", [("0.25", "0.5", "0.75"), ("0.5", "0.5"), ("0.5", "0", "0.75")])
def test_a_vote_is_the_majority_of_the_label_sets_that_jointgan_has(rates, raf, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "raf", "--root", str(raf), "--seed", "3", "--noise", *rates]
    assert inject_noise.main([*flags, "--vote"]) == 0
    own, _ = load_data(arguments("raf", raf))
    _, _, sets = load_label_sets(jointgan.parse_args([*flags, "--cache", str(tmp_path / "cache")]))
    expected = []
    for labels in zip(*(labels.tolist() for labels in sets)):
        most = max(labels.count(label) for label in labels)
        expected.append(next(label for label in labels if labels.count(label) == most))
    file = f"vote-raf-symmetric-{'-'.join(rates)}-s3.csv"
    assert read_labels(file, Index(own.names, own.labels.tolist(), own.classes)).tolist() == expected
    assert sorted(path.name for path in tmp_path.glob("vote*")) == [file, file.replace(".csv", ".json")]
    assert any(label != first for label, first in zip(expected, sets[0].tolist())) == (len(rates) > 2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--noise", "0", "0.5"],
        ["--noise", "0.5", "0.5"],
        ["--noise", "0.1234567", "0.1234568"],
        ["--noise", "0", "0.5", "--from-checkpoint", "x"],
        ["--noise", "0.5", "--vote"],
    ],
)
def test_a_rate_of_0_or_given_twice_is_refused(flags, raf, tmp_path, capsys):
    output = tmp_path / "x.csv"
    assert inject_noise.main(["--data", "raf", "--root", str(raf), *flags, "--output", str(output)]) == 2
    assert "--noise" in capsys.readouterr().err and not list(tmp_path.glob("x*"))


@pytest.mark.parametrize(
    "data, build, flags",
    [
        ("ferplus", build_ferplus, []),
        ("ferplus", build_ferplus, ["--classes", "7"]),
        ("ferplus", build_ferplus, ["--noise-type", "asymmetric"]),
        ("folder", build_folder_splits, []),
    ],
)
def test_other_data_sets_come_back_too(data, build, flags, write, tmp_path, arguments):
    root = build(tmp_path / "data")
    file, _ = write("--noise", "0.5", *flags, data=data, root=root)
    classes = flags if "--classes" in flags else []
    injected, _ = load_data(arguments(data, root, "--noise", "0.5", *flags))
    given, _ = load_data(arguments(data, root, "--labels", str(file), *classes))
    assert torch.equal(given.labels, injected.labels) and torch.equal(given.clean, injected.clean)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_the_json_says_what_was_done(kind, write, raf, arguments):
    _, record = write("--noise", "0.5", "--noise-type", kind, "--noise-seed", "3")
    flags = ["--noise", "0.5", "--noise-type", kind, "--noise-seed", "3"]
    _, noisy, clean = load_train_index(arguments("raf", raf, *flags))
    wanted = {"data": "raf", "root": str(raf), "rate": 0.5, "type": kind, "seed": 3, "limit": None, "difficulty": 0}
    assert {key: record[key] for key in wanted} == wanted
    assert record["images"] == RAF_TRAIN and record["changed"] == (noisy != clean).sum() == 14
    assert record["columns"] == [entry["class"] for entry in record["classes"]] == list(RAF_CLASSES)
    for c, entry in enumerate(record["classes"]):
        assert (entry["images"], entry["changed"]) == (4, 2)
        shares = torch.bincount(noisy[clean == c], minlength=7) / 4
        assert entry["transition"] == pytest.approx(shares.tolist(), abs=1e-6)
        assert sum(entry["transition"]) == pytest.approx(1, abs=1e-5)


def test_asymmetric_noise_goes_to_the_confusion_partner(write):
    _, record = write("--noise", "0.25", "--noise-type", "asymmetric")
    for c, entry in enumerate(record["classes"]):
        assert {i: share for i, share in enumerate(entry["transition"]) if share} == {c: 0.75, RAF_CONFUSIONS[c]: 0.25}


def test_the_list_format_is_that_of_raf(write, raf, arguments):
    file, _ = write("--noise", "0.5", "--format", "list")
    index, noisy, _ = load_train_index(arguments("raf", raf, "--noise", "0.5"))
    assert file.read_text() == "".join(f"{name} {label + 1}\n" for name, label in zip(index.names, noisy.tolist()))


def test_limit_writes_the_labels_of_the_subset_alone(write, raf, arguments):
    file, record = write("--noise", "0.5", "--limit", "14")
    names = load_train_index(arguments("raf", raf, "--limit", "14"))[0].names
    assert list(read(file)) == names and record["images"] == record["limit"] == 14
    assert [entry["images"] for entry in record["classes"]] == [2] * 7


def test_a_class_without_images_has_a_row_of_zeros(write, tmp_path):
    root = build_ferplus(tmp_path / "data")
    table = root / "FER2013Train" / "label.csv"
    rows = table.read_text().splitlines(True)
    table.write_text("".join(row for row in rows if not row.endswith(",8,0,0\n")))  # contempt's
    _, record = write("--noise", "0.5", data="ferplus", root=root)
    empty = [entry for entry in record["classes"] if entry["images"] == 0]
    assert [entry["class"] for entry in empty] == ["contempt"] and empty[0]["transition"] == [0] * 8


def test_the_output_is_reproducible_and_depends_on_the_seed(write, tmp_path):
    outputs = ((seed, tmp_path / f"{name}.csv") for name, seed in ("a1", "b1", "c2"))
    a, b, c = (write("--noise", "0.5", "--seed", seed, output=output)[0].read_text() for seed, output in outputs)
    assert a == b != c


def test_the_default_name_says_what_it_is(few_toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inject_noise.main(["--data", "toy", "--noise", "0.2", "--seed", "1"]) == 0
    asymmetric = ["--noise", "0.4", "--noise-seed", "3", "--noise-type", "asymmetric"]
    assert inject_noise.main([*asymmetric, "--format", "list"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "noise-toy-asymmetric-0.4-s3-list.json",
        "noise-toy-asymmetric-0.4-s3-list.txt",
        "noise-toy-symmetric-0.2-s1.csv",
        "noise-toy-symmetric-0.2-s1.json",
    ]


def test_the_toy_file_is_read_by_a_script(few_toys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    inject_noise.main(["--noise", "0.2", "--seed", "1"])
    _, labels, clean = load_train_index(arguments("toy", None, "--labels", "noise-toy-symmetric-0.2-s1.csv"))
    _, noisy, own = load_train_index(arguments("toy", None, "--noise", "0.2", "--noise-seed", "1"))
    assert torch.equal(labels, noisy) and torch.equal(clean, own)


@pytest.mark.parametrize("there", ["noisy.csv", "noisy.json"])
def test_files_that_are_there_are_kept_unless_overwrite(there, raf, tmp_path, capsys):
    argv = ["--data", "raf", "--root", str(raf), "--noise", "0.5", "--output", str(tmp_path / "noisy.csv")]
    (tmp_path / there).write_text("precious")
    assert inject_noise.main(argv) == 2
    assert (tmp_path / there).read_text() == "precious" and str(tmp_path / there) in capsys.readouterr().err
    assert inject_noise.main([*argv, "--overwrite"]) == 0
    assert len(read(tmp_path / "noisy.csv")) == RAF_TRAIN
    assert json.loads((tmp_path / "noisy.json").read_text())["seed"] == 1


def test_an_output_named_json_does_not_lose_the_labels(few_toys, tmp_path):
    status = inject_noise.main(["--noise", "0.5", "--output", str(tmp_path / "noisy.json")])
    assert status == 2 or read(tmp_path / "noisy.json")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--noise", "0"],
        ["--noise", "1"],
        ["--noise", "-0.1"],
        ["--noise", "nan"],
        ["--noise", "some"],
        ["--noise", "0.5", "--limit", "29"],
        ["--noise", "0.5", "--classes", "8"],
        ["--noise", "0.5", "--noise-type", "pair"],
        ["--noise", "0.5", "--labels", "a.csv"],
        ["--noise", "0.5", "--seed", str(2**64 + 1)],
        ["--noise", "0.5", "--noise-seed", str(2**63)],
        ["--noise", "0.5", "--limit", str(10**30)],
    ],
)
def test_bad_arguments_are_status_2_one_line_and_no_file(flags, raf, tmp_path, capsys):
    output = ["--output", str(tmp_path / "noisy.csv")]
    assert inject_noise.main(["--data", "raf", "--root", str(raf), *output, *flags]) == 2
    message = capsys.readouterr().err
    assert "error: " in message and message.count("\n") == 1
    assert not list(tmp_path.glob("noisy*"))


def test_a_missing_data_set_is_status_2(tmp_path, capsys):
    assert inject_noise.main(["--data", "raf", "--root", str(tmp_path / "none"), "--noise", "0.5"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_classes_without_confusion_partners_are_status_2(tmp_path, capsys):
    root = build_folder_splits(tmp_path / "data")
    argv = ["--data", "folder", "--root", str(root), "--noise", "0.5", "--output", str(tmp_path / "noisy.csv")]
    assert inject_noise.main([*argv, "--noise-type", "asymmetric"]) == 2
    assert "confusion partner" in capsys.readouterr().err


def test_the_table_on_the_screen_counts_the_changes(write, capsys):
    write("--noise", "0.25")
    out = capsys.readouterr().out
    assert "7 of 28 labels changed" in out and out.count("1 of 4") == 7


def test_labels_do_not_depend_on_the_layout(write, tmp_path):
    from_one = write("--noise", "0.5", output=tmp_path / "a.csv")[0]
    from_two = write("--noise", "0.5", root=build_raf(tmp_path / "lists", separate=True), output=tmp_path / "b.csv")[0]
    assert from_one.read_text() == from_two.read_text()


def test_an_output_in_no_folder_is_refused(few_toys, tmp_path, capsys):
    assert inject_noise.main(["--noise", "0.2", "--output", str(tmp_path / "no" / "x.csv")]) == 2
    assert "--output" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Machine labels
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_machine_labels_are_what_the_model_predicts(method, tiny, tmp_path):
    script = importlib.import_module(method)
    small = ["--width", "0.02"] if method == "jointgan" else []
    assert script.main([*tiny, *small, "--epochs", "1", "--out", str(tmp_path), "--name", "run"]) == 0
    model, output = tmp_path / "run" / "model.pt", tmp_path / "machine.csv"
    flags = ["--data", "toy", "--from-checkpoint", str(model), "--device", "cpu"]
    assert inject_noise.main([*flags, "--output", str(output)]) == 0
    index, own, _ = load_train_index(cocuring.parse_args(["--data", "toy"]))
    faces = np.stack([toyfaces.draw_face("train", i, size=32)[0] for i in range(48)])
    _, predictor = load_model(model, torch.device("cpu"))
    probs, va = predictor(torch.from_numpy(faces).permute(0, 3, 1, 2))
    expected = probs.argmax(1)
    assert read(output) == {name: index.classes[label] for name, label in zip(index.names, expected)}
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["changed"] == (expected != own).sum() and record["checkpoint"] == str(model)
    va_file = tmp_path / "machine-va.csv"
    assert va_file.exists() == (method == "jointgan")
    if va is not None:
        torch.testing.assert_close(read_va(va_file, index), va, atol=1e-6, rtol=0)
    assert inject_noise.main([*flags, "--output", str(output)]) == 2  # is there already
    if va is None:  # that of the labels which are replaced goes with them
        va_file.write_text("of another model")
        assert inject_noise.main([*flags, "--output", str(output), "--overwrite"]) == 0 and not va_file.exists()


def test_classes_of_another_data_set_are_matched_by_name(tiny, tmp_path, capsys):
    assert scn.main([*tiny, "--out", str(tmp_path), "--name", "run"]) == 0
    root, cache = build_ferplus(tmp_path / "ferplus"), tmp_path / "cache"
    output, model = tmp_path / "machine.csv", tmp_path / "run" / "model.pt"
    flags = ["--from-checkpoint", str(model), "--cache", str(cache), "--output", str(output), "--device", "cpu"]
    assert inject_noise.main(["--data", "ferplus", "--root", str(root), *flags]) == 0
    assert "does not know the class contempt" in capsys.readouterr().out
    assert set(read(output).values()) <= set(toyfaces.CLASSES)
    index, _, _ = load_train_index(scn.parse_args(["--data", "ferplus", "--root", str(root)]))
    images = decode_all(index, argparse.Namespace(data="ferplus", root=root, cache=cache, size=32), "train")
    probs, _ = load_model(model, torch.device("cpu"))[1](images)
    assert read(output) == {name: toyfaces.CLASSES[k] for name, k in zip(index.names, probs.argmax(1))}


def test_a_class_that_only_the_model_knows_is_never_a_label(tiny, tmp_path, monkeypatch):
    probs = torch.full((48, 8), 0.01)
    probs[:, 0] = 0.6
    probs[torch.arange(48), 1 + torch.arange(48) % 7] = 0.3
    state = {"classes": ["contempt", *toyfaces.CLASSES], "args": {"size": 32}}
    monkeypatch.setattr(inject_noise, "load_model", lambda *_: (state, lambda images: (probs, None)))
    output = tmp_path / "machine.csv"
    assert inject_noise.main(["--data", "toy", "--from-checkpoint", "x", "--output", str(output)]) == 0
    assert list(read(output).values()) == [toyfaces.CLASSES[i % 7] for i in range(48)]


def test_what_is_no_model_is_refused(tiny, tmp_path, capsys):
    assert scn.main([*tiny, "--out", str(tmp_path), "--name", "run"]) == 0
    folder, run = build_folder_splits(tmp_path / "animals", classes=("cat", "happy")), tmp_path / "run"
    for flags, words in (
        (["--from-checkpoint", str(run / "last.pt")], "not a model.pt"),
        (["--from-checkpoint", str(tmp_path / "none.pt")], "no such checkpoint"),
        (["--from-checkpoint", "x", "--noise", "0.2"], "either"),
        ([], "either"),
        (["--data", "folder", "--root", str(folder), "--from-checkpoint", str(run / "model.pt")], "are not those of"),
    ):
        capsys.readouterr()
        assert inject_noise.main([*flags, "--output", str(tmp_path / "x.csv")]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1 and not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    "method, words",
    [
        ("../evil", "no script of that name"),
        ("nothing_of_ours", "no script of that name"),
        ("align_faces", "no function restore"),
    ],
)
def test_a_model_of_a_method_that_is_not_here_is_refused(method, words, tmp_path, capsys):
    state = {"method": method, "classes": ["a", "b"], "args": {}, "networks": [{}]}
    torch.save(state, tmp_path / "model.pt")
    argv = ["--from-checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "x.csv")]
    assert inject_noise.main(argv) == 2
    assert words in capsys.readouterr().err


def test_valence_and_arousal_that_are_there_are_kept(tmp_path, capsys):
    (tmp_path / "x-va.csv").write_text("precious")
    assert inject_noise.main(["--from-checkpoint", "none.pt", "--output", str(tmp_path / "x.csv")]) == 2
    assert "x-va.csv is there already" in capsys.readouterr().err
