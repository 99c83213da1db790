"""A MambaIR block with the published placement and preset, against the published numbers."""

import numpy as np
import pytest
import torch
from support.paths import GOLDEN, needs_golden
from support.tolerances import OFFICIAL_FLIPS, OFFICIAL_GRAD

import qmir_ao
from qmir_ao.recipes.models.mambair import VSSBlock

ROWS, COLUMNS, CHANNELS = 9, 7, 32


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "mambair_block_official.npz") as file:
        numeric = {k: file[k] for k in file if file[k].dtype.kind in "fiub"}
    return {k: torch.from_numpy(v) for k, v in numeric.items()}


@pytest.fixture(scope="module")
def prepared(golden: dict[str, torch.Tensor]) -> torch.fx.GraphModule:
    block = VSSBlock(CHANNELS, d_state=4, expand=1.5, light=True)
    weights = {
        k.removeprefix("q4|sd|"): v
        for k, v in golden.items()
        if k.startswith("q4|sd|") and "quant" not in k and "_q." not in k
    }
    block.load_state_dict(weights)
    qconfig = qmir_ao.get_qmir_qconfig(4, 4, preset="official")
    x = golden["fp|x"].reshape(2, ROWS, COLUMNS, CHANNELS)
    return qmir_ao.prepare_qat(block, qconfig, (x,), placement="official")


@needs_golden
def test_placement_is_the_published_one(prepared: torch.fx.GraphModule) -> None:
    kinds = [type(m).__name__ for m in prepared.modules()]
    assert kinds.count("DLSFakeQuantize") == 8
    assert kinds.count("StaticFakeQuantize") == 8
    assert kinds.count("RFAFakeQuantize") == 9


@needs_golden
def test_training_forward_and_gradients_equal_the_published_ones(
    prepared: torch.fx.GraphModule, golden: dict[str, torch.Tensor]
) -> None:
    x = golden["fp|x"].reshape(2, ROWS, COLUMNS, CHANNELS).clone().requires_grad_()
    y = prepared(x)
    want = golden["q4|y"].reshape(y.shape)
    off = (y - want).abs() > 1e-4 * want.abs().max()
    assert off.float().mean() <= OFFICIAL_FLIPS
    y.backward(golden["fp|gy"].reshape(y.shape))
    assert (x.grad - golden["q4|gx"].reshape(x.shape)).norm() <= (
        OFFICIAL_GRAD * golden["q4|gx"].norm()
    )
    named = dict(prepared.named_parameters())
    compared = 0
    for key, theirs in golden.items():
        name = key.removeprefix("q4|grads|")
        if key.startswith("q4|grads|") and name in named:
            ours = named[name].grad
            assert (ours - theirs).norm() <= OFFICIAL_GRAD * theirs.norm() + 1e-6, name
            compared += 1
    assert compared > 20
