"""How much each layer loses at each bit width: one layer quantized at a time, nothing trained."""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig
from torch.fx import GraphModule, Interpreter, Node

from qmir_ao.backend.layers import Layer, capture_float, find_layers, quantized_layers
from qmir_ao.backend.table import (
    Batch,
    ResultsFile,
    Row,
    Table,
    batches_digest,
    decibels,
    model_digest,
    read_batches,
)
from qmir_ao.capture.export import export_graph
from qmir_ao.capture.selective_scan import swapped_selective_scan
from qmir_ao.errors import CaptureError, ConfigError
from qmir_ao.quant._bases import QmirFakeQuantize
from qmir_ao.quant.calibrate import calibrate_quantizers
from qmir_ao.quant.patterns import match, module_of, module_path
from qmir_ao.quant.prepare import is_fake_quantize, prepare_exported, prepare_traced
from qmir_ao.quant.qconfig import get_qmir_qconfig
from qmir_ao.quant.spec import check_bits

Progress = Callable[[int, int], None]
PEAK = 1.0
"""Largest value of an image."""


def measure_sensitivity(
    model: nn.Module,
    data: Any,
    *,
    bits: Sequence[int] = (2, 4, 8),
    file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Table:
    """Quantize one layer at a time by calibration and see what it does to the output.

    Args:
        model: float network from images to images in [0, 1]; left as it was.
        data: input tensors, or pairs (input, ground truth); calibration uses the inputs.
        bits: widths to try, of weights and activations alike.
        file: results file, written after each layer; a call with the same arguments goes on.
        progress: called with (done, total) after each layer and width.
        **settings: further arguments of `get_qmir_qconfig`.

    Returns:
        A row for each layer and width: `layer`, `kinds`, `weights` (their number), `bits`, `mse`
        and `psnr_to_float` against the float output, and where there is ground truth
        `excess_mse`, `psnr` and `drop` (below the float network's, in dB). PSNR is of all pixels
        together, None where nothing differs. `facts["float_psnr"]` is the float network's own.

    Raises:
        ConfigError: bad data or bits, or the file belongs to another model, data or setting.
        CaptureError: the network can neither be traced nor exported.
        UnsupportedGraph: nothing to quantize.
    """
    batches = read_batches(data, "sensitivity")
    widths = _widths(bits)
    own = copy.deepcopy(model).eval()
    layers = quantized_layers(find_layers(capture_float(own, (batches[0][0],))))
    judge = _Judge(own, batches)
    facts = {
        "model": model_digest(model),
        "data": batches_digest(batches),
        "settings": {key: str(value) for key, value in settings.items()},
    }
    results = ResultsFile(file, "sensitivity", facts)
    total = len(layers) * len(widths)
    done = 0
    for width in widths:
        probe: _Probe | None = None
        for layer in layers:
            key = f"{layer.path}@{width}"
            if key not in results.done:
                if probe is None:
                    probe = _Probe(own, get_qmir_qconfig(width, width, **settings), batches)
                results.add(key, judge.row(layer, width, probe))
            done += 1
            if progress is not None:
                progress(done, total)
    rows = [results.done[f"{layer.path}@{width}"] for layer in layers for width in widths]
    return results.finish(Table("sensitivity", rows, results.facts | judge.facts()))


def _widths(bits: Sequence[int]) -> list[int]:
    widths = sorted({check_bits(width) for width in bits})
    if not widths:
        raise ConfigError("sensitivity: bits is empty; give widths from 2 to 8, such as (2, 4, 8)")
    return widths


class _Judge:
    """The float network's outputs, and what a quantized one loses against them."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        with torch.no_grad():
            self.outputs = [model(x) for x, _ in batches]
        for y, (_, truth) in zip(self.outputs, batches, strict=True):
            if not isinstance(y, Tensor) or (truth is not None and truth.shape != y.shape):
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                wanted = "a tensor" if truth is None else f"the ground truth's {tuple(truth.shape)}"
                raise ConfigError(f"sensitivity: the network gives {got}, not {wanted}")
        self.truths = [truth for _, truth in batches if truth is not None]
        self.float_mse = _mse(self.outputs, self.truths) if self.truths else None

    def facts(self) -> dict[str, Any]:
        """The float network's own PSNR where there is ground truth."""
        known = self.float_mse
        return {"float_psnr": None if known is None else decibels(PEAK**2, known), "peak": PEAK}

    def row(self, layer: Layer, width: int, probe: "_Probe") -> Row:
        """One row of the table."""
        outputs = probe.outputs(layer.path)
        mse = _mse(outputs, self.outputs)
        row: Row = {
            "layer": layer.path,
            "kinds": ", ".join(dict.fromkeys(layer.kinds)),
            "weights": layer.elements,
            "bits": width,
            "mse": mse,
            "psnr_to_float": decibels(PEAK**2, mse),
            "excess_mse": None,
            "psnr": None,
            "drop": None,
        }
        if self.float_mse is not None:
            to_truth = _mse(outputs, self.truths)
            row["excess_mse"] = to_truth - self.float_mse
            row["psnr"] = decibels(PEAK**2, to_truth)
            row["drop"] = decibels(to_truth, self.float_mse)
        return row


def _mse(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    errors = [
        (y.double() - z.double()).square().sum() for y, z in zip(outputs, wanted, strict=True)
    ]
    return float(sum(errors)) / max(sum(y.numel() for y in outputs), 1)


class _Probe:
    """A calibrated network at one width, of which one layer at a time is quantized."""

    def __init__(self, model: nn.Module, qconfig: QConfig, batches: Sequence[Batch]) -> None:
        self.inputs = [x for x, _ in batches]
        self.prepared = _prepare(model, qconfig, self.inputs[0])
        calibrate_quantizers(self.prepared, self.inputs)
        # Those of weights may be inside of layers, where the graph does not show them.
        self.inside: dict[str, list[QmirFakeQuantize]] = {}
        for name, module in self.prepared.named_modules():
            if isinstance(module, QmirFakeQuantize) and name.endswith(".weight_fake_quant"):
                module.enable_fake_quant(False)
                self.inside.setdefault(name.rpartition(".")[0], []).append(module)

    def outputs(self, path: str) -> list[Tensor]:
        """The outputs with only the layer at `path` quantized."""
        inside = self.inside.get(path, [])
        for module in inside:
            module.enable_fake_quant(True)
        try:
            with torch.no_grad():
                return [_OneLayer(self.prepared, path).run(x) for x in self.inputs]
        finally:
            for module in inside:
                module.enable_fake_quant(False)


def _prepare(model: nn.Module, qconfig: QConfig, x: Tensor) -> GraphModule:
    own = copy.deepcopy(model)
    try:
        with swapped_selective_scan(own):
            return prepare_traced(own, qconfig, "paper").eval()
    except CaptureError:
        return prepare_exported(export_graph(copy.deepcopy(model), (x,)), qconfig, "paper").eval()


class _OneLayer(Interpreter):
    """Runs a prepared graph in which only the operators of one layer see quantized operands.

    A quantizer may serve several layers, so that switching it on would quantize them all.
    """

    def __init__(self, prepared: GraphModule, path: str) -> None:
        super().__init__(prepared)
        self.path = path
        self.quantized: dict[Node, Tensor] = {}

    def _chosen(self, node: Node) -> bool:
        graph_module: Any = self.module
        return match(graph_module, node) is not None and module_path(node) == self.path

    def run_node(self, node: Node) -> Any:
        """Pass values by the quantizers, but keep what those of the layer make."""
        graph_module: Any = self.module
        if not is_fake_quantize(module_of(graph_module, node)):
            return super().run_node(node)
        if any(self._chosen(user) for user in node.users):
            self.quantized[node] = super().run_node(node)
        return self.env[node.all_input_nodes[0]]

    def fetch_args_kwargs_from_env(self, node: Node) -> Any:
        """Operands of a node: quantized for the chosen layer."""
        if self._chosen(node):
            seen = {**self.env, **self.quantized}
            args, kwargs = node.args, node.kwargs
            return (
                torch.fx.node.map_arg(args, lambda n: seen[n]),
                torch.fx.node.map_arg(kwargs, lambda n: seen[n]),
            )
        return super().fetch_args_kwargs_from_env(node)
