"""The packed layout of the x86 and Arm BSR kernels (docs/kernels.md specifies it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.generic.layout import (
    CODE_BITS,
    ROW_COST,
    Array,
    check_parts,
    split_units,
    stored_order,
    units_of,
)
from gqsa_compiler.schedules.records.chunks import Chunks
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec

SCALE_MAX = 255
SIGNED_SCALE_MAX = 127
OUTPUT_BLOCK = 8


@dataclass(frozen=True)
class Records:
    """One record a unit: its codes, and then what its groups need besides.

    ======== ============================================== ===================================
    at       bytes                                          where
    ======== ============================================== ===================================
    0        codes (`Chunks`)                               always
    scales   one a group, c; float16 for 8-bit codes        always
    steps    one a group: to its column group from that of  some groups are missing
             the group before it in the row, or from 0
    zeros    a byte a group for 8-bit codes, else half of   asymmetric, and not in the step
             one: groups of the record's first half low
    ======== ============================================== ===================================

    A step shares its byte with the zero point of codes of up to 4 bits: it is the high half.

    Parameters
    ----------
    chunks : Chunks
    full : bool
        Every group is kept: there are no steps, and rows are equally long.
    symmetric : bool
        There are no zero points.
    """

    chunks: Chunks
    full: bool
    symmetric: bool

    @classmethod
    def of(cls, spec: LinearSpec) -> Records:
        """Derive a layer's records."""
        bits = min(bits for bits in CODE_BITS if bits >= spec.bits)
        full = spec.nnz == spec.n * (spec.k // spec.group_size)
        return cls(Chunks(bits, spec.group_size), full, spec.symmetric)

    @property
    def half_scales(self) -> bool:
        """Whether scales are float16; else a byte each, and every row has a factor."""
        return self.chunks.bits == 8

    @property
    def scales_at(self) -> int:
        """Where scales begin."""
        return self.chunks.bytes

    @property
    def steps_at(self) -> int:
        """Where steps begin."""
        return self.scales_at + self.chunks.groups * (2 if self.half_scales else 1)

    @property
    def zeros_in_steps(self) -> bool:
        """Whether a byte holds both of them."""
        return not self.full and not self.symmetric and self.chunks.bits <= 4

    @property
    def longest_step(self) -> int:
        """Column groups; beyond, empty groups are put in between."""
        return 15 if self.zeros_in_steps else 255

    @property
    def zeros_at(self) -> int:
        """Where zero points begin that have bytes of their own."""
        return self.steps_at + (0 if self.full else self.chunks.groups)

    @property
    def zero_bytes(self) -> int:
        """Bytes of those."""
        if self.symmetric or self.zeros_in_steps:
            return 0
        return self.chunks.groups if self.chunks.bits == 8 else (self.chunks.groups + 1) // 2

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return self.zeros_at + self.zero_bytes

    def row_units(self, spec: LinearSpec) -> int:
        """Count the units of a row where all groups are kept."""
        return -(-(spec.k // spec.group_size) // self.chunks.groups)

    def params(self, spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors in the kernel's order."""
        size = spec.n * self.row_units(spec) * self.size if self.full else None
        result = [ParamSpec("records", (size,), "uint8")]
        if not self.half_scales:
            result.append(ParamSpec("factors", (spec.n,), "float32"))
        if not self.full:
            result.append(ParamSpec("row_starts", (spec.n + 1,), "int32"))
        result.append(ParamSpec("task_units", (config.tasks + 1,), "int32"))
        return tuple(result)


def pack(spec: LinearSpec, config: GenericConfig, parts: Sequence[BSRLayer]) -> dict[str, Array]:
    """Pack folded layers; the tensors are those of `Records.params`.

    Raises
    ------
    CompileError
        The layers do not have the shape, bits, group size or number of groups `spec` says.
    """
    check_parts(spec, parts)
    records = Records.of(spec)
    stream = _Stream.of(spec, records, parts)
    scales, factors = _scales(records, stream)
    codes, zeros = stream.codes, stream.zeros
    shape = (stream.units, records.chunks.groups)
    units = np.zeros((stream.units, records.size), np.uint8)
    units[:, : records.scales_at] = records.chunks.encode(codes).reshape(
        stream.units, records.scales_at
    )
    units[:, records.scales_at : records.steps_at] = scales.view(np.uint8).reshape(
        stream.units, records.steps_at - records.scales_at
    )
    if not records.full:
        steps = stream.steps
        if records.zeros_in_steps:
            steps = (steps << np.uint8(4)) | zeros
        units[:, records.steps_at : records.zeros_at] = steps.reshape(shape)
    if records.zero_bytes:
        own = zeros.reshape(shape)
        if records.zero_bytes < records.chunks.groups:
            half = records.zero_bytes
            own = own[:, :half] | (own[:, half:] << np.uint8(4))
        units[:, records.zeros_at :] = own
    if not stream.units:
        units = np.zeros((1, records.size), np.uint8)  # a tensor has to have an address

    packed: dict[str, Array] = {"records": units.reshape(-1)}
    if not records.half_scales:
        packed["factors"] = factors
    if not records.full:
        packed["row_starts"] = stream.row_starts
    lengths = np.diff(stream.row_starts.astype(np.int64)) * records.chunks.groups
    costs = (lengths + ROW_COST).reshape(units_of(spec), -1).sum(1)
    packed["task_units"] = split_units(costs, config.tasks, output_block(spec))
    return packed


def output_block(spec: LinearSpec) -> int:
    """Return how many outputs of one token are finished together: tasks begin at multiples."""
    return min(OUTPUT_BLOCK, 1 << (units_of(spec).bit_length() - 1))


def stored(spec: LinearSpec, part: BSRLayer) -> npt.NDArray[np.float64]:
    """Decode a layer with its scales as they are packed, float64 [N, K]."""
    records = Records.of(spec)
    scales = part.scales.astype(np.float64)
    rows = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
    if not records.half_scales:
        factors = _factors(scales, part.indptr, _limit(records))[rows]
        codes = _rounded(scales, factors)
        scales = np.sign(scales) * codes**2 * factors.astype(np.float64)
    dense = np.zeros((part.shape[0], part.shape[1] // part.group_size, part.group_size))
    values = part.codes().astype(np.float64) - part.zeros()[:, None]
    dense[rows, part.indices] = values * scales[:, None]
    return dense.reshape(part.shape)


@dataclass(frozen=True)
class _Stream:
    """All groups in the order of the records, with those that only fill.

    Parameters
    ----------
    codes : uint8 [stored, G]
    zeros, steps : uint8 [stored]
    scales : float32 [stored]
    rows : int64 [stored]
        The stored row of each.
    row_starts : int32 [N + 1]
        In units.
    """

    codes: Array
    zeros: Array
    steps: Array
    scales: Array
    rows: Array
    row_starts: Array

    @property
    def units(self) -> int:
        """Records in all."""
        return int(self.row_starts[-1])

    @classmethod
    def of(cls, spec: LinearSpec, records: Records, parts: Sequence[BSRLayer]) -> _Stream:
        """Line up the groups of folded layers."""
        groups_before, source = stored_order(spec, parts)
        counts = np.diff(groups_before)
        rows = np.repeat(np.arange(spec.n), counts)
        columns = np.concatenate([part.indices for part in parts])[source].astype(np.int64)
        steps = np.diff(columns, prepend=0)
        first = np.flatnonzero(np.diff(rows, prepend=-1))
        steps[first] = columns[first]
        fills = np.zeros_like(steps)
        if not records.full:
            fills = np.maximum(steps - 1, 0) // records.longest_step
        # Groups and fills of each row, rounded up to whole units.
        lengths = counts + np.bincount(rows, fills, spec.n).astype(np.int64)
        units = -(-lengths // records.chunks.groups)
        row_starts = np.concatenate([[0], np.cumsum(units)])
        total = int(row_starts[-1]) * records.chunks.groups
        before = np.cumsum(fills + 1)
        row_before = np.concatenate([[0], before])[groups_before[:-1]]
        # What fills up a row comes first, in column 0: a group there overwrites it. Where all
        # groups are kept, places mean columns, and it comes last.
        spare = 0 if records.full else (units * records.chunks.groups - lengths)[rows]
        places = row_starts[rows] * records.chunks.groups + spare + before - 1 - row_before[rows]

        all_steps = np.zeros(total, np.uint8)
        all_steps[places] = steps - fills * records.longest_step
        filled = np.repeat(places - fills, fills) + _counted(fills)
        all_steps[filled] = records.longest_step
        return cls(
            _scattered(_together([part.codes() for part in parts])[source], places, total),
            _scattered(_together([part.zeros() for part in parts])[source], places, total),
            all_steps,
            _scattered(
                _together([part.scales for part in parts])[source].astype(np.float32), places, total
            ),
            np.repeat(np.arange(spec.n), units * records.chunks.groups),
            row_starts.astype(np.int32),
        ).positive(spec)

    def positive(self, spec: LinearSpec) -> _Stream:
        """Return the same with scales of at least 0, where there are zero points to turn round."""
        if spec.symmetric or not (self.scales < 0).any():
            return self
        top = (1 << spec.bits) - 1
        negative = self.scales < 0
        codes = np.where(negative[:, None], np.uint8(top) - self.codes, self.codes)
        zeros = np.where(negative, np.uint8(top) - self.zeros, self.zeros)
        return replace(self, codes=codes, zeros=zeros, scales=np.abs(self.scales))


def _together(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _scattered(values: Array, places: Array, total: int) -> Array:
    result = np.zeros((total, *values.shape[1:]), values.dtype)
    result[places] = values
    return result


def _counted(counts: Array) -> Array:
    """Count from 0 within each run of so many: [2, 0, 3] gives [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def _limit(records: Records) -> int:
    return SIGNED_SCALE_MAX if records.symmetric else SCALE_MAX


def _scales(records: Records, stream: _Stream) -> tuple[Array, Array]:
    """Return the stored scales of all groups, and the factors float32 [N]."""
    if records.half_scales:
        return stream.scales.astype(np.float16), np.zeros(0, np.float32)
    scales = stream.scales.astype(np.float64)
    starts = stream.row_starts.astype(np.int64) * records.chunks.groups
    factors = _factors(scales, starts, _limit(records))
    codes = np.sign(scales) * _rounded(scales, factors[stream.rows])
    return codes.astype(np.int8 if records.symmetric else np.uint8), factors


def _factors(scales: Array, starts: Array, limit: int) -> npt.NDArray[np.float32]:
    """Return each row's largest scale / limit^2."""
    largest = np.maximum.reduceat(np.append(np.abs(scales), 0.0), starts[:-1])
    largest[starts[:-1] == starts[1:]] = 0.0  # a row of none: reduceat takes its neighbour's first
    return (largest / limit**2).astype(np.float32)


def _rounded(scales: Array, factors: Array) -> npt.NDArray[np.float64]:
    """Return c >= 0 such that c^2 times the row's factor is next to each scale's magnitude."""
    safe = np.where(factors > 0, factors.astype(np.float64), 1.0)
    root = np.sqrt(np.abs(scales) / safe)
    # Next to it in the scale, not in its root: c + 1/2 is not half-way between the squares.
    low = np.floor(root)
    middle = low * low + low + 0.5
    return np.asarray(np.where(root * root > middle, low + 1, low))
