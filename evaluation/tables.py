"""Tables of results, made from the runs' records and from nothing else."""

import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from evaluation.protocol import Protocol
from utils import ImageSet, InputError, exit_on_bad_input, find_duplicates, write_atomically

BUDGETS = ("full", "reduced", "quick")
REDUCED_SEEDS = 3
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
)
METRICS = (
    "frechet_distance",
    "kid",
    "kid_standard_error",
    "mean_image_distance",
)


def collect(folder: str | Path) -> list[dict]:
    """Every `record.json` under `folder`, in the order of their paths.

    Raises InputError, naming the file, for one that is no whole record.
    """
    paths = sorted(Path(folder).rglob("record.json"))
    return [_read_record(path) for path in paths]


def split_by_budget(records: list[dict]) -> dict[str, list[dict]]:
    """Records by budget: full, reduced and quick ones never share a table."""
    return {budget: [r for r in records if r["budget"] == budget] for budget in BUDGETS}


def results_table(records: list[dict], floor: dict | None = None) -> list[dict]:
    """One row for each model and preset, its distances as mean ± sd (ddof = 1) over seeds.

    records: of one budget and one protocol; floor: what `protocol.floor` returned, the first row.
    The rows are sorted by Fréchet distance, by KID where the images are too few for the former
    (it is None then). A number that may not be shown is None, and `note` says why. Raises
    InputError for mixed budgets, protocols or configurations and for a seed that comes twice.
    """
    budgets = sorted({record["budget"] for record in records})
    if len(budgets) > 1:
        raise InputError(
            f"runs of the budgets {', '.join(budgets)} cannot share a table; "
            "use split_by_budget first"
        )
    metrics = [record["metrics"] for record in records] + ([floor] if floor else [])
    _check_same_protocol(metrics)

    groups = defaultdict(list)
    for record in records:
        groups[record["model"], record["preset"], record["dataset"]["name"]].append(record)
    rows = [_row(*key, group) for key, group in groups.items()]
    by = "frechet_mean" if any(row["frechet_mean"] is not None for row in rows) else "kid_mean"
    rows.sort(key=lambda row: (row[by] is None, row[by] or 0, row["model"], row["preset"]))
    return ([_floor_row(floor)] if floor else []) + rows


def write_table(rows: list[dict], folder: str | Path, stem: str) -> None:
    """Write `stem`.csv with raw numbers and `stem`.md with rounded ones into `folder`.

    Raises InputError where there are no rows.
    """
    if not rows:
        raise InputError(f"there are no records for the table {stem}; train a model first")

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    text = _markdown(rows)
    write_atomically(Path(folder) / f"{stem}.csv", write_csv)
    write_atomically(
        Path(folder) / f"{stem}.md", lambda path: path.write_text(text, encoding="utf-8")
    )


def run_table(record: dict) -> str:
    """One run's numbers beside the floor, and the rules behind them, as Markdown."""
    metrics = record["metrics"]
    floor, rules, name = metrics["floor"], metrics["protocol"], metrics["distance_name"]
    kid, kid_floor = (f"{m['kid']:.4g} ± {m['kid_standard_error']:.2g}" for m in (metrics, floor))
    return f"""
| | this run | held-out real cells (floor) |
|---|---:|---:|
| {name} | {metrics["frechet_distance"]:.1f} | {floor["frechet_distance"]:.1f} |
| KID | {kid} | {kid_floor} |
| {name} of the mean image, repeated (ceiling) | {metrics["mean_image_distance"]:.1f} | |
| mean colour error, of 255 | {metrics["mean_colour_error"]:.2f} | |

{rules["n_fake"]:,} generated images, {rules["label_distribution"]}, against the
{rules["n_real"]:,} of the {rules["reference_split"]} split of {rules["dataset"]}; features:
{rules["extractor"]}, {rules["feature_dim"]} dimensions. Budget: **{record["budget"]}**,
{record["images_seen"]:,} images seen (epochs: {record["config"]["epochs"]}) in
{record["seconds"] / 60:.1f} minutes on {record["device"]}, seed {record["seed"]}.
{" ".join(metrics["warnings"])}
"""


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
        numbers = [record["metrics"][name] for name in METRICS]
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


def _row(model: str, preset: str, dataset: str, group: list[dict]) -> dict:
    seeds = [record["seed"] for record in group]
    if len(set(seeds)) < len(seeds):
        raise InputError(
            f"{model} {preset} on {dataset}: seeds {sorted(seeds)} hold one twice; "
            "every run in a mean must be a training of its own"
        )
    if any(record["config"] != group[0]["config"] for record in group):
        raise InputError(
            f"{model} {preset} on {dataset}: its runs have different configurations; "
            "remove those of the older one"
        )
    metrics = [record["metrics"] for record in group]
    protocol = Protocol(**metrics[0]["protocol"])
    note = protocol.frechet_warning
    frechet = [] if note else [m["frechet_distance"] for m in metrics]
    kid = [m["kid"] for m in metrics]
    if group[0]["budget"] == "reduced":
        reason = _reduced_shortfall(frechet, metrics)
        if reason:
            frechet, kid, note = [], [], f"not measured ({reason})"
    return _columns(model, preset, dataset, metrics[0]) | {
        "budget": group[0]["budget"],
        "seeds": len(group),
        **_mean_and_sd("frechet", frechet),
        **_mean_and_sd("kid", kid),
        "images_seen": statistics.mean(record["images_seen"] for record in group),
        "seconds": statistics.mean(record["seconds"] for record in group),
        "note": note,
    }


def _reduced_shortfall(frechet: list[float], metrics: list[dict]) -> str:
    """Why a run at a reduced budget may not be shown; empty where it may."""
    if len(metrics) < REDUCED_SEEDS:
        return f"{len(metrics)} of {REDUCED_SEEDS} seeds"
    if not frechet:
        return "too few images for a Fréchet distance"
    if statistics.mean(frechet) >= statistics.mean(m["mean_image_distance"] for m in metrics) / 2:
        return "not below half the mean image's distance"
    return ""


def _floor_row(floor: dict) -> dict:
    protocol = Protocol(**floor["protocol"])
    return _columns("real cells (held out)", "", protocol.dataset, floor) | {
        "budget": "",
        "seeds": None,
        **_mean_and_sd("frechet", [] if protocol.frechet_warning else [floor["frechet_distance"]]),
        **_mean_and_sd("kid", [floor["kid"]]),
        "images_seen": None,
        "seconds": None,
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
        "label_distribution": protocol.label_distribution,
        "extractor": protocol.extractor,
        "extractor_sha256": protocol.extractor_sha256,
        "protocol": protocol.key(),
        "distance_name": metrics["distance_name"],
    }


def _mean_and_sd(name: str, values: list[float]) -> dict:
    return {
        f"{name}_mean": statistics.mean(values) if values else None,
        f"{name}_sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def _markdown(rows: list[dict]) -> str:
    first = rows[0]
    lines = [
        f"| Model | Preset | Seeds | {first['distance_name']} | KID |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        seeds = "–" if row["seeds"] is None else row["seeds"]
        frechet, kid = _cell(row, "frechet", ".1f", ".1f"), _cell(row, "kid", ".4g", ".2g")
        if row["note"].startswith("not measured"):
            frechet = kid = row["note"]
        lines.append(f"| {row['model']} | {row['preset'] or '–'} | {seeds} | {frechet} | {kid} |")
    rules = (
        f"{first['dataset']} at {first['image_size']} pixels: {first['n_fake']:,} images with "
        f"{first['label_distribution']} against the {first['n_real']:,} of the "
        f"{first['reference_split']} split; features of {first['extractor']} (sha256 "
        f"{first['extractor_sha256'][:8]}); mean ± sd over seeds; protocol {first['protocol']}."
    )
    lines += ["", rules]
    notes = {row["note"] for row in rows if row["note"]}
    lines += [f"\n{note}." for note in sorted(notes) if not note.startswith("not measured")]
    return "\n".join(lines) + "\n"


def _cell(row: dict, name: str, mean_format: str, sd_format: str) -> str:
    mean, sd = row[f"{name}_mean"], row[f"{name}_sd"]
    if mean is None:
        return "–"
    text = f"{mean:{mean_format}}"
    if row["seeds"] is None:
        return text
    return f"{text} ± –" if sd is None else f"{text} ± {sd:{sd_format}}"


README_START, README_END = "<!-- results:", "<!-- end of results -->"


def update_readme(readme: str | Path, folder: str | Path) -> None:
    """Put the tables of `folder`, as written, between the README's two marks.

    Raises InputError where a mark or the main table is missing.
    """
    readme, folder = Path(readme), Path(folder)
    before, start, rest = readme.read_text(encoding="utf-8").partition(README_START)
    mark, end, after = rest.partition(README_END)
    if not start or not end:
        raise InputError(f"{readme} lacks the marks {README_START!r} and {README_END!r}")
    if not (folder / "results.md").is_file():
        raise InputError(f"{folder / 'results.md'} does not exist; run compare_models first")
    parts = [
        start + mark.splitlines()[0] + "\n",
        (folder / "results.md").read_text(encoding="utf-8"),
    ]
    if (folder / "results_reduced.md").is_file():
        parts.append("Runs at a reduced budget, which never share a table with full ones:\n")
        parts.append((folder / "results_reduced.md").read_text(encoding="utf-8"))
    text = before + "\n".join(parts) + "\n" + end + after
    write_atomically(readme, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    with exit_on_bad_input():
        if len(sys.argv) != 3:
            raise InputError("usage: python -m evaluation.tables RESULTS README")
        update_readme(sys.argv[2], sys.argv[1])
