"""What an experiment is given or lacks: networks, weights, bad images; and no integer form."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.experiments import cell, fake_execute, request, rows
from support.training import write_ramp

from qmir_ao.errors import ConfigError
from qmir_ao.recipes import cli
from qmir_ao.recipes.experiments import benches, jobs, runs, tiny_data
from qmir_ao.recipes.experiments.benches import Request, TestSet
from qmir_ao.recipes.experiments.reproduce import reproduce
from qmir_ao.recipes.experiments.runs import Run
from qmir_ao.recipes.models import create_model


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


def test_other_networks_have_recipes_of_their_own(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swinir = benches.bench_recipe("light-sr-x4/swinir-light-x4")
    assert (swinir.model.name, swinir.task.scale) == ("swinir-light-x4", 4)
    tiny = [line for line in benches.plan(Request("table1", tmp_path)) if line.row.scale == 2]
    for network in ("MambaIR", "MambaIRv2"):
        assert any(line.parts for line in tiny if line.row.network == network)
    monkeypatch.setattr(tiny_data, "REDUCED", {})
    tiny = [line for line in benches.plan(Request("table1", tmp_path)) if line.row.scale == 2]
    of_v2 = {line.missing for line in tiny if line.row.network == "MambaIRv2"}
    assert "not run: scale tiny has no small MambaIRv2" in of_v2
    assert not any(line.parts for line in tiny if line.row.network == "MambaIRv2")
    assert any(line.parts for line in tiny if line.row.network == "MambaIR")
    wanted = ("light-sr-x4/swinir-light-x4", "light-sr-x4/edsr-baseline-x4")
    sets = tuple(TestSet(name, photos) for name in ("Set5", "Set14", "B100", "Urban100"))
    asked = Request("table9", tmp_path, "full", (photos,), sets)
    with pytest.raises(ConfigError) as caught:
        benches.plan(asked)
    assert all(f"--weights {name}=FILE" in str(caught.value) for name in wanted)
    weights = tmp_path / "w.pth"
    weights.touch()
    planned = benches.plan(replace(asked, weights={wanted[0]: weights, wanted[1]: None}))
    assert {line.missing for line in planned if line.row.network == "EDSR"} == {
        "not run: its float weights were left out"
    }
    assert benches.bench_names(planned) == [wanted[0]]


def test_full_names_all_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--scale", "full", "--sets", f"Set5={tmp_path / 'no'}", "--sets", "Manga109=none"]
    assert cli.main(["reproduce", "table8", *given, "-o", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    for part in ("--train FOLDER", "Set14", "B100", "Urban100", f"{tmp_path / 'no'}: no such"):
        assert part in text
    for scale in (2, 3, 4):
        assert f"--weights light-sr-x{scale}=FILE" in text
    assert "Manga109=FOLDER" not in text
    assert not (tmp_path / "out").exists()


def test_full_asks_a_figure_for_less(tmp_path: Path, photos: Path) -> None:
    asked = Request("fig3", tmp_path, "full", sets=(TestSet("any", photos),))
    with pytest.raises(ConfigError, match=r"lacks 1 of what(.|\n)*--weights light-sr-x2"):
        benches.plan(asked)
    with pytest.raises(ConfigError, match="--sets NAME=FOLDER"):
        benches.plan(replace(asked, sets=()))


def test_a_bad_image_is_named_and_left_out_on_request(
    tmp_path: Path, photos: Path, stub: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "train"
    shutil.copytree(photos, folder)
    (folder / "bad.png").write_bytes((folder / "ramp.png").read_bytes()[:60])
    line = ["reproduce", "table6", "--train", str(folder), "--sets", f"Set5={photos}"]
    line += ["--iterations", "2", "--seeds", "0", "-o", str(tmp_path / "out")]
    assert cli.main(line) == 2
    assert "bad.png" in capsys.readouterr().err
    assert not stub
    assert cli.main([*line, "--skip-bad-images"]) == 0
    assert len(stub) == 5


def test_a_damaged_test_image_is_named_before_training(
    tmp_path: Path, photos: Path, stub: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(photos, folder)
    (folder / "zebra.png").write_bytes((folder / "ramp.png").read_bytes()[:60])
    line = ["reproduce", "table6", "--train", str(photos), "--sets", f"Set5={folder}"]
    assert cli.main([*line, "--skip-bad-images", "-o", str(tmp_path / "out")]) == 2
    assert "zebra.png" in capsys.readouterr().err
    assert not stub


def test_a_network_without_an_integer_form_is_no_integer_result(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulated(run: Run, bench: Any, dataset: Any, **more: Any) -> Any:
        scores = {"psnr": 31.0, "ssim": 0.8}
        return {**asdict(run), "not_lowered": "why", "sets": dict.fromkeys(bench.sets, scores)}

    monkeypatch.setattr(jobs, "execute", simulated)
    document = reproduce(request("table6", tmp_path, photos, iterations=2, seeds=(0,)))
    row = rows(document, method="GROUP1")[0]
    assert row["status"] == "1 seed, 1 without an integer form"
    assert cell(row, "Set5")["mean"] is None


def test_clamped_outputs_leave_nothing_for_integers(photos: Path) -> None:
    model = create_model("mambair-tiny-x2", pretrained=True)
    bench = runs.Bench(model, [photos], {"own": (photos, None)}, 2)
    run = Run("dls+rfa", 2, 2, 0, iterations=1, batch=1, patch=16, settings={"clamp_output": True})
    record = runs.execute(run, bench, runs.open_dataset(bench, 16))
    assert "no operator of this graph runs on integer codes" in record["not_lowered"]
    assert "because its input is clipped to its own range (clamp_output)" in record["not_lowered"]
    assert "its u is clipped to its own range (clamp_output)" in record["not_lowered"]
    assert set(record["sets"]["own"]) == {"psnr", "ssim"}
    assert "weight_bytes" not in record
