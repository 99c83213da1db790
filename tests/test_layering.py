"""Folder dependency rule: each folder imports only from its left, third parties only at home."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW_PASSES = {"qmir_ao.ops", "qmir_ao.quant", "qmir_ao.capture"}
MAY_IMPORT = {
    "qmir_ao.ops": set(),
    "qmir_ao.quant": {"qmir_ao.ops"},
    "qmir_ao.capture": {"qmir_ao.ops"},
    "qmir_ao.passes": BELOW_PASSES,
    "qmir_ao.backend": BELOW_PASSES | {"qmir_ao.passes"},
    "qmir_ao.recipes": BELOW_PASSES | {"qmir_ao.passes", "qmir_ao.backend", "qmir_ao.api"},
}
LAYERS = {*MAY_IMPORT, "qmir_ao.api"}
# Optional third parties, each allowed in one folder, and what nobody may import at all.
AT_HOME = {
    "cupy": "backend/cuda",
    "cupy_backends": "backend/cuda",
    "onnx": "backend/onnx",
    "onnxscript": "backend/onnx",
    "onnxruntime": "backend/onnx",
    "torch_tensorrt": "backend/orin",
    "tensorrt": "backend/orin",
    "torchvision": "nowhere",
}
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = CONFIG["package-dir"] | {
    f"qmir_ao.{name}": f"qmir_ao/{name}" for name in ("ops", "quant", "capture")
}


def sources() -> list[Path]:
    """Every Python file of the project that is not a test."""
    return sorted(
        p for folder in CONFIG["package-dir"].values() for p in (ROOT / folder).rglob("*.py")
    )


def imported(source: str) -> Iterator[str]:
    """Dotted names that a module imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(package: str, source: str) -> list[str]:
    """Names that a module of `package` must not import."""
    wrong = []
    for name in imported(source):
        owner = ".".join(name.split(".")[:2])
        if owner in LAYERS and owner != package and owner not in MAY_IMPORT[package]:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_folder_imports_only_what_lies_below(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in (ROOT / FOLDERS[package]).rglob("*.py")
        if (names := violations(package, path.read_text()))
    }
    assert not wrong


def test_a_planted_violation_is_found() -> None:
    assert violations("qmir_ao.ops", "def f():\n    from qmir_ao.backend import cpu\n")
    assert violations("qmir_ao.quant", "import qmir_ao.capture.export\n")
    assert not violations("qmir_ao.passes", "from qmir_ao.quant import spec\n")


@pytest.mark.parametrize("third_party", AT_HOME)
def test_third_parties_stay_at_home(third_party: str) -> None:
    home = ROOT / AT_HOME[third_party]
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources()
        if home not in path.parents
        and any(name.split(".")[0] == third_party for name in imported(path.read_text()))
    ]
    assert not wrong


def test_imports_are_absolute() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_every_package_is_listed() -> None:
    want = set(CONFIG["package-dir"])
    for package, folder in CONFIG["package-dir"].items():
        for init in (ROOT / folder).rglob("*/__init__.py"):
            want.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert want == set(CONFIG["packages"])


def test_cuda_holds_no_python() -> None:
    assert (ROOT / "cuda" / "include").is_dir()
    assert not list((ROOT / "cuda").rglob("*.py"))


def test_typing_links_are_complete() -> None:
    want = {p.name for p in (ROOT / "qmir_ao").iterdir() if p.name != "__pycache__"}
    want |= {folder for folder in CONFIG["package-dir"].values() if folder != "qmir_ao"}
    links = list((ROOT / ".typing" / "qmir_ao").iterdir())
    assert want - {"cuda"} == {p.name for p in links}
    assert all(p.is_symlink() and p.exists() and not p.readlink().is_absolute() for p in links)
