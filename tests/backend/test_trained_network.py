"""The shipped network from its float weights to integers: how much of the image survives.

After initialisation on a first batch and a few training steps at each width, the integer network
has to give the images of the simulated one, and the same score against the ground truth. Where a
rounding flips, everything behind it may come out otherwise, so one crop says little (two equal
codes everywhere: 140 dB; one flip: 45 dB at 4 bits); the figures are those of a set of crops.
"""

import functools
from pathlib import Path
from statistics import fmean

import pytest
import torch
from skimage import data as images
from support.integers import same_bytes
from support.lowering import pooled_psnr
from support.tolerances import END_TO_END_PSNR, TASK_PSNR
from torch import Tensor
from torch.fx import GraphModule

import qmir_ao
from qmir_ao.backend.lowered import LoweredModule
from qmir_ao.recipes.data import bicubic_downscale, to_pixels, to_tensor
from qmir_ao.recipes.metrics import psnr_y
from qmir_ao.recipes.models import create_model

STEPS, BATCH, PATCH, SCALE = 20, 2, 24, 2
WIDTHS = pytest.mark.parametrize("bits", [8, 4, 2])
# Name in scikit-image, top and left corner of the crop, its height and width.
CROPS = (
    ("astronaut", 30, 170, 160, 150),
    ("astronaut", 200, 200, 150, 160),
    ("coffee", 150, 200, 158, 154),
    ("coffee", 10, 300, 160, 150),
    ("chelsea", 80, 120, 154, 162),
    ("chelsea", 20, 250, 162, 138),
)
ODD_SIZES = ((1, 19, 23), (3, 31, 17), (3, 8, 8), (1, 5, 41), (3, 37, 45))
TRAINED_ON = ("rocket", "colorwheel", "immunohistochemistry")


def pair(name: str, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Low and high resolution of a crop, (C, H, W) in [0, 1]."""
    truth = getattr(images, name)()[top : top + height, left : left + width, :3]
    return to_tensor(bicubic_downscale(truth, SCALE)), to_tensor(truth)


@functools.cache
def trained(bits: int) -> tuple[GraphModule, LoweredModule]:
    """The pretrained network after a few steps at a width, and its integers."""
    torch.manual_seed(0)
    network = create_model("mambair-tiny-x2", pretrained=True)
    side = PATCH * SCALE
    draws = torch.randint(0, 200, (STEPS * BATCH, 2)).tolist()
    patches = [
        pair(TRAINED_ON[i % len(TRAINED_ON)], top, left, side, side)
        for i, (top, left) in enumerate(draws)
    ]
    prepared = qmir_ao.prepare_qat(network, qmir_ao.get_qmir_qconfig(bits, bits))
    prepared.train()
    optimizer = torch.optim.Adam(prepared.parameters(), lr=2e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        low, high = zip(*patches[step * BATCH : (step + 1) * BATCH], strict=True)
        optimizer.zero_grad()
        (prepared(torch.stack(low)) - torch.stack(high)).abs().mean().backward()
        optimizer.step()
        schedule.step()
    prepared.eval()
    return prepared, qmir_ao.convert_and_lower(prepared)


def both(bits: int, low: Tensor) -> tuple[Tensor, Tensor]:
    """What the simulated and the integer network make of a batch."""
    prepared, lowered = trained(bits)
    with torch.no_grad():
        return prepared(low), lowered(low)


def score(image: Tensor, truth: Tensor) -> float:
    return psnr_y(to_pixels(image), to_pixels(truth), SCALE)


@WIDTHS
def test_integers_give_the_images_and_the_score_of_the_simulation(bits: int) -> None:
    pairs = [pair(*crop) for crop in CROPS]
    restored = [both(bits, low[None]) for low, _ in pairs]
    assert pooled_psnr(restored) >= END_TO_END_PSNR[bits]
    simulated, integer = (
        fmean(
            score(outputs[i][0], truth) for outputs, (_, truth) in zip(restored, pairs, strict=True)
        )
        for i in (0, 1)
    )
    assert simulated > 28.0
    assert abs(simulated - integer) <= TASK_PSNR


@WIDTHS
def test_odd_sizes_and_batches_agree(bits: int) -> None:
    low, _ = pair(*CROPS[0])
    restored = []
    for count, height, width in ODD_SIZES:
        batch = torch.stack([low[:, 9 * i : 9 * i + height, :width] for i in range(count)])
        restored.append(both(bits, batch))
        assert restored[-1][1].shape == (count, 3, SCALE * height, SCALE * width)
    assert pooled_psnr(restored) >= END_TO_END_PSNR[bits]


@WIDTHS
def test_a_reloaded_network_gives_the_same_bytes(bits: int, tmp_path: Path) -> None:
    lowered = trained(bits)[1]
    qmir_ao.save(lowered, tmp_path / "net")
    low, _ = pair(*CROPS[0])
    assert same_bytes(qmir_ao.load(tmp_path / "net")(low[None]), lowered(low[None]))
