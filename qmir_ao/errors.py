"""Exceptions of qmir_ao: one base class, so that callers can catch everything we raise on purpose.

Every message says what was got, what is allowed, where, and how to fix it.
"""


class QmirError(Exception):
    """Base class of every error that qmir_ao raises on purpose."""


class ConfigError(QmirError, ValueError):
    """A setting is out of its allowed range (bits, preset, placement, target, recipe key)."""


class CaptureError(QmirError, RuntimeError):
    """A model could not be traced or exported."""


class UnsupportedGraph(QmirError, RuntimeError):
    """A captured graph holds nothing to quantize, or something that cannot be lowered."""


class PassOrderError(QmirError, RuntimeError):
    """A pass ran before what it requires, or left a malformed graph behind."""


class NonFiniteError(QmirError, ValueError):
    """An activation holds NaN or infinity, so no quantization step exists for it."""


class CheckpointError(QmirError, ValueError):
    """A file with weights or a lowered model is of another architecture, damaged or hostile."""


class ImageError(QmirError, ValueError):
    """An image file cannot be read safely (truncated, not an image, over the pixel limit)."""


class DeviceError(QmirError, RuntimeError):
    """A device cannot run a kernel: driver, package, architecture, memory or tensors are wrong."""


class DeviceSizeError(QmirError, OverflowError):
    """Operands are larger than a kernel can count, or need more blocks than a device starts."""


class DeviceMemoryError(QmirError, MemoryError):
    """The memory of a device is too small for an operator."""
