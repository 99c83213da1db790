"""What a restoration task is: how inputs come from ground truth, and how results are scored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from qmir_ao.errors import ConfigError, ImageError
from qmir_ao.recipes.images import Pixels, list_images, read_image
from qmir_ao.recipes.metrics import Convention
from qmir_ao.recipes.pixels import crop_to_multiple

Pair = tuple[Pixels, Pixels]
SHOWN = 3
"""Names of files that an error lists."""


@dataclass(frozen=True)
class Source:
    """One image pair that is read when it is needed.

    Attributes:
        name: file name, or number of a block.
        load: returns (input, ground truth), both (H, W, C).
        check: reads the files and compares their sizes, without making an input.
    """

    name: str
    load: Callable[[], Pair]
    check: Callable[[], object]


class Task(ABC):
    """A restoration task. Subclasses are frozen dataclasses whose fields are the settings.

    Images are uint8 (H, W, C), RGB or grey; an input with noise is float32 in units of the peak.

    Attributes:
        name: how recipes and the command line call it.
        channels: 3 for RGB, 1 for grey.
        loss: the published training loss: "l1" or "charbonnier".
        from_truth: whether inputs can be made from ground truth.
    """

    name: ClassVar[str]
    channels: ClassVar[int] = 3
    loss: ClassVar[str] = "l1"
    from_truth: ClassVar[bool] = True

    @property
    def scale(self) -> int:
        """Enlargement from input to ground truth."""
        return 1

    @property
    @abstractmethod
    def title(self) -> str:
        """Task and settings in a few words, for tables."""

    @property
    @abstractmethod
    def convention(self) -> Convention:
        """How the published numbers are computed."""

    @property
    def baseline_name(self) -> str:
        """What the untouched input is called in a table."""
        return "input"

    def read(self, path: Path) -> Pixels:
        """Ground truth of a file, uint8 with the task's channels."""
        return read_image(path, self.channels)

    def read_input(self, path: Path) -> Pixels:
        """User-supplied input of a file, uint8 with the task's channels."""
        return read_image(path, self.channels)

    @abstractmethod
    def degrade(self, truth: Pixels) -> Pixels:
        """Deterministic part of the degradation, of a whole image whose sides the scale divides."""

    def corrupt(self, patch: Pixels, rng: np.random.Generator) -> Pixels:
        """Random part of the degradation, of a training patch."""
        return patch

    def evaluation_input(self, truth: Pixels) -> Pixels:
        """Input of a test image exactly as published; equal at every call."""
        return self.degrade(truth)

    def baseline(self, low: Pixels) -> Pixels:
        """What one would have without a network, of the size of the ground truth."""
        return low

    def input_stems(self, truth: Path) -> list[str]:
        """Names without suffix under which the input of a ground-truth file is looked for."""
        return [truth.stem]

    def locate(self, folder: Path, inputs: Path | None) -> tuple[Path, Path | None]:
        """Folder with ground truth, and folder with inputs or None if they are made from it."""
        return Path(folder), inputs

    def pairs(self, folder: Path, inputs: Path | None = None) -> list[tuple[Path, Path | None]]:
        """Ground-truth files of a folder with their input files (None where they are made).

        Further inputs are left alone: a folder of inputs may serve several of ground truth.

        Raises:
            ImageError: no images, ground truth without input, or two inputs of one name.
        """
        folder, inputs = self.locate(folder, inputs)
        truths = list_images(folder)
        if inputs is None:
            return [(path, None) for path in truths]
        known = _by_stem(list_images(Path(inputs)))
        found = {
            path: next((known[s] for s in self.input_stems(path) if s in known), None)
            for path in truths
        }
        alone = [path.name for path, low in found.items() if low is None]
        if alone:
            raise ImageError(
                f"{inputs}: holds no input for {len(alone)} of {len(truths)} images of {folder}: "
                f"{shortened(alone)}; an input is called like its ground truth "
                f"({' or '.join(self.input_stems(truths[0]))} for {truths[0].name})"
            )
        return list(found.items())

    def read_pair(self, truth: Path, low: Path | None = None) -> tuple[Pixels, Pixels | None]:
        """Ground truth of a file, and the input if it has a file too.

        Raises:
            ImageError: a file cannot be read.
        """
        return self.read(truth), None if low is None else self.read_input(low)

    def training_pair(self, image: Pixels, given: Pixels | None, where: Path) -> Pair:
        """Input without the random part, and ground truth, of a training image.

        Args:
            image: ground truth as it was read; cut to a multiple of the scale without `given`.
            given: input as it was read, or None to make it.
            where: file of the ground truth, for the error.

        Raises:
            ImageError: the sizes do not fit.
        """
        if given is None:
            image = crop_to_multiple(image, self.scale)
            return self.degrade(image), image
        self._check_sizes(given, image, where)
        return given, image

    def test_pair(self, image: Pixels, given: Pixels | None, where: Path) -> Pair:
        """Input as published, and ground truth, of a test image; see `training_pair`.

        Ground truth is always cut to a multiple of the scale: the published sets need it.
        """
        image = self._test_truth(image, given, where)
        return self.evaluation_input(image) if given is None else given, image

    def _test_truth(self, image: Pixels, given: Pixels | None, where: Path) -> Pixels:
        image = crop_to_multiple(image, self.scale)
        if given is not None:
            self._check_sizes(given, image, where)
        return image

    def sources(self, folder: Path, inputs: Path | None = None) -> list[Source]:
        """Test pairs of a folder, in the order of their names.

        Raises:
            ImageError: no images, or ground truth without input.
        """

        def source(truth: Path, low: Path | None) -> Source:
            return Source(
                truth.name,
                lambda: self.test_pair(*self.read_pair(truth, low), where=truth),
                lambda: self._test_truth(*self.read_pair(truth, low), where=truth),
            )

        return [source(truth, low) for truth, low in self.pairs(folder, inputs)]

    def check_sources(self, folder: Path, inputs: Path | None = None) -> None:
        """Read all test images of a folder, so that none of them fails after a long training.

        Raises:
            ImageError: no images, ground truth without input, a file that cannot be read, or sizes
                that do not fit.
        """
        for source in self.sources(folder, inputs):
            source.check()

    def _check_sizes(self, given: Pixels, image: Pixels, where: Path) -> None:
        h, w = (side * self.scale for side in given.shape[:2])
        if (h, w) != image.shape[:2]:
            raise ImageError(
                f"{where}: {image.shape[1]}x{image.shape[0]} pixels do not match its input of "
                f"{given.shape[1]}x{given.shape[0]} at scale {self.scale}; they must be {w}x{h}"
            )


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        other = found.setdefault(path.stem, path)
        if other is not path:
            raise ImageError(
                f"{path.parent}: {other.name} and {path.name} are both an input called "
                f"{path.stem!r}; keep one of them"
            )
    return found


def shortened(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def one_of(task: str, setting: str, value: object, allowed: Sequence[object]) -> None:
    """Check a setting.

    Raises:
        ConfigError: the value is not allowed.
    """
    # True and 1.0 are equal to 1, but no scale.
    if type(value) not in {type(a) for a in allowed} or value not in allowed:
        raise ConfigError(f"task {task}: {setting} must be one of {allowed}, got {value!r}")
