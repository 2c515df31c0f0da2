"""How many groups a sparsity leaves: the one rule of masks and of sizes (no PyTorch)."""

from __future__ import annotations


def kept_groups(total: int, sparsity: float) -> int:
    """Count the groups left of `total`: halves round up, and a layer never loses all."""
    return max(1, total - int(total * sparsity + 1e-9))
