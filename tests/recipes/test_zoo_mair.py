"""MaIR: published counts, keys, scan orders and output, both captures."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
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
from qmir_ao.recipes.models.mair import MaIR, SequenceGate, StripeScan
from qmir_ao.recipes.models.mair_scan import scan_orders

PUBLISHED = {
    "mair-tiny-light-x2": 877_752,
    "mair-tiny-light-x3": 885_867,
    "mair-tiny-light-x4": 897_228,
    "mair-small-light-x2": 1_354_680,
    "mair-small-light-x3": 1_362_795,
    "mair-small-light-x4": 1_374_156,
    "mair-x2": 19_444_247,
    "mair-x3": 19_628_887,
    "mair-x4": 19_591_959,
    "mair-denoise": 14_089_035,
}
SCAN = {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "in_proj.weight"}
SCAN |= {"out_proj.weight"} | with_leaves("conv2d", "out_norm", "gating.gating.1")
BLOCK = {"skip_scale", "skip_scale2"} | with_leaves("ln_1", "ln_2", "conv_blk.fc1", "conv_blk.fc2")
BLOCK |= {f"self_attention.{key}" for key in SCAN}
ENDS = ("conv_first", "patch_embed.norm", "norm", "conv_after_body")
HEADS = {
    "mair-small-light-x2": ("upsample.0",),
    "mair-x4": ("conv_before_upsample.0", "upsample.0", "upsample.2", "conv_last"),
    "mair-denoise": ("conv_last",),
}


def small(**changes: Any) -> MaIR:
    settings: dict[str, Any] = {
        "scale": 2,
        "upsampler": "pixelshuffledirect",
        "embed_dim": 8,
        "depths": (2, 1),
        "d_state": 2,
        "expand": 1.5,
        "mlp_ratio": 1.6,
        "stripe": 4,
        "drop_path_rate": 0.0,
    }
    return MaIR(**{**settings, **changes})


def walk(h: int, w: int, stripe: int, shift: int) -> list[int]:
    """Pixels of an (h, w) image in the order of the description: stripe by stripe, row by row."""
    edges = [0, *range(shift or stripe, w, stripe), w]
    pixels = []
    for index, (left, right) in enumerate(itertools.pairwise(edges)):
        rows = range(h) if index % 2 == 0 else reversed(range(h))
        for place, row in enumerate(rows):
            columns = range(left, right)
            pixels += [row * w + c for c in (reversed(columns) if place % 2 else columns)]
    return pixels


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameter_count(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", HEADS)
def test_state_dict_keys_are_the_published_ones(name: str) -> None:
    model = on_meta(name)
    groups = range(len(model.layers))
    expected = with_leaves(*ENDS, *HEADS[name], *(f"layers.{g}.conv" for g in groups))
    expected |= {
        f"layers.{g}.residual_group.blocks.{b}.{key}"
        for g in groups
        for b in range(6)
        for key in BLOCK
    }
    assert set(model.state_dict()) == expected


def test_published_shapes() -> None:
    state = on_meta("mair-small-light-x2").state_dict()
    block = "layers.0.residual_group.blocks.0"
    shapes = {
        "x_proj_weight": (4, 36, 84),
        "dt_projs_weight": (4, 84, 4),
        "dt_projs_bias": (4, 84),
        "A_logs": (336, 16),
        "Ds": (336,),
        "in_proj.weight": (168, 60),
        "gating.gating.1.weight": (336, 4, 1, 1),
    }
    for key, shape in shapes.items():
        assert state[f"{block}.self_attention.{key}"].shape == shape, key
    assert state[f"{block}.conv_blk.fc1.weight"].shape == (96, 60)


@needs_golden
@pytest.mark.parametrize(("stripe", "shift"), [(4, 0), (4, 2), (8, 0), (8, 4)])
def test_scan_orders_equal_the_published_ones(stripe: int, shift: int) -> None:
    pixels, places = scan_orders(torch.empty(1, 1, 6, 8), stripe, shift)
    with np.load(GOLDEN / "variants_official.npz") as golden:
        key = f"mair_ids/6x8/s{stripe}/shift{shift}"
        assert np.array_equal(pixels.numpy(), golden[f"{key}|scan"])
        assert np.array_equal(places.numpy(), golden[f"{key}|inv"])


@needs_golden
def test_output_equals_the_published_one() -> None:
    model = small(embed_dim=16, depths=(2,), d_state=4)
    with np.load(GOLDEN / "variants_official.npz") as golden:
        data = {k: torch.from_numpy(golden[k]) for k in golden if k.startswith("mair|sd|")}
        x, want = (torch.from_numpy(golden[f"mair|{name}"]) for name in "xy")
    model.load_state_dict({key.removeprefix("mair|sd|"): value for key, value in data.items()})
    torch.testing.assert_close(run(model, x), want, atol=OFFICIAL_VALUE, rtol=OFFICIAL_VALUE)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (5, 12), (6, 13), (9, 17)], ids=str)
@pytest.mark.parametrize(("stripe", "shift"), [(4, 0), (4, 2), (8, 4), (2, 1), (5, 2)])
def test_scan_orders_walk_the_stripes(size: tuple[int, int], stripe: int, shift: int) -> None:
    h, w = size
    pixels, places = scan_orders(torch.empty(2, 3, h, w), stripe, shift)
    upright = walk(h, w, stripe, shift)
    lying = [p % h * w + p // h for p in walk(w, h, stripe, shift)]
    last = h * w - 1
    assert pixels[0].tolist() == upright
    assert pixels[1].tolist() == [last - p for p in upright]
    assert pixels[2].tolist() == lying
    assert pixels[3].tolist() == [last - p for p in lying]
    every = torch.arange(h * w).expand(4, -1)
    assert torch.equal(pixels.gather(1, places), every)


def test_every_sequence_comes_back_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = StripeScan(4, 1, 1.0)
    # In place of the scan, something that depends on the order and that anyone can repeat.
    monkeypatch.setattr(scan, "scan_sequences", lambda xs, *_: xs.cumsum(-1))
    x = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    pixels, places = scan_orders(x, 4, 2)
    got = scan.scan(x, (pixels, places)).reshape(2, 4, 4, 30)
    for k in range(4):
        sums = x.reshape(2, 4, 30)[:, :, pixels[k]].cumsum(-1)
        assert torch.equal(got[:, k][:, :, pixels[k]], sums)


def test_gate_mixes_the_same_channel_of_all_sequences() -> None:
    gate = SequenceGate(3)
    y = torch.rand(2, 12, 4, 5)
    weight, bias = gate.gating[1].weight.reshape(3, 4, 4), gate.gating[1].bias.reshape(3, 4)
    means = y.mean((2, 3)).reshape(2, 4, 3)
    want = torch.einsum("dij,bjd->bid", weight, means) + bias.T
    torch.testing.assert_close(gate(y).reshape(2, 4, 3), torch.sigmoid(want))


def test_every_second_block_scans_shifted_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(depths=(3, 1))
    seen: list[Tensor] = []
    whole = StripeScan.scan

    def spy(scan: StripeScan, x: Tensor, orders: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(orders[0])
        return whole(scan, x, orders)

    monkeypatch.setattr(StripeScan, "scan", spy)
    x = torch.rand(1, 3, 6, 9)
    run(model, x)
    plain, shifted = (scan_orders(x, 4, shift)[0] for shift in (0, 2))
    assert not torch.equal(plain, shifted)
    wanted = [plain, shifted, plain, plain]
    assert [torch.equal(*pair) for pair in zip(seen, wanted, strict=True)] == [True] * 4


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, 3),
        ({"upsampler": "pixelshuffle", "scale": 4}, 3),
        ({"upsampler": "", "scale": 1, "in_channels": 1}, 1),
    ],
    ids=["light", "classic", "grey"],
)
@pytest.mark.parametrize("size", [(9, 7), (1, 13)], ids=str)
def test_output_has_the_size(changes: dict[str, Any], channels: int, size: tuple[int, int]) -> None:
    model = small(**changes)
    y = run(model, torch.rand(1, channels, *size))
    assert y.shape == (1, channels, size[0] * model.scale, size[1] * model.scale)
    assert y.isfinite().all()


def test_captures_are_exact_at_other_sizes() -> None:
    sizes = [(1, 3, 7, 11), (3, 3, 16, 5), (2, 3, 8, 8)]
    check_captures(small(drop_path_rate=0.2), (2, 3, 10, 9), sizes)


def test_result_of_an_image_does_not_depend_on_its_batch() -> None:
    check_batch_mates(small(), torch.rand(3, 3, 9, 12))


@pytest.mark.parametrize(
    "changes",
    [
        {"upsampler": "nearest"},
        {"scale": 5},
        {"in_channels": 2},
        {"depths": (2, 0)},
        {"drop_path_rate": 1.0},
        {"stripe": 1},
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="MaIR"):
        small(**changes)
