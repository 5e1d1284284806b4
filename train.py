"""Train, sample, measure and record one model with one seed from the command line.

    python train.py --model dcgan --preset baseline --seed 0 --data-root DATA --extractor FILE

A run that was stopped goes on where its last checkpoint stands; a finished one is only shown.
Needs torch, numpy and matplotlib alone, so that a bare GPU machine can run it.
"""

import argparse

from custom_models import MODELS
from custom_models.config import parse_settings
from generative_pipeline import GenerativePipeline
from utils import LOADERS, OneSentenceParser, exit_on_bad_input


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneSentenceParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--preset", default="baseline", help="baseline, quick, … (baseline)")
    parser.add_argument("--dataset", default="bloodmnist", help=f"one of {', '.join(LOADERS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the whole run (0)")
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
        help="change one setting of the preset's config; may be given again",
    )
    parser.add_argument("--out", help="the run's folder (results/runs/MODEL-PRESET/seedK)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the networks (gains on CUDA only)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    pipeline = GenerativePipeline(
        options.model,
        preset=options.preset,
        dataset=options.dataset,
        seed=options.seed,
        out=options.out,
        data_root=options.data_root,
        extractor=options.extractor,
        device=options.device,
        compile=options.compile,
        **parse_settings(options.set),
    )
    pipeline.extractor()  # a missing one is told before the training, not after it
    if not pipeline.finished_record():
        pipeline.train()
    metrics = pipeline.evaluate()["metrics"]
    print(
        f"{metrics['distance_name']} {metrics['frechet_distance']:.1f}, "
        f"KID {metrics['kid']:.4f} ± {metrics['kid_standard_error']:.4f} "
        f"→ {pipeline.record_path}"
    )


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
