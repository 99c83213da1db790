"""What cannot be captured is refused with one error: what, in which module, at which line."""

import inspect

import pytest
import torch
from support.models import CAPTURES
from torch import Tensor, nn

import qmir_ao
from qmir_ao.capture.blame import blame
from qmir_ao.errors import CaptureError, UnsupportedGraph


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error has to name
            return x
        return -x


class WrongScan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        A, B = -torch.ones(4, 3), torch.rand(2, 1, 3, 5)
        return torch.ops.qmir.selective_scan(x, x[:, :2], A, B, B, None, None, True)


class MixesConstant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(4, 5, device="meta")


class Outer(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 5), block)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def line_of(block: nn.Module, text: str) -> str:
    source, first = inspect.getsourcelines(type(block))
    return f"{__file__}:{first + next(i for i, s in enumerate(source) if text in s)}"


@pytest.mark.parametrize("capture", CAPTURES)
def test_data_dependent_control_flow_names_the_line(capture: str) -> None:
    net, x = Outer(Branch()), torch.rand(2, 4, 5)
    with pytest.raises(CaptureError) as caught:
        qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, (x,) if capture == "export" else None)
    message = str(caught.value)
    assert f"{line_of(Branch(), 'if x.sum')} in module 'body.1': `if x.sum() > 0:" in message
    assert message.count(__file__) == 1
    assert "control flow" in message


def test_a_scan_whose_shapes_do_not_fit_names_module_and_operand() -> None:
    with pytest.raises(CaptureError) as caught:
        qmir_ao.prepare_qat(Outer(WrongScan()), qmir_ao.qmir_qconfig, (torch.rand(2, 4, 5),))
    message = str(caught.value)
    assert f"{line_of(WrongScan(), 'torch.ops.qmir')} in module 'body.1'" in message
    assert "qmir::selective_scan: delta must be" in message
    assert "control flow" not in message


@pytest.mark.parametrize("capture", CAPTURES)
def test_a_model_on_two_devices_is_refused(capture: str) -> None:
    net = Outer(nn.Linear(5, 5))
    net.body[1].to("meta")
    given = (torch.rand(2, 5),) if capture == "export" else None
    with pytest.raises(CaptureError, match=r"mixes devices \('body.0.weight' on cpu, 'body.1.wei"):
        qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, given)


def test_a_scan_of_a_symbolic_trace_names_node_and_module_when_it_runs() -> None:
    prepared = qmir_ao.prepare_qat(Outer(WrongScan()), qmir_ao.qmir_qconfig)
    node = next(n.name for n in prepared.graph.nodes if "selective_scan" in n.name)
    with pytest.raises(UnsupportedGraph) as caught:
        prepared(torch.rand(2, 4, 5))
    message = str(caught.value)
    assert "qmir::selective_scan: delta must be" in message
    assert f"at node {node} in module 'body.1'" in message
    with pytest.raises(RuntimeError, match=r"^The size of tensor a"):  # torch's own, as it is
        prepared(torch.rand(2, 4, 6))


def test_a_constant_on_another_device_names_node_and_module_of_a_trace() -> None:
    with pytest.raises(CaptureError, match=r"node add in module 'body.1' mixes devices.*on meta"):
        qmir_ao.prepare_qat(Outer(MixesConstant()), qmir_ao.qmir_qconfig)


def test_a_constant_on_another_device_names_the_line() -> None:
    with pytest.raises(CaptureError) as caught:
        qmir_ao.prepare_qat(Outer(MixesConstant()), qmir_ao.qmir_qconfig, (torch.rand(2, 4, 5),))
    assert f"{line_of(MixesConstant(), 'return')} in module 'body.1'" in str(caught.value)
    assert "device" in str(caught.value)


def test_an_error_outside_of_the_model_has_no_place() -> None:
    assert blame(nn.ReLU(), ValueError("elsewhere")) == ""
