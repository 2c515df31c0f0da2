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

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.cuda.activations import Activations, Prologue
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.config import CudaConfig, GemmTile, shared_parts
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    device_call,
    do,
    register,
    registers,
    u32,
)
from gqsa_compiler.schedules.cuda.epilogue import Outputs
from gqsa_compiler.schedules.cuda.gemv import MIN_BLOCKS
from gqsa_compiler.schedules.cuda.layout import CHUNK, SLAB, StreamLayout
from gqsa_compiler.schedules.cuda.rows import rows_of_output
from gqsa_compiler.schedules.cuda.weights import Unit
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.spec import LinearSpec

_LANES = 8  # threads that unpack a row
_M, _N, _K = 16, 8, 16  # of one mma
_RESIDENT = 2  # blocks that a processor's registers must hold; shared memory holds 1 to 4


def _i32(value: int) -> Expr:
    return const(value, "int32")


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
        parts = shared_parts(spec, config, 1)
        with (
            B.thread_binding(0, tokens, thread="blockIdx.x") as token,
            B.thread_binding(0, config.threads, thread="threadIdx.x") as thread,
        ):
            kept = {name: parts[name] for name in ("multipliers", "partial")}
            shared = SharedMemory.allocate(kept)
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
        place = _Place.of(
            B.bind(B.Cast("int32", block) * _i32(tile.rows)),
            B.bind(int64(column) * int64(tile.tokens)),
            B.bind(B.Cast("int32", thread)),
        )
        _Block(spec, config, args, tile, x, place, shared).emit()


@dataclass(frozen=True)
class _Place:
    """Where a thread is: its block's first stored row and token, and its number."""

    row: Expr
    token: Expr
    thread: Expr
    lane: Expr
    warp: Expr

    @classmethod
    def of(cls, row: Expr, token: Expr, thread: Expr) -> _Place:
        lane = B.bind(B.floormod(thread, _i32(WARP)))
        return cls(row, token, thread, lane, B.bind(B.floordiv(thread, _i32(WARP))))


class _Block:
    """A block's tile of outputs; methods emit code for one thread."""

    def __init__(
        self,
        spec: LinearSpec,
        config: CudaConfig,
        args: Arguments,
        tile: GemmTile,
        x: Halves,
        place: _Place,
        shared: SharedMemory,
    ) -> None:
        self.spec, self.args, self.tile, self.x, self.place = spec, args, tile, x, place
        self.layout = StreamLayout(spec.group_size)
        self.unit = Unit.of(spec, config.scale_bits, 1, args.params)
        self.tokens = shared.part("tokens", "uint32")
        self.weights = shared.part("weights", "uint32")
        # A fragment of 16 tokens by 8 rows is four sums a lane.
        self.sums = registers(tile.fragments * 4)

    def emit(self) -> None:
        """Emit everything."""
        for i in range(self.tile.fragments * 4):
            store(self.sums, const(0.0, "float32"), i)
        with B.serial(-(-self.spec.k // SLAB)) as slab:
            slab = B.bind(B.Cast("int32", slab))
            self._load_tokens(slab)
            self._clear_weights()
            barrier()
            self._unpack(slab)
            barrier()
            self._multiply()
            barrier()
        self._finish()

    def _load_tokens(self, slab: Expr) -> None:
        """Emit the load of the slab's columns of the tile's tokens; zeros beyond the last ones."""
        tile, spec = self.tile, self.spec
        chunks = SLAB // CHUNK
        words = registers(4, "uint32")
        with B.serial(tile.tokens * chunks // tile.threads) as i:
            number = B.bind(i * _i32(tile.threads) + self.place.thread)
            token = B.bind(B.floordiv(number, _i32(chunks)))
            inside = B.bind(B.floormod(number, _i32(chunks)))
            chunk = B.bind(slab * _i32(chunks) + inside)
            row = B.bind(self.place.token + int64(token))
            for word in range(4):
                store(words, u32(0), word)
            there = B.And(row < self.args.tokens, chunk < _i32(spec.k // CHUNK))
            with B.If(there), B.Then():
                at = row * int64(spec.k // 2) + int64(chunk * _i32(4))
                store(words, load(self.x.values, at, lanes=4), _i32(0), lanes=4)
            to = token * _i32(tile.stride) + inside * _i32(4)
            store(self.tokens, load(words, _i32(0), lanes=4), to, lanes=4)

    def _clear_weights(self) -> None:
        tile = self.tile
        chunks = tile.rows * tile.stride // 4
        zeros = registers(4, "uint32")
        for word in range(4):
            store(zeros, u32(0), word)
        with B.serial(-(-chunks // tile.threads)) as i:
            number = B.bind(i * _i32(tile.threads) + self.place.thread)
            with B.If(number < _i32(chunks)), B.Then():
                value = load(zeros, _i32(0), lanes=4)
                store(self.weights, value, number * _i32(4), lanes=4)

    def _unpack(self, slab: Expr) -> None:
        """Emit the unpacking of the slab's groups of all rows of the tile."""
        tile, params, slabs = self.tile, self.args.params, -(-self.spec.k // SLAB)
        lane = B.bind(B.floormod(self.place.thread, _i32(_LANES)))
        first = B.bind(B.floordiv(self.place.thread, _i32(_LANES)))
        at_once = tile.threads // _LANES
        with B.serial(-(-tile.rows // at_once)) as i:
            row = B.bind(i * _i32(at_once) + first)
            stored = B.bind(self.place.row + row)
            with B.If(B.And(row < _i32(tile.rows), stored < _i32(self.spec.n))), B.Then():
                stretch = B.bind(load(params["slabs"], stored * _i32(slabs) + slab))
                start = B.Cast("int32", B.bitwise_and(stretch, u32(0xFFFF)))
                start = B.bind(start + lane)
                end = B.Cast("int32", B.shift_right(stretch, u32(16)))
                base = B.bind(load(params["row_units"], stored))
                turns = B.floordiv(B.max(end - start, _i32(0)) + _i32(_LANES - 1), _i32(_LANES))
                with B.serial(turns) as j:
                    unit = B.bind(base + start + j * _i32(_LANES))
                    self._unpack_unit(unit, row, slab)

    def _unpack_unit(self, unit: Expr, row: Expr, slab: Expr) -> None:
        layout, tile = self.layout, self.tile
        self.unit.fetch(0, unit)
        lane = B.bind(B.floormod(unit, _i32(WARP)))
        turn = B.bind(B.floordiv(lane, _i32(layout.residues)))
        for piece in range(layout.pieces):
            word, number = self.unit.column(0, piece, lane)
            column = B.bind(number * _i32(layout.piece) - slab * _i32(SLAB))
            scale = B.bind(self.unit.scale_half2(0, piece))
            inside = B.And(column >= _i32(0), column < _i32(SLAB))
            # What fills a row's last unit has scale 0 and any column.
            with B.If(B.And(inside, scale != u32(0))), B.Then():
                pairs = registers(4, "uint32")
                for chunk in range(layout.chunks):
                    for i, pair in enumerate(self.unit.pairs(0, piece, chunk, word)):
                        value = device_call("gqsa_hmul2", "uint32", pair, scale)
                        store(pairs, value, i)
                    part = B.bitwise_and(turn + _i32(chunk), _i32(layout.chunks - 1))
                    to = row * _i32(tile.stride) + B.floordiv(column, _i32(2)) + part * _i32(4)
                    store(self.weights, load(pairs, _i32(0), lanes=4), B.bind(to), lanes=4)

    def _corner(self) -> tuple[Expr, Expr]:
        """Emit the first token and row of the warp's part of the tile."""
        tile = self.tile
        down = B.floordiv(self.place.warp, _i32(tile.warps_across))
        across = B.floormod(self.place.warp, _i32(tile.warps_across))
        return B.bind(down * _i32(tile.warp_tokens)), B.bind(across * _i32(tile.warp_rows))

    def _multiply(self) -> None:
        """Emit the products of the slab's columns, 16 at a time."""
        tile = self.tile
        token, row = self._corner()
        group = B.bind(B.floordiv(self.place.lane, _i32(4)))
        inside = B.bind(B.floormod(self.place.lane, _i32(4)))
        a_base = B.bind((token + group) * _i32(tile.stride) + inside)
        b_base = B.bind((row + group) * _i32(tile.stride) + inside)
        across = tile.warp_rows // _N
        a = registers(tile.warp_tokens // _M * 4, "uint32")
        b = registers(across * 2, "uint32")
        with B.serial(SLAB // _K) as step:
            column = B.bind(step * _i32(_K // 2))
            for m in range(tile.warp_tokens // _M):
                for i, (down, right) in enumerate(((0, 0), (8, 0), (0, 4), (8, 4))):
                    at = a_base + column + _i32((m * _M + down) * tile.stride + right)
                    store(a, load(self.tokens, at), 4 * m + i)
            for n in range(across):
                for i in range(2):
                    at = b_base + column + _i32(n * _N * tile.stride + 4 * i)
                    store(b, load(self.weights, at), 2 * n + i)
            for m in range(tile.warp_tokens // _M):
                for n in range(across):
                    to = self.sums.access_ptr("rw", offset=4 * (m * across + n))
                    operands = [load(a, 4 * m + i) for i in range(4)]
                    operands += [load(b, 2 * n + i) for i in range(2)]
                    do(device_call("gqsa_mma", "void", to, *operands))

    def _finish(self) -> None:
        """Emit the epilogue: a lane has neighbouring rows of two tokens in a fragment."""
        tile, params = self.tile, self.args.params
        token, row = self._corner()
        across = tile.warp_rows // _N
        down = B.floordiv(self.place.lane, _i32(4))
        right = B.floormod(self.place.lane, _i32(4)) * _i32(2)
        first_token = B.bind(self.place.token + int64(token + down))
        first_row = B.bind(self.place.row + row + right)
        outputs = Outputs(self.spec, self.args)
        rows = rows_of_output(self.spec)
        for m in range(tile.warp_tokens // _M):
            for half in range(2):
                number = B.bind(first_token + int64(m * _M + 8 * half))
                with B.If(number < self.args.tokens), B.Then():
                    factor = load(register(load(self.x.factors, number), "float32"), 0)
                    for n in range(across):
                        place = 4 * (m * across + n) + 2 * half
                        stored = B.bind(first_row + _i32(n * _N))
                        for start in range(0, 2, rows):
                            own = B.bind(stored + _i32(start))
                            with B.If(own < _i32(self.spec.n)), B.Then():
                                found = registers(rows)
                                for r in range(rows):
                                    value = load(self.sums, place + start + r) * factor
                                    row_scale = load(params["row_scales"], own + _i32(r))
                                    store(found, value * row_scale, r)
                                output = B.bind(B.floordiv(own, _i32(rows)))
                                outputs.finish(found, output, number)
