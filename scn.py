"""Self-Cure Network (SCN): an importance for each face, ranked, and new labels for faces of low importance.

K. Wang, X. Peng, J. Yang, S. Lu, Y. Qiao: "Suppressing Uncertainties for Large-Scale Facial Expression Recognition",
CVPR 2020. An attention layer gives each image an importance alpha in (0, 1) that scales its logits; a rank loss keeps
the mean of the high group above that of the low group by a margin; from the tenth epoch on, a label of the low group is
replaced where another class is more probable by a margin.

    python scn.py --data toy --noise 0.4                                       # needs no data
    python scn.py --data toy --noise 0.4 --no-weights --no-rank --no-relabel   # the baseline of Table 5
    python scn.py --data raf --root data/raf --noise 0.2 --pretrained resnet18_msceleb.pth

Measured (docs/scn.md): toy, 40 % noise, 3 seeds, CPU, mean test accuracy of the last five epochs: 95.6 +- 0.7 %,
relabelling the whole batch 99.7 +- 0.2 %, without the three parts 80.0 +- 3.3 %, one plain network 85.0 +- 4.6 %.
"""

import sys
from functools import partial

from support import figures
from support.augmentation import augment
from support.datasets import load_data
from support.distributed import reports_errors
from support.inference import use_checkpoint
from support.metrics import auroc
from support.networks import Head, parameter_groups, spread_inputs, to_device
from support.runs import Parser, Run, add_data_args, add_training_args, number, parse_with_presets

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# Used where no flag says otherwise: "scratch" or "pretrained", then "<that> <data set>" on top of it, then the same
# with "pretrained <backbone>" for weights that have a backbone of their own.
# "pretrained" has the epochs, the learning rate (0.1 / 8: the batch is 128, not 1024) and the schedule of Sec. 3.5, and
# the SGD of the official code; not measured. The others are ours (docs/scn.md): from scratch chosen on the validation
# splits of toy and FERPlus, "pretrained dlib" with the rates of cocuring.py.
ADAM = dict(optimizer="adam", lr=1e-3, head_lr=1e-3, weight_decay=0.0)
SGD = dict(optimizer="sgd", lr=0.0125, head_lr=0.0125, weight_decay=1e-4)
PRESETS = {
    "scratch": ADAM | dict(size=100, epochs=30, batch_size=128, warm_up=19, crop=8),
    "scratch ferplus": dict(size=48, crop=4),
    "scratch toy": dict(size=48, epochs=13, batch_size=64, warm_up=3, crop=0),
    "pretrained": SGD | dict(size=224, epochs=40, batch_size=128, warm_up=9),
    "pretrained toy": dict(size=48, epochs=13, batch_size=64, warm_up=5),
    "pretrained dlib": ADAM | dict(epochs=12, batch_size=128, lr=1e-4, head_lr=1e-3, warm_up=4, crop=8),
    "pretrained dlib ferplus": dict(crop=4),
}


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_data_args(parser)
    add_training_args(parser)
    add = parser.add_argument_group("SCN").add_argument
    add("--warm-up", type=number(int, 0), help="first epochs without relabelling (paper, Sec. 3.5: 9, it relabels from "
        "the 10th on; ours from scratch: until the network is mostly right)")
    add("--beta", type=number(float, 0, 1, open_low=True, open_high=True), default=0.7, help="share of the "
        "high-importance group (paper, Sec. 3.5)")
    add("--margin1", type=number(float, 0, 1), default=0.15, help="delta_1, margin between the groups' means, Eq. 3 "
        "(paper, Sec. 3.5); not used with --no-rank")
    add("--margin2", type=number(float, 0, 1), default=0.2, help="delta_2, margin of relabelling, Eq. 5 (paper, Sec. "
        "3.5)")
    add("--learn-margin", action="store_true", help="learn delta_1, from --margin1 on (paper, Fig. 5 left)")
    add("--gamma", type=number(float, 0, 1), default=0.5, help="weight of the rank loss (paper, Sec. 3.5: 1:1, Table "
        "6); not used with --no-rank")
    add("--no-weights", dest="weights", action="store_false", help="Table 5: logits are not weighted")
    add("--no-rank", dest="rank", action="store_false", help="Table 5: no rank loss")
    add("--no-relabel", dest="relabel", action="store_false", help="Table 5: no relabelling")
    add("--relabel-batch", action="store_true", help="relabel in the whole batch (official code; paper: low group "
        "only)")
    add("--optimizer", choices=("sgd", "adam"), help="sgd: momentum 0.9, learning rates / 10 after 3/8 and 6/8 of the "
        "epochs (paper: 15 and 30 of 40); adam: learning rates * 0.95 an epoch (ours)")
    add("--weight-decay", type=number(float, 0), help="of either optimiser (official code: 1e-4; ours with "
        "adam: 0)")
    add("--jitter", type=number(float, 0, 1), default=0.2, help="colour jitter: brightness, contrast, saturation "
        "within 1 +- this (ours: as cocuring.py; paper: not named)")
    add("--crop", type=number(int, 0), default=0, help="pad by so many pixels and crop (paper: none; ours on real "
        "faces, from scratch and with dlib: as cocuring.py)")
    args = parse_with_presets(parser, PRESETS, argv)
    if args.learn_margin and not args.rank:
        parser.error("--learn-margin learns the margin of the rank loss: it cannot go with --no-rank")
    if args.relabel_batch and not args.relabel:
        parser.error("--relabel-batch says where to relabel: it cannot go with --no-relabel")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Losses and rules
# ----------------------------------------------------------------------------------------------------------------------


def logit_weighted_cross_entropy(logits: Tensor, alpha: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2: cross-entropy of the logits times the importance of their sample, mean over the batch.

    The logits that the script gives have a bias, as in the official code; the W x of the paper has none.

    logits: (N, C). alpha: (N,) in (0, 1). labels: int64 (N,). Returns a scalar.
    """
    return F.cross_entropy(alpha[:, None] * logits, labels)


def high_count(n: int, beta: float) -> int:
    """M, the size of the high-importance group of n samples (Sec. 3.3); both groups have at least one sample."""
    return min(max(int(beta * n + 1e-9), 1), n - 1)


def rank_regularization(alpha: Tensor, beta: float = 0.7, margin: float | Tensor = 0.15) -> Tensor:
    """Eqs. 3-4: max(0, delta_1 - (mean alpha of the high group - mean alpha of the low group)).

    alpha: (N,). beta: share of the high group in (0, 1). margin: delta_1, a number or a tensor to be learned.
    Returns a scalar; 0 for fewer than two samples.
    """
    if len(alpha) < 2:
        return alpha.sum() * 0
    ranked = alpha.sort(descending=True).values
    m = high_count(len(alpha), beta)
    return (margin - (ranked[:m].mean() - ranked[m:].mean())).clamp(min=0)  # Eq. 3 of the means of Eq. 4


def low_group(alpha: Tensor, beta: float = 0.7) -> Tensor:
    """bool (N,): the samples outside the M of the highest importance (Sec. 3.3). alpha: (N,)."""
    place = alpha.argsort(descending=True, stable=True).argsort()  # (N,): 0 for the largest alpha
    return place >= high_count(len(alpha), beta)


def relabel_all(probs: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """Eq. 5 for every sample: the most probable class where it exceeds the label's probability by more than delta_2.

    probs: (N, C). labels: int64 (N,). Returns int64 (N,).
    """
    p_max, l_max = probs.max(1)
    p_gt = probs.gather(1, labels[:, None])[:, 0]
    return torch.where(p_max - p_gt > margin, l_max, labels)


def relabel(probs: Tensor, alpha: Tensor, labels: Tensor, beta: float = 0.7, margin: float = 0.2) -> Tensor:
    """Eq. 5 for the low-importance group; a sample of the high group keeps its current label (Sec. 3.4).

    probs: (N, C), softmax outputs. alpha: (N,). labels: int64 (N,), the current labels. Returns int64 (N,); the labels
    unchanged for fewer than two samples.
    """
    if len(alpha) < 2:
        return labels.clone()
    return torch.where(low_group(alpha, beta), relabel_all(probs, labels, margin), labels)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class SCN(nn.Module):
    """A backbone, a classifier and the self-attention of Eq. 1, alpha = sigmoid(W_a x + b); b: official code."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int, margin: float):
        super().__init__()
        self.backbone = backbone
        self.head = Head(width, num_classes)
        self.attention = Head(width, 1)  # in float32: bf16 would rank many alphas equal
        self.margin = nn.Parameter(torch.tensor(margin))  # delta_1; trained with --learn-margin only

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) -> logits (N, C) and alpha (N,), both float32."""
        features = self.backbone(x).float()
        return self.head(features), self.attention(features).sigmoid()[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def make_network(args, num_classes: int, inputs: Tensor | None = None) -> SCN:
    """inputs: see make_backbone."""
    torch.manual_seed(common.seed_of("network", 1, args.seed))
    network = SCN(*common.make_backbone(args, inputs), num_classes, args.margin1)
    network.margin.requires_grad_(args.learn_margin)
    return network


def make_optimizer(network, args):
    """SGD by the paper's schedule, or Adam as in cocuring.py; a learned margin has the heads' learning rate."""
    groups = parameter_groups([network], args)
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=True)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    steps = [max(1, round(args.epochs * part / 8)) for part in (3, 6)]  # Sec. 3.5: after 15 and 30 of 40 epochs
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.1)


def train_one_epoch(network, optimizer, batches, current: Tensor, epoch: int, args) -> tuple[dict[str, float], Tensor]:
    """One epoch of Sec. 3; corrects `current`, int64 (N,), in place.

    batches: (x, index), see README.md. Returns the scalars of the epoch, and alpha of every sample (N,), -1 where it
    was not drawn.
    """
    network.train()
    device, means = current.device, common.Means()
    weights = torch.full((len(current),), -1.0, device=device)
    for x, index in batches:
        x, index = x.to(device), index.to(device, non_blocking=True)
        y = current[index]
        with common.autocast(device, args.precision):
            logits, alpha = network(x)  # Eq. 1
        weighted = alpha[:, None] * logits if args.weights else logits
        wce = logit_weighted_cross_entropy(logits, alpha if args.weights else torch.ones_like(alpha), y)  # Eq. 2
        rr = rank_regularization(alpha, args.beta, network.margin if args.learn_margin else args.margin1)  # Eqs. 3-4
        loss = args.gamma * rr + (1 - args.gamma) * wce if args.rank else wce  # L_all, Sec. 3.3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        probs, alpha = weighted.detach().softmax(1), alpha.detach()
        low = low_group(alpha, args.beta)
        if args.relabel and epoch > args.warm_up:
            everywhere = args.relabel_batch or not (args.weights or args.rank)  # without either there are no groups
            if everywhere:
                new = relabel_all(probs, y, args.margin2)
            else:
                new = relabel(probs, alpha, y, args.beta, args.margin2)  # Eq. 5
            means.add("relabel", this_epoch=common.assign(current, index, new, None if everywhere else low))
        common.assign(weights, index, alpha)
        means.add("loss", total=loss, wce=wce, rank=rr)
        if len(alpha) > 1:  # one sample is no two groups
            means.add("weight", high=(alpha * ~low).sum() / (~low).sum(), low=(alpha * low).sum() / low.sum())
        means.add("accuracy", train=probs.argmax(1) == y)
    scalars = {"relabel/this_epoch": 0, "weight/margin1": network.margin.item()} | means.result()
    if "weight/high" in scalars:
        scalars["weight/gap"] = scalars["weight/high"] - scalars["weight/low"]
    return scalars, weights


@torch.no_grad()
def predict(network, inputs, args) -> tuple[Tensor, Tensor]:
    """Softmax of the unweighted logits, (N, C), and alpha, (N,), in evaluation mode. inputs: batches of x."""
    network.eval()
    probs, weights = [], []
    for x in inputs:
        with common.autocast(x.device, args.precision):
            logits, alpha = network(x)
        probs.append(logits.softmax(1))
        weights.append(alpha)
    return torch.cat(probs), torch.cat(weights)


def restore(states: list[dict], args, num_classes: int, device):
    """The trained network as a function of images, see support/inference.py."""
    network = to_device(make_network(args, num_classes), device, args)
    (state,) = states
    network.load_state_dict(state)
    return lambda images: (predict(network, common.Images(images, args.size, device), args)[0].cpu(), None)


@reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.evaluate or args.predict:
        return use_checkpoint(args, restore)
    with Run(args) as run:
        device = common.find_device(args.device)
        train, test = load_data(args)
        images, test_images = (common.Images(split.images, args.size, device) for split in (train, test))
        view = partial(augment, crop=args.crop, jitter=args.jitter)
        loader = common.Loader(images, args.batch_size, args.seed, view)
        given = train.labels.to(device)
        current = given.clone()
        network = to_device(make_network(args, len(train.classes), spread_inputs(images)), device, args)
        optimizer, scheduler = make_optimizer(network, args)

        for epoch in run.epochs(train, test, network=network, optimizer=optimizer, scheduler=scheduler, labels=current):
            batches = loader.epoch(epoch, balance=given if args.oversample else None)
            scalars = {"lr": scheduler.get_last_lr()[0]}
            more, weights = train_one_epoch(network, optimizer, batches, current, epoch, args)
            scheduler.step()
            weights, drawn = weights.cpu(), weights.cpu() >= 0
            if train.clean is not None:  # does the weight tell wrong labels from correct ones at all?
                correct = train.labels == train.clean
                scalars["weight/auroc_clean"] = auroc(weights[drawn], correct[drawn])
            run.writer.add_histogram("weight", weights[drawn], epoch)
            run.end_epoch(epoch, scalars | more, predict(network, test_images, args)[0], current)
        probs, weights = predict(network, images, args)
        run.finish(probs, [network], current, weights=lambda: figures.weights(train, current.cpu(), weights.cpu()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
