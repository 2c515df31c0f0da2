"""What a finished compression tells its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer.

    Parameters
    ----------
    name : str
        Module path.
    n, k : int
        Output and input features.
    bits, group_size : int
    sparsity : float
        Share of groups dropped.
    bytes : int
        Stored bytes.
    """

    name: str
    n: int
    k: int
    bits: int
    group_size: int
    sparsity: float
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, with all indices and scales."""
        return 8 * self.bytes / (self.n * self.k)


@dataclass(frozen=True)
class CompressReport:
    """What was compressed, and how far it is from the dense model.

    Parameters
    ----------
    model, recipe, output : str
    calibration : str
        Where the tokens came from.
    calibration_samples, calibration_tokens : int
        Sequences, and tokens in all.
    layers : tuple of LayerReport
        The blocks' compressed layers.
    block_losses : tuple of float
        For each block, the mean over tokens of the squared error of its outputs against the dense
        model's, relative to their size: after the one-shot compression and stage one.
    bits_per_weight : float
        Stored bits a weight of the blocks' compressed layers, with all indices and scales.
    nominal_bits_per_weight : float or None
        For a 2:4 baseline: what a 2:4 format would store.
    divergence : float or None
        KL(dense || compressed) in nats a token, mean over the last tenth of the end-to-end steps
        on the calibration text; None without such a stage.
    seconds : float
        Wall time of this process.
    head : LayerReport or None
        The language-model head, if the recipe compresses it.
    """

    model: str
    recipe: str
    output: str
    calibration: str
    calibration_samples: int
    calibration_tokens: int
    layers: tuple[LayerReport, ...]
    block_losses: tuple[float, ...]
    bits_per_weight: float
    nominal_bits_per_weight: float | None
    divergence: float | None
    seconds: float
    head: LayerReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self)


def report_from_dict(data: Mapping[str, Any]) -> CompressReport:
    """Inverse of `CompressReport.to_dict`, after JSON too."""
    layers = tuple(LayerReport(**layer) for layer in data["layers"])
    losses = tuple(data["block_losses"])
    head = None if data["head"] is None else LayerReport(**data["head"])
    return CompressReport(**{**data, "layers": layers, "block_losses": losses, "head": head})
