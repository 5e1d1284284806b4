"""Denoising diffusion (Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models";
equation numbers are those of the paper), with the deterministic sampler of Song, Meng and Ermon
2021, "Denoising Diffusion Implicit Models" (DDIM).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom_models import edm
from custom_models.config import ModelConfig
from custom_models.layers import cosine_decay, update


@dataclass(frozen=True)
class Config(ModelConfig):
    """The published diffusion model. A comment says what each setting is."""

    channels: tuple = (64, 128, 256, 512)  # widths of the U-Net's levels
    timesteps: int = 500  # T, steps from an image to noise
    beta_start: float = 1e-4  # variance of the noise that the first step adds
    beta_end: float = 0.02  # and the last; between them it rises evenly
    lr: float = 1e-4  # step size of Adam
    decay_images: int = 0  # images over which lr falls to a fiftieth; 0: it stays, as published
    epochs: int = 500
    sampler: str = "ancestral"  # ancestral or ddim
    sampling_steps: int = 500  # of ddim; the ancestral sampler takes all T
    variance: str = "beta"  # of the ancestral sampler: beta or posterior
    LATER: ClassVar[dict] = {"decay_images": 0}
    SAMPLING: ClassVar[tuple] = ("sampler", "sampling_steps", "variance")

    def __post_init__(self):
        super().__post_init__()
        self.require(self.decay_images >= 0, "decay_images", "at least 0")
        self.require(self.timesteps >= 2, "timesteps", "at least 2")
        self.require(0 < self.beta_start <= self.beta_end < 1, "beta_start", "in (0, beta_end]")
        self.require(self.sampler in ("ancestral", "ddim"), "sampler", "ancestral or ddim")
        self.require(self.variance in ("beta", "posterior"), "variance", "beta or posterior")
        steps = self.sampling_steps
        words = f"between 1 and timesteps, {self.timesteps} (set both)"
        self.require(1 <= steps <= self.timesteps, "sampling_steps", words)

    def build(self) -> "Model":
        return Model(self)


PRESETS = {
    "baseline": Config(),
    "best": edm.Config(),
    "best_64": edm.BEST_64,
    "best_128": edm.BEST_128,
    "best_small": edm.SMALL,
    # A U-Net of half a million parameters for a CPU core: a reduced budget, not a result. There an
    # image costs little more in a batch of 16 than in one of 128, for eight times the updates.
    "small": replace(
        Config(),
        channels=(32, 64, 128),
        batch_size=16,
        lr=1e-3,
        decay_images=320_000,
        ema_decay=0.999,
        flips_and_turns=True,
        epochs=30,
        validation_epochs=6,
        sampler="ddim",
        sampling_steps=50,
    ),
    "quick": replace(
        Config(),
        channels=(16, 32, 64),
        lr=1e-3,
        ema_decay=0.99,
        flips_and_turns=True,
        epochs=45,
        batch_size=32,
        sampler="ddim",
        sampling_steps=20,
    ),
}


def sinusoidal_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """[N] → [N, dim], sines and cosines of geometrically spaced frequencies (section 4)."""
    exponents = torch.arange(dim // 2, device=timesteps.device) / (dim // 2)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Two 3×3 convolutions, the time embedding added between them.

    No normalisation, as published; without residual paths a group norm spoils the colours.
    """

    def __init__(self, inputs: int, outputs: int, time_dim: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_dim, outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = F.relu(self.first(x) + self.time(time)[:, :, None, None])
        return F.relu(self.second(x))


class UNet(nn.Module):
    """Noisy images [N, C, S, S] and timesteps int64 [N] → predicted noise ε_θ, [N, C, S, S]."""

    def __init__(self, config: Config):
        super().__init__()
        channels, time_dim = config.channels, 128
        self.time_dim = time_dim
        self.time = nn.Sequential(
            nn.Linear(time_dim, time_dim), nn.ReLU(), nn.Linear(time_dim, time_dim)
        )
        inputs = [config.image_channels, *channels[:-1]]
        self.down = nn.ModuleList(
            Block(i, o, time_dim) for i, o in zip(inputs, channels, strict=True)
        )
        pairs = list(zip(channels[1:], channels[:-1], strict=True))[::-1]
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in pairs)
        self.up = nn.ModuleList(Block(2 * o, o, time_dim) for _, o in pairs)
        self.out = nn.Conv2d(channels[0], config.image_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.out:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time(sinusoidal_embedding(timesteps, self.time_dim))
        skips = []
        for level, block in enumerate(self.down):
            # 28 → 14 → 7 → 4: an odd side is rounded up, so that no pixel is lost.
            x = block(F.max_pool2d(x, 2, ceil_mode=True) if level else x, time)
            skips.append(x)
        skips.pop()
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            skip = skips.pop()
            x = enlarge(x)[:, :, : skip.shape[2], : skip.shape[3]]
            x = block(torch.cat([x, skip], dim=1), time)
        return self.out(x)


class Model(nn.Module):
    """The U-Net, a step of predicting noise, and the ways back from noise to images."""

    conditional = False

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.unet = UNet(config)
        # β_t, t = 0 … T-1 here for the paper's 1 … T; float64 until the last rounding.
        betas = torch.linspace(
            config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64
        )
        alphas_cumprod = torch.cumprod(1 - betas, 0)  # ᾱ_t
        self.register_buffer("betas", betas.float(), persistent=False)
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # Kept by the optimiser, so that a resumed run goes on with the rate where it was.
        group = {"params": self.unet.parameters(), "images_seen": 0}
        return {"adam": torch.optim.Adam([group], lr=self.config.lr)}

    def diffuse(self, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Equation (4): x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε."""
        alpha_bar = self.alphas_cumprod[timesteps][:, None, None, None]
        return alpha_bar.sqrt() * images + (1 - alpha_bar).sqrt() * noise

    def training_step(self, images: Tensor, labels: Tensor, optimizers: dict) -> dict[str, Tensor]:
        """One update by the simplified objective, equation (14). images: [-1, 1], [N, C, S, S]."""
        timesteps = torch.randint(self.config.timesteps, (len(images),), device=images.device)
        noise = torch.randn_like(images)
        predicted = self.unet(self.diffuse(images, timesteps, noise), timesteps)
        loss = F.mse_loss(predicted.float(), noise)
        group = optimizers["adam"].param_groups[0]
        group["images_seen"] = group.get("images_seen", 0) + len(images)
        if self.config.decay_images:
            done = group["images_seen"] / self.config.decay_images
            group["lr"] = self.config.lr * cosine_decay(done)
        update(optimizers["adam"], loss)
        return {"loss": loss}

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images from noise by the configured sampler; [-1, 1], [N, C, S, S].

        At T = 500 training ends at √ᾱ_T = 0.08, not at pure noise, while sampling starts there:
        the mean colour of the samples carries that error.
        """
        config = self.config
        shape = (len(labels), config.image_channels, config.image_size, config.image_size)
        noise = torch.randn(shape, generator=generator, device=labels.device)
        if config.sampler == "ddim":
            return self.ddim(noise, config.sampling_steps)
        return self.ancestral(noise, config.variance, generator)

    def in_steps(self, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Images from given noise of variance 1 by DDIM; the labels are not used."""
        return self.ddim(noise, steps)

    def ancestral(self, x: Tensor, variance: str, generator: torch.Generator) -> Tensor:
        """Algorithm 2, from x_T ~ N(0, I), with σ_t² = β_t or β̃_t (section 3.2)."""
        for t in reversed(range(self.config.timesteps)):
            beta, alpha_bar = self.betas[t], self.alphas_cumprod[t]
            predicted = self.unet(x, torch.full((len(x),), t, device=x.device)).float()
            # Equation (11).
            x = (x - beta / (1 - alpha_bar).sqrt() * predicted) / (1 - beta).sqrt()
            if t > 0:
                if variance == "posterior":  # β̃_t, equation (7)
                    beta = (1 - self.alphas_cumprod[t - 1]) / (1 - alpha_bar) * beta
                noise = torch.randn(x.shape, generator=generator, device=x.device)
                x = x + beta.sqrt() * noise
        return x.clamp(-1, 1)

    def ddim(self, x: Tensor, steps: int) -> Tensor:
        """Deterministic sampling in any number of steps (DDIM, equation (12) with σ = 0)."""
        timesteps = torch.linspace(self.config.timesteps - 1, 0, steps).round().long().tolist()
        for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
            alpha_bar = self.alphas_cumprod[t]
            predicted = self.unet(x, torch.full((len(x),), t, device=x.device)).float()
            image = (x - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
            # Clipping the predicted image keeps errors at high noise from growing; the noise is
            # then taken anew from what is left.
            image = image.clamp(-1, 1)
            if previous is None:
                return image
            predicted = (x - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt()
            alpha_bar = self.alphas_cumprod[previous]
            x = alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * predicted
