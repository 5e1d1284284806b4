"""The VAE of JPEG's coefficients: its likelihood, the bound and its warm-up, and the samples."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from custom_models import jpeg_vae
from custom_models.jpeg_vae import log_likelihood
from custom_models.layers import JPEG

TINY = dataclasses.replace(
    jpeg_vae.Config(),
    channels=(8, 8, 16),
    latent_channels=2,
    prior_channels=(8,),
    prior_steps=3,
    batch_size=16,
    warmup_images=0,
)


def build(**changes) -> jpeg_vae.Model:
    torch.manual_seed(0)
    return dataclasses.replace(TINY, **changes).build()


def batch(n: int = 16, size: int = 28):
    """Smooth images in [-1, 1] and labels of all classes."""
    coarse = torch.rand(n, 3, 4, 4, generator=noise()) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear"), torch.arange(n) % 8


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------
# The discretised logistic
# ---------------------------------------------------------------------------------------------

MEANS, LOG_SCALES = st.floats(-30, 30), st.floats(-5, 4)


def log_masses(mean: float, log_scale: float, values: torch.Tensor) -> torch.Tensor:
    """log p of each whole number by itself; float64 [K]."""
    parameters = torch.tensor([mean, log_scale], dtype=torch.float64)
    return log_likelihood(values.double()[:, None], *parameters)


@given(MEANS, LOG_SCALES)
def test_the_masses_of_all_whole_numbers_sum_to_one(mean, log_scale):
    # Beyond 40 scales lies e⁻⁴⁰ of the mass.
    values = torch.arange(-2300, 2301)
    total = log_masses(mean, log_scale, values).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-12)


@given(MEANS, LOG_SCALES)
def test_a_mass_is_the_difference_of_the_logistic_s_cdf(mean, log_scale):
    values = torch.arange(-100, 101).double()
    upper, lower = ((values + half - mean) / math.exp(log_scale) for half in (0.5, -0.5))
    expected = upper.sigmoid() - lower.sigmoid()
    masses = log_masses(mean, log_scale, values).exp()
    assert torch.allclose(masses, expected, rtol=1e-9, atol=1e-14)
    assert masses.max() > 0.004  # the scale is at most e⁴: a quarter of 1 / e⁴ at the mean


@pytest.mark.parametrize("log_scale", [-5.0, 0.0, 4.0])
def test_far_tails_are_finite_fall_and_have_a_gradient(log_scale):
    mean = torch.tensor(0.3, requires_grad=True)
    scale = torch.tensor(log_scale, requires_grad=True)
    distance = torch.arange(1.0, 3000.0, 7.0)
    for values in (0.3 + distance, 0.3 - distance):
        logs = log_likelihood(values[:, None], mean, scale)
        assert logs.dtype == torch.float32 and logs.isfinite().all()
        assert (logs.diff() < 0).all()
        gradients = torch.autograd.grad(logs.sum(), [mean, scale])
        assert all(g.isfinite() and g != 0 for g in gradients)
        # The tail is a geometric series: seven steps cost 7 / scale.
        slope = logs[-20:].diff().mean().item()
        assert slope == pytest.approx(-7 * math.exp(-log_scale), rel=1e-3)


def test_the_likelihood_is_symmetric_about_its_mean_and_sums_over_an_image():
    torch.manual_seed(0)
    values, mean = torch.randn(3, 2, 4, 4).mul(5).round(), torch.randn(3, 2, 4, 4)
    log_scale = torch.randn(3, 2, 4, 4)
    whole = log_likelihood(values, mean, log_scale)
    assert whole.shape == (3,)
    assert torch.allclose(log_likelihood(-values, -mean, log_scale), whole, rtol=1e-5)
    each = [
        sum(log_likelihood(v[None, None], m, s) for v, m, s in zip(*map(torch.flatten, image)))
        for image in zip(values, mean, log_scale, strict=True)
    ]
    assert torch.allclose(torch.cat(each), whole, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


def log_cdf_difference(values, mean, log_scale) -> torch.Tensor:
    """log of the CDF's difference over each number, taken in the lower tail; float64."""
    values, mean, log_scale = values.double(), mean.double(), log_scale.double()
    distance = -(values - mean).abs()
    upper, lower = ((distance + half) / log_scale.exp() for half in (0.5, -0.5))
    ratio = F.logsigmoid(lower) - F.logsigmoid(upper)
    return F.logsigmoid(upper) + torch.log(-torch.expm1(ratio))


def with_latents(model: jpeg_vae.Model) -> jpeg_vae.Model:
    """With a posterior far from the prior, so that the KL counts."""
    with torch.no_grad():
        model.encoder.out[-1].bias += torch.tensor([2.0, -1.0, 1.0, -2.0])
    return model


def latents_of(n: int) -> torch.Tensor:
    return torch.randn(n, 2, 7, 7, generator=noise(1))


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_the_loss_is_the_weighted_evidence_lower_bound(kl_weight):
    model, (images, labels) = with_latents(build(kl_warmup_images=0, kl_weight=kl_weight)), batch(6)
    with torch.no_grad():
        mean, log_variance = model.encoder(images, F.one_hot(labels, 8).float())
        posterior = Normal(mean.double(), (0.5 * log_variance.double()).exp())
        kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum((1, 2, 3)).mean().item()
        torch.manual_seed(5)
        latents = mean + posterior.stddev.float() * torch.randn(mean.shape)
        reconstruction = 0.0
        for file, logistic in zip(JPEG(75, "dct").encode(images), model.decode(latents, labels)):
            reconstruction -= log_cdf_difference(file.round(), *logistic).sum().item() / 6
    torch.manual_seed(5)
    logged = model.training_step(images, labels, model.optimizers())
    assert logged.keys() == {"loss", "reconstruction", "kl", "prior_loss"}
    assert kl > 5 and logged["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert logged["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    total = reconstruction + kl_weight * kl
    assert logged["loss"].item() == pytest.approx(total, rel=1e-4)


def shares_of_the_kl(model: jpeg_vae.Model, steps: int) -> list[float]:
    """Weight of the KL in the loss of each step."""
    optimizers, shares = model.optimizers(), []
    for _ in range(steps):
        row = model.training_step(*batch(), optimizers)
        shares.append(((row["loss"] - row["reconstruction"]) / row["kl"]).item())
    return shares


def test_the_kl_warms_up_over_the_images_seen():
    model = with_latents(build(kl_weight=0.8, kl_warmup_images=64))
    assert shares_of_the_kl(model, 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rel=1e-2)


def test_both_learning_rates_rise_and_fall_with_the_images_seen():
    model = build(lr=0.1, warmup_images=32, decay_images=96)
    optimizers, rates = model.optimizers(), []
    for _ in range(7):
        model.training_step(*batch(), optimizers)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers.values()])
    assert all(one == other for one, other in rates)
    cosines = [(1 + math.cos(math.pi * min(1, k / 6))) / 2 for k in range(1, 8)]
    expected = [0.1 * min(1, k / 2) * (0.02 + 0.98 * c) for k, c in enumerate(cosines, 1)]
    assert [one for one, _ in rates] == pytest.approx(expected)


def test_the_prior_learns_beside_the_autoencoder_and_leaves_it_as_it_is(monkeypatch):
    states = []
    for frozen in (False, True):
        model, optimizers = build(), None
        optimizers = model.optimizers()
        if frozen:
            monkeypatch.setattr(optimizers["prior"], "step", lambda: None)
        before = {key: value.clone() for key, value in model.prior.state_dict().items()}
        for step in range(3):
            torch.manual_seed(step)
            model.training_step(*batch(), optimizers)
        same = [torch.equal(v, before[key]) for key, v in model.prior.state_dict().items()]
        assert all(same) if frozen else not all(same)
        states.append({**model.encoder.state_dict(), **model.decoder.state_dict()})
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_the_prior_sees_several_draws_of_each_image_with_its_own_class(monkeypatch):
    model, (images, _), labels = build(prior_draws=3), batch(4), torch.tensor([5, 0, 7, 2])
    # Latents that tell which image they are of, and hardly differ between its draws.
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None].expand(-1, 2, 7, 7)
    posterior = mean.clone().requires_grad_(), torch.full_like(mean, -10.0).requires_grad_()
    monkeypatch.setattr(model.encoder, "forward", lambda images, condition: posterior)
    seen, loss = [], model.prior.loss

    def look(latents, labels):
        seen.append((latents, labels))
        return loss(latents, labels)

    monkeypatch.setattr(model.prior, "loss", look)
    model.training_step(images, labels, model.optimizers())
    ((latents, told),) = seen
    assert latents.shape == (12, 2, 7, 7) and not latents.requires_grad
    assert torch.unique(latents).numel() > 1000  # no draw is another's copy
    of = latents.mean((1, 2, 3)).round().long() - 1
    assert of.bincount().tolist() == [3] * 4 and torch.equal(told, labels[of])


def test_the_prior_is_the_one_that_the_preset_was_measured_with():
    """Settings of `edm` that the CVAE has no name for stay as they are when `edm`'s change."""
    prior = jpeg_vae.Config().prior
    assert (prior.image_size, prior.image_channels, prior.channels) == (7, 4, (64, 96))
    assert (prior.blocks, prior.attention_from) == (1, 1)
    assert (prior.dropout, prior.label_dropout) == (0.1, 0.0)
    assert (prior.sigma_data, prior.p_mean, prior.p_std) == (1.0, -0.5, 1.3)
    assert (prior.sampler, prior.guidance_scale) == ("dpm_solver_2m", 1.0)
    assert (prior.sigma_min, prior.sigma_max, prior.rho) == (0.01, 80.0, 7.0)


def test_compiling_it_compiles_the_network_of_the_prior():
    model = build()
    model.prior.compile()
    assert model.prior.unet._compiled_call_impl is not None


def test_the_prior_learns_where_latents_lie(monkeypatch):
    """Of two classes, whose latents are points: diffusion ends there, N(0, I) does not."""
    model = build(prior_channels=(16,), prior_steps=16)
    places = torch.tensor([[1.0, -1.0], [-0.5, 0.8]])[:, :, None, None]
    labels = torch.arange(64) % 2
    latents = places[labels] + 0.05 * torch.randn(64, 2, 7, 7, generator=noise())
    adam = torch.optim.Adam(model.prior.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(150):
        adam.zero_grad()
        model.prior.loss(latents, labels).backward()
        adam.step()
    seen = spy(monkeypatch, model)
    model.eval().sample(labels, noise(3))
    assert (seen[0] - places[labels]).abs().mean() < 0.3


def test_a_step_changes_every_weight_once_the_residual_blocks_are_open():
    """Their second convolution begins at zero, and holds back the first."""
    model, (images, labels) = build(), batch()
    optimizers = model.optimizers()
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(3):
        logged = model.training_step(images, labels, optimizers)
        assert all(value.ndim == 0 and value.isfinite() for value in logged.values())
    assert torch.equal(images, batch()[0])
    for key, value in model.named_parameters():
        # Latents are not augmented, and the U-Net is then told nothing.
        told = key != "prior.unet.augmentation.weight"
        assert value.isfinite().all() and torch.equal(value, before[key]) != told, key


def nats_without_latents(images: torch.Tensor) -> float:
    """Nats an image when each frequency has one logistic, the best one, for all blocks."""
    total = 0.0
    for file in JPEG(75, "dct").encode(images):
        values = file.round()
        mean = values.mean((0, 2, 3), keepdim=True).requires_grad_(True)
        log_scale = torch.zeros_like(mean).requires_grad_(True)
        adam = torch.optim.Adam([mean, log_scale], lr=0.1)
        for _ in range(150):
            loss = -log_likelihood(values, mean, log_scale.clamp(-5, 4)).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        total += loss.item()
    return total


def test_it_learns_one_batch_by_heart():
    """Through the latents: all images have one class."""
    (images, _), labels = batch(8, 16), torch.zeros(8, dtype=torch.int64)
    model = build(image_size=16, lr=5e-3, kl_warmup_images=10_000)
    optimizers = model.optimizers()
    rows = [model.training_step(images, labels, optimizers) for _ in range(200)]
    nats = sum((row["reconstruction"] + row["kl"]).item() for row in rows[-10:]) / 10
    assert nats < 0.75 * nats_without_latents(images)
    distances = torch.cdist(model.reconstruct(images, labels).flatten(1), images.flatten(1))
    # By chance, one of the eight would be nearest to its own reconstruction.
    assert (distances.argmin(0) == torch.arange(8)).sum() >= 4


def test_mixed_precision_gives_nearly_the_same_loss():
    losses = []
    for mixed in (False, True):
        model, (images, labels) = build(), batch()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model.training_step(images, labels, model.optimizers())["loss"]
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


# ---------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------


def test_at_temperature_zero_the_noise_changes_nothing(monkeypatch):
    model, labels = build(temperature=0.0, learned_prior=False), torch.tensor([0, 3, 7])
    latents = torch.randn(3, 98, generator=noise(1)).view(3, 2, 7, 7)
    with torch.no_grad():
        means = [mean.round() for mean, _ in model.decode(latents, labels)]
    expected = JPEG(75, "dct").decode(*means, (28, 28))
    for value in (0.0, 0.2, 1.0):
        monkeypatch.setattr(torch, "rand", lambda shape, value=value, **_: torch.full(shape, value))
        assert torch.equal(model.sample(labels, noise(1)), expected)
    monkeypatch.undo()
    warm = build(temperature=1.0, learned_prior=False)
    assert not torch.equal(warm.sample(labels, noise(1)), expected)
    assert not torch.equal(model.sample(labels, noise(2)), expected)


def test_latents_come_from_the_learned_prior_or_stay_normal(monkeypatch):
    plain, labels = torch.randn(16, 98, generator=noise()).view(16, 2, 7, 7), torch.arange(16) % 8
    learned, normal = build().eval(), build(learned_prior=False).eval()
    with torch.no_grad():
        solved = learned.prior.solve(labels, plain, 3)
    assert not torch.equal(solved, plain)
    for model, expected in ((learned, solved), (normal, plain)):
        seen = spy(monkeypatch, model)
        model.sample(labels, noise())
        assert torch.equal(seen[0], expected)


def spy(monkeypatch, model: jpeg_vae.Model) -> list[torch.Tensor]:
    """The latents that the model decodes from now on."""
    seen, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda z, y: seen.append(z) or decode(z, y))
    return seen


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_drawn_coefficients_are_whole_numbers_of_the_logistic(temperature, monkeypatch):
    model, drawn = build(temperature=temperature), []
    mean, log_scale = 7.0, math.log(30.0)
    logistics = [
        (torch.full(shape, mean), torch.full(shape, log_scale))
        for shape in ((100, 64, 4, 4), (100, 128, 2, 2))
    ]
    monkeypatch.setattr(model, "decode", lambda *_: logistics)
    monkeypatch.setattr(model.jpeg, "decode", lambda *parts: drawn.extend(parts[:2]))
    model.sample(torch.zeros(100, dtype=torch.int64), noise())
    scale = 30 * temperature
    for values in drawn:
        assert torch.equal(values, values.round())
        assert values.mean().item() == pytest.approx(mean, abs=0.02 * scale)
        assert values.std().item() == pytest.approx(scale * math.pi / math.sqrt(3), rel=0.02)
        # The logistic's quartiles lie at its mean ∓ log 3 scales; its tails are cut at 1 in 2000.
        quartile = values.flatten()[:50_000].quantile(0.25).item()
        assert quartile == pytest.approx(mean - math.log(3) * scale, abs=0.04 * scale)
        assert (values - mean).abs().max() <= math.log(0.9995 / 0.0005) * scale + 0.5


def test_the_class_changes_encoder_decoder_and_samples():
    model, (images, _) = build(), batch(2)
    one, other = torch.tensor([0, 0]), torch.tensor([5, 5])
    means = [model.encoder(images, model.condition(labels))[0] for labels in (one, other)]
    assert not torch.allclose(*means)
    latents = latents_of(2)
    for a, b in zip(model.decode(latents, one), model.decode(latents, other), strict=True):
        assert not torch.allclose(a[1], b[1])
    assert not torch.equal(model.sample(one, noise()), model.sample(other, noise()))


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    model, labels = build().eval(), torch.arange(6)
    latents = latents_of(6)
    with torch.no_grad():
        together = model.decoder(latents, model.condition(labels))
        alone = model.decoder(latents[2:3], model.condition(labels[2:3]))
    for all_, one in zip(together, alone, strict=True):
        assert torch.allclose(all_[2:3], one, atol=1e-5)


def test_a_reconstruction_is_stored_from_the_posterior_mean():
    model, (images, labels) = build(), batch(4)
    first = model.reconstruct(images, labels)
    assert first.shape == images.shape and torch.equal(first, model.reconstruct(images, labels))
    with torch.no_grad():
        mean, _ = model.encoder(images, model.condition(labels))
        drawn = model.decoder(mean, model.condition(labels))[0]
    assert torch.equal(first, JPEG(75, "dct")(drawn))


def test_scales_begin_where_photographs_have_them():
    """Wide for low frequencies, and narrower by about half with each next one."""
    model, labels = build(), torch.arange(8)
    with torch.no_grad():
        ((_, luma), (_, chroma)) = model.decode(torch.zeros(8, 2, 7, 7), labels)
    for log_scales, at_zero in ((luma, 10.0), (chroma[:, :64], 2.0), (chroma[:, 64:], 2.0)):
        usual = log_scales.mean((0, 2, 3)).view(8, 8)
        for row in range(3):
            for column in range(3):
                expected = max(at_zero * 0.5 ** (row + column), 0.05)
                assert usual[row, column].item() == pytest.approx(math.log(expected), abs=0.3)


@given(st.integers(8, 40))
@settings(max_examples=6)
def test_any_size_from_eight_pixels_works(size):
    model, (images, labels) = build(image_size=size), batch(2, size)
    assert model.training_step(images, labels, model.optimizers())["loss"].isfinite()
    assert model.reconstruct(images, labels).shape == images.shape
    assert model.sample(labels, noise()).shape == images.shape


def test_the_tables_and_usual_scales_are_no_part_of_the_state():
    kept = build().state_dict().keys() - dict(build().named_parameters()).keys()
    assert not kept
