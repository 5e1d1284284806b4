"""The models by name: `MODELS[name].PRESETS[preset].build()` is a model.

A preset's config knows its own class of model: those of `best` lie in files of their own.
"""

import dataclasses

from custom_models import cgan, cvae, cwgan_gp, dcgan, ddpm
from custom_models.config import ModelConfig
from utils import InputError, usual_size

MODELS = {"cvae": cvae, "dcgan": dcgan, "ddpm": ddpm, "cwgan_gp": cwgan_gp, "cgan": cgan}


def make_config(model: str, preset: str = "baseline", **settings) -> ModelConfig:
    """The preset's config with some settings changed; InputError for an unknown name or value."""
    if model not in MODELS:
        raise InputError(f"unknown model {model!r}; known are {', '.join(MODELS)}")
    presets = MODELS[model].PRESETS
    if preset not in presets:
        raise InputError(f"{model} has no preset {preset!r}; it has {', '.join(presets)}")
    known = [field.name for field in dataclasses.fields(presets[preset])]
    for name in settings:
        if name not in known:
            raise InputError(f"{model} {preset} has no setting {name!r}; it has {', '.join(known)}")
    return dataclasses.replace(presets[preset], **settings)


def usual_image_size(model: str, preset: str, dataset: str) -> int:
    """Pixels where no size is asked for: what the preset is made for, else the data set's usual.

    Raises InputError for unknown names, as `make_config` and `utils.load_dataset` do.
    """
    size = make_config(model, preset).image_size
    return usual_size(dataset) if size == ModelConfig.image_size else size
