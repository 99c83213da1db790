"""Carrying out recipes: what is written, and what is refused before training starts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes import cli
from qmir_ao.recipes import run as module
from qmir_ao.recipes.checkpoint import read_metadata
from qmir_ao.recipes.images import write_image
from qmir_ao.recipes.models.registry import MODELS
from qmir_ao.recipes.run import run_recipe
from qmir_ao.recipes.schema import Recipe, load_recipe

SHORT = {
    "train.iterations": 2,
    "train.batch": 1,
    "train.patch": 12,
    "train.save_every": 1,
    "train.precision": "32-true",
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3)).astype(np.uint8)
    write_image(folder / "a.png", pixels)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoising networks of a size for tests."""
    body: dict[str, Any] = {"embed_dim": 30, "depths": (1,), "d_state": 4, "expand": 1.0}
    monkeypatch.setitem(MODELS, "mambair-jpeg", {**body, "in_channels": 1})
    monkeypatch.setitem(MODELS, "mambair-denoise", body)


def recipe(name: str, images: Path, **changes: Any) -> Recipe:
    folders = {"data.train": [str(images)], "data.eval": [str(images)]}
    return load_recipe(name, {**SHORT, **folders, **changes})


def test_a_quantized_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_recipe(recipe("tiny-sr-x2", images), out)
    names = {"lowered", "recipe.yaml", "scores.json", "weights.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert [record["network"] for record in result.scores] == ["simulated", "integer"]
    assert json.loads((out / "scores.json").read_text()) == result.scores
    assert result.lowering is not None
    assert result.lowering["operators"]
    assert read_metadata(out / "weights.safetensors")["model"] == "mambair-tiny-x2"
    assert load_recipe(out / "recipe.yaml").to_dict() == recipe("tiny-sr-x2", images).to_dict()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["jpeg", "denoise"])
def test_a_float_run_of_other_tasks(name: str, images: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = run_recipe(
        recipe(name, images, quant=None),
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]
    assert result.lowering is None
    assert [(r["network"], r["task"]) for r in result.scores] == [("float", name)]
    line = ["eval", str(tmp_path / "out/weights.safetensors"), str(images), "--task", name]
    assert cli.main(line) == 0


def test_a_killed_run_goes_on(images: Path, tmp_path: Path) -> None:
    steps = {"train.iterations": 3}
    whole = run_recipe(recipe("tiny-sr-x2", images, **steps), tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe("tiny-sr-x2", images, **steps), out, progress=stop)
    with pytest.raises(ConfigError, match=r"resume it \(--resume\)"):
        run_recipe(recipe("tiny-sr-x2", images, **steps), out)
    changed = recipe("tiny-sr-x2", images, **steps, **{"train.seed": 3, "quant.act_bits": 2})
    with pytest.raises(ConfigError, match=r"quant\.act_bits \(was 4, is 2\), train\.seed"):
        run_recipe(changed, out, resume=True)
    result = run_recipe(recipe("tiny-sr-x2", images, **steps), out, resume=True)
    assert result.scores == whole.scores
    assert not (out / "checkpoints").exists()
    with pytest.raises(ConfigError, match="is finished"):
        run_recipe(recipe("tiny-sr-x2", images, **steps), out, resume=True)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tiny-sr-x2", {"data.train": []}, "no folder to train on"),
        ("light-sr-x2", {}, "starts from a trained float network"),
        ("tiny-sr-x2", {"task.scale": 3}, "enlarges 2 times .* needs 3"),
        ("tiny-sr-x2", {"train.patch": 64}, "use a smaller patch"),
        ("tiny-sr-x2", {"data.eval_inputs": []}, "1 evaluation folders and 0 of inputs"),
    ],
)
def test_bad_recipes_fail_before_training(
    name: str,
    changes: dict[str, Any],
    message: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "train_quantized", None)
    with pytest.raises(ConfigError, match=message):
        run_recipe(recipe(name, images, **changes), tmp_path / "out")


def test_bad_folders_fail_before_training(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train_quantized", None)
    (tmp_path / "empty").mkdir()
    for key in ("data.train", "data.eval"):
        with pytest.raises(ImageError, match="empty: holds no images"):
            changes = {key: [str(tmp_path / "empty")]}
            run_recipe(recipe("tiny-sr-x2", images, **changes), tmp_path / f"out-{key}")
    tests, inputs = tmp_path / "tests", tmp_path / "inputs"
    for folder, size in ((tests, (32, 32, 3)), (inputs, (16, 15, 3))):
        folder.mkdir()
        write_image(folder / "a.png", np.zeros(size, np.uint8))
    changes = {"data.eval": [str(tests)], "data.eval_inputs": [str(inputs)]}
    with pytest.raises(ImageError, match="do not match its input of 15x16"):
        run_recipe(recipe("tiny-sr-x2", images, **changes), tmp_path / "out")
    (tests / "b.png").write_bytes((tests / "a.png").read_bytes()[:50])
    with pytest.raises(ImageError, match=r"b\.png: cannot be read"):
        run_recipe(recipe("tiny-sr-x2", images, **{"data.eval": [str(tests)]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (images / "broken.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"broken\.png"):
        run_recipe(recipe("tiny-sr-x2", images), tmp_path / "out")


def test_run_from_the_command_line(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test"
    test.mkdir()
    (test / "a.png").write_bytes((images / "a.png").read_bytes())
    (images / "broken.png").write_bytes(b"broken")
    out = tmp_path / "out"
    sets = [part for key, value in SHORT.items() for part in ("--set", f"{key}={value}")]
    line = ["run", "tiny-sr-x2", "-o", str(out), "--train", str(images), "--eval", str(test), *sets]
    assert cli.main(line) == 2
    assert "broken.png" in capsys.readouterr().err
    assert cli.main([*line, "--resume", "--skip-bad-images", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [record["network"] for record in document["scores"]] == ["simulated", "integer"]
    assert document["iterations"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run tiny-sr-x3 -o out", "did you mean 'tiny-sr-x2'"),
        ("run tiny-sr-x2 -o out --set train.lr=1", "'train.lr' is unknown"),
        ("run tiny-sr-x2 -o out --set train", "must be KEY=VALUE"),
        ("run tiny-sr-x2 -o out", "no folder to train on"),
        ("recipes jpg", "did you mean 'jpeg'"),
    ],
)
def test_mistakes_exit_with_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert "light-sr-x4" in capsys.readouterr().out
    assert cli.main(["recipes", "jpeg"]) == 0
    assert "quality: 30" in capsys.readouterr().out
    assert cli.main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["denoise"]["task"] == {
        "name": "denoise",
        "sigma": 15.0,
    }
