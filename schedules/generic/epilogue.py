"""What happens to finished dot products: bias, activation, gating, residual, the store."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic import math
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
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

    def _biased(self, sums: Buffer, at: int, row: Expr, tile: int) -> Expr:
        value = load(sums, at, lanes=tile)
        if self.bias is not None:
            value = value + broadcast(load(self.bias, row), tile)
        return B.bind(value)

    def _store(self, value: Expr, token: Expr, unit: Expr) -> None:
        if self.residual is not None:
            value = value + load(self.residual, token, unit)
        store(self.out, value, token, unit)
