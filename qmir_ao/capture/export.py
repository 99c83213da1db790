"""Capture through torch.export, with batch, height and width left dynamic."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qmir_ao.capture.blame import blame
from qmir_ao.capture.functionalize import functionalize
from qmir_ao.capture.fuse_recurrence import fuse_recurrences
from qmir_ao.capture.inputs import check_devices
from qmir_ao.capture.selective_scan import swapped_selective_scan
from qmir_ao.errors import CaptureError

log = logging.getLogger(__name__)


def _widen(x: Any) -> Any:
    """Double a batch of one: torch.export would fix a dimension of size 1 for ever."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() >= 2 and x.shape[0] == 1 else x


def _automatic_shapes(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Batch of every tensor, and height and width of images: whatever the model does not fix."""
    auto = torch.export.Dim.AUTO

    def dims(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor) or x.dim() < 2:
            return None
        free = range(x.dim()) if x.dim() == 3 else (0, x.dim() - 2, x.dim() - 1)
        return dict.fromkeys(free if x.dim() > 2 else (0,), auto)

    return tuple(dims(x) for x in inputs)


def export_graph(
    model: nn.Module, example_inputs: Sequence[Any], dynamic_shapes: Any = None
) -> GraphModule:
    """Export `model` in eval mode as a graph of aten and qmir operators with its parameters.

    Args:
        model: any module that torch.export can trace; it is left as it was.
        example_inputs: positional inputs, on the model's device.
        dynamic_shapes: as for `torch.export.export`; None leaves batch, height and width dynamic
            where the model allows it.

    Raises:
        CaptureError: the inputs are on another device, or torch.export failed (its reason is in
            the message).
    """
    inputs = tuple(example_inputs)
    check_devices(model, inputs)
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with swapped_selective_scan(model):
            return _export(model, inputs, dynamic_shapes)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _export(model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any) -> GraphModule:
    if dynamic_shapes is not None:
        return _try_export(model, inputs, dynamic_shapes)
    widened = tuple(_widen(x) for x in inputs)
    try:
        return _try_export(model, widened, _automatic_shapes(widened))
    except CaptureError as error:
        log.info("export with dynamic sizes failed (%s); trying fixed sizes", error)
    return _try_export(model, inputs, None)


def _advice(error: Exception) -> str:
    if str(error).startswith("qmir::"):
        return "Check the shapes that the module gives to this operator."
    return (
        "Replace control flow on tensor values in its forward, or pass dynamic_shapes that match "
        "what the model supports."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:400].rstrip(".") if lines else "no message"


def _try_export(model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> GraphModule:
    try:
        with torch.no_grad():
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        graph_module = program.module()
    except Exception as error:  # torch.export raises many types; the cause stays attached
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}{blame(model, error)}: "
            f"{type(error).__name__}: {_first_line(error)}. "
            f"{_advice(error)}"
        ) from error
    functionalize(graph_module)
    fuse_recurrences(graph_module)
    return graph_module
