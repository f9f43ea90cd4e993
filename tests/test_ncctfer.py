"""NCCTFER: losses and rules by hand, its loop beside a plain one from the paper, then the script on tiny input."""

import csv
import json
import math
from statistics import mean
from types import SimpleNamespace

from support import figures, toyfaces

import pytest
import torch
from conftest import Tiny, build_folder, check_resume, lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import common
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


FIRST, SECOND, THIRD = -0.5 * math.log(0.2), -0.3 * math.log(0.3), -0.2 * math.log(0.5)  # of the first sample below


@pytest.mark.parametrize(
    "k, mask, expected",
    [
        (1, "most", FIRST),
        (2, "most", FIRST + SECOND),
        (1, "least", THIRD),
        (3, "most", FIRST + SECOND + THIRD),
        (3, "least", FIRST + SECOND + THIRD),
    ],
)
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


# Algorithm 1, beside a plain loop

CLASSES, COUNT = 7, 34


class Plain(nn.Module):
    """Two linear heads on one backbone, with the script's names of the weights."""

    def __init__(self):
        super().__init__()
        self.backbone = Tiny()
        self.backbone.fc = nn.Identity()
        self.positive, self.negative = nn.Linear(32, CLASSES), nn.Linear(32, CLASSES)


def plain_optimizer(network, args):
    backbone, heads = network.backbone.parameters(), [*network.positive.parameters(), *network.negative.parameters()]
    return torch.optim.Adam([dict(params=backbone, lr=args.lr), dict(params=heads, lr=args.head_lr)])


def plain_epoch(network, optimizer, batches, labels, clean, selecting, args, chosen=None, after_step=lambda: None):
    """Algorithm 1, steps 4-15, sample by sample; returns the scalars of the epoch.

    selecting: e >= E_warm. chosen: the confident samples where they are not those of the batch.
    """
    network.train()
    steps, samples, thresholds = [], [], {c: [] for c in range(CLASSES)}
    for (weak, strong), index in batches:
        y, n, f = labels[index].tolist(), len(index), network.backbone(weak)
        z_p, z_n = network.positive(f), network.negative(f)
        own = [z_p[i].softmax(0)[y[i]].item() for i in range(n)]
        if args.clamp:
            own = [min(max(p, args.clamp[0]), args.clamp[1]) for p in own]
        t = {c: mean(own[i] for i in range(n) if y[i] == c) for c in set(y)}  # Eq. 1
        # rounding decides nothing
        assert args.clamp or all(abs(own[i] - t[y[i]]) > 1e-6 or y.count(y[i]) == 1 for i in range(n))
        sure = [own[i] > t[y[i]] - 1e-7 for i in range(n)] if chosen is None else chosen[index].tolist()  # Eq. 2
        kept = [i for i in range(n) if sure[i] or not selecting]
        l_s = sum((-z_p[i].log_softmax(0)[y[i]] for i in kept), 0 * z_p.sum()) / max(len(kept), 1)  # Eq. 3
        l_c = torch.zeros(())
        if selecting and args.negative:
            g = network.backbone(strong)
            z_w, z_s = (z_p, network.positive(g)) if args.single_head else (z_n, network.negative(g))
            for i in range(n):
                p_w, log_p_s = z_w[i].softmax(0).tolist(), z_s[i].log_softmax(0)  # numbers: no gradient
                m_k = sorted(range(CLASSES), key=lambda c: p_w[c], reverse=args.mask == "most")[: args.k]
                l_c = l_c - sum(p_w[c] * log_p_s[c] for c in m_k) * (not sure[i]) / n  # Eq. 4
        optimizer.zero_grad()
        (l_s + args.negative_weight * l_c).backward()  # Eq. 5
        optimizer.step()
        after_step()
        p_n = z_n.detach().softmax(1)
        steps.append((l_s.item(), l_c.item(), p_n.amax(1).mean().item(), p_n.mean(0)))
        right = (z_p.argmax(1) == labels[index]).tolist()
        samples += zip(right, sure, (labels[index] == clean[index]).tolist())
        for c in t:
            thresholds[c].append(t[c])
    l_s, l_c, top, p_n = zip(*steps)
    answer = sum(p_n) / len(p_n)
    return {
        "loss/total": mean(l_s) + args.negative_weight * mean(l_c),
        "loss/supervised": mean(l_s),
        "loss/negative": mean(l_c),
        "accuracy/train": mean(right for right, _, _ in samples),
        "confident/share": mean(sure for _, sure, _ in samples),
        "confident/purity": mean(correct for _, sure, correct in samples if sure),
        "confident/recall": mean(sure for _, sure, correct in samples if correct),
        "negative/top": mean(top),
        "negative/classes": math.exp(-sum(a * math.log(a) for a in answer.tolist())),
        "weight/threshold": [mean(values) if values else 0 for values in thresholds.values()],
    }


def same_weights(plain, state):
    for name, value in plain.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=2e-5)
    assert set(plain.state_dict()) == set(state)


def same_scalars(scalars, expected):
    assert set(scalars) == set(expected)
    for tag, value in expected.items():
        assert scalars[tag] == pytest.approx(value, rel=1e-4, abs=1e-6), tag


@pytest.fixture
def fixed(monkeypatch):
    """fixed(*flags) -> arguments, network, optimiser, batches, labels, clean labels; plain network, plain optimiser."""
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)

    def make(*flags):
        argv = ["--epochs", "3", "--warm-up", "1", "--precision", "fp32", "--lr", "0.01", "--head-lr", "0.003", *flags]
        args, generator = ncctfer.parse_args(argv), torch.Generator().manual_seed(8)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        clean = torch.arange(COUNT) % CLASSES
        labels = torch.where(torch.arange(COUNT) % 3 == 0, (clean + 1) % (CLASSES - 1), clean)
        patterns = normal(CLASSES, 3, 4, 4).repeat_interleave(5, 2).repeat_interleave(5, 3)
        images = patterns[clean] + normal(COUNT, 3, 20, 20)
        views = images, 0.7 * images.flip(-1) + 0.5 * normal(COUNT, 3, 20, 20)
        order = torch.randperm(COUNT, generator=generator).split([13, 6, 15])  # of six samples some class has none
        batches = [(tuple(view[index] for view in views), index) for index in order]
        network, plain = ncctfer.make_network(args, CLASSES), Plain()
        plain.load_state_dict(network.state_dict())
        optimizer, _ = ncctfer.make_optimizer(network, args)
        return args, network, optimizer, batches, labels, clean, plain, plain_optimizer(plain, args)

    return make


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--k", "2"],
        ["--k", "3", "--mask", "least"],
        ["--clamp", "0.15", "0.3"],
        ["--negative-weight", "0.3"],
        ["--single-head"],
        ["--single-head", "--mask", "most"],
        ["--no-negative"],
        ["--no-threshold", "--no-negative"],
        ["--warm-up", "0"],
    ],
)
def test_the_loop_is_algorithm_1(flags, fixed):
    args, network, optimizer, batches, labels, clean, plain, adam = fixed(*flags)
    given, history = labels.clone(), []
    for epoch in range(1, 4):
        selecting = args.threshold and epoch > args.warm_up
        seen = batches if selecting else [((weak, None), index) for (weak, _), index in batches]
        scalars = ncctfer.train_one_epoch(network, optimizer, seen, given, clean, epoch, args)
        expected = plain_epoch(plain, adam, seen, labels, clean, selecting, args)
        same_scalars(scalars, expected)
        same_weights(plain, network.state_dict())
        history.append(scalars)
    assert torch.equal(given, labels)  # it corrects no label
    assert [line["loss/negative"] > 0 for line in history] == [args.negative and e > args.warm_up for e in (1, 2, 3)]


def test_chosen_samples_take_the_place_of_those_of_the_batch_and_the_average_follows_each_step(fixed):
    args, network, optimizer, batches, labels, clean, plain, adam = fixed()
    chosen = torch.arange(COUNT) % 4 > 0
    chosen[batches[1][1]] = False  # a batch without a confident sample: L_s is 0
    seen, expected = [], []
    averaged = SimpleNamespace(update=lambda network: seen.append(network.positive.weight.detach().clone()))
    for epoch in (1, 2, 3):
        own = chosen if epoch > 1 else None
        scalars = ncctfer.train_one_epoch(network, optimizer, batches, labels, None, epoch, args, averaged, own)
        plain_scalars = plain_epoch(
            plain,
            adam,
            batches,
            labels,
            clean,
            epoch > 1,
            args,
            own,
            lambda: expected.append(plain.positive.weight.detach().clone()),
        )
        for tag in ("confident/purity", "confident/recall"):  # not known without the clean labels
            del plain_scalars[tag]
        same_scalars(scalars, plain_scalars)
    assert len(seen) == 9
    for ours, theirs in zip(seen, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    same_weights(plain, network.state_dict())


def test_the_positive_head_predicts_in_evaluation_mode(fixed):
    args, network, optimizer, batches, *_, plain, _ = fixed()
    ncctfer.train_one_epoch(network, optimizer, batches, *fixed()[4:6], 2, args)
    plain.load_state_dict(network.state_dict())
    images = torch.randint(0, 256, (9, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    args.size = 20
    x = (images / 255 - torch.tensor(common.MEAN)[:, None, None]) / torch.tensor(common.STD)[:, None, None]
    with torch.no_grad():
        expected = plain.positive(plain.eval().backbone(x)).softmax(1)
    got = ncctfer.predict(network.train(), [x[:4], x[4:]], args)
    torch.testing.assert_close(got, expected)
    function = ncctfer.restore([network.state_dict()], args, CLASSES, torch.device("cpu"))
    probs, none = function(images)
    torch.testing.assert_close(probs, expected)
    assert none is None


# The script


@pytest.fixture
def tiny(tiny):
    return [*tiny, "--warm-up", "1", "--crop", "2"]


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

        argv = [*tiny, *flags, "--out", str(tmp_path), "--name", f"run{len(list(tmp_path.iterdir()))}"]
        with monkeypatch.context() as patch:
            patch.setattr(common.Loader, "epoch", epoch)
            assert ncctfer.main(argv) == 0
        args = ncctfer.parse_args(argv)
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


def ema_update(averaged, network, decay, steps):
    """Weights and statistics; the first step copies."""
    for own, new in zip(averaged.state_dict().values(), network.state_dict().values()):
        own.copy_(new if steps == 1 or not own.is_floating_point() else decay * own + (1 - decay) * new)


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "4", "--decay", "0.5"],
        ["--oversample", "--warm-up", "0"],
        ["--no-negative", "--seed", "2"],
        ["--single-head", "--k", "3", "--warm-up", "2"],
        ["--select-by", "average", "--ema", "0.6", "--epochs", "4"],
        ["--select-by", "batch", "--epochs", "4"],
        ["--no-threshold", "--no-negative"],
        ["--no-threshold", "--no-negative", "--select-by", "batch"],
    ],
)
def test_main_hands_the_right_things_to_the_loop(flags, record):
    args, epochs, folder = record("--lr", "0.01", "--head-lr", "0.003", *flags)
    history, (given, scores), (faces, clean) = lines(folder), audit_of(folder), toy_inputs("train")
    plain, averaged, steps = Plain(), Plain(), [0]
    tested = averaged if args.select_by == "average" else plain
    plain.load_state_dict(ncctfer.make_network(args, CLASSES).state_dict())
    averaged.load_state_dict(plain.state_dict())
    adam = plain_optimizer(plain, args)

    def predicted(network, x):
        with torch.no_grad():
            return network.positive(network.eval().backbone(x)).softmax(1)

    def after_step():
        steps[0] += 1
        ema_update(averaged, plain, args.ema, steps[0])

    assert len(epochs) == len(history) == args.epochs
    assert (given != clean).float().mean() == pytest.approx(0.4, abs=0.03)
    for epoch, (batches, line) in enumerate(zip(epochs, history), 1):
        drawn, chosen = torch.cat([index for _, index in batches]), None
        selecting = args.threshold and epoch > args.warm_up
        if args.oversample:
            counts = torch.bincount(given[drawn], minlength=CLASSES)
            assert len(drawn) == len(given) and counts.max() - counts.min() <= 1
        else:
            assert sorted(drawn.tolist()) == list(range(len(given)))
        assert {len(index) for _, index in batches} == {args.batch_size}
        for (_, strong), _ in batches:
            assert (strong is None) == (not selecting or not args.negative)  # not made in vain
        if args.select_by == "average" and selecting:
            own = predicted(averaged, faces)[range(len(given)), given]
            t_c = [own[given == c].mean() if (given == c).any() else torch.zeros(()) for c in range(CLASSES)]
            chosen = torch.stack([own[i] >= t_c[given[i]] - 1e-7 for i in range(len(given))])
        expected = plain_epoch(plain, adam, batches, given, clean, selecting, args, chosen, after_step)
        batch_thresholds = expected.pop("weight/threshold")
        for name, value in zip(toyfaces.CLASSES, batch_thresholds if chosen is None else map(float, t_c)):
            expected[f"weight/threshold/{name}"] = value
        expected["lr"] = args.lr * args.decay ** (epoch - 1)
        same_scalars({tag: line[tag] for tag in expected}, expected)
        for group in adam.param_groups:
            group["lr"] *= args.decay
        test, labels = toy_inputs("test")
        assert line["accuracy/test"] == (predicted(tested, test).argmax(1) == labels).double().mean()
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    same_weights(tested, torch.load(folder / "model.pt", weights_only=True)["networks"][0])
    probs = predicted(tested, faces)
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


def test_a_run_logs_thresholds_and_the_confident_set(tiny, tmp_path):
    assert ncctfer.main([*tiny, "--out", str(tmp_path), "--name", "run"]) == 0
    history = lines(tmp_path / "run")
    assert history[0]["loss/negative"] == 0 and all(line["loss/negative"] > 0 for line in history[1:])
    for line in history:
        assert line["loss/total"] == pytest.approx(line["loss/supervised"] + line["loss/negative"], abs=1e-5)
        assert 0 < line["confident/share"] < 1 and 0 <= line["confident/recall"] <= 1
        assert 1 <= line["negative/classes"] <= 7
        assert all(0 < line[f"weight/threshold/{name}"] < 1 for name in toyfaces.CLASSES)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.step for e in events.Scalars("confident/purity")] == [1, 2, 3]
    assert {"confidence", "audit", "confusion"} <= set(events.Tags()["images"])
    header, *rows = (tmp_path / "run" / "labels.csv").read_text().splitlines()
    assert all(row.split(",")[1] == row.split(",")[2] for row in rows)  # it corrects no label


def test_ablations_are_told_apart(tiny, undrawn, tmp_path):
    def run(*flags):
        name = "run" + "".join(flags)
        assert ncctfer.main([*tiny, *flags, "--out", str(tmp_path), "--name", name]) == 0
        return lines(tmp_path / name)

    whole, baseline = run(), run("--no-threshold", "--no-negative")
    confident_only, single = run("--no-negative"), run("--single-head")
    assert all(line["loss/negative"] == 0 for line in baseline + confident_only)
    assert whole[0]["loss/supervised"] == baseline[0]["loss/supervised"]  # the warm-up is the same
    assert whole[1]["loss/supervised"] < baseline[1]["loss/supervised"]
    assert single[1]["loss/negative"] != whole[1]["loss/negative"]
    least, k1 = run("--mask", "least"), run("--k", "1")
    assert len({line[1]["loss/negative"] for line in (whole, least, k1)}) == 3


def test_an_averaged_network_selects_by_clamped_probabilities(tiny, undrawn, tmp_path):
    flags = [*tiny, "--select-by", "average", "--warm-up", "1", "--out", str(tmp_path)]
    assert ncctfer.main([*flags, "--name", "plain"]) == 0
    assert ncctfer.main([*flags, "--clamp", "0.5", "0.5", "--name", "clamped"]) == 0  # equal: all reach the mean
    plain, clamped = ([line["confident/share"] for line in lines(tmp_path / name)] for name in ("plain", "clamped"))
    assert clamped == [1, 1, 1] and max(plain[1:]) < 1


def test_a_stopped_run_ends_as_if_it_was_not(tiny, undrawn, tmp_path, monkeypatch):
    check_resume(ncctfer.main, [*tiny, "--warm-up", "1", "--ema", "0.9"], tmp_path, monkeypatch)


def test_of_fewer_than_four_classes_all_are_kept(tiny, undrawn, tmp_path, capsys, monkeypatch):
    seen, honest = [], ncctfer.negative_consistency
    monkeypatch.setattr(ncctfer, "negative_consistency", lambda *a: seen.append(a[3]) or honest(*a))
    data = ["--data", "folder", "--root", str(build_folder(tmp_path / "data", count=10)), "--cache", str(tmp_path)]
    flags = [*tiny, *data, "--warm-up", "1", "--out", str(tmp_path)]
    assert ncctfer.main([*flags, "--name", "run"]) == 0
    assert set(seen) == {3} and json.loads((tmp_path / "run" / "args.json").read_text())["k"] == 4
    assert ncctfer.main([*flags, "--k", "5", "--name", "more"]) == 2
    assert "--k 5: there are only 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["2", "3"])
def test_batches_of_two_and_three_run(size, tiny, undrawn, tmp_path):
    assert ncctfer.main([*tiny, "--batch-size", size, "--epochs", "2", "--out", str(tmp_path), "--name", "run"]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--k", "0"], "k"),
        (["--k", "8"], "--k 8"),
        (["--no-threshold"], "--no-negative"),
        (["--single-head", "--no-negative"], "--single-head"),
        (["--magnitude", "31"], "magnitude"),
        (["--warm-up", "-1"], "warm-up"),
        (["--mask", "some"], "mask"),
    ],
)
def test_bad_values_are_refused(arguments, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 48, "valid": 16, "test": 16})
    assert ncctfer.main([*arguments, "--size", "32", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_the_pretrained_preset_is_the_papers_and_the_mask_follows_the_heads():
    args = ncctfer.parse_args(["--data", "raf", "--pretrained", "x.pth"])
    assert (args.size, args.epochs, args.batch_size, args.warm_up, args.k) == (224, 40, 128, 4, 4)
    assert (args.lr, args.head_lr, args.decay, args.select_by) == (1e-4, 1e-3, 1.0, "batch")
    for flags in (["--data", "ferplus", "--pretrained", "dlib"], ["--data", "ferplus"], ["--data", "toy"]):
        assert ncctfer.parse_args(flags).select_by == "average"
    assert (args.crop, args.operations, args.magnitude, args.mask) == (4, 2, 10, "most")
    assert ncctfer.parse_args(["--single-head"]).mask == "least"
