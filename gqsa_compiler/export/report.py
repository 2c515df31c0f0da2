"""What an export has made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """What an export has made.

    Parameters
    ----------
    output : str
    format : str
        One of `FORMATS`.
    layers : mapping of str to int
        Compressed layers by what they were stored as, e.g. ``Q4_0`` or ``float32``.
    rounded : tuple of str
        Layers whose weights are not exactly those of the source.
    bytes : int
        Of the files with weights.
    notes : tuple of str
        What a user should know, a sentence each.
    """

    output: str
    format: str
    layers: Mapping[str, int]
    rounded: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every layer decodes to the source's weights, bit for bit."""
        return not self.rounded

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {**asdict(self), "exact": self.exact}
