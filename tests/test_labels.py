import csv

from support import datasets
from support.datasets import (
    AFFECTNET_CLASSES,
    FERPLUS_CLASSES,
    RAF_CLASSES,
    RAF_CONFUSIONS,
    Index,
    UserError,
    asymmetric_noise,
    confusion_pairs,
    inject,
    load_data,
    load_train_index,
    read_index,
    read_labels,
    read_va,
    symmetric_noise,
    write_labels,
    write_va,
)

import numpy as np
import pytest
import torch
from conftest import (
    AFFECTNET_COLUMNS,
    BUILDERS,
    build_affectnet,
    build_affectnet_npy,
    build_ferplus,
    build_folder,
    build_folder_splits,
    build_raf,
    raf_rows,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
    moved = sum(
        (symmetric_noise(torch.zeros(10, dtype=torch.int64), 0.3, 3, generator(seed)) != 0).double()
        for seed in range(1000)
    )
    assert (moved - 300).abs().max() < 60  # four standard deviations


@pytest.mark.parametrize(
    "make", [lambda g: symmetric_noise(LABELS, 0.4, 7, g), lambda g: asymmetric_noise(LABELS, 0.4, RAF_CONFUSIONS, g)]
)
def test_noise_depends_on_the_seed_alone_and_leaves_its_input(make):
    before = LABELS.clone()
    first = make(generator(1))
    torch.rand(5)
    assert torch.equal(first, make(generator(1)))
    assert not torch.equal(first, make(generator(2)))
    assert torch.equal(LABELS, before)


@pytest.mark.parametrize(
    "labels, rate, classes",
    [
        ([0, 1], 1.0, 2),
        ([0, 1], -0.1, 2),
        ([0, 1], float("nan"), 2),
        ([0, 0], 0.2, 1),
        ([0, 2], 0.2, 2),
        ([-1, 1], 0.2, 2),
    ],
)
def test_symmetric_noise_refuses_what_is_out_of_range(labels, rate, classes):
    with pytest.raises(UserError):
        symmetric_noise(torch.tensor(labels), rate, classes, generator())


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.35, 0.5, 0.99])
def test_asymmetric_noise_moves_the_exact_share_to_the_partner(rate):
    noisy = asymmetric_noise(LABELS, rate, RAF_CONFUSIONS, generator())
    for c, n in enumerate(SIZES):
        moved = noisy[(LABELS == c) & (noisy != LABELS)]
        assert len(moved) == round(rate * n) and (moved == RAF_CONFUSIONS[c]).all()


@pytest.mark.parametrize(
    "labels, rate, pairs",
    [
        ([0, 1], 1.0, {0: 1, 1: 0}),
        ([0, 1], -0.1, {0: 1, 1: 0}),
        ([0, 1, 2], 0.2, {0: 1, 1: 0}),
        ([0, 1], 0.2, {0: 1}),
        ([0, 1], 0.2, {}),
        ([0, 1], 0.2, {0: 1, 1: 1}),
        ([-1, 0], 0.2, {0: 1, 1: 0}),
    ],
)
def test_asymmetric_noise_refuses_what_is_out_of_range(labels, rate, pairs):
    with pytest.raises(UserError):
        asymmetric_noise(torch.tensor(labels), rate, pairs, generator())


CONFUSIONS = {
    "surprise": "anger",
    "fear": "surprise",
    "disgust": "anger",
    "happiness": "neutral",
    "sadness": "neutral",
    "anger": "happiness",
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
        return "".join(f"{name} {label + 1}\n" for name, label in pairs) + "".join(
            f"{n} {label}\n" for n, label in raf_rows("test")
        )
    if style == "csv, integers":
        return "image,label\n" + "".join(f"{name},{label + 1}\n" for name, label in pairs)
    if style == "csv, Windows":
        return "\ufeffname,label\r\n" + "".join(
            f"train\\{name},{RAF_CLASSES[label].title()}\r\n" for name, label in pairs
        )
    if style == "names, no header":
        return "".join(f"{name} {RAF_CLASSES[label]}\n" for name, label in pairs)
    if style == "commas, no header":
        return "".join(f"{name}, {label + 1}\n" for name, label in pairs)
    if style == "tabs":
        return "".join(f"{name}\t{label}\n" for name, label in pairs)
    return "name,label\n" + "".join(f"{name},{RAF_CLASSES[label]}\n" for name, label in pairs)


STYLES = [
    "SCN",
    "EAC",
    "EAC, aligned",
    "EAC, no suffix",
    "noisyFER",
    "csv, names",
    "csv, integers",
    "csv, Windows",
    "names, no header",
    "commas, no header",
    "tabs",
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
    write_labels(tmp_path / "labels.txt", ["a.jpg", "b.jpg"], torch.tensor([1, 0]), ("anger", "very happy"), "list")
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


def test_a_list_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(UserError, match="'very happy'; csv can"):
        write_labels(tmp_path / "labels", ["a.jpg"], torch.tensor([0]), ("1", "very happy"), "list")
    assert not (tmp_path / "labels").exists()


@pytest.mark.parametrize("header", ['"name","label"', "name, label", "Image,Label", "filename,label"])
def test_headers_of_other_programs(header, raf, index, tmp_path):
    noisy = (torch.tensor(index.labels) + 1) % 7
    text = "".join(f'"{name}", {index.classes[label]}\n' for name, label in zip(index.names, noisy))
    (tmp_path / "labels.csv").write_text(f"{header}\n{text}")
    assert torch.equal(read_labels(tmp_path / "labels.csv", index), noisy)


def test_names_with_the_one_folder_of_all_images_match_plain_ones(tmp_path):
    (tmp_path / "labels.csv").write_text("name,label\na_aligned.jpg,sadness\nb.jpg,happiness\n")
    index = Index(["Image/aligned/a.jpg", "Image/aligned/b.jpg"], [0, 1], ("happiness", "sadness"))
    assert read_labels(tmp_path / "labels.csv", index).tolist() == [1, 0]
    index.names[1] = "Image/other/b.jpg"  # of two folders each may have an image of that name
    with pytest.raises(UserError, match="no label for 2 of 2"):
        read_labels(tmp_path / "labels.csv", index)


def test_a_line_of_another_image_may_have_a_class_that_is_not_trained(tmp_path):
    """A list of eight classes is read for seven of them (--classes 7) if it gives none of their images the eighth."""
    index = Index(["a.jpg", "b.jpg"], [0, 1], ("happiness", "sadness"))
    (tmp_path / "labels.csv").write_text("name,label\na.jpg,sadness\nother.jpg,contempt\nb.jpg,happiness\n")
    assert read_labels(tmp_path / "labels.csv", index).tolist() == [1, 0]
    (tmp_path / "labels.csv").write_text("name,label\na.jpg,contempt\nb.jpg,happiness\n")
    with pytest.raises(UserError, match="line 2: label 'contempt' is not among the classes"):
        read_labels(tmp_path / "labels.csv", index)


def test_windows_names_of_a_folder(tmp_path):
    index = Index(["happy/a.jpg", "sad/a.jpg"], [0, 1], ("happiness", "sadness"))
    (tmp_path / "labels.csv").write_text("name,label\nhappy\\a.jpg,sadness\nsad\\a.jpg,happiness\n")
    assert read_labels(tmp_path / "labels.csv", index).tolist() == [1, 0]


def test_labels_of_one_class_are_refused(raf, index, tmp_path, arguments):
    write_labels(tmp_path / "labels.csv", index.names, torch.full((len(index.names),), 3), index.classes)
    with pytest.raises(UserError, match="fewer than two classes in .*labels.csv"):
        load_data(arguments("raf", raf, "--labels", str(tmp_path / "labels.csv")))


def test_a_list_in_the_columns_of_affectnet_with_other_names_says_so(tmp_path, arguments):
    listing = build_affectnet(tmp_path / "csv") / "training.csv"
    npy = build_affectnet_npy(tmp_path / "npy")
    with pytest.raises(UserError, match="no label for 24 of 24 training images"):
        load_data(arguments("affectnet", npy, "--labels", str(listing)))


def test_equal_base_names_in_two_class_folders_are_told_apart(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    index = read_index(arguments("folder", root), "train")
    assert len({datasets.name_key(name) for name in index.names}) < len(index.names)
    file = tmp_path / "labels.csv"
    file.write_text(
        "name,label\n" + "".join(f"{name},{'sad' if 'happy' in name else 'happy'}\n" for name in index.names)
    )
    labels = read_labels(file, index).tolist()
    given = {(name.split("/")[1], index.classes[label]) for name, label in zip(index.names, labels)}
    assert given == {("happy", "sadness"), ("sad", "happiness"), ("angry", "happiness")}


def test_base_names_do_not_suffice_where_they_repeat(tmp_path, arguments):
    index = read_index(arguments("folder", build_folder_splits(tmp_path / "data")), "train")
    file = tmp_path / "labels.csv"
    file.write_text("name,label\n" + "".join(f"{i}.png,happy\n" for i in range(4)))
    with pytest.raises(UserError, match="no label for 12 of 12"):
        read_labels(file, index)


@pytest.mark.parametrize(
    "line, match",
    [
        ("train_00003.jpg", "line 3.*train_00003.jpg"),
        ("train_00003.jpg,1,2", "line 3"),
        (",4", "line 3"),
        ("train_00003.jpg four", "line 3.*four"),
        ("train_00003.jpg 8", "line 3.*8"),
        ("train_00003.jpg -1", "line 3.*-1"),
        ("train_00003.jpg 0", r"lines 3 and \d+: labels 0 and 7"),
        ("train_00001.jpg 5", "line 3.*train_00001.jpg"),  # is 2 in line 1
    ],
)
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
# Label files that are odd, and AffectNet's columns
# ----------------------------------------------------------------------------------------------------------------------


def test_repeated_lines_of_a_label_file_are_counted(index, tmp_path, capsys):
    text = published("EAC", index, noisy_of(index))
    (tmp_path / "labels.txt").write_text(text + "\n" + "\n".join(text.splitlines()[:3]))
    assert torch.equal(read_labels(tmp_path / "labels.txt", index), noisy_of(index))
    assert "labels.txt: lines left out that repeat an earlier one: 3" in capsys.readouterr().out


def test_a_base_that_the_own_labels_contradict_is_refused(index, tmp_path):
    """Numbered from 1, without a label of the last class but with a 0 by mistake: as if it counted from 0."""
    (tmp_path / "labels.txt").write_text(
        "".join(f"{name} {0 if label == 6 else label + 1}\n" for name, label in zip(index.names, index.labels))
    )
    with pytest.raises(
        UserError, match="labels.txt: the labels look numbered in this data set's order .* from 1 on: 86%"
    ):
        read_labels(tmp_path / "labels.txt", index)


def test_numbers_of_eight_classes_for_seven_are_refused(tmp_path, arguments):
    """FERPlus's numbers from 0, of images that are not neutral: 1 to 7 look like seven classes from 1 on."""
    index = read_index(arguments("ferplus", build_ferplus(tmp_path / "data"), "--classes", "7"), "train")
    index = index.take([i for i, label in enumerate(index.labels) if label])
    lines = [f"{name} {label}" for name, label in zip(index.names, index.labels)] + ["other.png 7"]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match="labels.txt: the labels look numbered in this data set's order .* from 0 on: 100%"
    ):
        read_labels(tmp_path / "labels.txt", index)


@pytest.mark.parametrize("classes, order", [(FERPLUS_CLASSES, AFFECTNET_CLASSES), (AFFECTNET_CLASSES, FERPLUS_CLASSES)])
def test_labels_in_the_order_of_another_data_set_are_refused(classes, order, tmp_path):
    index = Index([f"{i}.jpg" for i in range(80)], [i % 8 for i in range(80)], classes)
    lines = [f"{name} {order.index(classes[label])}" for name, label in zip(index.names, index.labels)]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    whose = "AffectNet's" if order == AFFECTNET_CLASSES else "FERPlus's"
    with pytest.raises(UserError, match=f"labels.txt: the labels look numbered in {whose} order"):
        read_labels(tmp_path / "labels.txt", index)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "make",
    [
        lambda labels, rate: symmetric_noise(labels, rate, 7, generator()),
        lambda labels, rate: asymmetric_noise(labels, rate, RAF_CONFUSIONS, generator()),
    ],
)
def test_a_list_with_any_noise_is_read_back(make, rate, tmp_path):
    own = torch.arange(700) % 7
    index = Index([f"{i}.jpg" for i in range(700)], own.tolist(), RAF_CLASSES)
    write_labels(tmp_path / "labels.txt", index.names, make(own, rate), RAF_CLASSES, "list")
    assert torch.equal(read_labels(tmp_path / "labels.txt", index), make(own, rate))


@pytest.mark.parametrize("header", ["name,label\n", ""])
@pytest.mark.parametrize("classes", [[str(c) for c in range(11)], ["3", "5", "10"], ["1", "2", "cat"]])
def test_classes_that_are_named_by_numbers_are_matched_by_name(classes, header, tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data", classes)
    index = read_index(arguments("folder", root), "train")
    assert index.classes == tuple(sorted(classes))
    between = "," if header else " "
    lines = [f"{name}{between}{name.split('/')[1]}\n" for name in index.names]
    (tmp_path / "labels.txt").write_text(header + "".join(lines))
    assert read_labels(tmp_path / "labels.txt", index).tolist() == index.labels
    (tmp_path / "labels.txt").write_text(header + "".join(lines[:-1]) + f"{index.names[-1]}{between}99\n")
    with pytest.raises(UserError, match="label '99' is not among the classes"):
        read_labels(tmp_path / "labels.txt", index)


def test_names_that_differ_in_their_suffix_alone_are_told_apart(tmp_path):
    index = Index(["a.jpg", "a.png"], [0, 1], ("cat", "dog"))
    (tmp_path / "labels.csv").write_text("name,label\na.png,cat\na.jpg,dog\n")
    assert read_labels(tmp_path / "labels.csv", index).tolist() == [1, 0]


def affectnet_list(path, index, expressions, va=None, header=True):
    """A list in AffectNet's columns, as noisyFER's training_RAFModel.csv."""
    rows = [AFFECTNET_COLUMNS.split(",")] * header
    for i, name in enumerate(index.names):
        rows.append([name, "0", "0", "1", "1", "1;2", expressions[i], *(va[i] if va is not None else (0, 0))])
    rows.append(["9/other.jpg", "0", "0", "1", "1", "1;2", 10, -2, -2])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def faces(tmp_path, arguments):
    return read_index(arguments("affectnet", build_affectnet(tmp_path / "affectnet")), "train")


@pytest.mark.parametrize("header", [True, False])
def test_labels_in_the_columns_of_affectnet_are_read(header, faces, tmp_path):
    noisy = noisy_of(faces)
    file = affectnet_list(tmp_path / "training_RAFModel.csv", faces, noisy.tolist(), header=header)
    assert torch.equal(read_labels(file, faces), noisy)


def test_labels_in_the_columns_of_affectnet_for_seven_classes(tmp_path, arguments):
    faces = read_index(arguments("affectnet", build_affectnet(tmp_path / "data"), "--classes", "7"), "train")
    assert read_labels(tmp_path / "data" / "training.csv", faces).tolist() == faces.labels
    file = affectnet_list(tmp_path / "machine.csv", faces, [7] + faces.labels[1:])
    with pytest.raises(UserError, match="machine.csv, line 2: label 7 is not among the classes neutral"):
        read_labels(file, faces)


@pytest.mark.parametrize(
    "first, words", [(8, "label 8 is not among"), (11, "expression 11"), ("0_1", "'0_1'"), (1.5, "1.5")]
)
def test_labels_in_the_columns_of_affectnet_that_are_none_are_refused(first, words, faces, tmp_path):
    file = affectnet_list(tmp_path / "machine.csv", faces, [first] + faces.labels[1:])
    with pytest.raises(UserError, match=f"machine.csv, line 2: .*{words}"):
        read_labels(file, faces)


@pytest.mark.parametrize("base", [0, 1])
def test_labels_in_the_columns_of_affectnet_but_in_raf_order_are_refused(base, faces, tmp_path):
    faces = faces.take([i for i, label in enumerate(faces.labels) if label < 7])
    numbers = [RAF_CLASSES.index(faces.classes[label]) + base for label in faces.labels]
    with pytest.raises(UserError, match=f"RAF-DB's order .* from {base} on: 100% agree"):
        read_labels(affectnet_list(tmp_path / "machine.csv", faces, numbers), faces)


@pytest.mark.parametrize("extra", [1, 2])
def test_affectnet_columns_with_two_lines_for_an_image(extra, faces, tmp_path):
    file = affectnet_list(tmp_path / "machine.csv", faces, faces.labels)
    with open(file, "a") as stream:
        stream.write(f"{faces.names[1]},0,0,1,1,1;2,{extra},0,0\n")
    if extra == 1:
        assert read_labels(file, faces).tolist() == faces.labels
    else:
        with pytest.raises(UserError, match="machine.csv, line 27: 1/1.jpg stands in line 3 too, with other values"):
            read_labels(file, faces)


@pytest.mark.parametrize("read", [read_labels, read_va])
def test_affectnet_columns_that_do_not_cover_are_refused(read, faces, tmp_path):
    file = affectnet_list(tmp_path / "machine.csv", faces.take(range(20)), faces.labels)
    with pytest.raises(
        UserError, match=f"machine.csv: no .* for 4 of 24 training images, the first is {faces.names[20]}"
    ):
        read(file, faces)


def test_valence_and_arousal_in_the_columns_of_affectnet_are_read(faces, tmp_path, capsys):
    va = [[-1.5, 1.25] if i == 3 else [i / 100, -i / 100] for i in range(24)]
    found = read_va(affectnet_list(tmp_path / "machine.csv", faces, faces.labels, va), faces)
    assert found.dtype == torch.float32 and found[3].tolist() == [-1, 1]
    assert torch.allclose(found[4:], torch.tensor(va[4:]))
    assert (
        "machine.csv: training images whose values lie outside [-1, 1] and were clamped: 1" in capsys.readouterr().out
    )
    assert np.allclose(read_va(tmp_path / "affectnet" / "training.csv", faces), faces.va)


def test_invalid_valence_and_arousal_of_a_training_image_are_refused(faces, tmp_path):
    file = affectnet_list(tmp_path / "machine.csv", faces, faces.labels, [[0, 0]] * 5 + [[0, -2]] * 19)
    with pytest.raises(
        UserError, match="machine.csv, line 7: 2/5.jpg has a valence or arousal of -2, which means invalid"
    ):
        read_va(file, faces)


VA_STYLES = {
    "blanks": lambda n, v, a: f"{n} {v} {a}\n",
    "commas": lambda n, v, a: f"{n}, {v}, {a}\n",
    "tabs": lambda n, v, a: f"{n}\t{v}\t{a}\n",
    "aligned": lambda n, v, a: f"{n.replace('.jpg', '_aligned.jpg')} {v} {a}\n",
}


@pytest.mark.parametrize("header", ["", "name,valence,arousal\n"])
@pytest.mark.parametrize("style", VA_STYLES)
def test_lists_of_valence_and_arousal_are_read(style, header, index, tmp_path, capsys):
    va = np.round(np.random.default_rng(0).uniform(-1, 1, (28, 2)), 3)
    lines = [VA_STYLES[style](name, *values) for name, values in zip(index.names, va)]
    (tmp_path / "va.txt").write_text(header + "".join(lines) + VA_STYLES[style]("other.jpg", 3, 3))
    assert np.allclose(read_va(tmp_path / "va.txt", index), va) and "clamped" not in capsys.readouterr().out


def test_valence_and_arousal_are_written_and_read_back(index, tmp_path):
    va = torch.rand(28, 2) * 2 - 1
    write_va(tmp_path / "va.csv", index.names, va)
    assert torch.allclose(read_va(tmp_path / "va.csv", index), va, atol=1e-6)


@pytest.mark.parametrize(
    "line, words",
    [
        ("train_00001.jpg 0.5", "line 29"),
        ("train_00001.jpg 0.5 nan", "line 29.*'nan'"),
        ("train_00001.jpg 1_0 0", "line 29"),
        ("train_00001.jpg 0.5 half", "line 29.*'half'"),
        ("train_00001.jpg,1,2,3", "line 29"),
        (",1,2", "line 29"),
        ("train_00001.jpg 0.25 0.25", "line 29: train_00001.jpg stands in line 1 too, with other values"),
    ],
)
def test_bad_lines_of_valence_and_arousal_are_named(line, words, index, tmp_path):
    (tmp_path / "va.txt").write_text("".join(f"{name} 0.5 0.5\n" for name in index.names) + line)
    with pytest.raises(UserError, match=f"va.txt, {words}"):
        read_va(tmp_path / "va.txt", index)


@pytest.mark.parametrize("read", [read_labels, read_va])
def test_a_label_file_that_is_a_folder_is_refused(read, index, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: could not be read as .*not a regular file"):
        read(tmp_path, index)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_a_seed_that_is_out_of_range_is_refused(seed):
    with pytest.raises(UserError, match=f"{seed}, is outside"):
        inject(LABELS, RAF_CLASSES, 0.2, "symmetric", seed)


def test_whole_names_decide_for_folders(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    index = load_train_index(arguments("folder", root))[0]
    file = tmp_path / "labels.csv"
    file.write_text("name,label\n" + "".join(f"{name.replace('train/', 'test/')},sad\n" for name in index.names))
    with pytest.raises(UserError, match="no label for"):
        read_labels(file, index)
