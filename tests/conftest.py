"""Tiny data sets in the real files' formats, a tiny extractor, and an empty cache."""

import contextlib
import csv
import io
import os
import warnings
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from utils import PBC_CLASSES, PBC_FOLDER, InputError

hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.load_profile("suite")

# Small tensors gain nothing from more threads, and sums then have one order; the processes that
# tests start take their number from the environment.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Images of each class: 20 to train on, 3 + 5 held out.
PER_CLASS = {"train": 20, "val": 3, "test": 5}


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory) -> None:
    """No test reads or fills the user's own cache."""
    before = os.environ.get("CACHE_ROOT")
    os.environ["CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("CACHE_ROOT")
    if before is not None:
        os.environ["CACHE_ROOT"] = before


@pytest.fixture(autouse=True)
def own_environment() -> None:
    """What the suite sets for its notebooks is not left to the tests that follow."""
    before = {name: os.environ.get(name) for name in ("DATA_ROOT", "EXTRACTOR")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of the test's own, not made yet."""
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def bad_input():
    """`with bad_input("words"):` expects an InputError of one line that holds these words."""

    @contextlib.contextmanager
    def expect(*words: str):
        with pytest.raises(InputError) as caught:
            yield caught
        sentence = str(caught.value)
        assert sentence.strip() and "\n" not in sentence, sentence
        for word in words:
            assert word in sentence, sentence

    return expect


def cells(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A dark disc on a bright ground, its radius and colour set by the class, with noise."""
    rng = np.random.default_rng(seed)
    axis = np.arange(size) - (size - 1) / 2
    distance = np.hypot(axis[:, None], axis[None, :]) / size
    images = np.empty((len(labels), size, size, 3), np.float64)
    images[:] = (235, 205, 195)
    for image, label in zip(images, labels, strict=True):
        image[distance < 0.15 + 0.03 * label] = rng.uniform(40, 200, 3)
    images += rng.normal(0, 6, images.shape)
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def tiny_arrays() -> dict[str, np.ndarray]:
    """What a bloodmnist.npz holds, with 160, 24 and 40 images."""
    arrays = {}
    for seed, (split, n) in enumerate(PER_CLASS.items()):
        labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(8), n))
        arrays[f"{split}_images"] = cells(labels, 28, seed)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    return arrays


@pytest.fixture(scope="session")
def data_root(tiny_arrays, tmp_path_factory) -> Path:
    """A folder with a tiny bloodmnist.npz; not to be changed."""
    root = tmp_path_factory.mktemp("data")
    np.savez_compressed(root / "bloodmnist.npz", **tiny_arrays)
    return root


def _jpeg(size: tuple[int, int], label: int, seed: int) -> bytes:
    """A smooth image with a random mean colour of its own, cut from a square cell."""
    image = Image.fromarray(cells(np.array([label]), 28, seed)[0])
    image = image.resize((max(size), max(size)), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.crop((0, 0, *size)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pbc_files() -> dict[str, bytes]:
    """`class/file.jpg` → its bytes: four a class, 200×203 or 360×363 pixels."""
    prefix = {"erythroblast": "ERB", "neutrophil": "SNE", "platelet": "PLATELET"}
    return {
        f"{kind}/{prefix.get(kind, kind[:2].upper())}_{number}.jpg": _jpeg(
            (200, 203) if number % 2 else (360, 363), label, 100 * label + number
        )
        for label, kind in enumerate(PBC_CLASSES)
        for number in range(4)
    }


@pytest.fixture(scope="session")
def pbc_split(pbc_files) -> list[dict[str, str]]:
    """Lines of a pbc_split.csv, not sorted: two files of each class train, one each else."""
    splits = ("train", "train", "val", "test")
    names = np.random.default_rng(0).permutation(list(pbc_files)).tolist()
    counts, lines = dict.fromkeys(splits, 0), []
    for name in names:
        split = splits[int(name[-5])]
        lines.append({"split": split, "index": str(counts[split]), "file": name})
        counts[split] += 1
    return lines[::-1]


def write_split(root: Path, lines: list[dict[str, str]]) -> None:
    with open(root / "pbc_split.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["split", "index", "file"])
        writer.writeheader()
        writer.writerows(lines)


@pytest.fixture
def pbc_folder(pbc_files, pbc_split, tmp_path) -> Path:
    """A data root with a tiny PBC folder, a hidden file in it, and its split file."""
    root = tmp_path / "as folder"
    for name, data in {**pbc_files, "neutrophil/.DS_1.jpg": b"not an image"}.items():
        path = root / PBC_FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_split(root, pbc_split)
    return root


@pytest.fixture
def pbc_zip(pbc_files, pbc_split, tmp_path) -> Path:
    """A data root with the same PBC images as a zip."""
    root = tmp_path / "as zip"
    root.mkdir()
    with zipfile.ZipFile(root / f"{PBC_FOLDER}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**pbc_files, "neutrophil/.DS_1.jpg": b"not an image"}.items():
            archive.writestr(f"{PBC_FOLDER}/{name}", data)
    write_split(root, pbc_split)
    return root


@pytest.fixture(scope="session")
def real_data_root() -> Path:
    """$DATA_ROOT with the real bloodmnist.npz in it."""
    root = Path(os.environ.get("DATA_ROOT") or "data")
    if not (root / "bloodmnist.npz").is_file():
        pytest.skip("the real data is not here: set DATA_ROOT to the folder of bloodmnist.npz")
    return root


class TinyExtractor(torch.nn.Module):
    """uint8 [N, 3, H, W] → float32 [N, 8]."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 8, 5, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.float() / 64 - 2).tanh().mean((2, 3))


@pytest.fixture(scope="session")
def tiny_extractor(tmp_path_factory) -> Path:
    """A TorchScript file with random, fixed weights."""
    path = tmp_path_factory.mktemp("extractor") / "tiny-8.pt"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        example = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
        torch.jit.trace(TinyExtractor().eval(), example).save(str(path))
    return path
