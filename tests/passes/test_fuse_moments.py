"""FuseMoments: which quantizers start from statistics of their producer, and with which values."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.chains import Mixer, before, count, prepared, run
from support.lowering import check_operators
from support.models import CAPTURES
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.registry import TARGETS, lower_graph
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.epilogues import MOMENTS, PLAIN, epilogue_of
from qmir_ao.passes.fuse_moments import FuseMoments
from qmir_ao.passes.pipeline import CUDA
from qmir_ao.quant.constants import attribute

qmir = torch.ops.qmir
CHAIN = qmir.chain_quantize.default
captures = pytest.mark.parametrize("capture", CAPTURES)
SIZES = [(1, 3, 9, 11), (3, 3, 8, 5), (1, 3, 33, 40)]
FUSED = 3
"""Quantizers of `Mixer` that read an operator: half of in_proj, silu and gelu of two others."""


def lowered(capture: str, bits: int = 4, model: type[Mixer] = Mixer) -> GraphModule:
    return before("FuseMoments", prepared(capture, bits, model))


def with_moments(graph: GraphModule) -> LoweredModule:
    """Lowered for the CPU by the passes of CUDA."""
    return lower_graph(graph, dataclasses.replace(TARGETS["cpu"], passes=CUDA))


def chains(graph: GraphModule) -> dict[Node, ChainArgs]:
    return {n: ChainArgs(*n.args) for n in graph.graph.nodes if n.target is CHAIN}


def given(graph: GraphModule) -> dict[Node, ChainArgs]:
    return {n: a for n, a in chains(graph).items() if a.moments is not None}


def steps(graph: GraphModule, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """Codes, step and shift of every quantizer by name."""
    recorder = Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        recorder.run(x)
    return {n.name: recorder.env[n] for n in chains(graph)}


@captures
def test_quantizers_start_from_moments(capture: str) -> None:
    plain = lowered(capture)
    fused = copy.deepcopy(plain)
    names = [n.name for n in plain.graph.nodes if n.target in MOMENTS]
    activations = [a.activation for a in chains(plain).values() if a.statistics == "sample"]
    assert sorted(set(activations)) == ["gelu", "none", "silu"]
    assert FuseMoments()(fused).modified
    found = given(fused)
    assert len(found) == count(fused, *PLAIN) == FUSED
    assert all(a.is_plain for a in found.values())
    ends = [epilogue_of(n).activation for n in fused.graph.nodes if n.target in PLAIN]
    assert sorted(ends) == ["gelu", "none", "silu"]
    assert names == [n.name for n in fused.graph.nodes if n.target in (*MOMENTS, *PLAIN)]
    assert FuseMoments().rewrite(fused) == 0


@captures
def test_a_piece_of_the_channels_is_named(capture: str) -> None:
    fused = lowered(capture)
    FuseMoments()(fused)
    pieces = [a for a in given(fused).values() if a.moments_channels is not None]
    assert len(pieces) == 1
    channels = attribute(fused, pieces[0].moments_channels.target)
    assert torch.equal(channels, torch.arange(10))


@pytest.mark.parametrize("size", SIZES, ids=str)
@captures
def test_codes_stay_the_same(capture: str, size: tuple[int, ...]) -> None:
    plain = lowered(capture)
    fused = copy.deepcopy(plain)
    FuseMoments()(fused)
    fused.recompile()
    x = torch.rand(size)
    want, got = steps(plain, x), steps(fused, x)
    assert want.keys() == got.keys()
    for name, (codes, step, shift) in want.items():
        torch.testing.assert_close(got[name][1], step, rtol=2.0**-22, atol=0)
        torch.testing.assert_close(got[name][2], shift, rtol=2.0**-22, atol=2.0**-40)
        assert torch.equal(got[name][0], codes)
    assert torch.equal(run(plain, x), run(fused, x))


@captures
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_lowered_network_does_what_the_prepared_one_does(bits: int, capture: str) -> None:
    graph = prepared(capture, bits)
    fused = with_moments(graph)
    assert given(fused.graph_module)
    check_operators(graph, fused, torch.rand(SIZES[1]))


@captures
def test_reports_and_comparisons_stay(capture: str) -> None:
    graph = prepared(capture)
    fused = with_moments(graph)
    plain = lowered(capture)
    sources = [n.name for n in plain.graph.nodes if n.target in MOMENTS]
    assert [r.name for r in fused.report.operators if r.kind != "selective_scan"] == sources
    floats = sorted((r.op, r.module) for r in fused.report.left_in_float)
    assert ("silu", "") in floats or any(op == "silu" for op, _ in floats)
    assert sum(op in ("silu", "gelu") for op, _ in floats) == 3
    rows = qmir_ao.compare(Mixer(), fused, [torch.rand(SIZES[0])])
    assert len(rows) == len(fused.report.operators)


@pytest.mark.parametrize("part", ["moments", "moments_channels", "offset"])
def test_a_changed_operand_is_noticed(part: str) -> None:
    """The mutations: statistics of another operator, of other channels, of unshifted values."""
    fused = lowered("export")
    FuseMoments()(fused)
    x = torch.rand(SIZES[0])
    want = steps(fused, x)
    found = given(fused)
    node = next(n for n, a in found.items() if a.moments_channels is not None)
    if part == "moments":
        # Of an operator with as many channels, whose values are others.
        other, node = (n for n, a in found.items() if a.moments_channels is None)
        node.update_arg(ChainArgs._fields.index(part), found[other].moments)
    elif part == "moments_channels":
        node.update_arg(ChainArgs._fields.index(part), None)
    else:
        producer = next(n for n in fused.graph.nodes if n.target in PLAIN and n.args[-1])
        producer.update_arg(len(producer.args) - 1, None)
    got = steps(fused, x)
    assert any(not torch.equal(got[name][1], step) for name, (_, step, _) in want.items())


class Kept(Mixer):
    """Results that something else reads before they are activated, or that are reordered."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.local(x)
        y = self.wide(F.gelu(y)) + y
        z = self.depthwise(x)[:, :, 1:]
        return self.last(y) + self.last(self.point(F.silu(z)).flip(2)).mean()


@captures
def test_activations_stay_where_something_else_reads_the_result(capture: str) -> None:
    plain = lowered(capture, model=Kept)
    fused = copy.deepcopy(plain)
    FuseMoments()(fused)
    fused.recompile()
    assert all(epilogue_of(n).activation == "none" for n in fused.graph.nodes if n.target in PLAIN)
    kept = [a.activation for a in chains(fused).values() if a.activation != "none"]
    assert sorted(kept) == sorted(a.activation for a in chains(plain).values() if not a.is_plain)
    x = torch.rand(SIZES[0])
    assert torch.equal(run(plain, x), run(fused, x))


class Twice(Mixer):
    """One result, two quantizers that shift its channels otherwise: only one can be served."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(self.first(x))
        return self.last(self.point(y) + self.wide(y))


@captures
def test_two_quantizers_of_one_result(capture: str) -> None:
    plain = lowered(capture, model=Twice)
    fused = copy.deepcopy(plain)
    FuseMoments()(fused)
    fused.recompile()
    served = given(fused)
    offsets = {str(a.offset) for a in served.values()}
    assert len(served) >= 1
    assert len(offsets) == len(served) or len(served) == 1
    x = torch.rand(SIZES[1])
    assert torch.equal(run(plain, x), run(fused, x))


class Scanned(Mixer):
    """An image scan whose result a convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(10, 4 * 10 + 2 * 4 * 3, 1)
        self.register_buffer("decay", -torch.rand(40, 3) - 0.1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.first(x)
        delta, B, C = self.project(u).split([40, 12, 12], 1)
        sides = u.shape[0], 4, 3, u.shape[2], u.shape[3]
        y = qmir.ss2d_scan(
            u, delta, self.decay, B.reshape(sides), C.reshape(sides), None, None, True
        )
        return self.last(self.local(y))


@captures
def test_a_scan_of_an_image_gives_moments(capture: str) -> None:
    graph = prepared(capture, model=Scanned)
    plain = before("FuseMoments", graph)
    fused = copy.deepcopy(plain)
    FuseMoments()(fused)
    fused.recompile()
    assert count(fused, qmir.ss2d_scan_q_moments.default) == 1
    assert len(given(fused)) == 4
    x = torch.rand(SIZES[1])
    assert torch.equal(run(plain, x), run(fused, x))
    check_operators(graph, with_moments(graph), x)
