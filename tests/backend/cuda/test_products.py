"""The integer kernels multiply on tensor cores: 4-bit operands on Orin, 8-bit ones on Hopper."""

import pytest
from support.nvrtc import compile_text, needs_nvrtc

from qmir_ao.backend.cuda import sources

pytestmark = needs_nvrtc

NARROW, WIDE = "IMMA.16864.S4.S4", "IMMA.16832.S8.S8"
KERNELS = {"qlinear": "qmir_linear", "qconv2d": "qmir_conv2d"}


@pytest.mark.parametrize("source", KERNELS)
def test_tensor_core_instructions(source: str) -> None:
    for architecture, has_narrow in (("sm_87", True), ("sm_90", False)):
        code = compile_text("12.6", sources.read(source), architecture).sass()
        for kind in ("", "_kept", "_acc"):
            nibbles, whole = (code[f"{KERNELS[source]}{kind}_w{bits}"] for bits in (4, 8))
            # Activations may still need 8 bits.
            assert (NARROW in nibbles) is has_narrow and WIDE in nibbles
            assert WIDE in whole and NARROW not in whole
