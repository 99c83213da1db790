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
from safetensors.torch import load_file, save_file
from support.integers import same_bytes
from support.models import CAPTURES, ConvNet, example, tiny_pair
from torch import nn

import qmir_ao
from qmir_ao.backend import artifact
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes.models import create_model

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
        tensors = load_file(folder / TENSORS)
        layout = [[name, str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())]
        text = json.dumps([manifest["graph"], layout], sort_keys=True, separators=(",", ":"))
        manifest["graph_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("bits", [2, 4])
def test_reload_gives_the_same_bytes(capture: str, bits: int, tmp_path: Path) -> None:
    prepared, lowered = tiny_pair(capture, bits)
    qmir_ao.save(lowered, tmp_path / "net")
    loaded = qmir_ao.load(tmp_path / "net")
    x = torch.rand(2, 3, 11, 13)
    assert same_bytes(loaded(x), lowered(x))
    assert qmir_ao.compare(prepared, loaded, x) == qmir_ao.compare(prepared, lowered, x)
    assert loaded.report == lowered.report
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == [MANIFEST, TENSORS]
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert b"pickle" not in (tmp_path / "net" / TENSORS).read_bytes()[:4096]


def test_a_loaded_model_saves_the_same_bytes_again(tmp_path: Path, saved: Path) -> None:
    loaded = qmir_ao.load(saved)
    qmir_ao.save(loaded, tmp_path / "again")
    for name in (TENSORS, MANIFEST):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


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


def test_the_tests_know_the_format(folder: Path) -> None:
    rewrite(folder, lambda m: None)
    assert isinstance(qmir_ao.load(folder), LoweredModule)


def test_a_changed_graph_is_refused(folder: Path) -> None:
    rewrite(folder, lambda m: m["graph"]["texts"].append("more"), rehash=False)
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        qmir_ao.load(folder)


@pytest.mark.parametrize("change", ["name", "shape", "type"])
def test_a_changed_tensor_header_is_refused(folder: Path, change: str) -> None:
    tensors = load_file(folder / TENSORS)
    name = next(n for n, t in tensors.items() if t.dim() == 4)
    if change == "name":
        tensors[name + "_"] = tensors.pop(name)
    elif change == "shape":
        tensors[name] = tensors[name].flatten(1)
    else:
        tensors[name] = tensors[name].view(torch.int32)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match="type or shape"):
        qmir_ao.load(folder)


def test_tensors_of_another_model_are_refused(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    save_file(tensors | {"more": torch.zeros(1)}, folder / TENSORS)
    with pytest.raises(CheckpointError, match="take both files from one save"):
        qmir_ao.load(folder)


@pytest.mark.parametrize("version", [1, 2, 6, "5", True, None])
def test_another_version_is_refused(folder: Path, version: object) -> None:
    rewrite(folder, lambda m: m.update(version=version))
    message = f"version {version!r}, this release reads 3, 4 and 5; lower"
    with pytest.raises(CheckpointError, match=message):
        qmir_ao.load(folder)


def test_a_model_of_the_version_before_loads(folder: Path) -> None:
    """Its integer operators had no epilogue, and so has each one whose call names none."""
    x = torch.rand(1, 3, 9, 8)
    want = qmir_ao.load(folder)(x)
    rewrite(folder, lambda m: m.update(version=3))
    assert torch.equal(qmir_ao.load(folder)(x), want)


@pytest.mark.parametrize("key", ["tensors", "graph"])
def test_missing_parts_are_refused(folder: Path, key: str) -> None:
    rewrite(folder, lambda m: m.update({key: None}), rehash=False)
    with pytest.raises(CheckpointError, match=key):
        qmir_ao.load(folder)


@pytest.mark.parametrize(
    "key", ["inputs", "targets", "calls", "nodes", "modules", "texts", "notes"]
)
def test_missing_tables_are_refused(folder: Path, key: str) -> None:
    rewrite(folder, lambda m: m["graph"].pop(key))
    with pytest.raises(CheckpointError, match="the graph is damaged"):
        qmir_ao.load(folder)


FORBIDDEN = [
    "builtins.eval",
    "os.system",
    "getattr",
    "getattr.shape",
    "operator.methodcaller",
    "torch.load",
    "torch.ops.load_library",
    "aten.from_file.default",
    "aten.add_.Tensor",
    "aten.__class__.default",
    "qmir.__init__.default",
    "prim.device.default",
    ".__reduce__",
    ".backward",
    ".numpy",
    ".",
    "",
    "import os",
]


@pytest.mark.parametrize("target", FORBIDDEN)
def test_forbidden_calls_are_refused_and_not_run(folder: Path, target: str) -> None:
    canary = folder / "canary"
    text = "__class__" if target == "getattr.shape" else f"open({str(canary)!r}, 'w')"

    def plant(manifest: dict[str, Any]) -> None:
        graph = manifest["graph"]
        graph["targets"].append(target)
        graph["calls"].append([len(graph["targets"]) - 1, [{"$": 0}, text]])
        graph["nodes"].insert(0, [len(graph["calls"]) - 1, 0])

    rewrite(folder, plant)
    with pytest.raises(CheckpointError, match="not allowed"):
        qmir_ao.load(folder)
    assert not canary.exists()


def last_value(graph: dict[str, Any]) -> int:
    """Number of the latest value that a node reads: the result of another node."""
    return max(value for node in graph["nodes"] for value in node[1:])


Change = Callable[[dict[str, Any]], object]
DAMAGE: dict[str, Change] = {
    "unknown tag": lambda g: g["calls"][0].__setitem__(1, [{"$call": "os"}]),
    "two tags": lambda g: g["calls"][0].__setitem__(1, [{"$": 0, "$tuple": []}]),
    "hole without a value": lambda g: g["calls"][0].__setitem__(1, [{"$": 9}]),
    "negative hole": lambda g: g["calls"][0].__setitem__(1, [{"$": -1}]),
    "hole of text": lambda g: g["calls"][0].__setitem__(1, [{"$": "0"}]),
    "unknown dtype": lambda g: g["calls"][0].__setitem__(1, [{"$dtype": "object"}]),
    "deep arguments": lambda g: g["calls"][0].__setitem__(1, deep(900)),
    "no arguments": lambda g: g["calls"][0].pop(),
    "code in a keyword": lambda g: g["calls"][0].append({"a=exit(),b": 1}),
    "target out of range": lambda g: g["calls"][0].__setitem__(0, 999),
    "negative target": lambda g: g["calls"][0].__setitem__(0, -1),
    "target is no text": lambda g: g["targets"].__setitem__(0, ["aten"]),
    "call out of range": lambda g: g["nodes"][0].__setitem__(0, 999),
    "call is true": lambda g: g["nodes"][0].__setitem__(0, True),
    "value out of range": lambda g: g["nodes"][0].__setitem__(1, 9999),
    "value of a later node": lambda g: g["nodes"][0].__setitem__(1, last_value(g)),
    "negative value": lambda g: g["nodes"][0].__setitem__(1, -1),
    "node is no list": lambda g: g["nodes"].insert(0, 3),
    "empty node": lambda g: g["nodes"].insert(0, []),
    "no output": lambda g: g["nodes"].pop(),
    "two outputs": lambda g: g["nodes"].append(g["nodes"][-1]),
    "no nodes": lambda g: g["nodes"].clear(),
    "code in a name": lambda g: g["inputs"][0].__setitem__(0, "x=1;import os"),
    "code in a placeholder": lambda g: g["inputs"][0].__setitem__(1, "x=__import__('os')"),
    "keyword as a name": lambda g: g["inputs"][0].__setitem__(1, "import"),
    "no inputs": lambda g: g["inputs"].clear(),
    "code in a note": lambda g: g["notes"].append([0, "x;import os"]),
    "note of a list": lambda g: g["notes"].append([[], "x"]),
    "note of an unknown text": lambda g: g["notes"].append([0, "x", None, 999]),
    "note of an unknown module": lambda g: g["notes"].append([0, "x", 999]),
    "note of odd bits": lambda g: g["notes"].append([0, "x", None, None, 99]),
    "text is none": lambda g: g["texts"].__setitem__(slice(None), [3] * len(g["texts"])),
    "module inside itself": lambda g: g["modules"].append(["a", len(g["modules"])]),
    "module of no name": lambda g: g["modules"].append([3]),
}


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_damaged_graphs_are_refused(folder: Path, change: Change) -> None:
    rewrite(folder, lambda m: change(m["graph"]) and None)
    with pytest.raises(CheckpointError):
        qmir_ao.load(folder)


@pytest.mark.parametrize("entry", [3, None, "0" * 64, ["a"]], ids=str)
def test_a_wrong_digest_is_refused(folder: Path, entry: object) -> None:
    rewrite(folder, lambda m: m["tensors"].__setitem__(0, entry))
    with pytest.raises(CheckpointError, match="hash mismatch"):
        qmir_ao.load(folder)


def test_a_tensor_whose_name_is_code_is_refused(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    name = sorted(tensors)[-1]
    tensors["~" + name + ";import os"] = tensors.pop(name)
    save_file(tensors, folder / TENSORS)
    rewrite(folder, lambda m: None)
    with pytest.raises(CheckpointError, match="not allowed"):
        qmir_ao.load(folder)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_saved_model_is_about_half_the_size_of_the_float_file(
    capture: str, bits: int, tmp_path: Path
) -> None:
    lowered = tiny_pair(capture, bits)[1]
    qmir_ao.save(lowered, tmp_path / "net")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "net").iterdir()}
    floats = sum(4 * p.numel() for p in create_model("mambair-tiny-x2").parameters())
    assert sizes[MANIFEST] < 48_000
    assert sum(sizes.values()) < 0.56 * floats
    report = lowered.report
    # A step for each output channel and one shift for each weight.
    weights = [r for r in report.operators if r.kind != "selective_scan"]
    assert report.scale_bytes < 4 * 2600 + 4 * len(weights)


def test_names_of_inputs_and_defaults_survive(tmp_path: Path) -> None:
    class Two(ConvNet):
        def forward(self, v1: torch.Tensor, input: float = 0.5) -> torch.Tensor:
            return super().forward(v1) * input

    prepared = qmir_ao.prepare_qat(Two(), qmir_ao.qmir_qconfig)
    x = torch.rand(1, 3, 9, 10)
    prepared(x)
    prepared.eval()
    lowered = qmir_ao.convert_and_lower(prepared)
    qmir_ao.save(lowered, tmp_path / "net")
    loaded = qmir_ao.load(tmp_path / "net")
    assert same_bytes(loaded(x), lowered(x))
    assert same_bytes(loaded(x, 0.25), lowered(x, 0.25))
    assert loaded.report == lowered.report


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
            self.drop = nn.Softmax2d()

    qconfig = qmir_ao.qmir_qconfig
    traced = qmir_ao.prepare_qat(WithModule(), qconfig, example("trace"))
    traced.eval()
    with pytest.raises(ConfigError, match="example_inputs"):
        qmir_ao.save(qmir_ao.convert_and_lower(traced), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
