"""How long work tells its caller where it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): `total` counts the steps of a stage, 0 where it is not known.
"""
