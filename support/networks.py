"""Heads on a backbone, a moving average, and how networks come to a device and an optimiser."""

import copy

import torch
from torch import Tensor, nn


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


def to_device(network: nn.Module, device: torch.device, args) -> nn.Module:
    """The network on the device, in the memory layout that is fast for convolutions; compiled with --compile."""
    network = network.to(device, memory_format=torch.channels_last)
    if getattr(args, "compile", False):
        network.compile()
    return network


def parameter_groups(networks: list[nn.Module], args) -> list[dict]:
    """Two groups for an optimiser: backbones at the learning rate --lr, all other parameters at --head-lr."""
    named = [item for network in networks for item in network.named_parameters()]
    backbones, heads = ([p for n, p in named if n.startswith("backbone.") == kind] for kind in (True, False))
    return [dict(params=backbones, lr=args.lr), dict(params=heads, lr=args.head_lr)]
