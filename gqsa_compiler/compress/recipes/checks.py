"""Checks of a recipe's numbers; each message begins with the setting's name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gqsa_compiler.errors import UsageError


def one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Raise `UsageError` unless a value is one of the known ones, and of its type."""
    # By type too: True is 1 and 4.0 is 4, but neither is what a checkpoint records.
    if not any(value == item and type(value) is type(item) for item in known):
        raise UsageError(f"{name} is {value}; it must be one of {', '.join(map(str, known))}.")


def whole(name: str, value: int, least: int, most: int | None = None) -> None:
    """Raise `UsageError` unless a value is a whole number in a range."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise UsageError(f"{name} is {value}; it must be {limits}, a whole number.")


def number(name: str, value: float, least: float, most: float) -> None:
    """Raise `UsageError` unless a value is a finite number in a range."""
    if not _is_finite(value) or not least <= value <= most:
        raise UsageError(f"{name} is {value}; it must be {least:g} to {most:g}.")


def above_zero(name: str, value: float) -> None:
    """Raise `UsageError` unless a value is a finite number above 0."""
    if not _is_finite(value) or value <= 0:
        raise UsageError(f"{name} is {value}; it must be a number above 0.")


def _is_finite(value: float) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
