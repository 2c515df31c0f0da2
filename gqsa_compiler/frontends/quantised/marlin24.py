"""compressed-tensors' ``marlin-24``: 2:4 sparse codes, tiled for one GPU kernel.

``P.weight_packed`` int32 [K / 32, N * bits / 2], ``P.scale_packed`` [C, N], ``P.meta`` int16
[K / 32, 2 N]. The library writes this format and cannot read it; here every step is undone:

1. of four neighbours along K two are kept; the codes, + 2^(bits - 1), become [K / 2, N];
2. they are cut into 16 x 16 tiles, the tiles of a row of tiles one after the other, and each run
   of 1024 is permuted as the tensor cores want it and packed as a stream of bits;
3. the positions of the kept two, 2 bits each, lie 4 pairs to a word of 16 bits in [N, K / 16],
   reordered as CUTLASS stores such a matrix;
4. scales of several groups (where K / 2 > 128) are permuted in runs of 64.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.frontends.quantised.layer_format import (
    FLOATS,
    LayerFormat,
    Tensors,
    unpack_rows,
)
from gqsa_compiler.frontends.quantised.promised import NOTHING, Promised

_TILE = 16
_RUN = 1024
_SCALES = 64
_GROUP = 128
_PAIRS = 4  # of positions, in a word of 16 bits
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


class Marlin24Format(LayerFormat):
    """Layers of ``marlin-24``; see the module.

    Parameters
    ----------
    tensors : Tensors
    where : str
    promised : Promised
    """

    kind = "marlin-24"

    def __init__(self, tensors: Tensors, where: str, promised: Promised = NOTHING) -> None:
        super().__init__(tensors, where)
        self.promised = promised

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """See `LayerFormat.layers`."""
        return self.named("scale_packed")

    def parts(self, layer: str) -> frozenset[str]:
        """See `LayerFormat.parts`."""
        return frozenset(f"{layer}.{part}" for part in ("weight_packed", "scale_packed", "meta"))

    def groups(self, layer: str) -> int:
        """See `LayerFormat.groups`."""
        return self.size(layer, "scale_packed", FLOATS, 2)[0]

    def shape(self, layer: str) -> tuple[int, int]:
        """See `LayerFormat.shape`."""
        rows, width = self.size(layer, "weight_packed", ("I32",), 2)
        count, n = self.size(layer, "scale_packed", FLOATS, 2)
        meta = self.size(layer, "meta", ("I16",), 2)
        k = rows * 2 * _TILE
        whole = n % _SCALES == 0 and rows * _TILE * n % _RUN == 0
        counts = (1, k // _GROUP) if k % _GROUP == 0 else (1,)
        if (
            not whole
            or meta != (rows, 2 * n)
            or 2 * width not in (4 * n, 8 * n)
            or count not in counts
        ):
            raise self.error(layer, "has tensors of sizes that do not go together")
        wrong = self.promised.misfit((n, k), (n, count))
        if wrong is not None:
            raise self.error(layer, wrong)
        return n, k

    def bits(self, layer: str) -> int:
        """See `LayerFormat.bits`."""
        width = self.size(layer, "weight_packed", ("I32",), 2)[1]
        return 2 * width // self.shape(layer)[0]

    def scales(self, layer: str) -> npt.NDArray[Any]:
        """See `LayerFormat.scales`."""
        packed = self.tensors.read(f"{layer}.scale_packed")
        count, n = packed.shape
        if count > 1 and self.shape(layer)[1] // 2 > _GROUP:
            scales = np.empty((packed.size // _SCALES, _SCALES), packed.dtype)
            scales[:, scale_order()] = packed.reshape(-1, _SCALES)
            packed = scales.reshape(count, n)
        return packed.T

    def zeros(self, layer: str) -> npt.NDArray[np.uint8] | None:
        """See `LayerFormat.zeros`."""
        return None

    def codes(self, layer: str) -> npt.NDArray[np.uint8]:
        """See `LayerFormat.codes`.

        Raises
        ------
        ModelError
            Its meta names one position twice.
        """
        n, k = self.shape(layer)
        bits = self.bits(layer)
        stream = unpack_rows(self.tensors.read(f"{layer}.weight_packed"), bits, _TILE * n)
        tiled = np.empty((stream.size // _RUN, _RUN), np.uint8)
        tiled[:, tile_order(bits)] = stream.reshape(-1, _RUN)
        tiles = tiled.reshape(k // 32, n // _TILE, _TILE, _TILE).transpose(0, 2, 1, 3)
        kept = tiles.reshape(k // 2, n).T  # [N, K / 2]

        words = self.tensors.read(f"{layer}.meta").reshape(-1).view(np.uint16)
        ordered = words[meta_order(n, k // 16)].reshape(n, k // 16, 1)
        shifts = 2 * np.arange(2 * _PAIRS, dtype=np.uint16)
        places = (ordered >> shifts & 3).reshape(n, k // 4, 2)
        if (places[:, :, 0] == places[:, :, 1]).any():
            raise self.error(layer, "has a meta that names one position twice")
        codes = np.full((n, k // 4, 4), symmetric_zero(bits), np.uint8)
        np.put_along_axis(codes, places.astype(np.int64), kept.reshape(n, k // 4, 2), axis=2)
        return codes.reshape(n, k)


def tile_order(bits: int) -> npt.NDArray[np.int64]:
    """Return where each of a run's 1024 packed codes lies in four 16 x 16 tiles, [1024].

    Thread i of 32 holds two rows' worth of four rows of the fragment, for each of 4 columns in
    turn; neighbours in a word are interleaved.
    """
    order = []
    for thread in range(32):
        column = thread // 4
        corner = column // 2 * 256 + 8 * (column % 2)
        rows = [2 * (thread % 4) + step for step in (0, 1, 8, 9)]
        for shift in range(4):
            order += [16 * row + corner + 4 * block + shift for block in (0, 1) for row in rows]
    interleave = list(_INTERLEAVE[bits])
    return np.array(order).reshape(-1, len(interleave))[:, interleave].reshape(-1)


def scale_order() -> npt.NDArray[np.int64]:
    """Return which of 64 scales lies where, [64]."""
    return np.array([8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)])


def meta_order(rows: int, columns: int) -> npt.NDArray[np.int64]:
    """Return where each word of a matrix of positions is stored, [rows * columns].

    CUTLASS reorders the rows within 32, swaps the off-diagonal words of each 2 x 2 block and
    stores pairs of columns together.
    """
    row, column = np.indices((rows, columns))
    new = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 32 % 4 // 2 * 32 + row % 64 // 8 * 4
    swap = (new % 2 == 0) & (column % 2 == 1)
    back = (new % 2 == 1) & (column % 2 == 0)
    new = new + swap - back
    column = column - swap.astype(np.int64) + back
    return (column // 2 * rows * 2 + new * 2 + column % 2).reshape(-1)
