import csv
import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import (
    BUILDERS,
    FERPLUS_USAGE,
    RAF_TEST,
    RAF_TRAIN,
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
from datasets import (
    AFFECTNET_CLASSES,
    FERPLUS_CLASSES,
    RAF_CLASSES,
    RAF_CONFUSIONS,
    Index,
    UserError,
    asymmetric_noise,
    confusion_pairs,
    label_base,
    load_data,
    load_train_index,
    majority,
    read_index,
    read_labels,
    symmetric_noise,
    write_labels,
)
from PIL import Image


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def named(split):
    """{image name: class name} of a split or an index."""
    return {name: split.classes[label] for name, label in zip(split.names, split.labels)}


def key_images(split):
    """{image name without "_aligned": pixels} of a split."""
    return {datasets.name_key(name): image for name, image in zip(split.names, split.images)}


def fail(*args):
    raise AssertionError("an image was decoded")


# ----------------------------------------------------------------------------------------------------------------------
# Layouts
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, data, shape, counts, classes", [
    ("raf", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
    ("raf lists", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
    ("kaggle", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
    ("kaggle folders", "raf", (3, 100, 100), (28, 14), RAF_CLASSES),
    ("ferplus", "ferplus", (1, 48, 48), (24, 8), FERPLUS_CLASSES),
    ("ferplus csv", "ferplus", (1, 48, 48), (24, 8), FERPLUS_CLASSES),
    ("affectnet aligned", "affectnet", (3, 32, 32), (24, 8), AFFECTNET_CLASSES),
    ("affectnet npy", "affectnet", (3, 32, 32), (24, 8), AFFECTNET_CLASSES),
    ("affectnet aligned", "affectnet-auto", (3, 32, 32), (16, 8), AFFECTNET_CLASSES),
    ("cifar10", "cifar10", (3, 32, 32), (100, 20), ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
    ("folder", "folder", (3, 20, 20), (9, 3), ("anger", "happiness", "sadness")),
    ("folder splits", "folder", (3, 20, 20), (12, 6), ("anger", "happiness", "sadness")),
])
def test_a_layout_gives_its_images_labels_and_classes(layout, data, shape, counts, classes, tmp_path, arguments):
    for split, count in zip(load_data(arguments(data, BUILDERS[layout](tmp_path / "data"))), counts):
        assert split.images.shape == (count, *shape) and split.images.dtype == torch.uint8
        assert split.labels.shape == (count,) and split.labels.dtype == torch.int64
        assert torch.bincount(split.labels, minlength=len(classes)).tolist() == [count // len(classes)] * len(classes)
        assert split.classes == classes
        assert len(set(split.names)) == count
        assert split.clean is None and (split.va is None) == (not data.startswith("affectnet"))


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
    for a, b in zip(load_data(arguments("raf", raf)), load_data(arguments("raf", BUILDERS[layout](tmp_path / "other")))):
        assert {datasets.name_key(n): c for n, c in named(a).items()} == {datasets.name_key(n): c for n, c in named(b).items()}
        images = key_images(b)
        assert all(torch.equal(image, images[key]) for key, image in key_images(a).items())


def test_raf_may_count_from_0(tmp_path, raf):
    other = build_raf(tmp_path / "zero", base=0)
    assert datasets.read_raf(other, "train").labels == datasets.read_raf(raf, "train").labels


@pytest.mark.parametrize("change", ["list_partition_label.txt", "crlf", "blank lines", "aligned names", "in basic", "inside basic"])
def test_raf_variants_are_read(change, raf):
    wanted = datasets.read_raf(raf, "test")
    listing, root = raf / "EmoLabel" / "list_patition_label.txt", raf
    text = listing.read_text()
    if change.startswith("list"):
        listing.rename(listing.with_name(change))
    elif change == "crlf":
        listing.write_bytes(text.replace("\n", "\r\n").encode())
    elif change == "blank lines":
        listing.write_text("\n" + text.replace("\n", "\n\n"))
    elif change == "aligned names":
        listing.write_text(text.replace(".jpg", "_aligned.jpg"))
    else:
        root = raf.with_name("outer")
        root.mkdir()
        raf.rename(root / "basic")
        root = root / "basic" if change == "inside basic" else root
    index = datasets.read_raf(root, "test")
    assert index.labels == wanted.labels and all(source.is_file() for source in index.sources)


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


def test_folder_passes_over_hidden_folders_and_other_files(tmp_path):
    root = build_folder(tmp_path / "data")
    build_folder(root, (".hidden",))
    (root / "happy" / "notes.txt").write_text("not an image")
    (root / "readme.md").write_text("not a class")
    index = datasets.read_folder(root, "train")
    assert index.classes == ("anger", "happiness", "sadness") and len(index.names) == 9


@pytest.mark.parametrize("name, expected", [("Happy", "happiness"), (" ANGRY ", "anger"), ("neutral", "neutral"), ("Dog", "dog")])
def test_canonical_names(name, expected):
    assert datasets.canonical(name) == expected


# ----------------------------------------------------------------------------------------------------------------------
# The base of labels; the majority rule
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, base", [(range(1, 8), 1), (range(7), 0), ([0, 6], 0), ([1, 7], 1), ([0, 3], 0), ([5, 7], 1)])
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


@pytest.mark.parametrize("votes, winner", [
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
])
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
    chosen = [load_train_index(arguments("raf", raf, "--limit", "10", "--noise", "0.5", *seed))[0].names
              for seed in (["--seed", "1"], ["--seed", "2"], ["--noise-seed", "9"])]
    assert chosen[0] == chosen[1] == chosen[2]


def test_limit_is_taken_before_noise(raf, arguments):
    _, noisy, clean = load_train_index(arguments("raf", raf, "--limit", "14", "--noise", "0.5"))
    assert torch.bincount(clean).tolist() == [2] * 7
    assert torch.bincount(clean[noisy != clean]).tolist() == [1] * 7


def test_limit_of_everything_is_everything(raf, arguments):
    assert load_train_index(arguments("raf", raf, "--limit", str(RAF_TRAIN)))[0].names == datasets.read_raf(raf, "train").names


def test_limit_above_the_number_of_images_is_refused(raf, arguments):
    with pytest.raises(UserError, match="--limit 29.* 28 training images"):
        load_data(arguments("raf", raf, "--limit", "29"))


def test_stratified_rounds_by_largest_remainder():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    chosen = datasets.stratified(labels, 7, generator())  # 3.5, 2.1, 1.4
    assert [sum(labels[i] == c for i in chosen) for c in range(3)] == [4, 2, 1]
    assert chosen == sorted(set(chosen))


@pytest.mark.parametrize("data, build, size", [
    ("raf", build_raf, RAF_TRAIN), ("folder", lambda root: build_folder_splits(root, count=10), 30),
])
def test_valid_is_a_tenth_of_the_training_set(data, build, size, tmp_path, arguments):
    root = build(tmp_path / "data")
    whole, _ = load_data(arguments(data, root))
    train, valid = load_data(arguments(data, root, "--split", "valid"))
    assert len(valid.names) == len(valid.images) == size // 10 and len(whole.names) == size
    assert set(train.names).isdisjoint(valid.names)
    assert named(train) | named(valid) == named(whole)
    images = dict(zip(whole.names, whole.images))
    assert all(torch.equal(image, images[name]) for split in (train, valid) for name, image in zip(split.names, split.images))


def test_valid_is_stratified(tmp_path, arguments):
    valid = read_index(arguments("folder", build_folder_splits(tmp_path / "data", count=10), "--split", "valid"), "valid")
    assert sorted(valid.labels) == [0, 1, 2]


def test_valid_is_the_same_for_every_seed(raf, arguments):
    first, second = (read_index(arguments("raf", raf, "--split", "valid", "--seed", seed), "valid").names for seed in "12")
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
    clean, noisy = (load_data(arguments("raf", raf, "--split", "valid", *noise))[1] for noise in ([], ["--noise", "0.9"]))
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


def test_a_16_bit_grey_image_keeps_its_greys(tmp_path, arguments):
    root = build_folder(tmp_path / "data", size=(16, 16), grey=True)
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for path in root.rglob("*.png"):
        Image.fromarray(ramp).save(path)
    images = load_data(arguments("folder", root))[0].images
    assert images.shape[1] == 1 and images[0].flatten().tolist() == list(range(256))


def test_an_image_that_claims_to_be_huge_is_refused(tmp_path, arguments):
    root = build_folder(tmp_path / "data")
    path = next(root.rglob("*.png"))
    save(picture(1, 20, 20), path.with_suffix(".bmp"))
    data = bytearray(path.with_suffix(".bmp").read_bytes())
    data[18:26] = (40000).to_bytes(4, "little") * 2
    path.with_suffix(".bmp").write_bytes(data)
    with pytest.raises(UserError, match=str(path.with_suffix(".bmp"))):
        load_data(arguments("folder", root))


def test_negative_votes_are_refused(tmp_path, arguments):
    root = build_ferplus(tmp_path / "data")
    table = root / "FER2013Train" / "label.csv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].split('"')[0] + '"(0, 0, 48, 48)",8,-9,0,0,0,0,0,0,0,0'
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"{table}, line 3"):
        load_data(arguments("ferplus", root))


def test_a_damaged_cache_is_decoded_anew(raf, arguments):
    first = load_data(arguments("raf", raf))[0].images
    args = arguments("raf", raf)
    for file in Path(args.cache).glob("*.npy"):
        file.write_bytes(file.read_bytes()[:5000])
    assert torch.equal(load_data(args)[0].images, first)


def test_whole_names_decide_for_folders(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    index = load_train_index(arguments("folder", root))[0]
    file = tmp_path / "labels.csv"
    file.write_text("name,label\n" + "".join(f"{name.replace('train/', 'test/')},sad\n" for name in index.names))
    with pytest.raises(UserError, match="no label for"):
        read_labels(file, index)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding and its cache
# ----------------------------------------------------------------------------------------------------------------------


def test_second_load_does_not_decode(raf, arguments, monkeypatch):
    first = load_data(arguments("raf", raf))
    monkeypatch.setattr(datasets, "decode", fail)
    for a, b in zip(first, load_data(arguments("raf", raf))):
        assert torch.equal(a.images, b.images) and a.names == b.names


def test_noise_and_relabelled_lists_do_not_rebuild(raf, arguments, monkeypatch):
    load_data(arguments("raf", raf))
    monkeypatch.setattr(datasets, "decode", fail)
    noisy, _ = load_data(arguments("raf", raf, "--noise", "0.5"))
    assert (noisy.labels != noisy.clean).sum() == 14
    listing = raf / "EmoLabel" / "list_patition_label.txt"
    listing.write_text(listing.read_text().replace("train_00001.jpg 2", "train_00001.jpg 7"))
    train, _ = load_data(arguments("raf", raf))
    assert named(train)["train_00001.jpg"] == "neutral"


def test_a_changed_image_is_decoded_again(raf, arguments):
    before, _ = load_data(arguments("raf", raf))
    path = raf / "Image" / "aligned" / "train_00005_aligned.jpg"
    save(Image.new("RGB", (100, 100)), path)
    os.utime(path, ns=(1, 1))
    after, _ = load_data(arguments("raf", raf))
    changed = [name for name, a, b in zip(before.names, before.images, after.images) if not torch.equal(a, b)]
    assert changed == ["train_00005.jpg"] and after.images[4].max() == 0


def test_a_touched_image_alone_is_noticed(raf, arguments, monkeypatch):
    load_data(arguments("raf", raf))
    os.utime(raf / "Image" / "aligned" / "test_0001_aligned.jpg", ns=(1, 1))
    monkeypatch.setattr(datasets, "decode", fail)
    with pytest.raises(AssertionError, match="decoded"):
        load_data(arguments("raf", raf))


def test_changed_pixels_of_fer2013_are_decoded_again(tmp_path, arguments):
    root = build_ferplus_csv(tmp_path / "data")
    load_data(arguments("ferplus", root))
    lines = (root / "fer2013.csv").read_text().splitlines()
    lines[1] = f"0,{' '.join(['7'] * 2304)},Training"
    (root / "fer2013.csv").write_text("\n".join(lines))
    train, _ = load_data(arguments("ferplus", root))
    assert train.images[0].unique().tolist() == [7]


@pytest.mark.parametrize("damage", ["half written", "stale", "missing", "not an object", "binary"])
def test_a_note_that_does_not_fit_is_not_used(damage, raf, arguments):
    good, _ = load_data(arguments("raf", raf))
    cache = raf.parent / "cache"
    note, file = (next(cache.glob(f"raf-*-train*{suffix}")) for suffix in (".json", ".npy"))
    text = note.read_text()
    if damage == "missing":
        note.unlink()
    else:
        damaged = {"half written": text[: len(text) // 2], "stale": json.dumps(json.loads(text) | {"inputs": "0"}), "not an object": "[]"}
        note.write_bytes(damaged.get(damage, "\udcff").encode(errors="surrogateescape"))
    np.save(file, np.zeros((RAF_TRAIN, 3, 100, 100), np.uint8))
    again, _ = load_data(arguments("raf", raf))
    assert torch.equal(again.images, good.images)
    assert json.loads(note.read_text()) == json.loads(text)


def test_a_note_without_images_is_not_used(raf, arguments):
    good, _ = load_data(arguments("raf", raf))
    next((raf.parent / "cache").glob("raf-*-train*.npy")).unlink()
    assert torch.equal(load_data(arguments("raf", raf))[0].images, good.images)


def test_a_failed_build_leaves_no_cache(raf, arguments):
    (raf / "Image" / "aligned" / "train_00020_aligned.jpg").write_bytes(b"no image")
    with pytest.raises(UserError):
        load_data(arguments("raf", raf))
    cache = raf.parent / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_failed_rebuild_withdraws_the_old_note(raf, arguments, monkeypatch):
    load_data(arguments("raf", raf))
    path = raf / "Image" / "aligned" / "train_00020_aligned.jpg"
    good = path.read_bytes()
    path.write_bytes(good[:-600])
    with pytest.raises(UserError):
        load_data(arguments("raf", raf))
    cache = raf.parent / "cache"
    assert not list(cache.glob("*-train*.json")) and not list(cache.glob("*.tmp*"))
    path.write_bytes(good)
    assert len(load_data(arguments("raf", raf))[0].images) == RAF_TRAIN


def test_sizes_limits_and_roots_have_caches_of_their_own(raf, tmp_path, arguments, monkeypatch):
    other = build_raf(tmp_path / "raf2")
    combinations = [(root, *flags) for root in (raf, other) for flags in ([], ["--size", "64"], ["--limit", "14"])]
    for root, *flags in combinations:
        load_data(arguments("raf", root, *flags))
    monkeypatch.setattr(datasets, "decode", fail)
    for root, *flags in combinations:
        load_data(arguments("raf", root, *flags))


@pytest.mark.parametrize("limit, mode", [(0, "c"), (2**30, None)])
def test_large_caches_are_memory_mapped(limit, mode, raf, arguments, monkeypatch):
    expected = load_data(arguments("raf", raf))[0].images
    modes, load = [], np.load
    monkeypatch.setattr(datasets, "IN_MEMORY", limit)
    monkeypatch.setattr(np, "load", lambda file, mmap_mode=None: modes.append(mmap_mode) or load(file, mmap_mode=mmap_mode))
    images = load_data(arguments("raf", raf))[0].images
    assert modes == [mode, mode] and torch.equal(images, expected)


def test_writing_into_mapped_images_leaves_the_cache_alone(raf, arguments, monkeypatch):
    monkeypatch.setattr(datasets, "IN_MEMORY", 0)
    images = load_data(arguments("raf", raf))[0].images
    before = images.clone()
    images.zero_()
    assert torch.equal(load_data(arguments("raf", raf))[0].images, before)


def test_mixed_sizes_become_size(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    save(picture(1, 30, 30), root / "train" / "happy" / "0.png")
    train, test = load_data(arguments("folder", root, "--size", "32"))
    assert train.images.shape[2:] == (32, 32) and test.images.shape[2:] == (20, 20)


@pytest.mark.parametrize("size, expected", [((20, 20), 20), ((32, 32), 32), ((40, 40), 32), ((20, 24), 32), ((60, 40), 32)])
def test_small_squares_stay_native_and_others_become_size(size, expected, tmp_path, arguments):
    train, _ = load_data(arguments("folder", build_folder(tmp_path / "data", size=size), "--size", "32"))
    assert train.images.shape[2:] == (expected, expected)


def test_resizing_does_not_crop(tmp_path, arguments):
    root = build_folder(tmp_path / "data")
    halves = np.zeros((40, 120, 3), np.uint8)
    halves[:, 60:] = 255
    for path in root.glob("*/*.png"):
        save(Image.fromarray(halves), path)
    image = load_data(arguments("folder", root, "--size", "32"))[0].images[0]
    assert image[:, :, :15].max() == 0 and image[:, :, 17:].min() == 255


def test_shrinking_averages(tmp_path, arguments):
    root = build_folder(tmp_path / "data")
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    for path in root.glob("*/*.png"):
        save(Image.fromarray(checks), path)
    image = load_data(arguments("folder", root, "--size", "16"))[0].images[0]
    assert image.min() >= 125 and image.max() <= 130


def test_grey_images_stay_one_channel(tmp_path, arguments):
    train, test = load_data(arguments("folder", build_folder(tmp_path / "data", grey=True)))
    assert train.images.shape == (9, 1, 20, 20) and test.images.shape == (3, 1, 20, 20)
    expected = np.asarray(Image.open(tmp_path / "data" / train.names[0]))
    assert np.array_equal(train.images[0, 0], expected)


def test_grey_among_coloured_images_becomes_three_channels(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    save(picture(5, 20, 20, grey=True), root / "train" / "happy" / "0.png")
    train, _ = load_data(arguments("folder", root))
    image = train.images[train.names.index("train/happy/0.png")]
    assert image.shape == (3, 20, 20) and torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_other_colour_modes_are_converted(mode, tmp_path):
    save(picture(1, 20, 20).convert(mode), tmp_path / "a.png")
    assert datasets.decode(tmp_path / "a.png", (20, 20), False).shape == (3, 20, 20)
    assert datasets.decode(tmp_path / "a.png", (20, 20), True).shape == (1, 20, 20)


@pytest.mark.parametrize("orientation, side", [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_images_are_turned_upright(orientation, side, tmp_path, arguments):
    root = build_folder(tmp_path / "data")
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:, :20] = 255  # stored with its left half white
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in root.glob("*/*.png"):
        save(Image.fromarray(pixels), path, exif=exif)
    image = load_data(arguments("folder", root, "--size", "32"))[0].images[0].float()
    halves = {"left": image[:, :, :16], "right": image[:, :, 16:], "top": image[:, :16], "bottom": image[:, 16:]}
    assert max(halves, key=lambda name: halves[name].mean()) == side and halves[side].mean() > 240


# ----------------------------------------------------------------------------------------------------------------------
# Label noise
# ----------------------------------------------------------------------------------------------------------------------

SIZES = [17, 3, 0, 40, 10, 1, 25]
LABELS = torch.arange(7).repeat_interleave(torch.tensor(SIZES))[torch.randperm(sum(SIZES), generator=generator(5))]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.25, 0.4, 0.5, 0.77, 0.99])
def test_symmetric_noise_moves_the_exact_share_of_each_class(rate):
    noisy = symmetric_noise(LABELS, rate, 7, generator())
    moved = torch.bincount(LABELS[noisy != LABELS], minlength=7).tolist()
    assert moved == [round(rate * n) for n in SIZES]
    assert noisy.dtype == torch.int64 and noisy.min() >= 0 and noisy.max() < 7


def test_symmetric_noise_of_two_classes_is_the_other_class():
    labels = torch.tensor([0, 1] * 20)
    noisy = symmetric_noise(labels, 0.5, 2, generator())
    assert (noisy != labels).sum() == 20 and set(noisy.tolist()) == {0, 1}


@pytest.mark.parametrize("own", [0, 3, 6])
def test_symmetric_noise_is_uniform_over_the_other_classes(own):
    noisy = symmetric_noise(torch.full((60000,), own), 0.5, 7, generator())
    counts = torch.bincount(noisy, minlength=7)
    others = torch.cat([counts[:own], counts[own + 1 :]]).double()
    assert counts[own] == 30000
    assert ((others - 5000) ** 2 / 5000).sum() < 25.7  # chi-square, 5 degrees of freedom, p = 0.0001


def test_symmetric_noise_moves_any_member_alike():
    moved = sum((symmetric_noise(torch.zeros(10, dtype=torch.int64), 0.3, 3, generator(seed)) != 0).double() for seed in range(1000))
    assert (moved - 300).abs().max() < 60  # four standard deviations


@pytest.mark.parametrize("make", [lambda g: symmetric_noise(LABELS, 0.4, 7, g), lambda g: asymmetric_noise(LABELS, 0.4, RAF_CONFUSIONS, g)])
def test_noise_depends_on_the_seed_alone_and_leaves_its_input(make):
    before = LABELS.clone()
    first = make(generator(1))
    torch.rand(5)
    assert torch.equal(first, make(generator(1)))
    assert not torch.equal(first, make(generator(2)))
    assert torch.equal(LABELS, before)


@pytest.mark.parametrize("labels, rate, classes", [
    ([0, 1], 1.0, 2), ([0, 1], -0.1, 2), ([0, 1], float("nan"), 2), ([0, 0], 0.2, 1), ([0, 2], 0.2, 2), ([-1, 1], 0.2, 2),
])
def test_symmetric_noise_refuses_what_is_out_of_range(labels, rate, classes):
    with pytest.raises(UserError):
        symmetric_noise(torch.tensor(labels), rate, classes, generator())


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.35, 0.5, 0.99])
def test_asymmetric_noise_moves_the_exact_share_to_the_partner(rate):
    noisy = asymmetric_noise(LABELS, rate, RAF_CONFUSIONS, generator())
    for c, n in enumerate(SIZES):
        moved = noisy[(LABELS == c) & (noisy != LABELS)]
        assert len(moved) == round(rate * n) and (moved == RAF_CONFUSIONS[c]).all()


@pytest.mark.parametrize("labels, rate, pairs", [
    ([0, 1], 1.0, {0: 1, 1: 0}), ([0, 1], -0.1, {0: 1, 1: 0}), ([0, 1, 2], 0.2, {0: 1, 1: 0}), ([0, 1], 0.2, {0: 1}), ([0, 1], 0.2, {}),
    ([0, 1], 0.2, {0: 1, 1: 1}), ([-1, 0], 0.2, {0: 1, 1: 0}),
])
def test_asymmetric_noise_refuses_what_is_out_of_range(labels, rate, pairs):
    with pytest.raises(UserError):
        asymmetric_noise(torch.tensor(labels), rate, pairs, generator())


CONFUSIONS = {
    "surprise": "anger", "fear": "surprise", "disgust": "anger", "happiness": "neutral", "sadness": "neutral", "anger": "happiness",
    "neutral": "sadness",
}


def test_raf_confusions_are_the_seven_published_pairs():
    order = ["surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"]
    assert {order[a]: order[b] for a, b in RAF_CONFUSIONS.items()} == CONFUSIONS


def test_confusion_pairs_of_raf_are_the_table():
    assert confusion_pairs(RAF_CLASSES) == RAF_CONFUSIONS


@pytest.mark.parametrize("classes", [FERPLUS_CLASSES, AFFECTNET_CLASSES])
def test_confusion_pairs_go_by_name(classes):
    pairs = {classes[a]: classes[b] for a, b in confusion_pairs(classes).items()}
    assert pairs == CONFUSIONS | {"contempt": "neutral"}


@pytest.mark.parametrize("classes", [("cat", "dog"), ("happiness", "sadness"), ("neutral", "sadness", "surprise")])
def test_confusion_pairs_refuse_classes_without_partners(classes):
    with pytest.raises(UserError, match="no confusion partner"):
        confusion_pairs(classes)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_load_data_keeps_clean_labels_and_the_test_split(kind, raf, arguments):
    own_train, own_test = load_data(arguments("raf", raf))
    train, test = load_data(arguments("raf", raf, "--noise", "0.5", "--noise-type", kind))
    assert torch.equal(train.clean, own_train.labels) and torch.equal(test.labels, own_test.labels)
    assert torch.bincount(train.clean[train.labels != train.clean]).tolist() == [2] * 7


def test_noise_seed_is_the_seed_unless_given(raf, arguments):
    def labels(*flags):
        return load_train_index(arguments("raf", raf, "--noise", "0.5", *flags))[1]

    assert torch.equal(labels("--seed", "3"), labels("--seed", "8", "--noise-seed", "3"))
    assert not torch.equal(labels("--seed", "3"), labels("--seed", "4"))


# ----------------------------------------------------------------------------------------------------------------------
# Label files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(raf):
    return datasets.read_raf(raf, "train")


def noisy_of(index):
    """The labels of an index with every seventh moved on by one."""
    return torch.tensor([(label + (i % 7 == 0)) % len(index.classes) for i, label in enumerate(index.labels)])


def published(style, index, noisy):
    """The text of the noisy label files that other projects have published, and of csv files."""
    pairs = list(zip(index.names, noisy.tolist()))
    if style == "SCN":  # path and label from 0, training images alone
        return "".join(f"train/{name.replace('.jpg', '_aligned.jpg')} {label}\n" for name, label in pairs)
    if style == "EAC":  # base name and label from 1, no final newline
        return "\n".join(f"{name} {label + 1}" for name, label in pairs)
    if style == "EAC, aligned":
        return "\n".join(f"{name.replace('.jpg', '_aligned.jpg')} {label + 1}" for name, label in pairs)
    if style == "EAC, no suffix":
        return "\n".join(f"{name.removesuffix('.jpg')} {label + 1}" for name, label in pairs)
    if style == "noisyFER":  # all rows, those of the test images too
        return "".join(f"{name} {label + 1}\n" for name, label in pairs) + "".join(f"{n} {label}\n" for n, label in raf_rows("test"))
    if style == "csv, integers":
        return "image,label\n" + "".join(f"{name},{label + 1}\n" for name, label in pairs)
    if style == "csv, Windows":
        return "\ufeffname,label\r\n" + "".join(f"train\\{name},{RAF_CLASSES[label].title()}\r\n" for name, label in pairs)
    if style == "names, no header":
        return "".join(f"{name} {RAF_CLASSES[label]}\n" for name, label in pairs)
    if style == "tabs":
        return "".join(f"{name}\t{label}\n" for name, label in pairs)
    return "name,label\n" + "".join(f"{name},{RAF_CLASSES[label]}\n" for name, label in pairs)


STYLES = [
    "SCN", "EAC", "EAC, aligned", "EAC, no suffix", "noisyFER", "csv, names", "csv, integers", "csv, Windows", "names, no header", "tabs",
]


@pytest.mark.parametrize("style", STYLES)
def test_label_files_that_people_have_are_read(style, index, tmp_path):
    noisy = noisy_of(index)
    file = tmp_path / "labels.txt"
    file.write_bytes(published(style, index, noisy).encode())
    labels = read_labels(file, index)
    assert labels.dtype == torch.int64 and torch.equal(labels, noisy)


@pytest.mark.parametrize("layout", ["kaggle", "kaggle folders"])
@pytest.mark.parametrize("style", ["SCN", "EAC", "noisyFER", "csv, names"])
def test_label_files_fit_the_kaggle_layout_too(style, layout, index, tmp_path):
    noisy = noisy_of(index)
    file = tmp_path / "labels.txt"
    file.write_text(published(style, index, noisy))
    other = datasets.read_raf(BUILDERS[layout](tmp_path / "kaggle"), "train")
    read = dict(zip(map(datasets.name_key, other.names), read_labels(file, other).tolist()))
    assert read == dict(zip(map(datasets.name_key, index.names), noisy.tolist()))


def test_the_order_of_a_label_file_does_not_matter(index, tmp_path):
    noisy = noisy_of(index)
    lines = published("EAC", index, noisy).splitlines()
    (tmp_path / "labels.txt").write_text("\n".join(reversed(lines)))
    assert torch.equal(read_labels(tmp_path / "labels.txt", index), noisy)


def test_load_data_takes_labels_from_a_file(raf, index, tmp_path, arguments):
    (tmp_path / "labels.txt").write_text(published("EAC", index, noisy_of(index)))
    train, _ = load_data(arguments("raf", raf, "--labels", str(tmp_path / "labels.txt")))
    assert torch.equal(train.labels, noisy_of(index)) and train.clean.tolist() == index.labels


@pytest.mark.parametrize("first", [0, 1])
def test_labels_in_the_order_of_affectnet_are_refused(first, index, tmp_path):
    file = tmp_path / "affectnet.txt"
    noisy = [AFFECTNET_CLASSES.index(RAF_CLASSES[label]) for label in noisy_of(index).tolist()]
    file.write_text("".join(f"{name} {label + first}\n" for name, label in zip(index.names, noisy)))
    with pytest.raises(UserError, match="affectnet.txt.*AffectNet"):
        read_labels(file, index)


@pytest.mark.parametrize("style", ["csv", "list"])
@pytest.mark.parametrize("build, data", [(build_raf, "raf"), (build_ferplus, "ferplus"), (build_folder, "folder")])
def test_written_labels_are_read_back(build, data, style, tmp_path, arguments):
    index = read_index(arguments(data, build(tmp_path / "data")), "train")
    noisy = noisy_of(index)
    write_labels(tmp_path / "labels", index.names, noisy, index.classes, style)
    assert torch.equal(read_labels(tmp_path / "labels", index), noisy)
    assert not list(tmp_path.glob("labels.tmp*"))


def test_written_csv_has_names_of_classes(tmp_path):
    write_labels(tmp_path / "labels.csv", ["a.jpg", "b, c.jpg"], torch.tensor([1, 0]), ("anger", "fear"))
    with open(tmp_path / "labels.csv", newline="") as file:
        assert list(csv.reader(file)) == [["name", "label"], ["a.jpg", "fear"], ["b, c.jpg", "anger"]]


def test_written_list_counts_from_one(tmp_path):
    write_labels(tmp_path / "labels.txt", ["a.jpg", "b.jpg"], torch.tensor([1, 0]), ("anger", "fear"), "list")
    assert (tmp_path / "labels.txt").read_text() == "a.jpg 2\nb.jpg 1\n"


@pytest.mark.parametrize("style", ["csv", "list"])
@pytest.mark.parametrize("names", [["a b.jpg", "c  d.jpg"], ["a,b.jpg", "c,d.jpg"], ["é.jpg", "图.jpg"]])
def test_odd_names_are_read_back(names, style, tmp_path):
    index, noisy = Index(names, [0, 1], ("anger", "fear")), torch.tensor([1, 0])
    write_labels(tmp_path / "labels", names, noisy, index.classes, style)
    assert torch.equal(read_labels(tmp_path / "labels", index), noisy)


@pytest.mark.parametrize("style", ["csv", "list"])
def test_classes_that_are_numbers_are_read_back(style, tmp_path):
    classes = tuple(sorted(map(str, range(1, 11))))  # 1, 10, 2, 3 ...: a folder's order
    index = Index([f"{i}.jpg" for i in range(10)], list(range(10)), classes)
    noisy = torch.arange(10).roll(1)
    write_labels(tmp_path / "labels", index.names, noisy, classes, style)
    assert torch.equal(read_labels(tmp_path / "labels", index), noisy)


def test_equal_base_names_in_two_class_folders_are_told_apart(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    index = read_index(arguments("folder", root), "train")
    assert len({datasets.name_key(name) for name in index.names}) < len(index.names)
    file = tmp_path / "labels.csv"
    file.write_text("name,label\n" + "".join(f"{name},{'sad' if 'happy' in name else 'happy'}\n" for name in index.names))
    labels = read_labels(file, index).tolist()
    given = {(name.split("/")[1], index.classes[label]) for name, label in zip(index.names, labels)}
    assert given == {("happy", "sadness"), ("sad", "happiness"), ("angry", "happiness")}


def test_base_names_do_not_suffice_where_they_repeat(tmp_path, arguments):
    index = read_index(arguments("folder", build_folder_splits(tmp_path / "data")), "train")
    file = tmp_path / "labels.csv"
    file.write_text("name,label\n" + "".join(f"{i}.png,happy\n" for i in range(4)))
    with pytest.raises(UserError, match="no label for 12 of 12"):
        read_labels(file, index)


@pytest.mark.parametrize("line, match", [
    ("train_00003.jpg", "line 3.*train_00003.jpg"),
    ("train_00003.jpg,1,2", "line 3"),
    (",4", "line 3"),
    ("train_00003.jpg four", "line 3.*four"),
    ("train_00003.jpg 8", "line 3.*8"),
    ("train_00003.jpg -1", "line 3.*-1"),
    ("train_00001.jpg 5", "line 3.*train_00001.jpg"),  # is 2 in line 1
])
def test_a_line_of_a_label_file_that_is_wrong_is_named(line, match, index, tmp_path):
    file = tmp_path / "bad.txt"
    lines = [f"{name} {label + 1}" for name, label in zip(index.names, index.labels)]
    lines.insert(2, line)
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"bad.txt, {match}"):
        read_labels(file, index)


def test_a_class_name_that_is_none_is_named_with_its_line(index, tmp_path):
    (tmp_path / "bad.csv").write_text("name,label\ntrain_00001.jpg,fear\ntrain_00002.jpg,bliss\n")
    with pytest.raises(UserError, match="bad.csv, line 3.*bliss"):
        read_labels(tmp_path / "bad.csv", index)


def test_the_same_label_twice_is_no_contradiction(index, tmp_path):
    text = published("csv, names", index, noisy_of(index))
    (tmp_path / "labels.csv").write_text(text + text.splitlines()[1] + "\n")
    assert torch.equal(read_labels(tmp_path / "labels.csv", index), noisy_of(index))


def test_images_without_a_label_are_counted_and_the_first_named(index, tmp_path):
    lines = published("csv, names", index, noisy_of(index)).splitlines()
    (tmp_path / "part.csv").write_text("\n".join(lines[:4] + lines[6:]))
    with pytest.raises(UserError, match="part.csv: no label for 2 of 28.*train_00004.jpg"):
        read_labels(tmp_path / "part.csv", index)


def test_ambiguous_label_files_are_refused(index, tmp_path):
    (tmp_path / "labels.txt").write_text("".join(f"{name} 3\n" for name in index.names))
    with pytest.raises(UserError, match="labels.txt.*0 or from 1"):
        read_labels(tmp_path / "labels.txt", index)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"name,label\n", b"\xff\xd8\xff\xe0 a.jpg 1\n"])
def test_missing_empty_and_binary_label_files_are_refused(content, index, tmp_path):
    if content is not None:
        (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UserError, match="labels.csv"):
        read_labels(tmp_path / "labels.csv", index)


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


def training_image(root):
    """A training image of a layout: "rain" is in train and in FER2013Train."""
    return next(path for path in sorted(root.rglob("*")) if path.suffix in (".jpg", ".png") and "rain" in str(path.relative_to(root)))


@pytest.mark.parametrize("layout, data", [("raf", "raf"), ("kaggle", "raf"), ("ferplus", "ferplus")])
def test_a_missing_image_is_named(layout, data, tmp_path, arguments):
    root = BUILDERS[layout](tmp_path / "data")
    path = training_image(root)
    path.unlink()
    with pytest.raises(UserError) as error:
        load_data(arguments(data, root))
    assert str(path) in str(error.value) and "missing" in str(error.value)


@pytest.mark.parametrize("layout, data", [
    ("raf", "raf"), ("kaggle", "raf"), ("kaggle folders", "raf"), ("ferplus", "ferplus"), ("folder splits", "folder"),
])
@pytest.mark.parametrize("damage", ["half", "text", "empty"])
def test_a_damaged_image_is_named(damage, layout, data, tmp_path, arguments):
    root = BUILDERS[layout](tmp_path / "data")
    path = training_image(root)
    content = path.read_bytes()
    path.write_bytes({"half": content[: len(content) // 2], "text": b"<html>404</html>", "empty": b""}[damage])
    with pytest.raises(UserError) as error:
        load_data(arguments(data, root))
    assert str(path) in str(error.value)


def test_a_jpeg_cut_in_half_is_truncated(tmp_path):
    path = tmp_path / "a.jpg"
    save(picture(0, 100, 100), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="a.jpg.*truncated"):
        datasets.decode(path, (100, 100), False)


@pytest.mark.parametrize("line, what", [
    ("fer9.png,\"(0, 0, 48, 48)\",1,2,3", "5 fields, expected 12"),
    ("fer9.png,0,0,48,48,1,2,3,4,5,6,7,8,9,10", "15 fields, expected 12"),
    ("fer9.png,\"(0, 0, 48, 48)\",1,2,3,4,5,6,7,8,9,ten", "'ten'"),
])
def test_a_malformed_line_of_label_csv_is_named(line, what, tmp_path):
    root = build_ferplus(tmp_path)
    table = root / "FER2013Train" / "label.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:4] + [line] + lines[4:]))
    with pytest.raises(UserError, match=f"label.csv, line 5: {what}"):
        datasets.read_ferplus(root, "train")


def test_ferplus_folder_without_label_csv_is_named(tmp_path):
    (build_ferplus(tmp_path) / "FER2013Train" / "label.csv").unlink()
    with pytest.raises(UserError, match="FER2013Train/label.csv"):
        datasets.read_ferplus(tmp_path, "train")


@pytest.mark.parametrize("pixels", ["1 2 3", " ".join(["256"] * 2304), " ".join(["x"] * 2304)])
def test_pixels_that_are_no_image_are_named_with_their_line(pixels, tmp_path, arguments):
    root = build_ferplus_csv(tmp_path / "data")
    lines = (root / "fer2013.csv").read_text().splitlines()
    lines[2] = f"0,{pixels},Training"
    (root / "fer2013.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="fer2013.csv, line 3: is not 48 x 48 grey values"):
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


def test_training_images_of_one_class_are_refused(tmp_path, arguments):
    rows = [row for row in raf_rows() if row[0].startswith("test") or row[1] == 7]
    with pytest.raises(UserError, match=f"{tmp_path}.*fewer than two classes"):
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


@pytest.mark.parametrize("file, words", [("data_batch_3", "missing"), ("batches.meta", "missing"), ("test_batch", "missing")])
def test_cifar10_without_a_file_is_refused(file, words, tmp_path, arguments):
    root = build_cifar10(tmp_path / "data")
    (root / "cifar-10-batches-py" / file).unlink()
    with pytest.raises(UserError, match=words):
        load_data(arguments("cifar10", root))
    (root / "cifar-10-batches-py" / file).write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="damaged"):
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
    assert arguments("affectnet-auto", root).oversample and not arguments("affectnet-auto", root, "--no-oversample").oversample
    assert not arguments("raf").oversample


def test_a_face_box_is_cut_at_the_image_and_must_meet_it(tmp_path, arguments):
    root = build_affectnet(tmp_path / "data")
    text = (root / "training.csv").read_text()
    (root / "training.csv").write_text(text.replace("0/0.jpg,10,5,32,32", "0/0.jpg,-4,5,80,32"))
    assert load_data(arguments("affectnet", root))[0].images.shape[0] == 24
    (root / "training.csv").write_text(text.replace("0/0.jpg,10,5,32,32", "0/0.jpg,70,5,8,32"))
    with pytest.raises(UserError, match="0/0.jpg: the face box"):
        load_data(arguments("affectnet", root))


@pytest.mark.parametrize("old, new, words", [
    (",0,-0.9,0.9", ",11,-0.9,0.9", "line 2: expression 11"), ("0/0.jpg,10", "0/0.jpg,ten", "line 2: face box"), (",0,-0.9,0.9", ",0,-0.9", "line 2: 8 fields"),
])
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
    with pytest.raises(UserError, match="0/0.jpg: the image is missing"):
        load_data(arguments("affectnet", other))
