"""The "cuda" target: what it needs, that every operator has a kernel, whole networks on them."""

import copy
from typing import Any

import pytest
import torch
from support.host_launcher import HostLauncher, needs_compiler
from support.lowering import psnr
from support.models import CAPTURES, ConvNet, ScanNet, example
from support.tolerances import END_TO_END_PSNR
from torch import nn
from torch.fx import GraphModule, Interpreter

import qmir_ao
from qmir_ao.backend.cuda import device
from qmir_ao.backend.cuda.registration import KERNELS
from qmir_ao.backend.lowered import LoweredModule, move
from qmir_ao.backend.registry import TARGETS, lower_graph
from qmir_ao.errors import ConfigError, DeviceError
from qmir_ao.ops._library import OPS
from qmir_ao.recipes.models.mambair import CONFIGS, MambaIR

WITHOUT_KERNEL = {
    "rfa_quantize": "weights are folded once, when a network is lowered",
    "rfa_dequantize": "a packed weight is read as codes; only float operators ask for its values",
    "static_fake_quant": "trains the rivals, in plain torch",
    "static_fake_quant_backward": "trains the rivals, in plain torch",
}
NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "convolutions": (ConvNet, (2, 3, 5, 6)),
    "scan": (ScanNet, (2, 4, 7)),
}


class OnKernels(Interpreter):
    """Runs a graph with every `qmir` operator on its CUDA kernels, in the simulator."""

    def __init__(self, graph_module: GraphModule, launch: HostLauncher) -> None:
        super().__init__(graph_module)
        self.launch = launch

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "namespace", "") == "qmir":
            return KERNELS[target._schema.name.removeprefix("qmir::")](self.launch, *args, **kwargs)
        return super().call_function(target, args, kwargs)


def prepared(model: nn.Module, size: tuple[int, ...], capture: str, bits: int) -> GraphModule:
    torch.manual_seed(0)
    qconfig = qmir_ao.get_qmir_qconfig(bits, bits)
    graph = qmir_ao.prepare_qat(model, qconfig, example(capture, *size))
    graph(torch.rand(size))
    return graph.eval()


def on_kernels(lowered: LoweredModule, x: torch.Tensor, seed: int) -> torch.Tensor:
    with torch.no_grad():
        result = OnKernels(lowered.graph_module, HostLauncher(seed)).run(x)
    assert isinstance(result, torch.Tensor)
    return result


def test_every_operator_has_a_kernel_or_a_reason() -> None:
    assert {name.removeprefix("qmir::") for name in OPS} == set(KERNELS) | set(WITHOUT_KERNEL)
    assert not set(KERNELS) & set(WITHOUT_KERNEL)


@needs_compiler
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run_on_the_kernels(name: str, capture: str, bits: int) -> None:
    model, size = NETWORKS[name]
    graph = prepared(model(), size, capture, bits)
    before = copy.deepcopy(graph.state_dict())
    cuda, cpu = (lower_graph(graph, TARGETS[target]) for target in ("cuda", "cpu"))
    assert [r.kind for r in cuda.report.operators] == [r.kind for r in cpu.report.operators]
    x = torch.rand(size)
    got, want = on_kernels(cuda, x, seed=bits), cpu(x)
    assert psnr(got, want) >= END_TO_END_PSNR[bits]
    assert all(torch.equal(v, before[k]) for k, v in graph.state_dict().items())


@needs_compiler
def test_a_network_of_the_zoo_runs_on_the_kernels() -> None:
    torch.manual_seed(0)
    model = MambaIR(**{**CONFIGS["mambair-tiny-x2"], "embed_dim": 32, "depths": (1,)})
    size = (1, 3, 7, 6)
    graph = prepared(model, size, "trace", 4)
    x = torch.rand(size)
    cuda, cpu = (lower_graph(graph, TARGETS[target]) for target in ("cuda", "cpu"))
    launch = HostLauncher(1)
    with torch.no_grad():
        got = OnKernels(cuda.graph_module, launch).run(x)
    assert psnr(got, cpu(x)) >= END_TO_END_PSNR[4]
    used = {source for source, _ in launch.launched}
    assert {"qlinear", "ss2d_scan_q", "chain_quantize", "moments"} <= used


def test_without_a_gpu_the_target_refuses_before_it_works(monkeypatch: Any) -> None:
    graph = prepared(ConvNet(), (1, 3, 5, 5), "trace", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="target='cpu'"):
        qmir_ao.convert_and_lower(graph, target="cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match="driver"):
        qmir_ao.convert_and_lower(graph, target="cuda")


def test_a_gpu_without_cupy_is_refused(monkeypatch: Any) -> None:
    def missing(where: torch.device) -> None:
        raise DeviceError(f"no CuPy for {where}")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "require_kernels", missing)
    with pytest.raises(DeviceError, match="no CuPy for cuda:0"):
        device.ready_device()


def test_loading_for_cuda_needs_the_device(tmp_path: Any, monkeypatch: Any) -> None:
    lowered = qmir_ao.convert_and_lower(prepared(ConvNet(), (1, 3, 5, 5), "trace", 4))
    qmir_ao.save(lowered, tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError):
        qmir_ao.load(tmp_path / "model", target="cuda")
    with pytest.raises(ConfigError, match="cpu, cuda"):
        qmir_ao.load(tmp_path / "model", target="gpu")


def test_an_input_on_another_device_is_named() -> None:
    lowered = qmir_ao.convert_and_lower(prepared(ConvNet(), (1, 3, 5, 5), "trace", 4))
    with pytest.raises(DeviceError, match=r"input 0 is on meta.*x.to\('cpu'\)"):
        lowered(torch.rand(1, 3, 5, 5, device="meta"))


def test_moving_a_graph_moves_the_tensors_it_makes() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(3, device=torch.device("cpu"))

    graph = torch.fx.symbolic_trace(Adds())
    graph = torch.fx.GraphModule(graph, graph.graph)
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        made = graph.graph.call_function(torch.ones, (3,), {"device": torch.device("cpu")})
    add = next(n for n in graph.graph.nodes if n.op == "call_function" and n is not made)
    add.args = (add.args[0], made)
    moved = move(graph, torch.device("meta"))
    assert moved(torch.rand(3, device="meta")).device.type == "meta"
