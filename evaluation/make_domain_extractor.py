"""Train a small classifier on real cells and export its pooled features as TorchScript.

Run from the repository root: python -m evaluation.make_domain_extractor --data-root DATA
DATA holds bloodmnist.npz, the PBC set and the pbc_split.csv that gives both the same split.
Writes evaluation/domain_extractor.pt and its record, domain_extractor.json. The network has seen
the train split's cells, so the reference of its features is the test split, never the train split.
"""

import hashlib
import json
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evaluation.agreement import agreement
from evaluation.make_demo_extractor import BATCH, export, train
from utils import (
    BLOOD_CLASSES,
    SPLITS,
    ImageSet,
    InputError,
    OneSentenceParser,
    exit_on_bad_input,
    find_duplicates,
    keep_freed_memory,
    load_dataset,
    seed_everything,
    to_model_range,
    to_uint8,
    write_atomically,
    write_text,
)

FOLDER = Path(__file__).resolve().parent
SEED = 0
SOURCES = (("bloodmnist", 28), ("pbc", 64))
SIZE = 48  # pixels inside the network
EPOCHS, PEAK_RATE = 8, 4e-3
FEATURES = 128


class ConvNorm(nn.Sequential):
    """A 3×3 or 1×1 convolution and its batch normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs))


class HalfConv(nn.Module):
    """A convolution that keeps its weights in float16 and computes in float32."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.stride, self.padding = convolution.stride, convolution.padding
        self.register_buffer("weight", convolution.weight.detach().half())
        self.register_buffer("bias", convolution.bias.detach().half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.float(), self.bias.float(), self.stride, self.padding)


class Block(nn.Module):
    """The basic residual block of He et al. 2016, sec. 3.3, with SiLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride)
        self.second = ConvNorm(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.second(F.silu(self.first(x))) + self.shortcut(x))


class DomainExtractor(nn.Module):
    """Images, uint8 [N, 3, H, W] of any size, to the pooled features of a residual network."""

    def __init__(self):
        super().__init__()
        self.size = [SIZE, SIZE]
        self.layers = nn.Sequential(
            ConvNorm(3, 32, 3, 2),
            nn.SiLU(),
            Block(32, 64, 2),
            Block(64, FEATURES, 2),
            Block(FEATURES, FEATURES, 1),
        )
        self.head = nn.Linear(FEATURES, len(BLOOD_CLASSES))

    def resize(self, images: torch.Tensor) -> torch.Tensor:
        x = to_model_range(images)  # raises on any dtype but uint8, in TorchScript too
        return F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(self.resize(images)).mean(dim=(2, 3))

    @torch.jit.export
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Of the classes, [N, 8], in the order of BLOOD_CLASSES."""
        return self.head(features)


def load_sources(root: str | Path | None, split: str) -> list[ImageSet]:
    """The same cells at 28 and at 64 pixels. Raises InputError where the two splits differ."""
    sources = [load_dataset(name, root, size, split) for name, size in SOURCES]
    # Else a cell that the network trains on at one size could be a test cell at the other.
    if not torch.equal(sources[0].labels, sources[1].labels):
        raise InputError(
            f"the {split} splits of {sources[0].name} and {sources[1].name} hold different cells; "
            "put the pbc_split.csv that belongs to bloodmnist.npz beside it"
        )
    return sources


def train_extractor(sources: list[ImageSet], epochs: int = EPOCHS) -> DomainExtractor:
    """Train on all images of all sources; the result is in evaluation mode, its weights folded.

    Colours are left as they are: features that ignore them would not see a generator's wrong ones.
    """
    extractor = DomainExtractor()
    with torch.no_grad():
        parts = [part for source in sources for part in source.images.split(BATCH)]
        images = torch.cat([to_uint8(extractor.resize(part)) for part in parts])
    labels = torch.cat([source.labels for source in sources])
    classifier = nn.Sequential(extractor, extractor.head).to(memory_format=torch.channels_last)
    train(classifier, images, labels, epochs, PEAK_RATE)
    return fold(extractor.eval())


def fold(extractor: DomainExtractor) -> DomainExtractor:
    """Merge each normalisation into its convolution and halve the weights' size, in place."""
    for parent in list(extractor.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvNorm):
                setattr(parent, name, HalfConv(fuse_conv_bn_eval(*child)))
    return extractor


def measure(extractor: DomainExtractor, data: ImageSet) -> dict:
    """The classifier's accuracy on one split in [0, 1]: overall, 95 % interval, each class."""
    with torch.inference_mode():
        parts = [extractor.logits(extractor(part)).argmax(1) for part in data.images.split(BATCH)]
    result = agreement(torch.cat(parts), data.labels)
    return {
        "accuracy": result["agreement"],
        "interval": result["interval"],
        "per_class": {name: part["agreement"] for name, part in result["per_class"].items()},
    }


def main() -> None:
    parser = OneSentenceParser(description="Train the domain extractor and write its record.")
    parser.add_argument("--data-root", help="folder of the data ($DATA_ROOT, else data/)")
    torch.set_num_threads(1)  # the same sums in the same order on every run
    keep_freed_memory()
    seed_everything(SEED)
    with exit_on_bad_input():
        root = parser.parse_args().data_root
        splits = {split: load_sources(root, split) for split in SPLITS}
        started = time.perf_counter()
        extractor = train_extractor(splits["train"])
        seconds = time.perf_counter() - started

        data = export(torch.jit.script(extractor))
        record = {
            "file": "domain_extractor.pt",
            "sha256": hashlib.sha256(data).hexdigest(),
            "data": "PBC, Acevedo et al. 2020, Mendeley data snkd93bnjr, CC BY 4.0",
            "features": FEATURES,
            "working_size": SIZE,
            "classes": list(BLOOD_CLASSES),
            "train": [describe(source) for source in splits["train"]],
            "chosen_on": "val",
            "val": [describe(source) | measure(extractor, source) for source in splits["val"]],
            "test": [describe(source) | measure(extractor, source) for source in splits["test"]],
            "duplicates_across_splits": [len(find_duplicates(p)) for p in zip(*splits.values())],
            "reference": "the test split; the network has seen the train split's cells",
            "not_for": [
                "distances to the train split",
                "drawn cells, cells of another stain or of another laboratory",
                "diagnosis",
            ],
            "epochs": EPOCHS,
            "batch": BATCH,
            "peak_rate": PEAK_RATE,
            "seed": SEED,
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "seconds": round(seconds, 1),
            "torch": torch.__version__,
        }
        text = json.dumps(record, indent=2) + "\n"
        write_atomically(FOLDER / "domain_extractor.pt", lambda path: path.write_bytes(data))
        write_text(FOLDER / "domain_extractor.json", text)
    print(text, end="")


def describe(data: ImageSet) -> dict:
    return {
        "dataset": data.name,
        "size": data.images.shape[-1],
        "split": data.split,
        "n": len(data),
        "sha256": data.sha256(),
    }


if __name__ == "__main__":
    main()
