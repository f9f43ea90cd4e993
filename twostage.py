"""Two-stage cycle: detect noisy labels, then train semi-supervised: with the kept labels, without labels on the rest.

M. Zhu, H. Ding, L. Yi: "Modeling Noisy labels for Facial Expression Recognition" plan this cycle and leave its parts to
the papers that they cite. Here: DivideMix's mixtures of two Gaussians over the losses divide the training set (stage
1); FixMatch's weak and strong views with Ada-CM's margin per class train on both parts (stage 2); CReST's
class-rebalanced rates admit the pseudo-labels of rare classes first. A cycle is an epoch.

    python twostage.py --data toy --noise 0.4                           # needs no data
    python twostage.py --data toy --noise 0.4 --no-detect --no-semi     # the baseline: all labels, nothing else
    python twostage.py --data affectnet --root data/affectnet --pretrained resnet18_msceleb.pth

Measured (docs/twostage.md): toy, 60 % noise, 3 seeds, CPU: last5 97.6 +- 0.8 % against 95.5 +- 1.1 % without detection
and 76.1 +- 13.2 % for one plain network. FERPlus, 10,000 images, 40 %, --pretrained dlib, 3 seeds: 79.3 +- 0.2 against
78.3 +- 0.5 and 72.1 +- 0.8 %.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial

from support import figures
from support.augmentation import augment, rand_augment
from support.datasets import load_data
from support.distributed import reports_errors
from support.inference import use_checkpoint
from support.metrics import auroc
from support.networks import Averaged, Classifier, parameter_groups, spread_inputs, to_device
from support.runs import Parser, Run, add_data_args, add_training_args, number, parse_with_presets

import torch
import torch.nn.functional as F
from torch import Tensor

import common

# Used where no flag says otherwise: "scratch" or "pretrained", then "<that> <data set>" on top of it, then the same
# with "pretrained <backbone>" for weights that have a backbone of their own. All ours: the plan has no setting;
# learning rates and augmentation are those of ncctfer.py (docs/twostage.md).
ADAM = dict(lr=1e-3, head_lr=1e-3, decay=0.95)
PRESETS = {
    "scratch": ADAM | dict(size=100, epochs=30, batch_size=128, warm_up=15, ema=0.99),
    "scratch ferplus": dict(size=48),
    "scratch toy": dict(size=48, epochs=13, batch_size=64, warm_up=3, ema=0.98),
    "pretrained": dict(size=224, epochs=40, batch_size=128, lr=1e-4, head_lr=1e-3, decay=1.0, warm_up=4, ema=0.999),
    "pretrained toy": dict(size=48, epochs=13, batch_size=64, warm_up=3, ema=0.98),
    "pretrained dlib": dict(epochs=12, batch_size=128, lr=1e-4, head_lr=1e-3, decay=0.95, warm_up=3, ema=0.99),
}


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_data_args(parser)
    add_training_args(parser)
    add = parser.add_argument_group("two-stage cycle").add_argument
    add("--warm-up", type=number(int, 0), help="first epochs on all labels, before the first cycle (DivideMix: 10, 30 "
        "for 100 classes; ours)")
    add("--detect-by", choices=("mae", "ce"), default="mae", help="loss that the mixture of two Gaussians is fitted "
        "to: 1 - p (ours: bounded, no outliers), or the cross-entropy -log p (DivideMix)")
    add("--mixture", choices=("global", "class"), default="global", help="one mixture for all classes (DivideMix), or "
        "one for each (ours; fails on FERPlus)")
    add("--floor", choices=("mean", "one"), default="mean", help="of each class are kept at least the labels whose "
        "loss is at most the class mean (ours: else rare classes are dropped before they are learned), or one label")
    add("--clean-above", type=number(float, 0, 1, open_high=True), default=0.5, help="clean probability above which a "
        "label is kept (DivideMix)")
    add("--margin-scale", type=number(float, 0, 1), default=0.97, help="of the confidence margins, times "
        "1 / (1 + e^-cycle) (Ada-CM)")
    add("--rebalance", choices=("rates", "logits", "none"), default="rates", help="long tail: admission rates per "
        "class (CReST), or the log of each class's share added to the logits of the labelled loss, or nothing")
    add("--alpha", type=number(float, 0), default=1 / 3, help="exponent of the admission rates (CReST: 1/3)")
    add("--pseudo-weight", type=number(float, 0), default=1.0, help="weight of the cross-entropy on pseudo-labels "
        "(Ada-CM)")
    add("--consistency-weight", type=number(float, 0), default=0.1, help="weight of the consistency of unconfident "
        "samples (Ada-CM, for another such loss)")
    add("--ema", type=number(float, 0, 1, open_high=True), help="decay of the averaged network, a step (Ada-CM: 0.999; "
        "ours from scratch: over about an epoch)")
    add("--no-detect", dest="detect", action="store_false", help="ablation: every label is kept")
    add("--no-semi", dest="semi", action="store_false", help="ablation: the kept labels alone, no loss on the others")
    add("--decay", type=number(float, 0, 1, open_low=True), help="factor on the learning rates after each epoch (ours: "
        "as ncctfer.py)")
    add("--crop", type=number(int, 0), default=4, help="weak view: pad by so many pixels and crop (FixMatch shifts by "
        "an eighth; ours: as ncctfer.py)")
    add("--operations", type=number(int, 0), default=2, help="strong view: operations of RandAugment (FixMatch)")
    add("--magnitude", type=number(int, 0, 30), default=10, help="strong view: magnitude of RandAugment, of 30 "
        "(FixMatch draws it; ours: as ncctfer.py)")
    args = parse_with_presets(parser, PRESETS, argv)
    if args.rebalance == "logits" and args.oversample:
        parser.error("--rebalance logits makes up for the frequencies of the classes, --oversample makes them equal: "
                     "give one of them (AffectNet: --no-oversample)")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Losses and rules
# ----------------------------------------------------------------------------------------------------------------------


def fit_mixture(losses: Tensor, iterations: int = 100, floor: float = 5e-4) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture of two Gaussians by expectation-maximisation: weights, means, variances, (2,) each, lower mean first.

    losses: float64 (N,) in [0, 1], not all equal. floor: added to the variances (DivideMix: 5e-4). Starts with the
    lower and the upper half around the middle of the range.
    """
    upper = (losses > (losses.min() + losses.max()) / 2).to(losses.dtype)
    r = torch.stack([1 - upper, upper])  # (2, N), responsibilities
    for _ in range(iterations):
        n = r.sum(1).clamp(min=1e-12)
        weights, means = n / len(losses), r @ losses / n
        variances = (r * (losses - means[:, None]).square()).sum(1) / n + floor
        before, r = r, mixture_posterior(losses, weights, means, variances)
        if (r - before).abs().max() < 1e-6:
            break
    order = means.argsort()
    return weights[order], means[order], variances[order]


def mixture_posterior(losses: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """(2, N): probability of each component given the losses (N,)."""
    weights, means, variances = weights[:, None], means[:, None], variances[:, None]
    return (weights.log() - variances.log() / 2 - (losses - means).square() / (2 * variances)).softmax(0)


def clean_probability(losses: Tensor, labels: Tensor | None = None) -> Tensor:
    """DivideMix, Sec. 3.1: posterior of the low-loss Gaussian of a two-component mixture fitted to the losses.

    losses: (N,), scaled to [0, 1] before fitting. labels: int64 (N,); where given a mixture for each class. Returns
    (N,); ones where all losses are equal or where there are fewer than two.
    """
    if labels is not None:
        result = torch.ones_like(losses)
        for c in labels.unique():
            result[labels == c] = clean_probability(losses[labels == c])
        return result
    if len(losses) < 2 or losses.max() == losses.min():
        return torch.ones_like(losses)
    scaled = losses.double()
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    return mixture_posterior(scaled, *fit_mixture(scaled))[0].to(losses.dtype)


def detection_losses(probs: Tensor, labels: Tensor, kind: str = "mae") -> Tensor:
    """What the mixtures are fitted to, (N,): "ce", the cross-entropy -log p_y (DivideMix), or "mae", 1 - p_y (ours).

    1 - p_y is half of the mean absolute error |p - e_y|_1. Cross-entropy has no upper bound: a confident network gives
    wrong labels losses from 2 to 18, and two Gaussians then split the wrong labels, not the correct from the wrong.

    probs: (N, C), softmax outputs. labels: int64 (N,).
    """
    p = probs.gather(1, labels[:, None])[:, 0]
    return -p.clamp(min=1e-8).log() if kind == "ce" else 1 - p


def labelled_set(
    probability: Tensor, losses: Tensor, labels: Tensor, above: float = 0.5, floor: str = "mean"
) -> Tensor:
    """bool (N,): the samples that keep their label: a clean probability above `above`; and what the floor adds.

    floor: "mean", of each class also the samples whose loss is at most the mean of the class (ours: one mixture for all
    classes drops a class that the network has not learned yet, and it is then never learned); "one", of a class
    without any the sample of least loss. probability, losses: (N,). labels: int64 (N,).
    """
    kept = probability > above
    for c in labels.unique():
        of_class = labels == c
        if floor == "mean":
            kept |= of_class & (losses <= losses[of_class].mean())
        if not (kept & of_class).any():
            kept[torch.where(of_class, losses, torch.inf).argmin()] = True
    return kept


def class_margins(probs: Tensor, labels: Tensor, num_classes: int, scale: float) -> Tensor:
    """Ada-CM, adaptive confidence margin of each class, (C,): scale times the mean top probability of its samples.

    The mean is over the correctly classified labelled samples. probs: (N, C), softmax outputs. labels: int64 (N,). At
    least 0.8, and 0.8 for a class without any such sample.
    """
    top, predicted = probs.max(1)
    correct = predicted == labels
    count = torch.bincount(labels[correct], minlength=num_classes)
    total = torch.zeros(num_classes, dtype=torch.float64, device=probs.device)
    total.index_add_(0, labels[correct], top[correct].double())
    return (scale * total / count.clamp(min=1)).clamp(min=0.8).to(probs.dtype)


def rebalanced_rates(class_counts: Tensor, alpha: float = 1 / 3) -> Tensor:
    """CReST, class-rebalanced sampling: (C,), share of the pseudo-labels of each class to admit, in [0, 1].

    mu_l = (N_{L+1-l} / N_1)^alpha. class_counts: (C,) of the labelled set; the L classes that have labels are ordered
    by count, N_1 the largest: the rarest class gets 1. A class without labels gets 1 too, and shifts no other.
    """
    order = class_counts.argsort(descending=True, stable=True)[: int((class_counts > 0).sum())]
    ranked = class_counts[order].double()  # N_1, ..., N_L
    rates = torch.ones(len(class_counts), dtype=torch.float64, device=class_counts.device)
    rates[order] = (ranked.flip(0) / ranked[:1]) ** alpha
    return rates.float()


def admitted_set(probs: Tensor, rates: Tensor) -> Tensor:
    """CReST: bool (N,), of each predicted class the most confident share, rounded up.

    probs: (N, C), of the unlabelled samples. rates: (C,) in [0, 1].
    """
    top, predicted = probs.max(1)
    admitted = torch.zeros(len(probs), dtype=torch.bool, device=probs.device)
    for c, rate in enumerate(rates.tolist()):
        members = (predicted == c).nonzero()[:, 0]
        count = min(len(members), math.ceil(rate * len(members) - 1e-4))
        admitted[members[top[members].argsort(descending=True, stable=True)[:count]]] = True
    return admitted


def labelled_loss(logits: Tensor, labels: Tensor, labelled: Tensor, log_shares: Tensor | None = None) -> Tensor:
    """FixMatch's supervised loss: cross-entropy, sum over the labelled samples divided by the batch size N (ours).

    logits: (N, C). labels: int64 (N,). labelled: bool (N,). log_shares: (C,), added to the logits (logit adjustment).
    """
    logits = logits if log_shares is None else logits + log_shares
    return (F.cross_entropy(logits, labels, reduction="none") * labelled).sum() / len(labels)


def unlabelled_losses(
    weak_logits: Tensor, strong_logits: Tensor, margins: Tensor, admitted: Tensor, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2 without labels (FixMatch with Ada-CM's margins): pseudo-labels where confident, consistency elsewhere.

    l_u = 1/N sum over confident and admitted samples of - log p_s[argmax p_w]; l_c = 1/N sum over the others of
    |p_s - p_w|^2.

    weak_logits, strong_logits: (U, C), of the unlabelled samples; the weak view is a target without gradient. margins:
    (C,), of the pseudo-label's class. admitted: bool (U,). batch: the batch size N that both sums are divided by.
    Returns l_u, l_c and bool (U,): what has a pseudo-label.
    """
    p_w = weak_logits.detach().softmax(1)
    top, pseudo = p_w.max(1)
    sure = (top > margins[pseudo]) & admitted
    l_u = (F.cross_entropy(strong_logits, pseudo, reduction="none") * sure).sum() / batch
    l_c = ((strong_logits.softmax(1) - p_w).square().sum(1) * ~sure).sum() / batch
    return l_u, l_c, sure


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def make_network(args, num_classes: int, inputs: Tensor | None = None) -> Classifier:
    """inputs: see make_backbone."""
    torch.manual_seed(common.seed_of("network", 1, args.seed))
    return Classifier(*common.make_backbone(args, inputs), num_classes)


def make_optimizer(network, args):
    """Adam, learning rates times --decay after each epoch."""
    optimizer = torch.optim.Adam(parameter_groups([network], args), fused=True)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, args.decay)


@dataclass
class Division:
    """Stage 1: what a cycle trains on. N training samples, C classes."""

    losses: Tensor  # (N,), of the given labels, see `detection_losses`
    clean: Tensor  # (N,), clean probability w of DivideMix
    labelled: Tensor  # bool (N,), the samples whose label is kept
    admitted: Tensor  # bool (N,), the others whose pseudo-label may be used
    margins: Tensor  # (C,), confidence that a pseudo-label needs
    rates: Tensor  # (C,), admission rates of pseudo-labels
    log_shares: Tensor | None  # (C,), logit adjustment


def divide(probs: Tensor, given: Tensor, cycle: int, args) -> Division:
    """Stage 1 of a cycle, from predictions on the training set.

    probs: (N, C), of unaugmented images in evaluation mode; one-hot of the given labels: all labels are kept. given:
    int64 (N,). cycle: 1 is the first one after the warm-up.
    """
    classes = probs.shape[1]
    losses = detection_losses(probs, given, args.detect_by)
    clean = clean_probability(losses, given if args.mixture == "class" else None)
    labelled = labelled_set(clean, losses, given, args.clean_above, args.floor)
    scale = args.margin_scale / (1 + math.exp(-max(cycle, 0)))  # Ada-CM: grows with the cycles
    margins = class_margins(probs[labelled], given[labelled], classes, scale)
    counts = torch.bincount(given[labelled], minlength=classes)
    rates = rebalanced_rates(counts, args.alpha) if args.rebalance == "rates" else torch.ones_like(margins)
    log_shares = (counts.clamp(min=1) / counts.sum()).log() if args.rebalance == "logits" and cycle >= 1 else None
    admitted = torch.zeros_like(labelled)
    admitted[~labelled] = admitted_set(probs[~labelled], rates)
    return Division(losses, clean, labelled, admitted, margins, rates, log_shares)


def division_scalars(division: Division, given: Tensor, clean: Tensor | None) -> dict:
    """What a division is like; where the clean labels are known, how it agrees with them. Lists: a number per class."""
    scalars = {"labelled/share": division.labelled.float().mean().item()}
    scalars |= {"weight/margin": division.margins.tolist(), "weight/rate": division.rates.tolist()}
    if clean is not None:
        correct = given == clean
        members = [correct & (given == c) for c in range(len(division.rates))]
        recalls = [division.labelled[rows].float().mean().item() if rows.any() else None for rows in members]
        scalars["labelled/purity"] = correct[division.labelled].float().mean().item()
        scalars["labelled/recall"] = division.labelled[correct].float().mean().item()
        scalars |= {"labelled/auroc": auroc(division.clean, correct), "labelled/class_recall": recalls}
    return scalars


def train_one_epoch(
    network, averaged, optimizer, batches, given: Tensor, division: Division, clean: Tensor | None, epoch: int, args
) -> dict[str, float]:
    """Stage 2 over the training set. Returns the scalars of the epoch.

    averaged: the moving average of the network, updated each step. batches: ((weak, strong), index), see README.md;
    strong may be None in the warm-up. given: int64 (N,), the labels to train on. clean: int64 (N,) or None, for
    reporting only.
    """
    network.train()
    device, means = given.device, common.Means()
    semi = args.semi and args.detect and epoch > args.warm_up  # else no sample is without label
    kept = division.labelled.cpu()  # the number of samples without label is known here: no step asks the device
    for (weak, strong), place in batches:
        weak, index = weak.to(device), place.to(device, non_blocking=True)
        y = given[index]
        if semi:  # both views in one pass: batch statistics of all, however few have no label
            rest = (~kept[place.cpu()]).nonzero()[:, 0].to(device, non_blocking=True)
            views = torch.cat([weak, strong.to(device)[rest]])
        with common.autocast(device, args.precision):
            logits, strong_logits = network(views if semi else weak).tensor_split([len(y)])
        l_x = labelled_loss(logits, y, division.labelled[index], division.log_shares)
        l_u = l_c = torch.zeros_like(l_x)
        if semi:
            admitted = division.admitted[index][rest]
            l_u, l_c, sure = unlabelled_losses(logits[rest], strong_logits, division.margins, admitted, len(y))
        loss = l_x + args.pseudo_weight * l_u + args.consistency_weight * l_c
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update(network)
        predicted = logits.argmax(1)
        means.add("loss", total=loss, labelled=l_x, pseudo=l_u, consistency=l_c)
        means.add("accuracy", train=predicted == y)
        if semi:
            means.add("pseudo", share=sure)
            if clean is not None:
                correct = (predicted == clean[index])[rest]
                means.add("pseudo", among=sure, accuracy_above=correct)
                means.add("pseudo", among=~sure, accuracy_below=correct)
    return means.result()


@torch.no_grad()
def predict(network, inputs, args) -> Tensor:
    """Softmax outputs (N, C) in evaluation mode. inputs: batches of x."""
    network.eval()
    probs = []
    for x in inputs:
        with common.autocast(x.device, args.precision):
            probs.append(network(x).softmax(1))
    return torch.cat(probs)


def restore(states: list[dict], args, num_classes: int, device):
    """The trained network as a function of images, see support/inference.py."""
    network = to_device(make_network(args, num_classes), device, args)
    (state,) = states
    network.load_state_dict(state)
    return lambda images: (predict(network, common.Images(images, args.size, device), args).cpu(), None)


@reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.evaluate or args.predict:
        return use_checkpoint(args, restore)
    with Run(args) as run:
        device = common.find_device(args.device)
        train, test = load_data(args)
        images, test_images = (common.Images(split.images, args.size, device) for split in (train, test))
        weak = partial(augment, crop=args.crop)
        strong = partial(rand_augment, layers=args.operations, magnitude=args.magnitude)
        loader = common.Loader(images, args.batch_size, args.seed, weak, strong)
        given, clean = (None if labels is None else labels.to(device) for labels in (train.labels, train.clean))
        network = to_device(make_network(args, len(train.classes), spread_inputs(images)), device, args)
        averaged = Averaged(network, args.ema)
        optimizer, scheduler = make_optimizer(network, args)

        parts = dict(network=network, averaged=averaged, optimizer=optimizer, scheduler=scheduler)
        for epoch in run.epochs(train, test, **parts):
            detecting = args.detect and epoch > args.warm_up
            if detecting:
                probs = predict(averaged.module, images, args)
            else:  # as if they agreed with the labels: all are kept
                probs = F.one_hot(given, len(train.classes)).float()
            division = divide(probs, given, epoch - args.warm_up, args)
            balance = torch.where(division.labelled, given, -1) if args.oversample else None
            batches = loader.epoch(epoch, balance, strong=args.semi and detecting)
            scalars = division_scalars(division, given, clean) | {"lr": scheduler.get_last_lr()[0]}
            scalars |= train_one_epoch(network, averaged, optimizer, batches, given, division, clean, epoch, args)
            scheduler.step()
            run.end_epoch(epoch, scalars, predict(averaged.module, test_images, args))
        probs = predict(averaged.module, images, args)
        losses = detection_losses(probs, given, args.detect_by)
        picture = partial(figures.mixtures, losses, train, fit_mixture, args.mixture == "class")
        run.finish(probs, [averaged.module], mixtures=picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
