"""R3GAN: the relativistic losses, both penalties and their rhythm, and the turned images."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from custom_models import r3gan
from custom_models.layers import JPEG

TINY = dataclasses.replace(
    r3gan.Config(),
    generator_channels=(8, 8, 16),
    discriminator_channels=(8, 8, 16),
    gamma_end=1.0,  # as at first
    gamma=1.0,
    penalty_interval=4,
    batch_size=8,
    flips_and_turns=True,
)


def build(**changes) -> r3gan.Model:
    torch.manual_seed(0)
    return dataclasses.replace(TINY, **changes).build()


def images(n: int = 8, size: int = 28) -> torch.Tensor:
    """Smooth images in [-1, 1]."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def still() -> torch.optim.Optimizer:
    """Of nothing: the network stays."""
    return torch.optim.SGD([torch.zeros(1)])


def sgd(model: r3gan.Model, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Plain gradient descent for the discriminator; the generator stays."""
    model.config = dataclasses.replace(model.config, lr=lr)
    discriminator = torch.optim.SGD(model.discriminator.parameters())
    return {"generator": still(), "discriminator": discriminator}


class Fixed(nn.Module):
    """The same images whatever the latents, which its parameter does not change."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output, self.weight = output, nn.Parameter(torch.zeros(()))

    def forward(self, latents):
        return self.output + 0 * self.weight


class Linear(nn.Module):
    """D(x) = ⟨w, x⟩."""

    def __init__(self, scale: float = 0.1):
        super().__init__()
        weights = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(1))
        self.weights = nn.Parameter(scale * weights)

    def forward(self, images):
        return (images * self.weights).sum((1, 2, 3))


class HalfSquare(nn.Module):
    """D(x) = a ‖x‖² / 2, whose gradient is a x."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return self.a * images.square().sum((1, 2, 3)) / 2


# ---------------------------------------------------------------------------------------------
# Losses and penalties
# ---------------------------------------------------------------------------------------------


def test_losses_judge_each_generated_image_beside_its_own_real_one():
    model, real = build(), images()
    fakes = images(16)[8:]
    model.generator, model.discriminator = Fixed(fakes), Linear()
    with torch.no_grad():
        margin = (model.discriminator(real) - model.discriminator(fakes)).double()
    logged = model.training_step(real, None, {"generator": still(), "discriminator": still()})
    assert margin.std() > 1  # so that another pairing would give another loss
    assert logged["margin"].item() == pytest.approx(margin.mean().item(), abs=1e-5)
    loss_d = torch.log1p((-margin).exp()).mean().item()
    loss_g = torch.log1p(margin.exp()).mean().item()
    assert logged["loss_d"].item() == pytest.approx(loss_d, rel=1e-5)
    assert logged["loss_g"].item() == pytest.approx(loss_g, rel=1e-5)


@pytest.mark.parametrize("interval", [1, 4])
def test_the_penalties_of_a_linear_discriminator_are_its_squared_norm(interval):
    model = build(penalty_interval=interval)
    model.discriminator = Linear()
    norm = model.discriminator.weights.square().sum().item()
    logged = model.training_step(images(), None, {"generator": still(), "discriminator": still()})
    for name in ("r1", "r2"):
        assert logged[name].item() == pytest.approx(interval * norm, rel=1e-5)


def test_each_penalty_is_of_its_own_images():
    model, real = build(penalty_interval=1), images()
    fakes = 0.3 * images(16)[8:]
    model.generator, model.discriminator = Fixed(fakes), HalfSquare()
    logged = model.training_step(real, None, {"generator": still(), "discriminator": still()})
    for name, shown in (("r1", real), ("r2", fakes)):
        expected = shown.square().sum((1, 2, 3)).mean().item()
        assert logged[name].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma, interval", [(0.5, 1), (0.5, 4), (2.0, 4)])
def test_the_update_takes_half_gamma_of_both_penalties(gamma, interval):
    """Without anything to tell apart, the discriminator only descends along the penalties."""
    model = build(gamma=gamma, gamma_end=gamma, penalty_interval=interval)
    nothing = torch.zeros(8, 3, 28, 28)
    model.generator, model.discriminator = Fixed(nothing), Linear()
    before = model.discriminator.weights.detach().clone()
    model.training_step(nothing.clone(), None, sgd(model, lr=0.01))
    # γ / 2 · interval · (‖w‖² + ‖w‖²) has the gradient 2 γ · interval · w.
    expected = before * (1 - 0.01 * 2 * gamma * interval)
    assert torch.allclose(model.discriminator.weights, expected, atol=1e-6)


def test_the_weight_of_the_penalties_falls_geometrically_over_images_then_stays():
    model = build(gamma=2.0, gamma_end=0.02, anneal_images=48, penalty_interval=1)
    assert model.gamma(0) == 2.0
    nothing = torch.zeros(8, 3, 28, 28)
    model.generator, model.discriminator = Fixed(nothing), Linear(1.0)
    optimizers, norms = sgd(model, lr=0.01), []
    for _ in range(9):
        norms.append(model.discriminator.weights.detach().norm().item())
        model.training_step(nothing.clone(), None, optimizers)
    # Each step shrinks the weights by 1 - 0.01 · 2 γ; 48 images are six steps.
    shrinkage = [1 - after / before for before, after in pairwise(norms)]
    expected = [0.02 * 2.0 * 0.01 ** min(step / 6, 1) for step in range(1, 9)]
    assert shrinkage == pytest.approx(expected, rel=0.01, abs=1e-6)


def test_both_learning_rates_fall_with_the_images_seen():
    model = build(lr=0.1, decay_images=48)
    optimizers, rates = model.optimizers(), []
    for _ in range(7):
        model.training_step(images(), None, optimizers)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
    assert all(one == other for one, other in rates)
    cosines = [(1 + math.cos(math.pi * min(1, k / 6))) / 2 for k in range(1, 8)]
    expected = [0.1 * (0.02 + 0.98 * c) for c in cosines]
    assert [one for one, _ in rates] == pytest.approx(expected)


def test_the_preset_s_rate_stays():
    config = r3gan.Config()
    seen = config.epochs * 11_959
    assert r3gan.Model(config).learning_rate(seen) == pytest.approx(config.lr, rel=1e-6)


def penalised(model: r3gan.Model, optimizers: dict, steps: int) -> list[bool]:
    """For each step whether it had penalties."""
    logged = [model.training_step(images(), None, optimizers) for _ in range(steps)]
    assert all((row["r1"] > 0) == (row["r2"] > 0) for row in logged)
    return [bool(row["r1"] > 0) for row in logged]


def test_penalties_come_with_the_first_step_and_every_few_steps():
    model = build(penalty_interval=3)
    assert penalised(model, model.optimizers(), 7) == [True, False, False] * 2 + [True]


def test_a_resumed_model_goes_on_with_the_rhythm_of_the_penalties(tmp_path):
    def go_on(model, optimizers, steps):
        rhythm = []
        for step in steps:
            torch.manual_seed(step)
            rhythm += penalised(model, optimizers, 1)
        return rhythm

    straight = build()
    go_on(straight, straight.optimizers(), range(6))

    first = build()
    optimizers = first.optimizers()
    assert go_on(first, optimizers, range(2)) == [True, False]
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    torch.save([first.state_dict(), states], tmp_path / "state.pt")
    weights, states = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build()
    optimizers = second.optimizers()
    second.load_state_dict(weights)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(states[name])
    assert go_on(second, optimizers, range(2, 6)) == [False, False, True, False]
    for key, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


# ---------------------------------------------------------------------------------------------
# Updates
# ---------------------------------------------------------------------------------------------


def test_the_discriminator_is_updated_once_then_the_generator():
    model = build()
    optimizers, steps = model.optimizers(), []
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: steps.append(name))
    model.training_step(images(), None, optimizers)
    assert steps == ["discriminator", "generator"]


@pytest.mark.parametrize("steps_before", [0, 1])
def test_no_gradient_leaks_to_the_other_network(steps_before):
    """Neither in a step with penalties, the first, nor in one without."""
    model = build()
    optimizers, kept = model.optimizers(), []
    parameters = list(model.discriminator.parameters())
    for _ in range(steps_before):
        model.training_step(images(), None, optimizers)
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)

    def look(*_):
        assert all(p.grad is None for p in model.generator.parameters())
        kept.extend(p.grad.clone() for p in parameters)

    optimizers["discriminator"].register_step_pre_hook(look)
    model.training_step(images(), None, optimizers)
    assert kept
    for parameter, gradient in zip(parameters, kept, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.requires_grad
    assert all(p.grad is not None for p in model.generator.parameters())


def test_real_images_are_not_changed():
    model, real = build(), images()
    optimizers = model.optimizers()
    for _ in range(2):  # with penalties and without
        model.training_step(real, None, optimizers)
        assert torch.equal(real, images())


def test_two_steps_change_every_weight():
    """The second convolution of a residual block begins at zero, and holds back the first."""
    model = build()
    optimizers = model.optimizers()
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(2):
        logged = model.training_step(images(), None, optimizers)
        assert all(value.ndim == 0 and value.isfinite() for value in logged.values())
    # A constant added to D is in both halves of every margin.
    unchanged = [k for k, value in model.named_parameters() if torch.equal(value, before[k])]
    assert unchanged == ["discriminator.layers.8.bias"]


def test_the_discriminator_learns_to_tell_real_from_generated():
    model = build(lr=2e-3)
    model.generator = Fixed(-0.5 * torch.ones(8, 3, 28, 28))
    optimizers = model.optimizers()
    margins = [
        model.training_step(images() * 0.5, None, optimizers)["margin"].item() for _ in range(12)
    ]
    assert margins[-1] > margins[0] + 0.2


def test_the_generator_learns_to_fool_a_fixed_discriminator():
    """The sign of its loss: the margin of real over generated images must fall."""
    model = build(lr=2e-3)
    model.discriminator = Linear(0.02)
    optimizers = {**model.optimizers(), "discriminator": still()}
    margins = [model.training_step(images(), None, optimizers)["margin"].item() for _ in range(12)]
    assert margins[-1] < margins[0] - 0.2


def test_mixed_precision_gives_nearly_the_same_losses():
    losses = []
    for mixed in (False, True):
        model, logged = build(), []
        optimizers = model.optimizers()
        for step in range(2):  # with penalties and without
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                logged.append(model.training_step(images(), None, optimizers))
        assert all(value.dtype == torch.float32 for row in logged for value in row.values())
        losses.append([row[name].item() for row in logged for name in ("loss_d", "loss_g", "r1")])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


# ---------------------------------------------------------------------------------------------
# The generator's images
# ---------------------------------------------------------------------------------------------


def symmetries(image: torch.Tensor) -> list[torch.Tensor]:
    """The eight flips and quarter turns of an image [C, S, S]."""
    turns = [torch.rot90(image, k, (1, 2)) for k in range(4)]
    return turns + [turn.flip(2) for turn in turns]


def strong(generator: r3gan.Generator) -> r3gan.Generator:
    """With larger images than an untrained generator's nearly grey ones."""
    with torch.no_grad():
        generator.layers[-2].weight.mul_(20)
    return generator


def test_in_training_stored_images_are_turned_and_in_evaluation_not():
    generator, latents = strong(build().generator), torch.randn(32, 64)
    with torch.no_grad():
        stored = generator.eval()(latents)
        assert torch.equal(generator(latents), stored)
        assert torch.equal(stored, JPEG(75, "mean")(generator.layers(latents)))
        turned = generator.train()(latents)
    chosen = []
    for image, result in zip(stored, turned, strict=True):
        (which,) = [i for i, other in enumerate(symmetries(image)) if torch.equal(other, result)]
        chosen.append(which)
    assert len(set(chosen)) >= 5
    # The blocks are turned with the image: stored in this position, it would be another one.
    of_the_turned = JPEG(75, "mean")(
        torch.stack([symmetries(raw)[i] for raw, i in zip(generator.layers(latents), chosen)])
    )
    differs = (of_the_turned != turned).flatten(1).any(1)
    assert differs[torch.tensor(chosen) != 0].all()


@pytest.mark.parametrize("setting", [{"flips_and_turns": False}, {"jpeg_quality": 0}])
def test_turning_and_storing_can_be_left_out(setting):
    generator, latents = strong(build(**setting).generator), torch.randn(16, 64)
    with torch.no_grad():
        drawn, stored, turned = (
            generator.layers(latents),
            generator.eval()(latents),
            generator.train()(latents),
        )
    assert torch.equal(stored, drawn) == ("jpeg_quality" in setting)
    assert torch.equal(turned, stored) == ("flips_and_turns" in setting)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    model, latents = build().eval(), torch.randn(6, 64)
    strong(model.generator)
    with torch.no_grad():
        together = model.generator.layers(latents)
        alone = torch.cat([model.generator.layers(latents[i : i + 1]) for i in range(6)])
        scores = model.discriminator(together)
        each = torch.cat([model.discriminator(together[i : i + 1]) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(scores, each, atol=1e-5) and scores.std() > 0


@pytest.mark.parametrize("size", [8, 13, 30])
def test_any_size_from_eight_pixels_works(size):
    model = build(image_size=size)
    logged = model.training_step(images(4, size), None, model.optimizers())
    assert all(value.isfinite() for value in logged.values())
    sampled = model.eval().sample(torch.zeros(2), torch.Generator().manual_seed(0))
    assert sampled.shape == (2, 3, size, size)
