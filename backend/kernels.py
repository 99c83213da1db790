"""Importing this registers the kernels of all devices; they are compiled on their first call."""

import qmir_ao.backend.cpu
import qmir_ao.backend.cuda  # noqa: F401
