"""The rule by which a lowered network agrees with the prepared one, operator by operator."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from support.tolerances import (
    CHAIN_GRID_ERROR,
    CODE_MISMATCH,
    operator_roundings,
    scan_error_steps,
)
from torch import Tensor
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.passes.epilogues import plain_target


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of values in [0, 1]."""
    error = float((a - b).double().square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def pooled_psnr(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """PSNR in dB of a set of images in [0, 1]: from the squared error of all their pixels.

    Where one code flips, everything behind it may come out otherwise, so that one image says
    little: 140 dB where no code did, 45 dB where one did.
    """
    errors = torch.cat([(a - b).double().square().flatten() for a, b in pairs])
    return -10 * math.log10(max(float(errors.mean()), 1e-30))


def taps(lowered: LoweredModule, name: str) -> int:
    """Products that one accumulator of a linear or convolution adds up."""
    node = next(n for n in lowered.graph_module.graph.nodes if n.name == name)
    if plain_target(node) is torch.ops.qmir.conv2d.default:
        return math.prod(node.args[9][1:])
    packed = getattr(lowered.graph_module, node.args[3].target)
    return packed.numel() * 8 // node.args[7] // node.args[8]


def check_operators(prepared: GraphModule, lowered: LoweredModule, *inputs: Tensor) -> None:
    """Assert that every integer operator does what its prepared twin does, on equal inputs."""
    records = qmir_ao.compare(prepared, lowered, *inputs)
    check_records(records, lowered)
    for record in records:
        assert record["sqnr_db"] > 0.0, record["name"]


def check_records(records: list[dict[str, Any]], lowered: LoweredModule) -> None:
    """Assert that the figures of every operator are those of equal arithmetic.

    Codes may flip at a rounding boundary where float operators are fused into their quantizer: the
    share counts over all codes of the network, of which a small one has fewer than 1 / share.
    """
    assert len(records) == len(lowered.report.operators)
    by_name = {r.name: r for r in lowered.report.operators}
    for record in records:
        name, kind = record["name"], record["kind"]
        assert record["codes"] > 0
        assert record["code_mismatches"] == record["boundary_mismatches"], name
        assert record["grid_error"] <= CHAIN_GRID_ERROR, name
        assert 0.0 <= record["clip_rate"] <= 1.0
        if kind == "selective_scan":
            assert record["acc_equal"] is None and record["max_error_roundings"] is None
            bound = scan_error_steps(by_name[name].act_bits, record["largest_state"])
            error = record["max_error_steps"]
        else:
            assert record["acc_equal"] is True, name
            error, bound = record["max_error_roundings"], operator_roundings(taps(lowered, name))
        assert error <= bound, (name, error, bound)
    flips, codes = (sum(r[key] for r in records) for key in ("code_mismatches", "codes"))
    assert flips <= math.ceil(CODE_MISMATCH * codes), (flips, codes)
