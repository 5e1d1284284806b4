"""Mistakes: the changed images against closed forms, the distances against the floor, records."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import papermill
import pytest
import torch
from conftest import PER_CLASS, cells, write_split
from PIL import Image

from evaluation import copies, figures, mistakes
from evaluation.features import extract
from evaluation.mistakes import (
    augmented_reference,
    evaluations_as_runs,
    load_setup,
    measure,
    originals,
    recoded,
    reference_split,
    resize,
    resized,
    sample_size,
    through_jpeg,
    value_range,
    value_ranges,
)
from utils import PBC_CLASSES, PBC_FOLDER, InputError, exit_on_bad_input, load_dataset

N = 40
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "how_to_read_the_numbers.ipynb"


@pytest.fixture(scope="module")
def setup(data_root, tiny_extractor):
    return load_setup(data_root, tiny_extractor, "cpu", n=N)


@pytest.fixture(scope="module")
def pbc_root(tmp_path_factory) -> Path:
    """PBC files of 200 pixels, and a bloodmnist.npz made from them as the real one was."""
    root = tmp_path_factory.mktemp("pbc")
    lines, arrays = [], {}
    for seed, (split, n) in enumerate(PER_CLASS.items()):
        labels = np.repeat(np.arange(8), n)
        for index, (image, label) in enumerate(zip(cells(labels, 28, seed), labels)):
            name = f"{PBC_CLASSES[label]}/BA_{1000 * seed + index}.jpg"
            path = root / PBC_FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(image).resize((200, 200), Image.Resampling.BICUBIC)
            picture.save(path, quality=95)
            lines.append({"split": split, "index": str(index), "file": name})
    write_split(root, lines)
    for split in PER_CLASS:
        data = load_dataset("pbc", root, 28, split)
        stored = mistakes.as_the_data(data.images)
        arrays[f"{split}_images"] = stored.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = data.labels.numpy().astype(np.uint8)[:, None]
    np.savez_compressed(root / "bloodmnist.npz", **arrays)
    return root


def ramp() -> torch.Tensor:
    """Every value from 0 to 255, uint8 [1, 3, 16, 16]."""
    return torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)


def values(record: dict) -> dict[str, float]:
    return {row["name"]: row["value"] for row in record["rows"]}


# ---------------------------------------------------------------------------------------------
# Mistakes in the images
# ---------------------------------------------------------------------------------------------


def test_value_ranges_are_the_closed_forms():
    v = ramp().double()
    right, unit, clipped, scaled_twice = value_ranges(ramp()).values()
    assert torch.equal(right, ramp())
    assert (unit - (v / 2 + 127.5)).abs().max() <= 0.5
    assert torch.equal(clipped.double(), (2 * v - 255).clamp(min=0))
    # What a tanh can reach of [-3, 1] is the very same picture.
    assert torch.equal(scaled_twice, clipped)


def test_right_images_have_exactly_the_floor_and_wrong_ones_lie_above(setup):
    record = value_range(setup)
    right, *wrong = values(record).values()
    assert right == record["floor"]
    assert right == pytest.approx(setup.distance(extract(setup.cells, setup.extractor)), rel=1e-4)
    assert all(value > right + 2 * record["floor_sd"] for value in wrong)
    assert (record["n_real"], record["n_fake"]) == (160, N)


def test_jpeg_errors_grow_as_quality_falls(setup):
    lossless, *lossy = recoded(setup.cells).values()
    assert torch.equal(lossless, setup.cells)
    errors = [(part.float() - setup.cells).abs().mean() for part in lossy]
    assert 0 < errors[0] < errors[1] < errors[2]
    record = mistakes.jpeg(setup)
    assert record["rows"][0]["value"] == record["floor"]


def test_blur_keeps_the_mean_and_takes_the_edges(setup):
    sharp, *soft = mistakes.softened(setup.cells).values()
    assert torch.equal(sharp, setup.cells)

    def edges(images):
        return (images[..., 1:].float() - images[..., :-1].float()).abs().mean().item()

    sizes = [edges(images) for images in (sharp, *soft)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.8 * sizes[0]
    for images in soft:
        assert abs(images.float().mean() - sharp.float().mean()) < 2


def test_softness_tells_the_scores_of_unchanged_cells_first(setup):
    record = mistakes.softness(setup)
    row = record["rows"][0]
    features, train = setup.held_out_features[setup.rows], setup.reference.features
    assert row["value"] == record["floor"]
    assert row["authpct"] == pytest.approx(copies.authpct(features, train))
    assert record["n_control"] == len(setup.held_out) - len(setup.rows)
    assert all(0 <= row["train_share"] <= 1 for row in record["rows"])


def test_too_few_other_cells_are_bad_input(data_root, tiny_extractor, tmp_path):
    every = load_setup(data_root, tiny_extractor, "cpu", n=10**6)
    with pytest.raises(InputError, match="there are only 0, and 20 are needed"):
        mistakes.measure(mistakes.typicality, every, tmp_path)
    assert not list(tmp_path.iterdir())


def test_cells_of_the_usual_kind_pass_for_copies_by_two_scores_and_not_by_the_third():
    """Normal draws, half of them from the middle of the others' distribution."""
    generator = torch.Generator().manual_seed(0)
    train, control, usual, odd = (
        scale * torch.randn(n, 8, generator=generator)
        for n, scale in ((800, 1.0), (200, 1.0), (150, 0.4), (150, 1.5))
    )
    setup = SimpleNamespace(
        reference=SimpleNamespace(features=train),
        other_features=torch.cat([odd, usual]),
        held_out_features=control,
        rows=torch.arange(200),
        seed=0,
    )
    record = mistakes.typicality(setup)
    assert (record["n_fake"], record["n_control"]) == (150, 200)
    _, typical, least = record["rows"]
    assert typical["authpct"] < least["authpct"] - 20 and typical["ct"] < -3 < 3 < least["ct"]
    low, high = typical["train_share_interval"]
    assert low < 0.5 < high


def test_jpeg_keeps_even_grey():
    images = torch.full((2, 3, 28, 28), 128, dtype=torch.uint8)
    assert torch.equal(through_jpeg(images, 50), images)


def test_most_real_cells_made_again_from_their_originals_are_the_same_to_the_bit(real_data_root):
    """So the resize and the JPEG, with its way to halve colours, are the data set's own."""
    train, held_out = (
        load_dataset("bloodmnist", real_data_root, 28, s) for s in ("train", "held_out")
    )
    setup = mistakes.Setup(train, held_out, torch.arange(40), None, real_data_root, 0)
    try:
        images = mistakes.originals(setup)
    except InputError as error:
        pytest.skip(f"no originals beside the data set: {error}")
    small = mistakes.resized(images, 28)
    cells = setup.cells
    same = {name: (part == cells).flatten(1).all(1).float().mean() for name, part in small.items()}
    assert same.pop("bilinear, antialiased") > 0.6
    assert not any(same.values())


def test_stripes_vanish_with_antialiasing_and_do_not_without():
    """Stripes of period 4 on a quarter of the pixels: the truth is an even grey."""
    stripes = torch.zeros(1, 3, 112, 112, dtype=torch.uint8)
    stripes[..., 1::4] = stripes[..., 2::4] = 255
    inner = {name: part[..., 4:-4, 4:-4].float() for name, part in resized(stripes, 28).items()}
    for name in ("bilinear, antialiased", "bilinear, antialiased, no JPEG", "box"):
        assert (inner[name] - 127.5).abs().max() < 3, name
    for name in ("bilinear, not antialiased", "nearest"):
        assert inner[name].min() > 252, name


def test_the_data_sets_own_resize_has_exactly_the_floor(pbc_root, tiny_extractor):
    setup = load_setup(pbc_root, tiny_extractor, "cpu", n=N)
    record = resize(setup)
    assert values(record)["bilinear, antialiased"] == record["floor"]
    assert values(record)["nearest"] != record["floor"]
    assert torch.equal(originals(setup, 3), originals(setup)[:3])


def test_originals_that_are_missing_or_of_other_cells_are_bad_input(
    setup, pbc_root, tiny_extractor, tmp_path, bad_input
):
    with bad_input(PBC_FOLDER, "pbc_split.csv"):
        originals(setup)
    (tmp_path / PBC_FOLDER).symlink_to(pbc_root / PBC_FOLDER)
    (tmp_path / "bloodmnist.npz").symlink_to(pbc_root / "bloodmnist.npz")
    foreign = load_setup(tmp_path, tiny_extractor, "cpu", n=N)
    with bad_input("pbc_split.csv", "get the file"):  # without it, PBC is split in another way
        originals(foreign)
    header, *lines = (pbc_root / "pbc_split.csv").read_text().splitlines()
    mixed = [line.replace("test,0,", "test,39,", 1) for line in lines if "test,39," not in line]
    files = {line.split(",")[2] for line in mixed}
    left_out = next(line for line in lines if line.split(",")[2] not in files)
    mixed.append(left_out.replace("test,39,", "test,0,"))
    (tmp_path / "pbc_split.csv").write_text("\n".join([header, *mixed]) + "\n")
    all_cells = load_setup(tmp_path, tiny_extractor, "cpu")
    with bad_input("does not belong", "is another"):
        originals(all_cells)


# ---------------------------------------------------------------------------------------------
# Mistakes in the comparison
# ---------------------------------------------------------------------------------------------


def test_sample_size_finds_the_slope_of_gaussian_features(monkeypatch):
    """For D standard normals the bias is D / n of the mean and D (D + 1) / 4n of the covariance."""
    monkeypatch.setattr(mistakes, "SIZES", (100, 200, 400, 1000))
    monkeypatch.setattr(mistakes, "DRAWS", 10)
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randn(n, 8, generator=generator) for n in (2000, 1000))
    setup = SimpleNamespace(
        train=train,
        held_out_features=held_out,
        reference=SimpleNamespace(features=train),
        extractor=SimpleNamespace(dim=8),
        seed=0,
    )
    record = sample_size(setup)
    assert record["fit"]["slope"] == pytest.approx(8 + 8 * 9 / 4, rel=0.2)
    assert abs(record["fit"]["intercept"] - 26 / 1000) < 0.02  # what the held-out side adds
    distances = list(values(record).values())
    assert distances == sorted(distances, reverse=True)
    assert all(abs(row["kid"]) < 3 * row["kid_sd"] for row in record["rows"][:3])


def test_sample_size_of_cells(setup, bad_input, monkeypatch):
    record = sample_size(setup)
    assert record["n_fake"] == [16, 50, 160]
    assert record["rows"][0]["value"] > record["rows"][-1]["value"]
    # All draws of all train cells are the same set.
    assert record["rows"][-1]["sd"] == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(mistakes, "SIZES", (4, 16))
    with bad_input("160 train cells", "too few"):
        sample_size(setup)


def test_turns_change_nothing_where_cells_look_the_same_all_around(setup):
    colours = setup.train.images.float().mean((2, 3), keepdim=True).to(torch.uint8)
    flat = dataclasses.replace(setup.train, images=colours.expand(-1, -1, 28, 28).contiguous())
    as_they_are, turned = values(
        augmented_reference(dataclasses.replace(setup, train=flat))
    ).values()
    assert turned == as_they_are


def test_turned_reference_is_of_the_same_cells(setup):
    record = augmented_reference(setup)
    as_they_are, turned = values(record).values()
    assert record["floor"] == as_they_are != turned
    assert record["n_real"] == len(setup.held_out)
    assert augmented_reference(setup) == record


def test_images_of_the_held_out_cells_are_judged_as_they_are(setup):
    record = reference_split(setup, setup.held_out.images)
    rows = {(r["subject"], r["split"], r["equal_n"]): r for r in record["rows"]}
    assert len(rows) == len(record["rows"]) == 16
    for (subject, split, equal), row in rows.items():
        other = rows["held-out real cells", split, equal]
        assert row["value"] == other["value"], subject
        assert row["n_real"] == (24 if equal else record["n_real"][split])
    assert record["n_real"] == {"train": 160, "validation": 24, "test": 40, "all": 224}
    generated = rows["generated", "train", False]["value"]
    assert generated == setup.distance(setup.held_out_features)


def test_equal_sets_have_no_spread_and_others_do(setup, bad_input):
    same = setup.cells.expand(3, -1, -1, -1, -1)
    others = torch.stack(list(value_ranges(setup.cells).values()))[:2]
    record = evaluations_as_runs(setup, same, others)
    spreads = record["spreads"]
    assert spreads["evaluations of one training"]["sd"] == 0
    assert spreads["evaluations of one training"]["mean"] == pytest.approx(record["floor"])
    first, second = (r["value"] for r in record["rows"] if r["kind"] == "trainings")
    assert spreads["trainings"]["sd"] == pytest.approx(abs(first - second) / 2**0.5)
    with bad_input("at least two trainings", "got 1"):
        evaluations_as_runs(setup, same, others[:1])


# ---------------------------------------------------------------------------------------------
# Records, figures, command line, notebook
# ---------------------------------------------------------------------------------------------


def counted(calls: list):
    """An experiment that notes its calls."""

    def experiment(setup, *images):
        calls.append(len(images))
        return {"what": "nothing", "rows": []}

    return experiment


def test_a_finished_record_is_read_and_one_of_other_facts_made_anew(setup, tmp_path):
    calls = []
    experiment = counted(calls)
    record = measure(experiment, setup, tmp_path)
    assert record["dataset_sha256"] == load_dataset("bloodmnist", setup.data_root).sha256()
    assert record["extractor_sha256"] == setup.extractor.sha256
    assert json.loads((tmp_path / "experiment.json").read_text()) == record
    assert measure(experiment, setup, tmp_path) == record and calls == [0]
    measure(experiment, setup, tmp_path, setup.cells)
    measure(experiment, setup, tmp_path, setup.cells)
    assert calls == [0, 1]
    measure(experiment, setup, tmp_path, setup.cells.flip(0))
    measure(experiment, dataclasses.replace(setup, seed=1), tmp_path)
    assert calls == [0, 1, 1, 0]
    (tmp_path / "experiment.json").write_text("{")
    measure(experiment, setup, tmp_path)
    assert calls == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("fact", ["dataset_sha256", "held_out_sha256", "extractor_sha256"])
def test_a_record_of_other_data_or_another_network_is_not_overwritten(
    fact, setup, tmp_path, bad_input
):
    record = measure(counted([]), setup, tmp_path)
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(record | {fact: "0" * 64}))
    before = path.read_text()
    with bad_input(str(path), "would be overwritten", "folder of its own"):
        measure(counted([]), setup, tmp_path)
    assert path.read_text() == before


def test_no_distance_is_taken_of_too_few_cells_for_the_network(
    setup, data_root, tiny_extractor, bad_input
):
    least = int(1.5 * setup.extractor.dim) + 1
    assert len(load_setup(data_root, tiny_extractor, "cpu", n=least - 5).rows) == least
    with bad_input("held-out cells are too few", "64 dimensions", "97"):
        load_setup(data_root, "demo", "cpu")
    wide = dataclasses.replace(setup.extractor, dim=30)
    with bad_input("the validation split has 24 cells", "30 dimensions", "46"):
        reference_split(dataclasses.replace(setup, extractor=wide), setup.held_out.images)


def test_figures_show_the_records_values(setup, tmp_path):
    record = measure(value_range, setup, tmp_path)
    figure = figures.mistake_bars(record, value_ranges(setup.cells[:3]))
    axis, *strips = figure.axes
    values = [row["value"] for row in record["rows"]]
    assert len(strips) == len(values)
    near = [{"name": str(k), "value": record["floor"] * k} for k in (1, 2)]
    far = [*near, {"name": "far", "value": record["floor"] * 11}]
    (bars,) = figures.mistake_bars(record | {"rows": near}).axes
    # After the band of the floor.
    assert [bar.get_width() for bar in bars.patches[1:]] == [row["value"] for row in near]
    (dots,) = figures.mistake_bars(record | {"rows": far}).axes
    assert dots.get_xscale() == "log" and bars.get_xscale() == "linear"
    shown = [list(line.get_xdata()) for line in dots.lines if line.get_marker() == "o"]
    assert shown == [[row["value"] for row in far]]
    sizes = measure(sample_size, setup, tmp_path)
    left = figures.sample_size(sizes).axes[0]
    assert left.get_xscale() == left.get_yscale() == "log"
    splits = measure(reference_split, setup, tmp_path, setup.held_out.images)
    for axis, equal in zip(figures.reference_split(splits).axes, (False, True)):
        shown = [value for line in axis.lines for value in line.get_ydata()]
        kept = [row["value"] for row in splits["rows"] if row["equal_n"] == equal]
        assert sorted(shown) == sorted(kept)
    sets = torch.stack([setup.cells, setup.cells.flip(3)])
    spread = measure(evaluations_as_runs, setup, tmp_path, sets, sets)
    text = [t.get_text() for t in figures.evaluations_and_trainings(spread).axes[0].texts]
    assert text == [f"sd {part['sd']:.1f}" for part in spread["spreads"].values()]


def test_command_line_keeps_what_it_could_measure(data_root, tiny_extractor, tmp_path, capsys):
    arguments = ["--data-root", data_root, "--extractor", tiny_extractor, "--out", tmp_path]
    with pytest.raises(SystemExit) as stopped, exit_on_bad_input():
        mistakes.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert [line for line in shown.err.splitlines() if line.startswith("error: ")] == [
        shown.err.splitlines()[-1]
    ]
    assert PBC_FOLDER in shown.err.splitlines()[-1]
    found = sorted(path.stem for path in tmp_path.glob("*.json"))
    assert found == ["augmented_reference", "jpeg", "sample_size", "value_range"]
    assert "value_range: Held-out real cells" in shown.out


@pytest.mark.parametrize("arguments", [["--wrong"], ["--data-root", "nowhere"]])
def test_bad_input_ends_with_one_sentence(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)  # no download
    with pytest.raises(SystemExit) as stopped, exit_on_bad_input():
        mistakes.main(arguments)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_notebook_runs_without_a_trained_generator(pbc_root, tiny_extractor, tmp_path):
    parameters = {
        "data_root": str(pbc_root),
        "extractor": str(tiny_extractor),
        "runs": str(tmp_path / "no runs"),
        "out": str(tmp_path / "numbers"),
        "device": "cpu",
    }
    papermill.execute_notebook(
        NOTEBOOK, tmp_path / "executed.ipynb", parameters, cwd=NOTEBOOK.parent, progress_bar=False
    )
    pictures = sorted(path.name for path in (tmp_path / "numbers").glob("*.png"))
    assert pictures == [
        "augmented_reference.png",
        "jpeg.png",
        "resize.png",
        "sample_size.png",
        "value_range.png",
    ]


def test_storing_alike_helps_images_that_lack_the_format_alone(setup, tmp_path):
    """Cells of the data set itself are stored already: once more changes them little."""
    record = mistakes.measure(mistakes.stored_alike, setup, tmp_path, setup.cells)
    before, after = (row["value"] for row in record["rows"])
    assert before == record["floor"]
    blurred = mistakes.through_jpeg(setup.cells, 5)
    coarse = mistakes.stored_alike(setup, blurred)["rows"][0]["value"]
    assert abs(after - before) < coarse - before
