"""`qmir doctor`: does this installation work, and what is missing?"""

from dataclasses import asdict

import typer

from qmir_ao.recipes.commands import options
from qmir_ao.recipes.console import OUT, emit_json, status

MARKS = {"ok": "[green]ok[/]", "missing": "[yellow]--[/]", "broken": "[red]!![/]"}


def doctor(as_json: options.AsJson = False) -> None:
    """Check versions, compiler, kernels, GPU and optional packages."""
    with status("looking; the first run compiles the kernels"):
        from rich.markup import escape
        from rich.table import Table

        from qmir_ao.recipes.diagnose import diagnose

        checks = diagnose()
    healthy = all(check.state != "broken" for check in checks)
    if as_json:
        emit_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in checks:
            table.add_row(MARKS[check.state], check.name, escape(check.detail))
        OUT.print(table)
        OUT.print("Everything needed is there." if healthy else "[red]Something is broken.[/]")
    if not healthy:
        raise typer.Exit(1)
