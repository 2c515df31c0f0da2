"""AWQ in the GEMM order: 4-bit codes packed along the outputs, eight a word, interleaved.

``P.qweight`` int32 [K, N / 8], ``P.qzeros`` int32 [C, N / 8], ``P.scales`` [C, N]. Nibble i of a
word, lowest first, is output ``8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[i]``. Zero points are stored as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.quantised.layer_format import (
    FLOATS,
    ColumnFormat,
    Tensors,
    unpack_rows,
)

_BITS = 4
_WORD = 8
# Which nibble of a word holds outputs 0 to 7.
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def awq_group_size(fields: Mapping[str, Any], where: str) -> int | None:
    """Check that ``quantization_config`` or ``quant_config.json`` says what this module reads.

    Returns
    -------
    int or None
        The group size that it names, -1 for one group a row; None if it names none.

    Raises
    ------
    ModelError
        The layout or the number of bits is another one.
    """
    version = str(fields.get("version") or fields.get("format") or "gemm").lower()
    if version != "gemm":
        raise ModelError(
            f"{where} is an AWQ checkpoint in the layout {version!r}; gqsa reads 'gemm', so take "
            "such a version of the model."
        )
    bits = fields.get("bits", fields.get("w_bit", _BITS))
    if bits != _BITS:
        raise ModelError(
            f"{where} is an AWQ checkpoint of {bits!r} bits; the format is defined for {_BITS}."
        )
    size = fields.get("group_size", fields.get("q_group_size"))
    if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
        raise ModelError(f"{where}: the AWQ setting group_size is {size!r}, not a number.")
    return size


class AWQFormat(ColumnFormat):
    """The layers of an AWQ checkpoint; see the module.

    Parameters
    ----------
    tensors : Tensors
    where : str
    group_size : int or None
        What `awq_group_size` says.
    """

    kind = "AWQ"

    def __init__(self, tensors: Tensors, where: str, group_size: int | None) -> None:
        super().__init__(tensors, where)
        self.group_size = group_size

    def shape(self, layer: str) -> tuple[int, int]:
        """See `LayerFormat.shape`."""
        k, words = self.size(layer, "qweight", ("I32",), 2)
        count, n = self.size(layer, "scales", FLOATS, 2)
        zeros = self.size(layer, "qzeros", ("I32",), 2)
        if n != words * _WORD or zeros != (count, words) or k % count:
            raise self.error(layer, "has tensors of sizes that do not go together")
        size = self.group_size
        if size is not None and count * (size if size > 0 else k) != k:
            raise self.error(
                layer, f"has {count} groups in {k} columns, but the settings say {size}"
            )
        return n, k

    def bits(self, layer: str) -> int:
        """See `LayerFormat.bits`."""
        return _BITS

    def zeros(self, layer: str) -> npt.NDArray[np.uint8] | None:
        """See `LayerFormat.zeros`."""
        return _unpack(self.tensors.read(f"{layer}.qzeros"))

    def codes(self, layer: str) -> npt.NDArray[np.uint8]:
        """See `LayerFormat.codes`."""
        return _unpack(self.tensors.read(f"{layer}.qweight"))


def _unpack(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Unpack int32 [R, N / 8] to uint8 [N, R]."""
    rows, count = words.shape
    nibbles = unpack_rows(words, _BITS, count * _WORD).reshape(rows, count, _WORD)
    return np.ascontiguousarray(nibbles[:, :, _NIBBLES].reshape(rows, count * _WORD).T)
