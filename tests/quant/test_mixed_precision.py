"""Bits per name, glob, class and operator: the same assignment in both captures, or one error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import CAPTURES, ScanNet, example
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.nn import functional as F

import qmir_ao
from qmir_ao.errors import ConfigError

captures = pytest.mark.parametrize("capture", CAPTURES)
Widths = dict[str, tuple[int | None, int] | None]
"""Module and kind of an operator to its bits of weights and activations; None for float."""


class Block(nn.Module):
    """Two linear layers that read one tensor, and a convolution called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = self.left(y) + self.right(y)
        return x + F.conv1d(y.transpose(1, 2), self.weight).transpose(1, 2)


class Network(nn.Module):
    """A first and a last convolution, two blocks and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 6, 1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.plain = nn.Linear(6, 6)
        self.last = nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).transpose(1, 2)
        for block in self.blocks:
            y = block(y)
        return self.last(self.plain(y).transpose(1, 2))


def lowered_widths(model: nn.Module, qconfig: Any, capture: str, *size: int) -> Widths:
    """What became of each operator."""
    prepared = qmir_ao.prepare_qat(model, qconfig, example(capture, *size)).train()
    prepared(torch.rand(2, *size[1:]))
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    found: Widths = {f"{r.module}:{r.kind}": (r.weight_bits, r.act_bits) for r in report.operators}
    for record in report.left_in_float:
        if record.op.startswith(("linear", "conv", "selective_scan")):
            found[f"{record.module}:{record.op.replace('conv1d', 'conv2d')}"] = None
    return found


def widths_of(**given: tuple[int, int] | None) -> Widths:
    """The widths of all operators of `Network` from those of a few, with 4 for the others."""
    names = {
        "first": "first:conv2d",
        "left0": "blocks.0.left:linear",
        "right0": "blocks.0.right:linear",
        "conv0": "blocks.0:conv2d",
        "left1": "blocks.1.left:linear",
        "right1": "blocks.1.right:linear",
        "conv1": "blocks.1:conv2d",
        "plain": "plain:linear",
        "last": "last:conv2d",
    }
    default: dict[str, Any] = {"first": None, "last": None}
    return {full: given.get(name, default.get(name, (4, 4))) for name, full in names.items()}


CASES: dict[str, tuple[dict[str, Any], Widths]] = {
    "default": ({}, widths_of()),
    "exact name": ({"bits": {"plain": 2}}, widths_of(plain=(2, 2))),
    "name of a block": (
        {"bits": {"blocks.0": (2, 8), "blocks.0.right": (4, 3)}},
        widths_of(left0=(2, 8), right0=(4, 3), conv0=(2, 8)),
    ),
    "glob": ({"bits": {"*.left": 2}}, widths_of(left0=(2, 2), left1=(2, 2))),
    "glob of blocks": (
        {"bits": {"blocks.?": 2, "*.right": 8}},
        widths_of(
            left0=(2, 2), right0=(2, 2), conv0=(2, 2), left1=(2, 2), right1=(2, 2), conv1=(2, 2)
        ),
    ),
    "name before glob": (
        {"bits": {"*.left": 2, "blocks.1.left": 8}},
        widths_of(left0=(2, 2), left1=(8, 8)),
    ),
    "class of layers": (
        {"bits": {nn.Linear: (8, 3)}},
        widths_of(left0=(8, 3), right0=(8, 3), left1=(8, 3), right1=(8, 3), plain=(8, 3)),
    ),
    "class of blocks": (
        {"bits": {Block: 2, nn.Linear: 8}},
        widths_of(
            left0=(2, 2), right0=(2, 2), conv0=(2, 2), left1=(2, 2), right1=(2, 2), conv1=(2, 2),
            plain=(8, 8),
        ),
    ),
    "operator": ({"bits": {F.conv1d: (2, 8)}}, widths_of(conv0=(2, 8), conv1=(2, 8))),
    "operator of the export": (
        {"bits": {torch.ops.aten.linear.default: 8}},
        widths_of(left0=(8, 8), right0=(8, 8), left1=(8, 8), right1=(8, 8), plain=(8, 8)),
    ),
    "first convolution by its own name": ({"bits": {"first": 8}}, widths_of(first=(8, 8))),
    "everything by glob leaves what stays in float": (
        {"bits": {"*": 8}},
        {name: (8, 8) if found else None for name, found in widths_of().items()},
    ),
    "keep in float": (
        {"keep_float": ["blocks.0", "*.right", F.conv1d], "default": 8},
        widths_of(
            left0=None, right0=None, conv0=None, right1=None, conv1=None, left1=(8, 8),
            plain=(8, 8),
        ),
    ),
    "float by default": (
        {"default": None, "bits": {"plain": 4}},
        {name: (4, 4) if name == "plain:linear" else None for name in widths_of()},
    ),
}  # fmt: skip


@captures
@pytest.mark.parametrize("case", CASES)
def test_both_captures_honour_an_assignment(case: str, capture: str) -> None:
    arguments, wanted = CASES[case]
    model = Network()
    mapping = qmir_ao.get_qmir_qconfig_mapping(model, **arguments)
    assert lowered_widths(model, mapping, capture, 1, 3, 7) == wanted


@captures
def test_two_readers_of_a_tensor_have_their_own_quantizer(capture: str) -> None:
    model = Block()
    mapping = QConfigMapping().set_global(qmir_ao.get_qmir_qconfig(4, 4))
    mapping.set_module_name("left", qmir_ao.get_qmir_qconfig(4, 8))
    mapping.set_module_name("right", qmir_ao.get_qmir_qconfig(4, 3))
    found = lowered_widths(model, mapping, capture, 2, 5, 6)
    assert found["left:linear"] == (4, 8)
    assert found["right:linear"] == (4, 3)
    same = qmir_ao.prepare_qat(model, qmir_ao.qmir_qconfig, example(capture, 2, 5, 6))
    quantizers = [m for m in same.modules() if isinstance(m, qmir_ao.DLSFakeQuantize)]
    assert len(quantizers) == 1


@captures
def test_a_scan_may_have_other_bits_than_what_feeds_it(capture: str) -> None:
    model = ScanNet()
    mapping = qmir_ao.get_qmir_qconfig_mapping(model, {torch.ops.qmir.selective_scan: 8}, default=2)
    found = lowered_widths(model, mapping, capture, 1, 4, 7)
    assert found == {"project:linear": (2, 2), ":selective_scan": (None, 8)}


@captures
def test_other_settings_reach_every_layer(capture: str) -> None:
    model = Network()
    mapping = qmir_ao.get_qmir_qconfig_mapping(model, {"plain": 2}, weight="lsq")
    prepared = qmir_ao.prepare_qat(model, mapping, example(capture, 1, 3, 7))
    assert not [m for m in prepared.modules() if isinstance(m, qmir_ao.RFAFakeQuantize)]


BAD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "name": (lambda m: {"blocks.0.lefd": 2}, "'blocks.0.lefd'; did you mean 'blocks.0.left'"),
    "last part": (lambda m: {"model.module.body.plain": 2}, "did you mean 'plain'"),
    "far off": (lambda m: {"xyzzy": 2}, "its modules: first, blocks"),
    "glob": (lambda m: {"block.*.lef": 2}, r"glob 'block.\*.lef' matches no module.*did you mean"),
    "class": (lambda m: {nn.Conv2d: 2}, "is a Conv2d; did you mean Conv1d"),
    "operator": (lambda m: {torch.relu: 2}, "operators: .*conv1d"),
    "number": (lambda m: {3: 2}, "3 is no name"),
    "bits": (lambda m: {"plain": 9}, "bits=9 is not supported"),
    "pair": (lambda m: {"plain": (4, 4, 4)}, r"bits=\(4, 4, 4\) is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_assignment_that_names_nothing_is_refused(case: str) -> None:
    make, message = BAD[case]
    model = Network()
    with pytest.raises(ConfigError, match=message):
        qmir_ao.get_qmir_qconfig_mapping(model, make(model))


@captures
def test_a_mapping_of_torch_is_checked_as_well(capture: str) -> None:
    mapping = QConfigMapping().set_global(qmir_ao.qmir_qconfig)
    mapping.set_module_name("blocks.1.rigth", None)
    with pytest.raises(ConfigError, match=r"blocks.1.rigth.*did you mean 'blocks.1.right'"):
        qmir_ao.prepare_qat(Network(), mapping, example(capture, 1, 3, 7))
    mapping = QConfigMapping().set_global(qmir_ao.qmir_qconfig)
    mapping.set_module_name_regex(r"nothing\..*", None)
    with pytest.raises(ConfigError, match="matches no module"):
        qmir_ao.prepare_qat(Network(), mapping, example(capture, 1, 3, 7))
