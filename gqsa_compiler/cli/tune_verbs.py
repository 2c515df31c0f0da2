"""`gqsa tune`: a session, and the verbs that look after its database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from gqsa_compiler.cli.tune import tune
from gqsa_compiler.cli.tune_bundle import export, import_
from gqsa_compiler.cli.tune_records import best, merge, prune, show

SESSION = "model"
"""The verb that `gqsa tune MODEL` stands for; a model of a verb's name is ``./show``."""
VERBS: dict[str, Callable[..., None]] = {
    SESSION: tune,
    "show": show,
    "best": best,
    "merge": merge,
    "prune": prune,
    "export": export,
    "import": import_,
}


class TuneGroup(TyperGroup):
    """Takes what is no verb for the MODEL of a session."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the session's verb in front where there is none."""
        if not args or args[0] not in {*self.commands, "--help"}:
            args = [SESSION, *args]
        return super().parse_args(ctx, args)


def make_tune_app() -> typer.Typer:
    """Build the command line of `gqsa tune`."""
    app = typer.Typer(
        cls=TuneGroup,
        help="Tune MODEL's kernels for a machine (gqsa tune MODEL; its options: gqsa tune model "
        "--help), and look after databases of what was measured.",
    )
    for name, verb in VERBS.items():
        app.command(name)(verb)
    return app
