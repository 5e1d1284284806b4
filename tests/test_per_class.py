"""Each class against its own cells: counts, known distances, the published protocol, the table."""

import dataclasses
import json
import statistics

import pytest
import torch
from test_features import Small, script

from evaluation import figures, per_class
from evaluation.features import extract, load_extractor
from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.kid import kernel_distance
from evaluation.protocol import Protocol, measure
from utils import ImageSet, class_balanced_labels, make_grid

CLASSES = ("round", "long")
COUNTS = {"train": (40, 9), "held_out": (20, 8)}  # nine cells are too few for a Fréchet distance


def pictures(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Noise, darker for the second class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(labels), 3, 28, 28), generator=generator, dtype=torch.uint8)
    return images // (1 + labels)[:, None, None, None].to(torch.uint8)


@pytest.fixture
def sets() -> dict[str, ImageSet]:
    parts = {}
    for seed, (split, counts) in enumerate(COUNTS.items()):
        labels = torch.arange(2).repeat_interleave(torch.tensor(counts))
        parts[split] = ImageSet("cells", split, pictures(labels, seed), labels, CLASSES)
    return parts


@pytest.fixture
def extractor(tmp_path, empty_cache):
    """Four dimensions, so that seven images are enough for a Fréchet distance."""
    torch.manual_seed(0)
    return load_extractor(script(Small(), tmp_path / "small.pt"))


@pytest.fixture
def eight(extractor):
    """The same with eight dimensions, so that a Fréchet distance needs thirteen images."""
    module = extractor.module

    class Twice(torch.nn.Module):
        def forward(self, images):
            features = module(images)
            return torch.cat([features, features.square()], dim=1)

    return dataclasses.replace(extractor, module=Twice(), dim=8, sha256="8" * 64)


def draw(n: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    labels = class_balanced_labels(2, n)
    return pictures(labels, seed), labels


def rows(record: dict) -> list[dict]:
    assert [row["class"] for row in record["per_class"]] == list(CLASSES)
    return record["per_class"]


def test_metrics_are_those_of_each_class_alone(sets, extractor):
    images, labels = draw(30)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    record = per_class.evaluate_per_class(images[order], labels[order], sets, extractor)
    real, held_out, fake = (
        extract(part, extractor)
        for part in (sets["train"].images, sets["held_out"].images, images[order])
    )
    for label, row in enumerate(rows(record)):
        own = real[sets["train"].labels == label]
        other = held_out[sets["held_out"].labels == label]
        expected, warnings = measure(own, fake[labels[order] == label])
        for name in ("kid", "kid_standard_error", "frechet_distance", "precision", "recall"):
            assert row[name] == pytest.approx(expected[name], rel=1e-6), name
        assert row["warnings"] == warnings
        assert (row["n_real"], row["n_fake"]) == (COUNTS["train"][label], 30)
        kid, error = kernel_distance(own, other)
        assert row["floor"] == pytest.approx(
            {"n": COUNTS["held_out"][label], "kid": kid, "kid_standard_error": error}, rel=1e-6
        )
    json.dumps(record)  # plain types


def test_too_few_real_cells_have_no_distance_and_a_reason(sets, eight):
    record = per_class.evaluate_per_class(*draw(30), sets, eight)
    many, few = rows(record)
    assert many["frechet_distance"] > 0
    assert few["frechet_distance"] is None and few["kid"] is not None
    assert any("no Fréchet distance: n = 9" in warning for warning in few["warnings"])
    mean = record["mean"]
    assert mean["frechet_distance"] == {"value": many["frechet_distance"], "classes": 1}
    both = (many["kid"] + few["kid"]) / 2
    assert mean["kid"] == {"value": pytest.approx(both), "classes": 2}


def test_more_real_cells_than_the_limit_are_drawn_at_random(sets, extractor, monkeypatch):
    monkeypatch.setattr(per_class, "N", 12)
    first, _ = rows(per_class.evaluate_per_class(*draw(30), sets, extractor))
    assert (first["n_real"], first["published"]["n"]) == (12, 12)
    again, _ = rows(per_class.evaluate_per_class(*draw(30), sets, extractor))
    assert again == first
    everything = torch.arange(40.0)[:, None]
    drawn = per_class._draw(everything, 12).flatten().tolist()
    assert len(set(drawn)) == 12 and drawn != list(range(12))
    assert sorted(per_class._draw(everything, 99).flatten().tolist()) == list(range(40))


def test_the_published_protocol_takes_cells_of_all_splits_and_any_number(sets, eight):
    """Few enough to make every draw the whole: its distance is then known."""
    images, labels = draw(100)
    record = per_class.evaluate_per_class(images, labels, sets, eight)
    fake = extract(images, eight)
    for label, (row, n) in enumerate(zip(rows(record), (60, 17), strict=True)):
        parts = [extract(sets[split].images[sets[split].labels == label], eight) for split in sets]
        expected = frechet_distance(
            gaussian_statistics(torch.cat(parts)), gaussian_statistics(fake[labels == label][:n])
        )
        assert row["published"] == {"n": n, "frechet_distance": pytest.approx(expected, rel=1e-6)}
    assert record["mean"]["published"]["classes"] == 2
    assert record["published_protocol"]["n_real"] == record["published_protocol"]["n_fake"] == 77


def test_copies_of_the_cells_have_no_distance_under_the_published_protocol(sets, extractor):
    """A generator that hands out its training cells is perfect there, and only there."""
    whole = [torch.cat([getattr(sets[s], part) for s in sets]) for part in ("images", "labels")]
    some = torch.cat([torch.nonzero(whole[1] == label).flatten()[:17] for label in range(2)])
    record = per_class.evaluate_per_class(whole[0][some], whole[1][some], sets, extractor)
    _, few = rows(record)
    assert few["published"] == {"n": 17, "frechet_distance": pytest.approx(0, abs=1e-6)}
    assert few["frechet_distance"] > 1e-4


def test_the_two_protocols_have_different_keys_and_name_what_differs(sets, extractor):
    record = per_class.evaluate_per_class(*draw(30), sets, extractor)
    own, published = Protocol(**record["protocol"]), Protocol(**record["published_protocol"])
    assert own.key() != published.key()
    assert (own.reference_split, published.reference_split) == ("train", "train and held_out")
    assert (own.n_real, own.n_fake) == (49, 60)
    for protocol in (own, published):
        assert protocol.extractor_sha256 == extractor.sha256 and protocol.image_size == 28
        assert protocol.dataset_sha256 == sets["train"].sha256()
    assert record["distance_name"] == extractor.distance_name


@pytest.mark.parametrize("labels", [[0, 0, 1], [0, 0, 0], [0, 1], [0, 0, 1, 1, 2, 2]])
def test_other_numbers_of_images_are_bad_input(labels, sets, extractor, bad_input):
    labels = torch.tensor(labels)
    with bad_input("as many images of each class of cells (2)", "class_balanced_labels"):
        per_class.evaluate_per_class(pictures(labels % 2, 0), labels, sets, extractor)


def test_images_of_another_size_are_bad_input(sets, extractor, bad_input):
    images, labels = draw(4)
    with bad_input("[8, 3, 14, 14]", "draw one of that size"):
        per_class.evaluate_per_class(images[:, :, ::2, ::2], labels, sets, extractor)


def cells_of(table: str) -> dict[str, list[str]]:
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_the_table_shows_both_protocols_under_their_names(sets, eight):
    record = per_class.evaluate_per_class(*draw(30), sets, eight)
    text = per_class.per_class_markdown(record)
    table = cells_of(text)
    many, few = rows(record)
    header = table["Class"]
    assert header[4] == "FD (small)" and header[-1] == "FD (small), published protocol"
    assert table["round"][0] == "40" and table["long"][0] == "9"
    assert table["round"][4] == f"{many['frechet_distance']:.1f}" and table["long"][4] == "–"
    assert table["long"][-1] == f"{few['published']['frechet_distance']:.1f}"
    assert table["**mean**"][4].endswith("(n = 1)")
    for key in ("protocol", "published_protocol"):
        assert Protocol(**record[key]).key() in text


def test_several_trainings_share_a_table_of_means_and_deviations(sets, eight, bad_input):
    pair = [per_class.evaluate_per_class(*draw(30, seed), sets, eight) for seed in (7, 8)]
    text = per_class.trainings_markdown(pair)
    table = cells_of(text)

    def shown(values: list[float], mean_format: str, sd_format: str) -> str:
        return f"{statistics.mean(values):{mean_format}} ± {statistics.stdev(values):{sd_format}}"

    for many, other in zip(*(rows(record) for record in pair)):
        cells = table[many["class"]]
        both = [row["published"]["frechet_distance"] for row in (many, other)]
        assert cells[0] == f"{many['n_real']:,}" and cells[-2] == f"{many['published']['n']:,}"
        assert cells[-1] == shown(both, ".1f", ".1f")
        assert (cells[2] == "–") == (many["frechet_distance"] is None)
    kid = [record["mean"]["kid"]["value"] for record in pair]
    assert table["**mean**"][1] == shown(kid, ".4g", ".2g")
    assert "over 2 trainings, 30 images of each class" in text
    assert "(small) is of the 1 classes that have it" in text
    with bad_input("different protocols"):
        fewer = per_class.evaluate_per_class(*draw(20), sets, eight)
        per_class.trainings_markdown([pair[0], fewer])


def test_published_numbers_stand_only_beside_fids_of_the_same_data(sets, extractor):
    cells = dict.fromkeys(per_class.PUBLISHED_FID)
    record = per_class.evaluate_per_class(*draw(30), sets, extractor)
    record["per_class"] = [record["per_class"][0] | {"class": name} for name in cells]
    assert "as published" not in per_class.per_class_markdown(record)
    record["distance_name"] = "FID"
    record["protocol"] |= {"dataset": "PBC", "image_size": 128}
    table = cells_of(per_class.per_class_markdown(record))
    assert table["Class"][-1] == "FID as published"
    assert table["platelet"][-1] == "129.0"
    assert table["**mean**"][-1] == "111.5"


def test_the_table_of_digits_speaks_of_digits(sets, eight):
    record = per_class.evaluate_per_class(*draw(10), sets, eight)
    text = per_class.per_class_markdown(record)
    assert "KID, held-out cells" in text and "digit" not in text
    record["protocol"]["dataset"] = "MNIST (test digits)"
    text = per_class.per_class_markdown(record)
    assert "KID, held-out digits" in text and "cell" not in text


def test_the_figure_shows_the_first_images_of_each_class_with_their_distances(sets, eight):
    images, labels = draw(10)
    record = per_class.evaluate_per_class(images, labels, sets, eight)
    figure = figures.real_and_generated_by_class(record, sets["held_out"], images, labels)
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == [
        f"{row['class']}, {row['n_real']} real\n"
        f"KID {row['kid']:.3g}, of real ones {row['floor']['kid']:.2g}"
        for row in rows(record)
    ]
    assert right.get_title() == "generated, n = 10 of each class"
    real = sets["held_out"].images
    pairs = ((left, [real[:8], real[20:28]]), (right, [images[:8], images[10:18]]))
    for axis, pictured in ((axis, torch.cat(parts)) for axis, parts in pairs):
        expected = make_grid(pictured, columns=8, zoom=4)
        assert axis.images[0].get_array().tolist() == expected.tolist()
