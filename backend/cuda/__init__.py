"""CUDA target: importing it registers the kernels (compiled by NVRTC on first call)."""
