"""The data sets: lists of images and labels, label noise, label files, decoding and its cache.

Letters in shapes: N samples, C channels, H and W pixels.
"""

import csv
import hashlib
import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from support import toyfaces

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from common import UserError, generator_of, write_atomically

# ----------------------------------------------------------------------------------------------------------------------
# Data sets: lists of images
# ----------------------------------------------------------------------------------------------------------------------

CANONICAL = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral", "contempt")
SYNONYMS = {
    "surprised": "surprise",
    "fearful": "fear",
    "afraid": "fear",
    "disgusted": "disgust",
    "happy": "happiness",
    "joy": "happiness",
    "sad": "sadness",
    "angry": "anger",
    "neutrality": "neutral",
    "contemptuous": "contempt",
}
RAF_CLASSES = CANONICAL[:7]  # labels 1..7 in its files
FERPLUS_CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
AFFECTNET_CLASSES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
ALIGNED_SAMPLE = 20  # AffectNet: images that are looked at to tell whether all are cropped already
ORIGIN = {
    "raf": "RAF-DB comes from its authors, www.whdeng.cn/RAF/model1.html",
    "ferplus": "the images come from FER2013 (Kaggle), the votes from github.com/microsoft/FERPlus",
    "affectnet": "AffectNet comes from its authors, mohammadmahoor.com/affectnet, on request",
    "cifar10": "CIFAR-10's python version comes from www.cs.toronto.edu/~kriz/cifar.html; unpack cifar-10-batches-py there",
    "folder": "a folder has root/train/<class>/* and root/test/<class>/*, or root/<class>/*",
}


@dataclass
class Split:
    """One split of a data set, decoded."""

    images: Tensor  # uint8 (N, C, H, W), C = 1 or 3, decoded once, kept in memory (memory-mapped when large)
    labels: Tensor  # int64 (N,), the labels to train on: noisy if noise was injected
    clean: Tensor | None  # int64 (N,), the data set's own labels, when others are trained on; for reporting only
    va: Tensor | None  # float32 (N, 2), valence and arousal in [-1, 1]
    names: list[str]  # file names, as the data set's own label file spells them; paths relative to the root for folders
    classes: tuple[str, ...]  # canonical lower-case names, in the data set's own order


@dataclass
class Index:
    """A split before decoding: what there is, and where. A source is a path, a Crop, (path, text of pixels), (toy) a number or (CIFAR-10) an array."""

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    sources: list = field(default_factory=list)
    va: np.ndarray | None = None  # float32 (N, 2)

    def take(self, rows) -> "Index":
        names, labels, sources = ([column[i] for i in rows] for column in (self.names, self.labels, self.sources))
        return Index(names, labels, self.classes, sources, None if self.va is None else self.va[rows])


@dataclass(frozen=True)
class Crop:
    """A part of an image file: box is left, upper, right, lower, in pixels."""

    path: Path
    box: tuple[int, int, int, int]


def canonical(name: str) -> str:
    """The canonical name of an expression ("Happy" -> "happiness"); other names in lower case."""
    return SYNONYMS.get(name.strip().lower(), name.strip().lower())


def not_found(data: str, root, missing) -> UserError:
    return UserError(
        f"--data {data}: looked in {root}, where {missing} is missing; {ORIGIN[data.removesuffix('-auto')]}; --data toy needs no files"
    )


def label_base(values, num_classes: int, where) -> int:
    """Whether integer labels count from 0 or from 1: found from the smallest and the largest, never guessed."""
    low, high = min(values), max(values)
    if low == 0 and high <= num_classes - 1:
        return 0
    if low >= 1 and high == num_classes:
        return 1
    if low < 0 or high > num_classes or (low == 0 and high == num_classes):
        raise UserError(f"{where}: labels from {low} to {high} are outside the {num_classes} classes")
    raise UserError(
        f"{where}: labels from {low} to {high} may count from 0 or from 1, neither 0 nor {num_classes} occurs; write class names instead"
    )


def read_rows(path) -> tuple[list[tuple[int, str, str]], bool]:
    """(line number, name, label) of each line of a list, and whether the list has a header, as a csv of names does.

    Without a header a line ends in a blank and a number, or is divided by a comma, or by its last blank.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    header = bool(lines) and lines[0][1].lower() in ("name,label", "image,label")
    rows = []
    for line_number, line in lines[header:]:
        blank = not header and (re.search(r"[^\s,]\s+-?\d+$", line) or "," not in line)
        fields = line.rsplit(None, 1) if blank else next(csv.reader([line]))
        if len(fields) != 2 or not fields[0].strip() or not fields[1].strip():
            raise UserError(f"{path}, line {line_number}: {line!r} is not a name and a label")
        rows.append((line_number, fields[0].strip(), fields[1].strip()))
    return rows, header


def read_text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file") from None


def as_int(text: str, path, line_number: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{path}, line {line_number}: {text!r} is not a whole number") from None


def numbered_labels(rows, path, num_classes: int) -> list[int]:
    """0-based labels of the rows of `read_rows`; refuses a line outside 0..num_classes and a list whose base is unclear."""
    values = []
    for line_number, _, text in rows:
        values.append(as_int(text, path, line_number))
        if not 0 <= values[-1] <= num_classes:
            raise UserError(f"{path}, line {line_number}: label {text} is outside the {num_classes} classes")
    base = label_base(values, num_classes, path)
    return [value - base for value in values]


def read_raf(root: Path, split: str) -> Index:
    """RAF-DB basic: the official layout (also with one list per split), or the Kaggle one. See docs/data.md."""
    if root.name != "basic" and (root / "basic").is_dir():
        root = root / "basic"
    folder = root / "EmoLabel" if (root / "EmoLabel").is_dir() else root
    lists = [
        folder / n
        for n in ("list_patition_label.txt", "list_partition_label.txt", f"{split}_label.txt")
        if (folder / n).is_file()
    ]
    kaggle = root / "DATASET" if (root / "DATASET").is_dir() else root
    if lists:
        rows, _ = read_rows(lists[0])
        labels = numbered_labels(rows, lists[0], 7) if rows else []
        aligned = root / "Image" / "aligned"
        if not aligned.is_dir():
            raise not_found("raf", root, "Image/aligned")
        kept = [(name, label) for (_, name, _), label in zip(rows, labels) if Path(name).name.startswith(split)]
        sources = []
        for name, _ in kept:
            path = aligned / (Path(name).stem.removesuffix("_aligned") + "_aligned" + Path(name).suffix)
            sources.append(path if path.is_file() or not (aligned / name).is_file() else aligned / name)
        index = Index([n for n, _ in kept], [l for _, l in kept], RAF_CLASSES, sources)
    elif (kaggle / split).is_dir():
        table = next(
            (p for p in (root / f"{split}_labels.csv", kaggle.parent / f"{split}_labels.csv") if p.is_file()), None
        )
        if table:
            rows, _ = read_rows(table)
            labels = numbered_labels(rows, table, 7) if rows else []
            index = Index(
                [n for _, n, _ in rows],
                labels,
                RAF_CLASSES,
                [kaggle / split / str(l + 1) / n for (_, n, _), l in zip(rows, labels)],
            )
        else:
            paths = [p for p in sorted((kaggle / split).glob("*/*")) if p.suffix.lower() in IMAGE_SUFFIXES]
            strange = [p.parent for p in paths if not p.parent.name.isdecimal()]
            if strange:
                raise UserError(f"--data raf: {strange[0]} is not named by a label, 1 to 7")
            base = label_base([int(p.parent.name) for p in paths], 7, kaggle / split) if paths else 1
            index = Index([p.name for p in paths], [int(p.parent.name) - base for p in paths], RAF_CLASSES, paths)
    else:
        raise not_found(
            "raf", root, "EmoLabel/list_patition_label.txt (official layout) and DATASET/train (Kaggle layout)"
        )
    return index


def majority(votes: np.ndarray) -> np.ndarray:
    """FERPlus majority rule: votes (N, 10) -> class 0..7 of each image, or -1 where it is dropped.

    Counts of one are dropped; the winner needs more than half of what remains, unknown and not-a-face counted in;
    images won by unknown or not-a-face are dropped. (The rule of its authors' code; E. Barsoum et al., ICMI 2016.)
    """
    votes = np.where(votes == 1, 0, votes)
    winner = votes.argmax(1)
    wins = (votes.max(1) * 2 > votes.sum(1)) & (winner < 8)
    return np.where(wins, winner, -1)


def ferplus_votes(root: Path, split: str) -> tuple[list[str], np.ndarray, list, Path]:
    """Names, votes (N, 10), images and the file of the votes of all images of a split, with a majority or without.

    The votes: neutral, happiness, surprise, sadness, anger, disgust, fear, contempt, unknown, not a face.
    """
    folder = root / {"train": "FER2013Train", "valid": "FER2013Valid", "test": "FER2013Test"}[split]
    if folder.is_dir():
        table = folder / "label.csv"
        if not table.is_file():
            raise not_found("ferplus", root, f"{folder.name}/label.csv")
        rows = [(n, row[0], row[2:]) for n, row in csv_rows(table, 12)]
        sources = [folder / name for _, name, _ in rows]
    elif (root / "fer2013.csv").is_file() and (root / "fer2013new.csv").is_file():
        table, usage = (
            root / "fer2013new.csv",
            {"train": "Training", "valid": "PublicTest", "test": "PrivateTest"}[split],
        )
        pixels = csv_rows(root / "fer2013.csv", 3)
        rows, sources = [], []
        votes = csv_rows(table, 12)
        if len(pixels) != len(votes):
            raise UserError(f"{table} has {len(votes)} lines and fer2013.csv has {len(pixels)}: they must be in step")
        for (n, row), (pixel_line, pixel_row) in zip(votes[1:], pixels[1:]):
            if pixel_row[2].strip() != row[0].strip():
                raise UserError(
                    f"{table}, line {n}: usage {row[0]!r} but {pixel_row[2]!r} in fer2013.csv, line {pixel_line}"
                )
            if row[0].strip() == usage and row[1]:  # lines without an image name have no votes
                rows.append((n, row[1], row[2:]))
                sources.append((f"{root / 'fer2013.csv'}, line {pixel_line}", pixel_row[1]))
    else:
        raise not_found("ferplus", root, f"{folder.name}/label.csv (or fer2013.csv with fer2013new.csv)")
    counts = np.array([[as_int(v, table, n) for v in row] for n, _, row in rows]).reshape(-1, 10)
    if (counts < 0).any():
        raise UserError(f"{table}, line {rows[int((counts < 0).any(1).argmax())][0]}: a count of votes is negative")
    return [name for _, name, _ in rows], counts, sources, table


def read_ferplus(root: Path, split: str) -> Index:
    """FERPlus: folders FER2013{Train,Valid,Test} with label.csv, or fer2013.csv with fer2013new.csv."""
    names, votes, sources, table = ferplus_votes(root, split)
    labels = majority(votes)
    kept = np.flatnonzero(labels >= 0).tolist()
    print(f"FERPlus {split}: {len(kept):,} of {len(names):,} images have a majority in {table.name}")
    return Index([names[i] for i in kept], labels[kept].tolist(), FERPLUS_CLASSES, [sources[i] for i in kept])


def csv_rows(path, columns: int) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line of a csv file; refuses a line without exactly `columns` fields."""
    rows = []
    reader = csv.reader(read_text(path).splitlines())
    for row in reader:
        if row and len(row) != columns:
            raise UserError(f"{path}, line {reader.line_num}: {len(row)} fields, expected {columns}")
        if row:
            rows.append((reader.line_num, row))
    return rows


def read_folder(root: Path, split: str) -> Index:
    """root/{train,test}/<class>/*, or root/<class>/* with a fixed fifth of each class, by a hash of the name, as test set."""
    if not root.is_dir():
        raise not_found("folder", root, "the folder itself")
    split_folders = (root / "train").is_dir()
    if split_folders and not (root / "test").is_dir():
        raise UserError(f"--data folder: {root} has a folder train but none named test; {ORIGIN['folder']}")
    top = root / "train" if split_folders else root
    found = sorted(p.name for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = tuple(canonical(name) for name in found)
    if len(set(classes)) < 2:
        raise UserError(
            f"--data folder: {top} has {len(set(classes))} class folders, at least two are needed; {ORIGIN['folder']}"
        )
    if len(set(classes)) < len(classes):
        raise UserError(f"--data folder: {top} has two folders of one class among {', '.join(found)}")
    if split_folders:
        top = root / split
        for path in sorted(top.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and canonical(path.name) not in classes:
                raise UserError(
                    f"--data folder: {path} is not among the classes of {root / 'train'}: {', '.join(found)}"
                )
    index = Index([], [], classes)
    for folder in sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith(".")):
        paths = [p.relative_to(root) for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
        names = [p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts)]
        if not split_folders:
            tests = set(sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())[: round(len(names) / 5)])
            names = [n for n in names if (n in tests) == (split == "test")]
        index.names += names
        index.labels += [classes.index(canonical(folder.name))] * len(names)
    index.sources = [root / name for name in index.names]
    return index


def read_affectnet(root: Path, split: str, automatic: bool = False) -> Index:
    """AffectNet: the release with csv files, or the one with npy files (which has no automatic subset). See docs/data.md.

    None, uncertain and no-face are dropped, and images whose valence or arousal is invalid (-2).
    """
    data = "affectnet-auto" if automatic else "affectnet"
    tables = {
        "train": ["automatically_annotated.csv"] if automatic else ["training.csv"],
        "test": ["validation.csv", "validate.csv"],
    }[split]
    folders = [
        p
        for p in (root, root / "Manually_Annotated_file_lists", root / "Automatically_annotated_file_list")
        if p.is_dir()
    ]
    table = next((folder / name for folder in folders for name in tables if (folder / name).is_file()), None)
    annotations = root / {"train": "train_set", "test": "val_set"}[split] / "annotations"
    if table:
        names, sources, rows = read_affectnet_csv(root, table, data, automatic and split == "train")
    elif annotations.is_dir() and not (automatic and split == "train"):
        names, sources, rows = read_affectnet_npy(annotations)
    else:
        raise not_found(
            data,
            root,
            f"{' or '.join(tables)} (csv release)"
            + ("" if automatic else f" and {annotations.relative_to(root)} (npy release)"),
        )
    expression, va = rows[:, 0].astype(int), rows[:, 1:]
    kept = np.flatnonzero((expression < 8) & (np.abs(va) <= 1).all(1))
    print(
        f"AffectNet {split}: {len(kept):,} of {len(names):,} images have one of eight expressions and a valid valence and arousal"
    )
    index = Index(names, expression.tolist(), AFFECTNET_CLASSES, sources, va.astype(np.float32))
    return index.take(kept.tolist())


def read_affectnet_csv(root: Path, table: Path, data: str, automatic: bool) -> tuple[list[str], list, np.ndarray]:
    """Names, sources and (expression, valence, arousal), float64 (N, 3), of a list of the csv release.

    The images are cropped to the list's face boxes, unless the first ones all have one square size: then they are aligned.
    """
    columns = [
        "subDirectory_filePath",
        "face_x",
        "face_y",
        "face_width",
        "face_height",
        "facial_landmarks",
        "expression",
        "valence",
        "arousal",
    ]
    found, what = csv_rows(table, len(columns)), "Automatically_Annotated" if automatic else "Manually_Annotated"
    if found and found[0][1][0] == columns[0]:
        columns = found.pop(0)[1]
    place = {name: k for k, name in enumerate(columns)}
    choices = [root / f"{what}_Images", root / what / f"{what}_Images", root / what]
    folder = next((p for p in choices if p.is_dir()), None)
    if folder is None:
        raise not_found(data, root, f"{what}_Images")
    names, boxes, rows = [], [], []
    for line_number, row in found:
        try:
            x, y, w, h = (round(float(row[place[f"face_{key}"]])) for key in ("x", "y", "width", "height"))
            values = [float(row[place[key]]) for key in ("expression", "valence", "arousal")]
        except (ValueError, KeyError):
            raise UserError(
                f"{table}, line {line_number}: face box, expression, valence and arousal must be numbers"
            ) from None
        if values[0] not in range(11):
            raise UserError(f"{table}, line {line_number}: expression {row[place['expression']]} is outside 0 to 10")
        names.append(row[place["subDirectory_filePath"]])
        boxes.append((x, y, x + w, y + h))
        rows.append(values)
    rows = np.array(rows).reshape(-1, 3)
    paths = [folder / name for name in names]
    sizes = set()
    for i in np.flatnonzero(rows[:, 0] < 8)[:ALIGNED_SAMPLE]:
        with open_image(paths[i]) as image:
            sizes.add(image.size)
    aligned = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1
    print(
        f"{table.name}: the images are "
        + ("aligned already (one square size), not cropped" if aligned else "cropped to the face boxes")
    )
    return names, paths if aligned else [Crop(path, box) for path, box in zip(paths, boxes)], rows


def read_affectnet_npy(annotations: Path) -> tuple[list[str], list, np.ndarray]:
    """Names, sources and (expression, valence, arousal), float64 (N, 3), of a split of the npy release."""
    numbers = sorted(
        (p.name.removesuffix("_exp.npy") for p in annotations.glob("*_exp.npy")), key=lambda n: (len(n), n)
    )

    def read(number):
        values = []
        for key in ("exp", "val", "aro"):
            path = annotations / f"{number}_{key}.npy"
            try:
                values.append(float(np.load(path).item()))  # numbers, or strings of them
            except (OSError, ValueError, EOFError):
                raise UserError(f"{path}: is missing or does not hold a number") from None
        if values[0] not in range(11):
            raise UserError(f"{annotations / number}_exp.npy: expression {values[0]:g} is outside 0 to 10")
        return values

    rows = list(in_threads(read, numbers, f"reading {annotations}"))
    images, split = annotations.parent / "images", annotations.parent.name
    return (
        [f"{split}/images/{n}.jpg" for n in numbers],
        [images / f"{n}.jpg" for n in numbers],
        np.array(rows).reshape(-1, 3),
    )


def read_cifar10(root: Path, split: str) -> Index:
    """CIFAR-10 in its python version, root/cifar-10-batches-py, by torchvision; the source of an image is its array."""
    from torchvision.datasets import CIFAR10

    class Unpacked(CIFAR10):  # without its checksums, which a re-packed copy or a subset fails
        train_list, test_list = (
            [[name, None] for name, _ in CIFAR10.train_list],
            [[name, None] for name, _ in CIFAR10.test_list],
        )
        meta = CIFAR10.meta | {"md5": None}

    try:
        data = Unpacked(str(root), train=split == "train")
    except (RuntimeError, OSError):
        raise not_found("cifar10", root, "cifar-10-batches-py, or a file of it,") from None
    except (EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"--data cifar10: the files in {root / 'cifar-10-batches-py'} are damaged ({error})") from None
    return Index(
        [f"{split}_{i:05d}" for i in range(len(data.targets))], list(data.targets), tuple(data.classes), list(data.data)
    )


def read_toy(difficulty: float, split: str) -> Index:
    """The faces that toyfaces.py draws; the source of a face is its number."""
    numbers = range(toyfaces.SPLITS[split])
    labels, va, *_ = zip(*(toyfaces.expression(split, i, difficulty=difficulty) for i in numbers))
    return Index([f"{split}_{i:05d}.png" for i in numbers], list(labels), toyfaces.CLASSES, list(numbers), np.stack(va))


def read_index(args, split: str) -> Index:
    """The list of split "train", or of the one that is evaluated ("test", "valid"), with --classes applied, before --limit."""
    root = Path(args.root)
    if args.data == "toy":
        index = read_toy(args.difficulty, split)
    elif args.data == "ferplus":
        index = read_ferplus(root, split)
    else:  # no validation split of its own: a fixed stratified tenth of the training set
        read = {
            "raf": read_raf,
            "affectnet": read_affectnet,
            "affectnet-auto": partial(read_affectnet, automatic=True),
            "cifar10": read_cifar10,
            "folder": read_folder,
        }[args.data]
        index = read(root, "train" if split == "valid" else split)
        if split == "valid" or (split == "train" and args.split == "valid"):
            tenth = stratified(index.labels, len(index.labels) // 10, generator_of("valid"))
            index = index.take(tenth if split == "valid" else sorted(set(range(len(index.labels))) - set(tenth)))
    if args.classes:
        index = keep_classes(index, args)
    if not index.names:
        raise UserError(f"--data {args.data}: {root} has no {split} images")
    if split == "train" and len(set(index.labels)) < 2:
        raise UserError(f"--data {args.data}: the training images of {root} have fewer than two classes")
    return index


def keep_classes(index: Index, args) -> Index:
    strange = [c for c in index.classes if c not in CANONICAL]
    if strange:
        raise UserError(f"--classes {args.classes} needs expression classes, and {strange[0]!r} is none")
    classes = tuple(c for c in index.classes if c != "contempt" or args.classes == 8)
    if len(classes) != args.classes:
        raise UserError(
            f"--classes {args.classes}: --data {args.data} has {len(index.classes)}: {', '.join(index.classes)}"
        )
    index = index.take([i for i, label in enumerate(index.labels) if index.classes[label] in classes])
    index.labels = [classes.index(index.classes[label]) for label in index.labels]
    index.classes = classes
    return index


def stratified(labels: list[int], count: int, generator) -> list[int]:
    """Sorted positions of `count` samples, drawn from each class in proportion (largest remainders)."""
    labels = torch.tensor(labels)
    sizes = torch.bincount(labels)
    exact = sizes * count / len(labels)
    quota = exact.long()
    for c in (exact - quota).argsort(descending=True, stable=True)[: count - int(quota.sum())]:
        quota[c] += 1
    chosen = []
    for c, take in enumerate(quota.tolist()):
        members = (labels == c).nonzero().flatten()
        chosen += members[torch.randperm(len(members), generator=generator)[:take]].tolist()
    return sorted(chosen)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets: decoding
# ----------------------------------------------------------------------------------------------------------------------

IN_MEMORY = 2**30  # bytes; a larger cache is memory-mapped


def open_image(source):
    """A PIL image of a source: a path, a Crop, or (where, "70 80 82 ...") as in fer2013.csv."""
    if isinstance(source, Crop):
        whole = open_image(source.path)
        left, upper, right, lower = source.box
        box = max(0, left), max(0, upper), min(whole.width, right), min(whole.height, lower)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UserError(
                f"{source.path}: the face box {source.box} lies outside the image, {whole.width} x {whole.height}"
            )
        try:
            return whole.crop(box)
        except (OSError, SyntaxError) as error:
            raise UserError(f"{source.path}: the image is truncated or damaged ({error})") from None
    if isinstance(source, tuple):
        where, text = source
        try:
            return Image.fromarray(np.array(text.split(), dtype=np.uint8).reshape(48, 48))
        except (ValueError, OverflowError):
            raise UserError(f"{where}: is not 48 x 48 grey values") from None
    try:
        return Image.open(source)
    except FileNotFoundError:
        raise UserError(f"{source}: the image is missing") from None
    except (OSError, Image.DecompressionBombError):
        raise UserError(f"{source}: is not an image that can be read") from None


def decode(source, size: tuple[int, int], grey: bool) -> np.ndarray:
    """uint8 (C, H, W) of a source, turned upright by its EXIF tag, resized to (width, height) `size`, not cropped."""
    image = open_image(source)
    try:
        if image.mode.startswith("I"):  # 16 bits: Pillow would clip them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
    except (OSError, SyntaxError) as error:
        raise UserError(f"{source}: the image is truncated or damaged ({error})") from None
    if image.size != size:
        image = image.resize(size, Image.BILINEAR)  # Pillow's filter widens when it shrinks: no aliasing
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def decode_all(index: Index, args, split: str) -> Tensor:
    """uint8 (N, C, H, W) of all images: from the cache if its inputs are unchanged, else decoded and cached.

    Images that all have one square size of at most --size stay native (the device enlarges them); others become --size.
    """
    if args.data == "toy":
        faces = [toyfaces.draw_face(split, i, size=args.size, difficulty=args.difficulty)[0] for i in index.sources]
        return torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2).contiguous()
    if args.data == "cifar10":
        return torch.from_numpy(np.stack(index.sources)).permute(0, 3, 1, 2).contiguous()

    stamp = hashlib.sha256()  # of the files, not of the labels
    for name, source in zip(index.names, index.sources):
        try:
            path = source.path if isinstance(source, Crop) else source
            stat = os.stat(path) if isinstance(path, Path) else None
        except OSError:
            raise UserError(f"{path}: the image is missing") from None
        rest = source.box if isinstance(source, Crop) else source[1] if stat is None else None
        stamp.update(repr((name, stat and (stat.st_size, stat.st_mtime_ns), rest)).encode())
    place = hashlib.sha256(str(Path(args.root).resolve()).encode()).hexdigest()[:8]
    file = Path(args.cache) / f"{args.data}-{place}-{split}{len(index.names)}-{args.size}px.npy"
    note = file.with_suffix(".json")
    wanted = {"inputs": stamp.hexdigest(), "images": len(index.names), "size": args.size}
    try:
        fresh = json.loads(note.read_text()) == wanted and file.is_file()
    except (OSError, ValueError):
        fresh = False
    if fresh:
        try:
            return load_array(file)
        except (OSError, ValueError, EOFError):
            pass  # damaged: decoded anew
    build_cache(index, args, split, file, note, wanted)
    return load_array(file)


def load_array(file: Path) -> Tensor:
    large = file.stat().st_size > IN_MEMORY
    return torch.from_numpy(np.load(file, mmap_mode="c" if large else None))  # "c": torch wants a writable view


def in_threads(work, items: list, what: str, chunk: int = 1024):
    """Yield work(item) in order, done in threads, at most a chunk ahead (Pillow decodes without holding the interpreter lock)."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc=what, total=len(items), leave=False, disable=None, unit="img") as bar,
    ):
        for start in range(0, len(items), chunk):
            for result in pool.map(work, items[start : start + chunk]):
                yield result
                bar.update()


def build_cache(index: Index, args, split, file: Path, note: Path, wanted: dict) -> None:
    def look(source):
        if isinstance(source, Crop):  # parts of photographs have all sizes and colour
            return None, "RGB"
        with open_image(source) as image:
            return image.size, image.mode

    sizes, modes = map(set, zip(*in_threads(look, index.sources, f"looking at {args.data} {split}")))
    native = next(iter(sizes)) if len(sizes) == 1 and None not in sizes else (0, 1)
    size = native if native[0] == native[1] <= args.size else (args.size, args.size)
    grey = all(mode in ("L", "1", "LA") or mode.startswith("I") for mode in modes)
    file.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)  # so that no old note ever stands beside new images

    def write(path):
        shape = (len(index.sources), 1 if grey else 3, size[1], size[0])
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        for i, pixels in enumerate(
            in_threads(lambda source: decode(source, size, grey), index.sources, f"decoding {args.data} {split}")
        ):
            array[i] = pixels
        array.flush()

    write_atomically(file, write)
    write_atomically(note, lambda path: path.write_text(json.dumps(wanted)))


def load_train_index(args) -> tuple[Index, Tensor, Tensor | None]:
    """The training list after --limit, its labels to train on, int64 (N,), and the clean ones if they are others."""
    index = read_index(args, "train")
    if args.limit and args.limit < len(index.names):
        index = index.take(stratified(index.labels, args.limit, generator_of("limit")))
    elif args.limit and args.limit > len(index.names):
        raise UserError(f"--limit {args.limit}: there are only {len(index.names)} training images")
    own = torch.tensor(index.labels)
    if args.labels:
        return index, read_labels(args.labels, index), own
    if args.noise:
        return index, inject(own, index.classes, args.noise, args.noise_type, args.noise_seed), own
    return index, own, None


def load_data(args) -> tuple[Split, Split]:
    """The training split, with --limit and then --labels or --noise applied, and the split that is evaluated.

    args: a namespace with the options of `add_data_args`. Raises UserError for data that are missing, damaged or odd.
    """
    index, labels, clean = load_train_index(args)
    test = read_index(args, args.split)
    if test.classes != index.classes:
        raise UserError(f"the classes of the training and the {args.split} images differ")
    va = [None if i.va is None else torch.from_numpy(i.va) for i in (index, test)]
    train = Split(decode_all(index, args, "train"), labels, clean, va[0], index.names, index.classes)
    test = Split(decode_all(test, args, args.split), torch.tensor(test.labels), None, va[1], test.names, test.classes)
    counts = torch.bincount(labels, minlength=len(index.classes)).tolist()
    print(
        f"{args.data}: {len(train.labels):,} training images ({', '.join(f'{c} {n:,}' for c, n in zip(index.classes, counts))}), "
        f"{len(test.labels):,} {args.split} images, {tuple(train.images.shape[1:])}"
    )
    if clean is not None:
        print(
            f"training labels that differ from the data set's own: {(labels != clean).sum().item():,} ({(labels != clean).float().mean():.1%})"
        )
    return train, test


# ----------------------------------------------------------------------------------------------------------------------
# Label noise and label files
# ----------------------------------------------------------------------------------------------------------------------

# "The most confused pairs in RAFDB" (NCCTFER, Sec. 4.3.1), label -> what it is replaced with, in RAF-DB's order.
RAF_CONFUSIONS = {0: 5, 1: 0, 2: 5, 3: 6, 4: 6, 5: 3, 6: 4}


def check_noise(labels: Tensor, rate: float, num_classes: int) -> None:
    if not 0 <= rate < 1:
        raise UserError(f"noise rate {rate} is outside [0, 1)")
    if num_classes < 2:
        raise UserError("label noise needs at least two classes")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UserError(f"labels from {int(labels.min())} to {int(labels.max())} are outside the {num_classes} classes")


def corrupt(labels: Tensor, rate: float, num_classes: int, new_labels, generator) -> Tensor:
    noisy = labels.clone()
    for c in range(num_classes):
        members = (labels == c).nonzero().flatten()
        moved = members[torch.randperm(len(members), generator=generator)[: round(rate * len(members))]]
        noisy[moved] = new_labels(c, len(moved))
    return noisy


def symmetric_noise(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Move exactly round(rate * n_c) labels of each class c to a different class, uniformly.

    labels: int64 (N,), left alone. rate in [0, 1). generator: on the CPU. Returns int64 (N,).
    Raises UserError for a rate, a label or a number of classes out of range.
    """
    check_noise(labels, rate, num_classes)
    return corrupt(
        labels,
        rate,
        num_classes,
        lambda c, n: (c + torch.randint(1, num_classes, (n,), generator=generator)) % num_classes,
        generator,
    )


def asymmetric_noise(labels: Tensor, rate: float, pairs: dict[int, int], generator: torch.Generator) -> Tensor:
    """Move exactly round(rate * n_c) labels of each class c to its confusion partner pairs[c] (NCCTFER, Sec. 4.3.1).

    labels: int64 (N,), left alone; every class that occurs has a pair. rate in [0, 1). Returns int64 (N,).
    Raises UserError for a rate out of range or a class without a partner.
    """
    check_noise(labels, rate, max([*pairs.keys(), *pairs.values(), 1]) + 1)
    lonely = set(labels.unique().tolist()) - set(pairs)
    if lonely or any(c == partner for c, partner in pairs.items()):
        raise UserError(
            f"asymmetric noise: class {min(lonely) if lonely else 'of a pair'} has no partner other than itself"
        )
    return corrupt(labels, rate, max(pairs) + 1, lambda c, n: torch.full((n,), pairs.get(c, c)), generator)


def confusion_pairs(classes: tuple[str, ...]) -> dict[int, int]:
    """RAF_CONFUSIONS by name, as indices into `classes`; contempt goes to neutral (ours)."""
    by_name = {RAF_CLASSES[a]: RAF_CLASSES[b] for a, b in RAF_CONFUSIONS.items()} | {"contempt": "neutral"}
    for name in classes:
        if by_name.get(name) not in classes:
            raise UserError(f"asymmetric noise: class {name!r} has no confusion partner among {', '.join(classes)}")
    return {i: classes.index(by_name[name]) for i, name in enumerate(classes)}


def inject(labels: Tensor, classes: tuple[str, ...], rate: float, kind: str, seed: int) -> Tensor:
    """The noise of --noise RATE --noise-type KIND --noise-seed SEED; inject_noise.py writes the same labels."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "asymmetric":
        return asymmetric_noise(labels, rate, confusion_pairs(classes), generator)
    return symmetric_noise(labels, rate, len(classes), generator)


def name_key(name: str) -> str:
    """What two spellings of one image have in common: no folder, no "_aligned", no suffix."""
    return Path(name.replace("\\", "/")).stem.removesuffix("_aligned")


def read_labels(path, index: Index) -> Tensor:
    """Labels, int64 (N,), of the images of `index` from a noisy label file.

    Read are `name,label` with class names or integers, and "name label" lines with labels from 0 or from 1 (RAF-DB's
    own list and the published files: docs/data.md). Lines of other images are passed over. Raises UserError with the
    line for what is malformed, outside the classes, doubled with another label, or in an unclear numbering.
    """
    rows, header = read_rows(path)
    if not rows:
        raise UserError(f"{path}: no labels in it")
    named = header and all(canonical(text) in index.classes for _, _, text in rows)  # a class may be named by a number
    integers = not named and re.fullmatch(r"-?\d+", rows[0][2]) is not None
    if integers:
        labels = numbered_labels(rows, path, len(index.classes))
    else:
        labels = []
        for line_number, _, text in rows:
            if canonical(text) not in index.classes:
                raise UserError(
                    f"{path}, line {line_number}: label {text!r} is not among the classes {', '.join(index.classes)}"
                )
            labels.append(index.classes.index(canonical(text)))

    key = str if any("/" in name for name in index.names) else name_key  # names in folders are unique only as a whole
    table = {}
    for (line_number, name, _), label in zip(rows, labels):
        if table.setdefault(key(name), label) != label:
            raise UserError(f"{path}, line {line_number}: {name} has another label in an earlier line")
    missing = [name for name in index.names if key(name) not in table]
    if missing:
        raise UserError(
            f"{path}: no label for {len(missing):,} of {len(index.names):,} training images, the first is {missing[0]}"
        )
    labels = torch.tensor([table[key(name)] for name in index.names])
    if integers and index.classes == RAF_CLASSES:
        check_order(labels, torch.tensor(index.labels), path)
    return labels


def read_va(path, index: Index) -> Tensor:
    """Valence and arousal, float32 (N, 2), of the images of `index`: "name valence arousal" a line, or with commas.

    Values outside [-1, 1] are clamped, and counted on the screen. Raises UserError as `read_labels`.
    """
    table, clamped = {}, 0
    key = str if any("/" in name for name in index.names) else name_key
    for line_number, line in enumerate(read_text(path).splitlines(), 1):
        fields = [part.strip() for part in (next(csv.reader([line])) if "," in line else line.rsplit(None, 2))]
        if not line.strip() or (line_number == 1 and [part.lower() for part in fields[1:]] == ["valence", "arousal"]):
            continue
        try:
            name, *values = fields[0], float(fields[1]), float(fields[2])
        except (ValueError, IndexError):
            raise UserError(f"{path}, line {line_number}: {line!r} is not a name, a valence and an arousal") from None
        if len(fields) != 3 or not np.isfinite(values).all():
            raise UserError(f"{path}, line {line_number}: {line!r} is not a name, a valence and an arousal")
        clamped += max(map(abs, values)) > 1
        table[key(name)] = np.clip(values, -1, 1)
    missing = [name for name in index.names if key(name) not in table]
    if missing:
        raise UserError(
            f"{path}: no valence and arousal for {len(missing):,} of {len(index.names):,} training images, the first is {missing[0]}"
        )
    if clamped:
        print(f"{path}: {clamped:,} lines lie outside [-1, 1] and were clamped")
    return torch.tensor(np.array([table[key(name)] for name in index.names]), dtype=torch.float32)


def check_order(labels: Tensor, own: Tensor, path) -> None:
    """Refuse RAF-DB labels that are numbered in AffectNet's order: read so, they agree better with the data set's own."""
    to_raf = torch.tensor([RAF_CLASSES.index(name) for name in AFFECTNET_CLASSES[:7]])
    if (to_raf[labels] == own).sum() > (labels == own).sum():
        raise UserError(
            f"{path}: the labels look numbered in AffectNet's order (neutral, happy, sad, ...), not RAF-DB's; write class names instead"
        )


def write_labels(path, names: list[str], labels: Tensor, classes: tuple[str, ...], style: str = "csv") -> None:
    """Write a noisy label file: "csv", `name,label` with class names, or "list", RAF-DB's "name label" counted from 1."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            if style == "list":
                file.writelines(f"{name} {label + 1}\n" for name, label in zip(names, labels.tolist()))
            else:
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(("name", "label"))
                rows.writerows((name, classes[label]) for name, label in zip(names, labels.tolist()))

    write_atomically(path, write)


def write_va(path, names: list[str], va: Tensor) -> None:
    """Write valence and arousal, (N, 2), as `read_va` reads them."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("name", "valence", "arousal"))
            rows.writerows(
                (name, f"{valence:.6f}", f"{arousal:.6f}") for name, (valence, arousal) in zip(names, va.tolist())
            )

    write_atomically(path, write)
