"""Activations by their address, and steps to the next group: helpers in LLVM's language.

With indices into a buffer a group costs six scalar instructions; with a pointer that moves on, two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gqsa_compiler._tvm import B
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, int64, pick

_ADDRESS = "gqsa_arm_address"
_LOAD = "gqsa_arm_load"
_LOAD_8 = "gqsa_arm_load_8"
_LOAD_16 = "gqsa_arm_load_16"
_LOAD_64 = "gqsa_arm_load_64"
_LOAD_AND_STEP = "gqsa_arm_load_and_step"
_STEP = "gqsa_arm_step"
_INDEX = "gqsa_arm_index"
_WIDEN = "gqsa_arm_widen"
_TABLE = "llvm.aarch64.neon.tbl1.v16i8"

# Inlined where they are called. LLVM makes one instruction of `ld1x2` and the addition to its
# address that follows. A shift and a mask are one instruction too if the mask is in a register,
# where LLVM does not keep it unless told to.
_HELPERS = f"""
declare {{ <16 x i8>, <16 x i8> }} @llvm.aarch64.neon.ld1x2.v16i8.p0(ptr)
define i64 @{_ADDRESS}(ptr %at) {{
  %r = ptrtoint ptr %at to i64
  ret i64 %r
}}
define <32 x i8> @{_LOAD}(i64 %at) {{
  %p = inttoptr i64 %at to ptr
  %r = load <32 x i8>, ptr %p, align 1
  ret <32 x i8> %r
}}
define <8 x i8> @{_LOAD_8}(i64 %at) {{
  %p = inttoptr i64 %at to ptr
  %r = load <8 x i8>, ptr %p, align 1
  ret <8 x i8> %r
}}
define <16 x i8> @{_LOAD_16}(i64 %at) {{
  %p = inttoptr i64 %at to ptr
  %r = load <16 x i8>, ptr %p, align 1
  ret <16 x i8> %r
}}
declare {{ <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8> }} @llvm.aarch64.neon.ld1x4.v16i8.p0(ptr)
define <64 x i8> @{_LOAD_64}(i64 %at) {{
  %p = inttoptr i64 %at to ptr
  %x = call {{ <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8> }} @llvm.aarch64.neon.ld1x4.v16i8.p0(ptr %p)
  %a = extractvalue {{ <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8> }} %x, 0
  %b = extractvalue {{ <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8> }} %x, 1
  %c = extractvalue {{ <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8> }} %x, 2
  %d = extractvalue {{ <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8> }} %x, 3
  %l = shufflevector <16 x i8> %a, <16 x i8> %b, <32 x i32> <{", ".join(f"i32 {i}" for i in range(32))}>
  %h = shufflevector <16 x i8> %c, <16 x i8> %d, <32 x i32> <{", ".join(f"i32 {i}" for i in range(32))}>
  %r = shufflevector <32 x i8> %l, <32 x i8> %h, <64 x i32> <{", ".join(f"i32 {i}" for i in range(64))}>
  ret <64 x i8> %r
}}
define <32 x i8> @{_LOAD_AND_STEP}(i64 %at) {{
  %p = inttoptr i64 %at to ptr
  %x = call {{ <16 x i8>, <16 x i8> }} @llvm.aarch64.neon.ld1x2.v16i8.p0(ptr %p)
  %a = extractvalue {{ <16 x i8>, <16 x i8> }} %x, 0
  %b = extractvalue {{ <16 x i8>, <16 x i8> }} %x, 1
  %r = shufflevector <16 x i8> %a, <16 x i8> %b, <32 x i32> <{", ".join(f"i32 {i}" for i in range(32))}>
  ret <32 x i8> %r
}}
"""  # noqa: E501


# Volatile: LLVM would load neighbours as a vector, and take it apart lane by lane.
_INDEX_HELPERS = "".join(
    f"""
define i64 @{_INDEX}_{count}(i64 %at) {{
  %p = inttoptr i64 %at to ptr
  %x = load volatile i{8 * count}, ptr %p, align 1
  %r = zext i{8 * count} %x to i64
  ret i64 %r
}}
"""
    for count in (1, 2)
)


def _widen_helper(count: int) -> str:
    """Write the helper of `widened`: `tbl` puts each byte into a lane, and zeros beside it.

    LLVM would widen each lane alone if it knew what is in it.
    """
    vectors, all_ = -(-count // 4), ", ".join(f"i32 {min(i, count)}" for i in range(16))
    lines = [
        "%p = inttoptr i64 %at to ptr",
        f"%b = load <{count} x i8>, ptr %p, align 1",
        f"%t = shufflevector <{count} x i8> %b, <{count} x i8> poison, <16 x i32> <{all_}>",
    ]
    for v in range(vectors):
        lanes = [byte for i in range(4) for byte in (4 * v + i, -1, -1, -1)]
        where = ", ".join(f"i8 {lane}" for lane in lanes)
        lines += [
            f"%x{v} = call <16 x i8> @{_TABLE}(<16 x i8> %t, <16 x i8> <{where}>)",
            f"%h{v} = bitcast <16 x i8> %x{v} to <4 x i32>",
        ]
    joined, lanes_each = [f"%h{v}" for v in range(vectors)], 4
    while len(joined) > 1:
        kind = f"<{lanes_each} x i32>"
        lanes_each *= 2
        mask = ", ".join(f"i32 {i}" for i in range(lanes_each))
        halves = list(zip(joined[::2], joined[1::2], strict=True))
        joined = [f"%j{lanes_each}_{i}" for i in range(len(halves))]
        for to, (a, b) in zip(joined, halves, strict=True):
            lines.append(
                f"{to} = shufflevector {kind} {a}, {kind} {b}, <{lanes_each} x i32> <{mask}>"
            )
    result = f"<{lanes_each} x i32>"
    body = "\n  ".join([*lines, f"ret {result} {joined[0]}"])
    return f"\ndefine {result} @{_WIDEN}_{count}(i64 %at) {{\n  {body}\n}}\n"


_WIDEN_HELPERS = f"declare <16 x i8> @{_TABLE}(<16 x i8>, <16 x i8>)\n" + "".join(
    _widen_helper(count) for count in (1, 2, 4, 8, 16)
)


def _step_name(shift: int) -> str:
    return f"{_STEP}_{'left' if shift < 0 else 'right'}_{abs(shift)}"


def _step_helper(shift: int) -> str:
    way = "lsl" if shift < 0 else "lsr"
    return f"""
define i64 @{_step_name(shift)}(i64 %word, i64 %mask) {{
  %r = call i64 asm "and $0, $1, $2, {way} #{abs(shift)}", "=r,r,r"(i64 %mask, i64 %word)
  ret i64 %r
}}
"""


@contextmanager
def helpers(shifts: list[int]) -> Iterator[None]:
    """Make the helpers known to the code that the block emits.

    Parameters
    ----------
    shifts : list of int
        Those that `step` is called with.
    """
    text = (
        _HELPERS
        + _INDEX_HELPERS
        + _WIDEN_HELPERS
        + "".join(_step_helper(shift) for shift in dict.fromkeys(shifts))
    )
    with B.attr(const(0, "int32"), "pragma_import_llvm", text):
        yield


def address(buffer: Buffer) -> Expr:
    """Emit a buffer's address, int64."""
    return B.bind(B.call_extern("int64", _ADDRESS, B.address_of(buffer[int64(0)])))


def load(at: Expr, *, then_step: bool) -> tuple[Expr, Expr]:
    """Emit the loads of 16 and of the next 16 bytes from an address on: int8x16 each.

    Parameters
    ----------
    then_step : bool
        What is added to the address next is not a constant.
    """
    name = _LOAD_AND_STEP if then_step else _LOAD
    both = B.bind(B.call_extern("int8x32", name, at))
    return B.bind(pick([both], range(16))), B.bind(pick([both], range(16, 32)))


def load_16(at: Expr) -> Expr:
    """Emit the load of 16 bytes from an address on: int8x16."""
    return B.bind(B.call_extern("int8x16", _LOAD_16, at))


def load_64(at: Expr) -> list[Expr]:
    """Emit the load of 64 bytes from an address on, by one instruction: four int8x16."""
    all_ = B.bind(B.call_extern("int8x64", _LOAD_64, at))
    return [B.bind(pick([all_], range(i, i + 16))) for i in range(0, 64, 16)]


def load_8(at: Expr) -> Expr:
    """Emit the load of 8 bytes from an address on: int8x8."""
    return B.bind(B.call_extern("int8x8", _LOAD_8, at))


def step(word: Expr, shift: int, most: int) -> Expr:
    """Emit ``(word >> shift) & most``, int64; a negative shift is one to the left."""
    return B.bind(B.call_extern("int64", _step_name(shift), word, int64(most)))


def index(at: Expr, count: int) -> Expr:
    """Emit the load of an unsigned number of one or two bytes from an address on, int64."""
    return B.bind(B.call_extern("int64", f"{_INDEX}_{count}", at))


def widened(at: Expr, count: int) -> Expr:
    """Emit the load of 1, 2, 4, 8 or 16 unsigned bytes from an address on, for `mla` by element.

    Returns
    -------
    Expr
        int32x4, int32x8 or int32x16.
    """
    kind = f"int32x{max(4, count)}"
    return B.bind(B.call_extern(kind, f"{_WIDEN}_{count}", at))
