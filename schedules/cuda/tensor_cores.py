"""What the kernels for many tokens share: a tile of outputs on tensor cores, and its end.

A block computes a tile of tokens by stored rows, each warp a part of it. Tokens and rows lie in
shared memory as 16-bit numbers, a token's (or row's) columns side by side, `stride` words of 32
bits from one to the next: a stride that is 4 more than a multiple of 8 lets ``ldmatrix`` read eight
rows of 16 bytes from all 32 banks at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.config import GemmTile
from gqsa_compiler.schedules.cuda.device import device_call, do, register, registers
from gqsa_compiler.schedules.cuda.epilogue import Outputs
from gqsa_compiler.schedules.cuda.launch import i32
from gqsa_compiler.schedules.cuda.rows import rows_of_output
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.spec import LinearSpec

M, N, K = 16, 8, 16
"""Tokens, rows and columns of one ``mma``."""


@dataclass(frozen=True)
class Place:
    """Where a thread is: its block's first stored row and token, and its number."""

    row: Expr
    token: Expr
    thread: Expr
    lane: Expr
    warp: Expr

    @classmethod
    def of(cls, row: Expr, token: Expr, thread: Expr) -> Place:
        """Emit a thread's lane and warp.

        Parameters
        ----------
        row, thread : Expr
            int32.
        token : Expr
            int64.
        """
        lane = B.bind(B.floormod(thread, i32(WARP)))
        return cls(row, token, thread, lane, B.bind(B.floordiv(thread, i32(WARP))))


@dataclass(frozen=True)
class Operand:
    """A matrix in shared memory.

    Parameters
    ----------
    words : Buffer
        uint32: pairs of columns.
    start : Expr
        int32: the word at which its first row begins.
    """

    words: Buffer
    start: Expr


class OutputTile:
    """A block's tile of outputs; methods emit code for one thread."""

    def __init__(self, spec: LinearSpec, args: Arguments, tile: GemmTile, place: Place) -> None:
        self.spec, self.args, self.tile, self.place = spec, args, tile, place
        down = B.floordiv(place.warp, i32(tile.warps_across))
        across = B.floormod(place.warp, i32(tile.warps_across))
        self.token = B.bind(down * i32(tile.warp_tokens))
        self.row = B.bind(across * i32(tile.warp_rows))
        # Results of 16 tokens by 8 rows are four sums a lane.
        self.sums = registers(tile.fragments * 4)
        for i in range(tile.fragments * 4):
            store(self.sums, const(0.0, "float32"), i)

    def tokens_left(self) -> Expr:
        """Emit how many of the tile's tokens there are, int32, at least one."""
        left = B.min(self.args.tokens - self.place.token, int64(self.tile.tokens))
        return load(register(B.Cast("int32", left), "int32"), 0)

    def multiply(
        self,
        tokens: tuple[Operand, ...],
        rows: Operand,
        columns: int,
        dtype: str = "float16",
    ) -> None:
        """Emit the products of so many columns, 16 at a time.

        Parameters
        ----------
        tokens : tuple of Operand
            Terms of which each token is the sum.
        dtype : str
            ``float16`` or ``bfloat16``, of both.
        """
        tile, lane = self.tile, self.place.lane
        # Lanes 8 i to 8 i + 7 name the rows of the i-th of four matrices of 8 x 8: of tokens these
        # are 0-7, 8-15, and both again 8 columns further on; of rows 0-7, the same 8 columns
        # further on, 8-15, and so on.
        eighth = B.floordiv(lane, i32(8))
        token = self.token + B.floormod(lane, i32(16))
        right = B.floordiv(lane, i32(16)) * i32(4)
        a_at = B.bind(token * i32(tile.stride) + right)
        row = self.row + B.floormod(lane, i32(8)) + B.floordiv(lane, i32(16)) * i32(8)
        b_at = B.bind(row * i32(tile.stride) + B.floormod(eighth, i32(2)) * i32(4))
        a = registers(tile.warp_tokens // M * 4, "uint32")
        b = registers(tile.warp_rows // N * 2, "uint32")
        with B.serial(columns // K) as step:
            column = B.bind(step * i32(K // 2))
            for n in range(0, tile.warp_rows, 2 * N):
                self._load(b, n // N * 2, rows, b_at + column, n)
            for term in tokens:
                for m in range(0, tile.warp_tokens, M):
                    self._load(a, m // M * 4, term, a_at + column, m)
                self._products(a, b, dtype)

    def _load(self, to: Buffer, at: int, operand: Operand, place: Expr, row: int) -> None:
        """Emit the load of four matrices into four registers."""
        start = B.bind(operand.start + place + i32(row * self.tile.stride))
        source = T.address_of(load(operand.words, start))
        do(device_call("gqsa_ldmatrix", "void", to.access_ptr("rw", offset=at), source))

    def _products(self, a: Buffer, b: Buffer, dtype: str) -> None:
        across = self.tile.warp_rows // N
        name = "gqsa_mma" if dtype == "float16" else "gqsa_mma_bfloat16"
        for m in range(self.tile.warp_tokens // M):
            for n in range(across):
                to = self.sums.access_ptr("rw", offset=4 * (m * across + n))
                operands = [load(a, 4 * m + i) for i in range(4)]
                operands += [load(b, 2 * n + i) for i in range(2)]
                do(device_call(name, "void", to, *operands))

    def finish(self, factors: Buffer | None, row_scales: Buffer | None) -> None:
        """Emit the epilogue: a lane has neighbouring rows of two tokens in a fragment.

        Parameters
        ----------
        factors : Buffer or None
            float32 [m]: what a token's sums are multiplied by.
        row_scales : Buffer or None
            float32 [N]: what a stored row's are. Gated: rows are stored gate 0, up 0, gate 1 ...
        """
        tile, place = self.tile, self.place
        down = B.floordiv(place.lane, i32(4))
        right = B.floormod(place.lane, i32(4)) * i32(2)
        first_token = B.bind(place.token + int64(self.token + down))
        first_row = B.bind(place.row + self.row + right)
        outputs = Outputs(self.spec, self.args)
        rows, across = rows_of_output(self.spec), tile.warp_rows // N
        for m in range(tile.warp_tokens // M):
            for half in range(2):
                number = B.bind(first_token + int64(m * M + 8 * half))
                with B.If(number < self.args.tokens), B.Then():
                    factor = None
                    if factors is not None:
                        factor = load(register(load(factors, number), "float32"), 0)
                    for n in range(across):
                        at = 4 * (m * across + n) + 2 * half
                        stored = B.bind(first_row + i32(n * N))
                        for start in range(0, 2, rows):
                            own = B.bind(stored + i32(start))
                            with B.If(own < i32(self.spec.n)), B.Then():
                                found = registers(rows)
                                for r in range(rows):
                                    value = load(self.sums, at + start + r)
                                    if factor is not None:
                                        value = value * factor
                                    if row_scales is not None:
                                        value = value * load(row_scales, own + i32(r))
                                    store(found, value, r)
                                output = B.bind(B.floordiv(own, i32(rows)))
                                outputs.finish(found, output, number)
