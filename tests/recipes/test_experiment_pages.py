"""What the page of an experiment says of our runs and of the images they are of."""

from pathlib import Path
from typing import Any

import pytest

from qmir_ao.recipes.experiments.benches import Request, TestSet
from qmir_ao.recipes.experiments.registry import EXPERIMENTS, lines
from qmir_ao.recipes.experiments.results import collect
from qmir_ao.recipes.experiments.tables import render

FOLDER = Path("pairs")
OWN = TestSet("SIDD", FOLDER)
NONE = TestSet("SIDD", None)
SYNTHETIC = "noise of our pairs is synthetic"


def page(request: Request, **bench: Any) -> str:
    """Page of an experiment without any run."""
    planned = [line for line in lines(EXPERIMENTS[request.experiment]) if line.missing]
    document = collect(planned, {}, request)
    if bench:
        facts = {
            **{"network": "n", "parameters": 1, "task": "t", "folder": "f"},
            **{"iterations": 9, "batch": 4, "patch": 32, "learning_rate": 1e-3},
        }
        document["benches"] = {"jpeg": facts | bench}
    return render(document)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"train": (FOLDER,)}, True),
        ({"sets": (OWN,)}, True),
        ({"train": (FOLDER,), "sets": (NONE,)}, True),
        ({"train": (FOLDER,), "sets": (OWN,)}, False),
        ({"scale": "full"}, False),
    ],
    ids=str,
)
def test_made_up_noise_is_called_synthetic(given: dict[str, Any], expected: bool) -> None:
    text = page(Request("table3", FOLDER, **given))
    assert (SYNTHETIC in text) == expected
    assert "The network is MambaIR's U-Net" in text


def test_other_tables_make_up_no_noise() -> None:
    assert [key for key in EXPERIMENTS if SYNTHETIC in page(Request(key, FOLDER))] == ["table3"]


def test_one_seed_has_no_spread() -> None:
    assert "of seed 1 alone" in (text := page(Request("table2", FOLDER, seeds=(1,))))
    assert "standard deviations" not in text
    text = page(Request("table2", FOLDER))
    assert "means (and standard deviations) over the seeds 0, 1, 2, of the network" in text


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("table1", "LPIPS"), ("table2", None)],
)
def test_what_the_paper_has_no_column_for_is_not_missed(name: str, lacking: str | None) -> None:
    text = page(Request(name, FOLDER))
    assert ("Not measured:" in text) == (lacking is not None)
    assert lacking is None or f"Not measured: {lacking} (" in text


def test_float_training_is_told() -> None:
    request = Request("table2", FOLDER)
    assert "t, 300 iterations in float, then 9 iterations" in page(request, float_iterations=300)
    assert "in float" not in page(request, batch=2)
