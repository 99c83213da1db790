"""Initial values of the learned quantizer parameters, from formulas or from a first batch.

Source: Q-MambaIR (arXiv 2503.21970), table 6 for the named presets; LSQ (arXiv 1902.08153) for
`lsq_step`; J. Max, "Quantizing for minimum distortion" (1960) for the Gaussian steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qmir_ao.ops._affine import as_rows, group_count

SAMPLE = 65536
"""Most elements of a first batch that the search looks at."""

_BINS = 2048
_COARSE = 16
_FINE = 4
_WEIGHT_CANDIDATES = 64
_ZERO_WEIGHT_STEP = 1e-2

# Mean-square-optimal step of a uniform symmetric quantizer with 2**bits levels on a unit Gaussian;
# tests/quant/test_init.py derives these numbers. Two bits: 0.9957, rounded up by the evidence.
GAUSSIAN_STEP = {2: 1.0, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}

NAMED_PRESETS = ("mu3s", "mu4s", "minmax", "mu_halfrange", "mid3s")
DLS_INITS = ("mse", "closed_form", *NAMED_PRESETS)
STATIC_INITS = ("lsq", "mse", "minmax", "percentile")
RFA_INITS = ("mse", "lsq")

PERCENTILE = 0.999
"""Share of the values inside the grid of the `percentile` start, half of the rest on each side."""


class Scalars(NamedTuple):
    """The eight learned scalars of DLS."""

    scale_weights: Tensor
    shift_weights: Tensor


def named_preset(name: str, bits: int) -> Scalars:
    """One of the paper's five initialisations: mu3s, mu4s, minmax, mu_halfrange, mid3s."""
    top, span = 2 ** (bits - 1) - 1, 2**bits - 1
    scale = {
        "mu3s": (1 / top, 3 / top, 0, 0),
        "mu4s": (1 / top, 4 / top, 0, 0),
        "minmax": (0, 0, -1 / span, 1 / span),
        "mu_halfrange": (0, 0, -0.5 / top, 0.5 / top),
        "mid3s": (0, 3 / top, 0, 0),
    }
    middle = name in ("minmax", "mid3s")
    shift = (0.0, 0.0, -0.5, -0.5) if middle else (-1.0, 0.0, 0.0, 0.0)
    return Scalars(torch.tensor(scale[name], dtype=torch.float32), torch.tensor(shift))


def closed_form(bits: int, quant_min: int) -> Scalars:
    """Data-free start: the Gaussian-optimal grid, centred on the mean."""
    step = GAUSSIAN_STEP[bits]
    centre = step * (quant_min + (2**bits - 1) / 2)
    return Scalars(torch.tensor([0.0, step, 0.0, 0.0]), torch.tensor([-1.0, centre, 0.0, 0.0]))


def searched_scalars(x: Tensor, bits: int, quant_min: int, per_tensor: bool) -> Scalars:
    """Best DLS scalars of the form step = a * std, shift = -mean + b * std for a first batch.

    Args:
        x: first batch; dim 0 counts samples.
        bits: code width.
        quant_min: smallest code.
        per_tensor: whether statistics run over the whole batch.

    Returns:
        scale_weights (0, a, 0, 0) and shift_weights (-1, b, 0, 0); the closed form where nothing
        varies.
    """
    rows = as_rows(x.detach(), group_count(x, per_tensor)).float()
    if rows.shape[1] < 2:
        return closed_form(bits, quant_min)
    mean, std = rows.mean(1, keepdim=True), rows.std(1, keepdim=True)
    # Float32 rounding leaves a constant row a spread of a few ulp, which is none.
    alive = std.squeeze(1) > 1e-6 * mean.squeeze(1).abs()
    if not bool(alive.any()):
        return closed_form(bits, quant_min)
    rows, mean, std = rows[alive], mean[alive], std[alive]
    # Every sample is measured in its own standard deviations, and counts by its energy.
    values = ((rows - mean) / std).reshape(-1)
    weights = std.square().expand_as(rows).reshape(-1)
    step, offset = search_grid(values, weights, bits, quant_min)
    return Scalars(torch.tensor([0.0, step, 0.0, 0.0]), torch.tensor([-1.0, offset, 0.0, 0.0]))


def search_grid(values: Tensor, weights: Tensor, bits: int, quant_min: int) -> tuple[float, float]:
    """Step and shift of the uniform grid with the least weighted square error.

    The grid's ends start at the minimum and maximum and move inwards independently: coarsely over
    the whole range, then three times finer around the best.

    Args:
        values: flat values, not all equal.
        weights: weight of each value's square error.
        bits: code width.
        quant_min: smallest code.

    Returns:
        step and shift of x_hat = step * code - shift.
    """
    stride = -(-values.numel() // SAMPLE)
    low, high = (float(v) for v in values.aminmax())
    points, mass = _histogram(values[::stride].double(), weights[::stride].double(), low, high)
    span, spacing = high - low, 1.0 / _COARSE
    fractions = torch.arange(_COARSE, dtype=torch.float64) * spacing
    left, right = _best(points, mass, fractions, fractions, low, span, bits)
    for _ in range(3):
        spacing /= _FINE
        near = torch.arange(-_FINE, _FINE + 1, dtype=torch.float64) * spacing
        left, right = _best(
            points, mass, (left + near).clamp(min=0), (right + near).clamp(min=0), low, span, bits
        )
    step = span * (1.0 - left - right) / (2**bits - 1)
    return step, step * quant_min - (low + span * left)


def _histogram(values: Tensor, weights: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Bin means and masses: thousands of values cost no more than two thousand."""
    bins = ((values - low) * (_BINS / (high - low))).long().clamp(0, _BINS - 1)
    mass = torch.zeros(_BINS, dtype=torch.float64, device=values.device)
    mass = mass.index_add(0, bins, weights)
    moment = torch.zeros_like(mass).index_add(0, bins, weights * values)
    used = mass > 0
    return (moment[used] / mass[used]).cpu(), mass[used].cpu()


def _best(
    points: Tensor,
    mass: Tensor,
    left: Tensor,
    right: Tensor,
    low: float,
    span: float,
    bits: int,
) -> tuple[float, float]:
    pairs = torch.cartesian_prod(left, right)
    pairs = pairs[pairs.sum(1) < 1.0 - 1e-6]
    start = low + span * pairs[:, :1]
    step = span * (1.0 - pairs.sum(1, keepdim=True)) / (2**bits - 1)
    codes = ((points - start) / step).round_().clamp_(0, 2**bits - 1)
    errors = (codes * step + start - points).square_() @ mass
    a, b = pairs[int(errors.argmin())].tolist()
    return a, b


def lsq_step(values: Tensor, quant_max: int) -> Tensor:
    """LSQ's step 2 * mean|x| / sqrt(quant_max) of a whole tensor, shape (1,)."""
    step = 2.0 * values.detach().abs().mean().float() / max(quant_max, 1) ** 0.5
    return torch.where(step > 0, step, torch.full_like(step, _ZERO_WEIGHT_STEP)).reshape(1)


def static_grid(
    values: Tensor, init: str, bits: int, quant_min: int, quant_max: int, *, shifted: bool
) -> tuple[float, float | None]:
    """Step and shift of a static quantizer from a first batch.

    Args:
        values: float32, not empty.
        init: one of STATIC_INITS.
        bits: code width.
        quant_min: smallest code.
        quant_max: largest code.
        shifted: whether the grid may be shifted; without it zero is a level.

    Returns:
        The step, and the shift or None where it stays as it is.
    """
    flat = values.reshape(-1)
    low, high = (float(v) for v in flat.aminmax())
    if init == "lsq" or not high > low:
        return float(lsq_step(values, quant_max)), None
    if init == "percentile":
        tail = (1.0 - PERCENTILE) / 2
        sample = flat[:: -(-flat.numel() // SAMPLE)].double()
        ends = torch.quantile(sample, torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
        low, high = (float(v) for v in ends) if bool(ends[1] > ends[0]) else (low, high)
    if shifted and init == "mse":
        return search_grid(flat, torch.ones_like(flat), bits, quant_min)
    if shifted:
        step = (high - low) / (quant_max - quant_min)
        return step, step * quant_min - low
    if init == "mse":
        sample = flat[:: -(-flat.numel() // SAMPLE)].reshape(1, -1)
        return float(weight_steps(sample, quant_min, quant_max)), None
    peak = max(high / quant_max, low / quant_min if quant_min < 0 else 0.0)
    return (peak, None) if peak > 0 else (float(lsq_step(values, quant_max)), None)


def weight_steps(rows: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Step with the least square error for each row (G, N) of a weight, without a shift.

    A row of zeros takes the mean step of the others: any step represents it, and a tiny one would
    clip its gradients for ever.
    """
    rows = rows.detach().float()
    peak = rows.abs().amax(1, keepdim=True) / quant_max
    best = torch.full_like(peak, float("inf"))
    steps = peak.clone()
    for i in range(1, _WEIGHT_CANDIDATES + 1):
        step = (peak * (i / _WEIGHT_CANDIDATES)).clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.clamp(torch.round(rows / step), quant_min, quant_max)
        error = (codes * step - rows).square_().sum(1, keepdim=True)
        better = error < best
        best, steps = torch.where(better, error, best), torch.where(better, step, steps)
    steps, zero = steps.squeeze(1), (peak == 0).squeeze(1)
    if bool(zero.all()):
        return torch.full_like(steps, _ZERO_WEIGHT_STEP)
    return torch.where(zero, steps[~zero].mean(), steps)
