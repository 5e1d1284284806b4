"""The solvers of the probability flow ODE, against the exact solution for Gaussian data."""

import itertools
import math

import pytest
import torch

from custom_models.samplers import SAMPLERS, ddim, dpm_solver_2m, evaluations, heun, karras_sigmas

MEAN, SD = 0.3, 0.5  # of the Gaussian data


def gaussian_denoiser(x, sigma):
    """The expected image behind x = image + noise, for independent Gaussian pixels."""
    return (SD**2 * x + sigma**2 * MEAN) / (SD**2 + sigma**2)


def gaussian_solution(x, sigma):
    """Where the ODE leads x from noise level sigma to 0, solved by hand."""
    return MEAN + (x - MEAN) * SD / (SD**2 + sigma**2).sqrt()


def starting_noise(sigmas):
    generator = torch.Generator().manual_seed(0)
    return sigmas[0] * torch.randn(4, 3, 6, 5, generator=generator, dtype=sigmas.dtype)


def error(sampler, steps):
    """Largest distance to the exact solution, in float64 so that rounding has no part in it."""
    sigmas = karras_sigmas(steps, 1e-4, 10.0, 7.0).double()
    x = starting_noise(sigmas)
    return (sampler(gaussian_denoiser, x, sigmas) - gaussian_solution(x, sigmas[0])).abs().max()


@pytest.mark.parametrize("sampler, order", [(heun, 2), (ddim, 1), (dpm_solver_2m, 2)])
def test_samplers_converge_to_the_exact_solution_with_their_order(sampler, order):
    errors = [error(sampler, steps).item() for steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_end_in_the_denoised_image_and_leave_their_input_alone(name):
    """A model that always sees the same image leads to it, from any noise, in any steps."""
    sigmas = karras_sigmas(5, 0.002, 80.0, 7.0)
    x, image = starting_noise(sigmas), torch.linspace(-1, 1, 3 * 6 * 5).reshape(1, 3, 6, 5)
    before = x.clone()
    result = SAMPLERS[name](lambda x, sigma: image.expand_as(x), x, sigmas)
    assert result.shape == x.shape and result.dtype == torch.float32
    assert torch.allclose(result, image.expand_as(x), atol=1e-4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 7])
def test_evaluations_are_counted_and_never_at_zero_noise(name, steps):
    seen = []

    def model(x, sigma):
        assert sigma.ndim == 0
        seen.append(sigma.item())
        return gaussian_denoiser(x, sigma)

    sigmas = karras_sigmas(steps, 0.002, 80.0, 7.0)
    SAMPLERS[name](model, starting_noise(sigmas), sigmas)
    assert len(seen) == evaluations(name, steps)
    assert set(seen) == set(sigmas[:-1].tolist())


def test_a_step_of_ddim_mixes_the_image_and_what_is_left_of_the_noise():
    sigmas = torch.tensor([4.0, 1.0, 0.0])
    x, image = torch.full((1, 1, 1, 1), 9.0), torch.full((1, 1, 1, 1), 1.0)
    seen = []
    ddim(lambda x, sigma: (seen.append(x.item()), image)[1], x, sigmas)
    assert seen == [9.0, 1.0 + (9.0 - 1.0) / 4]


def test_heun_averages_the_two_slopes():
    """One step from 2 to 1 with D = x²/10, then Euler's step to 0, by hand."""
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    x = torch.full((1, 1, 1, 1), 4.0)
    slope = (4 - 1.6) / 2
    euler = 4 - slope
    slope_there = euler - euler**2 / 10
    expected = (4 - (slope + slope_there) / 2) ** 2 / 10
    result = heun(lambda x, sigma: x**2 / 10, x, sigmas)
    assert result.item() == pytest.approx(expected, rel=1e-6)


def test_dpm_solver_extrapolates_from_its_second_step_on():
    """Two steps by hand: log σ falls by log 2 and then by log 4, so that r = 1/2."""
    sigmas, images, seen = torch.tensor([8.0, 4.0, 1.0, 0.0]), {8.0: 2.0, 4.0: 3.0, 1.0: 5.0}, []

    def model(x, sigma):
        seen.append(x.item())
        return torch.full_like(x, images[sigma.item()])

    result = dpm_solver_2m(model, torch.full((1, 1, 1, 1), 10.0), sigmas)
    first = 10 / 2 + (1 - 1 / 2) * 2
    second = first / 4 + (1 - 1 / 4) * (3 + (3 - 2))
    assert seen == pytest.approx([10, first, second], rel=1e-6)
    assert result.item() == 5


def test_noise_levels_fall_from_the_largest_to_the_smallest_and_then_to_zero():
    sigmas = karras_sigmas(18, 0.002, 80.0, 7.0)
    assert sigmas.shape == (19,) and sigmas.dtype == torch.float32
    ends = (sigmas[0].item(), sigmas[-2].item(), sigmas[-1].item())
    assert ends == (80.0, pytest.approx(0.002), 0.0)
    assert (sigmas.diff() < 0).all()
    # Equation (5): the rho-th roots are evenly spaced.
    roots = sigmas[:-1].double() ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff().mean(), rtol=1e-4)


def test_rho_one_spaces_the_noise_levels_evenly():
    assert karras_sigmas(4, 1.0, 4.0, 1.0).tolist() == pytest.approx([4, 3, 2, 1, 0])


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_too_few_steps_are_bad_input(steps, bad_input):
    with bad_input("two steps", str(steps)):
        karras_sigmas(steps, 0.002, 80.0, 7.0)
