"""References: what they hold, their two ceilings, and their way through a file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_features import Small, script

from evaluation.features import extract, load_extractor
from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.reference import load_reference, make_reference, save_reference
from utils import ImageSet, load_dataset


@pytest.fixture
def extractor(tmp_path, empty_cache):
    torch.manual_seed(0)
    return load_extractor(script(Small(), tmp_path / "small.pt"))


@pytest.fixture
def train(data_root) -> ImageSet:
    return load_dataset("bloodmnist", data_root, 28, "train")


def test_it_holds_the_features_of_its_split(train, extractor):
    reference = make_reference(train, extractor)
    features = extract(train.images, extractor)
    assert torch.equal(reference.features, features)
    assert torch.equal(reference.labels, train.labels)
    mean, covariance = gaussian_statistics(features)
    assert torch.equal(reference.mean, mean) and torch.equal(reference.covariance, covariance)
    assert (reference.dataset, reference.split, reference.image_size) == (train.name, "train", 28)
    assert reference.dataset_sha256 == train.sha256()
    assert reference.extractor_sha256 == extractor.sha256


def test_ceiling_is_the_limit_of_many_copies_of_the_mean_image(train, extractor):
    reference = make_reference(train, extractor)
    mean_image = train.images.double().mean(0).round().to(torch.uint8)
    copies = extract(mean_image.expand(50, -1, -1, -1), extractor)
    expected = frechet_distance(gaussian_statistics(copies), reference.statistics)
    assert reference.ceilings["mean_image"] == pytest.approx(expected, rel=1e-5)
    assert reference.ceilings["uniform_noise"] > 0


def test_mean_image_of_more_than_one_part(extractor):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1500, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[1024:] //= 4
    data = ImageSet("a", "train", images, torch.zeros(1500, dtype=torch.int64), ("x",))
    reference = make_reference(data, extractor)
    mean_image = images.double().mean(0, keepdim=True).round().to(torch.uint8)
    expected = extract(mean_image, extractor)[0]
    assert torch.equal(reference.mean_image_features, expected)
    gap = expected.double() - reference.mean
    ceiling = gap.square().sum() + reference.covariance.trace()
    assert reference.ceilings["mean_image"] == pytest.approx(ceiling.item(), rel=1e-9)


def test_a_file_gives_back_the_reference_to_half_precision(train, extractor, tmp_path):
    reference = make_reference(train, extractor)
    save_reference(reference, tmp_path / "new" / "r.npz")
    again = load_reference(tmp_path / "new" / "r.npz")
    assert (again.dataset, again.classes) == (reference.dataset, reference.classes)
    assert again.floors == () and torch.equal(again.labels, reference.labels)
    assert again.features.dtype == torch.float32 and again.mean.dtype == torch.float64
    assert torch.allclose(again.features, reference.features, rtol=1e-3, atol=1e-6)
    # The statistics are those of the exact features, not of the rounded ones.
    assert torch.allclose(again.covariance, reference.covariance, rtol=1e-6, atol=1e-12)
    distance = frechet_distance(again.statistics, reference.statistics)
    assert abs(distance) < 1e-6 * reference.covariance.trace()
    for name, value in reference.ceilings.items():
        assert again.ceilings[name] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("damage", ["missing", "short", "foreign", "no fields", "old fields"])
def test_what_is_no_reference_is_bad_input(damage, train, extractor, tmp_path, bad_input):
    path = tmp_path / "r.npz"
    reference = make_reference(train, extractor)
    if damage == "short":
        save_reference(reference, path)
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        np.savez(path, images=np.zeros(3))
    elif damage == "no fields":
        np.savez(path, fields=np.array("{}"), features=np.zeros((3, 2)))
    elif damage == "old fields":
        save_reference(reference, path)
        with np.load(path) as file:
            arrays = dict(file)
        fields = json.loads(str(arrays["fields"]))
        del fields["floors"]
        arrays["fields"] = np.array(json.dumps(fields))
        np.savez(path, **arrays)
    with bad_input(str(path), "does not exist" if damage == "missing" else "no whole reference"):
        load_reference(path)


def test_a_reference_that_cannot_be_written_leaves_nothing(train, extractor, tmp_path, bad_input):
    (tmp_path / "file").write_text("in the way")
    with bad_input("cannot write"):
        save_reference(make_reference(train, extractor), tmp_path / "file" / "r.npz")
    assert [p.name for p in Path(tmp_path).glob("**/*.partial")] == []
