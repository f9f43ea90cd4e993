"""Two-stage cycle: detect noisy labels by their loss, then train on the rest of the labels and, without labels, on the others.

M. Zhu, H. Ding, L. Yi: "Modeling Noisy labels for Facial Expression Recognition" plan this cycle and leave its parts to
the papers that they cite. Here: DivideMix's mixtures of two Gaussians over the losses divide the training set (stage 1);
FixMatch's weak and strong views with Ada-CM's margin per class train on both parts (stage 2); CReST's class-rebalanced
rates admit the pseudo-labels of rare classes first. A cycle is an epoch.

    python twostage.py --data toy --noise 0.4                           # needs no data
    python twostage.py --data toy --noise 0.4 --no-detect --no-semi     # the baseline: all labels, nothing else
    python twostage.py --data affectnet --root data/affectnet --pretrained resnet18_msceleb.pth

Measured (docs/twostage.md): toy, 60 % noise, 3 seeds, CPU: last5 98.0 +- 1.1 % against 95.5 +- 1.1 % without detection and
76.1 +- 13.2 % for one plain network. FERPlus, 10,000 images, 40 % noise, one seed: 71.8 against 69.3 and 68.5.
"""

import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import common

# Used where no flag says otherwise: "scratch" or "pretrained", then "<that> <data set>" on top of it. All ours: the plan
# has no setting; rates and augmentation are those of ncctfer.py (docs/twostage.md).
PRESETS = {
    "scratch": dict(size=100, epochs=30, batch_size=128, lr=1e-3, head_lr=1e-3, decay=0.95, warm_up=15, ema=0.99, mixture="class"),
    "scratch ferplus": dict(size=48, mixture="global"),
    "scratch toy": dict(size=48, epochs=13, batch_size=64, warm_up=3, ema=0.98),
    "pretrained": dict(size=224, epochs=40, batch_size=128, lr=1e-4, head_lr=1e-3, decay=1.0, warm_up=4, ema=0.999, mixture="class"),
    "pretrained toy": dict(size=48, epochs=13, batch_size=64, warm_up=3, ema=0.98),
}


def parse_args(argv=None):
    parser = common.Parser("twostage.py", description=__doc__.split("\n\n")[0])
    common.add_data_args(parser)
    common.add_training_args(parser)
    group = parser.add_argument_group("two-stage cycle")
    group.add_argument("--warm-up", type=common.number(int, 0), help="epochs of plain training on all labels before the first cycle (DivideMix: 10, 30 for 100 classes; ours)")
    group.add_argument("--detect-by", choices=("mae", "ce"), default="mae", help="loss that the mixtures are fitted to: mean absolute error 1 - p (ours: bounded, no outliers), or cross-entropy -log p (DivideMix)")
    group.add_argument("--mixture", choices=("class", "global"), help="mixtures per class (ours, toy: a global one takes rare classes for noise), or one for all (DivideMix; FERPlus)")
    group.add_argument("--clean-above", type=common.number(float, 0, 1, open_high=True), default=0.5, help="a label is kept if its clean probability exceeds this (DivideMix: %(default)s)")
    group.add_argument("--margin-scale", type=common.number(float, 0, 1), default=0.97, help="of the confidence margins, times 1 / (1 + e^-epoch) (Ada-CM: %(default)s)")
    group.add_argument("--rebalance", choices=("rates", "logits", "none"), default="rates", help="long tail: admission rates per class (CReST), logits of the labelled loss moved by the log of their class's share (logit adjustment), or nothing")
    group.add_argument("--alpha", type=common.number(float, 0), default=1 / 3, help="exponent of the admission rates (CReST: 1/3)")
    group.add_argument("--pseudo-weight", type=common.number(float, 0), default=1.0, help="weight of the cross-entropy on pseudo-labels (Ada-CM: 1)")
    group.add_argument("--consistency-weight", type=common.number(float, 0), default=0.1, help="weight of the consistency of unconfident samples (Ada-CM, for another such loss: %(default)s)")
    group.add_argument("--ema", type=common.number(float, 0, 1, open_high=True), help="decay of the averaged network, a step (Ada-CM: 0.999; ours from scratch: over about an epoch)")
    group.add_argument("--no-detect", dest="detect", action="store_false", help="ablation: every label is kept")
    group.add_argument("--no-semi", dest="semi", action="store_false", help="ablation: the kept labels alone, no loss on the others")
    group.add_argument("--decay", type=common.number(float, 0, 1, open_low=True), help="factor on the learning rates after each epoch (ours: as ncctfer.py)")
    group.add_argument("--crop", type=common.number(int, 0), default=4, help="weak view: pad by so many pixels and crop (FixMatch shifts by an eighth; ours: as ncctfer.py)")
    group.add_argument("--operations", type=common.number(int, 0), default=2, help="strong view: operations of RandAugment (FixMatch: %(default)s)")
    group.add_argument("--magnitude", type=common.number(int, 0, 30), default=10, help="strong view: magnitude of RandAugment, of 30 (FixMatch draws it; ours: as ncctfer.py)")
    return common.parse_with_presets(parser, PRESETS, argv, "twostage")


# ----------------------------------------------------------------------------------------------------------------------
# Losses and rules
# ----------------------------------------------------------------------------------------------------------------------


def fit_mixture(losses: Tensor, iterations: int = 100, floor: float = 5e-4) -> tuple[Tensor, Tensor, Tensor]:
    """A mixture of two Gaussians by expectation-maximisation: weights, means, variances, (2,) each, the lower mean first.

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
    return (weights.log()[:, None] - variances.log()[:, None] / 2 - (losses - means[:, None]).square() / (2 * variances[:, None])).softmax(0)


def clean_probability(losses: Tensor, labels: Tensor | None = None) -> Tensor:
    """DivideMix, Sec. 3.1: posterior of the low-loss Gaussian of a two-component mixture fitted to the losses.

    losses: (N,), scaled to [0, 1] before fitting. labels: int64 (N,); where given a mixture for each class. Returns (N,);
    ones where all losses are equal or where there are fewer than two.
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

    1 - p_y is half of the mean absolute error |p - e_y|_1. Cross-entropy has no upper bound: a confident network gives wrong
    labels losses from 2 to 18, and two Gaussians then split the wrong labels in two rather than the right from the wrong.

    probs: (N, C), softmax outputs. labels: int64 (N,).
    """
    p = probs.gather(1, labels[:, None])[:, 0]
    return 1 - p if kind == "mae" else -p.clamp(min=1e-8).log()


def labelled_set(probability: Tensor, losses: Tensor, labels: Tensor, above: float = 0.5) -> Tensor:
    """bool (N,): samples whose clean probability exceeds `above`, and of a class that has none its sample of least loss.

    probability, losses: (N,). labels: int64 (N,).
    """
    kept = probability > above
    for c in labels.unique():
        of_class = labels == c
        if not (kept & of_class).any():
            kept[torch.where(of_class, losses, torch.inf).argmin()] = True
    return kept


def class_margins(probs: Tensor, labels: Tensor, num_classes: int, scale: float) -> Tensor:
    """Ada-CM, adaptive confidence margin: (C,), mean top probability of the rightly classified labelled samples of each class, times scale.

    probs: (N, C), softmax outputs. labels: int64 (N,). At least 0.8, and 0.8 for a class without any such sample.
    """
    top, predicted = probs.max(1)
    right = predicted == labels
    count = torch.bincount(labels[right], minlength=num_classes)
    total = torch.zeros(num_classes, dtype=torch.float64, device=probs.device).index_add_(0, labels[right], top[right].double())
    return (scale * total / count.clamp(min=1)).clamp(min=0.8).to(probs.dtype)


def rebalanced_rates(class_counts: Tensor, alpha: float = 1 / 3) -> Tensor:
    """CReST, class-rebalanced sampling: (C,), share of the pseudo-labels of each class to admit, mu_l = (N_{L+1-l} / N_1)^alpha.

    class_counts: (C,) of the labelled set; classes are ordered by count, N_1 the largest: the rarest class gets 1.
    """
    order = class_counts.argsort(descending=True, stable=True)
    ranked = class_counts[order].double()
    rates = torch.empty_like(ranked)
    rates[order] = (ranked.flip(0) / ranked[0].clamp(min=1)).clamp(max=1) ** alpha
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
    """Supervised loss of FixMatch: cross-entropy, sum over the labelled samples divided by the batch size N.

    logits: (N, C). labels: int64 (N,). labelled: bool (N,). log_shares: (C,), added to the logits (logit adjustment).
    """
    if log_shares is not None:
        logits = logits + log_shares
    return (F.cross_entropy(logits, labels, reduction="none") * labelled).sum() / len(labels)


def unlabelled_losses(weak_logits: Tensor, strong_logits: Tensor, margins: Tensor, admitted: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2 without labels (FixMatch with Ada-CM's margins): pseudo-labels where confident, consistency elsewhere.

    l_u = 1/N sum over confident and admitted samples of - log p_s[argmax p_w]; l_c = 1/N sum over the others of |p_s - p_w|^2.

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
# Model
# ----------------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone and a linear head."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C), float32."""
        features = self.backbone(x).float()
        with torch.autocast(x.device.type, enabled=False):
            return self.head(features)


def make_network(args, num_classes: int, device) -> Classifier:
    torch.manual_seed(common.seed_of("network", 1, args.seed))
    backbone, width = common.make_backbone(args)
    network = Classifier(backbone, width, num_classes).to(device, memory_format=torch.channels_last)
    if args.compile:
        network.compile()
    return network


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class Division:
    """Stage 1: what a cycle trains on. One for the warm-up: all labels are kept."""

    def __init__(self, probs: Tensor, given: Tensor, epoch: int, args):
        classes = probs.shape[1]
        self.losses = detection_losses(probs, given, args.detect_by)
        self.clean = torch.ones_like(self.losses)  # w of DivideMix, (N,)
        if args.detect and epoch > args.warm_up:
            self.clean = clean_probability(self.losses, given if args.mixture == "class" else None)
        self.labelled = labelled_set(self.clean, self.losses, given, args.clean_above)
        scale = args.margin_scale / (1 + math.exp(-epoch))  # Ada-CM: grows with the epochs
        self.margins = class_margins(probs[self.labelled], given[self.labelled], classes, scale)
        counts = torch.bincount(given[self.labelled], minlength=classes)
        self.rates = rebalanced_rates(counts, args.alpha).to(probs.device) if args.rebalance == "rates" else torch.ones(classes, device=probs.device)
        self.log_shares = (counts.clamp(min=1) / counts.sum()).log() if args.rebalance == "logits" else None
        self.admitted = torch.zeros_like(self.labelled)
        self.admitted[~self.labelled] = admitted_set(probs[~self.labelled], self.rates)

    def scalars(self, given: Tensor, clean: Tensor | None, names) -> dict:
        found = {"labelled/share": self.labelled.float().mean().item()}
        for name, margin, rate in zip(names, self.margins.tolist(), self.rates.tolist()):
            found |= {f"weight/margin/{name}": margin, f"weight/rate/{name}": rate}
        if clean is None:
            return found
        right = given == clean
        found |= {"labelled/purity": right[self.labelled].float().mean().item(), "labelled/recall": self.labelled[right].float().mean().item(),
                  "labelled/auc": common.area_under_curve(self.clean, right)}
        return found | {f"labelled/recall/{name}": self.labelled[right & (given == c)].float().mean().item() for c, name in enumerate(names) if (right & (given == c)).any()}


def train_one_epoch(network, averaged, optimizer, pixels, slices, plan, given, division, clean, epoch, args) -> tuple[Tensor, dict]:
    """One epoch over the training set (stage 2). Returns the losses (steps,) and the scalars.

    given: int64 (N,), the labels to train on. clean: int64 (N,) or None, for reporting only.
    """
    semi = args.semi and epoch > args.warm_up
    losses, hits, counts = [], [], []
    network.train()
    for part, index, images in tqdm(pixels.batches(plan.order, slices), f"epoch {epoch}", len(slices), leave=False, disable=None):
        weak = common.augment(images, plan, part, args.crop)
        y, labelled = given[index], division.labelled[index]
        views = [weak]
        if semi:  # both views in one pass: batch statistics of all, however few are unlabelled
            views.append(common.rand_augment(weak, plan, part, args.operations, args.magnitude)[~labelled])
        with common.autocast(weak.device, args.precision):
            logits, strong = network(common.network_input(torch.cat(views), args.size)).tensor_split([len(y)])
        l_x = labelled_loss(logits, y, labelled, division.log_shares)
        l_u = l_c = torch.zeros_like(l_x)
        if semi:
            l_u, l_c, sure = unlabelled_losses(logits[~labelled], strong, division.margins, division.admitted[index][~labelled], len(y))
        loss = l_x + args.pseudo_weight * l_u + args.consistency_weight * l_c
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(network)
        with torch.no_grad():
            losses.append(torch.stack([loss, l_x, l_u, l_c]))
            predicted = logits.argmax(1)
            hits.append((predicted == y).sum())
            if semi:
                right = (predicted == clean[index])[~labelled] if clean is not None else torch.zeros_like(sure)
                counts.append(torch.stack([sure.sum(), (sure & right).sum(), (~sure).sum(), (~sure & right).sum()]))
    losses, count = torch.stack(losses).cpu(), len(plan.order)
    total, l_x, l_u, l_c = losses.mean(0).tolist()
    scalars = {"loss/total": total, "loss/labelled": l_x, "loss/pseudo": l_u, "loss/consistency": l_c, "accuracy/train": torch.stack(hits).sum().item() / count}
    if counts:
        above, above_right, below, below_right = torch.stack(counts).sum(0).tolist()
        scalars["pseudo/share"] = above / max(above + below, 1)  # of the unlabelled samples
        if clean is not None:
            scalars |= {"pseudo/accuracy_above": above_right / max(above, 1), "pseudo/accuracy_below": below_right / max(below, 1)}
    return losses[:, 0], scalars


@torch.no_grad()
def predict(network, pixels, args) -> Tensor:
    """Softmax outputs (N, C) on unaugmented images in evaluation mode."""
    network.eval()
    probs = []
    for x in pixels.inputs(args.size):
        with common.autocast(x.device, args.precision):
            probs.append(network(x).softmax(1))
    return torch.cat(probs)


def evaluate(network, pixels, labels: Tensor, classes, args) -> tuple[dict, list[list[int]]]:
    """The scalars of the evaluated split and its confusion matrix."""
    probs = predict(network, pixels, args)
    return common.accuracy_scalars(probs, labels, classes), common.confusion(probs.argmax(1), labels, len(classes))


def restore(states: list[dict], args, num_classes: int, device):
    """The trained network as a function of images, see common.restore."""
    network = make_network(args, num_classes, device)
    network.load_state_dict(states[0])
    return lambda images: (predict(network, common.Pixels(images, device), args), None)


def figure_of_mixtures(division: Division, given: Tensor, clean: Tensor | None, classes, mixture: str):
    """The losses of each class (where known: of right and wrong labels apart) with the two Gaussians fitted to them; of one mixture for all in a panel of its own."""
    from matplotlib.figure import Figure

    groups = {name: given == c for c, name in enumerate(classes)}
    if mixture == "global":
        groups = {"all classes": torch.ones_like(division.labelled)} | groups
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure((3.2 * columns, 2.4 * rows), layout="constrained")
    for k, (name, members) in enumerate(groups.items()):
        axes, losses = figure.add_subplot(rows, columns, k + 1), division.losses[members].double().cpu()
        axes.set_title(name, fontsize=9)
        if len(losses) < 2 or losses.max() == losses.min():
            continue
        low, span = losses.min(), losses.max() - losses.min()
        parts = {"all labels": losses}
        if clean is not None:
            right = (given == clean)[members].cpu()
            parts = {"right": losses[right], "wrong": losses[~right]}
        axes.hist([part.numpy() for part in parts.values()], 40, stacked=True, density=True, color=["tab:blue", "tab:red"][: len(parts)], label=list(parts))
        if mixture == "class" or k == 0:
            x = torch.linspace(0, 1, 300, dtype=torch.float64)
            for weight, mean, variance in zip(*fit_mixture((losses - low) / span)):
                axes.plot(low + span * x, weight * torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).exp() / span, color="black", linewidth=1)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle("Loss of the averaged network on the given labels, and the mixture of two Gaussians", fontsize=10)
    return figure


@common.reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, "twostage")
    device = common.find_device(args.device)
    with common.Run(args, "twostage") as run:
        print(f"{run.folder} on {device}; preset {args.preset} (flags win)")
        train, test = common.load_data(args)
        slices = common.batch_slices(len(train.labels), args.batch_size)
        pixels, test_pixels = common.Pixels(train.images, device), common.Pixels(test.images, device)
        given, test_labels = train.labels.to(device), test.labels.to(device)
        clean = None if train.clean is None else train.clean.to(device)

        network = make_network(args, len(train.classes), device)
        averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        groups = [dict(params=list(network.backbone.parameters()), lr=args.lr), dict(params=list(network.head.parameters()), lr=args.head_lr)]
        optimizer = torch.optim.Adam(groups, fused=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, args.decay)

        first = 1
        if state := run.start():
            network.load_state_dict(state["network"])
            averaged.load_state_dict(state["averaged"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            first = state["epoch"] + 1

        for epoch in range(first, args.epochs + 1):
            began, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
            plan = common.EpochPlan(len(given), args.seed, epoch, device, given if args.oversample else None)
            division = Division(predict(averaged.module, pixels, args), given, epoch, args)
            losses, scalars = train_one_epoch(network, averaged, optimizer, pixels, slices, plan, given, division, clean, epoch, args)
            run.check_finite(losses, epoch)
            scheduler.step()
            scalars |= {"lr": lr} | division.scalars(given, clean, train.classes) | evaluate(averaged.module, test_pixels, test_labels, test.classes, args)[0]
            run.log(epoch, time.perf_counter() - began, scalars)
            run.save(epoch=epoch, network=network.state_dict(), averaged=averaged.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict())

        probs = predict(averaged.module, pixels, args)
        table = evaluate(averaged.module, test_pixels, test_labels, test.classes, args)[1]
        figures = {"mixtures": figure_of_mixtures(Division(probs, given, args.epochs + 1, args), given, clean, train.classes, args.mixture)}
        run.finish(train, given, common.audit_scores(probs, given), table, [averaged.module.state_dict()], figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
