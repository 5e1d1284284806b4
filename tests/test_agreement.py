"""Agreement of a classifier with the classes that were asked for."""

import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation import agreement as agreeing
from evaluation.agreement import (
    Classifier,
    SmallNetwork,
    agreement,
    classifier_agreement,
    load_domain_classifier,
    train_classifier,
    wilson_interval,
)
from utils import BLOOD_CLASSES, ImageSet, InputError


class ReadsTheClass(torch.nn.Module):
    """Features and logits of images whose pixels all hold the number of their class."""

    def forward(self, images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 8).float() * 3 - 1

    def logits(self, features):
        return features / 2


@pytest.fixture
def classifier(empty_cache) -> Classifier:
    network, cpu = ReadsTheClass(), torch.device("cpu")
    return Classifier("reader-8", "FD (reader)", "ab" * 32, 8, network, cpu, BLOOD_CLASSES)


def cells_of(classes: list[int]) -> torch.Tensor:
    shown = torch.tensor(classes, dtype=torch.uint8)
    return shown[:, None, None, None].expand(-1, 3, 28, 28).contiguous()


def real_cells(shown: list[int], labels: list[int]) -> ImageSet:
    return ImageSet("cells", "test", cells_of(shown), torch.tensor(labels), BLOOD_CLASSES)


def test_generated_cells_beside_real_ones(classifier):
    asked = torch.tensor([0, 0, 0, 7, 7, 2])
    result = classifier_agreement(
        cells_of([0, 0, 1, 7, 7, 2]), asked, real_cells([3, 4, 5, 5], [3, 4, 5, 6]), classifier
    )
    assert (result["classifier"], result["classifier_sha256"]) == ("reader-8", "ab" * 32)
    assert (result["n"], result["agreement"]) == (6, 5 / 6)
    assert result["per_class"]["basophil"] == {"n": 3, "agreement": 2 / 3}
    assert result["per_class"]["platelet"] == {"n": 2, "agreement": 1}
    assert result["per_class"]["neutrophil"] == {"n": 0, "agreement": None}
    assert (result["real"]["n"], result["real"]["agreement"]) == (4, 3 / 4)
    assert result["real"]["per_class"]["neutrophil"] == {"n": 1, "agreement": 0}


def test_only_real_features_are_cached(classifier, empty_cache):
    classifier_agreement(
        cells_of([0, 1]), torch.tensor([0, 1]), real_cells([2, 3, 4], [2, 3, 4]), classifier
    )
    (cached,) = (empty_cache / "features").iterdir()
    assert len(torch.load(cached, weights_only=True)) == 3


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60))
def test_agreement_counts(pairs):
    predicted, labels = torch.tensor(pairs).T
    result = agreement(predicted, labels)
    for row in range(8):
        for column in range(8):
            assert result["confusion"][row][column] == pairs.count((column, row))
    right = sum(p == label for p, label in pairs)
    assert (result["n"], result["agreement"]) == (len(pairs), right / len(pairs))
    assert result["interval"] == wilson_interval(right, len(pairs))
    assert list(result["per_class"]) == list(BLOOD_CLASSES)
    for row, part in enumerate(result["per_class"].values()):
        assert part["n"] == sum(label == row for _, label in pairs)
        if part["n"]:
            assert part["agreement"] == pairs.count((row, row)) / part["n"]
        else:
            assert part["agreement"] is None


@given(st.integers(1, 10_000), st.data())
def test_wilson_interval_solves_its_equation(n, data):
    """Its ends are the shares p that lie z standard errors, sqrt(p (1 - p) / n), away."""
    right = data.draw(st.integers(0, n))
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1
    for end in (low, high):
        away = 1.959964 * math.sqrt(end * (1 - end) / n)
        assert abs(right / n - end) == pytest.approx(away, rel=1e-6, abs=1e-7)


def test_wilson_interval_at_the_ends():
    low, high = wilson_interval(10, 10)
    assert low == pytest.approx(10 / (10 + 1.959964**2))
    assert high == pytest.approx(1)
    assert wilson_interval(0, 10) == pytest.approx([0, 1 - low])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 1, 2]), r"\[3\] labels for \[2\] predictions"),
        (torch.tensor([[0], [1]]), r"\[2, 1\] labels"),
        (torch.tensor([0, 8]), "from 0 to 8"),
        (torch.tensor([-1, 3]), "from -1 to 3"),
        (torch.tensor([0.0, 1.0]), "float32"),
    ],
)
def test_bad_labels(classifier, labels, words):
    with pytest.raises(InputError, match=words):
        classifier_agreement(cells_of([0, 1]), labels, real_cells([0], [0]), classifier)


def test_bad_images_and_other_classes(classifier, bad_input):
    labels = torch.tensor([0, 1])
    with bad_input("evaluation takes uint8 images"):
        classifier_agreement(cells_of([0, 1]).float(), labels, real_cells([0], [0]), classifier)
    with bad_input("no images to evaluate"):
        classifier_agreement(cells_of([]), labels[:0], real_cells([0], [0]), classifier)
    digits = ImageSet("digits", "test", cells_of([0]), labels[:1], tuple("0123456789"))
    with bad_input("digits has the classes 0, 1, 2"):
        classifier_agreement(cells_of([0, 1]), labels, digits, classifier)


def test_domain_classifier(empty_cache):
    classifier = load_domain_classifier()
    assert classifier.name == "domain-128"
    noise = torch.randint(256, (4, 3, 28, 28), dtype=torch.uint8)
    with torch.inference_mode():
        logits = classifier.module.logits(classifier.module(noise))
    assert logits.shape == (4, len(BLOOD_CLASSES))
    assert logits.isfinite().all()


# ---------------------------------------------------------------------------------------------
# A classifier that is trained on the spot
# ---------------------------------------------------------------------------------------------

SHADES = ("dark", "middle", "bright")


def shades(split: str, n: int, channels: int = 1, size: int = 8) -> ImageSet:
    """Noise around one of three shades, each its class."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.arange(n) % 3
    noise = torch.randint(50, (n, channels, size, size), generator=generator)
    images = (noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageSet("shades", split, images, labels, SHADES)


def predict(classifier: Classifier, data: ImageSet) -> torch.Tensor:
    with torch.inference_mode():
        return classifier.module.logits(classifier.module(data.images))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 11)])
def test_it_learns_classes_of_any_name(channels, size, empty_cache):
    train, val, test = (
        shades(split, n, channels, size) for split, n in (("train", 96), ("val", 9), ("test", 30))
    )
    classifier = train_classifier(train, val)
    assert classifier.classes == SHADES and classifier.dim == 128
    assert not classifier.module.training
    result = agreement(predict(classifier, test).argmax(1), test.labels, SHADES)
    assert result["agreement"] == 1 and result["confusion"] == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert list(result["per_class"]) == list(SHADES)


@pytest.mark.parametrize("size", [28, 64, 100])
def test_its_features_of_images_of_any_size(size):
    network = SmallNetwork(5).eval()
    images = shades("test", 2, size=size).images
    with torch.no_grad():
        features, in_colour = network(images), network(images.expand(-1, 3, -1, -1))
        deepest = network.layers(torch.zeros(1, 3, min(size, 64), min(size, 64)))
    assert features.shape == (2, 128) and network.logits(features).shape == (2, 5)
    assert torch.allclose(features, in_colour, atol=1e-6)
    assert deepest.shape[-1] == -(-min(size, 64) // 16)


def test_it_is_trained_once_for_each_data_set(empty_cache, monkeypatch):
    train, val = shades("train", 96), shades("val", 9)
    before = torch.get_rng_state()
    first = train_classifier(train, val)
    assert torch.equal(torch.get_rng_state(), before)
    (kept,) = (empty_cache / "classifiers").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(agreeing, "_fit", lambda *_: pytest.fail("trained again"))
        again = train_classifier(train, val)
    assert again.sha256 == first.sha256
    assert torch.equal(predict(again, val), predict(first, val))

    kept.write_bytes(kept.read_bytes()[:1000])  # cut short: trained anew, to the same weights
    assert train_classifier(train, val).sha256 == first.sha256
    assert train_classifier(shades("train", 99), val).sha256 != first.sha256
    assert len(list((empty_cache / "classifiers").iterdir())) == 2


def test_a_classifier_is_used_where_it_can_t_be_kept(empty_cache, monkeypatch):
    train, val = shades("train", 96), shades("val", 9)
    kept = train_classifier(train, val)
    shutil.rmtree(empty_cache)
    monkeypatch.setattr(agreeing, "write_to_cache", lambda *_: None)
    assert train_classifier(train, val).sha256 == kept.sha256
    assert not list(empty_cache.rglob("*.pt"))


def test_the_epoch_that_validation_likes_best_is_kept(empty_cache):
    """Where the validation labels are wrong, that is not the epoch that has learned the most."""
    train, val = shades("train", 96), shades("val", 30)
    wrong = ImageSet(val.name, val.split, val.images, val.labels.roll(1), val.classes)
    losses = [
        torch.nn.functional.cross_entropy(
            predict(train_classifier(train, chosen), val), wrong.labels
        )
        for chosen in (wrong, val)
    ]
    assert losses[0] < losses[1]


def test_a_large_data_set_is_seen_fewer_times(empty_cache, monkeypatch):
    train, val = shades("train", 96), shades("val", 9)
    whole = train_classifier(train, val).sha256
    hashes = set()
    for name in ("MOST_EPOCHS", "MOST_IMAGES"):
        with monkeypatch.context() as patched:
            patched.setattr(agreeing, name, 1)
            patched.setattr(agreeing, "VERSION", name)
            hashes.add(train_classifier(train, val).sha256)
    assert len(hashes) == 1 and whole not in hashes


def test_classes_that_the_classifier_does_not_know(empty_cache, bad_input):
    classifier = train_classifier(shades("train", 12, channels=3), shades("val", 3, channels=3))
    with bad_input("the classifier knows dark, middle, bright, but cells has the classes basophil"):
        classifier_agreement(cells_of([0]), torch.tensor([0]), real_cells([0], [0]), classifier)
