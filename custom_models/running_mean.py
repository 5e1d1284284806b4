"""The running mean of a model's weights, which is what is sampled and evaluated."""

import copy
from itertools import chain

import torch
from torch import nn


class RunningMean:
    """Exponential running mean of a model's parameters and buffers (Polyak and Juditsky 1992).

    PyTorch's `AveragedModel` copies its counter to the GPU at every update, and so waits for all
    that the GPU has still to do; here the counter is a plain number.
    """

    def __init__(self, model: nn.Module, decay: float):
        """decay: share of the past in the mean, [0, 1); less at first (`update`)."""
        self.module = copy.deepcopy(model)
        self.decay, self.updates = decay, 0
        pairs = zip(_tensors(self.module), _tensors(model), strict=True)
        # Counters of batches are taken over as they are.
        averaged, copied = [], []
        for pair in pairs:
            (averaged if pair[0].is_floating_point() else copied).append(pair)
        self.averaged = [list(part) for part in zip(*averaged)]
        self.copied = [list(part) for part in zip(*copied)]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights as they are now; the first time they are the mean."""
        # All tensors at once: hundreds of small operations a step are what a GPU would wait for.
        for means, currents in filter(None, (self.averaged, self.copied)):
            if self.updates > 0 and means[0].is_floating_point():
                # Short at first, so that the initial weights are soon forgotten.
                decay = min((1 + self.updates) / (10 + self.updates), self.decay)
                currents = torch._foreach_lerp(currents, means, decay)
            torch._foreach_copy_(means, currents)
        self.updates += 1


def _tensors(model: nn.Module) -> chain:
    return chain((p.detach() for p in model.parameters()), model.buffers())
