"""CPU target: importing it registers the C++ kernels (compiled on first call)."""

import qmir_ao.backend.cpu.selective_scan  # noqa: F401
