"""What stands in results/ and in the README comes from the records, and from nothing else."""

import argparse
import csv
import hashlib
import json
import math
import re
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import benchmark
import nbformat
import numpy as np
import pytest
import torch

import run_suite
from custom_models import make_config
from custom_models.ablations import GRIDS
from custom_models.arithmetic import flop_of_training
from custom_models.config import stored_settings
from evaluation import (
    augmentation,
    features,
    figures,
    significance,
    tables,
    train_on_generated,
)
from evaluation.reference import SHIPPED, load_reference
from generative_pipeline import SETS, GenerativePipeline, run_folder
from utils import ImageSet, load_dataset, to_model_range, to_uint8

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
STEMS = {"full": "results", "reduced": "results_reduced"}
# BloodMNIST at 28 pixels, and the folders of other data sets, such as mnist28.
PAGES = [RESULTS, *sorted(path.parent for path in RESULTS.glob("*[0-9]/README.md"))]
RECORDS = {page: tables.collect(page / "runs") for page in PAGES}
FOLDERS = sorted(path.parent for page in PAGES for path in (page / "runs").rglob("record.json"))


def name_of(path: Path) -> str:
    return str(path.relative_to(RESULTS.parent))


of_each_table = pytest.mark.parametrize(
    ("page", "budget"), [(page, budget) for page in PAGES for budget in STEMS]
)


def test_there_are_records():
    assert all(RECORDS.values())


@of_each_table
def test_tables_are_those_of_the_records(page, budget, tmp_path):
    records = tables.split_by_budget(RECORDS[page])[budget]
    written = page / f"{STEMS[budget]}.csv"
    if not records:
        assert not written.exists()
        return
    rows = tables.results_table(records, tables.floor_of(records))
    tables.write_table(rows, tmp_path, STEMS[budget])
    for ending in ("csv", "md"):
        name = f"{STEMS[budget]}.{ending}"
        assert (page / name).read_text() == (tmp_path / name).read_text()


@of_each_table
def test_tables_of_classes_are_those_of_the_records(page, budget, tmp_path):
    records = tables.split_by_budget(RECORDS[page])[budget]
    rows = tables.per_class_table(records, tables.floor_of(records)) if records else []
    kept, name = page / f"{STEMS[budget]}_per_class.md", f"{STEMS[budget]}_per_class"
    assert kept.exists() == bool(rows)
    if rows:
        tables.write_per_class_table(rows, tmp_path, name)
        for ending in (".csv", ".md"):
            assert kept.with_suffix(ending).read_text() == (tmp_path / (name + ending)).read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_quick_run_is_kept(page):
    assert not tables.split_by_budget(RECORDS[page])["quick"]


def test_readme_shows_the_tables(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    tables.update_readme(copy, RESULTS)
    assert copy.read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_every_run_has_its_pictures(folder):
    for name in ("samples.png", "losses.png", "samples.npz"):
        assert (folder / name).stat().st_size > 0
    assert len(list((folder / "progress").glob("*.png"))) == 4


NOTEBOOKS = [
    path
    for path in sorted(RESULTS.rglob("*.ipynb"))
    if RESULTS / "demo" not in path.parents and path.name != "failed.ipynb"
]


RUNS = [
    pytest.param(page, r, id=f"{page.name} {r['model']} {r['preset']} seed {r['seed']}")
    for page in PAGES
    for r in RECORDS[page]
]
OF_DATA = {"n_classes", "image_channels", "image_size"}  # what the data decides of a config


@pytest.mark.parametrize("page, record", RUNS)
def test_a_preset_s_name_stands_for_its_settings(page, record):
    own = make_config(record["model"], record["preset"])
    preset = json.loads(json.dumps(asdict(own)))
    free = OF_DATA | ({"jpeg_quality"} if page != RESULTS else set())
    config = stored_settings(record["config"], own)
    changed = {name for name, value in config.items() if preset[name] != value}
    assert config.keys() == preset.keys() and changed <= free


@pytest.mark.parametrize("page, record", RUNS)
def test_kept_weights_are_those_that_were_measured(page, record):
    folder = run_folder(page, record["model"], record["preset"], record["seed"])
    if (folder / "weights.pt").exists():  # those of large runs are not in git
        kept = torch.load(folder / "weights.pt", weights_only=True)
        assert kept["training"].items() <= record.items()
        assert kept["history"] == record["history"]
    for name in ("per_class.json", "sampling.json"):
        if (folder / name).exists() and "weights_key" in record:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            assert found["weights_key"] == record["weights_key"]


def test_shipped_references_are_those_of_the_records():
    """They judge on machines without the data, where nothing else could tell."""
    known = json.loads(features.DOMAIN_FILE.with_suffix(".json").read_text(encoding="utf-8"))
    for record in RECORDS[RESULTS]:
        floor, cells = record["metrics"]["floor"], record["dataset"]["sha256"]
        for name, found in (("googlenet-1024", floor), ("domain", floor["domain"])):
            reference = load_reference(SHIPPED / f"bloodmnist-28-{name}.npz")
            assert reference.extractor_sha256 == found["protocol"]["extractor_sha256"]
            distance = reference.floors[-1]["frechet_distance"]
            assert distance == pytest.approx(found["frechet_distance"], rel=1e-6)
            assert reference.dataset_sha256 == cells
        assert cells in [part["sha256"] for part in known["train"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_kept_notebooks_are_whole_and_hold_no_paths_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    state = notebook.metadata["papermill"]
    assert state["exception"] is None and state["end_time"]  # none yet while it is executed
    for name in ("input_path", "output_path"):
        assert not Path(state[name]).is_absolute()
    assert not re.search(r"/(work|home|root|Users)/|/tmp/ipykernel", path.read_text())


def words_of_the_pages() -> str:
    pages = (ROOT / "README.md", RESULTS / "findings.md")
    return " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in pages)


NUMBERS = dict(enumerate(["no", "one", "two", "three", "four", "five", "six"]))
ORDINALS = {4: "fourth", 5: "fifth", 11: "eleventh"}


def first_blind_epoch(history: list[dict]) -> int:
    """From which on D rates real and generated images alike, to two hundredths."""
    apart = [row["epoch"] for row in history if abs(row["D(x)"] - row["D(G(z)) before"]) > 0.02]
    return max(apart) + 1


def test_the_readmes_words_have_the_numbers_of_the_records():
    words = words_of_the_pages()
    rows = json.loads((RESULTS / "numbers" / "resize.json").read_text())["rows"]
    value = {row["name"]: f"{row['value']:,.0f}" for row in rows}
    without, stored = value["bilinear, antialiased, no JPEG"], value["bilinear, antialiased"]
    floor = json.loads((RESULTS / "numbers" / "resize.json").read_text())["floor"]
    assert f"lack that JPEG lie at {without} from the reference, and at {stored} with it" in words
    assert f"Real cells without JPEG lie at {without} (n = 2,000), so these networks" in words
    assert "(n = 2,000), as they do as they are stored" in words and f"{floor:.0f}" == stored
    pillow = value["bilinear, antialiased, Pillow's JPEG"]
    assert f"with Pillow's, of the same quality, they lie at {pillow}." in words
    dcgan = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("dcgan", "best")]
    *most, last = (f"{r['metrics']['frechet_distance']:.0f}" for r in dcgan)
    sentence = f"the DCGAN's {NUMBERS[len(dcgan)]} as `best` lie at {', '.join(most)} and {last},"
    assert sentence.replace("the", "The", 1) in words
    rows = json.loads((RESULTS / "numbers" / "typicality.json").read_text())["rows"]
    half, usual, _ = [(round(row["authpct"]), f"{row['ct']:.0f}") for row in rows]
    sentence = "(AuthPct {} and C_T {} instead of a random half's {} and {};"
    assert sentence.format(*usual, *half).replace("-", "−") in words
    runs = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("dcgan", "baseline")]
    distances = [r["metrics"]["frechet_distance"] for r in runs]
    domain = [r["metrics"]["domain"]["frechet_distance"] for r in runs]
    assert f"they lie between {min(distances):,.0f} and {max(distances):,.0f}, on those" in words
    assert f"of blood cells between {min(domain):.0f} and {max(domain):.0f}, and the" in words
    assert distances.index(min(distances)) == domain.index(max(domain)) == 1
    blind = [first_blind_epoch(r["history"]) for r in runs]
    assert f"In all {NUMBERS[len(runs)]} trainings of the DCGAN's `baseline` its" in words
    epochs = f"from the {ORDINALS[min(blind)]} to the {ORDINALS[max(blind)]} epoch on"
    assert f"{epochs} ([" in words and f"in all five its discriminator, {epochs}, rates" in words
    for model in ("cvae", "dcgan"):
        of = Counter(r["preset"] for r in RECORDS[RESULTS] if r["model"] == model)
        name, n, best = f"the {model.upper()}'s `baseline` over", of["baseline"], of["best"]
        sentences = (
            f"{name} {NUMBERS[n]} trainings and its `best` over {NUMBERS[best]},",
            f"{name} {NUMBERS[n]} and its `best` over {NUMBERS[best]},",
        )
        assert any(sentence in words for sentence in sentences)
    (row,) = tables.results_table(dcgan)
    sentence = "the next at {:.0f} (a DCGAN, {} trainings of under an hour on one CPU core each),"
    assert sentence.format(row["frechet_mean"], NUMBERS[len(dcgan)]) in words
    assert all(36 < r["seconds"] / 60 < 55 for r in dcgan)
    runs = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("cwgan_gp", "best")]
    assert len(runs) == 5 and "the cWGAN-GP's `baseline` once and its `best` over five," in words
    (row,) = tables.results_table(runs)
    assert f"{row['frechet_mean']:.0f} (cWGAN-GP, five of nearly two hours)" in words
    assert all(1.3 < r["seconds"] / 3600 < 2.1 for r in runs)
    *most, last = (f"{r['metrics']['frechet_distance']:.0f}" for r in runs)
    assert f"the cWGAN-GP's five at {', '.join(most)} and {last}." in words
    runs = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("cvae", "best")]
    _, row = tables.results_table(runs, tables.floor_of(runs))
    assert f"**The CVAE's `best`** lies at {row['frechet_mean']:.0f}. Its autoencoder" in words
    sentence = "and {:.0f} (a CVAE, {} of under an hour)"
    assert sentence.format(row["frechet_mean"], NUMBERS[len(runs)]) in words
    assert all(r["seconds"] < 3600 for r in runs)
    assert f"a standard deviation of {row['frechet_sd']:.0f}, where" in words
    kids = [[h["validation_kid"] for h in r["history"] if "validation_kid" in h] for r in runs]
    sentence = "The mean validation KID is {:.1f}, {:.1f} and {:.1f} after each third"
    assert sentence.format(*map(statistics.mean, zip(*kids, strict=True))) in words
    sentence = "with a precision of {:.2f} where real cells have {:.2f}, and a recall of {:.2f} "
    sentence += "instead of {:.2f}."
    real = tables.with_both_halves(tables.floor_of(runs))
    shares = row["precision_mean"], real["precision"], row["recall_mean"], real["recall"]
    assert sentence.format(*shares) in words
    copies = [r["metrics"]["copies"] for r in runs]
    ct = statistics.mean(c["ct"] for c in copies)
    assert row["nearer_than_real"] == "C_T"
    assert f"That may be why C_T, at −{-ct:.1f} in the mean, is told" in words
    authpct = statistics.mean(c["authpct"] for c in copies), copies[0]["authpct_held_out"]
    assert "AuthPct ({:.1f} where real cells have {:.1f}) and".format(*authpct) in words
    for space in ("features", "pixels"):
        low, high = zip(*(c[space]["train_share_interval"] for c in copies))
        assert max(low) < 0.5 < min(high)
    prior = make_config("cvae", "best").prior.build()
    millions = sum(p.numel() for p in prior.parameters()) / 1e6
    assert f"a diffusion network with {millions:.1f} million parameters learns beside it" in words
    runs = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("ddpm", "best")]
    _, row = tables.results_table(runs, tables.floor_of(runs))
    assert len(runs) == 5 and "diffusion's `best` over five." in words
    sentence = f"lies at a Fréchet distance of {row['frechet_mean']:.0f} (five trainings of three"
    assert sentence + " and a half to seven minutes, several at once on an H100 or H200)," in words
    *most, last = (f"{r['metrics']['frechet_distance']:.1f}" for r in runs)
    times = row["frechet_mean"] / runs[0]["metrics"]["floor"]["frechet_distance"]
    distances = f"{', '.join(most)} and {last}, {times:.1f} times what real cells"
    real = runs[0]["metrics"]["floor"]
    sentence = f"{distances} get, whose {real['frechet_distance']:.1f} are nearly all"
    assert f"Its five trainings lie at {sentence}" in words
    endless = real["frechet_infinity"]["value"], row["frechet_infinity_mean"]
    assert "(FD∞) they are at {:.1f}, and diffusion's at {:.1f}.".format(*endless) in words
    assert all(3.4 < r["seconds"] / 60 < 7 for r in runs)
    for gpu, n in (("H100", 2), ("H200", 3)):
        speeds = [round(r["images_per_second"], -2) for r in runs if gpu in r["device"]]
        sentence = f"on one {gpu}, at {min(speeds):,.0f} to {max(speeds):,.0f}"
        assert len(speeds) == n and sentence in words
    seconds = sorted(round(r["measured"]["sampling_seconds"]) for r in runs)
    assert f"drew {5133:,} cells in {seconds[0]} to {seconds[-1]} seconds each" in words
    millions = runs[0]["images_seen"] / 1e6, runs[0]["parameters"] / 1e6
    assert "sees {:.1f} million images, with {:.1f} million parameters".format(*millions) in words
    kids = [[h["validation_kid"] for h in r["history"] if "validation_kid" in h] for r in runs]
    means = map(statistics.mean, zip(*kids, strict=True))
    sentence = "the mean validation KID is {:.1f}, {:.1f} and {:.1f} after each third of it, and"
    assert sentence.format(*means) in words
    assert [kid.index(min(kid)) for kid in kids].count(1) == 1
    assert row["nearer_than_real"] == ""
    path = RESULTS / "runs" / "ddpm-best" / "seed0" / "sampling.json"
    steps = {r["sampling_steps"]: r for r in json.loads(path.read_text())["rows"][1:5]}
    rows = json.loads(path.read_text())["rows"]
    (guided,) = [r for r in rows if r["guidance_scale"] == 3]
    sentence = "a KID of {:.1f}, thirty-two at {:.1f}, and guidance at a scale of 3 at {:.1f},"
    shown = steps[8], steps[32], guided
    assert sentence.format(*(r["kid"] for r in shown)) in words
    assert {f"{r['kid_standard_error']:.1f}" for r in shown} == {"0.4", "0.5"}
    speed = json.loads((RESULTS / "benchmarks" / "cpu--amd-epyc.json").read_text())["models"]
    flop = {(r["model"], r["preset"]): r["flop_per_image"] for r in speed}
    seen = {(r["model"], r["preset"]): r["images_seen"] for r in RECORDS[RESULTS]}
    work = [flop[key] * seen[key] for key in (("ddpm", "best"), ("cwgan_gp", "best"))]
    assert round(work[0] / work[1]) == 14 and "took fourteen times the arithmetic of the" in words
    runs = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("ddpm", "small")]
    assert len(runs) == 3 and 0.5e6 < runs[0]["parameters"] < 0.6e6
    assert f"parameters and {runs[0]['images_seen']:,} images instead of six million" in words
    usual, own = (asdict(make_config("ddpm", preset)) for preset in ("baseline", "small"))
    assert not (usual["ema_decay"] or usual["flips_and_turns"] or usual["validation_epochs"])
    assert own["ema_decay"] and own["flips_and_turns"] and own["validation_epochs"]
    assert (own["lr"], own["batch_size"]) == (10 * usual["lr"], usual["batch_size"] / 8)
    assert (own["sampler"], own["sampling_steps"]) == ("ddim", 50)
    assert tables.reduced_shortfall(runs) == ""
    (row,) = tables.results_table(runs)
    assert f"lies at {row['frechet_mean']:.0f} in the mean after half an hour. It is no" in words
    assert all(20 < r["seconds"] / 60 < 45 for r in runs)
    published = [r for r in RECORDS[RESULTS] if r["preset"] == "baseline"]
    largest = max(r["metrics"]["frechet_distance"] for r in runs)
    assert all(r["metrics"]["frechet_distance"] > largest for r in published)
    past = Counter()  # their best step
    for r in RECORDS[RESULTS]:
        if r["preset"] == "best":
            kids = [h["validation_kid"] for h in r["history"] if "validation_kid" in h]
            past[r["model"]] += min(kids) < kids[-1]
    assert past == {"cvae": 0, "cwgan_gp": 0, "dcgan": 3, "ddpm": 1}
    sentence = f"Of the DCGAN's {NUMBERS[len(dcgan)]} trainings {NUMBERS[past['dcgan']]} had been"
    assert sentence in words
    runs = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("ddpm", "best_small")]
    (row,) = tables.results_table(runs)
    real = tables.with_both_halves(tables.floor_of(runs))
    assert len(runs) == 3 and f"at a mean distance of {row['frechet_mean']:.0f} its" in words
    assert f"a small diffusion model lies at {row['frechet_mean']:.0f} (three trainings" in words
    assert row["precision_mean"] > real["precision"] and row["recall_mean"] < real["recall"]
    assert all(
        r["metrics"]["coverage"] < row["coverage_mean"]
        for r in RECORDS[RESULTS]
        if (r["model"], r["preset"]) not in (("ddpm", "best_small"), ("ddpm", "best"))
    )
    assert all(50 < r["seconds"] / 60 < 75 for r in runs)
    validated = {"sampling_steps": 16, "jpeg_quality": 75}
    assert all(r["validated_with"] == validated for r in runs)
    path = RESULTS / "runs" / "ddpm-best_small" / "seed0" / "sampling.json"
    own, *other = json.loads(path.read_text())["rows"]
    stored = {r["jpeg_chroma"]: f"{r['kid']:.1f}" for r in other if r["jpeg_quality"] == 75}
    sentence = f"move from a KID of {own['kid']:.1f} to the validation cells to one of"
    sentence += f" {stored['dct']}, or of {stored['mean']} with Pillow's, as if"
    assert own["jpeg_quality"] == 0 and sentence in words
    for name, held_out in (("authpct", real["copies"]["authpct"]), ("ct", real["copies"]["ct"])):
        assert row[f"{name}_mean"] < held_out
    typical = json.loads((RESULTS / "numbers" / "typicality.json").read_text())
    assert typical["n_fake"] < row["n_fake"]
    assert "on fewer images, and C_T grows with their number); about" in words
    assert row["copies_verdict"] == "no sign of copies"
    shares = [r["metrics"]["copies"]["features"]["train_share_interval"] for r in runs]
    assert all(low < real["copies"]["features"]["train_share"] < high for low, high in shares)
    record = json.loads(features.DOMAIN_FILE.with_suffix(".json").read_text())
    small, large = (row["accuracy"] for row in record["test"])
    sentence = (
        f"({100 * small:.0f} % right on the 28-pixel test cells, {100 * large:.0f} % at 64 pixels)"
    )
    assert sentence in words


def test_the_words_on_larger_cells_have_the_numbers_of_the_records():
    words, page = words_of_the_pages(), RESULTS / "pbc64"
    runs = [r for r in RECORDS[page] if (r["model"], r["preset"]) == ("ddpm", "best_64")]
    real = tables.floor_of(runs)
    (row,) = tables.results_table(runs)
    assert len(runs) == 3 and all("H200" in r["device"] for r in runs)
    distance, floor = row["frechet_mean"], real["frechet_distance"]
    sentence = f"diffusion's `best_64` lies at {distance:.0f} ± {row['frechet_sd']:.0f} (three"
    assert sentence in words and f"that `best` sees), where real cells get {floor:.0f};" in words
    first, second, third = (f"{r['metrics']['frechet_distance']:.0f}" for r in runs)
    sentence = f"They lie at {first}, {second} and {third}, where real cells get {floor:.0f}:"
    assert sentence in words
    millions, seen = runs[0]["parameters"] / 1e6, runs[0]["images_seen"]
    assert f"has {millions:.1f} million parameters and saw {seen:,} images in each" in words
    assert all(600 < r["seconds"] < 660 for r in runs) and "for ten to eleven minutes." in words
    best = next(r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("ddpm", "best"))
    assert 2.5 < best["images_seen"] / seen < 3
    kids = [[h["validation_kid"] for h in r["history"] if "validation_kid" in h] for r in runs]
    means = map(statistics.mean, zip(*kids, strict=True))
    sentence = "The mean validation KID is {:.0f}, {:.0f}, {:.0f} and {:.0f} after each quarter"
    assert sentence.format(*means) in words
    agreement, ceiling = row["agreement_mean"], real["agreement"]["agreement"]
    sentence = f"asked for of {100 * agreement:.0f} cells in a hundred, of real ones of"
    assert f"{sentence} {100 * ceiling:.0f}; lymphocytes are the weak class, with" in words
    found = [r["metrics"]["agreement"]["per_class"] for r in runs]
    each = {kind: statistics.mean(f[kind]["agreement"] for f in found) for kind in found[0]}
    of_real = real["agreement"]["per_class"]["lymphocyte"]["agreement"]
    assert min(each, key=each.get) == "lymphocyte"
    assert f"with {100 * each['lymphocyte']:.0f} instead of {100 * of_real:.0f}." in words
    shares = row["precision_mean"], real["precision"], row["recall_mean"], real["recall"]
    sentence = "Precision is {:.2f} where real cells have {:.2f}, recall {:.2f} instead of {:.2f}."
    assert sentence.format(*shares) in words
    assert row["copies_verdict"] == "no sign of copies"
    on_gpu = ["H200" in r["measured"]["device"] for r in runs]
    assert on_gpu == [True, False, False]
    assert all(r["measured"]["precision"] == "bfloat16" for r in runs)


def test_the_words_on_the_stand_in_at_64_pixels_have_the_numbers_of_the_records():
    words, page = words_of_the_pages(), RESULTS / "pbc64"
    runs = [r for r in RECORDS[page] if (r["model"], r["preset"]) == ("cwgan_gp", "best_small")]
    (row,) = tables.results_table(runs)
    real = tables.floor_of(runs)
    assert len(runs) == 3 and row["budget"] == "reduced" and row["frechet_mean"]
    assert {r["device"] for r in runs} == {"CPU (Intel(R) Xeon(R) Processor)"}
    assert f"at a reduced budget of {runs[0]['images_seen']:,} images" in words
    distances = (f"{r['metrics']['frechet_distance']:.0f}" for r in runs)
    sentence = "Its three trainings lie at {}, {} and {}, with a precision of "
    shares = f"{row['precision_mean']:.2f} and a recall of {row['recall_mean']:.2f}"
    assert sentence.format(*distances) + shares in words
    mean_sd = f"{row['frechet_mean']:.0f} ± {row['frechet_sd']:.0f}"
    assert f"a stand-in of the cWGAN-GP, three trainings on a CPU core, lies at {mean_sd}" in words
    agreements = 100 * row["agreement_mean"], 100 * real["agreement"]["agreement"]
    sentence = "that was asked for of {:.0f} cells in a hundred, of real ones of {:.0f}. There"
    assert sentence.format(*agreements) in words
    kids = [[h["validation_kid"] for h in r["history"] if "validation_kid" in h] for r in runs]
    assert all(min(each) == each[4] for each in kids)
    assert all(r["kept_step"] * len(r["history"]) == r["steps"] * 10 for r in runs)
    tenth, last = (statistics.mean(each[k] for each in kids) for k in (4, -1))
    sentence = "after the tenth of thirteen epochs ({:.0f} in the mean, {:.0f} at the end)"
    assert sentence.format(tenth, last) in words
    for r in runs:
        estimates = [h["wasserstein"] for h in r["history"]]
        assert estimates[3] < estimates[9] < estimates[-1]
    large = next(r for r in RECORDS[page] if r["preset"] == "best_64")
    assert f"has {large['parameters'] / runs[0]['parameters']:.0f} times the parameters" in words
    assert 3 < large["images_seen"] / runs[0]["images_seen"] < 3.5
    assert row["copies_verdict"] == "no sign of copies"


def on_bluish_ground(images: torch.Tensor) -> torch.Tensor:
    """Whether the edge's brightest pixels are about as blue as red. images: uint8 [N, 3, S, S]."""
    images, inside = images.float(), torch.zeros(images.shape[2:], dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    edge = images[:, :, ~inside]
    brightest = edge.sum(1, keepdim=True).topk(20).indices.expand(-1, 3, -1)
    red, _, blue = edge.gather(2, brightest).mean(2).unbind(1)
    return blue > red - 5


def blues_of_the_ground(model, cells: ImageSet, rows: torch.Tensor) -> tuple[float, float]:
    """Mean and scale of the first coefficient of blue, as the CVAE decodes what it encoded."""
    images, labels = to_model_range(cells.images[rows]), cells.labels[rows]
    with torch.inference_mode():
        mean, _ = model.encoder(images, model.condition(labels))
        _, (blue, log_scale) = model.decode(mean, labels)
    return blue[:, 0].mean().item(), log_scale[:, 0].exp().mean().item()


def true_blue(model, cells: ImageSet, rows: torch.Tensor) -> float:
    _, chroma = model.jpeg.encode(to_model_range(cells.images[rows]))
    return chroma[:, 0].mean().item()


def test_the_readmes_words_on_bluish_grounds_have_the_numbers_of_the_images(real_data_root):
    words = words_of_the_pages()
    real = {name: load_dataset("bloodmnist", real_data_root, 28, name) for name in SETS}
    if real["train"].name != "BloodMNIST (rebuilt)":
        pytest.skip("the file of the results is not here")
    bluish = {name: on_bluish_ground(part.images) for name, part in real.items()}
    found = {name: int(mask.sum()) for name, mask in bluish.items()}
    sentence = "{} of the {:,} training cells and {} of the {:,} held-out ones, of every class but"
    counts = found["train"], len(bluish["train"]), found["held_out"], len(bluish["held_out"])
    assert sentence.format(*counts) in words
    classes = real["train"].labels[bluish["train"]].unique().tolist()
    assert [real["train"].classes[k] for k in range(8) if k not in classes] == ["platelet"]
    train, first = real["train"].labels, real["held_out"].labels[:64]  # which were asked for
    shares = torch.stack([bluish["train"][train == k].float().mean() for k in range(8)])
    assert round(5 * shares[first].sum().item()) == 9 and "where about nine would be" in words
    drawn = {}
    for model in ("ddpm", "cvae", "dcgan", "cwgan_gp"):
        folders = sorted((RESULTS / "runs" / f"{model}-best").glob("seed*/samples.npz"))
        images = [torch.from_numpy(np.load(path)["images"]) for path in folders]
        drawn[model] = [int(on_bluish_ground(torch.cat(images)).sum()), len(torch.cat(images))]
    assert drawn == {"ddpm": [6, 320], "cvae": [0, 320], "dcgan": [0, 320], "cwgan_gp": [0, 320]}
    assert "among as many of the CVAE's, the cWGAN-GP's and the DCGAN's `best` none" in words
    assert "Among the first 320 images of diffusion's `best`, 64 of each training, six do," in words
    val = real["val"]
    folder = RESULTS / "runs" / "cvae-best" / "seed0"
    pipeline = GenerativePipeline("cvae", "best", sets=real, seed=0, out=folder, device="cpu")
    pipeline.train()  # loads the weights
    chosen, model = bluish["val"], pipeline.kept_model()
    usual = torch.nonzero(~chosen).flatten()[:200]
    with torch.inference_mode():
        again = model.reconstruct(to_model_range(val.images[chosen]), val.labels[chosen])
    assert not on_bluish_ground(to_uint8(again)).any()
    assert f"none of {found['val']} of the validation split keeps its own." in words
    (blue, odd), (_, known) = (blues_of_the_ground(model, val, rows) for rows in (chosen, usual))
    assert f"the ground's blue a scale of {odd:.1f} steps of the file" in words
    assert f"twenty times the usual {known:.1f}," in words and round(odd / known, -1) == 20
    assert blue < 0 < true_blue(model, val, chosen) and "around the same beige mean" in words


def study_rows(name: str) -> dict[tuple[str, str, str], dict]:
    with open(RESULTS / "augmentation" / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(row["classifier"], row["arm"], row["comparison"]): row for row in rows}


def interval(row: dict) -> tuple[str, str, str]:
    numbers = [float(row[name]) for name in ("difference", "low", "high")]
    return tuple(f"{number:+.3f}".replace("-", "−") for number in numbers)


def gain_over_folds(arm: str, other: str, score) -> dict:
    """One arm's score minus another's on the same folds, which share no training cell."""
    folder = RESULTS / "augmentation" / "imbalance" / "cnn"
    one, two = (
        [
            score(json.loads(path.read_text())["scores"])
            for path in sorted(folder.glob(f"fold*/{name}.json"))
        ]
        for name in (arm, other)
    )
    assert len(one) == 5
    return significance.paired([x - y for x, y in zip(one, two, strict=True)], math.inf, 1)


def test_the_readmes_words_on_rare_classes_have_the_numbers_of_the_records():
    words = words_of_the_pages()
    rows = study_rows("imbalance")
    mean = {arm: f"{float(row['balanced_accuracy_mean']):.3f}" for (_, arm, _), row in rows.items()}
    few, many = (interval(rows["cnn", f"real+GAN {n}", "secondary"]) for n in (500, 3000))
    sentence = "from {} to {} ({}, 95 % interval {} to {}), with 3,000 it stays within the noise "
    sentence = sentence.format(mean["real"], mean["real+GAN 500"], *few) + "({}, {} to {}); "
    assert sentence.format(*many) in words
    assert f"without any generated cell, gives {mean['real+class weights']}." in words
    before, after = rows["cnn", "real", ""], rows["cnn", "real+GAN 500", "secondary"]
    weighted = rows["cnn", "real+class weights", "secondary"]
    of = {
        name: tuple(f"{float(row[f'recall {name}_mean']):.2f}" for row in (before, after, weighted))
        for name in augmentation.LONG_TAIL
    }
    n = augmentation.LONG_TAIL
    for sentence in (
        f"recall of basophils ({n['basophil']} training cells) goes from {{}} to {{}}, and with "
        "class weights to {};",
        f"erythroblasts ({n['erythroblast']}) from {{}} to {{}}, and with class weights to {{}};",
        f"monocytes ({n['monocyte']}) from {{}} to {{}}, and with class weights to {{}};",
        f"of lymphocytes ({n['lymphocyte']}) falls from {{}} to {{}}, where class weights raise "
        "it to {},",
        f"of immature granulocytes ({n['immature granulocyte']}) falls from {{}} to {{}}, and "
        "with class weights to {}.",
    ):
        kind = next(kind for kind in n if kind in sentence)
        assert sentence.format(*of[kind]) in words
    rarest = sorted(kind for kind in n if n[kind] == min(n.values()))
    gains = {kind: float(of[kind][1]) - float(of[kind][0]) for kind in n}
    assert sorted(sorted(gains, key=gains.get)[-2:]) == rarest == ["basophil", "erythroblast"]
    arms = "real+GAN-500", "real+class-weights"
    behind = gain_over_folds(*arms, lambda scores: scores["balanced_accuracy"])
    numbers = [f"{x:+.3f}".replace("-", "−") for x in (behind["mean"], *behind["interval"])]
    assert "in balanced accuracy ({}, 95 % interval {} to {}), and".format(*numbers) in words
    classes = {
        kind: gain_over_folds(*arms, lambda scores, kind=kind: scores["per_class"][kind]["recall"])
        for kind in gains
    }
    low, high = (pick(classes, key=lambda k: classes[k]["mean"]) for pick in (min, max))
    assert (low, high) == ("lymphocyte", "basophil") and len(classes) == 8
    reach = [f"{classes[kind]['mean']:+.2f}".replace("-", "−") for kind in (high, low)]
    assert "from {} (basophils) to {} (lymphocytes), none".format(*reach) in words
    least = min(significance.holm([found["p"] for found in classes.values()]))
    assert least >= 0.11 and "counted (Holm, p ≥ 0.11)." in words
    highest = []
    for kind in rarest:
        recalls = {arm: float(row[f"recall {kind}_mean"]) for (_, arm, _), row in rows.items()}
        assert max(recalls, key=recalls.get) == "real+oversampling+strong"
        highest.append(f"{max(recalls.values()):.2f}")
    assert "has the highest recall of both, {} and {}.".format(*highest) in words
    accuracy = [f"{float(row['accuracy_mean']):.3f}" for row in (before, after)]
    assert accuracy[0] == accuracy[1] and f"accuracy stays at {accuracy[0]}, and" in words
    curve = [f"{float(row['auc_mean']):.3f}" for row in (before, after)]
    assert "the curve falls from {} to {}.".format(*curve) in words
    assert f"without a real one, give {mean['GAN alone']}." in words
    primary = interval(rows["cnn", "real+GAN 3000+strong", "primary"])
    short, low, high = (number.strip("−") for number in primary)
    assert f"both with strong augmentation, fall {short} ({high} to {low}) short of it;" in words
    arms = ("real+strong", "real+GAN 3000+strong", "real+oversampling+strong")
    assert (
        "neither of them has {}, with the generated cells {}, with oversampling {}.".format(
            *(mean[arm] for arm in arms)
        )
        in words
    )
    verdicts = [rows["cnn", f"real+GAN {n}", "secondary"]["verdict"] for n in (500, 3000)]
    assert verdicts == ["better", "within the noise"]


def test_the_readmes_words_on_few_cells_have_the_numbers_of_the_records():
    words = words_of_the_pages()
    rows = study_rows("bccd")
    primary = [rows[name, "real+GAN+traditional", "primary"] for name in ("cnn", "cnn_rnn")]
    changes = ["{} ({} to {})".format(*interval(row)) for row in primary]
    assert "by {} with a CNN and by {} with a CNN-RNN".format(*changes) in words
    assert {row["verdict"] for row in primary} == {"within the noise"}
    score = {
        (name, arm): f"{float(row['balanced_accuracy_mean']):.3f}"
        for (name, arm, _), row in rows.items()
    }
    plain, strong, flawed, sound = (
        [score[name, arm] for name in ("cnn", "cnn_rnn")]
        for arm in ("real", "real+strong", "published flaw", "real+GAN+traditional")
    )
    for name, best in zip(("cnn", "cnn_rnn"), strong):
        own = [v for (other, arm), v in score.items() if other == name and arm != "published flaw"]
        assert max(own) == best
    assert f"{strong[0]} and {strong[1]} after {plain[0]} and {plain[1]} without any" in words
    changes = [rows[name, "real+strong", "secondary"] for name in ("cnn", "cnn_rnn")]
    both = *interval(changes[0]), *interval(changes[1])
    assert "({}, {} to {}, and {}, {} to {})".format(*both) in words
    assert {row["verdict"] for row in changes} == {"within the noise"}
    assert flawed[0] == flawed[1] and f"balanced accuracy is {flawed[0]} with both" in words
    sentence = "the arm that it was made from, tested on other, real cells alone, has {} and {}."
    assert sentence.format(*sound) in words
    counts = rows["cnn", "published flaw", ""]
    tested = float(counts["n_test"])
    assert 0.7 < 1 - float(rows["cnn", "real", ""]["n_test"]) / tested < 0.75


def test_the_readmes_words_on_usefulness_have_the_numbers_of_the_records():
    words = words_of_the_pages()
    with open(RESULTS / "augmentation" / "generators.csv", newline="", encoding="utf-8") as file:
        rows = {(row["model"], row["preset"]): row for row in csv.DictReader(file)}
    mean = {key: f"{float(row['balanced_accuracy_mean']):.3f}" for key, row in rows.items()}
    sd = {key: f"{float(row['balanced_accuracy_sd'] or 0):.3f}" for key, row in rows.items()}
    folder = RESULTS / "augmentation" / "generators"
    found = [json.loads(path.read_text()) for path in folder.glob("ddpm-best-seed*.json")]
    assert len(found) == 5
    row = rows["ddpm", "best"]
    gap = -float(row["against_real_mean"]), float(row["against_real_sd"])
    n_train = RECORDS[RESULTS][0]["dataset"]["n"]
    assert n_train > 2 * found[0]["n"]
    for sentence in (
        f"has a balanced accuracy of {mean['ddpm', 'best']} ± {sd['ddpm', 'best']} on",
        "test cells (five trainings); as many real cells give {:.3f} ± {:.3f} more,".format(*gap),
        f"generator itself had learned from all {n_train:,} train cells;",
        f"with a balanced accuracy of {mean['ddpm', 'best']}, one of as many real cells with "
        f"{gap[0]:.3f} more (± {gap[1]:.3f} over trainings alone);",
        f"`best_small` gives {mean['ddpm', 'best_small']} ± {sd['ddpm', 'best_small']} (three",
        f"`best`, about as near as that one, gives {mean['cwgan_gp', 'best']} (five trainings),",
        "its `baseline`, at eighteen times the distance, "
        f"{mean['cwgan_gp', 'baseline']} (one), and",
        f"CVAE's `best` {mean['cvae', 'best']} ({NUMBERS[int(rows['cvae', 'best']['seeds'])]})",
    ):
        assert sentence in words
    shown = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) in rows]
    distance = {
        key: tables.results_table([r for r in shown if (r["model"], r["preset"]) == key])[0]
        for key in {(r["model"], r["preset"]) for r in shown}
    }
    by_distance = sorted(distance, key=lambda key: distance[key]["frechet_mean"])
    by_use = sorted(distance, key=lambda key: -float(mean[key]))
    assert by_use[-1] == ("cwgan_gp", "best") and ("cwgan_gp", "best") in by_distance[:3]
    assert by_use[:2] == [("ddpm", "best"), ("ddpm", "best_small")] and len(by_use) == 5
    far, near = (distance["cwgan_gp", preset]["frechet_mean"] for preset in ("baseline", "best"))
    assert round(far / near) == 18


GENERATORS = [page for page in PAGES if (page / "augmentation" / "generators").is_dir()]


@pytest.mark.parametrize("page", GENERATORS, ids=name_of)
def test_the_table_of_generators_is_that_of_its_records(page):
    folder = page / "augmentation" / "generators"
    runs = []
    for record in RECORDS[page]:
        path = folder / f"{record['model']}-{record['preset']}-seed{record['seed']}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            assert found["weights_key"] == record["weights_key"]
            runs.append((record, found))
    assert len(runs) == len(list(folder.glob("*.json")))
    text = train_on_generated.markdown(train_on_generated.compare(runs))
    assert folder.with_suffix(".md").read_text(encoding="utf-8") == text


STUDIES = [
    folder.name
    for folder in sorted((RESULTS / "augmentation").iterdir())
    if any(folder.glob("*/fold*/*.json"))
]


@pytest.mark.parametrize("name", STUDIES)
def test_tables_of_a_study_are_those_of_its_records(name, tmp_path):
    records = augmentation.collect(RESULTS / "augmentation" / name)
    text = augmentation.markdown(records, augmentation.compare(records))
    assert (RESULTS / "augmentation" / f"{name}.md").read_text(encoding="utf-8") == text


def test_demo_extractor_is_that_of_its_record():
    data = features.DEMO_FILE.read_bytes()
    record = json.loads(features.DEMO_FILE.with_suffix(".json").read_text())
    assert hashlib.sha256(data).hexdigest() == record["sha256"]


def rows_of_grid(name: str) -> list[dict]:
    options = argparse.Namespace(ablations=name, out=RESULTS)
    return tables.ablation_table(run_suite.ablation_records(options))


@pytest.mark.parametrize("grid", sorted((RESULTS / "ablations").glob("*/")), ids=lambda p: p.name)
def test_the_table_of_a_grid_is_that_of_its_records(grid, tmp_path):
    tables.write_ablation_table(rows_of_grid(grid.name), tmp_path)
    for name in ("table.md", "table.csv"):
        assert (tmp_path / name).read_text() == (grid / name).read_text(), name


def test_findings_words_on_equal_arithmetic_are_those_of_the_curves():
    runs = {model: [] for model in ("cvae", "dcgan", "cwgan_gp")}
    for record in RECORDS[RESULTS]:
        if record["model"] in runs and record["preset"] == "best":
            flop = flop_of_training(make_config(record["model"], "best"))
            seen, kids = figures.validation_kids(record)
            runs[record["model"]].append(([x * flop / 1e15 for x in seen], kids))
    assert [len(group) for group in runs.values()] == [5, 5, 5]
    ends = [(work[-1], kids[-1]) for work, kids in runs["cvae"]]
    (end,) = {work for work, _ in ends}
    assert f"after the {end:.2f} PFLOP at which the CVAE's trainings end" in words_of_the_pages()
    by_then = [
        [
            math.exp(np.interp(math.log(end), np.log(work), np.log(kids)))
            for work, kids in runs[model]
        ]
        for model in ("dcgan", "cwgan_gp")
    ]
    low, high = (choose(kid for _, kid in ends) for choose in (min, max))
    nearest, *others = sorted(by_then[0])
    assert nearest < low and high < min(*others, *by_then[1])
    assert "than nine of the GANs' ten trainings were by then, of which one of the DCGAN's was" in (
        words_of_the_pages()
    )
    adversarial = (*runs["dcgan"], *runs["cwgan_gp"])
    assert max(min(kids) for _, kids in adversarial) < min(kid for _, kid in ends)
    assert "with more, all of the GANs' go on past them." in words_of_the_pages()


BENCHMARKS = sorted((RESULTS / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_the_page_of_a_benchmark_is_that_of_its_numbers(path):
    write = benchmark.large_as_markdown if path.stem.endswith("-large") else benchmark.as_markdown
    assert path.with_suffix(".md").read_text() == write(json.loads(path.read_text()))


def changed(rows: list[dict], model: str) -> dict[str, tuple[str, str]]:
    """For each change that three trainings had: its mean distance, and the preset's own of them."""
    found = {}
    for row in rows:
        if row["model"] == model and len(json.loads(row["differences"])) >= 3:
            own = row["frechet_mean"] - row["difference_mean"]
            found[row["ablation"]] = f"{row['frechet_mean']:,.0f}", f"{own:,.0f}"
    return found


def test_findings_have_the_numbers_of_the_grid_of_best():
    words, rows = words_of_the_pages(), rows_of_grid("best")
    cvae, dcgan, cwgan_gp = (changed(rows, model) for model in ("cvae", "dcgan", "cwgan_gp"))
    cooling = ("temperature 1", "temperature 0.75", "temperature 0")
    assert set(cvae) == {"normal prior", *cooling, "no EMA"}
    assert set(dcgan) <= DCGAN_ROWS and set(cwgan_gp) == {"no EMA"}
    assert not changed(rows, "ddpm")
    measured = [r for r in rows if r["frechet_mean"] and r["settings"] != "{}"]
    assert {r["ablation"] for r in measured if r["model"] == "dcgan"} == DCGAN_ROWS
    assert len(measured) == 14 and "Fourteen rows of the [table of ablations]" in words
    assert "Measured so far are fourteen rows of ours, nine of which needed no training" in words
    assert {len(json.loads(row["differences"])) for row in measured} == {3, 5}
    gains = {(r["model"], r["ablation"]): r for r in rows if r["difference_sd"]}
    sure = {key for key, r in gains.items() if r["difference_p_holm"] < 0.05}
    turned = {("dcgan", "gamma 1 + turns"), ("dcgan", "falling rate + no EMA")}
    assert sure == turned | {("cvae", name) for name in ("normal prior", *cooling)}
    alone = {key: r for key, r in gains.items() if r["difference_p"] < 0.05 and key not in sure}
    two = ("dcgan", "falling rate"), ("cwgan_gp", "no EMA")
    assert set(alone) == {*two}
    for row in alone.values():
        assert all(gain > 0 for gain in json.loads(row["differences"]).values())
    shown = [alone[key][name] for key in two for name in ("difference_p", "difference_p_holm")]
    sentence = "falling rate (p = {:.3f}; {:.2f} after Holm) and the cWGAN-GP without a running "
    assert (sentence + "mean ({:.3f}; {:.2f}).").format(*shown) in words
    assert len({own for _, own in cvae.values()}) == 1  # the same seeds
    assert int(cvae["no EMA"][0]) < int(cvae["no EMA"][1])
    assert "its `best` lies at {} instead of {},".format(*cvae["normal prior"]) in words
    cooled = f"temperature 1 instead of 0.5 at {cvae['temperature 1'][0]}, at temperature 0,"
    assert cooled in words and f"without any texture, at {cvae['temperature 0'][0]}." in words
    near = gains["cvae", "temperature 0.75"]
    sentence = "At 0.75 it lies at {}, with a recall of {:.2f} instead of {:.2f}:"
    own = statistics.mean(r["metrics"]["recall"] for r in three_of("runs/cvae-best", (0, 1, 2)))
    assert sentence.format(cvae["temperature 0.75"][0], near["recall_mean"], own) in words
    kids = {0.5: [], 0.625: []}
    for seed in range(3):
        path = RESULTS / "runs" / "cvae-best" / f"seed{seed}" / "sampling.json"
        own, *found = json.loads(path.read_text())["rows"]
        assert own["temperature"] == 0.5
        found = [row for row in found if row["prior_steps"] == own["prior_steps"]]
        assert min(found, key=lambda row: row["kid"])["temperature"] == 0.625
        for row in found:
            kids.get(row["temperature"], []).append(row["kid"])
    usual = statistics.mean(set(kids[0.5]))  # among the variants twice
    sentence = "cells 0.625 is, with a mean KID of {:.1f} instead of {:.1f} ("
    assert sentence.format(statistics.mean(kids[0.625]), usual) in words
    assert "the cWGAN-GP's at {} instead of {}.".format(*cwgan_gp["no EMA"]) in words
    shown = *dcgan["no EMA"], *three_distances("ablations/best/dcgan-best-no-ema")
    sentence = "the DCGAN's `best` lies at {} instead of {} ({:.0f}, {:.0f} and {:.0f} in three"
    assert sentence.format(*shown) in words
    own = statistics.mean(three_distances("ablations/best/dcgan-best-falling-rate"))
    shown = dcgan["falling rate + no EMA"][0], own
    assert "the DCGAN's lies at {} instead of {:.0f}: a falling rate".format(*shown) in words
    assert "to a fiftieth, lies at {} instead of {}, so that there".format(*cvae["no EMA"]) in words


def test_findings_have_the_numbers_of_the_dcgan_s_contest():
    """Of trainings of the same seeds, with one change after another."""
    words = words_of_the_pages()
    turned, plain, no_jpeg, no_ema = (
        three_of(f"ablations/best/dcgan-best-gamma-1{name}", (2, 3, 4))
        for name in ("-turns", "", "-turns-no-jpeg", "-turns-no-ema")
    )

    def mean(records: list[dict], name: str) -> float:
        return statistics.mean(r["metrics"][name] for r in records)

    def mean_distance(records: list[dict]) -> str:
        return f"{statistics.mean(distances(records)):.0f}"

    def kept(records: list[dict]) -> float:
        kids = (min(h.get("validation_kid", math.inf) for h in r["history"]) for r in records)
        return statistics.mean(kids)

    best = [r for r in RECORDS[RESULTS] if (r["model"], r["preset"]) == ("dcgan", "best")]
    falling = three_of("ablations/best/dcgan-best-falling-rate", range(5))
    five = three_of("ablations/best/dcgan-best-gamma-1-turns", range(5))
    row = "{:.0f}, {:.0f}, {:.0f}, {:.0f} and {:.0f}"
    sentence = f"Its five trainings lie at {row}, {{}} in the mean, with a recall of {{:.2f}}."
    assert sentence.format(*distances(best), mean_distance(best), mean(best, "recall")) in words
    sentence = f"the same seeds lie at {row}, with a recall of {{:.2f}};"
    assert sentence.format(*distances(falling), mean(falling, "recall")) in words
    assert f"five trainings lie at {row}, which differs".format(*distances(five)) in words
    assert all(x > y for x, y in zip(distances(falling), distances(best), strict=True))
    assert sorted(distances(best))[:2] == sorted(distances(best)[3:])
    shown = kept(falling[:3]), kept(best[:3])
    assert "({:.1f} in the mean with the falling rate, {:.1f} without)".format(*shown) in words
    margins = [[row["margin"] > 2 for row in r["history"][:5]] for r in falling]
    assert margins[4] == [True] * 4 + [False] and not any(map(any, margins[:4]))
    sentence = "weight of 1 at first the last three seeds lie at {:.0f}, {:.0f} and {:.0f}: farther"
    assert sentence.format(*distances(plain)) in words
    assert all(x > y for x, y in zip(distances(plain), distances(best)[2:], strict=True))
    recalls = mean(turned, "recall"), mean(plain, "recall")
    assert "the recall is {:.2f} instead of {:.2f}: turns".format(*recalls) in words
    for records in (turned, plain, no_jpeg, no_ema, best, falling):
        assert all(r["metrics"]["copies"]["verdict"] == "no sign of copies" for r in records)
    dct = three_of("ablations/best/dcgan-best-dct-chroma", (0, 1, 2))
    sentence = "lie at {:.0f}, {:.0f} and {:.0f} instead of {:.0f}, {:.0f} and {:.0f}, as real"
    assert sentence.format(*distances(dct), *distances(best[:3])) in words
    shown = kept(dct), kept(best[:3])
    sentence = "steps says the same ({:.1f} instead of {:.1f} in the mean), and was still falling"
    assert sentence.format(*shown) in words
    for record in (*dct, *no_jpeg):
        kids = [row["validation_kid"] for row in record["history"] if "validation_kid" in row]
        assert kids[-1] == min(kids)
    (row,) = (r for r in rows_of_grid("best") if r["ablation"] == "dct chroma")
    shown = row["difference_p"], row["difference_p_holm"]
    assert "within chance (p = {:.3f}, {:.2f} after Holm)".format(*shown) in words
    assert all(r["metrics"]["copies"]["verdict"] == "no sign of copies" for r in dct)
    first = [[r["history"][0]["margin"] for r in records] for records in (five, best)]
    sentence = "{:.1f} to {:.1f} in the mean of the first epoch, and {:.1f} to {:.1f} in the "
    sentence = sentence.format(*(x for part in first for x in (min(part), max(part))))
    assert sentence + "preset's." in words
    gamma = best[0]["config"]["gamma_end"] / best[0]["config"]["gamma"]
    share = gamma ** (best[0]["images_seen"] / best[0]["config"]["anneal_images"])
    assert round(1 / share, -1) == 60 and "falls to a sixtieth of that," in words
    for records, chosen in ((best[:3], 2), (falling[:3], 1), (turned, 1)):
        assert sum(r["kept_step"] < r["steps"] for r in records) == chosen
    pair = mean_distance(no_ema), mean_distance(turned)
    assert "the turned one at {} instead of {},".format(*pair) in words
    pair = mean_distance(no_jpeg), mean_distance(turned)
    assert "Trained without it the turned DCGAN lies at {} instead of {}:".format(*pair) in words
    sentence = "at {:.0f}, {:.0f} and {:.0f} where the same seeds with it have {:.0f}, {:.0f} and "
    assert (sentence + "{:.0f}.").format(*distances(no_jpeg), *distances(turned)) in words
    recall, precision = (
        f"{mean(no_jpeg, name):.2f} instead of {mean(turned, name):.2f}"
        for name in ("recall", "precision")
    )
    assert f"their recall is {recall}, with a precision of {precision}." in words
    # Where the networks are of equal strength the margin is well below one. After the first epoch:
    wide = [
        [sum(row["margin"] > 4 for row in r["history"][1:]) for r in records]
        for records in (no_jpeg, five, plain)
    ]
    half = turned[0]["config"]["epochs"] // 2
    assert wide[0][0] >= half and wide[0][1:] == [0, 0] and wide[1:] == [[0] * 5, [0, 0, 1]]
    folder = "dcgan-best-gamma-1-turns-no-jpeg/seed2/"
    assert f"In [one of the three](ablations/best/{folder}" in words


def test_the_dcgan_s_notebook_has_the_numbers_of_its_trainings():
    words = (RESULTS.parent / "notebooks" / "dcgan.ipynb").read_text()
    runs = three_of("runs/dcgan-best", range(5))
    minutes = [r["seconds"] / 60 for r in runs]
    sentence = "`best` {:.0f} to {:.0f} minutes beside other work (in bfloat16, compiled)"
    assert sentence.format(min(minutes), max(minutes)) in words
    last = three_distances("ablations/best/dcgan-best-no-ema")
    times = [x / y for x, y in zip(last, distances(runs[:3]), strict=True)]
    sentence = "the last weights by themselves are {:.1f} to {:.1f} times as far)"
    assert sentence.format(min(times), max(times)) in words


def distances(records: list[dict]) -> list[float]:
    return [r["metrics"]["frechet_distance"] for r in records]


def three_distances(folder: str) -> list[float]:
    return distances(three_of(folder, (0, 1, 2)))


def three_of(folder: str, seeds: tuple[int, ...]) -> list[dict]:
    """Records of the trainings of these seeds."""
    return [json.loads((RESULTS / folder / f"seed{k}/record.json").read_text()) for k in seeds]


def test_findings_have_the_numbers_of_the_published_grid():
    words, rows = words_of_the_pages(), rows_of_grid("published")
    cvae = changed(rows, "cvae")
    latents = ("latent 16", "latent 32", "latent 128")
    assert set(cvae) == {*KL_ROWS, *latents, "lr 0.0001", "lr 0.0005", "epochs 50"}
    assert set(cvae) == {a.name for a in GRIDS["published"] if a.model == "cvae" and a.settings}
    assert not changed(rows, "dcgan") and not changed(rows, "ddpm")
    assert "nine are measured, all of the CVAE's, each over three trainings." in words
    (usual,) = {own for _, own in cvae.values()}  # of the same seeds
    low, middle, high = (cvae[name][0] for name in KL_ROWS)
    weights = low, middle, usual, high
    assert (
        "{}, {}, {} and {} at weights of 0.25, 0.5, 0.75 (as published) and 1:".format(*weights)
        in words
    )
    grid = RESULTS / "ablations" / "published"
    folders = [grid / f"cvae-baseline-{name.lower().replace(' ', '-')}" for name in KL_ROWS]
    folders.insert(2, RESULTS / "runs" / "cvae-baseline")
    nats = [statistics.mean(last_kl(folder)) for folder in folders]
    assert "in them ({:.0f}, {:.0f}, {:.0f} and {:.0f} nats)".format(*nats) in words
    sentence = "16 latents instead of 64 lie at {}, 32 at {} and 128 at {}:"
    assert sentence.format(*(cvae[name][0] for name in latents)) in words
    few, half, wide = (
        round(statistics.mean(last_kl(grid / f"cvae-baseline-{name.replace(' ', '-')}")))
        for name in latents
    )
    assert half == wide == round(nats[2])
    assert f"codes hold {wide} nats with 32, 64 or 128 of them, and {few} with 16." in words
    sentence = "A tenth of the learning rate lies at {}, half of it at {}, half as many epochs at "
    shown = (cvae[name][0] for name in ("lr 0.0001", "lr 0.0005", "epochs 50"))
    assert (sentence + "{}.").format(*shown) in words
    tested = {r["ablation"]: r for r in rows if r["difference_p_holm"] is not None}
    sure = {name for name, row in tested.items() if row["difference_p_holm"] < 0.05}
    alone = {name for name, row in tested.items() if row["difference_p"] < 0.05}
    assert set(tested) == set(cvae) and sure == {"KL weight 0.25", "lr 0.0001"}
    four = {"KL weight 0.5", "KL weight 1", "latent 16", "epochs 50"}
    assert alone - sure == four | {"latent 128"}
    assert max(tested[name]["difference_p"] for name in four) <= 0.02
    adjusted = sorted(tested[name]["difference_p_holm"] for name in four)
    shown = adjusted[0], adjusted[-1]
    assert "(p ≤ 0.02 each, {:.3f} to {:.3f} after Holm)".format(*shown) in words
    both = (tested["latent 128"][name] for name in ("difference_p", "difference_p_holm"))
    sentence = "128 latents hardly ({:.3f} and {:.3f}), 32 and half the learning rate not."
    assert sentence.format(*both) in words


DCGAN_ROWS = {
    *("dct chroma", "gamma 1", "falling rate", "no EMA", "falling rate + no EMA"),
    *(f"gamma 1 + turns{more}" for more in ("", " + no JPEG", " + no EMA")),
}
KL_ROWS = ("KL weight 0.25", "KL weight 0.5", "KL weight 1")


def last_kl(folder: Path) -> list[float]:
    """In nats an image, of the last epoch of the first three trainings."""
    records = [json.loads((folder / f"seed{k}" / "record.json").read_text()) for k in range(3)]
    return [record["history"][-1]["kl"] for record in records]
