"""Training that can be killed, checkpoints, sampling, and the record of a run."""

import copy
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch.optim import Adam

import generative_pipeline
from custom_models import MODELS, jpeg_vae, make_config
from custom_models.drawing import as_kept, load_model
from evaluation import features, figures, judge, kid, per_class, protocol, tables
from generative_pipeline import GenerativePipeline, derive_seed, run_folder
from utils import BLOOD_CLASSES, ImageSet, class_balanced_labels, to_uint8

TINY = {
    "cvae": {"channels": (8, 16), "latent_dim": 4, "batch_size": 32},
    "dcgan": {
        "generator_channels": (16, 8, 8, 4),
        "discriminator_channels": (4, 8, 8, 16),
        "generator_steps": 3,
        "batch_size": 32,
        "ema_decay": 0.9,
    },
    "ddpm": {  # its quick preset has EMA, flips and turns
        "channels": (8, 16),
        "timesteps": 10,
        "sampling_steps": 2,
        "batch_size": 32,
        "validation_epochs": 2,
    },
    "cwgan_gp": {"base_channels": 4, "critic_steps": 2, "batch_size": 16},
    "cgan": {"base_channels": 4, "batch_size": 32},
}
TINY_BEST = {
    "cvae": {
        "channels": (8, 8, 16),
        "latent_channels": 2,
        "prior_channels": (8,),
        "batch_size": 32,
    },
    "dcgan": {
        "generator_channels": (8, 8, 16),
        "discriminator_channels": (8, 8, 16),
        "batch_size": 32,
    },
    "ddpm": {
        "channels": (8, 16),
        "blocks": 1,
        "sampling_steps": 2,
        "batch_size": 32,
        "validation_epochs": 4,
    },
    "cwgan_gp": {
        "generator_channels": (8, 8, 16),
        "critic_channels": (8, 8, 16),
        "critic_steps": 2,
        "batch_size": 16,
    },
}
MODEL_NAMES = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def make(data_root, tiny_extractor, tmp_path):
    """Builds a pipeline of a tiny model on the tiny data, in a folder of the test's own."""

    def build(name: str = "cvae", out: str = "run", seed: int = 0, **changes) -> GenerativePipeline:
        settings = {
            "preset": "quick",
            "dataset": "bloodmnist",
            "data_root": data_root,
            "extractor": tiny_extractor,
            "device": "cpu",
            "epochs": 2,
            **(TINY_BEST if changes.get("preset") == "best" else TINY)[name],
            **changes,
        }
        return GenerativePipeline(name, seed=seed, out=tmp_path / out, **settings)

    return build


@pytest.fixture
def trained(make) -> GenerativePipeline:
    pipeline = make()
    pipeline.train()
    return pipeline


@pytest.mark.parametrize("name", ["cvae", "dcgan"])
def test_an_interrupted_call_can_be_made_again(name, make, monkeypatch):
    """In a notebook: a cell that was stopped in the middle of an update, and run again."""
    whole, stopped = make(name, out="whole"), make(name, out="stopped")
    whole.train()
    steps, step = 3 * whole.steps_per_epoch // 2, Adam.step

    def interrupt(optimizer, *arguments):
        nonlocal steps
        steps -= 1
        if not steps:
            raise KeyboardInterrupt
        return step(optimizer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Adam, "step", interrupt)
        stopped.train()
    stopped.train()
    assert stopped.step == stopped.total_steps and stopped.history == whole.history
    assert not differences(stopped.model.state_dict(), whole.model.state_dict())


def differences(a, b, where: str = "") -> list[str]:
    """Places at which two nested states are not equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: length"]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and a.numpy().tobytes() == b.numpy().tobytes() else [where]
    return [] if type(a) is type(b) and a == b else [where]


def read(path: Path) -> dict:
    """A checkpoint without what depends on the machine's speed."""
    state = torch.load(path, weights_only=True)
    del state["seconds"], state["training"]
    return state


# ---------------------------------------------------------------------------------------------
# A killed run goes on
# ---------------------------------------------------------------------------------------------

KILLED_EPOCHS = 8


@pytest.fixture(scope="module")
def processes():
    """Fresh processes from a server that has imported torch but trained nothing."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    # What a training imports on its way, once for all of them.
    slow_imports = ["generative_pipeline", "torch._dynamo", "torch.utils.tensorboard"]
    context.set_forkserver_preload(slow_imports)
    warm_up = context.Process(target=print)
    warm_up.start()
    warm_up.join()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
    return context


def train_in_process(name: str, preset: str, out: Path, data_root: Path, extractor: Path) -> None:
    torch.set_num_threads(1)
    GenerativePipeline(
        name,
        preset=preset,
        data_root=data_root,
        extractor=extractor,
        device="cpu",
        out=out,
        checkpoint_seconds=0,
        epochs=KILLED_EPOCHS,
        **(TINY_BEST if preset == "best" else TINY)[name],
    ).train()


def kill_at_random(process, checkpoint: Path, chance: random.Random) -> None:
    """SIGKILL at a random moment of an epoch, after a random number of checkpoints."""

    def stamp() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    written, last, moments = 0, stamp(), [time.monotonic()]
    wanted = chance.randint(1, KILLED_EPOCHS // 4)
    while written < wanted and process.is_alive():
        if stamp() != last:
            written, last = written + 1, stamp()
            moments.append(time.monotonic())
        time.sleep(0.001)
    epoch = moments[-1] - moments[-2] if written > 1 else 0.05
    time.sleep(chance.uniform(0, epoch))
    process.kill()
    process.join()


@pytest.mark.parametrize(
    "name, preset", [(n, p) for n in MODELS for p in ("quick", "best") if p in MODELS[n].PRESETS]
)
def test_a_run_killed_at_random_equals_an_uninterrupted_one(
    name, preset, processes, data_root, tiny_extractor, tmp_path
):
    def start(out: str):
        arguments = (name, preset, tmp_path / out, data_root, tiny_extractor)
        process = processes.Process(target=train_in_process, args=arguments)
        process.start()
        return process

    whole = start("whole")
    seed = random.randrange(2**32)  # other moments each time
    print(f"moments drawn with seed {seed}")
    chance = random.Random(seed)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    steps = []
    for _ in range(2):
        process = start("killed")
        kill_at_random(process, checkpoint, chance)
        assert process.exitcode == -9  # killed before it was done
        steps.append(read(checkpoint)["step"])
    assert 0 < steps[0] < steps[1]
    for process in (start("killed"), whole):
        process.join()
        assert process.exitcode == 0
    killed, uninterrupted = read(checkpoint), read(tmp_path / "whole" / "checkpoint.pt")
    steps_per_epoch = 160 // 32
    assert steps[1] < uninterrupted["step"] == KILLED_EPOCHS * steps_per_epoch
    assert differences(killed, uninterrupted) == []
    assert len(killed["history"]) == KILLED_EPOCHS
    assert (killed["ema"] is not None) == (killed["identity"]["ema_decay"] > 0)
    assert (preset == "best" or name in ("dcgan", "ddpm")) <= (killed["ema"] is not None)
    assert (killed["best"] is not None) == (preset == "best" or name == "ddpm")
    grids = {path.name for path in (tmp_path / "killed" / "progress").glob("*.png")}
    assert grids == {"025.png", "050.png", "075.png", "100.png"}
    for grid in grids:
        one, other = (
            (tmp_path / run / "progress" / grid).read_bytes() for run in ("killed", "whole")
        )
        assert one == other


def test_differences_see_one_bit():
    state = {"a": [torch.zeros(3), 1.5], "b": {"c": None}}
    other = copy.deepcopy(state)
    assert differences(state, other) == []
    other["a"][0][2] = -0.0
    assert differences(state, other) == ["/a/0"]
    assert differences(state, {"a": state["a"]}) == [": keys"]


def test_sampling_and_drawing_between_epochs_change_nothing(make):
    """Noise is a function of (seed, step), not of what else was drawn."""
    one, other = make(out="one"), make(out="other")
    one.train()
    validate = other._validate

    def disturb(epoch):
        other._save_progress_grid(0, None)
        torch.rand(5), np.random.rand(5), random.random()
        validate(epoch)

    other._validate = disturb
    torch.manual_seed(123)
    other.train()
    assert differences(one.model.state_dict(), other.model.state_dict()) == []


def test_a_finished_training_is_not_trained_again(make, trained, monkeypatch):
    again = make()
    monkeypatch.setattr(again, "_train_epoch", lambda *_: pytest.fail("trained again"))
    again.train()
    assert again.step == again.total_steps == 10
    assert differences(again.model.state_dict(), trained.model.state_dict()) == []
    labels = torch.arange(8)
    assert torch.equal(again.sample(labels), trained.sample(labels))


def test_seeds_give_different_runs_and_the_same_seed_the_same(make):
    states: list[list] = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        pipeline = make(out=out, seed=seed)
        states.append([copy.deepcopy(pipeline.model.state_dict())])
        pipeline.train()
        states[-1] += [pipeline.model.state_dict(), pipeline.sample(torch.arange(4))]
    assert differences(states[0], states[1]) == []
    for one, other in zip(states[0][:2], states[2][:2], strict=True):
        assert all(not torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(states[0][2], states[2][2])


def recorded_order(pipeline) -> list[list[int]]:
    """Rows of the training images in the order in which they are shown, a list an epoch."""
    train = pipeline.train_set
    rows = torch.arange(len(train))
    pipeline.train_set = ImageSet(train.name, train.split, train.images, rows, train.classes)
    shown = []

    def step(images, labels, optimizers):
        shown.append(labels.tolist())
        assert torch.equal(to_uint8(images), train.images[labels])
        return {"loss": torch.zeros(())}

    pipeline.model.training_step = step
    epochs = [pipeline._train_epoch(epoch) and shown[:] for epoch in range(2)]
    size = len(epochs[0])
    return [[row for step in part for row in step] for part in (shown[:size], shown[size:])]


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(make):
    first, second = recorded_order(make())
    assert sorted(first) == sorted(second) == list(range(160))
    assert first != second and first != list(range(160))
    assert [first, second] == recorded_order(make())
    other_seed = recorded_order(make(seed=1))
    assert other_seed[0] not in (first, second)


def test_images_that_fill_no_step_wait_for_another_epoch(make):
    pipeline = make(batch_size=48)
    first, second = recorded_order(pipeline)
    assert pipeline.steps_per_epoch == 3 and pipeline.total_steps == 6
    assert len(set(first)) == len(first) == 3 * 48
    assert set(first) != set(second)


def test_flips_and_turns_are_applied_where_the_config_says_so(make):
    for flips in (False, True):
        pipeline, seen = make(flips_and_turns=flips), []

        def step(images, labels, optimizers, seen=seen):
            seen.append(to_uint8(images))
            return {"loss": torch.zeros(())}

        pipeline.model.training_step = step
        pipeline._train_epoch(0)
        originals = {image.numpy().tobytes() for image in pipeline.sets["train"].images}
        kept = sum(image.contiguous().numpy().tobytes() in originals for image in torch.cat(seen))
        assert kept < 60 if flips else kept == 160


def test_no_update_is_computed_from_weights_of_before_another(make):
    """Autocast's cache keeps rounded weights through the updates of one training step."""
    with make()._autocast():
        assert not torch.is_autocast_cache_enabled()
        with torch.autocast("cpu", enabled=False):  # as around a gradient penalty
            assert not torch.is_autocast_cache_enabled()
    assert torch.is_autocast_cache_enabled()


def test_a_cpu_trains_in_bfloat16_where_it_is_asked_to(make, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    pipeline, seen = make("ddpm", precision="bfloat16"), set()
    for layer in pipeline.model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    pipeline.train()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in pipeline.model.parameters()} == {torch.float32}
    assert pipeline.evaluate()["precision"] == "bfloat16"


def test_a_training_goes_on_in_the_precision_of_its_checkpoint(make, monkeypatch, bad_input):
    """As one of a GPU's on a CPU, whose usual precision is another."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    make(precision="bfloat16").save_checkpoint()
    pipeline = make()
    assert pipeline.precision == "float32"
    pipeline.load_checkpoint()
    assert pipeline.precision == "bfloat16"
    with bad_input("of a training in bfloat16, not in float32"):
        make(precision="float32").load_checkpoint()


@pytest.mark.parametrize("name, dtype", [("ddpm", torch.bfloat16), ("dcgan", torch.float32)])
def test_only_diffusion_draws_in_bfloat16(name, dtype, make, monkeypatch):
    """Of the others, which take one pass, it would round the pixels."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    pipeline, seen = make(name, precision="bfloat16"), set()

    def note(layer, inputs, output):
        seen.add(output.dtype)

    model = pipeline._ready_to_sample()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(note)
    pipeline._sample_from(model, torch.arange(8), 0)
    assert seen == {dtype}


@given(st.integers(0, 2**70), st.text(max_size=5), st.integers(0, 2**40))
def test_derived_seeds_fit_torch_and_differ(seed, purpose, step):
    value = derive_seed(seed, purpose, step)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)
    others = {
        derive_seed(seed + 1, purpose, step),
        derive_seed(seed, purpose + "x", step),
        derive_seed(seed, purpose, step + 1),
    }
    assert len(others) == 3 and value not in others


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_plain_types_and_plain_keys(make):
    pipeline = make("ddpm")
    pipeline.train()
    state = torch.load(pipeline.checkpoint_path, weights_only=True)
    assert state.keys() == {
        *("format", "identity", "step", "seconds", "history", "devices", "compiled"),
        *("classes", "precision", "model", "ema", "ema_updates", "optimizers", "best", "training"),
    }
    for weights in (state["model"], state["ema"], state["best"]["state"]):
        assert weights.keys() == pipeline.model.state_dict().keys()
        assert not any(key.startswith(("module.", "_orig_mod.")) for key in weights)
    json.dumps(state["identity"])
    assert os.listdir(pipeline.out / "progress") and not list(pipeline.out.rglob("*.partial"))


def test_compiling_changes_no_key(make):
    plain, compiled = make(), make(compile=True)
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    assert compiled.model.encoder._compiled_call_impl is not None
    compiled.save_checkpoint()
    assert plain.load_checkpoint()


@pytest.mark.parametrize(
    ("name", "preset", "compiled"),
    [
        ("cwgan_gp", "quick", {"generator": True, "critic": False}),
        ("cwgan_gp", "best", {"generator": True, "critic": False}),
        ("dcgan", "best", {"generator": True, "discriminator": False}),
        ("dcgan", "quick", {"generator": True, "discriminator": True}),
    ],
)
def test_a_network_with_a_gradient_penalty_is_not_compiled(name, preset, compiled, make):
    networks = dict(make(name, preset=preset, compile=True).model.named_children())
    assert compiled == {key: n._compiled_call_impl is not None for key, n in networks.items()}


@pytest.mark.parametrize(
    ("device", "model", "found", "compiled"),
    [
        ("cpu", "ddpm", True, False),
        ("cuda", "ddpm", True, True),
        ("cuda", "ddpm", False, False),
        ("cuda", "dcgan", True, False),
    ],
)
def test_a_gpu_compiles_what_gains_by_it_where_it_can(device, model, found, compiled, monkeypatch):
    monkeypatch.setattr(generative_pipeline, "can_compile", lambda device: found)
    config = make_config(model, "best")
    assert generative_pipeline.is_compiled(None, torch.device(device), config) is compiled
    if found:
        asked = generative_pipeline.is_compiled(not compiled, torch.device(device), config)
        assert asked != compiled


def test_compiling_without_a_compiler_is_bad_input(make, tmp_path, monkeypatch, bad_input):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with bad_input("takes a compiler that is not here", "g++"):
        make(compile=True)
    assert not make(compile=False).compile
    (tmp_path / "g++").write_text("#!/bin/sh")
    (tmp_path / "g++").chmod(0o755)
    assert make(compile=True).compile
    assert not generative_pipeline.can_compile(torch.device("cuda"))


def test_sets_of_one_s_own_need_a_folder(make, bad_input):
    sets = make().sets
    with bad_input("needs a folder of its own", "out"):
        GenerativePipeline("cvae", "quick", sets=sets, device="cpu")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_bad_input_and_stays(share, make, trained, bad_input):
    path = trained.checkpoint_path
    trained.weights_path.unlink()  # which would count for more
    data = path.read_bytes()
    data = data[: int(share * len(data))]
    path.write_bytes(data)
    with bad_input(str(path), "broken", "delete it"):
        make().train()
    assert path.read_bytes() == data


def test_a_checkpoint_that_cannot_be_read_is_not_called_broken(make, bad_input):
    pipeline = make()
    pipeline.checkpoint_path.mkdir(parents=True)  # reading a folder fails as a disk may
    with bad_input(str(pipeline.checkpoint_path), "cannot be read"):
        pipeline.train()


def interrupt(pipeline: GenerativePipeline, at_epoch: int) -> None:
    """Train until then, epochs counted from 0."""

    def stop(epoch, writer):
        if epoch == at_epoch:
            raise KeyboardInterrupt

    pipeline._save_progress_grid = stop
    with pytest.raises(KeyboardInterrupt):
        pipeline.train()


def test_a_training_goes_on_with_the_extractor_that_chose_its_best_step(make, bad_input):
    settings = {"epochs": 4, "validation_epochs": 1}
    begun = make(checkpoint_seconds=0, **settings)
    interrupt(begun, at_epoch=2)
    before = begun.checkpoint_path.read_bytes()
    with bad_input(str(begun.checkpoint_path), "another extractor", "go on with that one"):
        make(extractor="demo", **settings).train()
    assert begun.checkpoint_path.read_bytes() == before
    again = make(**settings)
    again.train()
    assert again.step == again.total_steps


@given(data=st.binary(max_size=60))
def test_any_other_bytes_are_bad_input(data, fuzzed, bad_input):
    fuzzed.checkpoint_path.write_bytes(data)
    with bad_input(str(fuzzed.checkpoint_path)):
        fuzzed.load_checkpoint()


@pytest.fixture(scope="module")
def fuzzed(data_root, tiny_extractor, tmp_path_factory):
    out = tmp_path_factory.mktemp("fuzzed")
    return GenerativePipeline(
        "cvae", preset="quick", data_root=data_root, device="cpu", out=out, **TINY["cvae"]
    )


@pytest.mark.parametrize(
    "data", [b"\x80\x02K.", b"(lp0\n.", b"\x80\x02}q\x00(0.", b"\x80\x02\x8a\xff", b"PK\x03\x04"]
)
def test_a_foreign_pickle_is_bad_input(data, fuzzed, bad_input):
    fuzzed.checkpoint_path.write_bytes(data)
    with bad_input(str(fuzzed.checkpoint_path)):
        fuzzed.load_checkpoint()


class MakesAFolder:
    """Unpickling it runs code."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_checkpoint_is_not_run(make, tmp_path, bad_input):
    pipeline = make()
    pipeline.save_checkpoint()
    state = torch.load(pipeline.checkpoint_path, weights_only=True)
    torch.save({**state, "best": MakesAFolder(tmp_path / "made")}, pipeline.checkpoint_path)
    with bad_input(str(pipeline.checkpoint_path), "broken"):
        pipeline.load_checkpoint()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "state", [{}, [1, 2], {"format": 1}, {"format": 0, "identity": {}}, torch.zeros(2)]
)
def test_another_torch_file_is_no_checkpoint(state, make, bad_input):
    pipeline = make()
    pipeline.out.mkdir()
    torch.save(state, pipeline.checkpoint_path)
    with bad_input(str(pipeline.checkpoint_path), "not a checkpoint", "delete it"):
        pipeline.train()


@pytest.mark.parametrize(
    "other, words",
    [
        ({"name": "dcgan"}, ["model ('cvae' there, 'dcgan' here)"]),
        ({"seed": 1}, ["seed (0 there, 1 here)"]),
        ({"epochs": 3}, ["epochs (2 there, 3 here)"]),
        ({"lr": 0.01, "latent_dim": 5}, ["lr (0.001 there, 0.01 here)", "latent_dim (4 there"]),
        ({"channels": (8, 8)}, ["channels ([8, 16] there, [8, 8] here)"]),
        ({"preset": "baseline"}, ["preset ('quick' there, 'baseline' here)"]),
    ],
)
def test_a_checkpoint_of_another_run_is_bad_input_and_stays(other, words, make, trained, bad_input):
    before = trained.checkpoint_path.read_bytes()
    trained.weights_path.unlink()
    pipeline = make(**other)
    state = copy.deepcopy(pipeline.model.state_dict())
    with bad_input(str(trained.checkpoint_path), "another run", "choose another folder", *words):
        pipeline.train()
    assert trained.checkpoint_path.read_bytes() == before
    assert differences(pipeline.model.state_dict(), state) == []


def test_a_checkpoint_of_other_data_is_bad_input(make, trained, tiny_arrays, tmp_path, bad_input):
    root = tmp_path / "other data"
    root.mkdir()
    changed = tiny_arrays["train_images"].copy()
    changed[0, 0, 0, 0] ^= 1
    np.savez(root / "bloodmnist.npz", **{**tiny_arrays, "train_images": changed})
    with bad_input("dataset_sha256"):
        make(data_root=root).train()


def test_a_full_disk_keeps_the_previous_checkpoint(make, bad_input):
    pipeline = make(epochs=3)
    pipeline.save_checkpoint()
    before = pipeline.checkpoint_path.read_bytes()
    pipeline.step = 5
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with bad_input(str(pipeline.checkpoint_path), "make room"):
            pipeline.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pipeline.checkpoint_path.read_bytes() == before
    assert os.listdir(pipeline.out) == ["checkpoint.pt"]
    assert make(epochs=3).load_checkpoint()


def test_checkpoints_are_at_least_so_many_seconds_apart(make, monkeypatch):
    for seconds, expected in ((0, 4), (3600, 1)):
        pipeline, saved = make(out=str(seconds), epochs=4, checkpoint_seconds=seconds), []
        monkeypatch.setattr(
            pipeline, "save_checkpoint", lambda p=pipeline, saved=saved: saved.append(p.step)
        )
        pipeline.train()
        assert len(saved) == expected and saved[-1] == pipeline.total_steps


# ---------------------------------------------------------------------------------------------
# Bad input and divergence
# ---------------------------------------------------------------------------------------------


def test_too_few_images_for_one_step_is_bad_input(make, bad_input, tmp_path):
    with bad_input("161 images", "only 160", "batch_size"):
        make(batch_size=161)
    with bad_input("170 images", "only 160"):
        make("cwgan_gp", batch_size=34, critic_steps=5)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_training(make, bad_input):
    pipeline = make(lr=1e6)
    with bad_input("cvae quick seed 0", "diverged in epoch", "learning rate") as told:
        pipeline.train()
    assert not pipeline.checkpoint_path.exists() and "compile" not in str(told.value)
    pipeline = make(lr=1e6)
    pipeline.compile = True  # as if its networks were
    with bad_input("diverged in epoch", "lower the learning rate, or train without compile"):
        pipeline.train()


def test_memory_that_is_full_ends_the_training_in_one_sentence(make, monkeypatch, bad_input):
    pipeline = make()

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. More words.")

    monkeypatch.setattr(type(pipeline.model), "training_step", fail)
    with bad_input("the memory of cpu is full", "lower batch_size") as told:
        pipeline.train()
    assert told.value.__context__ is None  # which would hold the step's memory
    monkeypatch.undo()
    pipeline.train()
    assert pipeline.step == pipeline.total_steps


def test_evaluating_an_unfinished_training_is_bad_input(make, bad_input):
    with bad_input("step 0 of 10"):
        make().evaluate()


def test_features_that_know_the_train_split_are_no_run_s_own(make, bad_input):
    with bad_input("domain extractor knows the train split", "give another"):
        make(extractor="domain").extractor()


def test_a_run_has_its_own_folder():
    assert run_folder("results", "cvae", "baseline", 3) == Path("results/runs/cvae-baseline/seed3")


# ---------------------------------------------------------------------------------------------
# Weights' mean, best step, sampling
# ---------------------------------------------------------------------------------------------


def test_the_weights_mean_forgets_its_beginning_then_decays_as_set(make):
    pipeline = make(ema_decay=0.3)
    parameter = pipeline.model.encoder.mean.bias
    mean, values = None, [5.0, 1.0, -2.0, 4.0, 0.5, 3.0]
    for n, value in enumerate(values):
        with torch.no_grad():
            parameter.fill_(value)
        pipeline.ema.update()
        decay = min((1 + n) / (10 + n), 0.3)
        mean = value if mean is None else decay * mean + (1 - decay) * value
    averaged = pipeline._averaged_model().encoder.mean.bias
    assert torch.allclose(averaged, torch.full_like(averaged, mean), atol=1e-6)


def test_the_mean_takes_in_batch_statistics_too(make):
    pipeline = make("dcgan", ema_decay=0.9)
    pipeline.train()
    raw, mean = pipeline.model.state_dict(), pipeline.kept_model().state_dict()
    key = "generator.layers.1.running_var"
    assert not torch.equal(raw[key], torch.ones_like(raw[key]))
    assert not torch.equal(mean[key], torch.ones_like(raw[key]))
    assert not torch.equal(mean[key], raw[key])
    counter = "generator.layers.1.num_batches_tracked"
    assert torch.equal(mean[counter], raw[counter])


@pytest.mark.parametrize("name", ["dcgan", "ddpm"])
def test_the_mean_is_sampled_and_leaves_the_training_as_it_is(name, make):
    pipeline = make(name, validation_epochs=0, ema_decay=0.99)
    pipeline.train()
    plain = make(name, out="plain", validation_epochs=0, ema_decay=0.0)
    plain.train()
    labels = torch.arange(8)
    assert not torch.equal(pipeline.sample(labels), plain.sample(labels))
    assert differences(plain.model.state_dict(), pipeline.model.state_dict()) == []


@pytest.mark.parametrize("name, preset", [("dcgan", "best"), ("cvae", "best"), ("ddpm", "quick")])
def test_the_last_weights_need_no_training_of_their_own(name, preset, make, bad_input):
    """A finished checkpoint has them, beside the mean and the step that validation chose."""
    chosen = make(name, preset=preset, ema_decay=0.9, validation_epochs=1)
    chosen.train()
    state = torch.load(chosen.checkpoint_path, weights_only=True)
    state["best"]["step"] = state["training"]["kept_step"] = 1
    last = {"preset": preset, "ema_decay": 0.0, "validation_epochs": 0}
    whole, taken = make(name, out="whole", **last), make(name, out="taken", **last)
    whole.train()
    taken.out.mkdir()
    torch.save(state, taken.checkpoint_path)
    taken.train()
    labels = torch.arange(8)
    assert torch.equal(taken.sample(labels), whole.sample(labels))
    assert not torch.equal(taken.sample(labels), chosen.sample(labels))
    assert taken.history == whole.history and taken.weights_key() == whole.weights_key()
    record = taken.evaluate()
    assert record["kept_step"] == record["steps"] == taken.total_steps
    assert record["seconds"] == chosen.training["seconds"]
    # Taken up again, with the checkpoint and without it.
    for _ in range(2):
        again = make(name, out="taken", **last)
        again.train()
        assert torch.equal(again.sample(labels), whole.sample(labels))
        assert again.training == taken.training and again.history == whole.history
        taken.checkpoint_path.unlink(missing_ok=True)
    # No other mean's weights, nothing of half the way, and not the kept weights alone.
    other = make(name, out="other", **last | {"ema_decay": 0.5})
    other.out.mkdir()
    torch.save(state, other.checkpoint_path)
    with bad_input("ema_decay (0.9 there, 0.5 here)"):
        other.train()
    torch.save({**state, "training": None}, taken.checkpoint_path)
    taken.weights_path.unlink()
    with bad_input("ema_decay (0.9 there, 0.0 here)"):
        make(name, out="taken", **last).train()
    with bad_input(str(chosen.weights_path), "ema_decay (0.9 there, 0.0 here)"):
        make(name, out="run", **last).train()


def test_without_a_validation_split_the_last_step_is_kept(make):
    sets = {"train": make().sets["train"]}
    pipeline = make("ddpm", sets=sets)
    pipeline.train()
    assert pipeline.config.validation_epochs == 0 and pipeline.best is None
    assert pipeline.sample(torch.arange(8)).dtype == torch.uint8


def test_weights_beyond_float16_are_refused(trained, bad_input):
    with torch.no_grad():
        trained.model.encoder.mean.bias[0] = 1e5
    with bad_input("encoder.mean.bias", "float16", "lower the learning rate"):
        trained.save_weights()


def test_the_step_with_the_lowest_validation_kid_is_kept(make, monkeypatch):
    pipeline = make(epochs=5, validation_epochs=2)
    values, extracted = iter([0.5, 0.1, 0.3]), []
    states = {}

    def distance(real, fake):
        extracted.append((real.shape, fake.shape))
        states[pipeline.step] = copy.deepcopy(pipeline.model.state_dict())
        return next(values), 0.0

    monkeypatch.setattr("generative_pipeline.kid.kernel_distance", distance)
    pipeline.train()
    assert extracted == [((24, 8), (24, 8))] * 3  # the validation split, never the test split
    assert list(states) == [10, 20, 25]  # and the last one
    assert pipeline.best["step"] == 20 and pipeline.best["validation_kid"] == 0.1
    assert differences(pipeline.kept_model().state_dict(), rounded(states[20])) == []
    measured = [row["validation_kid"] for row in pipeline.history if "validation_kid" in row]
    assert measured == [0.5, 0.1, 0.3]
    assert pipeline.step == 25 and differences(pipeline.model.state_dict(), states[25]) == []
    again = make(epochs=5, validation_epochs=2)
    again.load_checkpoint()
    assert differences(again.kept_model().state_dict(), rounded(states[20])) == []


def rounded(state: dict) -> dict:
    """As it is kept on the disk: in float16."""
    return {k: v.half().to(v.dtype) if v.is_floating_point() else v for k, v in state.items()}


@MODEL_NAMES
def test_a_finished_training_is_there_without_its_checkpoint(name, make):
    pipeline = make(name, validation_epochs=1)
    pipeline.train()
    labels = torch.arange(16) % 8
    images, weights = pipeline.sample(labels), pipeline.weights_path.read_bytes()
    record = pipeline.evaluate()
    pipeline.checkpoint_path.unlink()
    pipeline.record_path.unlink()
    again = make(name, validation_epochs=1)
    again.train()  # loads what was kept
    assert not again.checkpoint_path.exists()
    assert again.history == pipeline.history
    assert torch.equal(again.sample(labels), images)
    repeated = again.evaluate()
    assert repeated["metrics"] == record["metrics"]
    for field in ("seconds", "kept_step", "device", "key", "images_seen", "git_commit"):
        assert repeated[field] == record[field]
    assert again.weights_path.read_bytes() == weights


def test_a_kill_between_the_last_checkpoint_and_the_kept_weights_loses_nothing(make):
    pipeline = make()
    pipeline.train()
    weights = torch.load(pipeline.weights_path, weights_only=True)
    pipeline.weights_path.unlink()
    again = make()
    again.train()
    repeated = torch.load(again.weights_path, weights_only=True)
    assert differences(repeated["state"], weights["state"]) == []
    assert repeated["training"] == weights["training"]


def test_kept_weights_of_another_run_are_bad_input(make, bad_input):
    make().train()
    with bad_input("weights.pt", "of another run", "lr"):
        make(lr=0.5).train()


def test_broken_kept_weights_are_bad_input(make, bad_input):
    pipeline = make()
    pipeline.train()
    pipeline.weights_path.write_bytes(pipeline.weights_path.read_bytes()[:500])
    with bad_input("weights.pt", "broken"):
        make().train()


@MODEL_NAMES
def test_samples_are_uint8_and_depend_on_their_seed(name, make):
    pipeline = make(name, validation_epochs=0)
    pipeline.train()
    labels = class_balanced_labels(8, 2)
    images = pipeline.sample(labels)
    assert images.dtype == torch.uint8 and images.shape == (16, 3, 28, 28)
    assert images.device.type == "cpu"
    assert torch.equal(images, pipeline.sample(labels))
    assert torch.equal(images, pipeline.sample(labels, seed=0))
    assert not torch.equal(images, pipeline.sample(labels, seed=1))


def test_a_longer_call_is_cut_into_batches(trained):
    images = trained.sample(torch.zeros(300, dtype=torch.int64))
    assert images.shape == (300, 3, 28, 28)
    assert len(images.unique(dim=0)) > 290
    assert torch.equal(images[:256], trained.sample(torch.zeros(256, dtype=torch.int64)))


@MODEL_NAMES
def test_an_image_does_not_depend_on_the_others_of_its_batch(name, make):
    pipeline = make(name, validation_epochs=0)
    pipeline.train()
    model, labels = pipeline.kept_model(), torch.arange(12) % 8
    torch.manual_seed(0)

    def images(rows):
        if name == "cvae":
            return model.decoder(latents[rows], model.condition(labels[rows]))
        if name == "dcgan":
            return model.generator(latents[rows])
        if name in ("cwgan_gp", "cgan"):
            return model.generator(latents[rows], labels[rows])
        return model.ddim(latents[rows], 2)

    latents = torch.randn(12, 3, 28, 28) if name == "ddpm" else model_latents(model)
    with torch.no_grad():
        together, some, alone = images(slice(12)), images(slice(5)), images(slice(7, 8))
    assert torch.allclose(together[:5], some, atol=1e-5)
    assert torch.allclose(together[7:8], alone, atol=1e-5)


def model_latents(model) -> torch.Tensor:
    return torch.randn(12, model.config.latent_dim)


def test_sampling_is_done_in_evaluation_mode_and_changes_nothing(make):
    pipeline = make("dcgan", ema_decay=0.0)
    pipeline.train()
    model = pipeline.model
    model.train()
    before = copy.deepcopy(model.state_dict())
    images = pipeline.sample(torch.zeros(10, dtype=torch.int64))
    assert model.training and model.generator.training
    assert differences(model.state_dict(), before) == []
    model.load_state_dict(rounded(before))
    model.eval()
    generator = torch.Generator().manual_seed(derive_seed(0, "samples"))
    expected = to_uint8(model.sample(torch.zeros(10, dtype=torch.int64), generator))
    assert torch.equal(images, expected)


def test_nearest_training_images_of_training_images_are_themselves(trained):
    chosen = trained.sets["train"].images[[3, 50, 7]]
    nearest, labels = trained.nearest_training_images(chosen, k=3)
    assert nearest.shape == (3, 3, 3, 28, 28) and labels.shape == (3, 3)
    assert torch.equal(nearest[:, 0], chosen)
    assert torch.equal(labels[:, 0], trained.sets["train"].labels[[3, 50, 7]])


# ---------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------


def test_the_record_says_all_that_a_table_needs(make):
    pipeline = make("ddpm", validation_epochs=1)
    pipeline.train()
    record = pipeline.evaluate()
    assert json.loads(json.dumps(record)) == json.loads(pipeline.record_path.read_text())
    assert (record["model"], record["preset"], record["seed"]) == ("ddpm", "quick", 0)
    assert record["budget"] == "quick"
    for field in dataclasses.fields(MODELS["ddpm"].Config):
        assert field.name in record["config"]
    assert record["config"]["sampling_steps"] == 2 and record["config"]["n_classes"] == 8
    assert record["dataset"] == {
        "source": "bloodmnist",
        "name": "BloodMNIST",
        "split": "train",
        "n": 160,
        "sha256": pipeline.sets["train"].sha256(),
        "duplicates_across_splits": 0,
        "held_out_sha256": pipeline.sets["held_out"].sha256(),
        "classes": list(BLOOD_CLASSES),
    }
    assert (record["steps"], record["images_seen"]) == (10, 320)
    assert record["measured"]["sampled_images"] == 64
    assert record["kept_step"] == pipeline.best["step"] in (5, 10)
    assert record["parameters"] == sum(p.numel() for p in pipeline.model.parameters())
    assert record["device"].startswith("CPU") and record["precision"] == "float32"
    assert record["compiled"] is False
    assert record["threads"] == torch.get_num_threads()
    assert record["seconds"] >= 0 and record["measured"]["sampling_seconds"] >= 0
    assert record["measured"]["precision"] == "float32"
    assert record["images_per_second"] > 0
    for machine in (record, record["measured"]):
        assert machine["peak_memory_mib"] > 50
        assert machine["versions"]["torch"] == torch.__version__
        names = {"python", "numpy", "torchvision", "scikit-learn", "pillow", "code"}
        assert names <= machine["versions"].keys()
        assert "git_commit" in machine
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert all({"loss", "validation_kid"} <= row.keys() for row in record["history"])
    for picture in ("samples.png", "losses.png"):
        assert (pipeline.out / picture).stat().st_size > 1000


def test_metrics_carry_the_protocol_under_which_they_were_taken(trained, tiny_extractor):
    metrics = trained.evaluate()["metrics"]
    for name in ("frechet_distance", "kid", "kid_standard_error", "mean_colour_error"):
        assert np.isfinite(metrics[name])
    assert metrics["distance_name"] != "FID" and "tiny-8" in metrics["distance_name"]
    rules = metrics["protocol"]
    assert (rules["n_real"], rules["n_fake"], rules["reference_split"]) == (160, 64, "train")
    assert rules["dataset_sha256"] == trained.dataset_sha256
    assert (rules["dataset"], rules["image_size"]) == ("BloodMNIST", 28)
    assert rules["feature_dim"] == 8 and rules["extractor_sha256"] == trained.extractor().sha256
    # The floor: the held-out cells in place of generated ones, under the same rules.
    assert metrics["floor"]["protocol"] == rules
    assert 0 <= metrics["floor"]["frechet_distance"] < metrics["frechet_distance"]


def test_the_generated_images_have_the_held_out_labels(make, monkeypatch):
    pipeline = make("cwgan_gp")
    pipeline.train()
    asked = []
    sample = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda labels: asked.append(labels) or sample(labels))
    pipeline.evaluate()
    assert torch.equal(asked[0], pipeline.sets["held_out"].labels)
    with np.load(pipeline.out / "samples.npz") as saved:
        assert saved["images"].dtype == np.uint8 and len(saved["images"]) == 64
        assert np.array_equal(saved["images"], sample(asked[0])[:64].numpy())
        assert np.array_equal(saved["labels"], asked[0][:64].numpy())


def test_the_mean_colour_error_is_that_of_the_channels_means(trained, monkeypatch):
    reals = trained.sets["train"].images.double().mean((0, 2, 3))
    fakes = torch.tensor([100, 150, 200], dtype=torch.uint8).view(1, 3, 1, 1)
    noise = torch.randint(2, (64, 3, 28, 28), dtype=torch.uint8)
    monkeypatch.setattr(trained, "sample", lambda labels: fakes + noise)
    record = trained.evaluate()
    expected = (fakes.double().view(3) + noise.double().mean((0, 2, 3)) - reals).abs().mean()
    assert record["metrics"]["mean_colour_error"] == pytest.approx(expected.item())


def test_a_finished_record_is_read_not_measured_again(make, trained, monkeypatch):
    record = trained.evaluate()
    again = make()
    assert again.finished_record()["key"] == record["key"]
    monkeypatch.setattr(judge, "judge", lambda *_, **__: pytest.fail("measured again"))
    assert again.evaluate()["metrics"] == json.loads(json.dumps(record["metrics"]))


def test_a_record_counts_for_its_own_config_data_and_extractor_alone(
    make, trained, tiny_extractor, tmp_path
):
    trained.evaluate()
    assert make().finished_record()
    other_extractor = tmp_path / "other-8.pt"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights = torch.jit.load(str(tiny_extractor))
        for parameter in weights.parameters():
            parameter.data.normal_()
        weights.save(str(other_extractor))
    for change in ({"lr": 0.5}, {"seed": 1}, {"epochs": 3}, {"extractor": other_extractor}):
        assert make(**change).finished_record() is None
    assert make(out="elsewhere").finished_record() is None


def test_a_record_counts_for_its_own_held_out_cells_and_names_alone(make, trained):
    record = trained.evaluate()
    assert record["dataset"]["classes"] == list(BLOOD_CLASSES)
    again, held_out = make(), trained.sets["held_out"]
    mended = held_out.images.clone()
    mended[0, 0, 0, 0] += 1
    for changes in ({"images": mended}, {"classes": tuple("abcdefgh")}):
        again.sets["held_out"] = dataclasses.replace(held_out, **changes)
        assert again.finished_record() is None
    again.sets["held_out"] = held_out
    assert again.finished_record()
    for name in ("held_out_sha256", "classes"):  # older records do not name them
        del record["dataset"][name]
    again.record_path.write_text(json.dumps(record))
    assert again.finished_record()


def test_a_folder_with_another_run_is_left_alone(make, trained, tmp_path, bad_input):
    trained.evaluate()
    trained.weights_path.unlink()  # as of the larger runs of this repository
    trained.checkpoint_path.unlink()
    before = trained.record_path.read_bytes()
    for changes, words in (
        ({"lr": 0.5}, "lr (0.001 there, 0.5 here)"),
        ({"seed": 1}, "seed (0 there, 1 here)"),
    ):
        other = make(**changes)
        with bad_input(str(trained.record_path), "is of another run", words, "(out)"):
            other.train()
        assert other.step == 0 and not other.checkpoint_path.exists()
    other = make(extractor="demo")
    other.train()  # the same training; its numbers would be others
    with bad_input(str(trained.record_path), "is of another run", "extractor_sha256", "(out)"):
        other.evaluate()
    assert trained.record_path.read_bytes() == before


def test_two_processes_do_not_train_in_one_folder(make, bad_input):
    pipeline = make()
    pipeline.out.mkdir()
    with FileLock(pipeline.out / "training.lock"):
        with bad_input("another process trains in", str(pipeline.out)):
            pipeline.train()
        assert pipeline.step == 0
    pipeline.train()
    assert pipeline.step == pipeline.total_steps


def test_finished_weights_count_for_more_than_a_checkpoint_of_half_the_way(make, trained):
    finished = read_weights(trained)
    begun = make(out="begun")
    begun.save_checkpoint()
    shutil.copy(trained.weights_path, begun.weights_path)
    for broken in (False, True):
        if broken:
            begun.checkpoint_path.write_bytes(begun.checkpoint_path.read_bytes()[:99])
        again = make(out="begun")
        again.train()
        kept = as_kept(again.kept_model().state_dict())
        assert differences(kept, finished["state"]) == [] and again.step == again.total_steps
        assert again.history == finished["history"]
        assert again.evaluate()["seconds"] == finished["training"]["seconds"]


def test_a_measured_run_whose_weights_are_gone_is_not_trained_again(make, trained, bad_input):
    """Its record would then be of other weights than those beside it."""
    assert not trained.has_lost_weights()
    trained.evaluate()
    trained.weights_path.unlink()
    assert not make().has_lost_weights()  # the checkpoint of its end has them
    trained.checkpoint_path.unlink()
    assert make().has_lost_weights() and make().finished_record()
    with bad_input(str(trained.record_path), "no weights.pt beside it", "delete the record"):
        make().train()
    assert not trained.weights_path.exists()
    trained.record_path.unlink()
    make().train()


def test_a_training_that_went_on_elsewhere_names_both_machines(make, monkeypatch):
    begun = make(checkpoint_seconds=0)
    interrupt(begun, at_epoch=1)
    first = begun.devices
    monkeypatch.setattr("generative_pipeline.describe_device", lambda device: "another")
    again = make()
    again.compile = True  # as on a GPU, whose networks here stay as they are
    again.compiled = [True]
    again.train()
    assert again.training["device"] == f"{first[0]}, then another"
    assert (begun.compiled, again.training["compiled"]) == ([False], "in part")
    assert read_weights(again)["training"]["device"] == again.training["device"]
    assert make().devices == ["another"] != first  # of a training that has not begun


def read_weights(pipeline: GenerativePipeline) -> dict:
    return torch.load(pipeline.weights_path, weights_only=True)


def test_a_record_of_another_training_is_not_taken_for_that_of_these_weights(
    make, trained, bad_input
):
    record = trained.evaluate()
    assert trained.evaluate() == json.loads(json.dumps(record))
    trained.record_path.write_text(json.dumps(record | {"seconds": record["seconds"] + 100}))
    assert make().evaluate()["key"] == record["key"]  # no weights are loaded
    with bad_input(str(trained.record_path), "from other weights", "seconds", "delete it"):
        trained.evaluate()
    trained.record_path.unlink()
    assert trained.evaluate()["seconds"] == record["seconds"]


def test_classes_are_measured_again_for_other_held_out_cells(make, monkeypatch):
    pipeline = make(conditional=True)
    pipeline.train()
    monkeypatch.setattr(per_class, "evaluate_per_class", lambda *_: {"rows": len(calls)})
    monkeypatch.setattr(per_class, "per_class_markdown", lambda result: str(result))
    monkeypatch.setattr(figures, "real_and_generated_by_class", lambda *_: Figure())
    calls = [1]
    assert pipeline.evaluate_per_class(2)["rows"] == 1
    calls.append(2)
    assert pipeline.evaluate_per_class(2)["rows"] == 1
    path = pipeline.out / "per_class.json"
    stored = json.loads(path.read_text())
    older = {k: v for k, v in stored.items() if k not in ("held_out_sha256", "classes")}
    path.write_text(json.dumps(older))  # does not name them
    assert pipeline.evaluate_per_class(2)["rows"] == 1
    path.write_text(json.dumps(stored))
    held_out = pipeline.sets["held_out"]
    images = held_out.images.clone()
    images[0, 0, 0, 0] ^= 1
    for changes in ({"images": images}, {"classes": tuple("abcdefgh")}):
        pipeline.sets["held_out"] = dataclasses.replace(held_out, **changes)
        calls.append(0)
        assert pipeline.evaluate_per_class(2)["rows"] == len(calls)


def test_measures_of_an_earlier_training_in_the_folder_go_with_its_record(trained):
    record = trained.evaluate()
    own = {"weights_key": trained.weights_key()}
    kept = [trained.out / f"per_class.{ending}" for ending in ("json", "md", "png")]
    kept += [trained.out / f"sampling.{ending}" for ending in ("json", "png")]

    def measured_again(of: dict) -> list[bool]:
        for path in kept:
            path.write_text(json.dumps(of))
        trained.record_path.unlink()
        assert trained.evaluate()["key"] == record["key"]
        return [path.exists() for path in kept]

    assert measured_again(own) == [True] * 5  # older files name nothing but the weights
    assert measured_again(own | {"training_key": trained._training_key()}) == [True] * 5
    assert measured_again(own | {"training_key": "another"}) == [False] * 5
    assert measured_again({"weights_key": "another"}) == [False] * 5


def test_a_record_of_older_metrics_is_replaced(trained, monkeypatch):
    record = trained.evaluate()
    trained.record_path.write_text(json.dumps(record | {"key": "of another version"}))
    assert trained.evaluate()["key"] == record["key"]
    assert json.loads(trained.record_path.read_text())["key"] == record["key"]


def test_a_record_that_cannot_be_read_is_bad_input(make, tmp_path, bad_input):
    (tmp_path / "run").write_text("a file")
    with bad_input(str(tmp_path / "run"), "choose another folder"):
        make().finished_record()


def test_a_log_that_cannot_be_written_is_bad_input(make, tmp_path, bad_input):
    (tmp_path / "log").write_text("a file")
    with bad_input(str(tmp_path / "log"), "make room or choose another folder"):
        make(log_dir=tmp_path / "log").train()


def test_what_is_not_trained_is_not_measured(make, bad_input):
    pipeline = make("cwgan_gp")
    pipeline.train()
    pipeline.evaluate()
    again, diffusion = make("cwgan_gp"), make("ddpm", out="ddpm", preset="best")
    for measure in (lambda: again.evaluate_per_class(4), lambda: diffusion.measure_sampling([])):
        with bad_input("is trained to step 0"):
            measure()
    again.train()
    assert again.evaluate_per_class(n=4) == pipeline.evaluate_per_class(n=4)


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", "not JSON"])
def test_a_record_that_is_no_json_is_bad_input_and_stays(text, make, bad_input):
    pipeline = make()
    pipeline.out.mkdir()
    pipeline.record_path.write_text(text)
    with bad_input(str(pipeline.record_path), "JSON"):
        pipeline.finished_record()
    assert pipeline.record_path.read_text() == text


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_json_that_is_no_record_is_not_this_runs(text, make):
    pipeline = make()
    pipeline.out.mkdir()
    pipeline.record_path.write_text(text)
    assert pipeline.finished_record() is None


def test_the_budget_tells_a_shortened_run_from_a_full_one(make):
    assert make().budget() == "quick"
    changes = {"preset": "baseline"}
    assert make(**changes, epochs=100).budget() == "full"
    assert make(**changes, epochs=99).budget() == "reduced"
    small = {"name": "ddpm", "preset": "small", "epochs": 80}
    assert make(**small).budget() == "reduced"


def test_only_models_with_settings_of_sampling_have_them_measured(make, bad_input):
    with bad_input("cvae quick has no settings of sampling to compare"):
        make().measure_sampling([])


def test_settings_of_the_sampler_are_measured_from_the_same_weights(make, monkeypatch):
    pipeline = make("ddpm", preset="best", warmup_images=0)  # at once far from its zero output
    pipeline.train()
    variants = [{"sampler": "heun", "sampling_steps": 3}, {"guidance_scale": 50.0}]
    variants += [{"jpeg_quality": 10}]
    before = pipeline.kept_model().state_dict()
    rows = pipeline.measure_sampling(variants, n=16)
    own = pipeline.config
    assert [row["sampler"] for row in rows] == [own.sampler, "heun", own.sampler, own.sampler]
    assert [row["guidance_scale"] for row in rows] == [1, 1, 50, 1]
    assert [row["jpeg_quality"] for row in rows] == [0, 0, 0, 10]
    steps = own.sampling_steps
    assert [row["evaluations"] for row in rows] == [steps, 5, 2 * steps, steps]
    assert len({row["kid"] for row in rows}) == 4 and all(row["kid_standard_error"] for row in rows)
    assert not differences(before, pipeline.kept_model().state_dict()) and pipeline.config == own

    # By hand: the same labels and noise through a pipeline whose config has the setting.
    other = make("ddpm", preset="best", out="other", guidance_scale=50.0)
    model = other.model.eval()
    model.load_state_dict(pipeline.kept_model().state_dict())
    labels = pipeline.sets["val"].labels[:16]
    fakes = other._sample_from(model, labels, derive_seed(0, "sampling"))
    extractor = pipeline.extractor()
    real = features.extract(pipeline.sets["val"].images, extractor)
    assert rows[2]["kid"] == kid.kernel_distance(real, features.extract(fakes, extractor))[0]

    # Kept, and measured anew for other settings alone.
    monkeypatch.setattr(pipeline, "_sample_from", None)
    assert pipeline.measure_sampling(variants, n=16) == rows
    with pytest.raises(TypeError):
        pipeline.measure_sampling(variants, n=12)
    pipeline.training = pipeline.training | {"precision": "bfloat16"}  # trained again
    with pytest.raises(TypeError):
        pipeline.measure_sampling(variants, n=16)


def test_the_cvae_s_temperature_is_measured_from_the_same_weights(make):
    pipeline = make("cvae", preset="best")
    pipeline.train()
    own = pipeline.config
    rows = pipeline.measure_sampling([{"temperature": own.temperature}, {"prior_steps": 3}], n=16)
    assert [row["prior_steps"] for row in rows] == [own.prior_steps, own.prior_steps, 3]
    assert [row["evaluations"] for row in rows] == [own.prior_steps + 1] * 2 + [4]
    assert rows[0]["kid"] == rows[1]["kid"] != rows[2]["kid"]
    assert (pipeline.out / "sampling.png").exists()
    variants = jpeg_vae.sampling_variants(own)
    assert {"temperature": own.temperature} in variants
    assert all(variant.keys() <= {*own.COMPARED} for variant in variants)
    plain = dataclasses.replace(own, learned_prior=False)
    assert jpeg_vae.Model(plain).evaluations() == 1
    assert not any("prior_steps" in variant for variant in jpeg_vae.sampling_variants(plain))


def test_only_the_sampler_s_settings_are_compared(make, bad_input):
    with bad_input("rho", "can't be compared here", "guidance_scale"):
        make("ddpm", preset="best").measure_sampling([{"rho": 5.0}])


def test_images_have_the_usual_size_of_their_data_set_unless_another_is_set(make, pbc_folder):
    tiny = {"dataset": "pbc", "data_root": pbc_folder, "batch_size": 4}
    for settings, size in (({}, 128), ({"image_size": 32}, 32)):
        pipeline = make(**tiny, **settings)
        assert pipeline.config.image_size == size
        assert pipeline.sets["train"].images.shape == (16, 3, size, size)


def test_splits_of_ones_own_take_the_place_of_a_named_data_set(make, bad_input):
    named = make()
    rows = torch.arange(0, 160, 2)
    train = named.sets["train"]
    half = ImageSet("half", "train", train.images[rows], train.labels[rows], train.classes)
    pipeline = make(out="half", sets={"train": half})
    assert pipeline.steps_per_epoch == 80 // 32 and pipeline.dataset_sha256 == half.sha256()
    pipeline.train()
    assert pipeline.sample(torch.arange(8)).shape == (8, 3, 28, 28)
    with bad_input("splits", "val, test, held_out", "add them"):
        pipeline.evaluate()
    with bad_input("half", "28", "32", "image_size"):
        make(out="wrong", sets={"train": half}, image_size=32)


def test_a_conditional_model_is_measured_class_by_class(make, monkeypatch, bad_input):
    pipeline = make("cwgan_gp")
    pipeline.train()
    result = pipeline.evaluate_per_class(n=4)
    assert [row["n_fake"] for row in result["per_class"]] == [4] * 8
    assert [row["n_real"] for row in result["per_class"]] == [20] * 8
    labels = class_balanced_labels(8, 4)
    images = pipeline.sample(labels)
    again = per_class.evaluate_per_class(images, labels, pipeline.sets, pipeline.extractor())
    of = ("weights_key", "extractor_sha256", "version", "n", "held_out_sha256", "classes")
    of += ("training_key",)
    assert {**again, **{name: result[name] for name in of}} == result
    assert result["weights_key"] == pipeline.weights_key() and result["n"] == 4
    files = {path.name for path in pipeline.out.glob("per_class.*")}
    assert files == {"per_class.json", "per_class.md", "per_class.png"}
    assert json.loads((pipeline.out / "per_class.json").read_text()) == result
    monkeypatch.setattr(pipeline, "sample", None)
    assert pipeline.evaluate_per_class(n=4) == result
    # It depends on weights, not on what else the record holds.
    monkeypatch.setattr(protocol, "METRICS_VERSION", 99)
    assert pipeline.evaluate_per_class(n=4) == result
    pipeline.training = pipeline.training | {"precision": "bfloat16"}  # trained again
    with pytest.raises(TypeError):
        pipeline.evaluate_per_class(n=4)
    unconditional = make(out="other")
    unconditional.train()
    with bad_input("cvae", "class"):
        unconditional.evaluate_per_class()


@pytest.mark.parametrize("name, elsewhere", [("dcgan", 0), ("cvae", 95)])
def test_images_are_stored_as_jpeg_where_the_data_was(name, elsewhere, make):
    blood = make(name, preset="best")
    assert blood.config.jpeg_quality == 75
    train = blood.sets["train"]
    other = ImageSet("PBC", "train", train.images, train.labels, train.classes)
    assert make(name, preset="best", sets={"train": other}).config.jpeg_quality == elsewhere
    given = make(name, preset="best", sets={"train": other}, jpeg_quality=80)
    assert given.config.jpeg_quality == 80


@pytest.mark.parametrize("data", ["MNIST (test digits)", "CelebA Smiling", "PBC"])
def test_images_with_an_up_are_not_turned(data, make):
    train = make("cwgan_gp").sets["train"]
    own = {"train": ImageSet(data, "train", train.images, train.labels, train.classes)}
    assert make("cwgan_gp", preset="best", sets=own).config.flips_and_turns == (data == "PBC")
    assert make("cwgan_gp", preset="best", sets=own, flips_and_turns=True).config.flips_and_turns


def test_settings_that_came_later_leave_the_identity_of_earlier_runs_as_it_was(make):
    for model, preset, name, earlier, other in (
        ("ddpm", "baseline", "decay_images", 0, 1000),
        ("cwgan_gp", "baseline", "decay_images", 0, 1000),
        ("cwgan_gp", "best", "decay_images", 0, 1000),
        ("cwgan_gp", "best", "noise", 0.0, 0.2),
        ("cwgan_gp", "baseline", "patch_scores", False, True),
        ("cwgan_gp", "baseline", "even_classes", False, True),
        ("cwgan_gp", "baseline", "dcgan_weights", True, False),
    ):
        before, after = (make(model, preset=preset, **{name: v}) for v in (earlier, other))
        assert before.weights_key() != after.weights_key()
        assert before._identity()[name] == earlier and name not in before._named()


def test_files_from_before_a_setting_came_are_still_the_run_s(make, bad_input):
    """Whatever value of it the preset has by now."""
    pipeline = make("dcgan", preset="best", jpeg_chroma="mean")
    pipeline.train()
    record = pipeline.evaluate()
    state = torch.load(pipeline.weights_path, weights_only=True)
    del state["identity"]["jpeg_chroma"], record["config"]["jpeg_chroma"]
    torch.save(state, pipeline.weights_path)
    text = json.dumps(record)
    pipeline.record_path.write_text(text)
    pipeline.checkpoint_path.unlink()
    again = make("dcgan", preset="best", jpeg_chroma="mean")
    again.train()
    assert again.evaluate() == json.loads(text)
    assert load_model(pipeline.weights_path)[0].config.jpeg_chroma == "mean"
    with bad_input("jpeg_chroma ('mean' there, 'dct' here)"):
        make("dcgan", preset="best", jpeg_chroma="dct").check_folder()


@pytest.mark.parametrize("model", ["cvae", "dcgan", "ddpm", "cwgan_gp"])
def test_a_finished_and_measured_run_is_taken_up_again(make, model, monkeypatch):
    pipeline = make(model)
    pipeline.train()
    record = pipeline.evaluate()
    again = make(model)
    monkeypatch.setattr(again.model, "training_step", None)
    again.train()
    assert again.evaluate() == json.loads(json.dumps(record))


@pytest.mark.parametrize("file", ["checkpoint.pt", "weights.pt"])
def test_a_finished_training_may_be_sampled_by_other_settings(make, monkeypatch, file):
    settings = {"preset": "best", "validation_epochs": 1, "warmup_images": 0}
    pipeline = make("ddpm", **settings)
    pipeline.train()
    for other in {"checkpoint.pt", "weights.pt"} - {file}:
        (pipeline.out / other).unlink()
    changes = {"sampler": "heun", "jpeg_quality": 75, "guidance_scale": 2.0}
    again = make("ddpm", **settings, **changes)
    monkeypatch.setattr(again.model, "training_step", None)
    again.train()
    record = again.evaluate()
    assert not differences(again.kept_model().state_dict(), pipeline.kept_model().state_dict())
    assert record["history"] == pipeline.history
    # What its validation drew is told, by whichever file it is taken up the next time.
    own = {name: getattr(pipeline.config, name) for name in changes}
    assert record["validated_with"] == own and {**record["config"], **changes} == record["config"]
    words = "validation KID was of images drawn with `sampler` dpm_solver_2m, `guidance_scale` 1.0"
    assert words in " ".join(tables.run_table(record).split())
    third = make("ddpm", **settings, **changes)
    third.train()
    assert third.validated_with == pipeline.validated_with != {}
    assert record["weights_key"] != pipeline.weights_key()
    # So do the images that are drawn from the file alone.
    config = load_model(pipeline.out / file)[1]["config"]
    assert {**config, **changes} == config
    (pipeline.out / "record.json").write_text("half a")
    assert load_model(pipeline.out / file)[1]["config"].items() >= own.items()
    shutil.rmtree(pipeline.out)
    pipeline = make("ddpm", **settings)
    pipeline.train()
    assert "validated_with" not in pipeline.evaluate()


def test_what_changes_a_training_or_is_half_done_is_another_run(make, monkeypatch, bad_input):
    monkeypatch.setattr(GenerativePipeline, "save_weights", lambda self: None)
    settings = {"preset": "best", "epochs": 1}
    pipeline = make("ddpm", **settings)
    pipeline.train()
    with bad_input("p_std (1.2 there, 1.0 here)"):
        make("ddpm", **settings, p_std=1.0).train()
    state = torch.load(pipeline.checkpoint_path, weights_only=True)
    torch.save({**state, "training": None}, pipeline.checkpoint_path)
    with bad_input("sampler ('dpm_solver_2m' there, 'heun' here)"):
        make("ddpm", **settings, sampler="heun").train()


@pytest.mark.parametrize(
    ("model", "preset"), [("ddpm", "quick"), ("ddpm", "best"), ("cvae", "best")]
)
def test_the_settings_of_sampling_do_nothing_to_the_training(make, model, preset):
    """Without a validation, which may choose another step."""
    changes = {"sampler": "ddim", "sampling_steps": 3, "variance": "posterior"}
    changes |= {"sigma_min": 0.1, "sigma_max": 9.0, "rho": 3.0, "guidance_scale": 2.0}
    changes |= {"jpeg_quality": 75, "jpeg_chroma": "mean"}
    changes |= {"learned_prior": False, "prior_steps": 2, "temperature": 1.0}
    plain = make(model, out="plain", preset=preset, validation_epochs=0)
    changes = {name: changes[name] for name in plain.config.SAMPLING}
    other = make(model, out="other", preset=preset, **{**changes, "validation_epochs": 0})
    plain.train(), other.train()
    assert not differences(plain.model.state_dict(), other.model.state_dict())


def test_too_few_images_to_measure_by_are_told_before_the_training(make, bad_input):
    sets = make().sets

    def few(split: str, n: int) -> dict:
        part = sets[split]
        some = ImageSet("few", split, part.images[:n], part.labels[:n], part.classes)
        return {**sets, split: some}

    with bad_input("9 held-out images", "at least 10"):
        make(sets=few("held_out", 9))
    with bad_input("2 validation images", "validation_epochs"):
        make(sets=few("val", 2), validation_epochs=1)
    make(sets=few("val", 2), validation_epochs=0)
