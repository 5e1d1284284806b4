"""The rules under which a metric is taken, and the metrics taken under them."""

import hashlib
import json
from dataclasses import asdict, dataclass

import torch

from evaluation.features import Extractor, extract
from evaluation.frechet import enough_images, frechet_distance, gaussian_statistics
from evaluation.frechet_infinity import frechet_infinity, frechet_infinity_possible
from evaluation.kid import kernel_distance
from evaluation.prdc import precision_recall_density_coverage
from evaluation.reference import Reference
from evaluation.uncertainty import subsampling_interval
from utils import ImageSet, InputError

HELD_OUT_FREQUENCIES = "held-out (validation + test) frequencies"
# Raise it when `evaluate` gives more, or other, than before: kept runs are then measured anew.
METRICS_VERSION = 3
K = 5
FLOOR_SIZES = (100, 300, 1000, 2000)
FLOOR_DRAWS = 3


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
    k: int = K
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
        if enough_images(n, self.feature_dim):
            return ""
        return (
            f"Fréchet distance at n = {n} in {self.feature_dim} dimensions "
            "is dominated by sampling error"
        )


def evaluate(
    reference: Reference,
    images: torch.Tensor,
    extractor: Extractor,
    labels: torch.Tensor | None = None,
    label_distribution: str = HELD_OUT_FREQUENCIES,
) -> dict:
    """All distances between real and generated images, with their protocol.

    images: uint8 [N, 3, H, W] of the reference's size; labels: int64 [N], the classes that were
    asked for, None for a generator that can't be asked.
    Returns plain types: the metrics of `measure`, `ceilings` (`Reference.ceilings`), `per_class`
    (with labels: the metrics of each class), distance_name, protocol, warnings. A metric that
    would mean nothing at this number of images is None, and a warning says why. Raises InputError
    for anything but uint8 images of the reference's size and extractor.
    """
    if images.shape[2:] != (reference.image_size, reference.image_size):
        raise InputError(
            f"generated images of {' × '.join(map(str, images.shape[2:]))} pixels can't be "
            f"compared with real ones of {reference.image_size}; draw them at that size, or load "
            "the real ones at theirs (--image-size)"
        )
    if extractor.sha256 != reference.extractor_sha256:
        raise InputError(
            f"the reference was made with extractor {reference.extractor} (sha256 "
            f"{reference.extractor_sha256[:8]}), not {extractor.name} ({extractor.sha256[:8]}); "
            "give that one, or another reference"
        )
    device = extractor.device
    fakes = extract(images, extractor, "features of generated images").to(device)
    real = reference.features.to(device)
    protocol = Protocol(
        dataset=reference.dataset,
        dataset_sha256=reference.dataset_sha256,
        image_size=reference.image_size,
        reference_split=reference.split,
        n_real=len(real),
        n_fake=len(fakes),
        label_distribution=label_distribution,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        feature_dim=extractor.dim,
    )
    metrics, warnings = measure(real, fakes)
    result = metrics | {
        "ceilings": reference.ceilings,
        "distance_name": extractor.distance_name,
        "protocol": protocol.to_dict(),
        "warnings": warnings,
    }
    if labels is not None:
        result["per_class"] = [
            _one_class(real[reference.labels == label], fakes[labels == label], name)
            for label, name in enumerate(reference.classes)
        ]
    return result


def measure(real: torch.Tensor, fake: torch.Tensor) -> tuple[dict, list[str]]:
    """Every metric of two sets of features [M, D] and [N, D], and a sentence for each left out.

    real, fake: on one device, which does the work.

    frechet_distance (Heusel et al. 2017, eq. 6) with frechet_interval (95 %, within this run);
    frechet_infinity (Chong and Forsyth 2020); kid and kid_standard_error (Bińkowski et al. 2018,
    sec. 4); precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al.
    2020), all four with k = 5.
    """
    n, dim = min(len(real), len(fake)), real.shape[1]
    metrics = dict.fromkeys(
        (
            "frechet_distance",
            "frechet_interval",
            "frechet_infinity",
            "kid",
            "kid_standard_error",
            "precision",
            "recall",
            "density",
            "coverage",
        )
    )
    warnings = []
    if enough_images(n, dim):
        metrics["frechet_distance"] = _frechet(real, fake)
        metrics["frechet_interval"] = list(subsampling_interval(_frechet, real, fake))
    else:
        warnings.append(
            f"no Fréchet distance: n = {n} is not above 1.5 times the {dim} dimensions, "
            "so that it would be mostly sampling error"
        )
    if frechet_infinity_possible(len(real), len(fake), dim):
        metrics["frechet_infinity"] = frechet_infinity(real, fake)
    else:
        warnings.append(f"no FD∞: its fit needs {2 * dim} images of each kind, here n = {n}")
    if n >= 3:
        metrics["kid"], metrics["kid_standard_error"] = kernel_distance(real, fake)
    else:
        warnings.append(f"no KID: it needs three images of each kind, here n = {n}")
    if n > K:
        metrics |= precision_recall_density_coverage(real, fake, K)
    else:
        warnings.append(f"no precision, recall, density, coverage: n = {n} is not above k = {K}")
    return metrics, warnings


def _frechet(real: torch.Tensor, fake: torch.Tensor) -> float:
    return frechet_distance(gaussian_statistics(real), gaussian_statistics(fake))


def _one_class(real: torch.Tensor, fakes: torch.Tensor, name: str) -> dict:
    metrics, warnings = measure(real, fakes)
    return {"class": name, "n_real": len(real), "n_fake": len(fakes), **metrics} | {
        "warnings": warnings
    }


def floors(reference: Reference, held_out: ImageSet, extractor: Extractor) -> tuple[dict, ...]:
    """What held-out real cells get at several numbers of images, the mean of three draws each.

    With it a set of any size can be judged by someone who has no real images.
    """
    features = extract(held_out.images, extractor)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in (*(n for n in FLOOR_SIZES if n < len(features)), len(features)):
        draws = [
            _floor_at(reference, features[torch.randperm(len(features), generator=generator)[:n]])
            for _ in range(FLOOR_DRAWS if n < len(features) else 1)
        ]
        rows.append({"n": n, **{name: _mean([d[name] for d in draws]) for name in draws[0]}})
    return tuple(rows)


def _floor_at(reference: Reference, features: torch.Tensor) -> dict:
    real = reference.features
    enough = enough_images(len(features), real.shape[1])
    return {
        "frechet_distance": _frechet(real, features) if enough else None,
        "kid": kernel_distance(real, features)[0],
        **precision_recall_density_coverage(real, features, K),
    }


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)
