"""The models: their published numbers, losses, updates and samplers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from custom_models import MODELS, cvae, cwgan_gp, dcgan, ddpm, make_config
from custom_models.config import parse_settings
from custom_models.layers import init_dcgan

# Small enough for a test, with every kind of layer of the full model.
TINY = {
    "quick": {
        "cvae": {"channels": (8, 16), "latent_dim": 4},
        "dcgan": {"generator_channels": (16, 8, 8, 4), "discriminator_channels": (4, 8, 8, 16)},
        "ddpm": {"channels": (8, 16, 24), "timesteps": 20, "sampling_steps": 4},
        "cwgan_gp": {"base_channels": 4, "critic_steps": 2},
        "cgan": {"base_channels": 4},
    },
    "best": {
        "cvae": {"channels": (8, 8, 16), "latent_channels": 2, "prior_channels": (8,)},
        "dcgan": {"generator_channels": (8, 8, 16), "discriminator_channels": (8, 8, 16)},
        "ddpm": {"channels": (8, 16), "blocks": 1, "sampling_steps": 4},
        "cwgan_gp": {"generator_channels": (8, 8, 16), "critic_channels": (8, 8, 16)},
    },
    "published": {"cwgan_gp": {"base_channels": 4, "critic_steps": 2, "image_size": 28}},
}
MODEL_NAMES = pytest.mark.parametrize("name", MODELS)
EVERY_TINY = pytest.mark.parametrize("preset, name", [(p, n) for p in TINY for n in TINY[p]])


def build(name: str, preset: str = "quick", **changes):
    torch.manual_seed(0)
    return make_config(name, preset, **changes).build()


def tiny(name: str, preset: str = "quick", **changes):
    return build(name, preset, **{**TINY[preset][name], **changes})


def batch(n: int, size: int = 28, seed: int = 0, channels: int = 3):
    """Smooth images in [-1, 1] and labels of all classes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=generator) * 2 - 1
    images = F.interpolate(coarse, size=(size, size), mode="bilinear")
    return images, torch.arange(n) % 8


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def record_steps(optimizers: dict) -> list[str]:
    """Names of the optimizers in the order in which they step."""
    steps = []
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: steps.append(name))
    return steps


# ---------------------------------------------------------------------------------------------
# All models
# ---------------------------------------------------------------------------------------------


def with_strong_outputs(model: nn.Module) -> nn.Module:
    """An untrained generator's images are nearly grey, and storing them as JPEG makes them so."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


@EVERY_TINY
def test_samples_have_form_range_and_depend_on_the_seed_alone(name, preset):
    model = with_strong_outputs(tiny(name, preset)).eval()
    labels = torch.tensor([0, 3, 7])
    first, again, other = (model.sample(labels, noise(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 3, 28, 28) and first.dtype == torch.float32
    assert not first.requires_grad
    assert first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again)
    assert (first - other).std() > 0.1 * first.std()
    assert (first[0] - first[1]).std() > 0.1 * first.std()


@EVERY_TINY
def test_sampling_takes_nothing_from_the_global_generator(name, preset):
    model = tiny(name, preset).eval()
    torch.manual_seed(1)
    first = model.sample(torch.tensor([0, 1]), noise())
    before = torch.get_rng_state()
    assert torch.equal(model.sample(torch.tensor([0, 1]), noise()), first)
    assert torch.equal(torch.get_rng_state(), before)


@MODEL_NAMES
def test_conditional_says_whether_the_class_changes_the_image(name):
    model = tiny(name).eval()
    one, other = (model.sample(torch.full((2,), label), noise()) for label in (0, 5))
    assert torch.equal(one, other) != model.conditional


@MODEL_NAMES
@pytest.mark.parametrize("changes", [{}, {"image_channels": 1, "n_classes": 2}])
def test_a_step_logs_finite_scalars_and_changes_every_weight(name, changes):
    model = tiny(name, **changes)
    before = {key: value.clone() for key, value in model.named_parameters()}
    images, labels = batch(16, channels=model.config.image_channels)
    logged = model.training_step(images, labels % model.config.n_classes, model.optimizers())
    assert logged
    for value in logged.values():
        assert value.ndim == 0 and value.isfinite()
    for key, value in model.named_parameters():
        assert value.requires_grad and value.isfinite().all()
        assert not torch.equal(value, before[key]), key


@EVERY_TINY
def test_a_step_depends_on_the_global_seed_alone(name, preset):
    states = []
    for seed in (1, 1, 2):
        model = tiny(name, preset)
        torch.manual_seed(seed)
        model.training_step(*batch(16), model.optimizers())
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "name, preset", [(n, p) for n in MODELS for p in ("baseline", "best") if p in MODELS[n].PRESETS]
)
def test_an_epoch_is_one_pass_over_the_real_images(name, preset):
    """`training_step` sees each of its images, and `images_per_step` counts them."""
    config = make_config(name, preset)
    steps = config.critic_steps if name == "cwgan_gp" else 1
    assert config.images_per_step == config.batch_size * steps


@pytest.mark.parametrize("name", TINY["best"])
def test_best_is_of_the_baselines_kind_and_conditional_where_classes_help(name):
    config = make_config(name, "best")
    assert (config.image_size, config.image_channels, config.n_classes) == (28, 3, 8)
    # Diffusion learns JPEG's traces by itself.
    assert config.ema_decay > 0 and config.jpeg_quality == (0 if name == "ddpm" else 75)
    model = config.build()
    assert model.config is config
    assert model.conditional == (name != "dcgan")


# ---------------------------------------------------------------------------------------------
# Published numbers, read off what is built
# ---------------------------------------------------------------------------------------------


def convolutions(module: nn.Module) -> list[tuple[int, int, int, int]]:
    """(inputs, outputs, kernel, stride) of each convolution in its order."""
    return [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]


def adam_settings(optimizer) -> tuple:
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0 and not group["amsgrad"] and group["eps"] == 1e-8
    return group["lr"], tuple(group["betas"])


def slopes(module: nn.Module) -> set[float]:
    return {m.negative_slope for m in module.modules() if isinstance(m, nn.LeakyReLU)}


def types(module: nn.Module) -> set[type]:
    return {type(m) for m in module.modules()}


@MODEL_NAMES
def test_baselines_have_no_ema_flips_or_best_step(name):
    config = make_config(name)
    assert (config.ema_decay, config.flips_and_turns, config.validation_epochs) == (0, False, 0)
    assert (config.image_size, config.image_channels, config.n_classes) == (28, 3, 8)
    assert config.batch_size == 128


def test_cvae_baseline_is_the_published_one():
    model = build("cvae", "baseline")
    assert convolutions(model.encoder) == [(3, 32, 4, 2), (32, 64, 4, 2), (64, 128, 4, 2)]
    assert convolutions(model.decoder) == [(128, 64, 4, 2), (64, 32, 4, 2), (32, 3, 4, 2)]
    assert model.encoder.mean.out_features == model.encoder.log_variance.out_features == 64
    assert model.decoder.linear.in_features == 64
    assert adam_settings(model.optimizers()["adam"]) == (1e-3, (0.9, 0.999))
    assert (model.config.epochs, model.config.kl_weight) == (100, 0.75)
    assert not model.conditional
    held = {id(p) for p in model.optimizers()["adam"].param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_dcgan_baseline_is_the_published_one():
    model = build("dcgan", "baseline")
    generator = [(100, 256, 4, 1), (256, 128, 4, 2), (128, 64, 4, 2), (64, 32, 4, 2), (32, 3, 1, 1)]
    assert convolutions(model.generator) == generator
    mirrored = convolutions(model.discriminator)
    assert [outputs for _, outputs, *_ in mirrored] == [32, 64, 128, 256, 1]
    assert {nn.BatchNorm2d, nn.ReLU, nn.Tanh} <= types(model.generator)
    assert nn.BatchNorm2d in types(model.discriminator)
    assert slopes(model.discriminator) == {0.2} and nn.ReLU not in types(model.discriminator)
    optimizers = model.optimizers()
    for name in ("generator", "discriminator"):
        assert adam_settings(optimizers[name]) == (1e-3, (0.5, 0.999))
        held = {id(p) for p in optimizers[name].param_groups[0]["params"]}
        assert held == {id(p) for p in getattr(model, name).parameters()}
    config = model.config
    assert (config.epochs, config.generator_steps, config.latent_dim) == (40, 3, 100)
    assert (config.real_label, config.fake_label) == (0.9, 0.1)


def test_dcgan_weights_begin_as_published():
    model = build("dcgan", "baseline")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            n = module.weight.numel()
            assert abs(module.weight.mean()) < 5 * 0.02 / n**0.5
            assert abs(module.weight.std() / 0.02 - 1) < 5 / (2 * n) ** 0.5
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 5 * 0.02 / len(module.weight) ** 0.5
            assert 0.005 < module.weight.std() < 0.04 and not module.bias.any()


def test_init_dcgan_leaves_other_layers_alone():
    layer = nn.Linear(3, 3)
    before = layer.weight.clone()
    init_dcgan(layer)
    assert torch.equal(layer.weight, before)


def test_ddpm_baseline_is_the_published_one():
    model = build("ddpm", "baseline")
    widths = [(b.first.in_channels, b.first.out_channels) for b in model.unet.down]
    assert widths == [(3, 64), (64, 128), (128, 256), (256, 512)]
    assert [b.first.out_channels for b in model.unet.up] == [256, 128, 64]
    assert len(model.betas) == len(model.alphas_cumprod) == 500
    assert model.betas[0].item() == pytest.approx(1e-4) and model.betas[-1].item() == (
        pytest.approx(0.02)
    )
    assert torch.allclose(model.betas.diff(), model.betas.diff().mean(), rtol=2e-3)
    assert round(model.alphas_cumprod[-1].sqrt().item(), 2) == 0.08
    assert adam_settings(model.optimizers()["adam"]) == (1e-4, (0.9, 0.999))
    config = model.config
    assert (config.epochs, config.sampler, config.variance) == (500, "ancestral", "beta")
    assert not any("Norm" in kind.__name__ for kind in types(model))


def test_settings_of_the_cwgan_gp_baseline():
    model = build("cwgan_gp", "baseline")
    optimizers = model.optimizers()
    assert adam_settings(optimizers["critic"]) == (1e-4, (0.0, 0.9))
    assert adam_settings(optimizers["generator"]) == (1e-4, (0.5, 0.9))
    config = model.config
    assert (config.epochs, config.critic_steps, config.gradient_penalty) == (120, 5, 10)
    assert model.generator.embedding.weight.shape == (8, 100)
    assert model.critic.embedding.weight.shape == (8, 28 * 28)
    assert convolutions(model.generator)[0][0] == 100 + 100
    assert convolutions(model.critic)[0][0] == 3 + 1
    assert slopes(model.critic) == {0.2}


def test_the_cwgan_gp_baseline_is_still_that_of_its_records():
    """Numbers from before `published` came, whose settings it does not have."""
    model = build("cwgan_gp", "baseline")
    state = model.state_dict()
    assert len(state) == 33
    assert sum(v.double().abs().sum().item() for v in state.values()) == pytest.approx(34658.05465)
    torch.manual_seed(1)
    logged = model.training_step(*batch(20), model.optimizers())
    expected = {"loss_critic": 1.99708, "loss_generator": 0.934153, "wasserstein": 0.285226}
    for name, value in expected.items():
        assert logged[name].item() == pytest.approx(value, rel=1e-4)


def test_cwgan_gp_published_is_the_published_one():
    with torch.device("meta"):  # shapes alone
        model = build("cwgan_gp", "published")
        images, labels = torch.zeros(2, 3, 128, 128), torch.zeros(2, dtype=torch.int64)
        assert model.generator(torch.zeros(2, 100), labels).shape == images.shape
        assert model.critic(images, labels).shape == (2, 3, 3)
    assert sum(p.numel() for p in model.parameters()) == 25_706_144
    widths = [(1024, 512), (512, 256), (256, 128), (128, 64), (64, 3)]
    up = [(200, 1024, 4, 1), *((*pair, 4, 2) for pair in widths)]
    assert convolutions(model.generator) == up
    widths = [(4, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    down = [*((*pair, 4, 2) for pair in widths), (1024, 1, 2, 1)]
    assert convolutions(model.critic) == down
    assert nn.BatchNorm2d in types(model.generator) and nn.InstanceNorm2d in types(model.critic)
    optimizers = model.optimizers()
    assert adam_settings(optimizers["critic"]) == (1e-4, (0.0, 0.9))
    assert adam_settings(optimizers["generator"]) == (1e-4, (0.5, 0.9))
    config = model.config
    assert (config.epochs, config.batch_size, config.critic_steps) == (120, 128, 7)
    assert config.gradient_penalty == 10 and config.even_classes and not config.dcgan_weights


@MODEL_NAMES
def test_sizes_in_parameters(name):
    """A changed architecture shows here first."""
    sizes = {
        "cvae": 553_539,
        "dcgan": 1_560_224,
        "ddpm": 7_912_131,
        "cwgan_gp": 1_917_984,
        "cgan": 1_542_016,
    }
    assert sum(p.numel() for p in build(name, "baseline").parameters()) == sizes[name]


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("cvae", {"epochs": "ten"}, ("epochs", "int", "'ten'")),
        ("cvae", {"epochs": 2.0}, ("epochs", "int")),
        ("cvae", {"epochs": True}, ("epochs", "int")),
        ("cvae", {"lr": "1e-3"}, ("lr", "float")),
        ("cvae", {"lr": None}, ("lr", "float")),
        ("cvae", {"lr": 0}, ("lr", "above 0")),
        ("cvae", {"lr": math.nan}, ("lr", "finite")),
        ("cvae", {"kl_weight": math.inf}, ("kl_weight", "finite")),
        ("cvae", {"kl_weight": -1.0}, ("kl_weight", "at least 0")),
        ("cvae", {"conditional": 1}, ("conditional", "bool")),
        ("cvae", {"channels": 32}, ("channels", "tuple")),
        ("cvae", {"channels": ()}, ("channels", "whole numbers")),
        ("cvae", {"channels": (8, "16")}, ("channels", "whole numbers")),
        ("cvae", {"channels": (8, 0)}, ("channels", "whole numbers")),
        ("cvae", {"channels": (4,) * 6}, ("image_size", "larger")),
        ("cvae", {"latent_dim": 0}, ("latent_dim", "at least 1")),
        ("cvae", {"epochs": 0}, ("epochs", "at least 1")),
        ("cvae", {"batch_size": -1}, ("batch_size", "at least 1")),
        ("cvae", {"ema_decay": 1.0}, ("ema_decay", "[0, 1)")),
        ("cvae", {"ema_decay": -0.1}, ("ema_decay", "[0, 1)")),
        ("cvae", {"validation_epochs": -1}, ("validation_epochs", "negative")),
        ("dcgan", {"image_size": 64}, ("image_size", "28")),
        ("dcgan", {"real_label": 1.1}, ("real_label", "[0, 1]")),
        ("dcgan", {"generator_steps": 0}, ("generator_steps", "at least 1")),
        ("dcgan", {"batch_size": 1}, ("batch_size", "at least 2")),
        ("dcgan", {"generator_channels": (8, 8)}, ("generator_channels", "four")),
        ("dcgan", {"beta1": 1.0}, ("beta1", "[0, 1)")),
        ("ddpm", {"sampler": "euler"}, ("sampler", "ddim", "euler")),
        ("ddpm", {"variance": "none"}, ("variance", "posterior")),
        ("ddpm", {"sampling_steps": 501}, ("sampling_steps", "timesteps")),
        ("ddpm", {"sampling_steps": 0}, ("sampling_steps", "timesteps")),
        ("ddpm", {"timesteps": 1}, ("timesteps", "at least 2")),
        ("ddpm", {"decay_images": -1}, ("decay_images", "at least 0")),
        ("ddpm", {"beta_start": 0.03}, ("beta_start", "beta_end")),
        ("cwgan_gp", {"critic_steps": 0}, ("critic_steps", "at least 1")),
        ("cwgan_gp", {"gradient_penalty": -1}, ("gradient_penalty", "at least 0")),
        ("cwgan_gp", {"image_size": 7}, ("image_size", "at least 8")),
        ("cwgan_gp", {"decay_images": -1}, ("decay_images", "at least 0")),
        ("cwgan_gp", {"learning_rate": 1}, ("'learning_rate'", "critic_steps")),
        ("dcgan", {"critic_steps": 5}, ("'critic_steps'", "generator_steps")),
    ],
)
def test_wrong_settings_are_bad_input(name, settings, words, bad_input):
    with bad_input(*words):
        make_config(name, "baseline", **settings)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("cvae", {"latent_channels": 0}, ("latent_channels", "at least 1")),
        ("cvae", {"prior_channels": (8, 12)}, ("prior_channels", "multiples of 8")),
        ("cvae", {"prior_channels": (8, 8, 8)}, ("prior_channels", "one or two widths")),
        ("cvae", {"prior_draws": 0}, ("prior_draws", "at least 1")),
        ("cvae", {"prior_steps": 1}, ("prior_steps", "at least 2")),
        ("cvae", {"decay_images": 0}, ("decay_images", "at least 1")),
        ("cvae", {"warmup_images": -1}, ("warmup_images", "at least 0")),
        ("cvae", {"channels": (8, 16)}, ("channels", "three widths")),
        ("cvae", {"image_channels": 1}, ("image_channels", "colours")),
        ("cvae", {"image_size": 7}, ("image_size", "at least 8")),
        ("cvae", {"kl_weight": -0.1}, ("kl_weight", "at least 0")),
        ("cvae", {"kl_warmup_images": -1}, ("kl_warmup_images", "at least 0")),
        ("cvae", {"temperature": -1}, ("temperature", "at least 0")),
        ("cvae", {"jpeg_quality": 0}, ("jpeg_quality", "from 1 to 100")),
        ("cvae", {"conditional": True}, ("'conditional'", "temperature")),
        ("dcgan", {"latent_dim": 0}, ("latent_dim", "at least 1")),
        ("dcgan", {"generator_channels": (8,) * 4}, ("generator_channels", "three widths")),
        ("dcgan", {"discriminator_channels": (8,)}, ("discriminator_channels", "three widths")),
        ("dcgan", {"image_size": 7}, ("image_size", "at least 8")),
        ("dcgan", {"gamma": 0}, ("gamma", "above 0")),
        ("dcgan", {"gamma_end": 0}, ("gamma_end", "above 0")),
        ("dcgan", {"anneal_images": 0}, ("anneal_images", "at least 1")),
        ("dcgan", {"penalty_interval": 0}, ("penalty_interval", "at least 1")),
        ("dcgan", {"jpeg_quality": 101}, ("jpeg_quality", "from 0 to 100")),
        ("dcgan", {"real_label": 0.9}, ("'real_label'", "gamma")),
        ("ddpm", {"sampler": "ancestral"}, ("sampler", "heun", "ancestral")),
        ("ddpm", {"timesteps": 500}, ("'timesteps'", "sigma_min")),
        ("cwgan_gp", {"latent_dim": 0}, ("latent_dim", "at least 1")),
        ("cwgan_gp", {"critic_steps": 0}, ("critic_steps", "at least 1")),
        ("cwgan_gp", {"generator_channels": (8, 8)}, ("generator_channels", "three widths")),
        ("cwgan_gp", {"critic_channels": (8, 8)}, ("critic_channels", "three widths")),
        ("cwgan_gp", {"gradient_penalty": -1}, ("gradient_penalty", "at least 0")),
        ("cwgan_gp", {"noise": -0.1}, ("noise", "at least 0")),
        ("cwgan_gp", {"decay_images": -1}, ("decay_images", "at least 0")),
        ("cwgan_gp", {"jpeg_quality": -1}, ("jpeg_quality", "from 0 to 100")),
        ("cwgan_gp", {"base_channels": 64}, ("'base_channels'", "critic_channels")),
    ],
)
def test_wrong_settings_of_best_are_bad_input(name, settings, words, bad_input):
    with bad_input(*words):
        make_config(name, "best", **settings)


def test_unknown_models_and_presets_are_bad_input(bad_input):
    with bad_input("'vae'", "cvae, dcgan, ddpm, cwgan_gp"):
        make_config("vae")
    with bad_input("'huge'", "baseline, best, quick"):
        make_config("cvae", "huge")


def test_settings_change_the_preset_alone():
    config = make_config("cvae", "quick", lr=1, channels=[8, 16])
    assert config.lr == 1.0 and type(config.lr) is float and config.channels == (8, 16)
    assert config.batch_size == cvae.PRESETS["quick"].batch_size
    assert cvae.PRESETS["quick"].lr == 1e-3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 2.0


def test_settings_of_a_command_line(bad_input):
    pairs = ["epochs=5", "sampler=ddim", "lr=1e-3", "channels=(8, 16)", "conditional=True"]
    assert parse_settings(pairs) == {
        "epochs": 5,
        "sampler": "ddim",
        "lr": 1e-3,
        "channels": (8, 16),
        "conditional": True,
    }
    with bad_input("'epochs'", "NAME=VALUE"):
        parse_settings(["epochs"])


# ---------------------------------------------------------------------------------------------
# CVAE
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [False, True])
def test_cvae_loss_is_the_weighted_evidence_lower_bound(conditional):
    model = tiny("cvae", conditional=conditional, kl_weight=0.3)
    images, labels = batch(6)
    with torch.no_grad():
        condition = F.one_hot(labels, 8).float() if conditional else torch.zeros(6, 0)
        mean, log_variance = model.encoder(images, condition)
        posterior = Normal(mean.double(), (0.5 * log_variance.double()).exp())
        kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
        torch.manual_seed(5)
        latents = mean + posterior.stddev.float() * torch.randn(mean.shape)
        logits = model.decoder(latents, condition).double()
        likelihood = Bernoulli(logits=logits, validate_args=False).log_prob((images + 1) / 2)
        reconstruction = -likelihood.sum((1, 2, 3)).mean()
    torch.manual_seed(5)
    logged = model.training_step(images, labels, model.optimizers())
    assert logged["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert logged["reconstruction"].item() == pytest.approx(reconstruction.item(), rel=1e-5)
    total = reconstruction + 0.3 * kl
    assert logged["loss"].item() == pytest.approx(total.item(), rel=1e-5)


class FixedLogits(nn.Module):
    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, latents, condition):
        return self.logits + 0 * latents.sum()


def test_cvae_reconstruction_is_least_where_the_decoder_gives_the_image():
    images, labels = batch(4)
    images = images * 0.9
    match = ((images + 1) / 2).logit()
    losses = []
    for change in (0.0, 0.2, -0.2):
        model = tiny("cvae")
        model.decoder = FixedLogits(match + change)
        losses.append(model.training_step(images, labels, model.optimizers())["reconstruction"])
    assert losses[0] < min(losses[1:])


def test_cvae_reconstruct_and_sample_give_the_decoders_means():
    model = tiny("cvae")
    images, labels = batch(4)
    model.decoder = FixedLogits(((images * 0.9 + 1) / 2).logit())
    for result in (model.reconstruct(images, labels), model.sample(labels, noise())):
        assert torch.allclose(result, images * 0.9, atol=1e-5)


def test_cvae_reconstruct_takes_the_posterior_mean():
    model = tiny("cvae")
    images, labels = batch(4)
    first, again = model.reconstruct(images, labels), model.reconstruct(images, labels)
    assert first.shape == images.shape and first.abs().max() <= 1
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])


def test_conditional_cvae_gives_the_class_to_encoder_and_decoder():
    model = tiny("cvae", conditional=True)
    images, _ = batch(2)
    one, other = torch.tensor([0, 0]), torch.tensor([5, 5])
    means = [model.encoder(images, model.condition(labels))[0] for labels in (one, other)]
    assert not torch.allclose(*means)
    assert not torch.equal(model.sample(one, noise()), model.sample(other, noise()))
    assert not torch.equal(model.reconstruct(images, one), model.reconstruct(images, other))


def test_cvae_learns_one_batch_by_heart():
    model = tiny("cvae", lr=5e-3)
    optimizers, (images, labels) = model.optimizers(), batch(8)
    losses = [model.training_step(images, labels, optimizers)["loss"].item() for _ in range(60)]
    # 2,352 pixels at log 2 each before; the images' own entropy is the bound.
    assert losses[0] == pytest.approx(2352 * math.log(2), rel=0.05)
    assert losses[-1] < 0.93 * losses[0]
    error = (model.reconstruct(images, labels) - images).pow(2).mean()
    assert error < 0.5 * images.pow(2).mean()


@given(st.integers(8, 40), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=10)
def test_cvae_works_at_any_size(size, levels, channels):
    model = tiny("cvae", image_size=size, channels=(4, 6, 8)[:levels], image_channels=channels)
    images, labels = batch(2, size, channels=channels)
    assert model.reconstruct(images, labels).shape == images.shape
    assert model.sample(labels, noise()).shape == images.shape


# ---------------------------------------------------------------------------------------------
# DCGAN
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator_steps", [1, 3])
def test_dcgan_updates_the_discriminator_once_then_the_generator(generator_steps):
    model = tiny("dcgan", generator_steps=generator_steps)
    optimizers = model.optimizers()
    steps = record_steps(optimizers)
    model.training_step(*batch(8), optimizers)
    assert steps == ["discriminator"] + ["generator"] * generator_steps


class FixedGenerator(nn.Module):
    """Images of one value, which its parameter does not change."""

    def __init__(self, value: float):
        super().__init__()
        self.value, self.weight = value, nn.Parameter(torch.zeros(()))

    def forward(self, latents, labels=None):
        return self.value + 0 * self.weight + torch.zeros(len(latents), 3, 28, 28)


class MeanLogit(nn.Module):
    """The image's mean times a weight."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        return self.weight * images.mean((1, 2, 3))


def test_dcgan_losses_have_smoothed_targets():
    model = tiny("dcgan")
    model.generator, model.discriminator = FixedGenerator(-0.5), MeanLogit(2.0)
    frozen = {
        name: torch.optim.SGD(getattr(model, name).parameters(), lr=0)
        for name in ("generator", "discriminator")
    }
    logged = model.training_step(torch.ones(4, 3, 28, 28), torch.zeros(4).long(), frozen)
    real, fake = torch.tensor(2.0), torch.tensor(-1.0)

    def cross_entropy(logit, target):
        return -target * F.logsigmoid(logit) - (1 - target) * F.logsigmoid(-logit)

    loss_d = cross_entropy(real, 0.9) + cross_entropy(fake, 0.1)
    assert logged["loss_d"].item() == pytest.approx(loss_d.item(), rel=1e-5)
    assert logged["loss_g"].item() == pytest.approx(cross_entropy(fake, 0.9).item(), rel=1e-5)
    assert logged["D(x)"].item() == pytest.approx(real.sigmoid().item(), rel=1e-5)
    for when in ("before", "after"):
        value = logged[f"D(G(z)) {when}"].item()
        assert value == pytest.approx(fake.sigmoid().item(), rel=1e-5)


OPPONENTS = {"dcgan": "discriminator", "cwgan_gp": "critic", "cgan": "discriminator"}


def test_the_generators_update_leaves_no_gradient_in_the_other_network():
    for name, other in OPPONENTS.items():
        model = tiny(name)
        optimizers, at_its_step = model.optimizers(), []
        parameters = list(getattr(model, other).parameters())

        def keep(*_, parameters=parameters, at_its_step=at_its_step):
            at_its_step[:] = [p.grad.clone() for p in parameters]

        optimizers[other].register_step_post_hook(keep)
        model.training_step(*batch(16), optimizers)
        assert at_its_step
        for parameter, gradient in zip(parameters, at_its_step, strict=True):
            assert torch.equal(parameter.grad, gradient)
            assert parameter.requires_grad


def test_the_discriminators_update_gives_the_generator_no_gradient():
    for name, other in OPPONENTS.items():
        model = tiny(name)
        optimizers, seen = model.optimizers(), []

        def look(*_, model=model, seen=seen):
            seen.append(all(p.grad is None for p in model.generator.parameters()))

        optimizers[other].register_step_pre_hook(look)
        model.training_step(*batch(16), optimizers)
        assert seen and all(seen)


def test_dcgan_generator_learns_to_fool_a_fixed_discriminator():
    """The sign of its loss: D(G(z)) must rise."""
    model = tiny("dcgan", lr=1e-2)
    model.discriminator = MeanLogit(3.0)
    optimizers = model.optimizers()
    optimizers["discriminator"] = torch.optim.SGD(model.discriminator.parameters(), lr=0)
    logged = [model.training_step(*batch(16), optimizers) for _ in range(10)]
    assert logged[-1]["D(G(z)) before"] > logged[0]["D(G(z)) before"] + 0.1


def test_dcgan_discriminator_learns_to_tell_real_from_generated():
    model = tiny("dcgan", lr=5e-3)
    model.generator = FixedGenerator(-0.5)
    optimizers = model.optimizers()
    images = 0.5 + 0.1 * torch.randn(16, 3, 28, 28, generator=noise())
    logged = [model.training_step(images, torch.zeros(16), optimizers) for _ in range(40)]
    assert logged[-1]["D(x)"] > logged[-1]["D(G(z)) before"] + 0.15


# ---------------------------------------------------------------------------------------------
# Conditional WGAN-GP
# ---------------------------------------------------------------------------------------------


class LinearCritic(nn.Module):
    """⟨w, x⟩ with w of the given norm."""

    def __init__(self, norm: float, size: int = 28):
        super().__init__()
        weights = torch.randn(3, size, size, generator=noise())
        self.weights = nn.Parameter(norm * weights / weights.norm())

    def forward(self, images, labels):
        return (images * self.weights).sum((1, 2, 3))


@given(st.floats(0.01, 20))
@settings(max_examples=10)
def test_the_penalty_of_a_linear_critic_is_known(norm):
    model = tiny("cwgan_gp")
    model.critic = LinearCritic(norm)
    images, labels = batch(5)
    penalty = model.gradient_norm_penalty(images, torch.randn_like(images), labels)
    assert penalty.item() == pytest.approx((norm - 1) ** 2, rel=1e-3, abs=1e-6)
    (gradient,) = torch.autograd.grad(penalty, model.critic.weights)
    # d/dw (‖w‖ - 1)² = 2 (‖w‖ - 1) w / ‖w‖
    expected = 2 * (norm - 1) * model.critic.weights / norm
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5)


class Recorder(nn.Module):
    """A critic that keeps what it is shown; its score is a weighted mean."""

    def __init__(self):
        super().__init__()
        self.weight, self.shown = nn.Parameter(torch.tensor(2.0)), []

    def forward(self, images, labels):
        self.shown.append((images.detach().clone(), labels.clone()))
        return self.weight * images.mean((1, 2, 3))


def test_the_penalty_mixes_each_real_image_with_its_own_fake():
    model = tiny("cwgan_gp")
    model.critic = Recorder()
    reals, fakes = torch.ones(64, 3, 28, 28), -torch.ones(64, 3, 28, 28)
    model.gradient_norm_penalty(reals, fakes, torch.arange(64) % 8)
    ((mixed, labels),) = model.critic.shown
    weights = mixed[:, 0, 0, 0]
    assert torch.equal(mixed, weights.view(-1, 1, 1, 1).expand_as(mixed))
    assert torch.equal(labels, torch.arange(64) % 8)
    # Uniform on [-1, 1], each image with its own weight.
    assert len(weights.unique()) > 60 and -1 <= weights.min() < -0.8 and 0.8 < weights.max() <= 1


class ClassAsValue(nn.Module):
    """Generated images whose value is their class's."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.zeros(())), []

    def forward(self, latents, labels):
        self.asked.append(labels.clone())
        return class_images(labels) + 0 * self.weight


def class_images(labels):
    return (labels / 4 - 1).view(-1, 1, 1, 1).expand(-1, 3, 28, 28)


def test_every_image_is_judged_with_its_own_label_the_mixed_ones_too():
    model = tiny("cwgan_gp", critic_steps=3)
    model.generator, model.critic = ClassAsValue(), Recorder()
    labels = torch.randint(8, (24,), generator=noise())
    logged = model.training_step(class_images(labels), labels, model.optimizers())
    assert len(model.critic.shown) == 3 * 3 + 1  # real, generated, mixed; then the generator's
    for images, shown in model.critic.shown:
        assert torch.allclose(images, class_images(shown), atol=1e-6)
    # Each critic update takes other real images; the generator's classes are real ones.
    parts = labels.chunk(3)
    for part, position in zip(parts, (0, 3, 6), strict=True):
        for images, shown in model.critic.shown[position : position + 3]:
            assert torch.equal(shown, part) and len(images) == 8
    assert torch.equal(model.generator.asked[-1], parts[-1])
    assert logged["wasserstein"].item() == pytest.approx(0, abs=1e-6)


def test_published_generates_all_classes_evenly_and_mixes_images_of_one():
    model = tiny("cwgan_gp", "published")
    model.generator, model.critic = ClassAsValue(), Recorder()
    labels = torch.zeros(1600, dtype=torch.int64)
    model.training_step(class_images(labels), labels, model.optimizers())
    kinds = ("real", "generated", "mixed", "real", "generated", "mixed", "generated")
    for kind, (images, shown) in zip(kinds, model.critic.shown, strict=True):
        assert len(images) == 800 and torch.allclose(images, class_images(shown))
        if kind == "generated":
            assert (shown.bincount(minlength=8) - 100).abs().max() < 50
        else:
            assert not shown.any()


def test_published_begins_with_pytorchs_own_weights():
    model = tiny("cwgan_gp", "published")
    torch.manual_seed(0)
    own = cwgan_gp.Generator(model.config).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in model.generator.state_dict().items())
    dcgan_s = tiny("cwgan_gp", "published", dcgan_weights=True).generator.layers[0].weight
    assert dcgan_s.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.generator.layers[0].weight.std() > 0.03


class NinePatches(LinearCritic):
    def forward(self, images, labels):
        return super().forward(images, labels)[:, None, None].expand(-1, 3, 3)


def test_the_penalty_is_on_the_slope_of_the_sum_of_patch_scores():
    model = tiny("cwgan_gp", "published")
    model.critic = NinePatches(0.5)
    images, labels = batch(5)
    penalty = model.gradient_norm_penalty(images, torch.randn_like(images), labels)
    assert penalty.item() == pytest.approx((9 * 0.5 - 1) ** 2, rel=1e-3)


def test_a_step_of_published_at_its_own_size_changes_every_weight():
    model = build("cwgan_gp", "published", base_channels=2, critic_steps=2)
    before = {key: value.clone() for key, value in model.named_parameters()}
    logged = model.training_step(*batch(16, 128), model.optimizers())
    assert all(value.ndim == 0 and value.isfinite() for value in logged.values())
    for key, value in model.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[key]), key
    assert model.eval().sample(torch.arange(3), noise()).shape == (3, 3, 128, 128)


@pytest.mark.parametrize("critic_steps", [1, 5])
def test_cwgan_gp_updates_the_critic_several_times_to_one(critic_steps):
    model = tiny("cwgan_gp", critic_steps=critic_steps)
    optimizers = model.optimizers()
    steps = record_steps(optimizers)
    model.training_step(*batch(4 * critic_steps), optimizers)
    assert steps == ["critic"] * critic_steps + ["generator"]


def test_cwgan_gp_losses_are_those_of_the_paper():
    model = tiny("cwgan_gp", critic_steps=1)
    model.generator, model.critic = FixedGenerator(-0.5), LinearCritic(3.0)
    frozen = {
        name: torch.optim.SGD(getattr(model, name).parameters(), lr=0)
        for name in ("generator", "critic")
    }
    images, labels = batch(8)
    with torch.no_grad():
        real = model.critic(images, labels).mean()
        fake = model.critic(torch.full((1, 3, 28, 28), -0.5), labels).mean()
    logged = model.training_step(images, labels, frozen)
    assert logged["gradient_penalty"].item() == pytest.approx(4, rel=1e-4)
    assert logged["wasserstein"].item() == pytest.approx((real - fake).item(), rel=1e-4)
    loss = fake - real + 10 * 4
    assert logged["loss_critic"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert logged["loss_generator"].item() == pytest.approx(-fake.item(), rel=1e-4)


def test_the_critic_judges_each_image_by_itself():
    model = tiny("cwgan_gp")
    assert not any("BatchNorm" in kind.__name__ for kind in types(model.critic))
    images, labels = batch(6)
    model.critic.eval()  # spectral norm estimates no further
    alone = torch.cat([model.critic(images[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert torch.allclose(model.critic(images, labels), alone, atol=1e-5)
    assert not torch.allclose(alone, model.critic(images, labels.roll(1)), atol=1e-5)


def test_spectral_norm_bounds_every_layer_of_the_critic():
    model = tiny("cwgan_gp")
    images, labels = batch(4)
    for _ in range(200):
        model.critic(images, labels)
    layers = [m for m in model.critic.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 4
    for layer in layers:
        largest = torch.linalg.svdvals(layer.weight.flatten(1))[0]
        assert largest.item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [28, 64, 128])
def test_cwgan_gp_trains_at_every_published_size(size):
    model = tiny("cwgan_gp", image_size=size)
    logged = model.training_step(*batch(4, size), model.optimizers())
    assert all(value.isfinite() for value in logged.values())
    images = model.eval().sample(torch.arange(3), noise())
    assert images.shape == (3, 3, size, size)
    assert model.critic.embedding.weight.shape == (8, size * size)


@given(st.integers(8, 70))
@settings(max_examples=12)
def test_cwgan_gp_works_at_any_size(size):
    model = tiny("cwgan_gp", image_size=size, base_channels=2)
    images = model.generator(torch.randn(2, 100), torch.tensor([0, 7]))
    assert images.shape == (2, 3, size, size)
    assert model.critic(images, torch.tensor([0, 7])).shape == (2,)


# ---------------------------------------------------------------------------------------------
# DDPM
# ---------------------------------------------------------------------------------------------


def test_diffused_images_have_the_moments_of_equation_4():
    model = build("ddpm", "baseline")
    image = torch.full((20_000, 1, 1, 1), 0.7)
    for t in (0, 100, 499):
        noisy = model.diffuse(image, torch.full((20_000,), t), torch.randn(image.shape))
        beta = torch.linspace(1e-4, 0.02, 500, dtype=torch.float64)
        alpha_bar = (1 - beta[: t + 1]).prod().item()
        error = ((1 - alpha_bar) / 20_000) ** 0.5
        assert noisy.mean().item() == pytest.approx(0.7 * alpha_bar**0.5, abs=5 * error)
        assert noisy.std().item() == pytest.approx((1 - alpha_bar) ** 0.5, rel=0.03)


def test_ddpm_loss_is_the_mean_square_of_the_noise_not_predicted():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.shown = nn.Parameter(torch.zeros(())), None

        def forward(self, x, timesteps):
            self.shown = x.detach(), timesteps
            return x * 0 + self.weight

    model = tiny("ddpm")
    model.unet = Network()
    images, labels = batch(64)
    torch.manual_seed(3)
    logged = model.training_step(images, labels, model.optimizers())
    noisy, timesteps = model.unet.shown
    alpha_bar = model.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise_drawn = (noisy - alpha_bar.sqrt() * images) / (1 - alpha_bar).sqrt()
    assert abs(noise_drawn.mean()) < 0.02 and abs(noise_drawn.std() - 1) < 0.02
    assert logged["loss"].item() == pytest.approx(noise_drawn.pow(2).mean().item(), rel=1e-3)
    assert timesteps.min() == 0 and timesteps.max() == 19  # every one of 20 can be drawn


@pytest.mark.parametrize(
    "name, preset", [("ddpm", "quick"), ("cwgan_gp", "quick"), ("cwgan_gp", "best")]
)
def test_the_learning_rate_falls_by_a_cosine_and_goes_on_where_it_was(name, preset):
    def train(model, optimizers, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            model.training_step(*batch(16, 8), optimizers)
            (rate,) = {o.param_groups[0]["lr"] for o in optimizers.values()}
            rates.append(rate)
        return rates

    small = {"image_size": 8, "lr": 1.0}
    model = tiny(name, preset, **small, decay_images=64)
    optimizers = model.optimizers()
    half = math.sqrt(0.5)
    share = [(1 + half) / 2, 0.5, (1 - half) / 2, 0, 0]
    expected = [0.02 + 0.98 * part for part in share]
    assert train(model, optimizers, 2) == pytest.approx(expected[:2])
    resumed = model.optimizers()
    for key, optimizer in optimizers.items():
        resumed[key].load_state_dict(optimizer.state_dict())
    assert train(model, resumed, 3) == pytest.approx(expected[2:])

    constant = tiny(name, preset, **small, decay_images=0)
    optimizers = constant.optimizers()
    for optimizer in optimizers.values():  # as in a checkpoint from before it was counted
        optimizer.param_groups[0].pop("images_seen", None)
    assert train(constant, optimizers, 3) == [1.0, 1.0, 1.0]


def test_ddpm_draws_every_timestep_about_equally_often():
    model = tiny("ddpm", image_channels=1, image_size=8, channels=(8,))
    seen = []
    forward = model.unet.forward
    model.unet.forward = lambda x, t: seen.append(t) or forward(x, t)
    torch.manual_seed(0)
    model.training_step(torch.zeros(4000, 1, 8, 8), None, model.optimizers())
    counts = seen[0].bincount(minlength=20)
    assert (counts - 200).abs().max() < 5 * (200 * 0.95) ** 0.5


SCHEDULE = {"timesteps": 60, "beta_start": 1e-3, "beta_end": 0.2, "sampling_steps": 10}


class Oracle(nn.Module):
    """The exact noise for data that is one point, or a standard normal; keeps what it sees."""

    def __init__(self, model, point=None):
        super().__init__()
        self.alphas, self.point, self.seen = model.alphas_cumprod, point, []

    def forward(self, x, timesteps):
        (t,) = timesteps.unique().tolist()
        self.seen.append((t, x))
        alpha_bar = self.alphas[t]
        if self.point is None:  # E[ε | x_t]
            return (1 - alpha_bar).sqrt() * x
        return (x - alpha_bar.sqrt() * self.point) / (1 - alpha_bar).sqrt()


def with_oracle(point=None):
    model = build("ddpm", "baseline", image_size=8, channels=(8,), **SCHEDULE)
    model.unet = Oracle(model, point)
    return model


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_ancestral_sampling_with_the_true_noise_gives_the_image(variance):
    point, _ = batch(1, 8)
    model = with_oracle(point)
    result = model.ancestral(torch.randn(5, 3, 8, 8), variance, noise())
    assert torch.allclose(result, point.expand_as(result), atol=1e-3)
    assert [t for t, _ in model.unet.seen] == list(range(59, -1, -1))


def test_the_posterior_variance_is_exact_for_one_image():
    """Every x_t on the way then has the mean and variance of equation (4)."""
    point = torch.full((1, 3, 8, 8), 0.4)
    model = with_oracle(point)
    start = model.diffuse(point.expand(400, -1, -1, -1), torch.full((400,), 59), randn(400))
    model.ancestral(start, "posterior", noise())
    for t, x in model.unet.seen:
        alpha_bar = model.alphas_cumprod[t].item()
        assert x.mean().item() == pytest.approx(0.4 * alpha_bar**0.5, abs=0.03)
        assert x.var().item() == pytest.approx(1 - alpha_bar, rel=0.05)


def test_the_variance_beta_is_exact_for_normal_data():
    """Every x_t on the way then is a standard normal."""
    model = with_oracle()
    model.ancestral(randn(400), "beta", noise())
    for _, x in model.unet.seen:
        assert x.mean().item() == pytest.approx(0, abs=0.03)
        assert x.var().item() == pytest.approx(1, rel=0.05)


def test_the_posterior_variance_is_the_smaller_one():
    model = with_oracle()
    for variance in ("beta", "posterior"):
        model.ancestral(randn(400), variance, noise())
    half = len(model.unet.seen) // 2
    assert model.unet.seen[-1][1].var() < 0.97 * model.unet.seen[half - 1][1].var()


def randn(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=noise(9))


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 60])
def test_ddim_with_the_true_noise_stays_on_its_path_to_the_image(steps):
    point, _ = batch(1, 8)
    model = with_oracle(point)
    drawn = randn(4)
    result = model.ddim(model.diffuse(point, torch.tensor([59]), drawn), steps)
    assert torch.allclose(result, point.expand_as(result), atol=1e-4)
    timesteps = [t for t, _ in model.unet.seen]
    assert len(timesteps) == steps and timesteps[0] == 59
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert steps == 1 or timesteps[-1] == 0
    for t, x in model.unet.seen:  # one and the same noise all the way
        assert torch.allclose(x, model.diffuse(point, torch.tensor([t]), drawn), atol=1e-3)


def test_ddim_depends_on_its_noise_alone():
    model = tiny("ddpm").eval()
    start = torch.randn(2, 3, 28, 28, generator=noise())
    with torch.no_grad():
        assert torch.equal(model.ddim(start, 5), model.ddim(start, 5))
        assert not torch.equal(model.ddim(start, 5), model.ddim(-start, 5))


def test_each_sampler_is_the_one_that_is_configured():
    samples, calls = {}, {}
    for settings_ in ({"sampler": "ddim"}, {"variance": "beta"}, {"variance": "posterior"}):
        model = tiny("ddpm", **{"sampler": "ancestral", **settings_}).eval()
        counter = []
        model.unet.register_forward_hook(lambda *_, counter=counter: counter.append(1))
        key = next(iter(settings_.values()))
        samples[key] = model.sample(torch.zeros(2).long(), noise())
        calls[key] = len(counter)
    assert calls == {"ddim": 4, "beta": 20, "posterior": 20}
    assert not torch.equal(samples["beta"], samples["posterior"])


def test_the_network_knows_the_time():
    model = tiny("ddpm").eval()
    images, _ = batch(2)
    outputs = [model.unet(images, torch.tensor([t, t])) for t in (0, 1, 19)]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)
    mixed = model.unet(images, torch.tensor([0, 19]))  # each image has its own time
    assert torch.allclose(mixed[0], outputs[0][0], atol=1e-5)
    assert torch.allclose(mixed[1], outputs[2][1], atol=1e-5)


def test_the_time_embedding_is_that_of_the_paper():
    times = torch.tensor([0, 3, 499])
    embedded = ddpm.sinusoidal_embedding(times, 8)
    for row, t in zip(embedded, times.tolist(), strict=True):
        frequencies = [10_000 ** (-i / 4) for i in range(4)]
        expected = [math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies]
        assert torch.allclose(row, torch.tensor(expected), atol=1e-4)


@given(st.integers(8, 40), st.integers(1, 4))
@settings(max_examples=10)
def test_the_unet_works_at_any_size(size, levels):
    model = tiny("ddpm", image_size=size, channels=(8, 8, 16, 16)[:levels])
    images, _ = batch(2, size)
    assert model.unet(images, torch.tensor([0, 19])).shape == images.shape


@pytest.mark.parametrize("size", [28, 30, 32])
def test_an_odd_side_is_rounded_up_on_the_way_down(size):
    """28 → 14 → 7 → 4: at 3 the last row and column would be lost."""
    model = tiny("ddpm", image_size=size, channels=(8, 8, 8, 8)).eval()
    sides = []
    for block in model.unet.down:
        block.register_forward_hook(lambda _m, _i, output: sides.append(output.shape[-1]))
    images, _ = batch(1, size)
    assert model.unet(images, torch.tensor([3])).shape == images.shape
    assert sides == [size, *(-(-size // 2**level) for level in (1, 2, 3))]


def test_the_schedule_is_no_part_of_the_state():
    keys = tiny("ddpm").state_dict()
    assert not any("alphas" in key or "betas" in key for key in keys)


def test_ddpm_learns_one_batch_by_heart():
    model = tiny("ddpm", lr=2e-3, channels=(16, 32), beta_end=0.2)
    optimizers, (images, labels) = model.optimizers(), batch(16)
    torch.manual_seed(0)
    losses = [model.training_step(images, labels, optimizers)["loss"].item() for _ in range(50)]
    assert sum(losses[-10:]) / 10 < 0.6 * sum(losses[:5]) / 5


def test_the_four_models_share_their_duties():
    for module in (cvae, dcgan, ddpm, cwgan_gp):
        assert {"baseline", "best", "quick"} <= module.PRESETS.keys()
        for duty in ("optimizers", "training_step", "sample"):
            assert callable(getattr(module.Model, duty))
