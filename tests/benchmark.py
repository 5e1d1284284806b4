"""Measure how fast training, sampling and evaluation are on this machine.

    PYTHONPATH=. python tests/benchmark.py --data-root DATA --extractor FILE
    PYTHONPATH=. python tests/benchmark.py --large      # a step at 64 and 128 pixels alone

Writes results/benchmarks/MACHINE.json and .md. No test: nothing here can fail by being slow.
"""

import dataclasses
import functools
import json
import os
import platform
import time

import torch

from custom_models import MODELS, drawing, make_config
from custom_models.arithmetic import flop_of_training
from custom_models.config import ModelConfig
from evaluation import copies, features, frechet, protocol
from generative_pipeline import (
    CODE_VERSION,
    compile_networks,
    describe_device,
    describe_machine,
    fuse,
    has_bfloat16_instructions,
    is_compiled,
    pick_precision,
)
from utils import (
    ImageSet,
    OneSentenceParser,
    exit_on_bad_input,
    keep_freed_memory,
    load_dataset,
    pick_device,
    random_flips_and_turns,
    to_model_range,
    write_atomically,
)

SHIPPED = "results/checkpoints/cwgan_gp-best.safetensors"
# Models at larger sizes, whose data were not stored as JPEG.
LARGE = (
    ("cwgan_gp", "baseline", {"image_size": 64}),
    ("cwgan_gp", "best", {"image_size": 64, "jpeg_quality": 0}),
    ("ddpm", "best_64", {"image_size": 64}),
    ("cwgan_gp", "baseline", {"image_size": 128}),
    ("cwgan_gp", "best", {"image_size": 128, "jpeg_quality": 0}),
    ("ddpm", "best_128", {"image_size": 128}),
)
LARGE_CPU_BATCH = 8
# Dense bfloat16 FLOP/s by the makers' data sheets.
PEAKS = {  # the first whose name is part of the device's
    "MIG": None,  # a part of a GPU
    "H200 NVL": 835e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


def seconds_per_call(call, device: torch.device, at_least: float = 3.0) -> float:
    """Mean wall-clock seconds of a call, after one to warm up."""

    def timed(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed(1)
    once = timed(1)
    calls = max(1, int(at_least / once))
    return timed(calls) / calls


def next_batch(data: ImageSet, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch as the pipeline draws it: by index, on the device, turned and flipped."""
    rows = torch.randperm(len(data), device=data.images.device)[:size]
    return random_flips_and_turns(to_model_range(data.images[rows])), data.labels[rows]


def set_up(config: ModelConfig, device: torch.device):
    """A model as the pipeline makes it on this device, and a call for one step of its training."""
    model = config.build().to(device, memory_format=torch.channels_last)
    optimizers = model.optimizers()
    if device.type == "cuda":
        fuse(optimizers)
    if is_compiled(None, device, config):
        compile_networks(model)

    def step(images, labels, precision: str = pick_precision(None, device)) -> None:
        bfloat16 = precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
            model.training_step(
                images.contiguous(memory_format=torch.channels_last), labels, optimizers
            )

    return model, step


def benchmark_model(name: str, preset: str, data: ImageSet) -> dict:
    device = data.images.device
    config = make_config(name, preset)
    size, flop = config.images_per_step, flop_of_training(config)
    model, step = set_up(config, device)
    seconds = seconds_per_call(lambda: step(*next_batch(data, size)), device)
    faster = None
    if device.type == "cpu" and has_bfloat16_instructions():
        faster = size / seconds_per_call(lambda: step(*next_batch(data, size), "bfloat16"), device)
    data_seconds = seconds_per_call(lambda: next_batch(data, size), device, at_least=1.0)
    model.eval()
    n = drawing.batch_size(device, config.image_size)
    labels = data.labels[:n]
    generator = torch.Generator(device).manual_seed(0)
    if (name, preset) == (
        "ddpm",
        "baseline",
    ):  # one of its T network evaluations stands for all; they are equal
        noise = torch.randn(n, 3, 28, 28, device=device)
        with torch.inference_mode():
            evaluation = seconds_per_call(lambda: model.ddim(noise, 1), device)
        sampling = evaluation * config.timesteps
    else:
        sampling = seconds_per_call(lambda: model.sample(labels, generator), device, at_least=1.0)
    return {
        "model": name,
        "preset": preset,
        "compiled": is_compiled(None, device, config),
        "flop_per_image": flop,
        "flop_per_second": flop * size / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_images_per_second": size / seconds,
        "bfloat16_images_per_second": faster,
        "data_share_of_step": data_seconds / seconds,
        "sampling_images_per_second": n / sampling,
    }


def benchmark_large(device: torch.device) -> list[dict]:
    """Training at 64 and 128 pixels on noise: what a step costs does not depend on the images.

    One step after one to warm up; memory is the step's peak on a GPU, and on a CPU the process's
    so far, so that only the largest is sure.
    """
    rows = []
    for name, preset, settings in LARGE:
        config = make_config(name, preset, **settings)
        if device.type == "cpu":  # the presets' own batches need up to 20 GiB
            config = dataclasses.replace(config, batch_size=LARGE_CPU_BATCH)
        size, side = config.images_per_step, config.image_size
        images = torch.rand(size, 3, side, side, device=device) * 2 - 1
        labels = torch.arange(size, device=device) % config.n_classes
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        model, step = set_up(config, device)
        call = functools.partial(step, images, labels)
        seconds = seconds_per_call(call, device, at_least=0.0)
        rows.append(
            {
                "model": name,
                "preset": preset,
                "settings": settings,
                "batch_size": config.batch_size,
                "parameters": sum(p.numel() for p in model.parameters()),
                "training_images_per_second": size / seconds,
                "flop_per_image": flop_of_training(config),
                "peak_memory_mib": describe_machine(device)["peak_memory_mib"],
            }
        )
    return rows


def benchmark_usual_way(root: str, size: int = 128) -> float | None:
    """Images/s of the medmnist data set through PIL transforms and a DataLoader.

    None where medmnist is not installed, which nothing else here needs.
    """
    try:
        import medmnist
    except ImportError:
        return None
    from torchvision import transforms

    steps = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    data = medmnist.BloodMNIST(
        split="train", root=root, download=False, transform=transforms.Compose(steps)
    )
    loader = torch.utils.data.DataLoader(
        data, size, shuffle=True, num_workers=os.cpu_count(), persistent_workers=True
    )
    for _ in loader:  # the first epoch starts the workers
        pass
    start = time.perf_counter()
    n = sum(len(images) for images, _ in loader)
    return n / (time.perf_counter() - start)


def benchmark_metrics(train: ImageSet, held_out: ImageSet, extractor: features.Extractor) -> dict:
    """Seconds of every metric beyond extraction at the default protocol's size, and peak memory.

    The distances' features are random, 1024-d: what they cost does not depend on the values. The
    search for copies is that of a shipped model's images; its first call extracts their features.
    """
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(len(part), 1024, generator=generator) for part in (train, held_out))
    start = time.perf_counter()
    protocol.measure(real.to(extractor.device), fake.to(extractor.device))
    measured = time.perf_counter()
    images = drawing.sample(drawing.load_shipped(SHIPPED)[0], held_out.labels, seed=0)
    copies.find_copies(images, train.images, held_out.images, extractor)
    extracted = time.perf_counter()
    copies.find_copies(images, train.images, held_out.images, extractor)
    searched = time.perf_counter()
    return {
        "n_real": len(train),
        "n_fake": len(held_out),
        "metrics_seconds": measured - start,
        "copies_images": len(images),
        "copies_seconds": searched - extracted,
        "peak_memory_mib": describe_machine(torch.device("cpu"))["peak_memory_mib"],
    }


def main() -> None:
    parser = OneSentenceParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default=os.environ.get("DATA_ROOT", "data"))
    parser.add_argument("--extractor", default=os.environ.get("EXTRACTOR", "demo"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="results/benchmarks")
    parser.add_argument("--large", action="store_true", help="training at 64 and 128 pixels alone")
    options = parser.parse_args()
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in a training
    if options.large:
        result = describe(device) | {"models": benchmark_large(device)}
        write(result, large_as_markdown(result), options.out, "-large")
        return
    data = load_dataset("bloodmnist", options.data_root).to(device)
    held_out = load_dataset("bloodmnist", options.data_root, split="held_out")

    extractor = features.load_extractor(options.extractor, device)
    # First: for its memory.
    evaluation = benchmark_metrics(data.to(torch.device("cpu")), held_out, extractor)
    models = [
        benchmark_model(name, preset, data)
        for name in MODELS
        for preset in ("baseline", "best")
        if preset in MODELS[name].PRESETS
    ]
    ours = 128 / seconds_per_call(lambda: next_batch(data, 128), device, at_least=1.0)
    batch = data.images[:64]
    extraction = 64 / seconds_per_call(
        lambda: features.extract(batch, extractor, cache=False), device, at_least=5.0
    )
    torch.manual_seed(0)
    draws = [torch.randn(4096, 2048) for _ in range(2)]
    statistics = [frechet.gaussian_statistics(draw) for draw in draws]
    trace = seconds_per_call(lambda: frechet.frechet_distance(*statistics), torch.device("cpu"))
    result = describe(device) | {
        "models": models,
        "data_images_per_second": ours,
        "usual_way_images_per_second": benchmark_usual_way(options.data_root),
        "extractor": extractor.name,
        "extraction_images_per_second": extraction,
        "frechet_2048_seconds": trace,
        "evaluation": evaluation,
    }
    write(result, as_markdown(result), options.out)


def describe(device: torch.device) -> dict:
    return {
        "machine": describe_device(device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "code": CODE_VERSION,
    }


def write(result: dict, text: str, folder: str, ending: str = "") -> None:
    """Write MACHINE.json and MACHINE.md, and print the latter."""
    stem = "".join(c if c.isalnum() else "-" for c in result["machine"]).strip("-").lower()
    json_text = json.dumps(result, indent=1) + "\n"
    write_atomically(f"{folder}/{stem}{ending}.json", lambda path: path.write_text(json_text))
    write_atomically(f"{folder}/{stem}{ending}.md", lambda path: path.write_text(text))
    print(text)


def large_as_markdown(result: dict) -> str:
    lines = [
        f"# Training at 64 and 128 pixels on {result['machine']}, {result['cores']} cores, "
        f"torch {result['torch']}",
        "",
        "| Model | Preset | Pixels | Batch | Parameters | Training, images/s | GFLOP an image "
        "| Peak memory, GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["models"]:
        lines.append(
            f"| {row['model']} | {row['preset']} | {row['settings']['image_size']} "
            f"| {row['batch_size']} | {row['parameters']:,} "
            f"| {row['training_images_per_second']:,.1f} | {row['flop_per_image'] / 1e9:.1f} "
            f"| {row['peak_memory_mib'] / 1024:.1f} |"
        )
    words = "Peak memory: of the GPU; on a CPU that of the process up to this row."
    lines += ["", " ".join([words, *result.get("notes", [])]), ""]
    return "\n".join(lines)


def as_markdown(result: dict) -> str:
    metrics = result["evaluation"]
    ours, usual = result["data_images_per_second"], result["usual_way_images_per_second"]
    usually = f"{usual:,.0f} images/s ({ours / usual:.0f} times slower)" if usual else "–"
    lines = [
        f"# Speed on {result['machine']}, {result['cores']} cores, torch {result['torch']}",
        "",
        " ".join(["28×28 pixels, one training at a time.", *result.get("notes", [])]),
        "",
        "| Model | Preset | Parameters | Training, images/s | In bfloat16 | GFLOP an image "
        "| TFLOP/s | Data's share of a step | Sampling, images/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["models"]:
        faster = row["bfloat16_images_per_second"]
        lines.append(
            f"| {row['model']} | {row['preset']} | {row['parameters']:,} "
            f"| {row['training_images_per_second']:,.0f} | {f'{faster:,.0f}' if faster else '–'} "
            f"| {row['flop_per_image'] / 1e9:.2f} "
            f"| {row['flop_per_second'] / 1e12:.2f}{_share_of_peak(row, result['machine'])} "
            f"| {row['data_share_of_step']:.2%} | {row['sampling_images_per_second']:,.2f} |"
        )
    lines += [
        "",
        "Training is in float32 on a CPU and in bfloat16 on a GPU. *In bfloat16*: what "
        "`--precision bfloat16` gives, on a CPU that has instructions of its own for it.",
        "",
        f"- Batches by index on the device: {ours:,.0f} images/s; "
        f"medmnist with PIL transforms and a DataLoader: {usually}.",
        f"- Features by {result['extractor']}: "
        f"{result['extraction_images_per_second']:.1f} images/s.",
        f"- Fréchet distance of 2048-d statistics: {result['frechet_2048_seconds']:.1f} s.",
        f"- All metrics beyond extraction, {metrics['n_fake']:,} against {metrics['n_real']:,} "
        f"images at 1024-d: {metrics['metrics_seconds']:.0f} s; the search for copies among "
        f"{metrics['copies_images']:,} images, in features of {result['extractor']} and in pixels "
        f"over eight turns: {metrics['copies_seconds']:.0f} s; peak memory of both "
        f"{metrics['peak_memory_mib'] / 1024:.1f} GiB.",
        "",
    ]
    return "\n".join(lines)


def _share_of_peak(row: dict, machine: str) -> str:
    """The share of the peak in brackets, where the machine has a known one; else nothing."""
    peak = next((peak for name, peak in PEAKS.items() if name in machine), None)
    return f" ({row['flop_per_second'] / peak:.1%} of peak)" if peak else ""


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
