"""Reading a work directory, also one that belongs to another process."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gqsa_compiler.compress.work.statefile import Metadata, read_state
from gqsa_compiler.compress.work.worksettings import (
    SETTINGS_FILE,
    as_read,
    difference,
    read_settings,
)
from gqsa_compiler.errors import UsageError

STATE_SUFFIX = ".state.safetensors"

_STATE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class WorkReader:
    """The states of a compression that is under way, for reading.

    Attributes
    ----------
    path : Path
        The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of_other(cls, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> WorkReader:
        """Read the directory that another process of the same run has open.

        Parameters
        ----------
        path : path
        settings : mapping
            Those that this process was started with; JSON types.

        Raises
        ------
        UsageError
            It is not there, or the other process was started with other settings.
        """
        place = Path(os.path.realpath(path))
        file = place / SETTINGS_FILE
        if not file.exists():
            raise UsageError(
                f"There is no {place} as process 0 has it: all processes need the same file "
                "system. Put the output on one that all machines share."
            )
        different = difference(read_settings(file), as_read(settings))
        if different is not None:
            key, first, ours = different
            raise UsageError(
                f"The processes were started differently: {key} is {first} in process 0 and "
                f"{ours} in this one. Start all with the same command on the same kind of machine."
            )
        return cls(place)

    def has(self, name: str) -> bool:
        """Whether there is a state of this name."""
        return self._state_path(name).exists()

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Metadata]] | None:
        """Read a state into new CPU memory; None if there is none.

        Raises
        ------
        GqsaError
            The file is damaged or cannot be read. It is not passed over: a disk that loses data
            is something to know about, and which other states to trust is not ours to guess.
        """
        path = self._state_path(name)
        return read_state(path) if path.exists() else None

    def _state_path(self, name: str) -> Path:
        if not _STATE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a state")
        return self.path / f"{name}{STATE_SUFFIX}"
