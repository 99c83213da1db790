"""VMamba's cross scan and cross merge as plain data movement.

An image (B, C, H, W) is read in four directions: along rows, along columns, and both reversed.
"""

from typing import Any

import torch

from qmir_ao.capture.operands import refuse

CROSS, SAME, BOTH_WAYS = 0, 1, 2
"""`scans`: four directions; rows four times; rows twice and reversed twice."""


def _lines(x: Any, scans: int) -> list[Any]:
    rows = x.flatten(2, 3)
    return [rows, x.transpose(2, 3).flatten(2, 3) if scans == CROSS else rows]


def cross_scan(
    x: Any,
    in_channel_first: Any = True,
    out_channel_first: Any = True,
    one_by_one: Any = False,
    scans: Any = CROSS,
    channel_first: Any = True,
) -> Any:
    """Stand in for `CrossScan.apply` and `cross_scan_fn`.

    Args:
        x: (B, C, H, W), or (B, H, W, C) without `in_channel_first`.
        in_channel_first: layout of x.
        out_channel_first: whether the result is (B, 4, C, L) or (B, L, 4, C).
        one_by_one: four images in, which has no use outside of the published training code.
        scans: see `CROSS`, `SAME`, `BOTH_WAYS`.
        channel_first: older name of both layouts.

    Raises:
        CaptureError: a variant that is not known.
    """
    _check("cross_scan_fn", one_by_one, scans, channel_first)
    image = x if in_channel_first else x.permute(0, 3, 1, 2)
    first, second = _lines(image, scans)
    onward = torch.stack([first, second], dim=1)
    back = onward if scans == SAME else onward.flip(-1)
    y = torch.cat([onward, back], dim=1)
    return y if out_channel_first else y.permute(0, 3, 1, 2)


def cross_merge(
    y: Any,
    in_channel_first: Any = True,
    out_channel_first: Any = True,
    one_by_one: Any = False,
    scans: Any = CROSS,
    channel_first: Any = True,
) -> Any:
    """Stand in for `CrossMerge.apply` and `cross_merge_fn`: sum of the directions, each read back.

    Args:
        y: (B, 4, C, H, W), or (B, H, W, 4, C) without `out_channel_first`.
        in_channel_first: whether the result is (B, C, L) or (B, L, C).
        out_channel_first: layout of y.
        one_by_one: see `cross_scan`.
        scans: see `cross_scan`.
        channel_first: older name of both layouts.

    Raises:
        CaptureError: a variant that is not known.
    """
    _check("cross_merge_fn", one_by_one, scans, channel_first)
    image = y if out_channel_first else y.permute(0, 3, 4, 1, 2)
    batch, directions, channels, height, width = image.shape
    lines = image.reshape(batch, directions, channels, height * width)
    if scans == SAME:
        merged = lines.sum(1)
    else:
        onward, back = lines.chunk(2, dim=1)
        both = onward + back.flip(-1)
        if scans == BOTH_WAYS:
            merged = both.sum(1)
        else:
            rows, columns = both.chunk(2, dim=1)
            turned = columns.reshape(batch, channels, width, height).transpose(2, 3)
            merged = rows.reshape(batch, channels, height * width) + turned.flatten(2, 3)
    return merged if in_channel_first else merged.permute(0, 2, 1)


def _check(name: str, one_by_one: Any, scans: Any, channel_first: Any) -> None:
    if one_by_one:
        raise refuse(name, "one_by_one", one_by_one, "False")
    if not channel_first:
        raise refuse(name, "channel_first", channel_first, "True")
    if scans not in (CROSS, SAME, BOTH_WAYS):
        raise refuse(name, "scans", scans, "0 (cross), 1 (one way), 2 (both ways)")
