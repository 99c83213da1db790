"""VmambaIR: published count, keys and shapes, the scan of the channels, both captures."""

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
from qmir_ao.ops.selective_scan import selective_scan_ref
from qmir_ao.recipes.models.vmambair import OmniScan, VmambaIR

SCAN = {"x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"}
SCAN |= {"xc_proj_weight", "dtc_projs_weight", "dtc_projs_bias", "Ac_logs", "Dsc"}
SCAN |= with_leaves("conv_cin", "conv_cout", "in_conv", "conv2d", "out_conv")
SCAN |= with_leaves("channel_norm.body", "out_norm.body")
BLOCK = {f"attn.{key}" for key in SCAN} | with_leaves("norm1.body", "norm2.body")
BLOCK |= {f"ffn.{name}.weight" for name in ("project_in", "dwconv", "project_out")}
LEVELS = {
    "encoder_level1": 15,
    "encoder_level2": 1,
    "encoder_level3": 1,
    "latent": 1,
    "decoder_level3": 1,
    "decoder_level2": 1,
    "decoder_level1": 15,
    "refinement": 15,
}
RESIZERS = ("down1_2", "down2_3", "down3_4", "up4_3", "up3_2", "up2_1")
PLAIN = ("patch_embed.proj", "reduce_chan_level3", "reduce_chan_level2")


def small(**changes: Any) -> VmambaIR:
    settings: dict[str, Any] = {"scale": 2, "dim": 8, "depths": (1, 1, 0, 1), "refinement": 1}
    return VmambaIR(**{**settings, **changes})


def test_parameter_count_is_the_published_one() -> None:
    assert parameter_count("vmambair-x4") == 12_028_273


def test_state_dict_keys_are_the_published_ones() -> None:
    expected = {
        f"{level}.{b}.{key}"
        for level, count in LEVELS.items()
        for b in range(count)
        for key in BLOCK
    }
    expected |= with_leaves("tail.0.0", "tail.0.2", "tail.1")
    expected |= {f"{name}.body.0.weight" for name in RESIZERS}
    expected |= {f"{name}.weight" for name in PLAIN}
    assert set(on_meta("vmambair-x4").state_dict()) == expected


def test_published_shapes() -> None:
    state = on_meta("vmambair-x4").state_dict()
    shapes = {
        "encoder_level1.0.attn.x_proj_weight": (4, 35, 48),
        "encoder_level1.0.attn.xc_proj_weight": (2, 38, 4),
        "encoder_level1.0.attn.dt_projs_weight": (4, 48, 3),
        "encoder_level1.0.attn.A_logs": (192, 16),
        "encoder_level1.0.attn.Dsc": (8,),
        "encoder_level1.0.attn.Ac_logs": (8, 16),
        "encoder_level1.0.attn.dtc_projs_weight": (2, 4, 6),
        "encoder_level1.0.attn.conv_cin.weight": (4, 1, 1, 1),
        "encoder_level1.0.ffn.project_in.weight": (254, 48, 1, 1),
        "encoder_level1.0.ffn.project_out.weight": (48, 127, 1, 1),
        "down3_4.body.0.weight": (96, 192, 3, 3),
        "up4_3.body.0.weight": (768, 384, 3, 3),
        "tail.0.2.weight": (384, 96, 3, 3),
    }
    for key, shape in shapes.items():
        assert state[key].shape == shape, key


def test_channels_are_scanned_in_both_directions() -> None:
    torch.manual_seed(0)
    scan, c = OmniScan(6), 6
    y = torch.rand(2, c, 3, 5)
    row = y.mean((2, 3))[:, None] * scan.conv_cin.weight.reshape(1, 4, 1)
    row = row + scan.conv_cin.bias.reshape(1, 4, 1)
    summed = torch.zeros(2, 4, c)
    for k in range(2):
        u = row.flip(-1) if k else row
        delta, b_in, c_out = (scan.xc_proj_weight[k] @ u).split([6, 16, 16], dim=1)
        out = selective_scan_ref(
            u,
            scan.dtc_projs_weight[k] @ delta,
            -torch.exp(scan.Ac_logs[4 * k : 4 * k + 4]),
            b_in[:, None],
            c_out[:, None],
            scan.Dsc[4 * k : 4 * k + 4],
            scan.dtc_projs_bias[k],
            True,
        )
        summed = summed + (out.flip(-1) if k else out)
    mixed = (scan.conv_cout.weight.reshape(1, 4, 1) * summed).sum(1) + scan.conv_cout.bias
    norm = scan.channel_norm.body
    want = F.layer_norm(mixed, (c,), norm.weight, norm.bias)
    got = scan.channel_scan(y)
    assert got.shape == (2, c, 1, 1)
    torch.testing.assert_close(got.reshape(2, c), want, atol=1e-4, rtol=1e-4)


def test_output_adds_the_enlarged_image() -> None:
    model = small(scale=4)
    torch.nn.init.zeros_(model.tail[1].weight)
    torch.nn.init.zeros_(model.tail[1].bias)
    x = torch.rand(1, 3, 9, 6)
    assert torch.equal(run(model, x), x.repeat_interleave(4, 2).repeat_interleave(4, 3))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(9, 7), (1, 13), (16, 8)], ids=str)
def test_output_has_the_size(scale: int, size: tuple[int, int]) -> None:
    y = run(small(scale=scale, in_channels=1), torch.rand(1, 1, *size))
    assert y.shape == (1, 1, size[0] * scale, size[1] * scale)
    assert y.isfinite().all()


def test_captures_are_exact_at_other_sizes() -> None:
    check_captures(small(), (2, 3, 10, 19), [(1, 3, 17, 11), (3, 3, 16, 25)])


def test_result_of_an_image_does_not_depend_on_its_batch() -> None:
    check_batch_mates(small(), torch.rand(3, 3, 9, 12))


@pytest.mark.parametrize(
    "changes",
    [{"scale": 5}, {"dim": 7}, {"depths": (1, 1, 1)}, {"refinement": 0}],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="VmambaIR"):
        small(**changes)
