"""Co-curing: losses and rules against hand-computed cases, then the script itself, in-process, on tiny input."""

import copy
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import runs, toyfaces

import numpy as np
import pytest
import torch
from conftest import (
    build_ferplus,
    build_ferplus_csv,
    build_folder,
    build_folder_splits,
    build_raf,
    build_raf_kaggle,
    lines,
    same_end,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import cocuring
import common
from cocuring import peer_losses, ramp_up, relabel

ROOT = Path(cocuring.__file__).parent


# ramp_up, Eq. 3


@pytest.mark.parametrize(
    "epoch, expected",
    [(1, 0.9 * math.exp(-0.65 * 0.9**2)), (5, 0.9 * math.exp(-0.65 * 0.25)), (10, 0.9), (11, 0.9), (40, 0.9)],
)
def test_ramp_up_follows_eq_3_and_stays_at_its_maximum(epoch, expected):
    assert ramp_up(epoch, 10) == pytest.approx(expected, rel=1e-12)


def test_ramp_up_takes_a_fractional_length():
    assert ramp_up(1, 21.6, lambda_max=0.5, beta=6) == pytest.approx(
        0.5 * math.exp(-6 * (1 - 1 / 21.6) ** 2), rel=1e-12
    )


def test_ramp_up_starts_near_one_half_with_the_papers_beta():
    assert ramp_up(1, 36) == pytest.approx(0.486, abs=1e-3)


def test_ramp_up_without_mimicry_is_zero_and_with_beta_zero_constant():
    assert [ramp_up(t, 10, lambda_max=0) for t in (1, 10, 20)] == [0, 0, 0]
    assert [ramp_up(t, 10, beta=0) for t in (1, 5, 20)] == [0.9, 0.9, 0.9]


# peer_losses, Eqs. 1-2


def reference_losses(z1, z2, y, lam):
    """Eqs. 1-2 in float64, sample by sample."""
    losses = [0.0, 0.0]
    for a, b, label in zip(np.asarray(z1, float), np.asarray(z2, float), y):
        p1, p2 = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        losses[0] += (1 - lam) * -np.log(p1[label]) + lam * sum(q * np.log(q / p) for p, q in zip(p1, p2))
        losses[1] += (1 - lam) * -np.log(p2[label]) + lam * sum(p * np.log(p / q) for p, q in zip(p1, p2))
    return [loss / len(y) for loss in losses]


def test_peer_losses_by_hand():
    # p1 = (1/2, 1/2), p2 = (1/4, 3/4), label 0
    loss1, loss2 = peer_losses(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]]), torch.tensor([0]), 0.25)
    kl_21 = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    kl_12 = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert loss1.item() == pytest.approx(0.75 * math.log(2) + 0.25 * kl_21, abs=1e-6)
    assert loss2.item() == pytest.approx(0.75 * math.log(4) + 0.25 * kl_12, abs=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_peer_losses_equal_float64_arithmetic(lam):
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 9, 7, generator=generator) * 4
    y = torch.randint(7, (9,), generator=generator)
    got = peer_losses(z1, z2, y, lam)
    assert [loss.item() for loss in got] == pytest.approx(reference_losses(z1, z2, y.tolist(), lam), rel=1e-5, abs=1e-6)


def test_the_gradient_of_each_loss_is_that_of_its_equation_and_the_peer_gets_none():
    generator = torch.Generator().manual_seed(1)
    z1, z2 = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    z1.requires_grad_()
    z2.requires_grad_()
    y, lam = torch.tensor([0, 1, 2, 3, 0]), 0.6
    loss1, loss2 = peer_losses(z1, z2, y, lam)
    own, peer = torch.autograd.grad(loss1, (z1, z2), retain_graph=True, allow_unused=True)
    # d/dz1 of (1 - lam) CE + lam KL(p2 || p1) is ((1 - lam) (p1 - y) + lam (p1 - p2)) / N
    p1, p2 = z1.softmax(1), z2.softmax(1)
    one_hot = torch.eye(4, dtype=torch.float64)[y]
    torch.testing.assert_close(own, ((1 - lam) * (p1 - one_hot) + lam * (p1 - p2)) / 5)
    assert peer is None or not peer.any()
    peer, own = torch.autograd.grad(loss2, (z1, z2), allow_unused=True)
    torch.testing.assert_close(own, ((1 - lam) * (p2 - one_hot) + lam * (p2 - p1)) / 5)
    assert peer is None or not peer.any()


def test_mimicry_of_an_equal_peer_is_free():
    z, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    loss1, loss2 = peer_losses(z, z.clone(), y, 1.0)
    assert loss1.item() == pytest.approx(0, abs=1e-6) and loss2.item() == pytest.approx(0, abs=1e-6)


def test_peer_losses_stay_finite_for_certain_networks():
    z1, z2 = torch.tensor([[200.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss1, loss2 = peer_losses(z1, z2, torch.tensor([1]), 0.5)
    (loss1 + loss2).backward()
    assert torch.isfinite(torch.stack([loss1, loss2])).all() and torch.isfinite(z1.grad).all()


# relabel, Eq. 4


@pytest.mark.parametrize(
    "p1, p2, label, delta, expected, why",
    [
        ([0.1, 0.7, 0.2], [0.1, 0.6, 0.3], 0, 0.2, 1, "both agree by more than delta"),
        ([0.1, 0.7, 0.2], [0.1, 0.3, 0.6], 0, 0.2, 0, "they disagree about the class"),
        ([0.25, 0.4, 0.35], [0.1, 0.7, 0.2], 0, 0.2, 0, "the first margin is too small"),
        ([0.1, 0.7, 0.2], [0.25, 0.4, 0.35], 0, 0.2, 0, "the second margin is too small"),
        ([0.25, 0.5, 0.25], [0.25, 0.5, 0.25], 0, 0.25, 0, "the margin is delta exactly: strict"),
        ([0.25, 0.5, 0.25], [0.25, 0.5, 0.25], 0, 0.2499, 1, "the margin is just above delta"),
        ([0.8, 0.1, 0.1], [0.8, 0.1, 0.1], 0, 0.0, 0, "the label is the prediction"),
        ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0], 1, 0.99, 2, "certain networks, large delta"),
    ],
)
def test_relabel_case_by_case(p1, p2, label, delta, expected, why):
    got = relabel(torch.tensor([p1]), torch.tensor([p2]), torch.tensor([label]), delta)
    assert got.tolist() == [expected], why


def test_relabel_judges_each_sample_alone_and_leaves_its_input():
    p1 = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 0])
    got = relabel(p1, p1.clone(), labels, 0.5)
    assert got.tolist() == [1, 0, 0] and labels.tolist() == [0, 1, 0]
    assert got.dtype == torch.int64


def test_a_wrong_correction_can_be_taken_back():
    given = torch.tensor([0])
    first = relabel(torch.tensor([[0.1, 0.9]]), torch.tensor([[0.1, 0.9]]), given, 0.2)
    later = relabel(torch.tensor([[0.6, 0.4]]), torch.tensor([[0.6, 0.4]]), given, 0.2)
    assert (first.item(), later.item()) == (1, 0)


# train_one_epoch, Algorithm 1, on batches of one's own


class Small(nn.Module):
    """A backbone and a head of a few dozen weights."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        # (no bias before the batch normalisation: Adam would follow its rounding errors)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.backbone(x))


def small_data():
    """Labels of 44 samples, 40 % wrong, and batches: in each one sample has two views, the last is in none."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.arange(44) % 4
    centres = 2 * torch.randn(4, 3, 2, 2, generator=generator)
    x = centres[clean] + 0.5 * torch.randn(44, 3, 2, 2, generator=generator)
    given = torch.where(torch.rand(44, generator=generator) < 0.4, (clean + 1) % 4, clean)
    parts = torch.randperm(43, generator=generator).split([15, 15, 13])
    places = [torch.cat([part, part[3:4]]) for part in parts]
    return given, [(x[i] + 0.6 * torch.randn(len(i), 3, 2, 2, generator=generator), i) for i in places]


def plain_epoch(networks, optimizers, batches, given, labels, lam, relabelling, delta):
    """Algorithm 1, steps 3-8, sample by sample. Returns losses, accuracy, changed labels and corrections taken back."""
    sums, hits, seen, changed, back = [0.0] * len(networks), 0, 0, 0, 0
    for x, index in batches:
        y, before = labels[index], labels.clone()
        z = [network(x) for network in networks]  # step 4
        log_p = [own - own.exp().sum(1, keepdim=True).log() for own in z]
        for k, (own, peer) in enumerate(zip(log_p, [log_q.tolist() for log_q in log_p[::-1]])):
            loss = 0.0
            for i in range(len(y)):  # Eqs. 1-2; the peer is a constant
                mimicry = sum(math.exp(log_q) * (log_q - own[i, c]) for c, log_q in enumerate(peer[i]))
                loss = loss + (-(1 - lam) * own[i, y[i]] + lam * mimicry) / len(y)
            sums[k] += loss.item() / len(batches)
            optimizers[k].zero_grad()
            loss.backward()
        for optimizer in optimizers:  # step 7, once both gradients are there
            optimizer.step()
        p = [own.exp().tolist() for own in log_p]
        for i, n in enumerate(index.tolist()):
            votes = [row[i].index(max(row[i])) for row in p]
            mean = [sum(row[i][c] for row in p) for c in range(4)]
            hits, seen = hits + (mean.index(max(mean)) == y[i].item()), seen + 1
            if relabelling:  # step 8, Eq. 4: else the original label
                sure = all(max(row[i]) > row[i][given[n]] + delta for row in p)
                labels[n] = votes[0] if sure and votes[0] == votes[-1] else given[n]
        changed += (labels != before).sum().item()
        back += ((before != given) & (labels == given)).sum().item()
    return sums, hits / seen, changed, back


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--delta", "0.15", "--warm-up", "3"],
        ["--lambda-max", "0.4", "--ramp", "0.5", "--beta", "3"],
        ["--no-relabel", "--decay", "0.7"],
        ["--networks", "1", "--lambda-max", "0", "--no-relabel"],
    ],
)
def test_an_epoch_is_algorithm_1_written_plainly(flags):
    fixed = ["--epochs", "7", "--precision", "fp32", "--lr", "0.05", "--head-lr", "0.02"]
    args = cocuring.parse_args([*fixed, "--warm-up", "1", "--delta", "0.05", *flags])
    given, batches = small_data()
    networks = nn.ModuleList([Small(seed) for seed in range(args.networks)])
    optimizer, scheduler = cocuring.make_optimizer(networks, args)
    plain = copy.deepcopy(networks)
    optimizers = [
        torch.optim.Adam([dict(params=n.backbone.parameters(), lr=0.05), dict(params=n.head.parameters(), lr=0.02)])
        for n in plain
    ]
    untouched, current, labels, taken_back = given.clone(), given.clone(), given.clone(), 0
    for t in range(1, 8):
        networks.eval()  # the epoch itself has to put them into training mode
        scalars = cocuring.train_one_epoch(networks, optimizer, batches, given, current, t, args)
        scheduler.step()
        ramp = args.ramp * 7
        lam = args.lambda_max * (math.exp(-args.beta * (1 - t / ramp) ** 2) if t < ramp else 1)
        relabelling = "--no-relabel" not in flags and t > args.warm_up
        sums, accuracy, changed, back = plain_epoch(
            plain, optimizers, batches, given, labels, lam, relabelling, args.delta
        )
        taken_back += back
        for group in (group for own in optimizers for group in own.param_groups):
            group["lr"] *= args.decay
        assert torch.equal(current, labels) and torch.equal(given, untouched)
        assert [scalars[f"loss/net{k}"] for k in range(1, len(plain) + 1)] == pytest.approx(sums, rel=1e-4)
        assert scalars["loss/total"] == pytest.approx(sum(sums), rel=1e-4)
        assert scalars["accuracy/train"] == pytest.approx(accuracy)
        assert (scalars["weight/lambda"], scalars["relabel/this_epoch"]) == (pytest.approx(lam), changed)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(networks.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert (current != given).sum() > 3 or "--no-relabel" in flags
    assert taken_back > 0 or flags  # both ways were taken


# The script


@pytest.fixture
def tiny(tiny):
    return [*tiny, "--warm-up", "1", "--delta", "0.01"]


def test_a_run_leaves_what_the_readme_says(tiny, tmp_path, capsys):
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "run"]) == 0
    folder = tmp_path / "run"
    screen = capsys.readouterr().out
    assert [line.split()[0] for line in screen.splitlines()[-3:]] == ["best", "last5", "final"]

    history = lines(folder)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    last = history[-1]
    for tag in (
        "loss/total",
        "loss/net1",
        "loss/net2",
        "weight/lambda",
        "lr",
        "accuracy/train",
        "accuracy/test",
        "accuracy/test_mean_class",
        "accuracy/test/net1",
        "accuracy/test/net2",
        "relabel/this_epoch",
        "relabel/changed",
        "labels/accuracy",
        "relabel/recall",
    ):
        assert isinstance(last[tag], (int, float)), tag
    assert history[0]["relabel/this_epoch"] == 0 and history[0]["labels/accuracy"] == pytest.approx(1 - 0.4, abs=0.05)
    assert history[1]["relabel/this_epoch"] > 0
    assert history[1]["weight/lambda"] == pytest.approx(ramp_up(2, 2.7))
    assert history[2]["lr"] == pytest.approx(1e-3 * 0.95**2)

    with open(folder / "labels.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 and set(rows[0]) == {"name", "given", "final", "score", "clean"}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and 0 <= scores[-1] and scores[0] <= 1
    assert sum(row["given"] != row["final"] for row in rows) == last["relabel/changed"]
    assert np.mean([row["final"] == row["clean"] for row in rows]) == pytest.approx(last["labels/accuracy"])

    record = json.loads((folder / "args.json").read_text())
    assert record["argv"][:2] == ["--noise", "0.4"] and "preset" not in record
    assert (
        record["delta"] == 0.01
        and record["noise_seed"] == 1
        and set(record["versions"]) == {"python", "torch", "torchvision"}
    )
    model = torch.load(folder / "model.pt", weights_only=True)
    assert model["classes"] == list(toyfaces.CLASSES) and len(model["networks"]) == 2 and model["method"] == "cocuring"
    for figure in ("confusion.png", "curves.png", "audit.png"):
        assert (folder / figure).read_bytes()[:4] == b"\x89PNG"

    events = EventAccumulator(str(folder)).Reload()
    assert set(last) - {"epoch"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("accuracy/test")] == [1, 2, 3]
    assert events.Scalars("weight/lambda")[1].value == pytest.approx(history[1]["weight/lambda"])
    assert {"confusion", "curves", "audit"} <= set(events.Tags()["images"])


def test_the_two_networks_start_and_stay_different():
    args = cocuring.parse_args(["--data", "toy"])
    first, second = cocuring.make_networks(args, 7)
    again = cocuring.make_networks(args, 7)[0]
    assert not torch.equal(first.head.weight, second.head.weight) and torch.equal(first.head.weight, again.head.weight)


def test_inference_averages_the_softmax_outputs():
    class Constant(torch.nn.Module):
        def __init__(self, probs):
            super().__init__()
            self.logits = torch.tensor(probs).log()

        def forward(self, x):
            return self.logits.expand(len(x), -1)

    args = cocuring.parse_args(["--size", "16", "--precision", "fp32"])
    images = common.Images(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 16, torch.device("cpu"))
    networks = torch.nn.ModuleList([Constant([0.9, 0.05, 0.05]), Constant([0.1, 0.5, 0.4])])
    probs = cocuring.predict(networks, images, args)
    assert probs.shape == (2, 4, 3)
    torch.testing.assert_close(probs.mean(0), torch.tensor([0.5, 0.275, 0.225]).expand(4, -1))
    table = runs.confusion_matrix(probs.mean(0).argmax(1), torch.tensor([0, 0, 1, 1]), 3)
    assert table == [[2, 0, 0], [2, 0, 0], [0, 0, 0]]
    scalars = runs.accuracy_scalars(table, ("a", "b", "c"))
    assert scalars["accuracy/test"] == 0.5
    assert "accuracy/class/c" not in scalars and scalars["accuracy/test_mean_class"] == 0.5


def test_a_margin_that_no_probability_exceeds_changes_no_label(tiny, tmp_path):
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "a", "--delta", "0.9999"]) == 0
    history = lines(tmp_path / "a")
    assert [line["relabel/changed"] for line in history] == [0, 0, 0]
    assert "relabel/precision" not in history[-1] and history[-1]["relabel/recall"] == 0


def test_ablations_train_what_they_say(tiny, tmp_path):
    flags = {
        "one": ["--networks", "1", "--lambda-max", "0", "--no-relabel"],
        "two": ["--lambda-max", "0", "--no-relabel"],
        "keep": ["--no-relabel"],
    }
    for name, extra in flags.items():
        assert cocuring.main([*tiny, *extra, "--epochs", "2", "--out", str(tmp_path), "--name", name]) == 0
    one, two, keep = (lines(tmp_path / name) for name in flags)
    assert all(line["relabel/changed"] == 0 for line in one + two + keep)
    assert [line["weight/lambda"] for line in two] == [0, 0] and keep[0]["weight/lambda"] > 0
    assert one[0]["loss/net1"] == pytest.approx(
        two[0]["loss/net1"], rel=1e-5
    )  # without mimicry the first peer is the single network
    assert "accuracy/test/net1" not in one[0]


def test_without_noise_there_are_no_clean_labels_to_compare_with(tiny, tmp_path):
    assert cocuring.main([*tiny, "--noise", "0", "--epochs", "1", "--out", str(tmp_path), "--name", "run"]) == 0
    assert "labels/accuracy" not in lines(tmp_path / "run")[0]
    assert (tmp_path / "run" / "labels.csv").read_text().splitlines()[0] == "name,given,final,score"


def test_the_real_backbone_trains_in_the_devices_own_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 16, "valid": 8, "test": 8})
    assert (
        cocuring.main(
            [
                "--noise",
                "0.4",
                "--size",
                "32",
                "--batch-size",
                "8",
                "--epochs",
                "1",
                "--out",
                str(tmp_path),
                "--name",
                "run",
            ]
        )
        == 0
    )
    network = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["networks"][0]
    assert network["backbone.layer4.1.conv2.weight"].shape == (512, 512, 3, 3) and network["head.weight"].shape == (
        7,
        512,
    )


@pytest.mark.parametrize(
    "data, build",
    [
        ("raf", build_raf),
        ("raf", build_raf_kaggle),
        ("ferplus", build_ferplus),
        ("ferplus", build_ferplus_csv),
        ("folder", build_folder),
        ("folder", build_folder_splits),
    ],
)
def test_the_script_trains_on_every_layout(data, build, tiny, tmp_path):
    build(tmp_path / "data")
    place = [
        "--data",
        data,
        "--root",
        str(tmp_path / "data"),
        "--cache",
        str(tmp_path / "cache"),
        "--out",
        str(tmp_path),
        "--name",
        "run",
    ]
    assert cocuring.main([*tiny, *place, "--batch-size", "4", "--epochs", "1", "--jitter", "0.3", "--crop", "2"]) == 0
    assert (tmp_path / "run" / "model.pt").exists() and lines(tmp_path / "run")[0]["labels/accuracy"] < 1


# Resuming


def test_a_run_stopped_between_epochs_ends_as_if_it_was_not(tiny, tmp_path, monkeypatch):
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "whole"]) == 0
    save = runs.save_checkpoint

    def save_and_stop(path, **state):
        if state["epoch"] == 2:  # after the line in metrics.jsonl, before the checkpoint
            raise KeyboardInterrupt
        save(path, **state)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", save_and_stop)
        assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "cut"]) == 130
    assert len(lines(tmp_path / "cut")) == 2
    (tmp_path / "cut" / "last.pt.tmp99999").write_bytes(b"half")  # as a kill in the middle of a save leaves it
    time.sleep(1.1)  # TensorBoard orders the event files of a folder by the second in their names
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "cut"]) == 2  # unfinished: needs --resume
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "cut", "--resume"]) == 0
    same_end(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("*.tmp*"))
    events = EventAccumulator(str(tmp_path / "cut")).Reload()
    assert [e.step for e in events.Scalars("accuracy/test")] == [1, 2, 3]


def test_a_run_stopped_before_its_end_only_finishes(tiny, tmp_path, monkeypatch):
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "write_hparams", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "cut"]) == 130
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "cut", "--resume"]) == 0
    same_end(tmp_path / "whole", tmp_path / "cut")


def test_resume_with_nothing_to_resume_starts_from_the_beginning(tiny, tmp_path):
    assert cocuring.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run", "--resume"]) == 0
    assert len(lines(tmp_path / "run")) == 1


def test_resume_refuses_other_arguments(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cocuring.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run"]) == 130
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (
        cocuring.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run", "--resume", "--beta", "3"]) == 2
    )
    assert "beta was 0.65" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


SCRIPT = """
import signal, sys
from support import toyfaces
import cocuring, common
from conftest import Tiny
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs inherit Ctrl-C ignored
toyfaces.SPLITS = {"train": 48, "valid": 16, "test": 16}
common.BACKBONES["resnet18"] = Tiny
sys.exit(cocuring.main(sys.argv[1:]))
"""


def start(arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_run_resumes_to_the_end_of_one_that_was_not(tiny, tmp_path):
    arguments = [*tiny, "--epochs", "5", "--out", str(tmp_path)]
    process = start([*arguments, "--name", "killed"])
    wait_for(tmp_path / "killed" / "last.pt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model.pt").exists()
    assert cocuring.main([*arguments, "--name", "killed", "--resume"]) == 0
    assert cocuring.main([*arguments, "--name", "whole"]) == 0
    same_end(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tiny, tmp_path):
    process = start([*tiny, "--epochs", "500", "--out", str(tmp_path), "--name", "run"])
    wait_for(tmp_path / "run" / "last.pt", process)
    assert cocuring.main([*tiny, "--epochs", "500", "--out", str(tmp_path), "--name", "run", "--resume"]) == 2  # in use
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("*.tmp*"))


# Errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--noise", "1"], "noise"),
        (["--noise", "-0.1"], "noise"),
        (["--noise", "0.2", "--labels", "x.csv"], "--labels"),
        (["--networks", "1"], "--networks 1"),
        (["--batch-size", "49"], "--batch-size 49"),
        (["--limit", "49"], "--limit 49"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "nonsense"], "nonsense"),
        (["--pretrained", "missing.pth"], "missing.pth"),
        (["--labels", "missing.csv"], "missing.csv"),
        (["--data", "raf", "--root", "nowhere"], "--data toy"),
        (["--data", "raf", "--difficulty", "1"], "--difficulty"),
        (["--data", "toy", "--root", "somewhere"], "--root"),
        (["--classes", "8"], "--classes 8"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--lambda-max", "1.5"], "lambda-max"),
        (["--epochs", "0"], "epochs"),
        (["--beta", "nan"], "beta"),
        (["--data", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 48, "valid": 16, "test": 16})
    monkeypatch.chdir(tmp_path)
    assert cocuring.main(["--size", "32", "--batch-size", "12", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_refused_and_kept(tiny, tmp_path, capsys):
    arguments = [*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run"]
    assert cocuring.main(arguments) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert cocuring.main(arguments) == 2
    error = capsys.readouterr().err
    assert all(flag in error for flag in ("--overwrite", "--name", "--resume"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert cocuring.main([*arguments, "--resume"]) == 2
    assert cocuring.main([*arguments, "--overwrite", "--seed", "2"]) == 0
    assert len(lines(tmp_path / "run")) == 1 and (tmp_path / "run" / "metrics.jsonl").read_text() != before
    assert len(list((tmp_path / "run").glob("events.*"))) == 1


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(tiny, tmp_path, monkeypatch, capsys):
    honest = cocuring.peer_losses

    def poisoned(logits1, logits2, labels, lam):
        loss1, loss2 = honest(logits1, logits2, labels, lam)
        return (loss1 * float("nan") if lam > 0.7 else loss1), loss2  # from the second epoch on

    monkeypatch.setattr(cocuring, "peer_losses", poisoned)
    assert cocuring.main([*tiny, "--out", str(tmp_path), "--name", "run"]) == 2
    error = capsys.readouterr().err
    assert "epoch 2, step 1 of 4" in error and "last.pt (epoch 1)" in error
    assert len(lines(tmp_path / "run")) == 1
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["networks"].values())


def test_a_run_of_another_method_is_not_resumed(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        cocuring.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run"])
    file = tmp_path / "run" / "args.json"
    file.write_text(file.read_text().replace('"method": "cocuring"', '"method": "scn"'))
    assert cocuring.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run", "--resume"]) == 2
    assert "scn" in capsys.readouterr().err


# Command line


def test_presets_depend_on_the_data_and_explicit_flags_win():
    toy, raf = (
        cocuring.parse_args([]),
        cocuring.parse_args(["--data", "raf", "--pretrained", "x.pth", "--batch-size", "32"]),
    )
    assert (toy.size, toy.beta, toy.root, toy.noise_seed) == (48, 0.65, "data/toy", 1)
    assert (raf.size, raf.epochs, raf.batch_size, raf.beta, raf.lr, raf.head_lr, raf.lambda_max) == (
        224,
        40,
        32,
        0.65,
        1e-3,
        1e-2,
        0.9,
    )


@pytest.mark.parametrize(
    "argv, name",
    [
        ([], "cocuring-toy-n0-s1"),
        (["--noise", "0.4", "--seed", "3"], "cocuring-toy-n0.4-s3"),
        (["--noise", "0.4", "--lambda-max", "0", "--no-relabel"], "cocuring-toy-n0.4-lambda-max0.0-no-relabel-s1"),
        (["--data", "raf", "--root", "elsewhere/raf"], "cocuring-raf-n0-s1"),
        (["--data", "folder", "--root", "my/faces"], "cocuring-folder-n0-rootfaces-s1"),
        (
            ["--data", "raf", "--labels", "some/list of noise.csv", "--device", "cpu", "--out", "x"],
            "cocuring-raf-n0-labelslist_of_noise-s1",
        ),
    ],
)
def test_the_default_name_shows_what_differs_from_the_preset(argv, name):
    assert cocuring.parse_args(argv).name == name


def test_help_names_the_source_of_every_method_default(capsys):
    assert cocuring.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    section = shown.split("Co-curing:")[-1]
    for flag in (
        "--beta",
        "--lambda-max",
        "--ramp",
        "--delta",
        "--warm-up",
        "--networks",
        "--decay",
        "--jitter",
        "--crop",
    ):
        text = section.split(flag + " ")[1][:250]
        assert "paper" in text or "ours" in text or "official code" in text, flag


def test_each_network_has_an_accuracy_of_its_own(tiny, tmp_path, monkeypatch):
    predicted, honest = [], cocuring.predict
    monkeypatch.setattr(cocuring, "predict", lambda *given: predicted.append(honest(*given)) or predicted[-1])
    assert cocuring.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run"]) == 0
    labels = torch.tensor([toyfaces.expression("test", i)[0] for i in range(16)])
    own = (predicted[0].argmax(2) == labels).float().mean(1).tolist()
    (line,) = lines(tmp_path / "run")
    assert [line[f"accuracy/test/net{k}"] for k in (1, 2)] == pytest.approx(own) and own[0] != own[1]
