"""How fast each method trains, what the data path costs, and what each part of it is worth.

    python benchmarks/throughput.py --quick           # all sections, small: under 2 minutes on 2 cores
    python benchmarks/throughput.py                   # all sections: hours on 2 cores, minutes on a GPU
    python benchmarks/throughput.py --only methods --methods scn --sizes 224 --batch-sizes 256
    python benchmarks/throughput.py --write           # only write the tables of docs/speed.md and the pictures anew

Data are photographs made here, as many and as large as RAF-DB's: JPEGs of toy faces, 100 pixels. A script's own main is
called up to its first epoch; then its own train_one_epoch is timed with batches from three sources. "loader": the
project's loader, which augments. "synthetic": one random batch that lies on the device. "reference": in the style of
the published codes, a DataLoader with workers that decode, resize and augment one image at a time with Pillow, for
networks in float32 and PyTorch's own memory layout, an optimiser that is not fused, and one host synchronisation a
step.

Kinds that are compared take turns. Reported are medians over the rounds, medians of the ratios within a round, and as
their noise the range of those ratios, that of the first kind to itself ("again") among them. In each measurement the
first step is not timed.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import functools
import gc
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import toyfaces  # noqa: E402 - found through the line above
from support.augmentation import augment  # noqa: E402
from support.datasets import read_index  # noqa: E402
from support.decoding import decode  # noqa: E402
from support.distributed import reports_errors  # noqa: E402
from support.figures import new_figure  # noqa: E402
from support.runs import Parser, number  # noqa: E402

import common  # noqa: E402
from common import UserError  # noqa: E402

RESULTS, DOCS = ROOT / "benchmarks" / "results" / "speed", ROOT / "docs"
METHODS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef train_one_epoch(" in path.read_text())
SECTIONS = ("loaders", "methods", "switches", "batches", "growth", "command", "precision", "peers")
FACES, PIXELS = 12271, 100  # as RAF-DB's training set


# ----------------------------------------------------------------------------------------------------------------------
# Photographs, and their batches in three ways
# ----------------------------------------------------------------------------------------------------------------------


def make_photographs(root: Path, count: int) -> None:
    """RAF-DB's layout with `count` training and 64 test images: at most 500 different toy faces, repeated."""
    folder, lines = root / "Image" / "aligned", []
    folder.mkdir(parents=True)
    (root / "EmoLabel").mkdir()
    files = []
    for i in range(min(count, 500)):
        face, label, _ = toyfaces.draw_face("train", i, size=PIXELS)
        buffer = io.BytesIO()
        Image.fromarray(face).save(buffer, "JPEG", quality=95)
        files.append((buffer.getvalue(), label + 1))
    for name, i in [*((f"train_{i:05d}", i) for i in range(count)), *((f"test_{i:04d}", i) for i in range(64))]:
        content, label = files[i % len(files)]
        (folder / f"{name}_aligned.jpg").write_bytes(content)
        lines.append(f"{name}.jpg {label}\n")
    (root / "EmoLabel" / "list_patition_label.txt").write_text("".join(lines))


class Single(torch.utils.data.Dataset):
    """One image at a time: opened by open_one(i), transformed; a list of transforms makes as many views."""

    def __init__(self, count: int, open_one, transforms: list):
        self.count, self.open_one, self.transforms = count, open_one, transforms

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        image = self.open_one(i)
        views = tuple(transform(image) for transform in self.transforms)
        return views if len(views) > 1 else views[0], i


def single_transforms(loader: common.Loader) -> list:
    """What published codes do in a worker: resize, flip, jitter; with two views RandAugment in the second."""
    size, mean, std = (loader.images.to_input.keywords[key] for key in ("size", "mean", "std"))
    end = [T.ToTensor(), T.Normalize(mean, std)]
    start = [T.Resize((size, size)), T.RandomHorizontalFlip()]
    if loader.strong is None:
        return [T.Compose([*start, T.ColorJitter(0.2, 0.2, 0.2), *end])]
    return [T.Compose([*start, T.RandomCrop(size, 4), *more, *end]) for more in ([], [T.RandAugment(2, 10)])]


WORKERS = min(os.cpu_count(), 16)
PREPARED = 2 * WORKERS  # batches that they have ready while nobody asks: these cost no time, and are not timed


def worker_batches(dataset: Single, batch_size: int, device):
    """Batches of a DataLoader on the device, in random order, without end."""
    order = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=2**40)
    how = dict(num_workers=WORKERS, pin_memory=device.type == "cuda", prefetch_factor=2)
    if os.name == "posix":  # other ways to start a process cannot pass a function on
        how["multiprocessing_context"] = "fork"
    for views, index in torch.utils.data.DataLoader(dataset, batch_size, sampler=order, **how):
        if isinstance(views, list):
            yield [view.to(device, non_blocking=True) for view in views], index
        else:
            yield views.to(device, non_blocking=True), index


class Undecoded:
    """Images that are decoded again for each batch, by threads; stands for common.Images in a Loader."""

    def __init__(self, images: common.Images, sources: list):
        self.device, self.to_input, self.sources = images.device, images.to_input, sources
        self.size = (images.images.shape[-1], images.images.shape[-2])

    def __len__(self):
        return len(self.sources)

    def batches(self, order: Tensor, slices: list[slice]):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            def read(part):
                images = pool.map(lambda i: decode(self.sources[i], self.size, False), order[part].tolist())
                return torch.from_numpy(np.stack(list(images)))

            for part, images in zip(slices, common.read_ahead(read, slices)):
                yield part, order[part], images.to(self.device)


# ----------------------------------------------------------------------------------------------------------------------
# A script at the start of its first epoch
# ----------------------------------------------------------------------------------------------------------------------


class Begun(BaseException):
    """Ends a script's main where its first epoch begins."""


class Task:
    """A script's train_one_epoch with the arguments that its main gives it, to be run with any batches."""

    def __init__(self, method: str, argv: list[str], reference: bool = False, layout=None, fused: bool = True):
        """reference: networks in PyTorch's memory layout, an optimiser that is not fused, a synchronisation a step."""
        script, loaders, honest = importlib.import_module(method), [], common.Loader.__init__
        self.train, self.reference = script.train_one_epoch, reference

        def begin(*args, **options):
            self.args, self.options = args, options
            raise Begun

        def remember(loader, *args, **options):
            honest(loader, *args, **options)
            loaders.append(loader)

        script.train_one_epoch, common.Loader.__init__ = begin, remember
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                status = script.main(argv)
            raise UserError(f"{method}.py {' '.join(argv)} ended before its first epoch, with status {status}")
        except Begun:
            pass
        finally:
            script.train_one_epoch, common.Loader.__init__ = self.train, honest
        self.loader, self.flags = loaders[0], next(a for a in self.args if isinstance(a, argparse.Namespace))
        self.device, self.batch_size = self.loader.images.device, self.flags.batch_size
        parts = [part for a in self.args for part in (a if isinstance(a, (list, tuple)) else [a])]
        self.optimizers = [part for part in parts if isinstance(part, torch.optim.Optimizer)]
        for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
            group["lr"] = 1e-6  # random images would drive the weights to infinity
            group["fused"] = True if fused and not reference else None  # None: as PyTorch chooses
        self.layout = torch.contiguous_format if reference else layout
        if self.layout:
            for network in (part for part in parts if isinstance(part, nn.Module)):
                network.to(memory_format=self.layout)

    def run(self, batches) -> None:
        """One epoch over the batches; ends with the scalars on the host."""
        self.train(*(batches if hasattr(a, "gi_frame") else a for a in self.args), **self.options)

    def own_batches(self, images=None):
        """From the project's loader, epoch after epoch; images: in the place of its own."""
        kept, self.loader.images = self.loader.images, images or self.loader.images
        try:
            for epoch in itertools.count(1):
                yield from self.loader.epoch(epoch)
        finally:
            self.loader.images = kept

    def synthetic_batches(self):
        """One random batch on the device, again and again."""
        x, index = next(self.own_batches())
        index = index[: self.batch_size]

        def noise(view):
            return torch.randn_like(view[: self.batch_size]).contiguous(memory_format=torch.channels_last)

        x = tuple(map(noise, x)) if isinstance(x, tuple) else noise(x)
        while True:
            yield x, index

    def reference_batches(self, sources: list):
        single = Single(len(self.loader.images), lambda i: Image.open(sources[i]).convert("RGB"),
                        single_transforms(self.loader))
        return worker_batches(single, self.batch_size, self.device)

    def measure(self, batches, steps: int, skip: int = 0) -> tuple[float, int]:
        """Seconds and images of `steps` steps, after one that is not timed; skip: batches in between, not used."""
        began, images, weight = 0.0, 0, self.optimizers[0].param_groups[0]["params"][0]

        def timed():
            nonlocal began, images
            for k, (x, index) in enumerate(itertools.islice(batches, steps + 1)):
                if self.layout:
                    x = tuple(v.contiguous(memory_format=self.layout) for v in x) if isinstance(x, (tuple, list)) else (
                        x.contiguous(memory_format=self.layout))
                yield x, index
                if self.reference:
                    weight.flatten()[0].item()
                if k == 0:
                    collections.deque(itertools.islice(batches, skip), 0)
                    began = wait(self.device)
                else:
                    images += len(index)

        self.run(timed())
        seconds = wait(self.device) - began
        batches.close()
        return seconds, images


def stacked(networks):
    """x -> logits of all networks (K, N, C), computed as one: torch.func's vmap over their stacked parameters."""
    parameters, buffers = torch.func.stack_module_state(list(networks))
    one = copy.deepcopy(networks[0])

    def forward(parameters, buffers, x):
        return torch.func.functional_call(one, (parameters, buffers), (x,))

    return functools.partial(torch.vmap(forward, (0, 0, None)), parameters, buffers)


def in_streams(networks, streams: list, x: Tensor) -> list[Tensor]:
    """The logits of each network, computed in CUDA streams of their own; backward runs in the same streams."""
    current, logits = torch.cuda.current_stream(x.device), []
    for network, stream in zip(networks, streams):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            logits.append(network(x))
    for stream in streams:
        current.wait_stream(stream)
    return logits


def wait(device) -> float:
    """The time, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def compare(kinds: dict, rounds: int) -> dict:
    """Let the kinds, functions that return seconds and images, take turns; name -> numbers, the ratio to the first.

    ratio: time for an image over that of the first kind in the same round: median, lowest and highest.
    """
    first = next(iter(kinds))
    kinds = {**kinds, f"{first}, again": kinds[first]}
    times, order = {name: [] for name in kinds}, list(kinds)
    for turn in range(rounds + 1):
        for name in order:
            seconds, images = kinds[name]()
            if turn:  # the first round warms up
                times[name].append(seconds / images)
        order.reverse()
    result = {}
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times[first]))
        per_image = statistics.median(values)
        result[name] = {"images/s": 1 / per_image, "ratio": [statistics.median(ratios), ratios[0], ratios[-1]]}
    return result


class Peak:
    """`with Peak(device) as peak`: then peak.bytes, the most memory that the block took beyond what was taken before.

    Of the device; on the CPU that of this process, on Linux (elsewhere 0).
    """

    def __init__(self, device):
        self.device, self.status = device, Path("/proc/self/status")

    def process(self, key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", self.status.read_text())[1]) if self.status.exists() else 0

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            if self.status.exists():
                with contextlib.suppress(AttributeError, OSError):  # freed memory that is kept would count as taken
                    ctypes.CDLL(None).malloc_trim(0)
                with contextlib.suppress(OSError):  # the peak starts anew; not in every container
                    Path("/proc/self/clear_refs").write_text("5")
            self.before = self.process("VmRSS")
        return self

    def __exit__(self, *error):
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else self.process("VmHWM")
        self.bytes = max(peak - self.before, 0)


def matrix_rate(device, size: int) -> float:
    """Floating-point operations a second of a product of square matrices, bf16 where it is native; the best of ten."""
    kind = torch.bfloat16 if common.has_bf16(device) else torch.float32
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    best = math.inf
    for _ in range(10):
        began = wait(device)
        a @ b
        best = min(best, wait(device) - began)
    return 2 * size**3 / best


def operations(task: Task) -> float:
    """Floating-point operations of training on one image, of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        task.run(itertools.islice(task.synthetic_batches(), 1))
    return counter.get_total_flops() / task.batch_size


class Bench:
    """The sections; each returns a list of rows, plain values by name."""

    def __init__(self, options, folder: Path):
        self.options, self.folder, self.device = options, folder, common.find_device(options.device)
        self.rate, self.made = matrix_rate(self.device, 8192 if self.device.type == "cuda" else 1024), 0

    def task(self, method: str, size: int, batch_size: int, *flags, **settings) -> Task:
        """images: no more than the steps need, for some methods predict on all of them first."""
        if method == "jointgan":  # it needs a power of two
            size = max(64, 1 << (size - 1).bit_length())
            flags = [*flags, "--width", "0.25"] if self.options.quick else flags
        count = min(self.options.images, batch_size * (self.options.steps + 3))
        argv = [*self.data(count), "--size", str(size), "--batch-size", str(batch_size), "--warm-up", "0",
                "--device", self.options.device, "--out", str(self.folder / "runs"), "--name", f"run{self.made}",
                "--no-oversample", *flags]
        self.made += 1
        task = Task(method, argv, **settings)
        index = read_index(task.flags, "train")
        task.sources = index.sources[: len(task.loader.images)]
        return task

    def data(self, count: int) -> list[str]:
        """The options of a data set of so many photographs, which are made when they are first asked for."""
        root = self.folder / f"photographs{count}"
        if not root.exists():
            make_photographs(root, count)
        return ["--data", "raf", "--root", str(root), "--cache", str(self.folder / "cache")]

    def sources_of(self, task: Task, reference: Task) -> dict:
        """The three kinds of a method."""
        steps = self.options.steps
        return {
            "synthetic": lambda: task.measure(task.synthetic_batches(), steps),
            "loader": lambda: task.measure(task.own_batches(), steps),
            "reference": lambda: reference.measure(
                reference.reference_batches(reference.sources), max(steps, PREPARED), PREPARED),
        }

    def methods(self):
        for size, method in itertools.product(self.options.sizes, self.options.methods):
            try:
                row = self.method(size, method)
            except torch.OutOfMemoryError:
                print(f"{method}.py, {size} px: out of memory, left out")
                continue
            if row is not None:
                yield row

    def method(self, size: int, method: str) -> dict | None:
        """A row of `methods`; None for a step that takes too long."""
        batch_size = self.options.batch_sizes[0]
        with Peak(self.device) as peak:
            task = self.task(method, size, batch_size)
            seconds, _ = task.measure(task.own_batches(), 1)
        if seconds > self.options.longest:
            print(f"{method}.py, {task.flags.size} px: {seconds:.0f} s a step, left out (--longest)")
            return None
        reference = self.task(method, size, batch_size, "--precision", "fp32", reference=True)
        row = {"method": method, "size": task.flags.size, "batch": batch_size, "peak": peak.bytes}
        row |= {"kinds": compare(self.sources_of(task, reference), self.options.rounds)}
        return row | {"share": operations(task) * row["kinds"]["loader"]["images/s"] / self.rate}

    def loaders(self):
        """The data path alone: batches that nobody trains on."""
        for size in self.options.sizes:
            task = self.task("scn", size, self.options.batch_sizes[0])

            def consume(make, steps, skip=0, task=task):
                batches, images = make(), 0
                collections.deque(itertools.islice(batches, 1 + skip), 0)
                began = wait(self.device)
                for _, index in itertools.islice(batches, steps):
                    images += len(index)
                seconds = wait(self.device) - began
                batches.close()
                return seconds, images

            kinds = {
                "loader": lambda task=task, consume=consume: consume(task.own_batches, self.options.steps),
                "reference": lambda task=task, consume=consume: consume(
                    lambda: task.reference_batches(task.sources), max(self.options.steps, PREPARED), PREPARED),
            }
            yield {"size": size, "batch": task.batch_size, "kinds": compare(kinds, self.options.rounds)}

    def switches(self):
        """One part of the data path or of the step changed at a time; ratio: what that does to the time of a step."""
        size, batch_size, steps = self.options.sizes[-1], self.options.batch_sizes[0], self.options.steps
        task = self.task("scn", size, batch_size)
        plain, slow = self.task("scn", size, batch_size, "--precision", "fp32"), torch.contiguous_format
        layout = self.task("scn", size, batch_size, layout=slow)
        single = self.task("scn", size, batch_size, fused=False)
        undecoded = Undecoded(task.loader.images, task.sources)
        keywords = task.loader.images.to_input.keywords
        mapped = common.Images(task.loader.images.images.cpu(), size, self.device, keywords["mean"], keywords["std"], 0)
        arrays = task.loader.images.images.permute(0, 2, 3, 1).cpu().numpy()
        one_by_one = Single(len(arrays), lambda i: Image.fromarray(arrays[i]), single_transforms(task.loader))
        kinds = {
            "as it is": lambda: task.measure(task.own_batches(), steps),
            "without the cache: decoded for each batch": lambda: task.measure(task.own_batches(undecoded), steps),
            "images streamed to the device": lambda: task.measure(task.own_batches(mapped), steps),
            "augmented one by one in workers": lambda: task.measure(
                worker_batches(one_by_one, batch_size, self.device), max(steps, PREPARED), PREPARED),
            "float32": lambda: plain.measure(plain.own_batches(), steps),
            "PyTorch's own memory layout": lambda: layout.measure(layout.own_batches(), steps),
            "optimiser not fused": lambda: single.measure(single.own_batches(), steps),
        }
        if self.options.compile:
            compiled = self.task("scn", size, batch_size, "--compile")
            kinds["compiled"] = lambda: compiled.measure(compiled.own_batches(), steps)
        yield {"method": "scn", "size": size, "batch": batch_size, "kinds": compare(kinds, self.options.rounds)}

    def batches(self):
        """Images a second and memory against the batch size; a size that the memory does not hold ends the row."""
        for size in self.options.sizes:
            for batch_size in self.options.batch_sizes[1:]:
                task = kinds = None  # frees those of the row before
                try:
                    with Peak(self.device) as peak:
                        task = self.task("scn", size, batch_size)
                        task.measure(task.own_batches(), 1)
                    kinds = {"loader": lambda task=task: task.measure(task.own_batches(), self.options.steps)}
                    found = compare(kinds, self.options.rounds)["loader"]
                except torch.OutOfMemoryError:
                    break
                yield {"size": size, "batch": batch_size, "images/s": found["images/s"], "peak": peak.bytes}

    def precision(self):
        """bf16 beside float32 for every network that a script can train; nothing where bf16 is not native."""
        size, batch_size, steps = self.options.sizes[0], self.options.batch_sizes[0], self.options.steps
        choices = [("scn", max(size, getattr(backbone, "size", 0)), ("--backbone", name))
                   for name, backbone in common.BACKBONES.items()] + [("jointgan", size, ())]
        for method, pixels, flags in choices if common.has_bf16(self.device) else []:
            tasks = [self.task(method, pixels, batch_size, *flags, "--precision", kind) for kind in ("fp32", "bf16")]
            kinds = {kind: lambda task=task: task.measure(task.own_batches(), steps)
                     for kind, task in zip(("float32", "bf16"), tasks)}
            row = {"command": " ".join([f"{method}.py", *flags]), "size": tasks[0].flags.size, "batch": batch_size}
            yield row | {"kinds": compare(kinds, self.options.rounds)}

    def peers(self):
        """Forward and backward through the two networks of cocuring.py, as the script does it and as one network."""
        for size in self.options.sizes:
            task = self.task("cocuring", size, self.options.batch_sizes[0])
            networks = next(part for part in task.args if isinstance(part, nn.ModuleList))
            x, _ = next(task.synthetic_batches())
            kinds = {"one after the other": lambda x: [network(x) for network in networks],
                     "stacked, torch.func": stacked(networks)}
            if self.device.type == "cuda":
                streams = [torch.cuda.Stream(self.device) for _ in networks]
                kinds["in two streams"] = functools.partial(in_streams, networks, streams)
            kinds = {name: functools.partial(self.forward_backward, task, x, kind) for name, kind in kinds.items()}
            yield {"size": size, "batch": task.batch_size, "kinds": compare(kinds, self.options.rounds)}

    def forward_backward(self, task: Task, x: Tensor, forward) -> tuple[float, int]:
        """Seconds and images of the timed steps; forward(x) -> the logits of each network."""
        for step in range(self.options.steps + 1):
            if step <= 1:  # the first step is not timed
                began = wait(self.device)
            with common.autocast(self.device, task.flags.precision):
                logits = forward(x)
            sum(z.square().mean() for z in logits).backward()
        return wait(self.device) - began, self.options.steps * len(x)

    def growth(self):
        """An epoch of all but the network: order, batches, augmentation, relabelling, metrics, prediction."""
        size, device = 48, self.device
        faces = torch.stack([torch.from_numpy(toyfaces.draw_face("train", i)[0]) for i in range(100)])
        faces = faces.permute(0, 3, 1, 2)
        for count in self.options.growth:
            with Peak(device) as peak:
                images = common.Images(faces.repeat(-(-count // 100), 1, 1, 1)[:count].contiguous(), size, device)
                loader = common.Loader(images, 128, 1, functools.partial(augment, crop=4, jitter=0.2))
                labels, network = torch.zeros(count, dtype=torch.int64, device=device), nn.AdaptiveAvgPool2d(1)
                seconds = []
                for epoch in (1, 2, 3):
                    began, means = wait(device), common.Means()
                    for x, index in loader.epoch(epoch, balance=labels):
                        index = index.to(device, non_blocking=True)
                        new = (network(x)[:, :, 0, 0] > 0).sum(1)
                        means.add("relabel", changed=common.assign(labels, index, new))
                    means.result()
                    torch.cat([network(x) for x in images])
                    seconds.append(wait(device) - began)
            yield {"images": count, "seconds": statistics.median(seconds), "peak": peak.bytes}

    def command(self):
        """A whole command, from its start to its last file: decoding, training, testing, pictures."""
        gpu = self.device.type == "cuda"
        flags = ["--size", "224", "--epochs", "40"] if gpu else ["--size", "48", "--epochs", "2"]
        flags = ["--size", "48", "--epochs", "1", "--batch-size", "32"] if self.options.quick else flags
        flags += ["--device", self.options.device, "--name", "command"]
        data = [*self.data(self.options.images), "--out", str(self.folder / "runs")]
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        began = time.perf_counter()
        command = [sys.executable, str(ROOT / "cocuring.py"), *data, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise UserError(f"cocuring.py {' '.join(flags)}: {done.stderr.strip()}")
        lines = (self.folder / "runs" / "command" / "metrics.jsonl").read_text().splitlines()
        epochs = sum(json.loads(line)["seconds"] for line in lines)
        command = f"cocuring.py --data raf {' '.join(flags[:-4])}"
        yield {"command": command, "images": self.options.images, "seconds": seconds, "epochs": epochs}


# ----------------------------------------------------------------------------------------------------------------------
# What is written
# ----------------------------------------------------------------------------------------------------------------------


def machine(device) -> dict:
    """What the numbers belong to; other processes show in the load, the mean number of them that ran."""
    about = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = re.findall(r"model name\s*: (.*)", about) or [platform.processor() or platform.machine()]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": gpu, "cpu": names[0], "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "bf16": common.has_bf16(device), "torch": torch.__version__, "load": round(os.getloadavg()[0], 1)}


def table(header: str, rows: list[list[str]]) -> list[str]:
    """A table in Markdown; header: the columns, separated by |."""
    return [f"| {header} |", "|---" * (header.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def times(kind: dict, upside_down: bool = False) -> str:
    """The ratio of a kind, with its range."""
    middle, low, high = (1 / r for r in kind["ratio"]) if upside_down else kind["ratio"]
    low, high = sorted((low, high))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def page_of(record: dict) -> list[str]:
    """The lines of docs/speed.md for one machine."""
    about, sections = record["machine"], record["sections"]
    where = f"{about['gpu'] or about['cpu']}, {about['cores']} cores"
    lines = [f"### {where}: {', '.join(sections)}", "",
             f"torch {about['torch']}, {'bf16' if about['bf16'] else 'float32'}, {about['threads']} threads, "
             f"{record['rounds']} rounds of {record['steps']} steps, load at the start "
             f"{about['load']}{', `--quick`' if record['quick'] else ''}. "
             f"{record['rate'] / 1e12:.2f} TFLOP/s in a product "
             "of matrices.", ""]

    def speed(kind):
        return f"{kind['images/s']:,.0f}"

    if rows := sections.get("methods"):
        lines += table("method | pixels | batch | images/s | ms a step | loader / synthetic | again | "
                       "reference, images/s |"
                       " times as fast | memory | of the matrix rate", [
            [r["method"], str(r["size"]), str(r["batch"]), speed(k["loader"]),
             f"{1000 * r['batch'] / k['loader']['images/s']:.1f}", times(k["loader"]), times(k["synthetic, again"]),
             speed(k["reference"]), f"{k['loader']['images/s'] / k['reference']['images/s']:.2f}",
             f"{r['peak'] / 2**30:.2f} GiB", f"{r['share']:.0%}"] for r in rows for k in [r["kinds"]]])
    if rows := sections.get("loaders"):
        lines += table("data path alone, pixels | images/s | reference, images/s | times as fast | again", [
            [f"{PIXELS} to {r['size']}", speed(k["loader"]), speed(k["reference"]), times(k["reference"]),
             times(k["loader, again"])] for r in rows for k in [r["kinds"]]])
    for r in sections.get("switches", []):
        lines += table(f"{r['method']}.py, {r['size']} px, batch {r['batch']} | images/s | time of a step, times", [
            [name, speed(kind), times(kind)] for name, kind in r["kinds"].items()])
    if rows := sections.get("batches"):
        lines += table("scn.py, pixels | batch | images/s | memory", [
            [str(r["size"]), str(r["batch"]), speed(r), f"{r['peak'] / 2**30:.2f} GiB"] for r in rows])
    if rows := sections.get("growth"):
        lines += table("images | seconds an epoch, without the network | microseconds an image | memory", [
            [f"{r['images']:,}", f"{r['seconds']:.2f}", f"{1e6 * r['seconds'] / r['images']:.0f}",
             f"{r['peak'] / 2**30:.2f} GiB"] for r in rows])
    if rows := sections.get("precision"):
        lines += table("network | pixels | batch | float32, images/s | bf16, images/s | times as fast | again", [
            [f"`{r['command']}`", str(r["size"]), str(r["batch"]), speed(k["float32"]), speed(k["bf16"]),
             times(k["bf16"], True), times(k["float32, again"])] for r in rows for k in [r["kinds"]]])
    if rows := sections.get("peers"):
        lines += table("two networks, pixels | batch | kind | images/s | time of forward and backward, times", [
            [str(r["size"]), str(r["batch"]), name, speed(kind), times(kind)]
            for r in rows for name, kind in r["kinds"].items()])
    for r in sections.get("command", []):
        lines += [f"`{r['command']}`, {r['images']:,} images: {r['seconds']:.0f} s from start to end, "
                  f"of which the epochs "
                  f"take {r['epochs']:.0f} s.", ""]
    return lines


def draw_methods(axes, rows: list[dict]) -> None:
    for k, (kind, colour) in enumerate((("reference", "grey"), ("loader", "C0"), ("synthetic", "C1"))):
        places = [i + (k - 1) * 0.27 for i in range(len(rows))]
        axes.barh(places, [r["kinds"][kind]["images/s"] for r in rows], 0.27, label=kind, color=colour)
    axes.set_yticks(range(len(rows)), [f"{r['method']}, {r['size']} px" for r in rows], fontsize=8)
    axes.set(xlabel="training images/s")


def draw_batches(axes, rows: list[dict]) -> None:
    for size in dict.fromkeys(r["size"] for r in rows):
        points = [(r["batch"], r["images/s"]) for r in rows if r["size"] == size]
        axes.plot(*zip(*points), "o-", label=f"{size} px")
    sizes = sorted({r["batch"] for r in rows})
    axes.set(xlabel="batch size", ylabel="training images/s, scn.py", xscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)


def draw_switches(axes, rows: list[dict]) -> None:
    for r in rows:
        names = list(r["kinds"])
        axes.barh(names, [r["kinds"][name]["ratio"][0] for name in names], color="C0")
        axes.set(xlabel=f"time of a step, {r['method']}.py, {r['size']} px")
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()


def draw_growth(axes, rows: list[dict]) -> None:
    counts = [r["images"] for r in rows]
    axes.plot(counts, [r["seconds"] for r in rows], "o-", label="seconds an epoch, without the network")
    axes.plot(counts, [r["peak"] / 2**30 for r in rows], "s--", label="memory, GiB")
    axes.set(xlabel="training images")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(bottom=0)


PANELS = {"methods": draw_methods, "batches": draw_batches, "switches": draw_switches, "growth": draw_growth}


def picture_of(record: dict):
    """A panel for each section that has one and was measured, two in a row."""
    sections, about = record["sections"], record["machine"]
    drawn = [name for name in PANELS if sections.get(name)]
    rows, columns = max(1, -(-len(drawn) // 2)), min(2, max(1, len(drawn)))
    figure = new_figure(6 * columns, 4 * rows, layout="constrained")
    figure.suptitle(f"{about['gpu'] or about['cpu']}, {about['cores']} cores, torch {about['torch']}")
    for k, name in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, k)
        PANELS[name](axes, sections[name])
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def write_docs() -> None:
    """Put the tables of all records between the two marks in docs/speed.md, and draw a picture of each."""
    page = DOCS / "speed.md"
    before, mark, rest = page.read_text().partition("<!-- numbers -->\n")
    _, end, after = rest.partition("<!-- end of numbers -->\n")
    if not (mark and end):
        raise UserError(f"{page}: has no two lines <!-- numbers --> and <!-- end of numbers -->")
    lines = [""]
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        lines += page_of(record)
        if any(record["sections"].get(name) for name in PANELS):
            picture_of(record).savefig(DOCS / "figures" / f"speed-{path.stem}.png", dpi=80)
            lines += [f"![{', '.join(record['sections'])}](figures/speed-{path.stem}.png)", ""]
    page.write_text(before + mark + "\n".join(lines) + "\n" + end + after)


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add, positive = parser.add_argument, number(int, 1)
    add("--quick", action="store_true", help="small and few measurements: shows that it runs, and the orders of size")
    add("--only", nargs="+", choices=SECTIONS, help="sections (default: all; quick: all but precision and peers)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="scripts")
    add("--sizes", nargs="+", type=positive, help="pixels (default: 48 112 224; quick: 48)")
    add("--batch-sizes", nargs="+", type=number(int, 2), help="the first is that of all sections but `batches`, which "
        "takes the others (default: 64, on a GPU 256, then 32 to 1024; quick: 32, then 16 32 64)")
    add("--steps", type=positive, help="timed steps of a measurement (default: 8; quick: 2)")
    add("--rounds", type=positive, help="how often all kinds take their turns (default: 5; quick: 2)")
    add("--images", type=number(int, 64), help=f"photographs (default: {FACES}, as RAF-DB; quick: 256)")
    add("--growth", nargs="+", type=number(int, 128), help="numbers of images in `growth` (default: 1000 to 100000)")
    add("--longest", type=number(float, 0), default=20, help="leave methods out whose step takes longer, in seconds")
    add("--compile", action="store_true", help="measure torch.compile too: minutes")
    add("--device", default="auto", help="cpu, cuda; auto: cuda if there is one")
    add("--out", default="speed", help="name of the .json and the .png that are written")
    add("--write", action="store_true", help="measure nothing: put all records of benchmarks/results/speed/ into "
        "docs/speed.md")
    args = parser.parse_args(argv)
    quick, gpu = args.quick, args.device != "cpu" and torch.cuda.is_available()
    for key, small, full in (
        ("only", SECTIONS[:-2], SECTIONS), ("sizes", [48], [48, 112, 224]), ("steps", 2, 8), ("rounds", 2, 5),
        ("images", 256, FACES),
        ("batch_sizes", [32, 16, 32, 64], [256 if gpu else 64, 32, 64, 128, 256, 512, 1024]),
        ("growth", [200, 400, 800], [1000, 3000, 10000, 30000, 100000]),
    ):
        setattr(args, key, getattr(args, key) or (small if quick else full))
    if (need := 3 * max(args.batch_sizes)) > args.images:
        parser.error(f"--images {args.images}: a batch of {max(args.batch_sizes)} needs {need} or more")
    return args


@reports_errors
def main(argv=None) -> int:
    options = parse_args(argv)
    if options.write:
        write_docs()
        return 0

    def write(record: dict) -> None:
        text = json.dumps(record, indent=1) + "\n"
        common.write_atomically(f"{options.out}.json", lambda path: path.write_text(text))

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        record = {"machine": machine(bench.device), "rate": bench.rate, "quick": options.quick, "sections": {}}
        record |= {"rounds": options.rounds, "steps": options.steps}
        for section in options.only:
            began, rows = time.perf_counter(), record["sections"].setdefault(section, [])
            write(record)  # an error in hours of measuring loses nothing, and no record of before passes for this one
            try:
                for row in getattr(bench, section)():
                    rows.append(row)
                    write(record)
                    of = [str(row[key]) for key in ("method", "command", "size", "batch", "images") if key in row]
                    print(f"{section}, {' '.join(of)}: after {time.perf_counter() - began:.0f} s", flush=True)
            except torch.OutOfMemoryError:
                print(f"{section}: out of memory, the rest of it is left out")
    print("\n" + "\n".join(page_of(record)))
    out = Path(options.out)
    picture_of(record).savefig(f"{out}.png", dpi=80)
    print(f"{out}.json and {out}.png written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
