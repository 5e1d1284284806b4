"""Layers and initial values that more than one model uses."""

from torch import nn


def init_dcgan(module: nn.Module) -> None:
    """Weights N(0, 0.02), batch norm scales N(1, 0.02) (Radford et al. 2016, section 4)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
