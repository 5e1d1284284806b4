"""Precision, recall, density and coverage: quality and variety of generated images apart."""

import torch

from evaluation.neighbours import distances, k_nearest
from utils import InputError


def precision_recall_density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = 5) -> dict:
    """How many generated images look real, and how much of the real variety they reach.

    real: [M, D], fake: [N, D], any float type, on one device. Each image has a ball that reaches to
    its k-th nearest neighbour within its own set, not counting itself; the ball's surface belongs
    to it. Returns plain numbers: precision, the share of fakes inside some real ball; recall, the
    share of reals inside some fake ball; density, the mean number of real balls around a fake,
    divided by k, which may exceed 1; coverage, the share of real balls that hold a fake. Raises
    InputError for fewer than k + 1 images of a kind, other dimensions, NaN or infinite values.

    Not torch-fidelity's, with whose precision and recall it agrees: it has no density and coverage,
    and a machine with torch alone doesn't have it.

    Kynkäänniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, eq. 3 and 4.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise InputError(
            f"k = {k} neighbours need at least {k + 1} images of each kind and a k of at least 1, "
            f"got {len(real)} real and {len(fake)} generated ones"
        )
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    precise = balls = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = covered.clone()
    start = 0
    for part in distances(fake, real):
        in_real_ball = part <= real_radii
        precise += in_real_ball.any(1).sum().item()
        balls += in_real_ball.sum().item()
        covered |= in_real_ball.any(0)
        recalled |= (part <= fake_radii[start : start + len(part), None]).any(0)
        start += len(part)
    return {
        "precision": precise / len(fake),
        "recall": recalled.double().mean().item(),
        "density": balls / (k * len(fake)),
        "coverage": covered.double().mean().item(),
    }


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Distance of each row to its k-th nearest other row."""
    # Nothing is nearer to a row than itself, so of k + 1 distances the last leaves it out.
    return k_nearest(features, features, k + 1)[0][:, -1]
