"""Targets by name, and the lowering that each of them does."""

import copy
from collections.abc import Callable

from torch.fx import GraphModule

from qmir_ao.backend.lowered import LoweredModule, only_referenced, plain_signature
from qmir_ao.backend.report import make_report
from qmir_ao.errors import ConfigError, UnsupportedGraph
from qmir_ao.passes.base import remove_unread
from qmir_ao.passes.pipeline import CPU, check_order, run_passes
from qmir_ao.passes.record import RECORDS


def lower_cpu(prepared: GraphModule) -> LoweredModule:
    """Lower a prepared graph to the integer operators of the CPU; `prepared` stays as it was."""
    import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)

    graph_module = copy.deepcopy(prepared)
    graph_module.eval()
    check_order(CPU)
    records = [*prepared.meta.get(RECORDS, ()), *run_passes(graph_module, CPU)]
    remove_unread(graph_module)
    plain_signature(graph_module.graph)
    lowered = only_referenced(graph_module)
    report = make_report(lowered)
    if not report.operators:
        raise UnsupportedGraph(
            "no operator of this graph runs on integer codes; "
            f"left in float: {[r.name for r in report.left_in_float][:5]}. "
            "Pass a model from qmir_ao.prepare_qat"
        )
    return LoweredModule(lowered, report, "cpu", records)


TARGETS: dict[str, Callable[[GraphModule], LoweredModule]] = {"cpu": lower_cpu}


def get_target(name: str) -> Callable[[GraphModule], LoweredModule]:
    """The lowering function of a target.

    Raises:
        ConfigError: unknown target, with the known ones.
    """
    if name not in TARGETS:
        raise ConfigError(
            f"target={name!r} is not available; this release lowers to: {', '.join(TARGETS)}"
        )
    return TARGETS[name]
