import errno
import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

from support import decoding
from support.datasets import UserError, load_data
from support.decoding import PlainUnpickler, as_float, as_int, reading

import numpy as np
import pytest
import torch
from conftest import (
    BUILDERS,
    RAF_TRAIN,
    build_cifar10,
    build_ferplus_csv,
    build_folder,
    build_folder_splits,
    build_raf,
    picture,
    save,
)
from PIL import EpsImagePlugin, Image, ImageOps

import align_faces


def named(split):
    """{image name: class name} of a split."""
    return {name: split.classes[label] for name, label in zip(split.names, split.labels)}


def fail(*args):
    raise AssertionError("an image was decoded")


@pytest.fixture
def soon():
    """A test that blocks fails after ten seconds."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocked"))
    signal.alarm(10)
    yield
    signal.alarm(0)


def cache_of(raf, suffix, split="train"):
    """The cache file of a split of the fixture raf, or its note."""
    (found,) = (raf.parent / "cache").glob(f"raf-*-{split}*{suffix}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Files of others
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError(), "(MemoryError)"),
        (RecursionError("too\ndeep"), "too deep"),
        (ValueError("odd"), "(odd)"),
        (zlib.error("bad data"), "bad data"),
        (OSError(errno.EIO, "Input/output error"), "(Input/output error)"),
        (Image.UnidentifiedImageError("cannot identify"), "none of JPEG, PNG"),
        (KeyError("data"), "KeyError: 'data'"),
    ],
)
def test_what_goes_wrong_in_a_reader_is_one_line(error, words):
    with pytest.raises(UserError) as caught, reading("a\nb.jpg", "an image"):
        raise error
    assert str(caught.value).startswith(r"a\nb.jpg: could not be read as an image (")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_reason_is_cut_to_a_line_of_common_length():
    with pytest.raises(UserError) as caught, reading("a.csv", "a csv file"):
        raise ValueError("x" * 10000)
    assert len(str(caught.value)) < 300


def test_missing_files_and_lines_that_are_made_already_stay_as_they_are():
    with pytest.raises(UserError, match="^a.jpg: the file is missing$"), reading("a.jpg", "an image"):
        raise FileNotFoundError(errno.ENOENT, "No such file")
    with pytest.raises(UserError, match="^line 3$"), reading("a.jpg", "an image"):
        raise UserError("line 3")
    with pytest.raises(KeyboardInterrupt), reading("a.jpg", "an image"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("text, value", [("7", 7), (" 007 ", 7), ("-3", -3), ("+4", 4)])
def test_whole_numbers(text, value):
    assert as_int(text) == value


@pytest.mark.parametrize("text", ["0_6", "٣", "6.0", "", "six", "1e1", "0x6", "6 7", "9" * 19, "9" * 10000, "--1"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(ValueError, match="not a whole number"):
        as_int(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("0.5", 0.5),
        (" -1 ", -1),
        (".5", 0.5),
        ("5.", 5),
        ("1e-05", 1e-5),
        ("+2E3", 2000),
    ],
)
def test_numbers(text, value):
    assert as_float(text) == value


@pytest.mark.parametrize("text", ["1_0.5", "nan", "inf", "-inf", "", ".", "one", "٣.٥", "1e999", "0x1p3", "1,5"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match="not a number|out of range"):
        as_float(text)


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x1b[2J", "a\x7f", "a\x85", "a\u2028b", "\udcff.png", "\0"])
def test_names_that_no_list_can_hold_are_refused(name):
    with pytest.raises(UserError) as error:
        decoding.check_names(["good.png", name], "root")
    assert repr(name) in str(error.value) and "rename" in str(error.value) and str(error.value).isprintable()


def test_names_in_any_script_are_taken():
    decoding.check_names(["é ü.png", "图.png", "صورة.png", "a\u00a0b.png", "a\u202fb.png", "$x_1$ 'q'.png"], "root")


# ----------------------------------------------------------------------------------------------------------------------
# Pickles and npy files
# ----------------------------------------------------------------------------------------------------------------------


def python2_batch(data, labels, fortran=False):
    """A batch as Python 2 wrote the published ones: protocol 2, strings for bytes."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR(K\x01("
    array += b"".join(b"J" + size.to_bytes(4, "little") for size in data.shape) + b"tcnumpy\ndtype\n("
    array += text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    content = data.tobytes("F" if fortran else "C")
    array += (b"\x88" if fortran else b"\x89") + b"T" + len(content).to_bytes(4, "little") + content + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


DATA = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


def protocols():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for order in "CF":
            batch = {"data": np.asarray(DATA, order=order), "labels": [0, 9, 3]}
            yield f"protocol {protocol}, order {order}", pickle.dumps(batch, protocol)
    old = pickle.dumps({"data": DATA, "labels": [0, 9, 3]}, 2).replace(b"numpy._core", b"numpy.core")
    yield "numpy 1", old
    yield "Python 2", python2_batch(DATA, [0, 9, 3])
    yield "Python 2, Fortran order", python2_batch(DATA, [0, 9, 3], fortran=True)
    more = {"batch_label": "testing", "filenames": [b"a", "b", ("c", None, 1.5)]}
    yield "more in it", pickle.dumps({"data": DATA, "labels": [0, 9, 3]} | more)


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in protocols()])
def test_batches_of_any_protocol_are_read(content):
    batch = PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    assert np.array_equal(batch["data"].as_uint8(), DATA) and batch["labels"] == [0, 9, 3]


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "make",
    [
        lambda mark: f"cos\nsystem\n(S'touch {mark}'\ntR.".encode(),
        lambda mark: f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode(),
        lambda mark: f"(S'touch {mark}'\nios\nsystem\n.".encode(),  # INST
        lambda mark: pickle.dumps({"data": Call(os.system, f"touch {mark}"), "labels": []}),
        lambda mark: pickle.dumps({"data": Call(eval, f"open({str(mark)!r}, 'w')"), "labels": []}),
        lambda mark: pickle.dumps({"data": Call(os.open, str(mark), os.O_CREAT), "labels": []}, 0),
        lambda mark: pickle.dumps({"data": Call(np.memmap, str(mark), "uint8", "w+", 0, (3,)), "labels": []}),
        lambda mark: pickle.dumps({"data": Call(np.fromfile, str(mark)), "labels": []}),
        lambda mark: pickle.dumps({"data": np.array([Call(os.system, f"touch {mark}")]), "labels": []}),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
def test_no_code_of_a_pickle_runs(file, make, tmp_path, arguments):
    root, mark = build_cifar10(tmp_path / "data"), tmp_path / "mark"
    (root / "cifar-10-batches-py" / file).write_bytes(make(mark))
    with pytest.raises(UserError, match=rf"{file}: could not be read as .*it asks for \w+(\.\w+)*\.\w+,"):
        load_data(arguments("cifar10", root))
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r" + (2**24).to_bytes(4, "little") + b".",  # a place in the memo
        b"\x80\x05\x96" + (2**29).to_bytes(8, "little") + b"few.",  # the length of a bytearray
        b"\x80\x04\x8e" + (2**29).to_bytes(8, "little") + b"few.",  # of bytes
    ],
)
def test_a_number_in_a_pickle_takes_no_memory(content):
    tracemalloc.start()
    try:
        with pytest.raises(UserError), reading("file", "a pickle"):
            if PlainUnpickler(io.BytesIO(content), encoding="latin1").load() == {}:
                raise ValueError
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data": DATA[:2]}, "3 labels of 2 images"),
        ({"data": DATA.astype(np.int64)}, "not of unsigned bytes"),
        ({"data": DATA.view(np.int8)}, "not of unsigned bytes"),
        ({"data": DATA[:, :3000]}, "reshape"),
        ({"labels": [0, 9, 10]}, "to be 0 to 9"),
        ({"labels": [0, -1, 3]}, "to be 0 to 9"),
        ({"labels": [0, "9", 3]}, "to be 0 to 9"),
        ({"data": [1, 2]}, "AttributeError"),
        ({"data": None}, "AttributeError"),
    ],
)
def test_a_batch_that_is_odd_is_refused(change, words, tmp_path, arguments):
    root = build_cifar10(tmp_path / "data")
    path = root / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(pickle.dumps({"data": DATA, "labels": [0, 9, 3]} | change))
    with pytest.raises(UserError, match=f"data_batch_4: could not be read as a batch of CIFAR-10 .*{words}"):
        load_data(arguments("cifar10", root))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b".",
        pickle.dumps([1]),
        pickle.dumps({"data": DATA, "labels": [0, 9, 3]})[:3000],
    ],
)
def test_a_batch_that_is_no_pickle_of_a_dict_is_refused(content, tmp_path, arguments):
    root = build_cifar10(tmp_path / "data")
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match="test_batch: could not be read as a batch of CIFAR-10"):
        load_data(arguments("cifar10", root))


@pytest.mark.parametrize("names", [["a", "a"], ["a"], [1, 2], [["a"], ["b"]], None])
def test_class_names_of_cifar10_that_are_odd_are_refused(names, tmp_path, arguments):
    root = build_cifar10(tmp_path / "data")
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(UserError, match="batches.meta: could not be read as CIFAR-10's class names"):
        load_data(arguments("cifar10", root))


def test_pickled_npy_files_are_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    np.save(tmp_path / "0_exp.npy", np.array(Call(os.system, f"touch {mark}"), dtype=object))
    with pytest.raises(UserError, match="0_exp.npy: could not be read as an npy file with one number") as refused:
        decoding.read_npy(tmp_path / "0_exp.npy")
    assert not mark.exists() and "allow_pickle" not in str(refused.value)  # no word of how to run it


@pytest.mark.parametrize("value", [np.zeros(2), np.array("six"), np.array("1_0"), np.array(np.nan), np.zeros(0)])
def test_an_npy_file_without_one_number_is_refused(value, tmp_path):
    np.save(tmp_path / "a.npy", value)
    with pytest.raises(UserError, match="a.npy: could not be read"):
        decoding.read_npy(tmp_path / "a.npy")


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def training_image(root):
    """A training image of a layout: "rain" is in train and in FER2013Train."""
    paths = (path for path in sorted(root.rglob("*")) if path.suffix in (".jpg", ".png"))
    return next(path for path in paths if "rain" in str(path.relative_to(root)))


@pytest.mark.parametrize("layout, data", [("raf", "raf"), ("kaggle", "raf"), ("ferplus", "ferplus")])
def test_a_missing_image_is_named(layout, data, tmp_path, arguments):
    root = BUILDERS[layout](tmp_path / "data")
    path = training_image(root)
    path.unlink()
    with pytest.raises(UserError) as error:
        load_data(arguments(data, root))
    assert str(path) in str(error.value) and "missing" in str(error.value)


@pytest.mark.parametrize(
    "layout, data",
    [
        ("raf", "raf"),
        ("kaggle", "raf"),
        ("kaggle folders", "raf"),
        ("ferplus", "ferplus"),
        ("folder splits", "folder"),
    ],
)
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
        decoding.decode(path, (100, 100), False)


def test_an_image_that_claims_to_be_huge_is_refused(tmp_path, arguments):
    root = build_folder(tmp_path / "data")
    path = next(root.rglob("*.png"))
    save(picture(1, 20, 20), path.with_suffix(".bmp"))
    data = bytearray(path.with_suffix(".bmp").read_bytes())
    data[18:26] = (40000).to_bytes(4, "little") * 2
    path.with_suffix(".bmp").write_bytes(data)
    with pytest.raises(UserError, match=str(path.with_suffix(".bmp"))):
        load_data(arguments("folder", root))


def test_a_16_bit_grey_image_keeps_its_greys(tmp_path, arguments):
    root = build_folder(tmp_path / "data", size=(16, 16), grey=True)
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for path in root.rglob("*.png"):
        Image.fromarray(ramp).save(path)
    images = load_data(arguments("folder", root))[0].images
    assert images.shape[1] == 1 and images[0].flatten().tolist() == list(range(256))


def test_mixed_sizes_become_size(tmp_path, arguments):
    root = build_folder_splits(tmp_path / "data")
    save(picture(1, 30, 30), root / "train" / "happy" / "0.png")
    train, test = load_data(arguments("folder", root, "--size", "32"))
    assert train.images.shape[2:] == (32, 32) and test.images.shape[2:] == (20, 20)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((20, 20), 20),
        ((32, 32), 32),
        ((40, 40), 32),
        ((20, 24), 32),
        ((60, 40), 32),
    ],
)
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
    assert decoding.decode(tmp_path / "a.png", (20, 20), False).shape == (3, 20, 20)
    assert decoding.decode(tmp_path / "a.png", (20, 20), True).shape == (1, 20, 20)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_decoded_without_a_warning(tmp_path):
    image = picture(1, 20, 20).convert("P")
    save(image, tmp_path / "a.png", transparency=bytes(range(256)))
    found = decoding.decode(tmp_path / "a.png", (20, 20), False)
    assert np.array_equal(found, np.asarray(image.convert("RGB")).transpose(2, 0, 1))


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


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_each_orientation_is_that_of_pillow(format, tmp_path):
    image = picture(3, 16, 8)
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "a", format, exif=exif)
        with Image.open(tmp_path / "a") as stored:
            wanted = ImageOps.exif_transpose(stored).convert("RGB")
        found = decoding.decode(tmp_path / "a", wanted.size, grey=False)
        assert np.array_equal(found, np.asarray(wanted).transpose(2, 0, 1))


def test_an_odd_tag_beside_the_orientation_does_no_harm(tmp_path):
    """A negative resolution: Pillow's exif_transpose cannot write it back, and fails."""
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHII", 0x011A, 10, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + struct.pack("<Iii", 0, -72, 1)
    picture(3, 16, 8).save(tmp_path / "a.png", exif=exif)
    assert decoding.decode(tmp_path / "a.png", (8, 16), grey=False).shape == (3, 16, 8)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!!garbage", b"Exif\0\0II*\0"])
@pytest.mark.parametrize("upright", [decoding.upright, align_faces.upright])
def test_damaged_tags_beside_whole_pixels_do_no_harm(exif, upright, tmp_path):
    image = picture(3, 16, 8)
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        assert np.array_equal(np.asarray(upright(stored)), np.asarray(image))


def test_an_eps_file_named_jpg_never_reaches_ghostscript(tmp_path, monkeypatch):
    picture(1, 20, 20).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fail)
    with pytest.raises(AssertionError):
        Image.open(tmp_path / "a.jpg").load()  # it would
    for source in (tmp_path / "a.jpg", decoding.Crop(tmp_path / "a.jpg", (0, 0, 9, 9))):
        with pytest.raises(UserError, match="a.jpg: could not be read as an image .none of JPEG, PNG"):
            decoding.decode(source, (20, 20), False)
        if not isinstance(source, decoding.Crop):
            with pytest.raises(UserError, match="none of JPEG, PNG"):
                decoding.size_and_mode(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "MPO"])
def test_formats_are_told_by_the_content(kind, tmp_path):
    picture(1, 20, 20).save(tmp_path / "a.jpg", kind)
    assert decoding.decode(tmp_path / "a.jpg", (20, 20), False).shape == (3, 20, 20)


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX", "JPEG2000", "PDF"])
def test_other_formats_are_refused(kind, tmp_path):
    picture(1, 20, 20).save(tmp_path / "a.jpg", kind)
    with pytest.raises(UserError, match="a.jpg: could not be read as an image"):
        decoding.decode(tmp_path / "a.jpg", (20, 20), False)


def pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("make", [pipe, lambda path: path.symlink_to("/dev/null"), Path.mkdir])
def test_pipes_devices_and_folders_do_not_block(make, soon, raf, tmp_path, arguments):
    path = raf / "Image" / "aligned" / "train_00003_aligned.jpg"
    path.unlink()
    make(path)
    for read in (decoding.size_and_mode, lambda path: decoding.decode(path, (9, 9), False), decoding.read_npy):
        with pytest.raises(UserError, match="not a regular file"):
            read(path)
    for read in (decoding.text_lines, decoding.csv_rows):
        with pytest.raises(UserError, match="not a regular file"):
            list(read(path))
    with pytest.raises(UserError, match="train_00003_aligned.jpg: could not be read as an image .not a regular file"):
        load_data(arguments("raf", raf))


def test_greys_in_floating_point_are_refused(tmp_path):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="a.tiff.*floating point"):
        decoding.decode(tmp_path / "a.tiff", (9, 9), True)


@pytest.mark.parametrize("value", [2**16, -1])
def test_greys_of_more_than_16_bits_are_refused(value, tmp_path):
    Image.fromarray(np.full((9, 9), value, np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="a.tiff.*more than 16 bits"):
        decoding.decode(tmp_path / "a.tiff", (9, 9), True)


def test_a_16_bit_grey_image_is_turned_upright(tmp_path):
    pixels, exif = np.zeros((8, 8), np.uint16), Image.Exif()
    pixels[:, :4], exif[0x0112] = 65535, 3
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert decoding.decode(tmp_path / "a.png", (8, 8), True)[0, 0].tolist() == [0] * 4 + [255] * 4


# ----------------------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------------------


def test_a_damaged_cache_is_decoded_anew(raf, arguments):
    first = load_data(arguments("raf", raf))[0].images
    args = arguments("raf", raf)
    for file in Path(args.cache).glob("*.npy"):
        file.write_bytes(file.read_bytes()[:5000])
    assert torch.equal(load_data(args)[0].images, first)


def test_second_load_does_not_decode(raf, arguments, monkeypatch):
    first = load_data(arguments("raf", raf))
    monkeypatch.setattr(decoding, "decode", fail)
    for a, b in zip(first, load_data(arguments("raf", raf))):
        assert torch.equal(a.images, b.images) and a.names == b.names


def test_noise_and_relabelled_lists_do_not_rebuild(raf, arguments, monkeypatch):
    load_data(arguments("raf", raf))
    monkeypatch.setattr(decoding, "decode", fail)
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
    monkeypatch.setattr(decoding, "decode", fail)
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


@pytest.mark.parametrize(
    "damage",
    [
        "half written",
        "of another state",
        "missing",
        "not an object",
        "binary",
        "odd values",
    ],
)
def test_a_note_that_does_not_fit_is_not_used(damage, raf, arguments):
    good, _ = load_data(arguments("raf", raf))
    note, file = cache_of(raf, ".json"), cache_of(raf, ".npy")
    text, wrong = note.read_text(), np.zeros((RAF_TRAIN, 3, 100, 100), np.uint8)
    content = json.loads(text) | {"checksum": zlib.crc32(wrong)}  # it would fit these
    np.save(file, wrong)
    if damage == "missing":
        note.unlink()
    elif damage == "half written":
        note.write_text(text[: len(text) // 2])
    elif damage == "of another state":
        note.write_text(json.dumps(content | {"stamp": "0" * 16}))
    elif damage == "odd values":
        note.write_text(json.dumps(content | {"shape": None}))
    else:
        note.write_bytes({"not an object": b"[]", "binary": b"\xff"}[damage])
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


def test_a_failed_rebuild_leaves_the_old_cache_and_nothing_else(raf, arguments, monkeypatch):
    good = load_data(arguments("raf", raf))[0].images
    path, before = raf / "Image" / "aligned" / "train_00020_aligned.jpg", sorted((raf.parent / "cache").iterdir())
    content, state = path.read_bytes(), path.stat()
    path.write_bytes(content[:-600])
    with pytest.raises(UserError, match="train_00020_aligned.jpg"):
        load_data(arguments("raf", raf))
    assert sorted((raf.parent / "cache").iterdir()) == before
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    monkeypatch.setattr(decoding, "decode", fail)
    assert torch.equal(load_data(arguments("raf", raf))[0].images, good)


def test_sizes_limits_and_roots_have_caches_of_their_own(raf, tmp_path, arguments, monkeypatch):
    other = build_raf(tmp_path / "raf2")
    combinations = [(root, *flags) for root in (raf, other) for flags in ([], ["--size", "64"], ["--limit", "14"])]
    for root, *flags in combinations:
        load_data(arguments("raf", root, *flags))
    monkeypatch.setattr(decoding, "decode", fail)
    for root, *flags in combinations:
        load_data(arguments("raf", root, *flags))


@pytest.mark.parametrize("limit, mapped", [(0, True), (2**30, False)])
def test_large_caches_are_memory_mapped(limit, mapped, raf, arguments, monkeypatch):
    monkeypatch.setattr(decoding, "IN_MEMORY", limit)
    first = load_data(arguments("raf", raf))[0].images
    again = load_data(arguments("raf", raf))[0].images
    assert torch.equal(first, again)
    maps = Path("/proc/self/maps").read_text()
    assert (str(cache_of(raf, ".npy")) in maps) == mapped


def test_writing_into_mapped_images_leaves_the_cache_alone(raf, arguments, monkeypatch):
    monkeypatch.setattr(decoding, "IN_MEMORY", 0)
    images = load_data(arguments("raf", raf))[0].images
    before = images.clone()
    images.zero_()
    assert torch.equal(load_data(arguments("raf", raf))[0].images, before)


@pytest.mark.parametrize(
    "damage",
    [
        "zeroed",
        "reshaped",
        "of another type",
        "foreign",
        "longer",
        "header alone",
        "empty",
        "a pickle",
        "one byte",
        "a pipe",
    ],
)
@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_cache_that_is_not_its_own_any_more_is_made_anew(damage, limit, soon, raf, arguments, monkeypatch):
    monkeypatch.setattr(decoding, "IN_MEMORY", limit)
    good = load_data(arguments("raf", raf))[0].images.clone()
    file = cache_of(raf, ".npy")
    content, array = file.read_bytes(), np.load(file)
    other = {
        "zeroed": np.zeros_like(array),
        "reshaped": array.reshape(RAF_TRAIN, 100, 3, 100),
        "foreign": array[::-1],
        "of another type": array.view(np.int8),
        "longer": np.concatenate([array, array]),
    }
    if damage in other:
        np.save(file, other[damage])
    elif damage == "a pickle":
        np.save(file, np.array([{}], dtype=object))
    elif damage == "a pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        one_byte = content[:-1] + bytes([content[-1] ^ 1])
        file.write_bytes({"header alone": content[:128], "empty": b"", "one byte": one_byte}[damage])
    assert torch.equal(load_data(arguments("raf", raf))[0].images, good)
    assert file.read_bytes() == content


def test_an_image_that_changes_while_another_process_decodes(raf, arguments, monkeypatch):
    """One process decodes, an image changes, a second process decodes; then the first one ends."""
    decode, calls = decoding.decode, []
    path = raf / "Image" / "aligned" / "train_00020_aligned.jpg"

    def change_and_load(source, *rest):
        calls.append(source)
        pixels = decode(source, *rest)
        if source == path and calls.count(path) == 1:
            save(Image.new("RGB", (100, 100), "white"), path)
            assert load_data(arguments("raf", raf))[0].images[19].min() == 255
        return pixels

    monkeypatch.setattr(decoding, "decode", change_and_load)
    with pytest.raises(UserError, match="images changed while they were decoded"):
        load_data(arguments("raf", raf))
    assert calls.count(path) == 2
    monkeypatch.setattr(decoding, "decode", fail)
    assert load_data(arguments("raf", raf))[0].images[19].min() == 255


def load_and_compare(args, expected, barrier, results):
    barrier.wait()
    results.put(bool((load_data(args)[0].images.numpy() == expected).all()))


def test_two_processes_that_decode_at_once_end_with_one_good_cache(raf, arguments, monkeypatch):
    args = arguments("raf", raf)
    expected = load_data(args)[0].images
    context = multiprocessing.get_context("spawn")  # a forked process cannot use torch's threads
    for _ in range(2):
        for path in Path(args.cache).iterdir():
            path.unlink()
        barrier, results = context.Barrier(2), context.Queue()
        given = args, expected.numpy(), barrier, results
        workers = [context.Process(target=load_and_compare, args=given) for _ in range(2)]
        for worker in workers:
            worker.start()
        assert [results.get(timeout=60) for _ in workers] == [True, True]
        for worker in workers:
            worker.join()
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "decode", fail)
            assert torch.equal(load_data(args)[0].images, expected)
        assert len(list(Path(args.cache).iterdir())) == 4  # images and note of either split


def test_caches_of_an_earlier_state_are_removed_and_nothing_else(raf, arguments):
    cache = raf.parent / "cache"
    load_data(arguments("raf", raf))
    old, old_note = cache_of(raf, ".npy"), cache_of(raf, ".json")
    family = old.name.removesuffix(old.name[-21:])
    names = ["-0123456789abcdef.npy", "-0123456789abcdef.json", "-mine.npy", ".npy"]
    others = {cache / f"{family}{name}": name.encode() for name in names}
    # a copy under a name that its note does not have
    others[cache / f"{family}-fedcba9876543210.npy"] = old.read_bytes()
    others[cache / f"{family}-fedcba9876543210.json"] = old_note.read_bytes()
    for path, content in others.items():
        path.write_bytes(content)
    load_data(arguments("raf", raf, "--size", "64"))
    os.utime(raf / "Image" / "aligned" / "train_00005_aligned.jpg", ns=(1, 1))
    load_data(arguments("raf", raf))
    assert not old.exists() and not old_note.exists()
    assert all(path.read_bytes() == content for path, content in others.items())
    assert len(list(cache.glob(f"{family}-*.npy"))) == 4 and len(list(cache.glob("raf-*-64px-*.npy"))) == 2


def test_what_a_killed_process_left_is_removed_after_a_day(raf, arguments):
    cache = raf.parent / "cache"
    load_data(arguments("raf", raf))
    path = cache_of(raf, ".npy")
    old, new, mine = (cache / f"{path.stem}.npy.tmp1", cache / f"{path.stem}.npy.tmp2", cache / "mine.npy.tmp3")
    for file in (old, new, mine):
        file.write_text("half")
    for file in (old, mine):
        os.utime(file, (time.time() - 90000,) * 2)
    path.unlink()
    load_data(arguments("raf", raf))
    assert not old.exists() and new.exists() and mine.exists()


def test_caches_of_other_images_stay(tmp_path, arguments):
    root = build_folder(tmp_path / "data", count=30)
    flags = ("--limit", "20", "--batch-size", "2")
    for split in ("test", "valid"):  # as many training images, others
        load_data(arguments("folder", root, "--split", split, *flags))
    assert len(list((tmp_path / "cache").glob("folder-*-train20-*.npy"))) == 2


@pytest.fixture
def full_disk():
    """Files of more than 100 kB cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_before_anything_is_decoded(full_disk, raf, arguments, monkeypatch):
    monkeypatch.setattr(decoding, "decode", fail)
    with pytest.raises(UserError, match=r"--cache .*: 0.00 GiB could not be written \(File too large\)"):
        load_data(arguments("raf", raf))
    assert list((raf.parent / "cache").iterdir()) == []


@pytest.fixture(params=["no such call", "not on this file system"])
def no_reservation(request, monkeypatch):
    """The space of a file cannot be reserved here."""

    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if request.param == "no such call":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)


def test_a_full_disk_that_is_noticed_late_is_one_line_too(no_reservation, full_disk, raf, arguments):
    with pytest.raises(UserError, match=r"--cache .* could not be written \(File too large\)"):
        load_data(arguments("raf", raf))
    assert list((raf.parent / "cache").iterdir()) == []


def test_without_reservation_the_cache_is_the_same(no_reservation, raf, arguments, monkeypatch):
    load_data(arguments("raf", raf))
    without = cache_of(raf, ".npy").read_bytes()
    monkeypatch.undo()
    cache_of(raf, ".npy").unlink()
    load_data(arguments("raf", raf))
    assert cache_of(raf, ".npy").read_bytes() == without


def test_an_interrupted_build_leaves_nothing(raf, arguments, monkeypatch):
    decode, calls = decoding.decode, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(decoding, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_data(arguments("raf", raf))
    assert list((raf.parent / "cache").iterdir()) == []


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_cache_that_cannot_be_made_is_one_line(where, raf, tmp_path, arguments):
    (tmp_path / "file").write_text("")
    args = arguments("raf", raf)
    args.cache = str(tmp_path / "file" / ("" if where == "a file" else "cache"))
    with pytest.raises(UserError, match=f"--cache {args.cache}: .*could not be written"):
        load_data(args)


def test_toy_faces_that_do_not_fit_in_memory_are_one_line(few_toys, arguments):
    args = arguments("toy")
    args.size = 10**6
    with pytest.raises(UserError, match="--size 1000000: 70 faces"):
        load_data(args)


def test_work_in_threads_keeps_the_order_over_all_chunks():
    items = list(range(2500))
    assert list(decoding.in_threads(lambda i: -i, items, "x")) == [-i for i in items]
    assert list(decoding.in_threads(str, items[:7], "x", chunk=3)) == list(map(str, range(7)))
