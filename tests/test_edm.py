"""EDM: preconditioning, weighting, augmentation, warm-up, guidance and sampling."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from custom_models import edm, make_config
from custom_models.layers import JPEG

# Small enough for a test, with every kind of layer of the full model.
TINY = dataclasses.replace(
    edm.Config(),
    channels=(8, 16, 24),
    blocks=1,
    attention_from=1,
    warmup_images=48,
    sampling_steps=3,
    batch_size=16,
)


def build(**changes) -> edm.Model:
    torch.manual_seed(0)
    return dataclasses.replace(TINY, **changes).build()


def batch(n: int = 16, size: int = 28, channels: int = 3):
    """Smooth images in [-1, 1] and labels of all classes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear"), torch.arange(n) % 8


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(steps: int = 3, **changes) -> edm.Model:
    """A model whose network no longer gives zero."""
    model = build(**changes)
    optimizers = model.optimizers()
    images, labels = batch(size=model.config.image_size, channels=model.config.image_channels)
    for _ in range(steps):
        model.training_step(images, labels, optimizers)
    return model.eval()


class Recorder(torch.nn.Module):
    """In the network's place: keeps what it is given and returns a fixed output."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output, self.given = output, []

    def forward(self, x, c_noise, labels, augmentation):
        self.given.append((x, c_noise, labels, augmentation))
        return self.output.expand_as(x)


# ---------------------------------------------------------------------------------------------
# Preconditioning and weighting
# ---------------------------------------------------------------------------------------------


def test_an_untrained_network_gives_c_skip_x():
    model, (images, labels) = build(), batch(4)
    for sigma in (0.01, 0.5, 80.0):
        denoised = model.denoise(images, torch.tensor(sigma), labels[:4])
        assert torch.allclose(denoised, 0.25 / (sigma**2 + 0.25) * images, atol=1e-6)


def test_preconditioning_is_that_of_table_1():
    model, (images, labels) = build(sigma_data=0.4), batch(3)
    model.unet = Recorder(torch.tensor(2.0))
    sigma = torch.tensor([0.3, 1.0, 4.0])
    denoised = model.denoise(images, sigma, labels)
    (given,) = model.unet.given
    for i, s in enumerate(sigma.tolist()):
        total = (s**2 + 0.4**2) ** 0.5
        assert torch.allclose(given[0][i], images[i] / total)
        expected = 0.4**2 / total**2 * images[i] + s * 0.4 / total * 2.0
        assert torch.allclose(denoised[i], expected, atol=1e-6)
    assert torch.allclose(given[1], sigma.log() / 4)
    assert given[2] is labels and not given[3].any() and given[3].shape == (3, 6)


@pytest.mark.parametrize("sigma_data", [0.5, 0.2])
@pytest.mark.parametrize("p_mean", [-3.0, -1.2, 2.0])
def test_an_untrained_network_has_a_loss_of_one_at_every_noise_level(sigma_data, p_mean):
    """Table 1 weighs the noise levels so, for data of the standard deviation sigma_data."""
    model = build(sigma_data=sigma_data, p_mean=p_mean, p_std=0.3)
    images = sigma_data * torch.randn(64, 3, 28, 28, generator=noise())
    labels = torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        loss = model.loss(images, labels, torch.zeros(64, 6))
    assert loss.item() == pytest.approx(1, abs=0.03)


def test_the_loss_is_zero_for_the_perfect_denoiser_and_weighs_errors_by_lambda(monkeypatch):
    model, (images, labels) = build(p_std=1e-6), batch(4)
    nothing = torch.zeros(4, 6)
    monkeypatch.setattr(model, "denoise", lambda *_: images)
    assert model.loss(images, labels, nothing) == 0
    monkeypatch.setattr(model, "denoise", lambda *_: images + 0.1)
    sigma = torch.tensor(-1.2).exp().item()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert model.loss(images, labels, nothing).item() == pytest.approx(0.01 * weight, rel=1e-3)


def test_noise_levels_in_training_are_log_normal(monkeypatch):
    model, seen = build(), []

    def denoise(x, sigma, *_):
        seen.append(sigma)
        return x

    monkeypatch.setattr(model, "denoise", denoise)
    torch.manual_seed(0)
    model.loss(torch.zeros(4000, 1, 1, 1), torch.zeros(4000), torch.zeros(4000, 6))
    logs = seen[0].log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.1)
    assert logs.std().item() == pytest.approx(1.2, abs=0.1)


# ---------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------


def test_presets_have_the_sizes_that_are_written_beside_them():
    configs = edm.Config(), edm.BEST_64, edm.BEST_128, edm.SMALL
    sizes = [sum(p.numel() for p in config.build().parameters()) for config in configs]
    assert sizes == [11_883_843, 11_418_275, 11_548_515, 1_096_771] and max(sizes) < 12_000_000


@pytest.mark.parametrize("size", [4, 7, 30])
def test_odd_sizes_and_grey_images_keep_their_form(size):
    model = trained(image_size=size, image_channels=1)
    samples = model.sample(torch.tensor([0, 7]), noise())
    assert samples.shape == (2, 1, size, size) and samples.isfinite().all()


@pytest.mark.parametrize("size", [64, 128])
def test_at_larger_sizes_attention_is_at_16_and_8_alone(size):
    model, sides = make_config("ddpm", f"best_{size}").build(), set()
    for module in model.modules():
        if isinstance(module, edm.Attention):
            module.register_forward_pre_hook(lambda _, inputs: sides.add(inputs[0].shape[2:]))
    images, labels = batch(1, size)
    model.loss(images, labels, torch.zeros(1, 6)).backward()
    assert sides == {(16, 16), (8, 8)}
    config = make_config("ddpm", f"best_{size}")
    # The rate has fallen as far as it will when the last epoch of PBC's cells ends.
    assert config.decay_images == config.epochs * 11_959


def test_the_network_is_told_noise_class_and_augmentation():
    model, (images, labels) = trained(), batch(2)
    labels, nothing = labels[:2], torch.zeros(2, 6)

    def output(c_noise=0.0, labels=labels, told=nothing):
        with torch.no_grad():
            return model.unet(images[:2], torch.full((2,), c_noise), labels, told)

    plain = output()
    assert torch.equal(output(), plain)
    assert not torch.equal(output(c_noise=0.5), plain)
    assert not torch.equal(output(labels=labels + 1), plain)
    assert not torch.equal(output(told=nothing + 1), plain)


def test_an_image_is_denoised_alike_alone_and_in_a_batch():
    model, (images, labels) = trained(), batch(4)
    sigma = torch.tensor([0.1, 0.4, 1.0, 5.0])
    with torch.no_grad():
        together = model.denoise(images, sigma, labels)
        alone = [model.denoise(images[i : i + 1], sigma[i], labels[i : i + 1]) for i in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_embedding_scales_and_shifts_between_the_convolutions():
    torch.manual_seed(0)
    block = edm.Block(8, 16, 4, dropout=0.0, attention=False)
    x, embedding = torch.randn(2, 8, 5, 5), torch.randn(2, 4)
    assert torch.equal(block(x, embedding), block.skip(x))  # the branch starts as nothing
    torch.nn.init.normal_(block.conv2.weight)
    torch.nn.init.zeros_(block.modulation.weight)
    with torch.no_grad():  # scaled by 1 + 0.5, shifted by 0.25
        block.modulation.bias.copy_(torch.tensor([0.5, 0.25]).repeat_interleave(16))
    between = block.norm2(block.conv1(F.silu(block.norm1(x))))
    expected = block.skip(x) + block.conv2(F.silu(1.5 * between + 0.25))
    assert torch.allclose(block(x, embedding), expected, atol=1e-5)


def test_attention_mixes_all_pixels_and_starts_as_nothing():
    torch.manual_seed(0)
    attention = edm.Attention(128)
    assert attention.heads == 2
    x = torch.randn(1, 128, 3, 3)
    assert torch.equal(attention(x), x)
    torch.nn.init.normal_(attention.out.weight)
    changed = x.clone()
    changed[..., 0, 0] += 1
    moved = (attention(changed) - attention(x)).abs().amax((0, 1))
    assert (moved > 1e-3).all()
    # Without positions: turned pixels give the turned result.
    assert torch.allclose(attention(x.flip(3)), attention(x).flip(3), atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Augmentation and label dropout
# ---------------------------------------------------------------------------------------------


def test_augmentation_with_probability_zero_does_nothing():
    images, _ = batch()
    augmented, told = edm.augment(images, 0.0)
    assert torch.equal(augmented, images) and told.shape == (16, 6) and not told.any()


def test_what_is_told_is_zero_exactly_where_nothing_was_done():
    torch.manual_seed(0)
    images = torch.rand(400, 3, 8, 8) * 2 - 1
    augmented, told = edm.augment(images, 0.2)
    same = (augmented == images).flatten(1).all(1)
    assert torch.equal(same, ~told.any(1))
    assert same.float().mean().item() == pytest.approx(0.8**4, abs=0.08)


@pytest.mark.parametrize("bf16", [False, True])
def test_flips_and_quarter_turns_are_exact(bf16, monkeypatch):
    monkeypatch.setattr(edm, "LOG2_SCALE_SD", 0.0)
    monkeypatch.setattr(edm, "SHIFT_SD", 0.0)
    torch.manual_seed(0)
    images = torch.rand(64, 3, 28, 28) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        augmented, told = edm.augment(images, 0.5)
    seen = set()
    for image, result, (mirrored, cosine, sine, *_) in zip(images, augmented, told, strict=True):
        turns = {(0.0, 0.0): 0, (-1.0, 1.0): 1, (-2.0, 0.0): 2, (-1.0, -1.0): 3}
        turn = turns[cosine.item(), sine.item()]
        expected = image.flip(2) if mirrored else image
        expected = torch.rot90(expected, turn, (1, 2))
        assert torch.allclose(result, expected, atol=1e-4)
        seen.add((mirrored.item(), turn))
    assert len(seen) == 8


def test_a_scaled_disc_grows_as_told_and_a_shifted_one_moves_as_told():
    axis = torch.arange(28) - 13.5
    blob = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * 2.0**2))
    torch.manual_seed(0)
    augmented, told = edm.augment(blob.expand(400, 1, 28, 28), 0.5)
    augmented, (mirrored, cosine, sine, log2_scale, *shift) = augmented[:, 0], told.T
    # A pixel of the new image shows what lies at its place, first scaled back and turned, then
    # mirrored and shifted; so the blob's centre, in pixels, goes the other way.
    scale = torch.exp2(edm.LOG2_SCALE_SD * log2_scale)
    x = -14 * edm.SHIFT_SD * shift[0] * (1 - 2 * mirrored) * scale
    y = -14 * edm.SHIFT_SD * shift[1] * scale
    x, y = (cosine + 1) * x + sine * y, -sine * x + (cosine + 1) * y
    near = (torch.hypot(x, y) < 4) & (scale < 1.3)  # no part of these lies outside the image
    assert near.sum() > 200
    mass = augmented.sum((1, 2))
    centre_x, centre_y = ((augmented * a).sum((1, 2)) / mass for a in (axis, axis[:, None]))
    assert torch.allclose(centre_x[near], x[near], atol=0.05)
    assert torch.allclose(centre_y[near], y[near], atol=0.05)
    # Bicubic interpolation keeps the mass to a few per cent.
    assert torch.allclose(mass[near], blob.sum() * scale[near] ** 2, rtol=0.05)


def test_labels_are_dropped_at_their_rate():
    model = build(label_dropout=0.25)
    torch.manual_seed(0)
    labels = torch.arange(8).repeat(1000)
    dropped = model.drop_labels(labels)
    kept = dropped == labels
    assert (dropped[~kept] == 8).all()
    assert (~kept).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(build(label_dropout=0.0).drop_labels(labels), labels)


def test_training_tells_the_network_what_was_augmented(monkeypatch):
    model, (images, labels) = build(label_dropout=0.5), batch()
    given = []
    monkeypatch.setattr(
        model, "loss", lambda *tensors: given.append(tensors) or model.unet.last.bias.sum()
    )
    model.training_step(images, labels, model.optimizers())
    ((augmented, dropped, told),) = given
    untouched = ~told.any(1)
    assert 0 < untouched.sum() < 16
    assert torch.equal(augmented[untouched], images[untouched])
    assert set(dropped.tolist()) - set(labels.tolist()) == {8}


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def test_steps_log_a_finite_loss_and_change_every_weight():
    """Three steps: the last layer, then the branches that start at zero, then what feeds them."""
    model, (images, labels) = build(augment_probability=0.5, label_dropout=0.5), batch()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizers = model.optimizers()
    for _ in range(3):
        logged = model.training_step(images, labels, optimizers)
        assert list(logged) == ["loss"]
        assert logged["loss"].ndim == 0 and logged["loss"].isfinite()
    for key, value in model.named_parameters():
        assert value.isfinite().all() and not torch.equal(value, before[key]), key


def test_training_lowers_the_loss():
    model, (images, labels) = build(dropout=0.0, augment_probability=0.0, lr=5e-3), batch()
    optimizers = model.optimizers()
    losses = [model.training_step(images, labels, optimizers)["loss"].item() for _ in range(30)]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_bfloat16_autocast_gives_a_finite_loss_close_to_that_of_float32():
    model, (images, labels) = trained(), batch()
    losses = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(images, labels, torch.zeros(16, 6))
            denoised = model.denoise(images, torch.tensor(1.0), labels)
        assert loss.dtype == denoised.dtype == torch.float32
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def rates(steps: int, **settings) -> list[float]:
    """The learning rate of each of the first steps, of 16 images each."""
    model, (images, labels) = build(**settings), batch()
    optimizers, used = model.optimizers(), []
    for _ in range(steps):
        model.training_step(images, labels, optimizers)
        used.append(optimizers["adam"].param_groups[0]["lr"])
    return used


def test_the_learning_rate_warms_up_over_images():
    used = rates(6, lr=0.01, warmup_images=64, decay_images=10**9)
    assert used == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_without_warm_up_the_first_step_has_the_full_learning_rate():
    assert rates(1, lr=0.01, warmup_images=0, decay_images=10**9) == pytest.approx([0.01])


def test_the_learning_rate_falls_by_a_cosine_to_a_fiftieth_and_stays_there():
    used = rates(6, lr=1.0, warmup_images=0, decay_images=64)
    half = math.sqrt(0.5)
    share = [(1 + half) / 2, 0.5, (1 - half) / 2, 0, 0, 0]
    assert used == pytest.approx([0.02 + 0.98 * part for part in share])


def test_a_resumed_schedule_equals_an_uninterrupted_one(tmp_path):
    (images, labels), steps = batch(), range(4)

    def go_on(model, optimizers, steps):
        for step in steps:
            torch.manual_seed(step)
            model.training_step(images, labels, optimizers)

    straight = build(warmup_images=20, decay_images=100)
    go_on(straight, straight.optimizers(), steps)

    first = build(warmup_images=20, decay_images=100)
    optimizers = first.optimizers()
    go_on(first, optimizers, steps[:2])
    torch.save([first.state_dict(), optimizers["adam"].state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = build(warmup_images=20, decay_images=100)
    optimizers = second.optimizers()
    second.load_state_dict(weights)
    optimizers["adam"].load_state_dict(state)
    go_on(second, optimizers, steps[2:])
    for key, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


# ---------------------------------------------------------------------------------------------
# Sampling and guidance
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", edm.SAMPLERS)
def test_samples_have_form_and_range_and_depend_on_generator_and_label_alone(sampler):
    model = trained(sampler=sampler)
    labels = torch.tensor([0, 3, 7])
    first = model.sample(labels, noise(1))
    before = torch.get_rng_state()
    again, other = model.sample(labels, noise(1)), model.sample(labels, noise(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (3, 3, 28, 28) and first.dtype == torch.float32
    assert first.min() >= -1 and first.max() <= 1 and not first.requires_grad
    assert torch.equal(first, again)
    assert (first - other).std() > 0.1 * first.std()
    assert model.conditional and not torch.equal(model.sample(labels + 1 & 7, noise(1)), first)


def test_guidance_leads_away_from_what_is_drawn_without_a_class():
    model, (images, labels) = trained(guidance_scale=2.5), batch(4)
    labels, sigma = labels[:4], torch.tensor(1.0)
    with torch.no_grad():
        conditional = model.denoise(images, sigma, labels)
        unconditional = model.denoise(images, sigma, torch.full_like(labels, 8))
        guided = model.guided(images, sigma, labels)
    assert not torch.allclose(conditional, unconditional, atol=1e-4)
    expected = unconditional + 2.5 * (conditional - unconditional)
    assert torch.allclose(guided, expected, atol=1e-5)


@pytest.mark.parametrize("scale, images_each", [(1.0, 1), (1.5, 2), (0.0, 2)])
def test_guidance_takes_one_call_of_the_network_and_none_of_it_at_scale_one(scale, images_each):
    model = build(guidance_scale=scale)
    model.unet = Recorder(torch.tensor(0.0))
    labels = torch.tensor([2, 5])
    model.guided(torch.zeros(2, 3, 28, 28), torch.tensor(1.0), labels)
    (given,) = model.unet.given
    assert given[2].tolist() == [2, 5, 8, 8][: 2 * images_each]
    assert not given[3].any()


def test_samples_start_from_noise_of_sigma_max():
    model = build(sigma_max=20.0, sampling_steps=2)
    model.unet = Recorder(torch.tensor(0.0))
    model.sample(torch.zeros(16, dtype=torch.int64), noise())
    x, c_noise, *_ = model.unet.given[0]
    assert (x * (20.0**2 + 0.25) ** 0.5).std().item() == pytest.approx(20, rel=0.02)
    assert c_noise.tolist() == pytest.approx([torch.tensor(20.0).log().item() / 4] * 16)


def test_samples_are_stored_as_jpeg_where_a_quality_is_set():
    model = trained()
    stored = copy.deepcopy(model)
    stored.config = dataclasses.replace(model.config, jpeg_quality=75)
    labels = torch.tensor([1, 4])
    plain, result = model.sample(labels, noise()), stored.sample(labels, noise())
    assert torch.equal(result, JPEG(75, "dct")(plain)) and not torch.equal(result, plain)


def test_grey_images_have_no_variants_that_are_stored_as_jpeg():
    grey = dataclasses.replace(TINY, image_channels=1)
    colour = edm.sampling_variants(TINY)
    assert edm.sampling_variants(grey) == [v for v in colour if "jpeg_quality" not in v]
    assert sum("jpeg_quality" in variant for variant in colour) == 2
    for config, variants in ((TINY, colour), (grey, edm.sampling_variants(grey))):
        for variant in variants:
            assert variant.keys() <= {*config.SAMPLING}
            dataclasses.replace(config, **variant)


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"channels": (12, 24)}, ("channels", "multiples of 8")),
        ({"channels": (64, 200)}, ("channels", "heads")),
        ({"channels": (8,) * 6}, ("image_size", "at least 32")),
        ({"blocks": 0}, ("blocks", "at least 1")),
        ({"attention_from": 4}, ("attention_from", "0 to 3")),
        ({"dropout": 1}, ("dropout", "[0, 1)")),
        ({"label_dropout": -0.1}, ("label_dropout", "[0, 1)")),
        ({"augment_probability": 1.1}, ("augment_probability", "[0, 1]")),
        ({"sigma_data": 0}, ("sigma_data", "above 0")),
        ({"p_std": 0}, ("p_std", "above 0")),
        ({"warmup_images": -1}, ("warmup_images", "at least 0")),
        ({"decay_images": 0}, ("decay_images", "at least 1")),
        ({"sampler": "euler"}, ("sampler", "heun", "euler")),
        ({"sampling_steps": 1}, ("sampling_steps", "at least 2")),
        ({"sigma_min": 90}, ("sigma_min", "sigma_max")),
        ({"sigma_min": 0}, ("sigma_min", "sigma_max")),
        ({"rho": 0.5}, ("rho", "at least 1")),
        ({"guidance_scale": -1}, ("guidance_scale", "at least 0")),
        ({"guidance_scale": 2, "label_dropout": 0}, ("guidance_scale", "label_dropout")),
        ({"jpeg_quality": 101}, ("jpeg_quality", "0 to 100")),
        ({"jpeg_quality": 75, "image_channels": 1}, ("jpeg_quality", "colours")),
    ],
)
def test_wrong_settings_are_bad_input(settings, words, bad_input):
    with bad_input(*words):
        dataclasses.replace(edm.Config(), **settings)
