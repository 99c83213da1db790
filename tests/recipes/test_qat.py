"""Quantization-aware training: what it trains, what it leaves alone, and that it repeats."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import upscaler, write_ramp
from torch import Tensor, nn

import qmir_ao
from qmir_ao import DLSFakeQuantize, RFAFakeQuantize
from qmir_ao.errors import ConfigError
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.preparation import initialize_quantizers, quantizers
from qmir_ao.recipes.qat import LEARNING_RATE, QATResult, qat_options, train_quantized

BATCH, PATCH = 2, 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    folder = tmp_path_factory.mktemp("images")
    write_ramp(folder, 48)
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


def test_mixed_precision_leaves_quantizers_in_float32(
    model: nn.Module, dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, dtypes = set(), set()
    for kind in (DLSFakeQuantize, RFAFakeQuantize):
        forward = kind.forward

        def watched(self: nn.Module, x: Tensor, forward: Any = forward) -> Tensor:
            y: Tensor = forward(self, x)
            inputs.add(x.dtype)
            dtypes.add(y.dtype)
            return y

        monkeypatch.setattr(kind, "forward", watched)
    matrix = nn.Linear.forward
    products = set()

    def product(self: nn.Linear, x: Tensor) -> Tensor:
        y = matrix(self, x)
        products.add(y.dtype)
        return y

    monkeypatch.setattr(nn.Linear, "forward", product)
    options = dataclasses.replace(
        qat_options(3, batch=BATCH, patch=PATCH), precision="bf16-mixed", distill=0.5
    )
    result = train_quantized(model, dataset, options, qmir_ao.get_qmir_qconfig(4, 4))
    assert all(np.isfinite(result.losses))
    assert inputs == dtypes == {torch.float32}
    assert torch.bfloat16 in products
    assert {p.dtype for p in result.prepared.parameters()} == {torch.float32}
    assert not any(module._forward_pre_hooks for module in result.prepared.modules())


def test_distillation_moves_the_student_to_the_teacher(
    model: nn.Module, dataset: PatchDataset
) -> None:
    options = dataclasses.replace(qat_options(8, batch=BATCH, patch=PATCH), distill=10.0)
    qconfig = qmir_ao.get_qmir_qconfig(2, 2)
    plain = train(model, dataset, 8, bits=2).prepared
    taught = train_quantized(model, dataset, options, qconfig).prepared
    low = torch.stack([dataset[index][0] for index in range(4)])
    with torch.no_grad():
        near, far = (float((student(low) - model(low)).abs().mean()) for student in (taught, plain))
    assert near < far


def test_quantizers_are_ready_before_anything_copies_them(
    model: nn.Module, dataset: PatchDataset
) -> None:
    prepared = qmir_ao.prepare_qat(model, qmir_ao.get_qmir_qconfig(4, 4))
    low = torch.stack([dataset[index][0] for index in range(2)])
    waiting = [m for m in quantizers(prepared).values() if not m.initialized.all()]
    assert waiting
    random_state = torch.get_rng_state()
    initialize_quantizers(prepared, low)
    assert all(m.initialized.all() for m in quantizers(prepared).values())
    assert torch.equal(torch.get_rng_state(), random_state)
    channels = [m.step.numel() for m in quantizers(prepared).values() if hasattr(m, "thresholds")]
    assert max(channels) > 1
    before = copy.deepcopy(prepared.state_dict())
    initialize_quantizers(prepared, low + 1)
    assert all(torch.equal(before[key], value) for key, value in prepared.state_dict().items())


def test_normalisation_statistics_are_not_counted_twice() -> None:
    prepared = upscaler(bits=4)
    prepared.add_module("norm", nn.BatchNorm2d(3))
    prepared.norm.register_forward_pre_hook(lambda module, inputs: None)
    start = prepared.norm.running_mean.clone()
    network = nn.Sequential(prepared.norm, prepared)
    initialize_quantizers(network, torch.rand(2, 3, 8, 8))
    assert torch.equal(prepared.norm.running_mean, start)
    assert int(prepared.norm.num_batches_tracked) == 0


def test_training_resumes_and_refuses_another_teacher(
    model: nn.Module, dataset: PatchDataset, tmp_path: Path
) -> None:
    options = dataclasses.replace(
        qat_options(4, batch=BATCH, patch=PATCH), save_every=2, distill=1.0
    )
    qconfig = qmir_ao.get_qmir_qconfig(4, 4)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise InterruptedError

    whole = train_quantized(model, dataset, options, qconfig)
    with pytest.raises(InterruptedError):
        train_quantized(model, dataset, options, qconfig, progress=stop, checkpoint_dir=tmp_path)
    other = create_model("mambair-tiny-x2")
    with pytest.raises(ConfigError, match=r"recipe\.float weights"):
        train_quantized(other, dataset, options, qconfig, checkpoint_dir=tmp_path, resume=True)
    resumed = train_quantized(
        model, dataset, options, qconfig, checkpoint_dir=tmp_path, resume=True
    )
    assert resumed.losses == whole.losses[2:]
    a, b = whole.prepared.state_dict(), resumed.prepared.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_trained_network_lowers(model: nn.Module, dataset: PatchDataset, tmp_path: Path) -> None:
    lowered = qmir_ao.convert_and_lower(train(model, dataset, 2, bits=2).prepared, target="cpu")
    qmir_ao.save(lowered, tmp_path / "w2a2")
    x = torch.rand(1, 3, 19, 26)
    with torch.inference_mode():
        y = lowered(x)
        assert y.shape == (1, 3, 38, 52)
        assert torch.equal(qmir_ao.load(tmp_path / "w2a2")(x), y)
