"""What a network costs: parameters, operations and bytes, counted in more than one way.

Published tables rarely say how they count. Two counts of the same network may differ by a third:
`thop`, which the paper used, sees only modules that it knows, and so neither the bare parameters
of a selective scan nor the scan itself.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qmir_ao.ops.selective_scan
import qmir_ao.ops.ss2d_scan  # noqa: F401  (define the operators named below)
from qmir_ao.backend.layers import capture_float, find_layers, model_bytes, quantized_layers
from qmir_ao.errors import CaptureError
from qmir_ao.recipes.models.cab import CAB
from qmir_ao.recipes.models.mambair import MambaIR

SIDE = 320
"""Side of the input that the paper counts operations on."""
PROBE = 64
"""Side of the image on which a network that needs one is captured."""
SCAN_FACTOR = 9
"""Operations of a selective scan for each position, channel and state, as fvcore counts them."""

LABELS = {
    "parameters": "every parameter of the network",
    "thop_parameters": "as thop counts: no scan parameters, no skip scales",
    "macs": "layers and scans",
    "macs_layers": "convolutions, linear layers, projections of the scans, attention",
    "scan_operations": f"the recurrences: {SCAN_FACTOR} for each position, channel and state",
    "thop_macs": "as thop counts: no scans, no projections of scans; norms and pooling counted",
}
"""What each count includes."""


def parameters(model: nn.Module) -> int:
    """True number of parameters: every tensor, those of the scans included."""
    return sum(p.numel() for p in model.parameters())


def ghost_run(model: nn.Module, side: int) -> tuple[nn.Module, Tensor]:
    """A copy of a network, and an image for it, that have shapes but no values."""
    ghost = copy.deepcopy(model).to("meta").eval()
    return ghost, torch.empty(1, _channels(model), side, side, device="meta")


def _channels(model: nn.Module) -> int:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else int(first.in_channels)


def operations(model: nn.Module, side: int = SIDE) -> dict[str, int]:
    """Multiply-accumulates of one image, without computing them.

    Args:
        model: network on images of 3 channels, or of its `in_channels`.
        side: height and width of the input.

    Returns:
        `layers` (convolutions and linear layers, the projections of the scans included), `scan`
        (the recurrences themselves) and `total`.
    """
    ghost, image = ghost_run(model, side)
    mapping = dict.fromkeys((torch.ops.qmir.selective_scan, torch.ops.qmir.ss2d_scan), _scan)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        ghost(image)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    scans = sum(n for op, n in counts.items() if op in mapping)
    layers = (sum(counts.values()) - scans) // 2
    return {"layers": layers, "scan": scans, "total": layers + scans}


def _scan(u: torch.Size, delta: torch.Size, a: torch.Size, *rest: Any, **more: Any) -> int:
    """Operations from the shapes of u, delta (one value for each channel and position), (E, N)."""
    return SCAN_FACTOR * math.prod(delta) * a[1]


@dataclass(frozen=True)
class ThopCount:
    """Parameters and multiply-accumulates that `thop.profile` 0.1.1 would print."""

    parameters: int
    macs: int


def count_like_thop(model: nn.Module, side: int = SIDE) -> ThopCount:
    """Count as `thop.profile` 0.1.1 does, for comparison with published tables.

    Only modules of known classes that run are counted: each with its own parameters, and
    multiply-accumulates by its class. Parameters held by the network's own modules, operators
    called as functions and selective scans are not seen.

    Args:
        model: network on images of 3 channels, or of its `in_channels`.
        side: height and width of the input.
    """
    ghost, image = ghost_run(model, side)
    macs: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        macs[module] = macs.get(module, 0) + _thop_macs(module, inputs[0], output)

    for module in ghost.modules():
        if type(module) in _THOP_KNOWN:  # thop looks classes up, so that subclasses do not count
            module.register_forward_hook(count)
    with torch.no_grad():
        ghost(image)
    seen = sum(parameters(module) for module in macs)
    return ThopCount(seen, sum(macs.values()))


_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (
    nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_THOP_KNOWN = {*_CONVOLUTIONS, *_NORMS, *_POOLS, nn.Linear, nn.Softmax, nn.PReLU}


def _thop_macs(module: nn.Module, x: Tensor, y: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features * y.numel()
    if isinstance(module, _CONVOLUTIONS):
        taps: Any = module.weight.shape[2:]
        return int(y.numel() * (x.shape[1] // int(module.groups)) * math.prod(taps))
    if isinstance(module, _POOLS):
        return (math.prod(x.shape[2:]) // math.prod(y.shape[2:]) + 1) * y.numel()
    if isinstance(module, nn.Softmax):
        width = x.shape[-1]
        return (x.numel() // width) * (3 * width - 1)
    if isinstance(module, nn.PReLU):
        return x.numel()
    affine = getattr(module, "affine", False) or getattr(module, "elementwise_affine", False)
    return (4 if affine else 2) * x.numel()


@dataclass(frozen=True)
class Complexity:
    """All counts of one network; `LABELS` says what each includes."""

    side: int
    parameters: int
    thop_parameters: int
    macs: int
    macs_layers: int
    scan_operations: int
    thop_macs: int


def complexity(model: nn.Module, side: int = SIDE) -> Complexity:
    """Count parameters and multiply-accumulates of one image of `side` x `side` in every way."""
    ours, thop = operations(model, side), count_like_thop(model, side)
    return Complexity(
        side=side,
        parameters=parameters(model),
        thop_parameters=thop.parameters,
        macs=ours["total"],
        macs_layers=ours["layers"],
        scan_operations=ours["scan"],
        thop_macs=thop.macs,
    )


@dataclass(frozen=True)
class Described:
    """A network that a published table really describes.

    Attributes:
        row: name in the table.
        published: its parameters and operations there, as printed.
        settings: arguments of `MambaIR`.
        squeeze: divisor of the channels inside the convolution block.
    """

    row: str
    published: tuple[str, str]
    settings: dict[str, Any]
    squeeze: int = 6

    def build(self) -> MambaIR:
        """The network, with fresh weights and without values (device "meta")."""
        with torch.device("meta"):
            model = MambaIR(**self.settings)
            width = self.settings["embed_dim"]
            for group in model.layers:
                for block in group.residual_group.blocks:  # type: ignore[union-attr]
                    block.conv_blk = _compressed(width, self.squeeze)
        return model


def _compressed(channels: int, squeeze: int) -> CAB:
    block = CAB(channels, light=False)
    block.cab[0] = nn.Conv2d(channels, channels // squeeze, 3, padding=1)
    block.cab[2] = nn.Conv2d(channels // squeeze, channels, 3, padding=1)
    return block


TABLE_4: Sequence[Described] = (
    Described(
        "MambaIR-light x2",
        ("859.32K", "88.02G"),
        {
            "scale": 2, "upsampler": "pixelshuffledirect", "embed_dim": 60,
            "depths": (6, 6, 6, 6), "d_state": 16, "expand": 1.5,
        },
    ),
    Described(
        "MambaIR x2",
        ("13.072M", "1.334T"),
        {
            "scale": 2, "upsampler": "pixelshuffle", "embed_dim": 180, "depths": (6,) * 6,
            "d_state": 16, "expand": 2.0,
        },
    ),
)  # fmt: skip
"""The networks behind the float rows of the paper's table 4: a model zoo of the authors' analysis
scripts, whose convolution blocks and states are not those of the trained networks."""


def bytes_at(model: nn.Module, bits: Sequence[int]) -> dict[str, Any]:
    """Bytes of a network at several widths, quantized where it is quantized by default.

    Args:
        model: float network.
        bits: 2 to 8; 3 bits are stored in 4, 5 to 7 in 8.

    Returns:
        `bytes_at`: for "32" and each width the `weights` that are quantized (packed, with their
        scales), the `rest` in float32, their `total` and its `ratio` to float32.
    """
    ghost, _ = ghost_run(model, PROBE)
    try:
        graph = capture_float(ghost)
    except CaptureError:
        graph = capture_float(model, (torch.zeros(1, _channels(model), PROBE, PROBE),))
    layers = find_layers(graph)
    whole = 4 * parameters(model)
    quantized = 4 * sum(layer.elements for layer in quantized_layers(layers))
    rows = {"32": {"weights": quantized, "rest": whole - quantized, "total": whole}}
    rows |= {str(width): model_bytes(model, layers, width) for width in bits}
    return {"bytes_at": {k: {**row, "ratio": row["total"] / whole} for k, row in rows.items()}}
