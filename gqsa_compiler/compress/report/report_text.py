"""How the report writes numbers."""

from __future__ import annotations

from typing import Any


def number(value: float | None) -> str:
    """Write a number with four digits; None is empty."""
    return "" if value is None else f"{value:.4g}"


def percent(share: float) -> str:
    """Write a share, e.g. ``52.1%``."""
    return f"{share:.1%}"


def setting_text(value: Any) -> str:
    """Write a setting as a recipe has it."""
    if value is None or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
