"""Coverage and width of the subsampling interval over repeated draws."""

import pytest
import torch

from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.uncertainty import subsampling_interval


def draws(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def mean_difference(real: torch.Tensor, fake: torch.Tensor) -> float:
    return (fake.mean() - real.mean()).item()


def frechet(real: torch.Tensor, fake: torch.Tensor) -> float:
    return frechet_distance(gaussian_statistics(real), gaussian_statistics(fake))


def intervals(statistic, times: int, d: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Intervals [times, 2] and values [times] over independent draws."""
    pairs = [(draws(120, d, k), draws(80, d, 10_000 + k, shift)) for k in range(times)]
    found = [subsampling_interval(statistic, *pair, seed=k) for k, pair in enumerate(pairs)]
    values = [statistic(*pair) for pair in pairs]
    return tuple(torch.tensor(part, dtype=torch.float64) for part in (found, values))


def share_covered(found: torch.Tensor, truth: float) -> float:
    return ((found[:, 0] <= truth) & (truth <= found[:, 1])).double().mean().item()


def test_covers_a_mean_difference_nineteen_times_in_twenty():
    times = 400
    found, values = intervals(mean_difference, times, 1, 0.5)
    # Three binomial standard errors.
    assert share_covered(found, 0.5) == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / times) ** 0.5)
    deviation = (1 / 120 + 1 / 80) ** 0.5
    half_width = (found[:, 1] - found[:, 0]).mean().item() / 2
    assert half_width == pytest.approx(2.093 * deviation, rel=0.05)
    torch.testing.assert_close(found.mean(1), values, rtol=0, atol=1e-9)


def test_covers_the_expectation_of_a_frechet_distance():
    times = 200
    found, values = intervals(frechet, times, 4, 0.6)
    truth = 4 * 0.36
    expectation = values.mean().item()
    # The interval is about the distance at this number of images, which is biased.
    assert expectation - truth > 0.05
    assert 0.91 < share_covered(found, expectation) < 0.995


def test_is_too_wide_by_a_known_factor_where_the_distributions_agree():
    # A squared mean difference has no first-order error here; √3 is the ratio of the deviations.
    def squared(real, fake):
        return (fake.mean(0) - real.mean(0)).square().sum().item()

    times = 200
    found, values = intervals(squared, times, 30, 0.0)
    half_width = (found[:, 1] - found[:, 0]).mean().item() / 2
    ratio = half_width / (2.093 * values.std().item())
    assert ratio == pytest.approx(3**0.5, rel=0.2)


def test_both_sides_are_halved_without_replacement():
    seen = []

    def statistic(real, fake):
        seen.append((real[:, 0].tolist(), fake[:, 0].tolist()))
        return float(len(seen))

    real, fake = torch.arange(9.0)[:, None], torch.arange(100.0, 106.0)[:, None]
    subsampling_interval(statistic, real, fake)
    whole = [pair for pair in seen if len(pair[0]) == 9]
    halves = [pair for pair in seen if pair not in whole]
    assert len(whole) == 1 and len(halves) == 20
    for rows, others in halves:
        assert len(set(rows)) == len(rows) == 4 and set(rows) <= set(range(9))
        assert len(set(others)) == len(others) == 3 and set(others) <= set(range(100, 106))
    assert len({tuple(rows) for rows, _ in halves}) > 1


def test_the_seed_alone_decides_it_and_a_constant_has_no_width():
    real, fake = draws(20, 2, 0), draws(10, 2, 1)
    first = subsampling_interval(mean_difference, real, fake, seed=3)
    assert subsampling_interval(mean_difference, real, fake, seed=3) == first
    assert subsampling_interval(mean_difference, real, fake, seed=4) != first
    assert all(type(bound) is float for bound in first)
    assert subsampling_interval(lambda *_: 2.5, real, fake) == (2.5, 2.5)


def test_refuses_fewer_than_four_images(bad_input):
    subsampling_interval(mean_difference, draws(4, 2, 0), draws(4, 2, 1))
    with bad_input("four images", "20 real and 3 generated"):
        subsampling_interval(mean_difference, draws(20, 2, 0), draws(3, 2, 1))
