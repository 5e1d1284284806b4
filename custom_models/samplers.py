"""Solvers of the probability flow ODE of diffusion models, dx/dσ = (x - D(x; σ)) / σ (Karras et al.
2022, "Elucidating the Design Space of Diffusion-Based Generative Models", EDM, equation (1) with
σ(t) = t and equation (3)).

Every solver is a function (model, x, sigmas) → images, without any randomness of its own:
model: (x, σ) → D(x; σ), the denoised images, for σ a tensor without dimensions;
x: [N, C, S, S], noise of standard deviation sigmas[0];
sigmas: descending noise levels that end in 0, as from `karras_sigmas`.
"""

import itertools

import torch
from torch import Tensor

from utils import InputError


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels from sigma_max down to sigma_min, then 0: float32 [steps + 1].

    EDM, equation (5); the larger rho, the more of the steps are taken at low noise. InputError for
    fewer than two steps.
    """
    if steps < 2:
        raise InputError(f"the noise levels need at least two steps, got {steps}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + ramp * (last - first)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def heun(model, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second order: EDM, algorithm 1."""
    last = len(sigmas) - 2
    for i in range(last + 1):
        step = sigmas[i + 1] - sigmas[i]
        slope = (x - model(x, sigmas[i])) / sigmas[i]
        euler = x + step * slope
        if i == last:  # at σ = 0 the slope is not defined
            return euler
        slope_there = (euler - model(euler, sigmas[i + 1])) / sigmas[i + 1]
        x = x + step * (slope + slope_there) / 2


def ddim(model, x: Tensor, sigmas: Tensor) -> Tensor:
    """First order: DDIM (Song, Meng and Ermon 2021), which is Euler's method in σ."""
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * (x - model(x, sigma)) / sigma
    return x


def dpm_solver_2m(model, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second order with one evaluation a step: DPM-Solver++(2M).

    Lu et al. 2022, "DPM-Solver++", algorithm 2, with α = 1 and so λ = -log σ. The first step and
    the last, to σ = 0, where λ is infinite, are of first order.
    """
    last = len(sigmas) - 2
    before = None
    for i in range(last + 1):
        denoised = model(x, sigmas[i])
        if i == last:
            return denoised
        h = (sigmas[i] / sigmas[i + 1]).log()  # λ of the next level less λ of this one
        target = denoised
        if i > 0:
            r = (sigmas[i - 1] / sigmas[i]).log() / h
            target = denoised + (denoised - before) / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * target
        before = denoised


SAMPLERS = {"heun": heun, "ddim": ddim, "dpm_solver_2m": dpm_solver_2m}


def evaluations(sampler: str, steps: int) -> int:
    """How often a sampler of SAMPLERS evaluates the model in this number of steps."""
    return 2 * steps - 1 if sampler == "heun" else steps
