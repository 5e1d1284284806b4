"""The notebooks as they lie in git: tidy, without outputs, with the parameters the suite passes.

That all of them run from top to bottom is tested by tests/test_run_suite.py.
"""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from custom_models import MODELS

FOLDER = Path(__file__).parents[1] / "notebooks"
ALL = sorted(FOLDER.glob("*.ipynb"))
MODEL_PARAMETERS = {
    "preset",
    "dataset",
    "seed",
    "data_root",
    "extractor",
    "out",
    "device",
    "settings",
}


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_every_model_has_a_notebook():
    assert {path.stem for path in ALL} >= {*MODELS, "compare_models"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.startswith("# ")
    assert len(code_cells(path)) <= 13  # about twelve
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_no_class_and_no_training_loop(path):
    for cell in code_cells(path):
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef | ast.While)
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("backward", "training_step", "zero_grad")


def test_no_outputs_in_git():
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, ALL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("model", MODELS)
def test_parameters(model):
    parameters = papermill.inspect_notebook(FOLDER / f"{model}.ipynb")
    assert set(parameters) == MODEL_PARAMETERS
    assert parameters["preset"]["default"] == '"baseline"'
    usual = "mnist" if model == "cgan" else "bloodmnist"
    assert parameters["dataset"]["default"] == f'"{usual}"'


def test_parameters_of_your_own_images():
    parameters = papermill.inspect_notebook(FOLDER / "your_own_images.ipynb")
    others = {"data_dir", "model", "image_size", "epochs", "per_class"}
    assert set(parameters) == MODEL_PARAMETERS - {"dataset", "data_root"} | others
    assert parameters["data_dir"]["default"] == "None"


def test_runs_from_its_own_folder(tmp_path):
    """As it does when somebody opens it in Jupyter: imports and data are found from there."""
    parameters = {
        "preset": "quick",
        "dataset": "demo",
        "extractor": "demo",
        "device": "cpu",
        "out": str(tmp_path / "run"),
        "settings": {"epochs": 1, "channels": [8, 16]},
    }
    request = {
        "input_path": str(FOLDER / "cvae.ipynb"),
        "output_path": str(tmp_path / "executed.ipynb"),
        "parameters": parameters,
        "cwd": str(FOLDER),
        "progress_bar": False,
    }
    code = f"import papermill; papermill.execute_notebook(**{request!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [o for cell in code_cells(tmp_path / "executed.ipynb") for o in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 7  # data, losses, progress, samples, reconstructions, neighbours, pairs
    assert (tmp_path / "run" / "record.json").exists()
