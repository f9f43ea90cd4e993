"""Co-curing: two peer networks that learn from the labels first and from each other later, and correct the labels.

D. Gera, S. Balasubramanian: "Co-Curing Noisy Annotations for Facial Expression Recognition", 2021.
Each network minimises (1 - lambda) cross-entropy + lambda KL(peer || itself), and lambda grows with the epochs: supervision fits the clean labels before mimicry keeps the networks from memorising the wrong
ones. After a warm-up a label is replaced where both networks agree on another class by a margin delta.

    python cocuring.py --data toy --noise 0.4                                  # needs no data, under 4 minutes on 2 cores
    python cocuring.py --data toy --noise 0.4 --lambda-max 0 --no-relabel      # the baseline of Table 2
    python cocuring.py --data raf --root data/raf --noise 0.2 --pretrained resnet18_msceleb.pth

Measured (docs/cocuring.md): toy, 40 % noise, 3 seeds, CPU: last5 99.5 +- 0.1 % against 88.2 +- 1.9 % for the baseline and
99.8 +- 0.1 % for clean labels. FERPlus (10,000 images, from scratch, one seed): 69.0 %, not ahead of its baseline's 69.6 %.
"""

import math
import sys
import time
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common

# Used where no flag says otherwise: "scratch" or "pretrained", then "<that> <data set>" on top of it.
# "scratch" is ours: chosen on the validation splits of toy and FERPlus, carried over elsewhere (docs/cocuring.md).
# "pretrained" is the paper's, Sec. 4.2, but for t_warm and delta, which are toy's and not measured there.
PRESETS = {
    "scratch": dict(size=100, epochs=30, batch_size=128, beta=6.0, delta=0.5, t_warm=20, crop=8),
    "scratch ferplus": dict(size=48, crop=4),
    "scratch toy": dict(size=48, epochs=13, batch_size=64, beta=0.65, delta=0.2, t_warm=7, crop=0),
    "pretrained": dict(size=224, epochs=40, batch_size=128, beta=0.65, delta=0.2, t_warm=10),
    "pretrained toy": dict(size=48, epochs=13, batch_size=64, t_warm=7),
}


def parse_args(argv=None):
    parser = common.Parser("cocuring.py", description=__doc__.split("\n\n")[0])
    common.add_data_args(parser)
    common.add_training_args(parser)
    parser.set_defaults(lr=1e-3, head_lr=1e-2)
    group = parser.add_argument_group("Co-curing")
    group.add_argument("--beta", type=common.number(float, 0), help="shape of lambda's ramp-up, Eq. 3 (paper, Sec. 4.2: 0.65; ours from scratch: 6, networks that are not right yet have nothing to mimic)")
    group.add_argument("--lambda-max", type=common.number(float, 0, 1), default=0.9, help="largest weight of the mimicry loss (paper, Sec. 4.2: %(default)s)")
    group.add_argument("--ramp", type=common.number(float, 0, 1), default=0.9, help="t_r / t_max, when lambda reaches its maximum (official code: %(default)s; the paper does not say)")
    group.add_argument("--delta", type=common.number(float, 0, 1), help="margin of relabelling, Eq. 4 (ours: not in the paper)")
    group.add_argument("--t-warm", type=common.number(int, 0), help="relabelling runs in later epochs than this one (ours: not in the paper)")
    group.add_argument("--no-relabel", dest="relabel", action="store_false", help="Table 2, 'No relabeling'")
    group.add_argument("--networks", type=int, choices=(1, 2), default=2, help="1, with --lambda-max 0 --no-relabel: plain training of one network (default: paper, Sec. 3)")
    group.add_argument("--decay", type=common.number(float, 0, 1, open_low=True), default=0.95, help="factor on the learning rates after each epoch (paper, Sec. 4.2: %(default)s)")
    group.add_argument("--jitter", type=common.number(float, 0, 1), default=0.2, help="colour jitter: brightness, contrast, saturation within 1 +- this (paper, Sec. 4.2, names it; strength ours: %(default)s)")
    group.add_argument("--crop", type=common.number(int, 0), default=0, help="pad by so many pixels and crop (paper: none; ours from scratch on real faces: a twelfth of the size, without it the networks memorise from epoch 8 on)")
    args = common.parse_with_presets(parser, PRESETS, argv, "cocuring")
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


def make_networks(args, num_classes: int, device) -> list[nn.Module]:
    """The peers: two backbones with linear heads, seeded differently (Algorithm 1, step 1)."""
    networks = []
    for number in range(1, args.networks + 1):
        torch.manual_seed(common.seed_of("network", number, args.seed))
        backbone, width = common.make_backbone(args)
        network = nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(width, num_classes)))
        networks.append(network.to(device, memory_format=torch.channels_last))
        if args.compile:
            networks[-1].compile()
    if args.pretrained != "none" and args.networks == 2:
        print("both networks start from the same backbone; only their heads differ")
    return networks


def train_one_epoch(networks, optimizer, pixels, slices, plan, given, current, epoch, args) -> tuple[Tensor, dict]:
    """One epoch over the training set; corrects `current`, int64 (N,), in place. Returns the losses (steps,) and the scalars.

    given: int64 (N,), the labels before any correction. Everything stays on the device until the epoch ends.
    """
    lam = ramp_up(epoch, args.ramp * args.epochs, args.lambda_max, args.beta)
    relabelling = args.relabel and epoch > args.t_warm  # Algorithm 1, step 8
    losses, hits, relabelled = [], [], []
    for network in networks:
        network.train()
    for part, index, images in tqdm(pixels.batches(plan.order, slices), f"epoch {epoch}", len(slices), leave=False, disable=None):
        x = common.network_input(common.augment(images, plan, part, args.crop, args.jitter), args.size)  # one view for both
        y = current[index]
        with common.autocast(x.device, args.precision):
            logits = [network(x) for network in networks]
        logits = [z.float() for z in logits]
        if len(networks) == 2:
            terms = peer_losses(*logits, y, lam)
        else:
            terms = (F.cross_entropy(logits[0], y),)
        optimizer.zero_grad()
        sum(terms).backward()  # each network's gradient is that of its own loss
        optimizer.step()
        with torch.no_grad():
            probs = [z.softmax(1) for z in logits]
            losses.append(torch.stack(terms).detach())
            hits.append((sum(probs).argmax(1) == y).sum())
            if relabelling:  # used from the next time that the sample is drawn: step 8 comes after step 7
                relabelled.append(common.set_labels(current, index, relabel(*probs, given[index], args.delta)))
    losses = torch.stack(losses).cpu()  # (steps, networks): the epoch's first wait for the device
    return losses.sum(1), {
        "loss/total": losses.sum(1).mean().item(),
        **{f"loss/net{k + 1}": losses[:, k].mean().item() for k in range(losses.shape[1])},
        "weight/lambda": lam,
        "accuracy/train": torch.stack(hits).sum().item() / len(plan.order),
        "relabel/this_epoch": torch.stack(relabelled).sum().item() if relabelling else 0,
    }


@torch.no_grad()
def predict(networks, pixels, args) -> list[Tensor]:
    """Softmax outputs of each network, (N, C), on unaugmented images in evaluation mode."""
    for network in networks:
        network.eval()
    outputs = [[] for _ in networks]
    for x in pixels.inputs(args.size):
        for network, parts in zip(networks, outputs):
            with common.autocast(x.device, args.precision):
                logits = network(x)
            parts.append(logits.float().softmax(1))
    return [torch.cat(parts) for parts in outputs]


def evaluate(networks, pixels, labels: Tensor, classes, args) -> tuple[dict, list[list[int]]]:
    """The scalars of the evaluated split and its confusion matrix; the networks are averaged (Sec. 3.2.3)."""
    probs = predict(networks, pixels, args)
    mean = sum(probs) / len(probs)
    scalars = common.accuracy_scalars(mean, labels, classes)
    if len(networks) == 2:
        scalars |= {f"accuracy/test/net{k}": (p.argmax(1) == labels).float().mean().item() for k, p in enumerate(probs, 1)}
    return scalars, common.confusion(mean.argmax(1), labels, len(classes))


def restore(states: list[dict], args, num_classes: int, device):
    """The trained networks as a function of images, see common.restore."""
    networks = make_networks(args, num_classes, device)
    for network, state in zip(networks, states):
        network.load_state_dict(state)

    def predictor(images: Tensor):
        probs = predict(networks, common.Pixels(images, device), args)
        return sum(probs) / len(probs), None

    return predictor


@common.reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.evaluate or args.predict:
        return common.use_checkpoint(args, "cocuring")
    device = common.find_device(args.device)
    with common.Run(args, "cocuring") as run:
        print(f"{run.folder} on {device}; preset {args.preset} (flags win)")
        train, test = common.load_data(args)
        slices = common.batch_slices(len(train.labels), args.batch_size)
        pixels, test_pixels = common.Pixels(train.images, device), common.Pixels(test.images, device)
        given, test_labels = train.labels.to(device), test.labels.to(device)
        clean = None if train.clean is None else train.clean.to(device)
        current = given.clone()

        networks = make_networks(args, len(train.classes), device)
        # One optimiser over both networks: Adam works on each parameter alone.
        groups = [dict(params=[p for n in networks for p in n.backbone.parameters()], lr=args.lr),
                  dict(params=[p for n in networks for p in n.head.parameters()], lr=args.head_lr)]
        optimizer = torch.optim.Adam(groups, fused=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, args.decay)

        first = 1
        if state := run.start():
            for network, weights in zip(networks, state["networks"]):
                network.load_state_dict(weights)
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            current = state["labels"].to(device)
            first = state["epoch"] + 1

        for epoch in range(first, args.epochs + 1):
            began, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
            plan = common.EpochPlan(len(given), args.seed, epoch, device, given if args.oversample else None)
            losses, scalars = train_one_epoch(networks, optimizer, pixels, slices, plan, given, current, epoch, args)
            run.check_finite(losses, epoch)
            scheduler.step()
            scalars |= common.label_scalars(given, current, clean) | {"lr": lr}
            scalars |= evaluate(networks, test_pixels, test_labels, test.classes, args)[0]
            run.log(epoch, time.perf_counter() - began, scalars)
            run.save(epoch=epoch, networks=[n.state_dict() for n in networks], optimizer=optimizer.state_dict(),
                     scheduler=scheduler.state_dict(), labels=current)

        probs = predict(networks, pixels, args)
        scores = common.audit_scores(sum(probs) / len(probs), given)
        table = evaluate(networks, test_pixels, test_labels, test.classes, args)[1]
        run.finish(train, current, scores, table, [n.state_dict() for n in networks])
    return 0


if __name__ == "__main__":
    sys.exit(main())
