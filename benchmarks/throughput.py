"""What the data path costs, and what each method costs: time per training step, kinds interleaved.

    python benchmarks/throughput.py data --data toy
    python benchmarks/throughput.py data --data ferplus --root data/ferplus
    python benchmarks/throughput.py methods --data toy

data: Co-curing's step (two networks, both losses, one optimiser). "real" draws the batch from the data set, augments and
normalises it; "synthetic" takes one random, normalised batch that lies on the device already. "loader" is the same step
fed in the style of the published codes: a DataLoader that decodes files with PIL and augments one image at a time.
methods: the training loop of each script as it stands, against that of one plain network.
Reported are the median of the paired ratios and, as their noise, those of the first kind to itself ("again").
"""

import io
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cocuring  # noqa: E402 - found through the line above
import common  # noqa: E402
import ncctfer  # noqa: E402
import scn  # noqa: E402

STEPS, ROUNDS = 8, 5


class Files(torch.utils.data.Dataset):
    """The training images as encoded files in memory (no disk is measured), decoded and augmented one at a time."""

    def __init__(self, train, size):
        self.files, self.labels = [], train.labels
        for image in train.images[: STEPS * 256]:
            buffer = io.BytesIO()
            Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy()).save(buffer, "PNG")
            self.files.append(buffer.getvalue())
        self.transform = T.Compose([T.Resize((size, size)), T.RandomHorizontalFlip(), T.ColorJitter(0.2, 0.2, 0.2), T.ToTensor(), T.Normalize(common.MEAN, common.STD)])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(Image.open(io.BytesIO(self.files[i])).convert("RGB")), self.labels[i]


def time_data(argv) -> None:
    args = cocuring.parse_args(argv)
    device = common.find_device(args.device)
    train, _ = common.load_data(args)
    slices = common.batch_slices(len(train.labels), args.batch_size)[:STEPS]
    pixels, labels = common.Pixels(train.images, device), train.labels.to(device)
    networks = cocuring.make_networks(args, len(train.classes), device)
    optimizer = torch.optim.Adam([p for n in networks for p in n.parameters()], lr=1e-5, fused=True)
    random_batch = torch.randn(args.batch_size, 3, args.size, args.size, device=device).contiguous(memory_format=torch.channels_last)
    random_labels = torch.randint(len(train.classes), (args.batch_size,), device=device)
    loader = torch.utils.data.DataLoader(Files(train, args.size), args.batch_size, shuffle=True, num_workers=torch.get_num_threads(), drop_last=True)

    def real():
        plan = common.EpochPlan(len(labels), args.seed, 1, device)
        for part, index, images in pixels.batches(plan.order, slices):
            yield common.network_input(common.augment(images, plan, part, args.crop, args.jitter), args.size), labels[index]

    def synthetic():
        for _ in slices:
            yield random_batch, random_labels

    def loaded():
        for step, (x, y) in enumerate(loader):
            if step == len(slices):
                return
            yield x.to(device), y.to(device)

    def seconds(batches) -> float:
        began, count = time.perf_counter(), 0
        for x, y in batches:
            with common.autocast(device, args.precision):
                logits = [network(x) for network in networks]
            loss = sum(cocuring.peer_losses(*(z.float() for z in logits), y, 0.5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    kinds = {"synthetic": synthetic, "real": real, "synthetic again": synthetic, "loader": loaded}
    print(f"{args.data}, {args.size} px, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {ROUNDS} rounds of {len(slices)} steps")
    report({kind: (lambda batches=batches: seconds(batches())) for kind, batches in kinds.items()})


def time_methods(argv) -> None:
    flags = {"one network": (cocuring, "--networks 1 --lambda-max 0 --no-relabel"), "SCN": (scn, "--relabel-from 1"), "NCCTFER": (ncctfer, "--warm-up 1"),
             "NCCTFER, no negative head": (ncctfer, "--warm-up 1 --no-negative"), "two networks": (cocuring, "--lambda-max 0 --no-relabel"), "Co-curing": (cocuring, "--t-warm 0")}
    steps = {}
    for kind, (script, more) in flags.items():
        args = script.parse_args([*argv, *more.split()])
        device = common.find_device(args.device)
        train, _ = common.load_data(args)
        slices = common.batch_slices(len(train.labels), args.batch_size)[:STEPS]
        pixels, given = common.Pixels(train.images, device), train.labels.to(device)
        plan, classes = common.EpochPlan(len(given), args.seed, 1, device), len(train.classes)
        networks = script.make_networks(args, classes, device) if script is cocuring else [script.make_network(args, classes, device)]
        optimizer = torch.optim.Adam([p for n in networks for p in n.parameters()], lr=1e-5, fused=True)
        rest = {cocuring: (networks, optimizer, pixels, slices, plan, given, given.clone(), 1, args),
                scn: (networks[0], optimizer, pixels, slices, plan, given.clone(), 1, args),
                ncctfer: (networks[0], optimizer, pixels, slices, plan, given, None, 1, train.classes, args)}[script]

        def step(script=script, rest=rest):
            began = time.perf_counter()
            script.train_one_epoch(*rest)  # ends with the losses on the host
            return (time.perf_counter() - began) / len(slices)

        steps[kind] = step
    print(f"{args.data}, {args.size} px, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {ROUNDS} rounds of {len(slices)} steps")
    report(steps | {"one network again": steps["one network"]})


def report(kinds: dict) -> None:
    """Call the kinds, functions that return seconds a step, in turn, and print their times against the first one's."""
    first = next(iter(kinds))
    for run in kinds.values():
        run()  # warm-up
    times = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, run in kinds.items():
            times[kind].append(run())
    for kind, values in times.items():
        ratios = [a / b for a, b in zip(values, times[first])]
        print(f"{kind:26} {1000 * statistics.median(values):7.1f} ms a step   ratio to {first}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


@common.reports_errors
def main(argv=None) -> int:
    what, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if what not in ("data", "methods"):
        raise common.UserError("first say what to time, data or methods; then any option of cocuring.py")
    (time_data if what == "data" else time_methods)(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
