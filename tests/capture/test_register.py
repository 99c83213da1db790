"""register_selective_scan: every kind of callable, every way to hold it, undone afterwards."""

import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from support.models import CAPTURES
from support.scan_packages import INTERFACE, interface, opaque, plain_scan
from torch import Tensor, nn

import qmir_ao
from qmir_ao.capture.export import export_graph
from qmir_ao.capture.selective_scan import swapped_selective_scan
from qmir_ao.errors import CaptureError, ConfigError

captures = pytest.mark.parametrize("capture", CAPTURES)


def own_scan(x, dt, A, BC):
    """A scan with an argument order of its own: (B, L, E), B and C in one tensor."""
    B, C = BC.chunk(2, dim=-1)
    u, delta, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
    return plain_scan(u, delta, A, B, C, delta_softplus=True).transpose(1, 2)


class OwnScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, BC):
        return own_scan(x, dt, A, BC)


class Callable_:
    def __call__(self, x, dt, A, BC):
        return own_scan(x, dt, A, BC)


def closing_over(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(run)
    def scan(*args):
        return run(*args)

    return scan


def own_adapter(x, dt, A, BC):
    B, C = BC.chunk(2, dim=-1)
    u, delta, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
    B, C = B.unsqueeze(1), C.unsqueeze(1)
    y = torch.ops.qmir.selective_scan(u, delta, A, B, C, None, None, True)
    return y.transpose(1, 2)


APPLY, OBJECT, CLOSURE = OwnScan.apply, Callable_(), closing_over(own_scan)


class Net(nn.Module):
    """Calls a scan that it holds in one of several ways."""

    def __init__(self, scan: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.project = nn.Linear(4, 10)
        self.A = nn.Parameter(-torch.rand(4, 3))
        self.scan = scan

    def forward(self, x: Tensor) -> Tensor:
        delta, BC = self.project(x).split([4, 6], dim=-1)
        scan = (lambda *a: APPLY(*a)) if self.scan is None else self.scan
        return scan(x, delta, self.A, BC)


HELD = {
    "attribute": (own_scan, lambda: Net(own_scan)),
    "default argument": (own_scan, lambda: Net(lambda *a, run=own_scan: run(*a))),
    "partial": (own_scan, lambda: Net(functools.partial(own_scan))),
    "decorated": (CLOSURE, lambda: Net(CLOSURE)),
    "class": (OwnScan, lambda: Net(OwnScan.apply)),
    "class, called as a global apply": (OwnScan, lambda: Net(None)),
    "apply": (OwnScan.apply, lambda: Net(lambda *a: OwnScan.apply(*a))),
    "object": (OBJECT, lambda: Net(lambda *a: globals()["OBJECT"](*a))),
}


@captures
@pytest.mark.parametrize("held", HELD)
def test_a_registered_scan_is_quantized(held: str, capture: str) -> None:
    fn, make = HELD[held]
    net, x = make(), torch.rand(2, 6, 4)
    before = dict(globals())
    with qmir_ao.register_selective_scan(fn, own_adapter):
        want = net(x)
        with swapped_selective_scan(net):
            plain = torch.fx.symbolic_trace(net)
        assert torch.allclose(plain(x), want, atol=1e-5)
        assert torch.allclose(export_graph(net, (x,))(x), want, atol=1e-5)
        given = (x,) if capture == "export" else None
        prepared = qmir_ao.prepare_qat(net, qmir_ao.get_qmir_qconfig(4, 4), given)
        prepared(x).sum().backward()
    kinds = [r.kind for r in qmir_ao.convert_and_lower(prepared.eval()).report.operators]
    assert sorted(kinds) == ["linear", "selective_scan"]
    assert all(globals()[name] is value for name, value in before.items())
    assert "apply" not in vars(OwnScan)
    assert torch.equal(net(x), want)


def test_without_registration_it_cannot_be_captured() -> None:
    with qmir_ao.register_selective_scan(own_scan, own_adapter) as handle:
        handle.remove()
        handle.remove()
        with pytest.raises(CaptureError, match="Net"):
            qmir_ao.prepare_qat(Net(own_scan), qmir_ao.qmir_qconfig)


@pytest.mark.parametrize("fails", ["adapter", "forward"])
@pytest.mark.parametrize("fn", [own_scan, OwnScan, OBJECT], ids=["function", "class", "object"])
def test_everything_is_put_back_when_capture_raises(fn: object, fails: str) -> None:
    def bad(*_: object) -> Tensor:
        raise ValueError("bad adapter")

    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            run = {own_scan: own_scan, OwnScan: OwnScan.apply}.get(fn) or globals()["OBJECT"]
            y = run(x, x, self.A, torch.cat([x, x], -1)[..., :6])
            raise ValueError("bad forward", y)

    code = own_scan.__code__
    with qmir_ao.register_selective_scan(fn, bad if fails == "adapter" else own_adapter):
        for given in (None, (torch.rand(2, 6, 4),)):
            with pytest.raises(CaptureError, match="bad"):
                qmir_ao.prepare_qat(Failing(fn), qmir_ao.qmir_qconfig, given)
    assert own_scan.__code__ is code
    assert "apply" not in vars(OwnScan)
    assert globals()["OBJECT"] is OBJECT


CALLS = {
    "code": (own_scan, lambda *a: own_scan(*a)),
    "apply": (OwnScan, lambda *a: OwnScan.apply(*a)),
    "name": (OBJECT, lambda *a: globals()["OBJECT"](*a)),
}


@pytest.mark.parametrize("how", CALLS)
def test_other_threads_go_on_with_the_original(how: str) -> None:
    """While one thread captures, another one calls the same function and gets real numbers."""
    fn, call = CALLS[how]
    operands = torch.rand(1, 3, 4), torch.rand(1, 3, 4), -torch.rand(4, 3), torch.rand(1, 3, 6)
    want, got = call(*operands), []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(10)
        try:
            got.append(call(*operands))
        finally:
            done.set()

    def adapter(*args: object) -> Tensor:
        inside.set()
        assert done.wait(10)
        return own_adapter(*args)

    worker = threading.Thread(target=other)
    worker.start()
    with qmir_ao.register_selective_scan(fn, adapter):
        export_graph(Net(call), (torch.rand(2, 6, 4),))
    worker.join()
    assert torch.equal(got[0], want)


@pytest.fixture
def mamba(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = interface()
    monkeypatch.setitem(sys.modules, INTERFACE, module)
    yield module


def test_a_registration_goes_before_the_built_in_adapter(mamba: types.ModuleType) -> None:
    def doubled(u: Tensor, *_: object) -> Tensor:
        return u + u

    class Uses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mamba.selective_scan_fn(x, x, -torch.ones(4, 3), x[:, :3], x[:, :3])

    x = torch.rand(2, 4, 5)
    with qmir_ao.register_selective_scan(mamba.selective_scan_fn, doubled):
        assert torch.equal(export_graph(Uses(), (x,))(x), x + x)
    assert torch.allclose(export_graph(Uses(), (x,))(x), opaque(Uses()(x)), atol=1e-5)


def test_bad_registrations_are_named() -> None:
    register = qmir_ao.register_selective_scan
    for arguments, message in (
        ((3, own_adapter), "fn must be callable, got 3 of type int"),
        ((own_scan, None), "adapter must be callable, got None"),
        ((nn.Linear, own_adapter), "fn is the class Linear"),
        ((own_scan, own_scan), "adapter is fn itself"),
    ):
        with pytest.raises(ConfigError, match=message):
            register(*arguments)
    with register(OwnScan, own_adapter), pytest.raises(ConfigError, match="OwnScan is registered"):
        register(OwnScan.apply, own_adapter)
    register(OwnScan.apply, own_adapter).remove()


@pytest.mark.parametrize("how", CALLS)
def test_a_capture_inside_of_a_capture(how: str) -> None:
    fn, call = CALLS[how]
    net, x, adapted = Net(call), torch.rand(2, 6, 4), []
    want, code = net(x), own_scan.__code__

    def adapter(*args: Tensor) -> Tensor:
        adapted.append(args)
        return own_adapter(*args)

    with qmir_ao.register_selective_scan(fn, adapter):
        with swapped_selective_scan(net):
            inner = export_graph(net, (x,))
            before = len(adapted)
            assert torch.allclose(net(x), want, atol=1e-5)
            assert len(adapted) == before + 1
        assert torch.allclose(inner(x), want, atol=1e-5)
        assert torch.equal(net(x), want)
        assert len(adapted) == before + 1
    assert own_scan.__code__ is code
