"""Ablations: grids of single changes, each measured against its model's unchanged preset.

A grid is a tuple of rows, and a new one is another entry of GRIDS. Every model in a grid has one
row without settings, with which its other rows are compared.
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

# Neither averaged nor chosen by validation. The training is the same, so that a finished one's
# checkpoint has them.
LAST_WEIGHTS = {"ema_decay": 0.0, "validation_epochs": 0}

# The DCGAN's contest less held back, and with more kinds of cells to draw.
LOOSE_TURNS = {"gamma": 1.0, "flips_and_turns": True}
FALLING = {"decay_images": 300_000}

# Each of our changes that is a setting, taken away again, one at a time, and some together.
BEST = (
    Ablation("best", "cvae", "best"),
    Ablation("normal prior", "cvae", "best", {"learned_prior": False}, "N(0, I), not learned"),
    Ablation("temperature 1", "cvae", "best", {"temperature": 1.0}, "draws as the model says"),
    Ablation("temperature 0.75", "cvae", "best", {"temperature": 0.75}, "draws less cooled"),
    Ablation("temperature 0", "cvae", "best", {"temperature": 0.0}, "means, without a texture"),
    Ablation("no warm-up", "cvae", "best", {"kl_warmup_images": 0}, "whole KL from the start"),
    Ablation("one draw", "cvae", "best", {"prior_draws": 1}, "the prior sees each image once"),
    Ablation("constant rate", "cvae", "best", {"decay_images": 10**9}, "the rate does not fall"),
    Ablation("no EMA", "cvae", "best", LAST_WEIGHTS, "the last weights, not their mean"),
    Ablation("best", "dcgan", "best"),
    Ablation("no JPEG", "dcgan", "best", {"jpeg_quality": 0}, "images as they are drawn"),
    Ablation("dct chroma", "dcgan", "best", {"jpeg_chroma": "dct"}, "JPEG as the data's"),
    Ablation("turns", "dcgan", "best", {"flips_and_turns": True}, "both sides turned at random"),
    Ablation("gamma 1", "dcgan", "best", {"gamma": 1.0}, "a tenth of the penalties at first"),
    Ablation("every step", "dcgan", "best", {"penalty_interval": 1}, "penalties at every step"),
    Ablation("falling rate", "dcgan", "best", FALLING, "by a cosine, to a fifth in the end"),
    Ablation("no EMA", "dcgan", "best", LAST_WEIGHTS, "the last weights, not their mean"),
    Ablation("falling rate + no EMA", "dcgan", "best", {**FALLING, **LAST_WEIGHTS}, "both"),
    Ablation("gamma 1 + turns", "dcgan", "best", LOOSE_TURNS, "both"),
    Ablation(
        "gamma 1 + turns + no JPEG",
        "dcgan",
        "best",
        {**LOOSE_TURNS, "jpeg_quality": 0},
        "all three together",
    ),
    Ablation(
        "gamma 1 + turns + no EMA",
        "dcgan",
        "best",
        {**LOOSE_TURNS, **LAST_WEIGHTS},
        "all three together",
    ),
    Ablation("best", "cwgan_gp", "best"),
    Ablation("no JPEG", "cwgan_gp", "best", {"jpeg_quality": 0}, "images as they are drawn"),
    Ablation("no turns", "cwgan_gp", "best", {"flips_and_turns": False}, "cells as they lie"),
    Ablation("ratio 1", "cwgan_gp", "best", {"critic_steps": 1}, "one critic update, not two"),
    Ablation("no EMA", "cwgan_gp", "best", LAST_WEIGHTS, "the last weights, not their mean"),
    Ablation("best", "ddpm", "best"),
    Ablation("JPEG", "ddpm", "best", {"jpeg_quality": 75}, "images stored as the data's cells"),
    Ablation("no attention", "ddpm", "best", {"attention_from": 3}, "convolutions alone"),
    Ablation("no augmentation", "ddpm", "best", {"augment_probability": 0.0}, "cells as they lie"),
    Ablation("constant rate", "ddpm", "best", {"decay_images": 10**9}, "the rate does not fall"),
    Ablation("no dropout", "ddpm", "best", {"dropout": 0.0}, "all features in training"),
    Ablation("no EMA", "ddpm", "best", LAST_WEIGHTS, "the last weights, not their mean"),
)

GRIDS = {"published": PUBLISHED, "best": BEST}
