"""What ruff cannot see: operators state shapes and source, errors tell who raises them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OP_FILES = sorted(p for p in (ROOT / "qmir_ao" / "ops").glob("*.py") if not p.name.startswith("_"))
API_FILES = sorted(
    [
        *OP_FILES,
        *(ROOT / "qmir_ao" / "quant").glob("*.py"),
        *(ROOT / "qmir_ao" / "capture").glob("*.py"),
        *(ROOT / "qmir_ao").glob("*.py"),
    ]
)
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def relative(path: Path) -> str:
    """Path as it is shown in a failure."""
    return str(path.relative_to(ROOT))


def public(body: list[ast.stmt]) -> list[Documented]:
    """Functions and classes that a user may call, methods included, without typed overloads."""
    found: list[Documented] = []
    for node in body:
        if "overload" in [ast.unparse(d) for d in getattr(node, "decorator_list", [])]:
            continue
        if isinstance(node, Documented) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public(node.body)
    return found


@pytest.mark.parametrize("path", API_FILES, ids=relative)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert not [node.name for node in public(tree.body) if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", OP_FILES, ids=relative)
def test_operators_state_shape_and_source(path: Path) -> None:
    tree = ast.parse(path.read_text())
    docs = [ast.get_docstring(node) for node in public(tree.body)]
    text = "\n".join([ast.get_docstring(tree) or "", *(doc for doc in docs if doc)])
    assert "Shape" in text
    assert "Source" in text


def test_every_error_class_is_documented_and_has_one_base() -> None:
    tree = ast.parse((ROOT / "qmir_ao" / "errors.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert all(ast.get_docstring(node) for node in classes)
    bases = {node.name: [ast.unparse(base) for base in node.bases] for node in classes}
    assert [name for name, above in bases.items() if "QmirError" not in above] == ["QmirError"]
