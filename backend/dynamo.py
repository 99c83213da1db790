"""The `torch.compile` backend named "qmir"."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from qmir_ao.backend.report import make_report
from qmir_ao.errors import ConfigError
from qmir_ao.passes.pipeline import COMPILE, run_passes
from qmir_ao.passes.record import RECORDS

log = logging.getLogger(__name__)


def _trains(graph_module: GraphModule, example_inputs: Sequence[Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    return any(x.requires_grad for x in (*tensors, *graph_module.parameters()))


def _lower(graph_module: GraphModule) -> None:
    records = run_passes(graph_module, COMPILE)
    graph_module.meta[RECORDS] = records
    for record in records:
        log.info("qmir: pass %s", record)
    report = make_report(graph_module)
    counts = Counter(record.op for record in report.left_in_float)
    log.info(
        "qmir: %d operators on integer codes, %d left in float (%s)",
        len(report.operators),
        len(report.left_in_float),
        ", ".join(f"{op} x{n}" for op, n in counts.most_common()),
    )


def qmir(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph: integer operators where it is quantized, Inductor for the rest.

    A prepared model in inference gets its fake-quantizers turned into codes and integer kernels;
    a lowered model has them already; a float model gets the fused scan kernels. A training graph
    keeps its fake-quantizers and goes through AOTAutograd, with the fused kernels of this package.

    Args:
        graph_module: what torch.compile captured.
        example_inputs: its inputs.
        mode: only None and "default".
        options: only None or empty.

    Raises:
        ConfigError: a mode or option this backend does not have.

    Source: registered as the `torch_dynamo_backends` entry point "qmir".
    """
    if mode not in (None, "default") or options:
        raise ConfigError(
            f"torch.compile(backend='qmir') has no mode={mode!r}, options={options!r}; "
            "leave both out"
        )
    from torch._inductor.compile_fx import compile_fx

    import qmir_ao.backend.kernels  # noqa: F401  (registers the kernels)

    if not _trains(graph_module, example_inputs):
        _lower(graph_module)
    compiled: Any = compile_fx(graph_module, list(example_inputs))
    run: Callable[..., Any] = compiled
    return run
