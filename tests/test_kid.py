"""Kernel distance against torch-fidelity, brute force and its own expectation."""

import pytest
import torch

from evaluation import kid
from evaluation.kid import kernel_distance
from utils import InputError


def draws(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def brute_force(real: torch.Tensor, fake: torch.Tensor) -> float:
    """The definition, pair by pair."""

    def kernel(x, y):
        return (x.double() @ y.double() / len(x) + 1).item() ** 3

    def within(a):
        pairs = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in real for y in fake]
    return within(real) + within(fake) - 2 * sum(between) / len(between)


def brute_force_error(real: torch.Tensor, fake: torch.Tensor) -> float:
    variance = 0.0
    for first, second in ((real, fake), (fake, real)):
        n = len(first)
        rest = [torch.cat([first[:i], first[i + 1 :]]) for i in range(n)]
        values = torch.tensor([brute_force(part, second) for part in rest], dtype=torch.float64)
        variance += (n - 1) / n * (values - values.mean()).square().sum().item()
    return variance**0.5


@pytest.mark.parametrize("chunk", [4, 512])
def test_value_and_error_agree_with_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(kid, "CHUNK", chunk)
    real, fake = draws(9, 3, 0), draws(7, 3, 1, shift=0.5)
    value, error = kernel_distance(real, fake)
    assert value == pytest.approx(brute_force(real, fake), rel=1e-10)
    assert error == pytest.approx(brute_force_error(real, fake), rel=1e-8)


def test_agrees_with_torch_fidelity():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    real, fake = draws(300, 40, 2).double(), draws(300, 40, 3, shift=0.2).double()
    theirs = metric_kid.kid_features_to_metric(
        real, fake, kid_subsets=1, kid_subset_size=300, verbose=False
    )["kernel_inception_distance_mean"]
    assert theirs > 0.01
    assert kernel_distance(real, fake)[0] == pytest.approx(theirs, rel=1e-9)


def test_mean_is_zero_and_error_is_of_the_right_size_for_one_distribution():
    results = [kernel_distance(draws(60, 8, k), draws(50, 8, 1000 + k)) for k in range(200)]
    values, errors = torch.tensor(results, dtype=torch.float64).T
    # A biased estimate (diagonal kept) would lie at about 58 of these standard errors.
    assert abs(values.mean()) < 3 * values.std() / 200**0.5
    assert (values.abs() < 2 * errors).double().mean() > 0.9
    assert 1 < errors.mean() / values.std() < 2


def test_error_covers_a_difference_of_two_distributions():
    results = [
        kernel_distance(draws(60, 8, k), draws(50, 8, 1000 + k, shift=0.5)) for k in range(100)
    ]
    values, errors = torch.tensor(results, dtype=torch.float64).T
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.25)


def test_order_of_images_chunks_and_sides_do_not_matter(monkeypatch):
    real, fake = draws(100, 16, 4), draws(70, 16, 5, shift=0.3)
    expected = kernel_distance(real, fake)
    assert kernel_distance(real.flip(0), fake.roll(3, 0)) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(fake, real) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(kid, "CHUNK", 33)
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_refuses_bad_features():
    good = draws(5, 4, 6)
    with pytest.raises(InputError, match="got 5 and 2"):
        kernel_distance(good, good[:2])
    with pytest.raises(InputError, match=r"\[5, 4\] and \[5, 3\]"):
        kernel_distance(good, good[:, :3])
    with pytest.raises(InputError, match="NaN or infinite"):
        kernel_distance(good, good * float("nan"))
