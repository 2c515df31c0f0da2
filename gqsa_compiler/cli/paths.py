"""Checks of the paths a user gives, before any work is done on them."""

from __future__ import annotations

from pathlib import Path

from gqsa_compiler.errors import UsageError
from gqsa_compiler.runtime.manifest import MANIFEST_FILE, is_artefact


def require_file(path: Path, option: str) -> None:
    """Raise `UsageError` unless an option names a file, or a pipe or device, that is there."""
    if path.is_dir() or not path.exists():
        what = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise UsageError(f"{path} {what}; give {option} a text file.")


def read_text(path: Path, option: str) -> str:
    """Read a UTF-8 text file that an option names; `UsageError` where it is none."""
    require_file(path, option)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}); give {option} a text file."
        ) from None


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
