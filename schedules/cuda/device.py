"""What the CUDA kernels are written with: registers, shared memory, warp and half2 operations.

Pairs of halves and of 16-bit integers travel as uint32. What TIR cannot say is one line of CUDA C
each, which TVM puts in front of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gqsa_compiler._tvm import B, T
from gqsa_compiler.schedules.cuda.arch import WARP
from gqsa_compiler.schedules.generic.emit import Buffer, Expr, const, load, store

_DEVICE = "__device__ __forceinline__"
_HALF2 = "*reinterpret_cast<half2*>"


def _mma(name: str, dtype: str) -> str:
    """Write the helper for 16 x 16 numbers times 16 x 8, added to 16 x 8 floats.

    PTX ISA, "mma.m16n8k16", has the lanes'.
    """
    instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    return f"""
{_DEVICE} void {name}(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                        unsigned b0, unsigned b1) {{
  asm volatile("{instruction} {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}}
"""


_SOURCES = {
    "gqsa_hfma2": f"""
{_DEVICE} unsigned gqsa_hfma2(unsigned a, unsigned b, unsigned c) {{
  half2 d = __hfma2({_HALF2}(&a), {_HALF2}(&b), {_HALF2}(&c));
  return *reinterpret_cast<unsigned*>(&d);
}}
""",
    "gqsa_hsub2": f"""
{_DEVICE} unsigned gqsa_hsub2(unsigned a, unsigned b) {{
  half2 d = __hsub2({_HALF2}(&a), {_HALF2}(&b));
  return *reinterpret_cast<unsigned*>(&d);
}}
""",
    "gqsa_hmul2": f"""
{_DEVICE} unsigned gqsa_hmul2(unsigned a, unsigned b) {{
  half2 d = __hmul2({_HALF2}(&a), {_HALF2}(&b));
  return *reinterpret_cast<unsigned*>(&d);
}}
""",
    # (word & mask) | magic. Two constants do not fit one instruction as immediates, so nvcc makes
    # two of the plain expression; here it keeps one of them in a register.
    "gqsa_code_pair": f"""
{_DEVICE} unsigned gqsa_code_pair(unsigned word, unsigned mask) {{
  unsigned pair;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(pair) : "r"(word), "r"(mask), "r"(0x64006400u));
  return pair;
}}
""",
    # Bytes 0 to 3 are the word's; 5 and 7 are 0x64, 4 and 6 are 0.
    "gqsa_code_bytes": f"""
{_DEVICE} unsigned gqsa_code_bytes(unsigned word, unsigned bytes) {{
  return __byte_perm(word, 0x64006400u, bytes);
}}
""",
    "gqsa_mma": _mma("gqsa_mma", "f16"),
    "gqsa_mma_bfloat16": _mma("gqsa_mma_bfloat16", "bf16"),
    # Four matrices of 8 x 8 16-bit numbers from shared memory: lane 8 i + r says where row r of
    # the i-th begins, and lane 4 r + c gets its columns 2 c and 2 c + 1 in register i.
    "gqsa_ldmatrix": f"""
{_DEVICE} void gqsa_ldmatrix(unsigned* d, const unsigned* row) {{
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0,%1,%2,%3}}, [%4];"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at));
}}
""",
    "gqsa_shared_address": f"""
{_DEVICE} unsigned gqsa_shared_address(const void* at) {{
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}}
""",
    # A value that ptxas would compute anew wherever it is used stays in a register.
    "gqsa_keep": f"""
{_DEVICE} unsigned gqsa_keep(unsigned value) {{
  unsigned kept;
  asm volatile("mov.u32 %0, %1;" : "=r"(kept) : "r"(value));
  return kept;
}}
""",
    # Not moved over a barrier, as it is volatile.
    "gqsa_load_shared": f"""
{_DEVICE} void gqsa_load_shared(unsigned* d, unsigned at) {{
  asm volatile("ld.shared.v4.u32 {{%0,%1,%2,%3}}, [%4];"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at));
}}
""",
    # 16 bytes on their way to shared memory, or as many zeros; then marks and waits for them.
    "gqsa_copy_async": f"""
#include <cuda_pipeline_primitives.h>
{_DEVICE} void gqsa_copy_async(unsigned* to, const unsigned* from, bool there) {{
  __pipeline_memcpy_async(to, from, 16, there ? 0 : 16);
}}
""",
    "gqsa_copy_commit": f"""
#include <cuda_pipeline_primitives.h>
{_DEVICE} void gqsa_copy_commit() {{ __pipeline_commit(); }}
""",
    **{
        f"gqsa_copy_wait_{behind}": f"""
#include <cuda_pipeline_primitives.h>
{_DEVICE} void gqsa_copy_wait_{behind}() {{ __pipeline_wait_prior({behind}); }}
"""
        for behind in range(4)
    },
    "gqsa_bfloat2": f"""
{_DEVICE} unsigned gqsa_bfloat2(float low, float high) {{
  unsigned d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}}
""",
    "gqsa_half2_sum": f"""
{_DEVICE} float gqsa_half2_sum(unsigned a) {{
  return __low2float({_HALF2}(&a)) + __high2float({_HALF2}(&a));
}}
""",
    "gqsa_half2": f"""
{_DEVICE} unsigned gqsa_half2(float low, float high) {{
  half2 d = __floats2half2_rn(low, high);
  return *reinterpret_cast<unsigned*>(&d);
}}
""",
    "gqsa_short2": f"""
{_DEVICE} unsigned gqsa_short2(float low, float high) {{
  return (unsigned(__float2int_rn(low)) & 0xffffu) | (unsigned(__float2int_rn(high)) << 16);
}}
""",
    # Two int16 times the low (high) two of four unsigned bytes; CUDA C has no name for this one.
    "gqsa_dp2a_lo": f"""
{_DEVICE} int gqsa_dp2a_lo(unsigned a, unsigned b, int c) {{
  int d;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}}
""",
    "gqsa_dp2a_hi": f"""
{_DEVICE} int gqsa_dp2a_hi(unsigned a, unsigned b, int c) {{
  int d;
  asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}}
""",
    "gqsa_first_bit": f"""
{_DEVICE} int gqsa_first_bit(unsigned bits) {{ return __ffs(static_cast<int>(bits)) - 1; }}
""",
    # Past the first-level cache, which another block's sums may not have reached.
    "gqsa_load_l2": f"""
{_DEVICE} float gqsa_load_l2(const float* at) {{ return __ldcg(at); }}
""",
    "gqsa_store_l2": f"""
{_DEVICE} void gqsa_store_l2(float* at, float value) {{ __stcg(at, value); }}
""",
    "gqsa_fence": f"""
{_DEVICE} void gqsa_fence() {{ __threadfence(); }}
""",
    # Counts 0, 1 ... last, 0: the last one to come leaves the counter as the first found it.
    "gqsa_arrive": f"""
{_DEVICE} unsigned gqsa_arrive(unsigned* at, unsigned last) {{ return atomicInc(at, last); }}
""",
}

_TYPES = {"uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned"}


def fetch(to: Buffer, slot: Expr | int, source: Buffer, number: Expr, lanes: int) -> None:
    """Emit the load of the `number`-th (uint32) run of `lanes` integers into registers.

    TIR's own index into an array of symbolic length is of 64 bits, a dozen instructions instead of
    one.
    """
    name = _TYPES[str(to.dtype)]
    vector = name if lanes == 1 else f"uint{lanes}"
    helper = f"gqsa_fetch_{to.dtype}_{lanes}"
    code = f"""
{_DEVICE} void {helper}({name}* to, const {name}* from, unsigned number) {{
  *reinterpret_cast<{vector}*>(to) = __ldg(reinterpret_cast<const {vector}*>(from) + number);
}}
"""
    pointers = to.access_ptr("w", offset=slot), source.access_ptr("r")
    do(T.cuda.func_call(helper, *pointers, number, source_code=code, return_type="void"))


FULL_WARP = 0xFFFFFFFF
"""The mask of all lanes; no warp operation here is of a part of them."""


def device_call(name: str, dtype: str, *args: Expr) -> Expr:
    """Call one of the helpers above."""
    # TVM includes the header only where TIR itself has halves.
    source = f"#include <cuda_fp16.h>\n{_SOURCES[name]}"
    return T.cuda.func_call(name, *args, source_code=source, return_type=dtype)


def do(call: Expr) -> None:
    """Emit a call for its effect."""
    B.evaluate(call)


def u32(value: int) -> Expr:
    """Return a uint32 constant."""
    return const(value, "uint32")


def registers(size: int, dtype: str = "float32") -> Buffer:
    """Allocate a thread's own array; indexed by constants only, it lies in registers."""
    return B.alloc_buffer((size,), dtype, scope="local")


def register(value: Expr, dtype: str) -> Buffer:
    """Put a value into a register that can change."""
    buffer = registers(1, dtype)
    store(buffer, value, 0)
    return buffer


def barrier() -> None:
    """Wait until all threads of the block have come here."""
    do(T.tvm_storage_sync("shared.dyn"))


def shuffle_xor(value: Expr, lanes: int) -> Expr:
    """Take the value of the lane whose number differs in the bits `lanes`."""
    return T.tvm_warp_shuffle_xor(u32(FULL_WARP), value, lanes, WARP, WARP)


def warp_sum(values: Buffer, count: int, lane: Expr) -> None:
    """Sum each of `count` registers (a power of two) over the warp, in a fixed order.

    Each step halves the registers before it halves the lanes, so 8 sums take 9 shuffles and not
    40. Afterwards register 0 of lane l holds sum ``l // (32 / count)``.
    """
    step = WARP // 2
    while count > 1:
        count //= 2
        upper = B.bind(B.bitwise_and(lane, const(step, "int32")) != const(0, "int32"))
        for i in range(count):
            low, high = B.bind(load(values, i)), B.bind(load(values, i + count))
            keep = B.bind(B.Select(upper, high, low))
            send = B.bind(B.Select(upper, low, high))
            store(values, keep + shuffle_xor(send, step), i)
        step //= 2
    while step:
        value = B.bind(load(values, 0))
        store(values, value + shuffle_xor(value, step), 0)
        step //= 2


def warp_max(values: Buffer, at: int, larger: Callable[[Expr, Expr], Expr] | None = None) -> None:
    """Replace a register by its maximum over the warp, by what emits the larger of two."""
    larger = larger or B.max
    step = WARP // 2
    while step:
        value = B.bind(load(values, at))
        store(values, larger(value, shuffle_xor(value, step)), at)
        step //= 2


@dataclass(frozen=True)
class SharedMemory:
    """A block's dynamic shared memory, the kernels' only allocation of it, cut into parts.

    TVM merges several such buffers in a pass that cannot read its own ``Bind`` statements, and
    allows one where that pass is left out.

    Parameters
    ----------
    raw : Buffer
    starts : mapping of str to int
        First 4-byte word of each part.
    parts : mapping of str to int
        Words of each part.
    """

    raw: Buffer
    starts: Mapping[str, int]
    parts: Mapping[str, int]

    @classmethod
    def allocate(cls, parts: Mapping[str, int]) -> SharedMemory:
        """Allocate parts of so many 4-byte words, each 16-byte aligned."""
        starts, used = {}, 0
        for name, words in parts.items():
            starts[name] = used
            used += -(-words // 4) * 4
        return cls(B.alloc_buffer((4 * used,), "uint8", scope="shared.dyn"), starts, parts)

    def part(self, name: str, dtype: str = "float32") -> Buffer:
        """Return a part, of elements of 4 bytes."""
        return B.decl_buffer(
            (self.parts[name],),
            dtype,
            data=self.raw.data,
            elem_offset=self.starts[name],
            scope="shared.dyn",
        )
