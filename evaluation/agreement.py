"""How often a classifier that was trained on real cells names the class that was asked for."""

import math

import torch

from evaluation.features import Extractor, extract, load_extractor
from utils import BLOOD_CLASSES, ImageSet, InputError


def load_domain_classifier(device: torch.device | str = "cpu") -> Extractor:
    """The domain extractor, whose module also maps features [N, D] to logits [N, 8].

    It was trained on real PBC cells of the train split alone (`make_domain_extractor`); it says
    nothing about drawn cells.
    """
    return load_extractor("domain", device)


def classifier_agreement(
    images: torch.Tensor, labels: torch.Tensor, real: ImageSet, classifier: Extractor
) -> dict:
    """Agreement of the classifier with the labels of generated images and of real ones.

    images: generated, uint8 [N, 3, H, W]; labels: int64 [N], the classes that were asked for, in
    the order of BLOOD_CLASSES; real: held-out test cells, whose agreement is the ceiling. Give both
    at one size and with the same label frequencies, or the totals can't be compared.
    Returns `agreement` of the generated images, that of the real ones under "real", and the
    classifier's name and sha256. Raises InputError for other images, labels or classes.

    GAN-test of Shmelkov et al. 2018, sec. 3.
    """
    if real.classes != BLOOD_CLASSES:
        raise InputError(
            f"the classifier knows {', '.join(BLOOD_CLASSES)}, but {real.name} has the classes "
            f"{', '.join(real.classes)}; give blood cells"
        )
    return {
        "classifier": classifier.name,
        "classifier_sha256": classifier.sha256,
        **agreement(_predict(images, classifier, "agreement", cache=False), labels),
        "real": agreement(_predict(real.images, classifier, "agreement, real cells"), real.labels),
    }


def agreement(predicted: torch.Tensor, labels: torch.Tensor) -> dict:
    """Share of images whose predicted class is their label: over all and for each class.

    predicted, labels: int64 [N], classes in the order of BLOOD_CLASSES. Returns n, agreement in
    [0, 1], its Wilson interval (95 %), per_class by name (agreement is None without images) and
    confusion (rows: labels, columns: predictions).
    Raises InputError for no images, other lengths and unknown classes.
    """
    predicted, labels = predicted.cpu(), torch.as_tensor(labels).cpu()
    classes = len(BLOOD_CLASSES)
    if predicted.shape != labels.shape or labels.ndim != 1 or len(labels) == 0:
        raise InputError(
            "agreement needs one label for each of one or more images, got "
            f"{list(labels.shape)} labels for {list(predicted.shape)} predictions"
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels must be whole numbers from 0 to {classes - 1}, got {labels.dtype} from "
            f"{labels.min()} to {labels.max()}"
        )
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.reshape(classes, classes)
    right, n = confusion.trace().item(), len(labels)
    per_class = {}
    for name, row, hits in zip(BLOOD_CLASSES, confusion, confusion.diagonal().tolist()):
        total = row.sum().item()
        per_class[name] = {"n": total, "agreement": hits / total if total else None}
    return {
        "n": n,
        "agreement": right / n,
        "interval": wilson_interval(right, n),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def wilson_interval(right: int, n: int) -> list[float]:
    """95 % score interval of a share, [low, high] in [0, 1], for `right` hits out of n > 0.

    Wilson 1927.
    """
    z = 1.959964
    share = right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _predict(
    images: torch.Tensor, classifier: Extractor, desc: str, cache: bool = True
) -> torch.Tensor:
    features = extract(images, classifier, desc, cache)
    with torch.inference_mode():
        return classifier.module.logits(features.to(classifier.device)).argmax(1).cpu()
