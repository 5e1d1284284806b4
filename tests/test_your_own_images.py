"""A folder of one's own, taken through the notebook: on its own example, on a zip, on bad input."""

import csv
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import matplotlib
import nbformat
import papermill
import pytest
import torch
from PIL import Image

from custom_models.drawing import load_model
from utils import InputError, load_dataset, resize_images

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "your_own_images.ipynb"
EXAMPLE = {"basophil": 24, "eosinophil": 70, "lymphocyte": 90, "neutrophil": 130}
TINY = {"epochs": 1, "extractor": "demo", "device": "cpu", "per_class": 3}
TINY |= {"settings": {"base_channels": 8, "batch_size": 8}}


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> tuple[Path, list]:
    """A run without a folder of one's own: (out, what its cells left)."""
    out = tmp_path_factory.mktemp("own")
    papermill.execute_notebook(
        NOTEBOOK,
        out / "executed.ipynb",
        TINY | {"out": str(out)},
        cwd=NOTEBOOK.parent,
        progress_bar=False,
    )
    cells = nbformat.read(out / "executed.ipynb", as_version=4).cells
    return out, [output for cell in cells for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def text(example) -> str:
    """What the run printed."""
    words = [o.get("data", {}).get("text/markdown", "") + o.get("text", "") for o in example[1]]
    return "\n".join(words)


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_example_has_a_rare_class(example):
    out, _ = example
    found = {folder.name: len(list(folder.iterdir())) for folder in (out / "example").iterdir()}
    assert found == EXAMPLE


def test_every_real_file_lies_in_the_split_that_the_list_names(example, text):
    out, _ = example
    rows, parts = read_csv(out / "real_images.csv"), {}
    assert len({row["file"] for row in rows}) == len(rows) == sum(EXAMPLE.values())
    for split in ("train", "val", "test"):
        part = parts[split] = load_dataset("folder", out / "example", 28, split)
        named = [row for row in rows if row["split"] == split]
        pixels = resize_images(out / "example", [row["file"] for row in named], 28)
        assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2), part.images)
        assert [row["class"] for row in named] == [part.classes[label] for label in part.labels]
    counts = [str(int((part.labels == 0).sum())) for part in parts.values()]
    assert f"| basophil | {' | '.join(counts)} |" in text
    assert "314 images; the most frequent sizes, in pixels: 314 of 28 × 28\n" in text


def test_rare_classes_are_filled_up_to_the_largest(example, text):
    out, _ = example
    train = load_dataset("folder", out / "example", 28, "train")
    counts = train.labels.bincount().tolist()
    lacking = {k: max(counts) - n for k, n in zip(train.classes, counts) if n < max(counts)}
    assert set(lacking) == {"basophil", "eosinophil", "lymphocyte"}
    rows = read_csv(out / "filled_up" / "synthetic.csv")
    assert Counter(row["class"] for row in rows) == lacking
    written = {path.relative_to(out / "filled_up") for path in out.glob("filled_up/*/*")}
    assert {Path(row["file"]) for row in rows} == written
    assert all(row["file"].startswith(f"{row['class']}/synthetic_") for row in rows)
    _, about = load_model(out / "run" / "weights.pt")
    assert {row["checkpoint_sha256"] for row in rows} == {about["sha256"]}
    with Image.open(out / "filled_up" / rows[0]["file"]) as image:
        assert (image.size, image.mode) == ((28, 28), "RGB")
    assert (
        f"basophil: {counts[0]} real images to train on, {lacking['basophil']} to fill up" in text
    )


def test_samples_of_every_class(example, text):
    out, _ = example
    found = {path.name for path in (out / "samples").iterdir()}
    assert found == {"grid.png", *(f"{kind}_{n:04d}.png" for kind in EXAMPLE for n in range(3))}
    assert f"synthetic images: {out / 'samples'} and {out / 'filled_up'}" in text


def test_what_few_images_cannot_carry_is_said(text):
    assert "no Fréchet distance: n = 96 is not above 1.5 times the 64 dimensions" in text
    assert "| FD (demo) | – | – |" in text
    assert "| KID |" in text and "| Precision |" in text and "| Class agreement |" in text
    assert "recognised:" in text and "of the real test images" in text


def test_the_written_files_themselves_are_searched_for_copies(example, text):
    out, _ = example
    files = [*out.glob("samples/*_*.png"), *out.glob("filled_up/*/*.png")]
    assert len({path.read_bytes() for path in files}) == len(files)  # none is written twice
    assert text.count("identical to a training image: 0") == 2
    assert f"{len(files)} files: " in text
    last = text[text.index(f"{len(files)} files: ") :].splitlines()
    named = [line.split()[0] for line in last if line.startswith(("samples/", "filled_up/"))]
    assert len(named) == 12 and all((out / name).exists() for name in named)


def test_pictures(example):
    pictures = [o for o in example[1] if "image/png" in o.get("data", {})]
    # Folder, losses, progress, samples, neighbours, pairs, written grid, pairs of written files.
    assert len(pictures) == 8


def run_cells(**parameters) -> None:
    """The cells from the imports on, in this process: a kernel would take as long again."""
    code = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"]
    values = {"Path": Path}  # from the cell that finds the repository
    exec(code[0].source, values)
    values |= TINY | parameters
    with matplotlib.rc_context():
        for cell in code[2:]:
            exec(cell.source.replace("%matplotlib inline\n", ""), values)


def test_a_zip_with_even_classes_twice(example, tmp_path, capsys):
    """Even classes leave nothing to fill up; run again, all is shown and nothing written anew."""
    source, _ = example
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        for kind in ("eosinophil", "neutrophil"):
            for number in range(24):
                name = f"{kind}/{number:03d}.png"
                archive.write(source / "example" / name, f"my cells/{name}")
    out = tmp_path / "new" / "folder"
    parameters = {"data_dir": str(tmp_path / "cells.zip"), "out": out}
    run_cells(**parameters)
    text = capsys.readouterr().out
    assert "48 images; the most frequent sizes, in pixels: 48 of 28 × 28\n" in text
    assert not (out / "filled_up").exists()
    assert f"synthetic images: {out / 'samples'}\n" in text
    assert "6 files: " in text
    kept = [out / "run" / "weights.pt", *sorted((out / "samples").iterdir())]
    before = [path.stat().st_mtime_ns for path in kept]
    run_cells(**parameters)
    assert "6 files: " in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in kept] == before
    with pytest.raises(InputError, match="drawn by other weights, or in another number; delete it"):
        run_cells(**parameters, per_class=TINY["per_class"] + 1)
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_the_list_of_test_images_stays_that_of_the_training(folder, tmp_path, capsys):
    """Else it would call images that the generator has learned from test images."""
    parameters = {"data_dir": str(folder), "out": tmp_path / "out"}
    run_cells(**parameters)
    kept = (tmp_path / "out" / "real_images.csv").read_bytes()
    images = [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")]
    lines = ["file,patient", *(f"{name},P{n % 9}" for n, name in enumerate(sorted(images)))]
    (folder / "patients.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match="is of another run: dataset_sha256"):
        run_cells(**parameters)
    assert (tmp_path / "out" / "real_images.csv").read_bytes() == kept


@pytest.fixture
def folder(example, tmp_path) -> Path:
    """Twenty basophils and twenty lymphocytes."""
    for kind in ("basophil", "lymphocyte"):
        (tmp_path / "cells" / kind).mkdir(parents=True)
        for path in (example[0] / "example" / kind).glob("0[01]?.png"):
            shutil.copy(path, tmp_path / "cells" / kind)
    return tmp_path / "cells"


def test_an_empty_class_is_named(folder, tmp_path):
    for path in (folder / "basophil").iterdir():
        path.unlink()
    with pytest.raises(InputError) as caught:
        run_cells(data_dir=str(folder), out=tmp_path / "out")
    sentence = f"{folder}: class sub-folder basophil is empty; fill or remove it"
    assert str(caught.value) == sentence
    assert not (tmp_path / "out").exists()


def test_a_model_without_classes_is_refused_before_it_is_trained(folder, tmp_path, bad_input):
    with bad_input("dcgan quick is not told the class; take the preset best of cvae or ddpm"):
        run_cells(
            data_dir=str(folder), out=tmp_path / "out", model="dcgan", settings={"batch_size": 4}
        )
    assert not (tmp_path / "out").exists()
