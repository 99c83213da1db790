"""A stand-in for torchvision: the one network that LPIPS asks it for, with made-up weights."""

import importlib.machinery
import sys
import types
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

ALEXNET = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1),
           (256, 256, 3, 1, 1))  # fmt: skip
"""Channels in and out, window, stride and padding of the convolutions."""
POOLED = (0, 1)
"""Convolutions that a pooling follows."""


def alexnet_weights() -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution."""
    rng = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(out, given, side, side, generator=rng) / (given * side * side) ** 0.5,
            0.1 * torch.randn(out, generator=rng),
        )
        for given, out, side, _, _ in ALEXNET
    ]


def _features() -> nn.Sequential:
    layers: list[nn.Module] = []
    for place, (shape, values) in enumerate(zip(ALEXNET, alexnet_weights(), strict=True)):
        given, out, side, stride, padding = shape
        layer = nn.Conv2d(given, out, side, stride, padding)
        layer.weight.data, layer.bias.data = values
        layers += [layer, nn.ReLU()]
        if place in POOLED:
            layers.append(nn.MaxPool2d(3, 2))
    return nn.Sequential(*layers)


def install(monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """Put it where torchvision would be; returns the names of the networks that are asked for."""
    import torchmetrics.functional.image.lpips as functional
    import torchmetrics.image.lpip as modular

    asked: list[str] = []

    def alexnet(weights: object = None) -> types.SimpleNamespace:
        asked.append("alexnet")
        return types.SimpleNamespace(features=_features())

    double, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    double.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    vars(models).update(alexnet=alexnet, AlexNet_Weights=types.SimpleNamespace(DEFAULT=None))
    vars(double).update(models=models)
    monkeypatch.setitem(sys.modules, "torchvision", double)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for module in (functional, modular):
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    return asked
