"""compressed-tensors: packed codes (``pack-quantized``) and codes a byte each (``int-quantized``).

Packed: ``P.weight_packed`` int32 [N, ceil(K * bits / 32)], each row a stream of bits of code
``q + 2^(bits - 1)``; ``P.weight_scale`` [N, C]; ``P.weight_shape`` [2]; ``P.weight_zero_point``
int32 [ceil(N * bits / 32), C], packed along the outputs, absent when symmetric;
``P.weight_g_idx`` [K] with an activation order. In older releases a code of 3 bits did not
straddle words: ten to a word. A byte each: ``P.weight`` int8 [N, K] and
``P.weight_zero_point`` int8 [N, C].
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.quantised.layer_format import (
    FLOATS,
    LayerFormat,
    Tensors,
    unpack_rows,
)
from gqsa_compiler.frontends.quantised.promised import NOTHING, Promised

_FORMATS = frozenset(
    {
        "pack-quantized",
        "int-quantized",
        "naive-quantized",
        "marlin-24",
        "sparse-24-bitmask",
        "sparse-bitmask",
        "mixed-precision",
        "dense",
    }
)


def weight_bits(fields: Mapping[str, Any], where: str) -> frozenset[int]:
    """Return the numbers of bits that ``quantization_config`` names for weights.

    Raises
    ------
    ModelError
        The format or the kind of numbers is one that gqsa does not read.
    """
    layout = fields.get("format")
    if layout is not None and (not isinstance(layout, str) or layout not in _FORMATS):
        raise _unread(where, f"in the format {layout!r}")
    if fields.get("transform_config"):
        raise _unread(where, "with transforms (transform_config)")
    groups = fields.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ModelError(f"{where}: the config_groups of its quantization_config are no objects.")
    found = set()
    for name, group in groups.items():
        layout = group.get("format")
        if layout is not None and (not isinstance(layout, str) or layout not in _FORMATS):
            raise _unread(where, f"with layers in the format {layout!r}")
        weights = group.get("weights")
        if not isinstance(weights, dict):
            continue
        bits = weights.get("num_bits")
        if weights.get("type", "int") != "int":
            raise _unread(where, f"with {bits}-bit {weights['type']} weights")
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ModelError(f"{where}: {name} of its quantization_config has num_bits {bits!r}.")
        found.add(bits)
    return frozenset(found)


def _unread(where: str, what: str) -> ModelError:
    return ModelError(
        f"{where} is a compressed-tensors checkpoint {what}; gqsa reads integer weights "
        "(pack-quantized, int-quantized, marlin-24, sparse-24-bitmask). "
        "Start from the model it was made from."
    )


class _Scaled(LayerFormat):
    """What both forms share: the scales.

    Parameters
    ----------
    tensors : Tensors
    where : str
    named_bits : frozenset of int
        What the configuration names; empty if it names none.
    promised : Promised
    """

    kind = "compressed-tensors"

    def __init__(
        self,
        tensors: Tensors,
        where: str,
        named_bits: frozenset[int],
        promised: Promised = NOTHING,
    ) -> None:
        super().__init__(tensors, where)
        self.named_bits = named_bits
        self.promised = promised

    def has_zero_points(self, layer: str) -> bool:
        """Say whether a layer is asymmetric."""
        found = self.has(f"{layer}.weight_zero_point")
        if not found and self.promised.zero_points:
            raise self.error(
                layer,
                "lacks its weight_zero_point, although the settings say that it is not "
                "symmetric; download it again",
            )
        return found

    def groups(self, layer: str) -> int:
        """See `LayerFormat.groups`."""
        return self._scale_shape(layer)[1]

    def scales(self, layer: str) -> npt.NDArray[Any]:
        """See `LayerFormat.scales`."""
        array = self.tensors.read(f"{layer}.weight_scale")
        n = self.shape(layer)[0]
        return np.broadcast_to(array.reshape(self._scale_shape(layer)), (n, self.groups(layer)))

    def _scale_shape(self, layer: str) -> tuple[int, int]:
        """Return the scales' shape; a single one for the whole tensor is [1, 1]."""
        name = f"{layer}.weight_scale"
        rank = len(self.tensors.shape_dtype(name)[0]) if self.has(name) else 2
        shape = self.size(layer, "weight_scale", FLOATS, rank)
        if rank > 2 or (rank < 2 and shape not in ((), (1,))):
            raise self.error(layer, f"has a weight_scale of shape {list(shape)}")
        return (shape[0], shape[1]) if rank == 2 else (1, 1)

    def _check_scales(self, layer: str, n: int, k: int) -> None:
        rows, count = self._scale_shape(layer)
        if rows not in (1, n) or count > k:
            raise self.error(layer, "has tensors of sizes that do not go together")
        wrong = self.promised.misfit((n, k), (rows, count))
        if wrong is not None:
            raise self.error(layer, wrong)


class PackedFormat(_Scaled):
    """Layers of ``pack-quantized``; see the module."""

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """See `LayerFormat.layers`."""
        packed = self.named("weight_packed")
        return tuple(layer for layer in packed if not self.has(f"{layer}.scale_packed"))

    def parts(self, layer: str) -> frozenset[str]:
        """See `LayerFormat.parts`."""
        names = ("packed", "scale", "shape", "zero_point", "g_idx")
        return frozenset(f"{layer}.weight_{name}" for name in names)

    def shape(self, layer: str) -> tuple[int, int]:
        """See `LayerFormat.shape`."""
        rows, _ = self.size(layer, "weight_packed", ("I32",), 2)
        if self.size(layer, "weight_shape", ("I64", "I32"), 1) != (2,):
            raise self.error(layer, "has a weight_shape that is not two numbers")
        n, k = (int(size) for size in self.tensors.read(f"{layer}.weight_shape"))
        if n != rows or not 1 <= k < 2**31:
            raise self.error(layer, "has tensors of sizes that do not go together")
        self._check_scales(layer, n, k)
        return n, k

    def bits(self, layer: str) -> int:
        """See `LayerFormat.bits`."""
        return self._packing(layer)[0]

    def _packing(self, layer: str) -> tuple[int, bool]:
        """Return the bits of a code, and whether codes straddle words."""
        width = self.size(layer, "weight_packed", ("I32",), 2)[1]
        k = self.shape(layer)[1]
        known = sorted(self.named_bits) or range(1, 9)
        ways = [(bits, True) for bits in known if width == _words(k, bits, straddle=True)]
        if not ways:
            ways = [(bits, False) for bits in known if width == _words(k, bits, straddle=False)]
        bits = ways[0][0] if ways else 0
        same = bits and 32 % bits and width == _words(k, bits, straddle=not ways[0][1])
        if len(ways) != 1 or same:
            said = ", ".join(map(str, known))
            raise self.error(
                layer, f"packs {k} codes into {width} words, which does not tell its bits ({said})"
            )
        return self.check_bits(layer, bits), ways[0][1]

    def zeros(self, layer: str) -> npt.NDArray[np.uint8] | None:
        """See `LayerFormat.zeros`."""
        if not self.has_zero_points(layer):
            return None
        n, (bits, straddle) = self.shape(layer)[0], self._packing(layer)
        size = self.size(layer, "weight_zero_point", ("I32",), 2)
        if size != (_words(n, bits, straddle=straddle), self.groups(layer)):
            raise self.error(layer, "has a weight_zero_point of another size than its scales")
        words = self.tensors.read(f"{layer}.weight_zero_point").T
        return _unpack(words, bits, n, straddle=straddle).T

    def codes(self, layer: str) -> npt.NDArray[np.uint8]:
        """See `LayerFormat.codes`."""
        words = self.tensors.read(f"{layer}.weight_packed")
        bits, straddle = self._packing(layer)
        return _unpack(words, bits, self.shape(layer)[1], straddle=straddle)

    def columns(self, layer: str) -> npt.NDArray[Any] | None:
        """See `LayerFormat.columns`."""
        if not self.has(f"{layer}.weight_g_idx"):
            if self.promised.order:
                raise self.error(
                    layer,
                    "lacks its weight_g_idx, although the settings say actorder; download it again",
                )
            return None
        size = self.size(layer, "weight_g_idx", ("I32", "I64"), 1)[0]
        order = self.tensors.read(f"{layer}.weight_g_idx")
        if size == self.shape(layer)[1] and (order == -1).all():
            return None  # how the library marks an order that is not there
        if size != self.shape(layer)[1] or order.min() < 0 or order.max() >= self.groups(layer):
            raise self.error(layer, "has a weight_g_idx that does not fit its columns and groups")
        return order


class IntegerFormat(_Scaled):
    """Layers of ``int-quantized``: a byte a code; see the module."""

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """See `LayerFormat.layers`."""
        scaled = self.named("weight_scale")
        return tuple(
            layer
            for layer in scaled
            if self.has(f"{layer}.weight")
            and self.tensors.shape_dtype(f"{layer}.weight")[1] == "I8"
        )

    def parts(self, layer: str) -> frozenset[str]:
        """See `LayerFormat.parts`."""
        names = ("weight", "weight_scale", "weight_zero_point")
        return frozenset(f"{layer}.{name}" for name in names)

    def shape(self, layer: str) -> tuple[int, int]:
        """See `LayerFormat.shape`."""
        n, k = self.size(layer, "weight", ("I8",), 2)
        self._check_scales(layer, n, k)
        return n, k

    def bits(self, layer: str) -> int:
        """See `LayerFormat.bits`."""
        return self.check_bits(layer, max(self.named_bits)) if self.named_bits else 8

    def zeros(self, layer: str) -> npt.NDArray[np.uint8] | None:
        """See `LayerFormat.zeros`."""
        if not self.has_zero_points(layer):
            return None
        rank = len(self.tensors.shape_dtype(f"{layer}.weight_zero_point")[0])
        shape = self.size(layer, "weight_zero_point", ("I8",), rank)
        if shape != self.tensors.shape_dtype(f"{layer}.weight_scale")[0]:
            raise self.error(layer, "has a weight_zero_point of another size than its scales")
        points = self._shifted(layer, "weight_zero_point").reshape(self._scale_shape(layer))
        n = self.shape(layer)[0]
        return np.broadcast_to(points, (n, self.groups(layer)))

    def codes(self, layer: str) -> npt.NDArray[np.uint8]:
        """See `LayerFormat.codes`."""
        return self._shifted(layer, "weight")

    def _shifted(self, layer: str, part: str) -> npt.NDArray[np.uint8]:
        """Read signed numbers as 0 to 2^bits - 1."""
        half = 1 << (self.bits(layer) - 1)
        signed = self.tensors.read(f"{layer}.{part}")
        if signed.min() < -half or signed.max() >= half:
            raise self.error(layer, f"has numbers outside {self.bits(layer)} bits in its {part}")
        return (signed.astype(np.int16) + half).astype(np.uint8)


def _words(count: int, bits: int, *, straddle: bool) -> int:
    """Return the words that `count` codes take."""
    return -(-count * bits // 32) if straddle else -(-count // (32 // bits))


def _unpack(
    words: npt.NDArray[Any], bits: int, count: int, *, straddle: bool
) -> npt.NDArray[np.uint8]:
    """Unpack int32 [R, W] to uint8 [R, count]."""
    if straddle:
        return unpack_rows(words, bits, count)
    rows, width = words.shape
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * bits
    values = words.astype(np.int64).astype(np.uint32)[:, :, None] >> shifts
    return (values & ((1 << bits) - 1)).astype(np.uint8).reshape(rows, width * each)[:, :count]
