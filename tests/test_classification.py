"""Training at a fixed number of updates, augmentation per image, and the scores."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from custom_models.classifiers import make_classifier
from evaluation.classification import (
    AUGMENTATIONS,
    BACKGROUND,
    fit,
    inverse_frequencies,
    predict,
    scores,
)
from utils import to_model_range


class Recorder(nn.Module):
    """Two logits linear in an image's mean; keeps what it is trained on."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 2), []
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images):
        means = images.mean((1, 2, 3))
        if self.training:
            self.seen.append(means.detach().clone())
        return self.layer(means[:, None])


def flat(*values: int, size: int = 4) -> torch.Tensor:
    """An image of each value, uint8 [N, 3, size, size]."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def as_bytes(means: torch.Tensor) -> list[int]:
    return ((means + 1) * 127.5).round().int().tolist()


def seen_by(n: int, **options) -> list[list[int]]:
    """The numbers of the images in each training batch, of n images with two classes."""
    recorder = Recorder()
    fit(recorder, flat(*range(n)), torch.arange(n) % 2, **options)
    return [as_bytes(batch) for batch in recorder.seen]


@pytest.fixture(scope="module")
def noisy_cells() -> tuple[torch.Tensor, torch.Tensor]:
    """Dark and bright noise of 16 pixels: two classes that are easily told apart."""
    labels = torch.arange(48) % 2
    noise = torch.randint(-30, 30, (48, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return (noise + 100 + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return make_classifier("cnn", 2, 16)


# ---------------------------------------------------------------------------------------------
# Updates and the order of the images
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 16, 200])
def test_updates_and_batches_are_the_same_for_any_number_of_images(n):
    batches = seen_by(n, updates=7, batch_size=16)
    assert [len(batch) for batch in batches] == [16] * 7


def test_passes_over_the_images_follow_each_other_without_a_gap():
    rows = [row for batch in seen_by(10, updates=5, batch_size=4) for row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:] and rows[:10] != list(range(10))


def test_the_seed_alone_decides_the_order():
    options = {"updates": 3, "batch_size": 8}
    first = seen_by(30, seed=1, **options)
    torch.manual_seed(99)
    assert seen_by(30, seed=1, **options) == first
    assert seen_by(30, seed=2, **options) != first


def test_oversampling_draws_each_class_equally_often():
    recorder = Recorder()
    labels = torch.tensor([0] * 190 + [1] * 10)
    images = flat(*range(200))
    fit(recorder, images, labels, updates=100, batch_size=16, oversample=True)
    rows = np.array(as_bytes(torch.cat(recorder.seen)))
    # Of 1,600 draws; five standard deviations each.
    assert (rows >= 190).mean() == pytest.approx(0.5, abs=5 * 0.5 / 40)
    counts = np.bincount(rows, minlength=200)
    assert counts[190:].min() > 80 - 5 * math.sqrt(80) and counts[:190].max() < 20


def test_training_is_the_same_bit_for_bit(noisy_cells):
    options = {"updates": 4, "batch_size": 16, "augmentation": "strong", "mixup": 0.4}
    states = []
    for seed in (3, 3, 4):
        classifier = small_cnn()
        torch.manual_seed(17)
        history = fit(classifier, *noisy_cells, seed=seed, **options)
        after = torch.rand(1)  # the global random state is left as it was
        states.append((classifier.state_dict(), history, after))
    torch.manual_seed(17)
    assert all(torch.equal(state[2], torch.rand(1)) for state in states[:1])
    assert states[0][1] == states[1][1] != states[2][1]
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name
        assert not torch.equal(value, states[2][0][name]), name


# ---------------------------------------------------------------------------------------------
# The loss and the optimizer
# ---------------------------------------------------------------------------------------------


def test_class_weights_by_hand():
    weights = inverse_frequencies(torch.tensor([0, 0, 0, 1]), 3)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 2.0, 0.0]))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_cross_entropy(weighted):
    images, labels = flat(0, 60, 120, 250), torch.tensor([0, 1, 1, 1])
    recorder = Recorder()
    logits = recorder.eval()(to_model_range(images))
    weight = torch.tensor([2.0, 2 / 3]) if weighted else None
    expected = F.cross_entropy(logits, labels, weight).item()
    (row,) = fit(recorder, images, labels, updates=1, batch_size=4, class_weights=weighted)
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["update"] == 1
    assert row["accuracy"] == (logits.argmax(1) == labels).float().mean()


def test_mixup_mixes_images_and_labels_by_the_same_share():
    recorder = Recorder()
    nn.init.zeros_(recorder.layer.weight)
    with torch.no_grad():
        recorder.layer.bias.copy_(torch.tensor([0.0, 1.0]))
    labels = torch.arange(32) % 2
    images = flat(*(255 * labels).tolist())
    (row,) = fit(recorder, images, labels, updates=1, batch_size=32, mixup=1.0, seed=1)
    shares = (recorder.seen[0] + 1) / 2  # of class 1, as black and white were mixed
    assert ((shares > 0.01) & (shares < 0.99)).any()
    logs = torch.tensor([0.0, 1.0]).log_softmax(0)
    expected = -(shares * logs[1] + (1 - shares) * logs[0]).mean()
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_step_size_falls_as_half_a_cosine():
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append((type(optimizer), optimizer.param_groups[0]["lr"]))
    )
    seen_by(8, updates=10, batch_size=4, lr=0.02)
    hook.remove()
    assert {kind for kind, _ in rates} == {torch.optim.AdamW}
    expected = [0.01 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert [rate for _, rate in rates] == pytest.approx(expected)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_classifier_learns(noisy_cells, augmentation):
    classifier, (images, labels) = small_cnn(), noisy_cells
    options = {"updates": 25, "batch_size": 8, "augmentation": augmentation, "lr": 3e-3}
    history = fit(classifier, images, labels, **options)
    assert [row["update"] for row in history] == list(range(1, 26))
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    found = scores(predict(classifier, images), labels, ("dark", "bright"))
    assert found["balanced_accuracy"] > 0.95
    json.dumps(history)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"labels": torch.zeros(3).long()}, ("3 labels", "4 images")),
        ({"labels": torch.tensor([0, 1, 2, 0])}, ("0 to 1", "got 0 to 2")),
        ({"labels": torch.tensor([0, 1, -1, 0])}, ("0 to 1", "got -1 to 1")),
        ({"images": flat(1, 2, 3, 4).float()}, ("uint8", "float32")),
        ({"images": flat(1)[:0], "labels": torch.zeros(0).long()}, ("0 labels",)),
        ({"updates": 0}, ("at least 1", "got 0 and 64")),
        ({"batch_size": 0}, ("at least 1",)),
        ({"augmentation": "weak"}, ("'weak'", "none, traditional, strong")),
        ({"mixup": -1.0}, ("mixup", "-1.0")),
        ({"lr": 1e30}, ("the loss is", "lower lr")),
    ],
)
def test_bad_input(options, words, bad_input):
    given = {"images": flat(9, 99, 199, 250), "labels": torch.tensor([0, 1, 1, 0]), "updates": 9}
    with bad_input(*words):
        fit(Recorder(), **{**given, **options})


# ---------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_keep_their_form(name, channels):
    images = torch.randint(0, 256, (5, channels, 28, 28)).to(torch.uint8)
    torch.manual_seed(0)
    changed = AUGMENTATIONS[name](images)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert torch.equal(changed, images) == (name == "none")


@pytest.mark.parametrize("name", ["traditional", "strong"])
def test_every_image_is_changed_in_its_own_way(name):
    image = torch.randint(0, 256, (1, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    changed = AUGMENTATIONS[name](image.to(torch.uint8).expand(12, -1, -1, -1))
    assert len(torch.unique(changed.flatten(1), dim=0)) == 12


def test_the_traditional_one_turns_by_ten_degrees_at_most_and_flips_half():
    """A dot on the right of the middle, followed."""
    images = torch.zeros(200, 1, 65, 65, dtype=torch.uint8)
    images[:, :, 31:34, 55:58] = 255
    torch.manual_seed(0)
    light = AUGMENTATIONS["traditional"](images).double()[:, 0]
    axis = torch.arange(65.0, dtype=torch.float64) - 32
    total = light.sum((1, 2))
    x, y = (light * axis).sum((1, 2)) / total, (light * axis[:, None]).sum((1, 2)) / total
    angles = torch.rad2deg(torch.atan2(y, x.abs()))
    assert 9 < angles.max() < 10.5 and -10.5 < angles.min() < -9
    assert angles.mean().abs() < 5 * (20 / 12**0.5) / 200**0.5
    assert (x < 0).double().mean() == pytest.approx(0.5, abs=5 * 0.5 / 200**0.5)
    torch.testing.assert_close(torch.hypot(x, y), torch.full_like(x, 24), atol=0.2, rtol=0)


@pytest.mark.parametrize("size", [9, 28, 64])
def test_a_turn_uncovers_no_corners(size):
    torch.manual_seed(0)
    assert torch.equal(
        AUGMENTATIONS["traditional"](flat(*[200] * 20, size=size)), flat(*[200] * 20, size=size)
    )


def test_the_strong_one_erases_in_every_second_image_and_changes_the_light():
    torch.manual_seed(0)
    changed = AUGMENTATIONS["strong"](flat(*[200] * 300, size=16))
    erased = (changed == BACKGROUND).all(1)  # 200 by 0.8 to 1.2 is never as dark
    assert erased.flatten(1).any(1).double().mean() == pytest.approx(0.5, abs=5 * 0.5 / 300**0.5)
    light = changed.flatten(1).max(1).values
    assert 158 < light.min() < 175 and 225 < light.max() < 242


# ---------------------------------------------------------------------------------------------
# Predictions and scores
# ---------------------------------------------------------------------------------------------


def test_predictions_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    classifier = nn.Sequential(
        nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * 16, 4)
    ).train()
    images = torch.randint(0, 256, (20, 3, 4, 4)).to(torch.uint8)
    whole, parts = predict(classifier, images), predict(classifier, images, batch=3)
    torch.testing.assert_close(whole, parts)
    assert whole.shape == (20, 4) and whole.dtype == torch.float32
    torch.testing.assert_close(whole.sum(1), torch.ones(20))
    assert not classifier.training


def test_predictions_are_the_softmax_of_the_logits():
    # Means 1 and -1 in [-1, 1]; the logits are equal, so the bias alone speaks.
    recorder = Recorder()
    with torch.no_grad():
        recorder.layer.bias.copy_(torch.tensor([0.0, math.log(3)]))
    torch.testing.assert_close(
        predict(recorder, flat(255, 0)), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    )


def as_probabilities(predicted: list[int], n_classes: int) -> torch.Tensor:
    """0.7 for the class that is named, the rest shared."""
    rest = 0.3 / (n_classes - 1)
    return F.one_hot(torch.tensor(predicted), n_classes) * (0.7 - rest) + rest


def test_scores_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    found = scores(as_probabilities([0, 0, 0, 1, 1, 1, 2, 0], 3), labels, ("a", "b", "c"))
    assert found["n"] == 8 and found["accuracy"] == 6 / 8
    assert found["per_class"] == {
        "a": {"n": 4, "recall": 0.75},
        "b": {"n": 2, "recall": 1.0},
        "c": {"n": 2, "recall": 0.5},
    }
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    # Precisions 3/4, 2/3, 1.
    assert found["macro_f1"] == pytest.approx((0.75 + 0.8 + 2 / 3) / 3)
    assert found["confusion"] == [[3, 1, 0], [0, 2, 0], [1, 0, 1]]
    # With two values alone, the area is the mean of sensitivity and specificity.
    areas = [(3 / 4 + 3 / 4) / 2, (1 + 5 / 6) / 2, (1 / 2 + 1) / 2]
    assert found["auc"] == pytest.approx(sum(areas) / 3)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_scores_are_those_of_scikit_learn(n_classes):
    generator = torch.Generator().manual_seed(n_classes)
    probabilities = torch.randn(80, n_classes, generator=generator).softmax(1)
    labels = torch.randint(0, n_classes, (80,), generator=generator)
    found = scores(probabilities, labels, [f"class {k}" for k in range(n_classes)])
    likely = probabilities[:, 1] if n_classes == 2 else probabilities.double()
    auc = metrics.roc_auc_score(labels, likely, multi_class="ovr", average="macro")
    predicted = probabilities.argmax(1)
    assert found["auc"] == pytest.approx(auc)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    f1 = metrics.f1_score(labels, predicted, average="macro")
    assert found["macro_f1"] == pytest.approx(f1)


@pytest.mark.filterwarnings("error")
def test_a_class_without_images_leaves_the_means_to_the_others():
    labels = torch.tensor([0, 0, 1, 1])
    found = scores(as_probabilities([0, 2, 1, 1], 3), labels, ("a", "b", "c"))
    assert found["per_class"]["c"] == {"n": 0, "recall": None}
    assert found["auc"] is None
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "probabilities, labels, words",
    [
        (torch.full((2, 3), 1 / 3), torch.tensor([0, 1]), ("[N, 2]", "[2, 3]")),
        (torch.tensor([[3.0, -2.0]]), torch.tensor([0]), ("at least 0",)),
        (torch.tensor([[0.9, 0.9]]), torch.tensor([0]), ("sum to 1",)),
        (torch.tensor([[math.nan, 0.9]]), torch.tensor([0]), ("sum to 1",)),
        (torch.full((2, 2), 0.5), torch.tensor([0]), ("one label for each",)),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), ("from 0 to 1",)),
        (torch.zeros(0, 2), torch.zeros(0).long(), ("one or more",)),
    ],
)
def test_scores_bad_input(probabilities, labels, words, bad_input):
    with bad_input(*words):
        scores(probabilities, labels, ("a", "b"))
