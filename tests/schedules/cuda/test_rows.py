"""Dense layers, norms and RoPE on a GPU, under the emulation, against numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.dense import CudaDense
from gqsa_compiler.schedules.cuda.norm import norm
from gqsa_compiler.schedules.cuda.rope import rope_qkv
from gqsa_compiler.schedules.generic.rope import RopeShape
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from tests.schedules.cuda.cases import cuda_target
from tests.schedules.cuda.emulation.run import emulate
from tests.schedules.linear_cases import assert_within, expected, random_operands
from tests.schedules.test_rope import EPS, reference, table_of

TARGET = cuda_target("sm_90")
GATED = Epilogue(bias=True, activation="silu", gated=True, residual=True)
PLAIN = Epilogue(bias=True)


def run(
    rule: Any,
    spec: LinearSpec,
    parts: list[Any],
    weight: Any,
    folder: Path,
    counts: tuple[int, ...] = (1, 3, 10),
    error: float = 2e-6,
) -> None:
    """Compile a layer for the emulation and compare it for several numbers of tokens."""
    assert rule.applies(spec, TARGET)
    config = rule.space(spec, TARGET)[0]
    program = emulate(rule.build(spec, config, TARGET), ARCHES["sm_90"], folder)
    packed = rule.pack(spec, config, parts)
    rng = np.random.default_rng(7)
    for m in counts:
        x = rng.standard_normal((m, spec.k)).astype(np.float32)
        operands = random_operands(spec, m, rng)
        arrays = [x] + ([operands["norm"]] if "norm" in operands else [])
        for param in rule.params(spec, config):
            array = packed[param.name]
            assert (array.shape, str(array.dtype)) == (param.shape, param.dtype)
            arrays.append(array)
        arrays += [operands[name] for name in ("bias", "residual") if name in operands]
        out = np.full((m, spec.n_out), np.nan, np.float32)
        got = program.run([*arrays, out], order=m)[-1]
        assert_within(got, expected(spec, weight, error / 2e-6 * np.abs(weight), x, operands))


@pytest.mark.parametrize(
    ("dtype", "k", "epilogue", "eps"),
    [("float16", 264, GATED, 1e-5), ("bfloat16", 72, PLAIN, None), ("float32", 40, PLAIN, None)],
)
def test_dense(dtype: str, k: int, epilogue: Epilogue, eps: float | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    weight = rng.standard_normal((22, k)).astype(kind)
    spec = LinearSpec(22, k, "dense", dtype, norm_eps=eps, epilogue=epilogue)
    # Beyond 8 tokens these are halves, or sums of two bfloat16 numbers.
    error = {"float16": 2.0**-11, "bfloat16": 2.0**-15, "float32": 2e-6}[dtype]
    weights = [weight[:9], weight[9:]]
    run(CudaDense(), spec, weights, weight.astype(np.float64), tmp_path, error=error)


@pytest.mark.parametrize(
    ("dtype", "n", "k", "epilogue"),
    [
        ("float16", 150, 104, GATED),
        pytest.param("bfloat16", 33, 200, PLAIN, marks=pytest.mark.slow),
    ],
)
def test_dense_prompts(dtype: str, n: int, k: int, epilogue: Epilogue, tmp_path: Path) -> None:
    """Numbers of tokens and rows that fill no tile, columns that fill no step."""
    rng = np.random.default_rng(2)
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    weight = rng.standard_normal((n, k)).astype(kind)
    spec = LinearSpec(n, k, "dense", dtype, norm_eps=1e-5, epilogue=epilogue)
    error = 2.0**-11 if dtype == "float16" else 2.0**-15
    exact = weight.astype(np.float64)
    run(CudaDense(), spec, [weight], exact, tmp_path, counts=(9, 64, 65, 140), error=error)


def test_what_it_runs() -> None:
    dense = LinearSpec(8, 64, "dense", "float16")
    assert CudaDense().applies(dense, TARGET)
    assert not CudaDense().applies(replace(dense, k=60), TARGET)
    assert not CudaDense().applies(dense, cuda_target("sm_70"))
    with pytest.raises(CompileError, match="Cannot pack a dense weight"):
        CudaDense().pack(dense, CudaDense().space(dense, TARGET)[0], [np.zeros((8, 64))])


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_norms(center: bool, tmp_path: Path) -> None:
    program = emulate(norm(300, 1e-5, center=center), ARCHES["sm_80"], tmp_path)
    rng = np.random.default_rng(4)
    # A mean far from 0 shows a variance computed as a difference of large numbers.
    x = (rng.standard_normal((3, 300)) + 30).astype(np.float32)
    weight, bias = rng.standard_normal((2, 300)).astype(np.float32)
    arrays = [x, weight, bias] if center else [x, weight]
    out = program.run([*arrays, np.zeros_like(x)], order=1)[-1]
    exact = x.astype(np.float64)
    value = exact - exact.mean(-1, keepdims=True) if center else exact
    want = value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, want + (bias if center else 0), atol=2e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("size", [(3, 1, 64, 64), (2, 2, 80, 10)])
def test_rope(size: tuple[int, int, int, int], qk_norm: bool, tmp_path: Path) -> None:
    function = rope_qkv(RopeShape(*size, qk_norm=qk_norm, eps=EPS))
    program = emulate(function, ARCHES["sm_80"], tmp_path)
    queries, keys, dim, rotary = size
    rng = np.random.default_rng(5)
    qkv = rng.standard_normal((5, (queries + 2 * keys) * dim)).astype(np.float32)
    positions = np.array([0, 100, 3, 3, 7], np.int32)
    table = table_of(rotary)
    norms = [rng.uniform(0.5, 1.5, dim).astype(np.float32) for _ in range(2)] if qk_norm else []
    out = program.run([qkv, positions, table, *norms, np.zeros_like(qkv)], order=2)[-1]
    want = reference(size, qkv, positions, table, norms)
    np.testing.assert_allclose(out, want, atol=2e-5)
