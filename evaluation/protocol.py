"""The rules under which a metric is taken, and the metrics taken under them."""

import hashlib
import json
from dataclasses import asdict, dataclass

import torch

from evaluation.features import Extractor, extract
from evaluation.frechet import Statistics, frechet_distance, gaussian_statistics
from evaluation.kid import kernel_distance
from utils import InputError

HELD_OUT_FREQUENCIES = "held-out (validation + test) frequencies"


@dataclass(frozen=True)
class Protocol:
    """All that two numbers must share before they may stand in one column."""

    dataset: str
    dataset_sha256: str
    image_size: int
    reference_split: str
    n_real: int
    n_fake: int
    label_distribution: str
    extractor: str
    extractor_sha256: str
    feature_dim: int
    resize: str = "by the extractor"
    version: int = 1

    def key(self) -> str:
        """A short hash of every field."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict:
        """Plain types for JSON; `Protocol(**d)` reads them."""
        return asdict(self)

    @property
    def frechet_warning(self) -> str:
        """Why a Fréchet distance means little at this number of images; empty where it is sound."""
        n = min(self.n_real, self.n_fake)
        if n > 1.5 * self.feature_dim:
            return ""
        return (
            f"Fréchet distance at n = {n} in {self.feature_dim} dimensions "
            "is dominated by sampling error"
        )


def evaluate(
    real: torch.Tensor,
    fake: torch.Tensor,
    extractor: Extractor,
    *,
    dataset: str,
    dataset_sha256: str,
    reference_split: str = "train",
    label_distribution: str = HELD_OUT_FREQUENCIES,
) -> dict:
    """Fréchet and kernel distance between real and generated images, with their protocol.

    real, fake: uint8 [N, 3, H, W] of one size. Returns plain types: frechet_distance (Heusel et
    al. 2017, eq. 6), kid and kid_standard_error (Bińkowski et al. 2018, sec. 3),
    mean_image_distance (see below), distance_name, protocol, warnings. Raises InputError for
    anything but uint8 images of one size.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise InputError(
            f"real images {list(real.shape)} and generated ones {list(fake.shape)} differ in "
            "size; load the data at the generator's size"
        )
    real_features = extract(real, extractor, "real features")
    fake_features = extract(fake, extractor, "generated features")
    protocol = Protocol(
        dataset=dataset,
        dataset_sha256=dataset_sha256,
        image_size=real.shape[-1],
        reference_split=reference_split,
        n_real=len(real),
        n_fake=len(fake),
        label_distribution=label_distribution,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        feature_dim=extractor.dim,
    )
    kid, error = kernel_distance(real_features, fake_features)
    real_statistics = gaussian_statistics(real_features)
    return {
        "frechet_distance": frechet_distance(real_statistics, gaussian_statistics(fake_features)),
        "kid": kid,
        "kid_standard_error": error,
        "mean_image_distance": _mean_image_distance(real, real_statistics, extractor),
        "distance_name": extractor.distance_name,
        "protocol": protocol.to_dict(),
        "warnings": [protocol.frechet_warning] if protocol.frechet_warning else [],
    }


def floor(real: torch.Tensor, held_out: torch.Tensor, extractor: Extractor, **fields) -> dict:
    """`evaluate` of held-out real cells as if they were generated: pure sampling error.

    real: the train split's images, held_out: as many real ones as are generated; uint8
    [N, 3, H, W]. fields: as for `evaluate`, and the same ones, so that the protocol is the same.
    """
    return evaluate(real, held_out, extractor, **fields)


def _mean_image_distance(images: torch.Tensor, statistics: Statistics, extractor) -> float:
    """Fréchet distance of endless copies of the images' mean, rounded to uint8.

    It is the ceiling: what a generator gets that has learned the average colours alone.
    """
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    for part in images.split(1024):  # sum() copies to int64, eight times as large
        total += part.sum(0)
    mean_image = (total / len(images)).round().to(torch.uint8)
    # Copies have no covariance, and one copy has the features of all.
    copy = extract(mean_image[None], extractor, "mean image")[0].double()
    return frechet_distance((copy, torch.zeros_like(statistics[1])), statistics)
