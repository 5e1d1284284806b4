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
import gzip
import hashlib
import io
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

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
UPRIGHT = ("MNIST", "CelebA")  # data sets whose images have an up and a down
SPLITS = ("train", "val", "test")


class InputError(ValueError):
    """Bad input, said in one sentence: which file or value, what is wrong, what to do."""


@contextlib.contextmanager
def exit_on_bad_input():
    """Turn an `InputError`, and a GPU's full memory, into one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        sentence = str(error)
    except torch.OutOfMemoryError:
        sentence = "the GPU's memory is full; run fewer things on it at once, or choose a CPU"
    else:
        return
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


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


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the CPU's and the device's default generators, as `torch.manual_seed` does.

    That one takes a stack trace for each kind of device which is not in use: up to a third of a
    millisecond, too long for every step of a small network.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA where there is one; `cuda` without a GPU is an `InputError`, as are both
    where torch can't use the GPU that is there.

    On a GPU convolutions and matrix products are float32 where they are not bfloat16, never TF32,
    whose rounding a gradient penalty's second derivative can't bear.
    """
    usable = torch.cuda.is_available()
    if name.startswith(("auto", "cuda")) and not usable and torch.cuda.device_count() > 0:
        # Torch only warns, and a suite would train on the CPU for days.
        raise InputError(
            f"this machine has a GPU, but torch {torch.__version__} can't use it: is its driver "
            "too old? update it, or choose --device cpu"
        )
    if name == "auto":
        name = "cuda" if usable else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise InputError(f"--device {name} was asked for, but torch sees {seen} CUDA GPU; use cpu")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False  # NVIDIA's containers turn it on
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


def write_to_cache(path: Path, write) -> None:
    """As `write_atomically`; where that can't be, all goes on, and is computed again next time."""
    with contextlib.suppress(InputError):
        write_atomically(path, write)


def files_below(folder: str | Path) -> list[Path]:
    """All files in a folder and its sub-folders, linked ones too, sorted by their paths."""
    walk = os.walk(folder, followlinks=True)  # rglob leaves linked folders out
    return sorted(Path(parent) / name for parent, _, names in walk for name in names)


def write_atomically(path: str | Path, write) -> None:
    """Call write(partial_path), then rename: the file or folder is there whole or not at all."""
    path = Path(path).absolute()
    # Not the process's number, which two containers with one cache may share.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
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
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8: it is there whole or not at all."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    images: uint8 [N, C, H, W], C = 1 (grey) or 3 (RGB); labels: int64 [N]; classes: one name for
    each label.
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


def sha256_of(images: torch.Tensor) -> str:
    """Of the images' pixels, uint8 [N, C, H, W]."""
    return hashlib.sha256(images.contiguous().numpy()).hexdigest()


def data_folder(root: str | Path | None = None) -> Path:
    """The folder with the data sets: `root`, else $DATA_ROOT, else data/ beside this file."""
    return Path(root or os.environ.get("DATA_ROOT") or Path(__file__).parent / "data").expanduser()


def load_dataset(
    name: str, root: str | Path | None = None, size: int = 28, split: str = "train"
) -> ImageSet:
    """Load one split of a data set.

    name: `bloodmnist`, `pbc`, `demo`, `mnist` (one grey channel), `celeba` (its classes are
    without and with the attribute Smiling; `celeba:Eyeglasses` takes another attribute), `folder`
    or `bccd`. root: the folder with its files ($DATA_ROOT, else data/ beside this file); for
    `folder`, the folder or zip with one sub-folder of images per class; for `pbc`, also the
    folder or zip of its classes itself.
    size: pixels; `usual_size` says each data set's. split: `train`, `val`, `test`, or `held_out`
    (validation and test together).
    Raises InputError with one sentence for anything missing, broken or foreign.
    """
    kind, *attribute = _kind_and_attribute(name)
    if split == "held_out":
        val, test = (load_dataset(name, root, size, part) for part in ("val", "test"))
        images, labels = torch.cat([val.images, test.images]), torch.cat([val.labels, test.labels])
        return ImageSet(val.name, split, images, labels, val.classes)
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known are {', '.join(SPLITS)}, held_out")
    if not 1 <= size <= LARGEST_SIZE:
        raise InputError(f"image size {size} must be between 1 and {LARGEST_SIZE} pixels")
    root = data_folder(root)
    label, images, labels, classes = LOADERS[kind](root, size, split, *attribute)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise InputError(
            f"{name} in {root}: images must be uint8 [N, {size}, {size}, 1 or 3], "
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
    images = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), order="C"))
    return ImageSet(label, split, images, torch.from_numpy(labels), tuple(classes))


def usual_size(name: str) -> int:
    """The pixels of a data set's images where no size is asked for. name: as in `load_dataset`.

    Raises InputError for an unknown one.
    """
    return USUAL_SIZE[_kind_and_attribute(name)[0]]


# By the beginning of an `ImageSet`'s name; the images of all others are taken for cells.
SHOWN = {"MNIST": "digit", "CelebA": "face"}


def in_words_of(dataset: str, text: str) -> str:
    """A text about cells, made for the data set of this name: about digits if it is MNIST."""
    for name, shown in SHOWN.items():
        if dataset.startswith(name):
            return re.sub(r"\bcell(s?)\b", rf"{shown}\1", text)
    return text


def _kind_and_attribute(name: str) -> list[str]:
    """`celeba:Smiling` → ["celeba", "Smiling"]; the other data sets have no attribute."""
    kind, *attribute = name.split(":", 1)
    if kind not in LOADERS or (attribute and kind != "celeba"):
        raise InputError(
            f"unknown data set {name!r}; known are {', '.join(LOADERS)}, celeba:ATTRIBUTE"
        )
    return [kind, *attribute]


def recognise_data_dir(path: str | Path) -> tuple[str, Path]:
    """The name and root for `load_dataset` of a folder or zip that a user points to.

    `pbc`: a data root that holds PBC, or PBC's eight class sub-folders, most of whose files have
    PBC's names; `folder`: any other class sub-folders. Raises InputError where there are none.
    """
    path = Path(path).expanduser()
    if any((path / name).exists() for name in PBC_NAMES):
        return "pbc", path
    classes = list_classes(path)
    files = [name for found in classes.values() for name, *_ in found]
    names = [name for name in files if _looks_like_an_image(name)]
    # What does not belong there is then named by `list_pbc`, instead of another split being drawn.
    mostly_pbc = sum(map(bool, map(PBC_FILE.fullmatch, names))) > len(names) / 2
    return "pbc" if set(classes) == set(PBC_CLASSES) and mostly_pbc else "folder", path


def split_list(dataset: str, root: str | Path | None = None) -> str:
    """The file, class and split of every image of `folder` or `pbc`, as CSV.

    root: as in `load_dataset`, which has the images of a split in the same order. A generator has
    learned from the train split, so no classifier that it helps may be tested on that. Raises
    InputError as `load_dataset` does.
    """
    root = data_folder(root)
    if dataset == "pbc":
        source = find_pbc(root)
        names, _ = list_pbc(source)
        labels, classes = _pbc_labels(names), BLOOD_CLASSES
        parts = split_pbc(source.with_name("pbc_split.csv"), names)
    else:
        names, labels, classes, parts = split_folder(root)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "class", "split"))
    for split, rows in parts.items():
        writer.writerows((names[row], classes[labels[row]], split) for row in rows)
    return text.getvalue()


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
    images, labels = _read_medmnist(path, split)
    if images.shape[1:3] != (size, size):
        raise InputError(f"{path} holds images of {images.shape[1:3]}, not {size}×{size} pixels")
    rebuilt = hashlib.sha256(path.read_bytes()).hexdigest() == REBUILT_BLOODMNIST_SHA256
    return "BloodMNIST (rebuilt)" if rebuilt else "BloodMNIST", images, labels, BLOOD_CLASSES


def _read_medmnist(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split from a .npz in MedMNIST's format."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[f"{split}_images"], file[f"{split}_labels"]
    except KeyError as error:
        raise InputError(f"{path} is not a MedMNIST file: {error.args[0]}; get it anew") from None
    except (*BROKEN_ARCHIVE, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); it may be cut short, get it anew")


def _download_bloodmnist(root: Path, size: int, path: Path) -> None:
    help_text = (
        f"get it from MedMNIST's page, medmnist.com, or set DATA_ROOT (or --data-root) to the "
        f"folder that holds {path.name}"
    )
    try:
        import medmnist
    except ImportError:
        raise InputError(f"{path} does not exist and medmnist is not installed; {help_text}")
    if size not in medmnist.BloodMNIST.available_sizes:
        raise InputError(
            f"BloodMNIST has no images of {size} pixels; "
            f"choose from {', '.join(map(str, medmnist.BloodMNIST.available_sizes))}"
        )
    # Aside, then renamed: a download that breaks off leaves nothing behind.
    with _download_of(path, help_text), tempfile.TemporaryDirectory() as folder:
        medmnist.BloodMNIST(split="train", root=folder, size=size, download=True)
        write_atomically(path, lambda part: shutil.copyfile(Path(folder) / path.name, part))


@contextlib.contextmanager
def _download_of(path: Path, help_text: str):
    """Turn whatever goes wrong in a download into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # every downloader has errors of its own
        lines = (line.strip() for line in str(error).splitlines())
        reason = next(filter(None, lines), type(error).__name__)
        raise InputError(f"{path} does not exist and its download failed ({reason}); {help_text}")


# ---------------------------------------------------------------------------------------------
# Folders and zips of images
# ---------------------------------------------------------------------------------------------

LARGEST_ZIP = 20e9  # bytes, unpacked
LARGEST_MEMBER = 1e9  # bytes of an image, unpacked
# A member that unpacks to more than this many bytes, at more than this ratio, is no image.
LARGEST_DENSE_MEMBER, LARGEST_RATIO = 100e6, 200
OWN_GRID = "grid.png"  # what `drawing` writes beside the sub-folders of what it draws
TWELVE_BITS = 4095  # the highest value of a 12-bit camera


def list_classes(source: Path) -> dict[str, list[tuple]]:
    """The class sub-folders of a folder or zip, sorted, with the sorted files of each.

    A file is (name, bytes, stamp); the stamp is its number and times of change in a folder, which
    no copy has, and its checksum in a zip. Hidden files and files beside the sub-folders are left
    out; one folder around all of a zip's content is looked through. Raises InputError where there
    are no sub-folders, images beside them or folders in them, and for a zip that is broken, leads
    outside or unpacks to an absurd size.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist; name a folder or zip with class sub-folders")
    try:
        entries = _folder_entries(source) if source.is_dir() else _zip_entries(source)
    except (*BROKEN_ARCHIVE, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read ({error}); it may be cut short, get it anew")
    entries = [entry for entry in entries if entry[0] and not _is_hidden(entry[0])]
    for parts, *_ in entries:
        if not "".join(parts).isprintable():  # a line break would break sentences and tables
            raise InputError(f"{source}: rename {'/'.join(parts)!r}, it can't be printed")
    outermost = {parts[0] for parts, is_folder, *_ in entries if is_folder or len(parts) > 1}
    if source.is_file() and len(outermost) == 1 and max(len(entry[0]) for entry in entries) > 2:
        entries = [(parts[1:], *rest) for parts, *rest in entries if len(parts) > 1]
    classes: dict[str, dict] = {}
    for parts, is_folder, size, stamp in entries:
        if len(parts) == 1 and is_folder:
            classes.setdefault(parts[0], {})
        elif len(parts) == 1 and _looks_like_an_image(parts[0]) and parts[0] != OWN_GRID:
            raise InputError(
                f"{source}: image {parts[0]} lies in no class sub-folder; give each class its own"
            )
        elif len(parts) > 2 or (len(parts) == 2 and is_folder):
            raise InputError(
                f"{source}: {parts[0]} holds the folder {parts[1]}, but a class sub-folder may "
                "hold images alone; move them up or name the folder of the classes"
            )
        elif len(parts) == 2:
            classes.setdefault(parts[0], {})[parts[1]] = (size, stamp)
    if not classes:
        raise InputError(f"{source} has no sub-folders; put each class's images into one")
    return {
        name: [(file, *files[file]) for file in sorted(files)]
        for name, files in sorted(classes.items())
    }


def _looks_like_an_image(name: str) -> bool:
    return Image.registered_extensions().get(Path(name).suffix.lower()) in Image.OPEN


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _parts(member: str) -> tuple[str, ...]:
    """Of a zip member's path, without the `.` that some programs begin it with.

    Older programs on Windows write backslashes.
    """
    return tuple(part for part in re.split(r"[/\\]", member) if part not in ("", "."))


def _open_zip(source: Path) -> zipfile.ZipFile:
    """A zip whose names without a stated encoding are UTF-8, as macOS writes them, else cp437."""
    try:
        return zipfile.ZipFile(source, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(source)


def _folder_entries(source: Path) -> list[tuple]:
    """(parts of the path, is it a folder, bytes, stamp) for two levels of a folder."""
    paths = [*source.glob("*"), *source.glob("*/*")]
    return [
        (
            path.relative_to(source).parts,
            path.is_dir(),
            info.st_size,
            (info.st_ino, info.st_mtime_ns, info.st_ctime_ns),
        )
        for path, info in ((path, path.stat()) for path in paths)
    ]


def _zip_entries(source: Path) -> list[tuple]:
    """The same for a zip, at any depth."""
    with _open_zip(source) as archive:
        members = archive.infolist()
    for info in members:
        path = PureWindowsPath(info.filename)  # it knows drives and both kinds of slashes
        if path.anchor or ".." in path.parts:
            raise InputError(
                f"{source}: member {info.filename!r} leads outside the zip; pack it anew"
            )
        if info.file_size > LARGEST_MEMBER and _looks_like_an_image(info.filename):
            raise InputError(
                f"{source}: member {info.filename!r} would unpack to {info.file_size / 1e9:.1f} "
                "GB, too much for one image; leave it out"
            )
        dense = info.file_size > LARGEST_RATIO * info.compress_size
        if dense and info.file_size > LARGEST_DENSE_MEMBER:
            raise InputError(
                f"{source}: member {info.filename!r} would unpack to {info.file_size / 1e9:.1f} "
                f"GB, more than {LARGEST_RATIO} times its size in the zip; leave it out"
            )
    total = sum(info.file_size for info in members)
    if total > LARGEST_ZIP:
        raise InputError(
            f"{source} would unpack to {total / 1e9:.0f} GB, more than {LARGEST_ZIP / 1e9:.0f}; "
            "unpack it and name its folder"
        )
    return [
        (
            _parts(info.filename),
            info.filename.endswith(("/", "\\")),
            info.file_size,
            info.CRC,
        )
        for info in members
    ]


@contextlib.contextmanager
def _reader(source: Path) -> Iterator[Callable[[str], bytes]]:
    """What reads a file `class/name` of a folder or zip."""
    if source.is_dir():
        yield lambda name: (source / name).read_bytes()
        return
    with _open_zip(source) as archive:
        paths = [(_parts(name), name) for name in archive.namelist()]
        members = {"/".join(p[-2:]): name for p, name in paths if not _is_hidden(p)}
        yield lambda name: archive.read(members[name])


def image_sizes(source: Path, names: list[str]) -> list[tuple[int, int]]:
    """Width and height, in pixels, of the named images of a folder or zip, as they are stored."""
    with _reader(source) as read:
        return [Image.open(io.BytesIO(read(name))).size for name in names]


BILINEAR = Image.Resampling.BILINEAR  # Pillow's is antialiased


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB, turned upright by its EXIF orientation.

    16-bit grey is scaled from 0 … 65535; transparency is laid over white. Raises ValueError for
    pixels without a stated range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are 32-bit numbers of no stated range")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no stated range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_images(
    source: Path, names: list[str], size: int, crop: int | None = None, boxes: list | None = None
) -> np.ndarray:
    """The named images of a folder or zip, cropped and resized: uint8 [N, size, size, 3].

    crop: side of the square cut from the middle (the largest there is); boxes: (left, top, right,
    bottom) for each image instead. The resize is bilinear and antialiased. Raises InputError for a
    file that is no whole image, too large for Pillow's limit or smaller than its crop.
    """
    images = np.empty((len(names), size, size, 3), np.uint8)
    highest = brightest = 0  # of all 16-bit pixels; of all pixels in 8 bits
    with _reader(source) as read, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for row, name in enumerate(progress(names, desc=f"{source.stem} at {size} pixels")):
            try:
                image = Image.open(io.BytesIO(read(name)))
                if image.mode.startswith("I"):
                    highest = max(highest, image.getextrema()[1])
                if image.format == "TIFF" and image.n_frames > 1:
                    raise ValueError(f"it holds {image.n_frames} pages; save the one that counts")
                image = to_rgb(image)
            except (Image.DecompressionBombWarning, Image.DecompressionBombError):
                limit = f"{Image.MAX_IMAGE_PIXELS:,}"
                raise InputError(f"{source}: image {name} has over {limit} pixels; make it smaller")
            except Exception as error:  # a damaged file raises nearly anything
                reason = "no image" if isinstance(error, UnidentifiedImageError) else error
                raise InputError(f"{source}: image {name} cannot be read ({reason}); get it anew")
            brightest = max(brightest, *(high for _, high in image.getextrema()))
            box = boxes[row] if boxes else _middle(image, crop or min(image.size))
            if min(box[:2]) < 0 or box[2] > image.width or box[3] > image.height:
                least = "its annotation says" if boxes else f"{crop}×{crop} pixels"
                raise InputError(f"{source}: image {name} is smaller than {least}")
            images[row] = np.asarray(image.crop(box).resize((size, size), BILINEAR))
    if 0 < highest <= TWELVE_BITS:
        raise InputError(
            f"{source}: the 16-bit images use 0 to {highest} of 65,535 alone, as cameras of 12 "
            "bits or fewer write them, and would be nearly black; convert them to 8 bits"
        )
    if 0 < brightest <= TWELVE_BITS >> 8:  # Pillow keeps the upper half of 16-bit colours
        raise InputError(
            f"{source}: the images are nearly black, {brightest} of 255 at most, as 16-bit colours "
            "of a camera of 12 bits are read; convert them to 8 bits"
        )
    return images


def _middle(image: Image.Image, side: int) -> tuple[int, int, int, int]:
    """Rounded as torchvision's centre crop does, which BloodMNIST was made with."""
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return left, top, left + side, top + side


def _cached(folder: str, fingerprint: str, size: int, resize) -> np.ndarray:
    """The resized images that the cache holds as one file; made by resize() where it does not."""
    cached = cache_folder() / folder / f"{fingerprint}-{size}.npy"
    try:
        return np.load(cached, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        images = resize()
        write_to_cache(cached, lambda path: _save_array(path, images))
        return images


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _fingerprint(entries) -> str:
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def split_by_class(source: Path, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, list]:
    """Rows of each split: 7 : 1 : 2 of every class, drawn with seed 0, classes mixed.

    Raises InputError that names the source where a class is too small for three splits.
    """
    rng = np.random.default_rng(0)
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label, kind in enumerate(classes):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if len(rows) < 4:
            raise InputError(
                f"{source}: class {kind} has {len(rows)} images, but training, validation and test "
                "need at least 4; add some or leave the class out"
            )
        first = int(0.7 * len(rows))
        second = max(int(0.8 * len(rows)), first + 1)
        for split, some in zip(SPLITS, np.split(rows, [first, second]), strict=True):
            parts[split] += some.tolist()
    # The first images of a split then show every class, as those of BloodMNIST do.
    return {split: rng.permutation(rows).tolist() for split, rows in parts.items()}


PATIENTS = "patients.csv"
SYNTHETIC = "synthetic_"  # begins the names of images that fill up a class
DEALINGS = 10_000  # of patients to the splits, tried at most


def split_folder(source: Path) -> tuple[list[str], np.ndarray, tuple[str, ...], dict[str, list]]:
    """Names `class/file`, labels and classes of a folder or zip of images, and rows of each split.

    7 : 1 : 2 of every class; copies of one file lie in one split. Where PATIENTS (columns file,
    patient) lies beside the class sub-folders, all images of a patient lie in one split, and the
    shares are near to these. Raises InputError for an empty class, one that is too small for three
    splits, an image that this suite generated, an image without a patient and copies of one file
    with two.
    """
    found = list_classes(source)
    for kind, files in found.items():
        if not files:
            raise InputError(f"{source}: class sub-folder {kind} is empty; fill or remove it")
    names = [f"{kind}/{file}" for kind, files in found.items() for file, *_ in files]
    for name in names:
        if name.split("/")[-1].startswith(SYNTHETIC):
            raise InputError(
                f"{source}: {name} was generated and would be split like a real image; keep it in "
                "another folder, and add it to training images alone"
            )
    labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
    classes, patient_of = tuple(found), read_patients(source)
    sizes = [size for files in found.values() for _, size, *_ in files]
    first = _first_copies(source, names, sizes)
    if patient_of is None:
        originals = np.flatnonzero(first == np.arange(len(names)))
        parts = split_by_class(source, labels[originals], classes)
        for split, rows in parts.items():
            own = originals[rows]
            copies = np.flatnonzero(np.isin(first, own) & (first != np.arange(len(names))))
            parts[split] = [*own.tolist(), *copies.tolist()]
    else:
        for name in names:
            if not patient_of.get(name):
                raise InputError(
                    f"{source}: {PATIENTS} names no patient for {name}; add a line for it"
                )
        patients = [patient_of[name] for name in names]
        for row, other in enumerate(first):
            if patients[row] != patients[other]:
                raise InputError(
                    f"{source}: {names[other]} and {names[row]} are one file of two patients; "
                    f"remove one, or mend {PATIENTS}"
                )
        parts = split_by_patient(source, labels, classes, patients)
    return names, labels, classes, parts


def _first_copies(source: Path, names: list[str], sizes: list[int]) -> np.ndarray:
    """For each file the row of the first one with the same bytes, mostly its own."""
    of_size, first_of, first = Counter(sizes), {}, np.arange(len(names))
    with _reader(source) as read:
        for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
            if of_size[size] > 1:  # a file of a size of its own has no copy
                with contextlib.suppress(*BROKEN_ARCHIVE, UnicodeDecodeError):  # told later
                    digest = hashlib.sha256(read(name)).digest()
                    first[row] = first_of.setdefault(digest, row)
    return first


def read_patients(source: Path) -> dict[str, str] | None:
    """The patient of each file `class/file` of a folder or zip; None where there is no PATIENTS."""
    try:
        data = _read_beside_the_classes(source, PATIENTS)
        if data is None:
            return None
        table = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        if not {"file", "patient"} <= set(table.fieldnames or ()):
            raise KeyError
        pairs = [(line["file"].strip(), line["patient"].strip()) for line in table]
    except (UnicodeDecodeError, csv.Error, KeyError, AttributeError):
        raise InputError(
            f"{source}: {PATIENTS} can't be read; it needs the columns file and patient, such as "
            "neutrophil/1.png and P07, in UTF-8"
        )
    except BROKEN_ARCHIVE as error:
        raise InputError(f"{source}: {PATIENTS} can't be read ({error}); write it anew")
    patient_of: dict[str, str] = {}
    for file, patient in pairs:
        name = file.replace("\\", "/")
        if patient_of.setdefault(name, patient) != patient:
            raise InputError(f"{source}: {PATIENTS} names two patients for {name}; leave one")
    return patient_of


def _read_beside_the_classes(source: Path, name: str) -> bytes | None:
    """The file that lies beside the class sub-folders of a folder or zip, whatever its capitals."""
    if source.is_dir():
        paths = [path for path in source.iterdir() if path.name.lower() == name]
        return paths[0].read_bytes() if paths else None
    with _open_zip(source) as archive:
        members = {_parts(member): member for member in archive.namelist()}
        places = [
            parts
            for parts in members
            if 0 < len(parts) <= 2 and parts[-1].lower() == name and not _is_hidden(parts)
        ]
        return archive.read(members[min(places, key=len)]) if places else None


def split_by_patient(
    source: Path, labels: np.ndarray, classes: tuple[str, ...], patients: list[str]
) -> dict[str, list]:
    """Rows of each split, no patient in two, with shares near to 7 : 1 : 2 of every class.

    All dealings of patients to splits are tried where there are few patients, else some: patients
    are dealt out one by one, each to the split that lacks most of its images (every second time to
    one that lacks its class, if there is one), the largest first and then in orders drawn with
    seed 0. Of those that leave no class out of a split the one is taken whose farthest share is
    nearest. Raises InputError where there is none.
    """
    names, owners = np.unique(patients, return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (owners, labels), 1)
    shares, totals = np.array([0.7, 0.1, 0.2])[:, None], counts.sum(0)
    best, least = None, np.inf
    for split_of in _dealings(counts, shares):
        have = np.stack([counts[split_of == i].sum(0) for i in range(len(SPLITS))])
        farthest = abs(have / totals - shares).max()
        if (have > 0).all() and farthest < least:
            best, least = split_of, farthest
    if best is None:
        several = (counts > 0).sum(0)
        few = f"{classes[several.argmin()]} has {several.min()} patients"
        raise InputError(
            f"{source}: no dealing of the patients to training, validation and test was found that "
            f"leaves every class in each ({few}); add some or leave the class out"
        )
    rng = np.random.default_rng(0)
    rows = {split: np.flatnonzero(best[owners] == i) for i, split in enumerate(SPLITS)}
    return {split: rng.permutation(some).tolist() for split, some in rows.items()}


def _dealings(counts: np.ndarray, shares: np.ndarray) -> Iterator[np.ndarray]:
    """The split, 0 … 2, of each patient, in many ways. counts: images [patients, classes]."""
    if len(SPLITS) ** len(counts) <= DEALINGS:
        yield from map(np.array, itertools.product(range(len(SPLITS)), repeat=len(counts)))
        return
    rng, aims, totals = np.random.default_rng(0), shares * counts.sum(0), counts.sum(0)
    for attempt in range(max(20, DEALINGS // len(counts))):
        order = rng.permutation(len(counts)) if attempt else np.argsort(-counts.sum(1))
        have, split_of = np.zeros_like(aims), np.empty(len(counts), int)
        for patient in order:
            lacking = (aims - have) / totals
            if attempt % 2:  # a class in none of a split's images yet comes first
                lacking += have == 0
            split_of[patient] = (lacking * counts[patient]).sum(1).argmax()
            have[split_of[patient]] += counts[patient]
        yield split_of


def _load_folder(root: Path, size: int, split: str):
    """Any folder or zip with one sub-folder per class, of any images that Pillow reads.

    The largest square of the middle is resized; grey images become RGB, too. The resized images
    are cached as one file. Raises InputError for an image that lies in two classes.
    """
    names, labels, classes, parts = split_folder(root)
    rows, found = parts[split], list_classes(root)

    def resize() -> np.ndarray:
        images, first = resize_images(root, names, size), {}
        for row, image in enumerate(images):
            other = first.setdefault(image.tobytes(), row)
            if labels[other] != labels[row]:
                raise InputError(
                    f"{root}: {names[other]} and {names[row]} are one image in two classes; "
                    "remove the wrong one"
                )
        return images

    images = _cached("folder", _fingerprint(found), size, resize)
    name = root.resolve().name.removesuffix(".zip")
    return f"folder {name}", images[rows], labels[rows], classes


# ---------------------------------------------------------------------------------------------
# PBC
# ---------------------------------------------------------------------------------------------

PBC_FOLDER = "PBC_dataset_normal_DIB"
PBC_NAMES = (PBC_FOLDER, f"{PBC_FOLDER}.zip")
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

PBC_FILE = re.compile(
    r"(BA|BNE|EO|ERB|IG|LY|MMY|MO|MY|NEUTROPHIL|PLATELET|PMY|SNE)_\d+\.jpg", re.IGNORECASE
)


def _load_pbc(root: Path, size: int, split: str):
    """PBC (Acevedo et al. 2020): its folder or its zip, centre crop 200, resized to `size`.

    The split comes from pbc_split.csv beside it; without one, a seeded one of 7 : 1 : 2 by class.
    The resized images are cached as one file.
    """
    source = find_pbc(root)
    names, fingerprint = list_pbc(source)
    # Before the long resize: it may be wrong.
    rows = split_pbc(source.with_name("pbc_split.csv"), names)[split]
    images = _cached("pbc", fingerprint, size, lambda: resize_pbc(source, names, size))
    return "PBC", images[rows], _pbc_labels(names)[rows], BLOOD_CLASSES


def _pbc_labels(names: list[str]) -> np.ndarray:
    return np.array([PBC_CLASSES.index(name.split("/")[0]) for name in names])


def find_pbc(root: Path) -> Path:
    """The folder or zip of PBC: in a data root, or `root` itself.

    Raises InputError where there is neither.
    """
    for path in (root / name for name in PBC_NAMES):
        if path.exists():
            return path
    if root.is_file() or any((root / kind).is_dir() for kind in PBC_CLASSES):
        return root.absolute()
    raise InputError(
        f"neither {PBC_FOLDER} nor {PBC_FOLDER}.zip is in {root}; set DATA_ROOT "
        "(or --data-root) to the folder that holds the Mendeley data set snkd93bnjr, with "
        "pbc_split.csv beside it where its split is to be that of BloodMNIST"
    )


def list_pbc(source: Path) -> tuple[list[str], str]:
    """Sorted names `class/file.jpg` and a fingerprint of names and sizes.

    Raises InputError for other classes, for an empty one and for an image that is none of PBC's.
    """
    found = {
        kind: [(file, size) for file, size, _ in files if _looks_like_an_image(file)]
        for kind, files in list_classes(source).items()
    }
    if set(found) != set(PBC_CLASSES):
        strange, missing = (
            sorted(one - other)
            for one, other in ((set(found), set(PBC_CLASSES)), (set(PBC_CLASSES), set(found)))
        )
        raise InputError(
            f"{source} is not the PBC set: missing classes {missing}, unknown classes {strange}"
        )
    for kind, files in found.items():
        if not files:
            raise InputError(f"{source}: class sub-folder {kind} has no images; get PBC anew")
    files = [(kind, *file) for kind, files in found.items() for file in files]
    for kind, file, _ in files:
        if not PBC_FILE.fullmatch(file):
            raise InputError(
                f"{source}: {kind}/{file} is none of PBC's images, which have names such as "
                "BA_100102.jpg; take it out, or load the images as a folder of your own "
                "(--dataset folder)"
            )
    return [f"{kind}/{file}" for kind, file, _ in files], _fingerprint(files)


def resize_pbc(source: Path, names: list[str], size: int) -> np.ndarray:
    """The named images of a PBC folder or zip: centre crop 200, resized; uint8 [N, S, S, 3]."""
    return resize_images(source, names, size, crop=200)


def split_pbc(path: Path, names: list[str]) -> dict[str, list[int]]:
    """Rows of each split, in the order of the split file, so that every size has the same order."""
    row_of = {name: row for row, name in enumerate(names)}
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    if path.exists():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} can't be read ({error}); get it anew") from None
        try:
            lines = list(csv.DictReader(io.StringIO(text)))
        except csv.Error as error:
            raise InputError(f"{path} is no table ({error}); get it anew") from None
        for line in lines:
            if line.get("split") not in parts or line.get("file") not in row_of:
                raise InputError(f"{path}: the line {line} names no split or no file of PBC")
            if not (line.get("index") or "").isdecimal():
                raise InputError(f"{path}: the line {line} has no index")
            parts[line["split"]].append((int(line["index"]), row_of[line["file"]]))
        listed = [row for rows in parts.values() for _, row in rows]
        if len(set(listed)) < len(listed):
            raise InputError(f"{path} lists a file twice; get it anew")
        if empty := [split for split in SPLITS if not parts[split]]:
            raise InputError(f"{path} lists no file of {', '.join(empty)}; get it anew")
        return {split: [row for _, row in sorted(rows)] for split, rows in parts.items()}
    return split_by_class(path.parent, _pbc_labels(names), PBC_CLASSES)


# ---------------------------------------------------------------------------------------------
# BCCD
# ---------------------------------------------------------------------------------------------

BCCD_CLASSES = ("eosinophil", "lymphocyte", "monocyte", "neutrophil")
# In studies of whole photographs. They are the numbers of rows that name the class, so that one
# with two cells counts twice; neutrophils alone are named in 217 rows.
BCCD_PUBLISHED = {"eosinophil": 94, "lymphocyte": 37, "monocyte": 23, "neutrophil": 215}
BCCD_MARGIN = 1.1  # side of the square over the longer side of the cell's box


def _load_bccd(root: Path, size: int, split: str):
    """BCCD (367 photographs of smears, 640×480 pixels): the white cell of each, cut by its box.

    The square around the box's centre, its side 1.1 times the box's longer side, is moved inside
    the photograph and resized, so that all cells look about equally large. `bccd_counts` tells
    which photographs are left out. Split 7 : 1 : 2 by class; cached as one file.
    """
    cells, _ = _list_bccd(root)
    folder = root / "BCCD" / "JPEGImages"
    names, boxes = [name for name, _, _ in cells], [box for _, _, box in cells]
    labels = np.array([label for _, label, _ in cells], np.int64)
    rows = split_by_class(folder, labels, BCCD_CLASSES)[split]
    entries = [(name, (folder / name).stat().st_size, box) for name, _, box in cells]
    images = _cached(
        "bccd", _fingerprint(entries), size, lambda: resize_images(folder, names, size, boxes=boxes)
    )
    return "BCCD", images[rows], labels[rows], BCCD_CLASSES


def bccd_counts(root: str | Path) -> dict[str, dict[str, int]]:
    """How many cells of BCCD are used and why the other rows of labels.csv are not.

    Returns `used` by class, `left_out` by reason, and `published` by class for comparison. A row
    is left out if it has no class, names several cells or a basophil, or if its image is missing
    or does not have exactly one box of a white cell. Raises InputError as `load_dataset` does.
    """
    cells, left_out = _list_bccd(Path(root))
    used = Counter(BCCD_CLASSES[label] for _, label, _ in cells)
    return {
        "used": {kind: used[kind] for kind in BCCD_CLASSES},
        "left_out": left_out,
        "published": BCCD_PUBLISHED,
    }


def _list_bccd(root: Path) -> tuple[list[tuple[str, int, tuple]], dict[str, int]]:
    """(file, label, square) of each cell that is used; the number of other rows by reason."""
    folder = root / "BCCD"
    labels = _bccd_labels(folder / "labels.csv")
    photographs = {path.name for path in (folder / "JPEGImages").glob("BloodImage_*.jpg")}
    unknown = sorted(photographs - {f"BloodImage_{number:05d}.jpg" for number in labels})
    if unknown:
        raise InputError(f"{folder / 'labels.csv'} has no row for {unknown[0]}; get it anew")
    reasons = ("no class", "several cells", "basophil", "no image", "no box", "several boxes")
    left_out = dict.fromkeys(reasons, 0)
    cells = []
    for number, kinds in labels.items():
        name = f"BloodImage_{number:05d}"
        annotation = folder / "Annotations" / f"{name}.xml"
        if annotation.exists() and f"{name}.jpg" not in photographs:
            raise InputError(f"{folder / 'JPEGImages' / name}.jpg is missing; get BCCD anew")
        boxes = _bccd_boxes(annotation) if annotation.exists() else []
        if not kinds:
            left_out["no class"] += 1
        elif len(kinds) > 1:
            left_out["several cells"] += 1
        elif kinds == ["basophil"]:
            left_out["basophil"] += 1
        elif f"{name}.jpg" not in photographs:
            left_out["no image"] += 1
        elif len(boxes) != 1:
            left_out["several boxes" if boxes else "no box"] += 1
        else:
            cells.append((f"{name}.jpg", BCCD_CLASSES.index(kinds[0]), boxes[0]))
    return cells, left_out


def _bccd_labels(path: Path) -> dict[int, list[str]]:
    """The classes that each row of labels.csv names, by the number of its photograph."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; set DATA_ROOT to the folder that holds BCCD")
    labels = {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file):
            number, category = line.get("Image") or "", line.get("Category")
            kinds = [kind.strip().lower() for kind in (category or "").split(",") if kind.strip()]
            known = category is not None and set(kinds) <= {*BCCD_CLASSES, "basophil"}
            if not (number.isdecimal() and known) or int(number) in labels:
                raise InputError(
                    f"{path}: the line {line} has no number of its own or an unknown class"
                )
            labels[int(number)] = kinds
    return labels


def _bccd_boxes(path: Path) -> list[tuple[int, int, int, int]]:
    """The square around each white cell of an annotation: left, top, right, bottom."""
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}")) for side in ("width", "height"))
        boxes = [
            [int(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            for item in root.findall("object")
            if item.findtext("name") == "WBC"
        ]
    except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no whole annotation ({error}); get it anew")
    squares = []
    for left, top, right, bottom in boxes:
        if not (1 <= left < right <= width and 1 <= top < bottom <= height):
            raise InputError(
                f"{path}: the box {left}, {top}, {right}, {bottom} does not lie in its image of "
                f"{width}×{height} pixels; correct it"
            )
        # Pixels are counted from 1, and the last one belongs to the box.
        left, top = left - 1, top - 1
        side = min(round(BCCD_MARGIN * max(right - left, bottom - top)), width, height)
        x = min(max(round((left + right - side) / 2), 0), width - side)
        y = min(max(round((top + bottom - side) / 2), 0), height - side)
        squares.append((x, y, x + side, y + side))
    return squares


# ---------------------------------------------------------------------------------------------
# MNIST and CelebA
# ---------------------------------------------------------------------------------------------

MNIST_CLASSES = tuple("0123456789")
MNIST_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")


def _load_mnist(root: Path, size: int, split: str):
    """MNIST (LeCun et al. 1998), one grey channel, in torchvision's layout or downloaded by it.

    The last tenth of the training digits (6,000) is the validation split. Where the test digits
    alone are there, they are split 7 : 1 : 2 by class.
    """
    folder = root / "MNIST" / "raw"
    files = _mnist_files(folder)
    if not files:
        _download_mnist(folder)
        files = _mnist_files(folder)
    missing = [name for name in MNIST_TEST + MNIST_TRAIN if name not in files]
    if missing and missing != list(MNIST_TRAIN):
        raise InputError(f"{folder} lacks {missing[0]}(.gz); get all of MNIST anew")
    if missing:
        name, (images, labels) = "MNIST (test digits)", _read_digits(files, MNIST_TEST)
        rows = split_by_class(folder, labels, MNIST_CLASSES)[split]
    else:
        name = "MNIST"
        images, labels = _read_digits(files, MNIST_TEST if split == "test" else MNIST_TRAIN)
        held_out = len(labels) - len(labels) // 10
        rows = {"train": slice(held_out), "val": slice(held_out, None), "test": slice(None)}[split]
    images, labels = images[rows], labels[rows]
    if size != images.shape[1]:
        images = np.stack([Image.fromarray(x).resize((size, size), BILINEAR) for x in images])
    return name, images[..., None], labels, MNIST_CLASSES


def _mnist_files(folder: Path) -> dict[str, Path]:
    """The files of MNIST that are there, packed by gzip or not."""
    paths = {name: (folder / name, folder / f"{name}.gz") for name in MNIST_TEST + MNIST_TRAIN}
    return {name: path for name, both in paths.items() for path in reversed(both) if path.exists()}


def _download_mnist(folder: Path) -> None:
    help_text = "set DATA_ROOT (or --data-root) to the folder that holds MNIST/raw"
    with _download_of(folder, help_text), tempfile.TemporaryDirectory() as temporary:
        from torchvision.datasets import MNIST

        MNIST(temporary, download=True)
        for name in (f"{name}.gz" for name in MNIST_TRAIN + MNIST_TEST):
            whole = Path(temporary) / "MNIST" / "raw" / name
            write_atomically(folder / name, lambda part, whole=whole: shutil.copyfile(whole, part))


def _read_digits(files: dict[str, Path], names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (_read_idx(files[name]) for name in names)
    labelled = labels.shape == images.shape[:1] and labels.max(initial=0) < len(MNIST_CLASSES)
    if images.shape[1:] != (28, 28) or not labelled:
        raise InputError(
            f"{files[names[0]]} holds {list(images.shape)} and {files[names[1]].name} "
            f"{list(labels.shape)}, not digits of 28×28 pixels with labels 0 to 9; get them anew"
        )
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in MNIST's idx format: 0, 0, 8, number of axes, each length, the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as an idx file of bytes")
        axes = data[3]
        shape = np.frombuffer(data, ">u4", axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (*BROKEN_ARCHIVE, ValueError, IndexError) as error:
        raise InputError(f"{path} cannot be read ({error}); it may be cut short, get it anew")


def _load_celeba(root: Path, size: int, split: str, attribute: str = "Smiling"):
    """CelebA (Liu et al. 2015) through torchvision: faces without and with one attribute.

    The official splits; centre crop 178, resized to `size`, cached as one file per split.
    """
    folder = root / "celeba"
    help_text = (
        "put CelebA's img_align_celeba, list_attr_celeba.txt, list_eval_partition.txt, "
        "identity_CelebA.txt, list_bbox_celeba.txt and list_landmarks_align_celeba.txt there"
    )
    try:
        from torchvision.datasets import CelebA
    except ImportError:
        raise InputError("celeba is read through torchvision: pip install torchvision")
    if not folder.exists():
        # Beside it, then renamed: a download that breaks off leaves nothing behind.
        with _download_of(folder, help_text):
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as temporary:
                CelebA(temporary, download=True)
                os.replace(Path(temporary) / "celeba", folder)
    try:
        faces = CelebA(root, split="valid" if split == "val" else split)
        sizes = [(folder / "img_align_celeba" / name).stat().st_size for name in faces.filename]
    except RuntimeError:
        raise InputError(f"{folder}: a file of CelebA is missing or has another md5; {help_text}")
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error}); {help_text}")
    attributes = [name for name in faces.attr_names if name]
    if attribute not in attributes:
        raise InputError(f"CelebA has no attribute {attribute!r}; it has {', '.join(attributes)}")
    images = _cached(
        "celeba",
        _fingerprint((faces.filename, sizes)),
        size,
        lambda: resize_images(folder / "img_align_celeba", faces.filename, size, crop=178),
    )
    labels = faces.attr[:, attributes.index(attribute)].numpy()
    return f"CelebA ({attribute})", images, labels, (f"not {attribute}", attribute)


# ---------------------------------------------------------------------------------------------
# Duplicates
# ---------------------------------------------------------------------------------------------


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
# The demo data: generated cells, needing no download
# ---------------------------------------------------------------------------------------------

# Drawn by our diffusion model, in MedMNIST's own format; `python checkpoints.py demo` writes it.
DEMO_FILE = Path(__file__).resolve().parent / "results" / "demo_cells.npz"


def _load_demo(root: Path, size: int, split: str):
    """2,000 generated cells, 250 a class; at 28 pixels alone."""
    if size != 28:
        raise InputError(f"the demo cells have 28 pixels, not {size}")
    if not DEMO_FILE.exists():
        raise InputError(f"{DEMO_FILE} does not exist; it comes with the code, get it anew")
    return "demo", *_read_medmnist(DEMO_FILE, split), BLOOD_CLASSES


LOADERS = {
    "bloodmnist": _load_bloodmnist,
    "pbc": _load_pbc,
    "demo": _load_demo,
    "mnist": _load_mnist,
    "celeba": _load_celeba,
    "folder": _load_folder,
    "bccd": _load_bccd,
}
LARGEST_SIZE = 1024  # pixels
# Pixels, where no size is asked for.
USUAL_SIZE = {
    "bloodmnist": 28,
    "pbc": 128,
    "demo": 28,
    "mnist": 28,
    "celeba": 64,
    "folder": 64,
    "bccd": 64,
}


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
