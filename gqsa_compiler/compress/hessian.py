"""Second moments of a linear layer's inputs: what compression minimises the error under."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqsa_compiler.errors import ModelError

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""

SHRINKAGE = 0.1
"""How far correlations between inputs shrink towards none: calibration text is not all text."""

DRIFT = 1.0


@dataclass(frozen=True)
class Moments:
    """Averages over calibration tokens, damped.

    Parameters
    ----------
    hessian : float64 [K, K]
        Mean of x x^T over the inputs x of the partly compressed model, plus damping on the
        diagonal: symmetric, positive definite.
    drift : float64 [K, K]
        Mean of (d - x) x^T, with d the dense model's input for the same token.
    """

    hessian: Tensor
    drift: Tensor


class MomentAccumulator:
    """Adds up the moments batch by batch: products in float32, sums in float64.

    Parameters
    ----------
    features : int
        K.
    """

    def __init__(self, features: int) -> None:
        self._second = torch.zeros(features, features, dtype=torch.float64)
        self._cross = torch.zeros_like(self._second)
        self._tokens = 0

    def add(self, inputs: Tensor, dense: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        inputs, dense : float32 [..., K]
            The same tokens' inputs in the compressed and in the dense model.
        """
        x = inputs.reshape(-1, inputs.shape[-1])
        d = dense.reshape(x.shape)
        self._second += x.T @ x
        self._cross += (d - x).T @ x
        self._tokens += x.shape[0]

    def finish(self, layer: str) -> Moments:
        """Average, shrink and damp.

        Parameters
        ----------
        layer : str
            Named in errors.

        Raises
        ------
        ModelError
            An input was NaN or infinite.
        """
        hessian = self._second / max(self._tokens, 1)
        drift = self._cross / max(self._tokens, 1)
        mean = hessian.diagonal().mean()
        if not torch.isfinite(hessian).all() or not torch.isfinite(drift).all():
            raise ModelError(
                f"The inputs of layer {layer} are not finite numbers on the calibration text: "
                "the model's weights are damaged or it overflows."
            )
        diagonal = hessian.diagonal().clone()
        hessian.mul_(1 - SHRINKAGE).diagonal().copy_(diagonal)
        drift.mul_(DRIFT)
        # Inputs that are always zero (dead columns) get the damping only, so that their weights
        # are rounded as they are and never take up another column's error.
        hessian.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
        return Moments(hessian, drift)


def inverse(hessian: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, by Cholesky; float64 [K, K]."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))
