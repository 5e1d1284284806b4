"""What a training costs in arithmetic, whatever machine does it."""

import contextlib
import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from custom_models.config import ModelConfig

BATCH = 8  # an image of a larger batch costs the same


def flop_of_training(config: ModelConfig) -> float:
    """Floating point operations of a training step for each real image that it takes.

    Those of convolutions and matrix products, forward and backward, counted as a step of noise runs
    on the CPU; the mean of as many steps as it takes for a penalty of some of them to come once.
    """
    config = dataclasses.replace(config, batch_size=BATCH)
    side, n = config.image_size, config.images_per_step
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = config.build()
        optimizers = model.optimizers()
        images = torch.rand(n, config.image_channels, side, side) * 2 - 1
        labels = torch.arange(n) % config.n_classes
        steps = getattr(config, "penalty_interval", 1)
        counted = sum(
            _counted(lambda: model.training_step(images, labels, optimizers)) for _ in range(steps)
        )
    return counted / steps / n


def _counted(call) -> int:
    counter = FlopCounterMode(display=False)
    # Its tracker of modules, which a total does not need, fails where a module is given a leaf that
    # requires a gradient, as gradient penalties do.
    counter.mod_tracker = contextlib.nullcontext()
    counter.mod_tracker.parents = {"Global"}
    with counter:
        call()
    return counter.get_total_flops()
