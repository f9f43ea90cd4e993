"""NCCTFER: learn the class from confident samples; keep a second head consistent on the others, in two views.

D. Gera, B. N. S. Kumar, B. V. R. Kumar, S. Balasubramanian: "Class Adaptive Threshold and Negative Class Guided Noisy
Annotation Robust Facial Expression Recognition", 2023. In each batch a sample is confident if the probability of its
label reaches the mean over the samples of that label. Confident samples train the positive head by cross-entropy; for
the others a negative head is kept consistent between a weak and a strong view, on k of the classes. Ours: from scratch
and with dlib's weights the probabilities are those of an averaged network, once an epoch, and this network is the one
that is tested and kept (--select-by batch: paper).

    python ncctfer.py --data toy --noise 0.4                                # needs no data
    python ncctfer.py --data toy --noise 0.4 --no-threshold --no-negative   # the baseline of Table 5
    python ncctfer.py --data raf --root data/raf --noise 0.6 --pretrained resnet18_msceleb.pth

Measured (docs/ncctfer.md): toy, 40 % noise, 3 seeds, CPU, mean test accuracy of the last five epochs: 99.6 +- 0.3 %, by
the same recipe without the two parts (averaged too) 99.1 +- 0.3 %, by the paper's thresholds of the batch 95.2 +-
2.4 %, one plain network 85.0 +- 4.6 %. FERPlus, 10,000 images, 40 %, --pretrained dlib, 3 seeds: 76.1 +- 0.5 against
77.7 +- 0.5 % without the two parts and 72.1 +- 0.8 % for one network; mean class accuracy 53.4, 50.7 and 46.7 %.
"""

import sys
from functools import partial

from support import figures
from support.augmentation import augment, rand_augment
from support.datasets import load_data
from support.distributed import reports_errors
from support.inference import use_checkpoint
from support.networks import Averaged, Head, parameter_groups, spread_inputs, to_device
from support.runs import Parser, Run, add_data_args, add_training_args, number, parse_with_presets

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# Used where no flag says otherwise: "scratch" or "pretrained", then "<that> <data set>" on top of it, then the same
# with "pretrained <backbone>" for weights that have a backbone of their own.
# "pretrained" is the paper's, Sec. 4.2, with the warm-up of the official code; the others are ours: the learning rates
# of scn.py, warm-up and selection by the validation splits of toy and FERPlus (docs/ncctfer.md).
PRESETS = {
    "scratch": dict(size=100, epochs=30, batch_size=128, lr=1e-3, head_lr=1e-3, decay=0.95, warm_up=19,
                    select_by="average"),
    "scratch ferplus": dict(size=48),
    "scratch toy": dict(size=48, epochs=13, batch_size=64, warm_up=3),
    "pretrained": dict(size=224, epochs=40, batch_size=128, lr=1e-4, head_lr=1e-3, decay=1.0, warm_up=4,
                       select_by="batch"),
    "pretrained toy": dict(size=48, epochs=13, batch_size=64, warm_up=3),
    "pretrained dlib": dict(epochs=12, decay=0.95, warm_up=3, select_by="average"),
}

K = 4  # classes in the consistency loss, Sec. 4.4


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_data_args(parser)
    add_training_args(parser)
    add = parser.add_argument_group("NCCTFER").add_argument
    add("--warm-up", type=number(int, 0), help="first epochs that supervise all samples, without consistency: E_warm - "
        "1 (official code: 4; ours from scratch on real faces: 19)")
    add("--k", type=number(int, 1), default=K, help="classes in the consistency loss, Eq. 4; of 2 or 3 "
        "classes all (paper, Sec. 4.4)")
    add("--mask", choices=("most", "least"), default="most", help="which k classes of the negative head: the most "
        "probable (paper, Sec. 3.2) or the least (paper, Sec. 1, and official code)")
    add("--select-by", choices=("batch", "average"), help="whose probabilities Eqs. 1-2 take: those of the batch in "
        "training (paper), or once an epoch those of an averaged network on all samples, which is then tested and kept "
        "too (ours; the default from scratch and with dlib's weights)")
    add("--ema", type=number(float, 0, 1, open_high=True), default=0.98, help="with --select-by average: decay of that "
        "network, a step (ours)")
    add("--clamp", type=number(float, 0, 1), nargs=2, metavar=("LOW", "HIGH"), help="Eqs. 1-2 take probabilities "
        "clamped to this range (official code: 0.35 0.65; paper: none)")
    add("--negative-weight", type=number(float, 0), default=1.0, help="weight of L_c in Eq. 5 (paper: 1; the sums of "
        "the official code amount to about 0.03 at batch 128)")
    add("--no-threshold", dest="threshold", action="store_false", help="Table 5: all samples are confident; with "
        "--no-negative the baseline")
    add("--no-negative", dest="negative", action="store_false", help="Table 5, Baseline+pc: confident samples only")
    add("--single-head", action="store_true", help="Table 1: consistency on the positive head, by default on its k "
        "least probable classes")
    add("--decay", type=number(float, 0, 1, open_low=True), help="factor on the learning rates after each epoch "
        "(paper: none; ours from scratch and with dlib: 0.95)")
    add("--crop", type=number(int, 0), default=4, help="weak view: pad by so many pixels and crop (paper, Sec. 4.2)")
    add("--operations", type=number(int, 0), default=2, help="strong view: operations of RandAugment (paper, Sec. 4.2)")
    add("--magnitude", type=number(int, 0, 30), default=10, help="strong view: magnitude of RandAugment, of 30 "
        "(ours; official code: of 10, drawn from 1 to 9)")
    if parser.parse_early(argv).single_head:
        parser.set_defaults(mask="least")
    args = parse_with_presets(parser, PRESETS, argv)
    if args.negative and not args.threshold:
        parser.error("--no-threshold leaves no sample for the negative loss: give --no-negative too")
    if args.clamp and args.clamp[0] > args.clamp[1]:
        parser.error(f"--clamp {args.clamp[0]} {args.clamp[1]}: the lower end comes first")
    if args.single_head and not args.negative:
        parser.error("--single-head is a form of the negative loss: it cannot go with --no-negative")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Losses and rules
# ----------------------------------------------------------------------------------------------------------------------


def class_thresholds(probs: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Eq. 1: T_c, the mean probability of class c over the samples that are labelled c; 0 for a class that is absent.

    probs: (N, C), softmax outputs. labels: int64 (N,). Returns (C,). Summed in float64, so that the mean of equal
    probabilities is that probability and Eq. 2's >= holds for all of them.
    """
    own = probs.gather(1, labels[:, None])[:, 0].double()
    sums = torch.zeros(2, num_classes, dtype=torch.float64, device=probs.device)  # of probabilities, of samples
    sums.index_add_(1, labels, torch.stack([own, torch.ones_like(own)]))
    return (sums[0] / sums[1].clamp(min=1)).to(probs.dtype)


def confident(probs: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """Eq. 2: whether the probability of the own label reaches the threshold of that label.

    probs: (N, C). labels: int64 (N,). thresholds: (C,). Returns bool (N,).
    """
    return probs.gather(1, labels[:, None])[:, 0] >= thresholds[labels]


def supervised_loss(logits: Tensor, labels: Tensor, confident: Tensor) -> Tensor:
    """Eq. 3: cross-entropy, mean over the confident samples; 0, still differentiable, if there is none.

    logits: (N, C). labels: int64 (N,). confident: bool (N,). Returns a scalar.
    """
    return (F.cross_entropy(logits, labels, reduction="none") * confident).sum() / confident.sum().clamp(min=1)


def negative_consistency(
    weak_logits: Tensor, strong_logits: Tensor, confident: Tensor, k: int = 4, mask: str = "most"
) -> Tensor:
    """Eq. 4: - 1/N sum over the non-confident samples of M_k p_w log p_s; the target p_w carries no gradient.

    weak_logits, strong_logits: (N, C), of the two views. confident: bool (N,). k in [1, C]: M_k keeps the k classes
    that are most (or with mask="least" least) probable on the weak view. Returns a scalar, divided by the batch size N.
    """
    p_w = weak_logits.detach().softmax(1)  # (N, C)
    m_k = torch.zeros_like(p_w).scatter_(1, p_w.topk(k, dim=1, largest=mask == "most").indices, 1)
    per_sample = -(m_k * p_w * strong_logits.log_softmax(1)).sum(1)
    return (per_sample * ~confident).sum() / len(p_w)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """A backbone with a positive head, which classifies, and a negative head (Sec. 3.2)."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.positive = Head(width, num_classes)
        self.negative = Head(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) -> logits of the positive and of the negative head, float32 (N, C) each."""
        features = self.backbone(x).float()
        return self.positive(features), self.negative(features)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def make_network(args, num_classes: int, inputs: Tensor | None = None) -> TwoHeads:
    """inputs: see make_backbone."""
    torch.manual_seed(common.seed_of("network", 1, args.seed))
    return TwoHeads(*common.make_backbone(args, inputs), num_classes)


def make_optimizer(network, args):
    """Adam (Sec. 4.2), learning rates times --decay after each epoch."""
    optimizer = torch.optim.Adam(parameter_groups([network], args), fused=True)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, args.decay)


def train_one_epoch(
    network, optimizer, batches, given: Tensor, clean: Tensor | None, epoch: int, args, averaged=None, chosen=None
) -> dict:
    """Algorithm 1 over the training set. Returns the scalars of the epoch; those of classes are lists.

    batches: ((weak, strong), index), see README.md; strong may be None in epochs that do not use it. given: int64 (N,),
    the labels to train on. clean: int64 (N,) or None, for reporting only. averaged: a moving average of the network,
    updated each step, or None. chosen: bool (N,), the confident samples of the epoch (--select-by average, see main);
    None: those of each batch, whatever --select-by says.
    """
    network.train()
    device, means = given.device, common.Means()
    selecting = args.threshold and epoch > args.warm_up  # Algorithm 1: e < E_warm supervises all samples
    for (weak, strong), index in batches:
        weak, index = weak.to(device), index.to(device, non_blocking=True)
        y = given[index]
        with common.autocast(device, args.precision):
            positive, negative = network(weak)
            positive_s, negative_s = network(strong.to(device)) if args.negative and selecting else (None, None)
        probs, p_n = positive.detach().softmax(1), negative.detach().softmax(1)
        clamped = probs.clamp(*args.clamp) if args.clamp else probs
        classes = probs.shape[1]
        t_c = class_thresholds(clamped, y, classes)  # Eq. 1
        sure = confident(clamped, y, t_c) if chosen is None else chosen[index]  # Eq. 2
        l_s = supervised_loss(positive, y, sure if selecting else torch.ones_like(sure))  # Eq. 3
        l_c = torch.zeros_like(l_s)
        if args.negative and selecting:
            views = (positive, positive_s) if args.single_head else (negative, negative_s)
            l_c = negative_consistency(*views, sure, min(args.k, classes), args.mask)  # Eq. 4
        loss = l_s + args.negative_weight * l_c  # Eq. 5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if averaged is not None:
            averaged.update(network)
        means.add("loss", total=loss, supervised=l_s, negative=l_c)
        means.add("accuracy", train=probs.argmax(1) == y)
        means.add("weight", among=t_c > 0, threshold=t_c)
        means.add("confident", share=sure)
        means.add("negative", top=p_n.amax(1).mean(), mean=p_n.mean(0))
        if clean is not None:
            correct = y == clean[index]
            means.add("confident", among=sure, purity=correct)
            means.add("confident", among=correct, recall=sure)
    scalars = means.result()
    # A head trained by consistency alone may answer the same to every image: then its mean answer is as sharp as each.
    mean = torch.tensor(scalars.pop("negative/mean"))
    return scalars | {"negative/classes": (-(mean * mean.clamp(min=1e-12).log()).sum()).exp().item()}


@torch.no_grad()
def predict(network, inputs, args) -> Tensor:
    """Softmax of the positive head, (N, C), in evaluation mode. inputs: batches of x."""
    network.eval()
    probs = []
    for x in inputs:
        with common.autocast(x.device, args.precision):
            probs.append(network(x)[0].softmax(1))
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
        if args.k > max(K, len(train.classes)):
            raise common.UserError(f"--k {args.k}: there are only {len(train.classes)} classes")
        images, test_images = (common.Images(split.images, args.size, device) for split in (train, test))
        weak = partial(augment, crop=args.crop)
        strong = partial(rand_augment, layers=args.operations, magnitude=args.magnitude)
        loader = common.Loader(images, args.batch_size, args.seed, weak, strong)
        given, clean = (None if labels is None else labels.to(device) for labels in (train.labels, train.clean))
        network = to_device(make_network(args, len(train.classes), spread_inputs(images)), device, args)
        optimizer, scheduler = make_optimizer(network, args)
        parts = dict(network=network, optimizer=optimizer, scheduler=scheduler)
        averaged, chosen, tested = None, None, network
        if args.select_by == "average":  # ours: the network that selects is tested and kept (docs/ncctfer.md)
            averaged = Averaged(network, args.ema)
            parts["averaged"], tested = averaged, averaged.module

        for epoch in run.epochs(train, test, **parts):
            if averaged is not None and args.threshold and epoch > args.warm_up:
                probs = predict(averaged.module, images, args)
                probs = probs.clamp(*args.clamp) if args.clamp else probs
                t_c = class_thresholds(probs, given, probs.shape[1])
                chosen = confident(probs, given, t_c)
            balance = given if args.oversample else None
            batches = loader.epoch(epoch, balance, strong=args.negative and epoch > args.warm_up)
            scalars = {"lr": scheduler.get_last_lr()[0]}
            scalars |= train_one_epoch(network, optimizer, batches, given, clean, epoch, args, averaged, chosen)
            if chosen is not None:
                scalars["weight/threshold"] = t_c.tolist()  # those that chose, not those of the batches
            scheduler.step()
            run.end_epoch(epoch, scalars, predict(tested, test_images, args))
        probs = predict(tested, images, args)
        run.finish(probs, [tested], confidence=lambda: figures.confidence(train, probs.cpu()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
