"""CPU kernel of `qmir::chain_quantize` (csrc/chain_quantize.cpp)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qmir_ao.backend.chain_layout import ACTIVATION_NUMBERS, STATISTICS_NUMBERS, lay_out
from qmir_ao.backend.cpu.binding import bind
from qmir_ao.backend.cpu.registration import cpu_kernel
from qmir_ao.ops._affine import code_dtype, non_finite
from qmir_ao.ops.chain_quantize import OP, ChainArgs, chain_quantize_ref, check_chain


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
    )
    shape = (ctypes.c_int64 * len(values))(*values)
    pointers = (None if t is None else t.data_ptr() for t in (*layout.operands, w, v))
    run = bind(lib, "qmir_chain_quantize", "ppppppppdppp", True)
    bad = run(
        *pointers, ctypes.addressof(shape), chain.norm_eps or 0.0,
        codes.data_ptr(), step.data_ptr(), shift.data_ptr(),
    )  # fmt: skip
    if bad >= 0:
        raise non_finite(OP, f"sample {bad} of x")
    return codes, step, shift
