"""Every tolerance of the test suite, with where it comes from.

A test that misses its tolerance is fixed in the code, not here; changing a row needs a derivation.
"""

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

# A float kernel may be this much worse than plain float32 torch, both measured against float64.
KERNEL_VS_REFERENCE = 2.0
