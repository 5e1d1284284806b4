"""Fréchet distance extrapolated to infinitely many images (FD∞)."""

import math

import numpy as np
import torch

from evaluation.frechet import (
    IMAGES_PER_DIMENSION,
    Statistics,
    frechet_distance,
    gaussian_statistics,
)
from utils import InputError, progress

LARGEST_START = 0.75  # a line through fractions from above this to 1 says nothing about infinity
FRACTIONS = 8
ORDERINGS = 4
LONG = 512  # dimensions from which on a bar is shown


def frechet_infinity_possible(n_real: int, n_fake: int, dim: int) -> bool:
    """Whether there are enough images for a fit: twice the dimension of each kind."""
    return IMAGES_PER_DIMENSION * dim <= LARGEST_START * min(n_real, n_fake)


def frechet_infinity(real: torch.Tensor, fake: torch.Tensor, seed: int = 0) -> dict:
    """Fréchet distance that infinitely many images of both kinds would have, as far as a line says.

    real: [M, D], fake: [N, D], any float type. Random subsets, both of the same fraction f of
    their set, shrink together to 1.5 D images of the smaller set; the intercept of the
    least-squares line of the distance over 1 / f is the value. The fit is repeated over four
    random orderings of the images and averaged. Returns plain types: value; standard_error;
    n_real, n_fake and distances (means over the orderings), one entry for each of eight fractions.

    The standard error covers the draw of the images of both kinds, to first order (infinitesimal
    jackknife, Jaeckel 1972), and the choice of subsets; where the two distributions agree it is
    too large. It does not cover that the bias is no exact line in 1 / n: at few images in many
    equally strong dimensions the value comes out too low by some percent of that bias. It takes the
    two sets for independent: images of a generator that fits the sampling error of the real set
    itself get too low a value, by up to twice that error's share of the distance. Raises
    InputError where `frechet_infinity_possible` is false, for other dimensions, and for NaN or
    infinite values.

    Chong and Forsyth 2020, sec. 3 and 4.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise InputError(
            "FD∞ needs features [M, D] and [N, D] of one extractor, "
            f"got {list(real.shape)} and {list(fake.shape)}"
        )
    dim, sets = real.shape[1], [real.double(), fake.double()]
    if not frechet_infinity_possible(len(real), len(fake), dim):
        raise InputError(
            f"FD∞ in {dim} dimensions needs {2 * dim} images of each kind, "
            f"got {len(real)} real and {len(fake)} generated ones; give more images"
        )
    whole = [gaussian_statistics(part) for part in sets]
    distance = frechet_distance(*whole)

    smallest = IMAGES_PER_DIMENSION * dim / min(len(real), len(fake))
    fractions = np.linspace(smallest, 1, FRACTIONS)
    sizes = [[math.ceil(round(f * len(part), 6)) for f in fractions] for part in sets]
    generator = torch.Generator().manual_seed(seed)
    distances = np.full((ORDERINGS, FRACTIONS), distance)
    for row in progress(distances, desc="FD∞") if dim >= LONG else distances:
        orders = [torch.randperm(len(part), generator=generator) for part in sets]
        nested = [
            _nested_statistics(part[order], n[:-1]) for part, order, n in zip(sets, orders, sizes)
        ]
        row[:-1] = [frechet_distance(a, b) for a, b in zip(*nested)]

    # Both sides have the same fraction, so 1 / f stands for either 1 / n.
    _, intercepts = np.polyfit(1 / fractions, distances.T, 1)
    variance = _sampling_variance(sets, whole) + intercepts.var(ddof=1) / ORDERINGS
    return {
        "value": float(intercepts.mean()),
        "standard_error": math.sqrt(variance),
        "n_real": sizes[0],
        "n_fake": sizes[1],
        "distances": distances.mean(0).tolist(),
    }


def _nested_statistics(features: torch.Tensor, sizes: list[int]) -> list[Statistics]:
    """Mean and unbiased covariance of the first n rows, for each ascending n."""
    # Each row enters once. Without the mean the sums of squares would cancel in the covariance.
    centre = features.mean(0)
    total, squares, start, result = 0, 0, 0, []
    for n in sizes:
        part = features[start:n] - centre
        total, squares, start = total + part.sum(0), squares + part.T @ part, n
        result.append((centre + total / n, (squares - torch.outer(total, total) / n) / (n - 1)))
    return result


def _sampling_variance(sets: list[torch.Tensor], statistics: list[Statistics]) -> float:
    """Variance of the Fréchet distance over draws of both sets, to first order.

    An image x of the first set moves the distance by 2 (m₁ - m₂)·y + yᵀ(I - T)y plus a constant,
    where y = x - m₁ and T is the optimal linear map from the first Gaussian to the second (Dowson
    and Landau 1982); the same holds for the second set. The intercept's weights sum to one, so
    that this part of its error is that of the distance itself.
    """
    (mean_a, cov_a), (mean_b, cov_b) = statistics
    root, inverse_root = _root_and_inverse(cov_a)
    middle, inverse_middle = _root_and_inverse(root @ cov_b @ root)
    maps = inverse_root @ middle @ inverse_root, root @ inverse_middle @ root
    variance = 0.0
    for features, (mean, _), shift, there in zip(
        sets, statistics, (mean_a - mean_b, mean_b - mean_a), maps
    ):
        centred = features - mean
        influence = 2 * centred @ shift + (centred * (centred - centred @ there)).sum(1)
        variance += influence.var().item() / len(features)
    return variance


def _root_and_inverse(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a positive semidefinite matrix, and that root's pseudoinverse."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=0).sqrt()
    inverses = torch.where(roots > 1e-7 * roots.max(), 1 / roots, 0)
    return vectors * roots @ vectors.T, vectors * inverses @ vectors.T
