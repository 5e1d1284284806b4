"""How often a classifier that was trained on real images names the class that was asked for."""

import copy
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from evaluation.features import Extractor, extract, load_extractor
from utils import (
    BLOOD_CLASSES,
    ImageSet,
    InputError,
    cache_folder,
    progress,
    to_model_range,
    write_to_cache,
)

# Of the classifier that is trained on the spot. Raise the version with any change to it.
VERSION, SEED = 1, 0
WIDTHS, LARGEST_SIDE = (16, 32, 64, 96, 128), 64
# 20 epochs of fewer than 5,000 images, 14 of 7,000, one of a large data set.
MOST_EPOCHS, MOST_IMAGES, BATCH, PEAK_RATE = 20, 100_000, 32, 2e-3


@dataclass(frozen=True)
class Classifier(Extractor):
    """An extractor whose module also has `logits`: features [N, dim] to [N, len(classes)]."""

    classes: tuple[str, ...]


def load_domain_classifier(device: torch.device | str = "cpu") -> Classifier:
    """The domain extractor as a classifier of the eight kinds of blood cells.

    It was trained on real PBC cells of the train split alone (`make_domain_extractor`); it says
    nothing about drawn cells.
    """
    return Classifier(**vars(load_extractor("domain", device)), classes=BLOOD_CLASSES)


class SmallNetwork(nn.Module):
    """Images, uint8 [N, C, H, W], to pooled features [N, 128], and these to logits.

    Five 3×3 convolutions, four of them with stride 2; larger images are reduced to 64 pixels.
    """

    def __init__(self, n_classes: int):
        super().__init__()
        layers = []
        for inputs, outputs in zip((3, *WIDTHS), WIDTHS):
            stride = 2 if layers else 1
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.logits = nn.Linear(WIDTHS[-1], n_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = to_model_range(images).expand(-1, 3, -1, -1)  # a grey channel stands for all three
        if max(x.shape[2:]) > LARGEST_SIDE:
            size = [LARGEST_SIDE, LARGEST_SIDE]
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return self.layers(x).mean(dim=(2, 3))


def train_classifier(
    train: ImageSet, val: ImageSet, device: torch.device | str = "cpu"
) -> Classifier:
    """A small classifier of any labelled data set, trained on its real train split.

    The weights of the epoch with the least cross entropy on the validation split are kept, in the
    cache folder, too, under the data's sha256. Images are not turned: a turned digit is another.
    """
    device = torch.device(device)
    content = repr((VERSION, train.sha256(), val.sha256()))
    path = (
        cache_folder() / "classifiers" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.pt"
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        network = SmallNetwork(len(train.classes)).to(device, memory_format=torch.channels_last)
        if not _take_up(network, path):
            _fit(network, train, val, device)
            # Runs side by side may all come here, and no two GPU trainings are equal: the first
            # one's network serves them all.
            state = copy.deepcopy(network.state_dict())
            if not _take_up(network, path):
                write_to_cache(path, lambda partial: torch.save(state, partial))
                network.load_state_dict(state)
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.cpu().contiguous().numpy())
    name, dim = f"small-network-{WIDTHS[-1]}", WIDTHS[-1]
    return Classifier(
        name, f"FD ({name})", digest.hexdigest(), dim, network.eval(), device, train.classes
    )


def _take_up(network: SmallNetwork, path: Path) -> bool:
    """Load the kept network; False where there is none, or a damaged one."""
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # a damaged file raises nearly anything
        return False
    return True


def _fit(network: SmallNetwork, train: ImageSet, val: ImageSet, device: torch.device) -> None:
    """Train the network in place; it ends with the weights of its best epoch."""
    epochs = max(1, min(MOST_EPOCHS, MOST_IMAGES // len(train)))
    images, labels = train.images.to(device), train.labels.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    least, best = math.inf, None
    for _ in progress(range(epochs), desc=f"classifier of {train.name}, epochs"):
        network.train()
        for rows in torch.randperm(len(images)).to(device).split(BATCH):
            logits = network.logits(network(images[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.inference_mode():
            parts = [network.logits(network(p.to(device))).cpu() for p in val.images.split(256)]
        loss = F.cross_entropy(torch.cat(parts), val.labels.cpu()).item()
        if best is None or loss < least:
            least, best = loss, copy.deepcopy(network.state_dict())
    network.load_state_dict(best)


def classifier_agreement(
    images: torch.Tensor, labels: torch.Tensor, real: ImageSet, classifier: Classifier
) -> dict:
    """Agreement of the classifier with the labels of generated images and of real ones.

    images: generated, uint8 [N, C, H, W]; labels: int64 [N], the classes that were asked for, in
    the order of `real.classes`; real: test images, whose agreement is the ceiling. Give both at one
    size and with the same label frequencies, or the totals can't be compared.
    Returns `agreement` of the generated images, that of the real ones under "real", and the
    classifier's name and sha256. Raises InputError for other images, labels or classes.

    GAN-test of Shmelkov et al. 2018, sec. 3.
    """
    if real.classes != classifier.classes:
        raise InputError(
            f"the classifier knows {', '.join(classifier.classes)}, but {real.name} has the "
            f"classes {', '.join(real.classes)}; give images of the classes that it knows"
        )
    predicted = _predict(images, classifier, "agreement", cache=False)
    predicted_real = _predict(real.images, classifier, "agreement, real images")
    return {
        "classifier": classifier.name,
        "classifier_sha256": classifier.sha256,
        **agreement(predicted, labels, real.classes),
        "real": agreement(predicted_real, real.labels, real.classes),
    }


def agreement(
    predicted: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...] = BLOOD_CLASSES
) -> dict:
    """Share of images whose predicted class is their label: over all and for each class.

    predicted, labels: int64 [N], classes in the order of `names`. Returns n, agreement in
    [0, 1], its Wilson interval (95 %), per_class by name (agreement is None without images) and
    confusion (rows: labels, columns: predictions).
    Raises InputError for no images, other lengths and unknown classes.
    """
    predicted, labels = predicted.cpu(), torch.as_tensor(labels).cpu()
    classes = len(names)
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
    for name, row, hits in zip(names, confusion, confusion.diagonal().tolist()):
        total = row.sum().item()
        per_class[name] = {"n": total, "agreement": hits / total if total else None}
    return {
        "n": n,
        "agreement": right / n,
        "interval": wilson_interval(right, n),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def wilson_interval(right: float, n: float) -> list[float]:
    """95 % score interval of a share, [low, high] in [0, 1], for `right` hits out of n > 0.

    Wilson 1927.
    """
    z = 1.959964
    share = right / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _predict(
    images: torch.Tensor, classifier: Classifier, desc: str, cache: bool = True
) -> torch.Tensor:
    features = extract(images, classifier, desc, cache)
    with torch.inference_mode():
        return classifier.module.logits(features.to(classifier.device)).argmax(1).cpu()
