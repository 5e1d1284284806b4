"""Conditional GAN: the game of Mirza and Osindero 2014, "Conditional Generative Adversarial Nets"
(equation numbers are those of that paper), played by the convolutional networks of Radford, Metz
and Chintala 2016, "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks" (sections are those of this one). Both networks are told the class.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.config import ModelConfig
from custom_models.layers import (
    init_dcgan,
    sides_down_to_four,
    transposed_convolutions,
    update,
)


@dataclass(frozen=True)
class Config(ModelConfig):
    """A GAN with the class in both networks. A comment says what each setting is."""

    latent_dim: int = 100  # random numbers behind an image
    base_channels: int = 64  # of both networks at half the image's side; doubled at each halving
    lr: float = 2e-4  # step size of Adam, for both networks (section 4)
    beta1: float = 0.5  # of Adam: share of the past in the mean gradient (section 4)
    epochs: int = 50  # passes over the training images

    def __post_init__(self):
        super().__post_init__()
        self.require(self.image_size >= 8, "image_size", "at least 8")
        for name in ("latent_dim", "base_channels"):
            self.require(getattr(self, name) >= 1, name, "at least 1")

    def build(self) -> "Model":
        return Model(self)


PRESETS = {
    "baseline": Config(),
    # Half as wide, with running-mean weights: for two CPU cores.
    "quick": replace(Config(), base_channels=32, ema_decay=0.98, epochs=20, batch_size=32),
}


class Generator(nn.Module):
    """z [N, latent_dim] and labels [N] → images in [-1, 1], [N, C, S, S]."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_classes = config.n_classes
        self.layers = transposed_convolutions(
            config.latent_dim + config.n_classes,
            config.base_channels,
            config.image_channels,
            config.image_size,
        )

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        # One-hot: a long learned vector would outweigh the noise, and a class have one image.
        condition = F.one_hot(labels, self.n_classes).to(latents.dtype)
        return self.layers(torch.cat([latents, condition], dim=1)[:, :, None, None])


class Discriminator(nn.Module):
    """Images in [-1, 1] and labels [N] → logits [N] of being a real image of that class."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_classes = config.n_classes
        layers, previous = [], config.image_channels + config.n_classes
        size = config.image_size
        for level in range(len(sides_down_to_four(config.image_size)) - 1):
            width = config.base_channels * 2**level
            layers.append(nn.Conv2d(previous, width, 4, stride=2, padding=1, bias=False))
            # Not on the first layer: the samples would oscillate (section 3).
            layers += [nn.BatchNorm2d(width)] if level > 0 else []
            layers.append(nn.LeakyReLU(0.2))
            previous, size = width, size // 2
        layers += [nn.Conv2d(previous, 1, size, bias=False), nn.Flatten(0)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        planes = F.one_hot(labels, self.n_classes).to(images.dtype)[:, :, None, None]
        planes = planes.expand(-1, -1, *images.shape[2:])
        return self.layers(torch.cat([images, planes], dim=1))


class Model(nn.Module):
    """Generator and discriminator, a step of both, and draws of a class."""

    conditional = True

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.generator = Generator(config)
        self.discriminator = Discriminator(config)
        self.apply(init_dcgan)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        settings = {"lr": self.config.lr, "betas": (self.config.beta1, 0.999)}
        return {
            "generator": torch.optim.Adam(self.generator.parameters(), **settings),
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), **settings),
        }

    def latents(self, n: int, device: torch.device, generator=None) -> Tensor:
        """z ~ N(0, I), [n, latent_dim]."""
        return torch.randn(n, self.config.latent_dim, device=device, generator=generator)

    def training_step(self, images: Tensor, labels: Tensor, optimizers: dict) -> dict[str, Tensor]:
        """One update of the discriminator, then one of the generator.

        images: [-1, 1], [N, C, S, S]; labels: int64 [N], of the real images and of the generated
        ones beside them. Logs the two losses, D(x|y), and D(G(z|y)) before and after the
        discriminator's update, as probabilities.
        """
        n, device = len(images), images.device
        # The discriminator maximises log D(x|y) + log(1 - D(G(z|y))), equation (2). With logits l,
        # -log D = softplus(-l) and -log(1 - D) = softplus(l): the binary cross entropy.
        with torch.no_grad():
            fakes = self.generator(self.latents(n, device), labels)
        # The losses are taken in float32, under autocast, too.
        real_logits = self.discriminator(images, labels).float()
        fake_logits = self.discriminator(fakes, labels).float()
        loss_d = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        update(optimizers["discriminator"], loss_d)

        # The generator maximises log D(G(z|y)), whose gradient does not vanish while the
        # discriminator is winning (Goodfellow et al. 2014, section 3).
        self.discriminator.requires_grad_(False)
        fakes = self.generator(self.latents(n, device), labels)
        logits = self.discriminator(fakes, labels).float()
        loss_g = F.softplus(-logits).mean()
        update(optimizers["generator"], loss_g)
        self.discriminator.requires_grad_(True)
        return {
            "loss_d": loss_d,
            "loss_g": loss_g,
            "D(x)": real_logits.sigmoid().mean(),
            "D(G(z)) before": fake_logits.sigmoid().mean(),
            "D(G(z)) after": logits.sigmoid().mean(),
        }

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """G(z|y) for z ~ N(0, I) and y the labels; [-1, 1], [N, C, S, S]."""
        return self.generator(self.latents(len(labels), labels.device, generator), labels)
