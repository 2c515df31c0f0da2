"""Many tokens: weights are unpacked to halves in shared memory and met by tensor cores.

A first launch writes the normalised and scaled tokens as halves. Then each block computes a tile of
tokens by stored rows, `SLAB` columns at a time: the rows' groups in these columns are unpacked into
a tile of shared memory that was zeros (an absent group costs nothing but these zeros), and
``mma.m16n8k16`` multiplies it with the tokens. One packed copy of the weights serves this and
the decode kernel. A row's order is the decode kernel's, so a slab's groups lie somewhere within a
stretch of its units that `pack` notes; groups of other slabs in it are passed over.

The product of a code less its zero point and its scale is rounded to a half.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.activations import Activations, Prologue
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.config import CudaConfig, GemmTile, measure_parts
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    device_call,
    do,
    register,
    registers,
    u32,
)
from gqsa_compiler.schedules.cuda.gemv import MIN_BLOCKS
from gqsa_compiler.schedules.cuda.launch import i32
from gqsa_compiler.schedules.cuda.layout import CHUNK, SLAB, StreamLayout
from gqsa_compiler.schedules.cuda.tensor_cores import Operand, OutputTile, Place
from gqsa_compiler.schedules.cuda.weights import Unit
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.spec import LinearSpec

_LANES = 8  # threads that unpack a row
_RESIDENT = 2  # blocks that a processor's registers must hold; shared memory holds 1 to 4


@dataclass(frozen=True)
class Halves:
    """All tokens as halves, in global memory: uint32 [m * K / 2] and float32 [m] factors."""

    values: Buffer
    factors: Buffer

    @classmethod
    def emit(cls, spec: LinearSpec, config: CudaConfig, args: Arguments) -> Halves:
        """Emit the launch that makes them, one block a token."""
        tokens = args.tokens
        values = B.alloc_buffer((tokens * int64(spec.k // 2),), "uint32")
        factors = B.alloc_buffer((tokens,), "float32")
        with (
            B.thread_binding(0, tokens, thread="blockIdx.x") as token,
            B.thread_binding(0, config.threads, thread="threadIdx.x") as thread,
        ):
            shared = SharedMemory.allocate(measure_parts(1, config.warps))
            token, thread = B.bind(int64(token)), B.bind(B.Cast("int32", thread))
            row = B.decl_buffer(
                (spec.k // 2,), "uint32", data=values.data, elem_offset=token * int64(spec.k // 2)
            )
            factor = B.decl_buffer((1,), "float32", data=factors.data, elem_offset=token)
            prologue = Prologue(spec, config, args, 1, token, thread)
            prologue.emit_to(Activations(row, None, factor), shared)
        return cls(values, factors)


def launch(
    spec: LinearSpec, config: CudaConfig, args: Arguments, tile: GemmTile, x: Halves
) -> None:
    """Emit the launch of the kernel for many tokens, and the kernel."""
    columns = B.floordiv(args.tokens + int64(tile.tokens - 1), int64(tile.tokens))
    with (
        B.thread_binding(0, -(-spec.n // tile.rows), thread="blockIdx.x") as block,
        B.thread_binding(0, columns, thread="blockIdx.y") as column,
        B.thread_binding(0, tile.threads, thread="threadIdx.x") as thread,
        B.attr(0, MIN_BLOCKS, _RESIDENT),
    ):
        shared = SharedMemory.allocate(tile.shared_parts())
        place = Place.of(
            B.bind(B.Cast("int32", block) * i32(tile.rows)),
            B.bind(int64(column) * int64(tile.tokens)),
            B.bind(B.Cast("int32", thread)),
        )
        _Block(spec, config, args, tile, x, place, shared).emit()


class _Block:
    """A block's tile of outputs; methods emit code for one thread."""

    def __init__(
        self,
        spec: LinearSpec,
        config: CudaConfig,
        args: Arguments,
        tile: GemmTile,
        x: Halves,
        place: Place,
        shared: SharedMemory,
    ) -> None:
        self.spec, self.args, self.tile, self.x, self.place = spec, args, tile, x, place
        self.layout = StreamLayout.of(spec)
        self.rounds = -(-tile.rows // (tile.threads // _LANES))
        self.unit = Unit.of(spec, config.scale_bits, self.rounds, args.params)
        # For each round: the first unit of its row, the first one in hand of the slab's stretch and
        # the end of it, both counted from there, and the stretch of the slab after it.
        self.base, self.unit_at, self.unit_end = (registers(self.rounds, "int32") for _ in range(3))
        self.stretch = registers(self.rounds, "uint32")
        self.tokens = shared.part("tokens", "uint32")
        self.weights = shared.part("weights", "uint32")
        self.outputs = OutputTile(spec, args, tile, place)
        self.left = self.outputs.tokens_left()

    def emit(self) -> None:
        """Emit everything.

        Tokens are on their way while the weights are unpacked, and the next slab's weights while
        this one's are multiplied.
        """
        operands = (Operand(self.tokens, i32(0)),), Operand(self.weights, i32(0))
        self._begin()
        self._fetch_weights(i32(0))
        with B.serial(-(-self.spec.k // SLAB)) as slab:
            slab = B.bind(B.Cast("int32", slab))
            self._fetch_tokens(slab)
            self._clear_weights()
            barrier()
            self._unpack(slab)
            do(device_call("gqsa_copy_wait_0", "void"))
            barrier()
            self._fetch_weights(B.bind(slab + i32(1)))
            self.outputs.multiply(*operands, SLAB)
            barrier()
        self.outputs.finish(self.x.factors, self.args.params["row_scales"])

    def _fetch_tokens(self, slab: Expr) -> None:
        """Emit the start of copying the slab's columns of the tile's tokens; zeros beyond them."""
        tile, spec = self.tile, self.spec
        chunks, all_chunks = SLAB // CHUNK, spec.k // CHUNK
        with B.serial(tile.tokens * chunks // tile.threads) as i:
            number = B.bind(i * i32(tile.threads) + self.place.thread)
            token = B.bind(B.floordiv(number, i32(chunks)))
            inside = B.bind(B.floormod(number, i32(chunks)))
            chunk = B.bind(slab * i32(chunks) + inside)
            there = B.And(token < self.left, chunk < i32(all_chunks))
            # Within the tile, in 32 bits.
            row = B.min(token, self.left - i32(1)) * i32(spec.k // 2)
            inner = B.bind(row + B.min(chunk, i32(all_chunks - 1)) * i32(4))
            first = self.place.token * int64(spec.k // 2)
            source = load(self.x.values, B.bind(first + int64(inner)))
            to = load(self.tokens, B.bind(token * i32(tile.stride) + inside * i32(4)))
            pointers = T.address_of(to), T.address_of(source)
            do(device_call("gqsa_copy_async", "void", *pointers, there))
        do(device_call("gqsa_copy_commit", "void"))

    def _clear_weights(self) -> None:
        tile = self.tile
        chunks = tile.rows * tile.stride // 4
        zeros = registers(4, "uint32")
        for word in range(4):
            store(zeros, u32(0), word)
        with B.serial(-(-chunks // tile.threads)) as i:
            number = B.bind(i * i32(tile.threads) + self.place.thread)
            with B.If(number < i32(chunks)), B.Then():
                value = load(zeros, i32(0), lanes=4)
                store(self.weights, value, number * i32(4), lanes=4)

    def _row(self, i: int) -> tuple[Expr, Expr]:
        """Emit the tile's row that this thread helps to unpack in a round, and if it exists."""
        at_once = self.tile.threads // _LANES
        row = B.floordiv(self.place.thread, i32(_LANES)) + i32(i * at_once)
        row = B.bind(row)
        there = B.And(row < i32(self.tile.rows), self.place.row + row < i32(self.spec.n))
        return row, B.bind(there)

    def _begin(self) -> None:
        """Emit the loads of where the rows are, and of their stretches in the first slab."""
        params, slabs = self.args.params, -(-self.spec.k // SLAB)
        for i in range(self.rounds):
            row, there = self._row(i)
            store(self.base, i32(0), i)
            store(self.stretch, u32(0), i)
            with B.If(there), B.Then():
                stored = B.bind(self.place.row + row)
                store(self.base, load(params["row_units"], stored), i)
                store(self.stretch, load(params["slabs"], stored * i32(slabs)), i)

    def _fetch_weights(self, slab: Expr) -> None:
        """Emit the loads of a slab's first units, and of the stretches of the one after it."""
        params, slabs = self.args.params, -(-self.spec.k // SLAB)
        lane = B.bind(B.floormod(self.place.thread, i32(_LANES)))
        for i in range(self.rounds):
            row, there = self._row(i)
            stretch = register(load(self.stretch, i), "uint32")
            first = B.Cast("int32", B.bitwise_and(load(stretch, 0), u32(0xFFFF)))
            store(self.unit_at, first + lane, i)
            store(self.unit_end, B.Cast("int32", B.shift_right(load(stretch, 0), u32(16))), i)
            self._fetch_unit(i)
            store(self.stretch, u32(0), i)
            with B.If(B.And(there, slab + i32(1) < i32(slabs))), B.Then():
                at = (self.place.row + row) * i32(slabs) + slab + i32(1)
                store(self.stretch, load(params["slabs"], B.bind(at)), i)

    def _fetch_unit(self, i: int) -> None:
        with B.If(load(self.unit_at, i) < load(self.unit_end, i)), B.Then():
            unit = load(self.base, i) + load(self.unit_at, i)
            self.unit.fetch(i, B.bind(B.Cast("uint32", unit)))

    def _unpack(self, slab: Expr) -> None:
        """Emit the unpacking of the slab's groups of all rows of the tile."""
        for i in range(self.rounds):
            row, _ = self._row(i)
            with B.While(load(self.unit_at, i) < load(self.unit_end, i)):
                self._unpack_unit(i, row, slab)
                store(self.unit_at, load(self.unit_at, i) + i32(_LANES), i)
                self._fetch_unit(i)

    def _unpack_unit(self, slot: int, row: Expr, slab: Expr) -> None:
        layout, tile = self.layout, self.tile
        lane = B.floormod(load(self.base, slot) + load(self.unit_at, slot), i32(WARP))
        lane = load(register(lane, "int32"), 0)
        turn = B.floormod(B.floordiv(lane, i32(layout.residues)), i32(layout.chunks))
        turn = B.bind(turn)
        for piece in range(layout.pieces):
            _, number = self.unit.column(slot, piece, lane)
            column = B.bind(number * i32(layout.piece) - slab * i32(SLAB))
            scale = B.bind(self.unit.scale_half2(slot, piece))
            inside = B.And(column >= i32(0), column < i32(SLAB))
            # What fills a row's last unit has scale 0 and any column.
            with B.If(B.And(inside, scale != u32(0))), B.Then():
                pairs = registers(4, "uint32")
                for chunk in range(layout.chunks):
                    for i, pair in enumerate(self.unit.pairs(slot, piece, chunk)):
                        value = device_call("gqsa_hmul2", "uint32", pair, scale)
                        store(pairs, value, i)
                    part = B.bitwise_xor(turn, i32(chunk))
                    to = row * i32(tile.stride) + B.floordiv(column, i32(2)) + part * i32(4)
                    store(self.weights, load(pairs, i32(0), lanes=4), B.bind(to), lanes=4)
