"""Images from trained weights, without training, data or features.

Reads a run's weights.pt or checkpoint.pt and shipped .safetensors files, draws images and writes
them into folders.
"""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from custom_models import make_config
from custom_models.config import stored_settings
from utils import (
    BLOOD_CLASSES,
    PBC_CLASSES,
    SYNTHETIC,
    ImageSet,
    InputError,
    make_grid,
    progress,
    save_png,
    to_uint8,
    write_atomically,
)

SHIPPED_FORMAT = 1  # of a .safetensors file
SHIPPED_FACTS = (
    *("model", "preset", "seed", "config", "classes", "image_size"),
    *("dataset", "dataset_sha256", "code_version"),
)
SAMPLE_BATCH = 128  # fixed, so that a seed gives the same images on every CPU
GPU_PIXELS = 1024 * 28**2  # of a batch on a GPU, which smaller ones would leave idle
# What a run's files hold of its identity beside the config.
NOT_CONFIG = ("model", "preset", "seed", "dataset_sha256", "code_version")
IN_GRID = 8  # of each class, and columns


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


def as_kept(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as they are kept on the disk: the CPU's, in float16, whole numbers as they are.

    Raises InputError for a weight that float16 can't hold.
    """
    kept = {
        name: value.half().cpu() if value.is_floating_point() else value.clone().cpu()
        for name, value in state.items()
    }
    for name, value in kept.items():
        if not value.isfinite().all():
            raise InputError(
                f"{name} has weights beyond what float16 holds, 65,504; lower the learning rate"
            )
    return kept


def load_model(path: str | Path) -> tuple[nn.Module, dict]:
    """The model of a weights.pt, checkpoint.pt or .safetensors file, and what it is.

    The model is in float32, on the CPU and in eval mode; the second has model, preset, seed,
    config, classes, dataset_sha256 (of the training images) and the file's sha256, as plain types.
    A checkpoint.pt gives the weights that its run would keep if it ended there. Raises InputError
    for a file that is missing, broken or foreign.
    """
    path = Path(path)
    model, about = (load_shipped if path.suffix == ".safetensors" else _load_run)(path)
    return model, {**about, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _load_run(path: Path) -> tuple[nn.Module, dict]:
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; give a run's weights.pt or checkpoint.pt, or a .safetensors"
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception:  # a damaged file raises nearly anything
        raise InputError(f"{path} is broken or holds no weights; get it anew") from None
    try:
        identity = stored["identity"]
        about = {name: identity[name] for name in ("model", "preset", "seed", "dataset_sha256")}
        about["config"] = {k: v for k, v in identity.items() if k not in NOT_CONFIG}
        about["config"] |= _sampled_with(path, about)
        # Runs of before their files named the classes were all of blood cells.
        about["classes"] = list(stored.get("classes", BLOOD_CLASSES))
        tensors = stored["state"] if "state" in stored else _kept_state(stored)
        if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise TypeError("state")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise InputError(f"{path} is no weight file or checkpoint of this suite") from None
    return _build(path, about, tensors), about


def _sampled_with(path: Path, about: dict) -> dict:
    """Settings of sampling that the record beside a run's weights names, where there is one.

    They may have been chosen when the training was over; the weights' file has those of before.
    """
    try:
        record = json.loads(path.with_name("record.json").read_text(encoding="utf-8"))
        same = all(record[name] == about[name] for name in ("model", "preset", "seed"))
        same &= record["dataset"]["sha256"] == about["dataset_sha256"]
        names = make_config(about["model"], about["preset"]).SAMPLING if same else ()
        return {name: record["config"][name] for name in names if name in record["config"]}
    except (OSError, ValueError, KeyError, TypeError):  # none, or half a one
        return {}


def _kept_state(checkpoint: dict) -> dict[str, torch.Tensor]:
    """Of a checkpoint: the best step's weights, else their running mean, else the last ones."""
    if checkpoint["best"]:
        return as_kept(checkpoint["best"]["state"])
    return as_kept(checkpoint["ema"] or checkpoint["model"])


def load_shipped(path: str | Path) -> tuple[nn.Module, dict]:
    """The model of a .safetensors file, in float32 on the CPU and in eval mode, and what it is.

    The second are plain types: format, model, preset, seed, config, classes, image_size, dataset,
    dataset_sha256, code_version. Raises InputError for a file that is missing, broken, of another
    format, not that of the .json beside it, or whose tensors are not those of its model.
    """
    try:
        import safetensors
    except ImportError:
        raise InputError(f"{path} needs the package safetensors; pip install safetensors") from None

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; `make checkpoints` writes the shipped ones")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            about = json.loads(file.metadata()["checkpoint"])
        if about["format"] != SHIPPED_FORMAT:
            raise KeyError("format")
        facts = {name: about[name] for name in SHIPPED_FACTS}
        if not isinstance(facts["config"], dict):
            raise TypeError("config")
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is no checkpoint of format {SHIPPED_FORMAT} of this suite; get it anew, or "
            "the version of the suite that wrote it"
        ) from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); get it anew") from None
    _check_sha256(path)
    return _build(path, about, tensors), about


def _check_sha256(path: Path) -> None:
    """Refuse weights that are not those of the record beside them, if there is one."""
    beside = path.with_suffix(".json")
    if not beside.exists():
        return
    try:
        expected = json.loads(beside.read_text(encoding="utf-8"))["checkpoint"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{beside} is no record of a checkpoint; get it anew") from None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InputError(
            f"{path} has the sha256 {found[:8]}…, {beside.name} beside it names {expected[:8]}…; "
            "get both anew"
        )


def _build(path: Path, about: dict, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The model that `about` describes, with these float16 weights."""
    try:
        preset = make_config(about["model"], about["preset"])
        settings = stored_settings(about["config"], preset)
        config = make_config(about["model"], about["preset"], **settings)
        model = config.build()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if len(about["classes"]) != config.n_classes:
        raise InputError(
            f"{path} names {len(about['classes'])} classes, but its model has {config.n_classes}; "
            "get the file anew"
        )
    expected = {
        name: (torch.float16 if value.is_floating_point() else value.dtype, value.shape)
        for name, value in model.state_dict().items()
    }
    for name in sorted({*expected, *tensors}):
        found = (tensors[name].dtype, tensors[name].shape) if name in tensors else None
        if found != expected.get(name):
            raise InputError(
                f"{path}: tensor {name} is {_describe(found)}, but the model's is "
                f"{_describe(expected.get(name))}; get the file anew"
            )
    # The layout of a training's networks, in which their sums have the same order.
    model.to(memory_format=torch.channels_last).load_state_dict(tensors)
    return model.eval()


def _describe(tensor: tuple[torch.dtype, torch.Size] | None) -> str:
    return f"{str(tensor[0]).removeprefix('torch.')} {list(tensor[1])}" if tensor else "missing"


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """An independent 63-bit seed for each purpose and step of a run."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(model: nn.Module, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """One image for each label, uint8 [N, C, S, S]: those of `GenerativePipeline.sample` on a CPU.

    labels: int64 [N]; an unconditional model uses only their number.
    """
    return draw(model, labels, derive_seed(seed, "samples"))


def draw(model: nn.Module, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """One image for each label, uint8 [N, C, S, S] on the CPU, drawn on the model's device.

    labels: int64 [N]; an unconditional model uses only their number. seed: of the very noise, from
    `derive_seed`. The model is left in the mode that it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # batch statistics would let one image of a batch change another
    generator = torch.Generator(device).manual_seed(seed)
    batches = labels.split(batch_size(device, model.config.image_size))
    if len(batches) > 8:
        batches = progress(batches, desc="samples, batches")
    images = []
    with torch.inference_mode():
        for batch in batches:
            images.append(to_uint8(model.sample(batch.to(device), generator)).cpu())
    model.train(was_training)
    return torch.cat(images)


def batch_size(device: torch.device, image_size: int) -> int:
    """Images that are drawn at once, fixed for a kind of device and a size."""
    if device.type == "cpu":
        return SAMPLE_BATCH
    return max(SAMPLE_BATCH, GPU_PIXELS // image_size**2)


def labelled_grid(
    images: torch.Tensor, row_names: list[str], columns: int, side: int = 64
) -> np.ndarray:
    """A grid with a name on the left of each row; no names: the plain grid.

    images: uint8 [N, C, S, S], enlarged by the whole number that brings them nearest below `side`
    pixels. Returns uint8 [height, width, 3].
    """
    zoom = max(1, side // images.shape[-1])
    grid = make_grid(images, columns, zoom=zoom)
    font = ImageFont.load_default(12)
    margin = max((round(font.getlength(name)) + 8 for name in row_names), default=0)
    picture = Image.new("RGB", (margin + grid.shape[1], grid.shape[0]), "white")
    picture.paste(Image.fromarray(grid), (margin, 0))
    pen, height = ImageDraw.Draw(picture), grid.shape[0] / max(len(row_names), 1)
    for row, name in enumerate(row_names):
        pen.text((margin - 4, (row + 0.5) * height), name, fill="black", font=font, anchor="rm")
    return np.asarray(picture)


# ---------------------------------------------------------------------------------------------
# Folders of images
# ---------------------------------------------------------------------------------------------


def write_samples(
    model: nn.Module, about: dict, out: str | Path, n: int, classes: list[str], seed: int
) -> None:
    """Write `n` images of each class (none named: of all), CLASS_0000.png …, and grid.png.

    model, about: as `load_model` returns them. out: a folder that is new or empty. classes: names
    of the model's or of PBC's sub-folders. A model without classes draws `n` images in all,
    image_0000.png …. The grid shows eight images of each class, 64 of a single one. A class's
    images do not depend on which others are drawn. Raises InputError for classes that the model
    does not draw.
    """
    if classes and not model.conditional:
        raise InputError(
            f"{about['model']} {about['preset']} can't be asked for a class; leave --class out"
        )
    names = _own_names(classes or about["classes"], about) if model.conditional else ["image"]
    if n < 1:
        raise InputError(f"--n must be at least 1, got {n}")
    _check_out(out)

    def fill(folder: Path) -> None:
        shown = min(n, IN_GRID if len(names) > 1 else IN_GRID**2)
        rows, row_names = [], []
        for name in names:
            if model.conditional:
                noise = derive_seed(seed, f"samples of {name}")
                images = _draw_class(model, about, name, n, noise)
            else:
                images = sample(model, torch.zeros(n, dtype=torch.int64), seed)
            for number, image in enumerate(images):
                _save(image, folder / f"{_file_name(name)}_{number:04d}.png")
            rows.append(images[:shown])
            if model.conditional:
                row_names += [name] + [""] * ((shown - 1) // IN_GRID)
        grid = labelled_grid(torch.cat(rows), row_names, min(n, IN_GRID))
        save_png(grid, folder / "grid.png")

    _write_folder(out, fill)


def fill_up(
    model: nn.Module, about: dict, out: str | Path, train: ImageSet, seed: int
) -> dict[str, int]:
    """Draw for each class as many images as it lacks to the largest; returns how many by class.

    model, about: as `load_model` returns them. train: the images that the model was trained on,
    whose classes are filled up. Writes CLASS/synthetic_CLASS_0000.png …, grid.png and synthetic.csv
    (file, class, sha256 of the checkpoint, seed) into `out`, a folder that is new or empty. None of
    the images is one of `write_samples`. Raises InputError for other training images, since test
    images may have been among those that the model was trained on.
    """
    what = f"{about['model']} {about['preset']}"
    if not model.conditional:
        raise InputError(
            f"{what} can't be asked for a class, so it fills up none; give a conditional model's "
            "checkpoint"
        )
    if list(train.classes) != about["classes"]:
        raise InputError(
            f"{what} draws {', '.join(about['classes'])}, but the data has "
            f"{', '.join(train.classes)}; give the data set that it was trained on"
        )
    if train.sha256() != about["dataset_sha256"]:
        raise InputError(
            f"{what} was not trained on this train split of {train.name}, so that images of the "
            "test split may be among those that it learned from; train it on this split first"
        )
    counts = dict(zip(train.classes, train.labels.bincount(minlength=len(train.classes)).tolist()))
    _check_out(out)
    missing = {name: max(counts.values()) - count for name, count in counts.items()}
    if not any(missing.values()):
        raise InputError("every class has as many images as the largest; there is none to fill up")

    def fill(folder: Path) -> None:
        lines, rows = [], []
        lacking = {name: n for name, n in missing.items() if n}
        shown = min(IN_GRID, max(lacking.values()))
        for name, n in lacking.items():
            below = folder / _file_name(name)
            noise = derive_seed(seed, f"filling up {name}")
            images = _draw_class(model, about, name, n, noise)
            rows.append(_filled_with_white(images[:shown], shown))
            for number, image in enumerate(images):
                file = below / f"{SYNTHETIC}{_file_name(name)}_{number:04d}.png"
                _save(image, file)
                lines.append((file.relative_to(folder).as_posix(), name, about["sha256"], seed))
        save_png(labelled_grid(torch.cat(rows), list(lacking), shown), folder / "grid.png")
        with open(folder / "synthetic.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("file", "class", "checkpoint_sha256", "seed"))
            writer.writerows(lines)

    _write_folder(out, fill)
    return missing


def _filled_with_white(images: torch.Tensor, n: int) -> torch.Tensor:
    """uint8 images, and white ones behind them, n in all."""
    white = images.new_full((n - len(images), *images.shape[1:]), 255)
    return torch.cat([images, white])


def write_images(images: torch.Tensor, names: list[str], facts: dict, out: str | Path) -> None:
    """Write each image as NAME.png, and the facts about them as images.json.

    images: uint8 [N, C, S, S]; facts: plain types. out: a folder that is new or empty.
    """
    _check_out(out)

    def fill(folder: Path) -> None:
        for image, name in zip(images, names, strict=True):
            _save(image, folder / f"{_file_name(name)}.png")
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        (folder / "images.json").write_text(text, encoding="utf-8")

    _write_folder(out, fill)


def _own_names(classes: list[str], about: dict) -> list[str]:
    """The model's names of these classes, which may have those of PBC's sub-folders, each once."""
    of_pbc, names = dict(zip(PBC_CLASSES, BLOOD_CLASSES)), []
    for name in classes:
        own = name if name in about["classes"] else of_pbc.get(name)
        if own not in about["classes"]:
            raise InputError(
                f"{about['model']} {about['preset']} draws no class {name!r}; it draws "
                f"{', '.join(about['classes'])}"
            )
        names.append(own)
    return list(dict.fromkeys(names))


def _draw_class(model: nn.Module, about: dict, name: str, n: int, seed: int) -> torch.Tensor:
    """`n` images of the class. seed: of the very noise, from `derive_seed`."""
    return draw(model, torch.full((n,), about["classes"].index(name)), seed)


def _check_out(out: str | Path) -> None:
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; choose another folder")


def _file_name(name: str) -> str:
    """A class's name in a path."""
    return name.replace("/", "_").lstrip(".") or "_"


def _save(image: torch.Tensor, path: Path) -> None:
    save_png(make_grid(image[None], columns=1, pad=0), path)


def _write_folder(out: str | Path, fill: Callable[[Path], None]) -> None:
    """Call fill(partial_folder), then rename: the folder is there whole or not at all."""

    def write(partial: Path) -> None:
        partial.mkdir()
        fill(partial)

    write_atomically(out, write)
