"""The domain extractor: its training on tiny data, its export, and the file that is shipped."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation import make_domain_extractor
from evaluation.agreement import classifier_agreement, load_domain_classifier
from evaluation.features import extract, load_extractor
from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.make_demo_extractor import export
from evaluation.make_domain_extractor import (
    FEATURES,
    FOLDER,
    SIZE,
    ConvNorm,
    DomainExtractor,
    HalfConv,
    fold,
    load_sources,
    measure,
    train_extractor,
)
from utils import BLOOD_CLASSES, SPLITS, ImageSet, load_dataset, to_model_range

RECORD = json.loads((FOLDER / "domain_extractor.json").read_text())

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:FutureWarning")


def noise(n: int, *size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, *size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def trained(data_root) -> DomainExtractor:
    torch.manual_seed(0)
    return train_extractor([load_dataset("bloodmnist", data_root)], epochs=1)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "tiny.pt"
    path.write_bytes(export(torch.jit.script(trained)))
    return load_extractor(path)


def test_export_computes_the_same(trained, exported):
    for images in (noise(5, 28, 28), noise(5, 64, 64)):
        features = extract(images, exported, cache=False)
        assert features.shape == (5, FEATURES)
        with torch.no_grad():
            expected = trained(images)
            torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
            logits = exported.module.logits(features)
            torch.testing.assert_close(logits, trained.head(features))


def test_the_same_seed_gives_the_same_file(trained, data_root):
    torch.manual_seed(0)
    again = train_extractor([load_dataset("bloodmnist", data_root)], epochs=1)
    assert export(torch.jit.script(again)) == export(torch.jit.script(trained))


def test_training_uses_every_source():
    """One source holds each class; only a network that saw both tells them apart."""
    torch.manual_seed(0)
    dark = ImageSet("dark", "train", noise(64, 28, 28) // 4, torch.zeros(64).long(), ())
    bright = ImageSet("bright", "train", 255 - noise(64, 64, 64) // 4, torch.ones(64).long(), ())
    extractor = train_extractor([dark, bright], epochs=8)
    assert measure(extractor, dark)["accuracy"] == 1
    assert measure(extractor, bright)["accuracy"] == 1


def test_folding_keeps_the_features():
    torch.manual_seed(0)
    extractor = DomainExtractor()
    with torch.no_grad():
        for _ in range(3):
            extractor(noise(16, SIZE, SIZE))  # moves the running statistics away from 0 and 1
        expected = extractor.eval()(noise(4, SIZE, SIZE))
        features = fold(extractor)(noise(4, SIZE, SIZE))
    assert not any(isinstance(module, ConvNorm) for module in extractor.modules())
    assert features.dtype == torch.float32
    # float16 has 11 significant bits.
    torch.testing.assert_close(features, expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_half_weights_are_used_in_float32():
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
    half = HalfConv(convolution)
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float16}
    images = torch.randn(2, 3, 9, 9) * 1e5  # beyond the range of float16
    weight, bias = (p.detach().half().float() for p in convolution.parameters())
    assert torch.equal(half(images), F.conv2d(images, weight, bias, stride=2, padding=1))


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (128, 128), (200, 90), (1, 1)])
def test_images_of_any_size(size):
    """A plain colour has the same features at every size."""
    extractor = load_extractor("domain").module
    colour = torch.tensor([200, 90, 160], dtype=torch.uint8)[:, None, None]
    with torch.inference_mode():
        expected = extractor(colour.expand(1, 3, SIZE, SIZE))
        torch.testing.assert_close(extractor(colour.expand(1, 3, *size)), expected)


def test_resize_leaves_images_of_the_working_size_alone():
    images = noise(3, SIZE, SIZE)
    assert torch.equal(DomainExtractor().resize(images), to_model_range(images))


def test_sources_are_the_same_cells_at_two_sizes(pbc_folder, empty_cache):
    arrays = {}
    for split in SPLITS:
        cells = load_dataset("pbc", pbc_folder, 28, split)
        arrays[f"{split}_images"] = cells.images.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = cells.labels.numpy()[:, None]
    np.savez(pbc_folder / "bloodmnist.npz", **arrays)
    small, large = load_sources(pbc_folder, "train")
    assert (small.images.shape, large.images.shape) == ((16, 3, 28, 28), (16, 3, 64, 64))
    assert torch.equal(small.labels, large.labels)


def test_sources_of_different_splits_are_refused(pbc_folder, tiny_arrays, empty_cache, bad_input):
    np.savez(pbc_folder / "bloodmnist.npz", **tiny_arrays)
    with bad_input("train splits of BloodMNIST and PBC hold different cells", "pbc_split.csv"):
        load_sources(pbc_folder, "train")


def test_missing_data_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_domain_extractor", "--data-root", str(tmp_path)])
    monkeypatch.setattr(make_domain_extractor, "SOURCES", (("pbc", 64),))
    with pytest.raises(SystemExit) as stopped:
        make_domain_extractor.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: neither PBC_dataset_normal_DIB")


# ---------------------------------------------------------------------------------------------
# The file that is shipped
# ---------------------------------------------------------------------------------------------


def test_record_belongs_to_the_file():
    data = (FOLDER / RECORD["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == RECORD["sha256"] == load_extractor("domain").sha256
    assert len(data) < 3_000_000
    assert RECORD["features"] == load_extractor("domain").dim
    assert tuple(RECORD["classes"]) == BLOOD_CLASSES
    assert {part["split"] for part in RECORD["train"]} == {"train"}
    for split in ("val", "test"):
        assert {part["split"] for part in RECORD[split]} == {split}


def test_features_of_an_image_do_not_depend_on_its_batch():
    extractor = load_extractor("domain")
    images = noise(9, 28, 28)
    together = extract(images, extractor, cache=False)
    alone = torch.cat([extract(image[None], extractor, cache=False) for image in images])
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_float_images_are_refused_by_the_file_itself():
    with pytest.raises(torch.jit.Error, match="expected uint8 images"):
        load_extractor("domain").module(noise(2, 28, 28).float())


@pytest.fixture(scope="module")
def real_cells(real_data_root) -> ImageSet:
    """The 28-pixel test cells that the record's accuracy was measured on."""
    cells = load_dataset("bloodmnist", real_data_root, 28, "test")
    if cells.sha256() != RECORD["test"][0]["sha256"]:
        pytest.skip(f"{os.fspath(real_data_root)} holds other test cells than the record's")
    return cells


def test_accuracy_on_real_cells_is_the_recorded_one(real_cells):
    result = classifier_agreement(
        real_cells.images[:500], real_cells.labels[:500], real_cells, load_domain_classifier()
    )
    recorded = RECORD["test"][0]
    assert result["real"]["n"] == recorded["n"]
    # Another machine's rounding may move a cell that lies between two classes.
    assert abs(result["real"]["agreement"] - recorded["accuracy"]) <= 2 / recorded["n"]
    low, high = result["interval"]
    assert low <= recorded["accuracy"] <= high


def test_colour_errors_are_seen(real_cells):
    """A cast of 12 levels outweighs the distance of two sets of real cells."""
    extractor = load_extractor("domain")
    first, second = real_cells.images[:1000], real_cells.images[1000:2000]
    cast = second.int() + torch.tensor([12, 0, -12])[:, None, None]
    reference, plain, tinted = (
        gaussian_statistics(extract(images, extractor, cache=False))
        for images in (first, second, cast.clamp(0, 255).to(torch.uint8))
    )
    assert frechet_distance(tinted, reference) > 2 * frechet_distance(plain, reference)
