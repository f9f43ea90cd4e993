"""Methods x noise x seeds through each script's main; docs/results.md and docs/records.md come from here.

Runs that are recorded under benchmarks/results/ are skipped, interrupted ones go on where they stopped: call it again
until it is done. Each record is small and holds its command, so a single number can be checked without the rest.

    python benchmarks/compare.py toy                              # 3 seeds; 3 hours on one core
    python benchmarks/compare.py ferplus --root data/ferplus      # 1 seed; 6 hours on one core
    python benchmarks/compare.py                                  # only write the two pages and the figures anew
"""

import argparse
import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.decoding import UserError  # noqa: E402 - found through the line above
from support.distributed import reports_errors  # noqa: E402
from support.figures import generate_faces  # noqa: E402
from support.inference import load_model  # noqa: E402
from support.label_sets import class_va, load_label_sets  # noqa: E402
from support.metrics import summary  # noqa: E402
from support.runs import Parser  # noqa: E402

import common  # noqa: E402

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


@dataclass
class Row:
    """A row of a table: a script with flags, and how many forward-backward passes an image makes in an epoch."""

    name: str
    script: str
    flags: str
    passes: int
    drawn: bool = True  # in the figure of the suite


PLAIN = "--lambda-max 0 --no-relabel"
ONE, TWO = (
    Row("one network (baseline)", "cocuring", f"--networks 1 {PLAIN}", 1),
    Row("two networks (baseline)", "cocuring", PLAIN, 2),
)
COCURING, SCN, NCCTFER = Row("Co-curing", "cocuring", "", 2), Row("SCN", "scn", "", 1), Row("NCCTFER", "ncctfer", "", 2)
NCCTFER_BATCH = Row("NCCTFER, selected by the batch", "ncctfer", "--select-by batch", 2, drawn=False)
NCCTFER_BASELINE = Row("NCCTFER, its recipe alone", "ncctfer", "--no-threshold --no-negative", 1)
TWOSTAGE = Row("two-stage cycle", "twostage", "", 2)
COCURING_KEPT = Row("Co-curing, no relabelling", "cocuring", "--no-relabel", 2, drawn=False)
SCN_KEPT = Row("SCN, no relabelling", "scn", "--no-relabel", 1, drawn=False)
SCN_BASELINE = Row("SCN, its recipe alone", "scn", "--no-weights --no-rank --no-relabel", 1, drawn=False)
TWOSTAGE_BASELINE = Row("two-stage cycle, its recipe alone", "twostage", "--no-detect --no-semi", 1)
PER_CLASS = "--mixture class --floor one"
TWOSTAGE_CLEAN = Row("recipe of the cycle, clean labels", "twostage", "--noise 0 --no-detect --no-semi", 1, False)
TWOSTAGE_PER_CLASS = Row("two-stage cycle, a mixture per class", "twostage", PER_CLASS, 2, drawn=False)
TWOSTAGE_ONE = Row("two-stage cycle, one mixture, no floor", "twostage", "--floor one", 2, drawn=False)
TWOSTAGE_UNDETECTED = Row("two-stage cycle, no detection", "twostage", "--no-detect", 1, drawn=False)
TWOSTAGE_PARTS = [
    TWOSTAGE_PER_CLASS,
    TWOSTAGE_ONE,
    TWOSTAGE_UNDETECTED,
    Row("two-stage cycle, per class, kept labels alone", "twostage", f"{PER_CLASS} --no-semi", 1, drawn=False),
    Row("two-stage cycle, per class, no rebalancing", "twostage", f"{PER_CLASS} --rebalance none", 2, drawn=False),
    Row("two-stage cycle, per class, logit adjustment", "twostage", f"{PER_CLASS} --rebalance logits", 2, drawn=False),
]
SUITES = {
    "toy": {
        "title": "Toy faces, 48 px, 40 % symmetric noise",
        "flags": "--data toy --noise 0.4",
        "seeds": (1, 2, 3),
        "rows": [
            ONE,
            TWO,
            COCURING,
            COCURING_KEPT,
            Row("two networks, clean labels", "cocuring", f"--noise 0 {PLAIN}", 2),
            SCN,
            SCN_BASELINE,
            Row("SCN, relabelling the whole batch", "scn", "--relabel-batch", 1, drawn=False),
            SCN_KEPT,
            NCCTFER,
            NCCTFER_BATCH,
            Row("NCCTFER, by the batch, least probable classes", "ncctfer", "--select-by batch --mask least", 2, False),
            Row("NCCTFER, by the batch, no negative head", "ncctfer", "--select-by batch --no-negative", 1, False),
            NCCTFER_BASELINE,
            TWOSTAGE,
            TWOSTAGE_PER_CLASS,
        ],
    },
    "toy-60": {
        "title": "Toy faces, 48 px, 60 % symmetric noise",
        "flags": "--data toy --noise 0.6",
        "seeds": (1, 2, 3),
        "rows": [ONE, COCURING, SCN, NCCTFER, NCCTFER_BATCH, NCCTFER_BASELINE, TWOSTAGE, *TWOSTAGE_PARTS],
    },
    "toy-asymmetric": {
        "title": "Toy faces, 48 px, 40 % asymmetric noise",
        "flags": "--data toy --noise 0.4 --noise-type asymmetric",
        "seeds": (1, 2, 3),
        "rows": [ONE, COCURING, SCN, NCCTFER, NCCTFER_BATCH, NCCTFER_BASELINE, TWOSTAGE, TWOSTAGE_PER_CLASS],
    },
    "ferplus": {
        "title": "FERPlus, 48 px, from scratch, 10,000 images, 40 % symmetric noise (one seed)",
        "flags": "--data ferplus --limit 10000 --noise 0.4",
        "seeds": (1,),
        "rows": [ONE, TWO, COCURING, SCN, NCCTFER, NCCTFER_BATCH, NCCTFER_BASELINE, TWOSTAGE, *TWOSTAGE_PARTS],
    },
}
METHODS = [ONE, TWO, COCURING, SCN, NCCTFER, TWOSTAGE]
SUITES["ferplus-dlib"] = {
    "title": "FERPlus, dlib's face recognition network, 10,000 images, 40 % symmetric noise",
    "flags": "--data ferplus --limit 10000 --noise 0.4 --pretrained dlib",
    "seeds": (1, 2, 3),
    "rows": [
        ONE,
        TWO,
        COCURING,
        COCURING_KEPT,
        SCN,
        SCN_KEPT,
        SCN_BASELINE,
        NCCTFER,
        NCCTFER_BASELINE,
        TWOSTAGE,
        TWOSTAGE_BASELINE,
    ],
}
for name, noise, words in (
    ("0", "--noise 0", "no injected noise"),
    ("20", "--noise 0.2", "20 % symmetric noise"),
    ("40", "--noise 0.4", "40 % symmetric noise"),
    ("asymmetric", "--noise 0.4 --noise-type asymmetric", "40 % asymmetric noise"),
):
    SUITES[f"ferplus-dlib-all-{name}"] = {
        "title": f"FERPlus, dlib's face recognition network, all images, {words}",
        "flags": f"--data ferplus {noise} --pretrained dlib",
        "seeds": (1,),
        "rows": METHODS,
    }
SUITES["ferplus-30"] = {
    "title": "FERPlus, 48 px, from scratch, all images, 30 % symmetric noise",
    "flags": "--data ferplus --noise 0.3",
    "seeds": (1,),
    "rows": [*METHODS, TWOSTAGE_BASELINE, TWOSTAGE_CLEAN],
}
CONTROLS = [
    Row("VGG (baseline)", "jointgan", "--lambda 0", 1),
    Row("VGG, label smoothing", "jointgan", "--lambda 0 --label-smoothing 0.1", 1),
    Row("VGG, logit penalty", "jointgan", "--lambda 0 --logit-penalty 0.5", 1),
    Row("joint-distribution GAN", "jointgan", "", 1),
]
AUTHORS = [
    Row("VGG of the authors", "jointgan", "--lambda 0 --authors-vgg", 1),
    Row("GAN, encoder of the authors", "jointgan", "--authors-vgg", 1),
]
TABLE_3 = [
    Row("GAN, no joint score", "jointgan", "--no-joint", 1),
    Row("GAN, no marginal scores", "jointgan", "--no-marginal", 1),
    Row("GAN, no decoder", "jointgan", "--no-decoder", 1),
]
SUITES["toy-multitask"] = {
    "title": "Toy faces, 32 px, label sets of 20, 30 and 40 % symmetric noise, valence-arousal noise 0.3, 40 epochs",
    "flags": "--data toy --noise 0.2 0.3 0.4 --va-noise 0.3 --epochs 40",
    "seeds": (1, 2, 3),
    "rows": [*CONTROLS, *AUTHORS, *TABLE_3],
}
SUITES["toy-multitask-long"] = {  # until the baseline has memorised the labels
    "title": "Toy faces, 32 px, label sets of 20, 30 and 40 % symmetric noise, valence-arousal noise 0.3, 100 epochs",
    "flags": "--data toy --noise 0.2 0.3 0.4 --va-noise 0.3 --epochs 100",
    "seeds": (1, 2, 3),
    "rows": CONTROLS,
}
SUITES["toy-multitask-single"] = {
    "title": "Toy faces, 32 px, one label set of 20 % symmetric noise, 80 epochs",
    "flags": "--data toy --noise 0.2 --no-va --epochs 80",
    "seeds": (1, 2, 3),
    "rows": [*CONTROLS, *AUTHORS, *TABLE_3],
}
SUITES["toy-multitask-asymmetric"] = {
    "title": "Toy faces, 32 px, label sets of 20, 30 and 40 % asymmetric noise, valence-arousal noise 0.3, 40 epochs",
    "flags": "--data toy --noise 0.2 0.3 0.4 --noise-type asymmetric --va-noise 0.3 --epochs 40",
    "seeds": (1, 2, 3),
    "rows": CONTROLS,
}
SUITES["toy-multitask-asymmetric-long"] = {
    "title": "Toy faces, 32 px, label sets of 20, 30 and 40 % asymmetric noise, valence-arousal noise 0.3, 100 epochs",
    "flags": "--data toy --noise 0.2 0.3 0.4 --noise-type asymmetric --va-noise 0.3 --epochs 100",
    "seeds": (1,),
    "rows": CONTROLS,
}
SUITES["toy-multitask-machine"] = {
    "title": "Toy faces, 32 px, machine labels on subtle faces of a network that knows clear ones, 40 epochs",
    "before": {  # what is made: the command
        "runs/toy-source/model.pt": "jointgan.py --data toy --lambda 0 --seed 11 --name toy-source",
        "machine-toy-toy-source-va.csv": "inject_noise.py --data toy --difficulty 0.35 "
        "--from-checkpoint runs/toy-source/model.pt",
    },
    "flags": "--data toy --difficulty 0.35 --epochs 40 --labels machine-toy-toy-source.csv "
    "--va-labels machine-toy-toy-source-va.csv",
    "seeds": (1, 2, 3),
    "rows": CONTROLS,
}
SUITES["ferplus-multitask"] = {
    "title": "FERPlus, 32 px, all images, label sets of 30 and 40 % symmetric noise, flip alone",
    "flags": "--data ferplus --noise 0.3 0.4 --size 32 --width 0.25 --batch-size 32 --lr 5e-4 --beta1 0.5 --warm-up 1 "
    "--epochs 30 --lambda 0.2 --rotate 0 --shift 0 --zoom 0",
    "seeds": (1,),
    "rows": CONTROLS,
}
# Of the last epoch, where the method logs them: what it knows of the noise
KNOWN = (
    "labels/accuracy",
    "relabel/precision",
    "relabel/recall",
    "weight/auroc_clean",
    "weight/high",
    "weight/low",
    "confident/share",
    "confident/purity",
    "confident/recall",
    "negative/top",
    "negative/classes",
    "labelled/share",
    "labelled/purity",
    "labelled/recall",
    "labelled/auroc",
    "pseudo/share",
    "pseudo/accuracy_above",
    "loss/cross_entropy",
    "va/ccc_valence",
    "va/ccc_arousal",
    "faces/recognised",
    "faces/judge",
    "faces/spread",
)
MEAN_CLASS, MEAN_CLASS_5 = "accuracy/test_mean_class", "mean_class/last5"
KEYS = ("best", "last5", "final", MEAN_CLASS, "ccc/last5")
NAMES = {MEAN_CLASS: "mean class accuracy", MEAN_CLASS_5: "mean class accuracy, last5", "ccc/last5": "CCC, last5"}
UNSCALED = ("negative/classes", "loss/cross_entropy")  # no shares: not shown in per cent


RESULTS_HEAD = """# Results

Test accuracy in per cent: mean ± sample standard deviation over the seeds; without ± one seed. `best` is the highest
of any epoch, selected on the test set as in most papers. `last5` is the mean of the last five epochs. Mean class
accuracy is that of the last epoch, except in columns that say last5. CCC (concordance correlation coefficient) is the
mean of valence and arousal. With one seed a difference of one point may be chance. All runs were made on CPUs. RAF-DB,
AffectNet and CIFAR-10 were not run: we have no copies. A recipe is what a script trains with besides its method:
learning rates, augmentation, epochs, averaging; "its recipe alone" is that without the parts of the method. Differences
in the text are computed before rounding. Commands, seeds and machines: [records.md](records.md).
`python benchmarks/compare.py` writes this page."""
RECORDS_HEAD = """# Records

The numbers behind [results.md](results.md). `python benchmarks/compare.py` writes this page from `benchmarks/results/`.
Per cent; mean ± standard deviation over the seeds. `final` is the last epoch, `passes` the forward-backward passes that
an image makes in an epoch at most; of the GAN those of the encoder alone. Of generated faces `faces/recognised` is the
share that a network trained on correct labels gives the intended class, `faces/judge` its mean class accuracy on real
test faces, `faces/spread` their standard deviation within a class as a share of that of real faces. A `+` after a
commit: the code had changes that were not committed. Minutes are no measure of speed: many runs were made beside other
work, and equal work took up to five times as long."""
# Tables of docs/results.md: title, {suite: how its columns begin}, what the table says. Other suites get their own.
PAGES = [
    (
        "Toy faces, 48 px, from scratch",
        {"toy": "40 %:", "toy-60": "60 %:", "toy-asymmetric": "40 % asymmetric:"},
        """- Compare each method with its recipe alone. At 40 % SCN gains 15.6 points, Co-curing 11.3,
  NCCTFER 0.5.
- At 60 % Co-curing loses rare classes: its mean class accuracy is 51.7, 61.0 and 56.5 with the three seeds, that of one
  network 68.0 on average.
- SCN relabels too few wrong labels. Relabelling the whole batch, as the published code does, is 4 points better.
- NCCTFER selects and tests by an averaged network; its recipe alone is tested by one too. In last5
  the two are equal at 60 %, and NCCTFER is 1.7 points behind under asymmetric noise. In mean class accuracy it is 1.9
  (40 %), 4.2 (60 %) and 2.2 (asymmetric) ahead. Most of what the selection gives, averaging gives too
  ([measured](ncctfer.md#toy-faces)). The rows "by the batch" test the network itself, as in the paper. Its negative
  head collapses ([why](ncctfer.md#the-negative-head)).
- Of the methods as preset the two-stage cycle has the best last5 at each noise; at 60 % NCCTFER is 1.1 points ahead in
  mean class accuracy. Most of its gain comes from its recipe (averaged network, crop, no colour jitter, smaller
  learning rate of the head): it reaches 95.5 at 60 % without detection. Under asymmetric noise a mixture for each class
  is 2.7 points better than the preset, at 60 % 0.4 ([why it is not the preset](twostage.md#which-labels-to-keep)). The
  preset fits one mixture of two Gaussians to the losses of all classes, and of each class keeps at least the labels up
  to its mean loss (the floor). The rows "per class" have a mixture for each class.""",
    ),
    (
        "FERPlus, 48 px, from scratch, 10,000 images, 40 % symmetric noise",
        {"ferplus": ""},
        """- Co-curing gains nothing over two networks, SCN nothing over one network: with random crops these memorise
  little in 30 epochs. SCN's recipe alone was not run.
- NCCTFER is 0.8 points below one network, and as much below its recipe alone (both tested by an
  averaged network); in mean class accuracy it is 5.5 above the one and 1.2 above the other. With the thresholds of the
  batch it fails: they need a mostly correct network, and this one is correct on two thirds of the faces
  ([more](ncctfer.md#ferplus-from-scratch)).
- The cycle gains 2.8 points over its recipe alone, and 3.6 over one network. One mixture for all
  classes without the floor has about the same accuracy, and a lower one on the rare classes
  ([why](twostage.md#which-labels-to-keep)).""",
    ),
    (
        "FERPlus, dlib's face recognition network, 10,000 images, 40 % symmetric noise",
        {"ferplus-dlib": ""},
        """- One network has its best accuracy in epoch 8 to 10, and falls then. The two-stage cycle is 7.1 points ahead
  of it in last5, Co-curing 6.3.
- Over its recipe alone Co-curing gains 4.7 points in last5, the cycle 0.9. SCN's 0.8 are within the
  spread. NCCTFER loses 1.6 (1.9, 1.3 and 1.6 with the seeds): an averaged network is tested in both rows, and its
  selection lets the wrong labels of rare classes pass ([measured](ncctfer.md#what-was-tried)). NCCTFER and the cycle
  gain 2.7 each in mean class accuracy. Over one network NCCTFER gains 4.0 in last5.
- The test set has 16 faces of disgust, 15 of contempt and 86 of fear. One face of disgust or contempt is 0.8 points of
  mean class accuracy.
- Co-curing and SCN do not gain in mean class accuracy: relabelling replaces most of the few correct labels of rare
  classes. With seed 3 28 of the labels of disgust are correct and 128 of those of fear; Co-curing replaces 20 and 73 of
  them, SCN 25 and 118. Without it Co-curing has 52.1, SCN 48.8. In last5 Co-curing has 0.3, 0.6 and 0.3 points
  more then with the three seeds; SCN 0.3, by one seed of three
  ([Co-curing](cocuring.md#real-faces-with-a-pretrained-backbone),
  [SCN](scn.md#real-faces-with-a-pretrained-backbone)).""",
    ),
    (
        "FERPlus, dlib's face recognition network, all images",
        {"ferplus-dlib-all-0": "0 %:", "ferplus-dlib-all-20": "20 %:", "ferplus-dlib-all-40": "40 %:"},
        """- Without injected noise no method gains one point in last5: NCCTFER is 0.3 points above one network, SCN
  equal to it, the cycle 0.4 below; Co-curing is 0.7 above two networks. In `best` each method is below its baseline.
  In mean class accuracy SCN is 3.3 points below one network, Co-curing 1.9 below two.
- NCCTFER is tested by its average. Tested by the network itself (commit 19354ed) it had 1.1, 0.5 and 0.4 points less in
  last5 at 0, 20 and 40 %.
- In the last epoch Co-curing has replaced 1,490 of the 25,045 labels, SCN 2,286. The cycle keeps 83 % of the labels. It
  falls from 84.6 in epoch 3, the last one on all labels, to 83.1 in last5 (83.8 in the last epoch).
- At 20 % the baselines do not get worse: two networks are best in the last epoch (84.2). In last5 Co-curing is 0.8
  points ahead of them; over one network the cycle is 0.4 ahead, SCN 0.3, and NCCTFER is equal to it.
- The cycle is no better with less noise (last5 83.1, 82.7, 83.2). At 20 % it drops a sixth of the correct labels, and
  it drops a sixth of all labels at 0 %; at 40 % it keeps 93 % of the correct ones. With little noise the network is
  sure of most labels, and takes the rest, hard faces too, for noise.
- At 40 % one network is best in epoch 9 (81.2), and ends at 79.5. Two networks do not get worse: they are best in the
  last epoch. In last5 the cycle is 2.9 points ahead of one network, Co-curing 0.6 ahead of two. SCN is 0.5 below one
  network, NCCTFER 0.8. With 25,000 images there is less memorising to prevent than with 10,000.
  The cycle's and NCCTFER's recipes alone were not run on all images.
- In mean class accuracy NCCTFER is 3.1 points ahead of one network at 20 % and 6.4 at 40 %, the cycle 3.1 and 5.7.
  Co-curing is 1.2 and 1.0 points below two networks, SCN 1.6 and 0.4 below one. In the last epoch at 40 % NCCTFER
  recognises 38 % of disgust and 13 % of contempt, the cycle 25 % of disgust; the others recognise none of both.""",
    ),
    (
        "FERPlus, dlib's face recognition network, all images, 40 % asymmetric noise",
        {"ferplus-dlib-all-asymmetric": ""},
        """- Each class loses 40 % of its labels to one other class: happiness to neutral, neutral to sadness,
  fear to surprise, and so on ([pairs](data.md#noise)). Networks without detection swing between the two classes of a
  pair: one network has 78.3 in epoch 8, 70.0 in epoch 9 and 77.0 in epoch 10. The runs swing together: with one seed
  all see the same batches in the same order.
- NCCTFER is tested by its average. Tested by the network itself (commit a08d1a4) it had 0.5 points less in last5.
- In last5 the cycle is 3.4 points ahead of one network, NCCTFER 2.1, Co-curing 2.3 ahead of two networks. SCN is 1.5
  below one network, which is less than these swings.
- In mean class accuracy NCCTFER is 4.7 points ahead of one network, the cycle 4.3. SCN is 1.0 below it, Co-curing 0.3
  below two networks.
- Relabelling fails here. Of the 787 labels that Co-curing has replaced at the end, a third are correct now, and half
  were correct before. Of SCN's 5,403 new labels 52 % are correct, and 34 % of the old ones were.
- No face of another class is labelled disgust, fear or contempt, so all these labels are correct. Co-curing has
  replaced 38 of the 70, 121 of the 322 and 61 of the 72 ([its audit](audit.md#injected-noise) has them first).""",
    ),
    (
        "FERPlus, 48 px, from scratch, all images, 30 % symmetric noise",
        {"ferplus-30": ""},
        """- SCN's paper has 68.5 (baseline) and 70.5 (SCN) at this noise rate, from scratch, 224 px.
- NCCTFER's row is of an earlier version, which tested the network itself and not its average. With 10,000 images
  the average is 1.6 points better.
- Plain training does not get worse here: one network is best in epoch 26 of 30, two networks in epoch 27. So there is
  little memorising to prevent.
- The cycle is 2.3 points ahead of one network, and 3.9 in mean class accuracy. Most of the 2.3 come from its recipe:
  with another learning rate the recipe alone was level with the cycle in epochs 20 to 24, and 1.4 points behind in mean
  class accuracy ([more](twostage.md#other-changes)). The cycle's accuracy was 78.3 in epoch 15, the last before
  detection. At the end it recognises 25 % of disgust and 13 % of contempt, one network 12.5 and 0 %.
- Without injected noise the recipe of the cycle (an averaged network, crop, no detection) has 82.2, 3.0 points more
  than the cycle has with it, and 6.3 more in mean class accuracy. It has all 25,045 labels then; with the noise 17,531
  are left as they were.
- Co-curing is 0.6 points below two networks, and 3.2 in mean class accuracy. It has 79.2 in epoch 21, the first one
  that relabels, and 78.0 at the end: a quarter of its new labels are wrong. SCN is 0.4 points above one network, and
  1.2 below it in mean class accuracy.
- NCCTFER is 1.0 point below one network, and 3.5 above it in mean class accuracy. The recipes alone of SCN
  and NCCTFER were not run.""",
    ),
    (
        "Three label sets, valence and arousal, toy faces, 32 px",
        {"toy-multitask": "40 epochs:", "toy-multitask-long": "100 epochs:"},
        """Label sets of 20, 30 and 40 % symmetric noise. At 100 epochs the GAN is 4.1 points ahead of its VGG, 3.1
ahead of the logit penalty (a penalty on confident outputs). The authors' encoder alone is nearly level with the GAN at
40 epochs; it was not run longer. The GAN with it has not learned fear in 40 epochs (one seed; 94.9)
([why ours is the default](jointgan.md#what-was-tried)). [What the GAN gives](jointgan.md#results).""",
    ),
    (
        "One label set, toy faces, 32 px",
        {"toy-multitask-single": ""},
        """20 % symmetric noise, no valence and arousal. The GAN is 10 points ahead of its VGG and of the controls. Its
encoder here is ours; the authors' alone memorises as much ([more](jointgan.md#what-was-tried)).""",
    ),
    (
        "Asymmetric noise, valence and arousal, toy faces, 32 px",
        {"toy-multitask-asymmetric": "40 epochs:", "toy-multitask-asymmetric-long": "100 epochs:"},
        """Three label sets of 20, 30 and 40 %. At 100 epochs (one seed) the baseline has memorised the labels: there
the GAN gains, 7.7 points in last5, 0.5 in mean class accuracy.""",
    ),
    (
        "Machine labels, valence and arousal, toy faces, 32 px",
        {"toy-multitask-machine": ""},
        """The labels, valence and arousal that a network trained on clear faces gives to subtle ones; 23 % of the
labels are wrong. The GAN gains nothing over its VGG.""",
    ),
    (
        "Several label sets, FERPlus, 32 px, all images, flip alone",
        {"ferplus-multitask": ""},
        """Label sets of 30 and 40 % symmetric noise, lambda 0.2, one seed. The GAN learns more slowly; the VGG
memorises little.""",
    ),
]


def slug(row: Row) -> str:
    """The row's name in file names and on the command line: "co-curing-no-relabelling"."""
    return re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")


def record_path(suite: str, row: Row, seed: int) -> Path:
    return RESULTS / suite / f"{slug(row)}-s{seed}.json"


def machine() -> str:
    """The processor and the number of cores used, or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    except OSError:
        names = []
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} core{'s' * (torch.get_num_threads() > 1)}"


def score_faces(folder: Path, args, count: int = 50) -> dict[str, float]:
    """How good the faces of a run of jointgan.py are, `count` of each class; nothing for a run without decoder.

    faces/recognised: share that a network trained on the data set's own labels gives the class they were made for.
    faces/judge: its mean class accuracy on the real test faces. faces/spread: the standard deviation of the generated
    faces within a class, mean over pixels and classes, as a share of that of real faces: one frozen face for each class
    has 0.
    """
    import jointgan

    state, device = common.load_checkpoint(folder / "model.pt"), torch.device("cpu")
    run, classes = argparse.Namespace(**state["args"] | {"compile": False}), state["classes"]
    _, decoder, _ = jointgan.load_networks(state["networks"], run, len(classes), device)
    if decoder is None:
        return {}
    judge = Path(args.out) / "judge" / f"{run.data}-{run.size}px-{run.difficulty:g}"
    if not (judge / "model.pt").exists():
        flags = f"--data {run.data} --difficulty {run.difficulty} --size {run.size} --batch-size {run.batch_size}"
        flags += f" {PLAIN} --networks 1"
        flags += f" --epochs {6 if run.data == 'toy' else 15}"
        flags += f" --classes {run.classes}" if run.classes else ""
        if importlib.import_module("cocuring").main(
            [
                *flags.split(),
                "--root",
                str(run.root),
                "--resume",
                "--out",
                str(judge.parent),
                "--name",
                judge.name,
                "--cache",
                args.cache,
            ]
        ):
            sys.exit(2)
    train, _, sets = load_label_sets(run)
    y0 = torch.randn(len(classes) * count, jointgan.LATENT, generator=common.generator_of("score", run.seed))
    labels, va = torch.arange(len(classes)).repeat_interleave(count), class_va(train)
    made = generate_faces(
        decoder, y0, torch.eye(len(classes))[labels], None if va is None else va[labels], len(sets), run
    )
    probs, _ = load_model(judge / "model.pt", device)[1](made)
    own = train.labels if train.clean is None else train.clean
    spread = [
        torch.stack([faces[y == c].float().std(0).mean() for c in range(len(classes)) if (y == c).sum() > 1]).mean()
        for faces, y in ((made, labels), (train.images, own))
    ]
    real = json.loads((judge / "metrics.jsonl").read_text().splitlines()[-1])["accuracy/test_mean_class"]
    numbers = {
        "recognised": (probs.argmax(1) == labels).float().mean().item(),
        "judge": real,
        "spread": (spread[0] / spread[1]).item(),
    }
    return {f"faces/{key}": round(value, 6) for key, value in numbers.items()}


def made_before(suite: str, folder: Path) -> set[str]:
    """The files that a suite's own commands "before" make, in `folder`; a command whose file is there is not run."""
    commands = SUITES[suite].get("before", {})
    for file, command in commands.items():
        if not (folder / file).exists():
            folder.mkdir(parents=True, exist_ok=True)
            script, *flags = command.split()
            flags.append("--overwrite" if script == "inject_noise.py" else "--resume")  # it may have been interrupted
            if status := subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder).returncode:
                sys.exit(status)
    return {path.name for path in folder.glob("machine-*.csv")} if commands else set()


def run_one(suite: str, row: Row, seed: int, args) -> None:
    """Train, or go on training, and write the record."""
    record = record_path(suite, row, seed)
    flags = f"{SUITES[suite]['flags']} {row.flags} --seed {seed}".split()
    label_files = made_before(suite, Path(args.out) / suite)
    place = ["--out", str(Path(args.out) / suite), "--name", record.stem, "--cache", args.cache]
    place += ["--root", args.root] if args.root and "--data toy" not in SUITES[suite]["flags"] else []
    folder = Path(args.out) / suite / record.stem
    given = [str(Path(args.out) / suite / flag) if flag in label_files else flag for flag in flags]
    if not (folder / "model.pt").exists():
        status = importlib.import_module(row.script).main([*given, *place, "--resume"])
        if status:
            sys.exit(status)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    made = json.loads((folder / "args.json").read_text())
    if made["argv"][: len(given)] != given:  # the suite was changed after this run
        raise UserError(f"{folder} was made with other arguments than those of the suite: remove it, or give --out")
    last = history[-1]
    numbers = {key: round(value, 6) for key, value in summary(history).items()}
    numbers[MEAN_CLASS_5] = round(statistics.mean(line[MEAN_CLASS] for line in history[-5:]), 6)
    for tag in last:
        if tag in (MEAN_CLASS, *KNOWN) or tag.startswith("accuracy/class/"):
            numbers[tag] = round(last[tag], 6)
    if row.script == "jointgan":
        concordance = [
            line[tag] for line in history[-5:] for tag in ("va/ccc_valence", "va/ccc_arousal") if tag in line
        ]
        numbers |= {"ccc/last5": round(statistics.mean(concordance), 6)} if concordance else {}
        numbers |= score_faces(folder, args)
    content = {
        "row": row.name,
        "command": f"python {row.script}.py {' '.join(flags)}",
        "seed": seed,
        "passes": row.passes,
        **numbers,
        "seconds": round(sum(line["seconds"] for line in history)),
        "machine": machine(),
        "versions": made["versions"],
        "commit": made["commit"],
        "curve": [round(line["accuracy/test"], 4) for line in history],
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomically(record, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))


def records(suite: str) -> list[tuple[Row, list[dict]]]:
    """The recorded runs of each row of a suite, in the order of its table."""
    found = []
    for row in SUITES[suite]["rows"]:
        runs = [
            json.loads(path.read_text())
            for seed in SUITES[suite]["seeds"]
            if (path := record_path(suite, row, seed)).exists()
        ]
        if runs:
            found.append((row, runs))
    return found


def cell(runs: list[dict], key: str, scale: float = 100) -> str:
    """Mean and, for several seeds, standard deviation, times `scale`; two decimals where that is 1."""
    values = [scale * run[key] for run in runs if key in run]
    if not values:
        return ""
    digits = 1 if scale == 100 else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def page_table(suites: dict[str, str]) -> list[str]:
    """One table for the suites of a data set, a row for each method. suites: {suite: what its columns are called}."""
    found = {suite: {row.name: runs for row, runs in records(suite)} for suite in suites}
    keys = ("last5", MEAN_CLASS, "ccc/last5") if len(suites) > 1 else KEYS
    if all(MEAN_CLASS_5 in run for rows in found.values() for runs in rows.values() for run in runs):
        keys = [MEAN_CLASS_5 if key == MEAN_CLASS else key for key in keys]
    head, columns = [""], []
    for suite, what in suites.items():
        shown = [key for key in keys if any(key in run for runs in found[suite].values() for run in runs)]
        columns += [(suite, key) for key in shown]
        head += [f"{what} {NAMES.get(key, key)}".strip() for key in shown]
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    rows = [[name, *(cell(found[suite].get(name, []), key) for suite, key in columns)] for name in names]
    if len(suites) == 1:
        (runs_of,) = found.values()
        head = [head[0], "seeds", *head[1:]]
        rows = [[name, str(len(runs_of[name])), *cells] for name, *cells in rows]
    return table(head, rows)


def write_results() -> None:
    """docs/results.md, the page that a person reads."""
    text = [RESULTS_HEAD]
    own = [(SUITES[suite]["title"], {suite: ""}, "") for suite in SUITES if not any(suite in of for _, of, _ in PAGES)]
    for title, suites, words in [*PAGES, *own]:
        suites = {suite: what for suite, what in suites.items() if suite in SUITES and records(suite)}
        if suites:
            text += ["", f"## {title}", "", *page_table(suites)]
            text += ["", words] if words else []
            text += ["", *(f"![{SUITES[suite]['title']}](figures/{suite}.png)" for suite in suites)]
    (DOCS / "results.md").write_text("\n".join(text) + "\n")


def write_records() -> None:
    """docs/records.md: all that was recorded of each suite."""
    text = [RECORDS_HEAD]
    for suite, what in SUITES.items():
        rows = records(suite)
        if not rows:
            continue
        shown = [key for key in KEYS if any(key in run for _, runs in rows for run in runs)]
        head = ["", "seeds", *(NAMES.get(key, key) for key in shown), "passes", "minutes", "s an epoch"]
        lines = []
        for row, runs in rows:
            seconds, epochs = (
                statistics.mean(values) for values in zip(*((run["seconds"], len(run["curve"])) for run in runs))
            )
            numbers = [cell(runs, key) for key in shown]
            times = [str(row.passes), f"{seconds / 60:.1f}", f"{seconds / epochs:.0f}"]
            lines.append([row.name, str(len(runs)), *numbers, *times])
        text += ["", f"## {what['title']}", "", *table(head, lines)]
        tags = [tag for tag in KNOWN if any(tag in run for _, runs in rows for run in runs)]
        lines = [
            [row.name, *(cell(runs, tag, 1 if tag in UNSCALED else 100) for tag in tags)]
            for row, runs in rows
            if any(tag in run for tag in tags for run in runs)
        ]
        if lines:
            scale = "Scalars of the last epoch, per cent (`negative/classes`, `loss/cross_entropy`: as they are):"
            text += ["", scale, "", *table(["", *tags], lines)]
        before = [f"- first `python {command}`" for command in what.get("before", {}).values()]
        text += ["", "Commands (of the first recorded seed), and last5 of every seed:", "", *before]
        for row, runs in rows:
            text.append(
                f"- {row.name}: `{runs[0]['command']}`: " + ", ".join(f"{100 * run['last5']:.1f}" for run in runs)
            )
        used = sorted({f"{run['machine']}; torch {run['versions']['torch']}" for _, runs in rows for run in runs})
        commits = {run["commit"] for _, runs in rows for run in runs if run["commit"]}
        commits = sorted({commit[:7] + "+" * commit.endswith("+") for commit in commits})
        text += ["", f"Machine: {' / '.join(used)}. Commits: {', '.join(commits) or 'not recorded'}."]
    (DOCS / "records.md").write_text("\n".join(text) + "\n")


def draw_curves() -> None:
    """docs/figures/<suite>.png: test accuracy against epoch, mean over the seeds."""
    from matplotlib.figure import Figure

    (DOCS / "figures").mkdir(exist_ok=True)
    for suite, what in SUITES.items():
        rows = [(row, runs) for row, runs in records(suite) if row.drawn]
        if not rows:
            continue
        figure = Figure((9, 4.2), layout="constrained")
        axes = figure.subplots()
        for row, runs in rows:
            curve = [100 * statistics.mean(values) for values in zip(*(run["curve"] for run in runs))]
            line = "--" if any(word in row.name for word in ("baseline", "alone", "without")) else "-"
            axes.plot(range(1, len(curve) + 1), curve, line, label=row.name, marker=".")
        axes.set(xlabel="epoch", ylabel="test accuracy (%)")
        axes.set_title(what["title"], fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        low = min(100 * min(run["curve"][len(run["curve"]) // 4 :]) for _, runs in rows for run in runs)
        axes.set_ylim(max(0, low - 5))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
        figure.savefig(DOCS / "figures" / f"{suite}.png", dpi=110)


def write_docs() -> None:
    """The two pages and the figures, from the records alone."""
    write_results()
    write_records()
    draw_curves()
    print(f"{DOCS / 'results.md'} and {DOCS / 'records.md'} written")


@reports_errors
def main(argv=None) -> int:
    parser = Parser(__file__, __doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"what to run: {', '.join(SUITES)} (default: "
                        "nothing, only write the docs)")
    parser.add_argument("--root", help="folder of the data set, where the suite needs one")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds of the suite")
    parser.add_argument(
        "--rows",
        choices=sorted({slug(row) for suite in SUITES.values() for row in suite["rows"]}),
        nargs="+",
        metavar="ROW",
        help="only these rows, named as the records are: co-curing-no-relabelling",
    )
    parser.add_argument("--out", default="runs/compare", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--cache", default="cache", help="where decoded images are kept (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := [suite for suite in args.suites if suite not in SUITES]:
        parser.error(f"{unknown[0]}: no suite; there are {', '.join(SUITES)}")
    for flag, asked, there in (
        ("--seeds", args.seeds, {seed for suite in args.suites for seed in SUITES[suite]["seeds"]}),
        ("--rows", args.rows, {slug(row) for suite in args.suites for row in SUITES[suite]["rows"]}),
    ):
        if unknown := [value for value in asked or [] if value not in there]:
            parser.error(f"{flag} {unknown[0]}: none of the suites asked for has it")
    todo = [
        (suite, row, seed)
        for suite in args.suites
        for seed in SUITES[suite]["seeds"]
        if not args.seeds or seed in args.seeds
        for row in SUITES[suite]["rows"]
        if (not args.rows or slug(row) in args.rows) and not record_path(suite, row, seed).exists()
    ]
    began = time.perf_counter()
    for done, (suite, row, seed) in enumerate(todo):
        left = (
            f", about {(time.perf_counter() - began) / done * (len(todo) - done) / 60:.0f} minutes left" if done else ""
        )
        print(f"\n=== {done + 1} of {len(todo)}{left}: {suite}, {row.name}, seed {seed}", flush=True)
        run_one(suite, row, seed, args)
    write_docs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
