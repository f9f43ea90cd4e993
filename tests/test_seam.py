"""What a user copies: training functions fed by any iterable, scripts under another name, steps without waiting."""

import contextlib
import csv
import dataclasses
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from support import augmentation, toyfaces
from support.augmentation import augment, rand_augment
from support.networks import Averaged, Head

import pytest
import torch
from conftest import Tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
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


class OnBothSides:
    """A mask on the meta device that can be copied to the CPU, as one on a GPU can."""

    def __init__(self, mask):
        self.mask, self.there = mask, mask.to("meta")

    def cpu(self):
        return self.mask

    def __getitem__(self, index):
        return self.there[index]


def epoch_of(method, batches, epoch=2, device="cpu", precision="fp32"):
    """One epoch of a method's training function on batches; returns its scalars and the networks before and after."""
    argv = ["--epochs", "4", "--warm-up", "1", "--precision", precision, "--size", "32"]
    argv += ["--width", "0.02"] if method is jointgan else []
    args = method.parse_args(argv)

    def optimizers_of(networks, own):
        # Fused Adam knows no meta device. There the step of the optimiser, PyTorch's own, is a plain one.
        return own if device == "cpu" else [torch.optim.SGD(n.parameters(), 0.1, foreach=False) for n in networks]

    given, clean = (torch.arange(COUNT).remainder(CLASSES).to(device) for _ in range(2))
    if method is jointgan:
        networks = [network.to(device) for network in jointgan.make_networks(args, CLASSES, 2, True)]
        optimizers = optimizers_of([nn.ModuleList(networks[:2]), networks[2]], jointgan.make_optimizers(networks, args))
        before = [p.clone() for p in networks[0].parameters()]
        labels = [given, given.roll(1), (torch.rand(COUNT, 2) * 2 - 1).to(device)]
        return jointgan.train_one_epoch(networks, optimizers, batches, labels, epoch, args), before, networks[0]
    network = cocuring.make_networks(args, CLASSES) if method is cocuring else method.make_network(args, CLASSES)
    (optimizer,) = optimizers_of([network.to(device)], [method.make_optimizer(network, args)[0]])
    before = [p.clone() for p in network.parameters()]
    if method is cocuring:
        scalars = cocuring.train_one_epoch(network, optimizer, batches, given, given.clone(), epoch, args)
    elif method is scn:
        scalars, _ = scn.train_one_epoch(network, optimizer, batches, given.clone(), epoch, args)
    elif method is ncctfer:
        scalars = ncctfer.train_one_epoch(network, optimizer, batches, given, clean, epoch, args)
    else:
        probs = torch.rand(COUNT, CLASSES).softmax(1)
        division = twostage.divide(probs, torch.arange(COUNT) % CLASSES, epoch - args.warm_up, args)
        division.labelled[::3] = False
        if device == "meta":
            fields = [(field.name, getattr(division, field.name)) for field in dataclasses.fields(division)]
            moved = {name: value.to(device) for name, value in fields if value is not None}
            division = dataclasses.replace(division, **moved | {"labelled": OnBothSides(division.labelled)})
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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_an_epoch_has_the_precision_of_its_arguments(method, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "autocast", lambda _, precision: seen.append(precision) or contextlib.nullcontext())
    epoch_of(method, data_loader(method), precision="bf16")
    assert len(seen) >= 3 and set(seen) == {"bf16"}


def test_the_examples_of_the_readme_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert any("DataLoader" in block for block in blocks)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("'loss/total'") == 3  # one line an epoch


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
        "_unique",
        "repeat_interleave",
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


class Host(TorchDispatchMode):
    """Counts the operations that read a tensor on the CPU. Tensors on the meta device hold no numbers for a host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(arguments)):
            self.seen.append(function.__name__.split(".")[0])
        return function(*arguments, **(options or {}))


class EndOfEpoch(Exception):
    """The last step is done: the means, which are read by the host, are not asked for."""


def watched(batches, mode, device="cpu"):
    """Hand out each batch with the mode switched on until the next one is asked for: during the body of the loop."""
    for views, index in list(batches):
        views = tree_map(lambda view: view.to(device), tuple(views) if isinstance(views, list) else views)
        with mode:
            yield views, index
    if device == "meta":
        raise EndOfEpoch


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_no_step_waits_for_the_device(method):
    """With the script's own optimiser: no operation that waits, no tensor made from a Python list."""
    mode = Waits()
    with contextlib.closing(watched(data_loader(method), mode)) as batches:
        epoch_of(method, batches)
    # The cycle looks up in a copy on the CPU which samples of the batch have no label.
    allowed = ["nonzero"] * 3 if method is twostage else []
    assert mode.seen == allowed


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_step_copies_nothing_to_or_from_the_device_but_the_index(method, monkeypatch):
    """On a device from which nothing can be read: whatever asks for a number there, or copies it, raises."""
    monkeypatch.setattr(Head, "forward", nn.Linear.forward)  # there is no autocast for the meta device
    mode = Host()
    with contextlib.closing(watched(data_loader(method), mode, "meta")) as batches, pytest.raises(EndOfEpoch):
        epoch_of(method, batches, device="meta")
    # The cycle looks up in a copy on the CPU which samples of the batch have no label, and copies their places.
    look_up = ["index", "bitwise_not", "nonzero", "select", "_to_copy"] if method is twostage else []
    seen = [name for name in mode.seen if name != "slice"]  # in PyTorch 2.6 a column is a slice first
    assert seen == ["_to_copy", *look_up] * 3


def test_the_watch_sees_what_waits():
    with Waits() as mode:
        x = torch.arange(4.0)
        x[x > 1], x.sum().item(), (x > 1).nonzero(), torch.bincount(torch.tensor([1, 2])), x.unique()
        x[torch.tensor([True, False, True, False])] = 0
    assert {"index by a mask", "_local_scalar_dense", "nonzero", "bincount", "lift_fresh", "_unique2"} <= set(mode.seen)
    for make in (lambda: torch.tensor([1.0, 2.0]), lambda: x.new_tensor([1.0, 2.0]), lambda: x[[0, 2]]):
        with Waits() as mode:
            make()
        assert mode.seen == ["lift_fresh"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
    ],
)
def test_nothing_can_be_read_from_the_meta_device(read):
    with pytest.raises((NotImplementedError, RuntimeError)):
        read(torch.zeros(4, device="meta"))


def test_the_watch_sees_what_comes_from_the_host():
    x, place = torch.zeros(4, device="meta"), torch.tensor([0, 2])
    for use in (lambda: place.to("meta"), lambda: x[place], lambda: x.mul(torch.ones(()))):
        with Host() as mode:
            use()
        assert mode.seen, use


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_loader_waits_in_no_step_and_makes_no_tensor_from_a_list(device, monkeypatch):
    monkeypatch.setattr(augmentation, "takes_its_own_alone", lambda device: False)  # the CPU stands in for a GPU
    images = common.Images(torch.randint(0, 256, (26, 3, 40, 40), dtype=torch.uint8), 48, torch.device(device))
    loader = common.Loader(images, 6, 1, partial(augment, crop=4, jitter=0.2), rand_augment)
    batches = loader.epoch(1, torch.arange(26) % CLASSES)
    next(batches)  # constants and the draws of the epoch are copied once
    with contextlib.closing(batches), Waits() as waits, Host() as host:
        left = list(batches)
    assert len(left) == 4 and waits.seen == []
    if device == "meta":  # from the CPU come the images of the step and their places
        assert left[0][0][0].device.type == "meta"
        assert sorted(set(host.seen)) == ["_to_copy", "slice"] and host.seen.count("_to_copy") == 4


@pytest.mark.parametrize("method", [cocuring, scn], ids=lambda method: method.__name__)
@pytest.mark.parametrize("crop, jitter", [(0, 0), (2, 0), (0, 0.3)])
def test_main_trains_on_every_sample_in_a_view_as_asked(method, crop, jitter, tiny, tmp_path, monkeypatch):
    """Each input is its face mirrored or not, shifted by at most `crop` pixels, brighter or darker by `jitter`."""
    epochs, honest = [], common.Loader.epoch

    def epoch(self, *arguments, **options):
        epochs.append(list(honest(self, *arguments, **options)))
        return iter(epochs[-1])

    monkeypatch.setattr(common.Loader, "epoch", epoch)
    place = ["--out", str(tmp_path), "--name", "run", "--epochs", "2", "--crop", str(crop), "--jitter", str(jitter)]
    assert method.main([*tiny, *place]) == 0
    faces = [torch.from_numpy(toyfaces.draw_face("train", i, size=32)[0]).permute(2, 0, 1) for i in range(48)]
    faces = torch.stack(faces) / 255
    padded = nn.functional.pad(torch.stack([faces, faces.flip(-1)], 1), (crop,) * 4)  # (48, 2, 3, H, W)
    shifts = [(a, b) for a in range(2 * crop + 1) for b in range(2 * crop + 1)]
    views = torch.cat([padded[..., a : a + 32, b : b + 32] for a, b in shifts], 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    orders = [torch.cat([index for _, index in batches]) for batches in epochs]
    assert all(sorted(order.tolist()) == list(range(48)) for order in orders) and not torch.equal(*orders)
    inputs = [torch.cat([x for x, _ in batches]) * std + mean for batches in epochs]
    for x, order in zip(inputs, orders):
        apart, view = (x[:, None] - views[order]).abs().amax((2, 3, 4)).min(1)
        if jitter:
            ratio = x.mean((1, 2, 3)) / faces[order].mean((1, 2, 3))
            assert apart.min() > 0.005 and 0.65 < ratio.min() < 0.85 and 1.1 < ratio.max() < 1.35
        else:
            assert apart.max() < 1e-4 and {place % 2 for place in view.tolist()} == {0, 1}
            assert len({place // 2 for place in view.tolist()}) > len(shifts) / 2


@pytest.mark.parametrize("method", [cocuring, scn, ncctfer, twostage], ids=lambda method: method.__name__)
def test_the_backbone_is_given_images_of_the_data(method, tiny, tmp_path, monkeypatch):
    """dlib's network takes the statistics of its live batch normalisation from them."""
    seen, honest = [], common.make_backbone
    monkeypatch.setattr(common, "make_backbone", lambda args, inputs=None: seen.append(inputs) or honest(args, inputs))
    assert method.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run"]) == 0
    assert seen and all(inputs.shape[1:] == (3, 32, 32) and inputs.std() > 0.1 for inputs in seen)


@pytest.mark.parametrize("method", [cocuring, scn, ncctfer, jointgan], ids=lambda method: method.__name__)
def test_oversampling_draws_every_given_class_as_often(method, tiny, tmp_path, monkeypatch):
    if hasattr(method, "relabel"):  # the current labels become those of one class
        zeros = lambda *values: torch.zeros_like(next(v for v in values if v.dtype == torch.int64))  # noqa: E731
        monkeypatch.setattr(method, "relabel", zeros)
    tiny += ["--warm-up", "1", *(["--width", "0.02"] if method is jointgan else [])]
    epochs, honest = [], common.Loader.epoch

    def epoch(self, *arguments, **options):
        epochs.append(list(honest(self, *arguments, **options)))
        return iter(epochs[-1])

    monkeypatch.setattr(common.Loader, "epoch", epoch)
    assert method.main([*tiny, "--oversample", "--out", str(tmp_path), "--name", "run"]) == 0
    with open(tmp_path / "run" / "labels.csv") as file:
        given = {row["name"]: toyfaces.CLASSES.index(row["given"]) for row in csv.DictReader(file)}
    given = torch.tensor([given[f"train_{i:05d}.png"] for i in range(48)])
    assert len(epochs) == 3
    for batches in epochs:
        counts = torch.bincount(given[torch.cat([index for _, index in batches])], minlength=CLASSES)
        assert counts.sum() == 48 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_the_networks_follow_the_seed(method):
    def weights(seed):
        args = method.parse_args(["--seed", seed, "--size", "32", *(["--width", "0.02"] if method is jointgan else [])])
        networks = jointgan.make_networks(args, CLASSES, 1, True) if method is jointgan else (
            cocuring.make_networks(args, CLASSES) if method is cocuring else [method.make_network(args, CLASSES)])
        return [p for network in networks for p in network.parameters() if p.ndim > 1]

    first, again, other = map(weights, "112")
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


@pytest.mark.parametrize("method", [cocuring, scn, jointgan], ids=lambda method: method.__name__)
def test_the_order_follows_the_seed(method, tiny, tmp_path, monkeypatch):
    orders, honest = [], common.Loader.epoch

    def epoch(self, *arguments, **options):
        batches = list(honest(self, *arguments, **options))
        orders.append(torch.cat([index for _, index in batches]))
        return iter(batches)

    monkeypatch.setattr(common.Loader, "epoch", epoch)
    tiny += ["--noise-seed", "1", "--epochs", "1", *(["--width", "0.02"] if method is jointgan else [])]
    for name, seed in zip("abc", "112"):
        assert method.main([*tiny, "--seed", seed, "--out", str(tmp_path), "--name", name]) == 0
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


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
train, end_epoch = sys.argv[1:], runs.Run.end_epoch


def end_and_stop(*arguments):
    end_epoch(*arguments)
    raise KeyboardInterrupt


runs.Run.end_epoch = end_and_stop
assert my_method.main(train) == 130
runs.Run.end_epoch = end_epoch
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
    small = ["--width", "0.02"] if method == "jointgan" else []
    train = ["--limit", "24", "--epochs", "2", "--batch-size", "12", "--size", "32", "--name", "mine", *small]
    (tmp_path / "driver.py").write_text(DRIVER)
    out = run(tmp_path, "driver.py", *train)
    assert "mine-on-toy" in out and (tmp_path / "runs" / "mine-predictions" / "predictions.csv").exists()
    assert len((tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()) == 2
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
