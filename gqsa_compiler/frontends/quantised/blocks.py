"""GGUF's blocks of 32 weights that are codes with one scale: Q4_0, Q4_1 and Q8_0."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gqsa_compiler.frontends.quantised.codes import Codes, Misfit

BLOCK = 32
BLOCK_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""The types that are read here and the bits of a code."""

_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def read_blocks(data: npt.NDArray[np.uint8], kind: str, name: str, where: str) -> Codes:
    """Unpack a matrix.

    Q4_0: ``w = (code - 8) * d``; Q4_1: ``w = code * d + m``, which is ``(code - zero) * d`` where
    ``m`` is minus a whole number of ``d``; Q8_0: ``w = code * d`` with signed codes. The low
    nibbles of a block are its first 16 weights, the high ones the others.

    Parameters
    ----------
    data : uint8 [N, bytes]
        Rows as stored.
    kind : str
        One of `BLOCK_BITS`.
    name, where : str
        The tensor and the model, for messages.

    Raises
    ------
    Misfit
        A Q4_1 block's minimum is no zero point's.
    """
    n = data.shape[0]
    blocks = np.ascontiguousarray(data).reshape(n, -1, _BYTES[kind])
    scales = blocks[:, :, :2].copy().view("<f2")[:, :, 0]
    if kind == "Q8_0":
        codes = blocks[:, :, 2:] ^ np.uint8(0x80)  # signed + 128
        return Codes(codes.reshape(n, -1), scales, None, 8)
    packed = blocks[:, :, -BLOCK // 2 :]
    codes = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).reshape(n, -1)
    if kind == "Q4_0":
        return Codes(codes, scales, None, 4)
    low = blocks[:, :, 2:4].copy().view("<f2")[:, :, 0].astype(np.float32)
    return Codes(codes, scales, _zero_points(scales.astype(np.float32), low, name, where), 4)


def _zero_points(
    scales: npt.NDArray[np.float32], low: npt.NDArray[np.float32], name: str, where: str
) -> npt.NDArray[np.uint8]:
    """Find the zero points, uint8 [N, C], at which ``-zero * scale`` is each block's minimum."""
    safe = np.where(scales == 0, 1, scales)
    zeros = np.clip(np.rint(-low / safe), 0, 15)
    wrong = -zeros * scales != low
    if wrong.any():
        raise Misfit(
            f"{where}: {int(wrong.sum())} of {wrong.size} Q4_1 blocks of {name} have a minimum "
            "that is no whole number of their scale, so that no zero point stands for it; "
            "compress the model instead (gqsa compress)."
        )
    return zeros.astype(np.uint8)
