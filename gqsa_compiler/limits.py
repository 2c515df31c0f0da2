"""What a compressed layer may be, for every part that checks it (no imports: `--help` is quick)."""

from __future__ import annotations

BITS = (2, 3, 4, 8)
"""Bits of a code."""

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
"""Input features that share a scale and are dropped together."""

BALANCES = ("matrix", "row", "model")
"""What the sparsity holds for: each matrix, each of its rows, or all of them together."""
