"""Bad input through the command line: exit code 2, one line that says why, nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qmir_ao.recipes import cli
from qmir_ao.recipes.checkpoint import save_weights
from qmir_ao.recipes.images import load_image
from qmir_ao.recipes.models import create_model

TINY = "mambair-tiny-x2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 44, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    return tmp_path


@pytest.mark.parametrize("bits", ["0", "1", "9", "3.5", "four", "-4"])
@pytest.mark.parametrize("option", ["--bits", "--weight-bits", "--act-bits"])
def test_unknown_bits(
    option: str, bits: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["quantize", TINY, str(folder / "images"), "-o", str(folder / "out"), "--patch", "16"]
    assert cli.main([*line, option, bits]) == 2
    error = capsys.readouterr().err
    assert "bits" in error
    assert "Traceback" not in error
    assert [path.name for path in folder.iterdir()] == ["images"]


@pytest.mark.parametrize("mode", ["P", "1", "L", "LA", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_is_restored(mode: str, folder: Path) -> None:
    source = Image.open(folder / "images" / "a.png")
    if mode == "I;16":
        deep = np.asarray(source.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(deep)
    else:
        image = source.convert(mode)
    name = folder / ("in.tif" if mode == "CMYK" else "in.png")
    image.save(name)
    out = folder / "out.png"
    assert cli.main(["restore", str(name), str(out), "--model", TINY]) == 0
    restored = load_image(out, 3).pixels
    assert restored.shape == (80, 88, 3)
    assert (restored.dtype == np.uint16) == (mode == "I;16")


def test_weights_that_are_not_finite_restore_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = create_model(TINY)
    with torch.no_grad():
        network.conv_first.weight[0, 0, 0, 0] = float("nan")
    save_weights(network, folder / "nan.safetensors", {"model": TINY})
    out = folder / "out.png"
    line = ["restore", str(folder / "images" / "a.png"), str(out), "-m"]
    assert cli.main([*line, str(folder / "nan.safetensors")]) == 2
    assert "NaN" in capsys.readouterr().err
    assert not out.exists()
