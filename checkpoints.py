"""Shipped checkpoints: a model in one small file, which draws images without training or data.

    python checkpoints.py ship     # finished `best` runs → results/checkpoints
    python checkpoints.py draw     # a grid of each shipped model → samples
    python checkpoints.py demo     # the demo data, by the shipped diffusion model → results

A checkpoint is three files: MODEL-PRESET.safetensors (the float16 weights that were measured, and
what they are), .json (the run's record and the sha256 of the weights' file) and .md (the model
card, whose numbers are the record's). Models of another data set or size than the main table's have
it behind their names, such as MODEL-PRESET-pbc64.
"""

import argparse
import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import nn

from custom_models import MODELS
from custom_models.drawing import (
    IN_GRID,
    SHIPPED_FORMAT,
    labelled_grid,
    load_model,
    load_shipped,
    sample,
)
from evaluation import copies, figures, tables
from evaluation.features import load_extractor, refuse_domain
from generative_pipeline import WEIGHTS_FORMAT, differences, run_folder
from utils import (
    DEMO_FILE,
    InputError,
    OneSentenceParser,
    class_balanced_labels,
    exit_on_bad_input,
    load_dataset,
    save_png,
    sha256_of,
    write_atomically,
    write_text,
)

# Of each model those that are finished: a stand-in draws many times as fast on a CPU.
PRESETS, SEED = ("best", "best_64", "best_128", "best_small"), 0
LARGEST = 25_000_000  # bytes
LARGE = 32  # pixels: of larger images a grid shows fewer
DEMO_CHECKPOINT = "results/checkpoints/ddpm-best.safetensors"
DEMO_PER_CLASS = 250
DEMO_SPLITS = {"train": 1400, "val": 200, "test": 400}  # cells

KINDS = {
    "cvae": "a variational autoencoder",
    "dcgan": "a generative adversarial network",
    "ddpm": "a diffusion model",
    "cwgan_gp": "a Wasserstein GAN with gradient penalty",
    "cgan": "a conditional generative adversarial network",
}
# By data set: where the cells come from and their licence, then what this means for the model.
PBC_LIMITS = (
    "The cells were stained and photographed in one hospital; nothing is known of other "
    "laboratories, stains or diseases. The files carry no patient identity, so cells of one "
    "patient may lie on both sides of the split."
)
DATA = {
    "bloodmnist": (
        "BloodMNIST (Yang et al. 2023), made from PBC (Acevedo et al. 2020; Mendeley data "
        "snkd93bnjr), the cells of Hospital Clínic de Barcelona. Licence of the data: CC BY 4.0, "
        "so name its authors.",
        PBC_LIMITS,
    ),
    "pbc": (
        "PBC (Acevedo et al. 2020; Mendeley data snkd93bnjr), the cells of Hospital Clínic de "
        "Barcelona. Licence of the data: CC BY 4.0, so name its authors.",
        PBC_LIMITS,
    ),
    "demo": (
        "Cells drawn by this suite's diffusion model, which learned from BloodMNIST (CC BY 4.0, so "
        "name its authors); a search found no sign of copies.",
        "Generated cells only show that the code runs; a model of them says nothing of real blood.",
    ),
    "bccd": (
        "BCCD, one white cell cut from each photograph. Licence of the data: MIT.",
        "A few hundred cells of one source, some classes with a few dozen; nothing is known of "
        "other laboratories, stains or diseases, or of the patients.",
    ),
    "mnist": (
        "MNIST (LeCun et al. 1998), handwritten digits.",
        "Digits only show that the code runs; they say nothing of blood.",
    ),
    "celeba": (
        "CelebA (Liu et al. 2015), photographs of well-known people, for research that is not "
        "commercial.",
        "The faces are of real people; the images may resemble them.",
    ),
    "folder": (
        "A folder of images of the user's own; its licence is the user's to state.",
        "What holds for these images and their origin holds for the model.",
    ),
}


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def ship(run: str | Path, out: str | Path, suffix: str = "") -> Path:
    """Write the checkpoint of a finished run into the folder `out`; returns its .safetensors.

    run: the run's folder, with weights.pt and record.json; suffix: what the files' name has behind
    MODEL-PRESET. The same run gives the same bytes.
    Raises InputError where one of the two is missing or broken, where the record is not that of the
    weights, and for a file of more than 25 MB.
    """
    state, record = _read_run(Path(run))
    metrics = record["metrics"]
    about = {
        "format": SHIPPED_FORMAT,
        "model": record["model"],
        "preset": record["preset"],
        "seed": record["seed"],
        "config": record["config"],
        "classes": [row["class"] for row in metrics["floor"]["per_class"]],
        "image_size": record["config"]["image_size"],
        "dataset": record["dataset"]["name"],
        "dataset_sha256": record["dataset"]["sha256"],
        "code_version": record["versions"]["code"],
    }
    tensors = {name: value.contiguous() for name, value in state.items()}
    # One entry: several would be written in another order each time.
    data = save(tensors, {"checkpoint": json.dumps(about)})
    path = Path(out) / f"{record['model']}-{record['preset']}{suffix}.safetensors"
    if len(data) > LARGEST:
        raise InputError(
            f"{path.name} would have {len(data) / 1e6:.1f} MB, more than the "
            f"{LARGEST / 1e6:.0f} MB that are shipped; train a smaller model"
        )

    def write(partial: Path) -> None:
        partial.write_bytes(data)
        load_shipped(partial)

    sha256 = hashlib.sha256(data).hexdigest()
    record["checkpoint"] = {"file": path.name, "sha256": sha256, "bytes": len(data)}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    # Before anything is written: another seed's record may be broken.
    card = model_card(record, [record, *_other_seeds(Path(run))])
    write_atomically(path, write)
    write_text(path.with_suffix(".json"), text)
    write_text(path.with_suffix(".md"), card)
    return path


def _read_run(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The kept weights of a finished run and the record that was measured from them."""
    weights = run / "weights.pt"
    if not weights.is_file():
        raise InputError(f"{run} holds no weights.pt; train the run to its end")
    try:
        kept = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file raises nearly anything
        raise InputError(f"{weights} is broken; delete it and run the training again") from None
    if not isinstance(kept, dict) or kept.get("format") != WEIGHTS_FORMAT:
        raise InputError(f"{weights} is no weight file of this suite; give another run")
    if not (run / "record.json").is_file():
        raise InputError(f"{run} holds no record.json; measure the run first")
    (record,) = tables.collect(run)
    of_weights = {**kept["identity"], **kept["training"]}
    of_record = {
        **record,
        **record["config"],
        **record.get("validated_with", {}),  # what the weights' file still says of sampling
        "dataset_sha256": record["dataset"]["sha256"],
        "code_version": record.get("versions", {}).get("code"),
    }
    differing = differences(of_weights, of_record, of_weights, "in the record")
    if differing:
        raise InputError(
            f"{run / 'record.json'} was not measured from {weights.name}: "
            f"{differing}; delete the record and measure the run again"
        )
    return kept["state"], record


def _other_seeds(run: Path) -> list[dict]:
    """Records of the other trainings of the run's model and preset."""
    return [r for path in run.parent.glob("seed*") if path != run for r in tables.collect(path)]


def model_card(record: dict, trainings: list[dict]) -> str:
    """What a shipped model is, was trained on, is worth and is for, as Markdown.

    record: a run's record with `checkpoint` (file, sha256, bytes), as `ship` writes it; trainings:
    the records of all seeds.
    """
    model, preset, data, config = (record[key] for key in ("model", "preset", "dataset", "config"))
    classes = [row["class"] for row in record["metrics"]["floor"]["per_class"]]
    built = MODELS[model].PRESETS[preset]
    source = type(built).__module__.replace(".", "/") + ".py"
    conditional = "per_class" in record["metrics"]
    asked = (
        "It draws the class that it is asked for."
        if conditional
        else "It can't be asked for a class."
    )
    origin, limits = DATA[data["source"].partition(":")[0]]
    size, file = config["image_size"], record["checkpoint"]["file"]
    shortfall = record["budget"] == "reduced" and tables.reduced_shortfall(trainings)
    numbers = _no_numbers(shortfall) if shortfall else _numbers(record, trainings)
    kind = KINDS[model][0].upper() + KINDS[model][1:]
    return f"""# {model} {preset}

{kind} for images of single blood cells, {size}×{size} pixels with
{config["image_channels"]} channels, of {len(classes)} classes: {", ".join(classes)}. {asked}
Networks, loss and sampler are in `{source}`, which names the papers.
{record["parameters"]:,} parameters; the file holds the weights that were chosen and measured, in
float16 ({record["checkpoint"]["bytes"] / 1e6:.1f} MB, sha256 `{record["checkpoint"]["sha256"]}`).

## Use

From the root of the repository, `make samples` draws a grid. In Python, started there:

```python
from custom_models.drawing import load_shipped, sample
from utils import class_balanced_labels

model, about = load_shipped("results/checkpoints/{file}")
images = sample(model, class_balanced_labels({len(classes)}, 4), seed=0)  # uint8 [N, C, S, S]
```

## Data

{origin} This model saw the {data["n"]:,} images of the {data["split"]} split of {data["name"]}
(sha256 `{data["sha256"]}`). Identical pairs across splits: {data["duplicates_across_splits"]}.

## Training

- budget: {record["budget"]}, {record["images_seen"]:,} images seen in {record["steps"]:,} steps
  ({config["epochs"]} epochs), seed {record["seed"]}; the weights are those of step
  {record["kept_step"]:,}
- EMA of the weights: {f"decay {config['ema_decay']}" if config["ema_decay"] else "none"}
- time: {record["seconds"]:,.0f} seconds on {record["device"]}, {record["precision"]}
- code: version {record["versions"]["code"]}, commit {record["git_commit"]}, torch
  {record["versions"]["torch"]}

## Numbers

{numbers}
The record, `{Path(file).stem}.json`, holds all that was measured of this training. On another
device or version of torch a seed's images may differ in their last bits.

## Intended use and limits

For research on generative models and on their evaluation. Not for diagnosis, and not in the place
of patients' cells where a medical product is tested. {limits}
"""


def _no_numbers(shortfall: str) -> str:
    return f"""A stand-in, trained at a reduced budget. A result of it would need more than there is
so far ({shortfall}), so none is shown here.
"""


def _numbers(record: dict, trainings: list[dict]) -> str:
    (row,) = tables.results_table(trainings)
    others = "It is the only training so far, so how far others differ is not known."
    if row["frechet_sd"] is not None:
        others = (
            f"Over {row['seeds']} trainings: {row['distance_name']} {row['frechet_mean']:.1f} ± "
            f"{row['frechet_sd']:.1f} (mean ± sd)."
        )
    device = record["measured"]["device"]
    return f"""Of one training, measured from the weights in this file on {device}. {others}
{tables.run_table(record)}
Such a distance holds for this protocol and these features alone. A search without a sign of copies
is no proof that there are none: a few can go unseen.
"""


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


def grid(model: nn.Module, about: dict, seed: int) -> Figure:
    """Eight images of each class, four of large ones, a row a class; from a model without classes
    as many.

    model, about: as `load_shipped` returns them.
    """
    classes = about["classes"]
    # All grids together are to take no more than a minute on two cores.
    columns = figures.PER_CLASS if about["image_size"] <= LARGE else figures.PER_CLASS // 2
    images = sample(model, class_balanced_labels(len(classes), columns), seed)
    title = f"{about['model']} {about['preset']}, seed {seed}"
    names = classes if model.conditional else ()
    return figures.comparison({title: images}, len(classes), columns, names)


def draw(path: str | Path, out: str | Path, seed: int = SEED) -> None:
    """Write the grid of a shipped model as a PNG. path, errors: as in `load_shipped`."""
    figures.save(grid(*load_shipped(path), seed), out)


# ---------------------------------------------------------------------------------------------
# The demo data
# ---------------------------------------------------------------------------------------------


def draw_demo(
    checkpoint: str | Path,
    out: str | Path,
    data_root: str | Path | None = None,
    extractor: str | None = None,
) -> dict:
    """Draw the demo data with a shipped model, and search it for copies of training cells.

    Writes `out`, a .npz in MedMNIST's format with 250 cells of each class in three splits, and
    beside it a .json (what drew them, and what the search found, which is returned) and a .png.
    checkpoint, errors: as in `load_shipped`; data_root: with the data that the model learned from;
    extractor: in whose features copies are searched, as in `load_extractor`; not one that knows
    the training cells. Raises InputError, too, for a model without classes, and where there are
    signs of copies: then nothing is written.
    """
    model, about = load_model(checkpoint)
    if not model.conditional:
        raise InputError(f"{checkpoint} can't be asked for a class; give a model that can")
    network = load_extractor(extractor)
    refuse_domain(network)
    train, held_out = (
        load_dataset("bloodmnist", data_root, about["image_size"], split)
        for split in ("train", "held_out")
    )
    if train.sha256() != about["dataset_sha256"]:
        raise InputError(
            f"{checkpoint} learned from other cells than those of {train.name}; give the data root "
            "with its own, in which copies have to be searched"
        )
    labels = class_balanced_labels(len(about["classes"]), DEMO_PER_CLASS)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))]
    images = sample(model, labels, SEED)
    found, _ = copies.find_copies(images, train.images, held_out.images, network)
    if not found["verdict"].startswith("no sign of copies"):
        raise InputError(f"the cells that {checkpoint} draws: {found['verdict']}; take another")

    arrays = {}
    counts = list(DEMO_SPLITS.values())
    for split, cells, kinds in zip(DEMO_SPLITS, images.split(counts), labels.split(counts)):
        arrays[f"{split}_images"] = cells.permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = kinds[:, None].numpy().astype(np.uint8)
    out = Path(out)
    record = {
        "file": out.name,
        "splits": DEMO_SPLITS,
        "sha256": sha256_of(images),
        "drawn_by": {"file": Path(checkpoint).name, "sha256": about["sha256"]},
        "seed": SEED,
        "extractor": network.name,
        "copies": found,
    }
    rows = torch.cat([torch.nonzero(labels == k)[:IN_GRID, 0] for k in labels.unique()])

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(out, write)
    write_text(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    save_png(labelled_grid(images[rows], about["classes"], IN_GRID), out.with_suffix(".png"))
    return found


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneSentenceParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shipping = commands.add_parser("ship", help="ship finished `best` runs and stand-ins, seed 0")
    shipping.add_argument("--results", default="results", help="folder of the results (results)")
    shipping.add_argument("--out", default="results/checkpoints", help="(results/checkpoints)")
    drawing = commands.add_parser("draw", help="draw a grid of each shipped model")
    drawing.add_argument("--checkpoints", default="results/checkpoints", help="their folder")
    drawing.add_argument("--out", default="samples", help="folder of the grids (samples)")
    drawing.add_argument("--seed", type=int, default=SEED, help=f"of the noise ({SEED})")
    demo = commands.add_parser("demo", help="draw the demo data with the shipped diffusion model")
    demo.add_argument("--checkpoint", default=DEMO_CHECKPOINT, help=f"({DEMO_CHECKPOINT})")
    demo.add_argument("--data-root", help="folder of the data ($DATA_ROOT, else data)")
    demo.add_argument(
        "--extractor", help="for the search for copies ($EXTRACTOR, else inception)"
    )
    demo.add_argument("--out", default=str(DEMO_FILE), help="a .npz (results/demo_cells.npz)")
    return parser.parse_args(arguments)


def ship_all(results: str | Path, out: str | Path) -> None:
    """Ship seed 0 of each model's `best` runs and of its stand-in; a model without any is named.

    Runs of other data sets and sizes, in folders such as RESULTS/pbc64, are shipped where there are
    any; those of one's own images are not, which may be of patients.
    """
    others = sorted(folder.parent for folder in Path(results).glob("*[0-9]/runs"))
    for page in (Path(results), *others):
        for model in MODELS:
            presets = [preset for preset in PRESETS if preset in MODELS[model].PRESETS]
            runs = [run_folder(page, model, preset, SEED) for preset in presets]
            finished = [
                run
                for run in runs
                if (run / "weights.pt").exists() and (run / "record.json").exists()
                and not _of_own_images(run)
            ]
            for run in finished:
                path = ship(run, out, f"-{page.name}" if page in others else "")
                print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
            if runs and not finished and page not in others:
                print(f"{model}: not finished, {runs[0]} lacks weights.pt or record.json")


def _of_own_images(run: Path) -> bool:
    with contextlib.suppress(ValueError, KeyError, TypeError):  # `ship` says what is wrong
        record = json.loads((run / "record.json").read_text(encoding="utf-8"))
        return record["dataset"]["source"] == "folder"
    return False


def draw_all(folder: str | Path, out: str | Path, seed: int) -> None:
    """Draw a grid of every checkpoint in `folder`. Raises InputError where there is none."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder} holds no checkpoints; `make checkpoints` ships finished runs")
    for path in paths:
        target = Path(out) / f"{path.stem}.png"
        draw(path, target, seed)
        print(target, flush=True)


def main() -> None:
    options = parse_arguments()
    if options.command == "ship":
        ship_all(options.results, options.out)
    elif options.command == "demo":
        found = draw_demo(options.checkpoint, options.out, options.data_root, options.extractor)
        print(f"{options.out}: {found['verdict']}")
    else:
        draw_all(options.checkpoints, options.out, options.seed)


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
