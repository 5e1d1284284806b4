"""Conditional Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, "Improved Training of
Wasserstein GANs"; equation numbers and algorithm 1 are those of the paper), with a class embedding
as an extra plane of the critic's image and as an extra part of the generator's noise (Mirza and
Osindero 2014), and spectral normalisation in the critic (Miyato et al. 2018).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from custom_models import residual_cwgan_gp
from custom_models.config import ModelConfig
from custom_models.layers import (
    cosine_decay,
    init_dcgan,
    sides_down_to_four,
    transposed_convolutions,
    update,
)


@dataclass(frozen=True)
class Config(ModelConfig):
    """The published cWGAN-GP's kind of networks. A comment says what each setting is."""

    latent_dim: int = 100  # random numbers behind an image
    embed_size: int = 100  # length of the generator's class embedding
    base_channels: int = 64  # width at half the image's side; doubled at each further halving
    critic_steps: int = 5  # critic updates to one of the generator
    gradient_penalty: float = 10.0  # weight λ of the penalty, equation (3)
    lr: float = 1e-4  # step size of Adam, for both networks
    decay_images: int = 0  # images over which lr falls to a fiftieth; 0: it stays, as published
    beta1_critic: float = 0.0  # of Adam: share of the past in the critic's mean gradient
    beta1_generator: float = 0.5  # the same for the generator
    beta2: float = 0.9  # of Adam: share of the past in the mean squared gradient, for both networks
    patch_scores: bool = False  # score overlapping patches of an image, not the whole of it
    even_classes: bool = False  # generate all classes equally often in training, not as the batch's
    dcgan_weights: bool = True  # begin the generator with DCGAN's first weights, not PyTorch's own
    LATER: ClassVar[dict] = {
        "patch_scores": False,
        "even_classes": False,
        "dcgan_weights": True,
        "decay_images": 0,
    }
    epochs: int = 120

    def __post_init__(self):
        super().__post_init__()
        self.require(self.image_size >= 8, "image_size", "at least 8")
        for name in ("latent_dim", "embed_size", "base_channels", "critic_steps"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        self.require(self.gradient_penalty >= 0, "gradient_penalty", "at least 0")
        self.require(self.decay_images >= 0, "decay_images", "at least 0")

    @property
    def images_per_step(self) -> int:
        """Every critic update sees its own real images: an epoch is one pass of the critic."""
        return self.batch_size * self.critic_steps

    def networks(self) -> tuple["Generator", "Critic"]:
        generator = Generator(self)
        if self.dcgan_weights:
            generator.apply(init_dcgan)
        return generator, Critic(self)

    def build(self) -> "Model":
        return Model(self)


PRESETS = {
    "baseline": Config(),
    # As published for PBC (c-h-y-a-n, "Conditional WGAN-GP for Blood Cell Image Synthesis"), but
    # for the classes of the images that the penalty mixes; 25,706,144 parameters.
    "published": replace(
        Config(),
        image_size=128,
        critic_steps=7,
        patch_scores=True,
        even_classes=True,
        dcgan_weights=False,
    ),
    "best": residual_cwgan_gp.Config(),
    "best_64": residual_cwgan_gp.BEST_64,
    "best_small": residual_cwgan_gp.SMALL,
    "quick": replace(
        Config(),
        base_channels=32,
        critic_steps=2,
        lr=5e-4,
        ema_decay=0.98,
        epochs=15,
        batch_size=32,
    ),
}


class Generator(nn.Module):
    """z [N, latent_dim] and labels [N] → images in [-1, 1], [N, C, S, S]."""

    def __init__(self, config: Config):
        super().__init__()
        self.inputs = [config.latent_dim]
        self.embedding = nn.Embedding(config.n_classes, config.embed_size)
        self.layers = transposed_convolutions(
            config.latent_dim + config.embed_size,
            config.base_channels,
            config.image_channels,
            config.image_size,
        )

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        inputs = torch.cat([latents, self.embedding(labels)], dim=1)
        return self.layers(inputs[:, :, None, None])


class Critic(nn.Module):
    """Images in [-1, 1] and labels [N] → scores [N], higher for real ones.

    With `patch_scores`, of images of 64 or 128 pixels: [N, 3, 3].
    """

    def __init__(self, config: Config):
        super().__init__()
        self.image_size = config.image_size
        self.embedding = nn.Embedding(config.n_classes, config.image_size**2)
        layers, previous, size = [], config.image_channels + 1, config.image_size
        for level in range(len(sides_down_to_four(config.image_size)) - 1):
            width = config.base_channels * 2**level
            layers.append(spectral_norm(nn.Conv2d(previous, width, 4, 2, padding=1, bias=False)))
            # Not batch norm: the penalty is on each image's own gradient (section 4). Nor on the
            # first layer, as in DCGAN.
            layers += [nn.InstanceNorm2d(width)] if level > 0 else []
            layers.append(nn.LeakyReLU(0.2))
            previous, size = width, size // 2
        if config.patch_scores:
            layers += [spectral_norm(nn.Conv2d(previous, 1, 2, bias=False)), nn.Flatten(0, 1)]
        else:
            layers += [spectral_norm(nn.Conv2d(previous, 1, size, bias=False)), nn.Flatten(0)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        plane = self.embedding(labels).view(-1, 1, self.image_size, self.image_size)
        return self.layers(torch.cat([images, plane], dim=1))


class Model(nn.Module):
    """Generator and critic, a step of both, and draws of a class."""

    conditional = True
    penalised = ("critic",)  # the networks whose gradient is part of a loss

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.generator, self.critic = config.networks()
        self.inputs = self.generator.inputs

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        betas_generator = (config.beta1_generator, config.beta2)
        betas_critic = (config.beta1_critic, config.beta2)
        return {
            "generator": torch.optim.Adam(self.generator.parameters(), config.lr, betas_generator),
            "critic": torch.optim.Adam(self.critic.parameters(), config.lr, betas_critic),
        }

    def latents(self, n: int, device: torch.device, generator=None) -> Tensor:
        """z ~ N(0, I), [n, latent_dim], and whatever noise the generator takes behind it."""
        parts = [torch.randn(n, size, device=device, generator=generator) for size in self.inputs]
        return torch.cat(parts, dim=1)

    def generate(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """G(z, class) for z ~ N(0, I); [-1, 1], [N, C, S, S]."""
        return self.generator(self.latents(len(labels), labels.device, generator), labels)

    def classes_to_generate(self, labels: Tensor) -> Tensor:
        """Those of the real images, `labels`, or as many that are drawn evenly; int64 [N]."""
        if self.config.even_classes:
            return torch.randint_like(labels, self.config.n_classes)
        return labels

    def training_step(self, images: Tensor, labels: Tensor, optimizers: dict) -> dict[str, Tensor]:
        """`critic_steps` critic updates on as many batches, then one of the generator.

        images: [-1, 1], [critic_steps · N, C, S, S]; labels: as many. Algorithm 1.
        """
        steps = self.config.critic_steps
        self._set_learning_rates(len(images), optimizers)
        logged = []
        for reals, classes in zip(images.chunk(steps), labels.chunk(steps), strict=True):
            asked = self.classes_to_generate(classes)
            with torch.no_grad():
                fakes = self.generate(asked)
            # Equation (3): E[f(G(z))] - E[f(x)] + λ E[(‖∇f(x̂)‖₂ - 1)²].
            scores = self.critic(reals, classes).float(), self.critic(fakes, asked).float()
            wasserstein = scores[0].mean() - scores[1].mean()
            if self.config.even_classes:  # x̂ has a class only if both its images are of it
                with torch.no_grad():
                    fakes = self.generate(classes)
            penalty = self.gradient_norm_penalty(reals, fakes, classes)
            loss_critic = -wasserstein + self.config.gradient_penalty * penalty
            update(optimizers["critic"], loss_critic)
            logged.append(torch.stack([loss_critic, wasserstein, penalty]).detach())

        self.critic.requires_grad_(False)
        asked = self.classes_to_generate(classes)
        fakes = self.generate(asked)
        loss_generator = -self.critic(fakes, asked).float().mean()
        update(optimizers["generator"], loss_generator)
        self.critic.requires_grad_(True)

        loss_critic, wasserstein, penalty = torch.stack(logged).mean(0)
        return {
            "loss_critic": loss_critic,
            "loss_generator": loss_generator,
            "wasserstein": wasserstein,
            "gradient_penalty": penalty,
        }

    def _set_learning_rates(self, n: int, optimizers: dict) -> None:
        """Of both networks, for the next n images."""
        config = self.config
        for optimizer in optimizers.values():
            group = optimizer.param_groups[0]  # which is stored: a resumed run goes on
            group["images_seen"] = group.get("images_seen", 0) + n
            if config.decay_images:
                group["lr"] = config.lr * cosine_decay(group["images_seen"] / config.decay_images)

    def gradient_norm_penalty(self, reals: Tensor, fakes: Tensor, labels: Tensor) -> Tensor:
        """E[(‖∇f(x̂)‖₂ - 1)²] at x̂ on lines between real and generated images of one class.

        `labels` are those of the reals and those that the fakes were drawn for, so that the
        mixture belongs to them too. f is the sum of an image's scores where it has several.
        Always float32: the second derivative does not bear less.
        """
        with torch.autocast(reals.device.type, enabled=False):
            weights = torch.rand(len(reals), 1, 1, 1, device=reals.device)
            mixed = (weights * reals + (1 - weights) * fakes.float()).requires_grad_(True)
            scores = self.critic(mixed, labels)
            (gradient,) = torch.autograd.grad(scores.sum(), mixed, create_graph=True)
            return ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean()

    @torch.no_grad()
    def sample(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images of these classes, [-1, 1], [N, C, S, S]."""
        return self.generate(labels, generator)
