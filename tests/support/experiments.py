"""What the tests of the experiments share: made-up runs, and looking into a document."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qmir_ao.errors import NonFiniteError
from qmir_ao.recipes.experiments.benches import Request, TestSet
from qmir_ao.recipes.experiments.runs import Run


def fake_execute(run: Run, bench: Any, dataset: Any, *, keep: Path, progress: Any) -> Any:
    """Numbers that depend on the seed only, without any training."""
    if run.method == "quantsr-plain" and run.seed == 2:
        raise NonFiniteError("the loss is nan")
    progress(run.iterations, run.iterations)
    psnr = 30.0 + run.weight_bits + run.seed
    scores = {"psnr": psnr + 0.5, "ssim": 0.8, "psnr_integer": psnr, "ssim_integer": 0.75}
    sizes = {"weight_bytes": 1000 * run.weight_bits, "scale_bytes": 0, "float_bytes": 32000}
    return {**asdict(run), **sizes, "sets": dict.fromkeys(bench.sets, scores)}


def request(name: str, output: Path, photos: Path, **more: Any) -> Request:
    sets = (TestSet("Set5", photos), TestSet("own", photos))
    return Request(name, output, train=(photos,), sets=sets, **more)


def rows(document: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in document["rows"] if all(r[key] == value for key, value in wanted.items())]


def cell(row: dict[str, Any], name: str, metric: str = "psnr") -> dict[str, Any]:
    found: dict[str, Any] = next(
        c for c in row["cells"] if c["set"] == name and c["metric"] == metric
    )
    return found
