"""CPU kernel of `qmir::chain_quantize` (csrc/chain_quantize.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.chain_layout import STATISTICS_NUMBERS, lay_out
from qmir_ao.backend.cpu.binding import bind
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._activations import ACTIVATION_NUMBERS
from qmir_ao.ops._affine import code_dtype, non_finite
from qmir_ao.ops.chain_quantize import OP, ChainArgs, chain_quantize_ref, check_chain

_NO_FEATURE = -2
"""What the kernel returns for a channel that is none of the features."""


@cpu_kernel(OP, chain_quantize_ref)
def _chain_quantize(lib: ctypes.CDLL, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    chain = ChainArgs(*args)
    check_chain(chain)
    layout = lay_out(chain)
    if layout is None:
        return chain_quantize_ref(*args)
    w, v = chain.scale_weights.contiguous(), chain.shift_weights.contiguous()
    codes = torch.empty(chain.size, dtype=code_dtype(chain.quant_max))
    step, shift = (torch.empty(chain.groups, dtype=torch.float32) for _ in range(2))
    features = 0 if chain.moments is None else chain.moments.shape[1]
    chosen = features if chain.moments_channels is None else chain.moments_channels.numel()
    values = (
        *layout.size,
        *layout.x_strides,
        *layout.gate_strides,
        layout.channels_first,
        STATISTICS_NUMBERS[chain.statistics],
        chain.norm_eps is not None,
        ACTIVATION_NUMBERS[chain.activation],
        ACTIVATION_NUMBERS[chain.gate_activation],
        *(chain.quant_min, chain.quant_max, chain.cap),
        *(chosen, features),
    )
    shape = (ctypes.c_int64 * len(values))(*values)
    given = [None if t is None else t.contiguous() for t in (chain.moments, chain.moments_channels)]
    operands = (*layout.operands, w, v, *given)
    pointers = (None if t is None else t.data_ptr() for t in operands)
    run = bind(lib, "qmir_chain_quantize", "ppppppppppdppp", True)
    bad = run(
        *pointers, ctypes.addressof(shape), chain.norm_eps or 0.0,
        codes.data_ptr(), step.data_ptr(), shift.data_ptr(),
    )  # fmt: skip
    if bad == _NO_FEATURE:
        raise IndexError(
            f"qmir::{OP}: moments_channels must be channels of moments, 0..{features - 1}, "
            f"got {chain.moments_channels}"
        )
    if bad >= 0:
        raise non_finite(OP, f"sample {bad} of x")
    return codes, step, shift
