"""Training: reproducible, honest about failure, nothing half-written."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import Waves, settings, upscaler
from torch import Tensor, nn

from qmir_ao.errors import CheckpointError, ConfigError, ImageError, NonFiniteError
from qmir_ao.recipes import train as module
from qmir_ao.recipes.checkpoint import read_metadata, read_weights
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.images import write_image
from qmir_ao.recipes.train import TrainOptions, fit, train
from qmir_ao.recipes.training_module import learning_rate_factor

QUICK = TrainOptions(iterations=3, batch=2, patch=8, warmup=1, save_every=2, seed=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    y, x = np.mgrid[:40, :48]
    for index in range(2):
        waves = np.stack([np.sin(x / (3 + index)), np.cos(y / 4), np.sin((x + y) / 6)], axis=2)
        write_image(path / f"{index}.png", (127 + 100 * waves).astype(np.uint8))
    return path


def test_two_runs_with_one_seed_give_equal_weights(folder: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int, float]] = []
    read: list[tuple[int, int]] = []
    first = train(
        "mambair-tiny-x2",
        [folder],
        tmp_path / "a.safetensors",
        QUICK,
        eval_folder=folder,
        command="qmir train ...",
        loading=lambda *step: read.append(step),
        progress=lambda *step: steps.append(step),
    )
    train("mambair-tiny-x2", [folder], tmp_path / "b.safetensors", QUICK)
    a, b = (read_weights(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)] and read == [(1, 2), (2, 2)]
    assert first.iterations == 3 and first.loss == steps[-1][2] and first.evaluation is not None
    facts = read_metadata(tmp_path / "a.safetensors")
    assert facts["model"] == "mambair-tiny-x2" and facts["command"] == "qmir train ..."
    assert json.loads(facts["options"]) == QUICK.to_dict() == dataclasses.asdict(QUICK)
    assert json.loads(facts["evaluation"])["psnr"] == first.evaluation.mean("psnr")
    assert not list(tmp_path.glob("*.snapshot.safetensors"))


def test_bad_test_images_are_refused_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fit", None)
    out, tests, inputs = (tmp_path / name for name in ("a.safetensors", "tests", "inputs"))
    tests.mkdir()
    inputs.mkdir()
    with pytest.raises(ImageError, match="holds no images"):
        train("mambair-tiny-x2", [folder], out, QUICK, eval_folder=tests)
    write_image(tests / "a.png", np.zeros((32, 32, 3), np.uint8))
    write_image(inputs / "a.png", np.zeros((16, 15, 3), np.uint8))
    with pytest.raises(ImageError, match=r"a\.png: 32x32 pixels do not match its input of 15x16"):
        train("mambair-tiny-x2", [folder], out, QUICK, eval_folder=tests, eval_low_folder=inputs)
    (tests / "b.png").write_bytes((tests / "a.png").read_bytes()[:60])
    with pytest.raises(ImageError, match=r"b\.png: cannot be read"):
        train("mambair-tiny-x2", [folder], out, QUICK, eval_folder=tests)


def test_weights_are_saved_before_they_are_scored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **more: Any) -> None:
        raise ImageError("gone")

    out = tmp_path / "a.safetensors"
    with monkeypatch.context() as patched, pytest.raises(ImageError, match="gone"):
        patched.setattr(module, "evaluate", fails)
        train("mambair-tiny-x2", [folder], out, QUICK, eval_folder=folder)
    assert "evaluation" not in read_metadata(out)
    train("mambair-tiny-x2", [folder], out, QUICK, eval_folder=folder)
    assert "psnr" in json.loads(read_metadata(out)["evaluation"])


class Scale(nn.Module):
    """Bilinear enlargement times a learned factor."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2, mode="bilinear") * self.factor


def dataset(folder: Path, options: TrainOptions) -> PatchDataset:
    length = options.batch * options.iterations
    return PatchDataset([folder], scale=2, patch=8, length=length, seed=0)


def test_fit_learns(folder: Path) -> None:
    options = TrainOptions(iterations=60, batch=2, patch=8, learning_rate=0.05, warmup=2)
    model = Scale(0.3)
    result = fit(model, dataset(folder, options), options)
    assert result.iterations == 60
    assert model.factor.item() == pytest.approx(1.0, abs=0.05)


def test_snapshots_are_written_while_training(folder: Path, tmp_path: Path) -> None:
    model, snapshot = Scale(0.5), tmp_path / "s.safetensors"
    fit(model, dataset(folder, QUICK), QUICK, snapshot=snapshot)
    assert read_metadata(snapshot)["iterations"] == "2"
    assert read_weights(snapshot)["factor"] != model.factor.detach()


def test_time_limit_stops_early(folder: Path) -> None:
    options = dataclasses.replace(QUICK, iterations=10_000, max_minutes=1e-4)
    assert fit(Scale(0.5), dataset(folder, options), options).iterations < 10_000


def test_interrupt_reaches_the_caller(folder: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train("mambair-tiny-x2", [folder], out, QUICK, progress=interrupt)
    assert not out.exists()


def test_termination_ends_with_its_own_code(folder: Path, tmp_path: Path) -> None:
    def terminate(done: int, total: int, loss: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "a.safetensors"
    with pytest.raises(SystemExit) as caught:
        train("mambair-tiny-x2", [folder], out, QUICK, progress=terminate)
    assert caught.value.code == 143
    assert not out.exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_non_finite_loss_stops(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        fit(Scale(math.nan), dataset(folder, QUICK), QUICK)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"batch": -1}, "batch"),
        ({"patch": 4}, "patch"),
        ({"warmup": -1}, "warmup"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"schedule": "linear"}, "schedule"),
        ({"clip": -1.0}, r"clip must be at least 0, got -1\.0"),
        ({"seed": -3}, "seed must be at least 0, got -3"),
        ({"save_every": -1}, "save_every must be at least 0, got -1"),
        ({"max_minutes": 0.0}, "max_minutes"),
        ({"precision": "16-mixed"}, "precision must be one of"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1, got 1.0"),
        ({"ema": math.nan}, "ema"),
        ({"distill": -1.0}, "distill"),
        ({"distill": math.inf}, "distill"),
    ],
    ids=str,
)
def test_bad_options_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        TrainOptions(**changes)


def test_bad_targets_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "a.pth", tmp_path / "absent" / "a.safetensors"):
        with pytest.raises(ConfigError, match="output must be"):
            train("mambair-tiny-x2", [folder], out, QUICK)
    out = tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match="did you mean"):
        train("mambair-tiny-x3", [folder], out, QUICK)
    with pytest.raises(ConfigError, match="super-resolution only"):
        train("mambair-denoise", [folder], out, QUICK)
    with pytest.raises(CheckpointError, match="no such file"):
        train("mambair-tiny-x2", [folder], out, QUICK, start=tmp_path / "absent.pth")
    assert not out.exists()


def test_training_starts_from_given_weights(folder: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    still = dataclasses.replace(QUICK, iterations=1, learning_rate=1e-12)
    train("mambair-tiny-x2", [folder], a, QUICK)
    train("mambair-tiny-x2", [folder], b, dataclasses.replace(still, seed=9), start=a)
    before, after = read_weights(a), read_weights(b)
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_schedules() -> None:
    cosine = [learning_rate_factor(step, 100, 4, "cosine") for step in range(101)]
    assert cosine[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert cosine[4] == 1.0 and cosine[52] == pytest.approx(0.5) and cosine[100] == 0.0
    steps = [learning_rate_factor(step, 32, 0, "steps") for step in (0, 15, 16, 24, 28, 30, 31)]
    assert steps == [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.0625]


def test_gradients_are_clipped(folder: Path) -> None:
    def norms(clip: float) -> list[float]:
        options, found = dataclasses.replace(QUICK, clip=clip), []
        model = Scale(0.3)

        def note(done: int, total: int, loss: float) -> None:
            assert model.factor.grad is not None
            found.append(abs(float(model.factor.grad)))

        fit(model, dataset(folder, options), options, progress=note)
        return found

    assert min(norms(0.0)) > 1e-3
    assert norms(1e-4) == [pytest.approx(1e-4, rel=1e-2)] * QUICK.iterations


@pytest.mark.parametrize("bits", [None, 4], ids=["float", "w4a4"])
def test_averaged_weights_are_the_result(bits: int | None) -> None:
    options = dataclasses.replace(settings(iterations=6, save_every=0), ema=0.7, learning_rate=0.01)
    model = upscaler(bits)
    seen: list[dict[str, Tensor]] = []

    def keep(done: int, total: int, loss: float) -> None:
        seen.append({key: value.detach().clone() for key, value in model.state_dict().items()})

    fit(model, Waves(12), options, progress=keep)
    averaged, expected = {name for name, _ in model.named_parameters()}, dict(seen[0])
    for state in seen[1:]:
        for key in averaged:
            expected[key] = 0.7 * expected[key] + 0.3 * state[key]
    for key, value in model.state_dict().items():
        if key in averaged:
            torch.testing.assert_close(value, expected[key])
        else:
            assert torch.equal(value, seen[-1][key]), key
        if key.endswith("thresholds"):
            assert (value.diff() > 0).all()
        if key.endswith("step"):
            assert (value > 0).all()
    assert any(not torch.equal(seen[-1][key], model.state_dict()[key]) for key in averaged)


def test_curves_are_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = dataclasses.replace(settings(iterations=20, save_every=0), log_dir=tmp_path / "log")
    fit(upscaler(), Waves(40), options)
    curves = EventAccumulator(str(tmp_path / "log"))
    curves.Reload()
    assert {"loss", "lr-Adam"} <= set(curves.Tags()["scalars"])
    assert [point.step for point in curves.Scalars("loss")] == [9, 19]
    assert all(math.isfinite(point.value) for point in curves.Scalars("loss"))


def test_the_teacher_counts_in_the_loss(folder: Path) -> None:
    options = dataclasses.replace(QUICK, iterations=1, distill=2.0)
    data, losses = dataset(folder, options), []
    teacher = Scale(0.8)
    with torch.no_grad():
        low, high = (torch.stack(part) for part in zip(data[0], data[1], strict=True))
        student = Scale(0.3)(low)
        expected = (student - high).abs().mean() + 2 * (student - teacher(low)).abs().mean()
    fit(
        Scale(0.3),
        data,
        options,
        teacher=teacher,
        progress=lambda done, total, loss: losses.append(loss),
    )
    assert losses == [pytest.approx(expected.item())]
    assert teacher.factor.grad is None and teacher.factor == 0.8 and teacher.training


def test_distillation_needs_a_teacher(folder: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(QUICK, distill=1.0)
    with pytest.raises(ConfigError, match=r"distill=1\.0 needs a teacher"):
        fit(Scale(0.3), dataset(folder, options), options)
    with pytest.raises(ConfigError, match=r"distill=0\.0 is without a teacher"):
        fit(Scale(0.3), dataset(folder, QUICK), QUICK, teacher=Scale(1.0))
    with pytest.raises(ConfigError, match="has no teacher in float training"):
        train("mambair-tiny-x2", [folder], tmp_path / "a.safetensors", options)
