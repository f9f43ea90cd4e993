import csv
import os
import pickle
import shutil
from pathlib import Path

from support import datasets, toyfaces
from support.datasets import (
    AFFECTNET_CLASSES,
    FERPLUS_CLASSES,
    RAF_CLASSES,
    UserError,
    load_data,
    load_train_index,
    majority,
    read_index,
    read_labels,
    write_labels,
)
from support.decoding import label_base

import numpy as np
import pytest
import torch
from conftest import (
    BUILDERS,
    FERPLUS_USAGE,
    RAF_TEST,
    RAF_TRAIN,
    affectnet_rows,
    build_affectnet,
    build_affectnet_npy,
    build_cifar10,
    build_ferplus,
    build_ferplus_csv,
    build_folder,
    build_folder_splits,
    build_raf,
    build_raf_kaggle,
    ferplus_rows,
    picture,
    raf_rows,
    save,
    votes_for,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def named(split):
    """{image name: class name} of a split or an index."""
    return {name: split.classes[label] for name, label in zip(split.names, split.labels)}


def key_images(split):
    """{image name without "_aligned": pixels} of a split."""
    return {datasets.name_key(name): image for name, image in zip(split.names, split.images)}


# ----------------------------------------------------------------------------------------------------------------------
# Layouts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, data, shape, counts, classes",
    [
        ("raf", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
        ("raf lists", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
        ("kaggle", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
        ("kaggle folders", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
        ("ferplus", "ferplus", (1, 48, 48), (24, 8), FERPLUS_CLASSES),
        ("ferplus csv", "ferplus", (1, 48, 48), (24, 8), FERPLUS_CLASSES),
        ("affectnet aligned", "affectnet", (3, 32, 32), (24, 8), AFFECTNET_CLASSES),
        ("affectnet npy", "affectnet", (3, 32, 32), (24, 8), AFFECTNET_CLASSES),
        ("affectnet aligned", "affectnet-auto", (3, 32, 32), (16, 8), AFFECTNET_CLASSES),
        (
            "cifar10",
            "cifar10",
            (3, 32, 32),
            (100, 20),
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ),
        ("folder", "folder", (3, 20, 20), (9, 3), ("anger", "happiness", "sadness")),
        ("folder splits", "folder", (3, 20, 20), (12, 6), ("anger", "happiness", "sadness")),
    ],
)
def test_a_layout_gives_its_images_labels_and_classes(layout, data, shape, counts, classes, tmp_path, arguments):
    for split, count in zip(load_data(arguments(data, BUILDERS[layout](tmp_path / "data"))), counts):
        assert split.images.shape == (count, *shape) and split.images.dtype == torch.uint8
        assert split.labels.shape == (count,) and split.labels.dtype == torch.int64
        assert torch.bincount(split.labels, minlength=len(classes)).tolist() == [count // len(classes)] * len(classes)
        assert split.classes == classes
        assert len(set(split.names)) == count
        assert split.clean is None and (split.va is None) == (not data.startswith("affectnet"))


def test_the_published_numbers_of_raf_db():
    train = dict(surprise=1290, fear=281, disgust=717, happiness=4772, sadness=1982, anger=705, neutral=2524)
    assert dict(zip(RAF_CLASSES, datasets.RAF_SIZES["train"], strict=True)) == train
    assert datasets.RAF_SIZES["test"] == (329, 74, 160, 1185, 478, 162, 680)


def test_the_expressions_of_affectnet_count_in_its_own_order(tmp_path):
    names = "neutral happiness sadness surprise fear disgust anger contempt".split()
    index = datasets.read_affectnet(build_affectnet(tmp_path), "train")
    assert named(index) == {f"{i % 3}/{i}.jpg": names[i % 8] for i in range(24)}


def test_valence_comes_before_arousal_in_both_releases(tmp_path):
    wanted = [[valence, arousal] for _, expression, valence, arousal in affectnet_rows(24) if expression < 8]
    for build in (build_affectnet, build_affectnet_npy):
        index = datasets.read_affectnet(build(tmp_path / build.__name__), "train")
        assert np.allclose(index.va, wanted)


@pytest.mark.parametrize("row", [",0,-0.9,-2", ",8,-0.9,0.9"])
def test_rows_of_affectnet_without_an_expression_or_with_va_out_of_range_are_dropped(row, tmp_path):
    table = build_affectnet(tmp_path) / "training.csv"
    assert ",0,-0.9,0.9" in table.read_text()
    table.write_text(table.read_text().replace(",0,-0.9,0.9", row, 1))
    assert len(datasets.read_affectnet(tmp_path, "train").names) == 23


def test_images_of_every_suffix_are_read(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    for suffix in ("jpg", "jpeg", "bmp", "webp", "JPEG"):
        save(picture(1, 20, 20), root / "train" / "sad" / f"x{suffix}.{suffix}")
    assert len(load_train_index(arguments("folder", root))[0].names) == 12 + 5


def test_toy_faces_are_as_difficult_as_asked(few_toys, arguments):
    train, _ = load_data(arguments("toy", None, "--difficulty", "1"))
    face, _, va = toyfaces.draw_face("train", 3, size=48, difficulty=1.0)
    assert np.array_equal(train.images[3].permute(1, 2, 0), face) and np.allclose(train.va[3], va)


def test_a_part_is_drawn_and_not_the_first_of_each_class():
    chosen = datasets.stratified([0] * 100 + [1] * 100, 20, generator())
    assert chosen != [*range(10), *range(100, 110)] and max(c for c in chosen if c < 100) > 40
    assert chosen != datasets.stratified([0] * 100 + [1] * 100, 20, generator(1))


def test_toy_has_valence_and_arousal(few_toys, arguments):
    train, test = load_data(arguments("toy"))
    assert train.images.shape == (70, 3, 48, 48) and train.images.dtype == torch.uint8
    assert train.va.shape == (70, 2) and train.va.dtype == torch.float32
    assert train.classes == RAF_CLASSES and test.names[:2] == ["test_00000.png", "test_00001.png"]
    assert not torch.equal(train.images[:30], test.images)


def test_raf_labels_count_from_surprise(raf, arguments):
    train, test = load_data(arguments("raf", raf))
    assert named(train) == {name: RAF_CLASSES[label - 1] for name, label in raf_rows("train")}
    assert named(test) == {name: RAF_CLASSES[label - 1] for name, label in raf_rows("test")}


@pytest.mark.parametrize("layout", ["raf lists", "kaggle", "kaggle folders"])
def test_raf_layouts_agree(layout, tmp_path, raf, arguments):
    for a, b in zip(
        load_data(arguments("raf", raf)), load_data(arguments("raf", BUILDERS[layout](tmp_path / "other")))
    ):
        assert {datasets.name_key(n): c for n, c in named(a).items()} == {
            datasets.name_key(n): c for n, c in named(b).items()
        }
        images = key_images(b)
        assert all(torch.equal(image, images[key]) for key, image in key_images(a).items())


def test_raf_may_count_from_0(tmp_path, raf):
    other = build_raf(tmp_path / "zero", base=0)
    assert datasets.read_raf(other, "train").labels == datasets.read_raf(raf, "train").labels


@pytest.mark.parametrize(
    "change",
    [
        "list_partition_label.txt",
        "crlf",
        "backslashes",
        "blank lines",
        "aligned names",
        "names of the files",
        "in basic",
        "inside basic",
        "root list",
    ],
)
def test_raf_variants_are_read(change, raf):
    wanted = datasets.read_raf(raf, "test")
    listing, root = raf / "EmoLabel" / "list_patition_label.txt", raf
    text = listing.read_text()
    if change.startswith("list"):
        listing.rename(listing.with_name(change))
    elif change == "crlf":
        listing.write_bytes(text.replace("\n", "\r\n").encode())
    elif change == "backslashes":
        listing.write_text(text.replace("te", "Image\\aligned\\te").replace("tr", "Image\\aligned\\tr"))
    elif change == "blank lines":
        listing.write_text("\n" + text.replace("\n", "\n\n"))
    elif change == "aligned names":
        listing.write_text(text.replace(".jpg", "_aligned.jpg"))
    elif change == "names of the files":  # without "_aligned"
        for path in (raf / "Image" / "aligned").iterdir():
            path.rename(path.with_name(path.name.replace("_aligned", "")))
    elif change == "root list":
        listing.rename(raf / listing.name)
        listing.parent.rmdir()
    else:
        root = raf.with_name("outer")
        root.mkdir()
        raf.rename(root / "basic")
        root = root / "basic" if change == "inside basic" else root
    index = datasets.read_raf(root, "test")
    assert index.labels == wanted.labels and all(source.is_file() for source in index.sources)


@pytest.mark.parametrize("layout", ["list", "tables", "folders"])
def test_raf_in_the_order_of_another_data_set_is_refused(layout, tmp_path, monkeypatch):
    if layout == "list":
        left_out = ("train_00001.jpg", "test_0001.jpg")
        root = build_raf(tmp_path, rows=[row for row in raf_rows() if row[0] not in left_out])
    else:
        root = build_raf_kaggle(tmp_path, tables=layout == "tables")
        for split, name in (("train", "train_00001_aligned.jpg"), ("test", "test_0001_aligned.jpg")):
            (root / "DATASET" / split / "2" / name).unlink()
            if layout == "tables":
                table = root / f"{split}_labels.csv"
                table.write_text(table.read_text().replace(f"{name},2\n", ""))
    sizes = {"train": (4, 3, 4, 4, 4, 4, 4), "test": (2, 1, 2, 2, 2, 2, 2)}
    assert datasets.RAF_SIZES.keys() == sizes.keys()
    for split, own in sizes.items():
        monkeypatch.setitem(datasets.RAF_SIZES, split, own)
        assert datasets.read_raf(root, split).labels.count(1) == own[1]
        monkeypatch.setitem(datasets.RAF_SIZES, split, own[::-1])
        with pytest.raises(UserError, match="by their sizes .* are surprise, anger, .* in the order surprise, fear"):
            datasets.read_raf(root, split)
        monkeypatch.setitem(datasets.RAF_SIZES, split, (*own[:6], 5))  # a part of the data set tells nothing
        assert datasets.read_raf(root, split).labels.count(1) == own[1]


def test_raf_has_as_many_images_as_its_authors_say():
    assert [sum(sizes) for sizes in datasets.RAF_SIZES.values()] == [12271, 3068]


def test_an_empty_folder_beside_those_of_the_labels_is_no_error(tmp_path):
    root = build_raf_kaggle(tmp_path / "kaggle", tables=False)
    before = named(datasets.read_raf(root, "train"))
    (root / "DATASET" / "train" / "notes").mkdir()
    assert named(datasets.read_raf(root, "train")) == before


@pytest.mark.parametrize("tables", [True, False])
def test_kaggle_root_may_be_the_dataset_folder(tables, tmp_path):
    root = build_raf_kaggle(tmp_path / "kaggle", tables)
    assert named(datasets.read_raf(root / "DATASET", "train")) == named(datasets.read_raf(root, "train"))


def test_ferplus_drops_rows_without_majority_or_name(tmp_path):
    index = datasets.read_ferplus(build_ferplus(tmp_path), "train")
    kept = {name: votes for part, name, votes, _ in ferplus_rows() if part == "Train" and name and max(votes[:8]) == 8}
    assert named(index) == {name: FERPLUS_CLASSES[np.argmax(votes)] for name, votes in kept.items()}
    assert len(kept) == 24


@pytest.mark.parametrize("split", ["test", "valid"])
def test_ferplus_layouts_agree(split, tmp_path, arguments):
    folders = load_data(arguments("ferplus", build_ferplus(tmp_path / "a"), "--split", split))
    tables = load_data(arguments("ferplus", build_ferplus_csv(tmp_path / "b"), "--split", split))
    for a, b in zip(folders, tables):
        assert a.names == b.names and torch.equal(a.labels, b.labels) and torch.equal(a.images, b.images)


def test_ferplus_votes_without_images_leave_the_tables_in_force(tmp_path):
    """As in its authors' repository, where the folders hold label.csv alone."""
    root = build_ferplus_csv(build_ferplus(tmp_path))
    assert isinstance(datasets.read_ferplus(root, "test").sources[0], Path)
    for image in root.glob("FER2013*/*.png"):
        image.unlink()
    index = datasets.read_ferplus(root, "test")
    assert index.labels and not isinstance(index.sources[0], Path)
    (root / "fer2013.csv").unlink()
    assert isinstance(datasets.read_ferplus(root, "test").sources[0], Path)  # decoding says which are missing


def test_ferplus_pixels_are_those_of_the_file(tmp_path, arguments):
    train, _ = load_data(arguments("ferplus", build_ferplus_csv(tmp_path)))
    pixels = {name: array for _, name, _, array in ferplus_rows()}
    assert all(np.array_equal(image[0], pixels[name]) for name, image in zip(train.names, train.images))


def test_ferplus_says_how_many_images_have_a_majority(tmp_path, capsys):
    datasets.read_ferplus(build_ferplus(tmp_path), "train")
    assert "24 of 27" in capsys.readouterr().out


def test_folder_names_are_paths_below_the_root(tmp_path, arguments):
    train, test = load_data(arguments("folder", build_folder_splits(tmp_path / "data")))
    assert "train/happy/0.png" in train.names and "test/sad/1.png" in test.names
    assert named(train)["train/happy/0.png"] == "happiness"


def test_folder_classes_may_be_spelt_differently_in_train_and_test(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    (root / "test" / "happy").rename(root / "test" / "Happiness")
    train, test = load_data(arguments("folder", root))
    assert test.classes == train.classes and named(test)["test/Happiness/0.png"] == "happiness"


def test_folder_takes_classes_that_are_no_expressions(tmp_path, arguments):
    train, _ = load_data(arguments("folder", build_folder(tmp_path / "data", ("Dog", "Bored cat"))))
    assert train.classes == ("bored cat", "dog")


@pytest.mark.parametrize(
    "folders, classes",
    [(("zeta", "alpha", "Beta"), ("alpha", "beta", "zeta")), (("afraid", "anger"), ("anger", "fear"))],
)
def test_folder_classes_are_in_alphabetical_order(folders, classes, tmp_path, arguments):
    train, test = load_data(arguments("folder", build_folder(tmp_path / "data", folders)))
    assert train.classes == test.classes == classes
    first = next(name for name in train.names if train.labels[train.names.index(name)] == 0)
    assert datasets.canonical(first.split("/")[0]) == classes[0]


def test_folder_passes_over_hidden_folders_and_other_files(tmp_path):
    root = build_folder(tmp_path / "data")
    build_folder(root, (".hidden",))
    (root / "happy" / "notes.txt").write_text("not an image")
    (root / "readme.md").write_text("not a class")
    index = datasets.read_folder(root, "train")
    assert index.classes == ("anger", "happiness", "sadness") and len(index.names) == 9


@pytest.mark.parametrize(
    "name, expected", [("Happy", "happiness"), (" ANGRY ", "anger"), ("neutral", "neutral"), ("Dog", "dog")]
)
def test_canonical_names(name, expected):
    assert datasets.canonical(name) == expected


# ----------------------------------------------------------------------------------------------------------------------
# The base of labels; the majority rule
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, base", [(range(1, 8), 1), (range(7), 0), ([0, 6], 0), ([1, 7], 1), ([0, 3], 0), ([5, 7], 1)]
)
def test_label_base_is_found(values, base):
    assert label_base(list(values), 7, "labels.txt") == base


@pytest.mark.parametrize("values", [[1, 6], [3], [1, 2, 3, 4, 5, 6], [0, 7], [-1, 6], [1, 8]])
def test_label_base_refuses_what_fits_both_or_neither(values):
    with pytest.raises(UserError, match="labels.txt"):
        label_base(values, 7, "labels.txt")


def test_raf_list_without_the_last_class_is_ambiguous(tmp_path):
    root = build_raf(tmp_path, rows=[row for row in raf_rows() if row[1] < 7])
    with pytest.raises(UserError, match="list_patition_label.txt.* 0 or from 1"):
        datasets.read_raf(root, "train")


@pytest.mark.parametrize("label", ["8", "-1", "1.5", "happy"])
def test_raf_label_outside_names_file_and_line(label, raf):
    listing = raf / "EmoLabel" / "list_patition_label.txt"
    lines = listing.read_text().splitlines()
    lines[2] = f"train_00003.jpg {label}"
    listing.write_text("\n".join(lines))
    with pytest.raises(UserError, match="list_patition_label.txt, line 3"):
        datasets.read_raf(raf, "train")


@pytest.mark.parametrize(
    "votes, winner",
    [
        ([10, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        ([6, 4, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        ([5, 5, 0, 0, 0, 0, 0, 0, 0, 0], -1),  # a tie
        ([5, 1, 1, 1, 1, 1, 0, 0, 0, 0], 0),  # 5 of 5 once the counts of one are dropped
        ([5, 2, 1, 2, 0, 0, 0, 0, 0, 0], 0),  # 5 of 9
        ([5, 3, 0, 2, 0, 0, 0, 0, 0, 0], -1),  # 5 of 10: exactly half
        ([4, 0, 2, 0, 2, 0, 1, 1, 0, 0], -1),  # 4 of 8
        ([0, 0, 0, 0, 0, 0, 0, 9, 1, 0], 7),
        ([0, 5, 0, 0, 0, 0, 0, 0, 5, 0], -1),  # unknown counts among the votes
        ([0, 5, 0, 0, 0, 0, 0, 0, 4, 1], 1),  # 5 of 9
        ([3, 0, 0, 0, 0, 0, 0, 0, 7, 0], -1),  # unknown wins
        ([3, 0, 0, 0, 0, 0, 0, 0, 0, 7], -1),  # not a face wins
        ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], -1),
        ([1, 0, 0, 0, 0, 0, 0, 0, 0, 0], -1),
        ([0] * 10, -1),
    ],
)
def test_majority_of_ferplus(votes, winner):
    before = np.array([votes])
    assert majority(before).tolist() == [winner]
    assert before.tolist() == [votes]


# ----------------------------------------------------------------------------------------------------------------------
# --classes, --limit, --split
# ----------------------------------------------------------------------------------------------------------------------


def test_seven_classes_of_ferplus_are_without_contempt(tmp_path, arguments):
    root = build_ferplus(tmp_path / "data")
    every, seven = (load_data(arguments("ferplus", root, *flags)) for flags in ([], ["--classes", "7"]))
    for a, b in zip(every, seven):
        assert b.classes == FERPLUS_CLASSES[:7]
        assert named(b) == {name: c for name, c in named(a).items() if c != "contempt"}
        assert torch.equal(b.images, a.images[[c != "contempt" for c in named(a).values()]])


def test_contempt_may_stand_between_other_classes(tmp_path, arguments):
    names = ("angry", "contempt", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
    root = build_folder(tmp_path / "data", names, count=5)
    every, seven = (read_index(arguments("folder", root, *flags), "train") for flags in ([], ["--classes", "7"]))
    assert named(seven) == {name: c for name, c in named(every).items() if c != "contempt"}
    assert set(seven.labels) == set(range(7)) and every.classes[1] == "contempt"


@pytest.mark.parametrize("data, build, count", [("raf", build_raf, 8), ("folder", build_folder, 7)])
def test_classes_that_a_data_set_lacks_are_refused(data, build, count, tmp_path, arguments):
    with pytest.raises(UserError, match=f"--classes {count}"):
        load_data(arguments(data, build(tmp_path / "data"), "--classes", str(count)))


def test_classes_of_a_folder_must_be_expressions(tmp_path, arguments):
    with pytest.raises(UserError, match="dog"):
        load_data(arguments("folder", build_folder(tmp_path / "data", ("happy", "sad", "dog")), "--classes", "7"))


def test_limit_is_stratified(raf, arguments):
    train, test = load_data(arguments("raf", raf, "--limit", "14"))
    assert torch.bincount(train.labels).tolist() == [2] * 7
    assert len(train.images) == len(train.names) == 14 and len(test.names) == RAF_TEST


def test_limit_keeps_images_and_labels_together(raf, arguments):
    every, some = load_data(arguments("raf", raf))[0], load_data(arguments("raf", raf, "--limit", "10"))[0]
    images = key_images(every)
    assert all(torch.equal(image, images[key]) for key, image in key_images(some).items())
    assert named(some).items() <= named(every).items()


def test_limit_does_not_depend_on_the_seeds(raf, arguments):
    chosen = [
        load_train_index(arguments("raf", raf, "--limit", "10", "--noise", "0.5", *seed))[0].names
        for seed in (["--seed", "1"], ["--seed", "2"], ["--noise-seed", "9"])
    ]
    assert chosen[0] == chosen[1] == chosen[2]


def test_limit_is_taken_before_noise(raf, arguments):
    _, noisy, clean = load_train_index(arguments("raf", raf, "--limit", "14", "--noise", "0.5"))
    assert torch.bincount(clean).tolist() == [2] * 7
    assert torch.bincount(clean[noisy != clean]).tolist() == [1] * 7


def test_limit_of_everything_is_everything(raf, arguments):
    assert (
        load_train_index(arguments("raf", raf, "--limit", str(RAF_TRAIN)))[0].names
        == datasets.read_raf(raf, "train").names
    )


def test_limit_above_the_number_of_images_is_refused(raf, arguments):
    with pytest.raises(UserError, match="--limit 29.* 28 training images"):
        load_data(arguments("raf", raf, "--limit", "29"))


def test_stratified_rounds_by_largest_remainder():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    chosen = datasets.stratified(labels, 7, generator())  # 3.5, 2.1, 1.4
    assert [sum(labels[i] == c for i in chosen) for c in range(3)] == [4, 2, 1]
    assert chosen == sorted(set(chosen))


@pytest.mark.parametrize(
    "data, build, size",
    [
        ("raf", build_raf, RAF_TRAIN),
        ("folder", lambda root: build_folder_splits(root, count=10), 30),
    ],
)
def test_valid_is_a_tenth_of_the_training_set(data, build, size, tmp_path, arguments):
    root = build(tmp_path / "data")
    whole, _ = load_data(arguments(data, root))
    train, valid = load_data(arguments(data, root, "--split", "valid"))
    assert len(valid.names) == len(valid.images) == size // 10 and len(whole.names) == size
    assert set(train.names).isdisjoint(valid.names)
    assert named(train) | named(valid) == named(whole)
    images = dict(zip(whole.names, whole.images))
    assert all(
        torch.equal(image, images[name]) for split in (train, valid) for name, image in zip(split.names, split.images)
    )


def test_valid_is_stratified(tmp_path, arguments):
    valid = read_index(
        arguments("folder", build_folder_splits(tmp_path / "data", count=10), "--split", "valid"), "valid"
    )
    assert sorted(valid.labels) == [0, 1, 2]


def test_valid_is_the_same_for_every_seed(raf, arguments):
    first, second = (
        read_index(arguments("raf", raf, "--split", "valid", "--seed", seed), "valid").names for seed in "12"
    )
    assert first == second


def test_valid_of_ferplus_is_its_own_split(tmp_path, arguments):
    root = build_ferplus(tmp_path / "data")
    train, valid = load_data(arguments("ferplus", root, "--split", "valid"))
    assert valid.names == datasets.read_ferplus(root, "valid").names
    assert train.names == datasets.read_ferplus(root, "train").names


def test_valid_of_toy_is_its_own_split(few_toys, arguments):
    train, valid = load_data(arguments("toy", None, "--split", "valid"))
    assert len(train.names) == 70 and valid.names[0] == "valid_00000.png" and len(valid.names) == 30
    assert not torch.equal(valid.images, load_data(arguments("toy"))[1].images)


def test_valid_has_no_noise(raf, arguments):
    clean, noisy = (
        load_data(arguments("raf", raf, "--split", "valid", *noise))[1] for noise in ([], ["--noise", "0.9"])
    )
    assert torch.equal(clean.labels, noisy.labels) and noisy.clean is None


def test_too_few_images_for_a_validation_split_are_refused(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data", count=3)  # a tenth of nine is none
    with pytest.raises(UserError, match="valid"):
        load_data(arguments("folder", root, "--split", "valid"))


def test_ferplus_test_split_without_a_majority_is_refused(tmp_path, arguments):
    root = build_ferplus(tmp_path / "data")
    (root / "FER2013Test" / "label.csv").write_text('a.png,"(0, 0, 48, 48)",5,5,0,0,0,0,0,0,0,0\n')
    with pytest.raises(UserError, match=str(root)):
        load_data(arguments("ferplus", root))


# ----------------------------------------------------------------------------------------------------------------------
# A folder's fifth
# ----------------------------------------------------------------------------------------------------------------------


def test_a_fifth_of_each_class_is_for_the_test(tmp_path, arguments):
    train, test = load_data(arguments("folder", build_folder(tmp_path / "data", count=10)))
    assert torch.bincount(test.labels).tolist() == [2, 2, 2] and torch.bincount(train.labels).tolist() == [8, 8, 8]
    assert set(train.names).isdisjoint(test.names) and len(set(train.names) | set(test.names)) == 30


def test_the_fifth_of_a_class_ignores_other_classes(tmp_path):
    root = build_folder(tmp_path / "data", count=10)
    before = [name for name in datasets.read_folder(root, "test").names if "sad" not in name]
    build_folder(root, ("sad", "neutral"), count=15)
    after = [name for name in datasets.read_folder(root, "test").names if "sad" not in name and "neutral" not in name]
    assert after == before


def test_the_fifth_is_the_same_in_every_process(tmp_path):
    root = build_folder(tmp_path / "data", ("happy", "sad"), count=10)
    assert datasets.read_folder(root, "test").names == ["happy/1.png", "happy/7.png", "sad/1.png", "sad/9.png"]


def test_the_fifth_ignores_where_the_folder_lies(tmp_path):
    root = build_folder(tmp_path / "data", count=10)
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    assert datasets.read_folder(moved, "test").names == datasets.read_folder(root, "test").names


@pytest.mark.parametrize("other", ["nothing", "val"])
def test_a_folder_train_without_a_folder_test_is_refused(other, tmp_path, arguments):
    build_folder(tmp_path / "data" / "train")
    build_folder(tmp_path / "data" / other)
    with pytest.raises(UserError, match="none named test"):
        load_data(arguments("folder", tmp_path / "data"))


def test_hidden_files_are_no_images(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    wanted = load_train_index(arguments("folder", root))[0].names
    folder = next(p for p in (root / "train").iterdir())
    save(picture(1, 20, 20), folder / ".hidden" / "a.png")
    (folder / "._b.png").write_bytes(b"")
    assert load_train_index(arguments("folder", root))[0].names == wanted


def test_negative_votes_are_refused(tmp_path, arguments):
    root = build_ferplus(tmp_path / "data")
    table = root / "FER2013Train" / "label.csv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].split('"')[0] + '"(0, 0, 48, 48)",8,-9,0,0,0,0,0,0,0,0'
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"{table}, line 3"):
        load_data(arguments("ferplus", root))


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["raf", "ferplus", "folder"])
@pytest.mark.parametrize("make", [lambda root: None, lambda root: root.mkdir(), lambda root: root.write_text("a file")])
def test_a_root_without_data_is_named(make, data, tmp_path, arguments):
    root = tmp_path / "nowhere"
    make(root)
    with pytest.raises(UserError) as error:
        load_data(arguments(data, root))
    assert str(root) in str(error.value) and "\n" not in str(error.value)
    assert "--data toy" in str(error.value) or root.is_dir()


@pytest.mark.parametrize("data", ["raf", "ferplus", "folder"])
def test_a_missing_root_points_to_the_toy(data, tmp_path, arguments):
    with pytest.raises(UserError, match="--data toy needs no files"):
        load_data(arguments(data, tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "line, what",
    [
        ('fer9.png,"(0, 0, 48, 48)",1,2,3', "5 fields, expected 12"),
        ("fer9.png,0,0,48,48,1,2,3,4,5,6,7,8,9,10", "15 fields, expected 12"),
        ('fer9.png,"(0, 0, 48, 48)",1,2,3,4,5,6,7,8,9,ten', "'ten'"),
    ],
)
def test_a_malformed_line_of_label_csv_is_named(line, what, tmp_path):
    root = build_ferplus(tmp_path)
    table = root / "FER2013Train" / "label.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:4] + [line] + lines[4:]))
    with pytest.raises(UserError, match=f"label.csv, line 5: .*{what}"):
        datasets.read_ferplus(root, "train")


def test_ferplus_folder_without_label_csv_is_named(tmp_path):
    (build_ferplus(tmp_path) / "FER2013Train" / "label.csv").unlink()
    with pytest.raises(UserError, match="FER2013Train/label.csv"):
        datasets.read_ferplus(tmp_path, "train")


@pytest.mark.parametrize(
    "pixels",
    [
        "1 2 3",
        " ".join(["256"] * 2304),
        " ".join(["x"] * 2304),
        " ".join(["-1"] * 2304),
        " ".join(["1"] * 2303 + ["1_0"]),
    ],
)
def test_pixels_that_are_no_image_are_named_with_their_line(pixels, tmp_path, arguments):
    root = build_ferplus_csv(tmp_path / "data")
    lines = (root / "fer2013.csv").read_text().splitlines()
    lines[2] = f"0,{pixels},Training"
    (root / "fer2013.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="fer2013.csv, line 3: could not be read as an image"):
        load_data(arguments("ferplus", root))


def test_vote_and_pixel_tables_out_of_step_are_refused(tmp_path):
    root = build_ferplus_csv(tmp_path)
    text = (root / "fer2013new.csv").read_text()
    (root / "fer2013new.csv").write_text(text[: text.rindex("\n", 0, -1) + 1])
    with pytest.raises(UserError, match="fer2013new.csv.*in step"):
        datasets.read_ferplus(root, "train")


def test_usages_that_disagree_are_refused(tmp_path):
    root = build_ferplus_csv(tmp_path)
    lines = (root / "fer2013new.csv").read_text().splitlines()
    lines[1] = lines[1].replace(FERPLUS_USAGE["Train"], FERPLUS_USAGE["Test"])
    (root / "fer2013new.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="fer2013new.csv, line 2.*line 2"):
        datasets.read_ferplus(root, "train")


@pytest.mark.parametrize("names", [("happy",), ("happy", "Happiness"), ()])
def test_folders_of_fewer_than_two_classes_are_refused(names, tmp_path, arguments):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/data.*at least two"):
        load_data(arguments("folder", build_folder(tmp_path / "data", names)))


def test_two_folders_of_one_class_are_refused(tmp_path, arguments):
    with pytest.raises(UserError, match="two folders of one class.*Happy, joy"):
        load_data(arguments("folder", build_folder(tmp_path / "data", ("Happy", "joy", "sad"))))


def test_test_classes_that_are_not_trained_are_refused(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    build_folder(root / "test", ("fear",))
    with pytest.raises(UserError, match="test/fear"):
        load_data(arguments("folder", root))


def test_folder_split_without_images_is_named(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=f"{root} has no test images"):
        load_data(arguments("folder", root))


@pytest.mark.parametrize("split", ["test", "valid"])
def test_a_training_list_without_images_is_refused(split, tmp_path, arguments):
    for name in ("train", "test"):
        (tmp_path / "data" / "DATASET" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="data has no train images"):
        load_data(arguments("raf", tmp_path / "data", "--split", split))


def test_a_limit_that_leaves_one_class_is_refused(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data", ("happy",), 40)
    build_folder_splits(root, ("sad",), 4)
    with pytest.raises(UserError, match="fewer than two classes"):
        load_data(arguments("folder", root, "--limit", "2", "--batch-size", "2"))


def test_training_images_of_one_class_are_refused(tmp_path, arguments):
    rows = [row for row in raf_rows() if row[0].startswith("test") or row[1] == 7]
    with pytest.raises(UserError, match=f"fewer than two classes in .*{tmp_path}"):
        load_data(arguments("raf", build_raf(tmp_path / "data", rows=rows)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_raf_list_without_a_split_is_refused(split, tmp_path, arguments):
    rows = [row for row in raf_rows() if not row[0].startswith(split)]
    with pytest.raises(UserError, match=f"{tmp_path}/data has no {split} images"):
        load_data(arguments("raf", build_raf(tmp_path / "data", rows=rows)))


def test_raf_without_aligned_images_names_their_folder(raf, arguments):
    shutil.rmtree(raf / "Image")
    with pytest.raises(UserError, match=f"{raf}.*Image/aligned"):
        load_data(arguments("raf", raf))


def test_kaggle_folder_that_is_no_number_is_named(tmp_path, arguments):
    root = build_raf_kaggle(tmp_path / "data", tables=False)
    (root / "DATASET" / "train" / "4").rename(root / "DATASET" / "train" / "happy")
    with pytest.raises(UserError, match="DATASET/train/happy"):
        load_data(arguments("raf", root))


def test_winning_votes_of_the_builders_have_a_majority():
    assert majority(np.array([votes_for(c) for c in range(8)])).tolist() == list(range(8))


def test_cifar10_images_are_those_of_the_batches(tmp_path, arguments):
    train, _ = load_data(arguments("cifar10", build_cifar10(tmp_path / "data")))
    batch = np.random.default_rng(1).integers(0, 256, (20, 3072), dtype=np.uint8)  # the second
    assert torch.equal(train.images[23], torch.from_numpy(batch[3].reshape(3, 32, 32))) and train.labels[23] == 3


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta", "test_batch"])
def test_cifar10_without_a_file_is_refused(file, tmp_path, arguments):
    root = build_cifar10(tmp_path / "data")
    (root / "cifar-10-batches-py" / file).unlink()
    with pytest.raises(UserError, match=f"{root}, where cifar-10-batches-py/{file} is missing.*www.cs.toronto.edu"):
        load_data(arguments("cifar10", root))


def test_cifar10_has_no_expressions(tmp_path, arguments):
    root = build_cifar10(tmp_path / "data")
    with pytest.raises(UserError, match="expression classes"):
        load_data(arguments("cifar10", root, "--classes", "7"))
    with pytest.raises(UserError, match="confusion partner"):
        load_data(arguments("cifar10", root, "--noise", "0.2", "--noise-type", "asymmetric"))
    train, valid = load_data(arguments("cifar10", root, "--split", "valid", "--noise", "0.2"))
    assert len(train.labels) == 90 and len(valid.labels) == 10 and (train.labels != train.clean).sum() == 20


# ----------------------------------------------------------------------------------------------------------------------
# AffectNet
# ----------------------------------------------------------------------------------------------------------------------


def test_affectnet_photographs_are_cropped_to_their_faces(tmp_path, arguments, capsys):
    train, test = load_data(arguments("affectnet", build_affectnet(tmp_path / "data"), "--size", "40"))
    assert train.images.shape == (24, 3, 40, 40) and "cropped to the face boxes" in capsys.readouterr().out
    for name, image, va in zip(train.names, train.images, train.va):
        number = int(name.split("/")[1].removesuffix(".jpg"))
        assert (image.float() - (100 + number)).abs().mean() < 3  # the face alone, nothing dark
        assert va.tolist() == pytest.approx([-0.9 + 0.01 * number, 0.9 - 0.02 * number])
    assert test.names[0] == "0/100.jpg" and len(test.labels) == 8


def test_affectnet_without_contempt_and_its_automatic_part(tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    train, test = load_data(arguments("affectnet", root, "--classes", "7"))
    assert (len(train.labels), len(test.labels)) == (21, 7) and "contempt" not in train.classes and len(train.va) == 21
    automatic, test = load_data(arguments("affectnet-auto", root))
    assert automatic.names[0] == "0/200.jpg" and test.names[0] == "0/100.jpg"
    assert arguments("affectnet-auto", root).oversample and not arguments("raf").oversample
    assert not arguments("affectnet-auto", root, "--no-oversample").oversample


@pytest.mark.parametrize("inner", ["Manually_Annotated/Manually_Annotated_Images", "Manually_Annotated"])
def test_affectnet_as_its_archives_unpack(inner, tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    wanted, _ = load_data(arguments("affectnet", root))
    lists = root / "Manually_Annotated_file_lists"
    lists.mkdir()
    for name in ("training.csv", "validation.csv"):
        (root / name).rename(lists / name)
    (root / inner).parent.mkdir(exist_ok=True)
    (root / "Manually_Annotated_Images").rename(root / inner)
    found, test = load_data(arguments("affectnet", root))
    assert found.names == wanted.names and torch.equal(found.images, wanted.images) and len(test.labels) == 8


def test_a_face_box_is_rounded_to_whole_pixels(tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    wanted, _ = load_data(arguments("affectnet", root))
    text = (root / "training.csv").read_text()
    (root / "training.csv").write_text(text.replace(",10,5,32,32,", ",9.6,4.7,31.8,32.3,"))
    assert torch.equal(load_data(arguments("affectnet", root))[0].images, wanted.images)


def test_a_changed_face_box_is_cropped_again(tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    before, _ = load_data(arguments("affectnet", root))
    text = (root / "training.csv").read_text()
    (root / "training.csv").write_text(text.replace("0/0.jpg,10,5,32,32", "0/0.jpg,0,0,32,32"))
    after, _ = load_data(arguments("affectnet", root))
    assert (before.images != after.images).flatten(1).any(1).tolist() == [True] + [False] * 23


def test_images_of_the_npy_release_stand_in_the_order_of_their_numbers_and_hidden_files_are_none(tmp_path, arguments):
    root = build_affectnet_npy(tmp_path / "data")
    (root / "train_set" / "annotations" / "._0_exp.npy").write_bytes(b"of another system")
    train, _ = load_data(arguments("affectnet", root))
    assert [Path(name).stem for name in train.names] == [str(number) for number in range(24)]


def test_a_face_box_is_cut_at_the_image_and_must_meet_it(tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    text = (root / "training.csv").read_text()
    (root / "training.csv").write_text(text.replace("0/0.jpg,10,5,32,32", "0/0.jpg,-4,5,80,32"))
    assert load_data(arguments("affectnet", root))[0].images.shape[0] == 24
    (root / "training.csv").write_text(text.replace("0/0.jpg,10,5,32,32", "0/0.jpg,70,5,8,32"))
    with pytest.raises(UserError, match="0/0.jpg: the face box"):
        load_data(arguments("affectnet", root))


@pytest.mark.parametrize(
    "old, new, words",
    [
        (",0,-0.9,0.9", ",11,-0.9,0.9", "line 2: .*expression 11"),
        (",0,-0.9,0.9", ",0.5,-0.9,0.9", "line 2: .*expression 0.5"),
        (",0,-0.9,0.9", ",-1,-0.9,0.9", "line 2: .*expression -1"),
        ("0/0.jpg,10", "0/0.jpg,ten", "line 2: .*'ten'"),
        ("0/0.jpg,10", "0/0.jpg,1_0", "line 2: .*'1_0'"),
        ("0/0.jpg,10", "0/0.jpg,1e999", "line 2: .*range"),
        (",0,-0.9,0.9", ",0,-0.9,nan", "line 2: .*'nan'"),
        (",0,-0.9,0.9", ",0,-0.9", "line 2: 8 fields"),
        ("expression", "Expression", "line 1: the columns"),
        ("face_x,", "", "line 1: the columns are not"),
        ("1/1.jpg,10", "0/0.jpg,10", "line 3: 0/0.jpg stands in line 2 too, with other values"),
    ],
)
def test_a_bad_line_of_affectnet_is_refused(old, new, words, tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    (root / "training.csv").write_text((root / "training.csv").read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=words):
        load_data(arguments("affectnet", root))


def test_affectnet_says_what_is_missing(tmp_path, arguments):
    with pytest.raises(UserError, match=r"training.csv \(csv release\) and train_set/annotations \(npy release\)"):
        load_data(arguments("affectnet", tmp_path))
    root = build_affectnet_npy(tmp_path / "npy")
    with pytest.raises(UserError, match="automatically_annotated.csv"):
        load_data(arguments("affectnet-auto", root))
    (root / "train_set" / "annotations" / "3_val.npy").unlink()
    with pytest.raises(UserError, match="3_val.npy"):
        load_data(arguments("affectnet", root))
    other = build_affectnet(tmp_path / "csv")
    (other / "Manually_Annotated_Images" / "0" / "0.jpg").unlink()
    with pytest.raises(UserError, match="0/0.jpg: the file is missing"):
        load_data(arguments("affectnet", other))


def test_affectnet_columns_may_stand_in_another_order(tmp_path, arguments):
    wanted = load_train_index(arguments("affectnet", build_affectnet(tmp_path / "a")))[0]
    root = build_affectnet(tmp_path / "b")
    with open(root / "training.csv", newline="") as file:
        rows = [row[::-1] for row in csv.reader(file)]
    with open(root / "training.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    index = load_train_index(arguments("affectnet", root))[0]
    assert index.names == wanted.names and index.labels == wanted.labels and np.array_equal(index.va, wanted.va)
    assert [source.box for source in index.sources] == [source.box for source in wanted.sources]


def test_a_line_of_affectnet_that_is_repeated_counts_once(tmp_path, arguments, capsys):
    root = build_affectnet(tmp_path / "data")
    lines = (root / "training.csv").read_text().splitlines()
    (root / "training.csv").write_text("\n".join([*lines, lines[3], lines[4]]) + "\n")
    assert len(load_train_index(arguments("affectnet", root))[0].names) == 24
    assert "training.csv: lines left out that repeat an earlier one: 2" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Lists that are odd: FERPlus
# ----------------------------------------------------------------------------------------------------------------------


def rewrite(path, change):
    """change(rows of a csv file) -> the rows that it has from now on."""
    with open(path, newline="") as file:
        rows = change(list(csv.reader(file)))
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda row: [row[0], *row[2:], row[1]], "line 1: '8', where the box"),  # reordered
        (lambda row: [row[0], "0", *row[2:]], "line 1: '0', where the box"),
        (lambda row: [row[0], "(0, 0, 24, 48)", *row[2:]], "line 1: .*24.*where the box"),
        (lambda row: [row[1], row[0], *row[2:]], "line 1: 'fer0000000.png', where the box"),
        (lambda row: row[:1] + row[2:] + ["0"], "line 1: '8', where the box"),  # shifted
        (lambda row: [*row[:2], "4", *row[2:11]], "line 1: .*add up to 14"),  # shifted by a column of labels
        (lambda row: [*row[:2], *row[3:], "0"], "line 1: .*add up to 2"),
        (lambda row: [*row[:2], "0_8", *row[3:]], "line 1: .*'0_8'"),
        (lambda row: [*row[:2], "-1", "11", *row[4:]], "line 1: .*negative"),
        (lambda row: [*row[:2], "8.0", *row[3:]], "line 1: .*'8.0'"),
    ],
)
def test_columns_of_label_csv_that_are_not_what_they_should_be_are_refused(change, words, tmp_path):
    table = build_ferplus(tmp_path) / "FER2013Train" / "label.csv"
    rewrite(table, lambda rows: [change(row) for row in rows])
    with pytest.raises(UserError, match=f"{table}, {words}"):
        datasets.read_ferplus(tmp_path, "train")


@pytest.mark.parametrize(
    "votes, good",
    [([9] + [0] * 9, True), ([10] + [0] * 9, True), ([8] + [0] * 9, False), ([11] + [0] * 9, False), ([0] * 10, False)],
)
def test_votes_are_those_of_ten_people_or_nine(votes, good, tmp_path):
    table = build_ferplus(tmp_path) / "FER2013Train" / "label.csv"
    rewrite(table, lambda rows: [[*rows[0][:2], *votes], *rows[1:]])
    if good:
        assert datasets.read_ferplus(tmp_path, "train").labels[0] == 0
    else:
        with pytest.raises(UserError, match="line 1: .*add up to"):
            datasets.read_ferplus(tmp_path, "train")


def test_a_row_of_label_csv_with_other_votes_for_an_image_is_refused(tmp_path):
    table = build_ferplus(tmp_path) / "FER2013Train" / "label.csv"
    rewrite(table, lambda rows: [*rows, [*rows[2][:2], *rows[3][2:]]])
    with pytest.raises(UserError, match="line 28: fer0000003.png stands in line 3 too, with other values"):
        datasets.read_ferplus(tmp_path, "train")


def test_a_repeated_row_of_label_csv_counts_once(tmp_path, capsys):
    table = build_ferplus(tmp_path) / "FER2013Train" / "label.csv"
    rewrite(table, lambda rows: [*rows, rows[2]])
    assert len(datasets.read_ferplus(tmp_path, "train").names) == 24
    assert f"{table}: lines left out that repeat an earlier one: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, change",
    [
        ("fer2013new.csv", lambda rows: rows[1:]),
        ("fer2013.csv", lambda rows: rows[1:]),
        ("fer2013new.csv", lambda rows: [[*row[:2], *row[3:], row[2]] for row in rows]),
        ("fer2013new.csv", lambda rows: [[row[1], row[0], *row[2:]] for row in rows]),
        ("fer2013.csv", lambda rows: [[row[2], row[1], row[0]] for row in rows]),
        ("fer2013new.csv", lambda rows: []),
        ("fer2013.csv", lambda rows: []),
    ],
)
def test_tables_of_ferplus_with_another_first_line_are_refused(file, change, tmp_path):
    rewrite(build_ferplus_csv(tmp_path) / file, change)
    with pytest.raises(
        UserError, match=f"{file}: the first line is not (Usage,Image name,neutral|emotion,pixels,Usage)"
    ):
        datasets.read_ferplus(tmp_path, "train")


@pytest.mark.parametrize("file", ["fer2013new.csv", "fer2013.csv"])
def test_tables_of_ferplus_of_two_lengths_are_refused(file, tmp_path):
    rewrite(build_ferplus_csv(tmp_path) / file, lambda rows: rows[:-1])
    with pytest.raises(UserError, match=f"/{file}: ends before the other file; they must be in step"):
        datasets.read_ferplus(tmp_path, "train")


def test_a_row_for_another_in_fer2013new_is_refused(tmp_path):
    """One row twice, the next one gone: the number of rows is right, the votes are not in step."""
    rewrite(build_ferplus_csv(tmp_path) / "fer2013new.csv", lambda rows: [*rows[:6], rows[5], *rows[7:]])
    with pytest.raises(UserError, match="line 7: fer0000004.png stands in line 6 too"):
        datasets.read_ferplus(tmp_path, "train")


def test_rows_of_fer2013new_without_a_name_are_passed_over_in_step(tmp_path, arguments):
    """The votes of a row without a name may be anything: it has none."""
    root = build_ferplus_csv(tmp_path / "data")
    wanted = load_data(arguments("ferplus", root))[0]
    rewrite(root / "fer2013new.csv", lambda rows: [row if row[1] else [row[0], "", *[""] * 10] for row in rows])
    train = load_data(arguments("ferplus", root))[0]
    assert train.names == wanted.names and torch.equal(train.images, wanted.images)


def test_the_names_that_fer2013new_gives_twice_are_told_apart(tmp_path, arguments):
    root = build_ferplus_csv(tmp_path / "data")
    name = datasets.FERPLUS_TWICE[0]
    rewrite(
        root / "fer2013new.csv",
        lambda rows: [*rows[:5], [rows[5][0], name, *rows[5][2:]], [rows[6][0], name, *rows[6][2:]], *rows[7:]],
    )
    index = read_index(arguments("ferplus", root), "train")
    twice = [i for i, found in enumerate(index.names) if "6953" in found]
    assert [index.names[i] for i in twice] == [name, "fer0006953-line7.png"]
    assert [index.labels[i] for i in twice] == [3, 4] and len(set(index.names)) == 24
    write_labels(tmp_path / "labels.csv", index.names, torch.tensor(index.labels), index.classes)
    assert read_labels(tmp_path / "labels.csv", index).tolist() == index.labels


# ----------------------------------------------------------------------------------------------------------------------
# Lists that are odd: RAF-DB
# ----------------------------------------------------------------------------------------------------------------------


def test_a_raf_name_of_neither_split_is_refused(raf):
    with open(raf / "EmoLabel" / "list_patition_label.txt", "a") as file:
        file.write("valid_0001.jpg 3\n")
    for split in ("train", "test"):
        with pytest.raises(
            UserError, match="list_patition_label.txt, line 43: valid_0001.jpg does not begin with train or"
        ):
            datasets.read_raf(raf, split)


def test_a_raf_name_in_the_list_of_the_other_split_is_refused(tmp_path):
    root = build_raf(tmp_path / "data", separate=True)
    with open(root / "EmoLabel" / "train_label.txt", "a") as file:
        file.write("test_0001.jpg 2\n")
    with pytest.raises(UserError, match="train_label.txt, line 29: test_0001.jpg does not begin with train"):
        datasets.read_raf(root, "train")
    assert len(datasets.read_raf(root, "test").names) == RAF_TEST


@pytest.mark.parametrize("name", ["train_00002.jpg", "train_00002_aligned.jpg"])
@pytest.mark.parametrize("label", [3, 4])
def test_raf_images_with_two_lines(label, name, raf, capsys):
    with open(raf / "EmoLabel" / "list_patition_label.txt", "a") as file:
        file.write(f"{name} {label}\n")
    if label == 3:
        assert datasets.read_raf(raf, "train").names == [name for name, _ in raf_rows("train")]
        assert "list_patition_label.txt: lines left out that repeat an earlier one: 1" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=f"line 43: {name} stands in line 2 too, with other values"):
            datasets.read_raf(raf, "train")


def test_kaggle_images_with_two_lines(tmp_path):
    root = build_raf_kaggle(tmp_path / "data")
    table = root / "train_labels.csv"
    text = table.read_text()
    table.write_text(text + text.splitlines()[1] + "\n")
    assert len(datasets.read_raf(root, "train").names) == RAF_TRAIN
    table.write_text(text + text.splitlines()[1][:-1] + "7\n")
    with pytest.raises(UserError, match="train_labels.csv, line 30: train_00001_aligned.jpg stands in line 2 too"):
        datasets.read_raf(root, "train")


def test_a_kaggle_image_in_two_folders_is_refused(tmp_path):
    root = build_raf_kaggle(tmp_path / "data", tables=False)
    folder = root / "DATASET" / "train"
    shutil.copy(folder / "2" / "train_00001_aligned.jpg", folder / "5" / "train_00001.jpg")
    with pytest.raises(UserError, match="5/train_00001.jpg is there as .*2/train_00001_aligned.jpg too"):
        datasets.read_raf(root, "train")


@pytest.mark.parametrize(
    "line", ["train_00003.jpg 0_4", "train_00003.jpg ٤", "train_00003.jpg 4.0", "train_00003.jpg 1e0"]
)
def test_numbers_in_odd_spellings_are_refused(line, raf):
    listing = raf / "EmoLabel" / "list_patition_label.txt"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(UserError, match="list_patition_label.txt, line 3"):
        datasets.read_raf(raf, "train")


# ----------------------------------------------------------------------------------------------------------------------
# Folders that are odd
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Test"),
        ("TRAIN", "TEST"),
        ("training", "validation"),
        ("training", "testing"),
        ("Training", "Validation"),
        ("valid", "test"),
        ("val", "test"),
        ("dev", "eval"),
    ],
)
def test_splits_are_not_learned_as_classes(names, tmp_path, arguments):
    for name in names:
        build_folder(tmp_path / "data" / name)
    with pytest.raises(UserError, match=f"{tmp_path}/data/({'|'.join(names)}): a split where classes are expected"):
        load_data(arguments("folder", tmp_path / "data"))


def test_splits_below_a_class_folder_are_refused(tmp_path, arguments):
    build_folder_splits(tmp_path / "data" / "images")
    build_folder(tmp_path / "data", ("notes",))
    with pytest.raises(UserError, match="data/images/test: a split"):
        load_data(arguments("folder", tmp_path / "data"))


def test_train_and_test_may_not_be_one_folder(tmp_path, arguments):
    build_folder(tmp_path / "data" / "train")
    (tmp_path / "data" / "test").symlink_to("train")
    with pytest.raises(UserError, match="data/train and .*data/test are one folder"):
        load_data(arguments("folder", tmp_path / "data"))


def test_links_to_folders_are_followed(tmp_path, arguments):
    wanted = load_train_index(arguments("folder", build_folder_splits(tmp_path / "data")))[0]
    root = build_folder_splits(tmp_path / "linked")
    (root / "train" / "sad").rename(tmp_path / "elsewhere")
    (root / "train" / "sad").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "happy").rename(tmp_path / "deeper")
    (root / "train" / "happy").mkdir()
    (root / "train" / "happy" / "part").symlink_to(tmp_path / "deeper")
    index = load_train_index(arguments("folder", root))[0]
    assert [name.replace("part/", "") for name in index.names] == wanted.names and index.labels == wanted.labels


@pytest.mark.parametrize(
    "link, target", [("train/joyful", "happy"), ("train/happy/again", "."), ("train/sad/in", "../happy")]
)
def test_a_folder_that_is_met_twice_is_refused(link, target, tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    (root / link).symlink_to(target)
    with pytest.raises(UserError, match="the same folder as"):
        load_data(arguments("folder", root))


@pytest.mark.parametrize(
    "link, target", [("train/fear", "nowhere"), ("train/happy/4.png", "../gone.png"), ("train/fear", "fear")]
)
def test_links_that_lead_nowhere_are_refused(link, target, tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    (root / link).symlink_to(target)
    with pytest.raises(UserError, match=f"{root / link}: a link that leads nowhere"):
        load_data(arguments("folder", root))


@pytest.mark.parametrize("place", ["train", "train/sad", "train/sad/below"])
def test_a_folder_that_cannot_be_listed_is_named(place, tmp_path, arguments, monkeypatch):
    root, scandir = build_folder_splits(tmp_path / "data"), os.scandir
    (root / "train" / "sad" / "below").mkdir()

    def refuse(path):
        if Path(path) == root / place:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{root / place}: the folder cannot be listed .Permission denied"):
        load_data(arguments("folder", root))


def test_a_class_without_images_is_refused(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    (root / "train" / "cache").mkdir()
    (root / "train" / "cache" / "a.npy").write_bytes(b"")
    with pytest.raises(UserError, match="train/cache has no images .*it is no class"):
        load_data(arguments("folder", root))


def test_a_class_without_test_images_is_taken(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    shutil.rmtree(root / "test" / "sad")
    (root / "test" / "sad").mkdir()
    assert 2 not in load_data(arguments("folder", root))[1].labels


def test_images_that_are_not_read_are_counted(tmp_path, arguments, capsys):
    root = build_folder_splits(tmp_path / "data")
    for name in ("a.gif", "b.GIF", "c.heic", "d.txt", ".e.gif"):
        (root / "train" / "sad" / name).write_bytes(b"")
    assert len(load_train_index(arguments("folder", root))[0].names) == 12
    assert (
        f"{root / 'train'}: images that are not read, for their formats: 2 .gif, 1 .heic\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", [b"a\nb.png", b"\xff.png", b"\x1b[31m.png", "\u2028.png".encode()])
def test_images_whose_names_no_list_can_hold_are_refused(name, tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    shutil.copy(root / "train" / "sad" / "0.png", os.path.join(os.fsencode(root), b"train/sad", name))
    with pytest.raises(UserError, match="holds a control character or is not UTF-8") as error:
        load_data(arguments("folder", root))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", [b"fear\n", b"f\xe9ar", b"\tfear"])
def test_classes_whose_names_no_list_can_hold_are_refused(name, tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    shutil.copytree(
        root / "train" / "sad", os.path.join(os.fsencode(root), b"train", name).decode(errors="surrogateescape")
    )
    with pytest.raises(UserError, match="holds a control character or is not UTF-8") as error:
        load_data(arguments("folder", root))
    assert str(error.value).isprintable()


def test_names_of_cifar10_classes_are_checked(tmp_path, arguments):
    root = build_cifar10(tmp_path / "data")
    names = [f"class {c}" for c in range(9)] + ["a\nb"]
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(UserError, match="holds a control character"):
        load_data(arguments("cifar10", root))


def test_a_name_with_a_line_end_in_a_quoted_field_is_refused(tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    rewrite(root / "training.csv", lambda rows: [rows[0], ["0/\n0.jpg", *rows[1][1:]], *rows[2:]])
    with pytest.raises(UserError) as error:
        load_data(arguments("affectnet", root))
    assert str(error.value).isprintable()
