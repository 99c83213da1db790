"""The paper's placement: what is quantized by default, by what, and what stays in float."""

import re
from collections import Counter

import pytest
import torch
from support.models import tiny_pair
from torch.fx import Node

import qmir_ao
from qmir_ao.quant.patterns import module_path
from qmir_ao.recipes.models import create_model

aten, qmir = torch.ops.aten, torch.ops.qmir
FLOAT = re.compile(r"^(conv_first|conv_after_body|upsample)|\.attention\.")
"""First, last and upsampling convolutions, and channel attention."""
SCAN = ("u", "delta", "A", "B", "C", "D", "delta_bias")
NAME = "mambair-tiny-x2"


@pytest.fixture(scope="module")
def prepared() -> torch.fx.GraphModule:
    return qmir_ao.prepare_qat(create_model(NAME), qmir_ao.qmir_qconfig, torch.rand(1, 3, 8, 8))


def quantizer(prepared: torch.fx.GraphModule, node: object) -> torch.nn.Module | None:
    """The fake-quantizer that makes a value, or None."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = prepared.get_submodule(str(node.target))
    kinds = (qmir_ao.DLSFakeQuantize, qmir_ao.RFAFakeQuantize)
    return module if isinstance(module, kinds) else None


def test_dls_on_every_operand_of_every_scan(prepared: torch.fx.GraphModule) -> None:
    scans = [n for n in prepared.graph.nodes if n.target == qmir.ss2d_scan.default]
    assert len(scans) == 4
    for scan in scans:
        found = dict(zip(SCAN, scan.args[:7], strict=True))
        quantizers = {name: quantizer(prepared, value) for name, value in found.items()}
        assert all(isinstance(q, qmir_ao.DLSFakeQuantize) for q in quantizers.values())
        assert {name for name, q in quantizers.items() if q.constant} == {"A", "D", "delta_bias"}


def test_dls_and_rfa_on_every_layer_of_the_body(prepared: torch.fx.GraphModule) -> None:
    layers = [
        n for n in prepared.graph.nodes if n.target in (aten.linear.default, aten.conv2d.default)
    ]
    body = [n for n in layers if not FLOAT.search(module_path(n))]
    assert (len(body), len(layers)) == (38, 49)
    for node in layers:
        x, weight = (quantizer(prepared, value) for value in node.args[:2])
        if node in body:
            assert isinstance(x, qmir_ao.DLSFakeQuantize), module_path(node)
            assert isinstance(weight, qmir_ao.RFAFakeQuantize), module_path(node)
        else:
            assert x is None and weight is None, module_path(node)


def test_nothing_else_is_quantized(prepared: torch.fx.GraphModule) -> None:
    readers = Counter(
        str(user.target)
        for node in prepared.graph.nodes
        if quantizer(prepared, node) is not None
        for user in node.users
    )
    assert set(readers) == {"aten.linear.default", "aten.conv2d.default", "qmir.ss2d_scan.default"}


@pytest.mark.parametrize("bits", [4, 2])
def test_both_captures_place_alike(bits: int) -> None:
    exported, traced = (tiny_pair(capture, bits)[1].report for capture in ("export", "trace"))

    def layers(report: object) -> list[tuple[object, ...]]:
        return sorted((r.kind, r.module, r.weight_bits, r.act_bits) for r in report.operators)

    assert layers(exported) == layers(traced)
