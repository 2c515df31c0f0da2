"""Whether this process is one of several, which `accelerate launch` or `torchrun` has started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from gqsa_compiler.errors import UsageError

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """One process of several.

    Parameters
    ----------
    index : int
        0 is the one that does all that is not shared.
    local_index : int
        The same on this machine: which GPU is its own.
    count : int
        At least 2.
    """

    index: int
    local_index: int
    count: int


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return this process's place among those started together; None if it is alone.

    Raises
    ------
    UsageError
        The launcher's variables make no sense.
    """
    if any(name not in environment for name in (*_NAMES, "MASTER_ADDR", "MASTER_PORT")):
        return None
    try:
        index, local, count = (int(environment[name]) for name in _NAMES)
    except ValueError:
        index, local, count = -1, -1, 0
    if not (0 <= index < count and 0 <= local < count):
        values = ", ".join(f"{name}={environment[name]}" for name in _NAMES)
        raise UsageError(
            f"The environment is that of a process of several, but wrong: {values}. Start with "
            "accelerate launch, or unset them."
        )
    return Launch(index, local, count) if count > 1 else None
