"""Training losses: values and gradients against float64 formulas, and as options of a run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training import SCALE, SIDE, Upscaler, Waves, settings, upscaler, without_dropout
from torch import Tensor

from qmir_ao.errors import ConfigError
from qmir_ao.recipes import cli
from qmir_ao.recipes.checkpoint import read_metadata
from qmir_ao.recipes.images import write_image
from qmir_ao.recipes.losses import CHARBONNIER_EPS, LOSSES, charbonnier_loss
from qmir_ao.recipes.qat import qat_options
from qmir_ao.recipes.schema import CONFIGS, list_recipes, load_recipe, parse_recipe
from qmir_ao.recipes.train import TrainOptions, fit

# Zero, around eps, ordinary, larger than a pixel's range, and too small to be squared in float32.
DIFFERENCES = (0.0, 1e-30, 3e-7, -1e-6, 4e-6, -0.02, 0.5, -3.0)


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    truth = torch.zeros(2, 1, 2, 2, dtype=dtype)
    restored = torch.tensor(DIFFERENCES, dtype=dtype).reshape(truth.shape)
    return restored.requires_grad_(), truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_charbonnier_is_the_published_formula(dtype: torch.dtype) -> None:
    restored, truth = pair(dtype)
    loss = charbonnier_loss(restored, truth)
    loss.backward()
    d = np.array(DIFFERENCES, np.float64)
    root = np.sqrt(d * d + 1e-12)
    close = {"rtol": 1e-6 if dtype == torch.float32 else 1e-14, "atol": 1e-14}
    assert loss.dtype == dtype and loss.shape == ()
    np.testing.assert_allclose(loss.item(), root.mean(), **close)
    assert restored.grad is not None
    np.testing.assert_allclose(restored.grad.flatten().numpy(), d / root / len(d), **close)


def test_charbonnier_passes_gradcheck() -> None:
    restored, truth = (torch.rand(2, 3, 4, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(charbonnier_loss, (restored.requires_grad_(), truth))


def test_charbonnier_is_l1_away_from_zero() -> None:
    restored, truth = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    l1 = LOSSES["l1"](restored, truth).item()
    assert l1 == pytest.approx((restored - truth).abs().mean().item())
    assert charbonnier_loss(restored, truth).item() == pytest.approx(l1, abs=2 * CHARBONNIER_EPS)
    assert charbonnier_loss(truth, truth).item() == pytest.approx(CHARBONNIER_EPS)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_minimises_the_loss_it_was_given(loss: str, precision: str) -> None:
    options = dataclasses.replace(
        settings(iterations=1, save_every=0), loss=loss, precision=precision
    )
    data, model = Waves(options.batch), without_dropout()
    low, high = (torch.stack(part) for part in zip(*map(data.__getitem__, range(2)), strict=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, precision == "bf16-mixed"):
        expected = LOSSES[loss](model(low), high).item()
    assert fit(model, data, options).loss == pytest.approx(expected, rel=1e-6)


def test_losses_that_differ_give_different_weights() -> None:
    def trained(loss: str) -> Tensor:
        options = dataclasses.replace(settings(iterations=3, save_every=0), loss=loss)
        model = without_dropout()
        assert isinstance(model, Upscaler)
        # The bilinear skip restores Flat already: differences of 1e-6, where the losses differ.
        with torch.no_grad():
            model.last.weight *= 1e-6
            model.last.bias *= 1e-6
        fit(model, Flat(6), options)
        return model.last.weight.detach()

    assert not torch.equal(trained("l1"), trained("charbonnier"))


class Flat(Waves):
    """Patches that the network's skip restores already."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((3, SIDE, SIDE), 0.5), torch.full((3, SIDE * SCALE, SIDE * SCALE), 0.5)


@pytest.mark.parametrize("loss", ["L1", "charbonier", "mse", "", None])
def test_unknown_losses_are_refused(loss: str) -> None:
    with pytest.raises(ConfigError, match=r"loss must be one of \('l1', 'charbonnier'\), got"):
        TrainOptions(loss=loss)


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_train_with_the_published_loss(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.train.loss == recipe.task.loss
    again = parse_recipe(recipe.to_yaml(), "again", name)
    assert again.train == recipe.train
    changed = load_recipe(name, {"train.loss": "l1"})
    assert parse_recipe(changed.to_yaml(), "again", name).train.loss == "l1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("loss: charbonnier", "loss: charbonier", "section train: .*must be one of .*'charbonier'"),
        ("loss: charbonnier", "los: charbonnier", r"'train\.los' is unknown; did you mean 'loss'"),
        ("loss: charbonnier", "loss: 1", r"train\.loss: input should be a valid string"),
    ],
)
def test_mistakes_in_recipes_are_named(old: str, new: str, message: str) -> None:
    text = (CONFIGS / "jpeg.yaml").read_text(encoding="utf-8")
    assert old in text
    with pytest.raises(ConfigError, match=message):
        parse_recipe(text.replace(old, new), "my.yaml")


def test_a_resumed_run_refuses_another_loss(tmp_path: Path) -> None:
    options = settings(iterations=9, save_every=2)

    def stop(done: int, total: int, loss: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    data = Waves(options.batch * options.iterations)
    with pytest.raises(KeyboardInterrupt):
        fit(upscaler(), data, options, progress=stop, checkpoint_dir=tmp_path)
    other = dataclasses.replace(options, loss="charbonnier")
    with pytest.raises(ConfigError, match=r"options\.loss is 'charbonnier' and was 'l1'"):
        fit(upscaler(), data, other, checkpoint_dir=tmp_path, resume=True)


def test_quantized_training_takes_a_loss() -> None:
    assert qat_options(5).loss == "l1"
    assert qat_options(5, loss="charbonnier").loss == "charbonnier"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 36, 3)).astype(np.uint8)
    write_image(folder / "a.png", pixels)
    whole = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("command", ["train", "quantize"])
def test_the_command_line_takes_loss_and_skips_only_when_told(
    command: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ("out.safetensors" if command == "train" else "out")
    line = [command, "mambair-tiny-x2", str(images), "-o", str(out), "--iterations", "1"]
    line += ["--batch", "1", "--patch", "12", "--save-every", "0"]
    assert cli.main([*line, "--loss", "mse"]) == 2
    assert "loss must be one of" in capsys.readouterr().err
    assert cli.main([*line, "--loss", "charbonnier"]) == 2
    assert "b.png: cannot be read" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main([*line, "--loss", "charbonnier", "--skip-bad-images", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["iterations"] == 1
    # The console breaks long lines anywhere.
    assert "b.png:cannotberead" in "".join(printed.err.split())
    if command == "train":
        assert json.loads(read_metadata(out)["options"])["loss"] == "charbonnier"
