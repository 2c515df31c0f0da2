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
_LOAD_16 = "gqsa_arm_load_16"
_LOAD_AND_STEP = "gqsa_arm_load_and_step"
_STEP = "gqsa_arm_step"

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
define <16 x i8> @{_LOAD_16}(i64 %at) {{
  %p = inttoptr i64 %at to ptr
  %r = load <16 x i8>, ptr %p, align 1
  ret <16 x i8> %r
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
    text = _HELPERS + "".join(_step_helper(shift) for shift in dict.fromkeys(shifts))
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


def step(word: Expr, shift: int, most: int) -> Expr:
    """Emit ``(word >> shift) & most``, int64; a negative shift is one to the left."""
    return B.bind(B.call_extern("int64", _step_name(shift), word, int64(most)))
