"""JSON of an artefact, whose files are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gqsa_compiler.runtime.errors import ArtefactError

_MOST_BYTES = 100_000_000  # the manifest of a model of 1000 layers takes 3 MB


def read_json(path: Path, *, distinct: bool = False) -> Any:
    """Read a JSON file of at most 100 MB.

    Parameters
    ----------
    path : Path
    distinct : bool
        Refuse a key that stands twice in an object: readers differ on which one counts.

    Raises
    ------
    FileNotFoundError
        There is none.
    ArtefactError
        It is too large, or no JSON.

    """
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size} bytes, and at most {_MOST_BYTES} are read")
        return json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_distinct if distinct else None,
            parse_constant=_no_number,
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}.") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found


def _no_number(name: str) -> float:
    """Refuse NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is not JSON")
