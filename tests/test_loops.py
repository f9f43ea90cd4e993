"""Each script beside a plain loop written from its paper: on the same batches the same labels, losses and weights.

A run of the script's main is recorded (the batches that its loader hands out) and replayed by code of this file alone,
in float32 on a small network.
"""

import csv
import math

from support import toyfaces

import pytest
import torch
from conftest import lines
from torch import nn

import cocuring
import common
import ncctfer
import scn
import twostage

CLASSES = 7


@pytest.fixture
def record(monkeypatch, tmp_path, tiny):
    """record(script, *flags) -> (arguments, batches of each epoch, run folder) of a run on tiny data."""

    def run(script, *flags):
        epochs, honest = [], common.Loader.epoch

        def epoch(self, *arguments, **options):
            epochs.append([])
            for batch in honest(self, *arguments, **options):
                epochs[-1].append(batch)
                yield batch

        arguments = [*tiny, *flags, "--out", str(tmp_path), "--cache", str(tmp_path / "cache"), "--name", "run"]
        with monkeypatch.context() as patch:
            patch.setattr(common.Loader, "epoch", epoch)
            assert script.main([*arguments, "--overwrite"]) == 0
        return script.parse_args(arguments), epochs, tmp_path / "run"

    return run


def toy_labels(args):
    """The labels that the run was given: index of the class, int64 (N,)."""
    with open(f"{args.out}/{args.name}/labels.csv") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    names = [f"train_{i:05d}.png" for i in range(len(rows))]
    columns = [[toyfaces.CLASSES.index(rows[name][key]) for name in names] for key in ("given", "final", "clean")]
    return [torch.tensor(column) for column in columns]


def toy_inputs(split, args):
    """The unaugmented network inputs (N, 3, 32, 32) of a split, from the faces themselves."""
    count = toyfaces.SPLITS[split]
    faces = [torch.from_numpy(toyfaces.draw_face(split, i, size=args.size)[0]).permute(2, 0, 1) for i in range(count)]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (torch.stack(faces) / 255 - mean) / std


def adam(network, args):
    """Adam with a learning rate for the backbone and one for everything else."""
    backbone = [p for name, p in network.named_parameters() if "backbone" in name]
    rest = [p for name, p in network.named_parameters() if "backbone" not in name]
    return torch.optim.Adam([dict(params=backbone, lr=args.lr), dict(params=rest, lr=args.head_lr)])


def slow_down(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] *= factor


def same_weights(network, folder, number=0):
    saved = torch.load(folder / "model.pt", weights_only=True)["networks"][number]
    own = network.state_dict()
    assert set(own) == set(saved)
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):  # of no effect
            continue
        torch.testing.assert_close(
            value, saved[name], rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def accuracy(probs, args, split="test"):
    labels = torch.tensor([toyfaces.expression(split, i)[0] for i in range(toyfaces.SPLITS[split])])
    return (probs.argmax(1) == labels).float().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Co-curing, Algorithm 1
# ----------------------------------------------------------------------------------------------------------------------

COCURING = ["--warm-up", "1", "--delta", "0.02", "--epochs", "5", "--lr", "0.01", "--head-lr", "0.003", "--crop", "2"]


@pytest.mark.parametrize("flags", [[], ["--oversample"], ["--lambda-max", "0.4", "--ramp", "0.5", "--beta", "3"]])
def test_cocuring_is_algorithm_1(record, flags):
    args, epochs, folder = record(cocuring, *COCURING, *flags)
    given, final, clean = toy_labels(args)
    networks = cocuring.make_networks(args, CLASSES)
    optimizers = [adam(network, args) for network in networks]
    labels, taken_back, history = given.clone(), 0, lines(folder)
    for t, batches in enumerate(epochs, 1):
        ramp = args.ramp * args.epochs
        lam = args.lambda_max * (math.exp(-args.beta * (1 - t / ramp) ** 2) if t < ramp else 1)
        total, changes = 0.0, 0
        for x, index in batches:
            y = labels[index]
            for network in networks:
                network.train()
            p = [network(x).softmax(1) for network in networks]
            peers = [q.detach() for q in reversed(p)]
            for own, peer, optimizer in zip(p, peers, optimizers):
                supervision = -own[range(len(y)), y].log().mean()
                mimicry = (peer * (peer.log() - own.log())).sum(1).mean()
                loss = (1 - lam) * supervision + lam * mimicry
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() / len(batches)
            if t > args.warm_up:
                for i, p1, p2 in zip(index.tolist(), *(q.detach() for q in p)):
                    old = given[i]
                    agree = p1.argmax() == p2.argmax()
                    sure = p1.max() > p1[old] + args.delta and p2.max() > p2[old] + args.delta
                    new = p1.argmax() if agree and sure else old
                    taken_back += bool(labels[i] != given[i] and new == old)
                    changes += bool(labels[i] != new) if index.tolist().count(i) == 1 else 0
                    labels[i] = new
        for optimizer in optimizers:
            slow_down(optimizer, args.decay)
        assert history[t - 1]["loss/total"] == pytest.approx(total, rel=1e-4)
        assert history[t - 1]["weight/lambda"] == pytest.approx(lam)
        if not args.oversample:
            assert history[t - 1]["relabel/this_epoch"] == changes
        assert history[t - 1]["relabel/changed"] == (labels != given).sum()
    assert taken_back > 0 and (labels != given).sum() > 5  # both ways were taken
    assert torch.equal(labels, final)
    for k, network in enumerate(networks):
        same_weights(network, folder, k)
    with torch.no_grad():
        probs = sum(network.eval()(toy_inputs("test", args)).softmax(1) for network in networks)
    assert history[-1]["accuracy/test"] == pytest.approx(accuracy(probs, args))


def test_what_a_loader_is_asked_for(record):
    """Augmented views of the right samples."""
    args, epochs, _ = record(cocuring, *COCURING, "--jitter", "0.3")
    plain = toy_inputs("train", args)
    for batches in epochs:
        assert sorted(torch.cat([index for _, index in batches]).tolist()) == list(range(48))
        assert not any(torch.allclose(x, plain[index], atol=1e-3) for x, index in batches)
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    bare, epochs, _ = record(cocuring, *COCURING, "--jitter", "0", "--crop", "0")
    for x, index in epochs[0]:  # flipped or not, and nothing else
        same = (x - plain[index]).abs().amax((1, 2, 3)) < 1e-4
        mirrored = (x - plain[index].flip(-1)).abs().amax((1, 2, 3)) < 1e-4
        assert (same | mirrored).all()


# ----------------------------------------------------------------------------------------------------------------------
# SCN, Sec. 3
# ----------------------------------------------------------------------------------------------------------------------

SCN = ["--warm-up", "1", "--margin2", "0.02", "--epochs", "4", "--lr", "0.01", "--head-lr", "0.003", "--crop", "2"]


def plain_scn(args, epochs, given):
    """The network, the labels and the history of Sec. 3 on recorded batches."""
    network = scn.make_network(args, CLASSES)
    optimizer, labels, history, aurocs = adam(network, args), given.clone(), [], []
    for t, batches in enumerate(epochs, 1):
        sums, weights = torch.zeros(3), {}
        for x, index in batches:
            y, n = labels[index], len(index)
            features = network.train().backbone(x)
            z = features @ network.head.weight.T + network.head.bias
            alpha = 1 / (1 + torch.exp(-(features @ network.attention.weight.T + network.attention.bias)))[:, 0]
            p = (alpha[:, None] * z).softmax(1)
            wce = -p[range(n), y].log().mean()
            order = sorted(range(n), key=lambda i: -alpha[i].item())
            m = int(args.beta * n + 1e-9)
            high, low = order[:m], order[m:]
            margin = network.margin if args.learn_margin else args.margin1
            rank = torch.relu(margin - (alpha[high].mean() - alpha[low].mean()))
            loss = args.gamma * rank + (1 - args.gamma) * wce
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.tensor([loss.item(), wce.item(), rank.item()]) / len(batches)
            weights |= {i: a for i, a in zip(index.tolist(), alpha.tolist())}
            if t > args.warm_up:
                for k in range(n):
                    if k in low:
                        best = p[k].argmax()
                        labels[index[k]] = best if p[k, best] - p[k, y[k]] > args.margin2 else y[k]
        slow_down(optimizer, 0.95)
        history.append(sums.tolist())
        aurocs.append(weights)
    return network, labels, history, aurocs


@pytest.mark.parametrize("flags", [[], ["--gamma", "0.3", "--beta", "0.4"], ["--learn-margin"], ["--oversample"]])
def test_scn_is_section_3(record, flags):
    args, epochs, folder = record(scn, *SCN, *flags)
    given, final, clean = toy_labels(args)
    network, labels, history, weights = plain_scn(args, epochs, given)
    logged = lines(folder)
    for line, (loss, wce, rank) in zip(logged, history):
        assert (line["loss/total"], line["loss/wce"], line["loss/rank"]) == pytest.approx((loss, wce, rank), rel=1e-3)
    assert (labels != given).sum() > 0 and torch.equal(labels, final)
    same_weights(network, folder)
    with torch.no_grad():
        z, _ = network.eval()(toy_inputs("test", args))
    assert logged[-1]["accuracy/test"] == pytest.approx(accuracy(z, args))
    pairs = [
        (a, b)
        for i, a in weights[-1].items()
        for j, b in weights[-1].items()
        if given[i] == clean[i] and given[j] != clean[j]
    ]
    wins = sum((a > b) + 0.5 * (a == b) for a, b in pairs)
    assert logged[-1]["weight/auroc_clean"] == pytest.approx(wins / len(pairs), abs=1e-4)


def test_the_saved_probabilities_of_scn_are_unweighted(record):
    args, _, folder = record(scn, *SCN)
    network = scn.make_network(args, CLASSES)
    network.load_state_dict(torch.load(folder / "model.pt", weights_only=True)["networks"][0])
    x = toy_inputs("test", args)
    with torch.no_grad():
        z, alpha = network.eval()(x)
    probs, weights = scn.predict(network, [x], args)
    torch.testing.assert_close(probs, z.softmax(1))
    torch.testing.assert_close(weights, alpha)


def test_one_epoch_of_sgd_has_the_full_learning_rate(record):
    _, _, folder = record(scn, *SCN, "--optimizer", "sgd", "--epochs", "1")
    assert lines(folder)[0]["lr"] == 0.01


def test_a_duplicate_in_the_high_group_does_not_undo_a_relabelling(tiny):
    """The same sample twice in a batch: low and relabelled first, high and kept later."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.margin = nn.Parameter(torch.tensor(0.15))
            self.z = nn.Parameter(torch.zeros(4, 2))

        def forward(self, x):
            return self.z + torch.tensor([[0.0, 40], [0, 0], [0, 0], [0, 40]]), torch.tensor(
                [0.1, 0.8, 0.9, 0.95]
            ) + 0 * self.z.sum()

    args = scn.parse_args([*tiny, "--warm-up", "0", "--beta", "0.75"])
    network, current = Fixed(), torch.zeros(3, dtype=torch.int64)
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    batch = torch.zeros(4, 1), torch.tensor([0, 1, 2, 0])
    scalars, _ = scn.train_one_epoch(network, optimizer, [batch], current, 1, args)
    assert current.tolist() == [1, 0, 0] and scalars["relabel/this_epoch"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# NCCTFER, Algorithm 1
# ----------------------------------------------------------------------------------------------------------------------

NCCTFER = ["--warm-up", "1", "--epochs", "4", "--lr", "0.01", "--head-lr", "0.003", "--crop", "2"]


@pytest.mark.parametrize("flags", [[], ["--k", "2", "--mask", "least"], ["--single-head"], ["--no-negative"]])
def test_ncctfer_is_algorithm_1(record, flags):
    args, epochs, folder = record(ncctfer, *NCCTFER, *flags)
    given = toy_labels(args)[0]
    network = ncctfer.make_network(args, CLASSES)
    optimizer, logged = adam(network, args), lines(folder)

    def heads(x):
        features = network.train().backbone(x)
        return [features @ head.weight.T + head.bias for head in (network.positive, network.negative)]

    for t, batches in enumerate(epochs, 1):
        sums, confident = torch.zeros(2), 0
        for (weak, strong), index in batches:
            y, n = given[index], len(index)
            positive, negative = heads(weak)
            p = positive.softmax(1)
            own = p[range(n), y].detach()
            threshold = {c: own[y == c].mean() for c in set(y.tolist())}
            sure = [bool(own[i] >= threshold[y[i].item()] - 1e-7) for i in range(n)]
            confident += sum(sure)
            chosen = sure if t > args.warm_up else [True] * n
            l_s = sum(-p[i, y[i]].log() for i in range(n) if chosen[i]) / sum(chosen)
            l_c = torch.tensor(0.0)
            if t > args.warm_up and args.negative:
                assert not torch.allclose(weak, strong, atol=1e-2)
                z_w, z_s = (positive, heads(strong)[0]) if args.single_head else (negative, heads(strong)[1])
                for i in range(n):
                    if not sure[i]:
                        p_w, p_s = z_w[i].detach().softmax(0), z_s[i].softmax(0)
                        ranked = sorted(range(CLASSES), key=lambda c: -p_w[c].item())
                        kept = ranked[: args.k] if args.mask == "most" else ranked[-args.k :]
                        l_c = l_c - sum(p_w[c] * p_s[c].log() for c in kept) / n
            optimizer.zero_grad()
            (l_s + l_c).backward()
            optimizer.step()
            sums += torch.tensor([l_s.item(), l_c.item()]) / len(batches)
        slow_down(optimizer, args.decay)
        line = logged[t - 1]
        assert (line["loss/supervised"], line["loss/negative"]) == pytest.approx(tuple(sums.tolist()), rel=1e-3)
        assert line["confident/share"] == pytest.approx(confident / 48)
    same_weights(network, folder)
    with torch.no_grad():
        z = network.eval().backbone(toy_inputs("test", args)) @ network.positive.weight.T + network.positive.bias
    assert logged[-1]["accuracy/test"] == pytest.approx(accuracy(z, args))


def test_selection_by_an_averaged_network(record):
    """--select-by average: Eqs. 1-2 once an epoch on the moving average, all samples, evaluation mode."""
    args, epochs, folder = record(ncctfer, *NCCTFER, "--select-by", "average", "--no-negative", "--ema", "0.5")
    given = toy_labels(args)[0]
    network, averaged = ncctfer.make_network(args, CLASSES), ncctfer.make_network(args, CLASSES)
    optimizer, logged, steps = adam(network, args), lines(folder), 0
    for t, batches in enumerate(epochs, 1):
        with torch.no_grad():
            probs = averaged.eval()(toy_inputs("train", args))[0].softmax(1)
        own = probs[range(48), given]
        sure = torch.stack([own[i] >= own[given == given[i]].mean() - 1e-7 for i in range(48)])
        for (weak, _), index in batches:
            y = given[index]
            positive, _ = network.train()(weak)
            keep = sure[index] if t > args.warm_up else torch.ones(len(y), dtype=torch.bool)
            loss = nn.functional.cross_entropy(positive, y, reduction="none")[keep].sum() / keep.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(averaged, network, args.ema, steps)
            steps += 1
        slow_down(optimizer, args.decay)
        if t > args.warm_up:
            assert logged[t - 1]["confident/share"] == pytest.approx(sure.float().mean().item())
    same_weights(network, folder)


def ema_update(averaged, network, decay, steps):
    """averaged <- decay averaged + (1 - decay) network, weights and statistics; the first step copies."""
    own = network.state_dict()
    for name, value in averaged.state_dict().items():
        if steps == 0 or not value.is_floating_point():
            value.copy_(own[name])
        else:
            value.copy_(decay * value + (1 - decay) * own[name])


# ----------------------------------------------------------------------------------------------------------------------
# The two-stage cycle
# ----------------------------------------------------------------------------------------------------------------------

CYCLE = ["--warm-up", "1", "--epochs", "5", "--lr", "0.01", "--head-lr", "0.003", "--crop", "2", "--ema", "0.7"]


CONFIDENT = ["--epochs", "14", "--lr", "0.03", "--head-lr", "0.1", "--warm-up", "5"]  # enough for pseudo-labels


def plain_division(probs, given, cycle, args):
    """Who keeps the label, who may have a pseudo-label, and the margins, sample by sample."""
    n = len(given)
    mean = {c: probs[given == c, c].mean().item() for c in set(given.tolist())}
    kept = [True] * n
    if cycle >= 1 and args.detect:
        kept = [max(mean, key=lambda c: probs[i, c].item() / mean[c]) == given[i].item() for i in range(n)]
        for c in mean:
            members = [i for i in range(n) if given[i] == c]
            if not any(kept[i] for i in members):
                kept[max(members, key=lambda i: probs[i, c].item())] = True
    margins = []
    for c in range(CLASSES):
        sure = [probs[i].max().item() for i in range(n) if kept[i] and given[i] == c and probs[i].argmax() == c]
        scale = args.margin_scale / (1 + math.exp(-max(cycle, 0)))
        margins.append(max(0.8, scale * sum(sure) / len(sure)) if sure else 0.8)
    counts = {c: sum(kept[i] and given[i].item() == c for i in range(n)) for c in mean}
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    rates = {c: (counts[ranked[len(ranked) - 1 - k]] / counts[ranked[0]]) ** args.alpha for k, c in enumerate(ranked)}
    admitted = [False] * n
    for c in range(CLASSES):
        members = [i for i in range(n) if not kept[i] and probs[i].argmax() == c]
        members.sort(key=lambda i: -probs[i].max().item())
        rate = rates.get(c, 1.0) if args.rebalance == "rates" else 1.0
        for i in members[: math.ceil(rate * len(members) - 1e-4)]:
            admitted[i] = True
    return kept, admitted, margins, counts


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--rebalance", "logits"],
        ["--no-semi"],
        ["--consistency-weight", "0.7", *CONFIDENT, "--alpha", "1", "--pseudo-weight", "0.5", "--margin-scale", "0.9"],
    ],
)
def test_the_cycle_divides_and_trains(record, flags):
    args, epochs, folder = record(twostage, *CYCLE, "--detect-by", "confidence", *flags)
    given = toy_labels(args)[0]
    network, averaged = twostage.make_network(args, CLASSES), twostage.make_network(args, CLASSES)
    optimizer, logged, steps = adam(network, args), lines(folder), 0
    faces = toy_inputs("train", args)
    for t, batches in enumerate(epochs, 1):
        with torch.no_grad():
            probs = averaged.eval()(faces).softmax(1)
        kept, admitted, margins, counts = plain_division(probs, given, t - args.warm_up, args)
        assert logged[t - 1]["labelled/share"] == pytest.approx(sum(kept) / 48)
        assert [logged[t - 1][f"weight/margin/{name}"] for name in toyfaces.CLASSES] == pytest.approx(margins, rel=1e-4)
        shift = torch.zeros(CLASSES)
        if args.rebalance == "logits" and t > args.warm_up:
            shift = torch.tensor([max(counts.get(c, 0), 1) / sum(kept) for c in range(CLASSES)]).log()
        sums = torch.zeros(3)
        for (weak, strong), index in batches:
            y, n = given[index], len(index)
            rest = [i for i in range(n) if not kept[index[i]]] if args.semi and t > args.warm_up else []
            views = torch.cat([weak, strong[rest]]) if strong is not None else weak
            z = network.train()(views)
            log_p = (z[:n] + shift).log_softmax(1)
            l_x = sum((-log_p[i, y[i]] for i in range(n) if kept[index[i]]), 0 * z.sum()) / n
            l_u = l_c = torch.tensor(0.0)
            for k, i in enumerate(rest):
                p_w, p_s = z[i].detach().softmax(0), z[n + k].softmax(0)
                label = p_w.argmax()
                if p_w[label] > margins[label] and admitted[index[i]]:
                    l_u = l_u - p_s[label].log() / n
                else:
                    l_c = l_c + ((p_s - p_w) ** 2).sum() / n
            optimizer.zero_grad()
            (l_x + args.pseudo_weight * l_u + args.consistency_weight * l_c).backward()
            optimizer.step()
            ema_update(averaged, network, args.ema, steps)
            steps += 1
            sums += torch.tensor([l_x.item(), l_u.item(), l_c.item()]) / len(batches)
        slow_down(optimizer, args.decay)
        line = logged[t - 1]
        found = [line[f"loss/{name}"] for name in ("labelled", "pseudo", "consistency")]
        assert found == pytest.approx(sums.tolist(), rel=1e-3, abs=1e-6)
    assert logged[-1]["labelled/share"] < 1
    if "--pseudo-weight" in flags:
        assert any(line["loss/pseudo"] > 0 for line in logged)
    same_weights(averaged, folder)
    with torch.no_grad():
        z = averaged.eval()(toy_inputs("test", args))
    assert logged[-1]["accuracy/test"] == pytest.approx(accuracy(z, args))


@pytest.mark.parametrize("cycle", [0, 1, 4])
@pytest.mark.parametrize(
    "flags", [[], ["--alpha", "1"], ["--rebalance", "none"], ["--margin-scale", "1"], ["--no-detect"]]
)
def test_a_division_sample_by_sample(cycle, flags):
    args = twostage.parse_args(["--detect-by", "confidence", *flags])
    generator = torch.Generator().manual_seed(cycle)
    given = torch.multinomial(torch.tensor([8.0, 4, 2, 1, 1, 1, 1]), 300, replacement=True, generator=generator)
    probs = (
        6 * torch.rand(300, CLASSES, generator=generator) + 7 * nn.functional.one_hot(given.roll(3), CLASSES)
    ).softmax(1)
    probs[100:] = (
        3 * torch.rand(200, CLASSES, generator=generator) + 5 * nn.functional.one_hot(given[100:], CLASSES)
    ).softmax(1)
    division = twostage.divide(probs, given, cycle, args)
    kept, admitted, margins, _ = plain_division(probs, given, cycle, args)
    assert division.labelled.tolist() == kept and division.admitted.tolist() == admitted
    assert division.margins.tolist() == pytest.approx(margins, rel=1e-5)
    if cycle and not flags:
        assert 0 < sum(admitted) < 300 - sum(kept)  # the rates refuse some


def test_the_cycle_balances_the_labels_that_it_keeps(record):
    args, epochs, folder = record(twostage, *CYCLE, "--detect-by", "confidence", "--oversample")
    given = toy_labels(args)[0]
    shares = [line["labelled/share"] for line in lines(folder)]
    for share, batches in zip(shares, epochs):
        drawn = torch.cat([index for _, index in batches])
        once = (torch.bincount(drawn, minlength=48) == 1).sum()
        assert len(drawn) == 48 and once >= round(48 * (1 - share))  # the others are drawn once each
    counts = torch.bincount(given[torch.cat([index for _, index in epochs[0]])], minlength=CLASSES)
    assert counts.max() - counts.min() <= 1  # before the first cycle all labels are kept


@pytest.mark.parametrize("script, flags", [(cocuring, COCURING), (scn, SCN), (ncctfer, NCCTFER)])
def test_oversampling_draws_every_class_as_often(record, script, flags):
    args, epochs, _ = record(script, *flags, "--oversample")
    given = toy_labels(args)[0]
    for batches in epochs:
        counts = torch.bincount(given[torch.cat([index for _, index in batches])], minlength=CLASSES)
        assert counts.max() - counts.min() <= 1
