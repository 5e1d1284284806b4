"""The training command: one line and exit code 2 for bad input, and nothing but torch, numpy,
matplotlib and Pillow needed for a whole run; and the command that draws images."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cells
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_datasets import write_digits

import utils
from custom_models import MODELS, drawing, make_config, usual_image_size
from custom_models.config import ModelConfig, help_texts
from custom_models.drawing import derive_seed, labelled_grid, load_model
from evaluation import agreement
from generative_pipeline import RESULTS, GenerativePipeline, default_folder, pick_precision
from train import FROM_DATA, PUBLISHED_NAMES, parse_training
from utils import BLOOD_CLASSES, PBC_CLASSES, PBC_FOLDER, USUAL_SIZE, split_list

ROOT = Path(__file__).parents[1]
SMALL = ["--epochs", "1", "--channels", "8,16", "--batch-size", "32"]
PRESETS = [(model, preset) for model in MODELS for preset in MODELS[model].PRESETS]


@pytest.fixture
def command(data_root, tiny_extractor, tmp_path) -> list[str]:
    """A run of a tiny model on the tiny data; later options win over these."""
    return [
        *("train.py", "--model", "cvae", "--preset", "quick", "--data-root", str(data_root)),
        *("--extractor", str(tiny_extractor), "--out", str(tmp_path / "run"), "--device", "cpu"),
        *SMALL,
    ]


def run_here(arguments: list[str], monkeypatch) -> int:
    """The command in this process, which has imported torch already; returns its exit code."""
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def run_outside(arguments: list[str], **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_from_the_command_line(command, tmp_path, monkeypatch, capsys):
    assert run_here(command, monkeypatch) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("FD (") and line.endswith(str(tmp_path / "run" / "record.json"))
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert f"{record['metrics']['frechet_distance']:.1f}" in line
    assert record["config"]["channels"] == [8, 16] and record["config"]["epochs"] == 1
    assert record["seed"] == 0 and record["steps"] == 5
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint.pt", "record.json", "samples.png", "losses.png", "progress"} <= files

    # A finished run is shown, even where its checkpoint is gone, and not trained again.
    (tmp_path / "run" / "checkpoint.pt").unlink()
    before = (tmp_path / "run" / "record.json").stat().st_mtime_ns
    assert run_here(command, monkeypatch) == 0
    assert capsys.readouterr().out.strip() == line
    assert (tmp_path / "run" / "record.json").stat().st_mtime_ns == before
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_classes_of_a_finished_run_are_measured_from_its_weights(
    command, tmp_path, monkeypatch, capsys
):
    command += ["--conditional", "true"]
    assert run_here(command, monkeypatch) == 0
    run = tmp_path / "run"
    assert run_here([*command, "--per_class", "4"], monkeypatch) == 0
    found = (run / "per_class.json").read_bytes()
    (run / "per_class.json").unlink()
    (run / "record.json").unlink()  # now all in one process
    assert run_here([*command, "--per_class", "4"], monkeypatch) == 0
    assert (run / "per_class.json").read_bytes() == found
    (run / "weights.pt").unlink()
    (run / "checkpoint.pt").unlink()
    assert run_here([*command, "--per_class", "4"], monkeypatch) == 2  # nothing to draw with
    assert "has no weights.pt beside it" in capsys.readouterr().err
    assert not (run / "weights.pt").exists()


@pytest.mark.parametrize("model", ["dcgan", "ddpm", "cwgan_gp"])
def test_every_model_runs_from_the_command_line(model, command, tmp_path, monkeypatch, capsys):
    settings = {
        "dcgan": ["--generator_channels=8,8,8,4", "--discriminator_channels=4,8,8,8"],
        "ddpm": ["--channels=8,8", "--sampler=ddim", "--sampling_steps=2"],
        "cwgan_gp": ["--base_channels=4", "--critic_steps=2"],
    }[model]
    command = command[: command.index("--epochs")]
    small = ["--epochs=1", "--batch_size=16", *settings]
    assert run_here([*command, "--model", model, "--seed", "3", *small], monkeypatch) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["model"], record["seed"]) == (model, 3)


def test_the_cgan_learns_digits_and_draws_sevens(command, tmp_path, monkeypatch):
    for part, n in (("train", 100), ("t10k", 30)):
        write_digits(tmp_path, part, n, packed=False)
    monkeypatch.setattr(agreement, "MOST_EPOCHS", 1)  # of the classifier that reads the digits
    monkeypatch.setattr(GenerativePipeline, "_save_pictures", lambda *_: None)  # slow
    command = command[: command.index("--epochs")]
    small = ["--epochs=1", "--batch_size=16", "--base_channels=4"]
    digits = ["--model=cgan", "--dataset=mnist", f"--data_root={tmp_path}"]
    assert run_here([*command, *digits, *small], monkeypatch) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["model"], record["dataset"]["name"]) == ("cgan", "MNIST")
    assert (record["config"]["image_channels"], record["config"]["n_classes"]) == (1, 10)

    weights, out = tmp_path / "run" / "weights.pt", tmp_path / "sevens"
    assert draw(monkeypatch, weights, out, "--class", "7", "--n", "2") == 0
    assert read(out).keys() == {"7_0000.png", "7_0001.png", "grid.png"}
    sevens = torch.full((2,), 7)
    expected = drawing.draw(load_model(weights)[0], sevens, derive_seed(0, "samples of 7"))
    for number, (image,) in enumerate(expected):
        found = np.asarray(Image.open(out / f"7_000{number}.png").convert("L"))
        assert np.array_equal(found, image)


BAD = {
    "unknown model": (["--model", "vae"], "unknown model 'vae'"),
    "unknown preset": (["--preset", "huge"], "no preset 'huge'"),
    "unknown option": (["--depth=3"], "cvae quick has no option --depth; its settings are epochs"),
    "another model's setting": (["--critic_step", "5"], "cvae quick has no option --critic_step"),
    "setting without value": (["--epochs"], "--epochs: expected one argument"),
    "setting of a wrong type": (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
    "no truth value": (["--conditional", "maybe"], "expected true or false, got 'maybe'"),
    "no whole numbers": (["--channels", "8;16"], "whole numbers such as 32,64,96, got '8;16'"),
    "setting out of range": (["--lr", "-1"], "lr must be above 0"),
    "too large a batch": (["--batch_size", "500"], "lower batch_size"),
    "data given twice": (["--data_dir", "cells"], "leave --dataset, --data_root out"),
    "resuming nothing": (["--resume"], "there is no checkpoint at"),
    "unknown precision": (["--precision", "half"], "unknown precision 'half'"),
    "unknown data set": (["--dataset", "cats"], "unknown data set 'cats'"),
    "missing data": (["--dataset", "pbc", "--data-root", "none"], "PBC_dataset_normal_DIB"),
    "unknown device": (["--device", "abacus"], "unknown device 'abacus'"),
    "missing extractor": (["--extractor", "none.pt"], "`--extractor demo` needs no file"),
    "misspelt option": (["--models", "cvae"], "--models"),
    "no class to ask for": (["--per_class", "2000"], "cvae can't be asked for a class"),
    "one image of a class": (["--conditional", "true", "--per_class", "1"], "two images or more"),
    "wrong seed": (["--seed", "one"], "'one'"),
    "no pixels": (["--image_size", "0"], "image_size must be at least 1"),
    "too many pixels": (["--image_size", "200000"], "must be between 1 and 1024 pixels"),
}


def check_refusal(code, out, err, words):
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert words in err


@pytest.mark.parametrize("options, words", BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line_and_writes_nothing(
    options, words, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = run_here([*command, *options], monkeypatch)
    check_refusal(code, *capsys.readouterr(), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "names, words",
    [
        (["a/0.png", "../b/1.png"], "leads outside the zip"),
        (["a/0.png", "b/"], "class sub-folder b is empty"),
        (["a/0.png"], "a has 1 image"),
        ([f"a/{n}.png" for n in range(9)], "unpack it and name its folder"),
    ],
)
def test_bad_data_of_one_s_own_ends_with_one_line(names, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(utils, "LARGEST_ZIP", 50)  # bytes: nine of the files are too much
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"" if name.endswith("/") else b"no image")
    command = ["train.py", "--data_dir", str(tmp_path / "x.zip"), "--out", str(tmp_path / "run")]
    code = run_here([*command, "--extractor", "demo"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), words)
    assert os.listdir(tmp_path) == ["x.zip"]


def test_cuda_without_a_gpu(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code = run_here([*command, "--device", "cuda"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), "no CUDA GPU")
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_it_is_the_published_one(monkeypatch, capsys):
    code = run_here(["train.py", "--critic_step", "0"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), "error: critic_step must be at least 1, got 0")


@pytest.mark.parametrize("option", [*PUBLISHED_NAMES, *PUBLISHED_NAMES.values(), "embed_size"])
def test_a_refused_setting_has_the_name_that_was_typed(option, monkeypatch, capsys):
    code = run_here(["train.py", f"--{option}=-3"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), f"error: {option} must be ")
    code = run_here(["train.py", f"--{option.replace('_', '-')}", "-3"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), f"error: {option} must be ")


def test_of_two_names_the_last_one_counts(monkeypatch, capsys):
    code = run_here(["train.py", "--critic_step=2", "--critic_steps=0"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), "error: critic_steps must be at least 1, got 0")


def test_an_extractor_that_is_no_torchscript(command, tmp_path, monkeypatch, capsys):
    path = tmp_path / "extractor.pt"
    path.write_bytes(b"not TorchScript")
    code = run_here([*command, "--extractor", str(path)], monkeypatch)
    check_refusal(code, *capsys.readouterr(), str(path))
    assert os.listdir(tmp_path) == ["extractor.pt"]


def test_a_broken_checkpoint_stays(command, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    path.write_bytes(b"cut short")
    check_refusal(run_here(command, monkeypatch), *capsys.readouterr(), str(path))
    assert path.read_bytes() == b"cut short"
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_bad_input_of_the_command_itself():
    """In a process of its own: no traceback, no warning of a library beside the one line."""
    done = run_outside(["train.py", "--model", "cvae", "--preset", "huge"])
    check_refusal(done.returncode, done.stdout, done.stderr, "no preset 'huge'")


BARE = """
import runpy, sys

class Without:
    absent = set("{absent}".split())

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in self.absent else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv = {arguments!r}
runpy.run_path("train.py", run_name="__main__")
"""
ABSENT = (
    "tqdm tensorboard tensorboardX medmnist torchvision torch_fidelity pytorch_fid papermill "
    "pandas seaborn scipy sklearn einops nbformat nbclient IPython jupyter hypothesis pytest"
)


def test_a_bare_machine_trains_measures_and_records(command, tmp_path):
    """On the drawn cells and with the demo extractor, which need no file from elsewhere."""
    arguments = [*command, "--dataset", "demo", "--extractor", "demo"]
    arguments += ["--conditional", "true", "--per_class", "4"]
    code = BARE.format(absent=ABSENT, arguments=arguments)
    done = run_outside(["-c", code], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "FD (demo)" in done.stdout and "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["dataset"]["name"] == "demo" and record["dataset"]["n"] == 1400
    assert record["metrics"]["distance_name"] == "FD (demo)"
    assert not (tmp_path / "run" / "tensorboard").exists()
    for picture in ("samples.png", "losses.png", "progress/100.png", "per_class.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 0
    each = json.loads((tmp_path / "run" / "per_class.json").read_text())
    assert each["n"] == 4 and len(each["per_class"]) == 8
    assert done.stdout.rstrip().endswith(str(tmp_path / "run" / "per_class.md"))


def test_a_missing_inception_is_one_line_without_its_package(command, tmp_path):
    """`inception` needs pytorch-fid and a download: neither is here."""
    arguments = [*command, "--extractor", "inception"]
    code = BARE.format(absent=ABSENT, arguments=arguments)
    done = run_outside(
        ["-c", code], PYTHONPATH=str(ROOT), TORCH_HOME=str(tmp_path), https_proxy="127.0.0.1:9"
    )
    check_refusal(done.returncode, done.stdout, done.stderr, "--extractor FILE")


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, preset", PRESETS)
def test_help_names_every_setting_what_it_means_and_its_default(model, preset, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        parse_training(["--model", model, "--preset", preset, "--help"])
    lines = re.sub(r"\n {10,}", "  ", capsys.readouterr().out).splitlines()
    config, texts = make_config(model, preset), help_texts(make_config(model, preset))
    assert end.value.code == 0
    for name, value in dataclasses.asdict(config).items():
        found = [line for line in lines if line.lstrip().startswith(f"--{name} ")]
        if name in FROM_DATA[1:]:
            assert found == []
            continue
        assert len(found) == 1
        assert len(texts[name].split()) >= 2 and "TODO" not in texts[name]
        if name == "image_size":
            for data, size in USUAL_SIZE.items():
                assert re.search(rf"\b{data}\b[^;]* {size}\b", found[0])
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        assert f"{texts[name]} (default {shown})" in found[0]
        above = [line for line in lines[: lines.index(found[0])] if re.match(r"\w.*:$", line)]
        own = f"settings of {model} {preset}:"
        assert above[-1] == ("training of every model:" if hasattr(ModelConfig, name) else own)


def test_options_take_every_type_and_published_names_mean_the_same():
    _, given = parse_training(["--model", "cvae", "--channels", "8,16", "--conditional", "true"])
    assert given == {"channels": (8, 16), "conditional": True}
    published = ["--z_dim=7", "--critic_step=2", "--lambda_gp=3", "--adam_beta_1_c=0.1"]
    published += ["--adam_beta_1_g=0.2", "--adam_beta_2=0.8", "--embed_size=5", "--lr=1e-3"]
    own = [option for option in published]
    for name, alias in PUBLISHED_NAMES.items():
        own = [option.replace(f"--{alias}=", f"--{name}=") for option in own]
    assert not set(own) & set(published[:6])
    options, given = parse_training(published)
    assert given == parse_training(own)[1] and options.model == "cwgan_gp"
    assert given == {
        "latent_dim": 7,
        "critic_steps": 2,
        "gradient_penalty": 3.0,
        "beta1_critic": 0.1,
        "beta1_generator": 0.2,
        "beta2": 0.8,
        "embed_size": 5,
        "lr": 1e-3,
    }
    assert [parse_training(a)[0].compile for a in ([], ["--compile"], ["--no_compile"])] == [
        None,
        True,
        False,
    ]
    assert parse_training([])[1] == {}  # what is not given stays as the preset has it


@pytest.mark.parametrize(
    "dataset, root, size, folder",
    [
        ("bloodmnist", None, 28, "runs"),
        ("bloodmnist", None, 64, "bloodmnist64/runs"),
        ("pbc", "somewhere", 128, "pbc128/runs"),
        ("celeba:Eyeglasses", None, 64, "celeba-Eyeglasses64/runs"),
        ("folder", "some/where/my.cells", 64, "folder-my.cells64/runs"),
        ("folder", "some/where/cells.zip", 64, "folder-cells64/runs"),
    ],
)
def test_every_data_set_and_size_has_its_own_folder(dataset, root, size, folder):
    found = default_folder(dataset, root, size, "cvae", "best", 3)
    assert found == RESULTS / folder / "cvae-best" / "seed3"


def test_a_notebook_s_run_of_another_size_lies_apart_too(data_root, tiny_arrays, tmp_path):
    """Beside runs at 28 pixels it would break their tables."""
    larger = {
        name: np.zeros((len(part), 64, 64, 3), np.uint8) if "images" in name else part
        for name, part in tiny_arrays.items()
    }
    np.savez_compressed(tmp_path / "bloodmnist_64.npz", **larger)
    settings = {"preset": "quick", "extractor": "demo", "device": "cpu"}
    for root, size, folder in ((data_root, 28, "runs"), (tmp_path, 64, "bloodmnist64/runs")):
        pipeline = GenerativePipeline("cgan", data_root=root, image_size=size, **settings)
        assert pipeline.out == RESULTS / folder / "cgan-quick" / "seed0"


def test_a_preset_for_one_size_has_it_and_others_the_data_s():
    def sizes(preset: str, *datasets: str) -> list[int]:
        return [usual_image_size("cwgan_gp", preset, dataset) for dataset in datasets]

    assert sizes("baseline", "bloodmnist", "pbc", "folder") == [28, 128, 64]
    assert sizes("published", "pbc", "celeba:Eyeglasses") == [128, 128]


@pytest.mark.parametrize("name", ["pbc_clinic", "pbc", "pbc64", "cells"])
def test_git_ignores_the_runs_on_one_s_own_images(name):
    """They hold pictures of the images, which may be of patients."""
    own = default_folder("folder", f"somewhere/{name}.zip", 64, "cvae", "best", 0)
    public = default_folder("pbc", None, 64, "cvae", "best", 0)
    for path, expected in ((own, 0), (public, 1)):
        command = ["git", "check-ignore", "-q", str(path / "samples.png")]
        code = subprocess.run(command, cwd=RESULTS.parent, check=False).returncode
        if code not in (0, 1):
            pytest.skip("this is no git checkout")
        assert code == expected


@pytest.mark.parametrize(("native", "usual"), [(True, "bfloat16"), (False, "float32")])
def test_the_usual_precision_is_the_device_s(native, usual, monkeypatch):
    """A GPU that only emulates bfloat16 is slow at it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (pick_precision(None, cpu), pick_precision(None, cuda)) == ("float32", usual)
    assert pick_precision("float32", cuda) == "float32"


def test_bfloat16_on_a_cpu_takes_instructions_of_its_own(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert pick_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    code = run_here([*command, "--precision", "bfloat16"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), "no bfloat16 instructions")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_published_command_line(
    kind, tiny_extractor, pbc_split, tmp_path, request, monkeypatch, capsys
):
    data = request.getfixturevalue(f"pbc_{kind}") / PBC_FOLDER
    monkeypatch.setenv("EXTRACTOR", str(tiny_extractor))
    monkeypatch.setenv("CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(GenerativePipeline, "_save_pictures", lambda *_: None)  # slow
    command = ["train.py", f"--data_dir={data}{'.zip' if kind == 'zip' else ''}", "--epochs=2"]
    command += ["--batch_size=4", "--z_dim=8", "--embed_size=4", "--critic_step=2", "--lr=0.0002"]
    command += ["--lambda_gp=10", "--adam_beta_1_c=0", "--adam_beta_1_g=0.5", "--adam_beta_2=0.9"]
    kept = tmp_path / "kept" / "my.pt"
    if kind == "zip":  # a folder of checkpoints, too
        kept.mkdir(parents=True)
    command += [f"--checkpoint_path={kept}", f"--log_dir={tmp_path / 'log'}"]
    ours = [f"--out={tmp_path / 'run'}", "--device=cpu", "--base_channels=2"]
    command += ["--seed=5", *ours]
    with monkeypatch.context() as broken:  # broken off in its second epoch
        begin, train_epoch = GenerativePipeline.__init__, GenerativePipeline._train_epoch
        often = functools.partialmethod(begin, checkpoint_seconds=0)
        broken.setattr(GenerativePipeline, "__init__", often)
        broken.setattr(
            GenerativePipeline,
            "_train_epoch",
            lambda self, epoch: train_epoch(self, epoch) if epoch == 0 else sys.exit(9),
        )
        assert run_here(command, monkeypatch) == 9
    assert not (tmp_path / "run" / "weights.pt").exists()
    epochs = []
    monkeypatch.setattr(
        GenerativePipeline,
        "_train_epoch",
        lambda self, epoch: epochs.append(epoch) or train_epoch(self, epoch),
    )
    assert run_here([*command, "--resume"], monkeypatch) == 0
    assert epochs == [1]
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["model"], record["preset"], record["seed"]) == ("cwgan_gp", "baseline", 5)
    assert record["config"]["image_size"] == 128 and record["config"]["critic_steps"] == 2
    assert record["dataset"]["name"] == "PBC" and record["dataset"]["n"] == 16
    assert (kept / "checkpoint.pt" if kind == "zip" else kept).is_file()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    with open(tmp_path / "run" / "real_images.csv", newline="") as file:
        listed = {line["file"]: (line["class"], line["split"]) for line in csv.DictReader(file)}
    own_name = dict(zip(PBC_CLASSES, BLOOD_CLASSES))
    assert listed == {
        line["file"]: (own_name[line["file"].split("/")[0]], line["split"]) for line in pbc_split
    }
    assert list((tmp_path / "log").glob("events.*"))
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_list_of_test_images_is_that_of_the_training(tmp_path, monkeypatch, capsys):
    """Written with the weights: a run that is refused must not name the training images anew."""
    images = cells(np.repeat([0, 7], 20), 28, 0)
    for row, image in enumerate(images):
        path = tmp_path / "cells" / "ab"[row // 20] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pt").write_bytes(b"cut short")
    command = ["train.py", f"--data_dir={tmp_path / 'cells'}", f"--out={run}", "--device=cpu"]
    command += ["--extractor=demo", "--image_size=28", "--batch_size=2", "--base_channels=2"]
    assert run_here(command, monkeypatch) == 2
    assert "checkpoint.pt is broken" in capsys.readouterr().err
    assert os.listdir(run) == ["checkpoint.pt"]

    monkeypatch.setattr(GenerativePipeline, "train", lambda self: shutil.rmtree(tmp_path / "cells"))
    monkeypatch.setattr(GenerativePipeline, "evaluate", lambda self: sys.exit(9))
    expected = split_list("folder", tmp_path / "cells")
    assert len(expected.splitlines()) == 41
    assert run_here(command, monkeypatch) == 9
    assert (run / "real_images.csv").read_text() == expected


def train_until_killed(arguments: dict) -> None:
    """Two epochs, and their checkpoints; then no time for anything."""
    pipeline = GenerativePipeline(**arguments, checkpoint_seconds=0)
    save = pipeline.save_checkpoint

    def save_and_die() -> None:
        save()
        if len(pipeline.history) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.save_checkpoint = save_and_die
    pipeline.train()


def test_a_killed_run_is_resumed_to_the_same_weights(
    command, data_root, tmp_path, monkeypatch, capsys
):
    settings = {"epochs": 4, "channels": (8, 16), "batch_size": 32, "preset": "quick"}
    arguments = {"model": "cvae", "out": tmp_path / "run", "data_root": data_root, "device": "cpu"}
    child = multiprocessing.get_context("fork").Process(
        target=train_until_killed, args=({**arguments, **settings},)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    path = tmp_path / "run" / "checkpoint.pt"
    before, command = path.read_bytes(), [*command, "--epochs", "4"]
    monkeypatch.setattr(GenerativePipeline, "_save_pictures", lambda *_: None)  # slow

    code = run_here([*command, "--lr", "0.5", "--resume"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), "lr (0.001 there, 0.5 here)")
    state = torch.load(path, weights_only=True)
    torch.save({**state, "precision": "bfloat16"}, path)
    code = run_here([*command, "--resume", "--precision", "float32"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), "of a training in bfloat16, not in float32")
    path.write_bytes(before)

    assert run_here([*command, "--resume"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith(f"going on after epoch 2 from {path}\n")
    whole = GenerativePipeline(**{**arguments, **settings, "out": tmp_path / "whole"})
    whole.train()
    first, second = (
        torch.load(tmp_path / out / "weights.pt", weights_only=True) for out in ("run", "whole")
    )
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert first["classes"] == state["classes"] == list(BLOOD_CLASSES)
    # A finished run has nothing to go on with, and is shown.
    path.unlink()
    assert run_here([*command, "--resume"], monkeypatch) == 0


def test_tensorboard_shows_losses_speed_and_a_labelled_grid(data_root, tmp_path, capsys):
    pipeline = GenerativePipeline(
        *("cwgan_gp", "quick"),
        **{"out": tmp_path / "run", "data_root": data_root, "device": "cpu"},
        **{"epochs": 12, "base_channels": 2, "batch_size": 64, "critic_steps": 1},
    )
    pipeline.train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0}).Reload()
    steps = [2 * epoch for epoch in range(1, 13)]
    names = {"loss_critic", "loss_generator", "wasserstein", "gradient_penalty"}
    assert set(events.Tags()["scalars"]) == {*names, "epoch", "images_per_second"}
    for name in (*names, "images_per_second"):
        assert [event.step for event in events.Scalars(name)] == steps
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))
    losses = [event.value for event in events.Scalars("wasserstein")]
    assert losses == pytest.approx([row["wasserstein"] for row in pipeline.history])
    # A quarter, half, three quarters, the tenth epoch, the end.
    grids = events.Images("samples")
    assert [event.step for event in grids] == [2 * epoch for epoch in (3, 6, 9, 10, 12)]
    plain = np.asarray(Image.open(tmp_path / "run" / "progress" / "100.png"))
    assert grids[-1].height == len(plain) and grids[-1].width > plain.shape[1]
    assert len(list((tmp_path / "run" / "progress").iterdir())) == 4


def test_a_labelled_grid_has_each_name_beside_its_row():
    images = torch.full((4, 3, 16, 16), 200, dtype=torch.uint8)
    plain = labelled_grid(images, [], 2)
    assert plain.shape == (4 * 35, 4 * 35, 3)
    named = labelled_grid(images, ["", "a long name"], 2)
    margin = named.shape[1] - plain.shape[1]
    assert np.array_equal(named[:, margin:], plain)
    text = (named[:, :margin] < 128).any((1, 2))
    assert text[70:].any() and not text[:70].any() and margin > 40
    assert (named[:, :4] == 255).all()  # nothing is cut off


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory) -> dict[str, GenerativePipeline]:
    """One model that is told the class and one that is not."""
    settings = {
        "cvae": {"channels": (8, 16), "conditional": True},
        "dcgan": {
            "generator_channels": (8, 8, 8, 4),
            "discriminator_channels": (4, 8, 8, 8),
            "validation_epochs": 0,
        },
    }
    return {
        name: trained_model(name, tmp_path_factory.mktemp(name), data_root, **own)
        for name, own in settings.items()
    }


def trained_model(name: str, out: Path, data_root: Path, **settings) -> GenerativePipeline:
    settings = {"epochs": 1, "batch_size": 32, **settings}
    made = GenerativePipeline(
        name, "quick", out=out, data_root=data_root, device="cpu", **settings
    )
    made.train()
    return made


def draw(monkeypatch, checkpoint: Path, out: Path, *options: str) -> int:
    arguments = ["train.py", "sample", "--checkpoint", str(checkpoint), "--out", str(out)]
    return run_here([*arguments, "--device", "cpu", *options], monkeypatch)


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}


def test_images_of_the_classes_asked_for(trained, tmp_path, monkeypatch, capsys):
    weights = trained["cvae"].weights_path
    asked = ("--class", "platelet", "--class", "immature granulocyte", "--n", "3")
    assert draw(monkeypatch, weights, tmp_path / "a", *asked, "--seed", "4") == 0
    files = read(tmp_path / "a")
    names = [f"{kind}_000{i}.png" for kind in ("platelet", "immature granulocyte") for i in "012"]
    assert files.keys() == {*names, "grid.png"} and len({files[name] for name in names}) == 6
    assert Image.open(tmp_path / "a" / names[0]).size == (28, 28)

    # The same from the checkpoint and for one class alone; others from another seed.
    alone = ("--class", "platelet", "--n", "3")
    path = trained["cvae"].checkpoint_path
    assert draw(monkeypatch, path, tmp_path / "b", *alone, "--seed", "4") == 0
    assert draw(monkeypatch, path, tmp_path / "c", *alone) == 0
    for name in names[:3]:
        assert files[name] == read(tmp_path / "b")[name] != read(tmp_path / "c")[name]
    capsys.readouterr()


def test_the_grid_of_one_class_has_eight_rows_and_one_name(trained, tmp_path, monkeypatch):
    """The class under the name of its folder in PBC."""
    weights = trained["cvae"].weights_path
    asked = ("--class", "ig", "--class", "immature granulocyte", "--n", "65")
    assert draw(monkeypatch, weights, tmp_path / "a", *asked) == 0
    names = {f"immature granulocyte_{i:04d}.png" for i in range(65)}
    assert read(tmp_path / "a").keys() == {*names, "grid.png"}
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    side = 2 * 29  # enlarged, with the line between
    assert len(grid) == 8 * side + 2
    margin = grid[:, : -8 * side - 2]
    assert (margin[:side] < 128).any() and (margin[side:] == 255).all()
    last = np.asarray(Image.open(tmp_path / "a" / "immature granulocyte_0063.png"))
    assert np.array_equal(grid[-side:-2:2, -side:-2:2], last)

    assert draw(monkeypatch, weights, tmp_path / "b", "--class", "ig", "--n", "9") == 0
    assert Image.open(tmp_path / "b" / "grid.png").size == (grid.shape[1], 2 * side + 2)
    both = ("--class", "ig", "--class", "platelet", "--n", "9")
    assert draw(monkeypatch, weights, tmp_path / "c", *both) == 0
    assert Image.open(tmp_path / "c" / "grid.png").size == (grid.shape[1], 2 * side + 2)


def test_all_classes_of_weights_that_name_none(trained, tmp_path, monkeypatch):
    """As they were written before they named the classes: those of blood cells."""
    state = torch.load(trained["cvae"].weights_path, weights_only=True)
    del state["classes"]
    torch.save(state, tmp_path / "old.pt")
    assert draw(monkeypatch, tmp_path / "old.pt", tmp_path / "out", "--n", "1") == 0
    assert read(tmp_path / "out").keys() == {
        *(f"{name}_0000.png" for name in BLOOD_CLASSES),
        "grid.png",
    }


def test_a_model_without_classes_draws_the_pipeline_s_images(trained, tmp_path, monkeypatch):
    weights = trained["dcgan"].weights_path
    assert draw(monkeypatch, weights, tmp_path / "out", "--n", "5", "--seed", "9") == 0
    expected = trained["dcgan"].sample(torch.zeros(5, dtype=torch.int64), seed=9)
    for number, image in enumerate(expected):
        found = np.asarray(Image.open(tmp_path / "out" / f"image_000{number}.png"))
        assert np.array_equal(found, image.permute(1, 2, 0).numpy())
    assert len(read(tmp_path / "out")) == 6


def test_a_shipped_file_draws(tmp_path, monkeypatch):
    shipped = ROOT / "results" / "checkpoints" / "cvae-best.safetensors"
    assert draw(monkeypatch, shipped, tmp_path / "out", "--class", "monocyte", "--n", "1") == 0
    assert read(tmp_path / "out").keys() == {"monocyte_0000.png", "grid.png"}


def unbalanced(tiny_arrays: dict, folder: Path) -> None:
    """Of basophils 20 to train on, of the others 5, of platelets 1."""
    labels = tiny_arrays["train_labels"].ravel()
    keep = np.concatenate(
        [np.flatnonzero(labels == c)[: {0: 20, 7: 1}.get(c, 5)] for c in range(8)]
    )
    changed = {name: tiny_arrays[name][keep] for name in ("train_images", "train_labels")}
    np.savez(folder / "bloodmnist.npz", **{**tiny_arrays, **changed})


def test_rare_classes_are_filled_up(trained, tiny_arrays, tmp_path, monkeypatch, capsys):
    unbalanced(tiny_arrays, tmp_path)
    out, options = tmp_path / "out", ("--fill-up", "--data-root", str(tmp_path))
    # A model of another train split may have seen this one's test images.
    code = draw(monkeypatch, trained["cvae"].weights_path, out, *options)
    check_refusal(code, *capsys.readouterr(), "train it on this split first")
    assert not out.exists()
    own = {"channels": (8, 16), "conditional": True}
    weights = trained_model("cvae", tmp_path / "run", tmp_path, **own).weights_path
    capsys.readouterr()
    assert draw(monkeypatch, weights, out, *options) == 0
    missing = dict.fromkeys(BLOOD_CLASSES[1:7], 15) | {"platelet": 19}
    files = read(out)
    for name, n in missing.items():
        own = sorted(file for file in files if file.startswith(f"{name}/"))
        assert own == [f"{name}/synthetic_{name}_{i:04d}.png" for i in range(n)]
    grid = Image.open(io.BytesIO(files.pop("grid.png")))
    assert 7 * 56 <= grid.height < 8 * 56 <= grid.width  # seven classes' rows of eight, enlarged
    assert len(files) == sum(missing.values()) and not (out / "basophil").exists()
    drawn = ("--class", "platelet", "--n", "19")
    assert draw(monkeypatch, weights, tmp_path / "drawn", *drawn) == 0
    assert not set(read(tmp_path / "drawn").values()) & set(files.values())
    with open(out / "synthetic.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["file"]: line["class"] for line in lines} == {f: f.split("/")[0] for f in files}
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {(line["checkpoint_sha256"], line["seed"]) for line in lines} == {(sha256, "0")}
    assert "platelet +19" in capsys.readouterr().out


BAD_DRAWINGS = {
    "unknown class": ("cvae", ["--class", "basophile"], "no class 'basophile'; it draws basophil,"),
    "class of a model without": ("dcgan", ["--class", "basophil"], "can't be asked for a class"),
    "fill-up of a model without": ("dcgan", ["--fill_up", "--data-root"], "fills up none"),
    "fill-up of balanced data": ("cvae", ["--fill_up", "--data-root"], "none to fill up"),
    "fill-up of so many": ("cvae", ["--fill_up", "--n", "3"], "leave --class and --n out"),
    "data that is not counted": ("cvae", ["--dataset", "demo"], "counted by --fill_up"),
    "no image": ("cvae", ["--n", "0"], "--n must be at least 1"),
    "no file": ("none", [], "none does not exist"),
    "cut short": ("broken", [], "is broken"),
    "foreign": ("foreign", [], "is no weight file"),
    "no tensors": ("no tensors", [], "is no weight file"),
    "unknown device": ("cvae", ["--device", "abacus"], "unknown device"),
    "unknown option": ("cvae", ["--number", "3"], "--number"),
}


@pytest.mark.parametrize("which, options, words", BAD_DRAWINGS.values(), ids=BAD_DRAWINGS)
def test_bad_drawings(which, options, words, trained, data_root, tmp_path, monkeypatch, capsys):
    path = trained[which].weights_path if which in trained else tmp_path / which
    if which == "broken":
        path.write_bytes(trained["cvae"].weights_path.read_bytes()[:1000])
    elif which == "foreign":
        torch.save({"state": {}}, path)
    elif which == "no tensors":
        kept = torch.load(trained["cvae"].weights_path, weights_only=True)
        torch.save({**kept, "state": {name: 0 for name in kept["state"]}}, path)
    if options[-1:] == ["--data-root"]:
        options = [*options, str(data_root)]
    code = draw(monkeypatch, path, tmp_path / "out", *options)
    check_refusal(code, *capsys.readouterr(), words)
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_left_alone_and_a_full_disk_leaves_nothing(
    trained, tmp_path, monkeypatch, capsys
):
    weights, out = trained["cvae"].weights_path, tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code = draw(monkeypatch, weights, out, "--n", "1")
    check_refusal(code, *capsys.readouterr(), "exists and is not empty")
    assert os.listdir(out) == ["mine.txt"]
    (out / "mine.txt").unlink()

    def fail(self, path, **_):
        if "lymphocyte" in str(path):
            raise OSError(28, "No space left on device")
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Image.Image, "save", fail)
    code = draw(monkeypatch, weights, out, "--n", "1")
    check_refusal(code, *capsys.readouterr(), "no space left on the disk")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == []
