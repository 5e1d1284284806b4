"""Figures in one style: functions of arrays that return a matplotlib figure."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image

from evaluation.copies import Suspects
from utils import ImageSet, InputError, in_words_of, make_grid, write_atomically

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "legend.frameon": False,
    "savefig.dpi": 150,
}
PER_CLASS = 8
IN_ALL = 64
TILE = 0.45  # inches, of one image in a grid
# An image of more than SMALL pixels hides its detail in a tile of fewer than CLEAR dots.
SMALL, CLEAR = 32, 110


def log_scale(axis, which: str, formatter="{x:,.9g}") -> None:
    """Make "x" or "y" of an axis logarithmic, with marks at 1, 2 and 5 times powers of ten.

    More of them where what was drawn before spans less than a factor of five, or of two and a half.
    """
    getattr(axis, f"set_{which}scale")("log")
    scale = getattr(axis, f"{which}axis")
    low, high = scale.get_view_interval()
    subs = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    if high > 2.5 * low:
        subs = (1, 2, 5) if high > 5 * low else (1, 1.5, 2, 3, 4, 6)
    scale.set_major_locator(LogLocator(subs=subs))
    scale.set_major_formatter(formatter)
    scale.set_minor_locator(NullLocator())


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as a PNG, whole or not at all; equal figures give equal bytes.

    In the usual resolution, or in the figure's own, if that is finer.
    """

    def write(partial: Path) -> None:
        dpi = max(matplotlib.rcParams["savefig.dpi"], figure.dpi)
        metadata = {"Software": None}
        figure.savefig(partial, format="png", dpi=dpi, bbox_inches="tight", metadata=metadata)

    with matplotlib.rc_context(STYLE):
        write_atomically(path, write)


def _dpi(images: torch.Tensor) -> float | None:
    """Dots an inch that show each pixel of larger images, [N, C, S, S]; None: the usual ones."""
    size = images.shape[-1]
    if size <= SMALL:
        return None
    zoom = math.ceil(CLEAR / size)
    return zoom * (size + 1) / TILE  # with the line between two images


def real_and_generated(real: ImageSet, fakes: torch.Tensor, by_class: bool, title: str) -> Figure:
    """Real cells on the left, generated ones on the right, a row a class if `by_class`.

    fakes: uint8 [N, C, S, S], drawn for the labels of `real` in their order. The first ones are
    shown, not chosen ones.
    """
    if by_class:
        labels, classes = real.labels[: len(fakes)], len(real.classes)
        return _side_by_side(
            [
                _rows_of_classes(real.images, labels, classes),
                _rows_of_classes(fakes, labels, classes),
            ],
            [f"real ({real.name})", f"generated ({title})"],
            [name.replace(" ", "\n") for name in real.classes],
        )
    return _side_by_side(
        [real.images[:IN_ALL], fakes[:IN_ALL]], [f"real ({real.name})", f"generated ({title})"], []
    )


def _rows_of_classes(
    images: torch.Tensor, labels: torch.Tensor, classes: int, columns: int = PER_CLASS
) -> torch.Tensor:
    """The first images of each class in turn; white ones where a class has fewer."""
    shape = (classes, columns, *images.shape[1:])
    rows = torch.full(shape, 255, dtype=torch.uint8)
    for label in range(classes):
        found = torch.nonzero(labels == label).flatten()[:columns]
        rows[label, : len(found)] = images[found]
    return rows.flatten(0, 1)


def neighbours(
    images: torch.Tensor,
    nearest: torch.Tensor,
    classes: Sequence[str],
    labels: torch.Tensor,
    asked: torch.Tensor | None = None,
) -> Figure:
    """Generated images in the first column, the k nearest training images beside each.

    images: uint8 [N, C, S, S]; nearest: uint8 [N, k, C, S, S], of the classes `labels`, int64
    [N, k]; asked: int64 [N], the classes that were asked for, named before each row.
    """
    return _side_by_side(
        [images, nearest.flatten(0, 1)],
        ["generated", "nearest training images"],
        [] if asked is None else [classes[label].replace(" ", "\n") for label in asked],
        columns=[1, nearest.shape[1]],
        words=[
            "\n".join(f"{classes[k]}: {n}" for k, n in Counter(row).most_common())
            for row in labels.tolist()
        ],
    )


def _side_by_side(
    parts: list[torch.Tensor],
    titles: list[str],
    row_names: Sequence[str],
    columns: list[int] | None = None,
    title_size: int = 8,
    words: Sequence[str] = (),
) -> Figure:
    """Blocks of images; row_names stand before the rows, and words behind them."""
    columns = columns or [PER_CLASS] * len(parts)
    rows = -(-len(parts[0]) // columns[0])
    lines = 1 + max(title.count("\n") for title in titles)
    above = 0.15 + 1.3 * lines * title_size / 72  # inches
    with matplotlib.rc_context(STYLE):
        behind = 1.4 if words else 0  # inches
        size = TILE * sum(columns) + 1.2 + behind, TILE * rows + above
        figure = Figure(figsize=size, dpi=_dpi(parts[0]))
        axes = figure.subplots(1, len(parts), width_ratios=columns, squeeze=False)[0]
        for axis, images, title, width in zip(axes, parts, titles, columns, strict=True):
            axis.imshow(make_grid(images, columns=width, zoom=4), interpolation="nearest")
            axis.set_title(title, fontsize=title_size)
            axis.axis("off")
        pixels = make_grid(parts[0][:1], columns=1, zoom=4).shape[0] - 4
        style = {"va": "center", "fontsize": 7, "linespacing": 1.1}
        for row, name in enumerate(row_names):
            axes[0].text(-12, (row + 0.5) * pixels, name, ha="right", **style)
        for row, text in enumerate(words):
            width = columns[-1] * pixels
            axes[-1].text(width + 12, (row + 0.5) * pixels, text, ha="left", **style)
        top = 1 - above / figure.get_figheight()
        left = 0.08 if row_names else 0.01
        if words:  # a small figure, whose margins are inches
            left = 0.9 / figure.get_figwidth() if row_names else 0.01
        right = 0.99 - behind / figure.get_figwidth()
        figure.subplots_adjust(wspace=0.06, left=left, right=right, top=top, bottom=0.01)
    return figure


def class_examples(data: ImageSet) -> Figure:
    """The first images of each class."""
    rows = -(-len(data.classes) // 4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.3 * rows), dpi=_dpi(data.images), layout="constrained")
        axes = figure.subplots(rows, 4, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for label, (name, axis) in enumerate(zip(data.classes, axes)):
            images = data.images[data.labels == label][:PER_CLASS]
            axis.imshow(make_grid(images, columns=4), interpolation="nearest")
            axis.set_title(name, fontsize=9)
    return figure


def progress_grids(folder: str | Path, classes: Sequence[str] = ()) -> Figure:
    """The grids that a training left in its progress folder side by side, four columns of each.

    classes: names of the rows, of a model that is told the class. Raises InputError where there is
    no grid.
    """
    paths = sorted(Path(folder).glob("*.png"))
    if not paths:
        raise InputError(f"{folder} holds no grid of a training; train anew in another folder")
    # Eight columns of square images, lines of one pixel around each, and all enlarged twofold.
    grids = [np.asarray(Image.open(path))[::2, ::2] for path in paths]
    height, width = grids[0].shape[0], grids[0].shape[1] // 2 + 1
    left, panel, gap, above = 1.1 if classes else 0, 2.4, 0.1, 0.25  # inches
    size = left + len(paths) * (panel + gap) - gap, panel * height / width + above
    with matplotlib.rc_context(STYLE):
        # A whole number of the figure's pixels for each one of an image, lest some be wider.
        zoom = math.ceil(matplotlib.rcParams["figure.dpi"] * panel / width)
        figure = Figure(figsize=size, dpi=zoom * width / panel)
        for number, (path, grid) in enumerate(zip(paths, grids)):
            place = left + number * (panel + gap), 0, panel, size[1] - above
            axis = figure.add_axes(np.divide(place, (*size, *size)))
            axis.imshow(grid[:, :width], interpolation="nearest")
            axis.set_title(f"{int(path.stem)} % of the training", fontsize=9)
            axis.set(frame_on=False, xticks=[], yticks=[])
        middles = [(row + 0.5) * (width // 4) for row in range(len(classes))]
        names = [name.replace(" ", "\n") for name in classes]
        figure.axes[0].set_yticks(middles, names, fontsize=9)
        figure.axes[0].tick_params("y", length=0)
    return figure


def loss_curves(history: list[dict]) -> Figure:
    """What was logged, by epoch: one panel for each kind of quantity."""
    epochs = [row["epoch"] for row in history]
    names = list(dict.fromkeys(name for row in history for name in row))
    names.remove("epoch")
    groups = [[name for name in names if _kind(name) == kind] for kind in range(5)]
    groups = [group for group in groups if group]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(groups), 2.6), layout="constrained")
        for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
            for name in group:
                points = [(row["epoch"], row[name]) for row in history if name in row]
                marker = "o" if len(points) == 1 else None
                label = name.replace("_", " ").replace("kid", "KID")
                axis.plot(*zip(*points), label=label, linewidth=1.2, marker=marker)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlim(min(epochs), max(max(epochs), min(epochs) + 1))
            axis.legend(fontsize=7)
            if group == ["validation_kid"]:
                log_scale(axis, "y")
    return figure


def _kind(name: str) -> int:
    """Losses, discriminator outputs, the rest, the CVAE's prior, whose loss is a thousandth of the
    others', and the kernel distance don't share an axis."""
    if name == "validation_kid":
        return 4
    if name == "prior_loss":
        return 3
    return 0 if "loss" in name or name == "reconstruction" else 1 if name.startswith("D(") else 2


def comparison(
    parts: dict[str, torch.Tensor],
    rows: int = 7,
    columns: int = 4,
    row_names: Sequence[str] = (),
) -> Figure:
    """Blocks of the first images, one for each name, side by side. parts: uint8 [N, C, S, S]."""
    blocks = [images[: rows * columns] for images in parts.values()]
    # Many blocks become small on a page.
    return _side_by_side(blocks, list(parts), row_names, [columns] * len(blocks), title_size=11)


def comparison_by_class(
    parts: dict[str, torch.Tensor], labels: dict[str, torch.Tensor], classes: Sequence[str]
) -> Figure:
    """The same with a row for each class.

    labels: int64 [N] of those of the parts, among them the first, whose images were drawn for a
    class. The others, which the rows say nothing about, come last and are called "no classes".
    """
    rows, columns = len(classes), 4
    parts = dict(sorted(parts.items(), key=lambda part: part[0] not in labels))
    blocks = [
        _rows_of_classes(images, labels[name][: len(images)], rows, columns)
        if name in labels
        else images[: rows * columns]
        for name, images in parts.items()
    ]
    return _side_by_side(
        blocks,
        [name if name in labels else f"{name}\nno classes" for name in parts],
        [name.replace(" ", "\n") for name in classes],
        [columns] * len(blocks),
        title_size=11,
    )


def frechet_infinity_fit(result: dict) -> Figure:
    """Fréchet distances of ever smaller subsets over 1 / n, and their line to infinitely many.

    result: what `frechet_infinity.frechet_infinity` returned.
    """
    inverse = [1 / n for n in result["n_fake"]]
    value, error = result["value"], result["standard_error"]
    # A least-squares line runs through the centre of its points.
    centre = [sum(values) / len(values) for values in (inverse, result["distances"])]
    slope = (centre[1] - value) / centre[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.6), layout="constrained")
        axis = figure.subplots()
        axis.plot([0, max(inverse)], [value, value + slope * max(inverse)], linewidth=1.2)
        axis.plot(inverse, result["distances"], "o", color=COLOURS[0], label="subsets")
        axis.errorbar(
            0,
            value,
            error,
            fmt="s",
            color=COLOURS[1],
            capsize=3,
            label=f"FD∞ = {value:.4g} ± {error:.2g}",
        )
        axis.set_xlabel("1 / number of generated images")
        axis.set_ylabel("Fréchet distance")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axis.legend(fontsize=7)
    return figure


# ---------------------------------------------------------------------------------------------
# What mistakes do to a distance: records of evaluation/mistakes.py
# ---------------------------------------------------------------------------------------------

PLAIN = StrMethodFormatter("{x:,.0f}")  # 1,000, not 10³


def mistake_bars(record: dict, examples: dict[str, torch.Tensor] | None = None) -> Figure:
    """A bar for each row, the floor ± 2 sd of draws as a line and a band, a few cells beside.

    record: with rows, floor and floor_sd; examples: uint8 [k, 3, S, S] for each row's name. Where
    the values span more than a factor of ten the axis is logarithmic and has no zero for a bar to
    begin at: a line from the floor to a dot takes its place, its length the ratio to the floor.
    """
    rows, floor, spread = record["rows"], record["floor"], 2 * record["floor_sd"]
    shown = len(next(iter(examples.values()))) if examples else 0
    values = [row["value"] for row in rows]
    cell, bars, below = 0.42, 3.6, 0.55  # inches: a row, the bars' width, room for the axis
    width, height = bars + shown * cell, below + len(rows) * cell
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        low, rest = below / height, 1 - below / height
        axis = figure.add_axes((shown * cell / width, low, bars / width, rest))
        places = range(len(rows))
        axis.axvspan(floor - spread, floor + spread, color="black", alpha=0.12, linewidth=0)
        axis.axvline(floor, color="black", linewidth=1, linestyle="--")
        if max(values) > 10 * floor:
            axis.hlines(places, floor, values, color=COLOURS[0], linewidth=2)
            axis.plot(values, places, "o", color=COLOURS[0])
            log_scale(axis, "x")
            axis.set_xlim(floor / 2, max(values) * 2.2)
        else:
            axis.barh(places, values, height=0.55, color=COLOURS[0])
            axis.set_xlim(0, max(values) * 1.2)
        for place, value in enumerate(values):
            axis.annotate(
                f"{value:,.1f}", (value, place), (6, 0), textcoords="offset points", va="center"
            )
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.tick_params("y", length=0, pad=4 + 72 * shown * cell)
        axis.set_xlabel(
            f"{record['distance_name']}, n = {record['n_fake']:,}; dashed: floor {floor:.1f}"
        )
        for place, row in enumerate(rows if examples else []):
            corner = (0, (below + (len(rows) - 1 - place) * cell) / height)
            strip = figure.add_axes((*corner, shown * cell / width, cell / height))
            grid = make_grid(examples[row["name"]], columns=shown, zoom=4)
            strip.imshow(grid, interpolation="nearest")
            strip.axis("off")
    return figure


def sample_size(record: dict) -> Figure:
    """Real cells against real cells at growing n: the Fréchet distance shrinks, KID stays at 0.

    record: of `mistakes.sample_size`.
    """
    rows, fit, enough = record["rows"], record["fit"], record["enough"]
    sizes = np.array([row["n"] for row in rows])
    few, many = sizes.min() / 1.5, sizes.max() * 1.5
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axis, name, spread in ((left, "value", "sd"), (right, "kid", "kid_sd")):
            means, errors = ([row[key] for row in rows] for key in (name, spread))
            axis.errorbar(sizes, means, errors, fmt="o", markersize=4, capsize=2, zorder=3)
            axis.axvspan(few, enough, color="black", alpha=0.1, linewidth=0)
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(PLAIN)
            axis.set_xlim(few, many)
            axis.set_xlabel("n, number of real cells taken")
        line = fit["intercept"] + fit["slope"] / sizes
        left.plot(sizes, line, "--", color=COLOURS[1], linewidth=1.2)
        left.annotate(
            "a + b / n, fitted\nright of the grey",
            (sizes[1], line[1]),
            (10, 4),
            textcoords="offset points",
            color=COLOURS[1],
            fontsize=8,
            va="center",
        )
        left.text(few * 1.15, min(row["value"] for row in rows), "n < 1.5 dimensions", fontsize=8)
        left.set_yscale("log")
        left.yaxis.set_major_formatter(PLAIN)
        left.set_ylabel(record["distance_name"])
        right.axhline(0, color="black", linewidth=1, linestyle="--")
        right.set_ylabel(f"KID, mean ± sd of {record['draws']} draws")
    return figure


def reference_split(record: dict) -> Figure:
    """Distances to each split: at the splits' full size on the left, at equal n on the right.

    record: of `mistakes.reference_split`.
    """
    splits = list(record["n_real"])
    titles = ("every cell of the split", f"{record['n_equal']:,} cells of each split")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3), layout="constrained")
        for axis, equal, title in zip(figure.subplots(1, 2, sharey=True), (False, True), titles):
            for number, subject in enumerate(record["n_fake"]):
                rows = [
                    row
                    for row in record["rows"]
                    if (row["subject"], row["equal_n"]) == (subject, equal)
                ]
                values = [row["value"] for row in rows]
                axis.plot(values, "os"[number], label=subject, color=COLOURS[number])
                for place, value in enumerate(values):
                    axis.annotate(
                        f"{value:,.1f}",
                        (place, value),
                        (0, 7),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                    )
            axis.set_xticks(
                range(len(splits)),
                [f"{split}\n{row['n_real']:,}" for split, row in zip(splits, rows)],
            )
            axis.set_xlim(-0.5, len(splits) - 0.5)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(PLAIN)
            axis.margins(y=0.15)
            axis.set_title(title, fontsize=9)
        figure.axes[0].set_ylabel(record["distance_name"])
        figure.axes[1].legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.8))
    return figure


def evaluations_and_trainings(record: dict) -> Figure:
    """Each evaluation of one training, and each training, as a dot; a bar is their mean ± sd.

    record: of `mistakes.evaluations_as_runs`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3), layout="constrained")
        axis = figure.subplots()
        for place, (kind, spread) in enumerate(record["spreads"].items()):
            values = [row["value"] for row in record["rows"] if row["kind"] == kind]
            places = [place - 0.12 + 0.04 * number for number in range(len(values))]
            axis.plot(places, values, "o", color=COLOURS[place], markersize=5)
            axis.errorbar(place + 0.2, spread["mean"], spread["sd"], fmt="_k", capsize=4)
            axis.annotate(
                f"sd {spread['sd']:.1f}",
                (place + 0.2, spread["mean"]),
                (8, 0),
                textcoords="offset points",
                va="center",
            )
        counts = [sum(row["kind"] == kind for row in record["rows"]) for kind in record["spreads"]]
        names = [f"{count} {kind}" for count, kind in zip(counts, record["spreads"])]
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.4, len(names) - 0.3)
        axis.margins(y=0.2)
        axis.set_ylabel(f"{record['distance_name']}, n = {record['n_fake']:,}")
        axis.set_title(f"floor at this n: {record['floor']:.1f}", fontsize=9)
    return figure


# ---------------------------------------------------------------------------------------------
# Copies of training images
# ---------------------------------------------------------------------------------------------


def suspicious_pairs(suspects: Suspects) -> Figure:
    """Each suspicious image beside the nearest training cell and the nearest held-out one.

    Under each, how far the two cells are, in root mean squared difference (0 … 255), and the ratio.
    """
    rows = -(-len(suspects.rows) // 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.05 * rows + 0.4), layout="constrained")
        figure.suptitle("each: generated – nearest training image – nearest held-out one", size=9)
        axes = figure.subplots(rows, 3, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for place, axis in zip(range(len(suspects.rows)), axes):
            parts = (suspects.images, suspects.train, suspects.held_out)
            triple = torch.stack([part[place] for part in parts])
            axis.imshow(make_grid(triple, columns=3, zoom=4), interpolation="nearest")
            near, far = suspects.train_distances[place], suspects.held_out_distances[place]
            words = f"{near:.1f} / {far:.1f}" + (f" = {near / far:.2f}" if far else "")
            axis.text(0.5, -0.03, words, transform=axis.transAxes, ha="center", va="top", size=7)
    return figure


# ---------------------------------------------------------------------------------------------
# Ablations: rows of tables.ablation_table
# ---------------------------------------------------------------------------------------------


def ablations(rows: list[dict]) -> Figure:
    """A panel for each model: each change's distance minus the unchanged preset's, seed by seed.

    rows: of `tables.ablation_table`. A dot is a training, a stroke the mean of a row; one without a
    difference has neither, and models of which no change was measured have no panel where others
    have. Each panel has an axis of its own, with the unchanged preset at zero.
    """
    changes = [row for row in rows if row["settings"] != "{}"]
    measured = {row["model"] for row in changes if row["difference_mean"] is not None}
    groups: dict[str, list[dict]] = {}
    for row in changes:
        if row["model"] in measured or not measured:
            groups.setdefault(row["model"], []).append(row)
    heights = [len(group) for group in groups.values()]
    with matplotlib.rc_context(STYLE):
        size = (6, 0.24 * sum(heights) + 0.9 * len(groups) + 0.2)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(groups), 1, height_ratios=heights, squeeze=False).flatten()
        for axis, (model, group) in zip(axes, groups.items()):
            axis.axvline(0, color="black", linewidth=1, linestyle="--", zorder=0)
            for place, row in enumerate(group):
                dots = list(json.loads(row["differences"]).values())
                axis.plot(dots, [place] * len(dots), "o", color=COLOURS[0], markersize=4, alpha=0.7)
                if dots:
                    axis.plot(row["difference_mean"], place, "|", color="black", markersize=10)
            names = [
                row["ablation"] + (" (not measured)" if row["frechet_mean"] is None else "")
                for row in group
            ]
            axis.set_ylim(len(group) - 0.5, -0.5)
            axis.set_yticks(range(len(group)), names)
            axis.tick_params("y", length=0)
            axis.set_title(f"{model} {group[0]['preset']}", fontsize=9, loc="left")
            axis.xaxis.set_major_formatter(PLAIN)
            axis.set_xlabel(f"change of {group[0]['distance_name']}; dashed: as the preset is")
            if all(row["difference_mean"] is None for row in group):
                axis.set_xticks([])
    return figure


# ---------------------------------------------------------------------------------------------
# Trainings: the records of runs under one protocol
# ---------------------------------------------------------------------------------------------


def quality_and_cost(records: list[dict], names: dict[str, str]) -> Figure:
    """Fréchet distance against images seen, and against seconds of training: a dot a training.

    names: titles of the models. Filled marks are `best` presets; squares and triangles are small
    stand-ins. Seconds can be compared on one kind of device only: each gets a panel, of one width,
    and its threads are named.
    """
    machines = {}
    for record in records:
        machine = record["device"]
        if "CPU" in machine:
            machine += f",\nthreads: {record['threads']}"
        machines.setdefault(machine, []).append(record)
    panels = [("images seen in training", "images_seen", records)]
    panels += [(f"seconds on\n{machine}", "seconds", own) for machine, own in machines.items()]
    first = records[0]["metrics"]
    with matplotlib.rc_context(STYLE):
        rows = 1 if len(panels) < 4 else 2
        columns = -(-len(panels) // rows)
        figure = Figure(figsize=(3.6 * columns, 3 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, (title, cost, own) in zip(axes, panels):
            runs = sorted({(r["model"], r["preset"]) for r in own}, key=str)
            for model, preset in runs:
                group = [r for r in own if (r["model"], r["preset"]) == (model, preset)]
                colour = COLOURS[list(names).index(model)]
                axis.plot(
                    [r[cost] for r in group],
                    [r["metrics"]["frechet_distance"] for r in group],
                    {"best_small": "s", "small": "^"}.get(preset, "o"),
                    color=colour,
                    fillstyle="full" if preset.startswith("best") else "none",
                    label=_run_title(group[0], names),
                )
            axis.axhline(first["floor"]["frechet_distance"], color="black", lw=1, ls="--")
            axis.set_xscale("log")
            values = [r[cost] for r in records]  # one width for all panels of seconds
            low, high = min(values), max(values)
            middle, reach = math.sqrt(low * high), max(2, 1.2 * math.sqrt(high / low))
            axis.set_xlim(middle / reach, middle * reach)  # small differences look small
            for which in ("x", "y"):
                log_scale(axis, which)
            axis.tick_params("x", labelsize=7)
            axis.set_xlabel(title)
        for axis in axes[::columns]:
            axis.set_ylabel(f"{first['distance_name']}; dashed: floor")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def _run_title(record: dict, names: dict[str, str]) -> str:
    """Model and preset, and the budget where that makes them another thing."""
    budget = "" if record["budget"] == "full" else f", {record['budget']}"
    return f"{names[record['model']]} {record['preset']}{budget}"


def validation_curves(
    records: list[dict], names: dict[str, str], published: Sequence[dict] = ()
) -> Figure:
    """KID on the validation split as training goes on: a line a training, a dot where it was kept.

    records: of trainings that were validated. names: titles of the models. published: records of
    trainings that were not, each a ring in its model's panels: the KID of its end, which is
    to the train split. Without copies both splits are as far away, since KID has no bias. A panel
    tells by which settings its images were drawn, where the record's metrics are of other ones.
    """
    runs = sorted({(r["model"], r["preset"]) for r in records}, key=str)
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(runs))
        rows = -(-len(runs) // columns)
        figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axis in axes[len(runs) :]:
            axis.remove()
        for axis, (model, preset) in zip(axes, runs):
            group = [r for r in records if (r["model"], r["preset"]) == (model, preset)]
            for record in group:
                seen, values = validation_kids(record)
                (line,) = axis.plot(seen, values, label=f"seed {record['seed']}")
                best = values.index(min(values))
                axis.plot(seen[best], values[best], "o", color=line.get_color())
            ends = [r for r in published if r["model"] == model]
            if ends:
                seen = [r["images_seen"] for r in ends]
                values = [r["metrics"]["kid"] for r in ends]
                style = {"color": "grey", "fillstyle": "none"}
                axis.plot(seen, values, "o", label=f"{ends[0]['preset']}, to train", **style)
            axis.set_title(_run_title(group[0], names))
            other = [f"{name} {x}" for name, x in group[0].get("validated_with", {}).items()]
            if other:
                text = "\n".join(["images drawn with", *other])
                axis.text(0.97, 0.03, text, transform=axis.transAxes, ha="right", fontsize=7)
            axis.set_xlabel("thousand images seen")
            log_scale(axis, "x", lambda x, _: f"{x / 1000:,.0f}")
            log_scale(axis, "y")
            axis.tick_params("both", labelbottom=True, labelleft=True, labelsize=8)
            axis.legend(fontsize=7)
        for axis in axes[: len(runs) : columns]:
            axis.set_ylabel("KID to the validation split")
    return figure


def equal_compute(
    records: list[dict],
    names: dict[str, str],
    flop: dict[tuple[str, str], float],
    published: Sequence[dict] = (),
) -> Figure:
    """KID on the validation split against the arithmetic of training so far: a line a training.

    records, names, published: as of `validation_curves`; those that were validated with other
    settings than they draw with are left out, since their KID is of other images. flop: floating
    point operations of a step of training by model and preset, for each image. What lies on one
    vertical line cost the same.
    """
    records = [record for record in records if not record.get("validated_with")]
    runs = sorted({(r["model"], r["preset"]) for r in records}, key=str)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axis = figure.subplots()
        for run in runs:
            group = [r for r in records if (r["model"], r["preset"]) == run]
            colour = COLOURS[list(names).index(run[0])]
            for k, record in enumerate(group):
                seen, values = validation_kids(record)
                axis.plot(
                    [x * flop[run] / 1e15 for x in seen],
                    values,
                    "-" if run[1].startswith("best") else ":",
                    color=colour,
                    marker=".",
                    linewidth=1,
                    label=_run_title(record, names) if k == 0 else None,
                )
        for run in sorted({(r["model"], r["preset"]) for r in published}, key=str):
            group = [r for r in published if (r["model"], r["preset"]) == run]
            axis.plot(
                [r["images_seen"] * flop[run] / 1e15 for r in group],
                [r["metrics"]["kid"] for r in group],
                "o",
                color=COLOURS[list(names).index(run[0])],
                fillstyle="none",
                label=f"{_run_title(group[0], names)}, to train",
            )
        for which in ("x", "y"):
            log_scale(axis, which)
        axis.set_xlabel("arithmetic of training so far, PFLOP")
        axis.set_ylabel("KID to the validation split")
        figure.legend(loc="outside right center", fontsize=8)
    return figure


def balance(records: list[dict], names: dict[str, str]) -> Figure:
    """How far apart a discriminator holds real and generated images, by epoch: a line a training.

    records: of trainings that log D(x) and D(G(z)), as probabilities, or the margin between the
    two, in a panel for each model and preset. At zero it can't tell them apart. What is above one
    is cut off.
    """
    runs = sorted({(r["model"], r["preset"]) for r in records}, key=str)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(runs), 2.7), layout="constrained")
        axes = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
        for axis, run in zip(axes, runs):
            group = [r for r in records if (r["model"], r["preset"]) == run]
            for record in group:
                rows = record["history"]
                axis.plot(
                    [row["epoch"] for row in rows],
                    [
                        row["margin"] if "margin" in row else row["D(x)"] - row["D(G(z)) before"]
                        for row in rows
                    ],
                    label=f"seed {record['seed']}",
                )
            axis.axhline(0, color="black", lw=1, ls="--")
            axis.set_ylim(-0.1, 1)
            axis.set_title(_run_title(group[0], names))
            axis.set_xlabel("epoch")
            margin = "margin" in group[0]["history"][0]
            axis.set_ylabel("margin" if margin else "D(x) − D(G(z))")
            axis.tick_params("y", labelleft=True)
            axis.legend(fontsize=7)
    return figure


def validation_kids(record: dict) -> tuple[list[float], list[float]]:
    """Images seen and KID at each validation of a training."""
    rows = [row for row in record["history"] if "validation_kid" in row]
    of_an_epoch = record["images_seen"] / record["config"]["epochs"]
    return [row["epoch"] * of_an_epoch for row in rows], [row["validation_kid"] for row in rows]


def sampling_quality(rows: list[dict]) -> Figure:
    """KID under other settings of the sampler, of the same weights from the same noise.

    Of diffusion, against evaluations of the network, a line a sampler, against the guidance scale,
    and with images as drawn or stored as JPEG; of the CVAE, against temperature and evaluations.
    rows: of `GenerativePipeline.measure_sampling`, the preset's own settings first. Bars: ± one
    standard error. The ring is the preset's own setting.
    """
    own = rows[0]
    settings = {*own} - {"evaluations", "kid", "kid_standard_error"}

    def varied(*names: str) -> list[dict]:
        """The rows that differ from the preset's own in nothing but these settings."""
        return [row for row in rows if all(row[name] == own[name] for name in settings - {*names})]

    panels = _panels_of_the_cvae if "temperature" in own else _panels_of_diffusion
    with matplotlib.rc_context(STYLE):
        return panels(own, varied)


def _panels_of_the_cvae(own: dict, varied: Callable[..., list[dict]]) -> Figure:
    figure = Figure(figsize=(7.0, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _with_errors(left, varied("temperature"), "temperature", None)
    _with_errors(right, varied("prior_steps"), "evaluations", None)
    _ring(left, own, "temperature")
    _ring(right, own, "evaluations")
    left.set_ylabel("KID against the validation split")
    left.set_xlabel("temperature; 0: means, 1: as trained")
    _evaluations(right)
    return figure


def _panels_of_diffusion(own: dict, varied: Callable[..., list[dict]]) -> Figure:
    figure = Figure(figsize=(8.0, 2.8), layout="constrained")
    left, right, stored = figure.subplots(1, 3, sharey=True, width_ratios=(4, 3, 2))
    steps = varied("sampler", "sampling_steps")
    for sampler in sorted({row["sampler"] for row in steps}):
        line = [row for row in steps if row["sampler"] == sampler]
        _with_errors(left, line, "evaluations", sampler)
    _with_errors(right, varied("guidance_scale"), "guidance_scale", None)
    files = [row | {"file": _file_format(row)} for row in varied("jpeg_quality", "jpeg_chroma")]
    _with_errors(stored, files, "file", None, fmt="o")
    _ring(left, own, "evaluations")
    _ring(right, own, "guidance_scale")
    _ring(stored, files[0], "file")
    left.set_ylabel("KID against the validation split")
    left.legend(fontsize=7)
    _evaluations(left)
    right.set_xlabel("guidance scale; 1: none")
    stored.set_xlabel("images stored")
    stored.margins(x=0.3)
    return figure


def _ring(axis, own: dict, name: str) -> None:
    axis.plot(own[name], own["kid"], "o", ms=11, color="black", fillstyle="none")
    log_scale(axis, "y")


def _evaluations(axis) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(PLAIN)
    axis.set_xlabel("evaluations of the network for one image")


def _file_format(row: dict) -> str:
    return f"JPEG,\n{row['jpeg_chroma']}" if row["jpeg_quality"] else "as\ndrawn"


def _with_errors(axis, rows: list[dict], name: str, label: str | None, fmt: str = "o-") -> None:
    rows = sorted({row[name]: row for row in rows}.values(), key=lambda row: row[name])
    axis.errorbar(
        [row[name] for row in rows],
        [row["kid"] for row in rows],
        yerr=[row["kid_standard_error"] for row in rows],
        fmt=fmt,
        ms=4,
        capsize=2,
        label=label,
    )


def real_and_generated_by_class(
    record: dict, real: ImageSet, images: torch.Tensor, labels: torch.Tensor
) -> Figure:
    """Real cells beside generated ones, a row a class, with the class's distances at its side.

    Each class with the number of its real cells and the kernel distance that held-out ones get.
    record: of `per_class.evaluate_per_class`; real: held-out cells; images: uint8
    [N, C, S, S], drawn for labels [N]. The first ones of each class are shown, not chosen ones.
    """
    rows, names = record["per_class"], []
    for row in rows:
        lines = [f"{row['class']}, {row['n_real']:,} real"]
        if row["kid"] is not None:
            lines.append(f"KID {row['kid']:.3g}")
        if row["kid"] is not None and row["floor"]["kid"] is not None:
            lines[-1] += f", of real ones {row['floor']['kid']:.2g}"
        if row["frechet_distance"] is not None:
            lines.append(f"{record['distance_name']} {row['frechet_distance']:.1f}")
        names.append("\n".join(lines))
    parts = [
        _rows_of_classes(images, labels, len(rows))
        for images, labels in ((real.images, real.labels), (images, labels))
    ]
    generated = f"generated, n = {rows[0]['n_fake']:,} of each class"
    return _side_by_side(parts, [f"real ({real.name})", generated], names)


# ---------------------------------------------------------------------------------------------
# The augmentation study: records and rows of evaluation/augmentation.py
# ---------------------------------------------------------------------------------------------


def augmentation_differences(rows: list[dict]) -> Figure:
    """Difference in balanced accuracy to `real`, a dot with its 95 % interval for each arm.

    rows: of `augmentation.compare`; a panel for each classifier, with the primary comparison, which
    has another reference, at its top.
    """

    def name(row: dict) -> str:
        primary = row["comparison"] == "primary"
        return f"{row['arm']}\nagainst {row['against']}" if primary else row["arm"]

    rows = [row for row in rows if row["difference"] is not None]
    classifiers = list(dict.fromkeys(row["classifier"] for row in rows))
    names = list(dict.fromkeys(name(row) for row in rows))
    with matplotlib.rc_context(STYLE):
        size = (2.7 * len(classifiers) + 1.9, 0.28 * len(names) + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        shape = 1, max(len(classifiers), 1)
        axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).flatten()
        for axis, classifier in zip(axes, classifiers):
            axis.axvline(0, color="black", linewidth=1, linestyle="--", zorder=0)
            for row in (row for row in rows if row["classifier"] == classifier):
                place = names.index(name(row))
                colour = COLOURS[1] if row["comparison"] == "primary" else COLOURS[0]
                if row["low"] is not None:
                    axis.plot([row["low"], row["high"]], [place, place], color=colour)
                axis.plot(row["difference"], place, "o", color=colour)
            axis.set_title(classifier, fontsize=9, loc="left")
            axis.tick_params("y", length=0)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        words = "difference in balanced accuracy [95 %]\nto real cells alone, or to what is named"
        figure.supxlabel(words, size=9)
    return figure


def recalls(rows: list[dict]) -> Figure:
    """Recall of each class on real cells, a colour for what the classifier was trained on.

    rows: of `train_on_generated.compare`, real cells first (a black line). Bars: ± sd over seeds.
    """
    names = [name for name in rows[0] if name.startswith("recall ") and name.endswith("_mean")]
    kinds = [name.removeprefix("recall ").removesuffix("_mean") for name in names]
    places = np.arange(len(kinds))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.8 * len(kinds) + 1.5, 3.4), layout="constrained")
        axis = figure.subplots()
        for number, row in enumerate(rows):
            means = [row[name] for name in names]
            if number == 0:
                label = in_words_of(row["dataset"], row["model"])
                axis.hlines(means, places - 0.35, places + 0.35, "black", label=label)
                continue
            offset = 0.5 * (number / len(rows) - 0.5)
            sds = [row[f"recall {kind}_sd"] or 0 for kind in kinds]
            label, colour = f"{row['model']} {row['preset']}", COLOURS[(number - 1) % len(COLOURS)]
            label += ", reduced" if row["budget"] == "reduced" else ""
            axis.errorbar(places + offset, means, sds, fmt="o", color=colour, label=label)
        axis.set_xticks(places, kinds, rotation=35, ha="right", rotation_mode="anchor")
        axis.set_ylim(0, 1.03)
        axis.set_ylabel(in_words_of(rows[0]["dataset"], "recall on real test cells"))
        figure.legend(title="trained on", loc="outside right upper", fontsize=8)
    return figure


def augmentation_amounts(rows: list[dict], classifier: str, kinds: list[str]) -> Figure:
    """Scores of one classifier against the generated images added to each class, ± sd as a band.

    rows: of `augmentation.compare` for the study of imbalance. kinds: classes whose recalls are
    shown, too. Dashed: the arms that add no generated image.
    """
    rows = [r for r in rows if r["classifier"] == classifier and r["comparison"] != "primary"]
    amounts = {0: next(row for row in rows if row["arm"] == "real")}
    for row in rows:
        words = row["arm"].split()
        if words[0] == "real+GAN" and words[-1].isdecimal():
            amounts[int(words[-1])] = row
    others = [row for row in rows if row["n_generated"] == 0 and row["arm"] != "real"]
    scores = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
    scores |= {f"recall {kind}": f"recall of {kind}" for kind in kinds}
    places = range(len(amounts))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.5 * len(scores), 3.2), layout="constrained")
        axes = figure.subplots(1, len(scores), squeeze=False).flatten()
        for axis, (score, title) in zip(axes, scores.items()):
            means = np.array([amounts[n][f"{score}_mean"] for n in sorted(amounts)])
            sds = np.array([amounts[n][f"{score}_sd"] or 0 for n in sorted(amounts)])
            axis.plot(places, means, "o-", color="black", label="real + generated")
            axis.fill_between(places, means - sds, means + sds, color="black", alpha=0.15, lw=0)
            for row, colour in zip(others, COLOURS):
                axis.axhline(row[f"{score}_mean"], color=colour, ls="--", lw=1, label=row["arm"])
            axis.set_xticks(places, [f"{n:,}" for n in sorted(amounts)], rotation=45)
            axis.set_xlabel("generated images added\nto each class (not to scale)")
            axis.set_title(title, fontsize=9)
        axes[0].set_ylabel(f"{classifier}, mean ± sd")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def augmentation_confusion(records: list[dict], classifier: str) -> Figure:
    """A confusion matrix for each arm of one classifier, summed over its records.

    records: of evaluation/augmentation.py. Rows are true classes and sum to 1; shares below 0.005
    are left empty.
    """
    arms: dict[str, list[np.ndarray]] = {}
    for record in records:
        if record["identity"]["classifier"] == classifier:
            matrix = np.array(record["scores"]["confusion"])
            arms.setdefault(record["identity"]["arm"]["name"], []).append(matrix)
    kinds = list(records[0]["n"])
    columns = min(len(arms), 4 if len(arms) <= 8 else 5)
    lines = -(-len(arms) // columns)
    side = 0.3 * len(kinds) + 1.1
    with matplotlib.rc_context(STYLE):
        size = (side * columns + 0.9, side * lines + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        for place, (axis, (arm, matrices)) in enumerate(zip(axes, arms.items())):
            total = sum(matrices)
            shares = total / np.maximum(total.sum(1, keepdims=True), 1)
            axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    colour = "white" if share > 0.6 else "black"
                    words = f"{share:.2f}".removeprefix("0")
                    axis.text(
                        column, row, words, ha="center", va="center", color=colour, fontsize=6
                    )
            lowest, first = place + columns >= len(arms), place % columns == 0
            axis.set_xticks(
                range(len(kinds)), kinds if lowest else [""] * len(kinds), rotation=90, fontsize=7
            )
            axis.set_yticks(range(len(kinds)), kinds if first else [""] * len(kinds), fontsize=7)
            axis.set_title(arm, fontsize=8)
        for axis in axes[len(arms) :]:
            axis.axis("off")
        figure.supylabel("true class", size=8)
        runs = max(len(matrices) for matrices in arms.values())
        figure.supxlabel(f"named class; {classifier}, folds × seeds: {runs}", size=8)
    return figure


def augmentation_learning_curves(records: list[dict], classifier: str) -> Figure:
    """Loss and accuracy on the training images of each arm of one classifier, mean over records."""
    arms: dict[str, list[list[dict]]] = {}
    for record in records:
        if record["identity"]["classifier"] == classifier:
            arms.setdefault(record["identity"]["arm"]["name"], []).append(record["history"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3), layout="constrained")
        axes = figure.subplots(1, 2)
        for place, (arm, histories) in enumerate(arms.items()):
            updates = [row["update"] for row in histories[0]]
            style = ("-", "--", ":", "-.")[place // len(COLOURS) % 4]
            for axis, name in zip(axes, ("loss", "accuracy")):
                means = np.mean([[row[name] for row in history] for history in histories], axis=0)
                axis.plot(updates, means, style, label=arm, color=COLOURS[place % len(COLOURS)])
        for axis, name in zip(axes, ("loss", "accuracy")):
            axis.set_title(f"{name} on the training images", fontsize=9)
            axis.set_xlabel(f"updates of {classifier}")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure
