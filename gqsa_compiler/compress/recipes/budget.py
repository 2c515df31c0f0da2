"""How large the compressed layers may be, and what may be chosen for each of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gqsa_compiler.compress.recipes.target import MAX_SPARSITY_PERCENT, LayerTarget
from gqsa_compiler.errors import UsageError
from gqsa_compiler.limits import BITS, GROUP_SIZES

MOST_BITS = 16.0
"""A budget of more bits a weight than this asks for no compression at all."""

MOST_SPARSITY = 0.8
"""Of a layer, unless a budget says otherwise: what lies beyond was not found worth its loss."""

_UNITS = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
_TEXT = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?) ?(?P<unit>[A-Za-z]*)", re.ASCII)


@dataclass(frozen=True)
class Budget:
    """A size for all compressed layers together, and each layer's choices.

    Exactly one of `bits_per_weight` and `bytes` is given. Both count everything that is stored
    for a compressed layer: codes, scales, zero points, column indices and row pointers.

    Parameters
    ----------
    bits_per_weight : float, optional
        Most stored bits a weight, on average over the compressed layers.
    bytes : int, optional
        Most bytes of the compressed layers.
    bits, group_sizes : tuple of int, optional
        What a layer may get; None leaves all layers with the recipe's.
    sparsities : tuple of float, optional
        What a layer may get; None is every whole percent within the limits.
    least_sparsity, most_sparsity : float
        Limits for every layer.

    Raises
    ------
    UsageError
        A value is out of range, or nothing is left to choose from.
    """

    bits_per_weight: float | None = None
    bytes: int | None = None
    bits: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    sparsities: tuple[float, ...] | None = None
    least_sparsity: float = 0.0
    most_sparsity: float = MOST_SPARSITY

    def __post_init__(self) -> None:
        """Check the numbers."""
        if (self.bits_per_weight is None) == (self.bytes is None):
            raise UsageError("A budget is either bits a weight or bytes, one of the two.")
        if self.bits_per_weight is not None and not (
            _is_number(self.bits_per_weight) and 0 < self.bits_per_weight <= MOST_BITS
        ):
            raise UsageError(
                f"A budget of {self.bits_per_weight} bits a weight cannot be meant; it is a number "
                f"above 0, at most {MOST_BITS:g}."
            )
        if self.bytes is not None and (type(self.bytes) is not int or self.bytes < 1):
            raise UsageError(f"A budget of {self.bytes} bytes cannot be met; it is at least 1.")
        _check_choices("bits", self.bits, BITS)
        _check_choices("group sizes", self.group_sizes, GROUP_SIZES)
        check_limits(self.least_sparsity, self.most_sparsity)
        if self.sparsities is not None:
            _check_several("sparsities", self.sparsities)
            for sparsity in self.sparsities:
                _check_sparsity("A sparsity to choose from", sparsity)
            if not self.allowed_sparsities:
                raise UsageError(
                    f"None of the budget's sparsities lies within its limits "
                    f"{self.least_sparsity:g} to {self.most_sparsity:g}."
                )

    @property
    def allowed_sparsities(self) -> tuple[float, ...]:
        """What a layer may get, within the limits, increasing."""
        return allowed_sparsities(self.least_sparsity, self.most_sparsity, self.sparsities)

    def choices(self, recipe: LayerTarget) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the bits and the group sizes a layer may get, `recipe`'s where none were named."""
        return self.bits or (recipe.bits,), self.group_sizes or (recipe.group_size,)

    def most_bytes(self, weights: int) -> int:
        """Return the most bytes that layers of `weights` weights in all may take."""
        if self.bytes is not None:
            return self.bytes
        assert self.bits_per_weight is not None
        return math.floor(self.bits_per_weight * weights / 8 + 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not None, as JSON types."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """Read what `to_dict` gave.

        Raises
        ------
        UsageError
            A field is unknown, or its value is not one of a budget.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(f"A budget has no {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**given)

    def __str__(self) -> str:
        """Show the size, as `parse_budget` reads it."""
        return f"{self.bytes}B" if self.bytes is not None else f"{self.bits_per_weight:g}bits"


def parse_budget(text: str) -> Budget:
    """Read a budget's size: ``3.1`` or ``3.1bits`` a weight, ``60MB`` or ``60MiB`` in all.

    Raises
    ------
    UsageError
        The text is neither.
    """
    match = _TEXT.fullmatch(text.strip())
    unit = match["unit"] if match else ""
    if match is None or unit not in ("", "bits", *_UNITS):
        raise UsageError(
            f"The budget {text!r} is neither bits a weight (3.1 or 3.1bits) nor a size "
            "(60MB or 60MiB)."
        )
    if unit in ("", "bits"):
        return Budget(bits_per_weight=float(match["number"]))
    return Budget(bytes=math.floor(float(match["number"]) * _UNITS[unit]))


def allowed_sparsities(
    least: float, most: float, sparsities: tuple[float, ...] | None = None
) -> tuple[float, ...]:
    """List those of `sparsities` from `least` to `most`, increasing, each once.

    None stands for every whole percent and the two limits.
    """
    if sparsities is None:
        whole = [percent / 100 for percent in range(MAX_SPARSITY_PERCENT + 1)]
        sparsities = (*whole, least, most)
    return tuple(sorted({s for s in sparsities if least <= s <= most}))


def check_limits(least: float, most: float) -> None:
    """Check the limits of a layer's sparsity.

    Raises
    ------
    UsageError
        One is out of range, or they are in the wrong order.
    """
    _check_sparsity("The least sparsity of a layer", least)
    _check_sparsity("The most sparsity of a layer", most)
    if least > most:
        raise UsageError(f"The least sparsity of a layer, {least:g}, is above the most, {most:g}.")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _check_sparsity(what: str, value: float) -> None:
    most = MAX_SPARSITY_PERCENT / 100
    if not (_is_number(value) and 0 <= value <= most):
        raise UsageError(f"{what} is {value}; it must be 0 to {most:g}.")


def _check_several(what: str, chosen: object) -> None:
    if not isinstance(chosen, tuple):
        raise UsageError(f"The {what} to choose from are {chosen!r}; they must be a list.")


def _check_choices(what: str, chosen: tuple[int, ...] | None, known: tuple[int, ...]) -> None:
    if chosen is None:
        return
    _check_several(what, chosen)
    wrong = [value for value in chosen if type(value) is not int or value not in known]
    if wrong or not chosen or len(set(chosen)) != len(chosen):
        raise UsageError(
            f"The {what} to choose from are {', '.join(map(str, chosen)) or 'none'}; they must be "
            f"some of {', '.join(map(str, known))}, each once."
        )
