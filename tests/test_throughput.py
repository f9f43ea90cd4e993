"""The benchmark of the training loops: what it counts, and that it runs with every script."""

import contextlib
import importlib.util
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from conftest import Tiny

import common
from common import UserError

PATH = Path(common.__file__).parent / "benchmarks" / "throughput.py"
spec = importlib.util.spec_from_file_location("throughput", PATH)
throughput = importlib.util.module_from_spec(spec)
spec.loader.exec_module(throughput)

CPU = torch.device("cpu")
SMALL = "--quick --device cpu --images 64 --batch-sizes 8 4 --sizes 32 --steps 2 --rounds 1 --growth 128 256".split()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The sections on 64 photographs, with a small backbone."""
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, size: 1e9)
    return throughput.Bench(throughput.parse_args(SMALL), tmp_path)


def test_kinds_take_turns_and_a_ratio_is_that_of_a_round():
    calls, seconds = [], {"a": iter([9, 9, 2, 1, 2, 2, 2, 4]), "b": iter([9, 3, 2, 8])}

    def kind(name, images):
        def run():
            calls.append(name)
            return next(seconds[name]), images

        return run

    found = throughput.compare({"a": kind("a", 1), "b": kind("b", 2)}, rounds=3)
    assert calls == ["a", "b", "a"] * 4  # back and forth: a, b, again; again, b, a
    assert list(found) == ["a", "b", "a, again"]
    assert found["a"] == {"images/s": 1 / 2, "ratio": [1, 1, 1]}  # 1, 2 and 4 seconds; the first round warms up
    assert found["b"] == {"images/s": 1 / 1.5, "ratio": [1, 0.5, 1.5]}  # 1.5, 1 and 4 seconds an image
    assert found["a, again"]["ratio"] == [1, 0.5, 2]


@pytest.mark.parametrize("method", throughput.METHODS)
def test_each_script_is_timed_with_its_own_loop_and_three_sources(method, bench):
    task = bench.task(method, 32, 8)
    reference = bench.task(method, 32, 8, "--precision", "fp32", reference=True)
    for name, run in bench.sources_of(task, reference).items():
        seconds, images = run()
        steps = throughput.PREPARED if name == "reference" else 2
        assert seconds > 0 and images == 8 * steps, name  # of eight; the one before them does not count
    parts = [part for a in reference.args for part in (a if isinstance(a, (list, tuple)) else [a])]
    networks = [part for part in parts if isinstance(part, torch.nn.Module)]
    assert networks and all(p.is_contiguous() for network in networks for p in network.parameters())
    assert all(group["fused"] for optimizer in task.optimizers for group in optimizer.param_groups)
    assert not any(group["fused"] for optimizer in reference.optimizers for group in optimizer.param_groups)


def test_the_scripts_are_left_as_they_were(bench):
    import scn

    before = scn.train_one_epoch, common.Loader.__init__
    bench.task("scn", 32, 8)
    assert (scn.train_one_epoch, common.Loader.__init__) == before


def test_a_script_that_refuses_its_arguments_is_named(bench):
    with pytest.raises(common.UserError, match="scn.py .*status 2"):
        bench.task("scn", 32, 8, "--backbone", "nonsense")


def test_all_sources_have_the_same_shapes_and_the_same_images(bench):
    task = bench.task("scn", 32, 8)
    own, synthetic, reference = (next(source) for source in (
        task.own_batches(), task.synthetic_batches(), task.reference_batches(task.sources)))
    assert own[0].shape == synthetic[0].shape == reference[0].shape == (8, 3, 32, 32)
    assert synthetic[0].std() > 0.9 and torch.equal(synthetic[1], own[1])
    images = task.loader.images
    plain = torch.cat(list(images))[reference[1]]  # flipped and jittered in the reference
    pairs = zip(plain, reference[0])
    flipped = torch.stack([min((x, x.flip(-1)), key=lambda v: (v - y).abs().mean()) for x, y in pairs])
    assert (flipped - reference[0]).abs().mean() < 0.5 * (flipped.roll(1, 0) - reference[0]).abs().mean()
    source = task.own_batches(throughput.Undecoded(images, task.sources))
    undecoded = next(source)
    source.close()
    assert task.loader.images is images and len(images) == 40  # no more than the steps need
    assert torch.equal(undecoded[0], own[0]) and torch.equal(undecoded[1], own[1])


def test_two_views_are_two_in_every_source(bench):
    task = bench.task("ncctfer", 32, 8)
    for source in (task.own_batches(), task.synthetic_batches(), task.reference_batches(task.sources)):
        (weak, strong), _ = next(source)
        assert weak.shape == strong.shape == (8, 3, 32, 32) and not torch.equal(weak, strong)


def test_the_first_step_is_not_timed(bench):
    task = bench.task("scn", 32, 8)

    def train(batches, waits):
        for wait, (_, index) in zip(waits, batches):
            time.sleep(wait)
        next(batches, None)

    task.train, task.options = train, {}
    task.args = (task.own_batches(), [0.3, 0.02, 0.02])
    seconds, images = task.measure(task.synthetic_batches(), 2)
    assert 0.04 < seconds < 0.25 and images == 16
    task.args = (task.own_batches(), [0.02, 0.3, 0.02])
    assert task.measure(task.synthetic_batches(), 2)[0] > 0.3


def test_the_reference_has_workers_and_their_augmentation(bench, monkeypatch):
    task, honest, made = bench.task("ncctfer", 32, 8), torch.utils.data.DataLoader, []
    weak, strong = throughput.single_transforms(task.loader)
    kinds = [[type(step).__name__ for step in view.transforms] for view in (weak, strong)]
    assert kinds[0] == ["Resize", "RandomHorizontalFlip", "RandomCrop", "ToTensor", "Normalize"]
    assert kinds[1] == [*kinds[0][:3], "RandAugment", *kinds[0][3:]]

    def remember(*args, **options):
        made.append(options)
        return honest(*args, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", remember)
    next(task.reference_batches(task.sources))
    assert made[0]["num_workers"] >= 1 and isinstance(made[0]["sampler"], torch.utils.data.RandomSampler)


def test_batches_that_were_prepared_before_are_not_timed(bench):
    """Workers of 0.05 s an image make 20 images a second each, however many batches wait when the time begins."""
    task = bench.task("scn", 32, 4)

    def train(batches):
        for step, _ in enumerate(batches):
            if step == 0:
                time.sleep(0.6)  # the workers prepare what they may

    task.train, task.options, task.args = train, {}, (task.own_batches(),)
    single = throughput.Single(48, lambda i: time.sleep(0.05) or torch.zeros(3, 32, 32), [lambda image: image])
    steps = throughput.PREPARED
    seconds, images = task.measure(throughput.worker_batches(single, 4, CPU), steps, throughput.PREPARED)
    assert images == 4 * steps and seconds > 0.05 * images / throughput.WORKERS * 0.7


def test_operations_are_those_of_the_network(bench):
    """A convolution of 3 x 8 x 9 weights on 8 x 8 places of 32 pixels and the heads: forward once, backward twice."""
    task = bench.task("cocuring", 32, 8)
    places = ((32 - 3) // 4 + 1) ** 2
    conv, head = 2 * 3 * 8 * 9 * places, 2 * 32 * 7
    found = throughput.operations(task) / 2  # two networks
    assert 2 * conv + 3 * head <= found <= 3 * (conv + head)  # no gradient with respect to the images


def test_peak_memory_of_a_block():
    with throughput.Peak(CPU) as small:
        pass
    with throughput.Peak(CPU) as large:
        torch.ones(64 * 2**20)  # 256 MiB
    assert small.bytes < 50 * 2**20 and 200 * 2**20 < large.bytes < 400 * 2**20


def test_the_rate_of_a_product_of_matrices_that_takes_a_second(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(throughput, "wait", lambda device: float(next(clock)))
    assert throughput.matrix_rate(CPU, 16) == 2 * 16**3


def test_a_ratio_is_written_with_its_range():
    assert throughput.times({"ratio": [2, 1, 4]}) == "2.00 (1.00 to 4.00)"
    assert throughput.times({"ratio": [2, 1, 4]}, True) == "0.50 (0.25 to 1.00)"


def test_a_run_writes_a_record_and_a_picture_and_the_page_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    sections = ["--only", "loaders", "methods", "switches", "batches", "growth", "--methods", "scn"]
    assert throughput.main([*SMALL, *sections, "--out", str(tmp_path / "here")]) == 0
    record = json.loads((tmp_path / "here.json").read_text())
    (row,) = record["sections"]["methods"]
    assert set(row["kinds"]) == {"synthetic", "loader", "reference", "synthetic, again"} and row["share"] > 0
    assert [r["batch"] for r in record["sections"]["batches"]] == [4]
    assert [r["images"] for r in record["sections"]["growth"]] == [128, 256]
    assert (tmp_path / "here.png").stat().st_size > 5000
    texts = throughput.picture_of(record).findobj(lambda artist: hasattr(artist, "get_text"))
    assert "4" in [text.get_text() for text in texts] and not any("$" in text.get_text() for text in texts)

    assert [axes.get_xlabel() for axes in throughput.picture_of(record).axes] == [
        "training images/s", "batch size", "time of a step, scn.py, 32 px", "training images"]
    record["sections"] = {"loaders": record["sections"]["loaders"], "growth": record["sections"]["growth"]}
    assert [axes.get_xlabel() for axes in throughput.picture_of(record).axes] == ["training images"]

    (tmp_path / "docs" / "figures").mkdir(parents=True)
    page = tmp_path / "docs" / "speed.md"
    page.write_text("above\n<!-- numbers -->\nold\n<!-- end of numbers -->\nbelow\n")
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    monkeypatch.setattr(throughput, "DOCS", tmp_path / "docs")
    assert throughput.main(["--write"]) == 0
    text = page.read_text()
    assert text.startswith("above\n<!-- numbers -->\n") and text.endswith("<!-- end of numbers -->\nbelow\n")
    assert "old" not in text and f"| scn | 32 | 8 | {row['kinds']['loader']['images/s']:,.0f} |" in text
    assert (tmp_path / "docs" / "figures" / "speed-here.png").exists()
    assert all(line.count("|") == header.count("|") for header, line in zip(text.split("\n"), text.split("\n")[1:])
               if header.startswith("|") and line.startswith("|"))
    before = text
    assert throughput.main(["--write"]) == 0 and page.read_text() == before
    page.write_text("no marks\n")
    assert throughput.main(["--write"]) == 2 and "speed.md" in capsys.readouterr().err


def test_an_error_loses_nothing_that_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    honest = throughput.Bench.task

    def task(bench, method, size, batch_size, *flags, **settings):
        if batch_size == 8:
            raise error
        return honest(bench, method, size, batch_size, *flags, **settings)

    monkeypatch.setattr(throughput.Bench, "task", task)
    flags = [*SMALL, "--only", "batches", "switches", "methods", "--methods", "scn", "--out", str(tmp_path / "here")]
    error = torch.OutOfMemoryError("CUDA out of memory.")
    assert throughput.main(flags) == 0
    said = capsys.readouterr().out
    assert "switches: out of memory" in said and "scn.py, 32 px: out of memory, left out" in said
    first = json.loads((tmp_path / "here.json").read_text())["sections"]["batches"]
    (tmp_path / "here.json").unlink()
    error = UserError("another error")
    assert throughput.main(flags) == 2
    assert len(json.loads((tmp_path / "here.json").read_text())["sections"]["batches"]) == len(first) == 1


def test_a_section_without_rows_leaves_no_record_of_before(tmp_path, capsys):
    (tmp_path / "here.json").write_text("of before")
    flags = [*SMALL, "--only", "batches", "--batch-sizes", "2", "--out", str(tmp_path / "here")]
    assert throughput.main(flags) == 0
    assert json.loads((tmp_path / "here.json").read_text())["sections"] == {"batches": []}


def test_a_method_whose_step_takes_too_long_is_left_out(bench, capsys):
    bench.options.methods, bench.options.longest = ["scn"], 0
    assert list(bench.methods()) == [] and "scn.py, 32 px" in capsys.readouterr().out


def test_a_whole_command_is_timed_from_its_start_to_its_end(bench):
    (row,) = bench.command()
    assert 0 < row["epochs"] < row["seconds"] and row["command"].startswith("cocuring.py --data raf --size 48")


def test_precisions_are_compared_where_both_are_native(bench, monkeypatch):
    monkeypatch.setattr(throughput.common, "has_bf16", lambda device: False)
    assert list(bench.precision()) == []
    monkeypatch.setattr(throughput.common, "has_bf16", lambda device: True)
    # Where it is not native bf16 takes a minute
    monkeypatch.setattr(throughput.common, "autocast", lambda device, precision: contextlib.nullcontext())
    monkeypatch.setattr(throughput.common, "BACKBONES", {"resnet18": Tiny})
    made, honest = [], bench.task
    monkeypatch.setattr(bench, "task", lambda *args, **options: made.append(honest(*args, **options)) or made[-1])
    first, second = bench.precision()
    assert [first["command"], second["command"]] == ["scn.py --backbone resnet18", "jointgan.py"]
    assert [task.flags.precision for task in made] == ["fp32", "bf16"] * 2
    assert set(first["kinds"]) == {"float32", "bf16", "float32, again"}


def test_stacked_networks_answer_and_learn_as_each_of_them_does(bench):
    one, two = (torch.nn.Sequential(Tiny(), torch.nn.Flatten(), torch.nn.LazyLinear(3)) for _ in range(2))
    networks = torch.nn.ModuleList([one, two])
    x = torch.randn(6, 3, 32, 32)
    expected = torch.stack([network(x) for network in networks])
    forward = throughput.stacked(networks)
    assert torch.allclose(forward(x), expected, atol=1e-5)
    forward(x)[1].square().mean().backward()
    expected[1].square().mean().backward()
    parameters, _ = forward.args
    for name, parameter in networks[1].named_parameters():
        assert torch.allclose(parameters[name].grad[1], parameter.grad, atol=1e-5), name
    (row,) = bench.peers()
    assert set(row["kinds"]) == {"one after the other", "stacked, torch.func", "one after the other, again"}


def test_a_batch_that_the_photographs_do_not_fill_is_refused(capsys):
    assert throughput.main(["--images", "64", "--batch-sizes", "32"]) == 2
    assert "--images 64" in capsys.readouterr().err


def test_the_page_of_the_project_has_its_marks():
    text = (throughput.DOCS / "speed.md").read_text()
    assert text.index("<!-- numbers -->\n") < text.index("<!-- end of numbers -->\n")
