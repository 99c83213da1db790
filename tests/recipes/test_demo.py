"""The demo, with few steps and small images: it runs to the end and says what it must."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qmir_ao
from qmir_ao.recipes import demo, samples
from qmir_ao.recipes.data import bicubic_downscale
from qmir_ao.recipes.qat import QATResult
from qmir_ao.recipes.samples import HeldOut
from qmir_ao.recipes.train import TrainResult
from qmir_ao.recipes.widths import Width

SIDE = 72


def _small_held_out(scale: int) -> list[HeldOut]:
    images = []
    for image in samples.held_out(scale)[:2]:
        truth = image.truth[:SIDE, : SIDE + 10]
        low = bicubic_downscale(truth, scale)
        images.append(HeldOut(image.name, truth, low, (8, 10, 32, 32)))
    return images


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    options = demo.DemoOptions(widths=(Width(4, 2), Width(2, 2)), batch=1, patch=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "held_out", _small_held_out)
        patch.setattr(demo, "PROBE_SIDE", 24)
        return folder, demo.run(folder, options)


def test_training_and_held_out_images_do_not_overlap() -> None:
    assert not set(samples.TRAIN_IMAGES) & set(samples.HELD_OUT)
    assert len(samples.HELD_OUT) >= 2


def test_demo_writes_report_and_models(run: tuple[Path, dict[str, Any]]) -> None:
    folder, document = run
    assert sorted(p.name for p in folder.iterdir()) == [
        "report.html",
        "report.json",
        "w2a2",
        "w4a4",
    ]
    assert json.loads((folder / "report.json").read_text()) == document
    lowered = qmir_ao.load(folder / "w2a2")
    with torch.inference_mode():
        assert lowered(torch.rand(1, 3, 16, 20)).shape == (1, 3, 32, 40)


def test_report_has_what_it_must(run: tuple[Path, dict[str, Any]]) -> None:
    _, document = run
    methods = {method["key"]: method for method in document["methods"]}
    assert list(methods) == ["bicubic", "float", "w4a4", "w2a2"]
    for method in methods.values():
        assert 5 < method["psnr"] < 60
        assert 0 < method["ssim"] <= 1
    for key, times in (("w4a4", 8), ("w2a2", 16)):
        method = methods[key]
        assert method["weight_float_bytes"] == times * method["weight_bytes"]
        assert method["compression"] == times
        assert method["integer_operators"] == len(method["operators"])
        assert all(record["reason"] for record in method["left_in_float"])
        assert len(method["loss"]) == 2
        assert method["latency_ms"] > 0
    for image in document["images"]:
        assert set(image["psnr"]) == set(image["ssim"]) == set(methods)
    assert document["seconds"]["total"] > 0


def test_report_has_finite_numbers_only(
    run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, document = run
    lowered = qmir_ao.load(folder / "w4a4")
    records = [{"sqnr_db": value} for value in (float("inf"), float("-inf"), 12.5)]
    monkeypatch.setattr(qmir_ao, "compare", lambda *args: records, raising=False)
    result = QATResult(torch.fx.GraphModule({}, torch.fx.Graph()), [], TrainResult(1, 0.0, 0.0))
    seen = [record["sqnr_db"] for record in demo._noise(result, lowered, torch.zeros(1))]
    assert seen == [demo.SQNR_CEILING, -demo.SQNR_CEILING, 12.5]
    assert "Infinity" not in json.dumps(document)


def test_second_run_replaces_the_first(run: tuple[Path, dict[str, Any]]) -> None:
    folder, document = run
    lowered = qmir_ao.load(folder / "w4a4")
    before = (folder / "w4a4" / "model.safetensors").read_bytes()
    sizes = demo._save(lowered, folder / "w4a4")
    assert sizes["model.safetensors"] == document["methods"][2]["file_bytes"] == len(before)
    assert (folder / "w4a4" / "model.safetensors").read_bytes() == before
