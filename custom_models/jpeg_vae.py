"""The `best` preset of the CVAE: class-conditional, residual, and with a likelihood that blurs
less, that of the numbers in a JPEG file.

A likelihood of independent pixels leaves two bad choices: the mean of p(x | z) is blurred, and a
draw from it is noise. BloodMNIST's cells were stored as JPEG, as whole numbers of steps of a cosine
transform. These coefficients are nearly uncorrelated, each frequency has a spread of its own, and
most are exactly zero. So the decoder draws the mean image in pixels and, for each coefficient of
each block, how far the file may be from it: a discretised logistic (Salimans et al. 2017,
"PixelCNN++", section 2.1, there for pixels). What it can't foresee, it then draws as texture of the
right frequencies. The bound is that of Kingma and Welling 2014, as in `cvae`.

The latents of the training cells never fill N(0, I) quite, and each class has a part of its own, so
that draws from N(0, I) decode to cells of no class. So after training each class gets a Gaussian
that is fitted to its latents (Ghosh et al. 2020, "From Variational to Deterministic Autoencoders",
section 4, ex-post density estimation).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.config import ModelConfig
from custom_models.layers import CHROMA, JPEG, ResidualBlock, update
from utils import to_model_range


@dataclass(frozen=True)
class Config(ModelConfig):
    latent_dim: int = 128  # random numbers behind an image
    channels: tuple = (32, 64, 128)  # widths of the encoder; the decoder mirrors them
    kl_weight: float = 1.0  # weight of the KL term; 1 is the evidence lower bound
    kl_warmup_images: int = 36_000  # images over which the KL's weight rises from 0
    fitted_prior: bool = True  # draw from the latents that each class has in truth; else N(0, I)
    temperature: float = 0.5  # of the drawn coefficients; 0: their means, 1: as trained
    jpeg_quality: int = 75  # of the data set's files; other data sets need another, such as 95
    jpeg_chroma: str = "mean"  # how JPEG halves colours: mean, or dct as BloodMNIST's own
    JPEG_ELSEWHERE: ClassVar[int] = 95  # jpeg_quality for data that was not stored as JPEG
    LATER: ClassVar[dict] = {"jpeg_chroma": "mean"}
    SAMPLING: ClassVar[tuple] = ("fitted_prior", "temperature")
    lr: float = 1e-3  # step size of Adam
    batch_size: int = 64
    epochs: int = 12
    ema_decay: float = 0.999
    validation_epochs: int = 4

    def __post_init__(self):
        super().__post_init__()
        self.require(self.latent_dim >= 1, "latent_dim", "at least 1")
        self.require(len(self.channels) == 3, "channels", "three widths")
        self.require(self.image_channels == 3, "image_channels", "3: a JPEG has colours")
        self.require(self.image_size >= 8, "image_size", "at least 8")
        self.require(self.kl_weight >= 0, "kl_weight", "at least 0")
        self.require(self.kl_warmup_images >= 0, "kl_warmup_images", "at least 0")
        self.require(self.temperature >= 0, "temperature", "at least 0")
        self.require(self.jpeg_chroma in CHROMA, "jpeg_chroma", " or ".join(CHROMA))
        self.require(1 <= self.jpeg_quality <= 100, "jpeg_quality", "from 1 to 100")

    def build(self) -> "Model":
        return Model(self)


class Encoder(nn.Module):
    """Images in [-1, 1], one-hot classes → mean and log variance of q(z | x), [N, latent_dim]."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.channels
        layers = [nn.Conv2d(config.image_channels, widths[0], 3, padding=1)]
        for width, following in pairwise(widths):
            layers.append(nn.Conv2d(width, following, 4, stride=2, padding=1))
            layers.append(ResidualBlock(following))
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Flatten())
        features = widths[-1] * (config.image_size // 2 // 2) ** 2
        self.out = nn.Linear(features + config.n_classes, 2 * config.latent_dim)

    def forward(self, images: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.cat([self.layers(images), condition], dim=1)
        mean, log_variance = self.out(features).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 4)


class Decoder(nn.Module):
    """z and one-hot classes → the mean image and the log scales of its coefficients.

    Image: [-1, 1], [N, 3, S, S]. Log scales, before their usual fall with the frequency is added:
    luma [N, 64, H, W], chroma [N, 128, H / 2, W / 2], as the coefficients of `JPEG.encode`.
    """

    def __init__(self, config: Config):
        super().__init__()
        widths = config.channels[::-1]
        self.size, side = config.image_size, -(-config.image_size // 4)
        layers = [
            nn.Linear(config.latent_dim + config.n_classes, widths[0] * side**2),
            nn.Unflatten(1, (widths[0], side, side)),
            ResidualBlock(widths[0]),
        ]
        for width, following in pairwise(widths):
            layers.append(nn.ConvTranspose2d(width, following, 4, stride=2, padding=1))
            layers.append(ResidualBlock(following))
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        self.mean = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)
        self.luma, self.chroma = (
            nn.Sequential(  # one look at each block of 8 × 8 pixels, or of 16 × 16
                nn.Conv2d(widths[-1], 64, block, stride=block),
                nn.LeakyReLU(0.2),
                nn.Conv2d(64, coefficients, 1),
            )
            for block, coefficients in ((8, 64), (16, 128))
        )

    def forward(self, latents: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.layers(torch.cat([latents, condition], dim=1))[:, :, : self.size, : self.size]
        mean, rest = self.mean(x).tanh(), -self.size % 16
        x = F.pad(x, (0, rest, 0, rest), mode="replicate")
        return mean, self.luma(x), self.chroma(x)


class Model(nn.Module):
    conditional = True

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.jpeg = JPEG(config.jpeg_quality, config.jpeg_chroma)
        # The spread of a photograph's coefficients falls by about half with each frequency: the
        # scales begin there.
        frequency = (torch.arange(8)[:, None] + torch.arange(8)).flatten()
        luma = (10 * 0.5**frequency).clamp(min=0.05).log()[:, None, None]
        chroma = (2 * 0.5**frequency).clamp(min=0.05).log().repeat(2)[:, None, None]
        self.register_buffer("usual_luma", luma, persistent=False)
        self.register_buffer("usual_chroma", chroma, persistent=False)
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))
        # p(z | class) as mean and Cholesky factor of the covariance; N(0, I) until it is fitted.
        classes, dim = config.n_classes, config.latent_dim
        self.register_buffer("prior_mean", torch.zeros(classes, dim))
        self.register_buffer("prior_factor", torch.eye(dim).repeat(classes, 1, 1))

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"adam": torch.optim.Adam(self.parameters(), lr=self.config.lr)}

    def condition(self, labels: Tensor) -> Tensor:
        """One-hot classes, [N, n_classes]."""
        return F.one_hot(labels, self.config.n_classes).float()

    def decode(self, latents: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """p(x | z): mean and log scale of the luma's coefficients, then of the chroma's."""
        image, luma, chroma = self.decoder(latents, self.condition(labels))
        log_scales = luma.float() + self.usual_luma, chroma.float() + self.usual_chroma
        # Narrower than a step of the file by e⁻⁵ is as good as certain.
        log_scales = [scale.clamp(-5, 4) for scale in log_scales]
        return list(zip(self.jpeg.encode(image), log_scales, strict=True))

    def training_step(self, images: Tensor, labels: Tensor, optimizers: dict) -> dict[str, Tensor]:
        """One update by the negative evidence lower bound. images: [-1, 1], [N, 3, S, S].

        Logs the loss and its parts, in nats an image.
        """
        config = self.config
        mean, log_variance = self.encoder(images, self.condition(labels))
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        file = [coefficients.round() for coefficients in self.jpeg.encode(images)]
        pairs = zip(file, self.decode(latents, labels), strict=True)
        reconstruction = -sum(
            log_likelihood(values, *logistic) for values, logistic in pairs
        ).mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        # A weight that rises lets the decoder learn to use the latents before they cost.
        self.images_seen += len(images)
        warmth = (self.images_seen / max(1, config.kl_warmup_images)).clamp(max=1)
        loss = reconstruction + warmth * config.kl_weight * kl

        update(optimizers["adam"], loss, largest_norm=1000.0)  # for one odd image in a batch
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl}

    @torch.no_grad()
    def fit_prior(self, images: Tensor, labels: Tensor) -> None:
        """Fit each class's Gaussian to the latents of its training cells.

        images: uint8 [N, 3, S, S], of which a few at a time are made float32. A class without
        cells keeps what it has.
        """
        parts = zip(images.split(256), self.condition(labels).split(256), strict=True)
        latents = [self.encoder(to_model_range(part), told) for part, told in parts]
        means, log_variances = (torch.cat(part).double() for part in zip(*latents, strict=True))
        for label in labels.unique().tolist():
            mean, variance = means[labels == label], log_variances[labels == label].exp()
            # Of a mixture of Gaussians, one for each cell: their spread and that of their means.
            covariance = mean.T.cov(correction=0) + variance.mean(0).diag()
            self.prior_mean[label] = mean.mean(0)
            self.prior_factor[label] = torch.linalg.cholesky(covariance)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Posterior means of images in [-1, 1], decoded to mean images and stored; [-1, 1]."""
        mean, _ = self.encoder(images, self.condition(labels))
        coefficients = [mean.round() for mean, _ in self.decode(mean, labels)]
        return self.jpeg.decode(*coefficients, images.shape[2:])

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draw z of each class, decode it, draw coefficients, read the file; [N, 3, S, S]."""
        shape = (len(labels), self.config.latent_dim)
        noise = torch.randn(shape, generator=generator, device=labels.device)
        return self.images_of(noise, labels, lambda shape: logistic_noise(shape, generator))

    def images_of(
        self, noise: Tensor, labels: Tensor, draw: Callable[[torch.Size], Tensor]
    ) -> Tensor:
        """Images of given noise, [N, 3, S, S].

        noise: of the latents, [N, latent_dim]; draw: from the coefficients' shapes, one after the
        other, to their noise.
        """
        config = self.config
        latents = noise
        if config.fitted_prior:
            spread = (self.prior_factor[labels] @ noise[..., None]).squeeze(2)
            latents = self.prior_mean[labels] + spread
        coefficients = [
            (mean + config.temperature * log_scale.exp() * draw(mean.shape)).round()
            for mean, log_scale in self.decode(latents, labels)
        ]
        return self.jpeg.decode(*coefficients, (config.image_size, config.image_size))


def logistic_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draws from the standard logistic, its tails cut where one in a thousand lies beyond."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return uniform.clamp(0.0005, 0.9995).logit()


def log_likelihood(values: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log p of whole numbers under a discretised logistic, summed over all but the first: [N].

    The mass of k is σ(a) - σ(b) with a, b = (k ± 1/2 - mean) / scale; its logarithm, as
    log σ(a) + log σ(-b) + log(1 - e^(b - a)), stays finite in the tails.
    """
    inverse = (-log_scale).exp()
    upper, lower = (values + 0.5 - mean) * inverse, (values - 0.5 - mean) * inverse
    log_mass = F.logsigmoid(upper) + F.logsigmoid(-lower) + (-torch.expm1(-inverse)).log()
    return log_mass.flatten(1).sum(1)
