"""Alignment: geometry by hand, the detector on a real photograph, the manifest, resuming, and what goes wrong."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

import align_faces
from align_faces import choose, crop, main, similarity, template


def test_a_similarity_is_found_again():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(5, 2))
    angle, scale, shift = 0.7, 2.5, np.array([3.0, -4.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = similarity(points, points @ turn.T + shift)
    np.testing.assert_allclose(matrix, np.column_stack([turn, shift]), atol=1e-12)


def test_a_similarity_is_the_least_squares_one_and_never_mirrors():
    rng = np.random.default_rng(2)
    source, target = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))

    def error(matrix):
        return ((source @ matrix[:, :2].T + matrix[:, 2] - target) ** 2).sum()

    matrix = similarity(source, target)
    for a, b, x, y in rng.normal(scale=0.05, size=(50, 4)):
        assert error(matrix) <= error(matrix + np.array([[a, -b, x], [b, a, y]])) + 1e-12
    assert np.linalg.det(similarity(source, source * [-1, 1])[:, :2]) > 0


def test_the_margin_shrinks_the_template_about_the_centre():
    tight, wide = template(112, 0), template(112, 1)
    assert tight[0] == pytest.approx([38.2946, 51.6963])
    np.testing.assert_allclose(wide - 56, (tight - 56) / 2)


@pytest.mark.parametrize("scale", [1, 4, 9])
def test_landmarks_come_to_lie_on_the_template(scale):
    places = template(100, 0.3)
    turn = scale * np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    landmarks = (places - 50) @ turn.T + 60 * scale
    for k in range(5):
        image = Image.new("RGB", (120 * scale, 120 * scale))
        x, y = landmarks[k]
        ImageDraw.Draw(image).ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill="white")
        found = np.asarray(crop(image, landmarks, 100, 0.3), float).sum(2)
        centre = [(found.sum(axis) * np.arange(100)).sum() / found.sum() for axis in (0, 1)]
        assert centre == pytest.approx(places[k], abs=1.0)


def test_largest_and_central_face():
    small, large = dict(box=[45, 45, 10, 10]), dict(box=[0, 0, 30, 30])
    assert choose([small, large], "largest", 100, 100) == [large]
    assert choose([small, large], "central", 100, 100) == [small]
    assert choose([small, large], "all", 100, 100) == [large, small] and choose([], "central", 9, 9) == []


def astronaut():
    return Image.fromarray(pytest.importorskip("skimage.data").astronaut())


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A folder of photographs and what became of it: (photos, faces, {source: rows})."""
    folder = tmp_path_factory.mktemp("align")
    photos, faces = folder / "photos", folder / "faces"
    (photos / "happy").mkdir(parents=True)
    person = astronaut()
    person.save(photos / "happy" / "upright.png")
    person.rotate(30, Image.BICUBIC).save(photos / "happy" / "turned.jpg", quality=95)
    person.resize((1536, 1536)).save(photos / "happy" / "large.jpg")
    person.convert("L").save(photos / "grey.bmp")
    person.convert("CMYK").save(photos / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees for viewing
    person.rotate(90, expand=True).save(photos / "exif.jpg", quality=95, exif=exif)
    two = Image.new("RGB", (1024, 512))
    two.paste(person, (0, 0))
    two.paste(person.resize((256, 256)), (600, 100))
    two.save(photos / "two.webp", quality=95)
    Image.new("RGB", (200, 200), "green").save(photos / "lawn.jpg")
    (photos / "broken.jpg").write_bytes((photos / "lawn.jpg").read_bytes()[:300])
    person.resize((300, 300)).save(photos / "grey.jpg", quality=95)
    assert main([str(photos), "--out", str(faces), "--workers", "2", "--format", "png"]) == 0
    return photos, faces, manifest(faces)


def manifest(faces):
    rows = {}
    with open(faces / "faces.csv", newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["source"], []).append(row)
    return rows


def pixels(path):
    return np.asarray(Image.open(path).convert("L"), float)


def test_every_photograph_has_a_row(aligned, capsys):
    photos, faces, rows = aligned
    assert set(rows) == {p.relative_to(photos).as_posix() for p in photos.rglob("*") if p.is_file()} and list(
        rows
    ) == sorted(rows)
    assert (
        rows["lawn.jpg"][0]["status"] == "no face"
        and rows["broken.jpg"][0]["status"].startswith("unreadable")
        and not rows["lawn.jpg"][0]["output"]
    )
    assert rows["grey.bmp"][0]["output"] == "grey_bmp.png" and rows["grey.jpg"][0]["output"] == "grey_jpg.png"
    assert (faces / "happy" / "upright.png").exists() and Image.open(faces / "happy" / "upright.png").size == (224, 224)
    assert Image.open(faces / "faces.png").size[1] == 320


@pytest.mark.parametrize(
    "other", ["happy/turned.jpg", "happy/large.jpg", "grey.bmp", "cmyk.jpg", "exif.jpg", "two.webp", "grey.jpg"]
)
def test_the_same_face_gives_the_same_crop(other, aligned):
    photos, faces, rows = aligned
    (row,), reference = rows[other], pixels(faces / "happy" / "upright.png")
    assert row["status"] == "ok" and float(row["confidence"]) > 0.9
    found = pixels(faces / row["output"])
    inner = slice(40, 184)
    assert (
        np.corrcoef(found[inner, inner].ravel(), reference[inner, inner].ravel())[0, 1] > 0.8
    )  # 0.71 if it were turned by 10 degrees


def test_landmarks_are_where_the_face_is(aligned):
    _, _, rows = aligned
    points = np.array(rows["happy/upright.png"][0]["landmarks"].split(), float).reshape(5, 2)
    x, y, w, h = map(float, rows["happy/upright.png"][0]["box"].split())
    assert (points > [x, y]).all() and (points < [x + w, y + h]).all()
    assert (
        points[0, 0] < points[1, 0] and points[0, 1] < points[2, 1] < points[3, 1]
    )  # left of right eye; eyes, nose, mouth downwards
    large = np.array(rows["happy/large.jpg"][0]["landmarks"].split(), float).reshape(5, 2)
    np.testing.assert_allclose(large / 3, points, atol=5)


def test_all_faces_and_the_central_one(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    person = astronaut()
    two = Image.new("RGB", (1024, 512))
    two.paste(person, (0, 0))
    two.paste(person.resize((256, 256)), (450, 120))
    two.save(photos / "two.png")
    assert main([str(photos), "--out", str(tmp_path / "all"), "--face", "all", "--workers", "1"]) == 0
    rows = manifest(tmp_path / "all")["two.png"]
    assert [row["output"] for row in rows] == ["two.jpg", "two_2.jpg"] and all(
        (tmp_path / "all" / row["output"]).exists() for row in rows
    )
    assert main([str(photos), "--out", str(tmp_path / "central"), "--face", "central", "--workers", "1"]) == 0
    (central,) = manifest(tmp_path / "central")["two.png"]
    assert float(central["box"].split()[0]) > 450


def test_done_photographs_are_skipped_and_lost_crops_made_again(aligned, tmp_path, monkeypatch, capsys):
    photos, faces, rows = aligned
    again = tmp_path / "faces"
    shutil.copytree(faces, again)
    (again / "happy" / "turned.png").unlink()
    with open(again / "faces.csv", "a") as file:
        file.write("happy/large.jpg,hap")  # a line that a kill cut
    asked = []
    monkeypatch.setattr(align_faces, "start_worker", lambda: None)
    monkeypatch.setattr(align_faces, "find_faces", lambda image, args: asked.append(image.size) or [])
    assert main([str(photos), "--out", str(again), "--format", "png", "--workers", "1"]) == 0
    assert len(asked) == 1 and manifest(again)["happy/turned.jpg"][0]["status"] == "no face"
    assert {s: r for s, r in manifest(again).items() if s != "happy/turned.jpg"} == {
        s: r for s, r in rows.items() if s != "happy/turned.jpg"
    }
    assert "9 of 10 photographs are done already" in capsys.readouterr().out
    assert main([str(photos), "--out", str(again), "--format", "png", "--size", "100"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_crops_train(aligned, tmp_path, monkeypatch):
    from conftest import Tiny

    import cocuring
    import common

    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    photos, faces, _ = aligned
    for name in ("sad", "happy"):
        for k in range(5):
            (tmp_path / "root" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(faces / "happy" / "upright.png", tmp_path / "root" / name / f"{k}.png")
    shutil.copy(faces / "faces.csv", tmp_path / "root" / "faces.csv")
    place = ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
    assert (
        cocuring.main(
            [
                "--data",
                "folder",
                "--root",
                str(tmp_path / "root"),
                "--size",
                "32",
                "--epochs",
                "1",
                "--batch-size",
                "4",
                *place,
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: [str(p / "none")], "no such folder"),
        (lambda p: [str(p)], "no photographs"),
        (lambda p: [str(p), "--out", str(p / "faces")], "lies in"),
        (lambda p: [str(p), "--out", str(p)], "lies in"),
        (lambda p: [str(p), "--size", "3"], "--size"),
    ],
)
def test_bad_input_is_refused(make, words, tmp_path, capsys):
    folder = tmp_path / "empty"
    folder.mkdir()
    arguments = make(folder)
    assert main(arguments + ([] if "--out" in arguments else ["--out", str(tmp_path / "out")])) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_tensorflow_it_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    monkeypatch.setitem(__import__("sys").modules, "tensorflow", None)
    assert main([str(tmp_path), "--out", str(tmp_path.parent / "out-none")]) == 2
    error = capsys.readouterr().err.strip()
    assert "pip install -r requirements-align.txt" in error and len(error.splitlines()) == 1
