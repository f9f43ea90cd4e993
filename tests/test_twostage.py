"""The two-stage cycle: rules against scikit-learn and by hand, its stages beside plain ones, then the script itself."""

import csv
import math
from statistics import mean
from types import SimpleNamespace

from support import figures, toyfaces
from support.networks import Averaged

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, check_resume, lines
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import common
import twostage
from twostage import (
    admitted_set,
    class_margins,
    clean_probability,
    detection_losses,
    fit_mixture,
    labelled_loss,
    labelled_set,
    rebalanced_rates,
    unlabelled_losses,
)

# clean_probability (DivideMix)


def bimodal(seed, count=600):
    """Losses of two groups, and which of them are of the low one."""
    rng = np.random.default_rng(seed)
    low = rng.random(count) < rng.uniform(0.3, 0.8)
    losses = np.where(low, rng.gamma(2, rng.uniform(0.05, 0.15), count), rng.normal(rng.uniform(2, 3), 0.4, count))
    return torch.tensor(losses).float(), torch.tensor(low)


@pytest.mark.parametrize("seed", range(6))
def test_the_mixture_is_that_of_scikit_learn(seed):
    losses, low = bimodal(seed)
    scaled = ((losses - losses.min()) / (losses.max() - losses.min())).double()
    weights, means, variances = fit_mixture(scaled)
    model = GaussianMixture(2, reg_covar=5e-4, max_iter=500, tol=1e-7, random_state=0).fit(scaled[:, None].numpy())
    order = model.means_[:, 0].argsort()
    np.testing.assert_allclose(weights, model.weights_[order], atol=2e-3)
    np.testing.assert_allclose(means, model.means_[order, 0], atol=2e-3)
    np.testing.assert_allclose(variances, model.covariances_[order, 0, 0], atol=2e-3)
    got = clean_probability(losses)
    np.testing.assert_allclose(got, model.predict_proba(scaled[:, None].numpy())[:, order[0]], atol=0.02)
    assert ((got > 0.5) == low).float().mean() > 0.97


def test_detection_losses_by_hand():
    probs, labels = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([1, 1])
    assert detection_losses(probs, labels).tolist() == [0.25, 1.0]
    halved = (probs - torch.eye(2)[labels]).abs().sum(1) / 2  # the mean absolute error
    assert halved.tolist() == [0.25, 1.0]
    assert detection_losses(probs, labels, "ce").tolist() == pytest.approx([-math.log(0.75), -math.log(1e-8)])


def test_outliers_among_wrong_labels_split_the_mixture_of_cross_entropies_only():
    """Of 100 wrong labels 20 have a loss of 6 to 10: of cross-entropies the mixture sets these apart, and no others."""
    cross_entropy = torch.cat([torch.linspace(0.1, 0.7, 100), torch.linspace(1.8, 2.6, 80), torch.linspace(6, 10, 20)])
    right = torch.arange(200) < 100
    assert (clean_probability(cross_entropy) > 0.5).sum() == 180
    assert torch.equal(clean_probability(1 - (-cross_entropy).exp()) > 0.5, right)


@pytest.mark.parametrize("losses", [[], [1.0], [0.7, 0.7, 0.7], [0.0, 0.0]])
def test_losses_that_tell_nothing_are_clean(losses):
    losses = torch.tensor(losses)
    assert clean_probability(losses).tolist() == [1] * len(losses)
    assert clean_probability(losses, torch.zeros(len(losses), dtype=torch.long)).tolist() == [1] * len(losses)


def test_two_losses_are_told_apart_and_inputs_left_alone():
    losses = torch.tensor([2.0, 0.5])
    got = clean_probability(losses)
    assert got[1] > 0.9 and got[0] < 0.1 and losses.tolist() == [2.0, 0.5]


def test_mixtures_per_class_are_those_of_each_class_alone():
    (a, _), (b, _) = bimodal(1), bimodal(2)
    losses, labels = torch.cat([a, 20 + b]), torch.tensor([2] * len(a) + [0] * len(b))
    shuffle = torch.randperm(len(losses), generator=torch.Generator().manual_seed(1))
    got = clean_probability(losses[shuffle], labels[shuffle])
    expected = torch.cat([clean_probability(a), clean_probability(b)])
    torch.testing.assert_close(got, expected[shuffle], atol=1e-4, rtol=0)
    assert (clean_probability(losses)[len(a) :] < 0.5).all()  # a global one takes the class of large losses for noise


def test_a_class_of_one_kind_of_label_is_split_by_a_mixture_of_its_own():
    """Hardly a label of class 0 is wrong, hardly one of class 1 right (a common and a rare class, symmetric noise)."""
    right = [torch.linspace(0, 0.1, 80), torch.linspace(0.4, 0.5, 40)]
    wrong = [torch.linspace(0.7, 0.8, 40), torch.linspace(0.95, 1, 80)]
    losses, labels = torch.cat(right + wrong), torch.arange(240) // 120
    assert torch.equal(clean_probability(losses) > 0.5, labels == 0)
    assert (clean_probability(losses, labels) > 0.5).nonzero()[:, 0].tolist() == [*range(80), *range(120, 160)]


def test_the_labelled_set_is_empty_for_no_class():
    probability, losses = torch.tensor([0.9, 0.5, 0.1, 0.2]), torch.tensor([0.1, 0.2, 3.0, 2.0])
    labels = torch.tensor([0, 0, 1, 1])
    assert labelled_set(probability, losses, labels, floor="one").tolist() == [True, False, False, True]
    assert labelled_set(probability, losses, labels, 0.15, "one").tolist() == [True, True, False, True]
    assert labelled_set(probability, torch.ones(4), labels, 0.9).all()  # equal losses are their own mean


def test_a_class_keeps_the_labels_up_to_its_mean_loss():
    losses = torch.tensor([0.1, 0.2, 0.9, 0.6, 0.7, 0.8, 0.9])
    labels, probability = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0.9, 0.4, 0.6, 0.2, 0.1, 0.1, 0.1])
    assert labelled_set(probability, losses, labels).tolist() == [True, True, True, True, True, False, False]
    assert labelled_set(probability, losses, labels, floor="one").tolist() == [True, False, True, True] + [False] * 3


# class_margins (Ada-CM) and rates (CReST)


def test_margins_by_hand():
    probs = torch.tensor([[0.95, 0.05, 0.0], [0.99, 0.01, 0.0], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.05, 0.9, 0.05]])
    labels = torch.tensor([0, 0, 1, 1, 1])  # the fourth is wrong
    torch.testing.assert_close(class_margins(probs, labels, 3, 1.0), torch.tensor([0.97, 0.85, 0.8]))
    torch.testing.assert_close(class_margins(probs, labels, 3, 0.9), torch.tensor([0.873, 0.8, 0.8]))
    assert class_margins(probs[:0], labels[:0], 3, 0.97).tolist() == pytest.approx([0.8] * 3)


def test_rates_by_hand():
    counts = torch.tensor([100, 8, 1000, 125])  # ordered: 1000, 125, 100, 8
    got = rebalanced_rates(counts)
    expected = {2: (8 / 1000) ** (1 / 3), 3: (100 / 1000) ** (1 / 3), 0: (125 / 1000) ** (1 / 3), 1: 1.0}
    assert got.tolist() == pytest.approx([expected[c] for c in range(4)])
    assert rebalanced_rates(counts, 0).tolist() == [1] * 4
    assert rebalanced_rates(torch.tensor([3, 3, 3])).tolist() == [1] * 3
    # A class without labels shifts no other: the commonest of the rest is paired with the rarest of the rest.
    assert rebalanced_rates(torch.tensor([80, 0, 10])).tolist() == pytest.approx([0.5, 1, 1])
    assert rebalanced_rates(torch.tensor([0, 0])).tolist() == [1, 1]


def test_the_most_confident_of_each_class_are_admitted():
    top = torch.tensor([0.9, 0.6, 0.8, 0.7, 0.95])
    probs = torch.stack([top, 1 - top], 1)
    probs[4] = probs[4].flip(0)  # of class 1
    assert admitted_set(probs, torch.tensor([0.5, 1.0])).tolist() == [True, False, True, False, True]
    assert admitted_set(probs, torch.tensor([0.26, 0.0])).tolist() == [True, False, True, False, False]
    assert admitted_set(probs, torch.ones(2)).all() and admitted_set(probs[:0], torch.ones(2)).shape == (0,)


# Losses


LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])


def test_labelled_loss_by_hand():
    labels, labelled = torch.tensor([0, 0, 1]), torch.tensor([True, False, True])
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 3
    assert labelled_loss(LOGITS, labels, labelled).item() == pytest.approx(expected, abs=1e-6)
    shares = torch.tensor([0.75, 0.25]).log()
    expected = (math.log(1 + math.exp(-2) / 3) + math.log(4)) / 3
    assert labelled_loss(LOGITS, labels, labelled, shares).item() == pytest.approx(expected, abs=1e-6)


def test_losses_of_empty_parts_are_zero_and_differentiable():
    logits = LOGITS.clone().requires_grad_()
    loss = labelled_loss(logits, torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.bool))
    nobody = torch.zeros(0, dtype=torch.bool)
    l_u, l_c, sure = unlabelled_losses(logits[:0], logits[:0], torch.full((2,), 0.8), nobody, 3)
    (loss + l_u + l_c).backward()
    assert loss == l_u == l_c == 0 and len(sure) == 0 and not logits.grad.any()


def test_unlabelled_losses_by_hand():
    weak = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.5, 0.0]], requires_grad=True)
    strong = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
    margins = torch.tensor([0.8, 0.99])
    l_u, l_c, sure = unlabelled_losses(weak, strong, margins, torch.tensor([True, False, True]), 4)
    assert sure.tolist() == [True, False, False]
    assert l_u.item() == pytest.approx(math.log(1 + math.e) / 4, abs=1e-6)
    p3, p05, p1 = (1 / (1 + math.exp(-z)) for z in (3, 0.5, -1))
    assert l_c.item() == pytest.approx((2 * (p3 - p1) ** 2 + 2 * (p05 - 0.5) ** 2) / 4, abs=1e-6)
    (l_u + l_c).backward()
    assert weak.grad is None and strong.grad.any(1).all()
    equal = torch.tensor([[math.log(4.0), 0.0]]).double()  # exactly at the margin: strictly above is asked for
    margins = equal.softmax(1)[0, :1].repeat(2)
    assert unlabelled_losses(equal, equal, margins, torch.tensor([True]), 1)[2].tolist() == [False]


# Both stages, beside plain ones

CLASSES, COUNTS = 7, (26, 18, 14, 10, 8, 5, 3)
COUNT = sum(COUNTS)


class Plain(nn.Module):
    """A backbone and a linear head, with the script's names of the weights."""

    def __init__(self):
        super().__init__()
        self.backbone = Tiny()
        self.backbone.fc = nn.Identity()
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x):
        return self.head(self.backbone(x))


def plain_optimizer(network, args):
    backbone, head = network.backbone.parameters(), network.head.parameters()
    return torch.optim.Adam([dict(params=backbone, lr=args.lr), dict(params=head, lr=args.head_lr)])


def ema_update(averaged, network, decay, steps):
    """Weights and statistics; the first step copies."""
    for own, new in zip(averaged.state_dict().values(), network.state_dict().values()):
        own.copy_(new if steps == 1 or not own.is_floating_point() else decay * own + (1 - decay) * new)


def predicted(network, x):
    with torch.no_grad():
        return network.eval()(x).softmax(1)


def posterior_of_the_lower(values):
    """Two Gaussians by expectation-maximisation on values scaled to [0, 1], from their lower and upper half."""
    if len(values) < 2 or min(values) == max(values):
        return [1.0] * len(values)
    x = (np.array(values) - min(values)) / (max(values) - min(values))
    r = np.stack([x <= 0.5, x > 0.5]).astype(float)
    for _ in range(100):
        weight = r.mean(1)
        mu = (r * x).sum(1) / r.sum(1)
        variance = (r * (x - mu[:, None]) ** 2).sum(1) / r.sum(1) + 5e-4
        density = np.exp(-((x - mu[:, None]) ** 2) / (2 * variance[:, None])) / np.sqrt(variance[:, None])
        r = weight[:, None] * density / (weight[:, None] * density).sum(0)
    return r[mu.argmin()].tolist()


def plain_division(probs, labels, cycle, args):
    """Stage 1, sample by sample: who keeps the label, who may have a pseudo-label, margins and rates of the classes."""
    p, y, n = probs.double().tolist(), labels.tolist(), len(labels)
    cycling, members = cycle >= 1, {c: [i for i in range(n) if y[i] == c] for c in sorted(set(y))}
    losses = [-math.log(max(p[i][y[i]], 1e-8)) if args.detect_by == "ce" else 1 - p[i][y[i]] for i in range(n)]
    clean = [1.0] * n
    if args.detect and cycling:
        for group in members.values() if args.mixture == "class" else [list(range(n))]:
            for i, w in zip(group, posterior_of_the_lower([losses[i] for i in group])):
                clean[i] = w
    assert all(abs(w - args.clean_above) > 1e-5 for w in clean)  # rounding decides nothing
    kept = [w > args.clean_above for w in clean]
    for c, group in members.items():
        level = mean(losses[i] for i in group)
        if args.detect and cycling and args.floor == "mean":
            for i in group:
                assert len(group) == 1 or abs(losses[i] - level) > 1e-6
                kept[i] = kept[i] or len(group) == 1 or losses[i] <= level
        if not any(kept[i] for i in group):
            kept[min(group, key=lambda i: losses[i])] = True
    counts, margins = {c: sum(kept[i] for i in members[c]) for c in members}, []
    for c in range(CLASSES):  # Ada-CM
        tops = [p[i][c] for i in members.get(c, []) if kept[i] and p[i][c] == max(p[i])]
        scale = args.margin_scale / (1 + math.exp(-max(cycle, 0)))
        margins.append(max(0.8, scale * mean(tops)) if tops else 0.8)
    rates = [1.0] * CLASSES
    if args.rebalance == "rates":  # CReST
        ranked = sorted(counts, key=lambda c: (-counts[c], c))
        for c, opposite in zip(ranked, reversed(ranked)):
            rates[c] = (counts[opposite] / counts[ranked[0]]) ** args.alpha
    admitted = [False] * n
    for c in range(CLASSES):
        rest = sorted((i for i in range(n) if not kept[i] and p[i][c] == max(p[i])), key=lambda i: -p[i][c])
        for i in rest[: math.ceil(rates[c] * len(rest) - 1e-4)]:
            admitted[i] = True
    shares = None
    if args.rebalance == "logits" and cycling:
        shares = [math.log(max(counts.get(c, 0), 1) / sum(kept)) for c in range(CLASSES)]
    return SimpleNamespace(
        losses=losses, clean=clean, labelled=kept, admitted=admitted, margins=margins, rates=rates, log_shares=shares
    )


def plain_epoch(network, optimizer, batches, labels, division, clean, semi, args, after_step):
    """Stage 2, sample by sample; returns the scalars of the epoch."""
    network.train()
    steps, hits, pseudo = [], [], []
    shift = torch.zeros(CLASSES) if division.log_shares is None else torch.tensor(division.log_shares)
    for (weak, strong), index in batches:
        place, y, n = index.tolist(), labels[index].tolist(), len(index)
        rest = [i for i in range(n) if semi and not division.labelled[place[i]]]
        z = network(torch.cat([weak, strong[rest]]) if semi else weak)  # batch statistics of both views together
        z_w, z_s = z[:n], dict(zip(rest, z[n:]))
        l_x = l_u = l_c = 0 * z.sum()
        for i in range(n):
            if division.labelled[place[i]]:
                l_x = l_x - (z_w[i] + shift).log_softmax(0)[y[i]] / n
            elif semi:
                p_w = z_w[i].softmax(0).tolist()
                c = p_w.index(max(p_w))
                assert abs(p_w[c] - division.margins[c]) > 1e-5  # rounding decides nothing
                sure = p_w[c] > division.margins[c] and division.admitted[place[i]]
                if sure:
                    l_u = l_u - z_s[i].log_softmax(0)[c] / n
                else:
                    l_c = l_c + (z_s[i].softmax(0) - torch.tensor(p_w)).square().sum() / n
                pseudo.append((sure, c == clean[place[i]].item()))
        loss = l_x + args.pseudo_weight * l_u + args.consistency_weight * l_c
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step()
        steps.append([loss.item(), l_x.item(), l_u.item(), l_c.item()])
        hits += (z_w.argmax(1) == labels[index]).tolist()
    tags = ("loss/total", "loss/labelled", "loss/pseudo", "loss/consistency")
    scalars = dict(zip(tags, map(mean, zip(*steps)))) | {"accuracy/train": mean(hits)}
    if semi:
        above, below = ([right for sure, right in pseudo if sure == kind] for kind in (True, False))
        scalars["pseudo/share"] = mean(sure for sure, _ in pseudo) if pseudo else 0
        scalars["pseudo/accuracy_above"] = mean(above) if above else 0
        scalars["pseudo/accuracy_below"] = mean(below) if below else 0
    return scalars


def plain_division_scalars(division, labels, clean, scores):
    kept, right, y = division.labelled, (labels == clean).tolist(), labels.tolist()
    recalls = [[k for k, r, c in zip(kept, right, y) if r and c == own] for own in range(CLASSES)]
    return {
        "labelled/share": mean(kept),
        "weight/margin": division.margins,
        "weight/rate": division.rates,
        "labelled/purity": mean(r for k, r in zip(kept, right) if k),
        "labelled/recall": mean(k for k, r in zip(kept, right) if r),
        "labelled/auroc": roc_auc_score(right, scores),
        "labelled/class_recall": [mean(recall) if recall else None for recall in recalls],
    }


def same_weights(plain, state):
    for name, value in plain.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=2e-5)
    assert set(plain.state_dict()) == set(state)


def same_scalars(scalars, expected, rel=1e-4):
    assert set(scalars) == set(expected)
    for tag, value in expected.items():
        if isinstance(value, list):
            values = [(a, b) for a, b in zip(scalars[tag], value, strict=True) if a is not None or b is not None]
            scalar, value = map(list, zip(*values))
        else:
            scalar = scalars[tag]
        assert scalar == pytest.approx(value, rel=rel, abs=1e-6), tag


def same_division(division, expected):
    assert division.labelled.tolist() == expected.labelled and division.admitted.tolist() == expected.admitted
    for name in ("losses", "margins", "rates", "clean"):
        found = getattr(division, name).tolist()
        assert found == pytest.approx(getattr(expected, name), rel=1e-4, abs=2e-4 if name == "clean" else 1e-6), name
    assert (division.log_shares is None) == (expected.log_shares is None)
    if expected.log_shares:
        assert division.log_shares.tolist() == pytest.approx(expected.log_shares)


@pytest.fixture
def fixed(monkeypatch):
    """fixed(*flags) -> arguments, network, its average, optimiser, batches, images, labels, clean labels."""
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)

    def make(*flags):
        argv = ["--epochs", "6", "--warm-up", "2", "--precision", "fp32", "--lr", "0.01", "--head-lr", "0.1"]
        args, generator = twostage.parse_args([*argv, "--ema", "0.6", *flags]), torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        clean = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))
        labels = torch.where(torch.arange(COUNT) % 4 == 1, (clean * 3 + 1) % CLASSES, clean)
        patterns = normal(CLASSES, 3, 4, 4).repeat_interleave(5, 2).repeat_interleave(5, 3)
        images = 1.2 * patterns[clean] + 0.8 * normal(COUNT, 3, 20, 20)
        strong = 0.7 * images + 0.7 * normal(COUNT, 3, 20, 20)
        order = torch.randperm(COUNT, generator=generator).split([20, 30, 9, COUNT - 59])
        batches = [((images[index].flip(-1), strong[index]), index) for index in order]
        network = twostage.make_network(args, CLASSES)
        optimizer, _ = twostage.make_optimizer(network, args)
        return args, network, Averaged(network, args.ema), optimizer, batches, images, labels, clean

    return make


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--mixture", "class", "--detect-by", "ce", "--clean-above", "0.7"],
        ["--floor", "one"],
        ["--rebalance", "logits"],
        ["--rebalance", "none"],
        ["--no-semi"],
        ["--no-detect"],
        ["--no-detect", "--floor", "one"],
        ["--alpha", "1", "--pseudo-weight", "0.5", "--consistency-weight", "0.7", "--margin-scale", "0.93"],
    ],
)
def test_both_stages_are_the_plain_ones(flags, fixed):
    args, network, averaged, optimizer, batches, images, labels, clean = fixed(*flags)
    plain, average, steps = Plain(), Plain(), [0]
    plain.load_state_dict(network.state_dict())
    average.load_state_dict(network.state_dict())
    adam, given, history = plain_optimizer(plain, args), labels.clone(), []

    def after_step():
        steps[0] += 1
        ema_update(average, plain, args.ema, steps[0])

    for epoch in range(1, args.epochs + 1):
        probs = twostage.predict(averaged.module, [images[:50], images[50:]], args)
        torch.testing.assert_close(probs, predicted(average, images), rtol=1e-4, atol=1e-5)
        found = predicted(average, images)
        if not (args.detect and epoch > args.warm_up):
            probs = found = F.one_hot(labels, CLASSES).float()
        division = twostage.divide(probs, given, epoch - args.warm_up, args)
        expected = plain_division(found, labels, epoch - args.warm_up, args)
        same_division(division, expected)
        scalars = twostage.division_scalars(division, given, clean)
        same_scalars(scalars, plain_division_scalars(expected, labels, clean, division.clean))
        semi = args.semi and args.detect and epoch > args.warm_up
        seen = batches if semi else [((weak, None), index) for (weak, _), index in batches]
        scalars = twostage.train_one_epoch(network, averaged, optimizer, seen, given, division, clean, epoch, args)
        same_scalars(scalars, plain_epoch(plain, adam, seen, labels, expected, clean, semi, args, after_step))
        same_weights(plain, network.state_dict())
        same_weights(average, averaged.module.state_dict())
        history.append(scalars | vars(expected))
    assert torch.equal(given, labels)
    if args.semi and args.detect:  # every branch was taken
        used = history[args.warm_up :]
        assert any(line["loss/pseudo"] > 0 for line in used) and all(line["loss/consistency"] > 0 for line in used)
        assert any(0.8 < margin < 1 for line in used for margin in line["margins"])
        refused = [not a for line in used for a, kept in zip(line["admitted"], line["labelled"]) if not kept]
        assert any(refused) == (args.rebalance == "rates")
    assert all(history[e]["labelled"] == [True] * COUNT for e in range(args.warm_up))


def divided(probs, labels, cycle, *flags):
    return twostage.divide(torch.tensor(probs), torch.tensor(labels), cycle, twostage.parse_args(list(flags)))


def test_margins_grow_with_the_cycles():
    margins = [divided([[1.0, 0.0]] * 4, [0] * 4, cycle).margins[0].item() for cycle in (-5, 0, 1, 2, 3, 4, 30)]
    scales = [0.97 / (1 + math.exp(-cycle)) for cycle in (2, 3, 4, 30)]
    assert margins == pytest.approx([0.8, 0.8, 0.8, *scales])


def test_logits_are_moved_in_cycles_alone():
    probs, labels = [[1.0, 0.0, 0.0]] * 3 + [[0.0, 1.0, 0.0]], [0, 0, 0, 1]
    for cycle in (-1, 0):
        assert divided(probs, labels, cycle, "--rebalance", "logits").log_shares is None
    moved = divided(probs, labels, 1, "--rebalance", "logits").log_shares
    assert moved.exp().tolist() == pytest.approx([0.75, 0.25, 0.25])  # a class without labels counts as one label
    for other in ("rates", "none"):
        assert divided(probs, labels, 1, "--rebalance", other).log_shares is None


def test_a_class_that_nobody_is_labelled_costs_no_other_its_rate():
    probs, labels = [[1.0, 0.0, 0.0]] * 8 + [[0.0, 1.0, 0.0]], [0] * 8 + [1]
    assert divided(probs, labels, 1).rates.tolist() == pytest.approx([0.5, 1, 1])


def test_predictions_are_the_softmax_in_evaluation_mode(fixed):
    args, network, averaged, optimizer, batches, images, labels, clean = fixed("--size", "20")
    division = divided([[1 / CLASSES] * CLASSES] * COUNT, labels.tolist(), 0)
    twostage.train_one_epoch(network, averaged, optimizer, batches, labels, division, clean, 1, args)
    plain, generator = Plain(), torch.Generator().manual_seed(1)
    plain.load_state_dict(network.state_dict())
    pixels = torch.randint(0, 256, (9, 3, 20, 20), dtype=torch.uint8, generator=generator)
    x = (pixels / 255 - torch.tensor(common.MEAN)[:, None, None]) / torch.tensor(common.STD)[:, None, None]
    expected = predicted(plain, x)
    torch.testing.assert_close(twostage.predict(network.train(), [x[:4], x[4:]], args), expected)
    probs, none = twostage.restore([network.state_dict()], args, CLASSES, torch.device("cpu"))(pixels)
    torch.testing.assert_close(probs, expected)
    assert none is None


# The script


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take nine tenths of the time of a tiny run."""
    monkeypatch.setattr(figures, "write", lambda path, draw: None)


@pytest.fixture
def record(tiny, undrawn, tmp_path, monkeypatch):
    """record(*flags) -> arguments, the batches that the loader handed out, by epoch, the run's folder."""

    def run(*flags):
        epochs, epoch_of = [], common.Loader.epoch

        def epoch(self, *arguments, **options):
            epochs.append([])
            for batch in epoch_of(self, *arguments, **options):
                epochs[-1].append(batch)
                yield batch

        argv = [*tiny, "--crop", "2", *flags, "--out", str(tmp_path), "--name", f"run{len(list(tmp_path.iterdir()))}"]
        with monkeypatch.context() as patch:
            patch.setattr(common.Loader, "epoch", epoch)
            assert twostage.main(argv) == 0
        args = twostage.parse_args(argv)
        return args, epochs, tmp_path / args.name

    return run


def toy_inputs(split, size=32):
    """The unaugmented network inputs (N, 3, H, W) of a split and its clean labels, from the faces themselves."""
    rows = range(toyfaces.SPLITS[split])
    images = torch.stack([torch.from_numpy(toyfaces.draw_face(split, i, size=size)[0]).permute(2, 0, 1) for i in rows])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (images / 255 - mean) / std, torch.tensor([toyfaces.expression(split, i)[0] for i in rows])


def audit_of(folder):
    """Of labels.csv the given labels and the scores, in the order of the training set."""
    with open(folder / "labels.csv") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["name"])
    return torch.tensor([toyfaces.CLASSES.index(row["given"]) for row in rows]), [float(row["score"]) for row in rows]


@pytest.mark.parametrize(
    "flags",
    [
        ["--warm-up", "1", "--epochs", "4", "--decay", "0.5", "--mixture", "class"],
        ["--warm-up", "0", "--oversample"],
        ["--warm-up", "2", "--epochs", "4", "--rebalance", "logits"],
        ["--warm-up", "1", "--no-detect"],
        ["--warm-up", "1", "--floor", "one", "--no-semi", "--seed", "3"],
        ["--warm-up", "3", "--epochs", "8", "--head-lr", "0.3", "--margin-scale", "1"],
    ],
)
def test_main_hands_the_right_things_to_both_stages(flags, record):
    args, epochs, folder = record("--lr", "0.01", "--head-lr", "0.003", "--ema", "0.6", *flags)
    history, (given, scores), (faces, clean) = lines(folder), audit_of(folder), toy_inputs("train")
    plain, average, steps = Plain(), Plain(), [0]
    plain.load_state_dict(twostage.make_network(args, CLASSES).state_dict())
    average.load_state_dict(plain.state_dict())
    adam, (test, test_labels) = plain_optimizer(plain, args), toy_inputs("test")

    def after_step():
        steps[0] += 1
        ema_update(average, plain, args.ema, steps[0])

    assert len(epochs) == len(history) == args.epochs
    assert (given != clean).float().mean() == pytest.approx(0.4, abs=0.03)
    for epoch, (batches, line) in enumerate(zip(epochs, history), 1):
        detecting = args.detect and epoch > args.warm_up
        probs = predicted(average, faces) if detecting else F.one_hot(given, CLASSES)
        division = plain_division(probs, given, epoch - args.warm_up, args)
        kept, drawn = torch.tensor(division.labelled), torch.cat([index for _, index in batches])
        times = torch.bincount(drawn, minlength=len(given))
        if args.oversample:
            of_class = [times[kept & (given == c)].sum().item() for c in set(given.tolist())]
            assert max(of_class) - min(of_class) <= 1 and times.sum() == len(given)
            assert (times[~kept] == 1).all()
        else:
            assert (times == 1).all()
        semi = args.semi and detecting
        assert {len(index) for _, index in batches} == {args.batch_size}
        assert all((strong is None) == (not semi) for (_, strong), _ in batches)  # not made in vain
        expected = plain_division_scalars(division, given, clean, torch.tensor(division.clean).float())
        expected |= plain_epoch(plain, adam, batches, given, division, clean, semi, args, after_step)
        expected["lr"] = args.lr * args.decay ** (epoch - 1)
        for tag in [tag for tag, values in expected.items() if isinstance(values, list)]:
            values = zip(toyfaces.CLASSES, expected.pop(tag))
            expected |= {f"{tag}/{name}": value for name, value in values if value is not None}
        same_scalars({tag: line[tag] for tag in expected}, expected, rel=1e-3)
        for group in adam.param_groups:
            group["lr"] *= args.decay
        assert line["accuracy/test"] == (predicted(average, test).argmax(1) == test_labels).double().mean()
    assert (history[-1]["labelled/share"] < 1) == args.detect and not torch.equal(epochs[0][0][1], epochs[1][0][1])
    if args.margin_scale == 1:  # a network that is sure: margins depend on the number of cycles, pseudo-labels are used
        assert max(division.margins) > 0.8 and any(line["loss/pseudo"] > 0.01 for line in history)
    same_weights(average, torch.load(folder / "model.pt", weights_only=True)["networks"][0])
    probs = predicted(average, faces)
    assert scores == pytest.approx((probs.amax(1) - probs[range(len(given)), given]).tolist(), abs=1e-4)


def test_the_order_follows_the_seed(record):
    first, again, other = (record("--epochs", "1", "--seed", seed)[1][0] for seed in ("1", "1", "2"))
    orders = [torch.cat([index for _, index in batches]) for batches in (first, again, other)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_the_views_are_what_the_flags_say(record):
    """Without operations both views are equal; at magnitude 0 one leaves a face, inverts it or spreads its values."""

    def pixels(x):
        return (x * torch.tensor(common.STD)[:, None, None] + torch.tensor(common.MEAN)[:, None, None]) * 255

    def views(*flags):
        _, epochs, _ = record("--epochs", "2", "--warm-up", "0", *flags)
        weak, strong = (torch.cat([pixels(views[k]) for batches in epochs for views, _ in batches]) for k in (0, 1))
        return weak, strong, faces[torch.cat([index for batches in epochs for _, index in batches])]

    def equal(a, b):
        return (a - b).abs().amax((1, 2, 3)) < 0.01

    faces = pixels(toy_inputs("train")[0])
    weak, strong, plain = views("--crop", "0", "--operations", "0")
    mirrored = equal(weak, plain.flip(-1))
    assert (equal(weak, plain) | mirrored).all() and 0.3 < mirrored.float().mean() < 0.7 and torch.equal(weak, strong)
    weak, strong, plain = views("--operations", "1", "--magnitude", "0")
    assert (equal(weak, plain) | equal(weak, plain.flip(-1))).float().mean() < 0.2  # one crop of 25
    same, inverted = equal(weak, strong), equal(weak, 255 - strong)
    assert 0.6 < same.float().mean() < 0.9 and 0.01 < inverted.float().mean() < 0.2
    _, stronger, _ = views("--operations", "1", "--magnitude", "30")
    assert equal(weak, stronger).float().mean() < 0.4
    _, twice, _ = views("--operations", "2", "--magnitude", "0")
    assert equal(weak, twice).float().mean() < same.float().mean() - 0.1


def run(tiny, tmp_path, *flags):
    name = "run" + "".join(flags)
    assert twostage.main([*tiny, "--warm-up", "1", *flags, "--out", str(tmp_path), "--name", name]) == 0
    return lines(tmp_path / name)


def test_a_run_logs_the_division_and_the_pseudo_labels(tiny, tmp_path):
    history = run(tiny, tmp_path)
    assert history[0]["labelled/share"] == 1 and history[0]["labelled/purity"] == pytest.approx(0.6, abs=0.03)
    assert "pseudo/share" not in history[0]
    for line in history[1:]:
        assert 0 < line["labelled/share"] < 1 and 0 <= line["labelled/auroc"] <= 1 and line["loss/consistency"] > 0
        assert 0 <= line["pseudo/share"] <= 1 and {"pseudo/accuracy_above", "pseudo/accuracy_below"} <= set(line)
        weighted = line["loss/labelled"] + line["loss/pseudo"] + 0.1 * line["loss/consistency"]
        assert line["loss/total"] == pytest.approx(weighted, abs=1e-5)
        for name in toyfaces.CLASSES:
            assert 0.8 <= line[f"weight/margin/{name}"] <= 1 and 0 <= line[f"weight/rate/{name}"] <= 1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.step for e in events.Scalars("labelled/recall")] == [1, 2, 3]
    assert "mixtures" in events.Tags()["images"]
    header, *rows = (tmp_path / "run" / "labels.csv").read_text().splitlines()
    assert all(row.split(",")[1] == row.split(",")[2] for row in rows)  # it corrects no label


def test_gaussians_are_drawn_where_a_mixture_is_fitted():
    given, probs = torch.arange(40) % 2, torch.rand(40, 2, generator=torch.Generator().manual_seed(1)).softmax(1)
    args = twostage.parse_args(["--warm-up", "1"])
    cases = ("class", ["happy", "sad"], [2, 2]), ("global", ["all classes", "happy", "sad"], [2, 0, 0])
    for mixture, titles, curves in cases:
        division = twostage.divide(probs, given, 1, args)
        train = SimpleNamespace(labels=given, clean=None, classes=("happy", "sad"))
        axes = figures.mixtures(division.losses, train, fit_mixture, mixture == "class").axes
        assert [a.get_title() for a in axes] == titles and [len(a.lines) for a in axes] == curves


def test_ablations_are_told_apart(tiny, undrawn, tmp_path):
    whole, undetected = run(tiny, tmp_path), run(tiny, tmp_path, "--no-detect")
    labelled, baseline = run(tiny, tmp_path, "--no-semi"), run(tiny, tmp_path, "--no-detect", "--no-semi")
    none, logits = run(tiny, tmp_path, "--rebalance", "none"), run(tiny, tmp_path, "--rebalance", "logits")
    one = run(tiny, tmp_path, "--mixture", "class")
    for other in (undetected, labelled, baseline, none, logits, one):
        assert other[0]["loss/total"] == whole[0]["loss/total"]  # the warm-up is the same
    assert all(line["labelled/share"] == 1 for line in undetected + baseline)
    assert all(line["loss/pseudo"] == line["loss/consistency"] == 0 for line in labelled + undetected + baseline)
    assert labelled[1]["labelled/share"] == whole[1]["labelled/share"] < 1
    assert run(tiny, tmp_path, "--detect-by", "ce")[1]["labelled/auroc"] != whole[1]["labelled/auroc"]
    assert all(line["weight/rate/neutral"] == 1 for line in none + logits) and whole[1]["weight/rate/happiness"] < 1
    assert logits[1]["loss/labelled"] != none[1]["loss/labelled"]
    assert one[1]["labelled/share"] != whole[1]["labelled/share"]


@pytest.mark.parametrize("flags, times", [(["--warm-up", "2"], 2), (["--warm-up", "0", "--no-detect"], 1)])
def test_the_training_set_is_predicted_by_cycles_that_detect_and_at_the_end(
    flags, times, tiny, undrawn, tmp_path, monkeypatch
):
    sizes, predict = [], twostage.predict

    def counted(*arguments):
        probs = predict(*arguments)
        sizes.append(len(probs))
        return probs

    monkeypatch.setattr(twostage, "predict", counted)
    run(tiny, tmp_path, "--epochs", "3", *flags)
    assert sorted(sizes) == [toyfaces.SPLITS["test"]] * 3 + [toyfaces.SPLITS["train"]] * times


def test_the_averaged_network_is_what_is_kept(tiny, undrawn, tmp_path):
    run(tiny, tmp_path, "--ema", "0")
    run(tiny, tmp_path)
    states = {name: torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("run--ema0", "run")}
    for name, state in states.items():
        model = torch.load(tmp_path / name / "model.pt", weights_only=True)["networks"][0]
        assert all(torch.equal(model[key], state["averaged"]["module." + key]) for key in model)
        same = all(torch.equal(model[key], state["network"][key]) for key in model)
        assert same == (name == "run--ema0")


def test_a_stopped_run_ends_as_if_it_was_not(tiny, undrawn, tmp_path, monkeypatch):
    check_resume(twostage.main, [*tiny, "--warm-up", "1"], tmp_path, monkeypatch)


@pytest.mark.parametrize("size", ["2", "3"])
def test_batches_of_two_and_three_run(size, tiny, undrawn, tmp_path):
    argv = [*tiny, "--batch-size", size, "--warm-up", "0", "--epochs", "2", "--out", str(tmp_path), "--name", "run"]
    assert twostage.main(argv) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--warm-up", "-1"], "warm-up"),
        (["--ema", "1"], "ema"),
        (["--clean-above", "1"], "clean-above"),
        (["--rebalance", "some"], "rebalance"),
        (["--rebalance", "logits", "--oversample"], "give one of them"),
        (["--rebalance", "logits", "--data", "affectnet"], "--no-oversample"),
        (["--mixture", "some"], "mixture"),
        (["--floor", "some"], "floor"),
        (["--detect-by", "some"], "detect-by"),
        (["--alpha", "-1"], "alpha"),
        (["--margin-scale", "2"], "margin-scale"),
    ],
)
def test_bad_values_are_refused(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 48, "valid": 16, "test": 16})
    assert twostage.main([*arguments, "--size", "32", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
