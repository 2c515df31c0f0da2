"""The run log: one JSON object a line for every step that a compression has made.

It is what the report is drawn from. Work that is done again after a kill is in the log twice;
`read_log` keeps the later lines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gqsa_compiler.compress.work.atomic import no_space
from gqsa_compiler.compress.work.runevents import (
    Block,
    Calibration,
    Event,
    Finish,
    Phase,
    Resume,
    Start,
    Step,
    from_line,
    to_line,
)
from gqsa_compiler.errors import GqsaError
from gqsa_compiler.outdir import disk_full

LOG_FILE = "compression.jsonl"


@dataclass(frozen=True)
class RunRecord:
    """A run log without the work that was done again.

    Parameters
    ----------
    start : Start or None
    begun, ended : str
        Time of the first and the last line, UTC, ISO 8601; empty when there is none.
    resumed : tuple of Resume
    calibration : Calibration or None
    phases : tuple of Phase
        In the order they were done first.
    blocks : tuple of Block
        By index.
    steps : dict of str to tuple of Step
        By stage, in the order they ran; by step in each.
    finish : Finish or None
    unreadable : int
        Lines that were passed over: not JSON, or without a field they need.
    """

    start: Start | None = None
    begun: str = ""
    ended: str = ""
    resumed: tuple[Resume, ...] = ()
    calibration: Calibration | None = None
    phases: tuple[Phase, ...] = ()
    blocks: tuple[Block, ...] = ()
    steps: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    finish: Finish | None = None
    unreadable: int = 0


class RunLog:
    """Appends lines to a run log, each with the system when `write` returns.

    Parameters
    ----------
    path : Path
        Created if it is missing. A last line that a kill cut is removed.

    Raises
    ------
    GqsaError
        It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not a `with`: the object owns the file until `close`.
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._file.seek(0)
        self._size = self._file.read().rfind(b"\n") + 1
        self._file.truncate(self._size)

    def write(self, event: Event) -> None:
        """Append an event with its kind and the time.

        Raises
        ------
        GqsaError
            The disk is full, or the file cannot be written. The log is as it was.
        """
        data = to_line(event)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file.fileno(), data[written:])
        except BaseException as error:
            self._file.truncate(self._size)
            if isinstance(error, OSError):
                raise _cannot_write(self.path, error) from error
            raise
        self._size += len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_log(path: Path) -> RunRecord:
    """Read a run log, of a run that is under way too.

    A line of a block (or of a step of a stage) takes the place of that line and of the later ones
    of its kind, since a process that goes on does all of them again. Lines of other versions,
    with kinds that are not known here, are passed over.

    Raises
    ------
    GqsaError
        The file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GqsaError(f"Cannot read the run log {path}: {error.strerror or error}.") from error
    single: dict[type, Any] = {}
    resumed: list[Resume] = []
    phases: dict[str, Phase] = {}
    blocks: list[Block] = []
    steps: dict[str, list[Step]] = {}
    times: list[str] = []
    unreadable = 0
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            time, event = from_line(line)
        except (ValueError, OverflowError, RecursionError):
            unreadable += 1
            continue
        times.append(time)
        if isinstance(event, Resume):
            resumed.append(event)
        elif isinstance(event, Phase):
            phases[event.name] = event
        elif isinstance(event, Block):
            blocks = [*(b for b in blocks if b.index < event.index), event]
        elif isinstance(event, Step):
            stage = steps.setdefault(event.stage, [])
            while stage and stage[-1].step >= event.step:
                stage.pop()
            stage.append(event)
        elif event is not None:
            single[type(event)] = event
    return RunRecord(
        start=single.get(Start),
        begun=times[0] if times else "",
        ended=times[-1] if times else "",
        resumed=tuple(resumed),
        calibration=single.get(Calibration),
        phases=tuple(phases.values()),
        blocks=tuple(blocks),
        steps={stage: tuple(lines) for stage, lines in steps.items()},
        finish=single.get(Finish),
        unreadable=unreadable,
    )


def _cannot_write(path: Path, error: OSError) -> GqsaError:
    if disk_full(error):
        return no_space(path)
    return GqsaError(f"Cannot write the run log {path}: {error.strerror or error}.")
