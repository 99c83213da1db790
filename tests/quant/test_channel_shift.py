"""The channel shift of DLS: what it removes, and how lowering turns it into biases."""

import pytest
import torch
from support.lowering import check_operators
from support.models import train_step
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping

import qmir_ao
from qmir_ao.quant.fake_quant import DLSFakeQuantize


def _attached(kind: str, bits: int = 2, **settings) -> DLSFakeQuantize:
    module = DLSFakeQuantize(bits, per_token=False, **settings).train()
    module.attach({kind})
    return module


def test_levels_are_not_spent_on_channel_means():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 30, 30) * 0.1 + torch.linspace(-3, 3, 8).reshape(1, 8, 1, 1)
    errors = {}
    for shifted in (False, True):
        module = _attached("conv", channel_shift=shifted)
        with torch.no_grad():
            errors[shifted] = float((module(x) - x).square().mean())
    assert errors[True] < 0.05 * errors[False]


@pytest.mark.parametrize(("kind", "axis"), [("conv", 1), ("linear", -1)])
def test_starts_at_the_negative_channel_mean(kind, axis):
    torch.manual_seed(0)
    x, module = torch.randn(3, 5, 6, 7), _attached(kind, 4)
    module(x)
    others = [i for i in range(4) if i != axis % 4]
    assert torch.allclose(module.channel_shift, -x.mean(others), atol=1e-6)
    assert int(module.initialized) == 1
    y = module(x)
    y.square().sum().backward()
    assert module.channel_shift.grad is not None


def test_absent_where_a_scan_reads_along_and_in_the_presets():
    for kinds in ({"conv", "selective_scan"}, {"selective_scan"}, set()):
        module = DLSFakeQuantize(4)
        module.attach(kinds)
        assert module.channel_shift is None
    for preset in ("paper", "official"):
        module = DLSFakeQuantize(4, preset=preset)
        module.attach({"linear"})
        assert module.channel_shift is None and not module.tokens


def test_a_named_preset_waits_for_the_means_and_a_checkpoint_brings_them():
    x = torch.randn(2, 6, 5) + 4
    module = _attached("linear", 4, init="mu3s")
    assert int(module.initialized) == 0
    module(x)
    assert int(module.initialized) == 1
    fresh = _attached("linear", 4, init="mu3s")
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.eval()(x), module.eval()(x))


class Convs(nn.Module):
    """Convolutions of every kind that lowering tells apart, between two float ones."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.padded = nn.Conv2d(8, 12, 3, padding=1, bias=bias)
        self.strided = nn.Conv2d(12, 8, (3, 1), stride=2, padding=(2, 0), groups=4, bias=bias)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=bias)
        self.point = nn.Conv2d(8, 8, 1, bias=bias)
        self.line = nn.Conv1d(8, 8, 3, padding=1, groups=2, bias=bias)
        self.token = nn.Linear(8, 8, bias=bias)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.strided(torch.relu(self.padded(self.first(x)))))
        x = self.point(torch.relu(self.depthwise(x)))
        y = torch.relu(self.line(torch.relu(x.flatten(2))))
        y = self.token(y.transpose(1, 2)).transpose(1, 2)
        return self.last(y.reshape(x.shape))


@pytest.mark.parametrize("capture", ["fx", "export"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_becomes_biases_and_offsets(capture, bias, bits, tmp_path):
    torch.manual_seed(bits)
    x = torch.randn(2, 3, 11, 9)
    example = (x[:1],) if capture == "export" else None
    prepared = qmir_ao.prepare_qat(Convs(bias), qmir_ao.get_qmir_qconfig(bits, bits), example)
    train_step(prepared, x)
    shifts = [m for m in prepared.modules() if getattr(m, "channel_shift", None) is not None]
    assert len(shifts) == 6
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    for z in (x, torch.randn(1, 3, 7, 16)):
        assert len(lowered.report.operators) == 6
        check_operators(prepared, lowered, z)
    qmir_ao.save(lowered, tmp_path / "model")
    loaded = qmir_ao.load(tmp_path / "model")
    assert torch.equal(loaded(x), lowered(x))
    assert qmir_ao.compare(prepared, loaded, x) == qmir_ao.compare(prepared, lowered, x)


@pytest.mark.parametrize("capture", ["fx", "export"])
def test_survives_where_an_output_clamp_keeps_operators_in_float(capture):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 9)
    clamped = qmir_ao.get_qmir_qconfig(8, 2, clamp_output=True)
    mapping = QConfigMapping().set_global(qmir_ao.get_qmir_qconfig(8, 8))
    mapping.set_module_name("padded", clamped).set_module_name("token", clamped)
    prepared = qmir_ao.prepare_qat(Convs(True), mapping, (x,) if capture == "export" else None)
    train_step(prepared, x)
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    assert len(lowered.report.operators) == 4
    error, want = (lowered(x) - prepared(x)).abs(), prepared(x)
    # A code that flips at a rounding boundary moves a few values by a step of 1/256 of the range.
    assert float(error.max()) < 0.02 * float(want.abs().max())


@pytest.mark.parametrize("bits", [4, 8])
def test_calibration_gives_the_means_of_its_first_batch(bits):
    torch.manual_seed(0)
    model, batches = Convs(True), [torch.randn(2, 3, 11, 9) for _ in range(3)]
    prepared = qmir_ao.prepare_ptq(model.eval(), qmir_ao.get_qmir_qconfig(bits, bits))
    qmir_ao.calibrate(prepared, batches)
    shifts = [
        m.channel_shift for m in prepared.modules() if getattr(m, "channel_shift", None) is not None
    ]
    assert [s.numel() for s in shifts] == [8, 12, 8, 8, 8, 8]
    lowered = qmir_ao.convert_and_lower(prepared)
    records = qmir_ao.compare(prepared, lowered, batches[0])
    assert all(r["code_mismatches"] <= r["boundary_mismatches"] for r in records)
    want = model(batches[0])
    noise = (lowered(batches[0]) - want).square().mean() / want.square().mean()
    assert float(noise) < (1e-3 if bits == 8 else 0.1)


@pytest.mark.slow
def test_compiled_prepared_network():
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(1, 3, 11, 9)
    prepared = qmir_ao.prepare_qat(Convs(True), qmir_ao.get_qmir_qconfig(8, 8), (x,))
    prepared(x)
    prepared.eval()
    with torch.no_grad():
        got, want = torch.compile(prepared, backend="qmir")(x), prepared(x)
    # A code that flips at a rounding boundary moves a few values.
    error = (got - want).abs()
    assert float((error < 1e-3 * want.abs().max()).float().mean()) > 0.95


def test_a_wrong_border_is_noticed(monkeypatch):
    """The mutation: constants instead of borders, as if every tap lay inside the image."""
    from qmir_ao.passes import lower

    rewrite, aten, qmir = lower.LowerConv.rewrite, torch.ops.aten, torch.ops.qmir

    def without_borders(self, graph_module):
        changed = rewrite(self, graph_module)
        graph = graph_module.graph
        for node in list(graph.nodes):
            if node.target is qmir.conv2d.default:
                users = list(node.users)
                with graph.inserting_before(next(iter(users))):
                    plain = graph.call_function(node.target, (*node.args[:7], None, *node.args[8:]))
                    lost = graph.call_function(aten.sub.Tensor, (plain, node))
                    middle = graph.call_function(aten.amax.default, (lost, [2, 3], True))
                    wrong = graph.call_function(aten.sub.Tensor, (plain, middle))
                for user in users:
                    user.replace_input_with(node, wrong)
        return changed

    torch.manual_seed(0)
    x = torch.randn(1, 3, 11, 9)
    prepared = qmir_ao.prepare_qat(Convs(True), qmir_ao.get_qmir_qconfig(8, 8))
    train_step(prepared, x)
    prepared.eval()
    monkeypatch.setattr(lower.LowerConv, "rewrite", without_borders)
    wrong = qmir_ao.convert_and_lower(prepared)
    monkeypatch.undo()
    right = qmir_ao.convert_and_lower(prepared)
    want = prepared(x)
    assert float((right(x) - want).abs().max()) < 0.1 * float((wrong(x) - want).abs().max())
