"""The modules under preset="official" against the published code, from their first call."""

import numpy as np
import pytest
import torch
from support import oracles, tolerances
from support.paths import GOLDEN, needs_golden

from qmir_ao.quant.fake_quant import DLSFakeQuantize
from qmir_ao.quant.rfa import RFAFakeQuantize
from qmir_ao.quant.static import StaticFakeQuantize

pytestmark = needs_golden


def _load(file: str, prefix: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / file, allow_pickle=False) as data:
        return {name: torch.from_numpy(np.array(data[prefix + name])) for name in names}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["gauss", "outlier", "positive"])
def test_dls_from_its_first_training_call(kind, bits):
    golden = _load(
        "dls_official.npz", f"{kind}/{bits}/init/", ("x", "gy", "y", "gx", "w", "signed")
    )
    module = DLSFakeQuantize(bits, preset="official")
    assert torch.allclose(module.scale_weights, golden["w"][:4])
    assert torch.equal(module.shift_weights, golden["w"][4:])
    x = golden["x"].requires_grad_()
    y = module(x)
    y.backward(golden["gy"])
    assert bool(module.signed_range[0]) == bool(golden["signed"])
    flips = (y - golden["y"]).abs() > tolerances.OFFICIAL_VALUE * golden["y"].abs().max()
    assert int(flips.sum()) <= max(1, tolerances.OFFICIAL_FLIPS * y.numel())
    assert oracles.relative(x.grad, golden["gx"]) < tolerances.OFFICIAL_GRAD


@pytest.mark.parametrize("bits", [2, 4])
def test_rfa_from_its_first_call(bits):
    names = ("w", "gy", "y", "gw", "alpha", "a", "g_alpha", "g_beta", "g_a")
    golden = _load("rfa_official.npz", f"lin/{bits}/init/", names)
    module, w = RFAFakeQuantize(bits, preset="official"), golden["w"].requires_grad_()
    y = module(w)
    y.backward(golden["gy"])
    assert oracles.relative(module.step, golden["alpha"]) < tolerances.OFFICIAL_VALUE
    assert torch.equal(module.thresholds, golden["a"])
    flips = (y - golden["y"]).abs() > tolerances.OFFICIAL_VALUE
    assert float(flips.float().mean()) <= tolerances.OFFICIAL_FLIPS
    got = (w.grad, module.step.grad, module.shift.grad, module.thresholds.grad)
    for mine, name in zip(got, ("gw", "g_alpha", "g_beta", "g_a"), strict=True):
        assert oracles.relative(mine, golden[name]) < tolerances.OFFICIAL_GRAD, name


def test_static_with_the_published_parameters():
    names = ("x", "gy", "y", "gx", "alpha", "beta")
    golden = _load("variants_official.npz", "act_quant/4|", names)
    module = StaticFakeQuantize(4, preset="official", signed="always")
    with torch.no_grad():
        module.step.copy_(golden["alpha"])
        module.shift.copy_(golden["beta"])
    module.mark_initialized()
    x = golden["x"].requires_grad_()
    y = module(x)
    y.backward(golden["gy"])
    assert oracles.relative(y, golden["y"]) < tolerances.OFFICIAL_VALUE
    assert oracles.relative(x.grad, golden["gx"]) < tolerances.OFFICIAL_GRAD
