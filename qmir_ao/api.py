"""The calls a user makes: prepare, lower, compare, save, load."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn
from torch.fx import GraphModule

from qmir_ao.errors import ConfigError

if TYPE_CHECKING:
    from torch.ao.quantization import QConfig, QConfigMapping

    from qmir_ao.backend.bit_budget import BitAssignment
    from qmir_ao.backend.explanation import Explanation
    from qmir_ao.backend.lowered import LoweredModule
    from qmir_ao.backend.table import Table
    from qmir_ao.passes.record import PassRecord


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
        CaptureError: the network cannot be traced or exported, or is not of float32; the message
            says how to go on.
        UnsupportedGraph: nothing to quantize.
        ConfigError: bad bits, placement or QConfig.
    """
    from torch.ao.quantization import QConfigMapping

    import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels that training uses)
    from qmir_ao.capture.inputs import check_dtypes
    from qmir_ao.capture.state import kept_state, own_copy
    from qmir_ao.passes.pipeline import CAPTURE, run_passes
    from qmir_ao.passes.record import RECORDS
    from qmir_ao.quant.assignment import check_mapping
    from qmir_ao.quant.prepare import prepare_exported, prepare_traced

    check_dtypes(model)
    own = own_copy(model)
    if isinstance(qconfig, QConfigMapping):
        check_mapping(qconfig, own)
    if example_inputs is None:
        from qmir_ao.capture.blame import blamed
        from qmir_ao.capture.functionalize import functionalize
        from qmir_ao.capture.inputs import check_devices
        from qmir_ao.capture.selective_scan import swapped_selective_scan

        check_devices(own, ())
        with swapped_selective_scan(own), blamed(own), kept_state(own):
            graph, records = _rewritten_trace(own)
            prepared = prepare_traced(own, qconfig, placement, graph)
        functionalize(prepared)
    else:
        from qmir_ao.capture.export import export_graph
        from qmir_ao.capture.inputs import insert_input_checks

        inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
        graph_module = export_graph(own, inputs, dynamic_shapes)
        records = run_passes(graph_module, CAPTURE)
        insert_input_checks(graph_module)
        prepared = prepare_exported(graph_module, qconfig, placement)
    prepared.meta[RECORDS] = records
    return prepared


def _rewritten_trace(model: nn.Module) -> "tuple[GraphModule | None, list[PassRecord]]":
    """A symbolic trace after the passes that run before preparation; None where none applies."""
    from qmir_ao.capture.fuse_recurrence import rewritten_by_trace
    from qmir_ao.passes.pipeline import CAPTURE, run_passes

    records: list[PassRecord] = []

    def rewrite(graph_module: GraphModule) -> bool:
        records.extend(run_passes(graph_module, CAPTURE))
        return any(record.changed for record in records)

    found = rewritten_by_trace(model, rewrite)
    return (found if found is not model and isinstance(found, GraphModule) else None), records


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
        target: "cpu", or "cuda" for the current NVIDIA GPU.
        path: where a file target writes; "cpu" and "cuda" write none (use `save`).

    Raises:
        ConfigError: unknown target, or a path for a target that writes no file.
        DeviceError: target "cuda" without a GPU, its driver or CuPy.
        UnsupportedGraph: `prepared` is no prepared graph.
    """
    from qmir_ao.backend.registry import get_target, lower

    get_target(target)
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
    return lower(prepared, target)


@overload
def compare(
    model: GraphModule, lowered: "LoweredModule", *data: torch.Tensor
) -> list[dict[str, Any]]: ...


@overload
def compare(
    model: nn.Module,
    lowered: "LoweredModule",
    *data: Any,
    file: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "Table": ...


def compare(
    model: nn.Module,
    lowered: "LoweredModule",
    *data: Any,
    file: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "list[dict[str, Any]] | Table":
    """Compare a network with its lowered form: is the arithmetic right, or what did it cost?

    With the prepared network, operator by operator on equal inputs: whether the integers reproduce
    the fake-quantized arithmetic. With the float network, layer by layer inside of both networks:
    noise, clipping, codes used and outliers, and histograms of what the selective scans give.

    Args:
        model: prepared network, or the float network it was made from.
        lowered: its lowered form.
        data: for a prepared network its inputs; for a float network one iterable of inputs (or of
            pairs with ground truth, which is not used).
        file: results file of a comparison with the float network, which goes on from it.
        progress: called with (done, total) batches of a comparison with the float network.

    Returns:
        For a prepared network one record for each integer operator, with the keys `name, module,
        kind, codes, code_mismatches, boundary_mismatches, grid_error, acc_equal, max_error_steps,
        max_error_roundings, sqnr_db, clip_rate`; for a float network a `Table`. See
        `qmir_ao.backend.compare` and `qmir_ao.backend.comparison`.

    Raises:
        UnsupportedGraph: a prepared network that the other was not made from.
        ConfigError: a float network that the other was not made from, bad data, or a results file
            of something else.
    """
    from qmir_ao.quant.prepare import is_fake_quantize

    if any(is_fake_quantize(module) for module in model.modules()):
        from qmir_ao.backend.compare import compare_operators

        if file is not None or progress is not None:
            raise ConfigError("compare: file and progress are for a comparison with a float model")
        assert isinstance(model, GraphModule)
        return compare_operators(model, lowered, data)
    from qmir_ao.backend.comparison import compare_with_float

    if len(data) != 1:
        raise ConfigError(
            f"compare: with a float network pass one iterable of inputs, got {len(data)} arguments"
        )
    return compare_with_float(model, lowered, data[0], file=file, progress=progress)


def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    bits: Sequence[int] = (2, 4, 8),
    file: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> "Table":
    """Drop in PSNR per layer and bit width: one layer quantized at a time, by calibration alone.

    Args:
        model: float network from images to images in [0, 1]; left as it was.
        data: input tensors, or pairs (input, ground truth).
        bits: widths to try, of weights and activations alike.
        file: results file, written after each layer; a call with the same arguments goes on.
        progress: called with (done, total) after each layer and width.
        **settings: further arguments of `get_qmir_qconfig`.

    Returns:
        A `Table` with a row for each layer and width; see
        `qmir_ao.backend.sensitivity.measure_sensitivity`.

    Raises:
        ConfigError: bad data or bits, or the file belongs to another model, data or setting.
    """
    import qmir_ao.backend.kernels  # noqa: F401  (without its kernels a forward takes minutes)
    from qmir_ao.backend.sensitivity import measure_sensitivity

    return measure_sensitivity(model, data, bits=bits, file=file, progress=progress, **settings)


def assign_bits(
    model: nn.Module,
    data: Any,
    budget: str,
    metric: str = "psnr",
    *,
    bits: Sequence[int] = (2, 4, 8),
    table: "Table | None" = None,
    file: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> "BitAssignment":
    """Choose the bits of each layer so that the output loses least within a budget.

    Args:
        model: float network.
        data: as for `sensitivity`; with ground truth its error counts, else that to the float
            output.
        budget: "size=0.2x" (all parameters, as a share of float32), "size=150000" (bytes), or
            "bits=4.0" (mean over the quantized weights).
        metric: "psnr".
        bits: widths to choose from.
        table: what `sensitivity` returned for this model and data, to spare the measurement.
        file: results file of the measurement, which goes on from it.
        progress: called with (done, total) during the measurement.
        **settings: further arguments of `get_qmir_qconfig`.

    Returns:
        A QConfigMapping for `prepare_qat`, with what it expects.

    Raises:
        ConfigError: a budget that nothing fits into (with the smallest that is reachable), a budget
            or metric that is none, or a table of another model or data.
    """
    import qmir_ao.backend.kernels  # noqa: F401  (without its kernels a forward takes minutes)
    from qmir_ao.backend.bit_budget import search_bits

    return search_bits(
        model,
        data,
        budget,
        metric,
        bits=bits,
        table=table,
        file=file,
        progress=progress,
        **settings,
    )


def explain(lowered: "LoweredModule") -> "Explanation":
    """What each pass changed, and what became of each operator.

    Args:
        lowered: from `convert_and_lower` or `load`.

    Returns:
        An object to print, with `passes` (records with `name`, `changed`, `operators` and
        `modules`), `operators()` (rows of the operator table) and `to_dict()`.

    Raises:
        ConfigError: it is no lowered model.
    """
    from qmir_ao.backend.explanation import explain_lowered

    return explain_lowered(lowered)


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

    A model that was lowered for one target runs on the others as well.

    Raises:
        CheckpointError: missing, damaged or tampered files, or an operator that is not allowed.
        ConfigError: unknown target.
        DeviceError: target "cuda" without a GPU, its driver or CuPy.
    """
    from qmir_ao.backend.artifact import load_lowered
    from qmir_ao.backend.lowered import move
    from qmir_ao.backend.registry import get_target

    device = get_target(target).device()
    loaded = load_lowered(Path(path), target)
    move(loaded.graph_module, device)
    return loaded
