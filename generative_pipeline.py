"""The one pipeline behind every model: training, sampling, evaluation, checkpoints, the record.

    pipeline = GenerativePipeline("cvae", preset="baseline", dataset="bloodmnist", seed=0)
    pipeline.train()                      # goes on where the last checkpoint stands
    images = pipeline.sample(labels)      # uint8 [N, C, S, S]
    record = pipeline.evaluate()          # measures, draws the figures, writes record.json

A run lives in one folder: checkpoint.pt (the whole state, to go on from), weights.pt (what is kept
of a finished training, small enough to be shared), progress/ (the same noise at 25, 50, 75 and
100 % of the training), record.json, samples.npz, and pictures: samples, losses, suspicious_pairs
and, where there are images enough, frechet_infinity.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from custom_models import MODELS, make_config, usual_image_size
from custom_models.config import ModelConfig, stored_settings
from custom_models.drawing import as_kept, derive_seed, draw, labelled_grid
from custom_models.running_mean import RunningMean
from evaluation import features, figures, judge, kid, per_class, protocol
from evaluation.copies import Suspects
from evaluation.neighbours import k_nearest
from utils import (
    SPLITS,
    UPRIGHT,
    ImageSet,
    InputError,
    class_balanced_labels,
    find_duplicates,
    keep_freed_memory,
    load_dataset,
    make_grid,
    pick_device,
    progress,
    random_flips_and_turns,
    save_png,
    seed_everything,
    seed_torch,
    to_model_range,
    write_atomically,
    write_text,
)

# Part of every run's identity. Raise it with any change that alters what a training gives: folders
# with runs of other versions are then refused.
CODE_VERSION = 1
# Raise it when `measure_sampling` gives other than before.
SAMPLING_VERSION = 2
RESULTS = Path(__file__).resolve().parent / "results"
CHECKPOINT_FORMAT = 2
WEIGHTS_FORMAT = 1
SAVED_SAMPLES = 64
SETS = (*SPLITS, "held_out")
# They decide which weights of a training are kept, and leave the training itself as it is.
KEEPING = ("ema_decay", "validation_epochs")
# Whose numbers or images a run's may depend on, beside torch's.
OTHER_PACKAGES = (
    "numpy",
    "torchvision",
    "scipy",
    "scikit-learn",
    "pillow",
    "medmnist",
    "pytorch-fid",
)
HELD_OUT = 10  # images: the search for copies compares two halves of them


def run_folder(results: str | Path, model: str, preset: str, seed: int) -> Path:
    """Where a run lives: RESULTS/runs/MODEL-PRESET/seedK."""
    return Path(results) / "runs" / f"{model}-{preset}" / f"seed{seed}"


def default_folder(
    dataset: str, root: str | Path | None, size: int, model: str, preset: str, seed: int
) -> Path:
    """results/runs/MODEL-PRESET/seedK for BloodMNIST at 28 pixels; others have results/pbc128/…

    Those of a user's own images are results/folder-NAME64/…, which git ignores.
    """
    return run_folder(default_results(dataset, root, size), model, preset, seed)


def default_results(dataset: str, root: str | Path | None, size: int) -> Path:
    """The folder in which `default_folder` keeps all runs of the data set at this size."""
    if (dataset, size) == ("bloodmnist", 28):
        return RESULTS
    name = dataset.replace(":", "-")
    if dataset == "folder" and root:
        name = f"folder-{Path(root).resolve().name.removesuffix('.zip')}"
    return RESULTS / f"{name}{size}"


class GenerativePipeline:
    """Trains, samples and measures one model with one seed.

    model, preset: names in `custom_models.MODELS` and its PRESETS; **settings change fields of the
    preset's config; image_size is otherwise the preset's or the data set's usual one. dataset,
    data_root: as in `utils.load_dataset`. sets: splits of one's own in their place, by name (train,
    val, test, held_out), of the config's image size; `train` alone is enough to train and to
    sample. out: the run's folder, by default that of `default_folder`; sets of one's own have none.
    extractor: as in `evaluation.features.load_extractor`. device: auto, cpu or cuda.
    precision: float32 or bfloat16; by default that of the checkpoint to go on from, else bfloat16
    on CUDA, float32 on a CPU, where bfloat16 takes instructions of its own (AVX512-BF16 or AMX) and
    is then up to twice as fast.
    checkpoint_path, log_dir: the checkpoint's file (or folder) and TensorBoard's folder, if not in
    `out`. checkpoint_seconds: at least so long between checkpoints, which are written at ends of
    epochs. compile: torch.compile the networks, but for those that a gradient penalty takes a
    second derivative of, for speed; by default on CUDA alone, and of the models that gain more by
    it than it takes. Raises InputError for anything it can't work with.
    """

    def __init__(
        self,
        model: str,
        preset: str = "baseline",
        dataset: str = "bloodmnist",
        seed: int = 0,
        out: str | Path | None = None,
        data_root: str | Path | None = None,
        extractor: str | Path | None = None,
        sets: dict[str, ImageSet] | None = None,
        device: str = "auto",
        precision: str | None = None,
        checkpoint_path: str | Path | None = None,
        log_dir: str | Path | None = None,
        checkpoint_seconds: float = 60,
        compile: bool | None = None,
        **settings,
    ):
        if sets and not out:
            raise InputError("a run on sets of one's own needs a folder of its own: name it as out")
        self.name, self.preset, self.seed = model, preset, seed
        self.dataset = sets["train"].name if sets else dataset
        if not sets:
            settings = {"image_size": usual_image_size(model, preset, dataset)} | settings
        self.config = make_config(model, preset, **settings)
        out = out or default_folder(
            dataset, data_root, self.config.image_size, model, preset, seed
        )
        self.out = Path(out).expanduser()
        self.device = pick_device(device)
        self._asked_for, self.precision = precision, pick_precision(precision, self.device)
        self._checkpoint_path, self.log_dir = checkpoint_path, log_dir
        self.checkpoint_seconds = checkpoint_seconds
        self.extractor_name, self._extractor = extractor, None
        self.sets = sets or {
            split: load_dataset(dataset, data_root, self.config.image_size, split)
            for split in SETS
        }
        train, size = self.sets["train"], self.config.image_size
        if train.images.shape[2:] != (size, size):
            raise InputError(
                f"{train.name} has images of {list(train.images.shape[2:])} pixels, but the model "
                f"draws {size}; set image_size"
            )
        self._check_held_out()
        from_data = {"n_classes": len(train.classes), "image_channels": train.images.shape[1]}
        stored_as_jpeg = train.name.startswith("BloodMNIST") and size == 28
        if hasattr(self.config, "JPEG_ELSEWHERE") and not stored_as_jpeg:
            from_data["jpeg_quality"] = settings.get("jpeg_quality", self.config.JPEG_ELSEWHERE)
        if train.name.startswith(UPRIGHT):  # turned images would teach it to draw turned ones
            from_data["flips_and_turns"] = settings.get("flips_and_turns", False)
        if "val" not in self.sets:
            from_data["validation_epochs"] = 0
        self.config = dataclasses.replace(self.config, **from_data)
        self.dataset_sha256 = train.sha256()
        self.train_set = train.to(self.device)
        self.steps_per_epoch = len(train) // self.config.images_per_step
        if self.steps_per_epoch == 0:
            raise InputError(
                f"one step takes {self.config.images_per_step} images, but {train.name} has only "
                f"{len(train)} to train on; lower batch_size"
            )
        self.total_steps = self.steps_per_epoch * self.config.epochs
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.compile = is_compiled(compile, self.device, self.config)
        self._set_up_model()

    def _check_held_out(self) -> None:
        """Tell before the training, not after it, that there is too little to measure it by."""
        sizes = {split: len(part) for split, part in self.sets.items()}
        if sizes.get("held_out", HELD_OUT) < HELD_OUT:
            raise InputError(
                f"{self.sets['train'].name} has {sizes['held_out']} held-out images, but at least "
                f"{HELD_OUT} are needed to measure by; add images"
            )
        if self.config.validation_epochs and sizes.get("val", 3) < 3:
            raise InputError(
                f"{self.sets['train'].name} has {sizes['val']} validation images, but a kernel "
                "distance needs three; add images, or set validation_epochs to 0"
            )

    def _set_up_model(self) -> None:
        seed_everything(derive_seed(self.seed, "initial weights"))
        self.model = self.config.build()
        self.model.to(self.device, memory_format=torch.channels_last)
        self.optimizers = self.model.optimizers()
        if self.device.type == "cuda":
            fuse(self.optimizers)
        decay = self.config.ema_decay
        self.ema = RunningMean(self.model, decay) if decay else None
        self.step, self.seconds, self.history, self.best = 0, 0.0, [], None
        self.training = None  # how it was trained; known once it is over
        # What it was trained on, one after another, and whether its networks were compiled there.
        self.devices, self.compiled = [describe_device(self.device)], [self.compile]
        own = self._identity()
        self.validated_with = {name: own[name] for name in self.config.SAMPLING}
        self.kept = None  # the kept weights, where they come from their file
        if self.compile:
            compile_networks(self.model)

    # -----------------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the config's number of epochs, from the last checkpoint if there is one.

        A finished training, whose weights were kept, is loaded. Data order and noise are functions
        of (seed, step), so that a resumed training equals an uninterrupted one. Raises InputError
        if the loss stops being finite, where another process trains in the same folder, and for a
        run that was measured and whose weights are gone.
        """
        self.check_folder()
        if not self.load_weights():
            if self.has_lost_weights():
                raise InputError(
                    f"{self.record_path} has no weights.pt beside it; bring it back, delete the "
                    "record to train anew, or choose another folder"
                )
            with _alone_in(self.out):
                full = False
                try:
                    self._train()
                except torch.OutOfMemoryError:
                    full = True
                except BaseException:
                    self._set_up_model()  # half an update is nothing to go on from
                    raise
                if full:  # out here nothing holds the step's memory any more
                    self._set_up_model()
                    raise InputError(
                        f"the memory of {self.device} is full; lower batch_size, or run fewer "
                        "trainings at once; the last checkpoint, if there is one, is whole"
                    )

    def _train(self) -> None:
        if self.config.validation_epochs:
            self.extractor()  # told now, if it is missing, and not after the first epochs
        if self.load_checkpoint() and self.step < self.total_steps:
            print(f"going on after epoch {len(self.history)} from {self.checkpoint_path}")
        writer = self._tensorboard()
        last_saved = time.monotonic()
        epochs = range(self.step // self.steps_per_epoch, self.config.epochs)
        bar = progress(epochs, desc=f"{self.name} {self.preset} seed {self.seed}, epochs")
        with _deterministic_on(self.device):
            for epoch in bar:
                seconds_before = self.seconds
                row = self._train_epoch(epoch)
                self.history.append(row)
                if hasattr(bar, "set_postfix"):
                    bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k != "epoch"})
                self._validate(epoch)
                if writer:
                    images = self.steps_per_epoch * self.config.images_per_step
                    speed = images / (self.seconds - seconds_before)
                    with _writing_to(writer.log_dir):
                        for name, value in {**row, "images_per_second": speed}.items():
                            writer.add_scalar(name, value, self.step)
                self._save_progress_grid(epoch, writer)
                if self.step == self.total_steps:
                    self.training = self._describe_training()
                    self.save_checkpoint()
                elif time.monotonic() - last_saved >= self.checkpoint_seconds:
                    self.save_checkpoint()
                    last_saved = time.monotonic()
        self.save_weights()
        if writer:
            with _writing_to(writer.log_dir):
                writer.close()

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the shuffled training images; returns the mean of what is logged."""
        start = time.monotonic()
        self.model.train()
        order = torch.Generator(self.device)
        order.manual_seed(derive_seed(self.seed, "data order", epoch))
        permutation = torch.randperm(len(self.train_set), generator=order, device=self.device)
        size, sums = self.config.images_per_step, {}
        for rows in permutation.split(size)[: self.steps_per_epoch]:
            seed_torch(derive_seed(self.seed, "step", self.step), self.device)
            images = to_model_range(self.train_set.images[rows])
            if self.config.flips_and_turns:
                images = random_flips_and_turns(images)
            images = images.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                logged = self.model.training_step(
                    images, self.train_set.labels[rows], self.optimizers
                )
            if self.ema:
                self.ema.update()
            for name, value in logged.items():
                sums[name] = sums.get(name, 0) + value.detach().float()
            self.step += 1
        row = {name: (total / self.steps_per_epoch).item() for name, total in sums.items()}
        self.seconds += time.monotonic() - start
        if not all(np.isfinite(list(row.values()))):
            # Seen: a compiled layer in bfloat16 whose gradient was infinite, on one kind of CPU.
            way_out = ", or train without compile" if self.compile else ""
            raise InputError(
                f"{self.name} {self.preset} seed {self.seed} diverged in epoch {epoch + 1}: "
                f"{row}; lower the learning rate{way_out}"
            )
        return {"epoch": epoch + 1, **row}

    def _autocast(self, cache: bool = False):
        # In training its cache of rounded weights would outlive an optimizer's step, of which one
        # call of `training_step` may hold several.
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.precision == "bfloat16",
            cache_enabled=cache,
        )

    def _validate(self, epoch: int) -> None:
        """Every `validation_epochs`, and at the end, keep the weights if no KID was lower yet."""
        every, last = self.config.validation_epochs, epoch + 1 == self.config.epochs
        if not every or ((epoch + 1) % every and not last):
            return
        val = self.sets["val"]
        extractor = self.extractor()
        model = self._ready_to_sample()
        fakes = self._sample_from(model, val.labels, derive_seed(self.seed, "validation"))
        value, _ = kid.kernel_distance(
            features.extract(val.images, extractor).to(self.device),
            features.extract(fakes, extractor, cache=False).to(self.device),
        )
        self.history[-1]["validation_kid"] = value
        if self.best is None or value < self.best["validation_kid"]:
            self.best = {
                "step": self.step,
                "validation_kid": value,
                "extractor_sha256": extractor.sha256,
                "state": model.state_dict(),
            }

    def _save_progress_grid(self, epoch: int, writer) -> None:
        """The same noise at 25, 50, 75 and 100 % of the training; in TensorBoard, with the classes'
        names, after every tenth epoch too."""
        marks = {-(-self.config.epochs * percent // 100): percent for percent in (25, 50, 75, 100)}
        percent = marks.get(epoch + 1)
        if percent is None and not (writer and (epoch + 1) % 10 == 0):
            return
        labels = class_balanced_labels(self.config.n_classes, 8)
        model = self._ready_to_sample()
        images = self._sample_from(model, labels, derive_seed(self.seed, "progress"))
        if percent:
            path = self.out / "progress" / f"{percent:03d}.png"
            save_png(make_grid(images, columns=8, zoom=2), path)
        if writer:
            names = list(self.sets["train"].classes) if model.conditional else []
            grid = labelled_grid(images, names, columns=8)
            with _writing_to(writer.log_dir):
                writer.add_image("samples", grid, self.step, dataformats="HWC")

    def _tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if self.log_dir:
                raise InputError(
                    "log_dir is TensorBoard's, which is not installed; pip install tensorboard, or "
                    "leave it out"
                ) from None
            return None
        folder = Path(self.log_dir or self.out / "tensorboard").expanduser()
        with _writing_to(folder):
            return SummaryWriter(str(folder), purge_step=self.step + 1)

    # -----------------------------------------------------------------------------------------
    # Checkpoints
    # -----------------------------------------------------------------------------------------

    @property
    def checkpoint_path(self) -> Path:
        if not self._checkpoint_path:
            return self.out / "checkpoint.pt"
        path = Path(self._checkpoint_path).expanduser()
        is_folder = path.is_dir() or str(self._checkpoint_path).endswith(("/", "\\"))
        return path / "checkpoint.pt" if is_folder else path

    def save_checkpoint(self) -> None:
        """Write the whole state aside and rename it: plain types and tensors only."""
        state = {
            "format": CHECKPOINT_FORMAT,
            "identity": self._identity(),
            "classes": list(self.sets["train"].classes),
            "precision": self.precision,
            "devices": self.devices,
            "compiled": self.compiled,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": self.ema.updates if self.ema else None,
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "best": self.best,
            "training": self.training,
        }
        write_atomically(self.checkpoint_path, lambda path: torch.save(state, path))

    def load_checkpoint(self) -> bool:
        """Take up the state of the run's checkpoint; False where there is none."""
        state = self._read_state(self.checkpoint_path, CHECKPOINT_FORMAT)
        if state is None:
            return False
        stored = state.get("precision", self.precision)  # older checkpoints don't name it
        if stored != self.precision and state["step"] < self.total_steps:
            if self._asked_for is None:  # as it began, whatever device it goes on with
                self.precision = pick_precision(stored, self.device)
            else:
                raise InputError(
                    f"{self.checkpoint_path} is of a training in {stored}, not in "
                    f"{self.precision}; go on with --precision {stored}, or choose another folder"
                )
        if state["best"] and state["step"] < self.total_steps:
            by = state["best"].get("extractor_sha256")  # older checkpoints don't name it
            if by not in (None, self.extractor().sha256):
                raise InputError(
                    f"{self.checkpoint_path} is of a training whose best step so far was chosen by "
                    f"another extractor ({by[:8]}) than {self.extractor().name}; go on with that "
                    "one, or choose another folder"
                )
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates = int(state["ema_updates"])  # a tensor in older checkpoints
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.best = state["history"], state["best"]
        # In the order in which they trained; older checkpoints don't name them.
        self.devices = list(dict.fromkeys([*state.get("devices", []), *self.devices]))
        self.compiled = list(dict.fromkeys([*state.get("compiled", []), *self.compiled]))
        self._take_up(state)
        if self.best and not self.config.validation_epochs:
            self._keep_the_last_step()
        return True

    def _keep_the_last_step(self) -> None:
        """As if no validation had chosen another one."""
        self.best = None
        self.training = {**self.training, "kept_step": self.total_steps}
        self.history = [
            {name: value for name, value in row.items() if name != "validation_kid"}
            for row in self.history
        ]

    @property
    def weights_path(self) -> Path:
        return self.out / "weights.pt"

    def save_weights(self) -> None:
        """Write what is kept of a finished training: weights in float16, history, machine."""
        state = {
            "format": WEIGHTS_FORMAT,
            "identity": self._identity() | self.validated_with,
            "classes": list(self.sets["train"].classes),
            "training": self.training,
            "history": self.history,
            "state": self._kept_state(),
        }
        write_atomically(self.weights_path, lambda path: torch.save(state, path))

    def load_weights(self) -> bool:
        """Take up the kept weights of the finished training; False where there are none.

        The checkpoint of its end, where it is still there, is loaded as well.
        """
        state = self._read_state(self.weights_path, WEIGHTS_FORMAT)
        if state is None:
            return False
        # A checkpoint may also be one of half the way, of a training made again, or damaged.
        try:
            at_its_end = self.load_checkpoint() and self.training == state["training"]
        except InputError:
            at_its_end = False
        if not at_its_end:
            for model in (self.model, self._averaged_model()):
                model.load_state_dict(state["state"])
            self.step, self.history, self.best = self.total_steps, state["history"], None
            self.kept = state["state"]
        self._take_up(state)
        return True

    def _take_up(self, state: dict) -> None:
        """What the training took, and by which settings its validation sampled."""
        self.training = state["training"]
        stored = stored_settings(state["identity"], self.config)
        self.validated_with = {name: stored[name] for name in self.config.SAMPLING}

    def _read_state(self, path: Path, file_format: int) -> dict | None:
        """A checkpoint's or weight file's content if it is this very run's; None without a file."""
        if not path.exists():
            return None
        try:
            # To the CPU, from where every part of it is copied to where it belongs.
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
        except Exception:  # a damaged file raises nearly anything
            raise InputError(
                f"{path} is broken or no checkpoint; delete it to start anew"
            ) from None
        own = self._identity()
        stored = state.get("identity") if isinstance(state, dict) else None
        if not isinstance(stored, dict) or state.get("format") != file_format:
            raise InputError(f"{path} is not a checkpoint of this suite; delete it to start anew")
        stored = stored_settings(stored, self.config)
        names = {*stored, *own}
        if state["training"]:  # it is finished, and may be sampled by other settings
            names -= {*self.config.SAMPLING}
            if file_format == CHECKPOINT_FORMAT and not any(own[name] for name in KEEPING):
                names -= {*KEEPING}  # a checkpoint has the last step's own weights beside the kept
        differing = differences(stored, own, sorted(names))
        if differing:
            raise InputError(f"{path} is of another run: {differing}; choose another folder (out)")
        return state

    def _identity(self) -> dict:
        """What must be the same for a checkpoint to be this run's: flat, plain types."""
        config = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self.config).items()
        }
        return {
            "model": self.name,
            "preset": self.preset,
            "seed": self.seed,
            "dataset_sha256": self.dataset_sha256,
            "code_version": CODE_VERSION,
            **config,
        }

    def _named(self) -> dict:
        """The identity for keys: without later settings at the values of the runs before them,
        whose keys stay what they were.
        """
        return {
            name: value
            for name, value in self._identity().items()
            if (name, value) not in self.config.LATER.items()
        }

    # -----------------------------------------------------------------------------------------
    # Sampling
    # -----------------------------------------------------------------------------------------

    def _averaged_model(self) -> torch.nn.Module:
        """The weights that are sampled during training: their running mean where there is one."""
        return self.ema.module if self.ema else self.model

    def _ready_to_sample(self) -> torch.nn.Module:
        """A copy of the model that is sampled during training."""
        return copy.deepcopy(self._averaged_model()).eval()

    def _kept_state(self) -> dict[str, torch.Tensor]:
        """The best step's weights where validation chose one, else the last ones, in float16."""
        if self.kept:
            return self.kept
        return as_kept(self.best["state"] if self.best else self._averaged_model().state_dict())

    def kept_model(self) -> torch.nn.Module:
        """The trained model, from the very weights that are kept on the disk."""
        model = copy.deepcopy(self._averaged_model())
        model.load_state_dict(self._kept_state())
        return model.eval()

    def sample(self, labels: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """Draw one image for each label, uint8 [N, C, S, S] on the CPU.

        labels: int64 [N]; an unconditional model uses only their number. seed: of the noise, the
        run's own by default.
        """
        seed = derive_seed(self.seed if seed is None else seed, "samples")
        return self._sample_from(self.kept_model(), labels, seed)

    def _sample_from(self, model, labels: torch.Tensor, seed: int) -> torch.Tensor:
        # Only diffusion takes many passes an image; of others bfloat16 would round the pixels.
        with self._autocast(cache=True) if hasattr(model, "in_steps") else contextlib.nullcontext():
            return draw(model, labels, seed)

    # -----------------------------------------------------------------------------------------
    # Evaluation and the record
    # -----------------------------------------------------------------------------------------

    @property
    def record_path(self) -> Path:
        return self.out / "record.json"

    def extractor(self) -> features.Extractor:
        """The feature extractor, loaded once."""
        if self._extractor is None:
            self._extractor = features.load_extractor(self.extractor_name, self.device)
        features.refuse_domain(self._extractor)
        return self._extractor

    def weights_key(self) -> str:
        """Hash of config, data and code version: on one CPU, with one number of threads and in one
        precision, equal keys are equal weights.
        """
        return _hash(self._named())

    def _training_key(self) -> str | None:
        """Hash of what the training took: two of one config may differ in device or precision."""
        return _hash(self.training) if self.training else None

    def run_key(self) -> str:
        """Hash of config, data, extractor and code versions: equal keys, equal results."""
        content = {
            **self._named(),
            "extractor_sha256": self.extractor().sha256,
            "metrics_version": protocol.METRICS_VERSION,
        }
        return _hash(content)

    def finished_record(self) -> dict | None:
        """The record of this very run if it has been written, else None."""
        record = self._read_record()
        if record is None or record.get("key") != self.run_key():
            return None
        # Older records do not name these; they are no part of the key, which they would change.
        data, cells = record.get("dataset", {}), self._held_out_cells()
        return record if {name: data.get(name, cells[name]) for name in cells} == cells else None

    def has_lost_weights(self) -> bool:
        """Whether this very run was measured, and what it was measured from is not there any more.

        The weights of large runs and of ablations, for one, come with no copy of the repository.
        """
        there = self.weights_path.exists() or self.checkpoint_path.exists()
        return not there and self.finished_record() is not None

    def check_folder(self, extractor: features.Extractor | None = None) -> None:
        """Refuse a folder with the weights or the record of another run, which would be lost.

        extractor: by which the run is to be measured; a record by another one is another run's. One
        by older metrics, or against other held-out cells, may be replaced.
        """
        self._read_state(self.weights_path, WEIGHTS_FORMAT)
        record = self._read_record()
        if not record:
            return
        metrics = record.get("metrics", {})
        there = {
            "model": record.get("model"),
            "preset": record.get("preset"),
            "seed": record.get("seed"),
            "dataset_sha256": record.get("dataset", {}).get("sha256"),
            **stored_settings(record.get("config", {}), self.config),
        }
        here = self._identity()
        if extractor:
            there["extractor_sha256"] = metrics.get("protocol", {}).get("extractor_sha256")
            here["extractor_sha256"] = extractor.sha256
        differing = differences(there, here, there)
        if differing:
            raise InputError(
                f"{self.record_path} is of another run: {differing}; choose another "
                "folder (out), or delete it"
            )

    def _read_record(self) -> dict | None:
        """The record that lies in the run's folder, of whatever run; None where there is none."""
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise InputError(f"{self.record_path} is not JSON; delete it to measure anew") from None
        except OSError as error:
            raise InputError(
                f"{self.record_path} cannot be read ({error.strerror}); choose another folder"
            ) from None
        return record if isinstance(record, dict) else None

    def _held_out_cells(self) -> dict:
        held_out = self.sets["held_out"]
        return {"held_out_sha256": held_out.sha256(), "classes": list(held_out.classes)}

    def evaluate(self) -> dict:
        """Measure the trained model under the default protocol and write the run's record.

        As many images as there are held-out real ones, with their labels, are compared with the
        train split. Returns the record; a finished one is read, not measured again. Raises
        InputError for a record of another training than the one that is loaded.
        """
        self._require_splits()
        record = self.finished_record()
        if record:
            wrong = differences(record, self.training or {}, self.training or ())
            if wrong:
                raise InputError(
                    f"{self.record_path} was measured from other weights: {wrong}; delete it to "
                    "measure these, or get its own weights.pt"
                )
            return record
        self.check_folder(self.extractor())
        self._require_trained()
        held_out = self.sets["held_out"]
        start = time.monotonic()
        fakes = self.sample(held_out.labels)
        sampling_seconds = time.monotonic() - start
        labels = held_out.labels if self.model.conditional else None
        metrics, suspects = judge.judge(fakes, labels, self.sets, self.extractor())
        self._save_pictures(fakes, metrics, suspects)
        record = self._record(metrics, sampling_seconds)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        self._remove_what_other_weights_left()
        write_text(self.record_path, text)
        return record

    def _remove_what_other_weights_left(self) -> None:
        """What an earlier training in this folder was measured by besides its record."""
        own = {"weights_key": self.weights_key(), "training_key": self._training_key()}
        for name in ("per_class", "sampling"):
            try:
                stored = json.loads((self.out / f"{name}.json").read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            except ValueError:
                stored = {"weights_key": None}
            if {**own, **stored} != {**stored, **own}:  # older files don't name the training
                for path in self.out.glob(f"{name}.*"):
                    path.unlink()

    def _require_splits(self) -> None:
        missing = [split for split in SETS if split not in self.sets]
        if missing:
            raise InputError(
                f"measuring takes the splits {', '.join(SETS)}, and `sets` lacks "
                f"{', '.join(missing)}; add them, or let the pipeline load its data set"
            )

    def _require_trained(self) -> None:
        if self.training is None:
            raise InputError(
                f"{self.out} is trained to step {self.step} of {self.total_steps}; train() trains "
                "it to its end, or loads its weights"
            )

    def _save_pictures(self, fakes: torch.Tensor, metrics: dict, suspects: Suspects) -> None:
        """Grids and curves as pictures, and the first images for the comparison of models."""
        held_out, title = self.sets["held_out"], f"{self.name} {self.preset}"
        grid = figures.real_and_generated(held_out, fakes, self.model.conditional, title)
        figures.save(grid, self.out / "samples.png")
        figures.save(figures.loss_curves(self.history), self.out / "losses.png")
        figures.save(figures.suspicious_pairs(suspects), self.out / "suspicious_pairs.png")
        if metrics["frechet_infinity"]:
            fit = figures.frechet_infinity_fit(metrics["frechet_infinity"])
            figures.save(fit, self.out / "frechet_infinity.png")
        first = {
            "images": fakes[:SAVED_SAMPLES].numpy(),
            "labels": held_out.labels[:SAVED_SAMPLES].numpy(),
        }

        def write(path: Path) -> None:
            with open(path, "wb") as file:
                np.savez_compressed(file, **first)

        write_atomically(self.out / "samples.npz", write)

    def evaluate_per_class(self, n: int = per_class.N) -> dict:
        """Measure a conditional model class by class, with `n` images of each.

        Returns what `per_class.evaluate_per_class` does; kept in per_class.json, with a table and a
        picture beside it, and measured once. Raises InputError for a model without classes.
        """
        if not self.model.conditional:
            raise InputError(f"{self.name} can't be asked for a class; evaluate() measures it")
        self._require_splits()
        path = self.out / "per_class.json"
        key = {
            "weights_key": self.weights_key(),
            "extractor_sha256": self.extractor().sha256,
            "version": per_class.VERSION,
            "n": n,
        }
        later = {"training_key": self._training_key(), **self._held_out_cells()}
        key |= later
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored = {**later, **stored}  # older files do not name these
            if {name: stored.get(name) for name in key} == key:
                return stored
        self._require_trained()
        labels = class_balanced_labels(self.config.n_classes, n)
        images = self.sample(labels)
        result = per_class.evaluate_per_class(images, labels, self.sets, self.extractor())
        picture = figures.real_and_generated_by_class(result, self.sets["held_out"], images, labels)
        figures.save(picture, self.out / "per_class.png")
        budget = self.budget()
        heading = f"One training of {self.name} {self.preset}, seed {self.seed}"
        if budget != "full":
            heading += f" at a {budget} budget, whose numbers never enter the main table"
        table = per_class.per_class_markdown(result)
        write_text(self.out / "per_class.md", f"{heading}.\n\n{table}")
        text = json.dumps({**key, **result}, indent=1, ensure_ascii=False) + "\n"
        write_text(path, text)
        return {**key, **result}

    def measure_sampling(self, variants: list[dict], n: int = 512) -> list[dict]:
        """KID of the kept weights' images under other settings of the sampler.

        variants: settings of the config that sampling alone reads, such as {"sampling_steps": 8};
        the preset's own comes first. n: images of each, for the first validation cells' labels,
        all from the same noise; they are compared with the validation split, so that a setting may
        be chosen by them. Returns a row for each: settings, evaluations of the network for one
        image, kid and kid_standard_error. They are kept in sampling.json, with a picture beside it,
        and measured once. Raises InputError for a model without such settings.
        """
        if not self.config.COMPARED:
            raise InputError(
                f"{self.name} {self.preset} has no settings of sampling to compare; the presets "
                "best… of cvae and ddpm have"
            )
        self._require_splits()
        val, extractor, path = self.sets["val"], self.extractor(), self.out / "sampling.json"
        chosen = [self._sampling_settings(settings) for settings in ({}, *variants)]
        study = {
            "weights_key": self.weights_key(),
            "extractor_sha256": extractor.sha256,
            "version": SAMPLING_VERSION,
            "n": n,
            "settings": chosen,
        }
        later = {"training_key": self._training_key(), "val_sha256": val.sha256()}
        study |= later
        with contextlib.suppress(OSError, ValueError):
            stored = {**later, **json.loads(path.read_text(encoding="utf-8"))}  # as older files
            if {name: stored.get(name) for name in study} == study:
                return stored["rows"]
        self._require_trained()
        real = features.extract(val.images, extractor).to(self.device)
        model, rows = self.kept_model(), []
        for settings in progress(chosen, desc="sampler settings"):
            model.config = dataclasses.replace(self.config, **settings)
            fakes = self._sample_from(model, val.labels[:n], derive_seed(self.seed, "sampling"))
            kid_value, error = kid.kernel_distance(
                real, features.extract(fakes, extractor, cache=False).to(self.device)
            )
            rows.append(
                {
                    **settings,
                    "evaluations": model.evaluations(),
                    "kid": kid_value,
                    "kid_standard_error": error,
                }
            )
        figures.save(figures.sampling_quality(rows), self.out / "sampling.png")
        text = json.dumps({**study, "rows": rows}, indent=1) + "\n"
        write_text(path, text)
        return rows

    def _sampling_settings(self, changes: dict) -> dict:
        unknown = [name for name in changes if name not in self.config.COMPARED]
        if unknown:
            raise InputError(
                f"{', '.join(unknown)} can't be compared here; the sampler's settings are "
                f"{', '.join(self.config.COMPARED)}"
            )
        config = dataclasses.replace(self.config, **changes)
        return {name: getattr(config, name) for name in self.config.COMPARED}

    def nearest_training_images(
        self, images: torch.Tensor, k: int = 4
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For each image the k nearest training images in feature space, and their labels.

        images: uint8 [N, C, S, S]. Returns uint8 [N, k, C, S, S] and int64 [N, k].
        """
        extractor, train = self.extractor(), self.sets["train"]
        _, indices = k_nearest(
            features.extract(images, extractor), features.extract(train.images, extractor), k
        )
        return train.images[indices], train.labels[indices]

    def budget(self) -> str:
        """`full`: the preset's own epochs; `reduced`: fewer, or a stand-in; `quick`: for tests."""
        if self.preset == "quick":
            return "quick"
        fewer = self.config.epochs < MODELS[self.name].PRESETS[self.preset].epochs
        return "reduced" if fewer or self.preset.endswith("small") else "full"

    def _describe_training(self) -> dict:
        """What the training took, and on what machine: plain types."""
        images_seen = self.total_steps * self.config.images_per_step
        return {
            "steps": self.total_steps,
            "images_seen": images_seen,
            "kept_step": self.best["step"] if self.best else self.total_steps,
            "seconds": round(self.seconds, 1),
            "images_per_second": round(images_seen / self.seconds, 1),
            "precision": self.precision,
            "compiled": self.compile if len(self.compiled) == 1 else "in part",
            **describe_machine(self.device),
            "device": ", then ".join(self.devices),
        }

    def _record(self, metrics: dict, sampling_seconds: float) -> dict:
        train, held_out = self.sets["train"], self.sets["held_out"]
        duplicates = find_duplicates([self.sets[split] for split in ("train", "val", "test")])
        return {
            "key": self.run_key(),
            "weights_key": self.weights_key(),
            "model": self.name,
            "preset": self.preset,
            "budget": self.budget(),
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "dataset": {
                "source": self.dataset,
                "name": train.name,
                "split": train.split,
                "n": len(train),
                "sha256": self.dataset_sha256,
                "duplicates_across_splits": len(duplicates),
                **self._held_out_cells(),
            },
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **self.training,
            "measured": {
                "sampling_seconds": round(sampling_seconds, 1),
                "sampled_images": len(held_out),
                "precision": self.precision,
                "metrics_version": protocol.METRICS_VERSION,
                **describe_machine(self.device),
            },
            "metrics": metrics,
            "history": self.history,
            **self._other_sampling(),
        }

    def _other_sampling(self) -> dict:
        """Settings by which the history's validation KIDs, not the metrics, were sampled."""
        own = self._identity()
        other = {name: x for name, x in self.validated_with.items() if x != own[name]}
        return {"validated_with": other} if other else {}


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(there: dict, here: dict, names: Iterable[str], place: str = "here") -> str:
    """Which of these names have another value there than here, in words; empty for none."""
    return ", ".join(
        f"{name} ({there.get(name)!r} there, {here.get(name)!r} {place})"
        for name in names
        if there.get(name) != here.get(name)
    )


def pick_precision(name: str | None, device: torch.device) -> str:
    """Of a training: `name`, or the device's usual one. InputError for what it can't do well."""
    if name not in (None, "float32", "bfloat16"):
        raise InputError(f"unknown precision {name!r}; use float32 or bfloat16")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return name or ("bfloat16" if native else "float32")
    if name == "bfloat16" and not has_bfloat16_instructions():
        raise InputError(
            "this CPU has no bfloat16 instructions (AVX512-BF16 or AMX), without which bfloat16 is "
            "many times slower than float32; use float32"
        )
    return name or "float32"


def is_compiled(compile: bool | None, device: torch.device, config: ModelConfig) -> bool:
    """Whether a training's networks are: as asked, else on CUDA, of a model that gains by it."""
    if compile is None:
        return device.type == "cuda" and config.COMPILED and can_compile(device)
    if compile and not can_compile(device):
        raise InputError(
            "compiling the networks takes a compiler that is not here (for a CPU g++, or $CXX; for "
            "CUDA gcc, and Triton); install it, or do without"
        )
    return compile


def compile_networks(model: torch.nn.Module) -> None:
    """All but those of which a penalty is derived twice; in place, so that no key changes."""
    for name, network in model.named_children():
        if name not in getattr(model, "penalised", ()):
            network.compile()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it takes: a compiler for C++, or on a GPU C and Triton."""
    if device.type == "cuda":
        compilers = os.environ.get("CC"), "gcc", "clang"
        return bool(find_spec("triton")) and any(shutil.which(name) for name in compilers if name)
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return bool(shutil.which(os.environ.get("CXX") or usual))


def fuse(optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Let each update of these Adams be one kernel for all weights, as a GPU does it fastest."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = True


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies in bfloat16 by itself, up to twice as fast as in float32."""
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


@contextlib.contextmanager
def _alone_in(folder: Path):
    """Two processes that train one run would leave the record of one beside the other's weights."""
    lock = FileLock(folder / "training.lock", timeout=0)
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"another process trains in {folder}; wait for its end, or choose another folder"
            ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink()
        lock.release()


@contextlib.contextmanager
def _writing_to(folder: str | Path):
    """Turn what TensorBoard raises where it cannot write into one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; make room or choose another "
            "folder"
        ) from None


@contextlib.contextmanager
def _deterministic_on(device: torch.device):
    """Deterministic algorithms for a CPU training; they cost too much to force on a GPU, where the
    fastest convolutions are looked for instead.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    search = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(before or device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and slow
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = search


def _peak_memory() -> int | None:
    """Bytes of this process; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_machine(device: torch.device) -> dict:
    """Device, threads, memory, versions and commit of this process: plain types."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_memory()
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": None if peak is None else round(peak / 2**20),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **_versions_of(*OTHER_PACKAGES),
            "code": CODE_VERSION,
        },
        "git_commit": _git_commit(),
    }


def _versions_of(*packages: str) -> dict[str, str]:
    """Of those that are installed: a machine may have torch alone."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU ({line.split(':', 1)[1].strip()})"
    return f"CPU ({platform.processor() or sys.platform})"


def _git_commit() -> str | None:
    """The commit of the code, with `+` where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", folder, "diff", "--quiet", "HEAD", "--", "*.py"],
            capture_output=True,
            check=False,
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")
