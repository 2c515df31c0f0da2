"""Write an output directory aside and rename it when it is whole."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.runtime.manifest import FORMAT, MANIFEST_FILE, MODULE_FORMAT

_CONFIG_FILE = "config.json"
_MAX_MARK_BYTES = 100_000_000
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def staged_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside `path` that takes its name when the block ends well.

    On any exception, Ctrl-C included, the directory and the parents made for it are removed and
    `path` is as it was. Readers never see a half written `path`.

    Parameters
    ----------
    path : path
        The output directory. Missing parents are made. A symbolic link is followed.
    overwrite : bool
        Replace an existing directory, in one step where the system can (Linux), otherwise
        in two renames that are undone on failure. It must be empty, a GQSA checkpoint or a
        compiled artefact.

    Yields
    ------
    Path
        The directory to write into, ``<name>.tmp-<random>``, on the same file system.

    Raises
    ------
    UsageError
        `path` exists and `overwrite` is false, is not a directory, is not one of this project's
        outputs, or cannot be made or replaced.
    GqsaError
        The disk is full (whatever the library that noticed it raised).
    """
    final = Path(os.path.realpath(path))
    check_output(final, overwrite)
    made = _make_parents(final.parent)
    staging = final.parent / f"{final.name[:200]}.tmp-{secrets.token_hex(4)}"
    try:
        try:
            staging.mkdir()
        except OSError as error:
            raise _cannot("create", final, error) from error
        yield staging
        check_output(final, overwrite)  # somebody may have made it since
        _publish(staging, final)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        if isinstance(error, Exception) and not isinstance(error, GqsaError) and disk_full(error):
            raise _no_space(final, staging, error) from error
        raise
    # After an exchange the old directory has the staging name.
    shutil.rmtree(staging, ignore_errors=True)
    if staging.exists():
        raise GqsaError(
            f"{final} is written, but what it replaced could not be removed; delete {staging}."
        )


def disk_full(error: BaseException) -> bool:
    """Whether `error` or what caused it says that no space (or quota) is left on a disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_FULL:
            return True
        # Libraries in Rust and C++ (safetensors, LLVM) only pass on the text.
        if "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _no_space(final: Path, staging: Path, error: Exception) -> GqsaError:
    where = final.parent
    named = getattr(error, "filename", None)
    if isinstance(named, str) and not Path(named).is_relative_to(staging):
        where = Path(named).parent
    return GqsaError(
        f"No space left on the disk of {where} while writing {final}; nothing of it was kept. "
        "Free some space or choose another output directory."
    )


def _cannot(verb: str, final: Path, error: OSError) -> GqsaError:
    if error.errno in _DISK_FULL:
        return _no_space(final, final, error)
    reason = error.strerror or str(error)
    return UsageError(f"Cannot {verb} the output directory {final}: {reason}.")


def check_output(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    protect: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Check that `staged_directory` may write `path`; for callers with long work before it.

    Parameters
    ----------
    path : path
        The output directory.
    overwrite : bool
        See `staged_directory`.
    protect : iterable of path
        What the output is made from. Overwriting must not delete it, and what is written must not
        become a part of it. Paths where nothing is are passed over.

    Raises
    ------
    UsageError
        See `staged_directory`; or `path` is, contains or lies inside one of `protect`, links
        followed.
    """
    final = Path(os.path.realpath(path))
    if not final.name:
        raise UsageError(f"{final} cannot be an output directory; name a directory inside it.")
    exists = os.path.lexists(final)
    if exists and not final.is_dir():
        raise UsageError(f"The output {final} exists and is not a directory; choose another name.")
    for given in protect:
        _check_apart(final, given)
    if not exists:
        _check_length(final)
        return
    if not overwrite:
        raise UsageError(
            f"The output directory {final} exists; choose another name or overwrite it "
            "(--overwrite)."
        )
    try:
        is_empty = next(final.iterdir(), None) is None
    except OSError as error:
        raise _cannot("read", final, error) from error
    if not is_empty and not _is_output(final):
        raise UsageError(
            f"{final} is not overwritten: it is neither a GQSA checkpoint nor a compiled "
            "artefact. Choose another name, or delete it yourself."
        )


def _check_apart(final: Path, given: str | os.PathLike[str]) -> None:
    """Check that replacing `final` would not delete `given`, nor writing it add to `given`."""
    real = Path(os.path.realpath(given))
    if not os.path.lexists(real):
        return
    if _is_same(real, final):
        what, remedy = "is", "choose another name"
    elif any(_is_same(place, final) for place in real.parents):
        what, remedy = "contains", "choose another name"
    elif any(_is_same(place, real) for place in final.parents):
        what, remedy = "lies inside", "choose a directory outside it"
    else:
        return
    raise UsageError(f"The output {final} {what} the input {os.fspath(given)}; {remedy}.")


def _is_same(one: Path, other: Path) -> bool:
    """Compare by identity: mounts and file systems that ignore case give many names."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there yet, or could not be
        return False


def _check_length(final: Path) -> None:
    """Check names that do not exist yet; the long ones only fail at the end otherwise."""
    place = final
    while not os.path.lexists(place):
        place = place.parent
    try:
        limit = os.pathconf(place, "PC_NAME_MAX")
    except OSError as error:
        raise _cannot("create", final, error) from error
    for name in final.relative_to(place).parts:
        if len(os.fsencode(name)) > limit:
            raise UsageError(
                f"The output name {name[:40]}... has {len(os.fsencode(name))} bytes, and {place} "
                f"takes names of at most {limit}; choose a shorter one."
            )
    try:
        final.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        # The whole path may be too long although every name in it fits.
        raise _cannot("create", final, error) from error


def _is_output(directory: Path) -> bool:
    """Whether this project wrote `directory`.

    `overwrite` deletes nothing else, so that a slip such as ``-o ~ --overwrite`` or ``-o`` with
    somebody's dense model costs nobody their files.
    """
    quantization = _read_mark(directory / _CONFIG_FILE).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "gqsa":
        return True
    return _read_mark(directory / MANIFEST_FILE).get("format") in (FORMAT, MODULE_FORMAT)


def _read_mark(path: Path) -> dict[str, object]:
    """Read a JSON object, whoever wrote it; empty when there is none."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_MARK_BYTES:
            return {}
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _make_parents(parent: Path) -> list[Path]:
    """Make `parent` and return the directories that were missing, the innermost first."""
    missing = []
    probe = parent
    while not os.path.lexists(probe):
        missing.append(probe)
        probe = probe.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for made in missing:
            with suppress(OSError):
                made.rmdir()
        raise _cannot("create", parent, error) from error
    return missing


def _publish(staging: Path, final: Path) -> None:
    try:
        if not final.exists():
            staging.rename(final)
        elif not _exchange(staging, final):
            _replace(staging, final)
    except OSError as error:
        raise _cannot("replace", final, error) from error


def _exchange(staging: Path, final: Path) -> bool:
    """Swap the two names in one step; False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    status = renameat2(
        _AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(final), _RENAME_EXCHANGE
    )
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _replace(staging: Path, final: Path) -> None:
    aside = final.with_name(f"{final.name[:200]}.old-{secrets.token_hex(4)}")
    try:
        final.rename(aside)
        staging.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    # The caller removes the staging name.
    aside.rename(staging)
