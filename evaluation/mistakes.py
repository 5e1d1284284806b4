"""What common mistakes do to a Fréchet distance, measured on real cells.

    python -m evaluation.mistakes --data-root DATA --extractor FILE

Each experiment is a function that returns a plain dict; `measure` keeps it, with the facts it was
taken under, as OUT/EXPERIMENT.json and doesn't measure it again. Those that need images of a
generator, `softness` and `typicality` are called by notebooks/how_to_read_the_numbers.ipynb.
"""

import functools
import io
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from custom_models.layers import JPEG
from evaluation.copies import FIFTH, authpct, compare_neighbours, ct
from evaluation.features import Extractor, extract, load_extractor, refuse_domain
from evaluation.frechet import IMAGES_PER_DIMENSION, frechet_distance, gaussian_statistics
from evaluation.kid import kernel_distance
from evaluation.neighbours import k_nearest
from evaluation.reference import Reference, make_reference
from utils import (
    ImageSet,
    InputError,
    OneSentenceParser,
    data_folder,
    exit_on_bad_input,
    find_pbc,
    list_pbc,
    load_dataset,
    pick_device,
    progress,
    random_flips_and_turns,
    resize_pbc,
    sha256_of,
    split_pbc,
    to_model_range,
    to_uint8,
    write_text,
)

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "numbers"
# Raised when an experiment gives more, or other, than before: kept records are measured anew.
VERSIONS = {"resize": 2, "stored_alike": 2}  # of those that are no longer 1
N = 2000
DRAWS = 5
SIZES = (16, 50, 160, 500, 1000, 1600, 2500, 4000, 6500, 10_000)
N_EQUAL = 1700
QUALITIES = (95, 75, 50)
BLURS = (0.4, 0.6, 0.8)  # standard deviations in pixels
# How BloodMNIST made its cells: 200 pixels of a PBC image, resized, stored as JPEG, whose colours
# were halved within the cosine transform.
ORIGINAL, QUALITY, CHROMA = 200, 75, "dct"
# Mean difference, of 255, between a cell of the data set and its original made small: rounding
# stays well below it, another cell lies well above.
SAME_CELL = 10


@dataclass(frozen=True, eq=False)
class Setup:
    """The real cells and the network that all experiments share.

    rows: int64 [n], the held-out cells that are changed, the same in every experiment.
    """

    train: ImageSet
    held_out: ImageSet
    rows: torch.Tensor
    extractor: Extractor
    data_root: Path
    seed: int

    @property
    def cells(self) -> torch.Tensor:
        """uint8 [n, 3, S, S]."""
        return self.held_out.images[self.rows]

    @functools.cached_property
    def reference(self) -> Reference:
        return make_reference(self.train, self.extractor)

    @functools.cached_property
    def held_out_features(self) -> torch.Tensor:
        """float32 [N, D] of all held-out cells."""
        return extract(self.held_out.images, self.extractor, "features of held-out cells")

    @property
    def other_features(self) -> torch.Tensor:
        """float32 [N - n, D] of the held-out cells that are not changed.

        Raises InputError for fewer than both halves of `typicality` need.
        """
        others = torch.ones(len(self.held_out), dtype=torch.bool)
        others[self.rows] = False
        if others.sum() < 4 * FIFTH:
            raise InputError(
                f"beside the {len(self.rows)} held-out cells that are changed there are only "
                f"{int(others.sum())}, and {4 * FIFTH} are needed; take a network of fewer features"
            )
        return self.held_out_features[others]

    @functools.cached_property
    def floor(self) -> dict[str, float]:
        """value: what the unchanged cells get; sd: over draws of as many held-out cells."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = [
            self.distance(_draw(self.held_out_features, len(self.rows), generator))
            for _ in range(DRAWS)
        ]
        value = self.distance(self.held_out_features[self.rows])
        return {"value": value, "sd": statistics.stdev(draws)}

    def distance(self, features: torch.Tensor) -> float:
        """The Fréchet distance of features [N, D] to those of the train cells."""
        return frechet_distance(self.reference.statistics, gaussian_statistics(features))

    def features(self, images: torch.Tensor, name: str) -> torch.Tensor:
        """float32 [n, D] of changed cells."""
        if torch.equal(images, self.cells):  # unchanged: known already
            return self.held_out_features[self.rows]
        return extract(images, self.extractor, name)


def load_setup(
    data_root: str | Path | None = None,
    extractor: str | Path | None = None,
    device: str = "auto",
    n: int = N,
    seed: int = 0,
) -> Setup:
    """BloodMNIST at 28 pixels, `n` of its held-out cells (all where there are fewer), a network.

    n: more where the network has more than n / 1.5 features, since a Fréchet distance needs them.
    data_root: as in `utils.load_dataset`; extractor: as in `features.load_extractor`. Raises
    InputError where there are too few held-out cells for the network.
    """
    data_root = data_folder(data_root)
    train, held_out = (
        load_dataset("bloodmnist", data_root, 28, split) for split in ("train", "held_out")
    )
    network = load_extractor(extractor, pick_device(device))
    refuse_domain(network)
    least = fewest(network)
    if len(held_out) < least:
        raise InputError(
            f"{len(held_out)} held-out cells are too few for a Fréchet distance in {network.dim} "
            f"dimensions, which takes {least}; take a network of fewer features"
        )
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
    rows = order[: max(n, least)]
    return Setup(train, held_out, rows, network, data_root, seed)


def fewest(extractor: Extractor) -> int:
    """The least number of images that a Fréchet distance on these features can be taken of."""
    return int(IMAGES_PER_DIMENSION * extractor.dim) + 1


def _draw(rows: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """n of the rows without replacement."""
    return rows[torch.randperm(len(rows), generator=generator)[:n]]


# ---------------------------------------------------------------------------------------------
# Mistakes in the images
# ---------------------------------------------------------------------------------------------


def value_ranges(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """uint8 [N, 3, S, S] as they come out when one range of values is taken for another.

    Where [-1, 1] is taken for [0, 1], values below 0 are clipped: that is our reading, since
    uint8 has no room for them.
    """
    signed = to_model_range(images)
    unit = (signed + 1) / 2
    scaled_twice = 2 * signed - 1  # in [-3, 1], of which a tanh reaches only [-1, 1]
    return {
        "right range": to_uint8(signed),
        "[0, 1] taken for [-1, 1]": to_uint8(unit),
        "[-1, 1] taken for [0, 1]": (signed.clamp(0, 1) * 255).round().to(torch.uint8),
        "scaled twice, cut by tanh": to_uint8(scaled_twice.clamp(-1, 1)),
    }


def value_range(setup: Setup) -> dict:
    """The right images beside those of three mix-ups of [0, 1] and [-1, 1]."""
    return _against_train(
        setup,
        "Held-out real cells whose values were taken for another range, against the train cells",
        value_ranges(setup.cells),
    )


def recoded(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """uint8 [N, 3, S, S] as they are, and through JPEG at falling quality."""
    variants = {f"JPEG, quality {q}": through_jpeg(images, q) for q in QUALITIES}
    return {"lossless (PNG)": images} | variants


def through_jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """uint8 [N, 3, S, S] stored by Pillow as JPEG, with colours at half size, and read again."""
    pictures = []
    for picture in images.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        pictures.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def as_the_data(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, S, S] stored in the way of the data set's own cells, and read again."""
    return to_uint8(JPEG(QUALITY, CHROMA)(to_model_range(images)))


def jpeg(setup: Setup) -> dict:
    """The cells stored without loss, and as JPEG once more than the data set's own time."""
    return _against_train(
        setup,
        "Held-out real cells stored as JPEG once more and read again, against the train cells",
        recoded(setup.cells),
    )


def originals(setup: Setup, n: int | None = None) -> torch.Tensor:
    """The setup's first n cells (all) before they were made small: uint8 [n, 3, 200, 200].

    Read from the PBC set beside the data set. Raises InputError where it is not there, or where
    its files are other cells.
    """
    source = find_pbc(setup.data_root)
    names, _ = list_pbc(source)
    split = source.with_name("pbc_split.csv")
    parts = split_pbc(split, names)
    files = [names[row] for row in parts["val"] + parts["test"]]
    if len(files) != len(setup.held_out):
        raise InputError(
            f"{split} names {len(files)} held-out cells, bloodmnist.npz has "
            f"{len(setup.held_out)}; get the file that belongs to it"
        )
    rows = setup.rows[:n]
    pixels = resize_pbc(source, [files[row] for row in rows], ORIGINAL)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    cells = setup.held_out.images[rows]
    small = as_the_data(_pillow(images, cells.shape[-1], Image.Resampling.BILINEAR))
    gaps = (small.float() - cells.float()).abs().mean((1, 2, 3))
    if gaps.max() > SAME_CELL:
        raise InputError(
            f"{split} does not belong to bloodmnist.npz: cell "
            f"{rows[gaps.argmax()]} of the held-out ones is another; get the file that does"
        )
    return images


def resized(images: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """uint8 [N, 3, S, S] made small to `size` pixels in six ways, and stored as the data set is.

    The first is the data set's own; the last two show what another program's JPEG, and none, do.
    Pillow's filters are as wide as the reduction asks for (antialiased), but for nearest.
    """
    coarse = F.interpolate(images.float(), [size, size], mode="bilinear", antialias=False)
    smooth = _pillow(images, size, Image.Resampling.BILINEAR)
    small = {
        "bilinear, antialiased": smooth,
        "box": _pillow(images, size, Image.Resampling.BOX),
        "bicubic, antialiased": _pillow(images, size, Image.Resampling.BICUBIC),
        "Lanczos": _pillow(images, size, Image.Resampling.LANCZOS),
        "bilinear, not antialiased": coarse.round().to(torch.uint8),
        "nearest": _pillow(images, size, Image.Resampling.NEAREST),
    }
    stored = {name: as_the_data(part) for name, part in small.items()}
    return stored | {
        "bilinear, antialiased, Pillow's JPEG": through_jpeg(smooth, QUALITY),
        "bilinear, antialiased, no JPEG": smooth,
    }


def _pillow(images: torch.Tensor, size: int, resampling: Image.Resampling) -> torch.Tensor:
    pictures = [
        np.asarray(Image.fromarray(picture).resize((size, size), resampling))
        for picture in images.permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def resize(setup: Setup) -> dict:
    """The cells made small from their 200-pixel originals in six ways."""
    return _against_train(
        setup,
        "Held-out real cells made small from 200 pixels in several ways and, where nothing else is "
        "said, stored as JPEG as the data set is, against the train cells (bilinear, antialiased)",
        resized(originals(setup), setup.cells.shape[-1]),
    )


def _against_train(setup: Setup, what: str, variants: dict[str, torch.Tensor]) -> dict:
    rows = [
        {"name": name, "value": setup.distance(setup.features(images, name))}
        for name, images in variants.items()
    ]
    return {
        "what": what,
        "n_real": len(setup.train),
        "n_fake": len(setup.rows),
        "floor": setup.floor["value"],
        "floor_sd": setup.floor["sd"],
        "rows": rows,
    }


# ---------------------------------------------------------------------------------------------
# Mistakes in the comparison
# ---------------------------------------------------------------------------------------------


def sample_size(setup: Setup) -> dict:
    """Real against real at growing n: both are samples of one population, so the truth is 0.

    n train cells, drawn anew each time, against all held-out cells. `fit`: the Fréchet distance as
    intercept + slope / n (Chong and Forsyth 2020, sec. 3), over the sizes above 1.5 dimensions.
    """
    real, generator = setup.held_out_features, torch.Generator().manual_seed(setup.seed)
    enough = IMAGES_PER_DIMENSION * setup.extractor.dim
    sizes = [n for n in SIZES if n <= len(setup.train)]
    fitted = [n for n in sizes if n > enough]
    if len(fitted) < 2:
        raise InputError(
            f"{len(setup.train)} train cells are too few for a line over several n above "
            f"{enough:g}; use an extractor with fewer than {setup.extractor.dim} dimensions"
        )
    target, rows = gaussian_statistics(real), []
    for n in progress(sizes, desc="sample sizes"):
        draws = [_draw(setup.reference.features, n, generator) for _ in range(DRAWS)]
        distances = [frechet_distance(gaussian_statistics(draw), target) for draw in draws]
        kids = [kernel_distance(real, draw)[0] for draw in draws]
        rows.append(
            {
                "name": f"n = {n:,}",
                "n": n,
                "value": statistics.mean(distances),
                "sd": statistics.stdev(distances),
                "kid": statistics.mean(kids),
                "kid_sd": statistics.stdev(kids),
            }
        )
    means = [row["value"] for row in rows if row["n"] in fitted]
    slope, intercept = np.polyfit(1 / np.array(fitted), means, 1)
    return {
        "what": "n real train cells against all held-out real cells, mean and sd of "
        f"{DRAWS} draws (which overlap at large n)",
        "n_real": len(real),
        "n_fake": sizes,
        "draws": DRAWS,
        "enough": enough,
        "fit": {"intercept": float(intercept), "slope": float(slope)},
        "rows": rows,
    }


def augmented_reference(setup: Setup) -> dict:
    """A reference of real cells as they are, and of the same cells flipped and turned."""
    generator = torch.Generator().manual_seed(setup.seed)
    chosen = torch.randperm(len(setup.train), generator=generator)[: len(setup.held_out)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        turned = random_flips_and_turns(setup.train.images[chosen])
    references = {
        "as they are": setup.reference.features[chosen],
        "flipped and turned": extract(turned, setup.extractor, "features of turned cells"),
    }
    cells = gaussian_statistics(setup.held_out_features[setup.rows])
    rows = [
        {"name": name, "value": frechet_distance(gaussian_statistics(features), cells)}
        for name, features in references.items()
    ]
    return {
        "what": "Held-out real cells against train cells as they are, and against the same train "
        "cells with random flips and quarter turns",
        "n_real": len(chosen),
        "n_fake": len(setup.rows),
        "floor": rows[0]["value"],
        "floor_sd": setup.floor["sd"],
        "rows": rows,
    }


def reference_split(setup: Setup, images: torch.Tensor) -> dict:
    """Generated images and held-out cells against each split, at its full size and at equal n.

    images: uint8 [N, 3, S, S], as many as there are held-out cells. The held-out cells are
    themselves among the validation, test and all cells. Raises InputError where a split has too
    few cells for the network.
    """
    n_val = len(load_dataset("bloodmnist", setup.data_root, 28, "val"))
    train, held_out = setup.reference.features, setup.held_out_features
    splits = {
        "train": train,
        "validation": held_out[:n_val],
        "test": held_out[n_val:],
        "all": torch.cat([train, held_out]),
    }
    least, smallest = fewest(setup.extractor), min(splits, key=lambda split: len(splits[split]))
    if len(splits[smallest]) < least:
        raise InputError(
            f"the {smallest} split has {len(splits[smallest])} cells, too few for a Fréchet "
            f"distance in {setup.extractor.dim} dimensions, which takes {least}"
        )
    n_equal = min(max(N_EQUAL, least), len(splits[smallest]))
    generator = torch.Generator().manual_seed(setup.seed)
    fakes = extract(images, setup.extractor, "features of generated images")
    subjects = {
        "generated": gaussian_statistics(fakes),
        "held-out real cells": gaussian_statistics(held_out),
    }
    rows = []
    for split, features in splits.items():
        for part in (features, _draw(features, n_equal, generator)):
            reference = gaussian_statistics(part)
            rows += [
                {
                    "name": f"{subject} against {len(part):,} of {split}",
                    "subject": subject,
                    "split": split,
                    "n_real": len(part),
                    "equal_n": part is not features,
                    "value": frechet_distance(reference, statistics_),
                }
                for subject, statistics_ in subjects.items()
            ]
    return {
        "what": "The same generated images, and the held-out real cells, against four choices of "
        "real cells",
        "n_real": {split: len(features) for split, features in splits.items()},
        "n_equal": n_equal,
        "n_fake": {"generated": len(fakes), "held-out real cells": len(held_out)},
        "rows": rows,
    }


def evaluations_as_runs(setup: Setup, evaluations: torch.Tensor, trainings: torch.Tensor) -> dict:
    """The spread of several evaluations of one training beside that of several trainings.

    evaluations: uint8 [K, n, 3, S, S], from one training with K noise seeds; trainings: [L, n, 3,
    S, S], from L trainings with different seeds. K and L are at least 2.
    """
    kinds = {"evaluations of one training": evaluations, "trainings": trainings}
    for kind, sets in kinds.items():
        if len(sets) < 2:
            raise InputError(f"a spread needs at least two {kind}, got {len(sets)}; give more")
    rows, spreads = [], {}
    for kind, sets in kinds.items():
        values = [
            setup.distance(extract(images, setup.extractor, f"{kind}, {number} of {len(sets)}"))
            for number, images in enumerate(sets, 1)
        ]
        rows += [
            {"name": f"{kind}, {number}", "kind": kind, "value": value}
            for number, value in enumerate(values, 1)
        ]
        spreads[kind] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
    return {
        "what": "Several evaluations of one training, and one evaluation of several trainings, "
        "against the train cells",
        "n_real": len(setup.train),
        "n_fake": evaluations.shape[1],
        "floor": setup.floor["value"],
        "floor_sd": setup.floor["sd"],
        "spreads": spreads,
        "rows": rows,
    }


def stored_alike(setup: Setup, images: torch.Tensor) -> dict:
    """Generated images as drawn, and stored as JPEG in the way of the data set's own cells.

    images: uint8 [N, 3, S, S], as many as the setup's cells.
    """
    variants = {"as drawn": images, "stored as the real ones": as_the_data(images)}
    return _against_train(
        setup,
        "The same generated images as drawn, and stored as JPEG as the real cells were, against "
        "the train cells",
        variants,
    )


def softened(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """uint8 [N, 3, S, S] as they are, and blurred ever more, then stored as the data set's own."""
    variants = {"as they are": images}
    for sigma in BLURS:
        soft = gaussian_blur(to_model_range(images), kernel_size=7, sigma=sigma)
        variants[f"blurred by {sigma:g} pixels"] = as_the_data(to_uint8(soft))
    return variants


def softness(setup: Setup) -> dict:
    """What blur alone makes of scores that look for copies: none of these cells is one."""
    variants, train = softened(setup.cells), setup.reference.features
    result = _against_train(
        setup,
        "Held-out real cells, blurred and stored as the data set's own, against the train cells; "
        "C_T, and the share nearer to a train cell, take the other held-out cells as their control",
        variants,
    )
    controls = setup.other_features
    for row, (name, images) in zip(result["rows"], variants.items(), strict=True):
        row |= closeness(setup.features(images, name), train, controls)
    return result | {"n_control": len(controls)}


def closeness(features: torch.Tensor, train: torch.Tensor, controls: torch.Tensor) -> dict:
    """What three scores say of how near features lie to the train cells' and to control cells'."""
    nearest = (k_nearest(features, cells, FIFTH) for cells in (train, controls))
    found = compare_neighbours(*nearest, len(train), len(controls))
    shares = {name: found[name] for name in ("train_share", "train_share_interval")}
    return {"authpct": authpct(features, train), "ct": ct(features, train, controls)} | shares


def typicality(setup: Setup) -> dict:
    """What the same scores make of real cells of the usual kinds: none of these is a copy either.

    Typical are the held-out cells whose fifth nearest among others like them is near; neither the
    train cells nor the control, the setup's own cells, have a part in the choice.
    """
    train, cells, controls = (
        setup.reference.features,
        setup.other_features,
        setup.held_out_features[setup.rows],
    )
    half = len(cells) // 2
    generator = torch.Generator().manual_seed(setup.seed)
    order = k_nearest(cells, cells, FIFTH + 1)[0][:, FIFTH].argsort()  # the first is the cell
    halves = {
        "a random half": _draw(cells, half, generator),
        "the most typical half": cells[order[:half]],
        "the least typical half": cells[order[-half:]],
    }
    return {
        "what": "Halves of the held-out cells that no other experiment changes, by how near the "
        "fifth nearest of them lies; C_T, and the share nearer to a train cell, take the changed "
        "ones, as they are, as their control",
        "n_real": len(train),
        "n_fake": half,
        "n_control": len(controls),
        "rows": [
            {"name": name} | closeness(part, train, controls) for name, part in halves.items()
        ],
    }


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------

# Those that need no generator. The one that needs files beside the data set comes last.
EXPERIMENTS = (sample_size, value_range, jpeg, augmented_reference, resize)


def measure(experiment, setup: Setup, out: str | Path = OUT, *images: torch.Tensor) -> dict:
    """The experiment's record OUT/NAME.json: read if it was taken under the same facts, else made.

    images: what the experiment takes beside the setup, uint8. The record's `seconds` are few where
    features came from the cache. Raises InputError where the record is of other data or of another
    network, which would be lost.
    """
    facts = {
        "experiment": experiment.__name__,
        "version": VERSIONS.get(experiment.__name__, 1),
        "dataset": setup.train.name,
        "dataset_sha256": setup.train.sha256(),
        "held_out_sha256": setup.held_out.sha256(),
        "image_size": setup.cells.shape[-1],
        "extractor": setup.extractor.name,
        "extractor_sha256": setup.extractor.sha256,
        "distance_name": setup.extractor.distance_name,
        "feature_dim": setup.extractor.dim,
        "n": len(setup.rows),
        "seed": setup.seed,
        "images_sha256": [sha256_of(part) for part in images],
    }
    path = Path(out) / f"{experiment.__name__}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {name: kept[name] for name in facts} == facts:
            return kept
        of = ("dataset_sha256", "held_out_sha256", "extractor_sha256")
        other = any(kept[name] != facts[name] for name in of)
    except (OSError, ValueError, KeyError, TypeError):
        other = False
    if other:
        raise InputError(
            f"{path} was measured on {kept['dataset']} with {kept['extractor']}, and would be "
            "overwritten; give other data or another network a folder of its own (out)"
        )
    start = time.monotonic()
    result = experiment(setup, *images)
    seconds = round(time.monotonic() - start, 1)
    record = facts | {"device": str(setup.extractor.device), "seconds": seconds} | result
    text = json.dumps(record, indent=1) + "\n"
    write_text(path, text)
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = OneSentenceParser(
        prog="python -m evaluation.mistakes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data-root", help="folder with the data sets ($DATA_ROOT, else data)")
    parser.add_argument(
        "--extractor",
        help="inception, demo or a TorchScript file ($EXTRACTOR, else inception)",
    )
    parser.add_argument("--out", default=OUT, help="folder of the records (results/numbers)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    options = parser.parse_args(arguments)
    setup = load_setup(options.data_root, options.extractor, options.device)
    for experiment in progress(EXPERIMENTS, desc="experiments"):
        record = measure(experiment, setup, options.out)
        print(f"{record['experiment']}: {record['what']}")
        for row in record["rows"]:
            print(f"  {row['name']}: {record['distance_name']} {row['value']:.1f}")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
