"""Whether this machine can run the CUDA kernels; asked before anything is lowered or loaded."""

import torch

from qmir_ao.backend.cuda.module import require_kernels
from qmir_ao.errors import DeviceError


def ready_device() -> torch.device:
    """The current CUDA device, after a look at driver, CuPy and architecture.

    Raises:
        DeviceError: what is missing, and how to get it.
    """
    if torch.version.cuda is None:
        raise DeviceError(
            f"target='cuda' needs a CUDA build of torch, this one is {torch.__version__}; install "
            "one (pip install torch), or use target='cpu'"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            "target='cuda' needs an NVIDIA GPU and its driver, torch finds none; see nvidia-smi, "
            "or use target='cpu'"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    require_kernels(device)
    return device
