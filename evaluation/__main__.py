"""Judge any set of images against real cells.

    python -m evaluation IMAGES --reference bloodmnist --data-root DATA --extractor FILE
    python -m evaluation IMAGES --reference bloodmnist-28-domain

IMAGES: a folder of images, with sub-folders named after the classes if they have any, or an .npz
with `images` (uint8 [N, 3, S, S] or [N, S, S, 3]; one channel where the reference is grey) and, if
they have classes, `labels`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from evaluation import copies, figures, protocol, tables
from evaluation.agreement import classifier_agreement
from evaluation.features import Extractor, extract, load_extractor, refuse_domain
from evaluation.judge import classifier_of
from evaluation.reference import SHIPPED, Reference, load_reference, make_reference
from utils import (
    BROKEN_ARCHIVE,
    LOADERS,
    InputError,
    OneSentenceParser,
    exit_on_bad_input,
    files_below,
    load_dataset,
    make_grid,
    pick_device,
    save_png,
    sha256_of,
    usual_size,
    write_text,
)

SHOWN = 64
BESIDE = ("grid.png", "synthetic.csv")  # of `train.py sample`, in the folder of its images
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
    parser.add_argument(
        "--image-size", type=int, help="pixels of the data set (its usual ones, as in train.py)"
    )
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
        refuse_domain(extractor)
        size = options.image_size
        if size is None:
            size = usual_size(options.reference)
        sets = {
            split: load_dataset(options.reference, options.data_root, size, split)
            for split in ("train", "val", "test", "held_out")
        }
        channels = sets["train"].images.shape[1]
        images, labels = load_images(Path(options.images), sets["train"].classes, channels)
        reference = make_reference(sets["train"], extractor)
    else:
        for name in ("image_size", "data_root"):
            if getattr(options, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} goes with a data set as --reference, not with "
                    f"{options.reference}, which is a file with a size and features of its own"
                )
        sets = None
        shipped = SHIPPED / f"{options.reference}.npz"
        reference = load_reference(shipped if shipped.exists() else options.reference)
        images, labels = load_images(Path(options.images), reference.classes)
        name = reference.extractor.split("-")[0]
        own = name if name in ("domain", "demo") else None
        extractor = load_extractor(options.extractor or own, device)
    name = Path(options.images).resolve().name.removesuffix(".npz")
    out = Path(options.out or Path("judged") / f"{name}-{Path(options.reference).stem}")
    own = {"images": Path(options.images).name, "sha256": sha256_of(images)}
    _refuse_other_images(out / "record.json", own)

    metrics = protocol.evaluate(reference, images, extractor, labels, label_distribution=GIVEN)
    if sets:
        metrics["floor"] = _floor(reference, sets["held_out"].images, len(images), extractor)
        held_out = _without(sets["held_out"].images, images)
        metrics["copies"], suspects = copies.find_copies(
            images, sets["train"].images, held_out, extractor
        )
        found = metrics["copies"]
        known = {"authpct": found["authpct_held_out"], "n_images": found["n_held_out"]}
        metrics["floor"]["copies"] = known  # the rest would take the held-out cells' own search
        figures.save(figures.suspicious_pairs(suspects), out / "suspicious_pairs.png")
        if labels is not None:
            classifier = classifier_of(sets, device)
            metrics["agreement"] = classifier_agreement(images, labels, sets["test"], classifier)
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
    if labels is not None:
        run = {"model": "these images", "preset": "", "budget": "full", "metrics": metrics}
        table += "\n\n" + tables.per_class_markdown(tables.per_class_table([run]))
    record = json.dumps({**own, "metrics": metrics}, indent=1)
    for file, text in {"record.json": record, "table.md": table}.items():
        write_text(out / file, text + "\n")
    rules = metrics["protocol"]
    print(
        f"\n{rules['n_fake']:,} images against the {rules['n_real']:,} of the "
        f"{rules['reference_split']} split of {rules['dataset']}\n\n{table}\n\n"
        f"record, table and figures: {out}"
    )


def _refuse_other_images(record: Path, own: dict) -> None:
    try:
        there = json.loads(record.read_text(encoding="utf-8")).get("sha256")
    except (OSError, ValueError, AttributeError):  # none is there, or half a one
        return
    if there != own["sha256"]:
        raise InputError(
            f"{record} judges other images than {own['images']}; name another folder with --out"
        )


def floor_at(floors: tuple[dict, ...], n: int) -> dict:
    """What real cells get at n images, between two measured numbers; None beyond them.

    A sampling error shrinks as 1/n (Chong and Forsyth 2020, sec. 3), so the numbers are linear in
    it, but for coverage, which grows with every image that comes, ever more slowly: about as log n.
    """
    result = {"n": n}
    for name in [name for name in floors[0] if name != "n"] if floors else ():
        known = sorted((row["n"], row[name]) for row in floors if row[name] is not None)
        numbers, values = (list(column) for column in zip(*known)) if known else ([], [])
        if not known or not numbers[0] <= n <= numbers[-1]:
            result[name] = None
        elif name == "coverage":
            result[name] = float(np.interp(np.log(n), np.log(numbers), values))
        else:
            result[name] = float(np.interp(-1 / n, [-1 / x for x in numbers], values))
    return result


def _floor(reference: Reference, held_out: torch.Tensor, n: int, extractor: Extractor) -> dict:
    """The metrics of as many held-out real cells, or of all where there are fewer."""
    features = extract(held_out, extractor, "features of real images (held out)")
    rows = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:n]
    real, cells = (part.to(extractor.device) for part in (reference.features, features[rows]))
    return {"n": len(rows)} | protocol.measure(real, cells)[0]


def _without(held_out: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The held-out cells that are none of the images, as the control of the search for copies.

    Where real cells are judged some may be; all of them only where nothing else would be left.
    """
    given = {image.numpy().tobytes() for image in images}
    rows = [row for row, cell in enumerate(held_out) if cell.numpy().tobytes() not in given]
    return held_out[rows] if len(rows) >= copies.FIFTH else held_out


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def load_images(
    path: Path, classes: tuple[str, ...], channels: int = 3
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images uint8 [N, channels, S, S], and labels int64 [N] where they have classes, else None.

    classes: those that they may have; channels: 1 for grey images, else 3. Every file counts, but
    for hidden ones and what `train.py sample` writes beside images: one that can't be used is an
    InputError that names it.
    """
    if path.suffix == ".npz" and path.is_file():
        return _load_archive(path, classes, channels)
    if not path.is_dir():
        raise InputError(f"{path} is no folder and no .npz file; give one of them")
    files = [
        file
        for file in files_below(path)
        if not file.name.startswith(".") and not (file.parent == path and file.name in BESIDE)
    ]
    if not files:
        raise InputError(f"{path} holds no images; give another folder")
    arrays = [_read(file, channels) for file in files]
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


def _read(file: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]."""
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with Image.open(file) as image:
            if image.mode != mode:
                raise InputError(
                    f"{file} is a {image.mode} image, not {mode}; convert it, or remove it"
                )
            return np.asarray(image).reshape(image.height, image.width, channels)
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        ValueError,
        SyntaxError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read as an image; repair or remove it") from None


def _load_archive(
    path: Path, classes: tuple[str, ...], channels: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            images = file["images"]
            labels = file["labels"].reshape(-1) if "labels" in file else None
    except (*BROKEN_ARCHIVE, KeyError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path} cannot be read, or holds no array `images`") from None
    form = images.dtype == np.uint8 and images.ndim == 4
    if not form or channels not in (images.shape[1], images.shape[3]) or not len(images):
        raise InputError(
            f"{path}: images must be uint8 [N ≥ 1, {channels}, S, S] or [N, S, S, {channels}] in "
            f"[0, 255], got {images.dtype} {list(images.shape)}"
        )
    if images.shape[1] != channels:
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
