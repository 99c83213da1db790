"""Every tolerance of the test suite, with where it comes from.

A test that misses its tolerance is fixed in the code, not here; changing a row needs a derivation.
"""

import math

FLOAT32_EPS = 2.0**-23

# A rounding decision may flip where u/alpha lies this close to a half-integer: alpha is a float32
# sum of four products, so t = u/alpha carries a few units of 2^-24 relative, |t| <= 2^7.
BOUNDARY_STEPS = 1e-5

# Share of codes that may differ between two computations of the same step: the chance that t falls
# within BOUNDARY_STEPS of a boundary is 2 * BOUNDARY_STEPS; half of those round the same way.
CODE_MISMATCH = 1e-5

# Published code runs float32 sums in another order: one rounding flip in 10,000 elements, and
# values elsewhere to 1e-5 (statistics over up to 1e5 elements in float32).
OFFICIAL_FLIPS = 1e-4
OFFICIAL_VALUE = 1e-5
OFFICIAL_GRAD = 1e-4

# A float kernel may be this much worse than plain float32 torch: largest error against float64,
# over several draws.
KERNEL_VS_REFERENCE = 2.0

# The largest outputs of the scan decide both errors, and there the reference may be exact by luck.
# Each is the rounded sum or product of two rounded values (D*u and the sum over states, slope of
# softplus and gradient of the time step, ...): three roundings of half a unit, relative to the
# largest output, that a kernel as good as the reference may have alone.
SCAN_FLOOR = 3 * 2.0**-24

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


def operator_error_steps(taps: int, act_bits: int, weight_bits: int) -> float:
    """Largest difference, in accumulator units, of an integer operator from its prepared twin.

    With zero inside both ranges, |q - shift/step| <= 2^bits, so all products together are at most
    S = taps * 2^(act_bits + weight_bits) units, and so are |a*acc| + |b*sx| + |constant|, which
    share S between them. The epilogue rounds those by 6u (AFFINE_RESULT), u = 2^-24. The twin
    rounds each operand twice and adds `taps` products: 4u of S, and a random walk of `taps`
    roundings of partial sums up to S, sqrt(taps) * u * S. Shifts make the partial sums grow with
    taps, not with its root.
    """
    return (math.sqrt(taps) + 10.0) * taps * 2.0 ** (act_bits + weight_bits) * 2.0**-24


# The scan's twin runs the same float recurrence with other exponentials (torch's softplus and exp
# against a table): the relative error of a state is about a hundred roundings of 2^-24, states and
# outputs are a few hundred steps of u at most.
SCAN_ERROR_STEPS = 1e-3

# Prepared against lowered end to end, in dB at weight and activation bits: one flipped code may
# spread through a deep network, so these are the project's goals and no derivation.
END_TO_END_PSNR = {8: 60.0, 4: 45.0, 2: 38.0}

# Score against the ground truth, simulated against integer, in dB: the project's goal as well.
TASK_PSNR = 0.02

# Two float32 results that differ in their last bit round to different bf16 numbers where they lie
# around a midpoint: 2^-15 of them, each by a unit of 2^-8. Relative to the norm of n elements at
# most sqrt(k / n) * 2^-8 for k flips; k = 3 of n >= 1000 covers the tests' sizes.
BF16_FLIPS = math.sqrt(3 / 1000) * 2.0**-8
