"""Prepared and lowered networks on input that has no right answer, or an empty one."""

import math

import pytest
import torch
from support.models import CAPTURES, tiny_pair
from torch import Tensor, nn

from qmir_ao.errors import NonFiniteError

captures = pytest.mark.parametrize("capture", CAPTURES)
forms = pytest.mark.parametrize("form", ["prepared", "lowered"])


def network(capture: str, form: str) -> nn.Module:
    prepared, lowered = tiny_pair(capture, 4)
    return prepared if form == "prepared" else lowered


def batch(bad: float) -> Tensor:
    """Three images; one pixel of the second is bad."""
    x = torch.rand(3, 3, 9, 10)
    x[1, 0, 4, 4] = bad
    return x


@captures
@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_activations_that_are_not_finite_name_the_image(
    capture: str, form: str, bad: float
) -> None:
    # In a prepared network the operator counts what it has a step for: samples, or tokens.
    culprit = r"sample \d+ of x" if form == "prepared" else "image 1 of the batch, run alone"
    with pytest.raises(NonFiniteError, match=f"{culprit}.*holds NaN or infinity"):
        network(capture, form)(batch(bad))
    assert torch.isfinite(network(capture, form)(batch(0.5))).all()


@captures
@forms
def test_an_empty_batch_gives_an_empty_batch(capture: str, form: str) -> None:
    assert network(capture, form)(torch.zeros(0, 3, 9, 10)).shape == (0, 3, 18, 20)


@captures
@forms
def test_images_without_pixels_are_refused(capture: str, form: str) -> None:
    with pytest.raises(RuntimeError, match="input size"):
        network(capture, form)(torch.zeros(1, 3, 0, 10))
