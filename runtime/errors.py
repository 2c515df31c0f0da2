"""The errors a user can cause, each printed as one or two sentences.

They live in the runtime because it is the leaf of the import graph; the rest of the project
imports them through `gqsa_compiler.errors`.
"""

from __future__ import annotations


class GqsaError(Exception):
    """A failure with a message for the user: what, which file or layer, what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(GqsaError):
    """The request itself is wrong (a bad option, a missing path): exit code 2."""

    exit_code = 2


class ArtefactError(GqsaError):
    """A compiled artefact is damaged, of another format version, or for another machine."""


def last_line(error: BaseException) -> str:
    """Return the last line of an error of TVM's, which may put a trace before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".")[:200] if lines else type(error).__name__
