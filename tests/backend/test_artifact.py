"""Lowered models on disk: the same bytes back, and nothing runs from a file that was changed."""

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.integers import same_bytes
from support.models import CAPTURES, ConvNet, example, tiny_pair
from torch import nn

import qmir_ao
from qmir_ao.backend import artifact
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.errors import CheckpointError, ConfigError

TENSORS, MANIFEST = "model.safetensors", "manifest.json"


def small(seed: int = 0) -> LoweredModule:
    torch.manual_seed(seed)
    prepared = qmir_ao.prepare_qat(ConvNet(), qmir_ao.qmir_qconfig, (torch.rand(1, 3, 9, 10),))
    prepared(torch.rand(2, 3, 9, 10))
    prepared.eval()
    return qmir_ao.convert_and_lower(prepared)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lowered") / "net"
    qmir_ao.save(small(), path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    path = tmp_path / "net"
    path.mkdir()
    for name in (TENSORS, MANIFEST):
        (path / name).write_bytes((saved / name).read_bytes())
    return path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], rehash: bool = True) -> None:
    """Change the manifest as somebody would who knows the format."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if rehash:
        text = json.dumps(manifest["graph"], sort_keys=True, separators=(",", ":"))
        manifest["graph_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("bits", [2, 4])
def test_reload_gives_the_same_bytes(capture: str, bits: int, tmp_path: Path) -> None:
    lowered = tiny_pair(capture, bits)[1]
    qmir_ao.save(lowered, tmp_path / "net")
    loaded = qmir_ao.load(tmp_path / "net")
    x = torch.rand(2, 3, 11, 13)
    assert same_bytes(loaded(x), lowered(x))
    assert loaded.report.to_dict() == lowered.report.to_dict()
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == [MANIFEST, TENSORS]
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert b"pickle" not in (tmp_path / "net" / TENSORS).read_bytes()[:4096]


def test_loaded_model_compares_and_saves_again(tmp_path: Path, saved: Path) -> None:
    loaded = qmir_ao.load(saved)
    qmir_ao.save(loaded, tmp_path / "again")
    again = qmir_ao.load(tmp_path / "again")
    x = torch.rand(1, 3, 9, 10)
    assert same_bytes(again(x), loaded(x))


def test_every_byte_of_the_tensors_counts(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for position in (start, (start + len(data)) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        (folder / TENSORS).write_bytes(changed)
        with pytest.raises(CheckpointError, match="hash mismatch in tensor"):
            qmir_ao.load(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_truncated_files_are_refused(folder: Path, name: str, keep: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=name):
        qmir_ao.load(folder)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_missing_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        qmir_ao.load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        qmir_ao.load(tmp_path / "absent")


@pytest.mark.parametrize("text", ["", "not json", "[]", "{}", "null", '{"format": 1}', "[" * 99999])
def test_other_manifests_are_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        qmir_ao.load(folder)


def test_a_changed_graph_is_refused(folder: Path) -> None:
    rewrite(folder, lambda m: m["graph"][0].update(name="other"), rehash=False)
    with pytest.raises(CheckpointError, match="sha256"):
        qmir_ao.load(folder)


def test_another_version_is_refused(folder: Path) -> None:
    rewrite(folder, lambda m: m.update(version=2))
    with pytest.raises(CheckpointError, match="version 2"):
        qmir_ao.load(folder)


@pytest.mark.parametrize("key", ["tensors", "graph", "report"])
def test_missing_parts_are_refused(folder: Path, key: str) -> None:
    rewrite(folder, lambda m: m.update({key: None}), rehash=False)
    with pytest.raises(CheckpointError, match=key):
        qmir_ao.load(folder)


FORBIDDEN = [
    ("call_function", "builtins.eval"),
    ("call_function", "os.system"),
    ("call_function", "operator.methodcaller"),
    ("call_function", "torch.load"),
    ("call_function", "torch.ops.load_library"),
    ("call_function", "aten.from_file.default"),
    ("call_function", "aten.add_.Tensor"),
    ("call_function", "aten.__class__.default"),
    ("call_function", "qmir.__init__.default"),
    ("call_function", "prim.device.default"),
    ("call_method", "__reduce__"),
    ("call_method", "backward"),
    ("call_method", "numpy"),
    ("call_module", "eval"),
    ("import", "os"),
]


@pytest.mark.parametrize(("op", "target"), FORBIDDEN)
def test_forbidden_calls_are_refused_and_not_run(folder: Path, op: str, target: str) -> None:
    canary = folder / "canary"

    def plant(manifest: dict[str, Any]) -> None:
        first = manifest["graph"][0]["name"]
        call = {"name": "evil", "op": op, "target": target, "kwargs": {}, "meta": {}}
        arguments = [f"open({str(canary)!r}, 'w')"] if op == "call_function" else [{"$node": first}]
        manifest["graph"].insert(1, call | {"args": arguments})

    rewrite(folder, plant)
    with pytest.raises(CheckpointError, match="not allowed"):
        qmir_ao.load(folder)
    assert not canary.exists()


DAMAGE: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown tag": lambda m: m["graph"][1].update(args=[{"$call": "os"}]),
    "unknown node": lambda m: m["graph"][1].update(args=[{"$node": "nobody"}]),
    "two tags": lambda m: m["graph"][1].update(args=[{"$node": "x", "$tuple": []}]),
    "unknown dtype": lambda m: m["graph"][1].update(args=[{"$dtype": "object"}]),
    "no target": lambda m: m["graph"][1].pop("target"),
    "no such tensor": lambda m: m["graph"].insert(
        1, {"name": "a", "op": "get_attr", "target": "x.y", "args": [], "kwargs": {}, "meta": {}}
    ),
    "dunder attribute": lambda m: m["graph"].insert(
        1,
        {
            "name": "a",
            "op": "get_attr",
            "target": "__class__.__init__",
            "args": [],
            "kwargs": {},
            "meta": {},
        },
    ),
    "code in a name": lambda m: m["graph"][0].update(name="x=1;import os"),
    "code in a placeholder": lambda m: m["graph"][0].update(target="x=__import__('os')"),
    "code in a keyword": lambda m: m["graph"][1].update(kwargs={"a=exit(),b": 1}),
    "node is no object": lambda m: m["graph"].insert(0, 3),
    "no output": lambda m: m["graph"].pop(),
    "empty graph": lambda m: m["graph"].clear(),
    "report of other fields": lambda m: m["report"].update(operators=[{"name": 1}]),
    "tensor entry": lambda m: m["tensors"].update({next(iter(m["tensors"])): 3}),
    "tensor too many": lambda m: m["tensors"].update(more={}),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_damaged_graphs_are_refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError):
        qmir_ao.load(folder)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = small()

    def fail(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        if path.name == MANIFEST:
            raise OSError("disk full")

    monkeypatch.setattr(artifact, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        qmir_ao.save(lowered, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / MANIFEST).read_bytes()

    def fail(path: Path, data: bytes) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        qmir_ao.save(small(1), folder)
    assert (folder / MANIFEST).read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_lowered_folder_is_overwritten(folder: Path) -> None:
    lowered = small(1)
    qmir_ao.save(lowered, folder)
    x = torch.rand(1, 3, 9, 10)
    assert same_bytes(qmir_ao.load(folder)(x), lowered(x))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    lowered = small()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"text")
    for name in ("photos", "file"):
        with pytest.raises(ConfigError, match="no lowered model"):
            qmir_ao.save(lowered, tmp_path / name)
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    assert (tmp_path / "file").read_bytes() == b"text"
    (tmp_path / "empty").mkdir()
    qmir_ao.save(lowered, tmp_path / "empty")
    assert (tmp_path / "empty" / MANIFEST).is_file()


def test_other_objects_and_operators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="convert_and_lower"):
        qmir_ao.save(ConvNet(), tmp_path / "net")
    foreign = copy.deepcopy(small())
    graph = foreign.graph_module.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
        graph.call_function(print, ("hello",))
    with pytest.raises(ConfigError, match="cannot be saved"):
        qmir_ao.save(foreign, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_modules_left_in_the_graph_are_refused(tmp_path: Path) -> None:
    class WithModule(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Softshrink()

    qconfig = qmir_ao.qmir_qconfig
    traced = qmir_ao.prepare_qat(WithModule(), qconfig, example("trace"))
    traced.eval()
    with pytest.raises(ConfigError, match="example_inputs"):
        qmir_ao.save(qmir_ao.convert_and_lower(traced), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
