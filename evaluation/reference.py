"""The real side of a comparison: what a set of generated images is measured against."""

import functools
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.features import Extractor, extract
from evaluation.frechet import Statistics, frechet_distance, gaussian_statistics
from utils import ImageSet, InputError, write_atomically

SHIPPED = Path(__file__).with_name("references")
NOISE_IMAGES = 256
# What a reference file must hold.
ARRAYS = ("features", "labels", "mean", "covariance", "mean_image_features", "noise_features")
FIELDS = (
    "dataset",
    "dataset_sha256",
    "image_size",
    "split",
    "classes",
    "extractor",
    "extractor_sha256",
    "distance_name",
    "floors",
)


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of one split's real images, and two sets of images that are as bad as can be.

    labels: int64 [N]; features: float32 [N, D]; mean [D] and covariance [D, D]: float64, of the
    features; mean_image_features [D]: of the images' mean; noise_features: of uniform noise.
    floors: what held-out real images get, by their number (`protocol.floors`); may be empty.
    """

    dataset: str
    dataset_sha256: str
    image_size: int
    split: str
    classes: tuple[str, ...]
    extractor: str
    extractor_sha256: str
    distance_name: str
    labels: torch.Tensor
    features: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    mean_image_features: torch.Tensor
    noise_features: torch.Tensor
    floors: tuple[dict, ...] = ()

    @property
    def statistics(self) -> Statistics:
        return self.mean, self.covariance

    @functools.cached_property
    def ceilings(self) -> dict[str, float]:
        """Fréchet distances of two generators that have learned nothing.

        mean_image: endless copies of the images' mean, so a generator that knows the average
        colours alone; uniform_noise: every channel value drawn from 0 … 255.
        """
        # Copies have no covariance, and one copy has the features of all.
        copies = self.mean_image_features.double(), torch.zeros_like(self.covariance)
        noise = gaussian_statistics(self.noise_features)
        return {
            "mean_image": frechet_distance(copies, self.statistics),
            "uniform_noise": frechet_distance(noise, self.statistics),
        }


def make_reference(data: ImageSet, extractor: Extractor, dataset_sha256: str = "") -> Reference:
    """The reference of a data set's images.

    data: uint8 [N, 3, S, S]; dataset_sha256: of the split that names the data set (the train
    split), `data`'s own by default.
    """
    features = extract(data.images, extractor, f"features of real cells ({data.split})")
    mean, covariance = gaussian_statistics(features)
    noise = torch.randint(
        256,
        (NOISE_IMAGES, *data.images.shape[1:]),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )
    return Reference(
        dataset=data.name,
        dataset_sha256=dataset_sha256 or data.sha256(),
        image_size=data.images.shape[-1],
        split=data.split,
        classes=data.classes,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        distance_name=extractor.distance_name,
        labels=data.labels.cpu(),
        features=features,
        mean=mean,
        covariance=covariance,
        mean_image_features=extract(_mean_image(data.images)[None], extractor, "mean image")[0],
        noise_features=extract(noise, extractor, "uniform noise"),
    )


def _mean_image(images: torch.Tensor) -> torch.Tensor:
    return _mean(images).round().to(torch.uint8)


def channel_means(images: torch.Tensor) -> torch.Tensor:
    """Mean of each channel of uint8 [N, C, H, W], 0 … 255: float64 [C]."""
    return _mean(images).mean((1, 2))


def _mean(images: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    for part in images.split(1024):  # sum() copies to int64, eight times as large
        total += part.sum(0)
    return total / len(images)


def save_reference(reference: Reference, path: str | Path) -> None:
    """Write a reference as an .npz, its features in float16, its statistics in float32."""
    half, single = np.float16, np.float32
    arrays = {
        "features": reference.features.numpy().astype(half),
        "labels": reference.labels.numpy().astype(np.uint8),
        "mean": reference.mean.numpy().astype(single),
        "covariance": reference.covariance.numpy().astype(single),
        "mean_image_features": reference.mean_image_features.numpy(),
        "noise_features": reference.noise_features.numpy().astype(half),
    }
    fields = json.dumps({name: getattr(reference, name) for name in FIELDS})

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            np.savez_compressed(file, fields=np.array(fields), **arrays)

    write_atomically(path, write)


def load_reference(path: str | Path) -> Reference:
    """Read what `save_reference` wrote. Raises InputError for a missing or foreign file."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.npz")))
        raise InputError(f"reference {path} does not exist; give a file, or one of {known}")
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = json.loads(str(file["fields"]))
            arrays = {name: torch.from_numpy(file[name]) for name in ARRAYS}
        fields = {name: fields[name] for name in FIELDS}
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} is no whole reference file; get it anew") from None
    doubles = {name: arrays.pop(name).double() for name in ("mean", "covariance")}
    labels = arrays.pop("labels").long()
    fields |= {"classes": tuple(fields["classes"]), "floors": tuple(fields["floors"])}
    features = {name: part.float() for name, part in arrays.items()}
    return Reference(**fields, **doubles, **features, labels=labels)
