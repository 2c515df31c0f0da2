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


@dataclass(frozen=True)
class Moments:
    """Averages over calibration tokens, shrunk and damped.

    Parameters
    ----------
    hessian : float64 [K, K]
        Mean of x x^T over the inputs x of the partly compressed model, plus damping on the
        diagonal: symmetric, positive definite.
    drift : float64 [K, K] or None
        Mean of (d - x) x^T, with d the dense model's input for the same token.
    missing : float64 [N, K] or None
        Mean of m x^T, with m what is missing in the outputs of the layer with its dense weights.
    """

    hessian: Tensor
    drift: Tensor | None = None
    missing: Tensor | None = None

    def target(self, weight: Tensor) -> Tensor:
        """Return B, float32 [N, K]: the best weights w solve ``w H = B``.

        Parameters
        ----------
        weight : float32 [N, K]
            The dense weights.
        """
        target = weight.double() @ self.hessian
        if self.drift is not None:
            target += weight.double() @ self.drift
        if self.missing is not None:
            target += self.missing
        return target.float()


class MomentAccumulator:
    """Adds up the moments batch by batch: products in float32, sums in float64."""

    def __init__(self) -> None:
        self._second: Tensor | None = None
        self._cross: dict[str, Tensor] = {}
        self._tokens = 0

    def add(
        self, inputs: Tensor, *, dense: Tensor | None = None, missing: Tensor | None = None
    ) -> None:
        """Add a batch; all batches give the same of the optional arguments.

        Parameters
        ----------
        inputs : float32 [..., K]
            The layer's inputs in the partly compressed model.
        dense : float32 [..., K], optional
            The same tokens' inputs in the dense model.
        missing : float32 [..., N], optional
            What the layer's outputs should add.
        """
        x = inputs.reshape(-1, inputs.shape[-1])
        square = (x.T @ x).double()
        self._second = square if self._second is None else self._second.add_(square)
        if dense is not None:
            self._add_cross("drift", dense.reshape(x.shape) - x, x)
        if missing is not None:
            self._add_cross("missing", missing.reshape(x.shape[0], -1), x)
        self._tokens += x.shape[0]

    def _add_cross(self, name: str, left: Tensor, right: Tensor) -> None:
        product = (left.T @ right).double()
        self._cross[name] = self._cross[name].add_(product) if name in self._cross else product

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
        assert self._second is not None, "no batch was added"
        hessian = self._second / self._tokens
        cross = {name: total / self._tokens for name, total in self._cross.items()}
        if not all(torch.isfinite(matrix).all() for matrix in (hessian, *cross.values())):
            raise ModelError(
                f"The inputs of layer {layer} are not finite numbers on the calibration text: "
                "the model's weights are damaged or it overflows."
            )
        diagonal = hessian.diagonal().clone()
        mean = diagonal.mean()
        # Inputs that are always zero (dead columns) get the damping only, so that their weights
        # are rounded as they are and never take up another column's error.
        damping = DAMPING * mean if mean > 0 else torch.ones(())
        hessian.mul_(1 - SHRINKAGE).diagonal().copy_(diagonal + damping)
        return Moments(hessian, **cross)


def inverse(hessian: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, by Cholesky; float64 [K, K]."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))
