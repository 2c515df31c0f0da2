"""Write a file of a work directory in one step, and for good."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gqsa_compiler.errors import GqsaError
from gqsa_compiler.outdir import disk_full

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write, which then takes the name `path` and is on the disk.

    On an exception, and when the process is killed, what was at `path` is still there.

    Raises
    ------
    GqsaError
        The disk is full, or the file cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, Exception) and disk_full(error):
            raise no_space(path) from error
        if isinstance(error, OSError):
            raise GqsaError(f"Cannot write {path}: {error.strerror or error}.") from error
        raise


def no_space(path: Path) -> GqsaError:
    """Say that a file of a work directory did not fit on the disk."""
    return GqsaError(
        f"No space left on the disk of {path.parent} while saving {path.name}. What was saved "
        "before is kept: free some space and run the same command again to go on."
    )


def _sync(path: Path) -> None:
    """Bring a file, or the names in a directory, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
