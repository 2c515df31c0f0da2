"""What happens to finished dot products: bias, activation, gating, residual, the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic import math
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    const,
    int64,
    load,
    local,
    store,
)
from gqsa_compiler.schedules.spec import LinearSpec


@dataclass(frozen=True)
class Outputs:
    """The buffers an epilogue works on."""

    spec: LinearSpec
    tokens: Expr
    bias: Buffer | None
    residual: Buffer | None
    out: Buffer

    def finish(self, sums: Buffer, at: int, unit: Expr, token: Expr, tile: int) -> None:
        """Emit the epilogue of one output feature for `tile` tokens and store the result.

        Parameters
        ----------
        sums : Buffer
            Local; the dot products of the tokens at ``at``, and, when gated, those of the up row
            at ``at + tile``.
        unit : Expr
            int64, the output feature.
        token : Expr
            int64, the first token; tokens of the tile beyond the last one are not stored.
        """
        spec, epilogue = self.spec, self.spec.epilogue
        value = self._biased(sums, at, unit, tile)
        if epilogue.activation is not None:
            value = B.bind(math.activate(epilogue.activation, value))
        if epilogue.gated:
            value = value * self._biased(sums, at + tile, unit + int64(spec.n // 2), tile)
        if tile == 1:
            self._store(value, token, unit)
            return
        finished = local(tile)
        store(finished, value, 0, lanes=tile)
        with B.serial(int64(0), B.min(int64(tile), self.tokens - token)) as i:
            self._store(load(finished, i), token + i, unit)

    def finish_one_token(self, sums: Sequence[Expr], unit: Expr, lanes: int) -> None:
        """Emit the epilogue of `lanes` output features of the only token and store the results.

        Parameters
        ----------
        sums : sequence of Expr
            The dot products of the features and, when gated, those of their up rows.
        unit : Expr
            int64, the first feature.
        """
        spec, epilogue = self.spec, self.spec.epilogue

        def biased(value: Expr, row: Expr) -> Expr:
            bias = None if self.bias is None else load(self.bias, row, lanes=lanes)
            return B.bind(value if bias is None else value + bias)

        value = biased(sums[0], unit)
        if epilogue.activation is not None:
            value = B.bind(math.activate(epilogue.activation, value))
        if epilogue.gated:
            value = value * biased(sums[1], unit + int64(spec.n // 2))
        if self.residual is not None:
            value = value + load(self.residual, int64(0), unit, lanes=lanes)
        store(self.out, value, int64(0), unit, lanes=lanes)

    def finish_block(self, sums: Buffer, unit: Expr, token: Expr, tile: int, units: int) -> None:
        """Emit the epilogue of `units` output features for `tile` tokens and store the results.

        Parameters
        ----------
        sums : Buffer
            Local; feature u's dot products with the tokens at ``u * tile``, or, when gated, those
            of its gate row at ``2 * u * tile`` and those of its up row after them.
        unit, token : Expr
            int64, the first feature and the first token; tokens beyond the last are not stored.
        """
        spec, epilogue = self.spec, self.spec.epilogue
        finished = local(units * tile)
        for u in range(units):
            at = u * tile * (2 if epilogue.gated else 1)
            row = unit + int64(u)
            value = self._biased(sums, at, row, tile)
            if epilogue.activation is not None:
                value = B.bind(math.activate(epilogue.activation, value))
            if epilogue.gated:
                value = value * self._biased(sums, at + tile, row + int64(spec.n // 2), tile)
            store(finished, value, u * tile, lanes=tile)
        with B.serial(int64(0), B.min(int64(tile), self.tokens - token)) as i:
            place = B.bind(token + i)
            value = finished[B.ramp(i, const(tile, "int64"), units) if units > 1 else i]
            if self.residual is not None:
                value = value + load(self.residual, place, unit, lanes=units)
            store(self.out, value, place, unit, lanes=units)

    def _biased(self, sums: Buffer, at: int, row: Expr, tile: int) -> Expr:
        value = load(sums, at, lanes=tile)
        if self.bias is not None:
            value = value + broadcast(load(self.bias, row), tile)
        return B.bind(value)

    def _store(self, value: Expr, token: Expr, unit: Expr) -> None:
        if self.residual is not None:
            value = value + load(self.residual, token, unit)
        store(self.out, value, token, unit)
