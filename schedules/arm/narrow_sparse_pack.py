"""The packed layout of sparse layers with 8-bit activations on Arm: rows in order of their scales.

A row's sum is that of c_p D_p: the integer scales of its groups times their dot products. With the
running sums S_p = D_0 + ... + D_p it is also that of (c_p - c_(p+1)) S_p, so that no sum has to
begin at zero. In descending order of the scales these differences are small and not negative: a
byte each, whatever the scales are. They are those of activations that were divided by
`input_factors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.arm.input_factors import input_factors
from gqsa_compiler.schedules.arm.narrow_rows import blocks, stored_rows
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import (
    ROW_COST,
    Array,
    check_parts,
    split_units,
    stored_order,
    units_of,
)
from gqsa_compiler.schedules.records.layout import output_block
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec

ZERO = 8
"""What codes of 4 bits are stored less: as signed nibbles."""
CODE_WORTH = 16
"""A nibble is multiplied where it is: in the high half of a byte."""
_STEP_MAX = 254
"""The largest difference of two scales before they are rounded: after it, 255."""
_SUM_MAX = 2**30
"""Of all of a row's products; sums of differences times running sums are at most twice as large."""
_INPUT_MAX = 128
TOGETHER = 4
"""Units that share a record where a row has as many left."""
_VECTOR = 16
_LANES = 4


@dataclass(frozen=True)
class SparseRecords:
    """Records of a unit of groups; four units that follow each other share one.

    ======== ========================================== =======================================
    at       bytes, for one unit; four times for four    what
    ======== ========================================== =======================================
    0        groups * G / 2                             codes: vectors of 16 bytes, whose low
                                                        halves come before their high ones
    steps    groups                                     c_p - c_(p+1), unsigned
    columns  groups, or twice as many                   the column group, of 8 bits, or of 16
                                                        where there are more than 256
    ======== ========================================== =======================================

    Parameters
    ----------
    group_size : int
        A multiple of 16.
    k : int
    """

    group_size: int
    k: int

    @classmethod
    def of(cls, spec: LinearSpec) -> SparseRecords:
        """Derive a layer's records."""
        return cls(spec.group_size, spec.k)

    @property
    def groups(self) -> int:
        """Groups of a unit: what 32 bytes of codes are, or one."""
        return max(1, 64 // self.group_size)

    @property
    def index_bytes(self) -> int:
        """Bytes of a column group."""
        return 1 if self.k // self.group_size <= 256 else 2

    @property
    def size(self) -> int:
        """Bytes of a unit."""
        return self.groups * (self.group_size // 2 + 1 + self.index_bytes)

    def steps_at(self, units: int) -> int:
        """Where the steps of a record of so many units begin."""
        return units * self.groups * self.group_size // 2

    def columns_at(self, units: int) -> int:
        """Where the column groups of a record of so many units begin."""
        return self.steps_at(units) + units * self.groups


def zero_words(spec: LinearSpec) -> int:
    """Count the fours of column groups of a row."""
    return -(-(spec.k // spec.group_size) // _VECTOR) * _VECTOR // _LANES


def zero_lanes(spec: LinearSpec) -> int:
    """Count the outputs whose zero points lie side by side."""
    return max(_LANES, output_block(spec))


def params(spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
    """Describe the packed tensors in the kernel's order."""
    rows = 2 if spec.epilogue.gated else 1
    zeros = blocks(spec) * rows * zero_words(spec) * zero_lanes(spec) * _LANES
    return (
        ParamSpec("records", (None,), "uint8"),
        ParamSpec("row_starts", (spec.n + 1,), "int32"),
        ParamSpec("factors", (spec.n,), "float32"),
        ParamSpec("zeros", (zeros,), "int8"),
        ParamSpec("zero_factors", (spec.n,), "float32"),
        ParamSpec("inverse_inputs", (spec.k // spec.group_size,), "float32"),
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
    groups = _Groups.of(spec, parts)
    records = SparseRecords.of(spec)
    factors = groups.factors(spec)
    scales = groups.rounded(factors)
    counts = np.bincount(groups.rows, minlength=spec.n)
    units = -(-counts // records.groups)
    row_starts = np.concatenate([[0], np.cumsum(units)])
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    # A unit's missing groups have codes of 0 and steps of 0.
    place = row_starts[groups.rows] * records.groups + np.arange(len(scales)) - first[groups.rows]
    total = int(row_starts[-1]) * records.groups
    following = np.append(scales[1:], 0)
    following[np.flatnonzero(np.diff(groups.rows, append=-1))] = 0

    def scattered(values: Array, dtype: npt.DTypeLike) -> Array:
        result = np.zeros((total, *values.shape[1:]), dtype)
        result[place] = values
        return result

    codes = scattered(groups.codes ^ np.uint8(ZERO), np.uint8)
    steps = scattered(scales - following, np.uint8)
    columns = scattered(groups.columns, f"<u{records.index_bytes}")
    block = output_block(spec)
    costs = (counts + ROW_COST).reshape(units_of(spec), -1).sum(1)
    zeros, zero_factors = _zeros(spec, groups)
    return {
        "records": _interleaved(records, codes, steps, columns, row_starts),
        "row_starts": row_starts.astype(np.int32),
        "factors": (factors / CODE_WORTH).astype(np.float32),
        "zeros": zeros,
        "zero_factors": zero_factors,
        "inverse_inputs": (1 / groups.inputs).astype(np.float32),
        "task_units": split_units(costs, config.tasks, block),
    }


def stored(spec: LinearSpec, part: BSRLayer) -> npt.NDArray[np.float64]:
    """Decode a layer as its packed tensors have it, float64 [N, K]."""
    weights, offsets = stored_parts(spec, part)
    factors = np.repeat(input_factors([part]), spec.group_size)
    return (weights - np.repeat(offsets, spec.group_size, axis=1)) / factors


def stored_parts(
    spec: LinearSpec, part: BSRLayer
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Decode what activations are multiplied by, and what sums of them over groups are.

    Returns
    -------
    (float64 [N, K], float64 [N, K/G])
        The first less the second, repeated for each group's columns, is the layer times
        `input_factors`.
    """
    n, k = part.shape
    own = LinearSpec(n, k, "bsr", spec.weight_dtype, spec.group_size, part.nnz)
    groups = _Groups.of(own, [part])
    factors = groups.factors(own)
    scales = groups.rounded(factors) * factors[groups.rows]
    dense = np.zeros((n, k // spec.group_size, spec.group_size))
    dense[groups.rows, groups.columns] = (groups.codes.astype(np.float64) - ZERO) * scales[:, None]
    offsets, steps = _offsets(own, groups)
    return dense.reshape(n, k), offsets * steps[:, None]


@dataclass(frozen=True)
class _Groups:
    """All groups, row by row in descending order of their scales, which are at least 0.

    Parameters
    ----------
    rows, columns : int64 [nnz]
        The stored row, and the column group.
    codes : uint8 [nnz, G]
    zeros : int64 [nnz]
    scales : float64 [nnz]
        Times `inputs`.
    inputs : float64 [K/G]
        What activations are divided by.
    """

    rows: Array
    columns: Array
    codes: Array
    zeros: Array
    scales: Array
    inputs: Array

    @classmethod
    def of(cls, spec: LinearSpec, parts: Sequence[BSRLayer]) -> _Groups:
        """Line up the groups of folded layers."""
        starts, source = stored_order(spec, parts)
        rows = np.repeat(np.arange(spec.n), np.diff(starts))
        columns = np.concatenate([part.indices for part in parts])[source].astype(np.int64)
        inputs = input_factors(parts)
        scales = np.concatenate([part.scales for part in parts])[source] * inputs[columns]
        order = np.lexsort((-np.abs(scales), rows))
        source, scales, columns = source[order], scales[order], columns[order]
        codes = np.concatenate([part.codes() for part in parts])[source]
        zeros = np.concatenate([part.zeros() for part in parts])[source].astype(np.int64)
        # A negative scale turns its group round.
        negative, top = scales < 0, 2 * ZERO - 1
        codes = np.where(negative[:, None], np.uint8(top) - codes, codes)
        zeros = np.where(negative, top - zeros, zeros)
        return cls(rows, columns, codes, zeros, np.abs(scales), inputs)

    def factors(self, spec: LinearSpec) -> npt.NDArray[np.float64]:
        """Return what the integer scales of each row are multiplied by, float64 [N].

        It is as small as differences of a byte allow, and sums of 32 bits for any inputs.
        """
        following = np.append(self.scales[1:], 0.0)
        following[np.flatnonzero(np.diff(self.rows, append=-1))] = 0.0
        largest = np.zeros(spec.n)
        np.maximum.at(largest, self.rows, (self.scales - following) / _STEP_MAX)
        # Lane i of a sum has columns 4j + i .. of each four, of every vector of 16.
        vectors = spec.group_size // _VECTOR
        sizes = np.abs(self.codes.astype(np.int64) - ZERO)
        sizes = sizes.reshape(len(self.rows), vectors, _LANES, 4)
        lanes = sizes.sum(3).sum(1).max(1) * self.scales
        sums = np.bincount(self.rows, lanes, spec.n) * (_INPUT_MAX * CODE_WORTH * 1.01)
        factors = np.maximum(largest, sums / _SUM_MAX)
        # As float32 has them, which the kernel multiplies by.
        return np.where(factors > 0, factors, 1.0).astype(np.float32).astype(np.float64)

    def rounded(self, factors: Array) -> npt.NDArray[np.int64]:
        """Return the integer scales, int64 [nnz]."""
        return np.rint(self.scales / factors[self.rows]).astype(np.int64)


def _interleaved(
    records: SparseRecords, codes: Array, steps: Array, columns: Array, row_starts: Array
) -> Array:
    """Write records: of `TOGETHER` units each, and of one where a row has fewer left."""
    units = int(row_starts[-1])
    per_unit = records.groups
    halves = codes.reshape(units, per_unit * records.group_size // (2 * _VECTOR), 2, _VECTOR)
    packed = (halves[:, :, 0] & 15) | (halves[:, :, 1] << np.uint8(4))
    fields = [
        packed.reshape(units, per_unit * records.group_size // 2),
        steps.reshape(units, per_unit),
        columns.view(np.uint8).reshape(units, per_unit * records.index_bytes),
    ]
    out = np.zeros((max(units, 1), records.size), np.uint8)
    lengths = np.diff(row_starts)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    number = np.arange(units) - row_starts[rows]
    within = number % TOGETHER
    together = number - within + TOGETHER <= lengths[rows]
    flat = out.reshape(-1)
    at = 0
    for field in fields:
        width = field.shape[1]
        alone = np.arange(units) * records.size + at
        # In a shared record a field of the first unit lies before that of the second.
        shared = (np.arange(units) - within) * records.size + TOGETHER * at + within * width
        where = np.where(together, shared, alone)
        flat[(where[:, None] + np.arange(width)).reshape(-1)] = field.reshape(-1)
        at += width
    return flat


def _offsets(spec: LinearSpec, groups: _Groups) -> tuple[Array, npt.NDArray[np.float64]]:
    """Return scales times zero points as bytes [N, K/G], and the step of each row's, float64."""
    dense = np.zeros((spec.n, spec.k // spec.group_size))
    dense[groups.rows, groups.columns] = groups.scales * (groups.zeros - ZERO)
    steps = (np.abs(dense).max(1) / 127).astype(np.float32).astype(np.float64)
    safe = np.where(steps > 0, steps, 1.0)
    return np.rint(dense / safe[:, None]).astype(np.int8), steps


def _zeros(spec: LinearSpec, groups: _Groups) -> tuple[Array, npt.NDArray[np.float32]]:
    """Lay the offsets out: fours of column groups, the outputs of a block side by side."""
    offsets, steps = _offsets(spec, groups)
    wide = np.zeros((spec.n, zero_words(spec) * _LANES), np.int8)
    wide[:, : offsets.shape[1]] = offsets
    rows = stored_rows(spec)  # [blocks, parts, outputs]
    lanes = np.zeros((*rows.shape[:2], zero_lanes(spec), wide.shape[1]), np.int8)
    lanes[:, :, : rows.shape[2]] = wide[rows]
    fours = lanes.reshape(*lanes.shape[:3], -1, _LANES).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(fours).reshape(-1), steps.astype(np.float32)
