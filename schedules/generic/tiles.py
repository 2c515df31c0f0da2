"""How a kernel cuts the tokens of a call into tiles, and where a token's activations lie."""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Expr, int64


@dataclass(frozen=True)
class TilePlan:
    """Tiles of a call with at least two tokens.

    All full tiles come first, `big` tokens each; the rest, if any, is one smaller tile.
    Tokens of a tile are interleaved in the scratch buffer: the value of column c of token t is at
    ``(first * K) + (c // G) * (tile * G) + t * G + c % G``, so that one decoded group of weights
    meets its activations in one contiguous piece of memory.

    Parameters
    ----------
    sizes : tuple of int
        Tile sizes, ascending.
    full : Expr
        Number of big tiles, some of whose last tokens may lie beyond the last one.
    start : Expr
        First token of the rest.
    rest : Expr
        Tokens of the rest; not above the second largest size.
    """

    sizes: tuple[int, ...]
    full: Expr
    start: Expr
    rest: Expr

    @classmethod
    def of(cls, tokens: Expr, sizes: tuple[int, ...]) -> TilePlan:
        """Plan for `tokens` (int64); emits the bindings."""
        big = sizes[-1]
        largest_rest = sizes[-2] if len(sizes) > 1 else 0
        full = B.bind(B.floordiv(tokens + int64(big - largest_rest - 1), int64(big)))
        start = B.bind(full * int64(big))
        rest = B.bind(B.max(tokens - start, int64(0)))
        return cls(sizes, full, start, rest)

    @property
    def big(self) -> int:
        """The largest tile."""
        return self.sizes[-1]

    def rest_size(self) -> Expr:
        """Size of the tile the rest is computed in; 0 without a rest."""
        size: Expr = int64(0)
        for tile in reversed(self.sizes[:-1]):
            size = B.Select(self.rest <= int64(tile), int64(tile), size)
        return B.Select(self.rest > int64(0), size, int64(0))

    def capacity(self) -> Expr:
        """Tokens that the scratch buffer needs room for."""
        return self.start + self.rest_size()

    def place(self, token: Expr) -> tuple[Expr, Expr, Expr]:
        """Return a token's tile (its first token), the tile's size and the place inside."""
        in_full = token < self.start
        size = B.bind(B.Select(in_full, int64(self.big), self.rest_size()))
        first = B.bind(B.Select(in_full, token - B.floormod(token, int64(self.big)), self.start))
        return first, size, B.bind(token - first)
