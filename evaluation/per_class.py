"""Each class by itself: as many images of every class, against the real cells of that class.

The default protocol draws the classes at their own frequencies, so that the rare ones get few
images. Here all get the same number. Beside it stands the protocol of a published conditional GAN
on PBC at 128 pixels, whose reference holds the very cells that the generator was trained on.
"""

import statistics

import torch

from evaluation.features import Extractor, extract
from evaluation.frechet import frechet_distance, gaussian_statistics
from evaluation.protocol import Protocol, measure
from evaluation.tables import mean_and_sd, number
from utils import ImageSet, InputError, in_words_of

VERSION = 1  # raise it when a class's row has other numbers than before
N = 2000  # generated images of a class; of its real cells at most as many
# FID of the published project after 120 epochs (its own extractor, one training).
PUBLISHED_FID = {
    "basophil": 108.4,
    "eosinophil": 102.3,
    "erythroblast": 105.2,
    "immature granulocyte": 94.5,
    "lymphocyte": 133.7,
    "monocyte": 103.1,
    "neutrophil": 116.1,
    "platelet": 129.0,
}
FLOOR = ("kid", "kid_standard_error")  # what held-out cells are few enough to bear
MEANS = ("kid", "frechet_distance", "precision", "recall")
PROTOCOLS = ("protocol", "published_protocol")
FORMATS = {  # of a mean over trainings, and of its sd
    "kid": (".4g", ".2g"),
    "frechet_distance": (".1f", ".1f"),
    "precision": (".3f", ".3f"),
    "recall": (".3f", ".3f"),
    "published": (".1f", ".1f"),
}


def evaluate_per_class(
    images: torch.Tensor, labels: torch.Tensor, sets: dict[str, ImageSet], extractor: Extractor
) -> dict:
    """Distances of every class under two protocols, and their means over the classes.

    images: generated, uint8 [N, 3, S, S]; labels: int64 [N], the classes that were asked for, as
    many images of each; sets: the splits train and held_out.
    Returns plain types. `per_class` has a row for each class: class, n_real (of its train cells, at
    most 2,000), n_fake, the metrics of `protocol.measure` with its warnings (no Fréchet distance
    where n is not above 1.5 times the dimension), `floor` (n and KID of the class's held-out cells)
    and `published`: n and Fréchet distance, whatever n is, of the published protocol, where real
    cells are drawn from all splits. `mean` gives for each metric the mean over the classes that
    have it, and how many these are. Besides: distance_name, protocol, published_protocol. Raises
    InputError for images of another size than the real ones, and for other numbers of images.
    """
    train, held_out = sets["train"], sets["held_out"]
    n = _images_of_each(labels, train)
    if images.shape[1:] != train.images.shape[1:] or len(images) != len(labels):
        raise InputError(
            f"generated images {list(images.shape)} with {len(labels)} labels can't be compared "
            f"with real ones {list(train.images.shape)}; draw one of that size for each label"
        )
    fakes, known, unseen = (
        part.to(extractor.device)
        for part in (
            extract(images, extractor, "features of generated images", cache=False),
            extract(train.images, extractor, "features of real cells (train)"),
            extract(held_out.images, extractor, "features of real cells (held out)"),
        )
    )
    rows = []
    for label, name in enumerate(train.classes):
        fake = fakes[labels == label]
        seen, other = known[train.labels == label], unseen[held_out.labels == label]
        real = _draw(seen, N)
        metrics, warnings = measure(real, fake)
        floor, _ = measure(real, other)
        rows.append(
            {"class": name, "n_real": len(real), "n_fake": n, **metrics, "warnings": warnings}
            | {"floor": {"n": len(other)} | {key: floor[key] for key in FLOOR}}
            | {"published": _published(torch.cat([seen, other]), fake)}
        )
    return {
        "distance_name": extractor.distance_name,
        "protocol": _protocol(
            train,
            extractor,
            reference_split=train.split,
            n_real=sum(row["n_real"] for row in rows),
            n_fake=len(fakes),
            label_distribution=f"{n:,} of each class, against at most {N:,} real ones of it",
        ),
        "published_protocol": _protocol(
            train,
            extractor,
            reference_split="train and held_out",
            n_real=sum(row["published"]["n"] for row in rows),
            n_fake=sum(row["published"]["n"] for row in rows),
            label_distribution=f"of each class as many as real ones of it, at most {min(n, N):,}",
        ),
        "per_class": rows,
        "mean": {name: _mean([row[name] for row in rows]) for name in MEANS}
        | {"published": _mean([row["published"]["frechet_distance"] for row in rows])},
    }


def _images_of_each(labels: torch.Tensor, train: ImageSet) -> int:
    counts = torch.bincount(labels, minlength=len(train.classes))
    if len(set(counts.tolist())) > 1 or len(counts) != len(train.classes) or counts[0] < 2:
        raise InputError(
            f"a comparison by class needs as many images of each class of {train.name} "
            f"({len(train.classes)}), two at least, got {counts.tolist()}; "
            "draw them for utils.class_balanced_labels"
        )
    return counts[0].item()


def _draw(features: torch.Tensor, n: int) -> torch.Tensor:
    """At most n rows, at random, the same for every generator."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return features[order[:n]]


def _published(real: torch.Tensor, fake: torch.Tensor) -> dict:
    n = min(N, len(real), len(fake))
    pair = [gaussian_statistics(part) for part in (_draw(real, n), fake[:n])]
    return {"n": n, "frechet_distance": frechet_distance(*pair)}


def _protocol(train: ImageSet, extractor: Extractor, **fields) -> dict:
    return Protocol(
        dataset=train.name,
        dataset_sha256=train.sha256(),
        image_size=train.images.shape[-1],
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        feature_dim=extractor.dim,
        **fields,
    ).to_dict()


def _mean(values: list[float | None]) -> dict:
    there = [value for value in values if value is not None]
    return {"value": statistics.mean(there) if there else None, "classes": len(there)}


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def per_class_markdown(record: dict) -> str:
    """What `evaluate_per_class` returned, as a Markdown table with the rules below it."""
    rules, distance = record["protocol"], record["distance_name"]
    as_published = rules["dataset"] == "PBC" and rules["image_size"] == 128 and distance == "FID"
    titles = ["n real", "n generated", "KID ± s.e.", "KID, held-out cells", distance]
    titles += ["Precision", "Recall", "n, published protocol", f"{distance}, published protocol"]
    titles += ["FID as published"] * as_published
    lines = [f"| Class | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for row in record["per_class"]:
        cells = [
            f"{row['n_real']:,}",
            f"{row['n_fake']:,}",
            f"{number(row['kid'], '.4g')} ± {number(row['kid_standard_error'], '.2g')}",
            number(row["floor"]["kid"], ".2g"),
            number(row["frechet_distance"], ".1f"),
            number(row["precision"], ".3f"),
            number(row["recall"], ".3f"),
            f"{row['published']['n']:,}",
            number(row["published"]["frechet_distance"], ".1f"),
        ]
        cells += [number(PUBLISHED_FID[row["class"]], ".1f")] if as_published else []
        lines.append(f"| {row['class']} | {' | '.join(cells)} |")
    mean = record["mean"]
    cells = [
        "",
        "",
        _mean_cell(mean["kid"], ".4g"),
        "",
        _mean_cell(mean["frechet_distance"], ".1f"),
    ]
    cells += [_mean_cell(mean[name], ".3f") for name in ("precision", "recall")]
    cells += ["", _mean_cell(mean["published"], ".1f")]
    if as_published:
        cells.append(number(statistics.mean(PUBLISHED_FID.values()), ".1f"))
    lines.append(f"| **mean** | {' | '.join(cells)} |")
    words = (
        f"{rules['dataset']} at {rules['image_size']} pixels, {rules['reference_split']} split: "
        f"{rules['label_distribution']}; features of {rules['extractor']} (sha256 "
        f"{rules['extractor_sha256'][:8]}), {rules['feature_dim']} dimensions; k = {rules['k']}; "
        f"protocol {Protocol(**rules).key()}. {distance} is left out where n is not above 1.5 "
        "times the dimensions; KID has no bias from n. Means: over the n classes that have the "
        "number. KID, held-out cells: real cells that no "
        "model has seen in the place of generated ones. Published protocol "
        f"({Protocol(**record['published_protocol']).key()}): n real cells of all splits, which "
        "are mostly the very cells that the generator was trained on, against n generated ones, "
        "whatever n is. Those distances hold much sampling error; set them beside numbers that "
        "were published under that protocol, and beside no other column."
    )
    return in_words_of(rules["dataset"], "\n".join(lines) + f"\n\n{words}\n")


def trainings_markdown(records: list[dict]) -> str:
    """The same numbers over several trainings of one preset, as a Markdown table.

    records: what `evaluate_per_class` returned, one for each training; mean ± sd (ddof = 1) over
    them, in the last row of each training's mean over the classes. Raises InputError for records of
    different protocols.
    """
    first = records[0]
    rules, distance = first["protocol"], first["distance_name"]
    if any(record[kind] != first[kind] for record in records for kind in PROTOCOLS):
        raise InputError("class tables of different protocols can't share a table")
    titles = ["n real", "KID", distance, "Precision", "Recall", "n, published protocol"]
    titles += [f"{distance}, published protocol"]
    lines = [f"| Class | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for rows in zip(*(record["per_class"] for record in records)):
        values = {name: [row[name] for row in rows] for name in MEANS}
        values["published"] = [row["published"]["frechet_distance"] for row in rows]
        cells = _over_trainings(values, f"{rows[0]['n_real']:,}", f"{rows[0]['published']['n']:,}")
        lines.append(f"| {rows[0]['class']} | {cells} |")
    names = (*MEANS, "published")
    values = {name: [record["mean"][name]["value"] for record in records] for name in names}
    lines.append(f"| **mean** | {_over_trainings(values, '', '')} |")
    n = rules["n_fake"] // len(first["per_class"])
    fewer = first["mean"]["frechet_distance"]["classes"]
    keys = [Protocol(**first[kind]).key() for kind in PROTOCOLS]
    words = (
        f"Mean ± sd over {len(records)} trainings, {n:,} images of each class from each; the mean "
        f"of {distance} is of the {fewer} classes that have it. Protocols {', '.join(keys)}, whose "
        "rules stand below each training's own table."
    )
    return in_words_of(rules["dataset"], "\n".join(lines) + f"\n\n{words}")


def _over_trainings(values: dict, n_real: str, n_published: str) -> str:
    shown = {}
    for name, numbers in values.items():
        found = mean_and_sd(name, numbers)
        mean_format, sd_format = FORMATS[name]
        shown[name] = number(found[f"{name}_mean"], mean_format)
        if found[f"{name}_sd"] is not None:
            shown[name] += f" ± {found[f'{name}_sd']:{sd_format}}"
    means = [shown[name] for name in MEANS]
    return " | ".join([n_real, *means, n_published, shown["published"]])


def _mean_cell(mean: dict, form: str) -> str:
    """The mean, and of how many classes it is one; form: of the value."""
    return "–" if mean["value"] is None else f"{mean['value']:{form}} (n = {mean['classes']})"
