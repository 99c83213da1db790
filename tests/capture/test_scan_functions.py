"""Scan functions of known packages: captured, equal to the originals, quantized, put back."""

import copy
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from support import scan_packages as packages
from support.models import CAPTURES
from torch import Tensor, nn

import qmir_ao
from qmir_ao.capture.export import export_graph
from qmir_ao.capture.known import known_functions
from qmir_ao.capture.selective_scan import swapped_selective_scan
from qmir_ao.errors import CaptureError

captures = pytest.mark.parametrize("capture", CAPTURES)
QCONFIG = qmir_ao.get_qmir_qconfig(4, 4)


def capture_float(model: nn.Module, inputs: tuple[Tensor, ...], capture: str) -> nn.Module:
    """The captured graph without quantizers."""
    if capture == "export":
        return export_graph(model, inputs)
    with swapped_selective_scan(model):
        return torch.fx.symbolic_trace(model)


def check(model: nn.Module, inputs: tuple[Tensor, ...], capture: str, want: Tensor | None) -> dict:
    """Capture in float, prepare, train a step, lower; returns the count of integer operators."""
    if want is not None:
        got = capture_float(copy.deepcopy(model), inputs, capture)(*inputs)
        assert torch.allclose(got, want, atol=1e-5)
    prepared = qmir_ao.prepare_qat(model, QCONFIG, inputs if capture == "export" else None)
    prepared(*inputs).square().mean().backward()
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    kinds = [r.kind for r in report.operators]
    assert not [r for r in report.left_in_float if r.op in ("linear", "conv1d", "selective_scan")]
    return {kind: kinds.count(kind) for kind in set(kinds)}


@pytest.fixture
def mamba(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = packages.interface()
    monkeypatch.setitem(sys.modules, packages.INTERFACE, interface)
    simple = types.ModuleType(packages.MAMBA)
    simple.Mamba = packages.Mamba
    monkeypatch.setattr(packages.Mamba, "__module__", packages.MAMBA)
    monkeypatch.setitem(sys.modules, packages.MAMBA, simple)
    yield interface


class UsesInner(nn.Module):
    """A block that calls `mamba_inner_fn` itself, with every optional operand."""

    def __init__(self, fn: Callable[..., Tensor], biases: bool) -> None:
        super().__init__()
        self.fn, self.biases = fn, biases
        self.first = nn.Linear(5, 12)
        self.conv1d = nn.Conv1d(6, 6, 3, groups=6)
        self.x_proj, self.dt_proj = nn.Linear(6, 8, bias=False), nn.Linear(2, 6)
        self.out_proj = nn.Linear(6, 5)
        self.A_log, self.D = nn.Parameter(torch.rand(6, 3)), nn.Parameter(torch.rand(6))
        self.B_bias, self.C_bias = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        more = {"B_proj_bias": self.B_bias, "C_proj_bias": self.C_bias} if self.biases else {}
        return self.fn(
            self.first(x).transpose(1, 2),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(self.A_log),
            D=self.D if self.biases else None,
            delta_bias=self.dt_proj.bias,
            **more,
            checkpoint_lvl=0,
        )


@captures
@pytest.mark.parametrize("biases", [True, False])
def test_mamba_inner_fn_becomes_quantizable_operators(
    capture: str, biases: bool, mamba: types.ModuleType
) -> None:
    net, x = UsesInner(mamba.mamba_inner_fn, biases), torch.rand(2, 7, 5)
    kinds = check(net, (x,), capture, net(x))
    assert kinds == {"linear": 4, "conv2d": 1, "selective_scan": 1}


@captures
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_the_mamba_module(capture: str, fast: bool, nested: bool, mamba: types.ModuleType) -> None:
    block = packages.Mamba(use_fast_path=fast)
    net = nn.Sequential(nn.Linear(6, 6), block) if nested else block
    x, forward = torch.rand(2, 7, 6), packages.Mamba.forward
    kinds = check(net, (x,), capture, net(x))
    # in_proj, x_proj, dt_proj, out_proj; each of them a matrix product of its own in the original
    assert kinds == {"linear": 4 + nested, "conv2d": 1, "selective_scan": 1}
    assert packages.Mamba.forward is forward
    assert torch.equal(net(x), net(x))


def test_a_changed_mamba_module_keeps_its_own_forward(mamba: types.ModuleType) -> None:
    class Scaled(packages.Mamba):
        def forward(self, hidden_states: Tensor, inference_params: None = None) -> Tensor:
            return 2 * super().forward(hidden_states)

    Scaled.__name__, Scaled.__module__ = "Mamba", packages.MAMBA
    net, x = Scaled(), torch.rand(2, 7, 6)
    got = export_graph(net, (x,))(x)
    assert torch.allclose(got, net(x), atol=1e-5)


class UsesConv(nn.Module):
    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation
        self.point, self.A = nn.Linear(5, 5), nn.Parameter(-torch.rand(5, 3))
        self.weight, self.bias = nn.Parameter(torch.rand(5, 4)), nn.Parameter(torch.rand(5))
        self.last = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(x).transpose(1, 2)
        x = packages.causal_conv1d_fn(x, self.weight, self.bias, activation=self.activation)
        return self.last(x.transpose(1, 2))


@captures
@pytest.mark.parametrize("activation", ["silu", None])
def test_causal_conv1d_fn(capture: str, activation: str | None) -> None:
    net, x = UsesConv(activation), torch.rand(2, 6, 5)
    assert check(net, (x,), capture, net(x)) == {"linear": 2, "conv2d": 1}


class VisionScan(nn.Module):
    """VMamba's SS2D in short: cross scan, projections, scan, cross merge."""

    def __init__(self, scan: type, cross: tuple[type, type] | None = None) -> None:
        super().__init__()
        self.scan, self.cross = scan, cross
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(4 * 10, 4, 1) * 0.3)
        self.A, self.D = nn.Parameter(-torch.rand(16, 3)), nn.Parameter(torch.ones(16))
        self.bias = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).permute(0, 3, 1, 2)
        b, c, h, w = x.shape
        xs = (self.cross or (packages.CrossScan,))[0].apply(x).reshape(b, 4 * c, h * w)
        parts = torch.nn.functional.conv1d(xs, self.weight, groups=4).reshape(b, 4, 10, h * w)
        dts, B, C = torch.split(parts, [4, 3, 3], dim=2)
        dts = dts.reshape(b, 4 * c, h * w)
        ys = self.scan.apply(xs, dts, self.A, B, C, self.D, self.bias, True, 1, 1, True)
        ys = ys.reshape(b, 4, c, h, w)
        y = (self.cross or (0, packages.CrossMerge))[1].apply(ys)
        return self.last(y.transpose(1, 2)).reshape(b, h, w, 3)


@captures
@pytest.mark.parametrize("name", ["SelectiveScanMamba", "SelectiveScanCore", "SelectiveScanOflex"])
def test_vmamba_autograd_functions(capture: str, name: str) -> None:
    scan = packages.scan_class(name, runs=True)
    net, x = VisionScan(scan), torch.rand(2, 5, 6, 3)
    assert check(net, (x,), capture, net(x)) == {"linear": 2, "conv2d": 1, "selective_scan": 1}
    assert "apply" not in vars(scan)
    assert "apply" not in vars(packages.CrossScan)


@captures
def test_functions_that_need_a_gpu_are_known_by_name(capture: str) -> None:
    """No original runs here, so the result is compared with the one that does run."""
    works = VisionScan(packages.scan_class("SelectiveScanCore", runs=True))
    x = torch.rand(2, 5, 6, 3)
    want = works(x)
    cross = tuple(
        type(n, (torch.autograd.Function,), {"forward": staticmethod(f)})
        for n, f in (
            ("CrossScanTriton", lambda ctx, x: packages.cuda_only(x)),
            ("CrossMergeTriton", lambda ctx, y: packages.cuda_only(y)),
        )
    )
    net = VisionScan(packages.scan_class("SelectiveScanCore", runs=False), cross)
    net.load_state_dict(works.state_dict())
    with pytest.raises(RuntimeError, match="is_cuda"):
        net(x)
    check(net, (x,), capture, want)
    with pytest.raises(RuntimeError, match="is_cuda"):
        net(x)


@captures
@pytest.mark.parametrize("with_z", [True, False], ids=["mamba", "vmamba"])
def test_extension_modules_called_directly(
    capture: str, with_z: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An autograd function of an unknown name, around `selective_scan_cuda*.fwd`."""
    name = "selective_scan_cuda" + ("" if with_z else "_core")
    extension = types.ModuleType(name)
    extension.fwd = packages.cuda_only
    monkeypatch.setitem(sys.modules, name, extension)

    class OwnName(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus, *_):
            gate = (None,) if with_z else ()
            out, states, *_ = extension.fwd(
                u, delta, A, B, C, D, *gate, delta_bias, delta_softplus, *(() if with_z else (1,))
            )
            ctx.save_for_backward(u, states)
            return out

    works = VisionScan(packages.scan_class("SelectiveScanCore", runs=True))
    net, x = VisionScan(OwnName), torch.rand(2, 5, 6, 3)
    net.load_state_dict(works.state_dict())
    check(net, (x,), capture, works(x))
    assert extension.fwd is packages.cuda_only


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize("first", [(True, True), (True, False), (False, True), (False, False)])
def test_cross_scan_and_merge_undo_each_other(scans: int, first: tuple[bool, bool]) -> None:
    """Every pixel comes back once from each of the four directions, in every layout."""
    from qmir_ao.capture.cross_scan import cross_merge, cross_scan

    x = torch.rand(2, 3, 4, 5)
    given = x if first[0] else x.permute(0, 2, 3, 1)
    ys = cross_scan(given, *first, scans=scans)
    assert ys.shape == ((2, 4, 3, 20) if first[1] else (2, 20, 4, 3))
    image = ys.reshape(2, 4, 3, 4, 5) if first[1] else ys.reshape(2, 4, 5, 4, 3)
    back = cross_merge(image, *first, scans=scans)
    want = 4 * x.flatten(2)
    assert torch.allclose(back, want if first[0] else want.permute(0, 2, 1))


def test_unknown_variants_are_refused_by_name() -> None:
    from qmir_ao.capture.cross_scan import cross_scan

    for wrong in ({"scans": 3}, {"one_by_one": True}, {"channel_first": False}):
        with pytest.raises(CaptureError, match=f"cross_scan_fn .*{next(iter(wrong))}="):
            cross_scan(torch.rand(1, 2, 3, 4), **wrong)


def test_arguments_without_meaning_here_are_refused(mamba: types.ModuleType) -> None:
    class Net(nn.Module):
        def __init__(self, **more: object) -> None:
            super().__init__()
            self.point, self.more = nn.Linear(4, 4), more

        def forward(self, x: Tensor) -> Tensor:
            u = self.point(x)
            B = x[:, :3]
            return mamba.selective_scan_fn(u, u, -torch.ones(4, 3), B, B, **self.more)

    x = torch.rand(2, 4, 4)
    for name, value in (("return_last_state", True), ("cu_seqlens", torch.tensor([0, 4]))):
        with pytest.raises(CaptureError, match=name):
            export_graph(Net(**{name: value}), (x,))


def test_another_function_of_the_same_name_is_left_alone(
    mamba: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def selective_scan_fn(u, delta, A, B, C, D=None):
        return u * delta

    mamba.selective_scan_fn = selective_scan_fn
    found = [original for original, _ in known_functions(nn.ReLU())]
    assert selective_scan_fn not in found
    assert mamba.mamba_inner_fn in found
    assert "not what its name says" in caplog.text


def test_the_operators_own_reference_is_no_candidate() -> None:
    found = known_functions(nn.ReLU())
    assert not [f for f, _ in found if str(getattr(f, "__module__", "")).startswith("qmir_ao")]


def test_a_subclass_with_another_forward_keeps_it() -> None:
    class Doubled(packages.CrossScan):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return 2 * x

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(x)

    x = torch.rand(1, 2, 3, 4)
    assert torch.equal(export_graph(Net(), (x,))(x), 2 * x)


def test_a_capture_inside_of_a_capture_puts_everything_back(mamba: types.ModuleType) -> None:
    net, x = UsesInner(mamba.mamba_inner_fn, True), torch.rand(2, 7, 5)
    want, codes = net(x), [mamba.mamba_inner_fn.__code__, mamba.selective_scan_fn.__code__]
    with swapped_selective_scan(net):
        got = export_graph(net, (x,))(x)
        assert mamba.mamba_inner_fn.__code__ is not codes[0]
        assert torch.allclose(net(x), want, atol=1e-5)
    assert torch.allclose(got, want, atol=1e-5)
    assert [mamba.mamba_inner_fn.__code__, mamba.selective_scan_fn.__code__] == codes
    assert torch.equal(net(x), want)
