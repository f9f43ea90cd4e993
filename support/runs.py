"""Command line, presets and the run folder of the method scripts.

A script takes from here, in this order: Parser, add_data_args, add_training_args, parse_with_presets; reports_errors
(of distributed.py) around its main; Run around its training.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

from support import distributed, face_backbones, figures  # noqa: F401 - the second registers its networks
from support.datasets import Split
from support.decoding import UNPRINTABLE, checksum
from support.metrics import (
    accuracy_scalars,
    audit_order,
    audit_scores,
    confusion_matrix,
    label_scalars,
    summary,
)
from support.streams import one_line, out_of_memory, reason_of

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import common
from common import (
    BACKBONES,
    PRETRAINED,
    UserError,
    backbone_of,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)

try:
    import fcntl
except ImportError:  # Windows: two processes in one run folder are not noticed there
    fcntl = None


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

DATA_SETS = ("toy", "raf", "ferplus", "affectnet", "affectnet-auto", "cifar10", "folder")
SIZES, PRECISIONS = range(16, 4097), ("auto", "fp32", "bf16")
# These say where a run lies, not what it computes.
NOT_SETTINGS = ("out", "name", "cache", "resume", "overwrite", "evaluate", "predict", "method", "preset", "argv")


class HelpWithDefaults(argparse.HelpFormatter):
    """Help that ends in the value in force, where there is one."""

    def _get_help_string(self, action):
        text = action.help or ""
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{text} (default: {'on' if action.default else 'off'})"
        if "%(default)s" in text or action.default in (None, argparse.SUPPRESS) or isinstance(action.default, bool):
            return text
        return f"{text} (default: %(default)s)".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line. The name of a script's file is the name of its method."""

    def __init__(self, file: str, doc: str):
        about = doc.split("\n\n")[0]
        super().__init__(Path(file).name, description=about, formatter_class=HelpWithDefaults, allow_abbrev=False)
        self.method = Path(file).stem

    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: error: {message} (--help lists the options)") + "\n")

    def parse_early(self, argv) -> argparse.Namespace:
        """The flags on which defaults depend, before the final parse: --help has to wait for these."""
        argv = sys.argv[1:] if argv is None else argv
        return self.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0]


def number(kind, low, high=math.inf, open_low=False, open_high=False):
    """An argparse type: a number of `kind` (int or float) in [low, high], or without an end that is open."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value in (math.inf, *[low] * open_low, *[high] * open_high):
            left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"
            raise argparse.ArgumentTypeError(f"{text} is outside {left}{low}, {high}{right}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int = number(int, 1, 10**9)
seed_number = number(int, 0, 2**63 - 1)


def add_index_args(parser, several: bool = False) -> None:
    """Which training images with which labels: what inject_noise.py takes too. several: --noise is a list of rates."""
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=DATA_SETS, default="toy", help="data set; toy is drawn and needs no files")
    add("--root", help="folder of the data set")
    rate = dict(type=number(float, 0, 1, open_high=True), metavar="RATE")
    if several:
        add("--noise", nargs="+", default=[0.0], help="share of each class's training labels that is made wrong; "
            "several rates: a label set for each", **rate)
    else:
        add("--noise", default=0.0, help="share of each class's training labels that is made wrong", **rate)
    add("--noise-type", choices=("symmetric", "asymmetric"), default="symmetric",
        help="to any other class, or to the class's confusion partner")
    add("--noise-seed", type=seed_number, help="seed of the noise; without this flag that of --seed")
    add("--classes", type=int, choices=(7, 8), help="expression classes to keep: 7 is without contempt")
    add("--limit", type=positive_int, metavar="N", help="train on a fixed stratified subset of N images")
    add("--difficulty", type=number(float, 0, 1), default=0.0, help="toy only: 0 draws clear faces, 1 subtle ones")
    add("--seed", type=seed_number, default=1, help="seed of weights, order, augmentation and noise")


def add_data_args(parser, several: bool = False) -> None:
    """The options that `load_data` reads; with several label sets --noise and --labels are lists."""
    add_index_args(parser, several)
    add = parser.add_argument_group("images and labels").add_argument
    if several:
        add("--labels", metavar="FILE", nargs="+", help="training labels from files, one for each label set; excludes "
            "--noise")
    else:
        add("--labels", metavar="FILE", help="training labels from a file; excludes --noise")
    add("--split", choices=("test", "valid"), default="test", help="what is evaluated; valid: for choosing settings")
    add("--size", type=number(int, SIZES[0], SIZES[-1]), help="pixels of the square network input")
    add("--cache", default="cache", metavar="DIR", help="where decoded images are kept")


def add_training_args(parser, backbone: bool = True) -> None:
    """backbone: with the options of a backbone that ends in a linear head."""
    add = parser.add_argument_group("training").add_argument
    if backbone:
        add("--backbone", choices=tuple(BACKBONES), default="resnet18", help="network below the classification layer")
        names = ",".join(["none", "imagenet", *(name for name in PRETRAINED if name[0] != "."), "PATH"])
        add("--pretrained", default="none", metavar=f"{{{names}}}", help="weights that the backbone starts from")
        add("--head-lr", type=number(float, 0, open_low=True), help="learning rate of the other layers")
    add("--epochs", type=positive_int, help="passes over the training set")
    add("--batch-size", type=number(int, 2), help="images a step")
    what = "learning rate of the backbone" if backbone else "learning rate"
    add("--lr", type=number(float, 0, open_low=True), help=what)
    add("--oversample", action=argparse.BooleanOptionalAction, help="class-balanced sampling by the given labels, "
        "before any correction (twostage.py: by the kept ones); on AffectNet without being asked")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: cuda if there is one")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 where it is computed natively")
    add("--compile", action="store_true", help="torch.compile the networks: minutes of compilation, for long runs only")
    add = parser.add_argument_group("trained models").add_argument
    add("--evaluate", metavar="CHECKPOINT", help="no training: test the model.pt of a run on --data, classes matched "
        "by name; the data may have fewer")
    add("--predict", nargs="+", metavar=("CHECKPOINT", "PATH"), help="no training: predict images and folders of "
        "images with the model.pt of a run; writes predictions.csv")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs", metavar="DIR", help="folder of the runs")
    add("--name", help="name of the run (default: made of method, data, noise, changed flags and seed)")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--overwrite", action="store_true", help="replace a run that is there")


def preset_of(presets: dict, data: str, pretrained: str) -> tuple[str, dict]:
    """The name of the preset in force, and its values.

    presets: {"scratch": {...}, "pretrained": {...}} and refinements on top, in this order: "<either> <data set>",
    "pretrained <backbone>" and "pretrained <backbone> <data set>" for weights that belong to a backbone of their own.
    """
    start = "scratch" if pretrained == "none" else "pretrained"
    values = presets[start] | presets.get(f"{start} {data}", {})
    if backbone := backbone_of(pretrained):
        start = f"{start} {backbone}"
        values |= {"backbone": backbone, "size": BACKBONES[backbone].size}
        values |= presets.get(start, {}) | presets.get(f"{start} {data}", {})
    return f"{start} {data}", values


def parse_with_presets(parser: Parser, presets: dict, argv) -> argparse.Namespace:
    """Parse argv with defaults that depend on --data and --pretrained; explicit flags win.

    presets: see `preset_of`. Returns the namespace, with root, noise_seed and name filled in, and three that are no
    settings: method; preset, a line with the values in force; and argv.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early = parser.parse_early(argv)
    kind, preset = preset_of(presets, early.data, getattr(early, "pretrained", "none"))
    parser.set_defaults(root=f"data/{early.data}", noise_seed=early.seed, **preset)
    parser.set_defaults(oversample=early.data.startswith("affectnet"))
    if early.evaluate or early.predict:
        parser.set_defaults(backbone=None, size=None, precision=None)  # those of the checkpoint
    args = parser.parse_args(argv)
    check_data_args(args, parser)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite discards it: give one of them")
    if args.evaluate and args.predict:
        parser.error("--evaluate and --predict are two jobs: give one of them")
    if (args.evaluate or args.predict) and common.processes.count > 1:
        parser.error("--evaluate and --predict are jobs for one process: start them without torchrun")
    if args.predict and len(args.predict) < 2:
        parser.error("--predict takes a model.pt and then images or folders of images")
    least = getattr(BACKBONES.get(getattr(args, "backbone", None)), "size", 0)
    if args.size and args.size < least:
        parser.error(f"--size {args.size}: --backbone {args.backbone} needs {least} pixels or more")
    if args.size and getattr(args, "crop", 0) >= args.size:
        parser.error(f"--crop {args.crop}: as large as the image or larger, --size {args.size}")
    args.method = parser.method
    if args.name is None:
        args.name = default_name(args, parser)
        if used := args.evaluate or (args.predict or [None])[0]:
            on = ["on", args.data, args.split] if args.split != "test" else ["on", args.data]
            what = "predictions" if args.predict else "-".join(on)
            args.name = f"{Path(used).resolve().parent.name}-{what}"
    elif not re.fullmatch(r"(?!\.+$)[^/\\\0]+", args.name):
        parser.error(f"--name {args.name!r}: the name of one folder, without separators; --out says where it lies")
    if UNPRINTABLE.search(args.out + args.name):  # TensorBoard cannot write there
        parser.error(f"--out {args.out!r}, --name {args.name!r}: a control character, or not UTF-8")
    args.argv = argv
    args.preset = f"preset {kind}: " + ", ".join(f"{key} {getattr(args, key)}" for key in preset)
    if changed := [key for key in changed_settings(args, parser) if key not in preset]:
        args.preset += "; changed: " + ", ".join(f"{key} {getattr(args, key)}" for key in changed)
    return args


def check_data_args(args, parser) -> None:
    if args.labels and np.any(args.noise):
        parser.error("--labels and --noise exclude each other: the file brings its own noise")
    if args.difficulty and args.data != "toy":
        parser.error("--difficulty is for --data toy alone")
    if args.root != parser.get_default("root") and args.data == "toy":
        parser.error("--data toy is drawn, not read: it takes no --root")


def changed_settings(args, parser: Parser) -> list[str]:
    """The keys of the settings that differ from the preset."""
    skip = ("data", "seed", "device", *NOT_SETTINGS, *(["root"] if args.data != "folder" else []))
    return [key for key, value in vars(args).items() if key not in skip and value != parser.get_default(key)]


def default_name(args, parser: Parser) -> str:
    """`<method>-<data>-n<noise>-<flags that differ from the preset>-s<seed>`, in characters of any file system."""
    changed = []
    for key in changed_settings(args, parser):
        if key == "noise":
            continue
        flag, value = key.replace("_", "-"), getattr(args, key)
        if isinstance(value, bool):
            changed.append(flag if value else f"no-{flag}")
        else:
            changed.append(flag + re.sub(r"[^\w.]+", "_", Path(value).stem if isinstance(value, str) else str(value)))
    rates = "-".join(f"{rate:g}" for rate in np.atleast_1d(args.noise))
    return "-".join([parser.method, args.data, f"n{rates}", *changed, f"s{args.seed}"])


# ----------------------------------------------------------------------------------------------------------------------
# The run folder
# ----------------------------------------------------------------------------------------------------------------------

# What a run writes, in the order of removal; events.out.tfevents.* beside it, and args.json, which is never removed but
# replaced: it says whose the folder is.
OUTPUTS = ("model.pt", "last.pt", "metrics.jsonl", "labels.csv", *(f"{name}.png" for name in figures.NAMES))
RECORD = {"method": str, "argv": list, "versions": dict}  # what args.json has at least


def is_unfinished(name: str, *files: str) -> bool:
    """Whether a file is what a kill in the middle of write_atomically left of one of `files`."""
    return bool(re.fullmatch(rf"({'|'.join(map(re.escape, files))})\.tmp[0-9]+", name))


class Run:
    """The folder runs/<name>/ of one training run: what is in it, who may write there, and how it is resumed.

    Use as a context around everything from loading the data on. Raises UserError for a folder that is in use, that
    holds a finished run, an unfinished one without --resume, files that are not a run's, or with --resume a run with
    other arguments or other data. Nothing is left behind if training never begins. Of several processes that of rank 0
    has the folder: the others go through the same epochs, and hear from it what it refuses and restores.
    """

    def __init__(self, args):
        self.args, self.folder, self.first = args, Path(args.out) / args.name, common.processes.rank == 0
        self.lock = self.writer = None
        self.settings = {key: value for key, value in vars(args).items() if key not in ("preset", "argv")}

    def __enter__(self):
        distributed.take_device(self.args.device)
        keep_freed_memory()
        distributed.by_first(self.open_folder)
        return self

    def open_folder(self) -> None:
        self.refuse_strangers()  # before the lock file is put there
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "a")
        try:
            self.take_lock()
            self.refuse_what_is_there()
        except BaseException:
            self.lock.close()
            raise

    def take_lock(self) -> None:
        """The system frees it however the process ends."""
        in_use = UserError(f"{self.folder} is in use by another process; --name NAME starts another run beside it")
        if fcntl:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise in_use from None
            except OSError:
                pass  # a file system without locks: two processes in one folder are not noticed there
        path = self.folder / ".lock"  # removed since it was opened, by a run that never began?
        if not path.exists() or not os.path.samestat(os.fstat(self.lock.fileno()), path.stat()):
            raise in_use

    def refuse_what_is_there(self) -> None:
        """What is in the folder is decided on under the lock: nobody else can change it any more."""
        self.refuse_strangers()
        args, beside = self.args, "--name NAME starts another run beside it"
        finished, begun = ((self.folder / name).exists() for name in ("model.pt", "last.pt"))
        if finished and not args.overwrite:
            also = "there is nothing left to --resume" if args.resume else "--resume is for unfinished ones"
            raise UserError(f"{self.folder} holds a finished run: --overwrite replaces it, {beside}; {also}")
        if begun and not (args.resume or args.overwrite):
            how = "--resume goes on with it, --overwrite discards it"
            raise UserError(f"{self.folder} holds an unfinished run: {how}, {beside}")
        if not begun and not args.overwrite and len(self.history()) > 1:
            raise UserError(f"{self.folder} holds a run without its checkpoints: --overwrite replaces it, {beside}")
        if begun and args.resume:
            self.refuse_changes()

    def refuse_strangers(self) -> None:
        """A folder is a run's only if its args.json says so; anything else that is not empty is refused."""
        names = [file.name for file in self.folder.iterdir()] if self.folder.is_dir() else []
        theirs = [name for name in names if name not in (".lock", ".DS_Store") and not is_unfinished(name, "args.json")]
        if theirs and not self.read_record():
            raise UserError(f"{self.folder} holds files, and no args.json says that it is a run's; give another --name")

    def read_record(self) -> dict:
        """args.json; {} if it is missing, damaged or not a run's."""
        try:
            record = json.loads((self.folder / "args.json").read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        whole = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in RECORD.items())
        return record if whole else {}

    def refuse_changes(self) -> None:
        before, now = self.read_record(), json.loads(json.dumps(self.settings))
        if before["method"] != now["method"]:
            raise UserError(f"{self.folder} holds a run of {before['method']}, not of {now['method']}")
        if before.get("processes", 1) != common.processes.count:
            raise UserError(f"--resume: {self.folder} was begun with {before.get('processes', 1)} processes; give the "
                            "same number, or another --name")
        for key in now:
            if key not in NOT_SETTINGS and now[key] != before.get(key):
                raise UserError(f"--resume: {key} was {before.get(key)} in {self.folder} and is {now[key]} now; "
                                "give the same arguments, or another --name")

    def epochs(self, train: Split, test: Split, more_labels: Sequence[Tensor] = (), **parts):
        """Yield the epochs that are left to train, 1 .. --epochs; an interrupted run goes on after its last one.

        more_labels: int64 (N,), further label sets of the training set. parts: everything that changes while training,
        by name: modules, optimisers, schedulers (whatever has a state_dict) and tensors, which are restored in place.
        """
        self.train, self.test, self.parts = train, test, parts
        done, states = distributed.by_first(lambda: (self.begin(fingerprint(train, test, more_labels)), self.states()))
        if not self.first:
            self.put_back(states)
            self.writer = NoWriter()
        distributed.average_buffers_of(parts.values())
        for self.epoch in range(done + 1, self.args.epochs + 1):
            self.began = time.perf_counter()
            yield self.epoch

    def begin(self, data: dict) -> int:
        """Make the folder ready for training, see `epochs`; returns the last epoch that was finished before, or 0."""
        print(f"{self.folder}; {self.args.preset}")
        for file in self.folder.iterdir():
            if is_unfinished(file.name, "args.json", *OUTPUTS):
                file.unlink()
        done = 0
        if self.args.resume and (self.folder / "last.pt").exists():
            done = self.restore(data)
            print(f"{self.folder}: going on after epoch {done}")
        else:
            if self.args.resume:
                print(f"{self.folder}: no checkpoint to --resume, the run begins")
            for file in [*(self.folder / name for name in OUTPUTS), *self.folder.glob("events.out.tfevents.*")]:
                file.unlink(missing_ok=True)
            about = {"argv": self.args.argv, "versions": versions(), "commit": commit(), "fingerprint": data}
            about["processes"] = common.processes.count
            text = json.dumps(self.settings | about, indent=1) + "\n"
            write_atomically(self.folder / "args.json", lambda path: path.write_text(text))
        # purge_step: TensorBoard drops what a killed run logged after its last checkpoint
        self.writer = summary_writer(self.folder, purge_step=done + 1 if done else None)
        return done

    def states(self) -> dict:
        """What last.pt has of the parts: state_dicts and tensors, by name."""
        return {name: part if isinstance(part, Tensor) else part.state_dict() for name, part in self.parts.items()}

    def put_back(self, states: dict) -> None:
        for name, part in self.parts.items():
            if not isinstance(part, Tensor):
                part.load_state_dict(states[name])
            elif (part.shape, part.dtype) == (states[name].shape, states[name].dtype):
                part.copy_(states[name])
            else:
                raise ValueError(f"{name}: another shape or type")

    def restore(self, data: dict) -> int:
        """Put back the parts of last.pt and the lines of metrics.jsonl; returns the last finished epoch.

        data: see `fingerprint`. Raises UserError, before anything in the folder is changed, for what does not fit.
        """
        record, path = self.read_record(), self.folder / "last.pt"
        before = record.get("fingerprint")
        changed = [what for what in data if not isinstance(before, dict) or before.get(what) != data[what]]
        if changed:
            raise UserError(f"--resume: {self.folder} was begun with other data, these differ: {', '.join(changed)}; "
                            "put them back, or give another --name")
        if record.get("commit") != commit():
            what = f"{self.folder} was begun with another version of the code (commit {record.get('commit')})"
            print(f"warning: {what}", file=sys.stderr)
        state = load_checkpoint(path)
        try:
            done, self.table = state["epoch"], state["table"]
            if state["method"] != self.args.method or not isinstance(done, int) or not 0 < done <= self.args.epochs:
                raise ValueError(f"epoch {done} of {state['method']}")
            self.put_back(state)
        except Exception as error:  # modules and optimisers raise errors of many kinds
            if out_of_memory(error):
                raise
            why = reason_of(error)
            raise UserError(f"{path}: does not fit this script ({why}); --overwrite discards the run") from None
        lines = self.history()[:done]  # a line may be ahead of the checkpoint
        if [line["epoch"] for line in lines] != list(range(1, done + 1)):
            raise UserError(f"{self.folder / 'metrics.jsonl'}: does not have the {done} lines of {path}; "
                            "put it back, or --overwrite discards the run")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.folder / "metrics.jsonl", lambda file: file.write_text(text))
        return done

    def __exit__(self, kind, error, trace):
        if self.first:
            self.close_folder()
        go_on = "the same command with --resume goes on after the last whole epoch"
        unfinished = self.writer and not (self.folder / "model.pt").exists()
        if kind is KeyboardInterrupt and unfinished:
            print(f"\n{self.folder}: {go_on}", file=sys.stderr)
        if kind and issubclass(kind, OSError) and unfinished:
            raise UserError(f"{self.folder}: could not be written ({reason_of(error)}); {go_on}") from None
        if kind is FloatingPointError:
            last = f"{self.folder / 'last.pt'} (epoch {self.epoch - 1})" if self.epoch > 1 else "none"
            where = f"epoch {self.epoch}, {error}"
            raise UserError(f"loss or predictions are not finite in {where}; last good checkpoint: {last}") from None

    def close_folder(self) -> None:
        if self.writer:
            with contextlib.suppress(OSError):  # a full disk: end_epoch or finish has failed then
                self.writer.close()
        else:  # training never began: leave nothing behind
            if fcntl is None:  # Windows, which removes no open file
                self.lock.close()
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                (self.folder / ".lock").unlink()
                for path in self.made:
                    path.rmdir()
        self.lock.close()

    def history(self) -> list[dict]:
        """The lines of metrics.jsonl; a last one that a killed process left unfinished is passed over.

        Raises UserError for any other line that is damaged.
        """
        path = self.folder / "metrics.jsonl"
        try:
            *lines, rest = path.read_text().split("\n")
            records = [json.loads(line) for line in lines]
            if not all(isinstance(record["epoch"] + record["accuracy/test"], float) for record in records):
                raise TypeError
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}: has a damaged line; mend it, or --overwrite discards the run") from None
        return records

    def end_epoch(self, epoch: int, scalars: dict, probs: Tensor, labels: Tensor | None = None) -> None:
        """A line in metrics.jsonl and on the screen, scalars in TensorBoard, then last.pt.

        scalars: of the epoch, by tag; a list has a number, or None, for each class. probs: (N, C), of the evaluated
        split. labels: int64 (N,), the current labels of the training set, of a method that changes them. Raises
        FloatingPointError, before anything is written, for probs that are not finite.
        """
        if not probs.isfinite().all():  # the last step has made weights of it whose loss was never computed
            raise FloatingPointError("after the last step")
        if not self.first:
            return
        predicted = probs.argmax(1).cpu()
        self.table = confusion_matrix(predicted, self.test.labels, len(self.test.classes))
        for tag, values in [item for item in scalars.items() if isinstance(item[1], list)]:
            named = zip(self.train.classes, values)
            scalars = scalars | {f"{tag}/{name}": value for name, value in named if value is not None}
        scalars = {tag: value for tag, value in scalars.items() if not isinstance(value, list)}
        if labels is not None:
            scalars = scalars | label_scalars(self.train.labels, labels.cpu(), self.train.clean)
        scalars = scalars | accuracy_scalars(self.table, self.test.classes)
        seconds = time.perf_counter() - self.began
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"epoch": epoch, "seconds": round(seconds, 2), **scalars}) + "\n")
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, epoch)
        self.writer.flush()
        shown = [f"loss {scalars['loss/total']:.3f}", f"train {scalars['accuracy/train']:.1%}",
                 f"{self.args.split} {scalars['accuracy/test']:.1%}"]
        shown += [f"relabelled {scalars['relabel/changed']}"] if "relabel/changed" in scalars else []
        shown += [f"correct labels {scalars['labels/accuracy']:.1%}"] if "labels/accuracy" in scalars else []
        about = {"method": self.args.method, "epoch": epoch, "table": self.table}
        save_checkpoint(self.folder / "last.pt", **about, **self.states())
        print(f"epoch {epoch:3d}/{self.args.epochs}  " + "  ".join(shown) + f"  {seconds:.1f} s", flush=True)

    def finish(self, probs: Tensor, networks: list[nn.Module], labels: Tensor | None = None, **pictures) -> None:
        """Write the label audit, the figures, TensorBoard's hparams and, last, model.pt; print best, last5 and final.

        probs: (N, C), of the unaugmented training set after the last epoch. networks: what predicts. labels: see
        `end_epoch`. pictures: name -> a function that draws one more figure.
        """
        if not self.first:
            return
        train, probs = self.train, probs.float().cpu()
        current = train.labels if labels is None else labels.cpu()
        scores = audit_scores(probs, train.labels)
        order = audit_order(probs, train.labels).tolist()
        self.write_audit(current, scores, order)
        history, drawn = self.history(), []
        pictures = {
            "curves": lambda: figures.curves(history, self.args.split),
            "confusion": lambda: figures.confusion(self.table, train.classes),
            "audit": lambda: figures.audit(train, probs.argmax(1), scores, order[:32]),
        } | pictures
        for name, draw in pictures.items():
            pixels = figures.write(self.folder / f"{name}.png", draw)
            if pixels is not None:
                self.writer.add_image(name, pixels, self.args.epochs, dataformats="HWC")
                drawn.append(f"{name}.png")
        results = summary(history)
        self.write_hparams(results)
        self.writer.flush()
        # On the CPU, so that torch.load alone reads them on a machine without a GPU
        states = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in n.state_dict().items()} for n in networks]
        settings = json.loads(json.dumps(self.settings))
        about = {"method": self.args.method, "classes": list(train.classes), "args": settings}
        save_checkpoint(self.folder / "model.pt", **about, networks=states)
        if train.clean is not None:
            first = order[:100]
            wrong = (train.labels != train.clean)[first].sum().item()
            rows = f"of the first {len(first)} rows of labels.csv"
            print(f"label audit: {rows} {wrong} have a label that the noise made wrong")
        written = ["labels.csv", *drawn, "metrics.jsonl", "model.pt"]
        print(f"{self.folder}: {', '.join(written)}; tensorboard --logdir {self.args.out}")
        split = self.args.split
        selected = f"epoch {results['best_epoch']}; the epoch is selected on this very split"
        print(f"best   {results['best']:.2%} of {split} ({selected})")
        print(f"last5  {results['last5']:.2%} (mean of the last {min(5, len(history))} epochs)")
        print(f"final  {results['final']:.2%}")

    def write_audit(self, current: Tensor, scores: Tensor, order: list[int]) -> None:
        """labels.csv: name,given,final,score[,clean], a row per training image, in `order`."""
        train = self.train
        columns = [[train.classes[label] for label in labels.tolist()] for labels in (train.labels, current)]
        clean = [] if train.clean is None else [[train.classes[label] for label in train.clean.tolist()]]

        def write(path):
            with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(["name", "given", "final", "score", *["clean"] * len(clean)])
                for i in order:
                    given, final = (column[i] for column in columns)
                    rows.writerow([train.names[i], given, final, f"{scores[i]:.6f}", *(column[i] for column in clean)])

        write_atomically(self.folder / "labels.csv", write)

    def write_hparams(self, results: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in self.settings.items()}
        plain = {k: v.encode(errors="backslashreplace").decode() if isinstance(v, str) else v for k, v in plain.items()}
        metrics = {f"hparam/{key}": results[key] for key in ("best", "last5", "final")}
        for part in hparams(plain, metrics):  # add_hparams would make a run of its own beside this one
            self.writer.file_writer.add_summary(part)
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, self.args.epochs)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. It gives blocks above 32 MB back, and a new one costs a page fault for every 4 KB.

    Measured in docs/speed.md. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def fingerprint(train: Split, test: Split, more_labels: Sequence[Tensor]) -> dict[str, str]:
    """What a resumed run must find again: a hash for each. Of very many images not all count, see `checksum`."""

    def digest(*things) -> str:
        parts = (x.numpy().tobytes() if isinstance(x, Tensor) else repr(x).encode() for x in things)
        return hashlib.sha256(b"".join(parts)).hexdigest()

    return {
        "image names": digest(train.names, test.names),
        "classes": digest(train.classes, test.classes),
        "given labels": digest(train.labels, test.labels, *more_labels),
        "valence and arousal": digest(train.va, test.va),
        "images": digest(checksum(train.images), checksum(test.images)),
    }


class NoWriter:
    """Drops what a script logs, in the processes that have no run folder."""

    def __getattr__(self, name):
        return lambda *args, **options: None


def summary_writer(folder, purge_step: int | None = None):
    """TensorBoard's writer of event files, kept from importing TensorFlow where that is installed (10 s and 0.6 GB)."""
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))  # TensorBoard asks for this module
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=purge_step)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}


def commit() -> str | None:
    """The commit of the scripts' own checkout, with "+" if code was changed there; None outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def ask(*words) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        head, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "-uno", "--", ":/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+" if changes else head
