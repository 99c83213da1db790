"""EDSR: published counts and keys, the residual blocks, both captures."""

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
from qmir_ao.recipes.models.edsr import EDSR, ResidualBlock

PUBLISHED = {
    "edsr-baseline-x2": 1_369_859,
    "edsr-baseline-x3": 1_554_499,
    "edsr-baseline-x4": 1_517_571,
    "edsr-x2": 40_729_603,
    "edsr-x3": 43_680_003,
    "edsr-x4": 43_089_923,
}


def small(**changes: Any) -> EDSR:
    return EDSR(**{"scale": 2, "features": 6, "blocks": 2, "res_scale": 0.5, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert parameter_count(name) == PUBLISHED[name]


@pytest.mark.parametrize(("scale", "count"), [(2, 2_551_555), (3, 2_736_195), (4, 2_699_267)])
def test_the_baseline_of_32_blocks_counts_as_published(scale: int, count: int) -> None:
    with torch.device("meta"):
        model = EDSR(scale=scale, features=64, blocks=32, res_scale=1.0)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "blocks", "shuffles"), [("edsr-baseline-x3", 16, 1), ("edsr-x4", 32, 2)]
)
def test_state_dict_keys_are_the_published_ones(name: str, blocks: int, shuffles: int) -> None:
    ends = with_leaves("conv_first", "conv_after_body", "conv_last")
    body = with_leaves(*(f"body.{i}.conv{j}" for i in range(blocks) for j in (1, 2)))
    upsampler = with_leaves(*(f"upsample.{2 * i}" for i in range(shuffles)))
    assert set(on_meta(name).state_dict()) == ends | body | upsampler


def test_a_block_adds_its_scaled_residual() -> None:
    block = ResidualBlock(4, 0.25)
    x = torch.randn(2, 4, 5, 6)
    residual = block.conv2(torch.relu(block.conv1(x)))
    torch.testing.assert_close(block(x), x + residual / 4)


def test_the_network_works_on_its_own_range() -> None:
    model = small(img_range=100.0)
    for weight in (model.conv_first.bias, model.conv_after_body.weight, model.conv_after_body.bias):
        torch.nn.init.zeros_(weight)
    x = torch.rand(1, 3, 5, 6)
    shallow = 100.0 * torch.nn.functional.conv2d(x - model.mean, model.conv_first.weight, padding=1)
    want = model.conv_last(model.upsample(shallow)) / 100.0 + model.mean
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_has_the_scale(scale: int) -> None:
    assert run(small(scale=scale), torch.rand(2, 3, 5, 7)).shape == (2, 3, 5 * scale, 7 * scale)


def test_captures_are_exact_at_other_sizes() -> None:
    check_captures(small(), (2, 3, 8, 10), [(1, 3, 7, 11), (3, 3, 1, 5)])


def test_result_of_an_image_does_not_depend_on_its_batch() -> None:
    check_batch_mates(small(), torch.rand(3, 3, 9, 12))


@pytest.mark.parametrize(
    "changes",
    [{"scale": 1}, {"features": 0}, {"blocks": 0}, {"res_scale": 0.0}, {"img_range": -1.0}],
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"EDSR: .*{next(iter(changes))}"):
        small(**changes)
