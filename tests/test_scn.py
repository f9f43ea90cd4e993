"""SCN: losses and rules against hand-computed cases, then the script itself, in-process, on tiny input."""

import copy
import csv
import json
import math

import pytest
import torch
from conftest import check_resume, lines
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import scn
from scn import logit_weighted_cross_entropy, rank_regularization, relabel, relabel_all

# logit_weighted_cross_entropy, Eq. 2


def test_weighted_cross_entropy_by_hand():
    # logits (0, ln 9) times 1/2: softmax (1/4, 3/4)
    got = logit_weighted_cross_entropy(torch.tensor([[0.0, math.log(9)]]), torch.tensor([0.5]), torch.tensor([0]))
    assert got.item() == pytest.approx(math.log(4), abs=1e-6)


def test_weighted_cross_entropy_and_its_gradients_equal_float64_arithmetic():
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(6, 5, dtype=torch.float64, generator=generator) * 3).requires_grad_()
    alpha = torch.rand(6, dtype=torch.float64, generator=generator).requires_grad_()
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = logit_weighted_cross_entropy(z, alpha, y)
    p = (alpha[:, None] * z).softmax(1).detach()
    assert loss.item() == pytest.approx(-sum(p[i, y[i]].log().item() for i in range(6)) / 6, rel=1e-12)
    loss.backward()
    error = (p - torch.eye(5, dtype=torch.float64)[y]) / 6
    torch.testing.assert_close(z.grad, alpha.detach()[:, None] * error)
    torch.testing.assert_close(alpha.grad, (z.detach() * error).sum(1))


def test_importance_one_is_plain_cross_entropy_and_zero_a_uniform_guess():
    z, y = torch.randn(4, 7), torch.tensor([0, 1, 2, 3])
    assert logit_weighted_cross_entropy(z, torch.ones(4), y).item() == pytest.approx(
        torch.nn.functional.cross_entropy(z, y).item()
    )
    assert logit_weighted_cross_entropy(z, torch.zeros(4), y).item() == pytest.approx(math.log(7), abs=1e-6)


# rank_regularization, Eqs. 3-4


@pytest.mark.parametrize(
    "alpha, beta, margin, expected",
    [
        ([0.9, 0.8, 0.7, 0.1], 0.5, 0.5, 0.05),  # 0.5 - (0.85 - 0.4)
        ([0.1, 0.9, 0.7, 0.8], 0.5, 0.5, 0.05),  # ranked, whatever the order
        ([0.9, 0.8, 0.7, 0.1], 0.5, 0.4, 0.0),  # the gap is wide enough
        ([0.5, 0.5], 0.7, 0.15, 0.15),  # ties: no gap
        ([0.9, 0.1], 0.99, 1.0, 0.2),  # the low group keeps one sample
        ([0.9, 0.1], 0.01, 1.0, 0.2),  # and so does the high group
        ([0.3], 0.7, 0.15, 0.0),
    ],
)
def test_rank_regularization_by_hand(alpha, beta, margin, expected):
    assert rank_regularization(torch.tensor(alpha), beta, margin).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "n, beta, m", [(10, 0.7, 7), (64, 0.7, 44), (3, 0.7, 2), (2, 0.7, 1), (10, 0.3, 3), (100, 0.29, 29)]
)
def test_the_high_group_has_the_share_beta(n, beta, m):
    assert scn.high_count(n, beta) == m


def test_rank_gradient_raises_the_high_and_lowers_the_low_group_and_a_learned_margin():
    alpha = torch.tensor([0.5, 0.6, 0.55, 0.4], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    rank_regularization(alpha, 0.75, margin).backward()  # the gap is 0.15
    torch.testing.assert_close(alpha.grad, torch.tensor([-1 / 3, -1 / 3, -1 / 3, 1.0], dtype=torch.float64))
    assert margin.grad.item() == 1


def test_rank_regularization_of_one_sample_can_be_differentiated():
    alpha = torch.tensor([0.3], requires_grad=True)
    rank_regularization(alpha).backward()
    assert alpha.grad.item() == 0


# relabel, Eq. 5


def test_only_the_low_group_is_relabelled():
    probs = torch.tensor([[0.1, 0.9]] * 4)
    labels = torch.zeros(4, dtype=torch.int64)
    assert relabel(probs, torch.tensor([0.9, 0.1, 0.8, 0.2]), labels, beta=0.5).tolist() == [0, 1, 0, 1]
    assert relabel_all(probs, labels).tolist() == [1, 1, 1, 1]
    assert labels.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "p, margin, expected",
    [([0.25, 0.75], 0.5, 0), ([0.25, 0.75], 0.4999, 1), ([0.9, 0.1], 0.0, 0), ([0.5, 0.5], 0.0, 0)],
)
def test_the_margin_of_relabelling_is_strict(p, margin, expected):
    probs = torch.tensor([[0.5, 0.5], p])
    got = relabel(probs, torch.tensor([0.9, 0.1]), torch.tensor([0, 0]), beta=0.5, margin=margin)
    assert got.tolist() == [0, expected]


def test_ties_leave_both_groups_their_size_and_one_sample_is_left_alone():
    probs = torch.tensor([[0.0, 1.0]] * 10)
    labels = torch.zeros(10, dtype=torch.int64)
    assert relabel(probs, torch.full((10,), 0.5), labels).sum() == 3
    one = relabel(probs[:1], torch.tensor([0.1]), labels[:1])
    assert one.tolist() == [0] and one is not labels


# train_one_epoch, Sec. 3, on batches of one's own


class Small(nn.Module):
    """A backbone, a head, the attention and its margin: a few dozen weights."""

    def __init__(self, margin):
        super().__init__()
        torch.manual_seed(0)
        # (no bias before the batch normalisation: Adam would follow its rounding errors)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
        self.head, self.attention = nn.Linear(8, 4), nn.Linear(8, 1)
        self.margin = nn.Parameter(torch.tensor(margin))

    def forward(self, x):
        features = self.backbone(x)
        return self.head(features), 1 / (1 + torch.exp(-self.attention(features)[:, 0]))


def small_data():
    """Labels of 44 samples, 40 % wrong, and batches: in each eight samples have two views, the last is in none."""
    generator = torch.Generator().manual_seed(5)
    clean = torch.arange(44) % 4
    centres = 2 * torch.randn(4, 3, 2, 2, generator=generator)
    x = centres[clean] + 0.5 * torch.randn(44, 3, 2, 2, generator=generator)
    given = torch.where(torch.rand(44, generator=generator) < 0.4, (clean + 1) % 4, clean)
    parts = torch.randperm(43, generator=generator).split([15, 15, 13])
    places = [torch.cat([part, part[3:11]]) for part in parts]
    return given, [(x[i] + torch.randn(len(i), 3, 2, 2, generator=generator), i) for i in places]


def test_a_batch_of_one_is_trained_on_and_spoils_no_mean():
    """The last one of a DataLoader of one's own may be so small."""
    args = scn.parse_args(["--warm-up", "0", "--precision", "fp32"])
    network = Small(0.15)
    network.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    given, (whole, (x, index), _) = small_data()

    def train(batches):
        model = copy.deepcopy(network)
        return scn.train_one_epoch(model, scn.make_optimizer(model, args)[0], batches, given.clone(), 1, args)

    scalars, weights = train([whole, (x[:1], index[:1])])
    assert all(math.isfinite(value) for value in scalars.values()) and weights[index[0]] > 0
    assert scalars["weight/high"] == pytest.approx(train([whole])[0]["weight/high"])
    scalars, _ = train([(x[k : k + 1], index[k : k + 1]) for k in range(3)])
    assert scalars["loss/wce"] > 0 and "weight/gap" not in scalars


def plain_epoch(network, optimizer, batches, labels, relabelling, args):
    """Sec. 3, sample by sample. Returns the scalars, the alphas, and how often a later view in the high group came."""
    names = ("loss/wce", "loss/rank", "loss/total", "weight/high", "weight/low", "accuracy/train")
    sums, alphas, changed, kept = dict.fromkeys(names, 0.0), [-1.0] * len(labels), 0, 0
    for x, index in batches:
        y, n, before = labels[index].tolist(), len(index), labels.clone()
        z, alpha = network(x)
        scaled = [alpha[i] * z[i] if args.weights else z[i] for i in range(n)]
        p = [(own - own.max()).exp() / (own - own.max()).exp().sum() for own in scaled]
        wce = -sum(p[i][y[i]].log() for i in range(n)) / n  # Eq. 2
        ranked = sorted(range(n), key=lambda i: alpha[i].item(), reverse=True)
        m = int(args.beta * n + 1e-9)
        high, low = (sum(alpha[i] for i in rows) / len(rows) for rows in (ranked[:m], ranked[m:]))  # Eq. 4
        margin = network.margin if args.learn_margin else args.margin1
        rank = torch.relu(margin - (high - low))  # Eq. 3
        loss = args.gamma * rank + (1 - args.gamma) * wce if args.rank else wce
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        best = [own.argmax().item() for own in p]
        hits = sum(best[i] == y[i] for i in range(n)) / sum(len(index) for _, index in batches)
        numbers = [wce.item(), rank.item(), loss.item(), high.item(), low.item()]
        for name, value in zip(names, [*(value / len(batches) for value in numbers), hits]):
            sums[name] += value
        everywhere = args.relabel_batch or not (args.weights or args.rank)
        for i, place in enumerate(index.tolist()):
            alphas[place] = alpha[i].item()
            if relabelling and (everywhere or i in ranked[m:]):  # Eq. 5
                labels[place] = best[i] if p[i][best[i]] - p[i][y[i]] > args.margin2 else y[i]
            elif labels[place] != before[place]:
                kept += 1
        changed += (labels != before).sum().item()
    return sums | {"relabel/this_epoch": changed, "weight/margin1": network.margin.item()}, alphas, kept


SGD = ["--optimizer", "sgd", "--weight-decay", "0.03", "--lr", "0.2", "--head-lr", "0.1"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--gamma", "0.2", "--beta", "0.4", "--margin1", "0.4", "--margin2", "0.15"],
        ["--learn-margin", "--weight-decay", "0.01"],
        ["--relabel-batch", "--warm-up", "3"],
        ["--no-weights"],
        ["--no-rank"],
        ["--no-weights", "--no-rank"],
        ["--no-weights", "--no-rank", "--no-relabel"],
        SGD,
    ],
    ids=" ".join,
)
def test_an_epoch_is_section_3_written_plainly(flags):
    fixed = ["--epochs", "8", "--precision", "fp32", "--lr", "0.05", "--head-lr", "0.02"]
    args = scn.parse_args([*fixed, "--warm-up", "1", "--margin2", "0.05", *flags])
    given, batches = small_data()
    network = Small(args.margin1)
    network.margin.requires_grad_(args.learn_margin)
    optimizer, scheduler = scn.make_optimizer(network, args)
    plain = copy.deepcopy(network)
    groups = [
        dict(params=plain.backbone.parameters(), lr=args.lr),
        dict(params=[*plain.head.parameters(), *plain.attention.parameters(), plain.margin], lr=args.head_lr),
    ]
    if args.optimizer == "sgd":
        own_optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)
    else:
        own_optimizer = torch.optim.Adam(groups, weight_decay=args.weight_decay)
    current, labels, kept = given.clone(), given.clone(), 0
    for t in range(1, 9):
        network.eval()  # the epoch itself has to put it into training mode
        scalars, weights = scn.train_one_epoch(network, optimizer, batches, current, t, args)
        scheduler.step()
        relabelling = "--no-relabel" not in flags and t > args.warm_up
        expected, alphas, undone = plain_epoch(plain, own_optimizer, batches, labels, relabelling, args)
        kept += undone
        for group in own_optimizer.param_groups:
            group["lr"] *= (0.1 if t in (3, 6) else 1) if args.optimizer == "sgd" else 0.95
        assert torch.equal(current, labels)
        expected["weight/gap"] = expected["weight/high"] - expected["weight/low"]
        assert scalars == pytest.approx(expected, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(weights, torch.tensor(alphas), rtol=1e-4, atol=1e-5)
        assert weights[43] == -1 and (weights[:43] > 0).all()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert (current != given).sum() > 3 or "--no-relabel" in flags
    assert kept > 0 or flags  # a sample was relabelled in the low group and seen in the high group in one batch


# The script


def test_alpha_lies_in_0_1_and_is_float32_under_bf16():
    network = scn.make_network(scn.parse_args([]), 7).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, alpha = network(torch.randn(3, 3, 48, 48))
    assert logits.shape == (3, 7) and logits.dtype == alpha.dtype == torch.float32
    assert (alpha > 0).all() and (alpha < 1).all() and alpha.unique().numel() == 3


def test_predictions_are_the_softmax_of_unweighted_logits(tiny):
    args = scn.parse_args(["--precision", "fp32"])
    network, x = scn.make_network(args, 7), torch.randn(5, 3, 32, 32)
    nn.init.normal_(network.attention.weight)
    with torch.no_grad():
        z, alpha = network.eval()(x)
    probs, weights = scn.predict(network.train(), [x[:3], x[3:]], args)
    torch.testing.assert_close(probs, z.softmax(1))
    torch.testing.assert_close(weights, alpha)
    assert not torch.allclose(probs, (alpha[:, None] * z).softmax(1), atol=1e-3)


def test_the_auroc_of_weights_is_that_of_the_samples_drawn(tiny, tmp_path, monkeypatch):
    """Oversampling leaves samples undrawn: they have no weight."""
    returned, honest = [], scn.train_one_epoch

    def train_one_epoch(*arguments):
        returned.append(honest(*arguments))
        return returned[-1]

    monkeypatch.setattr(scn, "train_one_epoch", train_one_epoch)
    assert scn.main([*tiny, "--oversample", "--out", str(tmp_path), "--name", "run"]) == 0
    with open(tmp_path / "run" / "labels.csv") as file:
        right = {row["name"]: row["given"] == row["clean"] for row in csv.DictReader(file)}
    for (_, weights), line in zip(returned, lines(tmp_path / "run")):
        drawn = [(w, right[f"train_{i:05d}.png"]) for i, w in enumerate(weights.tolist()) if w != -1]
        assert len(drawn) < len(right)
        assert line["weight/auroc_clean"] == pytest.approx(roc_auc_score(*reversed(list(zip(*drawn)))), abs=1e-6)


def test_a_run_logs_weights_and_relabels(tiny, tmp_path):
    arguments = [*tiny, "--warm-up", "1", "--margin2", "0.01", "--out", str(tmp_path), "--name", "run"]
    assert scn.main(arguments) == 0
    folder = tmp_path / "run"
    history = lines(folder)
    last = history[-1]
    for tag in (
        "loss/total",
        "loss/wce",
        "loss/rank",
        "weight/high",
        "weight/low",
        "weight/auroc_clean",
        "labels/accuracy",
    ):
        assert tag in last
    assert last["loss/total"] == pytest.approx((last["loss/wce"] + last["loss/rank"]) / 2, abs=1e-5)
    assert (
        last["weight/gap"] == pytest.approx(last["weight/high"] - last["weight/low"])
        and 0 < last["weight/low"] < last["weight/high"] < 1
    )
    assert history[0]["relabel/this_epoch"] == 0 and history[1]["relabel/this_epoch"] > 0
    events = EventAccumulator(str(folder)).Reload()
    assert "weight" in events.Tags()["histograms"] and {"weights", "audit", "confusion"} <= set(events.Tags()["images"])
    assert [e.step for e in events.Scalars("weight/high")] == [1, 2, 3]
    with open(folder / "labels.csv") as file:
        assert sum(row["given"] != row["final"] for row in csv.DictReader(file)) == last["relabel/changed"]
    assert (folder / "weights.png").read_bytes()[:4] == b"\x89PNG"


def test_ablations_are_told_apart(tiny, tmp_path):
    def run(*flags):
        name = "run" + "".join(flags)
        assert (
            scn.main([*tiny, "--warm-up", "0", "--margin2", "0.01", *flags, "--out", str(tmp_path), "--name", name])
            == 0
        )
        return lines(tmp_path / name)

    plain = run("--no-weights", "--no-rank", "--no-relabel")
    assert all(line["loss/total"] == line["loss/wce"] and line["relabel/changed"] == 0 for line in plain)
    assert (
        plain[0]["weight/auroc_clean"] != plain[-1]["weight/auroc_clean"]
    )  # the backbone moves it, though nothing trains it
    low, batch = run(), run("--relabel-batch")
    assert batch[0]["relabel/this_epoch"] > low[0]["relabel/this_epoch"]
    rank_only = run("--no-weights", "--no-relabel")
    assert rank_only[0]["loss/total"] == pytest.approx(
        (rank_only[0]["loss/wce"] + rank_only[0]["loss/rank"]) / 2, abs=1e-5
    )
    learned = run("--learn-margin")
    assert learned[-1]["weight/margin1"] != pytest.approx(0.15, abs=1e-6) and low[-1][
        "weight/margin1"
    ] == pytest.approx(0.15)
    naive = run("--no-weights", "--no-rank")
    assert naive[0]["relabel/this_epoch"] > 0


def test_both_optimisers_run_their_schedule(tiny, tmp_path):
    assert (
        scn.main([*tiny, "--optimizer", "sgd", "--lr", "0.1", "--epochs", "8", "--out", str(tmp_path), "--name", "sgd"])
        == 0
    )
    rates = [line["lr"] for line in lines(tmp_path / "sgd")]
    assert rates == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 2)
    one = ["--optimizer", "sgd", "--lr", "0.1", "--epochs", "1", "--out", str(tmp_path), "--name", "one"]
    assert scn.main([*tiny, *one]) == 0 and lines(tmp_path / "one")[0]["lr"] == 0.1
    assert scn.main([*tiny, "--out", str(tmp_path), "--name", "adam"]) == 0
    assert [line["lr"] for line in lines(tmp_path / "adam")] == pytest.approx([1e-3, 0.95e-3, 0.95**2 * 1e-3])


def test_a_stopped_run_ends_as_if_it_was_not(tiny, tmp_path, monkeypatch):
    check_resume(scn.main, [*tiny, "--warm-up", "0", "--margin2", "0.01", "--learn-margin"], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--beta", "0"], "beta"),
        (["--beta", "1"], "beta"),
        (["--beta", "nan"], "beta"),
        (["--gamma", "2"], "gamma"),
        (["--margin1", "-1"], "margin1"),
        (["--margin2", "2"], "margin2"),
        (["--warm-up", "-1"], "warm-up"),
        (["--networks", "2"], "networks"),
        (["--learn-margin", "--no-rank"], "--learn-margin"),
        (["--relabel-batch", "--no-relabel"], "--relabel-batch"),
    ],
)
def test_bad_values_are_refused(arguments, words, capsys):
    assert scn.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_the_pretrained_preset_is_the_papers():
    args = scn.parse_args(["--data", "raf", "--pretrained", "x.pth"])
    assert (args.epochs, args.optimizer, args.beta, args.margin1, args.margin2, args.gamma, args.warm_up) == (
        40,
        "sgd",
        0.7,
        0.15,
        0.2,
        0.5,
        9,
    )
    assert args.lr == pytest.approx(0.1 * args.batch_size / 1024)
    assert json.dumps(vars(args))


def test_the_margin_starts_at_the_one_of_the_flags():
    for flags, learned in ((["--learn-margin"], True), ([], False)):
        network = scn.make_network(scn.parse_args(["--margin1", "0.4", *flags]), 7)
        assert network.margin.item() == pytest.approx(0.4) and network.margin.requires_grad == learned


def test_with_pretrained_weights_the_recipe_is_the_papers():
    args = scn.parse_args(["--data", "raf", "--pretrained", "x.pth"])
    assert (args.epochs, args.warm_up, args.beta, args.margin1, args.margin2) == (40, 9, 0.7, 0.15, 0.2)  # Sec. 3.5
    assert args.optimizer == "sgd" and args.lr == args.head_lr == 0.1 * args.batch_size / 1024
    assert args.weight_decay == 1e-4  # official code
