"""Random graphs of up to four supported operators: prepared against lowered by one rule."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from support.lowering import check_records, psnr
from support.random_graphs import Case, cases
from support.tolerances import GRAPH_PSNR
from torch import Tensor
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.errors import UnsupportedGraph

CASES, EXPORTED = 485, 15
PADDING = 11
"""Position of the padding among the arguments of `qmir::conv2d`."""
Damage = Callable[[GraphModule], bool]
"""Breaks a lowered graph; False where there is nothing to break."""
qmir = torch.ops.qmir


def image(case: Case, batch: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    return torch.randn(batch, *case.shape[1:], generator=generator) * scale


def make(case: Case, export: bool) -> tuple[GraphModule, LoweredModule] | None:
    """The prepared network, initialised on one batch, and its lowered form."""
    x = image(case, case.shape[0], 1.0)
    try:
        prepared = qmir_ao.prepare_qat(case.model, case.qconfig(), (x,) if export else None)
    except UnsupportedGraph:
        return None
    with torch.no_grad():
        prepared.train()(x)
    return prepared.eval(), qmir_ao.convert_and_lower(prepared)


def check(case: Case, export: bool, damage: Damage | None = None) -> None:
    made = make(case, export)
    hypothesis.assume(made is not None)
    assert made is not None
    prepared, lowered = made
    if damage is not None:
        hypothesis.assume(damage(lowered.graph_module))
        lowered.graph_module.recompile()
    x = image(case, case.shape[0], 1.5)
    check_records(qmir_ao.compare(prepared, lowered, x), lowered)
    with torch.no_grad():
        want = prepared(x)
    got = lowered(x)
    assert got.shape == want.shape
    peak = float(want.max() - want.min()) or 1.0
    assert psnr(got / peak, want / peak) >= GRAPH_PSNR


@hypothesis.settings(max_examples=CASES)
@hypothesis.given(cases())
def test_traced_graphs(case: Case) -> None:
    check(case, export=False)


@hypothesis.settings(max_examples=EXPORTED)
@hypothesis.given(cases())
def test_exported_graphs(case: Case) -> None:
    check(case, export=True)


def pad_with_the_code_zero(graph_module: GraphModule) -> bool:
    """Zero padding of codes instead of values: right only where the shift is zero."""
    nodes = [n for n in graph_module.graph.nodes if n.target is qmir.conv2d.default]
    nodes = [n for n in nodes if any(n.args[PADDING])]
    for node in nodes:
        (top, left), codes = node.args[PADDING], node.args[0]
        with graph_module.graph.inserting_before(node):
            padded = graph_module.graph.call_function(
                torch.ops.aten.constant_pad_nd.default, (codes, [left, left, top, top], 0)
            )
        node.update_arg(0, padded)
        node.update_arg(PADDING, [0, 0])
    return bool(nodes)


def swap(target: Any, one: int, other: int) -> Damage:
    """Exchange two operands of every call of an operator."""

    def damage(graph_module: GraphModule) -> bool:
        nodes = [n for n in graph_module.graph.nodes if n.target is target]
        for node in nodes:
            first, second = node.args[one], node.args[other]
            node.update_arg(one, second)
            node.update_arg(other, first)
        return bool(nodes)

    return damage


def drop_flips(graph_module: GraphModule) -> bool:
    """Connect what reads a flipped tensor to the tensor itself."""
    nodes = [n for n in graph_module.graph.nodes if n.target == "flip"]
    for node in nodes:
        node.replace_all_uses_with(node.args[0])
    return bool(nodes)


DAMAGES: dict[str, Damage] = {
    "zero padding": pad_with_the_code_zero,
    "shift of the activations": swap(qmir.conv2d.default, 1, 2),
    "shift of a linear layer": swap(qmir.linear.default, 1, 2),
    "shift of the weights": swap(qmir.linear.default, 4, 5),
    "operands of a scan": swap(qmir.selective_scan_q.default, 7, 10),
    "connection": drop_flips,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_planted_error_is_found(name: str) -> None:
    @hypothesis.settings(
        max_examples=100,
        phases=[hypothesis.Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def property_of_damaged_graphs(case: Case) -> None:
        check(case, False, DAMAGES[name])

    with pytest.raises((AssertionError, RuntimeError)):
        property_of_damaged_graphs()
