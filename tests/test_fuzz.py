"""Files of every small kind, damaged at random: a reader either succeeds or says in one line what is wrong."""

import json
import warnings
from pathlib import Path

from support import datasets, decoding
from support.datasets import Index, UserError, read_labels, read_va

import numpy as np
import pytest
import torch
from conftest import (
    build_affectnet,
    build_cifar10,
    build_ferplus,
    build_ferplus_csv,
    build_raf,
    build_raf_kaggle,
    picture,
)

MUTATIONS = 200
# What has confused readers before: numbers of odd size and spelling, quotes, line ends, other encodings, NUL.
TOKENS = [b"0", b"-1", b"7", b"8", b"1e999", b"nan", b"0_6", b"9" * 30, b"2147483648", "٣".encode(), b"\xff" * 8]
TOKENS += [b",", b";", b'"', b"\n", b"\r", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", "\u2028".encode(), b" ", b"\t", b"../"]


def mutate(content: bytes, rng) -> bytes:
    """One to four random changes of a file."""
    for _ in range(rng.integers(1, 5)):
        start, length = int(rng.integers(0, len(content) + 1)), int(rng.geometric(0.1))
        piece, rest = content[start : start + length], content[start + length :]
        kind = rng.integers(6)
        if kind == 0:  # other bytes
            content = content[:start] + rng.bytes(len(piece)) + rest
        elif kind == 1:  # a bit
            flipped = bytes([piece[0] ^ (1 << int(rng.integers(8)))]) + piece[1:] if piece else b""
            content = content[:start] + flipped + rest
        elif kind == 2:  # gone
            content = content[:start] + rest
        elif kind == 3:  # twice
            content = content[:start] + piece + piece + rest
        elif kind == 4:  # a token in its place
            content = content[:start] + TOKENS[rng.integers(len(TOKENS))] + rest
        elif rng.integers(4) == 0:  # cut, more seldom: little is left
            content = content[:start]
    return content


def check_index(index):
    assert len(index.names) == len(index.labels) == len(index.sources)
    assert all(0 <= label < len(index.classes) for label in index.labels)


def image(suffix, **options):
    def build(root):
        path = root / f"image{suffix}"
        picture(3, 24, 24).save(path, **options)
        return path

    def read(path):
        decoding.size_and_mode(path)
        assert decoding.decode(path, (16, 16), False).shape == (3, 16, 16)

    return build, read


def list_of(build_data, name, read):
    """A file of a data set, and read(root) -> an Index."""

    def build(root):
        return build_data(root) / name

    def read_file(path):
        root = next(parent for parent in path.parents if parent.name == "data")
        check_index(read(root))

    return build, read_file


INDEX = Index([f"train_{i:05d}.jpg" for i in range(28)], [i % 7 for i in range(28)], datasets.RAF_CLASSES)
FACES = Index([f"{i % 3}/{i}.jpg" for i in range(24)], [i % 8 for i in range(24)], datasets.AFFECTNET_CLASSES)


def text(content):
    def build(root):
        path = root / "file.txt"
        path.write_text(content)
        return path

    return build


def npy(root):
    np.save(root / "0_exp.npy", np.array("3"))
    return root / "0_exp.npy"


def check_labels(index):
    def read(path):
        labels = read_labels(path, index)
        assert labels.shape == (len(index.names),) and 0 <= labels.min() <= labels.max() < len(index.classes)

    return read


def check_va(index):
    def read(path):
        va = read_va(path, index)
        assert va.shape == (len(index.names), 2) and va.abs().max() <= 1

    return read


def cached(suffix):
    """A cache file or its note: both are made anew if they do not fit, so that it never fails."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)

    def build(root):
        np.save(root / "cache.npy", pixels)
        checksum = decoding.checksum(torch.from_numpy(pixels))
        note = {"stamp": "stamp", "shape": [5, 1, 8, 8], "checksum": checksum}
        (root / "cache.json").write_text(json.dumps(note))
        assert decoding.load_cache(root / "cache.npy", "stamp") is not None
        return root / f"cache{suffix}"

    def read(path):
        found = decoding.load_cache(path.with_suffix(".npy"), "stamp")
        assert found is None or np.array_equal(found, pixels)

    return build, read


RAF = "EmoLabel/list_patition_label.txt"
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # to be turned
NAMES = "name,label\n" + "".join(f"{n},{datasets.RAF_CLASSES[c]}\n" for n, c in zip(INDEX.names, INDEX.labels))
VA = "".join(f"{name} 0.25 -0.5\n" for name in INDEX.names)
LANDMARKS = ";".join(["1.5"] * 6)
MACHINE = ",".join(datasets.AFFECTNET_HEADER) + "\n"
MACHINE += "".join(f"{n},1,2,3,4,{LANDMARKS},{c},0.5,-0.5\n" for n, c in zip(FACES.names, FACES.labels))
FER_TRAIN = "FER2013Train/label.csv"
CIFAR = "cifar-10-batches-py"
KINDS = {
    "jpg": image(".jpg", quality=90, exif=EXIF),
    "progressive jpg": image(".jpg", progressive=True),
    "png": image(".png", exif=EXIF),
    "bmp": image(".bmp"),
    "webp": image(".webp", exif=EXIF),
    "gif": image(".gif"),
    "tiff": image(".tiff", compression="tiff_lzw"),
    "RAF-DB's list": list_of(build_raf, RAF, lambda root: datasets.read_raf(root, "train")),
    "Kaggle's table": list_of(build_raf_kaggle, "train_labels.csv", lambda root: datasets.read_raf(root, "train")),
    "label.csv": list_of(build_ferplus, FER_TRAIN, lambda root: datasets.read_ferplus(root, "train")),
    "fer2013new.csv": list_of(build_ferplus_csv, "fer2013new.csv", lambda root: datasets.read_ferplus(root, "train")),
    "fer2013.csv": list_of(build_ferplus_csv, "fer2013.csv", lambda root: datasets.read_ferplus(root, "train")),
    "AffectNet's list": list_of(build_affectnet, "training.csv", lambda root: datasets.read_affectnet(root, "train")),
    "an npy file": (npy, decoding.read_npy),
    "a CIFAR-10 batch": list_of(build_cifar10, f"{CIFAR}/test_batch", lambda root: datasets.read_cifar10(root, "test")),
    "batches.meta": list_of(build_cifar10, f"{CIFAR}/batches.meta", lambda root: datasets.read_cifar10(root, "test")),
    "labels, names": (text(NAMES), check_labels(INDEX)),
    "labels, list": (text("".join(f"{n} {c + 1}\n" for n, c in zip(INDEX.names, INDEX.labels))), check_labels(INDEX)),
    "labels, AffectNet": (text(MACHINE), check_labels(FACES)),
    "valence, list": (text(VA), check_va(INDEX)),
    "valence, AffectNet": (text(MACHINE), check_va(FACES)),
    "a cache": cached(".npy"),
    "a note": cached(".json"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, tmp_path):
    build, read = KINDS[kind]
    root = tmp_path / "data"
    root.mkdir()
    path: Path = build(root)
    content = path.read_bytes()
    read(path)  # undamaged, it is read
    rng, refused = np.random.default_rng(list(kind.encode())), 0
    for number in range(MUTATIONS):
        damaged = mutate(content, rng)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd EXIF data and large images
                read(path)
        except UserError as error:
            refused += 1
            assert not decoding.UNPRINTABLE.search(str(error)), (number, damaged)
    assert refused or kind in ("a cache", "a note")
