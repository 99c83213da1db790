"""torch.compile(backend="qmir"): float, prepared, lowered and training graphs."""

import subprocess
import sys

import pytest
import torch
from support.models import ConvNet, ScanNet

import qmir_ao

# Inductor fuses and reorders float32 arithmetic; codes at a rounding boundary may flip by a step.
COMPILED = 1e-4


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= COMPILED * b.abs().max())


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float", "prepared", "lowered"])
def test_compiled_network_equals_eager(form: str) -> None:
    net, x = ScanNet().eval(), torch.rand(2, 4, 7)
    if form != "float":
        net = qmir_ao.prepare_qat(net, qmir_ao.qmir_qconfig, (x,))
        net(x)
        net.eval()
    if form == "lowered":
        net = qmir_ao.convert_and_lower(net)
    with torch.no_grad():
        assert close(torch.compile(net, backend="qmir")(x), net(x))


@pytest.mark.slow
def test_compiled_training_has_the_gradients_of_eager() -> None:
    x = torch.rand(2, 4, 7)
    net = qmir_ao.prepare_qat(ScanNet(), qmir_ao.qmir_qconfig, (x,))
    net(x)

    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(net.parameters())))

    want = gradients(net)
    got = gradients(torch.compile(net, backend="qmir"))
    assert all(a.shape == b.shape for a, b in zip(got, want, strict=True))
    assert all(
        float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-6
        for a, b in zip(got, want, strict=True)
    )


def test_unknown_options_are_refused() -> None:
    compiled = torch.compile(ConvNet(), backend="qmir", options={"speed": 3})
    with pytest.raises(Exception, match=r"backend='qmir'.*speed"):
        compiled(torch.rand(1, 3, 9, 10))


def test_the_backend_is_found_by_name_alone() -> None:
    code = (
        "import sys, torch, torch._dynamo as d; assert 'qmir' in d.list_backends(); "
        "assert 'qmir_ao' not in sys.modules; print(d.lookup_backend('qmir').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "qmir"
