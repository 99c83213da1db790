"""Targets by name: the passes that lower to each of them, and the device that it runs on."""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch.fx import GraphModule

from qmir_ao.backend.lowered import LoweredModule, move, only_referenced, plain_signature
from qmir_ao.backend.report import make_report
from qmir_ao.errors import ConfigError, UnsupportedGraph
from qmir_ao.passes.base import Pass, remove_unread
from qmir_ao.passes.pipeline import CPU, CUDA, check_order, run_passes
from qmir_ao.passes.record import RECORDS


def _host() -> torch.device:
    return torch.device("cpu")


def _gpu() -> torch.device:
    from qmir_ao.backend.cuda.device import ready_device

    return ready_device()


@dataclasses.dataclass(frozen=True)
class Target:
    """What a name like "cpu" stands for.

    Attributes:
        name: as users give it.
        passes: the list that lowers to it.
        device: finds the device, and raises `DeviceError` where it cannot run the kernels.
    """

    name: str
    passes: tuple[Pass, ...]
    device: Callable[[], torch.device]


TARGETS = {t.name: t for t in (Target("cpu", CPU, _host), Target("cuda", CUDA, _gpu))}


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ConfigError: unknown target, with the known ones.
    """
    if name not in TARGETS:
        raise ConfigError(
            f"target={name!r} is not available; this release lowers to: {', '.join(TARGETS)}"
        )
    return TARGETS[name]


def lower_graph(prepared: GraphModule, target: Target) -> LoweredModule:
    """Lower a copy of a prepared graph on the CPU, whatever device it runs on later.

    Weights are folded there once, so that every target gets the same bytes.

    Raises:
        UnsupportedGraph: nothing in the graph runs on integer codes.
    """
    import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)

    graph_module = move(copy.deepcopy(prepared), _host())
    graph_module.eval()
    check_order(target.passes)
    records = [*prepared.meta.get(RECORDS, ()), *run_passes(graph_module, target.passes)]
    remove_unread(graph_module)
    plain_signature(graph_module.graph)
    lowered = only_referenced(graph_module)
    report = make_report(lowered)
    if not report.operators:
        examples = {record.reason: record.name for record in reversed(report.left_in_float)}
        told = "; ".join(f"{name}, because {why}" for why, name in examples.items())
        raise UnsupportedGraph(
            f"no operator of this graph runs on integer codes; left in float: {told or 'nothing'}. "
            "Pass a model from qmir_ao.prepare_qat with quantizers on the integer grid"
        )
    return LoweredModule(lowered, report, target.name, records)


def lower(prepared: GraphModule, name: str) -> LoweredModule:
    """Lower a prepared graph to a target; `prepared` stays as it was.

    Raises:
        ConfigError: unknown target.
        DeviceError: the target's device cannot run its kernels; found out before the work.
        UnsupportedGraph: nothing in the graph runs on integer codes.
    """
    target = get_target(name)
    device = target.device()
    lowered = lower_graph(prepared, target)
    move(lowered.graph_module, device)
    return lowered
