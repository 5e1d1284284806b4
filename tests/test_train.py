"""The training command: one line and exit code 2 for bad input, and nothing but torch, numpy,
matplotlib and Pillow needed for a whole run."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = ["--set", "epochs=1", "--set", "channels=(8, 16)", "--set", "batch_size=32"]


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


@pytest.mark.parametrize("model", ["dcgan", "ddpm", "cwgan_gp"])
def test_every_model_runs_from_the_command_line(model, command, tmp_path, monkeypatch, capsys):
    settings = {
        "dcgan": ["generator_channels=(8, 8, 8, 4)", "discriminator_channels=[4, 8, 8, 8]"],
        "ddpm": ["channels=(8, 8)", "sampler=ddim", "sampling_steps=2"],
        "cwgan_gp": ["base_channels=4", "critic_steps=2"],
    }[model]
    options = [option for pair in settings for option in ("--set", pair)]
    command = command[: command.index("--set")]
    small = ["--set", "epochs=1", "--set", "batch_size=16", *options]
    assert run_here([*command, "--model", model, "--seed", "3", *small], monkeypatch) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["model"], record["seed"]) == (model, 3)


BAD = {
    "unknown model": (["--model", "vae"], "unknown model 'vae'"),
    "unknown preset": (["--preset", "huge"], "no preset 'huge'"),
    "unknown setting": (["--set", "depth=3"], "no setting 'depth'"),
    "setting without value": (["--set", "epochs"], "NAME=VALUE"),
    "setting of a wrong type": (["--set", "epochs=many"], "epochs must be int, got 'many'"),
    "setting out of range": (["--set", "lr=-1"], "lr must be above 0"),
    "too large a batch": (["--set", "batch_size=500"], "lower batch_size"),
    "unknown data set": (["--dataset", "cats"], "unknown data set 'cats'"),
    "missing data": (["--dataset", "pbc", "--data-root", "none"], "PBC_dataset_normal_DIB"),
    "unknown device": (["--device", "abacus"], "unknown device 'abacus'"),
    "missing extractor": (["--extractor", "none.pt"], "none.pt"),
    "unknown option": (["--models", "cvae"], "--models"),
    "wrong seed": (["--seed", "one"], "'one'"),
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


def test_cuda_without_a_gpu(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code = run_here([*command, "--device", "cuda"], monkeypatch)
    check_refusal(code, *capsys.readouterr(), "no CUDA GPU")
    assert list(tmp_path.iterdir()) == []


def test_missing_model_option(monkeypatch, capsys):
    check_refusal(run_here(["train.py"], monkeypatch), *capsys.readouterr(), "--model")


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
    code = BARE.format(absent=ABSENT, arguments=arguments)
    done = run_outside(["-c", code], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "FD (demo)" in done.stdout and "Traceback" not in done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["dataset"]["name"] == "demo" and record["dataset"]["n"] == 1400
    assert record["metrics"]["distance_name"] == "FD (demo)"
    assert not (tmp_path / "run" / "tensorboard").exists()
    for picture in ("samples.png", "losses.png", "progress/100.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 0


def test_a_missing_inception_is_one_line_without_its_package(command, tmp_path):
    """`inception` needs pytorch-fid and a download: neither is here."""
    arguments = [*command, "--extractor", "inception"]
    code = BARE.format(absent=ABSENT, arguments=arguments)
    done = run_outside(
        ["-c", code], PYTHONPATH=str(ROOT), TORCH_HOME=str(tmp_path), https_proxy="127.0.0.1:9"
    )
    check_refusal(done.returncode, done.stdout, done.stderr, "--extractor FILE")
