"""Runs a script on the CPU, then on a second device that is as strict as a GPU. Both have to log the same.

    PYTHONPATH=.:tests python tests/second_device.py FOLDER scn --noise 0.4

A tensor of the second device hides one on the CPU. As with CUDA, an operation on tensors of both devices raises, except
for single numbers and for indices, and so does a generator of the CPU. On this device the run is interrupted after its
second epoch, and resumed with the images on the device.
"""

import importlib
import sys
from pathlib import Path

from support import figures, runs, toyfaces

import numpy as np
import pytest
import torch
from conftest import Tiny, lines
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import common

SECOND = "second:0"
TAKES_INDICES = ("aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Hidden(torch.Tensor):
    """A tensor of the second device; `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device(SECOND), **layout)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})

    def __deepcopy__(self, memo):
        copied = Hidden(self.inner.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()


class Strict(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


def run(function, arguments, options):
    """Do an operation on the CPU; its result is on the device where a GPU would have it."""
    leaves, tree = tree_flatten((arguments, options))
    hidden = [leaf for leaf in leaves if isinstance(leaf, Hidden)]
    plain = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Hidden)]
    asked = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
    name = function._schema.name
    there = "second" in asked if asked else bool(hidden)  # where the result is
    if name == "aten::copy_":
        there = isinstance(arguments[0], Hidden)
    elif name != "aten::_to_copy" and there:
        indices = arguments[1] if name in TAKES_INDICES else ()
        strange = [t for t in plain if t.dim() and not any(t is index for index in indices)]
        if strange or options.get("generator") is not None:
            raise RuntimeError(f"{function}: tensors or generators of both devices, {[t.shape for t in strange]}")
    known = {id(tensor.inner): tensor for tensor in hidden}
    leaves = [leaf.inner if isinstance(leaf, Hidden) else leaf for leaf in leaves]
    leaves = [torch.device("cpu") if isinstance(leaf, torch.device) else leaf for leaf in leaves]
    arguments, options = tree_unflatten(leaves, tree)
    result = function(*arguments, **options)

    def hide(value):
        return known[id(value)] if id(value) in known else Hidden(value)

    return tree_map_only(torch.Tensor, hide, result) if there else result


class Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def register() -> None:
    """To be called before any gradient is computed."""
    backend_registration._setup_privateuseone_for_python_backend("second", backend_module=Module())
    torch.tensor = make_tensor


def make_tensor(*arguments, made=torch.tensor, device=None, **options):
    """torch.tensor, which makes tensors of its own device behind the back of a mode."""
    tensor = made(*arguments, **options)
    return tensor if device is None else tensor.to(device)


def interrupted(self, epoch, *arguments, end_epoch=runs.Run.end_epoch):
    end_epoch(self, epoch, *arguments)
    if epoch == 2:
        raise KeyboardInterrupt


def resident(self, images, size, device, *more, make=common.Images.__init__):
    """As on a GPU with memory enough: all images lie on the device."""
    make(self, images, size, device, *more)
    self.images, self.resident = images.to(device), True


def main(folder: str, method: str, *flags: str) -> None:
    main_of = importlib.import_module(method).main
    argv = [*flags, "--out", folder, "--cache", f"{folder}/cache", "--precision", "fp32"]
    toyfaces.SPLITS = {"train": 48, "valid": 16, "test": 16}
    common.BACKBONES["resnet18"] = Tiny
    figures.render = lambda figure: np.full((1, 2, 3), 99, np.uint8)  # they are made, but pixels take most of the time
    register()
    assert main_of([*argv, "--name", "cpu", "--device", "cpu"]) == 0

    argv += ["--name", "second", "--device", SECOND]
    with Strict(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "end_epoch", interrupted)
        assert main_of(argv) == 130
    saved, save = [], torch.save
    with Strict(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Images, "__init__", resident)
        patch.setattr(torch, "save", lambda state, file: saved.append(state) or save(state, file))
        assert main_of([*argv, "--resume"]) == 0
    assert "networks" in saved[-1] and not any(isinstance(leaf, Hidden) for leaf in tree_leaves(saved[-1]))  # model.pt
    for there, here in zip(lines(Path(folder, "second")), lines(Path(folder, "cpu")), strict=True):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-4, nan_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
