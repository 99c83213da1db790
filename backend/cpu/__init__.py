"""CPU target: importing it registers the C++ kernels (compiled on first call)."""

import qmir_ao.backend.cpu.chain_quantize
import qmir_ao.backend.cpu.conv2d
import qmir_ao.backend.cpu.dls
import qmir_ao.backend.cpu.linear
import qmir_ao.backend.cpu.pack
import qmir_ao.backend.cpu.rfa
import qmir_ao.backend.cpu.selective_scan
import qmir_ao.backend.cpu.selective_scan_q
import qmir_ao.backend.cpu.ss2d_scan
import qmir_ao.backend.cpu.ss2d_scan_q  # noqa: F401
