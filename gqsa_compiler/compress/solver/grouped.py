"""A compressed weight, decoded into its parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gqsa_compiler.compress.solver.quantizer import decode


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """A compressed weight [N, K], decoded into its parts.

    Parameters
    ----------
    keep : bool [N, K/G]
        Groups that are stored.
    codes : float32 [N, K/G, G]
        Integers 0..2^bits-1. That of a dropped weight inside a kept group is the group's zero
        point, which decodes to exactly 0; those of dropped groups mean nothing.
    scales : float32 [N, K/G]
        Positive, exactly representable in float16. Those of dropped groups mean nothing.
    zeros : float32 [N, K/G]
        Integers 0..2^bits-1.
    bits : int
        Of a code.
    elements : bool [N, K] or None
        With 2:4 sparsity, the weights that are not dropped. A weight that is kept may round to 0
        as well, so the codes do not tell.
    """

    keep: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int = 4
    elements: Tensor | None = None

    def decode(self) -> Tensor:
        """Return the float32 [N, K] weight that a reader of the checkpoint sees."""
        weight = decode(self.codes, self.scales[..., None], self.zeros[..., None])
        return torch.where(self.keep[..., None], weight, 0.0).flatten(1)

    def rows(self, start: int, stop: int) -> GroupedWeight:
        """Return a slice of the rows."""
        part = slice(start, stop)
        return GroupedWeight(
            self.keep[part],
            self.codes[part],
            self.scales[part],
            self.zeros[part],
            self.bits,
            None if self.elements is None else self.elements[part],
        )
