"""Nearest neighbours against the definition, pair by pair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation import neighbours
from evaluation.neighbours import distances, k_nearest
from evaluation.prdc import precision_recall_density_coverage


def draws(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def brute_force(queries: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Distances from differences, float64 [N, M]."""
    return (queries.double()[:, None] - base.double()).square().sum(2).sqrt()


@pytest.mark.parametrize("chunk", [3, 7, 256])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_agrees_with_brute_force_for_every_chunk_size(monkeypatch, chunk, offset):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    queries, base = draws(20, 5, 0) + offset, draws(30, 5, 1) + offset
    found, indices = k_nearest(queries, base, 4)
    expected, where = brute_force(queries, base).sort(1)
    assert found.dtype == torch.float32 and found.shape == indices.shape == (20, 4)
    torch.testing.assert_close(found.double(), expected[:, :4], rtol=1e-6, atol=0)
    assert torch.equal(indices, where[:, :4])


# Few values, so that many rows are equal or equally far.
@given(
    st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=1, max_size=12),
    st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=3, max_size=12),
)
def test_ties_and_copies(queries, base):
    queries, base = torch.tensor(queries).float(), torch.tensor(base).float()
    found, indices = k_nearest(queries, base, 3)
    exact = brute_force(queries, base).float()
    assert torch.equal(torch.cat(list(distances(queries, base))), exact)
    assert torch.equal(found, exact.sort(1).values[:, :3])
    assert torch.equal(exact.gather(1, indices), found)
    assert all(len(set(row.tolist())) == 3 for row in indices)


def test_copies_have_distance_zero_and_near_copies_do_not():
    base = draws(40, 1024, 2).abs() + 100
    found, indices = k_nearest(base[5:9], base, 1)
    assert torch.equal(indices[:, 0], torch.arange(5, 9)) and (found == 0).all()
    near = base[5:6].clone()
    near[0, 0] += 0.01
    found, indices = k_nearest(near, base, 1)
    assert indices.item() == 5 and found.item() == pytest.approx(0.01, rel=1e-3)


def test_leaves_its_input_as_it_was():
    queries, base = draws(4, 3, 3).double(), draws(6, 3, 4).double()
    before = queries.clone(), base.clone()
    k_nearest(queries, base, 2)
    assert torch.equal(queries, before[0]) and torch.equal(base, before[1])


def test_shows_a_bar_for_long_work_alone(monkeypatch):
    bars = []
    monkeypatch.setattr(neighbours, "progress", lambda parts, **words: bars.append(words) or parts)
    expected = k_nearest(draws(9, 3, 5), draws(8, 3, 6), 2)
    assert not bars
    monkeypatch.setattr(neighbours, "LONG", 9 * 8 * 3 - 1)
    assert torch.equal(k_nearest(draws(9, 3, 5), draws(8, 3, 6), 2)[1], expected[1])
    assert len(bars) == 1


def test_refuses_bad_features(bad_input):
    good = draws(5, 4, 7)
    with bad_input("6 nearest", "among 5"):
        k_nearest(good, good, 6)
    with bad_input("0 nearest"):
        k_nearest(good, good, 0)
    with bad_input("[5, 4] and [5, 3]"):
        k_nearest(good, good[:, :3], 1)
    with bad_input("[0, 4]"):
        k_nearest(good[:0], good, 1)
    with bad_input("NaN or infinite"):
        k_nearest(good, good / 0, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here")
def test_a_gpu_gives_the_same_neighbours_and_shares():
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(n, 16, generator=generator) for n in (400, 300))
    here, there = k_nearest(fake, real, 5), k_nearest(fake.cuda(), real.cuda(), 5)
    assert torch.allclose(here[0], there[0].cpu(), rtol=1e-5)
    assert torch.equal(here[1], there[1].cpu())
    expected = precision_recall_density_coverage(real, fake)
    assert precision_recall_density_coverage(real.cuda(), fake.cuda()) == pytest.approx(expected)
