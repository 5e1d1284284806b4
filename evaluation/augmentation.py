"""The augmentation study: does adding generated cells make a classifier of cells better?

A study compares arms: ways to train a classifier on the same real cells, with and without generated
ones. `bccd` splits a small data set into five folds; `imbalance` cuts the training split of a large
one to a long tail, in five subsamples that share no cell, and keeps its test split. The generator
is trained anew for each fold, on that fold's training cells alone; generated images enter training
sets only; the test cells are real and seen by nobody before. All arms get the same number of
updates. Every arm leaves a record, and tables are made from records alone.

What is compared, above all, is named here before any result: PRIMARY, by balanced accuracy.
"""

import dataclasses
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from evaluation import classification, figures, significance
from evaluation.copies import TURNS, turned
from evaluation.neighbours import distances
from evaluation.tables import mean_and_sd, number, p_value, write_rows
from utils import (
    PATIENTS,
    SPLITS,
    UPRIGHT,
    ImageSet,
    InputError,
    data_folder,
    load_dataset,
    read_patients,
    seed_everything,
    write_text,
)

# Part of every record's identity. Raise it with any change that alters what an arm gives.
VERSION = 1
FOLDS = 5
BATCH_SIZE, LR = 64, 1e-3  # of the classifiers
MIXUP = 0.2  # alpha of the mixup arm (Zhang et al. 2018)
# Root mean squared difference, 0 … 255, below which two images show the same cell. The nearest
# different cells are 9 apart in BCCD at 64 pixels, 12 in BloodMNIST (rebuilt).
NEAR = 4.0
FILL_TO = 300  # images of each class in the published study of BCCD
# Training cells of each class in the imbalance study; five times as many are needed.
LONG_TAIL = {
    "basophil": 16,
    "erythroblast": 16,
    "lymphocyte": 32,
    "monocyte": 64,
    "platelet": 128,
    "immature granulocyte": 256,
    "eosinophil": 384,
    "neutrophil": 448,
}
PRIMARY_AMOUNT = 3000
# For each study the arm in question and the best practice that has no generated images.
PRIMARY = {
    "bccd": ("real+GAN+traditional", "real+traditional"),
    "imbalance": (f"real+GAN {PRIMARY_AMOUNT}+strong", "real+oversampling+strong"),
}
REFERENCE, FLAW = "real", "published flaw"


@dataclass(frozen=True)
class Study:
    """What all records of one table have in common.

    name: `bccd` or `imbalance`. dataset, image_size: as in `utils.load_dataset`. updates: of every
    classifier. generator, generator_settings: a model's name and the changes of its `baseline`.
    amounts: generated images of each class, added in `imbalance`, filled up to in `bccd`. counts:
    training cells of each class in `imbalance`, by its name.
    """

    name: str
    dataset: str
    image_size: int
    updates: int
    generator: str
    generator_settings: dict
    amounts: list[int]
    counts: dict[str, int]


# Small enough for a CPU core.
SMALL_GENERATOR = {
    "base_channels": 32,
    "batch_size": 32,
    "flips_and_turns": True,
    "ema_decay": 0.99,
}
DEFAULTS = {
    "bccd": Study(
        "bccd", "bccd", 64, 600, "cgan", {**SMALL_GENERATOR, "epochs": 150}, [FILL_TO], {}
    ),
    "imbalance": Study(
        "imbalance",
        "bloodmnist",
        28,
        1500,
        "cgan",
        {**SMALL_GENERATOR, "epochs": 60},
        [500, PRIMARY_AMOUNT],
        LONG_TAIL,
    ),
}


def make_study(name: str, **changes) -> Study:
    """The study's defaults with some fields changed, those that are not None."""
    if name not in DEFAULTS:
        raise InputError(f"unknown study {name!r}; known are {', '.join(DEFAULTS)}")
    changes = {field: value for field, value in changes.items() if value is not None}
    study = dataclasses.replace(DEFAULTS[name], **changes)
    if study.dataset.startswith(tuple(name.lower() for name in UPRIGHT)):
        raise InputError(
            f"a study mirrors and turns its images, which {study.dataset} has an up and a down "
            "for; take a data set of cells, such as pbc"
        )
    amounts = study.amounts
    numbers = isinstance(amounts, list | tuple) and all(type(n) is int and n > 0 for n in amounts)
    if not (amounts and numbers):
        raise InputError(f"amounts must be whole numbers above 0 in a list, got {amounts!r}")
    if type(study.updates) is not int or study.updates < 1:
        raise InputError(f"updates must be a whole number above 0, got {study.updates!r}")
    if not isinstance(study.generator, str):
        raise InputError(f"generator must be the name of a model, got {study.generator!r}")
    for name in ("counts", "generator_settings"):
        if not isinstance(getattr(study, name), dict):
            raise InputError(
                f"{name} must be a dictionary, such as {getattr(DEFAULTS['imbalance'], name)}, "
                f"got {getattr(study, name)!r}"
            )
    if wrong := [name for name in study.generator_settings if not isinstance(name, str)]:
        raise InputError(f"generator_settings must name settings, got {wrong[0]!r}")
    if "image_size" in study.generator_settings:
        raise InputError("image_size is the study's; take it out of generator_settings")
    return dataclasses.replace(study, amounts=sorted(set(amounts)))


@dataclass(frozen=True)
class Arm:
    """One way to train: which images, and with which settings of `classification.fit`.

    add: generated images added to each class; fill_to: or as many as bring a class to this number.
    real: whether real cells are trained on.
    """

    name: str
    add: int = 0
    fill_to: int = 0
    real: bool = True
    settings: dict = field(default_factory=dict)


def arms(study: Study) -> list[Arm]:
    """The arms of a study, `real` first."""
    traditional, strong = {"augmentation": "traditional"}, {"augmentation": "strong"}
    oversampling = {"oversample": True}
    if study.name == "bccd":
        most = max(study.amounts)
        return [
            Arm(REFERENCE),
            Arm("real+traditional", settings=traditional),
            Arm("real+strong", settings=strong),
            # Filling up makes the classes equally large, too: what does that alone give?
            Arm("real+oversampling+traditional", settings=oversampling | traditional),
            Arm("real+GAN", fill_to=most),
            Arm("real+GAN+traditional", fill_to=most, settings=traditional),
            Arm("GAN alone", fill_to=most, real=False),
            Arm(FLAW, fill_to=most, settings=traditional),
        ]
    found = [
        Arm(REFERENCE),
        Arm("real+class weights", settings={"class_weights": True}),
        Arm("real+oversampling", settings=oversampling),
        Arm("real+strong", settings=strong),
        Arm("real+mixup", settings={"mixup": MIXUP}),
        Arm("real+oversampling+strong", settings=oversampling | strong),
        *(Arm(f"real+GAN {amount}", add=amount) for amount in study.amounts),
    ]
    if PRIMARY_AMOUNT in study.amounts:
        found.append(Arm(PRIMARY["imbalance"][0], add=PRIMARY_AMOUNT, settings=strong))
    return [*found, Arm("GAN alone", add=max(study.amounts), real=False)]


# ---------------------------------------------------------------------------------------------
# Folds and subsamples
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """Training and test cells of one fold.

    everything: all cells of the data set, for the published flaw alone. left_out: rows of
    `everything` that show a test cell again, and are not trained on. dataset_sha256: of the data
    set before it was split.
    """

    number: int
    train: ImageSet
    test: ImageSet
    everything: ImageSet
    left_out: list[int]
    dataset_sha256: str


def load(study: Study, data_root: str | Path | None = None) -> ImageSet:
    """All cells of the study's data set, of all splits in their order."""
    return joined([load_dataset(study.dataset, data_root, study.image_size, s) for s in SPLITS])


def joined(sets: list[ImageSet]) -> ImageSet:
    images = torch.cat([part.images for part in sets])
    labels = torch.cat([part.labels for part in sets])
    return ImageSet(sets[0].name, "all", images, labels, sets[0].classes)


def make_fold(study: Study, number: int, data_root: str | Path | None = None) -> Fold:
    """Fold 0 … 4 of `bccd`, or subsample 0 … 4 of `imbalance`, without near copies of test cells.

    Folds are stratified and drawn with seed 0: they are the same for every seed of a study. The
    test cells of `bccd` are a fifth of each class; those of `imbalance` are the test split, whole.
    Raises InputError for classes that are too small, class names that the data doesn't have, and
    for `bccd` on a folder whose patients are known, since its folds would mix them.
    """
    if number not in range(FOLDS):
        raise InputError(f"fold {number} is none of 0 to {FOLDS - 1}")
    everything = load(study, data_root)
    if study.name == "bccd":
        if study.dataset == "folder" and read_patients(data_folder(data_root)) is not None:
            raise InputError(
                f"{data_folder(data_root)}: the folds of bccd are drawn by image, and would put a "
                f"patient of {PATIENTS} on both sides; take the study imbalance, which keeps the "
                "splits, or take that file away"
            )
        rows = stratified_folds(everything)
        test_rows = torch.nonzero(rows == number).flatten()
        train_rows = torch.nonzero(rows != number).flatten()
    else:
        sizes = [len(load_dataset(study.dataset, data_root, study.image_size, s)) for s in SPLITS]
        train_rows, _, test_rows = torch.arange(len(everything)).split(sizes)
    test = _part(everything, test_rows, f"test cells of fold {number}")
    again = [pair[0] for pair in near_copies(everything.images[train_rows], test.images)]
    left_out = train_rows[again].tolist()
    train_rows = train_rows[~torch.isin(torch.arange(len(train_rows)), torch.tensor(again))]
    if study.name == "imbalance":
        clean = _part(everything, train_rows, "train")
        train_rows = train_rows[subsamples(clean, study.counts)[number]]
    train = _part(everything, train_rows, f"training cells of fold {number}")
    return Fold(number, train, test, everything, left_out, everything.sha256())


def _part(data: ImageSet, rows: torch.Tensor, split: str) -> ImageSet:
    return ImageSet(data.name, split, data.images[rows], data.labels[rows], data.classes)


def stratified_folds(data: ImageSet) -> torch.Tensor:
    """The fold of every image, int64 [N]: each class spread evenly over five folds, with seed 0.

    Raises InputError for a class with fewer images than folds.
    """
    from sklearn.model_selection import StratifiedKFold

    _require_per_class(data, dict.fromkeys(data.classes, 1))
    folds = torch.empty(len(data), dtype=torch.int64)
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for fold, (_, rows) in enumerate(splitter.split(data.labels, data.labels.cpu())):
        folds[torch.from_numpy(rows)] = fold
    return folds


def subsamples(data: ImageSet, counts: dict[str, int]) -> list[torch.Tensor]:
    """Rows of five subsamples with the given number of images of each class, drawn with seed 0.

    They share no image, so that five trainings on them are independent, but for what images of one
    patient have in common. Raises InputError for a class with fewer images than five times its
    count, and for other classes than the data's.
    """
    if set(counts) != set(data.classes):
        raise InputError(
            f"counts are of the classes {', '.join(counts)}, but {data.name} has "
            f"{', '.join(data.classes)}; give each of these a number"
        )
    _require_per_class(data, counts)
    generator = torch.Generator().manual_seed(0)
    parts = [[] for _ in range(FOLDS)]
    for label, kind in enumerate(data.classes):
        rows = torch.nonzero(data.labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for part, some in zip(parts, rows.split(counts[kind])):
            part.append(some)
    return [torch.cat(part) for part in parts]


def _require_per_class(data: ImageSet, counts: dict[str, int]) -> None:
    for kind, n in per_class(data).items():
        if type(counts[kind]) is not int or counts[kind] < 1:
            raise InputError(f"the count of {kind} must be at least 1, got {counts[kind]!r}")
        if n < FOLDS * counts[kind]:
            raise InputError(
                f"{data.name}: class {kind} has {n} images, but {FOLDS} folds need "
                f"{FOLDS * counts[kind]}; leave the class out or lower its count"
            )


def per_class(data: ImageSet) -> dict[str, int]:
    """Number of images of each class, by its name."""
    counts = data.labels.bincount(minlength=len(data.classes)).tolist()
    return dict(zip(data.classes, counts, strict=True))


# ---------------------------------------------------------------------------------------------
# No leak
# ---------------------------------------------------------------------------------------------


def near_copies(images: torch.Tensor, others: torch.Tensor) -> list[tuple[int, int]]:
    """Pairs (row of `images`, row of `others`) that show the same cell; each row of `images` once.

    images: uint8 [N, C, S, S]; others: uint8 [M, C, S, S]. Two images show the same cell if, in
    one of the eight flips and turns, their root mean squared difference over pixels and channels
    is below NEAR, on the scale 0 … 255.
    """
    size, channels = images.shape[-1], images.shape[1]
    # Means over equal squares differ no more than the pixels do: what is far apart by them, as
    # most pairs are, need not be compared pixel by pixel.
    side = max(n for n in range(1, 9) if size % n == 0)
    means, base = (
        torch.nn.functional.adaptive_avg_pool2d(x.float(), side) for x in (images, others)
    )
    reach = 1.001 * NEAR * math.sqrt(channels * side**2)
    found = {}
    for turn in range(TURNS):
        start = 0
        for part in distances(turned(means, turn).flatten(1), base.flatten(1)):
            rows, columns = torch.nonzero(part <= reach, as_tuple=True)
            for pairs in zip((rows + start).split(1024), columns.split(1024)):
                left, right = turned(images[pairs[0]], turn).float(), others[pairs[1]].float()
                near = (left - right).square().mean((1, 2, 3)).sqrt() < NEAR
                for row, other in zip(*(side[near].tolist() for side in pairs)):
                    found.setdefault(row, other)
            start += len(part)
    return sorted(found.items())


def check_no_leak(
    train_images: torch.Tensor,
    generator_images: torch.Tensor,
    test_images: torch.Tensor,
    generated: torch.Tensor,
) -> None:
    """Refuse test images that classifier or generator were trained on, and generated ones.

    train_images, generator_images: real images that the classifier and the generator were trained
    on; test_images; generated: what the generator drew. All uint8 [N, C, S, S]. Near copies, as
    `near_copies` finds them, count as the same image; a generated image must equal a test image
    pixel by pixel. Raises InputError naming the images by their rows.
    """
    trained_on = {"the classifier's training images": train_images}
    if not torch.equal(train_images, generator_images):
        trained_on["the generator's training images"] = generator_images
    for name, images in trained_on.items():
        _refuse(near_copies(images, test_images), name)
    rows = {image.tobytes(): row for row, image in enumerate(test_images.cpu().numpy())}
    keys = (image.tobytes() for image in generated.cpu().numpy())
    _refuse(
        [(row, rows[key]) for row, key in enumerate(keys) if key in rows], "the generated images"
    )


def _refuse(pairs: list[tuple[int, int]], name: str) -> None:
    if pairs:
        words = ", ".join(f"{test} (there {row})" for row, test in pairs[:5])
        more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
        raise InputError(
            f"test images {words}{more} are among {name}: a score on them would mean nothing; "
            "take them out of one of the two"
        )


def check_generator(name: str, model: torch.nn.Module) -> None:
    """Refuse a generator that can't be asked for a class: its images would have random labels."""
    if not model.conditional:
        raise InputError(
            f"{name} can't be asked for a class in these settings; take one that can, such as cgan "
            "or cwgan_gp"
        )


def check_generated(generated: ImageSet, real: ImageSet) -> None:
    """Refuse generated images of other classes, or of another size, than the real ones."""
    if generated.classes != real.classes:
        raise InputError(
            f"the generated images are of the classes {', '.join(generated.classes)}, but "
            f"{real.name} has {', '.join(real.classes)}; generate these"
        )
    if generated.images.dtype != torch.uint8 or generated.images.shape[1:] != real.images.shape[1:]:
        raise InputError(
            f"the generated images are {generated.images.dtype} {list(generated.images.shape[1:])},"
            f" but those of {real.name} torch.uint8 {list(real.images.shape[1:])}; generate these"
        )


# ---------------------------------------------------------------------------------------------
# Arms and their records
# ---------------------------------------------------------------------------------------------


def chosen(arm: Arm, real: ImageSet, generated: ImageSet) -> torch.Tensor:
    """Rows of the generated images that the arm takes: the first ones of each class.

    real: the cells that they are added to. Raises InputError where a class has too few of them.
    """
    check_generated(generated, real)
    rows, counts = [], per_class(real)
    for label, kind in enumerate(real.classes):
        n_real = counts[kind] if arm.real else 0
        wanted = arm.add or max(arm.fill_to - n_real, 0)
        found = torch.nonzero(generated.labels == label).flatten()
        if len(found) < wanted:
            raise InputError(
                f"{arm.name} needs {wanted} generated images of class {kind}, got {len(found)}; "
                "generate more"
            )
        rows.append(found[:wanted])
    return torch.cat(rows)


def arm_sets(
    arm: Arm, fold: Fold, generated: ImageSet, flawed: ImageSet | None
) -> tuple[ImageSet | None, ImageSet | None, ImageSet]:
    """Real training cells, generated training images (None: none) and test images of an arm.

    flawed: generated by a model that was trained on the test cells, too. The published flaw takes
    these, and puts a fifth of each class on the test side.
    """
    if arm.name != FLAW:
        real = fold.train if arm.real else None
        if not (arm.add or arm.fill_to):
            return real, None, fold.test
        return real, _part(generated, chosen(arm, fold.train, generated), "generated"), fold.test
    rows = chosen(arm, fold.everything, flawed)
    on_test_side = torch.arange(len(rows)) % FOLDS == fold.number
    tested = _part(flawed, rows[on_test_side], "generated")
    return (
        fold.train,
        _part(flawed, rows[~on_test_side], "generated"),
        joined([fold.test, tested]),
    )


def identity(study: Study, arm: Arm, classifier: str, fold: int, seed: int, sha256: str) -> dict:
    """What must be the same for a record to be this arm's: plain types. sha256: of the data set."""
    content = {
        "study": dataclasses.asdict(study),
        "arm": dataclasses.asdict(arm),
        "classifier": classifier,
        "batch_size": BATCH_SIZE,
        "lr": LR,
        "fold": fold,
        "seed": seed,
        "dataset_sha256": sha256,
        "version": VERSION,
    }
    return json.loads(json.dumps(content))


def study_folder(out: str | Path, study: str) -> Path:
    """Where a study's records lie, in the folder of the results."""
    return Path(out) / "augmentation" / study


def fold_folder(out: str | Path, study: str, fold: int, seed: int) -> Path:
    """Where the generator of one fold and seed lies, and the executed notebook."""
    return study_folder(out, study) / f"fold{fold}-seed{seed}"


def record_path(out: str | Path, own: dict) -> Path:
    """Of the arm with this identity: STUDY/CLASSIFIER/foldK-seedS/ARM.json."""
    folder = study_folder(out, own["study"]["name"]) / own["classifier"]
    name = re.sub("[^A-Za-z0-9+]+", "-", own["arm"]["name"])
    return folder / f"fold{own['fold']}-seed{own['seed']}" / f"{name}.json"


def finished_record(out: str | Path, own: dict) -> dict | None:
    """The record with this identity, None where there is none yet.

    Raises InputError where its place holds a record with another identity.
    """
    path = record_path(out, own)
    if not path.exists():
        return None
    record = _read_record(path)
    differing = [name for name in own if record["identity"].get(name) != own[name]]
    if differing:
        there = {name: record["identity"].get(name) for name in differing}
        raise InputError(
            f"{path} was made with other settings ({there}); choose another --out, or move the "
            "study away"
        )
    return record


def run_arms(
    study: Study,
    fold: Fold,
    seed: int,
    generated: ImageSet,
    generator_images: torch.Tensor,
    generator_training: dict,
    flawed: ImageSet | None,
    flawed_training: dict | None,
    *,
    classifiers: list[str],
    make_classifier: Callable[[str, int, int, int], torch.nn.Module],
    device: torch.device,
    describe_machine: Callable[[torch.device], dict],
    out: str | Path,
) -> list[dict]:
    """Train and test every arm with every classifier, and write a record for each.

    generated: images of the generator, each class's `max(study.amounts)` of them;
    generator_images: what it was trained on, uint8 [N, C, S, S]; generator_training: what that
    took, plain types, for the record; flawed, flawed_training: images of a generator that was
    trained on everything, and what that took, None for `imbalance`. make_classifier: (name,
    classes, image size, channels) → module; describe_machine: device → plain types. An arm whose
    record is there is not run again. Returns the records in the arms' order.
    Raises InputError for a leak (`check_no_leak`) before any classifier is trained.
    """
    check_generated(generated, fold.train)
    generator_images = generator_images.cpu()
    if not torch.equal(generator_images, fold.train.images):
        raise InputError(
            f"the generator was trained on other images than the {fold.train.split}; "
            "train it on these alone"
        )
    check_no_leak(fold.train.images, generator_images, fold.test.images, generated.images)
    records = []
    for classifier in classifiers:
        for arm in arms(study):
            own = identity(study, arm, classifier, fold.number, seed, fold.dataset_sha256)
            record = finished_record(out, own)
            if record is None:
                seed_everything(seed)  # every arm begins with the same weights
                size, channels = fold.train.images.shape[-1], fold.train.images.shape[1]
                module = make_classifier(classifier, len(fold.train.classes), size, channels)
                record = {
                    "identity": own,
                    **run_arm(arm, fold, generated, flawed, module.to(device), study.updates, seed),
                    "left_out": len(fold.left_out),
                    "generator": flawed_training if arm.name == FLAW else generator_training,
                    **describe_machine(device),
                }
                text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
                write_text(record_path(out, own), text)
            records.append(record)
    return records


def run_arm(
    arm: Arm,
    fold: Fold,
    generated: ImageSet,
    flawed: ImageSet | None,
    classifier: torch.nn.Module,
    updates: int,
    seed: int,
) -> dict:
    """Train an untrained classifier in one way and test it: what the arm's record says of it.

    The last weights are tested; no choice is made by the test cells. The classifier of real cells
    alone is asked about the generated images, too (`scores_on_generated`).
    """
    start = time.monotonic()
    real, added, test = arm_sets(arm, fold, generated, flawed)
    train = joined([part for part in (real, added) if part])
    history = classification.fit(
        classifier,
        train.images,
        train.labels,
        updates=updates,
        batch_size=BATCH_SIZE,
        lr=LR,
        seed=seed,
        **arm.settings,
    )

    def scores_on(data: ImageSet) -> dict:
        probabilities = classification.predict(classifier, data.images)
        return classification.scores(probabilities, data.labels, data.classes)

    parts = {"real": real, "generated": added, "test": test}
    counts = {name: per_class(part) if part else {} for name, part in parts.items()}
    return {
        "n": {kind: {name: counts[name].get(kind, 0) for name in parts} for kind in test.classes},
        "sha256": {name: part.sha256() for name, part in parts.items() if part},
        "scores": scores_on(test),
        "scores_on_generated": scores_on(generated) if arm.name == REFERENCE else None,
        "history": history,
        "seconds": round(time.monotonic() - start, 1),
    }


# ---------------------------------------------------------------------------------------------
# Tables: from records alone
# ---------------------------------------------------------------------------------------------

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
TITLES = ("Accuracy", "Balanced accuracy", "Macro F1", "AUC")


def collect(folder: str | Path) -> list[dict]:
    """All records of one study's folder, those of each fold in the order of the arms.

    Raises InputError for one that is broken or foreign.
    """
    records = [_read_record(path) for path in sorted(Path(folder).glob("*/fold*-seed*/*.json"))]
    if not records:
        raise InputError(f"{folder} holds no record of a study; run one of its folds first")
    _check_same_rules(records)
    known = [arm.name for arm in arms(Study(**records[0]["identity"]["study"]))]
    return sorted(records, key=lambda record: known.index(record["identity"]["arm"]["name"]))


def _read_record(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for name in ("study", "arm", "classifier", "fold", "seed", "dataset_sha256"):
            record["identity"][name]
        Study(**record["identity"]["study"])
        numbers = [record["scores"][name] for name in SCORES]
        record["scores"]["confusion"], record["n"], record["sha256"]["test"], record["history"]
        record["generator"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no whole record ({error!r}); remove it and run it again")
    if not all(n is None or (isinstance(n, float | int) and math.isfinite(n)) for n in numbers):
        raise InputError(f"{path} holds a score that is no finite number; run it again")
    return record


def _check_same_rules(records: list[dict]) -> None:
    """Refuse records of other settings, another data set or other test cells in one table."""
    varying = ("arm", "classifier", "fold", "seed")
    first, tests, seen = records[0]["identity"], {}, set()
    for record in records:
        own = record["identity"]
        for name in first:
            if name not in varying and own[name] != first[name]:
                raise InputError(
                    f"records of one study differ in {name} ({first[name]} and {own[name]}); "
                    "make a table of each in a folder of its own"
                )
        run = own["classifier"], own["arm"]["name"], own["fold"], own["seed"]
        code = _code(record), _code(records[0])
        if code[0] != code[1]:
            raise InputError(
                f"the records of {run} and of others come from different versions of the code "
                f"({code[0]} and {code[1]}); run all folds with one of them"
            )
        if run in seen:
            raise InputError(f"the run {run} has two records; remove one")
        seen.add(run)
        test = record["sha256"]["test"]
        other, arm = tests.setdefault(own["fold"], (test, run[1])) if run[1] != FLAW else (test, "")
        if other != test:
            raise InputError(
                f"the arms {run[1]} and {arm} of fold {run[2]} were tested on different cells; "
                "run the fold again"
            )


def _code(record: dict) -> list:
    """The code's version, as the generator's training and the arm's own run name it."""
    return [part.get("versions", {}).get("code") for part in (record["generator"], record)]


def compare(records: list[dict]) -> list[dict]:
    """A row for each classifier and arm, and one more for each primary comparison, which is first.

    records: of `collect`. Scores and recalls are mean and sd (ddof = 1) over folds and seeds.
    comparison is `primary`, `secondary` (against `real`) or empty; then `difference` is that of
    balanced accuracy to the arm in `against`, with low, high (95 %), p (corrected resampled t-test
    over folds, seeds averaged), p_holm (over all comparisons of its kind in the table) and verdict.
    The published flaw is compared with nothing. What can't be said of so few folds is None.
    """
    study = Study(**records[0]["identity"]["study"])
    known = [arm.name for arm in arms(study)]
    groups: dict[str, dict[str, list[dict]]] = defaultdict(dict)
    for record in records:
        own = record["identity"]
        groups[own["classifier"]].setdefault(own["arm"]["name"], []).append(record)
    primary, rows = [], []
    for classifier, found in groups.items():
        one, other = PRIMARY[study.name]
        if one in found and other in found:
            row = _row(study, classifier, one, found[one])
            primary.append(row | _difference(study, found[one], found[other], "primary", other))
        for name in (name for name in known if name in found):
            row = _row(study, classifier, name, found[name])
            if name not in (REFERENCE, FLAW) and REFERENCE in found:
                row |= _difference(study, found[name], found[REFERENCE], "secondary", REFERENCE)
            rows.append(row)
    for family in (primary, [row for row in rows if row["comparison"]]):
        for row, p in zip(family, significance.holm([row["p"] for row in family])):
            row["p_holm"] = p
            row["verdict"] = _verdict(p, row["difference"], row.pop("compared"))
    return primary + rows


def _row(study: Study, classifier: str, arm: str, records: list[dict]) -> dict:
    row = {
        "study": study.name,
        "classifier": classifier,
        "arm": arm,
        "folds": len({record["identity"]["fold"] for record in records}),
        "seeds": len({record["identity"]["seed"] for record in records}),
        "runs": len(records),
    }
    for name in ("real", "generated", "test"):
        totals = [sum(n[name] for n in record["n"].values()) for record in records]
        row[f"n_{name}"] = float(np.mean(totals))
    values = {name: [record["scores"][name] for record in records] for name in SCORES}
    for kind in records[0]["n"]:
        values[f"recall {kind}"] = [
            record["scores"]["per_class"][kind]["recall"] for record in records
        ]
    for name, column in values.items():
        row |= mean_and_sd(name, column)
    empty = ("difference", "low", "high", "p", "p_holm")
    return row | {"comparison": "", "against": ""} | dict.fromkeys(empty) | {"verdict": ""}


def _difference(
    study: Study, records: list[dict], others: list[dict], kind: str, against: str
) -> dict:
    """Of balanced accuracy, by fold: seeds of one fold share their cells and are averaged.

    compared: the number of folds that both arms have.
    """
    score = {
        (r["identity"]["fold"], r["identity"]["seed"]): r["scores"]["balanced_accuracy"]
        for r in others
    }
    folds = defaultdict(list)
    for record in records:
        run = record["identity"]["fold"], record["identity"]["seed"]
        if run in score:
            folds[run[0]].append(record["scores"]["balanced_accuracy"] - score[run])
    result = {"comparison": kind, "against": against, "compared": len(folds)}
    if not folds:
        return result
    n_test = np.mean([sum(n["test"] for n in record["n"].values()) for record in others])
    n_train = np.mean([sum(n["real"] for n in record["n"].values()) for record in others])
    if study.name == "imbalance":
        # Its subsamples share no cell, as if they came from an endless store: nothing to correct.
        n_train = math.inf
    found = significance.paired([float(np.mean(part)) for part in folds.values()], n_train, n_test)
    low, high = found["interval"] or (None, None)
    return result | {"difference": found["mean"], "low": low, "high": high, "p": found["p"]}


def _verdict(p: float | None, difference: float | None, folds: int) -> str:
    if folds < FOLDS:
        return "too few folds"
    if p is None:
        return "no spread to test with"  # the same difference in each
    if p >= significance.LEVEL:
        return "within the noise"
    return "better" if difference > 0 else "worse"


def write_report(folder: str | Path) -> list[Path]:
    """Tables and figures of a study from the records in its folder; returns their paths.

    Writes beside the folder, with its name: .md, .csv, .png, and for each classifier its confusion
    matrices and learning curves.
    """
    records = collect(folder)
    rows = compare(records)
    write_rows(rows, markdown(records, rows), folder)
    pictures = {f"{folder}.png": figures.augmentation_differences(rows)}
    for classifier in dict.fromkeys(row["classifier"] for row in rows):
        parts = {
            "confusion": figures.augmentation_confusion(records, classifier),
            "learning": figures.augmentation_learning_curves(records, classifier),
        }
        if records[0]["identity"]["study"]["name"] == "imbalance":
            parts["amounts"] = amounts_figure(records, rows, classifier)
        pictures |= {f"{folder}-{part}-{classifier}.png": made for part, made in parts.items()}
    for path, figure in pictures.items():
        figures.save(figure, path)
    return [Path(f"{folder}.md"), Path(f"{folder}.csv"), *map(Path, pictures)]


def amounts_figure(records: list[dict], rows: list[dict], classifier: str):
    """Scores of a classifier against the generated images added, with the two rarest classes."""
    counts = records[0]["identity"]["study"]["counts"]
    rarest = sorted(counts, key=counts.get)[:2]
    return figures.augmentation_amounts(rows, classifier, rarest)


def markdown(records: list[dict], rows: list[dict]) -> str:
    """The rows of `compare` as tables: the primary comparison, all arms, recalls, the flaw."""
    study = Study(**records[0]["identity"]["study"])
    one, other = PRIMARY[study.name]
    parts = [
        f"Primary comparison, named before any result: balanced accuracy of `{one}` against "
        f"`{other}`."
    ]
    primary = [row for row in rows if row["comparison"] == "primary"]
    if primary:
        lines = ["| Classifier | Folds × seeds | Difference [95 %] | p (Holm) | Verdict |"]
        lines.append("|---|---:|---:|---:|---|")
        lines += [
            f"| {row['classifier']} | {row['folds']} × {row['seeds']} | {_difference_cell(row)} | "
            f"{p_value(row['p_holm'])} | {row['verdict']} |"
            for row in primary
        ]
        parts.append("\n".join(lines))
    else:
        parts[0] += " Not measured yet."
    rows = [row for row in rows if row["comparison"] != "primary"]
    arms_of_all = [row for row in rows if row["arm"] != FLAW]
    parts += [_arm_table(arms_of_all), _rules(study, rows), _recall_table(arms_of_all)]
    recognised = _recognised(records)
    if recognised:
        parts.append(recognised)
    flawed = [row for row in rows if row["arm"] == FLAW]
    if flawed:
        parts.append(
            "What the published flaw is worth. Here the generator saw the test cells, and a fifth "
            "of its images are test images, too. This row must not be compared with the others:"
        )
        parts.append(_arm_table(flawed, compared=False))
    return "\n\n".join(parts) + "\n"


def _arm_table(rows: list[dict], compared: bool = True) -> str:
    titles = ["Classifier", "Arm", "Folds × seeds", "Real", "Generated", *TITLES]
    if compared:
        titles += ["Difference to `real` [95 %]", "p (Holm)", "Verdict"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|" + "---:|" * (len(titles) - 2 - compared)]
    lines[1] += "---|" * compared
    for row in rows:
        cells = [row["classifier"], row["arm"], f"{row['folds']} × {row['seeds']}"]
        cells += [f"{row['n_real']:.0f}", f"{row['n_generated']:.0f}"]
        cells += [
            " ± ".join(number(row[f"{name}_{part}"], ".3f") for part in ("mean", "sd"))
            for name in SCORES
        ]
        if compared:
            cells += [_difference_cell(row), p_value(row["p_holm"]), row["verdict"] or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _recall_table(rows: list[dict]) -> str:
    columns = [n for n in rows[0] if n.startswith("recall ") and n.endswith("_mean")]
    kinds = [name.removeprefix("recall ").removesuffix("_mean") for name in columns]
    lines = [
        "Recall of each class, mean over folds and seeds:",
        "",
        f"| Classifier | Arm | {' | '.join(kinds)} |",
        "|---|---|" + "---:|" * len(kinds),
    ]
    for row in rows:
        cells = [number(row[name], ".3f") for name in columns]
        lines.append(f"| {row['classifier']} | {row['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _recognised(records: list[dict]) -> str:
    """Train on real cells, test on generated ones: says something of the generator alone."""
    found = defaultdict(list)
    for record in records:
        if record.get("scores_on_generated"):
            share = record["scores_on_generated"]["accuracy"]
            found[record["identity"]["classifier"]].append(share)
    words = [f"{name} {np.mean(shares):.3f}" for name, shares in found.items()]
    if not words:
        return ""
    return (
        "Generated images whose class the classifiers of real cells alone (`real`) name as it was "
        f"asked for: {', '.join(words)}. `GAN alone` is the reverse: trained on generated images, "
        "tested on real cells."
    )


def _rules(study: Study, rows: list[dict]) -> str:
    tests = "; ".join(sorted({f"{row['n_test']:.0f}" for row in rows if row["arm"] != FLAW}))
    correction = (
        "corrected for cells that folds share (Nadeau and Bengio 2003)"
        if study.name == "bccd"
        else "over subsamples that share no cell, but may share patients, which would make its "
        "intervals too narrow; it speaks of other training cells, not of other test cells"
    )
    return (
        f"{study.dataset} at {study.image_size} pixels; {study.updates} updates of {BATCH_SIZE} "
        f"images for every arm; generator {study.generator}, trained anew on each fold's training "
        f"cells; {tests} real test cells a fold. Scores: mean ± sd over folds × seeds; the folds "
        "of one seed share first weights and noise, so the spread holds other cells, but no other "
        "luck of training. Difference: of balanced accuracy, paired by fold, seeds averaged; "
        f"t-test {correction}; p adjusted over all comparisons of the table (Holm 1979). Verdict: "
        f"at p < {significance.LEVEL}, once all {FOLDS} folds are there."
    )


def _difference_cell(row: dict) -> str:
    if row["difference"] is None:
        return "–"
    interval = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
    return f"{row['difference']:+.3f}{interval}"
