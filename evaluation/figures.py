"""Figures in one style: functions of arrays that return a matplotlib figure."""

from pathlib import Path

import matplotlib
import matplotlib.image
import torch
from matplotlib.figure import Figure

from utils import ImageSet, make_grid, write_atomically

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


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as a PNG, whole or not at all; equal figures give equal bytes."""

    def write(partial: Path) -> None:
        figure.savefig(partial, format="png", bbox_inches="tight", metadata={"Software": None})

    with matplotlib.rc_context(STYLE):
        write_atomically(path, write)


def real_and_generated(real: ImageSet, fakes: torch.Tensor, by_class: bool, title: str) -> Figure:
    """Real cells on the left, generated ones on the right, a row a class if `by_class`.

    fakes: uint8 [N, C, S, S], drawn for the labels of `real` in their order. The first ones are
    shown, not chosen ones.
    """
    if by_class:
        rows = [
            torch.nonzero(real.labels == label).flatten()[:PER_CLASS]
            for label in range(len(real.classes))
        ]
        return _side_by_side(
            [torch.cat([real.images[r] for r in rows]), torch.cat([fakes[r] for r in rows])],
            [f"real ({real.name})", f"generated ({title})"],
            [name.replace(" ", "\n") for name in real.classes],
        )
    return _side_by_side(
        [real.images[:IN_ALL], fakes[:IN_ALL]], [f"real ({real.name})", f"generated ({title})"], []
    )


def neighbours(images: torch.Tensor, nearest: torch.Tensor) -> Figure:
    """Generated images in the first column, the k nearest training images beside each.

    images: uint8 [N, C, S, S]; nearest: uint8 [N, k, C, S, S].
    """
    return _side_by_side(
        [images, nearest.flatten(0, 1)],
        ["generated", "nearest training cells"],
        [],
        columns=[1, nearest.shape[1]],
    )


def _side_by_side(
    parts: list[torch.Tensor], titles: list[str], row_names: list[str], columns=None
) -> Figure:
    columns = columns or [PER_CLASS] * len(parts)
    rows = -(-len(parts[0]) // columns[0])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.45 * sum(columns) + 1.2, 0.45 * rows + 0.5))
        axes = figure.subplots(1, len(parts), width_ratios=columns, squeeze=False)[0]
        for axis, images, title, width in zip(axes, parts, titles, columns, strict=True):
            axis.imshow(make_grid(images, columns=width, zoom=4), interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.axis("off")
        pixels = make_grid(parts[0][:1], columns=1, zoom=4).shape[0] - 4
        for row, name in enumerate(row_names):
            axes[0].text(
                -12,
                (row + 0.5) * pixels,
                name,
                ha="right",
                va="center",
                fontsize=7,
                linespacing=0.9,
            )
        figure.subplots_adjust(wspace=0.06, left=0.08, right=0.99, top=0.93, bottom=0.01)
    return figure


def class_examples(data: ImageSet) -> Figure:
    """The first images of each class."""
    rows = -(-len(data.classes) // 4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.3 * rows), layout="constrained")
        axes = figure.subplots(rows, 4, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for label, (name, axis) in enumerate(zip(data.classes, axes)):
            images = data.images[data.labels == label][:PER_CLASS]
            axis.imshow(make_grid(images, columns=4), interpolation="nearest")
            axis.set_title(name, fontsize=9)
    return figure


def progress_grids(folder: str | Path) -> Figure:
    """The grids that a training left in its progress folder, side by side."""
    paths = sorted(Path(folder).glob("*.png"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(paths), 2.9), layout="constrained")
        for path, axis in zip(paths, figure.subplots(1, len(paths), squeeze=False)[0]):
            axis.imshow(matplotlib.image.imread(path))
            axis.set_title(f"{int(path.stem)} % of the training", fontsize=9)
            axis.axis("off")
    return figure


def loss_curves(history: list[dict]) -> Figure:
    """What was logged, by epoch: one panel for each kind of quantity."""
    epochs = [row["epoch"] for row in history]
    names = [name for name in history[0] if name != "epoch"]
    names += [name for name in history[-1] if name not in (*names, "epoch")]
    groups = [[name for name in names if _kind(name) == kind] for kind in range(3)]
    groups = [group for group in groups if group]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(groups), 2.6), layout="constrained")
        for axis, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
            for name in group:
                points = [(row["epoch"], row[name]) for row in history if name in row]
                marker = "o" if len(points) == 1 else None
                label = name.replace("_", " ")
                axis.plot(*zip(*points), label=label, linewidth=1.2, marker=marker)
            axis.set_xlabel("epoch")
            axis.set_xlim(min(epochs), max(max(epochs), min(epochs) + 1))
            axis.legend(fontsize=7)
    return figure


def _kind(name: str) -> int:
    """Losses, discriminator outputs, and the rest don't share an axis."""
    return 0 if "loss" in name or name == "reconstruction" else 1 if name.startswith("D(") else 2


def comparison(parts: dict[str, torch.Tensor], rows: int = 6, columns: int = 6) -> Figure:
    """One block of images for each name, side by side. parts: uint8 [N, C, S, S] each."""
    blocks = list(parts.values())
    return _side_by_side(
        [images[: rows * columns] for images in blocks],
        list(parts),
        [],
        columns=[columns] * len(blocks),
    )
