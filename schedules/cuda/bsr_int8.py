"""8-bit linear layers with all their groups on a GPU: the language-model head.

A row is K codes, one after the other, and K / G scales; there is nothing to index. Codes are signed
bytes in the order in which ``dp2a`` meets the activations: of every 8 columns 0 4 1 5 2 6 3 7
(`activations.Prologue` pairs them so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import BSRLayer, symmetric_zero
from gqsa_compiler.schedules.cuda.activations import Activations, Prologue
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.config import CudaConfig, shared_parts
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    device_call,
    register,
    registers,
)
from gqsa_compiler.schedules.cuda.launch import i32
from gqsa_compiler.schedules.cuda.layout import StreamLayout
from gqsa_compiler.schedules.cuda.row_gemv import SPACE, RowConfig, dispatch
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.layout import check_parts
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec

_BITS = 8
_UNIT = 16
"""Codes of a unit: 16 bytes, of one group."""
_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])


class CudaBsrInt8(ScheduleRule[RowConfig]):
    """Symmetric codes of 8 bits, every group kept; activations are rounded to int16.

    That is so with float16 activations too, for which products of such codes would be too large.
    Products are exact up to 16 of them, sums float32.
    """

    name: ClassVar[str] = "cuda.bsr_int8"
    layout_version: ClassVar[int] = 1

    def packed_by(self, config: RowConfig) -> None:
        """Return nothing: no configuration changes the packed weights."""

    def code_key(self, spec: LinearSpec) -> LinearSpec:
        """Return what the code depends on: rows are full, so everything."""
        return replace(spec, activation_dtype="int16")

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return (
            target.kind == "cuda"
            and target.arch in ARCHES
            and spec.weight == "bsr"
            and spec.bits == _BITS
            and spec.symmetric
            and spec.group_size >= _UNIT
            and spec.nnz == spec.n * (spec.k // spec.group_size)
            and spec.activation_dtype in ("float16", "int16")
        )

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[RowConfig]:
        """List the configurations worth trying; the first is the default."""
        return SPACE

    def params(self, spec: LinearSpec, config: RowConfig) -> tuple[ParamSpec, ...]:
        """Describe the codes, four a word, and the scales."""
        groups = spec.k // spec.group_size
        return (
            ParamSpec("codes", (spec.n * spec.k // 4,), "uint32"),
            ParamSpec("scales", (spec.n * groups,), "float16"),
        )

    def pack(
        self,
        spec: LinearSpec,
        config: RowConfig,
        parts: Sequence[BSRLayer] | Sequence[npt.NDArray[Any]],
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Turn checkpoint layers into the tensors that `params` describes."""
        layers = [part for part in parts if isinstance(part, BSRLayer)]
        check_parts(spec, layers)
        codes = np.concatenate([layer.codes().reshape(-1, 8) for layer in layers])
        signed = (codes[:, _ORDER] ^ symmetric_zero(_BITS)).astype(np.uint8)
        return {
            "codes": np.ascontiguousarray(signed).reshape(-1).view(np.uint32),
            "scales": np.concatenate([layer.scales for layer in layers]),
        }

    def build(self, spec: LinearSpec, config: RowConfig, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments."""
        spec = replace(spec, activation_dtype="int16")

        def body(args: Arguments) -> None:
            values, factors = _quantise(spec, args)

            def step(row: Expr, tokens: list[Expr], unit: Expr) -> list[Expr]:
                return _dot(spec, args, values, row, tokens, unit)

            dispatch(spec, config, args, spec.k // _UNIT, step, factors)

        return kernel(spec, self.params(spec, config), body)


def _quantise(spec: LinearSpec, args: Arguments) -> tuple[Buffer, Buffer]:
    """Emit the launch that rounds the tokens: pairs uint32 [m * K / 2], and factors [m]."""
    words, pieces = spec.k // 2, spec.k // StreamLayout(spec.group_size).piece
    values = B.alloc_buffer((args.tokens * int64(words),), "uint32")
    sums = B.alloc_buffer((args.tokens * int64(pieces),), "int32")
    factors = B.alloc_buffer((args.tokens,), "float32")
    config = CudaConfig(blocks=1, warps=8)
    parts = shared_parts(spec, config, 1)
    with (
        B.thread_binding(0, args.tokens, thread="blockIdx.x") as token,
        B.thread_binding(0, config.threads, thread="threadIdx.x") as thread,
    ):
        kept = {name: parts[name] for name in ("multipliers", "partial")}
        shared = SharedMemory.allocate(kept)
        token, thread = B.bind(int64(token)), B.bind(B.Cast("int32", thread))

        def row(buffer: Buffer, size: int) -> Buffer:
            start = token * int64(size)
            return B.decl_buffer((size,), buffer.dtype, data=buffer.data, elem_offset=start)

        x = Activations(row(values, words), row(sums, pieces), row(factors, 1))
        Prologue(spec, config, args, 1, token, thread).emit_to(x, shared)
    return values, factors


def _dot(
    spec: LinearSpec, args: Arguments, x: Buffer, row: Expr, tokens: list[Expr], unit: Expr
) -> list[Expr]:
    codes = registers(_UNIT // 4, "uint32")
    units = int64(spec.k // _UNIT)
    start = B.bind((int64(row) * units + int64(unit)) * int64(_UNIT // 4))
    store(codes, load(args.params["codes"], start, lanes=4), i32(0), lanes=4)
    groups, inside = spec.k // spec.group_size, spec.group_size // _UNIT
    group = int64(row) * int64(groups) + int64(B.floordiv(unit, i32(inside)))
    scale = B.bind(B.Cast("float32", load(args.params["scales"], group)))
    products = []
    for token in tokens:
        at = B.bind(token * int64(spec.k // 2) + int64(unit * i32(_UNIT // 2)))
        values = registers(_UNIT // 2, "uint32")
        for i in range(0, _UNIT // 2, 4):
            store(values, load(x, at + int64(i), lanes=4), i32(i), lanes=4)
        total = register(const(0, "int32"), "int32")
        for i in range(_UNIT // 2):
            helper = "gqsa_dp2a_hi" if i % 2 else "gqsa_dp2a_lo"
            code = load(codes, i // 2)
            store(total, device_call(helper, "int32", load(values, i), code, load(total, 0)), 0)
        products.append(B.Cast("float32", load(total, 0)) * scale)
    return products
