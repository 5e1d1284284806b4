"""The whole judgement of one generator under the default protocol: what a record holds."""

import hashlib
import json

import torch

from evaluation import protocol
from evaluation.agreement import (
    Classifier,
    classifier_agreement,
    load_domain_classifier,
    train_classifier,
)
from evaluation.copies import Suspects, find_copies
from evaluation.features import DOMAIN_FILE, Extractor
from evaluation.reference import Reference, channel_means, make_reference
from utils import ImageSet, cache_folder, write_to_cache

VALIDATION_FREQUENCIES = "validation frequencies"


def judge(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    sets: dict[str, ImageSet],
    extractor: Extractor,
) -> tuple[dict, Suspects]:
    """Everything that is measured of one generator's images, and its most suspicious ones.

    images: uint8 [N, C, S, S], one for each held-out cell, with their labels in their order;
    labels: the held-out cells' labels for a generator that was asked for them, else None.
    sets: the splits train, val, test, and held_out (validation, then test).
    Returns the metrics of `protocol.evaluate` against the train split with, besides, `floor` (of
    held-out cells), `copies` (`find_copies`), `mean_colour_error` (of 255), for blood cells
    `domain` (distances on the features of our own classifier against the test split, since it
    knows the train split), and with labels `agreement` (`classifier_agreement`), with our own
    classifier for blood cells and with one that is trained on the train split for other data. Blood
    cells are those of a train split that our own classifier was trained on: it may know test cells
    of another split.
    """
    train, held_out = sets["train"], sets["held_out"]
    reference, classifier, floor_metrics = measure_real_images(sets, extractor)
    metrics = protocol.evaluate(reference, images, extractor, labels)
    metrics["floor"] = floor_metrics
    metrics["copies"], suspects = find_copies(images, train.images, held_out.images, extractor)
    colours = channel_means(images) - channel_means(train.images)
    metrics["mean_colour_error"] = colours.abs().mean().item()
    metrics |= _by_classifier(images, labels, sets, classifier)
    return metrics, suspects


def measure_real_images(
    sets: dict[str, ImageSet], extractor: Extractor
) -> tuple[Reference, Classifier, dict]:
    """What generated images meet: the train split's reference, a classifier and the floor.

    Slow the first time, quick once the cache folder has their features and the floor.
    """
    reference = make_reference(sets["train"], extractor)
    classifier = classifier_of(sets, extractor.device)
    return reference, classifier, floor(reference, sets, extractor, classifier)


def classifier_of(sets: dict[str, ImageSet], device: torch.device) -> Classifier:
    """Our own where it was trained on this train split, else one that is trained on it now."""
    if _is_known(sets["train"]):
        return load_domain_classifier(device)
    return train_classifier(sets["train"], sets["val"], device)


def _is_known(train: ImageSet) -> bool:
    record = json.loads(DOMAIN_FILE.with_suffix(".json").read_text(encoding="utf-8"))
    return train.sha256() in [part["sha256"] for part in record["train"]]


def floor(
    reference: Reference,
    sets: dict[str, ImageSet],
    extractor: Extractor,
    classifier: Classifier,
) -> dict:
    """What held-out real cells get in the place of generated ones: pure sampling error.

    The copies' control takes one half of them, at random, as generated and the other half as held
    out. The result is the same for every run, so it is kept in the cache folder; it holds the names
    of data, classes and extractor, too.
    """
    train, held_out = sets["train"], sets["held_out"]
    data = [sets[split].sha256() for split in ("train", "val", "test")]
    networks = extractor.sha256, classifier.sha256
    names = (train.name, *train.classes, extractor.name, extractor.distance_name)
    parts = (protocol.METRICS_VERSION, *data, *networks, *names)
    name = hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]
    path = cache_folder() / "floors" / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = protocol.evaluate(reference, held_out.images, extractor, held_out.labels)
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        half, other = (held_out.images[rows] for rows in order.chunk(2))
        result["copies"], _ = find_copies(half, train.images, other, extractor)
        result |= _by_classifier(held_out.images, held_out.labels, sets, classifier)
        text = json.dumps(result)
        write_to_cache(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        return result


def _by_classifier(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    sets: dict[str, ImageSet],
    classifier: Classifier,
) -> dict:
    """What the classifier makes of the images; it knows the train split, so they meet the test one.

    The images that were drawn for the test cells' labels are classified, as are the test cells. For
    blood cells those that were drawn for the validation cells' labels are compared with the test
    cells, as the validation cells themselves are for the floor.
    """
    train, val, test = (sets[split] for split in ("train", "val", "test"))
    result = {}
    if _is_known(train):
        reference = make_reference(test, classifier, train.sha256())
        asked = None if labels is None else labels[: len(val)]
        first = images[: len(val)]
        result["domain"] = protocol.evaluate(
            reference, first, classifier, asked, VALIDATION_FREQUENCIES
        )
    if labels is not None:
        rest = images[len(val) :], labels[len(val) :]
        result["agreement"] = classifier_agreement(*rest, test, classifier)
    return result
