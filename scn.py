"""Self-Cure Network (SCN): a weight for each face, ranked, and new labels for the faces that weigh little.

K. Wang, X. Peng, J. Yang, S. Lu, Y. Qiao: "Suppressing Uncertainties for Large-Scale Facial Expression Recognition",
CVPR 2020. An attention layer gives each image an importance alpha in (0, 1) that scales its logits; a rank loss keeps the
mean of the high group above that of the low group by a margin; from the tenth epoch on, a label of the low group is
replaced where another class is more probable by a margin.

    python scn.py --data toy --noise 0.4                                       # needs no data
    python scn.py --data toy --noise 0.4 --no-weights --no-rank --no-relabel   # the baseline of Table 5
    python scn.py --data raf --root data/raf --noise 0.2 --pretrained resnet18_msceleb.pth

Measured (docs/scn.md): toy, 40 % noise, 3 seeds, CPU: last5 95.6 +- 0.7 %, relabelling the whole batch
99.7 +- 0.2 %, without the three parts 80.0 +- 3.3 %, one plain network 85.0 +- 4.6 %.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common

# Used where no flag says otherwise: "scratch" or "pretrained", then "<that> <data set>" on top of it.
# "pretrained" is the paper's, Sec. 3.5, with the rate scaled to the batch (0.1 for 1024); the others are ours, chosen
# on the validation splits of toy and FERPlus (docs/scn.md).
PRESETS = {
    "scratch": dict(size=100, epochs=30, batch_size=128, optimizer="adam", lr=1e-3, head_lr=1e-3, relabel_from=20, crop=8),
    "scratch ferplus": dict(size=48, crop=4),
    "scratch toy": dict(size=48, epochs=13, batch_size=64, relabel_from=4, crop=0),
    "pretrained": dict(size=224, epochs=40, batch_size=128, optimizer="sgd", lr=0.0125, head_lr=0.0125, relabel_from=10),
    "pretrained toy": dict(size=48, epochs=13, batch_size=64, relabel_from=6),
}


def parse_args(argv=None):
    parser = common.Parser("scn.py", description=__doc__.split("\n\n")[0])
    common.add_data_args(parser)
    common.add_training_args(parser)
    group = parser.add_argument_group("SCN")
    group.add_argument("--beta", type=common.number(float, 0, 1, open_low=True, open_high=True), default=0.7, help="share of the high-importance group (paper, Sec. 3.5: %(default)s)")
    group.add_argument("--margin1", type=common.number(float, 0, 1), default=0.15, help="delta_1, margin between the groups' means, Eq. 3 (paper, Sec. 3.5: %(default)s)")
    group.add_argument("--margin2", type=common.number(float, 0, 1), default=0.2, help="delta_2, margin of relabelling, Eq. 5 (paper, Sec. 3.5: %(default)s)")
    group.add_argument("--learn-margin", action="store_true", help="learn delta_1, from --margin1 on (paper, Fig. 5 left; default: fixed)")
    group.add_argument("--gamma", type=common.number(float, 0, 1), default=0.5, help="weight of the rank loss (paper, Sec. 3.5: 1:1, Table 6: %(default)s)")
    group.add_argument("--relabel-from", type=common.number(int, 1), help="first epoch that relabels (paper, Sec. 3.5: 10; ours from scratch: once the network is mostly right)")
    group.add_argument("--no-weights", dest="weights", action="store_false", help="Table 5: logits are not weighted")
    group.add_argument("--no-rank", dest="rank", action="store_false", help="Table 5: no rank loss")
    group.add_argument("--no-relabel", dest="relabel", action="store_false", help="Table 5: no relabelling")
    group.add_argument("--relabel-batch", action="store_true", help="relabel in the whole batch (official code; paper: in the low group only)")
    group.add_argument("--optimizer", choices=("sgd", "adam"), help="sgd: momentum 0.9, rate / 10 after 3/8 and 6/8 of the epochs (paper: 15 and 30 of 40); adam: rate * 0.95 an epoch (ours)")
    group.add_argument("--weight-decay", type=common.number(float, 0), default=1e-4, help="of sgd (official code: %(default)s)")
    group.add_argument("--jitter", type=common.number(float, 0, 1), default=0.2, help="colour jitter: brightness, contrast, saturation within 1 +- this (ours: as cocuring.py; paper: not named)")
    group.add_argument("--crop", type=common.number(int, 0), default=0, help="pad by so many pixels and crop (paper: none; ours from scratch on real faces: as cocuring.py)")
    return common.parse_with_presets(parser, PRESETS, argv, "scn")


# ----------------------------------------------------------------------------------------------------------------------
# Losses and rules
# ----------------------------------------------------------------------------------------------------------------------


def logit_weighted_cross_entropy(logits: Tensor, alpha: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2: cross-entropy of the logits times the importance of their sample, mean over the batch.

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
    place = alpha.argsort(descending=True, stable=True).argsort()  # (N,): 0 for the largest alpha
    return torch.where(place >= high_count(len(alpha), beta), relabel_all(probs, labels, margin), labels)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class SCN(nn.Module):
    """A backbone, a classifier and the self-attention of Eq. 1, alpha = sigmoid(W_a x)."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int, margin: float):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, num_classes)
        self.attention = nn.Linear(width, 1)
        self.margin = nn.Parameter(torch.tensor(margin))  # delta_1; trained with --learn-margin only

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) -> logits (N, C) and alpha (N,), both float32."""
        features = self.backbone(x).float()
        with torch.autocast(x.device.type, enabled=False):  # bf16 would rank many alphas equal
            return self.head(features), self.attention(features).sigmoid()[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def make_network(args, num_classes: int, device) -> SCN:
    torch.manual_seed(common.seed_of("network", 1, args.seed))
    backbone, width = common.make_backbone(args)
    network = SCN(backbone, width, num_classes, args.margin1).to(device, memory_format=torch.channels_last)
    if args.compile:
        network.compile()
    return network


def make_optimizer(network, args):
    """SGD by the paper's schedule, or Adam as in cocuring.py; a learned margin moves at the rate of the heads."""
    heads = [*network.head.parameters(), *network.attention.parameters()] + [network.margin] * args.learn_margin
    groups = [dict(params=list(network.backbone.parameters()), lr=args.lr), dict(params=heads, lr=args.head_lr)]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, fused=True)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    steps = [round(args.epochs * 3 / 8), round(args.epochs * 6 / 8)]  # Sec. 3.5: after 15 and 30 of 40 epochs
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.1)


def train_one_epoch(network, optimizer, pixels, slices, plan, current, epoch, args) -> tuple[Tensor, Tensor, dict]:
    """One epoch over the training set; corrects `current`, int64 (N,), in place.

    Returns the losses (steps,), alpha of every sample (N,), -1 where oversampling did not draw it, and the scalars.
    """
    relabelling = args.relabel and epoch >= args.relabel_from
    margin = network.margin if args.learn_margin else args.margin1
    losses, hits, groups, relabelled = [], [], [], []
    weights = torch.full((len(current),), -1.0, device=current.device)
    network.train()
    for part, index, images in tqdm(pixels.batches(plan.order, slices), f"epoch {epoch}", len(slices), leave=False, disable=None):
        x = common.network_input(common.augment(images, plan, part, args.crop, args.jitter), args.size)
        y = current[index]
        with common.autocast(x.device, args.precision):
            logits, alpha = network(x)
        wce = logit_weighted_cross_entropy(logits, alpha if args.weights else torch.ones_like(alpha), y)
        rr = rank_regularization(alpha, args.beta, margin)
        loss = args.gamma * rr + (1 - args.gamma) * wce if args.rank else wce  # L_all, Sec. 3.3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            probs = (alpha[:, None] * logits if args.weights else logits).softmax(1)
            m = high_count(len(alpha), args.beta)
            ranked = alpha.sort(descending=True).values
            losses.append(torch.stack([loss, wce, rr]))
            groups.append(torch.stack([ranked[:m].mean(), ranked[m:].mean()]))
            hits.append((probs.argmax(1) == y).sum())
            weights[index] = alpha
            if relabelling:
                if args.relabel_batch or not (args.weights or args.rank):  # without either there are no groups
                    new = relabel_all(probs, y, args.margin2)
                else:
                    new = relabel(probs, alpha, y, args.beta, args.margin2)
                relabelled.append(common.set_labels(current, index, new))
    losses, (high, low) = torch.stack(losses).cpu(), torch.stack(groups).mean(0).tolist()
    total, wce, rr = losses.mean(0).tolist()
    return losses[:, 0], weights, {
        "loss/total": total, "loss/wce": wce, "loss/rank": rr,
        "weight/high": high, "weight/low": low, "weight/gap": high - low, "weight/margin1": network.margin.item() if args.learn_margin else args.margin1,
        "accuracy/train": torch.stack(hits).sum().item() / len(plan.order),
        "relabel/this_epoch": torch.stack(relabelled).sum().item() if relabelled else 0,
    }


@torch.no_grad()
def predict(network, pixels, args) -> tuple[Tensor, Tensor]:
    """Softmax of the unweighted logits, (N, C), and alpha, (N,), on unaugmented images in evaluation mode."""
    network.eval()
    probs, weights = [], []
    for x in pixels.inputs(args.size):
        with common.autocast(x.device, args.precision):
            logits, alpha = network(x)
        probs.append(logits.softmax(1))
        weights.append(alpha)
    return torch.cat(probs), torch.cat(weights)


def evaluate(network, pixels, labels: Tensor, classes, args) -> tuple[dict, list[list[int]]]:
    """The scalars of the evaluated split and its confusion matrix."""
    probs, _ = predict(network, pixels, args)
    return common.accuracy_scalars(probs, labels, classes), common.confusion(probs.argmax(1), labels, len(classes))


def restore(states: list[dict], args, num_classes: int, device):
    """The trained network as a function of images, see common.restore."""
    network = make_network(args, num_classes, device)
    network.load_state_dict(states[0])
    return lambda images: (predict(network, common.Pixels(images, device), args)[0], None)


def figure_of_weights(train, current: Tensor, weights: Tensor):
    """Fig. 4: the training faces of least importance, with their labels after the last epoch."""
    rows = weights.argsort(stable=True)[:32].tolist()
    captions = [f"{train.classes[current[i]]}\nalpha {weights[i]:.2f}" for i in rows]
    return common.figure_of_faces(train.images[rows], captions, ["black"] * len(rows), "The training faces of least importance (Fig. 4)")


@common.reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, "scn")
    device = common.find_device(args.device)
    with common.Run(args, "scn") as run:
        print(f"{run.folder} on {device}; preset {args.preset} (flags win)")
        train, test = common.load_data(args)
        slices = common.batch_slices(len(train.labels), args.batch_size)
        pixels, test_pixels = common.Pixels(train.images, device), common.Pixels(test.images, device)
        given, test_labels = train.labels.to(device), test.labels.to(device)
        clean = None if train.clean is None else train.clean.to(device)
        current = given.clone()

        network = make_network(args, len(train.classes), device)
        optimizer, scheduler = make_optimizer(network, args)

        first = 1
        if state := run.start():
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            current = state["labels"].to(device)
            first = state["epoch"] + 1

        for epoch in range(first, args.epochs + 1):
            began, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
            plan = common.EpochPlan(len(given), args.seed, epoch, device, given if args.oversample else None)
            losses, weights, scalars = train_one_epoch(network, optimizer, pixels, slices, plan, current, epoch, args)
            run.check_finite(losses, epoch)
            scheduler.step()
            scalars |= common.label_scalars(given, current, clean) | {"lr": lr}
            if clean is not None:  # does the weight tell wrong labels from right ones at all?
                scalars["weight/auc_clean"] = common.area_under_curve(weights, given == clean)
            scalars |= evaluate(network, test_pixels, test_labels, test.classes, args)[0]
            run.log(epoch, time.perf_counter() - began, scalars)
            run.writer.add_histogram("weight", weights[weights >= 0], epoch)
            run.save(epoch=epoch, network=network.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), labels=current)

        probs, weights = predict(network, pixels, args)
        table = evaluate(network, test_pixels, test_labels, test.classes, args)[1]
        figures = {"weights": figure_of_weights(train, current.cpu(), weights.cpu())}
        run.finish(train, current, common.audit_scores(probs, given), table, [network.state_dict()], figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
