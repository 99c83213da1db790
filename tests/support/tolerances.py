"""Every tolerance of the test suite, with where it comes from.

A test that misses its tolerance is fixed in the code, not here; changing a row needs a derivation.
"""

import math

from torch import Tensor

from qmir_ao.ops.chain_quantize import ChainArgs

FLOAT32_EPS = 2.0**-23

# A rounding decision may flip where u/alpha lies this close to a half-integer: alpha is a float32
# sum of four products, so t = u/alpha carries a few units of 2^-24 relative, |t| <= 2^7.
BOUNDARY_STEPS = 1e-5

# dls_qparams adds pairs of floats where double arithmetic is slow; such a sum is off by 2^-43 of
# its largest partial sum, which rounds a mean or a deviation to the float beside the right one at
# most. Relative to a statistic; step and shift are sums of four products of them.
PAIR_STATISTIC = FLOAT32_EPS

# Moments of a channel: a thread adds up 32 deviations of a tile at most. A pair of floats rounds
# its low part, at most 2^-24 of the sum, twice for each of them: 32 * 2 * 2^-25 * 2^-24. A double
# rounds once. Both relative to the largest partial sum.
PAIR_THREAD_SUM = 2.0**-43
DOUBLE_THREAD_SUM = 32 * 2.0**-53


def moments_error(wanted: Tensor, count: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """Largest errors of mean and squares where a kernel adds up tiles and merges them.

    With the range R = high - low of n values and u the error of a thread's sum: all pivots are
    values of the channel, so that a tile's sum is off by u * R for each value, its squares by
    u * R^2. Moved to another pivot, at most R away, the squares take twice the error of the sum,
    and the last subtraction, of sum * mean, takes it twice again: 5 * u * n * R^2. What is added in
    double arithmetic after a thread's sum rounds by v = 2^-53 of at most 3 * n * R^2: tiles in one
    lane, 5 levels of a tree, 6 products and sums of each move. With what the reference rounds this
    is below 80 v for up to 64 tiles, for the mean below 32 v of R and 2 v of the mean itself.

    Args:
        wanted: moments (B, O, 4) in float64.
        count: n.
        pairs: whether threads add pairs of floats.
    """
    u, v = PAIR_THREAD_SUM if pairs else DOUBLE_THREAD_SUM, 2.0**-53
    mean, _, low, high = wanted.unbind(-1)
    extent = high - low
    return (u + 32 * v) * extent + 2 * v * mean.abs(), (5 * u + 80 * v) * count * extent.square()


# Share of codes that may differ between two computations of the same step: the chance that t falls
# within BOUNDARY_STEPS of a boundary is 2 * BOUNDARY_STEPS; half of those round the same way.
CODE_MISMATCH = 1e-5

# Moments of a channel in double: deviations from a pivot and their squares are rounded once each, a
# tile of 256 values or 48 rows adds in lanes, tiles are added one after the other. Relative to the
# sum of the terms' magnitudes that is some (tiles + 64) * 2^-53, here for up to 900 tiles.
MOMENTS = 1000 * 2.0**-53

# Published code runs float32 sums in another order: one rounding flip in 10,000 elements, and
# values elsewhere to 1e-5 (statistics over up to 1e5 elements in float32).
OFFICIAL_FLIPS = 1e-4
OFFICIAL_VALUE = 1e-5
OFFICIAL_GRAD = 1e-4

# A float kernel may be this much worse than plain float32 torch, both against float64: a goal of
# the project. Means over several draws of the largest error: that of a single draw may be luck.
KERNEL_VS_REFERENCE = 2.0

# Integer linear and convolution: a = fl(alpha*step) and float(acc) round once each, their product a
# third time (3u), likewise shift*sx; the difference and the final sum add one u each, the constant
# one when it leaves float64. To first order 5u of |a*acc| + |b*sx| + |constant|, u = 2^-24; 6u
# covers the second order.
AFFINE_RESULT = 6 * 2.0**-24

# Channel offsets of a convolution are rounded to multiples of 2^(e-38), e the exponent of the
# largest: off by half of that, at most 2^-38 of the largest, times |w_hat| <= |step*q| + |shift| at
# each tap. Their sums are exact; what float64 rounds after them, and in the oracle of the tests, is
# 2^-53 of the same sum a few hundred times at most. In all below 2^-37 of max|offset| * sum of
# |step*q| + |shift| over the taps inside.
OFFSET_ROUNDING = 2.0**-37


# Values that go into the statistics of chain_quantize, against float64, in units u = 2^-24 of the
# largest of their terms. Layer norm: mean and difference 1 each, 1 / sqrt(variance + eps) 1, its
# three products and sums 4. An activation: exponential 2, sum and quotient 2, products and
# polynomial 4. Gate 8 and its product 1, channel shift 1. The sum of all is below 32.
CHAIN_VALUE = 32 * 2.0**-24


# A step or shift that float operators fused into a quantizer predict, against the same of separate
# operators and relative to the sum of both. The values are off by CHAIN_VALUE of the largest of
# them, which a grid of 4 bits with zero inside reaches: it is at most |shift| + 8 steps.
CHAIN_GRID_ERROR = 8 * CHAIN_VALUE


def chain_grid(chain: ChainArgs) -> float:
    """Largest error of a step or a shift that chain_quantize predicts.

    The four statistics are off by what the values are, and by their own rounding; shift and step
    are sums of four of them times the learned scalars, the step of statistics plus the shift.
    """
    y, dim = chain.x.abs(), chain.dim
    if chain.norm_eps is not None:
        centred = chain.x - chain.x.mean(dim, keepdim=True)
        deviation = (centred.square().mean(dim, keepdim=True) + chain.norm_eps).sqrt()
        shape = (-1, *[1] * (-1 - dim))
        weight, bias = (t.abs().reshape(shape) for t in (chain.norm_weight, chain.norm_bias))
        # What the mean's rounding moves a difference by grows with the mean.
        y = (centred.abs() + chain.x.abs().mean(dim, keepdim=True)) / deviation * weight + bias
    if chain.gate is not None:
        y = y * chain.gate.abs()
    if chain.offset is not None:
        y = y + chain.offset.abs().reshape(-1, *[1] * (-1 - dim))
    largest = max(float(y.max()), 1.0) + 1.0
    scale, shift = (float(w.abs().sum()) for w in (chain.scale_weights, chain.shift_weights))
    return CHAIN_VALUE * largest * (1.0 + scale) * (1.0 + shift)


def scan_q_roundings(steps: int, states: int, exponent: float, offset: float) -> float:
    """Roundings (in units of 2^-24) on the longest path of `selective_scan_q`.

    Relative to the same recurrence over absolute values. `exponent` = max |delta * A|, `offset` =
    max of |step*code| + |shift| + |bias| of delta. Delta before softplus is off by 3 * offset, so
    softplus, whose relative slope is at most 1, by 3 * offset + 4 relatively. A step multiplies by
    exp(delta*A): its exponent is off by exponent * (3 * offset + 5), exp itself by 2, multiply and
    add by 2. Outside the recurrence: u, B and C (2 each), delta once more, x, x*B, C*h (1 each),
    the sum over states, and D*u.

    Kernels that cut the sequence into chunks multiply a state that crosses a chunk by one decay,
    exp of A times the chunk's sum of delta. The sum is rounded once, which its exponent (at most
    `exponent` a step) pays in place of the products' roundings, exp is off once instead of at each
    step, and the carry rounds twice where the steps did twice each. The add of a chunk's own end
    takes the place of that of its first step, whose state was zero. So the bound holds for them.
    """
    per_step = exponent * (3.0 * offset + 5.0) + 4.0
    return steps * per_step + states + 3.0 * offset + 16.0


def scan_q_computed_roundings(steps: int, states: int, exponent: float, offset: float) -> float:
    """The same where decays are not in a table but computed, 2^(delta * fl(A * log2 e)).

    The rate is rounded once more than A: one more on the exponent, which exp turns into `exponent`
    relatively. The GPU's 2^x is off by 2^-22 at most (PTX manual, ex2.approx.ftz), 4 instead of 2.
    """
    return scan_q_roundings(steps, states, exponent, offset) + steps * (exponent + 2.0)


# The sum of four directions' images, (a + b) + (c + d), rounds each of them twice.
DIRECTION_SUM_ROUNDINGS = 2.0

# Two tables of a scan, from equal operands: z = step*code - shift + bias is the same in both, exp
# and log1p are off by a unit in the last place (2u, u = 2^-24) each in both, and log1p passes a
# relative error on at most once. 2 * (2u + 2u); decays from one delta are closer.
SCAN_TABLE = 8 * 2.0**-24


def operator_roundings(taps: int) -> float:
    """Largest difference of an integer operator from its prepared twin, in units of u = 2^-24.

    Relative to the output's own sum of absolute terms, S = sum over the taps of (|alpha*q_x| +
    |beta|) * (|step*q_w| + |shift|) + |bias|, which bounds every intermediate of both. The epilogue
    costs 6 (AFFINE_RESULT). The twin rounds an activation three times (product, shift, channel
    shift), a weight twice and each product once, and its `taps` partial sums, none above S, add up
    as a random walk.
    """
    return math.sqrt(taps) + 12.0


def scan_error_steps(act_bits: int, largest_state: float) -> float:
    """Largest difference of an integer scan from its prepared twin, in steps of u.

    Both run one float recurrence with other exponentials (torch's softplus and exp, or a table):
    the relative error of a state is 64 roundings of 2^-24, as its memory is a few dozen steps of
    time with some roundings each. States and outputs are 2^act_bits steps of u at most, or what the
    same scan gives of absolute values where zero lies outside of the range of u.
    """
    return 64.0 * 2.0**-24 * max(2.0**act_bits, largest_state)


# Prepared against lowered end to end, in dB at weight and activation bits: one flipped code may
# spread through a deep network, so these are the project's goals and no derivation.
END_TO_END_PSNR = {8: 60.0, 4: 45.0, 2: 38.0}

# Score against the ground truth, simulated against integer, in dB: the project's goal as well.
TASK_PSNR = 0.02

# A captured network without quantizers against the network itself: the same operators, but for
# torch's attention module, whose fast path in evaluation adds the same products in another order:
# a few units of 2^-24 of values up to about ten.
CAPTURED_NETWORK = 2e-6

# Random small networks end to end. A wrong connection gives results of other places, below 10 dB of
# the range; a code that flips at a boundary changes one of about a hundred values by a step of a
# third of the range at most: 10 * log10(9 * 100) = 29 dB, and fewer where it feeds a softmax.
GRAPH_PSNR = 20.0

# Two float32 results that differ in their last bit round to different bf16 numbers where they lie
# around a midpoint: 2^-15 of them, each by a unit of 2^-8. Relative to the norm of n elements at
# most sqrt(k / n) * 2^-8 for k flips; k = 3 of n >= 1000 covers the tests' sizes.
BF16_FLIPS = math.sqrt(3 / 1000) * 2.0**-8


# Sides of a benchmark that claim the same work, norm of the difference over the norm. The coarsest
# round operands and results to bf16, 2^-9 of each, and add thousands of products of such operands,
# whose errors are independent: a few times 2^-9 in all. Another work (an operand left out, a
# direction not turned back) is off by tenths.
SAME_WORK = 2.0**-5
