"""The frame of every verb: what it raises becomes one message and an exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import typer

from gqsa_compiler.errors import GqsaError
from gqsa_compiler.outdir import disk_full

EXIT_FAILURE = 1
EXIT_USAGE = 2
_SIGNAL_BASE = 128

Verb = TypeVar("Verb", bound=Callable[..., None])


class Stopped(BaseException):
    """A signal asked the process to end; raised so that half-written outputs are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the verb as Ctrl-C does, unless they are ignored (nohup)."""
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _raise_stopped)
    try:
        yield
    finally:
        for key, handler in previous.items():
            signal.signal(key, handler)


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
        return "Interrupted.", _SIGNAL_BASE + signal.SIGINT
    if isinstance(error, Stopped):
        name = signal.Signals(error.number).name
        return f"Stopped by {name}.", _SIGNAL_BASE + error.number
    if disk_full(error):
        file = getattr(error, "filename", None)
        where = f" while writing {file}" if file else ""
        return (
            f"No space left on the disk{where}; free some, or write elsewhere.",
            EXIT_FAILURE,
        )
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return (
            f"Not enough memory{detail}; use a smaller --context, or a machine with more.",
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


def report_error(error: BaseException, verbose: bool = False) -> int:
    """Say on standard error what an error means and return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe went away (`gqsa run ... | head`): end as SIGPIPE would.
        _drop_stdout()
        return _SIGNAL_BASE + signal.SIGPIPE
    if verbose:
        traceback.print_exception(error)
    message, code = describe(error)
    say_error(message)
    return code


def command(function: Verb) -> Verb:
    """Wrap a verb: errors become one message and an exit code, with no traceback.

    The verb's own ``verbose`` argument asks for the traceback too.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        _quiet_libraries()
        try:
            with _stop_signals():
                function(*args, **kwargs)
                sys.stdout.flush()
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt, Stopped) as error:
            raise typer.Exit(report_error(error, bool(kwargs.get("verbose")))) from None

    return wrapper  # type: ignore[return-value]
