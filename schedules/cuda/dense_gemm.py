"""Dense layers on tensor cores, for more tokens than the row kernel takes.

A first launch rounds the tokens. To multiply with float16 weights they become halves scaled by a
power of two (`activations`), as the sparse layers' do. To multiply with bfloat16 ones, whose eight
bits would lose too much of a token, each becomes the sum of two bfloat16 numbers, which has
sixteen: two products, and the weights stay as they are stored.

Then each block computes a tile of tokens by rows. Its columns come in steps, `DenseTile.stages` of
which lie in shared memory: ``cp.async`` fetches the later ones while the first is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.config import CudaConfig, DenseTile
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    device_call,
    do,
    register,
    registers,
    u32,
)
from gqsa_compiler.schedules.cuda.gemm import Halves
from gqsa_compiler.schedules.cuda.gemv import MIN_BLOCKS
from gqsa_compiler.schedules.cuda.launch import each, i32
from gqsa_compiler.schedules.cuda.layout import CHUNK
from gqsa_compiler.schedules.cuda.norm import normalise
from gqsa_compiler.schedules.cuda.rows import rows_of_output
from gqsa_compiler.schedules.cuda.tensor_cores import Operand, OutputTile, Place
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.spec import LinearSpec

_CHUNK_WORDS = CHUNK // 2
_Find = Callable[[Expr], tuple[Expr, Expr]]


@dataclass(frozen=True)
class Terms:
    """All tokens as 16-bit numbers in global memory: each is the sum of the terms' values.

    Parameters
    ----------
    values : tuple of Buffer
        uint32 [m * K / 2], a term each: pairs of columns.
    factors : Buffer or None
        float32 [m]: what a token's sums are multiplied by.
    """

    values: tuple[Buffer, ...]
    factors: Buffer | None

    @classmethod
    def emit(cls, spec: LinearSpec, args: Arguments) -> Terms:
        """Emit the launches that make them."""
        if spec.weight_dtype == "float16":
            halves = Halves.emit(spec, CudaConfig(blocks=1, warps=8), args)
            return cls((halves.values,), halves.factors)
        x = args.x
        if args.norm is not None and spec.norm_eps is not None:
            x = B.alloc_buffer((args.tokens, spec.k), "float32")
            normalise(args.x, args.norm, None, x, args.tokens, spec.k, spec.norm_eps)
        words = args.tokens * int64(spec.k // 2)
        high, low = (B.alloc_buffer((words,), "uint32") for _ in range(2))
        chunks = int64(spec.k // CHUNK)

        def split(number: Expr) -> None:
            token = B.bind(B.floordiv(number, chunks))
            column = B.bind(B.floormod(number, chunks) * int64(CHUNK))
            numbers = registers(CHUNK)
            for i in range(0, CHUNK, 4):
                store(numbers, load(x, token, column + int64(i), lanes=4), i32(i), lanes=4)
            found = [registers(_CHUNK_WORDS, "uint32") for _ in range(2)]
            for pair in range(_CHUNK_WORDS):
                rest = [load(numbers, 2 * pair + i) for i in range(2)]
                for term in found:
                    word = register(device_call("gqsa_bfloat2", "uint32", *rest), "uint32")
                    store(term, load(word, 0), pair)
                    upper = B.bitwise_and(load(word, 0), u32(0xFFFF0000))
                    lower = B.shift_left(load(word, 0), u32(16))
                    taken = [B.reinterpret("float32", bits) for bits in (lower, upper)]
                    rest = [B.bind(a - b) for a, b in zip(rest, taken, strict=True)]
            for term, to in zip(found, (high, low), strict=True):
                at = number * int64(_CHUNK_WORDS)
                store(to, load(term, i32(0), lanes=4), at, lanes=4)

        each(args.tokens * chunks, split)
        return cls((high, low), None)


def launch(spec: LinearSpec, args: Arguments, tile: DenseTile, x: Terms) -> None:
    """Emit the launch of the kernel for many tokens, and the kernel."""
    tile = replace(tile, terms=len(x.values))
    # Outside the kernel, as it is to be the kernel's argument: the emulation knows no bfloat16.
    words = (spec.n * spec.k // 2,)
    weights = B.decl_buffer(words, "uint32", data=args.params["weight"].data)
    columns = B.floordiv(args.tokens + int64(tile.tokens - 1), int64(tile.tokens))
    # Blocks of the same rows follow one another: their weights are still in the second-level cache.
    with (
        B.thread_binding(0, columns, thread="blockIdx.x") as column,
        B.thread_binding(0, -(-spec.n // tile.rows), thread="blockIdx.y") as block,
        B.thread_binding(0, tile.threads, thread="threadIdx.x") as thread,
        B.attr(0, MIN_BLOCKS, 1),
    ):
        shared = SharedMemory.allocate(tile.shared_parts())
        place = Place.of(
            B.bind(B.Cast("int32", block) * i32(tile.rows)),
            B.bind(int64(column) * int64(tile.tokens)),
            B.bind(B.Cast("int32", thread)),
        )
        _Block(spec, args, tile, x, weights, place, shared).emit()


class _Block:
    """A block's tile of outputs; methods emit code for one thread."""

    def __init__(
        self,
        spec: LinearSpec,
        args: Arguments,
        tile: DenseTile,
        x: Terms,
        weights: Buffer,
        place: Place,
        shared: SharedMemory,
    ) -> None:
        self.spec, self.args, self.tile, self.x, self.place = spec, args, tile, x, place
        self.tokens = shared.part("tokens", "uint32")
        self.rows = shared.part("rows", "uint32")
        self.weights = weights
        self.outputs = OutputTile(spec, args, tile, place)
        self.left = self.outputs.tokens_left()

    def emit(self) -> None:
        """Emit everything."""
        tile = self.tile
        steps = -(-self.spec.k // tile.step)
        for step in range(tile.stages - 1):
            self._fetch(i32(step), i32(step), steps)
        with B.serial(steps) as i:
            step = B.bind(B.Cast("int32", i))
            do(device_call(f"gqsa_copy_wait_{tile.stages - 2}", "void"))
            # All have their part of this step, and are through with the one before, whose place
            # the next copies take.
            barrier()
            later = B.bind(step + i32(tile.stages - 1))
            self._fetch(later, B.bind(B.floormod(later, i32(tile.stages))), steps)
            stage = B.bind(B.floormod(step, i32(tile.stages)))
            tokens = tuple(
                Operand(self.tokens, self._tokens_at(stage, t)) for t in range(tile.terms)
            )
            rows = Operand(self.rows, self._rows_at(stage))
            self.outputs.multiply(tokens, rows, tile.step, self.spec.weight_dtype)
        do(device_call("gqsa_copy_wait_0", "void"))
        self.outputs.finish(self.x.factors, None)

    def _tokens_at(self, stage: Expr, term: int) -> Expr:
        size = self.tile.tokens * self.tile.stride
        return B.bind((stage * i32(self.tile.terms) + i32(term)) * i32(size))

    def _rows_at(self, stage: Expr) -> Expr:
        return B.bind(stage * i32(self.tile.rows * self.tile.stride))

    def _fetch(self, step: Expr, stage: Expr, steps: int) -> None:
        """Emit the start of a step's copies into a stage; no copies beyond the last step."""
        tile = self.tile
        with B.If(step < i32(steps)), B.Then():
            for t, values in enumerate(self.x.values):
                to = self._tokens_at(stage, t)
                self._copy(values, self.tokens, to, step, tile.tokens, self._token)
            to = self._rows_at(stage)
            self._copy(self.weights, self.rows, to, step, tile.rows, self._row)
        do(device_call("gqsa_copy_commit", "void"))

    def _token(self, number: Expr) -> tuple[Expr, Expr]:
        """Emit which token the tile's `number`-th is, int64, and whether it exists."""
        token = B.min(number, self.left - i32(1))
        return self.place.token + int64(B.bind(token)), number < self.left

    def _row(self, number: Expr) -> tuple[Expr, Expr]:
        """Emit which weight row is the tile's `number`-th stored one, and whether it exists."""
        stored = B.bind(self.place.row + number)
        row = B.min(stored, i32(self.spec.n - 1))
        if rows_of_output(self.spec) == 2:
            up = B.floormod(row, i32(2)) * i32(self.spec.n_out)
            row = B.floordiv(row, i32(2)) + up
        return int64(B.bind(row)), stored < i32(self.spec.n)

    def _copy(
        self, source: Buffer, to: Buffer, base: Expr, step: Expr, count: int, find: _Find
    ) -> None:
        """Emit the start of copying a step's columns of `count` rows or tokens."""
        tile, k = self.tile, self.spec.k
        chunks = tile.step // CHUNK
        assert count * chunks % tile.threads == 0
        for i in range(count * chunks // tile.threads):
            number = B.bind(self.place.thread + i32(i * tile.threads))
            own = B.bind(B.floordiv(number, i32(chunks)))
            inside = B.bind(B.floormod(number, i32(chunks)))
            chunk = B.bind(step * i32(chunks) + inside)
            row, exists = find(own)
            there = B.And(exists, chunk < i32(k // CHUNK))
            column = B.min(chunk, i32(k // CHUNK - 1))
            start = B.bind(row * int64(k // 2) + int64(column * i32(_CHUNK_WORDS)))
            end = B.bind(base + own * i32(tile.stride) + inside * i32(_CHUNK_WORDS))
            do(
                device_call(
                    "gqsa_copy_async",
                    "void",
                    T.address_of(load(to, end)),
                    T.address_of(load(source, start)),
                    there,
                )
            )
