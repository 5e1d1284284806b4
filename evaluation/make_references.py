"""Make the references that come with the project, so that images can be judged without real ones.

    python -m evaluation.make_references --data-root DATA --extractor FILE

Writes evaluation/references/bloodmnist-28-EXTRACTOR.npz (the train split) and
bloodmnist-28-domain.npz (the test split: the domain extractor knows the train cells).
"""

import argparse
import dataclasses

from evaluation import protocol
from evaluation.features import load_extractor, refuse_domain
from evaluation.reference import SHIPPED, make_reference, save_reference
from utils import OneSentenceParser, exit_on_bad_input, load_dataset

SIZE = 28
# Extractor, split of the reference, split of the real cells that give its floors; None: the
# extractor that was asked for.
REFERENCES = ((None, "train", "held_out"), ("domain", "test", "val"))


def parse_arguments() -> argparse.Namespace:
    parser = OneSentenceParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder with the data sets ($DATA_ROOT, else data)")
    parser.add_argument(
        "--extractor", help="inception or a TorchScript file ($EXTRACTOR, else inception)"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    sets = {
        split: load_dataset("bloodmnist", options.data_root, SIZE, split)
        for split in ("train", "val", "test", "held_out")
    }
    for name, split, held_out in REFERENCES:
        extractor = load_extractor(name or options.extractor)
        if split == "train":
            refuse_domain(extractor)
        reference = make_reference(sets[split], extractor, sets["train"].sha256())
        floors = protocol.floors(reference, sets[held_out], extractor)
        path = SHIPPED / f"bloodmnist-{SIZE}-{name or extractor.name}.npz"
        save_reference(dataclasses.replace(reference, floors=floors), path)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
