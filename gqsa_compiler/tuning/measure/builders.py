"""Processes that make candidates' code while others are measured.

Each is a Python of its own, not a fork of this one: by then this one has threads. It reads requests
and writes answers, one JSON object a line, and ends when this process does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from gqsa_compiler.errors import GqsaError
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.schedules.table import rules_for
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.lookup import config_fields, space_by_key
from gqsa_compiler.tuning.measure.code import BuildError, make_code
from gqsa_compiler.tuning.measure.workspace import KERNEL, Workspace
from gqsa_compiler.tuning.records import config_key


class BuilderPool:
    """Builder processes, each started when it is first needed.

    Parameters
    ----------
    count : int
        Most at once.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self._all: list[subprocess.Popen[bytes]] = []
        self._closed = False
        self._lock = threading.Lock()

    def build(self, work: Workspace, config: KernelConfig, folder: Path) -> None:
        """Make a candidate's code in its folder; any thread may call it.

        Raises
        ------
        BuildError
            It cannot be made, or the process has ended.
        """
        case = work.case
        request = {
            "rule": case.task.rule.name,
            "spec": case.spec.to_json(),
            "config": config_fields(config),
            "target": asdict(work.target),
            "path": str(folder / KERNEL),
            "seconds": work.limits.build_seconds,
        }
        process = self._idle.get()
        try:
            if process is None or process.poll() is not None:
                process = self._start()
            error = _ask(process, request)
        finally:
            self._idle.put(process)
        if error:
            raise BuildError(error)

    def close(self) -> None:
        """End all processes, whatever they are at."""
        with self._lock:
            self._closed = True
            ending, self._all = self._all, []
        for process in ending:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise BuildError("The builders were ended.")
            # A group of its own: Ctrl-C is the session's, and its children end with it.
            process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            self._all.append(process)
            return process


def _ask(process: subprocess.Popen[bytes], request: dict[str, Any]) -> str:
    """Have a request done; returns what went wrong."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        return str(json.loads(answer)["error"]) if answer else "The builder process has ended."
    except (OSError, ValueError) as error:
        return f"The builder process has ended: {error}."


def _rule(name: str, target: TargetSpec) -> ScheduleRule[Any]:
    found = [rule for rule in rules_for(target) if rule.name == name]
    if not found:
        raise BuildError(f"Target {target.name} has no rule {name}.")
    return found[0]


def serve(requests: Iterable[str], answers: TextIO) -> None:
    """Answer requests until there are no more."""
    for line in requests:
        request = json.loads(line)
        fields = request["target"]
        target = TargetSpec(**{**fields, "features": tuple(fields["features"])})
        error = ""
        try:
            rule, spec = _rule(request["rule"], target), LinearSpec.from_json(request["spec"])
            config = space_by_key(rule, spec, target)[config_key(request["config"])]
            make_code(rule, spec, config, target, Path(request["path"]), request["seconds"])
        except GqsaError as found:
            error = str(found) or type(found).__name__
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()


def main() -> None:
    """Serve on the standard streams; what else is printed goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
