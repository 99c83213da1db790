"""RFA fake-quantizer as a torch.ao module: sizes, guards, switches, conversion."""

import copy

import pytest
import torch
import torch.ao.quantization as ao
from torch import nn

from qmir_ao.errors import ConfigError, NonFiniteError
from qmir_ao.quant.rfa import MIN_GAP, RFAFakeQuantize


def _weight() -> torch.Tensor:
    return torch.randn(6, 4, 3, 3) * 0.1


def test_both_bases_and_arguments():
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

    module = RFAFakeQuantize.with_args(bits=2)(factory_kwargs={"device": "cpu", "dtype": None})
    assert isinstance(module, ao.FakeQuantizeBase) and isinstance(module, FakeQuantizeBase)
    assert module.thresholds.tolist() == [-2.0, -1.0, 0.0, 1.0]
    assert (module.quant_min, module.quant_max, module.ch_axis) == (-2, 1, 0)
    assert "granularity='per_channel'" in repr(module)


@pytest.mark.parametrize(
    ("preset", "granularity", "size"),
    [(None, None, 6), ("paper", None, 1), ("official", None, 1), ("paper", "per_channel", 6)],
)
def test_first_use_sizes_the_parameters(preset, granularity, size):
    module = RFAFakeQuantize(4, preset=preset, granularity=granularity)
    before = [id(p) for p in module.parameters()]
    module(_weight())
    assert module.step.shape == (size,)
    assert module.shift.shape == (1,), "one shift serves all channels"
    assert [id(p) for p in module.parameters()] == before, "an optimizer must keep its parameters"


def test_official_start_is_lsq():
    w = _weight()
    module = RFAFakeQuantize(4, preset="official")
    module(w)
    assert float(module.step.detach()) == pytest.approx(2 * float(w.abs().mean()) / 7**0.5)


def test_materialize_equals_first_use():
    w = _weight()
    first, second = RFAFakeQuantize(2), RFAFakeQuantize(2)
    first.materialize(w, 6)
    assert torch.equal(first(w), second(w))
    assert torch.equal(first.step, second.step)


def test_an_optimizer_made_early_trains_all_parameters():
    module, w = RFAFakeQuantize(4), nn.Parameter(_weight())
    optimizer = torch.optim.Adam([w, *module.parameters()], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (module(w) - 0.05).square().sum().backward()
        state = [p.detach().clone() for p in module.parameters()]
        optimizer.step()
    for before, after in zip(state, module.parameters(), strict=True):
        assert not torch.equal(before, after)


def test_state_dict_brings_its_channels():
    w = _weight()
    module = RFAFakeQuantize(4)
    module(w)
    with torch.no_grad():
        module.step.mul_(1.5)
    fresh = RFAFakeQuantize(4)
    fresh.load_state_dict(module.state_dict())
    for same in (fresh, copy.deepcopy(module)):
        assert torch.equal(same(w), module(w))
    with pytest.raises(RuntimeError, match="size mismatch"):
        RFAFakeQuantize(4, preset="paper").load_state_dict(module.state_dict())


def test_a_checkpoint_with_a_shift_for_each_channel_loads():
    w = _weight()
    module, fresh = RFAFakeQuantize(4), RFAFakeQuantize(4)
    module(w)
    saved = module.state_dict() | {"shift": torch.linspace(-0.01, 0.01, 6)}
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.shift.detach(), saved["shift"])
    assert not torch.equal(fresh(w), module(w))
    with pytest.raises(RuntimeError, match="shift 1 or as many as step; got 6 and 3"):
        fresh.load_state_dict(saved | {"shift": torch.zeros(3)})
        fresh(w)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_guard_restores_order_and_sign(bits):
    module, w = RFAFakeQuantize(bits), _weight()
    module(w)
    with torch.no_grad():
        module.thresholds[1] = module.thresholds[2]
        module.thresholds[0] = 100.0
        module.step[3] = -0.5
    y = module(w)
    assert float(module.thresholds.detach().diff().min()) >= MIN_GAP - 1e-4
    assert float(module.step.detach().min()) > 0
    assert torch.isfinite(y).all()
    settled = [p.detach().clone() for p in module.parameters()]
    module.eval()(w)
    assert all(torch.equal(a, b) for a, b in zip(settled, module.parameters(), strict=True))


def test_official_preset_is_not_guarded():
    module, w = RFAFakeQuantize(4, preset="official"), _weight()
    module(w)
    with torch.no_grad():
        module.thresholds.copy_(module.thresholds.flip(0))
        module.step.fill_(-0.1)
    kept = module.thresholds.detach().clone()
    module(w)
    assert torch.equal(module.thresholds, kept) and float(module.step.detach()) < 0


def test_one_weight_used_twice():
    module, w = RFAFakeQuantize(4), nn.Parameter(_weight())
    (module(w).sum() + module(w).square().sum()).backward()
    assert torch.isfinite(w.grad).all()


def test_switch_and_gradients():
    module, w = RFAFakeQuantize(4), nn.Parameter(_weight())
    module(w).square().sum().backward()
    assert all(p.grad is not None for p in (w, *module.parameters()))
    module.apply(ao.disable_fake_quant)
    assert module(w) is w


def test_per_channel_start_is_closer():
    w = _weight() * torch.rand(6, 1, 1, 1)
    errors = {
        name: float((RFAFakeQuantize(2, granularity=name, init="mse")(w) - w).square().sum())
        for name in ("per_channel", "per_tensor")
    }
    assert errors["per_channel"] < errors["per_tensor"]


def test_zero_weight_and_empty_weight():
    assert torch.equal(RFAFakeQuantize(4)(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert RFAFakeQuantize(4)(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight(bad):
    w = _weight()
    module = RFAFakeQuantize(4)
    module(w)
    w[0, 0, 0, 0] = bad
    for quantizer in (module, RFAFakeQuantize(4)):
        with pytest.raises(NonFiniteError):
            quantizer(w)


@pytest.mark.parametrize(
    "kwargs", [{"bits": 1}, {"granularity": "row"}, {"init": "mu3s"}, {"preset": "best"}]
)
def test_bad_settings(kwargs):
    with pytest.raises(ConfigError):
        RFAFakeQuantize(**kwargs)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.quantizer = RFAFakeQuantize(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.quantizer(self.weight))


@pytest.mark.parametrize("used", [True, False])
def test_convert_keeps_the_values(used):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, ao.FakeQuantizeBase)

    net, x = _Linear(), torch.randn(2, 8)
    expected = copy.deepcopy(net)(x)
    if used:
        net(x)
    graph = torch.fx.GraphModule(net, Tracer().trace(net))
    node = next(n for n in graph.graph.nodes if n.op == "call_module")
    net.quantizer.convert(graph, node)
    graph.graph.lint()
    graph.recompile()
    new = next(n for n in graph.graph.nodes if "rfa_fake_quant" in str(n.target))
    assert new.meta["qmir_bits"] == 4 and new.meta["qmir_source"] == "quantizer"
    assert [a.op for a in new.args[:4]] == ["get_attr"] * 4
    assert torch.equal(graph(x), expected)


def test_eager_prepare_qat_of_torch_ao():
    from qmir_ao.quant.qconfig import get_qmir_qconfig

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).train()
    model.qconfig = get_qmir_qconfig(4, 4)
    prepared = ao.prepare_qat(model)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in prepared.parameters())
    fresh = ao.prepare_qat(model)
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh.eval()(x), prepared.eval()(x))
