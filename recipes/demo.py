"""The demo: one pretrained network, trained at W4A4 and W2A2, lowered, compared on held-out images.

Everything runs on images that scikit-image ships, so nothing is downloaded.
"""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.recipes.data import to_pixels, to_tensor
from qmir_ao.recipes.diagnose import cpu_name, kernels
from qmir_ao.recipes.evaluate import bicubic_upscale
from qmir_ao.recipes.images import Pixels
from qmir_ao.recipes.metrics import psnr_y, ssim_y
from qmir_ao.recipes.models import create_model
from qmir_ao.recipes.qat import LEARNING_RATE, QATResult, qat_options, train_quantized
from qmir_ao.recipes.report import Picture, write
from qmir_ao.recipes.samples import TRAIN_IMAGES, HeldOut, held_out, training_patches
from qmir_ao.recipes.widths import WIDTHS, Width

MODEL = "mambair-tiny-x2"
PROBE_SIDE = 128
"""Side of the input that latency and per-operator noise are measured on."""
LATENCY_REPEATS = 5
SQNR_CEILING = 150.0
"""JSON knows no infinity: stands for an operator whose output quantizing did not move."""

Restored = dict[str, Pixels]
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class DemoOptions:
    """Settings of the demo.

    Args:
        widths: what is trained.
        batch: patches per step.
        patch: side of a low-resolution patch.
        seed: seed of patches and quantizers.
    """

    widths: tuple[Width, ...] = WIDTHS
    batch: int = 4
    patch: int = 32
    seed: int = 0


@dataclass
class Clock:
    """Seconds of each stage, in order."""

    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of the block as stage `name`."""
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin

    def report(self) -> dict[str, float]:
        """All stages and the total, to a tenth of a second."""
        total = time.monotonic() - self.started
        return {name: round(value, 1) for name, value in {**self.seconds, "total": total}.items()}


@contextmanager
def _silent(label: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def _restore(model: nn.Module, images: list[HeldOut]) -> Restored:
    with torch.inference_mode():
        return {i.name: to_pixels(model(to_tensor(i.low)[None])[0]) for i in images}


def _scores(restored: Restored, images: list[HeldOut], border: int) -> dict[str, Any]:
    psnr = {i.name: psnr_y(restored[i.name], i.truth, border) for i in images}
    ssim = {i.name: ssim_y(restored[i.name], i.truth, border) for i in images}
    return {
        "psnr": fmean(psnr.values()),
        "ssim": fmean(ssim.values()),
        "image_psnr": psnr,
        "image_ssim": ssim,
    }


def _probe(image: HeldOut) -> torch.Tensor:
    top, left = ((side - PROBE_SIDE) // 2 for side in image.low.shape[:2])
    return to_tensor(image.low[top : top + PROBE_SIDE, left : left + PROBE_SIDE])[None]


def _latency(model: nn.Module, x: torch.Tensor) -> float:
    """Median milliseconds of one run."""
    times = []
    with torch.inference_mode():
        model(x)
        for _ in range(LATENCY_REPEATS):
            begin = time.perf_counter()
            model(x)
            times.append(1000 * (time.perf_counter() - begin))
    return median(times)


def _save(lowered: LoweredModule, folder: Path) -> dict[str, int]:
    """Save a lowered model, replacing that of an older run; return the bytes of its files."""
    qmir_ao.save(lowered, folder)
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def _noise(result: QATResult, lowered: LoweredModule, x: torch.Tensor) -> list[dict[str, Any]]:
    """Records of `qmir_ao.compare`; an operator without any noise gets SQNR_CEILING."""
    records = qmir_ao.compare(result.prepared, lowered, x)
    for record in records:
        record["sqnr_db"] = max(-SQNR_CEILING, min(SQNR_CEILING, record["sqnr_db"]))
    return records


def _bicubic(images: list[HeldOut], scale: int) -> tuple[dict[str, Any], Restored]:
    restored = {i.name: bicubic_upscale(i.low, scale) for i in images}
    method = {"key": "bicubic", "label": "Bicubic", "weight_bits": 32, "act_bits": 32}
    return method | _scores(restored, images, scale), restored


def _float(model: nn.Module, images: list[HeldOut], scale: int) -> tuple[dict[str, Any], Restored]:
    restored = _restore(model, images)
    method = {
        "key": "float",
        "label": "Float32",
        "weight_bits": 32,
        "act_bits": 32,
        **_scores(restored, images, scale),
        "file_bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        "latency_ms": _latency(model, _probe(images[0])),
    }
    return method, restored


def _integer(
    result: QATResult, width: Width, images: list[HeldOut], scale: int, folder: Path
) -> tuple[dict[str, Any], Restored]:
    """Lower a trained network, save it, and measure it."""
    lowered = qmir_ao.convert_and_lower(result.prepared, target="cpu")
    restored, fake = _restore(lowered, images), _restore(result.prepared, images)
    report, files = lowered.report, _save(lowered, folder / width.key)
    probe = _probe(images[0])
    method = {
        "key": width.key,
        "label": width.label,
        "weight_bits": width.bits,
        "act_bits": width.bits,
        "iterations": width.iterations,
        **_scores(restored, images, scale),
        "fake_quantized_psnr": fmean(psnr_y(fake[i.name], i.truth, scale) for i in images),
        "weight_bytes": report.weight_bytes,
        "scale_bytes": report.scale_bytes,
        "weight_float_bytes": report.float_bytes,
        "compression": report.float_bytes / report.weight_bytes,
        "file_bytes": files["model.safetensors"],
        "graph_bytes": files["manifest.json"],
        "integer_operators": len(report.operators),
        "left_in_float": [asdict(record) for record in report.left_in_float],
        "latency_ms": _latency(lowered, probe),
        "operators": _noise(result, lowered, probe),
        "loss": result.losses,
    }
    return method, restored


def _settings(options: DemoOptions) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "batch": options.batch,
        "patch": options.patch,
        "learning_rate": LEARNING_RATE,
        "train_images": [Path(name).stem for name in TRAIN_IMAGES],
    }


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "kernels": kernels(),
    }


def _image_scores(image: HeldOut, methods: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": image.name,
        "size": list(image.truth.shape[:2]),
        "crop": list(image.crop),
        "psnr": {m["key"]: m["image_psnr"][image.name] for m in methods},
        "ssim": {m["key"]: m["image_ssim"][image.name] for m in methods},
    }


def _document(
    model: nn.Module,
    images: list[HeldOut],
    methods: list[dict[str, Any]],
    options: DemoOptions,
    seconds: dict[str, float],
) -> dict[str, Any]:
    per_image = ("image_psnr", "image_ssim")
    return {
        "qmir_ao": qmir_ao.__version__,
        "torch": torch.__version__,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "model": {
            "name": MODEL,
            "parameters": sum(p.numel() for p in model.parameters()),
            "scale": int(getattr(model, "scale", 1)),
        },
        "methods": [{k: v for k, v in m.items() if k not in per_image} for m in methods],
        "images": [_image_scores(image, methods) for image in images],
        "probe": {"side": PROBE_SIDE, "latency_repeats": LATENCY_REPEATS},
        "settings": _settings(options),
        "machine": _machine(),
        "seconds": seconds,
    }


def run(
    output: Path, options: DemoOptions | None = None, progress: Progress = _silent
) -> dict[str, Any]:
    """Run the demo and write `report.html`, `report.json` and the lowered models.

    Args:
        output: folder to write; made if it is missing, what an older demo wrote is replaced.
        options: settings; the defaults take under five minutes on two cores.
        progress: `progress(label)` is a context manager that gives a callback (done, total).

    Returns:
        What `report.json` holds.

    Raises:
        ConfigError: the images of scikit-image are missing.
    """
    options, clock = options or DemoOptions(), Clock()
    output.mkdir(parents=True, exist_ok=True)
    with clock.stage("prepare"), progress("loading model and images"):
        model = create_model(MODEL, pretrained=True).eval()
        scale = int(getattr(model, "scale", 1))
        images = held_out(scale)
        steps = max(width.iterations for width in options.widths)
        data = training_patches(scale, options.patch, options.batch * steps, options.seed)
        kernels()
    with clock.stage("score float"), progress("scoring bicubic and float"):
        done = [_bicubic(images, scale), _float(model, images, scale)]
    for width in options.widths:
        with clock.stage(f"train {width.label}"), progress(f"training {width.label}") as report:
            result = train_quantized(
                model,
                data,
                qat_options(
                    width.iterations,
                    batch=options.batch,
                    patch=options.patch,
                    seed=options.seed,
                ),
                qmir_ao.get_qmir_qconfig(width.bits, width.bits),
                progress=report,
            )
        label = f"lower and score {width.label}"
        with clock.stage(label), progress(label):
            done.append(_integer(result, width, images, scale, output))
    methods = [method for method, _ in done]
    methods[1]["weight_bytes"] = methods[2]["weight_float_bytes"]
    pictures = [
        Picture(i.name, i.truth, {m["key"]: by[i.name] for m, by in done}, i.crop) for i in images
    ]
    document = _document(model, images, methods, options, clock.report())
    with progress("writing the report"):
        write(document, pictures, output)
    return document
