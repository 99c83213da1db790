"""Every goal of docs/performance.md for a GPU, beside its peers in the same run: `make bench-gpu`.

What a row does is in tests/support/gpu_rows, one file for each topic. Peers need nothing that is
not named in docs/performance.md; those of mamba-ssm are left out where it is not installed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.gpu import Gpu, Replay, call_times, needs_gpu, rotating
from support.gpu_rows import moments, networks, products, quantizers, scans
from support.gpu_rows.rows import Row, disagreement
from support.gpu_rows.table import Measured, Table

from qmir_ao.errors import DeviceMemoryError

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
pytestmark = [pytest.mark.bench, needs_gpu]

GPU = Gpu()
TOPICS: list[Callable[[Any], Iterator[Row]]] = [
    scans.rows, quantizers.rows, products.rows, moments.rows,
]  # fmt: skip
ROWS = {row.work: row for topic in TOPICS for row in topic(GPU)}
PAIRS = [(work, side) for work, row in ROWS.items() for side in row.sides]
NETWORKS = {network.side: network for network in networks.networks(GPU)}


@pytest.fixture(autouse=True)
def _own_memory() -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    GPU.free()
    yield
    GPU.free()


def report(benchmark: Any, seconds: list[float], group: str) -> None:
    """Hand measured times over to pytest-benchmark."""
    benchmark.group = group
    benchmark._timer = Replay(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))


@pytest.mark.parametrize("work", ROWS)
def test_sides_do_the_same_work(work: str) -> None:
    try:
        assert disagreement(ROWS[work]) is None
    except (torch.OutOfMemoryError, DeviceMemoryError) as error:
        pytest.skip(f"does not fit into this GPU's memory: {error}")


@pytest.mark.parametrize("inputs", ["cold", "warm"])
@pytest.mark.parametrize(("work", "name"), PAIRS)
def test_kernel(benchmark: Any, table: Table, work: str, name: str, inputs: str) -> None:
    row = ROWS[work]
    side = row.sides[name]
    if side.missing():
        pytest.skip(f"{side.needs} is not installed")
    try:
        following = rotating(side.make, inputs == "cold", GPU.cache())
        seconds = call_times(GPU, side.run, following)
    except (torch.OutOfMemoryError, DeviceMemoryError) as error:
        pytest.skip(f"does not fit into this GPU's memory: {error}")
    assert min(seconds) > 0
    table.add(Measured(work, inputs, name, seconds), row.goals)
    report(benchmark, seconds, f"{work}, {inputs}")


@pytest.mark.parametrize("form", networks.FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_network(benchmark: Any, table: Table, name: str, form: str) -> None:
    network = NETWORKS[name]
    if network.missing():
        pytest.skip(f"{network.needs} is not installed")
    found = networks.measured(GPU, network, networks.SIZE, form)
    assert min(found.seconds) > 0
    table.add(found, networks.FASTER, networks.SMALLER)
    report(benchmark, list(found.seconds), f"{found.work}, {form}")
