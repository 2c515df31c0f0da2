"""What the attention kernels share: the shape they are built for and small vector pieces.

Register tiles must be whole LLVM vectors in buffers that LLVM turns into registers: TVM keeps a
buffer on the stack (where LLVM can do that) below 1024 bytes only, so a tile is a list of small
buffers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gqsa_compiler._tvm import B, tirx
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.generic.emit import (
    Buffer,
    Expr,
    broadcast,
    const,
    local,
    scalar,
)
from gqsa_compiler.schedules.generic.math import power_of_two

# The score of a key that a query does not see, and the lse of a query that sees none.
MASKED = -1e30
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
    half : bool
        The pages hold float16; attention itself is float32 all the same.
    native_half : bool
        The target converts float16 in one instruction.

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
    half: bool = False
    native_half: bool = False

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


def table_argument(name: str, *shape: Any) -> Buffer:
    """Declare an int32 tensor as the next argument; it may begin inside its memory.

    The runtime keeps many small tables in one allocation and passes slices of it.
    """
    offset = tirx.Var(f"{name}_offset", shape[-1].ty)
    return B.arg(name, B.buffer(shape, "int32", elem_offset=offset))


def rope_arguments() -> Expr:
    """Declare the RoPE numbers that end every attention kernel's arguments; return ``sm_scale``."""
    scalar("rotary_mode", "int32")
    scalar("rope_scale", "float32")
    scalar("rope_theta", "float32")
    return scalar("sm_scale", "float32")


def tile_buffers(count: int, vectors: int, lanes: int) -> list[Buffer]:
    """Allocate `count` rows of `vectors` vectors as register tiles: one small buffer a row."""
    if vectors * lanes > _STACK_FLOATS:
        raise CompileError(
            f"A register tile of {vectors} vectors of {lanes} floats would not be on the stack."
        )
    return [local(vectors * lanes) for _ in range(count)]


def exp2(x: Expr, lanes: int) -> Expr:
    """Emit 2**x for float32 x of `lanes` lanes, x <= 64; 2**-125 where x is below that."""
    clamped = B.bind(B.max(x, broadcast(const(-125.0, "float32"), lanes)))
    # One vector instruction. Rounding by adding 1.5 * 2**23 does not survive TVM's simplifier.
    whole = B.bind(B.nearbyint(clamped))
    return power_of_two(whole, B.bind(clamped - whole))
