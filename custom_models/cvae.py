"""Convolutional variational autoencoder (Kingma and Welling 2014, "Auto-Encoding Variational
Bayes"; equation numbers are those of the paper).

An encoder maps an image x to a Gaussian q(z | x) over 64 latents; a decoder maps latents to the
mean of a Bernoulli likelihood p(x | z) on (x + 1) / 2.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models import jpeg_vae
from custom_models.config import ModelConfig
from custom_models.layers import update


@dataclass(frozen=True)
class Config(ModelConfig):
    """The published CVAE. A comment says what each setting is."""

    latent_dim: int = 64  # random numbers behind an image
    channels: tuple = (32, 64, 128)  # widths of the encoder; the decoder mirrors them
    kl_weight: float = 0.75  # weight of the KL term; 1 is the evidence lower bound
    conditional: bool = False  # give the class to encoder and decoder
    lr: float = 1e-3  # step size of Adam

    def __post_init__(self):
        super().__post_init__()
        self.require(self.latent_dim >= 1, "latent_dim", "at least 1")
        self.require(self.kl_weight >= 0, "kl_weight", "at least 0")
        self.require(
            self.image_size >= 2 ** len(self.channels), "image_size", "larger for so many layers"
        )

    def build(self) -> "Model":
        return Model(self)


PRESETS = {
    "baseline": Config(),
    "best": jpeg_vae.Config(),
    "quick": replace(Config(), epochs=20, batch_size=64),
}


def _sizes(config: Config) -> list[int]:
    """Side of the image after each halving: 28, 14, 7, 3."""
    return [config.image_size // 2**i for i in range(len(config.channels) + 1)]


class Encoder(nn.Module):
    """x, class → mean and log variance of q(z | x), each [N, latent_dim]."""

    def __init__(self, config: Config):
        super().__init__()
        layers, previous = [], config.image_channels
        for width in config.channels:
            layers += [nn.Conv2d(previous, width, kernel_size=4, stride=2, padding=1), nn.ReLU()]
            previous = width
        self.layers = nn.Sequential(*layers, nn.Flatten())
        features = previous * _sizes(config)[-1] ** 2
        features += config.n_classes if config.conditional else 0
        self.mean = nn.Linear(features, config.latent_dim)
        self.log_variance = nn.Linear(features, config.latent_dim)

    def forward(self, images: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cat([self.layers(images), condition], dim=1)
        return self.mean(features), self.log_variance(features)


class Decoder(nn.Module):
    """z, class → logits of the Bernoulli means, [N, C, S, S]."""

    def __init__(self, config: Config):
        super().__init__()
        sizes = _sizes(config)
        inputs = config.latent_dim + (config.n_classes if config.conditional else 0)
        widths = [*reversed(config.channels), config.image_channels]
        self.linear = nn.Linear(inputs, widths[0] * sizes[-1] ** 2)
        layers = [nn.Unflatten(1, (widths[0], sizes[-1], sizes[-1])), nn.ReLU()]
        for level, (width, following) in enumerate(pairwise(widths)):
            # A halving of an odd side lost one pixel (7 → 3); give it back (3 → 7).
            odd = sizes[-2 - level] % 2
            layers += [
                nn.ConvTranspose2d(width, following, 4, stride=2, padding=1, output_padding=odd),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers[:-1])  # no activation on the logits

    def forward(self, latents: Tensor, condition: Tensor) -> Tensor:
        return self.layers(self.linear(torch.cat([latents, condition], dim=1)))


class Model(nn.Module):
    """Encoder and decoder, a step by the evidence lower bound, and draws from N(0, I)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.conditional = config.conditional
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adam": torch.optim.Adam(self.parameters(), lr=self.config.lr)}

    def condition(self, labels: Tensor) -> Tensor:
        """One-hot classes, or nothing ([N, 0]) for the unconditional model."""
        if not self.conditional:
            return torch.zeros(len(labels), 0, device=labels.device)
        return F.one_hot(labels, self.config.n_classes).float()

    def training_step(self, images: Tensor, labels: Tensor, optimizers: dict) -> dict[str, Tensor]:
        """One update by the negative evidence lower bound. images: [-1, 1], [N, C, S, S]."""
        condition = self.condition(labels)
        mean, log_variance = (part.float() for part in self.encoder(images, condition))
        # Reparameterisation, section 2.4: z = μ + σ ε.
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        logits = self.decoder(latents, condition)
        # Equation (10): expected log likelihood and analytic KL (appendix B), each summed over
        # its dimensions and averaged over the batch. A Bernoulli needs targets in [0, 1].
        targets = (images + 1) / 2
        reconstruction = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        reconstruction = reconstruction / len(images)
        kl = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        loss = reconstruction + self.config.kl_weight * kl

        update(optimizers["adam"], loss)
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl}

    @torch.no_grad()
    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Decoded posterior means of images in [-1, 1]; returns [-1, 1]."""
        condition = self.condition(labels)
        mean, _ = self.encoder(images, condition)
        return self.decoder(mean, condition).sigmoid() * 2 - 1

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Decode prior draws z ~ N(0, I); returns Bernoulli means in [-1, 1], [N, C, S, S]."""
        shape = (len(labels), self.config.latent_dim)
        latents = torch.randn(shape, generator=generator, device=labels.device)
        return self.decoder(latents, self.condition(labels)).sigmoid() * 2 - 1
