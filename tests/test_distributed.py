"""Training in several processes: two gloo processes on the CPU beside one with the batch of both.

Run by pytest, and by itself as one of the processes: `python test_distributed.py jobs.json`.
"""

import csv
import hashlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from support import distributed, figures, runs, toyfaces

import pytest
import torch
import torch.distributed as dist
from conftest import Tiny, build_folder_splits, lines

import common
from common import UserError

ROOT = Path(common.__file__).parent
COUNT = 45  # of two batches of 24 the second is uneven: 11 and 10 samples
BASE = "--size 32 --epochs 3 --precision fp32 --device cpu --warm-up 1".split()
SMALL = {"jointgan": "--width 0.02 --lr 1e-3"}
# What computes nothing of a batch but means over its samples.
EXACT = {
    "cocuring": "--noise 0.4 --delta 0.02",
    "scn": "--noise 0.4 --no-rank --relabel-batch --margin2 0.02",
    "ncctfer": "--noise 0.4 --no-threshold --no-negative",
    "twostage": "--noise 0.4 --ema 0.5 --margin-scale 0.5",
    "jointgan": "--noise 0.2 0.4 --lambda 0 --no-va",
}
# Scalars of a batch, which are means over the processes: the groups of SCN's ranking, NCCTFER's thresholds.
OF_BATCH = ("loss/rank", "weight/high", "weight/low", "weight/gap", "weight/threshold", "confident/")
WHOLE = {"jointgan": "--noise 0.4 --lambda 0.8"}  # the methods as they are


class Stopped(KeyboardInterrupt):
    pass


def patch_for_tests(patch) -> None:
    """A tiny network without batch normalisation, few faces, no pictures."""
    patch(figures, "write", lambda *args: None)
    patch(toyfaces, "SPLITS", {"train": COUNT, "valid": 16, "test": 16})
    common.BACKBONES["resnet18"] = Tiny
    patch(torch.nn, "BatchNorm2d", lambda channels: torch.nn.Identity())


def digest(parts: dict) -> str:
    """Of the state of networks, optimisers and labels."""

    def flat(value):
        if isinstance(value, dict):
            return [x for key in sorted(value, key=str) for x in flat(value[key])]
        if isinstance(value, (list, tuple)):
            return [x for item in value for x in flat(item)]
        return [value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()]

    return hashlib.sha256(b"".join(flat(parts))).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# In one of the two processes
# ----------------------------------------------------------------------------------------------------------------------


def train(script: str, argv: list[str], stop: int | None = None, batch_norm: bool = False) -> dict:
    """Exit status of a script, and what this process has of networks and labels after each epoch."""
    seen, end_epoch, norm = [], runs.Run.end_epoch, torch.nn.BatchNorm2d

    def look(self, epoch, *rest):
        seen.append(digest(self.states()))
        end_epoch(self, epoch, *rest)
        if epoch == stop:
            raise Stopped

    runs.Run.end_epoch = look
    torch.nn.BatchNorm2d = torch.nn.modules.batchnorm.BatchNorm2d if batch_norm else norm
    try:
        return {"status": importlib.import_module(script).main(argv), "seen": seen}
    finally:
        runs.Run.end_epoch, torch.nn.BatchNorm2d = end_epoch, norm


def joined(work):
    """work() among the processes, as a script's main has it."""
    result = {}

    def main(argv=None) -> int:
        result.update(work())
        return 0

    return {"status": distributed.reports_errors(main)(), **result}


def loader_of(count: int, batch_size: int) -> common.Loader:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).contiguous()
    return common.Loader(common.Images(images, 4, torch.device("cpu")), batch_size, 1, lambda view, draw: view)


def steps() -> dict:
    """The mean gradient of a line through known points, in batches that are uneven, with two optimisers."""

    def work():
        network, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        unused = torch.nn.Linear(1, 1)  # without gradients
        for linear in (network, other):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
        both = [*other.parameters(), *unused.parameters()]
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.01), torch.optim.Adam(both, lr=0.1)]
        means = common.Means()
        for _, index in loader_of(23, 5).epoch(1):
            y = index.float()[:, None]
            losses = [(linear(torch.ones_like(y)) - y).square().mean() for linear in (network, other)]
            for optimizer, loss in zip(optimizers, losses):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            means.add("loss", total=losses[0])
            means.add("x", even=index % 2 == 0, count=(index % 3 == 0).sum(), over=index.float().mean())
        result = means.result()
        return {"means": result, "weights": [p.item() for linear in (network, other) for p in linear.parameters()]}

    return joined(work)


def relabels() -> dict:
    """What two processes assign to the same and to different samples, and what both have afterwards."""

    def work():
        labels = torch.zeros(30, dtype=torch.int64)
        weights = torch.full((30,), -1.0)
        drawn = []
        for epoch in range(1, 9):
            balance = torch.arange(30) // 25 if epoch > 1 else None
            for _, index in loader_of(30, 8).epoch(epoch, balance):
                part = common.processes.part
                place = torch.arange(part.start, part.stop, part.step)
                where = (index + place) % 3 > 0
                common.assign(labels, index, 100 * epoch - place, where)
                common.assign(weights, index, -place / 7)
                drawn.append([epoch, index.tolist(), place.tolist(), where.tolist()])
        return {"labels": labels.tolist(), "weights": weights.tolist(), "drawn": drawn}

    return joined(work)


def buffers() -> dict:
    """Running statistics after an epoch, that of an averaged module too."""

    def work():
        rank, norm = common.processes.rank, torch.nn.modules.batchnorm.BatchNorm1d(2)
        norm.running_mean.fill_(float(rank))
        norm.register_buffer("constant", torch.tensor(float(rank)), persistent=False)  # none of the state
        norm.num_batches_tracked.fill_(7)
        distributed.average_buffers_of([norm, "no module"])
        before = norm.running_mean.tolist()
        for _ in loader_of(8, 2).epoch(1):
            pass
        result = {"before": before, "after": norm.running_mean.tolist(), "constant": norm.constant.item()}
        return result | {"counter": int(norm.num_batches_tracked)}

    return joined(work)


def decisions() -> dict:
    """What rank 0 decides, and its errors, in both processes; who goes first; numbers drawn by each."""

    def work():
        rank, got = common.processes.rank, {}
        got["value"] = distributed.by_first(lambda: [rank, torch.tensor([rank + 5])])[1].item()
        for name, error in (("user", UserError("of rank 0")), ("system", OSError(28, "No space left"))):

            def refuse(error=error):
                raise error

            try:
                distributed.by_first(refuse)
            except (UserError, OSError) as raised:
                got[name] = [type(raised).__name__, str(raised)]
        file = Path(os.environ["TOGETHER"])
        with distributed.first_goes_ahead():
            got["there"] = file.exists()
            file.touch()
        try:
            with distributed.first_goes_ahead():
                raise UserError("also released by an error")
        except UserError:
            pass
        for device in ("cuda:0", "cuda:1"):
            try:
                distributed.take_device(device)
            except UserError as error:
                got[device] = str(error)
        distributed.take_device("cpu")
        next(iter(loader_of(8, 2).epoch(1)))
        return got | {"noise": torch.rand(1).item()}

    return joined(work)


def fail(rank: int, after: int, late: float = 0) -> dict:
    """A process that fails by itself, in the middle of an epoch; the other notices it so many seconds later."""

    def work():
        for step, _ in enumerate(loader_of(40, 2).epoch(1)):
            if step == after:
                if common.processes.rank == rank:
                    raise UserError("the disk of this machine is full")
                time.sleep(late)
            common.processes.sum(torch.zeros(1))

    return joined(work)


def step_alone() -> None:
    """After the end of a script this process trains by itself as if there had been no others."""
    assert type(common.processes) is common.Processes
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.SGD([weight], lr=1).step()
    assert weight.item() == 0


def run_jobs(path: str) -> None:
    """The jobs of a file, one after the other; results beside it."""
    jobs, rank = json.loads(Path(path).read_text()), os.environ["RANK"]
    patch_for_tests(setattr)
    results = []
    for number, job in enumerate(jobs):
        os.environ["MASTER_PORT"] = agreed_port(Path(path).with_suffix(f".port{number}"), rank)
        results.append(globals()[job.pop("what")](**job))
        if dist.is_initialized():  # as it is left after an error
            dist.destroy_process_group()
        step_alone()
    Path(path).with_suffix(f".{rank}").write_text(json.dumps(results))


def agreed_port(file: Path, rank: str) -> str:
    """A port that is free now: one that was free before the first job may be another program's at the last one."""
    if rank == "0":
        common.write_atomically(file, lambda temporary: temporary.write_text(str(free_port())))
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


if __name__ == "__main__":
    run_jobs(sys.argv[1])


# ----------------------------------------------------------------------------------------------------------------------
# In pytest
# ----------------------------------------------------------------------------------------------------------------------


def in_two_processes(jobs: list[dict], folder: Path) -> tuple[list[list[dict]], list[tuple[str, str]]]:
    """The results of the jobs, of each process; and its output and errors."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    shared |= {"TOGETHER": str(folder / "together"), "PYTHONPATH": str(ROOT)}
    written = [[folder / f"{kind}{rank}" for kind in ("out", "err")] for rank in "01"]
    started = []
    try:
        for rank, (out, err) in zip("01", written):
            with out.open("w") as stdout, err.open("w") as stderr:
                command, own = [sys.executable, __file__, str(file)], shared | {"RANK": rank, "LOCAL_RANK": rank}
                started.append(subprocess.Popen(command, env=own, stdout=stdout, stderr=stderr))
        end = time.monotonic() + 900
        while None in (codes := [process.poll() for process in started]) and not any(codes) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for process in started:  # one that has failed leaves the other waiting
            process.kill()
            process.wait()
    said = [(out.read_text(), err.read_text()) for out, err in written]
    assert codes == [0, 0], said
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in "01"], said


def argv_of(script: str, flags: str, folder, name: str) -> list[str]:
    return [*BASE, *flags.split(), *SMALL.get(script, "").split(), "--out", str(folder), "--name", name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def several(folder):
    """(what, key) -> the results of both processes: all jobs in one pair of processes, as these take long to start."""
    jobs, small = {}, ["--batch-size", "12"]
    for script, flags in EXACT.items():
        whole, cut = (argv_of(script, flags, folder, f"{script}-{name}-2") + small for name in ("whole", "cut"))
        jobs["exact", script] = dict(what="train", script=script, argv=whole)
        jobs["cut", script] = dict(what="train", script=script, argv=cut, stop=2)
        jobs["resumed", script] = dict(what="train", script=script, argv=[*cut, "--resume"])
        flags = WHOLE.get(script, "--noise 0.4")
        argv = argv_of(script, f"{flags} --oversample", folder, f"{script}-own-2") + small
        jobs["own", script] = dict(what="train", script=script, argv=argv, batch_norm=True)
    for what in ("steps", "relabels", "buffers", "decisions"):
        jobs[what, ""] = dict(what=what)
    argv = argv_of("scn", EXACT["scn"], folder, "scn-whole-2")
    jobs["again", ""] = dict(what="train", script="scn", argv=argv + small)
    jobs["large", ""] = dict(what="train", script="scn", argv=[*argv, "--overwrite", "--batch-size", "23"])
    jobs["evaluate", ""] = dict(what="train", script="scn", argv=["--evaluate", f"{folder}/scn-whole-2/model.pt"])
    jobs["first fails", ""] = dict(what="fail", rank=0, after=2)
    jobs["first is gone", ""] = dict(what="fail", rank=0, after=2, late=3)
    jobs["second fails", ""] = dict(what="fail", rank=1, after=2)
    results, said = in_two_processes(list(jobs.values()), folder)
    found = {key: [result[k] for result in results] for k, key in enumerate(jobs)}
    return found | {"said": said}


@pytest.fixture(scope="module")
def alone(folder):
    """alone("scn") -> the folder of the same run in one process, with the batch of both."""

    def run(script):
        name = f"{script}-whole-1"
        if not (folder / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(common.BACKBONES, "resnet18", Tiny)
                patch_for_tests(patch.setattr)
                argv = [*argv_of(script, EXACT[script], folder, name), "--batch-size", "24"]
                assert importlib.import_module(script).main(argv) == 0
        return folder / name

    return run


def rows_of(folder):
    with open(folder / "labels.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def assert_same_run(one, two):
    assert len(lines(one)) == len(lines(two)) == 3
    for a, b in zip(lines(one), lines(two)):
        a, b = ({tag: x for tag, x in line.items() if not tag.startswith(OF_BATCH)} for line in (a, b))
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)
    a, b = rows_of(one), rows_of(two)
    assert a.keys() == b.keys()
    for name in a:
        score, other = (float(rows[name].pop("score")) for rows in (a, b))
        assert a[name] == b[name] and score == pytest.approx(other, abs=1e-3)
    states = [torch.load(run / "model.pt", weights_only=True)["networks"] for run in (one, two)]
    for x, y in zip(*states, strict=True):
        assert all(torch.allclose(x[key].float(), y[key].float(), rtol=1e-2, atol=1e-4) for key in x)


@pytest.mark.parametrize("script", EXACT)
def test_two_processes_are_one_with_the_batch_of_both(script, several, alone, folder):
    assert [result["status"] for result in several["exact", script]] == [0, 0]
    assert_same_run(alone(script), folder / f"{script}-whole-2")


def test_a_process_takes_the_gpu_of_its_rank_unless_it_trains_on_the_cpu(monkeypatch):
    taken, there = [], 2
    processes = common.Processes()
    processes.count, processes.local_rank = 2, 1
    monkeypatch.setattr(common, "processes", processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    distributed.take_device("cpu")
    assert taken == []
    distributed.take_device("auto")
    distributed.take_device("cuda")
    assert taken == [1, 1]
    there = 1
    with pytest.raises(UserError, match="no GPU for process 1: this machine has 1; --nproc-per-node 1 fits"):
        distributed.take_device("cuda")
    there = 0
    distributed.take_device("auto")  # gloo on the CPU
    processes.count, there = 1, 2
    distributed.take_device("cuda")
    assert taken == [1, 1]


@pytest.mark.parametrize("script", ["cocuring", "scn"])
def test_the_runs_that_are_compared_do_correct_labels(script, alone):
    assert lines(alone(script))[-1]["relabel/changed"] > 3


@pytest.mark.parametrize("script", EXACT)
def test_a_resumed_run_of_two_processes_ends_as_one_that_was_not_stopped(script, several, folder):
    assert [result["status"] for result in several["cut", script]] == [130, 130]
    assert [result["status"] for result in several["resumed", script]] == [0, 0]
    whole, resumed = ([folder / f"{script}-{name}-2"] for name in ("whole", "cut"))
    assert lines(*whole) == lines(*resumed)
    assert rows_of(*whole) == rows_of(*resumed)
    assert [r["seen"][2] for r in several["exact", script]] == [r["seen"][0] for r in several["resumed", script]]


@pytest.mark.parametrize("script", EXACT)
def test_all_processes_have_the_same_networks_and_labels_after_each_epoch(script, several):
    """The methods as they are: with batch normalisation, statistics of a batch, and samples drawn by both processes."""
    first, second = several["own", script]
    assert first["status"] == second["status"] == 0
    assert first["seen"] == second["seen"] and len(set(first["seen"])) == 3


def test_only_the_first_process_writes_and_prints(several, folder):
    files = sorted(path.name.split(".1")[0] for path in (folder / "scn-whole-2").iterdir())
    assert sum(name.startswith("events.out") for name in files) == 1 and "model.pt" in files
    (out, _), (other, _) = several["said"]
    assert "epoch   3/3" in out and other == ""
    assert json.loads((folder / "scn-whole-2" / "args.json").read_text())["processes"] == 2


def test_gradients_and_metrics_are_means_over_the_samples_of_all_processes(several):
    network, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for linear in (network, other):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.01), torch.optim.Adam(other.parameters(), lr=0.1)]
    order = common.balanced_order(torch.full((23,), -1), common.generator_of("order", 1, 1)).float()
    totals, means = [], []
    for y in order[:, None].split([10, 13]):  # the last three would not be two for each process
        for linear, optimizer in zip((network, other), optimizers):
            optimizer.zero_grad()
            loss = (linear(torch.ones_like(y)) - y).square().mean()
            loss.backward()
            optimizer.step()
            if linear is network:
                totals.append(loss.item())
        means.append(y.mean().item())
    weights = [p.item() for linear in (network, other) for p in linear.parameters()]
    for result in several["steps", ""]:
        assert result["weights"] == pytest.approx(weights, rel=1e-5)
        assert result["means"]["x/even"] == 12 / 23 and result["means"]["x/count"] == 8
        assert result["means"]["loss/total"] == pytest.approx(sum(totals) / 2, rel=1e-5)
        assert result["means"]["x/over"] == pytest.approx(sum(means) / 2, rel=1e-6)


def test_of_a_sample_that_both_processes_drew_the_later_place_decides(several):
    labels, weights = [0] * 30, [-1.0] * 30
    first, second = (result["drawn"] for result in several["relabels", ""])
    twice = 0
    for epoch in range(1, 9):
        places = {}
        for k, drawn in enumerate((first, second)):
            for number, index, place, where in drawn:
                if number == epoch:
                    assert all(p % 2 == k for p in place)
                    places |= {p: (i, counts) for i, p, counts in zip(index, place, where)}
        assert sorted(places) == list(range(30))
        for place, (sample, counts) in sorted(places.items()):
            weights[sample] = -place / 7
            if counts:
                labels[sample] = 100 * epoch - place
        for p, (i, _) in places.items():
            twice += any(q % 2 != p % 2 and j == i for q, (j, _) in places.items())
        if epoch == 1:
            assert sorted(i for i, _ in places.values()) == list(range(30))
    assert twice > 50  # in the epochs that are oversampled
    for result in several["relabels", ""]:
        assert result["labels"] == labels and result["weights"] == pytest.approx(weights)


def test_running_statistics_are_averaged_at_the_end_of_an_epoch(several):
    first, second = several["buffers", ""]
    assert first["before"] == [0, 0] and second["before"] == [1, 1]
    assert first["after"] == second["after"] == [0.5, 0.5] and first["counter"] == second["counter"] == 7
    assert (first["constant"], second["constant"]) == (0, 1)


def test_rank_0_decides_and_goes_first(several):
    first, second = several["decisions", ""]
    for result in (first, second):
        assert result["status"] == 0 and result["value"] == 5
        assert result["user"] == ["UserError", "of rank 0"]
        assert result["system"] == ["OSError", "[Errno 28] No space left"]
        assert "--device cuda:1" in result["cuda:1"] and "--device cuda" in result["cuda:0"]
    assert [first["there"], second["there"]] == [False, True]
    assert first["noise"] != second["noise"]
    torch.manual_seed(common.seed_of("epoch", 1, 1))
    assert first["noise"] == torch.rand(1).item()  # as in one process


def test_a_refusal_of_the_first_process_ends_all_and_is_said_once(several):
    assert [result["status"] for result in several["again", ""]] == [2, 2]
    (_, errors), (_, other) = several["said"]
    assert errors.count("holds a finished run") == 1 and "holds a finished run" not in other
    assert [result["status"] for result in several["large", ""]] == [2, 2]
    assert errors.count("--batch-size 23 for each of 2 processes is larger than the 45 training images") == 1
    assert [result["status"] for result in several["evaluate", ""]] == [2, 2]
    assert errors.count("without torchrun") == 1 and "without torchrun" not in other


def test_an_error_of_one_process_ends_all_and_is_said_by_it(several):
    (_, errors), (_, other) = several["said"]
    for job in ("first fails", "first is gone", "second fails"):
        assert [result["status"] for result in several[job, ""]] == [2, 2]
    assert errors.count("the disk of this machine is full") == 2
    assert other.count("the disk of this machine is full") == 1 and "process 1: " in other
    assert "Traceback" not in errors + other


def test_another_number_of_processes_does_not_resume(several, folder, capsys, monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    patch_for_tests(monkeypatch.setattr)
    (folder / "scn-cut-2" / "model.pt").rename(folder / "kept.pt")
    argv = argv_of("scn", EXACT["scn"], folder, "scn-cut-2") + ["--batch-size", "12", "--resume"]
    assert importlib.import_module("scn").main(argv) == 2
    assert "2 processes" in capsys.readouterr().err
    (folder / "kept.pt").rename(folder / "scn-cut-2" / "model.pt")


@pytest.mark.parametrize(
    "count, size, world, lengths",
    [
        (45, 12, 2, [24, 21]),
        (50, 12, 2, [24, 26]),
        (51, 12, 2, [24, 27]),
        (52, 12, 2, [24, 24, 4]),
        (24, 12, 2, [24]),
        (29, 4, 3, [12, 17]),
        (30, 4, 3, [12, 12, 6]),
    ],
)
def test_each_sample_belongs_to_one_process_and_none_has_a_batch_of_one(count, size, world, lengths, monkeypatch):
    assert [part.stop - part.start for part in common.batch_slices(count, size, world)] == lengths
    order = {}
    for rank in range(world):
        monkeypatch.setattr(common.Processes, "rank", rank)
        monkeypatch.setattr(common.Processes, "count", world)
        for part, (_, index) in zip(loader_of(count, size).slices, loader_of(count, size).epoch(1)):
            assert len(index) >= 2
            order |= dict(zip(range(count)[part], index.tolist(), strict=True))
    monkeypatch.undo()
    alone = torch.cat([index for _, index in loader_of(count, size).epoch(1)]).tolist()
    assert [order[place] for place in range(count)] == alone


def test_the_draws_of_a_place_are_those_of_one_process(monkeypatch):
    def draws():
        drawn = []
        images = common.Images(torch.zeros(20, 3, 4, 4, dtype=torch.uint8), 4, torch.device("cpu"))
        loader = common.Loader(images, 4, 1, lambda view, draw: drawn.append(draw("flip")) or view)
        for _ in loader.epoch(3):
            pass
        return torch.cat(drawn)

    whole = draws()
    monkeypatch.setattr(common.Processes, "count", 2)
    for rank in (0, 1):
        monkeypatch.setattr(common.Processes, "rank", rank)
        assert torch.equal(draws(), whole[rank::2])


def test_torchrun_starts_a_script(tmp_path):
    """The command of the documentation, on a folder of photographs whose cache the processes share."""
    root = build_folder_splits(tmp_path / "faces", count=4)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(free_port()),
        str(ROOT / "scn.py"),
        "--data",
        "folder",
        "--root",
        str(root),
        *"--size 16 --batch-size 3 --epochs 1 --device cpu --name run".split(),
        "--out",
        str(tmp_path),
        "--cache",
        str(tmp_path / "cache"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   1/1") == 1 and len(rows_of(tmp_path / "run")) == 12
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
