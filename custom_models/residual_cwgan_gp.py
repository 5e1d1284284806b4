"""The `best` preset of the cWGAN-GP: the same loss, Gulrajani et al. 2017, "Improved Training of
Wasserstein GANs" (equation numbers are those of the paper), with its residual networks
(appendix F), class-conditional batch norm in the generator (Dumoulin et al. 2017, "A Learned
Representation for Artistic Style") and a projection critic (Miyato and Koyama 2018, "cGANs with
Projection Discriminator"). `cwgan_gp.Model` trains them.
"""

from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.config import ModelConfig
from custom_models.layers import ResidualBlock, jpeg_layer, require_jpeg
from utils import random_flips_and_turns


@dataclass(frozen=True)
class Config(ModelConfig):
    latent_dim: int = 64  # random numbers behind an image
    generator_channels: tuple = (128, 64, 32)  # widths at a quarter of the side, a half, the whole
    critic_channels: tuple = (32, 64, 128)  # widths at the whole side, a half, a quarter
    noise: float = 0.0  # first weight of what is added to each enlargement, for texture; 0: none
    critic_steps: int = 2  # critic updates to one of the generator
    gradient_penalty: float = 10.0  # weight λ of the penalty, equation (3)
    lr: float = 3e-4  # step size of Adam, for both networks
    decay_images: int = 0  # images over which lr falls to a fiftieth, by a cosine; 0: it stays
    beta1_critic: float = 0.0  # of Adam: share of the past in the critic's mean gradient
    beta1_generator: float = 0.0  # the same for the generator
    beta2: float = 0.9  # of Adam: share of the past in the mean squared gradient, for both networks
    jpeg_quality: int = 75  # of the data set's files, 1 to 100; 0: it was not stored as JPEG
    jpeg_chroma: str = "mean"  # how JPEG halves colours: mean, or dct as BloodMNIST's own
    JPEG_ELSEWHERE: ClassVar[int] = 0  # jpeg_quality for data that was not stored as JPEG
    even_classes: ClassVar[bool] = False  # in training images are generated of the batch's classes
    LATER: ClassVar[dict] = {"jpeg_chroma": "mean", "decay_images": 0, "noise": 0.0}
    batch_size: int = 64
    epochs: int = 40
    ema_decay: float = 0.999
    flips_and_turns: bool = True
    validation_epochs: int = 4

    def __post_init__(self):
        super().__post_init__()
        for name in ("latent_dim", "critic_steps"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(len(self.generator_channels) == 3, "generator_channels", "three widths")
        self.require(len(self.critic_channels) == 3, "critic_channels", "three widths")
        self.require(self.gradient_penalty >= 0, "gradient_penalty", "at least 0")
        self.require(self.decay_images >= 0, "decay_images", "at least 0")
        self.require(self.noise >= 0, "noise", "at least 0")
        self.require(self.image_size >= 8, "image_size", "at least 8")
        require_jpeg(self)

    @property
    def images_per_step(self) -> int:
        """Every critic update sees its own real images: an epoch is one pass of the critic."""
        return self.batch_size * self.critic_steps

    def networks(self) -> tuple["Generator", "Critic"]:
        return Generator(self), Critic(self)

    def build(self) -> nn.Module:
        """The baseline's losses and updates, with these networks."""
        from custom_models.cwgan_gp import Model  # a file that imports this one

        return Model(self)


# For PBC at 64 pixels, or 128 with `image_size`, on a GPU. In the small one, without noise, the
# nuclei were woven of lines along the pixels. The rate falls, so that curves end flat.
BEST_64 = replace(Config(), image_size=64, noise=0.2, flips_and_turns=False, decay_images=478_400)

# Narrower, with small batches and a third of the epochs: an hour and a half on one CPU core. A
# reduced budget, not a result. The last epoch is at the lowest rate.
SMALL = replace(
    BEST_64,
    generator_channels=(64, 32, 32),
    critic_channels=(32, 32, 64),
    decay_images=143_500,
    batch_size=16,
    epochs=13,
    validation_epochs=2,
)


def with_deeper_levels(widths: tuple, image_size: int) -> tuple:
    """Widths from the image's own side inwards, with levels added until the last side is at most 8.

    Each has twice the width of the one before it, at most 256. Three widths are enough for images
    of up to 32 pixels; 64 pixels take four, 128 five.
    """
    while image_size > 8 * 2 ** (len(widths) - 1):
        widths = (*widths, min(2 * widths[-1], 256))
    return widths


class ConditionalBatchNorm(nn.Module):
    """Batch norm with a scale and a shift for each class: [N, C, H, W], labels [N] → the same."""

    def __init__(self, width: int, n_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.scale = nn.Embedding(n_classes, width)
        self.shift = nn.Embedding(n_classes, width)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scale, shift = self.scale(labels), self.shift(labels)
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class UpBlock(nn.Module):
    """x enlarged, plus two convolutions of it (appendix F): [N, C, H, W] → [N, D, 2 H, 2 W].

    With `noise`, each convolution adds a plane of it, times a weight for each channel that is
    `noise` at first: Karras et al. 2019, "A Style-Based Generator Architecture", section 3.2.
    """

    def __init__(self, inputs: int, outputs: int, n_classes: int, noise: float = 0.0):
        super().__init__()
        self.norms = nn.ModuleList(ConditionalBatchNorm(w, n_classes) for w in (inputs, outputs))
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.noise = nn.Parameter(torch.full((2, outputs, 1, 1), noise)) if noise else None

    def forward(self, x: Tensor, labels: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise: N(0, 1), [N, 2 · 2 H · 2 W], for blocks that add it."""
        y = self.first(F.interpolate(F.relu(self.norms[0](x, labels)), scale_factor=2))
        if self.noise is None:
            added = 0, 0
        else:
            planes = noise.unflatten(1, (2, 1, *y.shape[2:]))
            added = self.noise[0] * planes[:, 0], self.noise[1] * planes[:, 1]
        y = self.second(F.relu(self.norms[1](y + added[0], labels))) + added[1]
        return F.interpolate(self.shortcut(x), scale_factor=2) + y


class Generator(nn.Module):
    """z [N, latent_dim], with the noise of all blocks behind it, and labels [N] → images.

    Images are in [-1, 1], [N, C, S, S]. `inputs` are the numbers that z and each block take.
    """

    def __init__(self, config: Config):
        super().__init__()
        widths = with_deeper_levels(config.generator_channels[::-1], config.image_size)[::-1]
        first, last = widths[0], widths[-1]
        self.turn = config.flips_and_turns
        self.size, side = config.image_size, -(-config.image_size // 2 ** (len(widths) - 1))
        self.start = nn.Sequential(
            nn.Linear(config.latent_dim, first * side**2), nn.Unflatten(1, (first, side, side))
        )
        self.blocks = nn.ModuleList(
            UpBlock(i, o, config.n_classes, config.noise) for i, o in pairwise(widths)
        )
        self.inputs = [config.latent_dim]
        if config.noise:
            self.inputs += [2 * (side * 2 ** (k + 1)) ** 2 for k in range(len(self.blocks))]
        self.norm = nn.BatchNorm2d(last)
        self.out = nn.Conv2d(last, config.image_channels, 3, padding=1)
        self.jpeg = jpeg_layer(config)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        z, *noise = latents.split(self.inputs, dim=1)
        x = self.start(z)
        for block, part in zip_longest(self.blocks, noise):
            x = block(x, labels, part)
        x = F.relu(self.norm(x[:, :, : self.size, : self.size]))
        images = self.jpeg(self.out(x).tanh())
        # In training the real images are turned, and the blocks of their JPEG with them.
        return random_flips_and_turns(images) if self.training and self.turn else images


class Critic(nn.Module):
    """Images in [-1, 1] and labels [N] → scores [N], higher for real ones."""

    def __init__(self, config: Config):
        super().__init__()
        widths = with_deeper_levels(config.critic_channels, config.image_size)
        layers = [nn.Conv2d(config.image_channels, widths[0], 3, padding=1), nn.LeakyReLU(0.2)]
        for width, following in pairwise(widths):
            layers.append(nn.Conv2d(width, following, 4, stride=2, padding=1))
            layers.append(ResidualBlock(following))
        side = config.image_size // 2 ** (len(widths) - 1)
        layers += [nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(widths[-1] * side**2, 128)]
        self.features = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        self.score = nn.Linear(128, 1)
        self.embedding = nn.Embedding(config.n_classes, 128)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.features(images)
        # Projection: an unconditional score plus the features' part along the class.
        return self.score(features).flatten() + (self.embedding(labels) * features).sum(1)
