"""What one layer is asked to become: bits, group size and sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler.compress.recipes.checks import number, one_of
from gqsa_compiler.limits import BITS, GROUP_SIZES

MAX_SPARSITY_PERCENT = 95


@dataclass(frozen=True)
class LayerTarget:
    """What one layer is asked to become.

    Parameters
    ----------
    bits : int
        Bits of a code: 2, 3, 4 or 8.
    group_size : int
        Consecutive input features of a group: a power of two, 8 to 256.
    sparsity : float
        Share of its groups to drop, 0 to 0.95.

    Raises
    ------
    UsageError
        A number is out of range.
    """

    bits: int
    group_size: int
    sparsity: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        one_of("bits", self.bits, BITS)
        one_of("group_size", self.group_size, GROUP_SIZES)
        number("sparsity", self.sparsity, 0, MAX_SPARSITY_PERCENT / 100)


__all__ = ["MAX_SPARSITY_PERCENT", "LayerTarget"]
