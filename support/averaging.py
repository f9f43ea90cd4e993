"""A moving average of a network, for selection and prediction."""

import copy

from torch import nn


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
