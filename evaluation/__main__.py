"""Judge any set of images against real cells.

    python -m evaluation IMAGES --reference bloodmnist --data-root DATA --extractor FILE
    python -m evaluation IMAGES --reference bloodmnist-28-domain

IMAGES: a folder of images, with sub-folders named after the classes if they have any, or an .npz
with `images` (uint8 [N, 3, S, S] or [N, S, S, 3]) and, if they have classes, `labels`.
"""

import argparse
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from evaluation import copies, figures, protocol, tables
from evaluation.features import Extractor, extract, load_extractor
from evaluation.reference import SHIPPED, Reference, load_reference, make_reference
from utils import (
    LOADERS,
    InputError,
    OneSentenceParser,
    exit_on_bad_input,
    load_dataset,
    make_grid,
    pick_device,
    save_png,
    write_atomically,
)

SHOWN = 64
GIVEN = "as given"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneSentenceParser(
        prog="python -m evaluation", description="Judge a set of images against real cells."
    )
    shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.npz")))
    parser.add_argument("images", metavar="IMAGES", help="a folder of images, or an .npz")
    parser.add_argument(
        "--reference",
        required=True,
        help=f"a data set ({', '.join(LOADERS)}), which also lets copies be found; a reference "
        f"that comes with the project, which needs no data ({shipped}); or such a file",
    )
    parser.add_argument("--image-size", type=int, default=28, help="pixels of the data set (28)")
    parser.add_argument("--data-root", help="folder with the data sets ($DATA_ROOT, else data)")
    parser.add_argument(
        "--extractor",
        help="inception, domain, demo or a TorchScript file ($EXTRACTOR, else inception); "
        "a reference made with domain or demo takes its own",
    )
    parser.add_argument("--out", help="folder of record, table and figures (judged/IMAGES)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    device = pick_device(options.device)
    if options.reference.partition(":")[0] in LOADERS:
        extractor = load_extractor(options.extractor, device)
        sets = {
            split: load_dataset(options.reference, options.data_root, options.image_size, split)
            for split in ("train", "held_out")
        }
        reference = make_reference(sets["train"], extractor)
    else:
        sets = None
        shipped = SHIPPED / f"{options.reference}.npz"
        reference = load_reference(shipped if shipped.exists() else options.reference)
        name = reference.extractor.split("-")[0]
        own = name if name in ("domain", "demo") else None
        extractor = load_extractor(options.extractor or own, device)
    images, labels = load_images(Path(options.images), reference.classes)
    out = Path(options.out or Path("judged") / Path(options.images).resolve().stem)

    metrics = protocol.evaluate(reference, images, extractor, labels, label_distribution=GIVEN)
    if sets:
        metrics["floor"] = _floor(reference, sets["held_out"].images, len(images), extractor)
        metrics["copies"], suspects = copies.find_copies(
            images, sets["train"].images, sets["held_out"].images, extractor
        )
        figures.save(figures.suspicious_pairs(suspects), out / "suspicious_pairs.png")
    else:
        metrics["floor"] = floor_at(reference.floors, len(images))
        metrics["warnings"].append(
            "copies were not looked for: that needs the real images (--reference bloodmnist)"
        )
    if metrics["frechet_infinity"]:
        fit = figures.frechet_infinity_fit(metrics["frechet_infinity"])
        figures.save(fit, out / "frechet_infinity.png")
    save_png(make_grid(images[:SHOWN], columns=8, zoom=4), out / "images.png")
    table = tables.metrics_table(metrics)
    record = json.dumps({"images": Path(options.images).name, "metrics": metrics}, indent=1)
    write_atomically(out / "record.json", lambda path: path.write_text(record + "\n"))
    write_atomically(out / "table.md", lambda path: path.write_text(table + "\n"))
    rules = metrics["protocol"]
    print(
        f"\n{rules['n_fake']:,} images against the {rules['n_real']:,} of the "
        f"{rules['reference_split']} split of {rules['dataset']}\n\n{table}\n\n"
        f"record, table and figures: {out}"
    )


def floor_at(floors: tuple[dict, ...], n: int) -> dict:
    """What real cells get at n images: between two measured numbers, linear in 1/n.

    A sampling error shrinks as 1/n (Chong and Forsyth 2020, sec. 3). Beyond the measured numbers
    the nearest one is taken.
    """
    places = [1 / row["n"] for row in floors][::-1]
    result = {}
    for name in [name for name in floors[0] if name != "n"] if floors else ():
        values = [row[name] for row in floors][::-1]
        known = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        result[name] = float(np.interp(1 / n, *zip(*known, strict=True))) if known else None
    return result


def _floor(reference: Reference, held_out: torch.Tensor, n: int, extractor: Extractor) -> dict:
    """The metrics of as many held-out real cells, or of all where there are fewer."""
    features = extract(held_out, extractor, "features of real cells (held out)")
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:n]
    return protocol.measure(reference.features, features[rows])[0]


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def load_images(path: Path, classes: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images uint8 [N, 3, S, S], and labels int64 [N] where they have classes, else None.

    Every file counts: one that can't be used is an InputError that names it.
    """
    if path.suffix == ".npz" and path.is_file():
        return _load_archive(path, classes)
    if not path.is_dir():
        raise InputError(f"{path} is no folder and no .npz file; give one of them")
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise InputError(f"{path} holds no images; give another folder")
    arrays = [_read(file) for file in files]
    for file, array in zip(files, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise InputError(
                f"{file} has {array.shape[1]} × {array.shape[0]} pixels, {files[0]} "
                f"{arrays[0].shape[1]} × {arrays[0].shape[0]}; give images of one size"
            )
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    folders = [file.parent.name if file.parent != path else None for file in files]
    if set(folders) == {None}:
        return images, None
    for file, folder in zip(files, folders, strict=True):
        if folder not in classes:
            raise InputError(
                f"{file} lies in no folder of a class; the classes are {', '.join(classes)}"
            )
    return images, torch.tensor([classes.index(folder) for folder in folders])


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            if image.mode != "RGB":
                raise InputError(
                    f"{file} is a {image.mode} image, not RGB; convert it, or remove it"
                )
            return np.asarray(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read as an image; repair or remove it") from None


def _load_archive(path: Path, classes: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
            labels = file["labels"].reshape(-1) if "labels" in file else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        raise InputError(f"{path} cannot be read, or holds no array `images`") from None
    if images.dtype != np.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise InputError(
            f"{path}: images must be uint8 [N, 3, S, S] or [N, S, S, 3] in [0, 255], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(images))
    if labels is None:
        return images, None
    if not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(images):
        raise InputError(f"{path}: labels must be {len(images)} integers, one for each image")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise InputError(f"{path}: a label lies outside the {len(classes)} classes")
    return images, torch.from_numpy(labels.astype(np.int64))


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
