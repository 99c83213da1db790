"""Quantization-aware training runs of a comparison: one JSON file each, so that any may be redone.

A run depends on its settings only: its file is named by them, and a run whose file exists is not
repeated.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.errors import UnsupportedGraph
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.evaluate import evaluate
from qmir_ao.recipes.experiments.methods import build_qconfig, get_method
from qmir_ao.recipes.experiments.quantizer_statistics import (
    layer_statistics,
    measure_quantizers,
    quantizer_statistics,
)
from qmir_ao.recipes.qat import qat_options, train_quantized
from qmir_ao.recipes.tasks import SuperResolution, Task


@dataclass(frozen=True)
class Run:
    """Settings of one run.

    Attributes:
        method: key of `METHODS`.
        weight_bits: 2 to 8.
        act_bits: 2 to 8.
        seed: of the patches.
        learning_rate: of the network and, times their own factor, of the quantizers.
        iterations: optimizer steps.
        batch: patches per step.
        patch: side of the low-resolution patch.
        settings: changes to the method's settings, for ablations; `placement` and `rfa_on` are
            two of them.
    """

    method: str
    weight_bits: int
    act_bits: int
    seed: int
    learning_rate: float = 8e-4
    iterations: int = 1000
    batch: int = 4
    patch: int = 32
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Run":
        """The run that a record is of."""
        return cls(**{key: record[key] for key in cls.__dataclass_fields__})

    @property
    def name(self) -> str:
        """File name without suffix, made of the settings."""
        changed = "".join(f"-{k}={v}" for k, v in sorted(self.settings.items()))
        return (
            f"{self.method}{changed}-w{self.weight_bits}a{self.act_bits}"
            f"-lr{self.learning_rate:g}-i{self.iterations}-b{self.batch}-p{self.patch}-s{self.seed}"
        )


@dataclass(frozen=True)
class Bench:
    """What all runs of a comparison share.

    Attributes:
        model: float network.
        folders: training images.
        sets: test sets by name: folder with images, folder with their inputs or None.
        scale: enlargement.
        task: restoration task, if it is not super-resolution.
        clip: largest gradient norm; 0 for no clipping.
        tile: section length for large test images, or None to run them whole.
        skip_bad_images: leave out training images that cannot be read.
    """

    model: nn.Module
    folders: Sequence[Path]
    sets: dict[str, tuple[Path, Path | None]]
    scale: int
    task: Task | None = None
    clip: float = 1.0
    tile: int | None = None
    skip_bad_images: bool = False

    @property
    def restoration(self) -> Task:
        """The task."""
        return self.task or SuperResolution(self.scale)


def open_dataset(
    bench: Bench, patch: int, progress: Callable[[int, int], None] | None = None
) -> PatchDataset:
    """The training images, read once for many runs."""
    return PatchDataset(
        bench.folders,
        task=bench.restoration,
        patch=patch,
        length=1,
        seed=0,
        skip_bad_images=bench.skip_bad_images,
        progress=progress,
    )


def execute(
    run: Run,
    bench: Bench,
    dataset: PatchDataset,
    *,
    keep: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train, lower and score one run.

    Args:
        run: settings.
        bench: network and images.
        dataset: from `open_dataset`; its seed and length are set here.
        keep: folder to save the lowered network in, or None.
        progress: called with (done, total) after each step.

    Returns:
        A record with the settings, the loss, the seconds of a step, the bytes, what the
        quantizers do to training patches (`quantizer_statistics`, `layer_statistics`), and for each
        test set the PSNR of the fake-quantized and PSNR and SSIM of the integer network. Where
        nothing of a network lies on an integer grid it has no integer form: `not_lowered` says
        why, and bytes and integer scores are missing.
    """
    options = qat_options(
        run.iterations,
        learning_rate=run.learning_rate,
        batch=run.batch,
        patch=run.patch,
        seed=run.seed,
    )
    options = replace(options, clip=bench.clip, loss=bench.restoration.loss)
    dataset.seed, dataset.length = run.seed, run.batch * run.iterations
    settings = {**get_method(run.method).settings, **run.settings}
    placement = settings.pop("placement", "paper")
    qconfig = build_qconfig(run.weight_bits, run.act_bits, settings)
    begin = time.perf_counter()
    result = train_quantized(
        bench.model, dataset, options, qconfig, placement=placement, progress=progress
    )
    seconds = time.perf_counter() - begin
    lowered, form = _lower(result.prepared, keep)
    patches = torch.stack([dataset[i][0] for i in range(run.batch)])
    measured = measure_quantizers(result.prepared, patches)
    tail = result.losses[-max(1, run.iterations // 10) :]
    return {
        **asdict(run),
        "seconds_per_step": round(seconds / run.iterations, 4),
        "loss": sum(tail) / len(tail),
        **form,
        "quantizers": quantizer_statistics(measured),
        "layers": layer_statistics(measured),
        "sets": _scores(bench, result.prepared, lowered),
    }


def _lower(prepared: GraphModule, keep: Path | None) -> tuple[LoweredModule | None, dict[str, Any]]:
    """The integer network, saved where it is to be kept, and what a record says of it."""
    try:
        lowered = qmir_ao.convert_and_lower(prepared, target="cpu")
    except UnsupportedGraph as error:
        return None, {"not_lowered": str(error)}
    if keep is not None:
        qmir_ao.save(lowered, keep)
    sizes = ("weight_bytes", "scale_bytes", "float_bytes")
    return lowered, {key: getattr(lowered.report, key) for key in sizes}


def _scores(bench: Bench, prepared: nn.Module, lowered: nn.Module | None) -> dict[str, Any]:
    scores, task = {}, bench.restoration
    for name, (folder, low) in bench.sets.items():
        found: dict[str, float] = {}
        for suffix, model in (("", prepared), ("_integer", lowered)):
            if model is not None:
                with torch.inference_mode():
                    result = evaluate(model, folder, task=task, low_folder=low, tile=bench.tile)
                found |= {f"{key}{suffix}": result.mean(key) for key in ("psnr", "ssim")}
        scores[name] = found
    return scores


def write_record(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write a record under a temporary name, then rename it."""
    scratch = folder / f".{name}.{os.getpid()}.tmp"
    scratch.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    scratch.replace(folder / f"{name}.json")


def claim(folder: Path, name: str) -> bool:
    """Reserve a run for this process; False where it is done or another process has it."""
    if (folder / f"{name}.json").exists():
        return False
    lock = folder / f"{name}.lock"
    try:
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        if _alive(lock):
            return False
        lock.write_text(str(os.getpid()))
    return True


def _alive(lock: Path) -> bool:
    try:
        os.kill(int(lock.read_text()), 0)
    except (ValueError, ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True
    return True
