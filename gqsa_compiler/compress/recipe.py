"""Recipes: how strongly to compress, as ``w<bits>s<sparsity %>g<group>``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gqsa_compiler.errors import UsageError
from gqsa_compiler.limits import BITS, GROUP_SIZES

MAX_SPARSITY_PERCENT = 95

DEFAULT_SAMPLES = 128
DEFAULT_SEQUENCE_LENGTH = 128
"""Calibration sequences and the tokens of each."""

_NAME = re.compile(r"w([1-9][0-9]*)s(0|[1-9][0-9]*)g([1-9][0-9]*)")


@dataclass(frozen=True)
class Recipe:
    """Bits, sparsity and group size of every compressed layer.

    Parameters
    ----------
    bits : int
        Bits a weight of the kept groups; 4.
    sparsity_percent : int
        Share of the groups to drop, 0 to 95 %.
    group_size : int
        Consecutive input features of a group: a power of two, 8 to 256.

    Raises
    ------
    UsageError
        A number is out of range.
    """

    bits: int
    sparsity_percent: int
    group_size: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.bits not in BITS:
            raise UsageError(
                f"Recipe {self.name} asks for {self.bits}-bit weights; this version has 4 bits: "
                f"use w4s{self.sparsity_percent}g{self.group_size}."
            )
        if not 0 <= self.sparsity_percent <= MAX_SPARSITY_PERCENT:
            raise UsageError(
                f"Recipe {self.name} asks for {self.sparsity_percent}% sparsity; it must be 0 to "
                f"{MAX_SPARSITY_PERCENT}."
            )
        if self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"Recipe {self.name} asks for groups of {self.group_size}; a group is one of "
                f"{', '.join(map(str, GROUP_SIZES))}."
            )

    @property
    def name(self) -> str:
        """The recipe's name, e.g. ``w4s30g16``."""
        return f"w{self.bits}s{self.sparsity_percent}g{self.group_size}"

    @property
    def sparsity(self) -> float:
        """Share of groups to drop, 0 to 0.95."""
        return self.sparsity_percent / 100


def parse_recipe(name: str) -> Recipe:
    """Read a recipe's name.

    Parameters
    ----------
    name : str
        ``w<bits>s<sparsity %>g<group>``, e.g. ``w4s30g16``.

    Raises
    ------
    UsageError
        The name has another form, or asks for what this version does not have.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"{name!r} is not a recipe; recipes are named w<bits>s<sparsity %>g<group>, "
            "for example w4s30g16."
        )
    bits, sparsity, group = map(int, match.groups())
    return Recipe(bits, sparsity, group)
