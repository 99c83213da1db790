"""Sensitivity, bits under a budget and float beside integers, on networks of a few channels."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import CAPTURES, example
from torch import Tensor, nn

import qmir_ao
from qmir_ao.backend import sensitivity as measuring
from qmir_ao.backend.comparison import BINS
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.backend.table import ResultsFile, Table, write_atomically
from qmir_ao.errors import CheckpointError, ConfigError, UnsupportedGraph
from qmir_ao.ops.selective_scan import selective_scan_op
from qmir_ao.recipes import cli
from qmir_ao.recipes.analysis import probe_pairs
from qmir_ao.recipes.images import write_image
from qmir_ao.recipes.tasks.super_resolution import SuperResolution

LAYERS = ["scan.project", "scan", "wide", "narrow"]


class Scan(nn.Module):
    """A linear layer and a selective scan over the pixels: (B, 4, H, W) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4 + 2 * 2)
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.D = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        u = x.reshape(b, c, h * w)
        delta, B, C = torch.split(self.project(u.transpose(1, 2)), [4, 2, 2], dim=-1)
        operands = (y.transpose(1, 2).unsqueeze(1) for y in (B, C))
        delta = delta.transpose(1, 2)
        y = selective_scan_op(u, delta, -torch.exp(self.A_log), *operands, self.D, None, True)
        return y.reshape(b, c, h, w)


class Tiny(nn.Module):
    """Enlarges twice: a scan, two readers of one tensor of unlike importance, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.scan = Scan()
        self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.up = nn.Sequential(nn.Conv2d(4, 12, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + 0.1 * self.scan(y)
        y = torch.tanh(y)
        return self.up(self.wide(y) + 0.01 * self.narrow(y))


@functools.cache
def tiny() -> Tiny:
    """The network, with fixed weights."""
    torch.manual_seed(3)
    return Tiny().eval()


@functools.cache
def pairs(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Inputs and what a slightly different network would make of them."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        x = torch.rand(1, 3, 6, 7, generator=generator)
        with torch.no_grad():
            y = tiny()(x)
        found.append((x, y + 0.05 * torch.randn(y.shape, generator=generator)))
    return found


@functools.cache
def measured() -> Table:
    """Sensitivity at 2 and 8 bits, with ground truth."""
    return qmir_ao.sensitivity(tiny(), pairs(), bits=(8, 2))


@functools.cache
def integers(bits: int = 3) -> LoweredModule:
    """The lowered form."""
    prepared = qmir_ao.prepare_ptq(tiny(), qmir_ao.get_qmir_qconfig(4, bits))
    return qmir_ao.convert_and_lower(qmir_ao.calibrate(prepared, [x for x, _ in pairs()]))


def test_sensitivity_has_a_row_for_each_layer_and_width() -> None:
    table = measured()
    assert [(r["layer"], r["bits"]) for r in table] == list(itertools.product(LAYERS, (2, 8)))
    rows = {(r["layer"], r["bits"]): r for r in table}
    assert rows["scan", 2]["kinds"] == "selective_scan"
    assert rows["wide", 2]["weights"] == 4 * 4 * 9
    assert all(rows[name, 2]["mse"] > rows[name, 8]["mse"] > 0 for name in LAYERS)
    assert rows["wide", 2]["mse"] > 100 * rows["narrow", 2]["mse"]
    best = table.facts["float_psnr"]
    for row in table:
        assert row["drop"] == pytest.approx(best - row["psnr"], abs=1e-6)
        assert row["psnr_to_float"] == pytest.approx(-10 * np.log10(row["mse"]), abs=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("capture", CAPTURES)
def test_a_row_is_what_a_network_with_this_one_layer_quantized_does(
    layer: str, capture: str
) -> None:
    inputs = [x for x, _ in pairs()]
    mapping = qmir_ao.get_qmir_qconfig_mapping(tiny(), {layer: 2}, default=None)
    if layer == "scan":
        mapping.set_module_name("scan.project", None)
    alone = qmir_ao.prepare_ptq(tiny(), mapping, example(capture, 1, 3, 6, 7))
    qmir_ao.calibrate(alone, inputs)
    with torch.no_grad():
        error = torch.cat([alone(x) - tiny()(x) for x in inputs]).double().square().mean().item()
    row = next(r for r in measured() if (r["layer"], r["bits"]) == (layer, 2))
    assert row["mse"] == pytest.approx(error, rel=1e-3)


def test_sensitivity_without_ground_truth() -> None:
    table = qmir_ao.sensitivity(tiny(), pairs()[0][0], bits=(4,))
    assert table.column("drop") == [None] * len(LAYERS)
    assert all(value > 20 for value in table.column("psnr_to_float"))
    assert table.facts["float_psnr"] is None


def test_the_network_is_left_as_it_was() -> None:
    model = Tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    qmir_ao.sensitivity(model, torch.rand(1, 3, 6, 7), bits=(4,))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Stop(Exception):
    """Stands for a kill."""


def test_an_interrupted_measurement_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sensitivity.json"

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        qmir_ao.sensitivity(tiny(), pairs(), bits=(2, 8), file=file, progress=stop)
    assert len(json.loads(file.read_text())["done"]) == 5
    ran: list[str] = []
    whole = measuring._Probe.outputs
    monkeypatch.setattr(
        measuring._Probe, "outputs", lambda self, path: (ran.append(path), whole(self, path))[1]
    )
    seen: list[tuple[int, int]] = []
    table = qmir_ao.sensitivity(
        tiny(), pairs(), bits=(2, 8), file=file, progress=lambda *report: seen.append(report)
    )
    assert ran == LAYERS[1:]
    assert seen == [(i, 8) for i in range(1, 9)]
    assert table.rows == measured().rows
    assert Table.from_json(file).rows == table.rows
    wider = qmir_ao.sensitivity(tiny(), pairs(), bits=(2, 4, 8), file=file)
    assert ran[3:] == LAYERS
    assert len(wider) == 12


@pytest.mark.parametrize("what", ["model", "data", "settings"])
def test_results_of_something_else_are_refused(what: str, tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    qmir_ao.sensitivity(tiny(), pairs(), bits=(8,), file=file)
    model = Tiny() if what == "model" else tiny()
    data = pairs()[:1] if what == "data" else pairs()
    settings: dict[str, Any] = {"preset": "paper"} if what == "settings" else {}
    with pytest.raises(ConfigError, match=f"measured on something else: {what} is"):
        qmir_ao.sensitivity(model, data, bits=(8,), file=file, **settings)


@pytest.mark.parametrize("text", ["", "{}", '{"kind": 1, "format": 9, "facts": {}, "rows": []}'])
def test_a_damaged_results_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=r"results\.json"):
        ResultsFile(file, "sensitivity", {})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "results.json", "{}")


BAD_DATA: dict[str, tuple[Any, str]] = {
    "nothing": ([], "holds no batch"),
    "path": (["photo.png"], "got str"),
    "triple": ([(torch.ones(1), torch.ones(1), torch.ones(1))], "got tuple of 3"),
    "some": ([pairs()[0], pairs()[0][0]], "some have none"),
    "size": ([(pairs()[0][0], torch.rand(1, 3, 5, 5))], r"gives \(1, 3, 12, 14\), not the ground"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named(case: str) -> None:
    data, message = BAD_DATA[case]
    with pytest.raises(ConfigError, match=message):
        qmir_ao.sensitivity(tiny(), data)


@pytest.mark.parametrize(("bits", "message"), [((), "bits is empty"), ((2, 9), "bits=9")])
def test_bad_bits_are_named(bits: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qmir_ao.sensitivity(tiny(), pairs(), bits=bits)
    with pytest.raises(UnsupportedGraph, match="has no linear"):
        qmir_ao.sensitivity(nn.ReLU(), torch.rand(1, 3, 4, 4))


def test_a_table_prints_sorts_and_stores(tmp_path: Path) -> None:
    table = Table(
        "t", [{"name": "a", "x": 2.5}, {"name": "b", "x": None}, {"name": "c", "x": 1}], {}
    )
    assert str(table).splitlines() == ["name    x", "a     2.5", "b       -", "c       1"]
    assert table.sorted_by("x").column("name") == ["c", "a", "b"]
    assert table.sorted_by("x", descending=True).column("name") == ["a", "c", "b"]
    assert Table.from_json(_stored(table, tmp_path)).rows == table.rows
    with pytest.raises(ConfigError, match="no column 'y'; its columns: name, x"):
        table.column("y")
    assert str(Table("empty", [], {})) == "empty: no rows"


def _stored(table: Table, folder: Path) -> Path:
    table.to_json(folder / "table.json")
    return folder / "table.json"


def brute_force(limit: float, load: Callable[[str, int], float]) -> float:
    """Least total error of all choices that fit."""
    rows = {(r["layer"], r["bits"]): r["excess_mse"] for r in measured()}
    costs = [
        sum(rows[name, b] for name, b in zip(LAYERS, choice, strict=True))
        for choice in itertools.product((2, 8), repeat=len(LAYERS))
        if sum(load(name, b) for name, b in zip(LAYERS, choice, strict=True)) <= limit
    ]
    return min(costs)


WEIGHTS = {"scan.project": 32, "scan": 0, "wide": 144, "narrow": 16}


@pytest.mark.parametrize("mean", [2.0, 2.5, 3.0, 5.0, 6.5, 8.0])
def test_the_assignment_is_the_best_of_all(mean: float) -> None:
    found = qmir_ao.assign_bits(tiny(), pairs(), f"bits={mean}", bits=(2, 8), table=measured())
    rows = {(r["layer"], r["bits"]): r["excess_mse"] for r in measured()}
    assert found.mean_bits <= mean
    assert sum(WEIGHTS[name] * b for name, b in found.bits.items()) / 192 == found.mean_bits
    cost = sum(rows[name, b] for name, b in found.bits.items())
    best = brute_force(mean * 192, lambda name, b: WEIGHTS[name] * b)
    assert cost == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("capture", CAPTURES)
def test_an_assignment_is_ready_for_prepare_qat(capture: str) -> None:
    found = qmir_ao.assign_bits(tiny(), pairs(), "size=0.75x", bits=(2, 8), table=measured())
    assert set(found.bits.values()) == {2, 8}
    prepared = qmir_ao.prepare_qat(tiny(), found, example(capture, 1, 3, 6, 7))
    prepared.train()(pairs()[0][0])
    report = qmir_ao.convert_and_lower(prepared.eval()).report
    assert {r.module: r.act_bits for r in report.operators} == found.bits
    rest = sum(p.numel() for p in tiny().parameters()) - sum(WEIGHTS.values())
    stored = report.weight_bytes + report.scale_bytes
    assert found.stored_bytes == stored + 4 * rest
    assert found.stored_bytes <= 0.75 * 4 * (rest + sum(WEIGHTS.values()))
    assert f"{found.stored_bytes:,} bytes" in str(found)


def test_expected_losses_are_close_to_what_happens() -> None:
    found = qmir_ao.assign_bits(tiny(), pairs(), "bits=2", bits=(2, 8), table=measured())
    prepared = qmir_ao.prepare_ptq(tiny(), found)
    qmir_ao.calibrate(prepared, [x for x, _ in pairs()])
    with torch.no_grad():
        errors = torch.cat([prepared(x) - tiny()(x) for x, _ in pairs()])
    got = -10 * errors.double().square().mean().log10().item()
    assert found.expected["psnr_to_float"] == pytest.approx(got, abs=2.0)


IMPOSSIBLE = {
    "size=0.1x": r"smallest reachable is size=0\.(\d+)x \((\d+) of \d+ bytes\).*2 bits",
    "size=10": "smallest reachable is size=",
    "bits=1.9": r"smallest reachable is bits=2\.0",
}


@pytest.mark.parametrize("budget", IMPOSSIBLE)
def test_an_impossible_budget_says_what_is_reachable(budget: str) -> None:
    with pytest.raises(ConfigError, match=IMPOSSIBLE[budget]):
        qmir_ao.assign_bits(tiny(), pairs(), budget, bits=(2, 8), table=measured())


def test_the_smallest_reachable_size_is_reachable() -> None:
    with pytest.raises(ConfigError) as error:
        qmir_ao.assign_bits(tiny(), pairs(), "size=0.1x", bits=(2, 8), table=measured())
    budget = str(error.value).split("smallest reachable is ")[1].split(" ")[0]
    found = qmir_ao.assign_bits(tiny(), pairs(), budget, bits=(2, 8), table=measured())
    assert {b for name, b in found.bits.items() if WEIGHTS[name]} == {2}


@pytest.mark.parametrize(
    "budget", ["", "0.2x", "size=", "size=-1x", "bits=4x", "speed=2", "size=0x"]
)
def test_a_budget_that_is_none(budget: str) -> None:
    with pytest.raises(ConfigError, match="is none; budget must be"):
        qmir_ao.assign_bits(tiny(), pairs(), budget, table=measured())


def test_other_bad_arguments_of_a_budget_search() -> None:
    with pytest.raises(ConfigError, match=r"metric='ssim' is unknown; allowed: \('psnr',\)"):
        qmir_ao.assign_bits(tiny(), pairs(), "bits=4", "ssim", table=measured())
    with pytest.raises(ConfigError, match="not the sensitivity of this data"):
        qmir_ao.assign_bits(tiny(), pairs()[:1], "bits=4", table=measured())
    with pytest.raises(ConfigError, match=r"no row for layer 'scan.project' at 4 bits"):
        qmir_ao.assign_bits(tiny(), pairs(), "bits=4", table=measured())


def test_a_float_network_beside_its_lowered_form() -> None:
    table = qmir_ao.compare(tiny(), integers(), pairs())
    assert isinstance(table, Table)
    assert [r["layer"] for r in table] == LAYERS
    rows = {r["layer"]: r for r in table}
    assert rows["scan"]["weight_bits"] is None
    assert rows["wide"]["act_bits"] == 3
    for row in table:
        assert 0 < row["sqnr_db"] < 40
        assert 0 <= row["clipped"] < 0.2
        assert 0.5 < row["codes_used"] <= 1
        assert 0 <= row["outliers"] <= 1
        assert row["peak_float"] > 1
    scan = next(iter(table.facts["scans"].values()))
    count = 2 * 4 * 6 * 7
    assert sum(scan["before"]) == sum(scan["after"]) == count
    assert len(scan["before"]) == BINS
    assert scan["before"] != scan["after"]
    assert len(scan["peaks_before"]) == len(scan["peaks_after"]) == 4


def test_the_figures_of_a_comparison_are_right() -> None:
    """Against the values of the only linear layer, taken out of both networks by hand."""
    x = pairs()[0][0]
    seen: dict[str, Tensor] = {}
    hooks = [
        tiny().scan.project.register_forward_hook(
            lambda module, args, out: seen.update(x=args[0], y=out)
        )
    ]
    with torch.no_grad():
        tiny()(x)
    hooks[0].remove()
    lowered = integers()
    node = next(
        n for n in lowered.graph_module.graph.nodes if n.target is torch.ops.qmir.linear.default
    )
    codes = node.args[0]

    class Peek(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            out = super().run_node(n)
            if n in (node, codes):
                seen[n.name] = out
            return out

    with torch.no_grad():
        Peek(lowered.graph_module).run(x)
    row = qmir_ao.compare(tiny(), lowered, x).rows[0]
    noise = (seen[node.name].double() - seen["y"].double()).square().sum()
    sqnr = 10 * torch.log10(seen["y"].double().square().sum() / noise).item()
    assert row["sqnr_db"] == pytest.approx(sqnr, abs=1e-4)
    assert row["codes_used"] == seen[codes.name].unique().numel() / 8
    z = (seen["y"].double() - seen["y"].double().mean()) / seen["y"].double().std()
    assert row["peak_float"] == pytest.approx(z.abs().max().item(), rel=1e-6)


def test_more_bits_are_less_noise() -> None:
    few, many = (qmir_ao.compare(tiny(), integers(b), pairs()) for b in (2, 8))
    for a, b in zip(few, many, strict=True):
        assert a["sqnr_db"] < b["sqnr_db"]


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "comparison.json"

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        qmir_ao.compare(tiny(), integers(), pairs(), file=file, progress=stop)
    assert json.loads(file.read_text())["done"]["batches"] == 1
    table = qmir_ao.compare(tiny(), integers(), pairs(), file=file)
    assert table.rows == qmir_ao.compare(tiny(), integers(), pairs()).rows
    assert table.facts["scans"] == qmir_ao.compare(tiny(), integers(), pairs()).facts["scans"]
    with pytest.raises(ConfigError, match="lowered is"):
        qmir_ao.compare(tiny(), integers(8), pairs(), file=file)


def test_compare_still_takes_a_prepared_network() -> None:
    prepared = qmir_ao.prepare_ptq(tiny(), qmir_ao.get_qmir_qconfig(4, 3))
    qmir_ao.calibrate(prepared, [x for x, _ in pairs()])
    records = qmir_ao.compare(prepared, qmir_ao.convert_and_lower(prepared), pairs()[0][0])
    assert all(record["acc_equal"] in (True, None) for record in records)
    with pytest.raises(ConfigError, match="for a comparison with a float model"):
        qmir_ao.compare(prepared, integers(), pairs()[0][0], file="x.json")


def test_compare_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ConfigError, match=r"has no linear in module 'scan\.project'"):
        qmir_ao.compare(nn.Conv2d(3, 3, 1), integers(), pairs())
    with pytest.raises(ConfigError, match="pass one iterable of inputs, got 2"):
        qmir_ao.compare(tiny(), integers(), pairs(), pairs())


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The network as a model of the zoo, and a folder of two photos."""
    from qmir_ao.recipes import loading

    monkeypatch.setattr(loading, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(loading, "create_model", lambda name, pretrained=False: tiny())
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        write_image(folder / f"{index}.png", rng.integers(0, 256, (24, 28, 3), dtype=np.uint8))
    return folder


def test_probe_pairs_are_middles(zoo: Path) -> None:
    found = probe_pairs(SuperResolution(2), zoo, count=5, side=8)
    assert [(tuple(x.shape), tuple(y.shape)) for x, y in found] == [
        ((1, 3, 8, 8), (1, 3, 16, 16))
    ] * 2
    low, truth = SuperResolution(2).sources(zoo)[0].load()
    assert torch.equal(found[0][1][0, :, 0, 0] * 255, torch.tensor(truth[4, 6]).float())
    assert torch.equal(found[0][0][0, :, 0, 0] * 255, torch.tensor(low[2, 3]).float())
    with pytest.raises(ConfigError, match="at least one image"):
        probe_pairs(SuperResolution(2), zoo, count=0)


def test_analyze_writes_tables_and_a_page(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qmir_ao.save(integers(), tmp_path / "lowered")
    out = tmp_path / "out"
    line = ["analyze", "tiny", str(zoo), "-o", str(out), "--bits", "2", "--bits", "8"]
    line += ["--side", "6", "--budget", "bits=5", "--lowered", str(tmp_path / "lowered")]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    for part in ("most sensitive layers", "noisiest operators", "analysis.html", "at 8 bits"):
        assert part in text
    assert len(Table.from_json(out / "sensitivity.json")) == 8
    assert len(Table.from_json(out / "comparison.json")) == 4
    page = (out / "analysis.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == 2 + 2 * 1
    assert all(f"<code>{layer}</code>" in page for layer in LAYERS)
    assert cli.main([*line, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["assignment"]["mean_bits"] <= 5
    assert document["assignment"]["bits"] == {
        row["layer"]: row["bits"] for row in Table.from_json(out / "assignment.json")
    }


def test_analyze_of_bad_input(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qmir_ao.save(integers(), tmp_path / "lowered")
    cases = [
        (["tiny", str(zoo), "--bits", "0"], "without bits there is no sensitivity"),
        (["tiny", str(zoo), "--bits", "8", "--side", "6", "--budget", "bits=1"], "smallest"),
        ([str(tmp_path / "lowered"), str(zoo)], "is lowered already"),
        (["tiny", str(zoo), "--task", "denoise"], "enlarges 2 times, not 1"),
    ]
    for arguments, message in cases:
        assert cli.main(["analyze", *arguments, "-o", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
