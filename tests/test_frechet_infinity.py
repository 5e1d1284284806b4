"""FD∞ against closed forms for Gaussians, and its standard error against repeated draws."""

import pytest
import torch

from evaluation import frechet_infinity as module
from evaluation.figures import frechet_infinity_fit
from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.frechet_infinity import frechet_infinity, frechet_infinity_possible

DIM = 16


def draws(n: int, seed: int, shift: float = 0.0, scale: float = 1.0, dim: int = DIM):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, dim, generator=generator) + shift


def repeat(times: int, **fake) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, standard errors and distances of all images, over independent draws."""
    results = [
        frechet_infinity(draws(200, k), draws(100, 1000 + k, **fake), seed=k) for k in range(times)
    ]
    columns = [(r["value"], r["standard_error"], r["distances"][-1]) for r in results]
    return tuple(torch.tensor(columns, dtype=torch.float64).T)


@pytest.mark.parametrize(
    ("shift", "scale", "truth"),
    [(0.0, 1.0, 0.0), (0.4, 1.0, DIM * 0.16), (0.2, 1.5, DIM * (0.04 + 0.25))],
)
def test_is_nearer_to_the_truth_and_its_error_is_of_the_right_size(shift, scale, truth):
    times = 50
    values, errors, distances = repeat(times, shift=shift, scale=scale)
    bias = (distances.mean() - truth).item()
    assert bias > 0.5
    assert abs(values.mean() - truth) < 0.15 * bias
    assert ((values - truth).abs() < (distances - truth).abs()).double().mean() > 0.7
    # A standard deviation of 50 values is known to about 10 %.
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.4)
    assert ((values - truth).abs() < 2 * errors).double().mean() > 0.8


def test_its_points_are_distances_of_the_sets_at_the_named_sizes():
    real, fake = draws(200, 0), draws(100, 1, shift=0.3)
    result = frechet_infinity(real, fake)
    assert result["n_fake"][0] == 24 == 1.5 * DIM and result["n_fake"][-1] == 100
    assert result["n_real"][0] == 48 and result["n_real"][-1] == 200
    assert sorted(result["n_fake"]) == result["n_fake"] and len(set(result["n_fake"])) == 8
    whole = frechet_distance(gaussian_statistics(real), gaussian_statistics(fake))
    assert result["distances"][-1] == pytest.approx(whole, rel=1e-9)
    assert result["distances"][0] > 1.5 * result["distances"][-1]


def test_finds_the_intercept_of_an_exact_line(monkeypatch):
    # A distance that depends on the number of images alone: 7 + 300 / n of the generated ones.
    def sizes(features, counts):
        return [(n, n) for n in counts]

    monkeypatch.setattr(module, "_nested_statistics", sizes)
    monkeypatch.setattr(
        module,
        "frechet_distance",
        lambda a, b: 7 + 300 / (b[0] if isinstance(b[0], int) else 480),
    )
    result = frechet_infinity(draws(960, 2, dim=8), draws(480, 3, dim=8))
    # Sizes are whole numbers, so that the points lie not quite on the line over 1 / f.
    assert result["value"] == pytest.approx(7, abs=0.05)
    assert result["distances"][0] == pytest.approx(7 + 300 / 12)


def test_nested_statistics_are_those_of_the_first_rows():
    features = draws(60, 4, shift=50.0, dim=5).double()
    for n, ours in zip((10, 11, 60), module._nested_statistics(features, [10, 11, 60])):
        for mine, theirs in zip(ours, gaussian_statistics(features[:n])):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def sampling_variance(real: torch.Tensor, fake: torch.Tensor) -> float:
    sets = [real.double(), fake.double()]
    return module._sampling_variance(sets, [gaussian_statistics(part) for part in sets])


def test_sampling_variance_has_its_closed_form_in_one_dimension():
    # The distance is (m₁ - m₂)² + (s₁ - s₂)², a mean varies by s² / n, a deviation by s² / 2n.
    m, n, shift, scale = 40_000, 30_000, 0.7, 1.8
    real, fake = draws(m, 5, dim=1), draws(n, 6, shift=shift, scale=scale, dim=1)
    by_mean = 4 * shift**2 * (1 / m + scale**2 / n)
    by_deviation = 4 * (scale - 1) ** 2 * (1 / (2 * m) + scale**2 / (2 * n))
    expected = by_mean + by_deviation
    assert sampling_variance(real, fake) == pytest.approx(expected, rel=0.05)


def test_sampling_variance_agrees_with_a_jackknife():
    turn = torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 2.0]])
    sets = [draws(300, 7, dim=3), draws(200, 8, shift=0.5, dim=3) @ turn]
    variance = 0.0
    for side in (0, 1):
        values = []
        for i in range(len(sets[side])):
            rest = list(sets)
            rest[side] = torch.cat([sets[side][:i], sets[side][i + 1 :]])
            values.append(frechet_distance(*map(gaussian_statistics, rest)))
        variance += (len(values) - 1) * torch.tensor(values).var(correction=0).item()
    assert sampling_variance(*sets) == pytest.approx(variance, rel=0.03)


def test_a_dead_dimension_changes_nothing():
    sets = [draws(200, 9), draws(150, 10, shift=0.2)]
    dead = [torch.cat([part[:, :-1], torch.ones(len(part), 1)], 1) for part in sets]
    alive = [part[:, :-1] for part in sets]
    assert sampling_variance(*dead) == pytest.approx(sampling_variance(*alive), rel=1e-4)


def test_the_seed_alone_decides_the_subsets():
    real, fake = draws(200, 11), draws(100, 12)
    first = frechet_infinity(real, fake, seed=1)
    assert frechet_infinity(real, fake, seed=1) == first
    other = frechet_infinity(real, fake, seed=2)
    assert other["value"] != first["value"]
    assert abs(other["value"] - first["value"]) < 3 * first["standard_error"]


def test_its_error_holds_the_choice_of_subsets(monkeypatch):
    monkeypatch.setattr(module, "_sampling_variance", lambda *_: 0.0)
    real, fake = draws(200, 17), draws(100, 18, shift=0.3)
    results = [frechet_infinity(real, fake, seed=seed) for seed in range(50)]
    values = torch.tensor([result["value"] for result in results])
    errors = torch.tensor([result["standard_error"] for result in results])
    assert errors.square().mean().sqrt().item() == pytest.approx(values.std().item(), rel=0.4)


def test_refuses_too_few_images(bad_input):
    assert frechet_infinity_possible(2 * DIM, 2 * DIM, DIM)
    assert not frechet_infinity_possible(10_000, 2 * DIM - 1, DIM)
    assert not frechet_infinity_possible(2 * DIM - 1, 10_000, DIM)
    frechet_infinity(draws(2 * DIM, 13), draws(2 * DIM, 14))
    with bad_input("needs 32 images", "31 generated"):
        frechet_infinity(draws(200, 13), draws(31, 14))
    with bad_input("[200, 16] and [200, 3]"):
        frechet_infinity(draws(200, 13), draws(200, 14, dim=3))
    with bad_input("NaN or infinite"):
        frechet_infinity(draws(200, 13), draws(200, 14, scale=float("nan")))


def test_figure_runs_through_points_and_intercept():
    result = frechet_infinity(draws(200, 15), draws(100, 16, shift=0.5))
    axis = frechet_infinity_fit(result).axes[0]
    line, points = axis.lines[0].get_xydata(), axis.lines[1].get_xydata()
    assert line[0].tolist() == [0, result["value"]]
    assert points[-1].tolist() == [1 / 100, result["distances"][-1]]
    on_line = line[0, 1] + points[:, 0] * (line[1, 1] - line[0, 1]) / line[1, 0]
    spread = points[:, 1].max() - points[:, 1].min()
    assert abs(on_line - points[:, 1]).max() < 0.1 * spread
    assert f"{result['value']:.4g}" in axis.get_legend_handles_labels()[1][1]
