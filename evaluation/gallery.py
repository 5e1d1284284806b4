"""The page that shows all results: RESULTS/README.md, made from records and pictures alone.

    python -m evaluation.gallery results

What is not there is left out. The same files give the same page, whose links are relative.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

from evaluation.per_class import PROTOCOLS, trainings_markdown
from evaluation.protocol import Protocol
from evaluation.tables import (
    BUDGETS,
    WITHOUT_NUMBERS,
    collect,
    record_paths,
    results_table,
    run_table,
)
from utils import InputError, exit_on_bad_input, in_words_of, write_text

PAGE, MADE_BY = "README.md", "Made by `python -m evaluation.gallery`"
ABLATIONS = (
    "Each change against its model's unchanged preset, at zero: a dot for each training, compared "
    "with that of the same seed; a stroke for their mean."
)
COMPARISONS = {
    "comparison.png": "Real images beside those of the `baseline` presets and their stand-ins, the "
    "first that were drawn, of each class where the model has classes.",
    "comparison_best.png": "Real images beside those of the `best` presets, or of a stand-in where "
    "it says reduced, the first that were drawn, of each class where the model has classes.",
    "distances.png": "Fréchet distance of every training, a dot each; the dashed line is what "
    "held-out real images get.",
    "cost.png": "Fréchet distance against images seen in training, and against seconds. Machines "
    "had other work as well, so that seconds are no best times.",
    "compute.png": "Kernel distance on the validation split against the arithmetic of the training "
    "so far, in PFLOP: what lies on one vertical line cost the same. A ring is the end of a "
    "published training (KID to the train split).",
    "balance.png": "How far apart a GAN's discriminator holds real and generated images, by epoch; "
    "at zero it can't tell them apart, and the contest is over.",
    "stability.png": "Kernel distance on the validation split as training goes on; the dot is the "
    "step that was kept, a ring the end of a published training (KID to the train split).",
}
TABLES = {
    "results.md": "The table of results",
    "results_reduced.md": "runs at a reduced budget",
    "results_per_class.md": "every class by itself",
    "results_reduced_per_class.md": "every class by itself, at a reduced budget",
    "findings.md": "what the results say",
    "compare_models.ipynb": "the comparison of the models, executed",
}
PICTURES = {
    "suspicious_pairs.png": "Images that lie nearest to a training cell, measured by the nearest "
    "held-out one. A copy would look the same as the one in the middle, and unlike the third. The "
    "numbers: distance in pixels (root mean square, of 255) to the training cell and to the "
    "held-out one, and the one over the other.",
    "losses.png": "Losses, and what else the training logged.",
    "frechet_infinity.png": "The Fréchet distance at several numbers of images, and the line that "
    "leads to infinitely many, FD∞.",
    "sampling.png": "Kernel distance of the same weights' images under other settings of sampling; "
    "the ring is what the preset uses.",
    "per_class.png": "Real images beside generated ones, with each class's own distances.",
}
# They show distances of a run, which one at a reduced budget may not have.
OF_MEASURED = ("frechet_infinity.png", "per_class.png", "per_class.md")
STUDIES = {
    "bccd": "Few cells: BCCD, five folds",
    "imbalance": "Rare classes: a long tail of BloodMNIST, five subsamples",
    "generators": "Trained on generated cells, tested on real ones",
}
STUDIES_TITLE = "Do generated cells help a classifier?"
OTHERS_TITLE = "Other data sets and sizes"
OTHERS = f"*[0-9]/{PAGE}"  # such as mnist28
# By what stands in the file's name between that of the study and that of the classifier.
STUDY_PICTURES = {
    "": "Each arm's difference in balanced accuracy, with its interval.",
    "-amounts": "Scores against the number of generated images added to each class.",
    "-confusion": "Confusion matrices, summed over folds: a row is a true class.",
    "-learning": "Loss and accuracy on the images that each arm trains on.",
}


def gallery(results: str | Path) -> str:
    """The page about everything in the folder, as Markdown.

    Raises InputError for a folder without records and for a record that is not whole.
    """
    results = Path(results)
    runs = _runs(results)
    if not runs:
        raise InputError(f"{results / 'runs'} holds no record.json; train a model first")
    parts = [
        "# Results, with pictures",
        f"{MADE_BY} from the records and pictures in this folder; do not edit by hand. What was "
        "not run, or not kept, is not shown.",
        _contents(results, runs),
        "## All models",
        _links(results, results, TABLES),
        *_pictures(results, results, COMPARISONS),
        *(part for row, folders in runs for part in _run(results, row, folders)),
        *_checkpoints(results),
        *_studies(results),
        *_mistakes(results),
        *_other_data_sets(results),
        *_others(results),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    datasets = {row["dataset"] for row, _ in runs}
    return in_words_of(datasets.pop(), text) if len(datasets) == 1 else text


def write_gallery(results: str | Path) -> Path:
    """Write the page into the folder, as README.md; returns its path.

    Raises InputError where that is another page.
    """
    check_page(results)
    page, text = Path(results) / PAGE, gallery(results)
    write_text(page, text)
    return page


def check_page(results: str | Path) -> None:
    """Refuse a folder whose README.md is not this page."""
    page = Path(results) / PAGE
    if page.exists() and MADE_BY not in page.read_text(encoding="utf-8", errors="replace"):
        raise InputError(
            f"{page} is another page, which the one with all pictures would replace; choose "
            "another folder"
        )


# ---------------------------------------------------------------------------------------------
# Parts of the page
# ---------------------------------------------------------------------------------------------


def _runs(results: Path) -> list[tuple[dict, dict[int, Path]]]:
    """A row of the tables for each model and preset, and its runs' folders by seed.

    Full budgets come first; under one protocol the order is that of the tables.
    """
    folders = [path.parent for path in record_paths(results / "runs")]
    groups = defaultdict(list)
    for folder, record in zip(folders, collect(results / "runs"), strict=True):
        protocol = Protocol(**record["metrics"]["protocol"])
        place = BUDGETS.index(record["budget"]), protocol.dataset, protocol.key()
        groups[place].append((folder, record))
    runs = []
    for _, group in sorted(groups.items(), key=lambda item: item[0]):
        for row in results_table([record for _, record in group]):
            own = {
                record["seed"]: folder
                for folder, record in group
                if (record["model"], record["preset"]) == (row["model"], row["preset"])
            }
            runs.append((row, dict(sorted(own.items()))))
    return runs


def _title(row: dict) -> str:
    return f"{row['model']} {row['preset']}, {row['dataset']}, {row['image_size']} pixels"


def _contents(results: Path, runs: list) -> str:
    titles = ["All models", *(_title(row) for row, _ in runs)]
    titles += ["Shipped checkpoints"] * any((results / "checkpoints").glob("*.json"))
    titles += [STUDIES_TITLE] * any((results / "augmentation").glob("*.md"))
    titles += ["What mistakes do to numbers"] * any((results / "numbers").glob("*.json"))
    titles += [OTHERS_TITLE] * bool(_other_pages(results))
    return "\n".join(f"- [{title}](#{_anchor(title)})" for title in titles)


def _anchor(title: str) -> str:
    """What code-hosting sites make of a heading."""
    kept = (c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
    return "".join(kept)


def _run(results: Path, row: dict, folders: dict[int, Path]) -> list[str]:
    """The first seed in full; the others as links."""
    seed, folder = next(iter(folders.items()))
    record = _read(folder / "record.json")
    name = f"{row['model']} {row['preset']}, seed {seed}"
    files = {
        "notebook.ipynb": "explained and executed",
        "record.json": "the record",
        "per_class.md": "every class by itself",
    }
    pictures = dict(PICTURES)
    if row["note"].startswith(WITHOUT_NUMBERS):
        numbers = [
            f"Numbers: {row['note']}. Budget: **{row['budget']}**, {record['images_seen']:,} "
            f"images seen in {record['seconds'] / 60:.1f} minutes on {record['device']}."
        ]
        for file in OF_MEASURED:
            files.pop(file, None)
            pictures.pop(file, None)
    else:
        numbers = [run_table(record).strip()]
        if row["frechet_sd"] is not None:
            numbers.append(
                f"Over {row['seeds']} trainings: {row['distance_name']} "
                f"{row['frechet_mean']:.1f} ± {row['frechet_sd']:.1f} (mean ± sd)."
            )
    return [
        f"## {_title(row)}",
        f"Seed {seed}: {_links(results, folder, files)}.",
        *_pictures(
            results,
            folder,
            {"samples.png": "Real images and generated ones, the first that were drawn."},
            name,
        ),
        *numbers,
        *_progress(results, folder, name),
        *_pictures(results, folder, pictures, name),
        *_classes(row, folders),
        *_other_seeds(results, folders, seed),
    ]


def _progress(results: Path, folder: Path, name: str) -> list[str]:
    paths = sorted((folder / "progress").glob("*.png"))
    if not paths:
        return []
    percents = [int(path.stem) for path in paths]
    images = [
        f"![{name}: samples after {percent} % of the training]({_relative(path, results)})"
        for percent, path in zip(percents, paths)
    ]
    return [
        "The same noise as training goes on, in % of it:",
        "\n".join(
            f"| {' | '.join(cells)} |"
            for cells in (map(str, percents), [":-:"] * len(paths), images)
        ),
    ]


def _classes(row: dict, folders: dict[int, Path]) -> list[str]:
    """The classes' own numbers over trainings, where several have them by the same rules and they
    may be shown."""
    paths = [folder / "per_class.json" for folder in folders.values()]
    records = [_read(path) for path in paths if path.exists()]
    protocols = {json.dumps([record[kind] for kind in PROTOCOLS]) for record in records}
    alike = len(records) > 1 and len(protocols) == 1
    if not alike or row["note"].startswith(WITHOUT_NUMBERS):
        return []
    return ["Every class by itself, over trainings:", trainings_markdown(records)]


def _other_seeds(results: Path, folders: dict[int, Path], shown: int) -> list[str]:
    files = {"samples.png": "samples", "notebook.ipynb": "notebook", "record.json": "record"}
    seeds = [
        f"{seed} ({_links(results, folder, files)})"
        for seed, folder in folders.items()
        if seed != shown
    ]
    return [f"Other seeds: {', '.join(seeds)}."] if seeds else []


def _checkpoints(results: Path) -> list[str]:
    lines = []
    for path in sorted((results / "checkpoints").glob("*.json")):
        record = _read(path)
        files = {
            record["checkpoint"]["file"]: "weights",
            f"{path.stem}.md": "card",
            path.name: "record",
        }
        lines.append(
            f"| {path.stem} | {record['dataset']['name']} | {record['seed']} | "
            f"{record['checkpoint']['bytes'] / 1e6:.1f} MB | "
            f"{_links(results, path.parent, files)} |"
        )
    if not lines:
        return []
    head = "| Checkpoint | Trained on | Seed | Size | Files |\n|---|---|---:|---:|---|\n"
    words = "`make samples` draws grids with these files, without data or training."
    if (results.parent / "notebooks" / "explore.ipynb").is_file():
        words += " [`explore`](../notebooks/explore.ipynb) lets you play with them."
    parts = ["## Shipped checkpoints", head + "\n".join(lines), words]
    if (results / "demo_cells.json").is_file():
        drawn_by = _read(results / "demo_cells.json")["drawn_by"]
        shipped = (results / "checkpoints" / drawn_by["file"]).with_suffix(".json")
        now = _read(shipped)["checkpoint"]["sha256"] if shipped.is_file() else None
        by = drawn_by["file"] if now == drawn_by["sha256"] else f"an earlier {drawn_by['file']}"
        files = {"demo_cells.npz": "2,000 cells", "demo_cells.json": "their record"}
        found = _read(results / "demo_cells.json")["copies"]
        words = (
            f"The data set `demo` was drawn with {by}: {_links(results, results, files)}. The "
            f"search for copies of training cells says: {found['verdict']}. AuthPct is "
            f"{found['authpct']:.1f} (held-out real cells: {found['authpct_held_out']:.1f}), C_T "
            f"{found['ct']:.1f}: lower than real cells' means nearer to training cells, by copying "
            "or by drawing the usual kinds of cells alone."
        )
        parts.append(words)
        parts += _pictures(results, results, {"demo_cells.png": "The first eight of each class."})
    return parts


def _studies(results: Path) -> list[str]:
    """The tables of evaluation/augmentation.py and train_on_generated.py, and their figures."""
    folder, parts = results / "augmentation", []
    for name, title in STUDIES.items():
        if not (folder / f"{name}.md").is_file():
            continue
        files = {
            f"{name}.md": "all tables",
            f"{name}.csv": "with all digits",
        }
        # The last to be run has seen the folds before it.
        notebooks = sorted(folder.glob(f"{name}/fold*-seed*/notebook.ipynb"))
        for path in notebooks[-1:]:
            files[path.relative_to(folder).as_posix()] = "the last fold, explained and executed"
        parts += [f"### {title}", _links(results, folder, files)]
        for ending, caption in STUDY_PICTURES.items():
            paths = sorted(folder.glob(f"{name}{ending}*.png" if ending else f"{name}.png"))
            if name == "generators":
                caption = "Recall of each class; the lines are a classifier of real cells."
            parts += [caption] * bool(paths)
            parts += [f"![{path.stem}]({_relative(path, results)})" for path in paths]
    return [f"## {STUDIES_TITLE}", *parts] if parts else []


def _mistakes(results: Path) -> list[str]:
    """The records of evaluation/mistakes.py and their figures."""
    folder, parts = results / "numbers", []
    for path in sorted(folder.glob("*.json")):
        record = _read(path)
        title = record["experiment"].replace("_", " ").capitalize().replace("Jpeg", "JPEG")
        parts.append(f"### {title}")
        parts += _pictures(results, folder, {f"{path.stem}.png": f"{record['what']}."})
        parts.append(_links(results, folder, {path.name: "the record"}))
    if not parts:
        return []
    words = "The usual mistakes, made on purpose and measured, on real cells wherever that can be."
    notebook = _links(results, folder, {"notebook.ipynb": "Explained and executed"})
    return ["## What mistakes do to numbers", words, notebook, *parts]


def _other_pages(results: Path) -> list[Path]:
    """Those of other data sets and sizes; not of one's own images, which may be of patients."""
    return [p for p in sorted(results.glob(OTHERS)) if not p.parent.name.startswith("folder-")]


def _other_data_sets(results: Path) -> list[str]:
    """Links to their pages, and their cells."""
    parts = []
    for page in _other_pages(results):
        shown = {name: COMPARISONS[name] for name in ("comparison.png", "comparison_best.png")}
        parts += [f"### {page.parent.name}", f"[Tables and pictures]({_relative(page, results)})"]
        parts += _pictures(results, page.parent, shown, page.parent.name)
    return [f"## {OTHERS_TITLE}", *parts] if parts else []


def _others(results: Path) -> list[str]:
    """Tables of ablations, with their pictures, and of speed."""
    parts = []
    for title, pattern in {
        "Ablations": "ablations/*/table.md",
        "Speed": "benchmarks/*.md",
    }.items():
        paths = sorted(results.glob(pattern))
        lines = [
            f"- [{path.relative_to(results).as_posix()}]({_relative(path, results)})"
            for path in paths
        ]
        parts += [f"## {title}", "\n".join(lines)] if lines else []
        for path in paths:
            parts += _pictures(results, path.parent, {"ablations.png": ABLATIONS})
    return parts


def _pictures(results: Path, folder: Path, captions: dict[str, str], name: str = "") -> list[str]:
    """Each picture that is there, below its caption."""
    parts = []
    for file, caption in captions.items():
        path = folder / file
        if path.is_file():
            words = path.stem.replace("_", " ")
            alt = f"{name}: {words}" if name else words
            parts += [caption, f"![{alt}]({_relative(path, results)})"]
    return parts


def _links(results: Path, folder: Path, files: dict[str, str]) -> str:
    """Links to those of the folder's files that are there, in one line."""
    return ", ".join(
        f"[{words}]({_relative(folder / file, results)})"
        for file, words in files.items()
        if (folder / file).is_file()
    )


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no record ({error}); remove it and make it again") from None


def _relative(path: Path, results: Path) -> str:
    """The path as a link from the page."""
    return quote(path.relative_to(results).as_posix())


if __name__ == "__main__":
    with exit_on_bad_input():
        if len(sys.argv) != 2:
            raise InputError("usage: python -m evaluation.gallery RESULTS")
        print(f"wrote {write_gallery(sys.argv[1])}")
