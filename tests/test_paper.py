"""The paper is of the results in the repository, and no number of a result is written into it."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import pypdf
import pytest
from PIL import Image

from paper import build
from utils import InputError

# Names that hold digits, and the size of another's images. All other numbers in the text are looked
# up.
NAMES = ("Inception-v3", "R3GAN", "CC BY 4.0", "sha256", "a4", "128 pixels")
# Numbers of the layout, with a unit, and keys of the bibliography.
LAYOUT = r"(?<![\w.])\d+(\.\d+)?(pt|cm|em|fr|%)"
KEY = r"@[A-Za-z]+\d{4}\w*"
# Two presets with several trainings each.
PAIR = (("dcgan", "best"), ("cvae", "best"))


def prose(text: str) -> str:
    """The text without comments, mathematics, layout and names."""
    text = re.sub(r"(?<!:)//.*", "", text)
    text = re.sub(r"\$[^$]*\$", "", text)
    for pattern in (LAYOUT, KEY, *map(re.escape, NAMES)):
        text = re.sub(pattern, "", text)
    # Settings of Typst itself: which level of heading, how it is numbered, where a digest is cut.
    return re.sub(
        r'level: \d|numbering: "[^"]*"|slice\(\d, \d+\)|split\("/"\)\.at\(-\d\)', "", text
    )


def literals(text: str) -> list[str]:
    """Lines of the text that hold a number which nobody looked up."""
    found = [line.strip() for line in prose(text).splitlines() if re.search(r"\d", line)]
    formulas = re.findall(r"\$([^$]*)\$", text)
    return found + [f for f in formulas if re.search(r"\d\d|\d\.\d", f)]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of what the paper is made from, with small pictures; `build` works on it."""
    for name in (*build.SOURCES, *build.files(build.ROOT, build.RESULTS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("RGB", (20, 10)).save(tmp_path / name)
        else:
            shutil.copy(build.ROOT / name, tmp_path / name)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    return tmp_path


def words(root) -> str:
    """The text of the compiled paper, in one line."""
    pdf = pypdf.PdfReader(io.BytesIO(build.compile_paper(root)))
    return " ".join(" ".join(page.extract_text() for page in pdf.pages).split())


def change(path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def write_rows(path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_pdf_is_of_these_results():
    build.check(build.ROOT)


def test_text_holds_no_number_of_a_result():
    assert literals((build.ROOT / "paper/paper.typ").read_text()) == []


@pytest.mark.parametrize(
    "text", ["lies at 153.3.", "a recall of 0.3", "5 seeds", "in 82 % of them", "$d = 17.9$"]
)
def test_a_number_in_the_text_is_found(text):
    assert literals(f"The DCGAN @radford2016 {text}")


def test_lookups_hold_no_number_of_a_result():
    code = re.sub(r"//.*", "", (build.ROOT / "paper/numbers.typ").read_text())
    code = re.sub(LAYOUT, "", code).replace("sha256", "")
    # Per cent and minutes.
    assert set(re.findall(r"\d*\.\d+|\d\d+", code)) <= {"10", "100", "60"}


def test_every_work_of_the_bibliography_is_cited():
    works = re.findall(r"@\w+\{(\w+),", (build.ROOT / "paper/references.bib").read_text())
    cited = re.findall(r"@(\w+\d{4}\w*)", (build.ROOT / "paper/paper.typ").read_text())
    assert sorted(works) == sorted(set(cited))


def test_equal_files_give_equal_bytes(copy):
    first = build.compile_paper(copy)
    assert first == build.compile_paper(copy)
    assert first == build.compile_paper(copy.parents[0] / copy.name)


def test_a_changed_record_changes_the_text(copy):
    path = copy / "results/numbers/resize.json"

    def edit(record):
        record["rows"][-1]["value"] = 1234.56

    assert "1,234.6" not in words(copy)
    change(path, edit)
    assert words(copy).count("1,234.6") == 2  # in the abstract and in its section


def test_tables_show_every_row_of_the_results(copy):
    text = words(copy)
    with open(copy / "results/results.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name in ("frechet", "frechet_infinity"):
                assert f"{float(row[f'{name}_mean']):,.1f}" in text
            for name in ("precision", "recall", "density", "coverage"):
                assert f"{float(row[f'{name}_mean']):.3f}" in text


def test_new_rows_appear(copy):
    """A model that was trained since, with three seeds, is in the tables and in the words."""
    path = copy / "results/results.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    source = next((copy / "results/runs").glob("cvae-best/seed0/record.json"))
    new = next(row for row in rows if (row["model"], row["preset"]) == ("cvae", "best"))
    new = new | {"model": "cwgan_gp", "preset": "best", "seeds": "3"}
    new |= {"frechet_mean": "45.678", "frechet_sd": "1.25", "copies_verdict": "copies (3)"}
    rows = [rows[0], new] + [
        r for r in rows[1:] if (r["model"], r["preset"]) != ("cwgan_gp", "best")
    ]
    write_rows(path, rows)
    folder = copy / "results/runs/cwgan_gp-best"
    record = (folder / "seed0/record.json").read_text()
    shutil.rmtree(folder)
    small = copy / "results/runs/ddpm-best_small/seed0/record.json"
    small.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, small)
    for seed in range(3):
        (folder / f"seed{seed}").mkdir(parents=True)
        (folder / f"seed{seed}" / "record.json").write_text(record)
    text = words(copy)
    assert "45.7 ± 1.3 (three trainings)" in text
    # A page may end within the sentence, and a table or figure stand between its halves.
    between = r"((Table|Figure) \d+\. .+ )?"
    assert re.search(rf"For the cWGAN-GP best {between}it is: copies \(3\)\.", text)
    assert text.count(" it is: copies (3).") == 1 and "eight of the nine presets" in text
    assert "the critic is a projection" in text and "follows EDM" in text


@pytest.mark.parametrize(("sd", "told"), [("0.5", True), ("1.5", False), ("", False)])
def test_orders_of_two_networks_are_told_with_their_spread(copy, sd, told):
    """By means alone; beyond the spread only where both presets have several trainings."""
    path = copy / "results/results.csv"
    with open(path, newline="") as file:
        floor, *rows = csv.DictReader(file)
    first, second = (row for row in rows if (row["model"], row["preset"]) in PAIR)
    for row, far, near in ((first, "100", "5"), (second, "200", "4")):
        row |= {"frechet_mean": far, "frechet_sd": "9", "domain_frechet_mean": near}
        row["domain_frechet_sd"] = sd
    write_rows(path, [floor, first, second])
    text = words(copy)
    assert "put one of one pair of presets into different orders: " in text
    assert ("farther apart than either standard deviation in one: " in text) == told
    assert ("In none of these do both networks" in text) != told


def test_generators_at_a_reduced_budget_have_a_table_of_their_own(copy):
    path = copy / "results/augmentation/generators.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert "for generators at a reduced budget" in words(copy)
    write_rows(path, [row for row in rows if row["budget"] == "full"])
    assert "for generators at a reduced budget" not in words(copy)


def test_optional_parts_are_left_out(copy):
    pictures = "comparison_best.png", "cost.png", "compute.png"
    for name in (*pictures, "results_reduced.csv", "results_per_class.csv"):
        (copy / "results" / name).unlink(missing_ok=True)
    text = words(copy)
    assert "Classes of the conditional models" not in text and "filled dots" not in text


def test_larger_cells_appear_with_their_rows(copy):
    shutil.rmtree(copy / "results/pbc64", ignore_errors=True)
    folder = copy / "results/pbc64"
    run = folder / "runs/cwgan_gp-best_small/seed0"
    run.mkdir(parents=True)

    def rows_of(name: str) -> list[dict]:
        with open(copy / "results" / name, newline="") as file:
            return list(csv.DictReader(file))

    small = {"preset": "best_small", "budget": "reduced", "dataset": "PBC", "image_size": "64"}
    floor, *rows = rows_of("results.csv")
    row = next(r for r in rows if (r["model"], r["preset"]) == ("cwgan_gp", "best"))
    shown = row | small | {"seeds": "3", "frechet_mean": "251.04", "frechet_sd": "3.26"}
    hidden = row | small | {"preset": "small", "frechet_mean": "", "note": "1 of 3 trainings"}
    floor |= {"dataset": "PBC", "image_size": "64"}
    write_rows(folder / "results_reduced.csv", [floor, shown, hidden])
    classes = [r | small for r in rows_of("results_per_class.csv") if r["model"] == "cwgan_gp"]
    classes[0] |= {"class": "giant platelet", "kid_mean": "12.34"}
    write_rows(folder / "results_reduced_per_class.csv", classes)
    record = json.loads((copy / "results/runs/cwgan_gp-best/seed0/record.json").read_text())
    record |= {"preset": "best_small", "budget": "reduced"}
    record["config"]["noise"] = 0.2
    (run / "record.json").write_text(json.dumps(record))
    each = {"n": 20, "distance_name": "FD", "mean": {"kid": {"value": 34.56}}}
    each["mean"]["published"] = {"value": 567.89}
    (run / "per_class.json").write_text(json.dumps(each))
    text = words(copy)
    assert "PBC at 64 pixels" in text and "251.0 ± 3.3" in text
    assert "cWGAN-GP best_small over three trainings" in text
    assert "cWGAN-GP small over" not in text and "adds noise" in text
    assert "at a reduced budget" in text.partition("PBC at 64 pixels")[2][:40]
    assert "giant platelet" in text and "34.6" in text and "567.9" in text
    shutil.rmtree(folder)
    assert "PBC at 64 pixels" not in words(copy)


def test_digits_appear_with_their_records(copy):
    shutil.rmtree(copy / "results/mnist28", ignore_errors=True)
    folder = copy / "results/mnist28"
    assert "Digits are not cells" not in words(copy)

    def rows_of(name: str) -> list[dict]:
        with open(copy / "results" / name, newline="") as file:
            rows = list(csv.DictReader(file))
        best = [r for r in rows if (r["model"], r["preset"]) == ("cwgan_gp", "best")]
        best = [r | {"model": "cgan", "preset": "baseline"} for r in best]
        return [r | {"dataset": "MNIST"} for r in rows if not r["seeds"]] + best

    record = json.loads((copy / "results/runs/cwgan_gp-best/seed0/record.json").read_text())
    record |= {"images_seen": 123456, "device": "an abacus"}
    record["config"] |= {"latent_dim": 97, "base_channels": 31, "lr": 0.0078}
    run = folder / "runs/cgan-baseline/seed0"
    run.mkdir(parents=True)
    (run / "record.json").write_text(json.dumps(record))
    floor, row = rows_of("results.csv")
    row |= {"dataset": "MNIST", "agreement_mean": "0.4321", "frechet_mean": "234.56", "seeds": "1"}
    row |= {"agreement_sd": "", "copies_verdict": "copies (5)"}
    write_rows(folder / "results.csv", [floor, row])
    text = words(copy)
    for part in ("97 latents and 31 channels", "learning rate of 0.0078", "123,456 images seen"):
        assert part in text
    for part in ("on an abacus", "asked for in 0.432 of", "234.6", "copies (5)", "in one training"):
        assert part in text
    assert "test digits were at hand" not in text and "By digit" not in text

    classes = rows_of("results_per_class.csv")
    classes[-1] |= {"class": "5", "agreement_mean": "0.1234", "agreement_sd": ""}
    write_rows(folder / "results_per_class.csv", classes)
    write_rows(folder / "results.csv", [floor, row | {"dataset": "MNIST (test digits)"}])
    Image.new("RGB", (20, 10)).save(run / "samples.png")
    text = words(copy)
    assert "between 0.123 (digit 5)" in text and "test digits were at hand" in text
    assert "Digits, not cells" in text

    (run / "record.json").unlink()
    with pytest.raises(InputError, match="results/mnist28/runs/cgan-baseline/ holds 0 of the 1"):
        build.compile_paper(copy)


def test_ablations_appear_with_their_rows(copy):
    folder = copy / "results/ablations/published"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"frechet_mean": "1700.04", "frechet_sd": "", "kid_mean": "88.1", "kid_sd": ""}
    row = {"model": "cvae", "ablation": "latent 32", "seeds": "0"} | numbers
    row |= {"difference_mean": "-55.0", "difference_sd": "", "difference_p_holm": "0.0321"}
    row |= {"pairs": "1", "beyond_chance": "True"}
    row |= {"settings": '{"latent_dim": 32}'}
    missing = row | {"ablation": "never trained", "frechet_mean": ""}
    alone = row | {"model": "dcgan", "ablation": "never changed", "settings": "{}"}
    write_rows(folder / "table.csv", [row, missing, alone])
    text = words(copy)
    assert (
        "latent 32" in text
        and "1,700.0" in text
        and "−55.0 1 0.032" in text
        and "never trained" not in text
        and "never changed" not in text
    )


def test_studies_of_classifiers_are_told_as_they_came_out(copy):
    folder = copy / "results/augmentation"
    path = folder / "imbalance.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert "We have not measured whether" not in words(copy)
    (primary,) = (row for row in rows if row["comparison"] == "primary")
    primary |= {"difference": "0.0123", "low": "-0.01", "high": "0.03", "p_holm": "0.2"}
    primary["verdict"] = "within the noise"
    for row in rows:
        if row["comparison"] == "secondary":
            row["verdict"] = "worse" if row["arm"] == "real+GAN 500" else "within the noise"
    write_rows(path, rows)
    text = words(copy)
    # Between these two a page may end.
    assert "by +0.012 [−0.010," in text
    assert "+0.030] (primary comparison; 𝑝: 0.200): within the noise." in text
    assert "better beyond the noise with none, worse with GAN 500, and within" in text
    shutil.rmtree(folder / "imbalance")
    with pytest.raises(InputError, match="imbalance/ lacks the records of its table"):
        build.compile_paper(copy)
    shutil.rmtree(folder)
    assert "We have not measured whether they help a classifier" in words(copy)


@pytest.mark.parametrize(
    "name",
    ["results/results.csv", "results/numbers/resize.json", "results/numbers/sample_size.png"],
)
def test_a_missing_record_is_named(copy, bad_input, name):
    (copy / name).unlink()
    with bad_input(name, "does not exist", "run notebooks/"):
        build.compile_paper(copy)


def test_a_missing_training_is_named(copy, bad_input):
    (copy / "results/runs/cvae-baseline/seed0/record.json").unlink()
    with bad_input("results/runs/cvae-baseline/", "records", "run notebooks/"):
        build.compile_paper(copy)


def test_an_error_in_the_text_is_one_sentence(copy, bad_input):
    with open(copy / "paper/paper.typ", "a") as file:
        file.write("\n#nonsense()\n")
    with bad_input("paper/paper.typ does not compile", "nonsense"):
        build.compile_paper(copy)


def test_check_notices_other_results_and_another_text(copy, bad_input):
    with bad_input("does not exist", "python -m paper.build"):
        build.main(["--check"])
    build.main([])
    build.main(["--check"])
    for name, what in (("results/results.csv", "results"), ("paper/paper.typ", "text")):
        path = copy / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        with bad_input(f"made from other {what}"):
            build.main(["--check"])
        path.write_bytes(before)


def test_a_failed_build_keeps_the_old_pdf(copy):
    build.main([])
    before = (copy / build.PDF).read_bytes()
    (copy / "results/numbers/jpeg.json").unlink()
    with pytest.raises(InputError):
        build.main([])
    assert (copy / build.PDF).read_bytes() == before
    assert [path.name for path in (copy / "paper").glob("*.partial")] == []


def test_command_line_reports_a_wrong_option_in_one_line():
    command = [sys.executable, "-m", "paper.build", "--chek"]
    result = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
