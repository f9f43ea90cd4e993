"""The drawn faces: what they depend on, their classes, and the sheet."""

import subprocess
import sys
from pathlib import Path

from support import toyfaces
from support.toyfaces import CLASSES, FEATURES, FREQUENCIES, NEUTRAL, contact_sheet, draw_face, expression, main

import numpy as np
import pytest
from PIL import Image


def same_face(a, b):
    return np.array_equal(a[0], b[0]) and a[1] == b[1] and np.array_equal(a[2], b[2])


def test_a_face_depends_on_seed_split_and_index_alone():
    np.random.seed(1)
    first = draw_face("train", 3)
    draw_face("test", 9)
    np.random.seed(2)
    assert same_face(first, draw_face("train", 3))


@pytest.mark.parametrize("other", [("train", 4, 0), ("valid", 3, 0), ("test", 3, 0), ("train", 3, 1)])
def test_another_seed_split_or_index_is_another_face(other):
    assert not np.array_equal(draw_face("train", 3)[0], draw_face(*other)[0])


@pytest.mark.parametrize("index", range(5))
def test_label_and_va_do_not_depend_on_the_size(index):
    _, label, va = draw_face("train", index, size=24)
    _, label_large, va_large = draw_face("train", index, size=80)
    assert label == label_large and np.array_equal(va, va_large)


def test_draw_face_agrees_with_expression():
    for index in range(5):
        _, label, va = draw_face("test", index, difficulty=0.5)
        expected_label, expected_va, _, _ = expression("test", index, difficulty=0.5)
        assert label == expected_label and np.array_equal(va, expected_va)


@pytest.mark.parametrize("size", [16, 48, 65])
def test_a_face_is_uint8_of_the_size_asked_for(size):
    pixels, label, _ = draw_face("train", 0, size=size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert isinstance(label, int)


def test_a_face_is_not_flat():
    assert all(draw_face("train", i)[0].std() > 20 for i in range(10))


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_va_is_float32_within_one(difficulty):
    va = np.stack([expression("train", i, difficulty=difficulty)[1] for i in range(500)])
    assert va.dtype == np.float32 and va.shape == (500, 2)
    assert np.abs(va).max() <= 1


def test_va_follows_the_class():
    happy = np.mean([expression("train", i, label=CLASSES.index("happiness"))[1] for i in range(100)], axis=0)
    sad = np.mean([expression("train", i, label=CLASSES.index("sadness"))[1] for i in range(100)], axis=0)
    assert happy[0] > 0.5 and happy[1] > 0.2
    assert sad[0] < -0.4 and sad[1] < 0


@pytest.mark.parametrize("seed, count", [(0, 100), (0, 2500), (7, 2500)])
def test_classes_have_the_long_tail_of_raf(seed, count):
    counts = np.bincount([expression("train", i, seed)[0] for i in range(count)], minlength=7)
    assert (np.abs(counts - count * FREQUENCIES) < 2.5).all()  # independent draws are off by 12 at 2,500, one sigma
    assert counts.argmax() == CLASSES.index("happiness") and counts.argmin() == CLASSES.index("fear")


def test_every_split_has_every_class():
    for split, count in toyfaces.SPLITS.items():
        assert {expression(split, i)[0] for i in range(count)} == set(range(7))


@pytest.mark.parametrize("label", range(7))
def test_the_label_can_be_chosen(label):
    assert draw_face("train", 11, label=label)[1] == label


def test_the_label_that_is_drawn_anyway_changes_nothing():
    face = draw_face("train", 11)
    assert same_face(face, draw_face("train", 11, label=face[1]))


def test_another_label_changes_the_expression_and_not_the_corners():
    labels = [CLASSES.index(name) for name in ("happiness", "anger")]
    happy, angry = (draw_face("train", 11, size=64, label=label)[0].astype(int) for label in labels)
    assert np.abs(happy - angry).max() > 50
    assert np.array_equal(happy[:6, :6], angry[:6, :6])


def test_harder_faces_are_less_expressive():
    def strength(difficulty, label):
        features = [expression("train", i, difficulty=difficulty, label=label)[2] for i in range(100)]
        return np.abs(np.array(features) - NEUTRAL).sum(1).mean()

    for label in range(6):
        assert strength(1.0, label) < strength(0.5, label) < strength(0.0, label)


def test_harder_faces_are_closer_to_other_classes():
    def wrong(difficulty):
        faces = [expression("train", i, difficulty=difficulty)[:3:2] for i in range(300)]
        return sum(np.square(FEATURES - features).sum(1).argmin() != label for label, features in faces)

    assert wrong(1.0) > wrong(0.0)


def test_classes_differ_in_fewer_grey_levels_when_hard():
    def contrast(difficulty):
        faces = [[draw_face("train", i, difficulty=difficulty, label=c)[0] for i in range(20)] for c in (0, 6)]
        return np.abs(np.diff(np.array(faces, dtype=float), axis=0)).mean()

    assert contrast(1.0) < 0.7 * contrast(0.0)


def test_difficulty_keeps_the_label():
    assert all(expression("train", i)[0] == expression("train", i, difficulty=1.0)[0] for i in range(100))


def test_contact_sheet_has_a_row_per_class():
    sheet = contact_sheet(columns=3, size=20)
    assert sheet.size == (60, 140)
    cell = np.asarray(sheet)[40:60, 20:40]
    assert np.array_equal(cell, draw_face("train", 2 * 3 + 1, size=20, label=2)[0])


def test_main_writes_the_sheet(tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["--out", str(out), "--columns", "2", "--size", "16", "--seed", "3", "--difficulty", "1"]) == 0
    with Image.open(out) as image:
        assert image.format == "PNG" and image.size == (32, 112)
        assert np.array_equal(np.asarray(image), np.asarray(contact_sheet(2, 16, 3, 1.0)))
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["--difficulty", "1.5"],
        ["--difficulty", "-0.1"],
        ["--difficulty", "nan"],
        ["--difficulty", "hard"],
        ["--columns", "0"],
        ["--size", "4"],
        ["--seed", "-1"],
    ],
)
def test_main_refuses_what_is_out_of_range(argv, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    with pytest.raises(SystemExit) as refusal:
        main(["--out", str(out), *argv])
    assert refusal.value.code == 2 and not out.exists() and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("name", ["none/sheet.png", "sheet.foo"])
def test_main_names_a_file_that_cannot_be_written(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["--out", str(tmp_path / name), "--columns", "1", "--size", "8"])
    said = capsys.readouterr().err
    assert refusal.value.code == 2 and name in said and len(said.splitlines()) == 1


def test_import_prints_and_writes_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(toyfaces.__file__).parents[1])!r}); import support.toyfaces"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_splits_have_their_sizes():
    assert toyfaces.SPLITS == {"train": 2500, "valid": 800, "test": 800}
