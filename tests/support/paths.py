"""Where golden vectors and images lie when they are there; tests that need them skip otherwise."""

import os
from pathlib import Path

import pytest

_SHARED = Path(os.environ.get("QMIR_SHARED", Path(__file__).resolve().parents[3] / "shared"))
GOLDEN = _SHARED / "golden"
DATA = _SHARED / "data"

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the published code's golden vectors are not on this machine"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the image sets are not on this machine")
