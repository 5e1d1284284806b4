"""The notebook to play in: its functions, and its controls driven in a running kernel."""

import base64
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import save_file

from custom_models import exploring, make_config
from custom_models.drawing import SHIPPED_FORMAT, as_kept, load_model, sample, write_images
from utils import BLOOD_CLASSES, load_dataset

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "explore.ipynb"
SMALL = {
    ("cvae", "quick"): {},
    ("cvae", "best"): {
        "channels": (8, 8, 8),
        "latent_channels": 1,
        "prior_channels": (8,),
        "prior_steps": 3,
    },
    ("dcgan", "quick"): {},
    ("dcgan", "best"): {"generator_channels": (8, 8, 8), "latent_dim": 6},
    ("cwgan_gp", "quick"): {},
    ("cwgan_gp", "best"): {},
    ("cwgan_gp", "best_small"): {"image_size": 16},  # with noise
    ("cgan", "quick"): {"image_channels": 3},
    ("ddpm", "quick"): {"sampling_steps": 3},
    ("ddpm", "best"): {"channels": (8, 16), "blocks": 1, "sampling_steps": 3},
}


def build(name: str, preset: str, **settings) -> torch.nn.Module:
    """A small model whose weights are all random: fresh ones of some layers are zero."""
    torch.manual_seed(0)
    model = make_config(name, preset, **SMALL[name, preset], n_classes=8, **settings).build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def edm() -> torch.nn.Module:
    return build("ddpm", "best")


# ---------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, preset", SMALL)
def test_noise_left_alone_gives_the_plain_samples(name, preset):
    model, labels = build(name, preset), torch.tensor([1, 6, 3])
    noise = exploring.draw_noise(model, labels, seed=5)
    images = exploring.images_from(model, noise, labels)
    assert torch.equal(images, sample(model, labels, seed=5))
    assert not torch.equal(images, sample(model, labels, seed=6))
    assert not torch.equal(images[0], images[1])


def test_an_image_does_not_depend_on_those_beside_it():
    model, labels = build("cvae", "best"), torch.full((4,), 2)
    noise = exploring.draw_noise(model, labels, seed=0)
    alone = exploring.images_from(model, noise[2:3], labels[:1])
    beside = exploring.images_from(model, noise, labels)[2]
    assert (alone[0].float() - beside.float()).abs().mean() < 1


def test_more_noise_than_one_batch_is_refused(edm, bad_input):
    with bad_input("at most 128", "129"):
        exploring.draw_noise(edm, torch.zeros(129, dtype=torch.int64), seed=0)


@pytest.mark.parametrize("name", ["cvae", "ddpm"])
def test_between_two_cells_lie_their_own_images_at_the_ends(name):
    model, labels = build(name, "best"), torch.full((2,), 4)
    noise = exploring.draw_noise(model, labels, seed=0)
    path = exploring.between(noise[0], noise[1], 5)
    frames = exploring.images_from(model, path, labels[:1].expand(5))
    ends = exploring.images_from(model, noise, labels)
    assert torch.equal(frames[[0, -1]], ends)
    assert len({frame.numpy().tobytes() for frame in frames}) == 5


def test_the_way_between_keeps_the_variance():
    first, second = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    spread = exploring.between(first, second, 7).std(1)
    assert (spread - 1).abs().max() < 0.02
    assert ((first + second) / 2).std() < 0.75  # what a straight line does


class Linear(torch.nn.Module):
    """An image whose pixels are known linear functions of the latents."""

    conditional = False

    def __init__(self, slopes: torch.Tensor):
        super().__init__()
        self.config = dataclasses.make_dataclass("Config", ["latent_dim"])(len(slopes))
        self.slopes = slopes

    def generator(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents @ self.slopes).view(-1, 3, 4, 4)


def test_directions_are_those_that_change_the_image_most():
    rng = torch.Generator().manual_seed(0)
    ways = torch.linalg.qr(torch.randn(6, 6, generator=rng)).Q
    pixels = torch.linalg.qr(torch.randn(48, 6, generator=rng)).Q.T
    strengths = torch.tensor([1.5, 1.0, 0.5, 0.1, 0.1, 0.1])
    model = Linear((ways * strengths) @ pixels * 0.4)
    found = exploring.directions(model, 0, 3)
    assert torch.allclose(found @ found.T, torch.eye(3), atol=1e-5)
    agreement = (found @ ways[:, :3]).abs()
    assert torch.allclose(agreement, torch.eye(3), atol=0.05)
    for place in range(3):
        amounts = torch.zeros(2, 3)
        amounts[:, place] = torch.tensor([-1.5, 1.5])
        back, forwards = exploring.images_from(model, amounts @ found, None).float()
        assert forwards.mean() > back.mean()


def test_moving_by_nothing_moves_nothing_and_leaves_the_noise_alone():
    noise = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    before, ways = noise.clone(), torch.eye(6)[:2]
    assert torch.equal(exploring.move(noise, ways, [0.0, 0.0]), noise)
    moved = exploring.move(noise, ways, [2.0, -1.0])
    step = torch.tensor([2.0, -1, 0, 0, 0, 0, 0, 0, 0])
    assert torch.allclose(moved - noise, step.expand(4, 9), atol=1e-6)
    assert torch.equal(noise, before)


def test_guidance_one_is_the_plain_sample_and_more_is_another(edm):
    labels = torch.tensor([1, 5])
    noise = exploring.draw_noise(edm, labels, seed=0)
    plain = sample(edm, labels, seed=0)

    def drawn(**settings) -> torch.Tensor:
        return exploring.images_from(exploring.with_sampling(edm, **settings), noise, labels)

    assert torch.equal(drawn(guidance_scale=1.0), plain)
    others = [{"guidance_scale": 3.0}, {"sampling_steps": 9}, {"sampler": "heun"}]
    assert not any(torch.equal(drawn(**settings), plain) for settings in others)
    assert torch.equal(sample(edm, labels, seed=0), plain)  # the model itself is as it was


def test_a_sampler_that_is_unknown_is_refused(edm, bad_input):
    with bad_input("sampler", "heun"):
        exploring.with_sampling(edm, sampler="euler")


def test_images_are_written_whole_or_not_at_all(tmp_path, bad_input):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    out = tmp_path / "cells"
    with pytest.raises(ValueError):
        write_images(images, ["only one"], {}, out)
    assert not list(tmp_path.iterdir())
    write_images(images, ["a", "b"], {"seed": 3}, out)
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png", "images.json"]
    assert json.loads((out / "images.json").read_text()) == {"seed": 3}
    with bad_input(str(out), "not empty"):
        write_images(images, ["a", "b"], {}, out)


# ---------------------------------------------------------------------------------------------
# The notebook
# ---------------------------------------------------------------------------------------------


def ship(folder: Path, name: str, model: torch.nn.Module, preset: str, cells) -> None:
    """A checkpoint of this model, as if it had been trained on these cells, and its record."""
    about = {
        "format": SHIPPED_FORMAT,
        "model": name,
        "preset": preset,
        "seed": 0,
        "config": dataclasses.asdict(model.config),
        "classes": list(BLOOD_CLASSES),
        "image_size": 28,
        "dataset": cells.name,
        "dataset_sha256": cells.sha256(),
        "code_version": 1,
    }
    path = folder / f"{name}-{preset}.safetensors"
    tensors = {k: v.contiguous() for k, v in as_kept(model.state_dict()).items()}
    save_file(tensors, path, {"checkpoint": json.dumps(about)})
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    record = {"dataset": {"source": "bloodmnist"}, "checkpoint": {"sha256": sha256}}
    path.with_suffix(".json").write_text(json.dumps(record))


class Driven:
    """The executed notebook with its kernel still running."""

    def __init__(self, client: NotebookClient):
        self.client = client

    def do(self, code: str) -> str:
        """Run code in the kernel, as a user's click would; returns what it printed."""
        cells = self.client.nb.cells
        cells.append(nbformat.v4.new_code_cell(code))
        self.client.execute_cell(cells[-1], len(cells) - 1)
        return "".join(output.get("text", "") for output in cells[-1].outputs)

    def outputs(self, of: str) -> list[dict]:
        """What the cell that holds these words shows now."""
        (cell,) = [c for c in self.client.nb.cells[:CELLS] if of in c.source and "outputs" in c]
        return [output.get("data", {}) for output in cell.outputs]

    def picture(self, of: str) -> bytes:
        (data,) = [data["image/png"] for data in self.outputs(of) if "image/png" in data]
        return base64.b64decode(data)

    def words(self, of: str) -> str:
        return "\n".join(data.get("text/markdown", "") for data in self.outputs(of)).strip()


CELLS = len(nbformat.read(NOTEBOOK, as_version=4).cells)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, data_root, edm) -> Path:
    """A shipped checkpoint and two small ones of the tiny data."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for path in (ROOT / "results" / "checkpoints").glob("dcgan-best.*"):
        shutil.copy(path, folder)
    cells = load_dataset("bloodmnist", data_root)
    ship(folder, "cvae", build("cvae", "best"), "best", cells)
    ship(folder, "ddpm", edm, "best", cells)
    return folder


@pytest.fixture(scope="module")
def driven(checkpoints, data_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "chosen"
    parameters = {"checkpoints": str(checkpoints), "data_root": str(data_root), "out": str(out)}
    prepared = out.with_suffix(".ipynb")
    papermill.execute_notebook(NOTEBOOK, prepared, parameters, prepare_only=True)
    notebook = nbformat.read(prepared, as_version=4)
    # Papermill puts the cell of its parameters right behind the notebook's own.
    place = next(i for i, c in enumerate(notebook.cells) if "# Parameters" in c.source)
    notebook.cells[place - 1].source += "\n" + notebook.cells.pop(place).source
    client = NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        yield Driven(client)


GRID, STRIP, NEIGHBOURS, SAVED = "cells_view =", "strip_view =", "neighbours_view =", "saved_view ="


def test_parameters():
    assert set(papermill.inspect_notebook(NOTEBOOK)) == {"checkpoints", "data_root", "out"}


def test_everything_is_drawn_without_a_click(driven):
    for part in (GRID, STRIP, NEIGHBOURS):
        assert driven.picture(part)
    table = driven.words("| Model |")
    assert all(f"| {name}-best |" in table for name in ("cvae", "dcgan", "ddpm"))
    assert "median" in driven.words(NEIGHBOURS)
    assert driven.words(SAVED) == "Nothing saved yet."


def test_controls_change_the_pictures(driven):
    driven.do("pick.value = 'cvae-best'")
    start = driven.picture(GRID), driven.picture(STRIP)
    for there, back in (
        ("walk[1].value = 3", "walk[1].value = 0"),
        ("kind.value = 'platelet'", "kind.value = 'basophil'"),
        ("seed.value = 7", "seed.value = 0"),
    ):
        driven.do(there)
        assert driven.picture(GRID) != start[0] and driven.picture(STRIP) != start[1]
        driven.do(back)
        assert (driven.picture(GRID), driven.picture(STRIP)) == start
    driven.do("second.value = 9")
    assert driven.picture(GRID) == start[0] and driven.picture(STRIP) != start[1]


def test_a_class_is_always_chosen_and_kept_where_the_next_model_has_it(driven):
    for pick, shown in (
        ("pick.value = 'cvae-best'; kind.value = 'platelet'", "platelet"),
        ("pick.value = 'ddpm-best'", "platelet"),
        ("pick.value = 'dcgan-best'", "any"),
        ("pick.value = 'cvae-best'", "basophil"),
    ):
        driven.do(pick)
        assert driven.do("print(kind.value)").strip() == shown


def test_only_controls_that_the_model_has_are_shown(driven):
    shown = "print(for_latents.layout.display, for_diffusion.layout.display, *kind.options)"
    driven.do("pick.value = 'dcgan-best'")
    assert driven.do(shown).split() == ["grid", "none", "any"]
    driven.do("pick.value = 'ddpm-best'")
    assert driven.do(shown).split()[:3] == ["none", "flex", "basophil"]


def test_shipped_cells_are_the_samples_of_the_checkpoint(driven, checkpoints, tmp_path):
    driven.do("pick.value = 'dcgan-best'; seed.value = 3")
    images = tmp_path / "images.pt"
    driven.do(f"torch.save(now.images, {str(images)!r})")
    driven.do("seed.value = 0")
    model, _ = load_model(checkpoints / "dcgan-best.safetensors")
    plain = sample(model, torch.zeros(16, dtype=torch.int64), seed=3)
    # Convolutions of another process may round in another way.
    assert (torch.load(images).int() - plain.int()).abs().float().mean() < 0.5


def test_diffusion_controls_change_the_cells(driven):
    driven.do("pick.value = 'ddpm-best'")
    assert driven.do("print(steps.value, sampler.value, guidance.value)") == "3 dpm_solver_2m 1.0\n"
    start = driven.picture(GRID)
    for there, back in (
        ("guidance.value = 4", "guidance.value = 1"),
        ("steps.value = 8", "steps.value = 3"),
        ("sampler.value = 'heun'", "sampler.value = 'dpm_solver_2m'"),
    ):
        driven.do(there)
        assert driven.picture(GRID) != start
        driven.do(back)
        assert driven.picture(GRID) == start


def test_neighbours_are_of_the_cells_at_the_click(driven):
    driven.do("pick.value = 'cvae-best'; look.click()")
    before = driven.picture(NEIGHBOURS)
    driven.do("seed.value = 11")
    assert driven.picture(NEIGHBOURS) == before
    driven.do("look.click()")
    assert driven.picture(NEIGHBOURS) != before
    driven.do("seed.value = 0")


def test_data_of_another_training_gives_a_sentence(driven):
    driven.do("pick.value = 'dcgan-best'; look.click()")
    words = driven.words(NEIGHBOURS)
    assert words.startswith("No neighbours: ") and "is not what this model was trained on" in words
    assert not any("image/png" in data for data in driven.outputs(NEIGHBOURS))


def test_chosen_cells_are_saved_once(driven, checkpoints):
    driven.do("pick.value = 'cvae-best'; kind.value = 'platelet'; walk[0].value = 1.5")
    driven.do("chosen.value = (2, 5); keep.click()")
    out = Path(driven.do("print(folder.value)").strip())
    names = ["images.json", "platelet_02.png", "platelet_05.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert driven.words(SAVED) == f"2 cells saved in `{out}`."
    facts = json.loads((out / "images.json").read_text())
    about = load_model(checkpoints / "cvae-best.safetensors")[1]
    assert facts["checkpoint_sha256"] == about["sha256"]
    assert (facts["class"], facts["seed"], facts["cells"]) == ("platelet", 0, [2, 5])
    assert facts["controls"] == {"walk 1": 1.5, "walk 2": 0, "walk 3": 0, "walk 4": 0}
    driven.do("keep.click()")
    assert driven.words(SAVED).startswith(f"Not saved: {out} exists and is not empty")


def test_without_data_there_are_no_neighbours(checkpoints, tmp_path, bad_input):
    path = checkpoints / "cvae-best.safetensors"
    _, about = load_model(path)
    with bad_input("BloodMNIST is not here", "data_root"):
        exploring.real_cells(path, about, tmp_path / "none")
    with bad_input("other.json is missing"):
        exploring.real_cells(path.with_name("other.safetensors"), about, tmp_path)
