"""What a step of training costs: layers whose operations are known, and rare penalties."""

from dataclasses import replace

import pytest
import torch

from custom_models import make_config
from custom_models.arithmetic import flop_of_training


def test_it_is_that_of_the_layers():
    """A multiplication and an addition for each weight, place and image; twice again backward."""
    config = make_config("cvae", "quick")
    model, places = config.build(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: places.update(
                    {name: layer.weight.numel() * _places(layer, inputs[0], output)}
                )
            )
    images, labels = torch.zeros(1, 3, 28, 28), torch.zeros(1, dtype=torch.long)
    model.training_step(images, labels, model.optimizers())
    first = next(iter(places))  # no gradient is needed of the images themselves
    expected = 2 * (3 * sum(places.values()) - places[first])
    assert flop_of_training(config) == pytest.approx(expected, rel=1e-9)


def _places(layer: torch.nn.Module, taken: torch.Tensor, given: torch.Tensor) -> int:
    """How often each weight of the layer is used for an image."""
    if isinstance(layer, torch.nn.Linear):
        return 1
    side = taken if isinstance(layer, torch.nn.ConvTranspose2d) else given
    return side.shape[2] * side.shape[3]


def test_penalties_of_some_steps_count_by_their_share():
    widths = {"generator_channels": (32, 16, 16), "discriminator_channels": (16, 16, 32)}
    own = make_config("dcgan", "best", **widths)
    always, never = (
        flop_of_training(replace(own, penalty_interval=interval)) for interval in (1, 2)
    )
    rarely = flop_of_training(replace(own, penalty_interval=4))
    # a + b / interval
    assert always > never > rarely
    assert always - never == pytest.approx(2 * (never - rarely), rel=1e-6)


def test_it_leaves_the_caller_s_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    flop_of_training(make_config("cvae", "quick"))
    assert torch.equal(torch.rand(2), expected)
