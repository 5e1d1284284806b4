"""Metrics under a protocol: what they hold, what is refused, the floors by number of images."""

import json

import pytest
import torch
from test_features import Small, images, script

from evaluation.features import extract, load_extractor
from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.frechet_infinity import frechet_infinity
from evaluation.kid import kernel_distance
from evaluation.prdc import precision_recall_density_coverage
from evaluation.protocol import Protocol, evaluate, floors, measure
from evaluation.reference import make_reference
from utils import ImageSet, InputError

CLASSES = ("round", "long")


@pytest.fixture
def extractor(tmp_path, empty_cache):
    torch.manual_seed(0)
    return load_extractor(script(Small(), tmp_path / "small.pt"))


def dark(n: int, seed: int) -> torch.Tensor:
    return images(n, seed) // 2


def reference(pictures: torch.Tensor, extractor):
    labels = torch.arange(len(pictures)) % 2
    return make_reference(ImageSet("cells", "train", pictures, labels, CLASSES), extractor)


def test_metrics_are_those_of_the_features(extractor):
    real, fake = images(40), dark(30, 1)
    result = evaluate(reference(real, extractor), fake, extractor)
    a, b = extract(real, extractor), extract(fake, extractor)
    expected = frechet_distance(gaussian_statistics(a), gaussian_statistics(b))
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    low, high = result["frechet_interval"]
    assert low < expected < high
    assert result["frechet_infinity"] == frechet_infinity(a, b)
    assert (result["kid"], result["kid_standard_error"]) == pytest.approx(kernel_distance(a, b))
    for name, value in precision_recall_density_coverage(a, b, 5).items():
        assert result[name] == value
    assert result["distance_name"] == "FD (small)"
    assert result["warnings"] == [] and "per_class" not in result
    assert result["ceilings"].keys() == {"mean_image", "uniform_noise"}
    assert result["protocol"] == {
        "dataset": "cells",
        "dataset_sha256": result["protocol"]["dataset_sha256"],
        "image_size": 28,
        "reference_split": "train",
        "n_real": 40,
        "n_fake": 30,
        "label_distribution": "held-out (validation + test) frequencies",
        "extractor": "small",
        "extractor_sha256": extractor.sha256,
        "feature_dim": 4,
        "resize": "by the extractor",
        "k": 5,
        "version": 1,
    }


def test_each_class_is_measured_against_its_own_real_images(extractor):
    real, fake = images(60), dark(50, 1)
    labels = (torch.arange(50) % 5 > 0).long()  # 10 round, 40 long
    rows = evaluate(reference(real, extractor), fake, extractor, labels)["per_class"]
    assert [(r["class"], r["n_real"], r["n_fake"]) for r in rows] == [
        ("round", 30, 10),
        ("long", 30, 40),
    ]
    a, b = extract(real, extractor), extract(fake, extractor)
    expected, _ = measure(a[1::2], b[labels == 1])
    assert {name: rows[1][name] for name in expected} == expected


def test_a_class_without_images_is_said_not_left_out(extractor):
    labels = torch.zeros(30, dtype=torch.int64)
    rows = evaluate(reference(images(40), extractor), dark(30, 1), extractor, labels)["per_class"]
    assert rows[1]["n_fake"] == 0
    assert len(rows[1]["warnings"]) == 4 and "n = 0" in rows[1]["warnings"][0]
    names = ("frechet_distance", "frechet_infinity", "kid", "precision", "coverage")
    assert [rows[1][name] for name in names] == [None] * 5


def test_result_survives_json(extractor):
    result = evaluate(reference(images(40), extractor), dark(20, 1), extractor)
    again = json.loads(json.dumps(result))
    assert again == result
    protocol = Protocol(**result["protocol"])
    assert Protocol(**again["protocol"]).key() == protocol.key()
    assert len(protocol.key()) == 12


def test_every_field_changes_the_key(extractor):
    fields = evaluate(reference(images(40), extractor), dark(20, 1), extractor)["protocol"]
    keys = {Protocol(**fields).key()}
    for name, value in fields.items():
        other = value + 1 if isinstance(value, int) else value + "x"
        keys.add(Protocol(**fields | {name: other}).key())
    assert len(keys) == len(fields) + 1


@pytest.mark.parametrize(
    ("n", "missing"),
    [
        (8, []),
        (7, ["frechet_infinity"]),
        (6, ["frechet_distance", "frechet_interval", "frechet_infinity"]),
        (5, ["precision", "recall", "density", "coverage"]),
        (2, ["kid", "kid_standard_error"]),
    ],
)
def test_what_too_few_images_cannot_tell_is_none_with_a_sentence(extractor, n, missing):
    real, few = extract(images(40), extractor), extract(dark(n, 1), extractor)
    metrics, warnings = measure(real, few)
    absent = {name for name, value in metrics.items() if value is None}
    assert absent >= set(missing) and (n > 7 or absent)
    assert bool(warnings) == bool(absent)
    assert all(f"n = {n}" in sentence for sentence in warnings)
    if n == 8:
        assert not absent
    other, _ = measure(few, real)
    assert {name for name, value in other.items() if value is None} == absent


@pytest.mark.parametrize(("n_fake", "warned"), [(7, False), (6, True)])
def test_a_protocol_knows_when_its_frechet_distance_is_unsound(n_fake, warned, extractor):
    rules = evaluate(reference(images(40), extractor), dark(n_fake, 1), extractor)["protocol"]
    sentence = "Fréchet distance at n = 6 in 4 dimensions is dominated by sampling error"
    assert Protocol(**rules).frechet_warning == (sentence if warned else "")


def test_order_does_not_matter(extractor):
    real, fake = extract(images(60), extractor), extract(dark(40, 1), extractor)
    straight, _ = measure(real, fake)
    turned, _ = measure(real.flip(0), fake[torch.randperm(40)])
    # The interval and FD∞ draw subsets, and so see other ones.
    for name in ("frechet_distance", "kid", "kid_standard_error", "precision", "recall"):
        assert turned[name] == pytest.approx(straight[name], rel=1e-9)


def test_held_out_cells_lie_at_the_floor(extractor):
    real = reference(images(60), extractor)
    lowest = evaluate(real, images(50, 1), extractor)
    other = evaluate(real, dark(50, 2), extractor)
    assert lowest["protocol"] == other["protocol"]
    assert 0 < lowest["frechet_distance"] < other["frechet_distance"]
    assert abs(lowest["kid"]) < 3 * lowest["kid_standard_error"]
    assert lowest["frechet_distance"] < lowest["ceilings"]["mean_image"]


def test_floors_are_given_by_number_of_images(extractor, monkeypatch):
    monkeypatch.setattr("evaluation.protocol.FLOOR_SIZES", (6, 20, 100))
    real, labels = reference(images(200), extractor), torch.zeros(50, dtype=torch.int64)
    held_out = ImageSet("cells", "held_out", images(50, 1), labels, CLASSES)
    rows = floors(real, held_out, extractor)
    assert [row["n"] for row in rows] == [6, 20, 50]  # 100 are not there
    assert rows[0]["frechet_distance"] is None and rows[0]["kid"] is not None
    assert rows[1]["frechet_distance"] > rows[2]["frechet_distance"] > 0
    whole, _ = measure(real.features, extract(held_out.images, extractor))
    for name in ("frechet_distance", "kid", "precision", "recall", "density", "coverage"):
        assert rows[2][name] == pytest.approx(whole[name], rel=1e-9)
    assert rows == floors(real, held_out, extractor)


def test_refuses_other_sizes_other_ranges_and_other_extractors(extractor, tmp_path):
    real = reference(images(9), extractor)
    with pytest.raises(InputError, match=r"14 × 14 pixels .* 28; draw them at that size"):
        evaluate(real, images(9)[..., :14, :14], extractor)
    with pytest.raises(InputError, match=r"float32 .* in \[0, 1\]"):
        evaluate(real, images(9).float() / 255, extractor)
    with pytest.raises(InputError, match=r"float32 .* in \[-1, 1\]"):
        evaluate(real, images(9).float() / 127.5 - 1, extractor)
    other = load_extractor(script(Small(), tmp_path / "other.pt"))
    with pytest.raises(InputError, match=r"made with extractor small .* not other"):
        evaluate(real, images(9), other)
