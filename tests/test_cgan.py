"""The conditional GAN: the textbook's numbers, its losses, and that both networks use the class."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from custom_models import cgan, make_config
from custom_models.layers import sides_down_to_four


def build(preset: str = "quick", **changes) -> cgan.Model:
    torch.manual_seed(0)
    return make_config("cgan", preset, **changes).build()


def tiny(**changes) -> cgan.Model:
    return build(**{"base_channels": 8, "image_size": 8, "n_classes": 2, **changes})


def frozen(model: cgan.Model) -> dict:
    networks = {"generator": model.generator, "discriminator": model.discriminator}
    return {name: torch.optim.SGD(part.parameters(), lr=0) for name, part in networks.items()}


def convolutions(module: nn.Module) -> list[tuple[int, int, int, int]]:
    """(inputs, outputs, kernel, stride) of each convolution in its order."""
    return [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]


# ---------------------------------------------------------------------------------------------
# The networks
# ---------------------------------------------------------------------------------------------


def test_at_64_pixels_the_networks_are_those_of_dcgan_and_told_the_class():
    model = build("baseline", image_size=64)
    assert convolutions(model.generator) == [
        (100 + 8, 512, 4, 1),  # noise and class → 4 × 4
        (512, 256, 4, 2),
        (256, 128, 4, 2),
        (128, 64, 4, 2),
        (64, 3, 4, 2),
    ]
    assert convolutions(model.discriminator) == [
        (3 + 8, 64, 4, 2),  # colours and a plane for each class
        (64, 128, 4, 2),
        (128, 256, 4, 2),
        (256, 512, 4, 2),
        (512, 1, 4, 1),
    ]
    kinds = [type(m) for m in model.discriminator.layers]
    block = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, *block * 3, nn.Conv2d, nn.Flatten]
    slopes = [m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * 4
    assert isinstance(model.generator.layers[-1], nn.Tanh)


def test_the_baseline_has_the_textbooks_settings():
    model = build("baseline")
    config = model.config
    assert (config.lr, config.beta1, config.batch_size, config.latent_dim) == (2e-4, 0.5, 128, 100)
    assert "best" not in cgan.PRESETS
    optimizers = model.optimizers()
    for name in ("generator", "discriminator"):
        assert type(optimizers[name]) is torch.optim.Adam
        (group,) = optimizers[name].param_groups
        assert (group["lr"], tuple(group["betas"])) == (2e-4, (0.5, 0.999))
        held = {id(p) for p in group["params"]}
        assert held == {id(p) for p in getattr(model, name).parameters()}


def test_weights_begin_as_published():
    for module in build("baseline").modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            n = module.weight.numel()
            assert module.bias is None
            assert abs(module.weight.mean()) < 5 * 0.02 / n**0.5
            assert abs(module.weight.std() / 0.02 - 1) < 5 / (2 * n) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 5 * 0.02 / len(module.weight) ** 0.5
            assert 0.005 < module.weight.std() < 0.04 and not module.bias.any()


def test_sides():
    assert sides_down_to_four(28) == [28, 14, 7, 4]
    assert sides_down_to_four(64) == [64, 32, 16, 8, 4]
    assert sides_down_to_four(9) == [9, 5, 3]


@given(st.integers(8, 70), st.sampled_from([1, 3]))
@settings(max_examples=12)
def test_it_works_at_any_size(size, channels):
    model = tiny(image_size=size, base_channels=2, image_channels=channels)
    labels = torch.tensor([0, 1])
    images = model.sample(labels, torch.Generator().manual_seed(0))
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1 and not images.requires_grad
    assert model.discriminator(images, labels).shape == (2,)
    logged = model.training_step(images, labels, model.optimizers())
    assert all(value.isfinite() for value in logged.values())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": 7}, ("image_size", "at least 8")),
        ({"latent_dim": 0}, ("latent_dim", "at least 1")),
        ({"base_channels": 0}, ("base_channels", "at least 1")),
        ({"beta1": 1.0}, ("beta1", "[0, 1)")),
        ({"embed_size": 9}, ("'embed_size'", "base_channels")),
    ],
)
def test_wrong_settings_are_bad_input(changes, words, bad_input):
    with bad_input(*words):
        make_config("cgan", "baseline", **changes)


# ---------------------------------------------------------------------------------------------
# The game
# ---------------------------------------------------------------------------------------------


class FixedGenerator(nn.Module):
    """Images of one value for each class, which its parameter does not change."""

    def __init__(self, *values: float):
        super().__init__()
        self.values, self.weight = torch.tensor(values), nn.Parameter(torch.zeros(()))

    def forward(self, latents, labels):
        return self.values[labels].view(-1, 1, 1, 1).expand(-1, 3, 8, 8) + 0 * self.weight


class MeanLogit(nn.Module):
    """The image's mean times a weight, the class added; keeps the labels that it is given."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.tensor(weight)), []

    def forward(self, images, labels):
        self.seen.append(labels.tolist())
        return self.weight * images.mean((1, 2, 3)) + labels


def test_losses_are_the_binary_cross_entropies_of_equation_2():
    model = tiny()
    model.generator, model.discriminator = FixedGenerator(-0.5, 0.25), MeanLogit(2.0)
    labels = torch.tensor([0, 0, 0, 1])
    logged = model.training_step(torch.ones(4, 3, 8, 8), labels, frozen(model))
    real, fake = torch.tensor([2.0, 2, 2, 3]), torch.tensor([-1.0, -1, -1, 1.5])
    entropy = F.binary_cross_entropy
    ones, zeros = torch.ones(4), torch.zeros(4)
    expected = {
        "loss_d": entropy(real.sigmoid(), ones) + entropy(fake.sigmoid(), zeros),
        "loss_g": entropy(fake.sigmoid(), ones),
        "D(x)": real.sigmoid().mean(),
        "D(G(z)) before": fake.sigmoid().mean(),
        "D(G(z)) after": fake.sigmoid().mean(),
    }
    assert list(logged) == list(expected)
    for name, value in expected.items():
        assert logged[name].item() == pytest.approx(value.item(), rel=1e-5), name
    # Real images, generated ones, and the generator's own: all beside the same classes.
    assert model.discriminator.seen == [labels.tolist()] * 3


def test_one_update_of_the_discriminator_then_one_of_the_generator():
    model, steps = tiny(), []
    optimizers = model.optimizers()
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: steps.append(name))
    model.training_step(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), optimizers)
    assert steps == ["discriminator", "generator"]


def test_the_generator_learns_to_fool_a_fixed_discriminator():
    """The sign of its loss: D(G(z)) must rise."""
    model = tiny(lr=1e-2)
    model.discriminator = MeanLogit(3.0)
    optimizers = model.optimizers() | {"discriminator": frozen(model)["discriminator"]}
    labels = torch.zeros(16).long()
    logged = [model.training_step(torch.zeros(16, 3, 8, 8), labels, optimizers) for _ in range(10)]
    assert logged[-1]["D(G(z)) after"] > logged[0]["D(G(z)) after"] + 0.1


def test_the_discriminator_tells_by_the_class_where_nothing_else_tells():
    """Real: class 0 dark, class 1 bright; generated: the other way round."""
    model = tiny(lr=5e-3)
    model.generator = FixedGenerator(0.5, -0.5)
    labels = torch.arange(16) % 2
    images = (labels - 0.5).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    optimizers = model.optimizers()
    logged = [model.training_step(images, labels, optimizers) for _ in range(40)]
    assert abs(logged[0]["D(x)"] - logged[0]["D(G(z)) before"]) < 0.2
    assert logged[-1]["D(x)"] > 0.8 and logged[-1]["D(G(z)) before"] < 0.2


def test_it_learns_to_draw_the_class_that_is_asked_for():
    """Class 0 dark, class 1 bright, with noise."""
    model, noise = tiny(lr=5e-3), torch.Generator().manual_seed(1)
    optimizers, labels = model.optimizers(), torch.arange(32) % 2
    for _ in range(80):
        images = 0.1 * torch.randn(32, 3, 8, 8, generator=noise)
        images += (labels - 0.5).view(-1, 1, 1, 1)
        model.training_step(images.clamp(-1, 1), labels, optimizers)
    drawn = model.eval().sample(labels, torch.Generator().manual_seed(0)).mean((1, 2, 3))
    assert (drawn[labels == 0] < -0.2).all() and (drawn[labels == 1] > 0.2).all()
