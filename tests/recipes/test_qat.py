"""Quantization-aware training: what it trains, what it leaves alone, and that it repeats."""

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qmir_ao
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.qat import LEARNING_RATE, QATResult, qat_options, train_quantized

BATCH, PATCH = 2, 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    folder = tmp_path_factory.mktemp("images")
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), axis=-1)
    assert cv2.imwrite(str(folder / "ramp.png"), pixels)
    return PatchDataset([folder], scale=2, patch=PATCH, length=BATCH * 8, seed=0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("mambair-tiny-x2").eval()


def train(model: nn.Module, dataset: PatchDataset, iterations: int, bits: int = 4) -> QATResult:
    options = qat_options(iterations, batch=BATCH, patch=PATCH)
    return train_quantized(model, dataset, options, qmir_ao.get_qmir_qconfig(bits, bits))


def parameters(result: QATResult, ending: str) -> dict[str, Tensor]:
    named = result.prepared.named_parameters()
    return {name: p.detach() for name, p in named if name.endswith(ending)}


def test_settings_are_those_of_the_paper() -> None:
    options = qat_options()
    assert options.learning_rate == LEARNING_RATE
    assert options.schedule == "steps"
    assert options.warmup == 0


def test_float_model_stays_as_it_is(model: nn.Module, dataset: PatchDataset) -> None:
    before = copy.deepcopy(model.state_dict())
    result = train(model, dataset, 2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not model.training
    assert not result.prepared.training


def test_one_loss_per_step(model: nn.Module, dataset: PatchDataset) -> None:
    seen: list[tuple[int, int]] = []
    options = qat_options(3, batch=BATCH, patch=PATCH)
    qconfig = qmir_ao.get_qmir_qconfig(4, 4)
    result = train_quantized(
        model, dataset, options, qconfig, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(result.losses) == result.training.iterations == 3
    assert all(np.isfinite(result.losses))


@pytest.mark.parametrize("ending", ["scale_weights", "shift_weights", "thresholds", "step"])
def test_quantizers_learn(ending: str, model: nn.Module, dataset: PatchDataset) -> None:
    early, late = (parameters(train(model, dataset, n), ending) for n in (1, 4))
    assert early
    assert early.keys() == late.keys()
    moved = [name for name in early if not torch.equal(early[name], late[name])]
    assert len(moved) > len(early) / 2


def test_two_runs_give_the_same_weights(model: nn.Module, dataset: PatchDataset) -> None:
    first, second = (train(model, dataset, 3, bits=2) for _ in range(2))
    assert first.losses == second.losses
    a, b = first.prepared.state_dict(), second.prepared.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_trained_network_lowers(model: nn.Module, dataset: PatchDataset, tmp_path: Path) -> None:
    lowered = qmir_ao.convert_and_lower(train(model, dataset, 2, bits=2).prepared, target="cpu")
    qmir_ao.save(lowered, tmp_path / "w2a2")
    x = torch.rand(1, 3, 19, 26)
    with torch.inference_mode():
        y = lowered(x)
        assert y.shape == (1, 3, 38, 52)
        assert torch.equal(qmir_ao.load(tmp_path / "w2a2")(x), y)
