"""The command lines: a list of verbs, and what happens to errors outside of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from gqsa_compiler.cli.bench import bench
from gqsa_compiler.cli.chat import chat
from gqsa_compiler.cli.command import EXIT_USAGE, report_error, say_error
from gqsa_compiler.cli.compile import compile_
from gqsa_compiler.cli.compress import compress
from gqsa_compiler.cli.convert import convert
from gqsa_compiler.cli.eval import eval_
from gqsa_compiler.cli.export import export
from gqsa_compiler.cli.inspect import inspect
from gqsa_compiler.cli.native import native
from gqsa_compiler.cli.run import run
from gqsa_compiler.cli.signals import SIGNAL_BASE, Stopped, stop_signals
from gqsa_compiler.cli.tune_verbs import make_tune_app

VERBS: dict[str, Callable[..., None]] = {
    "compress": compress,
    "compile": compile_,
    "run": run,
    "chat": chat,
    "eval": eval_,
    "bench": bench,
    "inspect": inspect,
    "convert": convert,
    "export": export,
    "native": native,
}


TUNE = "tune"
"""The verb that has verbs of its own."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"gqsa {version('gqsa-compiler')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Compress, compile and run large language models with group sparsity and 4-bit weights."""


def make_app() -> typer.Typer:
    """Build the command line of `gqsa`."""
    app = typer.Typer(
        name="gqsa", pretty_exceptions_enable=False, context_settings={"max_content_width": 100}
    )
    app.callback()(_root)
    for name, verb in VERBS.items():
        app.command(name)(verb)
    app.add_typer(make_tune_app(), name=TUNE)
    return app


def make_compile_app() -> typer.Typer:
    """Build the command line of `gqsa-compile`, the alias of `gqsa compile`."""
    app = typer.Typer(name="gqsa-compile", pretty_exceptions_enable=False)
    app.command()(compile_)
    return app


def call(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run a command line and return the exit code; errors outside of the verbs are said here."""
    with stop_signals() as stop:
        try:
            # Not click's standalone mode: it frames usage errors in a box of several lines.
            code = app(args=list(arguments), prog_name=name, standalone_mode=False)
            sys.stdout.flush()
            if stop.number is not None and not stop.said and code == SIGNAL_BASE + stop.number:
                return report_error(Stopped(stop.number), stop)  # typer only made a code of it
        except (Exception, SystemExit, KeyboardInterrupt, Stopped) as error:
            # click's usage errors have no public name in typer; each says it in `format_message`.
            if not hasattr(error, "format_message"):
                return report_error(error, stop, "--verbose" in arguments)
            verbs = {*VERBS, TUNE}
            verb = [word for word in arguments[:1] if word in verbs and name == "gqsa"]
            say_error(f"{error.format_message()} (Try: {' '.join([name, *verb, '--help'])})")
            return EXIT_USAGE
    return code if isinstance(code, int) else 0
