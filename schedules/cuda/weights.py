"""A lane's unit of packed weights: loading it, decoding it, and its dot products.

What nvcc 13.0 makes of it for sm_90, G = 16, one token, `depth` 2, in instructions of a warp (a
tile is 64 groups, two a lane):

=======  ============================  ==================  =============
inputs   decode and multiply two       whole walk, a tile  a kept group
=======  ============================  ==================  =============
float16  85                            122                 61
int16    60                            110                 55
=======  ============================  ==================  =============

and about 25 more where a row ends. A unit is one load of 128 bits (codes) and two of 32 (columns
and zero points; scales); its activations are four of 128 bits from shared memory. At 4096 x 4096
with half of the groups kept that is 1.2 (1.1) us of issue slots on 132 processors at 1.75 GHz,
beside 2.1 us of traffic at 3.0 TB/s: computed, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqsa_compiler._tvm import B
from gqsa_compiler.checkpoint import symmetric_zero
from gqsa_compiler.schedules.cuda.activations import Activations
from gqsa_compiler.schedules.cuda.device import device_call, register, registers, u32
from gqsa_compiler.schedules.cuda.layout import StreamLayout
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, load, store
from gqsa_compiler.schedules.spec import LinearSpec

_WORDS = 4  # of codes in a unit
# A half of the bits 0x6400 with q in its last four is 1024 + q, with q above those 1024 + 16 q.
_MINUS_1024, _MINUS_64 = 0xE400E400, 0xD400D400
_SIXTEENTH = 0x2C002C00
_CHUNKS_A_SUM = 2  # chunks summed in halves: 8 products in each half of a half2


@dataclass(frozen=True)
class Field:
    """A stream with `bits` bits (8 or 16) a piece, loaded for all `pieces` of a unit at once."""

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
        words = self.words
        value = load(source, unit * const(words, "int32"), lanes=words)
        store(target, value, const(slot * words, "int32"), lanes=words)

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
        layout = StreamLayout(spec.group_size)
        index, scales = Field(16, layout.pieces), Field(scale_bits, layout.pieces)
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
        return Field(16, self.layout.pieces), Field(self.scale_bits, self.layout.pieces)

    def fetch(self, slot: int, unit: Expr) -> None:
        """Emit the loads of a unit into the registers `slot`."""
        index, scales = self._fields
        codes = load(self.codes, unit * const(_WORDS, "int32"), lanes=_WORDS)
        store(self.held_codes, codes, const(slot * _WORDS, "int32"), lanes=_WORDS)
        group = unit
        if self.layout.span > 1:
            group = B.bind(B.floordiv(unit, const(self.layout.span, "int32")))
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
                sums = self._integer_sums(slot, piece, lane, x, tile, number, word)
            else:
                sums = self._half_sums(slot, piece, lane, x, tile, number, word)
            for t in range(tile):
                store(products, load(products, t) + load(sums, t) * scale, t)
        return products

    def column(self, slot: int, piece: int, lane: Expr) -> tuple[Expr, Expr]:
        """Emit a piece's word of the index, uint32, and which of its columns' pieces it is."""
        index, _ = self._fields
        word = B.bind(index.value(self.held_index, slot, piece))
        column = B.bind(B.bitwise_and(B.shift_right(word, u32(4)), u32(0xFFF)))
        number = B.Cast("int32", column)
        if self.layout.span > 1:
            span = const(self.layout.span, "int32")
            number = number * span + B.floormod(lane, span)
        return word, B.bind(number)

    def pairs(self, slot: int, piece: int, chunk: int, word: Expr) -> list[Expr]:
        """Emit a chunk's codes less the zero point as four pairs of halves."""
        zero = self._zero(word)
        minus_1024 = B.bind(zero * u32(0x00010001) + u32(_MINUS_1024))
        minus_64 = B.bind(zero * u32(0x00100010) + u32(_MINUS_64))
        code = self._code(slot, piece, chunk)
        pairs = []
        for pair in range(4):
            shifted = code if pair < 2 else B.shift_right(code, u32(8))
            mask = 0x000F000F if pair % 2 == 0 else 0x00F000F0
            magic = device_call("gqsa_code_pair", "uint32", shifted, u32(mask))
            if pair % 2 == 0:
                weight = device_call("gqsa_hadd2", "uint32", magic, minus_1024)
            else:
                weight = device_call("gqsa_hfma2", "uint32", magic, u32(_SIXTEENTH), minus_64)
            pairs.append(B.bind(weight))
        return pairs

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
        return B.bind(B.bitwise_and(word, u32(15)))

    def _code(self, slot: int, piece: int, chunk: int) -> Expr:
        word = slot * _WORDS + piece * self.layout.chunks + chunk
        return B.bind(load(self.held_codes, word))

    def _activations(self, x: Activations, t: int, number: Expr, chunk: int, lane: Expr) -> Buffer:
        """Emit the load of the piece's chunk that this lane reads as its `chunk`-th, 16 bytes."""
        layout = self.layout
        at = number * const(layout.piece // 2, "int32") + const(t * self.spec.k // 2, "int32")
        if layout.chunks > 1:
            turn = B.floordiv(lane, const(layout.residues, "int32")) + const(chunk, "int32")
            at = at + B.bitwise_and(turn, const(layout.chunks - 1, "int32")) * const(4, "int32")
        words = registers(4, "uint32")
        store(words, load(x.values, B.bind(at), lanes=4), const(0, "int32"), lanes=4)
        return words

    def _half_sums(
        self, slot: int, piece: int, lane: Expr, x: Activations, tile: int, number: Expr, word: Expr
    ) -> Buffer:
        """Emit the sums of (code - zero point) times activation, in halves and then float32."""
        sums, halves = registers(tile), registers(tile, "uint32")
        for chunk in range(self.layout.chunks):
            weights = self.pairs(slot, piece, chunk, word)
            for t in range(tile):
                values = self._activations(x, t, number, chunk, lane)
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
        self, slot: int, piece: int, lane: Expr, x: Activations, tile: int, number: Expr, word: Expr
    ) -> Buffer:
        """Emit the sums of (code - zero point) times activation, exactly, then as float32."""
        assert x.sums is not None
        zero = B.Cast("int32", self._zero(word))
        totals, sums = registers(tile, "int32"), registers(tile)
        for t in range(tile):
            at = number + const(t * (self.spec.k // self.layout.piece), "int32")
            total = register(load(x.sums, at), "int32")
            store(totals, const(0, "int32") - zero * load(total, 0), t)
        nibbles = 0x0F0F0F0F
        for chunk in range(self.layout.chunks):
            code = self._code(slot, piece, chunk)
            even = B.bind(B.bitwise_and(code, u32(nibbles)))
            odd = B.bind(B.bitwise_and(B.shift_right(code, u32(4)), u32(nibbles)))
            for t in range(tile):
                values = self._activations(x, t, number, chunk, lane)
                for pair, codes in enumerate((even, even, odd, odd)):
                    helper = "gqsa_dp2a_hi" if pair % 2 else "gqsa_dp2a_lo"
                    total = device_call(helper, "int32", load(values, pair), codes, load(totals, t))
                    store(totals, total, t)
        for t in range(tile):
            store(sums, B.Cast("float32", load(totals, t)), t)
        return sums
