"""Rows of a whole network: integers beside bf16 through Inductor, times and peak memory."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from support.gpu import call_times
from support.gpu_rows.rows import MAMBA, OURS, is_missing
from support.gpu_rows.scans import mamba_scan, our_scan, published_path
from support.gpu_rows.table import Measured
from torch import Tensor, nn

import qmir_ao
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.models.grouped_scan import GroupedScan
from qmir_ao.recipes.models.ss2d import CrossScan, K

NAME = "mambair-light-x2"
SIZE = (1, 3, 320, 320)
FORMS = ("as called", "as a CUDA graph")
WITH_MAMBA = f"bf16 Inductor, {MAMBA}'s scan"
WITH_OURS = "bf16 Inductor, published path, our scan"
WITH_IMAGES = "bf16 Inductor, our ss2d_scan"
FASTER = {WITH_MAMBA: 1.5, WITH_OURS: 1.5}
"""Peer to how often the time of the integers should fit into its own."""
SMALLER = {WITH_MAMBA: 0.5, WITH_OURS: 0.5}
"""Peer to the share of its peak memory that the integers may take."""

Run = Callable[[Tensor], Tensor]
Scan = Callable[..., Tensor]


class Network(NamedTuple):
    """One form of a network; nothing of it is on the device before `build` is called."""

    side: str
    build: Callable[[], Run]
    needs: str | None = None

    def missing(self) -> bool:
        """Whether the module that it needs is not installed."""
        return is_missing(self.needs)


def default_model() -> nn.Module:
    """The network of the project's goal, with the same random weights each time."""
    torch.manual_seed(0)
    return create_model(NAME)


def lowered(gpu: Any, model: nn.Module, bits: int) -> Run:
    """The network in integers, its quantizers set from one random image."""
    prepared = qmir_ao.prepare_qat(
        model.to(gpu.device).eval(), qmir_ao.get_qmir_qconfig(bits, bits)
    )
    with torch.no_grad():
        prepared(torch.rand(1, 3, 24, 24, device=gpu.device))
    return qmir_ao.convert_and_lower(prepared.eval(), target=gpu.target)


def half(network: nn.Module) -> nn.Module:
    """The network in bf16, but for the scans' A, D and bias, which mamba-ssm takes in float32."""
    scans = [m for m in network.modules() if isinstance(m, GroupedScan)]
    kept = [(m.A_logs.data, m.Ds.data, m.dt_projs_bias.data) for m in scans]
    network = network.bfloat16()
    for module, values in zip(scans, kept, strict=True):
        module.A_logs.data, module.Ds.data, module.dt_projs_bias.data = values
    return network


def published_scan(owner: CrossScan, plain: Scan) -> Run:
    """What `CrossScan.scan` computes, by the published path around a plain scan."""

    def run(x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        _, inner, rank, states = owner.sizes

        def scan(xs: Tensor) -> Tensor:
            sequences = xs.view(batch, K, inner, height * width)
            projected = torch.einsum("bkdl,kcd->bkcl", sequences, owner.x_proj_weight)
            dts, B, C = torch.split(projected, [rank, states, states], dim=2)
            dts = torch.einsum("bkrl,kdr->bkdl", dts, owner.dt_projs_weight)
            A, bias = -torch.exp(owner.A_logs), owner.dt_projs_bias.reshape(-1)
            operands = (xs, dts.reshape(xs.shape), A, B.contiguous(), C.contiguous())
            return plain(*operands, owner.Ds, bias)

        summed: Tensor = published_path(scan, height, width)(x)
        return summed

    return run


def as_published(network: nn.Module, plain: Scan) -> nn.Module:
    """The network with the published path instead of its scans over images."""
    for module in network.modules():
        if isinstance(module, CrossScan):
            # An attribute of the instance goes before the method of its class.
            module.__dict__["scan"] = published_scan(module, plain)
    return network


@torch.library.custom_op("qmir_bench::mamba_scan", mutates_args=())
def _mamba_operator(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """mamba-ssm's scan as an operator, so that Inductor compiles the network in one piece."""
    return mamba_scan(u, delta, A, B, C, D, bias)


@_mamba_operator.register_fake
def _(u: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(u)


def compiled(gpu: Any, model: nn.Module, plain: Scan | None) -> Run:
    """The network in bf16 through Inductor, with the published path around `plain` if given."""
    network = half(model).to(gpu.device).eval()
    run = gpu.compiled(network if plain is None else as_published(network, plain))
    return lambda x: run(x.bfloat16())


def networks(gpu: Any, model: Callable[[], nn.Module] = default_model) -> Iterator[Network]:
    """All forms of the network.

    Args:
        gpu: the device, see `support.gpu.Gpu`.
        model: makes it, with the same weights each time.
    """
    for bits in (4, 8):
        yield Network(f"{OURS} W{bits}A{bits}", lambda bits=bits: lowered(gpu, model(), bits))
    yield Network(WITH_MAMBA, lambda: compiled(gpu, model(), _mamba_operator), "mamba_ssm")
    yield Network(WITH_OURS, lambda: compiled(gpu, model(), our_scan))
    yield Network(WITH_IMAGES, lambda: compiled(gpu, model(), None))


@torch.no_grad()
def measured(gpu: Any, network: Network, size: tuple[int, ...], form: str) -> Measured:
    """Times and peak memory of one form of the network on one image.

    Args:
        gpu: the device, see `support.gpu.Gpu`.
        network: what to build.
        size: of the image.
        form: one of FORMS.

    Raises:
        AssertionError: a result that is not finite.
    """
    gpu.free()
    run, x = network.build(), torch.rand(size, device=gpu.device)
    for _ in range(2):  # compiles
        assert run(x).isfinite().all(), f"{network.side}: the image is not finite"
    gpu.free()
    peak = gpu.peak(lambda: run(x))
    if form != FORMS[0]:
        replay = gpu.captured(run, x)
        seconds = call_times(gpu, replay, lambda: ())
    else:
        seconds = call_times(gpu, run, lambda: (x,), lead=False)
    work = f"`{NAME}`, {'x'.join(map(str, size))}"
    return Measured(work, form, network.side, seconds, peak if form == FORMS[0] else 0)
