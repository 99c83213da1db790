"""What a user imports: the recorded names, and what importing them must not cost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qmir_ao

PUBLIC = [
    "DLSFakeQuantize",
    "QmirError",
    "QmirQuantizer",
    "RFAFakeQuantize",
    "assign_bits",
    "calibrate",
    "compare",
    "convert_and_lower",
    "explain",
    "get_qmir_qconfig",
    "get_qmir_qconfig_mapping",
    "load",
    "prepare_ptq",
    "prepare_qat",
    "qmir_qconfig",
    "register_selective_scan",
    "save",
    "sensitivity",
]
HEAVY = ["torchao", "cupy", "onnx", "onnxruntime", "lightning", "cv2", "matplotlib", "torchvision"]

PROBE = """
import json, sys
events = []
sys.addaudithook(lambda name, args: events.append(name))
import qmir_ao
print(json.dumps({
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "sockets": sorted({e for e in events if e.startswith("socket.")}),
    "processes": sorted({e for e in events if e in ("subprocess.Popen", "os.system", "os.exec")}),
}), file=open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def fresh_import(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], dict[str, list[str]]]:
    """Import the package in a process of its own, from an unrelated folder."""
    folder = tmp_path_factory.mktemp("fresh")
    facts = folder / "facts.json"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(facts)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(facts.read_text())


def test_names_are_the_recorded_ones() -> None:
    assert sorted(qmir_ao.__all__) == PUBLIC
    assert all(getattr(qmir_ao, name) is not None for name in PUBLIC)
    assert set(PUBLIC) <= set(dir(qmir_ao))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        qmir_ao.nonsense  # noqa: B018


def test_import_prints_nothing(
    fresh_import: tuple[subprocess.CompletedProcess[str], dict[str, list[str]]],
) -> None:
    done, _ = fresh_import
    assert done.stdout == ""
    assert done.stderr == ""


def test_import_pulls_in_nothing_heavy(
    fresh_import: tuple[subprocess.CompletedProcess[str], dict[str, list[str]]],
) -> None:
    _, facts = fresh_import
    assert not set(facts["modules"]) & set(HEAVY)


def test_import_opens_no_connection_and_starts_no_process(
    fresh_import: tuple[subprocess.CompletedProcess[str], dict[str, list[str]]],
) -> None:
    _, facts = fresh_import
    assert facts["sockets"] == []
    assert facts["processes"] == []


def test_version_is_that_of_the_installed_package() -> None:
    import importlib.metadata

    assert importlib.metadata.version("qmir-ao") == qmir_ao.__version__


def test_package_is_typed() -> None:
    assert (Path(qmir_ao.__file__).parent / "py.typed").is_file()


def test_torch_finds_the_backend_without_an_import_of_ours() -> None:
    code = "import torch; print('qmir' in torch.compiler.list_backends())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "True"
