"""A float network beside its lowered form, layer by layer, each inside of its own network.

`compare_operators` asks whether the integer arithmetic is right; this asks what quantization did.
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from qmir_ao.backend.layers import capture_float
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.report import KINDS
from qmir_ao.backend.table import (
    ResultsFile,
    Row,
    Table,
    batches_digest,
    decibels,
    model_digest,
    read_batches,
)
from qmir_ao.errors import ConfigError
from qmir_ao.ops.chain_quantize import ChainArgs, chain_values
from qmir_ao.passes.epilogues import PLAIN, epilogue_parts, own_arguments, plain_target
from qmir_ao.passes.lower import SOURCE
from qmir_ao.quant.patterns import arguments, match, module_path, upstream

aten, qmir = torch.ops.aten, torch.ops.qmir

FAR = 6.0
"""Standard deviations beyond which a value counts as an outlier."""
BINS = 81
"""Bins of a histogram of scan outputs, odd so that one is centred."""
MARGIN = 1.25
"""How far a histogram reaches beyond what the float network's first batch needs."""
SCAN = "selective_scan"
Totals = dict[str, Any]


def compare_with_float(
    model: nn.Module,
    lowered: LoweredModule,
    data: Any,
    *,
    file: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Run a float network and its lowered form on the same inputs and compare layer by layer.

    Args:
        model: the float network, as it was before `prepare_qat` (or as it was trained).
        lowered: its lowered form.
        data: input tensors, or pairs (input, ground truth), of which the input is used.
        file: results file, written after each batch; a call with the same arguments goes on.
        progress: called with (done, total) after each batch.

    Returns:
        A row for each integer operator: `layer`, `operator`, `kind`, `weight_bits`, `act_bits`;
        `sqnr_db` of its output against the float network's (what came in differs as well);
        `clipped`, the share of activations beyond the outermost codes; `codes_used`, the share of
        codes that occur; `outliers_float` and `outliers`, the shares of outputs further than 6
        standard deviations from their mean; `peak_float` and `peak`, the furthest in standard
        deviations. `facts["scans"]` has for each selective scan histograms of its outputs before
        and after, over the same bins (the outermost also count what lies beyond), and the largest
        magnitude of each channel. None: no difference, or no uniform grid.

    Raises:
        ConfigError: the networks do not belong together, or the file is of something else.
    """
    batches = read_batches(data, "compare")
    facts = {
        "model": model_digest(model),
        "lowered": model_digest(lowered),
        "data": batches_digest(batches),
    }
    results = ResultsFile(file, "comparison", facts)
    graph = capture_float(model, (batches[0][0],))
    pairs = pair_operators(graph, lowered)
    state: dict[str, Totals] = results.done.get("state", {})
    start = int(results.done.get("batches", 0))
    for index, (x, _) in enumerate(batches):
        if index >= start:
            with torch.no_grad():
                outputs = _FloatOutputs(graph, set(pairs.values())).collect(x)
                _Listener(lowered.graph_module, pairs, outputs, state).run(x)
            results.done["state"] = state
            results.add("batches", index + 1)
        if progress is not None:
            progress(index + 1, len(batches))
    rows = [_row(node, state[node.name]) for node in pairs]
    scans = {n.name: state[n.name]["scan"] for n in pairs if KINDS[n.target] == SCAN}
    return results.finish(Table("comparison", rows, results.facts | {"scans": scans}))


def pair_operators(graph: GraphModule, lowered: LoweredModule) -> dict[Node, Node]:
    """The operator of the float network for each integer operator, in the former's order.

    Raises:
        ConfigError: an integer operator has none.
    """
    known: dict[tuple[str, str], list[Node]] = {}
    for node in graph.graph.nodes:
        pattern = match(graph, node)
        if pattern is not None:
            known.setdefault((module_path(node), pattern.kind), []).append(node)
    pairs = {}
    for node in lowered.graph_module.graph.nodes:
        if node.target in KINDS:
            path = str(node.meta.get("qmir_module", ""))
            kind = KINDS[node.target].replace("conv2d", "conv")
            if not known.get((path, kind)):
                raise ConfigError(
                    f"compare: the float network has no {kind} in module {path!r} for the integer "
                    f"operator {node.name}; pass the network that was prepared and lowered"
                )
            pairs[node] = known[path, kind].pop(0)
    if not pairs:
        raise ConfigError("compare: the lowered network holds no integer operator")
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    return dict(sorted(pairs.items(), key=lambda pair: order[pair[1]]))


class _FloatOutputs(Interpreter):
    """Keeps what chosen operators of the float network give."""

    def __init__(self, graph: GraphModule, wanted: set[Node]) -> None:
        super().__init__(copy.copy(graph).eval())
        self.wanted, self.outputs = wanted, dict[Node, Tensor]()

    def collect(self, x: Tensor) -> dict[Node, Tensor]:
        """The outputs on one batch."""
        self.run(x)
        return self.outputs

    def run_node(self, node: Node) -> Any:
        """Run an operator and keep its output if it is one of the chosen."""
        out = super().run_node(node)
        if node in self.wanted:
            self.outputs[node] = out
        return out


class _Listener(Interpreter):
    """Runs a lowered network and adds up, operator by operator, what it differs in."""

    def __init__(
        self,
        lowered: GraphModule,
        pairs: dict[Node, Node],
        outputs: dict[Node, Tensor],
        state: dict[str, Totals],
    ) -> None:
        super().__init__(lowered)
        self.pairs, self.outputs, self.state = pairs, outputs, state
        self.readers: dict[Node, list[Node]] = {}
        for node in pairs:
            for quantize in _quantizes(node):
                self.readers.setdefault(quantize, []).append(node)

    def run_node(self, node: Node) -> Any:
        """Run an operator and count."""
        out = super().run_node(node)
        for reader in self.readers.get(node, ()):
            values = [self.env[a] if isinstance(a, Node) else a for a in arguments(node)]
            if node.target is qmir.chain_quantize.default:
                chain, (codes, *grid) = ChainArgs(*values), out
                values = [chain_values(chain), *grid, chain.quant_min, chain.quant_max]
            else:
                codes = out
            _add_codes(self._totals(reader), node.name, values, codes)
        if node in self.pairs:
            before, after = self.outputs.pop(self.pairs[node]), self._own_result(node, out)
            _add_outputs(self._totals(node), before.reshape(after.shape), after)
            if KINDS[node.target] == SCAN:
                _add_scan(self._totals(node).setdefault("scan", {}), before, after)
        return out

    def _own_result(self, node: Node, out: Any) -> Any:
        """What an integer operator gives before its epilogue."""
        if not epilogue_parts(node):
            return out[0] if node.target in PLAIN else out
        return plain_target(node)(
            *torch.fx.node.map_arg(own_arguments(node), lambda n: self.env[n])
        )

    def _totals(self, node: Node) -> Totals:
        return self.state.setdefault(node.name, {"codes": {}})


_MAKE_CODES = (qmir.dls_quantize.default, qmir.chain_quantize.default)


def _quantizes(node: Node) -> list[Node]:
    """The operators that make the activation codes which an integer operator reads."""

    def stop(n: Node) -> bool:
        made_otherwise = n.target is aten.to.dtype and SOURCE in n.meta
        ends = (*_MAKE_CODES, qmir.dls_qparams.default)
        return n.target in ends or made_otherwise or n.op != "call_function" or n.target in KINDS

    operands = {a: None for a in own_arguments(node) if isinstance(a, Node)}
    above = (n for a in operands if not stop(a) for n in upstream(a, stop))
    return [n for n in dict.fromkeys((*operands, *above)) if n.target in _MAKE_CODES]


def grid_positions(x: Tensor, step: Tensor, shift: Tensor) -> Tensor:
    """Values in units of their step, the code before rounding and clipping; float64."""
    per_group = step.numel() in (1, x.shape[0])
    wide = (-1, *([1] * (x.dim() - 1))) if per_group else (*x.shape[:-1], 1)
    step, shift = (t.double().reshape(wide) for t in (step, shift))
    return (x.double() + shift) / step


def _add_codes(totals: Totals, name: str, values: list[Any], codes: Tensor) -> None:
    x, step, shift, low, high = values[:5]
    t = grid_positions(x, step, shift)
    outside = int(((t < low - 0.5) | (t > high + 0.5)).sum())
    found = torch.bincount(codes.flatten().long() - low, minlength=high - low + 1).tolist()
    row = totals["codes"].setdefault(name, {"clipped": 0, "counts": [0] * len(found)})
    row["clipped"] += outside
    row["counts"] = [a + b for a, b in zip(row["counts"], found, strict=True)]


def _add_outputs(totals: Totals, before: Tensor, after: Tensor) -> None:
    noise = (after.double() - before.double()).square().sum()
    _sum(totals, "noise", float(noise))
    _sum(totals, "signal", float(before.double().square().sum()))
    _sum(totals, "values", before.numel())
    for name, y in (("float", before), ("lowered", after)):
        far = (y.double() - y.double().mean()).abs() / y.double().std().clamp(min=1e-12)
        _sum(totals, f"far_{name}", int((far > FAR).sum()))
        totals[f"peak_{name}"] = max(totals.get(f"peak_{name}", 0.0), float(far.max()))


def _sum(totals: Totals, key: str, value: float) -> None:
    totals[key] = totals.get(key, 0) + value


def _add_scan(scan: Totals, before: Tensor, after: Tensor) -> None:
    if not scan:
        centre = float((before.max() + before.min()) / 2)
        half = float((before.max() - before.min()) / 2) * MARGIN or 1.0
        scan |= {"low": centre - half, "high": centre + half}
        scan |= {"before": [0] * BINS, "after": [0] * BINS}
        scan |= {"peaks_before": [0.0] * before.shape[1], "peaks_after": [0.0] * before.shape[1]}
    for name, y in (("before", before), ("after", after.reshape(before.shape))):
        inside = y.double().flatten().clamp(scan["low"], scan["high"])
        found = torch.histc(inside, BINS, scan["low"], scan["high"]).long().tolist()
        scan[name] = [a + b for a, b in zip(scan[name], found, strict=True)]
        peaks = y.abs().transpose(0, 1).flatten(1).amax(1).tolist()
        scan[f"peaks_{name}"] = [
            max(a, b) for a, b in zip(scan[f"peaks_{name}"], peaks, strict=True)
        ]


def _row(node: Node, totals: Totals) -> Row:
    codes = list(totals["codes"].values())
    made = sum(sum(row["counts"]) for row in codes)
    used = [sum(n > 0 for n in row["counts"]) / len(row["counts"]) for row in codes]
    values = max(totals["values"], 1)
    return {
        "layer": str(node.meta.get("qmir_module", "")),
        "operator": node.name,
        "kind": KINDS[node.target],
        "weight_bits": node.meta.get("weight_bits"),
        "act_bits": node.meta.get("act_bits"),
        "sqnr_db": decibels(totals["signal"], totals["noise"]),
        "clipped": sum(row["clipped"] for row in codes) / made if made else None,
        "codes_used": sum(used) / len(used) if used else None,
        "outliers_float": totals["far_float"] / values,
        "outliers": totals["far_lowered"] / values,
        "peak_float": totals["peak_float"],
        "peak": totals["peak_lowered"],
    }
