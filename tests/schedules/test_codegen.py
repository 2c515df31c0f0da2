"""What the code generator makes of the kernels on every target, and inside a Relax function."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from gqsa_compiler._tvm import Target, relax, tvm
from gqsa_compiler.schedules import reference
from gqsa_compiler.schedules.generic.config import GenericConfig
from gqsa_compiler.schedules.spec import ActivationDtype, Epilogue, LinearSpec
from gqsa_compiler.schedules.table import select
from gqsa_compiler.targets import TargetSpec, parse_target
from tests.schedules.linear_cases import HOST, compile_kernel, random_layer, spec_of

FULL = Epilogue(bias=True, activation="silu", gated=True, residual=True)
SPARSE = LinearSpec(64, 512, "bsr", "int4", 16, 700, norm_eps=1e-5, epilogue=FULL)
DENSE = LinearSpec(64, 500, "dense", "float16", norm_eps=1e-5, epilogue=FULL)
BASELINE = replace(
    parse_target("x86-64-v3"), name="old", cpu="x86-64-v2", features=()
)  # a CPU without float16 conversion and fused multiply-add


def assembly(spec: LinearSpec, target: TargetSpec) -> str:
    rule, config = select(spec, target)
    config = replace(cast(GenericConfig, config), tiles=(4,))  # compiles several times faster
    return str(compile_kernel(spec, rule, config, target).mod.inspect_source("asm"))


def library_calls(text: str) -> set[str]:
    """List the functions that the code calls, without TVM's own and indirect calls."""
    calls = set(re.findall(r"^\t(?:callq?|bl)\t([A-Za-z_]\w*)", text, re.MULTILINE))
    return {c for c in calls if not c.lower().startswith(("tvm", "__tvm", "main"))} - {"memset"}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("weight_dtype", ["int2", "int4", "int8"])
@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        (parse_target("x86-64-v4"), r"vfmadd\d+ps\t.*%zmm"),
        (parse_target("x86-64-v3"), r"vfmadd\d+ps\t.*%ymm"),
        (parse_target("aarch64"), r"fmla\tv\d+\.4s"),
        (BASELINE, r"mulps\t.*%xmm"),
    ],
    ids=["v4", "v3", "aarch64", "v2"],
)
def test_sparse_kernels_are_simd_code_without_library_calls(
    target: TargetSpec, instruction: str, weight_dtype: str, dtype: ActivationDtype
) -> None:
    spec = replace(SPARSE, weight_dtype=weight_dtype, activation_dtype=dtype)
    text = assembly(spec, target)
    assert re.search(instruction, text) or dtype == "int8"
    assert library_calls(text) == set()


@pytest.mark.parametrize("target", [parse_target("aarch64"), BASELINE], ids=["aarch64", "v2"])
def test_dense_kernels_make_no_library_calls(target: TargetSpec) -> None:
    assert library_calls(assembly(DENSE, target)) == set()


@pytest.mark.parametrize("m", [1, 5])
def test_a_kernel_is_left_alone_by_relax(m: int) -> None:
    rng = np.random.default_rng(0)
    keep = rng.random((32, 4)) < 0.5
    layer = random_layer(keep, 16, rng)
    spec = spec_of(layer)
    rule, config = select(spec, HOST)
    params = rule.params(spec, config)
    builder = relax.BlockBuilder()
    tokens = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((tokens, spec.k), "float32"))
    weights = [relax.Var(p.name, relax.TensorType(p.shape, p.dtype)) for p in params]
    with builder.function("main", [x, *weights]):
        with builder.dataflow():
            gvar = builder.add_func(rule.build(spec, config, HOST), "linear")
            called = relax.call_tir(
                gvar, [x, *weights], out_ty=relax.TensorType((tokens, spec.n), "float32")
            )
            out = builder.emit_output(relax.op.nn.relu(builder.emit(called)))
        builder.emit_func_output(out)
    executable = tvm.compile(builder.get(), Target(HOST.tvm_dict()))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    data = rng.standard_normal((m, spec.k)).astype(np.float32)
    packed = rule.pack(spec, config, [layer])
    args = [tvm.runtime.tensor(a) for a in (data, *(packed[p.name] for p in params))]
    got = machine["main"](*args).numpy()
    exact = reference.linear(spec, reference.decode(layer), data)
    np.testing.assert_allclose(got, np.maximum(exact, 0), atol=1e-5)
