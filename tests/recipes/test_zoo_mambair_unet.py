"""MambaIR's U-Net for real denoising: published count and keys, any size, both captures."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.zoo import (
    check_batch_mates,
    check_captures,
    on_meta,
    parameter_count,
    run,
    with_leaves,
)

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.mambair_unet import MambaIRUNet

NAME = "mambair-real-denoise"
LEVELS = {
    "encoder_level1": (4, 48),
    "encoder_level2": (6, 96),
    "encoder_level3": (6, 192),
    "latent": (8, 384),
    "decoder_level3": (6, 192),
    "decoder_level2": (6, 96),
    "decoder_level1": (4, 96),
    "refinement": (4, 96),
}
SCAN = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
BLOCK = {
    "skip_scale",
    "skip_scale2",
    *(f"self_attention.{name}" for name in (*SCAN, "in_proj.weight", "out_proj.weight")),
} | with_leaves(
    *("ln_1", "ln_2", "self_attention.conv2d", "self_attention.out_norm"),
    *(f"conv_blk.cab.{i}" for i in ("0", "2", "3.attention.1", "3.attention.3")),
)
BETWEEN = ("down1_2", "down2_3", "down3_4", "up4_3", "up3_2", "up2_1")
WEIGHTS = ("patch_embed.proj", "reduce_chan_level3", "reduce_chan_level2", "output")


def small(**changes: Any) -> MambaIRUNet:
    settings: dict[str, Any] = {
        "dim": 30,
        "depths": (1, 1, 1, 1),
        "refinement": 1,
        "d_state": 2,
        "expand": 1.0,
    }
    return MambaIRUNet(**{**settings, **changes})


def test_parameter_count_is_the_published_one() -> None:
    assert parameter_count(NAME) == 26_779_480


def test_state_dict_keys_are_the_published_ones() -> None:
    state = on_meta(NAME).state_dict()
    expected = {f"{name}.weight" for name in (*WEIGHTS, *(f"{b}.body.0" for b in BETWEEN))}
    for level, (blocks, channels) in LEVELS.items():
        expected |= {f"{level}.{i}.{key}" for i in range(blocks) for key in BLOCK}
        rank, inner = -(-channels // 16), channels * 3 // 2
        got = state[f"{level}.0.self_attention.x_proj_weight"].shape
        assert got == (4, rank + 2 * 16, inner)
    assert set(state) == expected


def test_what_the_network_adds_is_a_residual() -> None:
    model, x = small(), torch.rand(1, 3, 8, 16)
    torch.nn.init.zeros_(model.output.weight)
    assert torch.equal(run(model, x), x)


@pytest.mark.parametrize("size", [(9, 13), (1, 5)], ids=str)
def test_any_size_keeps_its_size(size: tuple[int, int]) -> None:
    y = run(small(in_channels=1), torch.rand(2, 1, *size))
    assert y.shape == (2, 1, *size)
    assert y.isfinite().all()


def test_padding_shows_only_through_reflection() -> None:
    model, x = small(), torch.rand(1, 3, 9, 13)
    padded = F.pad(x, (0, 3, 0, 7), mode="reflect")
    assert torch.equal(run(model, x), run(model, padded)[:, :, :9, :13])


def test_captures_are_exact_at_other_sizes() -> None:
    check_captures(small(), (2, 3, 18, 17), [(1, 3, 9, 23), (3, 3, 16, 32)])


def test_result_of_an_image_does_not_depend_on_its_batch() -> None:
    check_batch_mates(small(), torch.rand(2, 3, 9, 12))


@pytest.mark.parametrize(
    "changes", [{"dim": 28}, {"depths": (1, 1, 1)}, {"refinement": 0}], ids=str
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"MambaIRUNet: .*{next(iter(changes))}"):
        small(**changes)
