"""The settings file of a work directory: what a compression was begun with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gqsa_compiler.compress.work.atomic import TEMPORARY_SUFFIX
from gqsa_compiler.errors import UsageError

FORMAT = "gqsa-compression-work"
VERSION = 1

SETTINGS_FILE = "settings.json"
DISCARDED_FILE = "discarded.json"
"""The settings' name while the rest is being removed: a kill then cannot leave half a state."""
LOCK_FILE = "lock"

_BEFORE_SETTINGS = frozenset({LOCK_FILE, SETTINGS_FILE + TEMPORARY_SUFFIX})
_SHOWN_CHARACTERS = 60
_MISSING = object()


def as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as they come back from the file: tuples are lists there."""
    found: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return found


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return the settings file's content."""
    content = {"format": FORMAT, "version": VERSION, "settings": dict(settings)}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def check_own(path: Path) -> None:
    """Check that a directory is a work directory, or as empty as one that was just made.

    Raises
    ------
    UsageError
        It is somebody else's.
    """
    names = {entry.name for entry in path.iterdir()}
    if SETTINGS_FILE in names:
        _read_own(path / SETTINGS_FILE)
    elif DISCARDED_FILE in names:
        _read_own(path / DISCARDED_FILE)
    elif not names <= _BEFORE_SETTINGS:
        raise _foreign(path)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a settings file.

    Raises
    ------
    UsageError
        It is not one, or of another version.
    """
    content = _read_own(path)
    settings = content.get("settings")
    if content.get("version") != VERSION or not isinstance(settings, dict):
        raise UsageError(
            f"{path.parent} was begun by another version of this program (its format is "
            f"{content.get('version')}, this program's is {VERSION}). Go on with that version, or "
            "discard it and begin anew (--restart)."
        )
    return settings


def difference(before: Any, now: Any, key: str = "") -> tuple[str, str, str] | None:
    """Compare two JSON values.

    Returns
    -------
    (str, str, str) or None
        The first setting that differs, with dots between nested names, and both values as text.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*now, *(name for name in before if name not in now)]:
            inner = f"{key}.{name}" if key else name
            found = difference(before.get(name, _MISSING), now.get(name, _MISSING), inner)
            if found is not None:
                return found
        return None
    # True == 1, but the two are not the same setting.
    if before == now and isinstance(before, bool) == isinstance(now, bool):
        return None
    return key, _shown(before), _shown(now)


def _read_own(path: Path) -> dict[str, Any]:
    """Return the content of a work directory's settings file, whatever its version."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _foreign(path.parent)
    return content


def _foreign(path: Path) -> UsageError:
    """Say that a directory is somebody else's."""
    return UsageError(
        f"{path}, where the unfinished work goes, exists and is not a work directory of gqsa "
        "compress. Move it away or delete it yourself, or choose another output."
    )


def _shown(value: Any) -> str:
    text = "not set" if value is _MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
