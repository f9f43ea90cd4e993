"""The joint-distribution GAN: CCC and hinge losses by hand, networks of every size, what each step trains, runs."""

import copy
import csv
import dataclasses
import itertools
import json
from contextlib import contextmanager
from types import SimpleNamespace

from support import figures, toyfaces
from support.datasets import Split, inject, write_labels
from support.figures import generate_faces
from support.label_sets import class_va, load_label_sets
from support.networks import ResidualBlock, ResidualMLP, SelfAttention, Zero
from support.runs import Run

import pytest
import torch
from conftest import build_affectnet, build_cifar10, check_resume, lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import common
import inject_noise
import jointgan
from jointgan import (
    LATENT,
    Decoder,
    Discriminator,
    Encoder,
    ccc,
    discriminator_loss,
    generator_loss,
    logit_penalty,
    multitask_loss,
)

SMALL = ["--width", "0.02"]


def test_ccc_is_that_of_population_moments():
    # Means 2 and 4, covariance 4/3, variances 2/3 and 8/3: 2 * 4/3 / (10/3 + 4) = 4/11. Sample moments would give
    # 0.4286.
    assert ccc(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 6])).item() == pytest.approx(4 / 11)
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    values -= values.mean()
    assert ccc(values, values).item() == pytest.approx(1)
    assert ccc(values, -values).item() == pytest.approx(-1)


def test_ccc_of_constants_is_zero_and_differentiable():
    constant = torch.full((4,), 0.3, requires_grad=True)
    got = ccc(constant, torch.full((4,), 0.3))
    got.backward()
    assert got.item() == 0 and torch.isfinite(constant.grad).all()
    assert ccc(torch.full((4,), 0.3), torch.tensor([0.1, 0.2, 0.3, 0.4])).item() == 0  # no covariance
    assert ccc(torch.zeros(3), torch.ones(3)).item() == 0
    for count, value in itertools.product((6, 7, 8), (0.1, 0.3, 0.7)):  # their means are rounded
        same = torch.full((count,), value)
        assert ccc(same, same).item() == 0 and ccc(same, same + 0.1).item() == 0


def test_ccc_gradient_is_that_of_float64():
    p = torch.randn(6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda q: ccc(q, torch.linspace(-1, 1, 6, dtype=torch.float64)), p)


def test_multitask_loss_by_hand():
    even, certain = torch.zeros(2, 4), torch.tensor([[100.0, 0, 0, 0], [0, 100, 0, 0]])
    labels = torch.tensor([0, 1])
    assert multitask_loss([even, certain], [labels, labels], None, None).item() == pytest.approx(
        torch.tensor(4.0).log().item(), abs=1e-6
    )
    va = torch.tensor([[1.0, 2], [2, 4], [3, 6]])
    turned = va.flip(1)  # valence 2, 4, 6 for 1, 2, 3, and the other way round: both CCC are 4/11
    assert multitask_loss([], [], turned, va, gamma=0.5).item() == pytest.approx(0.5 * (1 - 4 / 11))
    with pytest.raises(ValueError):
        multitask_loss([even], [labels, labels], None, None)


def test_hinge_losses_by_hand():
    encoder, decoder = torch.tensor([[2.0, 0.0], [0.5, -1.0]]), torch.tensor([[-2.0, 0.0], [-0.5, 1.0]])
    assert discriminator_loss(encoder, decoder).item() == pytest.approx((0 + 1 + 0.5 + 2) / 4 + (0 + 1 + 0.5 + 2) / 4)
    assert generator_loss(encoder, decoder).item() == pytest.approx((2 + 0 + 0.5 - 1) / 4 - (-2 + 0 - 0.5 + 1) / 4)
    assert discriminator_loss(torch.ones(3, 2), -torch.ones(3, 2)).item() == 0


def test_smoothing_gives_all_classes_a_share():
    z, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 0])
    target = 0.7 * nn.functional.one_hot(labels, 4) + 0.3 / 4
    expected = -(target * z.log_softmax(1)).sum(1).mean()
    assert multitask_loss([z], [labels], None, None, smoothing=0.3).item() == pytest.approx(expected.item(), rel=1e-5)


def test_logit_penalty_by_hand():
    assert logit_penalty([torch.tensor([[1.0, 3], [0, 0]]), torch.tensor([[4.0, 4], [2, 0]])]).item() == 1 + 1


# The networks


VECTORS = {"y0": LATENT, "y1": 7, "y2": 7, "va": 2}


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("has_va", [True, False])
@pytest.mark.parametrize("authors", [True, False])
def test_every_stream_has_its_shape(size, has_va, authors):
    n, classes = 2, [7, 7, 5]
    encoder = Encoder(size, 0.02, classes, has_va, authors=authors)
    decoder = Decoder(size, 0.02, LATENT + sum(classes) + 2 * has_va)
    vectors = {"y0": LATENT, "y1": 7, "y2": 7, "y3": 5} | ({"va": 2} if has_va else {})
    discriminator = Discriminator(size, 0.02, vectors)
    x = torch.randn(n, 3, size, size)
    mean, log_variance, outputs = encoder(x)
    assert mean.shape == log_variance.shape == (n, LATENT)
    assert [tuple(z.shape) for z in outputs] == [(n, c) for c in classes] + [(n, 2)] * has_va
    made = decoder([mean, *outputs])
    assert made.shape == x.shape and made.abs().max() <= 1
    scores, again = discriminator([made, mean, *outputs], [made, mean, *outputs])
    assert discriminator.scores == ["joint", "x", *vectors]
    assert scores.shape == (n, len(discriminator.scores)) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, again)


def test_the_encoder_of_the_authors():
    own, authors = Encoder(32, 0.02, [7], True), Encoder(32, 0.02, [7], True, authors=True)

    def kinds(network):
        return [sum(isinstance(m, kind) for m in network.modules()) for kind in (nn.BatchNorm2d, nn.Dropout, nn.Linear)]

    assert kinds(own) == [13, 0, 5] and kinds(authors) == [0, 2, 6]
    wide = Encoder(32, 0.25, [7], True, authors=True)
    convolutions = [m for m in wide.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions:  # the start of their encoder_net.py
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.15)
        assert not conv.bias.any()
    assert len(convolutions) == 13
    with torch.no_grad():
        for network in (own, authors):
            network.va[0].bias.fill_(5)
    x = torch.randn(4, 3, 32, 32)
    assert own.eval()(x)[2][1].abs().max() <= 1 and authors.eval()(x)[2][1].min() > 2  # tanh, and none


def test_heads_are_float32_under_bf16():
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance, outputs = Encoder(32, 0.02, [7], True)(torch.randn(4, 3, 32, 32))
    assert {z.dtype for z in (mean, log_variance, *outputs)} == {torch.float32}
    assert (outputs[1].bfloat16().float() != outputs[1]).any()  # not rounded to bf16 on the way


def test_a_face_changes_with_each_of_its_vectors():
    torch.manual_seed(1)
    decoder = Decoder(32, 0.1, sum(VECTORS.values())).eval()
    vectors = [torch.randn(6, length) for length in VECTORS.values()]
    faces = decoder(vectors)
    for k in range(len(vectors)):
        changed = [v.roll(1, 0) if i == k else v for i, v in enumerate(vectors)]
        assert (decoder(changed) - faces).abs().amax((1, 2, 3)).min() > 1e-4


def test_a_score_changes_with_what_it_is_of_and_the_joint_score_with_all():
    torch.manual_seed(1)
    network = Discriminator(32, 0.1, VECTORS).eval()
    side = [torch.randn(6, 3, 32, 32), *(torch.randn(6, length) for length in VECTORS.values())]
    (scores,) = network(side)
    for k in range(len(side)):
        (other,) = network([v.roll(1, 0) if i == k else v for i, v in enumerate(side)])
        moved = (other - scores).abs().amax(0) > 1e-6
        assert moved.tolist() == [True] + [i == k for i in range(len(side))]


def test_the_first_block_of_the_discriminator_sees_dark_pixels_and_the_last_keeps_the_size():
    network, dark = Discriminator(64, 0.1, VECTORS).eval(), -torch.rand(2, 3, 64, 64)
    first = network.image[0]
    inner = first.two(first.one(dark).relu())
    expected = nn.functional.avg_pool2d(inner, 2) + first.shortcut(nn.functional.avg_pool2d(dark, 2))
    torch.testing.assert_close(first(dark), expected)
    halving = [block.halve for block in network.image if isinstance(block, ResidualBlock)]
    assert halving == [True] * 4 + [False] and network.image(dark).shape[2:] == (4, 4)


def test_later_blocks_start_with_a_relu_and_every_branch_has_a_skip():
    block, x, pool = ResidualBlock(4, 8).eval(), torch.randn(2, 4, 8, 8), nn.functional.avg_pool2d
    torch.testing.assert_close(block(x), pool(block.two(block.one(x.relu()).relu()), 2) + block.shortcut(pool(x, 2)))
    stream, v = ResidualMLP(5, 8).eval(), torch.randn(3, 5)
    features = stream.inlet(v)
    for branch in stream.branches:
        features = features + branch(features)
    torch.testing.assert_close(stream(v), features)


def test_attention_weights_the_places_of_the_keys():
    block, x = SelfAttention(8).eval(), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x)
    nn.init.ones_(block.gain)
    q = block.query(x).flatten(2)
    k, v = (nn.functional.max_pool2d(part(x), 2).flatten(2) for part in (block.key, block.value))
    shares = torch.einsum("ncp,ncs->nps", q, k).exp()
    shares = shares / shares.sum(2, keepdim=True)
    seen = torch.einsum("nps,ncs->ncp", shares, v).unflatten(2, (4, 4))
    torch.testing.assert_close(block(x), x + block.out(seen))


def test_the_encoder_has_the_widths_of_vgg16():
    widths = [m.out_channels for m in Encoder(32, 1.0, [7], True).modules() if isinstance(m, nn.Conv2d)]
    assert widths == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 and (jointgan.HIDDEN, LATENT) == (500, 100)


def test_the_networks_are_those_of_the_flags():
    def made(*flags):
        return jointgan.make_networks(jointgan.parse_args(["--data", "toy", *SMALL, *flags]), 7, 1, True)

    def unused(discriminator):
        return [isinstance(score, Zero) for score in (discriminator.joint, *discriminator.marginals)]

    assert unused(made()[2]) == [False] * 5
    assert unused(made("--no-joint")[2]) == [True] + [False] * 4
    assert unused(made("--no-marginal")[2]) == [False] + [True] * 4
    assert unused(made("--no-decoder")[2]) == [False, True] + [False] * 3 and made("--no-decoder")[1] is None
    assert made("--lambda", "0")[1:] == (None, None)
    norms = [any(isinstance(m, nn.BatchNorm2d) for m in made(*flags)[0].modules()) for flags in ([], ["--authors-vgg"])]
    assert norms == [True, False]


def test_scores_that_are_not_used_are_zero_and_keep_their_columns():
    side = [torch.randn(4, 3, 32, 32), *(torch.randn(4, length) for length in VECTORS.values())]

    def used(**flags):
        network = Discriminator(32, 0.02, VECTORS, **flags)
        (scores,) = network(side)
        assert network.scores[:6] == ["joint", "x", "y0", "y1", "y2", "va"] and scores.shape[1] == len(network.scores)
        return [name for name, column in zip(network.scores, scores.T) if (column != 0).any()]

    assert used() == ["joint", "x", "y0", "y1", "y2", "va"]
    assert used(joint=False) == ["x", "y0", "y1", "y2", "va"]
    assert used(marginal=False) == ["joint"]
    assert used(image=False) == ["joint", "y0", "y1", "y2", "va"]


def test_every_discriminator_weight_is_spectrally_normalised():
    network = Discriminator(32, 0.02, VECTORS)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for _ in range(200):  # power iterations
                weight = module.weight
            assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_norms_are_computed_once_and_outside_of_autocast(monkeypatch):
    """On CUDA bf16 would be used for them."""
    args = jointgan.parse_args(["--data", "toy", *SMALL])
    networks = jointgan.make_networks(args, 7, 1, False)
    normalised = [m for network in networks[1:] for m in network.modules() if parametrize.is_parametrized(m)]
    calls = []

    def forward(self, weight):
        calls.append(torch.is_autocast_enabled("cpu"))
        return weight

    monkeypatch.setattr(parametrizations._SpectralNorm, "forward", forward)
    x, noisy = torch.randn(4, 3, 32, 32), [torch.eye(7)[:4]]
    for for_d in (True, False):
        jointgan.score_both_sides(networks, x, networks[0](x), noisy, "bf16", for_d)
        assert calls == [False] * len(normalised)
        calls.clear()


# Algorithm 1, on batches of one's own


class SmallEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_variance = nn.Linear(12, 3), nn.Linear(12, 3)
        self.labels, self.va = nn.ModuleList([nn.Linear(12, 4), nn.Linear(12, 4)]), nn.Linear(12, 2)

    def forward(self, x):
        x = x.flatten(1)
        return self.mean(x), self.log_variance(x), [*(head(x) for head in self.labels), self.va(x).tanh()]


class SmallDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 + 4 + 4 + 2, 12)

    def forward(self, vectors):
        return self.layer(torch.cat(vectors, 1)).unflatten(1, (3, 2, 2)).tanh()


class SmallDiscriminator(nn.Module):
    """Three scores of everything, none of which is symmetric in its inputs."""

    scores = ["one", "two", "three"]

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12 + 3 + 4 + 4 + 2, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, *sides):
        return tuple(self.layers(torch.cat([v.flatten(1) for v in side], 1)) for side in sides)


def plain_ccc(p, t):
    n = len(p)
    mp, mt = sum(p) / n, sum(t) / n
    covariance = sum((a - mp) * (b - mt) for a, b in zip(p, t)) / n
    return 2 * covariance / (sum((a - mp) ** 2 for a in p) / n + sum((b - mt) ** 2 for b in t) / n + (mp - mt) ** 2)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lambda", "0.3", "--gamma", "2", "--d-steps", "1", "--beta1", "0.2"],
        ["--no-decoder"],
        ["--label-smoothing", "0.2", "--logit-penalty", "0.1", "--lambda", "0"],
    ],
    ids=" ".join,
)
def test_an_epoch_is_algorithm_1_written_plainly(flags):
    fixed = ["--precision", "fp32", "--lr", "0.01", "--warm-up", "1"]
    args = jointgan.parse_args(["--data", "toy", *fixed, *flags])
    torch.manual_seed(3)
    networks = [SmallEncoder(), SmallDecoder() if args.decoder and args.lam else None]
    networks.append(SmallDiscriminator() if args.lam else None)
    plain = [copy.deepcopy(network) for network in networks]
    optimizers = jointgan.make_optimizers(networks, args)
    sets, va = [torch.arange(20) % 4, torch.arange(20) * 3 // 5 % 4], torch.rand(20, 2) * 2 - 1
    batches = [(torch.randn(len(part), 3, 2, 2), part) for part in torch.randperm(20).split([8, 8, 4])]
    encoder, decoder, discriminator = plain
    groups = [dict(params=encoder.parameters(), betas=(0.9, 0.999))]
    groups += [dict(params=decoder.parameters(), betas=(args.beta1, 0.999))] if decoder else []
    optimizer = torch.optim.Adam(groups, lr=0.01)
    critic = torch.optim.Adam(discriminator.parameters(), lr=0.01, betas=(args.beta1, 0.999)) if discriminator else None

    for epoch in (1, 2, 3):
        torch.manual_seed(epoch)
        scalars = jointgan.train_one_epoch(networks, optimizers, batches, [*sets, va], epoch, args)
        torch.manual_seed(epoch)
        hits = 0
        sums = dict.fromkeys(("total", "cross_entropy", "discriminator", "generator", "enc", "dec"), 0.0)
        for x, index in batches:
            n, y1, y2, t = len(x), sets[0][index], sets[1][index], va[index]

            def sides(y0, z1, z2, a, noise):
                real = torch.cat([x.flatten(1), y0, z1, z2, a], 1)
                labels = [nn.functional.one_hot(y, 4).float() for y in (y1, y2)]  # noqa: B023 - called at once
                made = decoder([noise, *labels, t]) if decoder else x  # noqa: B023
                generated = torch.cat([made.flatten(1), noise, *labels, t], 1)  # noqa: B023
                return discriminator.layers(real), discriminator.layers(generated)

            mean, log_variance, (z1, z2, a) = encoder(x)
            hits += ((z1.softmax(1) + z2.softmax(1)).argmax(1) == y1).sum().item()
            if args.lam and epoch > 1:
                for _ in range(args.d_steps):
                    eps, noise = torch.randn(n, 3), torch.randn(n, 3)
                    with torch.no_grad():
                        y0 = mean + torch.sqrt(torch.exp(log_variance)) * eps
                    own = [v.detach() for v in (y0, z1, z2, a)]
                    s_enc, s_dec = sides(*own, noise)
                    hinge = torch.clamp(1 - s_enc, min=0).mean() + torch.clamp(1 + s_dec, min=0).mean()
                    critic.zero_grad()
                    hinge.backward()
                    critic.step()
                if decoder:
                    decoder.zero_grad()  # of D's steps
                eps, noise = torch.randn(n, 3), torch.randn(n, 3)
                s_enc, s_dec = sides(mean + torch.sqrt(torch.exp(log_variance)) * eps, z1, z2, a, noise)
            ce = sum(-z.log_softmax(1)[range(n), y].mean() for z, y in ((z1, y1), (z2, y2)))
            e = args.label_smoothing
            smooth = sum(-z.log_softmax(1).mean() for z in (z1, z2))
            f = (1 - e) * ce + e * smooth + args.gamma * (1 - sum(plain_ccc(a[:, k], t[:, k]) for k in (0, 1)) / 2)
            spread = sum(((z - z.mean(1, keepdim=True)) ** 2).sum() / n for z in (z1, z2))
            loss = f + args.logit_penalty * spread
            if args.lam and epoch > 1:
                g = s_enc.mean() - s_dec.mean()
                loss = loss + args.lam * g
                found = (hinge, g, s_enc[:, 1].mean(), s_dec[:, 1].mean())
                for name, value in zip(("discriminator", "generator", "enc", "dec"), found):
                    sums[name] += value.item() / len(batches)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums["total"] += loss.item() / len(batches)
            sums["cross_entropy"] += ce.item() / 2 / len(batches)
        assert scalars["loss/total"] == pytest.approx(sums["total"], rel=1e-4)
        assert scalars["loss/cross_entropy"] == pytest.approx(sums["cross_entropy"], rel=1e-4)
        assert scalars["accuracy/train"] == pytest.approx(hits / 20)
        assert scalars["weight/lambda"] == (args.lam if epoch > 1 else 0)
        assert ("loss/generator" in scalars) == (args.lam > 0 and epoch > 1)
        if "loss/generator" in scalars:
            tags = ("loss/discriminator", "loss/generator", "score/two/encoder", "score/two/decoder")
            expected = [sums[name] for name in ("discriminator", "generator", "enc", "dec")]
            assert [scalars[tag] for tag in tags] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for network, own in zip(networks, plain):
        for name, value in own.state_dict().items() if own else ():
            torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert all(p.requires_grad for network in networks if network for p in network.parameters())


def test_valence_and_arousal_alone_learn_nothing_from_the_labels():
    args = jointgan.parse_args(["--data", "toy", *SMALL, "--no-expression"])
    encoder, decoder, discriminator = jointgan.make_networks(args, 7, 2, True)
    assert discriminator.scores == ["joint", "x", "y0", "va"]
    assert decoder.layers[0].in_channels == LATENT + 2
    _, _, (*logits, va) = encoder(torch.randn(4, 3, 32, 32))
    sum(logits).sum().backward()
    learning = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert learning == {f"labels.{t}.{part}" for t in (0, 1) for part in ("weight", "bias")}
    va.sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if name.startswith("trunk"))


# Label sets


def load_sets(tmp_path, *more):
    return load_label_sets(jointgan.parse_args(["--data", "toy", "--cache", str(tmp_path), *more]))


def test_label_sets_have_their_rates_and_seeds(few_toys, tmp_path):
    plain, _, (own,) = load_sets(tmp_path)
    train, test, sets = load_sets(tmp_path, "--noise", "0.3", "0.3", "0", "--va-noise", "0.2")
    expected = sum(round(0.3 * n) for n in torch.bincount(own).tolist())
    assert [(labels != own).sum().item() for labels in sets] == [expected, expected, 0]
    assert not torch.equal(sets[0], sets[1]) and torch.equal(train.labels, sets[0]) and torch.equal(train.clean, own)
    assert plain.clean is None and test.clean is None
    assert 0.1 < (train.va - plain.va).std() < 0.3 and train.va.abs().max() <= 1
    single, _, _ = load_sets(tmp_path, "--no-va")
    assert single.va is None


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_each_label_set_has_the_noise_of_inject_noise(kind, few_toys, tmp_path):
    """The noise of set t has the seed --noise-seed + t; the first set is what the other methods are given."""
    _, _, (own,) = load_sets(tmp_path)
    _, _, sets = load_sets(tmp_path, "--noise", "0.3", "0.4", "--noise-seed", "5", "--noise-type", kind)
    wanted = [inject(own, toyfaces.CLASSES, rate, kind, seed) for rate, seed in ((0.3, 5), (0.4, 6))]
    assert all(map(torch.equal, sets, wanted))


def test_the_audit_is_of_the_mean_over_the_heads(tiny, tmp_path, monkeypatch):
    predicted, honest = [], jointgan.predict

    def predict(*arguments):
        predicted.append(honest(*arguments)[0])
        return honest(*arguments)

    monkeypatch.setattr(jointgan, "predict", predict)
    monkeypatch.setattr(figures, "write", lambda path, draw: None)  # figures take most of the time of a tiny run
    flags = ["--noise", "0.3", "0.4", "--lambda", "0", "--epochs", "1", "--out", str(tmp_path), "--name", "run"]
    assert jointgan.main([*tiny, *SMALL, *flags]) == 0
    with open(tmp_path / "run" / "labels.csv") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["name"])
    given = [toyfaces.CLASSES.index(row["given"]) for row in rows]
    one, two = predicted[-1]  # of the training set, at the end
    first, second, mean = (p.amax(1) - p[range(48), given] for p in (one, two, (one + two) / 2))
    assert [float(row["score"]) for row in rows] == pytest.approx(mean.tolist(), abs=1e-5)
    assert (first - mean).abs().max() > 1e-3 and (second - mean).abs().max() > 1e-3


def test_noise_has_a_seed_of_its_own(few_toys, tmp_path):
    def drawn(*flags):
        train, _, sets = load_sets(tmp_path, "--noise", "0.3", "0.3", "--va-noise", "0.2", *flags)
        return torch.stack(sets), train.va

    a, b = drawn("--seed", "1", "--noise-seed", "5"), drawn("--seed", "2", "--noise-seed", "5")
    c = drawn("--seed", "1", "--noise-seed", "7")
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1])


def test_the_valence_and_arousal_of_a_class_are_means_of_its_images():
    va = torch.tensor([[0.5, -1.0], [0.0, 0.25], [1.0, 0.0]])
    train = Split(torch.zeros(3, 1, 2, 2), torch.tensor([2, 0, 2]), None, va, ["a", "b", "c"], ("x", "y", "z"))
    assert class_va(train).tolist() == [[0.0, 0.25], [0, 0], [0.75, -0.5]]
    assert class_va(dataclasses.replace(train, va=None)) is None


def test_faces_are_generated_in_evaluation_mode_from_vectors_in_the_order_of_training():
    seen = []

    class Decoder(nn.Module):
        def forward(self, vectors):
            seen.append((self.training, [v.shape[1] for v in vectors]))
            return torch.tensor([-2.0, -1, 0, 2]).view(1, 1, 2, 2).expand(len(vectors[0]), 3, 2, 2)

    y0, labels, va = torch.zeros(2, 5), torch.eye(7)[:2], torch.zeros(2, 2)
    args = SimpleNamespace(precision="fp32", expression=True)
    faces = generate_faces(Decoder(), y0, labels, va, 3, args)
    assert faces.dtype == torch.uint8 and faces[1, 2].tolist() == [[0, 0], [128, 255]]
    generate_faces(Decoder(), y0, labels, None, 1, args)
    args.expression = False
    generate_faces(Decoder(), y0, labels, va, 3, args)
    assert seen == [(False, [5, 7, 7, 7, 2]), (False, [5, 7]), (False, [5, 2])]


def test_the_norms_of_the_decoder_are_computed_before_autocast(monkeypatch):
    decoder, within, seen = Decoder(32, 0.02, LATENT + 7), [False], []

    @contextmanager
    def autocast(*_):
        within[0] = True
        yield
        within[0] = False

    for module in filter(parametrize.is_parametrized, decoder.modules()):
        module.parametrizations.weight[0].register_forward_hook(lambda *_: seen.append(within[0]))
    monkeypatch.setattr(common, "autocast", autocast)
    args = SimpleNamespace(precision="bf16", expression=True)
    generate_faces(decoder, torch.zeros(2, LATENT), torch.eye(7)[:2], None, 1, args)
    assert seen == [False] * 4


def test_each_head_has_an_accuracy():
    probs = [torch.eye(3)[[0, 1, 2, 2]], torch.eye(3)[[1, 1, 1, 1]]]
    scalars = jointgan.evaluation_scalars(probs, None, torch.tensor([0, 1, 2, 0]), None)
    assert scalars == {"accuracy/test/set1": 0.75, "accuracy/test/set2": 0.25}


def test_valence_and_arousal_are_scored_apart():
    va, noise = torch.rand(2, 20, 2, generator=torch.Generator().manual_seed(3))
    scalars = jointgan.evaluation_scalars([torch.eye(7)[:2]], va + noise, torch.tensor([0, 1]), va)
    for k, name in enumerate(("valence", "arousal")):
        assert scalars[f"va/ccc_{name}"] == pytest.approx(ccc(va[:, k] + noise[:, k], va[:, k]).item())
        assert scalars[f"va/mse_{name}"] == pytest.approx(noise[:, k].square().mean().item())


def test_label_and_va_files_are_read(few_toys, tmp_path, capsys):
    plain, _, (own,) = load_sets(tmp_path)
    labels, va = tmp_path / "labels.csv", tmp_path / "va.txt"
    write_labels(labels, plain.names, (own + 1) % 7, plain.classes)
    va.write_text("".join(f"{name} {-0.5 if i else -1.25} 0.25\n" for i, name in enumerate(plain.names)))
    train, _, sets = load_sets(tmp_path, "--labels", str(labels), str(labels), "--va-labels", str(va))
    assert [torch.equal(s, (own + 1) % 7) for s in sets] == [True, True]
    assert train.va[0].tolist() == [-1, 0.25] and train.va[1].tolist() == [-0.5, 0.25]
    assert "[-1, 1]" in capsys.readouterr().out
    va.write_text("name,valence,arousal\n" + "".join(f"{name},0.1,0.2\n" for name in plain.names))
    assert load_sets(tmp_path, "--va-labels", str(va))[0].va[3].tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize(
    "text, words",
    [
        ("a 1\n", "line 1"),
        ("train_00000.png 0.1 0.2\n", "no valence and arousal for 69"),
        ("train_00000.png nan 0\n", "line 1"),
        ("x,1,2,3\n", "line 1"),
    ],
)
def test_bad_va_files_are_refused(text, words, few_toys, tmp_path, capsys):
    path = tmp_path / "va.txt"
    path.write_text(text)
    assert (
        jointgan.main(["--data", "toy", "--va-labels", str(path), "--out", str(tmp_path), "--cache", str(tmp_path)])
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_a_run_logs_scores_and_makes_faces(tiny, tmp_path):
    arguments = [
        *tiny,
        *SMALL,
        "--noise",
        "0.3",
        "0.4",
        "--va-noise",
        "0.1",
        "--out",
        str(tmp_path),
        "--name",
        "run",
    ]
    assert jointgan.main(arguments) == 0
    folder = tmp_path / "run"
    history = lines(folder)
    assert (
        history[0]["weight/lambda"] == 0
        and "score/joint/encoder" not in history[0]
        and history[1]["weight/lambda"] == 0.8
    )
    for tag in (
        "loss/cross_entropy",
        "loss/discriminator",
        "loss/generator",
        "score/joint/encoder",
        "score/va/decoder",
        "accuracy/test/set2",
        "va/ccc_valence",
        "va/mse_arousal",
    ):
        assert tag in history[-1]
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Images("generated")] == [3]
    assert [e.step for e in events.Scalars("score/x/decoder")] == [2, 3]
    assert (folder / "generated.png").read_bytes()[:4] == b"\x89PNG"
    state = torch.load(folder / "model.pt", weights_only=True)
    assert len(state["networks"]) == 3 and json.dumps(state["args"])
    last = torch.load(folder / "last.pt", weights_only=True)
    groups = [group for name in ("optimizer", "optimizer_d") for group in last[name]["param_groups"]]
    assert [group["betas"][0] for group in groups] == [0.9, 0.5, 0.5]  # encoder, decoder; discriminator


@pytest.mark.parametrize("flags, moved", [([], False), (["--rotate", "20"], True), (["--shift", "0.2"], True),
                                          (["--zoom", "0.3"], True), (["--crop", "3"], True)])
def test_inputs_are_augmented_as_asked_and_all_heads_predict(flags, moved, tiny, tmp_path, monkeypatch):
    batches, given, honest, end_epoch = [], [], common.Loader.epoch, Run.end_epoch

    def epoch(self, *arguments, **options):
        batches.extend(honest(self, *arguments, **options))
        return iter(batches)

    def record(self, number, scalars, probs, labels=None):
        given.append(probs)
        end_epoch(self, number, scalars, probs, labels)

    monkeypatch.setattr(common.Loader, "epoch", epoch)
    monkeypatch.setattr(Run, "end_epoch", record)
    more = ["--noise", "0.3", "0.4", "--lambda", "0", "--epochs", "1", "--precision", "fp32"]
    assert jointgan.main([*tiny, *SMALL, *more, *flags, "--out", str(tmp_path), "--name", "run"]) == 0
    faces = [torch.from_numpy(toyfaces.draw_face("train", i, size=32)[0]).permute(2, 0, 1) for i in range(48)]
    faces = torch.stack(faces) / 127.5 - 1
    x, index = (torch.cat(values) for values in zip(*batches))
    same, mirrored = ((x - f[index]).abs().amax((1, 2, 3)) < 1e-4 for f in (faces, faces.flip(-1)))
    kept = same | mirrored
    assert kept.float().mean() < 0.2 if moved else kept.all() and same.any() and mirrored.any()

    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    args = jointgan.parse_args(["--data", "toy", *SMALL, *more])
    (encoder, _, _) = jointgan.load_networks(state["networks"], args, 7, torch.device("cpu"))
    tests = [torch.from_numpy(toyfaces.draw_face("test", i, size=32)[0]).permute(2, 0, 1) for i in range(16)]
    with torch.no_grad():
        _, _, (one, two, _) = encoder.eval()(torch.stack(tests) / 127.5 - 1)
    torch.testing.assert_close(given[0], (one.softmax(1) + two.softmax(1)) / 2, rtol=1e-4, atol=1e-5)
    probs, _ = jointgan.restore(state["networks"], args, 7, torch.device("cpu"))(torch.stack(tests))
    torch.testing.assert_close(probs, given[0], rtol=1e-4, atol=1e-5)
    assert (one.softmax(1) - two.softmax(1)).abs().max() > 0.01


@pytest.mark.parametrize(
    "flags",
    [
        ["--lambda", "0"],
        ["--no-joint"],
        ["--authors-vgg"],
        ["--lambda", "0", "--label-smoothing", "0.1"],
        ["--no-marginal"],
        ["--no-decoder"],
        ["--no-va"],
        ["--no-expression"],
        ["--no-expression", "--lambda", "0"],
        ["--oversample"],
    ],
)
def test_every_ablation_runs(flags, tiny, tmp_path):
    assert jointgan.main([*tiny, *SMALL, *flags, "--epochs", "2", "--out", str(tmp_path), "--name", "run"]) == 0
    history = lines(tmp_path / "run")
    assert len(history) == 2 and ("loss/discriminator" in history[-1]) == ("--lambda" not in flags)


def run_on(data, root, folder, *flags):
    """The history of a run of two epochs on a tree in the real layout, at the authors' image size."""
    small = [
        *SMALL,
        "--batch-size",
        "8",
        "--epochs",
        "2",
        "--warm-up",
        "0",
        "--precision",
        "fp32",
        "--cache",
        str(folder / "cache"),
    ]
    assert (
        jointgan.main(
            ["--data", data, "--root", str(root), *small, *flags, "--out", str(folder / "runs"), "--name", data]
        )
        == 0
    )
    assert (folder / "runs" / data / "generated.png").exists()
    return lines(folder / "runs" / data)[-1]


def test_cifar10_with_three_label_sets(tmp_path):
    last = run_on("cifar10", build_cifar10(tmp_path / "data"), tmp_path, "--noise", "0.2", "0.3", "0.4")
    assert {tag for tag in last if tag.startswith("accuracy/test/set")} == {f"accuracy/test/set{t}" for t in (1, 2, 3)}
    assert {tag for tag in last if tag.endswith("/decoder")} == {
        f"score/{name}/decoder" for name in ("joint", "x", "y0", "y1", "y2", "y3")
    }
    assert "accuracy/class/truck" in last and "va/ccc_valence" not in last


def test_machine_labels_go_from_affectnet_to_raf_and_back(raf, tmp_path, capsys):
    """Sec. 5.2: RAF-base has the labels of an AffectNet model, AffectNet-base expressions of a RAF model."""
    affectnet = build_affectnet(tmp_path / "affectnet_data")

    def relabel(data, root, model, output, *flags):
        place = ["--cache", str(tmp_path / "cache"), "--device", "cpu", "--output", str(output)]
        assert (
            inject_noise.main(
                [
                    "--data",
                    data,
                    "--root",
                    str(root),
                    "--from-checkpoint",
                    str(tmp_path / "runs" / model / "model.pt"),
                    *place,
                    *flags,
                ]
            )
            == 0
        )

    first = run_on("affectnet", affectnet, tmp_path, "--classes", "7")
    assert {"va/ccc_valence", "va/mse_arousal", "score/va/encoder"} <= set(
        first
    ) and "accuracy/class/contempt" not in first
    relabel("raf", raf, "affectnet", tmp_path / "machine.csv")
    last = run_on(
        "raf", raf, tmp_path, "--labels", str(tmp_path / "machine.csv"), "--va-labels", str(tmp_path / "machine-va.csv")
    )
    assert (
        "score/va/encoder" in last and "va/ccc_valence" not in last
    )  # RAF-DB's test images have no valence and arousal
    relabel("affectnet", affectnet, "raf", tmp_path / "back.csv", "--classes", "7")
    (tmp_path / "runs" / "affectnet").rename(tmp_path / "runs" / "first")
    capsys.readouterr()
    again = run_on("affectnet", affectnet, tmp_path, "--classes", "7", "--labels", str(tmp_path / "back.csv"))
    assert "label set 1:" in capsys.readouterr().out and "va/ccc_valence" in again


def test_a_run_is_not_resumed_on_another_second_label_set(tiny, tmp_path, monkeypatch, capsys):
    train, _, _ = load_sets(tmp_path)
    files = [tmp_path / name for name in ("one.csv", "two.csv")]
    for file in files:
        write_labels(file, train.names, train.labels, train.classes)
    flags = [*tiny[2:], *SMALL, "--lambda", "0", "--out", str(tmp_path), "--name", "run", "--labels", *map(str, files)]
    end_epoch = Run.end_epoch

    def end(run, *arguments):
        end_epoch(run, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "end_epoch", end)
        assert jointgan.main(flags) == 130
    write_labels(files[1], train.names, train.labels.roll(1), train.classes)
    capsys.readouterr()
    assert jointgan.main([*flags, "--resume"]) == 2
    assert "these differ: given labels;" in capsys.readouterr().err


def test_a_stopped_run_ends_as_if_it_was_not(tiny, tmp_path, monkeypatch):
    check_resume(jointgan.main, [*tiny, *SMALL, "--va-noise", "0.1"], tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--no-joint", "--no-marginal"], "no score"),
        (["--size", "48"], "power of two"),
        (["--size", "16"], "power of two"),
        (["--noise", "0.2", "1"], "outside"),
        (["--va-labels", "x", "--va-noise", "0.1"], "va-noise"),
        (["--no-va", "--va-noise", "0.1"], "give one of them"),
        (["--lambda", "0", "--no-joint"], "without the GAN"),
        (["--lambda", "0", "--no-marginal"], "without the GAN"),
        (["--lambda", "0", "--no-decoder"], "without the GAN"),
        (["--labels", "a", "--noise", "0.1", "0.2"], "exclude"),
        (["--backbone", "resnet18"], "backbone"),
        (["--no-va", "--no-expression"], "nothing to learn"),
        (["--lambda", "-1"], "outside"),
        (["--d-steps", "0"], "outside"),
        (["--width", "17"], "outside"),
        (["--width", "0"], "outside"),
    ],
)
def test_bad_values_are_refused(arguments, words, capsys):
    assert jointgan.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_va_noise_needs_valence_and_arousal(raf, tmp_path, capsys):
    assert (
        jointgan.main(
            ["--data", "raf", "--root", str(raf), "--va-noise", "0.1", "--out", str(tmp_path), "--cache", str(tmp_path)]
        )
        == 2
    )
    assert "--va-labels" in capsys.readouterr().err


def test_presets_are_the_authors_off_toy():
    args = jointgan.parse_args(["--data", "raf", "--noise", "0.2", "0.3"])
    assert (
        args.size,
        args.width,
        args.batch_size,
        args.lr,
        args.lam,
        args.warm_up,
        args.d_steps,
        args.shift,
    ) == (64, 1, 128, 1e-4, 1.0, 6, 2, 0.16)
    assert args.name == "jointgan-raf-n0.2-0.3-s1"
    args = jointgan.parse_args(["--data", "affectnet"])
    assert (args.size, args.lam, args.warm_up, args.oversample) == (64, 0.4, 0, True)
