"""Images that scikit-image ships, for the demo: some to train on, three held out."""

import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qmir_ao.errors import ConfigError
from qmir_ao.recipes.data import PatchDataset, bicubic_downscale, crop_to_multiple
from qmir_ao.recipes.images import Pixels, read_image

TRAIN_IMAGES = (
    "motorcycle_left.png",
    "rocket.jpg",
    "camera.png",
    "coins.png",
    "brick.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "color.png",
)
# File name to the part that the report shows: top, left, height, width.
HELD_OUT = {
    "astronaut.png": (342, 124, 88, 88),
    "coffee.png": (232, 322, 88, 88),
    "chelsea.png": (52, 126, 88, 88),
}


@dataclass(frozen=True)
class HeldOut:
    """One image that no training step sees.

    Attributes:
        name: file name without suffix.
        truth: uint8 (H, W, 3).
        low: `truth` downscaled, the network's input.
        crop: top, left, height, width of the part that is shown.
    """

    name: str
    truth: Pixels
    low: Pixels
    crop: tuple[int, int, int, int]


def package_images() -> Path:
    """Folder of the images that scikit-image ships.

    Raises:
        ConfigError: scikit-image is missing, or its build has no images.
    """
    try:
        folder = Path(str(resources.files("skimage"))) / "data"
    except ModuleNotFoundError as error:
        raise ConfigError(
            "demo: scikit-image is missing; pip install 'qmir-ao[recipes]'"
        ) from error
    absent = [name for name in (*TRAIN_IMAGES, *HELD_OUT) if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"demo: this scikit-image lacks {', '.join(absent)}; use a PyPI wheel")
    return folder


def training_patches(scale: int, patch: int, length: int, seed: int) -> PatchDataset:
    """Patches of TRAIN_IMAGES; see `PatchDataset`."""
    folder = package_images()
    with tempfile.TemporaryDirectory() as scratch:
        for name in TRAIN_IMAGES:
            (Path(scratch) / name).symlink_to(folder / name)
        return PatchDataset([Path(scratch)], scale=scale, patch=patch, length=length, seed=seed)


def held_out(scale: int) -> list[HeldOut]:
    """The images of HELD_OUT with their downscaled inputs."""
    folder = package_images()
    images = []
    for name, crop in HELD_OUT.items():
        truth = crop_to_multiple(read_image(folder / name), scale)
        images.append(HeldOut(Path(name).stem, truth, bicubic_downscale(truth, scale), crop))
    return images
