"""The packed layout of layers that keep all groups, for 8-bit activations on Arm.

Eight outputs lie side by side, as lanes: four columns of four outputs are a vector. With codes of 4
bits the low halves are those of outputs 0 to 3, and the high ones, less 8, those of outputs 4 to 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.arm.narrow_rows import blocks, stored_rows
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import (
    Array,
    check_parts,
    split_units,
    stored_order,
    units_of,
)
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec

LANES = 8
"""Outputs of a block."""
HALF = 4
"""Outputs of a vector, and the columns that it has of each."""
_HIGH = 8
"""What the codes of outputs 4 to 7 are stored less."""
_HIGH_WORTH = 16
"""What their dot products are multiplied by."""
_SCALE_MAX = 255
_SIGNED_SCALE_MAX = 127


@dataclass(frozen=True)
class DenseRecords:
    """Records of a group of columns of eight rows.

    ====== ======================= ==============================================================
    at     bytes                   what
    ====== ======================= ==============================================================
    0      4 G, or 8 G for 8 bits  codes: 16 bytes for four columns, or 32
    scales 8                       integers c; signed for symmetric layers
    zeros  8                       the zero point; of outputs 4 to 7, 16 times (it less 8); not
                                   for codes of 8 bits, which are signed
    ====== ======================= ==============================================================
    """

    group_size: int
    narrow: bool
    symmetric: bool

    @classmethod
    def of(cls, spec: LinearSpec) -> DenseRecords:
        """Derive a layer's records."""
        return cls(spec.group_size, spec.bits < 8, spec.symmetric)

    @property
    def code_bytes(self) -> int:
        """Bytes of codes."""
        return self.group_size * LANES // (2 if self.narrow else 1)

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return self.code_bytes + LANES * (2 if self.narrow else 1)


def params(spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
    """Describe the packed tensors in the kernel's order."""
    rows = blocks(spec) * (2 if spec.epilogue.gated else 1)
    size = rows * (spec.k // spec.group_size) * DenseRecords.of(spec).size
    return (
        ParamSpec("records", (size,), "uint8"),
        ParamSpec("factors", (rows * LANES,), "float32"),
        ParamSpec("task_units", (config.tasks + 1,), "int32"),
    )


def pack(spec: LinearSpec, config: GenericConfig, parts: Sequence[BSRLayer]) -> dict[str, Array]:
    """Pack folded layers; the tensors are those of `params`.

    Raises
    ------
    CompileError
        The layers do not have the shape, bits, group size or number of groups `spec` says.
    """
    check_parts(spec, parts)
    records = DenseRecords.of(spec)
    groups = spec.k // spec.group_size
    _, source = stored_order(spec, parts)
    codes = np.concatenate([part.codes() for part in parts])[source]
    zeros = np.concatenate([part.zeros() for part in parts])[source]
    scales = np.concatenate([part.scales for part in parts])[source].astype(np.float64)
    codes, zeros, scales = _positive(spec, codes, zeros, scales)
    scales = scales.reshape(spec.n, groups)
    factors = _factors(spec, scales)
    whole = np.rint(scales / factors[:, None]).astype(np.int64)
    order = stored_rows(spec).reshape(-1, LANES)  # gate and up rows are blocks of their own
    # [blocks, lanes, groups, ...] to [blocks, groups, lanes, ...].
    codes = codes.reshape(spec.n, groups, -1)[order].swapaxes(1, 2)
    fields = [_laid_out(records, codes), _as_bytes(whole[order].swapaxes(1, 2))]
    worth = np.ones(LANES)
    if records.narrow:
        zero = zeros.astype(np.int64).reshape(spec.n, groups)[order].swapaxes(1, 2)
        high = (zero[..., HALF:] - _HIGH) * _HIGH_WORTH
        fields.append(_as_bytes(np.concatenate([zero[..., :HALF], high], axis=-1)))
        worth[HALF:] = 1 / _HIGH_WORTH
    units = units_of(spec)
    return {
        "records": np.concatenate(fields, axis=-1).reshape(-1),
        "factors": (factors[order] * worth).astype(np.float32).reshape(-1),
        "task_units": split_units(np.ones(units, np.int64), config.tasks, LANES),
    }


def stored(spec: LinearSpec, part: BSRLayer) -> npt.NDArray[np.float64]:
    """Decode a layer as its packed tensors have it, float64 [N, K]."""
    n, k = part.shape
    codes, zeros, scales = _positive(
        spec, part.codes(), part.zeros(), part.scales.astype(np.float64)
    )
    scales = scales.reshape(n, -1)
    factors = _factors(spec, scales)
    whole = np.rint(scales / factors[:, None]) * factors[:, None]
    values = codes.astype(np.float64) - zeros[:, None]
    return (values.reshape(n, -1, spec.group_size) * whole[:, :, None]).reshape(n, k)


def _positive(
    spec: LinearSpec, codes: Array, zeros: Array, scales: Array
) -> tuple[Array, Array, Array]:
    """Turn groups round whose scale is negative, where there are zero points to do it with."""
    negative = scales < 0
    if spec.symmetric or not negative.any():
        return codes, zeros, scales
    top = np.uint8(15)
    codes = np.where(negative[:, None], top - codes, codes)
    return codes, np.where(negative, top - zeros, zeros), np.abs(scales)


def _factors(spec: LinearSpec, scales: Array) -> npt.NDArray[np.float64]:
    """Return what the integer scales of each row are multiplied by, as float32 has it."""
    limit = _SIGNED_SCALE_MAX if spec.symmetric else _SCALE_MAX
    factors = np.abs(scales).max(1) / limit
    return np.where(factors > 0, factors, 1.0).astype(np.float32).astype(np.float64)


def _laid_out(records: DenseRecords, codes: Array) -> Array:
    """Lay the codes [blocks, groups, lanes, G] out as bytes."""
    fours = codes.reshape(*codes.shape[:3], -1, HALF).swapaxes(2, 3)
    if not records.narrow:
        return (fours ^ np.uint8(128)).reshape(*codes.shape[:2], -1)
    low, high = fours[:, :, :, :HALF], fours[:, :, :, HALF:] ^ np.uint8(_HIGH)
    return np.asarray(low | (high << np.uint8(4))).reshape(*codes.shape[:2], -1)


def _as_bytes(values: Array) -> Array:
    return (values & 255).astype(np.uint8)
