"""Child processes that write lines of JSON, watched: what a crash belongs to, what hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS_A_CHILD, SECONDS_A_CASE = 60.0, 20.0
"""After so many and so many for each of its cases a child is taken for one that hangs."""
NO_TIME = "no time was left"
"""The reason of a case that was not begun, or not finished, within the time given."""


@dataclass
class Clock:
    """The time that is left.

    Parameters
    ----------
    seconds : float
        The budget.
    begin : float
        When it began, on `time.monotonic`.
    """

    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.begin + self.seconds - time.monotonic()


class Child:
    """A process that reads one JSON object and writes lines of JSON.

    Parameters
    ----------
    script : Path
        A Python program; it finds modules beside it and in ``lib`` there.
    order : object
        What it reads.
    log : Path
        Where its standard error goes.
    environment : mapping
        Variables in addition to this process's.
    """

    def __init__(
        self,
        script: Path,
        order: Any,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        home = script.resolve().parent
        paths = [str(home), str(home / "lib"), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=variables,
                text=True,
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already; its log says why
            self.process.stdin.write(json.dumps(order))
            self.process.stdin.close()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what it says; ends when it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        self.process.wait()

    def last_words(self) -> str:
        """Return the last line that it wrote to standard error."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def collect(child: Child, limit: float) -> tuple[list[dict[str, Any]], str | None]:
    """Read a child's results until it ends or `limit` seconds have passed.

    Returns
    -------
    results : list of dict
    unfinished : str or None
        The case that had begun and has no result.
    """
    timer = _Killer(child.process, limit)
    results: list[dict[str, Any]] = []
    begun: str | None = None
    for line in child.lines():
        if "begin" in line:
            begun = line["begin"]
        else:
            results.append(line)
            begun = None
    timer.cancel()
    return results, begun


class _Killer:
    """Kills a process after a while."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.timer = threading.Timer(max(1.0, seconds), process.kill)
        self.timer.daemon = True
        self.timer.start()

    def cancel(self) -> None:
        self.timer.cancel()


def run_group(
    order: Mapping[str, Any], script: Path, cases: Sequence[Sequence[Any]], log: Path, clock: Clock
) -> list[dict[str, Any]]:
    """Run a group's cases in child processes until every one has a result.

    A case at which a child dies is reported as ``crashed``, and a new child goes on with the rest.
    """
    left = {case_name(case): case for case in cases}
    results: list[dict[str, Any]] = []
    while left and clock.left > 0:
        limit = min(clock.left, SECONDS_A_CHILD + SECONDS_A_CASE * len(left))
        child = Child(script, {**order, "cases": list(left.values())}, log)
        found, unfinished = collect(child, limit)
        for result in found:
            left.pop(result["case"], None)
        results += found
        if clock.left <= 0:
            break
        if unfinished in left:
            how = f"the process ended with {child.process.returncode}: {child.last_words()}"
            results.append({"case": unfinished, "status": "crashed", "fault": how})
            left.pop(unfinished)
        elif not found:
            how = f"the process ended with {child.process.returncode}: {child.last_words()}"
            results += [{"case": name, "status": "failed", "fault": how} for name in left]
            break
    results += [
        {"case": name, "status": "skipped", "fault": NO_TIME}
        for name in left
        if name not in {result["case"] for result in results}
    ]
    return results


def case_name(case: Sequence[Any]) -> str:
    """Return a case in one word, as children name it."""
    return "|".join(str(part) for part in case)
