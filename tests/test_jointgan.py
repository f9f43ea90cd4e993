"""The joint-distribution GAN: CCC and hinge losses by hand, networks of every size, what each step trains, runs."""

import json

from support.datasets import write_labels

import pytest
import torch
from conftest import build_affectnet, build_cifar10, check_resume, lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import inject_noise
import jointgan
from jointgan import (
    IMAGE_GAIN,
    Decoder,
    Discriminator,
    Encoder,
    ccc,
    discriminator_loss,
    generator_loss,
    majority_vote,
    multitask_loss,
)

SMALL = ["--width", "0.02", "--hidden", "8", "--noise-dim", "4"]


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


def test_majority_vote_takes_the_most_frequent_label_and_draws_ties():
    a, b, c = torch.tensor([0, 1] + [0] * 400), torch.tensor([0, 2] + [1] * 400), torch.tensor([2, 2] + [2] * 400)
    got = majority_vote([a, b, c], 3, torch.Generator().manual_seed(1))
    assert got[:2].tolist() == [0, 2]
    assert (torch.bincount(got[2:], minlength=3) > 90).all()


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("has_va", [True, False])
def test_every_stream_has_its_shape(size, has_va):
    n, classes = 2, [7, 7, 5]
    encoder, decoder = Encoder(size, 0.02, 8, 4, classes, has_va), Decoder(size, 0.02, 4 + sum(classes) + 2 * has_va)
    discriminator = Discriminator(size, 0.02, 4, classes, has_va)
    x = torch.randn(n, 3, size, size)
    mean, log_variance, logits, va = encoder(x)
    assert mean.shape == log_variance.shape == (n, 4) and [z.shape for z in logits] == [(n, c) for c in classes]
    assert (va is None) != has_va and (va is None or (va.shape == (n, 2) and va.abs().max() <= 1))
    made = decoder(mean, logits, va)
    assert made.shape == x.shape and made.abs().max() <= 1
    scores = discriminator(made, mean, logits, va)
    assert (
        discriminator.scores
        == ["joint", "x-y1", "x-y2", "x-y3"] + ["x-va"] * has_va + ["x", "y0", "y1", "y2", "y3"] + ["va"] * has_va
    )
    assert scores.shape == (n, len(discriminator.scores)) and scores.dtype == torch.float32


def test_ablations_drop_their_scores():
    def scores(**flags):
        return Discriminator(32, 0.02, 4, [7], True, **flags).scores

    assert scores(joint=False) == ["x", "y0", "y1", "va"]
    assert scores(marginal=False) == ["joint", "x-y1", "x-va"]
    assert scores(image_score=False) == ["joint", "x-y1", "x-va", "y0", "y1", "va"]
    assert scores(pairs=False) == ["joint", "x", "y0", "y1", "va"]


def test_a_pair_score_is_the_product_of_centred_features():
    torch.manual_seed(1)
    network = Discriminator(32, 0.02, 4, [7], False, marginal=False).eval()
    x, y0, labels = torch.randn(6, 3, 32, 32), torch.randn(6, 4), torch.eye(7)[:6]
    image = network.image_features(network.image(IMAGE_GAIN * x).sum((2, 3)))
    label = network.vectors[1](labels)
    expected = [sum((image[i] - image.mean(0)) * (label[i] - label.mean(0))).item() for i in range(6)]
    assert network(x, y0, [labels], None)[:, 1].tolist() == pytest.approx(expected, abs=1e-5)
    assert sum(expected) / 6 == pytest.approx(
        torch.cov(torch.cat([image, label], 1).T, correction=0)[: image.shape[1], image.shape[1] :].trace().item(),
        abs=1e-5,
    )
    same = network(x, y0, [labels[:1].repeat(6, 1)], None)[
        :, 1
    ]  # neither the images alone nor the labels alone make a score
    assert same.abs().max() < 1e-6 and network(x[:1].repeat(6, 1, 1, 1), y0, [labels], None)[:, 1].abs().max() < 1e-6


def test_every_discriminator_weight_is_spectrally_normalised():
    network = Discriminator(32, 0.02, 4, [7], True)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for _ in range(200):  # power iterations
                weight = module.weight
            assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_a_generator_step_lowers_encoder_scores_and_raises_decoder_scores():
    torch.manual_seed(1)
    encoder, decoder, discriminator = (
        Encoder(32, 0.02, 8, 4, [7], True),
        Decoder(32, 0.02, 4 + 7 + 2),
        Discriminator(32, 0.02, 4, [7], True).eval(),
    )
    x, noise, labels, va = (
        torch.randn(16, 3, 32, 32),
        torch.randn(16, 4),
        torch.eye(7).repeat(3, 1)[:16],
        torch.rand(16, 2),
    )

    def scores():
        mean, _, logits, prediction = encoder(x)
        return discriminator(x, mean, logits, prediction), discriminator(
            decoder(noise, [labels], va), noise, [labels], va
        )

    before = scores()
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        generator_loss(*scores()).backward()
        optimizer.step()
    after = scores()
    assert after[0].mean() < before[0].mean() and after[1].mean() > before[1].mean()


class Recorder:
    """An optimiser that changes nothing and remembers which networks had a gradient at each step."""

    def __init__(self, networks, own):
        self.networks, self.own, self.seen = networks, own, []

    def zero_grad(self):
        for network in self.own:
            network.zero_grad()

    def step(self):
        self.seen.append(
            [
                any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
                for network in self.networks
            ]
        )


def one_batch(args, networks, recorders, classes=7):
    count = 12
    sets, va = [torch.arange(count) % classes, torch.arange(count) % 3], torch.rand(count, 2)
    batches = [(torch.rand(count, 3, 32, 32) * 2 - 1, torch.arange(count))]
    return jointgan.train_one_epoch(networks, recorders, batches, sets, va, 5, args)


def test_each_step_trains_its_own_networks():
    args = jointgan.parse_args(["--data", "toy", *SMALL, "--d-steps", "2", "--precision", "fp32"])
    networks = jointgan.make_networks(args, 7, 2, True)
    encoder, decoder, discriminator = networks
    generators, critic = Recorder(networks, [encoder, decoder]), Recorder(networks, [discriminator])
    one_batch(args, networks, [generators, critic])
    assert critic.seen == [[False, False, True]] * 2  # nothing of the discriminator's loss reaches G_Y and G_X
    assert generators.seen[0][:2] == [True, True]
    assert all(p.requires_grad for network in networks for p in network.parameters())


def test_the_generator_step_leaves_no_gradient_in_the_discriminator(monkeypatch):
    args = jointgan.parse_args(["--data", "toy", *SMALL, "--precision", "fp32"])
    networks = jointgan.make_networks(args, 7, 2, True)
    generators, critic = Recorder(networks, networks[:2]), Recorder(networks, networks[2:])
    critic.step = networks[2].zero_grad  # forget the discriminator's own gradient
    monkeypatch.setattr(jointgan, "gradient_norm", lambda network: torch.zeros(()))
    one_batch(args, networks, [generators, critic])
    assert generators.seen == [[True, True, False]]


def test_the_baseline_has_no_gan():
    args = jointgan.parse_args(["--data", "toy", *SMALL, "--lambda", "0"])
    encoder, decoder, discriminator = jointgan.make_networks(args, 7, 1, False)
    assert encoder is not None and decoder is None and discriminator is None
    args = jointgan.parse_args(["--data", "toy", *SMALL, "--no-decoder"])
    _, decoder, discriminator = jointgan.make_networks(args, 7, 1, False)
    assert decoder is None and "x" not in discriminator.scores


def test_valence_and_arousal_alone_learn_nothing_from_the_labels():
    args = jointgan.parse_args(["--data", "toy", *SMALL, "--no-expression"])
    encoder, decoder, discriminator = jointgan.make_networks(args, 7, 2, True)
    assert discriminator.scores == ["joint", "x-va", "x", "y0", "va"]
    assert decoder.layers[0].in_channels == args.noise_dim + 2
    _, _, logits, va = encoder(torch.randn(4, 3, 32, 32))
    sum(logits).sum().backward()
    learning = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert learning == {f"labels.{t}.{part}" for t in (0, 1) for part in ("weight", "bias")}
    va.sum().backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if name.startswith("trunk"))


def load_sets(tmp_path, *more):
    return jointgan.load_label_sets(jointgan.parse_args(["--data", "toy", "--cache", str(tmp_path), *more]))


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
    voted, _, one = load_sets(tmp_path, "--noise", "0.3", "0.3", "0.3", "--vote")
    assert len(one) == 1 and (one[0] != own).float().mean() < 0.3


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
        "--grid-every",
        "2",
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
        "gradient/encoder",
        "gradient/discriminator",
        "score/joint/encoder",
        "score/va/decoder",
        "accuracy/test/set2",
        "va/ccc_valence",
        "va/mse_arousal",
    ):
        assert tag in history[-1]
    events = EventAccumulator(str(folder)).Reload()
    assert [e.step for e in events.Images("generated")] == [2, 3] and [
        e.step for e in events.Scalars("score/x/decoder")
    ] == [2, 3]
    assert (folder / "generated.png").read_bytes()[:4] == b"\x89PNG"
    state = torch.load(folder / "model.pt", weights_only=True)
    assert len(state["networks"]) == 3 and json.dumps(state["args"])
    last = torch.load(folder / "last.pt", weights_only=True)
    groups = [group for name in ("optimizer", "optimizer_d") for group in last[name]["param_groups"]]
    assert [group["betas"][0] for group in groups] == [0.9, 0.5, 0.5]  # encoder, decoder; discriminator


@pytest.mark.parametrize(
    "flags",
    [
        ["--lambda", "0"],
        ["--no-joint"],
        ["--no-pairs"],
        ["--no-marginal"],
        ["--no-decoder"],
        ["--no-va"],
        ["--no-expression"],
        ["--no-expression", "--lambda", "0"],
        ["--label-stream", "softmax"],
        ["--vote", "--noise", "0.3", "0.3", "0.3"],
        ["--rotate", "10", "--shift", "0.1", "--zoom", "0.1"],
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
        f"score/{name}/decoder" for name in ("joint", "x-y1", "x-y2", "x-y3", "x", "y0", "y1", "y2", "y3")
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
    assert {"va/ccc_valence", "va/mse_arousal", "score/x-va/encoder"} <= set(
        first
    ) and "accuracy/class/contempt" not in first
    relabel("raf", raf, "affectnet", tmp_path / "machine.csv")
    last = run_on(
        "raf", raf, tmp_path, "--labels", str(tmp_path / "machine.csv"), "--va-labels", str(tmp_path / "machine-va.csv")
    )
    assert (
        "score/x-va/encoder" in last and "va/ccc_valence" not in last
    )  # RAF-DB's test images have no valence and arousal
    relabel("affectnet", affectnet, "raf", tmp_path / "back.csv", "--classes", "7")
    (tmp_path / "runs" / "affectnet").rename(tmp_path / "runs" / "first")
    capsys.readouterr()
    again = run_on("affectnet", affectnet, tmp_path, "--classes", "7", "--labels", str(tmp_path / "back.csv"))
    assert "label set 1:" in capsys.readouterr().out and "va/ccc_valence" in again


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
        (["--labels", "a", "--noise", "0.1", "0.2"], "exclude"),
        (["--backbone", "resnet18"], "backbone"),
        (["--no-va", "--no-expression"], "nothing to learn"),
        (["--lambda", "-1"], "outside"),
        (["--d-steps", "0"], "outside"),
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
        args.hidden,
        args.batch_size,
        args.lr,
        args.lam,
        args.warm_up,
        args.d_steps,
        args.noise_dim,
    ) == (64, 1, 500, 128, 1e-4, 1.0, 6, 2, 100)
    assert args.name == "jointgan-raf-n0.2-0.3-s1"
    args = jointgan.parse_args(["--data", "affectnet"])
    assert (args.size, args.lam, args.warm_up, args.oversample) == (64, 0.4, 0, True)
