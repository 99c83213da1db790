"""What the README promises is run: its quick start, its commands, its make targets."""

import re
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from qmir_ao.recipes.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    image = scope["image"]
    assert isinstance(image, torch.Tensor)
    assert image.shape == (1, 3, 96, 128)


def test_quick_start_is_ten_lines() -> None:
    code = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(code) == 10


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert named >= {"demo", "test"}
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in named)


def options(name: str) -> set[str]:
    """Options of a subcommand."""
    sub = get_command(app).commands[name]  # type: ignore[attr-defined]
    return {option for param in sub.params for option in param.opts}


def test_commands_and_options_exist() -> None:
    text = "\n".join(blocks("bash"))
    lines = re.findall(r"^(?:qmir|torchrun .*-m qmir_ao\.recipes\.cli) (.*)$", text, re.MULTILINE)
    assert len(lines) >= 8
    for name, *arguments in (line.split("#")[0].split() for line in lines):
        assert {word for word in arguments if word.startswith("-")} <= options(name)


def test_options_of_training_exist_where_the_table_says() -> None:
    rows = re.findall(r"^\| `(--[a-z0-9-]+)[^|]*\|[^|]*\|([^|]*)\|$", README, re.MULTILINE)
    assert len(rows) >= 6
    for option, commands in rows:
        where = [
            name for name in ("train", "quantize", "run", "reproduce") if option in options(name)
        ]
        assert re.findall(r"`([a-z]+)`", commands) == where
