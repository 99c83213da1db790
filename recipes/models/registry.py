"""Named models: `create_model("mambair-light-x2")`."""

import difflib
import hashlib
from pathlib import Path
from typing import Any

from torch import nn

import qmir_ao.backend.kernels  # noqa: F401  (without its kernels a forward takes minutes)
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes.checkpoint import load_checkpoint
from qmir_ao.recipes.models import (
    eamamba,
    edsr,
    mair,
    mambair,
    mambair_unet,
    mambairv2,
    swinir,
    vmambair,
)

_FAMILIES: tuple[tuple[type[nn.Module], dict[str, dict[str, Any]]], ...] = (
    (mambair.MambaIR, mambair.CONFIGS),
    (mair.MaIR, mair.CONFIGS),
    (edsr.EDSR, edsr.CONFIGS),
    (swinir.SwinIR, swinir.CONFIGS),
    (mambairv2.MambaIRv2, mambairv2.CONFIGS),
    (mambair_unet.MambaIRUNet, mambair_unet.CONFIGS),
    (vmambair.VmambaIR, vmambair.CONFIGS),
    (eamamba.EAMambaSR, eamamba.SR_CONFIGS),
    (eamamba.EAMamba, eamamba.UNET_CONFIGS),
)
_CLASSES = {name: family for family, configs in _FAMILIES for name in configs}
MODELS = {name: settings for _, configs in _FAMILIES for name, settings in configs.items()}
"""Name to the arguments of its class."""
PRETRAINED = {"mambair-tiny-x2": "dac3a714dfaa5a15d7774dfc63d8186b4117c5c518d8a284a5d3aad953445386"}
"""Models whose weights come with this package, and the SHA-256 of the files."""
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def list_models() -> list[str]:
    """Names that `create_model` knows."""
    return list(MODELS)


def create_model(name: str, pretrained: bool = False) -> nn.Module:
    """Build a model by name, in training mode, with fresh or shipped weights.

    Args:
        name: one of `list_models()`.
        pretrained: load the weights that come with this package (`mambair-tiny-x2` only).

    Raises:
        ConfigError: unknown name, or no weights come with this model.
        CheckpointError: the shipped file is damaged.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(MODELS)}"
        raise ConfigError(f"create_model: unknown model {name!r}; {hint}")
    model = _CLASSES[name](**MODELS[name])
    if pretrained:
        load_checkpoint(model, _shipped(name))
    return model


def _shipped(name: str) -> Path:
    """Path of the checked weights that come with this package."""
    if name not in PRETRAINED:
        raise ConfigError(
            f"create_model: no weights come with {name!r}, only with {', '.join(PRETRAINED)}; "
            "load the published ones with qmir_ao.recipes.checkpoint.load_checkpoint"
        )
    path = ASSETS / f"{name}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the installation is incomplete, install it again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != PRETRAINED[name]:
        raise CheckpointError(
            f"{path}: SHA-256 is {digest}, expected {PRETRAINED[name]}; the file was changed or "
            "damaged, install the package again"
        )
    return path
