"""Lowered models on disk: safetensors and a JSON graph, a sha256 of each; never pickle."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

import qmir_ao
from qmir_ao.backend.explanation import decode_records, encode_records
from qmir_ao.backend.graph_format import decode_graph, encode_graph, tensor_names
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.report import make_report
from qmir_ao.backend.targets import TargetNameError
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.quant.constants import attribute

FORMAT, VERSION = "qmir-lowered", 5
READABLE = (3, 4, VERSION)
"""Versions that this release loads: integer operators had no epilogue up to 3."""
TENSORS, MANIFEST = "model.safetensors", "manifest.json"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return _digest(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def _lines(members: dict[str, Any]) -> str:
    return ",\n".join(f"{json.dumps(k)}:{_dense(v)}" for k, v in members.items())


def _dense(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _compact(manifest: dict[str, Any]) -> bytes:
    """JSON with a line for each entry: indented, the graph would outweigh the packed weights."""
    text = _lines({k: v for k, v in manifest.items() if k != "graph"})
    # No newline at the end: a file that lost its last byte must not parse.
    return ("{" + text + ',\n"graph":{' + _lines(manifest["graph"]) + "}}").encode()


def _graph_digest(graph: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """sha256 of the graph together with name, type and shape of each tensor."""
    layout = [[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())]
    text = json.dumps([graph, layout], sort_keys=True, separators=(",", ":"))
    return _digest(text.encode())


def save_lowered(lowered: LoweredModule, path: Path) -> None:
    """Write the folder under a temporary name, then rename it into place.

    Raises:
        ConfigError: `lowered` is no lowered model, `path` is a file or another kind of folder, or
            an operator has no entry in the format.
    """
    if not isinstance(lowered, LoweredModule):
        raise ConfigError(
            f"save needs what convert_and_lower returns, got {type(lowered).__name__}"
        )
    if path.exists() and not (path / MANIFEST).is_file() and not _is_empty_folder(path):
        raise ConfigError(f"{path} exists and is no lowered model; choose another path")
    graph_module = lowered.graph_module
    if type(graph_module.graph._codegen) is not CodeGen:
        raise ConfigError(
            "a model with nested inputs or outputs cannot be saved; use plain tensors"
        )
    report = lowered.report
    reported = {r.name for r in report.operators} | {r.name for r in report.left_in_float}
    graph = encode_graph(graph_module.graph, reported)
    names = tensor_names(graph_module.graph)
    tensors = {name: attribute(graph_module, name).clone().contiguous() for name in names}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "qmir_ao": qmir_ao.__version__,
        "target": lowered.target,
        "tensors": [tensor_digest(t) for t in tensors.values()],
        "graph_sha256": _graph_digest(graph, tensors),
        "passes": encode_records(lowered.passes),
        "graph": graph,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write(scratch / TENSORS, save_tensors(tensors))
        _write(scratch / MANIFEST, _compact(manifest))
        scratch.chmod(0o755)
        _replace_folder(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace_folder(scratch: Path, path: Path) -> None:
    if not path.exists():
        scratch.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(old / path.name)
    scratch.rename(path)
    shutil.rmtree(old)


def load_lowered(path: Path, target: str) -> LoweredModule:
    """Read and verify a folder written by `save_lowered`.

    Raises:
        CheckpointError: missing, damaged or tampered, or with an operator that is not allowed.
    """
    import qmir_ao.backend.kernels  # noqa: F401  (defines and registers the operators)

    manifest = _read_manifest(path)
    tensors = _read_tensors(path, manifest)
    try:
        graph = decode_graph(manifest["graph"], sorted(tensors))
        graph_module = GraphModule(dict(tensors), graph)
        report = make_report(graph_module)
        # Models that earlier releases saved have no record.
        records = decode_records(manifest.get("passes", []))
    except TargetNameError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error} is not allowed in a model") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST}: the graph is damaged ({type(error).__name__}: {error})"
        ) from error
    return LoweredModule(graph_module, report, target, records)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is damaged, not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is no manifest of a lowered model")
    version = manifest.get("version")
    if type(version) is not int or version not in READABLE:
        raise CheckpointError(
            f"{file}: format version {version!r}, this release reads "
            f"{', '.join(map(str, READABLE[:-1]))} and {VERSION}; lower the trained model again "
            "and save it"
        )
    wanted = ("tensors", list), ("graph", dict)
    for key, kind in wanted:
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{file}: is damaged, {key!r} is missing")
    return manifest


def _read_tensors(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    file = path / TENSORS
    try:
        tensors: dict[str, Tensor] = load_tensors(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: is truncated or damaged ({error})") from error
    digests = manifest["tensors"]
    if len(tensors) != len(digests):
        raise CheckpointError(
            f"{file}: has {len(tensors)} tensors, the manifest knows {len(digests)}; take both "
            "files from one save"
        )
    for name, digest in zip(sorted(tensors), digests, strict=True):
        if tensor_digest(tensors[name]) != digest:
            raise CheckpointError(
                f"{file}: hash mismatch in tensor {name!r}; the file was changed after saving"
            )
    if _graph_digest(manifest["graph"], tensors) != manifest.get("graph_sha256"):
        raise CheckpointError(
            f"{path / MANIFEST}: the graph does not match its sha256, or a tensor its name, type "
            "or shape; a file was changed after saving"
        )
    return tensors
