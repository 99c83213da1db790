"""FuseNormChain: what it takes, codes by the rule of rounding boundaries, what it leaves alone."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.chains import CHAINS, QUANTIZERS, Mixer, before, count, prepared, run
from support.lowering import check_operators
from support.models import CAPTURES
from support.tolerances import BOUNDARY_STEPS, CODE_MISMATCH
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import qmir_ao
from qmir_ao.errors import NonFiniteError
from qmir_ao.ops.chain_quantize import ChainArgs
from qmir_ao.passes.fuse_norm_chain import FuseNormChain

aten, qmir = torch.ops.aten, torch.ops.qmir
FUSED = qmir.chain_quantize.default
NORMS = (aten.layer_norm.default, F.layer_norm)
POINTWISE = (aten.silu.default, F.silu, aten.gelu.default, F.gelu, operator.mul, aten.mul.Tensor)
SIZES = [(1, 3, 9, 11), (3, 3, 8, 5), (1, 3, 33, 40)]


def lowered(capture: str, bits: int = 4, model: type[nn.Module] = Mixer) -> GraphModule:
    return before("FuseNormChain", prepared(capture, bits, model))


def chains(graph: GraphModule) -> list[ChainArgs]:
    every = [ChainArgs(*n.args) for n in graph.graph.nodes if n.target is FUSED]
    return [a for a in every if a.norm_eps or a.gate is not None or a.activation != "none"]


def code_differences(plain: GraphModule, fused: GraphModule, x: Tensor) -> tuple[int, int, int]:
    """Codes, those that differ on equal operands, and those of them at a rounding boundary."""
    recorder = Interpreter(plain, garbage_collect_values=False)
    with torch.no_grad():
        recorder.run(x)
        values = {n.name: v for n, v in recorder.env.items()}
        seen = different = near = 0
        for node in fused.graph.nodes:
            if node.target is not FUSED:
                continue

            def value(n: Node) -> Any:
                if n.name in values and n.op != "get_attr":
                    return values[n.name]
                if n.op == "get_attr":
                    return fused.get_buffer(n.target) if "." not in n.target else _read(fused, n)
                return n.target(*torch.fx.node.map_arg(n.args, value))

            codes = FUSED(*torch.fx.node.map_arg(node.args, value))[0]
            twin = next(n for n in plain.graph.nodes if n.name == node.name)
            args = ChainArgs(*torch.fx.node.map_arg(twin.args, lambda n: values[n.name]))
            wanted, step, shift = values[twin.name]
            y = args.x + args.offset
            rows = y.reshape(step.numel(), -1).double()
            t = ((rows + shift[:, None]) / step[:, None]).reshape(y.shape)
            close = ((t - t.floor()) - 0.5).abs() < BOUNDARY_STEPS
            seen += codes.numel()
            different += int((codes != wanted).sum())
            near += int(((codes != wanted) & close).sum())
    return seen, different, near


def _read(graph: GraphModule, node: Node) -> Tensor:
    return operator.attrgetter(node.target)(graph)


@pytest.mark.parametrize("capture", CAPTURES)
def test_chains_move_into_their_quantizers(capture: str) -> None:
    plain, fused = lowered(capture), lowered(capture)
    assert count(plain, *NORMS) == 3
    assert count(plain, *POINTWISE) == 4
    assert FuseNormChain()(fused).modified
    assert count(fused, *NORMS) == count(fused, *POINTWISE) == 0
    assert count(fused, FUSED) == QUANTIZERS
    found = chains(fused)
    assert len(found) == CHAINS
    assert sorted(a.activation for a in found) == ["gelu", "none", "none", "none", "silu"]
    assert [a.gate_activation for a in found if a.gate is not None] == ["silu"]
    assert sorted(a.dim for a in found if a.norm_eps) == [-3, -1, -1]
    assert FuseNormChain().rewrite(fused) == 0


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("capture", CAPTURES)
def test_codes_stay_but_at_boundaries(capture: str, size: tuple[int, ...]) -> None:
    plain, fused = lowered(capture), lowered(capture)
    FuseNormChain()(fused)
    seen, different, near = code_differences(plain, fused, torch.rand(size))
    assert seen > 0
    assert different == near
    assert different <= CODE_MISMATCH * seen


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_lowered_network_does_what_the_prepared_one_does(bits: int, capture: str) -> None:
    graph = prepared(capture, bits)
    check_operators(graph, qmir_ao.convert_and_lower(graph), torch.rand(SIZES[1]))


@pytest.mark.parametrize("part", ["norm_weight", "norm_bias", "norm_eps", "gate", "activation"])
def test_a_changed_operand_is_noticed(part: str) -> None:
    plain, fused = lowered("export"), lowered("export")
    FuseNormChain()(fused)
    for node in fused.graph.nodes:
        args = ChainArgs(*node.args) if node.target is FUSED else None
        if args is None or getattr(args, part) in (None, "none"):
            continue
        index = ChainArgs._fields.index(part)
        changed = {
            "norm_weight": args.norm_bias,
            "norm_bias": args.offset,
            "norm_eps": 0.1,
            "gate": args.x,
            "activation": "sigmoid",
        }
        node.update_arg(index, changed[part])
        break
    seen, different, _ = code_differences(plain, fused, torch.rand(SIZES[0]))
    assert different > 100 * CODE_MISMATCH * seen


class Reused(Mixer):
    """The result of the norm is also added later: its float value is needed."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).permute(0, 2, 3, 1)
        y = self.ln_1(x)
        z = F.silu(self.in_proj(y).chunk(2, dim=-1)[0])
        return self.last((self.out_proj(z) + y + z).permute(0, 3, 1, 2))


class OtherAxis(Mixer):
    """The norm runs over the columns, the channel shift over the channels."""

    any_size = False

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.LayerNorm(11)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wide(self.columns(self.first(x))))


class TwoAxes(OtherAxis):
    """A norm over columns and channels at once."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.LayerNorm((9, 11))


class GateBehindPermute(Mixer):
    """The gate is applied before the permute: its rank is not known there."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).permute(0, 2, 3, 1)
        y = (y * torch.sigmoid(y.mean(1, keepdim=True))).permute(0, 3, 1, 2)
        return self.last(self.wide(y))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("model", [Reused, OtherAxis, TwoAxes, GateBehindPermute])
def test_what_must_stay_stays(model: type[nn.Module], capture: str) -> None:
    graph = lowered(capture, 4, model)
    x = torch.rand(2, 3, 9, 11)
    want = run(graph, x)
    before_counts = count(graph, *NORMS), count(graph, *POINTWISE)
    assert FuseNormChain().rewrite(graph) == 0
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert (count(graph, *NORMS), count(graph, *POINTWISE)) == before_counts != (0, 0)
    assert torch.equal(run(graph, x), want)


class Plain(Mixer):
    """A norm without weights, a constant factor, and reads of a shape on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(10, elementwise_affine=False)
        self.scale = nn.Parameter(torch.rand(10) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(self.first(x).permute(0, 2, 3, 1)) * self.scale
        y = F.silu(self.out_proj(y).permute(0, 3, 1, 2))
        b, c, h, w = y.shape
        return self.last(self.wide(y).reshape(b, c, h, w))


@pytest.mark.parametrize("capture", CAPTURES)
def test_constants_and_reads_of_shapes_are_no_obstacle(capture: str) -> None:
    graph = prepared(capture, 4, Plain)
    fused = qmir_ao.convert_and_lower(graph)
    found = chains(fused.graph_module)
    assert len(found) == 2
    assert {a.activation for a in found} == {"none", "silu"}
    assert next(a for a in found if a.norm_eps).norm_weight is None
    check_operators(graph, fused, torch.rand(SIZES[1]))


@pytest.mark.parametrize("capture", CAPTURES)
def test_wider_codes_are_left_alone(capture: str) -> None:
    graph = lowered(capture, 8)
    assert FuseNormChain().rewrite(graph) == 0
    assert count(graph, *NORMS) == 3


def test_a_graph_that_writes_in_place_is_left_alone() -> None:
    graph = lowered("trace")
    node = next(n for n in graph.graph.nodes if n.target in NORMS)
    with graph.graph.inserting_after(node):
        written = graph.graph.call_method("add_", (node.all_input_nodes[0], 1.0))
    assert written
    assert FuseNormChain().rewrite(graph) == 0


def test_a_training_graph_is_left_alone() -> None:
    for capture in CAPTURES:
        assert FuseNormChain().rewrite(prepared(capture)) == 0


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_bad_input_raises_the_same_error(capture: str) -> None:
    plain, fused = lowered(capture), lowered(capture)
    FuseNormChain()(fused)
    x = torch.rand(3, 3, 9, 11)
    x[1, 1, 2, 3] = float("inf")
    messages = []
    for graph in (plain, fused):
        with pytest.raises(NonFiniteError) as error:
            run(graph, x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("capture", CAPTURES)
def test_saved_and_loaded_it_is_the_same_network(capture: str, tmp_path: Any) -> None:
    graph = prepared(capture)
    fused = qmir_ao.convert_and_lower(graph)
    qmir_ao.save(fused, tmp_path / "model")
    loaded = qmir_ao.load(tmp_path / "model")
    x = torch.rand(SIZES[1])
    assert torch.equal(loaded(x), fused(x))
    assert loaded.report == fused.report
    assert qmir_ao.compare(graph, loaded, x) == qmir_ao.compare(graph, fused, x)
