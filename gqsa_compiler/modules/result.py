"""What compressing a module tells its caller."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gqsa_compiler.compress.result import LayerReport


@dataclass(frozen=True)
class DenseLayer:
    """A layer that was left as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ModuleReport:
    """What was compressed.

    Parameters
    ----------
    module, recipe, output : str
    layers : tuple of LayerReport
    dense : tuple of DenseLayer
        Linear layers and convolutions that are not compressed.
    shared : dict of str to str
        Layers that have the weight of a compressed one: its name by theirs.
    bits_per_weight : float
        Stored bits a weight of the compressed layers, with all indices and scales.
    seconds : float
    """

    module: str
    recipe: str
    output: str
    layers: tuple[LayerReport, ...]
    dense: tuple[DenseLayer, ...]
    shared: dict[str, str]
    bits_per_weight: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self)
