"""CUDA target: importing it registers the kernels (compiled by NVRTC on first call)."""

import qmir_ao.backend.cuda.chain_quantize
import qmir_ao.backend.cuda.conv2d
import qmir_ao.backend.cuda.dls
import qmir_ao.backend.cuda.dls_fake_quant
import qmir_ao.backend.cuda.linear
import qmir_ao.backend.cuda.pack
import qmir_ao.backend.cuda.rfa_fake_quant
import qmir_ao.backend.cuda.selective_scan
import qmir_ao.backend.cuda.selective_scan_q
import qmir_ao.backend.cuda.ss2d_scan
import qmir_ao.backend.cuda.ss2d_scan_q  # noqa: F401
