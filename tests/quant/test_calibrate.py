"""Post-training quantization: observers, calibration, and what it refuses."""

import pytest
import torch
from support.models import ConvNet, ScanNet

import qmir_ao
from qmir_ao.errors import ConfigError, UnsupportedGraph
from qmir_ao.quant._bases import CALIBRATION_ROWS, CALIBRATION_VALUES
from qmir_ao.quant.fake_quant import DLSFakeQuantize
from qmir_ao.quant.rivals.activations import QuantSRFakeQuantize
from qmir_ao.quant.static import StaticFakeQuantize

INITS = ("minmax", "percentile", "mse")


def _batches(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 9, 7) for _ in range(count)]


def _static(init: str, bits: int = 8):
    return qmir_ao.get_qmir_qconfig(bits, bits, activation="static", weight="lsq", init=init)


@pytest.mark.parametrize("init", INITS)
def test_observers_keep_the_network(init):
    torch.manual_seed(1)
    model, batches = ConvNet().eval(), _batches()
    prepared = qmir_ao.prepare_ptq(model, _static(init))
    assert not prepared.training
    assert qmir_ao.calibrate(prepared, batches) is prepared
    lowered = qmir_ao.convert_and_lower(prepared)
    want = model(batches[0])
    noise = (lowered(batches[0]) - want).square().mean() / want.square().mean()
    assert float(noise) < 1e-3
    assert all(r["acc_equal"] for r in qmir_ao.compare(prepared, lowered, batches[0]))


def test_minmax_is_exact_over_all_batches():
    fake = StaticFakeQuantize(8, init="minmax")
    fake.begin_calibration()
    torch.manual_seed(0)
    # More values than are kept: the ends must not be lost to sampling.
    batches = [torch.randn(40, 1000) for _ in range(5)]
    for batch in batches:
        assert fake(batch) is batch
    assert fake.finish_calibration()
    low = min(float(b.min()) for b in batches)
    high = max(float(b.max()) for b in batches)
    step, shift = float(fake.step.detach()), float(fake.shift.detach())
    assert step * fake.quant_min - shift == pytest.approx(low, abs=1e-4)
    assert step * fake.quant_max - shift == pytest.approx(high, abs=1e-4)


def test_minmax_keeps_the_ends_of_a_batch_long_gone():
    fake = StaticFakeQuantize(8, init="minmax")
    fake.begin_calibration()
    torch.manual_seed(0)
    for index in range(CALIBRATION_ROWS * 8):
        batch = torch.randn(50)
        if index == 1:
            batch[:2] = torch.tensor([-1e3, 3e3])
        fake(batch)
    assert max(float(row.abs().max()) for row in fake._rows) < 1e3, "the sample keeps it anyway"
    assert fake.finish_calibration()
    step, shift = float(fake.step.detach()), float(fake.shift.detach())
    assert step * fake.quant_min - shift == pytest.approx(-1e3, rel=1e-5)
    assert step * fake.quant_max - shift == pytest.approx(3e3, rel=1e-5)


def test_a_calibrated_quantsr_has_its_thresholds():
    prepared = qmir_ao.prepare_ptq(ConvNet(), qmir_ao.get_qmir_qconfig(4, 4, activation="quantsr"))
    qmir_ao.calibrate(prepared, _batches())
    found = {n: m for n, m in prepared.named_modules() if isinstance(m, QuantSRFakeQuantize)}
    sizes = [m.tau.numel() for m in found.values() if m.channel_dim is not None]
    assert sizes and min(sizes) > 1
    prepared.train()(_batches(1)[0]).square().mean().backward()
    learned = [m.tau for m in found.values() if m.channel_dim is not None]
    assert all(tau.grad is not None and tau.grad.shape == tau.shape for tau in learned)


def test_percentile_ignores_an_outlier_that_minmax_follows():
    torch.manual_seed(0)
    x = torch.randn(8000)
    x[17] = 1e4
    steps = {}
    for init in INITS:
        fake = StaticFakeQuantize(8, init=init)
        fake.begin_calibration()
        fake(x)
        fake.finish_calibration()
        steps[init] = float(fake.step.detach())
    assert steps["percentile"] < 0.1 < 10 < steps["minmax"]


def test_dls_and_rfa_start_from_calibration_alone():
    torch.manual_seed(1)
    model = ScanNet().eval()
    batches = [torch.randn(2, 4, 30) for _ in range(4)]
    prepared = qmir_ao.prepare_ptq(model, qmir_ao.get_qmir_qconfig(8, 8))
    before = {n: p.clone() for n, p in prepared.named_parameters() if "_weights" in n}
    qmir_ao.calibrate(prepared, batches)
    after = {n: p for n, p in prepared.named_parameters() if "_weights" in n}
    assert any(not torch.equal(before[n], after[n]) for n in before)
    lowered = qmir_ao.convert_and_lower(prepared)
    want = model(batches[0])
    noise = (lowered(batches[0]) - want).square().mean() / want.square().mean()
    assert float(noise) < 1e-2


def test_memory_of_a_calibration_is_bounded():
    fake = DLSFakeQuantize(4)
    fake.begin_calibration()
    for _ in range(CALIBRATION_ROWS):
        fake(torch.randn(3, CALIBRATION_VALUES * 2 + 5))
    assert len(fake._rows) == CALIBRATION_ROWS
    assert max(row.numel() for row in fake._rows) <= CALIBRATION_VALUES
    assert fake.finish_calibration() and not fake._rows
    assert int(fake.initialized) == 1


def test_equal_data_gives_equal_quantizers():
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        prepared = qmir_ao.prepare_ptq(ConvNet(), _static("mse", 4))
        qmir_ao.calibrate(prepared, _batches(70))
        states.append(prepared.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_loader_of_pairs_and_progress():
    prepared = qmir_ao.prepare_ptq(ConvNet(), _static("mse"))
    seen: list[int] = []
    qmir_ao.calibrate(prepared, [(x, x) for x in _batches()], progress=seen.append)
    assert seen == [1, 2, 3]


def test_refusals():
    prepared = qmir_ao.prepare_ptq(ConvNet(), _static("mse"))
    with pytest.raises(ConfigError, match="no batch"):
        qmir_ao.calibrate(prepared, [])
    with pytest.raises(ConfigError, match="must be a tensor"):
        qmir_ao.calibrate(prepared, ["image.png"])
    with pytest.raises(ConfigError, match="no data reached"):
        qmir_ao.calibrate(prepared, [torch.zeros(0, 3, 8, 8)])
    with pytest.raises(qmir_ao.QmirError, match=r"qmir_ao\.calibrate"):
        qmir_ao.convert_and_lower(prepared)
    plain = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedGraph, match="prepare_ptq"):
        qmir_ao.calibrate(plain, [torch.zeros(1, 2)])


def test_quantizers_work_again_after_a_failed_calibration():
    prepared = qmir_ao.prepare_ptq(ConvNet(), _static("mse"))
    with pytest.raises(ConfigError):
        qmir_ao.calibrate(prepared, [*_batches(1), None])
    weights = [m for m in prepared.modules() if getattr(m, "quantizes_weights", False)]
    assert weights and all(m._quantizing for m in weights)
    assert not any(getattr(m, "_calibrating", False) for m in prepared.modules())
