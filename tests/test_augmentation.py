"""The augmentation study: folds, leaks put in by hand, arms, tables of known numbers."""

import copy
import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import run_suite
from evaluation import augmentation, figures
from evaluation.copies import turned
from utils import BLOOD_CLASSES, ImageSet

CLASSES = ("basophil", "eosinophil")


def random_images(n: int, size: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator).to(torch.uint8)


def image_set(counts: list[int], size: int = 12, seed: int = 0, classes=CLASSES) -> ImageSet:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return ImageSet("cells", "train", random_images(len(labels), size, seed), labels, classes)


def fold_of(train: ImageSet, test: ImageSet, number: int = 0) -> augmentation.Fold:
    everything = augmentation.joined([train, test])
    return augmentation.Fold(number, train, test, everything, [], everything.sha256())


# ---------------------------------------------------------------------------------------------
# Folds and subsamples
# ---------------------------------------------------------------------------------------------


def test_folds_hold_every_class_evenly():
    data = image_set([7, 23])
    folds = augmentation.stratified_folds(data)
    for label, n in enumerate((7, 23)):
        sizes = folds[data.labels == label].bincount(minlength=5)
        assert sizes.sum() == n and sizes.max() - sizes.min() <= 1
    assert folds.equal(augmentation.stratified_folds(data))


def test_a_class_with_fewer_images_than_folds(bad_input):
    with bad_input("class eosinophil has 4 images", "5 folds"):
        augmentation.stratified_folds(image_set([9, 4]))


def test_subsamples_share_no_image():
    data = image_set([11, 40])
    parts = augmentation.subsamples(data, {"basophil": 2, "eosinophil": 8})
    assert [data.labels[rows].bincount().tolist() for rows in parts] == [[2, 8]] * 5
    assert len(torch.cat(parts).unique()) == 50


def test_subsamples_that_the_data_cannot_give(bad_input):
    data = image_set([11, 40])
    with bad_input("class basophil has 11 images", "need 15"):
        augmentation.subsamples(data, {"basophil": 3, "eosinophil": 8})
    with bad_input("counts are of the classes basophil", "eosinophil"):
        augmentation.subsamples(data, {"basophil": 2})
    with bad_input("count of eosinophil must be at least 1", "0"):
        augmentation.subsamples(data, {"basophil": 2, "eosinophil": 0})


def write_bloodmnist(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(folder / "bloodmnist.npz", **arrays)
    return folder


def test_near_copies_of_test_cells_are_not_trained_on(tiny_arrays, tmp_path):
    """A turned test cell and a slightly changed one, planted among the training cells."""
    arrays = {name: array.copy() for name, array in tiny_arrays.items()}
    arrays["train_images"][3] = np.rot90(arrays["test_images"][5])
    changed = arrays["test_images"][8].astype(int) + np.array([3, -3, 3])
    arrays["train_images"][40] = changed.clip(0, 255)
    root = write_bloodmnist(tmp_path, arrays)
    counts = dict.fromkeys(BLOOD_CLASSES, 3)
    study = augmentation.make_study("imbalance", counts=counts)
    fold = augmentation.make_fold(study, 1, root)
    assert fold.left_out == [3, 40]
    assert augmentation.per_class(fold.train) == counts and len(fold.test) == 40
    assert augmentation.near_copies(fold.train.images, fold.test.images) == []


def test_five_folds_test_every_cell_once(data_root):
    study = augmentation.make_study("bccd", dataset="bloodmnist", image_size=28)
    folds = [augmentation.make_fold(study, number, data_root) for number in range(5)]
    tested = torch.cat([fold.test.images for fold in folds])
    assert sum(len(fold.test) for fold in folds) == len(tested.unique(dim=0)) == 224
    assert all(len(fold.train) == 224 - len(fold.test) for fold in folds)


# ---------------------------------------------------------------------------------------------
# Leaks
# ---------------------------------------------------------------------------------------------


def test_folds_that_would_part_a_patient_are_refused(tmp_path, bad_input):
    for kind, green in (("cat", 9), ("dog", 99)):
        for number in range(12):
            (tmp_path / kind).mkdir(exist_ok=True)
            image = Image.new("RGB", (9, 9), (20 * number, green, 9))
            image.save(tmp_path / kind / f"{number}.png")
    study = augmentation.make_study("bccd", dataset="folder", image_size=8)
    augmentation.make_fold(study, 0, tmp_path)
    lines = [f"{kind}/{n}.png,P{n // 2}" for kind in ("cat", "dog") for n in range(12)]
    (tmp_path / "patients.csv").write_text("\n".join(["file,patient", *lines]))
    with bad_input(str(tmp_path), "would put a patient", "the study imbalance"):
        augmentation.make_fold(study, 0, tmp_path)


@pytest.mark.parametrize("size", [12, 13])  # 13 has no equal squares: means of whole images
def test_near_copies_in_all_turns(size):
    images, others = random_images(20, size), random_images(30, size, seed=1)
    assert augmentation.near_copies(images, others) == []
    for turn in range(8):
        images[2 * turn] = turned(others[turn, None], turn)[0]
    assert augmentation.near_copies(images, others) == [(2 * turn, turn) for turn in range(8)]


def test_near_copies_end_at_the_stated_difference():
    others = random_images(4).clamp(20, 200)
    images = torch.stack([others[0] + 3, others[1] + 5, others[2] - 3, others[3] - 4])
    assert augmentation.near_copies(images, others) == [(0, 0), (2, 2)]


def leak(train, generator, test, generated):
    train[2] = test[7]


def turned_leak(train, generator, test, generated):
    train[2] = turned(test[7:8], 5)[0]


def generator_leak(train, generator, test, generated):
    generator[2] = test[7]


def generated_test_image(train, generator, test, generated):
    test[7] = generated[2]


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (leak, "the classifier's training images"),
        (turned_leak, "the classifier's training images"),
        (generator_leak, "the generator's training images"),
        (generated_test_image, "the generated images"),
    ],
)
def test_every_leak_is_found(plant, words, bad_input):
    sets = [random_images(n, seed=n) for n in (9, 9, 10, 11)]
    sets[1] = sets[0].clone()
    augmentation.check_no_leak(*sets)
    plant(*sets)
    with bad_input("test images 7 (there 2) are among", words):
        augmentation.check_no_leak(*sets)


# ---------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------


def arm_named(study: augmentation.Study, name: str) -> augmentation.Arm:
    return next(arm for arm in augmentation.arms(study) if arm.name == name)


def counts_of(data: ImageSet | None) -> list[int]:
    return list(augmentation.per_class(data).values()) if data else []


def test_arms_of_bccd_take_what_their_names_say():
    study = augmentation.make_study("bccd", amounts=[10])
    fold = fold_of(image_set([4, 12], seed=1), image_set([2, 3], seed=2), number=3)
    generated, flawed = image_set([10, 10], seed=3), image_set([10, 10], seed=4)

    def sizes(name: str) -> list[list[int]]:
        parts = augmentation.arm_sets(arm_named(study, name), fold, generated, flawed)
        return [counts_of(part) for part in parts]

    assert sizes("real") == [[4, 12], [], [2, 3]]
    assert sizes("real+GAN+traditional") == [[4, 12], [6, 0], [2, 3]]
    assert sizes("GAN alone") == [[], [10, 10], [2, 3]]
    # Of all cells 6 and 15: four more of the first class are generated, one of them is tested.
    assert sizes("published flaw") == [[4, 12], [3, 0], [3, 3]]


def test_arms_of_imbalance_add_to_every_class():
    study = augmentation.make_study("imbalance", amounts=[3000, 5])
    fold = fold_of(image_set([4, 12], seed=1), image_set([2, 3], seed=2))
    arm = arm_named(study, "real+GAN 5")
    real, added, test = augmentation.arm_sets(arm, fold, image_set([7, 7], seed=3), None)
    assert [counts_of(part) for part in (real, added, test)] == [[4, 12], [5, 5], [2, 3]]
    names = [arm.name for arm in augmentation.arms(study)]
    assert set(augmentation.PRIMARY["imbalance"]) < set(names)
    assert names[0] == "real" and len(names) == 10


def test_generated_images_of_another_kind(bad_input):
    real, arm = image_set([4, 12]), augmentation.Arm("real+GAN 5", add=5)
    with bad_input("of the classes a, b", "basophil, eosinophil"):
        augmentation.chosen(arm, real, image_set([5, 5], classes=("a", "b")))
    with bad_input("[3, 16, 16]", "[3, 12, 12]"):
        augmentation.chosen(arm, real, image_set([5, 5], size=16))
    with bad_input("needs 5 generated images of class eosinophil, got 4"):
        augmentation.chosen(arm, real, image_set([5, 4]))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("cells", {}, "unknown study 'cells'"),
        ("bccd", {"updates": 0}, "updates must be a whole number above 0, got 0"),
        ("bccd", {"amounts": 300}, "amounts must be whole numbers"),
        ("imbalance", {"amounts": [0, 500]}, "amounts must be whole numbers"),
        ("imbalance", {"dataset": "mnist"}, "take a data set of cells"),
        ("imbalance", {"generator": ["cgan"]}, "generator must be the name of a model"),
        ("bccd", {"generator_settings": {1: 2}}, "must name settings, got 1"),
    ],
)
def test_settings_that_no_study_has(name, changes, words, bad_input):
    with bad_input(words):
        augmentation.make_study(name, **changes)


def run(out: Path, generator_images=None, **changes) -> list[dict]:
    """All arms of a tiny `bccd` with a linear classifier."""
    study = augmentation.make_study("bccd", updates=2, amounts=[10], **changes)
    fold = fold_of(image_set([4, 12], seed=1), image_set([2, 3], seed=2))

    def linear(name: str, n_classes: int, size: int, channels: int) -> torch.nn.Module:
        layers = torch.nn.Flatten(), torch.nn.Linear(channels * size**2, n_classes)
        return torch.nn.Sequential(*layers)

    return augmentation.run_arms(
        study,
        fold,
        0,
        image_set([10, 10], seed=3),
        fold.train.images if generator_images is None else generator_images,
        {"seconds": 1.0},
        image_set([10, 10], seed=4),
        {"seconds": 2.0},
        classifiers=["linear"],
        make_classifier=linear,
        device=torch.device("cpu"),
        describe_machine=lambda device: {"device": str(device)},
        out=out,
    )


def test_every_arm_leaves_a_record_once(tmp_path, monkeypatch, bad_input):
    records = run(tmp_path)
    folder = tmp_path / "augmentation" / "bccd" / "linear" / "fold0-seed0"
    assert len(list(folder.iterdir())) == len(records) == 8
    assert json.loads((folder / "real+GAN.json").read_text()) == records[4]
    assert records[4]["n"]["basophil"] == {"real": 4, "generated": 6, "test": 2}
    trained = {r["identity"]["arm"]["name"]: r["generator"]["seconds"] for r in records}
    assert trained.pop(augmentation.FLAW) == 2.0 and set(trained.values()) == {1.0}
    tests = {record["sha256"]["test"] for record in records}
    assert len(tests) == 2 and records[-1]["sha256"]["test"] != records[0]["sha256"]["test"]
    assert [bool(record["scores_on_generated"]) for record in records] == [True] + [False] * 7
    monkeypatch.setattr(augmentation, "run_arm", lambda *_: pytest.fail("run again"))
    assert run(tmp_path) == records
    with bad_input("real.json was made with other settings", "--out"):
        run(tmp_path, generator="cwgan_gp")


def test_a_generator_of_other_images_is_refused(tmp_path, bad_input):
    with bad_input("the generator was trained on other images"):
        run(tmp_path, generator_images=image_set([4, 12], seed=5).images)
    assert not list(tmp_path.iterdir())


def test_equal_arms_are_equal(tmp_path):
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert [r["scores"] for r in first] == [r["scores"] for r in second]


# ---------------------------------------------------------------------------------------------
# Tables of records with known numbers
# ---------------------------------------------------------------------------------------------


def made_record(study, arm: str, fold: int, value: float, seed: int = 0, classifier="cnn") -> dict:
    one = arm_named(study, arm)
    n = {"real": 0 if arm == "GAN alone" else 40, "generated": 8 * one.add, "test": 10}
    share = {
        "n": 20,
        "accuracy": value,
        "balanced_accuracy": value,
        "macro_f1": value,
        "auc": value,
        "per_class": {kind: {"n": 10, "recall": value} for kind in CLASSES},
        "confusion": [[10, 0], [4, 6]],
    }
    return {
        "identity": augmentation.identity(study, one, classifier, fold, seed, "data"),
        "n": {kind: dict(n) for kind in CLASSES},
        "sha256": {"test": f"test {fold}" + (" flawed" if arm == "published flaw" else "")},
        "scores": share,
        "scores_on_generated": share if arm == "real" else None,
        "history": [{"update": u, "loss": 1 / u, "accuracy": value} for u in (1, 2)],
        "generator": {"versions": {"code": 1}},
        "versions": {"code": 1},
    }


REAL = np.array([0.60, 0.62, 0.58, 0.61, 0.59])
GAINS = {
    "real": np.zeros(5),
    "real+traditional": np.array([0.10, 0.12, 0.11, 0.09, 0.10]),
    "real+GAN": np.array([0.30, -0.32, 0.25, -0.27, 0.09]),
    "real+GAN+traditional": np.array([0.12, 0.11, 0.12, 0.08, 0.13]),
    "published flaw": np.full(5, 0.4),
}


def made_records(study: augmentation.Study, gains: dict, classifier: str = "cnn") -> list[dict]:
    return [
        made_record(study, arm, fold, REAL[fold] + gain[fold], classifier=classifier)
        for arm, gain in gains.items()
        for fold in range(5)
    ]


def corrected(differences, ratio: float) -> tuple[float, float]:
    """p and half the width of the 95 % interval, by hand."""
    error = np.std(differences, ddof=1) * np.sqrt(1 / 5 + ratio)
    p = 2 * stats.t.sf(abs(np.mean(differences) / error), 4)
    return p, stats.t.ppf(0.975, 4) * error


def test_differences_are_paired_and_adjusted():
    rows = augmentation.compare(made_records(augmentation.make_study("bccd"), GAINS))
    primary, found = rows[0], {row["arm"]: row for row in rows[1:]}
    gain = GAINS["real+GAN+traditional"] - GAINS["real+traditional"]
    p, reach = corrected(gain, 20 / 80)
    assert (primary["comparison"], primary["against"]) == ("primary", "real+traditional")
    assert primary["p_holm"] == pytest.approx(p) and primary["verdict"] == "within the noise"
    assert primary["low"] == pytest.approx(gain.mean() - reach)
    # Three secondary comparisons: the smallest p counts three times.
    p, _ = corrected(GAINS["real+traditional"], 20 / 80)
    assert found["real+traditional"]["p_holm"] == pytest.approx(3 * p)
    assert found["real+traditional"]["verdict"] == "better"
    assert found["real+GAN"]["verdict"] == "within the noise"
    assert found["real"]["accuracy_mean"] == pytest.approx(0.6)
    assert found["real"]["accuracy_sd"] == pytest.approx(REAL.std(ddof=1))
    for arm in ("real", "published flaw"):
        assert (found[arm]["comparison"], found[arm]["difference"]) == ("", None)


def test_subsamples_that_share_no_cell_need_no_correction():
    study = augmentation.make_study("imbalance", counts=dict.fromkeys(CLASSES, 2))
    gain = np.array([0.02, 0.05, 0.03, -0.01, 0.04])
    records = made_records(study, {"real": np.zeros(5), "real+GAN 500": gain})
    row = next(r for r in augmentation.compare(records) if r["arm"] == "real+GAN 500")
    assert row["p"] == pytest.approx(stats.ttest_1samp(gain, 0).pvalue)


def test_seeds_of_one_fold_are_no_further_folds():
    study = augmentation.make_study("bccd")
    records = made_records(study, {name: GAINS[name] for name in ("real", "real+GAN")})
    once = augmentation.compare(records)
    again = copy.deepcopy(records)
    for record in again:
        record["identity"]["seed"] = 1
    twice = augmentation.compare(records + again)
    assert twice[-1]["runs"] == 10 and twice[-1]["seeds"] == 2
    for name in ("difference", "low", "p"):
        assert twice[-1][name] == pytest.approx(once[-1][name])


def test_one_fold_decides_nothing():
    study = augmentation.make_study("bccd")
    records = [made_record(study, "real", 0, 0.5), made_record(study, "real+GAN", 0, 0.9)]
    row = augmentation.compare(records)[-1]
    assert row["difference"] == pytest.approx(0.4)
    assert (row["p"], row["low"], row["verdict"]) == (None, None, "too few folds")


def test_four_of_five_folds_decide_nothing():
    study = augmentation.make_study("bccd")
    records = made_records(study, {name: GAINS[name] for name in ("real", "real+traditional")})
    *_, row = augmentation.compare(records)
    assert row["verdict"] == "better"
    *_, row = augmentation.compare([r for r in records if r["identity"]["fold"] != 2])
    assert row["p"] < 0.05 and row["verdict"] == "too few folds"
    # Nor do five of an arm, compared in four.
    third = augmentation.REFERENCE, 2
    *_, row = augmentation.compare(
        [r for r in records if (r["identity"]["arm"]["name"], r["identity"]["fold"]) != third]
    )
    assert (row["folds"], row["verdict"]) == (5, "too few folds")


def test_the_same_difference_in_every_fold_has_no_spread_to_test_with():
    study = augmentation.make_study("bccd")
    records = [
        made_record(study, arm, fold, score)
        for fold in range(5)
        for arm, score in (("real", 0.5), ("real+traditional", 0.75))
    ]
    *_, row = augmentation.compare(records)
    assert (row["folds"], row["difference"], row["p"]) == (5, 0.25, None)
    assert row["verdict"] == "no spread to test with"


def test_any_number_of_arms_has_its_curves():
    study = augmentation.make_study("imbalance", amounts=list(range(100, 2600, 100)))
    arms = augmentation.arms(study)
    records = [made_record(study, arm.name, 0, 0.5) for arm in arms]
    figure = figures.augmentation_learning_curves(records, "cnn")
    assert len(figure.axes[0].lines) == len(arms) > 28


def write_records(folder: Path, records: list[dict]) -> None:
    for record in records:
        path = augmentation.record_path(folder, record["identity"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))


def test_report_is_made_from_records_alone(tmp_path):
    study = augmentation.make_study("bccd")
    write_records(
        tmp_path, made_records(study, GAINS) + made_records(study, GAINS, classifier="cnn_rnn")
    )
    folder = augmentation.study_folder(tmp_path, "bccd")
    paths = augmentation.write_report(folder)
    assert all(path.stat().st_size > 0 for path in paths) and len(paths) == 7
    text = folder.with_suffix(".md").read_text()
    assert text.startswith("Primary comparison, named before any result")
    assert "| cnn | real | 5 × 1 | 80 | 0 | 0.600 ± 0.016 |" in text
    assert "cnn 0.600, cnn_rnn 0.600" in text  # generated images that are recognised
    honest, flaw = text.split("What the published flaw is worth")
    assert "published flaw" not in honest and "| cnn | published flaw |" in flaw
    lines = folder.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 1 + 2 + 2 * len(GAINS)


def test_curves_over_the_amounts():
    study = augmentation.make_study("imbalance", counts={"basophil": 2, "eosinophil": 9})
    gains = {arm.name: np.full(5, 0.01 * i) for i, arm in enumerate(augmentation.arms(study))}
    records = made_records(study, gains)
    figure = augmentation.amounts_figure(records, augmentation.compare(records), "cnn")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[2:] == ["recall of basophil", "recall of eosinophil"]
    curve = figure.axes[0].lines[0].get_ydata()
    order = ("real", "real+GAN 500", "real+GAN 3000")
    assert curve == pytest.approx([0.6 + gains[name][0] for name in order])


def test_confusion_matrices_are_summed():
    study = augmentation.make_study("bccd")
    records = [made_record(study, "real", fold, 0.5) for fold in range(2)]
    records[1]["scores"]["confusion"] = [[10, 0], [0, 10]]
    figure = figures.augmentation_confusion(records, "cnn")
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["1.00", ".20", ".80"]


def test_records_that_do_not_belong_together(tmp_path, bad_input):
    study = augmentation.make_study("bccd")
    folder = augmentation.study_folder(tmp_path, "bccd")
    with bad_input("holds no record of a study"):
        augmentation.collect(folder)
    other = augmentation.make_study("bccd", updates=7)
    write_records(
        tmp_path, [made_record(study, "real", 0, 0.5), made_record(other, "real", 1, 0.5)]
    )
    with bad_input("differ in study"):
        augmentation.collect(folder)
    changed = made_record(study, "real+GAN", 1, 0.5)
    changed["sha256"]["test"] = "other cells"
    write_records(tmp_path, [made_record(study, "real", 1, 0.5), changed])
    with bad_input("real and real+GAN of fold 1 were tested on different cells"):
        augmentation.collect(folder)
    later = made_record(study, "real+GAN", 1, 0.5)
    later["generator"]["versions"]["code"] = 2
    write_records(tmp_path, [later])
    with bad_input("different versions of the code ([2, 1] and [1, 1])"):
        augmentation.collect(folder)
    path = augmentation.record_path(tmp_path, changed["identity"])
    path.write_text("{")
    with bad_input(str(path), "is no whole record"):
        augmentation.collect(folder)
    changed["scores"]["auc"] = float("nan")
    path.write_text(json.dumps(changed))
    with bad_input(str(path), "no finite number"):
        augmentation.collect(folder)


# ---------------------------------------------------------------------------------------------
# The notebook and the suite
# ---------------------------------------------------------------------------------------------

TINY = [
    "--study=bccd",
    "--dataset=bloodmnist",
    "--device=cpu",
    "--set=image_size=28",
    "--set=updates=2",
    "--set=amounts=[34]",
    "--set=classifiers=['cnn']",
    "--set=generator_settings={'epochs': 1, 'base_channels': 8, 'batch_size': 32}",
]


def options_of(*more: str):
    options = run_suite.parse_arguments([*TINY, *more])
    run_suite.check(options)
    return options


@pytest.fixture
def tiny_data(data_root, monkeypatch) -> list[str]:
    for name in ("DATA_ROOT", "EXTRACTOR"):
        monkeypatch.setenv(name, str(data_root))  # the suite sets them; undone at the end
    return [f"--data-root={data_root}"]


def test_a_study_starts_with_its_folds(tiny_data, tmp_path, monkeypatch, capsys):
    """From the command line; the folds themselves fail here."""
    monkeypatch.setattr(run_suite, "run_all", lambda tasks, jobs: dict.fromkeys(tasks, "a fault"))
    assert run_suite.main([*TINY, f"--out={tmp_path}", *tiny_data]) == 1
    printed = capsys.readouterr()
    assert "5 runs: 0 finished before, 5 to do" in printed.out
    assert printed.err.count("a fault") == 5


def test_a_fold_is_an_executed_notebook(tiny_data, tmp_path):
    options = options_of(f"--out={tmp_path}", *tiny_data)
    done, to_do = run_suite.plan_study(options)
    assert (len(done), len(to_do)) == (0, 5)
    assert run_suite.Runner(jobs=1).execute(to_do[0]) is None
    done, to_do = run_suite.plan_study(options)
    assert [task.name for task in done] == ["bccd fold 0 seed 0"] and len(to_do) == 4
    cells = nbformat.read(done[0].target, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 6
    assert not [o for o in outputs if o.get("name") == "stderr"]
    table = "".join(
        o["data"]["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})
    )
    assert "| cnn | real+GAN+traditional | 1 × 1 |" in table and "too few folds" in table
    found = run_suite.report_study(options)
    assert all(path.stat().st_size > 0 for path, _ in found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--study=cells"], "unknown study 'cells'"),
        (["--models", "cgan"], "--models does not go with --study"),
        (["--set=fold=2"], "--set fold="),
        (["--set=update=2"], "no parameter update"),
        (["--set=classifiers=['vgg']"], "unknown classifier 'vgg'"),
        (["--set=classifiers=cnn"], "classifiers must be names in a list, got 'cnn'"),
        (["--set=classifiers=[]"], "classifiers must be names in a list, got []"),
        (["--set=generator=gan"], "unknown model 'gan'"),
        (["--set=generator=dcgan", "--set=generator_settings={}"], "dcgan can't be asked for a"),
        (["--set=generator_settings=5"], "generator_settings must be a dictionary"),
        (["--set=generator_settings={'image_size': 32}"], "image_size is the study's"),
        (["--set=counts=16"], "counts must be a dictionary"),
        (["--set=generator_settings={'epoch': 1}"], "no setting 'epoch'"),
    ],
)
def test_bad_input_is_told_before_anything_starts(arguments, words, tiny_data, tmp_path, bad_input):
    with bad_input(words):
        run_suite.main([*TINY, *arguments, f"--out={tmp_path / 'results'}", *tiny_data])
    assert not (tmp_path / "results").exists()
