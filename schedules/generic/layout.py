"""The packed layouts of the generic BSR kernels (docs/kernels.md specifies it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer, pack_codes
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.spec import ACTIVATION_BLOCK, LinearSpec, ParamSpec

BLOCK = 16
"""Scales and zero points are decoded 16 groups at a time, so every array has 16 spare groups."""
CODE_BITS = (2, 4, 8)
"""Bits that a packed code may take; others are widened."""
ROW_COST = 4
"""A row's fixed work, in groups, when rows are divided over the tasks."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BsrLayout:
    """Which packed tensors there are and how a kernel reads them.

    Parameters
    ----------
    code_bits : int
        Bits that a code takes: 2, 4 (codes of 3 bits too) or 8.
    full : bool
        Every group is kept: rows are equally long and there are no indices.
    meta : str or None
        dtype of the tensor that holds index and zero point, or None if there is neither.
    meta_shift : int
        The index is ``meta >> meta_shift``; the zero point, if stored, the low `code_bits` bits.
    lanes : int
        Codes decoded at once.
    """

    code_bits: int
    full: bool
    meta: str | None
    meta_shift: int
    lanes: int

    @classmethod
    def of(cls, spec: LinearSpec, config: GenericConfig) -> BsrLayout:
        """Derive the layout of a layer."""
        groups = spec.k // spec.group_size
        full = spec.nnz == spec.n * groups
        lanes = min(config.lanes, spec.group_size)
        if spec.activation_dtype == "int8":
            lanes = min(config.lanes, spec.group_size // 2)
        code_bits = min(bits for bits in CODE_BITS if bits >= spec.bits)
        shift = 0 if spec.symmetric else code_bits
        meta: str | None = "uint16" if groups << shift <= 65536 else "uint32"
        if full:
            meta = None if spec.symmetric else "uint8"
        return cls(code_bits, full, meta, shift, lanes)

    def group_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a group's codes."""
        return spec.group_size * self.code_bits // 8

    def params(self, spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors in the kernel's order."""
        result = [
            ParamSpec("codes", ((spec.nnz + BLOCK) * self.group_bytes(spec),), "uint8"),
            ParamSpec("scales", (spec.nnz + BLOCK,), "float16"),
        ]
        if self.meta is not None:
            result.append(ParamSpec("meta", (spec.nnz + BLOCK,), self.meta))
        if not self.full:
            result.append(ParamSpec("row_starts", (spec.n + 1,), "int32"))
        result.append(ParamSpec("task_units", (config.tasks + 1,), "int32"))
        return tuple(result)


def int8_order(size: int, lanes: int) -> npt.NDArray[np.int64]:
    """Return which element code i of a group, and value i of its int8 activations, belong to.

    Codes 2j and 2j + 1, whose products a lane adds up before they are scaled (4-bit ones share a
    byte), are of one block of `ACTIVATION_BLOCK`. The pairs of a chunk, one a lane, take turns
    among the chunk's blocks, so that the scales of a vector are loaded by one broadcast.
    """
    blocks = 2 * lanes // ACTIVATION_BLOCK
    pair, second = np.divmod(np.arange(size), 2)
    chunk, lane = np.divmod(pair, lanes)
    return (chunk * blocks + lane % blocks) * ACTIVATION_BLOCK + lane // blocks * 2 + second


def code_order(spec: LinearSpec, layout: BsrLayout) -> npt.NDArray[np.int64]:
    """Return, for code i of a packed group (low bits of byte 0 first), which element it holds.

    The float kernels of 2- and 4-bit codes copy 8 to 64 bits to all lanes and shift each by its own
    count; 64 are copied as two halves, which alternate. 8-bit codes are widened in order. The int8
    kernels take a vector of pairs of codes (`int8_order`).
    """
    size = spec.group_size
    code = np.arange(size)
    if spec.activation_dtype == "int8":
        return int8_order(size, layout.lanes)
    if layout.code_bits == 4 and layout.lanes == 16:
        part, within = code // 16, code % 16
        return part * 16 + 2 * (within % 8) + within // 8
    return code


def units_of(spec: LinearSpec) -> int:
    """Count the independent outputs: rows, or gate and up row pairs."""
    return spec.n_out


def row_order(spec: LinearSpec) -> npt.NDArray[np.int64]:
    """Return the stored order of rows: gate and up rows of an output are neighbours."""
    rows = np.arange(spec.n)
    return rows.reshape(2, -1).T.reshape(-1) if spec.epilogue.gated else rows


def split_units(costs: npt.NDArray[np.int64], tasks: int, block: int = 1) -> npt.NDArray[np.int32]:
    """Cut a sequence of units into consecutive parts of nearly equal cost, at whole blocks.

    Returns
    -------
    int32 [tasks + 1]
        Part t holds the units ``result[t]:result[t + 1]``; a part may be empty.
    """
    starts = np.arange(0, len(costs), block)
    costs, units = np.add.reduceat(costs, starts) if len(costs) else costs, len(costs)
    ends = np.cumsum(costs)
    total = int(ends[-1]) if len(ends) else 0
    goals = (np.arange(1, tasks) * total) // tasks
    # The boundary goes where the running cost, at the middle of a unit, passes the goal.
    cuts = np.searchsorted(ends - costs // 2, goals)
    return np.concatenate([[0], np.minimum(cuts * block, units), [units]]).astype(np.int32)


def pack_bsr(
    spec: LinearSpec, config: GenericConfig, parts: Sequence[BSRLayer]
) -> dict[str, Array]:
    """Pack folded layers into the tensors of `BsrLayout.params`.

    Raises
    ------
    CompileError
        The layers do not have the shape, bits, group size or number of groups `spec` says.
    """
    check_parts(spec, parts)
    layout = BsrLayout.of(spec, config)
    row_starts, source = stored_order(spec, parts)
    counts = np.diff(row_starts)
    codes = np.concatenate([_codes(p, spec, layout) for p in parts])[source]
    packed: dict[str, Array] = {
        "codes": _spare(codes).reshape(-1),
        "scales": _spare(np.concatenate([p.scales for p in parts])[source]),
    }
    if layout.meta is not None:
        meta = np.zeros(spec.nnz, np.uint32)
        if not layout.full:
            meta |= np.concatenate([p.indices for p in parts])[source].astype(np.uint32) << (
                layout.meta_shift
            )
        if not spec.symmetric:
            meta |= np.concatenate([p.zeros() for p in parts])[source]
        packed["meta"] = _spare(meta.astype(layout.meta))
    if not layout.full:
        packed["row_starts"] = row_starts.astype(np.int32)
    unit_costs = (counts + ROW_COST).reshape(units_of(spec), -1).sum(1)
    packed["task_units"] = split_units(unit_costs, config.tasks)
    return packed


def stored_order(spec: LinearSpec, parts: Sequence[BSRLayer]) -> tuple[Array, Array]:
    """Line up the groups of folded layers by stored row.

    Returns
    -------
    row_starts : int64 [N + 1]
        The first group of every stored row.
    source : int64 [nnz]
        Each group's number among those of all parts, one part after the other.
    """
    counts = np.concatenate([np.diff(p.indptr) for p in parts]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows = row_order(spec)
    counts = counts[rows]
    new_starts = np.concatenate([[0], np.cumsum(counts)])
    # Where each stored group comes from: its row's first group plus its place in the row.
    source = np.repeat(starts[rows] - new_starts[:-1], counts) + np.arange(spec.nnz)
    return new_starts, source


def check_parts(spec: LinearSpec, parts: Sequence[BSRLayer]) -> None:
    """Check that layers are what a kernel was built for.

    Raises
    ------
    CompileError
        They do not have the shape, bits, group size or number of groups `spec` says, or a scale is
        not finite.
    """
    found = (sum(p.shape[0] for p in parts), sum(p.nnz for p in parts))
    names = ", ".join(p.name for p in parts)
    if found != (spec.n, spec.nnz):
        raise CompileError(
            f"Cannot pack {names}: {found[0]} rows and {found[1]} groups, "
            f"but the kernel was built for {spec.n} and {spec.nnz}."
        )
    for part in parts:
        if part.shape[1] != spec.k or part.group_size != spec.group_size:
            raise CompileError(
                f"Cannot pack {part.name}: {part.shape[1]} columns in groups of "
                f"{part.group_size}, but the kernel was built for {spec.k} and {spec.group_size}."
            )
        if part.bits != spec.bits:
            raise CompileError(
                f"Cannot pack {part.name}: it has codes of {part.bits} bits, but the kernel was "
                f"built for {spec.bits}."
            )
        if not np.isfinite(part.scales).all():
            raise CompileError(f"Cannot pack {part.name}: a scale is infinite or NaN.")
        if part.symmetric and not spec.symmetric:
            continue  # its zeros are all `symmetric_zero`, stored like any other
        if part.symmetric != spec.symmetric:
            raise CompileError(f"Cannot pack {part.name}: the kernel was built without zeros.")


def _codes(part: BSRLayer, spec: LinearSpec, layout: BsrLayout) -> Array:
    """Return a layer's codes in the kernel's order, uint8 [nnz, `BsrLayout.group_bytes`]."""
    order = code_order(spec, layout)
    if part.bits == layout.code_bits and np.array_equal(order, np.arange(order.size)):
        return part.qweight
    return pack_codes(part.codes()[:, order], layout.code_bits)


def _spare(values: Array) -> Array:
    return np.concatenate([values, np.zeros((BLOCK, *values.shape[1:]), values.dtype)])
