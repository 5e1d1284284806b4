"""Tables from records: means, refusals, files."""

import csv
import dataclasses
import json
import math

import pytest

from custom_models import make_config
from evaluation.protocol import Protocol
from evaluation.tables import (
    COLUMNS,
    collect,
    floor_of,
    metrics_table,
    per_class_markdown,
    per_class_table,
    results_table,
    split_by_budget,
    update_readme,
    write_per_class_table,
    write_table,
)
from utils import InputError

PROTOCOL = Protocol(
    dataset="BloodMNIST",
    dataset_sha256="ab" * 32,
    image_size=28,
    reference_split="train",
    n_real=11959,
    n_fake=5133,
    label_distribution="held-out (validation + test) frequencies",
    extractor="inception-2048",
    extractor_sha256="6726825d" + "0" * 56,
    feature_dim=2048,
).to_dict()


def metrics(frechet: float = 100.0, kid: float = 0.05, **protocol) -> dict:
    return {
        "frechet_distance": frechet,
        "frechet_interval": [frechet - 2, frechet + 2],
        "frechet_infinity": {"value": frechet - 5, "standard_error": 1.0},
        "kid": kid,
        "kid_standard_error": 0.001,
        "precision": 0.75,
        "recall": 0.5,
        "density": 1.25,
        "coverage": 0.625,
        "ceilings": {"mean_image": 300.0, "uniform_noise": 400.0},
        "distance_name": "FID",
        "protocol": PROTOCOL | protocol,
        "warnings": [],
    }


# Falls fast, then no more.
FLAT = [{"epoch": k + 1, "loss": 1 / 4**k, "validation_kid": 2 / 4**k} for k in range(10)]
NO_FRECHET = {"frechet_distance": None, "frechet_interval": None, "frechet_infinity": None}


def record(seed: int, frechet: float = 100.0, model: str = "ddpm", **other) -> dict:
    return {
        "model": model,
        "preset": "best",
        "config": {"epochs": 20},
        "seed": seed,
        "dataset": {"name": "BloodMNIST", "sha256": "ab" * 32},
        "metrics": metrics(frechet, frechet / 1000),
        "budget": "full",
        "images_seen": 1000,
        "seconds": 60.0,
        "device": "cpu",
        "history": FLAT,
    } | other


def test_mean_and_sd_over_seeds():
    (row,) = results_table([record(0, 90.0), record(1, 100.0), record(2, 113.0)])
    assert (row["model"], row["preset"], row["seeds"], row["note"]) == ("ddpm", "best", 3, "")
    assert row["frechet_mean"] == pytest.approx(101)
    assert row["frechet_sd"] == pytest.approx(math.sqrt(133))  # (121 + 1 + 144) / 2
    assert row["kid_mean"] == pytest.approx(0.101)
    assert row["kid_sd"] == pytest.approx(math.sqrt(133) / 1000)
    assert row["protocol"] == Protocol(**PROTOCOL).key()


def test_rows_are_groups_sorted_by_distance_below_the_floor():
    records = [
        record(0, 170.0, "cvae"),
        record(0, 120.0),
        record(1, 124.0),
        record(0, 60.0, preset="baseline"),
    ]
    rows = results_table(records, floor=metrics(18.0, 0.0001))
    assert [(r["model"], r["preset"], r["seeds"]) for r in rows] == [
        ("real images (held out)", "", None),
        ("ddpm", "baseline", 1),
        ("ddpm", "best", 2),
        ("cvae", "best", 1),
    ]
    assert [r["frechet_mean"] for r in rows] == [18, 60, 122, 170]
    assert rows[1]["frechet_sd"] is None
    assert rows[2]["frechet_sd"] == pytest.approx(math.sqrt(8))


@pytest.mark.parametrize("change", [{"n_fake": 5000}, {"dataset_sha256": "cd" * 32}])
def test_two_protocols_are_refused(change):
    other = record(0, model="cvae", metrics=metrics(90.0, 0.04, **change))
    (field,) = change
    with pytest.raises(InputError, match=f"different protocols.*{field}"):
        results_table([record(0), record(1), other])
    with pytest.raises(InputError, match="different protocols"):
        results_table([record(0)], floor=metrics(18.0, 0.0, **change))


def test_a_seed_that_comes_twice_is_refused():
    with pytest.raises(InputError, match=r"seeds \[0, 1, 1\] hold one twice"):
        results_table([record(0), record(1), record(1, 120.0)])


def test_two_versions_of_the_metrics_are_refused(bad_input):
    runs = [record(seed, measured={"metrics_version": 2 + seed}) for seed in range(2)]
    with bad_input("ddpm best seed 0 and ddpm best seed 1", "different versions of the metrics"):
        results_table(runs)
    assert results_table([runs[0], record(1, measured={"metrics_version": 2})])[0]["seeds"] == 2


def test_trainings_by_two_versions_of_the_code_are_refused(bad_input):
    runs = [record(seed, versions={"code": 1 + seed}) for seed in range(2)]
    with bad_input("ddpm best", "different versions of the code (1 and 2)"):
        results_table(runs)
    other = runs[1] | {"model": "cvae"}  # what they share is the measure, not the training
    assert len(results_table([runs[0], other])) == 2


def test_agreement_by_two_classifiers_is_refused(bad_input):
    runs = [record(0), record(1, model="cvae")]
    for run, sha256 in zip(runs, "ab"):
        run["metrics"]["agreement"] = {"agreement": 0.9, "classifier_sha256": sha256}
    with bad_input("different classifiers"):
        results_table(runs)
    floor = metrics() | {"agreement": runs[1]["metrics"]["agreement"]}
    with bad_input("different classifiers"):
        results_table(runs[:1], floor)


def test_two_configurations_under_one_name_are_refused():
    with pytest.raises(InputError, match=r"ddpm best on BloodMNIST.*different configurations"):
        results_table([record(0), record(1, config={"epochs": 10})])


@pytest.mark.parametrize("budget", ["quick", "reduced"])
def test_budgets_are_never_mixed(budget):
    records = [record(0), record(1), record(0, model="cvae", budget=budget)]
    with pytest.raises(InputError, match="cannot share a table"):
        results_table(records)
    parts = split_by_budget(records)
    assert parts["full"] == records[:2]
    assert parts[budget] == records[2:]
    assert sum(map(len, parts.values())) == 3
    for part in parts.values():
        results_table(part)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([100.0, 110.0, 120.0], ""),
        ([100.0, 110.0], "not shown (2 of 3 trainings)"),
        ([140.0, 150.0, 160.0], "not shown (not below half the mean image's distance)"),
        ([139.0, 150.0, 160.0], ""),
    ],
)
def test_reduced_budget(values, note):
    records = [record(seed, value, budget="reduced") for seed, value in enumerate(values)]
    (row,) = results_table(records)
    assert row["note"] == note
    numbers = [row[name] for name in ("frechet_mean", "frechet_sd", "kid_mean", "kid_sd")]
    assert all(x is None for x in numbers) if note else all(x > 0 for x in numbers)
    # A full run is shown whatever its distance.
    (row,) = results_table([r | {"budget": "full"} for r in records])
    assert row["note"] == "" and row["frechet_mean"] == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda k: {"validation_kid": 2.0 - k / 10}, "validation kid not flat"),
        (lambda k: {"loss": 2.0 - k / 10}, "loss not flat"),
        (lambda k: {"validation_kid": None}, "validation kid not flat"),
    ],
)
def test_a_reduced_run_that_still_learns_is_not_shown(change, word):
    group = [record(seed, budget="reduced") for seed in range(3)]
    still = [row | change(k) for k, row in enumerate(FLAT)]
    group[2]["history"] = [
        {name: value for name, value in row.items() if value is not None} for row in still
    ]
    (row,) = results_table(group)
    assert word in row["note"] and row["frechet_mean"] is None


def test_a_steep_beginning_hides_no_slope_at_the_end():
    """Of a KID that falls from 60, 4.1 to 3.6 is little; of itself it is a seventh."""
    group = [record(seed, budget="reduced") for seed in range(3)]
    kids = [60.0, 20.0, 9.0, 7.0, 6.0, 5.0, 4.2, 4.0, 3.7, 3.5]
    rows = [row | {"validation_kid": kid} for row, kid in zip(FLAT, kids, strict=True)]
    for one in group:
        one["history"] = rows
    assert "validation kid not flat" in results_table(group)[0]["note"]
    rows[-2:] = [row | {"validation_kid": 4.0} for row in rows[-2:]]
    assert results_table(group)[0]["note"] == ""


def test_the_loss_of_a_wasserstein_generator_may_drift():
    def note(**logged):
        group = [record(seed, budget="reduced") for seed in range(3)]
        for one in group:
            one["history"] = [
                {name: value for name, value in row.items() if name != "loss"}
                | {"loss_critic": row["loss"], "loss_generator": k / 10}
                | logged
                for k, row in enumerate(FLAT)
            ]
        return results_table(group)[0]["note"]

    assert "loss generator not flat" in note()
    assert note(wasserstein=0.5) == ""


def test_a_reduced_conditional_run_must_be_recognised():
    def runs(*agreements):
        group = [record(seed, budget="reduced") for seed in range(3)]
        for r, agreement in zip(group, agreements, strict=True):
            r["metrics"]["agreement"] = {"agreement": agreement, "classifier_sha256": "0"}
        return group

    (row,) = results_table(runs(0.81, 0.80, 0.79))
    assert row["note"] == "" and row["agreement_mean"] == pytest.approx(0.8)
    (row,) = results_table(runs(0.81, 0.79, 0.79))
    assert "fewer than four in five" in row["note"] and row["agreement_mean"] is None


def test_a_metric_that_one_run_lacks_has_no_mean(tmp_path):
    records = [record(0), record(1)]
    records[0]["metrics"]["copies"] = {"authpct": 60.0, "verdict": "no sign of copies"}
    (row,) = results_table(records)
    assert row["authpct_mean"] is None and row["precision_mean"] == 0.75
    assert row["copies_verdict"] == "no sign of copies (1)"
    records[1]["metrics"]["copies"] = {"authpct": 70.0, "verdict": "no sign of copies"}
    (row,) = rows = results_table(records)
    assert row["authpct_mean"] == 65.0
    assert row["authpct_sd"] == pytest.approx(math.sqrt(50))
    assert row["copies_verdict"] == "no sign of copies"
    write_table(rows, tmp_path, "t")
    assert "| ddpm | best | 2 | 65.0 ± 7.1 | no sign of copies |" in (tmp_path / "t.md").read_text()
    records[1]["metrics"]["copies"]["verdict"] = "copies"
    (row,) = results_table(records)
    assert row["copies_verdict"] == "copies (1), no sign of copies (1)"


def test_other_protocols_of_the_domain_features_are_refused():
    records = [record(0), record(1)]
    for r, n in zip(records, (1712, 1700), strict=True):
        r["metrics"]["domain"] = metrics(3.0, n_fake=n)
    with pytest.raises(InputError, match=r"different protocols.*n_fake"):
        results_table(records)


def test_one_run_beside_floor_and_ceiling():
    run = metrics(120.25, 0.25) | {"mean_colour_error": 1.5, "warnings": ["no FD∞: too few"]}
    run["frechet_infinity"] = None
    text = metrics_table(run | {"floor": metrics(18.0, 0.001)})
    assert "| FID | 120.2 (118.2 to 122.2) | 18.0 (16.0 to 20.0) |" in text
    assert "| KID | 0.25 ± 0.001 | 0.001 ± 0.001 |" in text
    assert "| Recall | 0.500 | 0.500 |" in text
    assert "| FD∞ | – | 13.0 ± 1.0 |" not in text and "no FD∞: too few." in text
    assert "300 for mean image, 400 for uniform noise" in text


def test_a_row_for_each_class_of_a_conditional_model(tmp_path):
    records = [record(0), record(1), record(0, model="cvae")]
    for r, kid in zip(records[:2], (0.5, 1.0), strict=True):
        counts = {"n_real": 900, "n_fake": 300, "precision": 0.5, "recall": None}
        r["metrics"]["per_class"] = [
            {"class": "basophil", "kid": kid, **counts},
            {"class": "platelet", "kid": 2 * kid, **counts},
        ]
        classes = {"basophil": {"n": 5, "agreement": kid}, "platelet": {"n": 0, "agreement": None}}
        r["metrics"]["agreement"] = {"agreement": 0.9, "per_class": classes}
    first, second = rows = per_class_table(records)
    assert (first["model"], first["class"], first["seeds"]) == ("ddpm", "basophil", 2)
    assert (first["kid_mean"], second["kid_mean"]) == (0.75, 1.5)
    assert first["kid_sd"] == pytest.approx(math.sqrt(0.125))
    assert first["recall_mean"] is None
    assert (first["agreement_mean"], second["agreement_mean"]) == (0.75, None)
    write_per_class_table(rows, tmp_path, "t")
    line = "| ddpm | best | basophil | 2 | 900 | 300 | 0.750 ± 0.354 | 0.500 ± 0.000 | – |"
    text = (tmp_path / "t.md").read_text()
    assert line in text
    assert f"protocol {first['protocol']}" in text
    assert first["n_agreement"] == 5
    assert (tmp_path / "t.csv").read_text().count("\n") == 3
    assert per_class_table(records[2:]) == []
    reduced = [r | {"budget": "reduced"} for r in records[:2]]  # two of three seeds
    assert per_class_table(reduced) == []


def test_real_cells_stand_above_the_classes(tmp_path):
    one = {"n_real": 900, "kid": 0.5, "precision": 0.5, "recall": 0.25}
    agreement = {"agreement": 0.9, "per_class": {"basophil": {"n": 5, "agreement": 0.75}}}
    run, floor = record(0), metrics(18.0)
    for found, n_fake in ((run["metrics"], 300), (floor, 365)):
        found["per_class"] = [one | {"class": "basophil", "n_fake": n_fake}]
        found["agreement"] = agreement
    rows = per_class_table([run], floor)
    assert [row["model"] for row in rows] == ["real images (held out)", "ddpm"]
    write_per_class_table(rows, tmp_path, "t")
    text = (tmp_path / "t.md").read_text()
    numbers = "0.500 | 0.500 | 0.250 | 0.750 |"
    assert f"| real images (held out) | – | basophil | – | 900 | 365 | {numbers}" in text
    assert "or the class of a real test cell, among images with the test split's" in text
    alone = per_class_markdown(per_class_table([run]))  # as of images from a folder
    assert "Agreement: how often" in alone and "test" not in alone
    assert "| ddpm | best | basophil | 1 | 900 | 300 | 0.500 |" in text
    with pytest.raises(InputError, match=r"different protocols.*n_fake"):
        per_class_table([run], floor | {"protocol": PROTOCOL | {"n_fake": 5000}})
    assert per_class_table([record(0)], floor) == []


@pytest.mark.parametrize(
    "authpct, ct, words",
    [
        (77.0, -0.5, ""),
        (70.0, -0.5, "AuthPct"),
        (76.6, -0.5, ""),  # three standard errors are 2.5
        (77.0, -4.0, "C_T"),
        (70.0, -4.0, "AuthPct and C_T"),
        (90.0, 5.0, ""),
    ],
)
def test_images_nearer_to_training_cells_than_real_ones_are_told(authpct, ct, words, tmp_path):
    """In the table, and beside the numbers of one training."""
    verdict = {"verdict": "no sign of copies"}
    one, floor = record(0), metrics(18.0)
    one["metrics"]["copies"] = verdict | {"authpct": authpct, "ct": ct}
    floor["copies"] = verdict | {"authpct": 77.4, "ct": -0.8, "n_images": 2567}
    floor["copies"] |= {"authpct_held_out": 80.6, "n_held_out": 2566}
    one["metrics"]["protocol"]["n_fake"] = floor["protocol"]["n_fake"] = 5133
    rows = results_table([one], floor)
    assert [row["nearer_than_real"] for row in rows] == ["", words]
    assert rows[0]["authpct_mean"] == pytest.approx((77.4 + 80.6) / 2, abs=0.001)  # all real cells
    write_table(rows, tmp_path, "t")
    told = f"no sign of copies; nearer than real cells by {words}"
    assert (f"{told} |" in (tmp_path / "t.md").read_text()) == bool(words)
    one["metrics"]["floor"] = floor
    assert (f"{told}." in metrics_table(one["metrics"])) == bool(words)
    del floor["copies"]["ct"]  # as of a user's images, whose floor has no search for copies
    assert (f"{told}." in metrics_table(one["metrics"])) == bool(words)


def test_tables_of_other_images_name_what_they_show(tmp_path):
    one, classes = record(0), {"basophil": {"n": 5, "agreement": 0.75}}
    found = {"class": "basophil", "n_real": 9, "n_fake": 3, "kid": 1, "precision": 1, "recall": 1}
    one["metrics"]["copies"] = {"verdict": "no sign of copies", "authpct": 70.0, "ct": -9.0}
    one["metrics"]["agreement"] = {"agreement": 0.9, "per_class": classes}
    one["metrics"]["agreement"]["classifier_sha256"] = "0"
    one["metrics"]["per_class"] = [found]
    floor = metrics(18.0) | {"copies": {"ct": 0.0, "verdict": "no sign of copies"}}
    one["metrics"]["floor"] = floor
    for dataset, word in {"MNIST": "digit", "CelebA (Smiling)": "face", "PBC": "cell"}.items():
        one["dataset"]["name"] = dataset
        for part in (one["metrics"], floor):
            part["protocol"] = PROTOCOL | {"dataset": dataset}
        write_table(results_table([one], floor), tmp_path, "t")
        write_per_class_table(per_class_table([one]), tmp_path, "classes")
        text = (tmp_path / "t.md").read_text()
        assert f"nearer than real {word}s by C_T" in text and f"of real train {word}s" in text
        each = (tmp_path / "classes.md").read_text()
        assert f"train {word}s of that class" in each
        whole = metrics_table(one["metrics"])
        assert f"training {word}s: no sign of copies; nearer than real {word}s by C_T." in whole
        assert word == "cell" or "cell" not in text + each + whole


def test_the_floor_is_that_of_the_record_that_knows_most():
    old, new = {"kid": 1.0}, {"kid": 1.0, "copies": {}}
    records = [record(seed) for seed in range(3)]
    for one, floor in zip(records, (old, new, old), strict=True):
        one["metrics"]["floor"] = floor
    assert floor_of(records) is new


def test_settings_that_are_not_the_presets_are_told(tmp_path):
    as_stored = {
        name: json.loads(json.dumps(dataclasses.asdict(make_config(name, "best"))))
        for name in ("cvae", "ddpm")
    }
    usual = record(0, config=as_stored["ddpm"] | {"image_size": 64})  # the data decides the size
    other = record(0, model="cvae", config=as_stored["cvae"] | {"lr": 0.5})
    rows = results_table([usual, other])
    words = f"lr 0.5 instead of {as_stored['cvae']['lr']}"
    assert {row["model"]: row["settings"] for row in rows} == {"ddpm": "", "cvae": words}
    write_table(rows, tmp_path, "t")
    text = (tmp_path / "t.md").read_text()
    assert text.count("not run as its preset is") == 1
    assert f"cvae best was not run as its preset is: {words}." in text


def test_how_images_were_stored_is_a_column_where_it_differs(tmp_path):
    old = record(0, 60.0, config={"jpeg_quality": 75})
    ours = record(0, 50.0, model="dcgan", config={"jpeg_quality": 75, "jpeg_chroma": "dct"})
    rows = results_table([old, ours, record(0, 90.0, preset="baseline")], metrics(18.0))
    write_table(rows, tmp_path, "t")
    text = (tmp_path / "t.md").read_text()
    assert "| Seeds | Images seen | Stored as | FID |" in text
    assert "| real images (held out) | – | – | – | – | 18.0 (16.0 to 20.0) |" in text
    assert "| ddpm | best | 1 | 1,000 | JPEG 75, mean | 60.0 (58.0 to 62.0) |" in text
    assert "| dcgan | best | 1 | 1,000 | JPEG 75, dct | 50.0 (48.0 to 52.0) |" in text
    assert "| ddpm | baseline | 1 | 1,000 | as drawn | 90.0 (88.0 to 92.0) |" in text
    assert "so rows that differ here differ for that reason, too." in text


def test_a_share_stands_with_its_interval_within_a_run(tmp_path):
    records = [record(seed) for seed in range(2)]
    for one, share, ends in zip(records, (0.5, 0.6), ([0.4, 0.6], [0.5, 0.7]), strict=True):
        found = {"train_share": share, "train_share_interval": ends}
        one["metrics"]["copies"] = {"pixels": found, "verdict": "no sign of copies"}
    rows = results_table(records)
    assert rows[0]["train_share_pixels_low"] == pytest.approx(0.45)
    assert rows[0]["train_share_low"] is None
    write_table(rows, tmp_path, "t")
    assert "0.550 ± 0.071 (0.45 to 0.65)" in (tmp_path / "t.md").read_text()


def test_trainings_on_two_devices_are_told(tmp_path):
    gpu = record(1, device="NVIDIA H200", precision="bfloat16")
    write_table(results_table([record(0), gpu]), tmp_path, "t")
    text = (tmp_path / "t.md").read_text()
    places = "ddpm best: 1 on NVIDIA H200 in bfloat16, 1 on cpu in float32"
    assert f"compiled alike ({places})." in text
    gpu["compiled"] = "in part"
    write_table(results_table([record(0), gpu]), tmp_path, "t")
    assert "bfloat16, compiled in part, 1 on cpu" in (tmp_path / "t.md").read_text()
    write_table(results_table([record(0), record(1)]), tmp_path, "t")
    assert "same device" not in (tmp_path / "t.md").read_text()


def test_every_column_has_a_name_of_its_own():
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    assert len({column.path for column in COLUMNS}) == len(COLUMNS)


def test_too_few_images_for_a_frechet_distance_leave_kid_alone(tmp_path):
    few = {"n_fake": 400}
    records = [
        record(0, model="cvae", metrics=metrics(50.0, 0.07, **few) | NO_FRECHET),
        record(0, metrics=metrics(90.0, 0.04, **few) | NO_FRECHET),
    ]
    rows = results_table(records, floor=metrics(18.0, 0.0001, **few) | NO_FRECHET)
    assert [r["frechet_mean"] for r in rows] == [None, None, None]
    assert [r["kid_mean"] for r in rows] == [0.0001, 0.04, 0.07]
    write_table(rows, tmp_path, "few")
    text = (tmp_path / "few.md").read_text()
    assert "| ddpm | best | 1 | 1,000 | – | – | 0.04 | 0.750 |" in text
    assert "Fréchet distance at n = 400 in 2048 dimensions is dominated by sampling error." in text


def test_written_files(tmp_path):
    records = [record(0, 1 / 3), record(1, 2 / 3), record(0, 170.0, "cvae")]
    write_table(results_table(records, metrics(18.04, 0.0001)), tmp_path / "new", "table")
    with open(tmp_path / "new" / "table.csv", newline="", encoding="utf-8") as file:
        floor, first, second = csv.DictReader(file)
    assert floor["model"] == "real images (held out)" and floor["seeds"] == ""
    assert float(first["frechet_mean"]) == pytest.approx(0.5, rel=1e-15)
    assert float(first["frechet_sd"]) == pytest.approx(math.sqrt(1 / 18), rel=1e-12)
    assert second["frechet_sd"] == ""
    assert first["extractor_sha256"] == PROTOCOL["extractor_sha256"]
    lines = (tmp_path / "new" / "table.md").read_text(encoding="utf-8").splitlines()
    titles = "FID | FD∞ | KID | Precision | Recall | Density | Coverage"
    assert lines[0] == f"| Model | Preset | Seeds | Images seen | {titles} |"
    four = "0.750 | 0.500 | 1.250 | 0.625"
    four_of_two = "0.750 ± 0.000 | 0.500 ± 0.000 | 1.250 ± 0.000 | 0.625 ± 0.000"
    assert lines[2:5] == [
        f"| real images (held out) | – | – | – | 18.0 (16.0 to 20.0) | 13.0 | 0.0001 | {four} |",
        f"| ddpm | best | 2 | 1,000 | 0.5 ± 0.2 (-1.5 to 2.5) | -4.5 ± 0.2 | 0.0005 ± 0.00024 "
        f"| {four_of_two} |",
        f"| cvae | best | 1 | 1,000 | 170.0 (168.0 to 172.0) | 165.0 | 0.17 | {four} |",
    ]
    assert "5,133 images" in lines[6] and "11,959 of the train split" in lines[6]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["table.csv", "table.md"]


def test_header_names_another_extractor_and_notes_stand_in_the_row(tmp_path):
    other = [record(k, budget="reduced") for k in range(2)]
    for r in other:
        r["metrics"]["distance_name"] = "FD (GoogLeNet-1024)"
    write_table(results_table(other), tmp_path, "t")
    text = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert "FD (GoogLeNet-1024)" in text and "FID" not in text
    note = "not shown (2 of 3 trainings)"
    assert f"| ddpm | best | 2 | 1,000 | {note} | – | – | – | – | – | – |" in text
    assert "100.0" not in text and "0.75" not in text


def test_runs_against_other_held_out_cells_share_no_table(bad_input):
    one, other = record(0), record(1)
    one["dataset"] = one["dataset"] | {"held_out_sha256": "0"}
    results_table([one, other])  # older records do not name them
    other["dataset"] = other["dataset"] | {"held_out_sha256": "1"}
    with bad_input("different held-out cells"):
        results_table([one, other])


def test_a_readme_gets_short_tables_of_full_and_reduced_runs(tmp_path, bad_input):
    readme = tmp_path / "README.md"
    readme.write_text("# A\n\n<!-- results: -->\nold\n<!-- end of results -->\n\nAfter.\n")
    with bad_input(str(tmp_path / "runs"), "no run at full length"):
        update_readme(readme, tmp_path)
    reduced = [record(k, 150.0, "cvae", budget="reduced") for k in range(2)]
    for one in [record(0), record(1, 104.0), *reduced]:
        one["metrics"]["floor"] = metrics(18.0)
        path = tmp_path / "runs" / f"{one['model']}-best" / f"seed{one['seed']}" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(one))
    for _ in range(2):
        update_readme(readme, tmp_path)
        text = readme.read_text()
        assert text.startswith("# A\n\n<!-- results: -->\n\n| Model | Preset | Seeds |")
        assert "| ddpm | best | 2 | 1,000 | 102.0 ± 2.8 (100.0 to 104.0) | 0.750 ± 0.000 |" in text
        assert "which never share a table with full ones:\n\n| Model |" in text
        assert "| cvae | best | 2 | 1,000 | not shown (2 of 3 trainings) |" in text
        assert text.endswith("|\n\n<!-- end of results -->\n\nAfter.\n")
        assert "old" not in text
    readme.write_text("# A\n")
    with bad_input(str(readme), "lacks the marks"):
        update_readme(readme, tmp_path)
    with bad_input("NOTHING.md does not exist"):
        update_readme(tmp_path / "NOTHING.md", tmp_path)


def test_an_empty_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="no records for the table results"):
        write_table(results_table([]), tmp_path, "results")
    assert list(tmp_path.iterdir()) == []


def test_collect_reads_every_record(tmp_path):
    assert collect(tmp_path) == []
    for seed in (1, 0):
        path = tmp_path / "ddpm-best" / f"seed{seed}" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record(seed)))
    assert collect(tmp_path) == [record(0), record(1)]


def damaged(**changes) -> str:
    return json.dumps(record(0) | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no whole record"),
        (json.dumps(record(0))[:200], "no whole record"),
        ("[1, 2]", "lacks model"),
        ("3", "no whole record"),
        (json.dumps({k: v for k, v in record(0).items() if k != "seed"}), "lacks seed"),
        (damaged(metrics={}), "no whole record"),
        (damaged(metrics=metrics(version_of_tomorrow=1)), "no whole record"),
        (damaged(metrics=metrics(float("nan"))), "no finite number"),
        (damaged(metrics=metrics(kid=None)), "no finite number"),
        (damaged(metrics=metrics() | {"recall": float("inf")}), "no finite number"),
        (damaged(metrics=metrics() | {"ceilings": {}}), "no whole record"),
        (damaged(budget="medium"), "unknown budget 'medium'"),
        (damaged(dataset="BloodMNIST"), "no whole record"),
    ],
)
def test_broken_records_are_named(tmp_path, text, words):
    path = tmp_path / "seed3" / "record.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        collect(tmp_path)
    assert str(path) in str(error.value)
