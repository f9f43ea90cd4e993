"""The two-stage cycle: mixtures against scikit-learn's, margins, rates and losses by hand, then the script, in-process, on tiny input."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import check_resume, lines
from sklearn.mixture import GaussianMixture
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support import figures, toyfaces

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
    assert (probs - torch.eye(2)[labels]).abs().sum(1).tolist() == [2 * loss for loss in (0.25, 1.0)]  # the mean absolute error, halved
    assert detection_losses(probs, labels, "ce").tolist() == pytest.approx([-math.log(0.75), -math.log(1e-8)])


def test_outliers_among_wrong_labels_split_the_mixture_of_cross_entropies_only():
    """Of 100 wrong labels 20 have a loss of 6 to 10: with cross-entropy the mixture sets these apart, and calls the rest clean."""
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
    assert (clean_probability(losses)[len(a):] < 0.5).all()  # a global one takes the class of large losses for noise


def test_a_class_of_one_kind_of_label_is_split_by_a_mixture_of_its_own():
    """Hardly a label of class 0 is wrong, hardly one of class 1 right (a common and a rare class under symmetric noise)."""
    right, wrong = [torch.linspace(0, 0.1, 80), torch.linspace(0.4, 0.5, 40)], [torch.linspace(0.7, 0.8, 40), torch.linspace(0.95, 1, 80)]
    losses, labels = torch.cat(right + wrong), torch.arange(240) // 120
    assert torch.equal(clean_probability(losses) > 0.5, labels == 0)
    assert (clean_probability(losses, labels) > 0.5).nonzero()[:, 0].tolist() == [*range(80), *range(120, 160)]


def test_the_labelled_set_is_empty_for_no_class():
    kept = labelled_set(torch.tensor([0.9, 0.5, 0.1, 0.2]), torch.tensor([0.1, 0.2, 3.0, 2.0]), torch.tensor([0, 0, 1, 1]))
    assert kept.tolist() == [True, False, False, True]


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
    l_u, l_c, sure = unlabelled_losses(logits[:0], logits[:0], torch.full((2,), 0.8), torch.zeros(0, dtype=torch.bool), 3)
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
    equal = torch.tensor([[math.log(4.0), 0.0]])  # exactly at the margin: strictly above is asked for
    assert unlabelled_losses(equal.double(), equal.double(), equal.double().softmax(1)[0, :1].repeat(2), torch.tensor([True]), 1)[2].tolist() == [False]


# The script


def run(tiny, tmp_path, *flags):
    name = "run" + "".join(flags)
    assert twostage.main([*tiny, "--warm-up", "1", *flags, "--out", str(tmp_path), "--name", name]) == 0
    return lines(tmp_path / name)


def test_a_run_logs_the_division_and_the_pseudo_labels(tiny, tmp_path):
    history = run(tiny, tmp_path)
    assert history[0]["labelled/share"] == 1 and history[0]["labelled/purity"] == pytest.approx(0.6, abs=0.03) and "pseudo/share" not in history[0]
    for line in history[1:]:
        assert 0 < line["labelled/share"] < 1 and 0 <= line["labelled/auroc"] <= 1 and line["loss/consistency"] > 0
        assert 0 <= line["pseudo/share"] <= 1 and {"pseudo/accuracy_above", "pseudo/accuracy_below"} <= set(line)
        assert line["loss/total"] == pytest.approx(line["loss/labelled"] + line["loss/pseudo"] + 0.1 * line["loss/consistency"], abs=1e-5)
        assert all(0.8 <= line[f"weight/margin/{name}"] <= 1 and 0 <= line[f"weight/rate/{name}"] <= 1 for name in toyfaces.CLASSES)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.step for e in events.Scalars("labelled/recall")] == [1, 2, 3] and "mixtures" in events.Tags()["images"]
    header, *rows = (tmp_path / "run" / "labels.csv").read_text().splitlines()
    assert all(row.split(",")[1] == row.split(",")[2] for row in rows)  # it corrects no label


def test_gaussians_are_drawn_where_a_mixture_is_fitted():
    given, probs = torch.arange(40) % 2, torch.rand(40, 2, generator=torch.Generator().manual_seed(1)).softmax(1)
    args = twostage.parse_args(["--warm-up", "1"])
    for mixture, titles, curves in (("class", ["happy", "sad"], [2, 2]), ("global", ["all classes", "happy", "sad"], [2, 0, 0])):
        division = twostage.divide(probs, given, 1, args)
        train = SimpleNamespace(labels=given, clean=None, classes=("happy", "sad"))
        axes = figures.mixtures(division.losses, train, fit_mixture, mixture == "class").axes
        assert [a.get_title() for a in axes] == titles and [len(a.lines) for a in axes] == curves


def test_ablations_are_told_apart(tiny, tmp_path):
    whole, undetected, labelled, baseline = run(tiny, tmp_path), run(tiny, tmp_path, "--no-detect"), run(tiny, tmp_path, "--no-semi"), run(tiny, tmp_path, "--no-detect", "--no-semi")
    assert len({lines[0]["loss/total"] for lines in (whole, undetected, labelled, baseline)}) == 1  # the warm-up is the same
    assert all(line["labelled/share"] == 1 for line in undetected + baseline)
    assert all(line["loss/pseudo"] == line["loss/consistency"] == 0 for line in labelled + undetected + baseline)
    assert labelled[1]["labelled/share"] == whole[1]["labelled/share"] < 1
    none, logits, one = run(tiny, tmp_path, "--rebalance", "none"), run(tiny, tmp_path, "--rebalance", "logits"), run(tiny, tmp_path, "--mixture", "global")
    assert run(tiny, tmp_path, "--detect-by", "ce")[1]["labelled/auroc"] != whole[1]["labelled/auroc"]
    assert all(line["weight/rate/neutral"] == 1 for line in none + logits) and whole[1]["weight/rate/happiness"] < 1
    assert logits[1]["loss/labelled"] != none[1]["loss/labelled"] and one[1]["labelled/share"] != whole[1]["labelled/share"]


def test_the_averaged_network_is_what_is_kept(tiny, tmp_path):
    run(tiny, tmp_path, "--ema", "0")
    run(tiny, tmp_path)
    states = {name: torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("run--ema0", "run")}
    for name, state in states.items():
        model = torch.load(tmp_path / name / "model.pt", weights_only=True)["networks"][0]
        assert all(torch.equal(model[key], state["averaged"]["module." + key]) for key in model)
        same = all(torch.equal(model[key], state["network"][key]) for key in model)
        assert same == (name == "run--ema0")


def test_a_stopped_run_ends_as_if_it_was_not(tiny, tmp_path, monkeypatch):
    check_resume(twostage.main, [*tiny, "--warm-up", "1"], tmp_path, monkeypatch)


@pytest.mark.parametrize("size", ["2", "3"])
def test_batches_of_two_and_three_run(size, tiny, tmp_path):
    assert twostage.main([*tiny, "--batch-size", size, "--warm-up", "0", "--epochs", "2", "--out", str(tmp_path), "--name", "run"]) == 0


@pytest.mark.parametrize("arguments, words", [
    (["--warm-up", "-1"], "warm-up"), (["--ema", "1"], "ema"), (["--clean-above", "1"], "clean-above"), (["--rebalance", "some"], "rebalance"),
    (["--mixture", "some"], "mixture"), (["--detect-by", "some"], "detect-by"), (["--alpha", "-1"], "alpha"), (["--margin-scale", "2"], "margin-scale"),
])
def test_bad_values_are_refused(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 48, "valid": 16, "test": 16})
    assert twostage.main([*arguments, "--size", "32", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
