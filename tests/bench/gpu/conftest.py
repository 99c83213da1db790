"""The table of this run: a file that every measurement rewrites, shown at the end."""

from pathlib import Path
from typing import Any

import pytest
from support.gpu_rows.table import Table

TABLE = Table(Path(__file__).resolve().parents[3] / ".benchmarks" / "gpu.md")


@pytest.fixture
def table() -> Table:
    """Where measurements go."""
    return TABLE


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table, ready for docs/performance.md."""
    if TABLE.measured:
        terminalreporter.section(f"written to {TABLE.path}")
        terminalreporter.write_line(TABLE.text())
