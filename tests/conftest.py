"""Fixtures of all tests: fixed seeds, poisoned allocations, the hypothesis profile."""

import importlib.util
import os
import signal

import pytest
import torch

import qmir_ao.backend.cpu  # noqa: F401  (registers the CPU kernels)

# On a GPU machine `pytest tests/backend/cuda/test_gpu.py` must do without it.
if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    hypothesis.settings.register_profile(
        "qmir",
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "qmir"))

# A shell without job control starts background commands with Ctrl-C ignored, and their children
# would inherit that: the tests that press it need it to work.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_EMPTY = torch.empty
_EMPTY_LIKE = torch.empty_like


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not tensor.is_sparse:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh buffers with NaN or the largest integer: a kernel that skips one is seen."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(_EMPTY(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(_EMPTY_LIKE(*a, **k)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
