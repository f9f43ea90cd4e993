"""--evaluate and --predict: a trained model.pt at work, and how it is restored."""

import argparse
import csv
import functools
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from support import figures
from support.datasets import OWN_VALID, read_index
from support.decoding import IMAGE_SUFFIXES, decode, decode_all, images_below
from support.metrics import accuracy_scalars, confusion_matrix
from support.runs import PRECISIONS, SIZES, is_unfinished
from support.streams import out_of_memory, reason_of

import numpy as np
import torch
from torch import Tensor

from common import UserError, find_device, load_checkpoint, write_atomically

EVALUATION, PREDICTIONS = ("evaluation.json", "confusion.png"), ("predictions.csv", "predictions.png")


def load_model(path, device: torch.device, restore: Callable | None = None, method: str | None = None, precision=None):
    """The content of a model.pt, and its model as a function of images.

    restore: that of the script which calls; without it that of the script `<method>.py` beside common.py. method:
    refuse checkpoints of another one. precision: None is that of the training. The function takes uint8 images
    (N, C, H, W) and returns softmax outputs (N, classes), and valence and arousal (N, 2) or None, on the CPU. Raises
    UserError with the path for any other file.
    """
    state = load_checkpoint(path)
    kinds = {"method": str, "classes": list, "args": dict, "networks": list}
    if not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: not a model.pt of a finished run")
    if method is not None and state["method"] != method:
        raise UserError(f"{path}: a checkpoint of {state['method']}, not of {method}")
    if restore is None:
        restore = restore_of(state["method"], path)
    args = argparse.Namespace(**{str(key): value for key, value in state["args"].items()})
    args.pretrained, args.compile, here = "none", False, torch.device("meta")
    args.precision = precision or getattr(args, "precision", None)
    try:
        check_content(state["networks"], state["classes"], args)
        with here, warnings.catch_warnings():  # shapes are compared before memory is taken for what the arguments say
            warnings.simplefilter("ignore")  # that nothing is copied
            restore(state["networks"], args, len(state["classes"]), here)
        predictor = restore(state["networks"], args, len(state["classes"]), device)
        probs, _ = predictor(torch.zeros(1, 3, args.size, args.size, dtype=torch.uint8))  # all arguments are used
        if probs.shape != (1, len(state["classes"])) or not probs.isfinite().all():
            raise ValueError("its outputs are no probabilities")
    except Exception as error:  # weights and arguments of any kind may stand in a file
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: the weights do not fit the arguments beside them ({reason_of(error)})") from None
    return state, predictor


def check_content(networks: list, classes: list, args) -> None:
    """Raise an error, of any kind, for weights, class names and common arguments that no script has written."""
    if not all(torch.isfinite(value).all() for weights in networks for value in weights.values()):
        raise ValueError("they are not finite numbers")
    if not all(isinstance(name, str) for name in classes) or not 2 <= len(set(classes)) == len(classes):
        raise ValueError("classes without different names")
    if getattr(args, "networks", len(networks)) != len(networks):  # where a method has that flag
        raise ValueError(f"{len(networks)} networks, not {args.networks}")
    if not isinstance(args.size, int) or args.size not in SIZES:
        raise ValueError(f"size {args.size}")
    if args.precision not in PRECISIONS:
        raise ValueError(f"precision {args.precision}")


def restore_of(method: str, path) -> Callable:
    """`restore` of the script of that name beside common.py."""
    if not method.isidentifier() or not (Path(__file__).parent.parent / f"{method}.py").is_file():
        raise UserError(f"{path}: a checkpoint of {method!r}, and there is no script of that name here")
    restore = getattr(importlib.import_module(method), "restore", None)
    if restore is None:
        raise UserError(f"{path}: a checkpoint of {method!r}, whose script has no function restore")
    return restore


def use_checkpoint(args, restore: Callable) -> int:
    """--evaluate CHECKPOINT or --predict CHECKPOINT PATHS; writes into the folder of --out and --name. Returns 0.

    restore(states, args, num_classes, device): the networks of a model.pt as a function of images. Raises UserError for
    a checkpoint of another method, other classes, images that cannot be read, or a folder that is there already
    (without --overwrite; with it, one that holds anything else than an evaluation or predictions).
    """
    path = Path(args.evaluate or args.predict[0])
    folder = Path(args.out) / args.name
    state, predictor = load_model(path, find_device(args.device), restore, args.method, args.precision)
    for key in ("backbone", "size"):  # None: not on the command line
        if getattr(args, key, None) not in (None, own := state["args"].get(key)):
            raise UserError(f"{path}: a checkpoint of --{key} {own}, not of {getattr(args, key)}")
    refuse_folder(folder, args.overwrite)
    (evaluate_checkpoint if args.evaluate else predict_images)(args, state, predictor, folder)
    return 0


def refuse_folder(folder: Path, overwrite: bool) -> list[Path]:
    """Raise UserError for a folder that is not ours to write to, see `use_checkpoint`; the files that are replaced."""
    if not folder.exists():
        return []
    if not overwrite:
        raise UserError(f"{folder} is there already: --overwrite replaces what it holds, --name NAME writes beside it")
    ours, files = (*EVALUATION, *PREDICTIONS), [file for file in folder.iterdir() if file.name != ".DS_Store"]
    if not all(file.name in ours or is_unfinished(file.name, *ours) for file in files):
        raise UserError(f"{folder} holds other files than an evaluation or predictions: give another --name")
    return files


def make_empty(folder: Path, overwrite: bool) -> None:
    """An evaluation and predictions in one folder would mix. Asks again: another process may have written meanwhile."""
    for file in refuse_folder(folder, overwrite):
        file.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def was_trained_on(trained: dict, args) -> bool:
    """Whether a run with the arguments `trained` saw the validation images of --data."""
    same = trained.get("data") == args.data and (args.data != "folder" or trained.get("root") == args.root)
    return same and trained.get("split") != "valid"


def evaluate_checkpoint(args, state: dict, predictor: Callable, folder: Path) -> None:
    """Accuracy, mean class accuracy, a table per class and the confusion matrix on the evaluated split of --data."""
    args.size, known = state["args"]["size"], state["classes"]
    index = read_index(args, args.split)
    if args.split == "valid" and args.data not in OWN_VALID and was_trained_on(state["args"], args):
        print(f"warning: the validation split of {args.data} is a tenth of the training set, and the model was trained "
              "on it: its run had no --split valid", file=sys.stderr)
    if unknown := [name for name in index.classes if name not in known]:
        hint = "; --classes 7 drops contempt" if unknown == ["contempt"] else ""
        raise UserError(f"the model knows the classes {', '.join(known)}, --data {args.data} has "
                        f"{', '.join(index.classes)}{hint}")
    if more := [name for name in known if name not in index.classes]:
        print(f"these data have no {', '.join(more)}: the model chooses among the other classes")
    probs, _ = predictor(decode_all(index, args, args.split))
    probs = probs[:, [known.index(name) for name in index.classes]]  # into the order of the data set
    labels = torch.tensor(index.labels)
    table = confusion_matrix(probs.argmax(1), labels, len(index.classes))
    scalars = accuracy_scalars(table, index.classes)
    width = max(map(len, [*index.classes, "mean class accuracy"]))
    print(f"{args.evaluate} on {args.data} {args.split}, {len(labels):,} images")
    for name, row in zip(index.classes, table):
        tag = f"accuracy/class/{name}"
        print(f"{name:{width}}  {f'{scalars[tag]:7.2%}' if tag in scalars else '      -'} of {sum(row):,}")
    print(f"{'accuracy':{width}}  {scalars['accuracy/test']:7.2%}")
    print(f"{'mean class accuracy':{width}}  {scalars['accuracy/test_mean_class']:7.2%}")
    make_empty(folder, args.overwrite)
    record = {"checkpoint": args.evaluate, "data": args.data, "root": str(args.root), "split": args.split}
    record |= {"images": len(labels), **scalars, "classes": list(index.classes), "confusion": table}
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / "evaluation.json", lambda file: file.write_text(text))
    drawn = figures.write(folder / "confusion.png", lambda: figures.confusion(table, index.classes))
    print(f"{folder}: evaluation.json{'' if drawn is None else ', confusion.png'}")


def predict_images(args, state: dict, predictor: Callable, folder: Path) -> None:
    """predictions.csv, a line per image: name, class, the probability of each class; and a sheet of the first ones."""
    paths = []
    for given in map(Path, args.predict[1:]):
        paths += images_below(given) if given.is_dir() else [given]  # a file that is no image is an error
    if not paths:
        raise UserError(f"--predict: no images ({', '.join(IMAGE_SUFFIXES)}) in {', '.join(args.predict[1:])}")
    size, classes, parts, shown = state["args"]["size"], state["classes"], [], None
    for start in range(0, len(paths), 512):  # never all in memory
        batch = [decode(path, (size, size), grey=False) for path in paths[start : start + 512]]
        images = torch.from_numpy(np.stack(batch))
        parts.append(predictor(images)[0])
        shown = images[:32] if shown is None else shown
    probs = torch.cat(parts)
    captions = [f"{classes[p.argmax()]} {p.max():.2f}" for p in probs[: len(shown)]]
    make_empty(folder, args.overwrite)
    title = "Predicted class and its probability"
    write_atomically(folder / "predictions.csv", lambda file: write_predictions(file, paths, probs, classes))
    sheet = figures.faces, shown, captions, ["black"] * len(shown), title
    drawn = figures.write(folder / "predictions.png", functools.partial(*sheet))
    print(f"{folder}: predictions.csv ({len(paths):,} images){'' if drawn is None else ', predictions.png'}")


def write_predictions(file: Path, paths: list[Path], probs: Tensor, classes: list[str]) -> None:
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["name", "class", *classes])
        for path, p in zip(paths, probs):
            rows.writerow([path.as_posix(), classes[p.argmax()], *(f"{value:.6f}" for value in p.tolist())])
