"""Lowered models on disk: safetensors and a JSON graph, a sha256 of each; never pickle."""

import hashlib
import json
import keyword
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
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.report import LoweringReport
from qmir_ao.backend.targets import TargetNameError, decode_target, encode_target
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.quant.constants import attribute

FORMAT, VERSION = "qmir-lowered", 1
TENSORS, MANIFEST = "model.safetensors", "manifest.json"
_META = ("qmir_source", "qmir_module", "act_bits", "weight_bits")
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.int8, torch.uint8)}
_DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.int32, torch.int64, torch.bool)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return _digest(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"$node": value.name}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v) for v in value]}
    if isinstance(value, list | torch.fx.immutable_collections.immutable_list):
        return [_encode(v) for v in value]
    if isinstance(value, slice):
        return {"$slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype) and str(value).removeprefix("torch.") in _DTYPES:
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if value is Ellipsis:
        return {"$ellipsis": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TargetNameError(f"argument of type {type(value).__name__}")


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, body),) = value.items()
    if tag == "$node":
        return nodes[body]
    if tag == "$tuple":
        return tuple(_decode(v, nodes) for v in body)
    if tag == "$slice":
        return slice(*(_decode(v, nodes) for v in body))
    if tag == "$dtype":
        return _DTYPES[body]
    if tag == "$device":
        return torch.device("cpu")
    if tag == "$ellipsis":
        return Ellipsis
    raise TargetNameError(f"tag {tag!r}")


def encode_graph(graph: Graph) -> list[dict[str, Any]]:
    """Nodes as plain types.

    Raises:
        ConfigError: a node calls something that has no entry in the format.
    """
    nodes = []
    for node in graph.nodes:
        try:
            nodes.append(
                {
                    "name": node.name,
                    "op": node.op,
                    "target": encode_target(node),
                    "args": [_encode(a) for a in node.args],
                    "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
                    "meta": {k: node.meta[k] for k in _META if k in node.meta},
                }
            )
        except TargetNameError as error:
            raise ConfigError(
                f"node {node.name} cannot be saved: {error}. Capture with example_inputs, so that "
                "it becomes an aten operator"
            ) from error
    return nodes


def _identifier(name: Any) -> str:
    """A name that FX prints into the code it generates: nothing but an identifier may pass."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise TargetNameError(f"name {name!r}")
    return name


def decode_graph(nodes: list[dict[str, Any]]) -> Graph:
    """The inverse of `encode_graph`; only allowed targets and plain names are resolved."""
    graph = Graph()
    known: dict[str, Node] = {}
    for entry in nodes:
        target = decode_target(entry["op"], entry["target"])
        if entry["op"] in ("placeholder", "get_attr"):
            _identifier(target)
        args = tuple(_decode(a, known) for a in entry["args"])
        kwargs = {_identifier(k): _decode(v, known) for k, v in entry["kwargs"].items()}
        node = graph.create_node(entry["op"], target, args, kwargs, name=_identifier(entry["name"]))
        node.meta.update({k: entry["meta"][k] for k in _META if k in entry["meta"]})
        known[entry["name"]] = node
    graph.lint()
    if [entry["op"] for entry in nodes].count("output") != 1 or nodes[-1]["op"] != "output":
        raise ValueError("a graph ends with its one output")
    return graph


def _compact(manifest: dict[str, Any]) -> bytes:
    """JSON with one line for each entry: indented, the graph would outweigh the packed weights."""
    lines = (f"{json.dumps(k)}:{json.dumps(v, separators=(',', ':'))}" for k, v in manifest.items())
    # No newline at the end: a file that lost its last byte must not parse.
    return ("{" + ",\n".join(lines) + "}").encode()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


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
    graph = encode_graph(graph_module.graph)
    names = {n.target for n in graph_module.graph.nodes if n.op == "get_attr"}
    tensors = {str(t): attribute(graph_module, str(t)).clone().contiguous() for t in sorted(names)}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "qmir_ao": qmir_ao.__version__,
        "target": lowered.target,
        "tensors": {
            name: {"dtype": str(t.dtype), "shape": list(t.shape), "sha256": tensor_digest(t)}
            for name, t in tensors.items()
        },
        "graph_sha256": _digest(_canonical(graph)),
        "graph": graph,
        "report": lowered.report.to_dict(),
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
    import qmir_ao.backend.cpu  # noqa: F401  (defines and registers the operators)

    manifest = _read_manifest(path)
    tensors = _read_tensors(path, manifest)
    try:
        graph = decode_graph(manifest["graph"])
        report = LoweringReport.from_dict(manifest["report"])
        graph_module = GraphModule(dict(tensors), graph)
    except TargetNameError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error} is not allowed in a model") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST}: the graph is damaged ({type(error).__name__}: {error})"
        ) from error
    return LoweredModule(graph_module, report, target)


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
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file}: format version {manifest.get('version')!r}, this release reads {VERSION}"
        )
    wanted = ("tensors", dict), ("graph", list), ("report", dict)
    for key, kind in wanted:
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{file}: is damaged, {key!r} is missing")
    if _digest(_canonical(manifest["graph"])) != manifest.get("graph_sha256"):
        raise CheckpointError(f"{file}: the graph does not match its sha256; the file was changed")
    return manifest


def _read_tensors(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    file = path / TENSORS
    try:
        tensors: dict[str, Tensor] = load_tensors(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: is truncated or damaged ({error})") from error
    if set(tensors) != set(manifest["tensors"]):
        differing = sorted(set(tensors) ^ set(manifest["tensors"]))
        raise CheckpointError(f"{file}: tensors differ from the manifest: {differing[:3]}")
    for name, tensor in tensors.items():
        entry = manifest["tensors"][name]
        if not isinstance(entry, dict) or tensor_digest(tensor) != entry.get("sha256"):
            raise CheckpointError(
                f"{file}: hash mismatch in tensor {name!r}; the file was changed after saving"
            )
    return tensors
