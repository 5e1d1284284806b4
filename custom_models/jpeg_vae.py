"""The `best` preset of the CVAE: class-conditional, residual, and with a likelihood that does not
blur: that of the numbers in a JPEG file.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models.config import ModelConfig
from custom_models.layers import JPEG


@dataclass(frozen=True)
class Config(ModelConfig):
    latent_dim: int = 128
    channels: tuple = (32, 64, 128)
    kl_weight: float = 1.0
    kl_warmup_epochs: int = 10  # epochs in which the KL's weight grows to 1
    jpeg_quality: int = 75
    lr: float = 1e-3
    batch_size: int = 64
    epochs: int = 60
    ema_decay: float = 0.999
    validation_epochs: int = 6

    def build(self) -> "Model":
        return Model(self)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class Encoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        widths = config.channels
        layers = [nn.Conv2d(config.image_channels, widths[0], 3, padding=1)]
        for width, following in pairwise(widths):
            layers += [nn.Conv2d(width, following, 4, stride=2, padding=1), Block(following)]
        side = config.image_size // 2 // 2
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        self.out = nn.Linear(widths[-1] * side**2 + config.n_classes, 2 * config.latent_dim)

    def forward(self, images, condition):
        return self.out(torch.cat([self.layers(images), condition], 1)).chunk(2, 1)


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        widths = config.channels[::-1]
        self.size, side = config.image_size, -(-config.image_size // 4)
        layers = [
            nn.Linear(config.latent_dim + config.n_classes, widths[0] * side**2),
            nn.Unflatten(1, (widths[0], side, side)),
            Block(widths[0]),
        ]
        for width, following in pairwise(widths):
            layers += [
                nn.ConvTranspose2d(width, following, 4, stride=2, padding=1),
                Block(following),
            ]
        self.layers = nn.Sequential(*layers, nn.SiLU())
        self.mean = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)
        self.luma = nn.Sequential(
            nn.Conv2d(widths[-1], 64, 8, stride=8), nn.SiLU(), nn.Conv2d(64, 64, 1)
        )
        self.chroma = nn.Sequential(
            nn.Conv2d(widths[-1], 64, 16, stride=16), nn.SiLU(), nn.Conv2d(64, 128, 1)
        )

    def forward(self, latents, condition):
        x = self.layers(torch.cat([latents, condition], 1))[:, :, : self.size, : self.size]
        mean = self.mean(x).tanh()
        pad = -self.size % 16
        x = F.pad(x, (0, pad, 0, pad), mode="replicate")
        return mean, self.luma(x), self.chroma(x)


class Model(nn.Module):
    conditional = True

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.jpeg = JPEG(config.jpeg_quality)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        frequency = (torch.arange(8)[:, None] + torch.arange(8)).flatten().float()
        # The spread of a photograph's coefficients falls by about half with each frequency.
        spread = (10 * 0.5**frequency).clamp(min=0.05).log()
        self.register_buffer("luma_spread", spread[:, None, None], persistent=False)
        self.register_buffer(
            "chroma_spread", (spread - 1.5).clamp(min=-3).repeat(2)[:, None, None], persistent=False
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def optimizers(self):
        return {"adam": torch.optim.Adam(self.parameters(), lr=self.config.lr)}

    def condition(self, labels):
        return F.one_hot(labels, self.config.n_classes).float()

    def decode(self, latents, labels):
        mean, luma, chroma = self.decoder(latents, self.condition(labels))
        means = self.jpeg.encode(mean)
        scales = (luma.float() + self.luma_spread), (chroma.float() + self.chroma_spread)
        return [(m, s.clamp(-5, 4)) for m, s in zip(means, scales)], mean

    def training_step(self, images, labels, optimizers):
        config = self.config
        targets = [t.round() for t in self.jpeg.encode(images)]
        mean, log_variance = self.encoder(images, self.condition(labels))
        log_variance = log_variance.clamp(-12, 4)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        parameters, _ = self.decode(z, labels)
        rec = -sum(log_likelihood(t, *p) for t, p in zip(targets, parameters)).mean()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        weight = config.kl_weight * min(
            1.0, (int(self.steps) + 1) / (config.kl_warmup_epochs * (11959 // config.batch_size))
        )
        self.steps += 1
        loss = rec + weight * kl
        optimizers["adam"].zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters(), 1000.0)
        optimizers["adam"].step()
        return {"loss": loss, "reconstruction": rec, "kl": kl, "norm": norm}

    @torch.no_grad()
    def sample(self, labels, generator, temperature=1.0):
        z = torch.randn(
            (len(labels), self.config.latent_dim), generator=generator, device=labels.device
        )
        parameters, _ = self.decode(z, labels)
        draws = []
        for mean, log_scale in parameters:
            u = torch.rand(mean.shape, generator=generator, device=mean.device).clamp(
                1e-5, 1 - 1e-5
            )
            draws.append((mean + temperature * log_scale.exp() * torch.logit(u)).round())
        return self.jpeg.decode(*draws, (self.config.image_size,) * 2)


def log_likelihood(values, mean, log_scale):
    inverse = (-log_scale).exp()
    upper, lower = (values + 0.5 - mean) * inverse, (values - 0.5 - mean) * inverse
    # log(σ(a) - σ(b)) = log σ(a) + log σ(-b) + log(1 - e^(b - a))
    value = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-inverse))
    return value.flatten(1).sum(1)
