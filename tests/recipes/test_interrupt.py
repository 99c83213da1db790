"""Ctrl-C in a process of its own, and a bar that moves while images are read."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest

from qmir_ao.recipes import cli
from qmir_ao.recipes.checkpoint import read_weights
from qmir_ao.recipes.commands import train as command
from qmir_ao.recipes.console import Report

TINY = "mambair-tiny-x2"
# Runs the command line, and says on stdout when training is in its third step.
LAUNCHER = """
import sys
from qmir_ao.recipes import cli
from qmir_ao.recipes.training_module import RestorationModule

step = RestorationModule.training_step

def announced(self, batch, index):
    if index == 3:
        print("training", flush=True)
    return step(self, batch, index)

RestorationModule.training_step = announced
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for name in "abc":
        assert cv2.imwrite(str(folder / f"{name}.png"), pixels)
    return folder


def interrupt(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Start a command, press Ctrl-C while it trains; its exit code and stderr."""
    line = [sys.executable, "-c", LAUNCHER, *arguments]
    process = subprocess.Popen(
        line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("save_every", [0, 2])
def test_ctrl_c_during_training(images: Path, save_every: int) -> None:
    folder = images.parent
    line = ["train", TINY, "images", "-o", "tiny.safetensors", "--iterations", "1000000"]
    line += ["--batch", "1", "--patch", "16", "--save-every", str(save_every)]
    code, errors = interrupt(line, folder)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert not (folder / "tiny.safetensors").exists()
    left = {path.name for path in folder.iterdir()} - {"images"}
    snapshots = [name for name in left if name.endswith(".safetensors")]
    assert bool(snapshots) == bool(save_every)
    assert bool(left) == bool(save_every)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    for name in snapshots:
        assert read_weights(folder / name), "what stays is whole"


def test_ctrl_c_during_the_demo(tmp_path: Path) -> None:
    line = ["demo", "-o", "out", "--steps-w4a4", "1000000"]
    code, errors = interrupt(line, tmp_path)
    assert code == 130, errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_the_bar_moves_while_images_are_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    @contextmanager
    def recorded(label: str) -> Iterator[Report]:
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr(command, "progress", recorded)
    out = images.parent / "tiny.safetensors"
    line = ["train", TINY, str(images), "-o", str(out), "--iterations", "2", "--batch", "1"]
    assert cli.main([*line, "--patch", "16"]) == 0
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]
