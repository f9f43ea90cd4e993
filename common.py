"""What the method scripts share: command line, data, augmentation, backbones, metrics, the run folder.

Nothing of any method is here. A script takes from this file, in this order:

    parse_with_presets -> Run -> load_data -> make_backbone -> Pixels, EpochPlan, augment -> Run.log, Run.save, Run.finish

All randomness comes from generators seeded by what they are for (seed, epoch, name), never from a state that is carried
along: an epoch draws the same numbers after a resumption, on another device and in another batch split.
Letters in shapes: N samples, C classes or channels (said where), H and W pixels, B the batch.
"""

import argparse
import csv
import functools
import importlib
import json
import math
import platform
import queue
import re
import subprocess
import sys
import threading
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

from augmentation import (  # noqa: F401 - part of what the scripts take from here
    OPERATIONS, apply_operations, augment, color_jitter, rand_augment, random_affine, random_crop, random_flip,
)
from datasets import (  # noqa: F401 - part of what the scripts take from here
    IMAGE_SUFFIXES, RAF_CONFUSIONS, Index, Split, UserError, asymmetric_noise, decode, decode_all, generator_of, inject, load_data,
    load_train_index, read_index, read_labels, read_va, seed_of, symmetric_noise, write_atomically, write_labels, write_va,
)

try:
    import fcntl
except ImportError:  # Windows: two processes in one run folder are not noticed there
    fcntl = None


def reports_errors(main):
    """Decorator of a script's main(argv=None) -> int: 0 is success, 2 bad input (one line on stderr), 130 Ctrl-C.

    A file that cannot be written (no such folder, no space) counts as bad input.
    """

    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        try:
            return main(argv)
        except (UserError, OSError) as error:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
            return 2
        except SystemExit as exit_:  # argparse: 0 after --help, 2 after a bad argument
            return exit_.code or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

DATA_SETS = ("toy", "raf", "ferplus", "affectnet", "affectnet-auto", "cifar10", "folder")
NOT_SETTINGS = ("out", "name", "cache", "resume", "overwrite", "evaluate", "predict")  # these say where a run lies, not what it computes


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind, low, high=math.inf, open_low=False, open_high=False):
    """An argparse type: a number of `kind` (int or float) in [low, high], or without an end that is open."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (open_low and value == low) or (open_high and value == high):
            bounds = f"{'(' if open_low else '['}{low}, {high}{')' if open_high or high == math.inf else ']'}"
            raise argparse.ArgumentTypeError(f"{text} is outside {bounds}")
        return value

    parse.__name__ = kind.__name__
    return parse


positive_int = number(int, 1)


def add_index_args(parser, several: bool = False) -> None:
    """Which training images with which labels: what inject_noise.py takes too. several: --noise and --labels take several."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", choices=DATA_SETS, default="toy", help="data set (default: %(default)s, drawn by toyfaces.py)")
    group.add_argument("--root", help="folder of the data set (default: data/<name>)")
    many = dict(nargs="+", default=[0.0]) if several else dict(default=0.0)
    group.add_argument("--noise", type=number(float, 0, 1, open_high=True), metavar="RATE", help="share of each class's training labels that is made wrong" + several * ", one for each label set" + " (default: 0)", **many)
    group.add_argument("--noise-type", choices=("symmetric", "asymmetric"), default="symmetric", help="to any other class, or to the class's confusion partner (default: %(default)s)")
    group.add_argument("--noise-seed", type=number(int, 0), help="seed of the noise (default: --seed)")
    group.add_argument("--classes", type=int, choices=(7, 8), help="expression classes to keep: 7 is without contempt (default: all of the data set)")
    group.add_argument("--limit", type=positive_int, metavar="N", help="train on a fixed stratified subset of N images")
    group.add_argument("--difficulty", type=number(float, 0, 1), default=0.0, help="toy only: 0 draws clear faces, 1 subtle ones (default: %(default)s)")
    group.add_argument("--seed", type=number(int, 0), default=1, help="seed of weights, order, augmentation and noise (default: %(default)s)")


def add_data_args(parser, several: bool = False) -> None:
    """The options that `load_data` reads; with several label sets their --noise and --labels are lists."""
    add_index_args(parser, several)
    group = parser.add_argument_group("images and labels")
    group.add_argument("--labels", metavar="FILE", nargs="+" if several else None, help="training labels from a file" + several * ", one for each label set" + "; excludes --noise")
    group.add_argument("--split", choices=("test", "valid"), default="test", help="what is evaluated; valid: for choosing settings (default: %(default)s)")
    group.add_argument("--size", type=number(int, 16), help="pixels of the square network input")
    group.add_argument("--cache", default="cache", metavar="DIR", help="where decoded images are kept (default: %(default)s)")


def add_training_args(parser, backbone: bool = True) -> None:
    """backbone: with the options of a backbone that ends in a linear head."""
    group = parser.add_argument_group("training")
    if backbone:
        group.add_argument("--backbone", choices=tuple(BACKBONES), default="resnet18", help="(default: %(default)s)")
        group.add_argument("--pretrained", default="none", metavar="{none,imagenet,PATH}", help="weights that the backbone starts from (default: %(default)s)")
        group.add_argument("--head-lr", type=number(float, 0, open_low=True), help="learning rate of the classification layer")
    group.add_argument("--epochs", type=positive_int)
    group.add_argument("--batch-size", type=number(int, 2))
    group.add_argument("--lr", type=number(float, 0, open_low=True), help="learning rate" + backbone * " of the backbone")
    group.add_argument("--oversample", action=argparse.BooleanOptionalAction, default=False, help="class-balanced sampling by the given labels (default: on AffectNet only)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the device computes it natively (default: %(default)s)")
    group.add_argument("--compile", action="store_true", help="torch.compile the networks: minutes of compilation, pays on long runs only")
    group = parser.add_argument_group("trained models")
    group.add_argument("--evaluate", metavar="CHECKPOINT", help="no training: test the model.pt of a run on --data, classes matched by name")
    group.add_argument("--predict", nargs="+", metavar=("CHECKPOINT", "PATH"), help="no training: predict images and folders of images with the model.pt of a run; writes predictions.csv")
    group = parser.add_argument_group("run")
    group.add_argument("--out", default="runs", metavar="DIR", help="folder of the runs (default: %(default)s)")
    group.add_argument("--name", help="name of the run (default: made of method, data, noise, changed flags and seed)")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    group.add_argument("--overwrite", action="store_true", help="replace a run that is there")


def parse_with_presets(parser, presets: dict, argv, method: str):
    """Parse argv with defaults that depend on --data and --pretrained; explicit flags win.

    presets: {"scratch": {...}, "pretrained": {...}} and refinements such as "scratch toy", applied after them.
    Returns the namespace, with root, noise_seed and name filled in, and two that are no settings: preset, a line that
    says which one is in force, and argv.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    early, _ = parser.parse_known_args(argv)
    start = "scratch" if getattr(early, "pretrained", "none") == "none" else "pretrained"
    preset = presets[start] | presets.get(f"{start} {early.data}", {})
    parser.set_defaults(root=f"data/{early.data}", noise_seed=early.seed, oversample=early.data.startswith("affectnet"), **preset)
    args = parser.parse_args(argv)
    check_data_args(args, parser)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite discards it: give one of them")
    if args.evaluate and args.predict:
        parser.error("--evaluate and --predict are two jobs: give one of them")
    if args.predict and len(args.predict) < 2:
        parser.error("--predict takes a model.pt and then images or folders of images")
    if args.name is None:
        args.name = default_name(args, parser, method)
        if used := args.evaluate or (args.predict or [None])[0]:
            what = "predictions" if args.predict else "-".join(["on", args.data] + [args.split] * (args.split != "test"))
            args.name = f"{Path(used).resolve().parent.name}-{what}"
    args.argv, args.preset = argv, f"{start} {args.data}: " + ", ".join(f"{key} {value}" for key, value in preset.items())
    return args


def check_data_args(args, parser) -> None:
    if args.labels and np.any(args.noise):
        parser.error("--labels and --noise exclude each other: the file brings its own noise")
    if args.difficulty and args.data != "toy":
        parser.error("--difficulty is for --data toy alone")
    if args.root != parser.get_default("root") and args.data == "toy":
        parser.error("--data toy is drawn, not read: it takes no --root")


def default_name(args, parser, method: str) -> str:
    """`<method>-<data>-n<noise>-<flags that differ from the preset>-s<seed>`, in characters that any file system takes."""
    skip = ("data", "noise", "seed", "device", *NOT_SETTINGS, *(["root"] if args.data != "folder" else []))
    changed = []
    for key, value in vars(args).items():
        if key in skip or value == parser.get_default(key):
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            changed.append(flag if value else f"no-{flag}")
        else:
            changed.append(flag + re.sub(r"[^\w.]+", "_", Path(value).stem if isinstance(value, str) else str(value)))
    rates = "-".join(f"{rate:g}" for rate in np.atleast_1d(args.noise))
    return "-".join([method, args.data, f"n{rates}", *changed, f"s{args.seed}"])


# ----------------------------------------------------------------------------------------------------------------------
# Batches and the plan of an epoch
# ----------------------------------------------------------------------------------------------------------------------


def batch_slices(count: int, batch_size: int) -> list[slice]:
    """Slices that cover range(count); a last batch of one sample joins the one before it (batch statistics need two)."""
    if batch_size > count:
        raise UserError(f"--batch-size {batch_size} is larger than the {count} training images")
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, starts[1:] + [count])]


class Pixels:
    """The images of a split for the device: resident when they fit in a third of its free memory, else streamed to it."""

    def __init__(self, images: Tensor, device: torch.device):
        self.images, self.device = images, device
        if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 3:
            self.images = images.to(device)
        self.streamed = self.images.device.type != device.type

    def batches(self, order: Tensor, slices: list[slice]):
        """Yield (slice, index (B,) on the device, uint8 images (B, C, H, W) on the device). order: int64, on the CPU."""
        if not self.streamed:
            order = order.to(self.device)
            for part in slices:
                yield part, order[part], self.images[order[part]]
            return
        ready, stop = queue.Queue(maxsize=2), threading.Event()  # one thread reads ahead, into pinned memory for CUDA
        pin = Tensor.pin_memory if self.device.type == "cuda" else Tensor.contiguous

        def put(item):
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read():
            try:
                for part in slices:
                    put((part, pin(order[part]), pin(self.images[order[part]])))
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:  # raised again where the batches are consumed
                put(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                part, index, images = item
                yield part, index.to(self.device, non_blocking=True), images.to(self.device, non_blocking=True)
        finally:
            stop.set()
            thread.join()

    def inputs(self, size: int, batch_size: int = 512, mean=None, std=None):
        """Yield all images in their order, unaugmented, as network inputs (B, 3, size, size); mean, std: see `network_input`."""
        count = len(self.images)
        for _, _, images in self.batches(torch.arange(count), [slice(i, i + batch_size) for i in range(0, count, batch_size)]):
            yield network_input(images, size, mean, std)


class EpochPlan:
    """Everything random in an epoch, a function of (seed, epoch): the order of the samples and every draw of augmentation.

    `plan.order`, int64 (N,) on the CPU, is the epoch's global order. `plan.draw(name, part)` gives the numbers of the
    positions `part` in that order: the same place gets the same draw whatever the device, the batch split or the point
    of resumption, a sample drawn twice gets two, and a new name never shifts the draws of the others.
    """

    def __init__(self, count: int, seed: int, epoch: int, device: torch.device, oversample_by: Tensor | None = None):
        """oversample_by: labels, int64 (count,), whose classes are drawn equally often; None: each sample once."""
        self.count, self.key, self.device, self.draws = count, (seed, epoch), device, {}
        generator = generator_of("order", *self.key)
        if oversample_by is None:
            self.order = torch.randperm(count, generator=generator)
        else:
            self.order = balanced_order(oversample_by.cpu(), generator)
        torch.manual_seed(seed_of("epoch", *self.key))  # whatever else draws (dropout, a GAN's noise) restarts here too

    def draw(self, name: str, part: slice) -> Tensor:
        """Uniform numbers in [0, 1), float32 (B,), one for each position of the slice `part`."""
        if name not in self.draws:
            self.draws[name] = torch.rand(self.count, generator=generator_of(name, *self.key)).to(self.device)
        return self.draws[name][part]


def balanced_order(labels: Tensor, generator) -> Tensor:
    """int64 (N,): an order of N draws in which the classes that occur are equally frequent (to one draw); within a class
    every sample is drawn equally often (to one draw), whether the class is repeated or cut."""
    classes, count = labels.unique(), len(labels)
    drawn = []
    for k, c in enumerate(classes):
        members = (labels == c).nonzero().flatten()
        quota = count // len(classes) + (k < count % len(classes))
        rounds = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-quota // len(members)))]
        drawn.append(torch.cat(rounds)[:quota])
    drawn = torch.cat(drawn)
    return drawn[torch.randperm(count, generator=generator)]


def set_labels(labels: Tensor, index: Tensor, new: Tensor) -> Tensor:
    """labels[index] = new, in place, for a batch; returns how many labels changed, a scalar tensor on the device.

    Where oversampling drew a sample twice in the batch, the later occurrence decides (a plain assignment is not
    deterministic on a GPU). labels: int64 (N,). index, new: int64 (B,). No host synchronisation.
    """
    place = torch.arange(len(index), device=index.device)
    last = torch.where(index[:, None] == index[None, :], place, -1).amax(1)  # (B,): where the sample occurs last
    new = new[last]
    changed = ((labels[index] != new) & (last == place)).sum()
    labels[index] = new
    return changed


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as all the papers' codes


def network_input(images: Tensor, size: int, mean=None, std=None) -> Tensor:
    """Images (B, 1 or 3, H, W), uint8 or float in [0, 255] -> normalised float32 (B, 3, size, size), channels last.

    mean, std: of values in [0, 1], a number for each channel; MEAN and STD by default.
    """
    images = images.float() / 255
    if images.shape[-1] != size or images.shape[-2] != size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (mean or MEAN, std or STD))
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)  # (1 channel broadcasts to 3)


# ----------------------------------------------------------------------------------------------------------------------
# Device, backbones, checkpoints
# ----------------------------------------------------------------------------------------------------------------------

METHODS = ("cocuring", "scn", "ncctfer", "jointgan", "twostage")
BACKBONES = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}


def find_device(name: str) -> torch.device:
    """The device of --device; UserError for one that is not there."""
    try:
        device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not there ({str(error).split(chr(10))[0]})") from None


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 natively."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags)


def autocast(device: torch.device, precision: str):
    """The context in which networks run: bf16 autocast, or nothing for fp32. Losses and softmax belong outside, in fp32."""
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def make_backbone(args) -> tuple[nn.Module, int]:
    """The network of --backbone without its last layer, with the weights of --pretrained, and the width of its features."""
    if args.pretrained == "imagenet":
        try:
            weights = torchvision.models.get_model_weights(args.backbone).IMAGENET1K_V1
            backbone = BACKBONES[args.backbone](weights=weights)
        except OSError as error:
            raise UserError(f"--pretrained imagenet: torchvision could not fetch the weights ({error})") from None
    else:
        backbone = BACKBONES[args.backbone]()
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if args.pretrained not in ("none", "imagenet"):
        print(f"{args.pretrained}: {load_pretrained(backbone, args.pretrained)} tensors loaded")
    return backbone, width


def load_pretrained(model: nn.Module, path) -> int:
    """Load the backbone of a checkpoint into `model`; returns the number of tensors loaded.

    Read are plain torchvision state dicts, {'state_dict': ...} and this project's model.pt (backbone of its first network); the
    prefixes "module." and "backbone." are stripped, classification layers dropped. Every backbone tensor of the model
    must be there in its shape, and none may be left over: otherwise UserError, which lists both key sets.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        raise UserError(f"{path}: a pickle cannot be loaded safely; convert it once, where you trust it: "
                        "torch.save({k: torch.from_numpy(v) for k, v in pickle.load(open(f, 'rb'), encoding='latin1').items()}, 'weights.pth')")
    state = load_checkpoint(path)
    if isinstance(state.get("networks"), list):  # heads have other names in every method
        state = {key: value for key, value in state["networks"][0].items() if key.startswith("backbone.")}
    state = state.get("state_dict", state)
    heads = ("fc.", "feature.", "head.", "classifier.")
    found = {}
    for key, value in state.items():
        while key.startswith(("module.", "backbone.")):
            key = key.split(".", 1)[1]
        if isinstance(value, Tensor) and not key.startswith(heads):
            found[key] = value
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(heads)}
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # absent before PyTorch 0.4.1, of no effect
    wrong = sorted((set(wanted) ^ set(found)) - counters)
    wrong += sorted(key for key in set(wanted) & set(found) if wanted[key].shape != found[key].shape)
    if wrong:
        raise UserError(f"{path}: the weights are of another backbone, {len(wrong)} tensors do not match ({wrong[0]}); "
                        f"the file has: {' '.join(sorted(found))}; the network has: {' '.join(sorted(wanted))}")
    model.load_state_dict(model.state_dict() | found)
    return len(found)


def save_checkpoint(path, **state) -> None:
    """torch.save(state) to a temporary file, then rename: a killed process never leaves half a checkpoint."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path) -> dict:
    """The dict in a checkpoint, on the CPU; UserError if it is missing, damaged, or holds more than weights and plain values."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        raise UserError(f"{path}: cannot be loaded as a checkpoint ({type(error).__name__}: {str(error).split(chr(10))[0]})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a dict of weights")
    return state


def restore(state: dict, device: torch.device):
    """The trained model in the content of a model.pt: its script's `restore`, whatever the method.

    Returns a function of images, uint8 (N, C, H, W), that gives softmax outputs (N, classes) and valence and arousal
    (N, 2) or None. Raises UserError for another kind of checkpoint, or weights that do not fit its arguments.
    """
    if not {"method", "classes", "args", "networks"} <= set(state) or state["method"] not in METHODS:
        raise UserError("not a model.pt of a finished run")
    script = importlib.import_module(state["method"])  # here, because scripts import this file
    args = argparse.Namespace(**state["args"] | {"pretrained": "none", "compile": False})
    try:
        return script.restore(state["networks"], args, len(state["classes"]), device)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"the weights do not fit the arguments beside them ({str(error).splitlines()[0]})") from None


def load_model(path, device: torch.device) -> tuple:
    """The content of a model.pt and its model, see `restore`; UserError with the path."""
    state = load_checkpoint(path)
    try:
        return state, restore(state, device)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Metrics and figures
# ----------------------------------------------------------------------------------------------------------------------


def accuracy_scalars(probs: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """accuracy/test, accuracy/test_mean_class and accuracy/class/<class> (of the classes that occur), as fractions.

    probs: (N, C). labels: int64 (N,).
    """
    table = confusion(probs.argmax(1), labels, len(classes))
    per_class = {f"accuracy/class/{name}": row[i] / sum(row) for i, (name, row) in enumerate(zip(classes, table)) if sum(row)}
    accuracy = sum(row[i] for i, row in enumerate(table)) / len(labels)
    return {"accuracy/test": accuracy, "accuracy/test_mean_class": sum(per_class.values()) / len(per_class), **per_class}


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> list[list[int]]:
    """Counts: row the label, column the prediction."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes).tolist()


def label_scalars(given: Tensor, current: Tensor, clean: Tensor | None) -> dict[str, float]:
    """relabel/changed and, where the clean labels are known, labels/accuracy, relabel/precision and relabel/recall.

    given, current, clean: int64 (N,). Precision is left out while no label is changed, recall if none is corrupted.
    """
    changed = current != given
    scalars = {"relabel/changed": changed.sum().item()}
    if clean is not None:
        right, corrupted = current == clean, given != clean
        scalars["labels/accuracy"] = right.float().mean().item()
        if changed.any():
            scalars["relabel/precision"] = right[changed].float().mean().item()
        if corrupted.any():
            scalars["relabel/recall"] = right[corrupted].float().mean().item()
    return scalars


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive sample has a higher score than a negative one, ties counted half; 0.5 without either kind.

    scores: (N,). positive: bool (N,).
    """
    above, below = scores[positive].double(), scores[~positive].double().sort().values
    if not len(above) or not len(below):
        return 0.5
    wins = torch.searchsorted(below, above) + torch.searchsorted(below, above, right=True)
    return (wins.double().mean() / (2 * len(below))).item()


def audit_scores(probs: Tensor, given: Tensor) -> Tensor:
    """How suspicious each given label is, (N,) in [0, 1]: max_k p_k - p_given. probs: (N, C) on unaugmented images."""
    return probs.amax(1) - probs.gather(1, given[:, None])[:, 0]


def figure_of_curves(history: list[dict], split: str):
    """Accuracy against epoch: training, evaluation and, where known, the share of training labels that are right."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    for tag, name, colour in (("accuracy/test", split, "tab:blue"), ("accuracy/train", "train, on the current labels", "tab:orange"),
                              ("labels/accuracy", "training labels that are right", "tab:green")):
        points = [(line["epoch"], 100 * line[tag]) for line in history if tag in line]
        if points:
            axes.plot(*zip(*points), label=name, color=colour, marker=".")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 101))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def figure_of_confusion(table: list[list[int]], classes: tuple[str, ...]):
    """The row-normalised confusion matrix in per cent."""
    from matplotlib.figure import Figure

    counts = np.array(table, dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure((1.6 + 0.75 * len(classes), 1.2 + 0.7 * len(classes)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.ndindex(shares.shape):
        axes.text(j, i, f"{shares[i, j]:.1f}", ha="center", va="center", color="white" if shares[i, j] > 60 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted (%)", ylabel="label")
    return figure


def figure_of_faces(images: Tensor, captions: list[str], colours: list[str], title: str, columns: int = 8):
    """A grid of faces (N, C, H, W), uint8, with a caption in a colour under each."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    height = 1.65 * rows + 0.4  # inches; placed by hand, since matplotlib's own layout of many axes takes seconds
    figure = Figure((1.35 * columns, height))
    figure.suptitle(title, fontsize=11, y=1 - 0.15 / height, va="center")
    cells = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.35 / height, bottom=0.4 / height, wspace=0.06, hspace=0.3)
    for axes in cells:
        axes.axis("off")
    for axes, image, caption, colour in zip(cells, images, captions, colours):
        axes.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        axes.set_title(caption, fontsize=8, color=colour, y=-0.3)
    return figure


def render(figure) -> np.ndarray:
    """uint8 (H, W, 3) of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(120)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def save_png(path: Path, pixels: np.ndarray) -> None:
    write_atomically(path, functools.partial(Image.fromarray(pixels).save, format="PNG"))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and prediction with a trained model
# ----------------------------------------------------------------------------------------------------------------------


def use_checkpoint(args, method: str) -> int:
    """--evaluate CHECKPOINT or --predict CHECKPOINT PATHS; writes into the folder of --out and --name. Returns 0.

    Raises UserError for a checkpoint of another method, other classes, images that cannot be read, or a folder that is
    there already (without --overwrite).
    """
    path = Path(args.evaluate or args.predict[0])
    folder = Path(args.out) / args.name
    state, predictor = load_model(path, find_device(args.device))
    if state["method"] != method:
        raise UserError(f"{path}: a checkpoint of {state['method']}, not of {method}")
    if folder.exists() and not args.overwrite:
        raise UserError(f"{folder} is there already: --overwrite replaces what it holds, --name NAME writes beside it")
    (evaluate_checkpoint if args.evaluate else predict_images)(args, state, predictor, folder)
    return 0


def evaluate_checkpoint(args, state: dict, predictor, folder: Path) -> None:
    """Accuracy, mean class accuracy, a table per class and the confusion matrix on the evaluated split of --data."""
    args.size = state["args"]["size"]
    index = read_index(args, args.split)
    if set(index.classes) != set(state["classes"]):
        raise UserError(f"the model knows the classes {', '.join(state['classes'])}, --data {args.data} has {', '.join(index.classes)}; --classes 7 drops contempt")
    probs, _ = predictor(decode_all(index, args, args.split))
    probs = probs.cpu()[:, [state["classes"].index(name) for name in index.classes]]  # into the order of the data set
    labels = torch.tensor(index.labels)
    scalars, table = accuracy_scalars(probs, labels, index.classes), confusion(probs.argmax(1), labels, len(index.classes))
    width = max(map(len, index.classes))
    print(f"{args.evaluate} on {args.data} {args.split}, {len(labels):,} images")
    for name, row in zip(index.classes, table):
        tag = f"accuracy/class/{name}"
        print(f"{name:{width}}  {f'{scalars[tag]:7.2%}' if tag in scalars else '      -'} of {sum(row):,}")
    print(f"{'accuracy':{width}}  {scalars['accuracy/test']:7.2%}\n{'class mean':{width}}  {scalars['accuracy/test_mean_class']:7.2%}")
    folder.mkdir(parents=True, exist_ok=True)
    save_png(folder / "confusion.png", render(figure_of_confusion(table, index.classes)))
    record = {"checkpoint": args.evaluate, "data": args.data, "root": str(args.root), "split": args.split, "images": len(labels), **scalars, "classes": list(index.classes), "confusion": table}
    write_atomically(folder / "evaluation.json", lambda file: file.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"{folder}: evaluation.json, confusion.png")


def predict_images(args, state: dict, predictor, folder: Path) -> None:
    """predictions.csv, a line per image: its name, its class and the probability of each class; and a sheet of the first."""
    paths = []
    for given in map(Path, args.predict[1:]):
        if given.is_dir():
            found = [p for p in sorted(given.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
            paths += [p for p in found if p.name != "faces.png" or not p.with_suffix(".csv").exists()]  # the sheet of align_faces.py
        else:
            paths.append(given)  # whatever its suffix: a file that is no image is an error
    if not paths:
        raise UserError(f"--predict: no images ({', '.join(IMAGE_SUFFIXES)}) in {', '.join(args.predict[1:])}")
    size, parts, shown = state["args"]["size"], [], None
    for start in range(0, len(paths), 512):  # never all in memory
        images = torch.from_numpy(np.stack([decode(path, (size, size), grey=False) for path in paths[start : start + 512]]))
        parts.append(predictor(images)[0].cpu())
        shown = images[:32] if shown is None else shown
    probs = torch.cat(parts)
    captions = [f"{state['classes'][p.argmax()]} {p.max():.2f}" for p in probs[: len(shown)]]
    folder.mkdir(parents=True, exist_ok=True)
    save_png(folder / "predictions.png", render(figure_of_faces(shown, captions, ["black"] * len(shown), "Predicted class and its probability")))

    def write(file):
        with open(file, "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            rows.writerow(["name", "class", *state["classes"]])
            rows.writerows([path.as_posix(), state["classes"][p.argmax()], *(f"{v:.6f}" for v in p.tolist())] for path, p in zip(paths, probs))

    write_atomically(folder / "predictions.csv", write)
    print(f"{folder}: predictions.csv ({len(paths):,} images), predictions.png")


# ----------------------------------------------------------------------------------------------------------------------
# The run folder
# ----------------------------------------------------------------------------------------------------------------------

OUTPUTS = ("model.pt", "last.pt", "metrics.jsonl", "labels.csv", "*.png", "events.out.tfevents.*", "args.json")  # in the order of removal


class Run:
    """The folder runs/<name>/ of one training run: what is in it, who may write there, and how it is resumed.

    Use as a context around everything from loading the data on. Raises UserError for a folder that is in use, that
    holds a finished run, an unfinished one without --resume, or with --resume a run with other arguments.
    """

    def __init__(self, args, method: str):
        self.args, self.method, self.folder = args, method, Path(args.out) / args.name
        self.lock = self.writer = None
        self.settings = {key: value for key, value in vars(args).items() if key not in ("preset", "argv")}
        if not self.folder.is_dir():
            return
        self.lock_folder()
        finished, begun = (self.folder / "model.pt").exists(), (self.folder / "last.pt").exists()
        if finished and not args.overwrite:
            also = "; there is nothing left to --resume" if args.resume else ", --resume is for unfinished ones"
            raise UserError(f"{self.folder} holds a finished run: --overwrite replaces it, --name NAME starts another beside it{also}")
        if begun and not (args.resume or args.overwrite):
            raise UserError(f"{self.folder} holds an unfinished run: --resume goes on with it, --overwrite discards it, --name NAME starts another beside it")
        if begun and args.resume:
            self.refuse_changes()

    def lock_folder(self) -> None:
        self.lock = open(self.folder / ".lock", "w")
        if fcntl:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it however the process ends
            except OSError:
                raise UserError(f"{self.folder} is in use by another process; --name NAME starts another run beside it") from None

    def refuse_changes(self) -> None:
        try:
            before = json.loads((self.folder / "args.json").read_text())
            method = before["method"]
        except (OSError, ValueError, KeyError):
            raise UserError(f"{self.folder}/args.json is missing or damaged: the run cannot be resumed, --overwrite discards it") from None
        if method != self.method:
            raise UserError(f"{self.folder} holds a run of {method}, not of {self.method}")
        now = json.loads(json.dumps(self.settings))
        for key in now:
            if key not in NOT_SETTINGS and now[key] != before.get(key):
                raise UserError(f"--resume: {key} was {before.get(key)} in {self.folder} and is {now[key]} now; give the same arguments, or another --name")

    def start(self) -> dict | None:
        """Make the folder ready for training. Returns the last checkpoint if there is one to resume, else None."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.lock is None:
            self.lock_folder()
        for file in self.folder.glob("*.tmp*"):  # what a kill in the middle of write_atomically left
            file.unlink()
        state = None
        if self.args.resume and (self.folder / "last.pt").exists():
            state = load_checkpoint(self.folder / "last.pt")
            lines = [line for line in self.history() if line["epoch"] <= state["epoch"]]  # a line may be ahead of the checkpoint
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_atomically(self.folder / "metrics.jsonl", lambda path: path.write_text(text))
            print(f"{self.folder}: going on after epoch {state['epoch']}")
        else:
            for pattern in OUTPUTS:
                for file in self.folder.glob(pattern):
                    file.unlink()
            record = {"method": self.method, **self.settings, "argv": self.args.argv, "versions": versions(), "commit": commit()}
            write_atomically(self.folder / "args.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
        # purge_step: TensorBoard drops what a killed run logged after its last checkpoint
        self.writer = summary_writer(self.folder, purge_step=state["epoch"] + 1 if state else None)
        return state

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.writer:
            self.writer.close()
        if self.lock:
            self.lock.close()
        if kind is KeyboardInterrupt and self.writer:
            print(f"\n{self.folder}: the same command with --resume goes on after the last finished epoch", file=sys.stderr)

    def history(self) -> list[dict]:
        """The lines of metrics.jsonl; one that a killed process left unfinished is passed over."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        complete = []
        for line in lines:
            try:
                complete.append(json.loads(line))
            except ValueError:
                break
        return complete

    def check_finite(self, losses: Tensor, epoch: int) -> None:
        """UserError if one of the epoch's losses, (steps,), is not finite: epoch, step and the last good checkpoint."""
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if bad:
            last = f"{self.folder / 'last.pt'} (epoch {epoch - 1})" if epoch > 1 else "none"
            raise UserError(f"the loss is not finite in epoch {epoch}, step {bad[0] + 1} of {len(losses)}; last good checkpoint: {last}")

    def log(self, epoch: int, seconds: float, scalars: dict[str, float]) -> None:
        """A line in metrics.jsonl, the scalars in TensorBoard, a line on the screen."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"epoch": epoch, "seconds": round(seconds, 2), **scalars}) + "\n")
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, epoch)
        self.writer.flush()
        shown = [f"loss {scalars['loss/total']:.3f}", f"train {scalars['accuracy/train']:.1%}", f"{self.args.split} {scalars['accuracy/test']:.1%}"]
        shown += [f"relabelled {scalars['relabel/changed']}"] if "relabel/changed" in scalars else []
        shown += [f"labels right {scalars['labels/accuracy']:.1%}"] if "labels/accuracy" in scalars else []
        print(f"epoch {epoch:3d}/{self.args.epochs}  " + "  ".join(shown) + f"  {seconds:.1f} s", flush=True)

    def save(self, **state) -> None:
        """Write last.pt: everything that `start` returns when the run is resumed."""
        save_checkpoint(self.folder / "last.pt", method=self.method, **state)

    def finish(self, train: Split, current: Tensor, scores: Tensor, table: list[list[int]], networks: list[dict], figures: dict | None = None) -> None:
        """Write the label audit, the figures, TensorBoard's hparams and, last, model.pt; print best, last5 and final.

        current: int64 (N,), the labels after the last epoch. scores: (N,), see `audit_scores`. table: `confusion` of the
        evaluated split. networks: their state dicts. figures: name -> figure, what the method shows beside the three of all.
        """
        current, scores = current.cpu(), scores.float().cpu()
        order = scores.argsort(descending=True, stable=True).tolist()
        self.write_audit(train, current, scores, order)
        history = self.history()
        shown = {"curves": figure_of_curves(history, self.args.split), "confusion": figure_of_confusion(table, train.classes),
                 "audit": figure_of_audit(train, current, scores, order[:32])} | (figures or {})
        for name, figure in shown.items():
            pixels = render(figure)
            save_png(self.folder / f"{name}.png", pixels)
            self.writer.add_image(name, pixels, self.args.epochs, dataformats="HWC")
        results = summary(history)
        self.write_hparams(results)
        self.writer.flush()
        settings = json.loads(json.dumps(self.settings))
        save_checkpoint(self.folder / "model.pt", method=self.method, classes=list(train.classes), args=settings, networks=networks)
        if train.clean is not None:
            first = order[:100]
            wrong = (train.labels != train.clean)[first].sum().item()
            print(f"label audit: of the first {len(first)} rows of labels.csv {wrong} are labels that the noise made wrong")
        print(f"{self.folder}: labels.csv, {', '.join(f'{name}.png' for name in shown)}, metrics.jsonl, model.pt; tensorboard --logdir {self.args.out}")
        print(f"best   {results['best']:.2%} of {self.args.split} (epoch {results['best_epoch']}; the epoch is selected on this very split)")
        print(f"last5  {results['last5']:.2%} (mean of the last {min(5, len(history))} epochs)")
        print(f"final  {results['final']:.2%}")

    def write_audit(self, train: Split, current: Tensor, scores: Tensor, order: list[int]) -> None:
        columns = {"given": train.labels, "final": current} | ({} if train.clean is None else {"clean": train.clean})
        columns = {key: [train.classes[label] for label in labels.tolist()] for key, labels in columns.items()}

        def write(path):
            with open(path, "w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(["name", "given", "final", "score", *list(columns)[2:]])
                for i in order:
                    given, final, *clean = (column[i] for column in columns.values())
                    rows.writerow([train.names[i], given, final, f"{scores[i]:.6f}", *clean])

        write_atomically(self.folder / "labels.csv", write)

    def write_hparams(self, results: dict) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in self.settings.items()}
        metrics = {f"hparam/{key}": results[key] for key in ("best", "last5", "final")}
        for part in hparams(plain, metrics):  # add_hparams would make a run of its own beside this one
            self.writer.file_writer.add_summary(part)
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, self.args.epochs)


def figure_of_audit(train: Split, current: Tensor, scores: Tensor, rows: list[int]):
    """The faces `rows` of the training set, the most suspicious first: given label -> final label, and the score."""
    arrow = "\N{RIGHTWARDS ARROW}"
    captions = [f"{train.classes[train.labels[i]]}\n{arrow} {train.classes[current[i]]} {scores[i]:.2f}" for i in rows]
    title = "The most suspicious labels: given, then final label and score"
    colours = ["black"] * len(rows)
    if train.clean is not None:
        colours = ["tab:green" if train.labels[i] != train.clean[i] else "tab:red" for i in rows]
        title += " (green: the given label is indeed wrong)"
    return figure_of_faces(train.images[rows], captions, colours, title)


def summary_writer(folder, purge_step: int | None = None):
    """TensorBoard's writer of event files, kept from importing TensorFlow where that is installed (10 s and 0.6 GB)."""
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))  # TensorBoard asks for this module
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=purge_step)


def summary(history: list[dict]) -> dict[str, float]:
    """best (highest test accuracy of any epoch), last5 (mean of the last five), final, as fractions, and best_epoch."""
    accuracies = [line["accuracy/test"] for line in history]
    last5 = accuracies[-5:]
    best = max(accuracies)
    return {"best": best, "last5": sum(last5) / len(last5), "final": accuracies[-1], "best_epoch": history[accuracies.index(best)]["epoch"]}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}


def commit() -> str | None:
    """The commit of the scripts' own checkout, with "+" if it was changed; None outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(dirty)
