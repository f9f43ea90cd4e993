"""Alignment: geometry by hand, the detector on a real photograph, the manifest, resuming, and what goes wrong."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from support import decoding

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


def test_a_large_photograph_gives_the_crop_of_a_small_one():
    """It is shrunk first, by a whole number: nothing may shift by a part of a pixel."""

    def centres(factor):
        scale = 1.01 * factor  # not 1: rounding must not decide between `factor` and one less
        landmarks = places * scale + (factor - 1) / 2  # the middle of the pixels that become one
        down, across = np.mgrid[: 101 * factor, : 101 * factor]
        for x, y in landmarks:
            blob = 255 * np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * (4 * factor) ** 2))
            image = Image.fromarray(blob.round().astype(np.uint8)).convert("RGB")
            found = np.asarray(crop(image, landmarks, 100, 0.3), float).sum(2)
            yield [(found.sum(axis) * np.arange(100)).sum() / found.sum() for axis in (0, 1)]

    places = template(100, 0.3)
    small, large = np.array(list(centres(1))), np.array(list(centres(4)))
    np.testing.assert_allclose(small, places, atol=0.3)
    np.testing.assert_allclose(large, small, atol=0.05)


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
    monkeypatch.setattr(align_faces, "start_worker", lambda *parent: None)
    monkeypatch.setattr(align_faces, "find_faces", lambda image, args: asked.append(image.size) or [])
    assert main([str(photos), "--out", str(again), "--format", "png", "--workers", "1"]) == 0
    anew = {"happy/turned.jpg", "two.webp"}  # the second stands before the cut
    assert len(asked) == 2 and all(manifest(again)[name][0]["status"] == "no face" for name in anew)
    assert {s: r for s, r in manifest(again).items() if s not in anew} == {
        s: r for s, r in rows.items() if s not in anew
    }
    assert "7 of 10 photographs are done already" in capsys.readouterr().out  # broken.jpg is tried again too
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


def test_a_detector_whose_parts_do_not_fit_together_is_one_line(tmp_path, monkeypatch, capsys):
    def fail():
        raise TypeError("Descriptors cannot be created directly")

    photograph(tmp_path / "photos" / "a.png")
    monkeypatch.setattr(align_faces, "import_mtcnn", fail)
    assert align(tmp_path / "photos", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert "Descriptors cannot" in error and "requirements-align.txt" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("missing", ["mtcnn", "tensorflow"])
def test_without_the_detector_it_says_how_to_install_it(missing, tmp_path, monkeypatch, capsys):
    photograph(tmp_path / "photos" / "a.png")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mtcnn"]:
        monkeypatch.delitem(sys.modules, name)  # imported by an earlier test
    monkeypatch.setitem(sys.modules, missing, None)
    assert align(tmp_path / "photos", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert missing in error and "pip install -r requirements-align.txt" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


NOISY = """
import os
os.write(2, b"at the import")
{}
class MTCNN:
    def detect_faces(self, *args, **options):
        os.write(2, b"at a face")
        return []
"""


@pytest.mark.parametrize("line, code, shown", [("", 0, "at a face"), ("import missing_package", 2, "at the import")])
def test_what_the_import_of_the_detector_writes_is_shown_only_when_it_fails(line, code, shown, tmp_path):
    photograph(tmp_path / "photos" / "a.png")
    (tmp_path / "mtcnn.py").write_text(NOISY.format(line))
    command = [sys.executable, align_faces.__file__, "photos", "--out", "out", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code and ("missing_package" in done.stderr) == (code == 2)
    assert [text for text in ("at the import", "at a face") if text in done.stderr] == [shown]


# Nothing is lost, whatever the folder holds: with a detector that finds what it is told


def one_face(image, args, count=1):
    """As many faces as `count` in any photograph, the first one the largest."""
    places = np.array([[30.0, 30], [60, 30], [45, 45], [32, 60], [58, 60]])
    return [dict(box=[5, 5, 80 - k, 80 - k], confidence=0.99, landmarks=places) for k in range(count)]


@pytest.fixture
def fake(monkeypatch):
    """A detector that finds one face everywhere, or so many in photographs of so many pixels."""
    counts = {}
    for name in ("mtcnn", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(align_faces, "start_worker", lambda *parent: None)
    monkeypatch.setattr(align_faces, "find_faces", lambda image, args: one_face(image, args, counts.get(image.size, 1)))
    return counts


def photograph(path, value=128, size=(100, 100)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return path


def align(photos, out, *more):
    return main([str(photos), "--out", str(out), "--workers", "1", "--format", "png", *more])


def crops(out):
    """What would be trained on."""
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.suffix in (".jpg", ".png"))


def age(path, seconds):
    """Make a file so much older, or younger if negative."""
    os.utime(path, (path.stat().st_mtime - seconds,) * 2)
    return path


def test_outputs_never_collide(fake, tmp_path):
    fake[(90, 90)] = 3  # three faces in this photograph
    values = {"A.jpg": 10, "A.JPG": 30, "a.png": 50, "b.jpg": 70, "img_2.jpg": 90, "img_3.jpg": 110, "img-.png": 130}
    values |= {"faces.png": 150, "c.jpg": 170, "c.bmp": 190, "c_jpg_2.png": 210}
    for name, value in values.items():
        photograph(tmp_path / "photos" / name, value)
    photograph(tmp_path / "photos" / "img.jpg", 240, (90, 90))
    before = {path: path.read_bytes() for path in (tmp_path / "photos").iterdir()}
    assert align(tmp_path / "photos", tmp_path / "out", "--face", "all") == 0
    rows = manifest(tmp_path / "out")
    outputs = [row["output"] for own in rows.values() for row in own]
    assert len(outputs) == 14 == len({name.casefold() for name in outputs})
    for name, value in (values | {"img.jpg": 240}).items():
        for row in rows[name]:  # each crop shows its own photograph
            assert abs(int(pixels(tmp_path / "out" / row["output"])[100, 100]) - value) <= 2
    assert {path: path.read_bytes() for path in (tmp_path / "photos").iterdir()} == before
    assert Image.open(tmp_path / "out" / "faces.png").size == (14 * 160, 320)  # the sheet, no crop


def test_photographs_and_the_files_of_others_are_not_written_over(fake, tmp_path, capsys):
    photograph(tmp_path / "out" / "photos" / "a.png")
    assert align(tmp_path / "out" / "photos", tmp_path / "out") == 2
    assert "lies in --out" in capsys.readouterr().err
    photograph(tmp_path / "photos" / "a.png")
    mine = photograph(tmp_path / "mine" / "a.png", 7)
    content = mine.read_bytes()
    for more in ([], ["--overwrite"]):
        assert align(tmp_path / "photos", tmp_path / "mine", *more) == 2
        assert "not crops" in capsys.readouterr().err and list(mine.parent.iterdir()) == [mine]
    assert mine.read_bytes() == content
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / ".DS_Store").touch()  # what macOS writes into a folder that it shows
    assert align(tmp_path / "photos", tmp_path / "shown") == 0


def test_a_photograph_whose_name_is_taken_later_is_done_again(fake, tmp_path):
    photograph(tmp_path / "photos" / "a.png", 50)
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    photograph(tmp_path / "photos" / "a.jpg", 200)
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    rows = manifest(tmp_path / "out")
    assert [rows[name][0]["output"] for name in ("a.jpg", "a.png")] == ["a_jpg.png", "a_png.png"]
    assert crops(tmp_path / "out") == ["a_jpg.png", "a_png.png", "faces.png"]
    for name, value in (("a.jpg", 200), ("a.png", 50)):
        assert abs(int(pixels(tmp_path / "out" / rows[name][0]["output"])[100, 100]) - value) <= 2


@pytest.mark.parametrize("damage", ["", 'b.png,"x', "b.png,x.png\n"])
def test_overwrite_leaves_no_crop_of_the_settings_before(damage, fake, tmp_path):
    fake[(90, 90)] = 3
    photograph(tmp_path / "photos" / "sad" / "a.png", 50, (90, 90))
    assert align(tmp_path / "photos", tmp_path / "out", "--face", "all") == 0
    assert crops(tmp_path / "out") == ["faces.png", "sad/a.png", "sad/a_2.png", "sad/a_3.png"]
    with open(tmp_path / "out" / "faces.csv", "a") as file:
        file.write(damage)
    (tmp_path / "out" / "sad" / "mine.png").write_text("in no manifest")
    assert align(tmp_path / "photos", tmp_path / "out", "--overwrite", "--format", "jpg") == 0
    assert crops(tmp_path / "out") == ["faces.png", "sad/a.jpg", "sad/mine.png"]


def test_crops_without_their_photograph_or_face_are_removed(fake, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    for name in ("gone", "lawn", "link", "stays"):
        photograph(photos / f"{name}.png")
    (photos / "link.png").rename(tmp_path / "elsewhere.png")
    (photos / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert align(photos, out) == 0
    assert crops(out) == ["faces.png", "gone.png", "lawn.png", "link.png", "stays.png"]
    (photos / "gone.png").unlink()
    (tmp_path / "elsewhere.png").unlink()
    fake[(80, 80)] = 0
    age(photograph(photos / "lawn.png", size=(80, 80)), -9)
    assert align(photos, out) == 0
    assert crops(out) == ["faces.png", "stays.png"]
    status = {source: own[0]["status"].partition(":")[0] for source, own in manifest(out).items()}
    assert status == {"lawn.png": "no face", "link.png": "unreadable", "stays.png": "ok"}


def test_no_file_is_removed_because_a_manifest_names_it(fake, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photograph(photos / "sad" / "a.png")
    assert align(photos, out) == 0
    others = [photograph(tmp_path / place / "b.png") for place in ("beside", "linked", "photos")]
    (out / "link").symlink_to(tmp_path / "linked")
    (out / "sad" / "link.png").symlink_to(others[0])
    names = ["../beside/b.png", str(others[0]), "link/b.png", "sad/link.png", "sad/../sad/a.png", "faces.json", "sad"]
    with open(out / "faces.csv", "a") as file:
        file.writelines(f"{k},{name},,,,ok\n" for k, name in enumerate([*names, "\0.png", "x" * 300 + ".png"]))
    assert align(photos, out) == 0
    kept = (*others, out / "sad" / "a.png", out / "sad" / "link.png", out / "faces.json")
    assert all(path.is_file() for path in kept)
    assert list(manifest(out)) == ["b.png", "sad/a.png"]


def test_a_killed_run_leaves_nothing_to_the_next_one(fake, tmp_path, monkeypatch):
    """The crops of before, and one whose row the kill has cut, are removed by the run that comes to its end."""
    photos, out, seen = tmp_path / "photos", tmp_path / "out", []
    for k in range(3):
        photograph(photos / f"{k}.bmp")

    def stop(image, args):
        seen.append(image)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return one_face(image, args)

    assert align(photos, out) == 0
    with monkeypatch.context() as patch:
        patch.setattr(align_faces, "find_faces", stop)
        assert align(photos, out, "--overwrite", "--format", "jpg") == 130
    assert crops(out) == ["0.jpg", "0.png", "1.png", "2.png", "faces.png"]
    photograph(out / "2.jpg")  # as another worker may have written it
    for more in (["--format", "jpg"], ["--overwrite"]):
        again = tmp_path / f"again{len(more)}{more[0]}"
        shutil.copytree(out, again)
        assert align(photos, again, *more) == 0
        form = more[-1] if len(more) > 1 else "png"
        assert crops(again) == sorted([*(f"{k}.{form}" for k in range(3)), "faces.png"])


def test_photographs_that_were_mended_or_replaced_are_looked_at_again(fake, tmp_path, monkeypatch, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    fake[(80, 80)] = 0
    photograph(photos / "face.png", 50)
    photograph(photos / "lawn.png", 50, (80, 80))
    (photos / "broken.png").write_bytes(b"")
    assert align(photos, out) == 0
    age(photograph(photos / "broken.png", 200), 3600)  # mended from an old copy
    assert align(photos, out) == 0
    assert [own[0]["status"] for own in manifest(out).values()] == ["ok", "ok", "no face"]
    assert "2 of 3 photographs are done already" in capsys.readouterr().out
    for name in ("face", "lawn"):
        age(photograph(photos / f"{name}.png", 150), 3600)  # replaced by an older file
        assert align(photos, out) == 0
        assert "2 of 3 photographs are done already" in capsys.readouterr().out
        (row,) = manifest(out)[f"{name}.png"]
        assert row["status"] == "ok" and int(pixels(out / row["output"])[100, 100]) == 150
    assert align(photos, out) == 0
    assert "3 of 3 photographs are done already" in capsys.readouterr().out


def test_further_faces_of_a_killed_run_are_removed_with_their_photograph(fake, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    fake[(90, 90)] = 3
    for name in ("a", "b"):
        photograph(photos / "sad" / f"{name}.png", size=(90, 90))
    assert align(photos, out, "--face", "all") == 0
    with open(out / "faces.csv") as file:
        head, *lines = file.readlines()
    cut = [",sad/a.png,,,,unfinished\n", *(line for line in lines if "sad/b" in line)]  # as a kill leaves it
    (out / "faces.csv").write_text("".join([head, *cut]))
    (photos / "sad" / "a.png").unlink()
    photograph(out / "sad" / "mine_2.png")
    assert align(photos, out, "--face", "all") == 0
    assert crops(out) == ["faces.png", "sad/b.png", "sad/b_2.png", "sad/b_3.png", "sad/mine_2.png"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_detector_that_does_not_start_is_one_line(workers, tmp_path):
    package = tmp_path / "packages" / "mtcnn.py"
    package.parent.mkdir()
    package.write_text("class MTCNN:\n    def __init__(self):\n        raise OSError('weights are damaged')\n")
    for name in "ab":
        photograph(tmp_path / "photos" / f"{name}.png")
    code = f"import sys, align_faces; sys.exit(align_faces.main({[str(tmp_path / 'photos'), '--workers', workers]!r}))"
    environment = os.environ | {"PYTHONPATH": f"{package.parent}{os.pathsep}{Path(align_faces.__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "no face detector (weights are damaged)" in error and "Traceback" not in done.stderr


def test_names_that_the_manifest_cannot_hold_and_a_file_as_folder_are_refused(fake, tmp_path, capsys):
    photograph(tmp_path / "photos" / "a.png")
    (tmp_path / "file").write_text("mine")
    assert align(tmp_path / "photos", tmp_path / "file") == 2
    assert "file is no folder" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"
    photograph(tmp_path / "photos" / "b\r.png")
    assert align(tmp_path / "photos", tmp_path / "out") == 2
    assert "carriage return" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert align(tmp_path / "photos", tmp_path / "out", "--siz", "100") == 2  # no abbreviations
    assert "--siz" in capsys.readouterr().err


def test_what_a_kill_in_the_first_instant_leaves_does_not_block(fake, tmp_path):
    photograph(tmp_path / "photos" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".faces.json.abcd1234").write_text("{")
    assert align(tmp_path / "photos", tmp_path / "out") == 0 and crops(tmp_path / "out") == ["a.png", "faces.png"]


def test_what_the_detector_raises_is_a_row(fake, tmp_path, monkeypatch, capsys):
    def fail(error):
        def find(image, args):
            if image.size == (80, 80):
                raise error
            return one_face(image, args)

        monkeypatch.setattr(align_faces, "find_faces", find)

    for name, size in (("a", 100), ("b", 80), ("c", 100)):
        photograph(tmp_path / "photos" / f"{name}.png", size=(size, size))
    fail(RuntimeError("no\nshape"))
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    assert [own[0]["status"] for own in manifest(tmp_path / "out").values()] == ["ok", "unreadable: no shape", "ok"]
    fail(MemoryError())
    assert align(tmp_path / "photos", tmp_path / "out", "--overwrite") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("align_faces.py: error: out of memory: fewer")


def test_a_face_that_cannot_be_cropped_is_a_row(fake, tmp_path, monkeypatch):
    def find(image, args):
        faces = one_face(image, args, 2)
        faces[1]["landmarks"] = np.full((5, 2), 7.1) if image.size == (80, 80) else faces[1]["landmarks"]
        return faces

    monkeypatch.setattr(align_faces, "find_faces", find)
    for name, size in (("a", 100), ("b", 80), ("c", 100)):
        photograph(tmp_path / "photos" / f"{name}.png", size=(size, size))
    assert align(tmp_path / "photos", tmp_path / "out", "--face", "all") == 0
    rows = manifest(tmp_path / "out")
    assert [own[0]["status"].split(":")[0] for own in rows.values()] == ["ok", "unreadable", "ok"]
    assert rows["b.png"][0]["status"] == "unreadable: all landmarks are one point"
    assert len(rows["b.png"]) == 1 and not (tmp_path / "out" / "b.png").exists()


def test_photographs_are_turned_as_training_images_are():
    """align_faces.py loads no PyTorch, so it has a table of its own."""
    assert align_faces.TURNS == decoding.TURNS


@pytest.mark.parametrize("cores, workers", [(384, 32), (2, 2), (None, 1)])
def test_workers_on_machines_of_any_size(cores, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(align_faces.os, "cpu_count", lambda: cores)
    assert align_faces.parse_args([str(tmp_path), "--out", str(tmp_path / "out")]).workers == workers


def test_a_photograph_that_does_not_fit_into_the_memory_is_a_row(fake, tmp_path, monkeypatch):
    photograph(tmp_path / "photos" / "a.png")

    def full(*args, **more):
        raise MemoryError

    monkeypatch.setattr(align_faces, "upright", full)
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    assert manifest(tmp_path / "out")["a.png"][0]["status"] == "unreadable: it does not fit into the memory"


def test_a_worker_that_dies_is_one_line(fake, tmp_path, monkeypatch, capsys):
    class Pool:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def map(self, *args, **more):
            raise BrokenProcessPool("a child process terminated abruptly")

    for name in "ab":
        photograph(tmp_path / "photos" / f"{name}.png")
    monkeypatch.setattr(align_faces, "ProcessPoolExecutor", Pool)
    assert main([str(tmp_path / "photos"), "--out", str(tmp_path / "out"), "--workers", "2"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("align_faces.py: error: ") and "try fewer --workers" in error


def test_long_lists_are_cut(fake, tmp_path, capsys):
    for k in range(23):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{k:02}.png").write_bytes(b"")
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("23 photographs: 0 faces in ") and "0 without a face, 23 unreadable" in lines[0]
    assert lines[1:21] == [f"  unreadable: {k:02}.png" for k in range(20)]
    assert lines[21:] == [f"  unreadable: 3 more, see {tmp_path / 'out' / 'faces.csv'}"]


@pytest.mark.parametrize("option, value", [
    ("--size", "100"), ("--margin", "0.5"), ("--face", "all"), ("--min-confidence", "0.5"), ("--detect-size", "512"),
    ("--format", "jpg"),
])  # fmt: skip
def test_crops_of_other_settings_are_refused_or_made_anew(option, value, fake, tmp_path, capsys):
    photograph(tmp_path / "photos" / "a.bmp")
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    before = crops(tmp_path / "out")
    capsys.readouterr()
    assert align(tmp_path / "photos", tmp_path / "out", option, value) == 2
    error = capsys.readouterr().err
    assert f"was made with {option[2:].replace('-', '_')} " in error and f", not {value}: --overwrite" in error
    assert crops(tmp_path / "out") == before and len(error.splitlines()) == 1
    assert align(tmp_path / "photos", tmp_path / "out", option, value, "--overwrite") == 0
    assert "done already" not in capsys.readouterr().out
    assert align(tmp_path / "photos", tmp_path / "out", option, value) == 0
    assert "1 of 1 photographs are done already" in capsys.readouterr().out


def test_a_manifest_cut_inside_a_photograph_loses_no_face(fake, tmp_path):
    fake[(90, 90)] = 3
    photograph(tmp_path / "photos" / "a.png")
    photograph(tmp_path / "photos" / "b.png", size=(90, 90))
    assert align(tmp_path / "photos", tmp_path / "out", "--face", "all") == 0
    whole = (tmp_path / "out" / "faces.csv").read_bytes()
    for cut in (whole.rindex(b"b.png,b_2") + 4, whole.rindex(b"b.png,b_3") + 1, len(whole) - 1):
        (tmp_path / "out" / "faces.csv").write_bytes(whole[:cut])
        assert align(tmp_path / "photos", tmp_path / "out", "--face", "all") == 0
        assert (tmp_path / "out" / "faces.csv").read_bytes() == whole


def test_nothing_left_to_do_starts_no_detector(fake, tmp_path, monkeypatch, capsys):
    def start(*parent):
        raise AssertionError

    photograph(tmp_path / "photos" / "a.png")
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    monkeypatch.setattr(align_faces, "start_worker", start)
    monkeypatch.setitem(sys.modules, "mtcnn", None)  # a failing import
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    assert "1 of 1 photographs are done already" in capsys.readouterr().out


def test_every_file_is_written_whole(fake, tmp_path, monkeypatch):
    photograph(tmp_path / "photos" / "a.png")
    replace, written = os.replace, set()
    monkeypatch.setattr(align_faces.os, "replace", lambda a, b: written.add(Path(b).name) or replace(a, b))
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    assert written == {"a.png", "faces.csv", "faces.json", "faces.png"} == set(os.listdir(tmp_path / "out"))


def test_photographs_of_16_bits_keep_their_greys(fake, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((100, 100), 200 * 256 + 5, np.uint16)).save(tmp_path / "photos" / "deep.png")
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    assert int(pixels(tmp_path / "out" / "deep.png")[100, 100]) == 200


EPS, PPM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6 100 100 255\n" + bytes(30000)


@pytest.mark.parametrize("content", [b"", EPS, PPM, b"BM" + b"\xff" * 60])
def test_what_is_no_photograph_has_a_row_and_reaches_no_other_decoder(content, fake, tmp_path):
    photograph(tmp_path / "photos" / "good.png")
    (tmp_path / "photos" / "bad.jpg").write_bytes(content)
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    (row,) = manifest(tmp_path / "out")["bad.jpg"]
    assert row["status"].startswith("unreadable: ") and not row["output"]


def test_mutated_photographs_are_unreadable_or_read(fake, tmp_path):
    rng = np.random.default_rng(1)
    for form in ("png", "jpg", "bmp", "webp"):
        file = tmp_path / f"a.{form}"
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
        content = file.read_bytes()
        for _ in range(50):
            data = bytearray(content[: rng.integers(1, len(content) + 1)])
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            file.write_bytes(data)
            try:
                assert align_faces.open_photograph(file).mode == "RGB"
            except align_faces.UserError as error:
                assert len(str(error).splitlines()) == 1


def test_pipes_links_hidden_files_and_other_formats(fake, tmp_path, capsys):
    photograph(tmp_path / "photos" / "a.png")
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "nowhere.jpg").symlink_to(tmp_path / "none.jpg")
    (tmp_path / "photos" / "b.HEIC").write_bytes(b"x")
    (tmp_path / "photos" / "c.tif").write_bytes(b"x")
    (tmp_path / "photos" / "._a.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "photos" / "._b.heic").write_bytes(b"what a Mac leaves")
    photograph(tmp_path / "photos" / ".Trash" / "old" / "d.png")
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    said, rows = capsys.readouterr().out, manifest(tmp_path / "out")
    assert set(rows) == {"a.png", "nowhere.jpg"} and "1 .heic files are not read" in said and "1 .tif" in said
    assert rows["nowhere.jpg"][0]["status"].startswith("unreadable: ") and "1 unreadable" in said


def test_a_folder_that_cannot_be_listed_is_said(fake, tmp_path, monkeypatch, capsys):
    photograph(tmp_path / "photos" / "a.png")

    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/closed"))
        return iter([])

    monkeypatch.setattr(align_faces.os, "walk", walk)
    assert align(tmp_path / "photos", tmp_path / "out") == 2
    assert "closed: the folder cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("file, text", [
    ("faces.json", "[1]"), ("faces.json", "{"), ("faces.json", "\xff"), ("faces.csv", "a,b\n1,2\n"),
    ("faces.csv", 'source,output,box,landmarks,confidence,status\n"a'+"\n"*3), ("faces.csv", "source\n\x00\n"),
])  # fmt: skip
def test_a_damaged_record_is_one_line(file, text, fake, tmp_path, capsys):
    photograph(tmp_path / "photos" / "a.png")
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    (tmp_path / "out" / file).write_text(text, encoding="latin-1")
    capsys.readouterr()
    assert align(tmp_path / "photos", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error and len(error.splitlines()) == 1
    assert align(tmp_path / "photos", tmp_path / "out", "--overwrite") == 0


def test_names_that_are_not_utf_8(fake, tmp_path, capsys):
    photos = tmp_path / "photos"
    photograph(photos / os.fsdecode(b"caf\xe9.png"))
    photograph(photos / "gesicht-\N{LATIN SMALL LETTER A WITH DIAERESIS}.png")
    for again in range(2):
        assert align(photos, tmp_path / "out") == 0
    assert "2 of 2 photographs are done already" in capsys.readouterr().out
    assert b"caf\xe9.png" in (tmp_path / "out" / "faces.csv").read_bytes()


@pytest.mark.parametrize("character", ["\n", "\x0b", "\x1b", "\x85", "\u2028"])
def test_names_with_line_ends_and_control_characters(character, fake, tmp_path, capsys):
    name, shown = f"a{character}b", ascii(f"a{character}b")[1:-1]
    photograph(tmp_path / name / f"{name}.png")
    (tmp_path / name / f"{name}.jpg").write_bytes(b"")
    for again in range(2):
        assert align(tmp_path / name, tmp_path / "out" / name) == 0
    lines = capsys.readouterr().out.split("\n")  # not splitlines: some characters are line ends to it alone
    assert lines[1:] == [f"  unreadable: {shown}.jpg", "1 of 2 photographs are done already", *lines[:2], ""]
    assert lines[0].startswith("2 photographs: 1 faces in ") and f"{shown}/faces.csv" in lines[0]
    assert set(manifest(tmp_path / "out" / name)) == {f"{name}.jpg", f"{name}.png"}
    for wrong in ([str(tmp_path / name / "none")], [str(tmp_path), name]):
        assert main(wrong) == 2
        error = capsys.readouterr().err
        assert shown in error and error.endswith("\n") and all(c.isprintable() for c in error[:-1])


def test_a_full_disk_is_one_line_and_leaves_no_half_file(fake, tmp_path, monkeypatch, capsys):
    photograph(tmp_path / "photos" / "a.png")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(align_faces.os, "replace", full)
        assert align(tmp_path / "photos", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "No space left" in error and len(error.splitlines()) == 1
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_like_ctrl_c_and_the_same_command_goes_on(name, fake, tmp_path, monkeypatch, capsys):
    for k in range(3):
        photograph(tmp_path / "photos" / f"{k}.png", 50 * k)
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    seen = []

    def stop(image, args):
        seen.append(image.size)
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        return one_face(image, args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(align_faces, "find_faces", stop)
            assert align(tmp_path / "photos", tmp_path / "out") == 130
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert "the same command goes on" in capsys.readouterr().err
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    assert "1 of 3 photographs are done already" in capsys.readouterr().out and len(manifest(tmp_path / "out")) == 3


WORKERS = """
import os, sys, time
import align_faces

def work(job):
    open(os.path.join(sys.argv[1], f"{os.getpid()}"), "w").close()
    time.sleep(600)

if __name__ == "__main__":
    sys.modules["mtcnn"] = type(sys)("mtcnn")
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    with ProcessPoolExecutor(2, get_context("fork"), align_faces.watch, (os.getpid(),)) as pool:
        list(pool.map(work, range(2)))
"""


def test_no_worker_outlives_a_killed_parent(tmp_path):
    script, marks = tmp_path / "workers.py", tmp_path / "marks"
    script.write_text(WORKERS)
    marks.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(align_faces.__file__).parent)}
    parent = subprocess.Popen([sys.executable, str(script), str(marks)], env=environment)
    end = time.monotonic() + 60
    while len(list(marks.iterdir())) < 2:
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers = [int(path.name) for path in marks.iterdir()]
    while any(Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


RUN = """
import sys, types
sys.modules["mtcnn"] = types.ModuleType("mtcnn")
import align_faces, numpy as np
align_faces.start_worker = lambda *parent: None
places = np.array([[30.0, 30], [60, 30], [45, 45], [32, 60], [58, 60]])
align_faces.find_faces = lambda image, args: [dict(box=[5, 5, 80, 80], confidence=0.99, landmarks=places)]
sys.exit(align_faces.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", ">&-", "| head -1", "PYTHONIOENCODING=ascii"])
def test_a_stream_that_nobody_reads_ends_nothing(closed, tmp_path):
    for k in range(3):
        photograph(tmp_path / "photos" / f"\N{LATIN SMALL LETTER A WITH DIAERESIS}{k}.png")
    (tmp_path / "photos" / "\N{LATIN SMALL LETTER A WITH DIAERESIS}.jpg").write_bytes(b"no photograph")
    (tmp_path / "run.py").write_text(RUN)
    before, after = (f"{closed} ", "") if "=" in closed else ("", f" {closed}")
    command = f"{before}{sys.executable} run.py photos --out out --workers 1{after}"
    environment = os.environ | {"PYTHONPATH": str(Path(align_faces.__file__).parent)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert len(manifest(tmp_path / "out")) == 4


def test_crops_of_other_photographs_are_refused(fake, tmp_path):
    for name in ("one", "two"):
        photograph(tmp_path / name / f"{name}.png")
    assert align(tmp_path / "one", tmp_path / "out") == 0 and align(tmp_path / "two", tmp_path / "out") == 2
    assert "one.png" in crops(tmp_path / "out") and "two.png" not in crops(tmp_path / "out")


def test_crops_have_the_size_and_the_margin_of_the_flags(fake, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    path = photograph(tmp_path / "photos" / "a.png")
    Image.fromarray(noise).save(path)
    assert align(tmp_path / "photos", tmp_path / "out", "--size", "100", "--margin", "0.5") == 0
    wanted = crop(Image.fromarray(noise), one_face(None, None)[0]["landmarks"], 100, 0.5)
    assert np.array_equal(Image.open(tmp_path / "out" / "a.png"), wanted)


def test_faces_are_told_in_pixels_of_the_whole_photograph(monkeypatch):
    """The detector sees it shrunk to --detect-size, and the faces that it is not sure of are left out."""
    seen = []

    def detect(image):
        seen.append(image.shape)
        points = dict.fromkeys(align_faces.POINTS, (1, 2))
        return [dict(box=[10, 20, 30, 40], confidence=c, keypoints=points) for c in (0.6, 0.95)]

    monkeypatch.setattr(align_faces, "detector", types.SimpleNamespace(detect_faces=detect))

    def find(detect_size, confidence):
        args = types.SimpleNamespace(detect_size=detect_size, min_confidence=confidence)
        return align_faces.find_faces(Image.new("RGB", (400, 200)), args)

    one, two = find(200, 0.5)
    assert one["box"] == two["box"] == [20, 40, 60, 80] and one["landmarks"].tolist() == [[2, 4]] * 5
    assert [face["box"] for face in find(400, 0.7)] == [[10, 20, 30, 40]] and find(800, 0.99) == []
    assert seen == [(100, 200, 3), (200, 400, 3), (200, 400, 3)]


def test_photographs_of_every_suffix_are_found(fake, tmp_path):
    for suffix in ("jpg", "jpeg", "bmp", "webp", "png"):
        photograph(tmp_path / "photos" / f"{suffix}.{suffix}")
    assert align(tmp_path / "photos", tmp_path / "out") == 0
    with open(tmp_path / "out" / "faces.csv") as file:
        assert sorted(row["source"] for row in csv.DictReader(file)) == [
            "bmp.bmp", "jpeg.jpeg", "jpg.jpg", "png.png", "webp.webp"]
