"""The whole judgement of one generator under the default protocol: what a record holds."""

import hashlib
import json

import torch

from evaluation import protocol
from evaluation.agreement import classifier_agreement
from evaluation.copies import Suspects, find_copies
from evaluation.features import Extractor, load_extractor
from evaluation.reference import Reference, make_reference
from utils import ImageSet, cache_folder, write_atomically

VALIDATION_FREQUENCIES = "validation frequencies"
# The data sets whose cells our own classifier knows.
DOMAIN = ("BloodMNIST", "BloodMNIST (rebuilt)", "PBC")


def judge(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    sets: dict[str, ImageSet],
    extractor: Extractor,
) -> tuple[dict, Suspects]:
    """Everything that is measured of one generator's images, and its most suspicious ones.

    images: uint8 [N, 3, S, S], one for each held-out cell, with their labels in their order;
    labels: the held-out cells' labels for a generator that was asked for them, else None.
    sets: the splits train, val, test, and held_out (validation, then test).
    Returns the metrics of `protocol.evaluate` against the train split with, besides, `floor` (of
    held-out cells), `copies` (`find_copies`), `mean_colour_error` (of 255), and for blood cells
    `domain` (distances on the features of our own classifier against the test split, since it
    knows the train split) and, with labels, `agreement` (`classifier_agreement`).
    """
    train, held_out = sets["train"], sets["held_out"]
    reference = make_reference(train, extractor)
    metrics = protocol.evaluate(reference, images, extractor, labels)
    metrics["floor"] = floor(reference, sets, extractor)
    metrics["copies"], suspects = find_copies(images, train.images, held_out.images, extractor)
    colours = [part.double().mean((0, 2, 3)) for part in (images, train.images)]
    metrics["mean_colour_error"] = (colours[0] - colours[1]).abs().mean().item()
    if train.name in DOMAIN:
        metrics |= _domain(images, labels, sets, extractor.device)
    return metrics, suspects


def floor(reference: Reference, sets: dict[str, ImageSet], extractor: Extractor) -> dict:
    """What held-out real cells get in the place of generated ones: pure sampling error.

    The copies' control takes one half of them, at random, as generated and the other half as held
    out. The result is the same for every run, so it is kept in the cache folder.
    """
    train, held_out = sets["train"], sets["held_out"]
    parts = (protocol.METRICS_VERSION, train.sha256(), held_out.sha256(), extractor.sha256)
    name = hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]
    path = cache_folder() / "floors" / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        result = protocol.evaluate(reference, held_out.images, extractor, held_out.labels)
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        half, other = (held_out.images[rows] for rows in order.chunk(2))
        result["copies"], _ = find_copies(half, train.images, other, extractor)
        if train.name in DOMAIN:
            result |= _domain(held_out.images, held_out.labels, sets, extractor.device)
        text = json.dumps(result)
        write_atomically(path, lambda partial: partial.write_text(text))
        return result


def _domain(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    sets: dict[str, ImageSet],
    device: torch.device,
) -> dict:
    """What our own classifier makes of the images; its reference is the test split.

    The images that were drawn for the validation cells' labels are compared with the test cells,
    as the validation cells themselves are for the floor. Those drawn for the test cells' labels
    are classified, as are the test cells.
    """
    extractor, val, test = load_extractor("domain", device), sets["val"], sets["test"]
    reference = make_reference(test, extractor, sets["train"].sha256())
    first, rest = images[: len(val)], images[len(val) :]
    asked = None if labels is None else labels[: len(val)]
    result = {
        "domain": protocol.evaluate(reference, first, extractor, asked, VALIDATION_FREQUENCIES)
    }
    if labels is not None:
        result["agreement"] = classifier_agreement(rest, labels[len(val) :], test, extractor)
    return result
