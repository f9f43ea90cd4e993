"""NCCTFER: losses and rules against hand-computed cases, then the script itself, in-process, on tiny input."""

import math

import pytest
import torch
from conftest import check_resume, lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support import toyfaces

import ncctfer
from ncctfer import class_thresholds, confident, negative_consistency, supervised_loss

P = torch.tensor([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])
Y = torch.tensor([0, 0, 1, 1])


# class_thresholds and confident, Eqs. 1-2


def test_thresholds_are_the_mean_probability_of_the_own_class_and_0_for_an_absent_one():
    torch.testing.assert_close(class_thresholds(P, Y, 3), torch.tensor([0.6, 0.375, 0.0]))


def test_confident_samples_reach_the_threshold_of_their_label():
    assert confident(P, Y, class_thresholds(P, Y, 3)).tolist() == [True, False, False, True]
    assert confident(P, Y, torch.tensor([0.4, 0.5, 0.9])).tolist() == [True, True, False, True]  # equal is enough


@pytest.mark.parametrize("n", [1, 2, 3, 7, 49])
def test_equal_probabilities_are_all_confident(n):
    for value in (0.1, 1 / 3, 0.7, 0.9999):
        probs = torch.full((n, 2), 1 - value)
        probs[:, 0] = value
        labels = torch.zeros(n, dtype=torch.int64)
        assert confident(probs, labels, class_thresholds(probs, labels, 2)).all()


def test_every_class_of_a_batch_has_a_confident_sample():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        probs, labels = torch.randn(20, 7, generator=generator).softmax(1), torch.randint(7, (20,), generator=generator)
        sure = confident(probs, labels, class_thresholds(probs, labels, 7))
        assert set(labels[sure].tolist()) == set(labels.tolist())


# supervised_loss, Eq. 3


def test_supervised_loss_is_the_mean_over_the_confident_samples():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [9.0, -9.0]], requires_grad=True)
    loss = supervised_loss(logits, torch.tensor([0, 1, 1]), torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.375, 0.375], [0.25, -0.25], [0.0, 0.0]]))


def test_without_a_confident_sample_the_loss_is_0_and_differentiable():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = supervised_loss(logits, torch.tensor([0, 1]), torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# negative_consistency, Eq. 4


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.parametrize("k, mask, expected", [
    (1, "most", -0.5 * math.log(0.2)), (2, "most", -0.5 * math.log(0.2) - 0.3 * math.log(0.3)), (1, "least", -0.2 * math.log(0.5)),
    (3, "most", -0.5 * math.log(0.2) - 0.3 * math.log(0.3) - 0.2 * math.log(0.5)), (3, "least", -0.5 * math.log(0.2) - 0.3 * math.log(0.3) - 0.2 * math.log(0.5)),
])
def test_consistency_by_hand(k, mask, expected):
    weak, strong = logits_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), logits_of([0.2, 0.3, 0.5], [0.6, 0.2, 0.2])
    got = negative_consistency(weak, strong, torch.tensor([False, True]), k, mask)
    assert got.item() == pytest.approx(expected / 2, rel=1e-9)  # the confident sample counts in N alone


def test_the_gradient_flows_through_the_strong_view_of_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    weak, strong = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)
    weak.requires_grad_()
    strong.requires_grad_()
    sure = torch.tensor([True, False, False, True])
    negative_consistency(weak, strong, sure, k=3).backward()
    assert weak.grad is None
    p_w, p_s = weak.detach().softmax(1), strong.detach().softmax(1)
    kept = p_w * (p_w >= p_w.topk(3, dim=1).values[:, -1:])
    expected = (p_s * kept.sum(1, keepdim=True) - kept) * ~sure[:, None] / 4
    torch.testing.assert_close(strong.grad, expected)


def test_consistency_of_a_confident_batch_is_0():
    z = torch.randn(3, 4, requires_grad=True)
    loss = negative_consistency(z.detach(), z, torch.ones(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not z.grad.any()


def test_equal_views_leave_the_entropy_when_all_classes_are_kept():
    z = torch.randn(5, 4, dtype=torch.float64)
    p = z.softmax(1)
    got = negative_consistency(z, z, torch.zeros(5, dtype=torch.bool), k=4)
    assert got.item() == pytest.approx(-(p * p.log()).sum().item() / 5)


# The script


@pytest.fixture
def tiny(tiny):
    return [*tiny, "--warm-up", "1", "--crop", "2"]


def test_a_run_logs_thresholds_and_the_confident_set(tiny, tmp_path):
    assert ncctfer.main([*tiny, "--out", str(tmp_path), "--name", "run"]) == 0
    history = lines(tmp_path / "run")
    assert history[0]["loss/negative"] == 0 and all(line["loss/negative"] > 0 for line in history[1:])
    for line in history:
        assert line["loss/total"] == pytest.approx(line["loss/supervised"] + line["loss/negative"], abs=1e-5)
        assert 0 < line["confident/share"] < 1 and 0 <= line["confident/recall"] <= 1 and 1 <= line["negative/classes"] <= 7
        assert all(0 < line[f"weight/threshold/{name}"] < 1 for name in toyfaces.CLASSES)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.step for e in events.Scalars("confident/purity")] == [1, 2, 3]
    assert {"confidence", "audit", "confusion"} <= set(events.Tags()["images"])
    header, *rows = (tmp_path / "run" / "labels.csv").read_text().splitlines()
    assert all(row.split(",")[1] == row.split(",")[2] for row in rows)  # it corrects no label


def test_ablations_are_told_apart(tiny, tmp_path):
    def run(*flags):
        name = "run" + "".join(flags)
        assert ncctfer.main([*tiny, *flags, "--out", str(tmp_path), "--name", name]) == 0
        return lines(tmp_path / name)

    whole, baseline, confident_only, single = run(), run("--no-threshold", "--no-negative"), run("--no-negative"), run("--single-head")
    assert all(line["loss/negative"] == 0 for line in baseline + confident_only)
    assert whole[0]["loss/supervised"] == baseline[0]["loss/supervised"]  # the warm-up is the same
    assert whole[1]["loss/supervised"] < baseline[1]["loss/supervised"]
    assert single[1]["loss/negative"] != whole[1]["loss/negative"]
    least, k1 = run("--mask", "least"), run("--k", "1")
    assert len({line[1]["loss/negative"] for line in (whole, least, k1)}) == 3


def test_a_stopped_run_ends_as_if_it_was_not(tiny, tmp_path, monkeypatch):
    check_resume(ncctfer.main, tiny, tmp_path, monkeypatch)


@pytest.mark.parametrize("size", ["2", "3"])
def test_batches_of_two_and_three_run(size, tiny, tmp_path):
    assert ncctfer.main([*tiny, "--batch-size", size, "--epochs", "2", "--out", str(tmp_path), "--name", "run"]) == 0


@pytest.mark.parametrize("arguments, words", [
    (["--k", "0"], "k"), (["--k", "8"], "--k 8"), (["--no-threshold"], "--no-negative"), (["--single-head", "--no-negative"], "--single-head"),
    (["--magnitude", "31"], "magnitude"), (["--warm-up", "-1"], "warm-up"), (["--mask", "some"], "mask"),
])
def test_bad_values_are_refused(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 48, "valid": 16, "test": 16})
    assert ncctfer.main([*arguments, "--size", "32", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_the_pretrained_preset_is_the_papers_and_the_mask_follows_the_heads():
    args = ncctfer.parse_args(["--data", "raf", "--pretrained", "x.pth"])
    assert (args.size, args.epochs, args.batch_size, args.lr, args.head_lr, args.k, args.decay, args.warm_up) == (224, 40, 128, 1e-4, 1e-3, 4, 1.0, 4)
    assert (args.crop, args.operations, args.magnitude, args.mask) == (4, 2, 10, "most")
    assert ncctfer.parse_args(["--single-head"]).mask == "least"
