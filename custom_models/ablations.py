"""Ablations: grids of single changes, each measured against its model's baseline.

A grid is a tuple of rows, and a new one is another entry of GRIDS. Every model in a grid has one
row named "baseline", with which its other rows are compared.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Ablation:
    """One row of a grid: a preset with some settings changed. No settings: the preset itself."""

    name: str  # unique for its model and preset
    model: str
    preset: str
    settings: dict = field(default_factory=dict)
    what: str = ""  # what the change is, in a few words


# What the published study of BloodMNIST with three models varied.
PUBLISHED = (
    Ablation("baseline", "cvae", "baseline"),
    Ablation("latent 16", "cvae", "baseline", {"latent_dim": 16}, "a quarter of the latents"),
    Ablation("latent 32", "cvae", "baseline", {"latent_dim": 32}, "half the latents"),
    Ablation("latent 128", "cvae", "baseline", {"latent_dim": 128}, "twice the latents"),
    Ablation("KL weight 0.25", "cvae", "baseline", {"kl_weight": 0.25}, "a third of the weight"),
    Ablation("KL weight 0.5", "cvae", "baseline", {"kl_weight": 0.5}, "two thirds of the weight"),
    Ablation("KL weight 1", "cvae", "baseline", {"kl_weight": 1.0}, "the evidence lower bound"),
    Ablation("lr 0.0001", "cvae", "baseline", {"lr": 1e-4}, "a tenth of the learning rate"),
    Ablation("lr 0.0005", "cvae", "baseline", {"lr": 5e-4}, "half the learning rate"),
    Ablation("epochs 50", "cvae", "baseline", {"epochs": 50}, "half as long"),
    Ablation("baseline", "dcgan", "baseline"),
    Ablation("latent 50", "dcgan", "baseline", {"latent_dim": 50}, "half the latents"),
    Ablation("latent 200", "dcgan", "baseline", {"latent_dim": 200}, "twice the latents"),
    Ablation(
        "hard labels",
        "dcgan",
        "baseline",
        {"real_label": 1.0, "fake_label": 0.0},
        "1 and 0 for 0.9 and 0.1",
    ),
    Ablation("ratio 1", "dcgan", "baseline", {"generator_steps": 1}, "one generator update, not 3"),
    Ablation("ratio 2", "dcgan", "baseline", {"generator_steps": 2}, "two generator updates"),
    Ablation("lr 0.0002", "dcgan", "baseline", {"lr": 2e-4}, "a fifth of the learning rate"),
    Ablation("epochs 20", "dcgan", "baseline", {"epochs": 20}, "half as long"),
    Ablation("baseline", "ddpm", "baseline"),
    # The number of DDIM's steps may not exceed T, though the ancestral sampler does not use it.
    Ablation(
        "T 200",
        "ddpm",
        "baseline",
        {"timesteps": 200, "sampling_steps": 200},
        "the last step is far from pure noise",
    ),
    Ablation(
        "T 1000",
        "ddpm",
        "baseline",
        {"timesteps": 1000, "sampling_steps": 1000},
        "the last step is nearly pure noise",
    ),
    Ablation("3 levels", "ddpm", "baseline", {"channels": (64, 128, 256)}, "without the deepest"),
    Ablation("epochs 250", "ddpm", "baseline", {"epochs": 250}, "half as long"),
)

GRIDS = {"published": PUBLISHED}
