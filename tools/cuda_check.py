"""Whether a kernel's results are right: every element, and all of them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ELEMENT = {"float16": 6e-3, "int16": 1e-4}
"""How far an element may be off, in root mean squares of its token's results.

A result of halves is a sum of thousands of products with rounding errors of 2^-11 and less, so it
is off by about 5e-4 of what such sums are, and the worst of millions by six times that. A group of
16 that is lost changes its row by 3e-2 where a row has a thousand of them. int16 is compared with
a reference that has rounded the same way; an activation at the border of two codes may differ.
"""
TOGETHER = {"float16": 1.5e-3, "int16": 2e-5}
"""How far all may be off together: the norm of the difference over the norm of what is expected."""
GATED = 8.0
"""A gated output is a product: an error of one factor is multiplied by the other."""


@dataclass(frozen=True)
class Verdict:
    """How far results are off.

    Parameters
    ----------
    worst : float
        The largest error, as a share of what is allowed.
    together : float
        The norm of the error over the norm of what is expected.
    fault : str or None
        What is wrong, or None.
    """

    worst: float
    together: float
    fault: str | None


def compare(got: Array, expected: Array, activations: str, gated: bool = False) -> Verdict:
    """Compare float32 results [m, N] with float64 ones."""
    if not np.isfinite(got).all():
        bad = int((~np.isfinite(got)).sum())
        return Verdict(np.inf, np.inf, f"{bad} of {got.size} results are not finite or not written")
    error = np.abs(got.astype(np.float64) - expected)
    size = np.sqrt((expected**2).mean(axis=1, keepdims=True))
    factor = GATED if gated else 1.0
    share = error / (factor * ELEMENT[activations] * (size + np.abs(expected)) + 1e-30)
    worst = np.unravel_index(int(share.argmax()), share.shape)
    together = float(np.linalg.norm(error) / max(float(np.linalg.norm(expected)), 1e-30))
    fault = None
    if share[worst] > 1.0:
        place = f"token {worst[0]}, output {worst[1]}"
        wrong = int((share > 1.0).sum())
        fault = f"{place} is {got[worst]:.6g}, not {expected[worst]:.6g}; {wrong} are wrong"
    elif together > factor * TOGETHER[activations]:
        fault = f"results are off by {together:.2g} of their norm together"
    return Verdict(float(share[worst]), together, fault)
