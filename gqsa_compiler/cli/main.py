"""The programs `gqsa` and `gqsa-compile`.

What they do lies in `app`, which is imported when the signals' handlers are in place.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from gqsa_compiler.cli.signals import SIGNAL_BASE, Stopped, stop_message, stop_signals

_EXIT_FAILURE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gqsa`.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after the program's name; those of the process by default.

    Returns
    -------
    int
        The exit code: 0, 1 for a failure, 2 for bad usage, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        from gqsa_compiler.cli.app import call, make_app

        code = call(make_app(), "gqsa", words or ["--help"])
        return code if words else max(code, _EXIT_FAILURE)

    return _guard(run)


def main_compile(arguments: Sequence[str] | None = None) -> int:
    """Run `gqsa-compile`; see `main`."""
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        from gqsa_compiler.cli.app import call, make_compile_app

        return call(make_compile_app(), "gqsa-compile", words)

    return _guard(run)


def _guard(run: Callable[[], int]) -> int:
    _prepare_streams()
    with stop_signals() as stop:
        try:
            return run()
        except (Exception, KeyboardInterrupt, Stopped):
            if stop.number is None:
                raise
            # It came before the program could report it: while its modules were imported.
            print(f"error: {stop_message(stop.number)}", file=sys.stderr)
            return SIGNAL_BASE + stop.number


def _prepare_streams() -> None:
    """Open what the caller has closed (`gqsa ... <&-`), and read standard input as UTF-8.

    Bytes that are no UTF-8 become lone surrogates, as in the program's arguments, and are
    refused where text is needed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is the stream's own: later files must not get it.
            number = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


if __name__ == "__main__":  # `accelerate launch -m gqsa_compiler.cli.main`
    sys.exit(main())
