"""What a user copies: training functions fed by any iterable, scripts under another name, steps without waiting."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

from support.augmentation import augment, rand_augment
from support.networks import Averaged

import pytest
import torch
from conftest import Tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cocuring
import common
import jointgan
import ncctfer
import scn
import twostage

ROOT = Path(cocuring.__file__).parent
COUNT, CLASSES = 36, 7


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    torch.manual_seed(0)


class TwoViews(Dataset):
    """A student's own data set: ((weak, strong), index)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return (self.images[i], self.images[i] + 0.3 * torch.randn_like(self.images[i])), i


def epoch_of(method, batches, epoch=2, watch=None):
    """One epoch of a method's training function on batches; returns its scalars and the networks before and after."""
    argv = ["--epochs", "4", "--warm-up", "1", "--precision", "fp32", "--size", "32"]
    argv += ["--width", "0.02", "--hidden", "8", "--noise-dim", "4"] if method is jointgan else []
    args = method.parse_args(argv)
    given, clean = torch.arange(COUNT) % CLASSES, torch.arange(COUNT) % CLASSES
    batches = batches if watch is None else watch(batches)
    if method is jointgan:
        networks = jointgan.make_networks(args, CLASSES, 2, True)
        optimizers = jointgan.make_optimizers(networks, args)
        before = [p.clone() for p in networks[0].parameters()]
        sets, va = [given, given.roll(1)], torch.rand(COUNT, 2) * 2 - 1
        return jointgan.train_one_epoch(networks, optimizers, batches, sets, va, epoch, args), before, networks[0]
    network = cocuring.make_networks(args, CLASSES) if method is cocuring else method.make_network(args, CLASSES)
    optimizer, _ = method.make_optimizer(network, args)
    before = [p.clone() for p in network.parameters()]
    if method is cocuring:
        scalars = cocuring.train_one_epoch(network, optimizer, batches, given, given.clone(), epoch, args)
    elif method is scn:
        scalars, _ = scn.train_one_epoch(network, optimizer, batches, given.clone(), epoch, args)
    elif method is ncctfer:
        scalars = ncctfer.train_one_epoch(network, optimizer, batches, given, clean, epoch, args)
    else:
        probs = torch.rand(COUNT, CLASSES).softmax(1)
        division = twostage.divide(probs, given, epoch - args.warm_up, args)
        division.labelled[::3] = False
        averaged = Averaged(network, 0.9)
        scalars = twostage.train_one_epoch(network, averaged, optimizer, batches, given, division, clean, epoch, args)
    return scalars, before, network


def data_loader(method):
    """Batches as any user of PyTorch makes them."""
    images = torch.randn(COUNT, 3, 32, 32)
    two = method in (ncctfer, twostage)
    data = TwoViews(images) if two else TensorDataset(images, torch.arange(COUNT))
    return DataLoader(data, batch_size=12, shuffle=True)


METHODS = [cocuring, scn, ncctfer, twostage, jointgan]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_dataloader_of_ones_own_trains(method):
    scalars, before, network = epoch_of(method, data_loader(method))
    assert scalars["loss/total"] > 0 and 0 <= scalars["accuracy/train"] <= 1
    moved = [not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


class Waits(TorchDispatchMode):
    """Counts the operations for which a host has to wait for a GPU, or that copy a Python list to it."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "masked_select",
        "is_nonzero",
        "equal",
        "unique",
        "lift_fresh",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.__name__.split(".")[0]
        places = arguments[1] if name in ("index", "index_put_", "index_put") else []
        masks = [place for place in places if isinstance(place, torch.Tensor) and place.dtype == torch.bool]
        if masks:
            name = "index by a mask"
        if masks or any(name.startswith(wait) for wait in self.NAMES):
            self.seen.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_no_step_waits_for_the_device(method):
    mode = Waits()

    def watch(batches):
        for batch in list(batches):
            with mode:  # from here to the next batch: the body of the loop
                yield batch

    epoch_of(method, data_loader(method), watch=watch)
    # The cycle looks up in a copy on the CPU which samples of the batch have no label.
    allowed = ["nonzero"] * 3 if method is twostage else []
    assert mode.seen == allowed


def test_the_watch_sees_what_waits():
    with Waits() as mode:
        x = torch.arange(4.0)
        x[x > 1], x.sum().item(), (x > 1).nonzero(), torch.bincount(torch.tensor([1, 2]))
        x[torch.tensor([True, False, True, False])] = 0
    assert {"index by a mask", "_local_scalar_dense", "nonzero", "bincount", "lift_fresh"} <= set(mode.seen)


def test_augmentation_and_input_make_no_tensors_from_lists():
    images = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8)
    draws = {}

    def draw(name):
        return draws.setdefault(name, torch.rand(8))

    def views():
        weak = augment(images, draw, crop=4, jitter=0.2)
        common.network_input(weak, 48)
        common.network_input(rand_augment(images, draw), 48)

    views()  # constants are copied once
    with Waits() as mode:
        views()
    assert mode.seen == []


def run(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


DRIVER = """
import sys
from PIL import Image
from torch import nn
import my_method
import common
import inject_noise
from support import runs, toyfaces


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12))
        self.fc = nn.Linear(12, 8)

    def forward(self, x):
        for layer in list(self)[:3]:
            x = layer(x)
        return self.fc(x)


common.BACKBONES["resnet18"] = Small
toyfaces.SPLITS.update(train=48, valid=16, test=16)
Image.new("RGB", (40, 40), "grey").save("face.png")
train, finish = sys.argv[1:], runs.Run.finish


def stop(*arguments, **options):
    raise KeyboardInterrupt


runs.Run.finish = stop
assert my_method.main(train) == 130
runs.Run.finish = finish
assert my_method.main([*train, "--resume"]) == 0
assert my_method.main(["--evaluate", "runs/mine/model.pt"]) == 0
assert my_method.main(["--predict", "runs/mine/model.pt", "face.png"]) == 0
assert inject_noise.main(["--data", "toy", "--from-checkpoint", "runs/mine/model.pt", "--output", "m.csv"]) == 0
"""


@pytest.mark.parametrize("method", ["cocuring", "scn", "ncctfer", "twostage", "jointgan"])
def test_a_copy_under_another_name_does_everything(method, tmp_path):
    """Trains, resumes, evaluates and predicts, and its predictions can be written as machine labels."""
    for name in ("common.py", "inject_noise.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "support", tmp_path / "support", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / f"{method}.py", tmp_path / "my_method.py")
    small = ["--width", "0.02", "--hidden", "8", "--noise-dim", "4"] if method == "jointgan" else []
    train = ["--limit", "24", "--epochs", "1", "--batch-size", "12", "--size", "32", "--name", "mine", *small]
    (tmp_path / "driver.py").write_text(DRIVER)
    out = run(tmp_path, "driver.py", *train)
    assert "mine-on-toy" in out and (tmp_path / "runs" / "mine-predictions" / "predictions.csv").exists()
    assert '"method": "my_method"' in (tmp_path / "runs" / "mine" / "args.json").read_text()
    assert (tmp_path / "m.csv").exists()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_losses_and_rules_need_torch_alone(method):
    """The section of each script runs by itself, pasted behind the imports of torch."""
    section = Path(method.__file__).read_text(encoding="utf-8").split("# Losses")[1]
    banner = "# " + "-" * 118
    names = {"torch": torch, "F": nn.functional, "Tensor": torch.Tensor, "nn": nn, "math": math}
    given = set(names)
    exec(compile(section.split(banner)[1], method.__name__, "exec"), names)
    functions = {name: value for name, value in names.items() if name not in given and callable(value)}
    assert len(functions) >= 3
    used = {name for value in functions.values() for name in value.__code__.co_names}
    assert not used & {"common", "support", "runs", "args"}
