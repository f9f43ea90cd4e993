"""Data and backbone utilities: device and precision, backbones and their weights, batches, means over an epoch.

Nothing of any method is here, and nothing of the project is imported: this file can be copied beside a script.
All randomness is a function of (seed, epoch, what it is for), never of a state that is carried along: an epoch draws
the same numbers after a resumption; order and augmentation also on another device and in another batch split. Letters
in shapes: N samples, C classes or channels (said where), H and W pixels, B the batch.
"""

import collections
import functools
import hashlib
import io
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm


class UserError(ValueError):
    """Bad input. Scripts print it as one line and exit with status 2."""


def seed_of(*key) -> int:
    """A seed in [0, 2^63) that is a function of `key` alone (any values with a stable repr)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generator_of(*key) -> torch.Generator:
    """A CPU generator seeded by `key`."""
    return torch.Generator().manual_seed(seed_of(*key))


class Processes:
    """The processes of a training run: this one alone. support/distributed.py has those that torchrun starts."""

    rank, count = 0, 1
    part = slice(None)  # the places in the epoch's global order that this process has in the current step
    share = 1.0  # of the samples of the current step, those of this process

    def sum(self, values: Tensor) -> Tensor:
        return values

    def assigned(self, values: Tensor, index: Tensor, last: Tensor) -> None:
        """values[index] were assigned; `last` decided, a place in the batch, or -1: see `assign`."""

    def end_epoch(self) -> None:
        """Make equal in all processes what each has changed by itself in the epoch."""


processes = Processes()


# ----------------------------------------------------------------------------------------------------------------------
# Device, backbones, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device of --device ("auto": cuda if there is one); UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # meta has no numbers, mps no float64: see `Means`
        return device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        raise UserError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from None


@functools.lru_cache
def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 natively."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = Path("/proc/cpuinfo").read_text() if device.type == "cpu" and Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device, precision: str):
    """The context in which networks run: bf16 autocast, or nothing for fp32. Losses belong outside."""
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


# Networks that end in a layer `fc`.
BACKBONES = {"resnet18": torchvision.models.resnet18, "resnet50": torchvision.models.resnet50}
PRETRAINED = {}  # names and suffixes of --pretrained in a format of a backbone's own -> that backbone


def backbone_of(pretrained: str) -> str | None:
    """The backbone that --pretrained belongs to, if it is in a format of that backbone's own."""
    return PRETRAINED.get(pretrained) or PRETRAINED.get(Path(pretrained).suffix)


def make_backbone(args, inputs: Tensor | None = None) -> tuple[nn.Module, int]:
    """The network of --backbone without its last layer, with the weights of --pretrained; the width of its features.

    inputs: network inputs (B, 3, H, W) of training images, for weights that need the statistics of their data.
    """
    own = backbone_of(args.pretrained)
    if own not in (None, args.backbone):
        raise UserError(f"--pretrained {args.pretrained} belongs to --backbone {own}, not to {args.backbone}")
    if args.pretrained == "imagenet":
        try:
            backbone = BACKBONES[args.backbone](weights="IMAGENET1K_V1")
        except Exception as error:  # no such weights, no network, a damaged file in torch's cache
            raise UserError(f"--pretrained imagenet for {args.backbone}: not there, or damaged ({error!r}); downloads "
                            f"are kept in {torch.hub.get_dir()}/checkpoints") from None
    else:
        backbone = BACKBONES[args.backbone]()
    if args.pretrained not in ("none", "imagenet"):
        count = backbone.load_pretrained(args.pretrained, inputs) if own else load_pretrained(backbone, args.pretrained)
        print(f"{args.pretrained}: {count} tensors loaded")
    width, backbone.fc = backbone.fc.in_features, nn.Identity()
    return backbone, width


def load_pretrained(model: nn.Module, path) -> int:
    """Load the backbone of a checkpoint into `model`; returns the number of tensors loaded.

    Read are torchvision's state dicts, also under "state_dict", "model_state_dict" or "model", and this project's
    model.pt (its first network). The prefixes "module." and "backbone." are stripped, classification layers dropped.
    Every backbone tensor of the model must be there in its shape, none left over: otherwise UserError with both sets.
    """
    if Path(path).suffix == ".pkl":
        how = "{k: torch.from_numpy(v) for k, v in pickle.load(open(f, 'rb'), encoding='latin1').items()}"
        raise UserError(f"{path}: a pickle is unsafe; convert it where you trust it: torch.save({how}, 'weights.pth')")
    state = load_checkpoint(path)
    for key in ("state_dict", "model_state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    match state:
        case {"networks": [dict(state), *_]}:  # heads have other names in every method
            state = {key: value for key, value in state.items() if key.startswith("backbone.")}
    heads, found = ("fc.", "feature.", "head.", "classifier."), {}
    for key, value in zip(map(str, state), state.values()):
        while key.startswith(("module.", "backbone.")):
            key = key.split(".", 1)[1]
        if isinstance(value, Tensor) and key and not key.startswith(heads):
            found[key] = value
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(heads)}
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # absent before PyTorch 0.4.1
    wrong = sorted((set(wanted) ^ set(found)) - counters)
    wrong += sorted(key for key in set(wanted) & set(found) if wanted[key].shape != found[key].shape)
    if wrong:
        raise UserError(f"{path}: the weights are of another backbone, {len(wrong)} tensors do not match ({wrong[0]}); "
                        f"the file has: {' '.join(sorted(found)) or '-'}; the network has: {' '.join(sorted(wanted))}")
    model.load_state_dict(model.state_dict() | found)
    return len(found)


def write_atomically(path, write) -> None:
    """Call write(temporary path), then rename it to `path`: a killed process never leaves half a file there."""
    temporary = Path(f"{path}.tmp{int.from_bytes(os.urandom(6), 'big')}")  # in containers all process numbers may be 1
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, **state) -> None:
    """torch.save(state), atomically. In memory first: PyTorch 2.6 does not notice that a disk is full."""
    whole = io.BytesIO()
    torch.save(state, whole)
    write_atomically(path, lambda file: file.write_bytes(whole.getbuffer()))


def load_checkpoint(path) -> dict:
    """The dict in a checkpoint, on the CPU; UserError if it is missing, damaged, or holds more than plain values."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch checks no checksums
            raise ValueError("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises many kinds; its text advises to load unsafe files unsafely
        reason = "it is damaged, or holds more than weights and plain values"
        raise UserError(f"{path}: cannot be loaded as a checkpoint: {reason} ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a dict of weights")
    return state


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as the papers' codes on RAF-DB and FERPlus


@functools.lru_cache
def constant(values: tuple[float, ...], device: torch.device, width: int = 1) -> Tensor:
    """float32 (C, 1, width), channels last, copied to the device once: a copy in every step would wait for a GPU."""
    row = torch.tensor(values, device=device)[None, :, None, None].expand(1, -1, 1, width)
    return row.contiguous(memory_format=torch.channels_last)[0]


def network_input(images: Tensor, size: int, mean=MEAN, std=STD) -> Tensor:
    """Images (B, 1 or 3, H, W), uint8 or float in [0, 255] -> normalised float32 (B, 3, size, size), channels last.

    mean, std: three numbers each, of values in [0, 1]. On a CPU resized images are rounded to 8 bits, as Pillow's are.
    """
    if images.shape[-2:] != (size, size):
        if images.device.type == "cpu":  # PyTorch resizes uint8, channels last, 13 times as fast as float32
            images = images if images.dtype == torch.uint8 else images.round().to(torch.uint8)
            images = images.contiguous(memory_format=torch.channels_last)
        else:
            images = images.float()
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    x = images.to(torch.float32, copy=True).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    # Constants as wide as a row: the loops over a row are then vectorised
    return x.div_(255).sub_(constant(mean, x.device, size)).div_(constant(std, x.device, size))


def batch_slices(count: int, batch_size: int, world: int = 1) -> list[slice]:
    """Slices of range(count), of `batch_size` samples for each of `world` processes.

    A last batch that has less than two samples for each joins the one before it (batch statistics need two).
    """
    if batch_size * world > count:
        each = f"{batch_size} for each of {world} processes" if world > 1 else f"{batch_size}"
        raise UserError(f"--batch-size {each} is larger than the {count} training images")
    starts = list(range(0, count, batch_size * world))
    if len(starts) > 1 and count - starts[-1] < 2 * world:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, starts[1:] + [count])]


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """int64 (N,): an order of N draws in which the classes that occur are equally frequent (to one draw).

    labels: int64 (N,), on the CPU. Within a class every sample is drawn equally often (to one draw), whether the class
    is repeated or cut. Samples of the label -1 belong to no class: each of them is drawn once.
    """
    drawn = [(labels < 0).nonzero().flatten()]
    classes, count = labels[labels >= 0].unique(), int((labels >= 0).sum())
    for k, c in enumerate(classes):
        members = (labels == c).nonzero().flatten()
        quota = count // len(classes) + (k < count % len(classes))
        rounds = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-quota // len(members)))]
        drawn.append(torch.cat(rounds)[:quota])
    return torch.cat(drawn)[torch.randperm(len(labels), generator=generator)]


class Images:
    """The images of a split, uint8 (N, C, H, W), for a device; iterate for unaugmented inputs (B, 3, size, size).

    They are kept on the device when they fit in `share` of its free memory, else streamed to it; share=0: streamed.
    mean, std: see `network_input`.
    """

    def __init__(self, images: Tensor, size: int, device: torch.device, mean=MEAN, std=STD, share: float = 1 / 3):
        self.images, self.size, self.device = images, size, device
        self.to_input = functools.partial(network_input, size=size, mean=mean, std=std)
        self.resident = device.type == "cpu" and share > 0
        if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] * share:
            self.images, self.resident = images.to(device), True

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self):
        count, step = len(self), max(1, min(512, 2**25 // self.size**2))  # fewer than 512 at once from 257 px on
        for _, _, images in self.batches(torch.arange(count), [slice(i, i + step) for i in range(0, count, step)]):
            yield self.to_input(images)

    def batches(self, order: Tensor, slices: list[slice]):
        """Yield (slice, index (B,) on the CPU, uint8 images (B, C, H, W) on the device). order: int64 (N,)."""
        pin = Tensor.pin_memory if self.device.type == "cuda" else Tensor.contiguous
        order = pin(order)
        if self.resident:
            here = order.to(self.images.device)
            yield from ((part, order[part], self.images.index_select(0, here[part])) for part in slices)
            return
        for part, images in zip(slices, read_ahead(lambda part: pin(self.images.index_select(0, order[part])), slices)):
            yield part, order[part], images.to(self.device, non_blocking=True)


def read_ahead(read, items, depth: int = 2):
    """Yield read(item) for each item, done by a thread of its own, at most `depth` ahead."""
    with ThreadPoolExecutor(1) as pool:
        ahead = collections.deque()
        for item in items:
            ahead.append(pool.submit(read, item))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class Loader:
    """Batches of a training set: `for x, index in loader.epoch(epoch)`.

    augment(images, draw) makes the training view of uint8 images (B, C, H, W); strong(view, draw) the second, strong
    view of it. draw(name) gives uniform numbers in [0, 1), float32 (B,): the same place in an epoch gets the same draw
    whatever the device, the batch split or the point of resumption, and a sample that is drawn twice gets two.
    """

    def __init__(self, images: Images, batch_size: int, seed: int, augment, strong=None):
        self.images, self.seed, self.augment, self.strong = images, seed, augment, strong
        rank, world = processes.rank, processes.count
        slices = batch_slices(len(images), batch_size, world)
        self.slices = [slice(part.start + rank, part.stop, world) for part in slices]  # this process's samples

    def epoch(self, epoch: int, balance: Tensor | None = None, strong: bool = True):
        """Yield (x, index): x the network input (B, 3, H, W), index int64 (B,) its places in the training set (CPU).

        With a strong view ((weak, strong), index), where `strong=False` saves the second: None. balance: int64 (N,),
        labels whose classes are drawn equally often, see `balanced_order`; None: each sample once.
        """
        draws, images, count = {}, self.images, len(self.images)
        # Whatever else draws (dropout, noise of a GAN) restarts, in each process with numbers of its own.
        torch.manual_seed(seed_of("epoch", self.seed, epoch) + processes.rank)
        generator = generator_of("order", self.seed, epoch)
        labels = torch.full((count,), -1) if balance is None else balance.cpu()
        order = balanced_order(labels, generator)

        def draw(name: str) -> Tensor:  # a new name never shifts the draws of the others
            if name not in draws:
                draws[name] = torch.rand(count, generator=generator_of(name, self.seed, epoch)).to(images.device)
            return draws[name][part]

        bar = tqdm(images.batches(order, self.slices), f"epoch {epoch}", len(self.slices), leave=False, disable=None)
        for part, index, batch in bar:
            processes.part = part
            view = self.augment(batch, draw)
            x = images.to_input(view)
            if self.strong:
                x = x, images.to_input(self.strong(view, draw)) if strong else None
            yield x, index
        processes.end_epoch()


def assign(values: Tensor, index: Tensor, new: Tensor, where: Tensor | None = None) -> Tensor:
    """values[index] = new, in place; returns how many entries changed, a scalar tensor on the device.

    Where oversampling drew a sample twice in the batch, its last occurrence decides (a plain assignment is not
    deterministic on a GPU); where: bool (B,), the occurrences that count. values: (N,). index, new: (B,). No host
    synchronisation.
    """
    place = torch.arange(len(index), device=index.device)
    counts = place if where is None else torch.where(where, place, -1)
    last = torch.where(index[:, None] == index[None, :], counts, -1).amax(1)  # (B,): the occurrence that decides, or -1
    new = torch.where(last >= 0, new[last], values[index])
    changed = ((values[index] != new) & (last == place)).sum()
    values[index] = new
    processes.assigned(values, index, last)
    return changed


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


class Means:
    """Averages over an epoch, kept on the device until the end: means.add("loss", total=loss) for the tag "loss/total".

    A bool tensor (B,) gives the share of the samples, a float tensor the mean over the steps (of a vector entry by
    entry), an integer tensor the sum over the epoch; in several processes those of all.
    """

    def __init__(self):
        self.sums, self.losses = {}, []

    def add(self, group: str, among: Tensor | None = None, **values: Tensor) -> None:
        """among: bool, in the shape of the values: the samples, or entries, that count (None: all)."""
        for name, value in values.items():
            tag, value = f"{group}/{name}", value.detach()
            if tag == "loss/total":
                self.losses.append(value)
            weight = torch.ones_like(value, dtype=torch.bool) if among is None else among
            count = weight.double() * (value.dtype != torch.int64)  # of what is added up: nothing to divide by
            pair = torch.stack([torch.where(weight, value, 0).double(), count])
            if value.dtype == torch.bool:
                pair = pair.sum(1)
            elif value.is_floating_point():
                pair = pair * processes.share
            self.sums[tag] = self.sums.get(tag, 0) + pair

    def result(self) -> dict[str, float | list[float]]:
        """tag -> number (of a vector: list), 0 where nothing counted.

        Raises FloatingPointError with the step if a total loss is not finite.
        """
        totals = list(self.sums.values())
        flat = processes.sum(torch.cat([part.flatten() for part in [*totals, *self.losses]])).cpu()
        *pairs, losses = flat.split([*(total.numel() for total in totals), len(self.losses)])
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise FloatingPointError(f"step {bad[0].item() + 1} of {len(losses)}")
        pairs = [pair.view(total.shape) for pair, total in zip(pairs, totals)]
        return {tag: (a / torch.where(b > 0, b, 1)).tolist() for tag, (a, b) in zip(self.sums, pairs)}
