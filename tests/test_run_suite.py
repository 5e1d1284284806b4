"""The whole suite at one epoch on the demo cells, with what can go wrong in it."""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import torch

import run_suite
from custom_models import MODELS, cvae, make_config
from custom_models.ablations import GRIDS, Ablation
from evaluation.features import load_extractor
from evaluation.judge import measure_real_images
from generative_pipeline import GenerativePipeline
from run_suite import Runner, Task
from utils import InputError

ROOT = Path(__file__).parents[1]
QUICK = ["--preset", "quick", "--dataset", "demo", "--extractor", "demo", "--device", "cpu"]
QUICK += ["--seeds", "1"]
TINY = [*QUICK, "--set", "epochs=1"]


def suite(out: Path, *more: str, options: list[str] = TINY) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "run_suite.py", *options, "--out", out, *more],
        capture_output=True,
        text=True,
        cwd=out.parent,
        check=False,
    )


def run_of(out: Path, model: str) -> Path:
    return out / "runs" / f"{model}-quick" / "seed0"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """All models, where the DCGAN meets a broken checkpoint: (results, what was printed)."""
    out = tmp_path_factory.mktemp("suite") / "results"
    broken = run_of(out, "dcgan") / "checkpoint.pt"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no checkpoint")
    done = suite(out, "--jobs", "2")
    return out, done, sorted(p.relative_to(out) for p in out.rglob("*.ipynb"))


@pytest.fixture(scope="module")
def second(first):
    """Again, with the fault removed and the CVAE's executed notebook lost."""
    out, _, _ = first
    (run_of(out, "dcgan") / "checkpoint.pt").unlink()
    (run_of(out, "cvae") / "notebook.ipynb").unlink()
    before = (run_of(out, "cvae") / "checkpoint.pt").stat().st_mtime_ns
    done = suite(out, "--jobs", "2")
    return out, done, before


def test_a_failed_run_is_named_and_the_others_go_on(first):
    out, done, notebooks = first
    assert done.returncode == 1
    assert "failed: dcgan quick seed 0: InputError:" in done.stderr
    assert "checkpoint.pt is broken" in done.stderr
    good = [m for m in MODELS if m != "dcgan"]
    assert all((run_of(out, model) / "record.json").exists() for model in good)
    names = {str(path) for path in notebooks}
    assert {f"runs/{m}-quick/seed0/notebook.ipynb" for m in good} <= names
    assert "runs/dcgan-quick/seed0/notebook.ipynb" not in names
    assert "runs/dcgan-quick/seed0/failed.ipynb" in names
    assert "compare_models.ipynb" in names


def test_second_call_does_what_is_missing(second):
    out, done, before = second
    assert done.returncode == 0, done.stderr[-2000:]
    assert "5 runs: 3 finished before, 2 to do" in done.stdout
    assert not (run_of(out, "dcgan") / "failed.ipynb").exists()
    assert not list(out.rglob("*.partial"))
    # A finished run whose notebook is missing is shown again, not trained again.
    assert (run_of(out, "cvae") / "notebook.ipynb").exists()
    assert (run_of(out, "cvae") / "checkpoint.pt").stat().st_mtime_ns == before


def test_table_and_figures(second):
    out, done, _ = second
    table = (out / "results_quick.md").read_text()
    assert "FD (demo)" in table and "real images (held out)" in table
    assert all(f"| {model} | quick | 1 |" in table for model in MODELS)
    assert not (out / "results.md").exists()  # quick runs are no results
    for name in ("results_quick.csv", "comparison.png", "distances.png", "compare_models.ipynb"):
        assert (out / name).exists()
    assert "results/results_quick.md" in done.stdout
    assert "results/runs/ddpm-quick/seed0/notebook.ipynb" in done.stdout


def test_executed_notebooks_show_everything(second):
    out, _, _ = second
    for model in MODELS:
        path = run_of(out, model) / "notebook.ipynb"
        outputs = [
            output
            for cell in nbformat.read(path, as_version=4).cells
            for output in cell.get("outputs", [])
        ]
        # One model has a table and a picture of every class by itself besides.
        besides = 1 if model == "cwgan_gp" else 0
        assert sum("image/png" in o.get("data", {}) for o in outputs) == 7 + besides
        assert sum("text/markdown" in o.get("data", {}) for o in outputs) == 2 + besides
        assert not [o for o in outputs if o.get("name") == "stderr"]
        assert not [o for o in outputs if run_suite.WIDGET in o.get("data", {})]


def test_finished_suite_is_skipped(second, monkeypatch, capsys):
    out, _, _ = second
    executed = []
    monkeypatch.setattr(Runner, "execute", lambda self, task: executed.append(task.name))
    assert run_suite.main([*TINY, "--out", str(out)]) == 0
    assert executed == ["comparison"]
    assert "5 runs: 5 finished before, 0 to do" in capsys.readouterr().out


def test_a_row_of_a_grid_is_an_executed_notebook(second, monkeypatch, capsys):
    """With its own settings; the suite's own run is the baseline."""
    out, _, _ = second
    rows = (
        Ablation("baseline", "cvae", "quick"),
        Ablation("narrow", "cvae", "quick", {"channels": (8, 16), "epochs": 1}, "fewer channels"),
    )
    monkeypatch.setitem(GRIDS, "tiny", rows)
    short = dataclasses.replace(cvae.PRESETS["quick"], epochs=1)  # as the suite's run was
    monkeypatch.setitem(cvae.PRESETS, "quick", short)
    arguments = ["--dataset", "demo", "--extractor", "demo", "--device", "cpu", "--seeds", "1"]
    assert run_suite.main(["--ablations", "tiny", *arguments, "--out", str(out)]) == 0
    assert "2 runs: 1 finished before, 1 to do" in capsys.readouterr().out
    folder = out / "ablations" / "tiny"
    run = folder / "cvae-quick-narrow" / "seed0"
    assert run_suite._is_whole(run / "notebook.ipynb")
    assert json.loads((run / "record.json").read_text())["config"]["channels"] == [8, 16]
    distances = [
        json.loads((place / "record.json").read_text())["metrics"]["frechet_distance"]
        for place in (run_of(out, "cvae"), run)
    ]
    table = (folder / "table.md").read_text()
    assert f"| {distances[1]:.1f} (" in table
    assert f") | {distances[1] - distances[0]:+.1f} |" in table
    assert (folder / "ablations.png").stat().st_size > 0


def test_kept_weights_are_measured_with_another_extractor(second, tiny_extractor, tmp_path):
    source, _, _ = second
    weights = run_of(source, "dcgan") / "weights.pt"
    aside = weights.rename(tmp_path / "weights.pt")
    other = tmp_path / "other"
    again = ["--remeasure", str(source), "--extractor", str(tiny_extractor)]
    try:
        done = suite(other, *again, "--models", "cvae", "dcgan", options=QUICK)
    finally:
        aside.rename(weights)
    assert done.returncode == 1
    assert f"failed: dcgan quick seed 0: {weights} was not kept" in done.stderr
    assert list(other.rglob("record.json")) == [run_of(other, "cvae") / "record.json"]
    records = [
        json.loads((run_of(out, "cvae") / "record.json").read_text()) for out in (source, other)
    ]
    names = [r["metrics"]["protocol"]["extractor"] for r in records]
    assert names == ["demo-64", "tiny-8"]
    for field in ("seconds", "steps", "device", "config", "history"):
        assert records[0][field] == records[1][field]
    assert "cvae quick seed 0: FD (tiny-8)" in done.stdout
    assert not (run_of(other, "cvae") / "checkpoint.pt").exists()
    table = (other / "results_quick.md").read_text()
    assert "FD (tiny-8)" in table and "dcgan" not in table

    # Weights that lie there already may be of another training.
    own = run_of(other, "cvae") / "weights.pt"
    own.write_bytes(b"another training")
    done = suite(other, *again, "--models", "cvae", options=QUICK)
    assert f"{own} holds the weights of another training; choose another --out" in done.stderr
    assert done.returncode == 1 and own.read_bytes() == b"another training"


def test_measuring_anew_does_not_overwrite_what_it_reads(tmp_path, bad_input):
    with bad_input("overwrite its own records", "--out"):
        run_suite.main([*QUICK, "--remeasure", str(tmp_path), "--out", str(tmp_path)])
    with bad_input("holds no record"):
        run_suite.main([*QUICK, "--remeasure", str(tmp_path), "--out", str(tmp_path / "new")])


def options_of(*more: str) -> argparse.Namespace:
    options = run_suite.parse_arguments(["--remeasure", "x", "--device", "cpu", *more])
    run_suite.check(options)
    return options


@pytest.mark.parametrize(
    "more, expected",
    [
        ((), {"baseline 0", "baseline 3", "quick 1"}),
        (("--preset", "quick"), {"quick 1"}),
        (("--preset", "baseline", "--seeds", "1"), {"baseline 0"}),
        (("--seeds", "2"), {"baseline 0", "quick 1"}),
        (("--models", "dcgan"), set()),
        (("--dataset", "demo"), {"baseline 7"}),
    ],
)
def test_runs_to_measure_anew_are_those_that_the_options_leave(more, expected):
    runs = [("baseline", 0), ("baseline", 3), ("quick", 1), ("baseline", 7)]
    records = [
        {
            **{"model": "cvae", "preset": preset, "seed": seed},
            "dataset": {"source": "demo" if seed == 7 else "bloodmnist"},
        }
        for preset, seed in runs
    ]
    options = options_of(*more)
    found = {f"{r['preset']} {r['seed']}" for r in records if run_suite._is_asked_for(r, options)}
    assert found == expected


def test_the_comparison_of_runs_measured_anew_has_their_image_size(monkeypatch, bad_input):
    def records(*sizes: int) -> list[dict]:
        return [
            {
                **{"model": "cwgan_gp", "preset": "best_small", "seed": seed},
                **{"dataset": {"source": "pbc"}, "config": {"image_size": size}},
            }
            for seed, size in enumerate(sizes)
        ]

    options = options_of("--dataset", "pbc")
    monkeypatch.setattr(run_suite, "collect", lambda _: records(64, 64))
    chosen = run_suite.records_to_remeasure(options)
    assert len(chosen) == 2
    assert run_suite._compare_task(options, chosen).parameters["image_size"] == 64
    monkeypatch.setattr(run_suite, "collect", lambda _: records(128, 64))
    with bad_input("64 and 128 pixels", "of one size"):
        run_suite.records_to_remeasure(options)


def test_a_run_measured_anew_keeps_its_image_size(monkeypatch, tmp_path):
    """Even where it is no setting of its own, and not the data set's usual one."""
    made = {}

    class Pipeline:
        def __init__(self, model, **arguments):
            made.update(arguments)

        def train(self):
            pass

    monkeypatch.setattr(run_suite, "GenerativePipeline", Pipeline)
    config = json.loads(json.dumps(dataclasses.asdict(make_config("cwgan_gp", "quick"))))
    record = {"model": "cwgan_gp", "preset": "quick", "seed": 0, "config": config}
    record |= {"dataset": {"source": "pbc"}, "measured": {"precision": "bfloat16"}}
    for can, precision in ((True, "bfloat16"), (False, None)):  # None: the device's usual one
        monkeypatch.setattr(run_suite, "has_bfloat16_instructions", lambda can=can: can)
        run_suite._trained_pipeline(record, tmp_path, "cpu")
        assert (made["image_size"], made["precision"]) == (28, precision)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ("--models cwgan_gp --preset best --dataset pbc", 128),
        ("--models cwgan_gp --preset best --dataset pbc --set image_size=64", 64),
        ("--models cgan --dataset mnist", 28),
        ("--models cvae --dataset celeba:Eyeglasses", 64),
    ],
)
def test_the_comparison_has_the_size_of_the_runs(arguments, size, tmp_path):
    options = run_suite.parse_arguments([*arguments.split(), "--out", str(tmp_path)])
    run_suite.check(options)
    assert run_suite._compare_task(options, []).parameters["image_size"] == size


def test_a_model_that_cannot_draw_the_usual_size_is_refused(tmp_path, bad_input):
    with bad_input("image_size must be 28", "best takes other sizes", "got 128"):
        run_suite.main(["--models", "dcgan", "--dataset", "pbc", "--out", str(tmp_path)])


def test_measuring_anew_takes_only_what_fits_the_options(second, tmp_path, bad_input):
    source, _, _ = second
    again = ["--remeasure", str(source), "--out", str(tmp_path / "new")]
    with bad_input("none of the", "asked for"):
        run_suite.main([*QUICK, *again, "--preset", "baseline"])
    with bad_input("unknown model 'vae'"):
        run_suite.main([*QUICK, *again, "--models", "vae"])
    with bad_input("--set does not go with --remeasure"):
        run_suite.main([*QUICK, *again, "--set", "epochs=2"])
    with bad_input("--jobs does not go with --remeasure"):
        run_suite.main([*QUICK, *again, "--jobs", "2"])
    assert not (tmp_path / "new").exists()


def test_a_half_written_notebook_is_not_taken_for_a_finished_one(second, tmp_path):
    out, _, _ = second
    whole = run_of(out, "cvae") / "notebook.ipynb"
    assert run_suite._is_whole(whole)
    text = whole.read_text()
    cut = tmp_path / "notebook.ipynb"
    cut.write_text(text[: len(text) // 2])
    assert not run_suite._is_whole(cut)
    content = json.loads(text)
    content["metadata"]["papermill"]["end_time"] = None
    cut.write_text(json.dumps(content))
    assert not run_suite._is_whole(cut)


def test_a_measured_run_whose_weights_are_gone_is_not_done_again(second, tmp_path, monkeypatch):
    """Those of large runs come with no copy of the repository, nor do all notebooks."""
    out = shutil.copytree(second[0], tmp_path / "results")
    for name in ("notebook.ipynb", "weights.pt", "checkpoint.pt"):
        (run_of(out, "cvae") / name).unlink()
    (run_of(out, "dcgan") / "notebook.ipynb").unlink()
    to_do = []
    monkeypatch.setattr(run_suite, "measure_real_cells", lambda task: None)
    monkeypatch.setattr(run_suite, "run_all", lambda tasks, jobs: to_do.extend(tasks) or {})
    assert run_suite.main([*TINY, "--out", str(out), "--models", "cvae", "dcgan"]) == 0
    assert [task.source.stem for task in to_do] == ["dcgan"]


def test_runs_of_another_extractor_are_refused_before_anything_starts(
    second, tiny_extractor, bad_input
):
    out, _, _ = second
    with bad_input("is of another run", "extractor_sha256", "(out)"):
        run_suite.main([*TINY, "--extractor", str(tiny_extractor), "--out", str(out)])


def test_new_runs_under_other_rules_are_refused_before_anything_starts(
    second, tiny_extractor, bad_input
):
    """Their comparison would replace the tables of the runs that are there."""
    out, _, _ = second
    other = ["--models", "cvae", "--preset", "baseline", "--extractor", str(tiny_extractor)]
    with bad_input(str(out / "runs"), "measured with demo-64", "choose another folder with --out"):
        run_suite.main([*TINY, *other, "--out", str(out)])
    assert not (out / "runs" / "cvae-baseline").exists()


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--models", "cgan", "--dataset", "mnist"], "results/mnist28"),
        (["--models", "cwgan_gp", "--dataset", "pbc", "--set", "image_size=64"], "results/pbc64"),
        (["--models", "cgan", "--dataset", "folder", "--data-root", "x"], "results/folder-x64"),
        (["--models", "cvae"], "results"),
        (["--ablations", "best"], "results"),
    ],
)
def test_data_and_size_have_a_folder_of_their_own(arguments, folder, monkeypatch):
    """As train.py has it, so that one's own images never come into a folder that git tracks."""
    monkeypatch.setenv("DATA_ROOT", "")  # the command sets it
    monkeypatch.setenv("EXTRACTOR", "")
    options = run_suite.parse_arguments(arguments)
    run_suite.check(options)
    assert options.out == ROOT / folder


def test_an_end_while_real_cells_are_measured_does_not_wait_for_them():
    """As SIGTERM makes it, which a machine's manager follows by a kill."""
    code = """
import signal, sys, threading, time, os, multiprocessing, run_suite
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
run_suite._measure_real_cells = time.sleep  # which the other process finds by its name
def end():
    while not multiprocessing.active_children():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end).start()
run_suite.measure_real_cells(3600)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 143


def test_broken_record_is_named(second):
    out, _, _ = second
    record = run_of(out, "cvae") / "record.json"
    text = record.read_text()
    record.write_text(text[:100])
    try:
        with pytest.raises(InputError, match=r"cvae-quick/seed0/record\.json is not JSON"):
            run_suite.main([*TINY, "--out", str(out)])
    finally:
        record.write_text(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "vae"], "unknown model 'vae'"),
        (["--preset", "huge"], "no preset 'huge'"),
        (["--set", "epoch=3"], "no setting 'epoch'"),
        (["--set", "epochs"], "NAME=VALUE"),
        (["--set", "epochs=many"], "epochs must be int"),
        (["--dataset", "cells"], "unknown data set 'cells'"),
        (["--extractor", "nothing.pt"], "nothing.pt does not exist"),
        (["--device", "tpu9"], "unknown device 'tpu9'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--seed", "x"], "--help"),
    ],
)
def test_bad_input_is_told_before_anything_starts(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_suite.main([*TINY, "--models", "cvae", *arguments, "--out", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


def test_models_of_different_sizes_are_refused_before_anything_starts(tmp_path, bad_input):
    with bad_input("different sizes (ddpm 128, cwgan_gp 64)", "--set image_size=64"):
        run_suite.main(["--preset", "best_small", "--dataset", "pbc", "--out", str(tmp_path)])


def test_unknown_parameter(tmp_path, monkeypatch):
    """Papermill would only warn, and run the same seed five times."""
    (tmp_path / "notebooks").mkdir()
    text = (ROOT / "notebooks" / "cvae.ipynb").read_text()
    (tmp_path / "notebooks" / "cvae.ipynb").write_text(text.replace("seed = 0", "sed = 0"))
    monkeypatch.setattr(run_suite, "ROOT", tmp_path)
    with pytest.raises(InputError, match="no parameter seed"):
        run_suite.main([*TINY, "--models", "cvae", "--out", str(tmp_path / "results")])


def test_exit_code_of_bad_input(tmp_path):
    done = suite(tmp_path / "results", "--models", "vae")
    assert done.returncode == 2
    assert done.stderr == ("error: unknown model 'vae'; known are " + ", ".join(MODELS) + "\n")


# ---------------------------------------------------------------------------------------------
# Kernels that die
# ---------------------------------------------------------------------------------------------


def task_of(folder: Path, source: str) -> Task:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbformat.write(notebook, folder / "source.ipynb")
    return Task("a run", folder / "source.ipynb", folder / "run" / "notebook.ipynb", {})


def test_a_folder_that_cannot_be_made_is_a_cause(tmp_path):
    task = task_of(tmp_path, "")
    task.target.parent.write_text("a file")
    assert f"{task.target.parent} cannot be written" in Runner(jobs=1).execute(task)


def test_killed_kernel_is_reported(tmp_path):
    task = task_of(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "the kernel died" in Runner(jobs=1).execute(task)
    assert not task.target.exists()


def test_a_kernel_that_does_not_start_is_tried_again(tmp_path, monkeypatch):
    causes = [f"RuntimeError: {run_suite.NOT_STARTED}", "ValueError: its own"]
    monkeypatch.setattr(Runner, "_attempt", lambda self, task, partial: causes.pop(0))
    assert Runner(jobs=1).execute(task_of(tmp_path, "")) == "ValueError: its own"
    assert causes == []


def test_the_kernel_is_this_interpreter(tmp_path):
    task = task_of(tmp_path, "import sys\nprint(sys.executable)")
    assert Runner(jobs=1).execute(task) is None
    (cell,) = nbformat.read(task.target, as_version=4).cells
    assert cell.outputs[0].text.strip() == sys.executable


@pytest.mark.parametrize(
    ("model", "preset", "slow"),
    [
        ("ddpm", "baseline", True),
        ("ddpm", "best_128", True),
        ("ddpm", "best_small", False),
        ("cwgan_gp", "published", True),
        ("cwgan_gp", "best_64", True),
        ("cwgan_gp", "best", False),
    ],
)
def test_what_wants_a_gpu(model, preset, slow, tmp_path):
    source = ROOT / "notebooks" / f"{model}.ipynb"
    task = Task("a run", source, tmp_path / "notebook.ipynb", {"preset": preset})
    assert run_suite._takes_a_gpu(task) is slow


def test_runs_at_the_same_time_take_several_gpus_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # as torch may see fewer
    runner, task = Runner(jobs=3), task_of(tmp_path, "")
    task.parameters["device"] = "auto"
    with runner._a_gpu(task) as one, runner._a_gpu(task) as two:
        assert (one, two) == ({"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"})
        with runner._a_gpu(task) as three:
            assert three in (one, two)
    with runner._a_gpu(task) as again:
        assert again == one
    task.parameters["device"] = "cuda:1"  # one that was chosen
    with runner._a_gpu(task) as own:
        assert own == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Runner(jobs=1).gpus == Counter()


def test_stop_ends_kernels(tmp_path):
    """Else a training would go on after Ctrl-C."""
    task = task_of(tmp_path, "import time\ntime.sleep(600)")
    runner, causes = Runner(jobs=1), []
    thread = threading.Thread(target=lambda: causes.append(runner.execute(task)))
    thread.start()
    deadline = time.monotonic() + 60
    kernels = []
    while not kernels and time.monotonic() < deadline:
        time.sleep(0.2)
        kernels = [k for p in list(runner.processes.values()) for k in run_suite._kernels(p)]
    runner.stop()
    thread.join()
    assert causes and kernels
    assert not any(kernel.is_running() and kernel.status() != "zombie" for kernel in kernels)


def test_papermill_that_waits_for_a_dead_kernel_is_ended(monkeypatch):
    monkeypatch.setattr(run_suite, "KERNEL_GONE_SECONDS", 1)
    code = "import subprocess, time; subprocess.run(['sleep', '2']); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    assert run_suite._watch(process) is True
    assert process.returncode is not None


def test_diffusion_comes_last_on_a_cpu(tmp_path, monkeypatch, capsys):
    """At its full length it takes a day, and the others would wait for it."""
    order = []
    monkeypatch.setattr(run_suite, "run_all", lambda tasks, jobs: order.extend(tasks) or {})
    arguments = ["--models", "ddpm", "cvae", "--seeds", "2", "--dataset", "demo", "--device", "cpu"]
    arguments += ["--extractor", "demo", "--out", str(tmp_path / "results")]
    assert run_suite.main(arguments) == 0
    assert [task.source.stem for task in order] == ["cvae", "cvae", "ddpm", "ddpm"]
    assert "half a day or more on a CPU, and come last: diffusion, or" in capsys.readouterr().out
    order.clear()
    assert run_suite.main([*arguments, "--preset", "quick"]) == 0
    assert [task.source.stem for task in order] == ["ddpm", "cvae", "ddpm", "cvae"]
    assert "a day" not in capsys.readouterr().out


def test_real_cells_are_measured_once_before_the_first_run(tmp_path, empty_cache, monkeypatch):
    """Runs at the same time would each do it, behind a bar that stands."""
    floors = []
    monkeypatch.setattr(
        run_suite, "run_all", lambda *_: floors.extend(empty_cache.glob("floors/*.json")) or {}
    )
    assert run_suite.main([*TINY, "--models", "cvae", "--out", str(tmp_path / "results")]) == 0
    assert len(floors) == 1
    monkeypatch.setattr("evaluation.protocol.evaluate", lambda *_: pytest.fail("measured again"))
    pipeline = GenerativePipeline("cvae", "quick", "demo", device="cpu")
    measure_real_images(pipeline.sets, load_extractor("demo"))


@pytest.mark.parametrize(
    ("grids", "stage"), [([], "at 0 %"), ([25, 50], "at 50 %"), ([100], "being measured")]
)
def test_the_bar_tells_training_from_measuring(grids, stage, tmp_path):
    (tmp_path / "progress").mkdir()
    for percent in grids:
        (tmp_path / "progress" / f"{percent:03d}.png").touch()
    quarters = run_suite._quarters(Task("", Path(), tmp_path / "run.ipynb", {}))
    assert stage in run_suite.STAGES[quarters]
