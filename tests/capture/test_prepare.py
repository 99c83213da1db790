"""prepare_qat by both captures: trainable, switchable, and clear about what it cannot do."""

import copy
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from support.models import CAPTURES, ConvNet, ScanNet, example, train_step
from torch import Tensor, nn

import qmir_ao
from qmir_ao.errors import CaptureError, ConfigError, UnsupportedGraph
from qmir_ao.ops.selective_scan import selective_scan_ref

captures = pytest.mark.parametrize("capture", CAPTURES)
INTERFACE = "mamba_ssm.ops.selective_scan_interface"


def quantizers(module: nn.Module) -> list[nn.Module]:
    kinds = (qmir_ao.DLSFakeQuantize, qmir_ao.RFAFakeQuantize)
    return [m for m in module.modules() if isinstance(m, kinds)]


@captures
@pytest.mark.parametrize(
    ("model", "size"), [(ConvNet, (1, 3, 9, 10)), (ScanNet, (1, 4, 7))], ids=["conv", "scan"]
)
def test_prepared_network_trains_and_takes_other_sizes(
    capture: str, model: type[nn.Module], size: tuple[int, ...]
) -> None:
    net = model()
    before = copy.deepcopy(net.state_dict())
    prepared = qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, example(capture, *size))
    assert prepared.training
    assert quantizers(prepared)
    start = {k: v.detach().clone() for k, v in prepared.named_parameters()}
    train_step(prepared, torch.rand(2, *size[1:]))
    train_step(prepared, torch.rand(2, *size[1:]))
    moved = [k for k, v in prepared.named_parameters() if not torch.equal(v, start[k])]
    assert len(moved) > len(start) / 2
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    prepared.eval()
    larger = torch.rand(3, *size[1:-2], size[-2] + (size[-2] > 4), size[-1] + 3)
    y = prepared(larger)
    assert y.shape == larger.shape
    assert y.isfinite().all()


@captures
def test_train_and_eval_switch_dropout(capture: str) -> None:
    net = qmir_ao.prepare_qat(ConvNet(), qmir_ao.qmir_qconfig, example(capture, 1, 3, 9, 10))
    x = torch.rand(1, 3, 9, 10)
    net(x)
    for prepared in (net, copy.deepcopy(net), copy.deepcopy(copy.deepcopy(net))):
        for _ in range(2):
            assert prepared.eval() is prepared
            assert not any(m.training for m in prepared.modules())
            with torch.no_grad():
                assert torch.equal(prepared(x), prepared(x))
            assert prepared.train() is prepared
            assert all(m.training for m in quantizers(prepared))
            with torch.no_grad():
                assert not torch.equal(prepared(x), prepared(x))


def test_switching_a_copy_leaves_the_original() -> None:
    prepared = qmir_ao.prepare_qat(ConvNet(), qmir_ao.qmir_qconfig, (torch.rand(1, 3, 9, 10),))
    other = copy.deepcopy(prepared)
    other.eval()
    x = torch.rand(1, 3, 9, 10)
    prepared(x)
    assert prepared.training
    assert not torch.equal(prepared(x), prepared(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.shape[0] > 1 else self.b(x)


class ValueBranching(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_failed_trace_names_example_inputs() -> None:
    with pytest.raises(CaptureError, match=r"Branching failed.*example_inputs"):
        qmir_ao.prepare_qat(Branching(), qmir_ao.qmir_qconfig)
    prepared = qmir_ao.prepare_qat(Branching(), qmir_ao.qmir_qconfig, (torch.rand(3, 4),))
    assert quantizers(prepared)


def test_a_failed_export_says_why() -> None:
    with pytest.raises(CaptureError, match="could not capture ValueBranching"):
        qmir_ao.prepare_qat(ValueBranching(), qmir_ao.qmir_qconfig, (torch.rand(3, 4),))


def test_inputs_on_another_device_are_named() -> None:
    with pytest.raises(CaptureError, match=r"example_inputs\[0\] is on meta.*model is on cpu"):
        qmir_ao.prepare_qat(
            ConvNet(), qmir_ao.qmir_qconfig, (torch.rand(1, 3, 9, 10, device="meta"),)
        )


@captures
def test_nothing_to_quantize_is_an_error(capture: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    with pytest.raises(UnsupportedGraph, match="nothing to quantize"):
        qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, example(capture, 1, 3, 9, 10))
    with pytest.raises(UnsupportedGraph, match="nothing to quantize"):
        qmir_ao.prepare_qat(nn.ReLU(), qmir_ao.qmir_qconfig, example(capture, 1, 3, 9, 10))


def test_wrong_input_shapes_are_readable() -> None:
    prepared = qmir_ao.prepare_qat(ConvNet(), qmir_ao.qmir_qconfig, (torch.rand(1, 3, 9, 10),))
    for x in (torch.rand(1, 4, 9, 10), torch.rand(3, 9, 10)):
        with pytest.raises(ConfigError, match=r"captured for \(any, 3, any, any\)"):
            prepared(x)
    lowered = qmir_ao.convert_and_lower(prepared)
    with pytest.raises(ConfigError, match="captured for"):
        lowered(torch.rand(1, 4, 9, 10))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="placement='mine'"):
        qmir_ao.prepare_qat(ConvNet(), qmir_ao.qmir_qconfig, placement="mine")
    with pytest.raises(ConfigError, match="qconfig must be"):
        qmir_ao.prepare_qat(ConvNet(), {"bits": 4})


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x))) + x


@captures
def test_a_module_called_twice(capture: str) -> None:
    prepared = qmir_ao.prepare_qat(Shared(), qmir_ao.qmir_qconfig, example(capture, 3, 5, 4))
    train_step(prepared, torch.rand(3, 5, 4))
    prepared.eval()
    lowered = qmir_ao.convert_and_lower(prepared)
    assert [r.kind for r in lowered.report.operators] == ["linear", "linear"]
    assert len([t for t in lowered.buffers() if t.dtype == torch.uint8]) in (1, 2)
    records = qmir_ao.compare(prepared, lowered, torch.rand(2, 5, 4))
    assert [r["acc_equal"] for r in records] == [True, True]


def planted_fn(  # the signature of mamba-ssm's function
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    y = selective_scan_ref(
        u.detach(), delta, A, B.unsqueeze(1), C.unsqueeze(1), D, delta_bias, delta_softplus
    )
    return torch.from_numpy(y.detach().numpy())  # can be neither traced nor exported


@pytest.fixture
def mamba(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = types.ModuleType(INTERFACE)
    interface.selective_scan_fn = planted_fn
    monkeypatch.setitem(sys.modules, INTERFACE, interface)
    monkeypatch.setitem(globals(), "imported_scan", planted_fn)
    yield interface


class MambaUser(nn.Module):
    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.point = nn.Linear(5, 5)
        self.A = nn.Parameter(-torch.rand(5, 3))
        self.attribute = attribute
        if attribute:
            self.scan = planted_fn

    def forward(self, u: Tensor, B: Tensor, C: Tensor) -> Tensor:
        delta = self.point(u.transpose(1, 2)).transpose(1, 2)
        scan = self.scan if self.attribute else globals()["imported_scan"]
        return scan(u, delta, self.A, B, C, delta_softplus=True)


@captures
@pytest.mark.parametrize("attribute", [True, False], ids=["attribute", "global"])
def test_mamba_ssm_is_swapped_and_put_back(
    capture: str, attribute: bool, mamba: types.ModuleType
) -> None:
    net = MambaUser(attribute)
    inputs = torch.rand(2, 5, 7), torch.rand(2, 3, 7), torch.rand(2, 3, 7)
    given = inputs if capture == "export" else None
    prepared = qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, given)
    calls = [n for n in prepared.graph.nodes if "selective_scan" in str(n.target)]
    assert len(calls) == 1
    assert mamba.selective_scan_fn is planted_fn
    assert globals()["imported_scan"] is planted_fn
    assert not attribute or net.scan is planted_fn
    prepared(*inputs).sum().backward()
    prepared.eval()
    report = qmir_ao.convert_and_lower(prepared).report
    assert {r.kind for r in report.operators} == {"linear", "selective_scan"}


def test_mamba_ssm_is_put_back_after_an_error(mamba: types.ModuleType) -> None:
    class Failing(MambaUser):
        def forward(self, u: Tensor) -> Tensor:
            raise ValueError("no")

    net = Failing(True)
    for given in (None, (torch.rand(2, 5, 7),)):
        with pytest.raises(CaptureError, match="no"):
            qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, given)
        assert net.scan is planted_fn
        assert mamba.selective_scan_fn is planted_fn


def test_eager_prepare_qat_trains() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).train()
    net.qconfig = qmir_ao.qmir_qconfig
    prepared = torch.ao.quantization.prepare_qat(net)
    prepared(torch.rand(8, 4))
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in prepared.parameters()]
    prepared(torch.rand(8, 4)).square().mean().backward()
    optimizer.step()
    assert len(quantizers(prepared)) >= 4
    moved = [not torch.equal(a, b) for a, b in zip(before, prepared.parameters(), strict=False)]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize(
    ("model", "size"), [(ConvNet, (2, 3, 9, 10)), (ScanNet, (2, 4, 7))], ids=["conv", "scan"]
)
def test_torchao_converts_without_changing_a_bit(
    model: type[nn.Module], size: tuple[int, ...]
) -> None:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

    x = torch.rand(size)
    exported = torch.export.export(model().eval(), (x,)).module()
    prepared = prepare_qat_pt2e(exported, qmir_ao.QmirQuantizer())
    prepared(x).square().mean().backward()
    move_exported_model_to_eval(prepared)
    with torch.no_grad():
        want = prepared(x)
        converted = convert_pt2e(prepared)
        assert torch.equal(converted(x), want)
    targets = {str(n.target) for n in converted.graph.nodes}
    assert "qmir.dls_quantize.default" in targets
    assert not quantizers(converted)


@pytest.mark.parametrize(
    ("model", "size"), [(ConvNet, (2, 3, 9, 10)), (ScanNet, (2, 4, 7))], ids=["conv", "scan"]
)
def test_torchao_gives_the_network_of_prepare_qat(
    model: type[nn.Module], size: tuple[int, ...]
) -> None:
    """Tokens, channel shifts and all: the quantizer alone tells its modules what reads them."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    net, x = model(), torch.rand(size)
    net.drop = nn.Identity()
    ours = qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, (x,))
    exported = torch.export.export(net, (x,)).module()
    theirs = prepare_qat_pt2e(exported, qmir_ao.QmirQuantizer())

    def seen(prepared: nn.Module) -> list[tuple[bool, int | None]]:
        dls = (m for m in prepared.modules() if isinstance(m, qmir_ao.DLSFakeQuantize))
        return [(m.tokens, m.channel_dim) for m in dls]

    assert seen(theirs) == seen(ours)
    assert len(set(seen(ours))) > 1
    for _ in range(2):  # the first batch initialises
        assert torch.equal(theirs(x), ours(x))
