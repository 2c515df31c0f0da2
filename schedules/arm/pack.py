"""The packed layout of the Arm BSR kernels: records, and a constant a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer, symmetric_zero
from gqsa_compiler.schedules.arm.dot import BIAS
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import Array
from gqsa_compiler.schedules.records import layout as shared
from gqsa_compiler.schedules.records.layout import Records
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec

_ZERO = 128
_AT_ONCE = 1 << 16
"""Records that are read back together, to need little memory."""


def signed_codes(records: Records) -> bool:
    """Say whether codes are stored less their zero point: symmetric ones of 8 bits, signed."""
    return records.chunks.bits == 8 and records.symmetric


def params(spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
    """Describe the packed tensors in the kernel's order."""
    return (
        ParamSpec("constants", (spec.n,), "float32"),
        *Records.of(spec).params(spec, config),
    )


def pack(spec: LinearSpec, config: GenericConfig, parts: Sequence[BSRLayer]) -> dict[str, Array]:
    """Pack folded layers; the tensors are those of `params`.

    Raises
    ------
    CompileError
        The layers do not have the shape, bits, group size or number of groups `spec` says.
    """
    packed = shared.pack(spec, config, parts)
    result = {"constants": constants(spec, packed), **packed}
    records = Records.of(spec)
    if signed_codes(records):
        units = result["records"].reshape(-1, records.size)
        units[:, : records.scales_at] ^= np.uint8(_ZERO)
    return result


def constants(spec: LinearSpec, packed: dict[str, Array]) -> npt.NDArray[np.float32]:
    """Return 128 times the sum of each stored row's weights: what biased low bytes leave out.

    They are read back from the records, so that they go with the scales as those have them.
    """
    records = Records.of(spec)
    units = packed["records"].reshape(-1, records.size)
    if records.full:
        starts = np.arange(spec.n + 1) * records.row_units(spec)
    else:
        starts = packed["row_starts"].astype(np.int64)
    sums = np.zeros(len(units) + 1)
    for first in range(0, len(units), _AT_ONCE):
        some = units[first : first + _AT_ONCE]
        sums[first : first + len(some)] = _sums(spec, records, some)
    rows = np.add.reduceat(sums, starts[:-1])
    rows[starts[:-1] == starts[1:]] = 0.0  # a row of none: reduceat takes its neighbour's first
    factors = packed.get("factors", np.ones(spec.n, np.float32))
    return (rows * factors * BIAS).astype(np.float32)


def _sums(spec: LinearSpec, records: Records, units: Array) -> npt.NDArray[np.float64]:
    """Sum the weights of each record, without the rows' factors."""
    chunks, count = records.chunks, records.chunks.groups
    raw = units[:, : records.scales_at].reshape(len(units), chunks.chunks, 1, chunks.lanes)
    shifts = np.arange(0, 8, chunks.bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    codes = (raw >> shifts) & np.uint8((1 << chunks.bits) - 1)
    groups = codes.reshape(len(units), count, -1).sum(-1, dtype=np.int64)
    bytes_ = np.ascontiguousarray(units[:, records.scales_at : records.steps_at])
    if records.half_scales:
        scales = bytes_.view(np.float16).astype(np.float64)
    elif records.symmetric:
        signed = bytes_.view(np.int8).astype(np.float64)
        scales = signed * np.abs(signed)
    else:
        scales = bytes_.astype(np.float64) ** 2
    zeros = _zeros(spec, records, units)
    return ((groups - chunks.group_size * zeros) * scales).sum(1)


def _zeros(spec: LinearSpec, records: Records, units: Array) -> npt.NDArray[np.int64]:
    count = records.chunks.groups
    if records.symmetric:
        return np.full((1, count), symmetric_zero(spec.bits), np.int64)
    if records.zeros_in_steps:
        return (units[:, records.steps_at : records.zeros_at] & 15).astype(np.int64)
    own = units[:, records.zeros_at :]
    if records.zero_bytes < count or records.chunks.bits < 8:
        own = np.concatenate([own & 15, own >> 4], axis=1)[:, :count]
    return own.astype(np.int64)
