"""What the command line prints: results on stdout, everything else on stderr."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from qmir_ao.recipes.distributed import is_main

OUT = Console(highlight=False)
ERR = Console(stderr=True, highlight=False)
LOGGERS = ("qmir_ao", "lightning", "lightning.pytorch")

Report = Callable[[int, int], None]


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """Route log records to stderr: warnings by default, everything of ours with `verbose`."""
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    handler = RichHandler(console=ERR, show_path=False, show_time=False)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level)
    # Every rank of a torchrun has the same to say; log records come from all of them.
    ERR.quiet, OUT.quiet = quiet or not is_main(), not is_main()


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Show a progress bar on stderr while the block runs.

    Args:
        label: what is being done.

    Yields:
        A callback `(done, total)`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR, disable=ERR.quiet) as bars:
        task = bars.add_task(label, total=None)

        def report(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield report
        if bars.tasks[task].total is None:
            bars.update(task, completed=1, total=1)


@contextmanager
def status(label: str) -> Iterator[None]:
    """Show a spinner on stderr while the block runs, for work without countable parts."""
    if ERR.quiet:
        yield
        return
    with ERR.status(label):
        yield


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    if OUT.quiet:
        return
    OUT.file.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    OUT.file.flush()


def emit_text(text: str) -> None:
    """Print text on stdout as it is: a path in it can be copied, however narrow the window."""
    OUT.print(text, markup=False, soft_wrap=True)


def emit_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; the first column is text, the others are numbers."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    OUT.print(table)


def emit_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values on stdout, one per line."""
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    OUT.print(table)
