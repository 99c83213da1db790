"""Images and float networks of scale `tiny`, made from what scikit-image ships."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qmir_ao.recipes.checkpoint import load_checkpoint, save_weights
from qmir_ao.recipes.data import PatchDataset
from qmir_ao.recipes.experiments.registry import Budget
from qmir_ao.recipes.images import Pixels, read_image, write_image
from qmir_ao.recipes.models.edsr import EDSR
from qmir_ao.recipes.models.mambair import MambaIR
from qmir_ao.recipes.models.mambair_unet import MambaIRUNet
from qmir_ao.recipes.models.mambairv2 import MambaIRv2
from qmir_ao.recipes.models.swinir import SwinIR
from qmir_ao.recipes.samples import HELD_OUT, TRAIN_IMAGES, package_images
from qmir_ao.recipes.tasks import RealDenoising, Task
from qmir_ao.recipes.train import TrainOptions, fit

CROP = 192
"""Side of the test images of networks that do not enlarge: they run at full size."""
SHOT, READ = 0.02, 0.02
"""Camera noise: variance `SHOT * x + READ**2` of a pixel x in [0, 1]."""
SET_NAME = "scikit-image"

_WINDOWED: dict[str, Any] = {"embed_dim": 32, "depths": (2,), "heads": (2,), "window": 8}
REDUCED: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "edsr-baseline": (EDSR, {"features": 32, "blocks": 4}),
    "swinir-light": (
        SwinIR,
        {**_WINDOWED, "upsampler": "pixelshuffledirect", "drop_path_rate": 0.0},
    ),
    "mambairv2": (
        MambaIRv2,
        {
            **_WINDOWED,
            "upsampler": "pixelshuffle",
            "d_state": 8,
            "inner_rank": 16,
            "num_tokens": 32,
        },
    ),
}
"""Small networks for super-resolution, by the names of the zoo without their scale."""

Progress = Callable[[int, int], None]


def photos(folder: Path) -> Path:
    """Folder with the training photos."""
    target, source = folder / "photos", package_images()
    for name in TRAIN_IMAGES:
        _copy(source / name, target / name)
    return target


def held_out(folder: Path, whole: bool) -> Path:
    """Folder with the test photos, whole or their middles."""
    target, source = folder / ("held-out" if whole else "held-out-middles"), package_images()
    for name in HELD_OUT:
        if whole:
            _copy(source / name, target / name)
        else:
            _write(target / f"{Path(name).stem}.png", _middle(read_image(source / name)))
    return target


def camera_pairs(folder: Path) -> tuple[Path, Path]:
    """Folders of clean and noisy pairs to train and to test on: made-up camera noise."""
    source, folders = package_images(), []
    for kind, names in (("train", list(TRAIN_IMAGES)), ("test", list(HELD_OUT))):
        target = folder / f"camera-{kind}"
        for index, name in enumerate(names):
            clean = read_image(source / name)
            clean = clean if kind == "train" else _middle(clean)
            file = f"{Path(name).stem}.png"
            _write(target / "target" / file, clean)
            _write(target / "input" / file, _camera(clean, index))
        folders.append(target)
    return folders[0], folders[1]


def _camera(clean: Pixels, seed: int) -> Pixels:
    x = clean.astype(np.float64) / 255.0
    noise = np.random.default_rng(seed).normal(size=x.shape) * np.sqrt(SHOT * x + READ**2)
    return np.rint(np.clip(x + noise, 0.0, 1.0) * 255.0).astype(np.uint8)


def _middle(image: Pixels) -> Pixels:
    top, left = (max(0, (side - CROP) // 2) for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + CROP, left : left + CROP])


def _copy(source: Path, target: Path) -> None:
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _write(path: Path, pixels: Pixels) -> None:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, pixels)


def is_reducible(network: str) -> bool:
    """Whether a network of the zoo has a small one of its class in `REDUCED`."""
    return any(network.startswith(f"{family}-") for family in REDUCED)


def reduced_model(task: Task, network: str = "") -> tuple[str, nn.Module]:
    """Name and fresh weights of a small network of the class that the paper has for a task.

    Args:
        task: restoration task.
        network: model of the zoo whose class it is to be; that of MambaIR, or of its U-Net for
            camera noise, where it is empty.
    """
    torch.manual_seed(0)
    for family, (build, arguments) in REDUCED.items():
        if network.startswith(f"{family}-"):
            return f"{family}-reduced-x{task.scale}", build(scale=task.scale, **arguments)
    if isinstance(task, RealDenoising):
        unet = MambaIRUNet(dim=32, depths=(1, 1, 1, 1), refinement=1, d_state=4, expand=1.0)
        return "mambair-unet-reduced", unet
    settings: dict[str, Any] = {"embed_dim": 32, "depths": (2,), "d_state": 8, "expand": 1.0}
    model = MambaIR(**settings, in_channels=task.channels, drop_path_rate=0.0)
    return "mambair-reduced", model


def reduced_network(
    task: Task,
    folders: Sequence[Path],
    budget: Budget,
    cache: Path,
    progress: Progress | None = None,
    skip_bad_images: bool = False,
    network: str = "",
) -> tuple[str, nn.Module]:
    """`reduced_model` trained for a task, always with one seed; an older result is taken again.

    Args:
        task: restoration task.
        folders: training images.
        budget: length of the training.
        cache: folder for the weights.
        progress: called with (done, total) after each step.
        skip_bad_images: leave out images that cannot be read.
        network: see `reduced_model`.

    Returns:
        Name and network.
    """
    options = TrainOptions(
        iterations=budget.float_iterations,
        batch=budget.batch,
        patch=budget.patch,
        warmup=min(50, budget.float_iterations // 4),
        loss=task.loss,
        save_every=0,
    )
    name, model = reduced_model(task, network)
    facts = {"task": task.title, "images": listing(folders), "options": options.to_dict()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = cache / f"{name}-{task.name}-{digest}.safetensors"
    if path.is_file():
        load_checkpoint(model, path)
        return name, model.eval()
    data = PatchDataset(
        folders,
        task=task,
        patch=options.patch,
        length=options.batch * options.iterations,
        seed=options.seed,
        skip_bad_images=skip_bad_images,
    )

    def tell(done: int, total: int, loss: float) -> None:
        if progress is not None:
            progress(done, total)

    result = fit(model, data, options, progress=tell)
    cache.mkdir(parents=True, exist_ok=True)
    save_weights(model, path, {"task": task.title, "loss": result.loss})
    return name, model.eval()


def default_data(task: Task, folder: Path) -> tuple[Path, Path]:
    """Folders to train and to test on, where the user names none."""
    if isinstance(task, RealDenoising):
        return camera_pairs(folder)
    return photos(folder), held_out(folder, whole=task.scale > 1)


def listing(folders: Sequence[Path]) -> list[tuple[str, int]]:
    """Names and sizes of the files of folders (or of a file), to tell one set from another."""
    found = []
    for given in folders:
        folder = Path(given)
        files = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        found += [(f.name, f.stat().st_size) for f in files if f.is_file()]
    return found
