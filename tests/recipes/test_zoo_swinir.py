"""SwinIR: published counts, keys and files, sizes off the window, both captures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.zoo import (
    check_batch_mates,
    check_captures,
    on_meta,
    parameter_count,
    run,
    with_leaves,
)

import qmir_ao
from qmir_ao.errors import CheckpointError, ConfigError
from qmir_ao.recipes.checkpoint import load_checkpoint
from qmir_ao.recipes.models.swinir import SwinIR

PUBLISHED = {
    "swinir-light-x2": 910_152,
    "swinir-light-x3": 918_267,
    "swinir-light-x4": 929_628,
    "swinir-x2": 11_752_487,
    "swinir-x3": 11_937_127,
    "swinir-x4": 11_900_199,
    "swinir-denoise": 11_504_163,
    # Colour denoising, with 13^2 instead of 15^2 entries in 36 tables of 6 heads and one instead
    # of three channels in the first and last convolution.
    "swinir-jpeg": 11_504_163 - 36 * 6 * (15**2 - 13**2) - 2 * 9 * 180 - (2 * 9 * 180 + 2),
}
BLOCK = {"attn.relative_position_bias_table", "attn.relative_position_index"} | with_leaves(
    "norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"
)
ENDS = ("conv_first", "patch_embed.norm", "norm", "conv_after_body")
HEADS = {
    "swinir-light-x3": ("upsample.0",),
    "swinir-x4": ("conv_before_upsample.0", "upsample.0", "upsample.2", "conv_last"),
    "swinir-jpeg": ("conv_last",),
}


def small(**changes: Any) -> SwinIR:
    settings: dict[str, Any] = {
        "scale": 2,
        "upsampler": "pixelshuffledirect",
        "embed_dim": 8,
        "depths": (2, 1),
        "heads": (2, 4),
        "window": 4,
    }
    return SwinIR(**{**settings, **changes})


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
    state = on_meta("swinir-x2").state_dict()
    attention = "layers.0.residual_group.blocks.0.attn"
    assert state[f"{attention}.relative_position_bias_table"].shape == (225, 6)
    assert state[f"{attention}.relative_position_index"].shape == (64, 64)
    assert state[f"{attention}.relative_position_index"].dtype == torch.int64
    assert state[f"{attention}.qkv.weight"].shape == (540, 180)


def test_masks_in_published_files_are_ignored(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = small().state_dict()
    published = {**state, "layers.0.residual_group.blocks.1.attn_mask": torch.zeros(9, 16, 16)}
    for change in (False, True):
        model = small()
        if change:
            torch.save({"params": published}, tmp_path / "published.pth")
            load_checkpoint(model, tmp_path / "published.pth")
        else:
            model.load_state_dict(published)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_other_unknown_keys_are_refused(tmp_path: Path) -> None:
    torch.save({**small().state_dict(), "layers.0.mask": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"unexpected keys: layers\.0\.mask"):
        load_checkpoint(small(), tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, 3),
        ({"upsampler": "pixelshuffle", "scale": 3}, 3),
        ({"upsampler": "", "scale": 1}, 3),
        ({"upsampler": "", "scale": 1, "in_channels": 1, "img_range": 255.0, "window": 7}, 1),
    ],
    ids=["light", "classic", "denoise", "jpeg"],
)
@pytest.mark.parametrize("size", [(9, 6), (1, 13), (8, 8)], ids=str)
def test_output_has_the_size(changes: dict[str, Any], channels: int, size: tuple[int, int]) -> None:
    model = small(**changes)
    y = run(model, torch.rand(1, channels, *size))
    assert y.shape == (1, channels, size[0] * model.scale, size[1] * model.scale)
    assert y.isfinite().all()


def test_padding_shows_only_through_reflection() -> None:
    model, x = small(), torch.rand(1, 3, 7, 6)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 1), mode="reflect")
    assert torch.equal(run(model, x), run(model, padded)[:, :, :14, :12])


def test_every_second_block_is_shifted() -> None:
    blocks = small(depths=(4, 3)).layers
    shifts = [[b.shifted for b in layer.residual_group.blocks] for layer in blocks]
    assert shifts == [[False, True, False, True], [False, True, False]]


def test_captures_are_exact_at_other_sizes() -> None:
    sizes = [(1, 3, 7, 11), (3, 3, 16, 5), (2, 3, 8, 8)]
    check_captures(small(drop_path_rate=0.2), (2, 3, 10, 9), sizes)


def test_an_example_of_one_window_is_no_graph_for_more() -> None:
    prepared = qmir_ao.prepare_qat(small(), qmir_ao.qmir_qconfig, (torch.rand(1, 3, 4, 3),)).eval()
    for size in [(1, 3, 4, 4), (2, 3, 1, 3)]:
        assert run(prepared, torch.rand(size)).isfinite().all()
    for size in [(1, 3, 5, 4), (1, 3, 4, 9)]:
        with pytest.raises(ConfigError, match=r"captured for \(any, 3, up to 4, up to 4\)"):
            run(prepared, torch.rand(size))


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
        {"img_range": 0.0},
        {"window": 1},
        {"heads": (3, 2)},
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"SwinIR: .*{next(iter(changes))}"):
        small(**changes)
