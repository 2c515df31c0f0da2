"""Float16 pages: how numbers are rounded, and where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler._tvm import T, Target, tvm
from gqsa_compiler.schedules.generic.attention_common import AttentionShape
from gqsa_compiler.schedules.generic.config import has_native_half
from gqsa_compiler.schedules.generic.emit import HALF_MAX, float_to_half, span
from gqsa_compiler.schedules.generic.kv_cache import append_kv, split_qkv
from gqsa_compiler.targets import parse_target

CPU = parse_target("cpu")
NATIVE = pytest.mark.parametrize(
    "native",
    [
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not has_native_half(CPU), reason="this machine has no float16 conversion"
            ),
        ),
        False,
    ],
    ids=["hardware", "integers"],
)


def compiled(function: Any) -> Any:
    """Compile one kernel for this machine."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, Target(CPU.tvm_dict()))["main"]


def rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round as numpy does, but to the limit rather than to infinity."""
    return values.clip(-HALF_MAX, HALF_MAX).astype(np.float16)


@NATIVE
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_numbers_are_rounded_to_the_nearest_half(lanes: int, native: bool) -> None:
    @T.prim_func(s_tir=True)
    def function(x_h: T.handle, y_h: T.handle) -> None:
        n = T.int64()
        x = T.match_buffer(x_h, (n,), "float32")
        y = T.match_buffer(y_h, (n,), "float16")
        for i in T.serial(n // lanes):
            y[span(i * lanes, lanes)] = float_to_half(
                x[span(i * lanes, lanes)], lanes, native=native
            )

    # Every float16, the middle to the next and what is just beside it; random bits; no NaN.
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / 2
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    parts = [halves, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9), bits, [np.inf]]
    values = np.concatenate(parts, dtype=np.float32, casting="same_kind")
    values = values[~np.isnan(values)]
    values = np.concatenate([values, -values])
    values = values[: len(values) // lanes * lanes]
    out = tvm.runtime.tensor(np.zeros(len(values), np.float16))
    compiled(function)(tvm.runtime.tensor(values), out)
    np.testing.assert_array_equal(out.numpy().view(np.uint16), rounded(values).view(np.uint16))


@NATIVE
def test_new_keys_are_rounded_and_kept_in_the_first_half_of_the_pages(native: bool) -> None:
    shape = AttentionShape(4, 2, 16, 8, 0, CPU.vector_bits // 32, half=True, native_half=native)
    qkv = np.random.default_rng(0).standard_normal((3, 8, 16)).astype(np.float32)
    qkv[0, 3:] *= 1e6
    outputs = [np.zeros((3, heads, 16), np.float32) for heads in (4, 2, 2)]
    q, k, v = (tvm.runtime.tensor(x) for x in outputs)
    positions = np.array([9, -1, 20], np.int32)
    compiled(split_qkv(shape))(
        tvm.runtime.tensor(qkv), tvm.runtime.tensor(np.arange(3, dtype=np.int32)), q, k, v, 0
    )
    np.testing.assert_array_equal(q.numpy(), qkv[:, :4])
    np.testing.assert_array_equal(k.numpy(), rounded(qkv[:, 4:6]))
    np.testing.assert_array_equal(v.numpy(), rounded(qkv[:, 6:]))
    stored = tvm.runtime.tensor(np.full((4, 2, 2, 8, 16), 7.0, np.float32))
    # Appended as they came: the kernel rounds by itself.
    new = [tvm.runtime.tensor(qkv[:, begin : begin + 2].copy()) for begin in (4, 6)]
    compiled(append_kv(shape))(stored, *new, tvm.runtime.tensor(positions))
    want = np.full((4, 2, 2, 8, 16), 7.0, np.float32)
    pages = want.reshape(-1).view(np.float16)[: want.size].reshape(want.shape)
    for token, (page, slot) in {0: (1, 1), 2: (2, 4)}.items():
        for kind in range(2):
            heads = qkv[token, 4 + 2 * kind : 6 + 2 * kind]
            pages[page, kind, :, slot] = rounded(heads)
    np.testing.assert_array_equal(stored.numpy(), want)
