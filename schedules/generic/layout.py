"""The packed layout of the generic BSR-INT4 kernel (docs/kernels.md specifies it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.spec import ACTIVATION_BLOCK, LinearSpec, ParamSpec

BLOCK = 16
"""Scales and zero points are decoded 16 groups at a time, so every array has 16 spare groups."""
ROW_COST = 4
"""A row's fixed work, in groups, when rows are divided over the tasks."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BsrLayout:
    """Which packed tensors there are and how a kernel reads them.

    Parameters
    ----------
    full : bool
        Every group is kept: rows are equally long and there are no indices.
    meta : str or None
        dtype of the tensor that holds index and zero point, or None if there is neither.
    meta_shift : int
        The index is ``meta >> meta_shift``; the zero point, if stored, the low 4 bits.
    lanes : int
        Codes decoded at once.
    """

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
        shift = 0 if spec.symmetric else 4
        if full:
            return cls(True, None if spec.symmetric else "uint8", shift, lanes)
        return cls(False, "uint16" if groups << shift <= 65536 else "uint32", shift, lanes)

    def params(self, spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
        """Describe the packed tensors in the kernel's order."""
        result = [
            ParamSpec("codes", ((spec.nnz + BLOCK) * spec.group_size // 2,), "uint8"),
            ParamSpec("scales", (spec.nnz + BLOCK,), "float16"),
        ]
        if self.meta is not None:
            result.append(ParamSpec("meta", (spec.nnz + BLOCK,), self.meta))
        if not self.full:
            result.append(ParamSpec("row_starts", (spec.n + 1,), "int32"))
        result.append(ParamSpec("task_units", (config.tasks + 1,), "int32"))
        return tuple(result)


def int8_order(size: int, lanes: int) -> npt.NDArray[np.int64]:
    """Return which element nibble i of a group, and value i of its int8 activations, belong to.

    A byte's two nibbles are of one block of `ACTIVATION_BLOCK`, so that their products add up
    before they are scaled. The bytes of a chunk, one a lane, take turns among the chunk's blocks,
    so that the scales of a vector are loaded by one broadcast.
    """
    blocks = 2 * lanes // ACTIVATION_BLOCK
    byte, high = np.divmod(np.arange(size), 2)
    chunk, lane = np.divmod(byte, lanes)
    return (chunk * blocks + lane % blocks) * ACTIVATION_BLOCK + lane // blocks * 2 + high


def nibble_order(spec: LinearSpec, layout: BsrLayout) -> npt.NDArray[np.int64]:
    """Return, for nibble i of a group (low nibble of byte 0 first), which element it holds.

    The float kernel copies 32 (or, for 16 lanes, 64) bits to all lanes and shifts each by its own
    count; the int8 kernel takes a vector of bytes and splits low from high nibbles (`int8_order`).
    """
    size = spec.group_size
    nibble = np.arange(size)
    if spec.activation_dtype == "int8":
        return int8_order(size, layout.lanes)
    if layout.lanes == 16:
        part, within = nibble // 16, nibble % 16
        return part * 16 + 2 * (within % 8) + within // 8
    return nibble


def units_of(spec: LinearSpec) -> int:
    """Count the independent outputs: rows, or gate and up row pairs."""
    return spec.n_out


def row_order(spec: LinearSpec) -> npt.NDArray[np.int64]:
    """Return the stored order of rows: gate and up rows of an output are neighbours."""
    rows = np.arange(spec.n)
    return rows.reshape(2, -1).T.reshape(-1) if spec.epilogue.gated else rows


def split_units(costs: npt.NDArray[np.int64], tasks: int) -> npt.NDArray[np.int32]:
    """Cut a sequence of units into consecutive parts of nearly equal cost.

    Returns
    -------
    int32 [tasks + 1]
        Part t holds the units ``result[t]:result[t + 1]``; a part may be empty.
    """
    ends = np.cumsum(costs)
    total = int(ends[-1]) if len(ends) else 0
    goals = (np.arange(1, tasks) * total) // tasks
    # The boundary goes where the running cost, at the middle of a unit, passes the goal.
    cuts = np.searchsorted(ends - costs // 2, goals)
    return np.concatenate([[0], cuts, [len(costs)]]).astype(np.int32)


def pack_bsr(
    spec: LinearSpec, config: GenericConfig, parts: Sequence[BSRLayer]
) -> dict[str, Array]:
    """Pack folded layers into the tensors of `BsrLayout.params`.

    Raises
    ------
    CompileError
        The layers do not have the shape, group size or number of groups `spec` says.
    """
    _check_parts(spec, parts)
    layout = BsrLayout.of(spec, config)
    counts = np.concatenate([np.diff(p.indptr) for p in parts]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows = row_order(spec)
    counts = counts[rows]
    new_starts = np.concatenate([[0], np.cumsum(counts)])
    # Where each stored group comes from: its row's first group plus its place in the row.
    source = np.repeat(starts[rows] - new_starts[:-1], counts) + np.arange(spec.nnz)

    codes = np.concatenate([p.qweight for p in parts])[source]
    packed: dict[str, Array] = {
        "codes": _spare(_reorder(codes, nibble_order(spec, layout))).reshape(-1),
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
        packed["row_starts"] = new_starts.astype(np.int32)
    unit_costs = (counts + ROW_COST).reshape(units_of(spec), -1).sum(1)
    packed["task_units"] = split_units(unit_costs, config.tasks)
    return packed


def _check_parts(spec: LinearSpec, parts: Sequence[BSRLayer]) -> None:
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
        if part.symmetric and not spec.symmetric:
            continue  # its zeros are all `SYMMETRIC_ZERO`, stored like any other
        if part.symmetric != spec.symmetric:
            raise CompileError(f"Cannot pack {part.name}: the kernel was built without zeros.")


def _reorder(qweight: npt.NDArray[np.uint8], order: npt.NDArray[np.int64]) -> Array:
    if np.array_equal(order, np.arange(order.size)):
        return qweight
    nibbles = np.stack([qweight & 0xF, qweight >> 4], axis=-1).reshape(-1, order.size)
    nibbles = nibbles[:, order]
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _spare(values: Array) -> Array:
    return np.concatenate([values, np.zeros((BLOCK, *values.shape[1:]), values.dtype)])
