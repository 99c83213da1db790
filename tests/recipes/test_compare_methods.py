"""`qmir reproduce qat-x2`: stages, records, kept networks and page, without training."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from support.training import write_ramp

import qmir_ao
from qmir_ao import DLSFakeQuantize, RFAFakeQuantize
from qmir_ao.errors import ConfigError
from qmir_ao.recipes import cli
from qmir_ao.recipes.experiments import ablations, compare_methods, evidence, jobs
from qmir_ao.recipes.experiments.benches import Request, TestSet
from qmir_ao.recipes.experiments.methods import METHODS, build_qconfig, get_method
from qmir_ao.recipes.experiments.quantizer_statistics import (
    layer_statistics,
    measure_quantizers,
    quantizer_statistics,
    weight_quantizers,
)
from qmir_ao.recipes.experiments.runs import Run
from qmir_ao.recipes.models import create_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_ramp(folder, 64)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs that were asked for; each has a score of its own and a folder as its network."""
    done: list[Run] = []

    def execute(run: Run, bench: Any, dataset: Any, *, keep: Path, progress: Any) -> Any:
        done.append(run)
        keep.mkdir()
        (keep / "name").write_text(run.name)
        psnr = 36.0 + 100 * run.learning_rate + list(METHODS).index(run.method) / 100
        scores = {"psnr": psnr, "ssim": 0.9, "psnr_integer": psnr, "ssim_integer": 0.9}
        sizes = {"weight_bytes": 10, "scale_bytes": 2, "float_bytes": 80}
        sets = dict.fromkeys(bench.sets, scores)
        return {**asdict(run), **sizes, "seconds_per_step": 9.0, "loss": 0.1, "sets": sets}

    monkeypatch.setattr(jobs, "execute", execute)
    monkeypatch.setattr(compare_methods, "_step_seconds", lambda *_: 0.125)
    return done


def _request(output: Path, photos: Path, **more: Any) -> Request:
    return Request("qat-x2", output, train=(photos,), sets=(TestSet("Set5", photos),), **more)


def _command(output: Path, photos: Path, *more: str) -> int:
    arguments = ["--train", str(photos), "--sets", f"Set5={photos}", "-o", str(output)]
    return cli.main(["reproduce", "qat-x2", *arguments, "--iterations", "7", *more])


def test_every_stage_runs_once_and_results_are_written(
    tmp_path: Path, photos: Path, trained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(tmp_path, photos) == 0
    names = [run.name for run in trained]
    assert len(names) == len(set(names))
    changed = {tuple(s.items()) for table in ablations.ABLATIONS.values() for _, s in table if s}
    assert len([run for run in trained if run.settings and run.iterations == 7]) == len(changed)
    assert all(run.learning_rate == 3.2e-3 for run in trained if run.seed)
    whole = [run for run in trained if run.iterations == 14 and not run.settings]
    longer = {run.method for run in whole}
    assert longer == set(evidence.LONGER_METHODS) and len(longer) * 3 == len(whole)
    parts = [run.settings for run in trained if run.iterations == 14 and run.settings]
    assert parts == [{"rfa_on": c} for c in ("linear", "conv", "scan")] * 3
    for width in evidence.WIDTHS:
        mine = [
            run
            for run in trained
            if run.weight_bits == width and not run.settings and run.iterations == 7
        ]
        assert len(mine) == len(METHODS) * (len(evidence.RATES) + len(evidence.SEEDS) - 1)
    for key in compare_methods.KEPT:
        kept = (tmp_path / "models" / f"{key}-w2a2" / "name").read_text()
        assert kept == Run(key, 2, 2, 0, learning_rate=3.2e-3, iterations=7).name
    floats, *entries = json.loads((tmp_path / "qat-x2.json").read_text())
    assert (floats["method"], floats["set"], floats["psnr_integer"]) == ("float", "Set5", None)
    assert floats.keys() < entries[0].keys() and floats["psnr"] > 20
    assert {e["seconds_per_step"] for e in entries} == {0.125}
    assert {e["learning_rate"] for e in entries} == {3.2e-3}
    assert "**Unfinished" not in (tmp_path / "README.md").read_text()
    assert f"Page: {tmp_path / 'README.md'}" in capsys.readouterr().out
    count = len(trained)
    assert _command(tmp_path, photos) == 0 and len(trained) == count


def test_other_images_need_another_folder(
    tmp_path: Path, photos: Path, trained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(tmp_path / "a", photos) == 0
    other = tmp_path / "other"
    other.mkdir()
    assert cv2.imwrite(str(other / "grey.png"), np.full((64, 64, 3), 7, np.uint8))
    count = len(trained)
    assert _command(tmp_path / "a", other) == 2
    assert "network, weights or images differ" in " ".join(capsys.readouterr().err.split())
    assert len(trained) == count


def test_wrong_requests(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ConfigError, match="--scale tiny only"):
        compare_methods.compare_methods(_request(tmp_path, photos, scale="full"), 1, None)
    with pytest.raises(ConfigError, match="--seeds must hold 0"):
        compare_methods.compare_methods(_request(tmp_path, photos, seeds=(1, 2)), 1, None)


@pytest.mark.parametrize("method", ["dls+rfa", "quantsr", "n2uq"])
def test_quantizer_statistics(method: str) -> None:
    torch.manual_seed(0)
    model = create_model("mambair-tiny-x2", pretrained=True)
    image = torch.rand(2, 3, 16, 16)
    found = {}
    for bits in (2, 8):
        qconfig = qmir_ao.get_qmir_qconfig(bits, bits, **get_method(method).settings)
        prepared = qmir_ao.prepare_qat(model, qconfig).train()
        prepared(image)
        measured = measure_quantizers(prepared.eval(), image)
        found[bits] = quantizer_statistics(measured)
        for kind in ("linear", "conv", "scan"):
            row = found[bits][kind]
            assert 0.0 <= row["clipped"] < 0.2
            assert 0.5 < row["entropy"] <= bits
    # N2UQ compares what it makes of a weight with the weight, which it rescales at every width.
    kinds = (
        ("linear", "conv", "scan") if method == "n2uq" else ("linear", "conv", "scan", "weights")
    )
    for kind in kinds:
        # Six more bits are worth 36 dB on a good grid.
        assert found[8][kind]["sqnr"] > found[2][kind]["sqnr"] + 15
    weights = [m for m in prepared.modules() if getattr(m, "quantizes_weights", False)]
    assert found[2]["weights"]["count"] == len(weights) > 30
    parts = [found[2][f"{kind} weights"]["count"] for kind in ("linear", "conv", "scan")]
    assert parts == [8, 22, 8] and sum(parts) == len(weights)
    assert ("threshold_movement" in found[2]["weights"]) == (method == "dls+rfa")
    layers = layer_statistics(measured)
    assert len({(row["layer"], row["kind"]) for row in layers}) == len(layers) == 50
    for kind in ("linear", "conv", "scan"):
        mine = [row["sqnr"] for row in layers if row["kind"] == kind]
        assert fmean(mine) == pytest.approx(found[8][kind]["sqnr"], abs=1e-3)
    scans = [row["layer"].split(", ")[1] for row in layers if row["kind"] == "scan"]
    assert Counter(scans) == {f"{name} of the scan": 4 for name in ("u", "delta", "B", "C")}


def test_moved_thresholds_are_measured() -> None:
    torch.manual_seed(0)
    model = create_model("mambair-tiny-x2", pretrained=True)
    prepared = qmir_ao.prepare_qat(model, qmir_ao.get_qmir_qconfig(2, 2)).train()
    image = torch.rand(1, 3, 16, 16)
    prepared(image)
    kinds = weight_quantizers(prepared.eval())
    moved, kind = next((m, kind) for m, kind in kinds.items() if kind == "linear")
    layer = next(m for m in prepared.modules() if getattr(m, "weight_fake_quant", 0) is moved)
    before = quantizer_statistics(measure_quantizers(prepared, image))
    with torch.no_grad():
        moved.thresholds[1] += 0.4  # -1 to -0.6: both midpoints beside it go up by 0.2
    after = quantizer_statistics(measure_quantizers(prepared, image))
    count, name = before[f"{kind} weights"]["count"], f"{kind} weights"
    assert before[name]["moved_codes"] == before[name]["threshold_movement_max"] == 0.0
    assert after[name]["threshold_movement"] == pytest.approx(0.4 / 4 / count, abs=1e-4)
    assert after[name]["threshold_movement_max"] == pytest.approx(0.4 / count, abs=1e-4)
    assert after[name]["sqnr_unmoved"] == before[name]["sqnr"] > after[name]["sqnr"]
    ratio = layer.weight.detach().double() / moved.step.detach().double().reshape(
        -1, *[1] * (layer.weight.dim() - 1)
    )
    ratio = ratio.clamp(-2, 1)
    between = ((ratio > -1.5) & (ratio <= -1.3)) | ((ratio > -0.5) & (ratio <= -0.3))
    share = float(between.double().mean())
    assert share > 0.01
    assert after[name]["moved_codes"] == pytest.approx(share / count, abs=1e-4)


@pytest.mark.parametrize("component", ["linear", "conv", "scan"])
def test_rfa_on_one_component(component: str) -> None:
    model = create_model("mambair-tiny-x2", pretrained=True)
    prepared = qmir_ao.prepare_qat(model, build_qconfig(4, 4, {"rfa_on": component}))
    for quantizer, kind in weight_quantizers(prepared).items():
        assert isinstance(quantizer, RFAFakeQuantize) == (kind == component)
    acts = [m for m in prepared.modules() if isinstance(m, DLSFakeQuantize)]
    assert len(acts) > 50


def test_rfa_on_an_unknown_component() -> None:
    with pytest.raises(ConfigError, match="rfa_on='norm' is unknown; allowed: linear, conv, scan"):
        build_qconfig(4, 4, {"rfa_on": "norm"})
