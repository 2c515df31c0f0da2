"""Run work that cannot be interrupted in a child process that can be killed."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from gqsa_compiler.errors import CompileError, GqsaError

_WAKE_SECONDS = 0.2


def run_in_child(work: Callable[[], None], what: str) -> None:
    """Run `work` in a forked child and wait for it.

    LLVM takes tens of seconds without a look at signals, and ends its process when the disk is
    full. In a child neither matters: Ctrl-C takes effect at once, and what the parent has to
    clean up is cleaned up. `work` leaves its results in files.

    Parameters
    ----------
    work : callable
        Must not need threads that the parent has started.
    what : str
        Names the work in the error.

    Raises
    ------
    CompileError
        `work` raised (with its message), or the child died.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            code = _child(work, writer)
        finally:
            os._exit(code)  # whatever was raised: the parent's clean-up may not run here
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            # Waking up now and then: a signal that another thread received waits for this one.
            while not select.select([pipe], [], [], _WAKE_SECONDS)[0]:
                pass
            message = pipe.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    code = os.waitstatus_to_exitcode(status)
    if message:
        raise CompileError(message)
    if code != 0:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise CompileError(f"{what} ended early ({how}); what it printed above says why.")


def _child(work: Callable[[], None], writer: int) -> int:
    """Do the work and report the exception; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # Ctrl-C goes to the whole terminal's group; the parent decides what becomes of the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work()
    except GqsaError as error:
        _report(writer, str(error))
    except BaseException as error:
        _report(writer, f"{type(error).__name__}: {error}")
        with suppress(OSError, ValueError):
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    return 0


def _report(writer: int, message: str) -> None:
    # The names of files in it may be no text.
    os.write(writer, message.encode(errors="replace"))
