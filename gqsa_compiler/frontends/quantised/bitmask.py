"""compressed-tensors' sparse storage: ``sparse-24-bitmask`` and ``sparse-bitmask``.

``P.compressed`` holds the values that are not dropped, row by row; ``P.bitmask`` uint8
[N, ceil(K / 8)] has a bit for each weight, lowest first; ``P.shape`` is N, K. Beside them there may
be ``P.weight_scale`` and so on, when the values are codes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.quantised.layer_format import Tensors

_PARTS = ("compressed", "bitmask", "shape", "row_offsets")


class BitmaskTensors:
    """Stored tensors with every sparse ``P.weight`` shown as the dense one that it stands for.

    Parameters
    ----------
    stored : Tensors
    where : str
        The model, for messages.

    Raises
    ------
    ModelError
        A sparse tensor's parts do not go together.
    """

    def __init__(self, stored: Tensors, where: str) -> None:
        self._stored = stored
        self._where = where
        names = set(stored.names)
        layers = [n.removesuffix(".bitmask") for n in stored.names if n.endswith(".bitmask")]
        self._shapes = {f"{layer}.weight": self._shape(layer, names) for layer in layers}
        hidden = {f"{layer}.{part}" for layer in layers for part in _PARTS}
        self.names = (*(n for n in stored.names if n not in hidden), *self._shapes)

    def shape_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """See `Tensors.shape_dtype`."""
        if name not in self._shapes:
            return self._stored.shape_dtype(name)
        layer = name.removesuffix(".weight")
        return self._shapes[name], self._stored.shape_dtype(f"{layer}.compressed")[1]

    def read(self, name: str) -> npt.NDArray[Any]:
        """See `Tensors.read`.

        Raises
        ------
        ModelError
            A mask has another number of bits than there are values.
        """
        if name not in self._shapes:
            return self._stored.read(name)
        layer = name.removesuffix(".weight")
        n, k = self._shapes[name]
        bits = np.unpackbits(self._stored.read(f"{layer}.bitmask"), axis=1, bitorder="little")
        mask = bits[:, :k].astype(bool)
        values = self._stored.read(f"{layer}.compressed").reshape(-1)
        if int(mask.sum()) != values.size:
            raise ModelError(
                f"{self._where}: {layer}.bitmask marks {int(mask.sum())} weights, but "
                f"{layer}.compressed has {values.size}."
            )
        dense = np.zeros(n * k, values.dtype)
        dense[np.flatnonzero(mask)] = values
        return dense.reshape(n, k)

    def _shape(self, layer: str, names: set[str]) -> tuple[int, int]:
        parts = [f"{layer}.{part}" for part in ("compressed", "bitmask", "shape")]
        missing = [name for name in parts if name not in names]
        if missing:
            raise ModelError(f"{self._where} lacks the tensor {missing[0]!r} of a sparse matrix.")
        size, dtype = self._stored.shape_dtype(parts[2])
        whole = dtype in ("I64", "I32") and math.prod(size) == 2
        sizes = self._stored.read(parts[2]).reshape(-1).tolist() if whole else []
        mask, mask_dtype = self._stored.shape_dtype(parts[1])
        if len(sizes) != 2:
            raise ModelError(f"{self._where}: {parts[2]} is not two numbers.")
        n, k = sizes
        if mask_dtype != "U8" or mask != (n, -(-k // 8)) or min(n, k) < 1:
            raise ModelError(
                f"{self._where}: {parts[1]} is {mask_dtype} {list(mask)}, which does not fit a "
                f"matrix of {n} x {k}."
            )
        return n, k
