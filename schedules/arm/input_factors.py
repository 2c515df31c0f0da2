"""What column groups are divided by before a token's activations are rounded with one scale.

The few column groups whose activations are much larger than the rest set that scale. Divided by
c, and their weights' scales multiplied by c, they no longer do: the layer is the same. With all
of a group's magnitude in c, rounding would be as coarse in a large group as in a small one, and
the large ones matter more; a power below 1 shares the error out (SmoothQuant's alpha, of single
columns there: arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer

POWER = 0.75
"""Of a column group's root mean square; docs/arm.md has what others give."""


def input_factors(parts: Sequence[BSRLayer]) -> npt.NDArray[np.float64]:
    """Return the factors c of folded layers, which read the same inputs, float64 [K/G].

    They are numbers of float32, and 1 where `input_rms` was not measured. The median is 1, so
    that scales stay about as large as they are.
    """
    first = parts[0]
    measured = [part.input_rms for part in parts if part.input_rms is not None]
    if not measured:
        return np.ones(first.shape[1] // first.group_size)
    squares = np.mean([np.square(rms, dtype=np.float64) for rms in measured], axis=0)
    sizes = np.sqrt(squares.reshape(-1, first.group_size).mean(1))
    factors = (sizes / np.median(sizes)) ** POWER
    return factors.astype(np.float32).astype(np.float64)
