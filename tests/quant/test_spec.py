"""Bit widths: what is accepted, what is refused, and with which message."""

import pytest

from qmir_ao.errors import ConfigError
from qmir_ao.quant.spec import check_bits, choose, code_range, container_bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_allowed_bits(bits):
    assert check_bits(bits) == bits
    assert code_range(bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert code_range(bits, signed=False) == (0, 2**bits - 1)


@pytest.mark.parametrize("bits", [0, 1, 9, -4, 3.5, 4.0, True, "4", None, [4]], ids=repr)
def test_refused_bits(bits):
    for call in (check_bits, code_range, container_bits):
        with pytest.raises(ConfigError, match="bits must be an integer from 2 to 8"):
            call(bits)


def test_containers():
    assert [container_bits(b) for b in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]


def test_choose_lists_what_is_allowed():
    assert choose("init", "mse", ("mse", "lsq")) == "mse"
    with pytest.raises(ConfigError, match=r"init='best' is unknown; allowed: 'mse', 'lsq'"):
        choose("init", "best", ("mse", "lsq"))
