"""MambaIRv2: published counts and keys, parity, routing, both captures."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.paths import GOLDEN, needs_golden
from support.tolerances import OFFICIAL_VALUE
from support.zoo import (
    check_batch_mates,
    check_captures,
    on_meta,
    parameter_count,
    run,
    with_leaves,
)
from torch import Tensor

from qmir_ao.errors import ConfigError
from qmir_ao.ops.selective_scan import selective_scan_ref
from qmir_ao.recipes.models.mambairv2 import MambaIRv2
from qmir_ao.recipes.models.mambairv2_parts import ASSM, one_hot_policy

# Without the x2 head (three convolutions), with one from the body to the image.
DENOISE = 22_903_001 - (174 * 9 + 1) * 64 - (64 * 9 + 1) * 256 - (64 * 9 + 1) * 3 + 174 * 27 + 3
PUBLISHED = {
    "mambairv2-light-x2": 774_092,
    "mambairv2-light-x3": 780_587,
    "mambairv2-light-x4": 789_680,
    "mambairv2-small-x2": 9_621_935,
    "mambairv2-small-x3": 9_806_575,
    "mambairv2-small-x4": 9_769_647,
    "mambairv2-x2": 22_903_001,
    "mambairv2-x3": 23_087_641,
    "mambairv2-x4": 23_050_713,
    "mambairv2-large-x2": 34_090_523,
    "mambairv2-large-x3": 34_275_163,
    "mambairv2-large-x4": 34_238_235,
    "mambairv2-denoise": DENOISE,
    "mambairv2-jpeg": DENOISE - 2 * 174 * 9 - (2 * 174 * 9 + 2),
}
SCAN = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
LAYER = {
    "scale1",
    "scale2",
    "win_mhsa.relative_position_bias_table",
    "assm.embeddingB.weight",
    "embeddingA.weight",
    *(f"assm.selectiveScan.{name}" for name in SCAN),
} | with_leaves(
    *(f"norm{i}" for i in (1, 2, 3, 4)),
    *(f"assm.{name}" for name in ("out_norm", "out_proj", "in_proj.0", "CPE.0", "route.0")),
    *("wqkv", "win_mhsa.proj", "assm.route.2"),
)
FEED_FORWARD = {
    "light": ("fc1", "fc2", "sg.norm", "sg.conv"),
    "base": ("fc1", "fc2", "dwconv.depthwise_conv.0"),
}
ENDS = ("conv_first", "patch_embed.norm", "norm", "conv_after_body")
HEADS = {
    "mambairv2-light-x2": ("upsample.0",),
    "mambairv2-x4": ("conv_before_upsample.0", "upsample.0", "upsample.2", "conv_last"),
    "mambairv2-jpeg": ("conv_last",),
}
TINY: dict[str, Any] = {
    "scale": 2,
    "upsampler": "pixelshuffledirect",
    "embed_dim": 12,
    "depths": (2,),
    "heads": (2,),
    "window": 4,
    "d_state": 3,
    "inner_rank": 5,
    "num_tokens": 7,
    "mlp_ratio": 1.0,
    "gated": True,
}


def small(**changes: Any) -> MambaIRv2:
    return MambaIRv2(**{**TINY, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameter_count(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", HEADS)
def test_state_dict_keys_are_the_published_ones(name: str) -> None:
    model = on_meta(name)
    names = FEED_FORWARD["light" if "light" in name else "base"]
    layer = LAYER | with_leaves(*(f"convffn{i}.{part}" for i in (1, 2) for part in names))
    expected = with_leaves(*ENDS, *HEADS[name]) | {"relative_position_index_SA"}
    for g, group in enumerate(model.layers):
        expected |= with_leaves(f"layers.{g}.conv")
        for i in range(len(group.residual_group.layers)):
            expected |= {f"layers.{g}.residual_group.layers.{i}.{key}" for key in layer}
    assert set(model.state_dict()) == expected


def test_light_has_the_published_shapes() -> None:
    state = on_meta("mambairv2-light-x2").state_dict()
    assert len(state) == 1019
    prefix = "layers.0.residual_group.layers.0"
    shapes = {
        "win_mhsa.relative_position_bias_table": (961, 4),
        "assm.selectiveScan.x_proj_weight": (1, 19, 48),
        "assm.selectiveScan.dt_projs_weight": (1, 48, 3),
        "assm.selectiveScan.dt_projs_bias": (1, 48),
        "assm.selectiveScan.A_logs": (48, 8),
        "assm.embeddingB.weight": (64, 32),
        "assm.route.0.weight": (16, 48),
        "convffn1.sg.conv.weight": (24, 1, 5, 5),
        "embeddingA.weight": (32, 8),
    }
    assert {key: state[f"{prefix}.{key}"].shape for key in shapes} == shapes
    assert state["relative_position_index_SA"].shape == (256, 256)


@needs_golden
def test_light_equals_the_published_one() -> None:
    with np.load(GOLDEN / "variants_official.npz") as golden:
        data = {k.removeprefix("v2light|"): golden[k] for k in golden if k.startswith("v2light|")}
    text = {k.removeprefix("cfg|"): str(v) for k, v in data.items() if k.startswith("cfg|")}
    names = {"num_heads": "heads", "window_size": "window"}
    settings: dict[str, Any] = {
        names.get(key, key): tuple(int(n) for n in value.strip("[]").split(","))
        if value.startswith("[")
        else (float if "." in value else int)(value)
        for key, value in text.items()
    }
    model = MambaIRv2(scale=2, upsampler="pixelshuffledirect", gated=True, **settings)
    state = {k.removeprefix("sd|"): torch.from_numpy(v) for k, v in data.items() if "sd|" in k}
    model.load_state_dict(state)
    x, y = (torch.from_numpy(data[key]) for key in ("x", "y"))
    torch.testing.assert_close(run(model, x), y, atol=OFFICIAL_VALUE, rtol=OFFICIAL_VALUE)


def naive_assm(module: ASSM, x: Tensor, embedding: Tensor) -> Tensor:
    """Pixel by pixel: route, queue up by token, scan the queue, walk back."""
    h, w, channels = x.shape
    pixels = x.reshape(h * w, channels)
    table = module.embeddingB.weight @ embedding
    chosen = [int(module.route(pixel).argmax()) for pixel in pixels]
    queue = sorted(range(h * w), key=lambda i: chosen[i])
    inner = module.in_proj(x.permute(2, 0, 1).unsqueeze(0))
    inner = (inner * torch.sigmoid(module.CPE(inner))).reshape(1, -1, h * w)
    u = torch.stack([inner[0, :, i] for i in queue], dim=1)
    scan = module.selectiveScan
    rank, states = scan.dt_projs_weight.shape[2], scan.A_logs.shape[1]
    dts, b_in, c_out = torch.split(scan.x_proj_weight[0] @ u, [rank, states, states])
    # The prompts stay in raster order, as published.
    c_out = c_out + torch.stack([table[token] for token in chosen], dim=1)
    decay, bias = -torch.exp(scan.A_logs), scan.dt_projs_bias[0]
    operands = u, scan.dt_projs_weight[0] @ dts
    operands = (*(t[None] for t in operands), decay, b_in[None, None], c_out[None, None])
    y = selective_scan_ref(*operands, scan.Ds, bias, True)[0].T
    y = module.out_proj(module.out_norm(y))
    out = torch.zeros(h * w, channels)
    for place, pixel in enumerate(queue):
        out[pixel] = y[place]
    return out.reshape(h, w, channels)


def assm(**changes: Any) -> ASSM:
    settings = {"d_state": 3, "tokens": 4, "rank": 2, "expand": 1.5, "routing": "gumbel"}
    return ASSM(8, **{**settings, **changes})


def test_attentive_scan_is_that_of_single_pixels() -> None:
    module = assm().eval()
    for weight in (module.embeddingB.weight, module.route[0].weight, module.route[2].weight):
        torch.nn.init.normal_(weight)
    x, embedding = torch.randn(2, 5, 6, 8), torch.randn(2, 3)
    with torch.no_grad():
        got = module(x, embedding)
        assert len(module.route(x).argmax(-1).unique()) > 2
        for i in range(2):
            want = naive_assm(module, x[i], embedding)
            torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-5)


def test_policy_is_one_hot_with_the_gradient_of_a_softmax() -> None:
    logits = torch.randn(2, 9, 5, requires_grad=True)
    policy, chosen = one_hot_policy(logits, noisy=False)
    assert torch.equal(chosen, logits.argmax(-1))
    assert torch.equal(policy, F.one_hot(chosen, 5).float())
    weights = torch.randn(2, 9, 5)
    (policy * weights).sum().backward()
    own = logits.detach().clone().requires_grad_()
    (own.softmax(-1) * weights).sum().backward()
    torch.testing.assert_close(logits.grad, own.grad)


def test_noise_samples_tokens_by_their_probability() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 40_000, 3)
    policy, chosen = one_hot_policy(logits, noisy=True)
    assert torch.equal(policy, F.one_hot(chosen, 3).float())
    shares = policy.mean((0, 1)) - logits[0, 0].exp()
    assert shares.abs().max() < 4 * math.sqrt(0.25 / 40_000)


@pytest.mark.parametrize(
    ("routing", "training", "repeatable"),
    [("gumbel", True, False), ("gumbel", False, True), ("argmax", True, True)],
)
def test_routing_is_deterministic_outside_of_training(
    routing: str, training: bool, repeatable: bool
) -> None:
    model = small(routing=routing).train(training)
    for layer in model.layers[0].residual_group.layers:
        torch.nn.init.normal_(layer.assm.embeddingB.weight)
    x = torch.rand(1, 3, 8, 12)
    assert torch.equal(model(x), model(x)) == repeatable


def test_a_symbolic_trace_in_training_holds_no_noise() -> None:
    x = torch.rand(1, 3, 8, 12)
    model = small(routing="gumbel").train()
    for layer in model.layers[0].residual_group.layers:
        torch.nn.init.normal_(layer.assm.embeddingB.weight)
    traced = torch.fx.symbolic_trace(model)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(traced(x), run(model, x))


def test_routing_learns() -> None:
    model = small(routing="argmax")
    model(torch.rand(2, 3, 8, 8)).square().sum().backward()
    layer = model.layers[0].residual_group.layers[1]
    for weight in (layer.assm.route[0].weight, layer.assm.embeddingB.weight):
        assert weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, 3),
        ({"upsampler": "pixelshuffle", "scale": 4, "gated": False, "mlp_ratio": 2.0}, 3),
        ({"upsampler": "", "scale": 1, "in_channels": 1}, 1),
    ],
    ids=["light", "classic", "grey"],
)
@pytest.mark.parametrize("size", [(9, 6), (1, 5)], ids=str)
def test_output_has_the_size(changes: dict[str, Any], channels: int, size: tuple[int, int]) -> None:
    model = small(**changes)
    y = run(model, torch.rand(2, channels, *size))
    assert y.shape == (2, channels, size[0] * model.scale, size[1] * model.scale)
    assert y.isfinite().all()


def test_captures_are_exact_at_other_sizes() -> None:
    check_captures(small(), (2, 3, 10, 9), [(1, 3, 7, 11), (3, 3, 16, 5), (2, 3, 8, 8)])


def test_result_of_an_image_does_not_depend_on_its_batch() -> None:
    check_batch_mates(small(), torch.rand(3, 3, 9, 12))


@pytest.mark.parametrize(
    "changes",
    [
        {"routing": "random"},
        {"upsampler": "nearest"},
        {"depths": ()},
        {"heads": (5,)},
        {"window": 1},
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"MambaIRv2: .*{next(iter(changes))}"):
        small(**changes)
