"""Data sets, image ranges, seeds, devices and grids: what every other file builds on.

Images are uint8 tensors [N, C, H, W] at every boundary between parts, labels int64 [N]. Inside a
model they are float32 in [-1, 1]; `to_model_range` and `to_uint8` are the only two functions that
convert.
"""

import argparse
import contextlib
import csv
import ctypes
import errno
import functools
import hashlib
import io
import os
import random
import shutil
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

BLOOD_CLASSES = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature granulocyte",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)
SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """Bad input, said in one sentence: which file or value, what is wrong, what to do."""


@contextlib.contextmanager
def exit_on_bad_input():
    """Turn an `InputError` into one line on stderr and exit code 2, without a traceback."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class OneSentenceParser(argparse.ArgumentParser):
    """Reports a wrong option as every other bad input: one sentence, exit code 2."""

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


# ---------------------------------------------------------------------------------------------
# Image ranges
# ---------------------------------------------------------------------------------------------


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] → float32 [-1, 1]."""
    if images.dtype != torch.uint8:
        raise InputError(f"expected uint8 images in [0, 255], got {images.dtype}")
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [-1, 1] → uint8 [0, 255], rounded; values outside are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def random_flips_and_turns(images: torch.Tensor) -> torch.Tensor:
    """One of the eight flips and quarter turns for each image, drawn on its device.

    Cells have no up or down. A horizontal flip, a vertical flip and a transposition, each with
    probability one half, reach all eight elements of the square's symmetry group equally often.
    images: [N, C, S, S], square.
    """
    coins = torch.rand(3, len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(coins[0], images.flip(3), images)
    images = torch.where(coins[1], images.flip(2), images)
    return torch.where(coins[2], images.transpose(2, 3), images)


# ---------------------------------------------------------------------------------------------
# Seeds, device, memory, files
# ---------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA where there is one; `cuda` without a GPU is an `InputError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise InputError(f"--device {name} was asked for, but torch sees {seen} CUDA GPU; use cpu")
    return device


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning them to the kernel.

    PyTorch's CPU tensors come from malloc, which maps and unmaps every large block anew, and each
    time the kernel must find its pages. Has no effect without glibc.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 2**28)


def progress(iterable, total: int | None = None, desc: str = ""):
    """The iterable with a tqdm bar where tqdm is installed; plain otherwise."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iterable
    return tqdm(iterable, total=total, desc=desc, dynamic_ncols=True, mininterval=1.0)


def cache_folder() -> Path:
    """Where resized data sets and extracted features are kept: $CACHE_ROOT, else .cache here."""
    return Path(os.environ.get("CACHE_ROOT") or Path(__file__).parent / ".cache")


def write_atomically(path: str | Path, write) -> None:
    """Call write(partial_path), then rename: the file is there whole or not at all."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, RuntimeError):
            # torch.save hides a failed write behind a RuntimeError of its archive writer.
            if "inline_container" not in reason:
                raise
            reason = "the file could not be written whole"
        elif error.errno == errno.ENOSPC:
            reason = "no space left on the disk"
        raise InputError(f"cannot write {path}: {reason}; make room or choose another folder")
    finally:
        with contextlib.suppress(OSError):  # its folder may be no folder, or read-only
            partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    images: uint8 [N, C, H, W]; labels: int64 [N]; classes: one name for each label.
    """

    name: str
    split: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def sha256(self) -> str:
        """Of the labels' and pixels' bytes."""
        digest = hashlib.sha256(self.labels.cpu().numpy().tobytes())
        digest.update(self.images.cpu().contiguous().numpy())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "ImageSet":
        return ImageSet(
            self.name, self.split, self.images.to(device), self.labels.to(device), self.classes
        )


def load_dataset(
    name: str, root: str | Path | None = None, size: int = 28, split: str = "train"
) -> ImageSet:
    """Load one split of a data set.

    name: `bloodmnist`, `pbc` or `demo`. root: the folder with its files ($DATA_ROOT,
    else data/ beside this file).
    size: pixels. split: `train`, `val`, `test`, or `held_out` (validation and test together).
    Raises InputError with one sentence for anything missing, broken or foreign.
    """
    if name not in LOADERS:
        raise InputError(f"unknown data set {name!r}; known are {', '.join(LOADERS)}")
    if split == "held_out":
        val, test = (load_dataset(name, root, size, part) for part in ("val", "test"))
        images, labels = torch.cat([val.images, test.images]), torch.cat([val.labels, test.labels])
        return ImageSet(val.name, split, images, labels, val.classes)
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known are {', '.join(SPLITS)}, held_out")
    root = Path(root or os.environ.get("DATA_ROOT") or Path(__file__).parent / "data")
    label, images, labels, classes = LOADERS[name](root, size, split)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(
            f"{name} in {root}: images must be uint8 [N, {size}, {size}, 3], "
            f"got {images.dtype} {list(images.shape)}; get the file anew"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{name} in {root}: labels must be integers, got {labels.dtype}")
    labels = labels.reshape(-1).astype(np.int64)
    if len(labels) != len(images) or len(labels) == 0:
        raise InputError(f"{name} in {root}: {len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise InputError(
            f"{name} in {root}: a label lies outside the {len(classes)} classes "
            f"(0 to {len(classes) - 1}): {labels.min()} to {labels.max()}"
        )
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ImageSet(label, split, images, torch.from_numpy(labels), tuple(classes))


# What numpy and zipfile raise for a file that is cut short, damaged or of another kind.
BROKEN_ARCHIVE = (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)

# A file rebuilt from PBC by MedMNIST's recipe: class counts of each split are the official ones,
# membership is only in part, so its results carry another name.
REBUILT_BLOODMNIST_SHA256 = "31344426d83ddd165526f5130a41c604a49ecd29a6c50f8277f7433debc62d53"


def _load_bloodmnist(root: Path, size: int, split: str):
    """BloodMNIST (Yang et al. 2023): the .npz in `root`, else downloaded through medmnist."""
    path = root / ("bloodmnist.npz" if size == 28 else f"bloodmnist_{size}.npz")
    if not path.exists():
        _download_bloodmnist(root, size, path)
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file[f"{split}_images"], file[f"{split}_labels"]
    except KeyError as error:
        raise InputError(f"{path} is not a MedMNIST file: {error.args[0]}; get it anew") from None
    except (*BROKEN_ARCHIVE, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); it may be cut short, get it anew")
    if images.shape[1:3] != (size, size):
        raise InputError(f"{path} holds images of {images.shape[1:3]}, not {size}×{size} pixels")
    rebuilt = hashlib.sha256(path.read_bytes()).hexdigest() == REBUILT_BLOODMNIST_SHA256
    return "BloodMNIST (rebuilt)" if rebuilt else "BloodMNIST", images, labels, BLOOD_CLASSES


def _download_bloodmnist(root: Path, size: int, path: Path) -> None:
    help_text = f"set DATA_ROOT (or --data-root) to the folder that holds {path.name}"
    try:
        import medmnist
    except ImportError:
        raise InputError(f"{path} does not exist and medmnist is not installed; {help_text}")
    if size not in medmnist.BloodMNIST.available_sizes:
        raise InputError(
            f"BloodMNIST has no images of {size} pixels; "
            f"choose from {', '.join(map(str, medmnist.BloodMNIST.available_sizes))}"
        )
    try:
        # Aside, then renamed: a download that breaks off leaves nothing behind.
        with tempfile.TemporaryDirectory() as folder:
            medmnist.BloodMNIST(split="train", root=folder, size=size, download=True)
            write_atomically(path, lambda part: shutil.copyfile(Path(folder) / path.name, part))
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} does not exist and its download failed ({reason}); {help_text}")


PBC_FOLDER = "PBC_dataset_normal_DIB"
PBC_CLASSES = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "ig",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)


def _load_pbc(root: Path, size: int, split: str):
    """PBC (Acevedo et al. 2020): its folder or its zip, centre crop 200, resized to `size`.

    The split comes from pbc_split.csv beside it; without one, a seeded one of 7 : 1 : 2 by class.
    The resized images are cached as one file.
    """
    if size < 1:
        raise InputError(f"image size {size} is not positive")
    source = find_pbc(root)
    names, fingerprint = list_pbc(source)
    parts = split_pbc(root / "pbc_split.csv", names)  # before the long resize: it may be wrong
    cached = cache_folder() / "pbc" / f"{fingerprint}-{size}.npy"
    try:
        images = np.load(cached, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        images = resize_pbc(source, names, size)
        write_atomically(cached, lambda path: _save_array(path, images))
    rows = parts[split]
    labels = np.array([PBC_CLASSES.index(names[row].split("/")[0]) for row in rows])
    return "PBC", np.asarray(images[rows]), labels, BLOOD_CLASSES


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def find_pbc(root: Path) -> Path:
    """The folder or zip of PBC in a data root. Raises InputError where there is neither."""
    for path in (root / PBC_FOLDER, root / f"{PBC_FOLDER}.zip"):
        if path.exists():
            return path
    raise InputError(
        f"neither {PBC_FOLDER} nor {PBC_FOLDER}.zip is in {root}; set DATA_ROOT "
        "(or --data-root) to the folder that holds the Mendeley data set snkd93bnjr, with "
        "pbc_split.csv beside it where its split is to be that of BloodMNIST"
    )


def list_pbc(source: Path) -> tuple[list[str], str]:
    """Sorted names `class/file.jpg` and a fingerprint of names and sizes."""
    entries = []
    try:
        if source.is_dir():
            entries = [(p.parent.name, p.name, p.stat().st_size) for p in source.glob("*/*.jpg")]
        else:
            with zipfile.ZipFile(source) as archive:
                for info in archive.infolist():
                    parts = info.filename.split("/")
                    if info.filename.lower().endswith(".jpg") and len(parts) >= 2:
                        entries.append((parts[-2], parts[-1], info.file_size))
    except BROKEN_ARCHIVE as error:
        raise InputError(f"{source} cannot be read ({error}); it may be cut short, get it anew")
    # The Mendeley folder has a hidden file or two of the system that packed it.
    entries = sorted(entry for entry in entries if not entry[1].startswith("."))
    found = {entry[0] for entry in entries}
    if found != set(PBC_CLASSES):
        strange, missing = sorted(found - set(PBC_CLASSES)), sorted(set(PBC_CLASSES) - found)
        raise InputError(
            f"{source} is not the PBC set: missing classes {missing}, unknown classes {strange}"
        )
    fingerprint = hashlib.sha256(repr(entries).encode()).hexdigest()[:16]
    return [f"{kind}/{file}" for kind, file, _ in entries], fingerprint


def resize_pbc(source: Path, names: list[str], size: int) -> np.ndarray:
    """The named images of a PBC folder or zip: centre crop 200, resized; uint8 [N, S, S, 3]."""
    images = np.empty((len(names), size, size, 3), np.uint8)
    archive = None if source.is_dir() else zipfile.ZipFile(source)
    members = {}
    if archive:
        members = {"/".join(n.split("/")[-2:]): n for n in archive.namelist()}
    for row, name in enumerate(progress(names, desc=f"PBC at {size} pixels")):
        try:
            data = archive.read(members[name]) if archive else (source / name).read_bytes()
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (*BROKEN_ARCHIVE, UnidentifiedImageError, ValueError, SyntaxError) as error:
            reason = "no image" if isinstance(error, UnidentifiedImageError) else error
            raise InputError(f"{source}: image {name} cannot be read ({reason}); get it anew")
        if min(image.size) < 200:
            raise InputError(f"{source}: image {name} is smaller than 200×200 pixels")
        # Rounded as torchvision's centre crop does, which BloodMNIST was made with.
        left, top = round((image.width - 200) / 2), round((image.height - 200) / 2)
        image = image.crop((left, top, left + 200, top + 200))
        # Pillow's bilinear filter is antialiased.
        images[row] = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    return images


def split_pbc(path: Path, names: list[str]) -> dict[str, list[int]]:
    """Rows of each split, in the order of the split file, so that every size has the same order."""
    row_of = {name: row for row, name in enumerate(names)}
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    if path.exists():
        with open(path, newline="") as file:
            for line in csv.DictReader(file):
                if line.get("split") not in parts or line.get("file") not in row_of:
                    raise InputError(f"{path}: the line {line} names no split or no file of PBC")
                if not (line.get("index") or "").isdecimal():
                    raise InputError(f"{path}: the line {line} has no index")
                parts[line["split"]].append((int(line["index"]), row_of[line["file"]]))
        listed = [row for rows in parts.values() for _, row in rows]
        if len(set(listed)) < len(listed):
            raise InputError(f"{path} lists a file twice; get it anew")
        return {split: [row for _, row in sorted(rows)] for split, rows in parts.items()}
    rng = np.random.default_rng(0)
    for kind in PBC_CLASSES:
        rows = rng.permutation([row for name, row in row_of.items() if name.startswith(kind)])
        first, second = int(0.7 * len(rows)), int(0.8 * len(rows))
        for split, some in zip(SPLITS, np.split(rows, [first, second]), strict=True):
            parts[split] += some.tolist()
    return parts


def find_duplicates(sets: list[ImageSet]) -> list[tuple[str, int, str, int]]:
    """Pixel-identical images that lie in two different splits: (split, row, split, row)."""
    first: dict[bytes, tuple[str, int]] = {}
    pairs = []
    for part in sets:
        for row, image in enumerate(part.images.cpu().numpy()):
            key = hashlib.sha256(image.tobytes()).digest()
            split, other = first.setdefault(key, (part.split, row))
            if split != part.split:
                pairs.append((split, other, part.split, row))
    return pairs


# ---------------------------------------------------------------------------------------------
# The demo data: drawn cells, needing no download
# ---------------------------------------------------------------------------------------------

# Per class: range of the cell's radius in pixels, colours of cytoplasm, nucleus and granules,
# density of granules. Colours are read off stained smears; every image shifts them a little.
_LOOKS = {
    "basophil": ((7.4, 9.4), (140, 92, 164), (106, 56, 148), (64, 26, 110), 0.6),
    "eosinophil": ((8.4, 9.8), (178, 98, 142), (88, 42, 136), (218, 124, 140), 0.5),
    "erythroblast": ((5.0, 7.4), (172, 148, 176), (70, 36, 122), (150, 124, 164), 0.2),
    "immature granulocyte": ((8.6, 12.0), (160, 120, 176), (92, 46, 140), (108, 64, 148), 0.5),
    "lymphocyte": ((6.2, 8.4), (150, 128, 190), (82, 38, 134), (120, 92, 170), 0.1),
    "monocyte": ((9.6, 12.4), (160, 130, 180), (106, 58, 144), (126, 92, 162), 0.3),
    "neutrophil": ((8.6, 10.8), (206, 164, 186), (86, 40, 136), (158, 106, 160), 0.4),
    "platelet": ((2.6, 4.4), (186, 140, 174), (150, 100, 164), (84, 40, 128), 0.5),
}


def _blob(x, y, discs):
    """Soft mask of discs (cx, cy, radius) that melt together where they come close."""
    field = sum((r * r / ((x - cx) ** 2 + (y - cy) ** 2 + 1e-6)) ** 2 for cx, cy, r in discs)
    return np.clip(0.5 + (field - 1) * min(r for _, _, r in discs) / 4, 0, 1)


def _arc(rng, count, span, distance, radius):
    """Discs spaced along an arc around the cell's centre: the lobes of a nucleus."""
    angles = rng.uniform(0, 2 * np.pi) + np.linspace(-span / 2, span / 2, count)
    radii = radius * rng.uniform(0.85, 1.15, count)
    return np.stack([distance * np.cos(angles), distance * np.sin(angles), radii], 1)


def _nucleus(kind, r, rng):
    """The discs that make up the nucleus of a cell of this kind and radius r."""
    if kind == "neutrophil":  # three to five lobes on thin bridges
        lobes = int(rng.integers(3, 6))
        span = rng.uniform(0.9, 1.15) * (lobes - 1)
        return _arc(rng, lobes, span, 0.46 * r, rng.uniform(0.24, 0.29) * r)
    if kind == "eosinophil":  # two plump lobes
        return _arc(rng, 2, rng.uniform(1.6, 2.5), 0.50 * r, rng.uniform(0.39, 0.46) * r)
    if kind == "monocyte":  # folded: a broad horseshoe
        return _arc(rng, 4, rng.uniform(2.4, 4.2), 0.42 * r, rng.uniform(0.31, 0.38) * r)
    if kind == "immature granulocyte":  # round to kidney-shaped, off centre
        return _arc(rng, 3, rng.uniform(0.8, 2.6), 0.32 * r, rng.uniform(0.36, 0.44) * r)
    if kind == "basophil":  # lobes that its granules hide
        return _arc(rng, 3, rng.uniform(3.0, 4.5), 0.40 * r, 0.34 * r)
    share = {"erythroblast": (0.60, 0.76), "lymphocyte": (0.84, 0.94), "platelet": (0.5, 0.6)}
    size = rng.uniform(*share[kind])  # round: one disc that fills this share of the cell's radius
    return _arc(rng, 1, 0, rng.uniform(0, 0.9) * (1 - size) * r, size * r)


def _draw_cell(kind, rng):
    """One 28x28 RGB cell, drawn at twice the size and averaged down so that edges are soft."""
    radii, cytoplasm, nucleus, granule, density = _LOOKS[kind]
    r = rng.uniform(*radii)
    axis = (np.arange(56) + 0.5) / 2 - 14
    cx, cy = rng.normal(0, 0.5, 2)
    # Bending and stretching the coordinates makes every disc below an irregular, turned oval.
    bend, turn = rng.uniform(0.1, 0.6, 2), rng.uniform(0, 2 * np.pi, 3)
    x0, y0 = axis[None, :] - cx, axis[:, None] - cy
    x0, y0 = x0 + bend[0] * np.sin(y0 / 2.6 + turn[0]), y0 + bend[1] * np.sin(x0 / 2.6 + turn[1])
    stretch = np.exp(rng.normal(0, 0.06))
    c, s = np.cos(turn[2]), np.sin(turn[2])
    x, y = (c * x0 + s * y0) * stretch, (c * y0 - s * x0) / stretch

    stain = rng.normal(0, 3, 3)  # one shift for the whole image
    blue_slide = rng.random() < 0.05  # a few slides have a cold, bluish ground
    image = np.empty((56, 56, 3))
    image[:] = ((214, 212, 226) if blue_slide else (254, 228, 200)) + stain * 0.5

    # Red cells absorb light, so that they darken where they overlap.
    tint = np.array([0.82, 0.75, 0.79]) + rng.normal(0, 0.025)
    pallor = rng.uniform(0.3, 1.0) if rng.random() < 0.7 else 0.1  # how pale their middles are
    for _ in range(rng.integers(5, 11)):
        size, angle = rng.uniform(3.7, 5.0), rng.uniform(0, 2 * np.pi)
        away = max(r + size, 7) - 0.8 + rng.uniform(0, 9)
        centre = away * np.cos(angle), away * np.sin(angle)
        mask = _blob(x, y, [(*centre, size)]) - pallor * _blob(x, y, [(*centre, 0.45 * size)])
        image *= 1 - mask[..., None] * (1 - tint)

    grain = rng.normal(size=(2, 29, 29)).repeat(2, 1).repeat(2, 2)[:, 1:57, 1:57]
    body = _blob(x, y, [(0, 0, r)])
    core = _blob(x, y, _nucleus(kind, r, rng)) * body
    grains = body * np.clip(density * (grain[0] + 0.8), 0, 1)
    if kind not in ("basophil", "platelet"):  # only theirs lie over the nucleus
        grains = grains * (1 - core)

    shift = stain + blue_slide * np.array([0, -12, 30])
    for colour, mask in ((cytoplasm, body * 0.95), (nucleus, core), (granule, grains * 0.8)):
        image += mask[..., None] * (colour + shift + rng.normal(0, 6, 3) - image)
    image += (core * grain[1] * 15)[..., None]  # chromatin is mottled
    small = image.reshape(28, 2, 28, 2, 3).mean((1, 3)) + rng.normal(0, 2, (28, 28, 3))
    return np.clip(np.rint(small), 0, 255).astype(np.uint8)


def draw_demo_cells(n_per_class: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cells, uint8 [N, 28, 28, 3], and labels, int64 [N], shuffled; the seed determines both."""
    count = len(BLOOD_CLASSES)
    # Each image has its own generator, so image i of a class is the same however many are drawn.
    labels = np.repeat(np.arange(count, dtype=np.int64), n_per_class)
    images = np.empty((len(labels), 28, 28, 3), np.uint8)
    for row, label in enumerate(labels):
        rng = np.random.default_rng([seed, label, row % n_per_class])
        images[row] = _draw_cell(BLOOD_CLASSES[label], rng)
    order = np.random.default_rng([seed, count]).permutation(len(labels))
    return images[order], labels[order]


@functools.cache
def _demo_cells() -> tuple[np.ndarray, np.ndarray]:
    return draw_demo_cells(DEMO_PER_CLASS)


DEMO_PER_CLASS = 250
DEMO_ROWS = {"train": slice(0, 1400), "val": slice(1400, 1600), "test": slice(1600, 2000)}


def _load_demo(root: Path, size: int, split: str):
    """2,000 drawn cells, 250 a class; at 28 pixels alone."""
    if size != 28:
        raise InputError(f"the demo cells are drawn at 28 pixels, not at {size}")
    images, labels = _demo_cells()
    return "demo", images[DEMO_ROWS[split]], labels[DEMO_ROWS[split]], BLOOD_CLASSES


LOADERS = {"bloodmnist": _load_bloodmnist, "pbc": _load_pbc, "demo": _load_demo}


# ---------------------------------------------------------------------------------------------
# Grids
# ---------------------------------------------------------------------------------------------


def make_grid(images: torch.Tensor, columns: int, pad: int = 1, zoom: int = 1) -> np.ndarray:
    """Tile uint8 [N, C, H, W] images row by row on white; returns uint8 [height, width, 3]."""
    images = images.cpu()
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    n, _, height, width = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, 3), 255, np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top : top + height, left : left + width] = image
    return grid.repeat(zoom, 0).repeat(zoom, 1)


def class_balanced_labels(n_classes: int, per_class: int) -> torch.Tensor:
    """0…0 1…1 …, int64 [n_classes · per_class]: a grid with one row a class."""
    return torch.arange(n_classes).repeat_interleave(per_class)


def save_png(image: np.ndarray, path: str | Path) -> None:
    """Write uint8 [height, width, 3] as a PNG, whole or not at all."""
    write_atomically(path, lambda partial: Image.fromarray(image).save(partial, format="PNG"))
