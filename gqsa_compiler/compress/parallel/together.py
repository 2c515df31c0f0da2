"""One compression by several processes: who does what, when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gqsa_compiler.compress.parallel.distributed import LaunchedRanks, own_device
from gqsa_compiler.compress.parallel.launch import Launch
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.result import CompressReport, report_from_dict
from gqsa_compiler.compress.training.ranks import Ranks
from gqsa_compiler.errors import UsageError

REPORT = "report"


class Compression(Protocol):
    """One process's part."""

    def run(self) -> CompressReport:
        """Do all of it, as process 0; the end-to-end stages are announced to the others."""

    def join(self, message: Mapping[str, Any]) -> None:
        """Take part in the stage that process 0 has announced."""


Begin = Callable[[Ranks, str], Compression]
"""Makes a process's part, given its place and its device; checks the request."""


def compress_together(launch: Launch, device: str, recipe: Recipe, begin: Begin) -> CompressReport:
    """Compress in several processes; every one of them calls this and gets the report.

    The others check nothing before process 0 has: what is wrong is said once.

    Raises
    ------
    UsageError
        The recipe has nothing to share, or there is no device for this process.
    GqsaError
        A process has lost the others.
    """
    if recipe.weights is None and recipe.scales is None:
        raise UsageError(
            "Several processes share the end-to-end stages (weights, scales), of which this recipe "
            "has none: start one process, without a launcher."
        )
    own = own_device(device, launch)
    with LaunchedRanks(launch, own) as ranks:
        if not ranks.index:
            report = begin(ranks, str(own)).run()
            ranks.announce({REPORT: report.to_dict()})
            ranks.await_goodbyes()
            return report
        message = ranks.receive()
        if REPORT not in message:
            part = begin(ranks, str(own))
            while REPORT not in message:
                part.join(message)
                message = ranks.receive()
        ranks.say_goodbye()
        return report_from_dict(message[REPORT])
