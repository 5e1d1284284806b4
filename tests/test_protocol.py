"""Metrics under a protocol: what they hold, the floor, the scale of the mean image."""

import json

import pytest
import torch
from test_features import Small, images, script

from evaluation.features import extract, load_extractor
from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.kid import kernel_distance
from evaluation.protocol import Protocol, evaluate, floor
from utils import InputError

FIELDS = {"dataset": "demo", "dataset_sha256": "ab" * 32}


@pytest.fixture
def extractor(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    torch.manual_seed(0)
    return load_extractor(script(Small(), tmp_path / "small.pt"))


def dark(n: int, seed: int) -> torch.Tensor:
    return images(n, seed) // 2


def test_metrics_are_those_of_the_features(extractor):
    real, fake = images(40), dark(30, 1)
    result = evaluate(real, fake, extractor, **FIELDS)
    a, b = extract(real, extractor), extract(fake, extractor)
    expected = frechet_distance(gaussian_statistics(a), gaussian_statistics(b))
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert (result["kid"], result["kid_standard_error"]) == pytest.approx(kernel_distance(a, b))
    assert result["distance_name"] == "FD (small)"
    assert result["warnings"] == []
    assert result["protocol"] == {
        **FIELDS,
        "image_size": 28,
        "reference_split": "train",
        "n_real": 40,
        "n_fake": 30,
        "label_distribution": "held-out (validation + test) frequencies",
        "extractor": "small",
        "extractor_sha256": extractor.sha256,
        "feature_dim": 4,
        "resize": "by the extractor",
        "version": 1,
    }


def test_result_survives_json(extractor):
    result = evaluate(images(20), dark(20, 1), extractor, **FIELDS)
    again = json.loads(json.dumps(result))
    assert again == result
    protocol = Protocol(**result["protocol"])
    assert Protocol(**again["protocol"]).key() == protocol.key()
    assert len(protocol.key()) == 12


def test_every_field_changes_the_key(extractor):
    fields = evaluate(images(20), dark(20, 1), extractor, **FIELDS)["protocol"]
    keys = {Protocol(**fields).key()}
    for name, value in fields.items():
        other = value + 1 if isinstance(value, int) else value + "x"
        keys.add(Protocol(**fields | {name: other}).key())
    assert len(keys) == len(fields) + 1


@pytest.mark.parametrize(("n_real", "n_fake", "warned"), [(40, 7, 0), (40, 6, 1), (6, 40, 1)])
def test_too_few_images_are_said(extractor, n_real, n_fake, warned):
    result = evaluate(images(n_real), dark(n_fake, 1), extractor, **FIELDS)
    sentence = "Fréchet distance at n = 6 in 4 dimensions is dominated by sampling error"
    assert result["warnings"] == [sentence] * warned


def test_floor_has_the_protocol_of_a_generator_and_a_lower_distance(extractor):
    real, held_out, fake = images(60), images(50, 1), dark(50, 2)
    lowest = floor(real, held_out, extractor, **FIELDS)
    other = evaluate(real, fake, extractor, **FIELDS)
    assert lowest["protocol"] == other["protocol"]
    assert 0 < lowest["frechet_distance"] < other["frechet_distance"]
    assert abs(lowest["kid"]) < 3 * lowest["kid_standard_error"]


def test_ceiling_is_the_limit_of_many_copies_of_the_mean_image(extractor):
    real = torch.cat([images(30), dark(30, 1)])
    mean_image = real.double().mean(0).round().to(torch.uint8)
    copies = evaluate(real, mean_image.expand(50, -1, -1, -1), extractor, **FIELDS)
    ceiling = copies["mean_image_distance"]
    assert ceiling == pytest.approx(copies["frechet_distance"], rel=1e-5)
    lowest = floor(real[::2], real[1::2], extractor, **FIELDS)
    assert ceiling > 2 * lowest["frechet_distance"]


def test_mean_image_of_more_than_one_part(extractor):
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(256, (1500, 3, 8, 8), generator=generator, dtype=torch.uint8)
    real[1024:] //= 4
    mean_image = real.double().mean(0, keepdim=True).round().to(torch.uint8)
    mean, covariance = gaussian_statistics(extract(real, extractor))
    gap = extract(mean_image, extractor)[0].double() - mean
    expected = gap.square().sum() + covariance.trace()
    ceiling = evaluate(real, real[:30], extractor, **FIELDS)["mean_image_distance"]
    assert ceiling == pytest.approx(expected.item(), rel=1e-9)


def test_refuses_other_sizes_and_other_ranges(extractor):
    with pytest.raises(InputError, match="differ in size"):
        evaluate(images(9), images(9)[..., :14, :14], extractor, **FIELDS)
    with pytest.raises(InputError, match=r"float32 .* in \[0, 1\]"):
        evaluate(images(9), images(9).float() / 255, extractor, **FIELDS)
    with pytest.raises(InputError, match=r"float32 .* in \[-1, 1\]"):
        evaluate(images(9).float() / 127.5 - 1, images(9), extractor, **FIELDS)
