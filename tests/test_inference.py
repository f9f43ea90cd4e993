"""Checkpoints that no script has written: one line each, and neither code nor memory taken for what is in them."""

import json

from support.inference import load_model, restore_of
from support.networks import Classifier

import pytest
import torch

import cocuring
import common
import scn
from common import UserError

CPU = torch.device("cpu")


@pytest.fixture
def state(tiny):
    """The content of a model.pt of cocuring.py, as Run.finish writes it."""
    args = cocuring.parse_args(["--size", "32", "--precision", "fp32"])
    settings = {key: value for key, value in vars(args).items() if key not in ("preset", "argv")}
    networks = [network.state_dict() for network in cocuring.make_networks(args, 3)]
    settings = json.loads(json.dumps(settings))
    return {"method": "cocuring", "classes": ["a", "b", "c"], "args": settings, "networks": networks}


@pytest.fixture
def load(tmp_path):
    """load(state) -> what load_model makes of a file with it."""

    def save_and_load(state, **how):
        common.save_checkpoint(tmp_path / "model.pt", **state)
        return load_model(tmp_path / "model.pt", CPU, **how)

    return save_and_load


def refused(load, *what, **how):
    with pytest.raises(UserError, match="model.pt: ") as error:
        load(*what, **how)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and "weights_only" not in message
    return message


def test_a_model_is_restored_as_it_was(state, load):
    loaded, predictor = load(state)
    images = torch.randint(256, (5, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probs, va = predictor(images)
    assert va is None and probs.shape == (5, 3) and loaded["classes"] == state["classes"]
    torch.testing.assert_close(probs.sum(1), torch.ones(5))
    x, wanted = common.network_input(images, 32), 0
    for weights in state["networks"]:
        network = Classifier(*common.make_backbone(cocuring.parse_args([])), 3)
        network.load_state_dict(weights)
        wanted = wanted + network.eval()(x).softmax(1) / 2
    torch.testing.assert_close(probs, wanted.detach())


def test_the_method_has_to_be_the_one_that_is_asked_for(state, load):
    load(state, method="cocuring", restore=cocuring.restore)
    assert "of cocuring, not of scn" in refused(load, state, method="scn", restore=scn.restore)


def edit(**values):
    """What changes entries of a checkpoint; those of its arguments are named args_<name>, None removes them."""

    def change(state):
        for key, value in values.items():
            entries = state["args"] if key.startswith("args_") else state
            key = key.removeprefix("args_")
            entries.pop(key, None)
            if value is not None:
                entries[key] = value

    return change


def weights(key, change):
    def change_weights(state):
        for network in state["networks"]:
            network[key] = change(network[key])

    return change_weights


def nan(value):
    value = value.clone()
    value.view(-1)[-1] = float("nan")
    return value


BAD = {
    "a network too few": lambda state: state["networks"].pop(),
    "a network too many": lambda state: state["networks"].append(state["networks"][0]),
    "no network": edit(networks=[]),
    "networks that are none": edit(networks=[1, 2]),
    "a tensor that is none": weights("head.bias", lambda value: "x"),
    "a weight that is missing": lambda state: state["networks"][0].pop("head.weight"),
    "another shape": weights("head.weight", lambda value: value[:, :3]),
    "not a number": weights("head.weight", nan),
    "infinite": weights("backbone.bn.running_mean", lambda value: value / 0),
    "infinite where nobody sees it": weights("backbone.bn.bias", lambda value: value - torch.inf),
    "variances below zero": weights("backbone.bn.running_var", lambda value: -1 - value),
    "a class too many": lambda state: state["classes"].append("joy"),
    "two classes of one name": lambda state: state["classes"].__setitem__(0, state["classes"][1]),
    "classes that are numbers": edit(classes=list(range(7))),
    "no classes": edit(classes=None),
    "arguments that are no dict": edit(args=[1]),
    "no arguments": edit(args={}),
    "no size": edit(args_size=None),
    "a huge size": edit(args_size=10**8),
    "a size of 0": edit(args_size=0),
    "a size that no flag takes": edit(args_size=4097),
    "a size that is none": edit(args_size="32"),
    "no precision": edit(args_precision=None),
    "a precision that is none": edit(args_precision="x"),
    "no backbone": edit(args_backbone=None),
    "a backbone that is none": edit(args_backbone=["resnet18"]),
    "more networks than there are": edit(args_networks=3),
    "networks that no machine holds": edit(args_networks=10**8),
    "a number of networks that is none": edit(args_networks="many"),
    "no method": edit(method=None),
    "a method that is no name": edit(method=7),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_no_script_has_written_is_one_line(case, state, load):
    BAD[case](state)
    refused(load, state)


def test_no_memory_is_taken_for_what_the_arguments_say(state, load, monkeypatch):
    wide = []

    class Wide(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Flatten(), torch.nn.Linear(10**7, 10**7))  # 400 TB
            self.fc = torch.nn.Linear(32, 10)
            wide.append(self[1].weight.device.type)

    monkeypatch.setitem(common.BACKBONES, "wide", Wide)
    state["args"]["backbone"] = "wide"
    assert "do not fit" in refused(load, state)
    assert set(wide) == {"meta"}


def test_a_file_that_is_cut_or_has_a_bit_flipped(state, load, tmp_path):
    load(state)
    content = (tmp_path / "model.pt").read_bytes()
    assert b"fp32" in content
    for changed in (content[: len(content) // 2], content.replace(b"fp32", b"fp33"), b"", b"PK\x03\x04"):
        (tmp_path / "model.pt").write_bytes(changed)
        assert "cannot be loaded" in refused(load_model, tmp_path / "model.pt", CPU)


@pytest.mark.parametrize(
    "method, words",
    [
        ("common", "no function restore"),
        ("support", "no script"),
        ("../cocuring", "no script"),
        ("os", "no script"),
        ("", "no script"),
        ("tests.conftest", "no script"),
        ("tests/conftest", "no script"),
    ],
)
def test_only_scripts_of_methods_restore(method, words):
    with pytest.raises(UserError, match=words):
        restore_of(method, "model.pt")
    assert restore_of("scn", "model.pt") is scn.restore
