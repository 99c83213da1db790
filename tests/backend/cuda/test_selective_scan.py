"""The float scan on CUDA, run by the simulator: as accurate as the reference operator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cases import SCAN_OPTIONAL, SCAN_SIZES, scan_operands
from support.host_launcher import HostLauncher, needs_compiler
from support.scans import NAMES, assert_as_accurate, without_softplus

from qmir_ao.backend.cuda.selective_scan import (
    launch_selective_scan,
    launch_selective_scan_backward,
)
from qmir_ao.ops.selective_scan import selective_scan_backward_ref, selective_scan_ref

pytestmark = needs_compiler

Size = tuple[int, int, int, int, int]
SIZES: dict[str, Size] = SCAN_SIZES | {
    "blocks-of-channels": (1, 1, 72, 4, 33),
    "one-tile": (1, 2, 9, 16, 32),
    "sixty-states": (1, 1, 5, 60, 40),
}


def on(function: Callable[..., Any], seed: int) -> Callable[..., Any]:
    return lambda *args: function(HostLauncher(seed), *args)


def drawn(size: Size, optional: tuple[bool, bool], softplus: bool) -> list[tuple[Any, ...]]:
    batch, groups, channels, *_ = size
    cases = [
        scan_operands(size, *optional, seed=seed)
        for seed in range(max(4, -(-64 // (batch * groups * channels))))
    ]
    return [(*(x if softplus else without_softplus(x)), softplus) for x in cases]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("optional", SCAN_OPTIONAL.values(), ids=SCAN_OPTIONAL)
@pytest.mark.parametrize("softplus", [True, False])
def test_forward_is_as_accurate_as_the_reference(size, optional, softplus, poisoned_empty):
    run = on(launch_selective_scan, sum(size))
    assert_as_accurate(run, selective_scan_ref, drawn(size, optional, softplus), ("y",))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("optional", SCAN_OPTIONAL.values(), ids=SCAN_OPTIONAL)
def test_gradients_are_as_accurate_as_the_reference(size, optional, poisoned_empty):
    run = on(launch_selective_scan_backward, sum(size))
    cases = [(torch.randn_like(case[0]), *case) for case in drawn(size, optional, True)]
    assert_as_accurate(run, selective_scan_backward_ref, cases, NAMES)
