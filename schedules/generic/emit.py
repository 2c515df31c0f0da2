"""Small helpers over TVM's IR builder that the generic kernels are written with.

Kernels are built with TVM's IR builder, not TVMScript: the number of vectors, tokens and rows in
flight are Python numbers here, and plain Python loops unroll them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gqsa_compiler._tvm import B, IRBuilder, tvm
from gqsa_compiler.targets import TargetSpec

Expr = Any
Buffer = Any

SCHEDULED = "tirx.is_scheduled"
"""The attribute by which TVM, and `passes/schedule_rest.py`, leave a PrimFunc as it is."""
THREAD_FLOATS = 32768
"""Floats that one thread normalises, rotates or copies while the others are woken.

Measured with 2 threads on an AMD EPYC with AVX-512: waking takes 2.6 us at best, in which the row
kernels handle 25 to 70 thousand floats.
"""

HALF_MAX = 65504.0
"""The largest finite float16."""

_OPAQUE = 8  # TVM's OpPatternKind: never fused into others


@contextmanager
def scheduled() -> Iterator[Any]:
    """Build a PrimFunc in the block; afterwards `get` of what this yields returns it.

    The function is whole: no pass schedules it or fuses it. Its arguments do not overlap.
    """
    with IRBuilder() as builder, B.prim_func(is_private=True, s_tir=True):
        B.func_attr({SCHEDULED: True, "tirx.noalias": True, "op_pattern": _OPAQUE})
        yield builder


def extent(name: str, dtype: str = "int64") -> Expr:
    """Name a symbolic extent; the arguments it is used in give it its value."""
    return tvm.tirx.Var(name, dtype)


def argument(name: str, shape: Sequence[Any], dtype: str = "float32") -> Buffer:
    """Declare the function's next argument, a tensor."""
    return B.arg(name, B.buffer(tuple(shape), dtype))


def scalar(name: str, dtype: str) -> Expr:
    """Declare the function's next argument, a scalar."""
    return B.arg(name, tvm.tirx.Var(name, dtype))


def each_token(tokens: Expr, floats: int, body: Callable[[Expr], None]) -> None:
    """Emit `body` for every token: on all threads where there is enough to do.

    Parameters
    ----------
    floats : int
        What `body` reads; below `THREAD_FLOATS` in all, the calling thread does it alone.
    """
    with B.If(tokens < max(2, THREAD_FLOATS // floats)):
        with B.Then(), B.serial(tokens) as token:
            body(token)
        with B.Else(), B.parallel(tokens) as token:
            body(token)


def vector_lanes(target: TargetSpec) -> int:
    """Return how many floats `target`'s widest vector has."""
    return target.vector_bits // 32


def const(value: float, dtype: str) -> Expr:
    """Return a scalar constant."""
    return tvm.tirx.const(value, dtype)


def vector(dtype: str, lanes: int) -> str:
    """Name the vector type; one lane is a scalar."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def lanes_of(value: Expr) -> int:
    """Return the number of lanes of an expression."""
    return int(tvm.DataType(value.ty.dtype).lanes)


def broadcast(value: Expr, lanes: int) -> Expr:
    """Repeat a scalar expression in `lanes` lanes."""
    return value if lanes == 1 else B.Broadcast(value, lanes)


def span(start: Expr, lanes: int) -> Expr:
    """Index `lanes` consecutive elements from `start`."""
    return start if lanes == 1 else B.ramp(start, 1, lanes)


def load(buffer: Buffer, *indices: Expr, lanes: int = 1) -> Expr:
    """Load `lanes` elements, consecutive along the last axis."""
    index = (*indices[:-1], span(indices[-1], lanes))
    return buffer[index]


def store(buffer: Buffer, value: Expr, *indices: Expr, lanes: int = 1) -> None:
    """Store `lanes` elements, consecutive along the last axis."""
    B.buffer_store(buffer, value, [*indices[:-1], span(indices[-1], lanes)])


def prefetch(buffer: Buffer, *indices: Expr) -> None:
    """Emit a request for an element's cache line; it may lie beyond the buffer's end."""
    address = B.address_of(buffer[indices])
    to_read, keep, data = 0, 3, 1
    B.evaluate(tvm.tirx.call_intrin("void", "tirx.prefetch", address, to_read, keep, data))


def copy(
    target: Buffer,
    to: Sequence[Expr],
    source: Buffer,
    origin: Sequence[Expr],
    size: int,
    lanes: int,
) -> None:
    """Copy `size` elements along the last axis, from index `origin` to index `to`."""
    with B.serial(size // lanes) as i:
        value = load(source, *origin[:-1], origin[-1] + i * lanes, lanes=lanes)
        store(target, value, *to[:-1], to[-1] + i * lanes, lanes=lanes)


def local(size: int, dtype: str = "float32") -> Buffer:
    """Allocate on the stack; LLVM keeps what is only indexed by constants in registers.

    TVM puts small buffers of the default scope on the stack; the scope "local", in spite of its
    name, becomes a call of the runtime's allocator on a CPU.
    """
    return B.alloc_buffer((size,), dtype)


def cast(dtype: str, value: Expr, lanes: int = 1) -> Expr:
    """Convert each lane to `dtype`."""
    return B.Cast(vector(dtype, lanes), value)


def int64(value: Expr | int) -> Expr:
    """Widen an index; all address arithmetic is 64 bits wide."""
    return const(value, "int64") if isinstance(value, int) else B.Cast("int64", value)


def constants(values: Sequence[float], dtype: str) -> Expr:
    """Return a constant vector."""
    return B.Shuffle([const(v, dtype) for v in values], list(range(len(values))))


def pick(vectors: Sequence[Expr], indices: Sequence[int]) -> Expr:
    """Select lanes of the concatenation of `vectors`."""
    return B.Shuffle(list(vectors), list(indices))


def repeat(value: Expr, times: int) -> Expr:
    """Concatenate copies of a vector."""
    return pick([value] * times, range(times * lanes_of(value)))


def half_to_float(value: Expr, lanes: int, *, native: bool) -> Expr:
    """Convert finite float16 lanes to float32, exactly.

    Without hardware conversion LLVM calls a library function per lane, so the exponent is moved in
    integers and corrected by one exact multiplication (this maps subnormals right as well).
    """
    if native:
        return cast("float32", value, lanes)
    bits = cast("uint32", B.reinterpret(vector("uint16", lanes), value), lanes)
    bits = B.bind(bits)

    def u32(number: int) -> Expr:
        return broadcast(const(number, "uint32"), lanes)

    magnitude = B.shift_left(B.bitwise_and(bits, u32(0x7FFF)), u32(13))
    scaled = B.reinterpret(vector("float32", lanes), magnitude) * broadcast(
        const(2.0**112, "float32"), lanes
    )
    sign = B.shift_left(B.bitwise_and(bits, u32(0x8000)), u32(16))
    joined = B.bitwise_or(B.reinterpret(vector("uint32", lanes), scaled), sign)
    return B.reinterpret(vector("float32", lanes), joined)


def float_to_half(value: Expr, lanes: int, *, native: bool) -> Expr:
    """Round float32 lanes to float16, ties to even; what is beyond its range becomes the limit.

    NaN stays NaN in hardware only. In integers, a number below the normal float16s is rounded by
    adding 1/2, whose last place is theirs.
    """

    def number(x: float, dtype: str = "float32") -> Expr:
        return broadcast(const(x, dtype), lanes)

    below = B.Select(value > number(HALF_MAX), number(HALF_MAX), value)
    value = B.bind(B.Select(below < number(-HALF_MAX), number(-HALF_MAX), below))
    if native:
        return cast("float16", value, lanes)
    u32, f32 = vector("uint32", lanes), vector("float32", lanes)
    bits = B.bind(B.reinterpret(u32, value))
    magnitude = B.bind(B.bitwise_and(bits, number(0x7FFFFFFF, "uint32")))
    odd = B.bitwise_and(B.shift_right(magnitude, number(13, "uint32")), number(1, "uint32"))
    normal = B.shift_right(magnitude + odd + number(0xFFF, "uint32"), number(13, "uint32"))
    small = B.reinterpret(u32, B.reinterpret(f32, magnitude) + number(0.5))
    rounded = B.Select(
        magnitude < number(0x38800000, "uint32"),  # 2**-14
        small - number(0x3F000000, "uint32"),
        normal - number(112 << 10, "uint32"),
    )
    sign = B.shift_right(B.bitwise_and(bits, number(0x80000000, "uint32")), number(16, "uint32"))
    joined = cast("uint16", B.bitwise_or(rounded, sign), lanes)
    return B.reinterpret(vector("float16", lanes), joined)


def horizontal_sums(vectors: Sequence[Expr], lanes: int) -> list[tuple[Expr, int]]:
    """Sum the lanes of each float32 vector.

    All vectors go through one tree of shuffles, about three instructions each rather than eight.

    Returns
    -------
    list of (vector, lanes)
        The sums, in order, `lanes` of them a vector: as many as `vectors` in all.
    """
    if len(vectors) > lanes:
        halves = len(vectors) // 2
        return [
            *horizontal_sums(vectors[:halves], lanes),
            *horizontal_sums(vectors[halves:], lanes),
        ]
    count, segment = len(vectors), lanes
    current = list(vectors)
    while segment > 1:
        half = segment // 2
        if len(current) > 1:
            pairs = [[a, b] for a, b in zip(current[::2], current[1::2], strict=True)]
            width = 2 * lanes
        else:
            pairs = [current]
            width = count * segment
        low = [i for start in range(0, width, segment) for i in range(start, start + half)]
        current = [B.bind(pick(p, low) + pick(p, [i + half for i in low])) for p in pairs]
        segment = half
    return [(current[0], count)]


def horizontal_sum(value: Expr, lanes: int) -> Expr:
    """Sum the lanes (a power of two) of one vector."""
    return horizontal_sums([value], lanes)[0][0]


def horizontal_max(value: Expr, lanes: int) -> Expr:
    """Emit the maximum of the lanes (a power of two) of a bound vector."""
    while lanes > 1:
        half = lanes // 2
        low, high = pick([value], range(half)), pick([value], range(half, lanes))
        value = B.bind(B.max(low, high))
        lanes = half
    return value
