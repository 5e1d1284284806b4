"""Train on generated cells, test on real ones: how much of the classes is in the images?

GAN-train of Shmelkov et al. 2018, sec. 3; the classification accuracy score of Ravuri and Vinyals
2019. The reverse, how often a classifier of real cells names the class that was asked for, is
`evaluation.agreement`; both stand in one table, made from records alone.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from evaluation import classification, figures
from evaluation.augmentation import BATCH_SIZE, LR, SCORES, TITLES, VERSION
from evaluation.tables import (
    check_same_classifier,
    check_trainings,
    mean_and_sd,
    reduced_shortfall,
    write_rows,
)
from utils import ImageSet, InputError, in_words_of, seed_everything, write_text

CLASSIFIER, UPDATES = "cnn", 3000
REAL = "real cells"


def train_on_generated(
    images: torch.Tensor,
    labels: torch.Tensor,
    sets: dict[str, ImageSet],
    seed: int,
    make_classifier: Callable[[str, int, int, int], torch.nn.Module],
    device: torch.device,
) -> dict:
    """Scores on the real test split of a classifier of generated images, and of one of real cells.

    images: generated, uint8 [N, C, S, S]; labels: int64 [N], the classes that were asked for; sets:
    the splits train and test. The real cells are as many of each class, drawn from the train split;
    the test split is seen by neither. make_classifier: (name, classes, image size, channels) →
    module. Returns plain types: `rules()`, n, n_test, and `classification.scores` under `generated`
    and `real`. Raises InputError for a class that the train split has too few cells of.
    """
    train, test = sets["train"], sets["test"]
    rows = same_labels(labels, train)
    result = {**rules(), "n": len(labels), "n_test": len(test)}
    for name, part in {
        "generated": (images, labels),
        "real": (train.images[rows], train.labels[rows]),
    }.items():
        seed_everything(seed)  # both begin with the same weights
        channels, size = test.images.shape[1:3]
        classifier = make_classifier(CLASSIFIER, len(test.classes), size, channels).to(device)
        classification.fit(
            classifier, *part, updates=UPDATES, batch_size=BATCH_SIZE, lr=LR, seed=seed
        )
        probabilities = classification.predict(classifier, test.images)
        result[name] = classification.scores(probabilities, test.labels, test.classes)
    return result


def rules() -> dict:
    """How the classifiers are trained: what must be the same for two results to be compared."""
    return {
        "classifier": CLASSIFIER,
        "updates": UPDATES,
        "batch_size": BATCH_SIZE,
        "lr": LR,
        "version": VERSION,
    }


def same_labels(labels: torch.Tensor, train: ImageSet) -> torch.Tensor:
    """Rows of `train`, drawn with seed 0, as many cells of each class as `labels` has."""
    generator, rows = torch.Generator().manual_seed(0), []
    for label, kind in enumerate(train.classes):
        found = torch.nonzero(train.labels.cpu() == label).flatten()
        wanted = int((labels == label).sum())
        if len(found) < wanted:
            raise InputError(
                f"{train.name} has {len(found)} {train.split} cells of class {kind}, but {wanted} "
                "were generated; compare no more images of a class than there are real ones"
            )
        rows.append(found[torch.randperm(len(found), generator=generator)][:wanted])
    return torch.cat(rows)


# ---------------------------------------------------------------------------------------------
# Tables: from records alone
# ---------------------------------------------------------------------------------------------


def may_be_shown(records: list[dict]) -> list[dict]:
    """Those of conditional models, without quick runs and reduced ones that no table shows.

    Raises InputError where none is left, and for runs on several data sets.
    """
    groups = defaultdict(list)
    for record in records:
        if "agreement" in record["metrics"] and record["budget"] != "quick":
            groups[record["model"], record["preset"], record["budget"]].append(record)
    shown = [
        record
        for group in groups.values()
        if group[0]["budget"] == "full" or not reduced_shortfall(group)
        for record in group
    ]
    if not shown:
        raise InputError(
            "there is no record of a conditional model that a table may show; train one at its "
            "full length first, such as cwgan_gp"
        )
    data = sorted({f"{r['dataset']['name']} ({r['dataset']['sha256'][:8]})" for r in shown})
    if len(data) > 1:
        raise InputError(
            f"the runs are of several data sets, {' and '.join(data)}, which no table can hold "
            "together; move those of all but one into another folder of results"
        )
    return shown


def compare(runs: list[tuple[dict, dict]]) -> list[dict]:
    """One row for real cells and one for each model and preset: mean and sd (ddof = 1) over seeds.

    runs: of each training its record, of those that `may_be_shown`, and what `train_on_generated`
    returned. A row holds scores on the test split, recall of each class, `against_real`, the
    balanced accuracy minus that of the same run's real cells, and `agreement`, the reverse. Raises
    InputError for runs that were not measured alike.
    """
    groups = defaultdict(list)
    for record, found in runs:
        groups[record["model"], record["preset"], record["budget"]].append((record, found))
    names = (*rules(), "n", "n_test")
    measured = {tuple(found[name] for name in names) for _, found in runs}
    if len(measured) > 1:
        raise InputError(
            f"these runs were not measured alike ({', '.join(names)}); measure them again"
        )
    one_of_each = {record["seed"]: found["real"] for record, found in runs}
    rows = [_row(REAL, "", list(one_of_each.values()), []) | mean_and_sd("against_real", [])]
    check_same_classifier([record["metrics"] for record, _ in runs])
    for (model, preset, budget), group in groups.items():
        check_trainings(f"{model} {preset}", [record for record, _ in group])
        reverse = [record["metrics"]["agreement"]["agreement"] for record, _ in group]
        row = _row(model, preset, [found["generated"] for _, found in group], reverse)
        gaps = [
            found["generated"]["balanced_accuracy"] - found["real"]["balanced_accuracy"]
            for _, found in group
        ]
        row |= mean_and_sd("against_real", gaps)
        rows.append(row | {"budget": budget})
    data, first = runs[0][0]["dataset"], runs[0][1]
    shared = {name: first[name] for name in names}
    shared |= {"dataset": data["name"], "duplicates": data["duplicates_across_splits"]}
    shared["n_train"] = data["n"]
    rows = [row | shared for row in rows]
    return [rows[0], *sorted(rows[1:], key=lambda row: -row["balanced_accuracy_mean"])]


def _row(model: str, preset: str, scores: list[dict], reverse: list[float]) -> dict:
    columns = {name: [s[name] for s in scores] for name in SCORES} | {"agreement": reverse}
    for kind in scores[0]["per_class"]:
        columns[f"recall {kind}"] = [s["per_class"][kind]["recall"] for s in scores]
    row = {"model": model, "preset": preset, "budget": "full", "seeds": len(scores)}
    for name, values in columns.items():
        row |= mean_and_sd(name, values)
    return row


def write_report(runs: list[tuple[dict, dict]], stem: str | Path) -> list[Path]:
    """The rows of `compare` as `stem`.md, .csv and .png; returns the paths."""
    rows = compare(runs)
    write_rows(rows, markdown(rows), stem)
    figures.save(figures.recalls(rows), f"{stem}.png")
    return [Path(f"{stem}{ending}") for ending in (".md", ".csv", ".png")]


def markdown(rows: list[dict]) -> str:
    first = rows[0]
    columns = [n for n in first if n.startswith("recall ") and n.endswith("_mean")]
    kinds = [name.removeprefix("recall ").removesuffix("_mean") for name in columns]
    words = (
        f"{first['dataset']}: the classifier ({first['classifier']}, {first['updates']:,} updates "
        f"of {first['batch_size']} images, no augmentation) learns from {first['n']:,} "
        "images with the held-out cells' labels, or from as many real train cells of each class, "
        f"and is tested on the {first['n_test']:,} real cells of the test split, which neither it "
        f"nor a generator has seen, but for those that lie in two splits ({first['duplicates']} "
        "identical pairs across all three). The reverse: how often a classifier of real train "
        "cells names the class that was asked for. Mean ± sd over trainings of the generator; of "
        "real cells, over the first weights of the classifier, before the same cells. Against "
        "real: the balanced accuracy minus that of the real cells, after the same first weights on "
        "the same machine. Real cells are no ceiling: the generators had learned from all "
        f"{first['n_train']:,} train cells, and a classifier of all of them was not measured."
    )
    text = ""
    for budget in ("full", "reduced"):
        group = [row for row in rows[1:] if row["budget"] == budget]
        if not group:
            continue
        if budget == "reduced":
            text += "Generators at a reduced budget, which never share a table with full ones:\n\n"
        group = [first, *group]
        titles = ["Trainings", *TITLES, "Against real", "The reverse"]
        shown = (*SCORES, "against_real", "agreement")
        cells = [[str(row["seeds"]), *(_cell(row, name) for name in shown)] for row in group]
        text += _table(titles, group, cells) + f"\n{words}\n\nRecall of each class:\n\n"
        cells = [[_cell(row, f"recall {kind}") for kind in kinds] for row in group]
        text += _table(kinds, group, cells) + "\n"
    return in_words_of(first["dataset"], text.removesuffix("\n"))


def _table(titles: list[str], rows: list[dict], cells: list[list[str]]) -> str:
    lines = [f"| Trained on | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row, texts in zip(rows, cells, strict=True):
        name = f"{row['model']} {row['preset']}".strip()
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict, name: str) -> str:
    mean, sd = row[f"{name}_mean"], row[f"{name}_sd"]
    if mean is None:
        return "–"
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def read_or_measure(path: Path, record: dict, measure: Callable[[], dict]) -> dict:
    """What `measure` returned for the training of this record, kept at `path`, measured once."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none is there, or half a one
        stored = {}
    training = {name: record[name] for name in ("kept_step", "seconds", "device")}
    training["held_out_sha256"] = record["dataset"].get("held_out_sha256")
    key = {"weights_key": record["weights_key"]}
    wanted = {**key, **training, **rules()}
    stored = {**training, **stored}  # older files do not name it
    if {name: stored.get(name) for name in wanted} == wanted:
        return stored
    result = {**key, **training, **measure()}
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text)
    return result
