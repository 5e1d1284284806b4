"""The residual cWGAN-GP: conditional batch norm, the projection critic, and turned images."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from custom_models import cwgan_gp, residual_cwgan_gp
from custom_models.layers import JPEG, ResidualBlock
from custom_models.residual_cwgan_gp import ConditionalBatchNorm, UpBlock, with_deeper_levels

TINY = dataclasses.replace(
    residual_cwgan_gp.Config(), generator_channels=(8, 8, 16), critic_channels=(8, 8, 16)
)


def build(**changes) -> cwgan_gp.Model:
    torch.manual_seed(0)
    return dataclasses.replace(TINY, **changes).build()


def batch(n: int = 16, size: int = 28):
    """Smooth images in [-1, 1] and labels of all classes."""
    coarse = torch.rand(n, 3, 4, 4, generator=noise()) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear"), torch.arange(n) % 8


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(model: cwgan_gp.Model) -> cwgan_gp.Model:
    """With an influence of every class, and larger images than an untrained generator's."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ConditionalBatchNorm):
                module.scale.weight.normal_(1, 0.5)
                module.shift.weight.normal_(0, 0.5)
        model.generator.out.weight.mul_(3)
    return model


# ---------------------------------------------------------------------------------------------
# Generator
# ---------------------------------------------------------------------------------------------


def test_conditional_batch_norm_begins_as_batch_norm():
    torch.manual_seed(0)
    layer, x = ConditionalBatchNorm(4, 8), 3 + 2 * torch.randn(6, 4, 5, 5)
    labels = torch.tensor([0, 1, 2, 2, 7, 3])
    assert torch.allclose(layer(x, labels), torch.nn.BatchNorm2d(4)(x), atol=1e-6)


def test_conditional_batch_norm_has_a_scale_and_a_shift_for_each_class():
    torch.manual_seed(0)
    layer, x = ConditionalBatchNorm(2, 3), torch.randn(30, 2, 4, 4)
    labels = torch.arange(30) % 3
    scales = torch.tensor([[1.0, 2.0], [3.0, 0.5], [-1.0, 0.0]])
    shifts = torch.tensor([[0.0, 1.0], [-2.0, 0.5], [4.0, 3.0]])
    with torch.no_grad():
        layer.scale.weight.copy_(scales)
        layer.shift.weight.copy_(shifts)
    # The statistics are those of all classes together, each channel's own.
    mean = x.mean((0, 2, 3), keepdim=True)
    standardised = (x - mean) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    result = layer(x, labels)
    for i, label in enumerate(labels):
        expected = standardised[i] * scales[label, :, None, None] + shifts[label, :, None, None]
        assert torch.allclose(result[i], expected, atol=1e-5)


def test_conditional_batch_norm_keeps_what_sets_classes_apart():
    """Statistics of each class alone would make their means equal."""
    layer, labels = ConditionalBatchNorm(1, 2), torch.tensor([0, 1, 0, 1])
    x = torch.where(labels == 1, 3.0, 1.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    expected = torch.where(labels == 1, 1.0, -1.0)
    assert torch.allclose(layer(x, labels)[:, 0, 0, 0], expected, atol=1e-4)


def test_only_the_classes_of_a_batch_learn():
    layer = ConditionalBatchNorm(4, 8)
    x = torch.randn(6, 4, 3, 3, generator=noise())
    layer(x, torch.tensor([0, 5] * 3)).square().sum().backward()
    for embedding in (layer.scale, layer.shift):
        assert embedding.weight.grad.any(dim=1).nonzero().flatten().tolist() == [0, 5]


def test_a_block_doubles_the_side_and_adds_to_the_enlarged_input():
    torch.manual_seed(0)
    block, x, labels = UpBlock(4, 6, 8), torch.randn(3, 4, 5, 5), torch.tensor([0, 3, 7])
    with torch.no_grad():
        shortcut = block.shortcut(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert block(x, labels).shape == (3, 6, 10, 10)
        assert not torch.allclose(block(x, labels), shortcut, atol=0.1)
        block.second.weight.zero_()
        block.second.bias.zero_()
        assert torch.allclose(block(x, labels), shortcut, atol=1e-6)


def test_a_block_adds_its_noise_after_each_convolution():
    torch.manual_seed(0)
    plain, noisy = UpBlock(4, 6, 8), UpBlock(4, 6, 8, noise=0.5)
    noisy.load_state_dict(plain.state_dict(), strict=False)
    x, labels = torch.randn(3, 4, 5, 5), torch.tensor([0, 3, 7])
    first, second = torch.randn(2, 3, 100)
    none = torch.zeros(3, 100)
    with torch.no_grad():
        assert torch.equal(noisy(x, labels, torch.cat([none, none], 1)), plain(x, labels))
        moved = noisy(x, labels, torch.cat([none, second], 1)) - plain(x, labels)
        expected = 0.5 * second.view(3, 1, 10, 10).expand(-1, 6, -1, -1)
        assert torch.allclose(moved, expected, atol=1e-5)
        features = plain.first(F.interpolate(F.relu(plain.norms[0](x, labels)), scale_factor=2))
        features = plain.norms[1](features + 0.5 * first.view(3, 1, 10, 10), labels)
        shortcut = F.interpolate(plain.shortcut(x), scale_factor=2)
        expected = plain.second(F.relu(features)) + shortcut
        assert torch.allclose(noisy(x, labels, torch.cat([first, none], 1)), expected, atol=1e-5)


def test_the_noise_is_drawn_behind_the_latents():
    model = randomised(build(noise=0.5, image_size=16, jpeg_quality=0)).eval()
    assert model.generator.inputs == [64, 2 * 8**2, 2 * 16**2]
    latents = model.latents(2, torch.device("cpu"), noise())
    assert latents.shape == (2, 64 + 128 + 512)
    again = latents[:1].clone()
    again[:, 64:] = latents[1:, 64:]
    labels = torch.tensor([3])
    with torch.no_grad():
        first, textured, other = (
            model.generator(z, labels) for z in (latents[:1], again, latents[1:])
        )
    assert not torch.equal(first, textured) and not torch.equal(textured, other)


def test_without_noise_there_are_neither_its_weights_nor_its_numbers():
    model = build()
    assert model.generator.inputs == [64]
    assert not any("noise" in name for name in model.state_dict())


def test_the_noise_s_weights_learn():
    model = build(noise=0.5)
    before = [block.noise.detach().clone() for block in model.generator.blocks]
    model.train().training_step(*batch(), model.optimizers())
    for block, old in zip(model.generator.blocks, before):
        assert (block.noise != old).all()


def test_the_class_changes_the_image():
    model, latents = randomised(build()).eval(), torch.randn(1, 64, generator=noise())
    with torch.no_grad():
        images = model.generator(latents.expand(8, -1), torch.arange(8))
    for i in range(8):
        for j in range(i):
            assert (images[i] - images[j]).abs().mean() > 0.02


def test_classes_are_told_apart_after_the_first_update():
    model, labels = build(), torch.arange(8)
    latents = torch.randn(1, 64, generator=noise()).expand(8, -1)
    model.generator.jpeg = torch.nn.Identity()  # its steps would hide so small a difference
    with torch.no_grad():
        before = model.eval().generator(latents, labels)
    assert torch.allclose(before, before[:1].expand_as(before), atol=1e-6)
    model.train().training_step(*batch(), model.optimizers())
    with torch.no_grad():
        after = model.eval().generator(latents, labels)
    assert (after[1:] - after[:1]).abs().amax((1, 2, 3)).min() > 1e-4


def test_samples_in_evaluation_mode_do_not_depend_on_the_batch():
    model = randomised(build())
    model.training_step(*batch(), model.optimizers())  # running statistics of its own
    model.eval()
    model.generator.jpeg = torch.nn.Identity()  # rounding would enlarge the last bit
    latents, labels = torch.randn(9, 64, generator=noise()), torch.arange(9) % 8
    with torch.no_grad():
        together = model.generator(latents, labels)
        some = model.generator(latents[:4], labels[:4])
        alone = model.generator(latents[6:7], labels[6:7])
    assert torch.allclose(together[:4], some, atol=1e-5)
    assert torch.allclose(together[6:7], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[6], atol=1e-2)


def test_sampling_changes_no_statistics():
    model = randomised(build()).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.sample(torch.arange(8), noise())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def symmetries(image: torch.Tensor) -> list[torch.Tensor]:
    """The eight flips and quarter turns of an image [C, S, S]."""
    turns = [torch.rot90(image, k, (1, 2)) for k in range(4)]
    return turns + [turn.flip(2) for turn in turns]


def test_in_training_stored_images_are_turned_and_in_evaluation_not():
    generator = randomised(build()).generator
    latents, labels = torch.randn(32, 64, generator=noise()), torch.arange(32) % 8
    with torch.no_grad():
        stored = generator.eval()(latents, labels)
        assert torch.equal(generator(latents, labels), stored)
        generator.training = True  # not its layers, whose statistics would differ
        turned = generator(latents, labels)
        generator.training, generator.jpeg = False, torch.nn.Identity()
        drawn = generator(latents, labels)
    assert torch.equal(stored, JPEG(75, "mean")(drawn))
    chosen = []
    for image, result in zip(stored, turned, strict=True):
        (which,) = [i for i, other in enumerate(symmetries(image)) if torch.equal(other, result)]
        chosen.append(which)
    assert len(set(chosen)) >= 5
    # The blocks are turned with the image: stored in this position, it would be another one.
    in_position = torch.stack([symmetries(raw)[i] for raw, i in zip(drawn, chosen, strict=True)])
    differs = (JPEG(75, "mean")(in_position) != turned).flatten(1).any(1)
    assert differs[torch.tensor(chosen) != 0].all()


# ---------------------------------------------------------------------------------------------
# Critic
# ---------------------------------------------------------------------------------------------


def test_the_projection_adds_the_features_part_along_the_class():
    """Embeddings that are multiples of the score's own weights make the sum known."""
    critic, (images, labels) = build().critic, batch()
    factors = torch.linspace(-1, 2.5, 8)
    with torch.no_grad():
        score = critic.score(critic.features(images)).flatten()
        critic.embedding.weight.copy_(factors[:, None] * critic.score.weight)
        bias = critic.score.bias
        expected = score + factors[labels] * (score - bias)
        assert torch.allclose(critic(images, labels), expected, atol=1e-5)
        critic.embedding.weight.zero_()
        assert torch.allclose(critic(images, labels), score, atol=1e-6)


def test_the_critic_judges_each_image_by_itself_and_with_its_own_class():
    critic, (images, labels) = build().critic, batch(6)
    with torch.no_grad():
        alone = torch.cat([critic(images[i : i + 1], labels[i : i + 1]) for i in range(6)])
        assert torch.allclose(critic(images, labels), alone, atol=1e-5)
        assert (critic(images, labels.roll(1)) - alone).abs().min() > 1e-3


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def test_the_losses_and_updates_are_those_of_the_baseline():
    model = build(lr=2e-4, beta1_critic=0.1, beta1_generator=0.2, beta2=0.8)
    assert type(model) is cwgan_gp.Model
    optimizers = model.optimizers()
    for name, beta1 in (("critic", 0.1), ("generator", 0.2)):
        (group,) = optimizers[name].param_groups
        assert (group["lr"], group["betas"]) == (2e-4, (beta1, 0.8))
        held = {id(p) for p in group["params"]}
        assert held == {id(p) for p in getattr(model, name).parameters()}
    steps = []
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: steps.append(name))
    logged = model.training_step(*batch(), optimizers)
    assert steps == ["critic", "critic", "generator"]
    for value in logged.values():
        assert value.ndim == 0 and value.isfinite()
    expected = -logged["wasserstein"] + 10 * logged["gradient_penalty"]
    assert logged["loss_critic"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_two_steps_change_every_weight():
    """The second convolution of a residual block begins at zero, and holds back the first."""
    model, (images, labels) = build(), batch()
    optimizers = model.optimizers()
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(2):
        model.training_step(images, labels, optimizers)
    assert torch.equal(images, batch()[0])
    for key, value in model.named_parameters():
        # A constant added to every score changes no loss but by rounding.
        changed = key == "critic.score.bias" or not torch.equal(value, before[key])
        assert value.isfinite().all() and changed, key


def test_the_critic_learns_to_tell_real_from_generated():
    model, (images, labels) = build(lr=2e-3), batch()
    optimizers = model.optimizers()
    optimizers["generator"] = torch.optim.SGD(model.generator.parameters(), lr=0)
    distances = [
        model.training_step(images, labels, optimizers)["wasserstein"].item() for _ in range(15)
    ]
    assert distances[-1] > distances[0] + 0.5


@pytest.mark.parametrize("size", [8, 13, 30])
def test_any_size_from_eight_pixels_works(size):
    model = build(image_size=size)
    logged = model.training_step(*batch(8, size), model.optimizers())
    assert all(value.isfinite() for value in logged.values())
    assert model.eval().sample(torch.arange(3), noise()).shape == (3, 3, size, size)


@pytest.mark.parametrize(
    "size, side, widths",
    [(28, 7, [8, 4, 2]), (32, 8, [8, 4, 2]), (64, 8, [16, 8, 4, 2]), (128, 8, [32, 16, 8, 4, 2])],
)
def test_levels_follow_the_size_until_the_smallest_side_is_eight(size, side, widths):
    model = build(image_size=size, generator_channels=(8, 4, 2), critic_channels=(2, 4, 8))
    generator, critic = model.generator, model.critic
    assert generator.start(torch.randn(1, 64)).shape == (1, widths[0], side, side)
    assert [block.second.out_channels for block in generator.blocks] == widths[1:]
    halvings = [layer for layer in critic.features if getattr(layer, "stride", 1) == (2, 2)]
    assert [layer.out_channels for layer in halvings] == widths[-2::-1]
    (flat,) = [layer for layer in critic.features if isinstance(layer, torch.nn.Linear)]
    assert flat.in_features == widths[0] * side**2


def test_added_levels_double_the_width_up_to_256():
    assert with_deeper_levels((32, 64, 128), 28) == (32, 64, 128)
    assert with_deeper_levels((32, 64, 128), 33) == (32, 64, 128, 256)
    assert with_deeper_levels((32, 64, 128), 128) == (32, 64, 128, 256, 256)


def test_at_28_pixels_the_networks_are_those_of_the_kept_weights():
    """Weights of finished trainings must go on fitting."""
    model = residual_cwgan_gp.Config().build()
    state = model.state_dict()
    assert len(state) == 60
    assert sum(value.numel() for value in state.values()) == 1_900_681
    assert state["generator.start.0.weight"].shape == (128 * 7 * 7, 64)
    assert state["generator.blocks.1.second.weight"].shape == (32, 32, 3, 3)
    assert state["critic.features.8.weight"].shape == (128, 128 * 7 * 7)


@pytest.mark.parametrize("preset", ["baseline", "best"])
def test_a_step_at_64_pixels_is_finite_and_reaches_every_layer(preset):
    """One update by plain descent: whatever has a gradient moves by it."""
    small = {"base_channels": 4} if preset == "baseline" else {"jpeg_quality": 0}
    if preset == "best":
        small |= {"generator_channels": (8, 8, 4), "critic_channels": (4, 8, 8)}
    torch.manual_seed(0)
    config = dataclasses.replace(cwgan_gp.PRESETS[preset], image_size=64, critic_steps=1, **small)
    model = config.build()
    if preset == "best":
        randomised(model)
        for block in (m for m in model.modules() if isinstance(m, ResidualBlock)):
            torch.nn.init.normal_(block.second.weight, std=0.1)  # not zero, which stops a gradient
    logged = model.training_step(*batch(8, 64), model.optimizers())
    assert all(value.isfinite() for value in logged.values())
    for name, parameter in model.named_parameters():
        if name != "critic.score.bias":  # a constant added to every score changes no loss
            assert parameter.grad is not None and parameter.grad.any(), name
    assert model.eval().sample(torch.arange(2), noise()).shape == (2, 3, 64, 64)
