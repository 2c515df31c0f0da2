"""From the warps' sums to outputs: rows cut between warps, and outputs cut between blocks.

A warp has some consecutive tiles of its block, so it has a share of consecutive rows. It leaves the
sum of its share of row r in place ``r - first + warp`` of the block's list: the row that a warp
shares with the next one has two places. When all are there, one thread an output and token adds up
the row's places in order.

An output cut between blocks is summed by the last of its blocks to arrive, in the blocks' order
whoever that is. The others leave their sums in `partials` and count themselves in `arrivals`; the
counter is 0 again after the last one. Nobody waits, so blocks need not be resident together. Both
tensors belong to one layer, whose launches must follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.config import BLOCK_ROWS, TILES, CudaConfig
from gqsa_compiler.schedules.cuda.device import barrier, device_call, do, register, registers, u32
from gqsa_compiler.schedules.cuda.epilogue import Outputs
from gqsa_compiler.schedules.cuda.launch import i32
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.spec import LinearSpec

MOST_TOKENS = TILES[-1]
"""Tokens of the largest tile, which `partials` has room for."""


def partial_floats(spec: LinearSpec) -> int:
    """Return how many floats of `partials` a block has: for its first and its last output."""
    return 2 * rows_of_output(spec) * MOST_TOKENS


def rows_of_output(spec: LinearSpec) -> int:
    """Count the rows of an output."""
    return 2 if spec.epilogue.gated else 1


@dataclass(frozen=True)
class Share:
    """A block's record (`partition.INFO`) and how its warps divide it; int32 expressions."""

    begin: Expr
    end: Expr
    first_row: Expr
    last_row: Expr
    head_begin: Expr
    head_end: Expr
    tail_end: Expr
    tiles_a_warp: Expr

    @classmethod
    def of(cls, blocks: Buffer, block: Expr, warps: int) -> Share:
        """Emit the loads of a block's record."""
        fields = [B.bind(load(blocks, block * i32(8) + i32(i))) for i in range(7)]
        per_warp = B.floordiv(fields[1] - fields[0] + i32(warps - 1), i32(warps))
        begin, end, first_row, last_row, head_begin, head_end, tail_end = fields
        return cls(
            begin, end, first_row, last_row, head_begin, head_end, tail_end, B.bind(per_warp)
        )


@dataclass(frozen=True)
class Finish:
    """Emits the end of a block for one thread.

    Parameters
    ----------
    sums : Buffer
        float32 [tile * (BLOCK_ROWS + warps)], shared: the warps' sums, token by token.
    flags : Buffer
        uint32 [2], shared.
    factors : Buffer
        float32 [tile], shared.
    first : Expr
        int64, the tile's first token.
    """

    spec: LinearSpec
    config: CudaConfig
    args: Arguments
    share: Share
    block: Expr
    thread: Expr
    tile: int
    first: Expr
    sums: Buffer
    flags: Buffer
    factors: Buffer

    @property
    def _stride(self) -> int:
        return BLOCK_ROWS + self.config.warps

    def emit(self) -> None:
        """Emit everything; all sums of the block are in shared memory."""
        share, rows, tile = self.share, rows_of_output(self.spec), self.tile
        first = B.bind(B.floordiv(share.first_row, i32(rows)))
        last = B.bind(B.floordiv(share.last_row, i32(rows)))
        count = B.bind((last - first + i32(1)) * i32(tile))
        threads = self.config.threads
        turns = B.floordiv(count + i32(threads - 1), i32(threads))
        with B.serial(turns) as i:
            place = B.bind(i * i32(threads) + self.thread)
            with B.If(place < count), B.Then():
                token = B.bind(B.floormod(place, i32(tile)))
                output = B.bind(first + B.floordiv(place, i32(tile)))
                found = registers(rows)
                for r in range(rows):
                    self._row_sum(found, r, B.bind(output * i32(rows) + i32(r)), token)
                head = B.And(output == first, share.head_begin < self.block)
                tail = B.And(output == last, share.tail_end > self.block)
                with B.If(B.Or(head, tail)):
                    with B.Then():
                        side = B.Select(head, i32(0), i32(1))
                        for r in range(rows):
                            self._leave(load(found, r), B.bind(side), r, token)
                    with B.Else():
                        self._store(found, output, token)
        cut = B.Or(share.head_begin < self.block, share.tail_end > self.block)
        with B.If(cut), B.Then():
            self._join(first, last)

    def _row_sum(self, found: Buffer, at: int, row: Expr, token: Expr) -> None:
        """Emit the sum of a stored row's places, 0 if it lies in other blocks."""
        share, row_units = self.share, self.args.params["row_units"]
        store(found, const(0.0, "float32"), at)
        inside = B.And(row >= share.first_row, row <= share.last_row)
        with B.If(inside), B.Then():
            tiles = []
            for unit in (load(row_units, row), load(row_units, row + i32(1)) - i32(1)):
                number = B.floordiv(unit, i32(WARP))
                within = B.max(B.min(number, share.end - i32(1)), share.begin) - share.begin
                tiles.append(B.bind(B.floordiv(within, share.tiles_a_warp)))
            with B.serial(tiles[1] - tiles[0] + i32(1)) as i:
                place = row - share.first_row + tiles[0] + i + token * i32(self._stride)
                store(found, load(found, at) + load(self.sums, place), at)
            store(found, load(found, at) * load(self.args.params["row_scales"], row), at)

    def _store(self, found: Buffer, output: Expr, token: Expr) -> None:
        factor = load(register(load(self.factors, token), "float32"), 0)
        for r in range(rows_of_output(self.spec)):
            store(found, load(found, r) * factor, r)
        outputs = Outputs(self.spec, self.args)
        outputs.finish(found, output, B.bind(self.first + int64(token)))

    def _partial(self, block: Expr, side: Expr, row: int, token: Expr) -> Expr:
        """Emit the address of a block's sum of a cut output."""
        rows = rows_of_output(self.spec)
        place = (block * i32(2) + side) * i32(rows) + i32(row)
        return self.args.params["partials"].access_ptr(
            "rw", offset=place * i32(MOST_TOKENS) + token
        )

    def _leave(self, value: Expr, side: Expr, row: int, token: Expr) -> None:
        do(device_call("gqsa_store_l2", "void", self._partial(self.block, side, row, token), value))

    def _join(self, first: Expr, last: Expr) -> None:
        """Emit what a block with cut outputs does after it has left its sums."""
        share, block = self.share, self.block
        do(device_call("gqsa_fence", "void"))
        barrier()
        cuts = (
            (share.head_begin, share.head_end, share.head_begin < block, first),
            (block, share.tail_end, share.tail_end > block, last),
        )
        with B.If(self.thread == i32(0)), B.Then():
            for side, (begin, end, is_cut, _) in enumerate(cuts):
                store(self.flags, u32(0), side)
                with B.If(is_cut), B.Then():
                    counter = self.args.params["arrivals"].access_ptr("rw", offset=begin)
                    others = B.bind(B.Cast("uint32", end - begin))
                    came = device_call("gqsa_arrive", "uint32", counter, others)
                    store(self.flags, B.Cast("uint32", B.bind(came) == others), side)
        barrier()
        for side, (begin, end, _, output) in enumerate(cuts):
            complete = load(register(load(self.flags, side), "uint32"), 0) != u32(0)
            with B.If(B.And(complete, self.thread < i32(self.tile))), B.Then():
                do(device_call("gqsa_fence", "void"))
                found = registers(rows_of_output(self.spec))
                for r in range(rows_of_output(self.spec)):
                    # Its begin is the last output of a block; all that follows is a first one.
                    start = self._partial(begin, i32(1), r, self.thread)
                    store(found, device_call("gqsa_load_l2", "float32", start), r)
                    with B.serial(end - begin) as i:
                        at = self._partial(begin + i + i32(1), i32(0), r, self.thread)
                        more = device_call("gqsa_load_l2", "float32", at)
                        store(found, load(found, r) + more, r)
                self._store(found, output, self.thread)
