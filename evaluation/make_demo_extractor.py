"""Train a small classifier on generated cells and export its pooled features as TorchScript.

Run from the repository root: python -m evaluation.make_demo_extractor
Writes evaluation/demo_extractor.pt (uint8 [N, 3, H, W] → float32 [N, 64]) and its record,
demo_extractor.json. The cells are other ones than the demo data, drawn by the model that the data
is drawn with now (the kept one's were drawn by the diffusion model's stand-in, as its record says).
The features serve to try things out on the demo data; no real cell had a part in their training.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from custom_models.drawing import load_model, sample
from utils import (
    BLOOD_CLASSES,
    DEMO_FILE,
    OneSentenceParser,
    class_balanced_labels,
    exit_on_bad_input,
    progress,
    random_flips_and_turns,
    to_model_range,
    write_atomically,
    write_text,
)

FOLDER = Path(__file__).resolve().parent
SEED = 0
TRAIN_DRAW, TEST_DRAW = (400, 1000), (100, 1001)  # (cells per class, seed), apart from the data's
EPOCHS, BATCH, PEAK_RATE = 12, 64, 4e-3
FEATURES = 64


class DemoExtractor(nn.Module):
    """Images to the pooled features of a four-layer convolutional network."""

    def __init__(self):
        super().__init__()
        layers = []
        for inputs, outputs, stride in ((3, 24, 1), (24, 32, 2), (32, 48, 2), (48, FEATURES, 1)):
            # SiLU keeps every channel alive; a dead one makes the features' covariance singular.
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = to_model_range(images)  # raises on any dtype but uint8, in TorchScript too
        if x.shape[2] != 28 or x.shape[3] != 28:
            x = F.interpolate(x, size=[28, 28], mode="bilinear", antialias=True)
        return self.layers(x).mean(dim=(2, 3))


def train(
    classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, peak_rate: float
) -> None:
    """Fit a classifier of uint8 [N, 3, S, S] images, which returns logits, in place."""
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        batches = torch.randperm(len(images)).split(BATCH)
        for rows in progress(batches, desc=f"epoch {epoch + 1}/{epochs}"):
            logits = classifier(random_flips_and_turns(images[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(images):.4f}", flush=True)


def export(module: torch.jit.ScriptModule) -> bytes:
    """A TorchScript file that depends on nothing but the module's weights and code."""
    saved, stripped = io.BytesIO(), io.BytesIO()
    torch.jit.save(module, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(stripped, "w") as target:
        for name in source.namelist():
            # Debug records hold this machine's paths, and the serialization id is a hash over
            # them: either would change the file's own hash elsewhere.
            if not name.endswith((".debug_pkl", "/serialization_id")):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
    return stripped.getvalue()


def main() -> None:
    OneSentenceParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every run
    torch.manual_seed(SEED)
    extractor = DemoExtractor()
    classifier = nn.Sequential(extractor, nn.Linear(FEATURES, len(BLOOD_CLASSES)))
    demo = json.loads(DEMO_FILE.with_suffix(".json").read_text(encoding="utf-8"))
    generator, about = load_model(DEMO_FILE.parent / "checkpoints" / demo["drawn_by"]["file"])

    def draw(per_class: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = class_balanced_labels(len(BLOOD_CLASSES), per_class)
        return sample(generator, labels, seed), labels

    train(classifier, *draw(*TRAIN_DRAW), EPOCHS, PEAK_RATE)
    classifier.eval()
    images, labels = draw(*TEST_DRAW)
    with torch.no_grad():
        right = (classifier(images).argmax(1) == labels).sum().item()

    data = export(torch.jit.freeze(torch.jit.script(extractor)))
    record = {
        "file": "demo_extractor.pt",
        "sha256": hashlib.sha256(data).hexdigest(),
        "features": FEATURES,
        "classes": list(BLOOD_CLASSES),
        "drawn_by": {"file": demo["drawn_by"]["file"], "sha256": about["sha256"]},
        "train": {"n": TRAIN_DRAW[0] * len(BLOOD_CLASSES), "draw_seed": TRAIN_DRAW[1]},
        "test": {"n": len(labels), "draw_seed": TEST_DRAW[1], "accuracy": right / len(labels)},
        "epochs": EPOCHS,
        "seed": SEED,
        "device": "cpu",
        "torch": torch.__version__,
    }
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(FOLDER / "demo_extractor.pt", lambda path: path.write_bytes(data))
    write_text(FOLDER / "demo_extractor.json", text)
    print(text, end="")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
