"""Find, align and crop the faces of a folder of photographs: what comes before training or prediction on one's own.

MTCNN (K. Zhang et al., "Joint Face Detection and Alignment using Multitask Cascaded Convolutional Networks", 2016,
package mtcnn) finds boxes and five landmarks; a similarity transform (rotation, scale, shift) brings the landmarks onto
a template. The crops lie in the same tree of folders, so class folders stay class folders. faces.csv has a row for
every photograph, also for those without a face and those that cannot be read. Stopped at any moment, the same command
goes on. Crops that no photograph has any more are removed.

    pip install -r requirements-align.txt                        # the detector needs TensorFlow
    python align_faces.py photos/ --out faces/
    python cocuring.py --data folder --root faces/
"""

import argparse
import csv
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported; see also `import_mtcnn`


def say_interrupted(kind, error, trace, shown=sys.excepthook) -> None:
    """Ctrl-C while the packages are imported is one line too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        shown(kind, error, trace)


if __name__ == "__main__":
    sys.excepthook = say_interrupted

import numpy as np  # noqa: E402
from PIL import ExifTags, Image, ImageDraw  # noqa: E402
from tqdm import tqdm  # noqa: E402

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # no other decoder is tried, whatever a file's name says
NOT_READ = (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jfif", ".jp2", ".dng", ".raw", ".cr2", ".nef", ".psd")
COLUMNS = ("source", "output", "box", "landmarks", "confidence", "status")
POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")  # left and right as seen by the viewer
# Where they come to lie in a crop of side 1 without margin: the template of ArcFace (J. Deng et al., CVPR 2019), 112 px
# there.
TEMPLATE = (
    np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]) / 112
)


class UserError(ValueError):
    """Bad input: one line, exit status 2."""


def one_line(text) -> str:
    """`text` with control characters, line ends and bytes that are not UTF-8 escaped: a file name may hold them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], str(text))


def reason_of(error: Exception) -> str:
    """An error's text on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: error: {message} (--help lists the options)") + "\n")


def parse_args(argv=None):
    parser = Parser("align_faces.py", description="Find, align and crop the faces of a folder of photographs.",
                    allow_abbrev=False)
    parser.add_argument("photos", type=Path, help="folder of photographs, searched at any depth")
    parser.add_argument("--out", type=Path, default=Path("faces"), help="folder of the crops (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels of the square crops (default: %(default)s)")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.2,
        help="room around the template, as a share of it: 0 is face recognition's tight crop (default: %(default)s)",
    )
    parser.add_argument(
        "--face",
        choices=("largest", "central", "all"),
        default="largest",
        help="which face of a photograph with several (default: %(default)s)",
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=0.9,
        help="faces that the detector is less sure of are passed over (default: %(default)s)",
    )
    parser.add_argument(
        "--detect-size",
        type=int,
        default=1024,
        help="photographs are shrunk to this longer side for detection, not for the crop (default: %(default)s)",
    )
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="of the crops (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 32),
        help="processes, each with a detector of its own (default: the number of cores, at most 32: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="do everything anew")
    args = parser.parse_args(argv)
    bounds = dict(size=(16, 4096), detect_size=(64, 8192), workers=(1, 256), margin=(0, 5), min_confidence=(0, 1))
    for key, (low, high) in bounds.items():
        if not low <= getattr(args, key) <= high:
            parser.error(f"--{key.replace('_', '-')} lies in [{low}, {high}]")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Geometry
# ----------------------------------------------------------------------------------------------------------------------


def template(size: int, margin: float) -> np.ndarray:
    """The five points (5, 2) in a crop of `size` pixels, in pixels; margin shrinks them about the centre."""
    return ((TEMPLATE - 0.5) / (1 + margin) + 0.5) * size


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift A, float64 (2, 3), that minimises sum |A (x, y, 1) - (x', y')|^2.

    source, target: (N, 2). Raises ValueError where all points of the source are one. (With points as complex numbers z,
    it is linear: z' = a z + b.)
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (np.asarray(source, float), np.asarray(target, float)))
    if (z == z[0]).all():
        raise ValueError("all landmarks are one point")
    centred = z - z.mean()
    a = (centred.conj() * (w - w.mean())).sum() / (abs(centred) ** 2).sum()
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def crop(image: Image.Image, landmarks: np.ndarray, size: int, margin: float) -> Image.Image:
    """The aligned face: `image` (RGB) seen so that `landmarks` (5, 2), in its pixels, on the template, else black."""
    matrix = similarity(landmarks, template(size, margin))
    shrink = max(1, int(1 / np.hypot(matrix[0, 0], matrix[1, 0])))
    if shrink > 1:  # Pillow's transform does not filter: shrink first
        image, landmarks = image.reduce(shrink), (np.asarray(landmarks) + 0.5) / shrink - 0.5
    back = similarity(template(size, margin), landmarks)  # Pillow asks where each pixel comes from
    return image.transform((size, size), Image.AFFINE, tuple(back.ravel()), Image.BICUBIC)


def choose(faces: list[dict], which: str, width: int, height: int) -> list[dict]:
    """The largest box, the one nearest to the centre, or all, largest first."""
    faces = sorted(faces, key=lambda face: -face["box"][2] * face["box"][3])
    if which == "central":
        middle = np.array([width, height]) / 2
        faces.sort(key=lambda face: np.hypot(*(np.array(face["box"][:2]) + np.array(face["box"][2:]) / 2 - middle)))
    return faces if which == "all" else faces[:1]


# ----------------------------------------------------------------------------------------------------------------------
# One photograph
# ----------------------------------------------------------------------------------------------------------------------

detector = None  # of this process; made by `start_worker`


def import_mtcnn():
    """The package mtcnn. TensorFlow, which it imports, writes messages to the error output before it reads its
    settings: they are kept back, and shown only when the import fails."""
    try:
        shown = os.dup(2)
    except OSError:  # the error output is closed
        shown = os.open(os.devnull, os.O_WRONLY)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            import mtcnn
        except BaseException:
            kept.seek(0)
            os.write(shown, kept.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)
    return mtcnn


def start_worker(parent: int | None = None) -> None:
    """Make this process's detector, on one thread: the processes share the cores. parent: see `watch`."""
    global detector
    if parent is not None:
        watch(parent)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    try:
        detector = import_mtcnn().MTCNN()
    except Exception as error:  # raised by `align`: what ends a worker at its start reaches nobody
        detector = no_detector(error)


def no_detector(error: Exception) -> UserError:
    """TensorFlow raises many kinds where its parts do not fit together."""
    return UserError(f"no face detector ({reason_of(error)}): pip install -r requirements-align.txt")


def watch(parent: int) -> None:
    """End this worker when the process `parent` has ended, however that was; Ctrl-C is the parent's to handle."""

    def end() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()


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
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many kinds where the tags are damaged; the pixels are whole
        turn = None
    return image if turn is None else image.transpose(turn)


def open_photograph(path: Path) -> Image.Image:
    """RGB, upright by its EXIF tag. Raises UserError for what cannot be read as a photograph."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = upright(opened)
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to white
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except MemoryError:
        raise UserError("it does not fit into the memory") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise UserError(reason_of(error)) from None


def find_faces(image: Image.Image, args) -> list[dict]:
    """box (x, y, width, height), landmarks (5, 2) and confidence of each face, in pixels of the whole image."""
    scale = min(1.0, args.detect_size / max(image.size))
    small = image
    if scale < 1:
        small = image.resize([max(1, round(side * scale)) for side in image.size], Image.BILINEAR, reducing_gap=2)
    if min(small.size) < 24:  # the detector's own smallest face is 20 pixels
        return []
    return [
        dict(
            box=[value / scale for value in face["box"]],
            confidence=float(face["confidence"]),
            landmarks=np.array([face["keypoints"][point] for point in POINTS], float) / scale,
        )
        for face in detector.detect_faces(np.asarray(small))
        if face["confidence"] >= args.min_confidence
    ]


def align(job: tuple[str, str], args) -> list[dict]:
    """The rows of the manifest for one photograph; job: its path and that of its crop, relative to the two folders."""
    if isinstance(detector, UserError):
        raise detector
    source, output = job
    row = dict.fromkeys(COLUMNS, "") | {"source": source}
    try:
        image = open_photograph(args.photos / source)
        faces = choose(find_faces(image, args), args.face, *image.size)
        crops = [crop(image, face["landmarks"], args.size, args.margin) for face in faces]
    except MemoryError:  # of the detector: the next photographs would fail too
        raise
    except Exception as error:  # whatever the detector raises, the other photographs go on
        return [row | {"status": f"unreadable: {reason_of(error)}"}]
    rows = []
    for number, (face, face_image) in enumerate(zip(faces, crops)):
        name = output if number == 0 else f"{output.removesuffix(f'.{args.format}')}_{number + 1}.{args.format}"
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if args.format == "jpg" else "PNG"
        write_whole(path, lambda file, face_image=face_image: face_image.save(file, kind, quality=95))
        numbers = {key: " ".join(f"{value:.1f}" for value in np.ravel(face[key])) for key in ("box", "landmarks")}
        rows.append(row | numbers | {"output": name, "confidence": f"{face['confidence']:.4f}", "status": "ok"})
    return rows or [row | {"status": "no face"}]


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write) -> None:
    """Call write(temporary path), then rename it to `path`: a file that is there is whole."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_photographs(folder: Path) -> list[Path]:
    """All photographs below a folder, relative to it. Formats that are not read are counted on the screen.

    Hidden files and folders are passed over, as in training, and links to folders are not followed.
    """
    sources, other, closed = [], Counter(), []
    for place, folders, files in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES:
                # No pipe, no device: they would block. A link that leads nowhere is listed: it gets its row
                if os.path.isfile(path) or not os.path.exists(path):
                    sources.append(path.relative_to(folder))
            elif path.suffix.lower() in NOT_READ:
                other[path.suffix.lower()] += 1
    if closed:
        raise UserError(f"{closed[0]}: the folder cannot be read ({len(closed)} of them)")
    for suffix, count in sorted(other.items()):
        print(f"{count:,} {suffix} files are not read: only {', '.join(SUFFIXES)}")
    return sorted(sources)


def output_names(sources: list[Path], form: str) -> list[str]:
    """The file of the first face of each photograph: no two photographs ever write one file.

    Compared without case, as some file systems do. Photographs of one name but two suffixes keep the suffix; what is
    still doubled, or ends like a further face of another ("a_2" beside "a"), gets a dash.
    """
    stems = [source.with_suffix("").as_posix() for source in sources]
    count = Counter(stem.casefold() for stem in stems)
    for k, source in enumerate(sources):
        if count[stems[k].casefold()] > 1:
            stems[k] += f"_{source.suffix[1:].lower()}"
    while True:
        known, taken, before = {stem.casefold() for stem in stems}, {"faces"}, list(stems)  # faces.png is the sheet
        for k, stem in enumerate(stems):
            further = re.fullmatch(r"(.+)_\d+", stem.casefold(), re.DOTALL)
            if stem.casefold() in taken or (further and further[1] in known):
                stems[k] += "-"
            taken.add(stems[k].casefold())
        if stems == before:
            return [f"{stem}.{form}" for stem in stems]


def list_jobs(args) -> list[tuple[str, str]]:
    """(source, output) of every photograph, relative paths. Raises UserError for folders that hold one another."""
    if not args.photos.is_dir():
        raise UserError(f"{args.photos}: no such folder")
    photos, out = args.photos.resolve(), args.out.resolve()
    if photos in (out, *out.parents):
        raise UserError(f"--out {args.out} lies in {args.photos}: the crops would be taken for photographs")
    if out in photos.parents:
        raise UserError(f"{args.photos} lies in --out {args.out}: crops could replace photographs")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is no folder")
    sources = list_photographs(args.photos)
    if not sources:
        raise UserError(f"{args.photos}: no photographs ({', '.join(SUFFIXES)}) in it")
    if odd := [source for source in sources if "\r" in str(source)]:
        raise UserError(f"{args.photos / odd[0]}: faces.csv cannot hold a carriage return in a name: rename it")
    return list(zip((source.as_posix() for source in sources), output_names(sources, args.format)))


def read_manifest(args, jobs: list[tuple[str, str]]) -> tuple[dict[str, list[dict]], set[str]]:
    """The rows of each photograph that is done, and the outputs of all rows.

    Done: it was read, its crops (if any) are there and have today's names, and it has not changed since. With
    --overwrite none is done, and a damaged manifest is read as far as it goes; else that is a UserError.
    """
    path = args.out / "faces.csv"
    if not path.exists():
        return {}, set()
    rows: dict[str, list[dict]] = {}
    try:
        with open_manifest(path, "r") as file:
            lines = file.read().split("\n")
        for row in csv.DictReader((f"{line}\n" for line in lines[:-1]), strict=True):
            if tuple(row) != COLUMNS or not row["status"] or None in row.values():
                raise ValueError("not a list of aligned faces")
            rows.setdefault(row["source"], []).append(row)
    except (csv.Error, ValueError) as error:
        if not args.overwrite:
            raise UserError(f"{path}: is damaged ({error}); --overwrite does everything anew") from None
    outputs = {row["output"] for own in rows.values() for row in own if row["output"]}
    if args.overwrite:
        return {}, outputs
    if lines[-1] and rows:  # cut by a kill: the photograph of the last whole line may have lost further lines
        del rows[row["source"]]
    first, written = dict(jobs), path.stat().st_mtime

    def done(source: str, own: list[dict]) -> bool:
        names = [row["output"] for row in own if row["output"]]
        stem, _, form = first[source].rpartition(".")
        expected = [f"{stem}.{form}", *(f"{stem}_{k}.{form}" for k in range(2, len(names) + 1))]
        if names != expected[: len(names)] or own[0]["status"].startswith("unreadable"):
            return False
        try:
            since = min((os.path.getmtime(args.out / name) for name in names), default=written)
            photograph = os.stat(args.photos / source)
            return max(photograph.st_mtime, photograph.st_ctime) <= since  # moved here, a file keeps its mtime
        except OSError:  # a crop is lost, or the photograph is a link that leads nowhere now
            return False

    return {source: own for source, own in rows.items() if source in first and done(source, own)}, outputs


def remove_crops(out: Path, old: set[str], new: set[str]) -> None:
    """Remove the outputs of an earlier manifest that are not outputs now: they would be trained on.

    Whatever that manifest says: only crops inside `out`, and no new one under another spelling of its name (".." in
    it, or another case on some file systems).
    """
    stale, inside = old - new, out.resolve()
    kept = {os.stat(out / name).st_ino for name in new} if stale else set()
    for path in (out / name for name in stale if name.endswith((".jpg", ".png"))):
        if os.path.isfile(path) and inside in path.resolve().parents and path.stat().st_ino not in kept:
            path.unlink()


def write_manifest(path: Path, rows: dict[str, list[dict]]) -> None:
    def write(temporary: Path) -> None:
        with open_manifest(temporary, "w") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for source in sorted(rows) for row in rows[source])

    write_whole(path, write)


def open_manifest(path: Path, mode: str):
    """File names that are not UTF-8 keep their bytes."""
    return open(path, mode, newline="", encoding="utf-8", errors="surrogateescape")


def check_settings(args) -> str:
    """What faces.json is to say: the kind of the crops. Two kinds never lie in one folder."""
    keys = ("size", "margin", "face", "min_confidence", "detect_size", "format")
    settings = {key: getattr(args, key) for key in keys} | {"photos": str(args.photos.resolve())}
    note = args.out / "faces.json"
    if args.out.exists() and not note.exists() and any(file.name[0] != "." for file in args.out.iterdir()):
        raise UserError(f"--out {args.out} holds files that are not crops of this program: name another folder")
    if note.exists() and not args.overwrite:
        try:
            before = dict(json.loads(note.read_text()))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{note}: is damaged; --overwrite does everything anew") from None
        for key, value in settings.items():
            if before.get(key) != value:
                raise UserError(
                    f"{args.out} was made with {key} {before.get(key)}, not {value}: "
                    "--overwrite does it anew, --out FOLDER makes another"
                )
    return json.dumps(settings, indent=1) + "\n"


def contact_sheet(args, rows: list[dict], count: int = 16, side: int = 160) -> Image.Image:
    """The first photographs with the box and landmarks found, each above its crop."""
    sheet = Image.new("RGB", (side * min(count, len(rows)), 2 * side), "white")
    for k, row in enumerate(rows[:count]):
        image = open_photograph(args.photos / row["source"])
        scale = side / max(image.size)
        image = image.resize([max(1, round(v * scale)) for v in image.size], reducing_gap=2)
        x, y, w, h = (float(v) * scale for v in row["box"].split())
        draw = ImageDraw.Draw(image)
        draw.rectangle([x, y, x + w, y + h], outline="lime", width=2)
        points = np.array(row["landmarks"].split(), float).reshape(5, 2) * scale
        for px, py in points:
            draw.ellipse([px - 2, py - 2, px + 2, py + 2], fill="red")
        sheet.paste(image, (k * side, 0))
        with Image.open(args.out / row["output"]) as face:
            sheet.paste(face.resize((side, side)), (k * side, side))
    return sheet


def align_all(todo: list[tuple[str, str]], rows: dict[str, list[dict]], args) -> None:
    """Add the rows of each photograph to `rows` and, as they come, to the manifest."""
    work = partial(align, args=args)
    with open_manifest(args.out / "faces.csv", "a") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")

        def take(results):
            for (source, _), found in zip(todo, tqdm(results, "aligning", len(todo), disable=None, unit="photo")):
                rows[source] = found
                writer.writerows(found)
                file.flush()

        if args.workers == 1 or len(todo) < 2:
            start_worker()
            take(map(work, todo))
        else:
            count, context = min(args.workers, len(todo)), get_context("spawn")
            with ProcessPoolExecutor(count, context, start_worker, (os.getpid(),)) as pool:
                try:
                    take(pool.map(work, todo, chunksize=4))
                except BrokenProcessPool:
                    raise UserError("a worker process has died (out of memory?): try fewer --workers") from None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise


def run(args) -> None:
    jobs = list_jobs(args)
    settings, manifest = check_settings(args), args.out / "faces.csv"
    rows, old = read_manifest(args, jobs)
    todo = [job for job in jobs if job[0] not in rows]
    if todo:  # else nobody waits for TensorFlow
        try:
            import_mtcnn()
        except Exception as error:
            raise no_detector(error) from None
    if rows:
        print(f"{len(rows):,} of {len(jobs):,} photographs are done already")
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "faces.json", lambda path: path.write_text(settings))
    # Should this run be killed, the next one is to know all that it may leave: rows without a source
    names = {output for _, output in todo}
    if args.face == "all":  # of a run that was killed the manifest names the first face alone
        further = (path.relative_to(args.out).as_posix() for path in args.out.rglob(f"*_*.{args.format}"))
        old |= {name for name in further if re.sub(r"_[0-9]+(?=\.[a-z]+$)", "", name) in names | old}
    names = sorted(names | old)
    besides = [dict.fromkeys(COLUMNS, "") | {"output": name, "status": "unfinished"} for name in names]
    write_manifest(manifest, rows | {"": besides})
    if todo:
        align_all(todo, rows, args)
    remove_crops(args.out, old, {row["output"] for own in rows.values() for row in own if row["output"]})
    write_manifest(manifest, rows)  # in order

    every = [row for source, _ in jobs for row in rows[source]]
    count = Counter(row["status"].partition(":")[0] for row in every)
    if count["ok"]:
        sheet = contact_sheet(args, [row for row in every if row["status"] == "ok"])
        write_whole(args.out / "faces.png", lambda path: sheet.save(path, "PNG"))
    missed = f"{count['no face']:,} without a face, {count['unreadable']:,} unreadable"
    print(one_line(f"{len(jobs):,} photographs: {count['ok']:,} faces in {args.out}, {missed}; {manifest}"))
    for what in ("no face", "unreadable"):
        for name in [row["source"] for row in every if row["status"].startswith(what)][:20]:
            print(one_line(f"  {what}: {name}"))
        if count[what] > 20:
            print(one_line(f"  {what}: {count[what] - 20:,} more, see {manifest}"))


class Tolerant:
    """A text stream whose reader may go away (`| head -1`, a closed terminal): later output is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before Python began
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # a name may not fit the terminal's encoding

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work, *args) -> None:
        try:
            work(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def interrupt(number, frame):
    raise KeyboardInterrupt


def main(argv=None) -> int:
    streams, handlers = (sys.stdout, sys.stderr), {}
    sys.stdout, sys.stderr = map(Tolerant, streams)
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        for number in (getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
                handlers[number] = signal.signal(number, interrupt)
    try:
        run(parse_args(argv))
    except (UserError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError):
            error = "out of memory: fewer --workers or a smaller --detect-size take less"
        print(one_line(f"align_faces.py: error: {error}"), file=sys.stderr)
        return 2
    except SystemExit as exit_:
        return exit_.code or 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
