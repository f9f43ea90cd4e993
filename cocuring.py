"""Co-curing: two peer networks that learn from the labels first and from each other later, and correct the labels.

D. Gera, S. Balasubramanian: "Co-Curing Noisy Annotations for Facial Expression Recognition", 2021. Each network
minimises (1 - lambda) cross-entropy + lambda KL(peer || itself), and lambda grows with the epochs: supervision fits the
clean labels before mimicry keeps the networks from memorising the wrong ones. After a warm-up a label is replaced where
both networks agree on another class by a margin delta.

    python cocuring.py --data toy --noise 0.4                                  # needs no data
    python cocuring.py --data toy --noise 0.4 --lambda-max 0 --no-relabel      # the baseline of Table 2
    python cocuring.py --data raf --root data/raf --noise 0.2 --pretrained resnet18_msceleb.pth

Measured (docs/cocuring.md), CPU, mean test accuracy of the last five epochs: toy, 40 % noise, 3 seeds, 99.5 +- 0.1 %
against 88.2 +- 1.9 % for the baseline and 99.8 +- 0.1 % for clean labels. FERPlus, 10,000 images, 40 %: --pretrained
dlib, 3 seeds, 78.5 +- 0.0 % against 73.7 +- 0.5 %; from scratch, one seed, 69.0 against 69.6 %.
"""

import math
import sys
from functools import partial

from support.augmentation import augment
from support.datasets import load_data
from support.distributed import reports_errors
from support.inference import use_checkpoint
from support.networks import Classifier, parameter_groups, spread_inputs, to_device
from support.runs import Parser, Run, add_data_args, add_training_args, number, parse_with_presets

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# Used where no flag says otherwise: "scratch" or "pretrained", then "<that> <data set>" on top of it, then the same
# with "pretrained <backbone>" for weights that have a backbone of their own.
# "scratch" is ours: chosen on the validation splits of toy and FERPlus, carried over elsewhere (docs/cocuring.md).
# "pretrained" is the paper's, Sec. 4.2, with the epochs of the official code; delta is toy's, the warm-up ours: neither
# was measured there.
PRESETS = {
    "scratch": dict(size=100, epochs=30, batch_size=128, beta=6.0, delta=0.5, warm_up=20, crop=8),
    "scratch ferplus": dict(size=48, crop=4),
    "scratch toy": dict(size=48, epochs=13, batch_size=64, beta=0.65, delta=0.2, warm_up=7, crop=0),
    "pretrained": dict(size=224, epochs=40, batch_size=128, beta=0.65, delta=0.2, warm_up=10),
    "pretrained toy": dict(size=48, epochs=13, batch_size=64, warm_up=7),
    "pretrained dlib": dict(epochs=12, batch_size=128, lr=1e-4, head_lr=1e-3, delta=0.4, warm_up=4, crop=8),
    "pretrained dlib ferplus": dict(crop=4),
}


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_data_args(parser)
    add_training_args(parser)
    parser.set_defaults(lr=1e-3, head_lr=1e-2)
    add = parser.add_argument_group("Co-curing").add_argument
    add("--warm-up", type=number(int, 0), help="first epochs without relabelling, t_warm (value: ours)")
    add("--beta", type=number(float, 0), help="shape of lambda's ramp-up, Eq. 3 (paper, Sec. 4.2: 0.65; ours from "
        "scratch on real faces: 6, networks that are mostly wrong have nothing to mimic)")
    add("--lambda-max", type=number(float, 0, 1), default=0.9, help="largest weight of the mimicry loss (paper, Sec. "
        "4.2)")
    add("--ramp", type=number(float, 0, 1), default=0.9, help="t_r / t_max, when lambda reaches its maximum (official "
        "code; the paper does not say)")
    add("--delta", type=number(float, 0, 1), help="margin of relabelling, Eq. 4 (value: ours)")
    add("--no-relabel", dest="relabel", action="store_false", help="Table 2, 'No relabeling'")
    add("--networks", type=int, choices=(1, 2), default=2, help="1, with --lambda-max 0 --no-relabel: plain training "
        "of one network (paper, Sec. 3: 2)")
    add("--decay", type=number(float, 0, 1, open_low=True), default=0.95, help="factor on the learning rates after "
        "each epoch (paper, Sec. 4.2)")
    add("--jitter", type=number(float, 0, 1), default=0.2, help="colour jitter: brightness, contrast, saturation "
        "within 1 +- this (paper, Sec. 4.2, names it; strength ours)")
    add("--crop", type=number(int, 0), default=0, help="pad by so many pixels and crop (paper: none; ours on real "
        "faces, from scratch and with dlib: a twelfth of the size, without it networks memorise from epoch 8 on)")
    args = parse_with_presets(parser, PRESETS, argv)
    if args.networks == 1 and (args.lambda_max or args.relabel):
        parser.error("--networks 1 has no peer to mimic or to agree with: it needs --lambda-max 0 --no-relabel")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Losses and rules
# ----------------------------------------------------------------------------------------------------------------------


def ramp_up(epoch: int, ramp_epochs: float, lambda_max: float = 0.9, beta: float = 0.65) -> float:
    """Eq. 3: the weight lambda of the mimicry loss in an epoch.

    epoch counts from 1; ramp_epochs is t_r. Returns a float in [0, lambda_max]; stays at lambda_max from t_r on.
    """
    if epoch >= ramp_epochs:
        return lambda_max
    return lambda_max * math.exp(-beta * (1 - epoch / ramp_epochs) ** 2)


def peer_losses(logits1: Tensor, logits2: Tensor, labels: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Eqs. 1-2: (1 - lambda) L_CE + lambda D_KL of each network, means over the batch.

    logits1, logits2: (N, C). labels: int64 (N,). lam: lambda in [0, 1]. Returns two scalars. Algorithm 1 updates each
    network by the gradient of its own loss, so the peer's probabilities are constants in it.
    """
    log_p1, log_p2 = logits1.log_softmax(1), logits2.log_softmax(1)  # (N, C)
    kl_21 = F.kl_div(log_p1, log_p2.detach(), reduction="batchmean", log_target=True)  # D_KL(p2 || p1)
    kl_12 = F.kl_div(log_p2, log_p1.detach(), reduction="batchmean", log_target=True)  # D_KL(p1 || p2)
    loss1 = (1 - lam) * F.nll_loss(log_p1, labels) + lam * kl_21  # Eq. 1
    loss2 = (1 - lam) * F.nll_loss(log_p2, labels) + lam * kl_12  # Eq. 2
    return loss1, loss2


def relabel(probs1: Tensor, probs2: Tensor, labels: Tensor, delta: float) -> Tensor:
    """Eq. 4: the class on which both networks agree where both exceed the given label's probability by more than delta.

    probs1, probs2: (N, C), softmax outputs. labels: int64 (N,), the given labels, which stay where the rule does not
    hold ("l_org otherwise"): applied to them again, the rule takes a wrong correction back. Returns int64 (N,).
    """
    p1_max, l1_max = probs1.max(1)
    p2_max, l2_max = probs2.max(1)
    p1_gt = probs1.gather(1, labels[:, None])[:, 0]
    p2_gt = probs2.gather(1, labels[:, None])[:, 0]
    cured = (p1_max > p1_gt + delta) & (p2_max > p2_gt + delta) & (l1_max == l2_max)
    return torch.where(cured, l1_max, labels)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def make_networks(args, num_classes: int, inputs: Tensor | None = None) -> nn.ModuleList:
    """The peers: backbones with linear heads, seeded differently (Algorithm 1, step 1). inputs: see make_backbone."""
    networks = nn.ModuleList()
    for k in range(1, args.networks + 1):
        torch.manual_seed(common.seed_of("network", k, args.seed))
        networks.append(Classifier(*common.make_backbone(args, inputs), num_classes))
    if args.pretrained != "none" and args.networks == 2:
        print("both networks start from the same backbone; only their heads differ")
    return networks


def make_optimizer(networks, args):
    """Adam over both networks (it works on each parameter alone), learning rates times --decay an epoch (Sec. 4.2)."""
    optimizer = torch.optim.Adam(parameter_groups(networks, args), fused=True)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, args.decay)


def train_one_epoch(networks, optimizer, batches, given: Tensor, current: Tensor, epoch: int, args) -> dict[str, float]:
    """Algorithm 1, steps 3-8, over the training set; corrects `current` in place. Returns the scalars of the epoch.

    batches: (x, index), see README.md. given, current: int64 (N,), the labels before and after correction.
    """
    networks.train()
    device, means = given.device, common.Means()
    lam = ramp_up(epoch, args.ramp * args.epochs, args.lambda_max, args.beta)  # step 5, Eq. 3
    for x, index in batches:  # step 3
        x, index = x.to(device), index.to(device, non_blocking=True)
        y = current[index]
        with common.autocast(device, args.precision):
            logits = [network(x) for network in networks]  # step 4: both see the same view
        if len(networks) == 2:
            losses = peer_losses(*logits, y, lam)  # step 6
        else:
            losses = (F.cross_entropy(*logits, y),)
        optimizer.zero_grad()
        sum(losses).backward()  # step 7: each network's gradient is that of its own loss
        optimizer.step()
        probs = [z.detach().softmax(1) for z in logits]
        if args.relabel and epoch > args.warm_up:  # step 8: used from the next time that the sample is drawn
            changed = common.assign(current, index, relabel(*probs, given[index], args.delta))
            means.add("relabel", this_epoch=changed)
        means.add("loss", total=sum(losses), **{f"net{k}": loss for k, loss in enumerate(losses, 1)})
        means.add("accuracy", train=sum(probs).argmax(1) == y)
    return {"relabel/this_epoch": 0, "weight/lambda": lam} | means.result()


@torch.no_grad()
def predict(networks, inputs, args) -> Tensor:
    """Softmax outputs of each network, (networks, N, C), in evaluation mode. inputs: batches of x.

    The method's prediction is their mean over the networks (Sec. 3.2.3).
    """
    networks.eval()
    probs = []
    for x in inputs:
        with common.autocast(x.device, args.precision):
            probs.append(torch.stack([network(x).softmax(1) for network in networks]))
    return torch.cat(probs, 1)


def restore(states: list[dict], args, num_classes: int, device):
    """The trained networks as a function of images, see support/inference.py."""
    networks = make_networks(args, num_classes)
    for network, state in zip(networks, states, strict=True):
        to_device(network, device, args).load_state_dict(state)
    return lambda images: (predict(networks, common.Images(images, args.size, device), args).mean(0).cpu(), None)


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
        networks = make_networks(args, len(train.classes), spread_inputs(images))
        for network in networks:
            to_device(network, device, args)
        optimizer, scheduler = make_optimizer(networks, args)

        parts = dict(networks=networks, optimizer=optimizer, scheduler=scheduler, labels=current)
        for epoch in run.epochs(train, test, **parts):
            batches = loader.epoch(epoch, balance=given if args.oversample else None)
            scalars = {"lr": scheduler.get_last_lr()[0]}
            scalars |= train_one_epoch(networks, optimizer, batches, given, current, epoch, args)
            scheduler.step()
            probs = predict(networks, test_images, args)
            if len(networks) == 2:
                own = (probs.argmax(2).cpu() == test.labels).float().mean(1).tolist()
                scalars |= {"accuracy/test/net1": own[0], "accuracy/test/net2": own[1]}
            run.end_epoch(epoch, scalars, probs.mean(0), current)
        run.finish(predict(networks, images, args).mean(0), networks, current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
