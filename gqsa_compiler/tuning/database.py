"""The tuning database: a directory of JSON-lines files, one for each target on a chip.

A file is only ever appended to, a whole line at a time and under its lock, so that writers share
it and a kill at any moment costs at most the line that was being written. What such a kill leaves
of a line stays where it is and is passed over.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.outdir import disk_full
from gqsa_compiler.tuning.records import Entry, Trial, from_line, to_line

SUFFIX = ".jsonl"
_MOST_BYTES = 1 << 30
_ATTEMPTS = 100


@dataclass(frozen=True)
class Contents:
    """What a database's files hold.

    Parameters
    ----------
    entries : tuple of Entry
        File by file in the order of their names, line by line.
    unreadable : int
        Lines that were passed over: cut by a kill, or not ours.
    """

    entries: tuple[Entry, ...]
    unreadable: int = 0

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials among the entries."""
        return tuple(entry for entry in self.entries if isinstance(entry, Trial))


class Database:
    """A directory of records.

    Parameters
    ----------
    directory : Path
        Made with the first record.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def files(self) -> list[Path]:
        """List its files by name.

        Raises
        ------
        UsageError
            It is no directory.
        """
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise UsageError(f"The database {self.directory} is a file; name a directory.")
        return sorted(p for p in self.directory.iterdir() if p.suffix == SUFFIX and p.is_file())

    def check(self) -> None:
        """Refuse, before any work is done for it, a place where no record can be written.

        Raises
        ------
        UsageError
            It is no directory, or cannot be made or written to.
        """
        self.files()
        found = next(p for p in (self.directory, *self.directory.absolute().parents) if p.exists())
        if not found.is_dir():
            raise UsageError(f"The database {self.directory} cannot be made: {found} is a file.")
        if not os.access(found, os.W_OK | os.X_OK):
            raise UsageError(
                f"The database {self.directory} cannot be written: nothing can be put into {found}."
            )

    def read(self) -> Contents:
        """Read all records, of a session that is under way too.

        Raises
        ------
        UsageError
            It is no directory.
        GqsaError
            A file cannot be read, or is too large to be a database.
        """
        entries: list[Entry] = []
        unreadable = 0
        for path in self.files():
            found = read_file(path)
            entries += found.entries
            unreadable += found.unreadable
        return Contents(tuple(entries), unreadable)

    def append(self, *entries: Entry) -> None:
        """Add records; they are with the disk when this returns.

        Raises
        ------
        GqsaError
            The disk is full, or a file cannot be written. Records before are as they were.
        """
        for path, some in self._by_file(entries).items():
            append_file(path, some)

    def append_new(self, *entries: Entry) -> int:
        """Add the records that are not here, and return their number; else as `append`."""
        by_file = self._by_file(entries)
        return sum(append_file(path, some, new_only=True) for path, some in by_file.items())

    def merge(self, other: Database) -> int:
        """Add the records of another database that are not here, and return their number."""
        return sum(self.append_new(*read_file(path).entries) for path in other.files())

    def _by_file(self, entries: Iterable[Entry]) -> dict[Path, list[Entry]]:
        found: dict[Path, list[Entry]] = {}
        for entry in entries:
            found.setdefault(self.directory / entry.target.file, []).append(entry)
        return found

    def prune(self, drop: Iterable[Entry]) -> int:
        """Remove some records, and lines that cannot be read.

        Returns
        -------
        int
            Lines that were removed.
        """
        dropped = {to_line(entry) for entry in drop}
        removed = 0
        for path in self.files():
            try:
                with _locked(path) as handle:
                    lines = _read_all(handle, path).splitlines(keepends=True)
                    left = [line for line in lines if _stays(line, dropped)]
                    removed += len(lines) - len(left)
                    if len(left) < len(lines):
                        _replace(path, b"".join(left))
            except OSError as error:
                raise _cannot(path, error) from error
        return removed


def read_file(path: Path) -> Contents:
    """Read one file of a database.

    Raises
    ------
    GqsaError
        It cannot be read, or is too large to be one.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise GqsaError(f"{path} has more than 1 GiB; it is no tuning database.")
        data = path.read_bytes()
    except OSError as error:
        raise GqsaError(f"Cannot read {path}: {error.strerror or error}.") from error
    entries, unreadable = [], 0
    for line in data.splitlines(keepends=True):
        try:
            entry = from_line(line)
        except ValueError:
            unreadable += bool(line.strip())
            continue
        if entry is not None:
            entries.append(entry)
    return Contents(tuple(entries), unreadable)


def append_file(path: Path, entries: Iterable[Entry], *, new_only: bool = False) -> int:
    """Append records to a file, each a line, and return how many; see `Database.append`.

    Parameters
    ----------
    new_only : bool
        Leave those out that the file has.
    """
    lines = list(dict.fromkeys(to_line(entry) for entry in entries))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as handle:
            if new_only:
                have = set(_read_all(handle, path).splitlines(keepends=True))
                lines = [line for line in lines if line not in have]
            size = os.fstat(handle).st_size
            if not lines:
                return 0
            # A writer that was killed may have left part of a line: it ends here.
            cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            _write(handle, (b"\n" if cut else b"") + b"".join(lines), size)
    except OSError as error:
        raise _cannot(path, error) from error
    return len(lines)


def _write(handle: int, data: bytes, size: int) -> None:
    try:
        written = 0
        while written < len(data):
            written += os.write(handle, data[written:])
        os.fsync(handle)
    except BaseException:
        os.ftruncate(handle, size)  # nobody else writes: the lock is ours
        raise


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open a file to append to, with its lock; yields the handle."""
    for _ in range(_ATTEMPTS):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # `prune` puts another file in its place: then this one is nobody's any more.
            try:
                same = os.path.samestat(os.fstat(handle), path.stat())
            except FileNotFoundError:
                same = False
            if same:
                yield handle
                return
        finally:
            os.close(handle)
    raise GqsaError(f"{path} is being replaced again and again by others; try again.")


def _read_all(handle: int, path: Path) -> bytes:
    size = os.fstat(handle).st_size
    if size > _MOST_BYTES:
        raise GqsaError(f"{path} has more than 1 GiB; it is no tuning database.")
    return os.pread(handle, size, 0)


def _stays(line: bytes, dropped: set[bytes]) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        entry = from_line(line)
    except ValueError:
        return False
    return entry is None or to_line(entry) not in dropped  # None: a later release's


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{path.name}.new")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _cannot(path: Path, error: OSError) -> GqsaError:
    if disk_full(error):
        return GqsaError(f"No space left on the disk of {path.parent}; free some and go on.")
    return UsageError(f"Cannot write the database file {path}: {error.strerror or error}.")
