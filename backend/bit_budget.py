"""Bits of each layer under a budget: the choice with the least expected error, exactly solved."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.ao.quantization import QConfigMapping

from qmir_ao.backend.layers import Layer, capture_float, find_layers, quantized_layers
from qmir_ao.backend.sensitivity import PEAK, Progress, measure_sensitivity
from qmir_ao.backend.table import Table, batches_digest, decibels, model_digest, read_batches
from qmir_ao.errors import ConfigError
from qmir_ao.quant.qconfig import get_qmir_qconfig

METRICS = ("psnr",)
FLOAT_BYTES = 4
_BUDGET = re.compile(r"(size|bits)=([0-9]*\.?[0-9]+)(x?)")
_HOW = 'budget must be "size=0.2x" (of the float network), "size=150000" (bytes) or "bits=4.0"'


class BitAssignment(QConfigMapping):
    """A `QConfigMapping` with the bits that a budget search found; pass it to `prepare_qat`.

    Attributes:
        bits: width of each layer, of weights and activations alike, by module name.
        stored_bytes: of the network's parameters: packed weights, scales, and the rest in float32.
        mean_bits: of the quantized weights.
        expected: what the sensitivities add up to: `psnr_to_float`, and `drop` in dB where there
            was ground truth.
        table: layer, weights, bits and expected error of each layer.
    """

    def __init__(self) -> None:
        """Start empty; `assign_bits` makes them."""
        super().__init__()
        self.bits: dict[str, int] = {}
        self.stored_bytes = 0
        self.mean_bits = 0.0
        self.expected: dict[str, float | None] = {}
        self.table = Table("assignment", [], {})

    def __str__(self) -> str:
        """The table and what it comes to."""
        facts = [f"{self.stored_bytes:,} bytes", f"{self.mean_bits:.2f} bits per quantized weight"]
        facts += [f"{k} {v:.2f} dB (expected)" for k, v in self.expected.items() if v is not None]
        return f"{self.table}\n{', '.join(facts)}"


def search_bits(
    model: nn.Module,
    data: Any,
    budget: str,
    metric: str = "psnr",
    *,
    bits: Sequence[int] = (2, 4, 8),
    table: Table | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> BitAssignment:
    """Choose the bits of each layer so that the output loses least within a budget.

    The errors of single layers (`sensitivity`) are taken to add up, as independent noise does;
    under that the choice is optimal (an integer program, solved exactly).

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

    Raises:
        ConfigError: a budget that no choice fits (with the smallest that one does), a budget or
            metric that is none, or a table of something else.
    """
    kind, limit, share = _parse(budget)
    if metric not in METRICS:
        raise ConfigError(f"assign_bits: metric={metric!r} is unknown; allowed: {METRICS}")
    batches = read_batches(data, "assign_bits")
    if table is None:
        table = measure_sensitivity(
            model, batches, bits=bits, file=file, progress=progress, **settings
        )
    wanted = {"model": model_digest(model), "data": batches_digest(batches)}
    other = [key for key in wanted if table.facts.get(key) != wanted[key]]
    if other or table.kind != "sensitivity":
        raise ConfigError(
            f"assign_bits: the table is not the sensitivity of this {' and '.join(other)}; leave "
            "it out to measure again"
        )
    layers = quantized_layers(find_layers(capture_float(model, (batches[0][0],))))
    rest = sum(p.numel() for p in model.parameters()) - sum(x.elements for x in layers)
    program = _Program(table, layers, sorted(set(bits)), FLOAT_BYTES * rest)
    whole = FLOAT_BYTES * (rest + program.elements)
    if kind == "size":
        limit = limit * whole if share else limit
        chosen = program.solve(
            program.sizes, limit - program.rest, program.size_text(budget, whole)
        )
    else:
        chosen = program.solve(
            program.weighted, limit * program.elements, program.bits_text(budget)
        )
    return program.assignment(chosen, settings)


def _parse(budget: str) -> tuple[str, float, bool]:
    found = _BUDGET.fullmatch(budget.replace(" ", "")) if isinstance(budget, str) else None
    if found is None or (found[1] == "bits" and found[3]) or float(found[2]) <= 0:
        raise ConfigError(f"assign_bits: budget={budget!r} is none; {_HOW}")
    return found[1], float(found[2]), bool(found[3])


class _Program:
    """The choice as an integer program: one of the widths for each layer."""

    def __init__(
        self, table: Table, layers: Sequence[Layer], widths: Sequence[int], rest: int
    ) -> None:
        self.layers, self.widths, self.rest = layers, widths, rest
        self.elements = sum(layer.elements for layer in layers)
        known = {(row["layer"], row["bits"]): row for row in table.rows}
        missing = [(x.path, b) for x in layers for b in widths if (x.path, b) not in known]
        if missing:
            raise ConfigError(
                f"assign_bits: the table has no row for layer {missing[0][0]!r} at "
                f"{missing[0][1]} bits; measure the sensitivity at all of bits={tuple(widths)}"
            )
        self.rows = [[known[x.path, b] for b in widths] for x in layers]
        self.float_psnr = table.facts.get("float_psnr")
        cost = "mse" if self.float_psnr is None else "excess_mse"
        self.costs = [[row[cost] for row in rows] for rows in self.rows]
        self.sizes = [[layer.stored_bytes(b) for b in widths] for layer in layers]
        self.weighted = [[layer.elements * b for b in widths] for layer in layers]

    def size_text(self, budget: str, whole: int) -> str:
        """The error for a size that nothing fits into."""
        least = sum(min(row) for row in self.sizes) + self.rest
        return (
            f"assign_bits: budget {budget!r} is impossible: the smallest reachable is "
            f"size={_up(least / whole)}x ({least} of {whole} bytes), of which {self.rest} are of "
            f"parameters that stay in float, with every layer at {self.widths[0]} bits"
        )

    def bits_text(self, budget: str) -> str:
        """The error for a mean that nothing fits into."""
        return (
            f"assign_bits: budget {budget!r} is impossible: the smallest reachable is "
            f"bits={self.widths[0]:.1f}, the smallest of bits={tuple(self.widths)}"
        )

    def solve(self, loads: Sequence[Sequence[int]], limit: float, impossible: str) -> list[int]:
        """Index of the width of each layer, least in total cost with loads within the limit.

        Raises:
            ConfigError: nothing fits, or scipy is missing.
        """
        if sum(min(row) for row in loads) > limit:
            raise ConfigError(impossible)
        import numpy as np

        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError as error:
            raise ConfigError(
                "assign_bits needs scipy for its solver: pip install 'qmir-ao[recipes]'"
            ) from error
        cost = np.array(self.costs, dtype=float)
        scale = float(np.abs(cost).max()) or 1.0
        one_each = np.kron(np.eye(len(self.layers)), np.ones(len(self.widths)))
        found = milp(
            cost.ravel() / scale,
            integrality=np.ones(cost.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(np.array(loads, dtype=float).reshape(1, -1), -np.inf, limit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise ConfigError(f"assign_bits: the solver gave up: {found.message}")
        picked: list[int] = found.x.reshape(cost.shape).argmax(1).tolist()
        return picked

    def assignment(self, chosen: Sequence[int], settings: dict[str, Any]) -> BitAssignment:
        """The mapping for a choice."""
        made = BitAssignment()
        qconfigs = {b: get_qmir_qconfig(b, b, **settings) for b in self.widths}
        made.set_global(qconfigs[self.widths[-1]])
        rows = []
        for layer, index, found in zip(self.layers, chosen, self.rows, strict=True):
            width = self.widths[index]
            made.bits[layer.path] = width
            # A call in the network's own forward has no name; nothing else is left for the global.
            if layer.path:
                made.set_module_name(layer.path, qconfigs[width])
            else:
                made.set_global(qconfigs[width])
            keys = ("layer", "kinds", "weights", "bits", "mse", "drop")
            rows.append({key: found[index][key] for key in keys})
        mean = sum(x.elements * made.bits[x.path] for x in self.layers) / max(self.elements, 1)
        made.mean_bits = mean
        made.stored_bytes = self.rest + sum(x.stored_bytes(made.bits[x.path]) for x in self.layers)
        made.expected = self._expected(chosen)
        made.table = Table("assignment", rows, {"bytes": made.stored_bytes, "mean_bits": mean})
        return made

    def _expected(self, chosen: Sequence[int]) -> dict[str, float | None]:
        rows = [found[index] for found, index in zip(self.rows, chosen, strict=True)]
        expected = {"psnr_to_float": decibels(PEAK**2, sum(row["mse"] for row in rows))}
        if self.float_psnr is not None:
            own = PEAK**2 / 10 ** (self.float_psnr / 10)
            expected["drop"] = decibels(own + sum(row["excess_mse"] for row in rows), own)
        return expected


def _up(share: float) -> str:
    """A share with three decimals that is not below the exact one, so that it is reachable."""
    return f"{math.ceil(share * 1000) / 1000:.3f}"
