"""The `best` preset of the DCGAN: the same idea, a convolutional GAN without classes, with what the
field has learned since. The loss is that of Huang, Gokaslan, Kuleshov and Tompkin 2024, "The GAN is
dead; long live the GAN! A Modern GAN Baseline" (R3GAN): relativistic (Jolicoeur-Martineau 2019),
with zero-centred gradient penalties on real and on generated images. Networks without
normalisation, as there, but of a size that one CPU core can train.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.config import ModelConfig
from custom_models.layers import (
    ResidualBlock,
    cosine_decay,
    jpeg_layer,
    require_jpeg,
    update,
)
from utils import random_flips_and_turns


@dataclass(frozen=True)
class Config(ModelConfig):
    """The DCGAN's preset `best`. A comment says what each setting is."""

    latent_dim: int = 64  # random numbers behind an image
    generator_channels: tuple = (96, 64, 32)  # widths at a quarter of the side, a half, the whole
    discriminator_channels: tuple = (32, 64, 96)  # widths at the whole side, a half, a quarter
    # With a tenth of it the discriminator tells cells from flat colours too easily at first; in one
    # training the generator, its tanh saturated, was lost in it.
    gamma: float = 10.0  # weight of both penalties at first
    gamma_end: float = 0.1  # their weight after anneal_images; between them it falls geometrically
    anneal_images: int = 240_000  # images over which that weight falls
    penalty_interval: int = 2  # steps between penalties, which then weigh as much more
    lr: float = 4e-4  # largest step size of Adam, for both networks
    decay_images: int = 10**9  # images over which lr falls to a fiftieth; so many: it stays
    beta1: float = 0.0  # of Adam: share of the past in the mean gradient
    beta2: float = 0.99  # of Adam: share of the past in the mean squared gradient
    jpeg_quality: int = 75  # of the data set's files, 1 to 100; 0: it was not stored as JPEG
    jpeg_chroma: str = "mean"  # how JPEG halves colours: mean, or dct as BloodMNIST's own
    JPEG_ELSEWHERE: ClassVar[int] = 0  # jpeg_quality for data that was not stored as JPEG
    LATER: ClassVar[dict] = {"jpeg_chroma": "mean", "decay_images": 10**9}
    batch_size: int = 64
    epochs: int = 18
    ema_decay: float = 0.999
    flips_and_turns: bool = False
    validation_epochs: int = 3

    def __post_init__(self):
        super().__post_init__()
        self.require(self.latent_dim >= 1, "latent_dim", "at least 1")
        for name in ("generator_channels", "discriminator_channels"):
            self.require(len(getattr(self, name)) == 3, name, "three widths")
        self.require(self.image_size >= 8, "image_size", "at least 8")
        for name in ("gamma", "gamma_end"):
            self.require(getattr(self, name) > 0, name, "above 0")
        self.require(self.anneal_images >= 1, "anneal_images", "at least 1")
        self.require(self.decay_images >= 1, "decay_images", "at least 1")
        self.require(self.penalty_interval >= 1, "penalty_interval", "at least 1")
        require_jpeg(self)

    def build(self) -> "Model":
        return Model(self)


class Generator(nn.Module):
    """z [N, latent_dim] → images in [-1, 1], [N, C, S, S]."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.generator_channels
        self.turn = config.flips_and_turns
        self.size, side = config.image_size, -(-config.image_size // 4)
        layers = [
            nn.Linear(config.latent_dim, widths[0] * side**2),
            nn.Unflatten(1, (widths[0], side, side)),
            ResidualBlock(widths[0]),
        ]
        for width, following in pairwise(widths):
            layers.append(nn.ConvTranspose2d(width, following, 4, stride=2, padding=1))
            layers.append(ResidualBlock(following))
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.jpeg = jpeg_layer(config)

    def forward(self, latents: Tensor) -> Tensor:
        images = self.jpeg(self.layers(latents)[:, :, : self.size, : self.size])
        # In training the real images are turned, and the blocks of their JPEG with them.
        return random_flips_and_turns(images) if self.training and self.turn else images


class Discriminator(nn.Module):
    """Images in [-1, 1] → D(x) [N], higher for real ones."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.discriminator_channels
        layers = [
            nn.Conv2d(config.image_channels, widths[0], 3, padding=1),
            ResidualBlock(widths[0]),
        ]
        for width, following in pairwise(widths):
            layers.append(nn.Conv2d(width, following, 4, stride=2, padding=1))
            layers.append(ResidualBlock(following))
        side = config.image_size // 2 // 2
        layers += [nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(widths[-1] * side**2, 1)]
        self.layers = nn.Sequential(*layers, nn.Flatten(0))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Model(nn.Module):
    """Generator and discriminator, a step of both, and draws of whatever class."""

    conditional = False
    penalised = ("discriminator",)  # the networks whose gradient is part of a loss

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.generator = Generator(config)
        self.discriminator = Discriminator(config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # a resumed run goes on

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        settings = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
        return {
            "generator": torch.optim.Adam(self.generator.parameters(), **settings),
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), **settings),
        }

    def latents(self, n: int, device: torch.device, generator=None) -> Tensor:
        """z ~ N(0, I), [n, latent_dim]."""
        return torch.randn(n, self.config.latent_dim, device=device, generator=generator)

    def training_step(self, images: Tensor, labels: Tensor, optimizers: dict) -> dict[str, Tensor]:
        """One update of the discriminator, then one of the generator.

        images: [-1, 1], [N, C, S, S]; the labels are not used. Both losses are softplus(-margin) of
        the relativistic pairing: each generated image is judged beside a real one, which is
        meant to make fewer kinds of cells unprofitable. Logs the losses, the mean margin
        D(x) - D(G(z)) before the updates, and the penalties.
        """
        config, n = self.config, len(images)
        with torch.no_grad():
            fakes = self.generator(self.latents(n, images.device))
        done = int(self.steps)  # the one value of a step that a GPU is waited for
        penalised = done % config.penalty_interval == 0
        self.steps += 1
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = self.learning_rate((done + 1) * n)
        # Penalties need a second derivative, which does not bear less than float32.
        with torch.autocast(images.device.type, enabled=not penalised and _mixed(images.device)):
            x, y = (part.detach().float().requires_grad_(penalised) for part in (images, fakes))
            margin = (self.discriminator(x) - self.discriminator(y)).float()
            loss_d = F.softplus(-margin).mean()
            r1 = r2 = torch.zeros((), device=images.device)
            if penalised:
                # E ‖∇D(x)‖² on real images and on generated ones; the sign is squared away.
                gradients = torch.autograd.grad(margin.sum(), [x, y], create_graph=True)
                r1, r2 = (config.penalty_interval * (g**2).sum((1, 2, 3)).mean() for g in gradients)
        update(optimizers["discriminator"], loss_d + self.gamma((done + 1) * n) / 2 * (r1 + r2))

        self.discriminator.requires_grad_(False)
        real = self.discriminator(images)
        fake = self.discriminator(self.generator(self.latents(n, images.device)))
        loss_g = F.softplus((real - fake).float()).mean()
        update(optimizers["generator"], loss_g)
        self.discriminator.requires_grad_(True)
        return {"loss_d": loss_d, "loss_g": loss_g, "margin": margin.mean(), "r1": r1, "r2": r2}

    def learning_rate(self, images_seen: int) -> float:
        """A cosine down towards a fiftieth."""
        return self.config.lr * cosine_decay(images_seen / self.config.decay_images)

    def gamma(self, images_seen: int) -> float:
        """The penalties' weight: large while generated images are far off, then smaller."""
        config = self.config
        done = min(1.0, images_seen / config.anneal_images)
        return config.gamma ** (1 - done) * config.gamma_end**done

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """G(z) for z ~ N(0, I), as many as there are labels; [-1, 1], [N, C, S, S]."""
        return self.generator(self.latents(len(labels), labels.device, generator))


def _mixed(device: torch.device) -> bool:
    """Whether the step runs in mixed precision."""
    return torch.is_autocast_enabled(device.type)
