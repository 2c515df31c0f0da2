"""What each layer would cost the model, for every choice: measured curves (no PyTorch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError

Scheme = tuple[int, int]
"""(bits, group size)."""


@dataclass(frozen=True)
class LayerCosts:
    """The loss that a layer would add to the model's, by what it becomes.

    Parameters
    ----------
    name : str
        Module path.
    shape : tuple of int
        (N, K).
    sparsities : tuple of float
        Where it was measured: increasing.
    curves : mapping of (bits, group size) to tuple of float
        Predicted KL divergence from the dense model, nats a token, at each of `sparsities`; never
        decreasing. Group sizes that do not divide K are missing.

    Raises
    ------
    ModelError
        A cost is not a finite number.
    """

    name: str
    shape: tuple[int, int]
    sparsities: tuple[float, ...]
    curves: Mapping[Scheme, tuple[float, ...]]

    def __post_init__(self) -> None:
        """Check that every cost is a number."""
        if not all(math.isfinite(cost) for curve in self.curves.values() for cost in curve):
            raise ModelError(
                f"The costs of compressing layer {self.name} are not finite numbers: "
                "the model's weights are damaged or it overflows on the calibration text."
            )

    @property
    def weights(self) -> int:
        """N times K."""
        return self.shape[0] * self.shape[1]

    def at(self, scheme: Scheme, sparsities: Sequence[float]) -> npt.NDArray[np.float64]:
        """Return the costs at `sparsities`, between the measured ones by a monotone cubic.

        Raises
        ------
        ValueError
            The scheme was not measured, or a sparsity lies outside what was.
        """
        from scipy.interpolate import PchipInterpolator

        low, high = self.sparsities[0], self.sparsities[-1]
        if scheme not in self.curves or not all(low <= s <= high for s in sparsities):
            raise ValueError(f"{self.name} was not measured at {scheme}, {sparsities}")
        curve = self.curves[scheme]
        if len(curve) == 1:
            return np.full(len(sparsities), curve[0])
        costs: npt.NDArray[np.float64] = PchipInterpolator(self.sparsities, curve)(sparsities)
        return costs
