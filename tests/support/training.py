"""A very small training run, whole or killed half-way, for tests in this and in other processes."""

import os
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import qmir_ao
from qmir_ao.recipes.train import TrainOptions, TrainResult, fit

SIDE, SCALE = 8, 2


class Waves:
    """Seeded patches that need no files."""

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        frequency, phase = rng.uniform(0.1, 0.5, (2, 3)), rng.uniform(0, 6, 3)
        y, x = np.mgrid[: SIDE * SCALE, : SIDE * SCALE]
        waves = [np.sin(frequency[0, c] * x + frequency[1, c] * y + phase[c]) for c in range(3)]
        high = torch.from_numpy(np.stack(waves)).float() / 2 + 0.5
        return interpolate(high[None], scale_factor=1 / SCALE, mode="area")[0], high


class Upscaler(nn.Module):
    """Two convolutions, dropout and a bilinear skip."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(torch.relu(self.first(x))))
        return interpolate(x + self.last(self.drop(y)), scale_factor=float(SCALE), mode="bilinear")


def upscaler(bits: int | None = None, preset: str | None = None) -> nn.Module:
    """A fresh network, with DLS and RFA quantizers if `bits` is given; always the same weights."""
    torch.manual_seed(0)
    model = Upscaler()
    if bits is None:
        return model
    return qmir_ao.prepare_qat(model, qmir_ao.get_qmir_qconfig(bits, bits, preset=preset))


def without_dropout() -> nn.Module:
    """The float network without dropout, whose ranks draw different masks."""
    model = upscaler()
    assert isinstance(model, Upscaler)
    model.drop.p = 0.0
    return model


def settings(iterations: int, save_every: int) -> TrainOptions:
    """Options of a small run."""
    return TrainOptions(
        iterations=iterations, batch=2, patch=SIDE, warmup=2, save_every=save_every, seed=3
    )


def run_until_killed(folder: Path, result: Path, journal: Path, options: TrainOptions) -> None:
    """Train a quantized network, going on from `folder`; note each step in `journal`."""
    torch.set_num_threads(1)
    with journal.open("ab", buffering=0) as file:

        def note(done: int, total: int, loss: float) -> None:
            file.write(f"{done}\n".encode())

        model = upscaler(bits=4)
        note(0, 0, 0.0)
        data = Waves(options.batch * options.iterations)
        fit(model, data, options, progress=note, checkpoint_dir=folder, resume=True)
    scratch = result.with_suffix(".part")
    torch.save(model.state_dict(), scratch)
    os.replace(scratch, result)


def run_here(options: TrainOptions, model: nn.Module) -> TrainResult:
    """Train without interruption."""
    return fit(model, Waves(options.batch * options.iterations), options)


def write_ramp(folder: Path, side: int) -> None:
    """One small colour image, `ramp.png`, to train and to test on."""
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), axis=-1)
    assert cv2.imwrite(str(folder / "ramp.png"), pixels)
