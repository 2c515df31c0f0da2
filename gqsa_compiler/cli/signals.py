"""Signals that end a verb, and the exit code they end it with.

This module and `main` import nothing outside the standard library, so that the handlers are in
place before anything slow is imported.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

SIGNAL_BASE = 128
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RETRY_SECONDS = 0.02
_C_IMPORTS = (ExtensionFileLoader.create_module.__code__, ExtensionFileLoader.exec_module.__code__)


class Stopped(BaseException):
    """A signal asked the process to end; raised so that half-written outputs are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stop:
    """Which signal asked the verb to end.

    The number is kept because the exception may not arrive as it was raised: TVM turns whatever
    is raised in a Python callback into a RuntimeError.

    Attributes
    ----------
    number : int or None
        The first signal; None as long as there was none.
    said : bool
        The user has been told of it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.said = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: raise `KeyboardInterrupt` for SIGINT, `Stopped` for the others."""
        if number == signal.SIGALRM and self.number is not None:
            number = self.number
        self.number = self.number or number
        if _imports_c(frame):
            # C code that is loading prints what is raised in it and raises an ImportError.
            signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(number)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let SIGTERM and SIGHUP end a block as Ctrl-C does, and tell which signal it was.

    Signals that are ignored (nohup) stay ignored. Inside another such block it is that block's
    `Stop` that is given.
    """
    outer = getattr(signal.getsignal(signal.SIGALRM), "__self__", None)
    if isinstance(outer, Stop):
        yield outer
        return
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous: dict[signal.Signals, Any] = {}
    for number in (*_NUMBERS, signal.SIGALRM):
        found = signal.getsignal(number)
        if found in (signal.SIG_DFL, signal.default_int_handler) or number == signal.SIGALRM:
            previous[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for key, handler in previous.items():
            signal.signal(key, handler)


@contextmanager
def own_ctrl_c() -> Iterator[None]:
    """Leave Ctrl-C to a block that catches `KeyboardInterrupt` and goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def stop_message(number: int) -> str:
    """Say that a signal ended the verb."""
    if number == signal.SIGINT:
        return "Interrupted."
    return f"Stopped by {signal.Signals(number).name}."


def _imports_c(frame: FrameType | None) -> bool:
    """Tell whether a C extension is being loaded somewhere up the stack."""
    while frame is not None:
        if frame.f_code in _C_IMPORTS:
            return True
        frame = frame.f_back
    return False
