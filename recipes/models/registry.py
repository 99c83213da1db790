"""Named models: `create_model("mambair-light-x2")`."""

import difflib
import hashlib
from pathlib import Path
from typing import Any

from torch import nn

import qmir_ao.backend.cpu  # noqa: F401  (without its kernels a forward takes minutes)
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes.checkpoint import load_checkpoint
from qmir_ao.recipes.models.mambair import MambaIR

_CLASSIC: dict[str, Any] = {"embed_dim": 180, "depths": (6,) * 6, "d_state": 16}
_LIGHT: dict[str, Any] = {
    "upsampler": "pixelshuffledirect",
    "embed_dim": 60,
    "depths": (6,) * 4,
    "d_state": 10,
    "expand": 1.2,
}
_TINY: dict[str, Any] = {
    "scale": 2,
    "upsampler": "pixelshuffledirect",
    # 48 channels everywhere: full SIMD registers and no waste in blocked convolutions.
    "embed_dim": 48,
    "depths": (2, 2),
    "d_state": 8,
    "expand": 1.0,
    "drop_path_rate": 0.0,
}
_SUPER = {**_CLASSIC, "upsampler": "pixelshuffle", "expand": 2.0}

MODELS: dict[str, dict[str, Any]] = {
    "mambair-tiny-x2": _TINY,
    **{f"mambair-light-x{s}": {**_LIGHT, "scale": s} for s in (2, 3, 4)},
    **{f"mambair-x{s}": {**_SUPER, "scale": s} for s in (2, 3, 4)},
    "mambair-denoise": {**_CLASSIC, "expand": 1.2},
    "mambair-jpeg": {**_CLASSIC, "expand": 1.2, "in_channels": 1},
}
"""Name to the arguments of `MambaIR`."""
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
    model = MambaIR(**MODELS[name])
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
