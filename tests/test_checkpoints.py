"""Shipped checkpoints: what they hold, what they draw, and what is refused."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import checkpoints
import utils
from checkpoints import draw, grid, ship
from custom_models import MODELS, make_config
from custom_models.drawing import load_shipped, sample
from evaluation import tables
from generative_pipeline import GenerativePipeline, run_folder
from utils import (
    BLOOD_CLASSES,
    LOADERS,
    class_balanced_labels,
    exit_on_bad_input,
    load_dataset,
    make_grid,
)

ROOT = Path(__file__).parents[1]
# One model with classes and one without, which has a count among its weights.
CVAE = {"channels": (8, 8, 8), "latent_channels": 2, "prior_channels": (8,)}
TINY = {
    "cvae": CVAE,
    "dcgan": {
        "generator_channels": (8, 8, 8),
        "discriminator_channels": (8, 8, 8),
        "latent_dim": 4,
        "ema_decay": 0.9,
    },
}
BOTH = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def pipelines(data_root, tiny_extractor, tmp_path_factory) -> dict[str, GenerativePipeline]:
    """Finished `best` runs of tiny models, without pictures, in a folder of results."""
    results, made = tmp_path_factory.mktemp("suite") / "results", {}
    for name, settings in TINY.items():
        made[name] = GenerativePipeline(
            name,
            preset="best",
            out=run_folder(results, name, "best", 0),
            data_root=data_root,
            extractor=tiny_extractor,
            device="cpu",
            epochs=1,
            batch_size=32,
            **settings,
        )
        made[name].train()
        made[name]._save_pictures = lambda *_: None  # slow, and not shipped
        made[name].evaluate()
    return made


@pytest.fixture(scope="module")
def shipped(pipelines, tmp_path_factory) -> dict[str, Path]:
    """The checkpoints of both runs; not to be changed."""
    out = tmp_path_factory.mktemp("shipped")
    return {name: ship(pipeline.out, out) for name, pipeline in pipelines.items()}


@pytest.fixture
def run(pipelines, tmp_path) -> Path:
    """A copy of the CVAE's run, to be changed."""
    for name in ("weights.pt", "record.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(pipelines["cvae"].out / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.fixture
def copied(shipped, tmp_path) -> Path:
    """A copy of the CVAE's checkpoint without the record beside it, to be changed."""
    return Path(shutil.copy(shipped["cvae"], tmp_path))


def change(path: Path, about: dict | None = None, **tensors: torch.Tensor | None) -> None:
    """Write a checkpoint anew with other metadata or tensors; None takes a tensor out."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["checkpoint"]) | (about or {})
    tensors = safetensors.torch.load_file(path) | tensors
    tensors = {name: value for name, value in tensors.items() if value is not None}
    safetensors.torch.save_file(tensors, path, {"checkpoint": json.dumps(metadata)})


# ---------------------------------------------------------------------------------------------
# Shipping
# ---------------------------------------------------------------------------------------------


def test_a_run_that_was_measured_by_other_settings_of_sampling_draws_by_these(
    run, data_root, tiny_extractor, tmp_path
):
    (run / "record.json").unlink()
    settings = {"epochs": 1, "batch_size": 32, "temperature": 0.0, **TINY["cvae"]}
    again = GenerativePipeline(
        "cvae",
        preset="best",
        out=run,
        data_root=data_root,
        extractor=tiny_extractor,
        device="cpu",
        **settings,
    )
    again.train()
    again._save_pictures = lambda *_: None
    assert again.evaluate()["validated_with"] == {"temperature": 0.5}
    path = ship(run, tmp_path)
    model, _ = load_shipped(path)
    assert model.config.temperature == 0


@BOTH
def test_the_tensors_are_the_kept_ones_bit_for_bit(name, pipelines, shipped):
    kept = torch.load(pipelines[name].weights_path, weights_only=True)["state"]
    found = safetensors.torch.load_file(shipped[name])
    assert found.keys() == kept.keys()
    kinds = {torch.float16, torch.int64} if name == "dcgan" else {torch.float16}
    assert {v.dtype for v in found.values()} == kinds
    for key, value in kept.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        assert found[key].numpy().tobytes() == value.contiguous().numpy().tobytes()


@BOTH
def test_metadata_and_record_say_what_it_is(name, pipelines, shipped, data_root):
    path, pipeline = shipped[name], pipelines[name]
    assert path.name == f"{name}-best.safetensors"
    record = json.loads(path.with_suffix(".json").read_text())
    added = record.pop("checkpoint")
    assert record == json.loads(pipeline.record_path.read_text())
    data = path.read_bytes()
    assert added == {
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
    }
    _, about = load_shipped(path)
    assert about == {
        "format": 1,
        "model": name,
        "preset": "best",
        "seed": 0,
        "config": record["config"],
        "classes": list(BLOOD_CLASSES),
        "image_size": 28,
        "dataset": "BloodMNIST",
        "dataset_sha256": load_dataset("bloodmnist", data_root).sha256(),
        "code_version": record["versions"]["code"],
    }


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    first = ship(run, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in first.parent.iterdir()}
    assert before.keys() == {"cvae-best.safetensors", "cvae-best.json", "cvae-best.md"}
    ship(run, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in first.parent.iterdir()} == before


def edit_record(run: Path, path: tuple[str, ...], value) -> None:
    record = json.loads((run / "record.json").read_text())
    part = record
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (run / "record.json").write_text(json.dumps(record))


OTHER_RECORDS = {
    "seed": (("seed",), 7),
    "model": (("model",), "dcgan"),
    "latent_channels": (("config", "latent_channels"), 5),
    "dataset_sha256": (("dataset", "sha256"), "0" * 64),
    "code_version": (("versions", "code"), 0),
    "seconds": (("seconds",), 1e6),  # another training with the same settings
    "kept_step": (("kept_step",), 1),
}


@pytest.mark.parametrize("name", OTHER_RECORDS)
def test_a_record_of_other_weights_is_refused(name, run, tmp_path, bad_input):
    path, value = OTHER_RECORDS[name]
    edit_record(run, path, value)
    with bad_input("record.json", f"{name} (", f"{value!r} in the record)"):
        ship(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage, words",
    {
        "no weights": "holds no weights.pt",
        "no record": "holds no record.json",
        "broken weights": "weights.pt is broken",
        "foreign weights": "weights.pt is no weight file",
        "broken record": "record.json is no whole record",
        "too large": "more than the 0 MB",
        "a tensor too few": "tensor decoder.mean.bias is missing, but the model's is float16 [3]",
    }.items(),
)
def test_what_cannot_be_shipped(damage, words, run, tmp_path, monkeypatch, bad_input):
    weights, record = run / "weights.pt", run / "record.json"
    if damage.startswith("no "):
        (weights if damage == "no weights" else record).unlink()
    elif damage == "broken weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "foreign weights":
        torch.save({"state": {}}, weights)
    elif damage == "broken record":
        record.write_text(record.read_text()[:1000])
    elif damage == "too large":
        monkeypatch.setattr(checkpoints, "LARGEST", 1000)
    else:
        state = torch.load(weights, weights_only=True)
        del state["state"]["decoder.mean.bias"]
        torch.save(state, weights)
    with bad_input(words):
        ship(run, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_the_largest_file_that_is_shipped(run, shipped, tmp_path, monkeypatch, bad_input):
    size = shipped["cvae"].stat().st_size
    monkeypatch.setattr(checkpoints, "LARGEST", size)
    ship(run, tmp_path / "out")
    monkeypatch.setattr(checkpoints, "LARGEST", size - 1)
    with bad_input("cvae-best.safetensors would have"):
        ship(run, tmp_path / "out")


# ---------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------


def test_every_model_and_data_set_has_its_words():
    assert checkpoints.KINDS.keys() == MODELS.keys()
    assert checkpoints.DATA.keys() == LOADERS.keys()


@BOTH
def test_the_cards_numbers_are_the_records(name, shipped):
    record = json.loads(shipped[name].with_suffix(".json").read_text())
    record["budget"] = "full"  # one epoch is less than the preset has
    card = checkpoints.model_card(record, [record])
    assert tables.run_table(record) in card  # metrics, floor, protocol, verdict on copies
    assert record["metrics"]["copies"]["verdict"] in card
    for number in (record["images_seen"], record["parameters"], record["dataset"]["n"]):
        assert f"{number:,}" in card
    assert record["checkpoint"]["sha256"] in card and record["dataset"]["sha256"] in card
    source = {"cvae": "jpeg_vae", "dcgan": "r3gan"}[name]
    assert f"`custom_models/{source}.py`" in card
    asked = "It draws the class that it is asked for."
    assert (asked in card) == (name == "cvae")
    for words in ("CC BY 4.0", "Not for diagnosis", "cells of one patient may lie on both sides"):
        assert words in card


CHANGED = {
    "images_seen": (("images_seen",), 123_456_789, "123,456,789 images seen"),
    "seconds": (("seconds",), 98_765.4, "98,765 seconds"),
    "device": (("device",), "an abacus", "seconds on an abacus"),
    "measured on": (("measured", "device"), "a slide rule", "in this file on a slide rule"),
    "parameters": (("parameters",), 7_654_321, "7,654,321 parameters"),
    "EMA": (("config", "ema_decay"), 0.125, "EMA of the weights: decay 0.125"),
    "no EMA": (("config", "ema_decay"), 0.0, "EMA of the weights: none"),
    "budget": (("budget",), "full", "budget: full"),
    "verdict": (("metrics", "copies", "verdict"), "copies", "Copies of training cells: copies"),
    "kid": (("metrics", "kid"), 12.5, "| KID | 12.5 ±"),
    "floor": (("metrics", "floor", "precision"), 0.625, "| 0.625 |"),
    "pairs": (("dataset", "duplicates_across_splits"), 3141, "across splits: 3141"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_record_gives_another_card(name, shipped, tmp_path):
    (path, value, words) = CHANGED[name]
    file = Path(shutil.copy(shipped["cvae"].with_suffix(".json"), tmp_path / "record.json"))
    if path != ("budget",):
        edit_record(tmp_path, ("budget",), "full")
    before = json.loads(file.read_text())
    assert words not in checkpoints.model_card(before, [before])
    edit_record(tmp_path, path, value)
    after = json.loads(file.read_text())
    assert words in checkpoints.model_card(after, [after])


def test_the_card_of_a_stand_in_shows_no_numbers_until_it_may(shipped):
    card = shipped["cvae"].with_suffix(".md").read_text()  # of one epoch
    assert "A stand-in" in card and "1 of 3 trainings" in card
    assert "| KID |" not in card and "`cvae-best.json`, holds all" in card


def test_the_card_says_how_far_other_trainings_differ(shipped):
    record = json.loads(shipped["cvae"].with_suffix(".json").read_text()) | {"budget": "full"}
    assert "It is the only training so far" in checkpoints.model_card(record, [record])
    other = json.loads(json.dumps(record)) | {"seed": 1}
    one = record["metrics"]["frechet_distance"]
    other["metrics"]["frechet_distance"] = one + 10
    card = checkpoints.model_card(record, [record, other])
    assert f"Over 2 trainings: FD (tiny-8) {one + 5:.1f} ± 7.1 (mean ± sd)." in card


def test_other_seeds_of_a_run_are_found(pipelines, tmp_path):
    for seed in (0, 1):
        folder = run_folder(tmp_path, "cvae", "best", seed)
        folder.mkdir(parents=True)
        shutil.copy(pipelines["cvae"].out / "record.json", folder)
        edit_record(folder, ("seed",), seed)
    found = checkpoints._other_seeds(run_folder(tmp_path, "cvae", "best", 0))
    assert [record["seed"] for record in found] == [1]


def test_the_card_of_demo_cells(shipped):
    record = json.loads(shipped["cvae"].with_suffix(".json").read_text())
    record["dataset"]["source"] = "demo"
    card = checkpoints.model_card(record, [record])
    assert "Cells drawn by this suite's diffusion model, which learned from BloodMNIST" in card


@BOTH
def test_the_cards_code_runs(name, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # stands for the repository's root
    shutil.copytree(shipped[name].parent, tmp_path / "results" / "checkpoints")
    (code,) = re.findall("```python\n(.*?)```", shipped[name].with_suffix(".md").read_text(), re.S)
    names = {}
    exec(code, names)
    assert names["images"].shape == (32, 3, 28, 28) and names["images"].dtype == torch.uint8


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


@BOTH
def test_images_are_those_of_the_pipeline_bit_for_bit(name, pipelines, shipped):
    model, about = load_shipped(shipped[name])
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    labels = torch.arange(150) % 8  # more than one batch
    assert torch.equal(sample(model, labels, about["seed"]), pipelines[name].sample(labels))
    first, second = (sample(model, labels, seed) for seed in (3, 4))
    assert torch.equal(first, pipelines[name].sample(labels, seed=3))
    assert not torch.equal(first, second)


def test_it_loads_without_the_record_beside_it(copied, shipped):
    alone, beside = (load_shipped(path)[0].state_dict() for path in (copied, shipped["cvae"]))
    assert all(torch.equal(alone[key], beside[key]) for key in beside)


FLOAT = "decoder.mean.bias"
BAD_FILES = {
    "missing": (lambda p: p.unlink(), "does not exist"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-10]), "cannot be read as safetensors"),
    "no safetensors": (lambda p: p.write_bytes(b"not safetensors"), "cannot be read"),
    "no metadata": (
        lambda p: safetensors.torch.save_file({"a": torch.zeros(1)}, p),
        "no checkpoint of format 1",
    ),
    "foreign metadata": (
        lambda p: safetensors.torch.save_file({"a": torch.zeros(1)}, p, {"format": "pt"}),
        "no checkpoint of format 1",
    ),
    "metadata that is no JSON": (
        lambda p: safetensors.torch.save_file({}, p, {"checkpoint": "{"}),
        "cannot be read",
    ),
    "metadata of a format alone": (
        lambda p: safetensors.torch.save_file({}, p, {"checkpoint": '{"format": 1}'}),
        "no checkpoint of format 1",
    ),
    "another format": (lambda p: change(p, {"format": 2}), "no checkpoint of format 1"),
    "unknown model": (lambda p: change(p, {"model": "vae"}), "unknown model 'vae'"),
    "unknown preset": (lambda p: change(p, {"preset": "huge"}), "no preset 'huge'"),
    "unknown setting": (lambda p: change(p, {"config": {"depth": 3}}), "no setting 'depth'"),
    "other settings": (
        lambda p: change(p, {"config": {**CVAE, "latent_channels": 3}}),
        "tensor decoder.layers.0.weight is float16 [8, 10, 3, 3], but the model's is float16 "
        "[8, 11, 3, 3]",
    ),
    "too few": (lambda p: change(p, **{FLOAT: None}), f"{FLOAT} is missing, but the model's is"),
    "too many": (
        lambda p: change(p, extra=torch.zeros(2)),
        "extra is float32 [2], but the model's is missing",
    ),
    "another type": (
        lambda p: change(p, **{FLOAT: torch.zeros(3)}),
        f"{FLOAT} is float32 [3], but the model's is float16 [3]",
    ),
    "not of the record beside it": (
        lambda p: p.with_suffix(".json").write_text('{"checkpoint": {"sha256": "0123456789"}}'),
        "cvae-best.json beside it names 01234567…",
    ),
    "a broken record beside it": (
        lambda p: p.with_suffix(".json").write_text("{"),
        "cvae-best.json is no record of a checkpoint",
    ),
}


@pytest.mark.parametrize("damage, words", BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_no_checkpoint_is_bad_input(damage, words, copied, bad_input):
    damage(copied)
    with bad_input(str(copied.parent), words):
        load_shipped(copied)


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


@BOTH
def test_a_grid_has_a_row_for_each_class(name, shipped):
    model, about = load_shipped(shipped[name])
    figure = grid(model, about, seed=5)
    (axis,) = figure.axes
    images = sample(model, class_balanced_labels(8, 8), seed=5)
    drawn = np.asarray(axis.images[0].get_array())
    assert np.array_equal(drawn, make_grid(images, columns=8, zoom=4))
    assert axis.get_title() == f"{name} best, seed 5"
    names = [text.get_text() for text in axis.texts]
    assert names == (list(BLOOD_CLASSES) if name == "cvae" else [])
    # Each name stands beside its own row of images: one pixel of white, then 28 of the cells.
    for row, text in enumerate(axis.texts):
        top = 4 * (1 + 29 * row)
        assert top < text.get_position()[1] < top + 4 * 28


def test_a_grid_of_large_images_has_half_as_many():
    config = make_config("cwgan_gp", "quick", image_size=64)
    about = {"model": "cwgan_gp", "preset": "quick", "image_size": 64, "classes": BLOOD_CLASSES}
    model = config.build().eval()
    (axis,) = grid(model, about, seed=5).axes
    images = sample(model, class_balanced_labels(8, 4), seed=5)
    drawn = np.asarray(axis.images[0].get_array())
    assert np.array_equal(drawn, make_grid(images, columns=4, zoom=4))
    assert [text.get_text() for text in axis.texts] == list(BLOOD_CLASSES)


def test_a_seed_gives_the_same_file(shipped, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw(shipped["dcgan"], tmp_path / name, seed)
    first, again, other = (tmp_path.joinpath(name).read_bytes() for name in "abc")
    assert first == again != other and first.startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def run_here(monkeypatch, *arguments: str) -> int:
    """The command in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["checkpoints", *arguments])
    try:
        with exit_on_bad_input():
            checkpoints.main()
    except SystemExit as end:
        return end.code
    return 0


def test_every_finished_best_run_is_shipped(pipelines, tmp_path, monkeypatch, capsys):
    results, out = pipelines["cvae"].out.parents[2], tmp_path / "out"
    unfinished = run_folder(tmp_path / "results", "ddpm", "best", 0)
    shutil.copytree(results, tmp_path / "results")
    unfinished.mkdir(parents=True)
    shutil.copy(pipelines["cvae"].weights_path, unfinished)  # trained, but not measured
    arguments = ("ship", "--results", str(tmp_path / "results"), "--out", str(out))
    assert run_here(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out / 'cvae-best.safetensors'}: 0.")
    assert lines[1].startswith(f"{out / 'dcgan-best.safetensors'}: 0.")
    assert lines[2] == f"ddpm: not finished, {unfinished} lacks weights.pt or record.json"
    assert lines[3].startswith("cwgan_gp: not finished") and len(lines) == 4
    assert len(list(out.iterdir())) == 6


def test_a_stand_in_is_shipped_beside_best(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(checkpoints, "ship", lambda run, *_: given.append(run) or Path(__file__))
    runs = [run_folder(tmp_path, "ddpm", preset, 0) for preset in ("best", "best_64", "best_small")]
    for run in reversed(runs):  # the stand-in first
        run.mkdir(parents=True)
        for name in ("weights.pt", "record.json"):
            (run / name).touch()
        given.clear()
        checkpoints.ship_all(tmp_path, tmp_path / "out")
        assert given == runs[runs.index(run) :]


def test_models_of_ones_own_images_are_not_shipped(pipelines, tmp_path):
    results = tmp_path / "results"
    for page in (results, results / "mine28"):
        run = run_folder(page, "cvae", "best", 0)
        shutil.copytree(pipelines["cvae"].out, run)
    record = json.loads((run / "record.json").read_text())
    record["dataset"]["source"] = "folder"
    (run / "record.json").write_text(json.dumps(record))
    checkpoints.ship_all(results, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["cvae-best.safetensors"]


def test_other_data_sets_are_in_the_files_names(pipelines, tmp_path, capsys):
    for page in (tmp_path / "results", tmp_path / "results" / "pbc64"):
        for name, pipeline in pipelines.items():
            shutil.copytree(pipeline.out, run_folder(page, name, "best", 0))
    checkpoints.ship_all(tmp_path / "results", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    models = ("cvae-best", "dcgan-best")
    assert names == {f"{model}{of}.safetensors" for model in models for of in ("", "-pbc64")}
    for model in models:
        one, other = (tmp_path / "out" / f"{model}{of}" for of in ("", "-pbc64"))
        files = [path.with_name(f"{path.name}.safetensors") for path in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()
        card = other.with_name(f"{other.name}.md").read_text()
        assert f'load_shipped("results/checkpoints/{files[1].name}")' in card
    # What is lacking is told of the main data set alone.
    assert capsys.readouterr().out.count("not finished") == 2


def test_grids_need_no_data_and_no_extractor(shipped, tmp_path, monkeypatch, capsys):
    for name in ("DATA_ROOT", "EXTRACTOR"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    folder, out = str(shipped["cvae"].parent), tmp_path / "samples"
    options = ("--checkpoints", folder, "--out", str(out), "--seed", "2")
    assert run_here(monkeypatch, "draw", *options) == 0
    paths = [out / "cvae-best.png", out / "dcgan-best.png"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in paths]
    draw(shipped["cvae"], tmp_path / "again.png", seed=2)
    assert paths[0].read_bytes() == (tmp_path / "again.png").read_bytes()


def test_a_broken_checkpoint_after_a_whole_one(copied, tmp_path):
    """In a process of its own: one grid, then no traceback and no warning beside the one line."""
    broken, out = tmp_path / "dcgan-best.safetensors", tmp_path / "samples"
    broken.write_bytes(b"cut short")
    done = subprocess.run(
        [
            *(sys.executable, "checkpoints.py", "draw"),
            *("--checkpoints", copied.parent, "--out", out),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DATA_ROOT": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == f"{out / 'cvae-best.png'}\n"
    assert done.stderr.startswith(f"error: {broken} cannot be read")
    assert done.stderr.count("\n") == 1
    draw(copied, tmp_path / "again.png")
    assert (out / "cvae-best.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("draw", "--checkpoints", "none"), "none holds no checkpoints"),
        (("draw", "--seed", "one"), "'one'"),
        (("paint",), "'paint'"),
        ((), "command"),
    ],
)
def test_bad_arguments(arguments, words, monkeypatch, capsys):
    assert run_here(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


# ---------------------------------------------------------------------------------------------
# Those that come with the project
# ---------------------------------------------------------------------------------------------


def test_kept_checkpoints_and_their_cards_are_those_of_the_kept_runs(tmp_path):
    kept = ROOT / "results" / "checkpoints"
    checkpoints.ship_all(ROOT / "results", tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(kept))
    for path in tmp_path.iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes(), path.name


# ---------------------------------------------------------------------------------------------
# The demo data
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch) -> None:
    """Three cells a class instead of 250."""
    monkeypatch.setattr(checkpoints, "DEMO_PER_CLASS", 3)
    monkeypatch.setattr(checkpoints, "DEMO_SPLITS", {"train": 12, "val": 5, "test": 7})


def test_demo_cells_are_the_models_own(
    few, shipped, data_root, tiny_extractor, tmp_path, monkeypatch
):
    out = tmp_path / "demo_cells.npz"
    found = checkpoints.draw_demo(shipped["cvae"], out, data_root, tiny_extractor)
    monkeypatch.setattr(utils, "DEMO_FILE", out)
    parts = [load_dataset("demo", split=split) for split in utils.SPLITS]
    assert [len(part) for part in parts] == [12, 5, 7]
    images, labels = (torch.cat([getattr(p, name) for p in parts]) for name in ("images", "labels"))
    assert labels.bincount().tolist() == [3] * 8
    assert torch.equal(images, sample(load_shipped(shipped["cvae"])[0], labels, 0))

    record = json.loads(out.with_suffix(".json").read_text())
    weights = hashlib.sha256(shipped["cvae"].read_bytes()).hexdigest()
    assert record["drawn_by"] == {"file": "cvae-best.safetensors", "sha256": weights}
    assert record["sha256"] == utils.sha256_of(images) and record["copies"] == found
    assert record["extractor"] == "tiny-8"
    assert (found["n_images"], found["n_train"], found["n_held_out"]) == (24, 160, 64)
    assert out.with_suffix(".png").exists()


def test_demo_cells_that_are_copies_are_not_written(
    few, shipped, data_root, tiny_extractor, tmp_path, monkeypatch, bad_input
):
    out = tmp_path / "demo_cells.npz"
    train = load_dataset("bloodmnist", data_root).images
    monkeypatch.setattr(checkpoints, "sample", lambda model, labels, seed: train[: len(labels)])
    with bad_input("cvae-best.safetensors draws: copies", "take another"):
        checkpoints.draw_demo(shipped["cvae"], out, data_root, tiny_extractor)
    with bad_input("domain extractor knows the train split"):
        checkpoints.draw_demo(shipped["cvae"], out, data_root, "domain")
    assert not list(tmp_path.iterdir())


def test_demo_cells_need_classes_and_the_models_own_data(
    few, shipped, data_root, tiny_extractor, tmp_path, tiny_arrays, bad_input
):
    out = tmp_path / "demo_cells.npz"
    with bad_input("dcgan-best.safetensors can't be asked for a class"):
        checkpoints.draw_demo(shipped["dcgan"], out, data_root, tiny_extractor)
    other = {"train_labels": 0 * tiny_arrays["train_labels"]}
    np.savez(tmp_path / "bloodmnist.npz", **tiny_arrays | other)
    with bad_input("learned from other cells than those of BloodMNIST"):
        checkpoints.draw_demo(shipped["cvae"], out, tmp_path, tiny_extractor)
    assert [path.name for path in tmp_path.iterdir()] == ["bloodmnist.npz"]
