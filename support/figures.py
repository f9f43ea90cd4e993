"""The pictures that a run writes. Each function returns a matplotlib figure; matplotlib is imported when one is drawn.

Letters in shapes: N samples, C classes, H and W pixels.
"""

import functools
import sys
import warnings
from pathlib import Path

from support.networks import weights_computed
from support.streams import reason_of

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import common
from common import write_atomically

NAMES = ("curves", "confusion", "audit", "weights", "confidence", "mixtures", "generated")  # the files are <name>.png


def new_figure(width: float, height: float, **options):
    """A figure of so many inches. Names of classes are text: a dollar sign in them begins no formula."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    return Figure((width, height), **options)


def render(figure) -> np.ndarray:
    """uint8 (H, W, 3) of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(120)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def write(path: Path, draw) -> np.ndarray | None:
    """Write the figure that draw() returns as a PNG file, and return its pixels, see `render`.

    A figure that cannot be drawn is a warning, and None: what trained is worth more. OSError if the file cannot be
    written.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that the font lacks: boxes stand for them
            pixels = render(draw())
    except Exception as error:  # names, numbers and a missing matplotlib can all be the reason
        print(f"warning: {path.name} could not be drawn ({reason_of(error)})", file=sys.stderr)
        return None
    write_atomically(path, functools.partial(Image.fromarray(pixels).save, format="PNG"))
    return pixels


def curves(history: list[dict], split: str):
    """Accuracy against epoch: training, evaluation and, where known, the share of training labels that are correct."""
    figure = new_figure(7, 4.2, layout="constrained")
    axes = figure.subplots()
    lines = (
        ("accuracy/test", split, "tab:blue"),
        ("accuracy/train", "train, on the current labels", "tab:orange"),
        ("labels/accuracy", "training labels that are correct", "tab:green"),
    )
    for tag, name, colour in lines:
        points = [(line["epoch"], 100 * line[tag]) for line in history if tag in line]
        if points:
            axes.plot(*zip(*points), label=name, color=colour, marker=".")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 101))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def confusion(table: list[list[int]], classes: tuple[str, ...]):
    """The row-normalised confusion matrix in per cent."""
    counts = np.array(table, dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(1.6 + 0.75 * len(classes), 1.2 + 0.7 * len(classes), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.ndindex(shares.shape):
        colour = "white" if shares[i, j] > 60 else "black"
        axes.text(j, i, f"{shares[i, j]:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted (%)", ylabel="label")
    return figure


def faces(images: Tensor, captions: list[str], colours: list[str], title: str, columns: int = 8):
    """A grid of square faces (N, C, H, W), uint8, with a caption in a colour under each."""
    cell, face, top = (1.35, 1.65), 1.27, 0.35  # inches: width and height of a cell, side of a face, title
    width, height = cell[0] * columns, cell[1] * -(-len(images) // columns) + top + 0.05
    figure = new_figure(width, height)
    figure.suptitle(title, fontsize=11, y=1 - 0.15 / height, va="center")
    axes = figure.add_axes((0, 0, 1, 1))  # one in inches for all: one for each face takes 2.5 times as long
    axes.axis("off")
    for k, (image, caption, colour) in enumerate(zip(images, captions, colours)):
        x, y = cell[0] * (k % columns + 0.5), top + cell[1] * (k // columns)
        axes.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), extent=(x - face / 2, x + face / 2, y + face, y))
        axes.text(x, y + face + 0.04, caption, fontsize=8, color=colour, ha="center", va="top")
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


def audit(train, predicted: Tensor, scores: Tensor, rows: list[int]):
    """The faces `rows` of the training set, the most suspicious first: given label -> predicted class, and the score.

    train: a Split. predicted: int64 (N,). scores: (N,).
    """
    arrow = "\N{RIGHTWARDS ARROW}"
    captions = [
        f"{train.classes[train.labels[i]]}\n{arrow} {train.classes[predicted[i]]} {scores[i]:.2f}" for i in rows
    ]
    title = "The most suspicious labels: given, then predicted class and score"
    colours = ["black"] * len(rows)
    if train.clean is not None:
        colours = ["tab:green" if train.labels[i] != train.clean[i] else "tab:red" for i in rows]
        title += " (green: the given label is indeed wrong)"
    return faces(train.images[rows], captions, colours, title)


def weights(train, current: Tensor, alpha: Tensor):
    """SCN, Fig. 4: the training faces of the lowest importance alpha (N,), with their current labels, int64 (N,)."""
    rows = alpha.argsort(stable=True)[:32].tolist()
    captions = [f"{train.classes[current[i]]}\nalpha {alpha[i]:.2f}" for i in rows]
    title = "The training faces of the lowest importance (Fig. 4)"
    return faces(train.images[rows], captions, ["black"] * len(rows), title)


def confidence(train, probs: Tensor, count: int = 32):
    """NCCTFER, Fig. 9: the first training faces, the same in every run: confidence of given and predicted label.

    probs: (N, C).
    """
    rows = list(range(min(count, len(train.names))))
    predicted = probs.argmax(1)
    captions = [
        f"{train.classes[train.labels[i]]} {probs[i, train.labels[i]]:.2f}\n"
        f"{train.classes[predicted[i]]} {probs[i].max():.2f}"
        for i in rows
    ]
    wrong = [train.clean is not None and bool(train.clean[i] != train.labels[i]) for i in rows]
    title = "Confidence of given, then predicted label (red: the given label is wrong)"
    return faces(train.images[rows], captions, ["tab:red" if w else "black" for w in wrong], title)


@torch.no_grad()
def generate_faces(decoder, y0: Tensor, labels: Tensor, va: Tensor | None, sets: int, args) -> Tensor:
    """Joint-distribution GAN: uint8 (N, 3, size, size) on the CPU, from y0 (N, L), labels (N, C), va (N, 2) or None."""
    decoder.eval()
    vectors = [y0, *[labels] * (sets if args.expression else 0), *([] if va is None else [va])]
    with weights_computed(decoder), common.autocast(y0.device, args.precision):
        faces = decoder(vectors)
    return (127.5 * (faces + 1)).round().clamp(0, 255).to(torch.uint8).cpu()


def generated(decoder, y0: Tensor, train, va: Tensor | None, sets: int, args):
    """Joint-distribution GAN, Fig. 4: a column for each class, a row for each latent vector.

    y0: (R, length). va: (C, 2), the means of each class, or None. sets: how many label sets the decoder takes.
    """
    count = len(train.classes)
    labels = torch.eye(count, device=y0.device).repeat(len(y0), 1)
    va = None if va is None else va.to(y0.device).repeat(len(y0), 1)
    images = generate_faces(decoder, y0.repeat_interleave(count, 0), labels, va, sets, args)
    title = "Faces generated for each class (Fig. 4)"
    return faces(images, list(train.classes) * len(y0), ["black"] * len(images), title, columns=count)


def mixtures(losses: Tensor, train, fit, per_class: bool):
    """Two-stage cycle: the losses (N,) of each class, where known of correct and wrong labels apart, and their mixture.

    fit(losses scaled to [0, 1]) -> weights, means, variances of two Gaussians. per_class: one mixture for each class;
    otherwise one for all, in a panel of its own.
    """
    losses = losses.double().cpu()
    groups = {name: train.labels == c for c, name in enumerate(train.classes)}
    if not per_class:
        groups = {"all classes": torch.ones_like(train.labels, dtype=torch.bool)} | groups
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = new_figure(3.2 * columns, 2.4 * rows, layout="constrained")
    for k, (name, members) in enumerate(groups.items()):
        axes, own = figure.add_subplot(rows, columns, k + 1), losses[members]
        axes.set_title(name, fontsize=9)
        if len(own) < 2 or own.max() == own.min():
            continue
        low, span = own.min(), own.max() - own.min()
        parts = {"all labels": own}
        if train.clean is not None:
            correct = (train.labels == train.clean)[members]
            parts = {"correct": own[correct], "wrong": own[~correct]}
        colours = ["tab:blue", "tab:red"][: len(parts)]
        bars = [part.numpy() for part in parts.values()]
        axes.hist(bars, 40, stacked=True, density=True, color=colours, label=list(parts))
        if per_class or k == 0:
            x = torch.linspace(0, 1, 300, dtype=torch.float64)
            for weight, mean, variance in zip(*fit((own - low) / span)):
                density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).exp()
                axes.plot(low + span * x, weight * density / span, color="black", linewidth=1)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle("Loss of the averaged network on the given labels, and the mixture of two Gaussians", fontsize=10)
    return figure
