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


def test_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), scope)
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


def test_commands_and_options_exist() -> None:
    command = get_command(app)
    lines = [
        line.split("#")[0].split()[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("qmir ")
    ]
    assert len(lines) >= 5
    for name, *arguments in lines:
        sub = command.commands[name]  # type: ignore[attr-defined]
        known = {option for param in sub.params for option in param.opts}
        assert {word for word in arguments if word.startswith("-")} <= known
