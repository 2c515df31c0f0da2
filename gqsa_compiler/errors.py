"""Every error the project raises for a user to read."""

from __future__ import annotations

from gqsa_compiler.runtime.errors import ArtefactError, GqsaError, UsageError

__all__ = [
    "ArtefactError",
    "CheckpointError",
    "CompileError",
    "GqsaError",
    "ModelError",
    "UsageError",
    "first_line",
    "out_of_memory",
]


_MEMORY_TEXTS = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "out of memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, a GPU's too, is not enough."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # PyTorch and its libraries only say so in the text.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_TEXTS)


def first_line(error: BaseException) -> str:
    """Return the first line of another program's error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


class CheckpointError(GqsaError):
    """A GQSA checkpoint breaks its specification (docs/format.md)."""


class ModelError(GqsaError):
    """A model directory or file cannot be read, or its architecture is not supported."""


class CompileError(GqsaError):
    """A module cannot be compiled as asked."""
