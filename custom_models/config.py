"""What the configuration of every model has in common."""

import ast
import dataclasses
import inspect
import io
import math
import tokenize
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from utils import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Settings that every model has; each model's config adds its own and sets its defaults."""

    image_size: int = 28  # side of the square images, in pixels
    image_channels: int = 3  # 3: colour, 1: grey; decided by the data
    n_classes: int = 8  # decided by the data
    epochs: int = 100  # passes over the training images
    batch_size: int = 128  # images of one update
    # At first (1 + n) / (10 + n) after n updates, which reaches 0.999 only after 8,990.
    ema_decay: float = 0.0  # share of the past in the running mean of the weights; 0: no mean
    flips_and_turns: bool = False  # show each image in one of its eight flips and turns, at random
    validation_epochs: int = 0  # epochs between validation KIDs, but the last has one; 0: none
    # Settings that came after the first kept runs, with the values that those runs stand for.
    LATER: ClassVar[dict] = {}
    # Settings that sampling alone reads: a finished training may be sampled by others.
    SAMPLING: ClassVar[tuple] = ()
    # Those of them that `measure_sampling` compares.
    COMPARED: ClassVar[tuple] = ()
    # Whether torch.compile makes up for its minute in a training on a GPU.
    COMPILED: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif kind is tuple and isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif type(value) is not kind:
                raise InputError(f"{field.name} must be {kind.__name__}, got {value!r}")
            value = getattr(self, field.name)
            if kind is float and not math.isfinite(value):
                raise InputError(f"{field.name} must be finite, got {value}")
            if kind is tuple and not (value and all(type(v) is int and v >= 1 for v in value)):
                raise InputError(f"{field.name} must be whole numbers above 0, got {value}")
            if field.name == "lr" and value <= 0:
                raise InputError(f"lr must be above 0, got {value}")
            if field.name.startswith("beta") and not 0 <= value < 1:
                raise InputError(f"{field.name} must be in [0, 1), got {value}")
        for name in ("image_size", "image_channels", "n_classes", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.validation_epochs < 0:
            raise InputError(
                f"validation_epochs must not be negative, got {self.validation_epochs}"
            )

    def build(self) -> nn.Module:
        """The model of this config, untrained."""
        raise NotImplementedError

    @property
    def images_per_step(self) -> int:
        """Real images that one call of `training_step` takes."""
        return self.batch_size

    def require(self, condition: bool, name: str, rule: str) -> None:
        """Raise InputError naming the setting `name`, unless the condition holds."""
        if not condition:
            raise InputError(f"{name} must be {rule}, got {getattr(self, name)}")


def stored_settings(stored: dict, config: ModelConfig) -> dict:
    """Settings as a file holds them, with those that came later at what they were then."""
    return config.LATER | stored


def help_texts(config: ModelConfig) -> dict[str, str]:
    """What each setting means: the comment beside its field in the source, or beside a base's."""
    texts = {}
    for kind in reversed(type(config).__mro__):
        if dataclasses.is_dataclass(kind):
            source = io.StringIO(inspect.getsource(kind))
            for token in tokenize.generate_tokens(source.readline):
                name = token.line.partition(":")[0].strip()
                if token.type == tokenize.COMMENT and name in kind.__annotations__:
                    texts[name] = token.string.removeprefix("#").strip()
    return texts


def parse_settings(pairs: list[str]) -> dict:
    """`["epochs=5", "sampler=ddim"]` → `{"epochs": 5, "sampler": "ddim"}`, for command lines."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"{pair!r} is no setting; write NAME=VALUE, such as epochs=5")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value  # a plain word
    return settings
