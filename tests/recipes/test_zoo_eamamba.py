"""EAMamba: published counts, keys and shapes, the orders of its heads, both captures."""

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

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.checkpoint import load_checkpoint
from qmir_ao.recipes.models.eamamba import EAMamba, EAMambaSR
from qmir_ao.recipes.models.eamamba_scan import MultiHeadScan, diagonal_orders

PUBLISHED = {
    "eamamba-light-x2": 725_056,
    "eamamba-light-x3": 909_696,
    "eamamba-light-x4": 872_768,
    "eamamba-denoise": 25_320_512,
}
MAMBA = {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "in_proj.weight"}
MAMBA |= {"out_proj.weight"} | with_leaves("conv", "out_norm")
BLOCK = {f"mamba.{key}" for key in MAMBA} | with_leaves("norm1.body", "norm2.body")
BLOCK |= {"ffn.project_in.weight", "ffn.project_out.weight"}
LEVELS = {
    "encoder_level1": 4,
    "encoder_level2": 6,
    "encoder_level3": 6,
    "latent": 7,
    "decoder_level3": 6,
    "decoder_level2": 6,
    "decoder_level1": 4,
    "refinement": 2,
}
RESIZERS = ("down1_2", "down2_3", "down3_4", "up4_3", "up3_2", "up2_1")
PLAIN = ("patch_embed.proj", "reduce_chan_level3", "reduce_chan_level2", "output")


def light(**changes: Any) -> EAMambaSR:
    settings: dict[str, Any] = {"scale": 2, "dim": 16, "depths": (2, 1), "d_state": 2}
    return EAMambaSR(**{**settings, **changes})


def unet(**changes: Any) -> EAMamba:
    settings: dict[str, Any] = {"dim": 8, "depths": (1, 1, 0, 1), "refinement": 1, "d_state": 2}
    return EAMamba(**{**settings, **changes})


def diagonals(h: int, w: int) -> list[int]:
    """Pixels of an (h, w) image by diagonals, each from its top right to its bottom left."""
    lines = ([(r, s - r) for r in range(h) if 0 <= s - r < w] for s in range(h + w - 1))
    return [r * w + c for line in lines for r, c in line]


def head_orders(h: int, w: int) -> list[list[int]]:
    """Pixels of an (h, w) image in the order in which each head reads them."""
    rows, slanted, last = list(range(h * w)), diagonals(h, w), h * w - 1
    flipped = [p // w * w + w - 1 - p % w for p in slanted]
    columns = [p % h * w + p // h for p in rows]
    return [
        slanted,
        [last - p for p in slanted],
        flipped,
        [last - p for p in flipped],
        rows,
        rows[::-1],
        columns,
        columns[::-1],
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameter_count(name) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "shuffles"), [("eamamba-light-x2", 1), ("eamamba-light-x4", 2)])
def test_keys_of_the_light_network_are_the_published_ones(name: str, shuffles: int) -> None:
    groups = range(4)
    expected = {f"layers.{g}.blocks.{b}.{key}" for g in groups for b in range(4) for key in BLOCK}
    expected |= with_leaves("norm.body", "conv_before_upsample.0")
    expected |= with_leaves(*(f"layers.{g}.conv" for g in groups))
    expected |= with_leaves(*(f"upsample.{2 * index}" for index in range(shuffles)))
    expected |= {f"{name}.weight" for name in ("conv_first", "conv_after_body", "conv_last")}
    assert set(on_meta(name).state_dict()) == expected


def test_keys_of_the_unet_are_the_published_ones() -> None:
    expected = {
        f"{level}.{b}.{key}"
        for level, count in LEVELS.items()
        for b in range(count)
        for key in BLOCK
    }
    expected |= {f"{name}.body.0.weight" for name in RESIZERS}
    expected |= {f"{name}.weight" for name in PLAIN}
    assert set(on_meta("eamamba-denoise").state_dict()) == expected


def test_published_shapes() -> None:
    state = on_meta("eamamba-light-x2").state_dict()
    shapes = {
        "mamba.x_proj_weight": (8, 24, 8),
        "mamba.dt_projs_weight": (8, 8, 4),
        "mamba.dt_projs_bias": (8, 8),
        "mamba.A_logs": (64, 10),
        "mamba.Ds": (64,),
        "mamba.in_proj.weight": (128, 64),
        "ffn.project_in.weight": (64, 64, 1, 1),
        "ffn.project_out.weight": (64, 32, 1, 1),
    }
    for key, shape in shapes.items():
        assert state[f"layers.0.blocks.0.{key}"].shape == shape, key


def test_published_files_give_their_averaged_weights(tmp_path: Path) -> None:
    raw, averaged, loaded = light(), light(), light()
    spec = {"name": "eamambasr", "args": {"dim": 16}, "sd": raw.state_dict()}
    spec["sd_e"] = averaged.state_dict()
    torch.save(
        {"model": spec, "optimizer": {"name": "adamw"}, "current_iter": 7}, tmp_path / "a.pth"
    )
    load_checkpoint(loaded, tmp_path / "a.pth")
    weight = "layers.0.blocks.1.mamba.in_proj.weight"
    assert torch.equal(loaded.state_dict()[weight], averaged.state_dict()[weight])
    assert not torch.equal(loaded.state_dict()[weight], raw.state_dict()[weight])


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 7), (7, 4), (6, 6)], ids=str)
def test_diagonal_order(size: tuple[int, int]) -> None:
    pixels, places = diagonal_orders(torch.empty(2, 3, *size))
    assert pixels.tolist() == diagonals(*size)
    assert torch.equal(pixels[places], torch.arange(size[0] * size[1]))


def test_every_head_reads_in_its_order_and_comes_back_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scan = MultiHeadScan(16, 1)
    # In place of the scan, something that depends on the order and that anyone can repeat.
    monkeypatch.setattr(scan, "scan_sequences", lambda xs, *_: xs.cumsum(-1))
    x = torch.rand(2, 16, 4, 7, dtype=torch.float64)
    got = scan.scan(x, diagonal_orders(x)).reshape(2, 8, 2, 28)
    heads = x.reshape(2, 8, 2, 28)
    for k, order in enumerate(head_orders(4, 7)):
        assert torch.equal(got[:, k][:, :, order], heads[:, k][:, :, order].cumsum(-1)), k


@pytest.mark.parametrize("size", [(9, 7), (1, 13), (16, 8)], ids=str)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(("build", "scale"), [(light, 2), (unet, 1)])
def test_output_has_the_size(build: Any, scale: int, channels: int, size: tuple[int, int]) -> None:
    model = build(in_channels=channels)
    assert model.scale == scale
    y = run(model, torch.rand(1, channels, *size))
    assert y.shape == (1, channels, size[0] * scale, size[1] * scale)
    assert y.isfinite().all()


def test_captures_of_the_light_network_are_exact_at_other_sizes() -> None:
    check_captures(light(), (2, 3, 10, 9), [(1, 3, 7, 11), (3, 3, 16, 5), (2, 3, 8, 8)])


def test_captures_of_the_unet_are_exact_at_other_sizes() -> None:
    check_captures(unet(), (2, 3, 10, 19), [(1, 3, 17, 11), (3, 3, 16, 25)])


@pytest.mark.parametrize("build", [light, unet])
def test_result_of_an_image_does_not_depend_on_its_batch(build: Any) -> None:
    check_batch_mates(build(), torch.rand(3, 3, 9, 12))


@pytest.mark.parametrize(
    "changes",
    [{"scale": 5}, {"dim": 12}, {"depths": (2, 0)}, {"ffn_ratio": 0.4375}, {"ffn_ratio": 0.0}],
    ids=str,
)
def test_bad_settings_of_the_light_network_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="EAMambaSR"):
        light(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"dim": 12}, {"depths": (1, 1, 1)}, {"depths": (1, -1, 1, 1)}, {"refinement": 0}],
    ids=str,
)
def test_bad_settings_of_the_unet_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="EAMamba:"):
        unet(**changes)
