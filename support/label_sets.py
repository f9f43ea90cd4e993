"""Several noisy label sets of one training set, with valence and arousal."""

import dataclasses

from support.datasets import Index, Split, inject, load_data, read_labels, read_va

import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import UserError


def load_label_sets(args) -> tuple[Split, Split, list[Tensor]]:
    """The training and the evaluated split, and the label sets, int64 (N,) each; valence and arousal with their noise.

    train.labels is the first set, train.clean the data set's own labels where the sets are others.
    """
    own_labels = dict(vars(args), noise=0.0, labels=None)
    train, test = load_data(type(args)(**own_labels))
    own, index = train.labels, Index(train.names, train.labels.tolist(), train.classes)
    if args.labels:
        sets = [read_labels(path, index) for path in args.labels]
    else:
        sets = noisy_sets(own, train.classes, args)
    for t, labels in enumerate(sets, 1):
        print(f"label set {t}: {(labels != own).float().mean():.1%} of the labels are not the data set's own")
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


def noisy_sets(labels: Tensor, classes: tuple[str, ...], args) -> list[Tensor]:
    """A label set, int64 (N,), for each rate of --noise; the noise of each has a seed of its own."""
    return [inject(labels, classes, rate, args.noise_type, args.noise_seed + t) if rate else labels
            for t, rate in enumerate(args.noise)]


def majority_vote(label_sets: list[Tensor], num_classes: int) -> Tensor:
    """int64 (N,): the most frequent of the labels, int64 (N,), that the sets give an image; of several the first set's.

    So the authors of the joint-distribution GAN break ties (Table 1, "major vote").
    """
    votes = sum(F.one_hot(labels, num_classes) for labels in label_sets) << len(label_sets)
    for t, labels in enumerate(reversed(label_sets)):  # all together less than a vote
        votes += F.one_hot(labels, num_classes) << t
    return votes.argmax(1)


def class_va(train: Split) -> Tensor | None:
    """(C, 2): mean valence and arousal of the training images of each class, 0 for one without; None without any."""
    if train.va is None:
        return None
    members = F.one_hot(train.labels, len(train.classes)).float()  # (N, C)
    return members.T @ train.va / members.sum(0).clamp(min=1)[:, None]
