"""The decode kernel: a tile of 1 to 8 tokens times a block's share of the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.cuda.activations import Activations, Prologue
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.config import BLOCK_ROWS, CudaConfig, shared_parts
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    device_call,
    fetch,
    register,
    registers,
    u32,
    warp_sum,
)
from gqsa_compiler.schedules.cuda.launch import i32
from gqsa_compiler.schedules.cuda.rows import Finish, Share
from gqsa_compiler.schedules.cuda.weights import Unit
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.spec import LinearSpec

MIN_BLOCKS = "tirx.launch_bounds_min_blocks_per_sm"
"""Blocks that a processor must be able to hold. Left to itself, ptxas spills registers so that more
fit."""


def launch(spec: LinearSpec, config: CudaConfig, args: Arguments, tile: int, first: Expr) -> None:
    """Emit the launch of a tile's kernel and the kernel.

    Parameters
    ----------
    tile : int
        1, 2, 4 or 8 tokens.
    first : Expr
        int64, the first of them.
    """
    config = config.for_tile(tile)
    blocks = args.params["arrivals"].shape[0]
    with (
        B.thread_binding(0, blocks, thread="blockIdx.x") as block,
        B.thread_binding(0, config.threads, thread="threadIdx.x") as thread,
        B.attr(0, MIN_BLOCKS, config.resident),
    ):
        shared = SharedMemory.allocate(shared_parts(spec, config, tile))
        block, thread = (B.bind(B.Cast("int32", x)) for x in (block, thread))
        share = Share.of(args.params["blocks"], block, config.warps)
        with B.If(share.begin < share.end), B.Then():
            sums, flags = shared.part("sums"), shared.part("flags", "uint32")
            warp = _Warp.of(spec, config, args, share, thread, tile, sums)
            # The first weights are on their way while the activations are got ready.
            warp.fetch_first()
            x = Prologue(spec, config, args, tile, first, thread).emit(shared)
            warp.sum_rows(x)
            barrier()
            Finish(
                spec, config, args, share, block, thread, tile, first, sums, flags, x.factors
            ).emit()


@dataclass(frozen=True)
class _Warp:
    """A warp's tiles of weights; methods emit code for one lane.

    `next` is the lane's unit of the tile after those that are held when a round begins; `left`
    counts the tiles from the first held one on.
    """

    config: CudaConfig
    share: Share
    tile: int
    unit: Unit
    starts: Buffer
    held_starts: Buffer
    rows: Buffer
    lane: Expr
    number: Expr
    next: Buffer
    left: Buffer
    sums: Buffer

    @classmethod
    def of(
        cls,
        spec: LinearSpec,
        config: CudaConfig,
        args: Arguments,
        share: Share,
        thread: Expr,
        tile: int,
        sums: Buffer,
    ) -> _Warp:
        lane = B.bind(B.floormod(thread, i32(WARP)))
        number = B.bind(B.floordiv(thread, i32(WARP)))
        begin = B.bind(share.begin + number * share.tiles_a_warp)
        count = B.min(share.end - begin, share.tiles_a_warp)
        # Registers, as TVM would otherwise compute them anew from the block's record each time.
        next_ = register(B.Cast("uint32", begin * i32(WARP) + lane), "uint32")
        unit = Unit.of(spec, config.scale_bits, config.depth, args.params)
        params = args.params
        held = registers(config.depth, "uint32")
        return cls(
            config, share, tile, unit, params["starts"], held, params["tile_rows"],
            lane, number, next_, register(count, "int32"), sums,
        )  # fmt: skip

    def _fetch(self, slot: int) -> None:
        """Emit the loads of the `slot`-th tile from the next one on."""
        unit = B.bind(load(self.next, 0) + u32(slot * WARP))
        self.unit.fetch(slot, unit)
        tile = B.bind(B.floordiv(unit, u32(WARP)))
        fetch(self.held_starts, slot, self.starts, tile, 1)

    def fetch_first(self) -> None:
        """Emit the loads of the first tiles."""
        for slot in range(self.config.depth):
            with B.If(load(self.left, 0) > i32(slot)), B.Then():
                self._fetch(slot)
        # The warp's first unit begins a row for it, whether or not the row began before.
        store(self.held_starts, B.bitwise_and(load(self.held_starts, 0), u32(0xFFFFFFFE)), 0)

    def sum_rows(self, x: Activations) -> None:
        """Emit the walk over the tiles; leaves every row's sum in `sums`."""
        depth = self.config.depth
        totals, place = registers(self.tile), registers(1, "int32")
        for t in range(self.tile):
            store(totals, const(0.0, "float32"), t)
        with B.If(load(self.left, 0) > i32(0)), B.Then():
            x = replace(x, lane_start=self.unit.lane_start(x, self.lane))
            tile = B.Cast("int32", B.floordiv(load(self.next, 0), u32(WARP)))
            row = load(self.rows, tile) - self.share.first_row
            store(place, row + self.number, 0)
            with B.While(load(self.left, 0) > i32(0)):
                store(self.next, load(self.next, 0) + u32(depth * WARP), 0)
                for slot in range(depth):
                    with B.If(load(self.left, 0) > i32(slot)), B.Then():
                        self._add(slot, x, totals, place)
                        with B.If(load(self.left, 0) > i32(depth + slot)), B.Then():
                            self._fetch(slot)
                store(self.left, load(self.left, 0) - i32(depth), 0)
            self._leave(totals, place)

    def _add(self, slot: int, x: Activations, totals: Buffer, place: Buffer) -> None:
        """Emit a tile: its products join the row's sum, and where rows end the sum is left."""
        products = self.unit.products(slot, self.lane, x, self.tile)
        marks = register(load(self.held_starts, slot), "uint32")
        with B.While(load(marks, 0) != u32(0)):
            bit = B.bind(device_call("gqsa_first_bit", "int32", load(marks, 0)))
            before = B.bind(self.lane < bit)
            zero = const(0.0, "float32")
            for t in range(self.tile):
                product = B.bind(load(products, t))
                store(totals, load(totals, t) + B.Select(before, product, zero), t)
                store(products, B.Select(before, zero, product), t)
            self._leave(totals, place)
            for t in range(self.tile):
                store(totals, zero, t)
            store(place, load(place, 0) + i32(1), 0)
            store(marks, B.bitwise_and(load(marks, 0), load(marks, 0) - u32(1)), 0)
        for t in range(self.tile):
            store(totals, load(totals, t) + load(products, t), t)

    def _leave(self, totals: Buffer, place: Buffer) -> None:
        """Emit the sum over the lanes and its store; changes `totals`."""
        warp_sum(totals, self.tile, self.lane)
        lanes = WARP // self.tile
        with B.If(B.floormod(self.lane, i32(lanes)) == i32(0)), B.Then():
            token = B.floordiv(self.lane, i32(lanes))
            at = load(place, 0) + token * i32(BLOCK_ROWS + self.config.warps)
            store(self.sums, load(totals, 0), at)
