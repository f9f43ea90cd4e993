"""Opening the files of others: what goes wrong is one line. Images are decoded once and kept in a cache.

Letters in shapes: N samples, C channels, H and W pixels.
"""

import contextlib
import csv
import errno
import glob
import hashlib
import json
import math
import os
import pickle
import re
import stat
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support import toyfaces
from support.distributed import first_goes_ahead
from support.streams import UNPRINTABLE, one_line

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from common import UserError, write_atomically

# ----------------------------------------------------------------------------------------------------------------------
# Files of others: one place that turns what goes wrong into a line
# ----------------------------------------------------------------------------------------------------------------------

def check_names(names, where) -> None:
    """Refuse file and class names that a list, a csv file or a terminal cannot hold."""
    for name in names:
        if UNPRINTABLE.search(name):
            raise UserError(f"{one_line(where)}: {name!r} holds a control character or is not UTF-8: rename it")


def stat_regular(path) -> os.stat_result:
    """os.stat; ValueError for a folder, a device or a FIFO, which would block its reader."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file")
    return found


@contextlib.contextmanager
def reading(where, what: str):
    """Turns whatever goes wrong inside into a UserError: "WHERE: could not be read as WHAT (reason)"."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{one_line(where)}: the file is missing") from None
    except Exception as error:  # decoders and parsers raise errors of many kinds for damaged files
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        elif not reason or not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        reason = one_line(" ".join(reason.split())[:200])
        raise UserError(f"{one_line(where)}: could not be read as {what} ({reason})") from None


def as_int(text: str) -> int:
    """A whole number in decimal digits; ValueError for anything else, "0_6" and "٣" among it, which int() takes."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip()):
        raise ValueError(f"{text[:40]!r} is not a whole number")
    return int(text)


def as_float(text: str) -> float:
    """A finite number in decimal digits; ValueError for anything else, "1_0" among it, which float() takes."""
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text.strip()):
        raise ValueError(f"{text[:40]!r} is not a number")
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]!r} is out of range")
    return value


def text_lines(path):
    """Yield (line number, line) of the lines of a text file that are not empty, without surrounding blanks."""
    with reading(path, "a text file"):
        stat_regular(path)
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line := line.strip():
                    yield number, line


def csv_rows(path, columns: int | None = None):
    """Yield (line number, fields) of the rows of a csv file that are not empty.

    columns: UserError for a row with another number of fields; None: as many as the first row has.
    """
    with reading(path, "a csv file"):
        stat_regular(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                columns = columns or len(row)
                if row and len(row) != columns:
                    raise UserError(f"{path}, line {reader.line_num}: {len(row)} fields, expected {columns}")
                if row:
                    yield reader.line_num, [text.strip() for text in row]


def read_rows(path) -> tuple[list[tuple[int, str, str]], bool]:
    """(line number, name, label) of each line of a list, and whether the list has a header, as a csv of names does.

    Without a header a line ends in a blank and a number, or is divided by a comma, or by its last blank.
    """
    lines = list(text_lines(path))
    first = re.sub(r'["\s]', "", lines[0][1].lower()) if lines else ""
    header = first in ("name,label", "image,label", "filename,label")
    rows = []
    for line_number, line in lines[header:]:
        blank = not header and (re.search(r"[^\s,]\s+-?\d+$", line) or "," not in line)
        with reading(f"{path}, line {line_number}", "a name and a label"):
            fields = [text.strip() for text in (line.rsplit(None, 1) if blank else next(csv.reader([line])))]
            if len(fields) != 2 or not all(fields):
                raise ValueError(f"{line[:80]!r}")
        rows.append((line_number, *fields))
    return rows, header


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
        f"{where}: labels from {low} to {high} may count from 0 or from 1, neither 0 nor {num_classes} occurs; "
        "write class names instead"
    )


def numbered(rows, path, num_classes: int) -> tuple[list[tuple[int, str, int]], int]:
    """The rows of `read_rows` with numbers for labels, and 0 or 1, what they count from.

    Raises UserError for a line outside 0..num_classes and a list whose base is unclear.
    """
    found = []
    for line_number, name, text in rows:
        with reading(f"{path}, line {line_number}", "a name and a label"):
            found.append((line_number, name, as_int(text)))
        if not 0 <= found[-1][2] <= num_classes:
            raise UserError(f"{path}, line {line_number}: label {text} is outside the {num_classes} classes")
    first = {number: line_number for line_number, _, number in reversed(found)}
    if 0 in first and num_classes in first:
        raise UserError(
            f"{path}, lines {first[0]} and {first[num_classes]}: labels 0 and {num_classes}, but {num_classes} classes "
            "count from 0 or from 1"
        )
    return found, label_base([number for _, _, number in found], num_classes, path) if found else 0


def read_npy(path) -> float:
    """The one number, or string of a number, in an npy file."""
    with reading(path, "an npy file with one number"):
        stat_regular(path)
        try:
            value = np.load(path, allow_pickle=False)
        except ValueError:  # whose text says how to run what is in the file
            raise ValueError("not an array of numbers or strings") from None
        return as_float(str(value.item()))


def once(rows, path, key=str) -> list:
    """The rows (line number, name, value) of a list without repetitions, which are counted on the screen.

    key: what the names of one image have in common. Raises UserError for a name with two values, and as `check_names`.
    """
    first = {}
    for row in rows:
        line_number, name, value = row
        check_names([name], f"{path}, line {line_number}")
        earlier = first.setdefault(key(name), row)
        if earlier[2] != value:
            raise UserError(f"{path}, line {line_number}: {name} stands in line {earlier[0]} too, with other values")
    if len(first) < len(rows):
        print(f"{path}: lines left out that repeat an earlier one: {len(rows) - len(first):,}")
    return list(first.values())


class PickledArray:
    """Stands in for numpy.ndarray while a pickle is read, so that nothing of numpy runs on what a file says.

    numpy writes _reconstruct(ndarray, (0,), b"b") and then the state (version, shape, dtype, Fortran order, bytes).
    """

    def __init__(self, *ignored):
        self.shape, self.dtype, self.fortran, self.content = (), None, False, b""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.content = state

    @classmethod
    def from_buffer(cls, content, dtype, shape, order):
        """As numpy writes arrays in protocol 5."""
        array = cls()
        array.__setstate__((1, shape, dtype, order == "F", content))
        return array

    def as_uint8(self) -> np.ndarray:
        """The array; ValueError for any other type of numbers than unsigned bytes."""
        if not isinstance(self.dtype, PickledType) or self.dtype.name not in ("u1", "|u1"):
            raise ValueError("an array is not of unsigned bytes")
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        return np.frombuffer(content, np.uint8).reshape(self.shape, order="F" if self.fortran else "C")


class PickledType:
    """Stands in for numpy.dtype."""

    def __init__(self, name="", *ignored):
        self.name = name

    def __setstate__(self, state):
        pass  # byte order and fields, which bytes do not have


def latin1(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which protocol 2 writes bytes."""
    return text.encode("latin1")


class PlainUnpickler(pickle._Unpickler):
    """Reads arrays, bytes, str, int, list, tuple and dict; imports nothing and calls nothing but the stand-ins above.

    It is the unpickler in Python: the one in C allocates as much memory as a number in the file says.
    """

    STAND_INS = {
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledType,
        ("numpy.core.multiarray", "_reconstruct"): PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): PickledArray,
        ("numpy.core.numeric", "_frombuffer"): PickledArray.from_buffer,
        ("numpy._core.numeric", "_frombuffer"): PickledArray.from_buffer,
        ("_codecs", "encode"): latin1,
    }
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data need")
        return self.STAND_INS[module, name]

    def load_bytearray8(self):
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # not allocated before it is there

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def read_pickle(path) -> dict:
    """The dict of plain data in a pickle, its arrays as PickledArray. Use inside `reading`."""
    stat_regular(path)
    with open(path, "rb") as file:
        try:
            content = PlainUnpickler(file, encoding="latin1").load()
        except (KeyError, IndexError):  # an opcode or a stack entry that does not exist
            raise ValueError("not a pickle") from None
    if not isinstance(content, dict):
        raise ValueError("not a dict")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Told by the content, whatever the suffix. All that Pillow knows would include EPS, which runs Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")


# Images that are counted, not read: they would be told by their content, but nobody expects it.
OTHER_SUFFIXES = tuple(".gif .tif .tiff .heic .heif .avif .jfif .jpe .jp2 .jxl .pgm .ppm .eps".split())
# Folders of these names are no classes. Of data in two parts, train and test are read, so spelt.
SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the other files in a folder of classes or of images, by name; not the hidden ones.

    Raises UserError if it cannot be listed, holds a link that leads nowhere, or a folder that is named as a split is.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and not os.path.exists(entry.path):
                    raise UserError(f"{one_line(entry.path)}: a link that leads nowhere")
                (folders if entry.is_dir() else files).append(folder / entry.name)
    except OSError as error:
        raise UserError(f"{one_line(folder)}: the folder cannot be listed ({error.strerror})") from None
    check_names([path.name for path in folders], folder)
    for path in folders:
        if path.name.lower() in SPLIT_NAMES:
            raise UserError(f"{path}: a split where classes are expected; the parts of a data set are train and test")
    return sorted(folders), sorted(files)


def list_images(folders: list[Path]) -> list[list[Path]]:
    """The images below each folder, at any depth, by name. Formats that are not read are counted on the screen.

    Raises UserError as `list_folder`, and for a folder that is met twice, by a link: its images would count twice,
    perhaps in two classes.
    """
    lists, met, passed_over = [], {}, Counter()
    for top in folders:
        waiting, images = [top], []
        for folder in waiting:
            earlier = met.setdefault(os.path.realpath(folder), folder)
            if earlier is not folder:
                raise UserError(f"{one_line(folder)}: the same folder as {one_line(earlier)}")
            inner, files = list_folder(folder)
            waiting += inner
            images += [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
            passed_over.update(path.suffix.lower() for path in files if path.suffix.lower() in OTHER_SUFFIXES)
        lists.append(sorted(images))
    say_passed_over(folders[0].parent if folders else None, passed_over)
    return lists


def say_passed_over(where, counts: Counter) -> None:
    """counts: suffix -> number of files."""
    if counts:
        listing = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items()))
        print(f"{where}: images that are not read, for their formats: {listing}")


def images_below(top: Path) -> list[Path]:
    """The images at any depth of a folder that need not be classes, by name, links followed, each folder once.

    Not the hidden ones, nor the sheets of align_faces.py. Formats that are not read are counted on the screen. Raises
    UserError for a folder that cannot be listed.
    """
    paths, met, passed_over = [], set(), Counter()

    def refuse(error: OSError):
        raise UserError(f"{one_line(error.filename)}: the folder cannot be listed ({error.strerror})")

    for folder, inner, names in os.walk(top, onerror=refuse, followlinks=True):
        if (here := os.path.realpath(folder)) in met:
            inner.clear()
            continue
        met.add(here)
        inner[:] = [name for name in inner if not name.startswith(".")]
        for path in [Path(folder, name) for name in names if not name.startswith(".")]:
            sheet = path.name == "faces.png" and path.with_suffix(".csv").exists()
            if path.suffix.lower() in IMAGE_SUFFIXES and not sheet:
                paths.append(path)
            passed_over[path.suffix.lower()] += path.suffix.lower() in OTHER_SUFFIXES
    say_passed_over(top, +passed_over)
    return sorted(paths)


@dataclass(frozen=True)
class Crop:
    """A part of an image file: box is left, upper, right, lower, in pixels."""

    path: Path
    box: tuple[int, int, int, int]


def place_of(source):
    """What an error names: the path of a source, or where in a file its pixels stand."""
    return source.path if isinstance(source, Crop) else source[0] if isinstance(source, tuple) else source


def open_image(source) -> Image.Image:
    """The image of a source: a path, a Crop, or (where, "70 80 82 ...") as in fer2013.csv. Use inside `reading`."""
    if isinstance(source, tuple):
        values = source[1].split()
        if len(values) != 48 * 48 or source[1].strip("0123456789 "):  # what strip leaves begins with another character
            raise ValueError("not 48 x 48 grey values")
        return Image.fromarray(np.array(values, dtype=np.uint8).reshape(48, 48))
    if isinstance(source, Crop):
        with open_image(source.path) as whole:
            left, upper, right, lower = source.box
            box = max(0, left), max(0, upper), min(whole.width, right), min(whole.height, lower)
            if box[0] >= box[2] or box[1] >= box[3]:
                raise UserError(
                    f"{source.path}: the face box {source.box} lies outside the image, {whole.width} x {whole.height}"
                )
            return whole.crop(box)
    stat_regular(source)
    return Image.open(source, formats=FORMATS)


TURNS = {  # of the EXIF tag Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """Turned by its EXIF tag alone: Pillow's exif_transpose writes the other tags anew, and fails on odd ones."""
    image.load()  # a TIFF turns itself
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many kinds where the tags are damaged; the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def decode(source, size: tuple[int, int], grey: bool) -> np.ndarray:
    """uint8 (C, H, W) of a source, turned upright by its EXIF tag, resized to (width, height) `size`, not cropped.

    Raises UserError for an image that is missing, damaged, or of a format or depth that is not read.
    """
    with reading(place_of(source), "an image"), open_image(source) as opened:
        image = upright(opened)
        if image.mode == "F":
            raise ValueError("grey values in floating point, of unknown range")
        if image.mode.startswith("I"):  # 16 bits: Pillow would clip them
            deep = np.asarray(image)
            if deep.min() < 0 or deep.max() >= 2**16:
                raise ValueError("grey values of more than 16 bits")
            image = Image.fromarray((deep >> 8).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns of the direct way
        image = image.convert("L" if grey else "RGB")
        if image.size != size:
            image = image.resize(size, Image.BILINEAR)  # Pillow's filter widens when it shrinks: no aliasing
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def in_threads(work, items: list, what: str, chunk: int = 1024):
    """Yield work(item) in order, done in threads, at most a chunk ahead.

    Pillow decodes without holding the interpreter lock.
    """
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(desc=what, total=len(items), leave=False, disable=None, unit="img") as bar,
    ):
        for start in range(0, len(items), chunk):
            for result in pool.map(work, items[start : start + chunk]):
                yield result
                bar.update()


# ----------------------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------------------

IN_MEMORY = 2**30  # bytes; a larger cache is memory-mapped
DECODING = 2  # part of the stamp: to be counted up when the same files come to give other pixels


def decode_all(index, args, split: str) -> Tensor:
    """uint8 (N, C, H, W) of all images of an Index: cached if their files are unchanged, else decoded and put there.

    Images that all have one square size of at most --size stay native (the device enlarges them); others become --size.
    Raises UserError for an image that cannot be read and a cache that cannot be written.
    """
    if args.data == "toy":
        return draw_toys(index, args, split)
    if args.data == "cifar10":
        return torch.from_numpy(np.stack(index.sources))

    stamp = stamp_of(index)
    which = os.fsencode(Path(args.root).resolve()) + repr(index.names).encode()
    # Two processes that decode at once write the same pixels under one name, or others under another.
    family = f"{args.data}-{hashlib.sha256(which).hexdigest()[:8]}-{split}{len(index.names)}-{args.size}px"
    file = Path(args.cache) / f"{family}-{stamp}.npy"
    with first_goes_ahead():
        images = load_cache(file, stamp)
        if images is None:
            images = build_cache(index, args, split, file, stamp)
            remove_outdated(file, family)
    return images


def draw_toys(index, args, split: str) -> Tensor:
    try:
        faces = np.empty((len(index.sources), 3, args.size, args.size), np.uint8)
    except MemoryError:
        raise UserError(f"--size {args.size}: {len(index.sources):,} faces of that size do not fit in memory") from None
    for k, number in enumerate(index.sources):
        face, _, _ = toyfaces.draw_face(split, number, size=args.size, difficulty=args.difficulty)
        faces[k] = face.transpose(2, 0, 1)
    return torch.from_numpy(faces)


def stamp_of(index) -> str:
    """A hash of the names of the images and of the state of their files, not of the labels."""
    stamp = hashlib.sha256(repr(DECODING).encode())
    for name, source in zip(index.names, index.sources):
        if isinstance(source, tuple):
            state = source[1]
        else:
            path, box = (source.path, source.box) if isinstance(source, Crop) else (source, None)
            with reading(path, "an image"):
                found = stat_regular(path)
            state = found.st_size, found.st_mtime_ns, box
        stamp.update(repr((name, state)).encode())
    return stamp.hexdigest()[:16]


def checksum(images: Tensor) -> int:
    """Of all images; of 256 of them, evenly spread, if they are too many to be kept in memory."""
    step = 1 if images.nbytes <= IN_MEMORY else max(1, len(images) // 256)
    return zlib.crc32(np.ascontiguousarray(images.numpy()[::step]))


def map_array(file: Path) -> Tensor:
    large = file.stat().st_size > IN_MEMORY and os.name != "nt"  # Windows renames no mapped file
    mode = "c" if large else None  # "c": torch wants a writable view
    return torch.from_numpy(np.load(file, mmap_mode=mode, allow_pickle=False))


def load_cache(file: Path, stamp: str) -> Tensor | None:
    """The images in a cache file; None if it is not there, or not what its note describes: shape and checksum."""
    try:
        note = json.loads(file.with_suffix(".json").read_text())
        stat_regular(file)
        images = map_array(file)
        whole = images.dtype == torch.uint8 and [*images.shape] == note["shape"] and note["stamp"] == stamp
        return images if whole and checksum(images) == note["checksum"] else None
    except Exception:  # of any kind in a damaged file; it is then made anew
        return None


def build_cache(index, args, split: str, file: Path, stamp: str) -> Tensor:
    """Decode the images of an Index into a cache file, with a note beside it; see `decode_all`."""
    what = f"{args.data} {split}"
    sizes, modes = map(set, zip(*in_threads(size_and_mode, index.sources, f"looking at {what}")))
    native = next(iter(sizes)) if len(sizes) == 1 and None not in sizes else (0, 1)
    size = native if native[0] == native[1] <= args.size else (args.size, args.size)
    grey = all(mode in ("L", "1", "LA") or mode.startswith("I") for mode in modes)
    shape = (len(index.sources), 1 if grey else 3, size[1], size[0])
    images = None

    def write(path):
        nonlocal images
        with open(path, "w+b") as stream:
            np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
            reserve(stream, stream.tell() + math.prod(shape))
            decoded = in_threads(lambda source: decode(source, size, grey), index.sources, f"decoding {what}")
            for pixels in decoded:
                stream.write(pixels.tobytes())
        if stamp_of(index) != stamp:
            raise UserError(f"--data {args.data}: images changed while they were decoded; start again")
        images = map_array(path)  # now: another process may remove the file as soon as it has its name

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, write)
        note = {"stamp": stamp, "shape": shape, "checksum": checksum(images)}
        write_atomically(file.with_suffix(".json"), lambda path: path.write_text(json.dumps(note)))
    except (OSError, OverflowError) as error:
        need = math.prod(shape) / 2**30
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--cache {args.cache}: {need:,.2f} GiB could not be written ({reason})") from None
    return images


def reserve(stream, size: int) -> None:
    """Take the space of a file at once: a disk that is too full says so before anything is decoded."""
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except AttributeError:  # not on every system
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # nor on every file system
            raise


def size_and_mode(source) -> tuple[tuple[int, int] | None, str]:
    """Width and height, and Pillow's mode, of an image; None and "RGB" for a Crop, as they come in all sizes."""
    if isinstance(source, Crop):
        return None, "RGB"
    with reading(place_of(source), "an image"), open_image(source) as image:
        return image.size, image.mode


def remove_outdated(file: Path, family: str) -> None:
    """Remove the caches of the same images in an earlier state: of the files so named, those that match their notes.

    So are the files that killed processes have left unfinished: nobody has written to them for a day.
    """
    for left in file.parent.glob(f"{glob.escape(family)}-*.tmp*"):
        with contextlib.suppress(OSError):  # another process may be faster
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink()
    for other in file.parent.glob(f"{glob.escape(family)}-*.npy"):
        if other != file and load_cache(other, other.stem.removeprefix(f"{family}-")) is not None:
            other.unlink(missing_ok=True)
            other.with_suffix(".json").unlink(missing_ok=True)
