"""Copies: known answers, exactness of the pixel search, planted copies, and real cells."""

import json
import math

import numpy as np
import pytest
import torch

from evaluation import copies, figures
from evaluation.copies import (
    authpct,
    compare_neighbours,
    ct,
    find_copies,
    inverse_turn,
    nearest_over_turns,
    nearest_real,
    turned,
)
from evaluation.features import Extractor
from evaluation.neighbours import k_nearest
from utils import load_dataset

TRAIN, HELD_OUT, SAMPLES = 300, 300, 400


class Pooled(torch.nn.Module):
    """uint8 [N, 3, 14, 14] → float32 [N, 147]: mean colours of 2×2 pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float(), 2).flatten(1)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Extractor("pooled", "FD (pooled)", "0" * 64, 147, Pooled(), torch.device("cpu"))


@pytest.fixture(scope="module")
def pool() -> torch.Tensor:
    """Demo cells for all roles at half their size, uint8 [1000, 3, 14, 14]."""
    cells = load_dataset("demo").images[:1000]
    return torch.nn.functional.avg_pool2d(cells.float(), 2).round().to(torch.uint8)


def roles(cells: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Samples, training cells and held-out cells: real ones all, their roles drawn at random."""
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))
    return [cells[rows] for rows in order.split([SAMPLES, TRAIN, HELD_OUT])]


def planted(samples, train, share: float, turn: bool, noise: float) -> torch.Tensor:
    """The samples, the first ones replaced by copies of different training cells."""
    generator = torch.Generator().manual_seed(1)
    n = round(share * len(samples))
    fakes = train[torch.arange(n) % len(train)].float()
    if turn:
        fakes = torch.cat([turned(fakes[i, None], 1 + i % 7) for i in range(n)])
    fakes += noise * torch.randn(fakes.shape, generator=generator)
    return torch.cat([fakes.round().clamp(0, 255).to(torch.uint8), samples[n:]])


def noise_images(n: int, seed: int, size: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def draws(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# Turns and the pixel search
# ---------------------------------------------------------------------------------------------


def test_the_eight_turns_differ_and_are_taken_back():
    images = noise_images(2, 0)
    results = [turned(images, turn) for turn in range(8)]
    assert torch.equal(results[0], images)
    assert len({result.numpy().tobytes() for result in results}) == 8
    for turn, result in enumerate(results):
        assert torch.equal(turned(result, inverse_turn(turn)), images)


def brute_force(images: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Distances over the best turn by the definition, float64 [N, M]."""
    pairs = [turned(images, turn)[:, None].double() - real[None] for turn in range(8)]
    return torch.stack([pair.square().mean((2, 3, 4)).sqrt() for pair in pairs]).amin(0)


@pytest.mark.parametrize("kind", ["cells", "noise"])
@pytest.mark.parametrize(("axes", "candidates"), [(384, 64), (20, 8)])
def test_pixel_search_agrees_with_brute_force(monkeypatch, pool, kind, axes, candidates):
    """Few axes and noise make the search fall back on measuring everything."""
    monkeypatch.setattr(copies, "AXES", axes)
    monkeypatch.setattr(copies, "CANDIDATES", candidates)
    if kind == "noise":
        images, real = noise_images(20, 0), noise_images(300, 1)
    else:
        images, real = pool[:20], pool[20:320]
    distances, indices, turns = nearest_over_turns(images, real, 5)
    everything = brute_force(images, real)
    expected = everything.topk(5, largest=False).values
    assert torch.allclose(distances.double(), expected, rtol=1e-5)
    assert torch.allclose(everything.gather(1, indices), expected)
    assert all(len(set(row)) == 5 for row in indices.tolist())
    for image, row, turn, distance in zip(images, indices[:, 0], turns[:, 0], distances[:, 0]):
        gap = turned(image[None], int(turn))[0].double() - real[row].double()
        assert gap.square().mean().sqrt().item() == pytest.approx(distance.item(), rel=1e-5)


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_copy_has_distance_zero_and_its_turn(pool, turn):
    distances, indices, turns = nearest_over_turns(turned(pool[7:8], turn), pool[:100], 2)
    assert distances[0, 0] == 0 and indices[0, 0] == 7 and distances[0, 1] > 0
    assert turns[0, 0] == inverse_turn(turn)


def test_one_grey_value_more_is_a_distance_of_one(pool):
    real = pool[:50].clamp(0, 254)
    distances, _, _ = nearest_over_turns(real[3:4] + 1, real, 1)
    assert distances.item() == pytest.approx(1, rel=1e-6)


def test_large_images_are_compared_at_32_pixels():
    small = noise_images(12, 0, 32)
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    for ours, theirs in zip(
        nearest_over_turns(large[:4], large, 3), nearest_over_turns(small[:4], small, 3)
    ):
        assert torch.equal(ours, theirs)


def test_a_turned_copy_is_found_and_turned_to_match():
    real = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    real = real.to(torch.uint8)
    copies = torch.stack([real[7].rot90(1, (1, 2)), real[3].flip(2)])
    distances, nearest = nearest_real(copies, real, 2)
    assert torch.equal(nearest[:, 0], copies)
    assert distances[:, 0].tolist() == [0, 0] and (distances[:, 1] > 20).all()


# ---------------------------------------------------------------------------------------------
# Tests of the nearest cells
# ---------------------------------------------------------------------------------------------


def found(first_train, first_held_out, train_cells, held_out_cells, fifth=10.0):
    """What the searches return for images with these nearest distances and cells."""
    both = []
    for first, cells in ((first_train, train_cells), (first_held_out, held_out_cells)):
        distances = torch.full((len(first), 5), fifth)
        distances[:, 0] = torch.tensor(first)
        indices = torch.zeros(len(first), 5, dtype=torch.int64)
        indices[:, 0] = torch.tensor(cells)
        both.append((distances, indices))
    return both


def test_share_and_p_values_by_hand():
    # Six images: four nearer to training cells (two of them to the same), one to a held-out cell,
    # one as near to both. Twice as many training cells as held-out ones: 4 / 20 against 1 / 10.
    train, held_out = [1.0, 1.0, 8.0, 8.0, 9.0, 3.0], [9.0, 9.0, 9.0, 9.0, 8.0, 3.0]
    result = compare_neighbours(
        *found(train, held_out, [0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 5, 6]), 20, 10
    )
    assert result["train_share"] == pytest.approx((4 / 20) / (4 / 20 + 1 / 10))
    # Clusters of 2, 1, 1, 1 images, each on the train side with probability 2/3; at least 4 of 5.
    assert result["p_value"] == pytest.approx((2 / 3) ** 4 + 3 * (2 / 3) ** 3 / 3)
    assert result["close"] == {"train": 2, "held_out": 0, "p_value": pytest.approx(2 / 3)}
    assert result["copied_share"] == pytest.approx(2 / 6)
    low, high = result["train_share_interval"]
    assert 0 < low < result["train_share"] < high < 1


def test_nothing_near_and_only_ties_say_nothing():
    result = compare_neighbours(*found([3.0, 3.0], [3.0, 3.0], [0, 1], [0, 1]), 9, 9)
    assert result["train_share"] == 0.5 and result["p_value"] == 1
    assert result["copied_share"] == 0 and result["close"]["p_value"] == 1


def test_all_copies_of_one_cell_count_as_one_draw():
    n = 300
    near, far = [1.0] * n, [9.0] * n
    alike = compare_neighbours(*found(near, far, [4] * n, [0] * n), n, n)
    different = compare_neighbours(*found(near, far, list(range(n)), [0] * n), n, n)
    assert alike["p_value"] == pytest.approx(0.5)
    assert different["p_value"] == pytest.approx(0.5**n)
    assert different["train_share"] == alike["train_share"] == 1
    # The score interval of one of one, and of 300 of 300.
    for result, effective in ((alike, 1), (different, n)):
        low = effective / (effective + 1.959964**2)
        assert result["train_share_interval"] == pytest.approx([low, 1])


@pytest.mark.parametrize("d", [2, 100])
def test_a_generator_that_memorises_nothing_is_left_in_peace(d):
    """The p-values' and the interval's coverage, in many dimensions with hubs."""
    n_train, n_held_out, repeats = 150, 100, 150
    inside, p_values, largest = 0, [], []
    for seed in range(repeats):
        cells = draws(n_train + n_held_out, d, 3 * seed)
        fakes = 0.6 * draws(120, d, 3 * seed + 1)  # nearer to the middle than cells: more hubs
        sides = [k_nearest(fakes, part, 5) for part in (cells[:n_train], cells[n_train:])]
        result = compare_neighbours(*sides, n_train, n_held_out)
        low, high = result["train_share_interval"]
        inside += low <= 0.5 <= high
        p_values += [result["p_value"], result["close"]["p_value"]]
        largest.append(sides[0][1][:, 0].bincount().max().item())
    if d == 100:
        assert np.median(largest) >= 8
    assert inside / repeats > 0.95 - 3 * math.sqrt(0.95 * 0.05 / repeats)
    p_values = np.array(p_values)
    assert (p_values <= 0.1).mean() < 0.1 + 3 * math.sqrt(0.1 * 0.9 / repeats)
    assert p_values.min() > 0.00025


def test_copied_share_is_the_planted_one():
    cells = draws(900, 10, 0)
    for planted_share in (0.05, 0.2):
        shares, covered = [], 0
        for seed in range(40):
            order = torch.randperm(900, generator=torch.Generator().manual_seed(seed))
            train, held_out, fakes = (cells[rows] for rows in order.split([400, 200, 300]))
            n = round(planted_share * 300)
            fakes = torch.cat([train[:n] + 0.01 * draws(n, 10, seed), fakes[n:]])
            sides = [k_nearest(fakes, part, 5) for part in (train, held_out)]
            result = compare_neighbours(*sides, 400, 200)
            low, high = result["copied_share_interval"]
            shares.append(result["copied_share"])
            covered += low <= planted_share <= high
        assert np.mean(shares) == pytest.approx(planted_share, abs=0.015)
        assert covered >= 34


# ---------------------------------------------------------------------------------------------
# AuthPct and C_T
# ---------------------------------------------------------------------------------------------


def test_authpct_of_copies_is_0_and_of_images_far_away_100():
    train = draws(200, 8, 0)
    assert authpct(train[:50], train) == 0
    assert authpct(train[:50] + 100, train) == 100
    assert 20 < authpct(draws(500, 8, 1), train) < 80


def test_authpct_takes_images_in_the_middle_of_the_data_for_copies():
    train = draws(200, 8, 0)
    assert authpct(0.3 * draws(500, 8, 1), train) < authpct(draws(500, 8, 1), train) - 10


def test_authpct_by_hand():
    train = torch.tensor([[0.0], [1.0], [5.0]])
    assert authpct(torch.tensor([[-0.5], [-2.0], [5.1], [9.5]]), train) == 50


def test_ct_by_hand():
    """Distances 1 and 3 against 2 and 4: three of four pairs are lower, one is higher."""
    z = copies._mann_whitney_z(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]))
    assert z == pytest.approx((1 - 2) / math.sqrt(4 * 5 / 12))
    assert copies._mann_whitney_z(torch.ones(7), torch.ones(5)) == 0


def test_mann_whitney_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = draws(80, 1, 0).flatten().mul(3).round(), draws(60, 1, 1).flatten().mul(3).round()
    u = stats.mannwhitneyu(a.numpy(), b.numpy()).statistic
    expected = (u - 80 * 60 / 2) / math.sqrt(80 * 60 * 141 / 12)
    assert copies._mann_whitney_z(a, b) == pytest.approx(expected, rel=1e-6)


def test_ct_is_below_zero_for_copies_near_it_for_held_out_cells_and_above_far_away():
    train, held_out, more = draws(600, 6, 0), draws(500, 6, 1), draws(500, 6, 2)
    assert ct(train[:500] + 0.01 * more, train, held_out) < -5
    assert abs(ct(more, train, held_out)) < 1.5
    assert ct(2 * more, train, held_out) > 5


def test_ct_does_not_depend_on_the_order_of_cells_or_images():
    train, held_out, images = draws(900, 6, 0), draws(500, 6, 1), 1.2 * draws(700, 6, 2)
    first = ct(images, train, held_out)
    for seed in range(3):
        shuffled = (
            rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
            for rows in (images, train, held_out)
        )
        assert ct(*shuffled) == pytest.approx(first, abs=1e-9)


def test_the_partition_of_ct_finds_clusters_of_any_size():
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 14.0], [9.0, 15.0]])
    cells = [middle + draws(n, 2, n) for middle, n in zip(middles, (400, 60, 150, 30))]
    centres = copies._k_means(torch.cat(cells), 4)
    assert torch.cdist(middles.double(), centres).min(1).values.max() < 0.5


def test_the_partition_of_ct_has_fewer_regions_where_there_are_fewer_points():
    two = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(30, 1)
    assert len(copies._k_means(two, 5)) == 2


def test_ct_of_too_few_images_is_none():
    train, held_out = draws(100, 4, 0), draws(15, 4, 1)
    assert ct(draws(300, 4, 2), train, held_out) is None


# ---------------------------------------------------------------------------------------------
# Everything together
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_real_cells_in_the_samples_place_pass(extractor, pool, seed):
    result, _ = find_copies(*roles(pool, seed), extractor)
    assert result["verdict"] == "no sign of copies"
    assert all(abs(result[space]["train_share"] - 0.5) < 0.12 for space in ("features", "pixels"))
    assert result["pixels"]["identical"] == 0
    assert abs(result["authpct"] - result["authpct_held_out"]) < 12


@pytest.mark.parametrize(
    ("share", "turn", "noise"),
    [
        (0.05, False, 0),
        (0.05, True, 0),
        (0.05, True, 3),
        (0.2, True, 4),
        (1, False, 0),
        (1, True, 2),
    ],
)
def test_planted_copies_are_found(extractor, pool, share, turn, noise):
    samples, train, held_out = roles(pool)
    fakes = planted(samples, train, share, turn, noise)
    result, suspects = find_copies(fakes, train, held_out, extractor)
    assert result["verdict"] == "copies"
    low, high = result["pixels"]["copied_share_interval"]
    assert low <= share <= high
    n = round(share * SAMPLES)
    assert result["pixels"]["identical"] == (0 if noise else n)
    assert all(row < n for row in suspects.rows)
    if share == 1:
        assert result["pixels"]["train_share"] == 1
        if not turn:  # the features mind turns
            assert result["features"]["train_share"] == 1
            assert result["authpct"] == 0 and result["ct"] < -5
    elif not turn:
        assert result["features"]["close"]["train"] >= n


def test_copies_of_a_single_cell_are_found(extractor, pool):
    """They are one draw to the tests, but many identical images are no chance."""
    _, train, held_out = roles(pool)
    result, _ = find_copies(train[:1].expand(100, -1, -1, -1), train, held_out, extractor)
    assert result["pixels"]["identical"] == 100 and result["verdict"] == "copies"


def test_cells_that_the_data_holds_twice_are_no_copies(extractor, pool):
    samples, train, held_out = (part[:200].clone() for part in roles(pool))
    samples[:30] = held_out[:30] = train[:30]
    result, _ = find_copies(samples, train, held_out, extractor)
    assert result["pixels"]["identical"] == 30 and result["verdict"] == "no sign of copies"
    assert copies._identical(copies.turned(held_out, 3), train) == 30


def test_result_is_plain_and_does_not_depend_on_the_samples_order(extractor, pool):
    samples, train, held_out = (part[:200] for part in roles(pool))
    result, _ = find_copies(samples, train, held_out, extractor)
    assert json.loads(json.dumps(result)) == result
    again, _ = find_copies(samples.flip(0), train, held_out, extractor)
    assert again == result


def test_suspects_show_the_pairs(extractor, pool, tmp_path):
    samples, train, held_out = (part[:150] for part in roles(pool))
    fakes = planted(samples, train, 0.1, True, 0)
    _, suspects = find_copies(fakes, train, held_out, extractor)
    assert len(suspects.rows) == copies.SUSPECTS
    assert suspects.train_distances == [0] * copies.SUSPECTS
    assert torch.equal(suspects.images, fakes[suspects.rows])
    assert torch.equal(suspects.train, suspects.images)  # turned to match
    assert suspects.rows == suspects.train_rows
    for image, row in zip(suspects.images, suspects.train_rows):
        assert any(torch.equal(turned(image[None], turn)[0], train[row]) for turn in range(8))
    gaps = (suspects.images.double() - suspects.held_out).square().mean((1, 2, 3)).sqrt()
    assert gaps.tolist() == pytest.approx(suspects.held_out_distances, rel=1e-5)
    figure = figures.suspicious_pairs(suspects)
    words = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert len(words) == copies.SUSPECTS and all(word.endswith("= 0.00") for word in words)
    figures.save(figure, tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").stat().st_size > 1000


def test_refuses_bad_images(extractor, pool, bad_input):
    good, few = pool[:40], pool[:4]
    with bad_input("4 training images are too few", "5 or more"):
        find_copies(good, few, good, extractor)
    with bad_input("0 held-out images are too few"):
        find_copies(good, good, good[:0], extractor)
    with bad_input("0 generated images are too few"):
        find_copies(good[:0], good, good, extractor)
    with bad_input("uint8", "the generated ones are float32 [40, 3, 14, 14]"):
        find_copies(good.float(), good, good, extractor)
    with bad_input("differ in size", "[40, 3, 7, 7]"):
        find_copies(good, good[..., :7, :7], good, extractor)
    with bad_input("square", "[40, 3, 14, 7]"):
        find_copies(good, good, good[..., :7], extractor)
    with bad_input("AuthPct needs two training cells"):
        authpct(draws(3, 2, 0), draws(1, 2, 1))


def test_real_cells_in_pixels(real_data_root):
    """Held-out halves pass; one in twenty replaced by turned, noisy training cells is caught."""
    train = load_dataset("bloodmnist", real_data_root, 28, "train").images[:1000]
    held_out = load_dataset("bloodmnist", real_data_root, 28, "held_out").images
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
    samples, control = held_out[order[:600]], held_out[order[600:1600]]

    def compare(images):
        sides = nearest_over_turns(images, train, 5), nearest_over_turns(images, control, 5)
        return compare_neighbours(*(side[:2] for side in sides), len(train), len(control))

    result = compare(samples)
    assert min(result["p_value"], result["close"]["p_value"]) > 0.00025
    result = compare(planted(samples, train, 0.05, True, 3))
    assert result["close"]["p_value"] < 1e-6
    low, high = result["copied_share_interval"]
    assert low < 0.05 < high
