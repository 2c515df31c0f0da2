"""Numbers with units, as people read them."""

from __future__ import annotations

import math

import pytest

from gqsa_compiler.units import bytes_text, seconds_text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (5e9, "5.00 GB")],
)
def test_bytes_text(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (125.2, "2 min 05 s"),
        (7799, "2 h 09 min"),
        (math.inf, ""),
    ],
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
