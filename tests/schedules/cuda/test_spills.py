"""The kernels of a model besides the sparse layers: they build, and nothing spills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gqsa_compiler.schedules.cuda import attention_decode, attention_prefill, kv_cache
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.bsr import CudaBsrInt2, CudaBsrInt8
from gqsa_compiler.schedules.cuda.dense import CudaDense
from gqsa_compiler.schedules.cuda.lowering import device_source, lower
from gqsa_compiler.schedules.cuda.norm import norm
from gqsa_compiler.schedules.cuda.nvcc import compile_cubin, compile_fatbin
from gqsa_compiler.schedules.cuda.rope import rope_qkv
from gqsa_compiler.schedules.cuda.sampling import choose_tokens
from gqsa_compiler.schedules.generic.attention_common import AttentionShape
from gqsa_compiler.schedules.generic.rope import RopeShape
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from tests.schedules.cuda.cases import cuda_target
from tests.schedules.cuda.test_nvcc import needs_nvcc

LLAMA = AttentionShape(32, 8, 128, page_size=16, window=0, lanes=4)
GEMMA = AttentionShape(8, 4, 256, page_size=16, window=512, lanes=4)
HEAD = LinearSpec(
    4096, 4096, "bsr", "int8", 64, 4096 * 64, True, activation_dtype="int16", norm_eps=1e-5
)
GATED = Epilogue(bias=True, activation="silu", gated=True, residual=True)
SPARSE_2 = LinearSpec(4096, 4096, "bsr", "int2", 64, 4096 * 64, activation_dtype="float16")
SPARSE_8 = LinearSpec(4096, 4096, "bsr", "int8", 16, 4096 * 128, activation_dtype="float16")
DENSE = LinearSpec(4096, 4096, "dense", "bfloat16", norm_eps=1e-5, epilogue=GATED)
DENSE_HALF = replace(DENSE, weight_dtype="float16")


def _linear(rule: Any, spec: LinearSpec, arch: str) -> Any:
    target = cuda_target(arch)
    return rule.build(spec, rule.space(spec, target)[0], target)


KERNELS: dict[str, Callable[[str], Any]] = {
    "decode": lambda _: attention_decode.attention_decode(LLAMA),
    "decode_256": lambda _: attention_decode.attention_decode(GEMMA),
    "new_keys": lambda _: attention_prefill.attention_prefill(LLAMA, paged=False),
    "pages": lambda _: attention_prefill.attention_prefill(LLAMA, paged=True),
    "pages_256": lambda _: attention_prefill.attention_prefill(GEMMA, paged=True),
    "merge": lambda _: kv_cache.merge_states(LLAMA),
    "norm": lambda _: norm(4096, 1e-5, center=True),
    "choice": lambda _: choose_tokens(128256),
    "rope": lambda _: rope_qkv(RopeShape(32, 8, 128, 128, qk_norm=True)),
    "head": lambda arch: _linear(CudaBsrInt8(), HEAD, arch),
    "two_bits": lambda arch: _linear(CudaBsrInt2(), SPARSE_2, arch),
    "eight_bits": lambda arch: _linear(CudaBsrInt8(), SPARSE_8, arch),
    "dense": lambda arch: _linear(CudaDense(), DENSE, arch),
    "dense_half": lambda arch: _linear(CudaDense(), DENSE_HALF, arch),
}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", KERNELS)
def test_nothing_spills(name: str, arch: str) -> None:
    source = device_source(lower(KERNELS[name](arch), ARCHES[arch]))
    cubin, uses = compile_cubin(source, ARCHES[arch])
    assert cubin.startswith(b"\x7fELF")
    assert uses
    for use in uses:
        assert (use.stack_bytes, use.spill_bytes) == (0, 0), use


@needs_nvcc
def test_a_container_of_code_and_ptx() -> None:
    # As TVM writes them: two kernels that call their shared memory alike, of different types.
    source = "".join(
        f'extern "C" __global__ void k{i}({kind}* out) {{\n'
        f"  extern __shared__ __align__(64) {kind} held[];\n"
        "  held[threadIdx.x] = out[threadIdx.x];\n  __syncthreads();\n"
        "  out[threadIdx.x] = held[threadIdx.x ^ 1];\n}\n"
        for i, kind in enumerate(("float", "int"))
    )
    fatbin, uses = compile_fatbin(source, ("sm_80", "compute_80"))
    assert {use.name for use in uses} == {"k0", "k1"}
    alone, _ = compile_fatbin(source, ("sm_80",))
    assert len(alone) < len(fatbin)
    assert fatbin[:4] == alone[:4] == bytes.fromhex("50ed55ba")  # the container's magic number
