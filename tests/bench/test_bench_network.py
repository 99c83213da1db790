"""Whole mambair-light-x2: one image in float, compiled float and integers; one training step."""

import pytest
import torch
from torch import nn

import qmir_ao
from qmir_ao.recipes.models import create_model

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("mambair-light-x2").eval()


def prepared(network: nn.Module, bits: int) -> torch.fx.GraphModule:
    graph = qmir_ao.prepare_qat(network, qmir_ao.get_qmir_qconfig(bits, bits))
    with torch.no_grad():
        graph(torch.rand(1, 3, 48, 48))
    return graph.eval()


@pytest.mark.parametrize("form", ["eager", "inductor", "qmir", "lowered-w4a4", "lowered-w2a2"])
@pytest.mark.benchmark(group="mambair-light-x2, 64x64 image")
def test_inference(benchmark, network: nn.Module, form: str) -> None:
    x = torch.rand(1, 3, 64, 64)
    if form in ("inductor", "qmir"):
        torch._dynamo.reset()
        model = torch.compile(network, backend=form)
    elif form == "eager":
        model = network
    else:
        model = qmir_ao.convert_and_lower(prepared(network, int(form[-1])))
    with torch.no_grad():
        y = benchmark.pedantic(model, (x,), rounds=5, warmup_rounds=2)
    assert y.shape == (1, 3, 128, 128)


@pytest.mark.parametrize("form", ["float", "qat-w4a4"])
@pytest.mark.benchmark(group="mambair-light-x2 training step, batch 2, 48x48 patch")
def test_training_step(benchmark, network: nn.Module, form: str) -> None:
    model = create_model("mambair-light-x2") if form == "float" else prepared(network, 4)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    x, target = torch.rand(2, 3, 48, 48), torch.rand(2, 3, 96, 96)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(x) - target).abs().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    assert benchmark.pedantic(step, rounds=7, warmup_rounds=2) > 0
