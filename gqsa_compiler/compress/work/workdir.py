"""The work directory of a compression: what it needs to go on after it was killed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gqsa_compiler.compress.work.atomic import TEMPORARY_SUFFIX, replacing
from gqsa_compiler.compress.work.reader import STATE_SUFFIX, WorkReader
from gqsa_compiler.compress.work.runlog import LOG_FILE
from gqsa_compiler.compress.work.statefile import Metadata, write_state
from gqsa_compiler.compress.work.worklock import lock_directory
from gqsa_compiler.compress.work.worksettings import (
    DISCARDED_FILE,
    LOCK_FILE,
    SETTINGS_FILE,
    as_read,
    difference,
    read_settings,
    settings_text,
)
from gqsa_compiler.errors import GqsaError, UsageError

_OWN_FILES = frozenset({SETTINGS_FILE, DISCARDED_FILE, LOCK_FILE, LOG_FILE})


def work_path(output: str | os.PathLike[str]) -> Path:
    """Return where the work on `output` lies: ``<output>.work`` beside it, links followed."""
    final = Path(os.path.realpath(output))
    return final.with_name(f"{final.name}.work")


class WorkDirectory(WorkReader):
    """States of a compression that is under way, each in a safetensors file, and its run log.

    Made by `open`. A state appears whole or not at all, and is on the disk when `save` returns.
    Only one process can have a directory open.

    As a context manager it is closed at the end and kept, so that the same command goes on; one
    without any state is removed then, since there is nothing to go on from.

    Attributes
    ----------
    path : Path
        The directory, links followed.
    resumed : bool
        An earlier run left states here.
    """

    def __init__(self, path: Path, lock: int) -> None:
        super().__init__(path)
        self.resumed = False
        self._lock: int | None = lock

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], settings: Mapping[str, Any], *, restart: bool = False
    ) -> WorkDirectory:
        """Create a work directory, or go on with one that has the same settings.

        Parameters
        ----------
        path : path
            Usually `work_path` of the output. Missing parents are made.
        settings : mapping
            JSON types: all that determines the result. One that was begun with other settings
            but has no state yet is begun anew.
        restart : bool
            Discard what is there.

        Raises
        ------
        UsageError
            The directory was begun with other settings, is not a work directory (it is never
            deleted then), cannot be made, or another run uses it.
        GqsaError
            The disk is full.
        """
        place = Path(os.path.realpath(path))
        work = cls(place, lock_directory(place))
        try:
            work._begin(as_read(settings), restart)
        except BaseException:
            if not (place / SETTINGS_FILE).exists():  # they could not be written: nothing is here
                work.finish()
            work._unlock()
            raise
        return work

    @property
    def log_path(self) -> Path:
        """Where the run log is."""
        return self.path / LOG_FILE

    def names(self) -> list[str]:
        """Return the names of the states, sorted."""
        files = (entry.name for entry in self._entries() if entry.name.endswith(STATE_SUFFIX))
        return sorted(name.removesuffix(STATE_SUFFIX) for name in files)

    def save(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Metadata]
    ) -> None:
        """Save a state, in one step in place of an older one of the name.

        Parameters
        ----------
        name : str
            Letters, digits, ``-``, ``_`` and ``.``, e.g. ``block-003``.
        tensors : mapping of str to Tensor
            Of any device; they must not overlap in memory.
        metadata : mapping of str to str, int or float

        Raises
        ------
        GqsaError
            The disk is full, or the file cannot be written. The older state is still there.
        """
        with replacing(self._state_path(name)) as temporary:
            write_state(temporary, tensors, metadata)

    def remove(self, name: str) -> None:
        """Remove a state, if it is there."""
        self._state_path(name).unlink(missing_ok=True)

    def finish(self) -> tuple[Path, ...]:
        """Remove the directory: the output is in its place. Returns what stays of it.

        Returns
        -------
        tuple of Path
            Files that somebody else put there. They are left, and the directory with them.

        Raises
        ------
        GqsaError
            A file cannot be removed.
        """
        if self._lock is None:
            return ()
        try:
            self._discard()
            # The lock goes last, still held. Whoever waits for it sees that its name is gone.
            (self.path / LOCK_FILE).unlink(missing_ok=True)
            left = tuple(sorted(self._entries()))
            if not left:
                with suppress(OSError):  # another run makes it its own by now
                    self.path.rmdir()
            return left
        except OSError as error:
            raise GqsaError(
                f"{self.path} is not needed any more but cannot be removed "
                f"({error.strerror or error}); delete it yourself."
            ) from error
        finally:
            self._unlock()

    def close(self) -> None:
        """Let other runs open it. Without a state it is removed."""
        if self._lock is not None and not self.names():
            with suppress(GqsaError):  # an empty one is taken up by the next run
                self.finish()
        self._unlock()

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, settings: dict[str, Any], restart: bool) -> None:
        """Compare the settings that are there, or write them."""
        if (self.path / DISCARDED_FILE).exists():
            self._discard()
        path = self.path / SETTINGS_FILE
        if path.exists():
            self._compare(path, settings, restart)
        if path.exists():
            self._remove_temporaries()
            self.resumed = bool(self.names())
            return
        with replacing(path) as temporary:
            temporary.write_text(settings_text(settings), encoding="utf-8")

    def _compare(self, path: Path, settings: dict[str, Any], restart: bool) -> None:
        """Discard what was begun with other settings, if that loses nothing or is asked for."""
        if restart:
            self._discard()
            return
        different = difference(read_settings(path), settings)
        if different is None:
            return
        if self.names():
            key, before, now = different
            raise UsageError(
                f"{self.path} holds an unfinished compression with other settings: {key} was "
                f"{before} and is now {now}. Go on with the settings that it was begun with, or "
                "discard it and begin anew (--restart)."
            )
        self._discard()

    def _discard(self) -> None:
        """Remove all but the lock; a kill meanwhile leaves what the next `open` removes too."""
        with suppress(FileNotFoundError):
            (self.path / SETTINGS_FILE).rename(self.path / DISCARDED_FILE)
        self._remove_temporaries()
        for name in self.names():
            self.remove(name)
        self.log_path.unlink(missing_ok=True)
        (self.path / DISCARDED_FILE).unlink(missing_ok=True)

    def _remove_temporaries(self) -> None:
        for entry in self._entries():
            name = entry.name.removesuffix(TEMPORARY_SUFFIX)
            if name != entry.name and (name in _OWN_FILES or name.endswith(STATE_SUFFIX)):
                entry.unlink(missing_ok=True)

    def _entries(self) -> list[Path]:
        try:
            return list(self.path.iterdir())
        except FileNotFoundError:  # somebody deleted it
            return []

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
