"""Checks of the paths a user gives, before any work is done on them."""

from __future__ import annotations

import io
import os
from pathlib import Path

from gqsa_compiler.errors import UsageError
from gqsa_compiler.runtime.manifest import MANIFEST_FILE, is_artefact


def require_file(path: Path, option: str) -> None:
    """Raise `UsageError` unless an option names a file, or a pipe or device, that is there."""
    if path.is_dir() or not path.exists():
        what = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}; give {option} a text file.")


def read_text(path: Path, option: str, most_bytes: int = 1 << 30) -> str:
    """Read a UTF-8 text file that an option names; `UsageError` where it is none, or is larger."""
    require_file(path, option)
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UsageError(
            f"{path} has more than {most_bytes >> 20} MiB; give {option} a shorter text."
        )
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}); give {option} a text file."
        ) from None


def require_place(path: Path, option: str) -> None:
    """Raise `UsageError`, before any work, unless a file can be written where an option says."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        what = "is a directory"
    elif not above.is_dir():
        what = f"cannot be made, as {above} is a file"
    elif not os.access(path if path.exists() else above, os.W_OK):
        what = "cannot be written"
    else:
        return
    raise UsageError(f"{path} {what}; give {option} the name of a file to write.")


def require_utf8(text: str, what: str) -> str:
    """Return a text from the command line or standard input; `UsageError` if it was not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not UTF-8 text; convert it to UTF-8.") from None
    return text


def require_artefact(path: Path) -> None:
    """Raise `UsageError` unless a path is a compiled artefact; say what it is instead."""
    if is_artefact(path):
        return
    if not path.exists():
        raise UsageError(f"{path} does not exist; make an artefact with: gqsa compile MODEL -o DIR")
    raise UsageError(
        f"{path} is not a compiled artefact (it has no {MANIFEST_FILE}); "
        f"compile it first: gqsa compile {path} -o DIR"
    )
