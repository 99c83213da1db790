"""The committed results: records with the promised keys, networks that score as recorded."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from support.paths import DATA, needs_data

import qmir_ao
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.experiments.compare_methods import KEPT
from qmir_ao.recipes.experiments.evidence import SEEDS, WIDTHS, table
from qmir_ao.recipes.experiments.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
NAMES = [f"{method}-w{width}a{width}" for width in WIDTHS for method in KEPT]
KEYS = {
    "method", "weight_bits", "act_bits", "seed", "set", "psnr", "psnr_integer", "ssim_integer",
    "seconds_per_step",
}  # fmt: skip
ROUNDING = 0.005
"""dB; float parts of a network round differently on other instruction sets."""


def entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "qat-x2.json").read_text())
    return found


def test_records_have_the_promised_keys() -> None:
    assert all(entry.keys() >= KEYS for entry in entries())
    assert {entry["method"] for entry in entries()} == {"float", *METHODS}
    quantized = [entry for entry in entries() if entry["method"] != "float"]
    for entry in quantized:
        # The integer network computes what was trained, but for codes on a rounding boundary.
        assert abs(entry["psnr"] - entry["psnr_integer"]) < 0.05
        assert 0.8 < entry["ssim_integer"] < 1.0
        assert 0.05 < entry["seconds_per_step"] < 5
    for width in WIDTHS:
        ours = [e for e in quantized if e["method"] == "dls+rfa" and e["weight_bits"] == width]
        assert {(e["seed"], e["set"]) for e in ours} == {
            (seed, name) for seed in SEEDS for name in ("Set5", "B100")
        }


def test_the_readme_shows_these_numbers() -> None:
    shown = {
        cells[0].strip("* "): [float(cell.strip("* ")) for cell in cells[1:5]]
        for line in (ROOT / "README.md").read_text().splitlines()
        if len(cells := line.strip("| ").split("|")) == 5
        and re.fullmatch(r"[* ]*\d\d\.\d\d[* ]*", cells[1])
        and "Set5" not in line
    }
    floats = {e["set"]: e["psnr"] for e in entries() if e["method"] == "float"}
    assert shown.pop("float32") == [round(floats[name], 2) for name in ("Set5", "B100")] * 2
    assert len(shown) >= 4
    labels = {METHODS[key].label: key for key in METHODS}
    for label, numbers in shown.items():
        found = [
            table(entries(), width)[labels[label]][name].mean
            for width in (4, 2)
            for name in ("Set5", "B100")
        ]
        assert numbers == pytest.approx(found, abs=0.0051), label


@pytest.mark.parametrize("name", NAMES)
def test_kept_networks_run(name: str) -> None:
    network = qmir_ao.load(RESULTS / "models" / name)
    assert network.report.operators and network.report.weight_bytes < 60_000
    torch.manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 5), size=(17, 22), mode="bilinear")
    with torch.inference_mode():
        result = network(image)
    larger = torch.nn.functional.interpolate(image, scale_factor=2.0, mode="bilinear")
    assert result.shape == (1, 3, 34, 44)
    assert float((result - larger).abs().mean()) < 0.05


@needs_data
@pytest.mark.parametrize("name", ["dls+rfa-w2a2", "quantsr-w4a4"])
def test_kept_networks_score_as_recorded(name: str) -> None:
    network = qmir_ao.load(RESULTS / "models" / name)
    folder = DATA / "sets" / "Set5"
    with torch.inference_mode():
        scores = evaluate(network, folder / "HR", scale=2, low_folder=folder / "LR_bicubic" / "X2")
    method, _, width = name.rpartition("-w")
    recorded = [
        entry["psnr_integer"]
        for entry in entries()
        if (entry["method"], entry["set"], entry["seed"]) == (method, "Set5", 0)
        and f"{entry['weight_bits']}a{entry['act_bits']}" == width
    ]
    assert scores.mean("psnr") == pytest.approx(fmean(recorded), abs=ROUNDING)
