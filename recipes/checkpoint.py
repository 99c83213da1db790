"""Load and save weights: never executes code from a file, never leaves half a file behind."""

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmir_ao.errors import CheckpointError
from qmir_ao.recipes.images import atomic_write

_WRAPPERS = ("params", "params_ema", "state_dict", "model.sd_e")
"""Where published files keep the weights; EAMamba's the averaged ones two levels down."""
_PREFIX = "module."
_SHOWN = 3
"""Keys of each kind that an error message names."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from `.safetensors` or a published `.pth`.

    A `.pth` is read with `weights_only=True` and nothing else; `params`, `params_ema`,
    `state_dict` and `model.sd_e` wrappers and a `module.` prefix are removed.

    Raises:
        CheckpointError: missing, damaged, hostile or without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a .pth or .safetensors file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _unwrap(path, read_pickle(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(str(path))
    except Exception as error:  # SafetensorError, OSError, and ValueError on odd headers
        raise CheckpointError(
            f"{path}: not a valid safetensors file ({error}); it is damaged or truncated, "
            "get it again"
        ) from error
    return tensors


def read_pickle(path: Path) -> Any:
    """Read a file of `torch.save` that holds tensors and plain data; never runs code from it.

    Raises:
        CheckpointError: missing, damaged or hostile.
    """
    try:
        with warnings.catch_warnings():
            # A foreign pickle makes torch warn about its protocol before it is refused.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: refused, the file holds more than tensors or is damaged ({reason}). "
            "Files that would execute code are never loaded; save the weights as safetensors"
        ) from error
    except Exception as error:  # a damaged archive raises one of at least seven types
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); "
            "it is damaged or truncated, get it again"
        ) from error


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        inner = content
        for key in wrapper.split("."):
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            content = inner
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path}: holds no weights (a {type(content).__name__}); expected a state dict or "
            f"one under {', '.join(_WRAPPERS)}"
        )
    odd = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(
            f"{path}: {odd[0]!r} is not a tensor; expected a state dict or one under "
            f"{', '.join(_WRAPPERS)}"
        )
    return {str(key).removeprefix(_PREFIX): value for key, value in content.items()}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load weights from a file into a model, all of them or none.

    Args:
        model: network with the architecture of the file.
        path: `.pth` (published checkpoints) or `.safetensors`.

    Raises:
        CheckpointError: see `read_weights`, or the file belongs to another architecture.
    """
    ignored = getattr(model, "ignored_keys", ())
    weights = {k: v for k, v in read_weights(path).items() if k.rpartition(".")[2] not in ignored}
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    shapes = [
        f"{key} is {tuple(weights[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    problems = [
        _list("missing keys", missing),
        _list("unexpected keys", unexpected),
        _list("shapes differ", shapes),
    ]
    found = [text for text in problems if text]
    if found:
        raise CheckpointError(
            f"{path}: not a checkpoint of {type(model).__name__} as it was built: "
            f"{'; '.join(found)}. Check the model name, scale and variant"
        )
    model.load_state_dict(weights)


def _list(title: str, items: list[str]) -> str:
    if not items:
        return ""
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {title}: {', '.join(items[:_SHOWN])}{rest}"


def save_weights(model: nn.Module, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Save a model's weights as safetensors, atomically.

    Args:
        model: its state dict is saved.
        path: file to write; the folder must exist.
        metadata: facts about the weights; values that are not strings are stored as JSON.

    Raises:
        CheckpointError: the folder is missing, read-only or full.
    """
    from safetensors.torch import save

    facts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in (metadata or {}).items()
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    try:
        atomic_write(Path(path), save(tensors, metadata=facts))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def digest_weights(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that another network or other weights do not share."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a `.safetensors` file; empty if it has none.

    Raises:
        CheckpointError: not a safetensors file.
    """
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # SafetensorError or OSError
        raise CheckpointError(f"{path}: not a valid safetensors file ({error})") from error
