"""CUDA target: importing it registers the kernels (compiled by NVRTC on first call)."""

import qmir_ao.backend.cuda.dls_fake_quant
import qmir_ao.backend.cuda.rfa_fake_quant  # noqa: F401
