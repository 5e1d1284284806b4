"""The `best` preset of the CVAE: class-conditional, residual, and with a likelihood that blurs
less, that of the numbers in a JPEG file.

A likelihood of independent pixels leaves two bad choices: the mean of p(x | z) is blurred, and a
draw from it is noise. BloodMNIST's cells were stored as JPEG, as whole numbers of steps of a cosine
transform. These coefficients are nearly uncorrelated, each frequency has a spread of its own, and
most are exactly zero. So the decoder draws the mean image in pixels and, for each coefficient of
each block, how far the file may be from it: a discretised logistic (Salimans et al. 2017,
"PixelCNN++", section 2.1, there for pixels). What it can't foresee, it then draws as texture of the
right frequencies. The bound is that of Kingma and Welling 2014, as in `cvae`.

The latents of real cells never fill N(0, I): they tell too much of each cell, and a draw from
N(0, I) decodes to a cell of no class. So p(z | class) is learned, too, by diffusion over the
latents, as in Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
here by `edm` and beside the autoencoder, of whose loss it is no part. For its network the latents
are a small image, one column for every 4 × 4 pixels. The bound remains that of a model that draws
from N(0, I).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models import edm
from custom_models.config import ModelConfig
from custom_models.layers import (
    CHROMA,
    JPEG,
    ResidualBlock,
    repeat_last,
    update,
    warmed_cosine_decay,
)
from custom_models.samplers import evaluations


@dataclass(frozen=True)
class Config(ModelConfig):
    """The CVAE's preset `best`. A comment says what each setting is."""

    latent_channels: int = 4  # random numbers behind each 4 × 4 pixels
    channels: tuple = (32, 64, 128)  # widths of the encoder; the decoder mirrors them
    kl_weight: float = 1.0  # weight of the KL term; 1 is the evidence lower bound
    kl_warmup_images: int = 36_000  # images over which the KL's weight rises from 0
    learned_prior: bool = True  # draw latents from what was learned of each class's; else N(0, I)
    prior_channels: tuple = (64, 96)  # widths of the U-Net that learns it, multiples of 8
    prior_draws: int = 4  # latents of each image, at a noise level each, in one update of the prior
    prior_steps: int = 24  # levels of noise on the way to latents
    temperature: float = 0.5  # of the drawn coefficients; 0: their means, 1: as trained
    jpeg_quality: int = 75  # of the data set's files; other data sets need another, such as 95
    jpeg_chroma: str = "dct"  # how JPEG halves colours: mean, or dct as BloodMNIST's own
    JPEG_ELSEWHERE: ClassVar[int] = 95  # jpeg_quality for data that was not stored as JPEG
    SAMPLING: ClassVar[tuple] = ("learned_prior", "prior_steps", "temperature")
    COMPARED: ClassVar[tuple] = ("temperature", "prior_steps")
    lr: float = 1e-3  # largest step size of Adam, of the autoencoder and of the prior
    warmup_images: int = 10_000  # images over which the learning rate rises from 0 to lr
    decay_images: int = 143_500  # images over which lr falls to a fiftieth, by a cosine
    # An image costs a core hardly more in a batch of 16 than of 64, for four times the updates.
    batch_size: int = 16
    epochs: int = 12
    ema_decay: float = 0.999
    validation_epochs: int = 4

    def __post_init__(self):
        super().__post_init__()
        self.require(self.latent_channels >= 1, "latent_channels", "at least 1")
        self.require(len(self.channels) == 3, "channels", "three widths")
        self.require(self.image_channels == 3, "image_channels", "3: a JPEG has colours")
        self.require(self.image_size >= 8, "image_size", "at least 8")
        self.require(self.kl_weight >= 0, "kl_weight", "at least 0")
        self.require(self.kl_warmup_images >= 0, "kl_warmup_images", "at least 0")
        self.require(
            1 <= len(self.prior_channels) <= 2
            and all(c > 0 and c % 8 == 0 == c % edm.heads(c) for c in self.prior_channels),
            "prior_channels",
            "one or two widths, multiples of 8 and of their attention heads, one for every 64",
        )
        self.require(self.prior_draws >= 1, "prior_draws", "at least 1")
        self.require(self.prior_steps >= 2, "prior_steps", "at least 2")
        self.require(self.temperature >= 0, "temperature", "at least 0")
        self.require(self.warmup_images >= 0, "warmup_images", "at least 0")
        self.require(self.decay_images >= 1, "decay_images", "at least 1")
        self.require(self.jpeg_chroma in CHROMA, "jpeg_chroma", " or ".join(CHROMA))
        self.require(1 <= self.jpeg_quality <= 100, "jpeg_quality", "from 1 to 100")

    def build(self) -> "Model":
        return Model(self)

    @property
    def latent_side(self) -> int:
        return -(-self.image_size // 4)

    @property
    def latent_dim(self) -> int:
        """Random numbers behind an image."""
        return self.latent_channels * self.latent_side**2

    @property
    def prior(self) -> edm.Config:
        """Diffusion over latents, whose variance is about 1."""
        return edm.Config(
            image_size=self.latent_side,
            image_channels=self.latent_channels,
            n_classes=self.n_classes,
            channels=self.prior_channels,
            blocks=1,
            attention_from=1,
            dropout=0.1,
            label_dropout=0.0,
            sigma_data=1.0,
            p_mean=-0.5,  # the paper's -1.2 is for images of half the spread
            p_std=1.3,
            sampler="dpm_solver_2m",
            sigma_min=0.01,
            sigma_max=80.0,
            rho=7.0,
            guidance_scale=1.0,
        )


def sampling_variants(config: Config) -> list[dict]:
    """What quality is measured against, with one set of weights: temperature, and steps."""
    variants = [{"temperature": t} for t in (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)]
    if config.learned_prior:
        variants += [{"prior_steps": steps} for steps in (6, 12, 24, 48)]
    return variants


def as_maps(condition: Tensor, side: int) -> Tensor:
    """[N, classes] → the same at every place, [N, classes, side, side]."""
    return condition[:, :, None, None].expand(-1, -1, side, side)


class Encoder(nn.Module):
    """Images in [-1, 1], one-hot classes → mean and log variance of q(z | x), [N, C, S/4, S/4]."""

    def __init__(self, config: Config):
        super().__init__()
        widths = config.channels
        layers = [nn.Conv2d(config.image_channels, widths[0], 3, padding=1)]
        for width, following in pairwise(widths):
            layers.append(nn.Conv2d(width, following, 4, stride=2, padding=1))
            layers.append(ResidualBlock(following))
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        self.out = nn.Sequential(
            nn.Conv2d(widths[-1] + config.n_classes, widths[-1], 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(widths[-1], 2 * config.latent_channels, 1),
        )

    def forward(self, images: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        rest = -images.shape[2] % 4
        features = self.layers(repeat_last(images, rest, rest))
        told = torch.cat([features, as_maps(condition, features.shape[2])], dim=1)
        mean, log_variance = self.out(told).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 4)


class Decoder(nn.Module):
    """z and one-hot classes → the mean image and the log scales of its coefficients.

    Image: [-1, 1], [N, 3, S, S]. Log scales, before their usual fall with the frequency is added:
    luma [N, 64, H, W], chroma [N, 128, H / 2, W / 2], as the coefficients of `JPEG.encode`.
    """

    def __init__(self, config: Config):
        super().__init__()
        widths, self.size = config.channels[::-1], config.image_size
        layers = [
            nn.Conv2d(config.latent_channels + config.n_classes, widths[0], 3, padding=1),
            ResidualBlock(widths[0]),
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
        told = torch.cat([latents, as_maps(condition, latents.shape[2])], dim=1)
        x = self.layers(told)[:, :, : self.size, : self.size]
        mean, rest = self.mean(x).tanh(), -self.size % 16
        x = repeat_last(x, rest, rest)
        return mean, self.luma(x), self.chroma(x)


class Model(nn.Module):
    """Autoencoder and prior, a step of both, and draws of a class."""

    conditional = True

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.prior = edm.Model(config.prior)
        self.jpeg = JPEG(config.jpeg_quality, config.jpeg_chroma)
        # The spread of a photograph's coefficients falls by about half with each frequency: the
        # scales begin there.
        frequency = (torch.arange(8)[:, None] + torch.arange(8)).flatten()
        luma = (10 * 0.5**frequency).clamp(min=0.05).log()[:, None, None]
        chroma = (2 * 0.5**frequency).clamp(min=0.05).log().repeat(2)[:, None, None]
        self.register_buffer("usual_luma", luma, persistent=False)
        self.register_buffer("usual_chroma", chroma, persistent=False)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        autoencoder = [*self.encoder.parameters(), *self.decoder.parameters()]
        # The count for both warm-ups stands in an optimizer's own state, and is saved with it.
        group = {"params": autoencoder, "images_seen": 0}
        return {
            "adam": torch.optim.Adam([group], lr=self.config.lr),
            "prior": torch.optim.Adam(self.prior.parameters(), lr=self.config.lr),
        }

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
        """One update by the negative evidence lower bound, and one of the prior.

        images: [-1, 1], [N, 3, S, S]. Logs the loss and its parts, in nats an image, and the
        prior's loss, about 1 at first.
        """
        config, adam = self.config, optimizers["adam"]
        (group,) = adam.param_groups
        group["images_seen"] += len(images)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = self.learning_rate(group["images_seen"])

        mean, log_variance = self.encoder(images, self.condition(labels))
        latents = draw_normal(mean, log_variance)
        file = [coefficients.round() for coefficients in self.jpeg.encode(images)]
        pairs = zip(file, self.decode(latents, labels), strict=True)
        reconstruction = -sum(
            log_likelihood(values, *logistic) for values, logistic in pairs
        ).mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
        # A weight that rises lets the decoder learn to use the latents before they cost.
        warmth = min(1.0, group["images_seen"] / max(1, config.kl_warmup_images))
        loss = reconstruction + warmth * config.kl_weight * kl
        update(adam, loss, largest_norm=1000.0)  # for one odd image in a batch

        # Drawing latents anew costs less than encoding other images.
        parts = [part.detach().repeat(config.prior_draws, 1, 1, 1) for part in (mean, log_variance)]
        prior_loss = self.prior.loss(draw_normal(*parts), labels.repeat(config.prior_draws))
        update(optimizers["prior"], prior_loss)
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "prior_loss": prior_loss}

    def learning_rate(self, images_seen: int) -> float:
        """Linear warm-up, and a cosine down to a fiftieth."""
        config = self.config
        return config.lr * warmed_cosine_decay(
            images_seen, config.warmup_images, config.decay_images
        )

    @torch.no_grad()
    def reconstruct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Posterior means of images in [-1, 1], decoded to mean images and stored; [-1, 1]."""
        mean, _ = self.encoder(images, self.condition(labels))
        coefficients = [mean.round() for mean, _ in self.decode(mean, labels)]
        return self.jpeg.decode(*coefficients, images.shape[2:])

    def evaluations(self) -> int:
        """Passes of a network for one image: those of the prior, and the decoder's."""
        config = self.config
        if not config.learned_prior:
            return 1
        return 1 + evaluations(config.prior.sampler, config.prior_steps)

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
        latents = noise.view(-1, config.latent_channels, config.latent_side, config.latent_side)
        if config.learned_prior:
            latents = self.prior.solve(labels, latents, config.prior_steps)
        coefficients = [
            (mean + config.temperature * log_scale.exp() * draw(mean.shape)).round()
            for mean, log_scale in self.decode(latents, labels)
        ]
        return self.jpeg.decode(*coefficients, (config.image_size, config.image_size))


def draw_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """One draw for each mean, of the same shape."""
    return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)


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
