"""Train, sample, measure and record one model with one seed from the command line.

    python train.py --model dcgan --seed 0 --data_root DATA --extractor FILE
    python train.py --model cwgan_gp --data_dir path/to/PBC --resume
    python train.py sample --checkpoint FILE --class basophil --n 64 --out FOLDER
    python train.py sample --checkpoint FILE --fill_up --data_dir path/to/PBC --out FOLDER

A run that was stopped goes on where its last checkpoint stands; a finished one is only shown.
Every setting of the chosen model and preset is an option: `--model ddpm --help` shows ddpm's.
Needs torch, numpy, matplotlib and Pillow alone, so that a bare GPU machine can run it.
"""

import argparse
import itertools
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

from custom_models import MODELS, make_config, usual_image_size
from custom_models.config import ModelConfig, help_texts
from custom_models.drawing import fill_up, load_model, write_samples
from generative_pipeline import GenerativePipeline
from utils import (
    LOADERS,
    USUAL_SIZE,
    InputError,
    OneSentenceParser,
    exit_on_bad_input,
    load_dataset,
    pick_device,
    recognise_data_dir,
    split_list,
    write_text,
)

# Settings under the names that a published command line of cwgan_gp gives them.
PUBLISHED_NAMES = {
    "latent_dim": "z_dim",
    "critic_steps": "critic_step",
    "gradient_penalty": "lambda_gp",
    "beta1_critic": "adam_beta_1_c",
    "beta1_generator": "adam_beta_1_g",
    "beta2": "adam_beta_2",
}
# Of every config, but no settings of the model: the data decides them.
FROM_DATA = ("image_size", "image_channels", "n_classes")


def parser_of(usage: str, description: str, **changes) -> OneSentenceParser:
    return OneSentenceParser(
        usage=usage,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        **changes,
    )


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir",
        metavar="PATH",
        help="folder or zip with one sub-folder of images for each class, such as PBC's; images "
        "are cut to the middle square (PBC: 200 pixels) and resized bilinearly with antialiasing",
    )
    data.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"one of {', '.join(LOADERS)}, celeba:ATTRIBUTE (default bloodmnist)",
    )
    data.add_argument(
        "--data_root",
        metavar="PATH",
        help="folder with the files of --dataset (default $DATA_ROOT, else data)",
    )
    return data


def parse_training(arguments: list[str]) -> tuple[argparse.Namespace, dict]:
    """The options of a run, and the model's settings that were given."""
    chosen = parser_of("", "", add_help=False)
    chosen.add_argument("--model", default="cwgan_gp")
    chosen.add_argument("--preset", default="baseline")
    names, _ = chosen.parse_known_args(arguments)
    config = make_config(names.model, names.preset)

    parser = parser_of(
        "python train.py [sample] [--option value ...]",
        "Train, sample, measure and record one model with one seed. "
        "`train.py sample --help` says how to draw images with trained weights.",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--model", metavar="NAME", help=f"one of {', '.join(MODELS)} ({names.model})")
    presets = ", ".join(MODELS[names.model].PRESETS)
    run.add_argument("--preset", metavar="NAME", help=f"one of {presets} ({names.preset})")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the whole run (0)")
    run.add_argument("--out", metavar="PATH", help="the run's folder (its own below results)")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint, and stop where there is none; without it a run that has "
        "one goes on, and one that has none begins",
    )
    run.add_argument(
        "--checkpoint_path",
        metavar="FILE",
        help="of the checkpoint; a folder gets checkpoint.pt (in --out)",
    )
    run.add_argument(
        "--log_dir", metavar="PATH", help="folder of TensorBoard's files (tensorboard in --out)"
    )
    run.add_argument(
        "--extractor",
        metavar="NAME",
        help="network that measures the images: inception, demo or a TorchScript file "
        "(default $EXTRACTOR, else inception)",
    )
    run.add_argument(
        "--per_class",
        type=int,
        default=0,
        metavar="N",
        help="also measure every class by itself on so many images, 2000 as published (0: no)",
    )
    run.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (auto)")
    run.add_argument(
        "--precision",
        metavar="NAME",
        help="float32 or bfloat16 (bfloat16 on CUDA, float32 on a CPU); few CPUs are fast in it",
    )
    compiled = run.add_mutually_exclusive_group()
    compiled.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="compile the networks, for speed (on CUDA, where the model gains by it)",
    )
    compiled.add_argument(
        "--no_compile", dest="compile", action="store_false", default=None, help="leave that out"
    )
    by_size = itertools.groupby(sorted(USUAL_SIZE, key=USUAL_SIZE.get), USUAL_SIZE.get)
    usual = "; ".join(f"{', '.join(names)} {size}" for size, names in by_size)
    add_data_options(parser).add_argument(
        "--image_size",
        type=int,
        metavar="N",
        help=f"in pixels (default: what the preset is made for, else {usual})",
    )
    add_settings(parser, names.model, names.preset)

    options, unknown = parser.parse_known_args(arguments, names)
    settings = [name for name in asdict(config) if name not in FROM_DATA]
    if unknown:
        raise InputError(
            f"{names.model} {names.preset} has no option {unknown[0].partition('=')[0]}; its "
            f"settings are {', '.join(settings)}, and --help shows the other options"
        )
    return options, {name: vars(options)[name] for name in settings if name in options}


def add_settings(parser: argparse.ArgumentParser, model: str, preset: str) -> None:
    """An option for each field of the preset's config; one that is not given is left out."""
    training = parser.add_argument_group("training of every model")
    own = parser.add_argument_group(f"settings of {model} {preset}")
    of_every_model = {field.name for field in fields(ModelConfig)}
    config = make_config(model, preset)
    texts = help_texts(config)
    for name, value in asdict(config).items():
        if name in FROM_DATA:
            continue
        kind = type(value)
        names = [name, PUBLISHED_NAMES[name]] if name in PUBLISHED_NAMES else [name]
        shown = ",".join(map(str, value)) if kind is tuple else str(value).lower()
        (training if name in of_every_model else own).add_argument(
            *(f"--{option}" for option in names),
            dest=name,
            type={bool: true_or_false, tuple: whole_numbers}.get(kind, kind),
            default=argparse.SUPPRESS,
            metavar={bool: "true|false", tuple: "N,N", int: "N", float: "X", str: "NAME"}[kind],
            help=f"{texts[name]} (default {shown})".replace("%", "%%"),
        )


def true_or_false(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word.lower() == "true"


def whole_numbers(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers such as 32,64,96, got {words!r}"
        ) from None


def as_typed(sentence: str, arguments: list[str]) -> str:
    """A refusal that begins with a setting's name, with the name that the setting was given by."""
    name = sentence.partition(" ")[0]
    options = [argument.partition("=")[0] for argument in arguments]
    given = [o for o in options if o in (f"--{name}", f"--{PUBLISHED_NAMES.get(name)}")]
    return given[-1].removeprefix("--") + sentence.removeprefix(name) if given else sentence


def find_data(options: argparse.Namespace) -> tuple[str, str | Path | None]:
    """Name and root of the data set that was asked for, as `load_dataset` takes them."""
    if options.data_dir is None:
        return options.dataset or "bloodmnist", options.data_root
    if options.dataset or options.data_root:
        raise InputError("--data_dir says itself what data it is; leave --dataset, --data_root out")
    return recognise_data_dir(options.data_dir)


def train(arguments: list[str]) -> None:
    options, settings = parse_training(arguments)
    dataset, root = find_data(options)
    model, preset, seed = options.model, options.preset, options.seed
    size = options.image_size
    if size is None:
        size = usual_image_size(model, preset, dataset)
    try:
        pipeline = GenerativePipeline(
            model,
            preset=preset,
            dataset=dataset,
            seed=seed,
            out=options.out,
            data_root=root,
            extractor=options.extractor,
            device=options.device,
            precision=options.precision,
            checkpoint_path=options.checkpoint_path,
            log_dir=options.log_dir,
            compile=options.compile,
            image_size=size,
            **settings,
        )
    except InputError as error:
        raise InputError(as_typed(str(error), arguments)) from None
    if options.per_class and not pipeline.model.conditional:
        raise InputError(f"{model} can't be asked for a class; leave --per_class out")
    if options.per_class < 0 or options.per_class == 1:
        raise InputError(f"--per_class takes two images or more, or 0, got {options.per_class}")
    if options.resume and not (pipeline.checkpoint_path.exists() or pipeline.weights_path.exists()):
        raise InputError(
            f"there is no checkpoint at {pipeline.checkpoint_path} to go on from; leave --resume "
            "out to begin"
        )
    try:
        pipeline.extractor()  # a missing one is told before the training, not after it
    except InputError as error:
        raise InputError(f"{error}; `--extractor demo` needs no file and no download") from None
    pipeline.check_folder(pipeline.extractor())
    if options.per_class or not pipeline.finished_record():
        # Made before the training, during which files may change, but written after it: a folder
        # that is refused keeps the list of its own run.
        listed = split_list(dataset, root) if dataset in ("folder", "pbc") else None
        pipeline.train()  # a finished one only loads its weights
        if listed:
            write_text(pipeline.out / "real_images.csv", listed)
    metrics = pipeline.evaluate()["metrics"]
    distance = metrics["frechet_distance"]
    first = "" if distance is None else f"{metrics['distance_name']} {distance:.1f}, "
    print(
        f"{first}KID {metrics['kid']:.4f} ± {metrics['kid_standard_error']:.4f} "
        f"→ {pipeline.record_path}"
    )
    if options.per_class:
        pipeline.evaluate_per_class(options.per_class)
        print(f"every class by itself → {pipeline.out / 'per_class.md'}")


def parse_sampling(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of(
        "python train.py sample --checkpoint FILE --out FOLDER [--option value ...]",
        "Draw images with trained weights, as PNG files.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="a run's weights.pt or checkpoint.pt, or a .safetensors file",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="for the images; new or empty"
    )
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="to draw, as the model names it or PBC (ig); may be given again (default: all)",
    )
    parser.add_argument("--n", type=int, metavar="N", help="images of each class (64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (auto)")
    parser.add_argument(
        "--fill_up",
        action="store_true",
        help="draw of each class what the data's train split lacks to as many as the largest has",
    )
    add_data_options(parser)
    options = parser.parse_args(arguments)
    if options.fill_up and (options.classes or options.n is not None):
        raise InputError("--fill_up counts the classes itself; leave --class and --n out")
    if not options.fill_up and (options.data_dir or options.dataset or options.data_root):
        raise InputError("the data is only counted by --fill_up; add it, or leave the data out")
    return options


def sample(arguments: list[str]) -> None:
    options = parse_sampling(arguments)
    out, seed, device = options.out, options.seed, pick_device(options.device)
    model, about = load_model(options.checkpoint)
    model.to(device)
    if not options.fill_up:
        n = 64 if options.n is None else options.n
        write_samples(model, about, out, n, options.classes or [], seed)
        print(out)
        return
    data = load_dataset(*find_data(options), about["config"]["image_size"])
    drawn = fill_up(model, about, out, data, seed)
    print(f"{', '.join(f'{name} +{n}' for name, n in drawn.items())} → {out}")


def main(arguments: list[str]) -> None:
    # A hyphen within an option's name is as good as an underscore.
    arguments = [
        re.sub("^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in arguments
    ]
    if arguments[:1] == ["sample"]:
        sample(arguments[1:])
    else:
        train(arguments)


if __name__ == "__main__":
    with exit_on_bad_input():
        main(sys.argv[1:])
