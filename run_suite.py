"""Run the model notebooks over several seeds, one process each, then compare the models.

    python run_suite.py --models cvae dcgan --preset baseline --seeds 5 --data-root DATA
    python run_suite.py --ablations published --data-root DATA
    python run_suite.py --study bccd --data-root DATA
    python run_suite.py --study generators --data-root DATA
    python run_suite.py --remeasure results --extractor inception --out results/fid

A finished run is skipped, an interrupted one goes on where its last checkpoint stands, a failed
one is named at the end with its cause while the others go on. Exit code 0: all runs are there;
1: some failed; 2: bad input, found before anything started.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import psutil
import torch
from tqdm import tqdm

from custom_models import MODELS, make_config, usual_image_size
from custom_models.ablations import GRIDS, LAST_WEIGHTS, Ablation
from custom_models.classifiers import make_classifier
from custom_models.config import parse_settings, stored_settings
from evaluation import augmentation, figures
from evaluation.gallery import check_page, write_gallery
from evaluation.judge import measure_real_images
from evaluation.tables import REDUCED_SEEDS, ablation_table, collect, write_ablation_table
from evaluation.train_on_generated import (
    may_be_shown,
    read_or_measure,
    train_on_generated,
    write_report,
)
from generative_pipeline import (
    RESULTS,
    GenerativePipeline,
    default_results,
    has_bfloat16_instructions,
    run_folder,
)
from utils import (
    LOADERS,
    UPRIGHT,
    InputError,
    OneSentenceParser,
    exit_on_bad_input,
    pick_device,
    write_atomically,
)

ROOT = Path(__file__).resolve().parent
COMPARE = ROOT / "notebooks" / "compare_models.ipynb"
STUDY = ROOT / "notebooks" / "augmentation_study.ipynb"
GENERATORS = "generators"  # the study that trains on what finished runs generate
# Papermill is not safe in threads, and a process of its own can be ended when it hangs. The kernel
# "python3" is that of the interpreter that runs this file.
EXECUTE = """
import json, sys, papermill
papermill.execute_notebook(**json.loads(sys.argv[1]), kernel_name="python3", progress_bar=False)
"""
WIDGET = "application/vnd.jupyter.widget-view+json"
# Papermill notices a dead kernel within seconds; one that still waits after so long never will.
KERNEL_GONE_SECONDS = 60
# Two kernels that start at the same moment may take the same port; one of them then dies at once.
NOT_STARTED = "Kernel died before replying to kernel_info"
START_ATTEMPTS = 3
# What a run is doing when so many quarters of its training are over.
STAGES = ("at 0 %", "at 25 %", "at 50 %", "at 75 %", "trained, being measured")


@dataclass(frozen=True, eq=False)  # hashed by identity: the parameters are a dict
class Task:
    """One notebook to execute: `source` with `parameters` becomes `target`."""

    name: str
    source: Path
    target: Path
    parameters: dict

    @property
    def record(self) -> Path:
        return self.target.parent / "record.json"

    def result(self) -> str:
        """The run's numbers in one line."""
        return describe(self.record)


class StudyTask(Task):
    """One fold and seed of an augmentation study, whose arms have a record each."""

    @property
    def record(self) -> Path:
        """Where these records lie."""
        return self.target.parent.parent

    def result(self) -> str:
        return "all arms measured"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneSentenceParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", help=f"some of {', '.join(MODELS)} (all; all of the grid)"
    )
    parser.add_argument("--preset", help="baseline, quick, … (baseline)")
    parser.add_argument(
        "--ablations",
        metavar="GRID",
        help=f"run the changed settings of a grid instead of a preset: {', '.join(GRIDS)}",
    )
    parser.add_argument(
        "--study",
        help="run the folds of an augmentation study instead of models: "
        f"{', '.join(augmentation.DEFAULTS)}; {GENERATORS} trains nothing but classifiers, on the "
        "images of every finished conditional run in --out",
    )
    parser.add_argument(
        "--seeds", type=int, help="number of seeds, from 0 on (5; of a grid 3, of a study 1)"
    )
    parser.add_argument(
        "--dataset", help=f"one of {', '.join(LOADERS)} (bloodmnist; a study has its own)"
    )
    parser.add_argument("--data-root", help="folder with the data sets ($DATA_ROOT, else data)")
    parser.add_argument(
        "--extractor",
        help="inception, demo or a TorchScript file ($EXTRACTOR, else inception)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one setting of every model's config, such as image_size (the data set's "
        "usual one), or one parameter of the study's notebook; may be given again",
    )
    parser.add_argument(
        "--out",
        help="folder of the results (results, of other data and sizes a folder in it)",
    )
    parser.add_argument(
        "--remeasure",
        metavar="RESULTS",
        help="train nothing: measure the kept weights of the runs in RESULTS anew, into --out; all "
        "of the data set, or those that --models, --preset and --seeds leave",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time, spread over all GPUs (1)"
    )
    return parser.parse_args(arguments)


# ---------------------------------------------------------------------------------------------
# What there is to do
# ---------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Refuse what can be told now, and hand data root and extractor to the notebooks.

    They go through the environment, so that no kept notebook holds a path of this machine.
    """
    for name in ("seeds", "jobs"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise InputError(f"--{name} must be at least 1, got {number}")
    if options.seeds is None and not options.remeasure and options.study != GENERATORS:
        options.seeds = 1 if options.study else 3 if options.ablations else 5
    asked = options.out
    options.out = Path(asked).expanduser().resolve() if asked else RESULTS
    data_root = options.data_root or os.environ.get("DATA_ROOT")
    extractor = options.extractor or os.environ.get("EXTRACTOR")
    if data_root:
        os.environ["DATA_ROOT"] = str(Path(data_root).expanduser().resolve())
    if extractor:
        named = extractor in ("inception", "demo", "domain")
        file = Path(extractor).expanduser().resolve()
        os.environ["EXTRACTOR"] = extractor if named else str(file)
    pick_device(options.device)
    options.settings = parse_settings(options.set)
    if options.study:
        _check_study(options)
        if options.study == GENERATORS:
            _check_generators(options)
        return
    options.dataset = options.dataset or "bloodmnist"
    if options.ablations:
        _check_ablations(options)
        return
    if options.remeasure:
        check_page(options.out)
        _check_remeasuring(options)
        return
    options.preset = options.preset or "baseline"
    _check_models(options, options.preset)
    sizes = {model: _image_size(options, model, options.preset) for model in options.models}
    for model, size in sizes.items():
        make_config(model, options.preset, **options.settings | {"image_size": size})
    if len(set(sizes.values())) > 1:
        words = ", ".join(f"{model} {size}" for model, size in sizes.items())
        raise InputError(
            f"these models draw images of different sizes ({words}), which no table compares; "
            "name those of one size with --models, or a size with --set image_size=64"
        )
    if not asked:
        root = os.environ.get("DATA_ROOT")
        options.out = default_results(options.dataset, root, *set(sizes.values()))
    check_page(options.out)


def _image_size(options: argparse.Namespace, model: str, preset: str) -> int:
    """Of a model's runs in the suite, in pixels."""
    usual = usual_image_size(model, preset, options.dataset)
    return options.settings.get("image_size", usual)


def _check_models(options: argparse.Namespace, preset: str) -> None:
    have_it = [name for name in MODELS if preset in MODELS[name].PRESETS]
    options.models = list(dict.fromkeys(options.models or have_it or MODELS))
    for model in options.models:
        make_config(model, preset)


def suite_tasks(options: argparse.Namespace) -> list[list[Task]]:
    """For each model its runs, one for each seed."""
    return [
        _tasks(
            options,
            model,
            options.preset,
            options.settings,
            run_folder(options.out, model, options.preset, 0).parent,
        )
        for model in options.models
    ]


def plan(rows: list[list[Task]]) -> tuple[list[Task], list[Task]]:
    """The runs that are there already, and those to do: the first seed of every row first.

    rows: runs that differ in their seed alone. Loads the data and the extractor, so that a fault
    in them is told before hours of training.
    """
    done, to_do = [], []
    for row in rows:
        for task in row:
            _check_parameters(task)
    for row in rows:
        pipeline = _pipeline(row[0], device="cpu")  # nothing is computed here
        pipeline.extractor()
        for seed, task in enumerate(row):
            # The data is the same for every seed: load it once.
            pipeline.seed, pipeline.out = seed, task.target.parent
            record = pipeline.finished_record()
            if not record:
                pipeline.check_folder(pipeline.extractor())
            # A run whose weights are gone can't be shown again, but it has been measured.
            is_done = record and (_is_whole(task.target) or pipeline.has_lost_weights())
            (done if is_done else to_do).append(task)
    return done, sorted(to_do, key=lambda task: task.parameters["seed"])


def check_neighbours(options: argparse.Namespace) -> None:
    """Refuse a folder of runs under other rules, whose tables the new comparison would replace."""
    folder, pipeline = options.out / "runs", _pipeline(suite_tasks(options)[0][0], device="cpu")
    name, size = pipeline.sets["held_out"].name, pipeline.config.image_size
    own = name, size, pipeline.extractor().sha256
    for record in collect(folder):
        rules = record["metrics"]["protocol"]
        if (rules["dataset"], rules["image_size"], rules["extractor_sha256"]) != own:
            raise InputError(
                f"{folder} has runs on {rules['dataset']} at {rules['image_size']} pixels, "
                f"measured with {rules['extractor']}, which no table compares with {name} at "
                f"{size} pixels and {pipeline.extractor().name}; choose another folder with --out"
            )


def _pipeline(task: Task, device: str) -> GenerativePipeline:
    parameters = task.parameters
    return GenerativePipeline(
        task.source.stem,
        preset=parameters["preset"],
        dataset=parameters["dataset"],
        out=task.target.parent,
        device=device,
        **parameters["settings"],
    )


def measure_real_cells(task: Task) -> None:
    """Measure the real cells before the first run, with bars; all runs find it in the cache.

    task: any of the runs, which share their data. Left to the runs it would look as if they stood,
    for minutes on a CPU, and those at the same time would each do it. A process of its own gives
    back the memory that it took, a GPU's, too.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            pool.submit(_measure_real_cells, task).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            print(
                "measuring them was ended for want of memory, it seems; each run tries anew",
                file=sys.stderr,
            )
        except BaseException:  # leaving would wait for the process
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _measure_real_cells(task: Task) -> None:
    pipeline = _pipeline(task, task.parameters["device"])
    measure_real_images(pipeline.sets, pipeline.extractor())


def _tasks(
    options: argparse.Namespace,
    model: str,
    preset: str,
    settings: dict,
    folder: Path,
    change: str = "",
) -> list[Task]:
    """One run for each seed, in folder/seedK. change: what the settings are called, if anything."""
    source = ROOT / "notebooks" / f"{model}.ipynb"
    name = f"{model} {preset}, {change}," if change else f"{model} {preset}"
    tasks = []
    for seed in range(options.seeds):
        out = folder / f"seed{seed}"
        parameters = {
            "preset": preset,
            "dataset": options.dataset,
            "seed": seed,
            "out": _portable(out),
            "device": options.device,
            "settings": settings,
        }
        tasks.append(Task(f"{name} seed {seed}", source, out / "notebook.ipynb", parameters))
    return tasks


def _compare_task(options: argparse.Namespace, records: list[dict]) -> Task:
    """The comparison of the runs of the suite, or of those that these records are of."""
    if records:
        size = records[0]["config"]["image_size"]
    else:
        size = _image_size(options, options.models[0], options.preset)
    parameters = {
        "results": _portable(options.out),
        "dataset": options.dataset,
        "image_size": size,
        "out": _portable(options.out),
    }
    return Task("comparison", COMPARE, options.out / COMPARE.name, parameters)


def _portable(path: Path) -> str:
    """Relative to the repository, in which the notebooks run, where the path lies in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _check_parameters(task: Task) -> None:
    """Papermill only warns of a parameter that the notebook does not have."""
    if not task.source.is_file():
        raise InputError(f"{task.source} does not exist; get it back from the repository")
    known = papermill.inspect_notebook(task.source)
    unknown = [name for name in task.parameters if name not in known]
    if unknown:
        raise InputError(
            f"{task.source} has no parameter {', '.join(unknown)}; "
            f"its parameters cell has {', '.join(known) or 'none'}"
        )


def _settings(record: dict) -> dict:
    """What a run's config was, in the types of a config, without what the data decides."""
    preset = make_config(record["model"], record["preset"])
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored_settings(record["config"], preset).items()
        if name not in ("n_classes", "image_channels")
    }


def _is_whole(path: Path) -> bool:
    """Whether an executed notebook is there, from its first cell to its last."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):
        return False
    state = notebook.metadata.get("papermill", {})
    return state.get("exception") is None and state.get("end_time") is not None


# ---------------------------------------------------------------------------------------------
# Ablations
# ---------------------------------------------------------------------------------------------


def _check_ablations(options: argparse.Namespace) -> None:
    for name in ("preset", "set", "remeasure"):
        if getattr(options, name):
            raise InputError(
                f"--{name} does not go with --ablations, whose rows have presets and settings of "
                "their own; leave one of the two out"
            )
    if options.ablations not in GRIDS:
        raise InputError(f"unknown grid {options.ablations!r}; known are {', '.join(GRIDS)}")
    known = dict.fromkeys(row.model for row in GRIDS[options.ablations])
    options.models = list(dict.fromkeys(options.models or known))
    for model in options.models:
        if model not in known:
            raise InputError(
                f"the grid {options.ablations} has no row for the model {model!r}; "
                f"it has rows for {', '.join(known)}"
            )


def ablation_tasks(options: argparse.Namespace) -> list[list[Task]]:
    """For each row of the grid, of the models asked for, its runs, one for each seed."""
    return [
        _tasks(
            options,
            row.model,
            row.preset,
            row.settings,
            _ablation_folder(options, row),
            row.name if row.settings else "",
        )
        for row in GRIDS[options.ablations]
        if row.model in options.models
    ]


def _ablation_folder(options: argparse.Namespace, row: Ablation) -> Path:
    """Where the row's seeds lie. A row that changes nothing has the runs of the suite itself."""
    if not row.settings:
        return run_folder(options.out, row.model, row.preset, 0).parent
    slug = re.sub("[^a-z0-9.]+", "-", row.name.lower())
    grid = options.out / "ablations" / options.ablations
    return grid / f"{row.model}-{row.preset}-{slug}"


def share_weights(options: argparse.Namespace) -> None:
    """Give rows that leave the training as it is what the suite's runs have kept of theirs.

    These are rows of other sampling, whose records tell by which settings the kept step was chosen,
    and those of the last weights, which a run's checkpoint has until its folder is tidied up.
    """
    for row in GRIDS[options.ablations]:
        sampling = {*make_config(row.model, row.preset).SAMPLING}
        if row.model not in options.models or not row.settings:
            continue
        if not row.settings.keys() - sampling:
            name = "weights.pt"
        elif row.settings == LAST_WEIGHTS:
            name = "checkpoint.pt"
        else:
            continue
        for seed in range(options.seeds):
            run = run_folder(options.out, row.model, row.preset, seed)
            copy = _ablation_folder(options, row) / f"seed{seed}" / name
            finished = (run / "weights.pt").is_file() and (run / name).is_file()
            if finished and not copy.exists():
                write_atomically(copy, functools.partial(shutil.copyfile, run / name))


def ablation_records(options: argparse.Namespace) -> list[tuple[Ablation, list[dict]]]:
    """Each row of the grid with the records that it has by now, of any number of seeds.

    Raises InputError for a record with other settings, such as one from before the grid changed.
    """
    found = []
    for row in GRIDS[options.ablations]:
        folder = _ablation_folder(options, row)
        records = collect(folder)
        wanted = dataclasses.asdict(make_config(row.model, row.preset, **row.settings))
        for record in records:
            settings = _settings(record)
            by_data = {"jpeg_quality", "image_size"}
            if record["dataset"]["name"].startswith(UPRIGHT):
                by_data |= {"flips_and_turns"}
            for name in by_data - row.settings.keys():
                settings.pop(name, None)
            if any(wanted.get(name) != value for name, value in settings.items()):
                raise InputError(
                    f"{folder} holds a run with other settings than the row {row.name!r} of "
                    f"{row.model} in the grid {options.ablations}; move it away"
                )
        found.append((row, records))
    return found


def compare_ablations(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """Write table.md, table.csv and ablations.png of the grid; returns what there is to open."""
    folder = options.out / "ablations" / options.ablations
    rows = ablation_table(ablation_records(options))
    write_ablation_table(rows, folder)
    figures.save(figures.ablations(rows), folder / "ablations.png")
    return [
        (folder / "table.md", "every row of the grid against the unchanged preset"),
        (folder / "ablations.png", "the same as a picture"),
    ]


# ---------------------------------------------------------------------------------------------
# Augmentation studies
# ---------------------------------------------------------------------------------------------

STUDY_SETTINGS = tuple(field.name for field in dataclasses.fields(augmentation.Study))


def _check_study(options: argparse.Namespace) -> None:
    for name in ("models", "preset", "ablations", "remeasure", "extractor"):
        if getattr(options, name):
            raise InputError(
                f"--{name} does not go with --study; change the study by --set, such as "
                "--set updates=100"
            )
    fixed = ("study", "fold", "seed", "name", "dataset", "data_root", "out", "device")
    for name in fixed:
        if name in options.settings:
            raise InputError(f"--set {name}= is not for a study: it is decided by other options")


def _check_generators(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("set", "dataset", "seeds")}
    given["jobs"] = options.jobs > 1
    for name in given:
        if given[name]:
            raise InputError(
                f"--{name} does not go with --study {GENERATORS}: it measures all runs in --out, "
                "one after the other, by fixed rules"
            )


def plan_study(options: argparse.Namespace) -> tuple[list[Task], list[Task]]:
    """The folds that are finished, notebook and all records, and those to do.

    Builds the first fold, the generator's config and the classifiers, so that a fault in them is
    told before anything is trained.
    """
    changes = {name: value for name, value in options.settings.items() if name in STUDY_SETTINGS}
    study = augmentation.make_study(options.study, dataset=options.dataset, **changes)
    fixed = {"study": options.study, "dataset": options.dataset, **options.settings}
    fixed |= {"out": _portable(options.out), "device": options.device}
    tasks = []
    for seed in range(options.seeds):
        for fold in range(augmentation.FOLDS):
            folder = augmentation.fold_folder(options.out, study.name, fold, seed)
            name = f"{study.name} fold {fold} seed {seed}"
            parameters = {**fixed, "fold": fold, "seed": seed}
            tasks.append(StudyTask(name, STUDY, folder / "notebook.ipynb", parameters))
    _check_parameters(tasks[0])
    config = make_config(study.generator, image_size=study.image_size, **study.generator_settings)
    augmentation.check_generator(study.generator, config.build())
    default = papermill.inspect_notebook(STUDY)["classifiers"]["default"]
    classifiers = options.settings.get("classifiers", ast.literal_eval(default))
    if not isinstance(classifiers, list | tuple) or not classifiers:
        raise InputError(f"classifiers must be names in a list, got {classifiers!r}")
    first = augmentation.make_fold(study, 0)
    for classifier in classifiers:
        make_classifier(classifier, len(first.train.classes), study.image_size)
    done, to_do = [], []
    for task in tasks:
        run = task.parameters["fold"], task.parameters["seed"], first.dataset_sha256
        records = [
            augmentation.finished_record(
                options.out, augmentation.identity(study, arm, classifier, *run)
            )
            for classifier in classifiers
            for arm in augmentation.arms(study)
        ]
        (done if all(records) and _is_whole(task.target) else to_do).append(task)
    return done, to_do


def report_study(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """Write the study's tables and figures; returns what there is to open."""
    folder = augmentation.study_folder(options.out, options.study)
    words = {".md": "tables", ".csv": "the same with all digits", ".png": "figure"}
    paths = augmentation.write_report(folder)
    # The last fold's: those that ran before it could not show its records.
    last = sorted(folder.glob("fold*-seed0/notebook.ipynb"))[-1:]
    return [
        *((path, words[path.suffix]) for path in paths),
        *((path, "explained and executed") for path in last),
    ]


# ---------------------------------------------------------------------------------------------
# Measuring kept weights anew
# ---------------------------------------------------------------------------------------------


def records_to_remeasure(options: argparse.Namespace) -> list[dict]:
    """The records of all runs, or of those that were asked for, of one image size."""
    source = Path(options.remeasure).resolve()
    records = collect(source / "runs")
    if not records:
        raise InputError(f"{source / 'runs'} holds no record; train a model first")
    chosen = [record for record in records if _is_asked_for(record, options)]
    if not chosen:
        raise InputError(
            f"none of the {len(records)} records in {source / 'runs'} is of the models, preset, "
            "seeds and data set asked for; leave out one of these options"
        )
    sizes = sorted({record["config"]["image_size"] for record in chosen})
    if len(sizes) > 1:
        raise InputError(
            f"the runs in {source} have images of {' and '.join(map(str, sizes))} pixels, which "
            "share no table; name the --models or the --preset of one size"
        )
    return chosen


def remeasure(options: argparse.Namespace, records: list[dict]) -> dict[str, str]:
    """Measure the runs' kept weights with the extractor that was asked for.

    Returns the causes of those that failed, by the run's name.
    """
    source, failures = Path(options.remeasure).resolve(), {}
    for record in records:
        name = f"{record['model']} {record['preset']} seed {record['seed']}"
        try:
            print(f"{name}: {_remeasure_run(record, source, options)}", flush=True)
        except InputError as error:
            failures[name] = str(error)
    return failures


def _check_remeasuring(options: argparse.Namespace) -> None:
    if options.settings:
        raise InputError("--set does not go with --remeasure, which takes each run as it is")
    if options.jobs > 1:
        raise InputError("--jobs does not go with --remeasure, which takes one run after the other")
    if Path(options.remeasure).resolve() == options.out:
        raise InputError("--remeasure would overwrite its own records; choose another --out")
    _check_models(options, options.preset or "baseline")


def _is_asked_for(record: dict, options: argparse.Namespace) -> bool:
    model, preset, seed = _run(record)
    return (
        model in options.models
        and preset == (options.preset or preset)
        and (options.seeds is None or seed < options.seeds)
        and record["dataset"]["source"] == options.dataset
    )


def _remeasure_run(record: dict, source: Path, options: argparse.Namespace) -> str:
    target = run_folder(options.out, *_run(record))
    weights, copy = _kept_weights(record, source), target / "weights.pt"
    if copy.exists() and copy.read_bytes() != weights.read_bytes():
        raise InputError(f"{copy} holds the weights of another training; choose another --out")
    write_atomically(copy, lambda path: shutil.copyfile(weights, path))
    pipeline = _trained_pipeline(record, target, options.device)
    pipeline.evaluate()
    return describe(pipeline.record_path)


def _run(record: dict) -> tuple[str, str, int]:
    return record["model"], record["preset"], record["seed"]


def _weights(record: dict, source: Path) -> Path:
    return run_folder(source, *_run(record)) / "weights.pt"


def _kept_weights(record: dict, source: Path) -> Path:
    weights = _weights(record, source)
    if not weights.is_file():
        raise InputError(f"{weights} was not kept; train this run again")
    return weights


def _trained_pipeline(record: dict, folder: Path, device: str) -> GenerativePipeline:
    """The record's run, with the weights that lie in `folder`."""
    model, preset, seed = _run(record)
    precision = record.get("measured", {}).get("precision")  # in which it drew
    if pick_device(device).type == "cpu" and not has_bfloat16_instructions():
        precision = None  # another CPU may have drawn in bfloat16
    pipeline = GenerativePipeline(
        model,
        preset=preset,
        seed=seed,
        dataset=record["dataset"]["source"],
        out=folder,
        device=device,
        precision=precision,
        **_settings(record),
    )
    pipeline.train()  # loads the weights
    return pipeline


def measure_generators(options: argparse.Namespace) -> dict[str, str]:
    """Train classifiers on what every finished conditional run generates, test them on real cells.

    Writes a record for each run, the table and the figure. Returns the causes of what failed, by
    the run's name.
    """
    folder = augmentation.study_folder(options.out, GENERATORS)
    failures, runs = {}, []
    for record in may_be_shown(collect(options.out / "runs")):
        model, preset, seed = _run(record)
        name = f"{model} {preset} seed {seed}"
        path = folder / f"{model}-{preset}-seed{seed}.json"
        if not (path.exists() or _weights(record, options.out).is_file()):
            print(f"{name}: left out, since its weights are not kept here")
            continue
        if "weights_key" not in record:
            failures[name] = "its record is older than this study; measure the run again"
            continue

        def measure(record=record) -> dict:
            weights = _kept_weights(record, options.out)
            pipeline = _trained_pipeline(record, weights.parent, options.device)
            labels = pipeline.sets["held_out"].labels
            images = pipeline.sample(labels)
            rest = record["seed"], make_classifier, pipeline.device
            return train_on_generated(images, labels, pipeline.sets, *rest)

        try:
            found = read_or_measure(path, record, measure)
        except InputError as error:
            failures[name] = str(error)
            continue
        runs.append((record, found))
        scores = [found[part]["balanced_accuracy"] for part in ("generated", "real")]
        print(f"{name}: balanced accuracy {scores[0]:.3f}; of real cells {scores[1]:.3f}")
    # Those whose weights are not here may leave too few of a reduced budget.
    here = Counter((*_run(record)[:2], record["budget"]) for record, _ in runs)
    runs = [
        (record, found)
        for record, found in runs
        if record["budget"] == "full" or here[(*_run(record)[:2], "reduced")] >= REDUCED_SEEDS
    ]
    if runs:
        words = {".md": "table", ".csv": "the same with all digits", ".png": "figure"}
        paths = write_report(runs, folder)
        _print_files([(path, words[path.suffix]) for path in paths])
    elif not failures:
        raise InputError(
            f"no run in {options.out / 'runs'} has its weights.pt; train one again with make suite"
        )
    return failures


# ---------------------------------------------------------------------------------------------
# Doing it
# ---------------------------------------------------------------------------------------------


class Runner:
    """Executes tasks, each in a process of its own, and knows which of them are under way."""

    def __init__(self, jobs: int):
        self.environment = {
            **os.environ,
            "JUPYTER_PREFER_ENV_PATH": "1",  # this interpreter's kernel before the user's own
        }
        if jobs > 1:
            threads = max(1, torch.get_num_threads() // jobs)
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.gpus = Counter(dict.fromkeys(visible_gpus(), 0))  # and how many tasks each has
        self.processes: dict[Task, subprocess.Popen] = {}
        self.lock = threading.Lock()
        self.stopped = False

    def execute(self, task: Task) -> str | None:
        """Execute the notebook aside and rename it; returns the cause where it failed."""
        try:
            return self._execute(task)
        except OSError as error:  # of its folder; the other tasks go on
            return f"{task.target.parent} cannot be written ({error.strerror or error})"

    def _execute(self, task: Task) -> str | None:
        task.target.parent.mkdir(parents=True, exist_ok=True)
        failed = task.target.with_name("failed.ipynb")
        partial = task.target.with_name(f"{task.target.name}.partial")
        for _ in range(START_ATTEMPTS):
            cause = self._attempt(task, partial)
            if cause is None or NOT_STARTED not in cause:
                break
        if cause is None:
            _drop_progress_bars(partial)
            partial.replace(task.target)
            failed.unlink(missing_ok=True)
        elif partial.exists():
            partial.replace(failed)
        return cause

    def _attempt(self, task: Task, partial: Path) -> str | None:
        request = {
            "input_path": _portable(task.source),
            "output_path": _portable(partial),
            "parameters": task.parameters,
        }
        with tempfile.TemporaryFile("w+") as log, self._a_gpu(task) as own:
            with self.lock:
                if self.stopped:
                    return "stopped"
                process = self.processes[task] = subprocess.Popen(
                    [sys.executable, "-c", EXECUTE, json.dumps(request)],
                    env=self.environment | own,
                    cwd=ROOT,  # the kernel's folder, too
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )
            kernel_gone = _watch(process)
            self.processes.pop(task)
            log.seek(0)
            if process.returncode == 0 and _is_whole(partial):
                return None
            return _cause(partial, log.read(), process.returncode, kernel_gone)

    @contextlib.contextmanager
    def _a_gpu(self, task: Task) -> Iterator[dict[str, str]]:
        """The environment in which a task sees one of several GPUs, that with the fewest tasks."""
        if len(self.gpus) < 2 or task.parameters.get("device") not in ("auto", "cuda"):
            yield {}
            return
        with self.lock:
            gpu = min(self.gpus, key=self.gpus.get)
            self.gpus[gpu] += 1
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
        finally:
            with self.lock:
                self.gpus[gpu] -= 1

    def stop(self) -> None:
        """End every process under way, kernels first: they would otherwise train on."""
        with self.lock:
            self.stopped = True
            for process in list(self.processes.values()):
                _end(process)


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    known = names.split(",") if names else map(str, itertools.count())
    return list(itertools.islice(known, torch.cuda.device_count()))


def _watch(process: subprocess.Popen) -> bool:
    """Wait for papermill. True if it had to be ended, since it waited for a kernel that is gone."""
    had_kernel, alone_since = False, None
    while process.poll() is None:
        time.sleep(0.5)
        if _kernels(process):
            had_kernel, alone_since = True, None
        elif had_kernel:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > KERNEL_GONE_SECONDS:
                _end(process)
                process.wait()
                return True
    return False


def _kernels(process: subprocess.Popen) -> list[psutil.Process]:
    """Living processes under papermill's."""
    living = []
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.status() != psutil.STATUS_ZOMBIE:
                living.append(child)
    except psutil.NoSuchProcess:
        pass  # it ended while we looked
    return living


def _end(process: subprocess.Popen) -> None:
    for child in _kernels(process):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.kill()


def _drop_progress_bars(path: Path) -> None:
    """They are live widgets; what is kept of them would say 0 % for ever."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def _cause(notebook: Path, log: str, code: int, kernel_gone: bool) -> str:
    """Why a notebook failed, in one line: its own error where a cell raised one."""
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (OSError, ValueError, nbformat.ValidationError):
        cells = []
    errors = [o for cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
    if errors:
        lines = errors[-1].evalue.strip().splitlines() or [""]
        return f"{errors[-1].ename}: {lines[0]}"
    if kernel_gone or "DeadKernelError" in log:
        return "the kernel died (killed, perhaps for want of memory)"
    if code < 0:
        return f"papermill was ended by {signal.Signals(-code).name}"
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"papermill ended with exit code {code}"


def _takes_a_gpu(task: Task) -> bool:
    """Whether it trains diffusion, or a cWGAN-GP of larger images, at its full length."""
    # A task of a study has no preset.
    preset = task.parameters.get("preset")
    large = {
        "ddpm": ("baseline", "best", "best_64", "best_128"),
        "cwgan_gp": ("published", "best_64"),
    }
    return preset in large.get(task.source.stem, ())


def run_all(tasks: list[Task], jobs: int) -> dict[Task, str]:
    """Execute all tasks, with a bar and a line for each; returns the causes of those that failed.

    The bar counts quarters of trainings, by the progress grids that they leave.
    """
    failures: dict[Task, str] = {}
    runner = Runner(jobs)
    bar = tqdm(
        total=len(tasks),
        bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} left{postfix}",
        # A terminal's line is drawn anew each second; a log gets one line a minute.
        mininterval=1 if sys.stderr.isatty() else 60,
        miniters=0,
    )
    executor = ThreadPoolExecutor(jobs)
    pending = {executor.submit(runner.execute, task): task for task in tasks}
    finished = 0
    try:
        while pending:
            ready, _ = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            for future in ready:
                task = pending.pop(future)
                finished += 1
                cause = future.result()
                if cause:
                    failures[task] = cause
                bar.write(f"{task.name}: {cause or task.result()}", file=sys.stdout)
                sys.stdout.flush()
            running = {task: _quarters(task) for task in list(runner.processes)}
            words = [f"{finished} of {len(tasks)} runs done"]
            words += [f"{task.name} {STAGES[n]}" for task, n in running.items()]
            bar.set_postfix_str("; ".join(words), refresh=False)
            # A run that is being measured is not over yet.
            bar.update(finished + sum(min(3.5, n) for n in running.values()) / 4 - bar.n)
    finally:
        runner.stop()
        executor.shutdown(cancel_futures=True)
        bar.close()
    return failures


def _quarters(task: Task) -> int:
    """Quarters of the training that are over, by its progress grids."""
    grids = (task.target.parent / "progress").glob("[01][0-9][0-9].png")
    return max((int(path.stem) // 25 for path in grids), default=0)


def describe(record: Path) -> str:
    """A run's numbers in one line."""
    metrics = json.loads(record.read_text(encoding="utf-8"))["metrics"]
    distance = metrics["frechet_distance"]
    words = f"{metrics['distance_name']} {distance:.1f}, " if distance is not None else ""
    return f"{words}KID {metrics['kid']:.4g}"


def _files(options: argparse.Namespace, comparison: Task) -> list[tuple[Path, str]]:
    """What there is to open after the comparison of the models, with a few words each."""
    out = options.out
    found = [(path, "table") for path in sorted(out.glob("results*.md"))]
    found += [(out / "comparison.png", "real cells and every model's, side by side")]
    found += [(comparison.target, "comparison of the models")]
    for model in options.models:
        folder = run_folder(out, model, options.preset, 0)
        found += [(folder / "notebook.ipynb", f"{model}, explained and executed")]
        found += [(folder / "samples.png", f"{model}'s cells beside real ones")]
    return found


def _print_files(found: list[tuple[Path, str]]) -> None:
    found = [(_short(path), words) for path, words in found if path.exists()]
    width = max((len(path) for path, _ in found), default=0)
    print("\nOpen:")
    for path, words in found:
        print(f"  {path:{width}}  {words}")


def _short(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    # An end by SIGTERM must pass through the clean-up, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("checking parameters, data and extractor …", flush=True)
    check(options)
    if options.study == GENERATORS:
        return _report_failures(measure_generators(options))
    if options.study:
        done, to_do = plan_study(options)
    elif options.ablations:
        ablation_records(options)  # a run of other settings is told now, not after the trainings
        share_weights(options)
        done, to_do = plan(ablation_tasks(options))
    else:
        records = records_to_remeasure(options) if options.remeasure else []
        comparison = _compare_task(options, records)
        _check_parameters(comparison)
        if options.remeasure:
            failures = remeasure(options, records)
            cause = _compare(comparison)
            if cause:
                failures[comparison.name] = cause
            return _report_failures(failures)
        done, to_do = plan(suite_tasks(options))
        check_neighbours(options)
    for task in done:
        print(f"{task.name}: {task.result()} (finished before)")
    print(
        f"{len(done) + len(to_do)} runs: {len(done)} finished before, {len(to_do)} to do",
        flush=True,
    )
    slow = [task for task in to_do if _takes_a_gpu(task)]
    slow = slow if pick_device(options.device).type == "cpu" else []
    if slow:
        to_do = [task for task in to_do if task not in slow] + slow
        print(
            f"of these, {len(slow)} want half a day or more on a CPU, and come last: diffusion, or "
            "the cWGAN-GP of larger cells; leave them out with --models (MODELS= of make)",
            flush=True,
        )
    if to_do and not options.study:
        print("measuring the real cells, once for all runs …", flush=True)
        measure_real_cells(to_do[0])
    failures = run_all(to_do, options.jobs) if to_do else {}
    measured = any(task.record.exists() for task in done + to_do)
    if measured and not (options.ablations or options.study):
        print("comparing the models …", flush=True)
        cause = _compare(comparison)
        if cause:
            failures[comparison] = cause
    for task in failures:
        failed = task.target.with_name("failed.ipynb")
        if failed.exists():
            failures[task] += f" (see {_short(failed)})"
    causes = {task.name: cause for task, cause in failures.items()}
    try:  # whatever is wrong with it, the failed runs are to be named all the same
        if measured and options.study:
            _print_files(report_study(options))
        elif measured and options.ablations:
            _print_files(compare_ablations(options))
        elif measured and comparison not in failures:
            write_gallery(options.out)
    except InputError as error:
        what = "the study" if options.study else "the grid" if options.ablations else "all runs"
        causes[f"table of {what}"] = str(error)
    if measured and not (options.ablations or options.study):
        _print_files(_files(options, comparison))
    return _report_failures(causes)


def _compare(comparison: Task) -> str | None:
    """Execute the comparison of the models; returns why it failed, if it did."""
    runner = Runner(jobs=1)
    try:
        return runner.execute(comparison)
    finally:
        runner.stop()


def _report_failures(causes: dict[str, str]) -> int:
    """Name what failed on stderr; returns the exit code."""
    for name, cause in causes.items():
        print(f"failed: {name}: {cause}", file=sys.stderr)
    return 1 if causes else 0


if __name__ == "__main__":
    with exit_on_bad_input():
        sys.exit(main())
