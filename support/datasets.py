"""The data sets: lists of images and labels, label noise and label files. Files are opened in support/decoding.py.

Letters in shapes: N samples, C channels, H and W pixels.
"""

import csv
import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

from support import toyfaces
from support.decoding import (
    IMAGE_SUFFIXES,
    Crop,
    as_float,
    as_int,
    check_names,
    csv_rows,
    decode_all,
    in_threads,
    label_base,
    list_folder,
    list_images,
    numbered,
    once,
    read_npy,
    read_pickle,
    read_rows,
    reading,
    size_and_mode,
    text_lines,
)

import numpy as np
import torch
from torch import Tensor

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
RAF_SIZES = {  # images of each class, in the order of RAF_CLASSES
    "train": (1290, 281, 717, 4772, 1982, 705, 2524),
    "test": (329, 74, 160, 1185, 478, 162, 680),
}
FERPLUS_CLASSES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt")
FERPLUS_HEADER = ["Usage", "Image name", *FERPLUS_CLASSES, "unknown", "NF"]  # NF: not a face
# Names that its authors' fer2013new.csv gives to two images each.
FERPLUS_TWICE = ("fer0006953.png", "fer0008403.png", "fer0011785.png", "fer0033120.png")
AFFECTNET_CLASSES = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
AFFECTNET_BOX = ("face_x", "face_y", "face_width", "face_height")
AFFECTNET_HEADER = ["subDirectory_filePath", *AFFECTNET_BOX, "facial_landmarks", "expression", "valence", "arousal"]
ALIGNED_SAMPLE = 20  # AffectNet: images that are looked at to tell whether all are cropped already
OWN_VALID = ("toy", "ferplus")  # with a validation split of their own; else it is a tenth of the training set
ORIGIN = {
    "raf": "RAF-DB comes from its authors, www.whdeng.cn/RAF/model1.html",
    "ferplus": "the images come from FER2013 (Kaggle), the votes from github.com/microsoft/FERPlus",
    "affectnet": "AffectNet comes from its authors, mohammadmahoor.com/affectnet, on request",
    "cifar10": "its python version comes from www.cs.toronto.edu/~kriz/cifar.html; unpack cifar-10-batches-py there",
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
    """A split before decoding: what there is, and where.

    A source is a path, a Crop, (where, text of pixels), a face's number (toy) or an array (3, H, W) (CIFAR-10).
    """

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    sources: list = field(default_factory=list)
    va: np.ndarray | None = None  # float32 (N, 2)

    def take(self, rows) -> "Index":
        names, labels, sources = ([column[i] for i in rows] for column in (self.names, self.labels, self.sources))
        return Index(names, labels, self.classes, sources, None if self.va is None else self.va[rows])


def canonical(name: str) -> str:
    """The canonical name of an expression ("Happy" -> "happiness"); other names in lower case."""
    return SYNONYMS.get(name.strip().lower(), name.strip().lower())


def not_found(data: str, root, missing) -> UserError:
    origin = ORIGIN[data.removesuffix("-auto")]
    return UserError(
        f"--data {data}: looked in {root}, where {missing} is missing; {origin}; --data toy needs no files"
    )


def read_raf(root: Path, split: str) -> Index:
    """RAF-DB basic, see docs/data.md; UserError where its labels are numbered in the order of another data set."""
    index = read_raf_layout(root, split)
    sizes = tuple(index.labels.count(label) for label in range(len(RAF_CLASSES)))
    if sizes != RAF_SIZES[split] and sorted(sizes) == sorted(RAF_SIZES[split]):
        order = [RAF_CLASSES[RAF_SIZES[split].index(size)] for size in sizes]
        raise UserError(f"--data raf: by their sizes the classes of {root} are {', '.join(order)}: number them in the "
                        f"order {', '.join(RAF_CLASSES)}")
    return index


def read_raf_layout(root: Path, split: str) -> Index:
    """The official layout (also with one list per split), or the Kaggle one."""
    if root.name != "basic" and (root / "basic").is_dir():
        root = root / "basic"
    folder = root / "EmoLabel" if (root / "EmoLabel").is_dir() else root
    kaggle = root / "DATASET" if (root / "DATASET").is_dir() else root
    for name in ("list_patition_label.txt", "list_partition_label.txt", f"{split}_label.txt"):
        if (folder / name).is_file():
            return read_raf_list(root, folder / name, split)
    if not (kaggle / split).is_dir():
        wanted = "EmoLabel/list_patition_label.txt (official layout) and DATASET/train (Kaggle layout)"
        raise not_found("raf", root, wanted)
    for table in (root / f"{split}_labels.csv", kaggle.parent / f"{split}_labels.csv"):
        if table.is_file():
            rows, base = numbered(read_rows(table)[0], table, 7)
            rows = [(name, number - base) for _, name, number in once(rows, table, name_key)]
            sources = [kaggle / split / str(label + 1) / name for name, label in rows]
            return Index([name for name, _ in rows], [label for _, label in rows], RAF_CLASSES, sources)
    return read_raf_folders(kaggle / split)


def read_raf_list(root: Path, path: Path, split: str) -> Index:
    aligned = root / "Image" / "aligned"
    if not aligned.is_dir():
        raise not_found("raf", root, "Image/aligned")
    splits = (split,) if path.name.startswith(split) else ("train", "test")
    rows, base = numbered(read_rows(path)[0], path, 7)
    index = Index([], [], RAF_CLASSES)
    for line_number, name, number in once(rows, path, name_key):
        name = name.replace("\\", "/")
        file = Path(name).name
        if not file.startswith(splits):
            raise UserError(f"{path}, line {line_number}: {name} does not begin with {' or '.join(splits)}")
        if file.startswith(split):
            usual = aligned / f"{Path(name).stem.removesuffix('_aligned')}_aligned{Path(name).suffix}"
            index.names.append(name)
            index.labels.append(number - base)
            index.sources.append(usual if usual.is_file() or not (aligned / name).is_file() else aligned / name)
    return index


def read_raf_folders(top: Path) -> Index:
    index, folders, met = Index([], [], RAF_CLASSES), list_folder(top)[0], {}
    for folder, paths in zip(folders, list_images(folders)):
        if paths and not re.fullmatch("[0-9]", folder.name):
            raise UserError(f"--data raf: {folder} is not named by a label, 1 to 7")
        for path in paths:
            if met.setdefault(name_key(path.name), path) is not path:
                raise UserError(f"--data raf: {path} is there as {met[name_key(path.name)]} too")
        index.names += [path.name for path in paths]
        index.labels += [int(folder.name) for _ in paths]
        index.sources += paths
    base = label_base(index.labels, 7, top) if index.labels else 0
    index.labels = [label - base for label in index.labels]
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


def read_votes(texts: list[str], where: str) -> list[int]:
    """Ten whole numbers; UserError if they are not the votes of ten people (nine for one image)."""
    with reading(where, "the votes of ten people"):
        votes = [as_int(text) for text in texts]
        if min(votes) < 0:
            raise ValueError("a count is negative")
        if sum(votes) not in (9, 10):
            raise ValueError(f"the counts add up to {sum(votes)}")
        return votes


def ferplus_votes(root: Path, split: str) -> tuple[list[str], np.ndarray, list, Path]:
    """Names, votes (N, 10), images and the file of the votes of all images of a split, with a majority or without.

    The votes: neutral, happiness, surprise, sadness, anger, disgust, fear, contempt, unknown, not a face.
    """
    folder = root / {"train": "FER2013Train", "valid": "FER2013Valid", "test": "FER2013Test"}[split]
    pair = root / "fer2013new.csv", root / "fer2013.csv"
    paired = all(path.is_file() for path in pair)
    if folder.is_dir() and not (paired and not any(folder.glob("*.png"))):  # its authors publish the votes alone
        table = folder / "label.csv"
        if not table.is_file():
            raise not_found("ferplus", root, f"{folder.name}/label.csv")
        rows = []
        for n, (name, box, *votes) in csv_rows(table, 12):
            if not re.fullmatch(r"\(0, *0, *48, *48\)", box):
                raise UserError(f"{table}, line {n}: {box!r}, where the box of the face is expected, (0, 0, 48, 48)")
            rows.append((n, name, (read_votes(votes, f"{table}, line {n}"), folder / name)))
    elif paired:
        table = pair[0]
        usage = {"train": "Training", "valid": "PublicTest", "test": "PrivateTest"}[split]
        rows = ferplus_table(*pair, usage)
    else:
        raise not_found("ferplus", root, f"{folder.name}/label.csv (or fer2013.csv with fer2013new.csv)")
    rows = once(rows, table)
    votes = np.array([votes for _, _, (votes, _) in rows]).reshape(-1, 10)
    return [name for _, name, _ in rows], votes, [source for _, _, (_, source) in rows], table


def ferplus_table(table: Path, pixels: Path, usage: str) -> list:
    """(line number, name, (votes, (where, pixels))) of the images of a usage: the two files go in step, row by row."""
    rows = []
    votes, images = csv_rows(table, len(FERPLUS_HEADER)), csv_rows(pixels, 3)
    for path, lines, header in ((table, votes, FERPLUS_HEADER), (pixels, images, ["emotion", "pixels", "Usage"])):
        if next(lines, (0, []))[1] != header:
            raise UserError(f"{path}: the first line is not {','.join(header)}")
    for (n, row), (m, image) in zip_longest(votes, images, fillvalue=(0, None)):
        if row is None or image is None:
            raise UserError(f"{table if row is None else pixels}: ends before the other file; they must be in step")
        if row[0] != image[2]:
            raise UserError(f"{table}, line {n}: usage {row[0]!r}, but {image[2]!r} in {pixels.name}, line {m}")
        if row[0] == usage and row[1]:  # rows without an image name have no votes
            name = row[1]
            if name in FERPLUS_TWICE and any(name == earlier for _, earlier, _ in rows):
                name = f"{Path(name).stem}-line{n}{Path(name).suffix}"
            rows.append((n, name, (read_votes(row[2:], f"{table}, line {n}"), (f"{pixels}, line {m}", image[1]))))
    return rows


def read_ferplus(root: Path, split: str) -> Index:
    """FERPlus: folders FER2013{Train,Valid,Test} with label.csv, or fer2013.csv with fer2013new.csv."""
    names, votes, sources, table = ferplus_votes(root, split)
    labels = majority(votes)
    kept = np.flatnonzero(labels >= 0).tolist()
    print(f"FERPlus {split}: {len(kept):,} of {len(names):,} images have a majority in {table.name}")
    return Index([names[i] for i in kept], labels[kept].tolist(), FERPLUS_CLASSES, [sources[i] for i in kept])


def read_folder(root: Path, split: str) -> Index:
    """root/{train,test}/<class>/*, or root/<class>/*, a fixed fifth of each class, by a hash, being the test set."""
    if not root.is_dir():
        raise not_found("folder", root, "the folder itself")
    split_folders = (root / "train").is_dir()
    if split_folders and not (root / "test").is_dir():
        raise UserError(f"--data folder: {root} has a folder train but none named test; {ORIGIN['folder']}")
    if split_folders and (root / "train").samefile(root / "test"):
        raise UserError(f"--data folder: {root / 'train'} and {root / 'test'} are one folder")
    top = root / "train" if split_folders else root
    folders = sorted(list_folder(top)[0], key=lambda folder: canonical(folder.name))
    listing = ", ".join(folder.name for folder in folders)
    classes = tuple(canonical(folder.name) for folder in folders)
    if len(set(classes)) < 2:
        raise UserError(
            f"--data folder: {top} has {len(set(classes))} class folders, at least two are needed; {ORIGIN['folder']}"
        )
    if len(set(classes)) < len(classes):
        raise UserError(f"--data folder: {top} has two folders of one class among {listing}")
    if split_folders and split == "test":
        folders, _ = list_folder(root / "test")
        for folder in folders:
            if canonical(folder.name) not in classes:
                raise UserError(f"--data folder: {folder} is not among the classes of {top}: {listing}")
    index = Index([], [], classes)
    for folder, paths in zip(folders, list_images(folders)):
        names = [path.relative_to(root).as_posix() for path in paths]
        if not names and folder.parent == top:
            raise UserError(f"--data folder: {folder} has no images ({', '.join(IMAGE_SUFFIXES)}): it is no class")
        if not split_folders:
            tests = set(sorted(names, key=fifth_key)[: round(len(names) / 5)])
            names = [name for name in names if (name in tests) == (split == "test")]
        index.names += names
        index.labels += [classes.index(canonical(folder.name))] * len(names)
    index.sources = [root / name for name in index.names]
    return index


def fifth_key(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def read_affectnet(root: Path, split: str, automatic: bool = False) -> Index:
    """AffectNet: the release with csv files, or the one with npy files (without automatic subset). See docs/data.md.

    None, uncertain and no-face are dropped, and images whose valence or arousal is invalid (-2).
    """
    data, automatic = "affectnet-auto" if automatic else "affectnet", automatic and split == "train"
    training = ["automatically_annotated.csv"] if automatic else ["training.csv"]
    tables = training if split == "train" else ["validation.csv", "validate.csv"]
    folders = (root, root / "Manually_Annotated_file_lists", root / "Automatically_annotated_file_list")
    table = next((folder / name for folder in folders for name in tables if (folder / name).is_file()), None)
    annotations = root / {"train": "train_set", "test": "val_set"}[split] / "annotations"
    if table:
        names, sources, rows = read_affectnet_csv(root, table, data, automatic)
    elif annotations.is_dir() and not automatic:
        names, sources, rows = read_affectnet_npy(annotations)
    else:
        missing = f"{' or '.join(tables)} (csv release)"
        if data == "affectnet":
            missing += f" and {annotations.relative_to(root)} (npy release)"
        raise not_found(data, root, missing)
    expression, va = rows[:, 0].astype(int), rows[:, 1:]
    kept = np.flatnonzero((expression < 8) & (np.abs(va) <= 1).all(1))
    what = "images have one of eight expressions and a valid valence and arousal"
    print(f"AffectNet {split}: {len(kept):,} of {len(names):,} {what}")
    index = Index(names, expression.tolist(), AFFECTNET_CLASSES, sources, va.astype(np.float32))
    return index.take(kept.tolist())


def affectnet_rows(path, *columns: str):
    """Yield (line number, name, [numbers]) of a list in AffectNet's columns, with a header or in their usual order."""
    places = None
    for line_number, row in csv_rows(path):
        if places is None:
            header = row if AFFECTNET_HEADER[0] in row else AFFECTNET_HEADER
            missing = [name for name in columns if name not in header]
            if missing or len(row) != len(header):
                raise UserError(f"{path}, line {line_number}: the columns are not those of AffectNet's lists")
            places = [header.index(name) for name in columns]
            name_place = header.index(AFFECTNET_HEADER[0])
            if row is header:
                continue
        with reading(f"{path}, line {line_number}", "a row of AffectNet's lists"):
            numbers = [as_float(row[place]) for place in places]
            if "expression" in columns and numbers[columns.index("expression")] not in range(11):
                raise ValueError(f"expression {row[header.index('expression')]} is outside 0 to 10")
        yield line_number, row[name_place], numbers


def is_affectnet(path) -> bool:
    """Whether a file has AffectNet's columns."""
    _, first = next(csv_rows(path), (0, []))
    return AFFECTNET_HEADER[0] in first or len(first) == len(AFFECTNET_HEADER)


def read_affectnet_csv(root: Path, table: Path, data: str, automatic: bool) -> tuple[list[str], list, np.ndarray]:
    """Names, sources and (expression, valence, arousal), float64 (N, 3), of a list of the csv release.

    The images are cropped to the list's face boxes, unless the first ones all have one square size: they are aligned.
    """
    what = "Automatically_Annotated" if automatic else "Manually_Annotated"
    choices = [root / f"{what}_Images", root / what / f"{what}_Images", root / what]
    folder = next((path for path in choices if path.is_dir()), None)
    if folder is None:
        raise not_found(data, root, f"{what}_Images")
    rows = once(list(affectnet_rows(table, *AFFECTNET_BOX, "expression", "valence", "arousal")), table)
    names = [name for _, name, _ in rows]
    paths = [folder / name for name in names]
    numbers = np.array([numbers for _, _, numbers in rows]).reshape(-1, 7)
    used = np.flatnonzero(numbers[:, 4] < 8)[:ALIGNED_SAMPLE]
    sizes = {size_and_mode(paths[i])[0] for i in used}
    aligned = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1
    done = "aligned already (one square size), not cropped" if aligned else "cropped to the face boxes"
    print(f"{table.name}: the images are {done}")
    if aligned:
        return names, paths, numbers[:, 4:]
    boxes = ((round(x), round(y), round(x) + round(w), round(y) + round(h)) for x, y, w, h in numbers[:, :4].tolist())
    return names, [Crop(path, box) for path, box in zip(paths, boxes)], numbers[:, 4:]


def read_affectnet_npy(annotations: Path) -> tuple[list[str], list, np.ndarray]:
    """Names, sources and (expression, valence, arousal), float64 (N, 3), of a split of the npy release."""
    found = (path.name.removesuffix("_exp.npy") for path in annotations.glob("[!.]*_exp.npy"))
    numbers = sorted(found, key=lambda number: (len(number), number))

    def read(number):
        values = [read_npy(annotations / f"{number}_{key}.npy") for key in ("exp", "val", "aro")]
        if values[0] not in range(11):
            raise UserError(f"{annotations / number}_exp.npy: expression {values[0]:g} is outside 0 to 10")
        return values

    rows = list(in_threads(read, numbers, f"reading {annotations}"))
    names = [f"{annotations.parent.name}/images/{number}.jpg" for number in numbers]
    return names, [annotations.parent.parent / name for name in names], np.array(rows).reshape(-1, 3)


def read_cifar10(root: Path, split: str) -> Index:
    """CIFAR-10 in its python version, root/cifar-10-batches-py; the source of an image is its array (3, 32, 32)."""
    folder = root / "cifar-10-batches-py"
    batches = [folder / f"data_batch_{k}" for k in range(1, 6)] if split == "train" else [folder / "test_batch"]
    for path in (*batches, folder / "batches.meta"):
        if not path.is_file():
            raise not_found("cifar10", root, path.relative_to(root))
    with reading(folder / "batches.meta", "CIFAR-10's class names"):
        classes = tuple(read_pickle(folder / "batches.meta")["label_names"])
        if not all(isinstance(name, str) for name in classes) or not 2 <= len(set(classes)) == len(classes):
            raise ValueError("label_names is no list of different names")
    index = Index([], [], classes)
    for path in batches:
        with reading(path, "a batch of CIFAR-10"):
            batch = read_pickle(path)
            images, labels = batch["data"].as_uint8().reshape(-1, 3, 32, 32), list(batch["labels"])
            if len(labels) != len(images) or not all(label in range(len(classes)) for label in labels):
                raise ValueError(f"{len(labels)} labels of {len(images)} images, to be 0 to {len(classes) - 1}")
            index.labels += map(int, labels)
            index.sources += list(images)
    index.names = [f"{split}_{i:05d}" for i in range(len(index.labels))]
    return index


def read_toy(difficulty: float, split: str) -> Index:
    """The faces that toyfaces.py draws; the source of a face is its number."""
    numbers = range(toyfaces.SPLITS[split])
    labels, va, *_ = zip(*(toyfaces.expression(split, i, difficulty=difficulty) for i in numbers))
    return Index([f"{split}_{i:05d}.png" for i in numbers], list(labels), toyfaces.CLASSES, list(numbers), np.stack(va))


def read_index(args, split: str) -> Index:
    """The list of split "train", or of the one that is evaluated ("test", "valid"): after --classes, before --limit."""
    root = Path(args.root)
    if args.data == "toy":
        index = read_toy(args.difficulty, split)
    elif args.data == "ferplus":
        index = read_ferplus(root, split)
    else:  # not of OWN_VALID: the validation split is a fixed stratified tenth of the training set
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
    check_names(index.classes, root)
    check_names(index.names, root)
    if args.classes:
        index = keep_classes(index, args)
    if not index.names:
        raise UserError(f"--data {args.data}: {root} has no {split} images")
    return index


def keep_classes(index: Index, args) -> Index:
    strange = [c for c in index.classes if c not in CANONICAL]
    if strange:
        raise UserError(f"--classes {args.classes} needs expression classes, and {strange[0]!r} is none")
    classes = tuple(c for c in index.classes if c != "contempt" or args.classes == 8)
    if len(classes) != args.classes:
        raise UserError(
            f"--classes {args.classes}: --data {args.data} has {len(classes)} of these: {', '.join(classes)}"
        )
    index = index.take([i for i, label in enumerate(index.labels) if index.classes[label] in classes])
    index.labels = [classes.index(index.classes[label]) for label in index.labels]
    index.classes = classes
    return index


def stratified(labels: list[int], count: int, generator) -> list[int]:
    """Sorted positions of `count` samples, drawn from each class in proportion (largest remainders)."""
    labels = torch.tensor(labels, dtype=torch.int64)
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


def load_train_index(args) -> tuple[Index, Tensor, Tensor | None]:
    """The training list after --limit, its labels to train on, int64 (N,), and the clean ones if they are others."""
    index = read_index(args, "train")
    if args.limit and args.limit < len(index.names):
        index = index.take(stratified(index.labels, args.limit, generator_of("limit")))
    elif args.limit and args.limit > len(index.names):
        raise UserError(f"--limit {args.limit}: there are only {len(index.names)} training images")
    own = labels = torch.tensor(index.labels)
    if args.labels:
        labels = read_labels(args.labels, index)
    elif args.noise:
        labels = inject(own, index.classes, args.noise, args.noise_type, args.noise_seed)
    if len(labels.unique()) < 2:
        what = args.labels or f"the training images of {args.root}"
        raise UserError(f"--data {args.data}: fewer than two classes in {what}")
    return index, labels, None if labels is own else own


def load_data(args) -> tuple[Split, Split]:
    """The training split, with --limit and then --labels or --noise applied, and the split that is evaluated.

    args: a namespace with the options of `add_data_args`. Raises UserError for data that are missing, damaged or odd.
    """
    index, labels, clean = load_train_index(args)
    test = read_index(args, args.split)
    va = [None if i.va is None else torch.from_numpy(i.va) for i in (index, test)]
    train = Split(decode_all(index, args, "train"), labels, clean, va[0], index.names, index.classes)
    test = Split(decode_all(test, args, args.split), torch.tensor(test.labels), None, va[1], test.names, test.classes)
    counts = torch.bincount(labels, minlength=len(index.classes)).tolist()
    listing = ", ".join(f"{name} {count:,}" for name, count in zip(index.classes, counts))
    print(
        f"{args.data}: {len(train.labels):,} training images ({listing}), {len(test.labels):,} {args.split} images, "
        f"{tuple(train.images.shape[1:])}"
    )
    if clean is not None:
        wrong = labels != clean
        print(f"labels that differ from the data set's own: {wrong.sum().item():,} ({wrong.float().mean():.1%})")
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
    """Move exactly round(rate * n_c) labels of each class c to its partner pairs[c] (NCCTFER, Sec. 4.3.1).

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
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed of the noise, {seed}, is outside [0, 2^63)")
    generator = torch.Generator().manual_seed(seed)
    if kind == "asymmetric":
        return asymmetric_noise(labels, rate, confusion_pairs(classes), generator)
    return symmetric_noise(labels, rate, len(classes), generator)


def name_key(name: str) -> str:
    """What two spellings of one image have in common: no folder, no "_aligned", no suffix."""
    return Path(name.replace("\\", "/")).stem.removesuffix("_aligned")


def key_of(index: Index):
    """How the names of a label file are matched: by `name_key`, or as a whole where that does not tell images apart."""
    keys, folders = {name_key(name) for name in index.names}, {name.rpartition("/")[0] for name in index.names}
    plain = len(keys) == len(index.names) and len(folders) == 1
    return name_key if plain else lambda name: name.replace("\\", "/")


def look_up(rows, index: Index, path, what: str) -> list:
    """The values of the images of `index` in the rows (line number, name, value) of a file; UserError if one lacks."""
    key = key_of(index)
    table = {key(name): value for _, name, value in once(rows, path, key)}
    missing = [name for name in index.names if key(name) not in table]
    if missing:
        raise UserError(
            f"{path}: no {what} for {len(missing):,} of {len(index.names):,} training images, the first is {missing[0]}"
        )
    return [table[key(name)] for name in index.names]


def read_labels(path, index: Index) -> Tensor:
    """Labels, int64 (N,), of the images of `index` from a noisy label file.

    Read are `name,label` with class names or integers, "name label" lines with labels from 0 or from 1, and lists in
    AffectNet's columns (docs/data.md). Lines of other images are passed over. Raises UserError, with the line, for what
    is malformed, outside the classes, doubled with another label, or in an unclear numbering.
    """
    by_name = {name: label for label, name in enumerate(index.classes)}
    if is_affectnet(path):
        codes = {number: by_name[name] for number, name in enumerate(AFFECTNET_CLASSES) if name in by_name}
        own = set(index.names)
        rows = [(n, name, int(value)) for n, name, [value] in affectnet_rows(path, "expression") if name in own]
    else:
        rows, _ = read_rows(path)
        if not rows:
            raise UserError(f"{path}: no labels in it")
        # A class may be named by a number; then numbers are names, whatever they count from.
        named = any(name.isdecimal() for name in index.classes) or not re.fullmatch(r"-?\d+", rows[0][2])
        if named:
            key = key_of(index)
            own = {key(name) for name in index.names}
            codes, rows = by_name, [(n, name, canonical(text)) for n, name, text in rows if key(name) in own]
        else:
            rows, base = numbered(rows, path, len(index.classes))
            codes = {base + label: label for label in range(len(index.classes))}
    for line_number, _, value in rows:
        if value not in codes:
            known = ", ".join(index.classes)
            raise UserError(f"{path}, line {line_number}: label {value!r} is not among the classes {known}")
    values = look_up(rows, index, path, "label")
    if codes is not by_name:
        check_numbering(values, codes, index, path)
    return torch.tensor([codes[value] for value in values])


def check_numbering(values: list[int], codes: dict[int, int], index: Index, path) -> None:
    """Refuse numbers of which most agree with the data set's own labels if they are read in another usual way.

    codes: number -> label, as they are read. Labels of which most are wrong tell nothing: they are not refused.
    """
    pairs = Counter(zip(values, index.labels))

    def agreement(codes):
        return sum(count for (value, label), count in pairs.items() if codes.get(value) == label) / len(values)

    best = max(0.5, agreement(codes)), None
    orders = {"RAF-DB's": RAF_CLASSES, "FERPlus's": FERPLUS_CLASSES, "AffectNet's": AFFECTNET_CLASSES}
    for whose, order in {"this data set's": index.classes, **orders}.items():
        for base in (0, 1):
            other = {base + k: index.classes.index(name) for k, name in enumerate(order) if name in index.classes}
            if agreement(other) > best[0]:
                best = agreement(other), f"{whose} order ({', '.join(order[:3])}, ...) from {base} on"
    if best[1]:
        raise UserError(
            f"{path}: the labels look numbered in {best[1]}: {best[0]:.0%} agree with the data set's own so, "
            f"{agreement(codes):.0%} as usual; write class names instead"
        )


def read_va(path, index: Index) -> Tensor:
    """Valence and arousal, float32 (N, 2), of the images of `index`: "name valence arousal" a line, or with commas.

    Lists in AffectNet's columns are read too. Values outside [-1, 1] are clamped, and counted on the screen. Raises
    UserError as `read_labels`, and for AffectNet's mark of invalid values, -2.
    """
    affectnet = is_affectnet(path)
    rows = affectnet_rows(path, "valence", "arousal") if affectnet else va_rows(path)
    key = key_of(index)
    own = {key(name) for name in index.names}
    rows = [row for row in rows if key(row[1]) in own]
    for line_number, name, values in rows:
        if affectnet and -2 in values:
            raise UserError(f"{path}, line {line_number}: {name} has a valence or arousal of -2, which means invalid")
    values = torch.tensor(look_up(rows, index, path, "valence and arousal"), dtype=torch.float64)
    clamped = (values.abs() > 1).any(1).sum().item()
    if clamped:
        print(f"{path}: training images whose values lie outside [-1, 1] and were clamped: {clamped:,}")
    return values.clamp(-1, 1).float()


def va_rows(path):
    """Yield (line number, name, [valence, arousal]) of the lines of a list, with blanks or commas."""
    for line_number, line in text_lines(path):
        with reading(f"{path}, line {line_number}", "a name, a valence and an arousal"):
            name, *fields = next(csv.reader([line])) if "," in line else line.rsplit(None, 2)
            if line_number == 1 and [text.strip().lower() for text in fields] == ["valence", "arousal"]:
                continue
            if len(fields) != 2 or not name.strip():
                raise ValueError(f"{line[:80]!r}")
            yield line_number, name.strip(), [as_float(text) for text in fields]


def write_labels(path, names: list[str], labels: Tensor, classes: tuple[str, ...], style: str = "csv") -> None:
    """Write a noisy label file: "csv", `name,label` with class names, or "list", RAF-DB's "name label" counted from 1.

    Where a class has a number for a name, a list has the names: that is what `read_labels` takes numbers for then.
    Raises UserError for a list of names with blanks, which could not be read back.
    """
    numbered = any(map(str.isdecimal, classes))
    blank = [name for name in classes if " " in name]
    if style == "list" and numbered and blank:
        raise UserError(f"{path}: a list of names cannot hold the class {blank[0]!r}; csv can")

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            if style == "list":
                numbers = classes if numbered else range(1, len(classes) + 1)
                file.writelines(f"{name} {numbers[label]}\n" for name, label in zip(names, labels.tolist()))
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
