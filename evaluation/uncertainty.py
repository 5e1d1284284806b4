"""How far a metric of one run would move with another draw of its images."""

from collections.abc import Callable

import torch

from utils import InputError

SUBSAMPLES = 20
STUDENT = 2.093  # 97.5 % quantile of Student's t with SUBSAMPLES - 1 degrees of freedom


def subsampling_interval(
    statistic: Callable[[torch.Tensor, torch.Tensor], float],
    real: torch.Tensor,
    fake: torch.Tensor,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of a metric of one run: another draw of real and of generated images.

    statistic: maps real [M, D] and fake [N, D] to a number. It is taken of 20 random halves of
    both sets, drawn without replacement; at half the rows the spread of these values is that of
    the metric over independent draws of whole sets (the factor √(b / (n - b)) is 1 for b = n / 2).
    Returns (low, high), in the metric's unit, around the metric of all images, since its bias is
    larger at half the images. The interval is about the metric's expectation at this number of
    images: it holds neither the bias nor another training of the model. Where the two
    distributions agree, a Fréchet or kernel distance has no first-order error, and the interval
    is too wide by up to √3. Raises InputError for fewer than four images of a kind.

    Politis and Romano 1994.
    """
    if min(len(real), len(fake)) < 4:
        raise InputError(
            "an interval by halves needs four images of each kind, "
            f"got {len(real)} real and {len(fake)} generated ones"
        )
    generator = torch.Generator().manual_seed(seed)

    def half(features: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(features), generator=generator)
        return features[order[: len(features) // 2]]

    values = [statistic(half(real), half(fake)) for _ in range(SUBSAMPLES)]
    reach = STUDENT * torch.tensor(values, dtype=torch.float64).std().item()
    value = statistic(real, fake)
    return value - reach, value + reach
