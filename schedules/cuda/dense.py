"""Dense linear layers on a GPU with weights as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.cuda import dense_gemm
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.config import FEW_DENSE, MANY_DENSE
from gqsa_compiler.schedules.cuda.device import register, registers, u32
from gqsa_compiler.schedules.cuda.launch import i32
from gqsa_compiler.schedules.cuda.row_gemv import SPACE, TILES, RowConfig, dispatch
from gqsa_compiler.schedules.generic.dense import stack_dense
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec

_DTYPES = ("float16", "bfloat16", "float32")
_UNIT = 8
"""Weights of a unit: 16 bytes of halves."""


class CudaDense(ScheduleRule[RowConfig]):
    """Dense float weights, float32 sums.

    Up to 8 tokens: float32 activations, and the weights are read once. More: tensor cores, with
    activations rounded to halves, or for bfloat16 weights to 16 bits (`dense_gemm`); for float32
    weights the first kernel again, 8 tokens at a time.
    """

    name: ClassVar[str] = "cuda.dense"
    layout_version: ClassVar[int] = 1
    reads_stored_layout: ClassVar[bool] = True

    def packed_by(self, config: RowConfig) -> None:
        """Return nothing: weights stay as they are."""

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return (
            target.kind == "cuda"
            and target.arch in ARCHES
            and spec.weight == "dense"
            and spec.weight_dtype in _DTYPES
            and spec.k % _UNIT == 0
        )

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[RowConfig]:
        """List the configurations worth trying; the first is the default."""
        return SPACE

    def params(self, spec: LinearSpec, config: RowConfig) -> tuple[ParamSpec, ...]:
        """Describe the one tensor: the weight [N, K] as it is."""
        return (ParamSpec("weight", (spec.n, spec.k), spec.weight_dtype),)

    def pack(
        self, spec: LinearSpec, config: RowConfig, parts: Sequence[Any]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Stack the folded weights; one alone is returned without a copy."""
        return {"weight": stack_dense(spec, parts)}

    def build(self, spec: LinearSpec, config: RowConfig, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments."""

        def body(args: Arguments) -> None:
            if spec.weight_dtype == "float32":
                _row_by_row(spec, config, args)
                return
            with B.If(args.tokens <= int64(TILES[-1])):
                with B.Then():
                    _row_by_row(spec, config, args)
                with B.Else():
                    _on_tensor_cores(spec, args)

        return kernel(spec, self.params(spec, config), body)


def _row_by_row(spec: LinearSpec, config: RowConfig, args: Arguments) -> None:
    """Emit the launches for few tokens."""
    weights = _Weights.of(spec, args.params["weight"])

    def step(
        rows: list[Expr], tokens: list[Expr], unit: Expr
    ) -> tuple[list[list[Expr]], list[Expr]]:
        return _dot(weights, args, rows, tokens, unit)

    dispatch(spec, config, args, spec.k // _UNIT, step)


def _on_tensor_cores(spec: LinearSpec, args: Arguments) -> None:
    """Emit the launches for many tokens."""
    x = dense_gemm.Terms.emit(spec, args)
    with B.If(args.tokens <= int64(FEW_DENSE.tokens)):
        with B.Then():
            dense_gemm.launch(spec, args, FEW_DENSE, x)
        with B.Else():
            dense_gemm.launch(spec, args, MANY_DENSE, x)


class _Weights:
    """The weights of a layer, read 8 at a time."""

    def __init__(self, spec: LinearSpec, words: Buffer, words_a_unit: int) -> None:
        self.spec, self.words, self.words_a_unit = spec, words, words_a_unit

    @classmethod
    def of(cls, spec: LinearSpec, weight: Buffer) -> _Weights:
        """View the stored weights as 32-bit words."""
        size = 4 if spec.weight_dtype == "float32" else 2
        words = B.decl_buffer((spec.n * spec.k * size // 4,), "uint32", data=weight.data)
        return cls(spec, words, _UNIT * size // 4)

    def load(self, row: Expr, unit: Expr) -> Buffer:
        """Emit the load of a unit of a row, as float32."""
        held, values = registers(self.words_a_unit, "uint32"), registers(_UNIT)
        units = int64(self.spec.k // _UNIT)
        start = B.bind((int64(row) * units + int64(unit)) * int64(self.words_a_unit))
        for word in range(0, self.words_a_unit, 4):
            store(held, load(self.words, start + int64(word), lanes=4), i32(word), lanes=4)
        for i in range(_UNIT):
            store(values, self._value(held, i), i)
        return values

    def _value(self, held: Buffer, i: int) -> Expr:
        if self.spec.weight_dtype == "float32":
            return B.reinterpret("float32", load(held, i))
        word = load(register(load(held, i // 2), "uint32"), 0)
        if self.spec.weight_dtype == "bfloat16":
            upper = B.bitwise_and(word, u32(0xFFFF0000)) if i % 2 else B.shift_left(word, u32(16))
            return B.reinterpret("float32", upper)
        half = B.shift_right(word, u32(16)) if i % 2 else B.bitwise_and(word, u32(0xFFFF))
        return B.Cast("float32", B.reinterpret("float16", B.Cast("uint16", half)))


def _dot(
    weights: _Weights, args: Arguments, rows: list[Expr], tokens: list[Expr], unit: Expr
) -> tuple[list[list[Expr]], list[Expr]]:
    values = [weights.load(row, unit) for row in rows]
    column = B.bind(unit * i32(_UNIT))
    norm = None if args.norm is None else _eight(args.norm, column)
    products: list[list[Expr]] = [[] for _ in rows]
    squares: list[Expr] = []
    for token in tokens:
        inputs = _eight(args.x, token, column)
        if norm is not None:
            square = register(const(0.0, "float32"), "float32")
            for i in range(_UNIT):
                value = B.bind(load(inputs, i))
                store(square, load(square, 0) + value * value, 0)
                store(inputs, value * load(norm, i), i)
            squares.append(load(square, 0))
        for row_values, row_products in zip(values, products, strict=True):
            total = register(const(0.0, "float32"), "float32")
            for i in range(_UNIT):
                store(total, load(total, 0) + load(row_values, i) * load(inputs, i), 0)
            row_products.append(load(total, 0))
    return products, squares


def _eight(buffer: Buffer, *at: Expr) -> Buffer:
    """Emit the load of eight floats from a place on."""
    held = registers(_UNIT)
    for i in range(0, _UNIT, 4):
        place = (*at[:-1], at[-1] + i32(i))
        store(held, load(buffer, *place, lanes=4), i32(i), lanes=4)
    return held
