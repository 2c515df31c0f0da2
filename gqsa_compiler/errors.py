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
]


class CheckpointError(GqsaError):
    """A GQSA checkpoint breaks its specification (docs/format.md)."""


class ModelError(GqsaError):
    """A model directory or file cannot be read, or its architecture is not supported."""


class CompileError(GqsaError):
    """A module cannot be compiled as asked."""
