"""DLS and static fake-quantizers as torch.ao modules."""

import copy

import pytest
import torch
import torch.ao.quantization as ao
from torch import nn

from qmir_ao.errors import ConfigError, NonFiniteError, QmirError
from qmir_ao.quant.fake_quant import DLSFakeQuantize
from qmir_ao.quant.static import StaticFakeQuantize

KINDS = [DLSFakeQuantize, StaticFakeQuantize]


def _batch() -> torch.Tensor:
    return torch.randn(3, 4, 50) * 2 + 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_both_bases(kind):
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

    assert issubclass(kind, ao.FakeQuantizeBase) and issubclass(kind, FakeQuantizeBase)
    module = kind.with_args(bits=2)()
    assert (module.bits, module.dtype) == (2, torch.int8)
    assert module.activation_post_process is not None
    assert "bits=2" in repr(module)


@pytest.mark.parametrize("kind", KINDS)
def test_first_training_batch_initialises(kind):
    module = kind(4)
    with torch.no_grad():
        module.eval()(_batch())
        assert int(module.initialized) == 0
        module.train()(torch.zeros(0, 3))
        assert int(module.initialized) == 0
        module.apply(ao.disable_observer)
        module(_batch())
        assert int(module.initialized) == 0
        module.apply(ao.enable_observer)
        module(_batch())
    assert int(module.initialized) == 1
    state = copy.deepcopy(module.state_dict())
    module(_batch() * 7)
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())


def test_usable_before_any_data():
    x = torch.randn(2, 5000)
    y = DLSFakeQuantize(2).eval()(x)
    assert float((y - x).square().mean()) < 0.13


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_input_and_parameters(kind):
    module, x = kind(4), _batch().requires_grad_()
    module(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_switching_off_passes_values_through(kind):
    module, x = kind(4), _batch()
    module(x)
    module.apply(ao.disable_fake_quant)
    assert module(x) is x
    module.apply(ao.enable_fake_quant)
    assert not torch.equal(module(x), x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("disabled", [False, True])
def test_state_dict_and_deepcopy(kind, disabled):
    module, x = kind(4, signed="auto"), _batch()
    module(x)
    if disabled:
        module.apply(ao.disable_fake_quant)
    other = kind(4, signed="auto")
    other.load_state_dict(module.state_dict())
    for same in (other, copy.deepcopy(module)):
        assert torch.equal(same(x), module(x))
        assert (same.quant_min, same.quant_max) == (module.quant_min, module.quant_max)
    other.train()(x * 100)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input(kind, bad):
    module, x = kind(4), _batch()
    x[1, 2, 3] = bad
    for mode in (True, False):
        with pytest.raises(NonFiniteError):
            module.train(mode)(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [0, 1, 9, 3.5, True, "4"])
def test_bad_bits(kind, bits):
    with pytest.raises(ConfigError):
        kind(bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", ["preset", "init", "signed"])
def test_bad_names(kind, setting):
    with pytest.raises(ConfigError, match=f"{setting}='best' is unknown; allowed: "):
        kind(4, **{setting: "best"})


def test_official_preset_settings_and_sign():
    module = DLSFakeQuantize(4, preset="official")
    assert (module.per_tensor, module.cap, module.clamp_output) == (True, True, True)
    positive = torch.rand(2, 30)
    module.eval()(positive - 0.5)
    assert (module.quant_min, module.quant_max) == (0, 15)
    module.train()(positive)
    module(positive - 0.5)
    assert (module.quant_min, module.quant_max) == (0, 15), "the first batch decides for ever"
    signed = DLSFakeQuantize(4, preset="official")
    signed(positive - 0.5)
    assert (signed.quant_min, signed.quant_max) == (-8, 7)
    assert signed.scale_weights.tolist() == pytest.approx([1 / 7, 3 / 7, 0, 0])


def test_paper_preset_needs_no_data():
    module = DLSFakeQuantize(4, preset="paper")
    assert int(module.initialized) == 1 and not (module.cap or module.clamp_output)
    assert DLSFakeQuantize(4, preset="paper", init="minmax").init == "minmax"


@pytest.mark.parametrize("bits", [2, 4])
def test_a_constant_operand_keeps_its_sign(bits):
    a = -torch.exp(torch.log(torch.arange(1, 17).float())).repeat(12, 1)
    module = DLSFakeQuantize(bits, constant=True)
    y = module(a)
    assert float(y.max()) < 0 and float(y.min()) >= float(a.min())
    later = DLSFakeQuantize(bits)
    later.make_constant()
    assert torch.equal(later(a), y)


def test_samples_are_independent_by_default():
    module, x = DLSFakeQuantize(4), _batch()
    module(x)
    assert torch.equal(module(x)[:1], module(x[:1]))
    shared = DLSFakeQuantize(4, per_tensor=True)
    shared(x)
    assert not torch.equal(shared(x)[:1], shared(x[:1]))


def test_there_are_no_static_qparams():
    with pytest.raises(QmirError, match="no static scale"):
        DLSFakeQuantize(4).calculate_qparams()


def test_static_qparams_and_guard():
    module, x = StaticFakeQuantize(4), _batch()
    module(x)
    scale, zero_point = module.calculate_qparams()
    codes = module(x) / scale + zero_point
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    with torch.no_grad():
        module.step.fill_(-1.0)
        module(x)
    assert float(module.step.detach()) > 0
    free = StaticFakeQuantize(4, preset="official")
    free(x)
    with torch.no_grad():
        free.step.fill_(-1.0)
        free(x)
    assert float(free.step.detach()) == -1.0


def test_static_mse_init_is_better_than_lsq():
    x = torch.nn.functional.silu(torch.randn(2, 4000) * 2)
    errors = []
    for init in ("mse", "lsq"):
        module = StaticFakeQuantize(2, init=init, signed="always")
        errors.append(float((module(x) - x).square().mean()))
    assert errors[0] < errors[1]


class _Net(nn.Module):
    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.scale = nn.Parameter(-torch.rand(5, 7) - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantizer(x)


class _ConstantNet(_Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.quantizer(self.scale)


def _converted(net: nn.Module) -> tuple[torch.fx.GraphModule, list[str]]:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, ao.FakeQuantizeBase)

    graph = torch.fx.GraphModule(net, Tracer().trace(net))
    node = next(n for n in graph.graph.nodes if n.op == "call_module")
    node.meta["val"] = "kept"
    graph.get_submodule(node.target).convert(graph, node)
    graph.graph.lint()
    graph.recompile()
    graph.delete_all_unused_submodules()
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    return graph, names


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: DLSFakeQuantize(4), ["dls_qparams", "getitem", "getitem", "dls_quantize"]),
        (lambda: DLSFakeQuantize(4, preset="paper"), ["dls_qparams", "getitem", "getitem"]),
        (lambda: DLSFakeQuantize(4, preset="official"), ["dls_fake_quant"]),
        (lambda: StaticFakeQuantize(4), ["dls_quantize", "dls_dequantize"]),
        (lambda: StaticFakeQuantize(8, signed="always"), ["dls_quantize", "dls_dequantize"]),
    ],
)
def test_convert_keeps_the_values(make, wanted):
    net, x = _Net(make()), _batch()
    net(x)
    before = net.eval()(x)
    graph, names = _converted(net)
    assert torch.equal(graph(x), before)
    assert all(part in name for part, name in zip(wanted, names, strict=False))
    last = next(n for n in reversed(graph.graph.nodes) if n.op == "call_function")
    assert last.meta["val"] == "kept" and last.meta["qmir_source"] == "quantizer"
    assert not any(n.op == "call_module" for n in graph.graph.nodes)


def test_convert_of_unsigned_eight_bits_stays_fake_quant():
    net, x = _Net(DLSFakeQuantize(8, signed="auto")), torch.rand(2, 30)
    net(x)
    graph, names = _converted(net)
    assert len(names) == 1 and "dls_fake_quant" in names[0]
    assert torch.equal(graph(x), net.eval()(x))


def test_convert_of_a_constant_operand_stays_fake_quant():
    for make in (lambda: DLSFakeQuantize(4, constant=True), lambda: DLSFakeQuantize(4)):
        net, x = _ConstantNet(make()), torch.randn(5, 7)
        net(x)
        graph, names = _converted(net)
        assert torch.equal(graph(x), net.eval()(x))
        assert any("dls_fake_quant" in n for n in names)


@pytest.mark.parametrize("kind", KINDS)
def test_convert_of_a_switched_off_quantizer_vanishes(kind):
    net, x = _Net(kind(4)), _batch()
    net(x)
    net.apply(ao.disable_fake_quant)
    graph, names = _converted(net)
    assert names == [] and torch.equal(graph(x), x)


def test_compiles_in_one_graph():
    module, x = nn.Sequential(DLSFakeQuantize(4), StaticFakeQuantize(4)), _batch()
    module(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).sum().backward()
    assert torch.equal(compiled(x), module(x))
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, module.parameters(), strict=True))
