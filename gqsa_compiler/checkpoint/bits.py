"""Codes of 1 to 8 bits as one little-endian bit stream: code i in bits [i * bits, (i + 1) * bits).

Bit b of a stream is bit b mod 8 of byte b div 8. Eight codes fill `bits` bytes, so both directions
handle eight codes at a time and need no memory beyond their result.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes take."""
    return (count * bits + 7) // 8


def pack_codes(values: Bytes, bits: int) -> Bytes:
    """Pack uint8 [..., n] of 0 .. 2^bits - 1 to uint8 [..., ceil(n * bits / 8)].

    The bits of the last byte that no code fills are 0.
    """
    count = values.shape[-1]
    spare = -count % 8
    if spare:
        values = np.concatenate(
            [values, np.zeros((*values.shape[:-1], spare), np.uint8)], axis=-1, dtype=np.uint8
        )
    units = values.reshape(*values.shape[:-1], values.shape[-1] // 8, 8)
    packed = np.zeros((*units.shape[:-1], bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= units[..., i] << shift  # uint8: what does not fit is cut off
        if shift + bits > 8:
            packed[..., byte + 1] |= units[..., i] >> (8 - shift)
    packed = packed.reshape(*values.shape[:-1], packed.shape[-2] * bits)
    return packed[..., : packed_size(count, bits)]


def unpack_codes(packed: Bytes, bits: int, count: int) -> Bytes:
    """Unpack uint8 [..., ceil(count * bits / 8)] to uint8 [..., count]; inverse of `pack_codes`."""
    spare = -packed.shape[-1] % bits
    if spare:
        packed = np.concatenate(
            [packed, np.zeros((*packed.shape[:-1], spare), np.uint8)], axis=-1, dtype=np.uint8
        )
    units = packed.reshape(*packed.shape[:-1], packed.shape[-1] // bits, bits)
    codes = np.empty((*units.shape[:-1], 8), np.uint8)
    mask = (1 << bits) - 1
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = units[..., byte] >> shift
        if shift + bits > 8:
            code |= units[..., byte + 1] << (8 - shift)
        codes[..., i] = code & mask
    return codes.reshape(*packed.shape[:-1], codes.shape[-2] * 8)[..., :count]
