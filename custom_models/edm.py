"""EDM (Karras, Aittala, Aila and Laine 2022, "Elucidating the Design Space of Diffusion-Based
Generative Models"; equation, table and algorithm numbers are those of the paper), with classes told
to the network and classifier-free guidance (Ho and Salimans 2022).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.config import ModelConfig
from custom_models.layers import CHROMA, jpeg_layer, require_jpeg, update, warmed_cosine_decay
from custom_models.samplers import SAMPLERS, evaluations, karras_sigmas


def heads(channels: int) -> int:
    """Attention heads: one for every 64 channels."""
    return max(1, channels // 64)


@dataclass(frozen=True)
class Config(ModelConfig):
    """The preset for one GPU: 11,883,843 parameters at 28 pixels and eight classes.

    A forward pass takes 2.33 GFLOP an image (two for each multiplication), a training step about
    three times that: 7 GFLOP. 111 epochs of BloodMNIST are 1.3 million images.
    """

    channels: tuple = (64, 128, 256)  # widths of the U-Net's levels, multiples of 8
    blocks: int = 2  # residual blocks of a level, on the way down and again on the way up
    attention_from: int = 1  # the first level with self-attention; the image's own size is level 0
    dropout: float = 0.1  # share of each block's features left out in training, in [0, 1)
    label_dropout: float = 0.1  # share of training images whose class is not told, in [0, 1)
    augment_probability: float = 0.2  # of each of the four augmentations, in [0, 1]
    sigma_data: float = 0.5  # pixels' spread; BloodMNIST: 0.41 about its mean 0.43, 0.60 about zero
    p_mean: float = -1.2  # mean of log σ in training
    p_std: float = 1.2  # its standard deviation
    lr: float = 1e-3  # largest step size of Adam
    warmup_images: int = 50_000  # images over which the learning rate rises from 0 to lr
    decay_images: int = 1_327_449  # images over which lr falls to a fiftieth, by a cosine
    epochs: int = 111
    batch_size: int = 256
    ema_decay: float = 0.9995
    validation_epochs: int = 37
    sampler: str = "dpm_solver_2m"  # heun, ddim or dpm_solver_2m
    sampling_steps: int = 32  # levels of noise on the way to an image
    sigma_min: float = 0.002  # lowest level of noise in sampling, for images in [-1, 1]
    sigma_max: float = 80.0  # highest level, where sampling begins
    rho: float = 7.0  # how much denser the levels lie at low noise; 1: evenly
    guidance_scale: float = 1.0  # how strongly the class pulls at a sample; 1: as trained
    # Off: stored as JPEG once more, cells of `best_small` were farther from validation cells, which
    # were stored so, by KID.
    jpeg_quality: int = 0  # of a JPEG that samples are stored in, 1 to 100; 0: none
    jpeg_chroma: str = "dct"  # how JPEG halves colours: mean, or dct as BloodMNIST's own
    COMPILED: ClassVar[bool] = True
    SAMPLING: ClassVar[tuple] = (
        "sampler",
        "sampling_steps",
        "sigma_min",
        "sigma_max",
        "rho",
        "guidance_scale",
        "jpeg_quality",
        "jpeg_chroma",
    )
    COMPARED: ClassVar[tuple] = (
        "sampler",
        "sampling_steps",
        "guidance_scale",
        "jpeg_quality",
        "jpeg_chroma",
    )

    def __post_init__(self):
        super().__post_init__()
        channels, levels = self.channels, len(self.channels)
        self.require(all(c % 8 == 0 for c in channels), "channels", "multiples of 8")
        self.require(
            all(c % heads(c) == 0 for c in channels[self.attention_from :]),
            "channels",
            "multiples of their attention heads, one for every 64",
        )
        smallest = 2 ** (levels - 1)
        self.require(self.image_size >= smallest, "image_size", f"at least {smallest}")
        self.require(self.blocks >= 1, "blocks", "at least 1")
        self.require(0 <= self.attention_from <= levels, "attention_from", f"from 0 to {levels}")
        self.require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self.require(0 <= self.label_dropout < 1, "label_dropout", "in [0, 1)")
        self.require(0 <= self.augment_probability <= 1, "augment_probability", "in [0, 1]")
        self.require(self.sigma_data > 0, "sigma_data", "above 0")
        self.require(self.p_std > 0, "p_std", "above 0")
        self.require(self.warmup_images >= 0, "warmup_images", "at least 0")
        self.require(self.decay_images >= 1, "decay_images", "at least 1")
        self.require(self.sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}")
        self.require(self.sampling_steps >= 2, "sampling_steps", "at least 2")
        self.require(0 < self.sigma_min < self.sigma_max, "sigma_min", "in (0, sigma_max)")
        self.require(self.rho >= 1, "rho", "at least 1")
        self.require(self.guidance_scale >= 0, "guidance_scale", "at least 0")
        self.require(
            self.guidance_scale == 1 or self.label_dropout > 0,
            "guidance_scale",
            "1 where label_dropout is 0, as guidance needs a network that also knows no class",
        )
        require_jpeg(self)

    def build(self) -> "Model":
        return Model(self)


# For PBC at 64 pixels: one more level, of half the width, at the image's own size, and attention
# at the two lowest resolutions alone; 11,418,275 parameters, 3.93 GFLOP a forward pass. It sees
# a third of the images that `best` does, in batches of half the size.
BEST_64 = replace(
    Config(),
    image_size=64,
    channels=(32, 64, 128, 256),
    attention_from=2,
    # So few epochs don't teach it the cells by heart.
    dropout=0.05,
    augment_probability=0.1,
    lr=8e-4,
    decay_images=478_360,
    epochs=40,
    batch_size=128,
    ema_decay=0.999,
    validation_epochs=10,
)
# At 128 pixels: a fifth level, 11,548,515 parameters, 7.13 GFLOP a forward pass. Neighbouring
# pixels of a larger image tell more of each other, so more noise is needed to hide as much
# (Hoogeboom et al. 2023, "simple diffusion", section 3.1).
BEST_128 = replace(
    BEST_64,
    image_size=128,
    channels=(32, 32, 64, 128, 256),
    attention_from=3,
    p_mean=-0.8,
    decay_images=358_770,
    epochs=30,
)

# A U-Net for a CPU core: 1,096,771 parameters, 0.24 GFLOP a forward pass; a reduced budget, not a
# result.
SMALL = replace(
    Config(),
    channels=(32, 64, 96),
    blocks=1,
    attention_from=2,
    dropout=0.0,
    # So few parameters don't learn the cells by heart, in so few epochs.
    augment_probability=0.0,
    warmup_images=10_000,
    decay_images=260_000,
    epochs=24,
    # An image costs a core hardly more in a batch of 16 than of 64, for four times the updates.
    batch_size=16,
    ema_decay=0.9995,
    validation_epochs=4,
    # Chosen by validation KID, among solvers of 32 evaluations.
    sampler="ddim",
    sampling_steps=32,
)


def sampling_variants(config: Config) -> list[dict]:
    """What quality is measured against, with one set of weights: steps, guidance, and JPEG."""
    steps = {"dpm_solver_2m": (4, 8, 16, 32), "ddim": (4, 8, 16, 32, 64), "heun": (3, 5, 9, 17)}
    variants = [{"sampler": s, "sampling_steps": n} for s, counts in steps.items() for n in counts]
    variants += [{"guidance_scale": scale} for scale in (1.25, 1.5, 2.0, 3.0)]
    if config.image_channels == 3:
        variants += [{"jpeg_quality": 75, "jpeg_chroma": chroma} for chroma in CHROMA]
    return variants


# ---------------------------------------------------------------------------------------------
# Augmentation (appendix F.2)
# ---------------------------------------------------------------------------------------------

# What the network is told: mirrored or not, cosine - 1 and sine of the turn, log2 of the scale and
# both shifts in units of their standard deviations.
AUGMENTATION_FEATURES = 6
LOG2_SCALE_SD = 0.2
SHIFT_SD = 0.25  # of half the image's side, in which positions are counted: an eighth of it


def augment(images: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Mirror, turn by quarters, scale and shift each image, each of them with this probability.

    images: [N, C, S, S]. Returns the augmented images and what was done, [N, 6], all zero for
    images that were left as they are, to the bit. What lies outside is filled by reflection.
    """
    n, device = len(images), images.device
    # Autocast would round the positions of the pixels to bfloat16.
    with torch.autocast(device.type, enabled=False):
        mirrored, turned, scaled, shifted = (torch.rand(4, n, device=device) < probability).float()
        angle = turned * torch.randint(1, 4, (n,), device=device) * (math.pi / 2)
        cosine, sine = angle.cos().round(), angle.sin().round()
        log2_scale = scaled * torch.randn(n, device=device)
        x, y = shifted * torch.randn(2, n, device=device)
        # From the position of a pixel in the new image to its position in the old one.
        size, mirror = torch.exp2(-LOG2_SCALE_SD * log2_scale), 1 - 2 * mirrored
        rows = [
            torch.stack([mirror * cosine * size, -mirror * sine * size, SHIFT_SD * x], dim=1),
            torch.stack([sine * size, cosine * size, SHIFT_SD * y], dim=1),
        ]
        positions = F.affine_grid(torch.stack(rows, dim=1), images.shape, align_corners=False)
        augmented = F.grid_sample(
            images, positions, mode="bicubic", padding_mode="reflection", align_corners=False
        )
        done = torch.stack([mirrored, cosine - 1, sine, log2_scale, x, y], dim=1)
        untouched = (done == 0).all(1)[:, None, None, None]
        return torch.where(untouched, images, augmented), done


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------


def fourier_features(c_noise: Tensor, dim: int) -> Tensor:
    """[N] → [N, dim]: cosines and sines of 1/4 to 16 waves a unit, geometrically spaced."""
    waves = torch.logspace(-2, 4, dim // 2, base=2, device=c_noise.device)
    angles = 2 * math.pi * c_noise[:, None] * waves
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all weights 0, so that its branch starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def norm(channels: int) -> nn.GroupNorm:
    """Of groups of eight channels, whatever the width."""
    return nn.GroupNorm(channels // 8, channels)


class Attention(nn.Module):
    """Self-attention over all pixels, as a residual: [N, C, H, W] → the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = heads(channels)
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w)
        query, key, value = qkv.transpose(3, 4).unbind(1)  # [N, heads, pixels, channels]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.transpose(2, 3).reshape(n, c, h, w))


class Block(nn.Module):
    """Two 3×3 convolutions as a residual; the embedding scales and shifts between them.

    x: [N, inputs, H, W], embedding: [N, embedding_dim] → [N, outputs, H, W].
    """

    def __init__(
        self, inputs: int, outputs: int, embedding_dim: int, dropout: float, attention: bool
    ):
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(embedding_dim, 2 * outputs)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.attention = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        y = F.silu(self.norm2(y) * (1 + scale) + shift)
        y = self.conv2(self.dropout(y))
        return self.attention(self.skip(x) + y)


class UNet(nn.Module):
    """F_θ of equation (7): noisy images [N, C, S, S] of variance 1 → [N, C, S, S].

    c_noise: [N]. labels: int64 [N]; n_classes where the class is not told. augmentation: [N, 6].
    """

    def __init__(self, config: Config):
        super().__init__()
        channels, levels = config.channels, range(len(config.channels))
        self.features, dim = channels[0], 4 * channels[0]
        self.noise = nn.Sequential(nn.Linear(self.features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(config.n_classes + 1, dim)
        self.augmentation = nn.Linear(AUGMENTATION_FEATURES, dim, bias=False)

        def block(inputs: int, level: int) -> Block:
            attention = level >= config.attention_from
            return Block(inputs, channels[level], dim, config.dropout, attention)

        self.first = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = channels[0], []
        for level in levels:
            self.down.append(nn.ModuleList())
            for _ in range(config.blocks):
                self.down[-1].append(block(width, level))
                width = channels[level]
                skips.append(width)
        self.middle = block(width, levels[-1])
        for level in reversed(levels):
            self.up.append(nn.ModuleList())
            for _ in range(config.blocks):
                self.up[-1].append(block(width + skips.pop(), level))
                width = channels[level]
        self.norm = norm(width)
        self.last = zero(nn.Conv2d(width, config.image_channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor, augmentation: Tensor) -> Tensor:
        embedding = self.noise(fourier_features(c_noise, self.features))
        embedding = F.silu(embedding + self.label(labels) + self.augmentation(augmentation))
        x, skips = self.first(x), []
        for level, blocks in enumerate(self.down):
            if level:  # 28 → 14 → 7 → 4: an odd side is rounded up, so that no pixel is lost
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            for block in blocks:
                x = block(x, embedding)
                skips.append(x)
        x = self.middle(x, embedding)
        for level, blocks in enumerate(self.up):
            if level:
                height, width = skips[-1].shape[2:]
                x = F.interpolate(x, scale_factor=2)[:, :, :height, :width]
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.last(F.silu(self.norm(x)))


# ---------------------------------------------------------------------------------------------
# Training and sampling
# ---------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The U-Net, preconditioned, a step of denoising, and the ways back from noise to images."""

    conditional = True

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.unet = UNet(config)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # The count for the warm-up stands in the optimizer's own state, and is saved with it.
        group = {"params": self.unet.parameters(), "images_seen": 0}
        return {"adam": torch.optim.Adam([group], lr=self.config.lr)}

    def denoise(
        self, x: Tensor, sigma: Tensor, labels: Tensor, augmentation: Tensor | None = None
    ) -> Tensor:
        """D_θ(x; σ), equation (7) with the preconditioning of table 1; float32 [N, C, S, S].

        x: images with noise of standard deviation σ, [N] or one for all. labels and augmentation:
        as in `UNet`; without augmentation by default.
        """
        if augmentation is None:
            augmentation = x.new_zeros(len(x), AUGMENTATION_FEATURES)
        sigma, sigma_data = sigma.expand(len(x)), self.config.sigma_data
        variance = (sigma**2 + sigma_data**2)[:, None, None, None]
        c_skip = sigma_data**2 / variance
        c_out = sigma[:, None, None, None] * sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.log() / 4
        return c_skip * x + c_out * self.unet(c_in * x, c_noise, labels, augmentation).float()

    def loss(self, images: Tensor, labels: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Equation (2), weighed by λ(σ) of table 1 so that every σ counts alike; about 1 at first.

        images: [-1, 1], [N, C, S, S]; labels, augmentation: as in `denoise`.
        """
        config = self.config
        sigma = torch.randn(len(images), device=images.device)
        sigma = (config.p_mean + config.p_std * sigma).exp()
        noise = sigma[:, None, None, None] * torch.randn_like(images)
        denoised = self.denoise(images + noise, sigma, labels, augmentation)
        weight = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
        return (weight[:, None, None, None] * (denoised - images) ** 2).mean()

    def drop_labels(self, labels: Tensor) -> Tensor:
        """The labels, some of them replaced by the one that tells no class; int64 [N]."""
        dropped = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
        return labels.masked_fill(dropped, self.config.n_classes)

    def training_step(self, images: Tensor, labels: Tensor, optimizers: dict) -> dict[str, Tensor]:
        """One update. images: [-1, 1], [N, C, S, S]; labels: int64 [N]."""
        adam = optimizers["adam"]
        (group,) = adam.param_groups
        group["images_seen"] += len(images)
        group["lr"] = self.learning_rate(group["images_seen"])
        images, augmentation = augment(images, self.config.augment_probability)
        loss = self.loss(images, self.drop_labels(labels), augmentation)
        update(adam, loss)
        return {"loss": loss}

    def learning_rate(self, images_seen: int) -> float:
        """Linear warm-up, and a cosine down to a fiftieth.

        The paper keeps its rate; with less than its 200 million images, the last steps' noise would
        stay in the weights.
        """
        config = self.config
        return config.lr * warmed_cosine_decay(
            images_seen, config.warmup_images, config.decay_images
        )

    def evaluations(self) -> int:
        """Passes of the network for one image, by the configured sampler and guidance."""
        passes = evaluations(self.config.sampler, self.config.sampling_steps)
        return passes if self.config.guidance_scale == 1 else 2 * passes

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images of these classes by the configured sampler; [-1, 1], [N, C, S, S]."""
        config = self.config
        shape = (len(labels), config.image_channels, config.image_size, config.image_size)
        noise = torch.randn(shape, generator=generator, device=labels.device)
        return self.in_steps(labels, noise, config.sampling_steps)

    def in_steps(self, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Images of these classes from given noise of variance 1, in any number of steps."""
        images = self.solve(labels, noise, steps).clamp(-1, 1)
        return jpeg_layer(self.config).to(noise.device)(images)

    def solve(self, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
        """The end of the probability flow ODE that begins at this noise; [N, C, S, S]."""
        config = self.config
        sigmas = karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)
        sigmas = sigmas.to(labels.device)

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return self.guided(x, sigma, labels)

        return SAMPLERS[config.sampler](model, sigmas[0] * noise, sigmas)

    def compile(self, *arguments, **options) -> None:
        """Its network, which is what is called."""
        self.unet.compile(*arguments, **options)

    def guided(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Denoised with classifier-free guidance: away from what the network draws without a class.

        Ho and Salimans 2022, equation (6), whose w is guidance_scale - 1.
        """
        scale = self.config.guidance_scale
        if scale == 1:
            return self.denoise(x, sigma, labels)
        unknown = torch.full_like(labels, self.config.n_classes)
        both = self.denoise(torch.cat([x, x]), sigma, torch.cat([labels, unknown]))
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)
