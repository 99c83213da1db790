"""What a MODEL argument may be: a name of the zoo, a file with weights, or a lowered folder."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import qmir_ao
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes.checkpoint import load_checkpoint, read_metadata
from qmir_ao.recipes.models import create_model, list_models

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
MANIFEST = "manifest.json"
PROBE_SIDE = 16


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and where it came from.

    Attributes:
        model: float network or lowered one.
        source: "zoo", "weights" or "lowered".
        name: zoo name of the architecture, or the folder of a lowered model.
        scale: enlargement, 1 for none.
        channels: 3 for colour, 1 for grey.
    """

    model: nn.Module
    source: str
    name: str
    scale: int
    channels: int


def load_model(source: str, arch: str | None = None) -> LoadedModel:
    """Load a MODEL argument.

    Args:
        source: zoo name with shipped weights, weights file, or folder written by `save`.
        arch: zoo name of the architecture of a weights file; may be left out where the file
            itself says it.

    Raises:
        ConfigError: unknown name, or a weights file without architecture.
        CheckpointError: damaged, hostile or of another architecture.
    """
    path = Path(source)
    if path.is_dir():
        model, kind, name = _load_lowered(path), "lowered", str(path)
    elif path.suffix in WEIGHT_SUFFIXES:
        kind, name = "weights", arch or _stored_name(path)
        model = create_model(name)
        load_checkpoint(model, path)
    elif source in list_models():
        model, kind, name = create_model(source, pretrained=True), "zoo", source
    else:
        close = difflib.get_close_matches(source, list_models(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"MODEL {source!r} is no name of the zoo, no weights file "
            f"({', '.join(WEIGHT_SUFFIXES)}) and no folder; {hint}"
            f"Names: {', '.join(list_models())}"
        )
    model = model.eval()
    return LoadedModel(model, kind, name, *probe(model))


def probe(model: nn.Module) -> tuple[int, int]:
    """Find out enlargement and input channels of a network by running it on a small image.

    Raises:
        ConfigError: it takes neither colour nor grey images, or does not enlarge evenly.
    """
    failures = []
    for channels in (3, 1):
        with torch.inference_mode():
            try:
                y = model(_ramp(channels))
            except RuntimeError as error:
                failures.append(f"{channels} channels: {str(error).splitlines()[0]}")
                continue
        scale, rest = divmod(y.shape[-1], PROBE_SIDE)
        if rest or y.shape[-1] != y.shape[-2] or y.shape[1] != channels:
            raise ConfigError(
                f"the model turns {channels}x{PROBE_SIDE}x{PROBE_SIDE} into {tuple(y.shape[1:])}; "
                "a restoration network keeps the channels and enlarges by a whole number"
            )
        return scale, channels
    raise ConfigError(f"the model runs on no image of side {PROBE_SIDE}: {'; '.join(failures)}")


def _ramp(channels: int) -> torch.Tensor:
    values = torch.linspace(0.0, 1.0, channels * PROBE_SIDE * PROBE_SIDE)
    return values.reshape(1, channels, PROBE_SIDE, PROBE_SIDE)


def _load_lowered(path: Path) -> nn.Module:
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: holds no {MANIFEST}, so it is no lowered model; "
            "give a folder that `qmir quantize` or qmir_ao.save wrote"
        )
    return qmir_ao.load(path)


def _stored_name(path: Path) -> str:
    """Zoo name that `qmir train` stored with the weights."""
    name = ""
    if path.suffix == ".safetensors" and path.is_file():
        name = read_metadata(path).get("model", "")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if not name:
        raise ConfigError(
            f"{path}: the file does not say which architecture it holds; add --arch NAME, "
            f"one of {', '.join(list_models())}"
        )
    return name
