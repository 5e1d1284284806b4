"""Fréchet distance against closed forms and two other implementations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.frechet import frechet_distance, gaussian_statistics
from utils import InputError


def exact_draws(mean, variances, n: int, seed: int) -> torch.Tensor:
    """Features whose sample mean and unbiased covariance are exactly mean and diag(variances)."""
    mean = torch.as_tensor(mean, dtype=torch.float64)
    scale = torch.as_tensor(variances, dtype=torch.float64).sqrt()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    draws -= draws.mean(0)
    orthonormal = torch.linalg.qr(draws).Q
    return orthonormal * (n - 1) ** 0.5 * scale + mean


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(gaussian_statistics(a), gaussian_statistics(b))


def correlated(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mix + torch.randn(d, generator=generator)


def test_statistics_are_unbiased():
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 7.0]])
    mean, covariance = gaussian_statistics(features)
    assert mean.tolist() == [2, 3]
    assert covariance.tolist() == [[4, 6], [6, 12]]
    assert covariance.dtype == torch.float64


numbers = st.lists(
    st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(1e-3, 100), st.floats(1e-3, 100)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(numbers, st.integers(0, 1000))
def test_closed_form_of_commuting_covariances(parameters, seed):
    mean_a, mean_b, var_a, var_b = np.array(parameters).T
    a = exact_draws(mean_a, var_a, 20, seed)
    b = exact_draws(mean_b, var_b, 30, seed + 1)
    # The same rotation of both leaves the distance alone and makes the covariances full.
    turn = torch.linalg.qr(exact_draws(mean_a * 0, var_a * 0 + 1, 20, seed)[: len(mean_a)]).Q
    expected = ((mean_a - mean_b) ** 2 + (np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    assert distance(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_closed_form_of_two_dimensions_that_do_not_commute():
    # In two dimensions Tr (AB)^½ = (Tr AB + 2 (det AB)^½)^½.
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    assert not torch.allclose(a @ b, b @ a)
    trace = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = a.trace() + b.trace() - 2 * trace
    assert frechet_distance((zero, a), (zero, b)) == pytest.approx(expected.item(), rel=1e-12)


def test_agrees_with_torch_fidelity():
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = correlated(400, 64, 0).double(), correlated(300, 64, 1).double()
    theirs = metric_fid.fid_statistics_to_metric(
        metric_fid.fid_features_to_statistics(a), metric_fid.fid_features_to_statistics(b), False
    )["frechet_inception_distance"]
    assert distance(a, b) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_pytorch_fid():
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    a, b = correlated(400, 64, 2), correlated(300, 64, 3)
    statistics = [part.numpy() for x in (a, b) for part in gaussian_statistics(x)]
    try:
        theirs = fid_score.calculate_frechet_distance(*statistics)
    except (TypeError, ValueError) as error:
        pytest.skip(f"pytorch-fid does not run with this SciPy: {error}")
    assert distance(a, b) == pytest.approx(theirs, rel=1e-6)


def test_zero_for_identical_sets_and_for_any_order_of_them():
    a = correlated(200, 32, 4)
    shuffled = a[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, shuffled) == pytest.approx(0, abs=1e-6)
    assert distance(a, a + 1) == pytest.approx(32, rel=1e-6)


def test_symmetric_and_independent_of_order():
    a, b = correlated(200, 32, 5), correlated(150, 32, 6)
    value = distance(a, b)
    assert value > 1
    assert distance(b, a) == pytest.approx(value, rel=1e-9)
    assert distance(a.flip(0), b.flip(0)) == pytest.approx(value, rel=1e-9)


def test_rank_deficient_covariances_stay_finite():
    a = correlated(20, 64, 7)
    assert distance(a, a) == pytest.approx(0, abs=1e-5 * a.var(0).sum().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(value):
    features = torch.ones(5, 3)
    features[2, 1] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        gaussian_statistics(features)
    good = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    with pytest.raises(InputError, match="NaN or infinite"):
        frechet_distance(good, (good[0], good[1] * value))


def test_refuses_one_image_and_other_dimensions():
    with pytest.raises(InputError, match=r"\[1, 3\]"):
        gaussian_statistics(torch.ones(1, 3))
    with pytest.raises(InputError, match="3 and 4 dimensions"):
        distance(torch.rand(9, 3), torch.rand(9, 4))
