"""What adapters are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gqsa_compiler.errors import UsageError

MAX_ADAPTERS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def parse_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """Read what the command line says: ``NAME=DIR``, or a directory, which is named after itself.

    Raises
    ------
    UsageError
        A name is none, or stands twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, directory = text.partition("=")
        if not equals:
            name, directory = Path(text).resolve().name, text
        if not directory:
            raise UsageError(f"--adapter {text!r} names no directory; write NAME=DIR.")
        if name in found:
            raise UsageError(f"Two adapters are called {name!r}; name them apart: NAME=DIR.")
        found[name] = Path(directory)
    check_names(found)
    return found


def check_names(adapters: Mapping[str, str | Path]) -> None:
    """Check what adapters are called, and that there are not too many.

    Raises
    ------
    UsageError
        It does not hold.
    """
    if len(adapters) > MAX_ADAPTERS:
        raise UsageError(f"There are {len(adapters)} adapters; at most {MAX_ADAPTERS} fit.")
    for name in adapters:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"An adapter cannot be called {name!r}: up to 64 letters, digits, '_', '-' and '.' "
                "make a name. Give it one: NAME=DIR."
            )
