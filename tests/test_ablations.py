"""Grids of ablations: their rows, the table and the figure, and the runs that the suite plans."""

import csv
import dataclasses
import json
import math

import nbformat
import pytest
from scipy.stats import ttest_1samp

import run_suite
from custom_models import make_config
from custom_models.ablations import GRIDS, LAST_WEIGHTS, Ablation
from evaluation import figures
from evaluation.protocol import Protocol
from evaluation.tables import ablation_table, write_ablation_table
from generative_pipeline import GenerativePipeline, run_folder
from run_suite import Runner

PROTOCOL = Protocol(
    dataset="BloodMNIST",
    dataset_sha256="ab" * 32,
    image_size=28,
    reference_split="train",
    n_real=11959,
    n_fake=5133,
    label_distribution="held-out (validation + test) frequencies",
    extractor="inception-2048",
    extractor_sha256="6726825d" + "0" * 56,
    feature_dim=2048,
).to_dict()


def record(seed: int, frechet: float | None, **other) -> dict:
    """A run that the main table would not show: its loss still falls."""
    return {
        "model": "cvae",
        "preset": "baseline",
        "config": {"epochs": 20},
        "seed": seed,
        "dataset": {"name": "BloodMNIST"},
        "metrics": {
            "frechet_distance": frechet,
            "kid": 0.25,
            "precision": 0.75,
            "recall": 0.5,
            "ceilings": {"mean_image": 300.0},
            "floor": {"frechet_distance": 20.0 if frechet else None},
            "distance_name": "FID",
            "protocol": PROTOCOL,
        },
        "budget": "full",
        "images_seen": 1_190_400,
        "seconds": 60.0,
        "device": "cpu",
        "history": [{"epoch": k + 1, "loss": 2.0 - k / 10} for k in range(10)],
    } | other


def change(name: str, model: str = "cvae", **settings) -> Ablation:
    return Ablation(name, model, "baseline", settings, "" if name == "baseline" else f"its {name}")


def rows_of_two_models() -> list[dict]:
    """The CVAE: 100 ± 10, 130 ± √50, 95 once, and no run; the DCGAN: no run, and 200 once."""
    half = {"config": {"epochs": 10}, "images_seen": 595_200, "budget": "reduced"}
    return ablation_table(
        [
            (change("baseline"), [record(0, 90.0), record(1, 100.0), record(2, 110.0)]),
            (change("latent 8", latent_dim=8), [record(0, 125.0), record(1, 135.0)]),
            (change("half", epochs=10), [record(0, 95.0, **half)]),
            (change("lr 1", lr=1.0), []),
            (change("baseline", "dcgan"), []),
            (change("latent 8", "dcgan", latent_dim=8), [record(0, 200.0)]),
        ]
    )


# ---------------------------------------------------------------------------------------------
# Grids
# ---------------------------------------------------------------------------------------------

ROWS = [
    pytest.param(row, id=f"{grid}-{row.model}-{row.name}")
    for grid, rows in GRIDS.items()
    for row in rows
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_changes_what_it_names(row):
    preset = make_config(row.model, row.preset)
    changed = make_config(row.model, row.preset, **row.settings)
    for name in row.settings:
        assert getattr(changed, name) != getattr(preset, name)
    # Stand-ins and demonstrations are no baselines.
    assert row.preset not in ("quick", "small")
    assert row.what or not row.settings


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_has_an_unchanged_preset_for_each_model_and_no_row_twice(grid, tmp_path):
    rows = GRIDS[grid]
    unchanged = [row for row in rows if not row.settings]
    assert {row.model for row in unchanged} == {row.model for row in rows}
    assert len({row.model for row in unchanged}) == len(unchanged)
    assert len({(row.model, row.preset) for row in rows}) == len(unchanged)
    configs = [(r.model, make_config(r.model, r.preset, **r.settings)) for r in rows]
    assert all(configs.count(config) == 1 for config in configs)
    options = run_suite.parse_arguments(["--ablations", grid, "--out", str(tmp_path)])
    options.out = tmp_path
    folders = {run_suite._ablation_folder(options, row) for row in rows}
    assert len(folders) == len(rows)


def test_published_grid_has_what_the_study_varied():
    varied = {(row.model, name) for row in GRIDS["published"] for name in row.settings}
    study = {
        "cvae": ("latent_dim", "kl_weight", "lr", "epochs"),
        "dcgan": ("latent_dim", "lr", "real_label", "fake_label", "generator_steps", "epochs"),
        "ddpm": ("timesteps", "channels", "epochs"),
    }
    assert {(model, name) for model in study for name in study[model]} <= varied
    for row in GRIDS["published"]:
        # Only T decides the number of sampling steps.
        config = make_config(row.model, row.preset, **row.settings)
        if row.model == "ddpm":
            assert config.sampling_steps == config.timesteps
    # "Half as long" is half the baseline's epochs.
    for row in GRIDS["published"]:
        if "epochs" in row.settings:
            assert 2 * row.settings["epochs"] == make_config(row.model, row.preset).epochs


# ---------------------------------------------------------------------------------------------
# Table and figure
# ---------------------------------------------------------------------------------------------


def test_means_and_differences_from_the_own_baseline():
    rows = rows_of_two_models()
    assert [r["seeds"] for r in rows] == ["0, 1, 2", "0, 1", "0", "", "", "0"]
    assert [r["frechet_mean"] for r in rows] == [100, 130, 95, None, None, 200]
    assert rows[0]["frechet_sd"] == pytest.approx(10)
    assert rows[1]["frechet_sd"] == pytest.approx(math.sqrt(50))
    assert rows[2]["frechet_sd"] is None
    # The last row's model has no baseline yet, and another model's is none for it.
    means = [None, 35, 5, None, None, None]  # of shared seeds
    assert [r["difference_mean"] for r in rows] == means
    assert json.loads(rows[1]["differences"]) == {"0": 35, "1": 35}
    assert [r["difference_sd"] for r in rows] == [None, 0, None, None, None, None]
    assert [r["pairs"] for r in rows] == [None, 2, 1, None, None, None]
    assert [r["images_seen"] for r in rows[1:4]] == [1_190_400, 595_200, None]
    assert {r["protocol"] for r in rows} == {Protocol(**PROTOCOL).key()}


def test_p_of_differences_is_students_and_adjusted_for_all_rows():
    own = [record(seed, 100.0) for seed in range(3)]
    near = [record(seed, distance) for seed, distance in enumerate((101.0, 102.0, 106.0))]
    far = [record(seed, distance) for seed, distance in enumerate((110.0, 111.0, 112.0))]
    runs = [(change("baseline"), own), (change("a", lr=1.0), near), (change("b", lr=2.0), far)]
    first, *changed = ablation_table(runs)
    assert (first["difference_p"], first["difference_p_holm"]) == (None, None)
    expected = [ttest_1samp(values, 0).pvalue for values in ((1, 2, 6), (10, 11, 12))]
    assert [row["difference_p"] for row in changed] == pytest.approx(expected)
    holm = [expected[0], 2 * expected[1]]  # the smaller one twice, the other alone
    assert [row["difference_p_holm"] for row in changed] == pytest.approx(holm)
    assert [row["beyond_chance"] for row in (first, *changed)] == [False, False, True]


def test_written_table(tmp_path):
    write_ablation_table(rows_of_two_models(), tmp_path)
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("| Model"))
    measures = "FID | Difference | Pairs | p (Holm) | KID | Precision | Recall"
    assert lines[start] == f"| Model | Change | What it is | Seeds | Images seen | {measures} |"
    gain, one = "+35.0 ± 0.0 | 2 | –", "0.25 | 0.750 | 0.500"
    several = "0.25 ± 0 | 0.750 ± 0.000 | 0.500 ± 0.000"
    assert lines[start + 2 : start + 8] == [
        f"| cvae | baseline | – | 0, 1, 2 | 1,190,400 | 100.0 ± 10.0 | – | – | – | {several} |",
        f"| cvae | latent 8 | its latent 8 | 0, 1 | 1,190,400 | 130.0 ± 7.1 | {gain} | {several} |",
        f"| cvae | half | its half | 0 | 595,200 | 95.0 | +5.0 | 1 | – | {one} |",
        "| cvae | lr 1 | its lr 1 | – | – | not measured | – | – | – | – | – | – |",
        "| dcgan | baseline | – | – | – | not measured | – | – | – | – | – | – |",
        f"| dcgan | latent 8 | its latent 8 | 0 | 1,190,400 | 200.0 | – | – | – | {one} |",
    ]
    text = "\n".join(lines)
    assert text.startswith("Ablations") and "5,133 images" in text and "device" not in text
    assert "\nFID of held-out real images (floor): 20.0.\n" in text
    assert text.endswith("\nAt a reduced budget, which is the change: cvae half.")
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [r["settings"] for r in written[:3]] == ["{}", '{"latent_dim": 8}', '{"epochs": 10}']
    assert float(written[2]["difference_mean"]) == 5
    assert written[3]["frechet_mean"] == "" and written[3]["note"] == "not measured"


def test_too_few_images_for_a_distance_leave_no_difference(tmp_path):
    few = {"metrics": record(0, None)["metrics"] | {"protocol": PROTOCOL | {"n_fake": 400}}}
    first, second = rows = ablation_table(
        [(change("baseline"), [record(0, None, **few)]), (change("lr 1"), [record(0, None, **few)])]
    )
    assert (first["frechet_mean"], second["difference_mean"]) == (None, None)
    write_ablation_table(rows, tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert (
        "| 0 | 1,190,400 | – | – | – | – | 0.25 |" in text
        and "(floor): –." in text
        and "not measured" not in text
    )
    assert "Fréchet distance at n = 400 in 2048 dimensions" in text


def test_trainings_on_two_devices_are_told(tmp_path):
    runs = [
        (change("baseline"), [record(0, 1.0)]),
        (change("lr 1"), [record(0, 2.0, device="H200")]),
    ]
    write_ablation_table(ablation_table(runs), tmp_path)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "(cvae baseline: cpu in float32; cvae lr 1: H200 in bfloat16)." in text


def test_what_may_not_share_a_table(bad_input):
    first = change("baseline"), [record(0, 100.0)]
    other = record(0, 90.0)
    other["metrics"] = other["metrics"] | {"protocol": PROTOCOL | {"n_fake": 5000}}
    with bad_input("different protocols", "n_fake"):
        ablation_table([first, (change("lr 1"), [other])])
    with bad_input("cvae baseline, lr 1", "seeds [0, 0] hold one twice"):
        ablation_table([first, (change("lr 1"), [record(0, 1.0), record(0, 2.0)])])
    with bad_input("cvae baseline, lr 1", "different configurations"):
        two = [record(0, 1.0), record(1, 2.0, config={"epochs": 3})]
        ablation_table([first, (change("lr 1"), two)])
    with bad_input("no run of this grid"):
        ablation_table([(change("baseline"), []), (change("lr 1"), [])])


def test_models_of_which_no_change_was_measured_have_no_panel_beside_others():
    rows = rows_of_two_models()
    for row in rows:
        if row["model"] == "cvae" and row["settings"] != "{}":
            row |= {"difference_mean": None, "differences": "{}"}
    titles = [axis.get_title(loc="left") for axis in figures.ablations(rows).axes]
    assert titles == ["cvae baseline", "dcgan baseline"]  # there is no change of either
    rows[-1] |= {"difference_mean": 3.0, "differences": '{"0": 3.0}'}
    titles = [axis.get_title(loc="left") for axis in figures.ablations(rows).axes]
    assert titles == ["dcgan baseline"]


def test_figure_shows_what_the_rows_say():
    (axis,) = figures.ablations(rows_of_two_models()).axes  # the DCGAN has nothing to compare with
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["latent 8", "half", "lr 1 (not measured)"]
    drawn = {marker: [] for marker in ("o", "|")}
    for line in axis.lines:
        if line.get_marker() in drawn and len(line.get_xdata()):
            drawn[line.get_marker()].append((list(line.get_xdata()), *{*line.get_ydata()}))
    assert drawn["o"] == [([35, 35], 0), ([5], 1)]
    assert drawn["|"] == [([35], 0), ([5], 1)]
    (dashed,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert list(dashed.get_xdata()) == [0, 0]
    top, bottom = axis.get_ylim()
    assert top > bottom  # the first row at the top


# ---------------------------------------------------------------------------------------------
# Runs of a grid. No training: a run leaves a record of its own key, with a distance that is known
# ---------------------------------------------------------------------------------------------

TINY = (
    Ablation("baseline", "cvae", "quick"),
    Ablation("Latent 8, short", "cvae", "quick", {"latent_dim": 8, "epochs": 1}, "both"),
    Ablation("baseline", "dcgan", "quick"),
    Ablation("ratio 1", "dcgan", "quick", {"generator_steps": 1}, "one"),
)
COMMON = ["--dataset", "demo", "--extractor", "demo", "--device", "cpu", "--seeds", "2"]
SHORT = "ablations/tiny/cvae-quick-latent-8-short"


def leave_a_run(task) -> None:
    """Distance: 100, and 8 less with other settings, and 2 more for each seed."""
    parameters = task.parameters
    pipeline = GenerativePipeline(
        task.source.stem,
        **{name: parameters[name] for name in ("preset", "dataset", "seed", "out", "device")},
        **parameters["settings"],
    )
    distance = 100.0 - 8 * bool(parameters["settings"]) + 2 * parameters["seed"]
    content = record(parameters["seed"], distance) | {
        "key": pipeline.run_key(),
        "model": task.source.stem,
        "preset": parameters["preset"],
        "config": dataclasses.asdict(pipeline.config),
        "budget": pipeline.budget(),
        "images_seen": pipeline.total_steps * pipeline.config.images_per_step,
    }
    task.record.parent.mkdir(parents=True, exist_ok=True)
    task.record.write_text(json.dumps(content))
    notebook = nbformat.v4.new_notebook(metadata={"papermill": {"end_time": "now"}})
    nbformat.write(notebook, task.target)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """`suite(*arguments)` → exit code and the names of what was executed; fails what is told to."""
    executed, failing = [], set()

    def execute(self, task):
        executed.append(task.name)
        if task.name in failing:
            return "ValueError: its own"
        if task.name != "comparison":
            leave_a_run(task)
        return None

    def call(*arguments, fail=()):
        executed.clear()
        failing.clear()
        failing.update(fail)
        code = run_suite.main([*COMMON, "--out", str(tmp_path), *arguments])
        return code, list(executed)

    monkeypatch.setattr(Runner, "execute", execute)
    monkeypatch.setattr(run_suite, "measure_real_cells", lambda task: None)
    monkeypatch.setitem(GRIDS, "tiny", TINY)
    monkeypatch.setenv("EXTRACTOR", "demo")  # the suite sets it; put back afterwards
    return call


def table_of(folder) -> list[tuple]:
    with open(folder / "ablations" / "tiny" / "table.csv", encoding="utf-8", newline="") as file:
        return [
            (r["model"], r["ablation"], r["seeds"], r["frechet_mean"], r["difference_mean"])
            for r in csv.DictReader(file)
        ]


def test_a_grid_is_run_once(suite, tmp_path, capsys):
    code, executed = suite("--ablations", "tiny")
    assert code == 0
    names = ["cvae quick", "cvae quick, Latent 8, short,", "dcgan quick", "dcgan quick, ratio 1,"]
    assert executed == [f"{name} seed {seed}" for seed in (0, 1) for name in names]
    assert "8 runs: 0 finished before, 8 to do" in capsys.readouterr().out
    assert table_of(tmp_path) == [
        ("cvae", "baseline", "0, 1", "101.0", ""),
        ("cvae", "Latent 8, short", "0, 1", "93.0", "-8.0"),
        ("dcgan", "baseline", "0, 1", "101.0", ""),
        ("dcgan", "ratio 1", "0, 1", "93.0", "-8.0"),
    ]
    kept = json.loads((tmp_path / SHORT / "seed1" / "record.json").read_text())
    assert (kept["config"]["latent_dim"], kept["config"]["epochs"]) == (8, 1)
    assert kept["images_seen"] == 1344  # of 1,400, in whole batches of 64
    # The baseline is the suite's own run.
    assert (tmp_path / "runs" / "cvae-quick" / "seed1" / "record.json").exists()
    assert suite("--ablations", "tiny") == (0, [])
    out = capsys.readouterr().out
    assert "8 runs: 8 finished before, 0 to do" in out and "ablations/tiny/table.md" in out
    assert (tmp_path / "ablations" / "tiny" / "ablations.png").stat().st_size > 0


def test_a_row_that_changes_the_sampling_alone_has_the_suites_weights(suite, monkeypatch, tmp_path):
    changes = {"flat": {"temperature": 0.0}, "short": {"temperature": 0.0, "epochs": 1}}
    rows = [Ablation(name, "cvae", "best", settings) for name, settings in changes.items()]
    monkeypatch.setitem(GRIDS, "tiny", (Ablation("best", "cvae", "best"), *rows))
    kept = run_folder(tmp_path, "cvae", "best", 1) / "weights.pt"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"weights")
    monkeypatch.setattr(run_suite, "plan", lambda rows: ([], []))
    suite("--ablations", "tiny")
    grid = tmp_path / "ablations" / "tiny"
    (copy,) = grid.rglob("weights.pt")
    assert copy == grid / "cvae-best-flat" / "seed1" / "weights.pt"
    assert copy.read_bytes() == b"weights"
    # What is there stays.
    copy.write_bytes(b"its own")
    suite("--ablations", "tiny")
    assert copy.read_bytes() == b"its own"


def test_a_row_of_the_last_weights_has_the_suites_checkpoints(suite, monkeypatch, tmp_path):
    last = Ablation("last", "dcgan", "best", LAST_WEIGHTS)
    monkeypatch.setitem(GRIDS, "tiny", (Ablation("best", "dcgan", "best"), last))
    monkeypatch.setattr(run_suite, "plan", lambda rows: ([], []))
    for seed, names in enumerate([("checkpoint.pt",), ("checkpoint.pt", "weights.pt")]):
        folder = run_folder(tmp_path, "dcgan", "best", seed)
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(b"state")
    suite("--ablations", "tiny")
    (copy,) = (tmp_path / "ablations").rglob("*.pt")  # the other is one of half the way
    assert copy.parts[-3:] == ("dcgan-best-last", "seed1", "checkpoint.pt")


def test_the_suites_runs_are_the_baseline(suite, monkeypatch):
    # These short records have no more than a table of the grid needs.
    monkeypatch.setattr(run_suite, "write_gallery", lambda folder: None)
    suite("--models", "cvae", "dcgan", "--preset", "quick")
    _, executed = suite("--ablations", "tiny")
    assert executed and all("Latent" in name or "ratio" in name for name in executed)


def test_a_quality_that_the_data_decides_is_no_other_setting(suite, monkeypatch):
    """Drawn cells were not stored as JPEG, so that runs on them have another jpeg_quality."""
    grid = Ablation("ours", "dcgan", "best"), Ablation("short", "dcgan", "best", {"epochs": 1})
    monkeypatch.setitem(GRIDS, "tiny", grid)
    assert suite("--ablations", "tiny")[0] == 0
    assert suite("--ablations", "tiny") == (0, [])


def test_narrowed_to_a_model_the_table_keeps_all_rows(suite, tmp_path):
    code, executed = suite("--ablations", "tiny", "--models", "dcgan")
    assert code == 0 and len(executed) == 4
    assert all(name.startswith("dcgan") for name in executed)
    assert table_of(tmp_path) == [
        ("cvae", "baseline", "", "", ""),
        ("cvae", "Latent 8, short", "", "", ""),
        ("dcgan", "baseline", "0, 1", "101.0", ""),
        ("dcgan", "ratio 1", "0, 1", "93.0", "-8.0"),
    ]
    suite("--ablations", "tiny", "--models", "cvae")
    assert [seeds for _, _, seeds, _, _ in table_of(tmp_path)] == ["0, 1"] * 4


def test_a_failed_run_is_named_and_the_table_is_made(suite, tmp_path, capsys):
    name = "cvae quick, Latent 8, short, seed 1"
    code, _ = suite("--ablations", "tiny", "--models", "cvae", fail=[name])
    assert code == 1
    assert f"failed: {name}: ValueError: its own" in capsys.readouterr().err
    assert table_of(tmp_path)[1] == ("cvae", "Latent 8, short", "0", "92.0", "-8.0")


def test_an_old_run_of_another_protocol_leaves_no_table(suite, tmp_path, capsys):
    suite("--ablations", "tiny", "--models", "cvae")
    path = tmp_path / SHORT / "seed2" / "record.json"
    old = json.loads((tmp_path / SHORT / "seed1" / "record.json").read_text())
    old["metrics"]["protocol"]["n_fake"] = 100
    path.parent.mkdir()
    path.write_text(json.dumps(old | {"seed": 2}))
    assert suite("--ablations", "tiny", "--models", "cvae") == (1, [])
    assert "failed: table of the grid: numbers under different protocols" in capsys.readouterr().err


def test_runs_from_before_the_grid_changed_are_refused(suite, tmp_path, monkeypatch, bad_input):
    suite("--ablations", "tiny", "--models", "cvae")
    other = dataclasses.replace(TINY[1], settings={"latent_dim": 9, "epochs": 1})
    monkeypatch.setitem(GRIDS, "tiny", (TINY[0], other))
    with bad_input(str(tmp_path / SHORT), "other settings", "'Latent 8, short' of cvae"):
        suite("--ablations", "tiny")


def test_a_size_that_the_data_decides_is_no_other_setting(tmp_path, monkeypatch):
    """PBC's cells have 128 pixels, at which the other model of the grid can't draw."""
    monkeypatch.setitem(GRIDS, "tiny", TINY)
    config = dataclasses.asdict(make_config("cvae", "quick", image_size=128))
    path = tmp_path / "runs" / "cvae-quick" / "seed0" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record(0, 100.0, preset="quick", config=config)))
    options = run_suite.parse_arguments(["--ablations", "tiny", "--dataset", "pbc"])
    options.out = tmp_path
    found = [records for _, records in run_suite.ablation_records(options)]
    assert found == [[json.loads(path.read_text())], [], [], []]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ablations", "none"], ["unknown grid 'none'", "published"]),
        (["--models", "cwgan_gp"], ["no row for the model 'cwgan_gp'", "cvae, dcgan"]),
        (["--models", "vae"], ["no row for the model 'vae'"]),
        (["--preset", "best"], ["--preset does not go with --ablations"]),
        (["--set", "epochs=1"], ["--set does not go with --ablations"]),
        (["--remeasure", "x"], ["--remeasure does not go with --ablations"]),
        (["--seeds", "0"], ["--seeds must be at least 1"]),
    ],
)
def test_bad_input(suite, tmp_path, bad_input, arguments, words):
    with bad_input(*words):
        suite("--ablations", "tiny", *arguments)
    assert not list(tmp_path.iterdir())


def test_number_of_seeds():
    """Five of the suite, three of a grid, unless told otherwise."""
    for arguments, seeds in (
        (["--models", "cvae"], 5),
        (["--ablations", "published"], 3),
        (["--ablations", "published", "--seeds", "4"], 4),
    ):
        options = run_suite.parse_arguments(arguments)
        run_suite.check(options)
        assert options.seeds == seeds
