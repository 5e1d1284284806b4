"""Precision, recall, density and coverage against their definitions and known cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation import neighbours
from evaluation.prdc import precision_recall_density_coverage


def draws(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def brute_force(real: torch.Tensor, fake: torch.Tensor, k: int) -> dict:
    """The definitions, point by point."""

    def distance(x, y):
        return (x.double() - y.double()).square().sum().sqrt().float().item()

    def radii(points):
        others = [
            sorted(distance(x, y) for j, y in enumerate(points) if j != i)
            for i, x in enumerate(points)
        ]
        return [row[k - 1] for row in others]

    real_radii, fake_radii = radii(real), radii(fake)
    between = [[distance(x, y) for y in fake] for x in real]
    reals, fakes = range(len(real)), range(len(fake))
    inside = [[between[i][j] <= real_radii[i] for j in fakes] for i in reals]
    return {
        "precision": sum(any(inside[i][j] for i in reals) for j in fakes) / len(fake),
        "recall": sum(any(between[i][j] <= fake_radii[j] for j in fakes) for i in reals)
        / len(real),
        "density": sum(map(sum, inside)) / (k * len(fake)),
        "coverage": sum(min(between[i]) <= real_radii[i] for i in reals) / len(real),
    }


# Few values, so that copies and equal distances are common.
points = st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=4, max_size=9)


@given(points, points, st.integers(1, 3))
def test_agrees_with_brute_force(real, fake, k):
    real, fake = torch.tensor(real).float(), torch.tensor(fake).float()
    expected = brute_force(real, fake, k)
    assert precision_recall_density_coverage(real, fake, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_agrees_with_torch_fidelity(k):
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = draws(300, 20, 0), draws(200, 20, 1, scale=0.9)
    theirs = metric_prc.prc_features_to_metric(
        fake.double(),
        real.double(),
        prc_neighborhood=k,
        prc_batch_size=1000,
        save_cpu_ram=False,
        verbose=False,
    )
    ours = precision_recall_density_coverage(real, fake, k)
    assert 0.1 < theirs["recall"] < theirs["precision"] < 1
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)


def test_narrow_in_wide_is_precise_without_recall_and_wide_over_narrow_the_reverse():
    wide, narrow = draws(1000, 8, 2), draws(1000, 8, 3, scale=0.3)
    result = precision_recall_density_coverage(wide, narrow)
    assert result["precision"] > 0.8 and result["recall"] < 0.3
    assert result["density"] > 1 and result["coverage"] < 0.5
    mirror = precision_recall_density_coverage(narrow, wide)
    assert mirror["precision"] == result["recall"] and mirror["recall"] == result["precision"]


def test_coverage_of_one_distribution_is_its_expectation():
    # Naeem et al. 2020 on the choice of k: 1 - (M - 1) … (M - k) / ((M + N - 1) … (M + N - k)).
    m, n, k, repeats = 60, 40, 3, 200
    results = [
        precision_recall_density_coverage(draws(m, 2, i), draws(n, 2, 1000 + i), k)
        for i in range(repeats)
    ]
    missed = 1.0
    for j in range(1, k + 1):
        missed *= (m - j) / (m + n - j)
    for name, expected in (("coverage", 1 - missed), ("density", 1.0)):
        values = torch.tensor([result[name] for result in results], dtype=torch.float64)
        assert abs(values.mean() - expected) < 4 * values.std() / repeats**0.5
        assert values.std() / repeats**0.5 < 0.02


def test_copies_of_the_real_set():
    real = draws(200, 300, 4).abs() + 20
    result = precision_recall_density_coverage(real, real.flip(0).clone())
    # Each ball holds its centre and five more.
    assert result == {"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}


def test_one_image_over_and_over():
    real = draws(50, 4, 5)
    fake = real[:1].expand(30, 4)
    result = precision_recall_density_coverage(real, fake)
    assert result["precision"] == 1 and result["recall"] == 1 / 50
    assert 1 / 50 < result["coverage"] < 0.5
    far = precision_recall_density_coverage(real, fake + 100)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_order_of_images_position_and_chunks_do_not_matter(monkeypatch):
    real, fake = draws(120, 6, 6), draws(90, 6, 7, scale=0.8)
    expected = precision_recall_density_coverage(real, fake)
    assert 0 < expected["recall"] < 1
    assert precision_recall_density_coverage(real.flip(0), fake.roll(7, 0)) == expected
    doubles = real.double() + 100, fake.double() + 100
    assert precision_recall_density_coverage(*doubles) == expected
    monkeypatch.setattr(neighbours, "CHUNK", 33)
    assert precision_recall_density_coverage(real, fake) == expected


def test_refuses_bad_features(bad_input):
    good = draws(6, 4, 8)
    precision_recall_density_coverage(good, good)
    with bad_input("at least 6", "6 real and 5 generated"):
        precision_recall_density_coverage(good, good[:5])
    with bad_input("k = 0"):
        precision_recall_density_coverage(good, good, 0)
    with bad_input("[6, 3] and [6, 4]"):
        precision_recall_density_coverage(good, good[:, :3])
    with bad_input("NaN or infinite"):
        precision_recall_density_coverage(good, good * float("nan"))
