"""GPTQ: codes packed along the inputs, zero points along the outputs, in the v1 or v2 form.

``P.qweight`` int32 [K * bits / 32, N], ``P.qzeros`` int32 [C, N * bits / 32], ``P.scales`` [C, N],
``P.g_idx`` int32 [K] (the group of each column; may be absent). Each column of qweight and each
row of qzeros is one stream of bits, lowest first, at 3 bits too. Version 1 stores zero points
minus one, version 2 as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.quantised.layer_format import (
    FLOATS,
    ColumnFormat,
    Tensors,
    unpack_columns,
    unpack_rows,
)


@dataclass(frozen=True)
class GPTQSettings:
    """What a GPTQ checkpoint says about itself.

    Parameters
    ----------
    bits : int or None
        Of every layer that `mixed` does not free; None if it does not say.
    group_size : int or None
        -1: one group a row.
    version : int
        1 when zero points are stored minus one, 2 when they are stored as they are.
    wraps : bool
        Version 1 was made by subtracting 0x11111111 (or the like) from whole words, as GPTQModel
        does, so that adding it gives every zero point back.
    act_order : bool
    symmetric : bool
        It says that every zero point is the middle.
    mixed : bool
        Some layers have bits and groups of their own.
    """

    bits: int | None
    group_size: int | None
    version: int
    wraps: bool
    act_order: bool
    symmetric: bool
    mixed: bool

    @classmethod
    def read(cls, fields: Mapping[str, Any], where: str) -> GPTQSettings:
        """Read ``quantization_config`` or ``quantize_config.json``.

        Raises
        ------
        ModelError
            A field has an impossible value, or the layout is another one than GPTQ's own.
        """
        layout = fields.get("checkpoint_format") or fields.get("format") or "gptq"
        if fields.get("is_marlin_format"):
            layout = "marlin"
        if layout not in ("gptq", "gptq_v2"):
            raise ModelError(
                f"{where} is a GPTQ checkpoint packed for {layout!r} kernels; gqsa reads the "
                "layouts 'gptq' and 'gptq_v2', so take the original files."
            )
        if fields.get("rotation"):
            raise ModelError(
                f"{where} is a GPTQ checkpoint with rotated weights ({fields['rotation']!r}), "
                "which gqsa does not read; quantise the model without a rotation."
            )
        numbers: dict[str, int | None] = {}
        for name in ("bits", "group_size"):
            value = fields.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise ModelError(f"{where}: the GPTQ setting {name} is {value!r}, not a number.")
            numbers[name] = value
        meta = fields.get("meta")
        makers = meta.get("quantizer") if isinstance(meta, dict) else None
        return cls(
            bits=numbers["bits"],
            group_size=numbers["group_size"],
            version=1 if layout == "gptq" else 2,
            wraps="gptqmodel" in str(makers).lower(),
            act_order=bool(fields.get("desc_act")),
            symmetric=fields.get("sym") is True,
            mixed=bool(fields.get("dynamic")),
        )


class GPTQFormat(ColumnFormat):
    """The layers of a GPTQ checkpoint; see the module.

    Parameters
    ----------
    tensors : Tensors
    where : str
    settings : GPTQSettings
    """

    kind = "GPTQ"
    optional = ("g_idx",)

    def __init__(self, tensors: Tensors, where: str, settings: GPTQSettings) -> None:
        super().__init__(tensors, where)
        self.settings = settings

    def shape(self, layer: str) -> tuple[int, int]:
        """See `LayerFormat.shape`."""
        rows, n = self.size(layer, "qweight", ("I32",), 2)
        k = self._columns_stored(layer) or self._from_settings(layer, rows)
        bits = rows * 32 / k
        count, scaled = self.size(layer, "scales", FLOATS, 2)
        zeros = self.size(layer, "qzeros", ("I32",), 2)
        if bits != int(bits) or scaled != n or zeros != (count, -(-n * int(bits) // 32)):
            raise self.error(layer, "has tensors of sizes that do not go together")
        said = self.settings
        if not said.mixed and said.bits is not None and said.bits != bits:
            raise self.error(
                layer, f"has codes of {int(bits)} bits, but the settings say {said.bits}"
            )
        size = said.group_size
        if not said.mixed and size is not None and count != (1 if size < 1 else -(-k // size)):
            raise self.error(
                layer, f"has {count} groups in {k} columns, but the settings say {size}"
            )
        return n, k

    def bits(self, layer: str) -> int:
        """See `LayerFormat.bits`."""
        rows = self.size(layer, "qweight", ("I32",), 2)[0]
        return self.check_bits(layer, rows * 32 // self.shape(layer)[1])

    def codes(self, layer: str) -> npt.NDArray[np.uint8]:
        """See `LayerFormat.codes`."""
        words = self.tensors.read(f"{layer}.qweight")
        return unpack_columns(words, self.bits(layer), self.shape(layer)[1])

    def zeros(self, layer: str) -> npt.NDArray[np.uint8] | None:
        """See `LayerFormat.zeros`.

        Raises
        ------
        ModelError
            Version 1 holds a zero point whose increment does not fit: programs read 0, 2^bits or
            its neighbour changed. Or the settings promise others.
        """
        found = self._zeros(layer)
        middle = symmetric_zero(self.bits(layer))
        if self.settings.symmetric and not self.settings.mixed and (found != middle).any():
            raise self.error(
                layer,
                f"has zero points other than {middle}, although the settings say sym: they are "
                "stored in another form than the settings' checkpoint_format; correct the settings",
            )
        return found

    def _zeros(self, layer: str) -> npt.NDArray[np.uint8]:
        n, bits = self.shape(layer)[0], self.bits(layer)
        words = self.tensors.read(f"{layer}.qzeros")
        top = (1 << bits) - 1
        if self.settings.version == 1 and self.settings.wraps and bits != 3:
            ones = sum(1 << shift for shift in range(0, 32, bits))
            whole = words.astype(np.int64) + ones
            return unpack_rows(whole.astype(np.uint32).view(np.int32), bits, n).T
        found = unpack_rows(words, bits, n)
        if self.settings.version == 1:
            if (found == top).any() and not self.settings.wraps:
                raise self.error(
                    layer,
                    f"stores the zero point {top} in the form 'zero minus one', which programs "
                    "read differently; quantise it again as 'gptq_v2', or symmetrically",
                )
            found = (found + np.uint8(1)) & np.uint8(top)
        return found.T

    def columns(self, layer: str) -> npt.NDArray[Any] | None:
        """See `LayerFormat.columns`.

        Raises
        ------
        ModelError
            An index is out of range, or there is an order although desc_act says that there is
            none.
        """
        k, count = self.shape(layer)[1], self.groups(layer)
        size = self.settings.group_size or -1
        if self.settings.mixed or size < 1:
            if k % count:
                raise self.error(layer, f"has {count} groups in {k} columns of no known size")
            size = k // count
        usual = np.arange(k) // size
        runs = None if size * count == k else usual  # a last group that is shorter
        if self._columns_stored(layer) is None:
            if self.settings.act_order:
                raise self.error(
                    layer, "lacks its g_idx, although the settings say desc_act; download it again"
                )
            return runs
        order = self.tensors.read(f"{layer}.g_idx")
        if order.min() < 0 or order.max() >= count:
            raise self.error(layer, f"has a g_idx outside its {count} groups")
        if np.array_equal(order, usual):
            return runs
        if not self.settings.act_order:
            raise self.error(
                layer,
                "has a g_idx that orders its columns, but the settings do not say desc_act: "
                "programs read it differently; correct the settings",
            )
        return order

    def _columns_stored(self, layer: str) -> int | None:
        if not self.has(f"{layer}.g_idx"):
            return None
        return self.size(layer, "g_idx", ("I32", "I64"), 1)[0]

    def _from_settings(self, layer: str, rows: int) -> int:
        bits = self.settings.bits
        if bits is None or bits < 1 or self.settings.mixed or rows * 32 % bits:
            raise self.error(layer, "has no g_idx, and the settings do not tell its bits")
        return rows * 32 // bits
