"""Every architecture of the zoo, small: prepared at W4A4, trained one step, lowered and loaded.

A new architecture gets a row in `SMALL`: what runs on integers and what stays in float, and why,
is part of the row, so that nothing slips to float silently.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.integers import same_bytes
from support.lowering import check_operators
from support.models import example, train_step
from torch import nn
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.recipes.models.eamamba import EAMamba, EAMambaSR
from qmir_ao.recipes.models.edsr import EDSR
from qmir_ao.recipes.models.mair import MaIR
from qmir_ao.recipes.models.mambair_unet import MambaIRUNet
from qmir_ao.recipes.models.mambairv2 import MambaIRv2
from qmir_ao.recipes.models.swinir import SwinIR
from qmir_ao.recipes.models.vmambair import VmambaIR

FIRST = "conv_first stays in float, as in the paper"
AFTER = "conv_after_body stays in float, as in the paper"
UPSAMPLE = "upsample stays in float, as in the paper"
LAST = "conv_last stays in float, as in the paper"
BEFORE = "conv_before_upsample stays in float, as in the paper"
UPSAMPLER = "the upsampler stays in float, as in the paper"
LAST_CONV = "the last convolution stays in float, as in the paper"
PATCHES = "patch_embed stays in float, as in the paper"
ATTENTION = "channel attention stays in float, as in the paper"
NORM = "normalization stays in float, as in the paper"
POINTWISE = "element-wise or pooling arithmetic stays in float"
UNQUANTIZED = "it has no quantizer"


@dataclasses.dataclass(frozen=True)
class Small:
    """A small network and what lowering makes of it.

    Attributes:
        build: makes the network.
        operators: how many operators of each kind run on integer codes.
        floats: reason to operators left in float and how many of each. A convolution's quantizer
            adds its channel shift in float, which counts as an "add".
        captures: captures that work on it.
        channels: channels of its input.
        ones_when_traced: products with ones, which stochastic depth leaves, that stay in a symbolic
            trace: it does not say what shape they have.
    """

    build: Callable[[], nn.Module]
    operators: dict[str, int]
    floats: dict[str, dict[str, int]]
    captures: tuple[str, ...] = ("export", "trace")
    channels: int = 3
    ones_when_traced: int = 0


SMALL: dict[str, Small] = {
    "edsr": Small(
        lambda: EDSR(scale=2, features=8, blocks=2, res_scale=0.1),
        {"conv2d": 4},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            UPSAMPLE: {"conv2d": 1},
            LAST: {"conv2d": 1},
            POINTWISE: {"sub": 1, "mul": 3, "relu": 2, "add": 8, "div": 1},
        },
    ),
    "swinir": Small(
        lambda: SwinIR(
            scale=2,
            upsampler="pixelshuffledirect",
            embed_dim=12,
            depths=(2, 1),
            heads=(2, 3),
            window=4,
        ),
        {"linear": 12, "conv2d": 2},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            UPSAMPLE: {"conv2d": 1},
            NORM: {"layer_norm": 8},
            UNQUANTIZED: {"matmul": 6},
            POINTWISE: {"sub": 1, "mul": 3, "add": 28, "gelu": 3, "softmax": 3},
        },
    ),
    "swinir-grey": Small(
        lambda: SwinIR(
            embed_dim=12, depths=(2,), heads=(2,), window=3, in_channels=1, img_range=255.0
        ),
        {"linear": 8, "conv2d": 1},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            LAST: {"conv2d": 1},
            NORM: {"layer_norm": 6},
            UNQUANTIZED: {"matmul": 4},
            POINTWISE: {"sub": 1, "mul": 3, "add": 20, "div": 1, "gelu": 2, "softmax": 2},
        },
        captures=("trace",),
        channels=1,
    ),
    "mambairv2-light": Small(
        lambda: MambaIRv2(
            scale=3,
            upsampler="pixelshuffledirect",
            embed_dim=12,
            depths=(2,),
            heads=(2,),
            window=4,
            d_state=3,
            inner_rank=5,
            num_tokens=7,
            mlp_ratio=1.0,
            gated=True,
        ),
        {"linear": 18, "conv2d": 13, "selective_scan": 2},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            UPSAMPLE: {"conv2d": 1},
            NORM: {"layer_norm": 16},
            UNQUANTIZED: {"matmul": 6},
            POINTWISE: {
                "sub": 3,
                "mul": 12,
                "add": 51,
                "gelu": 6,
                "sigmoid": 2,
                "softmax": 4,
                "argmax": 2,
                "argsort": 2,
            },
        },
    ),
    "mambairv2": Small(
        lambda: MambaIRv2(
            scale=2,
            upsampler="pixelshuffle",
            embed_dim=12,
            depths=(2,),
            heads=(3,),
            window=4,
            d_state=2,
            inner_rank=4,
            num_tokens=6,
        ),
        {"linear": 18, "conv2d": 13, "selective_scan": 2},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            BEFORE: {"conv2d": 1},
            UPSAMPLE: {"conv2d": 1},
            LAST: {"conv2d": 1},
            NORM: {"layer_norm": 12},
            UNQUANTIZED: {"matmul": 6},
            POINTWISE: {
                "sub": 3,
                "mul": 8,
                "add": 55,
                "gelu": 10,
                "leaky_relu": 1,
                "sigmoid": 2,
                "softmax": 4,
                "argmax": 2,
                "argsort": 2,
            },
        },
    ),
    "mambair-real-denoise": Small(
        lambda: MambaIRUNet(dim=30, depths=(1, 1, 1, 1), refinement=1, d_state=2, expand=1.0),
        {"linear": 16, "conv2d": 48, "selective_scan": 8},
        {
            PATCHES: {"conv2d": 1},
            LAST_CONV: {"conv2d": 1},
            ATTENTION: {"conv2d": 16},
            NORM: {"layer_norm": 24},
            POINTWISE: {
                "adaptive_avg_pool2d": 8,
                "add": 73,
                "gelu": 8,
                "mul": 32,
                "relu": 8,
                "sigmoid": 8,
                "silu": 16,
            },
        },
    ),
    "mair-light": Small(
        lambda: MaIR(
            scale=2,
            upsampler="pixelshuffledirect",
            embed_dim=8,
            depths=(2,),
            d_state=2,
            expand=1.5,
            mlp_ratio=1.6,
            stripe=4,
        ),
        {"linear": 8, "conv2d": 7, "selective_scan": 2},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            UPSAMPLE: {"conv2d": 1},
            ATTENTION: {"conv2d": 2},
            NORM: {"layer_norm": 8},
            POINTWISE: {
                "adaptive_avg_pool2d": 2,
                "add": 26,
                "gelu": 2,
                "mul": 8,
                "sigmoid": 2,
                "silu": 4,
                "sub": 1,
            },
        },
        ones_when_traced=1,
    ),
    "mair-grey": Small(
        lambda: MaIR(embed_dim=8, depths=(2,), d_state=1, expand=1.3, in_channels=1),
        {"linear": 8, "conv2d": 7, "selective_scan": 2},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            LAST: {"conv2d": 1},
            ATTENTION: {"conv2d": 2},
            NORM: {"layer_norm": 8},
            POINTWISE: {
                "adaptive_avg_pool2d": 2,
                "add": 27,
                "gelu": 2,
                "mul": 8,
                "sigmoid": 2,
                "silu": 4,
                "sub": 1,
            },
        },
        channels=1,
        ones_when_traced=1,
    ),
    "vmambair": Small(
        lambda: VmambaIR(scale=4, dim=8, depths=(1, 0, 0, 1), refinement=1),
        {"conv2d": 52, "selective_scan": 8},
        {
            PATCHES: {"conv2d": 1},
            UPSAMPLER: {"conv2d": 2},
            LAST_CONV: {"conv2d": 1},
            # The convolution of the pooled channels, before they are scanned.
            ATTENTION: {"conv2d": 4},
            NORM: {"layer_norm": 16},
            POINTWISE: {
                "adaptive_avg_pool2d": 4,
                "add": 61,
                "gelu": 4,
                "mul": 12,
                "silu": 8,
                "upsample_nearest2d": 1,
            },
        },
    ),
    "eamamba-light": Small(
        lambda: EAMambaSR(scale=3, dim=16, depths=(1, 1), d_state=2),
        {"linear": 4, "conv2d": 12, "selective_scan": 2},
        {
            FIRST: {"conv2d": 1},
            AFTER: {"conv2d": 1},
            BEFORE: {"conv2d": 1},
            UPSAMPLE: {"conv2d": 1},
            LAST: {"conv2d": 1},
            NORM: {"layer_norm": 7},
            POINTWISE: {"add": 21, "leaky_relu": 1, "mul": 4, "silu": 4},
        },
    ),
    "eamamba-denoise": Small(
        lambda: EAMamba(dim=8, depths=(1, 0, 0, 1), refinement=1, d_state=2),
        {"linear": 8, "conv2d": 28, "selective_scan": 4},
        {
            PATCHES: {"conv2d": 1},
            LAST_CONV: {"conv2d": 1},
            NORM: {"layer_norm": 12},
            POINTWISE: {"add": 41, "mul": 8, "silu": 8},
        },
    ),
}
CASES = [(name, capture) for name, small in SMALL.items() for capture in small.captures]
cases = pytest.mark.parametrize(("name", "capture"), CASES)
ALIASES = {"truediv": "div", "iadd": "add", "interpolate": "upsample_nearest2d"}
"""Operators of a symbolic trace, and the names that an export gives them."""
EXAMPLE, OTHER = (10, 9), (13, 19)


@functools.cache
def pair(name: str, capture: str) -> tuple[GraphModule, LoweredModule]:
    """A small network after one training step at W4A4, and its lowered form."""
    small = SMALL[name]
    torch.manual_seed(0)
    dynamic: Any = torch.export.Dim.DYNAMIC
    prepared = qmir_ao.prepare_qat(
        small.build(),
        qmir_ao.get_qmir_qconfig(4, 4),
        example(capture, 2, small.channels, *EXAMPLE),
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},) if capture == "export" else None,
    )
    before = {key: value.detach().clone() for key, value in prepared.named_parameters()}
    train_step(prepared, torch.rand(2, small.channels, *EXAMPLE))
    moved = [k for k, v in prepared.named_parameters() if not torch.equal(v, before[k])]
    assert len(moved) > len(before) / 2
    return prepared, qmir_ao.convert_and_lower(prepared.eval())


@cases
def test_operators_agree_on_equal_inputs(name: str, capture: str) -> None:
    prepared, lowered = pair(name, capture)
    check_operators(prepared, lowered, torch.rand(2, SMALL[name].channels, *OTHER))


@cases
def test_what_stays_in_float_is_what_the_table_says(name: str, capture: str) -> None:
    report = pair(name, capture)[1].report
    assert Counter(r.kind for r in report.operators) == SMALL[name].operators
    floats: dict[str, Counter[str]] = {}
    for record in report.left_in_float:
        floats.setdefault(record.reason, Counter())[ALIASES.get(record.op, record.op)] += 1
    if capture == "trace":
        floats[POINTWISE]["mul"] -= SMALL[name].ones_when_traced
    assert floats == SMALL[name].floats


@cases
def test_saved_and_loaded_is_the_same_network(name: str, capture: str, tmp_path: Path) -> None:
    lowered = pair(name, capture)[1]
    qmir_ao.save(lowered, tmp_path / name)
    loaded = qmir_ao.load(tmp_path / name)
    x = torch.rand(2, SMALL[name].channels, *OTHER)
    whole = loaded(x)
    assert whole.isfinite().all()
    assert loaded(x[:, :, :3, :2]).isfinite().all()
    assert same_bytes(whole, lowered(x))
    assert same_bytes(whole[1:], loaded(x[1:]))
    assert loaded.report == lowered.report
