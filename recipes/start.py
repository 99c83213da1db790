"""Entry point of `qmir` that says what to install where the command line's packages are missing."""

import sys

MISSING = 2
"""Exit code, as for other wrong usage."""


def main() -> int:
    """Run `qmir` on the command line of this process and return its exit code."""
    try:
        from qmir_ao.recipes.cli import main as run
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "qmir_ao"):
            raise
        fix = "pip install 'qmir-ao[recipes]'"
        sys.stderr.write(f"error: qmir needs {name}, which is missing; {fix}\n")
        return MISSING
    return run()
