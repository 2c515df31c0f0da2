"""A tile of tokens in shared memory: normalised, scaled, and rounded to 16 bits.

``float16``: a token is multiplied by the power of two that brings its largest magnitude to 256 or
more, but below 512. Eight products with a weight's code less its zero point, at most 15, then sum
up to less than the largest half, and numbers down to 2^-23 of the largest keep all their bits:
what was a bfloat16 loses nothing. Codes of 8 bits, at most 255 from their zero point, take 16 to
32, and 2^-19 of the largest. ``int16``: as `schedules.reference.quantise_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.cuda.device import (
    SharedMemory,
    barrier,
    device_call,
    register,
    registers,
    u32,
    warp_max,
    warp_sum,
)
from gqsa_compiler.schedules.cuda.layout import CHUNK, StreamLayout
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, load, store
from gqsa_compiler.schedules.generic.function import Arguments
from gqsa_compiler.schedules.reference import QUANT_TINY
from gqsa_compiler.schedules.spec import LinearSpec


def peak_bits(spec: LinearSpec) -> int:
    """Return p: the largest magnitude of a token of halves is 2^p or more and below 2^(p + 1)."""
    return 4 if spec.bits == 8 else 8


@dataclass(frozen=True)
class Activations:
    """A tile of tokens as the dot products read it.

    Parameters
    ----------
    values : Buffer
        uint32 [tile * K / 2], shared: pairs of float16 or int16.
    sums : Buffer or None
        int32 [tile * K / piece], shared: int16 activations summed over each piece.
    factors : Buffer
        float32 [tile], shared: what a token's finished sums are multiplied by.
    lane_start : Buffer or None
        `weights.Unit.lane_start`, once it is known.
    """

    values: Buffer
    sums: Buffer | None
    factors: Buffer
    lane_start: Buffer | None = None


@dataclass(frozen=True)
class Prologue:
    """Brings a tile of tokens into shared memory; methods emit code for one thread.

    Parameters
    ----------
    tile : int
        Tokens.
    first : Expr
        int64, the first token; those beyond the last one are copies of it.
    thread : Expr
        int32.
    """

    spec: LinearSpec
    config: CudaConfig
    args: Arguments
    tile: int
    first: Expr
    thread: Expr

    def emit(self, shared: SharedMemory) -> Activations:
        """Emit everything, barriers included; the result is in shared memory."""
        values = shared.part("values", "uint32")
        integers = self.spec.activation_dtype == "int16"
        sums = shared.part("value_sums", "int32") if integers else None
        x = Activations(values, sums, shared.part("factors"))
        self.emit_to(x, shared)
        return x

    def emit_to(self, x: Activations, shared: SharedMemory) -> None:
        """Emit everything, barriers included, with the result wherever `x` is."""
        multipliers, partial = shared.part("multipliers"), shared.part("partial")
        for token in range(self.tile):
            self._measure(token, partial)
        barrier()
        self._reduce(partial, multipliers, x.factors)
        barrier()
        for token in range(self.tile):
            self._convert(token, multipliers, x.values, x.sums)
        barrier()

    def _token(self, token: int) -> Expr:
        return B.min(self.first + int64(token), self.args.tokens - int64(1))

    @contextmanager
    def _each(self, size: int, token: int, factor: Expr | None) -> Iterator[tuple[Expr, Buffer]]:
        """Emit a loop over a token's inputs, `size` at a time, the block's threads side by side.

        Gives the number of the stretch and registers: for each input its value, and that value
        times the norm's weight and `factor`.
        """
        args, threads = self.args, self.config.threads
        stretches = self.spec.k // size
        row = B.bind(self._token(token))
        with B.serial(-(-stretches // threads)) as i:
            at = B.bind(i * const(threads, "int32") + self.thread)
            with B.If(at < const(stretches, "int32")), B.Then():
                raw, weights, numbers = registers(size), registers(size), registers(2 * size)
                for start in range(0, size, 4):
                    to = const(start, "int32")
                    column = B.bind(at * const(size, "int32") + to)
                    store(raw, load(args.x, row, column, lanes=4), to, lanes=4)
                    if args.norm is not None:
                        store(weights, load(args.norm, column, lanes=4), to, lanes=4)
                for j in range(size):
                    weighted = load(raw, j)
                    if args.norm is not None:
                        weighted = weighted * load(weights, j)
                    if factor is not None:
                        weighted = weighted * factor
                    store(numbers, load(raw, j), 2 * j)
                    store(numbers, weighted, 2 * j + 1)
                yield at, numbers

    def _measure(self, token: int, partial: Buffer) -> None:
        """Emit a warp's largest magnitude and sum of squares of a token."""
        found = registers(2)
        store(found, const(0.0, "float32"), 0)
        store(found, const(0.0, "float32"), 1)
        with self._each(CHUNK, token, None) as (_, numbers):
            for i in range(CHUNK):
                x = B.bind(load(numbers, 2 * i))
                weighted = B.bind(load(numbers, 2 * i + 1))
                store(found, self._larger(load(found, 0), self._magnitude(weighted)), 0)
                if self.spec.norm_eps is not None:
                    store(found, load(found, 1) + x * x, 1)
        warp_max(found, 0, self._larger)
        square = register(load(found, 1), "float32")
        lane, warp = self._place()
        if self.spec.norm_eps is not None:
            warp_sum(square, 1, lane)
        with B.If(lane == const(0, "int32")), B.Then():
            at = warp + const(2 * token * self.config.warps, "int32")
            store(partial, load(found, 0), at)
            store(partial, load(square, 0), at + const(self.config.warps, "int32"))

    def _magnitude(self, value: Expr) -> Expr:
        if self.spec.activation_dtype == "float16":
            return B.max(value, const(0.0, "float32") - value)
        bits = B.bitwise_and(B.reinterpret("int32", value), const(0x7FFFFFFF, "int32"))
        return B.bind(B.reinterpret("float32", bits))

    def _larger(self, left: Expr, right: Expr) -> Expr:
        """Emit the larger of two magnitudes.

        A maximum of float32 loses NaN. Halves have it all the same, but rounding to int16 loses it
        too: there they are compared as integers, of which NaN is the largest.
        """
        if self.spec.activation_dtype == "float16":
            return B.max(left, right)
        larger = B.max(B.reinterpret("int32", left), B.reinterpret("int32", right))
        return B.reinterpret("float32", larger)

    def _place(self) -> tuple[Expr, Expr]:
        warp = B.bind(B.floordiv(self.thread, const(WARP, "int32")))
        return B.bind(B.floormod(self.thread, const(WARP, "int32"))), warp

    def _reduce(self, partial: Buffer, multipliers: Buffer, factors: Buffer) -> None:
        """Emit, one token a warp, what its inputs and its results are multiplied by."""
        warps, tile = self.config.warps, self.tile
        lane, warp = self._place()
        for start in range(0, tile, warps):
            token = B.bind(warp + const(start, "int32"))
            with B.If(token < const(tile, "int32")), B.Then():
                found = registers(2)
                for i in range(2):
                    store(found, const(0.0, "float32"), i)
                    at = (token * const(2, "int32") + const(i, "int32")) * const(warps, "int32")
                    with B.If(lane < const(warps, "int32")), B.Then():
                        store(found, load(partial, at + lane), i)
                warp_max(found, 0, self._larger)
                square = register(load(found, 1), "float32")
                warp_sum(square, 1, lane)
                multiplier, factor = self._scales(load(found, 0), load(square, 0))
                with B.If(lane == const(0, "int32")), B.Then():
                    store(multipliers, multiplier, token)
                    store(factors, factor, token)

    def _scales(self, peak: Expr, square: Expr) -> tuple[Expr, Expr]:
        spec = self.spec
        norm = const(1.0, "float32")
        if spec.norm_eps is not None:
            mean = square * const(1.0 / spec.k, "float32") + const(spec.norm_eps, "float32")
            norm = B.bind(T.rsqrt(mean))
        peak = B.bind(peak * norm)
        if spec.activation_dtype == "int16":
            limit = const(32767.0, "float32")
            tiny = peak < const(QUANT_TINY, "float32")
            safe = B.max(peak, const(QUANT_TINY, "float32"))
            zero = const(0.0, "float32")
            multiplier = B.bind(B.Select(tiny, zero, limit / safe) * norm)
            # Not finite, where the token is not.
            return multiplier, B.bind(B.Select(tiny, zero, peak / limit))
        bits = B.bind(B.Cast("int32", B.shift_right(B.reinterpret("uint32", peak), u32(23))))
        # 2^(8 - e) and 2^(e - 8) must be normal numbers.
        peak_at = peak_bits(spec)
        low, high = const(peak_at + 1, "int32"), const(253, "int32")
        exponent = B.bind(B.max(B.min(bits, high), low))
        up = B.shift_left(const(254 + peak_at, "int32") - exponent, const(23, "int32"))
        down = B.shift_left(exponent - const(peak_at, "int32"), const(23, "int32"))
        return B.bind(B.reinterpret("float32", up) * norm), B.bind(B.reinterpret("float32", down))

    def _convert(
        self, token: int, multipliers: Buffer, values: Buffer, sums: Buffer | None
    ) -> None:
        """Emit the rounding of a token: a chunk a thread, or where sums are kept a piece."""
        spec = self.spec
        piece = StreamLayout.of(spec).piece
        size = CHUNK if sums is None else piece
        multiplier = load(register(load(multipliers, token), "float32"), 0)
        with self._each(size, token, multiplier) as (at, numbers):
            words = registers(4, "uint32")
            total = register(const(0, "int32"), "int32")
            for chunk in range(size // CHUNK):
                pairs = ((0, 1), (2, 3), (4, 5), (6, 7))
                if sums is not None:
                    # Products are taken of codes' bytes 0 and 1, then 2 and 3
                    # (`StreamLayout.place_of`).
                    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
                for word, pair in enumerate(pairs):
                    low, high = (load(numbers, 2 * (chunk * CHUNK + i) + 1) for i in pair)
                    if sums is None:
                        packed = B.bind(device_call("gqsa_half2", "uint32", low, high))
                    else:
                        packed = B.bind(device_call("gqsa_short2", "uint32", low, high))
                        ones = u32(0x0101)  # as codes
                        more = device_call("gqsa_dp2a_lo", "int32", packed, ones, load(total, 0))
                        store(total, more, 0)
                    store(words, packed, word)
                start = at * const(size // 2, "int32") + const(4 * chunk, "int32")
                start = start + const(token * spec.k // 2, "int32")
                store(values, load(words, const(0, "int32"), lanes=4), start, lanes=4)
            if sums is not None:
                store(sums, load(total, 0), at + const(token * (spec.k // piece), "int32"))
