"""The rows of `make bench-gpu` on the CPU, at small sizes and with a clock that only counts."""

import inspect
import itertools
import os
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from support import gpu, oracles, tolerances
from support.counting_cpu import CountingCpu, mamba_module
from support.gpu_rows import moments, networks, products, quantizers, scans
from support.gpu_rows.rows import MAMBA, OURS, Row, Side, disagreement
from support.gpu_rows.table import Measured, Table, memory_lines, time_lines
from support.scans import relative_error
from torch import Tensor

from qmir_ao.ops._directions import repeated, to_sequences
from qmir_ao.recipes.models.mambair import CONFIGS, MambaIR
from qmir_ao.recipes.models.ss2d import CrossScan

ROOT = Path(__file__).resolve().parents[3]
# Not installed where only what docs/performance.md names is.
OPTIONAL = (
    "cv2 hypothesis jinja2 lightning matplotlib numba PIL pydantic rich scipy skimage "
    "tensorboard torchmetrics typer yaml"
).split()

NAMES_OF_GOALS = (
    "selective_scan` selective_scan_q` ss2d_scan_q` dls_qparams` dls_quantize` rfa_fake_quant` "
    "dls_fake_quant` torch._int_mm mambair-light-x2`"
).split()


CPU = CountingCpu()
IMAGES = [(1, 6, 5, 7), (2, 6, 5, 7)]
SMALL = [scans.Size(12, 3, 5, 7)]
ROWS = {
    row.work: row
    for row in (
        *scans.rows(CPU, SMALL, SMALL),
        *quantizers.rows(
            CPU, [(1, 6, 5, 7), (2, 6, 5, 7)], [(9, 60)], [(6, 5, 3, 3)], [(1, 9, 12)]
        ),
        *products.rows(CPU, [(9, 12, 20), (40, 60, 33)], [(6, 6, 1, 7), (6, 6, 6, 7)]),
        *moments.rows(CPU, sides=[7]),
    )
}


@pytest.fixture
def few_calls(monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "WARMUP", 1)
    monkeypatch.setattr(gpu, "ROUNDS", 3)
    monkeypatch.setattr(gpu, "FEWEST", 1)


@pytest.fixture
def with_mamba(monkeypatch: Any) -> None:
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        package = types.ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
    module = mamba_module()
    monkeypatch.setitem(sys.modules, module.__name__, module)


def model() -> MambaIR:
    torch.manual_seed(0)
    return MambaIR(**{**CONFIGS["mambair-tiny-x2"], "embed_dim": 32, "depths": (1,)}).eval()


def test_the_stand_in_has_the_methods_of_the_gpu() -> None:
    def methods(of: type) -> dict[str, int]:
        found = inspect.getmembers(of, inspect.isfunction)
        return {n: len(inspect.signature(f).parameters) for n, f in found if n[0] != "_"}

    assert methods(CountingCpu) == methods(gpu.Gpu)


def test_the_gpu_asks_for_what_torch_has(monkeypatch: Any) -> None:
    """Every call that `Gpu` makes, with a torch.cuda whose functions do nothing."""
    calls: list[str] = []

    class Nothing:
        L2_cache_size = 7

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            calls.append("made")

        def __getattr__(self, name: str) -> Any:
            return lambda *args: calls.append(name) or 2.0

        def __enter__(self) -> None:
            calls.append("entered")

        def __exit__(self, *args: Any) -> None:
            calls.append("left")

    for name in ("Event", "Stream", "CUDAGraph", "stream", "graph", "get_device_properties",
                 "current_stream", "_sleep", "synchronize", "empty_cache",
                 "reset_peak_memory_stats"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 11)
    device = gpu.Gpu()
    device.lead()
    device.free()
    assert device.cache() == 7 and device.peak(lambda: calls.append("run")) == 11
    assert device.seconds(device.mark(), device.mark()) == 2.0 * 1e-3
    replay = device.captured(lambda x: calls.append("run") or x, 5)
    assert calls.count("run") == 1 + 3 + 1 and replay() == 5 and calls[-1] == "replay"


@pytest.mark.parametrize("work", ROWS)
def test_all_sides_of_a_row_run_and_agree(work: str, with_mamba: None, few_calls: None) -> None:
    row = ROWS[work]
    assert disagreement(row) is None
    assert set(row.goals) <= set(row.sides)
    for side in row.sides.values():
        assert not side.missing()
        for cold in (True, False):
            seconds = gpu.call_times(CPU, side.run, gpu.rotating(side.make, cold, CPU.cache()))
            assert len(seconds) == gpu.ROUNDS and set(seconds) == {1e-3}


@pytest.mark.parametrize("layer", moments.LAYERS, ids=str)
def test_statistics_leave_the_codes_alone(layer: moments.Layer) -> None:
    (row,) = moments.rows(CPU, [layer], [9])
    results = []
    for side in row.sides.values():
        torch.manual_seed(0)
        results.append(side.run(*side.make()))
    mine, theirs = results
    channels = layer.features if layer.groups else layer.features // 2
    assert mine[0].shape == (1, channels, 9, 9) and torch.equal(mine[0], theirs[0])
    torch.testing.assert_close(mine[1:], theirs[1:], rtol=2.0**-22, atol=2.0**-22)


def test_every_goal_has_a_row() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    known = [*ROWS, f"`{networks.NAME}`", *(side for row in ROWS.values() for side in row.sides)]
    for name in NAMES_OF_GOALS:
        assert name in text and any(name in line for line in known), name
    sizes = {(s.channels, s.states, s.height * s.width) for s in scans.SIZES}
    assert sizes >= set(itertools.product((288, 1440), (10, 16), (4096, 230400)))


@pytest.mark.parametrize("work", [w for w in ROWS if "bf16, forward" in w or "conv2d" in w])
def test_other_work_is_found(work: str) -> None:
    row = ROWS[work]
    peer = row.sides[OURS]
    wrong = Side(lambda *args: _changed(peer.run(*args)), peer.make)
    found = disagreement(row._replace(sides={OURS: peer, "other": wrong}))
    assert found is not None and "other does other work: result 0" in found


def _changed(result: Any) -> Any:
    """The first result with its last tenth missing."""
    first, *rest = [result] if isinstance(result, Tensor) else result
    first = first.clone()
    first.view(-1)[-max(1, first.numel() // 10) :] = 0
    return [first, *rest]


def test_without_mamba_its_sides_are_left_out() -> None:
    if not Side(len, tuple, "mamba_ssm").missing():
        pytest.skip("mamba-ssm is installed")
    rows = [row for row in ROWS.values() if any(s.missing() for s in row.sides.values())]
    assert len(rows) == 6
    for row in rows:
        assert disagreement(row) is None
        assert all(MAMBA in name for name, side in row.sides.items() if side.missing())


def test_the_published_path_is_the_scan_of_an_image() -> None:
    drawn = scans.code_image(SMALL[0], 4, CPU.device)
    u = drawn["u"][0].float()
    path = scans.published_path(lambda xs: xs, SMALL[0].height, SMALL[0].width)
    folded: list[Tensor] = []
    assert torch.equal(path(u), 4 * u)  # what goes in four ways comes out four times
    scans.published_path(lambda xs: folded.append(xs) or xs, *SMALL[0][2:])(u)
    assert torch.equal(folded[0], to_sequences(repeated(u)).flatten(1, 2))


def test_cold_arguments_exceed_the_cache_and_warm_ones_repeat() -> None:
    made: list[Tensor] = []

    def make() -> tuple[Tensor, ...]:
        made.append(torch.zeros(100))
        return (made[-1],)

    warm = gpu.rotating(make, False, 4096)
    assert len(made) == 1 and warm()[0] is warm()[0]
    made.clear()
    cold = gpu.rotating(make, True, 4096)
    assert sum(400 for _ in made) >= 3 * 4096
    assert len({cold()[0].data_ptr() for _ in made}) == len(made)


def test_long_calls_are_timed_less_often() -> None:
    slow = CountingCpu()
    slow.seconds = lambda start, end: 0.04 * (end - start)  # type: ignore[method-assign]
    assert len(gpu.call_times(slow, len, lambda: ((),))) == 25
    assert slow.leads == 25 + gpu.WARMUP
    assert len(gpu.call_times(slow, len, lambda: ((),), lead=False)) == 25
    assert slow.leads == 25 + gpu.WARMUP


def test_a_first_call_that_compiles_does_not_count() -> None:
    cpu = CountingCpu()
    cpu.seconds = lambda start, end: 30.0 if start == 0 else 1e-3  # type: ignore[method-assign]
    assert gpu.call_times(cpu, len, lambda: ((),)) == [1e-3] * gpu.ROUNDS


def test_a_replay_gives_back_its_durations(benchmark: Any) -> None:
    clock = gpu.Replay([0.5, 0.25])
    assert [clock() for _ in range(4)] == [0.0, 0.5, 0.0, 0.25]
    benchmark._timer = gpu.Replay([0.5, 0.25, 3.0])
    benchmark.pedantic(lambda: None, rounds=3)
    if benchmark.enabled:
        assert benchmark.stats.stats.sorted_data == [0.25, 0.5, 3.0]


def test_all_forms_of_the_network_run(with_mamba: None, few_calls: None) -> None:
    x = torch.rand(1, 3, 6, 5)
    with torch.no_grad():
        exact = model()(x)
    forms = {form.side: form for form in networks.networks(CPU, model)}
    assert set(networks.FASTER) | set(networks.SMALLER) < set(forms)
    for name, form in forms.items():
        for how in networks.FORMS:
            found = networks.measured(CPU, form, x.shape, how)
            assert found.side == name and len(found.seconds) == gpu.ROUNDS
            assert found.peak == (10**6 if how == "as called" else 0)
        with torch.no_grad():
            y = form.build()(x)
        assert y.shape == exact.shape
        if not name.startswith(OURS):
            assert y.dtype == torch.bfloat16
            assert relative_error(y, exact.double()) <= tolerances.SAME_WORK, name
            assert oracles.relative(y, exact) <= tolerances.SAME_WORK


def test_the_published_path_of_a_network_is_its_scan() -> None:
    network = networks.as_published(model(), scans.our_scan)
    (scanned,) = (m for m in network.modules() if isinstance(m, CrossScan))
    x = torch.randn(1, scanned.sizes.inner, 5, 7)
    with torch.no_grad():
        for parameter in scanned.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        path, exact = scanned.scan(x), CrossScan.scan(scanned, x)
        assert relative_error(path, exact.double()) <= tolerances.SAME_WORK
        assert not torch.equal(path, exact)  # it goes another way
        swapped = scanned.x_proj_weight.data.flip(0)
        scanned.x_proj_weight.data = swapped
        assert oracles.relative(scanned.scan(x), exact) > tolerances.SAME_WORK


def test_the_table_holds_ratios_beside_goals(tmp_path: Any) -> None:
    row = Row("work", {}, {"peer": 2.0, "other": 2.0})
    table = Table(tmp_path / "folder" / "gpu.md")
    sides = {OURS: [1e-3, 2e-3, 3e-3], "peer": [2e-3, 4e-3, 9e-3], "other": [1e-5] * 3}
    for name, seconds in sides.items():
        table.add(Measured("work", "cold", name, seconds, 10**6), row.goals, {"peer": 0.5})
    assert time_lines(table.measured, table.faster) == [
        f"| work | cold | {OURS} | 1.00 / 2.00 ms | peer | 2.00 / 4.00 ms | 2.00x / 2.00x | "
        "2.0x: reached |",
        f"| work | cold | {OURS} | 1.00 / 2.00 ms | other | 10.0 / 10.0 us | 0.01x / 0.01x | "
        "2.0x: missed |",
    ]
    peaks = memory_lines(table.measured, table.smaller)
    assert [line.rsplit("|", 2)[1].strip() for line in peaks] == ["at most 0.5: missed", ""]
    text = table.path.read_text()
    assert text == table.text() and "torch " in text and "emulated" in text
    table.measured[1:] = []
    assert "none ran" in table.text()


def test_rows_need_nothing_but_what_is_named() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None;" for name in OPTIONAL)
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}];{blocked}"
        "from support import gpu; from support.gpu_rows import moments, networks, products;"
        "from support.gpu_rows import quantizers, scans, table; networks.default_model()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stderr[-2000:]
