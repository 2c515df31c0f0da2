"""What the attention kernels share: the shape they are built for and small vector pieces.

The functions here emit TIR when a kernel's TVMScript calls them. They work on explicit vectors
because the register tiles must be whole LLVM vectors in buffers that LLVM turns into registers:
TVM keeps a buffer on the stack (where LLVM can do that) below 1024 bytes only, so a tile is a
list of small buffers.
"""

import math
from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import T
from gqsa_compiler.errors import CompileError
from gqsa_compiler.targets import TargetSpec

# The score of a key that a query does not see, and the lse of a query that sees none.
MASKED = -1e30
LOG2_E = 1.0 / math.log(2.0)
# The kernels are whole: no pass may schedule them. Their arguments do not overlap.
ATTRS = {"tirx.is_scheduled": True, "tirx.noalias": True}
_STACK_FLOATS = 255  # TVM's limit of 1024 bytes, exclusive

# Vector lanes -> (query-row vectors, keys) of a score tile: 12 to 24 accumulators fit the registers
# of AVX-512 (32 of 16 floats), AVX2 (16 of 8) and NEON (32 of 4).
_TILES = {16: (2, 8), 8: (3, 4), 4: (4, 4)}


@dataclass(frozen=True)
class AttentionShape:
    """What an attention kernel is specialised for.

    Parameters
    ----------
    num_heads, num_kv_heads, head_dim : int
        Query heads, key/value heads (a divisor), features of a head (a multiple of 8).
    page_size : int
        Tokens a page of the cache, a multiple of 8.
    window : int
        Sliding window W of the layers that have one: query i sees key j when i - W < j <= i. 0
        where no layer has one. A call means such a layer when its ``sm_scale`` is negative.
    lanes : int
        Floats of the widest vector: 16, 8 or 4.

    Raises
    ------
    CompileError
        The numbers do not fit together.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int
    lanes: int

    def __post_init__(self) -> None:
        if self.num_kv_heads <= 0 or self.num_heads % self.num_kv_heads:
            raise CompileError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads: "
                "the first must be a multiple of the second."
            )
        if self.head_dim <= 0 or self.head_dim % 8:
            raise CompileError(
                f"A head of {self.head_dim} features is not supported: a multiple of 8 is needed."
            )
        if self.page_size <= 0 or self.page_size % 8:
            raise CompileError(
                f"A cache page of {self.page_size} tokens is not supported: "
                "a multiple of 8 is needed."
            )
        if self.window < 0 or self.lanes not in _TILES:
            raise CompileError(
                f"Attention cannot be built with a window of {self.window} tokens "
                f"and vectors of {self.lanes} floats."
            )

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def row_vectors(self) -> int:
        """Vectors of query rows (token, head of the group) that prefill works on at once."""
        return _TILES[self.lanes][0]

    @property
    def rows(self) -> int:
        """Query rows that prefill works on at once."""
        return self.row_vectors * self.lanes

    @property
    def key_tile(self) -> int:
        """Keys of a score tile."""
        return _TILES[self.lanes][1]

    @property
    def feature_lanes(self) -> int:
        """Lanes of a vector along a head's features."""
        return math.gcd(self.head_dim, self.lanes)

    @property
    def page_lanes(self) -> int:
        """Lanes of a vector along a page's tokens."""
        return math.gcd(self.page_size, self.lanes)

    @property
    def accumulators(self) -> int:
        """Vectors that a register tile may have: AVX2 has 16 registers, the others 32."""
        return 12 if self.lanes == 8 else 24


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return max(i for i in range(1, most + 1) if number % i == 0)


def vector_lanes(target: TargetSpec) -> int:
    """Return how many floats `target`'s widest vector has."""
    return target.vector_bits // 32


def tile_buffers(count: int, vectors: int, lanes: int) -> list[Any]:
    """Allocate `count` rows of `vectors` vectors as register tiles: one small buffer a row."""
    if vectors * lanes > _STACK_FLOATS:
        raise CompileError(
            f"A register tile of {vectors} vectors of {lanes} floats would not be on the stack."
        )
    return [T.alloc_buffer((vectors * lanes,), "float32") for _ in range(count)]


def vec(index: Any, lanes: int) -> Any:
    """Return the index of `lanes` consecutive elements."""
    return index if lanes == 1 else T.ramp(index, 1, lanes)


def splat(value: Any, lanes: int) -> Any:
    """Return `lanes` copies of a scalar."""
    return value if lanes == 1 else T.Broadcast(value, lanes)


def exp2(x: Any, lanes: int) -> Any:
    """Emit 2**x for float32 x of `lanes` lanes, x <= 64; 2**-125 where x is below that.

    T.exp2 on vectors becomes one libm call a lane. This is a polynomial on [-0.5, 0.5] (Cephes'
    exp2f, relative error below 2e-7) with the integer part added to the exponent's bits.
    """
    suffix = "" if lanes == 1 else f"x{lanes}"

    def const(value: float) -> Any:
        return splat(T.float32(value), lanes)

    clamped = T.Bind(T.max(x, const(-125.0)))
    # One vector instruction. Rounding by adding 1.5 * 2**23 does not survive TVM's simplifier.
    whole = T.Bind(T.nearbyint(clamped))
    fraction = T.Bind(clamped - whole)
    poly = const(1.535336188319500e-4)
    for coefficient in (
        1.339887440266574e-3,
        9.618437357674640e-3,
        5.550332471162809e-2,
        2.402264791363012e-1,
        6.931472028550421e-1,
        1.0,
    ):
        poly = poly * fraction + const(coefficient)
    exponent = T.shift_left(T.Cast(f"int32{suffix}", whole), splat(T.int32(23), lanes))
    return T.Bind(
        T.reinterpret(f"float32{suffix}", T.reinterpret(f"int32{suffix}", poly) + exponent)
    )


def _horizontal(x: Any, lanes: int, combine: Any) -> Any:
    while lanes > 1:
        half = lanes // 2
        low = T.Shuffle([x], list(range(half)))
        high = T.Shuffle([x], list(range(half, lanes)))
        x = T.Bind(combine(low, high))
        lanes = half
    return x


def horizontal_sum(x: Any, lanes: int) -> Any:
    """Emit the sum of the lanes (a power of two) of a bound vector, halving it each time."""
    return _horizontal(x, lanes, lambda low, high: low + high)


def horizontal_max(x: Any, lanes: int) -> Any:
    """Emit the maximum of the lanes (a power of two) of a bound vector."""
    return _horizontal(x, lanes, T.max)
