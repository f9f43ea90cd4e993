"""The foundation: plan of random draws, augmentation against torchvision, backbones, checkpoints, metrics."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from torch import nn
from torchvision.transforms.autoaugment import _apply_op

import common
from common import UserError

CPU = torch.device("cpu")


def images(n=6, c=3, h=20, w=20, seed=0):
    return torch.randint(256, (n, c, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# Batches and the plan of an epoch


@pytest.mark.parametrize("count, size, lengths", [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (8, 4, [4, 4]), (5, 5, [5]), (3, 2, [3]), (1, 1, [1])])
def test_batches_cover_the_data_and_a_last_sample_joins_the_batch_before(count, size, lengths):
    slices = common.batch_slices(count, size)
    assert [s.stop - s.start for s in slices] == lengths
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(count))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="--batch-size 6"):
        common.batch_slices(5, 6)


def test_pixels_give_each_batch_its_images_in_order():
    x, order = images(7), torch.tensor([6, 0, 3, 1, 5, 2, 4])
    pixels = common.Pixels(x, CPU)
    assert not pixels.streamed
    got = list(pixels.batches(order, common.batch_slices(7, 3)))
    assert torch.cat([index for _, index, _ in got]).tolist() == order.tolist()
    assert torch.equal(torch.cat([batch for _, _, batch in got]), x[order])


def test_images_that_do_not_fit_are_streamed_by_a_thread_that_ends():
    before = threading.active_count()
    pixels = common.Pixels(images(7), torch.device("meta"))  # a device on which they do not lie
    assert pixels.streamed
    got = list(pixels.batches(torch.arange(7), common.batch_slices(7, 3)))
    assert [(part.start, len(index), batch.shape[0], batch.device.type) for part, index, batch in got] == [(0, 3, 3, "meta"), (3, 4, 4, "meta")]
    for _ in pixels.batches(torch.arange(7), common.batch_slices(7, 2)):
        break  # leaving early stops the thread too
    assert threading.active_count() == before


def test_an_error_of_the_reading_thread_is_raised():
    pixels = common.Pixels(images(3), torch.device("meta"))
    with pytest.raises(IndexError):
        list(pixels.batches(torch.tensor([0, 1, 7]), [slice(0, 3)]))


def test_a_plan_is_a_function_of_seed_and_epoch():
    def numbers(seed, epoch):
        plan = common.EpochPlan(50, seed, epoch, CPU)
        return plan.order.tolist(), plan.draw("flip", slice(0, 50)).tolist(), torch.rand(3).tolist()

    assert numbers(1, 2) == numbers(1, 2)
    for other in (numbers(1, 3), numbers(2, 2)):
        assert all(a != b for a, b in zip(numbers(1, 2), other))
    assert sorted(numbers(1, 2)[0]) == list(range(50))


def test_a_draw_depends_on_its_name_and_place_alone():
    first, second = common.EpochPlan(40, 1, 1, CPU), common.EpochPlan(40, 1, 1, CPU)
    whole = first.draw("flip", slice(0, 40))
    second.draw("another name", slice(0, 7))
    parts = [second.draw("flip", s) for s in common.batch_slices(40, 7)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, first.draw("crop x", slice(0, 40)))


def test_oversampling_draws_the_classes_equally_and_their_samples_evenly():
    labels = torch.tensor([0] * 70 + [1] * 25 + [3] * 5)
    order = common.EpochPlan(100, 1, 1, CPU, oversample_by=labels).order
    assert len(order) == 100
    per_class = torch.bincount(labels[order]).tolist()
    assert sorted(per_class, reverse=True) == [34, 33, 33, 0]
    times = torch.bincount(order, minlength=100)
    assert times[:70].max() == 1 and set(times[70:95].tolist()) == {1, 2} and set(times[95:].tolist()) == {6, 7}
    other = common.EpochPlan(100, 1, 2, CPU, oversample_by=labels).order
    assert not torch.equal(order, other)


def test_the_later_occurrence_decides_the_label_of_a_sample_drawn_twice():
    labels = torch.tensor([0, 0, 0, 0])
    changed = common.set_labels(labels, torch.tensor([1, 2, 1, 3]), torch.tensor([5, 6, 7, 0]))
    assert labels.tolist() == [0, 7, 6, 0] and changed.item() == 2


def test_a_sample_drawn_twice_that_ends_as_it_was_did_not_change():
    labels = torch.tensor([4, 4])
    assert common.set_labels(labels, torch.tensor([0, 0]), torch.tensor([2, 4])).item() == 0
    assert labels.tolist() == [4, 4]


# Augmentation


def test_flip_mirrors_where_the_draw_is_below_one_half():
    x = images(4)
    got = common.random_flip(x, torch.tensor([0.0, 0.49, 0.5, 0.99]))
    assert torch.equal(got[:2], TF.horizontal_flip(x[:2])) and torch.equal(got[2:], x[2:])


def test_crop_equals_torchvisions_pad_and_crop():
    x = images(5, h=20, w=16)
    u, v = torch.tensor([0.0, 0.3, 0.5, 0.7, 0.999]), torch.tensor([0.999, 0.0, 0.5, 0.2, 0.6])
    got = common.random_crop(x, u, v, 3)
    for i in range(5):
        top, left = int(u[i] * 7), int(v[i] * 7)
        assert torch.equal(got[i], TF.crop(TF.pad(x[i], [3, 3, 3, 3]), top, left, 20, 16))
    assert torch.equal(common.random_crop(x, torch.full((5,), 0.5), torch.full((5,), 0.5), 3), x)  # the middle is the image


@pytest.mark.parametrize("c", [1, 3])
def test_colour_jitter_equals_torchvisions_steps_sample_by_sample(c):
    x = images(4, c).float()
    factors = torch.tensor([[1.0, 1.0, 1.0], [1.3, 0.7, 1.2], [0.7, 1.4, 0.5], [0.9, 1.1, 0.0]])
    got = common.color_jitter(x, *factors.T)
    for i, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        wanted = TF.adjust_contrast(TF.adjust_brightness(x[i] / 255, brightness), contrast)
        wanted = TF.adjust_saturation(wanted, saturation) if c == 3 else wanted
        torch.testing.assert_close(got[i] / 255, wanted, atol=2e-4, rtol=0)


def augmented(x, part, epoch=1, **kw):
    return common.augment(x, common.EpochPlan(12, 1, epoch, CPU), part, **(kw or {"crop": 2, "jitter": 0.4}))


def test_the_same_image_twice_in_a_batch_differs():
    x = images(1).expand(8, -1, -1, -1)
    got = augmented(x, slice(0, 8))
    assert all(not torch.equal(got[i], got[j]) for i in range(8) for j in range(i))


def test_the_same_place_in_the_same_epoch_repeats_and_in_another_does_not():
    x = images(8)
    assert torch.equal(augmented(x, slice(2, 10)), augmented(x, slice(2, 10)))
    assert not torch.equal(augmented(x, slice(2, 10)), augmented(x, slice(2, 10), epoch=2))
    assert not torch.equal(augmented(x, slice(2, 10)), augmented(x, slice(3, 11)))


def test_augmentation_does_not_depend_on_the_batch_split():
    x = images(12)
    whole = augmented(x, slice(0, 12))
    parts = torch.cat([augmented(x[s], s) for s in common.batch_slices(12, 5)])
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)


def test_without_crop_and_jitter_only_the_flip_is_left():
    x = images(12)
    got = augmented(x, slice(0, 12), crop=0, jitter=0.0)
    u = common.EpochPlan(12, 1, 1, CPU).draw("flip", slice(0, 12))
    assert torch.equal(got, common.random_flip(x, u)) and 0 < (u < 0.5).sum() < 12


def test_jitter_stays_within_its_strength_and_the_range_of_pixels():
    grey = torch.full((12, 1, 8, 8), 100, dtype=torch.uint8)
    got = augmented(grey, slice(0, 12), crop=0, jitter=0.3)[:, 0, 0, 0]
    assert got.min() >= 70 and got.max() <= 130 and got.unique().numel() == 12
    white = augmented(torch.full((12, 3, 8, 8), 255, dtype=torch.uint8), slice(0, 12), crop=0, jitter=0.9)
    assert white.max() <= 255 and white.min() >= 0


def odd_images(c):
    """Noise, one value, few values, low contrast, a ramp: what tables and equalisation stumble over."""
    x = images(7, 3, 48, 40, seed=3)
    x[1] = 7
    x[2] = x[2] % 2 + 100
    x[3] = x[3] // 4 + 60
    x[4] = torch.arange(40, dtype=torch.uint8) * 6
    x[5, 1] = 255
    x[6] = 0
    return x[:, :c].contiguous()


SPACE = torchvision.transforms.RandAugment()._augmentation_space(31, (48, 40))


def torchvisions(operation, image, magnitude, sign):
    if operation == "invert":
        return TF.invert(image)
    name = "".join(word.capitalize() for word in operation.split()).replace("contrast", "Contrast")
    magnitudes, signed = SPACE[name]
    value = magnitudes[magnitude].item() if magnitudes.ndim else 0.0
    return _apply_op(image, name, value * (sign if signed else 1), torchvision.transforms.InterpolationMode.NEAREST, None)


@pytest.mark.parametrize("operation", common.OPERATIONS)
@pytest.mark.parametrize("c", [1, 3])
def test_every_operation_of_randaugment_is_torchvisions(operation, c):
    x, geometric = odd_images(c), operation in ("shear x", "shear y", "translate x", "translate y", "rotate")
    number = torch.full((len(x),), common.OPERATIONS.index(operation))
    for magnitude in (0, 10, 17, 30):
        for sign in (-1.0, 1.0):
            got = common.apply_operations(x, number, torch.full((len(x),), sign), magnitude)
            for i in range(len(x)):
                difference = (got[i].int() - torchvisions(operation, x[i], magnitude, sign).int()).abs()
                assert (difference > 0).float().mean() <= (0.001 if geometric else 0), (magnitude, sign, i)


def test_operations_are_drawn_and_applied_sample_by_sample():
    x = odd_images(3)[:1].expand(15, -1, -1, -1)
    mixed = common.apply_operations(x, torch.arange(15), torch.ones(15))
    for i in range(15):
        assert torch.equal(mixed[i], common.apply_operations(x[:1], torch.tensor([i]), torch.ones(1))[0])
    plan = common.EpochPlan(600, 1, 1, CPU)
    operation = (plan.draw("operation 0", slice(0, 600)) * len(common.OPERATIONS)).long()
    assert torch.bincount(operation).min() > 20 and operation.max() == 14


def test_randaugment_repeats_in_place_and_does_not_depend_on_the_batch_split():
    x = images(12)
    whole = common.rand_augment(x, common.EpochPlan(12, 1, 1, CPU), slice(0, 12))
    parts = torch.cat([common.rand_augment(x[s], common.EpochPlan(12, 1, 1, CPU), s) for s in common.batch_slices(12, 5)])
    assert torch.equal(whole, parts) and whole.dtype == torch.uint8
    assert not torch.equal(whole, common.rand_augment(x, common.EpochPlan(12, 1, 2, CPU), slice(0, 12)))
    assert torch.equal(common.rand_augment(x, common.EpochPlan(12, 1, 1, CPU), slice(0, 12), layers=0), x)


@pytest.mark.parametrize("c", [1, 3])
def test_network_input_is_resized_and_normalised_as_torchvision_does(c):
    x = images(3, c, 20, 20)
    got = common.network_input(x, 32)
    rgb = x.expand(-1, 3, -1, -1).float() / 255
    wanted = TF.normalize(TF.resize(rgb, [32, 32], antialias=True), common.MEAN, common.STD)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == torch.float32


# Backbones and checkpoints


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
    head = {"feature.weight": torch.zeros(256, 512), "feature.bias": torch.zeros(256), "fc.weight": torch.zeros(99, 256), "fc.bias": torch.zeros(99)}
    return {
        "msceleb, module. prefix and its own heads": {"state_dict": {f"module.{k}": v for k, v in (body | head).items()}},
        "msceleb, torchvision's names": {"state_dict": weights},
        "plain state dict": dict(weights),
        "without batch counters": {k: v for k, v in weights.items() if "num_batches" not in k},
        "model.pt of this project": {"networks": [{f"backbone.{k}": v for k, v in body.items()} | {"head.weight": torch.zeros(7, 512)}], "method": "x"},
    }


@pytest.mark.parametrize("name", formats({"fc.weight": torch.zeros(1)}))
def test_every_published_format_of_weights_is_loaded_whole(name, weights, tmp_path):
    torch.save(formats(weights)[name], tmp_path / "w.pth")
    model = resnet()
    loaded = common.load_pretrained(model, tmp_path / "w.pth")
    assert loaded == (100 if name == "without batch counters" else 120)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in without_head(weights).items() if "num_batches" not in k)
    assert torch.equal(model.fc.weight, resnet().fc.weight)  # the head is not touched


def test_weights_of_another_backbone_are_refused_with_both_key_sets(weights, tmp_path):
    torch.save({k: v for k, v in weights.items() if not k.startswith("layer4.1.")}, tmp_path / "w.pth")
    model = resnet()
    with pytest.raises(UserError, match="layer4.1.bn1.bias") as error:
        common.load_pretrained(model, tmp_path / "w.pth")
    assert "the file has" in str(error.value) and "the network has" in str(error.value)
    untouched = resnet().state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("change", [
    lambda s: s | {"features.0.weight": torch.zeros(3)},
    lambda s: s | {"conv1.weight": torch.zeros(64, 1, 7, 7)},
    lambda s: {"features." + k: v for k, v in s.items()},
])
def test_a_tensor_too_many_or_of_another_shape_is_refused(change, weights, tmp_path):
    torch.save(change(dict(weights)), tmp_path / "w.pth")
    with pytest.raises(UserError, match="another backbone"):
        common.load_pretrained(resnet(), tmp_path / "w.pth")


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "resnet50_ft_weight.pkl").write_bytes(b"anything")
    with pytest.raises(UserError, match="convert"):
        common.load_pretrained(resnet(), tmp_path / "resnet50_ft_weight.pkl")


def test_make_backbone_loads_what_it_is_told_to(weights, tmp_path, capsys):
    import cocuring

    torch.save(weights, tmp_path / "w.pth")
    backbone, width = common.make_backbone(cocuring.parse_args(["--pretrained", str(tmp_path / "w.pth")]))
    assert width == 512 and torch.equal(backbone.conv1.weight, weights["conv1.weight"]) and "120 tensors" in capsys.readouterr().out


def test_checkpoints_hold_what_was_saved_and_replace_atomically(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    common.save_checkpoint(path, epoch=1, weights={"a": torch.ones(2)})
    assert common.load_checkpoint(path)["epoch"] == 1

    def half(state, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(path, epoch=2)
    assert common.load_checkpoint(path)["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_or_unsafe_checkpoint_is_refused(content, tmp_path, capsys):
    path = tmp_path / "bad.pt"
    torch.save({"x": Evil()}, path) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="bad.pt"):
        common.load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_a_truncated_or_missing_checkpoint_is_refused(tmp_path):
    path = tmp_path / "cut.pt"
    common.save_checkpoint(path, weights=torch.zeros(1000))
    path.write_bytes(path.read_bytes()[:2000])
    for file in (path, tmp_path / "none.pt"):
        with pytest.raises(UserError, match=file.name):
            common.load_checkpoint(file)


@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=name):
        common.find_device(name)


def test_auto_precision_is_bf16_only_where_it_is_native(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(common, "has_bf16", lambda device: native)
        with common.autocast(CPU, "auto"):
            assert (nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16) == native
    with common.autocast(CPU, "fp32"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


# Metrics


def test_accuracies_by_hand():
    probs = torch.eye(3)[torch.tensor([0, 0, 1, 1, 0, 2])]
    scalars = common.accuracy_scalars(probs, torch.tensor([0, 0, 0, 0, 1, 2]), ("a", "b", "c"))
    assert scalars == {"accuracy/test": 0.5, "accuracy/test_mean_class": 0.5, "accuracy/class/a": 0.5, "accuracy/class/b": 0.0, "accuracy/class/c": 1.0}


def test_label_metrics_by_hand():
    clean = torch.tensor([0, 1, 2, 0, 1, 2])
    given = torch.tensor([0, 1, 2, 1, 2, 0])  # the last three are corrupted
    current = torch.tensor([0, 2, 2, 0, 2, 1])  # one made wrong, one restored, one changed to another wrong one
    got = common.label_scalars(given, current, clean)
    assert got == pytest.approx({"relabel/changed": 3, "labels/accuracy": 0.5, "relabel/precision": 1 / 3, "relabel/recall": 1 / 3})


def test_label_metrics_say_nothing_where_nothing_is_known():
    labels = torch.tensor([0, 1])
    assert common.label_scalars(labels, labels, None) == {"relabel/changed": 0}
    assert "relabel/precision" not in common.label_scalars(labels, labels, torch.tensor([1, 1]))
    assert "relabel/recall" not in common.label_scalars(labels, labels, labels)


def test_audit_score_is_the_margin_of_the_best_class_over_the_given_one():
    got = common.audit_scores(torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]]), torch.tensor([0, 1]))
    torch.testing.assert_close(got, torch.tensor([0.3, 0.0]))


def test_best_last5_and_final_are_what_their_names_say():
    history = [{"epoch": i + 1, "accuracy/test": a} for i, a in enumerate([0.5, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5])]
    assert common.summary(history) == pytest.approx({"best": 0.9, "last5": 0.3, "final": 0.5, "best_epoch": 2})


def test_a_line_cut_by_a_kill_is_passed_over(tmp_path):
    import cocuring

    run = common.Run(cocuring.parse_args(["--out", str(tmp_path), "--name", "run"]), "cocuring")
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1}) + "\n" + '{"epoch": 2, "acc')
    assert run.history() == [{"epoch": 1}]


def test_event_files_are_written_without_tensorflow(tmp_path):
    code = f"import sys, common; w = common.summary_writer({str(tmp_path)!r}); w.add_scalar('a', 1, 1); w.close(); sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, check=True)
    assert list(tmp_path.glob("events.out.tfevents.*"))


class Constant:
    """A plan whose draws are given by name, 0.5 (the middle of each range) otherwise."""

    def __init__(self, **draws):
        self.draws = {name.replace("_", " "): value for name, value in draws.items()}

    def draw(self, name, part):
        return torch.full((part.stop - part.start,), self.draws.get(name, 0.5))


def test_random_affine_shifts_turns_and_zooms():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def moved(**draws):
        return common.random_affine(images, Constant(**draws), slice(0, 2), 90, 0.25, 0.5)

    torch.testing.assert_close(moved(), images.float(), atol=1e-3, rtol=0)
    shifted = moved(shift_x=1.0)  # a quarter of eight pixels, looked up to the right
    torch.testing.assert_close(shifted[..., :6], images.float()[..., 2:], atol=1e-3, rtol=0)
    assert (shifted[..., 6:] == 0).all()
    turned = moved(rotation=1.0)
    assert any(torch.allclose(turned, images.float().rot90(k, (2, 3)), atol=1e-2) for k in (1, 3))
    zoomed = moved(zoom=0.0)  # half the size: black around
    assert (zoomed[..., :1] == 0).all() and zoomed[..., 3:5, 3:5].mean() > 0


def test_random_affine_draws_for_each_sample():
    images = torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8).expand(6, -1, -1, -1)
    plan = common.EpochPlan(6, 1, 1, torch.device("cpu"))
    whole = common.random_affine(images, plan, slice(0, 6), 10, 0.1, 0.1)
    assert not torch.equal(whole[0], whole[1])
    halves = [common.random_affine(images[:3], plan, part, 10, 0.1, 0.1) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(whole, torch.cat(halves))
