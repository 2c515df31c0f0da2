"""The language-model head, rounded to 8 bits when a compressed model is compiled.

Where compression has left it alone: a small model's is a quarter of its weights, and in float16 a
token would spend half of its time there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.limits import GROUP_SIZES

BITS = 8
GROUP_SIZE = 64
"""The largest group, where it divides the input features."""
_ROWS = 4096
_ZERO = 1 << (BITS - 1)
_TINY = 2.0**-24
"""The smallest positive float16."""


def group_size(features: int) -> int | None:
    """Choose the group size for a number of input features; None if none divides it."""
    sizes = [size for size in GROUP_SIZES if size <= GROUP_SIZE and features % size == 0]
    return max(sizes, default=None)


def round_weight(name: str, weight: npt.NDArray[Any], size: int) -> BSRLayer:
    """Round a matrix to signed 8-bit codes, every group with its own scale.

    The scale is the group's largest magnitude / 127, as float16; codes are rounded half to even.

    Parameters
    ----------
    name : str
        The layer's.
    weight : float [N, K]
        Finite, and below 127 * 65504 in magnitude.
    size : int
        G; divides K.

    Returns
    -------
    BSRLayer
        Symmetric, with all groups.
    """
    n, k = weight.shape
    groups = k // size
    codes = np.empty((n * groups, size), np.uint8)
    scales = np.empty(n * groups, np.float16)
    for start in range(0, n, _ROWS):
        rows = weight[start : start + _ROWS].astype(np.float32).reshape(-1, size)
        here = slice(start * groups, start * groups + len(rows))
        scales[here] = np.maximum(np.abs(rows).max(1) / np.float32(127), np.float32(_TINY))
        rounded = np.rint(rows / scales[here].astype(np.float32)[:, None])
        codes[here] = np.clip(rounded, -127, 127).astype(np.int16) + _ZERO
    indptr = np.arange(n + 1, dtype=np.int64) * groups
    indices = np.tile(np.arange(groups, dtype=np.uint16), n)
    return BSRLayer(name, (n, k), size, indptr.astype(np.int32), indices, codes, scales, None, BITS)
