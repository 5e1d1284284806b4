"""`python -m evaluation`: folders and archives of images, references, the table, bad input."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.__main__ import floor_at, load_images, main
from evaluation.features import DOMAIN_FILE, load_extractor
from evaluation.protocol import floors
from evaluation.reference import make_reference, save_reference
from utils import BLOOD_CLASSES, load_dataset

ROOT = Path(__file__).resolve().parents[1]


def write_folder(folder: Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    """PNGs of [N, H, W, 3] images, in sub-folders of their classes where labels are given."""
    for i, image in enumerate(images):
        parent = folder if labels is None else folder / BLOOD_CLASSES[int(labels[i])]
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(parent / f"{i:03d}.png")
    return folder


@pytest.fixture
def arguments(data_root, tiny_extractor, tmp_path, empty_cache) -> list[str]:
    """What judges against the tiny data, after the images."""
    options = {
        "--reference": "bloodmnist",
        "--data-root": data_root,
        "--extractor": tiny_extractor,
        "--out": tmp_path / "out",
        "--device": "cpu",
    }
    return [str(word) for pair in options.items() for word in pair]


def record(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "record.json").read_text())["metrics"]


def test_real_cells_that_no_one_trained_on_lie_at_the_floor(
    tiny_arrays, arguments, tmp_path, capsys
):
    folder = write_folder(tmp_path / "test cells", tiny_arrays["test_images"])
    main([str(folder), *arguments])
    metrics = record(tmp_path)
    assert metrics["protocol"]["n_fake"] == 40 and metrics["protocol"]["n_real"] == 160
    assert metrics["protocol"]["label_distribution"] == "as given"
    low, high = metrics["frechet_interval"]
    assert low < metrics["floor"]["frechet_distance"] < high
    assert metrics["frechet_distance"] < 1.5 * metrics["floor"]["frechet_distance"]
    # Its control are the other held-out cells.
    assert metrics["copies"]["n_held_out"] == 24
    authpct = metrics["copies"]["authpct_held_out"]
    assert f"| AuthPct | {metrics['copies']['authpct']:.1f} | {authpct:.1f} |" in (
        tmp_path / "out" / "table.md"
    ).read_text(encoding="utf-8")
    low, high = metrics["copies"]["pixels"]["train_share_interval"]
    assert low < 0.5 < high
    assert metrics["copies"]["verdict"] == "no sign of copies"
    assert "per_class" not in metrics
    text = capsys.readouterr().out
    assert "40 images against the 160 of the train split of BloodMNIST" in text
    assert f"| FD (tiny-8) | {metrics['frechet_distance']:.1f}" in text
    for name in ("table.md", "images.png", "suspicious_pairs.png", "frechet_infinity.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100


def test_copies_of_training_cells_are_told(tiny_arrays, arguments, tmp_path, capsys):
    folder = write_folder(tmp_path / "copies", tiny_arrays["train_images"][:100])
    main([str(folder), *arguments])
    assert record(tmp_path)["copies"]["verdict"] == "copies"
    assert "copies" in capsys.readouterr().out


def test_the_domain_extractor_is_refused_where_it_knows_the_reference(
    tiny_arrays, data_root, tmp_path, bad_input
):
    folder = write_folder(tmp_path / "cells", tiny_arrays["test_images"])
    words = "knows the train split", "--reference bloodmnist-28-domain"
    with bad_input(*words):
        data = ("--reference", "bloodmnist", "--data-root", str(data_root))
        main([str(folder), *data, "--extractor", "domain", "--device", "cpu"])
    copy = shutil.copy(DOMAIN_FILE, tmp_path / "mine.pt")  # known by its bytes, not by its name
    with bad_input(*words):
        main([str(folder), *data, "--extractor", str(copy), "--device", "cpu"])


def test_noise_lies_at_the_ceiling(arguments, tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(60, 28, 28, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=noise)
    main([str(tmp_path / "noise.npz"), *arguments])
    metrics = record(tmp_path)
    assert metrics["frechet_distance"] == pytest.approx(
        metrics["ceilings"]["uniform_noise"], rel=0.05
    )
    assert metrics["recall"] < 0.1


def test_class_folders_give_a_row_for_each_class(tiny_arrays, arguments, tmp_path):
    images, labels = tiny_arrays["test_images"], tiny_arrays["test_labels"].reshape(-1)
    main([str(write_folder(tmp_path / "by class", images, labels)), *arguments])
    metrics = record(tmp_path)
    rows = metrics["per_class"]
    assert [row["class"] for row in rows] == list(BLOOD_CLASSES)
    assert all(row["n_fake"] == 5 and row["n_real"] == 20 for row in rows)
    assert metrics["agreement"]["n"] == 40
    # These are no cells that our own classifier knows: one is trained on the train split.
    assert metrics["agreement"]["classifier"] == "small-network-128"
    table = (tmp_path / "out" / "table.md").read_text()
    assert "against the train cells of that class" in table and "over seeds" not in table
    assert "| Class agreement |" in table
    assert "| these images | – | basophil | 1 | 20 | 5 |" in table


def test_grey_images_are_read_where_the_reference_is_grey(tmp_path, folder, bad_input):
    grey = np.random.default_rng(0).integers(256, size=(4, 28, 28), dtype=np.uint8)
    for i, image in enumerate(grey):
        (tmp_path / "grey").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "grey" / f"{i}.png")
    np.savez(tmp_path / "first.npz", images=grey[:, None])
    np.savez(tmp_path / "last.npz", images=grey[..., None])
    for name in ("grey", "first.npz", "last.npz"):
        images, _ = load_images(tmp_path / name, (), channels=1)
        assert np.array_equal(images.numpy(), grey[:, None])
    with bad_input("000.png", "RGB image, not L"):
        load_images(folder, (), channels=1)
    np.savez(tmp_path / "colour.npz", images=np.zeros((2, 28, 28, 3), np.uint8))
    with bad_input("colour.npz", "[N ≥ 1, 1, S, S]"):
        load_images(tmp_path / "colour.npz", (), channels=1)


def test_a_reference_file_needs_no_real_images(
    tiny_arrays, data_root, tiny_extractor, tmp_path, arguments
):
    extractor = load_extractor(tiny_extractor)
    train, held_out = (load_dataset("bloodmnist", data_root, 28, s) for s in ("train", "held_out"))
    reference = make_reference(train, extractor)
    rows = floors(reference, held_out, extractor)
    object.__setattr__(reference, "floors", rows)
    save_reference(reference, tmp_path / "reference.npz")
    np.savez(tmp_path / "held out.npz", images=held_out.images.numpy(), labels=held_out.labels)
    rest = ["--extractor", str(tiny_extractor), "--out", str(tmp_path / "out")]
    main([str(tmp_path / "held out.npz"), "--reference", str(tmp_path / "reference.npz"), *rest])
    metrics = record(tmp_path)
    assert metrics["frechet_distance"] == pytest.approx(rows[-1]["frechet_distance"], rel=1e-3)
    assert metrics["floor"]["frechet_distance"] == pytest.approx(rows[-1]["frechet_distance"])
    assert "copies" not in metrics
    assert any("copies were not looked for" in sentence for sentence in metrics["warnings"])


def test_a_floor_between_two_numbers_is_linear_in_one_over_n():
    rows = (
        {"n": 100, "frechet_distance": None, "kid": 0.0},
        {"n": 1000, "frechet_distance": 74.0, "kid": 0.0},
        {"n": 2000, "frechet_distance": 42.0, "kid": 0.0},
        {"n": 4000, "frechet_distance": 26.0, "kid": 0.0},
    )  # 10 + 64,000 / n
    for n in (1000, 1500, 3000, 4000):
        assert floor_at(rows, n)["frechet_distance"] == pytest.approx(10 + 64_000 / n)
    assert floor_at(rows, 500) == {"n": 500, "frechet_distance": None, "kid": 0.0}
    for n in (99, 9000):  # nobody measured it there
        assert floor_at(rows, n) == {"n": n, "frechet_distance": None, "kid": None}
    assert floor_at((), 100) == {"n": 100}


def test_the_floor_of_coverage_grows_with_the_images():
    rows = ({"n": 1000, "coverage": 0.3}, {"n": 2000, "coverage": 0.5})
    assert floor_at(rows, 1500)["coverage"] == pytest.approx(0.3 + 0.2 * math.log2(1.5))


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_arrays, tmp_path) -> Path:
    return write_folder(tmp_path / "images", tiny_arrays["test_images"][:12])


def save_as(mode: str, path: Path) -> None:
    Image.new(mode, (28, 28)).save(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "notes.txt").write_text("hello"), ("notes.txt", "cannot be read")),
        (lambda f: (f / "cut.png").write_bytes((f / "000.png").read_bytes()[:60]), ("cut.png",)),
        (lambda f: save_as("L", f / "grey.png"), ("grey.png", "L image, not RGB")),
        (lambda f: save_as("RGBA", f / "clear.png"), ("clear.png", "RGBA image, not RGB")),
        (lambda f: save_as("I;16", f / "deep.png"), ("deep.png", "not RGB")),
        (lambda f: save_as("CMYK", f / "print.jpg"), ("print.jpg", "CMYK image, not RGB")),
        (
            lambda f: Image.new("RGB", (32, 28)).save(f / "wide.png"),
            ("wide.png", "32 × 28", "of one size"),
        ),
        (
            lambda f: write_folder(f / "unicorns", np.zeros((1, 28, 28, 3), np.uint8)),
            ("lies in no folder of a class", "basophil"),
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(spoil, words, folder, bad_input):
    spoil(folder)
    with bad_input(*words):
        load_images(folder, BLOOD_CLASSES)


def test_linked_folders_are_looked_into(folder, tmp_path, bad_input):
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "linked").symlink_to(folder, target_is_directory=True)
    with bad_input("linked", "lies in no folder of a class"):
        load_images(tmp_path / "mix", BLOOD_CLASSES)


def test_every_folder_has_a_place_of_its_own(tiny_arrays, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments[: arguments.index("--out")], "--device", "cpu"]
    for scale in ("1.0", "1.5"):
        folder = write_folder(tmp_path / f"scale_{scale}", tiny_arrays["test_images"][:12])
        main([str(folder), *arguments])
        reference = Path(arguments[arguments.index("--reference") + 1]).stem
        assert (tmp_path / "judged" / f"scale_{scale}-{reference}" / "record.json").is_file()


def test_the_record_of_other_images_is_left_alone(tiny_arrays, arguments, tmp_path, bad_input):
    first, other = (
        write_folder(tmp_path / place / "cells", tiny_arrays["test_images"][rows])
        for place, rows in (("a", slice(12)), ("b", slice(12, 24)))
    )
    main([str(first), *arguments])
    before = (tmp_path / "out" / "record.json").read_bytes()
    main([str(first), *arguments])
    with bad_input("judges other images than cells", "--out"):
        main([str(other), *arguments])
    assert (tmp_path / "out" / "record.json").read_bytes() == before


def test_hidden_files_and_our_own_grid_are_no_images(folder):
    (folder / ".DS_Store").write_bytes(b"x")
    Image.new("RGB", (300, 200)).save(folder / "grid.png")
    (folder / "synthetic.csv").write_text("file,class\n")
    images, labels = load_images(folder, BLOOD_CLASSES)
    assert images.shape == (12, 3, 28, 28) and labels is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros((2, 28, 28, 3), np.uint8)}, ("no array `images`",)),
        ({"images": np.zeros((2, 28, 28, 3))}, ("uint8", "float64")),
        ({"images": np.zeros((2, 28, 28), np.uint8)}, ("uint8", "[2, 28, 28]")),
        ({"images": np.zeros((0, 28, 28, 3), np.uint8), "labels": []}, ("N ≥ 1", "[0, 28, 28, 3]")),
        ({"images": np.zeros((2, 28, 28, 1), np.uint8)}, ("[N, S, S, 3]",)),
        ({"images": np.zeros((2, 28, 28, 3), np.uint8), "labels": [1]}, ("2 integers",)),
        ({"images": np.zeros((2, 28, 28, 3), np.uint8), "labels": [0.5, 1]}, ("2 integers",)),
        ({"images": np.zeros((2, 28, 28, 3), np.uint8), "labels": [0, 8]}, ("8 classes",)),
    ],
)
def test_an_archive_that_cannot_be_used_says_why(arrays, words, tmp_path, bad_input):
    np.savez(tmp_path / "a.npz", **arrays)
    with bad_input("a.npz", *words):
        load_images(tmp_path / "a.npz", BLOOD_CLASSES)


def test_nothing_to_judge(tmp_path, bad_input):
    (tmp_path / "empty").mkdir()
    with bad_input("empty", "holds no images"):
        load_images(tmp_path / "empty", BLOOD_CLASSES)
    with bad_input("nowhere", "no folder and no .npz"):
        load_images(tmp_path / "nowhere", BLOOD_CLASSES)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with bad_input("cut.npz", "cannot be read"):
        load_images(tmp_path / "cut.npz", BLOOD_CLASSES)
    with open(tmp_path / "one array.npz", "wb") as file:
        np.save(file, np.zeros((2, 28, 28, 3), np.uint8))
    with bad_input("one array.npz", "cannot be read"):
        load_images(tmp_path / "one array.npz", BLOOD_CLASSES)


def test_bad_input_ends_with_one_sentence_and_leaves_nothing(folder, arguments, tmp_path):
    save_as("L", folder / "grey.png")
    command = [sys.executable, "-m", "evaluation", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "grey.png" in sentence and not (tmp_path / "out").exists()


def test_an_image_of_absurd_size_is_named(folder, monkeypatch, bad_input):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with bad_input("000.png", "cannot be read"):
        load_images(folder, BLOOD_CLASSES)


@pytest.mark.parametrize("option", ["--image-size", "--data-root"])
def test_a_file_as_the_reference_takes_no_options_of_a_data_set(option, folder, bad_input):
    with bad_input(f"{option} goes with a data set", "bloodmnist-28-domain"):
        main([str(folder), "--reference", "bloodmnist-28-domain", option, "64"])


def test_an_unknown_reference_names_those_there_are(folder, bad_input):
    with bad_input("nonsense", "does not exist", "domain"):
        main([str(folder), "--reference", "nonsense"])
