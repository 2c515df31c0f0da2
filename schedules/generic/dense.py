"""Dense linear layers with weights as they are stored: the lm_head, and the dense baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gqsa_compiler._tvm import B
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic import math
from gqsa_compiler.schedules.generic.config import (
    GenericConfig,
    default_config,
    has_native_half,
    task_counts,
)
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    cast,
    const,
    half_to_float,
    horizontal_sums,
    int64,
    load,
    local,
    store,
    vector,
)
from gqsa_compiler.schedules.generic.epilogue import Outputs
from gqsa_compiler.schedules.generic.function import Arguments, kernel
from gqsa_compiler.schedules.generic.prologue import normalise_rows
from gqsa_compiler.schedules.rule import ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec, ParamSpec
from gqsa_compiler.targets import TargetSpec

ROWS = 4
"""Weight rows computed at once: each vector of activations is used for all of them."""
TOKENS = 4
"""Tokens computed at once; ROWS * TOKENS sums are kept in registers."""
TOKEN_CHUNK = 32
"""Tokens for which a task goes once through its weights: their activations stay in cache."""

_FLOAT_DTYPES = ("float16", "bfloat16", "float32")


class GenericDense(ScheduleRule[GenericConfig]):
    """Dense float weights, float32 activations and sums.

    ``activation_dtype`` is not applied: dense layers are those that accuracy depends on most.
    """

    name = "generic.dense"
    layout_version = 1
    reads_stored_layout = True

    def packed_by(self, config: GenericConfig) -> None:
        """Return nothing: weights stay as they are."""

    def applies(self, spec: LinearSpec, target: TargetSpec) -> bool:
        """Say whether this kernel can run `spec` on `target`."""
        return (
            spec.weight == "dense" and target.kind == "llvm" and spec.weight_dtype in _FLOAT_DTYPES
        )

    def space(self, spec: LinearSpec, target: TargetSpec) -> Sequence[GenericConfig]:
        """List the configurations worth trying; the first is the default."""
        default = default_config(spec.n_out, target)
        return [replace(default, tasks=tasks) for tasks in task_counts(spec.n_out)]

    def params(self, spec: LinearSpec, config: GenericConfig) -> tuple[ParamSpec, ...]:
        """Describe the one tensor: the weight [N, K] as it is."""
        return (ParamSpec("weight", (spec.n, spec.k), spec.weight_dtype),)

    def pack(
        self,
        spec: LinearSpec,
        config: GenericConfig,
        parts: Sequence[Any],
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Stack the folded weights; one alone is returned without a copy."""
        return {"weight": stack_dense(spec, parts)}

    def build(self, spec: LinearSpec, config: GenericConfig, target: TargetSpec) -> Any:
        """Return the scheduled PrimFunc; see `ScheduleRule.build` for its arguments."""

        def body(args: Arguments) -> None:
            x = args.x
            if args.norm is not None:
                x = normalise_rows(spec, args.x, args.norm, args.tokens, config.lanes)
            tile = _Tile(
                spec,
                config.lanes,
                has_native_half(target),
                x,
                args.params["weight"],
                Outputs(spec, args.tokens, args.bias, args.residual, args.out),
            )
            chunks = B.bind(B.floordiv(args.tokens + int64(TOKEN_CHUNK - 1), int64(TOKEN_CHUNK)))
            with B.parallel(int64(0), int64(config.tasks)) as task:
                start = B.bind(_share(spec.n_out, config.tasks, task))
                end = B.bind(_share(spec.n_out, config.tasks, task + int64(1)))
                with B.serial(int64(0), chunks) as chunk:
                    first = B.bind(chunk * int64(TOKEN_CHUNK))
                    last = B.bind(B.min(first + int64(TOKEN_CHUNK), args.tokens))
                    _task(tile, start, end, first, last)

        return kernel(spec, self.params(spec, config), body)


def stack_dense(spec: LinearSpec, parts: Sequence[Any]) -> npt.NDArray[np.generic]:
    """Stack folded dense weights [N_i, K]; one alone is returned without a copy.

    Raises
    ------
    CompileError
        They are not what `spec` says.
    """
    weight: npt.NDArray[np.generic] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if weight.shape != (spec.n, spec.k) or str(weight.dtype) != spec.weight_dtype:
        raise CompileError(
            f"Cannot pack a dense weight {weight.shape} of {weight.dtype}: the kernel was "
            f"built for {(spec.n, spec.k)} of {spec.weight_dtype}."
        )
    return weight


def _share(units: int, tasks: int, task: Expr) -> Expr:
    return B.floordiv(task * int64(units), int64(tasks))


@dataclass(frozen=True)
class _Tile:
    """Dot products of a few weight rows with a few tokens."""

    spec: LinearSpec
    lanes: int
    native_half: bool
    x: Buffer
    weight: Buffer
    outputs: Outputs

    def emit(self, unit: Expr, units: int, token: Expr, tokens: int) -> None:
        """Compute outputs ``unit .. unit + units`` of `tokens` tokens, epilogue included."""
        spec, lanes = self.spec, self.lanes
        rows = [unit + int64(u) for u in range(units)]
        if spec.epilogue.gated:
            rows = [r for u in rows for r in (u, u + int64(spec.n // 2))]
        rows = [B.bind(r) for r in rows]
        at_tokens = [B.bind(token + int64(t)) for t in range(tokens)]
        vectors, tail = divmod(spec.k, lanes)
        totals = local(len(rows) * tokens * lanes)
        for i in range(len(rows) * tokens):
            store(totals, broadcast(const(0.0, "float32"), lanes), i * lanes, lanes=lanes)
        with B.serial(int64(0), int64(vectors)) as i:
            self._step(B.bind(i * int64(lanes)), rows, at_tokens, totals, lanes, lanes)
        sums = local(len(rows) * tokens)
        loaded = [load(totals, i * lanes, lanes=lanes) for i in range(len(rows) * tokens)]
        done = 0
        for value, count in horizontal_sums(loaded, lanes):
            store(sums, value, done, lanes=count)
            done += count
        if tail:
            with B.serial(int64(0), int64(tail)) as i:
                self._step(B.bind(int64(vectors * lanes) + i), rows, at_tokens, sums, 1, 1)
        for u in range(units):
            at = u * tokens * (len(rows) // units)
            self.outputs.finish(sums, at, unit + int64(u), token, tokens)

    def _step(
        self,
        column: Expr,
        rows: list[Expr],
        tokens: list[Expr],
        totals: Buffer,
        lanes: int,
        stride: int,
    ) -> None:
        xs = [B.bind(load(self.x, t, column, lanes=lanes)) for t in tokens]
        for r, row in enumerate(rows):
            w = B.bind(self._weight(row, column, lanes))
            for t, x in enumerate(xs):
                at = (r * len(tokens) + t) * stride
                store(totals, math.fma(w, x, load(totals, at, lanes=lanes)), at, lanes=lanes)

    def _weight(self, row: Expr, column: Expr, lanes: int) -> Expr:
        value = load(self.weight, row, column, lanes=lanes)
        if self.spec.weight_dtype == "float16":
            return half_to_float(value, lanes, native=self.native_half)
        if self.spec.weight_dtype == "bfloat16":
            bits = cast("uint32", B.reinterpret(vector("uint16", lanes), value), lanes)
            moved = B.shift_left(bits, broadcast(const(16, "uint32"), lanes))
            return B.reinterpret(vector("float32", lanes), moved)
        return value


def _task(tile: _Tile, start: Expr, end: Expr, first: Expr, last: Expr) -> None:
    """Emit all outputs ``start .. end`` of tokens ``first .. last``, weights outermost."""
    units = ROWS // 2 if tile.spec.epilogue.gated else ROWS
    blocks = B.bind(B.floordiv(end - start, int64(units)))

    def all_tokens(unit: Expr, count: int) -> None:
        tiles = B.bind(B.floordiv(last - first, int64(TOKENS)))
        with B.serial(int64(0), tiles) as i:
            tile.emit(unit, count, B.bind(first + i * int64(TOKENS)), TOKENS)
        rest = B.bind(first + tiles * int64(TOKENS))
        with B.serial(int64(0), last - rest) as i:
            tile.emit(unit, count, B.bind(rest + i), 1)

    with B.serial(int64(0), blocks) as block:
        all_tokens(B.bind(start + block * int64(units)), units)
    rest = B.bind(start + blocks * int64(units))
    with B.serial(int64(0), end - rest) as i:
        all_tokens(B.bind(rest + i), 1)
