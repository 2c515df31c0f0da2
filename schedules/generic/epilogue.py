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
        value = self._activated(self._of(sums, at, tile), unit, tile, same_row=True)
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
        value = self._activated(sums, unit, lanes, same_row=False)
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
        finished = local(units * tile)
        rows = 2 if self.spec.epilogue.gated else 1
        for u in range(units):
            found = self._of(sums, u * rows * tile, tile)
            value = self._activated(found, unit + int64(u), tile, same_row=True)
            store(finished, value, u * tile, lanes=tile)
        with B.serial(int64(0), B.min(int64(tile), self.tokens - token)) as i:
            place = B.bind(token + i)
            value = finished[B.ramp(i, const(tile, "int64"), units) if units > 1 else i]
            if self.residual is not None:
                value = value + load(self.residual, place, unit, lanes=units)
            store(self.out, value, place, unit, lanes=units)

    def _of(self, sums: Buffer, at: int, tile: int) -> list[Expr]:
        """Load a feature's dot products and, when gated, those of its up row behind them."""
        rows = 2 if self.spec.epilogue.gated else 1
        return [load(sums, at + r * tile, lanes=tile) for r in range(rows)]

    def _activated(self, sums: Sequence[Expr], unit: Expr, lanes: int, *, same_row: bool) -> Expr:
        """Emit bias, activation and gating.

        Parameters
        ----------
        sums : sequence of Expr
            `lanes` dot products and, when gated, those of the up rows.
        unit : Expr
            int64, the first lane's feature.
        same_row : bool
            Lanes are tokens; else they are features.
        """
        epilogue = self.spec.epilogue
        values = []
        for r, value in enumerate(sums):
            if self.bias is not None:
                row = unit + int64(r * (self.spec.n // 2))
                width = 1 if same_row else lanes
                bias = load(self.bias, row, lanes=width)
                value = value + (broadcast(bias, lanes) if same_row else bias)
            values.append(B.bind(value))
        result = values[0]
        if epilogue.activation is not None:
            result = B.bind(math.activate(epilogue.activation, result))
        return result * values[1] if epilogue.gated else result

    def _store(self, value: Expr, token: Expr, unit: Expr) -> None:
        if self.residual is not None:
            value = value + load(self.residual, token, unit)
        store(self.out, value, token, unit)
