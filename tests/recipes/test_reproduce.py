"""Experiments of the paper: its tables as data, planning, resuming, pages, figures."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from support.experiments import cell, fake_execute, request, rows
from support.training import write_ramp
from torch import nn

import qmir_ao
from qmir_ao.errors import ConfigError
from qmir_ao.recipes import cli
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.experiments import benches, complexity, jobs, scans, tiny_data
from qmir_ao.recipes.experiments.benches import Request, TestSet
from qmir_ao.recipes.experiments.methods import get_method
from qmir_ao.recipes.experiments.published import (
    FLOAT,
    METRICS,
    list_tables,
    load_table,
    parse_table,
)
from qmir_ao.recipes.experiments.registry import EXPERIMENTS, lines
from qmir_ao.recipes.experiments.reproduce import reproduce
from qmir_ao.recipes.experiments.runs import Run
from qmir_ao.recipes.images import list_images, read_image
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.models.registry import MODELS
from qmir_ao.recipes.schema import list_recipes
from qmir_ao.recipes.tasks import (
    GaussianDenoising,
    JpegArtifacts,
    RealDenoising,
    SuperResolution,
)

SHAPES = {
    "table1": (40, 15),
    "table2": (11, 4),
    "table3": (7, 4),
    "table4": (6, 5),
    "table5": (5, 5),
    "table6": (4, 5),
    "table7": (8, 1),
    "table8": (33, 10),
    "table9": (11, 4),
    "table10": (11, 8),
}
# Typed from the paper: table, network, method, bits, enlargement, column, number.
PRINTED = [
    ("table1", "MambaIR", "Q-MambaIR", "4/4", 2, "Urban100:psnr", 33.64),
    ("table1", "MambaIRv2", "LSQ", "2/2", 4, "Manga109:lpips", 0.4403),
    ("table1", "MambaIR", "MambaQuant", "4/4", 4, "B100:ssim", 0.3664),
    ("table2", "MambaIR", "QuantSR", "2/2", None, "LIVE1:ssim", 0.9073),
    ("table3", "MambaIR-UNet", "LSQ", "4/4", None, "DND:psnr", 39.33),
    ("table4", "MambaIR", FLOAT, "32/32", 2, "operations", 1.334e12),
    ("table4", "MambaIR-light", "Q-MambaIR", "2/2", 2, "parameters", 80670.0),
    ("table5", "MambaIR-light", "RFA", "4/4", 2, "latency", 110.64),
    ("table6", "MambaIR-light", "GROUP2", "4/4", 2, "Urban100:psnr", 29.66),
    ("table7", "MambaIR-light", "PAMS", "4/4", 2, "Urban100:psnr", 27.83),
    ("table8", "MambaIR-light", "Q-MambaIR", "2/2", 3, "Manga109:psnr", 31.98),
    ("table8", "MambaIR-light", "QuantSR", "4/4", 4, "Set14:ssim", 0.7757),
    ("table9", "SwinIR", "Q-MambaIR", "2/2", 4, "Set5:psnr", 30.87),
    ("table10", "MambaIR", "Q-MambaIR", "4/4", None, "McMaster:psnr@25", 33.21),
    ("table10", "MambaIR", "LSQ", "2/2", None, "BSD68:psnr@15", 32.68),
]
SEEDS = (0, 1, 2)


def entry(table: str, network: str, method: str, bits: str, scale: int | None) -> Any:
    """The one row of that description."""
    found = [
        row
        for row in load_table(table).rows
        if (row.network, row.method, row.bits, row.scale) == (network, method, bits, scale)
    ]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small image, to train and to test on."""
    folder = tmp_path_factory.mktemp("photos")
    write_ramp(folder, 64)
    return folder


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs that were asked for, none of which is trained."""
    done: list[Run] = []

    def execute(run: Run, *args: Any, **kwargs: Any) -> Any:
        done.append(run)
        return fake_execute(run, *args, **kwargs)

    monkeypatch.setattr(jobs, "execute", execute)
    return done


def test_tables_have_the_shape_of_the_paper() -> None:
    assert list_tables() == list(SHAPES)
    shapes = {name: (len(t.rows), len(t.columns)) for name in SHAPES if (t := load_table(name))}
    assert shapes == SHAPES


@pytest.mark.parametrize("case", PRINTED, ids=lambda case: f"{case[0]}-{case[2]}-{case[5]}")
def test_numbers_are_those_of_the_paper(case: tuple[Any, ...]) -> None:
    table, *description, column, number = case
    place = [str(c) for c in load_table(table).columns].index(column)
    assert entry(table, *description).values[place] == number


@pytest.mark.parametrize(
    ("description", "column", "word"),
    [
        (("table1", "MambaIR", "Q-MambaIR", "4/4", 4), "B100:lpips", "column"),
        (("table1", "MambaIR", "LSQ", "4/4", 2), "Manga109:ssim", "swapped"),
        (("table2", "MambaIR", "Quamba", "8/8", None), "LIVE1:psnr", "above"),
        (("table6", "MambaIR-light", "GROUP3", "4/4", 2), "Set5:psnr", "alpha"),
        (("table8", "MambaIR-light", "Quamba", "8/8", 3), "Set5:psnr", "full precision"),
        (("table9", "EDSR", "Q-MambaIR", "2/2", 4), "Urban100:psnr", "Copies"),
        (("table10", "MambaIR", "Quamba", "8/8", None), "Kodak24:psnr@25", "Sigma"),
    ],
)
def test_doubtful_entries_are_marked(description: tuple[Any, ...], column: str, word: str) -> None:
    table = load_table(description[0])
    place = next(c for c in table.columns if str(c) == column)
    assert any(word in reason for reason in table.reasons(entry(*description), place))
    sound = entry("table8", "MambaIR-light", "Q-MambaIR", "2/2", 4)
    assert not load_table("table8").reasons(sound, load_table("table8").columns[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: a\ncolumns: [Set5:psnr]\nrows: []\nwrong: 1", "Extra inputs"),
        ("title: a\ncolumns: [Set5:pnsr]\nrows: []", "metric must be one of"),
        (
            "title: a\ncolumns: [Set5:psnr]\n"
            "rows: [{network: n, method: m, bits: 4/4, values: [1, 2]}]",
            "2 numbers for 1 columns",
        ),
        (
            "title: a\ncolumns: [Set5:psnr]\n"
            "rows: [{network: n, method: m, bits: 4/4, values: [1]}]\n"
            "doubts: [{rows: {method: x}, reason: none}]",
            "covers no entry",
        ),
    ],
)
def test_damaged_tables_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_table(text, "table.yaml")


def test_every_experiment_is_there_and_can_be_configured() -> None:
    expected = [*SHAPES, "fig2", "fig3", "fig5"]
    assert list(EXPERIMENTS) == expected
    planned = [line for experiment in EXPERIMENTS.values() for line in lines(experiment)]
    assert all(bool(line.parts) != bool(line.missing) for line in planned)
    parts = [part for line in planned for part in line.parts.values()]
    assert {re.split("[@/]", part.bench)[0] for part in parts} <= set(list_recipes())
    assert all(benches.bench_recipe(name) for name in {part.bench for part in parts})
    settings = {
        json.dumps([part.bits, get_method(part.method).settings | part.settings])
        for part in parts
        if part.method != FLOAT
    }
    for bits, names in map(json.loads, settings):
        assert qmir_ao.get_qmir_qconfig(*bits, **names).weight is not None


def test_what_is_not_built_says_so(
    tmp_path: Path, stub: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_data, "REDUCED", {})
    document = reproduce(Request("table9", tmp_path))
    assert not stub
    assert {row["status"] for row in document["rows"]} == {
        f"not run: scale tiny has no small {network}" for network in ("SwinIR", "EDSR")
    }
    assert "scale tiny has no small EDSR" in (tmp_path / "table9.md").read_text()
    assert "not built: method" in " ".join(line.missing for line in lines(EXPERIMENTS["table8"]))


def test_table_puts_the_paper_beside_ours(tmp_path: Path, photos: Path, stub: list[Run]) -> None:
    document = reproduce(request("table8", tmp_path, photos, iterations=2))
    ours = rows(document, method="Q-MambaIR", bits="4/4", scale=2)[0]
    assert ours["status"] == "3 seeds"
    score = cell(ours, "Set5")
    assert (score["paper"], score["mean"], score["std"]) == (37.99, 35.0, 1.0)
    assert score["simulated_mean"] == 35.5
    assert cell(ours, "own")["paper"] is None
    assert cell(ours, "own", "ssim")["mean"] == 0.75
    assert rows(document, method="Quamba", scale=2)[0]["status"] == "not built: method Quamba"
    assert rows(document, scale=3, method="LSQ")[0]["status"].startswith("not run")
    diverged = rows(document, method="QuantSR", bits="2/2", scale=2)[0]
    assert diverged["status"] == "3 seeds, 1 diverged"
    assert len(cell(diverged, "Set5")["values"]) == 2
    assert json.loads((tmp_path / "table8.json").read_text()) == document
    assert (tmp_path / "table8.png").stat().st_size > 5000


def test_page_has_doubts_as_footnotes(tmp_path: Path, photos: Path, stub: list[Run]) -> None:
    reproduce(request("table8", tmp_path, photos, iterations=2, seeds=(0,)))
    page = (tmp_path / "table8.md").read_text()
    marks, texts = (
        set(re.findall(r"\[\^(\d+)\](?!:)", page)),
        re.findall(r"^\[\^(\d+)\]:", page, re.M),
    )
    assert marks == set(texts)
    assert len(texts) == len(load_table("table8").doubts)
    assert re.search(r"\| Quamba \| 8/8 \| 35\.54\[\^\d+\] \|", page)
    assert "misprint" in page


def test_second_call_repeats_nothing(
    tmp_path: Path, photos: Path, stub: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_data, "REDUCED", {})  # of table 1, only what table 8 has as well
    asked = request("table8", tmp_path, photos, iterations=2)
    first = reproduce(asked)
    assert len(stub) == len({run.name for run in stub}) == 24
    second = reproduce(asked)
    assert len(stub) == 24
    assert second["records"] == first["records"]
    # A lost record, another table with runs in common, and more seeds: only what is new is done.
    next((tmp_path / "runs").rglob("lsq*-s1.json")).unlink()
    reproduce(asked)
    assert len(stub) == 25
    reproduce(replace(asked, experiment="table1"))
    assert len(stub) == 25
    reproduce(replace(asked, seeds=(*SEEDS, 3)))
    assert len(stub) == 33


def test_other_images_are_other_runs(tmp_path: Path, photos: Path, stub: list[Run]) -> None:
    asked = request("fig5", tmp_path / "out", photos, iterations=2)
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    shutil.copy(other / "ramp.png", other / "again.png")
    names = {
        benches.open_bench("light-sr-x2", r, None).folder.name
        for r in (asked, replace(asked, train=(other,)), asked)
    }
    assert len(names) == 2


class Inline:
    """A pool of processes that is none."""

    def __init__(self, size: int, mp_context: Any) -> None:
        self.size, self.done = size, 0

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.done == self.size

    def submit(self, work: Any, *args: Any) -> "Inline":
        self.done += 1
        assert work(*args) >= 0
        return self

    def result(self) -> None:
        return None


def test_workers_share_the_runs(
    tmp_path: Path, photos: Path, stub: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Inline)
    threads = torch.get_num_threads()
    document = reproduce(request("table6", tmp_path, photos, iterations=2), workers=2)
    assert len(stub) == len({run.name for run in stub}) == 15
    assert {row["status"] for row in document["rows"]} == {"3 seeds", "float"}
    assert torch.get_num_threads() == threads


def test_a_run_of_another_process_is_left_to_it(
    tmp_path: Path, photos: Path, stub: list[Run]
) -> None:
    asked = request("table6", tmp_path, photos, iterations=2, seeds=(0,))
    planned = benches.plan(asked)
    opened = jobs.open_benches(planned, asked)
    taken = jobs.all_jobs(planned, opened, asked)[-1]
    # Process 1 always lives.
    (opened[taken.bench].folder / f"{taken.name}.lock").write_text("1")
    document = reproduce(asked)
    assert [row["status"] for row in document["rows"]].count(
        "0 of 1 runs, the others run in another process"
    ) == 1
    assert len(stub) == 4


@pytest.mark.parametrize("name", ["table2", "table3", "table9", "table10"])
def test_tasks_without_weights_train_a_reduced_network(
    name: str, tmp_path: Path, photos: Path, stub: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = replace(EXPERIMENTS[name].budget, iterations=1, float_iterations=1, batch=1, patch=8)
    monkeypatch.setitem(EXPERIMENTS, name, replace(EXPERIMENTS[name], budget=budget))
    monkeypatch.setattr(benches, "REDUCED_BUDGET", budget)
    asked = request(name, tmp_path, photos, seeds=(0,))
    if name == "table3":
        for kind in ("target", "input"):
            shutil.copytree(photos, tmp_path / "pairs" / kind)
        pairs = tmp_path / "pairs"
        asked = replace(asked, train=(pairs,), sets=(TestSet("SIDD", pairs),))
    document = reproduce(asked)
    weights = list((tmp_path / "networks").iterdir())
    assert len(weights) == (2 if name in ("table9", "table10") else 1)
    before = [path.stat().st_mtime_ns for path in weights]
    assert reproduce(asked)["records"] == document["records"]
    assert [path.stat().st_mtime_ns for path in weights] == before
    networks = {
        "table3": {"mambair-unet-reduced"},
        "table9": {"swinir-light-reduced-x4", "edsr-baseline-reduced-x4"},
    }
    used = {facts["network"] for facts in document["benches"].values()}
    assert used == networks.get(name, {"mambair-reduced"})
    assert rows(document, method=FLOAT)[0]["status"] == "float"
    given = document["inputs"][-1]
    assert len(document["inputs"]) == len(used)
    page = (tmp_path / f"{name}.md").read_text()
    baseline = "bicubic" if name == "table9" else "input"
    assert (given["method"], given["status"]) == (baseline, "as given")
    if name == "table2":
        scores = evaluate(nn.Identity(), photos, task=JpegArtifacts(30)).mean("psnr")
        assert cell(given, "Set5")["mean"] == pytest.approx(scores)
        assert re.search(rf"\| input \|  \|.*{scores:.2f}", page)
    assert "1 iterations in float, then 1 iterations" in (tmp_path / f"{name}.md").read_text()
    if name == "table10":
        found = {c["sigma"] for c in rows(document, method="LSQ")[0]["cells"] if c["mean"]}
        assert found == {15, 25}


def test_full_takes_the_settings_of_the_recipe(
    tmp_path: Path, photos: Path, stub: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = create_model("mambair-tiny-x2", pretrained=True)
    monkeypatch.setattr(benches, "initial_model", lambda recipe: tiny)
    monkeypatch.setattr(jobs, "open_dataset", lambda bench, patch: [])
    weights = tmp_path / "w.pth"
    weights.touch()
    sets = tuple(TestSet.parse(f"{name}={photos}") for name in ("Urban100",))
    asked = Request(
        "table7", tmp_path, "full", (photos,), sets, {"light-sr-x2": weights}, seeds=(5,)
    )
    document = reproduce(asked)
    assert {(r.iterations, r.batch, r.patch, r.learning_rate, r.seed) for r in stub} == {
        (10000, 2, 96, 2e-4, 5)
    }
    assert len(stub) == 7
    assert cell(rows(document, part="weight", method="RFA")[0], "Urban100")["mean"] == 39.0


def test_unknown_experiment_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "tabel8"]) == 2
    assert "did you mean 'table8'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["--seeds", "a"],
        ["--seeds", "-1"],
        ["--sets", "Set5"],
        ["--scale", "huge"],
        ["--weights", "light"],
        ["--workers", "0"],
    ],
    ids=lambda given: given[0] + given[1],
)
def test_wrong_options_are_refused(
    given: list[str], tmp_path: Path, photos: Path, stub: list[Run]
) -> None:
    folders = ["--train", str(photos), "--sets", f"Set5={photos}", "-o", str(tmp_path)]
    assert cli.main(["reproduce", "table6", *folders, *given]) == 2
    assert not stub


def test_default_images_need_no_download(tmp_path: Path) -> None:
    train, test = tiny_data.default_data(SuperResolution(2), tmp_path)
    assert len(list_images(train)) == 10
    assert {read_image(path).shape[:2] for path in list_images(test)} != {(192, 192)}
    assert not {path.stem for path in list_images(train)} & {p.stem for p in list_images(test)}
    _, middles = tiny_data.default_data(GaussianDenoising(25), tmp_path)
    assert {read_image(path).shape for path in list_images(middles)} == {(192, 192, 3)}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert tiny_data.default_data(GaussianDenoising(25), tmp_path) == (train, middles)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_made_up_camera_noise_comes_in_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_data, "TRAIN_IMAGES", ("ihc.png",))
    train, test = tiny_data.default_data(RealDenoising(), tmp_path)
    for folder in (train, test):
        pairs = RealDenoising().sources(folder)
        assert pairs
        noisy, clean = pairs[0].load()
        difference = noisy.astype(float) - clean
        assert 3 < difference.std() < 40
        assert abs(difference.mean()) < 4


def test_inputs_of_a_set_may_depend_on_the_scale() -> None:
    test = TestSet.parse("Set5=/hr:/lr/X{scale}")
    task = benches.bench_recipe("light-sr-x3").task
    assert test.pair(task) == (Path("/hr"), Path("/lr/X3"))
    assert TestSet.parse("Set5=none").folder is None


def test_counts_of_the_zoo() -> None:
    light = create_model("mambair-light-x2")
    assert complexity.parameters(light) == 905016
    # 24 blocks, 4 directions of 72 channels, 10 states.
    counts = complexity.operations(light)
    assert counts["scan"] == 9 * 24 * 4 * 72 * 10 * 320**2
    assert counts["total"] == counts["layers"] + counts["scan"]
    inside = nn.Conv2d(3, 5, 3, padding=1)
    assert complexity.operations(inside, 8)["layers"] == 3 * 5 * 9 * 64


def test_table_of_complexity_holds_counts(tmp_path: Path, photos: Path, stub: list[Run]) -> None:
    document = reproduce(request("table4", tmp_path, photos, iterations=2))
    floats = rows(document, method=FLOAT, network="MambaIR-light")[0]["cells"]
    counted = {c["metric"]: c["mean"] for c in floats if c["set"] is None}
    total = sum(p.numel() for p in create_model("mambair-tiny-x2").parameters())
    assert counted["parameters"] == total
    quantized = rows(document, bits="2/2", network="MambaIR")[0]["cells"]
    counted = {c["metric"]: c["mean"] for c in quantized if c["set"] is None}
    assert counted["parameters"] == total - 8000 + 500
    assert counted["operations"] is None
    assert set(METRICS) >= set(counted)


def test_scans_are_heard_in_float_and_in_integers(tmp_path: Path, photos: Path) -> None:
    asked = replace(request("fig5", tmp_path, photos, seeds=(0,)), iterations=2)
    monkey = replace(EXPERIMENTS["fig5"].budget, batch=1, patch=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "fig5", replace(EXPERIMENTS["fig5"], budget=monkey))
        document = reproduce(asked)
    networks = [row[1] for row in document["findings"][0]["rows"]]
    assert networks == [FLOAT, "QuantSR", "Q-MambaIR"] * 2
    assert (tmp_path / "fig5.png").stat().st_size > 5000
    lowered = next((tmp_path / "runs").rglob("manifest.json")).parent
    heard = scans.listen(qmir_ao.load(lowered), torch.rand(1, 3, 16, 16))
    depth = sum(MODELS["mambair-tiny-x2"]["depths"])
    assert len(heard) == depth
    assert all(scan.made.shape == (1, 48, 256) for scan in heard)


@pytest.mark.parametrize("name", ["fig2", "fig3"])
def test_figures_are_drawn(name: str, tmp_path: Path, photos: Path, stub: list[Run]) -> None:
    document = reproduce(request(name, tmp_path, photos, iterations=2))
    image = cv2.imread(str(tmp_path / f"{name}.png"))
    assert image is not None
    assert image.shape[1] > 800
    assert f"![{document['title']}]({name}.png)" in (tmp_path / f"{name}.md").read_text()
    if name == "fig3":
        assert len(document["findings"][0]["rows"]) == 4
        assert not stub
