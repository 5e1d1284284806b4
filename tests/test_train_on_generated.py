"""Classifiers of generated cells on real ones: known answers, the table's rules, the command."""

import copy
import json

import pytest
import torch

import run_suite
from custom_models.classifiers import make_classifier
from evaluation import train_on_generated as module
from evaluation.train_on_generated import compare, read_or_measure, same_labels, train_on_generated
from generative_pipeline import GenerativePipeline, run_folder
from utils import ImageSet, load_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets(data_root) -> dict[str, ImageSet]:
    splits = ("train", "val", "test", "held_out")
    return {split: load_dataset("bloodmnist", data_root, 28, split) for split in splits}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "UPDATES", 40)


def test_real_cells_in_the_generated_ones_place_give_the_same(sets):
    train = sets["train"]
    rows = same_labels(sets["held_out"].labels, train)
    found = train_on_generated(
        train.images[rows], train.labels[rows], sets, 0, make_classifier, CPU
    )
    assert found["generated"] == found["real"]
    assert (found["n"], found["n_test"]) == (len(sets["held_out"]), len(sets["test"]))
    assert found["real"]["balanced_accuracy"] > 0.5  # discs of eight sizes are easily told apart


def test_labels_that_say_nothing_teach_nothing(sets):
    train = sets["train"]
    rows = same_labels(sets["held_out"].labels, train)
    wrong = (train.labels[rows] + 4) % 8  # as many of each class, none of them right
    found = train_on_generated(train.images[rows], wrong, sets, 0, make_classifier, CPU)
    assert found["generated"]["accuracy"] < 0.3 < found["real"]["accuracy"]


def test_as_many_real_cells_of_each_class(sets, bad_input):
    train, labels = sets["train"], torch.tensor([3, 3, 0, 7, 3])
    rows = same_labels(labels, train)
    assert train.labels[rows].tolist() == [0, 3, 3, 3, 7]
    assert len(set(rows.tolist())) == 5
    with bad_input("has 20 train cells of class basophil, but 21 were generated"):
        same_labels(torch.zeros(21, dtype=torch.int64), train)


def scores(value: float) -> dict:
    names = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
    classes = {kind: {"n": 2, "recall": value} for kind in ("a", "b")}
    return dict.fromkeys(names, value) | {"per_class": classes}


def made_run(model: str, seed: int, value: float, budget: str = "full") -> tuple[dict, dict]:
    record = {
        "model": model,
        "preset": "best",
        "seed": seed,
        "budget": budget,
        "config": {},
        "versions": {"code": 1},
        "dataset": {"name": "cells", "sha256": "0", "n": 70, "duplicates_across_splits": 2},
        "metrics": {"agreement": {"agreement": value / 2}, "frechet_distance": 1.0},
    }
    found = {**module.rules(), "n": 10, "n_test": 4}
    return record, found | {"generated": scores(value), "real": scores(0.9 + seed / 100)}


def test_the_table_is_made_from_records(tmp_path):
    runs = [made_run("cvae", 0, 0.2), made_run("cvae", 1, 0.4), made_run("cwgan_gp", 0, 0.8)]
    rows = compare(runs)
    assert [row["model"] for row in rows] == ["real cells", "cwgan_gp", "cvae"]
    real, best, other = rows
    assert (real["seeds"], real["accuracy_mean"]) == (2, pytest.approx(0.905))
    assert real["agreement_mean"] is None
    assert (best["auc_mean"], best["auc_sd"]) == (0.8, None)
    assert other["recall a_mean"] == pytest.approx(0.3)
    assert other["recall a_sd"] == pytest.approx(0.2 / 2**0.5)
    assert other["agreement_mean"] == pytest.approx(0.15)
    # Of each training against its own real cells: 0.2 - 0.90 and 0.4 - 0.91.
    assert other["against_real_mean"] == pytest.approx(-0.605)
    assert other["against_real_sd"] == pytest.approx(0.19 / 2**0.5)
    paths = module.write_report(runs, tmp_path / "generators")
    assert all(path.stat().st_size for path in paths)
    text = paths[0].read_text()
    assert "| cvae best | 2 | 0.300 ± 0.141 |" in text
    assert "10 images" in text and "4 real cells" in text and "2 identical pairs" in text
    assert "had learned from all 70 train cells, and a classifier of all of them" in text
    assert "reduced" not in text


def test_the_report_on_digits_speaks_of_digits():
    runs = [made_run("cgan", 0, 0.8)]
    runs[0][0]["dataset"]["name"] = "MNIST"
    runs[0][0]["preset"] = "baseline"  # the only one of its own
    rows = compare(runs)
    text = module.markdown(rows)
    assert "| real digits | 1 | " in text and "4 real digits" in text and "cell" not in text
    figure = module.figures.recalls(rows)
    assert figure.axes[0].get_ylabel() == "recall on real test digits"
    assert figure.legends[0].get_texts()[0].get_text() == "real digits"


def test_reduced_budgets_have_a_table_of_their_own():
    runs = [made_run("cvae", 0, 0.2), *(made_run("ddpm", i, 0.8, "reduced") for i in range(3))]
    text = module.markdown(compare(runs))
    full, reduced = text.split("Generators at a reduced budget")
    assert "cvae best" in full and "ddpm" not in full
    assert "ddpm best" in reduced and "cvae" not in reduced
    for part in (full, reduced):
        assert part.count("| real cells | ") == 2 and "10 images" in part
    assert text.endswith("|\n") and "reduced" not in module.markdown(compare(runs[:1]))
    # Nor do two budgets of one preset share a mean.
    both = [made_run("cvae", 0, 0.2), *(made_run("cvae", i, 0.8, "reduced") for i in range(3))]
    rows = {row["budget"]: row for row in compare(both)[1:]}
    assert [rows[budget]["seeds"] for budget in ("full", "reduced")] == [1, 3]
    assert module.may_be_shown([record for record, _ in both[:2]]) == [both[0][0]]


def test_what_was_measured_otherwise_is_refused(bad_input):
    first, other = made_run("cvae", 0, 0.2), copy.deepcopy(made_run("cwgan_gp", 0, 0.2))
    other[1]["updates"] = 41
    with bad_input("not measured alike"):
        compare([first, other])
    with bad_input("hold one twice"):
        compare([first, copy.deepcopy(first)])
    other = copy.deepcopy(first)
    for run, sha256 in ((first, "0"), (other, "1")):
        run[0]["metrics"]["agreement"]["classifier_sha256"] = sha256
    other[0]["seed"] = 1
    with bad_input("different classifiers"):
        compare([first, other])


def test_runs_that_no_table_shows_are_not_measured(bad_input):
    full, quick = made_run("cvae", 0, 0.2)[0], made_run("cwgan_gp", 0, 0.9, "quick")[0]
    alone = made_run("ddpm", 0, 0.99, "reduced")[0]  # one seed of three
    unconditional = made_run("dcgan", 0, 0.5)[0]
    del unconditional["metrics"]["agreement"]
    assert module.may_be_shown([full, quick, alone, unconditional]) == [full]
    with bad_input("no record of a conditional model that a table may show"):
        module.may_be_shown([quick, alone, unconditional])
    elsewhere = made_run("cwgan_gp", 0, 0.2)[0]
    elsewhere["dataset"] |= {"name": "discs", "sha256": "1"}
    with bad_input("cells (0) and discs (1)"):
        module.may_be_shown([full, elsewhere])


def test_a_run_is_measured_once(tmp_path, monkeypatch):
    path, calls = tmp_path / "run.json", []

    def measure() -> dict:
        calls.append(1)
        return {**module.rules(), "calls": len(calls)}

    run = {"weights_key": "a", "kept_step": 1, "seconds": 2.0, "device": "CPU", "dataset": {}}
    first = read_or_measure(path, run, measure)
    assert read_or_measure(path, run, measure) == first == json.loads(path.read_text())
    other = run | {"weights_key": "b"}
    assert read_or_measure(path, other, measure)["calls"] == 2  # another run
    path.write_text(path.read_text()[:9])
    assert read_or_measure(path, other, measure)["calls"] == 3
    older = json.loads(path.read_text())
    del older["seconds"], older["held_out_sha256"]
    path.write_text(json.dumps(older))
    assert read_or_measure(path, other, measure)["calls"] == 3  # an older file lacks these
    monkeypatch.setattr(module, "LR", 0.5)  # other rules: what is kept was measured otherwise
    assert read_or_measure(path, other, measure)["calls"] == 4
    other |= {"seconds": 3.0}  # trained again, on another device
    assert read_or_measure(path, other, measure)["calls"] == 5
    other |= {"dataset": {"held_out_sha256": "0"}}
    assert read_or_measure(path, other, measure)["calls"] == 6


def test_the_command(data_root, tiny_extractor, tmp_path, monkeypatch, capsys, bad_input):
    monkeypatch.setenv("DATA_ROOT", str(data_root))
    command = ["--study", "generators", "--device", "cpu", "--out", str(tmp_path)]
    with bad_input("no record of a conditional model"):
        run_suite.main(command)
    with bad_input("--set does not go with"):
        run_suite.main([*command, "--set", "updates=3"])
    with bad_input("--dataset does not go with"):
        run_suite.main([*command, "--dataset", "demo"])
    for option in ("--seeds", "--jobs"):
        with bad_input(f"{option} does not go with"):
            run_suite.main([*command, option, "2"])
    folder = run_folder(tmp_path, "cwgan_gp", "baseline", 0)
    pipeline = GenerativePipeline(
        "cwgan_gp",
        dataset="bloodmnist",
        out=folder,
        device="cpu",
        extractor=str(tiny_extractor),
        epochs=1,
        batch_size=32,
        base_channels=4,
    )
    pipeline.train()
    record = json.dumps(pipeline.evaluate() | {"budget": "full"})
    pipeline.record_path.write_text(record)
    assert run_suite.main(command) == 0
    found = json.loads(
        (tmp_path / "augmentation" / "generators" / "cwgan_gp-baseline-seed0.json").read_text()
    )
    assert found["weights_key"] == json.loads(record)["weights_key"] and found["n"] == 64
    assert "cwgan_gp baseline" in (tmp_path / "augmentation" / "generators.md").read_text()
    said = capsys.readouterr().out
    assert "cwgan_gp baseline seed 0: balanced accuracy" in said and "generators.png" in said
    (folder / "weights.pt").unlink()
    assert run_suite.main(command) == 0  # read, not measured again
    (tmp_path / "augmentation" / "generators" / "cwgan_gp-baseline-seed0.json").unlink()
    with bad_input("has its weights.pt; train one again"):
        run_suite.main(command)
    assert "left out, since its weights are not kept here" in capsys.readouterr().out
