"""Joint-distribution GAN: noisy label sets and noisy valence-arousal, matched with the images as one distribution.

S. Zhang, Z. Huang, D. P. Paudel, L. Van Gool: "Facial Emotion Recognition with Noisy Multi-task Annotations", WACV
2021. An encoder predicts all labels and a latent vector from a face; a decoder generates a face from noise and the
noisy labels. A discriminator with a stream for each variable compares (face, predictions) with (generated face, noisy
labels), jointly and one by one; fooling it regularises the encoder, which would otherwise memorise wrong labels one by
one.

    python jointgan.py --data toy --noise 0.3 0.4 --va-noise 0.3              # needs no data
    python jointgan.py --data toy --noise 0.3 0.4 --va-noise 0.3 --lambda 0   # the baseline: the encoder (VGG) alone
    python jointgan.py --data raf --root data/raf --labels machine_labels.txt --va-labels machine_va.txt

Measured (docs/jointgan.md): the first two commands, 3 seeds, CPU: last5 96.1 +- 1.6 % against 94.4 +- 1.6 %; with
--epochs 40, where the baseline has memorised the noise, 93.6 +- 1.6 % against 88.9 +- 1.7 %.
"""

import dataclasses
import sys
from functools import partial

from support import figures
from support.augmentation import augment, random_affine
from support.datasets import Index, inject, load_data, read_labels, read_va
from support.distributed import reports_errors
from support.inference import use_checkpoint
from support.networks import to_device
from support.runs import Parser, Run, add_data_args, add_training_args, number, parse_with_presets, positive_int

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import UserError

# Used where no flag says otherwise: "scratch", then "scratch <data set>" on top of it.
# Sizes, rates, lambda and the first adversarial epoch are those of the authors' code; epochs and the toy sizes are
# ours.
PRESETS = {
    "scratch": dict(
        size=64,
        width=1.0,
        hidden=500,
        epochs=40,
        batch_size=128,
        lr=1e-4,
        beta1=0.9,
        noise_dim=100,
        lam=1.0,
        warm_up=6,
        rotate=10.0,
        shift=0.1,
        zoom=0.1,
    ),
    "scratch cifar10": dict(size=32, hidden=512, lam=0.8, warm_up=1, rotate=0.0, shift=0.1, zoom=0.0),
    "scratch affectnet": dict(lam=0.4, warm_up=0),
    "scratch affectnet-auto": dict(lam=0.4, warm_up=0),
    "scratch toy": dict(
        size=32,
        width=0.25,
        hidden=128,
        epochs=20,
        batch_size=32,
        lr=5e-4,
        beta1=0.5,
        noise_dim=16,
        lam=0.8,
        warm_up=1,
        rotate=0.0,
        shift=0.0,
        zoom=0.0,
    ),
}


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_data_args(parser, several=True)
    add_training_args(parser, backbone=False)
    add = parser.add_argument_group("joint-distribution GAN").add_argument
    add(
        "--va-labels",
        metavar="FILE",
        help="valence and arousal to train on, from a file: a name and two numbers a line",
    )
    add(
        "--va-noise",
        type=number(float, 0),
        default=0.0,
        metavar="SIGMA",
        help="standard deviation of Gaussian noise on the training valence and arousal",
    )
    add("--no-va", dest="va", action="store_false", help="Table 2, single task: expression labels alone")
    add(
        "--no-expression",
        dest="expression",
        action="store_false",
        help="Table 2, single task: valence and arousal "
        "alone; the heads of the label sets are linear probes of features that they do not train",
    )
    add("--vote", action="store_true", help="Table 1, 'major vote': one label set, the majority of all, ties drawn")
    add(
        "--lambda",
        dest="lam",
        type=number(float, 0),
        help="weight of the adversarial terms, Eq. 9 (authors' code: "
        "1.0 on RAF, 0.8 on CIFAR-10, 0.4 on AffectNet); 0: no GAN, the VGG baseline",
    )
    add(
        "--gamma",
        type=number(float, 0),
        default=1.0,
        help="weight of the similarity loss of valence and arousal, Eq. 10 (authors' code: %(default)s)",
    )
    add(
        "--warm-up",
        type=number(int, 0),
        help="first epochs without the adversarial terms (authors' code: 6 on RAF, 1 on CIFAR-10, 0 on AffectNet)",
    )
    add(
        "--d-steps",
        type=positive_int,
        default=2,
        help="discriminator steps for each generator step (authors' code: %(default)s; Algorithm 1: one)",
    )
    add(
        "--beta1",
        type=number(float, 0, 1, open_high=True),
        help="Adam's decay of the mean gradient, of decoder and "
        "discriminator (Adam's own: 0.9; ours on toy: 0.5, as is usual for GANs)",
    )
    add("--no-joint", dest="joint", action="store_false", help="Table 3, w/o joint: no joint score")
    add(
        "--no-pairs",
        dest="pairs",
        action="store_false",
        help="the paper's scores alone: no score for the image and each label",
    )
    add("--no-marginal", dest="marginal", action="store_false", help="Table 3, w/o marginal: the joint score alone")
    add(
        "--no-decoder",
        dest="decoder",
        action="store_false",
        help="Table 3, w/o G_X: (x, predictions) against (x, noise, noisy labels)",
    )
    add(
        "--label-stream",
        choices=("logits", "softmax"),
        default="logits",
        help="what the label streams get of the encoder's predictions (authors' code: %(default)s)",
    )
    add("--noise-dim", type=positive_int, help="length of y0 (authors' code: 100; ours on toy: 16)")
    add(
        "--hidden",
        type=positive_int,
        help="width of the encoder's fully connected layer (authors' code: 500; 512 on CIFAR-10)",
    )
    add("--width", type=number(float, 0, open_low=True), help="factor on the channels of all three networks (paper: 1)")
    add("--rotate", type=number(float, 0, 180), help="random rotation, +- degrees (authors' code: 10)")
    add(
        "--shift",
        type=number(float, 0, 1),
        help="random shift, +- share of the size (authors' code shifts; strength ours)",
    )
    add(
        "--zoom",
        type=number(float, 0, 1, open_high=True),
        help="random zoom, 1 +- this (authors' code zooms; strength ours)",
    )
    add(
        "--grid-every",
        type=positive_int,
        default=5,
        metavar="EPOCHS",
        help="log the grid of generated faces every so many epochs",
    )
    args = parse_with_presets(parser, PRESETS, argv)
    if not (args.joint or args.marginal):
        parser.error("--no-joint --no-marginal leaves no score: --lambda 0 is training without the GAN")
    if args.size & (args.size - 1) or args.size < 32:
        parser.error(f"--size {args.size}: the decoder doubles from 4 pixels, it needs a power of two from 32 on")
    if args.va_labels and (args.va_noise or not args.va):
        parser.error(
            "--va-labels brings its own noise and is there to be used: neither --va-noise nor --no-va goes with it"
        )
    if not (args.va or args.expression):
        parser.error("--no-va --no-expression leaves nothing to learn")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


def ccc(prediction: Tensor, target: Tensor) -> Tensor:
    """Concordance correlation coefficient: 2 cov / (var + var + (difference of means)^2), with population moments.

    prediction, target: (N,). Returns a scalar in [-1, 1]; 0 where both are constant.
    """
    mean_p, mean_t = prediction.mean(), target.mean()
    covariance = ((prediction - mean_p) * (target - mean_t)).mean()
    spread = (prediction - mean_p).square().mean() + (target - mean_t).square().mean()
    constant = spread == 0
    return torch.where(constant, 0.0, 2 * covariance / torch.where(constant, 1.0, spread + (mean_p - mean_t).square()))


def multitask_loss(
    class_logits: list[Tensor],
    class_labels: list[Tensor],
    va_prediction: Tensor | None,
    va: Tensor | None,
    gamma: float = 1.0,
) -> Tensor:
    """Eq. 10, f: cross-entropies summed over the label sets, + gamma (1 - mean CCC of valence and arousal).

    class_logits: of each set (N, C). class_labels: of each set int64 (N,). va_prediction, va: (N, 2), or None: no such
    term.
    """
    loss = sum(F.cross_entropy(logits, labels) for logits, labels in zip(class_logits, class_labels, strict=True))
    if va is not None:
        loss = loss + gamma * (1 - (ccc(va_prediction[:, 0], va[:, 0]) + ccc(va_prediction[:, 1], va[:, 1])) / 2)
    return loss


def discriminator_loss(encoder_scores: Tensor, decoder_scores: Tensor) -> Tensor:
    """Eqs. 9-10 for D, negated to be minimised: -min(0, s - 1) of the encoder's side, -min(0, -s - 1) of the decoder's.

    encoder_scores, decoder_scores: (N, S), a column for each joint or marginal score. Returns a scalar.
    """
    return F.relu(1 - encoder_scores).mean() + F.relu(1 + decoder_scores).mean()


def generator_loss(encoder_scores: Tensor, decoder_scores: Tensor) -> Tensor:
    """Eqs. 9-10 for G_X and G_Y, h^(-s) of the encoder's side + h^(s) of the decoder's, h^(z) = -z.

    encoder_scores, decoder_scores: (N, S), a column for each joint or marginal score. Returns a scalar.
    """
    return encoder_scores.mean() - decoder_scores.mean()


def majority_vote(label_sets: list[Tensor], num_classes: int, generator: torch.Generator) -> Tensor:
    """int64 (N,): the most frequent of the labels that the sets, int64 (N,) each, give an image; ties are drawn."""
    votes = sum(F.one_hot(labels, num_classes).double() for labels in label_sets)
    return (votes + torch.rand(votes.shape, generator=generator) / 2).argmax(1)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")


def channels(count: int, width: float) -> int:
    return max(8, round(count * width))


class Encoder(nn.Module):
    """G_Y: a VGG-16 trunk, a fully connected layer, and a head for each variable (Eq. 5).

    probe: the heads of the label sets learn, but the features do not learn from them.
    """

    def __init__(
        self,
        size: int,
        width: float,
        hidden: int,
        noise_dim: int,
        set_classes: list[int],
        has_va: bool,
        probe: bool = False,
    ):
        super().__init__()
        self.probe = probe
        layers, c = [], 3
        for entry in VGG16:
            if entry == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                wider = channels(entry, width)
                layers += [nn.Conv2d(c, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
                c = wider
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * (size // 32) ** 2, hidden), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(hidden, noise_dim), nn.Linear(hidden, noise_dim)
        self.labels = nn.ModuleList(nn.Linear(hidden, count) for count in set_classes)
        self.va = nn.Linear(hidden, 2) if has_va else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """Images (N, 3, H, W) -> mean and log-variance of y0 (N, noise_dim), logits of each set (N, C), va (N, 2)."""
        features = self.trunk(x)
        va = None if self.va is None else self.va(features).tanh().float()
        seen = features.detach() if self.probe else features
        return (
            self.mean(features).float(),
            self.log_variance(features).float(),
            [head(seen).float() for head in self.labels],
            va,
        )


class SelfAttention(nn.Module):
    """SAGAN's self-attention (H. Zhang et al., 2019; keys and values pooled as in its code), first the identity."""

    def __init__(self, c: int):
        super().__init__()
        self.query = spectral_norm(nn.Conv2d(c, max(1, c // 8), 1, bias=False))
        self.key = spectral_norm(nn.Conv2d(c, max(1, c // 8), 1, bias=False))
        self.value = spectral_norm(nn.Conv2d(c, max(1, c // 2), 1, bias=False))
        self.out = spectral_norm(nn.Conv2d(max(1, c // 2), c, 1, bias=False))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).flatten(2).transpose(1, 2)  # (N, H W, c / 8)
        k, v = (F.max_pool2d(part(x), 2).flatten(2) for part in (self.key, self.value))  # (N, c', H W / 4)
        attended = ((q @ k).softmax(2) @ v.transpose(1, 2)).transpose(1, 2)
        return x + self.gain * self.out(attended.unflatten(2, x.shape[2:]))


class Decoder(nn.Module):
    """G_X: y0 and labels -> a face; transposed convolutions, spectrally normalised, self-attention at 16 pixels."""

    def __init__(self, size: int, width: float, inputs: int):
        super().__init__()
        c = channels(512, width)
        layers = [spectral_norm(nn.ConvTranspose2d(inputs, c, 4)), nn.BatchNorm2d(c), nn.ReLU()]  # 1 -> 4 pixels
        pixels = 4
        while pixels < size:
            half = max(channels(64, width), c // 2)
            layers += [spectral_norm(nn.ConvTranspose2d(c, half, 4, 2, 1)), nn.BatchNorm2d(half), nn.ReLU()]
            c, pixels = half, 2 * pixels
            if pixels == 16:
                layers.append(SelfAttention(c))
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 3, 3, padding=1), nn.Tanh())

    def forward(self, y0: Tensor, labels: list[Tensor], va: Tensor | None) -> Tensor:
        """y0 (N, noise_dim), one-hot labels of each set (N, C), va (N, 2) -> images (N, 3, size, size) in [-1, 1]."""
        code = torch.cat([y0, *labels] + ([] if va is None else [va]), 1)
        return self.layers(code[:, :, None, None]).float()


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, halving the size (SAGAN's discriminator)."""

    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.first, self.second = (
            spectral_norm(nn.Conv2d(c_in, c, 3, padding=1)),
            spectral_norm(nn.Conv2d(c, c, 3, padding=1)),
        )
        self.shortcut = spectral_norm(nn.Conv2d(c_in, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(F.relu(x))))
        return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))


class ResidualMLP(nn.Module):
    """A vector (N, inputs) -> features (N, features): a layer and a residual block of two, spectrally normalised."""

    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.inlet, self.first, self.second = (
            spectral_norm(nn.Linear(n, features)) for n in (inputs, features, features)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        return x + self.second(F.relu(self.first(F.relu(x))))


# On D's images (ours). Spectral normalisation bounds D's slope, and an expression is a few pixels: without the gain D
# sees it later (toy, epoch 4 and 8: 14 and 43 % of the generated faces are recognised, with it 24 and 56).
IMAGE_GAIN = 4.0


class Discriminator(nn.Module):
    """D (Fig. 2b): a stream and a marginal score for each variable, and a joint score of the streams' features.

    pairs (ours): beside the joint score one for the image and each label stream, the inner product of their features,
    both centred on the batch. Its mean is a covariance: it cannot tell the two sides apart by the image or by the label
    alone, as the joint score of concatenated features does on and on (docs/jointgan.md).
    """

    def __init__(
        self,
        size: int,
        width: float,
        noise_dim: int,
        set_classes: list[int],
        has_va: bool,
        joint: bool = True,
        marginal: bool = True,
        image_score: bool = True,
        pairs: bool = True,
    ):
        super().__init__()
        features = channels(512, width)
        c, pixels, blocks = channels(64, width), size, []
        blocks.append(ResidualBlock(3, c))
        pixels //= 2
        while pixels > 4:
            if pixels <= 16 and not any(isinstance(block, SelfAttention) for block in blocks):
                blocks.append(SelfAttention(c))
            wider = min(2 * c, features)
            blocks.append(ResidualBlock(c, wider))
            c, pixels = wider, pixels // 2
        self.image = nn.Sequential(*blocks, nn.ReLU())
        self.image_features = spectral_norm(nn.Linear(c, features))
        vectors = [noise_dim, *set_classes] + [2] * has_va
        self.vectors = nn.ModuleList(ResidualMLP(n, features) for n in vectors)
        streams = ["x", "y0", *(f"y{t}" for t in range(1, len(set_classes) + 1))] + ["va"] * has_va
        scored = [name for name in streams if name != "x" or image_score] if marginal else []
        self.scored = [streams.index(name) for name in scored]
        self.marginals = nn.ModuleList(spectral_norm(nn.Linear(features, 1)) for _ in scored)
        self.joint = None
        if joint:
            mixer = ResidualMLP(features * len(streams), features)
            self.joint = nn.Sequential(mixer, nn.ReLU(), spectral_norm(nn.Linear(features, 1)))
        self.paired = list(range(2, len(streams))) if joint and pairs else []
        self.scores = ["joint"] * joint + [f"x-{streams[k]}" for k in self.paired] + scored  # columns of the scores

    def forward(self, x: Tensor, y0: Tensor, labels: list[Tensor], va: Tensor | None) -> Tensor:
        """Images (N, 3, H, W), y0 (N, noise_dim), labels of each set (N, C), va (N, 2) -> scores (N, S), float32."""
        maps = self.image(IMAGE_GAIN * x).sum((2, 3))
        vectors = [y0, *labels] + ([] if va is None else [va])
        features = [self.image_features(maps), *(stream(v) for stream, v in zip(self.vectors, vectors, strict=True))]
        columns = [] if self.joint is None else [self.joint(torch.cat(features, 1))]
        centred = [f.float() - f.float().mean(0) for f in features]
        columns += [(centred[0] * centred[k]).sum(1, keepdim=True) for k in self.paired]
        columns += [score(F.relu(features[k])) for k, score in zip(self.scored, self.marginals)]
        return torch.cat(columns, 1).float()


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def load_label_sets(args) -> tuple:
    """The training and the evaluated split, and the label sets, int64 (N,) each; valence and arousal with their noise.

    train.labels is the first set, train.clean the data set's own labels where the sets are others.
    """
    own_labels = dict(vars(args), noise=0.0, labels=None)
    train, test = load_data(type(args)(**own_labels))
    own, index = train.labels, Index(train.names, train.labels.tolist(), train.classes)
    if args.labels:
        sets = [read_labels(path, index) for path in args.labels]
    else:  # the noise of each set has a seed of its own
        sets = [
            inject(own, train.classes, rate, args.noise_type, args.noise_seed + t) if rate else own
            for t, rate in enumerate(args.noise)
        ]
    for t, labels in enumerate(sets, 1):
        print(f"label set {t}: {(labels != own).float().mean():.1%} of the labels are not the data set's own")
    if args.vote:
        sets = [majority_vote(sets, len(train.classes), common.generator_of("vote", args.noise_seed))]
        print(f"majority vote: {(sets[0] != own).float().mean():.1%} of the labels are not the data set's own")
    va = read_va(args.va_labels, index) if args.va_labels else train.va
    if va is None and args.va_noise:
        raise UserError(f"--va-noise: --data {args.data} has no valence and arousal, --va-labels FILE brings them")
    if va is not None and args.va_noise:
        noise = torch.randn(va.shape, generator=common.generator_of("va noise", args.noise_seed))
        va = (va + args.va_noise * noise).clamp(-1, 1)
    if va is None and not args.expression:
        raise UserError(f"--no-expression: --data {args.data} has no valence and arousal, --va-labels FILE brings them")
    clean = None if all(torch.equal(labels, own) for labels in sets) else own
    return dataclasses.replace(train, labels=sets[0], clean=clean, va=va if args.va else None), test, sets


def make_networks(
    args, num_classes: int, sets: int, has_va: bool
) -> tuple[Encoder, Decoder | None, Discriminator | None]:
    """G_Y, G_X and D; the last two are None where they are not used."""
    torch.manual_seed(common.seed_of("network", 1, args.seed))
    counts, decoder, discriminator = [num_classes] * sets, None, None
    encoder = Encoder(args.size, args.width, args.hidden, args.noise_dim, counts, has_va, probe=not args.expression)
    counts = counts if args.expression else []  # the GAN matches the labels of the tasks that are learned
    if args.lam:
        scores = args.joint, args.marginal, args.decoder, args.pairs
        discriminator = Discriminator(args.size, args.width, args.noise_dim, counts, has_va, *scores)
    if args.lam and args.decoder:
        decoder = Decoder(args.size, args.width, args.noise_dim + sum(counts) + 2 * has_va)
    return encoder, decoder, discriminator


def make_optimizers(networks, args) -> list[torch.optim.Optimizer]:
    """Adam of G_Y with G_X, and of D where there is one. G_Y keeps Adam's own beta1: with less its accuracy swings."""
    encoder, decoder, discriminator = networks
    groups = [[(encoder, 0.9), (decoder, args.beta1)], [(discriminator, args.beta1)]]
    groups = [
        [dict(params=list(n.parameters()), betas=(beta1, 0.999)) for n, beta1 in group if n is not None]
        for group in groups
    ]
    return [torch.optim.Adam(group, lr=args.lr, fused=True) for group in groups if group]


HALF = (0.5,) * 3  # mean and standard deviation of the network input: [-1, 1], the range of the decoder's faces


def augment_faces(images: Tensor, draw, args) -> Tensor:
    """Flip; rotation, shift and zoom, where the preset has them."""
    images = augment(images, draw)
    if args.rotate or args.shift or args.zoom:
        images = random_affine(images, draw, args.rotate, args.shift, args.zoom)
    return images


def gradient_norm(network: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])


def score_both_sides(
    networks, x: Tensor, encoded: tuple, given: list[Tensor], va: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """D(x, G_Y(x)) and D(G_X(y~), y~) of Eq. 6, (N, S) each; y0 and the generated faces are drawn anew each time.

    x: images (N, 3, H, W). encoded: mean and log-variance of y0 (N, noise_dim), of each set what its label stream gets
    of the encoder (N, C), valence and arousal (N, 2) or None. given, va: the noisy labels, one-hot, likewise. Without
    decoder the second side has the images too (Table 3, w/o G_X).
    """
    _, decoder, discriminator = networks
    mean, log_variance, streams, prediction = encoded
    y0 = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    noise = torch.randn_like(mean)
    with common.autocast(x.device, precision), parametrize.cached():  # spectral norms are computed once
        made = x if decoder is None else decoder(noise, given, va)
        both = torch.cat([x, made]), torch.cat([y0, noise]), [torch.cat(pair) for pair in zip(streams, given)]
        scores = discriminator(*both, None if va is None else torch.cat([prediction, va]))
    return scores[: len(x)], scores[len(x) :]


def train_one_epoch(networks, optimizers, batches, sets: list[Tensor], va: Tensor | None, epoch: int, args) -> dict:
    """One epoch over the training set. Returns its scalars.

    networks: (G_Y, G_X or None, D or None). optimizers: of G_Y with G_X, and of D. batches: (x, index), see README.md.
    sets: int64 (N,) each. va: (N, 2) or None.
    """
    encoder, decoder, discriminator = networks
    adversarial = discriminator is not None and epoch > args.warm_up
    device, means = sets[0].device, common.Means()
    for network in filter(None, networks):
        network.train()
    one_hot = torch.eye(encoder.labels[0].out_features, device=device)
    for x, index in batches:
        x, index = x.to(device), index.to(device, non_blocking=True)
        labels, target = [y[index] for y in sets], None if va is None else va[index]
        with common.autocast(device, args.precision):
            mean, log_variance, logits, prediction = encoder(x)
        given = [one_hot[y] for y in labels] if args.expression else []
        loss_f = multitask_loss(logits, labels, prediction, target, args.gamma)
        streams = [z.softmax(1) if args.label_stream == "softmax" else z for z in logits] if args.expression else []
        if adversarial:
            held = mean.detach(), log_variance.detach(), [z.detach() for z in streams]
            held = *held, None if prediction is None else prediction.detach()
            if decoder is not None:
                decoder.requires_grad_(False)
            for _ in range(args.d_steps):
                s_enc, s_dec = score_both_sides(networks, x, held, given, target, args.precision)
                loss_d = discriminator_loss(s_enc, s_dec)
                optimizers[1].zero_grad()
                loss_d.backward()
                optimizers[1].step()
            norm_d = gradient_norm(discriminator)
            discriminator.requires_grad_(False)
            if decoder is not None:
                decoder.requires_grad_(True)
            encoded = mean, log_variance, streams, prediction
            s_enc, s_dec = score_both_sides(networks, x, encoded, given, target, args.precision)
            loss_g = generator_loss(s_enc, s_dec)
            discriminator.requires_grad_(True)
        optimizers[0].zero_grad()
        loss = loss_f + args.lam * loss_g if adversarial else loss_f  # Eq. 9
        loss.backward()
        optimizers[0].step()
        means.add("loss", total=loss, cross_entropy=multitask_loss(logits, labels, None, None) / len(labels))
        means.add("gradient", encoder=gradient_norm(encoder))
        means.add("accuracy", train=sum(z.detach().softmax(1) for z in logits).argmax(1) == labels[0])
        if adversarial:
            means.add("loss", discriminator=loss_d, generator=loss_g)
            means.add("gradient", discriminator=norm_d)
            for name, encoder_score, decoder_score in zip(discriminator.scores, s_enc.mean(0), s_dec.mean(0)):
                means.add(f"score/{name}", encoder=encoder_score, decoder=decoder_score)
    return means.result() | {"weight/lambda": args.lam * adversarial}


@torch.no_grad()
def predict(encoder, inputs, args) -> tuple[list[Tensor], Tensor | None]:
    """Softmax outputs of each label head, (N, C), and valence and arousal (N, 2), in evaluation mode.

    inputs: batches of x. The method's prediction is the mean over the heads.
    """
    encoder.eval()
    parts = []
    for x in inputs:
        with common.autocast(x.device, args.precision):
            _, _, logits, va = encoder(x)
        parts.append(([z.softmax(1) for z in logits], va))
    probs = [torch.cat(column) for column in zip(*(p for p, _ in parts))]
    return probs, None if parts[0][1] is None else torch.cat([va for _, va in parts])


def evaluation_scalars(
    probs: list[Tensor], prediction: Tensor | None, labels: Tensor, va: Tensor | None
) -> dict[str, float]:
    """Accuracy of each head; CCC and mean squared error of valence and arousal, where both are known."""
    scalars = {f"accuracy/test/set{t}": (p.argmax(1) == labels).float().mean().item() for t, p in enumerate(probs, 1)}
    if prediction is not None and va is not None:
        for k, name in enumerate(("valence", "arousal")):
            scalars[f"va/ccc_{name}"] = ccc(prediction[:, k], va[:, k]).item()
            scalars[f"va/mse_{name}"] = F.mse_loss(prediction[:, k], va[:, k]).item()
    return scalars


def load_networks(states: list[dict], args, num_classes: int, device):
    """G_Y, G_X and D with the weights of a model.pt."""
    sets = sum(key.startswith("labels.") and key.endswith(".weight") for key in states[0])
    networks = make_networks(args, num_classes, sets, "va.weight" in states[0])
    for network, state in zip(filter(None, networks), states, strict=True):
        to_device(network, device, args).load_state_dict(state)
    return networks


def restore(states: list[dict], args, num_classes: int, device):
    """The trained encoder as a function of images, see support/inference.py."""
    encoder = load_networks(states, args, num_classes, device)[0]

    def predictor(images: Tensor):
        probs, va = predict(encoder, common.Images(images, args.size, device, HALF, HALF), args)
        return (sum(probs) / len(probs)).cpu(), None if va is None else va.cpu()

    return predictor


@torch.no_grad()
def generate_faces(decoder, y0: Tensor, labels: Tensor, va: Tensor | None, sets: int, args) -> Tensor:
    """uint8 (N, 3, size, size), on the CPU: faces generated from y0 (N, noise_dim), labels (N, C), va (N, 2)."""
    decoder.eval()
    with common.autocast(y0.device, args.precision):
        faces = decoder(y0, [labels] * (sets if args.expression else 0), va)
    return (127.5 * (faces + 1)).round().clamp(0, 255).to(torch.uint8).cpu()


def latent_vectors(count: int, args, device) -> Tensor:
    """(count, noise_dim): the same ones in every epoch of a run."""
    return torch.randn(count, args.noise_dim, generator=common.generator_of("faces", args.seed)).to(device)


def class_va(train) -> Tensor | None:
    """(C, 2): mean valence and arousal of the training images of each class, 0 for one without; None without any."""
    if train.va is None:
        return None
    members = F.one_hot(train.labels, len(train.classes)).float()  # (N, C)
    return members.T @ train.va / members.sum(0).clamp(min=1)[:, None]


def figure_of_generated_faces(decoder, train, sets: int, args, device, rows: int = 8):
    """Fig. 4: a column for each class, a row for each latent vector; valence and arousal are the means of the class."""
    count, va = len(train.classes), class_va(train)
    y0 = latent_vectors(rows, args, device).repeat_interleave(count, 0)
    labels = torch.eye(count, device=device).repeat(rows, 1)
    faces = generate_faces(decoder, y0, labels, None if va is None else va.repeat(rows, 1).to(device), sets, args)
    return figures.faces(
        faces,
        list(train.classes) * rows,
        ["black"] * len(faces),
        "Faces generated for each class (Fig. 4)",
        columns=count,
    )


@reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.evaluate or args.predict:
        return use_checkpoint(args, restore)
    with Run(args) as run:
        device = common.find_device(args.device)
        train, test, sets = load_label_sets(args)
        images, test_images = (common.Images(split.images, args.size, device, HALF, HALF) for split in (train, test))
        loader = common.Loader(images, args.batch_size, args.seed, partial(augment_faces, args=args))
        sets = [labels.to(device) for labels in sets]
        va = None if train.va is None else train.va.to(device)
        networks = make_networks(args, len(train.classes), len(sets), va is not None)
        for network in filter(None, networks):
            to_device(network, device, args)
        encoder, decoder, discriminator = networks
        optimizers = make_optimizers(networks, args)
        picture = partial(figure_of_generated_faces, decoder, train, len(sets), args, device)

        parts = dict(encoder=encoder, decoder=decoder, discriminator=discriminator, optimizer=optimizers[0])
        parts |= {"optimizer_d": optimizers[1]} if len(optimizers) > 1 else {}
        for epoch in run.epochs(train, test, **{name: part for name, part in parts.items() if part is not None}):
            batches = loader.epoch(epoch, balance=sets[0] if args.oversample else None)
            scalars = train_one_epoch(networks, optimizers, batches, sets, va, epoch, args) | {"lr": args.lr}
            probs, prediction = predict(encoder, test_images, args)
            prediction = None if prediction is None else prediction.cpu()
            scalars |= evaluation_scalars([p.cpu() for p in probs], prediction, test.labels, test.va)
            if decoder is not None and epoch % args.grid_every == 0:
                run.writer.add_image("generated", figures.render(picture()), epoch, dataformats="HWC")
            run.end_epoch(epoch, scalars, sum(probs) / len(probs))
        probs, _ = predict(encoder, images, args)
        pictures = {} if decoder is None else {"generated": picture}
        run.finish(sum(probs) / len(probs), [n for n in networks if n is not None], **pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
