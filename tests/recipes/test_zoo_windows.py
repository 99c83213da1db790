"""Padding, windows and masks at any size, against loops and torch's own padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.models.windows import (
    attend,
    check_windows,
    crop,
    from_windows,
    pad_mirrored,
    relative_positions,
    shift_mask,
    to_windows,
    window_attention,
)


@pytest.mark.parametrize("size", [(9, 12), (16, 5), (8, 8), (5, 7)], ids=str)
def test_reflection_is_that_of_torch(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    height, width = (-length % 4 for length in size)
    want = F.pad(x, (0, width, 0, height), mode="reflect")
    assert torch.equal(pad_mirrored(x, 4, repeat_edge=False), want)


@pytest.mark.parametrize("size", [(9, 12), (16, 5), (8, 8)], ids=str)
def test_mirroring_with_the_edge_appends_a_flipped_copy(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    high, wide = (-(-length // 8) * 8 for length in size)
    want = torch.cat([x, x.flip(2)], 2)[:, :, :high]
    want = torch.cat([want, want.flip(3)], 3)[..., :wide]
    assert torch.equal(pad_mirrored(x, 8, repeat_edge=True), want)


@pytest.mark.parametrize(
    ("length", "repeat_edge", "want"),
    [
        (1, False, [0] * 8),
        (1, True, [0] * 8),
        (3, False, [0, 1, 2, 1, 0, 1, 2, 1]),
        (3, True, [0, 1, 2, 2, 1, 0, 0, 1]),
    ],
)
def test_images_smaller_than_the_window_run_back_and_forth(
    length: int, repeat_edge: bool, want: list[int]
) -> None:
    x = torch.arange(float(length)).reshape(1, 1, 1, length)
    padded = pad_mirrored(x, 8, repeat_edge)
    assert padded.shape == (1, 1, 8, 8)
    assert padded[0, 0].tolist() == [want] * 8


def test_a_crop_is_the_upper_left() -> None:
    x = torch.rand(2, 3, 8, 9)
    assert torch.equal(crop(x, 5, 7), x[:, :, :5, :7])


def test_windows_are_tiles_in_reading_order() -> None:
    x = torch.rand(2, 6, 9, 4)
    windows = to_windows(x, 3)
    assert windows.shape == (2, 6, 9, 4)
    assert torch.equal(windows[:, 4], x[:, 3:6, 3:6].reshape(2, 9, 4))
    assert torch.equal(from_windows(windows, 3, x), x)


def published_mask(height: int, width: int, window: int) -> Tensor:
    """The mask as published: nine regions numbered in loops over slices."""
    cuts = (slice(0, -window), slice(-window, -(window // 2)), slice(-(window // 2), None))
    image = torch.zeros(1, height, width, 1)
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        image[:, rows, columns] = number
    tokens = to_windows(image, window)[0, :, :, 0]
    return torch.where(tokens[:, None] == tokens[:, :, None], 0.0, -100.0)


@pytest.mark.parametrize(("height", "width", "window"), [(8, 12, 4), (4, 4, 4), (9, 6, 3)])
def test_mask_of_shifted_windows_is_the_published_one(height: int, width: int, window: int) -> None:
    mask = shift_mask(torch.rand(2, height, width, 5), window)
    assert torch.equal(mask[0, :, 0], published_mask(height, width, window))


def test_relative_positions_number_the_offsets() -> None:
    index = relative_positions(3)
    for query in range(9):
        for key in range(9):
            dy, dx = query // 3 - key // 3, query % 3 - key % 3
            assert index[query, key] == (dy + 2) * 5 + dx + 2


def naive_attention(qkv: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """One query of one head at a time."""
    batch, windows, tokens, triple = qkv.shape
    heads, channels = bias.shape[2], triple // 3
    d = channels // heads
    out = torch.zeros(batch, windows, tokens, channels)
    for b, m, e, t in torch.cartesian_prod(
        *map(torch.arange, (batch, windows, heads, tokens))
    ).tolist():
        q, k, v = (
            qkv[b, m, :, i * channels + e * d : i * channels + (e + 1) * d] for i in range(3)
        )
        scores = k @ q[t] / d**0.5 + bias[t, :, e]
        if mask is not None:
            scores = scores + mask[m, t]
        out[b, m, t, e * d : (e + 1) * d] = torch.softmax(scores, 0) @ v
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_single_queries(masked: bool) -> None:
    mask = published_mask(4, 8, 4) if masked else None
    qkv, bias = torch.randn(2, 2, 16, 18), torch.randn(16, 16, 3)
    got = attend(qkv, 6, bias, None if mask is None else mask[None, :, None])
    torch.testing.assert_close(got, naive_attention(qkv, bias, mask), atol=1e-6, rtol=1e-5)


def test_shifted_windows_start_half_a_window_later() -> None:
    qkv, bias = torch.randn(1, 12, 12, 6), torch.randn(16, 16, 1)
    plain = window_attention(qkv, 2, 4, bias, None)
    shifted = window_attention(qkv, 2, 4, bias, shift_mask(qkv, 4))
    alone = window_attention(qkv[:, 2:10, 2:10], 2, 4, bias, None)
    torch.testing.assert_close(shifted[:, 2:10, 2:10], alone, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain, shifted, atol=1e-2)
    # The rest of the image comes around the edge, but does not see the other side.
    corner = qkv.clone()
    corner[:, 10:, 10:] += 5.0
    kept = window_attention(corner, 2, 4, bias, shift_mask(corner, 4))[:, :2, :2]
    torch.testing.assert_close(kept, shifted[:, :2, :2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("embed_dim", "heads", "window", "message"),
    [
        (12, (2,), 4, "one entry for each of the 2 groups"),
        (12, (2, 5), 4, "must divide embed_dim=12"),
        (12, (2, 0), 4, "must divide embed_dim=12"),
        (12, (2, 2), 1, "window must be at least 2"),
    ],
)
def test_bad_windows_are_refused(
    embed_dim: int, heads: tuple[int, ...], window: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"Net: .*{message}"):
        check_windows("Net", embed_dim, (1, 1), heads, window)
