"""Joint-distribution GAN: noisy label sets and noisy valence-arousal, matched with the images as one distribution.

S. Zhang, Z. Huang, D. P. Paudel, L. Van Gool: "Facial Emotion Recognition with Noisy Multi-task Annotations", WACV
2021. An encoder predicts all labels and a latent vector from a face; a decoder generates a face from noise and the
noisy labels. A discriminator with a stream for each variable compares (face, predictions) with (generated face, noisy
labels), jointly and one by one; fooling it regularises the encoder, which would otherwise memorise wrong labels one by
one.

    python jointgan.py --data toy --noise 0.3 0.4 --va-noise 0.3              # needs no data
    python jointgan.py --data toy --noise 0.3 0.4 --va-noise 0.3 --lambda 0   # the baseline: the encoder (VGG) alone
    python jointgan.py --data raf --labels list_label_AffectnetModel.txt --va-labels list_va_AffectnetModel.txt

Measured (docs/jointgan.md): toy, last5, 3 seeds, CPU. One set of 20 % noise, 80 epochs: 98.3 %, VGG 88.3 %, VGG with a
penalty on confidence 88.5 %. Machine labels: no gain (76.8, 76.6, 75.4 %).
"""

import sys
from functools import partial

from support import figures
from support.augmentation import augment
from support.distributed import reports_errors
from support.inference import use_checkpoint
from support.label_sets import class_va, load_label_sets
from support.networks import Head, ResidualBlock, ResidualMLP, SelfAttention, Zero, to_device, weights_computed
from support.runs import Parser, Run, add_data_args, add_training_args, number, parse_with_presets, positive_int

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import common

# Used where no flag says otherwise: "scratch", then "scratch <data set>" on top of it. Sizes, learning rates, lambda,
# the first adversarial epoch and the augmentation are those of the authors' code; epochs and toy's values are ours.
PRESETS = {
    "scratch": dict(size=64, width=1.0, epochs=40, batch_size=128, lr=1e-4, beta1=0.9, lam=1.0, warm_up=6, crop=0,
                    rotate=10.0, shift=0.16, zoom=0.1),
    "scratch cifar10": dict(size=32, lam=0.8, warm_up=1, crop=4, rotate=0.0, shift=0.0, zoom=0.0),
    "scratch affectnet": dict(lam=0.4, warm_up=0),
    "scratch affectnet-auto": dict(lam=0.4, warm_up=0),
    "scratch toy": dict(size=32, width=0.25, epochs=20, batch_size=32, lr=5e-4, beta1=0.5, lam=0.8, warm_up=1,
                        rotate=0.0, shift=0.0, zoom=0.0),
}


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add_data_args(parser, several=True)
    add_training_args(parser, backbone=False)
    add = parser.add_argument_group("joint-distribution GAN").add_argument
    add("--va-labels", metavar="FILE", help="valence and arousal to train on: a name and two numbers a line")
    add("--va-noise", type=number(float, 0), default=0.0, metavar="SIGMA", help="standard deviation of Gaussian noise "
        "on the training valence and arousal")
    add("--no-va", dest="va", action="store_false", help="Table 2, single task: expression labels alone")
    add("--no-expression", dest="expression", action="store_false", help="Table 2, single task: valence and arousal "
        "alone; the heads of the label sets are linear probes of features that they do not train")
    add("--lambda", dest="lam", type=number(float, 0), help="weight of the adversarial terms, Eq. 9 (official code: "
        "1.0 on RAF, 0.8 on CIFAR-10, 0.4 on AffectNet); 0: no GAN, the VGG baseline")
    add("--gamma", type=number(float, 0), default=1.0, help="weight of the valence-arousal loss, Eq. 10 (official: 1)")
    add("--warm-up", type=number(int, 0), help="first epochs without the adversarial terms (official code: 6 on RAF, "
        "1 on CIFAR-10, 0 on AffectNet)")
    add("--d-steps", type=positive_int, default=2, help="D steps for each G step (official code: 2; Algorithm 1: one)")
    add("--beta1", type=number(float, 0, 1, open_high=True), help="Adam's decay of the mean gradient, of decoder and "
        "discriminator (Adam's own: 0.9; ours on toy: 0.5, as is usual for GANs)")
    add("--no-joint", dest="joint", action="store_false", help="Table 3, w/o joint: no joint score")
    add("--no-marginal", dest="marginal", action="store_false", help="Table 3, w/o marginal: no marginal scores")
    add("--no-decoder", dest="decoder", action="store_false", help="Table 3, w/o G_X: the real image on both sides")
    add("--label-smoothing", type=number(float, 0, 1, open_high=True), default=0.0, help="control without a GAN: the "
        "share of a label that goes to all classes alike (ours)")
    add("--logit-penalty", type=number(float, 0), default=0.0, metavar="WEIGHT", help="control without a GAN: weight "
        "of the squared distance of the logits from their mean (ours)")
    add("--authors-vgg", action="store_true", help="the encoder of the official code: no batch normalisation, two "
        "fully connected layers with dropout, valence and arousal without tanh")
    add("--width", type=number(float, 0, 16, open_low=True), help="factor on the channels of all networks (1: 64 "
        "to 512, as the official code)")
    add("--crop", type=number(int, 0), help="pad by so many pixels and crop (official code, CIFAR-10: 4)")
    add("--rotate", type=number(float, 0, 180), help="random rotation, +- degrees (official code, faces: 10)")
    add("--shift", type=number(float, 0, 1), help="random shift, share of the size (official, faces: 10 of 64 pixels)")
    add("--zoom", type=number(float, 0, 1, open_high=True), help="random zoom, 1 +- this (official code, faces: 0.1)")
    args = parse_with_presets(parser, PRESETS, argv)
    if not (args.joint or args.marginal):
        parser.error("--no-joint --no-marginal leaves no score: --lambda 0 is training without the GAN")
    if args.size and (args.size & (args.size - 1) or args.size < 32):
        parser.error(f"--size {args.size}: the decoder doubles from 4 pixels, it needs a power of two from 32 on")
    if not args.lam and not (args.joint and args.marginal and args.decoder):
        parser.error("--lambda 0 is training without the GAN, and --no-joint, --no-marginal and --no-decoder leave out "
                     "parts of it")
    if args.va_labels and (args.va_noise or not args.va):
        parser.error("--va-labels brings its own noise and is there to be used: neither --va-noise nor --no-va goes "
                     "with it")
    if args.va_noise and not args.va:
        parser.error("--no-va trains without valence and arousal, --va-noise is noise on them: give one of them")
    if not (args.va or args.expression):
        parser.error("--no-va --no-expression leaves nothing to learn")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Losses and rules
# ----------------------------------------------------------------------------------------------------------------------


def ccc(prediction: Tensor, target: Tensor) -> Tensor:
    """Concordance correlation coefficient: 2 cov / (var + var + (difference of means)^2), with population moments.

    prediction, target: (N,). Returns a scalar in [-1, 1]; 0 where both are constant.
    """
    mean_p, mean_t = prediction.mean(), target.mean()
    covariance = ((prediction - mean_p) * (target - mean_t)).mean()
    spread = (prediction - mean_p).square().mean() + (target - mean_t).square().mean()
    constant = (prediction == prediction[:1]).all() & (target == target[:1]).all()  # spread may be a rounding error
    constant |= spread == 0
    return torch.where(constant, 0.0, 2 * covariance / torch.where(constant, 1.0, spread + (mean_p - mean_t).square()))


def multitask_loss(
    class_logits: list[Tensor], class_labels: list[Tensor], va_prediction: Tensor | None, va: Tensor | None,
    gamma: float = 1.0, smoothing: float = 0.0,
) -> Tensor:
    """Eq. 10, f: cross-entropies summed over the label sets, + gamma (1 - mean CCC of valence and arousal).

    class_logits: of each set (N, C). class_labels: of each set int64 (N,). va_prediction, va: (N, 2), or None: no such
    term. smoothing: the share of each label that goes to all classes alike, in [0, 1).
    """
    loss = sum(F.cross_entropy(logits, labels, label_smoothing=smoothing)
               for logits, labels in zip(class_logits, class_labels, strict=True))
    if va is not None:
        loss = loss + gamma * (1 - (ccc(va_prediction[:, 0], va[:, 0]) + ccc(va_prediction[:, 1], va[:, 1])) / 2)
    return loss


def logit_penalty(class_logits: list[Tensor]) -> Tensor:
    """A penalty on confidence, not in the paper: the batch mean of |z - mean z|^2, summed over the label sets.

    class_logits: of each set (N, C). Returns a scalar.
    """
    return sum((z - z.mean(1, keepdim=True)).square().sum(1).mean() for z in class_logits)


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


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------

VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
HIDDEN, LATENT = 500, 100  # width of the encoder's fully connected layers; length of y0 (official code)


def channels(count: int, width: float) -> int:
    return max(8, round(count * width))


class Encoder(nn.Module):
    """G_Y: a VGG-16 trunk, fully connected layers, and a head for each variable (Eq. 5).

    probe: the heads of the label sets learn, but the features do not learn from them. authors: see --authors-vgg.
    """

    def __init__(self, size: int, width: float, set_classes: list[int], has_va: bool, probe=False, authors=False):
        super().__init__()
        self.probe, self.authors = probe, authors
        layers, c = [], 3
        for entry in VGG16:
            if entry == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                wider = channels(entry, width)
                layers += [nn.Conv2d(c, wider, 3, padding=1, bias=authors)]
                layers += [nn.ReLU()] if authors else [nn.BatchNorm2d(wider), nn.ReLU()]
                c = wider
        hidden = channels(HIDDEN, width)
        layers += [nn.Flatten(), nn.Linear(c * (size // 32) ** 2, hidden), nn.ReLU()]
        layers += [nn.Dropout(0.5), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5)] if authors else []
        self.trunk = nn.Sequential(*layers)
        for conv in self.trunk if authors else []:  # as theirs: without normalisation PyTorch's own start is too small
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)
        self.mean, self.log_variance = Head(hidden, LATENT), Head(hidden, LATENT)
        self.labels = nn.ModuleList(Head(hidden, count) for count in set_classes)
        self.va = nn.ModuleList([Head(hidden, 2)] if has_va else [])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images (N, 3, H, W) -> mean and log-variance of y0 (N, LATENT); logits of each set (N, C), then va (N, 2)."""
        features = self.trunk(x)
        seen = features.detach() if self.probe else features
        va = [head(features) if self.authors else head(features).tanh() for head in self.va]
        return self.mean(features), self.log_variance(features), [head(seen) for head in self.labels] + va


class Decoder(nn.Module):
    """G_X: y0 and labels -> a face; a linear layer to 4 x 4 pixels, transposed convolutions, spectrally normalised."""

    def __init__(self, size: int, width: float, inputs: int):
        super().__init__()
        c = channels(512, width)
        layers = [spectral_norm(nn.ConvTranspose2d(inputs, c, 4)), nn.BatchNorm2d(c), nn.ReLU()]  # 1 -> 4 pixels
        for _ in range((size // 4).bit_length() - 1):
            half = max(channels(64, width), c // 2)
            layers += [spectral_norm(nn.ConvTranspose2d(c, half, 4, 2, 1)), nn.BatchNorm2d(half), nn.ReLU()]
            c = half
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 3, 3, padding=1), nn.Tanh())

    def forward(self, vectors: list[Tensor]) -> Tensor:
        """y0 (N, LATENT), one-hot labels of each set (N, C), va (N, 2) -> images (N, 3, size, size) in [-1, 1]."""
        return self.layers(torch.cat(vectors, 1)[:, :, None, None]).float()


class Discriminator(nn.Module):
    """D (Fig. 2b): a stream and a marginal score for each variable, and a joint score of the streams' features.

    vectors: name -> length, of y0, the labels of each set and valence-arousal. joint, marginal, image: which scores are
    used.
    """

    def __init__(self, size: int, width: float, vectors: dict, joint=True, marginal=True, image=True):
        super().__init__()
        features = channels(512, width)
        c, pixels = channels(64, width), size // 2
        blocks = [ResidualBlock(3, c, first=True)]
        while pixels > 4:
            if pixels <= 16 and not any(isinstance(block, SelfAttention) for block in blocks):
                blocks.append(SelfAttention(c))
            wider = min(2 * c, features)
            blocks.append(ResidualBlock(c, wider))
            c, pixels = wider, pixels // 2
        self.image = nn.Sequential(*blocks, ResidualBlock(c, features, halve=False), nn.ReLU())
        self.vectors = nn.ModuleList(ResidualMLP(length, features) for length in vectors.values())
        streams = ["x", *vectors]
        mixer = ResidualMLP(features * len(streams), features)
        self.joint = nn.Sequential(mixer, spectral_norm(nn.Linear(features, 1))) if joint else Zero()
        used = [marginal and (image or name != "x") for name in streams]
        self.marginals = nn.ModuleList(spectral_norm(nn.Linear(features, 1)) if use else Zero() for use in used)
        self.scores = ["joint", *streams]  # the columns of the scores

    def forward(self, *sides: list[Tensor]) -> tuple[Tensor, ...]:
        """Of each side: images (N, 3, H, W), y0 (N, LATENT), labels (N, C), va (N, 2) -> scores (N, S), float32."""
        x, *vectors = (torch.cat(values) for values in zip(*sides, strict=True))
        features = [self.image(x).sum((2, 3)), *(f(v) for f, v in zip(self.vectors, vectors, strict=True))]
        marginals = [score(f) for score, f in zip(self.marginals, features)]
        return torch.cat([self.joint(torch.cat(features, 1)), *marginals], 1).float().chunk(len(sides))


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def make_networks(args, num_classes: int, sets: int, has_va: bool) -> tuple:
    """G_Y, G_X and D; the last two are None where they are not used."""
    torch.manual_seed(common.seed_of("network", 1, args.seed))
    encoder = Encoder(args.size, args.width, [num_classes] * sets, has_va, not args.expression, args.authors_vgg)
    vectors = {"y0": LATENT} | {f"y{t}": num_classes for t in range(1, sets + 1) if args.expression}
    vectors |= {"va": 2} if has_va else {}  # (the GAN matches the labels of the tasks that are learned)
    decoder = discriminator = None
    if args.lam:
        discriminator = Discriminator(args.size, args.width, vectors, args.joint, args.marginal, args.decoder)
    if args.lam and args.decoder:
        decoder = Decoder(args.size, args.width, sum(vectors.values()))
    return encoder, decoder, discriminator


def make_optimizers(networks, args) -> list[torch.optim.Optimizer]:
    """Adam of G_Y with G_X, and of D where there is one. G_Y keeps Adam's own beta1: with less its accuracy swings."""
    encoder, decoder, discriminator = networks
    groups = [[(encoder, 0.9), (decoder, args.beta1)], [(discriminator, args.beta1)]]
    groups = [[dict(params=list(n.parameters()), betas=(beta1, 0.999)) for n, beta1 in group if n is not None]
              for group in groups]
    return [torch.optim.Adam(group, lr=args.lr, fused=True) for group in groups if group]


def load_networks(states: list[dict], args, num_classes: int, device):
    """G_Y, G_X and D with the weights of a model.pt."""
    sets = sum(key.startswith("labels.") and key.endswith(".weight") for key in states[0])
    networks = make_networks(args, num_classes, sets, "va.0.weight" in states[0])
    for network, state in zip(filter(None, networks), states, strict=True):
        to_device(network, device, args).load_state_dict(state)
    return networks


def score_both_sides(
    networks, x: Tensor, encoded: tuple, noisy: list[Tensor], precision: str, for_d: bool
) -> tuple[Tensor, Tensor]:
    """D(x, G_Y(x)) and D(G_X(y~), y~) of Eq. 6, (N, S) each; y0 and noise are drawn anew.

    x: images (N, 3, H, W). encoded: see Encoder.forward. noisy: the noisy labels in the same order, one-hot, and
    valence-arousal. Without decoder the second side has the images too (Table 3, w/o G_X). for_d: no gradient reaches
    G_Y and G_X.
    """
    _, decoder, discriminator = networks
    mean, log_variance, predicted = encoded
    y0 = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    noise = torch.randn_like(mean)
    with weights_computed(decoder, discriminator), common.autocast(x.device, precision):
        generated = x if decoder is None else decoder([noise, *noisy])
        sides = [x, y0, *predicted], [generated, noise, *noisy]
        return discriminator(*([values.detach() for values in side] if for_d else side for side in sides))


def train_one_epoch(networks, optimizers, batches, labels: list[Tensor], epoch: int, args) -> dict[str, float]:
    """One epoch over the training set. Returns its scalars.

    networks: (G_Y, G_X or None, D or None). optimizers: of G_Y with G_X, and of D. batches: (x, index), see README.md.
    labels: int64 (N,) of each set, then valence and arousal, float32 (N, 2), where they are trained on.
    """
    encoder, decoder, discriminator = networks
    adversarial = discriminator is not None and epoch > args.warm_up
    device, means = labels[0].device, common.Means()
    for network in filter(None, networks):
        network.train()
    sets = len(encoder.labels)
    one_hot = torch.eye(encoder.labels[0].out_features, device=device)
    learned = slice(0 if args.expression else sets, None)  # the variables that the GAN matches
    for x, index in batches:
        x, index = x.to(device), index.to(device, non_blocking=True)
        y = [values[index] for values in labels]  # step 2
        with common.autocast(device, args.precision):
            mean, log_variance, predicted = encoder(x)
        va = [predicted[-1], y[-1]] if len(y) > sets else [None, None]
        loss_f = multitask_loss(predicted[:sets], y[:sets], *va, args.gamma, args.label_smoothing)
        loss = loss_f + args.logit_penalty * logit_penalty(predicted[:sets]) if args.logit_penalty else loss_f
        if adversarial:
            noisy = [*(one_hot[values] for values in y[:sets]), *y[sets:]][learned]  # steps 3-4
            encoded = mean, log_variance, predicted[learned]
            for _ in range(args.d_steps):  # step 6, of D
                loss_d = discriminator_loss(*score_both_sides(networks, x, encoded, noisy, args.precision, for_d=True))
                optimizers[1].zero_grad()
                loss_d.backward()
                optimizers[1].step()
            discriminator.requires_grad_(False)  # step 5, of G_X and G_Y
            s_enc, s_dec = score_both_sides(networks, x, encoded, noisy, args.precision, for_d=False)
            discriminator.requires_grad_(True)
            loss_g = generator_loss(s_enc, s_dec)
            loss = loss + args.lam * loss_g  # Eq. 9
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        means.add("loss", total=loss, cross_entropy=multitask_loss(predicted[:sets], y[:sets], None, None) / sets)
        means.add("accuracy", train=sum(z.detach().softmax(1) for z in predicted[:sets]).argmax(1) == y[0])
        if adversarial:
            means.add("loss", discriminator=loss_d, generator=loss_g)
            for name, encoder_score, decoder_score in zip(discriminator.scores, s_enc.mean(0), s_dec.mean(0)):
                means.add(f"score/{name}", encoder=encoder_score, decoder=decoder_score)
    return means.result() | {"weight/lambda": args.lam * adversarial}


@torch.no_grad()
def predict(encoder, inputs, args) -> tuple[list[Tensor], Tensor | None]:
    """Softmax outputs of each label head, (N, C), and valence and arousal (N, 2) or None, in evaluation mode.

    inputs: batches of x. The method's prediction is the mean over the heads.
    """
    encoder.eval()
    parts = []
    for x in inputs:
        with common.autocast(x.device, args.precision):
            parts.append(encoder(x)[2])
    outputs = [torch.cat(column) for column in zip(*parts)]
    sets = len(encoder.labels)
    return [z.softmax(1) for z in outputs[:sets]], outputs[sets] if len(outputs) > sets else None


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


HALF = (0.5,) * 3  # mean and standard deviation of the network input: [-1, 1], the range of the decoder's faces


def restore(states: list[dict], args, num_classes: int, device):
    """The trained encoder as a function of images, see support/inference.py."""
    encoder = load_networks(states, args, num_classes, device)[0]

    def predictor(images: Tensor):
        probs, va = predict(encoder, common.Images(images, args.size, device, HALF, HALF), args)
        return (sum(probs) / len(probs)).cpu(), None if va is None else va.cpu()

    return predictor


@reports_errors
def main(argv=None) -> int:
    args = parse_args(argv)
    if args.evaluate or args.predict:
        return use_checkpoint(args, restore)
    with Run(args) as run:
        device = common.find_device(args.device)
        train, test, sets = load_label_sets(args)
        images, test_images = (common.Images(split.images, args.size, device, HALF, HALF) for split in (train, test))
        view = partial(augment, crop=args.crop, rotate=args.rotate, shift=args.shift, zoom=args.zoom)
        loader = common.Loader(images, args.batch_size, args.seed, view)
        labels = [values.to(device) for values in (*sets, *([] if train.va is None else [train.va]))]
        networks = make_networks(args, len(train.classes), len(sets), train.va is not None)
        for network in filter(None, networks):
            to_device(network, device, args)
        encoder, decoder, discriminator = networks
        optimizers = make_optimizers(networks, args)

        parts = dict(encoder=encoder, decoder=decoder, discriminator=discriminator)
        parts |= dict(zip(("optimizer", "optimizer_d"), optimizers))
        parts = {name: part for name, part in parts.items() if part is not None}
        for epoch in run.epochs(train, test, sets[1:], **parts):
            batches = loader.epoch(epoch, balance=labels[0] if args.oversample else None)
            scalars = train_one_epoch(networks, optimizers, batches, labels, epoch, args) | {"lr": args.lr}
            probs, prediction = predict(encoder, test_images, args)
            prediction = None if prediction is None else prediction.cpu()
            scalars |= evaluation_scalars([p.cpu() for p in probs], prediction, test.labels, test.va)
            run.end_epoch(epoch, scalars, sum(probs) / len(probs))
        probs, _ = predict(encoder, images, args)
        y0 = torch.randn(8, LATENT, generator=common.generator_of("faces", args.seed)).to(device)
        picture = partial(figures.generated, decoder, y0, train, class_va(train), len(sets), args)
        pictures = {} if decoder is None else {"generated": picture}
        run.finish(sum(probs) / len(probs), [n for n in networks if n is not None], **pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
