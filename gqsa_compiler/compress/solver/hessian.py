"""Second moments of a linear layer's inputs: what compression minimises the error under."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqsa_compiler.compress.gemm import linear
from gqsa_compiler.errors import ModelError

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""

SHRINKAGE = 0.1
"""How far correlations between inputs shrink towards none: calibration text is not all text."""

CHUNK_TOKENS = 2048
"""Tokens whose products are added up in float32."""

CHUNK_ROWS = 256
"""Rows of a second moment computed at once; what lies left of the diagonal is mirrored."""


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

    def input_rms(self) -> Tensor:
        """Return the root mean square of each input, float32 [K]; the damping makes it positive."""
        return self.hessian.diagonal().sqrt().float()

    def target(self, weight: Tensor) -> Tensor:
        """Return B, float32 [N, K]: the best weights w solve ``w H = B``.

        Parameters
        ----------
        weight : float32 [N, K]
            The dense weights.
        """
        # With the damped Hessian on both sides, damping pulls towards the dense weights, not to 0.
        target = weight.double() @ self.hessian
        if self.drift is not None:
            target += weight.double() @ self.drift
        if self.missing is not None:
            target += self.missing
        return target.float()


class MomentAccumulator:
    """Adds up the moments, some tokens at a time: products in float32, sums in float64."""

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
        tokens, features = x.shape
        if self._second is None:
            self._second = torch.zeros(features, features, dtype=torch.float64, device=x.device)
        for begin in range(0, tokens, CHUNK_TOKENS):
            part = slice(begin, begin + CHUNK_TOKENS)
            columns = x[part].T.contiguous()
            for row in range(0, features, CHUNK_ROWS):  # the upper triangle
                rows = columns[row : row + CHUNK_ROWS]
                self._second[row : row + CHUNK_ROWS, row:] += linear(rows, columns[row:])
            if dense is not None:
                self._add_cross("drift", dense.reshape(x.shape)[part] - x[part], columns)
            if missing is not None:
                self._add_cross("missing", missing.reshape(tokens, -1)[part], columns)
        self._tokens += tokens

    def _add_cross(self, name: str, left: Tensor, columns: Tensor) -> None:
        product = linear(left.T.contiguous(), columns)
        if name in self._cross:
            self._cross[name] += product
        else:
            self._cross[name] = product.double()

    def finish(self, layer: str) -> Moments:
        """Average, shrink and damp, in place: nothing can be added after.

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
        hessian = self._second.triu_().div_(self._tokens)
        hessian += hessian.triu(1).T
        cross = {name: total.div_(self._tokens) for name, total in self._cross.items()}
        if not all(torch.isfinite(matrix).all() for matrix in (hessian, *cross.values())):
            raise ModelError(
                f"The inputs of layer {layer} are not finite numbers on the calibration text: "
                "the model's weights are damaged or it overflows."
            )
        diagonal = hessian.diagonal().clone()
        mean = diagonal.mean()
        # Inputs that are always zero (dead columns) get the damping only, so that their weights
        # are rounded as they are and never take up another column's error.
        damping = DAMPING * mean if mean > 0 else torch.ones_like(mean)
        hessian.mul_(1 - SHRINKAGE).diagonal().copy_(diagonal + damping)
        return Moments(hessian, **cross)


def inverse(hessian: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, by Cholesky; float64 [K, K]."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))
