"""Figures of trainings show the records' own numbers."""

import torch

from evaluation import figures
from utils import ImageSet

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
        record("dcgan", "best_64", "GPU", 3, 8.0),
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
    assert cvae.get_title() == "CVAE best"


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


def test_sampling_quality_draws_a_line_a_sampler_and_one_for_guidance():
    own = {"sampler": "heun", "sampling_steps": 3, "guidance_scale": 1.0, "evaluations": 5}
    rows = [
        {**own, "kid": 4.0, "kid_standard_error": 0.5},
        {**own, "sampling_steps": 5, "evaluations": 9, "kid": 3.0, "kid_standard_error": 0.5},
        {**own, "sampler": "ddim", "evaluations": 3, "kid": 9.0, "kid_standard_error": 0.5},
        {**own, "guidance_scale": 2.0, "evaluations": 10, "kid": 6.0, "kid_standard_error": 0.5},
    ]
    left, right = figures.sampling_quality(rows).axes
    lines = {
        container.get_label(): container.lines[0].get_xydata().tolist()
        for container in left.containers
    }
    assert lines == {"ddim": [[3, 9]], "heun": [[5, 4], [9, 3]]}
    assert right.containers[0].lines[0].get_xydata().tolist() == [[1, 4], [2, 6]]
    assert left.lines[-1].get_xydata().tolist() == [[5, 4]]  # the ring


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
