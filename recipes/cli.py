"""The command `qmir`.

Exit codes: 0 done, 1 failed while running, 2 bad input or usage, 130 interrupted, 143 told to end.
Torch is imported by the command that needs it, so that `qmir --help` answers at once.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from qmir_ao import __version__
from qmir_ao.errors import CheckpointError, ConfigError, ImageError
from qmir_ao.recipes.commands.analyze import analyze
from qmir_ao.recipes.commands.demo import demo
from qmir_ao.recipes.commands.doctor import doctor
from qmir_ao.recipes.commands.evaluate import evaluate
from qmir_ao.recipes.commands.info import info
from qmir_ao.recipes.commands.quantize import quantize
from qmir_ao.recipes.commands.recipes import recipes
from qmir_ao.recipes.commands.reproduce import reproduce
from qmir_ao.recipes.commands.restore import restore
from qmir_ao.recipes.commands.run import run
from qmir_ao.recipes.commands.train import train
from qmir_ao.recipes.console import ERR, set_verbosity

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
BAD_INPUT_ERRORS = (
    ConfigError,
    CheckpointError,
    ImageError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)

app = typer.Typer(
    name="qmir",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(train)
app.command()(quantize)
app.command("eval")(evaluate)
app.command()(restore)
app.command()(recipes)
app.command()(run)
app.command()(reproduce)
app.command()(info)
app.command()(analyze)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qmir_ao {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show log messages and full tracebacks.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bars and no warnings.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Version.")
    ] = False,
) -> None:
    """Train image-restoration networks at 2 to 8 bits and run them in integers."""
    set_verbosity(verbose, quiet)


def _explain(error: BaseException) -> None:
    """Print what went wrong on stderr; the traceback only with -v."""
    if logging.getLogger("qmir_ao").isEnabledFor(logging.DEBUG):
        ERR.print_exception()
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # Written as it is: rich would read [brackets] in a message as markup and wrap long paths.
    sys.stderr.write(f"error: {text}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `qmir` and return its exit code.

    Args:
        arguments: command line without the program name; that of the process by default.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="qmir")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BAD_INPUT_ERRORS as error:
        _explain(error)
        return BAD_INPUT
    except Exception as error:
        _explain(error)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
