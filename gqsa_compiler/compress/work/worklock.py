"""The lock that keeps two runs out of one work directory."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from gqsa_compiler.compress.work.worksettings import LOCK_FILE, check_own
from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.outdir import disk_full

_ATTEMPTS = 20


def lock_directory(path: Path) -> int:
    """Make a work directory if it is missing and lock it.

    Returns
    -------
    int
        Handle of its lock file. Closing it, or the end of the process, ends the lock.

    Raises
    ------
    UsageError
        Another run holds the lock, the directory is somebody else's, or it cannot be used.
    GqsaError
        The disk is full.
    """
    for _ in range(_ATTEMPTS):
        try:
            path.mkdir(parents=True, exist_ok=True)
            check_own(path)
            handle = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # a run that ends removed the directory meanwhile
            continue
        except OSError as error:
            raise _cannot(path, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), (path / LOCK_FILE).stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UsageError(
                f"Another run is using {path}; wait until it has ended, or choose another output."
            ) from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            raise _cannot(path, error) from error
        os.close(handle)  # the lock file of a run that has ended
    raise UsageError(f"Another run keeps making and removing {path}; choose another output.")


def _cannot(path: Path, error: OSError) -> GqsaError:
    if disk_full(error):
        return GqsaError(
            f"No space left on the disk of {path.parent} for {path}; free some, or choose another "
            "output."
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return UsageError(
            f"{path}, where the unfinished work goes, cannot be made: it or a parent is a file. "
            "Move that away, or choose another output."
        )
    return UsageError(f"Cannot use the work directory {path}: {error.strerror or error}.")
