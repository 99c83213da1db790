"""`qmir_ao.explain`: what passes did and what operators became, also after loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cross_scans import Grouped
from support.models import CAPTURES, ConvNet, tiny_pair

import qmir_ao
from qmir_ao.backend.artifact import MANIFEST
from qmir_ao.backend.explanation import COLUMNS
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.passes.pipeline import CAPTURE, CPU


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepared = qmir_ao.prepare_qat(ConvNet(), qmir_ao.qmir_qconfig)
    prepared(torch.rand(2, 3, 9, 10))
    qmir_ao.save(qmir_ao.convert_and_lower(prepared.eval()), tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize("capture", CAPTURES)
def test_every_pass_and_operator_is_told(capture: str) -> None:
    lowered = tiny_pair(capture, 4)[1]
    explanation = qmir_ao.explain(lowered)
    assert [r.name for r in explanation.passes] == [p.name for p in (*CAPTURE, *CPU)]
    by_name = {r.name: r for r in explanation.passes}
    assert by_name["LowerConv"].changed == 30
    assert by_name["LowerConv"].operators["qmir.conv2d"] == 30
    assert by_name["LowerScan"].operators["qmir.ss2d_scan_q"] == 4
    assert by_name["LowerScan"].modules == {"layers.*.residual_group.blocks.*.self_attention": 4}
    assert by_name["FuseCrossScan"].changed == 0
    rows = explanation.operators()
    report = lowered.report
    assert len(rows) == len(report.operators) + len(report.left_in_float)
    assert all(tuple(row) == COLUMNS for row in rows)
    integers = [row for row in rows if row["runs on"] == "integers"]
    assert sum(row["bytes"] for row in integers) == report.weight_bytes + report.scale_bytes
    assert {row["activations"] for row in integers} == {4}
    assert all(row["reason"] for row in rows if row["runs on"] == "float")
    text = str(explanation)
    for record in explanation.passes:
        assert f"\n  {record.name}: " in text
    for row in rows:
        assert row["module"] in text
    assert "42 operators on integer codes" in text
    json.dumps(explanation.to_dict())


def test_passes_before_preparation_are_told() -> None:
    prepared = qmir_ao.prepare_qat(Grouped(), qmir_ao.qmir_qconfig)
    prepared(torch.rand(2, 6, 7, 5))
    explanation = qmir_ao.explain(qmir_ao.convert_and_lower(prepared.eval()))
    fused = [r for r in explanation.passes if r.name == "FuseCrossScan"]
    assert [r.changed for r in fused] == [1, 0]
    assert fused[0].operators["qmir.ss2d_scan"] == 1
    assert fused[0].operators["flip"] == -2


def test_a_loaded_model_explains_itself(folder: Path) -> None:
    loaded = qmir_ao.load(folder)
    again = folder.parent / "again"
    qmir_ao.save(loaded, again)
    assert (again / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    first, second = (qmir_ao.explain(qmir_ao.load(f)) for f in (folder, again))
    assert first == second
    assert str(first) == str(second)
    assert first.to_dict()["passes"][0]["name"] == CAPTURE[0].name


def change(folder: Path, passes: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    if passes is None:
        del manifest["passes"]
    else:
        manifest["passes"] = passes
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_model_without_record_says_so(folder: Path) -> None:
    change(folder, None)
    explanation = qmir_ao.explain(qmir_ao.load(folder))
    assert explanation.passes == ()
    assert "no record" in str(explanation)


@pytest.mark.parametrize(
    "passes",
    [
        {},
        [["A"]],
        ["ABCD"],
        [["A", "1", {}, {}]],
        [["A", True, {}, {}]],
        [["\x1b[2J", 1, {}, {}]],
        [["A", 1, {"\x1b[2J": 1}, {}]],
        [["A", 1, {}, {"a b": 1}]],
        [["A", 1, {}, {"a": "1"}]],
        [["A", 1, [], {}]],
        [[None, 1, {}, {}]],
    ],
)
def test_damaged_records_are_refused(folder: Path, passes: Any) -> None:
    change(folder, passes)
    with pytest.raises(CheckpointError, match=MANIFEST):
        qmir_ao.load(folder)


@pytest.mark.parametrize("other", [None, ConvNet(), "net"])
def test_other_objects_are_refused(other: Any) -> None:
    with pytest.raises(ConfigError, match="explain needs what convert_and_lower"):
        qmir_ao.explain(other)


def test_compiling_tells_passes_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import compile_fx

    from qmir_ao.backend.dynamo import qmir

    # What Inductor makes of the graph takes minutes, and is not the point.
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph_module, _: graph_module.forward)
    net = ConvNet().eval()
    torch._dynamo.reset()
    with caplog.at_level("INFO", logger="qmir_ao.backend.dynamo"), torch.no_grad():
        torch.compile(net, backend=qmir)(torch.rand(1, 3, 9, 10))
    assert "qmir: pass FuseCrossScan: nothing to change" in caplog.text
