"""Small data sets in the layouts in which the real ones come, a small backbone, and what is read back of a run."""

import csv
import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n 2: the workers, and what they start, share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import runs, toyfaces  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import cocuring  # noqa: E402
import common  # noqa: E402

RAF_TRAIN, RAF_TEST = 28, 14  # four and two images per class
FERPLUS_USAGE = {"Train": "Training", "Valid": "PublicTest", "Test": "PrivateTest"}
FERPLUS_COLUMNS = "neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"


def picture(key, width, height, grey=False):
    """A smooth image that depends on `key`, an int or a list of them, alone."""
    patches = np.random.default_rng(key).integers(0, 256, (4, 4) if grey else (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.BICUBIC)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def raf_rows(split=None):
    """(name, label 1..7) of the rows of RAF-DB's list: train names have five digits, test names four."""
    rows = [(f"train_{i:05d}.jpg", 1 + i % 7) for i in range(1, RAF_TRAIN + 1)]
    rows += [(f"test_{i:04d}.jpg", 1 + i % 7) for i in range(1, RAF_TEST + 1)]
    return [row for row in rows if split is None or row[0].startswith(split)]


def raf_picture(name):
    split, number = name.removesuffix(".jpg").split("_")
    return picture([split == "train", int(number)], 100, 100)


def build_raf(root, separate=False, base=1, rows=None):
    """RAF-DB as its authors give it; separate: a list per split; base: what labels count from; rows: other rows."""
    rows = raf_rows() if rows is None else rows
    for name, _ in rows:
        save(raf_picture(name), root / "Image" / "aligned" / name.replace(".jpg", "_aligned.jpg"))
    for file, split in (
        (("train_label.txt", "train"), ("test_label.txt", "test")) if separate else (("list_patition_label.txt", ""),)
    ):
        path = root / "EmoLabel" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{name} {label - 1 + base}\n" for name, label in rows if name.startswith(split)))
    return root


def build_raf_kaggle(root, tables=True):
    """RAF-DB as re-packaged on Kaggle; tables: with train_labels.csv and test_labels.csv."""
    for split in ("train", "test"):
        lines = ["image,label\n"]
        for name, label in raf_rows(split):
            name_here = name.replace(".jpg", "_aligned.jpg")
            save(raf_picture(name), root / "DATASET" / split / str(label) / name_here)
            lines.append(f"{name_here},{label}\n")
        if tables:
            (root / f"{split}_labels.csv").write_text("".join(lines))
    return root


def votes_for(winner, second=None):
    """Ten vote counts that `winner` wins by eight of ten."""
    counts = [0] * 10
    counts[winner], counts[(winner + 1) % 8 if second is None else second] = 8, 2
    return counts


def ferplus_rows():
    """(part, name or "", ten votes, 48 x 48 grey array) of each row: three images per class in Train, else one."""
    rows = []
    for part, count in (("Train", 3), ("Valid", 1), ("Test", 1)):
        votes = [votes_for(c) for c in range(8)] * count + [
            votes_for(8),
            votes_for(9),
            [5, 5] + [0] * 8,
        ]  # the last three are dropped
        votes.insert(2, None)  # a row without an image name
        for counts in votes:
            number = len(rows)
            pixels = np.asarray(picture([7, number], 48, 48, grey=True))
            rows.append((part, f"fer{number:07d}.png" if counts else "", counts or votes_for(0), pixels))
    return rows


def build_ferplus(root):
    """FERPlus as folders of images, each with its label.csv."""
    for part, name, votes, pixels in ferplus_rows():
        if name:
            folder = root / f"FER2013{part}"
            save(Image.fromarray(pixels), folder / name)
            with open(folder / "label.csv", "a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([name, "(0, 0, 48, 48)", *votes])
    return root


def build_ferplus_csv(root):
    """FERPlus as fer2013.csv and fer2013new.csv."""
    root.mkdir(parents=True, exist_ok=True)
    pixel_lines, vote_lines = ["emotion,pixels,Usage\n"], [f"Usage,Image name,{FERPLUS_COLUMNS}\n"]
    for part, name, votes, pixels in ferplus_rows():
        pixel_lines.append(f"0,{' '.join(map(str, pixels.flatten()))},{FERPLUS_USAGE[part]}\n")
        vote_lines.append(f"{FERPLUS_USAGE[part]},{name},{','.join(map(str, votes))}\n")
    (root / "fer2013.csv").write_text("".join(pixel_lines))
    (root / "fer2013new.csv").write_text("".join(vote_lines))
    return root


def build_folder(root, classes=("happy", "sad", "angry"), count=4, size=(20, 20), grey=False):
    """root/<class>/0.png ...: image names repeat from class to class, images do not."""
    for c, name in enumerate(classes):
        for i in range(count):
            save(picture([c, i, len(name)], *size, grey), root / name / f"{i}.png")
    return root


def build_folder_splits(root, classes=("happy", "sad", "angry"), count=4, **options):
    build_folder(root / "train", classes, count, **options)
    build_folder(root / "test", classes, 2, **options)
    return root


AFFECTNET_COLUMNS = (
    "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
)


def affectnet_rows(count, first=0):
    """(name, expression, valence, arousal) of `count` images: eight expressions in turn; none, uncertain, no face."""
    rows = [
        (f"{i % 3}/{first + i}.jpg", i % 8, round(-0.9 + 0.01 * i, 2), round(0.9 - 0.02 * i, 2)) for i in range(count)
    ]
    return rows + [(f"0/{first + count + e}.jpg", e, -2, -2) for e in (8, 9, 10)]


def affectnet_picture(name):
    """A dark photograph, 60 x 50, with a bright face of its own grey in the box (10, 5, 42, 37)."""
    image = Image.new("RGB", (60, 50), (10, 10, 10))
    image.paste((100 + int(Path(name).stem) % 150,) * 3, (10, 5, 42, 37))
    return image


def build_affectnet(root, aligned=False, header=True):
    """AffectNet's release with csv files: manual, automatic, validation lists; aligned: square crops."""
    for table, folder, rows in (
        ("training.csv", "Manually_Annotated", affectnet_rows(24)),
        ("validation.csv", "Manually_Annotated", affectnet_rows(8, 100)),
        ("automatically_annotated.csv", "Automatically_Annotated", affectnet_rows(16, 200)),
    ):
        lines = [AFFECTNET_COLUMNS] * (header or table != "validation.csv")
        for name, expression, valence, arousal in rows:
            image = affectnet_picture(name)
            save(image.crop((10, 5, 42, 37)) if aligned else image, root / f"{folder}_Images" / name, quality=95)
            lines.append(f"{name},10,5,32,32,{';'.join(['1.5'] * 136)},{expression},{valence},{arousal}")
        (root / table).write_text("\n".join(lines) + "\n")
    return root


def build_affectnet_npy(root):
    """AffectNet's release with npy files, some of them strings."""
    for split, rows in (("train_set", affectnet_rows(24)), ("val_set", affectnet_rows(8, 100))):
        for number, (name, expression, valence, arousal) in enumerate(rows):
            save(affectnet_picture(name).crop((10, 5, 42, 37)), root / split / "images" / f"{number}.jpg", quality=95)
            for key, value in (("exp", expression), ("val", valence), ("aro", arousal), ("lnd", 0.0)):
                path = root / split / "annotations" / f"{number}_{key}.npy"
                path.parent.mkdir(exist_ok=True)
                np.save(path, np.array(str(value)) if number % 2 else np.array(value))
    return root


def build_cifar10(root, per_batch=20):
    """CIFAR-10's python version: five training batches and a test batch of two images of each class."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for b, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = np.random.default_rng(b).integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(per_batch)]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return root


BUILDERS = {
    "raf": build_raf,
    "raf lists": lambda root: build_raf(root, separate=True),
    "kaggle": build_raf_kaggle,
    "kaggle folders": lambda root: build_raf_kaggle(root, tables=False),
    "ferplus": build_ferplus,
    "ferplus csv": build_ferplus_csv,
    "affectnet": build_affectnet,
    "affectnet aligned": lambda root: build_affectnet(root, aligned=True, header=False),
    "affectnet npy": build_affectnet_npy,
    "cifar10": build_cifar10,
    "folder": build_folder,
    "folder splits": build_folder_splits,
}


@pytest.fixture
def arguments(tmp_path):
    """arguments("raf", root, "--noise", "0.2") -> the namespace that load_data takes, with its own cache."""

    def make(data, root=None, *more):
        root = ["--root", str(root)] if root is not None else []
        return cocuring.parse_args(["--data", data, *root, "--cache", str(tmp_path / "cache"), *more])

    return make


@pytest.fixture
def raf(tmp_path):
    return build_raf(tmp_path / "raf")


@pytest.fixture
def few_toys(monkeypatch):
    """Toy splits of 70, 30 and 30 faces."""
    for split, count in (("train", 70), ("valid", 30), ("test", 30)):
        monkeypatch.setitem(toyfaces.SPLITS, split, count)


class Tiny(torch.nn.Sequential):
    """A backbone of a few hundred weights, with a last layer named as in torchvision."""

    def __init__(self):
        conv = torch.nn.Conv2d(3, 8, 3, stride=4, bias=False)  # Adam would follow the rounding errors of a bias
        super().__init__(
            OrderedDict(
                conv=conv,
                bn=torch.nn.BatchNorm2d(8),
                relu=torch.nn.ReLU(),
                pool=torch.nn.AdaptiveAvgPool2d(2),
                flat=torch.nn.Flatten(),
                fc=torch.nn.Linear(32, 1000),
            )
        )


@pytest.fixture
def tiny(monkeypatch):
    """48 toy faces, 16 test faces, a small backbone and arguments for a run of a second."""
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 48, "valid": 16, "test": 16})
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    return ["--noise", "0.4", "--size", "32", "--batch-size", "12", "--epochs", "3", "--precision", "fp32"]


def lines(folder):
    """The lines of metrics.jsonl, times aside."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def same_end(a, b):
    """Two finished runs left the same numbers, labels and weights."""
    assert lines(a) == lines(b)
    assert (a / "labels.csv").read_text() == (b / "labels.csv").read_text()
    first, second = (
        torch.load(a / "model.pt", weights_only=True)["networks"],
        torch.load(b / "model.pt", weights_only=True)["networks"],
    )
    assert all(torch.equal(x[key], y[key]) for x, y in zip(first, second) for key in x)


def check_resume(main, arguments, folder, monkeypatch):
    """A run that stops after its second epoch and is resumed ends as one that was never stopped."""
    arguments, end_epoch = [*arguments, "--out", str(folder)], runs.Run.end_epoch

    def end_and_stop(self, epoch, *rest):
        end_epoch(self, epoch, *rest)
        if epoch == 2:
            raise KeyboardInterrupt

    assert main([*arguments, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "end_epoch", end_and_stop)
        assert main([*arguments, "--name", "cut"]) == 130
    assert main([*arguments, "--name", "cut", "--resume"]) == 0
    same_end(folder / "whole", folder / "cut")
