"""Training and scores of a classifier: what an augmentation study compares.

A classifier is a module from images in [-1, 1], [N, C, S, S], to logits [N, classes]. Arms of a
study are compared at the same number of updates and the same batch size, whatever their number of
images, so that more images do not mean a longer training.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.agreement import agreement
from utils import InputError, progress, random_flips_and_turns, to_model_range

HISTORY_ROWS = 20  # in a training
ANGLE = 10  # degrees
BACKGROUND = 127  # what is erased becomes the middle of the range


def no_augmentation(images: Tensor) -> Tensor:
    return images


def traditional_augmentation(images: Tensor) -> Tensor:
    """The usual one: a turn of up to 10 degrees and a horizontal flip; uint8 [N, C, S, S].

    The corners that a turn uncovers repeat the image's edge.
    """
    from torchvision.transforms import v2

    size = images.shape[-1]
    # A square of side S turned by a reaches S (cos a + sin a).
    turn = math.radians(ANGLE)
    margin = math.ceil(size * (math.cos(turn) + math.sin(turn) - 1) / 2)
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.Pad(margin, padding_mode="edge"),
            v2.RandomRotation(ANGLE, v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(size),
        ]
    )
    return torch.stack([transform(image) for image in images])


def strong_augmentation(images: Tensor) -> Tensor:
    """Ours: all flips and turns, crops, changes of light and stain, erasing; uint8 [N, C, S, S].

    Crops hold 60 to 100 % of the area, stretched by up to a third; light, contrast and saturation
    change by up to 20 %, for stain and lamp differ between slides; a rectangle is erased from every
    second image (Zhong et al. 2020). One image after the other, as torchvision draws its changes
    for a whole batch at once; a GPU waits for that.
    """
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(images.shape[-1], scale=(0.6, 1.0)),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            v2.RandomErasing(p=0.5, value=BACKGROUND),
        ]
    )
    return torch.stack([transform(image) for image in random_flips_and_turns(images)])


AUGMENTATIONS = {
    "none": no_augmentation,
    "traditional": traditional_augmentation,
    "strong": strong_augmentation,
}


def fit(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    updates: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    augmentation: str = "none",
    class_weights: bool = False,
    oversample: bool = False,
    mixup: float = 0.0,
    seed: int = 0,
) -> list[dict]:
    """Train a classifier in place, on its device, by AdamW with cosine decay from `lr`.

    images: uint8 [N, C, S, S]; labels: int64 [N]. updates: optimizer steps, each on `batch_size`
    images; passes over the images follow each other without a gap. augmentation: one of
    AUGMENTATIONS, drawn anew for every image that is seen. class_weights: errors weigh by the
    inverse of their class's number of images. oversample: images are drawn with replacement, each
    class equally often. mixup: the alpha of Zhang et al. 2018, section 2; 0 mixes nothing. seed:
    of the order of the images, the augmentation and the dropout; on a CPU it decides the result bit
    for bit. Returns some twenty rows of `update`, `loss` and `accuracy`, means since the row before
    over the images as they were trained on.
    Raises InputError for images and labels that do not belong together, labels that the classifier
    does not know, unknown settings, and a loss that stops being finite.
    """
    _check(images, labels, updates, batch_size, augmentation, mixup)
    device = next(classifier.parameters()).device
    n_classes = predict(classifier, images[:1]).shape[1]
    if labels.min() < 0 or labels.max() >= n_classes:
        raise InputError(
            f"the classifier knows the labels 0 to {n_classes - 1}, got "
            f"{labels.min()} to {labels.max()}"
        )
    per_image = inverse_frequencies(labels.cpu(), n_classes)
    order = _order(labels.cpu(), per_image if oversample else None, updates * batch_size, seed)
    weight = per_image.to(device) if class_weights else None
    order, images, labels = order.to(device), images.to(device), labels.to(device)
    augment, mix = AUGMENTATIONS[augmentation], _mixing(mixup, n_classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)

    every = max(1, updates // HISTORY_ROWS)
    history, steps = [], 0
    losses, hits = torch.zeros(2, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = progress(order.split(batch_size), desc="classifier, updates")
        for update, rows in enumerate(batches, 1):
            classifier.train()
            inputs, targets = mix(to_model_range(augment(images[rows])), labels[rows])
            logits = classifier(inputs)
            loss = F.cross_entropy(logits, targets, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.detach()
            main_class = targets.argmax(1) if mixup else targets
            hits += (logits.argmax(1) == main_class).float().mean()
            steps += 1
            if update % every and update < updates:
                continue
            row = {"update": update, "loss": losses.item() / steps, "accuracy": hits.item() / steps}
            if not math.isfinite(row["loss"]):
                raise InputError(f"the loss is {row['loss']} after {update} updates; lower lr")
            losses.zero_()
            hits.zero_()
            steps = 0
            history.append(row)
    return history


def _check(
    images: Tensor, labels: Tensor, updates: int, batch_size: int, augmentation: str, mixup: float
) -> None:
    if len(images) != len(labels) or len(labels) == 0:
        raise InputError(
            "a classifier needs one label for each of one or more images, got "
            f"{len(labels)} labels for {len(images)} images"
        )
    if updates < 1 or batch_size < 1:
        raise InputError(
            f"updates and batch_size must be at least 1, got {updates} and {batch_size}"
        )
    if augmentation not in AUGMENTATIONS:
        raise InputError(
            f"unknown augmentation {augmentation!r}; known are {', '.join(AUGMENTATIONS)}"
        )
    if mixup < 0:
        raise InputError(f"mixup is the alpha of a Beta distribution, at least 0, got {mixup}")


def inverse_frequencies(labels: Tensor, n_classes: int) -> Tensor:
    """One over each class's number of images, scaled to mean one over the images; [n_classes].

    A class without images gets 0: there is nothing to weigh.
    """
    counts = labels.bincount(minlength=n_classes).float()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0)


def _order(labels: Tensor, per_image: Tensor | None, n: int, seed: int) -> Tensor:
    """The rows of the first n images to train on, by the seed alone; int64 [n].

    Shuffled passes over all images, or draws with replacement by each class's weight.
    """
    generator = torch.Generator().manual_seed(seed)
    if per_image is not None:
        return torch.multinomial(per_image[labels], n, replacement=True, generator=generator)
    passes = -(-n // len(labels))
    rows = [torch.randperm(len(labels), generator=generator) for _ in range(passes)]
    return torch.cat(rows)[:n]


def _mixing(alpha: float, n_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Maps images and labels of a batch to mixed images and class probabilities [N, n_classes]."""
    if alpha == 0:
        return lambda images, labels: (images, labels)
    from torchvision.transforms import v2

    return v2.MixUp(alpha=alpha, num_classes=n_classes)


def predict(classifier: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """Class probabilities of uint8 images [N, C, S, S]: float32 [N, classes] on the CPU.

    Leaves the classifier in evaluation mode.
    """
    device = next(classifier.parameters()).device
    classifier.eval()
    with torch.inference_mode():
        parts = [
            classifier(to_model_range(part.to(device))).float().softmax(1).cpu()
            for part in images.split(batch)
        ]
    return torch.cat(parts)


def scores(probabilities: Tensor, labels: Tensor, classes: Sequence[str]) -> dict:
    """How well class probabilities name the classes of real images; plain types.

    probabilities: [N, len(classes)], rows that sum to one; labels: int64 [N]. Returns n; accuracy;
    balanced_accuracy (mean recall) and macro_f1, both over the classes that have images; auc, the
    mean over the classes of one against the rest, None where a class has no images; per_class by
    name, n and recall (None without images); confusion (rows: labels, columns: predictions). All
    shares lie in [0, 1]. Raises InputError for probabilities that are none, other lengths and
    unknown labels.
    """
    from sklearn import metrics

    if probabilities.ndim != 2 or probabilities.shape[1] != len(classes):
        raise InputError(
            f"scores need probabilities [N, {len(classes)}], one column for each of "
            f"{', '.join(classes)}, got {list(probabilities.shape)}"
        )
    sums = probabilities.double().sum(1)
    if (probabilities < 0).any() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        raise InputError("class probabilities must be at least 0 and sum to 1 for each image")
    predicted = probabilities.argmax(1)
    counted = agreement(predicted, labels, classes)
    truth, likely, predicted = (part.cpu().numpy() for part in (labels, probabilities, predicted))
    present = np.unique(truth)
    auc = None
    if len(present) == len(classes) > 1:
        auc = float(metrics.roc_auc_score(np.eye(len(classes))[truth], likely, average="macro"))
    options = {"labels": present, "average": "macro", "zero_division": 0.0}
    return {
        "n": counted["n"],
        "accuracy": counted["agreement"],
        "balanced_accuracy": float(metrics.recall_score(truth, predicted, **options)),
        "macro_f1": float(metrics.f1_score(truth, predicted, **options)),
        "auc": auc,
        "per_class": {
            name: {"n": part["n"], "recall": part["agreement"]}
            for name, part in counted["per_class"].items()
        },
        "confusion": counted["confusion"],
    }
