"""Deep convolutional GAN (Radford, Metz and Chintala 2016, "Unsupervised Representation Learning
with Deep Convolutional Generative Adversarial Networks"; the objective is equation (1) of
Goodfellow et al. 2014, with both labels smoothed, as published for BloodMNIST; Salimans et al.
2016, section 3.4, smooth the real one alone).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models import r3gan
from custom_models.config import ModelConfig
from custom_models.layers import init_dcgan, update


@dataclass(frozen=True)
class Config(ModelConfig):
    """The published DCGAN. A comment says what each setting is."""

    latent_dim: int = 100  # random numbers behind an image
    generator_channels: tuple = (256, 128, 64, 32)  # widths at 4, 8, 16 and 32 pixels
    discriminator_channels: tuple = (32, 64, 128, 256)  # widths at 14, 7, 3 and 1 pixels
    real_label: float = 0.9  # the cross entropy's target for real images, in [0, 1]
    fake_label: float = 0.1  # its target for generated ones, in [0, 1]
    generator_steps: int = 3  # generator updates to one of the discriminator
    lr: float = 1e-3  # step size of Adam, for both networks
    beta1: float = 0.5  # of Adam: share of the past in the mean gradient
    epochs: int = 40

    def __post_init__(self):
        super().__post_init__()
        self.require(
            self.image_size == 28,
            "image_size",
            "28, for which the layers of this DCGAN are made (its preset best takes other sizes)",
        )
        self.require(self.latent_dim >= 1, "latent_dim", "at least 1")
        self.require(self.batch_size >= 2, "batch_size", "at least 2, for batch normalisation")
        self.require(self.generator_steps >= 1, "generator_steps", "at least 1")
        self.require(len(self.generator_channels) == 4, "generator_channels", "four widths")
        self.require(len(self.discriminator_channels) == 4, "discriminator_channels", "four widths")
        for name in ("real_label", "fake_label"):
            self.require(0 <= getattr(self, name) <= 1, name, "in [0, 1]")

    def build(self) -> "Model":
        return Model(self)


PRESETS = {
    "baseline": Config(),
    "best": r3gan.Config(),
    "quick": replace(
        Config(),
        generator_channels=(128, 64, 32, 16),
        discriminator_channels=(16, 32, 64, 128),
        lr=5e-4,
        epochs=16,
        batch_size=16,  # for more updates: the first few hundred end in one pattern for all noise
    ),
}


class Generator(nn.Module):
    """z [N, latent_dim] → images in [-1, 1], [N, C, 28, 28]."""

    def __init__(self, config: Config):
        super().__init__()
        first, *rest = config.generator_channels
        layers = [nn.ConvTranspose2d(config.latent_dim, first, kernel_size=4, bias=False)]
        for width, following in zip(config.generator_channels, rest, strict=False):
            layers += [
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.ConvTranspose2d(width, following, 4, stride=2, padding=1, bias=False),
            ]
        last = config.generator_channels[-1]
        layers += [nn.BatchNorm2d(last), nn.ReLU()]
        layers += [nn.Conv2d(last, config.image_channels, kernel_size=1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        images = self.layers(latents[:, :, None, None])  # 32 × 32
        return F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)


class Discriminator(nn.Module):
    """Images in [-1, 1] → logits [N] of being real."""

    def __init__(self, config: Config):
        super().__init__()
        a, b, c, d = config.discriminator_channels
        self.layers = nn.Sequential(
            nn.Conv2d(config.image_channels, a, 4, stride=2, padding=1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(a, b, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(b),
            nn.LeakyReLU(0.2),
            nn.Conv2d(b, c, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(c),
            nn.LeakyReLU(0.2),
            nn.Conv2d(c, d, 3, bias=False),
            nn.BatchNorm2d(d),
            nn.LeakyReLU(0.2),
            nn.Conv2d(d, 1, 1, bias=False),
            nn.Flatten(0),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Model(nn.Module):
    """Generator and discriminator, a step of both, and draws of whatever class."""

    conditional = False

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
        """One discriminator update, then `generator_steps` of the generator.

        images: [-1, 1], [N, C, 28, 28]; the labels are not used. Logs the two losses, D(x), and
        D(G(z)) before the discriminator's update and before the generator's last one, as
        probabilities.
        """
        config, n = self.config, len(images)
        # Discriminator: maximise log D(x) + log(1 - D(G(z))), equation (1).
        with torch.no_grad():
            fakes = self.generator(self.latents(n, images.device))
        real_logits, fake_logits = self.discriminator(images), self.discriminator(fakes)
        loss_d = _cross_entropy(real_logits, config.real_label)
        loss_d = loss_d + _cross_entropy(fake_logits, config.fake_label)
        update(optimizers["discriminator"], loss_d)

        # Generator: maximise log D(G(z)), the non-saturating form of section 3.
        self.discriminator.requires_grad_(False)
        for _ in range(config.generator_steps):
            logits = self.discriminator(self.generator(self.latents(n, images.device)))
            loss_g = _cross_entropy(logits, config.real_label)
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
        """G(z) for z ~ N(0, I), as many as there are labels; [-1, 1], [N, C, 28, 28]."""
        return self.generator(self.latents(len(labels), labels.device, generator))


def _cross_entropy(logits: Tensor, target: float) -> Tensor:
    logits = logits.float()  # bfloat16 would round the target
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
