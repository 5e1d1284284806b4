"""Whether a classifier got better, judged over few trainings whose data overlap."""

from collections.abc import Sequence

import numpy as np

from utils import InputError

# Spread below this share of the largest difference is rounding, not spread.
ROUNDING = 1e-12
# A difference whose adjusted p is below this is called beyond chance.
LEVEL = 0.05


def paired(
    differences: Sequence[float], n_train: int, n_test: int, confidence: float = 0.95
) -> dict:
    """Corrected resampled t-test of paired differences, two-sided.

    differences: one for each split into training and test cells, of two arms on the same split,
    in any unit. Trainings of one split that differ in their seed alone are no further splits:
    average them first. n_train, n_test: real cells in a split's two parts. Splits share cells, so
    that their differences are correlated; the variance of the mean is sd² (1 / J + n_test /
    n_train) for J splits instead of sd² / J.
    Returns n (J), mean, sd, interval (low, high, at `confidence`), t (J - 1 degrees of freedom)
    and p, plain types. One difference has no sd, and equal differences no spread to test with:
    what can't be said is None, but differences that are all zero have t = 0, p = 1.
    Raises InputError for no differences, values that are not finite and counts below one.

    Nadeau and Bengio 2003, section 4.
    """
    from scipy.stats import t as student

    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise InputError("a paired test needs one or more finite differences in a row")
    if min(n_train, n_test) < 1:
        raise InputError(f"a split needs cells in both parts, got {n_train} and {n_test}")
    if not 0 < confidence < 1:
        raise InputError(f"the confidence must lie between 0 and 1, got {confidence}")
    n, mean = len(values), float(values.mean())
    result = {"n": n, "mean": mean, "sd": None, "interval": None, "t": None, "p": None}
    if n == 1:
        return result
    sd = float(values.std(ddof=1))
    if sd <= ROUNDING * np.abs(values).max():
        result["sd"] = 0.0
        return result if values.any() else result | {"interval": [0.0, 0.0], "t": 0.0, "p": 1.0}
    error = sd * (1 / n + n_test / n_train) ** 0.5
    reach = float(student.ppf((1 + confidence) / 2, n - 1)) * error
    return {
        "n": n,
        "mean": mean,
        "sd": sd,
        "interval": [mean - reach, mean + reach],
        "t": mean / error,
        "p": float(2 * student.sf(abs(mean / error), n - 1)),
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for the number of comparisons, in the order given.

    An adjusted value below 0.05 holds with at most 5 % chance of any false finding among all
    comparisons, however these depend on each other. A None, of a comparison that could not be
    tested, stays None and does not count. Raises InputError for values outside [0, 1].

    Holm 1979.
    """
    tested = [row for row, p in enumerate(p_values) if p is not None]
    if not all(0 <= p_values[row] <= 1 for row in tested):
        raise InputError(f"p-values lie in [0, 1], got {list(p_values)}")
    adjusted, largest = list(p_values), 0.0
    for rank, row in enumerate(sorted(tested, key=lambda row: p_values[row])):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[row]))
        adjusted[row] = largest
    return adjusted
