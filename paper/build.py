"""Compile the paper: paper/paper.typ → paper/paper.pdf, its numbers read from results/ by Typst.

    python -m paper.build            write the PDF
    python -m paper.build --check    exit code 2 if the PDF is not of these results and this text

The PDF carries the sha256 of the results and of the text it was made from, so that --check needs no
compiler and says the same on every machine.
"""

import hashlib
import json
from pathlib import Path

import typst

from utils import InputError, OneSentenceParser, exit_on_bad_input, write_atomically

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("paper/paper.typ", "paper/numbers.typ", "paper/references.bib")
# All that the text may read; what stands here and does not exist is left out of the paper, unless
# the text can't do without.
RESULTS = (
    "results/*.csv",
    "results/comparison*.png",
    "results/cost.png",
    "results/compute.png",
    "results/ablations/*/table.csv",
    "results/pbc*/*.csv",
    "results/pbc*/comparison_best.png",
    "results/pbc*/runs/*/seed*/record.json",
    "results/pbc*/runs/*/seed*/per_class.json",
    "results/augmentation/*.csv",
    "results/augmentation/*.png",
    "results/augmentation/*/*/fold0-seed0/real.json",
    "results/mnist*/*.csv",
    "results/mnist*/runs/cgan-baseline/seed*/record.json",
    "results/mnist*/runs/cgan-baseline/seed0/samples.png",
    "results/runs/*/seed*/record.json",
    "results/numbers/*.json",
    "results/numbers/resize.png",
    "results/numbers/sample_size.png",
)
PDF = "paper/paper.pdf"


def files(root: Path, patterns: tuple[str, ...]) -> list[str]:
    """Paths of the files that match, relative to the repository, sorted."""
    paths = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path.relative_to(root).as_posix() for path in paths)


def digest(root: Path, names: list[str]) -> str:
    """sha256 over the names and the contents of these files, as hex."""
    parts = [f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}" for name in names]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stamps(root: Path) -> dict[str, str]:
    """Digests of the results and of the text."""
    return {
        "results": digest(root, files(root, RESULTS)),
        "text": digest(root, list(SOURCES)),
    }


def compile_paper(root: Path, form: str = "pdf") -> bytes | list[bytes]:
    """The paper as PDF, or its pages as "png"; equal files give equal bytes.

    Raises InputError, naming it, for a record that the text needs and that is not there.
    """
    inputs = {"files": json.dumps(files(root, RESULTS)), **stamps(root)}
    try:
        return typst.compile(
            root / SOURCES[0],
            root=root,
            format=form,
            ignore_system_fonts=True,
            sys_inputs=inputs,
        )
    except typst.TypstError as error:
        sentence = error.message.removeprefix("panicked with: ").strip('"')
        if sentence == error.message:  # not one of numbers.typ's own
            sentence = f"{SOURCES[0]} does not compile: {sentence}"
        raise InputError(sentence) from None


def check(root: Path) -> None:
    """Raise InputError if the PDF was made from other results or from another text."""
    try:
        pdf = (root / PDF).read_bytes()
    except OSError:
        raise InputError(f"{PDF} does not exist; make it with python -m paper.build") from None
    for name, stamp in stamps(root).items():
        if stamp.encode() not in pdf:
            raise InputError(
                f"{PDF} was made from other {name}; make it anew with python -m paper.build"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = OneSentenceParser(prog="python -m paper.build", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only look whether the PDF is current")
    if parser.parse_args(arguments).check:
        check(ROOT)
        print(f"{PDF} is of these results")
        return
    pdf = compile_paper(ROOT)
    write_atomically(ROOT / PDF, lambda path: path.write_bytes(pdf))
    print(f"{PDF} is written")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
