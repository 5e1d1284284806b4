"""Figures of trainings show the records' own numbers."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from evaluation import figures
from utils import BLOOD_CLASSES, ImageSet, make_grid, save_png

NAMES = {"cvae": "CVAE", "dcgan": "DCGAN"}


def record(
    model: str, preset: str, device: str, seconds: float, value: float, kids=(), kid=1.0
) -> dict:
    return {
        "model": model,
        "preset": preset,
        "budget": "full",
        "seed": 0,
        "device": device,
        "threads": 2,
        "seconds": seconds,
        "images_seen": 1000 * seconds,
        "config": {"epochs": len(kids)},
        "history": [{"epoch": i + 1, "validation_kid": kid} for i, kid in enumerate(kids)],
        "metrics": {
            "frechet_distance": value,
            "kid": kid,
            "distance_name": "FD (demo)",
            "floor": {"frechet_distance": 1.0},
        },
    }


def dots(axis) -> dict:
    return {line.get_label(): line for line in axis.lines if line.get_marker() == "o"}


def test_seconds_of_different_machines_share_no_panel():
    records = [
        record("cvae", "baseline", "CPU (X)", 10, 50.0),
        record("cvae", "best", "CPU (X)", 20, 5.0),
        record("dcgan", "best", "GPU", 3, 7.0),
        record("dcgan", "best_64", "GPU", 3.1, 8.0),
    ]
    all_runs, cpu, gpu = figures.quality_and_cost(records, NAMES).axes
    assert len(dots(all_runs)) == 4
    assert set(dots(cpu)) == {"CVAE baseline", "CVAE best"}
    assert set(dots(gpu)) == {"DCGAN best", "DCGAN best_64"}
    assert dots(gpu)["DCGAN best_64"].get_fillstyle() == "full"
    best = dots(cpu)["CVAE best"]
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (20, 5.0)
    assert best.get_fillstyle() == "full"
    assert dots(cpu)["CVAE baseline"].get_fillstyle() == "none"
    assert dots(all_runs)["DCGAN best"].get_xdata()[0] == 3000
    assert "threads: 2" in cpu.get_xlabel() and "threads" not in gpu.get_xlabel()
    assert gpu.get_xlim() == cpu.get_xlim() != all_runs.get_xlim()
    low, high = gpu.get_xlim()
    assert low < 3 and high > 20


def test_small_differences_of_cost_look_small():
    records = [record("dcgan", "best", "GPU", s, 7.0) for s in (3.0, 3.1)]
    _, gpu = figures.quality_and_cost(records, NAMES).axes
    low, high = gpu.get_xlim()
    assert low < 3 < high and high / low == pytest.approx(4)  # not the whole width


def test_the_dot_of_a_validation_curve_is_its_lowest_point():
    records = [
        record("dcgan", "best", "GPU", 12, 7.0, kids=(9.0, 2.0, 4.0)),
        record("cvae", "best", "GPU", 6, 7.0, kids=(3.0, 1.0)),
    ]
    cvae, dcgan = figures.validation_curves(records, NAMES).axes
    line, dot = dcgan.lines
    assert list(line.get_xdata()) == [4000, 8000, 12000]
    assert list(line.get_ydata()) == [9.0, 2.0, 4.0]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (8000, 2.0)
    assert cvae.get_title() == "CVAE best" and not cvae.texts
    records[1]["validated_with"] = {"temperature": 0.5}
    cvae, dcgan = figures.validation_curves(records, NAMES).axes
    assert "temperature 0.5" in cvae.texts[0].get_text() and not dcgan.texts


def test_published_trainings_are_rings_in_the_panels_of_their_model():
    records = [
        record("dcgan", "best", "GPU", 12, 7.0, kids=(9.0, 2.0, 4.0)),
        record("cvae", "best", "GPU", 6, 7.0, kids=(3.0, 1.0)),
    ]
    published = [record("dcgan", "baseline", "GPU", 40, 7.0, kid=kid) for kid in (80.0, 90.0)]
    cvae, dcgan = figures.validation_curves(records, NAMES, published).axes
    rings = dots(dcgan)["baseline, to train"]
    assert rings.get_fillstyle() == "none"
    assert rings.get_xydata().tolist() == [[40_000, 80.0], [40_000, 90.0]]
    assert "baseline, to train" not in dots(cvae)


def test_curves_at_equal_compute_are_those_of_validation_by_their_arithmetic():
    records = [
        record("dcgan", "best", "GPU", 12, 7.0, kids=(9.0, 2.0, 4.0)),
        record("cvae", "best", "GPU", 6, 7.0, kids=(3.0, 1.0)),
        record("cvae", "best", "GPU", 6, 7.0, kids=(4.0, 2.0)),
    ]
    published = [record("dcgan", "baseline", "GPU", 40, 7.0, kid=80.0)]
    flop = {("dcgan", "best"): 2e12, ("cvae", "best"): 1e12, ("dcgan", "baseline"): 5e11}
    (axis,) = figures.equal_compute(records, NAMES, flop, published).axes
    drawn = [(line.get_label(), line.get_xydata().tolist()) for line in axis.lines]
    first, second, third, ring = drawn
    assert first == ("CVAE best", [[3.0, 3.0], [6.0, 1.0]])  # 3,000 and 6,000 images
    assert second[0].startswith("_") and second[1] == [[3.0, 4.0], [6.0, 2.0]]
    assert third == ("DCGAN best", [[8.0, 9.0], [16.0, 2.0], [24.0, 4.0]])
    assert ring == ("DCGAN baseline, to train", [[20.0, 80.0]])
    records[0]["validated_with"] = {"sampling_steps": 16}
    (axis,) = figures.equal_compute(records, NAMES, flop, published).axes
    assert [line.get_label() for line in axis.lines if line.get_label()[0] != "_"] == [
        "CVAE best",
        "DCGAN baseline, to train",
    ]


def test_the_balance_of_a_contest_is_the_margin_or_the_difference_of_probabilities():
    plain, best = (record("dcgan", preset, "GPU", 3, 7.0) for preset in ("baseline", "best"))
    plain["history"] = [
        {"epoch": 1, "D(x)": 0.75, "D(G(z)) before": 0.25, "D(G(z)) after": 0.0},
        {"epoch": 2, "D(x)": 0.5, "D(G(z)) before": 0.5, "D(G(z)) after": 0.5},
    ]
    best["history"] = [{"epoch": 1, "margin": 3.0}, {"epoch": 2, "margin": 0.25}]
    first, second = figures.balance([best, plain], NAMES).axes
    assert [axis.get_ylabel() for axis in (first, second)] == ["D(x) − D(G(z))", "margin"]
    assert first.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0]]
    assert second.lines[0].get_xydata().tolist() == [[1, 3], [2, 0.25]]
    assert first.get_ylim() == second.get_ylim() == (-0.1, 1)


def test_a_comparison_has_rows_of_classes_where_images_were_drawn_for_one():
    images = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 28, 28) * 10
    labels = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1, 1])
    parts = {"real": images, "other": images, "asked": images}
    figure = figures.comparison_by_class(parts, {"real": labels, "asked": labels}, ("a", "b"))
    assert [axis.get_title() for axis in figure.axes] == ["real", "asked", "other\nno classes"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b"]

    def tiles(axis) -> list[list[int]]:
        return axis.images[0].get_array()[14 * 4 :: 29 * 4, 14 * 4 :: 29 * 4, 0].tolist()

    asked, other = (tiles(axis) for axis in figure.axes[1:])
    assert asked == [[10, 255, 255, 255], [0, 20, 30, 40]]
    assert other == [[0, 10, 20, 30], [40, 50, 60, 70]]


def test_sampling_quality_draws_samplers_guidance_and_jpeg_apart():
    own = {"sampler": "heun", "sampling_steps": 3, "guidance_scale": 1.0, "evaluations": 5}
    own |= {"jpeg_quality": 0, "jpeg_chroma": "dct"}
    rows = [
        {**own, "kid": 4.0, "kid_standard_error": 0.5},
        {**own, "sampling_steps": 5, "evaluations": 9, "kid": 3.0, "kid_standard_error": 0.5},
        {**own, "sampler": "ddim", "evaluations": 3, "kid": 9.0, "kid_standard_error": 0.5},
        {**own, "guidance_scale": 2.0, "evaluations": 10, "kid": 6.0, "kid_standard_error": 0.5},
        {**own, "jpeg_quality": 75, "kid": 8.0, "kid_standard_error": 0.5},
    ]
    left, right, stored = figures.sampling_quality(rows).axes
    lines = {
        container.get_label(): container.lines[0].get_xydata().tolist()
        for container in left.containers
    }
    assert lines == {"ddim": [[3, 9]], "heun": [[5, 4], [9, 3]]}
    assert right.containers[0].lines[0].get_xydata().tolist() == [[1, 4], [2, 6]]
    assert left.lines[-1].get_xydata().tolist() == [[5, 4]]  # the ring
    assert stored.containers[0].lines[0].get_ydata().tolist() == [8, 4]
    stored.figure.draw_without_rendering()
    assert [t.get_text() for t in stored.get_xticklabels()] == ["JPEG,\ndct", "as\ndrawn"]


def test_sampling_quality_of_the_cvae_draws_temperature_and_steps_apart():
    own = {"temperature": 0.5, "prior_steps": 24, "evaluations": 25, "kid_standard_error": 0.5}
    rows = [
        {**own, "kid": 4.0},
        {**own, "temperature": 1.0, "kid": 6.0},
        {**own, "prior_steps": 6, "evaluations": 7, "kid": 9.0},
    ]
    left, right = figures.sampling_quality(rows).axes
    assert left.containers[0].lines[0].get_xydata().tolist() == [[0.5, 4], [1, 6]]
    assert right.containers[0].lines[0].get_xydata().tolist() == [[7, 9], [25, 4]]
    assert left.lines[-1].get_xydata().tolist() == [[0.5, 4]]  # the ring
    assert right.lines[-1].get_xydata().tolist() == [[25, 4]]
    left.figure.draw_without_rendering()


def test_a_class_with_few_images_keeps_its_own_row():
    labels = torch.tensor([1, 0, 1] + [2] * 9)
    images = (labels * 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 28, 28)
    real = ImageSet("cells", "test", images, labels, ("a", "b", "c"))
    shown = figures.real_and_generated(real, images, True, "model").axes[1].images[0].get_array()
    tiles = shown[14 * 4 :: 30 * 4, 14 * 4 :: 30 * 4, 0]  # the middle of each
    assert tiles.shape == (3, 8)
    assert tiles[0].tolist() == [0] + [255] * 7
    assert tiles[1].tolist() == [10, 10] + [255] * 6
    assert tiles[2].tolist() == [20] * 8


@pytest.mark.parametrize(
    ("size", "least", "most"), [(28, 60, 70), (33, 125, 140), (64, 120, 135), (128, 120, 135)]
)
def test_larger_images_are_shown_in_more_dots(size, least, most, tmp_path):
    black = torch.zeros(28, 3, size, size, dtype=torch.uint8)
    figures.save(figures.comparison({"a": black}), tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    dark = (picture[int(0.9 * len(picture))] < 128).sum()  # through the last row
    assert least <= dark / 4 <= most
    real = ImageSet("a", "test", black[:16], torch.arange(2).repeat(8), ("a", "b"))
    figures.save(figures.class_examples(real), tmp_path / "b.png")
    picture = np.asarray(Image.open(tmp_path / "b.png").convert("L"))
    dark = (picture < 128).sum(1).max() / 8  # two blocks of four
    assert least <= dark <= 1.2 * most


# ---------------------------------------------------------------------------------------------
# Grids of the same noise, as training goes on
# ---------------------------------------------------------------------------------------------


def grids(folder: Path, size: int, classes: int, percents=(25, 50, 75, 100)) -> torch.Tensor:
    """Write the grids of a training; returns their images, uint8 [grids, classes, 8, 3, S, S]."""
    shape = (len(percents), classes, 8, 3, size, size)
    noise = torch.Generator().manual_seed(size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=noise)
    for percent, part in zip(percents, images):
        save_png(make_grid(part.flatten(0, 1), columns=8, zoom=2), folder / f"{percent:03d}.png")
    return images


@pytest.mark.parametrize("size", [8, 28, 64])
def test_progress_grids_show_the_pixels_of_four_columns_unshrunk(tmp_path, size):
    images = grids(tmp_path, size, classes=3)
    with matplotlib.rc_context({"figure.dpi": 80}):  # as in the notebooks
        figure = figures.progress_grids(tmp_path, ("a", "b", "c"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3]
    assert figure.get_figwidth() == pytest.approx(11)
    zoom = {8: 6, 28: 2, 64: 1}[size]
    for axis, part in zip(figure.axes, images, strict=True):
        expected = make_grid(part[:, :4].flatten(0, 1), columns=4, zoom=zoom)
        expected = expected[zoom:-zoom, zoom:-zoom]  # without the white around all
        height, width = expected.shape[:2]
        box = axis.get_window_extent()
        # A panel may begin within a pixel of the figure.
        corners = [
            (int(len(picture) - box.y1) + zoom + down, int(box.x0) + zoom + right)
            for down in (0, 1)
            for right in (0, 1)
        ]
        assert any(
            np.array_equal(picture[top : top + height, left : left + width], expected)
            for top, left in corners
        )


def test_progress_grids_name_rows_on_the_left_and_the_share_of_the_training(tmp_path):
    grids(tmp_path, 8, classes=2, percents=(50, 100))
    first, second = figures.progress_grids(tmp_path, ("red cell", "b")).axes
    assert [axis.get_title() for axis in (first, second)] == [
        "50 % of the training",
        "100 % of the training",
    ]
    assert [label.get_text() for label in first.get_yticklabels()] == ["red\ncell", "b"]
    # The middles of the rows, whose images lie at pixels 1 to 8 and 10 to 17.
    assert first.get_yticks().tolist() == [4.5, 13.5]
    assert not second.get_yticklabels()
    assert not figures.progress_grids(tmp_path).axes[0].get_yticklabels()


def test_progress_grids_of_kept_runs_are_read():
    folder = Path(__file__).parents[1] / "results" / "runs" / "cvae-best" / "seed0" / "progress"
    first = figures.progress_grids(folder, BLOOD_CLASSES).axes[0]
    shown = first.images[0].get_array()
    kept = np.asarray(Image.open(folder / "025.png"))[::2, ::2]
    assert np.array_equal(shown, kept[:, : 4 * 29 + 1])
    middles = 28 / 2 + 0.5 + 29 * np.arange(8)
    assert first.get_yticks().tolist() == middles.tolist()


def test_a_folder_without_grids_is_told(tmp_path, bad_input):
    with bad_input("holds no grid", "train anew"):
        figures.progress_grids(tmp_path)


def test_losses_of_another_size_have_a_panel_of_their_own():
    logged = {"loss": 900.0, "reconstruction": 700.0, "kl": 200.0, "prior_loss": 0.9}
    figure = figures.loss_curves([{"epoch": 1, **logged}, {"epoch": 2, **logged}])
    panels = [[line.get_label() for line in axis.get_lines()] for axis in figure.axes]
    assert panels == [["loss", "reconstruction"], ["kl"], ["prior loss"]]


def test_the_classes_of_neighbours_stand_beside_them():
    images = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    nearest = images[:, None].expand(-1, 3, -1, -1, -1)
    labels = torch.tensor([[1, 0, 1], [2, 2, 2]])
    classes = ("basophil", "immature granulocyte", "platelet")
    names = ["immature\ngranulocyte", "platelet"]
    for asked, expected in ((torch.tensor([1, 2]), names), (None, [])):
        first, second = figures.neighbours(images, nearest, classes, labels, asked).axes
        assert [text.get_text() for text in first.texts] == expected
        words = [text.get_text() for text in second.texts]
        assert words == ["immature granulocyte: 2\nbasophil: 1", "platelet: 3"]
