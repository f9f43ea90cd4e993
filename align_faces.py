"""Find, align and crop the faces of a folder of photographs: what comes before training or prediction on one's own.

MTCNN (K. Zhang et al., "Joint Face Detection and Alignment using Multitask Cascaded Convolutional Networks", 2016,
package mtcnn) finds boxes and five landmarks; a similarity transform (rotation, scale, shift) brings the landmarks onto
a template. The crops lie in the same tree of folders, so class folders stay class folders. faces.csv has a row for
every photograph, also for those without a face and those that cannot be read. Stopped at any moment, the same command
goes on.

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
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported: it is told what to print by this


def say_interrupted(kind, error, trace, shown=sys.excepthook) -> None:
    """Ctrl-C while the packages are imported is one line too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        shown(kind, error, trace)


if __name__ == "__main__":
    sys.excepthook = say_interrupted

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw, ImageOps  # noqa: E402
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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def parse_args(argv=None):
    parser = Parser("align_faces.py", description="Find, align and crop the faces of a folder of photographs.")
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
        default=os.cpu_count(),
        help="processes, each with a detector of its own (default: the number of cores, %(default)s)",
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

    source, target: (N, 2), N >= 2 and not all one point. (With points as complex numbers z, it is linear: z' = a z +
    b.)
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (np.asarray(source, float), np.asarray(target, float)))
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
    by_size = sorted(faces, key=lambda face: -face["box"][2] * face["box"][3])
    if which == "all" or not faces:
        return by_size
    if which == "largest":
        return by_size[:1]
    x, y = width / 2, height / 2
    return [
        min(
            by_size,
            key=lambda face: np.hypot(face["box"][0] + face["box"][2] / 2 - x, face["box"][1] + face["box"][3] / 2 - y),
        )
    ]


# ----------------------------------------------------------------------------------------------------------------------
# One photograph
# ----------------------------------------------------------------------------------------------------------------------

detector = None  # of this process; made by `start_worker`


def start_worker(parent: int | None = None) -> None:
    """Make this process's detector, on one thread: the processes share the cores. parent: see `watch`."""
    global detector
    if parent is not None:
        watch(parent)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    from mtcnn import MTCNN

    detector = MTCNN()


def watch(parent: int) -> None:
    """End this worker when the process `parent` has ended, however that was; Ctrl-C is the parent's to handle."""

    def end() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()


def open_photograph(path: Path) -> Image.Image:
    """RGB, upright by its EXIF tag. Raises UserError for what cannot be read as a photograph."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits: Pillow would clip them to white
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except MemoryError:
        raise UserError("it does not fit into the memory") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from None


def find_faces(image: Image.Image, args) -> list[dict]:
    """box (x, y, width, height), landmarks (5, 2) and confidence of each face, in pixels of the whole image."""
    scale = min(1.0, args.detect_size / max(image.size))
    small = (
        image
        if scale == 1
        else image.resize([max(1, round(side * scale)) for side in image.size], Image.BILINEAR, reducing_gap=2)
    )
    if min(small.size) < 24:  # the detector's own smallest face is 20 pixels
        return []
    found = []
    for face in detector.detect_faces(np.asarray(small)):
        if face["confidence"] >= args.min_confidence:
            found.append(
                dict(
                    box=[value / scale for value in face["box"]],
                    confidence=float(face["confidence"]),
                    landmarks=np.array([face["keypoints"][point] for point in POINTS], float) / scale,
                )
            )
    return found


def align(job: tuple[str, str], args) -> list[dict]:
    """The rows of the manifest for one photograph; job: its path and that of its crop, relative to the two folders."""
    source, output = job
    row = dict.fromkeys(COLUMNS, "") | {"source": source}
    try:
        image = open_photograph(args.photos / source)
    except UserError as error:
        return [row | {"status": f"unreadable: {error}"}]
    rows = []
    for number, face in enumerate(choose(find_faces(image, args), args.face, *image.size)):
        name = output if number == 0 else f"{output.removesuffix(f'.{args.format}')}_{number + 1}.{args.format}"
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if args.format == "jpg" else "PNG"
        face_image = crop(image, face["landmarks"], args.size, args.margin)
        write_whole(path, lambda file, face_image=face_image: face_image.save(file, kind, quality=95))
        numbers = {key: " ".join(f"{value:.1f}" for value in np.ravel(face[key])) for key in ("box", "landmarks")}
        rows.append(row | numbers | {"output": name, "confidence": f"{face['confidence']:.4f}", "status": "ok"})
    return rows or [row | {"status": "no face"}]


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write) -> None:
    """Call write(temporary path), then rename it to `path`: a file that is there is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_photographs(folder: Path) -> list[Path]:
    """All photographs below a folder, relative to it; links to folders are not followed. What is not read is said."""
    sources, other, closed = [], Counter(), []
    for place, folders, files in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        folders.sort()
        for path in (Path(place, name) for name in files):
            if path.suffix.lower() in SUFFIXES and path.is_file():  # no pipe, no device: they would block
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
    sources = list_photographs(args.photos)
    if not sources:
        raise UserError(f"{args.photos}: no photographs ({', '.join(SUFFIXES)}) in it")
    return list(zip((source.as_posix() for source in sources), output_names(sources, args.format)))


def read_manifest(path: Path, out: Path, jobs: list[tuple[str, str]]) -> dict[str, list[dict]]:
    """The rows of each photograph that is done: its crops are there, or there are none, and they have today's names.

    A last line cut by a kill is passed over. Raises UserError for a file that is no manifest.
    """
    if not path.exists():
        return {}
    try:
        with open_manifest(path, "r") as file:
            text = file.read()
        found = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines(keepends=True), strict=True))
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}); --overwrite does everything anew") from None
    rows: dict[str, list[dict]] = {}
    for row in found:
        if tuple(row) != COLUMNS or not row["status"] or None in row.values():
            raise UserError(f"{path}: is not a list of aligned faces; --overwrite does everything anew")
        rows.setdefault(row["source"], []).append(row)
    first = dict(jobs)

    def done(source: str, own: list[dict]) -> bool:
        names = [row["output"] for row in own if row["output"]]
        stem, _, form = first.get(source, "").rpartition(".")
        expected = [f"{stem}.{form}", *(f"{stem}_{k}.{form}" for k in range(2, len(names) + 1))]
        return names == expected[: len(names)] and all((out / name).is_file() for name in names)

    return {source: own for source, own in rows.items() if source in first and done(source, own)}


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


def check_settings(args) -> None:
    """Crops of two kinds never lie in one folder: faces.json says which kind it is."""
    settings = {
        key: getattr(args, key) for key in ("size", "margin", "face", "min_confidence", "detect_size", "format")
    } | {"photos": str(args.photos.resolve())}
    note = args.out / "faces.json"
    if args.out.exists() and not note.exists() and any(args.out.iterdir()):
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
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(note, lambda path: path.write_text(json.dumps(settings, indent=1) + "\n"))


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


def run(args) -> None:
    jobs = list_jobs(args)
    try:
        import tensorflow  # noqa: F401 - the detector needs it, and says so only from deep inside
    except ImportError:
        raise UserError("the face detector needs TensorFlow: pip install -r requirements-align.txt") from None
    check_settings(args)
    manifest = args.out / "faces.csv"
    rows = {} if args.overwrite else read_manifest(manifest, args.out, jobs)
    rows = {source: rows[source] for source, _ in jobs if source in rows}
    todo = [job for job in jobs if job[0] not in rows]
    if rows:
        print(f"{len(rows):,} of {len(jobs):,} photographs are done already")
    write_manifest(manifest, rows)
    work = partial(align, args=args)
    with open_manifest(manifest, "a") as file:
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
    write_manifest(manifest, rows)  # in order

    every = [row for source, _ in jobs for row in rows[source]]
    done = [row for row in every if row["status"] == "ok"]
    none, bad = (
        [row["source"] for row in every if row["status"].startswith(status)] for status in ("no face", "unreadable")
    )
    if done:
        contact_sheet(args, done).save(args.out / "faces.png")
    print(
        f"{len(jobs):,} photographs: {len(done):,} faces in {args.out}, {len(none):,} without a face, "
        f"{len(bad):,} unreadable; {manifest}"
    )
    for what, names in (("no face", none), ("unreadable", bad)):
        for name in names[:20]:
            print(f"  {what}: {name}")
        if len(names) > 20:
            print(f"  {what}: {len(names) - 20:,} more, see {manifest}")


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
    except (UserError, OSError) as error:
        print(f"align_faces.py: error: {error}", file=sys.stderr)
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
