"""Tables of results, made from the runs' records and from nothing else."""

import csv
import dataclasses
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from custom_models import make_config
from custom_models.ablations import Ablation
from custom_models.config import stored_settings
from evaluation import significance
from evaluation.protocol import Protocol
from utils import (
    UPRIGHT,
    ImageSet,
    InputError,
    exit_on_bad_input,
    files_below,
    find_duplicates,
    in_words_of,
    write_atomically,
    write_text,
)

BUDGETS = ("full", "reduced", "quick")
# Settings that the data decides.
BY_DATA = ("image_size", "image_channels", "n_classes", "jpeg_quality")
REDUCED_SEEDS = 3
RECOGNISED = 0.8  # share of a conditional model's samples
# Change of a curve's mean from the last fifth but one to the last: a share of that mean, or of the
# curve's whole range for one that ends near zero.
FLAT, FLAT_OF_RANGE = 0.05, 0.001
# How the note of a row begins that has none: no run, or runs that may not be shown.
WITHOUT_NUMBERS = ("not measured", "not shown")
SURE = 3  # standard errors of a share of images; of C_T, a mean of z-scores, the value itself
FIELDS = (
    "model",
    "preset",
    "config",
    "seed",
    "dataset",
    "metrics",
    "budget",
    "images_seen",
    "seconds",
    "device",
    "history",
)


@dataclass(frozen=True)
class Column:
    """One metric of a table: its name, where it stands in a run's metrics, how it is shown.

    error, interval: where its standard error within a run, or its 95 % interval, stands;
    interval_format: of the interval's ends.
    """

    name: str
    path: tuple[str, ...]
    title: str
    mean_format: str
    sd_format: str
    error: tuple[str, ...] = ()
    interval: tuple[str, ...] = ()
    interval_format: str = ".2f"


# The first column's title is the distance's own name, which says whose features they are.
QUALITY = (
    Column(
        "frechet",
        ("frechet_distance",),
        "",
        ".1f",
        ".1f",
        interval=("frechet_interval",),
        interval_format=".1f",
    ),
    Column(
        "frechet_infinity",
        ("frechet_infinity", "value"),
        "FD∞",
        ".1f",
        ".1f",
        error=("frechet_infinity", "standard_error"),
    ),
    Column("kid", ("kid",), "KID", ".4g", ".2g", error=("kid_standard_error",)),
    Column("precision", ("precision",), "Precision", ".3f", ".3f"),
    Column("recall", ("recall",), "Recall", ".3f", ".3f"),
    Column("density", ("density",), "Density", ".3f", ".3f"),
    Column("coverage", ("coverage",), "Coverage", ".3f", ".3f"),
)
TRUST = (
    Column("domain_frechet", ("domain", "frechet_distance"), "FD (domain)", ".2f", ".2f"),
    Column("agreement", ("agreement", "agreement"), "Class agreement", ".3f", ".3f"),
    Column(
        "train_share",
        ("copies", "features", "train_share"),
        "Nearer to train",
        ".3f",
        ".3f",
        interval=("copies", "features", "train_share_interval"),
    ),
    Column(
        "train_share_pixels",
        ("copies", "pixels", "train_share"),
        "Nearer to train (pixels)",
        ".3f",
        ".3f",
        interval=("copies", "pixels", "train_share_interval"),
    ),
    Column("copied_share", ("copies", "pixels", "copied_share"), "Copies", ".2%", ".2%"),
    Column("authpct", ("copies", "authpct"), "AuthPct", ".1f", ".1f"),
    Column("ct", ("copies", "ct"), "C_T", ".1f", ".1f"),
)
COLUMNS = QUALITY + TRUST
# Of a table that has to be short.
SUMMARY = tuple(
    c for c in COLUMNS if c.name in ("frechet", "precision", "recall", "coverage", "agreement")
)
ABLATION = tuple(c for c in QUALITY if c.name in ("frechet", "kid", "precision", "recall"))
# Of a row of a grid from the unchanged preset; no metric of a run.
DIFFERENCE = Column("difference", (), "Difference", "+.1f", ".1f")
REAL = "real images (held out)"
PER_CLASS = ("kid", "precision", "recall", "agreement")


def collect(folder: str | Path) -> list[dict]:
    """Every `record.json` under `folder`, in the order of their paths.

    Raises InputError, naming the file, for one that is no whole record.
    """
    return [_read_record(path) for path in record_paths(folder)]


def record_paths(folder: str | Path) -> list[Path]:
    """Where the records under `folder` lie, sorted."""
    return [path for path in files_below(folder) if path.name == "record.json"]


def split_by_budget(records: list[dict]) -> dict[str, list[dict]]:
    """Records by budget: full, reduced and quick ones never share a table."""
    return {budget: [r for r in records if r["budget"] == budget] for budget in BUDGETS}


def floor_of(records: list[dict]) -> dict:
    """What held-out real cells get, from the record that knows most of it.

    Records from before a metric was added lack it in their floor, too.
    """
    return max((record["metrics"]["floor"] for record in records), key=len)


def with_both_halves(floor: dict) -> dict:
    """The floor with AuthPct of all held-out cells, where it knows that of both halves.

    The search for copies takes one half of them as generated and one as held out; AuthPct compares
    with the train split alone, so that it may take both.
    """
    copies = floor.get("copies", {})
    if "authpct_held_out" not in copies:
        return floor
    halves = [("authpct", copies["n_images"]), ("authpct_held_out", copies["n_held_out"])]
    mean = sum(copies[name] * n for name, n in halves) / sum(n for _, n in halves)
    return floor | {"copies": copies | {"authpct": mean}}


def results_table(records: list[dict], floor: dict | None = None) -> list[dict]:
    """One row for each model and preset, its distances as mean ± sd (ddof = 1) over seeds.

    records: of one budget and one protocol; floor: as `floor_of` returns it, the first row.
    The rows are sorted by Fréchet distance, by KID where the images are too few for the former
    (it is None then). A number that may not be shown is None, and `note` says why; one that a run
    of the row lacks is None, too. Raises InputError for mixed budgets, protocols or configurations
    and for a seed that comes twice.
    """
    budgets = sorted({record["budget"] for record in records})
    if len(budgets) > 1:
        raise InputError(
            f"runs of the budgets {', '.join(budgets)} cannot share a table; "
            "use split_by_budget first"
        )
    floor = with_both_halves(floor) if floor else None
    metrics = [record["metrics"] for record in records] + ([floor] if floor else [])
    _check_same_protocol(metrics)
    _check_same_protocol([m["domain"] for m in metrics if "domain" in m])
    _check_same_metrics(records)
    check_same_classifier(metrics)

    groups = defaultdict(list)
    for record in records:
        groups[record["model"], record["preset"], record["dataset"]["name"]].append(record)
    rows = [_row(*key, group) for key, group in groups.items()]
    for row in rows:
        own = (row["authpct_mean"], row["ct_mean"], row["n_fake"])
        row["nearer_than_real"] = _nearer_than_real(*own, floor or {})
    by = "frechet_mean" if any(row["frechet_mean"] is not None for row in rows) else "kid_mean"
    rows.sort(key=lambda row: (row[by] is None, row[by] or 0, row["model"], row["preset"]))
    return ([_floor_row(floor)] if floor else []) + rows


def write_table(rows: list[dict], folder: str | Path, stem: str) -> None:
    """Write `stem`.csv with raw numbers and `stem`.md with rounded ones into `folder`.

    Raises InputError where there are no rows.
    """
    if not rows:
        raise InputError(f"there are no records for the table {stem}; train a model first")

    write_rows(rows, _markdown(rows), Path(folder) / stem)


def mean_and_sd(name: str, values: list[float | None]) -> dict:
    """NAME_mean and NAME_sd (ddof = 1) of a table's row: None without, or with gaps in, values.

    One value alone has no standard deviation.
    """
    whole = values and None not in values
    several = whole and len(values) > 1
    return {
        f"{name}_mean": statistics.mean(values) if whole else None,
        f"{name}_sd": statistics.stdev(values) if several else None,
    }


def write_rows(rows: list[dict], text: str, stem: str | Path) -> None:
    """Write the rows as `stem`.csv and the text, which shows them, as `stem`.md."""

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(f"{stem}.csv", write_csv)
    write_text(f"{stem}.md", text)


def per_class_table(records: list[dict], floor: dict | None = None) -> list[dict]:
    """One row for each conditional model, preset and class: mean and sd over seeds.

    records, floor: as for `results_table`. KID, precision and recall are those of the class against
    the real cells of that class, with n_real and n_fake; agreement is a classifier's. Empty where
    no model is conditional; runs at a reduced budget that may not be shown are left out. A number
    that a run lacks is None. Raises InputError for mixed protocols.
    """
    runs, groups = defaultdict(list), defaultdict(list)
    for record in records:
        runs[record["model"], record["preset"]].append(record)
    for (model, preset), group in runs.items():
        if group[0]["budget"] == "reduced" and reduced_shortfall(group):
            continue
        for record in group:
            for place, row in enumerate(record["metrics"].get("per_class", [])):
                groups[model, preset, place].append((record["metrics"], row))
    if not groups:
        return []
    if floor:
        for place, row in enumerate(floor["per_class"]):
            groups[REAL, "", place].append((floor, row))
    _check_same_protocol([metrics for group in groups.values() for metrics, _ in group])
    order = [key for key in groups if key[0] == REAL] + [key for key in groups if key[0] != REAL]
    return [_class_row(*key[:2], groups[key]) for key in order]


def _class_row(model: str, preset: str, group: list[tuple[dict, dict]]) -> dict:
    """group: the metrics of each run, and among them those of one class."""
    first, (kind, n_real, n_fake) = group[0][0], _of(group[0][1], "class", "n_real", "n_fake")
    path = ("agreement", "per_class", kind, "agreement")
    means = mean_and_sd("agreement", [_at(metrics, path) for metrics, _ in group])
    for name in ("kid", "precision", "recall"):
        means |= mean_and_sd(name, [row[name] for _, row in group])
    return {
        "model": model,
        "preset": preset,
        "dataset": first["protocol"]["dataset"],
        "class": kind,
        "seeds": None if model == REAL else len(group),
        "n_real": n_real,
        "n_fake": n_fake,
        **means,
        "n_agreement": _at(first, (*path[:-1], "n")),
        "extractor": first["protocol"]["extractor"],
        "reference_split": first["protocol"]["reference_split"],
        "protocol": Protocol(**first["protocol"]).key(),
    }


def _of(row: dict, *names: str) -> tuple:
    return tuple(row[name] for name in names)


def write_per_class_table(rows: list[dict], folder: str | Path, stem: str) -> None:
    """Write the rows of `per_class_table` as `stem`.csv and `stem`.md into `folder`.

    The CSV leaves out the data set, which stands in that of `write_table` beside it.
    """
    numbers = [{name: row[name] for name in row if name != "dataset"} for row in rows]
    write_rows(numbers, per_class_markdown(rows) + "\n", Path(folder) / stem)


def per_class_markdown(rows: list[dict]) -> str:
    """The rows of `per_class_table` with their rules below them, as Markdown."""
    columns = [Column(name, (), name.title(), ".3f", ".3f") for name in PER_CLASS]
    titles = " | ".join("KID" if c.name == "kid" else c.title for c in columns)
    lines = [
        f"| Model | Preset | Class | Seeds | n real | n generated | {titles} |",
        "|---|---|---|---:|---:|---:|" + "---:|" * len(columns),
    ]
    for row in rows:
        cells = " | ".join(_cell(row, column) for column in columns)
        lines.append(
            f"| {row['model']} | {row['preset'] or '–'} | {row['class']} | {row['seeds'] or '–'} "
            f"| {row['n_real']:,} | {row['n_fake']:,} | {cells} |"
        )
    seeds = "mean ± sd over seeds; " if any((row["seeds"] or 0) > 1 for row in rows) else ""
    text = (
        f"KID, precision and recall: images of a class against the {rows[0]['reference_split']} "
        f"cells of that class, on features of {rows[0]['extractor']}; {seeds}protocol "
        f"{rows[0]['protocol']}. "
    )
    if any(row["agreement_mean"] is not None for row in rows):
        text += (
            "Agreement: how often a classifier of real train cells names the class that was asked "
            "for"
        )
        # Images from a folder have whatever frequencies they have, and no row of real cells.
        real = ", or the class of a real test cell, among images with the test split's frequencies"
        text += real * any(row["model"] == REAL for row in rows) + ". "
    text += "Fréchet distances, for which classes have few images, are not shown."
    return "\n".join([*lines, "", in_words_of(rows[0]["dataset"], text)])


def ablation_table(runs: list[tuple[Ablation, list[dict]]]) -> list[dict]:
    """One row for each change of a grid: mean ± sd (ddof = 1) over seeds, and the difference.

    runs: every row of the grid with the records of its trainings, an empty list where it was not
    run (its numbers are None then). differences: for each seed that both have, the Fréchet distance
    minus that of the model's row without settings, as JSON, their number (pairs), mean and sd, p of
    Student's two-sided t-test of a mean of zero, plain and adjusted for all rows that have one
    (Holm 1979), and whether that is below `significance.LEVEL` (beyond_chance); none for that row
    itself. floor_frechet: what held-out real cells get. Budgets may differ, since
    epochs may be what a row changes; `budget` and `images_seen` tell.
    Raises InputError where there are no records at all, for mixed protocols, for a seed that comes
    twice and for runs of one row with different configurations.
    """
    metrics = [record["metrics"] for _, records in runs for record in records]
    if not metrics:
        raise InputError("no run of this grid is there; train one of its rows first")
    _check_same_protocol(metrics)
    _check_same_metrics([record for _, records in runs for record in records])
    unchanged = {a.model: _distances(records) for a, records in runs if not a.settings}
    rows = [
        _ablation_row(ablation, records, unchanged[ablation.model], metrics[0])
        for ablation, records in runs
    ]
    adjusted = significance.holm([row["difference_p"] for row in rows])
    sure = [p is not None and p < significance.LEVEL for p in adjusted]
    return [
        row | {"difference_p_holm": p, "beyond_chance": known}
        for row, p, known in zip(rows, adjusted, sure)
    ]


def _distances(records: list[dict]) -> dict[int, float]:
    """Fréchet distance by seed, of those that have one."""
    found = {record["seed"]: record["metrics"]["frechet_distance"] for record in records}
    return {seed: found[seed] for seed in sorted(found) if found[seed] is not None}


def _ablation_row(
    ablation: Ablation, records: list[dict], unchanged: dict[int, float], metrics: dict
) -> dict:
    """metrics: of any run in the table, for the protocol, which all of them share."""
    model, preset, protocol = ablation.model, ablation.preset, Protocol(**metrics["protocol"])
    if records:
        check_trainings(f"{model} {preset}, {ablation.name}", records)
    differences = {
        seed: distance - unchanged[seed]
        for seed, distance in _distances(records).items()
        if ablation.settings and seed in unchanged
    }
    values = list(differences.values())
    # The seeds' trainings share nothing but their data, so no variance has to be corrected.
    tested = significance.paired(values, math.inf, 1) if values else {"p": None}
    floor = _at(metrics, ("floor", "frechet_distance"))
    return {
        "model": model,
        "preset": preset,
        "ablation": ablation.name,
        "settings": json.dumps(ablation.settings),
        "what": ablation.what,
        **_columns(model, preset, protocol.dataset, metrics),
        "seeds": ", ".join(map(str, sorted(record["seed"] for record in records))),
        "budget": records[0]["budget"] if records else "",
        "images_seen": records[0]["images_seen"] if records else None,
        "floor_frechet": floor,
        **_means([record["metrics"] for record in records], ABLATION),
        "differences": json.dumps(differences),
        **mean_and_sd("difference", values),
        "pairs": len(values) or None,
        "difference_p": tested["p"],
        "trained_on": _trained_on(records) if records else "",
        "note": protocol.frechet_warning if records else "not measured",
    }


def write_ablation_table(rows: list[dict], folder: str | Path) -> None:
    """Write the rows of `ablation_table` as table.csv and table.md into `folder`."""
    name, floor = rows[0]["distance_name"], rows[0]["floor_frechet"]
    measures = [column.title for column in ABLATION[1:]]
    titles = [name, DIFFERENCE.title, "Pairs", "p (Holm)", *measures]
    lines = [
        f"| Model | Change | What it is | Seeds | Images seen | {' | '.join(titles)} |",
        "|---|---|---|---:|---:|" + "---:|" * len(titles),
    ]
    for row in rows:
        distance, *others = [_cell(row, column) for column in ABLATION]
        paired = [number(row["pairs"], "d"), p_value(row["difference_p_holm"])]
        cells = [distance, _cell(row, DIFFERENCE), *paired, *others]
        if row["note"].startswith(WITHOUT_NUMBERS):
            cells[0] = row["note"]
        lines.append(
            f"| {row['model']} | {row['ablation']} | {row['what'] or '–'} | {row['seeds'] or '–'} "
            f"| {number(row['images_seen'], ',')} | {' | '.join(cells)} |"
        )
    shorter = [f"{row['model']} {row['ablation']}" for row in rows if row["budget"] == "reduced"]
    parts = [
        "Ablations: changed settings, each against the same model's preset as it is, its first row "
        "here. The table of results is another one.",
        "\n".join(lines),
        _rules(rows[0]),
        "Difference: of each training's distance from that of the same seed in that first row, "
        "mean ± sd over these pairs. p: of Student's two-sided t-test that this mean is zero, "
        "adjusted for all comparisons of the table (Holm); below "
        f"{significance.LEVEL} it is called beyond chance.",
        f"{name} of held-out real images (floor): {number(floor, '.1f')}.",
        *([f"At a reduced budget, which is the change: {', '.join(shorter)}."] if shorter else []),
        *_machines(rows, lambda row: f"{row['model']} {row['ablation']}"),
        *_notes(rows),
    ]
    write_rows(rows, "\n\n".join(parts) + "\n", Path(folder) / "table")


def run_table(record: dict) -> str:
    """One run's numbers beside the floor and the ceiling, and their rules, as Markdown."""
    metrics, rules = record["metrics"], record["metrics"]["protocol"]
    asked = rules["label_distribution"] if "per_class" in metrics else "of whatever class they are"
    other = [f"`{name}` {value}" for name, value in record.get("validated_with", {}).items()]
    validated = ""
    if other and any("validation_kid" in row for row in record["history"]):
        validated = f" In training, validation KID was of images drawn with {', '.join(other)}."
    return f"""
{metrics_table(metrics)}

{rules["n_fake"]:,} generated images, {asked}, against the
{rules["n_real"]:,} of the {rules["reference_split"]} split of {rules["dataset"]}; features:
{rules["extractor"]}, {rules["feature_dim"]} dimensions. Budget: **{record["budget"]}**,
{record["images_seen"]:,} images seen (epochs: {record["config"]["epochs"]}) in
{record["seconds"] / 60:.1f} minutes on {record["device"]}, seed {record["seed"]}.{validated}
"""


def metrics_table(metrics: dict) -> str:
    """All numbers of one set of images, each beside what real cells get, as Markdown.

    metrics: as `judge.judge` returns them.
    """
    floor, ceilings = with_both_halves(metrics["floor"]), metrics["ceilings"]
    name, n = metrics["distance_name"], floor.get("n") or floor["protocol"]["n_fake"]
    lines = [
        f"| | these images | held-out real images (floor, n = {n:,}) |",
        "|---|---:|---:|",
    ]
    for column in COLUMNS:
        value, lowest = (_measured(m, column) for m in (metrics, floor))
        if value != "–" or column.name in ("frechet", "kid"):
            lines.append(f"| {column.title or name} | {value} | {lowest} |")
    if "mean_colour_error" in metrics:
        lines.append(f"| mean colour error, of 255 | {metrics['mean_colour_error']:.2f} | |")
    words = []
    if metrics["frechet_distance"] is not None:
        shown = ", ".join(f"{ceilings[kind]:.0f} for {kind.replace('_', ' ')}" for kind in ceilings)
        words.append(f"{name} of generators that have learned nothing (ceiling): {shown}.")
    if "copies" in metrics:
        found, n_images = metrics["copies"], metrics["protocol"]["n_fake"]
        nearer = _nearer_than_real(found.get("authpct"), found.get("ct"), n_images, floor)
        text = f"Copies of training cells: {_with_nearness(found['verdict'], nearer)}."
        words.append(in_words_of(metrics["protocol"]["dataset"], text))
    words += [f"{warning}." for warning in metrics["warnings"]]
    return "\n".join(lines) + "\n\n" + " ".join(words)


def _measured(metrics: dict, column: Column) -> str:
    """A metric with its standard error or interval within the run, where it has one."""
    text = number(_at(metrics, column.path), column.mean_format)
    error, interval = _at(metrics, column.error), _at(metrics, column.interval)
    if isinstance(error, float):
        text += f" ± {error:{column.sd_format}}"
    if interval:
        text += _between(*interval, column)
    return text


def _between(low: float, high: float, column: Column) -> str:
    return f" ({low:{column.interval_format}} to {high:{column.interval_format}})"


def _at(metrics: dict, path: tuple[str, ...]):
    """The value at a path of keys; None where it was not measured, and of no path."""
    value = metrics if path else None
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def number(value: float | None, form: str) -> str:
    """A number of a table in Python's format `form`; a dash for one that was not measured."""
    return "–" if value is None else f"{value:{form}}"


def p_value(value: float | None) -> str:
    """A p-value of a table: three digits, or that it is below them."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, ".3f")


def split_table(sets: list[ImageSet]) -> str:
    """Images of each class in each split, and identical pairs across splits, as Markdown."""
    first = sets[0]
    lines = [f"| class | {' | '.join(part.split for part in sets)} |"]
    lines.append("|---|" + "---:|" * len(sets))
    for label, name in enumerate(first.classes):
        counts = [str(int((part.labels == label).sum())) for part in sets]
        lines.append(f"| {name} | {' | '.join(counts)} |")
    pairs = len(find_duplicates(sets))
    lines.append(f"\n{first.name}; {pairs} identical pairs across splits.")
    return "\n".join(lines)


def _read_record(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = [field for field in FIELDS if field not in record]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)}; run it again")
        record["dataset"]["name"], record["metrics"]["distance_name"]
        Protocol(**record["metrics"]["protocol"])
        record["metrics"]["ceilings"]["mean_image"]
        numbers = [_at(record["metrics"], column.path) for column in COLUMNS]
        numbers = [record["metrics"]["kid"], *(x for x in numbers if x is not None)]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no whole record ({error!r}); remove it and run it again")
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise InputError(f"{path} holds a metric that is no finite number; run it again")
    if record["budget"] not in BUDGETS:
        raise InputError(
            f"{path}: unknown budget {record['budget']!r}; known are {', '.join(BUDGETS)}"
        )
    return record


def _check_same_protocol(metrics: list[dict]) -> None:
    """Refuse two protocols in one table, and say in which fields they differ."""
    for other in metrics[1:]:
        first, second = Protocol(**metrics[0]["protocol"]), Protocol(**other["protocol"])
        if first.key() != second.key():
            a, b = first.to_dict(), second.to_dict()
            fields = "; ".join(f"{k}: {a[k]} and {b[k]}" for k in a if a[k] != b[k])
            raise InputError(
                f"numbers under different protocols cannot share a table ({fields}); "
                "make one table for each"
            )


def _check_same_metrics(records: list[dict]) -> None:
    """Refuse records of two versions of the metrics, or of two sets of held-out cells."""
    held_out = {record["dataset"].get("held_out_sha256") for record in records}
    if len(held_out - {None}) > 1:  # older records do not name them
        raise InputError(
            "these runs were measured against different held-out cells; measure the older ones "
            "again (the command that trained them does so)"
        )
    of_version = {record.get("measured", {}).get("metrics_version"): record for record in records}
    if len(of_version) > 1:
        runs = [f"{r['model']} {r['preset']} seed {r['seed']}" for r in of_version.values()]
        raise InputError(
            f"{' and '.join(runs)} were measured by different versions of the metrics; measure the "
            "older ones again (the command that trained them does so)"
        )


def check_same_classifier(metrics: list[dict]) -> None:
    """Refuse class agreement by several classifiers: of most data, each machine trains its own."""
    found = [m["agreement"].get("classifier_sha256") for m in metrics if "agreement" in m]
    if len(set(found)) > 1:
        raise InputError(
            "the class agreement of these runs was measured by different classifiers; delete the "
            "record.json of the older ones and run the command that trained them again"
        )


def check_trainings(name: str, group: list[dict]) -> None:
    """Refuse a mean over anything but trainings of one configuration with a seed each."""
    seeds = [record["seed"] for record in group]
    if len(set(seeds)) < len(seeds):
        raise InputError(
            f"{name}: seeds {sorted(seeds)} hold one twice; "
            "every run in a mean must be a training of its own"
        )
    preset = make_config(group[0]["model"], group[0]["preset"])
    configs = [stored_settings(record["config"], preset) for record in group]
    if any(config != configs[0] for config in configs):
        raise InputError(
            f"{name}: its runs have different configurations; remove those of the older one"
        )
    versions = {record.get("versions", {}).get("code") for record in group}
    if len(versions) > 1:
        raise InputError(
            f"{name}: its runs were trained by different versions of the code "
            f"({' and '.join(sorted(map(str, versions)))}); train the older ones again"
        )


def _row(model: str, preset: str, dataset: str, group: list[dict]) -> dict:
    check_trainings(f"{model} {preset} on {dataset}", group)
    metrics = [record["metrics"] for record in group]
    protocol = Protocol(**metrics[0]["protocol"])
    note, shown = protocol.frechet_warning, metrics
    if group[0]["budget"] == "reduced":
        reason = reduced_shortfall(group)
        if reason:
            shown, note = [], f"not shown ({reason})"
    return _columns(model, preset, dataset, metrics[0]) | {
        "budget": group[0]["budget"],
        "seeds": len(group),
        **_means(shown),
        "copies_verdict": _verdict(shown),
        "settings": _changed_settings(model, preset, dataset, group[0]["config"]),
        "stored_as": _stored_as(group[0]["config"]),
        "images_seen": statistics.mean(record["images_seen"] for record in group),
        "seconds": statistics.mean(record["seconds"] for record in group),
        "trained_on": _trained_on(group),
        "note": note,
    }


def _changed_settings(model: str, preset: str, dataset: str, config: dict) -> str:
    """Settings of a run that are not its preset's, such as "lr 0.001 instead of 0.0002"."""
    usual = make_config(model, preset)
    stored = stored_settings(config, usual)
    by_data = (*BY_DATA, *["flips_and_turns"] * dataset.startswith(UPRIGHT))
    own = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(usual).items()
        if name not in by_data
    }
    return ", ".join(
        f"{name} {stored[name]} instead of {value}"
        for name, value in own.items()
        if stored.get(name, value) != value
    )


def _stored_as(config: dict) -> str:
    """How a model's images are stored before they are measured."""
    quality = config.get("jpeg_quality")
    # Runs from before that setting halved colours by means.
    return f"JPEG {quality}, {config.get('jpeg_chroma', 'mean')}" if quality else "as drawn"


def _trained_on(group: list[dict]) -> str:
    """Device and precision of a row's trainings, and how many where they differ."""
    places = Counter()
    for record in group:
        # Records from before the precision could be chosen have that of their device.
        usual = "float32" if record["device"].lower().startswith("cpu") else "bfloat16"
        kinds = {True: ", compiled", "in part": ", compiled in part"}
        compiled = kinds.get(record.get("compiled"), "")
        places[f"{record['device']} in {record.get('precision', usual)}{compiled}"] += 1
    if len(places) == 1:
        return next(iter(places))
    return ", ".join(f"{n} on {place}" for place, n in sorted(places.items()))


def reduced_shortfall(group: list[dict]) -> str:
    """Why runs at a reduced budget may not be shown; empty where they may."""
    metrics = [record["metrics"] for record in group]
    if len(metrics) < REDUCED_SEEDS:
        return f"{len(metrics)} of {REDUCED_SEEDS} trainings"
    distances = [m["frechet_distance"] for m in metrics]
    if None in distances:
        return "too few images for a Fréchet distance"
    half = statistics.mean(m["ceilings"]["mean_image"] for m in metrics) / 2
    if statistics.mean(distances) >= half:
        return "not below half the mean image's distance"
    agreements = [m["agreement"]["agreement"] for m in metrics if "agreement" in m]
    if agreements and statistics.mean(agreements) < RECOGNISED:
        return "fewer than four in five samples recognised as the class asked for"
    logged = group[0]["history"][-1]
    names = [name for name in logged if "loss" in name] + ["validation_kid"]
    if "wasserstein" in logged:
        # A constant added to all scores leaves the distance, equation (2) of Arjovsky et al. 2017,
        # as it is: the generator's loss drifts with it, and says nothing of convergence.
        names.remove("loss_generator")
    for name in names:
        if not all(_is_flat(record["history"], name) for record in group):
            return f"{name.replace('_', ' ')} not flat over the last fifth, or not known"
    return ""


def _is_flat(history: list[dict], name: str) -> bool:
    """Whether a curve's mean changed little from the last fifth but one to the last."""
    values = [row[name] for row in history if name in row]
    fifth = len(values) // 5
    if not fifth:
        return False
    last, before = values[-fifth:], values[-2 * fifth : -fifth]
    end = statistics.mean(last)
    change = abs(end - statistics.mean(before))
    return change <= max(FLAT * abs(end), FLAT_OF_RANGE * (max(values) - min(values)))


def _floor_row(floor: dict) -> dict:
    protocol = Protocol(**floor["protocol"])
    return _columns(REAL, "", protocol.dataset, floor) | {
        "budget": "",
        "seeds": None,
        **_means([floor]),
        "copies_verdict": _verdict([floor]),
        "nearer_than_real": "",
        "settings": "",
        "stored_as": "",
        "images_seen": None,
        "seconds": None,
        "trained_on": "",
        "note": protocol.frechet_warning,
    }


def _columns(model: str, preset: str, dataset: str, metrics: dict) -> dict:
    protocol = Protocol(**metrics["protocol"])
    return {
        "model": model,
        "preset": preset,
        "dataset": dataset,
        "image_size": protocol.image_size,
        "reference_split": protocol.reference_split,
        "n_real": protocol.n_real,
        "n_fake": protocol.n_fake,
        "n_domain": _at(metrics, ("domain", "protocol", "n_fake")),
        "label_distribution": protocol.label_distribution,
        "extractor": protocol.extractor,
        "extractor_sha256": protocol.extractor_sha256,
        "k": protocol.k,
        "protocol": protocol.key(),
        "distance_name": metrics["distance_name"],
    }


def _means(metrics: list[dict], columns: tuple[Column, ...] = COLUMNS) -> dict:
    """Mean and sd of every column, with the means of its interval's ends where it has one.

    None where a run lacks the metric.
    """
    row = {}
    for column in columns:
        row |= mean_and_sd(column.name, [_at(m, column.path) for m in metrics])
        if column.interval:
            ends = [_at(m, column.interval) for m in metrics]
            means = [statistics.mean(end) for end in zip(*ends)] if None not in ends else []
            row |= zip((f"{column.name}_low", f"{column.name}_high"), means or (None, None))
    return row


def _verdict(metrics: list[dict]) -> str:
    """What the search for copies said of the runs; how many, where they differ."""
    counts = Counter(m["copies"]["verdict"] for m in metrics if "copies" in m)
    if len(counts) == 1 and counts.total() == len(metrics):
        return next(iter(counts))
    return ", ".join(f"{verdict} ({n})" for verdict, n in sorted(counts.items()))


def _nearer_than_real(authpct: float | None, ct: float | None, n: int, floor: dict) -> str:
    """By which numbers n images lie nearer to training cells than real ones do, if by any.

    AuthPct by more than three standard errors; C_T where it is below -3, of real cells expected 0.
    """
    real = floor.get("copies", {})
    names = []
    if None not in (authpct, real.get("authpct")):
        n_real = real["n_images"] + real.get("n_held_out", 0)
        shares = (authpct, n), (real["authpct"], n_real)
        error = math.sqrt(sum(p * (100 - p) / size for p, size in shares))
        names += ["AuthPct"] * (authpct < real["authpct"] - SURE * error)
    if ct is not None:
        names += ["C_T"] * (ct < -SURE)
    return " and ".join(names)


def _with_nearness(verdict: str, nearer: str) -> str:
    """A verdict, and what `_nearer_than_real` found."""
    return f"{verdict}; nearer than real cells by {nearer}" if nearer else verdict


def _rules(row: dict) -> str:
    """The protocol that all rows of a table share, in words."""
    return (
        f"{row['dataset']} at {row['image_size']} pixels: {row['n_fake']:,} images, of a model "
        f"that can be asked for a class with {row['label_distribution']}, against the "
        f"{row['n_real']:,} of the {row['reference_split']} split; features of {row['extractor']} "
        f"(sha256 {row['extractor_sha256'][:8]}); k = {row['k']}; KID without a factor, of "
        "features as they are, so that it is comparable neither with Inception's nor between "
        "networks; "
        f"mean ± sd over seeds{_WITHIN if row.get('frechet_low') else ''}; "
        f"protocol {row['protocol']}."
    )


_WITHIN = (
    " (of two, the sd is hardly known), in parentheses the 95 % interval within a run, mean over "
    "runs"
)


def _notes(rows: list[dict]) -> list[str]:
    """What is said below a table: each note once, without those that stand in the rows."""
    notes = {row["note"] for row in rows if row["note"]}
    return [f"{note}." for note in sorted(notes) if not note.startswith(WITHOUT_NUMBERS)]


def _machines(rows: list[dict], name) -> list[str]:
    """Which rows, called name(row), were trained where, unless all are of one place."""
    machines = defaultdict(list)
    for row in rows:
        machines[row["trained_on"]].append(name(row))
    machines.pop("", None)  # of real cells, and of rows that were not run
    if len(machines) == 1 and not any(" on " in place for place in machines):
        return []
    words = "Not all were trained on the same device, in the same precision and compiled alike"
    places = (f"{', '.join(names)}: {place}" for place, names in machines.items())
    return [f"{words} ({'; '.join(places)})."]


def _markdown(rows: list[dict]) -> str:
    jpeg = any(row["stored_as"].startswith("JPEG") for row in rows)
    training = ("Images seen", "Stored as") if jpeg else ("Images seen",)
    parts = [_one_table(rows, QUALITY, rows[0]["distance_name"], training), _rules(rows[0])]
    parts += [STORED_WORDS] if jpeg else []
    trust = [c for c in TRUST if any(row[f"{c.name}_mean"] is not None for row in rows)]
    if trust:
        parts += ["A second network, classes and copies:", _one_table(rows, trust, verdict=True)]
        n_domain = max(row["n_domain"] or 0 for row in rows)
        words = [TRUST_WORDS[c.name].split(": ", 1) for c in trust if c.name in TRUST_WORDS]
        lines = [f"- **{name}**: {meaning}" for name, meaning in words]
        parts.append(in_words_of(rows[0]["dataset"], "\n".join(lines).format(n_domain=n_domain)))
    parts += _machines(rows, lambda row: f"{row['model']} {row['preset']}")
    parts += [
        f"{row['model']} {row['preset']} was not run as its preset is: {row['settings']}."
        for row in rows
        if row["settings"]
    ]
    return "\n\n".join(parts + _notes(rows)) + "\n"


STORED_WORDS = (
    "Stored as: how the images were stored before they were measured: as JPEG of that quality, its "
    "colours brought to half the resolution by means of four pixels (\"mean\"), as most programs "
    "do, or within the cosine transform (\"dct\"). BloodMNIST's own cells are JPEGs of quality 75, "
    "dct, whose traces a Fréchet distance sees, so rows that differ here differ for that reason, "
    "too."
)
TRUST_WORDS = {
    "domain_frechet": "FD (domain): on features of our own cell classifier, {n_domain:,} images, "
    "with validation frequencies where they can be asked for, against the test split.",
    "agreement": "Class agreement: how often a classifier of real train cells names the class that "
    "was asked for.",
    "train_share": "Nearer to train: share of images nearer to a training cell than to a held-out "
    "one, sets weighed as equally large; 0.5 for a generator that copies nothing. In parentheses: "
    "the 95 % interval within a run, mean over runs, wide where a few real cells are nearest to "
    "most images; it leaves out 0.5 for one in twenty generators that copy nothing, while the "
    "verdict allows one false alarm in a thousand.",
    "copied_share": "Copies: share of images much closer to one training cell than to the fifth "
    "nearest, in pixels, beyond what held-out cells lead to expect. Here, for C_T and for what is "
    "nearer to train, one half of the real cells plays the generated images and the other half is "
    "held out.",
    "authpct": "AuthPct: share of images not closer to a training cell than its nearest "
    "neighbour, in %; less than real cells' means copying, or the usual kinds of cells alone, "
    "and by more than three standard errors is told beside the verdict. That of real cells is of "
    "all of them.",
    "ct": "C_T: lower where images lie nearer to training cells than real ones do, by copying or "
    "by drawing the usual kinds alone. In theory 0 of real cells, with an sd of about 0.3 (ten "
    "regions) to 1 (one); what is shown is of one half of them, and another half would have "
    "another value. Below -3, a coarse threshold, it is told beside the verdict. It grows with the "
    "number of images.",
}


def _one_table(
    rows: list[dict],
    columns: tuple[Column, ...],
    first_title: str = "",
    training: tuple[str, ...] = (),
    verdict: bool = False,
) -> str:
    titles = [*training, *(column.title or first_title for column in columns)]
    lines = [
        f"| Model | Preset | Seeds | {' | '.join(titles + ['Verdict'] * verdict)} |",
        "|---|---|---:|" + "---:|" * len(titles) + "---|" * verdict,
    ]
    for row in rows:
        seeds = "–" if row["seeds"] is None else row["seeds"]
        cells = [_cell(row, column) for column in columns]
        if row["note"].startswith(WITHOUT_NUMBERS):
            cells[0] = row["note"]
        about = {"Images seen": number(row["images_seen"], ",.0f"), "Stored as": row["stored_as"]}
        cells = [*(about[title] or "–" for title in training), *cells]
        words = _with_nearness(row["copies_verdict"] or "–", row["nearer_than_real"])
        words = in_words_of(row["dataset"], words)
        text = " | ".join(cells + [words] * verdict)
        lines.append(f"| {row['model']} | {row['preset'] or '–'} | {seeds} | {text} |")
    return "\n".join(lines)


def _cell(row: dict, column: Column) -> str:
    mean, sd = row[f"{column.name}_mean"], row[f"{column.name}_sd"]
    if mean is None:
        return "–"
    text = f"{mean:{column.mean_format}}"
    if sd is not None:
        text += f" ± {sd:{column.sd_format}}"
    if row.get(f"{column.name}_low") is not None:
        text += _between(row[f"{column.name}_low"], row[f"{column.name}_high"], column)
    return text


README_START, README_END = "<!-- results:", "<!-- end of results -->"


def update_readme(readme: str | Path, folder: str | Path) -> None:
    """Put short tables of the runs in `folder` between the README's two marks.

    Raises InputError where a mark is missing or no run is at full length.
    """
    readme, folder = Path(readme), Path(folder)
    if not readme.is_file():
        raise InputError(f"{readme} does not exist; name the README to put the tables into")
    before, start, rest = readme.read_text(encoding="utf-8").partition(README_START)
    mark, end, after = rest.partition(README_END)
    if not start or not end:
        raise InputError(f"{readme} lacks the marks {README_START!r} and {README_END!r}")
    groups = split_by_budget(collect(folder / "runs"))
    if not groups["full"]:
        raise InputError(f"{folder / 'runs'} holds no run at full length; train one first")
    parts = [start + mark.splitlines()[0], _summary(groups["full"])]
    if groups["reduced"]:
        words = "Runs at a reduced budget, which never share a table with full ones:"
        parts += [words, _summary(groups["reduced"])]
    write_text(readme, before + "\n\n".join([*parts, end]) + after)


def _summary(records: list[dict]) -> str:
    rows = results_table(records, floor_of(records))
    return _one_table(rows, SUMMARY, rows[0]["distance_name"], ("Images seen",), verdict=True)


if __name__ == "__main__":
    with exit_on_bad_input():
        if len(sys.argv) != 3:
            raise InputError("usage: python -m evaluation.tables RESULTS README")
        update_readme(sys.argv[2], sys.argv[1])
