"""The comparison of methods: its plan, its records and its page, from made-up runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.experiments import ablations, evidence
from qmir_ao.recipes.experiments.comparison_plan import missing_runs
from qmir_ao.recipes.experiments.evidence_page import write_page
from qmir_ao.recipes.experiments.methods import METHODS, get_method
from qmir_ao.recipes.experiments.rfa_study import component_runs
from qmir_ao.recipes.experiments.runs import Run

FLOAT = {"Set5": 37.12, "B100": 31.05}


def _record(run: Run, psnr: float) -> dict:
    scores = {"psnr": psnr + 0.01, "ssim": 0.9, "psnr_integer": psnr, "ssim_integer": 0.91}
    return {
        **run.__dict__,
        "seconds_per_step": 0.1,
        "loss": 0.02,
        "weight_bytes": 1000,
        "scale_bytes": 10,
        "float_bytes": 8000,
        "quantizers": {
            "linear": {"count": 8, "sqnr": 9.0, "clipped": 0.04, "entropy": 1.5},
            "weights": {"count": 8, "sqnr": 11.0, "threshold_movement": 0.125},
        },
        "sets": {"Set5": scores, "B100": {**scores, "psnr_integer": psnr - 5}},
    }


def _records() -> list[dict]:
    found = []
    for place, key in enumerate(METHODS):
        for rate in evidence.RATES:
            gain = 0.1 if rate == evidence.RATES[place % 3] else 0.0
            found.append(
                _record(
                    Run(key, 2, 2, 0, learning_rate=rate, iterations=evidence.ITERATIONS),
                    36 + place / 100 + gain,
                )
            )
        for seed in (1, 2):
            rate = evidence.RATES[place % 3]
            value = 36.1 + place / 100 + seed / 1000
            found.append(
                _record(
                    Run(key, 2, 2, seed, learning_rate=rate, iterations=evidence.ITERATIONS), value
                )
            )
    for run in ablations.ablation_runs(evidence.best_rates(found, 2)["dls+rfa"], 2, seeds=(0,)):
        if run.settings:
            found.append(_record(run, 35.5))
    return found


def test_names_say_everything_that_changes_a_run():
    base = Run("lsq", 2, 2, 0)
    others = [
        Run("lsq+", 2, 2, 0),
        Run("lsq", 4, 2, 0),
        Run("lsq", 2, 4, 0),
        Run("lsq", 2, 2, 1),
        Run("lsq", 2, 2, 0, learning_rate=1e-3),
        Run("lsq", 2, 2, 0, iterations=3),
        Run("lsq", 2, 2, 0, batch=2),
        Run("lsq", 2, 2, 0, patch=16),
        Run("lsq", 2, 2, 0, settings={"init": "lsq"}),
    ]
    assert len({r.name for r in (base, *others)}) == len(others) + 1


def test_best_rate_is_of_the_first_seed_and_the_plain_method():
    records = _records()
    rates = evidence.best_rates(records, 2)
    assert rates == {key: evidence.RATES[i % 3] for i, key in enumerate(METHODS)}
    changed = {**records[0], "settings": {"init": "lsq"}}
    changed["sets"] = {"Set5": {**records[0]["sets"]["Set5"], "psnr_integer": 99.0}}
    later = {**records[1], "seed": 2}
    later["sets"] = {"Set5": {**records[1]["sets"]["Set5"], "psnr_integer": 99.0}}
    assert evidence.best_rates([*records, changed, later], 2) == rates
    assert not evidence.best_rates(records, 4)


def test_a_second_rate_on_all_seeds_competes_on_all_of_them():
    def scored(rate: float, seed: int, psnr: float) -> dict:
        return _record(Run("lsq", 2, 2, seed, learning_rate=rate), psnr)

    # Better on the first seed by a hair, and worse on the others.
    lucky = [scored(3.2e-3, seed, psnr) for seed, psnr in enumerate((36.02, 35.0, 35.0))]
    steady = [scored(1.6e-3, seed, 36.01) for seed in range(3)]
    assert evidence.best_rates(lucky + steady, 2) == {"lsq": 1.6e-3}
    assert evidence.best_rates(lucky + steady[:2], 2) == {"lsq": 3.2e-3}
    assert evidence.best_rates(lucky[:1] + steady, 2) == {"lsq": 3.2e-3}
    assert not evidence.best_rates(steady[1:], 2)


def test_plan_covers_every_method_seed_and_rate():
    search = evidence.search_runs(4)
    assert {(r.method, r.learning_rate) for r in search} == {
        (m, rate) for m in METHODS for rate in evidence.RATES
    }
    seeds = evidence.seed_runs(dict.fromkeys(METHODS, 1e-3), 4)
    assert len(seeds) == len(METHODS) * len(evidence.SEEDS)
    assert len({r.name for r in (*search, *seeds)}) == len(search) + len(seeds)


def test_rows_and_table():
    entries = evidence.rows(_records())
    wanted = {
        "method", "weight_bits", "act_bits", "seed", "set", "psnr", "psnr_integer",
        "ssim_integer", "seconds_per_step",
    }  # fmt: skip
    assert all(wanted <= set(e) for e in entries)
    assert len(entries) == len(METHODS) * 3 * 2
    scores = evidence.table(entries, 2)
    assert next(iter(scores)) == list(METHODS)[-1]
    first = scores["ste"]["Set5"]
    assert len(first.values) == 3
    assert first.mean == pytest.approx(36.101, abs=1e-4)
    assert first.deviation == pytest.approx(0.001, abs=1e-4)


def test_an_ablation_without_an_integer_form_says_so():
    records = _records()
    for record in records:
        if record["settings"] == {"clamp_output": True}:
            record["not_lowered"] = "why"
            for scores in record["sets"].values():
                del scores["psnr_integer"], scores["ssim_integer"]
    lines = {v.label: v for v in ablations.ablation_table(records, 2)["DLS step and output"]}
    clamped = lines["output clamp (simulated: no integer form)"]
    assert clamped.cells["Set5"].mean == pytest.approx(35.51)
    assert lines["cap"].cells["Set5"].mean == pytest.approx(35.5)
    # Both are compared with the first seed of the default: 36.21, simulated 36.22 on Set5.
    assert lines["free"].gain is None
    for variant in (clamped, lines["cap"]):
        assert variant.gain is not None
        assert variant.gain.values == pytest.approx([-0.71])


def _page(records: list[dict], folder: Path) -> str:
    entries = evidence.rows(evidence.of_length(records, evidence.ITERATIONS))
    page = write_page(records, entries, folder, iterations=evidence.ITERATIONS, float_psnr=FLOAT)
    return page.read_text()


def test_measured_steps_replace_those_of_the_runs():
    entries = evidence.rows(_records(), {"lsq-w2a2": 0.25})
    assert {e["seconds_per_step"] for e in entries if e["method"] == "lsq"} == {0.25}
    assert {e["seconds_per_step"] for e in entries if e["method"] == "ste"} == {0.1}


def test_page_says_what_the_numbers_say(tmp_path: Path):
    text = _page(_records(), tmp_path)
    assert "| float32 |  |  | 37.120 | 31.050 |" in text
    assert "a half of it" not in text
    assert "**DLS + RFA**" in text and "### DLS initialisation, 2 bits" in text
    assert "ahead of the best rival, N2UQ, beyond the seeds' spread" in text
    assert "Set5: DLS + RFA is 0.909 dB below float32" in text
    assert "Training DLS + RFA takes 0.8 minutes." in text  # 500 steps of 0.1 s
    assert "| DLS + RFA | 9.0 dB, 4.0 %, 1.50 bits | " in text
    assert "thresholds moved by 0.125 steps" in text
    assert (tmp_path / "qat-x2-w2a2.png").stat().st_size > 10_000
    assert not (tmp_path / "qat-x2-w4a4.png").exists()

    def sets(record: dict) -> Any:
        return record["sets"].items()

    worse = [
        {**r, "sets": {n: {**s, "psnr_integer": s["psnr_integer"] - 2} for n, s in sets(r)}}
        if r["method"] == "dls+rfa"
        else r
        for r in _records()
    ]
    text = _page(worse, tmp_path)
    assert "behind the best rival" in text
    assert "behind DLS, LSQ weights, a half of it, beyond the seeds' spread" in text


def test_longer_runs_have_a_table_of_their_own(tmp_path: Path):
    records = _records()
    text = _page(records, tmp_path)
    assert "Longer training" not in text
    longer = Run("lsq", 2, 2, 0, learning_rate=8e-4, iterations=2 * evidence.ITERATIONS)
    mixed = _page([*records, _record(longer, 39.5)], tmp_path)
    main, section = mixed.split("## Longer training, 2 bits")
    assert "39.5" not in main and "| LSQ | " in section and "39.500 (1)" in section
    assert main == text.split("## What RFA adds")[0]


def test_what_rfa_adds_is_told_by_component_and_length(tmp_path: Path):
    records = _records()
    assert "What RFA adds" not in _page([r for r in records if r["method"] != "dls"], tmp_path)
    rate = evidence.best_rates(records, 2)["dls+rfa"]
    double = 2 * evidence.ITERATIONS
    for seed in (0, 1):
        for key, psnr in (("dls", 36.5), ("dls+rfa", 36.6 + seed / 10)):
            run = Run(key, 2, 2, seed, learning_rate=rate, iterations=double)
            records.append(_record(run, psnr))
    records += [_record(run, 36.4) for run in component_runs(rate, 2, double, (0,))]
    moved = {"count": 8, "sqnr": 9.0, "threshold_movement": 0.03, "threshold_movement_max": 0.11}
    moved |= {"moved_codes": 0.0123, "sqnr_unmoved": 9.1}
    mine = next(r for r in records if r["method"] == "dls+rfa" and r["iterations"] == double)
    mine["quantizers"] = {**mine["quantizers"], "scan weights": moved}
    section = _page(records, tmp_path).split("## What RFA adds, 2 bits")[1].split("## ")[0]
    assert "After 1000 iterations RFA's weights give +0.150 ± 0.071 dB over LSQ's" in section
    assert "mean of the sets on 2 seeds" in section
    assert "| all weights | " in section and "36.650 ± 0.071 (2)" in section
    assert "| linear layers |  | 36.400 (1) |" in section
    row = "| 1000 | projections of the scans | 8 | 0.030, 0.110 | 1.23 % | 9.00 dB | 9.10 dB |"
    assert row in section


def test_rfa_is_judged_on_all_pairs_of_runs(tmp_path: Path):
    def scored(method: str, width: int, rate: float, psnr: float, **settings: Any) -> dict:
        run = Run(method, width, width, 0, learning_rate=rate, iterations=evidence.ITERATIONS)
        return _record(replace(run, settings=settings), psnr)

    records = [
        *(scored("dls", width, rate, 36.0) for width in (2, 4) for rate in (8e-4, 1.6e-3)),
        scored("dls+rfa", 2, 8e-4, 36.3),
        scored("dls+rfa", 2, 1.6e-3, 36.1),
        scored("dls+rfa", 4, 8e-4, 35.9),
        # Neither a run without a partner nor one with something else changed is in a pair.
        scored("dls+rfa", 4, 3.2e-3, 39.0),
        scored("dls+rfa", 4, 1.6e-3, 39.0, cap=True),
        scored("rfa", 2, 8e-4, 36.0),
        scored("lsq", 2, 8e-4, 35.0),
    ]
    section = _page(records, tmp_path).split("## What RFA adds, 2 bits")[1].split("## ")[0]
    assert "Under DLS, over all 3 pairs of runs that differ in nothing else" in section
    # Gains of 0.3, 0.1 and -0.1 dB: their deviation is 0.2.
    assert "give +0.100 dB, with a standard error of 0.115" in section
    assert "LSQ's activations" not in section


def test_page_says_what_is_missing(tmp_path: Path):
    records = _records()
    text = _page(records, tmp_path)
    assert "- learning rates, 2 bits" not in text and "- seeds, 2 bits" not in text
    assert "- learning rates, 4 bits: STE (3 runs); LSQ (3 runs);" in text
    assert "- learning rates, 8 bits: DLS + RFA (3 runs); LSQ (3 runs)." in text
    assert "- twice as long, 2 bits: LSQ (3 runs)" in text
    assert "- RFA by component, 2 bits: DLS + RFA rfa_on=linear (3 runs)" in text
    one_seed = [r for r in records if r["method"] != "lsq" or r["seed"] == 0]
    assert "- seeds, 2 bits: LSQ (2 runs)." in _page(one_seed, tmp_path)
    plain = [r for r in records if r["settings"] != {"cap": True}]
    assert "- ablations, 2 bits: DLS + RFA cap=True (1 run)." in _page(plain, tmp_path)
    left, planned = missing_runs(plain, evidence.ITERATIONS)
    missing = {run.name for runs in left.values() for run in runs}
    assert f"{len(missing)} of the {planned} runs of the plan are missing" in _page(plain, tmp_path)
    assert len(missing) == planned - len(plain)


def test_layers_are_compared_with_the_best_rival(tmp_path: Path):
    records = _records()
    best = max(
        (r for r in records if not METHODS[r["method"]].ours and not r["settings"]),
        key=lambda r: r["sets"]["Set5"]["psnr_integer"],
    )["method"]
    for record in records:
        gain = 1.0 if record["method"] == "dls+rfa" else 0.0
        row = {"clipped": 0.031, "entropy": 1.5}
        record["layers"] = [
            {"layer": "body.0", "kind": "conv", "sqnr": 7.0 + gain, **row},
            {"layer": "body.1, B of the scan", "kind": "scan", "sqnr": 9.0 - gain, **row},
        ]
    text = _page(records, tmp_path)
    assert "Of 2 quantized inputs, DLS + RFA has the higher SQNR at 1, the best rival" in text
    rival = f"{METHODS[best].label}: SQNR, clipped, code entropy"
    assert f"| layer that reads it | DLS + RFA: SQNR, clipped, code entropy | {rival} |" in text
    assert "| body.0, conv | 8.0 dB, 3.1 %, 1.50 bits | 7.0 dB, 3.1 %, 1.50 bits |" in text
    assert "| body.1, B of the scan | 8.0 dB" in text
    assert "all layers" not in _page(_records(), tmp_path)


def test_a_run_that_diverged_is_named_and_not_scored(tmp_path: Path):
    records = _records()
    lost = next(r for r in records if r["method"] == "pams" and r["learning_rate"] == 8e-4)
    bare = {k: lost[k] for k in Run.__dataclass_fields__} | {"diverged": "the loss is nan"}
    text = _page([bare if r is lost else r for r in records], tmp_path)
    assert "Diverged, so without scores: PAMS, W2A2, rate 0.0008, seed 0." in text
    assert "- learning rates, 2 bits" not in text


def test_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="no run records"):
        evidence.read_records(tmp_path)
    (tmp_path / "lsq-w2a2-x.json").write_text(json.dumps({"method": 1})[:-3])
    with pytest.raises(ConfigError, match="delete it"):
        evidence.read_records(tmp_path)
    with pytest.raises(ConfigError, match="allowed: ste, lsq"):
        get_method("lsqq")
