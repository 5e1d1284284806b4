"""Noise → images, for every model: what the notebook `explore` moves its sliders on.

A model draws noise and makes an image of it. Here the two are apart, so that the noise can be moved
on its way: `images_from(model, draw_noise(model, labels, seed), labels)` is `drawing.sample`, but
for the ancestral sampler of ddpm, which draws noise all along: there DDIM takes its place.
"""

import copy
import dataclasses
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from custom_models.drawing import SAMPLE_BATCH, derive_seed
from custom_models.jpeg_vae import logistic_noise
from utils import ImageSet, InputError, data_folder, load_dataset, to_uint8

SAMPLES = 1024  # that directions are fitted to: some five for each of the CVAE's latents


def is_diffusion(model: nn.Module) -> bool:
    """Whether the model takes steps from noise of the image's own size, instead of from latents."""
    return hasattr(model, "in_steps")


def draw_noise(model: nn.Module, labels: Tensor, seed: int) -> Tensor:
    """The noise behind the images of `drawing.sample`, float32 [N, D], for at most 128 labels.

    A GAN's and the CVAE's begins with the latents, `config.latent_dim` of them, N(0, I); in the
    CVAE's `best` preset these are the noise of which its prior makes latents, and what follows is
    the logistic noise of the coefficients that it draws. Behind a cWGAN-GP's follows the noise of
    its finest texture, if it draws any.
    A diffusion model's is x_T, N(0, I), D = C · S · S.
    """
    if len(labels) > SAMPLE_BATCH:
        raise InputError(f"at most {SAMPLE_BATCH} images at once, got {len(labels)}")
    config, n = model.config, len(labels)
    generator = torch.Generator().manual_seed(derive_seed(seed, "samples"))
    if hasattr(model, "latents"):
        return model.latents(n, torch.device("cpu"), generator)
    if is_diffusion(model):
        dim = config.image_channels * config.image_size**2
    else:
        dim = config.latent_dim
    parts = [torch.randn(n, dim, generator=generator)]
    if hasattr(model, "images_of"):
        size = config.image_size
        for coefficients in model.jpeg.encode(torch.zeros(1, 3, size, size)):
            parts.append(logistic_noise((n, coefficients.numel()), generator))
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def images_from(model: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
    """The images that the model makes of this noise, uint8 [N, C, S, S]; it is in eval mode.

    noise: as from `draw_noise`; labels: int64 [N], not used by a model without classes. A diffusion
    model takes the steps of its config; `ddpm` by DDIM, which needs no more noise on the way.
    """
    config = model.config
    if is_diffusion(model):
        side = config.image_size
        noise = noise.view(len(noise), config.image_channels, side, side)
        images = model.in_steps(labels, noise, config.sampling_steps)
    elif hasattr(model, "images_of"):
        images = _from_coefficients(model, noise, labels)
    elif hasattr(model, "decoder"):
        images = model.decoder(noise, model.condition(labels)).sigmoid() * 2 - 1
    elif model.conditional:
        images = model.generator(noise, labels)
    else:
        images = model.generator(noise)
    return to_uint8(images)


def _from_coefficients(model: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
    """The CVAE's `best`: latents first, then the coefficients' noise; [-1, 1], [N, 3, S, S]."""
    latents, rest = noise[:, : model.config.latent_dim], noise[:, model.config.latent_dim :]

    def draw(shape: torch.Size) -> Tensor:
        nonlocal rest
        drawn, rest = rest[:, : shape[1:].numel()], rest[:, shape[1:].numel() :]
        return drawn.view(shape)

    return model.images_of(latents, labels, draw)


# ---------------------------------------------------------------------------------------------
# Moving the noise
# ---------------------------------------------------------------------------------------------


def directions(model: nn.Module, label: int, count: int) -> Tensor:
    """Directions of the latents that change the images of a class most: float32 [count, dim].

    Orthonormal; the first changes most. They are the leading left singular vectors of the pixels'
    linear regression on the latents, over 1,024 samples. For normal latents its slopes are the mean
    Jacobian of the generator (Stein's lemma). Forwards along a direction, images get brighter.
    """
    latents, images = [], []
    for batch in range(SAMPLES // SAMPLE_BATCH):
        labels = torch.full((SAMPLE_BATCH,), label)
        noise = draw_noise(model, labels, derive_seed(label, "directions", batch))
        latents.append(noise[:, : model.config.latent_dim])
        images.append(images_from(model, noise, labels).flatten(1).float())
    latents, images = torch.cat(latents), torch.cat(images)
    slopes = torch.linalg.lstsq(latents, images - images.mean(0)).solution
    found = torch.linalg.svd(slopes, full_matrices=False).U.T[:count]
    return found * torch.where((found @ slopes).sum(1, keepdim=True) < 0, -1, 1)


def move(noise: Tensor, directions: Tensor, amounts: list[float]) -> Tensor:
    """The noise [N, D], moved by so many standard deviations along each of the directions."""
    moved = noise.clone()
    moved[:, : directions.shape[1]] += torch.tensor(amounts) @ directions
    return moved


def between(first: Tensor, second: Tensor, frames: int) -> Tensor:
    """From one image's noise [D] to another's along a circle: float32 [frames, D], both included.

    cos(t) first + sin(t) second keeps the variance, as a straight line does not: its middle would
    be noise that the model has never seen. For noises at a right angle, as long random ones nearly
    are, it is the spherical interpolation of White (2016), "Sampling Generative Networks".
    """
    angles = torch.linspace(0, math.pi / 2, frames, dtype=torch.float64)[:, None]
    path = (angles.cos() * first + angles.sin() * second).float()
    path[-1] = second
    return path


# ---------------------------------------------------------------------------------------------
# Sampling a diffusion model in another way
# ---------------------------------------------------------------------------------------------


def with_sampling(model: nn.Module, **settings) -> nn.Module:
    """The same weights, sampled with other settings of the config, such as guidance_scale=2.0.

    Raises InputError for a value that the config refuses.
    """
    changed = copy.copy(model)
    changed.config = dataclasses.replace(model.config, **settings)
    return changed


# ---------------------------------------------------------------------------------------------
# Real cells beside generated ones
# ---------------------------------------------------------------------------------------------


def real_cells(path: Path, about: dict, data_root: str | Path | None) -> dict[str, ImageSet]:
    """The `train` and `held_out` cells of the data set that a shipped checkpoint was trained on.

    Raises InputError where the record beside the checkpoint or the data's folder is missing, and
    where the data there is another.
    """
    record = path.with_suffix(".json")
    root = data_folder(data_root)
    if not record.is_file():
        raise InputError(f"{record.name} is missing, which names the data set; get it anew")
    if not root.exists():
        raise InputError(
            f"{about['dataset']} is not here; set data_root to the folder that holds it"
        )
    source = json.loads(record.read_text(encoding="utf-8"))["dataset"]["source"]
    cells = {
        split: load_dataset(source, root, about["image_size"], split)
        for split in ("train", "held_out")
    }
    if cells["train"].sha256() != about["dataset_sha256"]:
        raise InputError(
            f"{cells['train'].name} in {root} is not what this model was trained on, "
            f"{about['dataset']} (sha256 {about['dataset_sha256'][:8]}…); give that data set"
        )
    return cells
