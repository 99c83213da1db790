"""Counts of parameters, operations and bytes: each against what it claims to reproduce."""

import json

import pytest
import torch
from support.models import ConvNet, tiny_pair
from torch import Tensor, nn

from qmir_ao.backend.layers import capture_float, find_layers, model_bytes
from qmir_ao.capture.export import export_graph
from qmir_ao.recipes import cli
from qmir_ao.recipes.complexity import (
    LABELS,
    TABLE_4,
    bytes_at,
    complexity,
    count_like_thop,
    operations,
    parameters,
)
from qmir_ao.recipes.models import create_model

TABLE_4_COUNTS = {
    "MambaIR-light x2": (859_320, 88.0253e9, 1_363_320),
    "MambaIR x2": (13_072_463, 1334.269e9, 16_921_583),
}
"""What thop 0.1.1 printed for the authors' own code, and the true number of parameters."""
ZOO_COUNTS = {
    "mambair-light-x2": (625_656, 63.78e9),
    "mambair-light-x3": (633_771, 64.61e9),
    "mambair-light-x4": (645_132, 65.77e9),
}


@pytest.mark.parametrize("described", TABLE_4, ids=lambda d: d.row)
def test_float_rows_of_table_4(described: object) -> None:
    row = next(d for d in TABLE_4 if d is described)
    thop_parameters, thop_macs, true_parameters = TABLE_4_COUNTS[row.row]
    counts = complexity(row.build())
    assert counts.thop_parameters == thop_parameters
    assert counts.parameters == true_parameters
    # A few operations of the authors' own forward are not ours: below one in 400 000.
    assert counts.thop_macs == pytest.approx(thop_macs, rel=2.5e-6)
    printed = float(row.published[0][:-1]) * {"K": 1e3, "M": 1e6}[row.published[0][-1]]
    assert counts.thop_parameters == pytest.approx(printed, rel=1e-4)


@pytest.mark.parametrize("name", ZOO_COUNTS)
def test_thop_counts_of_the_zoo(name: str) -> None:
    found = count_like_thop(create_model(name))
    assert found.parameters == ZOO_COUNTS[name][0]
    assert found.macs == pytest.approx(ZOO_COUNTS[name][1], rel=1e-4)


class Mixed(nn.Module):
    """One module of each class that is counted, a parameter that is not, a layer that never runs.

    On an input of 3x8x8: the counts below are worked out by hand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.norm = nn.LayerNorm(8)
        self.batch = nn.BatchNorm2d(6, affine=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(6, 5)
        self.softmax = nn.Softmax(-1)
        self.slope = nn.PReLU(5)
        self.unused = nn.Linear(100, 100)
        self.scale = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.batch(self.norm(self.conv(x)))).flatten(1)
        return self.slope(self.softmax(self.linear(y))) * self.scale[:5]


def test_every_class_counts_as_in_thop() -> None:
    found = count_like_thop(Mixed(), side=8)
    assert found.parameters == (6 * 9 + 6) + 2 * 8 + (6 * 5 + 5) + 5
    norms = 4 * 6 * 64 + 2 * 6 * 64
    assert found.macs == 6 * 64 * 9 + norms + (64 + 1) * 6 + 6 * 5 + (3 * 5 - 1) + 5
    assert parameters(Mixed()) == found.parameters + 100 * 100 + 100 + 7


def test_operations_hold_layers_and_scans() -> None:
    tiny = create_model("mambair-tiny-x2")
    counts = operations(tiny, 16)
    # 4 blocks, 4 directions of 48 channels, 8 states.
    assert counts["scan"] == 9 * 4 * 4 * 48 * 8 * 16**2
    assert counts["total"] == counts["layers"] + counts["scan"]
    assert operations(nn.Conv2d(3, 5, 3, padding=1), 8)["layers"] == 3 * 5 * 9 * 64


@pytest.mark.parametrize("bits", [4, 2])
def test_bytes_are_those_of_the_lowered_network(bits: int) -> None:
    report = tiny_pair("trace", bits)[1].report
    row = bytes_at(create_model("mambair-tiny-x2"), [bits])["bytes_at"][str(bits)]
    assert row["weights"] == report.weight_bytes + report.scale_bytes


def test_bytes_of_the_float_network_and_odd_widths() -> None:
    model = ConvNet()
    rows = bytes_at(model, [3, 4, 5, 8])["bytes_at"]
    assert rows["32"]["total"] == 4 * parameters(model)
    assert rows["32"]["ratio"] == 1.0
    assert rows["3"]["weights"] == rows["4"]["weights"] < rows["5"]["weights"]
    assert rows["5"]["weights"] == rows["8"]["weights"]
    assert len({row["rest"] for row in rows.values()}) == 1


class Shared(nn.Module):
    """One layer that runs twice, one whose weight is computed from the input, one in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        self.twice = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).permute(0, 2, 3, 1)
        y = self.twice(torch.relu(self.twice(y))).permute(0, 3, 1, 2)
        y = nn.functional.conv2d(y, y.mean((0, 2, 3)).expand(4, 4)[:, :, None, None])
        return self.last(y)


@pytest.mark.parametrize("capture", ["export", "trace"])
def test_layers_of_a_network_that_nobody_designed_for_it(capture: str) -> None:
    model = Shared().eval()
    inputs = (torch.rand(1, 3, 5, 6),)
    graph = export_graph(model, inputs) if capture == "export" else capture_float(model)
    layers = {layer.path: layer for layer in find_layers(graph)}
    assert layers["twice"].elements == 16
    assert layers["twice"].kinds == ("linear", "linear")
    assert layers[""].reason == "its weight is computed from an input"
    assert "first convolution" in str(layers["first"].reason)
    assert model_bytes(model, list(layers.values()), 4)["weights"] == 16 // 2 + 4 * (4 + 1)


def test_info_prints_every_count_and_says_which_is_which(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmir_ao.recipes.console.OUT.width", 160)
    assert cli.main(["info", "mambair-light-x2", "--bits", "4", "--side", "64"]) == 0
    text = capsys.readouterr().out
    for part in ("905,016", "625,656", "MACs at 64x64", *LABELS.values()):
        assert part in text
    assert cli.main(["info", "--table4"]) == 0
    text = capsys.readouterr().out
    for part in ("859.32K", "859,320", "1,363,320", "1.334T", "1,334.27 G"):
        assert part in text


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "mambair-tiny-x2", "--bits", "4", "--side", "16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["complexity"]["parameters"] == facts["parameters"]
    assert facts["complexity"]["side"] == 16
    assert set(facts["bytes_at"]) == {"32", "4"}
    assert set(facts["labels"]) < set(facts["complexity"])
    assert cli.main(["info", "--table4", "--json", "--side", "32"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["thop_parameters"] for row in rows] == [859_320, 13_072_463]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("info", "give a MODEL or --table4"),
        ("info mambair-tiny-x2 --table4", "give a MODEL or --table4"),
        ("info mambair-tiny-x2 --bits 9", "bits=9 is not supported"),
    ],
)
def test_info_of_nothing(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err
