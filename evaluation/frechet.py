"""Fréchet distance between two sets of features."""

import torch

from utils import InputError

Statistics = tuple[torch.Tensor, torch.Tensor]
IMAGES_PER_DIMENSION = 1.5  # below it a covariance is mostly sampling error


def enough_images(n: int, dim: int) -> bool:
    """Whether a Fréchet distance of n images, in so many dimensions, is more than their error."""
    return n > IMAGES_PER_DIMENSION * dim


def gaussian_statistics(features: torch.Tensor) -> Statistics:
    """Mean [D] and unbiased covariance [D, D], float64, of features [N, D].

    Raises InputError for fewer than two rows and for NaN or infinite values.
    """
    features = torch.as_tensor(features).double()
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"a covariance needs features [N ≥ 2, D], got {list(features.shape)}")
    mean = features.mean(0)
    centred = features - mean
    statistics = mean, centred.T @ centred / (len(features) - 1)
    _check_finite(statistics)
    return statistics


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance between two Gaussians, given as (mean [D], covariance [D, D]).

    Heusel et al. 2017, eq. 6; Dowson & Landau 1982. Raises InputError for NaN or infinite values
    and for statistics of different dimensions.
    """
    _check_finite(a)
    _check_finite(b)
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    if mean_a.shape != mean_b.shape:
        raise InputError(
            f"features of {len(mean_a)} and {len(mean_b)} dimensions cannot be compared; "
            "extract both sets with one extractor"
        )
    # Tr (AB)^½ = Tr (A^½ B A^½)^½, and the right side is symmetric: its eigenvalues are real.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace
    return distance.item()


def _check_finite(statistics: Statistics) -> None:
    if not all(part.isfinite().all() for part in statistics):
        raise InputError(
            "the features or their covariance hold NaN or infinite values; "
            "look at the images and the extractor"
        )
