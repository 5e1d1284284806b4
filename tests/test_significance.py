"""The corrected resampled t-test and Holm's adjustment against closed forms and scipy."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evaluation.significance import holm, paired

FEW = [0.03, -0.01, 0.04, 0.02, 0.07]


# ---------------------------------------------------------------------------------------------
# The corrected resampled t-test
# ---------------------------------------------------------------------------------------------


def test_two_differences_by_hand():
    # Mean 2, sd √2, variance of the mean 2 · (1/2 + 1/4) = 1.5. With one degree of freedom
    # Student's t is Cauchy's: p = 1 - 2 atan(t) / π, and its 97.5 % quantile is tan(0.475 π).
    found = paired([1.0, 3.0], n_train=80, n_test=20)
    t = 2 / math.sqrt(1.5)
    reach = math.tan(0.475 * math.pi) * math.sqrt(1.5)
    assert found["n"] == 2 and found["mean"] == 2
    assert found["sd"] == pytest.approx(math.sqrt(2))
    assert found["t"] == pytest.approx(t)
    assert found["p"] == pytest.approx(1 - 2 * math.atan(t) / math.pi)
    assert found["interval"] == pytest.approx([2 - reach, 2 + reach])
    assert list(found) == ["n", "mean", "sd", "interval", "t", "p"]


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_with_a_vanishing_test_part_it_is_the_ordinary_paired_test(confidence):
    after = np.array(FEW) + 0.8
    found = paired(FEW, n_train=10**12, n_test=1, confidence=confidence)
    ordinary = stats.ttest_rel(after, np.full(5, 0.8))
    assert found["t"] == pytest.approx(ordinary.statistic, rel=1e-9)
    assert found["p"] == pytest.approx(ordinary.pvalue, rel=1e-9)
    assert found["interval"] == pytest.approx(ordinary.confidence_interval(confidence), rel=1e-9)


def test_the_correction_divides_t_by_its_factor():
    """Five folds: √(1/5 + 1/4) in the place of √(1/5), which is 1.5 times as large."""
    ordinary = stats.ttest_1samp(FEW, 0)
    found = paired(FEW, n_train=400, n_test=100)
    assert found["t"] == pytest.approx(ordinary.statistic / 1.5)
    assert found["p"] > 2 * ordinary.pvalue
    low, high = ordinary.confidence_interval()
    assert found["interval"][1] - found["interval"][0] == pytest.approx(1.5 * (high - low))


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=12),
    st.floats(0.01, 100),
    st.sampled_from([0.5, 0.9, 0.99]),
)
def test_properties(differences, scale, confidence):
    found = paired(differences, 80, 20, confidence)
    mirrored = paired([-scale * d for d in differences], 80, 20, confidence)
    assert mirrored["mean"] == pytest.approx(-scale * found["mean"], abs=1e-12)
    if found["p"] is None:
        assert mirrored["p"] is None and found["sd"] == 0
        return
    assert mirrored["p"] == pytest.approx(found["p"])
    low, high = found["interval"]
    # The interval leaves zero out where, and only where, the test rejects.
    if abs(found["p"] - (1 - confidence)) > 1e-9:
        assert (low > 0 or high < 0) == (found["p"] < 1 - confidence)


def test_it_keeps_its_level_where_the_ordinary_test_does_not():
    """Fifteen random splits of 60 cells on which two arms are equally good.

    A cell's difference is a draw from N(0, 1) and a split's the mean over its test cells, so that
    two splits are correlated by the share of cells that their test parts have in common.
    """
    rng, times, splits = np.random.default_rng(0), 300, 15
    rejected, ordinary = 0, 0
    for _ in range(times):
        cells = rng.normal(size=60)
        means = [rng.permutation(cells)[:20].mean() for _ in range(splits)]
        rejected += paired(means, n_train=40, n_test=20)["p"] < 0.05
        ordinary += stats.ttest_1samp(means, 0).pvalue < 0.05
    # Three binomial standard errors.
    assert rejected / times == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / times))
    assert ordinary / times > 0.3


def test_one_difference_can_not_be_tested():
    found = paired([0.2], 80, 20)
    assert found == {"n": 1, "mean": 0.2, "sd": None, "interval": None, "t": None, "p": None}


def test_no_difference_at_all():
    found = paired([0.0] * 4, 80, 20)
    assert found == {"n": 4, "mean": 0, "sd": 0, "interval": [0, 0], "t": 0, "p": 1}


def test_equal_differences_have_no_spread_to_test_with():
    # In binary the three are not quite equal; their spread is rounding.
    found = paired([0.9 - 0.8, 0.5 - 0.4, 0.3 - 0.2], 80, 20)
    assert found["sd"] == 0 and found["mean"] == pytest.approx(0.1)
    assert found["interval"] is None and found["t"] is None and found["p"] is None


def test_results_are_plain_json():
    for values in (np.float32(FEW), [0.1], [0.0, 0.0]):
        json.dumps(paired(values, 80, 20), allow_nan=False)


@pytest.mark.parametrize(
    "differences, changes, words",
    [
        ([], {}, "one or more"),
        ([0.1, float("nan")], {}, "finite"),
        ([[0.1, 0.2]], {}, "in a row"),
        (FEW, {"n_train": 0}, "got 0 and 20"),
        (FEW, {"n_test": 0}, "got 80 and 0"),
        (FEW, {"confidence": 95}, "between 0 and 1"),
    ],
)
def test_bad_input(differences, changes, words, bad_input):
    with bad_input(words):
        paired(differences, **{"n_train": 80, "n_test": 20, **changes})


# ---------------------------------------------------------------------------------------------
# Holm
# ---------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # Sorted: 0.005 · 4 = 0.02; 0.01 · 3 = 0.03; 0.03 · 2 = 0.06; 0.04 · 1 is raised to 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_stops_at_one_and_takes_ties():
    assert holm([0.7, 0.6, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.3]) == [0.3] and holm([]) == []


def test_a_comparison_that_was_not_tested_does_not_count():
    assert holm([0.02, None, 0.04]) == [pytest.approx(0.04), None, pytest.approx(0.04)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_raw_values_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, len(p_values) * p) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_keeps_the_chance_of_any_false_finding():
    rng, times = np.random.default_rng(0), 1000
    wrong = sum(min(holm(rng.uniform(size=5).tolist())) < 0.05 for _ in range(times))
    assert wrong / times == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / times))


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_holm_bad_input(wrong, bad_input):
    with bad_input("[0, 1]"):
        holm([0.2, wrong])
