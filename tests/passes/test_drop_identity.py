"""Operators that return what they get go; what only looks like one stays."""

from collections.abc import Callable

import pytest
import torch
from support.graphs import AUTO, calls, run
from torch import Tensor, nn
from torch.fx import GraphModule

from qmir_ao.passes.base import remove_unread
from qmir_ao.passes.drop_identity import DropIdentity, identities

qmir = torch.ops.qmir
Form = Callable[[Tensor], Tensor]


def exported(form: Form) -> GraphModule:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return form(x)

    open_dims = {0: AUTO, 2: AUTO, 3: AUTO}
    program = torch.export.export(Net(), (torch.rand(2, 4, 6, 8),), dynamic_shapes=(open_dims,))
    return program.module()


def graph_of(form: Form, capture: str) -> GraphModule:
    return exported(form) if capture == "export" else torch.fx.symbolic_trace(form)


BOTH = ("trace", "export")
# Name: form, captures that know enough, how many operators are left.
DROPPED: dict[str, tuple[Form, tuple[str, ...], int]] = {
    "permute back": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2) + 1, BOTH, 1),
    "permutes merge": (lambda x: x.permute(0, 2, 3, 1).permute(0, 2, 1, 3) + 1, BOTH, 2),
    "permute of nothing": (lambda x: x.permute(0, 1, 2, 3) + 1, BOTH, 1),
    "transpose back": (lambda x: x.transpose(1, 2).transpose(2, 1) + 1, BOTH, 1),
    "three permutes": (
        lambda x: x.permute(1, 2, 3, 0).permute(1, 2, 3, 0).permute(2, 3, 0, 1) + 1,
        BOTH,
        1,
    ),
    "flip back": (lambda x: x.flip(-1).flip(-1) + 1, BOTH, 1),
    "flip two back": (lambda x: x.flip(2, 3).flip(3, 2) + 1, BOTH, 1),
    "squeeze back": (lambda x: x.unsqueeze(2).squeeze(2) + 1, BOTH, 1),
    "whole slice": (lambda x: x[:, :] + 1, BOTH, 1),
    "whole ellipsis": (lambda x: x[...] + 1, BOTH, 1),
    "alias": (lambda x: torch.detach(x) + 1, BOTH, 1),
    "split together": (
        lambda x: torch.cat(torch.split(x, [1, 3], dim=1), dim=1) + 1,
        ("export",),
        1,
    ),
    "one piece": (lambda x: torch.cat([x], dim=1) + 1, BOTH, 1),
    "reshape back": (lambda x: x.reshape(-1, x.shape[3]).reshape(x.shape) + 1, ("export",), 1),
    "flatten back": (
        lambda x: x.flatten(2).unflatten(-1, (x.shape[2], x.shape[3])) + 1,
        ("export",),
        1,
    ),
    "same type": (lambda x: x.float() + 1, ("export",), 1),
    "expand to itself": (lambda x: x.expand(-1, -1, -1, -1) + 1, ("export",), 1),
    "unread": (lambda x: (x.exp(), x + 1)[1], BOTH, 1),
}
STAYS: dict[str, Form] = {
    "another permutation": lambda x: x.permute(0, 2, 3, 1) + 1,
    "flips of two axes": lambda x: x.flip(-1).flip(-2) + 1,
    "transposes of two axes": lambda x: x.transpose(1, 2).transpose(1, 3) + 1,
    "part of a slice": lambda x: torch.ops.aten.slice.Tensor(x, 2, 1) + 1,
    "part of a width": lambda x: torch.ops.aten.slice.Tensor(x, 3, 0, x.shape[2]) + 1,
    "every second": lambda x: torch.ops.aten.slice.Tensor(x, 3, 0, None, 2) + 1,
    "index that adds an axis": lambda x: x[None] + 1,
    "another type": lambda x: x.double() + 1,
    "another shape": lambda x: x.reshape(x.shape[0], x.shape[1], x.shape[3], x.shape[2]) + 1,
    "pieces in another order": lambda x: torch.cat(torch.split(x, [1, 3], dim=1)[::-1], dim=1) + 1,
    "pieces along another axis": lambda x: torch.cat(torch.split(x, [2, 2], dim=1), dim=2) + 1,
    "a piece is missing": lambda x: torch.cat(torch.split(x, [1, 2, 1], dim=1)[:2], dim=1) + 1,
    "squeeze of another axis": lambda x: x[:1].unsqueeze(2).squeeze(0) + 1,
    "a copy that is written to": lambda x: x.detach().clone().add_(1),
}


def operators(graph: GraphModule) -> int:
    """Calls, without those that only read a size."""
    sizes = ("sym_size", "getattr", "mul", "floordiv", "_assert_tensor_metadata")
    called = [n for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
    return len(called) - calls(graph, *sizes)


@pytest.mark.parametrize("capture", BOTH)
@pytest.mark.parametrize("name", DROPPED)
def test_identities_go(name: str, capture: str) -> None:
    form, known, left = DROPPED[name]
    graph = graph_of(form, capture)
    x = torch.rand(3, 4, 5, 7)
    want = form(x)
    before = operators(graph)
    changed = DropIdentity()(graph).modified
    assert torch.equal(run(graph, x), want)
    assert DropIdentity().rewrite(graph) == 0
    assert not identities(graph)
    if capture in known:
        assert changed
        assert operators(graph) == left < before or name == "unread"
    # A trace knows no sizes: what cannot be decided stays.


@pytest.mark.parametrize("capture", BOTH)
@pytest.mark.parametrize("name", STAYS)
def test_what_only_looks_like_one_stays(name: str, capture: str) -> None:
    form = STAYS[name]
    graph = graph_of(form, capture)
    remove_unread(graph)
    x = torch.rand(3, 4, 5, 7)
    want, before = form(x), operators(graph)
    DropIdentity()(graph)
    assert operators(graph) == before
    assert torch.equal(run(graph, x), want)


def test_an_operator_that_writes_is_no_dead_code() -> None:
    def form(x: Tensor) -> Tensor:
        y = x * 2
        y.clamp_(0, 1)
        return y

    graph = torch.fx.symbolic_trace(form)
    x = torch.rand(2, 3) * 2
    DropIdentity()(graph)
    assert torch.equal(run(graph, x), form(x))


def quantized_twice(low: int, high: int, same: bool) -> GraphModule:
    def form(x: Tensor, step: Tensor, shift: Tensor, other: Tensor) -> Tensor:
        codes = qmir.dls_quantize.default(x, step, shift, -4, 3)
        values = qmir.dls_dequantize.default(codes, step, shift)
        again = qmir.dls_quantize.default(values, step if same else other, shift, low, high)
        return qmir.dls_dequantize.default(again, step, shift)

    return torch.fx.symbolic_trace(form)


GRID = torch.rand(3, 5, 7) * 4 - 2, torch.rand(3) + 0.1, torch.randn(3), torch.rand(3) + 0.1


@pytest.mark.parametrize(("low", "high"), [(-4, 3), (-8, 7)])
def test_codes_of_codes_are_the_codes(low: int, high: int) -> None:
    graph = quantized_twice(low, high, same=True)
    want = run(graph, *GRID)
    assert DropIdentity().rewrite(graph) == 2  # the second quantizer, and values nobody reads
    graph.recompile()
    assert calls(graph, "dls_quantize") == calls(graph, "dls_dequantize") == 1
    assert torch.equal(run(graph, *GRID), want)


@pytest.mark.parametrize("case", [(-2, 1, True), (-4, 2, True), (-4, 3, False)])
def test_codes_of_another_grid_stay(case: tuple[int, int, bool]) -> None:
    graph = quantized_twice(*case)
    assert DropIdentity().rewrite(graph) == 0
    assert calls(graph, "dls_quantize") == 2


def test_a_shift_that_float32_still_resolves() -> None:
    """The bound that the pass states: |shift| up to 2^21 steps gives the same codes back."""
    step, codes = torch.tensor([0.37]), torch.arange(-8, 8, dtype=torch.int8).reshape(1, -1)
    for steps in (2.0**21, -(2.0**21), 12345.678):
        shift = step * steps
        values = qmir.dls_dequantize.default(codes, step, shift)
        assert torch.equal(qmir.dls_quantize.default(values, step, shift, -8, 7), codes)


def test_a_wrong_rule_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from qmir_ao.passes import drop_identity

    monkeypatch.setattr(drop_identity, "_dims", lambda _: {0})
    graph = torch.fx.symbolic_trace(STAYS["flips of two axes"])
    x = torch.rand(3, 4, 5, 7)
    DropIdentity()(graph)
    assert not torch.equal(run(graph, x), STAYS["flips of two axes"](x))
