"""A lane's unit of packed weights: loading it, decoding it, and its dot products.

What nvcc 13.0 makes of it for any of the architectures, G = 16, 4 bits, one token, `depth` 2: a
tile (64 groups, two a lane) takes 106 instructions of a warp with float16 inputs, 82 with int16
ones, and about 25 more where a row ends (`tools/cuda_static.py` counts them). A unit is one load of
128 bits (codes) and two of 32 (columns and zero points; scales); its activations are four of 128
bits from shared memory. At 4096 x 4096 with half of the groups kept that is 0.9 (0.7) us of issue
slots on 132 processors at 1.75 GHz, beside 2.1 us of traffic at 3.0 TB/s: computed, not measured.

What it took to get there from 136 (float16): addresses of weights from 32-bit unit numbers
(`device.fetch`; TIR's index into an array of symbolic length has 64 bits), a lane's place in shared
memory held in a register and chunks chosen by one exclusive or, zero points of two groups unpacked
together by bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gqsa_compiler._tvm import B, T
from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.schedules.cuda.activations import Activations
from gqsa_compiler.schedules.cuda.device import device_call, do, fetch, register, registers, u32
from gqsa_compiler.schedules.cuda.layout import CHUNK, COLUMN_BITS, StreamLayout
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, load, store
from gqsa_compiler.schedules.spec import LinearSpec

_WORDS = 4  # of codes in a unit
_BOTH = 0x00010001  # times a half's bits: a pair of it
_CHUNKS_A_SUM = 2  # chunks summed in halves: 8 products in each half of a half2
# Bytes 0 and 2, or 1 and 3, of a word, each below the byte 0x64.
_BYTE_PAIRS = (0x5250, 0x5351)


def _power(exponent: int) -> int:
    """Return the bits of the half 2^exponent."""
    return exponent + 15 << 10


@dataclass(frozen=True)
class Field:
    """A stream of 8, 16 or 32 bits a piece, loaded for all `pieces` of a unit at once."""

    bits: int
    pieces: int

    @property
    def dtype(self) -> str:
        """The widest unsigned integer that a unit has whole ones of, up to 32 bits."""
        return f"uint{min(32, self.bits * self.pieces)}"

    @property
    def words(self) -> int:
        """Integers of the stream a unit."""
        return max(1, self.bits * self.pieces // 32)

    def fetch(self, target: Buffer, slot: int, source: Buffer, unit: Expr) -> None:
        """Emit the load of a unit's words into a register array."""
        fetch(target, slot * self.words, source, unit, self.words)

    def value(self, held: Buffer, slot: int, piece: int) -> Expr:
        """Emit a piece's bits as uint32; those above them may be another's."""
        word, shift = divmod(piece * self.bits, 32)
        value = B.Cast("uint32", load(held, slot * self.words + word))
        return B.shift_right(value, u32(shift)) if shift else value


@dataclass(frozen=True)
class Unit:
    """The packed tensors of a layer, and a lane's registers for `depth` of its units."""

    spec: LinearSpec
    layout: StreamLayout
    scale_bits: int
    codes: Buffer
    index: Buffer
    scales: Buffer
    held_codes: Buffer
    held_index: Buffer
    held_scales: Buffer

    @classmethod
    def of(cls, spec: LinearSpec, scale_bits: int, depth: int, params: dict[str, Buffer]) -> Unit:
        """Allocate the registers."""
        layout = StreamLayout.of(spec)
        index, scales = Field(layout.index_bits, layout.pieces), Field(scale_bits, layout.pieces)
        return cls(
            spec,
            layout,
            scale_bits,
            params["codes"],
            params["index"],
            params["scales"],
            registers(depth * _WORDS, "uint32"),
            registers(depth * index.words, index.dtype),
            registers(depth * scales.words, scales.dtype),
        )

    @property
    def _fields(self) -> tuple[Field, Field]:
        layout = self.layout
        return Field(layout.index_bits, layout.pieces), Field(self.scale_bits, layout.pieces)

    def fetch(self, slot: int, unit: Expr) -> None:
        """Emit the loads of a unit, uint32, into the registers `slot`."""
        index, scales = self._fields
        fetch(self.held_codes, slot * _WORDS, self.codes, unit, _WORDS)
        group = unit
        if self.layout.span > 1:
            group = B.bind(B.floordiv(unit, u32(self.layout.span)))
        index.fetch(self.held_index, slot, self.index, group)
        scales.fetch(self.held_scales, slot, self.scales, group)

    def products(self, slot: int, lane: Expr, x: Activations, tile: int) -> Buffer:
        """Emit the unit's dot products with a tile of tokens, float32 [tile] in registers."""
        products = registers(tile)
        for t in range(tile):
            store(products, const(0.0, "float32"), t)
        for piece in range(self.layout.pieces):
            word, number = self.column(slot, piece, lane)
            scale = self._scale(slot, piece)
            if self.spec.activation_dtype == "int16":
                sums = self._integer_sums(slot, piece, x, tile, number, word)
            else:
                sums = self._half_sums(slot, piece, x, tile, number)
            for t in range(tile):
                store(products, load(products, t) + load(sums, t) * scale, t)
        return products

    def column(self, slot: int, piece: int, lane: Expr) -> tuple[Expr, Expr]:
        """Emit a piece's word of the index, uint32, and which of its columns' pieces it is."""
        index, _ = self._fields
        word = B.bind(index.value(self.held_index, slot, piece))
        column = word
        if self.layout.zero_bits:
            column = B.shift_right(word, u32(self.layout.zero_bits))
        number = B.Cast("int32", B.bind(B.bitwise_and(column, u32((1 << COLUMN_BITS) - 1))))
        if self.layout.span > 1:
            span = const(self.layout.span, "int32")
            number = number * span + B.floormod(lane, span)
        return word, B.bind(number)

    def pairs(self, slot: int, piece: int, chunk: int) -> list[Expr]:
        """Emit a chunk's codes less the zero point as four pairs of halves.

        A half of the bits 0x6400 is 1024; with q from bit b on in it, it is 1024 + 2^b q.
        """
        zero = self._offset(slot, piece)
        pairs = []
        for pair in range(4):
            place, bit = self.layout.place_of(chunk, 2 * pair)
            code = self._code(slot, piece, place)
            if self.layout.code_bits == 8:
                taken = u32(_BYTE_PAIRS[bit // 8])
                magic = device_call("gqsa_code_bytes", "uint32", code, taken)
                bit = 0
            else:
                # Only the lower bits of a half are its mantissa's.
                shifted = B.shift_right(code, u32(8)) if bit >= 8 else code
                bit %= 8
                mask = (1 << self.layout.code_bits) - 1 << bit
                magic = device_call("gqsa_code_pair", "uint32", shifted, u32(mask * _BOTH))
            if bit == 0:
                weight = device_call("gqsa_hsub2", "uint32", magic, zero)
            else:
                # 1024 - 2^(10 - bit), less 1024 and the zero point: all of them exact.
                rest = np.float16(1024 - 2 ** (10 - bit)).view(np.uint16)
                minus = device_call("gqsa_hsub2", "uint32", u32(int(rest) * _BOTH), zero)
                factor = u32(_power(-bit) * _BOTH)
                weight = device_call("gqsa_hfma2", "uint32", magic, factor, B.bind(minus))
            pairs.append(B.bind(weight))
        return pairs

    def _offset(self, slot: int, piece: int) -> Expr:
        """Emit 1024 plus a piece's zero point, as a pair of halves."""
        if self.spec.symmetric:
            return u32((_power(10) + symmetric_zero(self.spec.bits)) * _BOTH)
        index, _ = self._fields
        word, at = divmod(piece * index.bits // 8, 4)
        both = B.Cast("uint32", load(self.held_index, slot * index.words + word))
        mask = ((1 << self.layout.zero_bits) - 1) * (_BOTH if index.bits == 16 else 1)
        zeros = B.bind(B.bitwise_and(both, u32(mask)))
        return B.bind(device_call("gqsa_code_bytes", "uint32", zeros, u32(0x5050 + 0x0101 * at)))

    def scale_half2(self, slot: int, piece: int) -> Expr:
        """Emit a piece's scale as a pair of equal halves; without its row's factor."""
        return B.bind(self._scale_bits(slot, piece) * u32(0x00010001))

    def _scale_bits(self, slot: int, piece: int) -> Expr:
        """Emit the bits of a piece's scale as a half, uint32."""
        _, scales = self._fields
        bits = scales.value(self.held_scales, slot, piece)
        if self.scale_bits == 8:
            return B.shift_left(B.bitwise_and(bits, u32(0xFF)), u32(5))
        return B.bitwise_and(bits, u32(0xFFFF))

    def _scale(self, slot: int, piece: int) -> Expr:
        half = B.reinterpret("float16", B.Cast("uint16", self._scale_bits(slot, piece)))
        return B.bind(B.Cast("float32", half))

    def _zero(self, word: Expr) -> Expr:
        """Emit a piece's zero point, uint32."""
        if self.spec.symmetric:
            return u32(symmetric_zero(self.spec.bits))
        return B.bind(B.bitwise_and(word, u32((1 << self.layout.zero_bits) - 1)))

    def _code(self, slot: int, piece: int, word: int) -> Expr:
        """Emit the read of one of a piece's words of codes."""
        return B.bind(load(self.held_codes, slot * _WORDS + piece * self.layout.words + word))

    def _bytes(self, slot: int, piece: int, chunk: int) -> tuple[Expr, Expr]:
        """Emit a chunk's codes as bytes: elements 0 4 1 5, and 2 6 3 7."""
        found = []
        for element in (0, 2):
            place, bit = self.layout.place_of(chunk, element)
            code = self._code(slot, piece, place)
            if self.layout.code_bits < 8:
                shifted = B.shift_right(code, u32(bit)) if bit else code
                mask = (1 << self.layout.code_bits) - 1
                code = B.bind(B.bitwise_and(shifted, u32(0x01010101 * mask)))
            found.append(code)
        return found[0], found[1]

    def _activations(self, x: Activations, t: int, number: Expr, chunk: int) -> Buffer:
        """Emit the load of the piece's chunk that this lane reads as its `chunk`-th, 16 bytes."""
        assert x.lane_start is not None
        at = load(x.lane_start, 0) + B.Cast("uint32", number) * u32(2 * self.layout.piece)
        if chunk:
            at = B.bitwise_xor(at, u32(2 * CHUNK * chunk))
        words = registers(4, "uint32")
        at = B.bind(at + u32(2 * t * self.spec.k))
        do(device_call("gqsa_load_shared", "void", words.access_ptr("w"), at))
        return words

    def lane_start(self, x: Activations, lane: Expr) -> Buffer:
        """Emit where in shared memory a lane's first chunk of column 0 is, in bytes; uint32 [1]."""
        layout = self.layout
        start = device_call("gqsa_shared_address", "uint32", T.address_of(load(x.values, 0)))
        turn = B.floordiv(lane, const(layout.residues, "int32"))
        turn = B.floormod(turn, const(layout.chunks, "int32"))
        start = start + B.Cast("uint32", turn * const(2 * CHUNK, "int32"))
        return register(device_call("gqsa_keep", "uint32", start), "uint32")

    def _half_sums(self, slot: int, piece: int, x: Activations, tile: int, number: Expr) -> Buffer:
        """Emit the sums of (code - zero point) times activation, in halves and then float32."""
        sums, halves = registers(tile), registers(tile, "uint32")
        for chunk in range(self.layout.chunks):
            weights = self.pairs(slot, piece, chunk)
            for t in range(tile):
                values = self._activations(x, t, number, chunk)
                for pair, weight in enumerate(weights):
                    value = load(values, pair)
                    if pair == 0 and chunk % _CHUNKS_A_SUM == 0:
                        product = device_call("gqsa_hmul2", "uint32", weight, value)
                    else:
                        product = device_call(
                            "gqsa_hfma2", "uint32", weight, value, load(halves, t)
                        )
                    store(halves, product, t)
            if chunk % _CHUNKS_A_SUM == _CHUNKS_A_SUM - 1 or chunk == self.layout.chunks - 1:
                for t in range(tile):
                    value = device_call("gqsa_half2_sum", "float32", load(halves, t))
                    value = value if chunk < _CHUNKS_A_SUM else load(sums, t) + value
                    store(sums, value, t)
        return sums

    def _integer_sums(
        self, slot: int, piece: int, x: Activations, tile: int, number: Expr, word: Expr
    ) -> Buffer:
        """Emit the sums of (code - zero point) times activation, exactly, then as float32."""
        assert x.sums is not None
        zero = B.Cast("int32", self._zero(word))
        totals, sums = registers(tile, "int32"), registers(tile)
        for t in range(tile):
            at = number + const(t * (self.spec.k // self.layout.piece), "int32")
            total = register(load(x.sums, at), "int32")
            store(totals, const(0, "int32") - zero * load(total, 0), t)
        for chunk in range(self.layout.chunks):
            even, odd = self._bytes(slot, piece, chunk)
            for t in range(tile):
                values = self._activations(x, t, number, chunk)
                for pair, codes in enumerate((even, even, odd, odd)):
                    helper = "gqsa_dp2a_hi" if pair % 2 else "gqsa_dp2a_lo"
                    total = device_call(helper, "int32", load(values, pair), codes, load(totals, t))
                    store(totals, total, t)
        for t in range(tile):
            store(sums, B.Cast("float32", load(totals, t)), t)
        return sums
