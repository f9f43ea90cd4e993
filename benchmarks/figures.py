"""The papers' figures, drawn from finished runs: each subcommand takes run folders (runs/<name>) and writes one PNG.

    python benchmarks/figures.py weights CLEAN NOISY CURED     # SCN, Fig. 3: weights of the same faces in three runs
    python benchmarks/figures.py gradcam RUN [RUN ...]         # NCCTFER, Fig. 8: where the networks look
    python benchmarks/figures.py tsne RUN                      # features of the test faces (needs scikit-learn)
    python benchmarks/figures.py votes RUN                     # FERPlus: suspicious labels beside the votes
    python benchmarks/figures.py scalar TAG RUN [RUN ...]      # a scalar of metrics.jsonl against the epoch
    python benchmarks/figures.py overview RUN BASELINE         # README: suspicious labels, and test accuracy of both
    python benchmarks/figures.py plane RUN --label neutral     # jointgan.py: faces over valence and arousal
    python benchmarks/figures.py between RUN happiness anger   # jointgan.py: faces from one class to another

    for run in "--noise 0 --name clean" "--noise 0.2 --no-relabel --name noisy" "--noise 0.2 --name cured"; do
        python scn.py --data toy $run
    done
    python benchmarks/figures.py weights runs/clean runs/noisy runs/cured
"""

import argparse
import csv
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import datasets  # noqa: E402 - found through the line above
from support.decoding import decode  # noqa: E402
from support.distributed import reports_errors  # noqa: E402
from support.figures import faces, generate_faces, new_figure  # noqa: E402
from support.inference import load_model  # noqa: E402
from support.label_sets import class_va, load_label_sets  # noqa: E402
from support.runs import Parser, positive_int  # noqa: E402

import common  # noqa: E402
from common import UserError  # noqa: E402


class Trained:
    """The first network of a run folder's model.pt in evaluation mode, its arguments and its data."""

    def __init__(self, folder: Path):
        state, _ = load_model(folder / "model.pt", torch.device("cpu"))
        self.folder, self.classes = folder, state["classes"]
        script = importlib.import_module(state["method"])
        if hasattr(script, "load_networks"):
            raise UserError(f"{folder}: a run of {state['method']}; this figure needs a backbone")
        self.args = argparse.Namespace(**state["args"] | {"pretrained": "none", "compile": False})
        make = getattr(script, "make_networks", None)  # of the peers the first
        count = len(self.classes)
        self.network = make(self.args, count)[0] if make else script.make_network(self.args, count)
        self.network.load_state_dict(state["networks"][0])
        self.network.eval()
        self.train, self.test = datasets.load_data(self.args)

    def head(self) -> nn.Linear:
        return getattr(self.network, "positive", None) or self.network.head  # of two heads the positive one

    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> (N, width), float32."""
        parts = common.Images(images, self.args.size, torch.device("cpu"))
        with torch.no_grad():
            return torch.cat([self.network.backbone(x) for x in parts])


def labels_of(folder: Path, train) -> dict[str, dict[str, str]]:
    """name -> row of a run's labels.csv, in its order. UserError where these are not the images of the run's data."""
    try:
        with open(folder / "labels.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = {row["name"]: row for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        raise UserError(f"{folder}: no labels.csv of a finished run") from None
    if odd := sorted(set(rows) ^ set(train.names)):
        raise UserError(f"{folder}: its labels.csv and its data set have not the same images ({odd[0]})")
    return rows


def weights_figure(folders: list[Path], columns: int):
    """SCN, Fig. 3: alpha of the same faces in runs on clean labels, on noisy ones, and on noisy ones with relabelling.

    The faces are the first whose given label is wrong in the last run; under each stand the label that the run ended
    with (red: wrong) and alpha.
    """
    runs = [Trained(folder) for folder in folders]
    for run in runs:
        if not hasattr(run.network, "attention"):
            raise UserError(f"{run.folder}: no run of scn.py; its network has no weights of samples")
    last = runs[-1].train
    if last.clean is None or any(run.train.names != last.names for run in runs):
        raise UserError("the runs must be on the same training images, the last with injected noise")
    rows = (last.labels != last.clean).nonzero().flatten()[:columns].tolist()
    if not rows:
        raise UserError(f"{runs[-1].folder}: none of its labels is wrong")
    captions, colours = [], []
    for run in runs:
        final = labels_of(run.folder, run.train)
        features = run.features(last.images[rows])
        with torch.no_grad():
            alpha = run.network.attention(features).sigmoid()[:, 0]
        for i, a in zip(rows, alpha):
            label = final[last.names[i]]["final"]
            captions.append(f"{label}\n{a:.2f}")
            colours.append("black" if label == last.classes[last.clean[i]] else "tab:red")
    title = (
        "Weights of the same faces, a row per run: "
        + ", ".join(run.folder.name for run in runs)
        + " (red: the label is wrong)"
    )
    return faces(last.images[rows * len(runs)], captions, colours, title, len(rows))


def grad_cam(network: nn.Module, head: nn.Linear, x: Tensor, smallest: int = 6) -> tuple[Tensor, Tensor]:
    """Grad-CAM (Selvaraju et al., 2017, Eqs. 1-2) of the predicted class, scaled to [0, 1], and the softmax outputs.

    x: (N, 3, H, W). Taken at the deepest block of the backbone whose map is `smallest` pixels wide or more: the last
    stage of a ResNet has 7 at 224 px, as in the papers, but 2 at 48 px. Returns (N, H, W) and (N, C).
    """
    kept = {}
    stages = network.backbone.children()
    blocks = [part for stage in stages for part in (stage if isinstance(stage, nn.Sequential) else [stage])]

    def keep(part, _, output):
        if output.ndim == 4 and output.shape[-1] >= smallest:
            kept["map"] = output

    hooks = [part.register_forward_hook(keep) for part in blocks]
    logits = head(network.backbone(x))
    for hook in hooks:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), kept["map"])
    importance = gradient.mean((2, 3), keepdim=True)  # Eq. 1
    cam = (importance * kept["map"]).sum(1, keepdim=True).relu().detach()  # Eq. 2
    cam = nn.functional.interpolate(cam, x.shape[-2:], mode="bilinear")[:, 0]
    return cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12), logits.softmax(1).detach()


def gradcam_figure(folders: list[Path], columns: int):
    """NCCTFER, Fig. 8: test faces under the Grad-CAM of each run, with prediction and probability in green or red."""
    from matplotlib import colormaps

    runs = [Trained(folder) for folder in folders]
    test = runs[0].test
    if any(run.test.names != test.names for run in runs):
        raise UserError("the runs must be on the same test images")
    order = torch.arange(len(test.labels))
    per_class = [order[test.labels == c] for c in range(len(test.classes))]
    rows = [members[k].item() for k in range(columns) for members in per_class if k < len(members)][
        :columns
    ]  # every class in turn
    shown, captions, colours = [], [], []
    for run in runs:
        x = common.network_input(test.images[rows], run.args.size)
        cam, probs = grad_cam(run.network, run.head(), x)
        cam = nn.functional.interpolate(cam[:, None], test.images.shape[-2:], mode="bilinear")
        heat = torch.from_numpy(colormaps["jet"](cam[:, 0].numpy())[..., :3]).permute(
            0, 3, 1, 2
        )  # (N, 3, H, W) in [0, 1]
        photographs = test.images[rows].expand(-1, 3, -1, -1) / 255
        shown.append((255 * (0.6 * photographs + 0.4 * heat)).to(torch.uint8))
        for i, p in zip(rows, probs):
            captions.append(f"{test.classes[p.argmax()]}\n{p.max():.2f}")
            colours.append("tab:green" if p.argmax() == test.labels[i] else "tab:red")
    title = (
        "Grad-CAM of the predicted class, a row per run: "
        + ", ".join(run.folder.name for run in runs)
        + " (green correct, red wrong)"
    )
    return faces(torch.cat(shown), captions, colours, title, len(rows))


def tsne_figure(folder: Path):
    """The features of the test faces in the plane by t-SNE, coloured by their labels."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("t-SNE needs scikit-learn: pip install scikit-learn") from None
    run = Trained(folder)
    perplexity = min(30, (len(run.test.images) - 1) // 3)  # scikit-learn's own, less where there are few faces
    place = TSNE(perplexity=perplexity, random_state=0).fit_transform(run.features(run.test.images).numpy())
    figure = new_figure(6.5, 6, layout="constrained")
    axes = figure.subplots()
    for c, name in enumerate(run.test.classes):
        axes.scatter(*place[run.test.labels.numpy() == c].T, s=6, label=name)
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"t-SNE of the test features: {folder.name}", fontsize=10)
    axes.legend(markerscale=2)
    return figure


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks; not a number where one is constant."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def vote_entropy(votes: np.ndarray) -> np.ndarray:
    """Entropy in nats of each row of vote counts, (N, 10) -> (N,): 0 where all annotators agree."""
    p = votes / votes.sum(1, keepdims=True).clip(1)
    return -(p * np.log(p.clip(1e-12))).sum(1)


def votes_figure(folder: Path, count: int = 50, columns: int = 10):
    """The `count` most suspicious labels of a run on FERPlus with the votes for them, and a line of what that says.

    Printed: the rank correlation of suspicion (the order of labels.csv; its score alone) with the annotators'
    disagreement (entropy of the votes), and the share of votes that the given label has among the first `count` and
    among all.
    """
    try:
        args = argparse.Namespace(**json.loads((folder / "args.json").read_text()))
        with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError):
        raise UserError(f"{folder}: no args.json and labels.csv of a finished run") from None
    if args.data != "ferplus":
        raise UserError(f"{folder}: a run on {args.data}; only ferplus comes with votes")
    names, votes, sources, _ = datasets.ferplus_votes(Path(args.root), "train")
    place = {name: i for i, name in enumerate(names)}
    if unknown := [row["name"] for row in rows if row["name"] not in place]:
        raise UserError(f"{args.root}: no majority for {unknown[0]}; the votes are not those of {folder}")
    found = [place[row["name"]] for row in rows]
    counts, classes = votes[found], list(datasets.FERPLUS_CLASSES)
    entropy, score = vote_entropy(counts), np.array([float(row["score"]) for row in rows])
    given = np.array([classes.index(row["given"]) for row in rows])
    share = counts[np.arange(len(rows)), given] / counts.sum(1)
    print(
        f"{folder}, {len(rows):,} images: rank correlation of the order of the rows with the entropy of the votes "
        f"{rank_correlation(-np.arange(len(rows)), entropy):.3f}, of the score {rank_correlation(score, entropy):.3f} "
        f"({(score > 0).mean():.0%} of the scores are above 0)"
    )
    print(
        f"share of the votes that the given label has: {share[:count].mean():.2f} in the first {count} rows, "
        f"{share.mean():.2f} in all; entropy {entropy[:count].mean():.2f} and {entropy.mean():.2f}"
    )
    captions = []
    for row, counted in zip(rows[:count], counts):
        said = sorted(zip(counted.tolist(), [*classes, "unknown", "no face"]), reverse=True)[:2]
        captions.append(f"{row['given']} {row['score'][:4]}\n" + ", ".join(f"{name} {n}" for n, name in said if n))
    images = np.stack([decode(sources[i], (48, 48), grey=True) for i in found[:count]])
    title = f"{folder.name}: the most suspicious labels, given label and score, then the two most frequent votes"
    return faces(torch.from_numpy(images), captions, ["black"] * len(captions), title, columns)


def points_of(folder: Path, tag: str, needed: bool = True) -> list[tuple[int, float]]:
    """(epoch, value) of a scalar of a run; none, if it is not needed, where the run has not logged it."""
    try:
        *lines, _ = (folder / "metrics.jsonl").read_text().split("\n")  # a kill may have cut the last one
        lines = [json.loads(line) for line in lines]
        epochs = [line["epoch"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: no metrics.jsonl of a run") from None
    points = [(epoch, line[tag]) for epoch, line in zip(epochs, lines) if tag in line]
    if needed and not points:
        there = ", ".join(sorted(lines[-1]) if lines else ["no lines"])
        raise UserError(f"{folder}: no {tag} in metrics.jsonl; there are {there}")
    return points


def scalar_figure(tag: str, folders: list[Path]):
    """A scalar of several runs against the epoch."""
    figure = new_figure(7, 4.5, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=tag)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for folder in folders:
        axes.plot(*zip(*points_of(folder, tag)), label=folder.name)
    axes.legend(fontsize=8)
    return figure


def overview_figure(run: Path, baseline: Path, columns: int = 4, rows: int = 2):
    """The faces of the most suspicious labels of a run, beside its test accuracy and that of its baseline.

    For a method that corrects labels also the share of them that are correct.
    """
    train = Trained(run).train
    if train.clean is None:
        raise UserError(f"{run}: a run without injected noise; nobody knows which of its labels are wrong")
    places = {name: i for i, name in enumerate(train.names)}
    lines = list(labels_of(run, train).values())[: columns * rows]
    figure = new_figure(11, 3.6, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 6))
    left.suptitle("Most suspicious labels (green: wrong indeed)", fontsize=11)
    for axes, line in zip(left.subplots(rows, columns).flat, lines):
        axes.imshow(train.images[places[line["name"]]].expand(3, -1, -1).permute(1, 2, 0).numpy())
        axes.axis("off")
        wrong = line["clean"] != line["given"]
        caption = f"{line['given']}\n\N{RIGHTWARDS ARROW} {line['final']}"
        axes.set_title(caption, fontsize=8, color="tab:green" if wrong else "black")
    axes = right.add_subplot(xlabel="epoch", ylabel="test accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    for folder in (run, baseline):
        axes.plot(*zip(*((epoch, 100 * value) for epoch, value in points_of(folder, "accuracy/test"))),
                  marker=".", label=folder.name)
    if corrected := points_of(run, "labels/accuracy", needed=False):
        epochs, shares = zip(*((epoch, 100 * share) for epoch, share in corrected))
        axes.plot(epochs, shares, "--", color="tab:green", label=f"{run.name}: labels that are correct")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


class Maker:
    """The decoder of a run of jointgan.py, and what its faces are made of."""

    def __init__(self, folder: Path):
        state, _ = load_model(folder / "model.pt", torch.device("cpu"))
        self.script = importlib.import_module(state["method"])
        if not hasattr(self.script, "load_networks"):
            raise UserError(f"{folder}: a run of {state['method']}; only jointgan.py generates faces")
        self.args, self.classes = argparse.Namespace(**state["args"] | {"compile": False}), state["classes"]
        _, self.decoder, _ = self.script.load_networks(
            state["networks"], self.args, len(self.classes), torch.device("cpu")
        )
        if self.decoder is None:
            raise UserError(f"{folder}: this run has no decoder")
        self.train, _, sets = load_label_sets(self.args)
        self.sets, self.va = len(sets), class_va(self.train)

    def vector(self, name: str) -> Tensor:
        if name not in self.classes:
            raise UserError(f"{name!r} is not among the classes {', '.join(self.classes)}")
        return torch.eye(len(self.classes))[self.classes.index(name)]

    def latent(self, count: int) -> Tensor:
        return torch.randn(count, self.script.LATENT, generator=common.generator_of("faces", self.args.seed))

    def faces(self, y0: Tensor, labels: Tensor, va: Tensor | None) -> Tensor:
        return generate_faces(self.decoder, y0, labels, va, self.sets, self.args)


def plane_figure(folder: Path, label: str, columns: int = 9):
    """One latent vector and one label, valence from -1 to 1 to the right, arousal from 1 to -1 downwards."""
    maker = Maker(folder)
    if maker.va is None:
        raise UserError(f"{folder}: this run knows no valence and arousal")
    steps = torch.linspace(-1, 1, columns)
    va = torch.stack([steps.repeat(columns), steps.flip(0).repeat_interleave(columns)], 1)
    y0 = maker.latent(1).expand(len(va), -1)
    generated = maker.faces(y0, maker.vector(label).expand(len(va), -1), va)
    captions = [f"v {v:+.2f}, a {a:+.2f}" for v, a in va.tolist()]
    return faces(generated, captions, ["black"] * len(va), f"{folder.name}: {label}, over valence and arousal", columns)


def between_figure(folder: Path, first: str, second: str, columns: int = 9, rows: int = 6):
    """A row for each latent vector; labels, valence and arousal go from one class to the other in equal steps."""
    maker = Maker(folder)
    share = torch.linspace(0, 1, columns).repeat(rows)[:, None]
    labels = (1 - share) * maker.vector(first) + share * maker.vector(second)
    y0 = maker.latent(rows).repeat_interleave(columns, 0)
    generated = maker.faces(y0, labels, None if maker.va is None else labels @ maker.va)
    captions = [f"{100 * s:.0f} %" for s in share[:, 0].tolist()]
    return faces(generated, captions, ["black"] * len(generated), f"{folder.name}: from {first} to {second}", columns)


class Command(argparse.ArgumentParser):
    """A subcommand; its errors are one line, too."""

    error = Parser.error

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)


@reports_errors
def main(argv=None) -> int:
    parser = Parser(__file__, __doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Command)
    for name, count, help_ in (
        ("weights", 3, "SCN, Fig. 3"),
        ("gradcam", "+", "NCCTFER, Fig. 8"),
        ("tsne", 1, "features in the plane"),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("runs", nargs=count, type=Path, help="run folders")
        command.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="file to write")
        if name != "tsne":
            command.add_argument("--columns", type=positive_int, default=14, help="faces in a row")
    votes = commands.add_parser("votes", help="FERPlus: suspicion beside the votes")
    votes.add_argument("run", type=Path, help="a run folder of --data ferplus")
    votes.add_argument("--out", type=Path, default=Path("votes.png"), help="file to write")
    scalar = commands.add_parser("scalar", help="a scalar against the epoch")
    scalar.add_argument("tag", help="as in metrics.jsonl")
    scalar.add_argument("runs", nargs="+", type=Path, help="run folders")
    scalar.add_argument("--out", type=Path, default=Path("scalar.png"), help="file to write")
    overview = commands.add_parser("overview", help="suspicious labels beside test accuracies")
    overview.add_argument("run", type=Path, help="a run folder with injected noise")
    overview.add_argument("baseline", type=Path, help="the run folder of its baseline")
    overview.add_argument("--out", type=Path, default=Path("overview.png"), help="file to write")
    plane = commands.add_parser("plane", help="generated faces over valence and arousal")
    between = commands.add_parser("between", help="generated faces from one class to another")
    for name, command in (("plane", plane), ("between", between)):
        command.add_argument("run", type=Path, help="a run folder of jointgan.py")
        command.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="file to write")
    plane.add_argument("--label", default="neutral", help="the class whose faces are made ")
    between.add_argument("first", help="the class on the left")
    between.add_argument("second", help="the class on the right")
    args = parser.parse_args(argv)
    if args.out.suffix not in ("", ".png") or not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: a file name that ends in .png, in a folder that is there")
    if args.command == "plane":
        figure = plane_figure(args.run, args.label)
    elif args.command == "between":
        figure = between_figure(args.run, args.first, args.second)
    elif args.command == "overview":
        figure = overview_figure(args.run, args.baseline)
    elif args.command == "votes":
        figure = votes_figure(args.run)
    elif args.command == "scalar":
        figure = scalar_figure(args.tag, args.runs)
    elif args.command == "weights":
        figure = weights_figure(args.runs, args.columns)
    elif args.command == "gradcam":
        figure = gradcam_figure(args.runs, args.columns)
    else:
        figure = tsne_figure(args.runs[0])
    common.write_atomically(args.out, lambda path: figure.savefig(path, format="png", dpi=110))
    print(f"{args.out} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
