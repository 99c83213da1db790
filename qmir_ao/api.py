"""The calls a user makes: prepare, lower, compare, save, load."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule

from qmir_ao.errors import ConfigError

if TYPE_CHECKING:
    from torch.ao.quantization import QConfig, QConfigMapping

    from qmir_ao.backend.lowered import LoweredModule


def prepare_qat(
    model: nn.Module,
    qconfig: "QConfig | QConfigMapping",
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    *,
    dynamic_shapes: Any = None,
    placement: str = "paper",
) -> GraphModule:
    """Capture a float network and insert trainable DLS and RFA fake-quantizers.

    Args:
        model: float network; left as it was.
        qconfig: `qmir_qconfig`, `get_qmir_qconfig(...)`, or a QConfigMapping for settings per
            module name, type or operator.
        example_inputs: positional inputs; with them the network is captured by torch.export and
            goes through torchao's PT2E, without them by symbolic trace and `prepare_qat_fx`.
        dynamic_shapes: as for `torch.export.export`; None leaves batch, height and width dynamic.
        placement: "paper" (DLS on every activation of the body) or "official" (the published
            code's placement).

    Returns:
        A trainable graph in training mode; `train()` and `eval()` work on it.

    Raises:
        CaptureError: the network cannot be traced or exported; the message says how to go on.
        UnsupportedGraph: nothing to quantize.
        ConfigError: bad bits, placement or QConfig.
    """
    import copy

    import qmir_ao.backend.cpu  # noqa: F401  (registers the kernels that training uses)
    from qmir_ao.quant.prepare import prepare_exported, prepare_traced

    own = copy.deepcopy(model)
    if example_inputs is None:
        from qmir_ao.capture.selective_scan import swapped_selective_scan

        with swapped_selective_scan(own):
            return prepare_traced(own, qconfig, placement)
    from qmir_ao.capture.export import export_graph
    from qmir_ao.capture.inputs import insert_input_checks

    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    graph_module = export_graph(own, inputs, dynamic_shapes)
    insert_input_checks(graph_module)
    return prepare_exported(graph_module, qconfig, placement)


def prepare_ptq(
    model: nn.Module,
    qconfig: "QConfig | QConfigMapping",
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    *,
    dynamic_shapes: Any = None,
    placement: str = "paper",
) -> GraphModule:
    """Capture a float network and insert quantizers for `calibrate`, without training.

    Arguments and errors as `prepare_qat`; any QConfig serves. Min-max, percentile and
    mean-square-error observers are `get_qmir_qconfig(8, 8, activation="static", weight="lsq",
    init="minmax")`, `init="percentile"` and `init="mse"`.

    Returns:
        A graph in evaluation mode; `calibrate` it, then `convert_and_lower`.
    """
    return prepare_qat(
        model, qconfig, example_inputs, dynamic_shapes=dynamic_shapes, placement=placement
    ).eval()


def calibrate(
    prepared: GraphModule, data: Iterable[Any], *, progress: Callable[[int], None] | None = None
) -> GraphModule:
    """Initialise every activation quantizer of a prepared network from data, in place.

    Args:
        prepared: from `prepare_ptq` (or `prepare_qat`, for a start from more than one batch).
        data: input tensors, or sequences of inputs such as a DataLoader gives.
        progress: called with the number of batches done.

    Returns:
        `prepared`, in evaluation mode.

    Raises:
        ConfigError: no batch, or one that is no tensor.
        UnsupportedGraph: no quantizer in the graph.
    """
    from qmir_ao.quant.calibrate import calibrate_quantizers

    return calibrate_quantizers(prepared, data, progress=progress)


def convert_and_lower(
    prepared: GraphModule, target: str = "cpu", path: str | os.PathLike[str] | None = None
) -> "LoweredModule":
    """Lower a prepared network to integer operators.

    Args:
        prepared: from `prepare_qat`; left as it was, so one model lowers to several targets.
        target: "cpu".
        path: where a file target writes; the CPU target writes none (use `save`).

    Raises:
        ConfigError: unknown target, or a path for a target that writes no file.
        UnsupportedGraph: `prepared` is no prepared graph.
    """
    from qmir_ao.backend.registry import get_target

    lower = get_target(target)
    if path is not None:
        raise ConfigError(
            f"target={target!r} writes no file, got path={os.fspath(path)!r}; "
            "use qmir_ao.save(lowered, path)"
        )
    if not isinstance(prepared, GraphModule):
        raise ConfigError(
            f"convert_and_lower needs the graph that prepare_qat returns, got "
            f"{type(prepared).__name__}"
        )
    return lower(prepared)


def compare(prepared: GraphModule, lowered: "LoweredModule", *inputs: Any) -> list[dict[str, Any]]:
    """Compare a prepared and a lowered network operator by operator, on equal inputs.

    Returns:
        One record for each integer operator, with the keys `name, module, kind, codes,
        code_mismatches, boundary_mismatches, acc_equal, max_error_steps, sqnr_db, clip_rate`; see
        `qmir_ao.backend.compare`.
    """
    from qmir_ao.backend.compare import compare_operators

    return compare_operators(prepared, lowered, inputs)


def save(lowered: "LoweredModule", path: str | os.PathLike[str]) -> None:
    """Write a lowered network as a folder of `model.safetensors` and `manifest.json`.

    Nothing is written under `path` before everything is complete.

    Raises:
        ConfigError: the network holds an operator that has no entry in the format.
    """
    from qmir_ao.backend.artifact import save_lowered

    save_lowered(lowered, Path(path))


def load(path: str | os.PathLike[str], target: str = "cpu") -> "LoweredModule":
    """Read a folder written by `save`; every tensor is checked against its sha256.

    Raises:
        CheckpointError: missing, damaged or tampered files, or an operator that is not allowed.
        ConfigError: unknown target.
    """
    from qmir_ao.backend.artifact import load_lowered
    from qmir_ao.backend.registry import get_target

    get_target(target)
    return load_lowered(Path(path), target)
