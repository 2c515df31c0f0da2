"""What a compressed layer may be, for every part that checks it (no imports: `--help` is quick)."""

from __future__ import annotations

BITS = (4,)
"""Bits of a code."""

GROUP_SIZES = (8, 16, 32, 64, 128, 256)
"""Input features that share a scale and are dropped together."""

BALANCES = ("matrix", "row")
"""What the sparsity holds for: a whole matrix, or each of its rows."""
