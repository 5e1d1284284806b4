"""The page of all results: what stands on it, what does not, and that its links lead somewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from evaluation import gallery

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGE = RESULTS / "README.md"
LINK = re.compile(r"\]\(([^)]+)\)")


def links(text: str) -> list[str]:
    return [unquote(link) for link in LINK.findall(text)]


@pytest.fixture
def results(tmp_path) -> Path:
    """Two seeds of one run in full, one run at a reduced budget, all from kept records."""
    for run, seed in (("cvae-baseline", 0), ("cvae-baseline", 1), ("ddpm-best_small", 0)):
        source = RESULTS / "runs" / run / f"seed{seed}"
        folder = tmp_path / "results" / "runs" / run / f"seed{seed}"
        folder.mkdir(parents=True)
        shutil.copy(source / "record.json", folder)
        for name in ("samples.png", "progress/050.png", "progress/100.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"a picture")
    return tmp_path / "results"


def value(results: Path, run: str, seed: int) -> float:
    record = json.loads((results / "runs" / run / f"seed{seed}" / "record.json").read_text())
    return record["metrics"]["frechet_distance"]


# ---------------------------------------------------------------------------------------------
# The page that is kept
# ---------------------------------------------------------------------------------------------


def test_another_page_is_left_alone(tmp_path, bad_input):
    (tmp_path / "README.md").write_text("My project")
    with bad_input(str(tmp_path / "README.md"), "is another page", "choose another folder"):
        gallery.write_gallery(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My project"


def test_a_table_of_ablations_has_its_picture_beside_it(results):
    folder = results / "ablations" / "best"
    folder.mkdir(parents=True)
    (folder / "table.md").write_text("a table")
    assert "ablations.png" not in gallery.gallery(results)
    (folder / "ablations.png").write_bytes(b"a picture")
    found = links(gallery.gallery(results))
    assert {"ablations/best/table.md", "ablations/best/ablations.png"} <= {*found}


def test_other_data_sets_are_linked_and_a_user_s_own_images_are_not(results):
    for name in ("mnist28", "folder-patients64"):
        (results / name).mkdir()
        (results / name / "README.md").write_text("a page")
        (results / name / "comparison.png").write_bytes(b"a picture")
    text = gallery.gallery(results)
    assert {"mnist28/README.md", "mnist28/comparison.png"} <= {*links(text)}
    assert "patients" not in text
    (results / "mnist28" / "README.md").unlink()
    assert gallery.OTHERS_TITLE not in gallery.gallery(results)


def test_the_kept_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == gallery.gallery(RESULTS), (
        "run `python -m evaluation.gallery results`"
    )


@pytest.mark.parametrize("name", ["mnist28", "pbc64"])
def test_pages_of_other_data_sets_are_up_to_date_and_name_what_they_show(name):
    text = (RESULTS / name / "README.md").read_text(encoding="utf-8")
    assert text == gallery.gallery(RESULTS / name), (
        f"run `python -m evaluation.gallery results/{name}`"
    )
    shown, other = ("digit", "cell") if name.startswith("mnist") else ("cell", "digit")
    assert f"lie nearest to a training {shown}, " in text
    assert f"Copies of training {shown}s: " in text or "Numbers: not shown" in text
    assert f"training {other}" not in text


def test_every_link_of_the_kept_page_leads_somewhere():
    text = PAGE.read_text(encoding="utf-8")
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    anchors = {gallery._anchor(heading) for heading in headings}
    found = links(text)
    assert len(found) > 20
    for link in found:
        assert not link.startswith("/") and "://" not in link
        assert link[1:] in anchors if link.startswith("#") else (RESULTS / link).is_file(), link


def test_nothing_that_git_ignores_is_linked():
    files = [str(RESULTS / link) for link in links(PAGE.read_text()) if not link.startswith("#")]
    command = ["git", "check-ignore", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.stdout


def test_every_run_and_its_pictures_are_on_the_kept_page():
    text = PAGE.read_text(encoding="utf-8")
    found = set(links(text))
    for record in (RESULTS / "runs").rglob("record.json"):
        assert record.relative_to(RESULTS).as_posix() in found
    for folder in (RESULTS / "runs").glob("*/seed0"):
        section = text.partition(f"## {folder.parent.name.replace('-', ' ')},")[2]
        measured = "Numbers: not shown" not in section.partition("\n## ")[0]
        for picture in folder.rglob("*.png"):
            shown = measured or picture.name not in gallery.OF_MEASURED
            assert (picture.relative_to(RESULTS).as_posix() in found) == shown


# ---------------------------------------------------------------------------------------------
# The generator
# ---------------------------------------------------------------------------------------------


def test_the_first_seed_is_shown_and_the_others_are_links(results):
    text = gallery.gallery(results)
    assert "![cvae baseline, seed 0: samples](runs/cvae-baseline/seed0/samples.png)" in text
    assert "seed1/samples.png" in text and "![cvae baseline, seed 1" not in text
    assert (
        "Other seeds: 1 ([samples](runs/cvae-baseline/seed1/samples.png), "
        "[record](runs/cvae-baseline/seed1/record.json))." in text
    )
    assert f"| {value(results, 'cvae-baseline', 0):.1f} (" in text
    mean = (value(results, "cvae-baseline", 0) + value(results, "cvae-baseline", 1)) / 2
    assert f"Over 2 trainings: FD (GoogLeNet-1024) {mean:.1f} ± " in text


def test_a_reduced_run_without_enough_seeds_shows_no_numbers(results):
    text = gallery.gallery(results)
    section = text.partition("## ddpm best_small")[2]
    folder = results / "runs" / "ddpm-best_small" / "seed0"
    for name in gallery.OF_MEASURED:
        (folder / name).write_bytes(b"distances")
    assert gallery.gallery(results) == text
    assert "Numbers: not shown (1 of 3 trainings)" in section
    assert f"{value(results, 'ddpm-best_small', 0):.1f}" not in text
    assert "![ddpm best_small, seed 0: samples](runs/ddpm-best_small/seed0/samples.png)" in section


def test_what_is_missing_is_left_out(results):
    text = gallery.gallery(results)
    for words in ("Shipped", "mistakes", "suspicious", "losses", "notebook", "Speed", "comparison"):
        assert words not in text
    assert all(link.startswith("#") or (results / link).is_file() for link in links(text))
    (results / "runs" / "cvae-baseline" / "seed0" / "losses.png").write_bytes(b"a picture")
    (results / "comparison.png").write_bytes(b"a picture")
    assert set(links(gallery.gallery(results))) - set(links(text)) == {
        "runs/cvae-baseline/seed0/losses.png",
        "comparison.png",
    }


def test_names_are_quoted_in_links(results):
    (results / "benchmarks").mkdir()
    (results / "benchmarks" / "cpu (new).md").write_text("fast")
    text = gallery.gallery(results)
    assert "](benchmarks/cpu%20%28new%29.md)" in text


def test_checkpoints_and_mistakes_are_listed(results):
    for name in ("checkpoints", "numbers"):
        shutil.copytree(RESULTS / name, results / name)
    text = gallery.gallery(results)
    assert "[card](checkpoints/cvae-best.md)" in text
    assert "](numbers/jpeg.png)" in text
    assert "explore" not in text  # there is no such notebook beside this folder


def test_studies_are_shown_with_their_figures(results):
    folder = results / "augmentation"
    (folder / "bccd" / "fold0-seed0").mkdir(parents=True)
    names = ("bccd.md", "bccd.csv", "bccd.png", "bccd-confusion-cnn.png", "imbalance.png")
    for name in (*names, "bccd/fold0-seed0/notebook.ipynb", "generators.md"):
        (folder / name).write_text("made by a study")
    text = gallery.gallery(results)
    assert (
        "- [Do generated cells help a classifier?](#do-generated-cells-help-a-classifier)" in text
    )
    section = text.partition("## Do generated")[2]
    assert set(links(section)) == {
        *(f"augmentation/{name}" for name in names[:4]),
        "augmentation/bccd/fold0-seed0/notebook.ipynb",
        "augmentation/generators.md",
    }
    assert "![bccd-confusion-cnn](augmentation/bccd-confusion-cnn.png)" in section


def test_the_page_is_written_into_the_folder(results):
    assert gallery.write_gallery(results) == results / "README.md"
    assert (results / "README.md").read_text(encoding="utf-8") == gallery.gallery(results)


def test_command_line_refuses_a_folder_without_records(tmp_path):
    command = [sys.executable, "-m", "evaluation.gallery", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "holds no record.json" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_broken_record_is_named(results, bad_input):
    broken = results / "checkpoints" / "cvae-best.json"
    broken.parent.mkdir()
    broken.write_text('{"cut": ')
    with bad_input(str(broken), "is no record"):
        gallery.gallery(results)
