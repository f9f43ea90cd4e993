"""Heads on a backbone, a moving average, a discriminator's blocks; how networks come to a device and an optimiser."""

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from common import Images


class Head(nn.Linear):
    """A linear layer in float32 whatever the precision of the backbone: in bf16 many probabilities would be equal."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


class Classifier(nn.Module):
    """A backbone and a linear head: images (N, 3, H, W) -> logits (N, C), float32."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.head = Head(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Averaged(nn.Module):
    """`module`: the moving average of a network, weights and statistics; the first step copies the network."""

    def __init__(self, network: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay, self.steps = copy.deepcopy(network).requires_grad_(False), decay, 0

    def update(self, network: nn.Module) -> None:
        for own, new in zip(self.module.state_dict().values(), network.state_dict().values()):
            own.lerp_(new, 1 - self.decay) if self.steps and own.is_floating_point() else own.copy_(new)
        self.steps += 1

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, steps: int) -> None:
        self.steps = steps


@contextmanager
def weights_computed(*networks: nn.Module | None):
    """In this context each spectrally normalised weight is computed once, now: enter it before autocast.

    Within autocast CUDA has the norms in bf16, and up to PyTorch 2.10 without their gradient in linear layers
    (github.com/pytorch/pytorch/issues/112583).
    """
    with parametrize.cached():
        for module in (module for network in filter(None, networks) for module in network.modules()):
            if parametrize.is_parametrized(module, "weight"):
                module.weight  # noqa: B018 - an attribute that is computed
        yield


class SelfAttention(nn.Module):
    """SAGAN's self-attention (H. Zhang et al., 2019; keys and values pooled as in its code), first the identity."""

    def __init__(self, c: int):
        super().__init__()
        self.query = spectral_norm(nn.Conv2d(c, max(1, c // 8), 1, bias=False))
        self.key = spectral_norm(nn.Conv2d(c, max(1, c // 8), 1, bias=False))
        self.value = spectral_norm(nn.Conv2d(c, max(1, c // 2), 1, bias=False))
        self.out = spectral_norm(nn.Conv2d(max(1, c // 2), c, 1, bias=False))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).flatten(2).transpose(1, 2)  # (N, H W, c / 8)
        k, v = (F.max_pool2d(part(x), 2).flatten(2) for part in (self.key, self.value))  # (N, c', H W / 4)
        attended = ((q @ k).softmax(2) @ v.transpose(1, 2)).transpose(1, 2)
        return x + self.gain * self.out(attended.unflatten(2, x.shape[2:]))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (SAGAN's discriminator); `halve`: the size.

    first: on the image itself, where a ReLU would cut all that is darker than mid-grey.
    """

    def __init__(self, c_in: int, c: int, halve: bool = True, first: bool = False):
        super().__init__()
        self.halve, self.first = halve, first
        self.one, self.two = (spectral_norm(nn.Conv2d(n, c, 3, padding=1)) for n in (c_in, c))
        self.shortcut = spectral_norm(nn.Conv2d(c_in, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(F.relu(self.one(x if self.first else F.relu(x))))
        if self.halve:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return y + self.shortcut(x)


class ResidualMLP(nn.Module):
    """A vector (N, inputs) -> features (N, width): a layer, then four residual branches one after another.

    Each branch has two layers; all are spectrally normalised.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.inlet = spectral_norm(nn.Linear(inputs, width))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.ReLU(), spectral_norm(nn.Linear(width, width)), nn.ReLU(),
                          spectral_norm(nn.Linear(width, width))) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for branch in self.branches:
            x = x + branch(x)
        return x


class Zero(nn.Module):
    """A score that is not used: 0, so that the mean over all scores gives the others the weight they always have."""

    def forward(self, features: Tensor) -> Tensor:
        return features.new_zeros(len(features), 1)


def to_device(network: nn.Module, device: torch.device, args) -> nn.Module:
    """The network on the device, in the memory layout that is fast for convolutions; compiled with --compile."""
    network = network.to(device, memory_format=torch.channels_last)
    if getattr(args, "compile", False):
        network.compile()
    return network


def spread_inputs(images: Images, count: int = 512) -> Tensor:
    """Network inputs (B, 3, H, W) of `count` images (fewer if there are fewer), spread evenly over the split.

    For weights that need the statistics of their data: the first images of a folder are all of one class.
    """
    count = max(1, min(count, len(images), 2**25 // images.size**2))  # fewer than 512 from 257 px on, as Images
    ((_, _, chosen),) = images.batches(torch.arange(count) * len(images) // count, [slice(None)])
    return images.to_input(chosen)


def parameter_groups(networks: list[nn.Module], args) -> list[dict]:
    """Two groups for an optimiser: backbones at the learning rate --lr, all other parameters at --head-lr."""
    named = [item for network in networks for item in network.named_parameters()]
    backbones, heads = ([p for n, p in named if n.startswith("backbone.") == kind] for kind in (True, False))
    return [dict(params=backbones, lr=args.lr), dict(params=heads, lr=args.head_lr)]
