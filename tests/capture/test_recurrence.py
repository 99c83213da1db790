"""Loops over time in plain torch: replaced where proven equal, left in float and said so else."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qmir_ao
from qmir_ao.capture.export import export_graph
from qmir_ao.capture.fuse_recurrence import fuse_recurrences, rewritten_by_trace

QCONFIG = qmir_ao.get_qmir_qconfig(4, 4)
E, N, L = 4, 3, 4


def minimal(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """As most small implementations write it: (B, L, E), decay and input made beforehand."""
    decay = torch.exp(torch.einsum("bld,dn->bldn", dt, A))
    new = torch.einsum("bld,bln,bld->bldn", dt, B, u)
    h = torch.zeros(u.shape[0], u.shape[2], A.shape[1])
    rows = []
    for i in range(u.shape[1]):
        h = decay[:, i] * h + new[:, i]
        rows.append(torch.einsum("bdn,bn->bd", h, C[:, i, :]))
    return torch.stack(rows, dim=1) + u * D


def broadcast(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Products by broadcasting, a matrix product at the end, everything in float32."""
    decay = (dt.float().unsqueeze(-1) * A).exp()
    new = dt.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    rows = []
    for i in range(u.shape[1]):
        h = new[:, i] + h * decay[:, i]
        rows.append((h @ C[:, i, :, None]).squeeze(-1))
    return torch.stack(rows, 1)


def every_step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Everything inside of the loop, in (B, E, L), with D * u of each step."""
    u, dt, B, C = (x.transpose(1, 2) for x in (u, dt, B, C))
    h = torch.zeros(u.shape[0], u.shape[1], A.shape[1])
    rows = []
    for i in range(u.shape[2]):
        step = dt[:, :, i, None]
        h = torch.exp(step * A) * h + step * u[:, :, i, None] * B[:, None, :, i]
        rows.append((h * C[:, None, :, i]).sum(-1) + D * u[:, :, i])
    return torch.stack(rows, dim=-1).transpose(1, 2)


def grouped(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """mamba-ssm's reference with B and C repeated for every channel."""
    u, dt, B, C = (x.transpose(1, 2) for x in (u, dt, B, C))
    B, C = (x[:, None].repeat(1, u.shape[1], 1, 1) for x in (B, C))
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    new = torch.einsum("bdl,bdnl,bdl->bdln", dt, B, u)
    h, rows = A.new_zeros(u.shape[0], u.shape[1], A.shape[1]), []
    for i in range(u.shape[2]):
        h = decay[:, :, i] * h + new[:, :, i]
        rows.append(torch.einsum("bdn,bdn->bd", h, C[:, :, :, i]))
    y = torch.stack(rows, dim=2)
    return (y + u * D[:, None]).transpose(1, 2)


def operator(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`torch`'s scan over the length."""
    from torch._higher_order_ops.scan import scan

    def step(h: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        ui, di, bi, ci = x
        h = torch.exp(di[..., None] * A) * h + (di * ui)[..., None] * bi[:, None]
        return h, (h * ci[:, None]).sum(-1)

    h = u.new_zeros(u.shape[0], E, N)
    _, y = scan(step, h, tuple(x.transpose(0, 1) for x in (u, dt, B, C)))
    return y.transpose(0, 1) + u * D


class Block(nn.Module):
    """Projections, a recurrence over time and a last layer: (B, L, E) to (B, L, E)."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.project, self.last = nn.Linear(E, E + 2 * N), nn.Linear(E, E)
        self.A_log, self.D = nn.Parameter(torch.rand(E, N)), nn.Parameter(torch.rand(E))

    def forward(self, x: Tensor) -> Tensor:
        dt, B, C = self.project(x).split([E, N, N], dim=-1)
        return self.last(self.run(x, F.softplus(dt), -torch.exp(self.A_log), B, C, self.D))


FORMS = (minimal, broadcast, every_step, grouped, operator)


@pytest.mark.parametrize("run", FORMS, ids=lambda f: f.__name__)
def test_a_loop_becomes_a_quantized_scan(run: Callable[..., Tensor]) -> None:
    net, x = Block(run), torch.rand(2, L, E)
    graph = export_graph(copy.deepcopy(net), (x,))
    scans = [n for n in graph.graph.nodes if n.target is torch.ops.qmir.selective_scan.default]
    assert len(scans) == 1
    assert scans[0].args[7] is True  # softplus went into the operator
    assert (scans[0].args[5] is None) == (run is broadcast)  # and so did D, where there is one
    assert sum("exp" in str(n.target) for n in graph.graph.nodes) == 1  # of A_log
    for batch in (2, 3):
        more = torch.rand(batch, L, E)
        assert torch.allclose(graph(more), net(more), atol=1e-6)
    assert fuse_recurrences(graph) == 0  # a second run changes nothing
    prepared = qmir_ao.prepare_qat(net, QCONFIG, (x,))
    prepared(x).square().mean().backward()
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    assert sorted(r.kind for r in report.operators) == ["linear", "linear", "selective_scan"]


class FixedLength(Block):
    """A loop that a symbolic trace can follow, since its length is a number."""

    def forward(self, x: Tensor) -> Tensor:
        A = -torch.exp(self.A_log)
        dt, B, C = self.project(x).split([E, N, N], dim=-1)
        dt = F.softplus(dt)
        h, rows = x.new_zeros(x.shape[0], E, N), []
        for i in range(L):
            step = dt[:, i, :, None]
            h = torch.exp(step * A) * h + step * x[:, i, :, None] * B[:, i, None, :]
            rows.append((h * C[:, i, None, :]).sum(-1))
        return self.last(torch.stack(rows, dim=1) + x * self.D)


def test_a_loop_of_fixed_length_in_a_symbolic_trace() -> None:
    net, x = FixedLength(minimal), torch.rand(2, L, E)
    traced = rewritten_by_trace(copy.deepcopy(net))
    assert "qmir.selective_scan" in traced.code
    assert torch.allclose(traced(x), net(x), atol=1e-6)
    prepared = qmir_ao.prepare_qat(net, QCONFIG)
    prepared(x).square().mean().backward()
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    assert sorted(r.kind for r in report.operators) == ["linear", "linear", "selective_scan"]


def test_models_without_a_loop_are_passed_on_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert rewritten_by_trace(net) is net


def almost(change: str) -> Callable[..., Tensor]:
    """A loop that differs from a selective scan in one place."""

    def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        h = torch.full((u.shape[0], E, N), 1.0 if change == "start" else 0.0)
        rows = []
        for i in range(L):
            step = dt[:, i, :, None]
            decay = torch.exp(step * A * (2.0 if change == "scaled" else 1.0))
            new = step * u[:, i, :, None] * B[:, i, None, :]
            if change == "late" and i == 2:
                new = new * 1.001
            if change == "bounded" and i == 1:
                h = h.clamp(max=100.0)  # has no effect on small numbers, but may on others
            h = decay * h + (new.clamp(max=10.0) if change == "clamped" else new)
            read = C[:, max(i - 1, 0) if change == "shifted" else i, None, :]
            rows.append((h * read).sum(-1))
        return torch.stack(rows[::-1] if change == "reversed" else rows, dim=1)

    return run


@pytest.mark.parametrize(
    "change", ["start", "scaled", "late", "clamped", "bounded", "shifted", "reversed"]
)
def test_what_is_no_selective_scan_stays_in_float(change: str) -> None:
    net, x = Block(almost(change)), torch.rand(2, L, E)
    fixed = {"dynamic_shapes": ({},)}  # else torch.export takes seconds for guards on the length
    graph = export_graph(copy.deepcopy(net), (x,), **fixed)
    assert not [n for n in graph.graph.nodes if "selective_scan" in str(n.target)]
    assert torch.allclose(graph(x), net(x), atol=1e-6)
    prepared = qmir_ao.prepare_qat(net, QCONFIG, (x,), **fixed)
    lowered = qmir_ao.convert_and_lower(prepared.eval())
    assert [r.kind for r in lowered.report.operators] == ["linear", "linear"]
    reasons = {r.reason for r in lowered.report.left_in_float if r.op in ("add", "mul")}
    assert "a recurrence over time that is no selective scan stays in float" in reasons
    assert lowered(x).isfinite().all()


def test_the_plain_form_of_the_changed_loops_is_found() -> None:
    """Else the test above would prove nothing."""
    graph = export_graph(Block(almost("nothing")), (torch.rand(2, L, E),), ({},))
    assert [n for n in graph.graph.nodes if "selective_scan" in str(n.target)]


@pytest.mark.parametrize("shapes", [None, ({},)], ids=["dynamic", "fixed"])
def test_a_scan_operator_that_is_no_selective_scan_is_written_out(shapes: object) -> None:
    def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def step(h: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            h = torch.tanh(x[0] + h)
            return h, h * 2

        h = torch.zeros(u.shape[0], E)
        last, y = scan(step, h, (u.transpose(0, 1),))
        return y.transpose(0, 1) + dt + last[:, None]

    net, x = Block(run), torch.rand(2, L, E)
    want = net(x)
    assert torch.allclose(export_graph(copy.deepcopy(net), (x,), shapes)(x), want, atol=1e-6)
    prepared = qmir_ao.prepare_qat(net, QCONFIG, (x,), dynamic_shapes=shapes)
    prepared(x).sum().backward()
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    assert [r.kind for r in report.operators] == ["linear", "linear"]
    assert [r.op for r in report.left_in_float if "recurrence" in r.reason].count("tanh") == L


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 2, 2), (2, 3, 2)])
def test_equal_sizes_do_not_confuse_the_dimensions(sizes: tuple[int, int, int]) -> None:
    """Batch, channels, states and length may be the same number: only values tell them apart."""
    channels, states, length = sizes

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = nn.Parameter(-torch.rand(channels, states))

        def forward(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            h, rows = torch.zeros(u.shape[0], channels, states), []
            for i in range(length):
                step = dt[:, :, i, None]
                h = torch.exp(step * self.A) * h + step * u[:, i, :, None] * B[:, i, None, :]
                rows.append((h * C[:, None, :, i]).sum(-1))
            return torch.stack(rows, dim=1)

    batch, net = channels, Plain()
    u, dt = torch.rand(batch, length, channels), torch.rand(batch, channels, length)
    B, C = torch.rand(batch, length, states), torch.rand(batch, states, length)
    graph = export_graph(net, (u, dt, B, C), ({}, {}, {}, {}))
    assert "selective_scan" in graph.code
    assert torch.allclose(graph(u, dt, B, C), net(u, dt, B, C), atol=1e-6)


def test_a_loop_over_the_first_steps_reads_no_more() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = nn.Parameter(-torch.rand(E, N))

        def forward(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            h, rows = torch.zeros(u.shape[0], E, N), []
            for i in range(L - 1):
                step = dt[:, i, :, None]
                h = torch.exp(step * self.A) * h + step * u[:, i, :, None] * B[:, i, None, :]
                rows.append((h * C[:, i, None, :]).sum(-1))
            return torch.stack(rows, dim=1)

    inputs = [torch.rand(2, L, size) for size in (E, E, N, N)]
    graph = export_graph(First(), inputs, ({}, {}, {}, {}))
    inputs[3] = torch.cat([inputs[3][:, :-1], torch.full((2, 1, N), float("nan"))], dim=1)
    assert "selective_scan" in graph.code
    assert graph(*inputs).isfinite().all()
    assert graph(*inputs).shape == (2, L - 1, E)
