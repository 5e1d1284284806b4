"""The whole judgement of a generator: what it holds, beside real cells in its place."""

import dataclasses
import json

import pytest
import torch

from evaluation import judge as judging
from evaluation.agreement import load_domain_classifier
from evaluation.features import load_extractor
from evaluation.judge import judge
from evaluation.reference import make_reference
from evaluation.tables import metrics_table
from utils import ImageSet, load_dataset

SPLITS = ("train", "val", "test", "held_out")
is_known = judging._is_known


@pytest.fixture(autouse=True, scope="module")
def known_cells():
    """The drawn cells stand for those that our own classifier was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "_is_known", lambda train: train.name == "BloodMNIST")
        yield


@pytest.fixture(scope="module")
def sets(data_root) -> dict:
    return {split: load_dataset("bloodmnist", data_root, 28, split) for split in SPLITS}


@pytest.fixture(scope="module")
def judged(sets, tiny_extractor) -> dict:
    """Of held-out cells, brightened: asked for by class."""
    held_out = sets["held_out"]
    images = (held_out.images.int() + 40).clamp(max=255).to(torch.uint8)
    return judge(images, held_out.labels, sets, load_extractor(tiny_extractor))[0]


def test_it_holds_every_metric_and_survives_json(judged):
    assert json.loads(json.dumps(judged)) == judged
    assert judged["protocol"]["reference_split"] == "train"
    assert judged["protocol"]["n_fake"] == 64 and len(judged["per_class"]) == 8
    floor = judged["floor"]
    assert floor["protocol"] == judged["protocol"]
    assert 0 < floor["frechet_distance"] < judged["frechet_distance"]
    assert judged["mean_colour_error"] > 20
    assert judged["copies"]["n_held_out"] == 64
    # The control: half of the held-out cells in the images' place.
    assert floor["copies"]["n_images"] == floor["copies"]["n_held_out"] == 32
    assert floor["copies"]["verdict"] == "no sign of copies"


def test_our_own_classifier_sees_the_cells_that_it_was_not_trained_on(judged, sets):
    rules = judged["domain"]["protocol"]
    assert (rules["reference_split"], rules["n_real"]) == ("test", len(sets["test"]))
    assert (rules["n_fake"], rules["label_distribution"]) == (24, "validation frequencies")
    assert rules["extractor"] == "domain-128"
    assert judged["floor"]["domain"]["protocol"] == rules
    assert judged["agreement"]["n"] == judged["floor"]["agreement"]["n"] == len(sets["test"])
    assert judged["floor"]["agreement"]["agreement"] == judged["agreement"]["real"]["agreement"]


def test_our_own_classifier_is_for_the_split_that_it_was_trained_on(sets, real_data_root):
    """It may know test cells of any other split of the same cells."""
    assert not is_known(sets["train"])
    train = load_dataset("bloodmnist", real_data_root, 28, "train")
    assert is_known(train) == (train.name == "BloodMNIST (rebuilt)")
    assert not is_known(load_dataset("bloodmnist", real_data_root, 28, "test"))


def test_a_generator_that_cannot_be_asked_has_no_rows_by_class(sets, tiny_extractor):
    images = sets["held_out"].images.flip(2)
    metrics, suspects = judge(images, None, sets, load_extractor(tiny_extractor))
    assert "per_class" not in metrics and "agreement" not in metrics
    assert "domain" in metrics and suspects.images.dtype == torch.uint8
    text = metrics_table(metrics)
    assert "FD (tiny-8)" in text and "Nearer to train" in text and "Class agreement" not in text


def test_copies_of_the_train_split_are_told(sets, tiny_extractor):
    extractor = load_extractor(tiny_extractor)
    metrics, _ = judge(sets["train"].images[:64], None, sets, extractor)
    assert metrics["copies"]["verdict"] == "copies"
    assert metrics["copies"]["features"]["train_share"] == 1


def test_the_floor_is_measured_once(judged, sets, tiny_extractor, monkeypatch):
    monkeypatch.setattr(judging.protocol, "evaluate", lambda *_: pytest.fail("measured again"))
    networks = load_extractor(tiny_extractor), load_domain_classifier()
    reference = None  # not looked at where the floor is kept
    assert judging.floor(reference, sets, *networks) == judged["floor"]


OTHER_FLOORS = {
    "a validation cell": lambda sets, networks: brightened(sets, "val"),
    "a test cell": lambda sets, networks: brightened(sets, "test"),
    "a training cell": lambda sets, networks: brightened(sets, "train"),
    "the cut between them": lambda sets, networks: recut(sets),
    "the extractor": lambda sets, networks: networks.update(extractor="0" * 64),
    "the classifier": lambda sets, networks: networks.update(classifier="0" * 64),
    "the metrics": lambda sets, networks: networks.update(version=-1),
}


def brightened(sets: dict, split: str) -> None:
    images = sets[split].images.clone()
    images[0, 0, 0, 0] ^= 1
    sets[split] = dataclasses.replace(sets[split], images=images)
    join_held_out(sets)


def recut(sets: dict) -> None:
    """The first test cell becomes the last validation cell."""
    val, test = sets["val"], sets["test"]
    for name in ("images", "labels"):
        first = getattr(test, name)[:1]
        val = dataclasses.replace(val, **{name: torch.cat([getattr(val, name), first])})
        test = dataclasses.replace(test, **{name: getattr(test, name)[1:]})
    sets |= {"val": val, "test": test}


def join_held_out(sets: dict) -> None:
    parts = sets["val"], sets["test"]
    joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("images", "labels")}
    sets["held_out"] = dataclasses.replace(sets["held_out"], **joined)


@pytest.mark.parametrize("change", OTHER_FLOORS.values(), ids=OTHER_FLOORS)
def test_a_floor_is_not_kept_for_other_cells_networks_or_metrics(
    change, judged, sets, tiny_extractor, monkeypatch
):
    class MeasuredAgain(Exception):
        pass

    def evaluate(*_):
        raise MeasuredAgain

    monkeypatch.setattr(judging.protocol, "evaluate", evaluate)
    here, networks = dict(sets), {}
    change(here, networks)
    extractor, classifier = load_extractor(tiny_extractor), load_domain_classifier()
    if "extractor" in networks:
        extractor = dataclasses.replace(extractor, sha256=networks["extractor"])
    if "classifier" in networks:
        classifier = dataclasses.replace(classifier, sha256=networks["classifier"])
    if "version" in networks:
        monkeypatch.setattr(judging.protocol, "METRICS_VERSION", networks["version"])
    with pytest.raises(MeasuredAgain):
        judging.floor(None, here, extractor, classifier)


def test_a_kept_floor_has_the_names_of_its_data(judged, sets, tiny_extractor):
    renamed = {split: dataclasses.replace(part, name="cells") for split, part in sets.items()}
    extractor = load_extractor(tiny_extractor)
    reference = make_reference(renamed["train"], extractor)
    found = judging.floor(reference, renamed, extractor, load_domain_classifier())
    assert found["protocol"]["dataset"] == "cells" != judged["floor"]["protocol"]["dataset"]


def test_other_data_have_a_classifier_of_their_own_train_split(sets, tiny_extractor, monkeypatch):
    """Other data are not shown to a network that knows real blood cells; grey ones, here."""
    grey = {
        split: ImageSet("grey", split, part.images[:, 1:2], part.labels, part.classes)
        for split, part in sets.items()
    }
    held_out, test = grey["held_out"], grey["test"]
    trained_on = []
    train_classifier = judging.train_classifier

    def watched(train, val, device):
        trained_on.append((train.split, val.split))
        return train_classifier(train, val, device)

    monkeypatch.setattr(judging, "train_classifier", watched)
    images, labels = held_out.images.flip(3), held_out.labels.roll(1)
    metrics, suspects = judge(images, labels, grey, load_extractor(tiny_extractor))
    assert suspects.images.shape[1:] == (1, 28, 28)
    assert trained_on == [("train", "val")]
    assert "domain" not in metrics and "domain" not in metrics["floor"] and "per_class" in metrics
    found, floor = metrics["agreement"], metrics["floor"]["agreement"]
    assert found["classifier"] == floor["classifier"] == "small-network-128"
    assert found["classifier_sha256"] == floor["classifier_sha256"]
    assert found["n"] == floor["n"] == found["real"]["n"] == len(test)
    assert found["real"]["agreement"] == floor["agreement"]
    rows = torch.tensor(found["confusion"]).sum(1)  # of the labels asked for, not the cells' own
    assert torch.equal(rows, labels[-len(test) :].bincount(minlength=8))
