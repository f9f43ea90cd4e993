"""The foundation: batches and the draws of an epoch, backbones, checkpoints, means."""

import os
import threading
import time
import zipfile
from functools import partial

from support.augmentation import augment, rand_augment
from support.networks import Classifier, parameter_groups, to_device

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from torch import nn

import cocuring
import common
from common import UserError

CPU = torch.device("cpu")


def images(n=6, c=3, h=20, w=20, seed=0):
    return torch.randint(256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_a_seed_is_a_function_of_its_key_in_every_process():
    assert common.seed_of("order", 1, 2) == 0x4ED381F9E4780B1F
    assert 0 <= min(common.seed_of(k) for k in range(99)) and max(common.seed_of(k) for k in range(99)) < 2**63
    first, again, other = (torch.rand(3, generator=common.generator_of("a", k)) for k in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_two_processes_of_one_number_that_write_a_file_at_once_leave_one_whole(tmp_path, monkeypatch):
    """In a container the number of each process is 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)

    def write(temporary):
        temporary.write_text("first")
        common.write_atomically(tmp_path / "a", lambda other: other.write_text("second, which is longer"))
        assert (tmp_path / "a").read_text() == "second, which is longer"

    common.write_atomically(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, size, lengths",
    [
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),
        (8, 4, [4, 4]),
        (5, 5, [5]),
        (3, 2, [3]),
        (1, 1, [1]),
    ],
)
def test_batches_cover_the_data_and_a_last_sample_joins_the_batch_before(count, size, lengths):
    slices = common.batch_slices(count, size)
    assert [s.stop - s.start for s in slices] == lengths
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(count))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="--batch-size 6"):
        common.batch_slices(5, 6)


def test_each_batch_gets_its_images_in_order():
    x, order = images(7), torch.tensor([6, 0, 3, 1, 5, 2, 4])
    got = list(common.Images(x, 20, CPU).batches(order, common.batch_slices(7, 3)))
    assert torch.cat([index for _, index, _ in got]).tolist() == order.tolist()
    assert torch.equal(torch.cat([batch for _, _, batch in got]), x[order])


def test_inputs_for_inference_are_all_images_in_their_order():
    x = images(530, 1, 4, 4)
    got = common.Images(x, 8, CPU, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert len(got) == 530 and [len(part) for part in got] == [512, 18]
    torch.testing.assert_close(torch.cat(list(got)), common.network_input(x, 8, (0.5,) * 3, (0.2,) * 3))


def test_images_on_another_device_are_streamed_by_a_thread_that_ends():
    before = threading.active_count()
    streamed = common.Images(images(7), 20, torch.device("meta"))  # a device on which they do not lie
    got = list(streamed.batches(torch.arange(7), common.batch_slices(7, 3)))
    assert [(part.start, len(index), len(batch)) for part, index, batch in got] == [(0, 3, 3), (3, 4, 4)]
    assert {batch.device.type for _, _, batch in got} == {"meta"} and {i.device.type for _, i, _ in got} == {"cpu"}
    for _ in streamed.batches(torch.arange(7), common.batch_slices(7, 2)):
        break  # leaving early stops the thread too
    assert threading.active_count() == before


WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=WITHOUT_GPU)])
def test_images_that_do_not_fit_are_streamed_from_the_file_and_give_the_same_batches(device, tmp_path):
    np.save(tmp_path / "images.npy", images(50))
    mapped = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    epochs = []
    for share in (1 / 3, 0):
        kept = common.Images(mapped, 24, device, share=share)
        assert kept.resident == (share > 0)
        loader = common.Loader(kept, 8, 1, partial(augment, crop=3, jitter=0.2), partial(rand_augment, layers=2))
        epochs.append([(*views, index) for views, index in loader.epoch(1)] + [tuple(kept)])
    for whole, streamed in zip(*epochs, strict=True):
        assert all(a.device.type == b.device.type and torch.equal(a, b) for a, b in zip(whole, streamed, strict=True))
    assert epochs[1][0][0].device.type == device.type and len(epochs[1]) == 8


def test_reading_ahead_keeps_the_order_and_its_depth():
    read = []
    for i, got in enumerate(common.read_ahead(lambda item: read.append(item) or -item, range(9), depth=2)):
        while len(read) < min(i + 3, 9):  # it does read ahead
            time.sleep(0.001)
        assert got == -i and len(read) <= i + 3


def test_an_error_of_the_reading_thread_is_raised():
    with pytest.raises(IndexError):
        list(common.Images(images(3), 20, torch.device("meta")).batches(torch.tensor([0, 1, 7]), [slice(0, 3)]))


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("size", [20, 32, 12])
def test_network_input_is_resized_and_normalised_as_torchvision_does(c, size):
    x = images(3, c, 20, 20)
    got = common.network_input(x, size)
    rgb = TF.resize(x.expand(-1, 3, -1, -1), [size, size], antialias=True).float() / 255  # of uint8: rounded
    grey = 0 if size == 20 else 1  # of 255: older versions of torchvision resize in floating point
    atol = grey / 255 / min(common.STD) + 1e-5
    torch.testing.assert_close(got, TF.normalize(rgb, common.MEAN, common.STD), atol=atol, rtol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == torch.float32
    assert torch.equal(common.network_input(x.float(), size), got)
    given = x.float().contiguous(memory_format=torch.channels_last)
    assert common.network_input(given, size).shape[1] == 3 and torch.equal(given, x.float())  # its input is left alone


def test_resized_images_have_rounded_values():
    x = images(3, 3, 20, 20).clamp(max=250).float() + 0.6
    got = common.network_input(x, 32, (0.0,) * 3, (1.0,) * 3) * 255
    off = got - TF.resize(x, [32, 32], antialias=True)
    assert (got - got.round()).abs().max() < 1e-4 and off.abs().max() < 1.45  # rounded up, then once for each axis
    assert off.mean().item() == pytest.approx(0.4, abs=0.1)


def test_an_image_that_is_not_square_becomes_so():
    assert common.network_input(images(2, 3, 20, 32), 32).shape == (2, 3, 32, 32)


def plain(view, draw):
    return view


def epoch_of(loader, epoch=1, **kw):
    batches = list(loader.epoch(epoch, **kw))
    return torch.cat([index for _, index in batches]), [x for x, _ in batches]


def test_an_epoch_is_a_function_of_seed_and_number():
    def numbers(seed, epoch):
        drawn = []

        def augment(view, draw):
            drawn.append(draw("flip"))
            return view

        index, x = epoch_of(common.Loader(common.Images(images(50), 20, CPU), 7, seed, augment), epoch)
        return index.tolist(), torch.cat(drawn).tolist(), torch.rand(3).tolist()  # the last: dropout, say

    assert numbers(1, 2) == numbers(1, 2)
    for other in (numbers(1, 3), numbers(2, 2)):
        assert all(a != b for a, b in zip(numbers(1, 2), other))
    assert sorted(numbers(1, 2)[0]) == list(range(50))


def test_a_draw_depends_on_its_name_and_place_alone():
    def draws(batch_size, *names):
        drawn = {name: [] for name in names}

        def augment(view, draw):
            for name in names:
                drawn[name].append(draw(name))
                assert drawn[name][-1].shape == (len(view),) and torch.equal(draw(name), drawn[name][-1])
            return view

        epoch_of(common.Loader(common.Images(images(40), 20, CPU), batch_size, 1, augment))
        return {name: torch.cat(parts) for name, parts in drawn.items()}

    whole, parts = draws(40, "flip", "crop x"), draws(7, "another name", "flip")
    assert torch.equal(whole["flip"], parts["flip"]) and not torch.equal(whole["flip"], whole["crop x"])
    assert whole["flip"].min() >= 0 and whole["flip"].max() < 1 and whole["flip"].unique().numel() == 40


def test_the_network_gets_the_augmented_images_normalised():
    x = images(10)
    loader = common.Loader(common.Images(x, 32, CPU), 4, 1, lambda view, draw: view.flip(-1))
    for view, index in loader.epoch(1):
        torch.testing.assert_close(view, common.network_input(x[index].flip(-1), 32))


def test_the_strong_view_is_made_of_the_weak_one():
    x = images(10)
    weak, strong = (lambda view, draw: view.flip(-1)), (lambda view, draw: 255 - view)
    loader = common.Loader(common.Images(x, 20, CPU), 4, 1, weak, strong)
    for (weak, strong), index in loader.epoch(1):
        torch.testing.assert_close(weak, common.network_input(x[index].flip(-1), 20))
        torch.testing.assert_close(strong, common.network_input(255 - x[index].flip(-1), 20))
    order = epoch_of(loader, 2)[0]
    for (weak, strong), index in loader.epoch(2, strong=False):
        assert strong is None and torch.equal(weak, common.network_input(x[index].flip(-1), 20))
    assert torch.equal(order, epoch_of(loader, 2, strong=False)[0])


def test_classes_are_drawn_equally_and_their_samples_evenly():
    labels = torch.tensor([0] * 70 + [1] * 25 + [3] * 5)
    loader = common.Loader(common.Images(images(100, 1, 2, 2), 2, CPU), 10, 1, plain)
    order, _ = epoch_of(loader, balance=labels)
    assert len(order) == 100
    assert sorted(torch.bincount(labels[order]).tolist(), reverse=True) == [34, 33, 33, 0]
    times = torch.bincount(order, minlength=100)
    assert times[:70].max() == 1 and set(times[70:95].tolist()) == {1, 2} and set(times[95:].tolist()) == {6, 7}
    assert not torch.equal(order, epoch_of(loader, 2, balance=labels)[0])


def test_samples_without_a_class_are_drawn_once():
    labels = torch.tensor([-1] * 10 + [0] * 9 + [1] * 3)
    order = common.balanced_order(labels, torch.Generator().manual_seed(0))
    assert len(order) == 22 and sorted(order[labels[order] < 0].tolist()) == list(range(10))
    assert torch.bincount(labels[order] + 1).tolist() == [10, 6, 6]
    assert (labels[order][:10] < 0).sum() < 10  # shuffled among the others


def test_the_last_occurrence_decides_of_a_sample_that_is_drawn_twice():
    labels = torch.tensor([0, 0, 0, 0])
    changed = common.assign(labels, torch.tensor([1, 2, 1, 3]), torch.tensor([5, 6, 7, 0]))
    assert labels.tolist() == [0, 7, 6, 0] and changed.item() == 2


def test_a_sample_drawn_twice_that_ends_as_it_was_did_not_change():
    labels = torch.tensor([4, 4])
    assert common.assign(labels, torch.tensor([0, 0]), torch.tensor([2, 4])).item() == 0
    assert labels.tolist() == [4, 4]


def test_only_the_occurrences_that_count_are_assigned():
    values = torch.tensor([0.0, 0.0, 0.0])
    index, new = torch.tensor([0, 1, 0, 1, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    where = torch.tensor([True, True, False, True, False])
    assert common.assign(values, index, new, where).item() == 2
    assert values.tolist() == [1, 4, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Device, backbones, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18()


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(7)
    return torchvision.models.resnet18().state_dict()


def without_head(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def formats(weights):
    body = without_head(weights)
    head = {"feature.weight": torch.zeros(256, 512), "feature.bias": torch.zeros(256), "fc.weight": torch.zeros(9, 256)}
    msceleb = {f"module.{k}": v for k, v in (body | head).items()}
    ours = {f"backbone.{k}": v for k, v in body.items()} | {"head.weight": torch.zeros(7, 9), "margin": torch.zeros(1)}
    return {
        "msceleb, module. prefix and its own heads": {"state_dict": msceleb},
        "msceleb, torchvision's names": {"state_dict": weights},
        "plain state dict": dict(weights),
        "nested prefixes, other heads": {
            "model_state_dict": {f"module.backbone.{k}": v for k, v in body.items()}
            | {f"module.{k}.weight": torch.zeros(7, 512) for k in ("head", "classifier")}
        },
        "without batch counters": {k: v for k, v in weights.items() if "num_batches" not in k},
        "model.pt of this project": {"networks": [ours, {"backbone.other": torch.zeros(1)}], "method": "x"},
    }


@pytest.mark.parametrize("name", formats({"fc.weight": torch.zeros(1)}))
def test_every_published_format_of_weights_is_loaded_whole(name, weights, tmp_path):
    torch.save(formats(weights)[name], tmp_path / "w.pth")
    model = resnet()
    loaded = common.load_pretrained(model, tmp_path / "w.pth")
    assert loaded == (100 if name == "without batch counters" else 120)
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in without_head(weights).items() if "num_batches" not in k)
    assert torch.equal(model.fc.weight, resnet().fc.weight)  # the head is not touched


def test_weights_of_another_backbone_are_refused_with_both_key_sets(weights, tmp_path):
    torch.save({k: v for k, v in weights.items() if not k.startswith("layer4.1.")}, tmp_path / "w.pth")
    model = resnet()
    with pytest.raises(UserError, match="layer4.1.bn1.bias") as error:
        common.load_pretrained(model, tmp_path / "w.pth")
    assert "the file has" in str(error.value) and "the network has" in str(error.value)
    untouched = resnet().state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"features.0.weight": torch.zeros(3)},
        lambda s: s | {"conv1.weight": torch.zeros(64, 1, 7, 7)},
        lambda s: {"features." + k: v for k, v in s.items()},
    ],
)
def test_a_tensor_too_many_or_of_another_shape_is_refused(change, weights, tmp_path):
    torch.save(change(dict(weights)), tmp_path / "w.pth")
    with pytest.raises(UserError, match="another backbone"):
        common.load_pretrained(resnet(), tmp_path / "w.pth")


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "resnet50_ft_weight.pkl").write_bytes(b"anything")
    with pytest.raises(UserError, match="convert"):
        common.load_pretrained(resnet(), tmp_path / "resnet50_ft_weight.pkl")


def test_make_backbone_loads_what_it_is_told_to(weights, tmp_path, capsys):
    torch.save(weights, tmp_path / "w.pth")
    backbone, width = common.make_backbone(cocuring.parse_args(["--pretrained", str(tmp_path / "w.pth")]))
    assert width == 512 and torch.equal(backbone.conv1.weight, weights["conv1.weight"])
    assert "120 tensors" in capsys.readouterr().out
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_weights_under_the_keys_of_other_projects(key, weights, tmp_path):
    torch.save({key: weights, "epoch": 3}, tmp_path / "w.pth")
    model = resnet()
    common.load_pretrained(model, tmp_path / "w.pth")
    assert torch.equal(model.conv1.weight, weights["conv1.weight"])


@pytest.mark.parametrize(
    "content",
    [{"state_dict": [1]}, {1: torch.zeros(3)}, {"networks": []}, {"networks": [torch.zeros(3)]}, {"table": 1}, {}],
)
def test_checkpoints_without_weights_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth: the weights are of another backbone, .* the network has: bn1.bias"):
        common.load_pretrained(resnet(), tmp_path / "w.pth")


def test_imagenet_weights_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setitem(common.BACKBONES, "resnet18", lambda weights=None: asked.append(weights) or resnet())
    common.make_backbone(cocuring.parse_args(["--pretrained", "imagenet"]))
    assert asked == ["IMAGENET1K_V1"]


@pytest.mark.parametrize("error", [EOFError(), RuntimeError("invalid hash value"), OSError("no network")])
def test_imagenet_weights_that_cannot_be_had_are_one_line(error, monkeypatch):
    def fail(weights=None):
        raise error

    monkeypatch.setitem(common.BACKBONES, "resnet18", fail)
    with pytest.raises(UserError, match=f"--pretrained imagenet for resnet18: .*{type(error).__name__}.*checkpoints"):
        common.make_backbone(cocuring.parse_args(["--pretrained", "imagenet"]))


def test_weights_that_a_backbone_does_not_have_are_refused(monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "own", lambda: resnet())  # takes no weights
    monkeypatch.setitem(common.PRETRAINED, ".own", "own")
    assert common.backbone_of("some/file.own") == "own" and common.backbone_of("file.pth") is None
    args = cocuring.parse_args([])
    args.pretrained = "x.own"
    with pytest.raises(UserError, match="belongs to --backbone own"):
        common.make_backbone(args)
    args.pretrained, args.backbone = "imagenet", "own"
    with pytest.raises(UserError, match="imagenet for .*: not there"):
        common.make_backbone(args)


def test_a_head_computes_in_float32_whatever_its_backbone_does():
    classifier = Classifier(nn.Linear(3, 5), 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier.backbone(torch.ones(1, 3)).dtype == torch.bfloat16
        logits = classifier(torch.ones(1, 3))
    assert logits.shape == (1, 2) and logits.dtype == torch.float32


def test_backbones_and_heads_have_learning_rates_of_their_own():
    args = cocuring.parse_args(["--lr", "0.1", "--head-lr", "0.5"])
    networks = [Classifier(nn.Linear(3, 5), 5, 2) for _ in range(2)]
    backbone, heads = parameter_groups(networks, args)
    assert (backbone["lr"], heads["lr"]) == (0.1, 0.5)
    assert [p.shape[0] for p in backbone["params"]] == [5] * 4 and [p.shape[0] for p in heads["params"]] == [2] * 4


def test_networks_are_laid_out_for_convolutions():
    network = to_device(nn.Conv2d(3, 8, 3), CPU, cocuring.parse_args([]))
    assert network.weight.is_contiguous(memory_format=torch.channels_last)


def test_checkpoints_hold_what_was_saved_and_replace_atomically(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, epoch=1, weights={"a": torch.ones(2)})
    assert common.load_checkpoint(path)["epoch"] == 1

    def half(file, content):
        with open(file, "wb") as opened:
            opened.write(content[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(path, epoch=2)
    assert common.load_checkpoint(path)["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def damaged(path, how):
    """A file of that name which is no checkpoint: text, unsafe, cut, or with a bit flipped."""
    torch.save({"x": Evil()} if how == "unsafe" else {"weights": torch.zeros(1000)}, path)
    content = path.read_bytes()
    if how == "cut":
        content = content[:2000]
    elif how == "flipped":
        with zipfile.ZipFile(path) as archive:
            place = next(info.header_offset for info in archive.infolist() if info.filename.endswith("/data/0")) + 2000
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    elif how != "unsafe":
        content = how
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", [b"", b"no checkpoint", "unsafe", "cut", "flipped"])
def test_a_damaged_or_unsafe_checkpoint_is_refused(how, tmp_path, capsys):
    with pytest.raises(UserError, match="bad.pt") as error:
        common.load_checkpoint(damaged(tmp_path / "bad.pt", how))
    assert "executed" not in capsys.readouterr().out
    assert "weights_only" not in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_checkpoint_that_is_missing_a_folder_or_no_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("list.pt", "folder.pt", "none.pt"):
        with pytest.raises(UserError, match=name):
            common.load_checkpoint(tmp_path / name)


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **_: asked.append(device.type) or torch.tensor(0.0))
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        common.find_device("auto")
    assert asked == ["cuda", "cpu"]


def test_bf16_is_native_from_ampere_on(monkeypatch):
    common.has_bf16.cache_clear()
    for index, (capability, native) in enumerate([((7, 5), False), ((8, 0), True), ((9, 0), True)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert common.has_bf16(torch.device("cuda", index)) == native
    common.has_bf16.cache_clear()


def test_weights_that_were_saved_on_a_gpu_are_loaded_on_the_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"a": torch.ones(3)}, tmp_path / "gpu.pt")
    assert common.load_checkpoint(tmp_path / "gpu.pt")["a"].device.type == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "nonsense", "meta", "cpu:-1", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}"):
        common.find_device(name)


def test_a_device_without_float64_is_refused(monkeypatch):
    def zeros(*shape, dtype=torch.float32, device=None):  # as on Apple's mps
        if dtype == torch.float64:
            raise TypeError("no float64 here")
        return torch.tensor(0.0)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match="--device mps: .*no float64 here"):
        common.find_device("mps")


def test_auto_precision_is_bf16_only_where_it_is_native(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(common, "has_bf16", lambda device: native)
        with common.autocast(CPU, "auto"):
            assert (nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16) == native
    with common.autocast(CPU, "fp32"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
    with common.autocast(CPU, "bf16"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


def test_means_of_an_epoch_by_hand():
    means = common.Means()
    for loss, right, count in ((1.0, [True, False], 3), (2.0, [True, True, True], 4)):
        means.add("loss", total=torch.tensor(loss, requires_grad=True))
        means.add("accuracy", train=torch.tensor(right))
        means.add("relabel", this_epoch=torch.tensor(count))
    # a bool counts samples, a float steps, an integer adds up
    assert means.result() == {"loss/total": 1.5, "accuracy/train": 0.8, "relabel/this_epoch": 7}


def test_means_of_vectors_and_among_some():
    means = common.Means()
    means.add("threshold", class_=torch.tensor([0.5, 9.0]), among=torch.tensor([True, False]))
    means.add("threshold", class_=torch.tensor([0.7, 0.4]), among=torch.tensor([True, True]))
    means.add("share", kept=torch.tensor([True, False, True]), among=torch.tensor([True, True, False]))
    means.add("share", none=torch.tensor([True, False]), among=torch.tensor([False, False]))
    got = means.result()
    assert got["threshold/class_"] == pytest.approx([0.6, 0.4])
    assert got["share/kept"] == 0.5 and got["share/none"] == 0  # nothing counted


def test_what_does_not_count_may_be_undefined():
    means = common.Means()
    means.add("weight", low=torch.tensor([float("nan"), 2.0]), among=torch.tensor([False, True]))
    assert means.result()["weight/low"] == [0, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_total_loss_that_is_not_finite_names_its_step(value):
    means = common.Means()
    for loss in (1.0, value, 2.0):
        means.add("loss", total=torch.tensor(loss), part=torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="step 2 of 3"):
        means.result()


def test_a_common_class_shows_other_samples_in_another_epoch():
    labels = torch.tensor([0] * 70 + [1] * 25 + [3] * 5)
    one, two = (set(common.balanced_order(labels, common.generator_of(epoch)).tolist()) for epoch in (1, 2))
    assert one != two


def test_images_lie_on_a_gpu_if_a_third_of_its_free_memory_holds_them(monkeypatch):
    class Uploaded:
        def numel(self):
            return 150

        def to(self, device):
            return "on the device"

    for free, resident in ((449, False), (451, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10_000))
        images = common.Images(Uploaded(), 20, torch.device("cuda"))
        assert images.resident == resident == (images.images == "on the device")


@pytest.mark.parametrize("size, step", [(8, 512), (256, 512), (512, 128), (6000, 1)])
def test_large_images_are_predicted_fewer_at_once(size, step, monkeypatch):
    split = common.Images(images(600, h=8, w=8), size, CPU)
    split.to_input = lambda batch: batch
    got = list(split)
    assert len(got[0]) == step and torch.equal(torch.cat(got), split.images)
