"""The frame of every verb: what it raises becomes one message and an exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from gqsa_compiler.cli.signals import SIGNAL_BASE, Stop, Stopped, stop_message, stop_signals
from gqsa_compiler.errors import GqsaError, out_of_memory
from gqsa_compiler.outdir import disk_full

EXIT_FAILURE = 1
EXIT_USAGE = 2

Verb = TypeVar("Verb", bound=Callable[..., None])


def _quiet_libraries() -> None:
    """Keep other libraries' chatter out of the output; the user can still ask for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for module in ("torch", "transformers", "huggingface_hub", "numpy"):
        warnings.filterwarnings("ignore", module=module)


def say_error(message: str) -> None:
    """Print an error on standard error, in red on a terminal."""
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(" ".join(message.split()), err=True)


def _drop_stdout() -> None:
    """Point standard output at nothing, so that the last flush at exit cannot fail again."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.close(sink)


def _broken_pipe(error: BaseException) -> bool:
    """Tell whether a reader is gone; click and rich make a `SystemExit` of that."""
    return isinstance(error, BrokenPipeError) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    )


def describe(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code that an error ends a verb with.

    Parameters
    ----------
    error : BaseException
        What the verb raised.

    Returns
    -------
    tuple of str and int
        One or two sentences, and 1 for a failure, 2 for bad usage, 128 + n for a signal n.
    """
    if isinstance(error, GqsaError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        error = Stopped(signal.SIGINT)
    if isinstance(error, Stopped):
        return stop_message(error.number), SIGNAL_BASE + error.number
    if disk_full(error):
        file = getattr(error, "filename", None)
        where = f" while writing {file}" if file else ""
        return (
            f"No space left on the disk{where}; free some, or write elsewhere.",
            EXIT_FAILURE,
        )
    if out_of_memory(error):
        detail = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return (
            f"Not enough memory{detail}; free some, use a machine with more, or a smaller "
            "--context where the verb has it.",
            EXIT_FAILURE,
        )
    if isinstance(error, OSError) and error.strerror:
        about = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{about}.", EXIT_FAILURE
    lines = str(error).strip().splitlines()
    last = lines[-1] if lines else "no message"
    return (
        f"Unexpected {type(error).__name__}: {last} (run again with --verbose for the traceback).",
        EXIT_FAILURE,
    )


def report_error(error: BaseException, stop: Stop, verbose: bool = False) -> int:
    """Say on standard error what an error means and return the exit code.

    Parameters
    ----------
    error : BaseException
        What was raised.
    stop : Stop
        If a signal asked the program to end, that is the cause, whatever its exception became on
        its way.
    verbose : bool
        Print the traceback too.

    Returns
    -------
    int
        As `describe`; that of SIGPIPE, and nothing is said, if the reader of a pipe is gone.
    """
    if stop.number is None and _broken_pipe(error):
        # The reader of a pipe went away (`gqsa run ... | head`): end as SIGPIPE would.
        _drop_stdout()
        return SIGNAL_BASE + signal.SIGPIPE
    if verbose:
        traceback.print_exception(error)
    message, code = describe(error if stop.number is None else Stopped(stop.number))
    stop.said = True
    say_error(message)
    try:
        sys.stdout.flush()
    except OSError:
        # A full disk: Python would try once more at its exit and change the exit code.
        _drop_stdout()
    return code


def command(function: Verb) -> Verb:
    """Wrap a verb: errors become one message and an exit code, with no traceback.

    The verb's own ``verbose`` argument asks for the traceback too.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        _quiet_libraries()
        with stop_signals() as stop:
            try:
                function(*args, **kwargs)
                sys.stdout.flush()
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt, Stopped) as error:
                verbose = bool(kwargs.get("verbose"))
                raise typer.Exit(report_error(error, stop, verbose)) from None

    return wrapper  # type: ignore[return-value]
