"""A network with every chain of float operators that a quantizer's operator can take over."""

import copy
import dataclasses
import functools

import torch
import torch.nn.functional as F
from support.models import example, train_step
from torch import Tensor, nn
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.registry import TARGETS, lower_graph
from qmir_ao.passes.fuse_norm_chain import FuseNormChain
from qmir_ao.passes.pipeline import CPU, CUDA, run_passes

QUANTIZERS, CHAINS = 6, 5
"""Quantized tensors of `Mixer`, and how many of them come from a chain of float operators."""


class Mixer(nn.Module):
    """Norms, activations, a gate and permutes before linear layers and convolutions."""

    any_size = True

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.out_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)
        self.local = nn.Conv2d(width, width, 3, padding=1)
        self.wide = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).permute(0, 2, 3, 1)
        y, z = self.in_proj(self.ln_1(x)).chunk(2, dim=-1)
        y = self.point(F.silu(self.depthwise(y.permute(0, 3, 1, 2))))
        x = x + self.out_proj(self.out_norm(y.permute(0, 2, 3, 1)) * F.silu(z))
        y = self.wide(F.gelu(self.local(self.ln_2(x).permute(0, 3, 1, 2))))
        return self.last(y + x.permute(0, 3, 1, 2))


@functools.cache
def prepared(capture: str, bits: int = 4, model: type[Mixer] = Mixer) -> GraphModule:
    """A prepared network of random weights after one training step."""
    torch.manual_seed(0)
    size = (3, 3, 9, 11)
    qconfig = qmir_ao.get_qmir_qconfig(bits, bits)
    dynamic = torch.export.Dim.DYNAMIC
    free = capture == "export" and model.any_size
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},) if free else None
    graph = qmir_ao.prepare_qat(model(), qconfig, example(capture, *size), dynamic_shapes=shapes)
    train_step(graph, torch.rand(size))
    return graph.eval()


def without_chains(graph_module: GraphModule) -> LoweredModule:
    """Lowered for the CPU by the passes whose floats round as those of the separate operators."""
    passes = tuple(p for p in CPU if not isinstance(p, FuseNormChain))
    return lower_graph(graph_module, dataclasses.replace(TARGETS["cpu"], passes=passes))


def before(name: str, graph_module: GraphModule) -> GraphModule:
    """A copy on which every pass before `name` ran, of the first target that has it."""
    result = copy.deepcopy(graph_module)
    result.eval()
    passes = next(p for p in (CPU, CUDA) if name in [one.name for one in p])
    run_passes(result, passes[: [one.name for one in passes].index(name)])
    return result


def count(graph_module: GraphModule, *targets: object) -> int:
    """Calls of any of the targets."""
    return sum(n.target in targets for n in graph_module.graph.nodes)


def run(graph_module: GraphModule, x: Tensor) -> Tensor:
    """The result without gradients."""
    with torch.no_grad():
        y: Tensor = graph_module(x)
    return y
